//! What was written, and what an image may therefore be: the oracle.
//!
//! Each writer owns a stretch of a volume and has one write in flight. A *generation* is a run of the source:
//! it begins with what the disk held then, and every block of a write says which write it is of. An image is
//! a prefix when for each writer there is a number of its writes that gives just this content, and no write
//! is there that was submitted after one that is missing had been answered.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A write touches whole blocks of this size.
pub const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// What a write leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Content that names its write.
    Content,
    /// Zeros: by write zeroes or discard.
    Zeros,
}

#[derive(Clone, Debug)]
struct Write {
    blocks: Range<usize>,
    kind: Kind,
    /// Newest lsn before it was submitted.
    before_lsn: u64,
    /// Newest lsn after it was answered.
    after_lsn: Option<u64>,
    /// It certainly took an lsn, and not a dirty bit.
    recorded: bool,
    submitted: u64,
    answered: Option<u64>,
}

#[derive(Clone, Debug)]
struct Writer {
    volume: usize,
    blocks: Range<usize>,
    writes: Vec<Write>,
    /// So many of them were flushed.
    flushed: usize,
}

/// A run of the source.
struct Generation {
    number: u64,
    base: Vec<Vec<u8>>,
    from_lsn: u64,
    writers: Vec<Writer>,
    /// By volume and block: what a power loss may bring back, since runs that were killed left it unflushed.
    older: BTreeMap<(usize, usize), Vec<Vec<u8>>>,
}

#[derive(Default)]
struct Inner {
    generations: Vec<Generation>,
    clock: u64,
    /// Lsns that two histories used: points in them are not judged.
    ambiguous: Vec<Range<u64>>,
}

/// See the module.
#[derive(Default)]
pub struct Model(Mutex<Inner>);

/// What the source's disk has to hold when it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// Everything answered: the process was killed or stopped.
    Killed,
    /// Everything flushed: the power went.
    PowerLost,
    /// Anything: it was restored from a backup.
    RolledBack,
    /// Anything: others wrote to it, or it is another disk. What was not flushed may still be lost.
    Edited,
}

/// The content of a block by its write.
fn content(generation: u64, writer: usize, write: usize, block: usize) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    let key = (generation << 48) ^ ((writer as u64) << 40) ^ ((write as u64) << 16) ^ block as u64;
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        // The second half is compressible.
        let salt = if at < BLOCK / 16 { at as u64 } else { 0 };
        let mixed = (key ^ (salt << 56)).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ key.rotate_left(29) | 1;
        word.copy_from_slice(&mixed.to_le_bytes());
    }
    bytes
}

impl Model {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run of the source begins: its disks hold `base`, and `from_lsn` is the newest lsn.
    ///
    /// # Errors
    /// The disks do not hold what they must.
    pub fn begin(
        &self,
        back: Back,
        base: Vec<Vec<u8>>,
        from_lsn: u64,
        writers_each: usize,
    ) -> Result<(), String> {
        let mut inner = self.lock();
        let mut older = BTreeMap::new();
        if let Some(last) = inner.generations.last() {
            if matches!(back, Back::Killed | Back::Edited) {
                older = last.unflushed();
            }
            match back {
                Back::Killed => {
                    let bounds =
                        last.writers.iter().map(|w| w.answered()..w.writes.len()).collect::<Vec<_>>();
                    last.check(&base, &bounds)
                        .map_err(|why| format!("the source's disk after a kill: {why}"))?;
                }
                Back::PowerLost => {
                    last.check_flushed(&base)
                        .map_err(|why| format!("the source's disk after a power loss: {why}"))?;
                }
                Back::RolledBack | Back::Edited => {}
            }
        }
        let mut writers = Vec::new();
        for (volume, image) in base.iter().enumerate() {
            let blocks = image.len() / BLOCK;
            for at in 0..writers_each {
                let blocks = blocks * at / writers_each..blocks * (at + 1) / writers_each;
                writers.push(Writer { volume, blocks, writes: Vec::new(), flushed: 0 });
            }
        }
        let number = inner.generations.len() as u64 + 1;
        inner.generations.push(Generation { number, base, from_lsn, writers, older });
        Ok(())
    }

    /// From here to there two histories used the same lsns.
    pub fn ambiguous(&self, lsns: Range<u64>) {
        self.lock().ambiguous.push(lsns);
    }

    /// The newest lsn when the newest run began.
    pub fn run_began(&self) -> u64 {
        self.lock().generations.last().map_or(0, |last| last.from_lsn)
    }

    /// How many writers a run has, and where each writes: volume, blocks.
    pub fn writers(&self) -> Vec<(usize, Range<usize>)> {
        let inner = self.lock();
        let last = inner.generations.last();
        last.map(|last| last.writers.iter().map(|w| (w.volume, w.blocks.clone())).collect())
            .unwrap_or_default()
    }

    /// A write is about to be submitted; its number and content.
    pub fn submit(
        &self,
        writer: usize,
        blocks: Range<usize>,
        kind: Kind,
        before_lsn: u64,
    ) -> (usize, Vec<u8>) {
        let mut inner = self.lock();
        inner.clock += 1;
        let submitted = inner.clock;
        let Some(last) = inner.generations.last_mut() else { return (0, Vec::new()) };
        let number = last.number;
        let writes = &mut last.writers[writer].writes;
        let at = writes.len();
        let bytes = match kind {
            Kind::Zeros => Vec::new(),
            Kind::Content => blocks.clone().flat_map(|block| content(number, writer, at, block)).collect(),
        };
        let (after_lsn, answered) = (None, None);
        writes.push(Write { blocks, kind, before_lsn, after_lsn, recorded: false, submitted, answered });
        (at, bytes)
    }

    /// It was answered.
    pub fn answered(&self, writer: usize, write: usize, after_lsn: u64, recorded: bool) {
        let mut inner = self.lock();
        inner.clock += 1;
        let answered = inner.clock;
        if let Some(write) =
            inner.generations.last_mut().and_then(|g| g.writers[writer].writes.get_mut(write))
        {
            (write.after_lsn, write.recorded, write.answered) = (Some(after_lsn), recorded, Some(answered));
        }
    }

    /// How many writes of each writer are answered: what a flush that is submitted now makes durable.
    pub fn flushing(&self) -> Vec<usize> {
        let inner = self.lock();
        inner.generations.last().map(|g| g.writers.iter().map(Writer::answered).collect()).unwrap_or_default()
    }

    /// That flush was answered. A flush is of one volume.
    pub fn flushed(&self, volume: usize, upto: &[usize]) {
        let mut inner = self.lock();
        let Some(last) = inner.generations.last_mut() else { return };
        for (writer, upto) in last.writers.iter_mut().zip(upto).filter(|(writer, _)| writer.volume == volume)
        {
            writer.flushed = writer.flushed.max(*upto);
        }
        last.older.retain(|(of, _), _| *of != volume);
    }

    /// Writes answered so far, in all runs.
    pub fn count(&self) -> usize {
        let inner = self.lock();
        inner.generations.iter().flat_map(|g| &g.writers).map(Writer::answered).sum()
    }

    /// Checks an image of all volumes at an lsn that was offered as a recovery point.
    ///
    /// # Errors
    /// It is none.
    pub fn check_point(&self, lsn: u64, images: &[Vec<u8>]) -> Result<(), String> {
        let inner = self.lock();
        if inner.ambiguous.iter().any(|range| range.contains(&lsn)) {
            return Ok(());
        }
        let at = inner.generations.iter().rposition(|g| g.from_lsn < lsn).unwrap_or(0);
        let Some(generation) = inner.generations.get(at) else { return Ok(()) };
        let bounds: Vec<_> = generation
            .writers
            .iter()
            .map(|writer| {
                let due =
                    |w: &Write| w.after_lsn.is_some_and(|after| after < lsn || after == lsn && w.recorded);
                let lowest = writer.writes.iter().rposition(due).map_or(0, |at| at + 1);
                let highest =
                    writer.writes.iter().position(|w| w.before_lsn >= lsn).unwrap_or(writer.writes.len());
                lowest..highest.max(lowest)
            })
            .collect();
        generation.check(images, &bounds).map_err(|why| format!("lsn {lsn}, generation {}: {why}", at + 1))
    }
}

impl Writer {
    fn answered(&self) -> usize {
        self.writes.iter().rposition(|write| write.answered.is_some()).map_or(0, |at| at + 1)
    }
}

impl Generation {
    fn base_block(&self, volume: usize, block: usize) -> &[u8] {
        self.base[volume].get(block * BLOCK..(block + 1) * BLOCK).unwrap_or(&[0; BLOCK])
    }

    /// The content of a block after its newest write among the first `count`.
    fn after(&self, writer: usize, count: usize, block: usize) -> Vec<u8> {
        let newest =
            self.writers[writer].writes[..count].iter().rposition(|write| write.blocks.contains(&block));
        match newest {
            None => self.base_block(self.writers[writer].volume, block).to_vec(),
            Some(at) => match self.writers[writer].writes[at].kind {
                Kind::Zeros => vec![0; BLOCK],
                Kind::Content => content(self.number, writer, at, block).to_vec(),
            },
        }
    }

    /// For which counts within the bounds this writer's stretch of the image is right.
    fn counts(&self, writer: usize, image: &[u8], bounds: &Range<usize>) -> Result<Vec<usize>, String> {
        let of = &self.writers[writer];
        let mut possible: Vec<bool> = (bounds.start..=bounds.end).map(|_| true).collect();
        for block in of.blocks.clone() {
            let Some(found) = image.get(block * BLOCK..(block + 1) * BLOCK) else {
                return Err(format!("volume {} ends before block {block}", of.volume));
            };
            let mut matches = self.after(writer, bounds.start, block) == found;
            let mut any = false;
            for (slot, count) in (bounds.start..=bounds.end).enumerate() {
                if slot > 0 {
                    let write = &of.writes[count - 1];
                    if write.blocks.contains(&block) {
                        matches = match write.kind {
                            Kind::Zeros => found.iter().all(|byte| *byte == 0),
                            Kind::Content => found == content(self.number, writer, count - 1, block),
                        };
                    }
                }
                possible[slot] &= matches;
                any |= matches;
            }
            if !any || !possible.contains(&true) {
                let what = self.name(found);
                return Err(format!(
                    "volume {} block {block} (writer {writer}) holds {what}; between {} and {} of its {} writes were due{}",
                    of.volume,
                    bounds.start,
                    bounds.end,
                    of.writes.len(),
                    if any { ", and no count of them fits all of its blocks" } else { "" }
                ));
            }
        }
        Ok(possible.iter().enumerate().filter(|(_, fits)| **fits).map(|(at, _)| bounds.start + at).collect())
    }

    /// Whose content that is.
    fn name(&self, found: &[u8]) -> String {
        if found.iter().all(|byte| *byte == 0) {
            return "zeros".into();
        }
        for (at, writer) in self.writers.iter().enumerate() {
            for (number, write) in writer.writes.iter().enumerate().filter(|(_, w)| w.kind == Kind::Content) {
                for block in write.blocks.clone() {
                    if found == content(self.number, at, number, block) {
                        return format!("writer {at}'s write {number} of block {block}");
                    }
                }
            }
        }
        let base = (0..self.base.len())
            .flat_map(|volume| (0..self.base[volume].len() / BLOCK).map(move |block| (volume, block)))
            .find(|(volume, block)| self.base_block(*volume, *block) == found);
        match base {
            Some((volume, block)) => format!("what volume {volume} block {block} held when this run began"),
            None => "something else".into(),
        }
    }

    fn check(&self, images: &[Vec<u8>], bounds: &[Range<usize>]) -> Result<(), String> {
        let mut counts = Vec::new();
        for (writer, bounds) in bounds.iter().enumerate() {
            let empty = Vec::new();
            let image = images.get(self.writers[writer].volume).unwrap_or(&empty);
            counts.push(self.counts(writer, image, bounds)?);
        }
        // What was submitted after an answer has that write below it.
        for (one, of) in counts.iter().enumerate() {
            let Some(newest) = of.first().and_then(|count| count.checked_sub(1)) else { continue };
            let submitted = self.writers[one].writes[newest].submitted;
            for (other, others) in counts.iter().enumerate() {
                let writes = &self.writers[other].writes;
                let due = writes
                    .iter()
                    .rposition(|w| w.answered.is_some_and(|at| at < submitted))
                    .map_or(0, |at| at + 1);
                if others.last().is_some_and(|most| *most < due) {
                    return Err(format!(
                        "writer {one}'s write {newest} is there, and writer {other}'s write {} is not, which was answered before",
                        due - 1
                    ));
                }
            }
        }
        Ok(())
    }

    /// What a power loss may leave in a block: what was flushed last, or something newer.
    fn allowed(&self, at: usize, block: usize) -> Vec<Vec<u8>> {
        let writer = &self.writers[at];
        let mut allowed = self.older.get(&(writer.volume, block)).cloned().unwrap_or_default();
        allowed.push(self.after(at, writer.flushed, block));
        for number in writer.flushed..writer.writes.len() {
            if writer.writes[number].blocks.contains(&block) {
                allowed.push(self.after(at, number + 1, block));
            }
        }
        allowed
    }

    /// The same of every block where more than one content is allowed.
    fn unflushed(&self) -> BTreeMap<(usize, usize), Vec<Vec<u8>>> {
        let blocks = self
            .writers
            .iter()
            .enumerate()
            .flat_map(|(at, w)| w.blocks.clone().map(move |b| (at, w.volume, b)));
        blocks
            .map(|(at, volume, block)| ((volume, block), self.allowed(at, block)))
            .filter(|(_, allowed)| allowed.len() > 1)
            .collect()
    }

    /// Each sector holds what was flushed last, or something newer.
    fn check_flushed(&self, images: &[Vec<u8>]) -> Result<(), String> {
        for (at, writer) in self.writers.iter().enumerate() {
            let image = &images[writer.volume];
            for block in writer.blocks.clone() {
                let found = &image[block * BLOCK..(block + 1) * BLOCK];
                let allowed = self.allowed(at, block);
                for sector in (0..BLOCK).step_by(SECTOR) {
                    let range = sector..sector + SECTOR;
                    if !allowed.iter().any(|allowed| allowed[range.clone()] == found[range.clone()]) {
                        return Err(format!(
                            "volume {} block {block} holds {}: {} of {} writes were flushed",
                            writer.volume,
                            self.name(found),
                            writer.flushed,
                            writer.writes.len()
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two writers of one volume; writes in the order given, each answered at once.
    fn model(writes: &[(usize, Range<usize>, Kind)]) -> (Model, Vec<Vec<u8>>) {
        let model = Model::default();
        model.begin(Back::Killed, vec![vec![0; 8 * BLOCK]], 0, 2).unwrap();
        let mut image = vec![vec![0; 8 * BLOCK]];
        for (lsn, (writer, blocks, kind)) in writes.iter().enumerate() {
            let lsn = lsn as u64;
            let (number, bytes) = model.submit(*writer, blocks.clone(), *kind, lsn);
            let to = &mut image[0][blocks.start * BLOCK..blocks.end * BLOCK];
            if *kind == Kind::Zeros {
                to.fill(0)
            } else {
                to.copy_from_slice(&bytes)
            }
            model.answered(*writer, number, lsn + 1, true);
        }
        (model, image)
    }

    #[test]
    fn only_prefixes_pass() {
        let writes = [(0, 0..2, Kind::Content), (1, 4..6, Kind::Content), (0, 1..3, Kind::Zeros)];
        let (whole, image) = model(&writes);
        whole.check_point(3, &image).unwrap();
        whole.check_point(2, &image).unwrap_err();
        let (_, two) = model(&writes[..2]);
        whole.check_point(2, &two).unwrap();
        whole.check_point(3, &two).unwrap_err();
        let mut torn = image.clone();
        torn[0][0] ^= 1;
        whole.check_point(3, &torn).unwrap_err();
        assert_eq!(whole.count(), 3);
    }

    #[test]
    fn what_was_answered_before_is_there_before() {
        // No lsn tells them apart: the order of answers must.
        let model = Model::default();
        model.begin(Back::Killed, vec![vec![0; 8 * BLOCK]], 0, 2).unwrap();
        let (first, _) = model.submit(0, 0..1, Kind::Content, 0);
        model.answered(0, first, 9, true);
        let (second, bytes) = model.submit(1, 4..5, Kind::Content, 0);
        let mut image = vec![vec![0; 8 * BLOCK]];
        image[0][4 * BLOCK..5 * BLOCK].copy_from_slice(&bytes);
        let why = model.check_point(5, &image).unwrap_err();
        assert!(why.contains("answered before"), "{why}");
        model.answered(1, second, 10, true);
    }

    #[test]
    fn a_power_loss_may_take_what_was_not_flushed_sector_by_sector() {
        let writes = [(0, 0..1, Kind::Content), (0, 0..1, Kind::Content)];
        let (whole, image) = model(&writes);
        whole.flushed(0, &[1, 0]);
        let (_, first) = model(&writes[..1]);
        let mut mixed = image.clone();
        mixed[0][..SECTOR].copy_from_slice(&first[0][..SECTOR]);
        whole.begin(Back::PowerLost, mixed, 10, 2).unwrap();
        let (again, _) = model(&writes);
        again.flushed(0, &[2, 0]);
        again.begin(Back::PowerLost, first, 10, 2).unwrap_err();
    }
}
