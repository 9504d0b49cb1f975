//! What `status --json` prints, in the shape that both daemons share.
//!
//! Keys are a contract: they are added to, never bent. On the receiver `captured_lsn` is the newest lsn that
//! the source spoke of (a heartbeat, or what was received), and `journaled_lsn` is what this side's journal
//! holds.

use std::path::PathBuf;

use journal::Positions;
use serde::{Deserialize, Serialize};

use crate::mend::Repaired;
use crate::point::ShownMoment;
use crate::restoring::RestoreStatus;
use crate::scrub::ScrubStatus;

/// All groups of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// By name.
    pub groups: Vec<GroupStatus>,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Operator's name of the group.
    pub name: String,
    /// One of the states of DESIGN section 6.
    pub state: State,
    /// Why the state is not `replicating`, in words.
    pub why: Option<String>,
    /// Number of the epoch held.
    pub epoch: u64,
    /// The five positions.
    #[serde(flatten)]
    pub positions: Positions,
    /// Time between what was captured and what is durable here; `None` where nothing was ever heard of the
    /// source.
    pub rpo_ms: Option<u64>,
    /// Raw bytes that are durable here and not on the replica yet.
    pub backlog_bytes: u64,
    /// The group's volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Who is connected: address and identity.
    pub peer: Option<String>,
    /// Oldest and newest recovery point.
    pub history: Option<HistoryStatus>,
    /// Bytes on disk.
    pub used: UsedStatus,
    /// Why apply does not go on, if it does not.
    pub apply_error: Option<String>,
    /// Where the replica stands by the operator's wish, if it does.
    pub rewound: Option<RewoundStatus>,
    /// What the last check of the stored segments found; absent before the first has ended.
    pub scrub: Option<ScrubStatus>,
    /// What rotted of the journal and was fetched from the source again since this process started; the
    /// newest 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<Repaired>,
    /// By how much the source's clock is ahead of this machine's; `None` while no source is heard.
    #[serde(default)]
    pub clock_skew_ms: Option<i64>,
    /// Restores that run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restores: Vec<RestoreStatus>,
}

/// A group that is rewound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewoundStatus {
    /// The point as it was asked for.
    pub at: String,
    /// The point.
    pub point: ShownMoment,
    /// Since when, this machine's clock, RFC 3339 UTC.
    pub since: String,
    /// About how many bytes were received and wait for `resume`.
    pub waiting_bytes: u64,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Operator's name of the volume.
    pub name: String,
    /// One of the states of DESIGN section 6.
    pub state: State,
    /// Bytes.
    pub size_bytes: u64,
    /// Where clients reach the volume; only where this process serves it.
    pub nbd_uri: Option<String>,
    /// The replica's path; only where this process writes it.
    pub replica: Option<PathBuf>,
    /// The source's path; only where this process captures it.
    pub source: Option<PathBuf>,
}

/// States by the names that users see; a group shows its worst volume's. In order of badness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Every write goes to the replica.
    Replicating,
    /// First copy on its way.
    Syncing,
    /// A gap is being repaired; the last consistent point is before it.
    Resyncing,
    /// Not everything works: `why` says what.
    Degraded,
    /// No source is connected.
    Detached,
    /// Waits for a resync that has not begun.
    NeedsResync,
    /// Stands at an earlier point by the operator's wish.
    Rewound,
    /// Replaced by a promoted side.
    Fenced,
}

/// The recoverable window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryStatus {
    /// Oldest recovery point.
    pub oldest: ShownMoment,
    /// Newest recovery point.
    pub newest: ShownMoment,
}

/// Bytes on disk of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedStatus {
    /// Redo: the receiver's journal.
    pub journal_bytes: u64,
    /// Undo segments.
    pub undo_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::Lsn;

    #[test]
    fn the_json_has_the_keys_of_the_contract() {
        let positions = Positions { captured_lsn: Lsn(9), journaled_lsn: Lsn(8), ..Positions::default() };
        let group = GroupStatus {
            name: "g".into(),
            state: State::NeedsResync,
            why: Some("replica changed".into()),
            epoch: 2,
            positions,
            rpo_ms: None,
            backlog_bytes: 7,
            volumes: vec![VolumeStatus {
                name: "v".into(),
                state: State::Replicating,
                size_bytes: 512,
                nbd_uri: None,
                replica: Some("/r/v.img".into()),
                source: None,
            }],
            peer: None,
            history: None,
            used: UsedStatus::default(),
            apply_error: None,
            rewound: None,
            scrub: None,
            repaired: Vec::new(),
            restores: Vec::new(),
            clock_skew_ms: Some(-3),
        };
        let status = Status { groups: vec![group] };
        let json = serde_json::to_value(&status).unwrap();
        let group = &json["groups"][0];
        for key in [
            "name",
            "state",
            "why",
            "epoch",
            "captured_lsn",
            "journaled_lsn",
            "received_lsn",
            "applied_lsn",
            "checkpoint_lsn",
            "rpo_ms",
            "backlog_bytes",
        ] {
            assert!(group.get(key).is_some(), "{key} is missing in {group}");
        }
        for key in ["name", "state", "size_bytes", "nbd_uri", "replica", "source"] {
            assert!(group["volumes"][0].get(key).is_some(), "volumes[].{key} is missing in {group}");
        }
        assert_eq!(group["state"], "needs-resync");
        assert_eq!(group["captured_lsn"], 9);
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), status);
    }
}
