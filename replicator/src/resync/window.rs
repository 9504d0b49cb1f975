//! Copies one window: the dirty ranges of a part of one volume, behind a begin and a barrier of their own.
//!
//! ```text
//!  read ≤ 1 MiB ─► slots ≤ 128 KiB, reserved when the read has finished ─► consumer ─► journal ─► bits cleared
//! ```
//!
//! Invariants: nothing is read before the barrier has passed; the bits of a range are cleared only when every
//! slot of it is in the journal, in whole granules; a window whose slots were lost clears nothing more.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use kfilter::Mode;
use kfilter::abi::GRANULE;

mod differing;
mod verifying;

pub(crate) use verifying::Looked;

use super::map::Content;
use super::pace::{Advice, Pace};
use super::progress::Report;
use crate::agent::Agent;
use crate::allocated;
use crate::capture::disk::Buffer;
use crate::capture::ring::Passed;
use crate::capture::{Refusal, Volume, attach};
use crate::error::{Error, ErrorKind, Result, describe};

/// Read at once.
const CHUNK_BYTES: u64 = 1 << 20;
/// One slot: a record's payload.
const SLOT_BYTES: u64 = kfilter::abi::MAX_PAYLOAD as u64;
/// Slots reserved together.
const SLOTS: usize = 8;
/// How much of a long range is dealt with in one way, copied or compared.
const PART_BYTES: u64 = 1 << 30;
/// Zeros that one slot stands for at most: what falls apart in it is reserved again.
const ZERO_BYTES: u64 = 1 << 30;
/// Handed over and not yet journaled, at most.
const OUTSTANDING_BYTES: u64 = 8 << 20;
/// Reserved ranges not yet journaled, at most.
const OUTSTANDING: usize = 1024;
/// Slots of the last frame, which may wait for more until it is of age.
const LAST_FRAME: u64 = 2;
/// A look at the ring, the journal or the stop to the next.
const LOOK: Duration = Duration::from_millis(5);
/// How long one wait for writes in flight is, before the stop is looked at.
const BARRIER: Duration = Duration::from_millis(250);
/// How long orders wait for a barrier: a detach may be what ends it.
const HELD: Duration = Duration::from_secs(5);
/// How large a mask is at most: DESIGN section 6.
pub const WINDOW_BYTES: u64 = 64 << 30;

/// How a window begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By `resync-begin`.
    Resync,
    /// By a fence, while everything else is recorded.
    Repair,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// All that could be read is in the journal; these ranges could not.
    Done(Vec<Range<u64>>),
    /// Something outside is in the way; in an operator's words.
    Later(String),
    /// Something came in between (an overflow, no room in the journal): what is still dirty is copied from a
    /// new begin.
    Lost,
}

/// What a range waits for.
struct Outstanding {
    range: Range<u64>,
    last_lsn: u64,
    bytes: u64,
}

/// See the module.
pub(crate) struct Copier<'a> {
    agent: &'a Agent,
    volume: &'a Volume,
    pace: &'a mut Pace,
    report: &'a mut Report,
    outstanding: VecDeque<Outstanding>,
    bytes: u64,
    /// The rate holds for what is read to be hashed, too: not in a synchronisation, whose rate is for what is
    /// sent.
    paces_hashes: bool,
    /// Journaled and next to each other, from the last granule on that is not whole yet.
    journaled: Range<u64>,
    /// First byte beyond the volume's bitmap, and what is through there: it counts only next to what is.
    covered: u64,
    beyond: Vec<Range<u64>>,
    unreadable: Vec<Range<u64>>,
}

/// Why the copy of a window stops.
enum Stop {
    Lost,
    Later(String),
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Failed(error)
    }
}

type Copied<T> = std::result::Result<T, Stop>;

/// Waits until what was submitted before the last begin has come back, and drains what has no queue of its
/// own; or in words why that cannot be.
///
/// # Errors
/// The agent stops, or the ring failed.
///
/// ⚠ The kernel takes a drain for one of all devices that it captures. One that an order attaches just now is
/// not on our list yet, and would never be drained: so orders wait from the question to its answer, but not
/// for what hangs.
pub(crate) fn barrier(agent: &Agent) -> Result<std::result::Result<(), String>> {
    let ring = &agent.shared.ring;
    let (mut quiet, mut since) = (None, machine::now());
    let mut drained = false;
    loop {
        match ring.barrier(BARRIER, drained)? {
            Passed::Yes => return Ok(Ok(())),
            Passed::NotYet => {
                agent.halt.check()?;
                if machine::since(since) > HELD {
                    (quiet, drained) = (None, false);
                }
            }
            Passed::MustDrain if quiet.is_none() => {
                // Asked again behind the lock.
                (quiet, since) = (agent.between_orders(), machine::now());
                if quiet.is_none() {
                    agent.halt.check()?;
                    machine::sleep(LOOK);
                }
            }
            Passed::MustDrain => {
                let disks = agent.volumes.iter().filter_map(|volume| volume.disk());
                for disk in disks.filter(|disk| attach::is_device_mapper(disk)) {
                    if let Err(error) = attach::drain(&disk) {
                        return Ok(Err(describe(&error)));
                    }
                }
                drained = true;
            }
        }
    }
}

impl<'a> Copier<'a> {
    /// For one window of a volume.
    pub fn new(
        agent: &'a Agent,
        volume: &'a Volume,
        pace: &'a mut Pace,
        report: &'a mut Report,
    ) -> Copier<'a> {
        Copier {
            agent,
            volume,
            pace,
            report,
            outstanding: VecDeque::new(),
            bytes: 0,
            paces_hashes: false,
            journaled: 0..0,
            covered: agent.shared.ring.covered_bytes(volume.id),
            beyond: Vec::new(),
            unreadable: Vec::new(),
        }
    }

    /// Begins, waits for the barrier, copies what is dirty in the range, and waits until it is journaled.
    ///
    /// # Errors
    /// The agent stops, or the ring failed.
    pub fn run(mut self, range: Range<u64>, kind: Kind) -> Result<Ended> {
        let copied = self.copy(range, kind);
        self.agent.shared.map.end();
        match copied {
            Ok(()) => Ok(Ended::Done(self.unreadable)),
            Err(Stop::Lost) => Ok(Ended::Lost),
            Err(Stop::Later(why)) => Ok(Ended::Later(why)),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    fn copy(&mut self, range: Range<u64>, kind: Kind) -> Copied<()> {
        let begin = self.begin(&range, kind)?;
        // Sizes that grew while nothing was recorded: no slot may reach beyond what the stream knows.
        self.agent.announce_volumes()?;
        barrier(self.agent)?.map_err(Stop::Later)?;
        if kind == Kind::Resync {
            self.skip_free(&range)?;
        }
        let mut buffer = Buffer::new(usize::try_from(CHUNK_BYTES).unwrap_or(1 << 20));
        let ring = &self.agent.shared.ring;
        let dirty = ring.dirty_extents(self.volume.id).into_iter().filter_map(|dirty| {
            let inside = dirty.start.max(range.start)..dirty.end.min(range.end);
            (inside.start < inside.end).then_some(inside)
        });
        // In parts: a receiver may turn up while much is copied.
        let parts = dirty.flat_map(|dirty| {
            let starts = (dirty.start..dirty.end).step_by(usize::try_from(PART_BYTES).unwrap_or(usize::MAX));
            starts.map(move |start| start..(start + PART_BYTES).min(dirty.end))
        });
        for dirty in parts {
            let is_long = kind == Kind::Resync && dirty.end - dirty.start >= differing::FROM_BYTES;
            if is_long && self.compares(&dirty)? {
                self.differing(dirty, begin, &mut buffer)?;
            } else {
                self.extent(dirty, &mut buffer)?;
            }
        }
        while !self.outstanding.is_empty() {
            self.settle()?;
            if !self.outstanding.is_empty() {
                self.wait_for_journal()?;
            }
        }
        Ok(())
    }

    /// Leaves out what the file system calls free, where the running kernel can tell (`allocated`).
    fn skip_free(&mut self, range: &Range<u64>) -> Copied<()> {
        let settings = self.agent.settings.volume.iter().find(|volume| volume.name == self.volume.name);
        let wants = settings.is_some_and(|settings| settings.sync == conf::SyncMode::Allocated);
        let Some(disk) = self.volume.disk().filter(|_| wants) else { return Ok(()) };
        let dirty = self.agent.shared.ring.dirty_extents(self.volume.id);
        let long = dirty.into_iter().filter(|dirty| dirty.end - dirty.start >= differing::FROM_BYTES);
        let long: Vec<_> = long.map(|dirty| dirty.start.max(range.start)..dirty.end.min(range.end)).collect();
        if long.is_empty() {
            return Ok(());
        }
        let free = match allocated::of_mounted(&disk) {
            Ok(free) => free,
            Err(why) => {
                tracing::warn!(volume = %self.volume.name, why, "free space cannot be told apart: everything is sent");
                return Ok(());
            }
        };
        let runs: Vec<_> = long.into_iter().flat_map(|dirty| free.runs(dirty, true)).collect();
        self.agent.shared.skipped.add(self.volume.id, disk.size_bytes(), &runs)?;
        let mut skipped = 0;
        for run in runs {
            skipped += run.end - run.start;
            self.clear(run)?;
        }
        tracing::info!(volume = %self.volume.name, free_bytes = skipped, "free space is not sent");
        Ok(())
    }

    /// Begins, and returns the lsn that the window's mask starts behind.
    fn begin(&self, range: &Range<u64>, kind: Kind) -> Copied<u64> {
        let shared = &self.agent.shared;
        loop {
            self.agent.halt.check()?;
            let step = || match kind {
                Kind::Resync => shared.ring.begin(),
                Kind::Repair => shared.ring.fence(),
            };
            match shared.map.begin(self.volume.id, range.clone(), step) {
                Ok(after) => return Ok(after),
                Err(Refusal::Full) => machine::sleep(LOOK),
                // A dead agent's, or of a window that was given up.
                Err(Refusal::Owed) => barrier(self.agent)?.map_err(Stop::Later)?,
                Err(Refusal::BitmapMode | Refusal::Dirty) => return Err(Stop::Lost),
                Err(Refusal::Failed(error)) => return Err(Stop::Failed(error)),
            }
        }
    }

    /// Whether to go on: the agent runs, writes are recorded, and nothing that was handed over is lost.
    fn look(&self) -> Copied<()> {
        self.agent.halt.check()?;
        let shared = &self.agent.shared;
        let lost = shared.ring.mode() == Mode::Bitmap
            || !shared.goes_on()
            || shared.map.lock().is_abandoned()
            || !self.volume.is_attached();
        if lost { Err(Stop::Lost) } else { Ok(()) }
    }

    /// Copies one dirty range.
    fn extent(&mut self, range: Range<u64>, buffer: &mut Buffer) -> Copied<()> {
        let mut zeros = range.start..range.start;
        let mut at = range.start;
        while at < range.end {
            let runs = match self.volume.runs(at, range.end - at) {
                Ok(runs) => runs,
                // The disk cannot tell: then reading shows what it can.
                Err(_) => vec![nbd::BlockExtent { length_bytes: range.end - at, hole: false }],
            };
            for run in runs {
                let end = at + run.length_bytes;
                if run.hole {
                    self.report.advance(run.length_bytes, 0);
                    while at < end {
                        zeros.end = end.min(zeros.start + ZERO_BYTES);
                        at = zeros.end;
                        self.zeros_if_large(&mut zeros)?;
                    }
                }
                while at < end {
                    let next = end.min((at / CHUNK_BYTES + 1) * CHUNK_BYTES);
                    self.chunk(at..next, &mut zeros, buffer)?;
                    at = next;
                }
            }
        }
        self.zeros(&mut zeros)
    }

    fn zeros_if_large(&mut self, zeros: &mut Range<u64>) -> Copied<()> {
        if zeros.end - zeros.start >= ZERO_BYTES { self.zeros(zeros) } else { Ok(()) }
    }

    /// Reads a chunk and reserves its slots; zeros at its end are left to be joined by more.
    fn chunk(&mut self, range: Range<u64>, zeros: &mut Range<u64>, buffer: &mut Buffer) -> Copied<()> {
        self.pause()?;
        let length = usize::try_from(range.end - range.start).unwrap_or(0);
        let bytes = &mut buffer.bytes()[..length];
        if let Err(error) = self.volume.read_at(range.start, bytes) {
            return self.unreadable(range, zeros, &error, buffer);
        }
        self.pace.read(machine::now(), range.end - range.start);
        let mut slots: Vec<(Range<u64>, Vec<u8>)> = Vec::with_capacity(SLOTS);
        let mut sent = 0;
        let mut at = range.start;
        for piece in bytes.chunks(usize::try_from(SLOT_BYTES).unwrap_or(1 << 17)) {
            let next = at + piece.len() as u64;
            if is_zero(piece) {
                self.reserve(&mut slots)?;
                zeros.end = next;
                self.zeros_if_large(zeros)?;
            } else {
                self.zeros(zeros)?;
                slots.push((at..next, piece.to_vec()));
                sent += piece.len() as u64;
                *zeros = next..next;
                if slots.len() == SLOTS {
                    self.reserve(&mut slots)?;
                }
            }
            at = next;
        }
        self.reserve(&mut slots)?;
        self.report.advance(range.end - range.start, sent);
        Ok(())
    }

    /// A chunk that could not be read: what of it can is copied granule by granule, the rest stays dirty.
    fn unreadable(
        &mut self,
        range: Range<u64>,
        zeros: &mut Range<u64>,
        error: &std::io::Error,
        buffer: &mut Buffer,
    ) -> Copied<()> {
        if !self.volume.is_attached() {
            return Err(Stop::Lost);
        }
        if range.end - range.start > GRANULE {
            let mut at = range.start;
            while at < range.end {
                let end = ((at / GRANULE + 1) * GRANULE).min(range.end);
                self.chunk(at..end, zeros, buffer)?;
                at = end;
            }
            return Ok(());
        }
        tracing::warn!(volume = %self.volume.name, offset = range.start, %error, "cannot be read; it stays dirty");
        self.zeros(zeros)?;
        *zeros = range.end..range.end;
        self.report.advance(range.end - range.start, 0);
        match self.unreadable.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.unreadable.push(range),
        }
        Ok(())
    }

    /// Yields to live writes, keeps the rate, and leaves the journal room.
    fn pause(&mut self) -> Copied<()> {
        let shared = &self.agent.shared;
        loop {
            self.settle()?;
            self.look()?;
            if self.bytes >= OUTSTANDING_BYTES || self.outstanding.len() >= OUTSTANDING {
                self.wait_for_journal()?;
                continue;
            }
            if self.pace.is_live(machine::now(), shared.map.live_changes()) {
                if self.is_passing() {
                    self.wait_for_journal()?;
                    continue;
                }
                self.pace.rest(machine::now());
            }
            let (backlog_bytes, _) = shared.progress.backlog();
            let quota_bytes = self.agent.settings.journal.quota;
            match self.pace.advice(machine::now(), shared.ring.fill_ratio(), backlog_bytes, quota_bytes) {
                Advice::Go => break,
                Advice::Wait(time) => {
                    machine::sleep(time.min(Duration::from_millis(100)));
                    if time <= Duration::from_millis(100) {
                        break;
                    }
                }
                Advice::Yield => machine::sleep(LOOK),
                Advice::Backlog => {
                    self.report.waits("waiting for the receiver to acknowledge what it was sent");
                    machine::sleep(LOOK * 4);
                }
            }
        }
        self.pace.begin(machine::now());
        Ok(())
    }

    /// Whether what was reserved is still on its way into the journal, but for the last frame, which waits
    /// for more.
    fn is_passing(&self) -> bool {
        let journaled = self.agent.shared.progress.position().lsn.0;
        self.outstanding.back().is_some_and(|last| journaled + LAST_FRAME < last.last_lsn)
    }

    fn wait_for_journal(&self) -> Copied<()> {
        let shared = &self.agent.shared;
        shared.progress.wait_beyond(&shared.progress.position(), LOOK);
        self.look()
    }

    fn zeros(&mut self, zeros: &mut Range<u64>) -> Copied<()> {
        if zeros.start < zeros.end {
            let range = zeros.clone();
            let last_lsn = self.slots(std::slice::from_ref(&range), |_| Content::Zeros)?;
            self.outstanding.push_back(Outstanding { range, last_lsn, bytes: 0 });
        }
        zeros.start = zeros.end;
        Ok(())
    }

    /// Reserves slots for what was read, next to each other.
    fn reserve(&mut self, slots: &mut Vec<(Range<u64>, Vec<u8>)>) -> Copied<()> {
        let (Some((first, _)), Some((last, _))) = (slots.first(), slots.last()) else { return Ok(()) };
        let range = first.start..last.end;
        let (ranges, mut contents): (Vec<_>, Vec<_>) = slots.drain(..).unzip();
        let bytes = contents.iter().map(|content| content.len() as u64).sum();
        let last_lsn = self.slots(&ranges, |at| Content::Bytes(std::mem::take(&mut contents[at])))?;
        self.bytes += bytes;
        self.outstanding.push_back(Outstanding { range, last_lsn, bytes });
        Ok(())
    }

    /// Reserves slots and hands over their content, before the consumer can reach them; the last one's lsn.
    fn slots(&self, ranges: &[Range<u64>], mut content: impl FnMut(usize) -> Content) -> Copied<u64> {
        let shared = &self.agent.shared;
        loop {
            self.look()?;
            let mut map = shared.map.lock();
            match shared.ring.slots(self.volume.id, ranges) {
                Ok(first_lsn) => {
                    let mut lsn = first_lsn;
                    for (at, range) in ranges.iter().enumerate() {
                        lsn = first_lsn + at as u64;
                        map.insert(lsn, range.clone(), content(at));
                    }
                    return Ok(lsn);
                }
                Err(Refusal::Full) => drop(map),
                Err(Refusal::Failed(error)) => return Err(Stop::Failed(error)),
                Err(Refusal::BitmapMode | Refusal::Dirty | Refusal::Owed) => return Err(Stop::Lost),
            }
            machine::sleep(LOOK);
        }
    }

    /// Clears the bits of a range that is through.
    fn clear(&mut self, range: Range<u64>) -> Result<()> {
        let ring = &self.agent.shared.ring;
        if range.end > self.covered {
            let mut joined = range.start.max(self.covered)..range.end;
            self.beyond.retain(|other| {
                let is_apart = other.end < joined.start || joined.end < other.start;
                if !is_apart {
                    joined = joined.start.min(other.start)..joined.end.max(other.end);
                }
                is_apart
            });
            ring.clear(self.volume.id, joined.clone())?;
            self.beyond.push(joined);
        }
        ring.clear(self.volume.id, range)
    }

    /// Clears the bits of what is journaled; pieces of zeros that fell apart are reserved again first.
    fn settle(&mut self) -> Copied<()> {
        let shared = &self.agent.shared;
        while let Some(front) = self.outstanding.front() {
            if shared.progress.position().lsn.0 < front.last_lsn {
                return Ok(());
            }
            // After the position: lsns that were given up get their places only after this is set.
            let pieces = {
                let mut map = shared.map.lock();
                if map.is_abandoned() {
                    return Err(Stop::Lost);
                }
                map.requeued(&front.range)
            };
            if pieces.is_empty() {
                let next = front.range.clone();
                self.bytes -= front.bytes;
                self.outstanding.pop_front();
                // Runs of data and holes end anywhere; a granule is whole when all that lies in it is
                // through.
                let joins = self.journaled.end == next.start;
                self.journaled = if joins { self.journaled.start..next.end } else { next };
                self.clear(self.journaled.clone())?;
                shared.skipped.sent(self.volume.id, &self.journaled);
                self.journaled.start = self.journaled.start.max(self.journaled.end / GRANULE * GRANULE);
                continue;
            }
            let mut last_lsn = front.last_lsn;
            for pieces in pieces.chunks(SLOTS) {
                last_lsn = self.slots(pieces, |_| Content::Zeros)?;
            }
            if let Some(front) = self.outstanding.front_mut() {
                front.last_lsn = last_lsn;
            }
        }
        Ok(())
    }
}

impl super::Halt {
    /// Whether to go on.
    ///
    /// # Errors
    /// [`ErrorKind::Stopped`]: what is dirty stays so in the ring, for the next run.
    pub fn check(&self) -> Result<()> {
        if self.stop.load(std::sync::atomic::Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Stopped,
                "the synchronisation was stopped; the next start goes on with it",
            ));
        }
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // In wide words: the compiler turns the comparison of 16 bytes into one instruction.
    let (words, tail) = bytes.as_chunks::<16>();
    tail.iter().all(|byte| *byte == 0) && words.iter().all(|word| *word == [0; 16])
}
