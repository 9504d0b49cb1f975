//! What a journal's control file holds: how far back it reaches and what was durable when a segment began.
//!
//! Payload of the two-slot file `journal.control` ([`crate::control`]):
//!
//! ```text
//!        0     1     2     3     4     5     6     7
//!   0 │        version=1      │           0           │
//!   8 │ group id (16)                                 │
//!  24 │ number of the oldest segment held             │
//!  32 │ number of the segment being written           │
//!  40 │ oldest: position before the oldest frame (56) │
//!  96 │ durable position (56)                         │
//! ```
//! Invariants: `oldest` is stored before a segment below it loses its name; the segment being written has its
//! name durably before it stands here, so each number from oldest to current must be found. Rolls and syncs
//! are only noted (not synced): after a power loss later segments may exist, and more may be durable.

use crate::layout::RawPosition;
use crate::segment::MAX_NUMBER;
use crate::{Error, ErrorKind, GroupId, Position, Result};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Name of the control file in a journal's directory.
pub const CONTROL_FILE: &str = "journal.control";

const VERSION: u32 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    version: U32,
    reserved: U32,
    group: [u8; 16],
    oldest_segment: U64,
    current_segment: U64,
    oldest: RawPosition,
    durable: RawPosition,
}

/// The control file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Whose journal it is.
    pub group: GroupId,
    /// Segments below this number are dropped, whether or not their files are gone yet.
    pub oldest_segment: u64,
    /// The segment that was being written; later ones may exist.
    pub current_segment: u64,
    /// Position before the oldest frame held.
    pub oldest: Position,
    /// Everything up to here was durable.
    pub durable: Position,
}

impl State {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let raw = Raw {
            version: VERSION.into(),
            reserved: U32::ZERO,
            group: self.group.0,
            oldest_segment: self.oldest_segment.into(),
            current_segment: self.current_segment.into(),
            oldest: self.oldest.into(),
            durable: self.durable.into(),
        };
        raw.as_bytes().to_vec()
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] or [`ErrorKind::Unsupported`].
    pub fn decode(payload: &[u8]) -> Result<State> {
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, format!("journal state: {what}"));
        let raw = Raw::ref_from_bytes(payload).map_err(|_| malformed("wrong length"))?;
        if raw.version.get() != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("journal state: version {}", raw.version),
            ));
        }
        let state = State {
            group: GroupId(raw.group),
            oldest_segment: raw.oldest_segment.get(),
            current_segment: raw.current_segment.get(),
            oldest: raw.oldest.into(),
            durable: raw.durable.into(),
        };
        if raw.reserved != U32::ZERO || state.oldest_segment > state.current_segment {
            return Err(malformed("fields contradict each other"));
        }
        let possible = state.oldest.is_possible() && state.durable.is_possible();
        if state.current_segment > MAX_NUMBER || !possible {
            return Err(malformed("no journal reaches such a segment, epoch or lsn"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lsn;

    #[test]
    fn golden_bytes_of_the_state() {
        let durable = Position { lsn: Lsn(7), chain: 8, ..Position::default() };
        let state = State {
            group: GroupId([2; 16]),
            oldest_segment: 3,
            current_segment: 4,
            oldest: Position { lsn: Lsn(5), chain: 6, ..Position::default() },
            durable,
        };
        let bytes = state.encode();
        let mut expected = [0; 152];
        expected[0] = 1;
        expected[8..24].fill(2);
        for (at, value) in [(24, 3), (32, 4), (80, 5), (88, 6), (136, 7), (144, 8)] {
            expected[at] = value;
        }
        assert_eq!(bytes, expected);
        assert_eq!(State::decode(&bytes).unwrap(), state);
        assert!(State::decode(&bytes[1..]).is_err());
        let mut backwards = bytes.clone();
        backwards[24] = 9;
        assert!(State::decode(&backwards).is_err());
        for far in [
            State { current_segment: MAX_NUMBER + 1, ..state },
            State { durable: Position { lsn: Lsn(u64::MAX), ..durable }, ..state },
        ] {
            assert!(State::decode(&far.encode()).is_err(), "{far:?}");
        }
    }
}
