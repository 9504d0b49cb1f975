//! The user side's errors, by what the operator must do.

use super::recovery::Lost;
use std::path::PathBuf;

/// What went wrong with a ring's file, or with the kernel's device.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: {}", at.display())]
pub struct Error {
    /// What the operator must do.
    pub kind: ErrorKind,
    /// The file, directory or device.
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
    /// Choose a directory that this user alone can write, or take this one away.
    NotOurs,
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
    /// Install and load the kernel module, or use the NBD front.
    NoModule,
    /// Install the module and the program of one version, and load that module.
    OtherAbi,
    /// Run as root, or with CAP_SYS_ADMIN.
    NotPermitted,
    /// Give the module more memory (its parameter), or choose a smaller ring.
    NoMemory,
    /// Nothing yet: it takes longer; ask again.
    TimedOut,
    /// Nothing: writes only set bits now, until a resync begins.
    BitmapMode,
    /// Nothing: bits are set that a resync has to clear first.
    Dirty,
    /// The device is captured already, by this group or another.
    Attached,
    /// The device is of a kind that cannot be captured exactly: zoned, DAX, or part of an array.
    Unsuitable,
    /// The device is larger than the volume was when the group was made: a new group is needed.
    TooLarge,
    /// See what the system said.
    Io,
}

impl std::fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotInMemory => {
                f.write_str("not in tmpfs; choose a directory that is, such as one below /run or /dev/shm")
            }
            Self::NotOurs => f.write_str(
                "rings lie only in directories and files that are this user's own and that no other user can write or take \
                 away; remove it, or choose another `ring_dir`",
            ),
            Self::NoSpace => f.write_str("no room for the ring; enlarge the tmpfs or choose a smaller ring"),
            Self::Busy => f.write_str("another process owns the ring"),
            Self::Absent => f.write_str("there is no ring"),
            Self::Lost(lost) => write!(f, "the ring is lost, {lost}"),
            Self::Invalid => f.write_str("no ring can be made of these sizes, volumes and first lsn"),
            Self::NoModule => f.write_str(
                "the kernel module kfilter is not loaded: `modprobe kfilter` (install it with DKMS for this kernel), or \
                 choose capture = \"nbd\"",
            ),
            Self::OtherAbi => f.write_str(
                "the loaded kernel module kfilter is of another version: install the module of this program, \
                 `rmmod kfilter && modprobe kfilter`",
            ),
            Self::NotPermitted => f.write_str("only root (CAP_SYS_ADMIN) may capture devices"),
            Self::NoMemory => f.write_str(
                "the module's memory limit forbids it: raise its parameter memory_limit_mib, or choose a smaller ring",
            ),
            Self::TimedOut => f.write_str("some write has not come back from the device yet"),
            Self::BitmapMode => f.write_str("writes only set dirty bits now"),
            Self::Dirty => f.write_str("dirty bits are set"),
            Self::Attached => f.write_str("captured already: detach it where it is, first"),
            Self::Unsuitable => f.write_str(
                "a device that cannot be captured exactly (zoned, DAX, or part of an array): capture what lies above it, \
                 or choose capture = \"nbd\"",
            ),
            Self::TooLarge => f.write_str("larger than its volume was when capture began"),
            Self::Io => f.write_str("use the ring"),
        }
    }
}
