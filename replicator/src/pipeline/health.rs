//! Whether the source journal takes frames, as everybody but the pipeline sees it.

use machine::{Mutex, MutexGuard};
use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU8, Ordering};

const TAKES: u8 = 0;
const SHORT: u8 = 1;
const BROKEN: u8 = 2;

/// Written by the pipeline, read by all.
#[derive(Debug, Default)]
pub struct Health {
    state: AtomicU8,
    /// Why it takes none, in an operator's words.
    why: Mutex<String>,
    /// Volumes whose record was given up: the stream does not know them, or their size.
    untold: Mutex<BTreeSet<u32>>,
}

impl Health {
    /// Frames are appended.
    pub fn is_good(&self) -> bool {
        self.state.load(Ordering::Acquire) == TAKES
    }

    /// Nothing more is journaled in this run.
    pub fn is_broken(&self) -> bool {
        self.state.load(Ordering::Acquire) == BROKEN
    }

    /// No room: it goes on by itself when there is some again.
    pub fn is_short(&self) -> bool {
        self.state.load(Ordering::Acquire) == SHORT
    }

    /// Why it takes none; empty while it does.
    pub fn why(&self) -> String {
        if self.is_good() { String::new() } else { lock(&self.why).clone() }
    }

    /// Whether the stream lacks a volume's newest record.
    pub fn is_untold(&self, volume: u32) -> bool {
        self.untold().contains(&volume)
    }

    pub(crate) fn leave_untold(&self, volume: u32) {
        self.untold().insert(volume);
    }

    pub(crate) fn told(&self, volume: u32) {
        self.untold().remove(&volume);
    }

    fn untold(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        lock(&self.untold)
    }

    pub(crate) fn good(&self) {
        self.state.store(TAKES, Ordering::Release);
    }

    pub(crate) fn short(&self, why: &str) {
        why.clone_into(&mut lock(&self.why));
        self.state.store(SHORT, Ordering::Release);
    }

    pub(crate) fn broken(&self, why: &str) {
        why.clone_into(&mut lock(&self.why));
        self.state.store(BROKEN, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
