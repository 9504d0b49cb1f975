//! History: the list of numbered batches, and how to get at what each one overwrote.
//!
//! Shared by the applier (which adds to it), ingest (which tells it what was received) and any number of
//! views and restores. State at the boundary of batch `b` = replica with the undo of all batches above `b`
//! laid over it, the smallest batch first. State at lsn `T` = a boundary at or below `T`, then redo records
//! up to `T`.
//!
//! A rewind is a batch whose boundary lies *below* that of the batch before it. So boundaries do not rise
//! with their numbers, several may stand at one lsn, and each of them is right: what a replica holds depends
//! on its lsn alone.
//!
//! Invariants:
//! * no boundary that is kept lies below the oldest point: the redo below that is gone;
//! * ⚠ a batch is registered before the applier overwrites the first byte of it; a reader reads the replica
//!   first and asks for batches second, so whatever it read is either unharmed or told by a batch that it
//!   finds;
//! * a [`Pin`] keeps its boundary: neither undo nor redo that leads to it is dropped;
//! * at most [`MAX_OPEN_SEGMENTS`] undo segments are open, with [`MAX_OPEN_BYTES`] of indexes; a reader holds
//!   what it uses.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use journal::frame::{FLAG_EVENTS, FrameHeader};
use journal::io::{Disk, File};
use journal::reader::Reader;
use journal::record::Records;
use journal::segment::SegmentSummary;
use journal::tail::{Limit, Tail};
use journal::writer::Writer;
use journal::{Epoch, GroupId, Lineage, Lsn, VolumeId};
use machine::disk::Same;
use machine::{Mutex, MutexGuard};

use crate::event_list::{EventList, MAX_STRUCTURAL, is_structural};
use crate::events::{Event, EventLog};
use crate::mend::Rotten;
use crate::merged::{Node, OpenIndexes};
use crate::point::Point;
use crate::proof;
use crate::replica::ReadHold;
use crate::retention::Aged;
use crate::state::{GroupState, GroupStore, Moment, ReplicaState, journal_dir, replica_path, seen, undo_dir};
use crate::undo::{self, UndoSegment, UndoSummary, damage, read_summary};
use crate::{Error, ErrorKind, Result};

/// Undo segments kept open at once: well below the usual 1,024 descriptors a process may have.
const MAX_OPEN_SEGMENTS: usize = 128;
/// Bytes of their indexes held at once; one alone may be larger.
const MAX_OPEN_BYTES: u64 = 32 << 20;
/// Receipts remembered for batches to come; merged at 1 s, so this is over an hour of backlog.
const MAX_RECEIPTS: usize = 4096;
const RECEIPT_STEP_NS: u64 = 1_000_000_000;
/// What a batch counts for in the quota, however small: its file's blocks, inode and place in the registry.
/// So a source that makes many tiny batches shortens its own history, not the receiver's memory.
const MIN_BATCH_BYTES: u64 = 64 << 10;

mod steps;

/// What is known about a batch's undo segment.
#[derive(Clone, Debug)]
pub(crate) enum Slot {
    /// It is there.
    Kept(UndoSummary),
    /// It is promised, but missing or damaged: file and reason. Perhaps it stood for the numbers before it,
    /// too.
    Damaged(String),
}

/// The registry; short critical sections, no disk access under the lock.
pub(crate) struct Inner {
    pub(crate) state: GroupState,
    pub(crate) batches: BTreeMap<u64, Slot>,
    pub(crate) events: EventList,
    /// Newest record that points may be told from.
    pub(crate) received: Moment,
    /// Why `received` stands still although more is in the journal: what follows it there cannot be read.
    pub(crate) damage: Option<String>,
    pub(crate) received_epoch: Epoch,
    receipts: VecDeque<(Lsn, u64)>,
    newest_receipt_ns: u64,
    pins: BTreeMap<u64, u64>,
    next_pin: u64,
    /// Batches below this one are being dropped right now.
    leaving: u64,
    /// Redo below the boundary of this batch is being dropped right now.
    pub(crate) leaving_redo: u64,
    /// Merged indexes that there are.
    pub(crate) merged: BTreeSet<Node>,
    /// Those that cannot be made: a segment is damaged, or too large.
    pub(crate) hopeless: BTreeSet<Node>,
    /// Frames of the journal that are known to be rotten, oldest first.
    pub(crate) rotten: Vec<Rotten>,
}

/// The history of one group.
pub struct History {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) group_dir: PathBuf,
    inner: Mutex<Inner>,
    /// Held while a boundary is pinned, and while batches are merged into one: nobody reads what is being
    /// replaced.
    shape: Mutex<()>,
    open_segments: Mutex<VecDeque<(u64, Arc<UndoSegment>)>>,
    pub(crate) open_indexes: Mutex<OpenIndexes>,
    tail: OnceLock<Arc<Tail>>,
    /// No daemon runs here: what keeps the replicas that are read from being written meanwhile.
    alone: OnceLock<Mutex<Vec<ReadHold>>>,
}

/// Keeps a boundary reachable until dropped.
pub struct Pin {
    history: Arc<History>,
    id: u64,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.history.lock().pins.remove(&self.id);
    }
}

impl History {
    /// Opens a group's history from its directory, changing nothing there. Also right when the last batch was
    /// cut by a crash: its undo segment then stands above the checkpoint and is laid over like any other.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for damage in the group's state or event log. Damaged undo segments are kept in
    /// mind and reported when a point needs them; damage in the journal above the checkpoint ends the window
    /// there.
    pub fn open(disk: Arc<dyn Disk>, group_dir: &Path) -> Result<Arc<History>> {
        let state = GroupStore::read(&*disk, group_dir)?;
        let mut events = EventList::default();
        EventLog::load(&*disk, group_dir, state.events_file, state.events_bytes, |event| events.add(event))?;
        let reached = state.reached();
        let received = reached.moment();
        let history = History {
            inner: Mutex::new(Inner {
                batches: BTreeMap::new(),
                events,
                received,
                damage: None,
                received_epoch: reached.position.epoch,
                receipts: VecDeque::new(),
                newest_receipt_ns: 0,
                pins: BTreeMap::new(),
                next_pin: 0,
                leaving: 0,
                leaving_redo: 0,
                merged: BTreeSet::new(),
                hopeless: BTreeSet::new(),
                rotten: Vec::new(),
                state,
            }),
            shape: Mutex::new(()),
            disk,
            group_dir: group_dir.to_path_buf(),
            open_segments: Mutex::new(VecDeque::new()),
            open_indexes: Mutex::default(),
            tail: OnceLock::new(),
            alone: OnceLock::new(),
        };
        history.find_batches()?;
        history.find_merged()?;
        history.read_received()?;
        Ok(Arc::new(history))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the registry")
    }

    fn find_batches(&self) -> Result<()> {
        let mut inner = self.lock();
        if inner.state.oldest_batch == 0 {
            return Ok(());
        }
        let dir = undo_dir(&self.group_dir);
        let names = self.disk.list(&dir).map_err(|e| Error::io(format!("list {}", dir.display()), e))?;
        let present: Vec<u64> = names.iter().filter_map(|name| undo::file_number(name)).collect();
        let (oldest, applied) = (inner.state.oldest_batch, inner.state.applied_batch);
        let cut = present.binary_search(&(applied + 1)).ok().map(|_| applied + 1);
        let mut next = cut.unwrap_or(applied);
        while next >= oldest {
            // Merged undo stands for the numbers before its own, and its file is right where some of theirs
            // are left over.
            let number = next;
            next = number - 1;
            let slot = match read_summary(&*self.disk, &dir, number, inner.state.group) {
                Ok(summary) => {
                    next = summary.from.saturating_sub(1);
                    Slot::Kept(summary)
                }
                Err(e) if present.binary_search(&number).is_err() => {
                    Slot::Damaged(format!("{}: undo segment is missing", e.at))
                }
                Err(e) => Slot::Damaged(e.at),
            };
            if slot.kept().is_none() {
                // What it stood for is unknown; what is missing with it is told once.
                let below = present.partition_point(|known| *known < number);
                next = below.checked_sub(1).map_or(0, |at| present[at]).min(next);
            }
            inner.batches.insert(number, slot);
        }
        inner.newest_receipt_ns = inner.batches.values().filter_map(Slot::received_ns).max().unwrap_or(0);
        Ok(())
    }

    /// Notes what the journal holds above everything ever applied. Whatever cannot be read there ends the
    /// window, nothing else: the older points do not need it.
    fn read_received(&self) -> Result<()> {
        let dir = journal_dir(&self.group_dir);
        if !Writer::exists(&*self.disk, &dir)? {
            return Ok(());
        }
        let behind = {
            let state = &self.lock().state;
            // The event log tells of what was applied once, also where the checkpoint was set back below it.
            (state.applied_batch > 0).then_some(state.reached().position.lsn)
        };
        let read = || -> Result<()> {
            let Some(mut reader) = read_behind(&self.disk, &dir, behind)? else { return Ok(()) };
            let mut frame = Vec::new();
            while let Some(header) = reader.next(&mut frame, Limit::End).map_err(damage)? {
                self.note(&header, &frame)?;
            }
            Ok(())
        };
        if let Err(error) = read() {
            tracing::warn!(%error, group = self.lock().state.name, "the history ends at damage in the journal");
            self.lock().damage.get_or_insert(error.at);
        }
        Ok(())
    }

    /// Lets readers of this history follow a journal that is being written, up to what is durable. Without it
    /// the journal is read to its end.
    pub fn attach_tail(&self, tail: Arc<Tail>) {
        // A second writer of the same group would be a broken invariant; the first one's tail stays.
        let _ = self.tail.set(tail);
    }

    /// No daemon runs on this directory: from here on each replica has to prove, before it is read, that it
    /// is what was left.
    pub fn read_alone(&self) {
        _ = self.alone.set(Mutex::default());
    }

    /// Whether a replica, open as `file`, is the one that this history belongs to. Under a daemon its applier
    /// looks at the content, and here only who it is counts: it may be written just now.
    fn prove(&self, known: &ReplicaState, path: &Path, file: &dyn File) -> Result<()> {
        let refuse = |at: String| Err(Error::new(ErrorKind::NotPossible, at));
        let state = self.state();
        if let Some(words) = state.changed_words() {
            return refuse(words);
        }
        let Some(held) = self.alone.get() else {
            let identity = file.identity();
            let identity =
                identity.map_err(|e| Error::replica(format!("look at replica {}", path.display()), e))?;
            let is_other = identity
                .zip(state.seen.mark(known.id))
                .is_some_and(|(now, mark)| mark.identity.compare(&now) == Same::No);
            return match is_other {
                true => refuse(seen::told(&known.name, path, "another stands in its place")),
                false => Ok(()),
            };
        };
        // ⚠ The lock first: a receiver that starts now waits, or has begun and is found out by what it wrote.
        if file.identity().is_ok_and(|identity| identity.is_some()) {
            let hold = ReadHold::acquire(path)?;
            held.lock().expect("nothing panics while it holds the list").push(hold);
        }
        let state = GroupStore::read(&*self.disk, &self.group_dir)?;
        match proof::doubt_at(&*self.disk, &self.group_dir, &state, known, file)? {
            Some(why) => refuse(format!("{why}; its history is not the one of what stands there")),
            None => Ok(()),
        }
    }

    pub(crate) fn limit(&self) -> Limit {
        self.tail.get().map_or(Limit::End, |tail| Limit::UpTo(tail.durable()))
    }

    /// Ingest tells of a durable frame, in order, and when it was received by the receiver's clock; frames
    /// known already are passed over. So points above the checkpoint are known before they are applied.
    /// Behind a frame that cannot be read nothing is noted until the applier has passed it.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where its events cannot be read, [`ErrorKind::NotPossible`] where they are
    /// too many.
    pub fn note_frame(&self, header: &FrameHeader, frame: &[u8], received_ns: u64) -> Result<()> {
        let noted = self.note(header, frame);
        let mut inner = self.lock();
        inner.newest_receipt_ns = inner.newest_receipt_ns.max(received_ns);
        let newest_ns = inner.newest_receipt_ns;
        match inner.receipts.back_mut() {
            Some((lsn, at)) if newest_ns - *at < RECEIPT_STEP_NS => *lsn = header.last_lsn,
            _ => {
                if inner.receipts.len() == MAX_RECEIPTS {
                    inner.receipts.pop_front();
                }
                inner.receipts.push_back((header.last_lsn, newest_ns));
            }
        }
        if let Err(error) = &noted {
            inner.damage.get_or_insert_with(|| error.at.clone());
        }
        noted
    }

    /// A frame has been received and waits for room: time passes, although nothing is taken. So what outlives
    /// its minimum meanwhile can go, and make the room.
    pub fn note_waiting(&self, received_ns: u64) {
        let mut inner = self.lock();
        inner.newest_receipt_ns = inner.newest_receipt_ns.max(received_ns);
    }

    /// What is known of the journal to be rotten, oldest first: points that need it are refused.
    pub(crate) fn note_rotten(&self, rotten: Vec<Rotten>) {
        self.lock().rotten = rotten;
    }

    /// What is rotten in the journal behind a checkpoint.
    pub(crate) fn hole(&self, checkpoint: Lsn) -> Option<Rotten> {
        self.lock().rotten.iter().find(|rotten| rotten.last > checkpoint).cloned()
    }

    /// The newest receipt known, by the receiver's clock; 0 where none is.
    pub fn newest_receipt_ns(&self) -> u64 {
        self.lock().newest_receipt_ns
    }

    /// After a restart: when the journal's segments were received, oldest first.
    pub fn note_segments(&self, segments: &[SegmentSummary]) {
        let mut inner = self.lock();
        let checkpoint = inner.state.checkpoint.lsn;
        for segment in segments.iter().filter(|segment| segment.frames > 0 && segment.last_lsn > checkpoint) {
            inner.newest_receipt_ns = inner.newest_receipt_ns.max(segment.received_last_ns);
            inner.receipts.push_back((segment.last_lsn, segment.received_last_ns));
        }
        while inner.receipts.len() > MAX_RECEIPTS {
            inner.receipts.pop_front();
        }
    }

    fn note(&self, header: &FrameHeader, frame: &[u8]) -> Result<()> {
        let has_events = header.flags & FLAG_EVENTS != 0;
        if !self.lock().awaits(header) {
            return Ok(());
        }
        let mut raw = Vec::new();
        if has_events {
            journal::compress::Decoder::new()?.decode(header, frame, &mut raw)?;
            Records::check(header, &raw)?;
        }
        let mut inner = self.lock();
        // The applier may have passed the frame meanwhile.
        if !inner.awaits(header) {
            return Ok(());
        }
        let known = inner.received;
        let mut events = Vec::new();
        if header.epoch != inner.received_epoch {
            events.push(Event::epoch(header, known));
        }
        let mut last = known;
        for located in Records::new(&raw) {
            let located = located?;
            if located.record.lsn > known.lsn {
                events.extend(Event::of(&located, last)?);
            }
            last = Moment { lsn: located.record.lsn, time_ns: located.record.time_ns };
        }
        inner.check_room(&events)?;
        for event in events {
            inner.events.add(event);
        }
        inner.damage = None;
        inner.received = Moment { lsn: header.last_lsn, time_ns: header.last_time_ns };
        inner.received_epoch = header.epoch;
        Ok(())
    }

    /// The applier asks before a batch is begun whether its events can be kept.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where there are too many; older ones make room as they leave the history.
    pub(crate) fn check_events(&self, events: &[Event]) -> Result<()> {
        let inner = self.lock();
        let known = inner.received.lsn;
        let first_new = events.iter().position(|event| event.at.lsn > known).unwrap_or(events.len());
        inner.check_room(&events[first_new..])
    }

    /// All events that were applied once and that the history still needs.
    pub(crate) fn applied_events(&self) -> Vec<Event> {
        let inner = self.lock();
        let reached = inner.state.reached().position.lsn;
        inner.events.iter().filter(|event| event.at.lsn <= reached).cloned().collect()
    }

    /// Receipt time of a batch that ends at `lsn`: never earlier than the real one, so that nothing expires
    /// too soon.
    pub(crate) fn receipt_of(&self, lsn: Lsn) -> u64 {
        let mut inner = self.lock();
        let newest_ns = inner.newest_receipt_ns;
        while inner.receipts.front().is_some_and(|(last, _)| *last < lsn) {
            inner.receipts.pop_front();
        }
        inner.receipts.front().map_or(newest_ns, |(_, at)| *at + RECEIPT_STEP_NS.min(newest_ns - *at))
    }

    /// ⚠ Registers a batch whose undo is durable, before the first byte of the replica is overwritten.
    pub(crate) fn register(&self, summary: UndoSummary) {
        self.lock().batches.insert(summary.number, Slot::Kept(summary));
    }

    /// Follows a state that became durable.
    pub(crate) fn follow(&self, state: &GroupState, applied: Moment, events: &[Event]) {
        let mut inner = self.lock();
        if inner.received.lsn < applied.lsn {
            let known = inner.received.lsn;
            for event in events.iter().filter(|event| event.at.lsn > known) {
                inner.events.add(event.clone());
            }
            inner.received = applied;
            inner.received_epoch = state.checkpoint.epoch;
        }
        inner.state = state.clone();
        let oldest = inner.state.oldest_batch;
        inner.batches.retain(|number, _| oldest != 0 && *number >= oldest);
        inner.merged.retain(|node| oldest != 0 && node.first >= oldest);
        inner.hopeless.retain(|node| oldest != 0 && node.first >= oldest);
        let start = inner.state.history_start.lsn;
        inner.events.forget_before(start);
        drop(inner);
        let mut open = self.open_indexes.lock().expect("nothing panics while it holds the open indexes");
        open.forget_below(oldest);
        drop(open);
        let mut open = self.open_segments.lock().expect("nothing panics while it holds the open segments");
        open.retain(|(number, _)| *number >= oldest);
    }

    /// The state as it is durable.
    pub fn state(&self) -> GroupState {
        self.lock().state.clone()
    }

    /// Group's id.
    pub fn group(&self) -> GroupId {
        self.lock().state.group
    }

    /// Line of descent.
    pub fn lineage(&self) -> Lineage {
        self.lock().state.lineage
    }

    /// Newest record received.
    pub fn received(&self) -> Moment {
        self.lock().received
    }

    /// Bytes of undo kept.
    pub fn undo_bytes(&self) -> u64 {
        self.lock().batches.values().filter_map(|slot| slot.kept().map(|summary| summary.bytes)).sum()
    }

    /// What retention needs: batches that are applied, oldest first, the newest receipt, and the newest
    /// boundary that may become the oldest point.
    pub(crate) fn aged(&self) -> (Vec<Aged>, u64, u64) {
        let inner = self.lock();
        let applied = inner.state.applied_batch;
        let may_begin = inner.may_begin();
        let batches = inner.batches.range(..=applied).map(|(number, slot)| match slot {
            Slot::Kept(summary) => Aged {
                number: *number,
                last_lsn: summary.last.lsn,
                received_ns: summary.received_ns,
                undo_bytes: summary.bytes.max(MIN_BATCH_BYTES),
                may_begin: may_begin.binary_search(number).is_ok(),
            },
            // Damaged undo ages like its neighbours: as soon as they may go.
            Slot::Damaged(_) => {
                Aged { number: *number, last_lsn: Lsn::ZERO, received_ns: 0, undo_bytes: 0, may_begin: false }
            }
        });
        let pinned = inner.pins.values().copied().min().unwrap_or(u64::MAX);
        // What a rewind that is ordered is derived from stays until it is carried out.
        let back = inner.state.wishes.intent.as_ref().and_then(|intent| intent.back);
        let floor = pinned
            .min(inner.state.consistent_batch)
            .min(applied)
            .min(back.map_or(u64::MAX, |back| back.boundary));
        (batches.collect(), inner.newest_receipt_ns, floor)
    }

    /// The boundary of a batch that is applied, if it is known.
    pub(crate) fn boundary(&self, number: u64) -> Option<Moment> {
        self.lock().boundary(number)
    }

    /// The lsn up to which redo may be dropped: at or below the oldest boundary, and applied.
    pub fn redo_floor(&self) -> Lsn {
        let inner = self.lock();
        if inner.state.oldest_batch == 0 {
            return inner.state.checkpoint.lsn;
        }
        inner.state.exact_start().start.lsn.min(inner.state.checkpoint.lsn)
    }

    /// Pins the boundary `number`.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where it is gone already.
    pub fn pin(self: &Arc<Self>, number: u64) -> Result<Pin> {
        self.pin_with(number, false)
    }

    /// Pins what a point needs: its boundary, and the redo from there on if there is any.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where some of it is gone already.
    pub fn pin_point(self: &Arc<Self>, point: &Point) -> Result<Pin> {
        self.pin_with(point.boundary, point.boundary_lsn < point.moment.lsn)
    }

    fn pin_with(self: &Arc<Self>, number: u64, needs_redo: bool) -> Result<Pin> {
        let _shape = self.shape.lock().expect("nothing panics while it holds the shape");
        let mut inner = self.lock();
        let oldest = inner.state.oldest_batch.max(inner.leaving);
        let exact = inner.state.exact_start().batch.max(inner.leaving_redo);
        let is_gone =
            number + 1 < oldest || inner.boundary(number).is_none() || (needs_redo && number < exact);
        if inner.state.oldest_batch == 0 || is_gone {
            let at = "the point has just left the history; ask for a newer one";
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        let id = inner.next_pin;
        inner.next_pin += 1;
        inner.pins.insert(id, number);
        Ok(Pin { history: Arc::clone(self), id })
    }

    /// ⚠ Before batches below `keep_from` are dropped: looks at the pins again, and gives out none below from
    /// here on, all under one lock. Returns the batch to keep from, which a pin may have lowered.
    /// [`History::end_drop`] must follow.
    pub(crate) fn reserve_drop(&self, keep_from: u64) -> u64 {
        let mut inner = self.lock();
        let pinned = inner.pins.values().copied().min().unwrap_or(u64::MAX);
        let most = keep_from.min(pinned.saturating_add(1));
        let allowed = inner.may_begin().into_iter().rfind(|number| *number < most);
        inner.leaving = allowed.map_or(inner.state.oldest_batch, |number| number + 1);
        inner.leaving
    }

    /// The drop is durable in the state, or did not happen.
    pub(crate) fn end_drop(&self) {
        let mut inner = self.lock();
        (inner.leaving, inner.leaving_redo) = (0, 0);
    }

    /// Newest batch whose undo is registered; the batch being applied right now is one.
    pub(crate) fn newest_registered(&self) -> u64 {
        let inner = self.lock();
        inner.batches.keys().next_back().copied().unwrap_or(0).max(inner.state.applied_batch)
    }

    /// A batch's undo segment, opened if need be.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it is missing or damaged.
    pub(crate) fn segment(&self, number: u64) -> Result<Arc<UndoSegment>> {
        let poisoned = "nothing panics while it holds the open segments";
        {
            let mut open = self.open_segments.lock().expect(poisoned);
            let nonce = self.lock().batches.get(&number).and_then(Slot::kept).map(|kept| kept.nonce);
            let is_it =
                |known: &u64, segment: &UndoSegment| *known == number && Some(segment.nonce()) == nonce;
            if let Some(at) = open.iter().position(|(known, segment)| is_it(known, segment)) {
                let entry = open.remove(at).expect("just found");
                let segment = Arc::clone(&entry.1);
                open.push_back(entry);
                return Ok(segment);
            }
        }
        let slot = self.lock().batches.get(&number).cloned();
        let summary = match slot {
            Some(Slot::Kept(summary)) => summary,
            Some(Slot::Damaged(at)) => return Err(Error::corrupt(at)),
            None => return Err(Error::corrupt(format!("undo of batch {number} is not held"))),
        };
        let segment = Arc::new(UndoSegment::open(&*self.disk, &summary)?);
        let mut open = self.open_segments.lock().expect(poisoned);
        open.push_back((number, Arc::clone(&segment)));
        let held = |open: &VecDeque<(u64, Arc<UndoSegment>)>| -> u64 {
            open.iter().map(|(_, segment)| segment.index_bytes()).sum()
        };
        while open.len() > 1 && (open.len() > MAX_OPEN_SEGMENTS || held(&open) > MAX_OPEN_BYTES) {
            open.pop_front();
        }
        Ok(segment)
    }

    /// Opens a replica for reading.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where the group has no replica of that volume, [`ErrorKind::ReplicaFailed`]
    /// where it cannot be opened.
    pub(crate) fn replica(&self, volume: VolumeId) -> Result<(PathBuf, Arc<dyn File>)> {
        let inner = self.lock();
        let Some(known) = inner.state.replicas.iter().find(|replica| replica.id == volume) else {
            let at = format!("group {} has no replica of volume {volume}", inner.state.name);
            return Err(Error::new(ErrorKind::NotPossible, at));
        };
        let known = known.clone();
        let path = replica_path(&self.group_dir, &known.path);
        drop(inner);
        let file = self
            .disk
            .open_read(&path)
            .map_err(|e| Error::replica(format!("open replica {}", path.display()), e))?;
        self.prove(&known, &path, &*file)?;
        Ok((path, file))
    }

    /// A reader of the group's journal.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Io`].
    pub(crate) fn reader(&self) -> Result<Reader> {
        Reader::open(Arc::clone(&self.disk), &journal_dir(&self.group_dir)).map_err(damage)
    }
}

impl Slot {
    pub(crate) fn kept(&self) -> Option<&UndoSummary> {
        match self {
            Slot::Kept(summary) => Some(summary),
            Slot::Damaged(_) => None,
        }
    }

    fn received_ns(&self) -> Option<u64> {
        self.kept().map(|summary| summary.received_ns)
    }
}

impl Inner {
    pub(crate) fn boundary(&self, number: u64) -> Option<Moment> {
        if number == self.state.applied_batch {
            return Some(self.state.checkpoint_moment());
        }
        if number + 1 == self.state.oldest_batch {
            return Some(self.state.history_start);
        }
        self.batches.get(&number).and_then(Slot::kept).map(|summary| summary.last)
    }

    /// The applied boundary at or below an lsn, within the history, that the least has to be replayed from;
    /// of several the newest. One that damage separates from the replica only where there is no other.
    pub(crate) fn boundary_below(&self, lsn: Lsn) -> Option<u64> {
        let (oldest, applied) = (self.state.oldest_batch.checked_sub(1)?, self.state.applied_batch);
        // Below the exact window there is no redo: a boundary is a point, and leads to no other. Neither does
        // one from before a rewind to where the window begins now, though it lies above: thinning merges such
        // batches.
        let exact = self.state.exact_start();
        let leads = |number: u64, last: Lsn| number >= exact.batch && exact.start.lsn <= last && last <= lsn;
        let damaged = self.batches.range(..=applied).rev().find(|(_, slot)| slot.kept().is_none());
        let reached_from = damaged.map_or(0, |(number, _)| *number);
        let kept =
            self.batches.range(..applied).filter_map(|(number, slot)| Some((*number, slot.kept()?.last.lsn)));
        let ends = [(oldest, self.state.history_start.lsn), (applied, self.state.checkpoint.lsn)];
        kept.chain(ends)
            .filter(|(number, last)| *last == lsn || leads(*number, *last))
            .max_by_key(|(number, last)| (*number >= reached_from, *last, *number))
            .map(|(number, _)| number)
    }

    /// Batches whose boundary may become the oldest point, in rising order: no later boundary lies below it,
    /// and no hold. What a rewind took back goes with the rewind, not before it.
    fn may_begin(&self) -> Vec<u64> {
        let applied = self.state.applied_batch;
        let held = self.state.wishes.holds.iter().map(|hold| hold.at.lsn).min();
        let mut lowest = held.unwrap_or(Lsn(u64::MAX)).min(self.state.checkpoint.lsn);
        let kept = self.batches.range(..=applied).rev();
        let mut allowed: Vec<u64> = kept
            .filter_map(|(number, slot)| {
                let last = slot.kept()?.last.lsn;
                let may = last <= lowest;
                lowest = lowest.min(last);
                may.then_some(*number)
            })
            .collect();
        allowed.reverse();
        allowed
    }

    /// Whether a frame is the next to be noted. Behind damage only the one that follows what was applied
    /// meanwhile is.
    fn awaits(&self, header: &FrameHeader) -> bool {
        let known = self.received.lsn;
        header.last_lsn > known && (self.damage.is_none() || header.first_lsn <= known.next())
    }

    fn check_room(&self, events: &[Event]) -> Result<()> {
        let wanted = events.iter().filter(|event| is_structural(event)).count();
        if wanted == 0 || self.events.has_room(wanted) {
            return Ok(());
        }
        let at = format!(
            "lsn {}: more than {MAX_STRUCTURAL} changes of volumes and resyncs in the history: apply waits until older ones \
             have left it",
            events[0].at.lsn
        );
        Err(Error::new(ErrorKind::NotPossible, at))
    }
}

/// A journal reader whose next frame holds the first record behind `after`, or is the oldest for `None`; no
/// reader where nothing that can be read lies behind it. Whoever knows that something must asks why.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where that record is older than what the journal holds: it was dropped too early.
pub(crate) fn read_behind(disk: &Arc<dyn Disk>, dir: &Path, after: Option<Lsn>) -> Result<Option<Reader>> {
    let mut reader = Reader::open(Arc::clone(disk), dir).map_err(damage)?;
    let Some(after) = after else { return Ok(Some(reader)) };
    match reader.seek_lsn(after.next()) {
        Ok(()) => Ok(Some(reader)),
        Err(e) if e.kind == journal::ErrorKind::NotHeld && reader.oldest().lsn <= after => Ok(None),
        Err(e) if e.kind == journal::ErrorKind::NotHeld => Err(Error::corrupt(e.at)),
        Err(e) => Err(damage(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Exact;
    use journal::sim_disk::SimDisk;

    #[test]
    fn a_pin_taken_before_the_reservation_keeps_its_boundary_and_none_is_given_below_after_it() {
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
        let dir = Path::new("/r/groups/g");
        let mut state = GroupState::new(GroupId([1; 16]), "g", [1; 32], Lineage([2; 16]));
        (state.applied_batch, state.oldest_batch) = (9, 1);
        GroupStore::create(Arc::clone(&disk), dir, state).unwrap();
        let history = History::open(disk, dir).unwrap();
        for number in 1..10 {
            let at = Moment { lsn: Lsn(10 * number), time_ns: 0 };
            let (path, epoch) = (PathBuf::new(), Epoch::default());
            history.register(UndoSummary {
                number,
                from: number,
                epoch,
                first: at,
                last: at,
                received_ns: 0,
                bytes: 0,
                path,
                nonce: 0,
            });
        }
        history.lock().state.checkpoint.lsn = Lsn(90);
        let refused = |number: u64| history.pin(number).err().map(|error| error.kind);
        let pin = history.pin(3).unwrap();
        assert_eq!(history.reserve_drop(7), 4, "as far as the pin allows");
        assert_eq!(refused(2), Some(ErrorKind::NotPossible), "about to go");
        assert_eq!(refused(3), None);
        history.end_drop();
        assert_eq!(refused(2), None, "nothing was dropped");
        drop(pin);
        assert_eq!(history.reserve_drop(7), 7);
        history.end_drop();

        // After a rewind from batch 9 to lsn 40 what it took back goes with it.
        {
            let mut inner = history.lock();
            (inner.state.applied_batch, inner.state.checkpoint.lsn) = (10, Lsn(40));
        }
        assert_eq!(history.reserve_drop(7), 5, "boundaries 5 and 6 lie above it");
        assert_eq!(history.boundary_at(Lsn(40)), Some(10), "nothing has to be undone");
        assert_eq!(history.boundary_at(Lsn(55)), Some(5), "the least to be replayed");
        assert_eq!(history.boundary_at(Lsn(35)), Some(3));

        // Where the exact window begins with the rewind, what it took back is a point at most.
        history.lock().state.exact = Some(Exact { batch: 10, start: Moment { lsn: Lsn(40), time_ns: 0 } });
        assert_eq!(history.boundary_at(Lsn(55)), Some(10), "redo leads there from the rewind's own boundary");
        assert_eq!(history.boundary_at(Lsn(50)), Some(5));
        assert_eq!(history.boundary_at(Lsn(35)), None);
    }

    impl History {
        fn boundary_at(&self, lsn: Lsn) -> Option<u64> {
            self.lock().boundary_below(lsn)
        }
    }
}
