//! Where a group stands: one value that its threads write and its connection, `status` and `wait` read.
//!
//! It lives in a `watch`, so readers always see all positions of one instant, and a slow reader costs
//! nothing.

use journal::writer::Writer;
use journal::{Lsn, Position};
use wire::message::{ReceiverCode, ReceiverState};

use crate::point::rfc3339;
use crate::state::{GroupState, Rewind};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Everything up to here is fdatasync'ed in the group's journal: what acknowledgements say.
    pub durable: Position,
    /// Time of the last durable record, source's clock.
    pub durable_time_ns: u64,
    /// Bytes that the group's journal takes.
    pub journal_bytes: u64,
    /// Written to the replica.
    pub applied: Lsn,
    /// The replica durably is exactly this.
    pub checkpoint: Lsn,
    /// Rewinds that were begun: what was read of a replica counts only where none was begun meanwhile.
    pub rewinds: u64,
    /// Why nothing more is acknowledged, if so.
    pub full: Option<String>,
    /// Why apply stands still, if so.
    pub stalled: Option<Stall>,
}

/// Why apply stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stall {
    /// The replica stands at an earlier point, or is on its way there, by the operator's wish.
    Rewound(String),
    /// The replica is given up, or its overwriting is ordered: only a new epoch repairs it.
    NeedsResync(String),
    /// The replica cannot be written, or others changed it and it is left alone; looked at again.
    ReplicaFailed(String),
    /// Something else (no room for undo, damage in the journal); tried again.
    Stopped(String),
}

impl Stall {
    /// Why nothing is applied, as far as the group's durable state says so.
    pub fn of(state: &GroupState) -> Option<Stall> {
        let wishes = &state.wishes;
        let told = |rewind: &Rewind| {
            let (lsn, time) = (rewind.position.lsn, rfc3339(rewind.time_ns));
            let asked =
                if rewind.at == format!("lsn:{lsn}") { String::new() } else { format!("{}, ", rewind.at) };
            format!("to lsn {lsn} ({asked}{time})")
        };
        let changed = state.changed_words();
        let also = changed.as_ref().or(state.needs_resync.as_ref());
        let also = also.map_or(String::new(), |why| format!("; besides, {why}"));
        let why = match (&wishes.intent, &wishes.rewound) {
            (Some(intent), _) => format!("is being rewound {}{also}", told(intent)),
            (None, Some(rewound)) => format!(
                "rewound {} since {}; nothing is applied until `afterimage resume {}`{also}",
                told(rewound),
                rfc3339(rewound.since_ns),
                state.name
            ),
            (None, None) => {
                let changed = changed.map(Stall::ReplicaFailed);
                return changed.or_else(|| state.needs_resync.clone().map(Stall::NeedsResync));
            }
        };
        Some(Stall::Rewound(why))
    }

    /// The reason in words.
    pub fn why(&self) -> &str {
        match self {
            Stall::Rewound(why)
            | Stall::NeedsResync(why)
            | Stall::ReplicaFailed(why)
            | Stall::Stopped(why) => why,
        }
    }
}

impl Progress {
    /// A group whose journal is `writer` and whose replica is at `checkpoint`.
    pub fn at(writer: &Writer, checkpoint: Lsn) -> Progress {
        Progress {
            durable: writer.durable(),
            durable_time_ns: writer.segments().last().map_or(0, |segment| segment.last_time_ns),
            journal_bytes: writer.journal_bytes(),
            applied: checkpoint,
            checkpoint,
            rewinds: 0,
            full: None,
            stalled: None,
        }
    }

    /// What the source is told: the worst first.
    pub fn receiver_state(&self) -> ReceiverState {
        let (code, why) = match (&self.stalled, &self.full) {
            (Some(Stall::Rewound(why)), _) => (ReceiverCode::Rewound, why.as_str()),
            (Some(Stall::NeedsResync(why)), _) => (ReceiverCode::NeedsResync, why.as_str()),
            (_, Some(why)) => (ReceiverCode::JournalFull, why.as_str()),
            (Some(Stall::ReplicaFailed(why)), _) => (ReceiverCode::ReplicaFailed, why.as_str()),
            (Some(Stall::Stopped(why)), _) => (ReceiverCode::Stopped, why.as_str()),
            (None, None) => (ReceiverCode::Ok, ""),
        };
        ReceiverState { code, why: why.to_owned() }
    }
}
