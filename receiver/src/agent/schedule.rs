//! When the next batch is applied: a sans-IO clock-driven decision.
//!
//! Stands between ingest, which says what became durable, and the apply thread, which asks [`Schedule::due`].
//! Batches are big when there is much to do (folding pays) and prompt when there is little. State: what
//! waits, in chunks of arrival. Invariants: chunks are in lsn order, each holds something above the
//! checkpoint, and there are at most [`MAX_CHUNKS`] of them whatever the backlog.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use journal::Lsn;

/// Chunks kept: arrival times beyond that are merged, which only makes the schedule a little more eager.
const MAX_CHUNKS: usize = 1024;

/// By how much a request for haste may shorten the interval between batches: a source that keeps asking makes
/// no more undo files than this many times the usual.
pub(super) const HASTE: u32 = 4;

/// The pace, from the settings' `[apply]`.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Raw bytes that make a batch full.
    pub batch_bytes: u64,
    /// The longest that a durable record waits.
    pub interval: Duration,
    /// Nothing arrived for this long: apply what there is.
    pub idle: Duration,
    /// Batches that are not full are at least this far apart.
    pub min_interval: Duration,
}

/// When to apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// At once.
    Now,
    /// Not before this, unless something arrives.
    At(Instant),
    /// Nothing waits.
    Never,
}

#[derive(Debug)]
struct Chunk {
    last: Lsn,
    bytes: u64,
    arrived: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct Schedule {
    pace: Pace,
    waiting: VecDeque<Chunk>,
    bytes: u64,
    last_arrival: Option<Instant>,
    last_batch: Option<Instant>,
    wanted: Lsn,
    held_until: Option<Instant>,
}

impl Schedule {
    /// Nothing waits yet.
    pub fn new(pace: Pace) -> Schedule {
        Schedule {
            pace,
            waiting: VecDeque::new(),
            bytes: 0,
            last_arrival: None,
            last_batch: None,
            wanted: Lsn::ZERO,
            held_until: None,
        }
    }

    /// Records up to `last`, `bytes` raw, became durable.
    pub fn received(&mut self, last: Lsn, bytes: u64, now: Instant) {
        self.last_arrival = Some(now);
        self.bytes += bytes;
        let small = self.pace.batch_bytes / 16;
        let full = self.waiting.len() >= MAX_CHUNKS;
        match self.waiting.back_mut() {
            // Merged chunks keep the older arrival: nothing waits longer than `interval` because of it.
            Some(back) if full || back.bytes < small => {
                back.last = last;
                back.bytes += bytes;
            }
            _ => self.waiting.push_back(Chunk { last, bytes, arrived: now }),
        }
    }

    /// Everything up to `checkpoint` is on the replica.
    pub fn applied(&mut self, checkpoint: Lsn, now: Instant) {
        self.last_batch = Some(now);
        self.held_until = None;
        while self.waiting.front().is_some_and(|chunk| chunk.last <= checkpoint) {
            self.bytes -= self.waiting.pop_front().map_or(0, |chunk| chunk.bytes);
        }
    }

    /// Somebody asks that `lsn` be applied without waiting for a fuller batch.
    pub fn want(&mut self, lsn: Lsn) {
        self.wanted = self.wanted.max(lsn);
    }

    /// What was asked for is forgotten: another source asks from now on.
    pub fn forget_wanted(&mut self) {
        self.wanted = Lsn::ZERO;
    }

    /// Nothing is tried before `until`: the last try failed.
    pub fn hold(&mut self, until: Instant) {
        self.held_until = Some(until);
    }

    /// The checkpoint was set back: everything behind it up to `last` waits again, about `bytes` of it.
    pub fn set_back(&mut self, last: Lsn, bytes: u64, now: Instant) {
        self.waiting.clear();
        self.bytes = 0;
        self.held_until = None;
        if bytes > 0 {
            self.received(last, bytes, now);
        }
    }

    /// Nothing is held up any more.
    pub fn release(&mut self) {
        self.held_until = None;
    }

    /// Raw bytes that are durable and not applied.
    pub fn bytes_waiting(&self) -> u64 {
        self.bytes
    }

    /// The decision at `now`, given the replica's `checkpoint`.
    pub fn due(&self, checkpoint: Lsn, now: Instant) -> Due {
        let Some(oldest) = self.waiting.front() else { return Due::Never };
        if let Some(until) = self.held_until.filter(|until| *until > now) {
            return Due::At(until);
        }
        if self.bytes >= self.pace.batch_bytes {
            return Due::Now;
        }
        let spaced = |after: Instant, by| self.last_batch.map_or(after, |last| after.max(last + by));
        let at = if self.wanted > checkpoint {
            spaced(oldest.arrived, self.pace.min_interval / HASTE)
        } else {
            let quiet = self.last_arrival.unwrap_or(oldest.arrived) + self.pace.idle;
            spaced(quiet, self.pace.min_interval).min(oldest.arrived + self.pace.interval)
        };
        if at <= now { Due::Now } else { Due::At(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn schedule() -> (Schedule, Instant) {
        let pace =
            Pace { batch_bytes: 1 << 20, interval: 5000 * MS, idle: 100 * MS, min_interval: 1000 * MS };
        (Schedule::new(pace), Instant::now())
    }

    #[test]
    fn a_full_batch_is_due_at_once_and_a_small_one_when_idle() {
        let (mut schedule, t0) = schedule();
        assert_eq!(schedule.due(Lsn(0), t0), Due::Never);
        schedule.received(Lsn(5), 4096, t0);
        assert_eq!(schedule.due(Lsn(0), t0), Due::At(t0 + 100 * MS));
        schedule.received(Lsn(6), 4096, t0 + 50 * MS);
        assert_eq!(schedule.due(Lsn(0), t0 + 100 * MS), Due::At(t0 + 150 * MS));
        assert_eq!(schedule.due(Lsn(0), t0 + 150 * MS), Due::Now);
        schedule.received(Lsn(9), 1 << 20, t0 + 60 * MS);
        assert_eq!(schedule.due(Lsn(0), t0 + 60 * MS), Due::Now);
    }

    #[test]
    fn a_trickle_never_waits_longer_than_the_interval_nor_runs_more_often_than_the_minimum() {
        let (mut schedule, t0) = schedule();
        schedule.received(Lsn(1), 512, t0);
        schedule.applied(Lsn(1), t0);
        for i in 1..=60 {
            schedule.received(Lsn(1 + i), 512, t0 + MS * 90 * u32::try_from(i).unwrap());
        }
        // Never idle for 100 ms, so only the oldest record's age counts.
        assert_eq!(schedule.due(Lsn(1), t0 + 5000 * MS), Due::At(t0 + 5090 * MS));
        assert_eq!(schedule.due(Lsn(1), t0 + 5090 * MS), Due::Now);
        schedule.applied(Lsn(61), t0 + 6000 * MS);
        schedule.received(Lsn(62), 512, t0 + 6001 * MS);
        assert_eq!(schedule.due(Lsn(61), t0 + 6200 * MS), Due::At(t0 + 7000 * MS));
    }

    #[test]
    fn what_is_wanted_does_not_wait_and_what_failed_does() {
        let (mut schedule, t0) = schedule();
        schedule.want(Lsn(3));
        assert_eq!(schedule.due(Lsn(0), t0), Due::Never, "not here yet");
        schedule.received(Lsn(4), 512, t0);
        assert_eq!(schedule.due(Lsn(0), t0), Due::Now);
        schedule.hold(t0 + 10 * MS);
        assert_eq!(schedule.due(Lsn(0), t0), Due::At(t0 + 10 * MS));
        assert_eq!(schedule.due(Lsn(0), t0 + 10 * MS), Due::Now);
        schedule.applied(Lsn(4), t0 + 10 * MS);
        assert_eq!(schedule.due(Lsn(4), t0 + 10 * MS), Due::Never);
        assert_eq!(schedule.bytes_waiting(), 0);
        // Whoever asks without end gets a batch four times as often, not one for each write.
        schedule.want(Lsn(u64::MAX));
        schedule.received(Lsn(5), 512, t0 + 20 * MS);
        assert_eq!(schedule.due(Lsn(4), t0 + 20 * MS), Due::At(t0 + 260 * MS));
        // And only as long as it is there.
        schedule.forget_wanted();
        assert!(
            matches!(schedule.due(Lsn(4), t0 + 20 * MS), Due::At(at) if at > t0 + 260 * MS),
            "the usual pace"
        );
    }

    #[test]
    fn what_was_applied_waits_again_after_the_checkpoint_was_set_back() {
        let (mut schedule, t0) = schedule();
        schedule.received(Lsn(5), 4096, t0);
        schedule.set_back(Lsn(5), 10_000, t0);
        assert_eq!(schedule.bytes_waiting(), 10_000);
        schedule.hold(t0 + 5000 * MS);
        assert_eq!(schedule.due(Lsn(0), t0 + 200 * MS), Due::At(t0 + 5000 * MS));
        schedule.release();
        assert_eq!(schedule.due(Lsn(0), t0 + 200 * MS), Due::Now);
        schedule.set_back(Lsn(5), 0, t0);
        assert_eq!(schedule.due(Lsn(0), t0 + 200 * MS), Due::Never);
    }

    #[test]
    fn a_long_backlog_takes_bounded_memory_and_loses_no_bytes() {
        let (mut schedule, t0) = schedule();
        for i in 1..=10_000 {
            schedule.received(Lsn(i), 1 << 17, t0);
        }
        assert!(schedule.waiting.len() <= MAX_CHUNKS);
        assert_eq!(schedule.bytes_waiting(), 10_000 << 17);
        schedule.applied(Lsn(10_000), t0);
        assert_eq!(schedule.bytes_waiting(), 0);
    }
}
