//! How fast content is copied: its own rate, and never at the expense of the disk's own writes.
//!
//! What yields to what: a ring that fills shows that the journal does not keep up, so the copy slows down at
//! a quarter and stands still at a half. A journal that fills with frames which nobody acknowledges is left
//! half empty for live writes. While others write, the copy rests after each chunk, for twice as long as that
//! took on its way into the journal: at most a third of the time is its own then, and where the cores are
//! short, chunks take longer, and so do the rests (decision 0023).

use std::time::{Duration, Instant};

/// From this fill of the ring on it slows down …
const SLOW: f64 = 0.25;
/// … and from this on it stands still.
const STILL: f64 = 0.5;
/// The pause before a chunk while the ring is between the two.
const SLOW_PAUSE: Duration = Duration::from_millis(4);
/// Bytes that a rate may be exceeded by at once.
const BURST: Duration = Duration::from_millis(250);
/// For so long after a change by others they count as writing.
const LIVE: Duration = Duration::from_millis(250);
/// Rest after a chunk, in times that it took …
const REST: u32 = 2;
/// … and at most.
const LONGEST_REST: Duration = Duration::from_millis(100);

/// Decides how long to wait before the next chunk.
#[derive(Debug)]
pub struct Pace {
    rate_bits_per_s: u64,
    /// When what was read so far is paid for.
    paid: Option<Instant>,
    /// Changes by others that were seen, and when there was a new one.
    live: (u64, Option<Instant>),
    /// When the last chunk was begun, until it has passed.
    begun: Option<Instant>,
    rest_until: Option<Instant>,
}

/// What to do before the next chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Read it.
    Go,
    /// Read it after this time.
    Wait(Duration),
    /// Ask again later: live writes come first.
    Yield,
    /// Ask again later: the receiver has too much to acknowledge.
    Backlog,
}

impl Pace {
    /// At most this many bits per second; 0 is no limit.
    pub fn new(rate_bits_per_s: u64) -> Pace {
        Pace { rate_bits_per_s, paid: None, live: (0, None), begun: None, rest_until: None }
    }

    /// Whether others write, who have made so many changes in all.
    pub fn is_live(&mut self, now: Instant, changes: u64) -> bool {
        if std::mem::replace(&mut self.live.0, changes) != changes {
            self.live.1 = Some(now);
        }
        self.live.1.is_some_and(|at| now.saturating_duration_since(at) < LIVE)
    }

    /// A chunk begins.
    pub fn begin(&mut self, now: Instant) {
        self.begun = Some(now);
    }

    /// The chunk that was begun has passed while others write: a rest is due.
    pub fn rest(&mut self, now: Instant) {
        if let Some(begun) = self.begun.take() {
            self.rest_until = Some(now + (now.saturating_duration_since(begun) * REST).min(LONGEST_REST));
        }
    }

    /// What to do now.
    pub fn advice(&self, now: Instant, ring_fill: f64, backlog_bytes: u64, quota_bytes: u64) -> Advice {
        if ring_fill >= STILL {
            return Advice::Yield;
        }
        if backlog_bytes > quota_bytes / 2 {
            return Advice::Backlog;
        }
        let owed = self.paid.map_or(Duration::ZERO, |paid| paid.saturating_duration_since(now));
        let slow = if ring_fill >= SLOW { SLOW_PAUSE } else { Duration::ZERO };
        let rest = self.rest_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        match owed.saturating_sub(BURST).max(slow).max(rest) {
            Duration::ZERO => Advice::Go,
            wait => Advice::Wait(wait),
        }
    }

    /// So much was read.
    pub fn read(&mut self, now: Instant, bytes: u64) {
        if self.rate_bits_per_s > 0 {
            let costs = Duration::from_secs_f64(bytes as f64 * 8.0 / self.rate_bits_per_s as f64);
            self.paid = Some(self.paid.unwrap_or(now).max(now) + costs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_writes_come_first_then_the_receiver_then_the_rate() {
        let pace = Pace::new(0);
        let now = Instant::now();
        assert_eq!(pace.advice(now, 0.0, 0, 100), Advice::Go);
        assert_eq!(pace.advice(now, 0.3, 0, 100), Advice::Wait(SLOW_PAUSE));
        assert_eq!(pace.advice(now, 0.5, 0, 100), Advice::Yield);
        assert_eq!(pace.advice(now, 0.0, 51, 100), Advice::Backlog);
    }

    #[test]
    fn a_chunk_is_followed_by_a_rest_while_others_write() {
        let mut pace = Pace::new(0);
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert!(!pace.is_live(at(0), 0), "nobody has written");
        assert!(pace.is_live(at(1), 7));
        pace.begin(at(1));
        assert_eq!(pace.advice(at(11), 0.0, 0, 100), Advice::Go, "no rest before the chunk has passed");
        pace.rest(at(11));
        assert_eq!(pace.advice(at(11), 0.0, 0, 100), Advice::Wait(Duration::from_millis(20)));
        pace.rest(at(13));
        assert_eq!(pace.advice(at(31), 0.0, 0, 100), Advice::Go, "one rest a chunk");
        pace.begin(at(31));
        pace.rest(at(1031));
        assert_eq!(
            pace.advice(at(1031), 0.0, 0, 100),
            Advice::Wait(LONGEST_REST),
            "a slow one still goes on"
        );
        assert!(pace.is_live(at(250), 7) && !pace.is_live(at(251), 7), "they have stopped writing");
    }

    #[test]
    fn the_rate_holds_over_a_second() {
        let mut pace = Pace::new(80_000_000);
        let start = Instant::now();
        let (mut now, mut read) = (start, 0);
        while now < start + Duration::from_secs(2) {
            match pace.advice(now, 0.0, 0, 100) {
                Advice::Wait(wait) => now += wait,
                _ => {
                    pace.read(now, 1 << 20);
                    read += 1 << 20;
                }
            }
        }
        let expected = 20_000_000.0;
        assert!((read as f64 - expected).abs() < expected * 0.2, "{read}");
    }
}
