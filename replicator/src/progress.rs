//! How far each step has come: written by the pipeline and the link, read by status, `wait` and retention.
//!
//! State: the journaled position, what is journaled and not acknowledged, and the peer's last word. One lock,
//! taken per frame or per message, never per write.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use journal::{Lsn, Position};
use machine::{Condvar, Mutex, MutexGuard};
use tokio::sync::watch;

use crate::compare::Questions;

/// Unacknowledged frames are remembered one by one up to this many, then in pairs: a bound of 4 MiB whatever
/// the outage's length. `backlog_bytes` and `rpo_ms` get coarser, never wrong by more than an entry.
const MAX_ENTRIES: usize = 64 * 1024;

/// A run of journaled frames.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// (epoch number, last lsn) of the run.
    order: (u64, Lsn),
    first_time_ns: u64,
    bytes: u64,
}

/// Clocks that differ by more are told.
const SKEW_NS: u64 = 5_000_000_000;

/// A copy of this source that has not tried to connect for so long is not shown any more.
const COPY_SHOWN: Duration = Duration::from_secs(600);

impl PeerView {
    /// That another copy of this source tries to connect, while it does.
    pub fn copy_words(&self) -> Option<&str> {
        let (heard, words) = self.copy.as_ref()?;
        (machine::since(*heard) < COPY_SHOWN).then_some(words)
    }
}

/// What the receiver said last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerView {
    /// Its address while the link is up.
    pub connected: Option<String>,
    /// Why the link is down, or what the receiver complains about.
    pub trouble: String,
    /// The complaint is one that does not go away by itself.
    pub stuck: bool,
    /// The receiver takes frames, and writes none to the replica: it failed, or needs a synchronisation that
    /// is not remembered yet.
    pub replica_failed: bool,
    /// By how much our clock is ahead of its, ns; `None` before it was heard.
    pub clock_skew_ns: Option<i64>,
    /// Epoch that the positions belong to.
    pub epoch: u64,
    /// Durable in its journal.
    pub received: Lsn,
    /// Written to the replica.
    pub applied: Lsn,
    /// The replica durably is exactly this.
    pub checkpoint: Lsn,
    /// Another copy of this source was refused at the receiver: from where and when, in words; and when we
    /// heard of it.
    pub copy: Option<(Instant, String)>,
}

struct Inner {
    journaled: Position,
    entries: VecDeque<Entry>,
    /// Up to here frames need not be kept: acknowledged, or older than where the receiver starts.
    droppable: (u64, Lsn),
    closed: bool,
}

impl Inner {
    fn drop_up_to(&mut self, order: (u64, Lsn)) {
        while self.entries.front().is_some_and(|entry| entry.order <= order) {
            self.entries.pop_front();
        }
        self.droppable = self.droppable.max(order);
    }
}

/// The shared positions.
pub struct Progress {
    inner: Mutex<Inner>,
    appended: Condvar,
    sent_bytes: AtomicU64,
    peer: watch::Sender<PeerView>,
    epochs: watch::Sender<u64>,
    questions: Questions,
}

impl Progress {
    /// Starts from a recovered journal; `backlog` are its segments as (order, first time, bytes).
    pub fn new(journaled: Position, backlog: impl Iterator<Item = ((u64, Lsn), u64, u64)>) -> Progress {
        let entries =
            backlog.map(|(order, first_time_ns, bytes)| Entry { order, first_time_ns, bytes }).collect();
        Progress {
            inner: Mutex::new(Inner { journaled, entries, droppable: (0, Lsn::ZERO), closed: false }),
            appended: Condvar::new(),
            sent_bytes: AtomicU64::new(0),
            peer: watch::Sender::new(PeerView::default()),
            epochs: watch::Sender::new(journaled.epoch.number),
            questions: Questions::default(),
        }
    }

    /// So many bytes were sent to the receiver in this run.
    pub fn sent(&self, bytes: u64) {
        self.sent_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Bytes of datagrams sent to the receiver in this run, as of the last heartbeat.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// What is asked of the peer.
    pub fn questions(&self) -> &Questions {
        &self.questions
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame was appended.
    pub fn journaled(&self, position: Position, first_time_ns: u64, bytes: u64) {
        let mut inner = self.lock();
        assert!(position.order() > inner.journaled.order(), "the journal only grows");
        inner.journaled = position;
        if inner.entries.len() >= MAX_ENTRIES {
            let halved = inner.entries.make_contiguous().chunks(2).map(|pair| Entry {
                order: pair[pair.len() - 1].order,
                first_time_ns: pair[0].first_time_ns,
                bytes: pair.iter().map(|entry| entry.bytes).sum(),
            });
            inner.entries = halved.collect();
        }
        inner.entries.push_back(Entry { order: position.order(), first_time_ns, bytes });
        drop(inner);
        self.appended.notify_all();
    }

    /// A new epoch begins at `start`: nothing of it is journaled yet. A link of the old one ends.
    pub fn epoch_began(&self, start: Position) {
        self.lock().journaled = start;
        self.epochs.send_replace(start.epoch.number);
    }

    /// The journal that the link reads is over: it lets it go.
    pub fn journal_over(&self) {
        self.epochs.send_modify(|_| ());
    }

    /// The current epoch; unlike the state file never behind a lock that is held over a write to a disk.
    pub fn epoch(&self) -> u64 {
        *self.epochs.borrow()
    }

    /// Follows the epochs that begin in this run.
    pub fn watch_epochs(&self) -> watch::Receiver<u64> {
        self.epochs.subscribe()
    }

    /// Last frame appended.
    pub fn position(&self) -> Position {
        self.lock().journaled
    }

    /// Waits until the journal grows beyond `seen`, the wait is over, or the agent stops; false when it
    /// stops.
    pub fn wait_beyond(&self, seen: &Position, at_most: Duration) -> bool {
        let ends = machine::now() + at_most;
        let mut inner = self.lock();
        while !inner.closed && inner.journaled.order() <= seen.order() {
            let left = ends.saturating_duration_since(machine::now());
            if left.is_zero() {
                break;
            }
            inner = self.appended.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner);
        }
        !inner.closed
    }

    /// Wakes everyone who waits for the journal to grow: the agent stops.
    pub fn close(&self) {
        self.lock().closed = true;
        self.appended.notify_all();
    }

    /// The receiver's positions moved.
    pub fn acknowledged(&self, epoch: u64, received: Lsn, applied: Lsn, checkpoint: Lsn) {
        self.lock().drop_up_to((epoch, received));
        self.peer.send_modify(|peer| {
            peer.epoch = epoch;
            peer.received = received;
            peer.applied = applied;
            peer.checkpoint = checkpoint;
        });
    }

    /// The receiver's clock shows `theirs_ns` when ours shows `ours_ns`.
    pub fn heard_clock(&self, ours_ns: u64, theirs_ns: u64) {
        let skew = i128::from(ours_ns) - i128::from(theirs_ns);
        let skew_ns = i64::try_from(skew).unwrap_or(if skew < 0 { i64::MIN } else { i64::MAX });
        self.peer.send_modify(|peer| {
            let is_large = |skew: i64| skew.unsigned_abs() > SKEW_NS;
            if is_large(skew_ns) && !peer.clock_skew_ns.is_some_and(is_large) {
                tracing::warn!(
                    skew_ms = skew_ns / 1_000_000,
                    "the clocks of source and receiver differ: `time:` means this machine's"
                );
            }
            peer.clock_skew_ns = Some(skew_ns);
        });
    }

    /// The receiver starts at this position: what is older will never be asked for.
    pub fn starts_at(&self, start: &Position) {
        self.lock().drop_up_to(start.order());
    }

    /// Up to here segments may be dropped when their room is needed.
    pub fn droppable(&self) -> (u64, Lsn) {
        self.lock().droppable
    }

    /// The link or the receiver's state changed.
    pub fn peer_changed(&self, change: impl FnOnce(&mut PeerView)) {
        self.peer.send_if_modified(|peer| {
            let before = peer.clone();
            change(peer);
            *peer != before
        });
    }

    /// What the receiver said last.
    pub fn peer(&self) -> PeerView {
        self.peer.borrow().clone()
    }

    /// Follows what the receiver says.
    pub fn watch_peer(&self) -> watch::Receiver<PeerView> {
        self.peer.subscribe()
    }

    /// Bytes journaled and not acknowledged, and the time of the oldest record among them.
    pub fn backlog(&self) -> (u64, Option<u64>) {
        let inner = self.lock();
        let bytes = inner.entries.iter().map(|entry| entry.bytes).sum();
        (bytes, inner.entries.front().map(|entry| entry.first_time_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lsn: u64) -> Position {
        let mut position = Position { lsn: Lsn(lsn), ..Position::default() };
        position.epoch.number = 1;
        position
    }

    #[test]
    fn the_backlog_shrinks_by_acknowledgement_and_stays_bounded() {
        let progress = Progress::new(at(0), std::iter::empty());
        let frames = 3 * MAX_ENTRIES as u64;
        for lsn in 1..=frames {
            progress.journaled(at(lsn), 1000 + lsn, 512);
        }
        assert!(progress.lock().entries.len() <= MAX_ENTRIES);
        assert_eq!(progress.backlog(), (frames * 512, Some(1001)));
        progress.acknowledged(1, Lsn(frames), Lsn(0), Lsn(0));
        assert_eq!(progress.backlog(), (0, None));
        assert_eq!(progress.peer().received, Lsn(frames));
    }

    #[test]
    fn an_older_epoch_acknowledges_nothing_of_a_newer_one() {
        let progress = Progress::new(at(0), std::iter::empty());
        let mut newer = at(5);
        newer.epoch.number = 2;
        progress.journaled(newer, 7, 512);
        progress.acknowledged(1, Lsn(100), Lsn(0), Lsn(0));
        assert_eq!(progress.backlog(), (512, Some(7)));
    }

    #[test]
    fn waiting_ends_when_the_agent_stops() {
        let progress = std::sync::Arc::new(Progress::new(at(0), std::iter::empty()));
        let waiter = std::thread::spawn({
            let progress = progress.clone();
            move || progress.wait_beyond(&at(0), Duration::from_secs(60))
        });
        progress.close();
        assert!(!waiter.join().unwrap());
    }
}
