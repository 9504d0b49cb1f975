//! Unpacking ahead: undo frames are read, verified and unpacked on a second thread while their pieces are
//! written.
//!
//! A restore far back is bound by this work and by the writes, about half each. A few frames are in flight,
//! no more: their buffers go round.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use crate::history::History;
use crate::undo::{FrameBuffers, UndoSegment};
use crate::{Error, Result};

/// Frames unpacked and not yet written, at most 1.2 MiB each.
const AHEAD: usize = 4;

/// Visits `frames`, pairs of batch and frame, in their order, each unpacked.
///
/// # Errors
/// [`crate::ErrorKind::Corrupt`] naming file and offset, or the first error of `visit`.
pub(crate) fn unpack_ahead(
    history: &History,
    frames: &[(u64, u32)],
    mut visit: impl FnMut(usize, &UndoSegment, &FrameBuffers) -> Result<()>,
) -> Result<()> {
    let (empty_in, empty_out) = sync_channel::<FrameBuffers>(AHEAD);
    let (full_in, full_out) = sync_channel::<(Arc<UndoSegment>, FrameBuffers)>(AHEAD);
    for _ in 0..AHEAD.min(frames.len()) {
        empty_in.send(FrameBuffers::new()?).expect("its other end is in this function");
    }
    std::thread::scope(|scope| {
        let unpack = move || -> Result<()> {
            for (batch, frame) in frames {
                // Closed: the visitor failed, and says why.
                let Ok(mut buffers) = empty_out.recv() else { return Ok(()) };
                let segment = history.segment(*batch)?;
                segment.read_frame(*frame, &mut buffers)?;
                if full_in.send((segment, buffers)).is_err() {
                    return Ok(());
                }
            }
            Ok(())
        };
        let unpacking = std::thread::Builder::new()
            .name("unpack".into())
            .spawn_scoped(scope, unpack)
            .map_err(|e| Error::io("start a thread to unpack undo", e))?;
        let mut visited = Ok(());
        for (at, (segment, buffers)) in full_out.iter().enumerate() {
            visited = visit(at, &segment, &buffers);
            if visited.is_err() {
                break;
            }
            // Closed once the last frame is unpacked, or unpacking failed: what is in flight is still
            // visited.
            let _ = empty_in.send(buffers);
        }
        drop((empty_in, full_out));
        let unpacked = unpacking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        visited.and(unpacked)
    })
}
