//! Lets the consumer sleep while the ring is empty, without missing a publish and at the cost of a fence and
//! a load for producers.
//!
//! Producer: publish, fence, look whether the consumer sleeps. Consumer: say that it sleeps, fence, look
//! whether something is published. With both fences one of the two sees the other (Dekker); loom checks it.

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering, fence},
};
#[cfg(not(loom))]
use machine::{Condvar, Mutex, MutexGuard};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

/// A sleeping place for one consumer.
#[derive(Debug)]
pub struct Waker {
    sleeping: AtomicBool,
    gate: Mutex<()>,
    bell: Condvar,
}

impl Waker {
    /// Nobody sleeps.
    pub fn new() -> Self {
        Self { sleeping: AtomicBool::new(false), gate: Mutex::new(()), bell: Condvar::new() }
    }

    /// After a publish. No system call unless the consumer sleeps, and one for each sleep.
    #[inline]
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            self.ring();
        }
    }

    #[cold]
    fn ring(&self) {
        // Under the gate the consumer is either in its wait or has not looked yet.
        let _gate = self.enter();
        if self.sleeping.swap(false, Ordering::Relaxed) {
            self.bell.notify_one();
        }
    }

    /// Sleeps until somebody wakes us or the time is over, unless `ready` says that there is no need. Returns
    /// what `ready` says in the end; it may be false before the time is over.
    pub fn wait(&self, timeout: Duration, ready: impl Fn() -> bool) -> bool {
        if ready() {
            return true;
        }
        let gate = self.enter();
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !ready() {
            drop(self.bell.wait_timeout(gate, timeout));
        }
        self.sleeping.store(false, Ordering::Relaxed);
        ready()
    }

    fn enter(&self) -> MutexGuard<'_, ()> {
        // The gate protects nothing that a panic could leave half done.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Waker {
    fn default() -> Self {
        Self::new()
    }
}
