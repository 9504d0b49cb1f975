//! Where the ring of a group lies, how large it is, and which dead rings go.
//!
//! Rings lie in `RING_DIR/GROUP-ID/`, in directories that are this user's alone ([`kfilter::RingDir`]). The
//! file `owner` beside a ring says which state directory it belongs to, and on which file system that
//! directory's parent lies.
//!
//! ⚠ A ring is swept only where it is proven to be dead: it is ours, no process locks it, and its state
//! directory is another group's by now, or gone from a file system that is mounted as it was. An agent that
//! is merely away finds its ring again.

use std::path::{Path, PathBuf};

use journal::GroupId;
use journal::control::TwoSlot;
use journal::io::RealDisk;
use kfilter::ring_dir::is_in_memory;
use kfilter::{ErrorKind as Cause, Region, RingDir, region::RegionSpec};

use crate::error::{Error, ErrorKind, Result};
use crate::state::{self, StateFile};

/// A ring is no smaller than this, however little room there is: sixteen records of the longest payload,
/// twice.
const LEAST_BYTES: u64 = conf::Ring::LEAST_BYTES;
/// What lies in the directory of a ring.
const FILES: [&str; 5] = ["ring", "ring.tmp", "owner", "alive", "ring.lock"];
/// Where a default directory is looked for, the first that is in memory: /run is not, in most containers.
const DEFAULTS: [&str; 2] = [conf::RING_DIR, "/dev/shm/afterimage"];

/// Where the ring of this group lives.
pub fn ring_dir(settings: &conf::Replicator, state: &StateFile) -> PathBuf {
    base(settings, state).join(state.get().group.to_string())
}

/// The directory of all rings: what the settings say; where they say nothing, the one that holds the ring of
/// this group, or the first that is in memory.
fn base(settings: &conf::Replicator, state: &StateFile) -> PathBuf {
    if settings.ring_dir != Path::new(conf::RING_DIR) {
        return settings.ring_dir.clone();
    }
    let group = state.get().group.to_string();
    let held = DEFAULTS.iter().find(|dir| Path::new(dir).join(&group).join("ring").exists());
    let usable = || DEFAULTS.iter().find(|dir| is_in_memory(Path::new(dir)));
    held.or_else(usable).unwrap_or(&DEFAULTS[0]).into()
}

/// The directory, made where it is missing.
pub(super) fn open(settings: &conf::Replicator, state: &StateFile) -> Result<RingDir> {
    let failed = |error| Error::because(ErrorKind::Ring, "the directory of the rings cannot be used", error);
    let above = base(settings, state);
    RingDir::open_or_make(&above).map_err(failed)?;
    RingDir::open_or_make(&ring_dir(settings, state)).map_err(failed)
}

/// A new ring in place of one that may be there. Where there is no room it is a smaller one, which is said.
pub(super) fn make(settings: &conf::Replicator, state: &StateFile, spec: &RegionSpec<'_>) -> Result<Region> {
    let dir = open(settings, state)?;
    sweep(&base(settings, state), state.get().group);
    let wanted = spec.ring_bytes;
    let mut ring_bytes = wanted;
    let region = loop {
        match Region::create(dir.path(), &RegionSpec { ring_bytes, ..*spec }) {
            Ok(region) => break region,
            Err(error) if error.kind == Cause::NoSpace && ring_bytes / 2 >= LEAST_BYTES => ring_bytes /= 2,
            Err(error) => return Err(Error::because(ErrorKind::Ring, "make the ring", error)),
        }
    };
    if ring_bytes < wanted {
        tracing::warn!(
            dir = %dir.path().display(),
            "{}", is_smaller(ring_bytes, wanted)
        );
    }
    if let Err(error) = note_owner(settings, &dir) {
        tracing::debug!(%error, "the ring does not say whose it is");
    }
    Ok(region)
}

/// What status says of a ring that is smaller than it should be.
pub(crate) fn is_smaller(ring_bytes: u64, wanted: u64) -> String {
    format!(
        "the ring has {} of {}, for want of room in its tmpfs: bursts of writes overflow it sooner; give the tmpfs more room \
         and stop and start",
        conf::units::format_bytes(ring_bytes),
        conf::units::format_bytes(wanted)
    )
}

fn device_of(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::symlink_metadata(path).ok().map(|found| found.dev())
}

fn note_owner(settings: &conf::Replicator, dir: &RingDir) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let Some(device) = settings.dir.parent().and_then(device_of) else { return Ok(()) };
    let mut text = format!("{device} ").into_bytes();
    text.extend_from_slice(settings.dir.as_os_str().as_bytes());
    dir.write("owner", &text)
}

/// Removes the rings below `base` that are proven to be dead; what is not ours, or in doubt, stays.
fn sweep(base: &Path, own: GroupId) {
    let Ok(found) = RingDir::open(base).and_then(|base| base.names()) else { return };
    for name in found {
        let Ok(group) = uuid::Uuid::parse_str(&name).map(|id| GroupId(*id.as_bytes())) else { continue };
        if group == own || group.to_string() != name {
            continue;
        }
        let Ok(dir) = RingDir::open(&base.join(&name)) else { continue };
        match sweep_one(&dir, group) {
            Ok(false) => {}
            Ok(true) => tracing::info!(dir = %dir.path().display(), "a dead ring was removed"),
            Err(error) => tracing::debug!(%error, "a dead ring stays"),
        }
    }
}

/// Removes one; false where it is not proven to be dead.
fn sweep_one(dir: &RingDir, group: GroupId) -> std::result::Result<bool, kfilter::Error> {
    let is_known = dir.names()?.iter().all(|name| FILES.contains(&name.as_str()));
    if !is_known {
        return Ok(false);
    }
    let _lock = match dir.lock(false) {
        Ok(lock) => lock,
        Err(error) if matches!(error.kind, Cause::Busy | Cause::Absent) => return Ok(false),
        Err(error) => return Err(error),
    };
    let has_ring = dir.path().join("ring").exists();
    if has_ring && Region::group_in(dir) != Some(group.0) || !is_dead(dir, group) {
        return Ok(false);
    }
    // The lock last: until then no other process is in here.
    for name in FILES {
        dir.remove(name)?;
    }
    // Gone already, or somebody begins anew in it: both are well.
    let _ = std::fs::remove_dir(dir.path());
    Ok(true)
}

/// Whether the state directory that a ring names is another group's now, or gone from a file system that is
/// there.
fn is_dead(dir: &RingDir, group: GroupId) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let Ok(text) = dir.read("owner") else { return false };
    let Some(space) = text.iter().position(|byte| *byte == b' ') else { return false };
    let device = std::str::from_utf8(&text[..space]).ok().and_then(|text| text.parse::<u64>().ok());
    let home = Path::new(std::ffi::OsStr::from_bytes(&text[space + 1..]));
    let (Some(device), Some(parent)) = (device, home.parent()) else { return false };
    match std::fs::symlink_metadata(home) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => device_of(parent) == Some(device),
        Err(_) => false,
        Ok(_) => TwoSlot::read(&RealDisk, &home.join("state"))
            .ok()
            .and_then(|slots| state::group_in(&slots.payload))
            .is_some_and(|now| now != group),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use journal::io::Disk;
    use kfilter::{Identity, VolumeSpec};

    use super::*;

    fn settings(home: &Path, rings: &Path) -> conf::Replicator {
        let volume = ("v".to_owned(), home.join("v.img"), Some(1 << 20));
        let mut settings =
            conf::Replicator::embedded(home, "g", [volume], ([127, 0, 0, 1], 1).into(), [7; 32]).unwrap();
        settings.ring_dir = rings.to_owned();
        settings
    }

    fn spec(state: &StateFile, volumes: &'static [VolumeSpec]) -> RegionSpec<'static> {
        let identity =
            Identity { boot_id: [1; 16], group_id: state.get().group.0, epoch: 1, epoch_id: [2; 16] };
        RegionSpec { identity, volumes, ring_bytes: 8 << 20, first_lsn: 1, last_time_ns: 0 }
    }

    static VOLUMES: [VolumeSpec; 1] =
        [VolumeSpec { id: 0, sector_bytes: 512, uuid: [3; 16], size_bytes: 1 << 20 }];

    fn state(home: &Path) -> StateFile {
        std::fs::create_dir_all(home).unwrap();
        StateFile::open(&(Arc::new(RealDisk) as Arc<dyn Disk>), home).unwrap()
    }

    #[test]
    fn only_rings_that_are_proven_dead_are_swept() {
        let (homes, rings) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let rings = rings.path();
        let home = |name: &str| homes.path().join(name);
        let ring = |name: &str| {
            let settings = settings(&home(name), rings);
            let state = state(&home(name));
            let region = make(&settings, &state, &spec(&state, &VOLUMES)).unwrap();
            (ring_dir(&settings, &state), region)
        };
        let (away, _) = ring("away");
        let (locked, _owner) = ring("locked");
        let (gone, _) = ring("gone");
        let (replaced, _) = ring("replaced");
        let (foreign, _) = ring("foreign");
        for name in ["locked", "gone", "foreign"] {
            std::fs::remove_dir_all(home(name)).unwrap();
        }
        std::fs::write(foreign.join("notes"), "of an operator").unwrap();
        for name in ["state", "state.copy"] {
            std::fs::remove_file(home("replaced").join(name)).unwrap();
        }
        drop(state(&home("replaced")));
        std::fs::write(rings.join("file"), "not a ring").unwrap();
        let (mine, _region) = ring("mine");
        assert!(away.exists(), "its agent may come back");
        assert!(locked.exists() && foreign.exists() && mine.exists() && rings.join("file").exists());
        assert!(!gone.exists(), "its state directory is gone");
        assert!(!replaced.exists(), "its state directory is another group's");
    }

    #[test]
    fn a_smaller_ring_is_made_where_there_is_no_room_and_no_smaller_than_the_least() {
        let (home, rings) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let settings = settings(home.path(), rings.path());
        let state = state(home.path());
        // More than any machine has, halved until it fits, would take a machine's memory: the least of all is
        // asked for alone.
        let vast = RegionSpec { ring_bytes: 1 << 50, ..spec(&state, &VOLUMES) };
        let refused = Region::create(open(&settings, &state).unwrap().path(), &vast).unwrap_err();
        assert_eq!(refused.kind, Cause::NoSpace);
        assert!(is_smaller(8 << 20, 64 << 20).contains("8MiB of 64MiB"));
    }
}
