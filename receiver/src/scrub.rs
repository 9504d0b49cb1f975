//! Scrub: the stored segments are read and checked in the background, slowly, so that rot is found while the
//! other side or a backup can still mend it, and not by the restore that needs them.
//!
//! A pass verifies the group's journal and undo as `afterimage journal verify` does, beside the threads that
//! append to them and drop from them. ⚠ What such a neighbour does in the middle of a look can pass for
//! damage: only what two looks find at the same place is told. What the page cache holds is read from there:
//! rot below it shows once it is evicted.
//!
//! What rotted of the journal is mended ([`crate::mend`]): after a pass, when the applier could not read on,
//! and again when a source connects.
//!
//! State: the last pass's result, and what was put back; nothing on disk.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use journal::Lsn;
use journal::io::Disk;
use journal::verify::{Finding, Severity, VerifyOptions, verify_dir};
use journal::walk::SegmentFile;
use machine::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use crate::mend::{Mender, Repaired};
use crate::point::rfc3339;
use crate::state::{journal_dir, undo_dir};
use crate::undo::file_number;
use crate::{Error, Result};

mod paced;

use paced::Paced;

/// Bytes read a second: a day's history of 1 TiB in less than a day, and little beside the stream on any
/// disk.
const RATE_BYTES_PER_S: u64 = 16 << 20;
/// Pause after the group is opened: its first minutes have other work.
const FIRST: Duration = Duration::from_secs(600);
/// Pause between two passes.
const BETWEEN: Duration = Duration::from_secs(24 * 3600);
/// Reads are paid for in sleeps no shorter than this.
const SLEEP: Duration = Duration::from_millis(20);
/// Findings that are told; one rotten disk has thousands.
const MAX_FINDINGS: usize = 100;
/// Scrubbing is the last thing that matters.
const NICENESS: i32 = 19;

/// What the last pass found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// When it ended, this machine's clock, RFC 3339 UTC.
    pub finished: String,
    /// Segments read.
    pub segments: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Places that do not hold.
    pub damage: Vec<Damage>,
}

/// A place that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Which file.
    pub file: PathBuf,
    /// Where in it, bytes.
    pub offset: u64,
    /// What is wrong.
    pub what: String,
}

/// Paces, starts and stops scrubbing; shared by the scrub thread and whoever tells it.
#[derive(Debug)]
pub struct Scrub {
    rate_bytes_per_s: u64,
    told: Mutex<Told>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Told {
    stop: bool,
    now: bool,
    /// What follows this lsn could not be read.
    suspect: Option<Lsn>,
    /// A source has come that may have what is rotten.
    again: bool,
    repaired: VecDeque<Repaired>,
    owed: Duration,
    last: Option<ScrubStatus>,
}

impl Default for Scrub {
    fn default() -> Scrub {
        Scrub::at(RATE_BYTES_PER_S)
    }
}

impl Scrub {
    /// At most so many bytes a second.
    pub fn at(rate_bytes_per_s: u64) -> Scrub {
        Scrub { rate_bytes_per_s, told: Mutex::default(), changed: Condvar::new() }
    }

    /// What the last pass found; `None` before the first has ended.
    pub fn last(&self) -> Option<ScrubStatus> {
        self.lock().last.clone()
    }

    /// The next pass begins at once.
    pub fn start_now(&self) {
        self.lock().now = true;
        self.changed.notify_all();
    }

    /// What was put back since the start, the newest last.
    pub fn repaired(&self) -> Vec<Repaired> {
        self.lock().repaired.iter().cloned().collect()
    }

    /// Something behind this lsn could not be read: looks there at once, and mends what can be mended.
    pub fn suspect(&self, behind: Lsn) {
        self.lock().suspect = Some(behind);
        self.changed.notify_all();
    }

    /// What could not be mended is tried again: a source has come.
    pub fn look_again(&self) {
        self.lock().again = true;
        self.changed.notify_all();
    }

    /// Ends the thread, also in the middle of a pass.
    pub fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    /// The scrub thread of a group.
    pub(crate) fn run(self: &Arc<Self>, disk: &Arc<dyn Disk>, group_dir: &Path, mut mender: Mender) {
        if let Err(errno) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::debug!(%errno, "the scrub thread keeps its priority");
        }
        let mut due = machine::now() + FIRST;
        loop {
            match self.wait(due) {
                Wake::Stop => return,
                Wake::Suspect(lsn) => self.mend(&mut mender, |mender| (mender.behind(lsn), true)),
                Wake::Again => self.mend(&mut mender, |mender| (mender.known(), false)),
                Wake::Pass => {
                    match self.pass(disk, group_dir, mender.now_ns) {
                        Ok(Some(found)) => self.found(found, &mut mender),
                        Ok(None) => return,
                        // A directory that cannot be listed is met by everybody else, too.
                        Err(error) => tracing::warn!(%error, "cannot scrub"),
                    }
                    due = machine::now() + BETWEEN;
                }
            }
        }
    }

    fn found(self: &Arc<Self>, found: ScrubStatus, mender: &mut Mender) {
        for Damage { file, offset, what } in &found.damage {
            tracing::error!(file = %file.display(), offset, what, "scrub found damage");
        }
        let files: Vec<PathBuf> = found.damage.iter().map(|damage| damage.file.clone()).collect();
        // Told before it is mended: that may take a while, and fail.
        self.lock().last = Some(found);
        self.mend(mender, |mender| ([mender.numbers(&files), mender.known()].concat(), false));
    }

    /// Mends what can be mended of some segments, and tells what came of it.
    fn mend(self: &Arc<Self>, mender: &mut Mender, which: impl FnOnce(&Mender) -> (Vec<u64>, bool)) {
        let (mut numbers, first) = which(mender);
        numbers.sort_unstable();
        numbers.dedup();
        let paced = Paced { disk: Arc::clone(&mender.disk), scrub: Arc::clone(self) };
        let done = mender.mend(&numbers, first, &|path, number| SegmentFile::open(&paced, path, number));
        let mut told = self.lock();
        if let Some(last) = &mut told.last {
            last.damage.retain(|damage| !done.whole.contains(&damage.file));
        }
        for repaired in done.repaired {
            if told.repaired.len() == MAX_FINDINGS {
                told.repaired.pop_front();
            }
            told.repaired.push_back(repaired);
        }
    }

    /// One pass over a group's journal and undo; `None` where it was stopped.
    ///
    /// # Errors
    /// A directory cannot be listed.
    pub fn pass(
        self: &Arc<Self>,
        disk: &Arc<dyn Disk>,
        group_dir: &Path,
        now_ns: fn() -> u64,
    ) -> Result<Option<ScrubStatus>> {
        match self.look(disk, group_dir) {
            // Whatever a stopped pass met means nothing.
            _ if self.lock().stop => Ok(None),
            Ok(found) => Ok(Some(ScrubStatus { finished: rfc3339(now_ns()), ..found })),
            Err(error) => Err(error),
        }
    }

    fn look(self: &Arc<Self>, disk: &Arc<dyn Disk>, group_dir: &Path) -> Result<ScrubStatus> {
        let paced = Paced { disk: Arc::clone(disk), scrub: Arc::clone(self) };
        let mut found = ScrubStatus::default();
        let undo = undo_dir(group_dir);
        let names = disk.list(&undo).map_err(|e| Error::io(format!("list {}", undo.display()), e))?;
        // A group without history has no undo, which is no damage.
        let undo = names.iter().any(|name| file_number(name).is_some()).then_some(undo);
        for dir in [Some(journal_dir(group_dir)), undo].into_iter().flatten() {
            let look = || -> Result<_> {
                Ok(verify_dir(&paced, &dir, VerifyOptions { unpack: false }, &mut |_, _| {})?)
            };
            let first = look()?;
            let mut damage: Vec<Finding> = damaged(first.findings);
            if !damage.is_empty() && !self.lock().stop {
                let second = damaged(look()?.findings);
                let again = |one: &Finding| {
                    second.iter().any(|two| (&two.file, two.offset) == (&one.file, one.offset))
                };
                damage.retain(again);
            }
            found.segments += first.segments;
            found.bytes += first.bytes;
            let told =
                damage.into_iter().map(|Finding { file, offset, what, .. }| Damage { file, offset, what });
            found.damage.extend(told);
        }
        found.damage.truncate(MAX_FINDINGS);
        Ok(found)
    }

    /// Waits until there is something to do.
    fn wait(&self, until: Instant) -> Wake {
        let mut told = self.lock();
        loop {
            if told.stop {
                return Wake::Stop;
            }
            if let Some(lsn) = told.suspect.take() {
                return Wake::Suspect(lsn);
            }
            if std::mem::take(&mut told.again) {
                return Wake::Again;
            }
            let left = until.saturating_duration_since(machine::now());
            if std::mem::take(&mut told.now) || left.is_zero() {
                return Wake::Pass;
            }
            told = self.changed.wait_timeout(told, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Pays for a read; an error where the pass is to end.
    fn pay(&self, bytes: u64) -> io::Result<()> {
        let mut told = self.lock();
        told.owed += Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / self.rate_bytes_per_s.max(1));
        if told.owed >= SLEEP {
            let until = machine::now() + std::mem::take(&mut told.owed);
            while !told.stop && machine::now() < until {
                let left = until.saturating_duration_since(machine::now());
                told = self.changed.wait_timeout(told, left).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if told.stop { Err(io::Error::other("scrubbing was stopped")) } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread is to do.
enum Wake {
    Pass,
    Suspect(Lsn),
    Again,
    Stop,
}

fn damaged(findings: Vec<Finding>) -> Vec<Finding> {
    findings.into_iter().filter(|finding| finding.severity == Severity::Corrupt).collect()
}
