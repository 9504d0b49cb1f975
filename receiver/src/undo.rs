//! Undo: what a batch is about to overwrite, kept as one sealed segment named by the batch's number.
//!
//! Written by the applier before the replica is touched, read by views and restores. Old content is compared
//! with the new at 4 KiB: what stays the same is neither undone nor written. Holes cost nothing: they become
//! zero extents.
//!
//! Frames are about 256 KiB raw and their records sorted by (volume, offset), so that whoever restores a part
//! of a volume unpacks few frames, each once. The first frame begins with two `Void` records that carry the
//! batch's first and last (lsn, time): a batch that overwrote nothing has a segment too, and what happened
//! when is known from the segment's front without its index.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::compress::{Compression, Decoder, Encoder};
use journal::extent_map::{ExtentMap, Piece};
use journal::frame::{self, Batch, FrameHeader, Stamp, chain_seed};
use journal::index::{EXTENT_ZEROS, SegmentIndex};
use journal::io::{Disk, File, read_exact_at};
use journal::record::{MAX_PAYLOAD_BYTES, Op, Record};
use journal::sealed::SealedWriter;
use journal::segment::{SegmentHeader, SegmentKind};
use journal::{Epoch, Extent, GroupId, Lineage, Lsn, Position, SECTOR_BYTES, VolumeId};

use crate::fold::{Fold, MAX_RUN_BYTES, Run, push_range};
use crate::merged::lay_under;
use crate::replica::Replica;
use crate::state::Moment;
use crate::{Error, ErrorKind, Result};

/// Raw bytes after which an undo frame is closed: small, since a reader unpacks all of it for one extent.
const FRAME_RAW_BYTES: usize = 256 << 10;
/// Grain of the comparison between old and new content.
const BLOCK_BYTES: u64 = 4096;

/// A batch as its undo segment names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UndoSummary {
    /// The batch; of several that are merged the last.
    pub number: u64,
    /// The first of the batches that it stands for: the batch itself, unless they were merged.
    pub from: u64,
    /// Epoch of all its records.
    pub epoch: Epoch,
    /// First record.
    pub first: Moment,
    /// Last record: the batch's boundary.
    pub last: Moment,
    /// Receiver's clock when the batch's last record was received, ns.
    pub received_ns: u64,
    /// Size of the segment file.
    pub bytes: u64,
    /// The segment file.
    pub path: PathBuf,
    /// Its nonce; 0 until it is read from the file.
    pub nonce: u64,
}

/// File name of a batch's undo segment.
pub fn file_name(number: u64) -> String {
    format!("{number:020}.seg")
}

/// The batch number in a file name, if it is an undo segment's.
pub fn file_number(name: &str) -> Option<u64> {
    name.strip_suffix(".seg").filter(|digits| digits.len() == 20)?.parse().ok()
}

/// Reads what a segment's front says: its header and that of its first frame.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where they are damaged, or do not belong to this group and number.
pub fn read_summary(disk: &dyn Disk, dir: &Path, number: u64, group: GroupId) -> Result<UndoSummary> {
    let path = dir.join(file_name(number));
    let corrupt =
        |offset: usize, what: String| Error::corrupt(format!("{} at byte {offset}: {what}", path.display()));
    let file = disk.open_read_own(&path).map_err(|e| Error::io(format!("open {}", path.display()), e))?;
    let mut front = [0; SECTOR_BYTES + frame::HEADER_BYTES];
    match read_exact_at(&*file, &mut front, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(corrupt(0, "cut short".into())),
        other => other.map_err(|e| Error::io(format!("read {}", path.display()), e))?,
    }
    let header = SegmentHeader::decode(&front).map_err(|e| corrupt(0, e.to_string()))?;
    let first =
        FrameHeader::parse(&front[SECTOR_BYTES..]).map_err(|e| corrupt(SECTOR_BYTES, e.to_string()))?;
    if header.kind != SegmentKind::Undo || header.number != number || header.group != group {
        return Err(corrupt(0, format!("is not the undo segment of batch {number} of group {group}")));
    }
    if (first.first_lsn, first.last_lsn, first.batch) != (header.first_lsn, header.last_lsn, number) {
        return Err(corrupt(SECTOR_BYTES, "first frame names another range".into()));
    }
    let from = if header.merged_from == 0 { number } else { header.merged_from };
    if from > number {
        return Err(corrupt(0, format!("stands for batches {from} to {number}")));
    }
    let bytes = file.size().map_err(|e| Error::io(format!("size of {}", path.display()), e))?;
    Ok(UndoSummary {
        number,
        from,
        epoch: header.start.epoch,
        first: Moment { lsn: first.first_lsn, time_ns: first.first_time_ns },
        last: Moment { lsn: first.last_lsn, time_ns: first.last_time_ns },
        received_ns: header.received_ns,
        bytes,
        path,
        nonce: header.nonce,
    })
}

/// What every undo segment of a group is stamped with.
#[derive(Clone, Copy, Debug)]
pub struct UndoOwner {
    /// Group.
    pub group: GroupId,
    /// Line of descent.
    pub lineage: Lineage,
    /// How frames are packed.
    pub compression: Compression,
}

/// Writes one batch's undo segment.
pub struct UndoWriter<'a> {
    segment: SealedWriter,
    encoder: &'a mut Encoder,
    batch: Batch,
    stamp: Stamp,
    compression: Compression,
    summary: UndoSummary,
    old: Vec<u8>,
}

impl<'a> UndoWriter<'a> {
    /// Starts the segment under its temporary name. `summary` says which batch; its size is filled in at the
    /// end.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] and [`ErrorKind::Io`].
    pub fn create(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        owner: UndoOwner,
        summary: UndoSummary,
        encoder: &'a mut Encoder,
    ) -> Result<UndoWriter<'a>> {
        let UndoOwner { group, lineage, compression } = owner;
        let start = Position {
            lineage,
            epoch: summary.epoch,
            lsn: Lsn(summary.first.lsn.0 - 1),
            chain: chain_seed(lineage, summary.epoch),
        };
        let header = SegmentHeader {
            kind: SegmentKind::Undo,
            group,
            number: summary.number,
            first_lsn: summary.first.lsn,
            last_lsn: summary.last.lsn,
            start,
            received_ns: summary.received_ns,
            flags: 0,
            allocated_bytes: 0,
            nonce: 0,
            merged_from: if summary.from < summary.number { summary.from } else { 0 },
        };
        let segment = SealedWriter::create(Arc::clone(disk), dir, header)?;
        let mut batch = Batch::default();
        for moment in [summary.first, summary.last] {
            batch.push(&record(Op::Void, VolumeId(0), moment, Extent::default()), &[]);
        }
        let stamp = Stamp { group, lineage, epoch: summary.epoch };
        Ok(UndoWriter { segment, encoder, batch, stamp, compression, summary, old: Vec::new() })
    }

    /// Keeps what `replica` holds where the fold will change it, and returns the ranges where it really
    /// changes.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`] where the replica cannot be read, [`ErrorKind::NoSpace`] where the undo
    /// does not fit.
    pub fn keep(&mut self, replica: &Replica, fold: &Fold, scratch: &mut Vec<u8>) -> Result<Vec<Range<u64>>> {
        let volume = replica.id();
        let mut changes = Vec::new();
        fold.runs(volume, 0..u64::MAX, scratch, |run| match run {
            Run::Bytes(at, new) => {
                machine::give_way();
                let mut old = std::mem::take(&mut self.old);
                read_sparse(replica, at, new.len(), &mut old)?;
                let kept = self.keep_run(volume, at, &old, new, &mut changes);
                self.old = old;
                kept
            }
            Run::Zeros(range) => {
                let mut at = range.start;
                while let Some(data) = replica.next_data(at..range.end)? {
                    machine::give_way();
                    let end = range.end.min(data.start + MAX_RUN_BYTES);
                    let mut old = std::mem::take(&mut self.old);
                    let length = usize::try_from(end - data.start).expect("at most 1 MiB");
                    read_sparse(replica, data.start, length, &mut old)?;
                    let kept = self.keep_discarded(volume, data.start, &old, &mut changes);
                    self.old = old;
                    kept?;
                    at = end;
                }
                Ok(())
            }
        })?;
        Ok(changes)
    }

    /// Keeps what becomes zeros, in pieces as long as a record may be: zeros between two blocks are kept with
    /// them, so that the index of a discarded volume stays small, however its content was scattered.
    fn keep_discarded(
        &mut self,
        volume: VolumeId,
        at: u64,
        old: &[u8],
        changes: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let mut offset = at;
        for piece in old.chunks(MAX_PAYLOAD_BYTES) {
            let block = usize::try_from(BLOCK_BYTES).expect("4 KiB");
            let held = |block: &[u8]| !is_zero(block);
            if let Some(first) = piece.chunks(block).position(held) {
                let after = piece.chunks(block).rposition(held).map_or(0, |last| (last + 1) * block);
                let (from, to) = (first * block, after.min(piece.len()));
                let range = offset + from as u64..offset + to as u64;
                push_range(changes, range.clone());
                self.push(volume, range, Some(&piece[from..to]))?;
            }
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Keeps the blocks of one run that change.
    fn keep_run(
        &mut self,
        volume: VolumeId,
        at: u64,
        old: &[u8],
        new: &[u8],
        changes: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        #[derive(PartialEq, Clone, Copy)]
        enum Block {
            Same,
            WasZeros,
            WasBytes,
        }
        let mut open = (Block::Same, 0);
        let mut from = 0;
        while from <= old.len() {
            // Blocks are aligned in the volume, so that runs cut elsewhere compare the same way.
            let to_next = BLOCK_BYTES - (at + from as u64) % BLOCK_BYTES;
            let to = old.len().min(from + usize::try_from(to_next).expect("at most a block"));
            let block = match &old[from..to] {
                old if *old == new[from..to] => Block::Same,
                old if is_zero(old) => Block::WasZeros,
                _ => Block::WasBytes,
            };
            if block != open.0 || from == old.len() {
                let (kind, start) = open;
                if kind != Block::Same {
                    let range = at + start as u64..at + from as u64;
                    push_range(changes, range.clone());
                    let content = (kind == Block::WasBytes).then(|| &old[start..from]);
                    self.push(volume, range, content)?;
                }
                open = (block, from);
            }
            if from == old.len() {
                break;
            }
            from = to;
        }
        Ok(())
    }

    /// Adds old content; `None` for zeros. What is added must not overlap, and comes by volume and offset.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] and [`ErrorKind::Io`].
    pub(crate) fn push(&mut self, volume: VolumeId, range: Range<u64>, content: Option<&[u8]>) -> Result<()> {
        let Some(content) = content else {
            let extent = Extent { offset: range.start, len: range.end - range.start };
            self.batch.push(&record(Op::WriteZeroes, volume, self.summary.last, extent), &[]);
            return self.close_frame_beyond(FRAME_RAW_BYTES);
        };
        let mut offset = range.start;
        for chunk in content.chunks(MAX_PAYLOAD_BYTES) {
            let extent = Extent { offset, len: chunk.len() as u64 };
            self.batch.push(&record(Op::Write, volume, self.summary.last, extent), chunk);
            offset += chunk.len() as u64;
            self.close_frame_beyond(FRAME_RAW_BYTES)?;
        }
        Ok(())
    }

    fn close_frame_beyond(&mut self, raw_bytes: usize) -> Result<()> {
        if self.batch.raw().len() <= raw_bytes {
            return Ok(());
        }
        let number = Some(self.summary.number);
        let encoded = self.encoder.encode(&self.batch, &self.stamp, number, self.compression, Vec::new())?;
        let (bytes, _) = encoded.seal(self.segment.chain());
        let header = FrameHeader::parse(&bytes)?;
        self.segment.append(&bytes, &header, self.batch.raw())?;
        self.batch.clear();
        Ok(())
    }

    /// Seals the segment: content synced, renamed, directory synced. Durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] is final; after [`ErrorKind::NoSpace`] the temporary file may be removed and all
    /// tried again.
    pub fn finish(mut self) -> Result<UndoSummary> {
        self.close_frame_beyond(0)?;
        let sealed = self.segment.finish()?;
        Ok(UndoSummary { bytes: sealed.bytes, path: sealed.path, ..self.summary })
    }

    /// Makes the content durable; the segment has no name yet.
    ///
    /// # Errors
    /// As [`UndoWriter::finish`].
    pub(crate) fn seal(mut self) -> Result<journal::sealed::Sealed> {
        self.close_frame_beyond(0)?;
        Ok(self.segment.seal()?)
    }
}

fn record(op: Op, volume: VolumeId, at: Moment, extent: Extent) -> Record {
    Record { op, flags: 0, volume, lsn: at.lsn, time_ns: at.time_ns, extent }
}

/// Whether all bytes are zero; compares against itself, a byte further, which the compiler turns into a
/// memcmp.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.first().is_none_or(|first| *first == 0)
        && bytes[..bytes.len().saturating_sub(1)] == bytes[bytes.len().min(1)..]
}

/// Reads what the replica holds, without touching the disk for its holes.
fn read_sparse(replica: &Replica, at: u64, len: usize, old: &mut Vec<u8>) -> Result<()> {
    old.clear();
    old.resize(len, 0);
    let end = at + len as u64;
    let mut from = at;
    while let Some(data) = replica.next_data(from..end)? {
        let place = |offset: u64| usize::try_from(offset - at).expect("inside the run");
        replica.read(&mut old[place(data.start)..place(data.end)], data.start)?;
        from = data.end;
    }
    Ok(())
}

/// Where an old version of an extent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UndoPiece {
    /// Zeros.
    Zeros,
    /// In an undo frame.
    Bytes {
        /// Batch whose segment it is in.
        batch: u64,
        /// Frame of that segment.
        frame: u32,
        /// Where in the frame's raw payload.
        at: u32,
    },
}

impl Piece for UndoPiece {
    fn advance(&mut self, bytes: u64) {
        if let UndoPiece::Bytes { at, .. } = self {
            *at += u32::try_from(bytes).expect("a piece is no longer than its frame");
        }
    }
}

/// An undo segment opened for reading; its index is searched in place.
pub struct UndoSegment {
    summary: UndoSummary,
    file: Arc<dyn File>,
    index: SegmentIndex,
}

impl UndoSegment {
    /// Opens a sealed segment and checks its index.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming file and offset.
    pub fn open(disk: &dyn Disk, summary: &UndoSummary) -> Result<UndoSegment> {
        let path = &summary.path;
        let file = disk.open_read_own(path).map_err(|e| missing_is_corrupt("open", path, e))?;
        let index = SegmentIndex::open(disk, path).map_err(damage)?;
        Ok(UndoSegment { summary: summary.clone(), file, index })
    }

    /// Lays this batch's old content under what `map` holds already: smaller batches come first and win.
    pub fn lay_under(&self, map: &mut ExtentMap<UndoPiece>, volume: VolumeId, range: &Range<u64>) {
        for entry in self.index.extents_in(volume, range.clone()) {
            let whole = entry.offset..entry.offset.saturating_add(entry.length);
            let piece = if entry.flags & EXTENT_ZEROS != 0 {
                UndoPiece::Zeros
            } else {
                UndoPiece::Bytes { batch: self.summary.number, frame: entry.frame, at: entry.payload_at }
            };
            lay_under(map, whole, range, piece);
        }
    }

    /// Which one of its number it is: a merged one replaces the last of its batches.
    pub(crate) fn nonce(&self) -> u64 {
        self.summary.nonce
    }

    /// Reads, verifies and unpacks one frame.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming file and offset.
    pub fn read_frame(&self, frame: u32, reading: &mut FrameBuffers) -> Result<()> {
        let path = self.summary.path.display();
        let entry = self.index.frame(frame).ok_or_else(|| {
            Error::corrupt(format!("{path}: index names frame {frame}, which it does not hold"))
        })?;
        let corrupt = |what: String| Error::corrupt(format!("{path} at byte {}: {what}", entry.offset));
        if entry.bytes as usize > frame::MAX_FRAME_BYTES {
            return Err(corrupt(format!("index names a frame of {} bytes", entry.bytes)));
        }
        reading.stored.resize(entry.bytes as usize, 0);
        match read_exact_at(&*self.file, &mut reading.stored, entry.offset) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(corrupt("cut short".into())),
            other => other.map_err(|e| Error::io(format!("read {path} at byte {}", entry.offset), e))?,
        }
        let header = FrameHeader::parse(&reading.stored).map_err(|e| corrupt(e.to_string()))?;
        if header.batch != self.summary.number || header.frame_bytes() != reading.stored.len() {
            return Err(corrupt("is another frame than its index says".into()));
        }
        header.check_payload(&reading.stored).map_err(|e| corrupt(e.to_string()))?;
        reading.decoder.decode(&header, &reading.stored, &mut reading.raw).map_err(|e| corrupt(e.to_string()))
    }

    /// Memory that the index takes.
    pub fn index_bytes(&self) -> u64 {
        self.index.footer_bytes()
    }

    /// The file that damage is reported for.
    pub fn path(&self) -> &Path {
        &self.summary.path
    }
}

/// Buffers that frames are read and unpacked with, one after the other.
pub struct FrameBuffers {
    stored: Vec<u8>,
    decoder: Decoder,
    /// The last frame's raw payload.
    pub raw: Vec<u8>,
}

impl FrameBuffers {
    /// Empty ones.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the decompressor cannot be had.
    pub fn new() -> Result<FrameBuffers> {
        Ok(FrameBuffers { stored: Vec::new(), decoder: Decoder::new()?, raw: Vec::new() })
    }

    /// Part of the last frame's payload.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where an index pointed outside of it.
    pub fn slice(&self, at: u32, len: u64, file: &Path) -> Result<&[u8]> {
        let from = at as usize;
        let to = usize::try_from(len).ok().and_then(|len| from.checked_add(len));
        to.and_then(|to| self.raw.get(from..to)).ok_or_else(|| {
            Error::corrupt(format!(
                "{}: index names bytes {from}+{len} of a frame of {}",
                file.display(),
                self.raw.len()
            ))
        })
    }
}

/// Damage that a read met in bytes which were durable once is corruption, also where the journal calls it
/// malformed.
pub fn damage(error: journal::Error) -> Error {
    let error = Error::from(error);
    match error.kind {
        ErrorKind::Malformed => Error { kind: ErrorKind::Corrupt, ..error },
        _ => error,
    }
}

/// A segment that the group's state promises and the disk does not hold.
fn missing_is_corrupt(step: &str, path: &Path, source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::NotFound {
        return Error::corrupt(format!("{}: undo segment is missing", path.display()));
    }
    Error::io(format!("{step} {}", path.display()), source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_told_from_bytes() {
        assert!(is_zero(&[]) && is_zero(&[0]) && is_zero(&[0; 4096]));
        for at in [0, 1, 4094, 4095] {
            let mut bytes = [0; 4096];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
        }
        assert!(!is_zero(&[7; 64]));
    }

    #[test]
    fn file_names_hold_the_batch_number() {
        assert_eq!(file_name(7), "00000000000000000007.seg");
        assert_eq!(file_number(&file_name(u64::MAX)), Some(u64::MAX));
        assert_eq!(file_number("00000000000000000007.seg.tmp"), None);
        assert_eq!(file_number("7.seg"), None);
    }
}
