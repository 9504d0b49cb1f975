//! A WRITE longer than one piece, while its payload comes in.
//!
//! It is collected whole, in pieces of [`PIECE_BYTES`], before the export sees any of it: a client that is
//! gone in the middle leaves nothing behind, in the journal or on the disk. Memory is taken as bytes come;
//! the share for all of it is held by the connection.

use crate::session::{LongWrite, PIECE_BYTES};

/// What has come so far.
#[derive(Debug)]
pub(crate) struct Collected {
    write: LongWrite,
    pieces: Vec<Vec<u8>>,
    /// Bytes of the last piece that were received.
    filled: usize,
    missing: usize,
}

impl Collected {
    /// Nothing has come.
    pub fn new(write: LongWrite) -> Self {
        Self { write, pieces: Vec::new(), filled: PIECE_BYTES, missing: write.length as usize }
    }

    pub fn request(&self) -> LongWrite {
        self.write
    }

    pub fn is_whole(&self) -> bool {
        self.missing == 0
    }

    /// Where the next bytes go; tell [`Collected::received`] how many came. Not empty unless it is whole.
    pub fn room(&mut self) -> &mut [u8] {
        if self.missing > 0 && self.pieces.last().is_none_or(|piece| piece.len() == self.filled) {
            self.pieces.push(vec![0; self.missing.min(PIECE_BYTES)]);
            self.filled = 0;
        }
        let filled = self.filled;
        self.pieces.last_mut().map_or(&mut [], |piece| &mut piece[filled..])
    }

    pub fn received(&mut self, bytes: usize) {
        assert!(bytes <= self.missing, "no more is received than there was room for");
        self.filled += bytes;
        self.missing -= bytes;
    }

    /// Takes what it still needs from the front of `input`; how many bytes that was.
    pub fn take(&mut self, input: &[u8]) -> usize {
        let mut taken = 0;
        while !self.is_whole() && taken < input.len() {
            let room = self.room();
            let bytes = room.len().min(input.len() - taken);
            room[..bytes].copy_from_slice(&input[taken..taken + bytes]);
            self.received(bytes);
            taken += bytes;
        }
        taken
    }

    /// The pieces with their offsets, in order.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        assert!(self.is_whole(), "nothing is handed over before all of it is here");
        let places = (0_u64..).map(|index| self.write.offset + index * PIECE_BYTES as u64);
        places.zip(self.pieces.iter().map(Vec::as_slice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_comes_together_however_it_was_cut() {
        let length = 2 * PIECE_BYTES + 512;
        let payload: Vec<u8> = (0..length).map(|at| (at % 251).to_le_bytes()[0]).collect();
        let write = LongWrite { cookie: 1, offset: 4096, length: u32::try_from(length).unwrap(), fua: false };
        for cut in [512, 65_537, PIECE_BYTES, 3 * PIECE_BYTES] {
            let mut collected = Collected::new(write);
            let mut stream = payload.clone();
            stream.extend([7; 100]); // the next request
            let mut at = 0;
            while !collected.is_whole() {
                let end = (at + cut).min(stream.len());
                at += collected.take(&stream[at..end]);
            }
            assert_eq!(at, length, "not a byte of what follows");
            let pieces: Vec<_> = collected.pieces().collect();
            let offsets: Vec<_> = pieces.iter().map(|(offset, _)| *offset).collect();
            assert_eq!(offsets, [4096, 4096 + (1 << 20), 4096 + (2 << 20)]);
            assert!(pieces.iter().flat_map(|(_, bytes)| *bytes).eq(&payload));
        }
    }
}
