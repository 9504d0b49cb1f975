// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! The bytes of a ring: what producers, the consumer and a new owner agree on.
//!
//! Little-endian, 64-bit. The mapping:
//!
//! ```text
//!      0  identity page     written before the ring is put in place; epoch and its id also by `Region::renew`
//!   4096  control words     each group of words that one side writes is on a cache line of its own
//!   8192  64 volume slots   128 bytes each
//!  16384  dirty bitmaps     for each volume: current, then pending; 64 KiB a bit
//!      …  ring              page aligned, a power of two long
//! ```
//!
//! ```text
//! identity  0 magic                    | 8 version (u32), volume count (u32)
//!          16 boot id (16)             |
//!          32 group id (16)            |
//!          48 epoch number             | 56 epoch id (16)
//!          72 ring bytes               | 80 ring offset        | 88 length of the whole mapping
//!
//! control   0 head                     reserved up to here; bytes, never running back
//!          64 tail                     released up to here
//!         128 anchor lsn               | 136 anchor time       after everything released (see `consumer`)
//!         192 mode (u32), cause (u32)  | 200 lost since (realtime ns)
//!
//! slot      0 id (u32), sector (u32)   | 8 uuid (16)           | 24 size
//!          32 bitmap offset            | 40 bytes of one bitmap
//!          48 tail dirty (u32)         | 52 pending tail dirty (u32)
//!
//! record    0 state (u32, atomic)      |  4 bytes in the ring (u32)
//!           8 op, flags, 0 (u16)       | 12 volume (u32)
//!          16 offset                   | 24 length
//!          32 lsn                      | 40 time (realtime ns)
//!          48 payload length (u32), 0  | 56 0
//!          64 payload, padded to 64 bytes; never wraps: a `Pad` record fills the ring's end
//! ```

/// "AFIMRING".
pub const MAGIC: u64 = u64::from_le_bytes(*b"AFIMRING");
/// Version of these bytes; any other is a ring that we do not understand.
pub const VERSION: u32 = 1;
/// Records are aligned to this, which is also the size of a record header (a cache line).
pub const LINE: u64 = 64;
/// Most payload bytes of one record: the ring holds many records of the largest size.
pub const MAX_PAYLOAD: u32 = 128 * 1024;
/// Volumes of one group.
pub const MAX_VOLUMES: usize = 64;
/// Bytes of a volume that one dirty bit stands for: 2 MiB of bitmap per TiB.
pub const GRANULE: u64 = 64 * 1024;
/// Smallest ring: four records without payload.
pub const MIN_RING_BYTES: u64 = 4 * LINE;

const PAGE: u64 = 4096;

/// Offsets of the identity page.
pub mod identity_at {
    /// Magic, u64.
    pub const MAGIC: u64 = 0;
    /// Version, u32.
    pub const VERSION: u64 = 8;
    /// Volume slots in use, u32.
    pub const VOLUMES: u64 = 12;
    /// Boot id, 16 bytes.
    pub const BOOT_ID: u64 = 16;
    /// Group id, 16 bytes.
    pub const GROUP_ID: u64 = 32;
    /// Epoch number, u64.
    pub const EPOCH: u64 = 48;
    /// Epoch id, 16 bytes.
    pub const EPOCH_ID: u64 = 56;
    /// Ring bytes, u64.
    pub const RING_BYTES: u64 = 72;
    /// Offset of the ring in the mapping, u64.
    pub const RING_AT: u64 = 80;
    /// Length of the whole mapping, u64.
    pub const TOTAL: u64 = 88;
}

/// Offsets of the control words in the mapping.
pub mod control_at {
    /// Reserved up to here, u64. Written by producers under the lock.
    pub const HEAD: u64 = 4096;
    /// Released up to here, u64. Written by the consumer.
    pub const TAIL: u64 = 4096 + 64;
    /// Lsn of the first record that is not released, u64. Written before the tail.
    pub const ANCHOR_LSN: u64 = 4096 + 128;
    /// Time of the last released record, u64. Written before the tail.
    pub const ANCHOR_TIME: u64 = 4096 + 136;
    /// 0 ring, 1 bitmap, u32. Written under the lock.
    pub const MODE: u64 = 4096 + 192;
    /// Why the mode became bitmap, u32.
    pub const CAUSE: u64 = 4096 + 196;
    /// When the mode became bitmap, realtime ns, u64; 0 while nothing is lost.
    pub const LOST_SINCE: u64 = 4096 + 200;
}

/// Volume slots: where they are and what is in one.
pub mod slot_at {
    /// First slot.
    pub const SLOTS: u64 = 8192;
    /// Bytes of one slot.
    pub const BYTES: u64 = 128;
    /// Id, u32.
    pub const ID: u64 = 0;
    /// Sector size in bytes, u32.
    pub const SECTOR: u64 = 4;
    /// Uuid, 16 bytes.
    pub const UUID: u64 = 8;
    /// Size in bytes, u64.
    pub const SIZE: u64 = 24;
    /// Offset of the current bitmap in the mapping, u64; the pending one follows it.
    pub const BITMAP_AT: u64 = 32;
    /// Bytes of one bitmap, u64.
    pub const BITMAP_BYTES: u64 = 40;
    /// Something beyond the bitmap is dirty, u32.
    pub const TAIL_DIRTY: u64 = 48;
    /// The same for the pending bitmap, u32.
    pub const PENDING_TAIL_DIRTY: u64 = 52;
    /// What of the pending tail lies below this was repaired, u64; 0 for nothing of it.
    pub const PENDING_TAIL_FROM: u64 = 56;
}

/// First byte of the dirty bitmaps.
pub const BITMAPS_AT: u64 = slot_at::SLOTS + slot_at::BYTES * MAX_VOLUMES as u64;

/// Record states: the low byte of the state word, and one flag above it.
pub mod state {
    /// Never a record: memory that was not yet used.
    pub const EMPTY: u32 = 0;
    /// Room and lsn taken, payload not yet complete.
    pub const RESERVED: u32 = 1;
    /// Complete.
    pub const PUBLISHED: u32 = 2;
    /// Given up by its producer: neither started nor answered. Keeps its lsn.
    pub const VOID: u32 = 3;
    /// Mask of the state proper.
    pub const MASK: u32 = 0xff;
    /// The write is in the backing store, or the record needs no such mark.
    pub const DONE: u32 = 1 << 8;
}

/// FUA: the write itself must be durable before it is answered.
pub const FLAG_FUA: u8 = 1;
/// Preflush: everything answered before this write must be durable first.
pub const FLAG_PREFLUSH: u8 = 2;

/// What a record says. Append-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Bytes written; the payload is the bytes.
    Write = 1,
    /// Range given up; zeros on the replica.
    Discard = 2,
    /// Range of zeros.
    WriteZeroes = 3,
    /// Everything answered before is durable.
    Flush = 4,
    /// A named point; the payload is the name in UTF-8.
    Bookmark = 5,
    /// A volume was added, removed or changed its size; the payload is opaque here.
    Volume = 6,
    /// A recorded write failed on the device: its range is not known to hold it.
    Failed = 7,
    /// Place in the order for a chunk read by a resync.
    SyncSlot = 8,
    /// From here on the stream holds no recovery points …
    ResyncBegin = 9,
    /// … until here.
    ResyncEnd = 10,
    /// A reservation that was given up. Not stored as an op: it is how a record in state VOID reads.
    Void = 11,
    /// The clock moved by more than the group tolerates.
    ClockJump = 12,
    /// Fills the ring's end. Takes no lsn and is never shown to the consumer.
    Pad = 255,
}

impl Op {
    /// The op of a byte from the ring.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Write,
            2 => Self::Discard,
            3 => Self::WriteZeroes,
            4 => Self::Flush,
            5 => Self::Bookmark,
            6 => Self::Volume,
            7 => Self::Failed,
            8 => Self::SyncSlot,
            9 => Self::ResyncBegin,
            10 => Self::ResyncEnd,
            11 => Self::Void,
            12 => Self::ClockJump,
            255 => Self::Pad,
            _ => return None,
        })
    }

    /// Whether the record changes, or casts doubt on, a range of its volume. These become dirty bits when
    /// they cannot be recorded; the others just cannot be recorded.
    pub const fn touches_extent(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes | Self::Failed)
    }
}

/// A record's header without its state word, which is only ever accessed as an atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Header, payload and padding.
    pub total_bytes: u32,
    /// What the record says.
    pub op: Op,
    /// `FLAG_*`.
    pub flags: u8,
    /// Volume id within the group.
    pub volume: u32,
    /// Byte offset in the volume.
    pub offset: u64,
    /// Bytes of the extent.
    pub length: u64,
    /// Position in the group's order; 0 for a pad.
    pub lsn: u64,
    /// Realtime, never running back within the ring; 0 for a pad.
    pub time_ns: u64,
    /// Bytes that follow the header.
    pub payload_len: u32,
}

impl RecordHeader {
    /// What fills room that no record fits in.
    pub fn pad(bytes: u64) -> Self {
        #[allow(clippy::cast_possible_truncation, reason = "less than the largest record")]
        let total_bytes = bytes as u32;
        Self {
            total_bytes,
            op: Op::Pad,
            flags: 0,
            volume: 0,
            offset: 0,
            length: 0,
            lsn: 0,
            time_ns: 0,
            payload_len: 0,
        }
    }

    /// Bytes 4 to 64 of the header.
    pub fn encode(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        bytes[0..4].copy_from_slice(&self.total_bytes.to_le_bytes());
        bytes[4] = self.op as u8;
        bytes[5] = self.flags;
        bytes[8..12].copy_from_slice(&self.volume.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.offset.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..36].copy_from_slice(&self.lsn.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.time_ns.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes
    }

    /// The reverse of `encode`; `None` for an op that we do not know, or bytes set that must be zero.
    pub fn decode(bytes: &[u8; 60]) -> Option<Self> {
        if u16_at(bytes, 6) != 0 || u32_at(bytes, 48) != 0 || u64_at(bytes, 52) != 0 {
            return None;
        }
        Some(Self {
            total_bytes: u32_at(bytes, 0),
            op: Op::from_byte(bytes[4])?,
            flags: bytes[5],
            volume: u32_at(bytes, 8),
            offset: u64_at(bytes, 12),
            length: u64_at(bytes, 20),
            lsn: u64_at(bytes, 28),
            time_ns: u64_at(bytes, 36),
            payload_len: u32_at(bytes, 44),
        })
    }

    /// Whether the lengths agree with each other and with the room that the ring has from here: `to_end`
    /// bytes to its physical end, `to_head` to the last reserved byte. Nothing is read by a length that
    /// failed this.
    pub fn is_sound(&self, to_end: u64, to_head: u64) -> bool {
        let total = u64::from(self.total_bytes);
        if total < LINE || total % LINE != 0 || total > to_end || total > to_head {
            return false;
        }
        let extent_ends = self.offset.checked_add(self.length).is_some();
        match self.op {
            Op::Pad => total == to_end && self.payload_len == 0 && self.lsn == 0,
            Op::Void => false,
            op => {
                let write_matches = op != Op::Write || u64::from(self.payload_len) == self.length;
                self.payload_len <= MAX_PAYLOAD
                    && total == record_bytes(self.payload_len)
                    && self.lsn != 0
                    && write_matches
                    && extent_ends
            }
        }
    }
}

/// Bytes that a record with this payload takes in the ring.
pub const fn record_bytes(payload_len: u32) -> u64 {
    (LINE + payload_len as u64).next_multiple_of(LINE)
}

/// `N` bytes of a header, which is longer than `at + N` by construction.
fn array_at<const N: usize>(bytes: &[u8; 60], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u16_at(bytes: &[u8; 60], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8; 60], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8; 60], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// Whose ring it is. Any mismatch at a take-over means that the ring is lost, hence a new epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The kernel's boot id: a ring does not outlive its boot.
    pub boot_id: [u8; 16],
    /// The group.
    pub group_id: [u8; 16],
    /// The epoch's number …
    pub epoch: u64,
    /// … and its random id.
    pub epoch_id: [u8; 16],
}

/// A volume as it is known when the ring is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Id within the group.
    pub id: u32,
    /// Logical sector.
    pub sector_bytes: u32,
    /// Identity of the volume.
    pub uuid: [u8; 16],
    /// Size.
    pub size_bytes: u64,
}

/// Bytes of one bitmap that covers a volume of this size.
pub const fn bitmap_bytes(size_bytes: u64) -> u64 {
    let lines = size_bytes.div_ceil(GRANULE * LINE * 8);
    if lines == 0 { LINE } else { lines * LINE }
}

/// Where the ring lies in its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Offset of the ring's first byte.
    pub ring_at: u64,
    /// Length of the ring, a power of two.
    pub ring_bytes: u64,
    /// Length of the mapping.
    pub total_bytes: u64,
}

impl Layout {
    /// The layout for these bitmaps (bytes of one bitmap for each volume); `None` when the ring is no power
    /// of two, too small, or when there are too many volumes or the sum overflows.
    pub fn new(ring_bytes: u64, bitmaps: impl Iterator<Item = u64>) -> Option<Self> {
        if !ring_bytes.is_power_of_two() || ring_bytes < MIN_RING_BYTES {
            return None;
        }
        let mut end = BITMAPS_AT;
        for (index, bytes) in bitmaps.enumerate() {
            if index >= MAX_VOLUMES || bytes == 0 || bytes % LINE != 0 {
                return None;
            }
            end = end.checked_add(bytes.checked_mul(2)?)?;
        }
        let ring_at = end.checked_next_multiple_of(PAGE)?;
        let total_bytes = ring_at.checked_add(ring_bytes)?;
        if total_bytes > isize::MAX as u64 {
            return None;
        }
        Some(Self { ring_at, ring_bytes, total_bytes })
    }

    /// The layout of a new ring for these volumes.
    pub fn plan(ring_bytes: u64, volumes: &[VolumeSpec]) -> Option<Self> {
        Self::new(ring_bytes, volumes.iter().map(|volume| bitmap_bytes(volume.size_bytes)))
    }

    /// Offset in the mapping of a position in the ring.
    pub const fn offset_of(&self, position: u64) -> u64 {
        self.ring_at + (position & (self.ring_bytes - 1))
    }

    /// Bytes from a position to the ring's physical end.
    pub const fn bytes_to_end(&self, position: u64) -> u64 {
        self.ring_bytes - (position & (self.ring_bytes - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> RecordHeader {
        RecordHeader {
            total_bytes: 4160,
            op: Op::Write,
            flags: FLAG_FUA,
            volume: 0x0403_0201,
            offset: 0x1122_3344_5566_7788,
            length: 4096,
            lsn: 7,
            time_ns: 9,
            payload_len: 4096,
        }
    }

    /// Golden bytes: added to, never edited.
    #[test]
    fn record_header_bytes_are_fixed() {
        let mut golden = [0u8; 60];
        golden[..12].copy_from_slice(&[0x40, 0x10, 0, 0, 1, 1, 0, 0, 1, 2, 3, 4]);
        golden[12..20].copy_from_slice(&[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        golden[20..28].copy_from_slice(&[0, 0x10, 0, 0, 0, 0, 0, 0]);
        golden[28] = 7;
        golden[36] = 9;
        golden[44..48].copy_from_slice(&[0, 0x10, 0, 0]);
        assert_eq!(header().encode(), golden);
        assert_eq!(RecordHeader::decode(&golden), Some(header()));
    }

    #[test]
    fn unknown_ops_and_set_reserved_bytes_are_refused() {
        for (at, value) in [(4, 0), (4, 13), (6, 1), (48, 1), (59, 1)] {
            let mut bytes = header().encode();
            bytes[at] = value;
            assert_eq!(RecordHeader::decode(&bytes), None, "byte {at} = {value}");
        }
    }

    #[test]
    fn lengths_that_disagree_are_unsound() {
        let good = header();
        assert!(good.is_sound(8192, 4160));
        assert!(!good.is_sound(4096, 8192), "past the ring's end");
        assert!(!good.is_sound(8192, 4096), "past head");
        for bad in [
            RecordHeader { total_bytes: 0, ..good },
            RecordHeader { total_bytes: 4161, ..good },
            RecordHeader { total_bytes: 4224, ..good },
            RecordHeader { payload_len: 4095, ..good },
            RecordHeader { length: 4095, ..good },
            RecordHeader { offset: u64::MAX, ..good },
            RecordHeader { lsn: 0, ..good },
            RecordHeader { op: Op::Pad, ..good },
            RecordHeader { op: Op::Void, ..good },
        ] {
            assert!(!bad.is_sound(8192, 8192), "{bad:?}");
        }
    }

    #[test]
    fn layout_refuses_what_it_cannot_hold() {
        assert_eq!(Layout::new(3 * 64, [64].into_iter()), None);
        assert_eq!(Layout::new(128, [64].into_iter()), None);
        assert_eq!(Layout::new(1 << 20, [63].into_iter()), None);
        assert_eq!(Layout::new(1 << 20, [u64::MAX - 63].into_iter()), None);
        assert_eq!(Layout::new(1 << 20, [64; 65].into_iter()), None);
        let layout = Layout::new(1 << 20, [64; 64].into_iter()).unwrap();
        assert_eq!(layout, Layout { ring_at: 24576, ring_bytes: 1 << 20, total_bytes: 24576 + (1 << 20) });
        assert_eq!(bitmap_bytes(1 << 40), 2 << 20, "2 MiB per TiB");
        assert_eq!(bitmap_bytes(1), 64);
    }
}
