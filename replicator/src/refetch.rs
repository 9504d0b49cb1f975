//! Serves frames again that rotted at the receiver, out of the source's journal ([`wire::refetch`]).
//!
//! The question names a position: lineage, epoch and its id, lsn and chain. Only where it is in this
//! journal's own history is the frame behind it sent, verified once more as it is read, byte for byte.
//! Nothing else of the disk can be asked for. One question at a time, read on a thread of its own, and a
//! pause behind each answer: a receiver that asks and asks costs ten reads a second.

use std::path::Path;
use std::sync::Arc;

use journal::io::Disk;
use journal::reader::Reader;
use journal::tail::{Limit, Tail};
use journal::{Lsn, Position};
use quinn::Connection;
use tokio::sync::oneshot;
use wire::message::{ErrorCode, Message};
use wire::{ControlSender, framing, refetch};

use crate::ship::is_transient;

/// Answers the receiver's questions until the connection fails.
pub async fn serve(
    connection: &Connection,
    disk: &Arc<dyn Disk>,
    journal: &Path,
    tail: &Arc<Tail>,
) -> wire::Error {
    loop {
        let (mut sender, mut receiver) = match framing::accept(connection).await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        loop {
            let (after, last) = match receiver.next().await {
                Ok(Some(Message::FrameRequest { after, last_lsn })) => (Position::from(after), Lsn(last_lsn)),
                Ok(None) => break,
                Ok(Some(_)) => {
                    let at = "a question that a receiver does not ask";
                    return wire::Error::new(wire::ErrorKind::Malformed, at);
                }
                Err(error) => return error,
            };
            let found = look_up(disk, journal, tail, after, last).await;
            if let Err(error) = answer(&mut sender, found, last).await {
                return error;
            }
            tokio::time::sleep(refetch::ANSWER_PAUSE).await;
        }
    }
}

async fn answer(
    sender: &mut ControlSender,
    found: Result<Vec<u8>, (ErrorCode, String)>,
    last: Lsn,
) -> wire::Result<()> {
    match found {
        Ok(frame) => {
            tracing::info!(%last, bytes = frame.len(), "a frame rotted at the receiver and is sent again");
            refetch::send_frame(sender, &frame).await
        }
        Err((code, reason)) => {
            tracing::warn!(%last, reason, "a frame rotted at the receiver and cannot be sent again");
            sender.send(&Message::Error { code, reason }).await
        }
    }
}

/// Reads off the runtime.
async fn look_up(
    disk: &Arc<dyn Disk>,
    journal: &Path,
    tail: &Arc<Tail>,
    after: Position,
    last: Lsn,
) -> Result<Vec<u8>, (ErrorCode, String)> {
    let (disk, journal, tail) = (disk.clone(), journal.to_path_buf(), tail.clone());
    let (done, found) = oneshot::channel();
    let read = move || {
        // Whoever asked may be gone.
        let _ = done.send(frame_behind(disk, &journal, Limit::UpTo(tail.appended()), &after, last));
    };
    let internal = |reason: String| (ErrorCode::Internal, reason);
    machine::spawn("af-refetch", read).map_err(|error| internal(format!("start a thread: {error}")))?;
    found.await.map_err(|_| internal("the reading thread ended".to_owned()))?
}

/// The frame that follows `after` and ends at `last`; why there is none, for ever (`NotPossible`) or for now.
fn frame_behind(
    disk: Arc<dyn Disk>,
    journal: &Path,
    limit: Limit,
    after: &Position,
    last: Lsn,
) -> Result<Vec<u8>, (ErrorCode, String)> {
    let failed = |error: journal::Error| match is_transient(&error) {
        true => (ErrorCode::Internal, error.to_string()),
        false => (ErrorCode::NotPossible, error.to_string()),
    };
    let mut reader = Reader::open(disk, journal).map_err(failed)?;
    reader.seek(after).map_err(failed)?;
    let mut frame = Vec::new();
    match reader.next(&mut frame, limit).map_err(failed)? {
        Some(header) if header.last_lsn == last => Ok(frame),
        Some(header) => Err((
            ErrorCode::NotPossible,
            format!("the frame behind lsn {} ends at lsn {}, not {last}", after.lsn, header.last_lsn),
        )),
        None => Err((ErrorCode::NotPossible, format!("nothing is held behind lsn {}", after.lsn))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::compress::{Compression, Encoder};
    use journal::frame::{Batch, FrameHeader, Stamp};
    use journal::record::{Op, Record};
    use journal::sim_disk::SimDisk;
    use journal::writer::{Writer, WriterOptions};
    use journal::{Epoch, EpochId, Extent, GroupId, Lineage, VolumeId};

    #[test]
    fn only_the_frame_behind_a_position_of_this_history_is_found() {
        let sim = SimDisk::new();
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        let dir = Path::new("/journal");
        let (group, lineage) = (GroupId([1; 16]), Lineage([2; 16]));
        let epoch = Epoch { number: 3, id: EpochId([4; 16]) };
        let start = Position::epoch_start(lineage, epoch, Lsn(0));
        let options = WriterOptions { group, segment_bytes: 4096 };
        let mut writer = Writer::create(disk.clone(), dir, options, start, 0).unwrap();
        let mut frames: Vec<(Position, Vec<u8>, FrameHeader)> = Vec::new();
        while writer.segments().len() < 4 {
            let held = writer.appended();
            let mut batch = Batch::default();
            let extent = Extent { offset: 0, len: 512 };
            let lsn = held.lsn.next();
            batch.push(
                &Record { op: Op::Write, flags: 0, volume: VolumeId(1), lsn, time_ns: lsn.0, extent },
                &[7; 512],
            );
            let stamp = Stamp { group, lineage, epoch };
            let encoded =
                Encoder::new().unwrap().encode(&batch, &stamp, None, Compression::Off, Vec::new()).unwrap();
            let (bytes, _) = encoded.seal(held.chain);
            let header = FrameHeader::parse(&bytes).unwrap();
            writer.append(&bytes, &header, 1).unwrap();
            frames.push((held, bytes, header));
        }
        writer.sync().unwrap();
        let find = |after: &Position, last: Lsn| {
            frame_behind(disk.clone(), dir, Limit::UpTo(writer.shared().appended()), after, last)
                .map_err(|(code, _)| code)
        };
        for (held, bytes, header) in &frames {
            assert_eq!(find(held, header.last_lsn).as_ref(), Ok(bytes));
            for foreign in [
                Position { chain: held.chain ^ 1, ..*held },
                Position { lineage: Lineage([9; 16]), ..*held },
                Position { epoch: Epoch { id: EpochId([9; 16]), ..held.epoch }, ..*held },
                Position { epoch: Epoch { number: 9, ..held.epoch }, ..*held },
                Position { lsn: Lsn(1 << 40), ..*held },
            ] {
                assert_eq!(find(&foreign, header.last_lsn), Err(ErrorCode::NotPossible), "{foreign:?}");
            }
            assert_eq!(find(held, header.last_lsn.next()), Err(ErrorCode::NotPossible));
        }
        let (end, last) = (writer.appended(), writer.appended().lsn.next());
        assert_eq!(find(&end, last), Err(ErrorCode::NotPossible));
        // Rotten here as well: there is no such frame any more.
        let path = dir.join(journal::segment::file_name(1));
        sim.corrupt(&path, 512 + 200, |byte| byte ^ 1);
        assert_eq!(find(&start, frames[0].2.last_lsn), Err(ErrorCode::NotPossible));
        // Dropped for its room.
        let gone = writer.segments()[0].last_lsn;
        writer.drop_before(2).unwrap();
        let dropped = frames.iter().find(|(_, _, header)| header.last_lsn == gone).unwrap();
        let found =
            frame_behind(disk.clone(), dir, Limit::UpTo(writer.shared().appended()), &dropped.0, gone);
        assert_eq!(found.unwrap_err().0, ErrorCode::NotPossible);
    }
}
