//! `afterimage verify`: whether the replica is what the disk is, while everybody goes on writing. Here: the
//! order, what is known so far, and their file; the looking is the synchronising thread's (`resync/verify`).
//!
//! The file `DIR/verify` holds the order, the place and the findings as JSON. It is replaced by rename and
//! not synced: after a lost machine a verification begins where an older copy says, which only looks at
//! something twice.

use std::ops::Range;
use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use machine::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, Handle, name_of, on_thread};
use crate::aside::Aside;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::status::State;

/// Ranges that are listed; when more differ, the replica is another disk's.
const MAX_LISTED: usize = 10_000;
/// Chunks that are looked at again; the same.
const MAX_SUSPECTS: usize = 64 * 1024;

/// How long an order waits for its file; a disk that takes longer keeps it when it answers.
const KEPT: Duration = Duration::from_secs(2);

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Send what differs again.
    #[serde(default)]
    pub repair: bool,
    /// Read at most this much, bits a second; 0: as a synchronisation may.
    #[serde(default)]
    pub rate_bits_per_s: u64,
}

/// Where a verification stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It goes on, or waits: `why` says for what.
    #[default]
    Running,
    /// Everything was compared.
    Done,
    /// By the operator.
    Stopped,
    /// It cannot go on: `why`.
    Failed,
}

/// A range of which disk and replica hold different content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Operator's name of the volume.
    pub volume: String,
    /// First byte.
    pub offset: u64,
    /// Bytes: whole blocks of 4 KiB, but for a volume's end.
    pub length: u64,
    /// It was sent again, and is equal now.
    pub repaired: bool,
}

/// What `afterimage verify` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// The group.
    pub group: String,
    /// Where it stands.
    pub state: Phase,
    /// What it waits for, or why it failed.
    pub why: String,
    /// Whether differences are repaired.
    pub repair: bool,
    /// When it began, realtime ns.
    pub started_ns: u64,
    /// When it ended; 0 before.
    pub ended_ns: u64,
    /// Bytes to compare.
    pub total_bytes: u64,
    /// Bytes compared.
    pub compared_bytes: u64,
    /// Bytes that differ, or differed before they were repaired.
    pub differing_bytes: u64,
    /// Bytes that the disk could not read.
    pub unreadable_bytes: u64,
    /// Bytes that were written at each of many looks, so that nothing can be said of them but that those
    /// writes are in the stream.
    pub busy_bytes: u64,
    /// Where they differ.
    pub differences: Vec<Difference>,
}

/// A range to look at again, because it differed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Suspect {
    pub volume: u32,
    pub range: Range<u64>,
    /// How often it was looked at.
    pub looks: u32,
    /// How often it differed without being written meanwhile.
    pub sure: u32,
    /// It is known to differ and was sent again: is it equal now?
    pub repairing: bool,
}

/// A verification: the order, the place and what is known.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Run {
    pub order: Order,
    pub report: VerifyReport,
    /// The volumes by name, as the settings had them: after another start they may be others.
    pub volumes: Vec<String>,
    /// Next volume to look at, in the order of the settings, and the byte.
    pub volume: usize,
    pub offset: u64,
    pub suspects: Vec<Suspect>,
    /// Only these; none: all.
    #[serde(default)]
    pub only: Vec<u32>,
}

/// The current verification, or the last one.
#[derive(Debug, Default)]
pub(crate) struct Verification {
    run: Mutex<Option<Run>>,
    /// None for a comparison by the agent itself.
    file: Option<Aside>,
}

impl Verification {
    /// Begins one for the agent itself, of volumes that nothing proves to be unchanged.
    pub fn begin(&self, run: Run) {
        *self.lock() = Some(run);
    }

    /// Ends that one.
    pub fn end(&self) {
        *self.lock() = None;
    }

    /// What the file holds; a file that cannot be read is none.
    pub fn open(dir: &Path) -> Verification {
        let path = dir.join("verify");
        let run = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let file = Aside::new(path, "after a restart the verification goes on at an older place");
        Verification { run: Mutex::new(run), file: Some(file) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Run>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The verification that is to go on.
    pub fn running(&self) -> Option<Run> {
        self.lock().clone().filter(|run| run.report.state == Phase::Running)
    }

    /// Whether one is to go on.
    pub fn is_running(&self) -> bool {
        self.lock().as_ref().is_some_and(|run| run.report.state == Phase::Running)
    }

    /// The current one, or the last.
    pub fn report(&self) -> Option<VerifyReport> {
        self.lock().as_ref().map(|run| run.report.clone())
    }

    /// The looking thread's news of the verification that began then; the order to stop comes before it.
    pub fn put(&self, run: Run) {
        let mut current = self.lock();
        let is_current = current.as_ref().is_some_and(|now| {
            now.report.started_ns == run.report.started_ns && now.report.state == Phase::Running
        });
        if is_current {
            self.save(&run);
            *current = Some(run);
        }
    }

    /// By the operator's order.
    fn stop(&self) -> Option<VerifyReport> {
        let mut current = self.lock();
        if let Some(run) = current.as_mut().filter(|run| run.report.state == Phase::Running) {
            run.end(Phase::Stopped, "by order");
            self.save(run);
        }
        current.as_ref().map(|run| run.report.clone())
    }

    /// What it waits for.
    pub fn waits(&self, why: &str) {
        if let Some(run) = self.lock().as_mut().filter(|run| run.report.state == Phase::Running) {
            why.clone_into(&mut run.report.why);
        }
    }

    /// Keeps the run in the file; never waits for its disk.
    fn save(&self, run: &Run) {
        let Some(file) = &self.file else { return };
        match serde_json::to_vec(run) {
            Ok(bytes) => file.put(bytes),
            Err(error) => tracing::warn!(%error, "the verification's place cannot be kept"),
        }
    }

    /// An order is answered when it is kept, unless the disk takes long.
    fn settle(&self) {
        if let Some(file) = &self.file {
            let _ = file.settle(KEPT);
        }
    }
}

impl Run {
    /// Puts a range to those that differ, next to its neighbour.
    pub fn differs(&mut self, volume: &str, range: &Range<u64>) {
        let report = &mut self.report;
        report.differing_bytes += range.end - range.start;
        let differences = &mut report.differences;
        let listed = differences.len();
        let before = differences.last_mut().filter(|known| {
            known.volume == volume && known.offset + known.length == range.start && !known.repaired
        });
        match before {
            Some(known) => known.length = range.end - known.offset,
            None if listed < MAX_LISTED => differences.push(Difference {
                volume: volume.to_owned(),
                offset: range.start,
                length: range.end - range.start,
                repaired: false,
            }),
            None => self.differs_too_much(),
        }
    }

    /// Puts chunks to those that are looked at again.
    pub fn suspects(&mut self, found: impl Iterator<Item = Suspect>) {
        self.suspects.extend(found);
        self.suspects.sort_by_key(|suspect| (suspect.volume, suspect.range.start));
        if self.suspects.len() > MAX_SUSPECTS {
            self.suspects.clear();
            self.differs_too_much();
        }
    }

    fn differs_too_much(&mut self) {
        let why = "the replica differs nearly everywhere: it is another disk's, or was never synchronised; detach and attach \
                   the volume to synchronise all of it";
        self.end(Phase::Failed, why);
    }

    /// A range that differed is equal now.
    pub fn repaired(&mut self, volume: &str, range: &Range<u64>) {
        let differences = &mut self.report.differences;
        let Some(at) = differences.iter().position(|known| {
            known.volume == volume && known.offset <= range.start && range.end <= known.offset + known.length
        }) else {
            return;
        };
        let known = differences.remove(at);
        let end = known.offset + known.length;
        let parts =
            [(known.offset..range.start, false), (range.clone(), true), (range.end..end, known.repaired)];
        let parts = parts.into_iter().filter(|(part, _)| part.start < part.end);
        let parts: Vec<Difference> = parts
            .map(|(part, repaired)| Difference {
                volume: volume.to_owned(),
                offset: part.start,
                length: part.end - part.start,
                repaired,
            })
            .collect();
        differences.splice(at..at, parts);
    }

    /// It is over.
    pub fn end(&mut self, state: Phase, why: &str) {
        self.report.state = state;
        why.clone_into(&mut self.report.why);
        self.report.ended_ns = now_ns();
        let report = &self.report;
        tracing::info!(
            ?state,
            why,
            by_order = self.only.is_empty(),
            compared_bytes = report.compared_bytes,
            differing_bytes = report.differing_bytes,
            unreadable_bytes = report.unreadable_bytes,
            busy_bytes = report.busy_bytes,
            "verification ended"
        );
        for found in &report.differences {
            let Difference { volume, offset, length, repaired } = found;
            tracing::warn!(volume, offset, length, repaired, "the replica differed from the disk");
        }
    }
}

impl Handle {
    /// Begins to compare the replica with the disks. One that runs already with the same order goes on.
    ///
    /// # Errors
    /// The group is not consistent now, or another verification runs.
    pub async fn verify(&self, order: Order) -> Result<VerifyReport> {
        let agent = self.agent.clone();
        let begun = on_thread("af-verify", move || {
            let report = agent.verify(order);
            agent.verification.settle();
            report
        });
        begun.await?
    }

    /// The verification that runs, or the last one.
    pub fn verification(&self) -> Option<VerifyReport> {
        self.agent.verification.report()
    }

    /// Ends the verification that runs. What was repaired stays so.
    ///
    /// # Errors
    /// No thread can be started.
    pub async fn stop_verification(&self) -> Result<Option<VerifyReport>> {
        let agent = self.agent.clone();
        let ended = on_thread("af-verify", move || {
            let report = agent.verification.stop();
            agent.verification.settle();
            report
        });
        ended.await
    }
}

impl Agent {
    fn verify(&self, order: Order) -> Result<VerifyReport> {
        let (state, why) = self.shared.board.state();
        if state != State::Replicating {
            let at = format!(
                "the group is {}: {why}; a replica is compared when it claims to be equal",
                name_of(state)
            );
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        let mut current = self.verification.lock();
        if let Some(run) = current.as_ref().filter(|run| run.report.state == Phase::Running) {
            if run.order == order {
                return Ok(run.report.clone());
            }
            let at = "another verification runs, with another order: wait for it, or end it with --stop";
            return Err(Error::new(ErrorKind::Busy, at));
        }
        let attached = self.volumes.iter().filter(|volume| volume.is_attached());
        let report = VerifyReport {
            group: self.settings.group.clone(),
            repair: order.repair,
            started_ns: now_ns(),
            total_bytes: attached.filter_map(|volume| volume.size_bytes()).sum(),
            ..VerifyReport::default()
        };
        let volumes = self.volumes.iter().map(|volume| volume.name.clone()).collect();
        let run = Run { order, report: report.clone(), volumes, ..Run::default() };
        self.verification.save(&run);
        *current = Some(run);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        Run { report: VerifyReport { started_ns: 7, ..VerifyReport::default() }, ..Run::default() }
    }

    #[test]
    fn neighbours_are_one_difference_and_fall_apart_as_they_are_repaired() {
        let mut run = run();
        run.differs("a", &(0..10));
        run.differs("a", &(10..20));
        run.differs("b", &(20..30));
        run.repaired("a", &(5..15));
        let shown: Vec<_> = run
            .report
            .differences
            .iter()
            .map(|d| (d.volume.as_str(), d.offset, d.length, d.repaired))
            .collect();
        assert_eq!(
            shown,
            [("a", 0, 5, false), ("a", 5, 10, true), ("a", 15, 5, false), ("b", 20, 10, false)]
        );
        assert_eq!(run.report.differing_bytes, 30);
    }

    #[test]
    fn a_replica_of_another_disk_is_not_listed_without_end() {
        let mut run = run();
        for at in 0..=MAX_LISTED as u64 {
            run.differs("a", &(at * 2..at * 2 + 1));
        }
        assert_eq!((run.report.state, run.report.differences.len()), (Phase::Failed, MAX_LISTED));
    }

    #[test]
    fn what_was_found_outlives_the_agent_and_an_order_to_stop_wins() {
        let dir = tempfile::tempdir().unwrap();
        let verification = Verification::open(dir.path());
        assert!(verification.running().is_none());
        *verification.lock() = Some(run());
        let mut news = run();
        news.offset = 64;
        verification.put(news.clone());
        verification.settle();
        assert_eq!(Verification::open(dir.path()).running().unwrap().offset, 64);
        let mut other = news.clone();
        other.report.started_ns = 8;
        verification.put(other);
        assert_eq!(verification.running().unwrap().report.started_ns, 7, "news of an older one");
        verification.lock().as_mut().unwrap().end(Phase::Stopped, "by order");
        verification.put(news);
        assert_eq!(verification.report().unwrap().state, Phase::Stopped);
        std::fs::write(dir.path().join("verify"), b"{").unwrap();
        assert!(Verification::open(dir.path()).report().is_none());
    }
}
