//! Volumes: what a batch's volume records mean for the group's replicas, decided before anything is written.
//!
//! ⚠ Before, since a batch whose undo stands must be redone exactly: one that can never be carried out would
//! be met again for ever, and no later epoch could get past it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use journal::VolumeId;
use journal::record::{MAX_VOLUMES, VolumeRecord};

use crate::state::ReplicaState;
use crate::{Error, ErrorKind, Result};

/// The largest volume that is taken: 1 PiB, beyond every disk, and small enough that no sum or product of
/// sizes overflows. A replica is never shrunk, so a size that a broken source names once would stay.
pub const MAX_VOLUME_BYTES: u64 = 1 << 50;

/// What is to be done for the volumes of a batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct VolumePlan {
    /// Replicas to be created, with the size that they are announced with first.
    pub new: Vec<ReplicaState>,
    /// Sizes that replicas must have, new ones included.
    pub sizes: BTreeMap<VolumeId, u64>,
}

/// Decides. `known` are the group's replicas; `place` says where a new volume's replica goes, if it may go
/// there.
///
/// # Errors
/// [`ErrorKind::ReplicaFailed`], saying what the operator may do: another volume under a known id or name, a
/// smaller one, too many.
pub fn plan<'a>(
    known: &[ReplicaState],
    records: impl Iterator<Item = (VolumeId, &'a VolumeRecord)>,
    mut place: impl FnMut(&str) -> Result<PathBuf>,
) -> Result<VolumePlan> {
    let mut plan = VolumePlan::default();
    // A volume that left stays as it was; it may come back.
    for (id, record) in records.filter(|(_, record)| record.present) {
        let VolumeRecord { uuid, size_bytes, name, .. } = record;
        let refuse = |what: String| {
            Err(Error::new(ErrorKind::ReplicaFailed, format!("replica of volume {name}: {what}")))
        };
        let anew = "to give up the old content and have it made anew, stop the receiver, put an empty file in the replica's \
                    place, and synchronise";
        if *size_bytes > MAX_VOLUME_BYTES {
            return refuse(format!("the source says {size_bytes} bytes, and the most is {MAX_VOLUME_BYTES}"));
        }
        let mut all = known.iter().chain(&plan.new);
        if let Some(have) = all.clone().find(|have| have.id == id) {
            let from = plan.sizes.get(&id).copied().unwrap_or(have.size_bytes);
            if have.uuid != *uuid {
                return refuse(format!(
                    "the source now sends volume {uuid} under its id {id}, which is {} here; {anew}",
                    have.uuid
                ));
            }
            if *size_bytes < from {
                return refuse(format!(
                    "the source shrank from {from} to {size_bytes} bytes, a replica is never shrunk; {anew}"
                ));
            }
        } else if let Some(other) = all.find(|other| other.name == *name) {
            return refuse(format!(
                "the source sends it under id {id}; it is known under id {}; {anew}",
                other.id
            ));
        } else if known.len() + plan.new.len() >= MAX_VOLUMES {
            return refuse(format!("a group may have {MAX_VOLUMES} volumes, and has them already"));
        } else {
            plan.new.push(ReplicaState {
                id,
                uuid: *uuid,
                name: name.clone(),
                path: place(name)?,
                size_bytes: *size_bytes,
                created: false,
                stamp: None,
            });
        }
        plan.sizes.insert(id, *size_bytes);
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::VolumeUuid;

    fn record(byte: u8, size_bytes: u64, name: &str) -> VolumeRecord {
        let uuid = VolumeUuid([byte; 16]);
        VolumeRecord { uuid, size_bytes, sector_bytes: 512, present: true, name: name.into() }
    }

    fn planned(known: &[ReplicaState], records: &[(u32, VolumeRecord)]) -> Result<VolumePlan> {
        let records = records.iter().map(|(id, record)| (VolumeId(*id), record));
        plan(known, records, |name| Ok(PathBuf::from(format!("/r/{name}.img"))))
    }

    #[test]
    fn volumes_are_created_once_and_grow_only() {
        let gone = VolumeRecord { present: false, ..record(9, 512, "gone") };
        let made = planned(
            &[],
            &[(0, record(1, 512, "a")), (1, record(2, 1024, "b")), (0, record(1, 2048, "a")), (9, gone)],
        )
        .unwrap();
        let sizes: Vec<(u32, u64)> = made.new.iter().map(|new| (new.id.0, new.size_bytes)).collect();
        assert_eq!(sizes, [(0, 512), (1, 1024)]);
        assert_eq!(made.sizes, [(VolumeId(0), 2048), (VolumeId(1), 1024)].into());
        let known = made.new;
        let again = planned(&known, &[(0, record(1, 512, "a"))]).unwrap();
        assert_eq!((again.new.len(), again.sizes[&VolumeId(0)]), (0, 512));
        for (id, bad, what) in [
            (0, record(1, 256, "a"), "shrank"),
            (0, record(3, 512, "a"), "now sends volume"),
            (5, record(1, 512, "a"), "known under id 0"),
        ] {
            let error = planned(&known, &[(id, bad)]).unwrap_err();
            assert_eq!(error.kind, ErrorKind::ReplicaFailed);
            assert!(error.at.contains(what) && error.at.contains("empty file"), "{}", error.at);
        }
        for far in [MAX_VOLUME_BYTES + 512, i64::MAX as u64 - 511] {
            let error = planned(&known, &[(0, record(1, far, "a"))]).unwrap_err();
            assert!(error.at.contains("the most is 1125899906842624"), "{}", error.at);
        }
        let both = [(0, record(1, 2048, "a")), (0, record(1, 1024, "a"))];
        assert!(planned(&known, &both).unwrap_err().at.contains("shrank from 2048 to 1024"));
    }

    #[test]
    fn a_group_has_so_many_volumes_and_no_more() {
        let records: Vec<(u32, VolumeRecord)> = (0..=u32::try_from(MAX_VOLUMES).unwrap())
            .map(|id| (id, record(u8::try_from(id).unwrap(), 512, &format!("v{id}"))))
            .collect();
        assert_eq!(planned(&[], &records[..MAX_VOLUMES]).unwrap().new.len(), MAX_VOLUMES);
        assert!(planned(&[], &records).unwrap_err().at.contains("64 volumes"));
    }
}
