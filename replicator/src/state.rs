//! What the source must remember across its own death: the two-slot control file `dir/state`.
//!
//! Invariants
//! * No lsn at or above `lease_end` is ever used before a larger lease is durable, so after an unclean end of the
//!   machine the next epoch starts at the lease's end and no lsn is used twice, without asking the peer (DESIGN 6).
//! * `clean` is removed, durably, before the first write of a run is served, and set as the last step of a stop.
//! * `needs_resync` is set, durably, as soon as a gap is known that the ring's own dirty map does not remember, and
//!   is removed only after `resync-end` of a synchronisation of everything has been journaled.

use std::path::Path;
use std::sync::Arc;

use journal::control::TwoSlot;
use journal::io::Disk;
use journal::{Epoch, EpochId, GroupId, Lineage, Lsn, VolumeId, VolumeUuid};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// How far ahead of use the lsn lease is made durable: a write rate of 10^6/s uses it up in an hour.
const LEASE: u64 = 1 << 32;
const VERSION: u16 = 1;

/// Why and since when the replica cannot be trusted to follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The cause, in an operator's words.
    pub cause: String,
    /// Realtime, ns.
    pub since_ns: u64,
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
    /// What tells whether others wrote to it since the clean stop ([`crate::start::stamp`]).
    pub stamp: Option<[u64; 3]>,
    /// False once it left the group.
    pub present: bool,
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
            let state =
                postcard::from_bytes::<SourceState>(&payload).ok().filter(|state| state.version == VERSION);
            let state = state.ok_or_else(|| {
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
            journal_damaged: false,
            above_epoch: 0,
            above_lsn: Lsn::ZERO,
            volumes: Vec::new(),
        }
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
