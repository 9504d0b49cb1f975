// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! What was not recorded: a bit for each 64 KiB of a volume, and the steps that bring a volume back.
//!
//! Two bitmaps for each volume. *current* collects writes that did not fit the ring. *pending* is what a
//! resync works off; its bits are cleared only after the data that repairs them was appended to the journal,
//! so a dead agent loses none. One flag beside each bitmap stands for everything beyond it (a volume that has
//! grown); beside the pending one stands how much of that is repaired, from its first byte on.
//!
//! Invariant: a write that is not in the ring has its bits set, in one of the two, until it is repaired. All
//! changes are made under the reservation lock; `dirty_extents` reads without it and sees each bit as of some
//! moment of the iteration.

use super::abi::{GRANULE, Op, control_at, slot_at};
use super::entry::Entry;
use super::memory::{Host, Memory};
use super::reservation::Token;
use super::ring::{Captured, Mode, Refused, Reserver, Ring, Volume};
use core::ops::Range;
use core::sync::atomic::Ordering::{Relaxed, Release};

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

    /// From now on writes only set bits, until `begin_resync`. Without effect when that is so already.
    pub fn set_mode_bitmap(&self, cause: u32, now_ns: u64) {
        self.host.locked(|reserver| {
            if reserver.mode == Mode::Ring {
                self.switch_to_bitmap(reserver, cause, now_ns);
            }
        });
    }

    /// Sets the bits of a range, in whatever mode: something recorded has become unreadable before it was
    /// acknowledged. False when there is no such volume; a range past its end is cut.
    pub fn mark_dirty(&self, volume: u32, range: Range<u64>) -> bool {
        self.host.locked(|reserver| {
            let Some(size_bytes) = reserver.volume(volume).map(|volume| volume.size_bytes) else {
                return false;
            };
            let end = range.end.min(size_bytes);
            if range.start < end {
                self.set_bits(reserver, volume, range.start, end - range.start);
            }
            true
        })
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
    /// appended to the journal. Beyond the bitmap a range counts only when it begins no later than where the dirty
    /// part begins.
    pub fn clear_dirty(&self, volume: u32, range: Range<u64>) {
        self.host.locked(|reserver| {
            let Some(volume) = reserver.volume(volume) else { return };
            let covered = volume.covered_bytes();
            let first = range.start.div_ceil(GRANULE);
            let reaches_end = range.end >= volume.size_bytes;
            let end =
                if reaches_end { covered / GRANULE } else { (range.end / GRANULE).min(covered / GRANULE) };
            for_words(first..end, |word, bits| {
                self.memory().and64(volume.pending_at() + word * 8, !bits, Relaxed);
            });
            let tail = pending_tail(self.memory(), volume).filter(|from| range.start <= *from);
            let Some(from) = tail else { return };
            let repaired = range.end / GRANULE * GRANULE;
            if reaches_end {
                self.memory().store32(volume.slot + slot_at::PENDING_TAIL_DIRTY, 0, Relaxed);
            } else if repaired > from {
                self.memory().store64(volume.slot + slot_at::PENDING_TAIL_FROM, repaired, Relaxed);
            }
        });
    }

    /// Starts a resync in one step under the lock: what is current becomes pending, writes go into the ring
    /// again, and `ResyncBegin` has its place in the order before all of them. Its lsn; refused while the
    /// ring has no room. The mask of the resync starts empty here, and the caller owes a barrier (DESIGN,
    /// section 6). Until `end_resync` there is a [`Loss`], also where no write has been lost: a new owner owes the end.
    pub fn begin_resync(&self, now_ns: u64) -> Result<u64, Refused> {
        self.host.locked(|reserver| {
            // 0 that an end is owed, before anybody can see the beginning …
            let is_first = self.memory().load64(control_at::LOST_SINCE, Relaxed) == 0;
            if is_first {
                self.memory().store32(control_at::CAUSE, CAUSE_AGENT, Relaxed);
                self.memory().store64(control_at::LOST_SINCE, now_ns.max(1), Release);
            }
            // 1 the record, so that the mode does not change without it …
            let token = self.append(reserver, Op::ResyncBegin, now_ns).inspect_err(|_| {
                if is_first {
                    self.memory().store64(control_at::LOST_SINCE, 0, Relaxed);
                }
            })?;
            // 2 … then the bits, each set in the one map before it leaves the other …
            for volume in reserver.volumes() {
                self.make_pending(volume);
            }
            // 3 … then the mode. A new owner that finds less than all of this begins again.
            reserver.mode = Mode::Ring;
            self.memory().store32(control_at::MODE, MODE_RING, Release);
            Ok(token.last_lsn())
        })
    }

    /// What is current becomes pending, without a record and without a change of mode: for ranges whose writes
    /// failed while everything else is recorded. The newest lsn given out before it; the caller owes a barrier.
    pub fn fence(&self) -> Result<u64, Refused> {
        self.host.locked(|reserver| {
            if reserver.mode == Mode::Bitmap {
                return Err(Refused::BitmapMode);
            }
            for volume in reserver.volumes() {
                self.make_pending(volume);
            }
            Ok(reserver.next_lsn - 1)
        })
    }

    /// Ends a resync in one step under the lock: reserves `ResyncEnd`, whose lsn is returned; refused unless
    /// writes go into the ring, no bit is set, and there is room.
    pub fn end_resync(&self, now_ns: u64) -> Result<u64, Refused> {
        self.host.locked(|reserver| {
            if reserver.mode == Mode::Bitmap {
                return Err(Refused::BitmapMode);
            }
            let mut volumes = reserver.volumes().iter();
            if volumes.any(|&volume| self.extents_of(volume).next().is_some()) {
                return Err(Refused::Dirty);
            }
            let token = self.append(reserver, Op::ResyncEnd, now_ns)?;
            self.memory().store64(control_at::LOST_SINCE, 0, Relaxed);
            Ok(token.last_lsn())
        })
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

    /// A record without extent or payload, reserved and published under the lock.
    fn append(&self, reserver: &mut Reserver, op: Op, now_ns: u64) -> Result<Token, Refused> {
        let entry = core::iter::once(Entry::event(op, 0, 0));
        Ok(self.place(reserver, entry, now_ns).ok_or(Refused::Full)?.publish())
    }

    pub(super) fn switch_to_bitmap(&self, reserver: &mut Reserver, cause: u32, now_ns: u64) {
        reserver.mode = Mode::Bitmap;
        self.memory().store32(control_at::CAUSE, cause, Relaxed);
        self.memory().store64(control_at::LOST_SINCE, now_ns.max(1), Relaxed);
        self.memory().store32(control_at::MODE, MODE_BITMAP, Release);
    }

    /// Sets the current bits of a range of a known volume.
    pub(super) fn set_bits(&self, reserver: &Reserver, volume: u32, offset: u64, length: u64) {
        let Some(volume) = reserver.volume(volume) else { return };
        let granules = offset / GRANULE..(offset + length).div_ceil(GRANULE);
        let covered = volume.covered_bytes() / GRANULE;
        for_words(granules.start..granules.end.min(covered), |word, bits| {
            self.memory().or64(volume.bitmap_at + word * 8, bits, Relaxed);
        });
        if granules.end > covered {
            self.memory().store32(volume.slot + slot_at::TAIL_DIRTY, 1, Relaxed);
        }
    }

    fn make_pending(&self, volume: &Volume) {
        for at in (0..volume.bitmap_bytes).step_by(8) {
            let bits = self.memory().load64(volume.bitmap_at + at, Relaxed);
            if bits != 0 {
                self.memory().or64(volume.pending_at() + at, bits, Relaxed);
                self.memory().store64(volume.bitmap_at + at, 0, Release);
            }
        }
        if self.memory().load32(volume.slot + slot_at::TAIL_DIRTY, Relaxed) != 0 {
            // The current flag last, and released: whoever dies before it leaves all of the tail dirty.
            self.memory().store64(volume.slot + slot_at::PENDING_TAIL_FROM, 0, Relaxed);
            self.memory().store32(volume.slot + slot_at::PENDING_TAIL_DIRTY, 1, Relaxed);
            self.memory().store32(volume.slot + slot_at::TAIL_DIRTY, 0, Release);
        }
    }

    fn extents_of(&self, volume: Volume) -> DirtyExtents<'_, H::Memory> {
        DirtyExtents::of(self.memory(), Some(volume))
    }
}

impl Volume {
    fn pending_at(&self) -> u64 {
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
            let word = self.memory.load64(volume.bitmap_at + at, Relaxed)
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
        let all = self.memory.load32(volume.slot + slot_at::TAIL_DIRTY, Relaxed) != 0;
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
