//! What the source must remember across its own death: the two-slot control file `dir/state`.
//!
//! Invariants
//! * No lsn at or above `lease_end` is ever used before a larger lease is durable, so after an unclean end of the
//!   machine the next epoch starts at the lease's end and no lsn is used twice, without asking the peer (DESIGN 6).
//! * `clean` is removed, durably, before the first write of a run is served, and set as the last step of a stop.
//! * `needs_resync` is set, durably, as soon as a gap is known that the ring's own dirty map does not remember, and
//!   is removed only after `resync-end` of a synchronisation of everything has been journaled. `gap_in_ring` says that
//!   the current epoch's ring remembers it after all, as dirty bits: then a new owner of that ring goes on with what is
//!   left of them.
//! * `given_up` is set, durably, before the room of a record is given back that no journal holds and whose range became
//!   dirty bits instead; removed when the journal has a place for its lsn again.

use std::path::Path;
use std::sync::Arc;

use journal::control::TwoSlot;
use journal::io::Disk;
use journal::{Epoch, EpochId, GroupId, Lineage, Lsn, VolumeId, VolumeUuid};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// How far ahead of use the lsn lease is made durable: a write rate of 10^6/s uses it up in an hour.
const LEASE: u64 = 1 << 32;
const VERSION: u16 = 2;

/// Why and since when the replica cannot be trusted to follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The cause, in an operator's words.
    pub cause: String,
    /// Realtime, ns.
    pub since_ns: u64,
}

/// A device at the moment when its capture ended cleanly ([`crate::start::stamp`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStamp {
    /// Which boot.
    pub boot: [u8; 16],
    /// Sectors written and discarded in that boot.
    pub written: [u64; 2],
    /// Size, bytes.
    pub size_bytes: u64,
    /// Of its first and last MiB.
    pub hash: [u8; 16],
    /// What its maker calls it; empty where that is not known.
    pub identity: String,
}

/// A volume as the group knows it; ids are never given to another volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownVolume {
    /// Short id within the stream.
    pub id: VolumeId,
    /// Identity.
    pub uuid: VolumeUuid,
    /// Operator's name.
    pub name: String,
    /// Size when last seen, bytes.
    pub size_bytes: u64,
    /// What tells whether others wrote to it since the clean stop ([`crate::start::stamp::of_path`]); while it is served,
    /// whether it is the same file ([`crate::start::stamp::identity_of`]).
    pub stamp: Option<[u64; 3]>,
    /// False once it left the group.
    pub present: bool,
    /// The same for a device that the kernel module captured.
    pub device: Option<DeviceStamp>,
    /// What the operator wants of it.
    pub capturing: Capturing,
}

/// Whether a volume is to be captured. In the file it is one byte; the first two are the truth value `detached` of programs
/// that did not know the third, and that refuse it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Capturing {
    /// It is.
    On,
    /// The operator took it out, until they attach it again. Its replica stays at a point.
    Detached,
    /// The same in the middle of a synchronisation or of an order, or the epoch began without it: its replica is at no point
    /// of the group, and so none is, until the volume is attached again or leaves the group.
    DetachedBetween,
}

impl KnownVolume {
    /// Whether the operator took it out of capture.
    pub fn is_detached(&self) -> bool {
        self.capturing != Capturing::On
    }
}

/// The remembered state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceState {
    version: u16,
    /// The group's identity.
    pub group: GroupId,
    /// Line of descent.
    pub lineage: Lineage,
    /// Current epoch; number 0 before the first.
    pub epoch: Epoch,
    /// Lsn before the epoch's first.
    pub epoch_start: Lsn,
    /// The epoch begins with the content of every volume, so a receiver that holds nothing may start at it.
    pub epoch_is_full: bool,
    /// Lsns from here on are not covered by the lease.
    pub lease_end: Lsn,
    /// Last lsn of a run that ended cleanly: everything captured was journaled, nothing was in flight.
    pub clean: Option<Lsn>,
    /// A gap that only a synchronisation of everything repairs.
    pub needs_resync: Option<Gap>,
    /// The ring of the current epoch holds that gap as dirty bits.
    pub gap_in_ring: bool,
    /// Records behind the journal's end were released, as dirty bits of the current epoch's ring.
    pub given_up: bool,
    /// A synchronisation has come to its end at least once.
    pub was_consistent: bool,
    /// A frame of the journal is unreadable: the next start sets it aside.
    pub journal_damaged: bool,
    /// The next epoch's number must be above this (the peer has seen it).
    pub above_epoch: u64,
    /// … and its lsns above this.
    pub above_lsn: Lsn,
    /// The volumes.
    pub volumes: Vec<KnownVolume>,
}

/// The state and its file.
pub struct StateFile {
    slots: TwoSlot,
    state: SourceState,
}

impl StateFile {
    /// Opens `dir/state`, or makes one for a new group.
    ///
    /// # Errors
    /// Unreadable or damaged in both slots, or written by a newer program.
    pub fn open(disk: &Arc<dyn Disk>, dir: &Path) -> Result<StateFile> {
        let path = dir.join("state");
        let exists = disk
            .list(dir)
            .map_err(|error| Error::because(ErrorKind::Io, format!("list {}", dir.display()), error))?
            .iter()
            .any(|name| name == "state");
        let (slots, state) = if exists {
            let (slots, payload) = TwoSlot::open(disk, &path)?;
            let state = decode(&payload).ok_or_else(|| {
                let at =
                    format!("{}: not a state that this version reads; use the newer program", path.display());
                Error::new(ErrorKind::Settings, at)
            })?;
            (slots, state)
        } else {
            let state = SourceState::new();
            (TwoSlot::create(disk, &path, &encode(&state)?)?, state)
        };
        Ok(StateFile { slots, state })
    }

    /// What is remembered.
    pub fn get(&self) -> &SourceState {
        &self.state
    }

    /// Changes the state; durable when this returns.
    ///
    /// # Errors
    /// The disk refused: then nothing changed.
    pub fn update(&mut self, change: impl FnOnce(&mut SourceState)) -> Result<()> {
        let mut next = self.state.clone();
        change(&mut next);
        self.slots.store(&encode(&next)?)?;
        self.state = next;
        Ok(())
    }

    /// Starts a new epoch above everything that either side has seen; durable when this returns.
    ///
    /// `last` is the newest lsn known to have been used; an unclean end is covered by the lease.
    ///
    /// # Errors
    /// The disk refused, or the numbers are used up.
    pub fn begin_epoch(&mut self, last: Option<Lsn>, full: bool) -> Result<()> {
        let above = self.state.epoch.number.max(self.state.above_epoch);
        let number = above.checked_add(1).ok_or_else(|| {
            Error::new(ErrorKind::Settings, "epoch numbers are used up; protect the disk as a new group")
        })?;
        let start = last.unwrap_or(self.state.lease_end).max(self.state.above_lsn);
        assert!(start >= self.state.epoch_start, "lsns never run back");
        self.update(|state| {
            state.epoch = Epoch { number, id: EpochId(*uuid::Uuid::new_v4().as_bytes()) };
            state.epoch_start = start;
            state.epoch_is_full = full;
            state.lease_end = Lsn(start.0.saturating_add(LEASE));
            state.clean = None;
            // What the epoch does not copy it does not know: its receiver may be another.
            for known in state.volumes.iter_mut().filter(|known| known.present && known.is_detached()) {
                known.capturing = Capturing::DetachedBetween;
            }
            // Both speak of the ring of the epoch before.
            (state.gap_in_ring, state.given_up) = (false, false);
        })
    }

    /// Extends the lease when `captured` has used up half of it.
    ///
    /// # Errors
    /// The disk refused; the old lease still holds.
    pub fn extend_lease(&mut self, captured: Lsn) -> Result<()> {
        if self.state.lease_end.0.saturating_sub(captured.0) < LEASE / 2 {
            self.update(|state| state.lease_end = Lsn(captured.0.saturating_add(LEASE)))?;
        }
        Ok(())
    }
}

impl SourceState {
    fn new() -> SourceState {
        SourceState {
            version: VERSION,
            group: GroupId(*uuid::Uuid::new_v4().as_bytes()),
            lineage: Lineage(*uuid::Uuid::new_v4().as_bytes()),
            epoch: Epoch::default(),
            epoch_start: Lsn::ZERO,
            epoch_is_full: false,
            lease_end: Lsn::ZERO,
            clean: None,
            needs_resync: None,
            gap_in_ring: false,
            given_up: false,
            was_consistent: false,
            journal_damaged: false,
            above_epoch: 0,
            above_lsn: Lsn::ZERO,
            volumes: Vec::new(),
        }
    }
}

/// The state as version 1 wrote it.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
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

impl From<Version1> for SourceState {
    fn from(old: Version1) -> SourceState {
        let volume = |old: Volume1| KnownVolume {
            id: old.id,
            uuid: old.uuid,
            name: old.name,
            size_bytes: old.size_bytes,
            stamp: old.stamp,
            present: old.present,
            device: None,
            capturing: Capturing::On,
        };
        SourceState {
            version: VERSION,
            group: old.group,
            lineage: old.lineage,
            epoch: old.epoch,
            epoch_start: old.epoch_start,
            epoch_is_full: old.epoch_is_full,
            lease_end: old.lease_end,
            clean: old.clean,
            was_consistent: old.epoch.number > 0 && old.needs_resync.is_none(),
            needs_resync: old.needs_resync,
            gap_in_ring: false,
            given_up: false,
            journal_damaged: old.journal_damaged,
            above_epoch: old.above_epoch,
            above_lsn: old.above_lsn,
            volumes: old.volumes.into_iter().map(volume).collect(),
        }
    }
}

/// Reads any version that we know.
fn decode(payload: &[u8]) -> Option<SourceState> {
    let (version, _) = postcard::take_from_bytes::<u16>(payload).ok()?;
    match version {
        1 => postcard::from_bytes::<Version1>(payload).ok().filter(|old| old.version == 1).map(Into::into),
        VERSION => postcard::from_bytes(payload).ok(),
        _ => None,
    }
}

fn encode(state: &SourceState) -> Result<Vec<u8>> {
    postcard::to_stdvec(state)
        .map_err(|error| Error::because(ErrorKind::Settings, "encode the source state", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::io::RealDisk;

    fn open(dir: &Path) -> StateFile {
        StateFile::open(&(Arc::new(RealDisk) as Arc<dyn Disk>), dir).unwrap()
    }

    #[test]
    fn an_unclean_end_starts_above_the_lease_and_a_clean_one_above_the_last_lsn() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = open(dir.path());
        file.begin_epoch(Some(Lsn::ZERO), true).unwrap();
        let first = file.get().clone();
        assert_eq!((first.epoch.number, first.epoch_start), (1, Lsn::ZERO));
        assert_eq!(first.lease_end, Lsn(1 << 32));
        drop(file);

        let mut file = open(dir.path());
        assert_eq!(file.get(), &first, "survives");
        file.update(|state| state.above_epoch = 7).unwrap();
        file.begin_epoch(None, true).unwrap();
        assert_eq!((file.get().epoch.number, file.get().epoch_start), (8, Lsn(1 << 32)));
        assert_ne!(file.get().epoch.id, first.epoch.id);
    }

    #[test]
    fn a_state_of_the_first_version_is_read() {
        let old = Version1 {
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
        };
        let state = decode(&postcard::to_stdvec(&old).unwrap()).unwrap();
        assert_eq!((state.clean, state.above_lsn, state.was_consistent), (Some(Lsn(7)), Lsn(9), true));
        assert!(!state.volumes[0].is_detached() && state.volumes[0].present);
        assert_eq!(decode(&encode(&state).unwrap()), Some(state));
        assert_eq!(decode(&[99, 0, 0]), None, "of a newer program");
    }

    #[test]
    fn whether_a_volume_is_captured_was_a_truth_value_once() {
        for (capture, byte) in [(Capturing::On, 0), (Capturing::Detached, 1), (Capturing::DetachedBetween, 2)]
        {
            assert_eq!(postcard::to_stdvec(&capture).unwrap(), [byte]);
        }
        assert_eq!(postcard::to_stdvec(&true).unwrap(), [1]);
    }

    #[test]
    fn the_lease_stays_ahead_of_use() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = open(dir.path());
        file.begin_epoch(Some(Lsn::ZERO), true).unwrap();
        file.extend_lease(Lsn(10)).unwrap();
        assert_eq!(file.get().lease_end, Lsn(1 << 32));
        file.extend_lease(Lsn((1 << 31) + 1)).unwrap();
        assert_eq!(file.get().lease_end, Lsn((1 << 31) + 1 + (1 << 32)));
    }
}
