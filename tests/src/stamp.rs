//! Blocks that say who wrote them, when, and where: what is found in an image is checked against itself
//! first.
//!
//! ```text
//!  0 magic u64   8 run u64   16 sequence u64   24 lane u32   28 volume u32   32 block u32   36 crc u32   40 fill …
//! ```
//! All little-endian; the CRC-32 is over the block with zeros in its own place. Half of the fill compresses
//! well.

/// The unit of everything that is stamped.
pub const BLOCK_BYTES: usize = 4096;

/// One block.
pub type Block = [u8; BLOCK_BYTES];

const MAGIC: u64 = 0x5354_414d_5045_4421;
const CRC: std::ops::Range<usize> = 36..40;
const FILL: usize = 40;

/// What a block says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The story's seed: blocks of another run are foreign.
    pub run: u64,
    /// The writer's number, from 1 on.
    pub sequence: u64,
    /// The writer.
    pub lane: u32,
    /// The volume that it was written to.
    pub volume: u32,
    /// The block that it was written to.
    pub block: u32,
}

/// What was found in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing but zeros.
    Zeros,
    /// A whole stamped block.
    Stamped(Stamp),
    /// Anything else: torn, or not ours.
    Foreign,
}

impl Stamp {
    /// The block that says this.
    pub fn render(&self) -> Block {
        let mut bytes = [0; BLOCK_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.run.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.lane.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.volume.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.block.to_le_bytes());
        let mut noise = self.run ^ self.sequence.rotate_left(32) ^ (u64::from(self.block) << 8) | 1;
        for word in bytes[FILL..BLOCK_BYTES / 2].chunks_exact_mut(8) {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            word.copy_from_slice(&noise.to_le_bytes());
        }
        let crc = crc32fast::hash(&bytes);
        bytes[CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// What a block says.
    pub fn find(bytes: &Block) -> Found {
        if bytes.iter().all(|byte| *byte == 0) {
            return Found::Zeros;
        }
        let mut plain = *bytes;
        plain[CRC].fill(0);
        let is_whole = u64_at(bytes, 0) == MAGIC && crc32fast::hash(&plain) == u32_at(bytes, CRC.start);
        if !is_whole {
            return Found::Foreign;
        }
        Found::Stamped(Stamp {
            run: u64_at(bytes, 8),
            sequence: u64_at(bytes, 16),
            lane: u32_at(bytes, 24),
            volume: u32_at(bytes, 28),
            block: u32_at(bytes, 32),
        })
    }
}

fn u64_at(bytes: &Block, at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn u32_at(bytes: &Block, at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_says_what_was_written_and_any_change_makes_it_foreign() {
        let stamp = Stamp { run: 7, sequence: 9, lane: 1, volume: 2, block: 3 };
        let block = stamp.render();
        assert_eq!(Stamp::find(&block), Found::Stamped(stamp));
        assert_eq!(Stamp::find(&[0; BLOCK_BYTES]), Found::Zeros);
        for at in [0, 8, 37, 40, 2047, 2048, BLOCK_BYTES - 1] {
            let mut other = block;
            other[at] ^= 1;
            assert_eq!(Stamp::find(&other), Found::Foreign, "byte {at}");
        }
        // The halves of two writes.
        let mut torn = Stamp { sequence: 10, ..stamp }.render();
        torn[512..].copy_from_slice(&block[512..]);
        assert_eq!(Stamp::find(&torn), Found::Foreign);
    }
}
