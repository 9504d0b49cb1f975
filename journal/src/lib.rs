//! STORE: records, frames, segments, and how a journal survives a crash.
//!
//! A write is captured once, numbered once, framed once and checksummed once; this room owns the nouns and
//! the bytes of that sentence. It knows no network, no async and no clock: callers hand in times. Byte maps:
//! `docs/format.md`.
//!
//! # The positions of a group carry one order
//!
//! ```text
//! captured_lsn ≥ journaled_lsn        (source: reserved in the ring, appended to the source journal)
//! captured_lsn ≥ received_lsn ≥ applied_lsn ≥ checkpoint_lsn
//!                (receiver: fdatasync'ed in its journal, written to the replica, the replica durably is exactly this)
//! ```
//! [`Positions::assert_order`] is the one place that asserts it; status and metrics show the same names.

pub mod buffered_disk;
pub mod clock_step;
pub mod compress;
pub mod control;
pub mod error;
pub mod extent_map;
pub mod frame;
pub mod index;
pub mod io;
mod layout;
pub mod mark;
pub mod mend;
pub mod pool;
pub mod reader;
pub mod record;
pub mod recovery;
pub mod retention;
pub mod sealed;
pub mod segment;
pub mod sim_disk;
mod spare;
pub mod state;
pub mod tail;
pub mod verify;
pub mod walk;
mod writeback;
pub mod writer;

#[doc(hidden)]
pub mod fuzz;

pub use error::{Error, ErrorKind, Result, is_full};

use std::fmt;
use std::str::FromStr;

/// The unit of alignment on disk: what every block device promises to write whole or not at all.
///
/// Frames, marks, segment headers and footers start at multiples of it, so appending never rewrites a sector
/// that holds bytes which were made durable before (decision 0002).
pub const SECTOR_BYTES: usize = 512;

/// Position in a group's write order. Starts at 1, dense within an epoch; 0 means "before everything".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        bounded(deserializer).map(Lsn)
    }
}

/// A number of a position from disk or network; [`Lsn::MAX`] says why it has a bound.
fn bounded<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<u64, D::Error> {
    let number = <u64 as serde::Deserialize>::deserialize(deserializer)?;
    if number > Lsn::MAX.0 {
        return Err(serde::de::Error::custom(format!("{number} is beyond what a position can be")));
    }
    Ok(number)
}

impl Lsn {
    /// Before the first record.
    pub const ZERO: Lsn = Lsn(0);

    /// The largest lsn, and number of an epoch, that is taken from a disk or a peer. No history gets there;
    /// what is added to such a number later (a successor, a lease) therefore never overflows, whoever wrote
    /// it.
    pub const MAX: Lsn = Lsn(u64::MAX >> 1);

    /// The lsn that follows. 2^64 records are out of reach; wrapping would be a broken invariant.
    pub fn next(self) -> Lsn {
        Lsn(self.0.checked_add(1).expect("lsn space is never exhausted"))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! id16 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                parse_hex16(text).map($name).ok_or_else(|| {
                    Error::new(ErrorKind::Malformed, format!("{text:?} is not 32 hexadecimal digits"))
                })
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id16!(
    /// Names a group of volumes that share one write order, everywhere and for ever.
    GroupId
);
id16!(
    /// One line of descent of a group's content. A promote starts a new one; frames of the old are refused.
    Lineage
);
id16!(
    /// Random id of an epoch: tells apart two histories that gave the same number to different epochs.
    EpochId
);
id16!(
    /// Names a volume everywhere and for ever; within a group the short [`VolumeId`] stands for it.
    VolumeUuid
);

fn parse_hex16(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

/// A stretch of unbroken capture: number (rising) and random id. A gap in capture starts a new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Epoch {
    /// Rises with every new epoch of a lineage.
    #[serde(deserialize_with = "bounded")]
    pub number: u64,
    /// Random, drawn at the epoch's start.
    pub id: EpochId,
}

/// Which volume of its group a record belongs to; given by the agent, stated in the stream by `volume`
/// records.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct VolumeId(pub u32);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Byte range `[offset, offset + len)` of a volume, sector aligned, half open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes; never 0 in a record that changes a volume.
    pub len: u64,
}

impl Extent {
    /// One past the last byte; `None` where that leaves the address space (hostile input).
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

/// A place in a group's history that two sides can compare: what they hold up to and including `lsn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Line of descent.
    pub lineage: Lineage,
    /// Epoch that `lsn` belongs to.
    pub epoch: Epoch,
    /// Last lsn held; `Lsn::ZERO` or the lsn before the epoch's first where nothing of the epoch is held yet.
    pub lsn: Lsn,
    /// `chain_out` of the last frame held, or [`frame::chain_seed`] at the start of an epoch.
    pub chain: u64,
}

impl Position {
    /// The position before the first frame of an epoch, `last` being the lsn before its first.
    pub fn epoch_start(lineage: Lineage, epoch: Epoch, last: Lsn) -> Position {
        Position { lineage, epoch, lsn: last, chain: frame::chain_seed(lineage, epoch) }
    }

    /// Whether its numbers are ones that a history can reach; checked of each that comes from a disk or a
    /// peer.
    pub fn is_possible(&self) -> bool {
        self.lsn <= Lsn::MAX && self.epoch.number <= Lsn::MAX.0
    }

    /// Order within one lineage: epoch number, then lsn.
    pub fn order(&self) -> (u64, Lsn) {
        (self.epoch.number, self.lsn)
    }
}

/// The positions of one group, in the words that status and metrics use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Positions {
    /// Newest lsn reserved in the ring.
    pub captured_lsn: Lsn,
    /// Newest lsn appended to the source journal.
    pub journaled_lsn: Lsn,
    /// Newest lsn durable in the receiver's journal.
    pub received_lsn: Lsn,
    /// Newest lsn written to the replica.
    pub applied_lsn: Lsn,
    /// The replica durably is exactly this lsn.
    pub checkpoint_lsn: Lsn,
}

impl Positions {
    /// Aborts when the order of the positions is broken: every other guarantee rests on it.
    pub fn assert_order(&self) {
        assert!(
            self.captured_lsn >= self.journaled_lsn
                && self.captured_lsn >= self.received_lsn
                && self.received_lsn >= self.applied_lsn
                && self.applied_lsn >= self.checkpoint_lsn,
            "positions out of order: {self:?}"
        );
    }
}

/// Rounds up to a whole number of sectors.
pub fn sector_ceil(bytes: usize) -> usize {
    bytes.next_multiple_of(SECTOR_BYTES)
}
