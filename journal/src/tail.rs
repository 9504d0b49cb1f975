//! How far concurrent readers may read: the writer's position in two atomics.

use std::sync::atomic::{AtomicU64, Ordering};

/// A place in a journal: a segment and an offset in it. Ordered as the journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Segment number.
    pub segment: u64,
    /// Offset in its file, bytes; a multiple of the sector.
    pub offset: u64,
}

/// How far a reader goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Strictly up to here, usually [`Tail::appended`] or [`Tail::durable`].
    UpTo(Place),
    /// To the end of a journal that nobody is writing.
    End,
}

/// Bits of [`Tail`]'s packed place that hold the offset in sectors: segments up to 128 GiB, 2^36 of them.
const OFFSET_BITS: u32 = 28;

/// Shared between the one writer and its readers. Monotonic; the caller wakes whoever waits.
#[derive(Debug)]
pub struct Tail {
    appended: AtomicU64,
    durable: AtomicU64,
}

impl Place {
    fn pack(self) -> u64 {
        let sectors = self.offset / crate::SECTOR_BYTES as u64;
        assert!(
            self.segment < 1 << (64 - OFFSET_BITS) && sectors < 1 << OFFSET_BITS,
            "{self:?} is out of bounds"
        );
        self.segment << OFFSET_BITS | sectors
    }

    fn unpack(packed: u64) -> Place {
        let sectors = packed & ((1 << OFFSET_BITS) - 1);
        Place { segment: packed >> OFFSET_BITS, offset: sectors * crate::SECTOR_BYTES as u64 }
    }
}

impl Tail {
    pub(crate) fn new(place: Place) -> Tail {
        Tail { appended: AtomicU64::new(place.pack()), durable: AtomicU64::new(place.pack()) }
    }

    /// Frames before this place may be read: their bytes are written.
    pub fn appended(&self) -> Place {
        Place::unpack(self.appended.load(Ordering::Acquire))
    }

    /// Frames before this place may be acted on for good: they survive a crash.
    pub fn durable(&self) -> Place {
        Place::unpack(self.durable.load(Ordering::Acquire))
    }

    /// Release: whoever sees the place also sees the bytes that were written before.
    pub(crate) fn set_appended(&self, place: Place) {
        self.appended.store(place.pack(), Ordering::Release);
    }

    pub(crate) fn set_durable(&self, place: Place) {
        self.durable.store(place.pack(), Ordering::Release);
    }
}
