//! What can go wrong in a journal, by what the operator must do about it.

use std::fmt;
use std::io;

/// Shorthand of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds differ by the operator's next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The disk refused an operation: look at the device and the kernel log.
    Io,
    /// A sync to disk failed. Final: the process must stop acknowledging, exit, and recover on restart.
    Sync,
    /// The disk is full: free space; capture falls back to the dirty map meanwhile.
    NoSpace,
    /// Bytes that were durable are no longer what was written: restore them from the other side.
    Corrupt,
    /// Bytes do not follow the format (foreign, hostile, or of another version): they are refused.
    Malformed,
    /// The bytes need a newer program: upgrade this side.
    Unsupported,
    /// Intact, but not what comes next in this history (other group, lineage, epoch, lsn or chain): refused.
    OutOfOrder,
    /// What was asked for is not held here (before the oldest or beyond the newest).
    NotHeld,
    /// Somebody else holds it: stop the other process first.
    Busy,
    /// A control file has no place for so much: what decides its size (names, volumes) must become less.
    TooLarge,
}

/// An error with its place: path, segment, offset or lsn in words.
#[derive(Debug)]
pub struct Error {
    /// What the operator must do.
    pub kind: ErrorKind,
    /// What happened and where.
    pub at: String,
    /// The system's own error, if one is behind it.
    pub source: Option<io::Error>,
}

impl Error {
    /// An error without a system error behind it.
    pub fn new(kind: ErrorKind, at: impl Into<String>) -> Error {
        Error { kind, at: at.into(), source: None }
    }

    /// A refused disk operation; a full disk becomes [`ErrorKind::NoSpace`].
    pub fn io(at: impl Into<String>, source: io::Error) -> Error {
        let kind = if is_full(&source) { ErrorKind::NoSpace } else { ErrorKind::Io };
        Error { kind, at: at.into(), source: Some(source) }
    }

    /// A failed sync, which is final.
    pub fn sync(at: impl Into<String>, source: io::Error) -> Error {
        Error { kind: ErrorKind::Sync, at: at.into(), source: Some(source) }
    }
}

/// Whether the disk refused for want of room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}
