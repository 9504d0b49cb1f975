//! From the source journal to the link: where a connection starts, and the thread that reads ahead of it.
//!
//! Live frames are read back from the journal like old ones: they are in the page cache, and there is one
//! path. Every frame is verified once more as it is read; a frame that fails ends the shipping with its
//! place.

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
/// A receiver that holds nothing, or something that is not in this history, may start at the current epoch
/// when that began with the content of every volume.
///
/// # Errors
/// Why only a new synchronisation joins the two histories, or why the journal cannot be read just now.
pub fn choose_start(
    reader: &mut Reader,
    resume: Option<&Position>,
    state: &SourceState,
) -> std::result::Result<Position, Unjoined> {
    let why = match resume {
        Some(resume) => match reader.seek(resume) {
            Ok(()) => return Ok(*resume),
            Err(error) if is_transient(&error) => return Err(Unjoined::Transient(error.to_string())),
            Err(error) => format!(
                "the receiver stands at epoch {} lsn {}, which the source journal cannot continue ({error})",
                resume.epoch.number, resume.lsn
            ),
        },
        None => "the receiver holds nothing of this group".to_owned(),
    };
    // An epoch that starts below what the receiver holds would be refused there: it must begin above both.
    let newer = resume
        .is_none_or(|resume| resume.epoch.number < state.epoch.number && resume.lsn <= state.epoch_start);
    if !state.epoch_is_full || !newer {
        return Err(Unjoined::Apart(why));
    }
    let start = Position::epoch_start(state.lineage, state.epoch, state.epoch_start);
    match reader.seek(&start) {
        Ok(()) => Ok(start),
        Err(error) if is_transient(&error) => Err(Unjoined::Transient(error.to_string())),
        Err(error) => {
            let at =
                format!("{why}, and the start of this epoch is no longer in the source journal ({error})");
            Err(Unjoined::Apart(at))
        }
    }
}

/// Why shipping cannot start.
#[derive(Debug, PartialEq, Eq)]
pub enum Unjoined {
    /// The histories do not join: a synchronisation is needed.
    Apart(String),
    /// The journal could not be read this time.
    Transient(String),
}

/// Errors of the moment (descriptors, a disk that answers again), which say nothing about the histories.
pub fn is_transient(error: &journal::Error) -> bool {
    use journal::ErrorKind::{Corrupt, Malformed, NotHeld, OutOfOrder, Unsupported};
    !matches!(error.kind, Corrupt | Malformed | NotHeld | OutOfOrder | Unsupported)
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
                if !hand_over(frames, Bytes::copy_from_slice(&buffer)) {
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

/// Waits for room; false when nobody takes frames any more.
fn hand_over(frames: &mpsc::Sender<Bytes>, frame: Bytes) -> bool {
    let attempt = || match frames.try_send(frame.clone()) {
        Ok(()) => Some(true),
        Err(mpsc::error::TrySendError::Full(_)) => None,
        Err(mpsc::error::TrySendError::Closed(_)) => Some(false),
    };
    machine::block(attempt, || frames.blocking_send(frame.clone()).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateFile;
    use journal::io::{Disk, RealDisk};
    use journal::writer::{Writer, WriterOptions};
    use journal::{Epoch, EpochId, Lsn};

    #[test]
    fn a_receiver_beyond_the_start_of_the_epoch_is_apart() {
        let dir = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let mut file = StateFile::open(&disk, dir.path()).unwrap();
        file.begin_epoch(Some(Lsn::ZERO), true).unwrap();
        file.begin_epoch(Some(Lsn(500)), true).unwrap();
        let state = file.get();
        let start = Position::epoch_start(state.lineage, state.epoch, state.epoch_start);
        let options = WriterOptions { group: state.group, segment_bytes: 4 << 20 };
        let journal = dir.path().join("journal");
        drop(Writer::create(disk.clone(), &journal, options, start, 0).unwrap());
        let mut reader = Reader::open(disk, &journal).unwrap();
        let old = Epoch { number: 1, id: EpochId([9; 16]) };
        let mut resume = |lsn| {
            let held = Position { lineage: state.lineage, epoch: old, lsn: Lsn(lsn), chain: 0 };
            choose_start(&mut reader, Some(&held), state)
        };
        assert_eq!(resume(500), Ok(start), "everything is sent again, above what it holds");
        assert!(
            matches!(resume(1000), Err(Unjoined::Apart(_))),
            "rolled back: only a newer epoch above both helps"
        );
        assert_eq!(choose_start(&mut reader, None, state), Ok(start));
    }
}
