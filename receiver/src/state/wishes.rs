//! What an operator asked of a group, as far as it must outlive the process: rewinds and holds.
//!
//! ```text
//!               order                    carried out                 resume
//!  (following) ──────► intent ─────────────────────────► rewound ────────────► (following)
//!                        │ withdrawn, before its undo stands
//!                        └──────────────────────────────► as before
//! ```
//! `intent` names exactly what is to be done, so that after a crash exactly that is done. `reached` outlives
//! the resume: up to it the event log holds the events already, though the checkpoint is below.

use journal::{Lsn, Position};
use serde::{Deserialize, Serialize};

use super::Moment;

/// Bookmarks that may be under hold at once; bounds the control file.
pub const MAX_HOLDS: usize = 64;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wishes {
    /// A rewind that is ordered and not carried out yet.
    pub intent: Option<Rewind>,
    /// The replica stands here by the operator's wish, and nothing is applied.
    pub rewound: Option<Rewind>,
    /// The newest record ever applied, where the checkpoint was set back below it.
    pub reached: Option<Reached>,
    /// Bookmarks that retention may not drop.
    pub holds: Vec<Hold>,
}

/// A rewind, ordered or carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewind {
    /// The point as it was asked for.
    pub at: String,
    /// The point.
    pub position: Position,
    /// Its time, source's clock.
    pub time_ns: u64,
    /// When it was ordered, this machine's clock.
    pub since_ns: u64,
    /// How the replica is brought back; absent where the point lies above the checkpoint, and is reached by
    /// applying.
    pub back: Option<Back>,
}

impl Rewind {
    /// The point.
    pub fn to(&self) -> Moment {
        Moment { lsn: self.position.lsn, time_ns: self.time_ns }
    }
}

/// The batch that brings a replica back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Back {
    /// Its number: the undo segment of this number is its own.
    pub batch: u64,
    /// The boundary that its content is derived from; kept until it is carried out.
    pub boundary: u64,
    /// Where that boundary is.
    pub boundary_lsn: Lsn,
}

/// How far a replica ever was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// The record.
    pub position: Position,
    /// Its time.
    pub time_ns: u64,
}

impl Reached {
    /// The record.
    pub fn moment(&self) -> Moment {
        Moment { lsn: self.position.lsn, time_ns: self.time_ns }
    }
}

/// A bookmark under hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The bookmark's name.
    pub name: String,
    /// Where it stands.
    pub at: Moment,
    /// Since when, this machine's clock.
    pub since_ns: u64,
}

#[cfg(test)]
mod tests {
    use super::super::GroupState;
    use super::*;
    use journal::{Epoch, EpochId, GroupId, Lineage};
    use std::path::Path;

    fn state() -> GroupState {
        let mut state = GroupState::new(GroupId([1; 16]), "g", [2; 32], Lineage([3; 16]));
        state.applied_batch = 9;
        state
    }

    /// Added to, never edited: these bytes are on disks.
    /// They are added to, counted up to, and become lengths, and the file may be a stranger's.
    #[test]
    fn numbers_that_no_group_reaches_are_refused() {
        let bad = |change: &dyn Fn(&mut GroupState)| {
            let mut state = state();
            change(&mut state);
            let error = GroupState::decode(&state.encode().unwrap(), Path::new("x")).unwrap_err();
            assert!(error.to_string().contains("no group reaches"), "{error}");
        };
        let far = journal::segment::MAX_NUMBER;
        bad(&|state| state.applied_batch = far);
        bad(&|state| state.oldest_batch = state.applied_batch + 2);
        bad(&|state| state.consistent_batch = state.applied_batch + 1);
        bad(&|state| state.events_bytes = u64::MAX);
        bad(&|state| state.events_file = u64::MAX);
        bad(&|state| state.exact = Some(super::super::Exact { batch: far, start: Moment::default() }));
    }

    #[test]
    fn golden_bytes_of_both_versions() {
        // Ids are text in postcard: 32 hex digits. The version, group, name, owner, lineage, checkpoint with
        // its time; the batches and all that is not yet.
        let id = |byte: u8| format!("20{}", hex(hex(&[byte; 16]).as_bytes()));
        let without = format!(
            "01{}0167{}{}{}00{}00000009{}",
            id(1),
            "02".repeat(32),
            id(3),
            id(3),
            id(0),
            "00".repeat(12)
        );
        let without = without.as_str();
        let bytes = unhex(without);
        assert_eq!(GroupState::decode(&bytes, Path::new("x")).unwrap(), state());
        let mut now = unhex(without);
        now[0] = 2;
        now.extend([0; 4]);
        assert_eq!(state().encode().unwrap(), now);

        let mut wished = state();
        let epoch = Epoch { number: 2, id: EpochId([4; 16]) };
        let position = Position { lineage: Lineage([3; 16]), epoch, lsn: Lsn(300), chain: 5 };
        let back = Some(Back { batch: 10, boundary: 6, boundary_lsn: Lsn(290) });
        let rewind = Rewind { at: "lsn:300".into(), position, time_ns: 7, since_ns: 8, back };
        wished.wishes = Wishes {
            intent: None,
            rewound: Some(rewind),
            reached: Some(Reached { position, time_ns: 9 }),
            holds: vec![Hold { name: "b".into(), at: Moment { lsn: Lsn(1), time_ns: 2 }, since_ns: 3 }],
        };
        now.truncate(now.len() - 4);
        let position = format!("{}02{}ac0205", id(3), id(4));
        // No intent; the rewind: its point as asked for, position, times, batch; reached; one hold.
        let rewind = format!("01076c736e3a333030{position}0708010a06a202");
        now.extend(unhex(&format!("00{rewind}01{position}0901016201020{}", 3)));
        assert_eq!(hex(&wished.encode().unwrap()), hex(&now));
        assert_eq!(GroupState::decode(&now, Path::new("x")).unwrap(), wished);
        let unknown = GroupState::decode(&[5, 0], Path::new("x")).unwrap_err();
        assert!(unknown.to_string().contains("version 5"), "{unknown}");

        // Version 3: an exact window that begins at batch 7, lsn 200, time 1.
        let start = Moment { lsn: Lsn(200), time_ns: 1 };
        let stepped = GroupState { exact: Some(super::super::Exact { batch: 7, start }), ..wished };
        now[0] = 3;
        now.extend(unhex("07c80101"));
        assert_eq!(hex(&stepped.encode().unwrap()), hex(&now));
        assert_eq!(GroupState::decode(&now, Path::new("x")).unwrap(), stepped);

        // Version 4: the window is there or not; one mark; changed; nothing found; one history that ended.
        use super::super::{Changed, Ended, Mark, Seen};
        use machine::disk::{Continuity, DiskIdentity};
        let left = Continuity { boot: [1; 16], size_bytes: 300, ends: None, times: None, counters: None };
        let seen = Seen {
            marks: vec![Mark { volume: journal::VolumeId(3), identity: DiskIdentity::Simulated(7), left }],
            changed: Some(Changed { why: "c".into(), since_ns: 5, ordered_ns: None }),
            found: Vec::new(),
            ended: vec![Ended { at_ns: 6, why: "e".into(), from: Lsn(1), to: Lsn(300), holds: 2 }],
        };
        let changed = GroupState { seen, ..stepped };
        now[0] = 4;
        now.truncate(now.len() - 4);
        now.extend(unhex("0107c80101"));
        now.extend(unhex(&format!("01030207{}ac02000000", "01".repeat(16))));
        now.extend(unhex("010163050000010601650 1ac0202".replace(' ', "").as_str()));
        assert_eq!(hex(&changed.encode().unwrap()), hex(&now));
        assert_eq!(GroupState::decode(&now, Path::new("x")).unwrap(), changed);
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }
}
