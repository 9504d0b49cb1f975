// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! The user side's memory of a ring: an address and a length. An access outside it aborts.

use super::memory::{Memory, index};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

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
