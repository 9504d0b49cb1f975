//! Records: what happened to a volume, as it stands in a frame.
//!
//! ```text
//!        0     1     2     3     4     5     6     7
//!   0 │ op  │flags│     0     │        volume         │
//!   8 │                      lsn                      │
//!  16 │            time, realtime nanoseconds         │
//!  24 │                 offset, bytes                 │
//!  32 │                 length, bytes                 │
//!  40 │     payload bytes     │           0           │
//!  48 │ payload …
//! ```
//! Little endian. A frame's raw payload is a sequence of these; the next header follows the payload at once.
//! Invariants of a frame of the stream, which [`Records::of`] checks: lsns are dense, from the header's first
//! to its last, and only sync pieces share one; times lie within the header's; events are flagged there.

use crate::frame::{FLAG_EVENTS, FrameHeader};
use crate::{Error, ErrorKind, Extent, Lsn, Result, VolumeId, VolumeUuid};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a record header in a frame.
pub const HEADER_BYTES: usize = 48;

/// The most payload that one record carries (DESIGN section 3): bounds every buffer downstream.
pub const MAX_PAYLOAD_BYTES: usize = 128 * 1024;

/// The write reached stable storage before it was answered.
pub const FLAG_FUA: u8 = 1;
/// A flush came before the write.
pub const FLAG_PREFLUSH: u8 = 2;

/// What a record says. Numbers are the ring's (`kfilter::abi`), append-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Payload is written at the extent.
    Write = 1,
    /// The extent is zeros on the replica.
    Discard = 2,
    /// The extent is zeros.
    WriteZeroes = 3,
    /// Everything answered before is durable at the source.
    Flush = 4,
    /// A named lsn; payload: the name in UTF-8.
    Bookmark = 5,
    /// A volume appears, grows, shrinks or leaves; payload: [`VolumeRecord`].
    Volume = 6,
    /// A recorded write of the extent failed at the source: inexact until repaired; payload: that write's
    /// lsn, u64 little endian.
    Failed = 7,
    /// Content read from the source during synchronisation; payload written at the extent.
    SyncSlot = 8,
    /// From here to `ResyncEnd` no lsn is a recovery point; payload: the reason in UTF-8.
    ResyncBegin = 9,
    /// The replica is consistent again.
    ResyncEnd = 10,
    /// A record whose owner died before publishing: nothing was written.
    Void = 11,
    /// The source's clock jumped; payload: the jump in nanoseconds, i64 little endian.
    ClockJump = 12,
}

impl Op {
    /// Reads the number; unknown ones are refused, never skipped.
    pub fn from_u8(op: u8) -> Option<Op> {
        Some(match op {
            1 => Op::Write,
            2 => Op::Discard,
            3 => Op::WriteZeroes,
            4 => Op::Flush,
            5 => Op::Bookmark,
            6 => Op::Volume,
            7 => Op::Failed,
            8 => Op::SyncSlot,
            9 => Op::ResyncBegin,
            10 => Op::ResyncEnd,
            11 => Op::Void,
            12 => Op::ClockJump,
            _ => return None,
        })
    }

    /// Whether the record is about history rather than content: frames that hold one are flagged.
    pub fn is_event(self) -> bool {
        matches!(
            self,
            Op::Bookmark | Op::Volume | Op::Failed | Op::ResyncBegin | Op::ResyncEnd | Op::ClockJump
        )
    }

    /// Whether the record changes a volume's content.
    pub fn changes_content(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes | Op::SyncSlot)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    op: u8,
    flags: u8,
    reserved0: U16,
    volume: U32,
    lsn: U64,
    time_ns: U64,
    offset: U64,
    length: U64,
    payload_bytes: U32,
    reserved1: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);

/// One record without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub op: Op,
    /// [`FLAG_FUA`], [`FLAG_PREFLUSH`].
    pub flags: u8,
    /// Which volume of the group.
    pub volume: VolumeId,
    /// Position in the group's order.
    pub lsn: Lsn,
    /// Source's realtime clock, nanoseconds; never falls within a group.
    pub time_ns: u64,
    /// What the record touches; empty where it touches nothing.
    pub extent: Extent,
}

impl Record {
    /// Appends header and payload to a frame's raw buffer.
    pub fn encode(&self, payload: &[u8], out: &mut Vec<u8>) {
        assert!(payload.len() <= MAX_PAYLOAD_BYTES, "a record's payload is bounded by its capture");
        #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
        let payload_bytes = payload.len() as u32;
        let raw = Raw {
            op: self.op as u8,
            flags: self.flags,
            reserved0: U16::ZERO,
            volume: self.volume.0.into(),
            lsn: self.lsn.0.into(),
            time_ns: self.time_ns.into(),
            offset: self.extent.offset.into(),
            length: self.extent.len.into(),
            payload_bytes: payload_bytes.into(),
            reserved1: U32::ZERO,
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(payload);
    }

    /// Reads one record from the front of `bytes`; returns it, its payload and the bytes it took.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] for anything that breaks the byte map or the rules between its fields.
    pub fn decode(bytes: &[u8]) -> Result<(Record, &[u8], usize)> {
        let malformed = |what: String| Error::new(ErrorKind::Malformed, what);
        let (raw, rest) = Raw::ref_from_prefix(bytes).map_err(|_| {
            malformed(format!("record header cut short: {} of {HEADER_BYTES} bytes", bytes.len()))
        })?;
        let lsn = Lsn(raw.lsn.get());
        let op = Op::from_u8(raw.op)
            .ok_or_else(|| malformed(format!("lsn {lsn}: unknown record op {}", raw.op)))?;
        if lsn > Lsn::MAX {
            return Err(malformed(format!("no history reaches lsn {lsn}")));
        }
        if raw.reserved0 != U16::ZERO || raw.reserved1 != U32::ZERO {
            return Err(malformed(format!("lsn {lsn}: reserved bytes are not zero")));
        }
        let payload_bytes = raw.payload_bytes.get() as usize;
        if payload_bytes > MAX_PAYLOAD_BYTES || payload_bytes > rest.len() {
            return Err(malformed(format!(
                "lsn {lsn}: payload of {payload_bytes} bytes does not fit its frame"
            )));
        }
        let extent = Extent { offset: raw.offset.get(), len: raw.length.get() };
        if extent.end().is_none() {
            return Err(malformed(format!("lsn {lsn}: extent leaves the address space")));
        }
        let carries_content = matches!(op, Op::Write | Op::SyncSlot);
        if carries_content && extent.len != u64::from(raw.payload_bytes.get()) {
            return Err(malformed(format!(
                "lsn {lsn}: {payload_bytes} bytes of payload for an extent of {} bytes",
                extent.len
            )));
        }
        if matches!(op, Op::Discard | Op::WriteZeroes) && payload_bytes != 0 {
            return Err(malformed(format!("lsn {lsn}: {op:?} carries a payload")));
        }
        let record = Record {
            op,
            flags: raw.flags,
            volume: VolumeId(raw.volume.get()),
            lsn,
            time_ns: raw.time_ns.get(),
            extent,
        };
        Ok((record, &rest[..payload_bytes], HEADER_BYTES + payload_bytes))
    }
}

/// Walks a frame's raw payload. Stops for good after the first error.
pub struct Records<'a> {
    raw: &'a [u8],
    at: usize,
    stream: Option<StreamCheck>,
}

impl<'a> Records<'a> {
    /// Starts at the first record; what the frame's header says of the records is not looked at. For undo
    /// frames, whose records stand in the order of their offsets, and for tools that show whatever is there.
    pub fn new(raw: &'a [u8]) -> Records<'a> {
        Records { raw, at: 0, stream: None }
    }

    /// The records of a frame of the stream, held to what its header promises: order, number and resume
    /// positions were judged by the header alone, so a record beyond it would be one that nobody has judged.
    pub fn of(header: &FrameHeader, raw: &'a [u8]) -> Records<'a> {
        Records { raw, at: 0, stream: Some(StreamCheck { header: *header, last: None, records: 0 }) }
    }

    /// Walks all records of a frame of the stream.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] for the first that does not hold.
    pub fn check(header: &FrameHeader, raw: &'a [u8]) -> Result<()> {
        Records::of(header, raw).try_for_each(|located| located.map(drop))
    }
}

/// What a frame's header promises of its records.
struct StreamCheck {
    header: FrameHeader,
    last: Option<(Lsn, Op)>,
    records: u32,
}

impl StreamCheck {
    fn record(&mut self, record: &Record) -> Result<()> {
        let header = &self.header;
        let refuse = |what: String| {
            let at = format!("frame lsn {}..{}: {what}", header.first_lsn, header.last_lsn);
            Err(Error::new(ErrorKind::Malformed, at))
        };
        let lsn = record.lsn;
        let is_next = match self.last {
            None => lsn == header.first_lsn,
            Some((last, op)) => {
                let is_piece = lsn == last && op == Op::SyncSlot && record.op == Op::SyncSlot;
                is_piece || last.0.checked_add(1) == Some(lsn.0)
            }
        };
        if !is_next || lsn > header.last_lsn {
            let after = self.last.map_or_else(|| "first".to_owned(), |(last, _)| format!("after lsn {last}"));
            return refuse(format!("a {:?} with lsn {lsn} comes {after}", record.op));
        }
        if record.time_ns < header.first_time_ns || record.time_ns > header.last_time_ns {
            return refuse(format!("the time of lsn {lsn} is not within the frame's"));
        }
        if record.op.is_event() && header.flags & FLAG_EVENTS == 0 {
            return refuse(format!("lsn {lsn} is an event, and the frame does not say that it holds one"));
        }
        self.last = Some((lsn, record.op));
        self.records = self.records.saturating_add(1);
        Ok(())
    }

    fn end(&self) -> Result<()> {
        let header = &self.header;
        let last = self.last.map_or(Lsn::ZERO, |(last, _)| last);
        if (last, self.records) != (header.last_lsn, header.records) {
            let at = format!(
                "frame lsn {}..{}: holds {} records up to lsn {last}, where {} are said",
                header.first_lsn, header.last_lsn, self.records, header.records
            );
            return Err(Error::new(ErrorKind::Malformed, at));
        }
        Ok(())
    }
}

/// A record as it lies in its frame's raw payload.
#[derive(Clone, Copy, Debug)]
pub struct Located<'a> {
    /// The record.
    pub record: Record,
    /// Its payload.
    pub payload: &'a [u8],
    /// Offset of the payload in the raw buffer.
    pub payload_at: usize,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Located<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.at;
        if start >= self.raw.len() {
            return self.stream.take()?.end().err().map(Err);
        }
        let decoded = Record::decode(&self.raw[start..]).and_then(|(record, payload, taken)| {
            self.stream.as_mut().map_or(Ok(()), |stream| stream.record(&record))?;
            Ok((record, payload, taken))
        });
        match decoded {
            Ok((record, payload, taken)) => {
                self.at += taken;
                Some(Ok(Located { record, payload, payload_at: start + HEADER_BYTES }))
            }
            Err(error) => {
                (self.at, self.stream) = (self.raw.len(), None);
                Some(Err(error))
            }
        }
    }
}

/// What a `ResyncBegin` says of earlier points: after this lsn, disks that the source could not prove to be
/// unchanged were in doubt. It stands in the record where a write has its extent; all zeros where nothing
/// was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InDoubt {
    /// The last lsn that is in no doubt.
    pub after: Lsn,
    /// The source's clock then, ns.
    pub time_ns: u64,
}

impl InDoubt {
    /// As it stands in the record.
    pub fn extent(self) -> Extent {
        Extent { offset: self.after.0, len: self.time_ns }
    }

    /// What a record says of it.
    pub fn of(record: &Record) -> Option<InDoubt> {
        let Extent { offset, len } = record.extent;
        let is_one = record.op == Op::ResyncBegin && offset != 0;
        is_one.then_some(InDoubt { after: Lsn(offset), time_ns: len })
    }
}

/// Payload of a `Volume` record: what the replica must know before the first write that needs it.
///
/// ```text
///   0 │ volume uuid (16)                              │
///  16 │ size, bytes                                   │
///  24 │    sector bytes       │ 1 = present, 0 = gone │
///  32 │ name, UTF-8 …
/// ```
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VolumeRecord {
    /// Names the volume everywhere.
    pub uuid: VolumeUuid,
    /// Size from this lsn on, bytes.
    pub size_bytes: u64,
    /// Logical sector size, bytes.
    pub sector_bytes: u32,
    /// False when the volume leaves the group here.
    pub present: bool,
    /// Operator's name of the volume.
    pub name: String,
}

/// The longest bookmark name or reason that is kept, bytes.
pub const MAX_NAME_BYTES: usize = 255;

/// The longest volume name, bytes.
pub const MAX_VOLUME_NAME_BYTES: usize = 64;

/// The most volumes that one group may have, those that left it included: bounds what both sides keep of
/// them.
pub const MAX_VOLUMES: usize = 64;

impl VolumeRecord {
    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32 + self.name.len());
        out.extend_from_slice(&self.uuid.0);
        out.extend_from_slice(&self.size_bytes.to_le_bytes());
        out.extend_from_slice(&self.sector_bytes.to_le_bytes());
        out.extend_from_slice(&u32::from(self.present).to_le_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] for a short payload, a bad size, sector or name.
    pub fn decode(payload: &[u8]) -> Result<VolumeRecord> {
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, format!("volume record: {what}"));
        let (head, name) = payload.split_at_checked(32).ok_or_else(|| malformed("shorter than 32 bytes"))?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&head[..16]);
        let number = |range: std::ops::Range<usize>| {
            head[range].iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let size_bytes = number(16..24);
        let sector_bytes = u32::try_from(number(24..28)).unwrap_or(0);
        let present = match number(28..32) {
            0 => false,
            1 => true,
            _ => return Err(malformed("presence is neither 0 nor 1")),
        };
        if !sector_bytes.is_power_of_two() || !(512..=65536).contains(&sector_bytes) {
            return Err(malformed("sector size is not a power of two from 512 to 65536"));
        }
        if size_bytes % 512 != 0 || size_bytes > i64::MAX as u64 {
            return Err(malformed("size is not a multiple of 512 below 2^63"));
        }
        let name = std::str::from_utf8(name).map_err(|_| malformed("name is not UTF-8"))?;
        check_volume_name(name).map_err(malformed)?;
        Ok(VolumeRecord { uuid: VolumeUuid(uuid), size_bytes, sector_bytes, present, name: name.to_owned() })
    }
}

/// Volume names become file names at the receiver, so they are held to what settings allow there too: 1 to 64
/// of `a-z`, `0-9`, `_` and `-`.
///
/// # Errors
/// What is wrong with the name, in words.
pub fn check_volume_name(name: &str) -> std::result::Result<(), &'static str> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b);
    if name.is_empty() || name.len() > MAX_VOLUME_NAME_BYTES || !name.bytes().all(allowed) {
        return Err("a name is 1 to 64 of a-z 0-9 _ -");
    }
    Ok(())
}

/// Bookmark names are typed into commands: letters, digits, `-`, `_` and `.`, not starting with a dot. They
/// never become a path.
///
/// # Errors
/// What is wrong with the name, in words.
pub fn check_name(name: &str) -> std::result::Result<(), &'static str> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err("name is empty or longer than 255 bytes");
    }
    if name.starts_with('.') || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err("name may hold only letters, digits, '-', '_' and '.', and not start with '.'");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Record {
        Record {
            op: Op::Write,
            flags: FLAG_FUA,
            volume: VolumeId(3),
            lsn: Lsn(0x0102_0304_0506_0708),
            time_ns: 0x1112_1314_1516_1718,
            extent: Extent { offset: 4096, len: 4 },
        }
    }

    #[test]
    fn golden_bytes_of_a_record() {
        let mut out = Vec::new();
        sample().encode(b"abcd", &mut out);
        let expected: &[u8] = &[
            1, 1, 0, 0, 3, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11,
            0, 0x10, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, b'a', b'b', b'c',
            b'd',
        ];
        assert_eq!(out, expected);
        let (record, payload, taken) = Record::decode(&out).unwrap();
        assert_eq!((record, payload, taken), (sample(), &b"abcd"[..], 52));
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        let mut good = Vec::new();
        sample().encode(b"abcd", &mut good);
        for (at, value, what) in [
            (0, 0, "op 0"),
            (0, 200, "unknown op"),
            (2, 1, "reserved"),
            (44, 1, "reserved"),
            (40, 5, "payload beyond the buffer"),
            (40, 3, "payload differs from the extent"),
            (0, 2, "discard with payload"),
            (15, 0x80, "an lsn that no history reaches"),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            let error = Record::decode(&bad).expect_err(what);
            assert_eq!(error.kind, ErrorKind::Malformed, "{what}");
        }
        for cut in 0..good.len() {
            assert!(Record::decode(&good[..cut]).is_err(), "cut at {cut}");
        }
        let mut wide = sample();
        wide.op = Op::Discard;
        wide.extent = Extent { offset: u64::MAX, len: 2 };
        let mut out = Vec::new();
        wide.encode(b"", &mut out);
        assert!(Record::decode(&out).is_err());
    }

    #[test]
    fn volume_record_round_trip_and_names() {
        let volume = VolumeRecord {
            uuid: VolumeUuid([7; 16]),
            size_bytes: 1 << 30,
            sector_bytes: 512,
            present: true,
            name: "disk0".into(),
        };
        assert_eq!(VolumeRecord::decode(&volume.encode()).unwrap(), volume);
        let long = "a".repeat(MAX_VOLUME_NAME_BYTES + 1);
        for bad in ["", "../x", ".x", "a/b", "a b", "A", "a.b", &long] {
            let mut wrong = volume.clone();
            wrong.name = bad.into();
            assert!(VolumeRecord::decode(&wrong.encode()).is_err(), "{bad:?}");
        }
        let mut longest = volume.clone();
        longest.name = long[1..].into();
        assert_eq!(VolumeRecord::decode(&longest.encode()).unwrap(), longest);
        for (name, good) in [("before-Upgrade_1.2", true), ("", false), (".x", false), ("a b", false)] {
            assert_eq!(check_name(name).is_ok(), good, "{name:?}");
        }
        assert!(VolumeRecord::decode(&volume.encode()[..31]).is_err());
    }

    /// A header made by hand around records made by hand.
    fn frame(records: &[(Op, u64, u64)], change: &dyn Fn(&mut FrameHeader)) -> (FrameHeader, Vec<u8>) {
        use crate::frame::{Codec, FrameKind};
        let mut raw = Vec::new();
        for (op, lsn, time_ns) in records {
            let (lsn, len) = (Lsn(*lsn), if matches!(op, Op::Write | Op::SyncSlot) { 4 } else { 0 });
            let extent = Extent { offset: 0, len };
            let record = Record { op: *op, flags: 0, volume: VolumeId(0), lsn, time_ns: *time_ns, extent };
            record.encode(if len > 0 { b"abcd" } else { b"" }, &mut raw);
        }
        let (first, last) = (records[0], records[records.len() - 1]);
        let mut header = FrameHeader {
            kind: FrameKind::Live,
            codec: Codec::Raw,
            flags: FLAG_EVENTS,
            group: crate::GroupId::default(),
            lineage: crate::Lineage::default(),
            epoch: crate::Epoch::default(),
            first_lsn: Lsn(first.1),
            last_lsn: Lsn(last.1),
            batch: 0,
            first_time_ns: first.2,
            last_time_ns: last.2,
            records: u32::try_from(records.len()).unwrap(),
            raw_bytes: 0,
            payload_bytes: 0,
            chain_in: 0,
            chain_out: 0,
            payload_crc: 0,
        };
        change(&mut header);
        (header, raw)
    }

    #[test]
    fn records_are_held_to_their_header() {
        let good = [(Op::Write, 5, 10), (Op::SyncSlot, 6, 10), (Op::SyncSlot, 6, 11), (Op::Bookmark, 7, 12)];
        let (header, raw) = frame(&good, &|_| {});
        Records::check(&header, &raw).unwrap();
        assert_eq!(Records::of(&header, &raw).count(), 4, "a whole frame ends without an error");
        let refused = |records: &[(Op, u64, u64)], change: &dyn Fn(&mut FrameHeader), what: &str| {
            let (header, raw) = frame(records, change);
            assert_eq!(Records::check(&header, &raw).expect_err(what).kind, ErrorKind::Malformed, "{what}");
        };
        refused(&[(Op::Write, 110, 1), (Op::Write, 105, 1)], &|h| h.last_lsn = Lsn(120), "falls");
        refused(&[(Op::Write, 1, 1), (Op::Write, 1, 1)], &|_| {}, "writes share an lsn");
        refused(&[(Op::Discard, 1, 1), (Op::SyncSlot, 1, 1)], &|_| {}, "a discard shares an lsn");
        refused(&[(Op::Write, 1, 1), (Op::Write, 3, 1)], &|_| {}, "a hole");
        refused(&[(Op::Write, 1, 1), (Op::Write, 1 << 63, 1)], &|h| h.last_lsn = Lsn(2), "beyond the header");
        refused(&[(Op::Write, u64::MAX, 1), (Op::Write, 0, 1)], &|h| h.last_lsn = Lsn(u64::MAX), "wraps");
        refused(&good, &|h| h.first_lsn = Lsn(4), "first differs");
        refused(&good, &|h| h.last_lsn = Lsn(8), "last differs");
        refused(&good, &|h| h.records = 5, "fewer records");
        refused(&good, &|h| h.records = 3, "more records");
        refused(&good, &|h| h.flags = 0, "an event that is not flagged");
        refused(&good, &|h| h.first_time_ns = 11, "earlier than the frame");
        refused(&good, &|h| h.last_time_ns = 11, "later than the frame");
    }
}
