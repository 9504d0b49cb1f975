//! What a group durably is: owner, checkpoint, batches, replicas.
//!
//! Stored in `groups/NAME/group`, a two-slot control file with slots of 64 KiB (32 KiB before version 4):
//! room for 64 volumes; payload = version byte, then postcard of [`GroupState`], from version 2 on followed
//! by postcard of its [`Wishes`], in version 3 by postcard of its [`Exact`], too, in version 4 by postcard of
//! `Option<Exact>` and of its [`Seen`]. Version 1 is read; versions 3 and 4 are written only where there is
//! something of the kind. One owner writes it: the agent when it creates the group, from then on the applier.
//!
//! Invariants:
//! * the replicas, synced, with the undo of batch `applied_batch + 1` (if such a segment exists) laid over
//!   them, are exactly the state at `checkpoint`;
//! * `oldest_batch` is raised here, durably, before an undo segment below it is removed;
//! * no undo exists while `first_consistent` is `None`: what cannot be used is not kept.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use journal::control::{TwoSlot, payload_bytes};
use journal::io::Disk;
use journal::segment::MAX_NUMBER;
use journal::{GroupId, Lineage, Lsn, Position, VolumeId, VolumeUuid};
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

pub(crate) mod seen;
mod wishes;

pub use seen::{Changed, Ended, Found, Mark, Seen};
pub use wishes::{Back, Hold, MAX_HOLDS, Reached, Rewind, Wishes};

/// Name of the control file in a group's directory.
pub const GROUP_FILE: &str = "group";
const VERSION: u8 = 2;
/// With an exact window that begins above the oldest point.
const VERSION_WITH_STEPS: u8 = 3;
/// With what was seen of the replicas.
const VERSION_WITH_SEEN: u8 = 4;
/// Before there were rewinds and holds.
const VERSION_WITHOUT_WISHES: u8 = 1;
/// Size of its slots. A replica takes about 280 bytes in its default place, and its mark up to 400.
const SLOT_BYTES: usize = 64 << 10;
/// Kept free when a replica or a hold is added, for what grows later: numbers, a reason, a rewind and the
/// next one, and of each replica a stamp and a mark.
const RESERVE_BYTES: usize = 8192;
const RESERVE_REPLICA_BYTES: usize = 440;
/// Longest reason that is kept.
const MAX_REASON_BYTES: usize = 1024;

/// An lsn and the source's time of its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment {
    /// Position in the group's order.
    pub lsn: Lsn,
    /// Source's realtime clock, nanoseconds.
    pub time_ns: u64,
}

/// A replica as the group durably knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaState {
    /// Short id within the group.
    pub id: VolumeId,
    /// Names the volume everywhere.
    pub uuid: VolumeUuid,
    /// Operator's name of the volume.
    pub name: String,
    /// Image file or block device; relative to the receiver's directory where it lies inside it, so that the
    /// directory can be moved.
    pub path: PathBuf,
    /// Size at the checkpoint, bytes.
    pub size_bytes: u64,
    /// False between the decision to create the file and the first checkpoint that relies on it: only then
    /// may an existing file be taken over.
    pub created: bool,
    /// Modification time and size at a clean end; a difference on the next start means that others wrote to
    /// it.
    pub stamp: Option<(i64, u64)>,
}

/// The durable state of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupState {
    /// Names the group everywhere.
    pub group: GroupId,
    /// Operator's name of the group.
    pub name: String,
    /// Fingerprint of the identity that created the group: never given to another.
    pub owner: [u8; 32],
    /// Line of descent that is accepted.
    pub lineage: Lineage,
    /// The replicas are exactly this. Its chain is that of the frame that holds `lsn`, also where `lsn` is
    /// not that frame's last.
    pub checkpoint: Position,
    /// Time of the checkpoint's record.
    pub checkpoint_time_ns: u64,
    /// Newest batch whose checkpoint was taken; 0 before the first.
    pub applied_batch: u64,
    /// First batch whose undo is kept (or will be, when it equals `applied_batch + 1`); 0 while there is no
    /// history.
    pub oldest_batch: u64,
    /// The boundary below `oldest_batch`: the oldest recovery point.
    pub history_start: Moment,
    /// The lsn from which on this group has a history.
    pub first_consistent: Option<Lsn>,
    /// Newest consistent point at or below the checkpoint; equal to it unless a resync is under way there.
    pub consistent_lsn: Option<Lsn>,
    /// The batch whose boundary `consistent_lsn` is.
    pub consistent_batch: u64,
    /// Number in the event log's file name; rises when the log is rewritten without outlived events.
    pub events_file: u64,
    /// Durable length of the event log.
    pub events_bytes: u64,
    /// The group's replicas, by id.
    pub replicas: Vec<ReplicaState>,
    /// The last owner ended in good order and stamped the replicas.
    pub clean: bool,
    /// Newest heartbeat kept: everything captured up to this time has an lsn at or below this one.
    pub heartbeat: Option<Moment>,
    /// Why nothing but a new epoch may be applied, where that is so.
    pub needs_resync: Option<String>,
    /// What was seen of the replicas.
    #[serde(skip)]
    pub seen: Seen,
    /// What the operator asked for: rewinds and holds.
    #[serde(skip)]
    pub wishes: Wishes,
    /// Where the exact window begins; `None` where it is the oldest point. Below it only boundaries are
    /// points: the redo between them is gone.
    #[serde(skip)]
    pub exact: Option<Exact>,
}

/// Where every write is a recovery point from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exact {
    /// The batch whose boundary it is.
    pub batch: u64,
    /// Where that is.
    pub start: Moment,
}

impl GroupState {
    /// A group that holds nothing yet.
    pub fn new(group: GroupId, name: &str, owner: [u8; 32], lineage: Lineage) -> GroupState {
        GroupState {
            group,
            name: name.to_owned(),
            owner,
            lineage,
            checkpoint: Position { lineage, ..Position::default() },
            checkpoint_time_ns: 0,
            applied_batch: 0,
            oldest_batch: 0,
            history_start: Moment::default(),
            first_consistent: None,
            consistent_lsn: None,
            consistent_batch: 0,
            events_file: 0,
            events_bytes: 0,
            replicas: Vec::new(),
            clean: false,
            heartbeat: None,
            needs_resync: None,
            wishes: Wishes::default(),
            seen: Seen::default(),
            exact: None,
        }
    }

    /// The newest record that was ever applied: above the checkpoint where that was set back.
    pub fn reached(&self) -> Reached {
        let checkpoint = Reached { position: self.checkpoint, time_ns: self.checkpoint_time_ns };
        self.wishes.reached.filter(|reached| reached.position.lsn > self.checkpoint.lsn).unwrap_or(checkpoint)
    }

    /// The history ends: nothing kept so far fits the replica any more, and no wish about it can be
    /// fulfilled.
    pub fn end_history(&mut self) {
        for hold in self.wishes.holds.drain(..) {
            tracing::warn!(group = self.name, bookmark = hold.name, "the history ends, and a hold with it");
        }
        self.clean = false;
        self.oldest_batch = 0;
        self.first_consistent = None;
        self.consistent_lsn = None;
        self.history_start = Moment::default();
        (self.wishes.intent, self.wishes.rewound, self.exact) = (None, None, None);
    }

    /// Where the exact window begins: the batch, and its boundary.
    pub fn exact_start(&self) -> Exact {
        let oldest = Exact { batch: self.oldest_batch.saturating_sub(1), start: self.history_start };
        self.exact.unwrap_or(oldest)
    }

    /// The checkpoint with its time.
    pub fn checkpoint_moment(&self) -> Moment {
        Moment { lsn: self.checkpoint.lsn, time_ns: self.checkpoint_time_ns }
    }

    /// Whether the checkpoint is a recovery point, rather than the inside of a resync.
    pub fn is_consistent(&self) -> bool {
        self.consistent_lsn == Some(self.checkpoint.lsn)
    }

    /// Whether the control file holds this state, and what it will grow to without another replica or hold.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`]: the replicas' paths are too long, or the names under hold too many.
    pub fn check_room(&self) -> Result<()> {
        let bytes = self.encode()?.len() + RESERVE_BYTES + RESERVE_REPLICA_BYTES * self.replicas.len();
        let most = payload_bytes(SLOT_BYTES);
        if bytes > most {
            let at = format!(
                "group {}: its {} replicas and {} holds take {bytes} bytes of the {most} that its control file holds: give the \
                 replicas shorter paths, or release holds",
                self.name,
                self.replicas.len(),
                self.wishes.holds.len()
            );
            return Err(Error::new(ErrorKind::ReplicaFailed, at));
        }
        Ok(())
    }

    fn encode(&self) -> Result<Vec<u8>> {
        let malformed =
            |e: postcard::Error| Error::new(ErrorKind::Malformed, format!("encode group state: {e}"));
        let has_seen = self.seen != Seen::default();
        let version = match self.exact {
            _ if has_seen => VERSION_WITH_SEEN,
            Some(_) => VERSION_WITH_STEPS,
            None => VERSION,
        };
        let state = postcard::to_extend(self, vec![version]).map_err(malformed)?;
        let state = postcard::to_extend(&self.wishes, state).map_err(malformed)?;
        match &self.exact {
            exact if has_seen => {
                let state = postcard::to_extend(exact, state).map_err(malformed)?;
                postcard::to_extend(&self.seen, state).map_err(malformed)
            }
            Some(exact) => postcard::to_extend(exact, state).map_err(malformed),
            None => Ok(state),
        }
    }

    fn decode(bytes: &[u8], path: &Path) -> Result<GroupState> {
        let state = GroupState::decode_any(bytes, path)?;
        match state.is_possible() {
            true => Ok(state),
            false => {
                let at =
                    format!("{}: group state: no group reaches such a batch, size or length", path.display());
                Err(Error::new(ErrorKind::Malformed, at))
            }
        }
    }

    /// Whether its numbers are ones that a group can reach: they are added to, and counted up to. Lsns and
    /// epochs were bounded where they were decoded.
    fn is_possible(&self) -> bool {
        let wishes = &self.wishes;
        let batches = [self.applied_batch, self.oldest_batch, self.consistent_batch]
            .into_iter()
            .chain(self.exact.map(|exact| exact.batch))
            .chain(self.seen.found.iter().map(|found| found.batch))
            .chain(wishes.intent.iter().chain(&wishes.rewound).filter_map(|rewind| Some(rewind.back?.batch)));
        let bytes = self.replicas.iter().map(|replica| replica.size_bytes).chain([self.events_bytes]);
        let applied = self.applied_batch;
        let in_order = self.oldest_batch <= applied.saturating_add(1)
            && self.consistent_batch <= applied
            && self.exact.is_none_or(|exact| exact.batch <= applied);
        // One less than a segment may have: its successor's undo has a name, too.
        in_order
            && batches.into_iter().all(|batch| batch < MAX_NUMBER)
            && bytes.into_iter().chain([self.events_file]).all(|number| number <= i64::MAX as u64)
    }

    fn decode_any(bytes: &[u8], path: &Path) -> Result<GroupState> {
        let malformed =
            |what: String| Error::new(ErrorKind::Malformed, format!("{}: {what}", path.display()));
        let broken = |e: postcard::Error| malformed(format!("group state: {e}"));
        match bytes.split_first() {
            Some((&VERSION, rest)) => {
                let (state, rest) = postcard::take_from_bytes::<GroupState>(rest).map_err(broken)?;
                Ok(GroupState { wishes: postcard::from_bytes(rest).map_err(broken)?, ..state })
            }
            Some((&VERSION_WITH_STEPS, rest)) => {
                let (state, rest) = postcard::take_from_bytes::<GroupState>(rest).map_err(broken)?;
                let (wishes, rest) = postcard::take_from_bytes(rest).map_err(broken)?;
                Ok(GroupState { wishes, exact: Some(postcard::from_bytes(rest).map_err(broken)?), ..state })
            }
            Some((&VERSION_WITH_SEEN, rest)) => {
                let (state, rest) = postcard::take_from_bytes::<GroupState>(rest).map_err(broken)?;
                let (wishes, rest) = postcard::take_from_bytes(rest).map_err(broken)?;
                let (exact, rest) = postcard::take_from_bytes(rest).map_err(broken)?;
                Ok(GroupState { wishes, exact, seen: postcard::from_bytes(rest).map_err(broken)?, ..state })
            }
            Some((&VERSION_WITHOUT_WISHES, rest)) => postcard::from_bytes(rest).map_err(broken),
            Some((other, _)) => Err(malformed(format!(
                "version {other} (this program reads up to {VERSION_WITH_SEEN}): upgrade it"
            ))),
            None => Err(malformed("empty".into())),
        }
    }
}

/// The control file and the state that it holds; every change goes through [`GroupStore::store`].
pub struct GroupStore {
    slots: TwoSlot,
    state: GroupState,
}

impl GroupStore {
    /// Creates a group's control file and the directories beside it; durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the file exists already or the disk refuses.
    pub fn create(disk: Arc<dyn Disk>, group_dir: &Path, state: GroupState) -> Result<GroupStore> {
        for dir in [group_dir.to_path_buf(), undo_dir(group_dir)] {
            disk.create_dir(&dir).map_err(|e| Error::io(format!("create {}", dir.display()), e))?;
        }
        let slots = TwoSlot::create_sized(&disk, &group_dir.join(GROUP_FILE), &state.encode()?, SLOT_BYTES)?;
        Ok(GroupStore { slots, state })
    }

    /// Opens a group's control file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where neither slot holds, [`ErrorKind::Malformed`] for a version of another
    /// program.
    pub fn open(disk: Arc<dyn Disk>, group_dir: &Path) -> Result<GroupStore> {
        let path = group_dir.join(GROUP_FILE);
        let (slots, payload) = TwoSlot::open(&disk, &path)?;
        Ok(GroupStore { slots, state: GroupState::decode(&payload, &path)? })
    }

    /// Reads a group's state without opening its control file for writing.
    ///
    /// # Errors
    /// As [`GroupStore::open`].
    pub fn read(disk: &dyn Disk, group_dir: &Path) -> Result<GroupState> {
        let path = group_dir.join(GROUP_FILE);
        GroupState::decode(&TwoSlot::read(disk, &path)?.payload, &path)
    }

    /// The state as it is durable.
    pub fn state(&self) -> &GroupState {
        &self.state
    }

    /// Replaces the state; durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`], which is final, [`ErrorKind::ReplicaFailed`] for more than the file holds, or
    /// what else the disk refuses; the old state then stands.
    pub fn store(&mut self, mut state: GroupState) -> Result<()> {
        if let Some(why) = &mut state.needs_resync {
            let end = (0..=why.len().min(MAX_REASON_BYTES)).rev().find(|at| why.is_char_boundary(*at));
            why.truncate(end.unwrap_or(0));
        }
        let mut payload = state.encode()?;
        let most = self.slots.max_payload_bytes();
        if payload.len() > most && !state.seen.marks.is_empty() {
            // A file of an older version is smaller. Without marks the replicas are trusted by their stamps,
            // as there.
            state.seen.marks.clear();
            payload = state.encode()?;
        }
        if payload.len() > most {
            let at = format!("group {}: its state of {} bytes is over {most}", state.name, payload.len());
            return Err(Error::new(ErrorKind::ReplicaFailed, at));
        }
        self.slots.store(&payload)?;
        self.state = state;
        Ok(())
    }
}

/// Where a group's undo segments lie.
pub fn undo_dir(group_dir: &Path) -> PathBuf {
    group_dir.join("undo")
}

/// Where a group's journal lies.
pub fn journal_dir(group_dir: &Path) -> PathBuf {
    group_dir.join("journal")
}

/// The receiver's directory that a group's directory (`DIR/groups/NAME`) lies in.
pub fn receiver_dir(group_dir: &Path) -> &Path {
    group_dir.ancestors().nth(2).unwrap_or(group_dir)
}

/// A replica's path as it is stored: relative where it lies inside the receiver's directory.
pub fn stored_path(group_dir: &Path, path: &Path) -> PathBuf {
    path.strip_prefix(receiver_dir(group_dir)).map_or_else(|_| path.to_path_buf(), Path::to_path_buf)
}

/// A replica's path from what is stored.
pub fn replica_path(group_dir: &Path, stored: &Path) -> PathBuf {
    // `..` never comes from `stored_path`; joined it could only come from a damaged or foreign file.
    if stored.components().any(|part| part == Component::ParentDir) {
        return stored.to_path_buf();
    }
    receiver_dir(group_dir).join(stored)
}
