//! Whether the source journal takes frames, as everybody but the pipeline sees it.

use std::sync::atomic::{AtomicU8, Ordering};

const TAKES: u8 = 0;
const SHORT: u8 = 1;
const BROKEN: u8 = 2;

/// Written by the pipeline, read by all.
#[derive(Debug, Default)]
pub struct Health(AtomicU8);

impl Health {
    /// Frames are appended.
    pub fn is_good(&self) -> bool {
        self.0.load(Ordering::Acquire) == TAKES
    }

    /// Nothing more is journaled in this run.
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Acquire) == BROKEN
    }

    /// No room: it goes on by itself when there is some again.
    pub fn is_short(&self) -> bool {
        self.0.load(Ordering::Acquire) == SHORT
    }

    pub(crate) fn good(&self) {
        self.0.store(TAKES, Ordering::Release);
    }

    pub(crate) fn short(&self) {
        self.0.store(SHORT, Ordering::Release);
    }

    pub(crate) fn broken(&self) {
        self.0.store(BROKEN, Ordering::Release);
    }
}
