//! Ring → frames → source journal: one thread that owns the consumer, the pool and the writer.
//!
//! ```text
//!  ring ── peek ──► batch ── submit ──► pool (zstd, CRC) ── recv, in order ──► seal (chain) ──► append ──► release
//! ```
//!
//! Invariants
//! * Frames are appended in ring order; ring room is released only for records that are appended *and* done.
//! * Records at or below the journal's position (left by a dead owner between append and release) are not
//!   journaled twice.
//! * What cannot be journaled is never dropped silently: before the room of a record that is in no journal is
//!   given back, its range is dirty in the ring, and that is remembered durably (`shortage`). The clients go
//!   on.
//! * No fdatasync stands in the way of a live batch: the source journal is a buffer, the source disk is the
//!   truth.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use journal::compress::Compression;
use journal::frame::{Batch, EncodedFrame, FrameHeader, Stamp};
use journal::pool::EncodePool;
use journal::record::{InDoubt, Record};
use journal::retention::SourcePolicy;
use journal::tail::Tail;
use journal::writer::Writer;
use journal::{Extent, Lsn, Position};
use kfilter::Mode;
use machine::Mutex;

use crate::agent::Agent;
use crate::capture::ring::ring_lost;
use crate::capture::{Ring, Tap};
use crate::clock::now_ns;
use crate::error::Result;
use crate::progress::Progress;
use crate::resync::map::SharedMap;
use crate::skipped::Skipped;
use crate::state::{Remembered, StateFile};
use crate::status::Board;

mod epoch;
mod health;
mod records;
mod shortage;

pub use health::Health;
use records::Translator;
use shortage::Shortage;

/// Raw bytes in the pool at most: four of the largest batches keep every compression thread busy.
const POOL_BYTES: usize = 4 << 20;
/// Sleep when there is nothing to do; also bounds how late an overflow shows in status.
const IDLE: Duration = Duration::from_millis(50);
/// How long a stop waits for backing writes that hang.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
/// How often the ring is looked at while a batch gathers. Its frame waits for `max_delay` anyway, and nobody
/// has to ring a bell for each write meanwhile: in a kernel that bell is the writer's own time …
const GATHER: Duration = Duration::from_millis(10);
/// … and how often while the ring is fuller than this.
const GATHER_BUSY: Duration = Duration::from_millis(1);
const BUSY: f64 = 1.0 / 32.0;
/// From this fill of the ring on what counts is how much is compressed a second; below it, that nobody waits
/// for a core: frames are as long as their settings allow, or as short as this, a millisecond of compressing
/// (decision 0023).
const HASTE: f64 = 0.25;
const EASY_FRAME_BYTES: usize = 256 << 10;
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
    pub ring: Arc<Ring>,
    /// Positions.
    pub progress: Arc<Progress>,
    /// States.
    pub board: Arc<Board>,
    /// Durable state, to change it.
    pub state: Arc<Mutex<StateFile>>,
    /// The same, to read it: no disk is waited for.
    pub remembered: Remembered,
    /// Why the running synchronisation runs; becomes the text of its `resync-begin`.
    pub sync_cause: Arc<Mutex<String>>,
    /// What a synchronisation hands over.
    pub map: Arc<SharedMap>,
    /// Whether frames are appended.
    pub health: Arc<Health>,
    /// Ends the pipeline once the ring is drained.
    pub stop: Arc<AtomicBool>,
    /// Bytes of the journal on disk, for status.
    pub journal_bytes: Arc<std::sync::atomic::AtomicU64>,
    /// How far the journal may be read; none while there is no journal.
    pub tail: Arc<Mutex<Option<Arc<Tail>>>>,
    /// Histories do not join: what is under way is of no use, until a new epoch has begun.
    pub apart: Arc<AtomicBool>,
    /// What was not sent because a file system called it free.
    pub(crate) skipped: Arc<Skipped>,
    /// The synchronisation wants a new epoch; withdrawn by the pipeline when it has begun, or cannot begin
    /// now.
    pub epoch_due: Arc<AtomicBool>,
}

impl Shared {
    /// A `resync-begin`, with since when disks are in doubt.
    fn begin(&self, record: Record) -> Record {
        let in_doubt = self.remembered.get().unproven_since;
        let extent = in_doubt.map_or(Extent::default(), InDoubt::extent);
        Record { extent, ..record }
    }

    /// Whether what is captured now reaches the replica in this epoch.
    pub(crate) fn goes_on(&self) -> bool {
        self.health.is_good() && !self.apart.load(Ordering::Acquire)
    }

    /// Tells readers of the journal that now is.
    pub(crate) fn set_tail(&self, writer: Option<&Writer>) {
        *self.tail.lock().unwrap_or_else(PoisonError::into_inner) = writer.map(Writer::shared);
    }
}

/// The pipeline's own state.
pub struct Pipeline {
    shared: Shared,
    tap: Tap,
    translator: Translator,
    /// Gone once nothing more is journaled in this run.
    writer: Option<Writer>,
    /// While there is no room for frames.
    shortage: Option<Shortage>,
    /// A new epoch is on its way: what is captured before it is given up.
    apart: bool,
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
    /// Takes over ring and journal. `writer` stands in the epoch of `stamp`; `None` where no journal can be
    /// had: then the ring is in bitmap mode and everything is given up from the start.
    ///
    /// # Errors
    /// The ring has a consumer already, or threads cannot be started.
    pub fn new(
        shared: Shared,
        writer: Option<Writer>,
        stamp: Stamp,
        settings: BatchSettings,
    ) -> Result<Pipeline> {
        let tap = shared.ring.tap()?;
        let mut pool = EncodePool::new("af-pack", settings.threads, POOL_BYTES)?;
        let batch = pool.batch();
        let journaled = shared.progress.position();
        let mut pipeline = Pipeline {
            translator: Translator::new(shared.clone()),
            shared,
            tap,
            writer,
            shortage: None,
            apart: false,
            pool,
            settings,
            stamp,
            batch,
            opened: None,
            journaled,
            releasable: journaled.lsn,
        };
        pipeline.take_over_shortage()?;
        pipeline.publish_size();
        Ok(pipeline)
    }

    /// Whether nothing is journaled any more.
    fn is_broken(&self) -> bool {
        self.writer.is_none()
    }

    /// Whether what is captured becomes dirty bits.
    fn gives_up(&self) -> bool {
        self.is_broken() || self.apart || self.shortage.is_some()
    }

    /// Runs until `stop` is set and everything captured is journaled and synced. Returns the last position
    /// and whether the run was unbroken.
    ///
    /// # Errors
    /// The ring's memory was overwritten, or the state file cannot be written.
    pub(crate) fn run(mut self, agent: &Agent) -> Result<(Position, bool)> {
        let mut stop_since = None;
        loop {
            let took = self.gather()?;
            self.commit_ready()?;
            let aged = self.opened.is_some_and(|opened| machine::since(opened) >= self.settings.max_delay);
            let stopping = self.shared.stop.load(Ordering::Acquire);
            if self.batch.records() > 0 && (aged || stopping) {
                self.close_batch()?;
            }
            let held = self.release()?;
            if self.shared.epoch_due.load(Ordering::Acquire) && !stopping {
                self.turn(agent)?;
            }
            if took {
                continue;
            }
            self.mend_shortage()?;
            if self.pool.in_flight() > 0 {
                self.commit_next()?;
                continue;
            }
            if stopping && self.batch.records() == 0 {
                if !held {
                    break;
                }
                if machine::since(*stop_since.get_or_insert_with(machine::now)) > STOP_DEADLINE {
                    // The ring stays, and the next owner redoes what hangs now.
                    tracing::warn!("writes to the backing hang; stopping without them");
                    return Ok((self.journaled, false));
                }
            }
            match self.opened {
                Some(opened) => {
                    let left = self.settings.max_delay.saturating_sub(machine::since(opened));
                    let is_busy = self.shared.ring.fill_ratio() > BUSY;
                    machine::sleep(left.min(if is_busy { GATHER_BUSY } else { GATHER }));
                }
                None => {
                    self.tap.wait(if held { NOT_DONE } else { IDLE });
                }
            }
        }
        Ok((self.journaled, self.shared.health.is_good() && self.shared.ring.mode() == Mode::Ring))
    }

    /// Moves what is published into batches; true when there was anything. Returns after a bounded amount, so
    /// that finished frames do not wait.
    fn gather(&mut self) -> Result<bool> {
        if self.shortage.as_ref().is_some_and(Shortage::keeps_records) {
            return Ok(false);
        }
        let mut gathered = 0;
        while gathered < self.settings.max_bytes {
            let Some(record) = self.tap.peek().map_err(ring_lost)? else { break };
            let bytes = Translator::raw_bytes(&record);
            gathered += bytes;
            if record.lsn() > self.journaled.lsn.0 {
                if self.gives_up() {
                    if record.op() == kfilter::Op::Volume {
                        self.translator.forget(record.volume());
                    }
                    shortage::give_up_record(&self.shared, &mut self.shortage, &record)?;
                    self.releasable = Lsn(record.lsn());
                } else if self.batch.raw().len() + bytes > self.frame_bytes() && self.batch.records() > 0 {
                    if !self.submit()? {
                        return Ok(true);
                    }
                    continue;
                } else {
                    self.translator.push(&mut self.batch, &record)?;
                    self.opened.get_or_insert_with(machine::now);
                }
            }
            self.tap.advance().map_err(ring_lost)?;
        }
        Ok(gathered > 0)
    }

    /// Raw bytes of a frame at most, now: none that keeps a core for long, while the ring is far from full.
    /// Tells the pool.
    fn frame_bytes(&self) -> usize {
        let in_haste = self.shared.ring.fill_ratio() >= HASTE;
        self.pool.set_in_haste(in_haste);
        if in_haste { self.settings.max_bytes } else { self.settings.max_bytes.min(EASY_FRAME_BYTES) }
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
        // A batch that was given up meanwhile is empty.
        while self.batch.records() > 0 && !self.submit()? {}
        Ok(())
    }

    /// As the ring fills: from 25 % on −5, from 50 % on raw; from 75 % on clients are paced (`capture/pace`).
    fn compression(&self) -> Compression {
        let fill = self.shared.ring.fill_ratio();
        match self.settings.compression {
            Compression::Zstd(_) if self.settings.adaptive && fill >= 0.5 => Compression::Off,
            Compression::Zstd(level) if self.settings.adaptive && fill >= HASTE => {
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

    /// Seals a frame onto the chain and appends it; what cannot be appended becomes dirty bits.
    fn commit(&mut self, frame: EncodedFrame) -> Result<()> {
        if self.gives_up() {
            return Ok(());
        }
        match self.append(frame) {
            Appended::Done => Ok(()),
            Appended::NoRoom(why) => self.run_short(&why),
            Appended::Broken(why) => self.give_up(&why),
        }
    }

    fn append(&mut self, frame: EncodedFrame) -> Appended {
        let (bytes, _) = frame.seal(self.journaled.chain);
        let header = match FrameHeader::parse(&bytes) {
            Ok(header) => header,
            Err(error) => return Appended::Broken(format!("a frame of our own cannot be read: {error}")),
        };
        match self.make_room(bytes.len() as u64) {
            Ok(true) => {}
            Ok(false) => {
                let quota = conf::units::format_bytes(self.settings.quota_bytes);
                let why = "is used up by frames the receiver has not acknowledged";
                return Appended::NoRoom(format!("the source journal's quota of {quota} {why}"));
            }
            Err(error) => {
                return Appended::Broken(told(
                    "old segments of the source journal cannot be dropped",
                    &error,
                ));
            }
        }
        let Some(writer) = &mut self.writer else { return Appended::Done };
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
                self.releasable = self.releasable.max(header.last_lsn);
                self.shared.progress.journaled(header.position(), header.first_time_ns, bytes.len() as u64);
                self.pool.recycle(bytes);
                self.publish_size();
                Appended::Done
            }
            Err(error) if error.kind == journal::ErrorKind::NoSpace => {
                Appended::NoRoom(told("there is no room for the source journal", &error))
            }
            Err(error) => Appended::Broken(told("the source journal cannot be written", &error)),
        }
    }

    /// Keeps the journal within its quota by dropping acknowledged segments, oldest first, then what older
    /// epochs hold: a receiver may start at this one, which has everything. False when that is not enough.
    fn make_room(&mut self, bytes: u64) -> journal::Result<bool> {
        loop {
            let Some(writer) = &mut self.writer else { return Ok(false) };
            if writer.journal_bytes() + bytes <= self.settings.quota_bytes {
                return Ok(true);
            }
            let policy = SourcePolicy { quota_bytes: self.settings.quota_bytes.saturating_sub(bytes) };
            let acknowledged = acknowledged(&self.shared.progress, &self.stamp);
            let keep_from = policy.keep_from(writer.segments(), &acknowledged).or_else(|| {
                let segments = writer.segments();
                let first = segments.iter().find(|segment| segment.epoch.number == self.stamp.epoch.number);
                first.map(|first| first.number).filter(|number| *number > segments[0].number)
            });
            let Some(keep_from) = keep_from else { return Ok(false) };
            writer.drop_before(keep_from)?;
        }
    }

    /// Gives room back; true when some of it waits for a backing write.
    fn release(&mut self) -> Result<bool> {
        let first_held = self.tap.release(self.releasable.0)?;
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

/// What became of a frame.
enum Appended {
    /// It is in the journal.
    Done,
    /// There may be room for it later.
    NoRoom(String),
    /// The journal takes nothing more.
    Broken(String),
}

/// An error of the journal and what is behind it.
fn told(what: &str, error: &journal::Error) -> String {
    match &error.source {
        Some(source) => format!("{what}: {error}: {source}"),
        None => format!("{what}: {error}"),
    }
}
