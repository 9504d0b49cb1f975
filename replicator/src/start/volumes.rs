//! The volumes of a run: opened, and compared with what the group knows of them.

use journal::{VolumeId, VolumeUuid};
use machine::disk::continuity::Ends;
use machine::disk::{Continuity, DiskIdentity};

use super::proof::{self, Verdict};
use super::{Doubts, OpenVolume, Opened, room};
use crate::capture::attach;
use crate::capture::disk::Disk;
use crate::cause;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Capturing, Gap, KnownVolume, MAX_VOLUMES, StateFile};
use crate::surroundings::Surroundings;

/// Opens the disks and compares them with what the group knows; returns what gives reason to doubt the
/// replica.
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
                if known.len() >= MAX_VOLUMES {
                    let at = format!(
                        "volume {}: the group has known {MAX_VOLUMES} volumes, with those that left it, and knows no more; \
                         protect it in another group",
                        volume.name
                    );
                    return Err(Error::new(ErrorKind::Settings, at));
                }
                if !first {
                    doubts.always.push(format!("volume {} was added", volume.name));
                }
                known.push(KnownVolume {
                    id: VolumeId(id),
                    uuid: VolumeUuid(*uuid::Uuid::new_v4().as_bytes()),
                    name: volume.name.clone(),
                    size_bytes: found.size_bytes.unwrap_or(0),
                    identity: None,
                    mark: None,
                    unproven: None,
                    present: true,
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
        let is_new = remembered.is_none();
        let identity = match is_new || detached {
            true => Verdict::Same,
            false => proof::is_it(entry.identity.as_ref(), found.identity.as_ref()),
        };
        match &identity {
            Verdict::Other(how) => {
                // A ring of the kernel's holds the device itself.
                let to = match settings.capture {
                    conf::Capture::Nbd => &mut doubts.always,
                    conf::Capture::Kfilter => &mut doubts.without_ring,
                };
                to.push(format!("volume {}: {how}", volume.name));
            }
            Verdict::Doubt(why) | Verdict::Tail(why) => {
                doubts.unproven_without_ring.push((entry.id, why.clone()));
            }
            Verdict::Same => {}
        }
        if clean && !detached && !is_new {
            match proof::since_stop(entry.mark.as_ref(), found.seen.as_ref()) {
                Verdict::Same => {}
                Verdict::Doubt(why) | Verdict::Tail(why) => {
                    doubts.unproven_without_ring.push((entry.id, why));
                }
                Verdict::Other(how) => doubts
                    .without_ring
                    .push(format!("volume {} was changed while it was not protected: {how}", volume.name)),
            }
        }
        if !entry.present {
            doubts.always.push(format!("volume {} came back", volume.name));
        }
        entry.identity = found.identity.or(entry.identity.take());
        if settings.capture == conf::Capture::Nbd {
            entry.size_bytes = size_bytes;
        }
        entry.present = true;
        opened.push(OpenVolume {
            known: entry.clone(),
            path: volume.path.clone(),
            content: found.content,
            identity,
            seen: found.seen,
        });
    }
    room::is_one_each(&opened)?;
    for known in &mut known {
        if known.present && !settings.volume.iter().any(|volume| volume.name == known.name) {
            doubts.always.push(format!("volume {} left the group", known.name));
            known.present = false;
        }
    }
    if !doubts.always.is_empty() {
        // Before the sizes are remembered: a crash in between must find the doubt again.
        let cause = cause::join(doubts.always.iter().map(String::as_str));
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
    identity: Option<DiskIdentity>,
    seen: Option<Continuity>,
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
            let content = Opened::Device(None);
            return Ok(FoundDisk { content, size_bytes: None, identity: None, seen: None });
        }
        let disk = attach::open(&volume.path, &settings.dir)?;
        let size_bytes = Some(Disk::size_bytes(&disk));
        let identity = DiskIdentity::of(disk.held()).ok();
        let seen = Continuity::of(disk.held(), Ends::Read).ok();
        return Ok(FoundDisk { content: Opened::Device(Some(disk)), size_bytes, identity, seen });
    }
    room::is_outside(settings, volume)?;
    room::create_missing(volume, is_known)?;
    if !is_known {
        room::is_no_container(volume)?;
    }
    let backing = surroundings.backings.open(&volume.path).map_err(|error| {
        let kind = if error.kind == nbd::Kind::Busy { ErrorKind::Busy } else { ErrorKind::Settings };
        Error::because(kind, format!("volume {}", volume.name), error)
    })?;
    room::is_free(volume, &backing)?;
    let size_bytes = backing.size_bytes();
    if size_bytes == 0 {
        let at = format!("volume {}: {} is empty; give it a size", volume.name, volume.path.display());
        return Err(Error::new(ErrorKind::Settings, at));
    }
    let (identity, seen) = (backing.identity().ok(), backing.continuity(Ends::Read).ok());
    Ok(FoundDisk { content: Opened::Front(backing), size_bytes: Some(size_bytes), identity, seen })
}
