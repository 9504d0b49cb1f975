//! What an image may hold, in one function.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use anyhow::{Result, bail, ensure};

use crate::history::{Area, Bounds, History, Lane};
use crate::image::Blocks;
use crate::stamp::{Found, Stamp};

/// Asserts that an image holds a prefix of the history, all that was acknowledged, and nothing else:
///
/// * every block is whole, and was written by its lane, to that place;
/// * for each lane there is a number k so that the blocks are what its first k operations leave behind;
/// * k is within `acked`: everything acknowledged is there, and nothing that was begun later;
/// * no lane's part ends before something that was answered before another lane's newest operation began.
///
/// Returns each lane's k. Where zeros make several possible, the largest.
///
/// # Errors
/// The image cannot be read, or is not such a prefix: lane, block and what was found are told.
pub fn assert_prefix_consistent(history: &History, image: &dyn Blocks, acked: &Bounds) -> Result<Vec<usize>> {
    let lanes = history.snapshots();
    ensure!(lanes.len() == acked.0.len(), "bounds are for another history");
    // The moments (ticks) of which the image may be: those that every lane allows.
    let mut moments = vec![0..=u64::MAX];
    let mut held = Vec::with_capacity(lanes.len());
    for (number, (lane, bounds)) in lanes.iter().zip(&acked.0).enumerate() {
        let found = look(history.run, number, lane, image)?;
        let possible = prefixes(lane, &found);
        let within: Vec<usize> =
            possible.iter().copied().filter(|k| bounds.start <= *k && *k <= bounds.end).collect();
        let Some(newest) = within.last() else {
            bail!("lane {number}: {}", explain(lane, &found, &possible, bounds));
        };
        held.push(*newest);
        moments = both(&moments, &within.iter().map(|k| moments_of(lane, *k)).collect::<Vec<_>>());
        ensure!(
            !moments.is_empty(),
            "lane {number} holds {newest} operations: the others hold something that began after its next was answered"
        );
    }
    Ok(held)
}

type Contents = HashMap<(u32, u32), u64>;

/// The sequence number found in each block of a lane; 0 for zeros.
fn look(run: u64, number: usize, lane: &Lane, image: &dyn Blocks) -> Result<Contents> {
    let mut found = Contents::new();
    for Area { volume, blocks } in &lane.areas {
        for block in blocks.clone() {
            let sequence = match Stamp::find(&image.block(*volume, block)?) {
                Found::Zeros => 0,
                Found::Stamped(stamp) => {
                    let expected =
                        Stamp { run, lane: u32::try_from(number)?, volume: *volume, block, ..stamp };
                    ensure!(
                        stamp == expected,
                        "volume {volume} block {block} holds what was not written there: {stamp:?}"
                    );
                    stamp.sequence
                }
                Found::Foreign => bail!("volume {volume} block {block} is torn, or nobody wrote it"),
            };
            found.insert((*volume, block), sequence);
        }
    }
    Ok(found)
}

/// What operation `index` leaves in its blocks.
fn content(lane: &Lane, index: usize) -> u64 {
    if lane.operations[index].is_zeros { 0 } else { index as u64 + 1 }
}

/// All k so that the first k operations leave behind exactly what was found.
fn prefixes(lane: &Lane, found: &Contents) -> Vec<usize> {
    let mut wrong = found.values().filter(|sequence| **sequence != 0).count();
    let mut current = Contents::new();
    let mut possible = Vec::new();
    if wrong == 0 {
        possible.push(0);
    }
    for (index, operation) in lane.operations.iter().enumerate() {
        let new = content(lane, index);
        for block in operation.area.blocks.clone() {
            let at = (operation.area.volume, block);
            let old = current.insert(at, new).unwrap_or(0);
            let is = found.get(&at).copied().unwrap_or(u64::MAX);
            wrong = wrong + usize::from(old == is) - usize::from(new == is);
        }
        if wrong == 0 {
            possible.push(index + 1);
        }
    }
    possible
}

/// The moments at which a lane's first `k` operations may be all that has happened: after the last of them
/// began, and no later than the answer to the next.
fn moments_of(lane: &Lane, k: usize) -> RangeInclusive<u64> {
    let after = k.checked_sub(1).map_or(0, |last| lane.operations[last].begun);
    let until = lane.operations.get(k).map_or(u64::MAX, |next| next.answered);
    after..=until
}

fn both(left: &[RangeInclusive<u64>], right: &[RangeInclusive<u64>]) -> Vec<RangeInclusive<u64>> {
    let pairs = left
        .iter()
        .flat_map(|a| right.iter().map(move |b| *a.start().max(b.start())..=*a.end().min(b.end())));
    pairs.filter(|range| !range.is_empty()).collect()
}

/// Why no prefix fits, as far as one can tell.
fn explain(lane: &Lane, found: &Contents, possible: &[usize], bounds: &std::ops::Range<usize>) -> String {
    if !possible.is_empty() {
        return format!(
            "holds its first {possible:?} operations, at least {} and at most {} are right",
            bounds.start, bounds.end
        );
    }
    let newest = found.values().copied().max().unwrap_or(0);
    let mut expected = Contents::new();
    for (index, operation) in
        lane.operations.iter().enumerate().take(usize::try_from(newest).unwrap_or(usize::MAX))
    {
        for block in operation.area.blocks.clone() {
            expected.insert((operation.area.volume, block), content(lane, index));
        }
    }
    let mut wrong: Vec<String> = found
        .iter()
        .filter(|(at, sequence)| expected.get(at).copied().unwrap_or(0) != **sequence)
        .map(|(at, sequence)| {
            format!("volume {} block {}: {sequence}, not {:?}", at.0, at.1, expected.get(at))
        })
        .collect();
    wrong.sort();
    wrong.truncate(5);
    format!("no prefix: operation {newest} of {} is there, but {}", lane.operations.len(), wrong.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::{BLOCK_BYTES, Block};

    const RUN: u64 = 5;

    /// An image in memory, of one volume.
    struct Memory(HashMap<u32, Block>);

    impl Blocks for Memory {
        fn block(&self, _volume: u32, block: u32) -> Result<Block> {
            Ok(self.0.get(&block).copied().unwrap_or([0; BLOCK_BYTES]))
        }
    }

    fn area(blocks: std::ops::Range<u32>) -> Area {
        Area { volume: 0, blocks }
    }

    fn stamped(lane: u32, sequence: u64, block: u32) -> (u32, Block) {
        (block, Stamp { run: RUN, sequence, lane, volume: 0, block }.render())
    }

    /// Lane 0: 1 writes 0..2, 2 writes 1..3, 3 zeroes 0..1. Lane 1: 1 writes 10 after all of these, 2 writes
    /// 11, unanswered.
    fn history() -> History {
        let history = History::new(RUN, vec![vec![area(0..4)], vec![area(10..12)]]);
        for (blocks, zeros) in [(0..2, false), (1..3, false), (0..1, true)] {
            history.begin(0, area(blocks), zeros);
            history.answer(0);
        }
        history.begin(1, area(10..11), false);
        history.answer(1);
        history.begin(1, area(11..12), false);
        history
    }

    fn judge(
        blocks: impl IntoIterator<Item = (u32, Block)>,
        acked: [std::ops::Range<usize>; 2],
    ) -> Result<Vec<usize>> {
        assert_prefix_consistent(&history(), &Memory(blocks.into_iter().collect()), &Bounds(acked.to_vec()))
    }

    const ANY: [std::ops::Range<usize>; 2] = [0..usize::MAX, 0..usize::MAX];

    #[test]
    fn every_prefix_is_right() {
        assert_eq!(judge([], ANY).unwrap(), [0, 0]);
        assert_eq!(judge([stamped(0, 1, 0), stamped(0, 1, 1)], ANY).unwrap(), [1, 0]);
        assert_eq!(judge([stamped(0, 1, 0), stamped(0, 2, 1), stamped(0, 2, 2)], ANY).unwrap(), [2, 0]);
        let all = [stamped(0, 2, 1), stamped(0, 2, 2), stamped(1, 1, 10)];
        assert_eq!(judge(all, [3..3, 1..2]).unwrap(), [3, 1]);
        assert_eq!(judge(all.into_iter().chain([stamped(1, 2, 11)]), [3..3, 1..2]).unwrap(), [3, 2]);
    }

    #[test]
    fn a_hole_in_a_lane_is_not_a_prefix() {
        // Operation 2 without its second block, and operation 2 over a block that operation 1 should have
        // left.
        assert!(judge([stamped(0, 1, 0), stamped(0, 2, 1)], ANY).is_err());
        assert!(judge([stamped(0, 1, 1), stamped(0, 2, 2)], ANY).is_err());
    }

    #[test]
    fn what_was_acknowledged_must_be_there_and_what_began_later_must_not() {
        let one = || [stamped(0, 1, 0), stamped(0, 1, 1)];
        assert!(judge(one(), [1..1, 0..2]).is_ok());
        assert!(judge(one(), [2..3, 0..2]).is_err());
        assert!(judge(one(), [0..0, 0..2]).is_err());
    }

    #[test]
    fn lanes_are_of_one_moment() {
        // Lane 1 began after all of lane 0 had been answered.
        assert!(judge([stamped(0, 1, 0), stamped(0, 1, 1), stamped(1, 1, 10)], ANY).is_err());
        assert!(judge([stamped(0, 1, 0), stamped(0, 1, 1)], ANY).is_ok());
    }

    #[test]
    fn foreign_torn_and_misplaced_blocks_are_wrong() {
        let mut torn = stamped(0, 1, 0);
        torn.1[100] ^= 1;
        assert!(judge([torn, stamped(0, 1, 1)], ANY).is_err());
        let misplaced = (0, stamped(0, 1, 1).1);
        assert!(judge([misplaced, stamped(0, 1, 1)], ANY).is_err());
        let of_another_run = (0, Stamp { run: RUN + 1, sequence: 1, lane: 0, volume: 0, block: 0 }.render());
        assert!(judge([of_another_run, stamped(0, 1, 1)], ANY).is_err());
        assert!(judge([stamped(1, 1, 0), stamped(0, 1, 1)], ANY).is_err());
    }

    fn bounds(of_the_only_lane: std::ops::Range<usize>) -> Bounds {
        Bounds(std::iter::once(of_the_only_lane).collect())
    }

    #[test]
    fn marks_bound_what_an_image_holds() {
        let history = History::new(RUN, vec![vec![area(0..4)]]);
        let mark = |lsn| history.mark(|| Ok::<u64, ()>(lsn)).unwrap();
        history.begin(0, area(0..1), false);
        history.answer(0);
        mark(10);
        history.begin(0, area(1..2), false);
        mark(20);
        history.answer(0);
        assert_eq!(history.bounds_at(9), bounds(0..1));
        assert_eq!(history.bounds_at(10), bounds(1..1));
        assert_eq!(history.bounds_at(15), bounds(1..2));
        assert_eq!(history.bounds_at(25), bounds(1..2));
        assert_eq!(history.bounds_now(), bounds(2..2));
    }
}
