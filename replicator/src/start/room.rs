//! Whether a disk may be protected: it is nobody else's, it lies where disks lie, and it is a disk.

use std::fs::File;
use std::path::{Path, PathBuf};

use machine::disk::{container::Container, users};
use nbd::Backing;

use super::{OpenVolume, Opened};
use crate::error::{Error, ErrorKind, Result};

/// What of our own lies beside the disks in the state directory.
const OWN: [&str; 8] =
    ["state", "lock", "verify", "verify.new", "skipped", "control.sock", "journal", "identity"];

/// Refuses a path inside what is ours. Beside our files, in the state directory itself, disks may lie: `up`
/// puts its own there.
pub(super) fn is_outside(settings: &conf::Replicator, volume: &conf::Volume) -> Result<()> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let path = match (volume.path.parent(), volume.path.file_name()) {
        // A disk that is still to be made has no real path.
        (Some(parent), Some(name)) if !volume.path.exists() => real(parent).join(name),
        _ => real(&volume.path),
    };
    let own = OWN.iter().map(|name| real(&settings.dir).join(name));
    let rooms: Vec<PathBuf> = own.chain([real(&settings.identity_dir), real(&settings.ring_dir)]).collect();
    let Some(room) = rooms.iter().find(|room| path.starts_with(room)) else { return Ok(()) };
    let at = format!(
        "volume {}: {} lies in {}, which is the agent's own; a disk that it writes to itself cannot be protected: move it",
        volume.name,
        volume.path.display(),
        room.display()
    );
    Err(Error::new(ErrorKind::Settings, at))
}

/// Makes the file of a new volume, in a directory that exists: one that does not is a file system that is not
/// mounted, or an error of typing. One that is known and gone is not made again: an empty disk would take its
/// place, and its replica's.
pub(super) fn create_missing(volume: &conf::Volume, is_known: bool) -> Result<()> {
    let (name, path) = (&volume.name, volume.path.display());
    let Some(size) = volume.size else { return Ok(()) };
    if volume.path.exists() {
        return Ok(());
    }
    let refused = |why: &str| Error::new(ErrorKind::Settings, format!("volume {name}: {path} {why}"));
    if is_known {
        return Err(refused(
            "is gone; bring it back (is its file system mounted?), or, to begin with an empty disk, make the file yourself",
        ));
    }
    if volume.path.is_symlink() {
        return Err(refused("is a link that leads nowhere; no disk is made behind it: correct the link"));
    }
    let parent = volume.path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new(".")).canonicalize();
    let Some(parent) = parent.ok().filter(|parent| parent.is_dir()) else {
        return Err(refused(
            "lies in a directory that does not exist, so no disk is made there: mount its file system, correct the path, or \
             make the directory",
        ));
    };
    // A file in the place of a device would lie in memory, and be taken for the device. /dev/shm is for
    // files.
    if parent.starts_with("/dev") && !parent.starts_with("/dev/shm") {
        return Err(refused(
            "is not there, and no disk is made in /dev: attach the device, or correct the path",
        ));
    }
    let create = || -> std::io::Result<()> {
        let file = File::options().write(true).create_new(true).open(&volume.path)?;
        file.set_len(size)?;
        file.sync_all()?;
        File::open(&parent)?.sync_all()
    };
    create()
        .map_err(|error| Error::because(ErrorKind::Io, format!("volume {name}: create {path}"), error))?;
    tracing::warn!(
        volume = %name,
        path = %path,
        size_bytes = size,
        "there was no such disk: a new, empty one was made"
    );
    Ok(())
}

/// Refuses a file that holds a disk in a format of its own. Only for a new volume: what a guest writes to the
/// beginning of a disk that is protected already is its own affair.
pub(super) fn is_no_container(volume: &conf::Volume) -> Result<()> {
    let found = File::open(&volume.path).ok().and_then(|file| Container::of(&file));
    let Some(container) = found else { return Ok(()) };
    let at = format!("volume {}: {}", volume.name, container.advice(&volume.path));
    Err(Error::new(ErrorKind::Settings, at))
}

/// Refuses a disk that others use: what they write passes by capture, and they overwrite what clients write.
pub(super) fn is_free(volume: &conf::Volume, backing: &Backing) -> Result<()> {
    let found = backing.users().map_err(|error| {
        let at = format!("volume {}: look who uses {}", volume.name, volume.path.display());
        Error::because(ErrorKind::Io, at, error)
    })?;
    if found.is_empty() {
        return Ok(());
    }
    let at = format!(
        "volume {}: {} is in use ({}); what others write to it would not be replicated: end that, and let them use the NBD \
         socket",
        volume.name,
        volume.path.display(),
        users::told(&found)
    );
    Err(Error::new(ErrorKind::Busy, at))
}

/// Refuses two volumes on one disk: two paths to it, and behind the front a file and a loop device over it,
/// or a disk and its partition. In the kernel a disk and its partition may be two volumes: each sees what is
/// written through the other.
pub(super) fn is_one_each(volumes: &[OpenVolume]) -> Result<()> {
    let shares = |a: &OpenVolume, b: &OpenVolume| match (&a.content, &b.content) {
        (Opened::Front(a), Opened::Front(b)) => a.shares_with(b),
        (Opened::Device(Some(a)), Opened::Device(Some(b))) => a.rdev() == b.rdev(),
        _ => false,
    };
    for (at, a) in volumes.iter().enumerate() {
        if let Some(b) = volumes[..at].iter().find(|b| shares(a, b)) {
            let at = format!(
                "volumes {} and {} are one disk, or parts of one: {} and {}; protect it once",
                b.known.name,
                a.known.name,
                b.path.display(),
                a.path.display()
            );
            return Err(Error::new(ErrorKind::Settings, at));
        }
    }
    Ok(())
}
