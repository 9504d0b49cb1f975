//! View: one volume at one point, read-only, while replication goes on.
//!
//! ⚠ A read takes the replica's bytes first and asks for undo second. A batch is registered before it
//! overwrites, so whatever the replica gave that is newer than the point is covered by a batch found
//! afterwards. The other order loses: a batch registered and written between the two would be seen half.

use std::ops::Range;
use std::sync::Arc;

use journal::compress::Decoder;
use journal::extent_map::{ExtentMap, Piece};
use journal::frame::FrameHeader;
use journal::io::File;
use journal::record::{Located, Op, Records};
use journal::{Lsn, VolumeId};
use machine::Mutex;

use crate::history::{History, Pin};
use crate::point::Point;
use crate::undo::{FrameBuffers, UndoPiece, UndoSegment, damage};
use crate::{Error, ErrorKind, Result};

/// Redo extents that one view holds in memory; a view so far above the checkpoint waits for apply instead.
const MAX_REDO_EXTENTS: usize = 1 << 20;

/// Walks the redo records in `(after, until]`, in order, each frame read, verified and unpacked once.
///
/// # Errors
/// [`ErrorKind::Corrupt`] naming file and offset, or the first error of `visit`.
pub(crate) fn replay(
    history: &History,
    after: Lsn,
    until: Lsn,
    mut visit: impl FnMut(&FrameHeader, &Located<'_>) -> Result<()>,
) -> Result<()> {
    if after >= until {
        return Ok(());
    }
    let mut reader = history.reader()?;
    reader.seek_lsn(after.next()).map_err(damage)?;
    let mut decoder = Decoder::new()?;
    let (mut frame, mut raw) = (Vec::new(), Vec::new());
    loop {
        let header = reader.next(&mut frame, history.limit()).map_err(damage)?.ok_or_else(|| {
            Error::corrupt(format!("journal of group {} ends before lsn {until}", history.group()))
        })?;
        if header.first_lsn > until {
            return Ok(());
        }
        decoder.decode(&header, &frame, &mut raw).map_err(damage)?;
        for located in Records::of(&header, &raw) {
            let located = located.map_err(damage)?;
            if after < located.record.lsn && located.record.lsn <= until {
                visit(&header, &located)?;
            }
        }
        if header.last_lsn >= until {
            return Ok(());
        }
    }
}

/// Where new content lies in the journal.
#[derive(Clone, Copy, Debug)]
enum RedoPiece {
    Zeros,
    Bytes { frame: u32, at: u32 },
}

impl Piece for RedoPiece {
    fn advance(&mut self, bytes: u64) {
        if let RedoPiece::Bytes { at, .. } = self {
            *at += u32::try_from(bytes).expect("a piece is no longer than its frame");
        }
    }
}

/// The last frame that was unpacked: neighbouring reads often need it again.
struct LastFrame {
    buffers: FrameBuffers,
    undo: Option<(u64, u32)>,
}

/// One volume at one point.
pub struct View {
    history: Arc<History>,
    point: Point,
    volume: VolumeId,
    size_bytes: u64,
    replica: Arc<dyn File>,
    replica_path: std::path::PathBuf,
    redo: ExtentMap<RedoPiece>,
    redo_frames: Vec<Lsn>,
    last: Mutex<LastFrame>,
    _pin: Pin,
}

impl View {
    /// Opens a volume, by name, at a point of the history. The point stays reachable while the view lives.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where the volume does not exist at that point, or too much redo lies above
    /// the checkpoint; [`ErrorKind::Corrupt`] for damage.
    pub fn open(history: &Arc<History>, point: Point, volume: &str) -> Result<View> {
        let pin = history.pin_point(&point)?;
        let volumes = history.volumes_at(point.moment.lsn);
        let Some((id, _, size_bytes)) = volumes.iter().find(|(_, name, _)| name == volume).cloned() else {
            let names: Vec<_> = volumes.iter().map(|(_, name, _)| name.as_str()).collect();
            let at = format!("no volume {volume} at lsn {}; there: {}", point.moment.lsn, names.join(", "));
            return Err(Error::new(ErrorKind::NotPossible, at));
        };
        let (replica_path, replica) = history.replica(id)?;
        let mut redo = ExtentMap::new();
        let mut redo_frames: Vec<Lsn> = Vec::new();
        replay(history, point.boundary_lsn, point.moment.lsn, |header, located| {
            let record = &located.record;
            if record.volume != id || !record.op.changes_content() || record.extent.len == 0 {
                return Ok(());
            }
            let piece = if matches!(record.op, Op::Discard | Op::WriteZeroes) {
                RedoPiece::Zeros
            } else {
                if redo_frames.last() != Some(&header.first_lsn) {
                    redo_frames.push(header.first_lsn);
                }
                let frame = u32::try_from(redo_frames.len() - 1).expect("fewer frames than extents");
                let at = u32::try_from(located.payload_at).expect("a frame is bounded by MAX_RAW_BYTES");
                RedoPiece::Bytes { frame, at }
            };
            redo.insert(record.extent.offset..record.extent.offset + record.extent.len, piece);
            if redo.len() > MAX_REDO_EXTENTS {
                let at =
                    "too much is not applied yet below this point; wait until the receiver has caught up";
                return Err(Error::new(ErrorKind::NotPossible, at));
            }
            Ok(())
        })?;
        Ok(View {
            history: Arc::clone(history),
            point,
            volume: id,
            size_bytes,
            replica,
            replica_path,
            redo,
            redo_frames,
            last: Mutex::new(LastFrame { buffers: FrameBuffers::new()?, undo: None }),
            _pin: pin,
        })
    }

    /// Size of the volume at the point, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The point.
    pub fn point(&self) -> Point {
        self.point
    }

    /// Reads the exact content at the point; returns the bytes read, fewer only at the volume's end.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming file and offset, [`ErrorKind::ReplicaFailed`].
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let left = usize::try_from(self.size_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let buffer = &mut buffer[..wanted];
        let range = offset..offset + buffer.len() as u64;
        // First the replica …
        let got = self.replica.read_at(buffer, offset).map_err(|e| {
            Error::replica(format!("read replica {} at byte {offset}", self.replica_path.display()), e)
        })?;
        buffer[got..].fill(0);
        // … then what newer batches say that they found there.
        self.lay_undo(buffer, &range)?;
        self.lay_redo(buffer, &range)?;
        Ok(wanted)
    }

    fn lay_undo(&self, buffer: &mut [u8], range: &Range<u64>) -> Result<()> {
        let mut pieces = ExtentMap::new();
        let newest = self.history.newest_registered();
        self.history.lay_under(self.point.boundary, newest, &mut pieces, self.volume, range, usize::MAX)?;
        let mut open: Option<(u64, Arc<UndoSegment>)> = None;
        let mut last = self.last.lock().expect("nothing panics while it holds the frame");
        for (extent, piece) in in_frame_order(&pieces) {
            let target = part(buffer, range, &extent);
            let UndoPiece::Bytes { batch, frame, at } = piece else {
                target.fill(0);
                continue;
            };
            // The pieces of one batch come together.
            let segment = match open.take() {
                Some((known, segment)) if known == batch => segment,
                _ => self.history.segment(batch)?,
            };
            if last.undo != Some((batch, frame)) {
                last.undo = None;
                segment.read_frame(frame, &mut last.buffers)?;
                last.undo = Some((batch, frame));
            }
            target.copy_from_slice(last.buffers.slice(at, extent.end - extent.start, segment.path())?);
            open = Some((batch, segment));
        }
        Ok(())
    }

    fn lay_redo(&self, buffer: &mut [u8], range: &Range<u64>) -> Result<()> {
        let mut pieces: Vec<(u32, u32, Range<u64>)> = Vec::new();
        for (extent, piece) in self.redo.overlapping(range.clone()) {
            match piece {
                RedoPiece::Zeros => part(buffer, range, &extent).fill(0),
                RedoPiece::Bytes { frame, at } => pieces.push((frame, at, extent)),
            }
        }
        pieces.sort_unstable_by_key(|(frame, at, _)| (*frame, *at));
        let mut unpacked: Option<(u32, Vec<u8>)> = None;
        for (frame, at, extent) in pieces {
            if unpacked.as_ref().is_none_or(|(known, _)| *known != frame) {
                unpacked = Some((frame, self.read_redo_frame(self.redo_frames[frame as usize])?));
            }
            let (_, raw) = unpacked.as_ref().expect("just unpacked");
            let target = part(buffer, range, &extent);
            // The same frame gave this place when the view was opened, and its CRC still holds.
            target.copy_from_slice(&raw[at as usize..at as usize + target.len()]);
        }
        Ok(())
    }

    fn read_redo_frame(&self, first_lsn: Lsn) -> Result<Vec<u8>> {
        let mut reader = self.history.reader()?;
        reader.seek_lsn(first_lsn).map_err(damage)?;
        let (mut frame, mut raw) = (Vec::new(), Vec::new());
        let header = reader.next(&mut frame, self.history.limit()).map_err(damage)?;
        let header = header.filter(|header| header.first_lsn == first_lsn).ok_or_else(|| {
            Error::corrupt(format!(
                "journal of group {}: frame of lsn {first_lsn} is gone",
                self.history.group()
            ))
        })?;
        Decoder::new()?.decode(&header, &frame, &mut raw).map_err(damage)?;
        Records::check(&header, &raw).map_err(damage)?;
        Ok(raw)
    }
}

/// The pieces of a map, those of one frame together, so that each frame is unpacked once.
pub(crate) fn in_frame_order(pieces: &ExtentMap<UndoPiece>) -> Vec<(Range<u64>, UndoPiece)> {
    let mut sorted: Vec<(Range<u64>, UndoPiece)> =
        pieces.iter().map(|(range, piece)| (range, *piece)).collect();
    sorted.sort_unstable_by_key(|(range, piece)| match piece {
        UndoPiece::Zeros => (0, 0, range.start),
        UndoPiece::Bytes { batch, frame, .. } => (*batch, *frame, range.start),
    });
    sorted
}

fn part<'a>(buffer: &'a mut [u8], range: &Range<u64>, extent: &Range<u64>) -> &'a mut [u8] {
    let place = |offset: u64| usize::try_from(offset - range.start).expect("inside the buffer");
    &mut buffer[place(extent.start)..place(extent.end)]
}
