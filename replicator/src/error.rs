//! What can go wrong at the source, by what the operator must do about it.

use std::fmt;

/// Shorthand of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds differ by the operator's next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting, path or size does not fit what is there: correct it.
    Settings,
    /// A disk or file refused an operation: look at the device and the kernel log.
    Io,
    /// The ring could not be made: give tmpfs room or point `ring_dir` elsewhere.
    Ring,
    /// Somebody else holds it: stop the other process first.
    Busy,
    /// Not possible in this state; the text says what would make it possible.
    NotPossible,
    /// The receiver, or the way to it, refused: the text names the side to look at.
    Peer,
    /// A background thread ended where it must not: restart; capture goes on where it stopped.
    Stopped,
}

/// An error with its place in words.
#[derive(Debug)]
pub struct Error {
    /// What the operator must do.
    pub kind: ErrorKind,
    /// What happened and where.
    pub at: String,
    /// What is behind it.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of our own finding.
    pub fn new(kind: ErrorKind, at: impl Into<String>) -> Error {
        Error { kind, at: at.into(), source: None }
    }

    /// An error with another behind it.
    pub fn because(
        kind: ErrorKind,
        at: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error { kind, at: at.into(), source: Some(source.into()) }
    }
}

/// An error and all that is behind it, in one line.
pub fn describe(error: &Error) -> String {
    let mut told = error.to_string();
    let mut behind = std::error::Error::source(error);
    while let Some(source) = behind {
        told += &format!(": {source}");
        behind = source.source();
    }
    told
}

/// Whether a disk had no room for it: it may be tried again when there is some.
pub(crate) fn is_full(error: &Error) -> bool {
    let mut behind = std::error::Error::source(error);
    while let Some(source) = behind {
        let journal = source.downcast_ref::<journal::Error>();
        let system = source.downcast_ref::<std::io::Error>();
        if journal.is_some_and(|error| error.kind == journal::ErrorKind::NoSpace)
            || system.is_some_and(journal::is_full)
        {
            return true;
        }
        behind = source.source();
    }
    false
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Error {
        let kind = match error.kind {
            journal::ErrorKind::Busy => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        Error::because(kind, "source journal", error)
    }
}
