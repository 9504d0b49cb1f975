//! What a simulation has to be, and which one this thread belongs to.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A simulated machine room: virtual time, and threads of which one runs at a time.
///
/// A call that waits may unwind instead of returning, by `resume_unwind`, when the world ends the thread: a
/// simulated kill. It does not while the thread is unwinding already; then waits return at once.
pub trait World: Send + Sync {
    /// Virtual monotonic time.
    fn now(&self) -> Instant;
    /// Virtual realtime, ns since 1970.
    fn realtime_ns(&self) -> u64;
    /// Virtual time since boot, ns.
    fn boot_ns(&self) -> u64;
    /// Drawn from the seed.
    fn random_u64(&self) -> u64;
    /// Lets others run until the time is over.
    fn sleep(&self, time: Duration);
    /// Lets others run until somebody wakes this place or the time is over; may come back early.
    fn wait(&self, place: usize, at_most: Option<Duration>);
    /// Makes everyone who waits at a place able to run.
    fn wake(&self, place: usize);
    /// Lets others run, if the world likes.
    fn turn(&self);
    /// A thread is about to be started by the current one; its number.
    fn admit(&self, name: &str) -> u64;
    /// First call of a new thread: returns when it may run.
    fn begin(&self, thread: u64);
    /// Last call of a thread.
    fn end(&self, thread: u64);
}

thread_local! {
    static WORLD: RefCell<Option<Arc<dyn World>>> = const { RefCell::new(None) };
}

/// Makes this thread belong to a world, or to none.
pub fn enter(world: Option<Arc<dyn World>>) {
    WORLD.with(|current| *current.borrow_mut() = world);
}

/// Whether this thread belongs to a world.
#[inline]
pub fn is_simulated() -> bool {
    // A thread whose locals are gone is ending.
    WORLD.try_with(|current| current.borrow().is_some()).unwrap_or(false)
}

/// The world of this thread.
#[inline]
pub(crate) fn current() -> Option<Arc<dyn World>> {
    WORLD.try_with(|current| current.borrow().clone()).ok().flatten()
}
