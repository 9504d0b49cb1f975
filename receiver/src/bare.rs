//! Bare: a group's directory on which no daemon runs, worked on under its lock.
//!
//! For rewind, resume and hold where the receiver is stopped, or its source is gone for good. The journal is
//! recovered exactly as the daemon does it (a torn tail is cut, what is kept is synced), so that nothing is
//! applied that could be lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::compress::Compression;
use journal::io::Disk;
use journal::writer::{Writer, WriterOptions};

use crate::apply::{Applier, ApplySettings, HoldReport, ResumeReport, RewindReport};
use crate::history::History;
use crate::lock::GroupLock;
use crate::point::At;
use crate::state::{GroupStore, journal_dir};
use crate::{Error, ErrorKind, Result};

/// See the module. The lock is held as long as it lives.
pub struct Bare {
    applier: Applier,
    writer: Writer,
    _lock: GroupLock,
}

impl Bare {
    /// Opens a group's directory. `now_ns` is this machine's clock.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] naming the process that runs on it; what is damaged; a replica that cannot be had.
    pub fn open(disk: &Arc<dyn Disk>, group_dir: &Path, now_ns: u64) -> Result<Bare> {
        let lock = GroupLock::take(group_dir)?;
        let state = GroupStore::read(&**disk, group_dir)?;
        let dir = journal_dir(group_dir);
        if !Writer::exists(&**disk, &dir)? {
            let at = format!("{}: nothing was ever received", dir.display());
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        let segment_bytes = conf::Segments::default().segment_bytes;
        let options = WriterOptions { group: state.group, segment_bytes };
        let (writer, _) = Writer::open(Arc::clone(disk), &dir, options, now_ns)?;
        let history = History::open(Arc::clone(disk), group_dir)?;
        history.attach_tail(writer.shared());
        history.note_segments(writer.segments());
        let applier = Applier::open(Arc::clone(disk), group_dir, settings(), history)?;
        match applier.failure() {
            Some(error) => Err(error),
            None => Ok(Bare { applier, writer, _lock: lock }),
        }
    }

    /// Brings the replicas to a point.
    ///
    /// # Errors
    /// As [`Applier::rewind`] and [`Applier::next_batch`].
    pub fn rewind(&mut self, at: &At, now_ns: u64) -> Result<RewindReport> {
        let durable = self.writer.durable();
        // One that was cut is finished first.
        while self.applier.is_rewinding() {
            self.applier.next_batch(&durable)?;
        }
        let mut report = self.applier.rewind(at, now_ns)?;
        while self.applier.is_rewinding() {
            report.add(self.applier.next_batch(&durable)?.as_ref());
        }
        Ok(report)
    }

    /// Rolls the replicas forward to the newest.
    ///
    /// # Errors
    /// As [`Applier::resume`] and [`Applier::next_batch`].
    pub fn resume(&mut self) -> Result<ResumeReport> {
        let durable = self.writer.durable();
        let report = self.applier.resume(durable.lsn)?;
        while self.applier.next_batch(&durable)?.is_some() {}
        Ok(report)
    }

    /// Puts a bookmark under hold, or releases it.
    ///
    /// # Errors
    /// As [`Applier::hold`].
    pub fn hold(&mut self, name: &str, release: bool, now_ns: u64) -> Result<HoldReport> {
        self.applier.hold(name, release, now_ns)
    }

    /// Ends in good order.
    ///
    /// # Errors
    /// As [`Applier::close`].
    pub fn close(self) -> Result<()> {
        self.applier.close()
    }
}

fn settings() -> ApplySettings {
    let conf::Apply { batch_bytes, undo_bytes, .. } = conf::Apply::default();
    ApplySettings {
        batch_bytes,
        undo_bytes,
        undo_compression: Compression::Zstd(-5),
        // Only the daemon knows where new volumes go.
        replica_dir: PathBuf::new(),
        replica_paths: std::collections::BTreeMap::new(),
        seeded: std::collections::BTreeSet::new(),
        hold_replicas: true,
    }
}
