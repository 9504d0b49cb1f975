//! Past: what volumes held at a point, where later batches changed them, in folds of bounded memory.
//!
//! For rewinds, which write it over the replica. Derived from immutable segments alone (undo of the batches
//! behind a boundary, then redo up to the point) and never from the replica, which may hold any part of it
//! after a crash: whatever is asked for again is the same again.
//!
//! A volume is walked from left to right in windows of at most [`MAX_EXTENTS`] pieces, each cut into parts of
//! about [`PART_BYTES`]; a part's undo frames are unpacked once each.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use journal::VolumeId;
use journal::extent_map::ExtentMap;

use crate::fold::{Fold, Redo};
use crate::history::History;
use crate::point::Point;
use crate::undo::{FrameBuffers, UndoPiece};
use crate::view::{in_frame_order, replay};
use crate::{Error, ErrorKind, Result};

/// Pieces of undo held in memory, about 100 bytes each.
const MAX_EXTENTS: usize = 250_000;
/// Windows are not halved below this: one batch's extents in it are few enough.
const MIN_WINDOW_BYTES: u64 = 16 << 20;
/// Old content unpacked at once.
const PART_BYTES: u64 = 16 << 20;
/// Redo between a boundary and a point that is held in memory. Boundaries are one batch apart, unless undo is
/// damaged.
const MAX_REDO_BYTES: u64 = 512 << 20;

/// See the module.
pub(crate) struct Past<'a> {
    history: &'a History,
    boundary: u64,
    /// The newest batch that is undone.
    newest: u64,
    redo: Fold,
    buffers: FrameBuffers,
}

impl<'a> Past<'a> {
    /// The past at `point`, as seen from the boundary of batch `newest`. The caller keeps the point
    /// reachable.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming file and offset; [`ErrorKind::NotPossible`] where too much would have to
    /// be replayed.
    pub(crate) fn new(history: &'a History, point: Point, newest: u64) -> Result<Past<'a>> {
        let mut redo = Fold::default();
        let mut bytes = 0;
        replay(history, point.boundary_lsn, point.moment.lsn, |_, located| {
            let record = &located.record;
            if !record.op.changes_content() || record.extent.len == 0 {
                return Ok(());
            }
            let range = record.extent.offset..record.extent.offset + record.extent.len;
            let content = if located.payload.is_empty() {
                Redo::Zeros
            } else {
                bytes += located.payload.len() as u64;
                Redo::Bytes { buffer: redo.hold(Arc::new(located.payload.to_vec())), at: 0 }
            };
            redo.put(record.volume, range, content);
            if bytes > MAX_REDO_BYTES {
                let at = format!(
                    "lsn {} lies more than {MAX_REDO_BYTES} bytes above the last batch that undo leads to; choose a point \
                     nearer to lsn {}",
                    point.moment.lsn, point.boundary_lsn
                );
                return Err(Error::new(ErrorKind::NotPossible, at));
            }
            Ok(())
        })?;
        Ok(Past { history, boundary: point.boundary, newest, redo, buffers: FrameBuffers::new()? })
    }

    /// Walks what a volume of `size_bytes` held, wherever it was changed since; what it has grown by since,
    /// up to `grown_bytes`, is zeros. Each fold lies to the right of the one before.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming file and offset, or the first error of `visit`.
    pub(crate) fn folds(
        &mut self,
        volume: VolumeId,
        size_bytes: u64,
        grown_bytes: u64,
        visit: &mut dyn FnMut(&Fold) -> Result<()>,
    ) -> Result<()> {
        let (mut at, mut window_bytes) = (0, size_bytes);
        while at < size_bytes {
            let window = at..size_bytes.min(at.saturating_add(window_bytes));
            let Some(pieces) = self.lay(volume, &window)? else {
                window_bytes = ((window.end - window.start) / 2).next_multiple_of(4096);
                continue;
            };
            for part in parts(&pieces, &window) {
                let fold = self.fold(volume, &pieces, part)?;
                visit(&fold)?;
            }
            at = window.end;
            window_bytes = window_bytes.saturating_mul(2);
        }
        if size_bytes < grown_bytes {
            let mut fold = Fold::default();
            fold.put(volume, size_bytes..grown_bytes, Redo::Zeros);
            visit(&fold)?;
        }
        Ok(())
    }

    /// What the batches behind the boundary overwrote in a window; `None` where it is too much for one.
    fn lay(&self, volume: VolumeId, window: &Range<u64>) -> Result<Option<ExtentMap<UndoPiece>>> {
        let mut pieces = ExtentMap::new();
        let most = if window.end - window.start > MIN_WINDOW_BYTES { MAX_EXTENTS } else { usize::MAX };
        let all = self.history.lay_under(self.boundary, self.newest, &mut pieces, volume, window, most)?;
        Ok(all.then_some(pieces))
    }

    /// The content of one part.
    fn fold(&mut self, volume: VolumeId, pieces: &ExtentMap<UndoPiece>, part: Range<u64>) -> Result<Fold> {
        let mut inside = ExtentMap::new();
        for (extent, piece) in pieces.overlapping(part.clone()) {
            inside.insert(extent, piece);
        }
        let mut bytes = Vec::new();
        let mut places: Vec<(Range<u64>, u32)> = Vec::new();
        let mut fold = Fold::default();
        let mut open: Option<(u64, u32)> = None;
        let mut segments = BTreeMap::new();
        for (extent, piece) in in_frame_order(&inside) {
            let UndoPiece::Bytes { batch, frame, at } = piece else {
                fold.put(volume, extent, Redo::Zeros);
                continue;
            };
            let segment = match segments.entry(batch) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(free) => free.insert(self.history.segment(batch)?),
            };
            if open != Some((batch, frame)) {
                segment.read_frame(frame, &mut self.buffers)?;
                open = Some((batch, frame));
            }
            let old = self.buffers.slice(at, extent.end - extent.start, segment.path())?;
            places.push((extent, u32::try_from(bytes.len()).expect("a part is far below 4 GiB")));
            bytes.extend_from_slice(old);
        }
        let buffer = fold.hold(Arc::new(bytes));
        for (extent, at) in places {
            fold.put(volume, extent, Redo::Bytes { buffer, at });
        }
        fold.lay_over(&self.redo, volume, part);
        Ok(fold)
    }
}

/// Cuts a window where enough bytes to be unpacked have come together.
fn parts(pieces: &ExtentMap<UndoPiece>, window: &Range<u64>) -> Vec<Range<u64>> {
    let (mut parts, mut from, mut bytes) = (Vec::new(), window.start, 0);
    for (extent, piece) in pieces.iter() {
        if *piece != UndoPiece::Zeros {
            bytes += extent.end - extent.start;
        }
        if bytes >= PART_BYTES {
            parts.push(from..extent.end);
            (from, bytes) = (extent.end, 0);
        }
    }
    if from < window.end {
        parts.push(from..window.end);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_window_and_hold_bounded_content() {
        let mut pieces = ExtentMap::new();
        let piece = UndoPiece::Bytes { batch: 1, frame: 0, at: 0 };
        for at in 0..600_u64 {
            pieces.insert(at << 20..(at << 20) + (128 << 10), piece);
        }
        pieces.insert(700 << 20..900 << 20, UndoPiece::Zeros);
        let window = 0..1 << 40;
        let parts = parts(&pieces, &window);
        assert_eq!(parts.len(), 5, "75 MiB of bytes, 16 MiB each: {parts:?}");
        assert_eq!((parts[0].start, parts[4].end), (0, 1 << 40));
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
