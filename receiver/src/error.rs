//! What can go wrong at the receiver, by what the operator must do about it.

use std::fmt;

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
    /// The disk is full: free space or shorten the history; apply goes on by itself once there is room.
    NoSpace,
    /// Bytes that were durable are no longer what was written: the place is named; fetch them from the other
    /// side.
    Corrupt,
    /// The point or action asked for is not possible here and now; the text names the nearest that is.
    NotPossible,
    /// Somebody else holds the directory, the replica or the target: stop or unmount it first.
    Busy,
    /// The request itself is wrong: change its arguments.
    Usage,
    /// The replica could not be written, or is not what we left: repair or replace it, then resynchronise.
    ReplicaFailed,
    /// The one who asked for it went away, or ended it.
    Cancelled,
    /// Bytes do not follow the format (foreign, hostile, or of another version): they are refused.
    Malformed,
}

/// An error with its place: path, segment, offset, volume or lsn in words.
#[derive(Debug)]
pub struct Error {
    /// What the operator must do.
    pub kind: ErrorKind,
    /// What happened and where.
    pub at: String,
    /// What lies behind it, if anything.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with nothing behind it.
    pub fn new(kind: ErrorKind, at: impl Into<String>) -> Error {
        Error { kind, at: at.into(), source: None }
    }

    /// A refused disk operation; a full disk becomes [`ErrorKind::NoSpace`].
    pub fn io(at: impl Into<String>, source: std::io::Error) -> Error {
        let kind = if is_full(&source) { ErrorKind::NoSpace } else { ErrorKind::Io };
        Error { kind, at: at.into(), source: Some(Box::new(source)) }
    }

    /// A failed sync, which is final.
    pub fn sync(at: impl Into<String>, source: std::io::Error) -> Error {
        Error { kind: ErrorKind::Sync, at: at.into(), source: Some(Box::new(source)) }
    }

    /// The replica of a volume refused an operation.
    pub fn replica(at: impl Into<String>, source: std::io::Error) -> Error {
        Error { kind: ErrorKind::ReplicaFailed, at: at.into(), source: Some(Box::new(source)) }
    }

    /// Damage in bytes that were durable once.
    pub fn corrupt(at: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, at)
    }

    /// The error and what lies behind it, in one line.
    pub fn in_full(&self) -> String {
        match &self.source {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }

    /// The same error, told with the step that was under way in front.
    pub fn during(self, step: impl fmt::Display) -> Error {
        Error { at: format!("{step}: {}", self.at), ..self }
    }
}

/// Whether the disk refused for want of room.
pub fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Error {
        use journal::ErrorKind as Of;
        let kind = match error.kind {
            Of::Io => ErrorKind::Io,
            Of::Sync => ErrorKind::Sync,
            Of::NoSpace => ErrorKind::NoSpace,
            Of::Corrupt => ErrorKind::Corrupt,
            Of::NotHeld | Of::OutOfOrder => ErrorKind::NotPossible,
            Of::Busy => ErrorKind::Busy,
            // Unsupported bytes need another program: refused like any bytes that this one cannot read.
            _ => ErrorKind::Malformed,
        };
        Error { kind, at: error.at, source: error.source.map(|source| Box::new(source) as _) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}
