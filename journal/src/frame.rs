//! Frames: consecutive records of one group, compressed once, checksummed once, chained.
//!
//! The same bytes are appended at the source, sent, and appended at the receiver.
//!
//! ```text
//!        0     1     2     3     4     5     6     7
//!   0 │ magic "AFTRFRM1"                              │
//!   8 │ version=1 │kind │codec│   flags   │     0     │
//!  16 │ group id (16)                                 │
//!  32 │ lineage (16)                                  │
//!  48 │ epoch number                                  │
//!  56 │ epoch id (16)                                 │
//!  72 │ first lsn                                     │
//!  80 │ last lsn                                      │
//!  88 │ batch number (undo frames, else 0)            │
//!  96 │ first time, ns                                │
//! 104 │ last time, ns                                 │
//! 112 │     record count      │     dictionary id     │
//! 120 │   raw payload bytes   │ stored payload bytes  │
//! 128 │ chain in                                      │
//! 136 │ chain out                                     │
//! 144 │ 0 (40 bytes, reserved)                        │
//! 184 │ CRC of payload+padding│  CRC of bytes 0..188  │
//! 192 │ stored payload, zero padding to 512 …
//! ```
//! Little endian. CRC-32/ISO-HDLC. `chain out` = XXH3-64 of bytes 0..136 and 144..188, so it commits to
//! everything that went before through `chain in`; an epoch's first frame starts from [`chain_seed`].
//!
//! Invariants: `first lsn ≤ last lsn`; within an epoch a frame's first lsn is its predecessor's last + 1 and
//! its `chain in` is the predecessor's `chain out`. Raw payload is at most [`MAX_RAW_BYTES`].

use crate::record::{self, Op, Record};
use crate::{Epoch, EpochId, Error, ErrorKind, GroupId, Lineage, Lsn, Position, Result, sector_ceil};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 192;
/// Largest raw payload: 1 MiB, plus one record that straddles the limit when the batch closes.
pub const MAX_RAW_BYTES: usize = (1 << 20) + record::HEADER_BYTES + record::MAX_PAYLOAD_BYTES;
/// Largest stored payload. Frames that do not shrink are stored raw, so nothing legal is larger than raw.
pub const MAX_STORED_BYTES: usize = MAX_RAW_BYTES;
/// Largest whole frame on disk or wire.
pub const MAX_FRAME_BYTES: usize = (HEADER_BYTES + MAX_STORED_BYTES).next_multiple_of(crate::SECTOR_BYTES);

/// Frame holds at least one event record ([`Op::is_event`]): readers of history need not unpack the others.
pub const FLAG_EVENTS: u16 = 1;

const MAGIC: [u8; 8] = *b"AFTRFRM1";
const VERSION: u16 = 1;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Writes as they were captured.
    Live = 1,
    /// Synchronisation content.
    Sync = 2,
    /// Many frames folded into one atomic step (reserved; refused by this version).
    Folded = 3,
    /// What a batch overwrote on the replica.
    Undo = 4,
}

/// How the payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// zstd, no dictionary.
    Zstd = 1,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    kind: u8,
    codec: u8,
    flags: U16,
    reserved0: U16,
    group: [u8; 16],
    lineage: [u8; 16],
    epoch: U64,
    epoch_id: [u8; 16],
    first_lsn: U64,
    last_lsn: U64,
    batch: U64,
    first_time_ns: U64,
    last_time_ns: U64,
    records: U32,
    dictionary: U32,
    raw_bytes: U32,
    stored_bytes: U32,
    chain_in: U64,
    chain_out: U64,
    reserved1: [u8; 40],
    payload_crc: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);

/// A frame's header, checked: CRC, magic, version, limits, chain. Says nothing yet about the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame is for.
    pub kind: FrameKind,
    /// How the payload is stored.
    pub codec: Codec,
    /// [`FLAG_EVENTS`].
    pub flags: u16,
    /// Whose frame it is.
    pub group: GroupId,
    /// Line of descent.
    pub lineage: Lineage,
    /// Epoch of all its records.
    pub epoch: Epoch,
    /// First record's lsn.
    pub first_lsn: Lsn,
    /// Last record's lsn.
    pub last_lsn: Lsn,
    /// Apply batch that this undo frame belongs to; 0 elsewhere.
    pub batch: u64,
    /// First record's time, ns.
    pub first_time_ns: u64,
    /// Last record's time, ns.
    pub last_time_ns: u64,
    /// Records inside.
    pub records: u32,
    /// Bytes of the payload before compression.
    pub raw_bytes: u32,
    /// Bytes of the payload as stored, without padding.
    pub payload_bytes: u32,
    /// Chain value of the predecessor.
    pub chain_in: u64,
    /// Chain value of this frame.
    pub chain_out: u64,
    /// CRC of payload and padding.
    pub payload_crc: u32,
}

/// The chain value before the first frame of an epoch.
pub fn chain_seed(lineage: Lineage, epoch: Epoch) -> u64 {
    let mut bytes = [0; 40];
    bytes[..16].copy_from_slice(&lineage.0);
    bytes[16..24].copy_from_slice(&epoch.number.to_le_bytes());
    bytes[24..].copy_from_slice(&epoch.id.0);
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

pub(crate) fn chain_of(header: &[u8]) -> u64 {
    let mut bytes = [0; 180];
    bytes[..136].copy_from_slice(&header[..136]);
    bytes[136..].copy_from_slice(&header[144..188]);
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

impl FrameHeader {
    /// Reads and checks a header from the front of `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where it is no intact header, [`ErrorKind::Unsupported`] where it is one of a
    /// version, kind or codec that this program does not know.
    pub fn parse(bytes: &[u8]) -> Result<FrameHeader> {
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, format!("frame header: {what}"));
        let unsupported = |what: String| Error::new(ErrorKind::Unsupported, format!("frame header: {what}"));
        let (raw, _) = Raw::ref_from_prefix(bytes).map_err(|_| malformed("cut short"))?;
        if raw.magic != MAGIC {
            return Err(malformed("magic is not AFTRFRM1"));
        }
        if crc32fast::hash(&bytes[..HEADER_BYTES - 4]) != raw.header_crc.get() {
            return Err(malformed("CRC does not match"));
        }
        if raw.version.get() != VERSION {
            return Err(unsupported(format!("version {} (this program reads {VERSION})", raw.version)));
        }
        let kind = match raw.kind {
            1 => FrameKind::Live,
            2 => FrameKind::Sync,
            3 => FrameKind::Folded,
            4 => FrameKind::Undo,
            other => return Err(unsupported(format!("kind {other}"))),
        };
        let codec = match raw.codec {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            other => return Err(unsupported(format!("codec {other}"))),
        };
        if raw.dictionary != U32::ZERO {
            return Err(unsupported(format!("dictionary {}", raw.dictionary)));
        }
        if raw.reserved0 != U16::ZERO || raw.reserved1 != [0; 40] {
            return Err(malformed("reserved bytes are not zero"));
        }
        let header = FrameHeader {
            kind,
            codec,
            flags: raw.flags.get(),
            group: GroupId(raw.group),
            lineage: Lineage(raw.lineage),
            epoch: Epoch { number: raw.epoch.get(), id: EpochId(raw.epoch_id) },
            first_lsn: Lsn(raw.first_lsn.get()),
            last_lsn: Lsn(raw.last_lsn.get()),
            batch: raw.batch.get(),
            first_time_ns: raw.first_time_ns.get(),
            last_time_ns: raw.last_time_ns.get(),
            records: raw.records.get(),
            raw_bytes: raw.raw_bytes.get(),
            payload_bytes: raw.stored_bytes.get(),
            chain_in: raw.chain_in.get(),
            chain_out: raw.chain_out.get(),
            payload_crc: raw.payload_crc.get(),
        };
        if header.raw_bytes as usize > MAX_RAW_BYTES || header.payload_bytes as usize > MAX_STORED_BYTES {
            return Err(malformed("payload is larger than a frame may be"));
        }
        if header.codec == Codec::Raw && header.raw_bytes != header.payload_bytes {
            return Err(malformed("raw payload with two lengths"));
        }
        if header.records == 0 || header.first_lsn > header.last_lsn {
            return Err(malformed("empty, or its lsns run backwards"));
        }
        if !header.position().is_possible() || header.batch > crate::segment::MAX_NUMBER {
            return Err(malformed("no history reaches such an lsn, epoch or batch"));
        }
        if header.first_time_ns > header.last_time_ns {
            return Err(malformed("its times run backwards"));
        }
        if chain_of(bytes) != header.chain_out {
            return Err(malformed("chain does not match"));
        }
        Ok(header)
    }

    /// Bytes of the whole frame on disk and wire: header, payload, padding.
    pub fn frame_bytes(&self) -> usize {
        sector_ceil(HEADER_BYTES + self.payload_bytes as usize)
    }

    /// Where a history stands that holds this frame as its last.
    pub fn position(&self) -> Position {
        Position { lineage: self.lineage, epoch: self.epoch, lsn: self.last_lsn, chain: self.chain_out }
    }

    /// Checks that this frame is the one that follows `held` within the same epoch.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfOrder`], naming what differs.
    pub fn check_follows(&self, held: &Position) -> Result<()> {
        let refuse = |what: String| {
            let at = format!("frame lsn {}..{}: {what}", self.first_lsn, self.last_lsn);
            Err(Error::new(ErrorKind::OutOfOrder, at))
        };
        if self.lineage != held.lineage {
            return refuse(format!("lineage {} where {} is held", self.lineage, held.lineage));
        }
        if self.epoch != held.epoch {
            return refuse(format!("epoch {} where {} is held", self.epoch.number, held.epoch.number));
        }
        if self.first_lsn != held.lsn.next() {
            return refuse(format!("lsn {} is held", held.lsn));
        }
        if self.chain_in != held.chain {
            return refuse("its chain does not join the frame before it".into());
        }
        Ok(())
    }

    /// Checks payload and padding against the CRC. `frame` is the whole frame, header included.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where they do not match, or the frame is cut short.
    pub fn check_payload(&self, frame: &[u8]) -> Result<()> {
        let body = frame.get(HEADER_BYTES..self.frame_bytes()).ok_or_else(|| {
            let at = format!("frame lsn {}: {} of {} bytes", self.first_lsn, frame.len(), self.frame_bytes());
            Error::new(ErrorKind::Malformed, at)
        })?;
        if crc32fast::hash(body) != self.payload_crc {
            let at = format!("frame lsn {}..{}: payload CRC does not match", self.first_lsn, self.last_lsn);
            return Err(Error::new(ErrorKind::Malformed, at));
        }
        Ok(())
    }

    /// The stored payload inside a whole frame that [`check_payload`](Self::check_payload) accepted.
    pub fn payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        &frame[HEADER_BYTES..HEADER_BYTES + self.payload_bytes as usize]
    }
}

/// Who a frame belongs to: the same for all frames of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Group.
    pub group: GroupId,
    /// Line of descent.
    pub lineage: Lineage,
    /// Epoch.
    pub epoch: Epoch,
}

/// A batch being gathered: raw records, not yet compressed. Reused from batch to batch.
#[derive(Debug, Default)]
pub struct Batch {
    raw: Vec<u8>,
    records: u32,
    flags: u16,
    sync: bool,
    first: Option<(Lsn, u64)>,
    last: (Lsn, u64),
}

impl Batch {
    /// Adds a record; lsn and time may not fall.
    pub fn push(&mut self, record: &Record, payload: &[u8]) {
        assert!(self.first.is_none() || record.lsn >= self.last.0, "records of a frame are in lsn order");
        record.encode(payload, &mut self.raw);
        assert!(self.raw.len() <= MAX_RAW_BYTES, "a batch is closed before it outgrows a frame");
        self.first.get_or_insert((record.lsn, record.time_ns));
        self.last = (record.lsn, record.time_ns.max(self.last.1));
        self.records += 1;
        self.flags |= if record.op.is_event() { FLAG_EVENTS } else { 0 };
        self.sync |= record.op == Op::SyncSlot;
    }

    /// Raw bytes so far.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Records so far.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// Time of the first record, ns.
    pub fn first_time_ns(&self) -> Option<u64> {
        self.first.map(|(_, time_ns)| time_ns)
    }

    /// Last lsn in the batch; `None` when empty.
    pub fn last_lsn(&self) -> Option<Lsn> {
        self.first.map(|_| self.last.0)
    }

    /// Forgets the records, keeps the buffer.
    pub fn clear(&mut self) {
        let raw = std::mem::take(&mut self.raw);
        *self = Batch { raw, ..Batch::default() };
        self.raw.clear();
    }
}

/// A compressed frame that does not know its predecessor yet. Many may be encoded in parallel; they are
/// sealed in order.
#[derive(Debug)]
pub struct EncodedFrame {
    bytes: Vec<u8>,
    header: Raw,
}

impl EncodedFrame {
    /// Lays out a frame in `buffer`, which holds room for the header ([`HEADER_BYTES`]) and behind it the
    /// payload as `codec` left it: compressed in place, so that it is never copied.
    ///
    /// `undo_batch` is the apply batch for undo frames, `None` for frames of the stream.
    pub(crate) fn around(
        batch: &Batch,
        stamp: &Stamp,
        undo_batch: Option<u64>,
        codec: Codec,
        mut buffer: Vec<u8>,
    ) -> EncodedFrame {
        let stored_bytes = buffer.len() - HEADER_BYTES;
        let (first_lsn, first_time_ns) = batch.first.expect("a frame holds at least one record");
        let size =
            |bytes: usize| U32::new(u32::try_from(bytes).expect("frames are bounded by MAX_RAW_BYTES"));
        buffer.resize(sector_ceil(buffer.len()), 0);
        let kind = match undo_batch {
            Some(_) => FrameKind::Undo,
            None if batch.sync => FrameKind::Sync,
            None => FrameKind::Live,
        };
        let header = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            kind: kind as u8,
            codec: codec as u8,
            flags: batch.flags.into(),
            reserved0: U16::ZERO,
            group: stamp.group.0,
            lineage: stamp.lineage.0,
            epoch: stamp.epoch.number.into(),
            epoch_id: stamp.epoch.id.0,
            first_lsn: first_lsn.0.into(),
            last_lsn: batch.last.0.0.into(),
            batch: undo_batch.unwrap_or(0).into(),
            first_time_ns: first_time_ns.into(),
            last_time_ns: batch.last.1.into(),
            records: batch.records.into(),
            dictionary: U32::ZERO,
            raw_bytes: size(batch.raw.len()),
            stored_bytes: size(stored_bytes),
            chain_in: U64::ZERO,
            chain_out: U64::ZERO,
            reserved1: [0; 40],
            payload_crc: crc32fast::hash(&buffer[HEADER_BYTES..]).into(),
            header_crc: U32::ZERO,
        };
        EncodedFrame { bytes: buffer, header }
    }

    /// Joins the frame to its predecessor; returns the finished bytes and this frame's chain value.
    pub fn seal(mut self, chain_in: u64) -> (Vec<u8>, u64) {
        self.header.chain_in = chain_in.into();
        let chain_out = chain_of(self.header.as_bytes());
        self.header.chain_out = chain_out.into();
        self.header.header_crc = crc32fast::hash(&self.header.as_bytes()[..HEADER_BYTES - 4]).into();
        self.bytes[..HEADER_BYTES].copy_from_slice(self.header.as_bytes());
        (self.bytes, chain_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Extent, VolumeId};

    fn stamp() -> Stamp {
        Stamp {
            group: GroupId([1; 16]),
            lineage: Lineage([2; 16]),
            epoch: Epoch { number: 3, id: EpochId([4; 16]) },
        }
    }

    fn batch(first: u64, op: Op, payload: &[u8]) -> Batch {
        let mut batch = Batch::default();
        for lsn in [first, first + 1] {
            let extent = Extent { offset: 512 * lsn, len: payload.len() as u64 };
            let record =
                Record { op, flags: 0, volume: VolumeId(0), lsn: Lsn(lsn), time_ns: 10 * lsn, extent };
            batch.push(&record, payload);
        }
        batch
    }

    fn sealed(batch: &Batch, chain_in: u64) -> Vec<u8> {
        let mut buffer = vec![0; HEADER_BYTES];
        buffer.extend_from_slice(batch.raw());
        EncodedFrame::around(batch, &stamp(), None, Codec::Raw, buffer).seal(chain_in).0
    }

    #[test]
    fn golden_bytes_of_a_frame() {
        let frame = sealed(&batch(7, Op::Write, b"abcd"), 0x1122);
        let mut expected = vec![0; 512];
        expected[..8].copy_from_slice(b"AFTRFRM1");
        expected[8] = 1; // version
        expected[10] = 1; // live
        expected[16..32].fill(1);
        expected[32..48].fill(2);
        expected[48] = 3;
        expected[56..72].fill(4);
        expected[72] = 7;
        expected[80] = 8;
        expected[96] = 70;
        expected[104] = 80;
        expected[112] = 2; // records
        expected[120] = 104; // raw
        expected[124] = 104; // stored
        expected[128..130].copy_from_slice(&[0x22, 0x11]);
        for (at, lsn) in [(192, 7), (244, 8)] {
            expected[at] = 1; // op
            expected[at + 8] = lsn;
            expected[at + 16] = lsn * 10;
            expected[at + 25] = lsn * 2; // offset = 512 × lsn
            expected[at + 32] = 4;
            expected[at + 40] = 4;
            expected[at + 48..at + 52].copy_from_slice(b"abcd");
        }
        // Pinned as numbers, so that the algorithms cannot drift; the CRCs were checked against zlib's.
        expected[136..144].copy_from_slice(&GOLDEN_CHAIN.to_le_bytes());
        expected[184..188].copy_from_slice(&GOLDEN_PAYLOAD_CRC.to_le_bytes());
        expected[188..192].copy_from_slice(&GOLDEN_HEADER_CRC.to_le_bytes());
        assert_eq!(frame, expected);
    }

    const GOLDEN_CHAIN: u64 = 0x3F36_8F5F_FA04_B17E;
    const GOLDEN_PAYLOAD_CRC: u32 = 0x0CEB_9410;
    const GOLDEN_HEADER_CRC: u32 = 0x3FAF_0FB1;

    #[test]
    fn round_trip_and_what_the_header_says() {
        let sync = sealed(&batch(1, Op::SyncSlot, &[9; 512]), 5);
        let header = FrameHeader::parse(&sync).unwrap();
        header.check_payload(&sync).unwrap();
        assert_eq!((header.kind, header.codec, header.flags), (FrameKind::Sync, Codec::Raw, 0));
        assert_eq!((header.first_lsn, header.last_lsn, header.records), (Lsn(1), Lsn(2), 2));
        assert_eq!((header.first_time_ns, header.last_time_ns), (10, 20));
        assert_eq!(header.payload(&sync), batch(1, Op::SyncSlot, &[9; 512]).raw());
        assert_eq!(header.position().chain, header.chain_out);
        let event = sealed(&batch(1, Op::Bookmark, b"x"), 5);
        assert_eq!(FrameHeader::parse(&event).unwrap().flags, FLAG_EVENTS);
    }

    #[test]
    fn every_flip_and_every_cut_is_found() {
        let good = sealed(&batch(7, Op::Write, b"abcd"), 1);
        let intact = |bytes: &[u8]| FrameHeader::parse(bytes).and_then(|header| header.check_payload(bytes));
        intact(&good).unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(intact(&bad).is_err(), "flip of bit {bit} at {at}");
            }
            assert!(intact(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn only_the_next_frame_follows() {
        let first = FrameHeader::parse(&sealed(&batch(7, Op::Write, b"abcd"), 1)).unwrap();
        let held = first.position();
        let next = FrameHeader::parse(&sealed(&batch(9, Op::Write, b"abcd"), held.chain)).unwrap();
        next.check_follows(&held).unwrap();
        let refused = |header: &FrameHeader, held: &Position, what: &str| {
            let error = header.check_follows(held).expect_err(what);
            assert_eq!(error.kind, ErrorKind::OutOfOrder, "{what}");
            assert!(error.at.contains(what), "{:?} names {what}", error.at);
        };
        refused(&first, &held, "lsn 8 is held");
        refused(&next, &Position { chain: 0, ..held }, "chain");
        refused(&next, &Position { lineage: Lineage([9; 16]), ..held }, "lineage");
        let other = Epoch { number: 3, id: EpochId([9; 16]) };
        refused(&next, &Position { epoch: other, ..held }, "epoch");
    }

    #[test]
    fn headers_beyond_the_limits_are_refused_although_their_crc_holds() {
        let good = sealed(&batch(7, Op::Write, b"abcd"), 1);
        let (raw, _) = Raw::ref_from_prefix(&good).unwrap();
        let remade = |change: &dyn Fn(&mut Raw)| {
            let mut raw = *raw;
            change(&mut raw);
            raw.chain_out = chain_of(raw.as_bytes()).into();
            raw.header_crc = crc32fast::hash(&raw.as_bytes()[..HEADER_BYTES - 4]).into();
            FrameHeader::parse(raw.as_bytes()).map_err(|error| error.kind)
        };
        remade(&|_| {}).unwrap();
        let too_large = u32::try_from(MAX_RAW_BYTES + 1).unwrap();
        let malformed: [&dyn Fn(&mut Raw); 11] = [
            &|raw| raw.last_lsn = u64::MAX.into(),
            &|raw| raw.epoch = u64::MAX.into(),
            &|raw| raw.batch = u64::MAX.into(),
            &|raw| raw.raw_bytes = too_large.into(),
            &|raw| (raw.codec, raw.stored_bytes) = (1, too_large.into()),
            &|raw| raw.stored_bytes = 1.into(),
            &|raw| raw.records = 0.into(),
            &|raw| raw.last_lsn = 6.into(),
            &|raw| raw.last_time_ns = 0.into(),
            &|raw| raw.reserved0 = 1.into(),
            &|raw| raw.reserved1[39] = 1,
        ];
        for (case, change) in malformed.into_iter().enumerate() {
            assert_eq!(remade(change), Err(ErrorKind::Malformed), "case {case}");
        }
        let unsupported: [&dyn Fn(&mut Raw); 4] =
            [&|raw| raw.version = 2.into(), &|raw| raw.kind = 9, &|raw| raw.codec = 9, &|raw| {
                raw.dictionary = 1.into()
            }];
        for (case, change) in unsupported.into_iter().enumerate() {
            assert_eq!(remade(change), Err(ErrorKind::Unsupported), "case {case}");
        }
    }
}
