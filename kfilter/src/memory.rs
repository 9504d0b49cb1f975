// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! What the ring asks of the place where it runs: memory, one lock, and a bell after each publish.
//!
//! The algorithm names every shared access through `Memory`, so that the same source runs over a tmpfs
//! mapping, over the kernel's own pages, over loom's atomics (`tests/loom.rs`), and over a memory that stops
//! after every store (`testing.rs`).

use super::ring::Reserver;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

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
}

/// A length or offset as an index.
#[allow(clippy::cast_possible_truncation, reason = "the crate refuses to compile on anything but 64 bits")]
pub(super) const fn index(bytes: u64) -> usize {
    bytes as usize
}

/// Plain memory by address and length.
#[derive(Debug)]
pub struct Span {
    base: NonNull<u8>,
    len: u64,
}

// SAFETY: a span is an address; every access through it is atomic, or excluded from others by the contract of
// `write` and `bytes`.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// # Safety
    /// `base` is aligned to 64 bytes and valid for reads and writes of `len` bytes as long as the span lives,
    /// and is accessed by this algorithm only.
    pub const unsafe fn new(base: NonNull<u8>, len: u64) -> Self {
        Self { base, len }
    }

    fn at(&self, at: u64, len: u64, align: u64) -> *mut u8 {
        assert!(at % align == 0 && len <= self.len && at <= self.len - len, "outside the ring's memory");
        // SAFETY: in bounds by the assert; the length of a span fits the address space, hence `usize`.
        unsafe { self.base.as_ptr().add(index(at)) }
    }

    fn word32(&self, at: u64) -> &AtomicU32 {
        // SAFETY: in bounds and aligned (`at`), valid as long as `self` (`new`), and state words and control
        // words are only accessed as atomics while they are one.
        unsafe { AtomicU32::from_ptr(self.at(at, 4, 4).cast()) }
    }

    fn word64(&self, at: u64) -> &AtomicU64 {
        // SAFETY: as for `word32`.
        unsafe { AtomicU64::from_ptr(self.at(at, 8, 8).cast()) }
    }
}

// SAFETY: `new` demands memory that stays valid and is ours alone.
unsafe impl Memory for Span {
    fn len(&self) -> u64 {
        self.len
    }
    #[inline]
    fn load32(&self, at: u64, order: Ordering) -> u32 {
        self.word32(at).load(order)
    }
    #[inline]
    fn load64(&self, at: u64, order: Ordering) -> u64 {
        self.word64(at).load(order)
    }
    #[inline]
    fn store32(&self, at: u64, value: u32, order: Ordering) {
        self.word32(at).store(value, order);
    }
    #[inline]
    fn store64(&self, at: u64, value: u64, order: Ordering) {
        self.word64(at).store(value, order);
    }
    #[inline]
    fn or32(&self, at: u64, bits: u32, order: Ordering) -> u32 {
        self.word32(at).fetch_or(bits, order)
    }
    #[inline]
    fn or64(&self, at: u64, bits: u64, order: Ordering) -> u64 {
        self.word64(at).fetch_or(bits, order)
    }
    #[inline]
    fn and64(&self, at: u64, bits: u64, order: Ordering) -> u64 {
        self.word64(at).fetch_and(bits, order)
    }
    #[inline]
    unsafe fn write(&self, at: u64, bytes: &[u8]) {
        let to = self.at(at, bytes.len() as u64, 1);
        // SAFETY: in bounds (`at`), and the caller excludes other accesses.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }
    #[inline]
    unsafe fn bytes(&self, at: u64, len: u64) -> &[u8] {
        let from = self.at(at, len, 1);
        // SAFETY: in bounds (`at`), and the caller excludes writes.
        unsafe { core::slice::from_raw_parts(from, index(len)) }
    }
}
