//! Offline synchronisation: the content of the volumes as sync records between begin and end, before anybody is served.
//!
//! Nothing else produces while it runs, so no barrier, window or mask is needed: the backing does not change. Records
//! go through the ring like all others; where the ring is full this side waits, it never overflows.
//!
//! Zeros are sent as `WriteZeroes` (48 bytes a run), whether they are holes or written, so that the replica ends up
//! equal whatever it held before.

use std::iter::once;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kfilter::{Captured, Entry, Op, Refused};

use crate::SharedRing;
use crate::capture::nbd::{CapturedVolume, sync_slot};
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::status::{Board, State};

/// Read at once; eight records.
const CHUNK_BYTES: u64 = 1 << 20;
/// The ring is left half empty, so that the journal's compression ladder does not take a sync for an overload.
const FILL_LIMIT: u64 = 4;
const PAUSE: Duration = Duration::from_millis(2);
/// How often progress is shown.
const REPORT: Duration = Duration::from_millis(500);

/// What ends a synchronisation early.
pub struct Halt {
    /// The agent stops.
    pub stop: AtomicBool,
    /// The journal takes nothing more.
    pub broken: Arc<AtomicBool>,
}

impl Halt {
    /// Whether to go on.
    ///
    /// # Errors
    /// [`ErrorKind::Stopped`] or [`ErrorKind::NotPossible`]; the gap stays remembered either way.
    pub fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Acquire) {
            let at = "the synchronisation was stopped; the next start begins it anew";
            return Err(Error::new(ErrorKind::Stopped, at));
        }
        if self.broken.load(Ordering::Acquire) {
            let at = "the source journal takes nothing more; the next start synchronises";
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        Ok(())
    }
}

/// What one synchronisation has to cover: ranges of each volume.
pub struct Work<'a> {
    /// The volumes with their ranges, ascending and disjoint.
    pub volumes: Vec<(&'a CapturedVolume, Vec<Range<u64>>)>,
    /// `Syncing` or `Resyncing`.
    pub state: State,
    /// Why, for status and points.
    pub cause: String,
}

/// Emits all content; the caller has reserved `ResyncBegin` and reserves `ResyncEnd`.
///
/// # Errors
/// The backing cannot be read, the ring is damaged, or it was halted.
pub fn emit(work: &Work<'_>, ring: &SharedRing, board: &Board, halt: &Halt) -> Result<u64> {
    let total: u64 =
        work.volumes.iter().flat_map(|(_, ranges)| ranges).map(|range| range.end - range.start).sum();
    let mut progress = Report { started: Instant::now(), shown: Instant::now(), done: 0, total, sent: 0 };
    board.change(work.state, format!("{}; starting", work.cause));
    let mut chunk = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(1 << 20)];
    for (volume, ranges) in &work.volumes {
        for range in ranges {
            emit_range(volume, range.clone(), ring, &mut chunk, halt, |done, sent| {
                progress.advance(done, sent, work, board);
            })?;
            if work.state == State::Resyncing {
                // In the ring is as good as appended: it outlives us, and a journal that fails marks everything dirty.
                ring.clear_dirty(volume.id, range.clone());
            }
        }
    }
    Ok(progress.sent)
}

struct Report {
    started: Instant,
    shown: Instant,
    done: u64,
    total: u64,
    sent: u64,
}

impl Report {
    fn advance(&mut self, done: u64, sent: u64, work: &Work<'_>, board: &Board) {
        self.done += done;
        self.sent += sent;
        if self.shown.elapsed() < REPORT {
            return;
        }
        self.shown = Instant::now();
        let elapsed = self.started.elapsed().as_secs_f64();
        let fraction = self.done as f64 / self.total.max(1) as f64;
        let left_s = elapsed / fraction.max(1e-9) * (1.0 - fraction);
        let mib = |bytes: u64| bytes >> 20;
        let why = format!(
            "{}; {:.0} % ({} of {} MiB, {} MiB of content), {left_s:.0} s left",
            work.cause,
            fraction * 100.0,
            mib(self.done),
            mib(self.total),
            mib(self.sent)
        );
        tracing::info!("{why}");
        board.progress(work.state, why);
    }
}

fn emit_range(
    volume: &CapturedVolume,
    range: Range<u64>,
    ring: &SharedRing,
    chunk: &mut [u8],
    halt: &Halt,
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    let unreadable = |at: u64, error: std::io::Error| {
        Error::because(ErrorKind::Io, format!("volume {}: read at byte {at}", volume.name), error)
    };
    let mut zeros = range.start..range.start;
    let mut at = range.start;
    while at < range.end {
        let runs =
            volume.backing.block_status(at, range.end - at, 64).map_err(|error| unreadable(at, error))?;
        for run in runs {
            let end = at + run.length_bytes;
            if run.hole {
                zeros.end = end;
                progress(run.length_bytes, 0);
                at = end;
                continue;
            }
            while at < end {
                let bytes = (end - at).min(chunk.len() as u64);
                let content = &mut chunk[..usize::try_from(bytes).unwrap_or(0)];
                volume.backing.read_at(at, content).map_err(|error| unreadable(at, error))?;
                let mut sent = 0;
                for piece in content.chunks(kfilter::abi::MAX_PAYLOAD as usize) {
                    let next = at + piece.len() as u64;
                    if is_zero(piece) {
                        zeros.end = next;
                    } else {
                        emit_zeros(volume, &mut zeros, ring, halt)?;
                        put(ring, sync_slot(volume.id, at, piece.len()), piece, halt)?;
                        zeros = next..next;
                        sent += piece.len() as u64;
                    }
                    at = next;
                }
                progress(bytes, sent);
            }
        }
    }
    emit_zeros(volume, &mut zeros, ring, halt)
}

fn emit_zeros(volume: &CapturedVolume, zeros: &mut Range<u64>, ring: &SharedRing, halt: &Halt) -> Result<()> {
    if zeros.is_empty() {
        return Ok(());
    }
    let mut entry = Entry::extent(Op::WriteZeroes, volume.id, zeros.start, zeros.end - zeros.start, 0);
    entry.needs_done = false;
    zeros.start = zeros.end;
    put(ring, entry, &[], halt)
}

fn is_zero(bytes: &[u8]) -> bool {
    // In wide words: the compiler turns the comparison of 16 bytes into one instruction.
    let (words, tail) = bytes.as_chunks::<16>();
    tail.iter().all(|byte| *byte == 0) && words.iter().all(|word| *word == [0; 16])
}

/// Tries a step of the ring until it has room for the step's record.
///
/// # Errors
/// Halted, or refused for another reason.
pub fn until_room(
    what: &str,
    halt: &Halt,
    step: impl Fn() -> std::result::Result<u64, Refused>,
) -> Result<u64> {
    loop {
        halt.check()?;
        match step() {
            Ok(lsn) => return Ok(lsn),
            Err(Refused::Full) => std::thread::sleep(PAUSE),
            Err(refused) => {
                let at = format!("the ring refused the {what} of a synchronisation: {refused:?}");
                return Err(Error::new(ErrorKind::Ring, at));
            }
        }
    }
}

/// Waits for room, then puts one record into the ring.
///
/// # Errors
/// Stopped, or the ring left ring mode (it never does while this is the only producer).
pub fn put(ring: &SharedRing, entry: Entry, payload: &[u8], halt: &Halt) -> Result<()> {
    loop {
        halt.check()?;
        if ring.used_bytes() < ring.ring_bytes() / FILL_LIMIT {
            return match ring.capture(once(entry), payload, now_ns()) {
                Ok(Captured::Ring(_)) => Ok(()),
                Ok(Captured::Bits) => {
                    Err(Error::new(ErrorKind::Ring, "the ring overflowed during a synchronisation"))
                }
                Err(Refused::BitmapMode) => {
                    Err(Error::new(ErrorKind::NotPossible, "the journal failed during the synchronisation"))
                }
                Err(refused) => {
                    Err(Error::new(ErrorKind::Ring, format!("the ring refused a sync record: {refused:?}")))
                }
            };
        }
        std::thread::sleep(PAUSE);
    }
}
