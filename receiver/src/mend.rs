//! Mending: frames of the receiver's journal that rotted are fetched from the source again and put back.
//!
//! ```text
//! scrub, apply: suspect ─► look (footer, neighbours) ─► fetch a run ─► check ─► the ingest thread puts it back ─► look again
//! ```
//! Runs on the scrub thread. The source is asked for each frame of a run before the first is written; the
//! writer of the journal checks the run once more and puts it back in place
//! ([`journal::writer::Writer::mend`]). What the source does not hold any more is told to the history: a
//! hole, whose points are refused. Where it is not applied yet nothing but a new epoch brings the replica
//! further.
//!
//! State: what is rotten, by segment; it is found again after a restart.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use journal::io::Disk;
use journal::mend::{Layout, MAX_RUN_BYTES, Rot, Run, look};
use journal::segment::SegmentSummary;
use journal::walk::SegmentFile;
use journal::{ErrorKind, Lsn};
use serde::{Deserialize, Serialize};
use wire::refetch::Answer;

use crate::history::History;
use crate::ingest::queue::Ingest;
use crate::point::rfc3339;
use crate::refetch::Fetcher;
use crate::state::Moment;

/// Looks at one segment: frames, then the marks between them, then whether all holds.
const ROUNDS: usize = 3;

/// Frames or marks that were put back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repaired {
    /// Which file.
    pub file: PathBuf,
    /// Where in it, bytes.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
    /// First and last lsn; absent for what holds no records.
    pub lsns: Option<(Lsn, Lsn)>,
    /// When, this machine's clock, RFC 3339 UTC.
    pub time: String,
}

/// Frames that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rotten {
    /// The record before them.
    pub before: Moment,
    /// Their last record.
    pub last: Lsn,
    /// Number of their epoch.
    pub epoch: u64,
    /// File, offset and what is wrong.
    pub place: String,
    /// The source does not hold them any more, and why; absent while it may.
    pub gone: Option<String>,
}

impl Rotten {
    /// In words.
    pub fn why(&self) -> String {
        match &self.gone {
            Some(gone) => format!("{}; the source does not hold it any more: {gone}", self.place),
            None => format!("{}; it is fetched again once the source can be asked", self.place),
        }
    }
}

/// What a round came to.
#[derive(Debug, Default)]
pub(crate) struct Mended {
    /// What was put back.
    pub repaired: Vec<Repaired>,
    /// Segments that hold now.
    pub whole: Vec<PathBuf>,
}

/// See the module.
pub(crate) struct Mender {
    pub disk: Arc<dyn Disk>,
    pub history: Arc<History>,
    pub ingest: Ingest,
    pub fetcher: Arc<Fetcher>,
    pub segments: Arc<machine::Mutex<Vec<SegmentSummary>>>,
    pub now_ns: fn() -> u64,
    /// Called when what could not be read can be, or is known to be lost.
    pub changed: Box<dyn Fn() + Send>,
    /// What is rotten and known, by segment.
    pub rotten: BTreeMap<u64, Vec<Rotten>>,
}

impl Mender {
    /// Segments by the names of their files.
    pub fn numbers(&self, files: &[PathBuf]) -> Vec<u64> {
        let held = self.held();
        held.iter().filter(|segment| files.contains(&segment.path)).map(|segment| segment.number).collect()
    }

    /// Segments that may hold what follows an lsn.
    pub fn behind(&self, lsn: Lsn) -> Vec<u64> {
        let held = self.held();
        let behind = held.iter().filter(|segment| !segment.sealed || segment.last_lsn > lsn);
        behind.map(|segment| segment.number).collect()
    }

    /// Those that are known to be rotten.
    pub fn known(&self) -> Vec<u64> {
        self.rotten.keys().copied().collect()
    }

    fn held(&self) -> Vec<SegmentSummary> {
        self.segments.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Looks at segments, and mends what can be mended, up to the first in which something was found where
    /// `first` says so. `open` opens a segment to be read at the scrub's pace.
    pub fn mend(
        &mut self,
        numbers: &[u64],
        first: bool,
        open: &dyn Fn(&std::path::Path, u64) -> journal::Result<SegmentFile>,
    ) -> Mended {
        let mut done = Mended::default();
        let known = self.rotten.clone();
        for &number in numbers {
            let before = done.repaired.len();
            let held = self.segment(number, open, &mut done);
            let found =
                done.repaired.len() > before || held.as_ref().is_some_and(|rotten| !rotten.is_empty());
            match held {
                Some(rotten) if !rotten.is_empty() => _ = self.rotten.insert(number, rotten),
                _ => _ = self.rotten.remove(&number),
            }
            if first && found {
                break;
            }
        }
        self.history.note_rotten(self.rotten.values().flatten().cloned().collect());
        if !done.repaired.is_empty() || self.rotten != known {
            (self.changed)();
        }
        done
    }

    /// What of a segment is left rotten; `None` where it cannot be said, or the segment has left the journal.
    fn segment(
        &self,
        number: u64,
        open: &dyn Fn(&std::path::Path, u64) -> journal::Result<SegmentFile>,
        done: &mut Mended,
    ) -> Option<Vec<Rotten>> {
        let path = self.held().into_iter().find(|held| held.number == number)?.path;
        let mut rotten = Vec::new();
        for _ in 0..ROUNDS {
            let layout = self.ingest.with_writer(move |writer| writer.layout(number))?;
            let looked = layout.and_then(|layout: Layout| look(&open(&path, number)?, &layout));
            let rot = match looked {
                Ok(rot) => rot,
                Err(error) => {
                    tracing::warn!(%error, "what rotted of a segment cannot be told");
                    return None;
                }
            };
            if rot == Rot::default() {
                done.whole.push(path);
                return Some(Vec::new());
            }
            rotten.clear();
            let before = done.repaired.len();
            for mark in rot.marks {
                let repaired = Repaired {
                    file: path.clone(),
                    offset: mark.offset,
                    bytes: journal::SECTOR_BYTES as u64,
                    lsns: None,
                    time: self.time(),
                };
                self.put_back(repaired, done, move |writer| writer.mend_mark(&mark));
            }
            for run in rot.runs {
                match self.fetch(&run) {
                    Ok(frames) => self.run(&run, frames, done),
                    Err(gone) => rotten.push(self.as_rotten(&run, gone)),
                }
            }
            if done.repaired.len() == before {
                break;
            }
        }
        Some(rotten)
    }

    /// All frames of a run, checked; else why the source has none of it any more, if that is known.
    fn fetch(&self, run: &Run) -> Result<Vec<Vec<u8>>, Option<String>> {
        if run.bytes() > MAX_RUN_BYTES {
            return Err(Some(format!("{} bytes in a row are too many to be fetched", run.bytes())));
        }
        let (mut frames, mut held) = (Vec::new(), run.after);
        for (at, entry) in run.frames.iter().enumerate() {
            match self.fetcher.fetch(held, entry.last_lsn.0, entry.bytes as usize) {
                Answer::Frame(frame) => {
                    held = run.check(at, &held, &frame).map_err(|error| {
                        tracing::error!(%error, "the source sent another frame than the one that rotted");
                        Some(format!("it sent another frame: {error}"))
                    })?;
                    frames.push(frame);
                }
                Answer::Gone(why) => return Err(Some(why)),
                Answer::Later(why) => {
                    tracing::info!(why, lsn = %entry.last_lsn, "a rotten frame cannot be fetched now");
                    return Err(None);
                }
            }
        }
        Ok(frames)
    }

    fn run(&self, run: &Run, frames: Vec<Vec<u8>>, done: &mut Mended) {
        let lsns =
            run.frames.first().zip(run.frames.last()).map(|(first, last)| (first.first_lsn, last.last_lsn));
        let repaired = Repaired {
            file: run.path.clone(),
            offset: run.offset(),
            bytes: run.bytes(),
            lsns,
            time: self.time(),
        };
        let run = run.clone();
        self.put_back(repaired, done, move |writer| writer.mend(&run, &frames));
    }

    fn put_back(
        &self,
        repaired: Repaired,
        done: &mut Mended,
        work: impl FnOnce(&mut journal::writer::Writer) -> journal::Result<()> + Send + 'static,
    ) {
        let file = repaired.file.display().to_string();
        match self.ingest.with_writer(work) {
            Some(Ok(())) => {
                tracing::warn!(
                    file,
                    offset = repaired.offset,
                    bytes = repaired.bytes,
                    "what rotted is put back"
                );
                done.repaired.push(repaired);
            }
            Some(Err(error)) if error.kind == ErrorKind::NotHeld => {}
            Some(Err(error)) => tracing::error!(%error, file, "what rotted cannot be put back"),
            None => {}
        }
    }

    fn time(&self) -> String {
        rfc3339((self.now_ns)())
    }

    fn as_rotten(&self, run: &Run, gone: Option<String>) -> Rotten {
        // The first frame of a segment follows the last record of the one before it.
        let held = self.held();
        let earlier = held.iter().rev().find(|held| held.number < run.segment && held.frames > 0);
        let first_ns = run.frames.first().map_or(0, |entry| entry.first_time_ns);
        let time_ns = match run.before_time_ns {
            0 => earlier.map_or(first_ns, |held| held.last_time_ns),
            known => known,
        };
        Rotten {
            before: Moment { lsn: run.after.lsn, time_ns },
            last: run.end.lsn,
            epoch: run.after.epoch.number,
            place: format!("damage in {} at byte {}: {}", run.path.display(), run.offset(), run.what),
            gone,
        }
    }
}
