//! What the source must remember across its own death: the two-slot control file `dir/state`, and
//! `dir/state.copy`.
//!
//! The copy is written before the file when that changes which is needed to find the way back: group,
//! lineage, epoch, lease, volumes. Where the file is gone, or both its slots are damaged, the copy takes its
//! place, in doubt. A file with one damaged slot is in doubt as well: the other one may be older than the
//! last store. In doubt there is no clean mark, a gap is remembered that only a synchronisation repairs, and
//! lsns go on above another lease.
//!
//! Invariants
//! * No lsn at or above `lease_end` is ever used before a larger lease is durable, so after an unclean end of
//!   the machine the next epoch starts at the lease's end and no lsn is used twice, without asking the peer
//!   (DESIGN 6).
//! * `clean` is removed, durably, before the first write of a run is served, and set as the last step of a
//!   stop.
//! * `needs_resync` is set, durably, as soon as a gap is known that the ring's own dirty map does not
//!   remember, and is removed only after `resync-end` of a synchronisation of everything has been journaled.
//!   `gap_in_ring` says that the current epoch's ring remembers it after all, as dirty bits: then a new owner
//!   of that ring goes on with what is left of them.
//! * `unproven_since` is set, durably, with the first volume whose content is in doubt. While it is set, each
//!   `resync-begin` names it: what is synchronised may be the very difference that a comparison would find.
//!   It is removed when a comparison has found no difference, or with the end of a synchronisation that
//!   leaves no volume in doubt.
//! * `given_up` is set, durably, before the room of a record is given back that no journal holds and whose
//!   range became dirty bits instead; removed when the journal has a place for its lsn again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::control::{TwoSlot, payload_bytes};
use journal::io::Disk;
use journal::record::InDoubt;
use journal::{Epoch, EpochId, GroupId, Lineage, Lsn, VolumeId, VolumeUuid};
use machine::disk::{Continuity, DiskIdentity};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::cause;
use crate::error::{Error, ErrorKind, Result, describe};

/// How far ahead of use the lsn lease is made durable: a write rate of 10^6/s uses it up in an hour.
const LEASE: u64 = 1 << 32;
const VERSION: u16 = 3;
/// Size of a slot. A volume takes up to 700 bytes: 64 with the longest of everything have room in three
/// quarters of it. Files with smaller slots are read, and enlarged where there is room.
const SLOT_BYTES: usize = 64 << 10;
/// Volumes that a group may have known in all, present or not: their ids are never given to others, and the
/// receiver keeps a replica of each.
pub const MAX_VOLUMES: usize = journal::record::MAX_VOLUMES;
/// Names of the files.
const FILE: &str = "state";
const COPY: &str = "state.copy";
/// Why a volume's content is to be compared is kept up to this many bytes.
const REASON_BYTES: usize = 160;

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
    /// Which disk it is; `None` before it was seen by a version that asks.
    pub identity: Option<DiskIdentity>,
    /// What it was when capture ended cleanly.
    pub mark: Option<Continuity>,
    /// Why nothing proves that it holds what was captured: its content is to be compared, while replication
    /// goes on.
    pub unproven: Option<String>,
    /// False once it left the group.
    pub present: bool,
    /// What the operator wants of it.
    pub capturing: Capturing,
}

/// Whether a volume is to be captured. In the file it is one byte; the first two are the truth value
/// `detached` of programs that did not know the third, and that refuse it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Capturing {
    /// It is.
    On,
    /// The operator took it out, until they attach it again. Its replica stays at a point.
    Detached,
    /// The same in the middle of a synchronisation or of an order, or the epoch began without it: its replica
    /// is at no point of the group, and so none is, until the volume is attached again or leaves the group.
    DetachedBetween,
}

impl KnownVolume {
    /// Its content is to be compared; the first reason stays.
    pub fn doubt(&mut self, why: &str) {
        let end = (0..=why.len().min(REASON_BYTES)).rev().find(|at| why.is_char_boundary(*at)).unwrap_or(0);
        self.unproven.get_or_insert_with(|| why[..end].to_owned());
    }

    /// Whether the operator took it out of capture.
    pub fn is_detached(&self) -> bool {
        self.capturing != Capturing::On
    }
}

mod older;

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
    /// Since when the content of a volume was in doubt, while points since then may lack what others wrote.
    pub unproven_since: Option<InDoubt>,
    /// The volumes.
    pub volumes: Vec<KnownVolume>,
}

/// The state and its file.
pub struct StateFile {
    slots: TwoSlot,
    /// None where it could not be made; tried again at the next store.
    copy: Option<TwoSlot>,
    /// The copy holds what the file holds, as far as it must.
    copied: bool,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    durable: watch::Sender<Arc<SourceState>>,
    state: Arc<SourceState>,
}

/// What the source remembers, as it was last made durable. Reading it never waits for the file's disk.
#[derive(Clone, Debug)]
pub struct Remembered(watch::Receiver<Arc<SourceState>>);

impl Remembered {
    /// The newest state that is durable.
    pub fn get(&self) -> Arc<SourceState> {
        self.0.borrow().clone()
    }
}

impl StateFile {
    /// Opens `dir/state`, or makes one for a new group.
    ///
    /// # Errors
    /// Damaged beyond what the copy can mend, or written by a newer program; the disk's.
    pub fn open(disk: &Arc<dyn Disk>, dir: &Path) -> Result<StateFile> {
        let names = disk
            .list(dir)
            .map_err(|error| Error::because(ErrorKind::Io, format!("list {}", dir.display()), error))?;
        let has = |wanted: &str| names.iter().any(|name| name == wanted);
        if !has(FILE) && !has(COPY) {
            return StateFile::create(disk, dir, SourceState::new());
        }
        match read(disk, &dir.join(FILE)) {
            Ok((slots, state)) => {
                let was_damaged = slots.was_damaged();
                let slots = slots.grown(disk, &encode(&state)?, SLOT_BYTES)?;
                let copy = read(disk, &dir.join(COPY)).ok();
                let copied = copy.as_ref().is_some_and(|(_, copy)| is_copied(copy, &state));
                let copy = copy.map(|(slots, _)| slots);
                let mut file = StateFile { copy, copied, ..StateFile::new(disk, dir, slots, state) };
                if was_damaged {
                    // In one step with the repair of the damaged slot.
                    file.update(|state| {
                        state.doubt("one of two slots of the control file `state` was damaged")
                    })?;
                } else if !file.copied {
                    file.store_copy(&file.state.clone());
                }
                Ok(file)
            }
            Err(error) if is_lost(&error) => StateFile::from_copy(disk, dir, &error, has(FILE)),
            Err(error) => Err(error),
        }
    }

    /// A new file, and its copy.
    fn create(disk: &Arc<dyn Disk>, dir: &Path, state: SourceState) -> Result<StateFile> {
        let slots = TwoSlot::create_sized(disk, &dir.join(FILE), &encode(&state)?, SLOT_BYTES)?;
        let mut file = StateFile::new(disk, dir, slots, state);
        file.store_copy(&file.state.clone());
        Ok(file)
    }

    fn new(disk: &Arc<dyn Disk>, dir: &Path, slots: TwoSlot, state: SourceState) -> StateFile {
        let (disk, dir, state) = (disk.clone(), dir.to_owned(), Arc::new(state));
        let durable = watch::Sender::new(state.clone());
        StateFile { slots, copy: None, copied: false, disk, dir, durable, state }
    }

    /// The copy takes the place of a file that is gone or damaged in both slots, which is put aside. A crash
    /// in between finds no file, and comes here again.
    fn from_copy(disk: &Arc<dyn Disk>, dir: &Path, why: &Error, exists: bool) -> Result<StateFile> {
        let (path, copy) = (dir.join(FILE), dir.join(COPY));
        let mut state = match read(disk, &copy) {
            Ok((_, state)) => state,
            Err(error) if is_lost(&error) => {
                let at = format!(
                    "neither {} nor {} holds a whole state, so this source does not know any more who it is. Bring one of \
                     them back from a backup; or go on as a new group: 1. move both files and {} to another directory, \
                     2. choose a new `group` in the settings, 3. add that name to `groups` of this source in the receiver's \
                     settings and restart the receiver, 4. start again: everything is synchronised once, and the receiver \
                     keeps the history of the old group under its old name",
                    path.display(),
                    copy.display(),
                    dir.join("journal").display()
                );
                return Err(Error::because(ErrorKind::Settings, at, describe(why)));
            }
            Err(error) => return Err(error),
        };
        if exists {
            let aside = dir.join("state.damaged");
            disk.rename(&path, &aside).map_err(|error| {
                Error::because(ErrorKind::Io, format!("put {} aside", path.display()), error)
            })?;
        }
        tracing::error!(
            why = describe(why),
            "the control file {} cannot be read; its copy takes its place, and everything is compared",
            path.display()
        );
        state.doubt("the control file `state` was lost or damaged");
        StateFile::create(disk, dir, state)
    }

    /// What is remembered.
    pub fn get(&self) -> &SourceState {
        &self.state
    }

    /// The same for those who must not wait for the disk: they read while an update is under way.
    pub fn remembered(&self) -> Remembered {
        Remembered(self.durable.subscribe())
    }

    /// Changes the state; durable, and to be read by all, when this returns.
    ///
    /// # Errors
    /// The disk refused: then nothing changed.
    pub fn update(&mut self, change: impl FnOnce(&mut SourceState)) -> Result<()> {
        let mut next = SourceState::clone(&self.state);
        change(&mut next);
        if let Some(gap) = &mut next.needs_resync {
            gap.cause = cause::bounded(&gap.cause);
        }
        let payload = encode(&next)?;
        // Crash order: the copy first, so that its lease is never behind what is used.
        if !self.copied || !is_copied(&self.state, &next) {
            self.store_copy(&next);
        }
        self.slots.store(&payload)?;
        self.state = Arc::new(next);
        self.durable.send_replace(self.state.clone());
        Ok(())
    }

    /// Best effort: an old copy costs lsns that are used twice at most where the file is lost as well, and
    /// receivers refuse those.
    fn store_copy(&mut self, state: &SourceState) {
        let path = self.dir.join(COPY);
        let stored = encode(state).and_then(|payload| match self.copy.take() {
            Some(mut copy) if payload.len() <= copy.max_payload_bytes() => {
                copy.store(&payload)?;
                Ok(copy)
            }
            _ => {
                match self.disk.remove(&path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        let at = format!("remove {}", path.display());
                        return Err(Error::because(ErrorKind::Io, at, error));
                    }
                    _ => {}
                }
                Ok(TwoSlot::create_sized(&self.disk, &path, &payload, SLOT_BYTES)?)
            }
        });
        match stored {
            Ok(copy) => (self.copy, self.copied) = (Some(copy), true),
            Err(error) => {
                self.copied = false;
                tracing::warn!(
                    error = describe(&error),
                    "the copy of the control file `state` cannot be written now"
                );
            }
        }
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
            // An epoch begins with a comparison of everything.
            state.volumes.iter_mut().for_each(|known| known.unproven = None);
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
            unproven_since: None,
            volumes: Vec::new(),
        }
    }
}

impl SourceState {
    /// A comparison has found no difference, or a synchronisation has repaired what was in doubt.
    pub fn forget_doubt(&mut self) {
        if self.volumes.iter().all(|known| known.unproven.is_none()) {
            self.unproven_since = None;
        }
    }

    /// What was read may be older than what was last stored.
    fn doubt(&mut self, why: &str) {
        self.clean = None;
        let known = self.needs_resync.take();
        let since_ns = known.as_ref().map_or_else(crate::clock::now_ns, |gap| gap.since_ns);
        let cause = cause::join(known.iter().map(|gap| gap.cause.as_str()).chain([why]));
        self.needs_resync = Some(Gap { cause, since_ns });
        self.gap_in_ring = false;
        // One lease may have been extended since.
        self.lease_end = Lsn(self.lease_end.0.saturating_add(LEASE));
    }
}

/// Whether `copy` holds of `state` what is needed to find the way back.
fn is_copied(copy: &SourceState, state: &SourceState) -> bool {
    let volumes = |state: &SourceState| -> Vec<_> {
        let each = state.volumes.iter();
        each.map(|known| (known.id, known.uuid, known.name.clone(), known.size_bytes, known.present))
            .collect()
    };
    let rest = |state: &SourceState| {
        (state.group, state.lineage, state.epoch, state.lease_end, state.above_epoch, state.above_lsn)
    };
    rest(copy) == rest(state) && volumes(copy) == volumes(state)
}

/// Whether a control file is gone or damaged in both slots.
fn is_lost(error: &Error) -> bool {
    let behind = std::error::Error::source(error).and_then(|source| source.downcast_ref::<journal::Error>());
    behind
        .is_some_and(|error| matches!(error.kind, journal::ErrorKind::Corrupt | journal::ErrorKind::NotHeld))
}

fn read(disk: &Arc<dyn Disk>, path: &Path) -> Result<(TwoSlot, SourceState)> {
    let (slots, payload) = TwoSlot::open(disk, path)
        .map_err(|error| Error::because(ErrorKind::Io, format!("read {}", path.display()), error))?;
    let state = decode(&payload).ok_or_else(|| {
        let at = format!("{}: not a state that this version reads; use the newer program", path.display());
        Error::new(ErrorKind::Settings, at)
    })?;
    Ok((slots, state))
}

/// The group that a control file's payload speaks of.
pub(crate) fn group_in(payload: &[u8]) -> Option<GroupId> {
    decode(payload).map(|state| state.group)
}

/// Reads any version that we know.
fn decode(payload: &[u8]) -> Option<SourceState> {
    let (version, _) = postcard::take_from_bytes::<u16>(payload).ok()?;
    match version {
        1 | 2 => older::decode(payload, version),
        VERSION => postcard::from_bytes(payload).ok(),
        _ => None,
    }
}

fn encode(state: &SourceState) -> Result<Vec<u8>> {
    let payload = postcard::to_stdvec(state)
        .map_err(|error| Error::because(ErrorKind::Settings, "encode the source state", error))?;
    let most = payload_bytes(SLOT_BYTES);
    if payload.len() > most {
        let at = format!(
            "the state of {} volumes takes {} bytes of {most}: protect some of them as another group",
            state.volumes.len(),
            payload.len()
        );
        return Err(Error::new(ErrorKind::Settings, at));
    }
    Ok(payload)
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
    fn reasons_are_bounded_and_the_first_stays() {
        let mut known = older::tests::second().into_state().volumes.remove(0);
        known.doubt(&"ä".repeat(300));
        assert_eq!(known.unproven.as_ref().map(String::len), Some(REASON_BYTES));
        known.doubt("another");
        assert!(known.unproven.is_some_and(|why| why.starts_with('ä')));
    }

    #[test]
    fn whether_a_volume_is_captured_was_a_truth_value_once() {
        for (capture, byte) in [(Capturing::On, 0), (Capturing::Detached, 1), (Capturing::DetachedBetween, 2)]
        {
            assert_eq!(postcard::to_stdvec(&capture).unwrap(), [byte]);
        }
        assert_eq!(postcard::to_stdvec(&true).unwrap(), [1]);
    }

    fn volume(at: u32) -> KnownVolume {
        use machine::disk::continuity::{Counters, Times};
        use machine::disk::identity::{Backing, DeviceIdentity, FileIdentity};
        let most = u64::MAX;
        let file = FileIdentity {
            inode: most,
            born_ns: Some(most),
            handle: Some(most),
            fs_uuid: Some([9; 16]),
            fs_id: most,
        };
        let device = DeviceIdentity {
            name: "i".repeat(96),
            start_sectors: Some(most),
            backing: Some(Backing { file: Some(file), told: (most, most), part: (most, most) }),
            number: most,
            sequence: most,
            boot: [9; 16],
        };
        let times = Times { modified_ns: most, changed_ns: most, is_remote: true, is_shared: true };
        let mark = Continuity {
            boot: [9; 16],
            size_bytes: most,
            ends: Some([9; 16]),
            times: Some(times),
            counters: Some(Counters { sequence: most, own: [most; 2], direct: [most; 2] }),
        };
        KnownVolume {
            id: VolumeId(at),
            uuid: VolumeUuid([7; 16]),
            name: format!("{at:064}"),
            size_bytes: most,
            identity: Some(DiskIdentity::Device(device)),
            mark: Some(mark),
            unproven: Some("u".repeat(REASON_BYTES)),
            present: true,
            capturing: Capturing::On,
        }
    }

    #[test]
    fn the_largest_group_and_the_longest_cause_have_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = open(dir.path());
        file.update(|state| {
            state.volumes = (0..u32::try_from(MAX_VOLUMES).unwrap()).map(volume).collect();
            state.needs_resync = Some(Gap { cause: "ä".repeat(20_000), since_ns: 1 });
        })
        .unwrap();
        let kept = file.get().clone();
        assert!(encode(&kept).unwrap().len() < payload_bytes(SLOT_BYTES) / 4 * 3, "a quarter stays free");
        assert!(kept.needs_resync.as_ref().unwrap().cause.len() <= cause::MAX_BYTES);
        drop(file);
        assert_eq!(open(dir.path()).get(), &kept);
        let too_much = open(dir.path()).update(|state| state.volumes = (0..1000).map(volume).collect());
        assert!(too_much.unwrap_err().to_string().contains("another group"));
    }

    #[test]
    fn a_file_with_the_small_slots_of_older_programs_grows() {
        let dir = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let old = SourceState { clean: Some(Lsn(3)), ..SourceState::new() };
        drop(TwoSlot::create(&disk, &dir.path().join(FILE), &encode(&old).unwrap()).unwrap());
        let mut file = open(dir.path());
        assert_eq!(file.get(), &old, "nothing is in doubt");
        file.update(|state| state.volumes = (0..64).map(volume).collect()).unwrap();
        drop(file);
        assert_eq!(open(dir.path()).get().volumes.len(), 64);
    }

    /// Damages a slot of a file.
    fn damage(path: &Path, slot: usize) {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[slot * SLOT_BYTES + 100] ^= 255;
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn one_damaged_slot_is_a_doubt_that_outlives_the_start() {
        for slot in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let mut file = open(dir.path());
            file.begin_epoch(Some(Lsn::ZERO), true).unwrap();
            let newest = file.get().clone();
            for _ in 0..2 {
                file.update(|state| state.clean = Some(Lsn(5))).unwrap();
            }
            drop(file);
            damage(&dir.path().join(FILE), slot);
            for _ in 0..2 {
                let file = open(dir.path());
                let found = file.get();
                assert_eq!((found.group, found.epoch, found.clean), (newest.group, newest.epoch, None));
                assert!(found.needs_resync.as_ref().unwrap().cause.contains("damaged"));
                assert_eq!(found.lease_end, Lsn(2 << 32), "above what the damaged slot may have leased");
            }
        }
    }

    use journal::sim_disk::SimDisk;

    /// What a source does with its state until the power goes at operation `cut`; the last that it was told
    /// is durable.
    fn live(sim: &SimDisk, cut: u64) -> Option<SourceState> {
        sim.create_dir(Path::new("/d")).unwrap();
        sim.cut_at(cut);
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        let mut file = StateFile::open(&disk, Path::new("/d")).ok()?;
        let mut held = None;
        for step in 0..12_u64 {
            // The copy is written as well as it can be: only the disk knows whether the power is there.
            if sim.ops() > cut {
                return held;
            }
            held = Some(file.get().clone());
            let done = match step % 4 {
                0 => file.begin_epoch(Some(Lsn(step << 33)), true),
                1 => file.update(|state| state.volumes = vec![volume(u32::try_from(step).unwrap_or(0))]),
                2 => file.extend_lease(Lsn(file.get().lease_end.0 - 1)),
                _ => file.update(|state| state.clean = Some(Lsn(step))),
            };
            if done.is_err() {
                return held;
            }
        }
        Some(file.get().clone())
    }

    /// Two files, one order: the copy first. Cut anywhere, the file is the last that was durable or the one
    /// in flight; and without the file the copy knows who the source is, and leases no lsn that was used.
    #[test]
    fn file_and_copy_agree_wherever_the_power_goes() {
        let open_on = |sim: &SimDisk, at: &str| {
            StateFile::open(&(Arc::new(sim.clone()) as Arc<dyn Disk>), Path::new("/d"))
                .unwrap_or_else(|error| panic!("{at}: {error}"))
        };
        let whole = SimDisk::new();
        assert_eq!(live(&whole, u64::MAX - 1).unwrap().epoch.number, 3);
        for cut in 0..whole.ops() {
            let sim = SimDisk::new();
            let Some(held) = live(&sim, cut) else { continue };
            for seed in 0..4 {
                let at = format!("cut {cut} seed {seed}");
                let after = sim.crash(seed);
                let found = open_on(&after, &at).get().clone();
                assert_eq!((found.group, found.lineage), (held.group, held.lineage), "{at}");
                assert!(found.lease_end >= held.lease_end, "{at}: a lease that was used");
                // At most the epoch in flight is there as well, and none has two ids.
                assert!(found.epoch.number <= held.epoch.number + 1, "{at}");
                assert!(found.epoch.number > held.epoch.number || found.epoch == held.epoch, "{at}");
                for lost in [sim.crash(seed), after.crash(0)] {
                    lost.remove(&Path::new("/d").join(FILE)).unwrap();
                    let found = open_on(&lost, &at).get().clone();
                    assert_eq!((found.group, found.lineage), (held.group, held.lineage), "{at}: the copy");
                    assert!(found.needs_resync.is_some(), "{at}: a copy is a doubt");
                    assert!(found.lease_end >= held.lease_end, "{at}: the copy's lease was used");
                    assert!(found.epoch.number >= held.epoch.number, "{at}: the copy's epoch is of before");
                }
            }
        }
    }

    #[test]
    fn the_copy_takes_the_place_of_a_lost_file_and_without_it_there_is_advice() {
        for gone in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (path, copy) = (dir.path().join(FILE), dir.path().join(COPY));
            let mut file = open(dir.path());
            file.begin_epoch(Some(Lsn::ZERO), true).unwrap();
            file.update(|state| state.volumes = vec![volume(0)]).unwrap();
            file.update(|state| state.clean = Some(Lsn(5))).unwrap();
            let before = file.get().clone();
            drop(file);
            let lose = || match gone {
                true => std::fs::remove_file(&path).unwrap(),
                false => (0..2).for_each(|slot| damage(&path, slot)),
            };
            lose();
            let file = open(dir.path());
            let found = file.get().clone();
            drop(file);
            assert_eq!((found.group, found.lineage), (before.group, before.lineage));
            assert_eq!((found.epoch, &found.volumes), (before.epoch, &before.volumes));
            assert!(found.clean.is_none() && found.needs_resync.is_some());
            assert_eq!(open(dir.path()).get(), &found, "it is the file again");

            lose();
            (0..2).for_each(|slot| damage(&copy, slot));
            let refused = StateFile::open(&(Arc::new(RealDisk) as Arc<dyn Disk>), dir.path()).err().unwrap();
            for told in [path.display().to_string(), copy.display().to_string(), "new `group`".to_owned()] {
                assert!(refused.to_string().contains(&told), "{refused}");
            }
        }
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
