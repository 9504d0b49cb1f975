//! Room: what a group may take of a disk that all groups of a receiver share.
//!
//! Two rules. A group's replica images, journal and undo together stay below its `max_bytes`, where the
//! settings say one. And the last room of a file system is divided before it is needed: once what is free
//! falls below a floor, each group may grow by its own slice of it and no further. So a group that floods the
//! disk stops, and the others go on being acknowledged.
//!
//! A mark is the size that a group had when the floor was reached; it is forgotten when there is room again,
//! and at a restart. Replicas on block devices take none of this room.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use journal::io::Disk;
use machine::Mutex;

/// What each group may still grow by when the floor is reached; less on a small file system.
const SLICE_BYTES: u64 = 1 << 30;
/// The floor is at most this part of a file system.
const FLOOR_PART: u64 = 4;
/// Of a group's `max_bytes` history leaves so much: room for what arrives until history is shortened.
const SLACK_PART: u64 = 8;

/// What the groups of a receiver share.
#[derive(Debug)]
pub struct Rooms {
    /// Groups that the settings name, whether or not they exist yet.
    groups: u64,
    marks: Mutex<BTreeMap<String, u64>>,
}

/// The room of one group. Its apply thread measures, its ingest thread asks.
pub struct GroupRoom {
    rooms: Arc<Rooms>,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    name: String,
    max_bytes: Option<u64>,
    /// Left below all slices to applying what was received.
    reserve_bytes: u64,
    replica_bytes: AtomicU64,
    undo_bytes: AtomicU64,
    journal_bytes: AtomicU64,
    /// Why nothing is applied for want of room.
    stalled: Mutex<Option<String>>,
}

impl Rooms {
    /// Of so many groups.
    pub fn new(groups: usize) -> Arc<Rooms> {
        Arc::new(Rooms { groups: groups as u64, marks: Mutex::default() })
    }
}

impl GroupRoom {
    /// The room of a group whose directory is `dir`.
    pub fn new(
        rooms: Arc<Rooms>,
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        name: &str,
        max_bytes: Option<u64>,
        reserve_bytes: u64,
    ) -> Arc<GroupRoom> {
        Arc::new(GroupRoom {
            rooms,
            disk,
            dir,
            name: name.to_owned(),
            max_bytes,
            reserve_bytes,
            replica_bytes: AtomicU64::new(0),
            undo_bytes: AtomicU64::new(0),
            journal_bytes: AtomicU64::new(0),
            stalled: Mutex::default(),
        })
    }

    /// Whether any rule holds here, so that measuring is worth its while.
    pub fn is_limited(&self) -> bool {
        self.max_bytes.is_some() || self.rooms.groups > 1
    }

    /// Replicas and undo take so much.
    pub fn measured(&self, replica_bytes: u64, undo_bytes: u64) {
        self.replica_bytes.store(replica_bytes, Ordering::Relaxed);
        self.undo_bytes.store(undo_bytes, Ordering::Relaxed);
    }

    /// The journal takes so much.
    pub fn journal_takes(&self, bytes: u64) {
        self.journal_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Nothing is applied for want of room, or that is over: then nothing is taken either.
    pub fn set_stalled(&self, why: Option<String>) {
        *self.stalled.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// Why nothing is applied, if so.
    pub fn stalled(&self) -> Option<String> {
        self.stalled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What history may take, given what the settings say of it.
    pub fn history_quota(&self, quota_bytes: Option<u64>) -> Option<u64> {
        let Some(max_bytes) = self.max_bytes else { return quota_bytes };
        let taken = self.replica_bytes.load(Ordering::Relaxed);
        let left = (max_bytes - max_bytes / SLACK_PART).saturating_sub(taken);
        Some(quota_bytes.map_or(left, |quota_bytes| quota_bytes.min(left)))
    }

    fn used_bytes(&self) -> u64 {
        let parts = [&self.replica_bytes, &self.undo_bytes, &self.journal_bytes];
        parts.iter().map(|part| part.load(Ordering::Relaxed)).fold(0, u64::saturating_add)
    }

    /// Why the group may not take `need` bytes more.
    pub fn refusal(&self, need: u64) -> Option<String> {
        let used = self.used_bytes();
        let then = used.saturating_add(need);
        if let Some(max_bytes) = self.max_bytes.filter(|max_bytes| then > *max_bytes) {
            return Some(format!(
                "the group takes {used} bytes here (replica, journal, history), up to {need} more are due, and max_bytes of its \
                 source is {max_bytes}: raise max_bytes, or keep less history"
            ));
        }
        if self.rooms.groups < 2 {
            return None;
        }
        // Where the room cannot be known the disk itself will say that it is full.
        let room = self.disk.room(&self.dir).ok().flatten()?;
        let slices = self.rooms.groups.saturating_mul(SLICE_BYTES);
        let floor = slices.saturating_add(self.reserve_bytes).min(room.total_bytes / FLOOR_PART);
        let slice = floor.saturating_sub(self.reserve_bytes.min(floor / 4)) / self.rooms.groups;
        let mut marks = self.rooms.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if room.free_bytes.saturating_sub(need) >= floor {
            marks.remove(&self.name);
            return None;
        }
        let mark = *marks.entry(self.name.clone()).or_insert(used);
        (then.saturating_sub(mark) > slice).then(|| {
            format!(
                "no room: {} bytes are free on the receiver's disk, and of the last {floor} each of its {} groups may take {slice}, \
                 which this one has: free space there",
                room.free_bytes, self.rooms.groups
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::sim_disk::SimDisk;
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    fn room(rooms: &Arc<Rooms>, disk: &SimDisk, name: &str, max_bytes: Option<u64>) -> Arc<GroupRoom> {
        let dir = PathBuf::from("/groups").join(name);
        disk.create_dir(&dir).unwrap();
        GroupRoom::new(rooms.clone(), Arc::new(disk.clone()), dir, name, max_bytes, MIB)
    }

    #[test]
    fn replica_journal_and_undo_count_in_one_quota() {
        let room = room(&Rooms::new(1), &SimDisk::new(), "g", Some(100 * MIB));
        assert!(room.is_limited());
        room.measured(50 * MIB, 20 * MIB);
        room.journal_takes(20 * MIB);
        assert_eq!(room.refusal(10 * MIB), None);
        let why = room.refusal(10 * MIB + 1).unwrap();
        assert!(why.contains("max_bytes") && why.contains("94371840"), "{why}");
        assert_eq!(room.history_quota(None), Some(100 * MIB - 100 * MIB / SLACK_PART - 50 * MIB));
        assert_eq!(room.history_quota(Some(MIB)), Some(MIB));
        room.measured(200 * MIB, 0);
        assert_eq!(room.history_quota(None), Some(0), "the replica leaves none");
    }

    #[test]
    fn one_group_never_takes_the_last_room_of_another() {
        let disk = SimDisk::new();
        let rooms = Rooms::new(2);
        let (flood, quiet) = (room(&rooms, &disk, "flood", None), room(&rooms, &disk, "quiet", None));
        disk.set_capacity(Some(64 * MIB));
        let file = Path::new("/groups/flood/file");
        let mut taken = 0;
        let refused = loop {
            flood.journal_takes(taken);
            match flood.refusal(MIB) {
                Some(why) => break why,
                None => taken += MIB,
            }
            assert!(taken <= 64 * MIB, "it takes all");
            disk.put(file, vec![0; usize::try_from(taken).unwrap()]);
        };
        assert!(refused.contains("2 groups"), "{refused}");
        // Of 16 MiB, less 1 MiB for applying, each has a half.
        assert_eq!(taken, 55 * MIB);
        let mut more = 0;
        while quiet.refusal(MIB).is_none() {
            more += MIB;
            quiet.journal_takes(more);
            disk.put(Path::new("/groups/quiet/file"), vec![0; usize::try_from(more).unwrap()]);
        }
        assert_eq!(more, 7 * MIB, "its own slice is there, whatever the other does");
        assert!(flood.refusal(MIB).is_some());
        // With room again both go on, and the marks are forgotten.
        disk.set_capacity(Some(256 * MIB));
        assert!(flood.refusal(MIB).is_none() && quiet.refusal(MIB).is_none());
        assert!(rooms.marks.lock().unwrap().is_empty());
    }

    /// The only group may use all of the disk, as before.
    #[test]
    fn a_group_alone_has_no_slice() {
        let disk = SimDisk::new();
        let room = room(&Rooms::new(1), &disk, "g", None);
        disk.set_capacity(Some(MIB));
        assert!(!room.is_limited());
        assert_eq!(room.refusal(u64::MAX), None);
    }
}
