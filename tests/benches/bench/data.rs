//! The content that all measurements write: half of every block compresses away, half does not.

/// A small generator (splitmix64): the same bytes in every run.
pub struct Noise(u64);

impl Noise {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Noise {
        Noise(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Fills `block` in runs of 64 bytes: 32 of noise, 32 of a repeated byte.
pub fn fill_half_compressible(block: &mut [u8], noise: &mut Noise) {
    for run in block.chunks_mut(64) {
        let filler = noise.next().to_le_bytes()[0] & 3;
        let half = run.len() / 2;
        for word in run[..half].chunks_mut(8) {
            let bytes = noise.next().to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        run[half..].fill(filler);
    }
}

/// A buffer of that content.
pub fn half_compressible(bytes: usize, seed: u64) -> Vec<u8> {
    let mut out = vec![0; bytes];
    fill_half_compressible(&mut out, &mut Noise::new(seed));
    out
}
