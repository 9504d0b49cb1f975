//! Writing a whole segment at once, with its extents indexed: how undo segments are made.
//!
//! 1. Frames into `{number}.seg.tmp`; 2. footer; 3. fdatasync; 4. rename; 5. fsync of the directory.
//!
//! A segment that has its name is therefore whole, and what is left of an unfinished one is a `.tmp` file
//! that may be removed.

use crate::frame::FrameHeader;
use crate::index::{Closing, IndexBuilder};
use crate::io::{Disk, File, random_u64};
use crate::recovery::note_frame;
use crate::segment::{self, SegmentHeader, SegmentSummary};
use crate::spare::sync_dir;
use crate::walk::SegmentFile;
use crate::{Error, Position, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Ending of the names of unfinished segments.
pub const TMP_SUFFIX: &str = ".tmp";

/// A segment being written under a temporary name.
pub struct SealedWriter {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    tmp: PathBuf,
    file: Arc<dyn File>,
    segment: SegmentFile,
    index: IndexBuilder,
    summary: SegmentSummary,
    position: Position,
    offset: u64,
}

impl SealedWriter {
    /// Starts a segment in `dir`, replacing an unfinished one of the same number. The nonce is drawn here.
    ///
    /// # Errors
    /// The disk's.
    pub fn create(disk: Arc<dyn Disk>, dir: &Path, header: SegmentHeader) -> Result<SealedWriter> {
        let path = dir.join(segment::file_name(header.number));
        let tmp = dir.join(format!("{}{TMP_SUFFIX}", segment::file_name(header.number)));
        let failed = |error| Error::io(format!("create segment {}", tmp.display()), error);
        match disk.remove(&tmp) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.map_err(failed)?,
        }
        let file = disk.create(&tmp).map_err(failed)?;
        let nonce = random_u64().map_err(failed)?;
        let header = SegmentHeader { nonce, allocated_bytes: 0, flags: 0, ..header };
        file.write_at(&header.encode(), 0).map_err(failed)?;
        let summary = SegmentSummary::empty(path, &header);
        let offset = segment::HEADER_BYTES as u64;
        let segment = SegmentFile { path: tmp.clone(), header, size: 0, file: file.clone() };
        Ok(SealedWriter {
            disk,
            dir: dir.into(),
            tmp,
            file,
            segment,
            index: IndexBuilder::new(true),
            summary,
            position: header.start,
            offset,
        })
    }

    /// The value that the next frame is sealed with.
    pub fn chain(&self) -> u64 {
        self.position.chain
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.offset
    }

    /// Appends a sealed frame; `raw` is its unpacked payload, from which the extents are taken.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfOrder`] for a frame that is not the next of this batch; the disk's.
    pub fn append(&mut self, frame: &[u8], header: &FrameHeader, raw: &[u8]) -> Result<()> {
        assert_eq!(frame.len(), header.frame_bytes(), "a frame comes with its own header");
        self.segment.check_order(self.offset, header, &self.position)?;
        self.file.write_at(frame, self.offset).map_err(|error| {
            Error::io(format!("write {}: offset {}", self.tmp.display(), self.offset), error)
        })?;
        self.index.push(self.offset, header, raw)?;
        self.position = header.position();
        note_frame(&mut self.summary, header);
        // A hint: a failure shows in the sync at the end.
        let _ = self.file.start_writeback(self.offset..self.offset + frame.len() as u64);
        self.offset += frame.len() as u64;
        Ok(())
    }

    /// Seals the segment and gives it its name; durable on return.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Malformed`] where extents overlap; [`crate::ErrorKind::Sync`] is final.
    pub fn finish(self) -> Result<SegmentSummary> {
        self.seal()?.christen()
    }

    /// Seals the segment: its content is durable on return, and it has no name yet.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn seal(mut self) -> Result<Sealed> {
        let received = self.segment.header.received_ns;
        let closing = Closing { end: self.position, received_first_ns: received, received_last_ns: received };
        let footer = self.index.finish(&self.segment.header, self.offset, &closing)?;
        let failed = |error| Error::io(format!("seal {}", self.tmp.display()), error);
        self.file.write_at(&footer, self.offset).map_err(failed)?;
        self.file.sync().map_err(|error| Error::sync(format!("sync {}", self.tmp.display()), error))?;
        self.summary.bytes = self.offset + footer.len() as u64;
        self.summary.sealed = true;
        let SealedWriter { disk, dir, tmp, summary, .. } = self;
        Ok(Sealed { disk, dir, tmp, summary })
    }
}

/// A segment that is whole and durable, under a temporary name.
pub struct Sealed {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    tmp: PathBuf,
    summary: SegmentSummary,
}

impl Sealed {
    /// Gives the segment its name, in the place of what has it; durable on return.
    ///
    /// # Errors
    /// The disk's; [`crate::ErrorKind::Sync`] is final.
    pub fn christen(self) -> Result<SegmentSummary> {
        let failed = |error| Error::io(format!("name {}", self.tmp.display()), error);
        self.disk.rename(&self.tmp, &self.summary.path).map_err(failed)?;
        sync_dir(&*self.disk, &self.dir)?;
        Ok(self.summary)
    }

    /// Removes it again; what cannot be removed is removed at the next open.
    pub fn discard(self) {
        let _ = self.disk.remove(&self.tmp);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::{Compression, Decoder, Encoder};
    use crate::frame::{Batch, Stamp};
    use crate::index::{EXTENT_ZEROS, SegmentIndex};
    use crate::record::{Op, Record};
    use crate::segment::SegmentKind;
    use crate::sim_disk::SimDisk;
    use crate::{Epoch, EpochId, ErrorKind, Extent, GroupId, Lineage, Lsn, VolumeId};

    fn header(number: u64) -> SegmentHeader {
        let epoch = Epoch { number: 1, id: EpochId([4; 16]) };
        SegmentHeader {
            kind: SegmentKind::Undo,
            flags: 0,
            group: GroupId([1; 16]),
            number,
            first_lsn: Lsn(100),
            last_lsn: Lsn(200),
            start: Position::epoch_start(Lineage([2; 16]), epoch, Lsn(99)),
            received_ns: 5,
            allocated_bytes: 0,
            nonce: 0,
            merged_from: 0,
        }
    }

    fn write(writer: &mut SealedWriter, pieces: &[(Op, u32, u64, &[u8], u64)]) -> Result<()> {
        let start = writer.segment.header.start;
        let group = writer.segment.header.group;
        let stamp = Stamp { group, lineage: start.lineage, epoch: start.epoch };
        let mut batch = Batch::default();
        for (op, volume, offset, payload, len) in pieces {
            let extent = Extent { offset: *offset, len: *len };
            let record =
                Record { op: *op, flags: 0, volume: VolumeId(*volume), lsn: Lsn(200), time_ns: 1, extent };
            batch.push(&record, payload);
        }
        let number = writer.segment.header.number;
        let encoded =
            Encoder::new()?.encode(&batch, &stamp, Some(number), Compression::Zstd(1), Vec::new())?;
        let (frame, _) = encoded.seal(writer.chain());
        let header = FrameHeader::parse(&frame)?;
        writer.append(&frame, &header, batch.raw())
    }

    fn disk() -> Arc<dyn Disk> {
        let disk = SimDisk::new();
        disk.create_dir(Path::new("/undo")).unwrap();
        Arc::new(disk)
    }

    #[test]
    fn what_was_written_is_found_by_address() {
        let disk = disk();
        let dir = Path::new("/undo");
        let mut writer = SealedWriter::create(disk.clone(), dir, header(7)).unwrap();
        write(&mut writer, &[(Op::Write, 1, 8192, &[2; 512], 512), (Op::Write, 0, 4096, &[1; 1024], 1024)])
            .unwrap();
        write(&mut writer, &[(Op::WriteZeroes, 0, 0, &[], 4096), (Op::Write, 0, 6144, &[3; 512], 512)])
            .unwrap();
        let summary = writer.finish().unwrap();
        assert_eq!((summary.frames, summary.sealed, summary.number), (2, true, 7));
        assert_eq!(disk.list(dir).unwrap(), [segment::file_name(7)]);
        let index = SegmentIndex::open(&*disk, &summary.path).unwrap();
        assert_eq!(index.file_bytes(), summary.bytes);
        let found = |volume, range| -> Vec<(u64, u64)> {
            let extents = index.extents_in(VolumeId(volume), range);
            extents.map(|extent| (extent.offset, extent.length)).collect()
        };
        assert_eq!(found(0, 0..u64::MAX), [(0, 4096), (4096, 1024), (6144, 512)]);
        assert_eq!(found(0, 4095..4097), [(0, 4096), (4096, 1024)]);
        assert_eq!(found(0, 5120..6144), []);
        assert_eq!(found(1, 8703..8704), [(8192, 512)]);
        assert_eq!(found(1, 8704..9999), []);
        assert_eq!(found(2, 0..u64::MAX), []);
        let segment = SegmentFile::open(&*disk, &summary.path, 7).unwrap();
        for extent in index.extents() {
            let entry = index.frame(extent.frame).unwrap();
            let crate::walk::Item::Frame(frame_header) = segment.peek(entry.offset).unwrap() else {
                panic!("no frame at {}", entry.offset);
            };
            let (mut frame, mut raw) = (Vec::new(), Vec::new());
            segment.read_frame(entry.offset, &frame_header, &mut frame).unwrap();
            Decoder::new().unwrap().decode(&frame_header, &frame, &mut raw).unwrap();
            if extent.flags & EXTENT_ZEROS == 0 {
                let at = extent.payload_at as usize;
                let expected = match extent.offset {
                    8192 => 2,
                    4096 => 1,
                    _ => 3,
                };
                assert!(raw[at..at + usize::try_from(extent.length).unwrap()].iter().all(|b| *b == expected));
            } else {
                assert_eq!(extent.offset, 0);
            }
        }
    }

    #[test]
    fn overlapping_extents_and_foreign_frames_are_refused() {
        let disk = disk();
        let mut writer = SealedWriter::create(disk.clone(), Path::new("/undo"), header(7)).unwrap();
        write(&mut writer, &[(Op::Write, 0, 0, &[2; 1024], 1024), (Op::Write, 0, 512, &[1; 512], 512)])
            .unwrap();
        assert_eq!(writer.finish().unwrap_err().kind, ErrorKind::Malformed);
        let mut writer = SealedWriter::create(disk, Path::new("/undo"), header(7)).unwrap();
        writer.segment.header.last_lsn = Lsn(150);
        let error = write(&mut writer, &[(Op::Write, 0, 0, &[2; 512], 512)]).unwrap_err();
        assert_eq!(error.kind, ErrorKind::OutOfOrder);
    }

    #[test]
    fn a_name_is_never_given_to_less_than_the_whole() {
        let probe = |cut: Option<u64>| -> (SimDisk, Result<SegmentSummary>) {
            let sim = SimDisk::new();
            sim.create_dir(Path::new("/undo")).unwrap();
            if let Some(cut) = cut {
                sim.cut_at(cut);
            }
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            let done = SealedWriter::create(disk, Path::new("/undo"), header(7)).and_then(|mut writer| {
                write(&mut writer, &[(Op::Write, 0, 0, &[2; 4096], 4096)])?;
                writer.finish()
            });
            (sim, done)
        };
        let (whole, done) = probe(None);
        done.unwrap();
        for cut in 0..=whole.ops() {
            let (sim, done) = probe(Some(cut));
            for seed in 0..12 {
                let after = sim.crash(seed);
                let path = Path::new("/undo").join(segment::file_name(7));
                match after.contents(&path) {
                    Some(_) => drop(SegmentIndex::open(&after, &path).unwrap()),
                    None => assert!(done.is_err(), "cut {cut} seed {seed}: finished and lost"),
                }
            }
        }
    }
}
