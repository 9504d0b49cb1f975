// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! What the ring asks of the place where it runs: memory, one lock, and a bell after each publish.
//!
//! The algorithm names every shared access through `Memory`, so that the same source runs over a tmpfs
//! mapping, over the kernel's own pages, over loom's atomics (`tests/loom.rs`), and over a memory that stops
//! after every store (`testing.rs`).

use super::ring::Reserver;
use core::sync::atomic::Ordering;

/// Bytes shared by producers, the consumer, and whoever takes over after them. Offsets outside the memory, or
/// not aligned to their word, abort.
///
/// # Safety
/// The memory stays valid, at one place, as long as the value lives, and what is stored is what is loaded.
pub unsafe trait Memory {
    /// Bytes.
    fn len(&self) -> u64;
    /// Whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Atomic load.
    fn load32(&self, at: u64, order: Ordering) -> u32;
    /// Atomic load.
    fn load64(&self, at: u64, order: Ordering) -> u64;
    /// Atomic store.
    fn store32(&self, at: u64, value: u32, order: Ordering);
    /// Atomic store.
    fn store64(&self, at: u64, value: u64, order: Ordering);
    /// Atomic or; the value before it.
    fn or32(&self, at: u64, bits: u32, order: Ordering) -> u32;
    /// Atomic or; the value before it.
    fn or64(&self, at: u64, bits: u64, order: Ordering) -> u64;
    /// Atomic and; the value before it.
    fn and64(&self, at: u64, bits: u64, order: Ordering) -> u64;
    /// Plain copy into the memory.
    ///
    /// # Safety
    /// Nobody else reads or writes these bytes meanwhile.
    unsafe fn write(&self, at: u64, bytes: &[u8]);
    /// The bytes themselves.
    ///
    /// # Safety
    /// Nobody writes these bytes as long as the slice lives.
    unsafe fn bytes(&self, at: u64, len: u64) -> &[u8];
}

/// A ring's surroundings.
///
/// # Safety
/// `locked` runs one closure at a time, each seeing what the ones before it did, always with the same
/// `Reserver`, which is `Reserver::new()` at first.
pub unsafe trait Host {
    /// Where the ring lies.
    type Memory: Memory;
    /// Where the ring lies.
    fn memory(&self) -> &Self::Memory;
    /// Runs the closure under the reservation lock, which lives in the memory of the process (or the kernel),
    /// never in the ring: it must not survive its holder.
    fn locked<R>(&self, critical: impl FnOnce(&mut Reserver) -> R) -> R;
    /// Called after each publish, possibly under the lock: wakes the consumer if it sleeps.
    fn published(&self);
    /// An invariant does not hold: a bug. Ends the process, or, where that would be a disk's own machine,
    /// tells it and returns; what was asked for is then not done.
    #[cold]
    fn broken(&self, invariant: &'static str) {
        panic!("{invariant}")
    }
}

/// A length or offset as an index.
#[allow(clippy::cast_possible_truncation, reason = "the crate refuses to compile on anything but 64 bits")]
pub(super) const fn index(bytes: u64) -> usize {
    bytes as usize
}
