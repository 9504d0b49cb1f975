//! The control stream: messages with their length before them.
//!
//! ```text
//! 0               4
//! │ length, u32 LE │ message …        1 ≤ length ≤ 64 KiB
//! ```
//! [`Decoder`] holds no socket; [`ControlReceiver`] and [`ControlSender`] stand around it on a QUIC stream.

use quinn::{Connection, RecvStream, SendStream};

use crate::error::{Error, ErrorKind, Result};
use crate::message::{MAX_MESSAGE_BYTES, Message};

const LENGTH_BYTES: usize = 4;
/// Bytes taken from the stream at once. With [`MAX_MESSAGE_BYTES`] this bounds the decoder's memory.
const READ_BYTES: usize = 16 << 10;
/// The control stream goes before frames: a heartbeat behind a window of frames would tell the wrong time.
const PRIORITY: i32 = 1;

/// Messages out of bytes as they come, in pieces of any size.
///
/// Invariant: it never holds more than it was given, and a length is judged before anything waits for it.
/// After an error the stream has no known place any more, so every later call gives an error too.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    broken: bool,
}

impl Decoder {
    /// Adds bytes. Take messages with [`next`](Self::next) until there is none before adding more.
    pub fn push(&mut self, bytes: &[u8]) {
        if !self.broken {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next whole message; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`]: drop the connection.
    #[expect(clippy::should_implement_trait, reason = "fallible, and an end is not the end")]
    pub fn next(&mut self) -> Result<Option<Message>> {
        if self.broken {
            return Err(Error::new(
                ErrorKind::Malformed,
                "control stream is broken since an earlier message",
            ));
        }
        let message = self.take();
        if message.is_err() {
            self.broken = true;
            self.buffer = Vec::new();
        }
        message
    }

    /// Whether a message has begun and not ended.
    pub fn is_midway(&self) -> bool {
        !self.buffer.is_empty()
    }

    fn take(&mut self) -> Result<Option<Message>> {
        let Some((length, rest)) = self.buffer.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 || length > MAX_MESSAGE_BYTES {
            let at = format!("control message of {length} bytes, 1 to {MAX_MESSAGE_BYTES} are allowed");
            return Err(Error::new(ErrorKind::Malformed, at));
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message = Message::decode(body)?;
        self.buffer.drain(..LENGTH_BYTES + length);
        Ok(Some(message))
    }
}

/// The message with its length before it.
pub(crate) fn framed(message: &Message) -> Result<Vec<u8>> {
    let body = message.encode()?;
    let length = u32::try_from(body.len()).expect("invariant: encode bounds a message");
    Ok([&length.to_le_bytes()[..], &body].concat())
}

/// Sends messages.
#[derive(Debug)]
pub struct ControlSender {
    stream: SendStream,
}

/// Receives messages.
#[derive(Debug)]
pub struct ControlReceiver {
    stream: RecvStream,
    decoder: Decoder,
}

/// Opens the control stream, at the source. The receiver learns of it with the first message sent.
///
/// # Errors
/// As [`Error::connection`] tells.
pub async fn open(connection: &Connection) -> Result<(ControlSender, ControlReceiver)> {
    ends(connection.open_bi().await.map_err(|e| Error::connection("open the control stream", e))?)
}

/// Accepts the control stream, at the receiver.
///
/// # Errors
/// As [`Error::connection`] tells.
pub async fn accept(connection: &Connection) -> Result<(ControlSender, ControlReceiver)> {
    ends(connection.accept_bi().await.map_err(|e| Error::connection("accept the control stream", e))?)
}

fn ends((send, stream): (SendStream, RecvStream)) -> Result<(ControlSender, ControlReceiver)> {
    send.set_priority(PRIORITY).map_err(|e| Error::because(ErrorKind::Lost, "open the control stream", e))?;
    Ok((ControlSender { stream: send }, ControlReceiver { stream, decoder: Decoder::default() }))
}

impl ControlSender {
    /// Hands a message to QUIC. Not cancel-safe: half a message would be sent; give it a task of its own or
    /// wait for it.
    ///
    /// # Errors
    /// [`ErrorKind::TooLong`], and those of [`Error::connection`].
    pub async fn send(&mut self, message: &Message) -> Result<()> {
        let bytes = framed(message)?;
        self.stream.write_all(&bytes).await.map_err(|e| Error::writing("send on the control stream", e))
    }

    /// Says that no more messages come, and waits until the peer has what was sent, or is gone.
    pub async fn finish(mut self) {
        // Either end is the end: there is nobody left to tell.
        if self.stream.finish().is_ok() {
            let _ = self.stream.stopped().await;
        }
    }
}

impl ControlReceiver {
    /// The next message; `None` once the peer has finished. Cancel-safe.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where the peer breaks the protocol or ends amid a message; those of
    /// [`Error::connection`].
    pub async fn next(&mut self) -> Result<Option<Message>> {
        let at = "receive on the control stream";
        loop {
            if let Some(message) = self.decoder.next()? {
                return Ok(Some(message));
            }
            match self.stream.read_chunk(READ_BYTES, true).await.map_err(|e| Error::reading(at, e))? {
                Some(chunk) => self.decoder.push(&chunk.bytes),
                None if self.decoder.is_midway() => {
                    return Err(Error::new(ErrorKind::Malformed, "control stream ends amid a message"));
                }
                None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{ErrorCode, ReceiverCode, ReceiverState};
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = Message> {
        let state = proptest::option::of(
            ("\\PC{0,20}").prop_map(|why| ReceiverState { code: ReceiverCode::Stopped, why }),
        );
        prop_oneof![
            any::<(u64, u64, u64)>().prop_map(|(captured_lsn, epoch, time_ns)| Message::Heartbeat {
                captured_lsn,
                epoch,
                time_ns
            }),
            (any::<(u64, u64, u64, u64)>(), state).prop_map(
                |((epoch, received_lsn, applied_lsn, checkpoint_lsn), state)| {
                    Message::Ack { epoch, received_lsn, applied_lsn, checkpoint_lsn, state }
                }
            ),
            "\\PC{0,300}".prop_map(|reason| Message::Error { code: ErrorCode::BadFrame, reason }),
            any::<Option<u64>>().prop_map(|rate_bits_per_s| Message::Throttle { rate_bits_per_s }),
        ]
        // As a decoder gives them: words are made harmless there.
        .prop_map(|message| Message::decode(&message.encode().unwrap()).unwrap())
    }

    proptest! {
        #[test]
        fn messages_arrive_whole_in_pieces_of_any_size(
            messages in proptest::collection::vec(message(), 0..20),
            sizes in proptest::collection::vec(1usize..200, 1..50),
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(|m| framed(m).unwrap()).collect();
            let (mut decoder, mut rest, mut got) = (Decoder::default(), &bytes[..], Vec::new());
            for size in sizes.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, later) = rest.split_at((*size).min(rest.len()));
                decoder.push(piece);
                while let Some(message) = decoder.next().unwrap() {
                    got.push(message);
                }
                rest = later;
            }
            prop_assert_eq!(got, messages);
            prop_assert!(!decoder.is_midway());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            crate::fuzz::control(&bytes);
        }

        #[test]
        fn flipped_messages_never_panic(message in message(), at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = framed(&message).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            crate::fuzz::control(&[&[3], &bytes[..]].concat());
        }
    }

    #[test]
    fn a_hostile_length_is_refused_at_once_and_for_good() {
        for length in [0, u32::try_from(MAX_MESSAGE_BYTES).unwrap() + 1, u32::MAX] {
            let mut decoder = Decoder::default();
            decoder.push(&length.to_le_bytes());
            assert_eq!(decoder.next().unwrap_err().kind, ErrorKind::Malformed);
            decoder.push(&framed(&Message::ApplyNow { lsn: 1 }).unwrap());
            assert_eq!(decoder.next().unwrap_err().kind, ErrorKind::Malformed);
            assert!(!decoder.is_midway(), "nothing is kept after an error");
        }
    }
}
