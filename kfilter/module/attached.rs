// SPDX-License-Identifier: GPL-2.0
//! A device from its attach to its detach: what it covers, its writes in flight, its probes.
//!
//! # Invariants
//!
//! * The device is open (which pins its disk) and a reference to the module is held as long as the value
//!   lives.
//! * `in_flight[g]` counts followed bios whose choice between ring and bits was made while the group's
//!   generation was `g`, and maybe a few later ones. So when it is zero after the generation has left `g`,
//!   none is under way.

use crate::abi::Op;
use crate::bio::{Bio, SECTOR_SHIFT};
use crate::entry::Entry;
use crate::group::{Group, Tracepoint};
use crate::{hook, ioctl, sys};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use kernel::bindings;
use kernel::error::{from_err_ptr, to_result};
use kernel::prelude::*;
use kernel::sync::Arc;

/// How long the first try to drain a queue may stop its applications; doubled after each that failed …
const DRAIN_FIRST_MS: u32 = 125;
/// … up to this, with pauses of eight times as long.
const DRAIN_LONGEST_MS: u32 = 2000;
const DRAIN_PAUSES: u32 = 8;
/// One look at the queue to the next.
const DRAIN_LOOK_MS: u32 = 10;
/// How long an attach that failed half-way waits for the bios that it has seen.
const UNDO_MS: u32 = 10_000;

/// What part of a bio is a volume's.
pub(crate) struct Part {
    /// Byte offset in the volume.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) length: u64,
    /// Bytes of the bio before it.
    pub(crate) skip: u64,
}

/// A device that is captured as a volume.
pub(crate) struct Attached {
    group: Arc<Group>,
    volume: u32,
    file: *mut bindings::file,
    bdev: *mut bindings::block_device,
    disk: *mut bindings::gendisk,
    is_partition: bool,
    is_bio_based: bool,
    /// The volume's end as the ring knows it.
    known_end: AtomicU64,
    in_flight: [AtomicU64; 2],
    /// Bios without a context, whose end is not seen.
    untracked: [AtomicU32; 2],
    /// Bios submitted before the attach may be under way.
    unsettled: AtomicBool,
    /// A command that the block layer does not understand has gone to the device: nothing is known of it any
    /// more, and its bits are not set yet.
    unseen: AtomicBool,
    /// Probes are registered.
    is_hooked: AtomicBool,
    /// When the probes were there, monotonic ns.
    hooked_ns: AtomicU64,
    /// The next try to drain: how long, and not before when.
    drain_ms: AtomicU32,
    drain_after_ns: AtomicU64,
}

// SAFETY: the pointers are to objects that `file` pins; the rest is atomic.
unsafe impl Send for Attached {}
// SAFETY: as above.
unsafe impl Sync for Attached {}

impl Attached {
    /// Opens a device; nothing is captured yet.
    pub(crate) fn open(group: Arc<Group>, volume: u32, device: u32) -> Result<Self> {
        // SAFETY: plain arguments; no holder, for reading: others are not kept out.
        let file = from_err_ptr(unsafe {
            bindings::bdev_file_open_by_dev(
                sys::kf_decode_device(device),
                sys::OPEN_READ,
                core::ptr::null_mut(),
                core::ptr::null(),
            )
        })?;
        // SAFETY: an open block device.
        let bdev = unsafe { bindings::file_bdev(file) };
        let has_module = sys::kf_module_get();
        // SAFETY: the device is open.
        let (disk, is_partition, is_bio_based, refused) = unsafe {
            let disk = (*bdev).bd_disk;
            (disk, (*disk).part0 != bdev, sys::kf_is_bio_based(disk), sys::kf_refuse(bdev))
        };
        if !has_module || refused != sys::FINE {
            // SAFETY: opened above; the module's reference was got above.
            unsafe {
                bindings::bdev_fput(file);
                if has_module {
                    sys::kf_module_put();
                }
            }
            return Err(if has_module { EMEDIUMTYPE } else { ENODEV });
        }
        // INVARIANT: open, with a reference to the module.
        Ok(Self {
            group,
            volume,
            file,
            bdev,
            disk,
            is_partition,
            is_bio_based,
            known_end: AtomicU64::new(0),
            in_flight: [const { AtomicU64::new(0) }; 2],
            untracked: [const { AtomicU32::new(0) }; 2],
            unsettled: AtomicBool::new(true),
            unseen: AtomicBool::new(false),
            is_hooked: AtomicBool::new(false),
            hooked_ns: AtomicU64::new(0),
            drain_ms: AtomicU32::new(DRAIN_FIRST_MS),
            drain_after_ns: AtomicU64::new(0),
        })
    }

    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    pub(crate) fn volume(&self) -> u32 {
        self.volume
    }

    pub(crate) fn disk(&self) -> *mut bindings::gendisk {
        self.disk
    }

    pub(crate) fn is_bio_based(&self) -> bool {
        self.is_bio_based
    }

    /// Device number in user space's form.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the device is open.
        unsafe { sys::kf_device_number(self.bdev) }
    }

    /// Size now.
    pub(crate) fn size_bytes(&self) -> u64 {
        // SAFETY: the device is open; the kernel's own readers take no lock on 64 bits either.
        unsafe { core::ptr::read_volatile(&raw const (*self.bdev).bd_nr_sectors) << SECTOR_SHIFT }
    }

    pub(crate) fn is_gone(&self) -> bool {
        // SAFETY: the device is open.
        unsafe { sys::kf_is_gone(self.disk) }
    }

    pub(crate) fn is_hooked(&self) -> bool {
        self.is_hooked.load(Ordering::Acquire)
    }

    pub(crate) fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::Relaxed)
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight.iter().map(|count| count.load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }

    /// What of the bio is this volume's; `None` when nothing is.
    #[inline]
    pub(crate) fn part_of(&self, bio: Bio) -> Option<Part> {
        let (sector, bytes) = bio.place();
        let start = sector.wrapping_shl(SECTOR_SHIFT);
        if bytes == 0 {
            return None;
        }
        if !self.is_partition {
            return Some(Part { offset: start, length: bytes, skip: 0 });
        }
        // SAFETY: the device is open.
        let first = unsafe { (*self.bdev).bd_start_sect } << SECTOR_SHIFT;
        let from = start.max(first);
        let to = start.saturating_add(bytes).min(first.saturating_add(self.size_bytes()));
        (from < to).then(|| Part {
            offset: from.wrapping_sub(first),
            length: to.wrapping_sub(from),
            skip: from.wrapping_sub(start),
        })
    }

    /// Counts a bio in flight; the generation to give back to `leave`.
    ///
    /// The generation flips after the ring has changed its mode. A bio counted in the new one makes its
    /// choice after that; one counted in the old one is waited for, whatever it chose. Read again, because a
    /// count that is raised after the waiter has looked would be seen by nobody.
    #[inline]
    pub(crate) fn enter(&self) -> u32 {
        loop {
            let generation = self.group.generation();
            self.count(generation).fetch_add(1, Ordering::SeqCst);
            if self.group.generation() == generation {
                return generation;
            }
            self.leave(generation);
        }
    }

    /// ⚠ The value may be gone when this returns, but for the grace period that `detach` waits for.
    #[inline]
    pub(crate) fn leave(&self, generation: u32) {
        let before = self.count(generation).fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.group.is_waiting() {
            self.group.wake_waiters();
        }
    }

    fn count(&self, generation: u32) -> &AtomicU64 {
        let [even, odd] = &self.in_flight;
        if generation & 1 == 0 { even } else { odd }
    }

    fn untracked(&self, generation: u32) -> &AtomicU32 {
        let [even, odd] = &self.untracked;
        if generation & 1 == 0 { even } else { odd }
    }

    /// A bio of this generation goes its way unseen.
    pub(crate) fn lose_track(&self, generation: u32) {
        self.untracked(generation).store(1, Ordering::SeqCst);
    }

    /// Before a generation's flag is used anew: what it says must not be forgotten.
    pub(crate) fn keep_track(&self, generation: u32) {
        if self.untracked(generation).swap(0, Ordering::SeqCst) != 0 {
            self.unsettled.store(true, Ordering::SeqCst);
        }
    }

    /// A write that is in no record: bits, and a `failed` record that says from where on the range is
    /// inexact.
    #[cold]
    pub(crate) fn leave_out(&self, offset: u64, length: u64) {
        self.mark_dirty(offset, length);
        self.note_failed(offset, length, self.group.ring.captured_lsn());
    }

    /// A command that the block layer only passes on is over. What it has changed is not known, so all of the
    /// volume is to be looked at again. The bits of a large one are too many for an interrupt: `mark_unseen`
    /// sets them.
    #[cold]
    pub(crate) fn pass_unseen(&self) {
        self.owe_all();
        self.group.counters.unseen.fetch_add(1, Ordering::SeqCst);
        let known = self.known_end.load(Ordering::Acquire);
        if known != 0 {
            self.note_failed(0, known, self.group.ring.captured_lsn());
        }
    }

    /// All bits are to be set, and not here: there may be more of them than an interrupt, or who holds a lock
    /// of the queue, should set.
    pub(crate) fn owe_all(&self) {
        self.unseen.store(true, Ordering::SeqCst);
    }

    /// Sets the bits that are owed. Not from an interrupt.
    pub(crate) fn mark_unseen(&self) {
        if self.unseen.swap(false, Ordering::SeqCst) {
            self.mark_dirty(0, u64::MAX);
        }
    }

    /// Tells the stream that a range is inexact from an lsn on. Without room it is bits alone, and the ring
    /// full anyway.
    pub(crate) fn note_failed(&self, offset: u64, length: u64, lsn: u64) {
        let entry = Entry::extent(Op::Failed, self.volume, offset, length, 0);
        let entry = Entry { payload_len: 8, needs_done: false, ..entry };
        let record = lsn.to_le_bytes();
        let _ = self.group.ring.capture(core::iter::once(entry), &record, sys::kf_realtime_ns());
    }

    pub(crate) fn mark_dirty(&self, offset: u64, length: u64) {
        self.group.ring.mark_dirty(self.volume, offset..offset.saturating_add(length));
    }

    pub(crate) fn note_flush(&self) {
        // A mark for the curious: where the ring takes none, nothing is lost.
        let flush = core::iter::once(Entry::event(Op::Flush, self.volume, 0));
        let _ = self.group.ring.capture(flush, &[], sys::kf_realtime_ns());
    }

    /// Before a write that ends there: when the device has grown, that is in the stream first.
    #[inline]
    pub(crate) fn see_end(&self, end: u64) {
        if end > self.known_end.load(Ordering::Acquire) {
            self.grow();
        }
    }

    /// States the size that the device has now. The agent knows the volume's name, and puts in what this
    /// leaves out. The new part is dirty: what stands there was never copied.
    #[cold]
    pub(crate) fn grow(&self) {
        let size_bytes = self.size_bytes();
        let known = self.group.ring.size_bytes(self.volume).unwrap_or(size_bytes);
        let record = size_bytes.to_le_bytes();
        // Refused when another task was first.
        let _ = self.group.ring.grow(self.volume, size_bytes, &record, sys::kf_realtime_ns());
        self.mark_dirty(known, size_bytes.saturating_sub(known));
        self.known_end.fetch_max(size_bytes, Ordering::Release);
    }

    /// From its return on every write is captured. Unless the replica is known to be equal, everything is
    /// dirty first.
    pub(crate) fn hook(self: &Arc<Self>, is_clean: bool) -> Result {
        let known = self.group.ring.size_bytes(self.volume).ok_or(ENOENT)?;
        self.known_end.store(known, Ordering::Release);
        if self.size_bytes() > known {
            self.grow();
        }
        if !is_clean {
            self.mark_dirty(0, u64::MAX);
        }
        for (at, tracepoint) in self.tracepoints().iter().enumerate() {
            if let Err(error) = tracepoint.register(self.data()) {
                for done in self.tracepoints().iter().take(at) {
                    done.unregister(self.data());
                }
                sys::kf_tracepoint_sync();
                if self.quiesce(UNDO_MS).is_err() {
                    // Bios that carry our address are under way: what they will touch must stay for good.
                    core::mem::forget(self.clone());
                }
                return Err(error);
            }
        }
        sys::kf_tracepoint_sync();
        self.hooked_ns.store(sys::kf_monotonic_ns(), Ordering::Relaxed);
        self.is_hooked.store(true, Ordering::Release);
        Ok(())
    }

    /// From its return on no write is captured; followed ones may still be under way.
    pub(crate) fn unhook(&self) {
        if self.is_hooked.swap(false, Ordering::AcqRel) {
            for tracepoint in self.tracepoints().iter().rev() {
                tracepoint.unregister(self.data());
            }
            sys::kf_tracepoint_sync();
        }
    }

    /// Once unhooked: waits until no followed bio is left, nor a function of ours that one has called.
    pub(crate) fn quiesce(&self, timeout_ms: u32) -> Result {
        for generation in 0..2 {
            self.wait_for(generation, timeout_ms)?;
        }
        sys::kf_grace();
        sys::kf_chain_flush();
        Ok(())
    }

    /// Bios of drivers without requests pass the last only.
    fn tracepoints(&self) -> &'static [Tracepoint] {
        let all = Tracepoint::all();
        match all.split_last() {
            Some((hook, _)) if self.is_bio_based => core::slice::from_ref(hook),
            _ => all,
        }
    }

    fn data(&self) -> *mut kernel::ffi::c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }

    /// Waits until no bio of a generation is in flight.
    pub(crate) fn wait_for(&self, generation: u32, timeout_ms: u32) -> Result {
        self.group.wait_zero(self.count(generation), timeout_ms)
    }

    /// Whether the count says all about this generation.
    pub(crate) fn is_exact(&self, generation: u32) -> bool {
        !self.is_unsettled() && self.untracked(generation).load(Ordering::SeqCst) == 0
    }

    /// Waits, by draining the queue, for what no count knows. `drained`: the agent has done so for a driver
    /// without requests. `EUCLEAN` asks it to.
    pub(crate) fn drain(&self, generation: u32, drained: bool, timeout_ms: u32) -> Result {
        let ends = sys::kf_monotonic_ns().saturating_add(u64::from(timeout_ms).saturating_mul(1_000_000));
        if self.is_bio_based {
            if !drained {
                to_result(sys::kf_tasks_settle(timeout_ms))?;
                return Err(EUCLEAN);
            }
        } else {
            loop {
                if self.may_drain() && self.try_drain() {
                    break;
                }
                if sys::kf_monotonic_ns() >= ends {
                    return Err(ETIMEDOUT);
                }
                sys::kf_pause(DRAIN_LOOK_MS);
                if kernel::current!().signal_pending() {
                    return Err(EINTR);
                }
            }
        }
        self.untracked(generation).store(0, Ordering::SeqCst);
        self.unsettled.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether to try: the last try is long enough ago, and the driver has nothing left from before the
    /// attach. A request that hangs there would only make others stand still.
    fn may_drain(&self) -> bool {
        // SAFETY: the disk is pinned by the open device.
        let has_older = || unsafe { sys::kf_has_older(self.disk, self.hooked_ns.load(Ordering::Relaxed)) };
        sys::kf_monotonic_ns() >= self.drain_after_ns.load(Ordering::Relaxed) && !has_older()
    }

    /// One try. Each that fails makes the next one longer, up to what a slow disk's queue takes, and later.
    fn try_drain(&self) -> bool {
        let attempt_ms = self.drain_ms.load(Ordering::Relaxed);
        let mut stalled_ns = 0;
        // SAFETY: the disk is pinned by the open device.
        let done = unsafe { sys::kf_drain(self.disk, attempt_ms, &raw mut stalled_ns) };
        self.group.counters.freeze_ns_max.fetch_max(stalled_ns, Ordering::Relaxed);
        if done == 0 {
            self.drain_ms.store(DRAIN_FIRST_MS, Ordering::Relaxed);
            return true;
        }
        let pause_ns = stalled_ns.saturating_mul(u64::from(DRAIN_PAUSES));
        self.drain_after_ns.store(sys::kf_monotonic_ns().saturating_add(pause_ns), Ordering::Relaxed);
        self.drain_ms.store(attempt_ms.wrapping_mul(2).min(DRAIN_LONGEST_MS), Ordering::Relaxed);
        false
    }

    /// Fills in what an agent asks about a volume.
    pub(crate) fn describe(&self, status: &mut ioctl::VolumeStatus) {
        status.device = self.number();
        status.gone = u32::from(self.is_gone());
        status.unsettled = u32::from(self.is_unsettled());
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: opened in `open`; nothing of the device is touched any more.
        unsafe {
            bindings::bdev_fput(self.file);
            sys::kf_module_put();
        }
    }
}

/// The probes, the hook last: a record that it withholds finds the one that shows it.
pub(crate) const PROBES: [(&CStr, *const ()); 5] = [
    (c"block_getrq", hook::has_request as *const ()),
    (c"block_bio_backmerge", hook::has_request as *const ()),
    (c"block_bio_frontmerge", hook::has_request as *const ()),
    (c"block_rq_complete", hook::completed as *const ()),
    (c"block_bio_queue", hook::queued as *const ()),
];
