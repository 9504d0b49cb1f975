//! MACHINE: the clocks, threads and waiting places that all rooms use, so that a simulation can stand in for
//! them.
//!
//! On its own every function here is the standard library's, one thread-local look away. A thread that
//! belongs to a [`World`] asks that instead: there is virtual time, one thread runs at a time, and whoever
//! waits lets the world choose who is next. So a seed decides every interleaving of the very code that runs
//! in production, and replays it.
//!
//! State: which world this thread belongs to. Threads started by [`spawn`] belong to the world of their
//! parent.
//!
//! Invariants: a thread of a world never blocks but through this crate, else the whole world stands still.
//! What may be contended is therefore a [`Mutex`] of this crate; critical sections that neither wait nor
//! touch a disk may keep to std's.

mod caught;
pub mod disk;
mod sync;
pub mod text;
mod thread;
mod world;

pub use caught::{caught, said};
pub use sync::{Condvar, Mutex, MutexGuard};
pub use thread::{JoinHandle, spawn};
pub use world::{World, enter, is_simulated};

use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What a thread may have of a core before it gives way.
const TURN: Duration = Duration::from_micros(500);

/// The monotonic clock.
#[inline]
pub fn now() -> Instant {
    match world::current() {
        Some(world) => world.now(),
        None => Instant::now(),
    }
}

/// Time since an instant of [`now`].
#[inline]
pub fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}

/// Realtime, nanoseconds since 1970; 0 for a clock before it. Can be set, and then jumps.
#[inline]
pub fn realtime_ns() -> u64 {
    match world::current() {
        Some(world) => world.realtime_ns(),
        None => {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        }
    }
}

/// Time since boot in the simulated world; `None` on the real machine, whose clocks the caller knows.
pub fn simulated_boot_ns() -> Option<u64> {
    world::current().map(|world| world.boot_ns())
}

/// Between pieces of background work: lets whoever waits for this core have it, once this thread has had half
/// a millisecond. The scheduler lets a thread run on for up to a tick (4 ms at 250 Hz), and an application's
/// write passes several threads, each of which may wait for that (decision 0023). A simulation interleaves by
/// itself.
#[inline]
pub fn give_way() {
    thread_local! {
        static GAVE_WAY: Cell<Option<Instant>> = const { Cell::new(None) };
    }
    if is_simulated() {
        return;
    }
    let now = Instant::now();
    if GAVE_WAY.get().is_none_or(|then| now - then >= TURN) {
        std::thread::yield_now();
        GAVE_WAY.set(Some(now));
    }
}

/// Sleeps.
pub fn sleep(time: Duration) {
    match world::current() {
        Some(world) => world.sleep(time),
        None => std::thread::sleep(time),
    }
}

/// A random number: from the operating system's source of the standard library's hasher, or the world's seed.
/// Not for keys.
pub fn random_u64() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    match world::current() {
        Some(world) => world.random_u64(),
        None => std::collections::hash_map::RandomState::new().build_hasher().finish(),
    }
}

/// How long a thread of a world sleeps between two attempts of [`block`]: at first, doubled up to the
/// longest.
const ATTEMPT: Duration = Duration::from_micros(300);
const LONGEST_ATTEMPT: Duration = Duration::from_millis(10);

/// Waits in `real`, a call that blocks this thread by other means than this crate's; in a world `attempt` is
/// made again and again until it succeeds. Both do the same thing.
pub fn block<T>(mut attempt: impl FnMut() -> Option<T>, real: impl FnOnce() -> T) -> T {
    let Some(world) = world::current() else { return real() };
    let mut pause = ATTEMPT;
    loop {
        if let Some(done) = attempt() {
            return done;
        }
        world.sleep(pause);
        pause = (pause * 2).min(LONGEST_ATTEMPT);
    }
}

/// The same for calls that have a time limit; `None` when it was over first. `real` keeps to the limit by
/// itself.
pub fn block_for<T>(
    at_most: Duration,
    mut attempt: impl FnMut() -> Option<T>,
    real: impl FnOnce() -> Option<T>,
) -> Option<T> {
    let Some(world) = world::current() else { return real() };
    let ends = world.now() + at_most;
    let mut pause = ATTEMPT;
    loop {
        if let Some(done) = attempt() {
            return Some(done);
        }
        let left = ends.saturating_duration_since(world.now());
        if left.is_zero() {
            return None;
        }
        world.sleep(left.min(pause));
        pause = (pause * 2).min(LONGEST_ATTEMPT);
    }
}
