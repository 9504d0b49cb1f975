// SPDX-License-Identifier: GPL-2.0
//! The kernel's functions that the `kernel` crate lacks, and `shim.c`.
//!
//! Declared by hand and not by a private bindgen run: no type is missing in `kernel::bindings`, only a few
//! functions, and a machine that builds this module through DKMS then needs no bindgen.

use kernel::bindings::{bio, block_device, dev_t, gendisk, raw_spinlock_t, vm_area_struct, wait_queue_head};
use kernel::ffi::{c_int, c_long, c_uint, c_ulong, c_void};

/// `bio_end_io_t` as a plain function.
pub(crate) type EndIo = unsafe extern "C" fn(*mut bio);

/// `blk_mode_t`: open for reading.
pub(crate) const OPEN_READ: c_uint = 1;

/// `kf_refuse`: any device whose writes are captured exactly.
pub(crate) const FINE: c_uint = 0;

// SAFETY: as declared in shim.h.
#[allow(improper_ctypes)] // The kernel's own types hold empty structures; only pointers to them pass.
unsafe extern "C" {
    /// Realtime, ns.
    pub(crate) safe fn kf_realtime_ns() -> u64;
    /// Monotonic, ns.
    pub(crate) safe fn kf_monotonic_ns() -> u64;
    pub(crate) fn kf_lock_init(lock: *mut raw_spinlock_t);
    pub(crate) fn kf_lock(lock: *mut raw_spinlock_t) -> c_ulong;
    pub(crate) fn kf_unlock(lock: *mut raw_spinlock_t, flags: c_ulong);
    /// Zeroed memory that may be mapped into a process; null when there is none.
    pub(crate) safe fn kf_alloc_shared(bytes: c_ulong) -> *mut c_void;
    /// Zeroed memory; null when there is none.
    pub(crate) safe fn kf_alloc(bytes: c_ulong) -> *mut c_void;
    pub(crate) fn kf_free(memory: *mut c_void);
    pub(crate) fn kf_map_shared(vma: *mut vm_area_struct, memory: *mut c_void) -> c_int;
    pub(crate) fn kf_wait_init(queue: *mut wait_queue_head);
    pub(crate) fn kf_wait_zero(queue: *mut wait_queue_head, count: *const u64, timeout_ms: c_uint) -> c_long;
    pub(crate) fn kf_wake(queue: *mut wait_queue_head);
    /// Sleeps, at most until a signal.
    pub(crate) safe fn kf_pause(ms: c_uint);
    /// Null when there is no memory.
    pub(crate) safe fn kf_bell_new() -> *mut c_void;
    pub(crate) fn kf_bell_free(bell: *mut c_void);
    pub(crate) fn kf_bell_ring(bell: *mut c_void);
    pub(crate) fn kf_bell_take(bell: *mut c_void, fd: c_int) -> c_int;
    pub(crate) fn kf_bio_is_readable(bio: *const bio) -> bool;
    pub(crate) fn kf_refuse(bdev: *mut block_device) -> c_uint;
    pub(crate) fn kf_is_bio_based(disk: *mut gendisk) -> bool;
    pub(crate) fn kf_is_gone(disk: *mut gendisk) -> bool;
    pub(crate) fn kf_device_number(bdev: *mut block_device) -> u32;
    /// Takes a reference to this module; false when it is going.
    pub(crate) safe fn kf_module_get() -> bool;
    pub(crate) fn kf_module_put();
    pub(crate) safe fn kf_decode_device(device: u32) -> dev_t;
    /// Waits for probes that run now; then those registered are seen by all.
    pub(crate) safe fn kf_tracepoint_sync();
    /// Waits for end_io functions of ours that have dropped their count and not yet returned.
    pub(crate) safe fn kf_grace();
    pub(crate) fn kf_has_older(disk: *mut gendisk, than_ns: u64) -> bool;
    pub(crate) fn kf_drain(disk: *mut gendisk, attempt_ms: c_uint, stalled_ns: *mut u64) -> c_int;
    /// Waits for tasks that hold bios which passed the tracepoint before; 0 or an errno.
    pub(crate) safe fn kf_tasks_settle(timeout_ms: c_uint) -> c_int;
    pub(crate) safe fn kf_chain_init() -> c_int;
    pub(crate) safe fn kf_chain_exit();
    pub(crate) safe fn kf_chain_flush();
    pub(crate) safe fn kf_chain_end_io() -> Option<EndIo>;
    pub(crate) fn kf_chain_finish(bio: *mut bio);
}

/// Memory of the kernel by address; freed on drop.
///
/// # Invariants
///
/// `start` is what `kf_alloc` or `kf_alloc_shared` returned for `bytes`, not freed.
pub(crate) struct Pages {
    start: core::ptr::NonNull<u8>,
    bytes: u64,
}

// SAFETY: plain memory without owner.
unsafe impl Send for Pages {}
// SAFETY: access through it is the business of who takes its address.
unsafe impl Sync for Pages {}

impl Pages {
    fn new(start: *mut c_void, bytes: u64) -> Option<Self> {
        // INVARIANT: null is filtered out.
        core::ptr::NonNull::new(start.cast()).map(|start| Self { start, bytes })
    }

    /// Zeroed, and mappable.
    pub(crate) fn shared(bytes: u64) -> Option<Self> {
        Self::new(kf_alloc_shared(bytes as c_ulong), bytes)
    }

    /// Zeroed.
    pub(crate) fn private(bytes: u64) -> Option<Self> {
        Self::new(kf_alloc(bytes as c_ulong), bytes)
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: by the invariant.
        unsafe { kf_free(self.start.as_ptr().cast()) }
    }
}

/// The agent's bell: rung from any context.
///
/// # Invariants
///
/// What `kf_bell_new` returned, not freed.
pub(crate) struct Bell(core::ptr::NonNull<c_void>);

// SAFETY: it has a lock of its own.
unsafe impl Send for Bell {}
// SAFETY: as above.
unsafe impl Sync for Bell {}

impl Bell {
    pub(crate) fn new() -> Option<Self> {
        // INVARIANT: null is filtered out.
        core::ptr::NonNull::new(kf_bell_new()).map(Self)
    }

    pub(crate) fn ring(&self) {
        // SAFETY: by the invariant.
        unsafe { kf_bell_ring(self.0.as_ptr()) }
    }

    /// Takes another eventfd, or none for a negative number; 0 or an errno. May sleep.
    pub(crate) fn take(&self, fd: c_int) -> c_int {
        // SAFETY: by the invariant.
        unsafe { kf_bell_take(self.0.as_ptr(), fd) }
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // SAFETY: by the invariant; whoever could ring it is gone with its owner.
        unsafe { kf_bell_free(self.0.as_ptr()) }
    }
}
