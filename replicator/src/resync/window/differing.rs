//! Of a long dirty range, copies only what the replica does not hold already: after an unclean end of the machine, or with
//! a replica that was brought by other means, nearly all of it is there.
//!
//! Both sides hash chunks of a granule; ours are read after the barrier, the receiver's when it holds everything up to our
//! begin. Equal hashes mean that every sector that nobody has written since begin is equal, and the others are records:
//! the chunk's bits are cleared. A differing chunk is read again and copied as any other.

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
    question: Message,
    pub pending: Pending,
}

impl Copier<'_> {
    /// Whether there is something to compare with. Waits for the receiver to say so: without it nothing of a long range
    /// could be sent either. The first synchronisation waits only until the first attempt to reach it has failed: mostly
    /// there is nothing at the other end yet, and what it will need can be journaled meanwhile.
    pub(super) fn compares(&mut self, range: &Range<u64>) -> Copied<bool> {
        let is_first = !self.agent.state().get().was_consistent;
        if is_first && self.is_hole(range) {
            return Ok(false);
        }
        let progress = &self.agent.shared.progress;
        loop {
            if let Some(is_offered) = progress.questions().is_offered() {
                return Ok(is_offered && (!is_first || progress.questions().is_seeded()));
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
        let length = range.end - range.start;
        let runs = self.volume.runs(range.start, length).unwrap_or_default();
        let holes = runs.iter().take_while(|run| run.hole).map(|run| run.length_bytes);
        holes.sum::<u64>() >= length
    }

    /// Copies what differs of a range that begins at a granule.
    pub(super) fn differing(&mut self, range: Range<u64>, begin: u64, buffer: &mut Buffer) -> Copied<()> {
        let mut key = [0; 32];
        rand::fill(&mut key);
        let mut asked: VecDeque<Asked> = VecDeque::new();
        let mut next = range.start;
        while next < range.end || !asked.is_empty() {
            while next < range.end && asked.len() < POSTED {
                let part = next..(next + QUESTION_BYTES).min(range.end);
                next = part.end;
                asked.push_back(self.ask(part, begin, key, GRANULE)?);
            }
            if let Some(asked) = asked.pop_front() {
                self.answered(asked, &key, buffer)?;
            }
        }
        Ok(())
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
            epoch: self.agent.state().get().epoch.number,
            after_lsn,
            key,
        };
        let questions = self.agent.shared.progress.questions();
        let pending = questions.post(question.clone(), || self.look())?;
        Ok(Asked { range, question, pending })
    }

    /// Hashes our side of a question meanwhile, then copies what its answer shows to differ.
    fn answered(&mut self, asked: Asked, key: &[u8; 32], buffer: &mut Buffer) -> Copied<()> {
        let Asked { range, question, mut pending } = asked;
        let ours = self.hashes(range.clone(), key, GRANULE, buffer, &mut Vec::new())?;
        let questions = self.agent.shared.progress.questions();
        let theirs = loop {
            match questions.wait(pending, || self.look())? {
                Answer::Hashes(hashes, connection) if hashes.len() == ours.len() => {
                    // ⚠ Order: 1 it is durable that this epoch lacks content, so that no receiver which holds nothing starts
                    // at it; 2 no other receiver was let in before that; 3 bits are cleared without a record.
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
        for (is_equal, run) in runs(&range, &ours, &theirs) {
            if is_equal {
                self.clear(run.clone())?;
                self.agent.shared.skipped.sent(self.volume.id, &run);
                self.report.advance(run.end - run.start, 0);
            } else {
                self.extent(run, buffer)?;
            }
        }
        Ok(())
    }

    /// Hashes of the range's chunks as the disk holds them; an unreadable chunk has one that equals no other.
    pub(super) fn hashes(
        &mut self,
        range: Range<u64>,
        key: &[u8; 32],
        chunk_bytes: u64,
        buffer: &mut Buffer,
        unreadable: &mut Vec<Range<u64>>,
    ) -> Copied<Vec<u8>> {
        let mut hashes = Vec::new();
        let mut at = range.start;
        while at < range.end {
            self.pause()?;
            let end = (at + super::CHUNK_BYTES).min(range.end);
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
                    Ok(()) => hashes.extend_from_slice(&compare::hash(key, chunk)),
                    Err(_) => hashes.extend_from_slice(&rand::random::<[u8; HASH_BYTES]>()),
                }
            }
            at = end;
        }
        Ok(hashes)
    }
}

/// The range in runs of granules that are equal, or are not.
fn runs(range: &Range<u64>, ours: &[u8], theirs: &[u8]) -> Vec<(bool, Range<u64>)> {
    let mut runs: Vec<(bool, Range<u64>)> = Vec::new();
    let mut at = range.start;
    let mut theirs = theirs.chunks(HASH_BYTES);
    for hash in ours.chunks(HASH_BYTES) {
        let end = (at + GRANULE).min(range.end);
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
        assert_eq!(runs(&range, &ours, &theirs), expected);
        assert_eq!(runs(&range, &ours, &[]), [(false, range.clone())], "no answer: all differs");
    }
}
