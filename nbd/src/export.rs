//! What a server serves: the trait behind every request.
//!
//! The calls are blocking. [`Export::write`] and [`Export::try_read_cached`] run on the thread of the
//! connection that received the request; everything else runs on the server's pool, so that an fdatasync
//! never holds up the requests behind it. Every range handed over lies within [`Export::size_bytes`], is not
//! empty and is a multiple of 512 bytes; a write is at most [`crate::session::PIECE_BYTES`] long (longer ones
//! come in pieces, in order, when all of them are there).

use std::io;

use uuid::Uuid;

/// How a range is to be zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Zeroing {
    /// The client asked for durability; see [`Export::sync`].
    pub fua: bool,
    /// Leave the range allocated, so that later writes cannot run out of room.
    pub keep_allocated: bool,
    /// Fail with `EOPNOTSUPP` rather than write the zeros.
    pub only_if_fast: bool,
}

/// One run of [`Export::block_status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockExtent {
    /// Length, a multiple of 512.
    pub length_bytes: u64,
    /// Not allocated and reads as zeros.
    pub hole: bool,
}

/// A disk that can be served. An `io::Error` becomes the client's error number.
pub trait Export: Send + Sync + 'static {
    /// Name in the NBD URI; at most 4096 bytes.
    fn name(&self) -> &str;

    /// Identity; clients may select the export by its hyphenated form as well as by name.
    fn uuid(&self) -> Uuid;

    /// A line for humans, shown by `nbdinfo`.
    fn description(&self) -> &str {
        ""
    }

    /// Size now, a multiple of 512. It may grow; a client sees the growth when it connects again.
    fn size_bytes(&self) -> u64;

    /// Whether writes are refused. Fixed for the life of the export.
    fn read_only(&self) -> bool;

    /// Whether clients may ask to zero a range only if that is fast. Fixed for the life of the export.
    fn fast_zero(&self) -> bool {
        true
    }

    /// Fills `into` from `offset`.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Fills `into` if that needs no disk; `false` (contents of `into` undefined) sends the read to the pool.
    fn try_read_cached(&self, _offset: u64, _into: &mut [u8]) -> io::Result<bool> {
        Ok(false)
    }

    /// Writes. When it returns the bytes are visible to every reader and the client may be told; they are
    /// durable only after [`Export::flush`], or, with `fua`, after the [`Export::sync`] that the server calls
    /// before it answers.
    fn write(&self, offset: u64, bytes: &[u8], fua: bool) -> io::Result<()>;

    /// Makes the range read as zeros.
    fn write_zeroes(&self, offset: u64, length_bytes: u64, how: Zeroing) -> io::Result<()>;

    /// The client needs the range no more. It must read as zeros afterwards, or be unchanged.
    fn discard(&self, offset: u64, length_bytes: u64, fua: bool) -> io::Result<()>;

    /// The client's FLUSH: every write that had returned when it was called is durable when it returns.
    fn flush(&self) -> io::Result<()>;

    /// Pays the debt of a write with `fua`: as [`Export::flush`], but not a command of the client's.
    fn sync(&self) -> io::Result<()> {
        self.flush()
    }

    /// Runs of data and holes from `offset`, at least one, together at most `length_bytes` long, at most
    /// `max_extents`.
    fn block_status(
        &self,
        offset: u64,
        length_bytes: u64,
        max_extents: usize,
    ) -> io::Result<Vec<BlockExtent>>;
}
