//! Segments: files of frames. Their header, their names, and what there is to know about one.
//!
//! ```text
//! ┌ header 512 ┬ frame ┬ frame ┬ mark 512 ┬ frame … ┬ footer + trailer ┐   sealed: cut to exactly this
//! └────────────┴───────┴───────┴──────────┴─────────┴──────────────────┘   being written: zeros or stale bytes follow
//! ```
//! Everything starts at a multiple of 512. The header:
//!
//! ```text
//!        0     1     2     3     4     5     6     7
//!   0 │ magic "AFTRSEG1"                              │
//!   8 │ version   │kind │  0  │   flags   │     0     │   version: 1; of merged undo 2
//!  16 │ group id (16)                                 │
//!  32 │ segment number (undo: batch number)           │
//!  40 │ first lsn of the batch (undo, else 0)         │
//!  48 │ last lsn of the batch (undo, else 0)          │
//!  56 │ position before the first frame (56)          │
//! 112 │ first receipt, local clock, ns                │
//! 120 │ bytes reserved before it got its name         │
//! 128 │ nonce, random                                 │
//! 136 │ first batch, of undo that is merged; else 0   │
//! 144 │ 0 (364, reserved)                             │
//! 508 │  CRC of bytes 0..508  │
//! ```
//! Invariants: kind 1 = journal, 2 = undo; all frames of a segment are of one epoch; the name is
//! `{number:020}.seg`; the header, and the reserved size, are durable before the file has that name.

use crate::io::Disk;
use crate::layout::RawPosition;
use crate::{Epoch, Error, ErrorKind, GroupId, Lsn, Position, Result, SECTOR_BYTES};
use std::path::{Path, PathBuf};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a segment's header.
pub const HEADER_BYTES: usize = SECTOR_BYTES;

/// The file held another segment before: bytes behind the end may be stale.
pub const FLAG_RECYCLED: u16 = 1;

/// The largest number of a segment, or of a batch: far out of reach, and small enough to be added to.
pub const MAX_NUMBER: u64 = (1 << 36) - 1;

/// The largest file that a journal segment can be: what a [`crate::tail::Place`] tells.
pub const MAX_BYTES: u64 = ((1 << 28) - 1) * SECTOR_BYTES as u64;

const MAGIC: [u8; 8] = *b"AFTRSEG1";
const VERSION: u16 = 1;
/// Of a segment that stands for several batches: a program that does not know of them must not miss the
/// others.
const VERSION_MERGED: u16 = 2;

/// What a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum SegmentKind {
    /// Frames of the stream.
    Journal = 1,
    /// What one batch overwrote on the replica.
    Undo = 2,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    kind: u8,
    reserved0: u8,
    flags: U16,
    reserved1: U16,
    group: [u8; 16],
    number: U64,
    first_lsn: U64,
    last_lsn: U64,
    start: RawPosition,
    received_ns: U64,
    allocated_bytes: U64,
    nonce: U64,
    merged_from: U64,
    reserved2: [u8; 364],
    crc: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);

/// A segment's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// What the segment holds.
    pub kind: SegmentKind,
    /// [`FLAG_RECYCLED`].
    pub flags: u16,
    /// Whose it is.
    pub group: GroupId,
    /// Rises by one from segment to segment; for undo the batch number.
    pub number: u64,
    /// Undo: first lsn of the batch; else 0.
    pub first_lsn: Lsn,
    /// Undo: last lsn of the batch; else 0.
    pub last_lsn: Lsn,
    /// Position before the first frame, so that a segment can be checked alone.
    pub start: Position,
    /// When the first frame arrived, or the segment was made; local clock, ns.
    pub received_ns: u64,
    /// The file's size when it got its name, durable then: an unsealed one that is shorter has been cut
    /// since.
    pub allocated_bytes: u64,
    /// Random; also in the segment's marks and footer.
    pub nonce: u64,
    /// Undo that is merged: the first of the batches that it stands for; else 0.
    pub merged_from: u64,
}

impl SegmentHeader {
    /// The header's sector.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = Raw {
            magic: MAGIC,
            version: if self.merged_from == 0 { VERSION } else { VERSION_MERGED }.into(),
            kind: self.kind as u8,
            reserved0: 0,
            flags: self.flags.into(),
            reserved1: U16::ZERO,
            group: self.group.0,
            number: self.number.into(),
            first_lsn: self.first_lsn.0.into(),
            last_lsn: self.last_lsn.0.into(),
            start: self.start.into(),
            received_ns: self.received_ns.into(),
            allocated_bytes: self.allocated_bytes.into(),
            nonce: self.nonce.into(),
            merged_from: self.merged_from.into(),
            reserved2: [0; 364],
            crc: U32::ZERO,
        };
        raw.crc = crc32fast::hash(&raw.as_bytes()[..HEADER_BYTES - 4]).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a header from the front of `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where there is no intact one, [`ErrorKind::Unsupported`] for a newer version
    /// or kind.
    pub fn decode(bytes: &[u8]) -> Result<SegmentHeader> {
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, format!("segment header: {what}"));
        let (raw, _) = Raw::ref_from_prefix(bytes).map_err(|_| malformed("cut short"))?;
        if raw.magic != MAGIC {
            return Err(malformed("magic is not AFTRSEG1"));
        }
        if crc32fast::hash(&bytes[..HEADER_BYTES - 4]) != raw.crc.get() {
            return Err(malformed("CRC does not match"));
        }
        let unsupported =
            |what: String| Err(Error::new(ErrorKind::Unsupported, format!("segment header: {what}")));
        let merged_from = match raw.version.get() {
            // Reserved once, and not checked.
            VERSION => 0,
            VERSION_MERGED => raw.merged_from.get(),
            other => return unsupported(format!("version {other}")),
        };
        let kind = match raw.kind {
            1 => SegmentKind::Journal,
            2 => SegmentKind::Undo,
            other => return unsupported(format!("kind {other}")),
        };
        let header = SegmentHeader {
            kind,
            flags: raw.flags.get(),
            group: GroupId(raw.group),
            number: raw.number.get(),
            first_lsn: Lsn(raw.first_lsn.get()),
            last_lsn: Lsn(raw.last_lsn.get()),
            start: raw.start.into(),
            received_ns: raw.received_ns.get(),
            allocated_bytes: raw.allocated_bytes.get(),
            nonce: raw.nonce.get(),
            merged_from,
        };
        if header.number > MAX_NUMBER || header.merged_from > header.number {
            return Err(malformed("no segment has such a number"));
        }
        if !header.start.is_possible() || header.last_lsn > Lsn::MAX || header.first_lsn > header.last_lsn {
            return Err(malformed("no history reaches such an lsn"));
        }
        if header.allocated_bytes > MAX_BYTES {
            return Err(malformed("no segment is so long"));
        }
        Ok(header)
    }
}

/// What there is to know about a segment without reading its frames.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SegmentSummary {
    /// Segment number; for undo the batch number.
    pub number: u64,
    /// Its file.
    pub path: PathBuf,
    /// Position before its first frame.
    pub start: Position,
    /// Position after its last frame.
    pub end: Position,
    /// First lsn; `start`'s next where it is empty.
    pub first_lsn: Lsn,
    /// Last lsn; `start`'s where it is empty.
    pub last_lsn: Lsn,
    /// Epoch of all its frames.
    pub epoch: Epoch,
    /// Time of its first record, ns; 0 where it is empty.
    pub first_time_ns: u64,
    /// Time of its last record, ns; 0 where it is empty.
    pub last_time_ns: u64,
    /// Receipt of its first frame, local clock, ns.
    pub received_first_ns: u64,
    /// Receipt of its newest frame, local clock, ns.
    pub received_last_ns: u64,
    /// Bytes in use; once sealed the file's size.
    pub bytes: u64,
    /// Frames inside.
    pub frames: u32,
    /// Sealed segments never change again.
    pub sealed: bool,
}

impl SegmentSummary {
    /// A segment that holds nothing yet.
    pub(crate) fn empty(path: PathBuf, header: &SegmentHeader) -> SegmentSummary {
        SegmentSummary {
            number: header.number,
            path,
            start: header.start,
            end: header.start,
            first_lsn: header.start.lsn.next(),
            last_lsn: header.start.lsn,
            epoch: header.start.epoch,
            first_time_ns: 0,
            last_time_ns: 0,
            received_first_ns: header.received_ns,
            received_last_ns: header.received_ns,
            bytes: HEADER_BYTES as u64,
            frames: 0,
            sealed: false,
        }
    }
}

/// A segment's file name.
pub fn file_name(number: u64) -> String {
    format!("{number:020}.seg")
}

/// The number in a segment's file name; `None` for any other name.
pub fn parse_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    let numeric = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    if numeric { digits.parse().ok().filter(|number| *number <= MAX_NUMBER) } else { None }
}

/// Segments of a directory by rising number; other names are passed over.
///
/// # Errors
/// The disk's.
pub fn list(disk: &dyn Disk, dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let names = disk.list(dir).map_err(|error| Error::io(format!("list {}", dir.display()), error))?;
    Ok(names.iter().filter_map(|name| Some((parse_name(name)?, dir.join(name)))).collect())
}

/// The last segment that was begun: the one that the control file names, and those that follow it without a
/// gap. The control file learns of a roll without a sync, so after a power loss it may lag.
pub(crate) fn last_begun(present: &[(u64, PathBuf)], current: u64) -> u64 {
    let mut last = current;
    for (number, _) in present.iter().filter(|(number, _)| *number > current) {
        if last.checked_add(1) != Some(*number) {
            break;
        }
        last = *number;
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EpochId, Lineage};

    fn sample() -> SegmentHeader {
        let epoch = Epoch { number: 3, id: EpochId([5; 16]) };
        SegmentHeader {
            kind: SegmentKind::Undo,
            flags: FLAG_RECYCLED,
            group: GroupId([9; 16]),
            number: 10,
            first_lsn: Lsn(11),
            last_lsn: Lsn(12),
            start: Position { lineage: Lineage([4; 16]), epoch, lsn: Lsn(13), chain: 14 },
            received_ns: 15,
            allocated_bytes: 16,
            nonce: 17,
            merged_from: 0,
        }
    }

    #[test]
    fn golden_bytes_of_a_segment_header() {
        let bytes = sample().encode();
        let mut expected = [0; HEADER_BYTES];
        expected[..8].copy_from_slice(b"AFTRSEG1");
        expected[8] = 1;
        expected[10] = 2;
        expected[12] = 1;
        expected[16..32].fill(9);
        expected[56..72].fill(4);
        expected[72] = 3;
        expected[80..96].fill(5);
        for (at, value) in
            [(32, 10), (40, 11), (48, 12), (96, 13), (104, 14), (112, 15), (120, 16), (128, 17)]
        {
            expected[at] = value;
        }
        let crc = crc32fast::hash(&expected[..508]).to_le_bytes();
        expected[508..].copy_from_slice(&crc);
        assert_eq!(bytes, expected);
        assert_eq!(SegmentHeader::decode(&bytes).unwrap(), sample());
    }

    /// Version 2, of undo that stands for several batches.
    #[test]
    fn golden_bytes_of_a_merged_segment_header() {
        let merged = SegmentHeader { merged_from: 7, ..sample() };
        let bytes = merged.encode();
        let mut expected = sample().encode();
        (expected[8], expected[136]) = (2, 7);
        let crc = crc32fast::hash(&expected[..508]).to_le_bytes();
        expected[508..].copy_from_slice(&crc);
        assert_eq!(bytes, expected);
        assert_eq!(SegmentHeader::decode(&bytes).unwrap(), merged);
    }

    /// Whoever wrote them: what is done with such numbers later would overflow, or never end.
    #[test]
    fn numbers_that_no_history_reaches_are_refused_although_the_crc_holds() {
        let bad = |change: &dyn Fn(&mut SegmentHeader)| {
            let mut header = sample();
            change(&mut header);
            assert_eq!(SegmentHeader::decode(&header.encode()).unwrap_err().kind, ErrorKind::Malformed);
        };
        bad(&|header| header.start.lsn = Lsn(u64::MAX));
        bad(&|header| header.start.epoch.number = u64::MAX);
        bad(&|header| header.last_lsn = Lsn(u64::MAX));
        bad(&|header| header.first_lsn = Lsn(13));
        bad(&|header| header.number = MAX_NUMBER + 1);
        bad(&|header| header.merged_from = 11);
        bad(&|header| header.allocated_bytes = u64::MAX);
    }

    #[test]
    fn every_flip_and_cut_is_found() {
        let good = sample().encode();
        for at in 0..good.len() {
            let mut bad = good;
            bad[at] ^= 4;
            assert!(SegmentHeader::decode(&bad).is_err(), "flip at {at}");
            assert!(SegmentHeader::decode(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(parse_name(&file_name(7)), Some(7));
        assert_eq!(parse_name(&file_name(MAX_NUMBER)), Some(MAX_NUMBER));
        assert_eq!(parse_name(&file_name(MAX_NUMBER + 1)), None);
        let too_large = "99999999999999999999.seg";
        for foreign in ["7.seg", "+0000000000000000007.seg", "00000000000000000007.spare", "x", too_large] {
            assert_eq!(parse_name(foreign), None, "{foreign}");
        }
    }
}
