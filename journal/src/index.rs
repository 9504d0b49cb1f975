//! The footer of a sealed segment: where its frames are and, for undo, which extents they hold.
//!
//! ```text
//!        0     1     2     3     4     5     6     7
//!   0 │ magic "AFTRIDX1"                              │
//!   8 │ version=1 │   flags   │           0           │   flags: 1 = no extents indexed
//!  16 │ segment number                                │
//!  24 │      frame count      │           0           │
//!  32 │ extent count                                  │
//!  40 │ first receipt, ns                             │
//!  48 │ newest receipt, ns                            │
//!  56 │ nonce of the segment                          │
//!  64 │ position after the last frame (56)            │
//! 120 │ 0                                             │
//! 128 │ frame entries, 48 bytes each:                 │
//!     │   offset · bytes u32, flags u32 · first lsn · last lsn · first time · last time
//!     │ extent entries, 32 bytes each, sorted by (volume, offset):
//!     │   volume u32, frame u32 · offset · length · payload position in the frame's raw payload u32, flags u32
//!     │ zeros to 64 bytes before a multiple of 512
//! ```
//! Trailer, the last 64 bytes of the file:
//!
//! ```text
//!   0 │ magic "AFTREND1"                              │
//!   8 │ offset of the footer in the file              │
//!  16 │ bytes of the footer with this trailer         │
//!  24 │ segment number                                │
//!  32 │ nonce of the segment                          │
//!  40 │ 0 (16)                                        │
//!  56 │ CRC of footer before  │ CRC of trailer 0..60  │
//! ```
//! Derivable from the frames ([`IndexBuilder`] is how it is made, too). Extents of an undo segment are
//! disjoint, so a binary search finds what covers an address. Live segments carry frame entries only
//! (decision 0003).

use crate::frame::FrameHeader;
use crate::io::{Disk, read_exact_at};
use crate::layout::RawPosition;
use crate::record::{Op, Records};
use crate::segment::{SegmentHeader, SegmentSummary};
use crate::walk::SegmentFile;
use crate::{Error, ErrorKind, Lsn, Position, Result, SECTOR_BYTES, VolumeId};
use std::ops::Range;
use std::path::Path;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of a footer.
pub const MAGIC: [u8; 8] = *b"AFTRIDX1";
/// The extent is zeros; there is no payload.
pub const EXTENT_ZEROS: u32 = 1;

const END_MAGIC: [u8; 8] = *b"AFTREND1";
const VERSION: u16 = 1;
const FLAG_NO_EXTENTS: u16 = 1;
const HEAD_BYTES: usize = 128;
const TRAILER_BYTES: usize = 64;
const FRAME_BYTES: usize = 48;
/// The largest footer that is read: it is held in memory as a whole. 30 million extents.
const MAX_FOOTER_BYTES: u64 = 1 << 30;
const EXTENT_BYTES: usize = 32;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U16,
    flags: U16,
    reserved0: U32,
    segment: U64,
    frames: U32,
    reserved1: U32,
    extents: U64,
    received_first_ns: U64,
    received_last_ns: U64,
    nonce: U64,
    end: RawPosition,
    reserved2: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFrame {
    offset: U64,
    bytes: U32,
    flags: U32,
    first_lsn: U64,
    last_lsn: U64,
    first_time_ns: U64,
    last_time_ns: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtent {
    volume: U32,
    frame: U32,
    offset: U64,
    length: U64,
    payload_at: U32,
    flags: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTrailer {
    magic: [u8; 8],
    offset: U64,
    bytes: U64,
    segment: U64,
    nonce: U64,
    reserved: [u8; 16],
    footer_crc: U32,
    crc: U32,
}

const _: () = assert!(
    size_of::<RawHead>() == HEAD_BYTES
        && size_of::<RawTrailer>() == TRAILER_BYTES
        && size_of::<RawFrame>() == FRAME_BYTES
        && size_of::<RawExtent>() == EXTENT_BYTES
);

/// Where a frame is, and what it spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameEntry {
    /// Offset in the segment's file.
    pub offset: u64,
    /// Whole frame on disk, bytes.
    pub bytes: u32,
    /// Flags of the frame ([`crate::frame::FLAG_EVENTS`]).
    pub flags: u32,
    /// First lsn.
    pub first_lsn: Lsn,
    /// Last lsn.
    pub last_lsn: Lsn,
    /// Time of the first record, ns.
    pub first_time_ns: u64,
    /// Time of the last record, ns.
    pub last_time_ns: u64,
}

/// Where the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentEntry {
    /// Volume that it belongs to.
    pub volume: VolumeId,
    /// Which of the segment's frames holds it.
    pub frame: u32,
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Position of the payload in the frame's raw payload.
    pub payload_at: u32,
    /// [`EXTENT_ZEROS`].
    pub flags: u32,
}

impl From<&RawFrame> for FrameEntry {
    fn from(raw: &RawFrame) -> FrameEntry {
        FrameEntry {
            offset: raw.offset.get(),
            bytes: raw.bytes.get(),
            flags: raw.flags.get(),
            first_lsn: Lsn(raw.first_lsn.get()),
            last_lsn: Lsn(raw.last_lsn.get()),
            first_time_ns: raw.first_time_ns.get(),
            last_time_ns: raw.last_time_ns.get(),
        }
    }
}

impl FrameEntry {
    /// What a footer says of this frame.
    pub(crate) fn of(offset: u64, header: &FrameHeader) -> Result<FrameEntry> {
        Ok(FrameEntry {
            offset,
            bytes: to_u32(header.frame_bytes())?,
            flags: u32::from(header.flags),
            first_lsn: header.first_lsn,
            last_lsn: header.last_lsn,
            first_time_ns: header.first_time_ns,
            last_time_ns: header.last_time_ns,
        })
    }
}

impl From<&RawExtent> for ExtentEntry {
    fn from(raw: &RawExtent) -> ExtentEntry {
        ExtentEntry {
            volume: VolumeId(raw.volume.get()),
            frame: raw.frame.get(),
            offset: raw.offset.get(),
            length: raw.length.get(),
            payload_at: raw.payload_at.get(),
            flags: raw.flags.get(),
        }
    }
}

/// Gathers a footer's content, frame by frame.
#[derive(Clone, Debug, Default)]
pub struct IndexBuilder {
    frames: Vec<RawFrame>,
    extents: Vec<RawExtent>,
    with_extents: bool,
}

/// What a footer says beside its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closing {
    /// Position after the last frame.
    pub end: Position,
    /// Receipt of the first frame, ns.
    pub received_first_ns: u64,
    /// Receipt of the newest frame, ns.
    pub received_last_ns: u64,
}

impl IndexBuilder {
    /// An empty index; with or without extents.
    pub fn new(with_extents: bool) -> IndexBuilder {
        IndexBuilder { with_extents, ..IndexBuilder::default() }
    }

    /// Adds the frame at `offset`. Where extents are indexed, `raw` is its unpacked payload.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] for a record that does not hold.
    pub fn push(&mut self, offset: u64, header: &FrameHeader, raw: &[u8]) -> Result<()> {
        let frame = to_u32(self.frames.len())?;
        if self.with_extents {
            for located in Records::new(raw) {
                let located = located?;
                let record = located.record;
                if record.op.changes_content() {
                    let zeros = matches!(record.op, Op::Discard | Op::WriteZeroes);
                    self.extents.push(RawExtent {
                        volume: record.volume.0.into(),
                        frame: frame.into(),
                        offset: record.extent.offset.into(),
                        length: record.extent.len.into(),
                        payload_at: to_u32(located.payload_at)?.into(),
                        flags: if zeros { EXTENT_ZEROS } else { 0 }.into(),
                    });
                }
            }
        }
        self.frames.push(RawFrame {
            offset: offset.into(),
            bytes: to_u32(header.frame_bytes())?.into(),
            flags: u32::from(header.flags).into(),
            first_lsn: header.first_lsn.0.into(),
            last_lsn: header.last_lsn.0.into(),
            first_time_ns: header.first_time_ns.into(),
            last_time_ns: header.last_time_ns.into(),
        });
        Ok(())
    }

    /// Frames so far.
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// The entries so far, in order.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = FrameEntry> + '_ {
        self.frames.iter().map(FrameEntry::from)
    }

    /// Bytes that the footer will take, trailer and padding included.
    pub fn footer_bytes(&self) -> usize {
        footer_bytes(self.frames.len(), self.extents.len())
            .expect("an index in memory has a length in memory")
    }

    /// The footer for a segment whose items end at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where extents overlap: the search rests on their being disjoint.
    pub fn finish(&mut self, segment: &SegmentHeader, offset: u64, closing: &Closing) -> Result<Vec<u8>> {
        self.extents.sort_unstable_by_key(|extent| (extent.volume.get(), extent.offset.get()));
        for pair in self.extents.windows(2) {
            let end = pair[0].offset.get().saturating_add(pair[0].length.get());
            if pair[0].volume == pair[1].volume && end > pair[1].offset.get() {
                let at = format!("index: extents of volume {} overlap at {}", pair[1].volume, pair[1].offset);
                return Err(Error::new(ErrorKind::Malformed, at));
            }
        }
        let total = self.footer_bytes();
        let head = RawHead {
            magic: MAGIC,
            version: VERSION.into(),
            flags: if self.with_extents { 0 } else { FLAG_NO_EXTENTS }.into(),
            reserved0: U32::ZERO,
            segment: segment.number.into(),
            frames: to_u32(self.frames.len())?.into(),
            reserved1: U32::ZERO,
            extents: (self.extents.len() as u64).into(),
            received_first_ns: closing.received_first_ns.into(),
            received_last_ns: closing.received_last_ns.into(),
            nonce: segment.nonce.into(),
            end: closing.end.into(),
            reserved2: U64::ZERO,
        };
        let mut footer = Vec::with_capacity(total);
        footer.extend_from_slice(head.as_bytes());
        footer.extend_from_slice(self.frames.as_bytes());
        footer.extend_from_slice(self.extents.as_bytes());
        footer.resize(total - TRAILER_BYTES, 0);
        let mut trailer = RawTrailer {
            magic: END_MAGIC,
            offset: offset.into(),
            bytes: (total as u64).into(),
            segment: segment.number.into(),
            nonce: segment.nonce.into(),
            reserved: [0; 16],
            footer_crc: crc32fast::hash(&footer).into(),
            crc: U32::ZERO,
        };
        trailer.crc = crc32fast::hash(&trailer.as_bytes()[..TRAILER_BYTES - 4]).into();
        footer.extend_from_slice(trailer.as_bytes());
        Ok(footer)
    }
}

fn to_u32(value: usize) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| Error::new(ErrorKind::Malformed, format!("index: {value} does not fit 32 bits")))
}

fn footer_bytes(frames: usize, extents: usize) -> Option<usize> {
    let entries = frames.checked_mul(FRAME_BYTES)?.checked_add(extents.checked_mul(EXTENT_BYTES)?)?;
    entries.checked_add(HEAD_BYTES + TRAILER_BYTES)?.checked_next_multiple_of(SECTOR_BYTES)
}

/// The index of a sealed segment, read and checked as a whole, then searched as it is. It is not mapped: a
/// sector that cannot be read must be an error with its place, and in a mapping it would be a SIGBUS.
pub struct SegmentIndex {
    footer: Vec<u8>,
    head: RawHead,
    offset: u64,
}

impl SegmentIndex {
    /// Opens a sealed segment's index and checks every byte of it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] with file and offset where header, footer or trailer is damaged or missing.
    pub fn open(disk: &dyn Disk, path: &Path) -> Result<SegmentIndex> {
        let number = path.file_name().and_then(|name| crate::segment::parse_name(name.to_str()?));
        let number = number.ok_or_else(|| {
            Error::new(ErrorKind::Malformed, format!("{} is no segment's name", path.display()))
        })?;
        SegmentIndex::of(&SegmentFile::open(disk, path, number)?)
    }

    /// As [`open`](Self::open), for a segment that is open already.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of(segment: &SegmentFile) -> Result<SegmentIndex> {
        let corrupt = |offset: u64, what: &str| segment.error(ErrorKind::Corrupt, offset, what);
        let trailer_at = segment.size.saturating_sub(TRAILER_BYTES as u64);
        if segment.size < (2 * SECTOR_BYTES) as u64 {
            return Err(corrupt(segment.size, "the file ends before any footer"));
        }
        let mut trailer = [0; TRAILER_BYTES];
        segment.read(&mut trailer, trailer_at)?;
        let (offset, footer_crc) =
            check_trailer(&trailer, segment).map_err(|what| corrupt(trailer_at, what))?;
        let footer = read_footer(segment, offset..trailer_at)?;
        let index =
            SegmentIndex::parse(footer, footer_crc, segment, offset).map_err(|what| corrupt(offset, what))?;
        Ok(index)
    }

    /// The index whose footer starts at `offset`, in a file that goes on behind it: sealing was cut before
    /// the file was. `None` where no whole footer of this segment stands there.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn at(segment: &SegmentFile, offset: u64) -> Result<Option<SegmentIndex>> {
        let room = segment.size.saturating_sub(offset);
        if room < SECTOR_BYTES as u64 {
            return Ok(None);
        }
        let mut head = [0; HEAD_BYTES];
        segment.read(&mut head, offset)?;
        let head = RawHead::ref_from_bytes(&head).expect("the buffer has the struct's length");
        let extents = usize::try_from(head.extents.get()).unwrap_or(usize::MAX);
        let total = match footer_bytes(head.frames.get() as usize, extents) {
            Some(total) if total as u64 <= room => total,
            _ => return Ok(None),
        };
        let trailer_at = offset + (total - TRAILER_BYTES) as u64;
        let mut trailer = [0; TRAILER_BYTES];
        segment.read(&mut trailer, trailer_at)?;
        let exact = SegmentFile {
            path: segment.path.clone(),
            header: segment.header,
            size: offset + total as u64,
            file: segment.file.clone(),
        };
        let Ok((claimed, footer_crc)) = check_trailer(&trailer, &exact) else {
            return Ok(None);
        };
        let footer = read_footer(segment, offset..trailer_at)?;
        Ok((claimed == offset)
            .then(|| SegmentIndex::parse(footer, footer_crc, &exact, offset).ok())
            .flatten())
    }

    fn parse(
        footer: Vec<u8>,
        footer_crc: u32,
        segment: &SegmentFile,
        offset: u64,
    ) -> std::result::Result<SegmentIndex, &'static str> {
        if crc32fast::hash(&footer) != footer_crc {
            return Err("footer: CRC does not match");
        }
        let (head, _) = RawHead::read_from_prefix(&footer).map_err(|_| "footer: cut short")?;
        if head.magic != MAGIC || head.version.get() != VERSION {
            return Err("footer: not one of this version");
        }
        if head.segment.get() != segment.header.number || head.nonce.get() != segment.header.nonce {
            return Err("footer: of another segment");
        }
        let extents = usize::try_from(head.extents.get()).map_err(|_| "footer: too many extents")?;
        if footer_bytes(head.frames.get() as usize, extents) != Some(footer.len() + TRAILER_BYTES) {
            return Err("footer: its length does not match its counts");
        }
        if !Position::from(head.end).is_possible() {
            return Err("footer: no history reaches such an lsn");
        }
        let index = SegmentIndex { footer, head, offset };
        index.check_entries()?;
        Ok(index)
    }

    /// What the searches rest on, also of a footer that somebody else made: frames in the order of their
    /// places, and inside the file; extents in the order of their addresses, disjoint, and of frames that
    /// there are.
    fn check_entries(&self) -> std::result::Result<(), &'static str> {
        let mut behind = SECTOR_BYTES as u64;
        let mut last = Lsn::ZERO;
        for frame in self.frames() {
            let end = frame.offset.checked_add(u64::from(frame.bytes));
            let end = end.filter(|end| *end <= self.offset).ok_or("footer: a frame lies outside the file")?;
            if frame.offset < behind || frame.bytes == 0 {
                return Err("footer: its frames are not in order");
            }
            // Undo stands in the order of its addresses.
            let rising = frame.first_lsn <= frame.last_lsn && (self.has_extents() || last <= frame.first_lsn);
            if !rising || frame.last_lsn > Lsn::MAX {
                return Err("footer: the lsns of its frames are not in order");
            }
            (behind, last) = (end, frame.last_lsn);
        }
        let mut behind = (0, 0);
        for extent in self.extents() {
            let end = extent.offset.checked_add(extent.length).ok_or("footer: an extent has no end")?;
            if (extent.volume.0, extent.offset) < behind || extent.frame >= self.head.frames.get() {
                return Err("footer: its extents are not in order");
            }
            behind = (extent.volume.0, end);
        }
        Ok(())
    }

    fn raw_frames(&self) -> &[RawFrame] {
        let bytes = self.head.frames.get() as usize * FRAME_BYTES;
        <[RawFrame]>::ref_from_bytes(&self.footer[HEAD_BYTES..HEAD_BYTES + bytes])
            .expect("lengths were checked")
    }

    fn raw_extents(&self) -> &[RawExtent] {
        let start = HEAD_BYTES + self.head.frames.get() as usize * FRAME_BYTES;
        let count = usize::try_from(self.head.extents.get()).expect("lengths were checked");
        <[RawExtent]>::ref_from_bytes(&self.footer[start..start + count * EXTENT_BYTES])
            .expect("lengths were checked")
    }

    /// Whether extents are indexed (undo segments).
    pub fn has_extents(&self) -> bool {
        self.head.flags.get() & FLAG_NO_EXTENTS == 0
    }

    /// What the footer says beside its entries.
    pub fn closing(&self) -> Closing {
        Closing {
            end: self.head.end.into(),
            received_first_ns: self.head.received_first_ns.get(),
            received_last_ns: self.head.received_last_ns.get(),
        }
    }

    /// Offset of the footer in the file: where the items end.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of memory that the index takes.
    pub fn footer_bytes(&self) -> u64 {
        self.footer.len() as u64
    }

    /// Size of the sealed file.
    pub fn file_bytes(&self) -> u64 {
        self.offset + (self.footer.len() + TRAILER_BYTES) as u64
    }

    /// Frames in order.
    pub fn frames(&self) -> impl ExactSizeIterator<Item = FrameEntry> + '_ {
        self.raw_frames().iter().map(FrameEntry::from)
    }

    /// One frame by its number in the segment.
    pub fn frame(&self, index: u32) -> Option<FrameEntry> {
        self.raw_frames().get(index as usize).map(FrameEntry::from)
    }

    /// Number of the first frame for which `before` is false; frames are in lsn order.
    pub fn partition(&self, mut before: impl FnMut(&FrameEntry) -> bool) -> usize {
        self.raw_frames().partition_point(|raw| before(&FrameEntry::from(raw)))
    }

    /// Extents sorted by (volume, offset).
    pub fn extents(&self) -> impl ExactSizeIterator<Item = ExtentEntry> + '_ {
        self.raw_extents().iter().map(ExtentEntry::from)
    }

    /// Extents of `volume` that touch `range`, in order, not clipped to it. Two binary searches' worth of
    /// work.
    pub fn extents_in(&self, volume: VolumeId, range: Range<u64>) -> impl Iterator<Item = ExtentEntry> + '_ {
        let raw = self.raw_extents();
        let first = raw.partition_point(|extent| {
            let end = extent.offset.get().saturating_add(extent.length.get());
            (extent.volume.get(), end) <= (volume.0, range.start)
        });
        raw[first..]
            .iter()
            .take_while(move |extent| extent.volume.get() == volume.0 && extent.offset.get() < range.end)
            .map(ExtentEntry::from)
    }

    /// Bytes of footer and trailer equal what `rebuilt` gives for the same segment.
    pub(crate) fn equals(&self, rebuilt: &mut IndexBuilder, segment: &SegmentHeader) -> Result<bool> {
        let footer = rebuilt.finish(segment, self.offset, &self.closing())?;
        Ok(footer[..footer.len() - TRAILER_BYTES] == self.footer[..])
    }

    /// The summary of the sealed segment.
    pub(crate) fn summary(&self, segment: &SegmentFile) -> SegmentSummary {
        let mut summary = SegmentSummary::empty(segment.path.clone(), &segment.header);
        let closing = self.closing();
        let frames = self.raw_frames();
        if let (Some(first), Some(last)) = (frames.first(), frames.last()) {
            summary.first_lsn = Lsn(first.first_lsn.get());
            summary.last_lsn = Lsn(last.last_lsn.get());
            summary.first_time_ns = first.first_time_ns.get();
            summary.last_time_ns = last.last_time_ns.get();
        }
        summary.end = closing.end;
        summary.received_first_ns = closing.received_first_ns;
        summary.received_last_ns = closing.received_last_ns;
        summary.bytes = self.file_bytes();
        summary.frames = self.head.frames.get();
        summary.sealed = true;
        summary
    }
}

/// The footer without its trailer; `range` lies in the file.
fn read_footer(segment: &SegmentFile, range: Range<u64>) -> Result<Vec<u8>> {
    let failed = |error| {
        Error::io(format!("read footer of {}: offset {}", segment.path.display(), range.start), error)
    };
    let bytes = range.end.saturating_sub(range.start);
    if bytes > MAX_FOOTER_BYTES {
        return Err(segment.error(ErrorKind::Corrupt, range.start, "footer: no segment has such a long one"));
    }
    let bytes = usize::try_from(bytes).map_err(|e| failed(std::io::Error::other(e)))?;
    let mut footer = Vec::new();
    footer.try_reserve_exact(bytes).map_err(|e| failed(std::io::Error::other(e)))?;
    footer.resize(bytes, 0);
    read_exact_at(&*segment.file, &mut footer, range.start).map_err(failed)?;
    Ok(footer)
}

/// Offset and CRC of the footer that ends at the segment's size.
fn check_trailer(bytes: &[u8], segment: &SegmentFile) -> std::result::Result<(u64, u32), &'static str> {
    let trailer = RawTrailer::ref_from_bytes(bytes).map_err(|_| "trailer: cut short")?;
    if trailer.magic != END_MAGIC {
        return Err("trailer: magic is not AFTREND1");
    }
    if crc32fast::hash(&bytes[..TRAILER_BYTES - 4]) != trailer.crc.get() {
        return Err("trailer: CRC does not match");
    }
    if trailer.segment.get() != segment.header.number || trailer.nonce.get() != segment.header.nonce {
        return Err("trailer: of another segment");
    }
    let (offset, total) = (trailer.offset.get(), trailer.bytes.get());
    let sector = SECTOR_BYTES as u64;
    if offset < sector
        || offset % sector != 0
        || total < sector
        || offset.checked_add(total) != Some(segment.size)
    {
        return Err("trailer: its offsets do not match the file");
    }
    Ok((offset, trailer.footer_crc.get()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::tests::{batch_of, stamp};
    use crate::compress::{Compression, Encoder};
    use crate::segment::{self, SegmentKind};
    use crate::sim_disk::SimDisk;

    fn header() -> SegmentHeader {
        SegmentHeader {
            kind: SegmentKind::Undo,
            flags: 0,
            group: stamp().group,
            number: 9,
            first_lsn: Lsn(1),
            last_lsn: Lsn(1),
            start: Position::default(),
            received_ns: 0,
            allocated_bytes: 0,
            nonce: 0xAB,
            merged_from: 0,
        }
    }

    /// A footer over one frame with one extent, its frame at 512.
    fn footer(with_extents: bool) -> Vec<u8> {
        let batch = batch_of(1, &[5; 1024]);
        let encoded = Encoder::new().unwrap().encode(&batch, &stamp(), Some(9), Compression::Off, Vec::new());
        let frame = FrameHeader::parse(&encoded.unwrap().seal(3).0).unwrap();
        let mut index = IndexBuilder::new(with_extents);
        index.push(512, &frame, batch.raw()).unwrap();
        let end = Position { lsn: Lsn(1), chain: 0x77, ..Position::default() };
        let closing = Closing { end, received_first_ns: 4, received_last_ns: 6 };
        let footer = index.finish(&header(), 2048, &closing).unwrap();
        assert_eq!(footer.len(), index.footer_bytes());
        footer
    }

    #[test]
    fn golden_bytes_of_footer_and_trailer() {
        let mut expected = [0; 512];
        expected[..8].copy_from_slice(b"AFTRIDX1");
        // version, segment, counts, receipts, nonce; end: lsn and chain
        for (at, value) in
            [(8, 1), (16, 9), (24, 1), (32, 1), (40, 4), (48, 6), (56, 0xAB), (104, 1), (112, 0x77)]
        {
            expected[at] = value;
        }
        // frame: offset 512, 1536 bytes, lsns, times
        for (at, value) in [(129, 2), (137, 6), (144, 1), (152, 1), (160, 1), (168, 1)] {
            expected[at] = value;
        }
        // extent: length 1024, payload behind the record header
        for (at, value) in [(193, 4), (200, 48)] {
            expected[at] = value;
        }
        let crc = crc32fast::hash(&expected[..448]).to_le_bytes();
        expected[448..456].copy_from_slice(b"AFTREND1");
        for (at, value) in [(457, 8), (465, 2), (472, 9), (480, 0xAB)] {
            expected[at] = value;
        }
        expected[504..508].copy_from_slice(&crc);
        let crc = crc32fast::hash(&expected[448..508]).to_le_bytes();
        expected[508..].copy_from_slice(&crc);
        assert_eq!(footer(true), expected);
        let mut without = footer(false);
        assert_eq!((without[10], without[32]), (1, 0), "flagged, no extents");
        without.truncate(448);
        assert!(without[176..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_sector_that_cannot_be_read_is_an_error_with_its_place() {
        let disk = SimDisk::new();
        let path = Path::new("/s").join(segment::file_name(9));
        let mut file = header().encode().to_vec();
        file.resize(2048, 1);
        file.extend_from_slice(&footer(true));
        disk.put(&path, file);
        disk.fail_reads(&path, Some(2048..2100));
        let error = SegmentIndex::open(&disk, &path).err().unwrap();
        assert_eq!(error.kind, ErrorKind::Io);
        assert!(error.at.contains("offset 2048"), "{error}");
        disk.fail_reads(&path, None);
        SegmentIndex::open(&disk, &path).unwrap();
    }

    #[test]
    fn every_flip_and_cut_of_a_footer_is_corruption() {
        let disk = SimDisk::new();
        let path = Path::new("/s").join(segment::file_name(9));
        let mut file = header().encode().to_vec();
        file.resize(2048, 1);
        file.extend_from_slice(&footer(true));
        disk.put(&path, file.clone());
        SegmentIndex::open(&disk, &path).unwrap();
        for at in 2048..file.len() {
            disk.corrupt(&path, at as u64, |byte| byte ^ 2);
            let error = SegmentIndex::open(&disk, &path).err().unwrap();
            assert_eq!(error.kind, ErrorKind::Corrupt, "flip at {at}");
            disk.corrupt(&path, at as u64, |byte| byte ^ 2);
        }
        for length in 0..file.len() {
            disk.put(&path, file[..length].to_vec());
            let error = SegmentIndex::open(&disk, &path).err().unwrap();
            assert_eq!(error.kind, ErrorKind::Corrupt, "cut at {length}");
        }
    }
}
