//! Comparison by hash: which chunks of a volume the replica holds already, so that only the others are sent.
//!
//! On a stream of its own, opened by the source, one question after the other: [`Message::HashRequest`],
//! answered by [`Message::Hashes`] or [`Message::Error`]. Both sides hash with BLAKE3 under a key that the
//! source draws for each comparison, cut to 128 bits: whoever writes the disks' content does not know the
//! key, so no two contents can be made to look the same.
//!
//! ⚠ What the answer means (DESIGN section 6): the replica's content with everything applied up to
//! `applied_lsn`, which is not below `after_lsn`, the `resync-begin` of the synchronisation that asks. Where
//! it equals what the source reads after its barrier, every sector that nobody has written since begin is
//! equal; the others are records in the stream.

/// Bytes of one hash.
pub const HASH_BYTES: usize = 16;
/// Chunks are a power of two from this, a block that file systems write …
pub const MIN_CHUNK_BYTES: u32 = 4 << 10;
/// … to this.
pub const MAX_CHUNK_BYTES: u32 = 1 << 20;
/// Chunks of one question: their hashes fit a message.
pub const MAX_CHUNKS: u64 = 2048;
/// Bit of `features` in `Hello` and `Welcome`: this side compares by hash.
pub const FEATURE: u64 = 1;

/// Bit of `features` in `Welcome`: a replica of this group was brought by other means, so that the first
/// synchronisation compares as well.
pub const SEEDED: u64 = 2;

/// Hash of one chunk.
pub fn hash(key: &[u8; 32], chunk: &[u8]) -> [u8; HASH_BYTES] {
    let mut short = [0; HASH_BYTES];
    short.copy_from_slice(&blake3::keyed_hash(key, chunk).as_bytes()[..HASH_BYTES]);
    short
}

/// Hashes chunks under one key, and knows what zeros hash to: a hole is never read, nor hashed again.
pub struct Hasher {
    key: [u8; 32],
    /// Length and hash of the zeros that were asked for last: nearly all chunks have one length.
    zeros: Option<(usize, [u8; HASH_BYTES])>,
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl Hasher {
    /// Of one comparison.
    pub fn new(key: [u8; 32]) -> Hasher {
        Hasher { key, zeros: None }
    }

    /// As [`hash`].
    pub fn hash(&mut self, chunk: &[u8]) -> [u8; HASH_BYTES] {
        match is_zero(chunk) {
            true => self.zeros(chunk.len()),
            false => hash(&self.key, chunk),
        }
    }

    /// The [`hash`] of so many zeros.
    pub fn zeros(&mut self, bytes: usize) -> [u8; HASH_BYTES] {
        if let Some((_, known)) = self.zeros.filter(|(length, _)| *length == bytes) {
            return known;
        }
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        let mut left = bytes;
        while left > 0 {
            let next = left.min(ZEROS.len());
            hasher.update(&ZEROS[..next]);
            left -= next;
        }
        let mut short = [0; HASH_BYTES];
        short.copy_from_slice(&hasher.finalize().as_bytes()[..HASH_BYTES]);
        self.zeros = Some((bytes, short));
        short
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // In wide words: the compiler turns the comparison of 16 bytes into one instruction.
    let (words, tail) = bytes.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && tail.iter().all(|byte| *byte == 0)
}

/// Whether a question keeps the limits: whole chunks from a chunk's boundary on, the last one cut at most by
/// the volume's end.
pub fn is_sound(offset: u64, length: u64, chunk_bytes: u32) -> bool {
    let chunk = u64::from(chunk_bytes);
    (MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes)
        && chunk_bytes.is_power_of_two()
        && offset.is_multiple_of(chunk)
        && length > 0
        && length.div_ceil(chunk) <= MAX_CHUNKS
        && offset.checked_add(length).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both sides must agree for ever: added to, never edited.
    #[test]
    fn hashes_are_fixed() {
        let key = [7; 32];
        assert_eq!(hex::encode(hash(&key, b"")), "29dc8692843c22e4bdc8f56a93c364a3");
        let chunk = vec![b'a'; 64 << 10];
        assert_eq!(hex::encode(hash(&key, &chunk)), "156653dafdb4c5f1bc7e79125e651e0c");
        assert_ne!(hash(&key, b"a"), hash(&[8; 32], b"a"));
    }

    /// A peer of an older program hashes what it reads.
    #[test]
    fn zeros_hash_as_if_they_were_read() {
        let mut hasher = Hasher::new([7; 32]);
        for bytes in [1, 512, 4096, 64 << 10, (64 << 10) + 512, 1 << 20, 4096, 0] {
            let mut chunk = vec![0; bytes];
            assert_eq!(hasher.zeros(bytes), hash(&[7; 32], &chunk), "{bytes}");
            assert_eq!(hasher.hash(&chunk), hash(&[7; 32], &chunk), "{bytes}");
            for at in [0, bytes / 2, bytes.saturating_sub(1)].into_iter().filter(|at| *at < bytes) {
                chunk[at] = 1;
                assert_eq!(hasher.hash(&chunk), hash(&[7; 32], &chunk), "{bytes}, {at}");
                chunk[at] = 0;
            }
        }
    }

    #[test]
    fn questions_have_limits() {
        let chunk = MIN_CHUNK_BYTES;
        assert!(
            is_sound(0, 1, chunk) && is_sound(1 << 20, 8 << 20, chunk) && is_sound(0, 64 << 20, 64 << 10)
        );
        for (offset, length, chunk_bytes) in [
            (0, 0, chunk),
            (512, 1, chunk),
            (0, u64::from(chunk) * MAX_CHUNKS + 1, chunk),
            (u64::MAX - 65535, u64::MAX, chunk),
            (0, 1, 0),
            (0, 1, 2048),
            (0, 1, chunk + 1),
            (0, 1, 2 << 20),
        ] {
            assert!(!is_sound(offset, length, chunk_bytes), "{offset} {length} {chunk_bytes}");
        }
    }
}
