//! From the source journal to the link: where a connection starts, and the thread that reads ahead of it.
//!
//! Live frames are read back from the journal like old ones: they are in the page cache, and there is one path.
//! Every frame is verified once more as it is read; a frame that fails ends the shipping with its place.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use journal::reader::Reader;
use journal::tail::{Limit, Tail};
use journal::{Position, frame};
use tokio::sync::mpsc;

use crate::progress::Progress;
use crate::state::SourceState;

/// Frames read ahead of the link: with frames of at most 1.2 MiB a bound of 10 MiB.
pub const READ_AHEAD_FRAMES: usize = 8;

/// How long the reader sleeps at most before it looks whether its connection is still wanted.
const IDLE: Duration = Duration::from_millis(100);

/// Places the reader where the receiver's history ends.
///
/// A receiver that holds nothing, or something that is not in this history, may start at the current epoch when that
/// began with the content of every volume.
///
/// # Errors
/// In words: why only a new synchronisation joins the two histories.
pub fn choose_start(
    reader: &mut Reader,
    resume: Option<&Position>,
    state: &SourceState,
) -> std::result::Result<Position, String> {
    let why = match resume {
        Some(resume) => match reader.seek(resume) {
            Ok(()) => return Ok(*resume),
            Err(error) => format!(
                "the receiver stands at epoch {} lsn {}, which the source journal cannot continue ({error})",
                resume.epoch.number, resume.lsn
            ),
        },
        None => "the receiver holds nothing of this group".to_owned(),
    };
    let newer = resume.is_none_or(|resume| resume.epoch.number < state.epoch.number);
    if !state.epoch_is_full || !newer {
        return Err(why);
    }
    let start = Position::epoch_start(state.lineage, state.epoch, state.epoch_start);
    match reader.seek(&start) {
        Ok(()) => Ok(start),
        Err(error) => {
            Err(format!("{why}, and the start of this epoch is no longer in the source journal ({error})"))
        }
    }
}

/// Reads frames in order and hands them to the link until the link goes away or the agent stops.
///
/// # Errors
/// The journal is unreadable at a place that was written.
pub fn read_ahead(
    mut reader: Reader,
    tail: &Tail,
    progress: &Arc<Progress>,
    frames: &mpsc::Sender<Bytes>,
) -> journal::Result<()> {
    let mut buffer = Vec::with_capacity(frame::MAX_FRAME_BYTES);
    while !frames.is_closed() {
        match reader.next(&mut buffer, Limit::UpTo(tail.appended()))? {
            Some(_) => {
                if frames.blocking_send(Bytes::copy_from_slice(&buffer)).is_err() {
                    break;
                }
            }
            None => {
                if !progress.wait_beyond(&reader.position(), IDLE) {
                    break;
                }
            }
        }
    }
    Ok(())
}
