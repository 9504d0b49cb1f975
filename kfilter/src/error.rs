//! The user side's errors, by what the operator must do.

use super::recovery::Lost;
use std::path::PathBuf;

/// What went wrong with a ring's file.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: {}", at.display())]
pub struct Error {
    /// What the operator must do.
    pub kind: ErrorKind,
    /// The file or directory.
    pub at: PathBuf,
    /// What the system said.
    pub source: Option<std::io::Error>,
}

/// What the operator must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Choose a directory in tmpfs, such as one below /run or /dev/shm.
    NotInMemory,
    /// Give the tmpfs more room (`mount -o remount,size=…`), or choose a smaller ring.
    NoSpace,
    /// Stop the other process that owns this ring.
    Busy,
    /// Nothing: there is no ring yet, a new epoch starts.
    Absent,
    /// Nothing: the ring cannot be used, a new epoch starts.
    Lost(Lost),
    /// Correct the ring's size (a power of two), or the volumes' sizes, number or ids.
    Invalid,
    /// See what the system said.
    Io,
}

impl std::fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotInMemory => {
                f.write_str("not in tmpfs; choose a directory that is, such as one below /run or /dev/shm")
            }
            Self::NoSpace => f.write_str("no room for the ring; enlarge the tmpfs or choose a smaller ring"),
            Self::Busy => f.write_str("another process owns the ring"),
            Self::Absent => f.write_str("there is no ring"),
            Self::Lost(lost) => write!(f, "the ring is lost, {lost}"),
            Self::Invalid => f.write_str("no ring can be made of these sizes, volumes and first lsn"),
            Self::Io => f.write_str("use the ring's file"),
        }
    }
}
