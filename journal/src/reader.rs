//! Reading a journal: frames in order from any held position, while a writer appends and drops, or alone.
//!
//! A reader owns nothing on disk and writes nothing. Below its [`Limit`] every byte was written whole, so a
//! failing check there is corruption – unless the segment was dropped, and its file perhaps recycled, under
//! the reader: then it is [`ErrorKind::NotHeld`]. Without a writer the journal ends where [`crate::recovery`]
//! says.
//!
//! ⚠ A seek never goes over what it did not see. Where a segment has lost its footer, frames may be missing
//! behind the last one that holds: only the footer, and a start of the next segment that joins it, prove that
//! none is.

use crate::frame::FrameHeader;
use crate::index::{FrameEntry, SegmentIndex};
use crate::io::Disk;
use crate::recovery::{self, Ending, is_damage};
use crate::segment::{self, SegmentHeader};
use crate::state::{CONTROL_FILE, State};
use crate::tail::{Limit, Place};
use crate::walk::{Item, SegmentFile};
use crate::{Error, ErrorKind, Lsn, Position, Result, SECTOR_BYTES};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A place in a journal, and the way forward from there.
pub struct Reader {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment: SegmentFile,
    offset: u64,
    /// Position before the next frame.
    position: Position,
    oldest: Position,
}

/// How often opening is tried again when segments are dropped meanwhile.
const ATTEMPTS: usize = 8;

impl Reader {
    /// Opens a journal directory at its oldest position.
    ///
    /// # Errors
    /// [`ErrorKind::NotHeld`] where there is no journal; [`ErrorKind::Corrupt`] where its oldest segment is
    /// damaged.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<Reader> {
        for _ in 0..ATTEMPTS {
            let segments = held(&*disk, dir)?;
            let (number, path) = segments.first().ok_or_else(|| {
                Error::new(ErrorKind::NotHeld, format!("{} holds no segments", dir.display()))
            })?;
            match SegmentFile::open(&*disk, path, *number) {
                Ok(segment) => {
                    let position = segment.header.start;
                    let offset = segment::HEADER_BYTES as u64;
                    return Ok(Reader { disk, dir: dir.into(), segment, offset, position, oldest: position });
                }
                Err(error) if error.kind == ErrorKind::NotHeld => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(
            ErrorKind::NotHeld,
            format!("{}: its segments are dropped faster than read", dir.display()),
        ))
    }

    /// Position before the oldest frame held when the reader was opened or last sought.
    pub fn oldest(&self) -> Position {
        self.oldest
    }

    /// Position after the last frame returned: the next frame follows it.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Where the next frame is looked for; segments below its number are no longer needed by this reader.
    pub fn place(&self) -> Place {
        Place { segment: self.segment.header.number, offset: self.offset }
    }

    /// Goes to `after`: the next frame is the one that follows it.
    ///
    /// # Errors
    /// [`ErrorKind::NotHeld`] where `after` is older than the oldest or beyond the newest;
    /// [`ErrorKind::OutOfOrder`] where it never was in this history, or is no boundary between frames of it.
    pub fn seek(&mut self, after: &Position) -> Result<()> {
        let foreign = |what: &str| {
            let (epoch, lsn) = (after.epoch.number, after.lsn);
            Error::new(
                ErrorKind::OutOfOrder,
                format!("epoch {epoch} lsn {lsn} is not in this history: {what}"),
            )
        };
        let floor = self.durable()?;
        let (segment, last) = self
            .find(|header| header.start.order() <= after.order())?
            .ok_or_else(|| self.not_held(after.lsn, "older than the oldest"))?;
        let start = segment.header.start;
        if start.order() == after.order() {
            if start != *after {
                return Err(foreign("another epoch id, lineage or chain stands there"));
            }
            self.go_to(segment, segment::HEADER_BYTES as u64, start);
            return Ok(());
        }
        let of_this_epoch = start.epoch.number == after.epoch.number;
        match self.search(&segment, last, floor, |frame| !of_this_epoch || frame.last_lsn < after.lsn)? {
            Located::Frame(offset, header) if header.position() == *after => {
                let offset = offset + header.frame_bytes() as u64;
                self.go_to(segment, offset, *after);
                Ok(())
            }
            Located::Frame(_, header) if header.last_lsn == after.lsn => {
                Err(foreign("its epoch id, lineage or chain differs"))
            }
            Located::Frame(..) => Err(foreign("no frame ends there")),
            _ if last => Err(self.not_held(after.lsn, "beyond the newest")),
            _ => Err(foreign("the epoch ended before")),
        }
    }

    /// Goes to the frame that holds `lsn`; where `lsn` lies in the gap between two epochs, to the first one
    /// after.
    ///
    /// # Errors
    /// [`ErrorKind::NotHeld`] before the oldest and beyond the newest.
    pub fn seek_lsn(&mut self, lsn: Lsn) -> Result<()> {
        let floor = self.durable()?;
        let (segment, last) = self
            .find(|header| header.start.lsn < lsn)?
            .ok_or_else(|| self.not_held(lsn, "older than the oldest"))?;
        match self.search(&segment, last, floor, |frame| frame.last_lsn < lsn)? {
            Located::Frame(offset, header) => self.go_to(segment, offset, before(&header)),
            _ if last => return Err(self.not_held(lsn, "beyond the newest")),
            Located::Sealed(offset, position) | Located::Unsealed(offset, position) => {
                self.go_to(segment, offset, position);
                self.cross()?;
            }
        }
        Ok(())
    }

    /// Goes to the first frame of an epoch above `number`, whatever is damaged below; false where there is no
    /// such segment.
    ///
    /// # Errors
    /// The disk's, and damage in a segment's header.
    pub fn seek_epoch_above(&mut self, number: u64) -> Result<bool> {
        match self.find(|header| header.start.epoch.number <= number)? {
            Some((_, true)) => Ok(false),
            Some((segment, false)) => self.enter(segment.header.number + 1).map(|()| true),
            // All of it is of newer epochs.
            None => Reader::open(self.disk.clone(), &self.dir).map(|fresh| *self = fresh).map(|()| true),
        }
    }

    /// Goes to the first frame whose last record is at or after `time_ns`; behind the last frame where none
    /// is.
    ///
    /// # Errors
    /// The disk's, and damage met on the way.
    pub fn seek_time(&mut self, time_ns: u64) -> Result<()> {
        let floor = self.durable()?;
        let segments = self.reload()?;
        for (at, (number, path)) in segments.iter().enumerate().rev() {
            let segment = match SegmentFile::open(&*self.disk, path, *number) {
                Err(error) if error.kind == ErrorKind::NotHeld => break,
                other => other?,
            };
            let begins_before = match locate(&segment, |_| false) {
                Ok(Located::Frame(_, header)) => header.first_time_ns < time_ns,
                Ok(_) => false,
                // In the way only of those who look for what is in it.
                Err(error) if is_damage(&error) => false,
                Err(error) => return Err(error),
            };
            if !begins_before && at > 0 {
                continue;
            }
            let last = at + 1 == segments.len();
            match self.search(&segment, last, floor, |frame| frame.last_time_ns < time_ns)? {
                Located::Frame(offset, header) => self.go_to(segment, offset, before(&header)),
                Located::Sealed(offset, position) | Located::Unsealed(offset, position) => {
                    self.go_to(segment, offset, position);
                    if !last {
                        self.cross()?;
                    }
                }
            }
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NotHeld,
            format!("{}: segments were dropped meanwhile", self.dir.display()),
        ))
    }

    /// The next whole frame, every byte verified, into `out`; `None` at the limit.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] with file and offset; [`ErrorKind::NotHeld`] where the segment was dropped
    /// meanwhile.
    pub fn next(&mut self, out: &mut Vec<u8>, limit: Limit) -> Result<Option<FrameHeader>> {
        loop {
            if matches!(limit, Limit::UpTo(place) if self.place() >= place) {
                return Ok(None);
            }
            match self.segment.peek(self.offset) {
                Ok(Item::Frame(header)) => match self.take(&header, out) {
                    Ok(()) => return Ok(Some(header)),
                    Err(error) => return self.ended(Some(error), limit),
                },
                Ok(Item::Mark(_)) => self.offset += SECTOR_BYTES as u64,
                Ok(Item::Footer) => match self.cross() {
                    Err(error) if error.kind == ErrorKind::NotHeld => return self.ended(None, limit),
                    other => other?,
                },
                Ok(Item::End) => return self.ended(None, limit),
                Err(error) => return self.ended(Some(error), limit),
            }
        }
    }

    fn take(&mut self, header: &FrameHeader, out: &mut Vec<u8>) -> Result<()> {
        self.segment.check_order(self.offset, header, &self.position)?;
        self.segment.read_frame(self.offset, header, out)?;
        self.offset += header.frame_bytes() as u64;
        self.position = header.position();
        Ok(())
    }

    /// No whole frame follows: why?
    fn ended(&mut self, error: Option<Error>, limit: Limit) -> Result<Option<FrameHeader>> {
        if let Some(error) = error.as_ref().filter(|error| !is_damage(error)) {
            return Err(Error::new(error.kind, error.at.clone()));
        }
        if self.dropped(&self.segment)? {
            return Err(self.not_held(self.position.lsn.next(), "its segment was dropped"));
        }
        let what = error.map_or_else(|| "nothing is there".to_owned(), |error| error.at);
        let corrupt = |offset, what: &str| Err(self.segment.error(ErrorKind::Corrupt, offset, what));
        let number = self.segment.header.number;
        let is_last = held(&*self.disk, &self.dir)?.last().is_none_or(|(last, _)| *last <= number);
        if matches!(limit, Limit::UpTo(_)) || !is_last {
            return corrupt(self.offset, &what);
        }
        let floor = read_state(&*self.disk, &self.dir)?.map(|state| state.durable);
        let again = SegmentFile::open(&*self.disk, &self.segment.path, number)?;
        let scan = recovery::scan_tail(&again, floor.as_ref(), &mut |_, _, _| Ok(()))?;
        match scan.ending {
            Ending::Corrupt(offset, what) => corrupt(offset, &what),
            // The judge holds more than this reader saw: something appended meanwhile. Come again.
            _ => Ok(None),
        }
    }

    /// Whether the segment lost its name, or the name belongs to another by now.
    fn dropped(&self, segment: &SegmentFile) -> Result<bool> {
        let header = &segment.header;
        if read_state(&*self.disk, &self.dir)?.is_some_and(|state| header.number < state.oldest_segment) {
            return Ok(true);
        }
        match SegmentFile::open(&*self.disk, &segment.path, header.number) {
            Ok(now) => Ok(now.header != *header),
            Err(error) if error.kind == ErrorKind::NotHeld => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Crosses into the next segment, which must join.
    fn cross(&mut self) -> Result<()> {
        let segment = self.open_segment(self.segment.header.number + 1)?;
        let (held, start) = (&self.position, segment.header.start);
        let newer = start.epoch.number > held.epoch.number && start.lsn >= held.lsn;
        if segment.header.group != self.segment.header.group || start != *held && !newer {
            return Err(segment.error(ErrorKind::Corrupt, 0, "does not join the segment before it"));
        }
        self.go_to(segment, segment::HEADER_BYTES as u64, start);
        Ok(())
    }

    fn open_segment(&self, number: u64) -> Result<SegmentFile> {
        SegmentFile::open(&*self.disk, &self.dir.join(segment::file_name(number)), number)
    }

    /// Goes to the start of a segment.
    fn enter(&mut self, number: u64) -> Result<()> {
        let segment = self.open_segment(number)?;
        let start = segment.header.start;
        self.go_to(segment, segment::HEADER_BYTES as u64, start);
        Ok(())
    }

    /// The first frame for which `skip` is false. Where none is, it is certain that the segment holds no more
    /// frames.
    fn search(
        &self,
        segment: &SegmentFile,
        last: bool,
        floor: Option<Position>,
        skip: impl Fn(&FrameEntry) -> bool,
    ) -> Result<Located> {
        let found = locate(segment, skip).and_then(|located| {
            located.refuse_damage(segment, last, floor.as_ref())?;
            Ok(located)
        });
        match found {
            Err(error) if is_damage(&error) && self.dropped(segment)? => {
                Err(self.not_held(segment.header.start.lsn.next(), "its segment was dropped"))
            }
            found => found,
        }
    }

    /// What the control file calls durable now: whoever walks afterwards must see as much.
    fn durable(&self) -> Result<Option<Position>> {
        Ok(read_state(&*self.disk, &self.dir)?.map(|state| state.durable))
    }

    fn go_to(&mut self, segment: SegmentFile, offset: u64, position: Position) {
        (self.segment, self.offset, self.position) = (segment, offset, position);
    }

    fn not_held(&self, lsn: Lsn, what: &str) -> Error {
        let oldest = self.oldest.lsn;
        Error::new(
            ErrorKind::NotHeld,
            format!("{}: lsn {lsn}: {what} (oldest: {oldest})", self.dir.display()),
        )
    }

    fn reload(&mut self) -> Result<Vec<(u64, PathBuf)>> {
        let fresh = Reader::open(self.disk.clone(), &self.dir)?;
        self.oldest = fresh.oldest;
        held(&*self.disk, &self.dir)
    }

    /// The last segment whose header satisfies `fits`, which holds for a first stretch of them; and whether
    /// it is the journal's last. Dropped ones count as fitting: they are older.
    fn find(&mut self, fits: impl Fn(&SegmentHeader) -> bool) -> Result<Option<(SegmentFile, bool)>> {
        let segments = self.reload()?;
        let (mut low, mut high) = (0, segments.len());
        let mut found = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let (number, path) = &segments[middle];
            match SegmentFile::open(&*self.disk, path, *number) {
                Ok(segment) if fits(&segment.header) => {
                    found = Some((segment, middle + 1 == segments.len()));
                    low = middle + 1;
                }
                Ok(_) => high = middle,
                Err(error) if error.kind == ErrorKind::NotHeld => low = middle + 1,
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// Position before a frame of the stream.
fn before(header: &FrameHeader) -> Position {
    let lsn = Lsn(header.first_lsn.0.saturating_sub(1));
    Position { lineage: header.lineage, epoch: header.epoch, lsn, chain: header.chain_in }
}

fn read_state(disk: &dyn Disk, dir: &Path) -> Result<Option<State>> {
    match crate::control::TwoSlot::read(disk, &dir.join(CONTROL_FILE)) {
        Ok(slots) => State::decode(&slots.payload).map(Some),
        Err(error) if error.kind == ErrorKind::NotHeld => Ok(None),
        Err(error) => Err(error),
    }
}

/// Segments from the oldest held on. A copy of a journal may lack the control file: then all that are there.
fn held(disk: &dyn Disk, dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let oldest = read_state(disk, dir)?.map_or(0, |state| state.oldest_segment);
    let mut segments = segment::list(disk, dir)?;
    segments.retain(|(number, _)| *number >= oldest);
    Ok(segments)
}

/// Where a search in one segment ended.
enum Located {
    /// At this frame, and its offset.
    Frame(u64, FrameHeader),
    /// Behind its last frame, where a footer begins; and the position there.
    Sealed(u64, Position),
    /// Behind the last frame that holds: no frame follows, and no footer.
    Unsealed(u64, Position),
}

impl Located {
    /// Fails where frames are missing behind the last one that holds. All but the journal's last segment were
    /// sealed; in the last one, `floor` (read before the search) and marks say what was durable.
    fn refuse_damage(&self, segment: &SegmentFile, last: bool, floor: Option<&Position>) -> Result<()> {
        let (Located::Sealed(offset, position) | Located::Unsealed(offset, position)) = self else {
            return Ok(());
        };
        let corrupt = |what: &str| Err(segment.error(ErrorKind::Corrupt, *offset, what));
        if !last {
            return match self {
                Located::Unsealed(..) => corrupt("neither a frame that follows nor the footer stands here"),
                _ => Ok(()),
            };
        }
        if floor.is_some_and(|floor| floor.order() > position.order()) {
            return corrupt("nothing that follows stands here; the control file says that more was durable");
        }
        // A writer may have gone on since the search: only a second one that stops below the mark proves
        // damage.
        let Some(mark) = recovery::highest_mark(segment, *offset)? else { return Ok(()) };
        match walk_headers(segment, |_| true)? {
            Located::Sealed(again, _) | Located::Unsealed(again, _) if again <= mark.offset => {
                corrupt("nothing that follows stands here; a mark says that more was durable")
            }
            _ => Ok(()),
        }
    }
}

/// The first frame for which `skip` is false. Where sealed the footer alone says which: damage in any other
/// frame is not in the way.
fn locate(segment: &SegmentFile, skip: impl Fn(&FrameEntry) -> bool) -> Result<Located> {
    let index = match SegmentIndex::of(segment) {
        Ok(index) => index,
        Err(error) if is_damage(&error) => return walk_headers(segment, skip),
        Err(error) => return Err(error),
    };
    let Some(entry) = index.frames().nth(index.partition(skip)) else {
        return Ok(Located::Sealed(index.offset(), index.closing().end));
    };
    let corrupt = |what: &str| segment.error(ErrorKind::Corrupt, entry.offset, what);
    match segment.peek(entry.offset) {
        Ok(Item::Frame(header)) if header.last_lsn == entry.last_lsn => {
            Ok(Located::Frame(entry.offset, header))
        }
        Ok(_) => Err(corrupt("not the frame that the footer says is there")),
        Err(error) if is_damage(&error) => Err(Error::new(ErrorKind::Corrupt, error.at)),
        Err(error) => Err(error),
    }
}

/// As [`locate`], frame by frame, where there is no footer, or none that holds.
fn walk_headers(segment: &SegmentFile, skip: impl Fn(&FrameEntry) -> bool) -> Result<Located> {
    let mut offset = segment::HEADER_BYTES as u64;
    let mut position = segment.header.start;
    loop {
        match segment.peek(offset) {
            Ok(Item::Frame(header)) if header.check_follows(&position).is_ok() => {
                if !skip(&FrameEntry::of(offset, &header)?) {
                    return Ok(Located::Frame(offset, header));
                }
                offset += header.frame_bytes() as u64;
                position = header.position();
            }
            Ok(Item::Mark(_)) => offset += SECTOR_BYTES as u64,
            Ok(Item::Footer) => return Ok(Located::Sealed(offset, position)),
            Ok(Item::Frame(_) | Item::End) => return Ok(Located::Unsealed(offset, position)),
            Err(error) if is_damage(&error) => return Ok(Located::Unsealed(offset, position)),
            Err(error) => return Err(error),
        }
    }
}
