//! What `afterimage status` shows of a source, and the one function through which a volume's state changes.

use std::sync::PoisonError;

use journal::Positions;
use machine::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

/// State of a volume, by the names of DESIGN section 6, ordered from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Every write is captured and sent.
    Replicating,
    /// First synchronisation: the replica has never been consistent.
    Syncing,
    /// A gap is being repaired.
    Resyncing,
    /// Writes become dirty bits, not records.
    Degraded,
    /// Source and replica do not join; a new epoch begins by itself.
    NeedsResync,
    /// Not captured.
    Detached,
    /// The replica was taken to an earlier point.
    Rewound,
    /// Another source was promoted; nothing of ours is accepted.
    Fenced,
}

/// The JSON of `status --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// All groups of the daemon.
    pub groups: Vec<GroupStatus>,
}

/// One group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Operator's name.
    pub name: String,
    /// Worst state of its volumes.
    pub state: State,
    /// Cause, since when, how much; empty while replicating over a link.
    pub why: String,
    /// Epoch number.
    pub epoch: u64,
    /// `captured_lsn`, `journaled_lsn`, `received_lsn`, `applied_lsn`, `checkpoint_lsn`.
    #[serde(flatten)]
    pub positions: Positions,
    /// Age of the oldest captured write that is not yet durable at the receiver, ms; `null` while that is not
    /// known.
    pub rpo_ms: Option<u64>,
    /// By how much this machine's clock is ahead of the receiver's; `None` while that is not heard.
    #[serde(default)]
    pub clock_skew_ms: Option<i64>,
    /// Journaled bytes that the receiver has not acknowledged.
    pub backlog_bytes: u64,
    /// Bytes of datagrams sent to the receiver since the agent started, as of the last acknowledgement or
    /// heartbeat.
    #[serde(default)]
    pub sent_bytes: u64,
    /// Bytes that the file systems call free and that were not sent (`sync = "allocated"`).
    #[serde(default)]
    pub skipped_bytes: u64,
    /// Bytes that the source journal takes on disk.
    pub journal_bytes: u64,
    /// Fill of the ring, percent.
    pub ring_percent: u8,
    /// The receiver: its address while connected, or why not.
    pub peer: String,
    /// Whether the link to the receiver is up.
    pub connected: bool,
    /// What the kernel module counted since the group began; `null` behind the NBD front.
    #[serde(default)]
    pub kernel: Option<KernelCounters>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
}

/// Counters of the kernel module, of one group.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KernelCounters {
    /// Writes copied into the ring.
    pub ring_writes: u64,
    /// Writes that only set bits: before the first synchronisation, and in each gap.
    pub bitmap_writes: u64,
    /// Payload bytes copied.
    pub copied_bytes: u64,
    /// Captured writes that failed on the device.
    pub failed: u64,
    /// Writes refused before they reached the device, because their sender would not wait.
    pub void: u64,
    /// Writes caught on their way after an attach.
    pub late: u64,
    /// Writes that could not be followed, because too many were on their way; they only set bits.
    pub untracked: u64,
    /// Writes whose pages could not be read, or that took more than half of the ring; they only set bits.
    pub unreadable: u64,
    /// Commands past the block layer (SG_IO and other passthrough) that may have written anywhere.
    #[serde(default)]
    pub unseen: u64,
    /// Writes on their way now.
    pub in_flight: u64,
    /// Mean time of a write in the hook, ns, while the module's parameter `measure` is on.
    pub hook_ns_mean: u64,
    /// Longest such time, ns.
    pub hook_ns_max: u64,
    /// How long the longest drain of a queue stopped its applications, ns.
    pub freeze_ns_max: u64,
}

impl From<kfilter::ioctl::Status> for KernelCounters {
    fn from(status: kfilter::ioctl::Status) -> KernelCounters {
        KernelCounters {
            ring_writes: status.ring_writes,
            bitmap_writes: status.bitmap_writes,
            copied_bytes: status.copied_bytes,
            failed: status.failed,
            void: status.void,
            late: status.late,
            untracked: status.untracked,
            unreadable: status.unreadable,
            unseen: status.unseen,
            in_flight: status.in_flight,
            hook_ns_mean: status.hook_ns_total / (status.ring_writes + status.bitmap_writes).max(1),
            hook_ns_max: status.hook_ns_max,
            freeze_ns_max: status.freeze_ns_max,
        }
    }
}

/// One volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Operator's name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Where clients connect; `null` while not served.
    pub nbd_uri: Option<String>,
    /// Replica's path where this process knows it.
    pub replica: Option<String>,
    /// Backing file or device.
    pub source: Option<String>,
}

/// The states of a group's volumes and why they are what they are.
pub struct Board {
    group: String,
    inner: Mutex<Inner>,
}

struct Inner {
    volumes: Vec<Shown>,
    why: String,
}

/// A volume on the board.
struct Shown {
    name: String,
    state: State,
    /// Taken out of capture by the operator: it stays `detached`, whatever becomes of the others.
    out: bool,
}

impl Board {
    /// All volumes start `detached`.
    pub fn new(group: &str, volumes: impl Iterator<Item = String>) -> Board {
        let volumes = volumes.map(|name| Shown { name, state: State::Detached, out: false }).collect();
        let why = "starting".to_owned();
        Board { group: group.to_owned(), inner: Mutex::new(Inner { volumes, why }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all volumes to a state, with its cause. The one function through which states change.
    ///
    /// A gap is left only for `Syncing` or `Resyncing` (a repair began), or for something worse; `Fenced` by
    /// nothing but a new start. Anything else is not done: whoever speaks late does not undo what others have
    /// seen since.
    pub fn change(&self, to: State, why: impl Into<String>) {
        self.change_in(&mut self.lock(), to, why.into());
    }

    /// The same for somebody who has seen something and speaks a moment later: nothing when the state is
    /// another one by then, or it is not so any more. A repair that has begun meanwhile must not be called a
    /// gap again, from which it could not lead back; nor may one that has ended.
    pub fn change_from(&self, seen: State, to: State, why: impl Into<String>, is_so: impl FnOnce() -> bool) {
        let mut inner = self.lock();
        if worst(&inner.volumes) == seen && is_so() {
            self.change_in(&mut inner, to, why.into());
        }
    }

    fn change_in(&self, inner: &mut Inner, to: State, why: String) {
        let from = worst(&inner.volumes);
        if from == to && inner.why == why {
            return;
        }
        if !may_follow(from, to) {
            return;
        }
        if from != to {
            tracing::info!(group = %self.group, ?from, ?to, why = %why, "state");
        }
        for volume in inner.volumes.iter_mut().filter(|volume| !volume.out) {
            volume.state = to;
        }
        inner.why = why;
    }

    /// The operator takes a volume out of capture.
    pub fn take_out(&self, name: &str) {
        let mut inner = self.lock();
        for volume in inner.volumes.iter_mut().filter(|volume| volume.name == name) {
            (volume.state, volume.out) = (State::Detached, true);
        }
        tracing::info!(group = %self.group, volume = name, "detached");
    }

    /// The operator puts a volume under capture again: a synchronisation is due.
    pub fn put_back(&self, name: &str, to: State) {
        let mut inner = self.lock();
        for volume in inner.volumes.iter_mut().filter(|volume| volume.name == name) {
            (volume.state, volume.out) = (to, false);
        }
        tracing::info!(group = %self.group, volume = name, "attached");
    }

    /// How far a synchronisation is: new words for the state it runs under; nothing when that is no longer
    /// the state.
    pub fn progress(&self, running: State, why: String) {
        let mut inner = self.lock();
        if worst(&inner.volumes) == running {
            inner.why = why;
        }
    }

    /// Worst state of the volumes that are captured, and its cause; `detached` when none is.
    pub fn state(&self) -> (State, String) {
        let inner = self.lock();
        (worst(&inner.volumes), inner.why.clone())
    }

    /// State of one volume.
    pub fn volume(&self, name: &str) -> State {
        let inner = self.lock();
        inner.volumes.iter().find(|volume| volume.name == name).map_or(State::Detached, |volume| volume.state)
    }
}

/// The edges of the diagram in docs/architecture.md.
fn may_follow(from: State, to: State) -> bool {
    match from {
        State::Degraded | State::NeedsResync => to >= from || matches!(to, State::Syncing | State::Resyncing),
        State::Fenced => to == State::Fenced,
        State::Replicating | State::Syncing | State::Resyncing | State::Detached | State::Rewound => true,
    }
}

fn worst(volumes: &[Shown]) -> State {
    let captured = volumes.iter().filter(|volume| !volume.out);
    captured.map(|volume| volume.state).max().unwrap_or(State::Detached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keys_are_the_contract() {
        let group = GroupStatus {
            name: "g".into(),
            state: State::NeedsResync,
            why: "w".into(),
            epoch: 1,
            positions: Positions::default(),
            rpo_ms: None,
            clock_skew_ms: None,
            backlog_bytes: 0,
            sent_bytes: 0,
            skipped_bytes: 0,
            journal_bytes: 0,
            ring_percent: 0,
            peer: String::new(),
            connected: false,
            kernel: None,
            volumes: vec![],
        };
        let json = serde_json::to_value(Status { groups: vec![group] }).unwrap();
        let group = &json["groups"][0];
        assert_eq!(group["state"], "needs-resync");
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
            "volumes",
        ] {
            assert!(group.get(key).is_some(), "{key}");
        }
    }

    #[test]
    fn a_volume_that_was_taken_out_stays_out_of_the_others_way() {
        let board = Board::new("g", ["a".to_owned(), "b".to_owned()].into_iter());
        board.change(State::Replicating, "");
        board.take_out("b");
        board.change(State::Degraded, "ring full");
        assert_eq!((board.volume("a"), board.volume("b")), (State::Degraded, State::Detached));
        board.change(State::Resyncing, "repair");
        board.change(State::Replicating, "detached: b");
        assert_eq!(board.state(), (State::Replicating, "detached: b".to_owned()));
        board.put_back("b", State::Resyncing);
        assert_eq!(board.state().0, State::Resyncing);
        board.take_out("a");
        board.take_out("b");
        assert_eq!(board.state().0, State::Detached);
    }

    #[test]
    fn who_noticed_an_overflow_late_does_not_undo_its_repair() {
        let board = Board::new("g", ["v".to_owned()].into_iter());
        board.change(State::Replicating, "");
        board.change_from(State::Replicating, State::Degraded, "ring full", || true);
        board.change(State::Resyncing, "repair");
        board.change_from(State::Replicating, State::Degraded, "ring full", || true);
        assert_eq!(board.state(), (State::Resyncing, "repair".into()));
        board.change(State::Replicating, "");
        board.change_from(State::Replicating, State::Degraded, "ring full", || false);
        assert_eq!(board.state().0, State::Replicating);
    }

    #[test]
    fn every_edge_of_the_diagram_is_taken_and_no_other() {
        use State::{Degraded, Detached, Fenced, NeedsResync, Replicating, Resyncing, Rewound, Syncing};
        let all = [Replicating, Syncing, Resyncing, Degraded, NeedsResync, Detached, Rewound, Fenced];
        let edges = |from| match from {
            // A start says what it finds; a repair ends well, or in whatever came between; nothing leads back
            // from health.
            Detached | Syncing | Resyncing | Replicating | Rewound => &all[..],
            Degraded => &[Degraded, Syncing, Resyncing, NeedsResync, Detached, Rewound, Fenced],
            NeedsResync => &[NeedsResync, Syncing, Resyncing, Detached, Rewound, Fenced],
            Fenced => &[Fenced],
        };
        for from in all {
            for to in all {
                let board = Board::new("g", ["v".to_owned()].into_iter());
                board.change(from, "before");
                assert_eq!(board.state(), (from, "before".to_owned()), "from a start to {from:?}");
                board.change(to, "after");
                let expected = if edges(from).contains(&to) { (to, "after") } else { (from, "before") };
                assert_eq!(board.state(), (expected.0, expected.1.to_owned()), "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn a_gap_is_left_only_through_a_repair() {
        let board = Board::new("g", ["v".to_owned()].into_iter());
        board.change(State::Replicating, "");
        board.change(State::Degraded, "ring full");
        board.change(State::Replicating, "");
        assert_eq!(board.state(), (State::Degraded, "ring full".into()));
        board.change(State::NeedsResync, "and now this");
        assert_eq!(board.state().0, State::NeedsResync);
        board.change(State::Resyncing, "repair");
        board.progress(State::Resyncing, "half".into());
        assert_eq!(board.state(), (State::Resyncing, "half".into()));
        board.change(State::NeedsResync, "foreign history");
        board.progress(State::Resyncing, "all".into());
        board.change(State::Replicating, "");
        assert_eq!(
            board.state(),
            (State::NeedsResync, "foreign history".into()),
            "set meanwhile, not overwritten"
        );
        board.change(State::Resyncing, "again");
        board.change(State::Replicating, "");
        board.change_from(State::Replicating, State::Degraded, "ring full", || false);
        assert_eq!(board.state().0, State::Replicating);
    }
}
