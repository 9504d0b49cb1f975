// SPDX-License-Identifier: GPL-2.0
//! The ring's surroundings in the kernel: its pages, the reservation lock, and the agent's bell.
//!
//! The lock is raw and taken with interrupts off: a failed write is recorded from its end_io. What runs under
//! it copies no payload.

use crate::memory::{Host, Memory};
use crate::ring::Reserver;
use crate::sys;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use kernel::bindings::raw_spinlock_t;
use kernel::prelude::*;
use kernel::types::Opaque;

/// The pages of a ring. An offset outside them would be a broken invariant of the ring: it is told once and
/// touches nothing, since a panic here would take the machine down with a disk's write path.
pub(crate) struct RingPages {
    pages: sys::Pages,
    /// Where accesses go that are outside.
    nowhere: AtomicU64,
    outside: AtomicBool,
}

impl RingPages {
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        let pages = sys::Pages::shared(bytes)?;
        Some(Self { pages, nowhere: AtomicU64::new(0), outside: AtomicBool::new(false) })
    }

    pub(crate) fn pages(&self) -> &sys::Pages {
        &self.pages
    }

    #[inline]
    fn at(&self, at: u64, len: u64, align: u64) -> Option<*mut u8> {
        let end = at.checked_add(len)?;
        if end > self.pages.bytes() || at & align.wrapping_sub(1) != 0 {
            self.tell();
            return None;
        }
        // SAFETY: in bounds of the allocation by the test above.
        Some(unsafe { self.pages.start().add(at as usize) })
    }

    #[cold]
    fn tell(&self) {
        if !self.outside.swap(true, Ordering::Relaxed) {
            pr_err!("bug: an access outside the ring; its group is not to be trusted any more\n");
        }
    }

    #[inline]
    fn word32(&self, at: u64) -> &AtomicU32 {
        match self.at(at, 4, 4) {
            // SAFETY: in bounds, aligned, alive as long as `self`; words are accessed as atomics only.
            Some(word) => unsafe { AtomicU32::from_ptr(word.cast()) },
            // SAFETY: eight aligned bytes of our own.
            None => unsafe { AtomicU32::from_ptr(self.nowhere.as_ptr().cast()) },
        }
    }

    #[inline]
    fn word64(&self, at: u64) -> &AtomicU64 {
        match self.at(at, 8, 8) {
            // SAFETY: as for `word32`.
            Some(word) => unsafe { AtomicU64::from_ptr(word.cast()) },
            None => &self.nowhere,
        }
    }
}

// SAFETY: the pages stay where they are as long as the value lives.
unsafe impl Memory for RingPages {
    fn len(&self) -> u64 {
        self.pages.bytes()
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
        if let Some(to) = self.at(at, bytes.len() as u64, 1) {
            // SAFETY: in bounds; the caller excludes other accesses.
            unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
        }
    }
    #[inline]
    unsafe fn bytes(&self, at: u64, len: u64) -> &[u8] {
        match self.at(at, len, 1) {
            // SAFETY: in bounds; the caller excludes writes.
            Some(from) => unsafe { core::slice::from_raw_parts(from, len as usize) },
            None => &[],
        }
    }
}

/// The lock and what it protects; in memory of its own, since a lock must not move.
struct Locked {
    lock: Opaque<raw_spinlock_t>,
    reserver: UnsafeCell<Reserver>,
}

/// What a ring asks for.
pub(crate) struct KernelHost {
    memory: RingPages,
    locked: KBox<Locked>,
    bell: sys::Bell,
    /// The agent has seen nothing to read and sleeps.
    armed: AtomicBool,
    /// Told once.
    is_broken: AtomicBool,
}

// SAFETY: what is not atomic is behind its lock.
unsafe impl Send for KernelHost {}
// SAFETY: as above.
unsafe impl Sync for KernelHost {}

// SAFETY: a spin lock around the only `Reserver`.
unsafe impl Host for KernelHost {
    type Memory = RingPages;

    #[inline]
    fn memory(&self) -> &RingPages {
        &self.memory
    }

    #[inline]
    fn locked<R>(&self, critical: impl FnOnce(&mut Reserver) -> R) -> R {
        let lock = self.locked.lock.get();
        // SAFETY: initialised in `new`, at the same place ever since.
        let flags = unsafe { sys::kf_lock(lock) };
        // SAFETY: we hold the lock, and it is not taken again inside (`published` takes none).
        let result = critical(unsafe { &mut *self.locked.reserver.get() });
        // SAFETY: taken above, with these flags.
        unsafe { sys::kf_unlock(lock, flags) };
        result
    }

    #[inline]
    fn published(&self) {
        // With the fence in `arm` one of the two sees the other (Dekker).
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    #[cold]
    fn broken(&self, invariant: &'static str) {
        if !self.is_broken.swap(true, Ordering::Relaxed) {
            pr_err!("bug: {}; replicas of this group must be compared with their disks\n", invariant);
        }
    }
}

impl KernelHost {
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let memory = RingPages::new(bytes).ok_or(ENOMEM)?;
        let locked = KBox::new(
            Locked { lock: Opaque::zeroed(), reserver: UnsafeCell::new(Reserver::new()) },
            GFP_KERNEL,
        )?;
        // SAFETY: in its final place, not yet used.
        unsafe { sys::kf_lock_init(locked.lock.get()) };
        let bell = sys::Bell::new().ok_or(ENOMEM)?;
        Ok(Self { memory, locked, bell, armed: AtomicBool::new(false), is_broken: AtomicBool::new(false) })
    }

    /// Signals the agent once. Also called to end its sleep for another reason than a record.
    #[cold]
    pub(crate) fn wake(&self) {
        if self.armed.swap(false, Ordering::Relaxed) {
            self.bell.ring();
        }
    }

    /// The next publish rings the bell, unless `ready` says that there is something already; its answer.
    pub(crate) fn arm(&self, ready: impl FnOnce() -> bool) -> bool {
        self.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let is_ready = ready();
        if is_ready {
            self.armed.store(false, Ordering::Relaxed);
        }
        is_ready
    }

    /// Takes the agent's eventfd, or none.
    pub(crate) fn take_eventfd(&self, fd: i32) -> Result {
        kernel::error::to_result(self.bell.take(fd))
    }
}
