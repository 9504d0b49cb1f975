//! An allocator that ends the fuzzer at an allocation which no small directory can ask for: the limit on
//! resident memory sees only what is touched, and a number from a file that becomes a length is seldom
//! touched.

use std::alloc::{GlobalAlloc, Layout, System};

/// More than the largest frame, its unpacked payload and a simulated disk take together.
const MOST_BYTES: usize = 64 << 20;

pub struct Bounded;

// SAFETY: everything is handed to the system's allocator as it came, or the process ends.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        check(bytes);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(at, layout, bytes) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

fn check(bytes: usize) {
    assert!(bytes <= MOST_BYTES, "an allocation of {bytes} bytes");
}
