//! Overwrite: what an operator orders where others changed a replica, and how that is noticed.
//!
//! A changed replica is left alone: nothing is applied, no point is given, since history is the replica with
//! undo laid over it. By order it is overwritten by a new epoch. What others left there stays reachable: the
//! undo of the batches that overwrite it stands on the boundary where they begin, listed as `found:N`.
//!
//! Steps, each durable before the next: 1 the history ends, and the order is noted; 2 its undo files are
//! removed; 3 a new history begins at the content that was found. A crash in between goes on at the next
//! open.

use journal::io::Disk;
use journal::{Position, VolumeId};
use machine::disk::continuity::Ends;
use serde::{Deserialize, Serialize};
use std::path::Path;

use super::Applier;
use crate::proof::{self, Written, doubt_now};
use crate::replica::Replica;
use crate::state::{Changed, Found, GroupState, Mark, replica_path, seen};
use crate::{Error, ErrorKind, Result};

/// What an order to overwrite came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverwriteReport {
    /// Operator's name of the group.
    pub group: String,
    /// What had been noticed.
    pub why: String,
    /// The point by which the content that is overwritten can be restored; absent where there was no history
    /// yet.
    pub found: Option<String>,
    /// Bookmarks under hold that ended with the history.
    pub holds: Vec<String>,
}

impl Applier {
    /// Orders that replicas which others changed are overwritten by the next epoch. `received` is the newest
    /// position that is durable here: what was received up to it is passed over. `now_ns` is this machine's
    /// clock.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where nothing is wrong, where the group is rewound, or where others use a
    /// replica.
    pub fn overwrite(&mut self, received: &Position, now_ns: u64) -> Result<OverwriteReport> {
        let refuse = |at: String| Err(Error::new(ErrorKind::NotPossible, at));
        self.look();
        let state = self.store.state();
        let name = state.name.clone();
        let Some(changed) = state.seen.changed.clone() else {
            return match self.failure() {
                Some(error) => refuse(error.in_full()),
                None => refuse(format!(
                    "the replicas of group {name} are as they were left: nothing is to be overwritten"
                )),
            };
        };
        if state.wishes.intent.is_some() || state.wishes.rewound.is_some() {
            return refuse(format!("group {name} is rewound: `afterimage resume {name}` first"));
        }
        if self.replicas.len() < state.replicas.len() {
            return refuse(
                self.failed
                    .as_ref()
                    .map_or_else(|| "a replica is missing".to_owned(), |(_, why)| why.clone()),
            );
        }
        for replica in self.replicas.values() {
            let shown = replica.path().display();
            let failed = |e| Error::replica(format!("look who uses {shown}"), e);
            let users = replica.file().users().map_err(failed)?;
            if !users.is_empty() {
                return refuse(format!("{shown} is used by others: {}", machine::disk::users::told(&users)));
            }
            if !replica.file().is_at(replica.path()).unwrap_or(false) {
                return refuse(format!(
                    "{shown} was removed or replaced just now: order it again in some seconds"
                ));
            }
        }
        let holds = state.wishes.holds.iter().map(|hold| hold.name.clone()).collect();
        let received_at = self.history.received();
        // 1. The end of the history, and the order.
        let mut state = state.clone();
        let why = format!("{}; its overwriting was ordered", changed.why);
        state.note_end(&why, now_ns);
        state.end_history();
        if received.order() > state.checkpoint.order() {
            if received_at.lsn == received.lsn {
                state.checkpoint_time_ns = received_at.time_ns;
            }
            state.checkpoint = *received;
            state.wishes.reached = super::rewind::still_reached(state.wishes.reached, received.lsn);
        }
        state.needs_resync = Some(why.clone());
        state.seen.changed = Some(Changed { ordered_ns: Some(now_ns), ..changed.clone() });
        self.store.store(state)?;
        self.follow_state();
        self.begin_anew()?;
        let found = self.store.state().seen.found.last();
        let found =
            found.filter(|found| found.since_ns == now_ns).map(|found| format!("found:{}", found.batch));
        tracing::warn!(group = name, why, found, "the replica is overwritten by order");
        Ok(OverwriteReport { group: name, why: changed.why, found, holds })
    }

    /// Steps 2 and 3 of an order.
    pub(super) fn begin_anew(&mut self) -> Result<()> {
        let Some(Changed { why, ordered_ns: Some(since_ns), .. }) = self.store.state().seen.changed.clone()
        else {
            return Ok(());
        };
        // 2. Its undo.
        self.cut = None;
        self.sweep()?;
        // 3. The history of what was found.
        let mut state = self.store.state().clone();
        let at = state.checkpoint_moment();
        state.seen.changed = None;
        if state.applied_batch > 0 {
            state.oldest_batch = state.applied_batch + 1;
            state.first_consistent = Some(at.lsn);
            state.history_start = at;
            state.consistent_batch = state.applied_batch;
            state.seen.add_found(Found { batch: state.applied_batch, at, since_ns, why });
        }
        for replica in self.replicas.values() {
            replica.sync()?;
        }
        state.seen.marks = self.marks(Ends::Skip)?;
        state.clean = false;
        self.store.store(state)?;
        self.follow_state();
        self.gatherer.reset();
        (self.refused, self.skip_through, self.failed) = (None, None, None);
        Ok(())
    }

    /// How all replicas are left now.
    pub(super) fn marks(&self, ends: Ends) -> Result<Vec<Mark>> {
        let marks = self.replicas.values().map(|replica| replica.mark(ends));
        marks.filter_map(Result::transpose).collect()
    }

    /// Looks whether others replaced, removed or wrote to a replica since the last checkpoint. Cheap.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`]: nothing is applied until the group is opened again.
    pub fn check_replicas(&mut self) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        self.check_paths()?;
        let state = self.store.state();
        let is_settling = state.wishes.rewound.is_some() && !state.clean;
        // In a batch that was cut the last mark says nothing.
        if self.cut.is_some() || self.unmarked || is_settling || state.seen.changed.is_some() {
            return Ok(());
        }
        let mut found = None;
        for known in state.replicas.iter().filter(|known| known.created) {
            let Some(replica) = self.replicas.get(&known.id) else { continue };
            let Some(mark) = state.seen.mark(known.id) else { continue };
            let how = doubt_now(mark, replica.file());
            let how =
                how.map_err(|e| Error::replica(format!("look at replica {}", replica.path().display()), e))?;
            found = found.or_else(|| how.map(|how| seen::told(&known.name, replica.path(), &how)));
        }
        let Some(why) = found else { return Ok(()) };
        let mut state = state.clone();
        tracing::error!(group = state.name, why, "a replica was changed by others");
        state.seen.changed = Some(Changed { why, since_ns: super::now_ns(), ordered_ns: None });
        self.store.store(state)?;
        self.follow_state();
        self.failure().map_or(Ok(()), Err)
    }

    fn check_paths(&mut self) -> Result<()> {
        let lost = |replica: &Replica| match replica.file().is_at(replica.path()) {
            Ok(true) => None,
            Ok(false) => Some("another file stands in its place"),
            Err(_) => Some("it was removed"),
        };
        let told = self.replicas.values().find_map(|replica| {
            let what = lost(replica)?;
            Some(format!(
                "replica of volume {}: {} was changed by others while it was written: {what}; put back what was there",
                replica.name(),
                replica.path().display()
            ))
        });
        let Some(told) = told else { return Ok(()) };
        self.failed = Some((ErrorKind::ReplicaFailed, told.clone()));
        Err(Error::new(ErrorKind::ReplicaFailed, told))
    }

    /// Looks, for what only wants to know.
    fn look(&mut self) {
        if let Err(error) = self.check_replicas() {
            tracing::debug!(%error, "a replica is not what was left");
        }
    }
}

/// Compares the replicas that are open with how they were left. Where one differs the marks stay as they are,
/// so that one that is put back is taken back; so does the clean mark. That stays where the group is rewound,
/// too.
///
/// # Errors
/// One cannot be looked at.
pub(super) fn note_changed<'a>(
    disk: &dyn Disk,
    group_dir: &Path,
    state: &mut GroupState,
    replica_of: impl Fn(VolumeId) -> Option<&'a Replica>,
    now_ns: u64,
) -> Result<()> {
    if state.seen.changed.as_ref().is_some_and(|changed| changed.ordered_ns.is_some()) {
        return Ok(());
    }
    let written = Written::by_last_owner(disk, group_dir, state)?;
    let mut why = None;
    for known in state.replicas.iter().filter(|known| known.created) {
        let Some(replica) = replica_of(known.id) else { continue };
        let path = replica_path(group_dir, &known.path);
        let how = proof::doubt(state, known, replica.file(), written);
        let how = how.map_err(|e| Error::replica(format!("look at replica {}", path.display()), e))?;
        why = why.or_else(|| how.map(|how| seen::told(&known.name, &path, &how)));
    }
    state.seen.changed = why.map(|why| match state.seen.changed.take() {
        Some(known) => Changed { why, ..known },
        None => {
            tracing::error!(group = state.name, why, "a replica was changed by others; it is left alone");
            Changed { why, since_ns: now_ns, ordered_ns: None }
        }
    });
    state.clean = state.clean && (state.seen.changed.is_some() || state.wishes.rewound.is_some());
    Ok(())
}

/// What an older version noted of a replica that was changed, and had not begun to overwrite, is left alone
/// from now on.
pub(super) fn note_of_older_version(state: &mut GroupState, now_ns: u64) {
    let is_found = state.seen.found.last().is_some_and(|found| found.batch + 1 == state.oldest_batch);
    if state.oldest_batch == 0 || is_found {
        return;
    }
    if let Some(why) = state.needs_resync.take() {
        state.seen.changed = Some(Changed { why, since_ns: now_ns, ordered_ns: None });
    }
}
