//! Random writes race with a copy, against a disk of bytes: replica and disk must end up equal, and do not
//! when the mask or the barrier is left out.

use std::collections::VecDeque;
use std::ops::Range;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::map::{Content, SECTOR, SharedMap};

const SECTORS: usize = 64;
const SECTOR_BYTES: usize = 512;
/// Sectors read at once; two slots.
const CHUNK: usize = 8;

#[derive(Clone, Debug)]
enum Action {
    /// A write is submitted: before begin it is a bit, after it a record.
    Submit { at: usize, length: usize, value: u8 },
    /// One of those in flight reaches the disk.
    Complete(usize),
    /// The consumer takes a record.
    Consume,
    /// The copy reads one of the chunks that are left.
    Read(usize),
    /// It reserves slots for what it has read.
    Reserve,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        // Many zeros, so that they become slots of their own.
        3 => (0..SECTORS, 1..12usize, 0..3u8).prop_map(|(at, length, value)| Action::Submit { at, length, value }),
        3 => any::<usize>().prop_map(Action::Complete),
        2 => Just(Action::Consume),
        2 => any::<usize>().prop_map(Action::Read),
        2 => Just(Action::Reserve),
    ];
    prop::collection::vec(action, 0..120)
}

struct InFlight {
    range: Range<usize>,
    value: u8,
    before_begin: bool,
}

enum Record {
    Write(Range<usize>, u8),
    Slot,
}

struct Rig {
    map: SharedMap,
    disk: Vec<u8>,
    replica: Vec<u8>,
    in_flight: Vec<InFlight>,
    stream: VecDeque<(u64, Record)>,
    lsn: u64,
    begun: bool,
    left: Vec<usize>,
    read: Option<(usize, Vec<u8>)>,
    barrier: bool,
}

fn bytes(sectors: &Range<usize>) -> Range<u64> {
    sectors.start as u64 * SECTOR..sectors.end as u64 * SECTOR
}

fn sectors(bytes: &Range<u64>) -> Range<usize> {
    let sector = |byte: u64| usize::try_from(byte / SECTOR).unwrap_or(0);
    sector(bytes.start)..sector(bytes.end)
}

impl Rig {
    fn new(mask: bool, barrier: bool) -> Rig {
        let map = SharedMap::default();
        map.lock().without_mask = !mask;
        Rig {
            map,
            disk: vec![7; SECTORS],
            replica: vec![9; SECTORS],
            in_flight: Vec::new(),
            stream: VecDeque::new(),
            lsn: 0,
            begun: false,
            left: (0..SECTORS / CHUNK).collect(),
            read: None,
            barrier,
        }
    }

    fn record(&mut self, record: Record) -> u64 {
        self.lsn += 1;
        self.stream.push_back((self.lsn, record));
        self.lsn
    }

    fn act(&mut self, action: &Action) {
        match *action {
            Action::Submit { at, length, value } => {
                let range = at..(at + length).min(SECTORS);
                let overlaps =
                    |other: &InFlight| other.range.start < range.end && range.start < other.range.end;
                if self.in_flight.iter().any(overlaps) {
                    return;
                }
                if self.begun {
                    self.record(Record::Write(range.clone(), value));
                }
                self.in_flight.push(InFlight { range, value, before_begin: !self.begun });
            }
            Action::Complete(which) if !self.in_flight.is_empty() => {
                let write = self.in_flight.swap_remove(which % self.in_flight.len());
                self.disk[write.range].fill(write.value);
            }
            Action::Consume => self.consume(),
            Action::Read(which) if self.begun => self.read(which),
            Action::Reserve => self.reserve(),
            _ => {}
        }
    }

    fn begin(&mut self) {
        self.begun = true;
        self.lsn += 1;
        let lsn = self.lsn;
        self.map.begin(1, bytes(&(0..SECTORS)), || Ok::<_, ()>(lsn)).unwrap();
    }

    fn read(&mut self, which: usize) {
        let owed = self.barrier && self.in_flight.iter().any(|write| write.before_begin);
        if self.left.is_empty() || self.read.is_some() || owed {
            return;
        }
        let chunk = self.left.swap_remove(which % self.left.len());
        self.read = Some((chunk, self.disk[chunk * CHUNK..(chunk + 1) * CHUNK].to_vec()));
    }

    fn reserve(&mut self) {
        let Some((chunk, content)) = self.read.take() else { return };
        for (half, content) in content.chunks(CHUNK / 2).enumerate() {
            let start = chunk * CHUNK + half * CHUNK / 2;
            let bytes: Vec<u8> = content.iter().flat_map(|value| [*value; SECTOR_BYTES]).collect();
            let zeros = content.iter().all(|value| *value == 0);
            self.slot(start..start + CHUNK / 2, if zeros { Content::Zeros } else { Content::Bytes(bytes) });
        }
    }

    fn slot(&mut self, range: Range<usize>, content: Content) {
        let lsn = self.record(Record::Slot);
        self.map.lock().insert(lsn, bytes(&range), content);
    }

    fn consume(&mut self) {
        let Some((lsn, record)) = self.stream.pop_front() else { return };
        let mut map = self.map.lock();
        match record {
            Record::Write(range, value) => {
                map.written(1, lsn, bytes(&range));
                self.replica[range].fill(value);
            }
            Record::Slot => {
                let Some(slot) = map.take(lsn) else { return };
                match slot.content {
                    Content::Bytes(content) => {
                        for piece in &slot.pieces {
                            for sector in sectors(piece) {
                                let at = sector * SECTOR_BYTES - usize::try_from(slot.offset).unwrap();
                                self.replica[sector] = content[at];
                            }
                        }
                    }
                    Content::Zeros => {
                        let mut pieces = slot.pieces.into_iter();
                        if let Some(first) = pieces.next() {
                            self.replica[sectors(&first)].fill(0);
                        }
                        pieces.for_each(|piece| map.requeue(piece));
                    }
                }
            }
        }
    }

    /// Everything ends: the copy, the writes, the stream.
    fn finish(&mut self) {
        self.reserve();
        while let Some(write) = self.in_flight.pop() {
            self.disk[write.range].fill(write.value);
        }
        while !self.left.is_empty() {
            self.read(0);
            self.reserve();
        }
        loop {
            while !self.stream.is_empty() {
                self.consume();
            }
            let pieces = self.map.lock().requeued(&bytes(&(0..SECTORS)));
            if pieces.is_empty() {
                return;
            }
            pieces.into_iter().for_each(|piece| self.slot(sectors(&piece), Content::Zeros));
        }
    }
}

/// Whether replica and disk end up equal.
fn ends_equal(before: &[Action], after: &[Action], mask: bool, barrier: bool) -> bool {
    let mut rig = Rig::new(mask, barrier);
    before.iter().for_each(|action| rig.act(action));
    rig.begin();
    after.iter().for_each(|action| rig.act(action));
    rig.finish();
    rig.disk == rig.replica
}

/// Whether any of many random runs ends unequal.
fn some_run_diverges(mask: bool, barrier: bool) -> bool {
    let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let diverged = runner.run(&(actions(), actions()), |(before, after)| {
        prop_assert!(ends_equal(&before, &after, mask, barrier));
        Ok(())
    });
    diverged.is_err()
}

#[test]
fn writes_that_race_with_the_copy_leave_replica_and_disk_equal() {
    assert!(!some_run_diverges(true, true));
}

#[test]
fn without_the_mask_they_do_not() {
    assert!(some_run_diverges(false, true));
}

#[test]
fn without_the_barrier_they_do_not() {
    assert!(some_run_diverges(true, false));
}
