//! Of a long dirty range, copies only what the replica does not hold already: after an unclean end of the
//! machine, or with a replica that was brought by other means, nearly all of it is there.
//!
//! Both sides hash chunks of a granule; ours are read after the barrier, the receiver's when it holds
//! everything up to our begin. Equal hashes mean that every sector that nobody has written since begin is
//! equal, and the others are records: the chunk's bits are cleared. A differing chunk is read again and
//! copied as any other.

use std::collections::VecDeque;
use std::ops::Range;

use kfilter::abi::GRANULE;
use wire::compare::{self, HASH_BYTES};
use wire::message::Message;

use super::{Copied, Copier, Stop};
use crate::capture::disk::Buffer;
use crate::compare::{Answer, POSTED, Pending};

/// Shorter dirty ranges are known changes: most of them differ.
pub const FROM_BYTES: u64 = 4 << 20;
/// One question.
pub(super) const QUESTION_BYTES: u64 = compare::MAX_CHUNKS / 2 * GRANULE;

/// A question that was posted, and for what.
pub(super) struct Asked {
    pub range: Range<u64>,
    chunk_bytes: u64,
    question: Message,
    pub pending: Pending,
}

impl Copier<'_> {
    /// Whether there is something to compare with. Waits for the receiver to say so: without it nothing of a
    /// long range could be sent either. The first synchronisation waits only until the first attempt to reach
    /// it has failed: mostly there is nothing at the other end yet, and what it will need can be journaled
    /// meanwhile.
    pub(super) fn compares(&mut self, range: &Range<u64>) -> Copied<bool> {
        let (is_first, epoch, is_part) = {
            let state = self.agent.remembered();
            (!state.was_consistent, state.epoch.number, !state.epoch_is_full)
        };
        if is_first && self.is_hole(range) {
            return Ok(false);
        }
        let progress = &self.agent.shared.progress;
        loop {
            if let Some(is_offered) = progress.questions().is_offered() {
                // A first synchronisation that was broken off: what arrived of it is there, and only the map
                // of it is lost.
                let questions = progress.questions();
                let holds = questions.is_seeded() || is_part || questions.holds_earlier(epoch);
                return Ok(is_offered && (!is_first || holds));
            }
            if is_first && !progress.peer().trouble.is_empty() {
                return Ok(false);
            }
            self.look()?;
            self.report.waits("waiting for the receiver, to compare with what it holds");
            machine::sleep(super::LOOK * 4);
        }
    }

    /// Whether nothing was ever written there, as far as the disk can tell: a new disk waits for nobody.
    fn is_hole(&self, range: &Range<u64>) -> bool {
        self.hole_end(range.clone()) >= range.end
    }

    /// Copies what differs of a range that begins at a granule.
    pub(super) fn differing(&mut self, range: Range<u64>, begin: u64, buffer: &mut Buffer) -> Copied<()> {
        let mut key = [0; 32];
        rand::fill(&mut key);
        let mut asked: VecDeque<Asked> = VecDeque::new();
        let mut next = range.start;
        while next < range.end || !asked.is_empty() {
            while next < range.end && asked.len() < POSTED {
                let (end, chunk_bytes) = question(next..range.end, self.hole_end(next..range.end));
                asked.push_back(self.ask(next..end, begin, key, chunk_bytes)?);
                next = end;
            }
            if let Some(asked) = asked.pop_front() {
                self.answered(asked, &key, buffer)?;
            }
        }
        Ok(())
    }

    /// Where the hole ends that a range begins with, as far as the disk can tell.
    fn hole_end(&self, range: Range<u64>) -> u64 {
        let runs = self.volume.runs(range.start, range.end - range.start).unwrap_or_default();
        let holes = runs.iter().take_while(|run| run.hole).map(|run| run.length_bytes);
        range.start + holes.sum::<u64>()
    }

    /// Asks for the hashes of a range as the replica holds it with everything up to an lsn.
    pub(super) fn ask(
        &self,
        range: Range<u64>,
        after_lsn: u64,
        key: [u8; 32],
        chunk_bytes: u64,
    ) -> Copied<Asked> {
        let question = Message::HashRequest {
            volume: self.volume.id,
            offset: range.start,
            length: range.end - range.start,
            chunk_bytes: u32::try_from(chunk_bytes).unwrap_or(u32::MAX),
            epoch: self.agent.remembered().epoch.number,
            after_lsn,
            key,
        };
        let questions = self.agent.shared.progress.questions();
        let pending = questions.post(question.clone(), || self.look())?;
        Ok(Asked { range, chunk_bytes, question, pending })
    }

    /// Hashes our side of a question meanwhile, then copies what its answer shows to differ.
    fn answered(&mut self, asked: Asked, key: &[u8; 32], buffer: &mut Buffer) -> Copied<()> {
        let Asked { range, chunk_bytes, question, mut pending } = asked;
        let ours = self.hashes(range.clone(), key, chunk_bytes, buffer, &mut Vec::new())?;
        let questions = self.agent.shared.progress.questions();
        let theirs = loop {
            match questions.wait(pending, || self.look())? {
                Answer::Hashes(hashes, connection) if hashes.len() == ours.len() => {
                    // ⚠ Order: 1 it is durable that this epoch lacks content, so that no receiver which holds
                    // nothing starts at it; 2 no other receiver was let in before that; 3 bits are cleared
                    // without a record.
                    self.agent.epoch_is_part()?;
                    if questions.connection() == connection {
                        break hashes;
                    }
                    pending = questions.post(question.clone(), || self.look())?;
                }
                Answer::Hashes(hashes, _) => {
                    let why = format!("{} bytes of hashes for {}", hashes.len(), ours.len());
                    return Err(Stop::Later(format!("the receiver's answer is malformed: {why}")));
                }
                // Then all of it is sent.
                Answer::No(why) => {
                    tracing::warn!(volume = %self.volume.name, offset = range.start, why, "cannot be compared; it is copied");
                    break Vec::new();
                }
            }
        };
        for (is_equal, run) in runs(&range, chunk_bytes, &ours, &theirs) {
            if is_equal {
                self.clear(run.clone())?;
                self.agent.shared.skipped.sent(self.volume.id, &run);
                self.report.found_equal(run.end - run.start);
            } else {
                self.extent(run, buffer)?;
            }
        }
        Ok(())
    }

    /// Hashes of the range's chunks as the disk holds them; an unreadable chunk has one that equals no other.
    /// What the disk calls a hole, asked after the barrier as reading is, has that of zeros and is not read.
    pub(super) fn hashes(
        &mut self,
        range: Range<u64>,
        key: &[u8; 32],
        chunk_bytes: u64,
        buffer: &mut Buffer,
        unreadable: &mut Vec<Range<u64>>,
    ) -> Copied<Vec<u8>> {
        let mut hashes = Vec::new();
        let mut hasher = compare::Hasher::new(*key);
        let mut runs: VecDeque<(Range<u64>, bool)> = VecDeque::new();
        let mut at = range.start;
        while at < range.end {
            let end = (at + super::CHUNK_BYTES).min(range.end);
            if self.is_hole_in(&mut runs, at..end, range.end) {
                for start in (at..end).step_by(usize::try_from(chunk_bytes).unwrap_or(1 << 16)) {
                    let bytes = usize::try_from(chunk_bytes.min(end - start)).unwrap_or(0);
                    hashes.extend_from_slice(&hasher.zeros(bytes));
                }
                at = end;
                continue;
            }
            self.pause()?;
            let bytes = &mut buffer.bytes()[..usize::try_from(end - at).unwrap_or(0)];
            let read = self.volume.read_at(at, bytes);
            if self.paces_hashes {
                self.pace.read(machine::now(), end - at);
            }
            if read.is_err() {
                unreadable.push(at..end);
            }
            for chunk in bytes.chunks(usize::try_from(chunk_bytes).unwrap_or(1 << 16)) {
                match &read {
                    Ok(()) => hashes.extend_from_slice(&hasher.hash(chunk)),
                    Err(_) => hashes.extend_from_slice(&rand::random::<[u8; HASH_BYTES]>()),
                }
            }
            at = end;
        }
        Ok(hashes)
    }

    /// Whether a piece lies in one hole. `runs` are those of the disk that were asked for last, from there
    /// on.
    fn is_hole_in(&self, runs: &mut VecDeque<(Range<u64>, bool)>, piece: Range<u64>, end: u64) -> bool {
        while runs.front().is_some_and(|(run, _)| run.end <= piece.start) {
            runs.pop_front();
        }
        if runs.is_empty() {
            let mut from = piece.start;
            for run in self.volume.runs(from, end - from).unwrap_or_default() {
                runs.push_back((from..from + run.length_bytes, run.hole));
                from += run.length_bytes;
            }
        }
        runs.front().is_some_and(|(run, hole)| *hole && run.start <= piece.start && piece.end <= run.end)
    }
}

/// How far the next question about a range goes, and by which chunks, where a hole of ours ends at
/// `hole_end`. A long hole is asked for by the largest chunks, so that nothing grows with it: neither what is
/// said, nor what is waited for.
fn question(range: Range<u64>, hole_end: u64) -> (u64, u64) {
    let large = u64::from(compare::MAX_CHUNK_BYTES);
    let hole_end = hole_end.min(range.end) / large * large;
    if range.start.is_multiple_of(large) && hole_end >= range.start + QUESTION_BYTES {
        return (hole_end.min(range.start + compare::MAX_CHUNKS / 2 * large), large);
    }
    let end = range.start + QUESTION_BYTES;
    // The next one begins where a large chunk may.
    ((end / large * large).min(range.end), GRANULE)
}

/// The range in runs of chunks that are equal, or are not.
fn runs(range: &Range<u64>, chunk_bytes: u64, ours: &[u8], theirs: &[u8]) -> Vec<(bool, Range<u64>)> {
    let mut runs: Vec<(bool, Range<u64>)> = Vec::new();
    let mut at = range.start;
    let mut theirs = theirs.chunks(HASH_BYTES);
    for hash in ours.chunks(HASH_BYTES) {
        let end = (at + chunk_bytes).min(range.end);
        let is_equal = theirs.next() == Some(hash);
        match runs.last_mut() {
            Some((last, run)) if *last == is_equal => run.end = end,
            _ => runs.push((is_equal, at..end)),
        }
        at = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_neighbours_and_end_with_the_range() {
        let hash = |byte: u8| [byte; HASH_BYTES];
        let ours: Vec<u8> = [1, 2, 3, 4].into_iter().flat_map(hash).collect();
        let theirs: Vec<u8> = [1, 2, 9, 9].into_iter().flat_map(hash).collect();
        let range = GRANULE..GRANULE * 4 + 512;
        let expected = [(true, GRANULE..GRANULE * 3), (false, GRANULE * 3..GRANULE * 4 + 512)];
        assert_eq!(runs(&range, GRANULE, &ours, &theirs), expected);
        assert_eq!(runs(&range, GRANULE, &ours, &[]), [(false, range.clone())], "no answer: all differs");
    }

    #[test]
    fn a_long_hole_is_few_questions_and_every_question_is_sound() {
        const MIB: u64 = 1 << 20;
        assert_eq!(question(0..64 << 30, 64 << 30), (1 << 30, MIB), "a hole");
        assert_eq!(question(0..64 << 30, 100 * MIB + 5), (100 * MIB, MIB), "cut to whole chunks");
        assert_eq!(question(0..64 << 30, QUESTION_BYTES - 1), (QUESTION_BYTES, GRANULE), "a short one");
        assert_eq!(
            question(GRANULE..64 << 30, 64 << 30),
            (QUESTION_BYTES, GRANULE),
            "up to where it may be large"
        );
        assert_eq!(question(MIB..MIB + 512, MIB + 512), (MIB + 512, GRANULE), "the volume's end");
        for start in [0, GRANULE, 3 * GRANULE, MIB, 63 * MIB] {
            for end in [start + 512, start + GRANULE, start + 5 * MIB, 80 * MIB, 3 << 30] {
                for hole_end in [start, end, end - 512, start + 70 * MIB] {
                    let (to, chunk_bytes) = question(start..end, hole_end);
                    assert!(start < to && to <= end, "{start} {end} {hole_end}: {to}");
                    let chunk_bytes = u32::try_from(chunk_bytes).unwrap();
                    assert!(compare::is_sound(start, to - start, chunk_bytes), "{start} {end} {hole_end}");
                }
            }
        }
    }
}
