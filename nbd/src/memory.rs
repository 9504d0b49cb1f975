//! Memory that all connections of an agent share, for what is larger than a connection's own.
//!
//! A connection has a fixed allowance (its inbox, [`OWN_REPLY_BYTES`] of replies). A WRITE longer than one
//! piece is collected before any of it is handed over, and replies beyond the allowance wait for their
//! client: both take from a [`Memory`], whole and in the order they came, so that many clients that do not
//! read, or stop in the middle of a payload, cost a bounded amount. Writes and replies have one each: what a
//! reply holds is freed by its client, which may be waiting to send a write.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Replies that a connection may hold, reserved or unsent, out of its own.
pub(crate) const OWN_REPLY_BYTES: usize = 2 << 20;
/// One permit.
const UNIT_BYTES: usize = 4 << 10;

/// A budget in bytes; clones share it.
#[derive(Debug, Clone)]
pub struct Memory {
    free: Arc<Semaphore>,
    units: usize,
    waiting: Arc<AtomicUsize>,
}

/// A part of a [`Memory`], given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    _permit: OwnedSemaphorePermit,
}

impl Memory {
    /// A budget of so many bytes. What is larger than all of it waits for all of it.
    pub fn new(bytes: usize) -> Self {
        let units = (bytes / UNIT_BYTES).max(1);
        Self { free: Arc::new(Semaphore::new(units)), units, waiting: Arc::default() }
    }

    fn permits(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT_BYTES).clamp(1, self.units)).unwrap_or(u32::MAX)
    }

    /// A share, if there is room now and nobody waits.
    pub(crate) fn try_take(&self, bytes: usize) -> Option<Share> {
        let permit = Arc::clone(&self.free).try_acquire_many_owned(self.permits(bytes)).ok()?;
        Some(Share { _permit: permit })
    }

    /// Waits for a share.
    pub(crate) async fn take(self, bytes: usize) -> Share {
        struct Waits(Arc<AtomicUsize>);
        impl Drop for Waits {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waits = Waits(Arc::clone(&self.waiting));
        let permit = Arc::clone(&self.free).acquire_many_owned(self.permits(bytes)).await;
        Share { _permit: permit.expect("invariant: the semaphore is never closed") }
    }

    /// Whether anybody waits for a share.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn shares_are_bounded_and_come_back() {
        let memory = Memory::new(8 * UNIT_BYTES);
        let first = memory.try_take(5 * UNIT_BYTES).unwrap();
        assert!(memory.try_take(4 * UNIT_BYTES).is_none());
        let _rest = memory.try_take(3 * UNIT_BYTES).unwrap();
        assert!(!memory.is_wanted());
        let waiter = tokio::spawn(memory.clone().take(UNIT_BYTES));
        while !memory.is_wanted() {
            tokio::task::yield_now().await;
        }
        drop(first);
        drop(waiter.await.unwrap());
        assert!(!memory.is_wanted());
        drop(_rest);
        // More than there is: all of it, and not for ever.
        drop(memory.clone().take(100 * UNIT_BYTES).await);
    }
}
