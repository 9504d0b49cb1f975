//! The volumes of a run: opened, and compared with what the group knows of them.

use journal::{VolumeId, VolumeUuid};

use super::{Doubts, OpenVolume, Opened, stamp};
use crate::capture::attach;
use crate::capture::disk::Disk;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Capturing, Gap, KnownVolume, StateFile};
use crate::surroundings::Surroundings;

/// Opens the disks and compares them with what the group knows; returns what gives reason to doubt the replica.
pub(super) fn open(
    settings: &conf::Replicator,
    surroundings: &Surroundings,
    state: &mut StateFile,
) -> Result<(Vec<OpenVolume>, Doubts)> {
    let mut doubts = Doubts::default();
    if let Some(gap) = &state.get().needs_resync {
        let to = if state.get().gap_in_ring { &mut doubts.without_ring } else { &mut doubts.always };
        to.push(gap.cause.clone());
    }
    let mut opened = Vec::new();
    let clean = state.get().clean.is_some();
    let first = state.get().volumes.is_empty();
    let mut known: Vec<KnownVolume> = state.get().volumes.clone();
    for volume in &settings.volume {
        let remembered = known.iter().position(|known| known.name == volume.name);
        let detached = remembered.is_some_and(|at| known[at].is_detached());
        let found = find(settings, surroundings, volume, remembered.is_some(), detached)?;
        let at = match (remembered, &found) {
            (Some(at), _) => at,
            (None, found) => {
                let id = known.iter().map(|known| known.id.0 + 1).max().unwrap_or(0);
                if !first {
                    doubts.always.push(format!("volume {} was added", volume.name));
                }
                known.push(KnownVolume {
                    id: VolumeId(id),
                    uuid: VolumeUuid(*uuid::Uuid::new_v4().as_bytes()),
                    name: volume.name.clone(),
                    size_bytes: found.size_bytes.unwrap_or(0),
                    stamp: found.stamp,
                    present: true,
                    device: None,
                    capturing: Capturing::On,
                });
                known.len() - 1
            }
        };
        let entry = &mut known[at];
        let size_bytes = found.size_bytes.unwrap_or(entry.size_bytes);
        if size_bytes < entry.size_bytes {
            let at = format!(
                "volume {}: {} shrank from {} to {size_bytes} bytes; a volume never shrinks: give it its size back, or \
                 protect it under a new name",
                volume.name,
                volume.path.display(),
                entry.size_bytes
            );
            return Err(Error::new(ErrorKind::Settings, at));
        }
        if size_bytes > entry.size_bytes {
            // The kernel's ring tells a growth by itself, before the first write that needs it.
            let to = match settings.capture {
                conf::Capture::Nbd => &mut doubts.always,
                conf::Capture::Kfilter => &mut doubts.without_ring,
            };
            to.push(format!("volume {} grew", volume.name));
        }
        if clean && !detached && !found.is_unchanged(entry) {
            doubts
                .without_ring
                .push(format!("volume {} was changed while it was not protected", volume.name));
        }
        if !entry.present {
            doubts.always.push(format!("volume {} came back", volume.name));
        }
        let identity = surroundings.backings.identity(&volume.path);
        if entry.stamp.is_some_and(|seen| seen[1] == 0 && identity.is_some_and(|now| now != seen)) {
            doubts
                .always
                .push(format!("volume {}: another file took the place of the one served", volume.name));
        }
        entry.stamp = identity.or(entry.stamp);
        if settings.capture == conf::Capture::Nbd {
            entry.size_bytes = size_bytes;
        }
        entry.present = true;
        opened.push(OpenVolume { known: entry.clone(), path: volume.path.clone(), content: found.content });
    }
    for known in &mut known {
        if known.present && !settings.volume.iter().any(|volume| volume.name == known.name) {
            doubts.always.push(format!("volume {} left the group", known.name));
            known.present = false;
        }
    }
    if !doubts.always.is_empty() {
        // Before the sizes are remembered: a crash in between must find the doubt again.
        let cause = doubts.always.join("; ");
        state.update(|state| {
            state.needs_resync = Some(Gap { cause, since_ns: now_ns() });
            state.gap_in_ring = false;
        })?;
    }
    state.update(|state| state.volumes = known)?;
    Ok((opened, doubts))
}

/// A disk as it is now.
struct FoundDisk {
    content: Opened,
    /// `None` where it is not looked at.
    size_bytes: Option<u64>,
    stamp: Option<[u64; 3]>,
}

impl FoundDisk {
    /// Whether nobody wrote to it since the clean stop that `known` remembers.
    fn is_unchanged(&self, known: &KnownVolume) -> bool {
        match &self.content {
            Opened::Front(_) => self.stamp.is_some() && self.stamp == known.stamp,
            Opened::Device(Some(disk)) => match (stamp::of_device(disk), &known.device) {
                (Ok(now), Some(then)) => stamp::is_unchanged(then, &now),
                _ => false,
            },
            Opened::Device(None) => true,
        }
    }
}

fn find(
    settings: &conf::Replicator,
    surroundings: &Surroundings,
    volume: &conf::Volume,
    is_known: bool,
    detached: bool,
) -> Result<FoundDisk> {
    if settings.capture == conf::Capture::Kfilter {
        if detached {
            // Its device may be gone by now; nobody asks for it.
            return Ok(FoundDisk { content: Opened::Device(None), size_bytes: None, stamp: None });
        }
        let disk = attach::open(&volume.path, &settings.dir)?;
        let size_bytes = Some(Disk::size_bytes(&disk));
        return Ok(FoundDisk { content: Opened::Device(Some(disk)), size_bytes, stamp: None });
    }
    create_missing(volume, is_known)?;
    let stamp = surroundings.backings.stamp(&volume.path);
    let backing = surroundings
        .backings
        .open(&volume.path)
        .map_err(|error| Error::because(ErrorKind::Settings, format!("volume {}", volume.name), error))?;
    let size_bytes = backing.size_bytes();
    if size_bytes == 0 {
        let at = format!("volume {}: {} is empty; give it a size", volume.name, volume.path.display());
        return Err(Error::new(ErrorKind::Settings, at));
    }
    Ok(FoundDisk { content: Opened::Front(backing), size_bytes: Some(size_bytes), stamp })
}

/// Makes the file of a new volume. One that is known and gone is not made again: an empty disk would take its place, and
/// its replica's.
fn create_missing(volume: &conf::Volume, is_known: bool) -> Result<()> {
    let Some(size) = volume.size else { return Ok(()) };
    if volume.path.exists() {
        return Ok(());
    }
    if is_known {
        let at = format!(
            "volume {}: {} is gone; bring it back (is its file system mounted?), or, to begin with an empty disk, make the \
             file yourself",
            volume.name,
            volume.path.display()
        );
        return Err(Error::new(ErrorKind::Settings, at));
    }
    let create = || -> std::io::Result<()> {
        if let Some(parent) = volume.path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&volume.path)?;
        file.set_len(size)?;
        file.sync_all()
    };
    create().map_err(|error| {
        let at = format!("volume {}: create {}", volume.name, volume.path.display());
        Error::because(ErrorKind::Io, at, error)
    })
}
