//! What the synchronisation and the ring's consumer share: the mask of the window, and the content of its
//! slots.
//!
//! ```text
//!  engine:   begin ── barrier ── read a chunk ── reserve slots, hand the bytes over ──┐ under this map's lock
//!  consumer: … write: mask its sectors … slot: drop masked sectors, emit the rest ◄───┘
//! ```
//!
//! Invariants
//! * The mask holds exactly the sectors that records behind the window's begin have written, as far as they
//!   were consumed. It starts empty at every begin: a sector masked by an older record would be dropped
//!   although its newer content is in no record (`models/resync.py`, B).
//! * Begin and reserve happen under the map's lock, so the consumer cannot reach a record before the map
//!   knows of it.
//! * A slot that the map does not know has no content (its agent died, or the window was given up): it is
//!   emitted empty, and the dirty bits that stand for its range stay.

use machine::{Mutex, MutexGuard};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What the mask tells apart.
pub const SECTOR: u64 = 512;

/// What one slot stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// Zeros.
    Zeros,
}

/// What is left of a slot when the consumer has reached it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmasked {
    /// First byte of the slot in its volume.
    pub offset: u64,
    /// Its content.
    pub content: Content,
    /// Ranges of the volume that no record has written since begin, ascending.
    pub pieces: Vec<Range<u64>>,
}

/// The range of one volume that is being copied.
#[derive(Debug)]
struct Window {
    volume: u32,
    range: Range<u64>,
    /// Records behind this lsn are masked.
    after: u64,
    /// A bit a sector of the range.
    mask: Vec<u64>,
}

#[derive(Debug)]
struct Slot {
    range: Range<u64>,
    content: Content,
}

/// See the module.
#[derive(Debug, Default)]
pub struct SyncMap {
    window: Option<Window>,
    slots: BTreeMap<u64, Slot>,
    /// Zero ranges that a slot could not hold any more, since they fell apart: to be reserved again.
    requeued: VecDeque<Range<u64>>,
    /// Slots of this window were lost: nothing of it may be cleared.
    abandoned: bool,
    #[cfg(test)]
    pub(crate) without_mask: bool,
}

/// The map where engine and consumer share it.
#[derive(Debug, Default)]
pub struct SharedMap {
    map: Mutex<SyncMap>,
    /// A window is open, so records must be looked at. Set before begin, so whoever sees a record behind
    /// begin sees it.
    active: AtomicBool,
    /// Changes by others that the consumer passed while a window was open.
    live_changes: AtomicU64,
}

impl SharedMap {
    /// The consumer passed a change that is not the synchronisation's own.
    pub fn passed_live(&self) {
        self.live_changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Changes by others while windows were open, in this run.
    pub fn live_changes(&self) -> u64 {
        self.live_changes.load(Ordering::Relaxed)
    }

    /// Takes the lock.
    pub fn lock(&self) -> MutexGuard<'_, SyncMap> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the consumer has to tell the map of records: looked at after a record was seen.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Opens a window: `begin` is the ring's step, whose lsn the mask starts behind.
    ///
    /// # Errors
    /// The step's; there is no window then.
    pub fn begin<E>(
        &self,
        volume: u32,
        range: Range<u64>,
        begin: impl FnOnce() -> Result<u64, E>,
    ) -> Result<u64, E> {
        let mut map = self.lock();
        self.active.store(true, Ordering::Release);
        *map = SyncMap {
            #[cfg(test)]
            without_mask: map.without_mask,
            ..SyncMap::default()
        };
        let after = begin()?;
        let words = (range.end - range.start).div_ceil(SECTOR * 64);
        let mask = vec![0; usize::try_from(words).unwrap_or(usize::MAX)];
        map.window = Some(Window { volume, range, after, mask });
        Ok(after)
    }

    /// Closes the window.
    pub fn end(&self) {
        let mut map = self.lock();
        let abandoned = map.abandoned;
        *map = SyncMap {
            abandoned,
            #[cfg(test)]
            without_mask: map.without_mask,
            ..SyncMap::default()
        };
        self.active.store(false, Ordering::Release);
    }
}

impl SyncMap {
    /// Hands over what a slot stands for; in the same critical section as its reservation.
    pub fn insert(&mut self, lsn: u64, range: Range<u64>, content: Content) {
        self.slots.insert(lsn, Slot { range, content });
    }

    /// A record behind begin changes a range: no slot may bring what was read there before.
    pub fn written(&mut self, volume: u32, lsn: u64, range: Range<u64>) {
        let Some(window) = &mut self.window else { return };
        #[cfg(test)]
        if self.without_mask {
            return;
        }
        if window.volume != volume || lsn <= window.after {
            return;
        }
        let start = range.start.max(window.range.start);
        let end = range.end.min(window.range.end);
        if start >= end {
            return;
        }
        // A record that touches part of a sector takes the sector: there are none, devices write whole ones.
        let sectors = (start - window.range.start) / SECTOR..(end - window.range.start).div_ceil(SECTOR);
        set(&mut window.mask, sectors);
    }

    /// The slot of this lsn, without what was written since begin; `None` when nobody knows its content.
    pub fn take(&mut self, lsn: u64) -> Option<Unmasked> {
        let slot = self.slots.remove(&lsn)?;
        let window = self.window.as_ref()?;
        let inside = window.range.start <= slot.range.start && slot.range.end <= window.range.end;
        let pieces = if inside { window.unmasked(&slot.range) } else { Vec::new() };
        Some(Unmasked { offset: slot.range.start, content: slot.content, pieces })
    }

    /// Whether any of a range of the window was written since begin; true without a window.
    pub fn is_written(&self, range: &Range<u64>) -> bool {
        self.window.as_ref().is_none_or(|window| window.unmasked(range) != [range.clone()])
    }

    /// A piece of a zero slot that needs a slot of its own.
    pub fn requeue(&mut self, piece: Range<u64>) {
        self.requeued.push_back(piece);
    }

    /// Takes the pieces that lie in a range and wait for a slot.
    pub fn requeued(&mut self, range: &Range<u64>) -> Vec<Range<u64>> {
        let (mine, others) = self
            .requeued
            .drain(..)
            .partition(|piece: &Range<u64>| range.start <= piece.start && piece.end <= range.end);
        self.requeued = others;
        mine.into()
    }

    /// What was handed over is not going to be journaled.
    pub fn abandon(&mut self) {
        self.slots.clear();
        self.requeued.clear();
        self.abandoned = true;
    }

    /// Whether the window was given up, so that nothing of it may be cleared.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned
    }
}

impl Window {
    /// What of a range inside the window no record has written.
    fn unmasked(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let base = self.range.start;
        let sectors = (range.start - base) / SECTOR..(range.end - base).div_ceil(SECTOR);
        let mut pieces = Vec::new();
        let mut at = sectors.start;
        while at < sectors.end {
            let clear = next(&self.mask, at, sectors.end, false);
            let set = next(&self.mask, clear, sectors.end, true);
            if clear < set {
                pieces.push(base + clear * SECTOR..(base + set * SECTOR).min(range.end));
            }
            at = set;
        }
        pieces
    }
}

fn set(mask: &mut [u64], bits: Range<u64>) {
    let mut at = bits.start;
    while at < bits.end {
        let end = ((at / 64 + 1) * 64).min(bits.end);
        let ones = (u64::MAX >> (64 - (end - at))) << (at % 64);
        if let Some(word) = usize::try_from(at / 64).ok().and_then(|word| mask.get_mut(word)) {
            *word |= ones;
        }
        at = end;
    }
}

/// First bit at or after `from` with this value; `end` when there is none before it.
fn next(mask: &[u64], from: u64, end: u64, value: bool) -> u64 {
    let mut at = from;
    while at < end {
        let word = usize::try_from(at / 64).ok().and_then(|word| mask.get(word)).copied().unwrap_or(u64::MAX);
        let found = (if value { word } else { !word }) >> (at % 64);
        if found != 0 {
            return (at + u64::from(found.trailing_zeros())).min(end);
        }
        at = (at / 64 + 1) * 64;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn window(range: Range<u64>, after: u64) -> SharedMap {
        let shared = SharedMap::default();
        assert_eq!(shared.begin(1, range, || Ok::<_, ()>(after)), Ok(after));
        shared
    }

    fn pieces(map: &mut SyncMap, lsn: u64, range: Range<u64>) -> Vec<Range<u64>> {
        map.insert(lsn, range.clone(), Content::Zeros);
        let taken = map.take(lsn).unwrap();
        assert_eq!(taken.offset, range.start);
        taken.pieces
    }

    #[test]
    fn what_was_written_behind_begin_is_dropped_and_nothing_else() {
        let shared = window(64 * KIB..256 * KIB, 10);
        let mut map = shared.lock();
        let slot = 64 * KIB..192 * KIB;
        map.written(1, 10, 64 * KIB..65 * KIB);
        map.written(2, 11, 64 * KIB..65 * KIB);
        assert_eq!(
            pieces(&mut map, 12, slot.clone()),
            std::slice::from_ref(&slot),
            "before begin; another volume"
        );
        map.written(1, 13, 0..64 * KIB + 512);
        map.written(1, 14, 100 * KIB..101 * KIB);
        map.written(1, 15, 190 * KIB..1 << 40);
        let left = [64 * KIB + 512..100 * KIB, 101 * KIB..190 * KIB];
        assert_eq!(pieces(&mut map, 16, slot.clone()), left);
        map.written(1, 17, 0..1 << 40);
        assert!(pieces(&mut map, 18, slot).is_empty());
        assert_eq!(map.take(19), None, "nobody knows it");
    }

    #[test]
    fn a_begin_starts_with_an_empty_mask_and_without_slots() {
        let shared = window(0..64 * KIB, 10);
        shared.lock().written(1, 11, 0..64 * KIB);
        shared.lock().insert(12, 0..64 * KIB, Content::Zeros);
        shared.begin(1, 0..64 * KIB, || Ok::<_, ()>(20)).unwrap();
        assert_eq!(shared.lock().take(12), None, "of the window before");
        assert_eq!(pieces(&mut shared.lock(), 21, 0..64 * KIB).len(), 1);
        shared.lock().abandon();
        assert!(shared.lock().is_abandoned());
        shared.end();
        assert!(!shared.is_active() && shared.lock().is_abandoned());
        assert_eq!(shared.begin(1, 0..1, || Err(7)), Err(7));
        assert!(!shared.lock().is_abandoned());
    }

    #[test]
    fn pieces_that_wait_are_given_out_by_range() {
        let shared = window(0..64 * KIB, 1);
        let mut map = shared.lock();
        for piece in [0..512, 1024..2048, 4096..8192] {
            map.requeue(piece);
        }
        assert_eq!(map.requeued(&(0..4096)), [0..512, 1024..2048]);
        assert_eq!(map.requeued(&(0..8192)), std::slice::from_ref(&(4096..8192)));
        assert!(map.requeued(&(0..8192)).is_empty());
    }
}
