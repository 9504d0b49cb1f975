//! The receive buffer of one connection: requests are parsed, and payloads written, where they were received.
//!
//! ```text
//! buffer  [ consumed | unread | room ]
//!         0        start     end     INBOX_BYTES
//! ```
//! It never grows. Invariant: after [`Inbox::make_room`] an event of up to [`PIECE_BYTES`] and a header fits.

use crate::proto::REQUEST_HEADER_BYTES;
use crate::session::PIECE_BYTES;

/// Twice the largest event, so that unread bytes seldom have to move; pages never used cost nothing.
const INBOX_BYTES: usize = 2 * (PIECE_BYTES + REQUEST_HEADER_BYTES);

#[derive(Debug)]
pub(crate) struct Inbox {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub fn new() -> Self {
        Self { buffer: vec![0; INBOX_BYTES], start: 0, end: 0 }
    }

    pub fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        assert!(self.start <= self.end, "no more is consumed than was received");
        if self.start == self.end {
            // Back to the pages that are warm in the cache.
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves the unread bytes to the front if `wanted` of them would not fit where they are.
    pub fn make_room(&mut self, wanted: usize) {
        assert!(wanted <= INBOX_BYTES / 2, "no event is larger than a piece");
        if self.start + wanted > INBOX_BYTES || self.end == INBOX_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Where received bytes go; tell [`Inbox::received`] how many came.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[self.end..]
    }

    pub fn received(&mut self, bytes: usize) {
        self.end += bytes;
        assert!(self.end <= INBOX_BYTES, "no more is received than there was room for");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_bytes_survive_every_move() {
        let mut inbox = Inbox::new();
        let (mut next_in, mut next_out) = (0u64, 0u64);
        for round in 0..200_usize {
            inbox.make_room(PIECE_BYTES);
            assert!(inbox.start + PIECE_BYTES <= INBOX_BYTES);
            let bytes = (round * 7919 % 300_000 / 8 * 8).min(inbox.room().len() / 8 * 8);
            for word in inbox.room()[..bytes].chunks_exact_mut(8) {
                word.copy_from_slice(&next_in.to_le_bytes());
                next_in += 1;
            }
            inbox.received(bytes);
            let take = (round * 104_729 % 300_000 / 8 * 8).min(inbox.unread().len());
            for word in inbox.unread()[..take].chunks_exact(8) {
                assert_eq!(word, next_out.to_le_bytes());
                next_out += 1;
            }
            inbox.consume(take);
        }
        assert!(next_out > 100_000);
    }
}
