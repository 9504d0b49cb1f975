//! Entry points for fuzzing decoders of foreign bytes. Each aborts on a broken invariant and ignores
//! refusals.

use crate::framing::{Decoder, framed};
use crate::message::MAX_MESSAGE_BYTES;

/// The control stream: the first byte is the size of pieces, the rest the stream. What is understood must
/// survive a round trip.
pub fn control(bytes: &[u8]) {
    let Some((size, stream)) = bytes.split_first() else { return };
    let mut decoder = Decoder::default();
    for piece in stream.chunks(usize::from(*size).max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(Some(message)) => {
                    // A hostile encoding may be longer than ours, never shorter, so ours fits.
                    let again = framed(&message).expect("invariant: what was decoded fits");
                    assert!(again.len() <= MAX_MESSAGE_BYTES + 4);
                    let mut decoder = Decoder::default();
                    decoder.push(&again);
                    assert!(matches!(decoder.next(), Ok(Some(m)) if m == message));
                    assert!(!decoder.is_midway());
                }
                Ok(None) => break,
                Err(_) => {
                    assert!(decoder.next().is_err() && !decoder.is_midway());
                    return;
                }
            }
        }
    }
}
