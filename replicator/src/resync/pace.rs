//! How fast content is copied: its own rate, and never at the expense of the disk's own writes.
//!
//! What yields to what: a ring that fills shows that the journal does not keep up, so the copy slows down at a quarter and
//! stands still at a half. A journal that fills with frames which nobody acknowledges is left half empty for live writes.

use std::time::{Duration, Instant};

/// From this fill of the ring on it slows down …
const SLOW: f64 = 0.25;
/// … and from this on it stands still.
const STILL: f64 = 0.5;
/// The pause before a chunk while the ring is between the two.
const SLOW_PAUSE: Duration = Duration::from_millis(4);
/// Bytes that a rate may be exceeded by at once.
const BURST: Duration = Duration::from_millis(250);

/// Decides how long to wait before the next chunk.
#[derive(Debug)]
pub struct Pace {
    rate_bits_per_s: u64,
    /// When what was read so far is paid for.
    paid: Option<Instant>,
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
        Pace { rate_bits_per_s, paid: None }
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
        match owed.saturating_sub(BURST).max(slow) {
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
