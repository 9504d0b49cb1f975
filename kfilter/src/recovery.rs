// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! A new owner takes over what a dead one left in the memory.
//!
//! Steps, each harmless to repeat when the new owner dies in turn:
//! 1. Identity and layout must be ours, else the ring is lost and the group starts a new epoch.
//! 2. Every header in [tail, head) must be sound, dense in lsn and not running back in time. Nothing in the
//!    memory is trusted for a length.
//! 3. RESERVED becomes VOID: that write was neither started nor answered.
//! 4. What is published and not done is shown in lsn order: the owner writes it to the backing store again,
//!    only that (a done write may have been overwritten by one that is not in the ring), then marks it done.
//!
//! Only then is there a ring to serve from: `TakeOver` holds it back until nothing is undone.

use super::abi::{self, Identity, Layout, Op, control_at, identity_at, slot_at, state};
use super::consumer::{Malformed, Place, RecordRef};
use super::dirty::{MODE_BITMAP, MODE_RING};
use super::memory::{Host, Memory};
use super::ring::{Mode, Reserver, Ring, Volume};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Why a ring cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lost {
    /// No ring at all.
    Magic,
    /// Written by a version that we do not understand.
    Version,
    /// Left by an earlier boot.
    BootId,
    /// Another group's.
    GroupId,
    /// Another epoch's.
    Epoch,
    /// Identity, sizes or offsets contradict each other or the mapping's length.
    Layout,
    /// Head, tail, anchor or mode contradict each other.
    Control,
    /// The header at this position cannot be right.
    Record(u64),
}

impl From<Malformed> for Lost {
    fn from(malformed: Malformed) -> Self {
        Self::Record(malformed.position)
    }
}

impl core::fmt::Display for Lost {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Magic => f.write_str("it holds no ring"),
            Self::Version => f.write_str("it was written by another version"),
            Self::BootId => f.write_str("it was left by an earlier boot"),
            Self::GroupId => f.write_str("it belongs to another group"),
            Self::Epoch => f.write_str("it belongs to another epoch"),
            Self::Layout => f.write_str("its layout contradicts itself"),
            Self::Control => f.write_str("its control words contradict each other"),
            Self::Record(position) => write!(f, "the record at position {position} is malformed"),
        }
    }
}

/// A ring that was taken over and may hold writes that never reached the backing store.
#[derive(Debug)]
pub struct TakeOver<H> {
    ring: Ring<H>,
    tail: u64,
    head: u64,
}

impl<H: Host> TakeOver<H> {
    /// Takes over the ring in the host's memory, of which the caller must be the only owner.
    pub fn new(host: H, expected: &Identity) -> Result<Self, Lost> {
        let (layout, volume_count) = check_identity(host.memory(), expected)?;
        let ring = Ring { host, layout };
        let mut found = Reserver::new();
        found.volume_count = volume_count;
        ring.read_volumes(&mut found)?;
        let tail = ring.read_control(&mut found)?;
        ring.void_reserved(&mut found, tail)?;
        for volume in found.volumes.iter_mut().take(volume_count) {
            ring.count_bits(volume);
        }
        let head = found.head;
        ring.host.locked(|reserver| *reserver = found);
        Ok(Self { ring, tail, head })
    }

    /// The published records that are not done, in lsn order: write each to the backing store, then
    /// `mark_done`.
    pub fn undone(&self) -> Undone<'_, H> {
        Undone { taken: self, position: self.tail }
    }

    /// The last lsn that was given out.
    pub fn captured_lsn(&self) -> u64 {
        self.ring.captured_lsn()
    }

    /// Lsn of the first record that is not released.
    pub fn first_held_lsn(&self) -> u64 {
        self.ring.first_held_lsn()
    }

    /// Says that a record is in the backing store.
    pub fn mark_done(&self, record: &RecordRef<'_>) {
        assert!((self.tail..self.head).contains(&record.position), "a record of another ring");
        self.ring.memory().or32(self.ring.layout.offset_of(record.position), state::DONE, Release);
    }

    /// The ring, once nothing is undone; otherwise the take-over again.
    pub fn finish(self) -> Result<Ring<H>, Self> {
        if self.undone().next().is_some() { Err(self) } else { Ok(self.ring) }
    }
}

/// Records to be written to the backing store again.
#[derive(Debug)]
pub struct Undone<'t, H> {
    taken: &'t TakeOver<H>,
    position: u64,
}

impl<'t, H: Host> Iterator for Undone<'t, H> {
    type Item = RecordRef<'t>;

    fn next(&mut self) -> Option<RecordRef<'t>> {
        while self.position < self.taken.head {
            // Every place was validated, and nobody writes while a `TakeOver` holds the ring.
            match self.taken.ring.place_at(self.position, self.taken.head) {
                Ok(Place::Record { record, next, done }) => {
                    self.position = next;
                    if !done {
                        return Some(record);
                    }
                }
                Ok(Place::Pad { next }) => self.position = next,
                Ok(Place::Unpublished) | Err(Malformed { .. }) => {
                    panic!("the ring's memory was written by somebody else")
                }
            }
        }
        None
    }
}

/// Step 1: whose ring it is, and its layout as far as it can be known without the volumes.
pub(super) fn check_identity(memory: &impl Memory, expected: &Identity) -> Result<(Layout, usize), Lost> {
    if memory.len() < abi::BITMAPS_AT {
        return Err(Lost::Layout);
    }
    let word = |at: u64| memory.load64(at, Relaxed);
    let id = |at: u64| {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&word(at).to_le_bytes());
        id[8..].copy_from_slice(&word(at + 8).to_le_bytes());
        id
    };
    if word(identity_at::MAGIC) != abi::MAGIC {
        return Err(Lost::Magic);
    }
    if memory.load32(identity_at::VERSION, Relaxed) != abi::VERSION {
        return Err(Lost::Version);
    }
    if id(identity_at::BOOT_ID) != expected.boot_id {
        return Err(Lost::BootId);
    }
    if id(identity_at::GROUP_ID) != expected.group_id {
        return Err(Lost::GroupId);
    }
    if word(identity_at::EPOCH) != expected.epoch || id(identity_at::EPOCH_ID) != expected.epoch_id {
        return Err(Lost::Epoch);
    }
    let volumes = memory.load32(identity_at::VOLUMES, Relaxed) as usize;
    if volumes > abi::MAX_VOLUMES {
        return Err(Lost::Layout);
    }
    let bitmaps = (0..volumes as u64)
        .map(|volume| word(slot_at::SLOTS + volume * slot_at::BYTES + slot_at::BITMAP_BYTES));
    let layout = Layout::new(word(identity_at::RING_BYTES), bitmaps).ok_or(Lost::Layout)?;
    let same = layout.ring_at == word(identity_at::RING_AT)
        && layout.total_bytes == word(identity_at::TOTAL)
        && layout.total_bytes == memory.len();
    if same { Ok((layout, volumes)) } else { Err(Lost::Layout) }
}

impl<H: Host> Ring<H> {
    fn read_volumes(&self, found: &mut Reserver) -> Result<(), Lost> {
        let mut bitmap_at = abi::BITMAPS_AT;
        for index in 0..found.volume_count {
            let slot = slot_at::SLOTS + index as u64 * slot_at::BYTES;
            let word = |at: u64| self.memory().load64(slot + at, Relaxed);
            let volume = Volume {
                id: self.memory().load32(slot + slot_at::ID, Relaxed),
                size_bytes: word(slot_at::SIZE),
                slot,
                bitmap_at: word(slot_at::BITMAP_AT),
                bitmap_bytes: word(slot_at::BITMAP_BYTES),
                // Counted when everything was found sound.
                current_bits: 0,
                pending_bits: 0,
            };
            let twice = found.volumes[..index].iter().any(|before| before.id == volume.id);
            if volume.bitmap_at != bitmap_at || twice {
                return Err(Lost::Layout);
            }
            bitmap_at += 2 * volume.bitmap_bytes;
            found.volumes[index] = volume;
        }
        Ok(())
    }

    /// Head, mode and anchor; the tail is returned.
    fn read_control(&self, found: &mut Reserver) -> Result<u64, Lost> {
        let word = |at: u64| self.memory().load64(at, Acquire);
        let (head, tail) = (word(control_at::HEAD), word(control_at::TAIL));
        let used = head.checked_sub(tail).ok_or(Lost::Control)?;
        found.next_lsn = word(control_at::ANCHOR_LSN);
        // No ring writes as many bytes, or lives as long, as to come near the last quarter of either number.
        let far = head.max(found.next_lsn) > u64::MAX / 4 * 3;
        if used > self.layout.ring_bytes || head % abi::LINE != 0 || tail % abi::LINE != 0 || far {
            return Err(Lost::Control);
        }
        found.mode = match self.memory().load32(control_at::MODE, Acquire) {
            MODE_RING => Mode::Ring,
            MODE_BITMAP => Mode::Bitmap,
            _ => return Err(Lost::Control),
        };
        if found.next_lsn == 0 {
            return Err(Lost::Control);
        }
        found.head = head;
        found.tail_seen = tail;
        found.last_time_ns = word(control_at::ANCHOR_TIME);
        Ok(tail)
    }

    /// Steps 2 and 3. Nothing is written before everything was found sound.
    fn void_reserved(&self, found: &mut Reserver, tail: u64) -> Result<(), Lost> {
        let mut expected_lsn = None;
        let mut time_ns = 0;
        self.each_header(tail, found.head, |position, header, _| {
            let dense = expected_lsn.is_none_or(|expected| expected == header.lsn);
            let inside = !header.op.touches_extent()
                || found
                    .volume(header.volume)
                    .is_some_and(|volume| header.offset + header.length <= volume.size_bytes);
            if !dense || !inside || header.time_ns < time_ns || header.lsn > u64::MAX / 4 * 3 {
                return Err(Lost::Record(position));
            }
            // The anchor is at the tail, or ahead of it when the old owner died between its two stores.
            if expected_lsn.is_none() && header.lsn > found.next_lsn {
                return Err(Lost::Control);
            }
            expected_lsn = Some(header.lsn + 1);
            time_ns = header.time_ns;
            Ok(())
        })?;
        if let Some(next_lsn) = expected_lsn {
            if found.next_lsn > next_lsn {
                return Err(Lost::Control);
            }
            found.next_lsn = next_lsn;
            found.last_time_ns = time_ns.max(found.last_time_ns);
        }
        self.each_header(tail, found.head, |position, _, word| {
            if word & state::MASK == state::RESERVED {
                self.memory().store32(self.layout.offset_of(position), state::VOID, Release);
            }
            Ok(())
        })
    }

    /// Calls `each(position, header, state word)` for every record that is no pad, as long as headers are
    /// sound.
    fn each_header(
        &self,
        tail: u64,
        head: u64,
        mut each: impl FnMut(u64, abi::RecordHeader, u32) -> Result<(), Lost>,
    ) -> Result<(), Lost> {
        let mut position = tail;
        while position < head {
            let lost = Lost::Record(position);
            let header = self.header_at(position).ok_or(lost)?;
            if !header.is_sound(self.layout.bytes_to_end(position), head - position) {
                return Err(lost);
            }
            let word = self.memory().load32(self.layout.offset_of(position), Acquire);
            let known = word & !(state::MASK | state::DONE) == 0;
            match (header.op, word & state::MASK) {
                (Op::Pad, state::PUBLISHED) if known => {}
                (Op::Pad, _) => return Err(lost),
                (_, state::RESERVED | state::PUBLISHED | state::VOID) if known => {
                    each(position, header, word)?;
                }
                _ => return Err(lost),
            }
            position += u64::from(header.total_bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Entry;
    use crate::ring::Captured;
    use crate::testing::{Heap, IDENTITY, heap_ring, write};
    use std::vec::Vec;

    fn left_behind() -> Vec<u8> {
        let ring = heap_ring(1024, 1);
        let _ = write(&ring, 7, 0, b"first", 10);
        let done = write(&ring, 7, 512, b"second", 20);
        ring.mark_done(done);
        ring.host().bytes()
    }

    fn lost_with(at: u64, bytes: &[u8]) -> Option<Lost> {
        let mut left = left_behind();
        let at = usize::try_from(at).unwrap();
        left[at..at + bytes.len()].copy_from_slice(bytes);
        TakeOver::new(Heap::from_bytes(&left), &IDENTITY).err()
    }

    #[test]
    fn every_mismatch_has_its_reason() {
        let record = left_behind().len() as u64 - 1024;
        assert_eq!(lost_with(identity_at::MAGIC, b"x"), Some(Lost::Magic));
        assert_eq!(lost_with(identity_at::VERSION, b"x"), Some(Lost::Version));
        assert_eq!(lost_with(identity_at::BOOT_ID + 15, b"x"), Some(Lost::BootId));
        assert_eq!(lost_with(identity_at::GROUP_ID + 8, b"x"), Some(Lost::GroupId));
        assert_eq!(lost_with(identity_at::EPOCH, b"x"), Some(Lost::Epoch));
        assert_eq!(lost_with(identity_at::EPOCH_ID, b"x"), Some(Lost::Epoch));
        assert_eq!(lost_with(identity_at::VOLUMES, &[65]), Some(Lost::Layout));
        assert_eq!(lost_with(identity_at::VOLUMES, &[3]), Some(Lost::Layout));
        assert_eq!(lost_with(identity_at::RING_BYTES + 1, &[8]), Some(Lost::Layout));
        assert_eq!(lost_with(identity_at::RING_AT, &[64]), Some(Lost::Layout));
        assert_eq!(lost_with(slot_at::SLOTS + slot_at::BITMAP_AT, &[64]), Some(Lost::Layout));
        assert_eq!(lost_with(slot_at::SLOTS + slot_at::ID, &[9]), Some(Lost::Layout), "one id twice");
        assert_eq!(lost_with(control_at::TAIL + 1, &[2]), Some(Lost::Control), "a tail beyond head");
        assert_eq!(lost_with(control_at::HEAD + 1, &[9]), Some(Lost::Control), "more than the ring holds");
        assert_eq!(lost_with(control_at::HEAD, &[1]), Some(Lost::Control), "between two lines");
        assert_eq!(lost_with(control_at::MODE, &[2]), Some(Lost::Control));
        assert_eq!(
            lost_with(control_at::ANCHOR_LSN, &[0]),
            Some(Lost::Control),
            "an anchor before the first lsn"
        );
        assert_eq!(
            lost_with(control_at::ANCHOR_LSN, &[4]),
            Some(Lost::Control),
            "an anchor beyond the last lsn"
        );
        assert_eq!(lost_with(record, &[0]), Some(Lost::Record(0)), "state");
        assert_eq!(lost_with(record + 4, &[64]), Some(Lost::Record(0)), "length");
        assert_eq!(lost_with(record + 128 + 32, &[3]), Some(Lost::Record(128)), "lsn");
        assert_eq!(lost_with(record + 128 + 40, &[9]), Some(Lost::Record(128)), "time");
        assert_eq!(lost_with(record + 128 + 12, &[8]), Some(Lost::Record(128)), "volume");
        assert_eq!(lost_with(record + 128 + 18, &[16]), Some(Lost::Record(128)), "extent beyond the volume");
        assert_eq!(lost_with(record + 128 + 56, &[1]), Some(Lost::Record(128)), "reserved bytes");
        assert_eq!(lost_with(0, b""), None);
    }

    #[test]
    fn only_what_is_not_done_is_redone_and_must_be() {
        let taken = TakeOver::new(Heap::from_bytes(&left_behind()), &IDENTITY).unwrap();
        let undone: Vec<_> = taken.undone().map(|record| (record.lsn(), record.payload())).collect();
        assert_eq!(undone, [(1, &b"first"[..])]);
        let taken = taken.finish().expect_err("not before it is redone");
        let record = taken.undone().next().unwrap();
        taken.mark_done(&record);
        let ring = taken.finish().expect("redone");
        let next = ring.capture(core::iter::once(Entry::event(Op::Flush, 0, 0)), &[], 0);
        assert!(matches!(next, Ok(Captured::Ring(token)) if token.first_lsn() == 3));
    }

    #[test]
    fn an_empty_ring_still_knows_the_next_lsn() {
        let ring = heap_ring(1024, 1 << 32);
        let left = ring.host().bytes();
        let ring = TakeOver::new(Heap::from_bytes(&left), &IDENTITY).unwrap().finish().unwrap();
        assert_eq!(ring.captured_lsn(), (1 << 32) - 1);
    }
}
