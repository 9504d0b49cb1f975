//! Re-fetch: a frame that rotted at the receiver is asked for again at the source, which keeps acknowledged
//! frames until it needs their room.
//!
//! On a bidi stream of its own, opened by the *receiver*, one question after the other:
//! [`Message::FrameRequest`] names a position and the last lsn of the frame that follows it. Answered by the
//! frame, in [`Message::FramePart`]s since a frame is longer than a message, or by [`Message::Error`]:
//! `NotPossible` where the source does not hold that frame, and never will again; anything else where it may
//! work later. The receiver asks only where the source offers [`FEATURE`] in its hello.
//!
//! Limits: one frame a question and one question at a time; the answer is no longer than the receiver said it
//! knows the frame to be; the receiver pauses for [`ASK_PAUSE`] after each answer, and the source for
//! [`ANSWER_PAUSE`], whatever the other one does: 12 MiB and ten look-ups a second at most.

use std::time::Duration;

use journal::frame::MAX_FRAME_BYTES;

use crate::error::{Error, ErrorKind, Result};
use crate::framing::{ControlReceiver, ControlSender};
use crate::message::{ErrorCode, Message, Position};

/// Bit of `features` in `Hello`: this source serves frames again.
pub const FEATURE: u64 = 4;
/// Between an answer and the next question.
pub const ASK_PAUSE: Duration = Duration::from_millis(100);
/// Between an answer and the reading of the next question.
pub const ANSWER_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of a frame in one message.
const PART_BYTES: usize = 60 << 10;

/// What the source said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The frame's bytes, not checked.
    Frame(Vec<u8>),
    /// It does not hold it any more, and why.
    Gone(String),
    /// It cannot tell now, and why.
    Later(String),
}

/// Sends a frame in parts, at the source.
///
/// # Errors
/// As [`ControlSender::send`].
pub async fn send_frame(sender: &mut ControlSender, frame: &[u8]) -> Result<()> {
    let mut left = frame.len();
    for part in frame.chunks(PART_BYTES) {
        left -= part.len();
        let left_bytes = u32::try_from(left)
            .map_err(|_| Error::new(ErrorKind::TooLong, "a frame that is longer than a frame may be"))?;
        sender.send(&Message::FramePart { left_bytes, bytes: part.to_vec() }).await?;
    }
    Ok(())
}

/// Asks for the frame behind `after` that ends at `last_lsn` and is `bytes` long, at the receiver.
///
/// # Errors
/// [`ErrorKind::Malformed`] where the answer is none, or is longer; those of the connection.
pub async fn ask(
    sender: &mut ControlSender,
    receiver: &mut ControlReceiver,
    after: Position,
    last_lsn: u64,
    bytes: usize,
) -> Result<Answer> {
    assert!(bytes <= MAX_FRAME_BYTES, "the journal bounds a frame");
    let malformed =
        |what: &str| Error::new(ErrorKind::Malformed, format!("answer to a question for a frame: {what}"));
    sender.send(&Message::FrameRequest { after, last_lsn }).await?;
    let mut frame = Vec::new();
    loop {
        match receiver.next().await? {
            Some(Message::FramePart { left_bytes, bytes: part }) => {
                let whole = frame.len() + part.len() + left_bytes as usize;
                if part.is_empty() || whole != bytes {
                    return Err(malformed("parts of another length"));
                }
                frame.extend_from_slice(&part);
                if left_bytes == 0 {
                    return Ok(Answer::Frame(frame));
                }
            }
            Some(Message::Error { code: ErrorCode::NotPossible, reason }) if frame.is_empty() => {
                return Ok(Answer::Gone(reason));
            }
            Some(Message::Error { reason, .. }) if frame.is_empty() => return Ok(Answer::Later(reason)),
            _ => return Err(malformed("something else")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framing;
    use crate::testing::pair;

    /// What the receiver makes of what a source does with its question.
    async fn answered<F>(
        bytes: usize,
        source: impl FnOnce(ControlSender, ControlReceiver) -> F,
    ) -> Result<Answer>
    where
        F: Future<Output = ControlSender>,
    {
        let pair = pair().await;
        let position = Position { lineage: [1; 16], epoch: 2, epoch_id: [3; 16], lsn: 4, chain: 5 };
        let asking = async {
            let (mut sender, mut receiver) = framing::open(&pair.receiver).await.unwrap();
            ask(&mut sender, &mut receiver, position, 6, bytes).await
        };
        let serving = async {
            let (sender, mut receiver) = framing::accept(&pair.source).await.unwrap();
            let asked = receiver.next().await.unwrap();
            assert_eq!(asked, Some(Message::FrameRequest { after: position, last_lsn: 6 }));
            source(sender, receiver).await
        };
        let (answer, _open) = tokio::join!(asking, serving);
        answer
    }

    #[tokio::test]
    async fn a_frame_passes_in_parts() {
        for bytes in [512, PART_BYTES, PART_BYTES + 512, MAX_FRAME_BYTES] {
            let frame: Vec<u8> = (0..=250).cycle().take(bytes).collect();
            let sent = frame.clone();
            let answer = answered(bytes, |mut sender, _| async move {
                send_frame(&mut sender, &sent).await.unwrap();
                sender
            });
            assert_eq!(answer.await.unwrap(), Answer::Frame(frame));
        }
    }

    #[tokio::test]
    async fn answers_of_another_length_are_refused_before_they_are_held() {
        let part = |left_bytes, bytes: usize| Message::FramePart { left_bytes, bytes: vec![7; bytes] };
        for parts in [
            vec![part(0, 511)],
            vec![part(0, 1025)],
            vec![part(u32::MAX, 1)],
            vec![part(512, 512), part(512, 512)],
            vec![part(512, 512), part(0, 513)],
            vec![part(1024, 0)],
            vec![part(512, 512), Message::Bye { reason: String::new() }],
            vec![Message::Hashes { applied_lsn: 1, hashes: Vec::new() }],
        ] {
            let told = format!("{parts:?}");
            let answer = answered(1024, |mut sender, _| async move {
                for part in parts {
                    sender.send(&part).await.unwrap();
                }
                sender
            });
            assert_eq!(
                answer.await.unwrap_err().kind,
                ErrorKind::Malformed,
                "{}",
                &told[..told.len().min(80)]
            );
        }
    }

    #[tokio::test]
    async fn a_source_says_never_or_later() {
        for (code, expected) in [
            (ErrorCode::NotPossible, Answer::Gone("r".into())),
            (ErrorCode::Internal, Answer::Later("r".into())),
        ] {
            let answer = answered(512, |mut sender, _| async move {
                sender.send(&Message::Error { code, reason: "r".into() }).await.unwrap();
                sender
            });
            assert_eq!(answer.await.unwrap(), expected);
        }
    }
}
