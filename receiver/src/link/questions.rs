//! Answers a source's questions about the replica's content: hashes of its chunks ([`wire::compare`]).
//!
//! A question is answered only when the replica holds everything up to the lsn that it names, the begin of
//! the synchronisation that asks. Apply goes on meanwhile: a chunk that it writes while we read hashes to
//! something else, and is sent without need, never the other way round.
//!
//! ⚠ A rewind that is begun while we read makes the answer worthless: old content may equal the source's, and
//! be rolled forward to something else after the resume.

use journal::io::File;
use journal::{Lsn, VolumeId};
use quinn::Connection;
use wire::compare;
use wire::framing;
use wire::message::{ErrorCode, Message};

use super::session::End;
use super::{Chain, stopping};
use crate::agent::blocking;
use crate::agent::group::Group;
use crate::ingest::Refusal;

/// What was asked.
#[derive(Clone, Copy)]
struct Question {
    volume: VolumeId,
    offset: u64,
    length: u64,
    chunk_bytes: u32,
    epoch: u64,
    after: Lsn,
    key: [u8; 32],
}

/// Answers one question after the other until the connection ends.
pub(super) async fn answer(connection: &Connection, group: &Group) -> End {
    loop {
        let (mut sender, mut receiver) = match framing::accept(connection).await {
            Ok(stream) => stream,
            Err(error) => return error.into(),
        };
        loop {
            let question = match receiver.next().await {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => return error.into(),
            };
            let Some(question) = Question::of(&question) else {
                return End::Refused(Refusal::new(
                    ErrorCode::BadFrame,
                    "a question that a source does not ask",
                ));
            };
            let answer = match question.answer(group).await {
                Ok(answer) => answer,
                Err(end) => return end,
            };
            if let Err(error) = sender.send(&answer).await {
                return error.into();
            }
        }
        sender.finish().await;
    }
}

impl Question {
    fn of(message: &Message) -> Option<Question> {
        let &Message::HashRequest { volume, offset, length, chunk_bytes, epoch, after_lsn, key } = message
        else {
            return None;
        };
        let (volume, after) = (VolumeId(volume), Lsn(after_lsn));
        compare::is_sound(offset, length, chunk_bytes).then_some(Question {
            volume,
            offset,
            length,
            chunk_bytes,
            epoch,
            after,
            key,
        })
    }

    async fn answer(self, group: &Group) -> Result<Message, End> {
        let not_possible = |reason| Message::Error { code: ErrorCode::NotPossible, reason };
        let rewinds = group.progress().borrow().rewinds;
        let applied = match self.applied(group).await? {
            Ok(applied) => applied,
            Err(why) => return Ok(not_possible(why)),
        };
        // One at a time for a group: a source that asks and leaves, again and again, has one thread read for
        // it.
        let Ok(turn) = group.hashing().acquire_owned().await else { return Err(End::Refused(stopping())) };
        let file = match group.replica(self.volume) {
            Ok(file) => file,
            Err(error) => return Ok(not_possible(Chain(&error).to_string())),
        };
        let read = move || {
            let _turn = turn;
            self.hashes(&*file).map_err(|error| crate::Error::replica("read the replica", error))
        };
        Ok(match blocking("compare", read).await {
            Ok(_) if group.progress().borrow().rewinds != rewinds => {
                not_possible("the replica was rewound meanwhile".to_owned())
            }
            Ok(hashes) => Message::Hashes { applied_lsn: applied.0, hashes },
            Err(error) => not_possible(Chain(&error).to_string()),
        })
    }

    /// Waits until the replica holds what the question demands; in words why it does not get there.
    async fn applied(&self, group: &Group) -> Result<Result<Lsn, String>, End> {
        let mut progress = group.progress();
        group.apply_now(self.after);
        loop {
            {
                let now = progress.borrow_and_update();
                if let Some(stalled) = &now.stalled {
                    return Ok(Err(stalled.why().to_owned()));
                }
                let epoch = now.durable.epoch.number;
                if epoch > self.epoch {
                    return Ok(Err(format!("epoch {} is over here, {epoch} has begun", self.epoch)));
                }
                if epoch == self.epoch && now.checkpoint >= self.after {
                    return Ok(Ok(now.checkpoint));
                }
            }
            if progress.changed().await.is_err() {
                return Err(End::Refused(stopping()));
            }
        }
    }

    fn hashes(&self, file: &dyn File) -> std::io::Result<Vec<u8>> {
        let chunk_bytes = u64::from(self.chunk_bytes);
        let ends_early = |at: u64| {
            let error = format!("it ends at byte {at}");
            Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, error))
        };
        let mut chunk = vec![0; self.chunk_bytes as usize];
        let mut hasher = compare::Hasher::new(self.key);
        let mut hashes = Vec::new();
        let end = self.offset + self.length;
        let size = file.size()?;
        if size < end {
            return ends_early(size);
        }
        let mut at = self.offset;
        // The data at or behind `at`. A write that comes while we read may be missed, as in what is read.
        let mut data = at..at;
        while at < end {
            let bytes = usize::try_from(chunk_bytes.min(end - at)).unwrap_or(0);
            if data.end <= at {
                data = file.next_data(at)?.unwrap_or(u64::MAX..u64::MAX);
            }
            if data.start >= at + bytes as u64 {
                hashes.extend_from_slice(&hasher.zeros(bytes));
            } else {
                let read = file.read_at(&mut chunk[..bytes], at)?;
                if read < bytes {
                    return ends_early(at + read as u64);
                }
                hashes.extend_from_slice(&hasher.hash(&chunk[..bytes]));
            }
            at += chunk_bytes;
        }
        Ok(hashes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::io::{Disk, RealDisk};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Sums what is read.
    struct Counting(Arc<dyn File>, AtomicU64);

    impl File for Counting {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
            self.1.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            self.0.read_at(buffer, offset)
        }
        fn write_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
            self.0.write_at(bytes, offset)
        }
        fn sync(&self) -> std::io::Result<()> {
            self.0.sync()
        }
        fn size(&self) -> std::io::Result<u64> {
            self.0.size()
        }
        fn set_size(&self, bytes: u64) -> std::io::Result<()> {
            self.0.set_size(bytes)
        }
        fn allocate(&self, bytes: u64) -> std::io::Result<()> {
            self.0.allocate(bytes)
        }
        fn punch_hole(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
            self.0.punch_hole(range)
        }
        fn next_data(&self, offset: u64) -> std::io::Result<Option<std::ops::Range<u64>>> {
            self.0.next_data(offset)
        }
        fn start_writeback(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
            self.0.start_writeback(range)
        }
    }

    /// 64 GiB with 2 MiB of content: answered by content, not by size; and no hash differs from what reading
    /// gives.
    #[test]
    fn holes_are_not_read_and_hash_as_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let file = RealDisk.create(&dir.path().join("v.img")).unwrap();
        let size = 64 << 30;
        file.set_size(size).unwrap();
        for at in [0, size - (1 << 20)] {
            file.write_at(&vec![7; 1 << 20], at).unwrap();
        }
        let counting = Counting(file.clone(), AtomicU64::new(0));
        let question = |offset, length, chunk_bytes| Question {
            volume: VolumeId(0),
            offset,
            length,
            chunk_bytes,
            epoch: 1,
            after: Lsn(0),
            key: [9; 32],
        };
        let mut data = 0;
        for offset in (0..size).step_by(1 << 30) {
            let hashes = question(offset, 1 << 30, 1 << 20).hashes(&counting).unwrap();
            let zeros = compare::Hasher::new([9; 32]).zeros(1 << 20);
            data += hashes.chunks(compare::HASH_BYTES).filter(|hash| **hash != zeros).count();
        }
        assert_eq!(data, 2);
        assert!(
            counting.1.load(Ordering::Relaxed) <= 8 << 20,
            "{} bytes read",
            counting.1.load(Ordering::Relaxed)
        );
        // Around the end of the data, in small chunks, and cut by the volume's end.
        for (offset, length) in [((1 << 20) - 8192, 16384), (size - (1 << 20) - 4096, (1 << 20) + 4096)] {
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            file.read_at(&mut bytes, offset).unwrap();
            let read: Vec<u8> = bytes.chunks(4096).flat_map(|chunk| compare::hash(&[9; 32], chunk)).collect();
            assert_eq!(question(offset, length, 4096).hashes(&counting).unwrap(), read);
        }
        assert!(question(size - 4096, 8192, 4096).hashes(&counting).is_err(), "it ends before");
    }
}
