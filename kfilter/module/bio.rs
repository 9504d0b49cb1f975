// SPDX-License-Identifier: GPL-2.0
//! What a bio says at the hook: operation, place, payload.

use crate::abi::{FLAG_FUA, FLAG_PREFLUSH, Op};
use crate::sys::{self, EndIo};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use kernel::bindings;
use kernel::ffi::c_void;

/// log2 of the block layer's sector.
pub(crate) const SECTOR_SHIFT: u32 = 9;
const PAGE_BYTES: usize = 4096;

/// A bio that is being submitted, or is on its way.
///
/// # Invariants
///
/// The bio is valid, and has not come to its end, as long as the value lives.
#[derive(Clone, Copy)]
pub(crate) struct Bio(*mut bindings::bio);

impl Bio {
    /// # Safety
    ///
    /// The bio has not come to its end, and does not before the value is gone.
    #[inline]
    pub(crate) unsafe fn new(bio: *mut bindings::bio) -> Self {
        Self(bio)
    }

    #[inline]
    pub(crate) fn raw(self) -> *mut bindings::bio {
        self.0
    }

    #[inline]
    fn opf(self) -> u32 {
        // SAFETY: by the invariant.
        unsafe { (*self.0).bi_opf }
    }

    /// What it changes; `None` for reads and for what carries no change.
    #[inline]
    pub(crate) fn op(self) -> Option<Op> {
        match self.opf() & 0xff {
            bindings::req_op_REQ_OP_WRITE => Some(Op::Write),
            bindings::req_op_REQ_OP_DISCARD | bindings::req_op_REQ_OP_SECURE_ERASE => Some(Op::Discard),
            bindings::req_op_REQ_OP_WRITE_ZEROES => Some(Op::WriteZeroes),
            _ => None,
        }
    }

    /// `FLAG_*`.
    #[inline]
    pub(crate) fn flags(self) -> u8 {
        let has = |bit: u32| self.opf() & (1 << bit) != 0;
        let mut flags = 0;
        if has(bindings::req_flag_bits___REQ_FUA) {
            flags |= FLAG_FUA;
        }
        if has(bindings::req_flag_bits___REQ_PREFLUSH) {
            flags |= FLAG_PREFLUSH;
        }
        flags
    }

    /// Whether it may be refused instead of waiting for a request.
    #[inline]
    pub(crate) fn is_nowait(self) -> bool {
        self.opf() & (1 << bindings::req_flag_bits___REQ_NOWAIT) != 0
    }

    /// Whether it was made from another, as by a split.
    #[inline]
    pub(crate) fn is_clone(self) -> bool {
        // SAFETY: by the invariant.
        unsafe { (*self.0).bi_flags & (1 << bindings::BIO_CLONED) != 0 }
    }

    /// Who is told of its end, and with what. Others may wrap it at this moment: see `wrap`.
    #[inline]
    pub(crate) fn owner(self) -> (usize, *mut c_void) {
        // SAFETY: by the invariant; both fields are words of their own.
        unsafe {
            let end_io = AtomicUsize::from_ptr((&raw mut (*self.0).bi_end_io).cast()).load(Ordering::Acquire);
            let private = AtomicPtr::from_ptr(&raw mut (*self.0).bi_private).load(Ordering::Relaxed);
            (end_io, private)
        }
    }

    /// Puts our function and context in the place of its owner's. Whoever sees the function sees the context.
    ///
    /// # Safety
    ///
    /// The bio is not under way yet, so only readers look at it.
    #[inline]
    pub(crate) unsafe fn wrap(self, end_io: EndIo, private: *mut c_void) {
        // SAFETY: by the invariant and the contract.
        unsafe {
            AtomicPtr::from_ptr(&raw mut (*self.0).bi_private).store(private, Ordering::Relaxed);
            AtomicUsize::from_ptr((&raw mut (*self.0).bi_end_io).cast())
                .store(end_io as usize, Ordering::Release);
        }
    }

    /// The disk that it goes to.
    #[inline]
    pub(crate) fn disk(self) -> *mut bindings::gendisk {
        // SAFETY: by the invariant; a submitted bio has a device.
        unsafe { (*(*self.0).bi_bdev).bd_disk }
    }

    /// First sector on the whole disk, and bytes.
    #[inline]
    pub(crate) fn place(self) -> (u64, u64) {
        // SAFETY: by the invariant.
        let iter = unsafe { (*self.0).bi_iter };
        (iter.bi_sector, u64::from(iter.bi_size))
    }

    /// How it ended: 0, or a `blk_status_t`.
    #[inline]
    pub(crate) fn status(self) -> u8 {
        // SAFETY: by the invariant.
        unsafe { (*self.0).bi_status }
    }

    /// Whether its pages hold what reaches the device.
    #[inline]
    pub(crate) fn is_readable(self) -> bool {
        // SAFETY: by the invariant; it is a write with a payload.
        unsafe { sys::kf_bio_is_readable(self.0) }
    }

    /// Calls `each` with the payload from byte `skip` on, `length` bytes of it, a page at a time.
    #[inline]
    pub(crate) fn payload(self, skip: u64, length: u64, mut each: impl FnMut(&[u8])) {
        // SAFETY: by the invariant.
        let (mut bvec, iter) = unsafe { ((*self.0).bi_io_vec, (*self.0).bi_iter) };
        bvec = bvec.wrapping_add(iter.bi_idx as usize);
        let mut within = iter.bi_offset as usize;
        let mut left_of_bio = iter.bi_size as usize;
        let (mut skip, mut left) = (skip as usize, length as usize);
        while left > 0 && left_of_bio > 0 {
            // SAFETY: bytes are left, so this element belongs to the bio.
            let vec = unsafe { *bvec };
            let of_vec = (vec.bv_len as usize).saturating_sub(within).min(left_of_bio);
            left_of_bio = left_of_bio.wrapping_sub(of_vec);
            let from = skip.min(of_vec);
            skip = skip.wrapping_sub(from);
            let mut at = (vec.bv_offset as usize).wrapping_add(within).wrapping_add(from);
            let mut bytes = of_vec.wrapping_sub(from).min(left);
            left = left.wrapping_sub(bytes);
            while bytes > 0 {
                let in_page = at & (PAGE_BYTES - 1);
                let now = bytes.min(PAGE_BYTES.wrapping_sub(in_page));
                // SAFETY: the element covers these pages, which lie next to each other in the memory map.
                let page = unsafe { vec.bv_page.add(at / PAGE_BYTES) };
                // SAFETY: a page of the bio, which holds it; mapped until the unmap below; the application
                // may change it meanwhile, as it may under the device's own DMA, and bytes are all we read.
                unsafe {
                    let mapped = bindings::kmap_local_page(page).cast::<u8>();
                    each(core::slice::from_raw_parts(mapped.add(in_page), now));
                    bindings::kunmap_local(mapped.cast());
                }
                at = at.wrapping_add(now);
                bytes = bytes.wrapping_sub(now);
            }
            within = 0;
            bvec = bvec.wrapping_add(1);
        }
    }
}
