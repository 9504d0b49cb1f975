// SPDX-License-Identifier: GPL-2.0
//! Places for what belongs to a followed bio, taken and given back without a lock and without an allocation.
//!
//! A stack of indices. Its top carries a tag that changes at every take and return, so that a top which has
//! come back to the same index is not mistaken for the one that was read (ABA).
//!
//! # Invariants
//!
//! An index is on the stack, or with exactly one bio.

use crate::attached::Attached;
use crate::reservation::Withheld;
use crate::sys::{EndIo, Pages};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use kernel::ffi::c_void;

const END: u32 = u32::MAX;

/// What a bio's end must know.
#[repr(C)]
pub(crate) struct Context {
    /// The bio's own.
    pub(crate) end_io: Option<EndIo>,
    /// The bio's own.
    pub(crate) private: *mut c_void,
    /// Whose write it is.
    pub(crate) attached: *const Attached,
    /// Byte range in the volume.
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// First lsn in the ring; 0 when the write only set bits.
    pub(crate) lsn: u64,
    /// Which of the two counts it is in.
    pub(crate) generation: u32,
    /// 1 while `withheld` waits to be settled; whoever swaps it to 0 settles.
    pub(crate) is_withheld: AtomicU32,
    /// Records that wait until it is known that the write reaches the device.
    pub(crate) withheld: Option<Withheld>,
    next: AtomicU32,
    index: u32,
}

/// A pool of contexts.
pub(crate) struct Contexts {
    pages: Pages,
    count: u32,
    /// Tag in the upper half, index in the lower.
    top: AtomicU64,
}

impl Contexts {
    pub(crate) const fn bytes(count: u32) -> u64 {
        (count as u64).wrapping_mul(core::mem::size_of::<Context>() as u64)
    }

    pub(crate) fn new(count: u32) -> Option<Self> {
        let contexts =
            Self { pages: Pages::private(Self::bytes(count))?, count, top: AtomicU64::new(u64::from(END)) };
        for index in 0..count {
            // SAFETY: zeroed memory for `count` contexts; all zeros is a valid context but for the option of
            // `withheld`, which is written before it is read.
            unsafe { (*contexts.at(index)).index = index };
            contexts.put(contexts.at(index));
        }
        Some(contexts)
    }

    fn at(&self, index: u32) -> *mut Context {
        debug_assert!(index < self.count);
        // Every index on the stack is below `count`.
        self.pages.start().cast::<Context>().wrapping_add(index as usize)
    }

    /// A context that is nobody else's, or `None` when all are in use.
    #[inline]
    pub(crate) fn take(&self) -> Option<*mut Context> {
        let mut top = self.top.load(Ordering::Acquire);
        loop {
            let index = top as u32;
            if index == END {
                return None;
            }
            let context = self.at(index);
            // SAFETY: contexts are never freed while the pool lives. Taken by another meanwhile, `next` may
            // be anything; then the tag has changed, and the exchange fails.
            let next = unsafe { (*context).next.load(Ordering::Relaxed) };
            let new = next_tag(top) | u64::from(next);
            match self.top.compare_exchange_weak(top, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(context),
                Err(seen) => top = seen,
            }
        }
    }

    /// Gives a context back.
    #[inline]
    pub(crate) fn put(&self, context: *mut Context) {
        // SAFETY: the caller's alone until the exchange succeeds.
        let (next, index) = unsafe { (&(*context).next, (*context).index) };
        let mut top = self.top.load(Ordering::Relaxed);
        loop {
            next.store(top as u32, Ordering::Relaxed);
            let new = next_tag(top) | u64::from(index);
            match self.top.compare_exchange_weak(top, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => top = seen,
            }
        }
    }
}

const fn next_tag(top: u64) -> u64 {
    (top >> 32).wrapping_add(1) << 32
}
