//! Ring → frames → source journal: one thread that owns the consumer, the pool and the writer.
//!
//! ```text
//!  ring ── peek ──► batch ── submit ──► pool (zstd, CRC) ── recv, in order ──► seal (chain) ──► append ──► release
//! ```
//!
//! Invariants
//! * Frames are appended in ring order; ring room is released only for records that are appended *and* done.
//! * Records at or below the journal's position (left by a dead owner between append and release) are not journaled
//!   twice.
//! * What cannot be journaled (quota, full or failing disk) is never dropped silently: the ring goes to the dirty
//!   map, the gap is remembered durably *before* the room of a record that is in no journal is given back, and the
//!   clients go on.
//! * No fdatasync stands in the way of a live batch: the source journal is a buffer, the source disk is the truth.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use journal::compress::Compression;
use journal::frame::{Batch, EncodedFrame, FrameHeader, Stamp};
use journal::pool::EncodePool;
use journal::record::{Op, Record};
use journal::retention::SourcePolicy;
use journal::writer::Writer;
use journal::{Extent, Lsn, Position, VolumeId, record};
use kfilter::{Consumer, Mapping, Mode, RecordRef};

use crate::SharedRing;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::state::{Gap, StateFile};
use crate::status::{Board, State};

/// Raw bytes in the pool at most: four of the largest batches keep every compression thread busy.
const POOL_BYTES: usize = 4 << 20;
/// Sleep when there is nothing to do; also bounds how late an overflow shows in status.
const IDLE: Duration = Duration::from_millis(50);
/// How long an offline synchronisation waits for acknowledgements that would make room. Clients wait behind it, so it ends.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a stop waits for backing writes that hang.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
/// Sleep while records wait for their backing write before their room can be released.
const NOT_DONE: Duration = Duration::from_millis(1);

/// How frames are made.
#[derive(Clone, Copy, Debug)]
pub struct BatchSettings {
    /// Level while the ring is calm.
    pub compression: Compression,
    /// Go to faster levels as the ring fills.
    pub adaptive: bool,
    /// A batch is closed at this many raw bytes.
    pub max_bytes: usize,
    /// A batch is closed at this age.
    pub max_delay: Duration,
    /// Bytes on disk.
    pub quota_bytes: u64,
    /// Threads that compress.
    pub threads: usize,
}

/// What the pipeline shares with the rest of the agent.
#[derive(Clone)]
pub struct Shared {
    /// The group's ring.
    pub ring: Arc<SharedRing>,
    /// Positions.
    pub progress: Arc<Progress>,
    /// States.
    pub board: Arc<Board>,
    /// Durable state.
    pub state: Arc<Mutex<StateFile>>,
    /// Why the running synchronisation runs; becomes the text of its `resync-begin`.
    pub sync_cause: Arc<Mutex<String>>,
    /// Set while the offline synchronisation is the only producer: then a full quota waits instead of degrading.
    pub may_wait: Arc<AtomicBool>,
    /// Set for good when nothing more is journaled in this run.
    pub broken: Arc<AtomicBool>,
    /// Ends the pipeline once the ring is drained.
    pub stop: Arc<AtomicBool>,
    /// Bytes of the journal on disk, for status.
    pub journal_bytes: Arc<std::sync::atomic::AtomicU64>,
}

/// The pipeline's own state.
pub struct Pipeline {
    shared: Shared,
    consumer: Consumer<Mapping, Arc<SharedRing>>,
    /// Gone once nothing more is journaled in this run.
    writer: Option<Writer>,
    pool: EncodePool,
    settings: BatchSettings,
    stamp: Stamp,
    batch: Batch,
    opened: Option<Instant>,
    /// Where the journal stands.
    journaled: Position,
    /// Newest lsn whose room may be released: journaled, or given up.
    releasable: Lsn,
}

impl Pipeline {
    /// Takes over ring and journal. `writer` stands in the epoch of `stamp`; `None` where no journal can be had: then
    /// the ring is in bitmap mode and everything is given up from the start.
    ///
    /// # Errors
    /// The ring has a consumer already, or threads cannot be started.
    pub fn new(
        shared: Shared,
        writer: Option<Writer>,
        stamp: Stamp,
        settings: BatchSettings,
    ) -> Result<Pipeline> {
        let consumer = Consumer::new(shared.ring.clone())
            .map_err(|_| Error::new(ErrorKind::Busy, "the ring already has a consumer in this process"))?;
        let mut pool = EncodePool::new("af-pack", settings.threads, POOL_BYTES)?;
        let batch = pool.batch();
        let journaled = shared.progress.position();
        let releasable = journaled.lsn;
        let pipeline = Pipeline {
            shared,
            consumer,
            writer,
            pool,
            settings,
            stamp,
            batch,
            opened: None,
            journaled,
            releasable,
        };
        pipeline.publish_size();
        Ok(pipeline)
    }

    /// Whether nothing is journaled any more.
    fn is_broken(&self) -> bool {
        self.writer.is_none()
    }

    /// Runs until `stop` is set and everything captured is journaled and synced. Returns the last position and whether
    /// the run was unbroken.
    ///
    /// # Errors
    /// The ring's memory was overwritten, or the state file cannot be written.
    pub fn run(mut self) -> Result<(Position, bool)> {
        let mut stop_since = None;
        loop {
            let took = self.gather()?;
            self.commit_ready()?;
            let aged = self.opened.is_some_and(|opened| opened.elapsed() >= self.settings.max_delay);
            let stopping = self.shared.stop.load(Ordering::Acquire);
            if self.batch.records() > 0 && (aged || stopping) {
                self.close_batch()?;
            }
            let held = self.release()?;
            if took {
                continue;
            }
            if self.pool.in_flight() > 0 {
                self.commit_next()?;
                continue;
            }
            if stopping && self.batch.records() == 0 {
                if !held {
                    break;
                }
                if stop_since.get_or_insert_with(Instant::now).elapsed() > STOP_DEADLINE {
                    // The ring stays, and the next owner redoes what hangs now.
                    tracing::warn!("writes to the backing hang; stopping without them");
                    return Ok((self.journaled, false));
                }
            }
            let pause = match self.opened {
                Some(opened) => self.settings.max_delay.saturating_sub(opened.elapsed()),
                None => IDLE,
            };
            self.consumer.wait(if held { pause.min(NOT_DONE) } else { pause });
        }
        Ok((self.journaled, !self.is_broken() && self.shared.ring.mode() == Mode::Ring))
    }

    /// Moves what is published into batches; true when there was anything. Returns after a bounded amount, so that
    /// finished frames do not wait.
    fn gather(&mut self) -> Result<bool> {
        let mut gathered = 0;
        while gathered < self.settings.max_bytes {
            let Some(record) = self.consumer.peek().map_err(ring_lost)? else { break };
            let bytes = record::HEADER_BYTES + record.payload().len();
            gathered += bytes;
            if self.is_broken() {
                // Covered by the gap that `give_up` remembered.
                self.releasable = Lsn(record.lsn());
                self.consumer.advance().map_err(ring_lost)?;
                continue;
            }
            if record.lsn() > self.journaled.lsn.0 {
                if self.batch.raw().len() + bytes > self.settings.max_bytes && self.batch.records() > 0 {
                    if !self.submit()? {
                        return Ok(true);
                    }
                    continue;
                }
                push(&mut self.batch, &record, &self.shared.sync_cause);
                self.opened.get_or_insert_with(Instant::now);
            }
            self.consumer.advance().map_err(ring_lost)?;
        }
        Ok(gathered > 0)
    }

    /// Hands the open batch to the pool; false when the pool is full (then a frame is committed instead).
    fn submit(&mut self) -> Result<bool> {
        if self.pool.is_full(self.batch.raw().len()) {
            self.commit_next()?;
            return Ok(false);
        }
        let next = self.pool.batch();
        let batch = std::mem::replace(&mut self.batch, next);
        let compression = self.compression();
        self.pool.submit(batch, self.stamp, compression).expect("a pool that is not full takes a batch");
        self.opened = None;
        Ok(true)
    }

    fn close_batch(&mut self) -> Result<()> {
        while !self.is_broken() && !self.submit()? {}
        Ok(())
    }

    /// As the ring fills: from 25 % on −5, from 50 % on raw; from 75 % on clients are paced (`capture/pace`).
    fn compression(&self) -> Compression {
        let fill = self.shared.ring.fill_ratio();
        match self.settings.compression {
            Compression::Zstd(_) if self.settings.adaptive && fill >= 0.5 => Compression::Off,
            Compression::Zstd(level) if self.settings.adaptive && fill >= 0.25 => {
                Compression::Zstd(level.min(-5))
            }
            calm => calm,
        }
    }

    fn commit_ready(&mut self) -> Result<()> {
        while let Some(frame) = self.pool.try_recv() {
            self.commit(frame?)?;
        }
        Ok(())
    }

    fn commit_next(&mut self) -> Result<()> {
        match self.pool.recv() {
            Some(frame) => self.commit(frame?),
            None => Ok(()),
        }
    }

    /// Seals a frame onto the chain and appends it.
    fn commit(&mut self, frame: EncodedFrame) -> Result<()> {
        if self.is_broken() {
            return Ok(());
        }
        let (bytes, _) = frame.seal(self.journaled.chain);
        let header = FrameHeader::parse(&bytes)?;
        if !self.make_room(bytes.len() as u64)? {
            let quota = conf::units::format_bytes(self.settings.quota_bytes);
            let why = format!(
                "the source journal's quota of {quota} is used up by frames the receiver has not acknowledged"
            );
            return self.give_up(&why);
        }
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let mut appended = writer.append(&bytes, &header, now_ns());
        if matches!(&appended, Err(error) if error.kind == journal::ErrorKind::NoSpace) {
            // Acknowledged segments stay only as long as their space is not needed.
            let acknowledged = acknowledged(&self.shared.progress, &self.stamp);
            let keep_from = SourcePolicy { quota_bytes: 0 }.keep_from(writer.segments(), &acknowledged);
            if let Some(keep_from) = keep_from {
                appended =
                    writer.drop_before(keep_from).and_then(|_| writer.append(&bytes, &header, now_ns()));
            }
        }
        match appended {
            Ok(()) => {
                self.journaled = header.position();
                self.releasable = header.last_lsn;
                self.shared.progress.journaled(header.position(), header.first_time_ns, bytes.len() as u64);
                self.pool.recycle(bytes);
                self.publish_size();
                Ok(())
            }
            Err(error) => self.break_off("the source journal cannot be written", &error),
        }
    }

    /// Keeps the journal within its quota by dropping acknowledged segments, oldest first; false when that is not
    /// enough. An offline synchronisation waits a while for acknowledgements, then drops what older epochs hold: a
    /// receiver may start at this one, which has everything.
    fn make_room(&mut self, bytes: u64) -> Result<bool> {
        let mut waited = (Instant::now(), self.shared.progress.peer().received);
        loop {
            let Some(writer) = &mut self.writer else { return Ok(false) };
            let over = |writer: &Writer| writer.journal_bytes() + bytes > self.settings.quota_bytes;
            if !over(writer) {
                return Ok(true);
            }
            let policy = SourcePolicy { quota_bytes: self.settings.quota_bytes.saturating_sub(bytes) };
            let acknowledged = acknowledged(&self.shared.progress, &self.stamp);
            let mut keep_from = policy.keep_from(writer.segments(), &acknowledged);
            let waits =
                self.shared.may_wait.load(Ordering::Acquire) && !self.shared.stop.load(Ordering::Acquire);
            let impatient = waited.0.elapsed() > PATIENCE;
            if keep_from.is_none() && waits && impatient {
                let segments = writer.segments();
                let first = segments.iter().find(|segment| segment.epoch.number == self.stamp.epoch.number);
                keep_from = first.map(|first| first.number).filter(|number| *number > segments[0].number);
            }
            if let Some(keep_from) = keep_from {
                if let Err(error) = writer.drop_before(keep_from) {
                    self.break_off("old segments of the source journal cannot be dropped", &error)?;
                    return Ok(false);
                }
                continue;
            }
            if !waits || impatient {
                return Ok(false);
            }
            std::thread::sleep(IDLE);
            let received = self.shared.progress.peer().received;
            if received != waited.1 {
                waited = (Instant::now(), received);
            }
        }
    }

    fn break_off(&mut self, what: &str, error: &journal::Error) -> Result<()> {
        let cause = match &error.source {
            Some(source) => format!("{what}: {error}: {source}"),
            None => format!("{what}: {error}"),
        };
        self.give_up(&cause)
    }

    /// Journaling ends for this run. Order: 1 the ring takes no more records, 2 every volume is dirty in the ring's
    /// mapping (which outlives us) and the gap is durable (which outlives the machine), and only then 3 the room of
    /// records that no journal holds is given back (by `gather`).
    fn give_up(&mut self, cause: &str) -> Result<()> {
        if self.is_broken() {
            return Ok(());
        }
        self.shared.ring.set_mode_bitmap(kfilter::dirty::CAUSE_QUOTA, now_ns());
        let mut file = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        for volume in file.get().volumes.iter().filter(|volume| volume.present) {
            self.shared.ring.mark_dirty(volume.id.0, 0..volume.size_bytes);
        }
        let gap = Gap { cause: cause.to_owned(), since_ns: now_ns() };
        if let Err(error) = file.update(|state| state.needs_resync = Some(gap)) {
            // The dirty map says the same to the next owner on this boot, and an unclean start after a reboot.
            tracing::error!(%error, "the gap cannot be remembered in the state file");
        }
        drop(file);
        let why = format!("{cause}; writes are no longer recorded, restart the agent to synchronise");
        self.shared.board.change(State::Degraded, why);
        self.writer = None;
        self.shared.broken.store(true, Ordering::Release);
        self.batch.clear();
        self.opened = None;
        while self.pool.recv().is_some() {}
        Ok(())
    }

    /// Gives room back; true when some of it waits for a backing write.
    fn release(&mut self) -> Result<bool> {
        let first_held = self.consumer.release(self.releasable.0).map_err(ring_lost)?;
        Ok(first_held <= self.releasable.0)
    }

    fn publish_size(&self) {
        if let Some(writer) = &self.writer {
            self.shared.journal_bytes.store(writer.journal_bytes(), Ordering::Relaxed);
        }
    }
}

/// Up to where segments may go, as retention reads it.
fn acknowledged(progress: &Progress, stamp: &Stamp) -> Position {
    let (number, lsn) = progress.droppable();
    let epoch = journal::Epoch { number, ..stamp.epoch };
    Position { lineage: stamp.lineage, epoch, lsn, chain: 0 }
}

fn ring_lost(malformed: kfilter::consumer::Malformed) -> Error {
    let at = format!("the ring's memory was overwritten at position {}", malformed.position);
    Error::new(ErrorKind::Ring, at)
}

/// One ring record as a journal record. The numbers of the ops are the same on purpose.
fn push(batch: &mut Batch, from: &RecordRef<'_>, sync_cause: &Mutex<String>) {
    let op = Op::from_u8(from.op() as u8).expect("the ring shows only ops that the journal knows");
    let record = Record {
        op,
        flags: from.flags(),
        volume: VolumeId(from.volume()),
        lsn: Lsn(from.lsn()),
        time_ns: from.time_ns(),
        extent: if op == Op::Void {
            Extent::default()
        } else {
            Extent { offset: from.offset(), len: from.length() }
        },
    };
    if op == Op::ResyncBegin {
        let cause = sync_cause.lock().unwrap_or_else(PoisonError::into_inner);
        let mut end = cause.len().min(record::MAX_PAYLOAD_BYTES);
        while !cause.is_char_boundary(end) {
            end -= 1;
        }
        batch.push(&record, &cause.as_bytes()[..end]);
    } else {
        batch.push(&record, from.payload());
    }
}
