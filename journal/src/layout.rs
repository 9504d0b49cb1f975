//! Pieces that several byte maps share.

use crate::{Epoch, EpochId, Lineage, Lsn, Position};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A position on disk.
///
/// ```text
///   0 │ lineage (16)                                  │
///  16 │ epoch number                                  │
///  24 │ epoch id (16)                                 │
///  40 │ lsn                                           │
///  48 │ chain                                         │
/// ```
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawPosition {
    lineage: [u8; 16],
    epoch: U64,
    epoch_id: [u8; 16],
    lsn: U64,
    chain: U64,
}

const _: () = assert!(size_of::<RawPosition>() == 56);

impl From<Position> for RawPosition {
    fn from(position: Position) -> RawPosition {
        RawPosition {
            lineage: position.lineage.0,
            epoch: position.epoch.number.into(),
            epoch_id: position.epoch.id.0,
            lsn: position.lsn.0.into(),
            chain: position.chain.into(),
        }
    }
}

impl From<RawPosition> for Position {
    fn from(raw: RawPosition) -> Position {
        Position {
            lineage: Lineage(raw.lineage),
            epoch: Epoch { number: raw.epoch.get(), id: EpochId(raw.epoch_id) },
            lsn: Lsn(raw.lsn.get()),
            chain: raw.chain.get(),
        }
    }
}
