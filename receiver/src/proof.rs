//! Proof: whether a replica is the one that its history belongs to, and holds what we left there.
//!
//! Asked before a group is applied, before its directory is read without a daemon, and while it is applied.
//! Unchanged is proven by the mark that every checkpoint takes ([`Mark`]), through the descriptor that is
//! used.
//!
//! | last owner | accepted |
//! |---|---|
//! | stopped in order | the same file or device, not written since; a file that was moved by a copy with its times and size kept, and the same first and last MiB, unless it is another replica of the group |
//! | killed between two batches | the same file or device, not written since |
//! | killed in a batch | the same file or device; a file not written later than that batch may have been |
//!
//! A directory that was copied while its receiver ran is of the second or third kind with another inode:
//! refused. Where a disk cannot prove anything (a device in another boot after a kill; a file whose change
//! time alone moved) it is accepted, and said in the log.

use std::path::Path;

use journal::io::{Disk, File};
use machine::disk::continuity::Ends;
use machine::disk::{Continuity, DiskIdentity, Same, Unchanged};

use crate::replica::is_same_stamp;
use crate::state::{GroupState, Mark, ReplicaState, replica_path, undo_dir};
use crate::undo::file_name;
use crate::{Error, Result};

/// How long the writes of a batch may take after its undo stands, on a disk that is slow.
const BATCH_NS: u64 = 60_000_000_000;

/// What the last owner itself may have written after the last mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// Nothing.
    Nothing,
    /// A batch, not later than this.
    Batch(Option<u64>),
}

impl Written {
    /// By a group's directory, on which nobody runs.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn by_last_owner(disk: &dyn Disk, group_dir: &Path, state: &GroupState) -> Result<Written> {
        if state.clean {
            return Ok(Written::Nothing);
        }
        if state.oldest_batch == 0 || state.wishes.rewound.is_some() {
            // Without undo a batch leaves no trace; a replica that was brought to a point is cut to size
            // after its mark.
            return Ok(Written::Batch(None));
        }
        let undo = undo_dir(group_dir).join(file_name(state.applied_batch + 1));
        let failed = |e| Error::io(format!("look at {}", undo.display()), e);
        match disk.open_read(&undo) {
            Ok(file) => {
                let times = file.continuity(Ends::Skip).map_err(failed)?.and_then(|now| now.times);
                Ok(Written::Batch(times.map(|times| times.modified_ns.saturating_add(BATCH_NS))))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Written::Nothing),
            Err(e) => Err(failed(e)),
        }
    }
}

/// How it shows that a replica, open as `file`, is not what was left; `None` where it is.
///
/// # Errors
/// It cannot be looked at.
pub(crate) fn doubt(
    state: &GroupState,
    known: &ReplicaState,
    file: &dyn File,
    written: Written,
) -> std::io::Result<Option<String>> {
    let Some(identity) = file.identity()? else { return Ok(None) };
    let Some(mark) = state.seen.mark(known.id) else { return by_stamp(state, known, file) };
    if mark.identity.compare(&identity) == Same::No {
        return moved(state, known, mark, &identity, file);
    }
    if let Written::Batch(until_ns) = written {
        return Ok(beyond_batch(mark, file.continuity(Ends::Skip)?, until_ns));
    }
    let ends = if mark.left.ends.is_some() { Ends::Within(mark.left.size_bytes) } else { Ends::Skip };
    let Some(now) = file.continuity(ends)? else { return Ok(None) };
    Ok(match since(mark, &now) {
        Unchanged::Proven => None,
        Unchanged::Changed(_) if state.clean && is_same_copy(&mark.left, &now) => None,
        Unchanged::Changed(how) => Some(how),
        Unchanged::Unknown(why) => {
            tracing::warn!(
                replica = known.name,
                why,
                "nothing proves that others left it alone; it is trusted"
            );
            None
        }
    })
}

/// As [`doubt`], for one that is being applied: nothing of ours is under way, and the identity is the
/// descriptor's.
///
/// # Errors
/// It cannot be looked at.
pub(crate) fn doubt_now(mark: &Mark, file: &dyn File) -> std::io::Result<Option<String>> {
    let Some(now) = file.continuity(Ends::Skip)? else { return Ok(None) };
    // The clock of another machine may come later than our look.
    let is_remote = now.times.is_some_and(|times| times.is_remote);
    Ok(match since(mark, &now) {
        Unchanged::Changed(how) if !is_remote => Some(how),
        _ => None,
    })
}

/// What became of a replica since its mark. A device that has grown is judged by its counters, and by the ends
/// of what it was: the file below a loop device was touched to make it longer.
fn since(mark: &Mark, now: &Continuity) -> Unchanged {
    let is_device = matches!(mark.identity, DiskIdentity::Device(_));
    if !is_device || now.size_bytes <= mark.left.size_bytes {
        return mark.left.until(now);
    }
    let of_before = |seen: &Continuity| Continuity { size_bytes: 0, times: None, ..*seen };
    of_before(&mark.left).until(&of_before(now))
}

/// A version before marks left time and size, at a clean end.
fn by_stamp(state: &GroupState, known: &ReplicaState, file: &dyn File) -> std::io::Result<Option<String>> {
    let (Some(left), true) = (known.stamp, state.clean) else { return Ok(None) };
    let now = file.continuity(Ends::Skip)?.and_then(|now| stamp_of(&now));
    Ok(match now {
        Some(now) if is_same_stamp(left, now) => None,
        _ => Some("it was written to".to_owned()),
    })
}

/// Another file or device than before.
fn moved(
    state: &GroupState,
    known: &ReplicaState,
    mark: &Mark,
    identity: &DiskIdentity,
    file: &dyn File,
) -> std::io::Result<Option<String>> {
    let other = |other: &&Mark| other.volume != known.id && other.identity.compare(identity) == Same::Yes;
    if let Some(other) = state.seen.marks.iter().find(other) {
        let name =
            state.replicas.iter().find(|known| known.id == other.volume).map(|known| known.name.as_str());
        return Ok(Some(format!("it is the replica of volume {}", name.unwrap_or("unknown"))));
    }
    let is_file = matches!(identity, DiskIdentity::File(_));
    if !state.clean {
        let what = if is_file { "file" } else { "device" };
        return Ok(Some(format!(
            "it is another {what} than the one that was left; a directory that is copied or restored while its receiver runs, \
             or after it was killed, has no history (stop it first)"
        )));
    }
    let now = file.continuity(Ends::Read)?;
    let is_copy = is_file && now.is_some_and(|now| is_same_copy(&mark.left, &now));
    Ok((!is_copy).then(|| "it was replaced by another".to_owned()))
}

/// Whether a file has the size, the time and the ends of what was left, as tools that move files keep them.
fn is_same_copy(left: &Continuity, now: &Continuity) -> bool {
    let same_stamp = stamp_of(left).zip(stamp_of(now)).is_some_and(|(left, now)| is_same_stamp(left, now));
    same_stamp && left.ends.is_some() && left.ends == now.ends
}

fn stamp_of(mark: &Continuity) -> Option<(i64, u64)> {
    Some((i64::try_from(mark.times?.modified_ns).ok()?, mark.size_bytes))
}

/// Of a file that a batch may have been written to: times outside of the batch.
fn beyond_batch(mark: &Mark, now: Option<Continuity>, until_ns: Option<u64>) -> Option<String> {
    let (left, now) = (mark.left.times?, now?.times?);
    if now.is_shared || now.is_remote {
        return None;
    }
    if now.modified_ns < left.modified_ns {
        return Some("it is older than what was left".to_owned());
    }
    let is_late = until_ns.is_some_and(|until_ns| now.modified_ns > until_ns);
    is_late.then(|| "it was written to after the receiver was killed".to_owned())
}

/// As [`doubt`], of a directory that no daemon runs on, with the path in front.
///
/// # Errors
/// As [`doubt`].
pub(crate) fn doubt_at(
    disk: &dyn Disk,
    group_dir: &Path,
    state: &GroupState,
    known: &ReplicaState,
    file: &dyn File,
) -> Result<Option<String>> {
    let path = replica_path(group_dir, &known.path);
    let written = Written::by_last_owner(disk, group_dir, state)?;
    let how = doubt(state, known, file, written);
    let how = how.map_err(|e| Error::replica(format!("look at replica {}", path.display()), e))?;
    Ok(how.map(|how| crate::state::seen::told(&known.name, &path, &how)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::VolumeId;
    use machine::disk::continuity::{Counters, Times};
    use machine::disk::identity::DeviceIdentity;

    #[test]
    fn a_device_that_grew_is_judged_by_what_was_written_to_it() {
        let times = |at| Some(Times { modified_ns: at, changed_ns: at, is_remote: false, is_shared: false });
        let counters = |written| Some(Counters { sequence: 7, own: [written, 0], direct: [0; 2] });
        let left = Continuity {
            boot: [1; 16],
            size_bytes: 1 << 20,
            ends: Some([2; 16]),
            times: times(5),
            counters: counters(9),
        };
        let identity = DeviceIdentity {
            name: String::new(),
            start_sectors: None,
            backing: None,
            number: 3,
            sequence: 7,
            boot: [1; 16],
        };
        let mark = |identity| Mark { volume: VolumeId(0), identity, left: left.clone() };
        let device = mark(DiskIdentity::Device(identity));
        let grown = Continuity { size_bytes: 2 << 20, times: times(6), ..left.clone() };
        assert_eq!(since(&device, &grown), Unchanged::Proven);
        let rebooted = Continuity { boot: [2; 16], counters: counters(0), ..grown.clone() };
        assert_eq!(since(&device, &rebooted), Unchanged::Proven);
        let changed = Continuity { ends: Some([3; 16]), ..rebooted.clone() };
        assert!(matches!(since(&device, &changed), Unchanged::Changed(_)));
        let written = Continuity { counters: counters(10), ..grown.clone() };
        assert!(matches!(since(&device, &written), Unchanged::Changed(_)));
        let smaller = Continuity { size_bytes: 1 << 19, ..grown.clone() };
        assert!(matches!(since(&device, &smaller), Unchanged::Changed(_)));
        assert!(matches!(since(&mark(DiskIdentity::Simulated(1)), &grown), Unchanged::Changed(_)));
    }
}
