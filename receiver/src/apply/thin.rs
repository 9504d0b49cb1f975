//! Thinning, carried out: the exact window is shortened, and what lies below it becomes coarse steps.
//!
//! Below the exact window there is no redo: a boundary there is a point, and nothing between two of them is.
//! Batches between two steps are merged into one undo segment: of each address the oldest content wins, as
//! when they are laid one after the other. Which ones is said by [`crate::thin`]. ⚠ The order, each durable
//! before the next:
//! 0. `exact` in the control file: from here on no boundary below is promised but by its name, and no redo
//!    below is used;
//! 1. the merged segment under a temporary name, synced. The old ones are still in force;
//! 2. under the shape lock, while nobody reads below its last batch: it is renamed to the place of the last
//!    of its batches, and the directory synced. From here on it stands for all of them, whatever is left of
//!    the others;
//! 3. the registry follows, and readers may come again;
//! 4. the files of the others are removed. One that a crash leaves over is passed over by readers, and
//!    removed at the next open.

use std::collections::BTreeMap;
use std::path::PathBuf;

use journal::index::EXTENT_ZEROS;

use super::Applier;
use crate::merged::build::{Stream, next_piece};
use crate::retention::{Policy, decide};
use crate::state::{Exact, undo_dir};
use crate::undo::{FrameBuffers, UndoSegment, UndoSummary, UndoWriter, file_name, read_summary};
use crate::{Error, ErrorKind, Result};

/// Bytes of the indexes of what is merged at once: they are in memory, about three times.
const MAX_INDEX_BYTES: u64 = 16 << 20;

/// A segment that is merged: the frame that was unpacked last is mostly the next one's, too.
struct Part {
    segment: UndoSegment,
    buffers: FrameBuffers,
    frame: Option<u32>,
}

impl Applier {
    /// 0. Lets the exact window begin where the policy says, if points are kept below it.
    pub(super) fn shorten_exact(&mut self, policy: &Policy) -> Result<()> {
        let state = self.store.state();
        if !policy.steps.are_kept() || state.oldest_batch == 0 {
            return Ok(());
        }
        let begins = state.exact_start().batch;
        let (batches, newest_ns, floor) = self.history.aged_exact();
        let window = Policy { quota_bytes: None, ..*policy };
        let Some(keep_from) = decide(&window, u64::MAX, &batches, &[], newest_ns, floor).keep_from else {
            return Ok(());
        };
        // ⚠ From the reservation on no pin is given out that needs redo below.
        let batch = self.history.reserve_redo(keep_from - 1);
        let stored = match self.history.boundary(batch).filter(|_| batch > begins) {
            Some(start) => {
                let mut state = self.store.state().clone();
                state.exact = Some(Exact { batch, start });
                self.store.store(state).map(|()| self.follow_state())
            }
            None => Ok(()),
        };
        self.history.end_drop();
        stored
    }

    /// Merges the next batches below the exact window, if there are some; says how many became one.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] is final; others may be tried again, and nothing has changed.
    pub fn thin(&mut self, policy: &Policy) -> Result<usize> {
        let state = self.store.state();
        if !policy.steps.are_kept() || state.exact.is_none() {
            return Ok(0);
        }
        let unmergeable = &self.unmergeable;
        let (stretches, newest_ns) = self.history.stretches(|number| unmergeable.contains(&number));
        let Some(range) = policy.steps.next(&stretches, newest_ns) else { return Ok(0) };
        let (from, number) = (stretches[range.start].from, stretches[range.end - 1].number);
        match self.merge_undo(from, number) {
            Ok(true) => Ok(range.len()),
            Ok(false) => Ok(0),
            Err(error) if matches!(error.kind, ErrorKind::Sync | ErrorKind::NoSpace) => Err(error),
            Err(error) => {
                // Which of them it was does not matter: the others find other neighbours.
                self.unmergeable.insert(number);
                Err(error)
            }
        }
    }

    /// Merges the undo of some batches; false where it must wait, or is too much.
    fn merge_undo(&mut self, from: u64, number: u64) -> Result<bool> {
        let parts = self.history.summaries(from, number);
        let (dir, owner) = (undo_dir(&self.group_dir), self.undo_owner());
        let Some(last) = parts.last().cloned() else { return Ok(false) };
        let mut streams = Vec::new();
        for part in &parts {
            match Stream::of(&*self.disk, part, MAX_INDEX_BYTES / parts.len() as u64)? {
                Some(stream) => streams.push(stream),
                None => {
                    self.unmergeable.insert(part.number);
                    return Ok(false);
                }
            }
        }
        // 1. Its content.
        let summary =
            UndoSummary { from, first: last.last, bytes: 0, path: PathBuf::new(), nonce: 0, ..last };
        let written = UndoWriter::create(&self.disk, &dir, owner, summary, &mut self.encoder)
            .and_then(|undo| copy(&*self.disk, undo, &parts, &mut streams));
        let sealed = written.inspect_err(|_| {
            // Best effort: what stays is removed at the next open.
            let _ = self.disk.remove(&dir.join(format!("{}.tmp", file_name(number))));
        })?;
        // 2. and 3. Its name, and the registry.
        let mut sealed = Some(sealed);
        let replaced = self.history.replace(from, number, || {
            if let Some(sealed) = sealed.take() {
                sealed.christen()?;
            }
            read_summary(&*self.disk, &dir, number, owner.group)
        })?;
        let Some(left) = replaced else {
            sealed.into_iter().for_each(journal::sealed::Sealed::discard);
            return Ok(false);
        };
        // 4. What it stands for.
        for number in left {
            self.remove(&dir.join(file_name(number)))?;
        }
        self.history.sweep_merged();
        Ok(true)
    }
}

/// Copies what each address held first into a new segment; durable when it returns, without its name.
fn copy(
    disk: &dyn journal::io::Disk,
    mut undo: UndoWriter<'_>,
    parts: &[UndoSummary],
    streams: &mut [Stream<'_>],
) -> Result<journal::sealed::Sealed> {
    let mut open: BTreeMap<u64, Part> = BTreeMap::new();
    while let Some(piece) = next_piece(streams)? {
        let extent = piece.extent;
        let range = extent.offset..extent.offset.saturating_add(extent.length);
        if extent.flags & EXTENT_ZEROS != 0 {
            undo.push(extent.volume, range, None)?;
            continue;
        }
        if let std::collections::btree_map::Entry::Vacant(free) = open.entry(piece.batch) {
            let of = parts.iter().find(|part| part.number == piece.batch);
            let summary =
                of.ok_or_else(|| Error::corrupt(format!("undo of batch {} is not held", piece.batch)))?;
            let segment = UndoSegment::open(disk, summary)?;
            free.insert(Part { segment, buffers: FrameBuffers::new()?, frame: None });
        }
        let Some(part) = open.get_mut(&piece.batch) else { continue };
        if part.frame != Some(extent.frame) {
            part.frame = None;
            part.segment.read_frame(extent.frame, &mut part.buffers)?;
            part.frame = Some(extent.frame);
        }
        let content = part.buffers.slice(extent.payload_at, extent.length, part.segment.path())?;
        undo.push(extent.volume, range, Some(content))?;
    }
    undo.seal()
}
