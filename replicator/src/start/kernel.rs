//! The kernel module's group at a start: taken over, or made anew with its devices attached.

use std::time::Duration;

use journal::Lsn;
use kfilter::device::{GroupSpec, Passed};
use kfilter::dirty::CAUSE_AGENT;
use kfilter::{Device, ErrorKind as Cause, Group, Op, VolumeSpec};
use machine::disk::continuity::Ends;
use machine::disk::{Continuity, Unchanged};

use super::{Found, OpenVolume, Opened, ring_identity, volume_record};
use crate::agent::Agent;
use crate::attach::end_capture;
use crate::capture::disk::Disk;
use crate::capture::{attach, contexts};
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Capturing, KnownVolume, StateFile};

/// How long writes in flight may take before they are not waited for here (the synchronisation waits for them
/// anyway).
const SETTLE: Duration = Duration::from_secs(10);

fn io(what: &str) -> impl Fn(kfilter::Error) -> Error {
    let what = what.to_owned();
    move |error| {
        let kind = match error.kind {
            Cause::Busy => ErrorKind::Busy,
            Cause::NoModule | Cause::OtherAbi | Cause::NotPermitted => ErrorKind::Settings,
            _ => ErrorKind::Ring,
        };
        Error::because(kind, what.clone(), error)
    }
}

fn device() -> Result<Device> {
    Device::open().map_err(io("use the kernel module"))
}

/// The group that the kernel still holds, with every device attached that should be; or in words why there is
/// none.
pub(super) fn take_over(found: &Found<'_>, state: &StateFile) -> Result<std::result::Result<Group, String>> {
    let group = match device()?.take_over(&ring_identity(state)?) {
        Ok(group) => group,
        Err(error) => {
            return match error.kind {
                Cause::Absent => Ok(Err("the machine or the agent did not stop cleanly".to_owned())),
                Cause::Lost(lost) => Ok(Err(format!("the kernel's ring is of no use: {lost}"))),
                _ => Err(io("take over the group from the kernel module")(error)),
            };
        }
    };
    for volume in found.volumes {
        let Opened::Device(Some(disk)) = &volume.content else {
            // Taken out by the operator; the agent may have died before the kernel heard of it.
            if group.volume(volume.known.id.0).is_ok_and(|status| status.device != 0) {
                end_capture(&group, volume.known.id.0)?;
            }
            continue;
        };
        match group.volume(volume.known.id.0) {
            Ok(status) if status.device == 0 => {
                // It was being attached, or detached, when the agent died: from now on, and all of it is
                // dirty. Only as bits, until the synchronisation begins: what this volume wrote meanwhile is
                // in no record, so that no point of the group may be offered.
                group.bitmap(CAUSE_AGENT).map_err(io("switch to dirty bits"))?;
                attach::attach(&group, volume.known.id.0, disk, false)?;
            }
            Ok(status) if Some(status.device) == kfilter::device::device_number(disk.rdev()) => {}
            Ok(_) => {
                let at = format!(
                    "volume {}: {} is not the device that is captured as this volume; correct `device`, or `afterimage \
                     detach` the old one first",
                    volume.known.name,
                    disk.path().display()
                );
                return Err(Error::new(ErrorKind::Settings, at));
            }
            Err(error) if error.kind == Cause::Absent => {
                return Ok(Err(format!("the kernel does not know volume {}", volume.known.name)));
            }
            Err(error) => return Err(io("ask the kernel module")(error)),
        }
    }
    Ok(Ok(group))
}

/// A new group in place of one that may be there, its devices attached.
pub(super) fn create(found: &Found<'_>, state: &mut StateFile, first_lsn: Lsn, clean: bool) -> Result<Group> {
    let forget = io("forget the old group in the kernel");
    device()?.destroy(state.get().group.0).map_err(forget)?;
    // What the group knows must be what the ring is made for: the bitmaps' sizes are fixed here.
    let sizes: Vec<_> = found.volumes.iter().map(|volume| (volume.known.id, size_now(volume))).collect();
    state.update(|state| {
        for known in &mut state.volumes {
            if let Some((_, size)) = sizes.iter().find(|(id, _)| *id == known.id) {
                known.size_bytes = known.size_bytes.max(*size);
            }
        }
    })?;
    let mut specs = found.specs();
    for spec in &mut specs {
        let known = state.get().volumes.iter().find(|known| known.id.0 == spec.id);
        spec.size_bytes = known.map_or(spec.size_bytes, |known| known.size_bytes);
    }
    let disks = found.volumes.iter().filter_map(|volume| match &volume.content {
        Opened::Device(disk) => disk.as_ref(),
        _ => None,
    });
    let spec = GroupSpec {
        identity: ring_identity(state)?,
        volumes: &specs,
        ring_bytes: found.settings.ring.bytes,
        first_lsn: first_lsn.0,
        last_time_ns: found.last_time_ns,
        contexts: contexts::needed(disks.map(|disk| disk.sysfs())),
    };
    let group = device()?.create(&spec).map_err(io("make the group in the kernel"))?;
    if !clean {
        announce(&group, state)?;
        // Before the first device: the stream of an epoch begins with its volumes and `resync-begin`, not
        // with a write.
        group.bitmap(CAUSE_AGENT).map_err(io("switch to dirty bits"))?;
    }
    mark_between(&group, state)?;
    for volume in found.volumes {
        let Opened::Device(Some(disk)) = &volume.content else { continue };
        let id = volume.known.id.0;
        attach::attach(&group, id, disk, clean)?;
        if clean && !is_still_clean(&group, volume, disk)? {
            tracing::warn!(volume = %volume.known.name, "somebody wrote to the device before it was captured");
            group.mark(id, 0..disk.size_bytes()).map_err(io("set dirty bits"))?;
            group.bitmap(CAUSE_AGENT).map_err(io("switch to dirty bits"))?;
        }
    }
    Ok(group)
}

/// A group of the current epoch in place of the running agent's own, which has given up all that it held.
/// Every device is attached anew, so everything is dirty, and writes only set bits until the synchronisation
/// begins.
///
/// # Errors
/// The kernel module's.
pub(crate) fn renew(agent: &Agent, old: &Group, first_lsn: Lsn) -> Result<Group> {
    let disks: Vec<_> = agent.volumes.iter().filter_map(|volume| Some((volume.id, volume.disk()?))).collect();
    for (id, _) in &disks {
        end_capture(old, *id)?;
    }
    old.destroy().map_err(io("forget the old group in the kernel"))?;
    let file = agent.state();
    let ours = |known: &&KnownVolume| agent.volumes.iter().any(|volume| volume.id == known.id.0);
    let specs: Vec<VolumeSpec> = file.get().volumes.iter().filter(ours).map(KnownVolume::spec).collect();
    let spec = GroupSpec {
        identity: ring_identity(&file)?,
        volumes: &specs,
        ring_bytes: agent.settings.ring.bytes,
        first_lsn: first_lsn.0,
        last_time_ns: crate::clock::now_ns(),
        contexts: contexts::needed(disks.iter().map(|(_, disk)| disk.sysfs())),
    };
    let group = device()?.create(&spec).map_err(io("make the group in the kernel"))?;
    group.bitmap(CAUSE_AGENT).map_err(io("switch to dirty bits"))?;
    mark_between(&group, &file)?;
    drop(file);
    for (id, disk) in &disks {
        attach::attach(&group, *id, disk, false)?;
    }
    Ok(group)
}

/// What is detached and at no point stays dirty in whatever ring: nobody says that the group is consistent.
fn mark_between(group: &Group, state: &StateFile) -> Result<()> {
    let between = |known: &&KnownVolume| known.present && known.capturing == Capturing::DetachedBetween;
    for known in state.get().volumes.iter().filter(between) {
        group.mark(known.id.0, 0..known.size_bytes).map_err(io("set dirty bits"))?;
    }
    Ok(())
}

/// Every epoch states its volumes before anything else.
fn announce(group: &Group, state: &StateFile) -> Result<()> {
    for known in &state.get().volumes {
        match group.event(Op::Volume, known.id.0, &volume_record(known)) {
            Ok(_) => {}
            // One that has left the group: the kernel need not know it.
            Err(error) if !known.present => {
                tracing::debug!(%error, volume = %known.name, "state a volume that left")
            }
            Err(error) => return Err(io("state the volumes in the kernel's ring")(error)),
        }
    }
    Ok(())
}

fn size_now(volume: &OpenVolume) -> u64 {
    match &volume.content {
        Opened::Device(Some(disk)) => disk.size_bytes(),
        _ => volume.known.size_bytes,
    }
}

/// Writes may have slipped in between the look at the start and the capture; they have come back after the
/// barrier, and are counted.
fn is_still_clean(group: &Group, volume: &OpenVolume, disk: &Disk) -> Result<bool> {
    let barrier = |drained| group.barrier(SETTLE, drained).map_err(io("wait for writes in flight"));
    let mut passed = barrier(false)?;
    if passed == Passed::MustDrain {
        attach::drain(disk)?;
        passed = barrier(true)?;
    }
    let settled = passed == Passed::Yes;
    let Some(then) = &volume.seen else { return Ok(false) };
    // Nobody writes, or what they write now is captured, and then the answer is only too careful.
    let now = Continuity::of(disk.held(), Ends::Read);
    Ok(settled && now.is_ok_and(|now| then.until(&now) == Unchanged::Proven))
}
