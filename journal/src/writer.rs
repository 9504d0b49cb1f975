//! The one writer of a journal: appends frames, makes them durable, rolls and drops segments.
//!
//! Synchronous and single-owned; concurrent readers learn how far they may read from [`Tail`]. The order in
//! which things become durable:
//! * *sync*: 1. fdatasync; 2. append a mark, and note the position in the control file, both unsynced: they
//!   only speak of what is durable already.
//! * *roll*: 1. the next file, with its header, durable under a spare name ([`crate::spare`]): a full disk
//!   shows here, and nothing has changed; 2. footer behind the last item, cut to exact size (where the disk
//!   does not wait for syncs: filled up to its size), fdatasync: the old segment is durable as a whole, and
//!   only the last one may ever be longer than its content; 3. the new name, durable; 4. a note of it in the
//!   control file. A cut between any two is finished or forgotten by [`Writer::open`].
//! * *drop*: 1. `oldest`, durable in the control file; 2. names go or become spares; 3. fsync of the
//!   directory.
//!
//! A failed sync is final: every later call fails with [`ErrorKind::Sync`]. A full disk is not: nothing of
//! the frame counts, and the append may be tried again.

use crate::control::TwoSlot;
use crate::frame::{FrameHeader, FrameKind, chain_seed};
use crate::index::{Closing, IndexBuilder, SegmentIndex};
use crate::io::{Disk, File};
use crate::mark::Mark;
use crate::mend::{Layout, Run};
use crate::recovery::{self, Ending, note_frame};
use crate::segment::{self, SegmentHeader, SegmentKind, SegmentSummary};
use crate::spare::{self, Unborn};
use crate::state::{CONTROL_FILE, State};
use crate::tail::{Place, Tail};
use crate::walk::SegmentFile;
use crate::writeback::Writeback;
use crate::{Error, ErrorKind, GroupId, Lsn, Position, Result, SECTOR_BYTES};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most that is filled up with marks where a segment's end is not cut off: about as much as one frame
/// left free.
const MOST_FILLED_BYTES: u64 = 2 << 20;

/// What a writer is told.
#[derive(Clone, Copy, Debug)]
pub struct WriterOptions {
    /// Whose journal it is; frames of others are refused.
    pub group: GroupId,
    /// Size at which a segment is sealed, and which is reserved for each.
    pub segment_bytes: u64,
}

/// What opening found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Where the journal ends; all of it is durable now.
    pub position: Position,
    /// The segment being written.
    pub segment: u64,
    /// Where and why a torn tail was cut, if there was one.
    pub torn: Option<(u64, String)>,
}

/// Appends to a journal directory.
pub struct Writer {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    options: WriterOptions,
    control: TwoSlot,
    state: State,
    file: Arc<dyn File>,
    header: SegmentHeader,
    index: IndexBuilder,
    /// Where the next item goes.
    offset: u64,
    position: Position,
    durable: Position,
    writeback: Writeback,
    /// Oldest first; the last is the one being written.
    segments: Vec<SegmentSummary>,
    sealed_bytes: u64,
    tail: Arc<Tail>,
    poisoned: Option<String>,
}

impl Writer {
    /// Whether `dir` holds a journal.
    ///
    /// # Errors
    /// The disk's; a directory that does not exist holds none.
    pub fn exists(disk: &dyn Disk, dir: &Path) -> Result<bool> {
        match disk.list(dir) {
            Ok(names) => Ok(names.iter().any(|name| name == CONTROL_FILE)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io(format!("list {}", dir.display()), error)),
        }
    }

    /// Starts a journal in `dir`, which is created if need be; its first frame will follow `start`. Durable
    /// on return.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where a journal exists; [`ErrorKind::Corrupt`] where segments lie without a
    /// control file.
    pub fn create(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: WriterOptions,
        start: Position,
        now_ns: u64,
    ) -> Result<Writer> {
        disk.create_dir(dir).map_err(|error| Error::io(format!("create {}", dir.display()), error))?;
        if Writer::exists(&*disk, dir)? {
            return Err(Error::new(ErrorKind::Busy, format!("{} holds a journal already", dir.display())));
        }
        clear_cut_create(&*disk, dir)?;
        let header = next_header(&options, 1, start, now_ns);
        let unborn = spare::prepare(&*disk, dir, options.segment_bytes, header)?;
        let path = spare::christen(&*disk, dir, &unborn)?;
        // The control file comes last: a journal exists when it does.
        let state = State {
            group: options.group,
            oldest_segment: 1,
            current_segment: 1,
            oldest: start,
            durable: start,
        };
        let control = TwoSlot::create(&disk, &dir.join(CONTROL_FILE), &state.encode())?;
        Ok(Writer::assemble(disk, dir, options, control, state, Vec::new(), unborn, path))
    }

    /// Opens a journal after whatever ended its last writer, and makes durable what it kept.
    ///
    /// # Errors
    /// [`ErrorKind::NotHeld`] where there is no journal; [`ErrorKind::OutOfOrder`] where it is another
    /// group's; [`ErrorKind::Corrupt`] with file and offset where durable bytes are damaged or missing.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: WriterOptions,
        now_ns: u64,
    ) -> Result<(Writer, Recovery)> {
        let (control, payload) = TwoSlot::open(&disk, &dir.join(CONTROL_FILE))?;
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, format!("{}: {what}", dir.display()));
        let state = State::decode(&payload).map_err(|error| match error.kind {
            ErrorKind::Malformed => corrupt(format!("{CONTROL_FILE}: {}", error.at)),
            _ => error,
        })?;
        if state.group != options.group {
            let at = format!("{} is the journal of group {}", dir.display(), state.group);
            return Err(Error::new(ErrorKind::OutOfOrder, at));
        }
        let present = segment::list(&*disk, dir)?;
        let last = segment::last_begun(&present, state.current_segment);
        if let Some((_, path)) = present.last().filter(|(number, _)| *number > last) {
            let at = format!("{}: offset 0: no such segment was ever begun", path.display());
            return Err(Error::new(ErrorKind::Corrupt, at));
        }
        let mut segments = Vec::new();
        for number in state.oldest_segment..last {
            let index_of = |segment: &SegmentFile| Ok(SegmentIndex::of(segment)?.summary(segment));
            let summary = open_segment(&*disk, dir, number).and_then(|segment| index_of(&segment))?;
            check_joins(segments.last().unwrap_or(&started(&state)), &summary)?;
            segments.push(summary);
        }
        let path = dir.join(segment::file_name(last));
        let tail = open_segment(&*disk, dir, last)?;
        let floor = Some(&state.durable);
        let scan = recovery::scan_tail(&tail, floor, &mut |_, _, _| Ok(()))?;
        check_joins(segments.last().unwrap_or(&started(&state)), &scan.summary)?;
        let torn = match &scan.ending {
            Ending::Corrupt(offset, what) => return Err(tail.error(ErrorKind::Corrupt, *offset, what)),
            Ending::Torn(what) => Some((scan.offset, what.clone())),
            Ending::Clean | Ending::Sealed(_) => None,
        };
        for (number, path) in present.iter().filter(|(number, _)| *number < state.oldest_segment) {
            spare::retire(&*disk, dir, *number, path)?;
        }
        spare::sync_dir(&*disk, dir)?;
        let file = disk.open(&path).map_err(|error| Error::io(format!("open {}", path.display()), error))?;
        let unborn = Unborn::existing(file.clone(), tail.header, &path);
        let position = scan.summary.end;
        let mut writer = if let Ending::Sealed(bytes) = scan.ending {
            let failed = |error| Error::io(format!("cut {} to its size", path.display()), error);
            file.set_size(bytes).map_err(failed)?;
            file.sync().map_err(|error| Error::sync(format!("sync {}", path.display()), error))?;
            segments.push(scan.summary);
            let header = next_header(&options, last + 1, position, now_ns);
            let unborn = spare::prepare(&*disk, dir, options.segment_bytes, header)?;
            let path = spare::christen(&*disk, dir, &unborn)?;
            Writer::assemble(disk, dir, options, control, state, segments, unborn, path)
        } else {
            let mut writer = Writer::assemble(disk, dir, options, control, state, segments, unborn, path);
            writer.take_up(scan)?;
            writer
        };
        writer.store_state()?;
        let segment = writer.header.number;
        Ok((writer, Recovery { position, segment, torn }))
    }

    /// Goes on behind what a scan kept. What follows is zeroed first: were a stale frame left there, a new
    /// frame that happens to equal the one before it would bring it back to life.
    fn take_up(&mut self, scan: recovery::Scan) -> Result<()> {
        let failed = |error| Error::io(format!("clear the tail of segment {}", self.header.number), error);
        let size = self.file.size().map_err(failed)?;
        self.file.punch_hole(scan.offset..size).map_err(failed)?;
        // The header's word for what was reserved, but no more than our own segments take: the file may be a
        // stranger's.
        let reserved = self.header.allocated_bytes.min(self.options.segment_bytes);
        self.file.allocate(size.max(reserved)).map_err(failed)?;
        self.position = scan.summary.end;
        self.index = scan.index;
        self.offset = scan.offset;
        self.writeback.restart(scan.offset);
        *self.active() = scan.summary;
        self.publish();
        // Frames may have been read from the page cache of a killed process: durable only after this.
        self.make_durable()
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of a writer, put together in one place")]
    fn assemble(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: WriterOptions,
        control: TwoSlot,
        state: State,
        mut segments: Vec<SegmentSummary>,
        unborn: Unborn,
        path: PathBuf,
    ) -> Writer {
        let start = unborn.header.start;
        let offset = segment::HEADER_BYTES as u64;
        let sealed_bytes = segments.iter().map(|segment| segment.bytes).sum();
        let place = Place { segment: unborn.header.number, offset };
        segments.push(SegmentSummary::empty(path, &unborn.header));
        Writer {
            disk,
            dir: dir.into(),
            options,
            control,
            state,
            file: unborn.file,
            header: unborn.header,
            index: IndexBuilder::new(false),
            offset,
            position: start,
            durable: start,
            writeback: Writeback::default(),
            segments,
            sealed_bytes,
            tail: Arc::new(Tail::new(place)),
            poisoned: None,
        }
    }

    /// Appends a whole frame whose payload has been checked. Written, not durable; readers may have it.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfOrder`] for any but the next frame of this epoch; [`ErrorKind::NoSpace`] leaves
    /// everything as it was; [`ErrorKind::Sync`] is final.
    pub fn append(&mut self, frame: &[u8], header: &FrameHeader, received_ns: u64) -> Result<()> {
        self.usable()?;
        let refuse = |what: &str| {
            Err(Error::new(ErrorKind::OutOfOrder, format!("frame lsn {}: {what}", header.first_lsn)))
        };
        if header.group != self.options.group {
            return refuse("it is another group's");
        }
        if !matches!(header.kind, FrameKind::Live | FrameKind::Sync) {
            return refuse("its kind does not belong into a journal");
        }
        header.check_follows(&self.position)?;
        assert_eq!(frame.len(), header.frame_bytes(), "a frame comes with its own header");
        if self.index.frames() > 0 && !self.fits(frame.len()) {
            self.roll(self.position, received_ns)?;
        }
        self.file.write_at(frame, self.offset).map_err(|error| self.failed("append to", error))?;
        self.index.push(self.offset, header, &[])?;
        self.offset += frame.len() as u64;
        self.position = header.position();
        let (offset, active) = (self.offset, self.active());
        if active.frames == 0 {
            active.received_first_ns = received_ns;
        }
        active.received_last_ns = received_ns;
        active.bytes = offset;
        note_frame(active, header);
        self.publish();
        // Nobody waits elsewhere, and a file that is written back keeps its appender waiting while the disk
        // finds room for it.
        if self.disk.waits() {
            self.writeback.written(&self.file, self.offset);
        }
        Ok(())
    }

    /// Makes everything appended durable; returns the durable position.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`], final.
    pub fn sync(&mut self) -> Result<Position> {
        self.usable()?;
        if self.durable != self.position {
            self.make_durable()?;
        }
        Ok(self.durable)
    }

    /// Begins a newer epoch: the next frame follows `start`. Seals the segment; durable on return.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfOrder`] where `start` is not the beginning of an epoch above what is held.
    pub fn begin_epoch(&mut self, start: Position, now_ns: u64) -> Result<()> {
        self.usable()?;
        let newer = start.epoch.number > self.position.epoch.number && start.lsn >= self.position.lsn;
        if !newer || start.chain != chain_seed(start.lineage, start.epoch) {
            let held = self.position.epoch.number;
            let at = format!(
                "epoch {} cannot begin at lsn {}: epoch {held} is held up to lsn {}",
                start.epoch.number, start.lsn, self.position.lsn
            );
            return Err(Error::new(ErrorKind::OutOfOrder, at));
        }
        self.roll(start, now_ns)
    }

    /// Drops the segments numbered below `number`, never the one being written; returns the bytes they held.
    /// Up to two files are kept as spares.
    ///
    /// # Errors
    /// The disk's; files that could not be dropped go at the next open.
    pub fn drop_before(&mut self, number: u64) -> Result<u64> {
        self.usable()?;
        let count = self.segments.iter().take_while(|held| held.sealed && held.number < number).count();
        if count == 0 {
            return Ok(0);
        }
        let oldest = &self.segments[count];
        (self.state.oldest_segment, self.state.oldest) = (oldest.number, oldest.start);
        self.store_state()?;
        let dropped: Vec<SegmentSummary> = self.segments.drain(..count).collect();
        let freed: u64 = dropped.iter().map(|segment| segment.bytes).sum();
        self.sealed_bytes -= freed;
        let retired = dropped
            .iter()
            .try_for_each(|segment| spare::retire(&*self.disk, &self.dir, segment.number, &segment.path));
        retired
            .and_then(|()| spare::sync_dir(&*self.disk, &self.dir))
            .inspect_err(|error| self.note(error))?;
        Ok(freed)
    }

    /// What a segment holds, as it is known without reading its frames; of the one being written, what is
    /// durable.
    ///
    /// # Errors
    /// [`ErrorKind::NotHeld`] for a segment that was dropped; [`ErrorKind::Corrupt`] where its footer is
    /// damaged.
    pub fn layout(&self, number: u64) -> Result<Layout> {
        let held = self.held(number)?;
        if held.sealed {
            return Layout::of_sealed(&SegmentFile::open(&*self.disk, &held.path, number)?);
        }
        let durable = self.durable.lsn;
        let frames: Vec<_> = self.index.entries().take_while(|entry| entry.last_lsn <= durable).collect();
        let end_offset =
            frames.last().map_or(segment::HEADER_BYTES as u64, |last| last.offset + u64::from(last.bytes));
        Ok(Layout { frames, end: self.durable, end_offset, received_ns: held.received_last_ns })
    }

    /// Puts frames back where they rotted. ⚠ Only the writer may: a segment that is dropped is recycled under
    /// another name.
    /// 1. Every frame is checked as the one that stood there, so nothing else is ever written; 2. they are
    ///    written in place: no other byte is touched, so whatever a crash leaves is at worst as rotten as
    ///    before, and readers that have the file open see the old bytes or the right ones, and tell them by
    ///    the CRC; 3. fdatasync; 4. they are read again.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfOrder`] and [`ErrorKind::Malformed`] for other frames; [`ErrorKind::NotHeld`] where
    /// the segment was dropped; [`ErrorKind::Corrupt`] where the disk does not give back what was written;
    /// [`ErrorKind::Sync`], final, only in the segment being written.
    pub fn mend(&mut self, run: &Run, frames: &[Vec<u8>]) -> Result<()> {
        run.check_all(frames)?;
        let pieces: Vec<(u64, &[u8])> =
            run.frames.iter().zip(frames).map(|(entry, frame)| (entry.offset, frame.as_slice())).collect();
        self.put_back(run.segment, run.nonce, &pieces)
    }

    /// Writes a mark again where it rotted; as [`mend`](Self::mend).
    ///
    /// # Errors
    /// As [`mend`](Self::mend).
    pub fn mend_mark(&mut self, mark: &Mark) -> Result<()> {
        self.put_back(mark.segment, mark.nonce, &[(mark.offset, &mark.encode())])
    }

    fn put_back(&mut self, number: u64, nonce: u64, pieces: &[(u64, &[u8])]) -> Result<()> {
        self.usable()?;
        let (is_active, path) = (!self.held(number)?.sealed, self.held(number)?.path.clone());
        let failed = |error| Error::io(format!("mend {}", path.display()), error);
        let file = if is_active { self.file.clone() } else { self.disk.open(&path).map_err(failed)? };
        let segment = SegmentFile::new(file.clone(), &path, number)?;
        if segment.header.nonce != nonce {
            return Err(segment.error(ErrorKind::NotHeld, 0, "another segment by now"));
        }
        for (offset, bytes) in pieces {
            file.write_at(bytes, *offset).map_err(failed)?;
        }
        match is_active {
            true => self.sync_file()?,
            // Nothing else in it waits for this sync: what is not mended stays damaged.
            false => file.sync().map_err(failed)?,
        }
        for (offset, bytes) in pieces {
            let mut again = vec![0; bytes.len()];
            segment.read(&mut again, *offset)?;
            if again != *bytes {
                return Err(segment.error(
                    ErrorKind::Corrupt,
                    *offset,
                    "the disk gives back other bytes than were written",
                ));
            }
        }
        Ok(())
    }

    fn held(&self, number: u64) -> Result<&SegmentSummary> {
        self.segments.iter().find(|held| held.number == number).ok_or_else(|| {
            Error::new(ErrorKind::NotHeld, format!("{}: segment {number} is not held", self.dir.display()))
        })
    }

    /// Up to here everything is appended.
    pub fn appended(&self) -> Position {
        self.position
    }

    /// Up to here everything is durable.
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// Position before the oldest frame held.
    pub fn oldest(&self) -> Position {
        self.state.oldest
    }

    /// Oldest first; the last is the one being written.
    pub fn segments(&self) -> &[SegmentSummary] {
        &self.segments
    }

    /// Bytes in use by all segments.
    pub fn journal_bytes(&self) -> u64 {
        self.sealed_bytes + self.offset
    }

    /// What readers go by.
    pub fn shared(&self) -> Arc<Tail> {
        self.tail.clone()
    }

    fn active(&mut self) -> &mut SegmentSummary {
        self.segments.last_mut().expect("there is always a segment being written")
    }

    /// Whether frame, mark and footer still go into this segment.
    fn fits(&self, frame_bytes: usize) -> bool {
        let more = frame_bytes + SECTOR_BYTES + self.index.footer_bytes() + SECTOR_BYTES;
        self.offset + more as u64 <= self.options.segment_bytes
    }

    fn publish(&self) {
        self.tail.set_appended(Place { segment: self.header.number, offset: self.offset });
    }

    fn usable(&self) -> Result<()> {
        match &self.poisoned {
            None => Ok(()),
            Some(what) => {
                Err(Error::new(ErrorKind::Sync, format!("{}: stopped after: {what}", self.dir.display())))
            }
        }
    }

    /// Remembers a failed sync for ever.
    fn note(&mut self, error: &Error) {
        if error.kind == ErrorKind::Sync {
            self.poisoned.get_or_insert_with(|| error.at.clone());
        }
    }

    fn failed(&self, doing: &str, error: std::io::Error) -> Error {
        let file = segment::file_name(self.header.number);
        Error::io(format!("{doing} {}: offset {}", self.dir.join(file).display(), self.offset), error)
    }

    fn sync_file(&mut self) -> Result<()> {
        let synced =
            self.file.sync().map_err(|error| Error { kind: ErrorKind::Sync, ..self.failed("sync", error) });
        synced.inspect_err(|error| self.note(error))
    }

    fn make_durable(&mut self) -> Result<()> {
        self.sync_file()?;
        self.durable = self.position;
        self.tail.set_durable(Place { segment: self.header.number, offset: self.offset });
        self.writeback.restart(self.offset);
        let mark = self.mark(self.offset);
        // A mark is evidence, not a promise: without room for it the frames are as durable as with it.
        if self.file.write_at(&mark.encode(), self.offset).is_ok() {
            self.offset += SECTOR_BYTES as u64;
            self.active().bytes += SECTOR_BYTES as u64;
            self.publish();
        }
        self.note_state();
        Ok(())
    }

    fn mark(&self, offset: u64) -> Mark {
        Mark {
            segment: self.header.number,
            offset,
            nonce: self.header.nonce,
            received_ns: self.segments.last().map_or(0, |segment| segment.received_last_ns),
            durable: self.durable,
        }
    }

    /// Tells the control file what is durable, without a sync. Evidence, as a mark is; where a file's end or
    /// a whole segment is lost, this is what tells.
    fn note_state(&mut self) {
        self.refresh_state();
        let _ = self.control.note(&self.state.encode());
    }

    fn refresh_state(&mut self) {
        self.state.current_segment = self.header.number;
        self.state.durable = self.durable;
    }

    fn store_state(&mut self) -> Result<()> {
        self.refresh_state();
        let stored = self.control.store(&self.state.encode());
        stored.inspect_err(|error| self.note(error))
    }

    fn roll(&mut self, start: Position, now_ns: u64) -> Result<()> {
        let header = next_header(&self.options, self.header.number + 1, start, now_ns);
        let unborn = spare::prepare(&*self.disk, &self.dir, self.options.segment_bytes, header)
            .inspect_err(|error| self.note(error))?;
        if !self.disk.waits() {
            self.fill_up()?;
        }
        let footer_at = self.offset;
        let closing = Closing {
            end: self.position,
            received_first_ns: self.active().received_first_ns,
            received_last_ns: self.active().received_last_ns,
        };
        let footer = self.index.finish(&self.header, footer_at, &closing)?;
        let sealed_bytes = footer_at + footer.len() as u64;
        self.file.write_at(&footer, footer_at).map_err(|error| self.failed("seal", error))?;
        if self.file.size().map_err(|error| self.failed("measure", error))? != sealed_bytes {
            self.file.set_size(sealed_bytes).map_err(|error| self.failed("cut", error))?;
        }
        self.sync_file()?;
        // From here on the old segment takes no more frames: whatever fails now is final for this writer.
        self.finish_roll(unborn, sealed_bytes).inspect_err(|error| {
            self.poisoned.get_or_insert_with(|| error.at.clone());
        })
    }

    /// Marks up to where the footer's end is the file's: cutting it would give blocks back, and a busy disk
    /// that discards them at once keeps its caller waiting (measured: 1.7 s, in which a ring overflows). A
    /// segment that is far from full is cut.
    fn fill_up(&mut self) -> Result<()> {
        // A mark says that what is before it is durable.
        self.sync()?;
        let size = self.file.size().map_err(|error| self.failed("measure", error))?;
        let room = size.saturating_sub(self.offset + self.index.footer_bytes() as u64);
        if room > MOST_FILLED_BYTES {
            return Ok(());
        }
        let marks: Vec<u8> = (0..room / SECTOR_BYTES as u64)
            .flat_map(|sector| self.mark(self.offset + sector * SECTOR_BYTES as u64).encode())
            .collect();
        if self.file.write_at(&marks, self.offset).is_err() {
            // A part of them would say of frames that come here later that they were durable.
            return self.file.set_size(self.offset).map_err(|error| self.failed("cut", error));
        }
        self.offset += marks.len() as u64;
        Ok(())
    }

    fn finish_roll(&mut self, unborn: Unborn, sealed_bytes: u64) -> Result<()> {
        let path = spare::christen(&*self.disk, &self.dir, &unborn)?;
        let active = self.active();
        (active.bytes, active.sealed) = (sealed_bytes, true);
        self.sealed_bytes += sealed_bytes;
        self.segments.push(SegmentSummary::empty(path, &unborn.header));
        self.position = unborn.header.start;
        self.durable = unborn.header.start;
        self.offset = segment::HEADER_BYTES as u64;
        self.writeback.restart(self.offset);
        self.index = IndexBuilder::new(false);
        (self.file, self.header) = (unborn.file, unborn.header);
        self.note_state();
        self.publish();
        self.tail.set_durable(Place { segment: self.header.number, offset: self.offset });
        Ok(())
    }
}

fn next_header(options: &WriterOptions, number: u64, start: Position, now_ns: u64) -> SegmentHeader {
    SegmentHeader {
        kind: SegmentKind::Journal,
        flags: 0,
        group: options.group,
        number,
        first_lsn: Lsn::ZERO,
        last_lsn: Lsn::ZERO,
        start,
        received_ns: now_ns,
        allocated_bytes: 0,
        nonce: 0,
        merged_from: 0,
    }
}

/// A create that was cut leaves one segment without frames. Anything more without a control file is damage.
fn clear_cut_create(disk: &dyn Disk, dir: &Path) -> Result<()> {
    for (number, path) in segment::list(disk, dir)? {
        let begun = SegmentFile::open(disk, &path, number);
        let empty = begun.and_then(|segment| segment.peek(segment::HEADER_BYTES as u64));
        if number != 1 || !matches!(empty, Ok(crate::walk::Item::End)) {
            let at = format!("{}: a segment without {CONTROL_FILE}", path.display());
            return Err(Error::new(ErrorKind::Corrupt, at));
        }
        disk.remove(&path).map_err(|error| Error::io(format!("remove {}", path.display()), error))?;
        spare::sync_dir(disk, dir)?;
    }
    Ok(())
}

/// Opens a segment that must be there.
fn open_segment(disk: &dyn Disk, dir: &Path, number: u64) -> Result<SegmentFile> {
    let path = dir.join(segment::file_name(number));
    SegmentFile::open(disk, &path, number).map_err(|error| match error.kind {
        ErrorKind::NotHeld => {
            Error::new(ErrorKind::Corrupt, format!("{}: offset 0: the file is missing", path.display()))
        }
        _ => error,
    })
}

/// What the oldest segment must join.
fn started(state: &State) -> SegmentSummary {
    let header = next_header(&WriterOptions { group: state.group, segment_bytes: 0 }, 0, state.oldest, 0);
    SegmentSummary::empty(PathBuf::new(), &header)
}

/// Checks that a segment begins where the one before it ends, or with a newer epoch.
pub(crate) fn check_joins(before: &SegmentSummary, segment: &SegmentSummary) -> Result<()> {
    let (held, start) = (&before.end, &segment.start);
    let newer = start.epoch.number > held.epoch.number && start.lsn >= held.lsn;
    if start == held || newer && start.chain == chain_seed(start.lineage, start.epoch) {
        return Ok(());
    }
    let at = format!("{}: offset 0: does not join segment {}", segment.path.display(), before.number);
    Err(Error::new(ErrorKind::Corrupt, at))
}
