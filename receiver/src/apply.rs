//! Apply: from the journal to the replica, in numbered batches, undo first.
//!
//! One owner, synchronous; the caller decides when a batch is due. State: the group's control file, the open
//! replicas, the place in the journal. A failed batch leaves the checkpoint where it was.
//!
//! ⚠ The order of a batch (DESIGN section 8, `models/undo.py`), each step durable before the next:
//! 1. the undo segment, under a temporary name, synced, renamed, its directory synced. From here on the
//!    batch's range is fixed: after a crash exactly this range is redone, since the replica may hold any part
//!    of it;
//! 2. the batch is registered in [`History`], so that readers find the old content before it is overwritten;
//! 3. the replicas are written, sorted; events appended and synced; replicas synced;
//! 4. the checkpoint is advanced in the control file.
//!
//! Before the first consistent point there is nothing worth keeping: no undo is taken, a cut batch is simply
//! redone from the checkpoint, in whatever batches.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::compress::{Compression, Encoder};
use journal::frame::chain_seed;
use journal::io::Disk;
use journal::segment::SegmentSummary;
use journal::{Lsn, Position, VolumeId};
use machine::disk::continuity::Ends;

use crate::agent::now_ns;
use crate::events::{self, EventLog, log_path};
use crate::gather::{Behind, Gathered, Gatherer, Want};
use crate::history::History;
use crate::replica::Replica;
use crate::retention::{Policy, RedoPart, Verdict, decide};
use crate::state::{
    GroupState, GroupStore, Mark, Moment, ReplicaState, journal_dir, replica_path, stored_path, undo_dir,
};
use crate::undo::{UndoOwner, UndoSummary, UndoWriter, file_name, file_number, read_summary};
use crate::volumes::{self, VolumePlan};
use crate::{Error, ErrorKind, Result};

mod hold;
mod overwrite;
mod rewind;
mod thin;

pub use hold::HoldReport;
pub use overwrite::OverwriteReport;
pub use rewind::{ResumeReport, RewindReport};

/// The default quota is never below this (DESIGN: 4 × the used size): a small disk that is overwritten again
/// and again within `history.min` would otherwise stop being acknowledged within minutes. As large as the
/// source journal's own default.
const MIN_DEFAULT_QUOTA_BYTES: u64 = 10 << 30;
/// Length of the event log beyond which it is written anew: well above what the history keeps of it.
const MAX_LOG_BYTES: u64 = 128 << 20;
/// What must be won by writing the event log anew.
const MIN_SHORTENED_BYTES: u64 = 4096;
/// What a journal segment counts for in the quota, however short: a file and its place in lists.
const MIN_SEGMENT_BYTES: u64 = 64 << 10;
/// Batches are made no smaller than their bounds by so many halvings: 256 KiB of the usual 64 MiB.
const MAX_HALVINGS: u32 = 8;

/// How batches are chosen and where replicas lie.
#[derive(Clone, Debug)]
pub struct ApplySettings {
    /// Redo bytes in one batch.
    pub batch_bytes: u64,
    /// Undo bytes in one batch.
    pub undo_bytes: u64,
    /// How undo is packed.
    pub undo_compression: Compression,
    /// Directory of replicas without a path of their own; empty: no replica is created.
    pub replica_dir: PathBuf,
    /// Replicas with a path of their own, by volume name.
    pub replica_paths: BTreeMap<String, PathBuf>,
    /// Volumes of which a copy was brought by other means: what stands at their path is theirs.
    pub seeded: BTreeSet<String>,
    /// Hold replicas against other writers and notice their changes; only on the real disk.
    pub hold_replicas: bool,
}

/// A batch that is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchDone {
    /// Its number.
    pub number: u64,
    /// First lsn.
    pub first_lsn: Lsn,
    /// Last lsn: the new checkpoint.
    pub last_lsn: Lsn,
    /// Payload bytes.
    pub redo_bytes: u64,
    /// Size of its undo segment; 0 where none was taken.
    pub undo_bytes: u64,
    /// Bytes written to the replicas, zeros included.
    pub written_bytes: u64,
    /// It was cut short so that its boundary is the end of a resync.
    pub ends_resync: bool,
    /// It was a rewind, from this checkpoint.
    pub went_back_from: Option<Lsn>,
}

/// What retention did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired {
    /// The journal's writer may drop segments below this number.
    pub drop_journal_before: Option<u64>,
    /// Undo segments removed.
    pub removed: u64,
    /// The policy's answer, for status and warnings.
    pub verdict: Verdict,
    /// The quota it was measured by.
    pub quota_bytes: u64,
}

/// Applies one group.
pub struct Applier {
    disk: Arc<dyn Disk>,
    group_dir: PathBuf,
    settings: ApplySettings,
    store: GroupStore,
    events: EventLog,
    replicas: BTreeMap<VolumeId, Replica>,
    gatherer: Gatherer,
    encoder: Encoder,
    history: Arc<History>,
    /// A batch whose undo stands, but not its checkpoint.
    cut: Option<UndoSummary>,
    /// Epoch of what was refused last, by its number.
    refused: Option<u64>,
    /// Epochs up to this number are passed over.
    skip_through: Option<u64>,
    failed: Option<(ErrorKind, String)>,
    quota_bytes: u64,
    /// How often the batch bounds are halved, since undo of a larger batch did not fit on the disk.
    halvings: u32,
    scratch: Vec<u8>,
    /// The replicas were written to after their marks were taken, and no checkpoint says so yet.
    unmarked: bool,
    /// Undo segments that cannot be merged with their neighbours.
    unmergeable: BTreeSet<u64>,
}

impl Applier {
    /// Opens a group for applying: finds the batch that was cut, removes what a crash left over, opens and
    /// holds the replicas. Where a replica cannot be had [`Applier::failure`] says why, and only retention
    /// goes on.
    ///
    /// A replica that is not proven to be what was left sets [`crate::state::Seen::changed`]: it is left
    /// alone, and so is the undo, until its overwriting is ordered. One that is put back as it was left is
    /// taken back.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for the group's own files.
    pub fn open(
        disk: Arc<dyn Disk>,
        group_dir: &Path,
        settings: ApplySettings,
        history: Arc<History>,
    ) -> Result<Applier> {
        let mut store = GroupStore::open(Arc::clone(&disk), group_dir)?;
        let mut state = store.state().clone();
        forget_given_up(&*disk, group_dir, &mut state);
        overwrite::note_of_older_version(&mut state, now_ns());
        let (replicas, failed) = match open_replicas(&*disk, group_dir, &state, &settings) {
            Ok(replicas) => (replicas, None),
            Err(e) if matches!(e.kind, ErrorKind::ReplicaFailed | ErrorKind::Busy) => {
                (BTreeMap::new(), Some((e.kind, e.in_full())))
            }
            Err(e) => return Err(e),
        };
        if failed.is_none() {
            let replica_of = |id| replicas.get(&id);
            overwrite::note_changed(&*disk, group_dir, &mut state, replica_of, now_ns())?;
        }
        if state != *store.state() {
            store.store(state)?;
            history.follow(store.state(), Moment::default(), &[]);
        }
        let mut applier = Applier {
            events: EventLog::new(Arc::clone(&disk), group_dir, store.state().events_file),
            gatherer: Gatherer::new(Arc::clone(&disk), &journal_dir(group_dir))?,
            encoder: Encoder::new()?,
            disk,
            group_dir: group_dir.to_path_buf(),
            settings,
            store,
            replicas,
            history,
            cut: None,
            refused: None,
            skip_through: None,
            failed,
            quota_bytes: 0,
            halvings: 0,
            scratch: Vec::new(),
            unmarked: false,
            unmergeable: BTreeSet::new(),
        };
        applier.sweep()?;
        if applier.failed.is_none() {
            applier.begin_anew()?;
            applier.mark_again()?;
        }
        match applier.settle_rewound() {
            Err(error) if error.kind == ErrorKind::Sync => return Err(error),
            Err(error) => applier.note_failure(&error),
            Ok(()) => {}
        }
        Ok(applier)
    }

    /// Finds the cut batch; removes temporary files and undo that the state does not know.
    ///
    /// ⚠ What is found may be a killed process's, and its name in the page cache alone: durable before a
    /// batch is redone over it, and before what it stands for is removed.
    fn sweep(&mut self) -> Result<()> {
        let dir = undo_dir(&self.group_dir);
        for dir in [&dir, &self.group_dir] {
            self.disk.sync_dir(dir).map_err(|e| Error::sync(format!("sync {}", dir.display()), e))?;
        }
        let state = self.store.state();
        let next = state.applied_batch + 1;
        let names = self.disk.list(&dir).map_err(|e| Error::io(format!("list {}", dir.display()), e))?;
        for name in names {
            match file_number(&name) {
                Some(number) if number > next => {
                    let at = format!(
                        "{}: undo of batch {number}, {} is applied",
                        dir.join(name).display(),
                        next - 1
                    );
                    return Err(Error::corrupt(at));
                }
                // Merged into a later one; a crash came before it was removed.
                Some(number) if self.history.covering(number) != number && number < next => {
                    self.remove(&dir.join(name))?;
                }
                Some(number) if state.oldest_batch != 0 && number >= state.oldest_batch => {
                    if number == next {
                        self.cut = Some(read_summary(&*self.disk, &dir, number, state.group)?);
                    }
                }
                _ => self.remove(&dir.join(name))?,
            }
        }
        self.history.sweep_merged();
        let current = log_path(Path::new(""), state.events_file);
        for name in self.disk.list(&self.group_dir).map_err(|e| Error::io("list the group's directory", e))? {
            if name.starts_with("events") && Path::new(&name) != current {
                self.remove(&self.group_dir.join(name))?;
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        match self.disk.remove(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", path.display()), e))
            }
            _ => Ok(()),
        }
    }

    /// The state as it is durable.
    pub fn state(&self) -> &GroupState {
        self.store.state()
    }

    /// What replicas and undo take of the file system.
    pub fn taken_bytes(&self) -> (u64, u64) {
        let replicas = self.replicas.values().map(Replica::allocated_bytes).sum();
        (replicas, self.history.undo_bytes())
    }

    /// Redo of the next batch at most.
    pub fn batch_bytes(&self) -> u64 {
        self.settings.batch_bytes >> self.halvings
    }

    /// Makes the next batch smaller, for want of room; false when it is as small as can be.
    pub fn halve_batch(&mut self) -> bool {
        let can = self.halvings < MAX_HALVINGS;
        self.halvings += u32::from(can);
        can
    }

    /// Why nothing is applied until the group is opened again, if so.
    pub fn failure(&self) -> Option<Error> {
        if let Some((kind, at)) = &self.failed {
            return Some(Error::new(*kind, at.clone()));
        }
        let state = self.store.state();
        // Where it is rewound nothing is applied anyway.
        let stands = state.wishes.rewound.is_some() && state.wishes.intent.is_none();
        let words = state.changed_words().filter(|_| !stands)?;
        Some(Error::new(ErrorKind::NotPossible, words))
    }

    /// Applies at most one batch of what is durable in the journal up to `durable`; a rewind that is ordered
    /// comes first. `None`: there is nothing to apply, or the group is rewound.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`]: the volume named cannot be written; the same error is returned from then
    /// on, until the group is opened again. [`ErrorKind::NoSpace`]: try again later. [`ErrorKind::Sync`]:
    /// final, the process must exit. In all cases the checkpoint stands where it was.
    pub fn next_batch(&mut self, durable: &Position) -> Result<Option<BatchDone>> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if self.rewinds_now() {
            self.check_replicas()?;
            let was_untouched = self.cut.is_none();
            let done = self.follow_intent();
            // What was taken back concerns whoever ordered it, and nobody else.
            let was_taken_back = was_untouched && !self.is_rewinding();
            match &done {
                Err(error) if !was_taken_back => self.note_failure(error),
                _ => {}
            }
            return done;
        }
        let state = self.store.state();
        if state.wishes.rewound.is_some() && state.wishes.intent.is_none()
            || durable.lsn <= state.checkpoint.lsn
        {
            return Ok(None);
        }
        self.check_replicas()?;
        let mut done = self.apply_one();
        if done.as_ref().is_err_and(|e| e.kind == ErrorKind::NotPossible) {
            // The reader stood at the end of a segment that was dropped meanwhile: a new one finds the place.
            self.gatherer.reset();
            done = self.apply_one();
        }
        // An epoch whose records cannot be applied is over: a newer one, which begins with the whole content,
        // repairs it.
        while let Some(number) = self.refused.take().filter(|number| *number < durable.epoch.number) {
            tracing::warn!(epoch = number, "the rest of an epoch is passed over: the next one replaces it");
            self.gatherer.reset();
            self.skip_through = Some(number);
            done = self.apply_one();
        }
        // Rot that could not be mended ends its epoch, too.
        if done.as_ref().is_err_and(|e| e.kind == ErrorKind::Corrupt)
            && let Some(hole) = self.history.hole(self.store.state().checkpoint.lsn)
            && hole.epoch < durable.epoch.number
            && self.skip_through.is_none_or(|number| number < hole.epoch)
        {
            tracing::error!(
                epoch = hole.epoch,
                why = hole.why(),
                "the rest of an epoch is lost: the next one replaces it"
            );
            self.gatherer.reset();
            self.skip_through = Some(hole.epoch);
            done = self.apply_one();
        }
        if matches!(done, Ok(None))
            && self.store.state().needs_resync.is_none()
            && self.skip_through.is_none()
            // An epoch that is begun and holds nothing yet ends at an lsn that no record has.
            && durable.chain != chain_seed(durable.lineage, durable.epoch)
        {
            let lsn = self.store.state().checkpoint.lsn;
            done = Err(Error::corrupt(format!(
                "the journal holds records up to lsn {}, but what follows lsn {lsn} in it cannot be read",
                durable.lsn
            )));
        }
        match &done {
            Ok(_) => self.halvings = self.halvings.saturating_sub(1),
            Err(error) => self.note_failure(error),
        }
        done
    }

    /// A full disk and a passing read error may be tried again; what the stream or the replica is may not.
    fn note_failure(&mut self, error: &Error) {
        self.gatherer.reset();
        match error.kind {
            ErrorKind::NoSpace => self.halvings = MAX_HALVINGS.min(self.halvings + 1),
            ErrorKind::Io => {}
            kind => self.failed = Some((kind, error.in_full())),
        }
    }

    fn apply_one(&mut self) -> Result<Option<BatchDone>> {
        let batch = match self.gather() {
            Ok(Some(batch)) => batch,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.refused = self.gatherer.refused();
                return Err(error);
            }
        };
        // Whatever can be refused is refused before step 1: what stands behind an undo segment must be
        // carried out.
        self.history.check_events(&batch.events)?;
        let volumes = self.plan_volumes(&batch).inspect_err(|_| self.refused = Some(batch.epoch.number))?;
        let number = self.store.state().applied_batch + 1;
        let mut changes: BTreeMap<VolumeId, Vec<std::ops::Range<u64>>> =
            batch.fold.volumes().map(|volume| (volume, batch.fold.ranges(volume))).collect();

        // 1. The undo segment. It protects every boundary below this batch, and fixes the batch's range.
        if self.store.state().first_consistent.is_some() && self.cut.is_none() {
            let summary = self.write_undo(number, &batch, &mut changes)?;
            self.cut = Some(summary);
        }
        // 2. Registered before the first byte is overwritten: readers look at the replica first, at the
        //    registry second.
        if let Some(summary) = &self.cut {
            self.history.register(summary.clone());
        }
        // 3. The replicas and the event log. Any part of this may be durable after a crash, and is written
        //    again.
        self.unmarked = true;
        self.follow_volumes(volumes)?;
        let mut written_bytes = 0;
        for (volume, ranges) in &changes {
            let replica =
                self.replicas.get(volume).expect("gather checked that every record's volume exists");
            written_bytes += replica.write(&batch.fold, ranges, &mut self.scratch)?;
        }
        let events_bytes = self.append_events(&batch)?;
        for replica in self.replicas.values() {
            replica.sync()?;
        }
        // 4. The checkpoint: from here on the replicas are exactly the batch's last lsn, and who writes to
        //    them is noticed.
        let marks = self.marks(Ends::Skip)?;
        let state = self.state_after(number, &batch, events_bytes, marks);
        self.store.store(state)?;
        self.unmarked = false;
        let undo_bytes = self.cut.take().map_or(0, |summary| summary.bytes);
        self.history.follow(self.store.state(), batch.last, &batch.events);
        Ok(Some(BatchDone {
            number,
            first_lsn: batch.first.lsn,
            last_lsn: batch.last.lsn,
            redo_bytes: batch.redo_bytes,
            undo_bytes,
            written_bytes,
            ends_resync: batch.ends_resync,
            went_back_from: None,
        }))
    }

    fn gather(&mut self) -> Result<Option<Gathered>> {
        let state = self.store.state();
        // What is to be applied to a replica that others changed begins anew, above everything it ever held.
        let newest_epoch = state.reached().position.epoch.number.max(state.checkpoint.epoch.number);
        let behind = Behind {
            moment: state.checkpoint_moment(),
            epoch: state.checkpoint.epoch,
            nothing: state.applied_batch == 0,
            consistent: state.is_consistent(),
            skip_through: state.needs_resync.as_ref().map(|_| newest_epoch).max(self.skip_through),
            until: self.rewind_ahead(),
        };
        let want = match &self.cut {
            Some(cut) => Want::UpTo(cut.last.lsn),
            None => {
                let ApplySettings { batch_bytes, undo_bytes, .. } = self.settings;
                Want::AtMost {
                    redo_bytes: batch_bytes >> self.halvings,
                    undo_bytes: undo_bytes >> self.halvings,
                }
            }
        };
        let replicas = &self.replicas;
        let sizes = replicas.iter().map(|(id, replica)| (*id, replica.size_bytes())).collect();
        let undo_of = |volume: VolumeId, range, most| {
            replicas.get(&volume).map_or(Ok(0), |replica| data_bytes_up_to(replica, range, most))
        };
        let batch = self.gatherer.gather(&behind, want, self.history.limit(), sizes, &undo_of)?;
        if let Some(cut) = &self.cut {
            let found = batch.as_ref().map(|batch| (batch.epoch, batch.first.lsn, batch.last.lsn));
            if found != Some((cut.epoch, cut.first.lsn, cut.last.lsn)) {
                return Err(Error::corrupt(format!(
                    "{}: names lsn {}..{}, which the journal does not hold any more",
                    cut.path.display(),
                    cut.first.lsn,
                    cut.last.lsn
                )));
            }
        }
        Ok(batch)
    }

    /// Writes the undo segment, and leaves in `changes` only what really changes.
    fn write_undo(
        &mut self,
        number: u64,
        batch: &Gathered,
        changes: &mut BTreeMap<VolumeId, Vec<std::ops::Range<u64>>>,
    ) -> Result<UndoSummary> {
        let dir = undo_dir(&self.group_dir);
        let owner = self.undo_owner();
        let summary = UndoSummary {
            number,
            from: number,
            epoch: batch.epoch,
            first: batch.first,
            last: batch.last,
            received_ns: self.history.receipt_of(batch.last.lsn),
            bytes: 0,
            path: PathBuf::new(),
            nonce: 0,
        };
        let (replicas, scratch, encoder) = (&self.replicas, &mut self.scratch, &mut self.encoder);
        let written = UndoWriter::create(&self.disk, &dir, owner, summary, encoder).and_then(|mut undo| {
            for (volume, ranges) in changes.iter_mut() {
                // A volume that this batch announces has no older content that a point could ask for.
                if let Some(replica) = replicas.get(volume) {
                    *ranges = undo.keep(replica, &batch.fold, scratch)?;
                }
            }
            undo.finish()
        });
        if written.is_err() {
            // The segment has no name yet, unless the last sync failed, and that is final. Best effort: what
            // stays is removed at the next open.
            let _ = self.disk.remove(&dir.join(format!("{}.tmp", file_name(number))));
        }
        written?;
        read_summary(&*self.disk, &dir, number, owner.group)
    }

    fn undo_owner(&self) -> UndoOwner {
        let state = self.store.state();
        UndoOwner {
            group: state.group,
            lineage: state.checkpoint.lineage,
            compression: self.settings.undo_compression,
        }
    }

    /// The history learns of a state that became durable and brought nothing new from the stream.
    fn follow_state(&self) {
        self.history.follow(self.store.state(), Moment::default(), &[]);
    }

    /// What the batch's volume records mean; refused as a whole, before anything is written.
    fn plan_volumes(&self, batch: &Gathered) -> Result<VolumePlan> {
        let state = self.store.state();
        let plan = volumes::plan(&state.replicas, batch.volumes(), |name| {
            if self.settings.replica_dir.as_os_str().is_empty() {
                let at = format!(
                    "volume {name} has no replica yet: start the receiver, which knows where it goes"
                );
                return Err(Error::new(ErrorKind::ReplicaFailed, at));
            }
            let own = self.settings.replica_paths.get(name).cloned();
            let path = own.unwrap_or_else(|| self.settings.replica_dir.join(format!("{name}.img")));
            if !self.settings.seeded.contains(name) {
                Replica::check_vacant(&*self.disk, &path, name)?;
            }
            Ok(stored_path(&self.group_dir, &path))
        })?;
        if !plan.new.is_empty() {
            let mut after = state.clone();
            after.replicas.extend_from_slice(&plan.new);
            after.check_room()?;
        }
        Ok(plan)
    }

    /// Creates and grows replicas as planned.
    fn follow_volumes(&mut self, plan: VolumePlan) -> Result<()> {
        if !plan.new.is_empty() {
            let mut state = self.store.state().clone();
            state.replicas.extend_from_slice(&plan.new);
            // The intent comes first: after a crash the files are known to be ours.
            self.store.store(state)?;
        }
        for known in &plan.new {
            let seeded = self.settings.seeded.contains(&known.name);
            let hold = self.settings.hold_replicas;
            let replica = Replica::open(&*self.disk, &self.group_dir, known, hold, seeded)?;
            self.replicas.insert(known.id, replica);
        }
        for (id, size_bytes) in plan.sizes {
            let replica = self.replicas.get_mut(&id).expect("planned ones are open, and so are known ones");
            replica.grow(size_bytes)?;
        }
        Ok(())
    }

    /// Appends the batch's events to the log. One that grew far beyond what the history keeps of it is
    /// written anew first.
    fn append_events(&mut self, batch: &Gathered) -> Result<u64> {
        if self.store.state().events_bytes > MAX_LOG_BYTES {
            let mut state = self.store.state().clone();
            let (log, old) = self.rewrite_events(&mut state)?;
            self.store.store(state)?;
            self.events = log;
            self.remove(&old)?;
        }
        // What is applied for the second time, after a rewind, is in the log already.
        let reached = self.store.state().reached().position.lsn;
        let known = batch.events.iter().take_while(|event| event.at.lsn <= reached).count();
        self.events.append(&batch.events[known..], self.store.state().events_bytes)
    }

    fn state_after(&self, number: u64, batch: &Gathered, events_bytes: u64, marks: Vec<Mark>) -> GroupState {
        let mut state = self.store.state().clone();
        state.seen.marks = marks;
        state.clean = false;
        let new_epoch = batch.epoch != state.checkpoint.epoch;
        let was_consistent = state.is_consistent();
        state.checkpoint =
            Position { lineage: state.lineage, epoch: batch.epoch, lsn: batch.last.lsn, chain: batch.chain };
        state.checkpoint_time_ns = batch.last.time_ns;
        state.applied_batch = number;
        state.events_bytes = events_bytes;
        state.wishes.reached = rewind::still_reached(state.wishes.reached, batch.last.lsn);
        if new_epoch {
            state.needs_resync = None;
        }
        if batch.ends_resync || (was_consistent && !new_epoch && !batch.begins_resync()) {
            state.consistent_lsn = Some(batch.last.lsn);
            state.consistent_batch = number;
            if state.first_consistent.is_none() {
                state.first_consistent = Some(batch.last.lsn);
                state.oldest_batch = number + 1;
                state.history_start = batch.last;
            }
        }
        for known in &mut state.replicas {
            known.created = true;
            known.size_bytes = self.replicas.get(&known.id).map_or(known.size_bytes, Replica::size_bytes);
        }
        state
    }

    /// Keeps the newest heartbeat, so that `time:` can be answered up to it. Durable when it returns; the
    /// caller limits how often.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] and [`ErrorKind::Io`].
    pub fn keep_heartbeat(&mut self, heartbeat: Moment) -> Result<()> {
        if self.store.state().heartbeat.is_some_and(|known| known >= heartbeat) {
            return Ok(());
        }
        let state = GroupState { heartbeat: Some(heartbeat), ..self.store.state().clone() };
        self.store.store(state)?;
        self.follow_state();
        Ok(())
    }

    /// Drops what the policy lets go: `oldest_batch` is raised durably, then undo segments are removed.
    /// `segments` are the journal's, oldest first.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] is final; others may be tried again.
    pub fn expire(&mut self, policy: &Policy, segments: &[SegmentSummary]) -> Result<Expired> {
        self.shorten_exact(policy)?;
        let policy = &Policy { window_ns: policy.window_ns.max(policy.steps.horizon_ns()), ..*policy };
        let checkpoint = self.store.state().checkpoint.lsn;
        let redo_floor = self.history.redo_floor();
        let (batches, newest_ns, floor) = self.history.aged();
        // What lies below every point is about to go, and unapplied redo is not history yet.
        let redo: Vec<RedoPart> = segments
            .iter()
            .filter(|segment| redo_floor < segment.last_lsn && segment.last_lsn <= checkpoint)
            .map(|segment| RedoPart {
                last_lsn: segment.last_lsn,
                bytes: segment.bytes.max(MIN_SEGMENT_BYTES),
            })
            .collect();
        let quota_bytes = match policy.quota_bytes {
            Some(bytes) => bytes,
            None => self
                .default_quota(self.history.undo_bytes() + redo.iter().map(|part| part.bytes).sum::<u64>())?,
        };
        let verdict = decide(policy, quota_bytes, &batches, &redo, newest_ns, floor);
        let mut removed = 0;
        if let Some(wanted) = verdict.keep_from {
            // ⚠ From the reservation on no new pin is given out below; one that was taken since we looked
            // counts.
            let keep_from = self.history.reserve_drop(wanted);
            let dropped = self.drop_before(keep_from);
            self.history.end_drop();
            removed = dropped?;
        }
        let drop_journal_before = first_kept(segments, self.history.redo_floor());
        Ok(Expired { drop_journal_before, removed, verdict, quota_bytes })
    }

    /// 4 times what the replicas hold; measured again only when the history has outgrown the last answer.
    fn default_quota(&mut self, used_bytes: u64) -> Result<u64> {
        if self.replicas.len() < self.store.state().replicas.len() {
            // A replica that is away cannot be measured, and shortens no history.
            return Ok(if self.quota_bytes == 0 { u64::MAX } else { self.quota_bytes });
        }
        if used_bytes > self.quota_bytes || self.quota_bytes == 0 {
            let mut data_bytes = 0;
            for replica in self.replicas.values() {
                data_bytes += replica.data_bytes(0..replica.size_bytes())?;
            }
            self.quota_bytes = (4 * data_bytes).max(MIN_DEFAULT_QUOTA_BYTES);
        }
        Ok(self.quota_bytes)
    }

    fn drop_before(&mut self, keep_from: u64) -> Result<u64> {
        let mut state = self.store.state().clone();
        if keep_from <= state.oldest_batch {
            return Ok(0);
        }
        let start = self.history.boundary(keep_from - 1);
        let oldest = std::mem::replace(&mut state.oldest_batch, keep_from);
        let leaving: Vec<u64> = self.history.numbers(oldest, keep_from - 1);
        // Nothing is below the exact window any more.
        state.exact = state.exact.filter(|exact| exact.batch >= keep_from);
        // A damaged segment has no boundary that could be known; the next whole one has.
        let Some(start) = start else { return Ok(0) };
        state.history_start = start;
        state.seen.found.retain(|found| found.batch + 1 >= keep_from);
        // The state first: an undo segment that is gone must not be promised.
        self.store.store(state)?;
        self.history.follow(self.store.state(), Moment::default(), &[]);
        for number in &leaving {
            self.remove(&undo_dir(&self.group_dir).join(file_name(*number)))?;
        }
        self.history.sweep_merged();
        self.shorten_log()?;
        Ok(leaving.len() as u64)
    }

    /// Makes at most so many of the merged indexes that are missing; says how many. Derived from what is
    /// durable, so it may be done at any time, or never.
    pub fn merge(&mut self, at_most: usize) -> usize {
        self.history.merge(at_most)
    }

    /// Writes the log anew once most of it has left the history.
    fn shorten_log(&mut self) -> Result<()> {
        let mut state = self.store.state().clone();
        let needed = events::log_bytes(&self.history.applied_events())?;
        if state.events_bytes < needed.saturating_mul(2).saturating_add(MIN_SHORTENED_BYTES) {
            return Ok(());
        }
        let (log, old) = self.rewrite_events(&mut state)?;
        self.store.store(state)?;
        self.events = log;
        self.remove(&old)
    }

    /// Writes a new log of what the history still needs; in force once `state` is stored. Returns it and the
    /// old one's path.
    fn rewrite_events(&self, state: &mut GroupState) -> Result<(EventLog, PathBuf)> {
        let old = log_path(&self.group_dir, state.events_file);
        state.events_file += 1;
        // Left over where an earlier try was cut before its state was stored.
        self.remove(&log_path(&self.group_dir, state.events_file))?;
        let mut log = EventLog::new(Arc::clone(&self.disk), &self.group_dir, state.events_file);
        state.events_bytes = log.append(&self.history.applied_events(), 0)?;
        Ok((log, old))
    }

    /// Ends in good order: stamps the replicas, so that changes by others are noticed at the next open.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`], [`ErrorKind::Io`] and [`ErrorKind::ReplicaFailed`]; the group is then recovered
    /// as after a crash.
    pub fn close(mut self) -> Result<()> {
        if let Err(error) = self.check_replicas() {
            tracing::warn!(%error, "the replicas are not certified");
            return Ok(());
        }
        // With a cut batch the replica is not what the checkpoint says, and no stamp could say that it is.
        // One that others changed keeps the stamps of what we left. Where it is rewound it was stamped when
        // it came to stand, and has not been written since.
        let state = self.store.state();
        let stamped = state.seen.changed.is_some() || state.wishes.rewound.is_some();
        if self.cut.is_some() || self.failed.is_some() || stamped {
            return Ok(());
        }
        let mut state = GroupState { clean: true, ..self.store.state().clone() };
        for known in &mut state.replicas {
            known.stamp = match self.replicas.get(&known.id) {
                Some(replica) => replica.settled_stamp()?,
                None => None,
            };
        }
        state.seen.marks = self.marks(Ends::Read)?;
        self.store.store(state)
    }

    /// What was found and accepted is what was left from here on: it may have come by a copy, or be written
    /// to by a batch that left no undo, or have no mark of an older version.
    fn mark_again(&mut self) -> Result<()> {
        if self.store.state().seen.changed.is_some() || self.cut.is_some() {
            return Ok(());
        }
        let created =
            |mark: &Mark| self.store.state().replicas.iter().any(|r| r.id == mark.volume && r.created);
        let marks: Vec<Mark> = self.marks(Ends::Skip)?.into_iter().filter(created).collect();
        if marks == self.store.state().seen.marks {
            return Ok(());
        }
        let mut state = self.store.state().clone();
        state.seen.marks = marks;
        self.store.store(state)?;
        self.follow_state();
        Ok(())
    }
}

fn open_replicas(
    disk: &dyn Disk,
    group_dir: &Path,
    state: &GroupState,
    settings: &ApplySettings,
) -> Result<BTreeMap<VolumeId, Replica>> {
    let open = |known: &ReplicaState| {
        let seeded = settings.seeded.contains(&known.name);
        Replica::open(disk, group_dir, known, settings.hold_replicas, seeded)
    };
    state.replicas.iter().map(|known| Ok((known.id, open(known)?))).collect()
}

/// An empty file in the place of a replica that was not empty is the operator's word that its content is
/// given up: it is made anew by the next epoch, and the history, which rests on it, ends.
fn forget_given_up(disk: &dyn Disk, group_dir: &Path, state: &mut GroupState) {
    let given_up = |known: &ReplicaState| {
        let path = replica_path(group_dir, &known.path);
        let is_empty = disk.open_read(&path).and_then(|file| file.size()).is_ok_and(|size| size == 0);
        (known.created && known.size_bytes > 0 && is_empty).then_some(path)
    };
    let Some(path) = state.replicas.iter().find_map(given_up) else { return };
    let why = format!("replica {} is made anew: an empty file stands there", path.display());
    state.replicas.retain(|known| given_up(known).is_none());
    state.note_end(&why, now_ns());
    state.needs_resync = Some(why);
    state.end_history();
    state.seen.changed = None;
    let replicas = &state.replicas;
    state.seen.marks.retain(|mark| replicas.iter().any(|known| known.id == mark.volume));
}

/// Bytes in a range that may hold something other than zeros, counted until they are more than `most`.
fn data_bytes_up_to(replica: &Replica, range: std::ops::Range<u64>, most: u64) -> Result<u64> {
    let (mut bytes, mut at) = (0, range.start);
    while let Some(data) = replica.next_data(at..range.end)? {
        bytes += data.end - data.start;
        if bytes > most {
            break;
        }
        at = data.end;
    }
    Ok(bytes)
}

/// The first journal segment to keep where redo up to `floor` may go.
fn first_kept(segments: &[SegmentSummary], floor: Lsn) -> Option<u64> {
    let needed = segments.iter().position(|segment| segment.last_lsn > floor || !segment.sealed)?;
    // An epoch may begin far above the floor. The segment before it says that nothing was dropped between the
    // two.
    let begins_above = segments[needed].start.lsn > floor;
    Some(segments[needed.saturating_sub(usize::from(begins_above))].number)
}

impl Gathered {
    fn begins_resync(&self) -> bool {
        use crate::events::EventKind;
        self.events.iter().any(|event| matches!(event.kind, EventKind::ResyncBegin { .. }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::{Epoch, Lineage};

    /// Segments as (start, last, sealed).
    fn segments(spans: &[(u64, u64, bool)]) -> Vec<SegmentSummary> {
        let summary = |(number, (start, last, sealed)): (u64, &(u64, u64, bool))| SegmentSummary {
            number,
            path: PathBuf::new(),
            start: Position::epoch_start(Lineage::default(), Epoch::default(), Lsn(*start)),
            end: Position::default(),
            first_lsn: Lsn(start + 1),
            last_lsn: Lsn(*last),
            epoch: Epoch::default(),
            first_time_ns: 0,
            last_time_ns: 0,
            received_first_ns: 0,
            received_last_ns: 0,
            bytes: 0,
            frames: u32::from(last > start),
            sealed: *sealed,
        };
        (1..).zip(spans).map(summary).collect()
    }

    #[test]
    fn journal_segments_go_up_to_the_floor_and_an_epochs_gap_stays_explained() {
        let journal =
            segments(&[(0, 0, true), (10, 20, true), (20, 30, true), (90, 95, true), (95, 95, false)]);
        assert_eq!(
            first_kept(&journal, Lsn::ZERO),
            Some(1),
            "the gap up to lsn 10 is explained by segment 1"
        );
        assert_eq!(first_kept(&journal, Lsn(19)), Some(2), "the empty first segment goes");
        assert_eq!(first_kept(&journal, Lsn(20)), Some(3));
        assert_eq!(
            first_kept(&journal, Lsn(30)),
            Some(3),
            "segment 4 alone would look as if 31..90 was dropped"
        );
        assert_eq!(first_kept(&journal, Lsn(94)), Some(4));
        assert_eq!(first_kept(&journal, Lsn(95)), Some(5), "the open one stays");
        assert_eq!(first_kept(&[], Lsn(1)), None);
    }
}
