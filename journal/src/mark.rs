//! Durable marks: what the writer says about its own file after each fdatasync.
//!
//! A mark is written *after* the sync it speaks of, and is itself unsynced. Whoever finds one knows that
//! everything before it in the file was durable: damage below it is corruption, never a torn tail (decision
//! 0004). Marks are local: they stand outside the chain and are never sent.
//!
//! ```text
//!        0     1     2     3     4     5     6     7
//!   0 │ magic "AFTRMRK1"                              │
//!   8 │ version=1 │            0                      │
//!  16 │ segment number                                │
//!  24 │ offset of this mark in its file               │
//!  32 │ nonce of the segment                          │
//!  40 │ newest receipt, local clock, ns               │
//!  48 │ durable position (56)                         │
//! 104 │ 0 (404, reserved)                             │
//! 508 │  CRC of bytes 0..508  │
//! ```
//! Segment number, nonce and own offset tell a mark from a stale one in a recycled file, and from one that a
//! captured write happens to carry in its payload.

use crate::layout::RawPosition;
use crate::segment::SegmentHeader;
use crate::{Error, ErrorKind, Position, Result, SECTOR_BYTES};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of a mark.
pub const MAGIC: [u8; 8] = *b"AFTRMRK1";

const VERSION: u16 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    reserved0: [u8; 6],
    segment: U64,
    offset: U64,
    nonce: U64,
    received_ns: U64,
    durable: RawPosition,
    reserved1: [u8; 404],
    crc: U32,
}

const _: () = assert!(size_of::<Raw>() == SECTOR_BYTES);

/// Everything before `offset` in segment `segment` was durable when this was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Number of the segment that the mark is in.
    pub segment: u64,
    /// Offset of the mark in its file.
    pub offset: u64,
    /// Nonce of the segment.
    pub nonce: u64,
    /// Newest receipt when the mark was written, ns.
    pub received_ns: u64,
    /// What was durable.
    pub durable: Position,
}

impl Mark {
    /// The mark's sector.
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            reserved0: [0; 6],
            segment: self.segment.into(),
            offset: self.offset.into(),
            nonce: self.nonce.into(),
            received_ns: self.received_ns.into(),
            durable: self.durable.into(),
            reserved1: [0; 404],
            crc: U32::ZERO,
        };
        raw.crc = crc32fast::hash(&raw.as_bytes()[..SECTOR_BYTES - 4]).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a mark from the front of `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where there is no intact one, [`ErrorKind::Unsupported`] for a newer version.
    pub fn decode(bytes: &[u8]) -> Result<Mark> {
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, format!("durable mark: {what}"));
        let (raw, _) = Raw::ref_from_prefix(bytes).map_err(|_| malformed("cut short"))?;
        if raw.magic != MAGIC {
            return Err(malformed("magic is not AFTRMRK1"));
        }
        if crc32fast::hash(&bytes[..SECTOR_BYTES - 4]) != raw.crc.get() {
            return Err(malformed("CRC does not match"));
        }
        if raw.version.get() != VERSION {
            return Err(Error::new(ErrorKind::Unsupported, format!("durable mark: version {}", raw.version)));
        }
        let durable = Position::from(raw.durable);
        if !durable.is_possible() {
            return Err(malformed("no history reaches such an lsn"));
        }
        Ok(Mark {
            segment: raw.segment.get(),
            offset: raw.offset.get(),
            nonce: raw.nonce.get(),
            received_ns: raw.received_ns.get(),
            durable,
        })
    }

    /// Whether the mark was written here, in this life of this file.
    pub fn belongs(&self, segment: &SegmentHeader, offset: u64) -> bool {
        (self.segment, self.nonce, self.offset) == (segment.number, segment.nonce, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Epoch, EpochId, Lineage, Lsn};

    fn sample() -> Mark {
        let epoch = Epoch { number: 3, id: EpochId([5; 16]) };
        let durable =
            Position { lineage: Lineage([4; 16]), epoch, lsn: Lsn(77), chain: 0x0807_0605_0403_0201 };
        Mark { segment: 9, offset: 1024, nonce: 0xAABB, received_ns: 0x11, durable }
    }

    #[test]
    fn golden_bytes_of_a_mark() {
        let bytes = sample().encode();
        let mut expected = [0; SECTOR_BYTES];
        expected[..8].copy_from_slice(b"AFTRMRK1");
        expected[8] = 1;
        expected[16] = 9;
        expected[25] = 4;
        expected[32..34].copy_from_slice(&[0xBB, 0xAA]);
        expected[40] = 0x11;
        expected[48..64].fill(4);
        expected[64] = 3;
        expected[72..88].fill(5);
        expected[88] = 77;
        expected[96..104].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let crc = crc32fast::hash(&expected[..508]).to_le_bytes();
        expected[508..].copy_from_slice(&crc);
        assert_eq!(bytes, expected);
        assert_eq!(Mark::decode(&bytes).unwrap(), sample());
    }

    #[test]
    fn every_flip_and_cut_is_found() {
        let good = sample().encode();
        for at in 0..good.len() {
            let mut bad = good;
            bad[at] ^= 0x40;
            assert!(Mark::decode(&bad).is_err(), "flip at {at}");
            assert!(Mark::decode(&good[..at]).is_err(), "cut at {at}");
        }
    }
}
