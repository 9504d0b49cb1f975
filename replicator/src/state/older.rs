//! States as older versions wrote them. They knew a disk by fewer things: what they kept of one proves
//! nothing to this version, so that its content is compared once.

use journal::{Epoch, GroupId, Lineage, Lsn, VolumeId, VolumeUuid};
use serde::Deserialize;
#[cfg(test)]
use serde::Serialize;

use super::{Capturing, Gap, KnownVolume, SourceState, VERSION};

/// The state as version 1 wrote it.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
#[allow(dead_code, reason = "read so that what follows is found; not used")]
struct Version1 {
    version: u16,
    group: GroupId,
    lineage: Lineage,
    epoch: Epoch,
    epoch_start: Lsn,
    epoch_is_full: bool,
    lease_end: Lsn,
    clean: Option<Lsn>,
    needs_resync: Option<Gap>,
    journal_damaged: bool,
    above_epoch: u64,
    above_lsn: Lsn,
    volumes: Vec<Volume1>,
}

/// A volume as version 1 wrote it.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
struct Volume1 {
    id: VolumeId,
    uuid: VolumeUuid,
    name: String,
    size_bytes: u64,
    stamp: Option<[u64; 3]>,
    present: bool,
}

/// The state as version 2 wrote it.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
#[allow(dead_code, reason = "read so that what follows is found; not used")]
pub(super) struct Version2 {
    version: u16,
    group: GroupId,
    lineage: Lineage,
    epoch: Epoch,
    epoch_start: Lsn,
    epoch_is_full: bool,
    lease_end: Lsn,
    clean: Option<Lsn>,
    needs_resync: Option<Gap>,
    gap_in_ring: bool,
    given_up: bool,
    was_consistent: bool,
    journal_damaged: bool,
    above_epoch: u64,
    above_lsn: Lsn,
    volumes: Vec<Volume2>,
}

/// A volume as version 2 wrote it.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
#[allow(dead_code, reason = "read so that what follows is found; not used")]
struct Volume2 {
    id: VolumeId,
    uuid: VolumeUuid,
    name: String,
    size_bytes: u64,
    stamp: Option<[u64; 3]>,
    present: bool,
    device: Option<Device2>,
    capturing: Capturing,
}

/// A device as version 2 knew it.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
#[allow(dead_code, reason = "read so that what follows is found; not used")]
struct Device2 {
    boot: [u8; 16],
    written: [u64; 2],
    size_bytes: u64,
    hash: [u8; 16],
    identity: String,
}

impl Version1 {
    fn into_second(self) -> Version2 {
        let volume = |old: Volume1| Volume2 {
            id: old.id,
            uuid: old.uuid,
            name: old.name,
            size_bytes: old.size_bytes,
            stamp: old.stamp,
            present: old.present,
            device: None,
            capturing: Capturing::On,
        };
        Version2 {
            version: 2,
            group: self.group,
            lineage: self.lineage,
            epoch: self.epoch,
            epoch_start: self.epoch_start,
            epoch_is_full: self.epoch_is_full,
            lease_end: self.lease_end,
            clean: self.clean,
            was_consistent: self.epoch.number > 0 && self.needs_resync.is_none(),
            needs_resync: self.needs_resync,
            gap_in_ring: false,
            given_up: false,
            journal_damaged: self.journal_damaged,
            above_epoch: self.above_epoch,
            above_lsn: self.above_lsn,
            volumes: self.volumes.into_iter().map(volume).collect(),
        }
    }
}

impl Version2 {
    pub(super) fn into_state(self) -> SourceState {
        let volume = |old: Volume2| KnownVolume {
            id: old.id,
            uuid: old.uuid,
            name: old.name,
            size_bytes: old.size_bytes,
            identity: None,
            mark: None,
            unproven: None,
            present: old.present,
            capturing: old.capturing,
        };
        SourceState {
            version: VERSION,
            group: self.group,
            lineage: self.lineage,
            epoch: self.epoch,
            epoch_start: self.epoch_start,
            epoch_is_full: self.epoch_is_full,
            lease_end: self.lease_end,
            clean: self.clean,
            needs_resync: self.needs_resync,
            gap_in_ring: self.gap_in_ring,
            given_up: self.given_up,
            was_consistent: self.was_consistent,
            journal_damaged: self.journal_damaged,
            above_epoch: self.above_epoch,
            above_lsn: self.above_lsn,
            unproven_since: None,
            volumes: self.volumes.into_iter().map(volume).collect(),
        }
    }
}

/// A state of version 1 or 2.
pub(super) fn decode(payload: &[u8], version: u16) -> Option<SourceState> {
    let second = match version {
        1 => postcard::from_bytes::<Version1>(payload).ok()?.into_second(),
        _ => postcard::from_bytes::<Version2>(payload).ok()?,
    };
    Some(second.into_state())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::state::{decode, encode};
    use journal::EpochId;

    fn first() -> Version1 {
        Version1 {
            version: 1,
            group: GroupId([1; 16]),
            lineage: Lineage([2; 16]),
            epoch: Epoch { number: 3, id: EpochId([4; 16]) },
            epoch_start: Lsn(5),
            epoch_is_full: true,
            lease_end: Lsn(6),
            clean: Some(Lsn(7)),
            needs_resync: None,
            journal_damaged: false,
            above_epoch: 8,
            above_lsn: Lsn(9),
            volumes: vec![Volume1 {
                id: VolumeId(1),
                uuid: VolumeUuid([2; 16]),
                name: "v".to_owned(),
                size_bytes: 512,
                stamp: Some([1, 2, 3]),
                present: true,
            }],
        }
    }

    pub(in crate::state) fn second() -> Version2 {
        let mut second = first().into_second();
        second.given_up = true;
        second.volumes[0].capturing = Capturing::Detached;
        second.volumes[0].device = Some(Device2 {
            boot: [1; 16],
            written: [2, 3],
            size_bytes: 512,
            hash: [4; 16],
            identity: "wwid".to_owned(),
        });
        second
    }

    #[test]
    fn states_of_the_first_two_versions_are_read() {
        let state = decode(&postcard::to_stdvec(&first()).unwrap()).unwrap();
        assert_eq!((state.clean, state.above_lsn, state.was_consistent), (Some(Lsn(7)), Lsn(9), true));
        assert!(!state.volumes[0].is_detached() && state.volumes[0].present);
        assert_eq!(state.volumes[0].identity, None);
        assert_eq!(decode(&encode(&state).unwrap()), Some(state));
        let state = decode(&postcard::to_stdvec(&second()).unwrap()).unwrap();
        assert!(state.given_up && state.volumes[0].is_detached());
        assert_eq!(decode(&encode(&state).unwrap()), Some(state));
        assert_eq!(decode(&[99, 0, 0]), None, "of a newer program");
    }
}
