// SPDX-License-Identifier: GPL-2.0
//! Data plane: what happens to each write of an attached device, from its submission to its end.
//!
//! ```text
//!  block_bio_queue   submitted      room and lsn, payload copied, end_io wrapped, counted in flight
//!  block_getrq …     has a request  a withheld record is shown; a write that was traced before the attach is caught
//!  end_io            over           failed: dirty bits and a `failed` record; the count drops; the owner's end_io runs
//! ```
//!
//! Rules: no allocation, no sleep, no panic (arithmetic is checked in this kernel: a plain `+` that overflows
//! stops the machine). Every write is in the ring or in the bitmaps before this returns; an application never
//! waits for the agent.
//!
//! # NOWAIT
//!
//! io_uring submits with REQ_NOWAIT first, and tries again from a worker when that is refused: under a deep
//! queue two of three such bios never reach the device. Their records are withheld until they have a request,
//! and void when they end without one. What stands behind them in the ring waits for that moment, which is
//! within the same submission.

use crate::abi::Op;
use crate::attached::{Attached, Part};
use crate::bio::Bio;
use crate::contexts::Context;
use crate::entry::Entry;
use crate::group;
use crate::reservation::Withheld;
use crate::ring::Captured;
use crate::sys;
use core::sync::atomic::{AtomicU32, Ordering};
use kernel::bindings;
use kernel::ffi::{c_uint, c_void};

/// Probe of `block_bio_queue`.
///
/// # Safety
///
/// `data` is the `Attached` that it was registered for, alive until it is unregistered and probes are waited
/// for; `bio` is being submitted.
pub(crate) unsafe extern "C" fn queued(data: *mut c_void, bio: *mut bindings::bio) {
    // SAFETY: by the contract.
    let (attached, bio) = unsafe { (&*data.cast::<Attached>(), Bio::new(bio)) };
    if bio.disk() != attached.disk() {
        return;
    }
    if !group::is_measuring() {
        return capture(attached, bio, false);
    }
    let from = sys::kf_monotonic_ns();
    capture(attached, bio, false);
    attached.group().counters.measured(sys::kf_monotonic_ns().wrapping_sub(from));
}

/// Probe of `block_getrq`, `block_bio_backmerge` and `block_bio_frontmerge`: the bio has found its request.
///
/// # Safety
///
/// As for `queued`.
pub(crate) unsafe extern "C" fn has_request(data: *mut c_void, bio: *mut bindings::bio) {
    // SAFETY: by the contract.
    let (attached, bio) = unsafe { (&*data.cast::<Attached>(), Bio::new(bio)) };
    if bio.disk() != attached.disk() || bio.op().is_none() || bio.place().1 == 0 {
        return;
    }
    match followed(attached, bio) {
        // SAFETY: the bio is not over, so its context is its own.
        Some(context) => unsafe {
            show(attached, context, true);
        },
        None => {
            if attached.part_of(bio).is_some() {
                attached.group().counters.late.fetch_add(1, Ordering::Relaxed);
                capture(attached, bio, true);
            }
        }
    }
}

/// Probe of `block_rq_complete`: merges of discards have no tracepoint, so one that was submitted before the
/// attach and merged after it is found here. And commands that are no bios of a file system's making (SG_IO,
/// NVMe passthrough) pass here only; one that carries data to the device may have written anywhere.
///
/// # Safety
///
/// As for `queued`; `request` is being completed, its bios are not.
pub(crate) unsafe extern "C" fn completed(
    data: *mut c_void,
    request: *mut bindings::request,
    _error: bindings::blk_status_t,
    _bytes: c_uint,
) {
    // SAFETY: by the contract.
    let (attached, request) = unsafe { (&*data.cast::<Attached>(), &*request) };
    let op = request.cmd_flags & 0xff;
    if op == bindings::req_op_REQ_OP_DRV_OUT {
        // SAFETY: the disk is pinned by the open device. Bios of such a request need not name a device.
        if request.q == unsafe { (*attached.disk()).queue } {
            attached.pass_unseen();
        }
        return;
    }
    if op != bindings::req_op_REQ_OP_DISCARD && op != bindings::req_op_REQ_OP_SECURE_ERASE {
        return;
    }
    let mut next = request.bio;
    while !next.is_null() {
        // SAFETY: bios of a request that is not completed yet.
        let bio = unsafe { Bio::new(next) };
        // SAFETY: as above.
        next = unsafe { (*next).bi_next };
        if bio.disk() != attached.disk() || followed(attached, bio).is_some() {
            continue;
        }
        if let Some(part) = attached.part_of(bio) {
            attached.group().counters.late.fetch_add(1, Ordering::Relaxed);
            attached.leave_out(part.offset, part.length);
        }
    }
}

/// Finds our context on the bio, below somebody else's wrapping that is ours as well, or on the bio that it
/// was split from.
///
/// ⚠ A parent by chaining need not be what the child was split from (`bio_chain_and_submit` chains
/// neighbours): its context stands for the child only where the child is a clone, and lies within what was
/// captured.
fn followed(attached: &Attached, bio: Bio) -> Option<*mut Context> {
    let (end_io, private) = bio.owner();
    if let Some(context) = ours(attached, end_io, private) {
        return Some(context);
    }
    if end_io != group::chain_end_io() || !bio.is_clone() {
        return None;
    }
    // SAFETY: the parent of a chained bio waits for it.
    let parent = unsafe { Bio::new(private.cast()) };
    let (end_io, private) = parent.owner();
    let context = ours(attached, end_io, private)?;
    let part = attached.part_of(bio)?;
    // SAFETY: a wrapped bio that is not over has a context of its own.
    let (offset, length) = unsafe { ((*context).offset, (*context).length) };
    let is_inside =
        offset <= part.offset && part.offset.wrapping_add(part.length) <= offset.wrapping_add(length);
    is_inside.then_some(context)
}

/// Our context among those that one bio carries.
fn ours(attached: &Attached, mut end_io: usize, mut private: *mut c_void) -> Option<*mut Context> {
    while end_io == over as *const () as usize {
        let context = private.cast::<Context>();
        // SAFETY: a wrapped bio that is not over has a context of its own.
        unsafe {
            if core::ptr::eq((*context).attached, attached) {
                return Some(context);
            }
            end_io = (*context).end_io.map_or(0, |function| function as usize);
            private = (*context).private;
        }
    }
    None
}

/// Gives a write its place in the order, or its bits, and follows it to its end.
fn capture(attached: &Attached, bio: Bio, is_late: bool) {
    let Some(op) = bio.op() else { return };
    let Some(part) = attached.part_of(bio) else {
        if bio.place().1 == 0 && bio.flags() & crate::abi::FLAG_PREFLUSH != 0 {
            attached.note_flush();
        }
        return;
    };
    attached.see_end(part.offset.saturating_add(part.length));
    let group = attached.group();
    let context = group.contexts.take();
    // Counted before the choice between ring and bits is made: see `Attached::enter`.
    let generation = attached.enter();
    let Some(context) = context else {
        // Its end will not be seen, so the next barrier must drain the whole queue.
        attached.lose_track(generation);
        attached.leave_out(part.offset, part.length);
        group.counters.untracked.fetch_add(1, Ordering::Relaxed);
        attached.leave(generation);
        return;
    };
    // A merged discard passes no tracepoint that would show it.
    let withhold = op == Op::Write && bio.is_nowait() && !is_late && !attached.is_bio_based();
    let (lsn, withheld) = record(attached, bio, op, &part, withhold);
    // SAFETY: the context is ours alone until the bio carries it; the bio is not under way yet.
    unsafe {
        (*context).end_io = (*bio.raw()).bi_end_io;
        (*context).private = (*bio.raw()).bi_private;
        (*context).attached = attached;
        (*context).offset = part.offset;
        (*context).length = part.length;
        (*context).lsn = lsn;
        (*context).generation = generation;
        (*context).is_withheld = AtomicU32::new(u32::from(withheld.is_some()));
        (*context).withheld = withheld;
        bio.wrap(over, context.cast());
    }
}

/// Puts the write into the ring, or sets its bits. Its first lsn, or 0.
fn record(attached: &Attached, bio: Bio, op: Op, part: &Part, withhold: bool) -> (u64, Option<Withheld>) {
    let group = attached.group();
    let counters = &group.counters;
    // One that takes more than half of the ring would leave all others without room, whatever the agent does:
    // its own range is read again instead.
    let is_oversize = part.length > group.ring.ring_bytes() / 2;
    if op == Op::Write && (is_oversize || !bio.is_readable()) {
        counters.unreadable.fetch_add(1, Ordering::Relaxed);
        attached.leave_out(part.offset, part.length);
        return (0, None);
    }
    let (volume, flags, now_ns) = (attached.volume(), bio.flags(), sys::kf_realtime_ns());
    let reserved = if op == Op::Write {
        let pieces = Entry::write(volume, part.offset, part.length, flags);
        group.ring.reserve_many(pieces.map(|piece| Entry { needs_done: false, ..piece }), now_ns)
    } else {
        let entry = Entry::extent(op, volume, part.offset, part.length, flags);
        group.ring.reserve(Entry { needs_done: false, ..entry }, now_ns)
    };
    match reserved {
        Ok(Captured::Ring(mut reservation)) => {
            counters.ring_writes.fetch_add(1, Ordering::Relaxed);
            if op == Op::Write {
                let mut copied = 0_u64;
                bio.payload(part.skip, part.length, |bytes| {
                    reservation.fill(bytes);
                    copied = copied.wrapping_add(bytes.len() as u64);
                });
                counters.copied_bytes.fetch_add(copied, Ordering::Relaxed);
                if copied != part.length {
                    // Its pages hold less than it says. Dropped, the records are void.
                    attached.leave_out(part.offset, part.length);
                    return (0, None);
                }
            }
            let lsn = reservation.first_lsn();
            if withhold {
                return (lsn, Some(reservation.withhold()));
            }
            let _ = reservation.publish();
            (lsn, None)
        }
        Ok(Captured::Bits) => {
            counters.bitmap_writes.fetch_add(1, Ordering::Relaxed);
            (0, None)
        }
        Err(_) => {
            // A write beyond the end that the device itself tells: nothing is known of this volume any more.
            group.ring.set_mode_bitmap(crate::dirty::CAUSE_AGENT, now_ns);
            attached.owe_all();
            (0, None)
        }
    }
}

/// Shows withheld records, once: as they are when the write reaches the device, else as void. Whether it was
/// this call that did.
///
/// # Safety
///
/// The context belongs to a bio that is not over.
unsafe fn show(attached: &Attached, context: *mut Context, started: bool) -> bool {
    // SAFETY: by the contract.
    let context = unsafe { &*context };
    if context.is_withheld.load(Ordering::Relaxed) == 0 || context.is_withheld.swap(0, Ordering::AcqRel) == 0
    {
        return false;
    }
    if let Some(withheld) = context.withheld {
        attached.group().ring.settle(withheld, started);
        if !started {
            attached.group().counters.void.fetch_add(1, Ordering::Relaxed);
        }
    }
    true
}

/// The end of a followed bio, in any context.
///
/// Order: 1 the bio gets its owner's fields back, which the owner may look at; 2 a failure leaves its bits; 3
/// the context goes back; 4 the count drops, and a barrier may pass; 5 the owner's end_io, after which the
/// bio may be gone.
///
/// # Safety
///
/// Called by the block layer for a bio that `capture` wrapped, once.
pub(crate) unsafe extern "C" fn over(bio: *mut bindings::bio) {
    // SAFETY: `capture` put the context there, and nobody else takes it away.
    let (context, attached) = unsafe {
        let context = (*bio).bi_private.cast::<Context>();
        (context, &*(*context).attached)
    };
    // SAFETY: as above.
    let (end_io, private, generation) =
        unsafe { ((*context).end_io, (*context).private, (*context).generation) };
    // SAFETY: the bio is over, and ours until its owner's end_io is called.
    let status = unsafe {
        (*bio).bi_end_io = end_io;
        (*bio).bi_private = private;
        Bio::new(bio).status()
    };
    // SAFETY: the context is still the bio's.
    let was_withheld = unsafe { show(attached, context, status == 0) };
    if status != 0 && !was_withheld {
        // SAFETY: as above.
        unsafe { failed(attached, &*context) };
    }
    attached.group().contexts.put(context);
    attached.leave(generation);
    match end_io {
        // SAFETY: the bio carries its owner's fields again; the worker ends it.
        Some(function) if function as usize == group::chain_end_io() => unsafe { sys::kf_chain_finish(bio) },
        // SAFETY: the owner's function, for the owner's bio.
        Some(function) => unsafe { function(bio) },
        None => {}
    }
}

/// A write that may have reached the device in part: what stands there is to be read again. The bits outlive
/// the agent; the record tells the stream which lsn is inexact.
#[cold]
fn failed(attached: &Attached, context: &Context) {
    let group = attached.group();
    group.counters.failed.fetch_add(1, Ordering::Relaxed);
    attached.mark_dirty(context.offset, context.length);
    if context.lsn != 0 {
        attached.note_failed(context.offset, context.length, context.lsn);
    }
}
