//! Torn tail or corruption? The one place that decides it, for opening and for verifying.
//!
//! The rule (DESIGN section 5, decision 0004). Only the last segment of a journal may end in a torn tail:
//! everything before it was sealed and synced before the last one got its name. In the last one, damage is
//! corruption when
//! * a valid mark of this segment stands anywhere above it: what lies below a mark was durable, or
//! * the control file calls a later position durable (after each sync the writer notes it there, too: a mark
//!   is gone with the end of a file that somebody cut).
//!
//! Otherwise it is a torn tail: nothing in it was ever acknowledged, and the journal ends at the last frame
//! whose CRC and chain hold. Here things are only read; [`crate::writer`] does the cutting.

use crate::frame::FrameHeader;
use crate::index::{IndexBuilder, SegmentIndex};
use crate::mark::{self, Mark};
use crate::segment::{FLAG_RECYCLED, SegmentSummary};
use crate::walk::{Item, SegmentFile, Walk};
use crate::{Error, ErrorKind, Position, Result, SECTOR_BYTES};

/// How the last segment of a journal ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Where the items end nothing follows.
    Clean,
    /// It is sealed; the file should be cut to this size, and is, unless the cut came in between.
    Sealed(u64),
    /// Something unfinished follows: bytes that a crash left, never acknowledged.
    Torn(String),
    /// Durable bytes are damaged at this offset.
    Corrupt(u64, String),
}

/// The last segment as it was found.
pub struct Scan {
    /// Its summary up to where it holds.
    pub summary: SegmentSummary,
    /// Index of the frames that hold.
    pub index: IndexBuilder,
    /// Where the items that hold end: the next frame goes here.
    pub offset: u64,
    /// What follows.
    pub ending: Ending,
}

/// Sees a whole frame: its offset, header and bytes.
pub type OnFrame<'a> = &'a mut dyn FnMut(u64, &FrameHeader, &[u8]) -> Result<()>;

/// Walks the last segment of a journal and decides how it ends. `floor` is what the control file calls
/// durable; `on_frame` sees each whole frame that holds.
///
/// # Errors
/// The disk's; [`ErrorKind::Unsupported`] for frames of a newer program. Damage is not an error here but an
/// ending.
pub fn scan_tail(segment: &SegmentFile, floor: Option<&Position>, on_frame: OnFrame<'_>) -> Result<Scan> {
    let mut walk = Walk::new(segment);
    let mut summary = SegmentSummary::empty(segment.path.clone(), &segment.header);
    let mut index = IndexBuilder::new(false);
    let stop = loop {
        match walk.step() {
            Ok((offset, Item::Frame(header))) => {
                on_frame(offset, &header, &walk.frame)?;
                index.push(offset, &header, &[])?;
                note_frame(&mut summary, &header);
            }
            Ok((_, Item::Mark(mark))) => {
                summary.received_last_ns = summary.received_last_ns.max(mark.received_ns)
            }
            Ok((_, Item::Footer)) => break Stop::Footer,
            Ok((_, Item::End)) => break Stop::Nothing,
            Err(error) if is_damage(&error) => break Stop::Damage(error),
            Err(error) => return Err(error),
        }
    };
    let offset = walk.offset;
    summary.bytes = offset;
    let ending = judge(segment, offset, &walk.position, floor, &stop, &mut index, &mut summary)?;
    Ok(Scan { summary, index, offset, ending })
}

/// Adds a frame to a summary.
pub(crate) fn note_frame(summary: &mut SegmentSummary, header: &FrameHeader) {
    if summary.frames == 0 {
        summary.first_lsn = header.first_lsn;
        summary.first_time_ns = header.first_time_ns;
    }
    summary.end = header.position();
    summary.last_lsn = header.last_lsn;
    summary.last_time_ns = header.last_time_ns;
    summary.frames += 1;
}

/// Whether an error says that bytes are not what they should be, as opposed to a disk or version that
/// refuses.
pub(crate) fn is_damage(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::Malformed | ErrorKind::OutOfOrder | ErrorKind::Corrupt)
}

/// Why a walk stopped.
enum Stop {
    Nothing,
    Footer,
    Damage(Error),
}

fn judge(
    segment: &SegmentFile,
    offset: u64,
    position: &Position,
    floor: Option<&Position>,
    stop: &Stop,
    index: &mut IndexBuilder,
    summary: &mut SegmentSummary,
) -> Result<Ending> {
    if let Stop::Footer = stop
        && let Some(footer) = SegmentIndex::at(segment, offset)?
        && footer.closing().end == *position
        && footer.equals(index, &segment.header)?
    {
        *summary = footer.summary(segment);
        return Ok(Ending::Sealed(footer.file_bytes()));
    }
    let what = match stop {
        Stop::Nothing => "nothing is there".to_owned(),
        Stop::Footer => "footer is not whole".to_owned(),
        Stop::Damage(error) => error.at.clone(),
    };
    if let Some(mark) = highest_mark(segment, offset)? {
        let at = mark.offset;
        return Ok(Ending::Corrupt(
            offset,
            format!("{what}; a mark at offset {at} says that this was durable"),
        ));
    }
    if let Some(floor) = floor.filter(|floor| floor.order() > position.order()) {
        let lsn = floor.lsn;
        return Ok(Ending::Corrupt(
            offset,
            format!("{what}; the control file says that lsn {lsn} was durable"),
        ));
    }
    if segment.size < segment.header.allocated_bytes {
        let (size, reserved) = (segment.size, segment.header.allocated_bytes);
        return Ok(Ending::Torn(format!("{what}; the file is cut: {size} of {reserved} bytes")));
    }
    // Behind the end of a recycled file stand stale bytes; only a frame that would be the next one is a torn
    // tail.
    let recycled = segment.header.flags & FLAG_RECYCLED != 0;
    Ok(match stop {
        Stop::Nothing => Ending::Clean,
        Stop::Footer => Ending::Torn(what),
        Stop::Damage(_) if recycled && !is_next(segment, offset, position)? => Ending::Clean,
        Stop::Damage(_) => Ending::Torn(what),
    })
}

fn is_next(segment: &SegmentFile, offset: u64, position: &Position) -> Result<bool> {
    match segment.peek(offset) {
        Ok(Item::Frame(header)) => Ok(header.check_follows(position).is_ok()),
        Ok(_) => Ok(false),
        Err(error) if is_damage(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The highest mark of this segment at or above `from`.
pub(crate) fn highest_mark(segment: &SegmentFile, from: u64) -> Result<Option<Mark>> {
    let mut chunk = vec![0; 1 << 20];
    let mut highest = None;
    let mut at = from;
    while at < segment.size {
        // Only what is no hole: a sparse file may say any size.
        let failed = |error| Error::io(format!("seek in {}: offset {at}", segment.path.display()), error);
        match segment.file.next_data(at).map_err(failed)? {
            Some(data) => at = at.max(data.start - data.start % SECTOR_BYTES as u64),
            None => break,
        }
        let held = segment
            .file
            .read_at(&mut chunk, at)
            .map_err(|error| Error::io(format!("read {}: offset {at}", segment.path.display()), error))?;
        for (sector, bytes) in chunk[..held].chunks_exact(SECTOR_BYTES).enumerate() {
            let offset = at + (sector * SECTOR_BYTES) as u64;
            if bytes.starts_with(&mark::MAGIC) {
                highest =
                    Mark::decode(bytes).ok().filter(|mark| mark.belongs(&segment.header, offset)).or(highest);
            }
        }
        if held < chunk.len() {
            break;
        }
        at += held as u64;
    }
    Ok(highest)
}
