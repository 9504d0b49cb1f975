//! Clients of the NBD front are held to the pace of the journal, for milliseconds, before the ring overflows.
//!
//! The front answers from the page cache, at a speed that no journal on the same cores keeps up with. Left
//! alone, a burst of a tenth of a second would fill the ring and cost the group its protection until the next
//! synchronisation. So a write that finds the ring nearly full waits a moment, as it would for a busy disk,
//! and a longer one when the moment was not enough (decision 0008).
//!
//! Bounds, which keep promise 1: at most [`LONGEST_WAIT`] a write, and only while room is really being given
//! back. A journal that hangs, or is slower than that, holds nobody up: the ring fills and writes become
//! bits.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use kfilter::Region;
use machine::Mutex;

/// Above this fill writes are paced; the rest of the ring is for what waits do not hold back.
const HIGH: f64 = 0.75;
/// The longest that one write waits there.
const WAIT: Duration = Duration::from_millis(10);
/// Above this fill the journal has fallen behind in spite of it.
const NEARLY_FULL: f64 = 0.85;
/// The longest that one write waits there, and at all: eight writes of 128 KiB at a time fill what is left of
/// 64 MiB in half a second then.
const LONGEST_WAIT: Duration = Duration::from_millis(50);
/// One look at the ring to the next.
const STEP: Duration = Duration::from_micros(200);
/// A ring that has given back nothing for this long is not being drained. The page cache of a busy disk makes
/// a writer, such as the journal, pause for up to 200 ms.
const STALLED: Duration = Duration::from_millis(250);

/// What a volume's writers know of the ring's progress.
#[derive(Debug)]
pub struct Pacer {
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    first_held_lsn: u64,
    at: Instant,
}

impl Pacer {
    /// Nothing seen yet.
    pub fn new() -> Pacer {
        Pacer { seen: Mutex::new(Seen { first_held_lsn: 0, at: machine::now() }) }
    }

    /// Before a write is captured. Costs two loads while the ring has room.
    #[inline]
    pub fn pace(&self, ring: &Region) {
        let fill = ring.fill_ratio();
        if fill >= HIGH {
            let at_most = if fill >= NEARLY_FULL { LONGEST_WAIT } else { WAIT };
            self.wait(at_most, || ring.fill_ratio() >= HIGH, || ring.first_held_lsn());
        }
    }

    #[cold]
    fn wait(&self, at_most: Duration, is_high: impl Fn() -> bool, first_held_lsn: impl Fn() -> u64) {
        let started = machine::now();
        while is_high() && machine::since(started) < at_most && self.is_draining(first_held_lsn()) {
            machine::sleep(STEP);
        }
    }

    fn is_draining(&self, first_held_lsn: u64) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.first_held_lsn != first_held_lsn {
            *seen = Seen { first_held_lsn, at: machine::now() };
        }
        machine::since(seen.at) < STALLED
    }
}

impl Default for Pacer {
    fn default() -> Pacer {
        Pacer::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_write_waits_for_a_journal_that_drains_and_not_for_one_that_hangs() {
        let pacer = Pacer::new();
        let looks = Cell::new(0);
        let look = || {
            looks.set(looks.get() + 1);
            looks.get()
        };
        // However busy this machine is.
        pacer.wait(Duration::from_secs(60), || looks.get() < 3, look);
        assert_eq!(looks.get(), 3, "waited until there was room");

        let started = Instant::now();
        pacer.wait(WAIT, || true, look);
        assert!(started.elapsed() >= WAIT, "draining, and yet full: the whole wait, then on");

        let hung = looks.get();
        pacer.wait(WAIT, || true, || hung);
        std::thread::sleep(STALLED);
        let looked = Cell::new(0);
        pacer.wait(
            LONGEST_WAIT,
            || true,
            || {
                looked.set(looked.get() + 1);
                hung
            },
        );
        assert_eq!(looked.get(), 1, "nothing moves: no wait at all");
    }
}
