//! Hosts for tests: a ring on the heap, and one that shows its memory after every store.

mod handover;
mod model;
mod stops;

use super::abi::{Identity, Layout, VolumeSpec};
use super::entry::Entry;
use super::memory::{Host, Memory, index};
use super::reservation::Token;
use super::ring::{Captured, Reserver, Ring};
use super::span::Span;
use core::cell::{Cell, RefCell};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{boxed::Box, vec, vec::Vec};

pub const IDENTITY: Identity = Identity { boot_id: [1; 16], group_id: [2; 16], epoch: 3, epoch_id: [4; 16] };

/// Two volumes with one line of bitmap each.
pub const VOLUMES: [VolumeSpec; 2] = [
    VolumeSpec { id: 7, sector_bytes: 512, uuid: [5; 16], size_bytes: 1 << 20 },
    VolumeSpec { id: 9, sector_bytes: 4096, uuid: [6; 16], size_bytes: (1 << 20) + 4096 },
];

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "read through the span")] [u8; 64]);

/// Called with the whole memory after every store.
type Hook = Box<dyn Fn(&[u8])>;

/// Memory on the heap.
pub struct Heap {
    _lines: Box<[Line]>,
    span: Span,
    hook: Option<Hook>,
    /// Called whenever the lock is free again, but not by what it calls itself.
    between: RefCell<Option<Box<dyn Fn()>>>,
    is_between: Cell<bool>,
    /// Accesses in all, and the most of them in one hold of the lock.
    accesses: AtomicU64,
    longest_hold: AtomicU64,
    reserver: Mutex<Reserver>,
}

impl core::fmt::Debug for Heap {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Heap").field("span", &self.span).finish_non_exhaustive()
    }
}

// SAFETY: hooks are set by tests of one thread only (`hooked`).
unsafe impl Sync for Heap {}
// SAFETY: as above.
unsafe impl Send for Heap {}

impl Heap {
    pub fn new(bytes: u64) -> Self {
        let mut lines = vec![Line([0; 64]); index(bytes.div_ceil(64))].into_boxed_slice();
        let base = NonNull::new(lines.as_mut_ptr().cast()).unwrap();
        // SAFETY: aligned by `Line`, valid as long as `_lines` beside it, which nobody else touches.
        let span = unsafe { Span::new(base, bytes) };
        Self {
            _lines: lines,
            span,
            hook: None,
            between: RefCell::new(None),
            is_between: Cell::new(false),
            accesses: AtomicU64::new(0),
            longest_hold: AtomicU64::new(0),
            reserver: Mutex::new(Reserver::new()),
        }
    }

    /// What a dead owner left.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let heap = Self::new(bytes.len() as u64);
        // SAFETY: nobody else knows this memory.
        unsafe { heap.span.write(0, bytes) };
        heap
    }

    pub fn hooked(mut self, hook: Hook) -> Self {
        self.hook = Some(hook);
        self
    }

    pub fn set_between(&self, between: impl Fn() + 'static) {
        *self.between.borrow_mut() = Some(Box::new(between));
    }

    /// The most accesses in one hold of the lock since the last call.
    pub fn take_longest_hold(&self) -> u64 {
        self.longest_hold.swap(0, Ordering::Relaxed)
    }

    fn touch(&self) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
    }

    /// A copy of the whole memory.
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: tests call this while nobody writes.
        unsafe { self.span.bytes(0, self.span.len()) }.to_vec()
    }

    fn stored(&self) {
        if let Some(hook) = &self.hook {
            hook(&self.bytes());
        }
    }
}

// SAFETY: forwards to `Span`.
unsafe impl Memory for Heap {
    fn len(&self) -> u64 {
        self.span.len()
    }
    fn load32(&self, at: u64, order: Ordering) -> u32 {
        self.touch();
        self.span.load32(at, order)
    }
    fn load64(&self, at: u64, order: Ordering) -> u64 {
        self.touch();
        self.span.load64(at, order)
    }
    fn store32(&self, at: u64, value: u32, order: Ordering) {
        self.touch();
        self.span.store32(at, value, order);
        self.stored();
    }
    fn store64(&self, at: u64, value: u64, order: Ordering) {
        self.touch();
        self.span.store64(at, value, order);
        self.stored();
    }
    fn or32(&self, at: u64, bits: u32, order: Ordering) -> u32 {
        let old = self.span.or32(at, bits, order);
        self.stored();
        old
    }
    fn or64(&self, at: u64, bits: u64, order: Ordering) -> u64 {
        self.touch();
        let old = self.span.or64(at, bits, order);
        self.stored();
        old
    }
    fn and64(&self, at: u64, bits: u64, order: Ordering) -> u64 {
        self.touch();
        let old = self.span.and64(at, bits, order);
        self.stored();
        old
    }
    unsafe fn write(&self, at: u64, bytes: &[u8]) {
        // A copy is many stores: stop in its middle too.
        let (first, second) = bytes.split_at(bytes.len() / 2);
        // SAFETY: the caller's promise, for both halves.
        unsafe { self.span.write(at, first) };
        self.stored();
        // SAFETY: as above.
        unsafe { self.span.write(at + first.len() as u64, second) };
        self.stored();
    }
    unsafe fn bytes(&self, at: u64, len: u64) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { self.span.bytes(at, len) }
    }
}

// SAFETY: a std mutex around the only `Reserver`.
unsafe impl Host for Heap {
    type Memory = Self;
    fn memory(&self) -> &Self {
        self
    }
    fn locked<R>(&self, critical: impl FnOnce(&mut Reserver) -> R) -> R {
        let result = {
            let mut reserver = self.reserver.lock().unwrap_or_else(PoisonError::into_inner);
            let before = self.accesses.load(Ordering::Relaxed);
            let result = critical(&mut reserver);
            let held = self.accesses.load(Ordering::Relaxed) - before;
            self.longest_hold.fetch_max(held, Ordering::Relaxed);
            result
        };
        if let Some(between) = &*self.between.borrow()
            && !self.is_between.replace(true)
        {
            between();
            self.is_between.set(false);
        }
        result
    }
    fn published(&self) {}
}

/// A new ring on the heap, with `VOLUMES`.
pub fn heap_ring(ring_bytes: u64, first_lsn: u64) -> Ring<Heap> {
    let layout = Layout::plan(ring_bytes, &VOLUMES).unwrap();
    Ring::format(Heap::new(layout.total_bytes), &IDENTITY, &VOLUMES, ring_bytes, first_lsn, 0).unwrap()
}

/// Bytes that name their write.
pub fn payload(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (seed.wrapping_mul(31).wrapping_add(at) % 251) as u8).collect()
}

/// A write that must go into the ring.
pub fn write<H: Host>(ring: &Ring<H>, volume: u32, offset: u64, bytes: &[u8], now_ns: u64) -> Token {
    match ring.capture(Entry::write(volume, offset, bytes.len() as u64, 0), bytes, now_ns) {
        Ok(Captured::Ring(token)) => token,
        other => panic!("not recorded: {other:?}"),
    }
}
