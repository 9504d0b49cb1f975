//! Compares ranges of one window with the replica while they are written, and never takes a write on its way
//! for a difference.
//!
//! ⚠ Order: 1 a fence: everything submitted before it comes back from the disk (barrier), and the mask starts
//! at its lsn; 2 both sides hash, the receiver when it holds everything up to the fence; 3 what was captured
//! by then has passed the mask; 4 only then is judged: a chunk that no record behind the fence has touched
//! was the same content on the disk all the time, and the same on the replica. Any other that differs is
//! looked at again.

use std::ops::Range;

use wire::compare::{HASH_BYTES, MAX_CHUNKS};

use super::differing::Asked;
use super::{Copied, Copier, Ended, Kind, Stop};
use crate::capture::disk::Buffer;
use crate::compare::Answer;
use crate::error::Result;

/// What a look has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Looked {
    /// Differ, and nobody wrote them meanwhile.
    pub differing: Vec<Range<u64>>,
    /// Differ, and were written meanwhile.
    pub written: Vec<Range<u64>>,
    /// The disk could not read them.
    pub unreadable: Vec<Range<u64>>,
    /// Why the receiver cannot answer.
    pub refused: Option<String>,
}

impl Copier<'_> {
    /// Looks at ascending ranges in `window`, by chunks of this size, at which they begin.
    ///
    /// # Errors
    /// The agent stops, or the ring failed. [`Ended`]: something came in between.
    pub fn look_at(
        mut self,
        window: Range<u64>,
        ranges: &[Range<u64>],
        chunk_bytes: u64,
    ) -> Result<std::result::Result<Looked, Ended>> {
        self.paces_hashes = true;
        let looked = self.looked(window, ranges, chunk_bytes);
        self.agent.shared.map.end();
        match looked {
            Ok(looked) => Ok(Ok(looked)),
            Err(Stop::Lost) => Ok(Err(Ended::Lost)),
            Err(Stop::Later(why)) => Ok(Err(Ended::Later(why))),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    /// Whether to go on waiting for an answer: a range that is to be repaired does not wait for a receiver
    /// that is away.
    fn look_for_receiver(&self) -> Copied<()> {
        if self.agent.shared.progress.peer().connected.is_none() {
            return Err(Stop::Later("the receiver is not connected".to_owned()));
        }
        self.look()
    }

    fn looked(&mut self, window: Range<u64>, ranges: &[Range<u64>], chunk_bytes: u64) -> Copied<Looked> {
        let fence = self.begin(&window, Kind::Repair)?;
        super::barrier(self.agent)?.map_err(Stop::Later)?;
        let mut key = [0; 32];
        rand::fill(&mut key);
        let mut buffer = Buffer::new(usize::try_from(super::CHUNK_BYTES).unwrap_or(1 << 20));
        let mut looked = Looked::default();
        let mut differing = Vec::new();
        let steps = |range: Range<u64>, bytes: u64| {
            let starts = (range.start..range.end).step_by(usize::try_from(bytes).unwrap_or(1 << 16));
            starts.map(move |start| start..(start + bytes).min(range.end))
        };
        let parts = joined(ranges).into_iter().flat_map(|run| steps(run, chunk_bytes * (MAX_CHUNKS / 2)));
        for part in parts {
            let Asked { range, pending, .. } = self.ask(part, fence, key, chunk_bytes)?;
            let ours = self.hashes(range.clone(), &key, chunk_bytes, &mut buffer, &mut looked.unreadable)?;
            let questions = self.agent.shared.progress.questions();
            let theirs = match questions.wait(pending, || self.look_for_receiver())? {
                Answer::Hashes(hashes, _) if hashes.len() == ours.len() => hashes,
                Answer::Hashes(..) => return Err(Stop::Later("the receiver's answer is malformed".into())),
                Answer::No(why) => {
                    looked.refused = Some(why);
                    return Ok(looked);
                }
            };
            let pairs = ours.chunks(HASH_BYTES).zip(theirs.chunks(HASH_BYTES));
            let unequal =
                steps(range.clone(), chunk_bytes).zip(pairs).filter(|(_, (ours, theirs))| ours != theirs);
            differing.extend(unequal.map(|(chunk, _)| chunk));
            self.report.advance(range.end - range.start, 0);
        }
        differing.retain(|chunk| {
            !looked.unreadable.iter().any(|hole| hole.start < chunk.end && chunk.start < hole.end)
        });
        // Nobody reads what a file system called free when it was left out.
        differing.retain(|chunk| !self.agent.shared.skipped.holds(self.volume.id, chunk.start));
        if differing.is_empty() {
            return Ok(looked);
        }
        // Everything that either side can have seen by now was captured before now.
        let captured = self.agent.shared.ring.captured_lsn();
        while self.agent.shared.progress.position().lsn.0 < captured {
            self.wait_for_journal()?;
        }
        self.look()?;
        let map = self.agent.shared.map.lock();
        for chunk in differing {
            let list = if map.is_written(&chunk) { &mut looked.written } else { &mut looked.differing };
            list.push(chunk);
        }
        Ok(looked)
    }
}

/// Ascending ranges, those next to each other as one.
fn joined(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => runs.push(range.clone()),
        }
    }
    runs
}
