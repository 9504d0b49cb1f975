// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! What was not recorded: a bit for each 64 KiB of a volume.
//!
//! Two bitmaps for each volume. *current* collects writes that did not fit the ring. *pending* is what a
//! resync works off; its bits are cleared only after the data that repairs them was appended to the journal,
//! so a dead agent loses none. One flag beside each bitmap stands for everything beyond it (a volume that has
//! grown); beside the pending one stands how much of that is repaired, from its first byte on. How bits come
//! from the one map into the other: `handover`.
//!
//! Invariants:
//! * A write that is not in the ring has its bits set, in one of the two, until it is repaired. All changes
//!   are made under the reservation lock; `dirty_extents` reads without it and sees each bit as of some
//!   moment of the iteration.
//! * One hold of the lock touches at most `PIECE_BYTES` of each bitmap, and a word more where an extent
//!   begins inside one: interrupts are off meanwhile in the kernel. An extent of one write is no longer than
//!   that; longer ranges are marked and cleared piece by piece.
//! * The `Reserver` knows how many bits of each map are set, exactly: whether any is left takes no walk.

use super::abi::{GRANULE, Op, control_at, slot_at};
use super::entry::Entry;
use super::memory::{Host, Memory};
use super::ring::{Captured, Mode, Refused, Reserver, Ring, Volume};
use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Cause of a switch to the bitmaps: a write found no room.
pub const CAUSE_RING_FULL: u32 = 1;
/// Cause of a switch to the bitmaps: the journal reached its quota.
pub const CAUSE_QUOTA: u32 = 2;
/// Cause of a switch to the bitmaps: the agent asked for it.
pub const CAUSE_AGENT: u32 = 3;

/// Mode word.
pub(super) const MODE_RING: u32 = 0;
/// Mode word.
pub(super) const MODE_BITMAP: u32 = 1;

/// Bytes of a bitmap that one hold of the lock walks: the bits of 4 GiB, which no single write exceeds.
pub(super) const PIECE_BYTES: u64 = 8 << 10;
const PIECE_GRANULES: u64 = PIECE_BYTES * 8;

/// When and why writes stopped being recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Realtime of the first write that became bits; of the first begin where none did.
    pub since_ns: u64,
    /// `CAUSE_*`.
    pub cause: u32,
}

impl<H: Host> Ring<H> {
    /// When and why writes were lost, from the switch to the bitmaps to the end of the resync that repairs
    /// them.
    pub fn loss(&self) -> Option<Loss> {
        self.host.locked(|_| {
            let since_ns = self.memory().load64(control_at::LOST_SINCE, Relaxed);
            let cause = self.memory().load32(control_at::CAUSE, Relaxed);
            (since_ns != 0).then_some(Loss { since_ns, cause })
        })
    }

    /// From now on writes only set bits, until `begin_resync`. Without effect when that is so already. While
    /// a begin is under way it is as if this came right behind it: the begin has its record, and the mode
    /// stays.
    pub fn set_mode_bitmap(&self, cause: u32, now_ns: u64) {
        self.host.locked(|reserver| {
            if reserver.mode == Mode::Ring || reserver.begun {
                self.switch_to_bitmap(reserver, cause, now_ns);
            }
        });
    }

    /// Sets the bits of a range, in whatever mode: something recorded has become unreadable before it was
    /// acknowledged. False when there is no such volume; a range past its end is cut.
    pub fn mark_dirty(&self, volume: u32, range: Range<u64>) -> bool {
        let mut start = range.start;
        loop {
            let marked = self.host.locked(|reserver| {
                let known = reserver.volume(volume)?;
                let end = range.end.min(known.size_bytes);
                let next = (start / GRANULE / PIECE_GRANULES + 1) * PIECE_GRANULES * GRANULE;
                // What lies beyond the bitmap is one flag.
                let piece = if next < known.covered_bytes() { next.min(end) } else { end };
                if start < piece {
                    self.set_bits(reserver, volume, start, piece - start);
                }
                Some((piece, start < piece && piece < end))
            });
            match marked {
                None => return false,
                Some((_, false)) => return true,
                Some((piece, true)) => start = piece,
            }
        }
    }

    /// Whether any bit of a volume is set, current or pending.
    pub fn is_dirty(&self, volume: u32) -> bool {
        self.dirty_extents(volume).next().is_some()
    }

    /// The dirty ranges of a volume, current and pending, ascending and merged, in whole granules cut at its
    /// size. Nothing for a volume that the ring does not have.
    pub fn dirty_extents(&self, volume: u32) -> DirtyExtents<'_, H::Memory> {
        let found = self.host.locked(|reserver| reserver.volume(volume).copied());
        DirtyExtents::of(self.memory(), found)
    }

    /// Clears the pending bits of the granules that lie wholly in the range (the last one of the volume
    /// counts as whole when the range reaches the volume's end). Call it only after the range's data was
    /// appended to the journal. Beyond the bitmap a range counts only when it begins no later than where the
    /// dirty part begins.
    pub fn clear_dirty(&self, volume: u32, range: Range<u64>) {
        let mut first = range.start.div_ceil(GRANULE);
        while let Some(next) = self.host.locked(|reserver| self.clear_piece(reserver, volume, &range, first))
        {
            first = next;
        }
    }

    /// One piece of `clear_dirty`, from a granule on; the granule to go on with. The flag comes last.
    fn clear_piece(
        &self,
        reserver: &mut Reserver,
        volume: u32,
        range: &Range<u64>,
        first: u64,
    ) -> Option<u64> {
        let volume = reserver.volume_mut(volume)?;
        let covered = volume.covered_bytes() / GRANULE;
        let reaches_end = range.end >= volume.size_bytes;
        let end = if reaches_end { covered } else { (range.end / GRANULE).min(covered) };
        if volume.pending_bits != 0 {
            let piece = ((first / PIECE_GRANULES + 1) * PIECE_GRANULES).min(end);
            let (pending_at, mut cleared) = (volume.pending_at(), 0);
            for_words(first..piece, |word, bits| {
                let old = self.memory().and64(pending_at + word * 8, !bits, Relaxed);
                cleared += u64::from((old & bits).count_ones());
            });
            volume.pending_bits -= cleared;
            if piece < end {
                return Some(piece);
            }
        }
        let tail = pending_tail(self.memory(), volume).filter(|from| range.start <= *from);
        if let Some(from) = tail {
            let repaired = range.end / GRANULE * GRANULE;
            if reaches_end {
                self.memory().store32(volume.slot + slot_at::PENDING_TAIL_DIRTY, 0, Relaxed);
            } else if repaired > from {
                self.memory().store64(volume.slot + slot_at::PENDING_TAIL_FROM, repaired, Relaxed);
            }
        }
        None
    }

    /// Says that a volume has grown: `record` (opaque here) has its place in the order before the first write
    /// that needs the new size. When it cannot be recorded, writes become bits, and the agent must tell the
    /// new size after it has begun the resync.
    pub fn grow(
        &self,
        volume: u32,
        size_bytes: u64,
        record: &[u8],
        now_ns: u64,
    ) -> Result<Captured<u64>, Refused> {
        let payload_len = u32::try_from(record.len()).map_err(|_| Refused::Malformed)?;
        if payload_len > super::abi::MAX_PAYLOAD {
            return Err(Refused::Malformed);
        }
        self.host.locked(|reserver| {
            let known = *reserver.volume(volume).ok_or(Refused::UnknownVolume)?;
            if size_bytes <= known.size_bytes {
                return Err(Refused::Malformed);
            }
            let entry = Entry::event(Op::Volume, volume, payload_len);
            let mut captured = Captured::Bits;
            if reserver.mode == Mode::Ring {
                if let Some(mut reservation) = self.place(reserver, core::iter::once(entry), now_ns) {
                    reservation.fill(record);
                    captured = Captured::Ring(reservation.publish().last_lsn());
                } else {
                    self.switch_to_bitmap(reserver, CAUSE_RING_FULL, now_ns);
                }
            }
            let count = reserver.volume_count;
            for known in reserver.volumes.iter_mut().take(count).filter(|known| known.id == volume) {
                known.size_bytes = size_bytes;
            }
            self.memory().store64(known.slot + slot_at::SIZE, size_bytes, Release);
            Ok(captured)
        })
    }

    pub(super) fn switch_to_bitmap(&self, reserver: &mut Reserver, cause: u32, now_ns: u64) {
        reserver.mode = Mode::Bitmap;
        reserver.begun = false;
        self.memory().store32(control_at::CAUSE, cause, Relaxed);
        self.memory().store64(control_at::LOST_SINCE, now_ns.max(1), Relaxed);
        self.memory().store32(control_at::MODE, MODE_BITMAP, Release);
    }

    /// Sets the bits of a range of a known volume: the current ones, and the pending ones while a begin that
    /// has its record moves those.
    pub(super) fn set_bits(&self, reserver: &mut Reserver, volume: u32, offset: u64, length: u64) {
        let begun = reserver.begun;
        let Some(volume) = reserver.volume_mut(volume) else { return };
        let granules = offset / GRANULE..(offset + length).div_ceil(GRANULE);
        let covered = volume.covered_bytes() / GRANULE;
        let map_at = if begun { volume.pending_at() } else { volume.bitmap_at };
        let mut set = 0;
        for_words(granules.start..granules.end.min(covered), |word, bits| {
            let old = self.memory().or64(map_at + word * 8, bits, Relaxed);
            set += u64::from((bits & !old).count_ones());
        });
        if begun {
            volume.pending_bits += set;
        } else {
            volume.current_bits += set;
        }
        if granules.end > covered {
            if begun {
                self.set_pending_tail(volume);
            } else {
                self.memory().store32(volume.slot + slot_at::TAIL_DIRTY, 1, Relaxed);
            }
        }
    }

    /// Everything beyond the bitmap is to be repaired, from its first byte on.
    pub(super) fn set_pending_tail(&self, volume: &Volume) {
        self.memory().store64(volume.slot + slot_at::PENDING_TAIL_FROM, 0, Relaxed);
        self.memory().store32(volume.slot + slot_at::PENDING_TAIL_DIRTY, 1, Release);
    }

    /// Whether anything of a volume is dirty, without a walk. Under the lock.
    pub(super) fn has_dirty(&self, volume: &Volume) -> bool {
        let tail = || DirtyExtents::of(self.memory(), Some(*volume)).tail(volume);
        volume.current_bits != 0 || volume.pending_bits != 0 || tail().is_some_and(|tail| !tail.is_empty())
    }

    /// Counts the bits that a dead owner left; the memory is ours alone. Bits behind the volume's last
    /// granule go: `dirty_extents` shows none of them, so they would never be repaired.
    pub(super) fn count_bits(&self, volume: &mut Volume) {
        let granules = volume.size_bytes.div_ceil(GRANULE);
        let count = |map_at: u64| {
            for_words(granules..volume.covered_bytes() / GRANULE, |word, bits| {
                self.memory().and64(map_at + word * 8, !bits, Relaxed);
            });
            let words = (0..volume.bitmap_bytes).step_by(8);
            words.map(|at| u64::from(self.memory().load64(map_at + at, Relaxed).count_ones())).sum()
        };
        (volume.current_bits, volume.pending_bits) = (count(volume.bitmap_at), count(volume.pending_at()));
    }
}

impl Volume {
    /// Offset of the pending bitmap in the mapping.
    pub(super) fn pending_at(&self) -> u64 {
        self.bitmap_at + self.bitmap_bytes
    }

    /// Bytes of the volume that its bitmap can tell apart.
    pub(super) fn covered_bytes(&self) -> u64 {
        self.bitmap_bytes * 8 * GRANULE
    }
}

/// Calls `each(word index, mask)` for the words that hold these bits.
fn for_words(bits: Range<u64>, mut each: impl FnMut(u64, u64)) {
    let mut bit = bits.start;
    while bit < bits.end {
        let word = bit / 64;
        let end = ((word + 1) * 64).min(bits.end);
        each(word, (u64::MAX >> (64 - (end - bit))) << (bit % 64));
        bit = end;
    }
}

/// First dirty byte of what lies beyond the pending bitmap.
fn pending_tail<M: Memory>(memory: &M, volume: &Volume) -> Option<u64> {
    if memory.load32(volume.slot + slot_at::PENDING_TAIL_DIRTY, Relaxed) == 0 {
        return None;
    }
    let from = memory.load64(volume.slot + slot_at::PENDING_TAIL_FROM, Relaxed);
    let is_sound = from <= volume.size_bytes;
    Some(if is_sound { from.max(volume.covered_bytes()) } else { volume.covered_bytes() })
}

/// Dirty ranges of one volume, ascending, merged.
#[derive(Debug)]
pub struct DirtyExtents<'r, M> {
    memory: &'r M,
    volume: Option<Volume>,
    /// Next granule to look at.
    granule: u64,
}

impl<'r, M: Memory> DirtyExtents<'r, M> {
    pub(super) fn of(memory: &'r M, volume: Option<Volume>) -> Self {
        Self { memory, volume, granule: 0 }
    }

    /// First granule at or after the cursor whose bit is `set`; the bitmap's end when there is none.
    fn seek(&self, volume: &Volume, set: bool) -> u64 {
        let end = volume.bitmap_bytes * 8;
        let mut granule = self.granule;
        while granule < end {
            let at = granule / 64 * 8;
            // Acquire: a bit that has left the current map is seen in the pending one.
            let word = self.memory.load64(volume.bitmap_at + at, Acquire)
                | self.memory.load64(volume.pending_at() + at, Relaxed);
            let found = (if set { word } else { !word }) >> (granule % 64);
            if found != 0 {
                return granule + u64::from(found.trailing_zeros());
            }
            granule = (granule / 64 + 1) * 64;
        }
        end
    }

    /// The dirty part of what lies beyond the bitmap.
    fn tail(&self, volume: &Volume) -> Option<Range<u64>> {
        let all = self.memory.load32(volume.slot + slot_at::TAIL_DIRTY, Acquire) != 0;
        let from = if all { Some(volume.covered_bytes()) } else { pending_tail(self.memory, volume) };
        from.map(|from| from..volume.size_bytes)
    }
}

impl<M: Memory> Iterator for DirtyExtents<'_, M> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let volume = self.volume?;
        let covered = volume.covered_bytes();
        let start = self.seek(&volume, true) * GRANULE;
        self.granule = start / GRANULE;
        let mut found = start..self.seek(&volume, false) * GRANULE;
        self.granule = found.end / GRANULE;
        if found.end == covered {
            let tail = self.tail(&volume);
            let joined = tail.clone().filter(|tail| found.is_empty() || tail.start == covered);
            // A tail that lies apart comes with the next call.
            if joined.is_some() || tail.is_none() {
                self.volume = None;
            }
            if let Some(tail) = joined {
                found = if found.is_empty() { tail } else { found.start..tail.end };
            }
        }
        found.end = found.end.min(volume.size_bytes);
        (found.start < found.end).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consumer::Consumer;
    use crate::testing::{heap_ring, write};
    use std::vec::Vec;

    const MIB: u64 = 1 << 20;

    fn extents<H: Host>(ring: &Ring<H>, volume: u32) -> Vec<Range<u64>> {
        ring.dirty_extents(volume).collect()
    }

    #[test]
    fn ranges_are_whole_granules_merged_and_cut_at_the_size() {
        let ring = heap_ring(1024, 1);
        assert!(!ring.is_dirty(7) && extents(&ring, 7).is_empty());
        for range in [0..1, GRANULE - 1..GRANULE + 1, 5 * GRANULE..6 * GRANULE, MIB - 1..u64::MAX] {
            assert!(ring.mark_dirty(7, range));
        }
        let expected = [0..2 * GRANULE, 5 * GRANULE..6 * GRANULE, 15 * GRANULE..MIB];
        assert_eq!(extents(&ring, 7), expected);
        assert!(ring.mark_dirty(9, MIB..MIB + 1));
        assert_eq!(
            extents(&ring, 9),
            core::slice::from_ref(&(MIB..MIB + 4096)),
            "a volume that ends in a granule"
        );
        assert!(!ring.mark_dirty(8, 0..1), "no such volume");
        assert!(!ring.is_dirty(8));
    }

    #[test]
    fn only_pending_bits_of_whole_granules_are_cleared() {
        let ring = heap_ring(1024, 1);
        ring.mark_dirty(9, 0..u64::MAX);
        ring.clear_dirty(9, 0..u64::MAX);
        assert_eq!(extents(&ring, 9).len(), 1, "current bits stay");
        ring.begin_resync(1).unwrap();
        ring.clear_dirty(9, 1..3 * GRANULE - 1);
        assert_eq!(extents(&ring, 9), [0..GRANULE, 2 * GRANULE..MIB + 4096]);
        ring.clear_dirty(9, MIB..MIB + 4095);
        assert_eq!(extents(&ring, 9), [0..GRANULE, 2 * GRANULE..MIB + 4096]);
        ring.clear_dirty(9, MIB..MIB + 4096);
        assert_eq!(extents(&ring, 9), [0..GRANULE, 2 * GRANULE..MIB]);
        ring.clear_dirty(9, 0..MIB);
        assert!(!ring.is_dirty(9));
    }

    #[test]
    fn one_flag_stands_for_everything_beyond_the_bitmap() {
        // A line of bitmap covers 32 MiB.
        let ring = heap_ring(1024, 1);
        let entry = || Entry::write(7, 40 * MIB, 512, 0);
        assert_eq!(ring.capture(entry(), &[0; 512], 1), Err(Refused::BeyondEnd));
        assert_eq!(ring.grow(7, 64 * MIB, b"64 MiB", 1), Ok(Captured::Ring(1)));
        assert_eq!(ring.grow(7, 64 * MIB, b"again", 1), Err(Refused::Malformed));
        assert!(matches!(ring.capture(entry(), &[0; 512], 1), Ok(Captured::Ring(_))));
        ring.set_mode_bitmap(CAUSE_AGENT, 5);
        assert_eq!(ring.loss(), Some(Loss { since_ns: 5, cause: CAUSE_AGENT }));
        assert!(matches!(ring.capture(entry(), &[0; 512], 1), Ok(Captured::Bits)));
        assert!(ring.mark_dirty(7, 32 * MIB - 1..32 * MIB));
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(32 * MIB - GRANULE..64 * MIB)));
        ring.begin_resync(6).unwrap();
        ring.clear_dirty(7, 0..64 * MIB - 1);
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(64 * MIB - GRANULE..64 * MIB)));
        ring.clear_dirty(7, 32 * MIB..64 * MIB);
        assert!(!ring.is_dirty(7));
    }

    #[test]
    fn what_lies_beyond_the_bitmap_is_repaired_from_its_first_byte_on() {
        let ring = heap_ring(1024, 1);
        let _ = ring.grow(7, 64 * MIB, b"64 MiB", 1).unwrap();
        let overflow = |from: u64| {
            ring.set_mode_bitmap(CAUSE_AGENT, 5);
            ring.mark_dirty(7, from..from + 1);
            ring.begin_resync(6).unwrap();
        };
        overflow(31 * MIB);
        ring.mark_dirty(7, 40 * MIB..41 * MIB);
        let last = 32 * MIB - GRANULE;
        assert_eq!(extents(&ring, 7), [31 * MIB..31 * MIB + GRANULE, 32 * MIB..64 * MIB]);
        ring.clear_dirty(7, 32 * MIB..40 * MIB);
        assert_eq!(extents(&ring, 7).last(), Some(&(32 * MIB..64 * MIB)), "current, not pending");
        overflow(last);
        assert_eq!(extents(&ring, 7).last(), Some(&(last..64 * MIB)));
        ring.clear_dirty(7, 33 * MIB..64 * MIB);
        assert_eq!(extents(&ring, 7).last(), Some(&(last..64 * MIB)), "something before it is dirty");
        ring.clear_dirty(7, 32 * MIB..33 * MIB + 1);
        let expected = [31 * MIB..31 * MIB + GRANULE, last..32 * MIB, 33 * MIB..64 * MIB];
        assert_eq!(extents(&ring, 7), expected);
        ring.clear_dirty(7, 0..32 * MIB);
        ring.clear_dirty(7, 33 * MIB..48 * MIB);
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(48 * MIB..64 * MIB)));
        assert_eq!(ring.end_resync(7), Err(Refused::Dirty));
        let _ = ring.grow(7, 65 * MIB, b"65 MiB", 8).unwrap();
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(48 * MIB..65 * MIB)), "grown meanwhile");
        ring.fence().unwrap();
        assert_eq!(
            extents(&ring, 7),
            core::slice::from_ref(&(48 * MIB..65 * MIB)),
            "a begin keeps what is done"
        );
        ring.mark_dirty(7, 34 * MIB..35 * MIB);
        ring.fence().unwrap();
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(32 * MIB..65 * MIB)), "anew: all of it");
        ring.clear_dirty(7, 32 * MIB..64 * MIB);
        ring.clear_dirty(7, 64 * MIB..65 * MIB);
        assert!(!ring.is_dirty(7));
    }

    #[test]
    fn a_growth_that_does_not_fit_still_lets_the_write_pass() {
        let ring = heap_ring(256, 1);
        let _ = write(&ring, 7, 0, &[1; 128], 1);
        assert_eq!(ring.grow(7, 2 * MIB, &[1; 64], 2), Ok(Captured::Bits));
        assert_eq!(ring.mode(), Mode::Bitmap);
        let beyond = ring.capture(Entry::write(7, MIB, 512, 0), &[0; 512], 3);
        assert_eq!(beyond, Ok(Captured::Bits));
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(MIB..MIB + GRANULE)));
    }

    #[test]
    fn a_resync_begins_and_ends_in_one_step_each() {
        let ring = heap_ring(256, 1);
        let token = write(&ring, 7, 0, &[1; 128], 1);
        assert_eq!(ring.capture(Entry::write(7, 0, 512, 0), &[0; 512], 2), Ok(Captured::Bits));
        assert_eq!(
            ring.capture(core::iter::once(Entry::event(Op::Flush, 0, 0)), &[], 3),
            Err(Refused::BitmapMode)
        );
        assert_eq!(ring.end_resync(4), Err(Refused::BitmapMode));
        assert_eq!(ring.loss(), Some(Loss { since_ns: 2, cause: CAUSE_RING_FULL }));
        // One line is left; `ResyncBegin` takes it.
        assert_eq!(ring.begin_resync(5), Ok(2));
        assert_eq!((ring.mode(), ring.end_resync(6)), (Mode::Ring, Err(Refused::Dirty)));
        ring.clear_dirty(7, 0..GRANULE);
        assert_eq!(ring.end_resync(7), Err(Refused::Full));
        assert_eq!((ring.mode(), ring.begin_resync(8)), (Mode::Ring, Err(Refused::Full)));
        ring.mark_done(token);
        let mut consumer = Consumer::new(&ring).unwrap();
        while consumer.advance().unwrap() {}
        assert_eq!(consumer.release(u64::MAX), Ok(3));
        assert_eq!((ring.end_resync(9), ring.loss()), (Ok(3), None));
        assert_eq!(consumer.peek().unwrap().unwrap().op(), Op::ResyncEnd);
    }

    #[test]
    fn a_resync_that_began_without_a_loss_owes_its_end_too() {
        let ring = heap_ring(256, 1);
        ring.mark_dirty(7, 0..1);
        let token = write(&ring, 7, 0, &[1; 128], 1);
        assert_eq!(ring.begin_resync(5), Ok(2));
        ring.clear_dirty(7, 0..GRANULE);
        assert_eq!(ring.loss(), Some(Loss { since_ns: 5, cause: CAUSE_AGENT }), "what a new owner goes by");
        ring.mark_done(token);
        let mut consumer = Consumer::new(&ring).unwrap();
        while consumer.advance().unwrap() {}
        assert_eq!(consumer.release(u64::MAX), Ok(3));
        assert_eq!((ring.end_resync(9), ring.loss()), (Ok(3), None));

        let full = heap_ring(256, 1);
        let _ = write(&full, 7, 0, &[1; 128], 1);
        assert!(full.capture(core::iter::once(Entry::event(Op::Flush, 0, 0)), &[], 2).is_ok());
        assert_eq!(
            (full.begin_resync(3), full.loss()),
            (Err(Refused::Full), None),
            "one that did not begin owes none"
        );
    }

    #[test]
    fn a_fence_moves_bits_and_nothing_else() {
        let ring = heap_ring(1024, 1);
        ring.mark_dirty(7, 0..1);
        assert_eq!((ring.fence(), ring.mode(), ring.captured_lsn()), (Ok(0), Mode::Ring, 0));
        ring.mark_dirty(7, GRANULE..GRANULE + 1);
        ring.clear_dirty(7, 0..2 * GRANULE);
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(GRANULE..2 * GRANULE)), "set after the fence");
        ring.set_mode_bitmap(CAUSE_AGENT, 1);
        assert_eq!(ring.fence(), Err(Refused::BitmapMode));
    }

    #[test]
    fn a_second_overflow_during_a_resync_needs_a_second_begin() {
        let ring = heap_ring(1024, 1);
        ring.mark_dirty(7, 0..1);
        ring.begin_resync(1).unwrap();
        ring.set_mode_bitmap(CAUSE_QUOTA, 2);
        assert_eq!(ring.capture(Entry::write(7, GRANULE, 512, 0), &[0; 512], 3), Ok(Captured::Bits));
        ring.clear_dirty(7, 0..2 * GRANULE);
        assert_eq!(extents(&ring, 7), core::slice::from_ref(&(GRANULE..2 * GRANULE)));
        assert_eq!(ring.end_resync(4), Err(Refused::BitmapMode));
        ring.begin_resync(5).unwrap();
        ring.clear_dirty(7, GRANULE..2 * GRANULE);
        assert!(ring.end_resync(6).is_ok());
    }
}
