//! The synchronising thread's part of a verification: which window to look at next, and what becomes of what
//! it finds.
//!
//! ```text
//!  every window once ─► what differed, again and again ─► judged twice, undisturbed: a difference ─► repair ─► equal?
//! ```
//! A window at a time: gaps and failed ranges come in between.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kfilter::abi::GRANULE;

use super::Engine;
use super::pace::Pace;
use super::progress::Report;
use super::window::{Copier, Ended, Looked};
use crate::capture::Volume;
use crate::error::Result;
use crate::status::State;
use crate::verify::{Phase, Run, Suspect, Verification};

/// A window at most: its mask stays small, and what is written in it is soon looked at again …
const WINDOW: u64 = 1 << 30;
/// … and at least, …
const WINDOW_MIN: u64 = 16 << 20;
/// … but for no longer than this at the rate that is allowed.
const WINDOW_SECONDS: u64 = 5;
/// What is looked at again is looked at by blocks: of a chunk under writes, most blocks stand still.
const BLOCK: u64 = 4 << 10;
/// What differs is looked at again not before this, so that what was on its way has settled.
const AGAIN: Duration = Duration::from_millis(500);
/// So often, while it is being written …
const LOOKS: u32 = 12;
/// … and until so many looks in which it was not.
const SURE: u32 = 2;

/// What to look at next.
struct Next {
    volume: Arc<Volume>,
    window: Range<u64>,
    /// These ranges in it, again; none: the whole window for the first time.
    again: Vec<Range<u64>>,
}

/// The thread's own side of the verification that runs.
pub(super) struct Verifier {
    /// Which one.
    started_ns: u64,
    pace: Pace,
    rate_bits_per_s: u64,
    /// Not before this.
    next: Instant,
}

impl Verifier {
    fn new(run: &Run, allowed_bits_per_s: u64) -> Verifier {
        let rate_bits_per_s = match run.order.rate_bits_per_s {
            0 => allowed_bits_per_s,
            rate => rate,
        };
        let pace = Pace::new(rate_bits_per_s);
        Verifier { started_ns: run.report.started_ns, pace, rate_bits_per_s, next: machine::now() }
    }

    fn window_bytes(&self) -> u64 {
        match self.rate_bits_per_s {
            0 => WINDOW,
            rate => (rate / 8 * WINDOW_SECONDS).clamp(WINDOW_MIN, WINDOW) / GRANULE * GRANULE,
        }
    }
}

impl Engine<'_> {
    /// Whether a verification is to go on now.
    pub(super) fn verifies(&self) -> bool {
        is_due(&self.verifier) && self.agent.verification.is_running()
    }

    /// Looks at the next window.
    pub(super) fn verify(&mut self) -> Result<()> {
        let mut verifier = self.verifier.take();
        let done = self.look_on(&self.agent.verification, &mut verifier);
        self.verifier = verifier;
        done
    }

    /// Looks at the next window of a verification; `verifier` is this thread's side of it.
    pub(super) fn look_on(&self, verification: &Verification, verifier: &mut Option<Verifier>) -> Result<()> {
        let Some(mut run) = verification.running() else { return Ok(()) };
        let known = verifier.take().filter(|known| known.started_ns == run.report.started_ns);
        let known = known.unwrap_or_else(|| Verifier::new(&run, self.agent.settings.resync.rate));
        self.next_look(verification, &mut run, verifier.insert(known))
    }

    fn next_look(&self, verification: &Verification, run: &mut Run, verifier: &mut Verifier) -> Result<()> {
        let agent = self.agent;
        verifier.next = machine::now() + AGAIN;
        match agent.shared.progress.questions().is_offered() {
            None => {
                verification.waits("waiting for the receiver");
                return Ok(());
            }
            Some(false) => {
                run.end(Phase::Failed, "the receiver's version cannot compare");
                verification.put(run.clone());
                return Ok(());
            }
            Some(true) => {}
        }
        if !run.volumes.iter().eq(agent.volumes.iter().map(|volume| &volume.name)) {
            run.end(Phase::Failed, "the group has other volumes now: begin again");
            verification.put(run.clone());
            return Ok(());
        }
        let Some(Next { volume, window, again }) = self.choose(run, verifier.window_bytes()) else {
            match run.report.compared_bytes < run.report.total_bytes {
                true => {
                    run.end(Phase::Failed, "a volume was detached, or shrank, before all of it was compared")
                }
                false => run.end(Phase::Done, ""),
            }
            verification.put(run.clone());
            return Ok(());
        };
        let is_first = again.is_empty();
        let whole = [window.clone()];
        let ranges = if is_first { &whole[..] } else { &again };
        let mut report = Report::new(agent.shared.board.clone(), State::Replicating, "");
        let copier = Copier::new(agent, &volume, &mut verifier.pace, &mut report);
        let chunk_bytes = if is_first { GRANULE } else { BLOCK };
        match copier.look_at(window.clone(), ranges, chunk_bytes)? {
            Err(Ended::Later(why)) => verification.waits(&format!("waiting: {why}")),
            Err(_) => verification.waits("interrupted; it goes on when the group is replicating"),
            Ok(Looked { refused: Some(why), .. }) => {
                verification.waits(&format!("the receiver cannot compare now: {why}"));
            }
            Ok(looked) => {
                run.report.why.clear();
                if is_first {
                    run.report.compared_bytes += window.end - window.start;
                    run.offset = window.end;
                    // The next window is at hand.
                    verifier.next = machine::now();
                }
                self.judge(run, &volume, &looked, (!is_first).then_some(&again))?;
                verification.put(run.clone());
            }
        }
        Ok(())
    }

    /// What to look at next; `None` when everything is known.
    fn choose(&self, run: &mut Run, window_bytes: u64) -> Option<Next> {
        while let Some(volume) = self.agent.volumes.get(run.volume) {
            // A part of a granule at the end is one.
            let is_wanted = volume.is_attached() && (run.only.is_empty() || run.only.contains(&volume.id));
            let size = volume.size_bytes().filter(|size| is_wanted && run.offset < *size);
            match size {
                Some(size) => {
                    let end = (run.offset + window_bytes).min(size);
                    return Some(Next { volume: volume.clone(), window: run.offset..end, again: Vec::new() });
                }
                None => (run.volume, run.offset) = (run.volume + 1, 0),
            }
        }
        // One that cannot be looked at any more is not judged.
        run.suspects.retain(|suspect| self.attached(suspect.volume).is_some());
        let first = run.suspects.iter().min_by_key(|suspect| suspect.looks)?;
        let volume = self.attached(first.volume)?;
        let (start, looks) = (first.range.start, first.looks);
        let near = run.suspects.iter().filter(|other| {
            other.volume == volume.id
                && other.looks == looks
                && other.range.start >= start
                && other.range.end <= start + window_bytes
        });
        let ranges: Vec<Range<u64>> = near.map(|suspect| suspect.range.clone()).collect();
        let end = ranges.iter().map(|range| range.end).max()?;
        Some(Next { volume, window: start..end, again: ranges })
    }

    fn attached(&self, id: u32) -> Option<Arc<Volume>> {
        self.agent.volumes.iter().find(|volume| volume.id == id && volume.is_attached()).cloned()
    }

    /// What becomes of what was looked at: `again` are the suspects among them.
    fn judge(
        &self,
        run: &mut Run,
        volume: &Volume,
        looked: &Looked,
        again: Option<&[Range<u64>]>,
    ) -> Result<()> {
        let Some(again) = again else {
            run.report.unreadable_bytes += bytes(&looked.unreadable);
            let sure = looked.differing.iter().map(|range| (range, 1));
            let found = sure.chain(looked.written.iter().map(|range| (range, 0)));
            run.suspects(found.map(|(range, sure)| Suspect {
                volume: volume.id,
                range: range.clone(),
                looks: 1,
                sure,
                repairing: false,
            }));
            return Ok(());
        };
        let mut left = Vec::with_capacity(run.suspects.len());
        for suspect in std::mem::take(&mut run.suspects) {
            if suspect.volume != volume.id || !holds(again, &suspect.range) {
                left.push(suspect);
                continue;
            }
            if suspect.range.end - suspect.range.start <= BLOCK {
                left.extend(self.judge_block(run, volume, looked, suspect)?);
                continue;
            }
            // A chunk falls apart into those of its blocks that differ.
            let found = [(&looked.differing, 1), (&looked.written, 0)];
            for (blocks, sure) in found {
                let inside = within(blocks, &suspect.range).iter();
                left.extend(inside.map(|range| Suspect { range: range.clone(), sure, ..suspect.clone() }));
            }
        }
        left.sort_by_key(|suspect| (suspect.volume, suspect.range.start));
        run.suspects = left;
        Ok(())
    }

    /// What becomes of a block that was looked at again; `None`: it is known.
    fn judge_block(
        &self,
        run: &mut Run,
        volume: &Volume,
        looked: &Looked,
        mut suspect: Suspect,
    ) -> Result<Option<Suspect>> {
        let range = suspect.range.clone();
        suspect.looks += 1;
        let differs = holds(&looked.differing, &range);
        if !differs && !holds(&looked.written, &range) {
            if looked.unreadable.iter().any(|hole| hole.start < range.end && range.start < hole.end) {
                run.report.unreadable_bytes += range.end - range.start;
            } else if suspect.repairing {
                run.repaired(&volume.name, &range);
            }
            return Ok(None);
        }
        suspect.sure += u32::from(differs);
        if suspect.sure >= SURE && !suspect.repairing {
            run.differs(&volume.name, &range);
            if !run.order.repair {
                return Ok(None);
            }
            // The engine sends it again behind a fence before it looks the next time.
            self.agent.shared.ring.mark(volume.id, range)?;
            return Ok(Some(Suspect { looks: 1, sure: 0, repairing: true, ..suspect }));
        }
        if suspect.sure >= SURE || suspect.looks >= LOOKS {
            if !suspect.repairing {
                run.report.busy_bytes += range.end - range.start;
            }
            return Ok(None);
        }
        Ok(Some(suspect))
    }
}

/// Whether this thread's side of a verification has something to do, if it runs.
pub(super) fn is_due(verifier: &Option<Verifier>) -> bool {
    verifier.as_ref().is_none_or(|verifier| verifier.next <= machine::now())
}

/// Whether an ascending list has this range.
fn holds(list: &[Range<u64>], range: &Range<u64>) -> bool {
    list.binary_search_by_key(&range.start, |known| known.start).is_ok_and(|at| list[at] == *range)
}

/// Those of an ascending list that lie in a range.
fn within<'a>(list: &'a [Range<u64>], range: &Range<u64>) -> &'a [Range<u64>] {
    let from = list.partition_point(|known| known.start < range.start);
    let to = list.partition_point(|known| known.start < range.end);
    &list[from..to]
}

fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}
