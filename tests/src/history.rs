//! What was written, in which order, and what was answered: the truth that images are held against.
//!
//! A *lane* is one client with one request in flight, on blocks of its own, so its operations have one order.
//! Between lanes, what was answered before something else began came before it; anything else may have gone
//! either way. Both are kept with the ticks of one clock.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::stamp::BLOCK_BYTES;

/// A run of blocks of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// The volume.
    pub volume: u32,
    /// Its blocks.
    pub blocks: Range<u32>,
}

/// One write, or zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Where.
    pub area: Area,
    /// Discarded or zeroed rather than stamped.
    pub is_zeros: bool,
    /// Tick of its first attempt.
    pub begun: u64,
    /// Tick of its answer; `u64::MAX` before.
    pub answered: u64,
}

/// A lane's operations, the n-th with sequence number n + 1.
#[derive(Clone, Debug, Default)]
pub struct Lane {
    /// The blocks that nobody else writes.
    pub areas: Vec<Area>,
    /// In order.
    pub operations: Vec<Operation>,
}

/// For each lane, how many of its first operations an image must hold, and may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds(pub Vec<Range<usize>>);

/// At `lsn`, all of `answered` had been captured and nothing beyond `begun`; for each lane.
struct Mark {
    lsn: u64,
    answered: Vec<usize>,
    begun: Vec<usize>,
}

/// All lanes.
pub struct History {
    /// Told apart from blocks of another run.
    pub run: u64,
    clock: AtomicU64,
    lanes: Vec<Mutex<Lane>>,
    marks: Mutex<Vec<Mark>>,
}

impl History {
    /// Nothing is written yet; the areas of two lanes have no block in common.
    pub fn new(run: u64, lanes: Vec<Vec<Area>>) -> History {
        let lanes =
            lanes.into_iter().map(|areas| Mutex::new(Lane { areas, operations: Vec::new() })).collect();
        History { run, clock: AtomicU64::new(1), lanes, marks: Mutex::default() }
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn lane(&self, lane: usize) -> MutexGuard<'_, Lane> {
        self.lanes[lane].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation begins; its sequence number.
    pub fn begin(&self, lane: usize, area: Area, is_zeros: bool) -> u64 {
        let mut lane = self.lane(lane);
        lane.operations.push(Operation { area, is_zeros, begun: self.tick(), answered: u64::MAX });
        lane.operations.len() as u64
    }

    /// The last operation of a lane is answered.
    pub fn answer(&self, lane: usize) {
        let mut lane = self.lane(lane);
        let tick = self.tick();
        lane.operations.last_mut().expect("invariant: begun before it is answered").answered = tick;
    }

    /// A lane as it is now.
    pub fn snapshot(&self, lane: usize) -> Lane {
        self.lane(lane).clone()
    }

    /// All lanes as they are now.
    pub fn snapshots(&self) -> Vec<Lane> {
        (0..self.lanes.len()).map(|lane| self.snapshot(lane)).collect()
    }

    /// Operations answered, for each lane.
    pub fn answered(&self) -> Vec<usize> {
        let count = |lane: &Lane| lane.operations.iter().filter(|op| op.answered != u64::MAX).count();
        (0..self.lanes.len()).map(|lane| count(&self.lane(lane))).collect()
    }

    /// Operations begun, for each lane.
    pub fn begun(&self) -> Vec<usize> {
        (0..self.lanes.len()).map(|lane| self.lane(lane).operations.len()).collect()
    }

    /// Bytes written by what was answered.
    pub fn answered_bytes(&self) -> u64 {
        let written = |op: &&Operation| op.answered != u64::MAX && !op.is_zeros;
        let blocks = |lane: Lane| {
            lane.operations.iter().filter(written).map(|op| op.area.blocks.len() as u64).sum::<u64>()
        };
        self.snapshots().into_iter().map(blocks).sum::<u64>() * BLOCK_BYTES as u64
    }

    /// Ties the history to an lsn: `ask` tells the newest lsn captured.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn mark<E>(&self, ask: impl FnOnce() -> Result<u64, E>) -> Result<u64, E> {
        let answered = self.answered();
        let lsn = ask()?;
        let begun = self.begun();
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).push(Mark { lsn, answered, begun });
        Ok(lsn)
    }

    /// What an image at `lsn` must and may hold, by all marks.
    pub fn bounds_at(&self, lsn: u64) -> Bounds {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |lane: usize, all: usize| {
            let below = marks.iter().filter(|mark| mark.lsn <= lsn).map(|mark| mark.answered[lane]);
            let above = marks.iter().filter(|mark| mark.lsn >= lsn).map(|mark| mark.begun[lane]);
            below.max().unwrap_or(0)..above.min().unwrap_or(all)
        };
        Bounds(self.begun().into_iter().enumerate().map(|(lane, all)| of(lane, all)).collect())
    }

    /// What the source's disk must hold now: everything answered.
    pub fn bounds_now(&self) -> Bounds {
        Bounds(
            self.answered().into_iter().zip(self.begun()).map(|(answered, begun)| answered..begun).collect(),
        )
    }
}
