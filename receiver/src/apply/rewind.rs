//! Rewind and resume: the applier brings its replicas to a point by the operator's wish, and stays there.
//!
//! A rewind is a batch like any other, so views and restores stay right, and it can itself be undone. Each
//! step is durable before the next:
//! 0. the intent, in the control file: which point, which batch number, from which boundary. After a crash
//!    exactly this is done;
//! 1. the undo segment of that number: what the replicas hold where they will change. It protects every
//!    boundary below;
//! 2. the batch is registered in the history;
//! 3. the replicas are written, with content derived from immutable segments ([`crate::past`]), and synced;
//! 4. the checkpoint is set to the point, the intent becomes `rewound`;
//! 5. files that have grown since the point are cut to their size at it, and stamped: whoever changes them
//!    while they stand there is noticed, also after a crash.
//!
//! A rewind that fails before its undo stands is withdrawn, and all is as before. A point above the
//! checkpoint is reached by applying up to it.

use std::collections::BTreeMap;

use journal::{Lsn, Position, VolumeId};
use machine::disk::continuity::Ends;
use serde::{Deserialize, Serialize};

use super::overwrite::note_changed;
use super::{Applier, BatchDone};
use crate::past::Past;
use crate::point::{At, Point, rfc3339};
use crate::state::{Back, GroupState, Reached, Rewind, undo_dir};
use crate::undo::{UndoSummary, UndoWriter, file_name, read_summary};
use crate::{Error, ErrorKind, Result};

/// What a rewind did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewindReport {
    /// Operator's name of the group.
    pub group: String,
    /// The replica is exactly this.
    pub lsn: Lsn,
    /// Its time, RFC 3339 UTC.
    pub time: String,
    /// Where the replica was.
    pub from_lsn: Lsn,
    /// Undo kept, by which the rewind itself can be undone.
    pub undo_bytes: u64,
    /// Bytes written to the replicas, zeros included.
    pub written_bytes: u64,
    /// Newest record received; what lies between waits for `resume`.
    pub received_lsn: Lsn,
    /// What makes the point inexact.
    pub warnings: Vec<String>,
}

impl RewindReport {
    /// Counts a batch that was carried out for it.
    pub fn add(&mut self, done: Option<&BatchDone>) {
        let Some(done) = done else { return };
        self.undo_bytes += done.undo_bytes;
        self.written_bytes += done.written_bytes;
    }
}

/// What a resume began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeReport {
    /// Operator's name of the group.
    pub group: String,
    /// The replica rolls forward from here …
    pub from_lsn: Lsn,
    /// … to here, and further as more comes.
    pub received_lsn: Lsn,
    /// What keeps it from that, if something does.
    pub warnings: Vec<String>,
}

impl Applier {
    /// Orders a rewind: durable when it returns. [`Applier::next_batch`] carries it out, from then on and
    /// after a crash. `now_ns` is this machine's clock.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] for the point, or where another rewind is under way; why nothing can be
    /// applied, where that is so.
    pub fn rewind(&mut self, at: &At, now_ns: u64) -> Result<RewindReport> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if let Some(intent) = &self.store.state().wishes.intent {
            let at = format!("a rewind to lsn {} is under way", intent.position.lsn);
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        self.finish_cut()?;
        self.check_unchanged()?;
        if let At::Found(_) = at {
            let at =
                format!("{at} is what others left in the replica, and no point of the source: restore it");
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        let (point, _pin) = self.history.resolve_pinned(at)?;
        let Point { moment, boundary, boundary_lsn } = point;
        let exact = self.store.state().exact_start().start;
        if moment.lsn < exact.lsn {
            let at = format!(
                "lsn {} lies below the exact window, from where the replica could not be rolled forward again: restore it with \
                 `afterimage restore`; the oldest point to rewind to is lsn {} at {}",
                moment.lsn,
                exact.lsn,
                rfc3339(exact.time_ns)
            );
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        let mut state = self.store.state().clone();
        let goes_back = moment.lsn < state.checkpoint.lsn;
        let back = goes_back.then_some(Back { batch: state.applied_batch + 1, boundary, boundary_lsn });
        let position = self.history.position_at(moment.lsn)?;
        let from_lsn = state.checkpoint.lsn;
        state.wishes.intent =
            Some(Rewind { at: at.to_string(), position, time_ns: moment.time_ns, since_ns: now_ns, back });
        // 0. The intent. From here on the stamps of an earlier rewind mean nothing.
        state.clean = false;
        self.store.store(state)?;
        self.follow_state();
        Ok(RewindReport {
            group: self.store.state().name.clone(),
            lsn: moment.lsn,
            time: rfc3339(moment.time_ns),
            from_lsn,
            undo_bytes: 0,
            written_bytes: 0,
            received_lsn: self.history.received().lsn,
            warnings: self.history.points().warnings,
        })
    }

    /// Leaves the point of a rewind: from here on batches are applied again, up to `received_lsn`. A rewind
    /// that is not carried out yet is given up, unless the replica may be changed by it already: then it is
    /// finished first.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where the group is not rewound; as [`Applier::next_batch`].
    pub fn resume(&mut self, received_lsn: Lsn) -> Result<ResumeReport> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let wishes = &self.store.state().wishes;
        if wishes.intent.is_none() && wishes.rewound.is_none() {
            let at = format!("group {} is not rewound", self.store.state().name);
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        if self.rewinds_now() && self.cut.is_some() {
            self.follow_intent()?;
        }
        self.finish_cut()?;
        let mut state = self.store.state().clone();
        (state.wishes.intent, state.wishes.rewound) = (None, None);
        // Somebody may have written to the replica while it stood still.
        let replica_of = |id| self.replicas.get(&id);
        note_changed(&*self.disk, &self.group_dir, &mut state, replica_of, crate::agent::now_ns())?;
        let report = ResumeReport {
            group: state.name.clone(),
            from_lsn: state.checkpoint.lsn,
            received_lsn,
            warnings: state.needs_resync.clone().into_iter().chain(state.changed_words()).collect(),
        };
        self.store.store(state)?;
        self.gatherer.reset();
        self.follow_state();
        Ok(report)
    }

    /// Whether a rewind is ordered and not carried out yet.
    pub fn is_rewinding(&self) -> bool {
        self.store.state().wishes.intent.is_some()
    }

    /// A batch that was cut is finished before anything else is begun.
    fn finish_cut(&mut self) -> Result<()> {
        if self.cut.is_some() {
            self.apply_one().inspect_err(|_| self.gatherer.reset())?;
        }
        Ok(())
    }

    /// A replica that others wrote to is no base for a rewind, also where it stands at the point of an
    /// earlier one.
    fn check_unchanged(&mut self) -> Result<()> {
        self.check_replicas()?;
        let words = self.store.state().changed_words();
        words.map_or(Ok(()), |why| Err(Error::new(ErrorKind::NotPossible, why)))
    }

    /// The point up to which is applied, where a rewind asks for one ahead.
    pub(super) fn rewind_ahead(&self) -> Option<Lsn> {
        self.store.state().wishes.intent.as_ref().map(|intent| intent.position.lsn)
    }

    /// Whether the rewind that is ordered is done by going back, or by standing still.
    pub(super) fn rewinds_now(&self) -> bool {
        let state = self.store.state();
        state.wishes.intent.as_ref().is_some_and(|intent| intent.position.lsn <= state.checkpoint.lsn)
    }

    /// Carries out the rewind to a point at or below the checkpoint.
    pub(super) fn follow_intent(&mut self) -> Result<Option<BatchDone>> {
        let Some(order) = self.store.state().wishes.intent.clone() else { return Ok(None) };
        let checkpoint = self.store.state().checkpoint.lsn;
        let done = match order.back {
            Some(back) if checkpoint > order.position.lsn => Some(self.go_back(&order, back)?),
            _ => {
                assert!(checkpoint == order.position.lsn, "nothing is applied beyond the point of a rewind");
                let mut state = self.store.state().clone();
                (state.wishes.intent, state.wishes.rewound) = (None, Some(order));
                self.store.store(state)?;
                self.follow_state();
                None
            }
        };
        self.settle_rewound()?;
        Ok(done)
    }

    fn go_back(&mut self, order: &Rewind, back: Back) -> Result<BatchDone> {
        let sizes = self.sizes_at(order.position.lsn);
        let point = Point { moment: order.to(), boundary: back.boundary, boundary_lsn: back.boundary_lsn };
        // 1. The undo segment. Until it stands the replica is untouched, and the order can be taken back.
        let history = std::sync::Arc::clone(&self.history);
        let past = Past::new(&history, point, back.batch - 1).and_then(|mut past| {
            if self.cut.is_none() {
                self.cut = Some(self.write_back_undo(order, back, &sizes, &mut past)?);
            }
            Ok(past)
        });
        let mut past = match past {
            Ok(past) => past,
            Err(error) if self.cut.is_none() && error.kind != ErrorKind::Sync => {
                self.withdraw()?;
                return Err(error.during("the rewind is taken back, the replica is as it was"));
            }
            Err(error) => return Err(error),
        };
        let summary = self.cut.clone().expect("its undo stands");
        // 2. Registered before the first byte is overwritten.
        self.history.register(summary.clone());
        // 3. The replicas. Any part of this may be durable after a crash, and is written again.
        let mut written_bytes = 0;
        for (volume, size_bytes) in &sizes {
            let (replica, scratch) = (&self.replicas[volume], &mut self.scratch);
            past.folds(*volume, *size_bytes, replica.size_bytes(), &mut |fold| {
                written_bytes += replica.write(fold, &fold.ranges(*volume), scratch)?;
                Ok(())
            })?;
        }
        for replica in self.replicas.values() {
            replica.sync()?;
        }
        // 4. The checkpoint: from here on the replicas are exactly the point.
        let from_lsn = self.store.state().checkpoint.lsn;
        let mut state = self.state_back(order, back, &sizes);
        state.seen.marks = self.marks(Ends::Skip)?;
        self.store.store(state)?;
        self.cut = None;
        // What was passed over is met again.
        (self.refused, self.skip_through) = (None, None);
        self.gatherer.reset();
        self.follow_state();
        Ok(BatchDone {
            number: back.batch,
            first_lsn: order.position.lsn,
            last_lsn: order.position.lsn,
            redo_bytes: 0,
            undo_bytes: summary.bytes,
            written_bytes,
            ends_resync: false,
            went_back_from: Some(from_lsn),
        })
    }

    /// Writes what the replicas hold where the rewind will change them.
    fn write_back_undo(
        &mut self,
        order: &Rewind,
        back: Back,
        sizes: &BTreeMap<VolumeId, u64>,
        past: &mut Past<'_>,
    ) -> Result<UndoSummary> {
        let dir = undo_dir(&self.group_dir);
        let summary = UndoSummary {
            number: back.batch,
            from: back.batch,
            epoch: order.position.epoch,
            first: order.to(),
            last: order.to(),
            // As young as anything: a rewind can be undone as long as anything can.
            received_ns: self.history.newest_receipt_ns(),
            bytes: 0,
            path: std::path::PathBuf::new(),
            nonce: 0,
        };
        let owner = self.undo_owner();
        let (replicas, scratch, encoder) = (&self.replicas, &mut self.scratch, &mut self.encoder);
        let written = UndoWriter::create(&self.disk, &dir, owner, summary, encoder).and_then(|mut undo| {
            for (volume, size_bytes) in sizes {
                let replica = &replicas[volume];
                past.folds(*volume, *size_bytes, replica.size_bytes(), &mut |fold| {
                    undo.keep(replica, fold, scratch).map(|_| ())
                })?;
            }
            undo.finish()
        });
        if written.is_err() {
            // It has no name yet, unless the last sync failed, and that is final. What stays is removed at
            // the next open.
            let _ = self.disk.remove(&dir.join(format!("{}.tmp", file_name(back.batch))));
        }
        written?;
        read_summary(&*self.disk, &dir, back.batch, owner.group)
    }

    fn withdraw(&mut self) -> Result<()> {
        let mut state = self.store.state().clone();
        state.wishes.intent = None;
        self.store.store(state)?;
        self.follow_state();
        self.settle_rewound()
    }

    /// Sizes of all replicas at a point: 0 for a volume that did not exist yet.
    fn sizes_at(&self, lsn: Lsn) -> BTreeMap<VolumeId, u64> {
        let size_of = |(id, replica): (&VolumeId, &crate::replica::Replica)| {
            (*id, self.history.size_at(*id, lsn).unwrap_or(replica.size_bytes()).min(replica.size_bytes()))
        };
        self.replicas.iter().map(size_of).collect()
    }

    fn state_back(&self, order: &Rewind, back: Back, sizes: &BTreeMap<VolumeId, u64>) -> GroupState {
        let mut state = self.store.state().clone();
        state.wishes.reached = Some(state.reached());
        state.wishes.intent = None;
        state.wishes.rewound = Some(order.clone());
        state.checkpoint = Position { lineage: state.lineage, ..order.position };
        state.checkpoint_time_ns = order.time_ns;
        state.applied_batch = back.batch;
        state.consistent_lsn = Some(order.position.lsn);
        state.consistent_batch = back.batch;
        state.clean = false;
        for known in &mut state.replicas {
            known.size_bytes = sizes.get(&known.id).copied().unwrap_or(known.size_bytes);
        }
        state
    }

    /// 5. Once the replica stands at its point nothing more is written, so its size and its stamp can be
    ///    trusted. Done again after a crash.
    pub(super) fn settle_rewound(&mut self) -> Result<()> {
        let state = self.store.state();
        if state.wishes.rewound.is_none() || state.clean || self.failed.is_some() || self.cut.is_some() {
            return Ok(());
        }
        let mut state = GroupState { clean: true, ..state.clone() };
        for known in &mut state.replicas {
            let Some(replica) = self.replicas.get_mut(&known.id) else { continue };
            replica.shrink(known.size_bytes)?;
            known.stamp = replica.settled_stamp()?;
        }
        state.seen.marks = self.marks(Ends::Read)?;
        self.store.store(state)?;
        self.follow_state();
        Ok(())
    }
}

/// How far a replica ever was, once this much is applied.
pub(super) fn still_reached(reached: Option<Reached>, applied: Lsn) -> Option<Reached> {
    reached.filter(|reached| reached.position.lsn > applied)
}
