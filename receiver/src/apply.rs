//! Apply: from the journal to the replica, in numbered batches, undo first.
//!
//! One owner, synchronous; the caller decides when a batch is due. State: the group's control file, the open replicas,
//! the place in the journal. A failed batch leaves the checkpoint where it was.
//!
//! ⚠ The order of a batch (DESIGN section 8, `models/undo.py`), each step durable before the next:
//! 1. the undo segment, under a temporary name, synced, renamed, its directory synced. From here on the batch's range
//!    is fixed: after a crash exactly this range is redone, since the replica may hold any part of it;
//! 2. the batch is registered in [`History`], so that readers find the old content before it is overwritten;
//! 3. the replicas are written, sorted; events appended and synced; replicas synced;
//! 4. the checkpoint is advanced in the control file.
//!
//! Before the first consistent point there is nothing worth keeping: no undo is taken, a cut batch is simply redone
//! from the checkpoint, in whatever batches.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::compress::{Compression, Encoder};
use journal::io::Disk;
use journal::record::VolumeRecord;
use journal::segment::SegmentSummary;
use journal::{Lsn, Position, VolumeId};

use crate::events::{Event, EventLog, log_path};
use crate::gather::{Behind, Gathered, Gatherer, Want};
use crate::history::{History, outlived};
use crate::replica::{Replica, stamp};
use crate::retention::{Policy, RedoPart, Verdict, decide};
use crate::state::{
    GroupState, GroupStore, Moment, ReplicaState, journal_dir, replica_path, stored_path, undo_dir,
};
use crate::undo::{UndoOwner, UndoSummary, UndoWriter, file_name, file_number, read_summary};
use crate::{Error, ErrorKind, Result};

/// Smallest quota that is chosen by default: below it a handful of segments would be the whole history.
const MIN_DEFAULT_QUOTA_BYTES: u64 = 1 << 30;

/// How batches are chosen and where replicas lie.
#[derive(Clone, Debug)]
pub struct ApplySettings {
    /// Redo bytes in one batch.
    pub batch_bytes: u64,
    /// Undo bytes in one batch.
    pub undo_bytes: u64,
    /// How undo is packed.
    pub undo_compression: Compression,
    /// Directory of replicas without a path of their own.
    pub replica_dir: PathBuf,
    /// Replicas with a path of their own, by volume name.
    pub replica_paths: BTreeMap<String, PathBuf>,
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
    failed: Option<(ErrorKind, String)>,
    quota_bytes: u64,
    scratch: Vec<u8>,
}

impl Applier {
    /// Opens a group for applying: finds the batch that was cut, removes what a crash left over, opens and holds the
    /// replicas. A replica that others changed since a clean end sets [`GroupState::needs_resync`] and ends the history,
    /// which was made of undo against the old content.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`] and [`ErrorKind::Busy`] for replicas, [`ErrorKind::Corrupt`] for the group's own files.
    pub fn open(
        disk: Arc<dyn Disk>,
        group_dir: &Path,
        settings: ApplySettings,
        history: Arc<History>,
    ) -> Result<Applier> {
        let mut store = GroupStore::open(Arc::clone(&disk), group_dir)?;
        let mut state = store.state().clone();
        let mut replicas = BTreeMap::new();
        for known in &state.replicas {
            replicas.insert(known.id, Replica::open(&*disk, group_dir, known, settings.hold_replicas)?);
        }
        if settings.hold_replicas && state.clean {
            note_changed(group_dir, &mut state);
        }
        state.clean = false;
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
            failed: None,
            quota_bytes: 0,
            scratch: Vec::new(),
        };
        applier.sweep()?;
        Ok(applier)
    }

    /// Finds the cut batch; removes temporary files and undo that the state does not know.
    fn sweep(&mut self) -> Result<()> {
        let dir = undo_dir(&self.group_dir);
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
                Some(number) if state.oldest_batch != 0 && number >= state.oldest_batch => {
                    if number == next {
                        self.cut = Some(read_summary(&*self.disk, &dir, number, state.group)?);
                    }
                }
                _ => self.remove(&dir.join(name))?,
            }
        }
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

    /// Applies at most one batch of what is durable in the journal up to `durable`. `None`: there is nothing to apply.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`]: the volume named cannot be written; the same error is returned from then on, until the
    /// group is opened again. [`ErrorKind::NoSpace`]: try again later. [`ErrorKind::Sync`]: final, the process must exit.
    /// In all cases the checkpoint stands where it was.
    pub fn next_batch(&mut self, durable: &Position) -> Result<Option<BatchDone>> {
        if let Some((kind, at)) = &self.failed {
            return Err(Error::new(*kind, at.clone()));
        }
        if durable.lsn <= self.store.state().checkpoint.lsn {
            return Ok(None);
        }
        let done = self.apply_one();
        if let Err(error) = &done {
            self.gatherer.reset();
            // A full disk and a passing read error may be tried again; what the stream or the replica is may not.
            if !matches!(error.kind, ErrorKind::NoSpace | ErrorKind::Io) {
                self.failed = Some((error.kind, error.at.clone()));
            }
        }
        done
    }

    fn apply_one(&mut self) -> Result<Option<BatchDone>> {
        let Some(batch) = self.gather()? else { return Ok(None) };
        let number = self.store.state().applied_batch + 1;
        let mut changes: BTreeMap<VolumeId, Vec<std::ops::Range<u64>>> =
            batch.fold.volumes().map(|volume| (volume, batch.fold.ranges(volume))).collect();

        // 1. The undo segment. It protects every boundary below this batch, and fixes the batch's range.
        if self.store.state().first_consistent.is_some() && self.cut.is_none() {
            let summary = self.write_undo(number, &batch, &mut changes)?;
            self.cut = Some(summary);
        }
        // 2. Registered before the first byte is overwritten: readers look at the replica first, at the registry second.
        if let Some(summary) = &self.cut {
            self.history.register(summary.clone());
        }
        // 3. The replicas and the event log. Any part of this may be durable after a crash, and is written again.
        self.follow_volumes(&batch)?;
        let mut written_bytes = 0;
        for (volume, ranges) in &changes {
            let replica =
                self.replicas.get(volume).expect("gather checked that every record's volume exists");
            written_bytes += replica.write(&batch.fold, ranges, &mut self.scratch)?;
        }
        let events_bytes = self.events.append(&batch.events, self.store.state().events_bytes)?;
        for replica in self.replicas.values() {
            replica.sync()?;
        }
        // 4. The checkpoint: from here on the replicas are exactly the batch's last lsn.
        let state = self.state_after(number, &batch, events_bytes);
        self.store.store(state)?;
        let undo_bytes = self.cut.take().map_or(0, |summary| summary.bytes);
        self.history.follow(self.store.state(), batch.last, &batch.events);
        Ok(Some(BatchDone {
            number,
            first_lsn: batch.first.lsn,
            last_lsn: batch.last.lsn,
            redo_bytes: batch.redo_bytes,
            undo_bytes,
            written_bytes,
        }))
    }

    fn gather(&mut self) -> Result<Option<Gathered>> {
        let state = self.store.state();
        let behind = Behind {
            moment: state.checkpoint_moment(),
            epoch: state.checkpoint.epoch,
            nothing: state.applied_batch == 0,
            skip_epoch: state.needs_resync.is_some(),
        };
        let want = match &self.cut {
            Some(cut) => Want::UpTo(cut.last.lsn),
            None => {
                let ApplySettings { batch_bytes, undo_bytes, .. } = self.settings;
                Want::AtMost { redo_bytes: batch_bytes, undo_bytes }
            }
        };
        let replicas = &self.replicas;
        let sizes = replicas.iter().map(|(id, replica)| (*id, replica.size_bytes())).collect();
        let undo_of = |volume: VolumeId, range| {
            replicas.get(&volume).map_or(Ok(0), |replica| replica.data_bytes(range))
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
        let state = self.store.state();
        let owner = UndoOwner {
            group: state.group,
            lineage: state.checkpoint.lineage,
            compression: self.settings.undo_compression,
        };
        let summary = UndoSummary {
            number,
            epoch: batch.epoch,
            first: batch.first,
            last: batch.last,
            received_ns: self.history.receipt_of(batch.last.lsn),
            bytes: 0,
            path: PathBuf::new(),
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
            // The segment has no name yet, unless the last sync failed, and that is final. Best effort: what stays is
            // removed at the next open.
            let _ = self.disk.remove(&dir.join(format!("{}.tmp", file_name(number))));
        }
        written
    }

    /// Creates and grows replicas as the batch's volume records say.
    fn follow_volumes(&mut self, batch: &Gathered) -> Result<()> {
        for (id, record) in batch.volumes() {
            if !record.present {
                continue;
            }
            if let Some(replica) = self.replicas.get_mut(&id) {
                replica.check(record)?;
                replica.grow(record.size_bytes)?;
                continue;
            }
            let mut state = self.store.state().clone();
            let known = self.plan_replica(id, record)?;
            state.replicas.push(known.clone());
            // The intent comes first: after a crash the file is known to be ours.
            self.store.store(state)?;
            let replica = Replica::open(&*self.disk, &self.group_dir, &known, self.settings.hold_replicas)?;
            self.replicas.insert(id, replica);
        }
        Ok(())
    }

    fn plan_replica(&self, id: VolumeId, record: &VolumeRecord) -> Result<ReplicaState> {
        let VolumeRecord { uuid, size_bytes, name, .. } = record;
        if let Some(other) = self.replicas.values().find(|other| other.name() == name) {
            let at = format!(
                "volume {name}: the source sends it under id {id}; it is known under id {}",
                other.id()
            );
            return Err(Error::new(ErrorKind::ReplicaFailed, at));
        }
        let own = self.settings.replica_paths.get(name).cloned();
        let path = own.unwrap_or_else(|| self.settings.replica_dir.join(format!("{name}.img")));
        Replica::check_vacant(&*self.disk, &path, name)?;
        Ok(ReplicaState {
            id,
            uuid: *uuid,
            name: name.clone(),
            path: stored_path(&self.group_dir, &path),
            size_bytes: *size_bytes,
            created: false,
            stamp: None,
        })
    }

    fn state_after(&self, number: u64, batch: &Gathered, events_bytes: u64) -> GroupState {
        let mut state = self.store.state().clone();
        let new_epoch = batch.epoch != state.checkpoint.epoch;
        let was_consistent = state.is_consistent();
        state.checkpoint =
            Position { lineage: state.lineage, epoch: batch.epoch, lsn: batch.last.lsn, chain: batch.chain };
        state.checkpoint_time_ns = batch.last.time_ns;
        state.applied_batch = number;
        state.events_bytes = events_bytes;
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

    /// Keeps the newest heartbeat, so that `time:` can be answered up to it. Durable when it returns; the caller limits how
    /// often.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] and [`ErrorKind::Io`].
    pub fn keep_heartbeat(&mut self, heartbeat: Moment) -> Result<()> {
        if self.store.state().heartbeat.is_some_and(|known| known >= heartbeat) {
            return Ok(());
        }
        let state = GroupState { heartbeat: Some(heartbeat), ..self.store.state().clone() };
        self.store.store(state)?;
        self.history.follow(self.store.state(), Moment::default(), &[]);
        Ok(())
    }

    /// Drops what the policy lets go: `oldest_batch` is raised durably, then undo segments are removed. `segments` are the
    /// journal's, oldest first.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] is final; others may be tried again.
    pub fn expire(&mut self, policy: &Policy, segments: &[SegmentSummary]) -> Result<Expired> {
        let checkpoint = self.store.state().checkpoint.lsn;
        let (batches, newest_ns, floor) = self.history.aged();
        let redo: Vec<RedoPart> = segments
            .iter()
            .filter(|segment| segment.last_lsn <= checkpoint)
            .map(|segment| RedoPart { last_lsn: segment.last_lsn, bytes: segment.bytes })
            .collect();
        let quota_bytes = match policy.quota_bytes {
            Some(bytes) => bytes,
            None => self
                .default_quota(self.history.undo_bytes() + redo.iter().map(|part| part.bytes).sum::<u64>())?,
        };
        let verdict = decide(policy, quota_bytes, &batches, &redo, newest_ns, floor);
        let mut removed = 0;
        if let Some(keep_from) = verdict.keep_from {
            removed = self.drop_before(keep_from)?;
        }
        let floor = self.history.redo_floor();
        let kept = segments
            .iter()
            .find(|segment| segment.last_lsn > floor || segment.frames == 0 || !segment.sealed);
        let drop_journal_before = kept.map(|segment| segment.number);
        Ok(Expired { drop_journal_before, removed, verdict, quota_bytes })
    }

    /// 4 times what the replicas hold; measured again only when the history has outgrown the last answer.
    fn default_quota(&mut self, used_bytes: u64) -> Result<u64> {
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
        let start = self.history.boundary(keep_from - 1);
        let oldest = std::mem::replace(&mut state.oldest_batch, keep_from);
        // A damaged segment has no boundary that could be known; the next whole one has.
        let Some(start) = start else { return Ok(0) };
        state.history_start = start;
        let log = self.rewrite_events(&mut state)?;
        // The state first: an undo segment that is gone must not be promised.
        self.store.store(state)?;
        self.history.follow(self.store.state(), Moment::default(), &[]);
        if let Some((log, old)) = log {
            self.events = log;
            self.remove(&old)?;
        }
        for number in oldest..keep_from {
            self.remove(&undo_dir(&self.group_dir).join(file_name(number)))?;
        }
        Ok(keep_from - oldest)
    }

    /// Writes the log anew without outlived events, once most of them are. Returns the new log and the old one's path.
    fn rewrite_events(&self, state: &mut GroupState) -> Result<Option<(EventLog, PathBuf)>> {
        let events = EventLog::load(&*self.disk, &self.group_dir, state.events_file, state.events_bytes)?;
        let outlived = outlived(&events, state.history_start.lsn);
        let gone = outlived.iter().filter(|outlived| **outlived).count();
        if gone < 64 || gone * 2 < events.len() {
            return Ok(None);
        }
        let kept: Vec<Event> = events
            .into_iter()
            .zip(outlived)
            .filter(|(_, outlived)| !outlived)
            .map(|(event, _)| event)
            .collect();
        let old = log_path(&self.group_dir, state.events_file);
        state.events_file += 1;
        // Left over where an earlier try was cut before its state was stored.
        self.remove(&log_path(&self.group_dir, state.events_file))?;
        let mut log = EventLog::new(Arc::clone(&self.disk), &self.group_dir, state.events_file);
        state.events_bytes = log.append(&kept, 0)?;
        Ok(Some((log, old)))
    }

    /// Ends in good order: stamps the replicas, so that changes by others are noticed at the next open.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] and [`ErrorKind::Io`]; the group is then recovered as after a crash.
    pub fn close(mut self) -> Result<()> {
        // With a cut batch the replica is not what the checkpoint says, and no stamp could say that it is.
        if self.cut.is_some() || self.failed.is_some() {
            return Ok(());
        }
        let mut state = GroupState { clean: true, ..self.store.state().clone() };
        for known in &mut state.replicas {
            let path = replica_path(&self.group_dir, &known.path);
            known.stamp = if self.settings.hold_replicas { stamp(&path) } else { None };
        }
        self.store.store(state)
    }
}

/// Compares the replicas with their stamps.
fn note_changed(group_dir: &Path, state: &mut GroupState) {
    let changed = state
        .replicas
        .iter()
        .find(|known| known.stamp.is_some() && stamp(&replica_path(group_dir, &known.path)) != known.stamp);
    if let Some(known) = changed {
        let path = replica_path(group_dir, &known.path);
        let why = format!("replica {} was changed by others while the receiver was away", path.display());
        state.needs_resync = Some(why);
        state.oldest_batch = 0;
        state.first_consistent = None;
        state.consistent_lsn = None;
        state.history_start = Moment::default();
    }
}

impl Gathered {
    fn begins_resync(&self) -> bool {
        use crate::events::EventKind;
        self.events.iter().any(|event| matches!(event.kind, EventKind::ResyncBegin { .. }))
    }
}
