//! Changes in flight of one volume: first come, first served wherever they overlap, until the volume is
//! closed.
//!
//! A change has its place from [`InFlight::enter`] on, and goes ahead when no earlier one that overlaps is
//! left. Without this, two overlapping writes could reach the ring in one order and the backing in the other
//! (`models/front.py`: diverged without serialisation). Disjoint changes never wait for each other.
//!
//! That nothing overtakes protects two things more. A request that a client sends again over a new connection
//! stands behind the old one that still waits, so the old one cannot undo what comes after the new one. And a
//! large discard has its turn under writes that never end.

use machine::{Condvar, Mutex, MutexGuard};
use std::io;
use std::ops::Range;
use std::sync::PoisonError;
use std::time::Duration;

/// The ranges in flight. As many as there are connections and pool threads, so a short list beats a tree.
#[derive(Debug, Default)]
pub struct InFlight {
    queue: Mutex<Queue>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// Those that wait and those that go ahead, in the order they came.
    places: Vec<Place>,
    next_ticket: u64,
    /// Threads that wait for somebody to leave.
    waiting: usize,
    /// Nothing begins any more.
    closed: bool,
}

#[derive(Debug)]
struct Place {
    ticket: u64,
    range: Range<u64>,
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    owner: &'a InFlight,
    ticket: u64,
}

impl Queue {
    /// Whether something earlier stands in the way.
    fn must_wait(&self, ticket: u64, range: &Range<u64>) -> bool {
        let mut earlier = self.places.iter().take_while(|place| place.ticket != ticket);
        earlier.any(|place| place.range.start < range.end && range.start < place.range.end)
    }

    fn leave(&mut self, ticket: u64) {
        let at = self.places.iter().position(|place| place.ticket == ticket);
        self.places.remove(at.expect("invariant: a ticket has its place until it leaves"));
    }
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing overlapping that came earlier is left, then holds the range. `0..0` waits for
    /// nobody, but is in flight.
    ///
    /// # Errors
    /// `ESHUTDOWN` when the volume is closed, also for those that wait.
    pub fn enter(&self, range: Range<u64>) -> io::Result<Turn<'_>> {
        let mut queue = self.lock();
        if queue.closed {
            return Err(rustix::io::Errno::SHUTDOWN.into());
        }
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.places.push(Place { ticket, range: range.clone() });
        while queue.must_wait(ticket, &range) {
            queue.waiting += 1;
            queue = self.left.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
            if queue.closed {
                queue.leave(ticket);
                self.left.notify_all();
                return Err(rustix::io::Errno::SHUTDOWN.into());
            }
        }
        Ok(Turn { owner: self, ticket })
    }

    /// How many changes have begun so far, if none is in flight.
    pub fn quiet(&self) -> Option<u64> {
        let queue = self.lock();
        queue.places.is_empty().then_some(queue.next_ticket)
    }

    /// A mark: every change that began before this call is before it.
    pub fn now(&self) -> u64 {
        self.lock().next_ticket
    }

    /// The barrier of a resync: whether every change that began before the mark has left, within a time.
    /// Changes that come after it are not waited for, however many they are.
    pub fn until_left(&self, mark: u64, at_most: Duration) -> bool {
        let ends = machine::now() + at_most;
        let mut queue = self.lock();
        while queue.places.iter().any(|place| place.ticket < mark) {
            let Some(rest) = ends.checked_duration_since(machine::now()).filter(|rest| !rest.is_zero())
            else {
                return false;
            };
            queue.waiting += 1;
            queue = self.left.wait_timeout(queue, rest).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
        true
    }

    /// From now on nothing begins. True: nothing is in flight any more; false: something still is after
    /// `deadline`.
    pub fn close(&self, deadline: Duration) -> bool {
        let ends = machine::now() + deadline;
        let mut queue = self.lock();
        queue.closed = true;
        self.left.notify_all();
        while !queue.places.is_empty() {
            let Some(rest) = ends.checked_duration_since(machine::now()).filter(|rest| !rest.is_zero())
            else {
                return false;
            };
            queue.waiting += 1;
            queue = self.left.wait_timeout(queue, rest).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
        true
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queue = self.owner.lock();
        queue.leave(self.ticket);
        if queue.waiting > 0 {
            self.owner.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn until_waiting(flight: &InFlight, waiting: usize) {
        while flight.lock().waiting != waiting {
            thread::yield_now();
        }
    }

    #[test]
    fn overlapping_changes_take_turns_and_disjoint_ones_do_not() {
        let flight = InFlight::default();
        let first = flight.enter(0..4096).unwrap();
        let disjoint = flight.enter(4096..8192).unwrap();
        assert_eq!(flight.quiet(), None);
        drop(disjoint);
        let entered = Mutex::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _turn = flight.enter(4000..5000).unwrap();
                *entered.lock().unwrap() = true;
            });
            until_waiting(&flight, 1);
            assert!(!*entered.lock().unwrap(), "entered only after the first has left");
            drop(first);
        });
        assert!(*entered.lock().unwrap());
        assert_eq!(flight.quiet(), Some(3));
    }

    #[test]
    fn nobody_overtakes_an_earlier_one_that_waits() {
        let flight = InFlight::default();
        let order = Mutex::new(Vec::new());
        let first = flight.enter(0..512).unwrap();
        thread::scope(|scope| {
            let enter = |name: usize, range: Range<u64>| {
                let _turn = flight.enter(range).unwrap();
                order.lock().unwrap().push(name);
            };
            // A large one, then small ones: those that are free of the first, but not of the large one, wait
            // too.
            for (name, range) in [0..1 << 30, 4096..8192, 4096..4608, 0..512].into_iter().enumerate() {
                scope.spawn(move || enter(name, range));
                until_waiting(&flight, name + 1);
            }
            enter(9, 1 << 30..(1 << 30) + 512);
            drop(first);
        });
        let order = order.into_inner().unwrap();
        assert_eq!(order[..2], [9, 0], "the disjoint one at once, the large one next");
        let place = |name| order.iter().position(|found| *found == name).unwrap();
        assert!(place(1) < place(2), "{order:?}");
        assert_eq!(order.len(), 5);
    }

    #[test]
    fn the_barrier_waits_for_those_before_it_and_no_others() {
        let flight = InFlight::default();
        let before = flight.enter(0..512).unwrap();
        let mark = flight.now();
        let after = flight.enter(512..1024).unwrap();
        assert!(!flight.until_left(mark, Duration::from_millis(1)));
        thread::scope(|scope| {
            let barrier = scope.spawn(|| flight.until_left(mark, Duration::from_secs(20)));
            until_waiting(&flight, 1);
            drop(before);
            assert!(barrier.join().unwrap(), "what came after does not hold it up");
        });
        drop(after);
    }

    #[test]
    fn close_lets_nothing_begin_and_waits_for_what_has() {
        let flight = InFlight::default();
        let first = flight.enter(0..512).unwrap();
        let nothing = flight.enter(0..0).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| flight.enter(0..512).map(|_| ()));
            until_waiting(&flight, 1);
            assert!(!flight.close(Duration::from_millis(1)), "two are in flight");
            let refused = waiter.join().unwrap().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::SHUTDOWN.raw_os_error()));
            assert!(flight.enter(1 << 20..2 << 20).is_err());
            drop(nothing);
            let closer = scope.spawn(|| flight.close(Duration::from_secs(20)));
            until_waiting(&flight, 1);
            drop(first);
            assert!(closer.join().unwrap());
        });
        assert!(flight.close(Duration::ZERO));
    }
}
