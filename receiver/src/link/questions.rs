//! Answers a source's questions about the replica's content: hashes of its chunks ([`wire::compare`]).
//!
//! A question is answered only when the replica holds everything up to the lsn that it names, the begin of the
//! synchronisation that asks. Apply goes on meanwhile: a chunk that it writes while we read hashes to something else, and
//! is sent without need, never the other way round.
//!
//! ⚠ A rewind that is begun while we read makes the answer worthless: old content may equal the source's, and be rolled
//! forward to something else after the resume.

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
        // One at a time for a group: a source that asks and leaves, again and again, has one thread read for it.
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
        let mut chunk = vec![0; self.chunk_bytes as usize];
        let mut hashes = Vec::new();
        let end = self.offset + self.length;
        let mut at = self.offset;
        while at < end {
            let bytes = usize::try_from(chunk_bytes.min(end - at)).unwrap_or(0);
            let read = file.read_at(&mut chunk[..bytes], at)?;
            if read < bytes {
                let error = format!("it ends at byte {}", at + read as u64);
                return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, error));
            }
            hashes.extend_from_slice(&compare::hash(&self.key, &chunk[..bytes]));
            at += chunk_bytes;
        }
        Ok(hashes)
    }
}
