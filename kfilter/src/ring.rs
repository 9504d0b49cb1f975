// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! The producers' side: where a write gets its place in the order, or its dirty bits.
//!
//! State: head, mode and bitmaps in the shared memory; the `Reserver` (their copies, the next lsn, the known
//! sizes) under the host's lock. A new owner rebuilds the `Reserver` from the shared memory (`recovery`).
//!
//! ```text
//!   under the lock                                        outside it
//!   1 write every header, RESERVED, beyond head           3 copy the payload
//!   2 store head (release): all pieces appear at once     4 store PUBLISHED (release), ring the bell
//! ```
//!
//! Invariants:
//! * Headers in [tail, head) are whole: a header is written before the head that shows it. So the next lsn
//!   follows from the last header, whenever the owner dies.
//! * Every record takes an lsn, in ring order, without a gap; a pad takes none.
//! * A write is in the ring, or in a dirty bitmap, never in both and never in none: the choice is made under
//!   the lock, for all pieces of a write together, before its producer may start it.
//! * Head stands still while the mode is BITMAP, but for the record of a begin (`handover`).

use super::abi::{self, Identity, Layout, RecordHeader, VolumeSpec, control_at, identity_at, slot_at, state};
use super::entry::Entry;
use super::memory::{Host, Memory};
use super::reservation::{Reservation, Token};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Where writes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Into the ring.
    Ring,
    /// Into the dirty bitmaps.
    Bitmap,
}

/// Why a reservation was refused. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The entry contradicts itself, or is of a kind that only the ring itself writes.
    Malformed,
    /// No such volume in this ring.
    UnknownVolume,
    /// The extent ends beyond the known size: `grow` the volume first.
    BeyondEnd,
    /// No room for a record that touches no extent.
    Full,
    /// Not while the mode is BITMAP.
    BitmapMode,
    /// Not while a dirty bit is set.
    Dirty,
    /// Another begin or fence is under way.
    Moving,
    /// Another consumer is alive.
    ConsumerTaken,
}

/// What became of a write.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Captured<T> {
    /// It has its place in the order.
    Ring(T),
    /// The ring is full, or was before: its dirty bits are set.
    Bits,
}

/// A volume as the reservation lock knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Volume {
    pub(super) id: u32,
    pub(super) size_bytes: u64,
    /// Offset of its slot in the mapping.
    pub(super) slot: u64,
    /// Offset of the current bitmap; the pending one follows.
    pub(super) bitmap_at: u64,
    pub(super) bitmap_bytes: u64,
    /// Bits that are set in the current bitmap …
    pub(super) current_bits: u64,
    /// … and in the pending one.
    pub(super) pending_bits: u64,
}

/// What the reservation lock protects: the next place in the order.
#[derive(Debug)]
pub struct Reserver {
    pub(super) head: u64,
    /// A tail that was seen; the true one is not before it.
    pub(super) tail_seen: u64,
    pub(super) next_lsn: u64,
    pub(super) last_time_ns: u64,
    pub(super) mode: Mode,
    /// A begin or a fence moves bits, one piece for each hold of the lock.
    pub(super) moving: bool,
    /// It is a begin that has its record, and the mode is BITMAP until it has moved the last bit.
    pub(super) begun: bool,
    pub(super) consumer_taken: bool,
    pub(super) volumes: [Volume; abi::MAX_VOLUMES],
    pub(super) volume_count: usize,
}

impl Reserver {
    /// What the host's lock is made with.
    pub const fn new() -> Self {
        let none = Volume {
            id: 0,
            size_bytes: 0,
            slot: 0,
            bitmap_at: 0,
            bitmap_bytes: 0,
            current_bits: 0,
            pending_bits: 0,
        };
        Self {
            head: 0,
            tail_seen: 0,
            next_lsn: 0,
            last_time_ns: 0,
            mode: Mode::Bitmap,
            moving: false,
            begun: false,
            consumer_taken: false,
            volumes: [none; abi::MAX_VOLUMES],
            volume_count: 0,
        }
    }

    pub(super) fn volumes(&self) -> &[Volume] {
        // Never more than there are.
        self.volumes.get(..self.volume_count).unwrap_or(&[])
    }

    pub(super) fn volume(&self, id: u32) -> Option<&Volume> {
        self.volumes().iter().find(|volume| volume.id == id)
    }

    pub(super) fn volume_mut(&mut self, id: u32) -> Option<&mut Volume> {
        let count = self.volume_count;
        self.volumes.iter_mut().take(count).find(|volume| volume.id == id)
    }
}

impl Default for Reserver {
    fn default() -> Self {
        Self::new()
    }
}

/// A ring in a host's memory. Shared by all producers and the one consumer.
#[derive(Debug)]
pub struct Ring<H> {
    pub(super) host: H,
    pub(super) layout: Layout,
}

impl<H: Host> Ring<H> {
    /// Makes an empty ring whose first record gets `first_lsn` and no earlier time than `last_time_ns`, in
    /// memory that is all zeros and as long as `Layout::plan` says; `None` when the memory, the plan, an id
    /// given twice or an lsn of 0 forbid it.
    pub fn format(
        host: H,
        identity: &Identity,
        volumes: &[VolumeSpec],
        ring_bytes: u64,
        first_lsn: u64,
        last_time_ns: u64,
    ) -> Option<Self> {
        let layout = Layout::plan(ring_bytes, volumes)?;
        let twice = |at: usize| volumes.iter().take(at).any(|volume| volume.id == volumes[at].id);
        if host.memory().len() != layout.total_bytes || first_lsn == 0 || (0..volumes.len()).any(twice) {
            return None;
        }
        let put = |at: u64, bytes: &[u8]| {
            // SAFETY: nobody else knows this ring yet.
            unsafe { host.memory().write(at, bytes) }
        };
        put(identity_at::MAGIC, &abi::MAGIC.to_le_bytes());
        put(identity_at::VERSION, &abi::VERSION.to_le_bytes());
        put(identity_at::VOLUMES, &u32::try_from(volumes.len()).ok()?.to_le_bytes());
        put(identity_at::BOOT_ID, &identity.boot_id);
        put(identity_at::GROUP_ID, &identity.group_id);
        put(identity_at::EPOCH, &identity.epoch.to_le_bytes());
        put(identity_at::EPOCH_ID, &identity.epoch_id);
        put(identity_at::RING_BYTES, &layout.ring_bytes.to_le_bytes());
        put(identity_at::RING_AT, &layout.ring_at.to_le_bytes());
        put(identity_at::TOTAL, &layout.total_bytes.to_le_bytes());
        host.memory().store64(control_at::ANCHOR_LSN, first_lsn, Relaxed);
        host.memory().store64(control_at::ANCHOR_TIME, last_time_ns, Relaxed);
        host.locked(|reserver| {
            reserver.next_lsn = first_lsn;
            reserver.last_time_ns = last_time_ns;
            reserver.mode = Mode::Ring;
            reserver.volume_count = volumes.len();
            let mut slot = slot_at::SLOTS;
            let mut bitmap_at = abi::BITMAPS_AT;
            for (known, volume) in reserver.volumes.iter_mut().zip(volumes) {
                let bitmap_bytes = abi::bitmap_bytes(volume.size_bytes);
                put(slot + slot_at::ID, &volume.id.to_le_bytes());
                put(slot + slot_at::SECTOR, &volume.sector_bytes.to_le_bytes());
                put(slot + slot_at::UUID, &volume.uuid);
                put(slot + slot_at::BITMAP_AT, &bitmap_at.to_le_bytes());
                put(slot + slot_at::BITMAP_BYTES, &bitmap_bytes.to_le_bytes());
                host.memory().store64(slot + slot_at::SIZE, volume.size_bytes, Relaxed);
                *known = Volume {
                    id: volume.id,
                    size_bytes: volume.size_bytes,
                    slot,
                    bitmap_at,
                    bitmap_bytes,
                    current_bits: 0,
                    pending_bits: 0,
                };
                slot += slot_at::BYTES;
                bitmap_at += 2 * bitmap_bytes;
            }
        });
        Some(Self { host, layout })
    }

    /// The surroundings.
    pub fn host(&self) -> &H {
        &self.host
    }

    pub(super) fn memory(&self) -> &H::Memory {
        self.host.memory()
    }

    /// Length of the ring.
    pub fn ring_bytes(&self) -> u64 {
        self.layout.ring_bytes
    }

    /// Bytes reserved and not yet released.
    pub fn used_bytes(&self) -> u64 {
        // Tail first: it never passes a head that is read later.
        let tail = self.memory().load64(control_at::TAIL, Acquire);
        self.memory().load64(control_at::HEAD, Acquire).wrapping_sub(tail).min(self.layout.ring_bytes)
    }

    /// Where writes go now.
    pub fn mode(&self) -> Mode {
        self.host.locked(|reserver| reserver.mode)
    }

    /// The newest lsn given out; one less than the first lsn when there was none.
    pub fn captured_lsn(&self) -> u64 {
        self.host.locked(|reserver| reserver.next_lsn - 1)
    }

    /// The lsn of the oldest record whose room is not released; the next lsn when the ring is empty. What a
    /// dead owner's journal does not hold up to here is lost.
    pub fn first_held_lsn(&self) -> u64 {
        self.memory().load64(control_at::ANCHOR_LSN, Acquire)
    }

    /// Known size of a volume.
    pub fn size_bytes(&self, volume: u32) -> Option<u64> {
        self.host.locked(|reserver| reserver.volume(volume).map(|volume| volume.size_bytes))
    }

    /// Bytes of a volume that its bitmap can tell apart; what lies beyond is repaired from its first byte on.
    pub fn covered_bytes(&self, volume: u32) -> Option<u64> {
        self.host.locked(|reserver| reserver.volume(volume).map(Volume::covered_bytes))
    }

    /// `reserve_many` of one entry.
    #[inline]
    pub fn reserve(&self, entry: Entry, now_ns: u64) -> Result<Captured<Reservation<'_, H>>, Refused> {
        self.reserve_many(core::iter::once(entry), now_ns)
    }

    /// Takes places for all entries, next to each other, or sets the dirty bits of all of them; entries that
    /// touch no extent have no bits, and are refused when they are alone. `now_ns` is realtime; a record
    /// never gets an earlier time than the one before it. Only after this returns may the write be started.
    #[inline]
    pub fn reserve_many<I>(&self, entries: I, now_ns: u64) -> Result<Captured<Reservation<'_, H>>, Refused>
    where
        I: Iterator<Item = Entry> + Clone,
    {
        if entries.clone().next().is_none() || !entries.clone().all(|entry| entry.is_sound()) {
            return Err(Refused::Malformed);
        }
        self.host.locked(|reserver| {
            let mut touches_extent = false;
            for entry in entries.clone() {
                if entry.op.touches_extent() {
                    let volume = reserver.volume(entry.volume).ok_or(Refused::UnknownVolume)?;
                    if entry.offset + entry.length > volume.size_bytes {
                        return Err(Refused::BeyondEnd);
                    }
                    touches_extent = true;
                }
            }
            match reserver.mode {
                Mode::Ring => {
                    if let Some(reservation) = self.place(reserver, entries.clone(), now_ns) {
                        return Ok(Captured::Ring(reservation));
                    }
                    if !touches_extent {
                        return Err(Refused::Full);
                    }
                    self.switch_to_bitmap(reserver, super::dirty::CAUSE_RING_FULL, now_ns);
                }
                Mode::Bitmap if !touches_extent => return Err(Refused::BitmapMode),
                Mode::Bitmap => {}
            }
            for entry in entries.filter(|entry| entry.op.touches_extent()) {
                self.set_bits(reserver, entry.volume, entry.offset, entry.length);
            }
            Ok(Captured::Bits)
        })
    }

    /// Reserves, fills and publishes. `payload` is the entries' payloads, one after the other.
    #[inline]
    pub fn capture<I>(&self, entries: I, payload: &[u8], now_ns: u64) -> Result<Captured<Token>, Refused>
    where
        I: Iterator<Item = Entry> + Clone,
    {
        Ok(match self.reserve_many(entries, now_ns)? {
            Captured::Ring(mut reservation) => {
                reservation.fill(payload);
                Captured::Ring(reservation.publish())
            }
            Captured::Bits => Captured::Bits,
        })
    }

    /// Writes the headers of all entries and shows them with one store of head; `None`, and nothing done,
    /// when they do not fit.
    pub(super) fn place<I>(
        &self,
        reserver: &mut Reserver,
        entries: I,
        now_ns: u64,
    ) -> Option<Reservation<'_, H>>
    where
        I: Iterator<Item = Entry> + Clone,
    {
        let end = self.end_of(reserver.head, entries.clone())?;
        if end - reserver.tail_seen > self.layout.ring_bytes {
            // Acquire: what the consumer read is read before we write over it.
            reserver.tail_seen = self.memory().load64(control_at::TAIL, Acquire);
            if end - reserver.tail_seen > self.layout.ring_bytes {
                return None;
            }
        }
        let mut from = None;
        let mut first = (0, 0);
        let first_lsn = reserver.next_lsn;
        let time_ns = now_ns.max(reserver.last_time_ns);
        let needs_done = entries.clone().any(|entry| entry.needs_done);
        let done = if needs_done { 0 } else { state::DONE };
        let mut position = reserver.head;
        for entry in entries {
            let total = abi::record_bytes(entry.payload_len);
            let to_end = self.layout.bytes_to_end(position);
            if total > to_end {
                self.put_pad(position, to_end);
                position += to_end;
            }
            if from.is_none() {
                from = Some(position);
                first = (position + total, u64::from(entry.payload_len));
            }
            let header = RecordHeader {
                total_bytes: bytes32(total),
                op: entry.op,
                flags: entry.flags,
                volume: entry.volume,
                offset: entry.offset,
                length: entry.length,
                lsn: reserver.next_lsn,
                time_ns,
                payload_len: entry.payload_len,
            };
            self.put(position, state::RESERVED | done, &header);
            position += total;
            reserver.next_lsn += 1;
        }
        reserver.head = position;
        reserver.last_time_ns = time_ns;
        self.memory().store64(control_at::HEAD, position, Release);
        let from = from.unwrap_or(position);
        let (first_end, payload_left) = first;
        let last_lsn = reserver.next_lsn - 1;
        // The first record is entered already; its only reader is the one who just wrote it. Where a second
        // follows, a pad may lie between them, which its header tells.
        let (at, payload_left) = if first_lsn == last_lsn { (first_end, payload_left) } else { (from, 0) };
        Some(Reservation {
            ring: self,
            from,
            to: position,
            first_lsn,
            last_lsn,
            done,
            at,
            payload_at: self.layout.offset_of(from) + abi::LINE,
            payload_left,
            filled: false,
        })
    }

    /// Where the entries would end; `None` when they are more than the ring holds.
    fn end_of(&self, head: u64, entries: impl Iterator<Item = Entry>) -> Option<u64> {
        let mut position = head;
        for entry in entries {
            let total = abi::record_bytes(entry.payload_len);
            let to_end = self.layout.bytes_to_end(position);
            position += if total > to_end { to_end + total } else { total };
            if position - head > self.layout.ring_bytes {
                return None;
            }
        }
        Some(position)
    }

    /// Fills the ring's end, which the next record does not fit in.
    fn put_pad(&self, position: u64, bytes: u64) {
        let header = RecordHeader::pad(bytes);
        self.put(position, state::PUBLISHED | state::DONE, &header);
    }

    fn put(&self, position: u64, state: u32, header: &RecordHeader) {
        let at = self.layout.offset_of(position);
        self.memory().store32(at, state, Relaxed);
        // SAFETY: room beyond head and behind the tail belongs to the holder of the lock.
        unsafe { self.memory().write(at + 4, &header.encode()) }
    }

    /// The header at a position in [tail, head).
    pub(super) fn header_at(&self, position: u64) -> Option<RecordHeader> {
        header_at(self.memory(), &self.layout, position)
    }
}

/// The header at a position in [tail, head).
pub(super) fn header_at<M: Memory>(memory: &M, layout: &Layout, position: u64) -> Option<RecordHeader> {
    // SAFETY: headers in [tail, head) do not change, but for the state word, which is not read here.
    let bytes = unsafe { memory.bytes(layout.offset_of(position) + 4, 60) };
    RecordHeader::decode(bytes.try_into().ok()?)
}

/// Length of one record, or of the room at the ring's end that one record does not fit in.
fn bytes32(bytes: u64) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "at most the largest record")]
    let short = bytes as u32;
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{MAX_PAYLOAD, Op};
    use crate::consumer::Consumer;
    use crate::testing::{Heap, IDENTITY, VOLUMES, heap_ring};
    use std::vec::Vec;

    #[test]
    fn long_writes_are_cut_into_pieces_next_to_each_other() {
        let pieces: Vec<Entry> = Entry::write(7, 4096, 300 * 1024, abi::FLAG_FUA).collect();
        let extents: Vec<_> = pieces.iter().map(|piece| (piece.offset, piece.length, piece.flags)).collect();
        let step = u64::from(MAX_PAYLOAD);
        assert_eq!(extents, [(4096, step, 1), (4096 + step, step, 1), (4096 + 2 * step, 44 * 1024, 1)]);
        let ring = heap_ring(1 << 20, 1);
        let bytes: Vec<u8> = (0..300 * 1024u32).map(|at| at.to_le_bytes()[1]).collect();
        let Captured::Ring(token) = ring.capture(pieces.into_iter(), &bytes, 1).unwrap() else {
            panic!("an empty ring has room")
        };
        assert_eq!((token.first_lsn(), token.last_lsn()), (1, 3));
        let consumer = Consumer::new(&ring).unwrap();
        let mut stream = Vec::new();
        while let Some(record) = consumer.peek().unwrap() {
            stream.extend_from_slice(record.payload());
            consumer.advance().unwrap();
        }
        assert!(stream == bytes);
    }

    #[test]
    fn what_contradicts_itself_is_refused_and_changes_nothing() {
        let ring = heap_ring(1024, 1);
        let write = Entry::write(7, 0, 512, 0).next().unwrap();
        for (entry, refused) in [
            (Entry { payload_len: 511, ..write }, Refused::Malformed),
            (Entry { offset: u64::MAX - 512, ..write }, Refused::BeyondEnd),
            (Entry { offset: u64::MAX - 511, ..write }, Refused::Malformed),
            (Entry { volume: 8, ..write }, Refused::UnknownVolume),
            (Entry::extent(Op::Discard, 7, 0, 0, 0), Refused::Malformed),
            (Entry::extent(Op::Discard, 7, 0, (1 << 20) + 1, 0), Refused::BeyondEnd),
            (Entry::event(Op::Pad, 0, 0), Refused::Malformed),
            (Entry::event(Op::ResyncEnd, 0, 0), Refused::Malformed),
            (Entry::event(Op::Bookmark, 0, MAX_PAYLOAD + 1), Refused::Malformed),
            (Entry::event(Op::Bookmark, 0, 1024), Refused::Full),
        ] {
            assert_eq!(ring.reserve(entry, 1).err(), Some(refused), "{entry:?}");
        }
        assert_eq!(ring.reserve_many(Entry::write(7, 0, 0, 0), 1).err(), Some(Refused::Malformed));
        assert_eq!((ring.captured_lsn(), ring.used_bytes(), ring.mode()), (0, 0, Mode::Ring));
    }

    #[test]
    fn a_write_larger_than_the_ring_becomes_bits() {
        let ring = heap_ring(256, 1);
        assert_eq!(ring.capture(Entry::write(7, 0, 512, 0), &[0; 512], 1), Ok(Captured::Bits));
        assert_eq!((ring.mode(), ring.captured_lsn(), ring.is_dirty(7)), (Mode::Bitmap, 0, true));
    }

    #[test]
    fn withheld_records_hold_back_what_is_behind_them() {
        for (started, shown) in [(true, abi::Op::Write), (false, abi::Op::Void)] {
            let ring = heap_ring(4096, 1);
            let Ok(Captured::Ring(mut reservation)) = ring.reserve_many(Entry::write(7, 0, 512, 0), 1) else {
                panic!("there is room")
            };
            reservation.fill(&[1; 512]);
            let withheld = reservation.withhold();
            let _ = crate::testing::write(&ring, 7, 512, &[2; 512], 1);
            let consumer = Consumer::new(&ring).unwrap();
            assert_eq!(consumer.peek(), Ok(None));
            ring.settle(withheld, started);
            assert_eq!(consumer.peek().unwrap().unwrap().op(), shown);
            assert!(consumer.advance().unwrap() && consumer.advance().unwrap());
        }
    }

    #[test]
    #[should_panic(expected = "less payload than was reserved")]
    fn a_half_filled_record_is_never_published() {
        let ring = heap_ring(1024, 1);
        let Ok(Captured::Ring(mut reservation)) = ring.reserve_many(Entry::write(7, 0, 512, 0), 1) else {
            panic!("an empty ring has room")
        };
        reservation.fill(&[0; 511]);
        let _ = reservation.publish();
    }

    #[test]
    fn no_ring_is_made_of_memory_or_volumes_that_do_not_fit() {
        let layout = Layout::plan(1024, &VOLUMES).unwrap();
        let make = |bytes, volumes: &[VolumeSpec], ring_bytes, first_lsn| {
            Ring::format(Heap::new(bytes), &IDENTITY, volumes, ring_bytes, first_lsn, 0).is_some()
        };
        assert!(make(layout.total_bytes, &VOLUMES, 1024, 1));
        assert!(!make(layout.total_bytes - 64, &VOLUMES, 1024, 1));
        assert!(!make(layout.total_bytes, &VOLUMES, 1024, 0));
        assert!(!make(layout.total_bytes, &VOLUMES, 1000, 1));
        assert!(!make(layout.total_bytes, &[VOLUMES[0], VOLUMES[0]], 1024, 1), "one id twice");
    }
}
