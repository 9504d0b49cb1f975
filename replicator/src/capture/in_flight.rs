//! Writes in flight of one volume: a write waits while an overlapping one is between its ring record and its answer.
//!
//! Without this, two overlapping writes could reach the ring in one order and the backing in the other
//! (`models/front.py`: diverged without serialisation). Disjoint writes never wait.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The ranges in flight. As many as there are connections, so a short list beats a tree.
#[derive(Debug, Default)]
pub struct InFlight {
    ranges: Mutex<Ranges>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct Ranges {
    held: Vec<Range<u64>>,
    waiting: usize,
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    owner: &'a InFlight,
    range: Range<u64>,
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing overlapping is in flight, then holds the range.
    pub fn enter(&self, range: Range<u64>) -> Turn<'_> {
        let mut ranges = self.lock();
        while ranges.held.iter().any(|held| held.start < range.end && range.start < held.end) {
            ranges.waiting += 1;
            ranges = self.left.wait(ranges).unwrap_or_else(PoisonError::into_inner);
            ranges.waiting -= 1;
        }
        ranges.held.push(range.clone());
        Turn { owner: self, range }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut ranges = self.owner.lock();
        let at = ranges.held.iter().position(|held| *held == self.range).expect("a held range is listed");
        ranges.held.swap_remove(at);
        if ranges.waiting > 0 {
            self.owner.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn overlapping_writes_take_turns_and_disjoint_ones_do_not() {
        let flight = InFlight::default();
        let first = flight.enter(0..4096);
        let disjoint = flight.enter(4096..8192);
        drop(disjoint);
        let order = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let _turn = flight.enter(4000..5000);
                order.load(Ordering::SeqCst)
            });
            while flight.lock().waiting == 0 {
                std::thread::yield_now();
            }
            order.store(1, Ordering::SeqCst);
            drop(first);
            assert_eq!(waiter.join().unwrap(), 1, "entered only after the first had left");
        });
        assert!(flight.lock().held.is_empty());
    }
}
