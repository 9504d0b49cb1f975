//! What was seen of the replicas: who each is, how we left it, and what others did to it.
//!
//! ```text
//!            others wrote                    ordered                        new epoch applied
//!  (trusted) ───────────► changed ─────────────────────► found, ended ─────────────────────► (trusted)
//!                            │ put back as it was left
//!                            └────────────────────────► (trusted)
//! ```
//! While `changed` stands nothing is applied and no point is given: history is the replica with undo laid
//! over it.

use std::path::Path;

use journal::{Lsn, VolumeId};
use machine::disk::{Continuity, DiskIdentity};
use serde::{Deserialize, Serialize};

use super::{GroupState, Moment};

/// Found contents, and ended histories, that are remembered; the newest ones.
const MAX_KEPT: usize = 4;
/// Longest reason of each.
const MAX_WHY_BYTES: usize = 400;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The replicas as they were left at the checkpoint, by volume.
    pub marks: Vec<Mark>,
    /// Others changed a replica.
    pub changed: Option<Changed>,
    /// Contents that were found and overwritten by order; newest last.
    pub found: Vec<Found>,
    /// Histories that ended; newest last.
    pub ended: Vec<Ended>,
}

/// A replica as it was left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Which volume's.
    pub volume: VolumeId,
    /// Who it is.
    pub identity: DiskIdentity,
    /// How it was left.
    pub left: Continuity,
}

/// What others did, as far as it shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Which replica, and how it shows.
    pub why: String,
    /// When it was noticed, this machine's clock.
    pub since_ns: u64,
    /// When its overwriting was ordered; what that begins with is under way.
    pub ordered_ns: Option<u64>,
}

/// Content that others left in the replicas, kept as undo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// The boundary that it stands at.
    pub batch: u64,
    /// The lsn that stands for it; it is no point itself.
    pub at: Moment,
    /// When its overwriting was ordered, this machine's clock.
    pub since_ns: u64,
    /// What had been noticed.
    pub why: String,
}

/// A history that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// When, this machine's clock.
    pub at_ns: u64,
    /// Why.
    pub why: String,
    /// Its oldest point.
    pub from: Lsn,
    /// Its newest.
    pub to: Lsn,
    /// Bookmarks that were under hold, and ended with it.
    pub holds: u32,
}

impl Seen {
    /// How a volume's replica was left.
    pub fn mark(&self, volume: VolumeId) -> Option<&Mark> {
        self.marks.iter().find(|mark| mark.volume == volume)
    }

    /// Remembers a content that was found.
    pub fn add_found(&mut self, found: Found) {
        self.found.retain(|known| known.batch != found.batch);
        self.found.push(Found { why: cut(&found.why), ..found });
        let over = self.found.len().saturating_sub(MAX_KEPT);
        self.found.drain(..over);
    }
}

impl GroupState {
    /// What is told of a replica that others changed, and what can be done.
    pub fn changed_words(&self) -> Option<String> {
        let changed = self.seen.changed.as_ref()?;
        Some(format!(
            "{}; nothing is written to it, and no point is given, until it is put back as it was left, or its overwriting is \
             ordered at the receiver: `afterimage resync {} --overwrite` (its content stays reachable)",
            changed.why, self.name
        ))
    }

    /// Remembers that the history as it is now has ended.
    pub(crate) fn note_end(&mut self, why: &str, at_ns: u64) {
        if self.oldest_batch == 0 {
            return;
        }
        let holds = u32::try_from(self.wishes.holds.len()).unwrap_or(u32::MAX);
        let (from, to) = (self.history_start.lsn, self.checkpoint.lsn);
        self.seen.ended.push(Ended { at_ns, why: cut(why), from, to, holds });
        let over = self.seen.ended.len().saturating_sub(MAX_KEPT);
        self.seen.ended.drain(..over);
    }
}

/// The replica's name as it is told.
pub(crate) fn told(name: &str, path: &Path, how: &str) -> String {
    cut(&format!("replica {} of volume {name} was changed by others: {how}", path.display()))
}

fn cut(why: &str) -> String {
    let end = (0..=why.len().min(MAX_WHY_BYTES)).rev().find(|at| why.is_char_boundary(*at));
    why[..end.unwrap_or(0)].to_owned()
}
