//! Reading a segment's items one after the other, each checked against the bytes and against the one before.
//!
//! [`SegmentFile`] reads what stands at an offset; [`Walk`] adds the order: group, epoch, lsn, chain. What a
//! failure means – a torn tail or corruption – is decided elsewhere ([`crate::recovery`]).

use crate::frame::{self, FrameHeader, FrameKind};
use crate::index;
use crate::io::{Disk, File, read_exact_at};
use crate::mark::{self, Mark};
use crate::segment::{self, SegmentHeader, SegmentKind};
use crate::{Error, ErrorKind, Position, Result, SECTOR_BYTES};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An open segment with an intact header.
pub struct SegmentFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its header.
    pub header: SegmentHeader,
    /// Size of the file when it was opened.
    pub size: u64,
    pub(crate) file: Arc<dyn File>,
}

/// What stands at an offset of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// A frame; its header is intact, its payload not yet read.
    Frame(FrameHeader),
    /// A mark of this segment.
    Mark(Mark),
    /// The footer begins here (its own checks are [`crate::index`]'s).
    Footer,
    /// Nothing: a sector of zeros, or the end of the file.
    End,
}

impl SegmentFile {
    /// Opens a segment and checks its header against its name.
    ///
    /// # Errors
    /// [`ErrorKind::NotHeld`] where the file does not exist; [`ErrorKind::Corrupt`] for a damaged header or
    /// the header of another segment.
    pub fn open(disk: &dyn Disk, path: &Path, number: u64) -> Result<SegmentFile> {
        let file = disk.open_read_own(path).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            let mut failed = Error::io(format!("open segment {}", path.display()), error);
            failed.kind = if missing { ErrorKind::NotHeld } else { failed.kind };
            failed
        })?;
        SegmentFile::new(file, path, number)
    }

    /// As [`open`](Self::open), over a file that is open already.
    pub(crate) fn new(file: Arc<dyn File>, path: &Path, number: u64) -> Result<SegmentFile> {
        let unreadable = |error| Error::io(format!("read segment {}: offset 0", path.display()), error);
        let corrupt =
            |what: &str| Error::new(ErrorKind::Corrupt, format!("{}: offset 0: {what}", path.display()));
        let size = file.size().map_err(unreadable)?;
        let mut sector = [0; segment::HEADER_BYTES];
        let held = file.read_at(&mut sector, 0).map_err(unreadable)?;
        let header = SegmentHeader::decode(&sector[..held]).map_err(|error| match error.kind {
            ErrorKind::Malformed => corrupt(&error.at),
            kind => Error::new(kind, format!("{}: {}", path.display(), error.at)),
        })?;
        if header.number != number {
            return Err(corrupt(&format!("holds segment {}, not the one of its name", header.number)));
        }
        if header.kind == SegmentKind::Journal && size > segment::MAX_BYTES {
            return Err(corrupt("no segment is so long"));
        }
        Ok(SegmentFile { path: path.into(), header, size, file })
    }

    /// An error of this file at this offset.
    pub(crate) fn error(&self, kind: ErrorKind, offset: u64, what: &str) -> Error {
        Error::new(kind, format!("{}: offset {offset}: {what}", self.path.display()))
    }

    fn place(&self, offset: u64, error: &Error) -> Error {
        self.error(error.kind, offset, &error.at)
    }

    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&*self.file, buffer, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                self.error(ErrorKind::Malformed, offset, "the file ends too early")
            }
            _ => Error::io(format!("read {}: offset {offset}", self.path.display()), error),
        })
    }

    /// What stands at `offset`, going by the sector there.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] for bytes that are nothing of this segment's; the disk's.
    pub fn peek(&self, offset: u64) -> Result<Item> {
        let mut sector = [0; SECTOR_BYTES];
        let held = self
            .file
            .read_at(&mut sector, offset)
            .map_err(|error| Error::io(format!("read {}: offset {offset}", self.path.display()), error))?;
        if held == 0 || sector == [0; SECTOR_BYTES] {
            return Ok(Item::End);
        }
        self.classify(&sector[..held], offset).map_err(|error| self.place(offset, &error))
    }

    fn classify(&self, bytes: &[u8], offset: u64) -> Result<Item> {
        if bytes.starts_with(&mark::MAGIC) {
            let mark = Mark::decode(bytes)?;
            if !mark.belongs(&self.header, offset) {
                return Err(Error::new(ErrorKind::Malformed, "stale mark"));
            }
            return Ok(Item::Mark(mark));
        }
        if bytes.starts_with(&index::MAGIC) {
            return Ok(Item::Footer);
        }
        let frame = FrameHeader::parse(bytes)?;
        let kinds: &[FrameKind] = match self.header.kind {
            SegmentKind::Journal => &[FrameKind::Live, FrameKind::Sync],
            SegmentKind::Undo => &[FrameKind::Undo],
        };
        if frame.group != self.header.group || !kinds.contains(&frame.kind) {
            return Err(Error::new(ErrorKind::Malformed, "frame of another group or kind"));
        }
        Ok(Item::Frame(frame))
    }

    /// Reads the whole frame whose header [`peek`](Self::peek) found, and checks every byte of it.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where it is damaged; the disk's.
    pub fn read_frame(&self, offset: u64, header: &FrameHeader, out: &mut Vec<u8>) -> Result<()> {
        out.resize(header.frame_bytes(), 0);
        self.read(out, offset)?;
        // The header is read again with the payload: both reads must have seen the same frame.
        let again = FrameHeader::parse(out).map_err(|error| self.place(offset, &error))?;
        if again != *header {
            return Err(self.error(ErrorKind::Malformed, offset, "frame changed between two reads"));
        }
        header.check_payload(out).map_err(|error| self.place(offset, &error))
    }

    /// Checks that `frame` stands behind `held` in this segment.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfOrder`].
    pub(crate) fn check_order(&self, offset: u64, frame: &FrameHeader, held: &Position) -> Result<()> {
        let follows = match self.header.kind {
            SegmentKind::Journal => frame.check_follows(held),
            SegmentKind::Undo => self.check_undo(frame, held),
        };
        follows.map_err(|error| self.place(offset, &error))
    }

    /// Undo frames of one batch are chained; their records need not be dense, and lie within the batch.
    fn check_undo(&self, frame: &FrameHeader, held: &Position) -> Result<()> {
        let inside = frame.first_lsn >= self.header.first_lsn && frame.last_lsn <= self.header.last_lsn;
        let same = frame.lineage == held.lineage && frame.epoch == held.epoch;
        if !same || !inside || frame.batch != self.header.number || frame.chain_in != held.chain {
            return Err(Error::new(ErrorKind::OutOfOrder, "undo frame that is not the next of this batch"));
        }
        Ok(())
    }
}

/// Walks a segment from its first item to the end or the first one that does not hold.
pub struct Walk<'a> {
    segment: &'a SegmentFile,
    /// Offset of the next item.
    pub offset: u64,
    /// Position after the last frame.
    pub position: Position,
    /// The last frame's bytes.
    pub frame: Vec<u8>,
}

impl<'a> Walk<'a> {
    /// Starts behind the header.
    pub fn new(segment: &'a SegmentFile) -> Walk<'a> {
        let frame = Vec::with_capacity(frame::MAX_FRAME_BYTES);
        Walk { segment, offset: segment::HEADER_BYTES as u64, position: segment.header.start, frame }
    }

    /// The next item, fully checked, and its offset. Stays where it is at `Footer` and `End`, and on errors.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] and [`ErrorKind::OutOfOrder`] for what is not the next intact item.
    pub fn step(&mut self) -> Result<(u64, Item)> {
        let offset = self.offset;
        let item = self.segment.peek(offset)?;
        match &item {
            Item::Frame(header) => {
                self.segment.check_order(offset, header, &self.position)?;
                self.segment.read_frame(offset, header, &mut self.frame)?;
                self.position = header.position();
                self.offset += header.frame_bytes() as u64;
            }
            Item::Mark(mark) if mark.durable != self.position => {
                return Err(self.segment.error(ErrorKind::OutOfOrder, offset, "mark of another position"));
            }
            Item::Mark(_) => self.offset += SECTOR_BYTES as u64,
            Item::Footer | Item::End => {}
        }
        Ok((offset, item))
    }
}
