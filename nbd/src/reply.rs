//! Encoders of replies; they append to a buffer and hold nothing but the negotiated style.
//!
//! Success without content is always a simple reply (16 bytes, allowed in both styles). READ and errors are
//! chunks once structured replies are negotiated.

use std::io;

use crate::export::BlockExtent;
use crate::proto::{BASE_ALLOCATION_ID, CHUNK_MAGIC, Errno, SIMPLE_REPLY_MAGIC, chunk, state};
use crate::session::Refusal;

/// Longest error message that is sent.
const MAX_MESSAGE_BYTES: usize = 1024;

/// How to answer on one connection.
#[derive(Debug, Clone, Copy)]
pub struct Replies {
    /// Structured replies were negotiated.
    pub structured: bool,
}

impl Replies {
    /// Success without content.
    pub fn done(self, out: &mut Vec<u8>, cookie: u64) {
        simple(out, cookie, 0);
    }

    /// An error, and its reason where the style has room for one.
    pub fn refused(self, out: &mut Vec<u8>, cookie: u64, refusal: &Refusal) {
        if !self.structured {
            return simple(out, cookie, refusal.errno.code());
        }
        let message = refusal.message.as_bytes();
        let message = &message[..message.len().min(MAX_MESSAGE_BYTES)];
        header(out, chunk::DONE, chunk::ERROR, cookie, 6 + length_of(message.len()));
        out.extend_from_slice(&refusal.errno.code().to_be_bytes());
        let length = u16::try_from(message.len()).expect("invariant: cut to MAX_MESSAGE_BYTES");
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(message);
    }

    /// Head of a run of READ bytes; `length` bytes must be appended after it.
    pub fn data(self, out: &mut Vec<u8>, cookie: u64, offset: u64, length: usize, last: bool) {
        if !self.structured {
            return simple(out, cookie, 0);
        }
        header(out, done_flag(last), chunk::OFFSET_DATA, cookie, 8 + length_of(length));
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// A run of READ bytes that are zeros. Only with structured replies.
    pub fn hole(self, out: &mut Vec<u8>, cookie: u64, offset: u64, length: u32, last: bool) {
        debug_assert!(self.structured);
        header(out, done_flag(last), chunk::OFFSET_HOLE, cookie, 12);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// Answer of a READ of nothing.
    pub fn nothing(self, out: &mut Vec<u8>, cookie: u64) {
        match self.structured {
            true => header(out, chunk::DONE, chunk::NONE, cookie, 0),
            false => simple(out, cookie, 0),
        }
    }

    /// Extents of `base:allocation`. Only with structured replies.
    pub fn block_status(self, out: &mut Vec<u8>, cookie: u64, extents: &[BlockExtent]) {
        debug_assert!(self.structured);
        header(out, chunk::DONE, chunk::BLOCK_STATUS, cookie, 4 + length_of(extents.len() * 8));
        out.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
        for extent in extents {
            let length = u32::try_from(extent.length_bytes).expect("invariant: within the request's length");
            let flags = if extent.hole { state::HOLE | state::ZERO } else { 0 };
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&flags.to_be_bytes());
        }
    }
}

/// What the client is told about an error of the export.
pub fn refusal_of(error: &io::Error) -> Refusal {
    use io::ErrorKind;
    let errno = match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Errno::Perm,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Errno::NoSpc,
        ErrorKind::OutOfMemory => Errno::NoMem,
        ErrorKind::InvalidInput => Errno::Inval,
        ErrorKind::Unsupported => Errno::NotSup,
        _ => match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::SHUTDOWN) => Errno::Shutdown,
            Some(rustix::io::Errno::OVERFLOW) => Errno::Overflow,
            _ => Errno::Io,
        },
    };
    Refusal::new(errno, error.to_string())
}

fn simple(out: &mut Vec<u8>, cookie: u64, error: u32) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

fn header(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, length: u32) {
    out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

fn done_flag(last: bool) -> u16 {
    if last { chunk::DONE } else { 0 }
}

fn length_of(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("invariant: a reply is no longer than the largest payload and its head")
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRUCTURED: Replies = Replies { structured: true };
    const SIMPLE: Replies = Replies { structured: false };

    fn bytes_of(encode: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        encode(&mut out);
        hex::encode(out)
    }

    #[test]
    fn golden_bytes_of_every_reply() {
        let refusal = Refusal::new(Errno::Inval, "no");
        let done = bytes_of(|out| SIMPLE.done(out, 0x0102));
        assert_eq!(done, "67446698000000000000000000000102");
        assert_eq!(bytes_of(|out| STRUCTURED.done(out, 0x0102)), done);
        assert_eq!(bytes_of(|out| SIMPLE.refused(out, 7, &refusal)), "67446698000000160000000000000007");
        assert_eq!(
            bytes_of(|out| STRUCTURED.refused(out, 7, &refusal)),
            "668e33ef000180010000000000000007000000080000001600026e6f"
        );
        assert_eq!(
            bytes_of(|out| STRUCTURED.data(out, 7, 0x1000, 512, false)),
            "668e33ef00000001000000000000000700000208".to_owned() + "0000000000001000"
        );
        assert_eq!(
            bytes_of(|out| STRUCTURED.hole(out, 7, 0x1000, 512, true)),
            "668e33ef0001000200000000000000070000000c".to_owned() + "000000000000100000000200"
        );
        assert_eq!(bytes_of(|out| STRUCTURED.nothing(out, 7)), "668e33ef00010000000000000000000700000000");
        let extents =
            [BlockExtent { length_bytes: 512, hole: true }, BlockExtent { length_bytes: 1024, hole: false }];
        assert_eq!(
            bytes_of(|out| STRUCTURED.block_status(out, 7, &extents)),
            "668e33ef00010005000000000000000700000014".to_owned()
                + "0000000100000200000000030000040000000000"
        );
    }

    #[test]
    fn errors_of_the_export_keep_their_meaning() {
        let wire = |errno: rustix::io::Errno| refusal_of(&errno.into()).errno;
        assert_eq!(wire(rustix::io::Errno::NOSPC), Errno::NoSpc);
        assert_eq!(wire(rustix::io::Errno::DQUOT), Errno::NoSpc);
        assert_eq!(wire(rustix::io::Errno::ROFS), Errno::Perm);
        assert_eq!(wire(rustix::io::Errno::OPNOTSUPP), Errno::NotSup);
        assert_eq!(wire(rustix::io::Errno::SHUTDOWN), Errno::Shutdown);
        assert_eq!(wire(rustix::io::Errno::OVERFLOW), Errno::Overflow);
        assert_eq!(wire(rustix::io::Errno::NODEV), Errno::Io);
        assert_eq!(refusal_of(&io::Error::other("torn")).errno, Errno::Io);
    }

    #[test]
    fn a_long_message_is_cut() {
        let mut out = Vec::new();
        STRUCTURED.refused(&mut out, 1, &Refusal::new(Errno::Io, "x".repeat(100_000)));
        assert_eq!(out.len(), 20 + 6 + MAX_MESSAGE_BYTES);
    }
}
