//! Mending: what of a journal segment rotted, and how the very same bytes are put back.
//!
//! The frames of a segment are known without reading them: place, length and lsns of each stand in its
//! footer, or in the writer while it is being written. A frame that does not hold is also known by its
//! neighbours: it begins at the position behind the one before it, and ends at the position that the next one
//! demands. So one that comes from somewhere else is either the same frame, or is refused. Marks are derived
//! from what stands before them.
//!
//! Content of a frame is under a CRC-32 alone: whoever made the frame could make another one of the same
//! length, CRC and chain. It can do so only in the place of one that rotted.

use crate::frame::FrameHeader;
use crate::index::{FrameEntry, SegmentIndex};
use crate::mark::Mark;
use crate::recovery::is_damage;
use crate::segment::{self, SegmentKind};
use crate::walk::{Item, SegmentFile};
use crate::{Error, ErrorKind, Position, Result, SECTOR_BYTES};
use std::path::PathBuf;

/// The most bytes of a run that are held in memory to be put back at once.
pub const MAX_RUN_BYTES: u64 = 16 << 20;

/// What a segment holds, as its footer or its writer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its frames, in order.
    pub frames: Vec<FrameEntry>,
    /// Position behind the last of them.
    pub end: Position,
    /// Offset behind the last item.
    pub end_offset: u64,
    /// Newest receipt, ns.
    pub received_ns: u64,
}

/// Frames in a row that do not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The segment.
    pub segment: u64,
    /// Its nonce: a recycled file is another segment.
    pub nonce: u64,
    /// Its file.
    pub path: PathBuf,
    /// Position before the first of them.
    pub after: Position,
    /// Time of the record before the first of them, ns; 0 where the segment does not tell.
    pub before_time_ns: u64,
    /// The frames, as the footer has them.
    pub frames: Vec<FrameEntry>,
    /// Position behind the last of them, as what follows demands it.
    pub end: Position,
    /// What is wrong with the first.
    pub what: String,
}

/// What of a segment does not hold and can be put back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rot {
    /// Frames; they must come from the other side.
    pub runs: Vec<Run>,
    /// Marks, as they were but for the time of receipt, which is never earlier.
    pub marks: Vec<Mark>,
}

impl Layout {
    /// What the footer of a sealed segment says.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the footer itself is damaged.
    pub fn of_sealed(segment: &SegmentFile) -> Result<Layout> {
        let index = SegmentIndex::of(segment)?;
        let closing = index.closing();
        Ok(Layout {
            frames: index.frames().collect(),
            end: closing.end,
            end_offset: index.offset(),
            received_ns: closing.received_last_ns,
        })
    }
}

impl Run {
    /// Offset of the first byte.
    pub fn offset(&self) -> u64 {
        self.frames.first().map_or(0, |entry| entry.offset)
    }

    /// Bytes of all its frames.
    pub fn bytes(&self) -> u64 {
        self.frames.iter().map(|entry| u64::from(entry.bytes)).sum()
    }

    /// Checks one frame that came from elsewhere as the one that stood behind `held`; the position behind it.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] and [`ErrorKind::OutOfOrder`] where it is not the one.
    pub fn check(&self, at: usize, held: &Position, frame: &[u8]) -> Result<Position> {
        let refused = |what: &str| Error::new(ErrorKind::OutOfOrder, format!("fetched frame: {what}"));
        let entry = self.frames.get(at).ok_or_else(|| refused("it was not asked for"))?;
        let header = FrameHeader::parse(frame)?;
        header.check_follows(held)?;
        if frame.len() != entry.bytes as usize || !is_entry(entry, &header) {
            return Err(refused("of another length, or of other lsns"));
        }
        header.check_payload(frame)?;
        let position = header.position();
        if at + 1 == self.frames.len() && position != self.end {
            return Err(refused("its chain does not join the frame behind it"));
        }
        Ok(position)
    }

    /// Checks all of its frames.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_all(&self, frames: &[Vec<u8>]) -> Result<()> {
        if frames.len() != self.frames.len() {
            let at = format!("{} of {} fetched frames", frames.len(), self.frames.len());
            return Err(Error::new(ErrorKind::OutOfOrder, at));
        }
        let mut held = self.after;
        for (at, frame) in frames.iter().enumerate() {
            held = self.check(at, &held, frame)?;
        }
        Ok(())
    }
}

fn is_entry(entry: &FrameEntry, header: &FrameHeader) -> bool {
    header.frame_bytes() == entry.bytes as usize
        && (header.first_lsn, header.last_lsn) == (entry.first_lsn, entry.last_lsn)
}

/// Reads a journal segment, and says what of it does not hold. What stands behind a run that is not put back
/// yet is not looked at as sharply: look again then.
///
/// # Errors
/// The disk's; a sector that cannot be read is damage like any other.
pub fn look(segment: &SegmentFile, layout: &Layout) -> Result<Rot> {
    if segment.header.kind != SegmentKind::Journal {
        return Err(Error::new(ErrorKind::Malformed, "only journal segments can be fetched again"));
    }
    let mut looking = Looking { segment, rot: Rot::default(), open: None, time_ns: 0 };
    let mut held = Some(segment.header.start);
    let mut offset = segment::HEADER_BYTES as u64;
    let mut frame = Vec::new();
    for entry in &layout.frames {
        looking.marks(offset..entry.offset, held.as_ref(), layout.received_ns);
        held = match looking.frame(entry, held.as_ref(), &mut frame) {
            Ok(header) => {
                looking.close(before(&header));
                Some(header.position())
            }
            Err(error) => {
                looking.rotten(entry, held, &error);
                None
            }
        };
        looking.time_ns = entry.last_time_ns;
        offset = entry.offset + u64::from(entry.bytes);
    }
    looking.close(layout.end);
    looking.marks(offset..layout.end_offset, held.as_ref(), layout.received_ns);
    Ok(looking.rot)
}

/// Position before a frame of the stream.
fn before(header: &FrameHeader) -> Position {
    let lsn = crate::Lsn(header.first_lsn.0.saturating_sub(1));
    Position { lineage: header.lineage, epoch: header.epoch, lsn, chain: header.chain_in }
}

struct Looking<'a> {
    segment: &'a SegmentFile,
    rot: Rot,
    open: Option<Run>,
    time_ns: u64,
}

impl Looking<'_> {
    /// The frame that the layout names, if it holds.
    fn frame(&self, entry: &FrameEntry, held: Option<&Position>, out: &mut Vec<u8>) -> Result<FrameHeader> {
        let other = |what| self.segment.error(ErrorKind::Malformed, entry.offset, what);
        let Item::Frame(header) = self.segment.peek(entry.offset)? else {
            return Err(other("no frame where the footer says one is"));
        };
        let start = self.segment.header.start;
        if !is_entry(entry, &header) || (header.lineage, header.epoch) != (start.lineage, start.epoch) {
            return Err(other("another frame than the footer says"));
        }
        if let Some(held) = held {
            header.check_follows(held)?;
        }
        self.segment.read_frame(entry.offset, &header, out)?;
        Ok(header)
    }

    fn rotten(&mut self, entry: &FrameEntry, held: Option<Position>, error: &Error) {
        let (header, path) = (&self.segment.header, self.segment.path.clone());
        let what = match &error.source {
            Some(source) if !is_damage(error) => format!("{}: {source}", error.at),
            _ => error.at.clone(),
        };
        let run = self.open.get_or_insert_with(|| Run {
            segment: header.number,
            nonce: header.nonce,
            path,
            // A run begins behind a frame that holds.
            after: held.unwrap_or_default(),
            before_time_ns: self.time_ns,
            frames: Vec::new(),
            end: Position::default(),
            what,
        });
        run.frames.push(*entry);
    }

    fn close(&mut self, end: Position) {
        self.rot.runs.extend(self.open.take().map(|run| Run { end, ..run }));
    }

    /// Between two frames there are marks of the position there, and nothing else.
    fn marks(&mut self, range: std::ops::Range<u64>, held: Option<&Position>, received_ns: u64) {
        let Some(held) = held else { return };
        let header = &self.segment.header;
        let mut offset = range.start;
        while offset < range.end {
            let holds = matches!(self.segment.peek(offset), Ok(Item::Mark(mark)) if mark.durable == *held);
            if !holds {
                let (segment, nonce) = (header.number, header.nonce);
                self.rot.marks.push(Mark { segment, offset, nonce, received_ns, durable: *held });
            }
            offset += SECTOR_BYTES as u64;
        }
    }
}
