//! A producer that dies after every single shared store, and a new owner that takes over what is left.

use super::{Heap, IDENTITY, VOLUMES, payload};
use crate::abi::{GRANULE, Layout, Op};
use crate::consumer::Consumer;
use crate::entry::Entry;
use crate::recovery::TakeOver;
use crate::ring::{Captured, Mode, Ring};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::{boxed::Box, vec::Vec};

/// What must hold whenever the owner dies. Weakened before a call that takes something away, strengthened
/// after a call that has promised something.
#[derive(Default)]
struct Promise {
    /// Highest lsn that a producer was told.
    told_lsn: u64,
    told_time: u64,
    /// Records whose capture has returned and whose release has not been asked for: lsn → (payload, done).
    recorded: BTreeMap<u64, (Vec<u8>, bool)>,
    /// Every record that was ever begun, by lsn: what it must hold if it is published.
    begun: BTreeMap<u64, Vec<u8>>,
    dirty: Vec<Range<u64>>,
    /// Writes have become bits and nobody has begun to repair them.
    lost: bool,
}

struct Story {
    ring: Ring<Heap>,
    promise: Rc<RefCell<Promise>>,
    stops: Rc<Cell<u32>>,
    now_ns: u64,
    next_lsn: u64,
}

impl Story {
    fn new(ring_bytes: u64) -> Self {
        let promise = Rc::new(RefCell::new(Promise::default()));
        let stops = Rc::new(Cell::new(0));
        let layout = Layout::plan(ring_bytes, &VOLUMES).unwrap();
        let armed = Rc::new(Cell::new(false));
        let hook = {
            let (promise, stops, armed) = (promise.clone(), stops.clone(), armed.clone());
            Box::new(move |bytes: &[u8]| {
                // A ring in the making has no name yet, so nobody finds it.
                if armed.get() {
                    stops.set(stops.get() + 1);
                    check(bytes, &promise.borrow());
                }
            })
        };
        let heap = Heap::new(layout.total_bytes).hooked(hook);
        let ring = Ring::format(heap, &IDENTITY, &VOLUMES, ring_bytes, 100, 0).unwrap();
        armed.set(true);
        Self { ring, promise, stops, now_ns: 1000, next_lsn: 100 }
    }

    /// Captures pieces next to each other; whether they came into the ring.
    fn capture(&mut self, offset: u64, lens: &[u64]) -> bool {
        let bytes = payload(self.next_lsn, lens.iter().sum());
        let mut parts = Vec::new();
        let (mut at, mut rest) = (offset, bytes.as_slice());
        for &len in lens {
            let (part, later) = rest.split_at(usize::try_from(len).unwrap());
            parts.push((Entry::write(7, at, len, 0).next().unwrap(), part.to_vec()));
            (at, rest) = (at + len, later);
        }
        for (piece, (_, part)) in parts.iter().enumerate() {
            self.promise.borrow_mut().begun.insert(self.next_lsn + piece as u64, part.clone());
        }
        self.now_ns += 1;
        let captured = self.ring.capture(parts.iter().map(|(entry, _)| *entry), &bytes, self.now_ns).unwrap();
        let mut promise = self.promise.borrow_mut();
        match captured {
            Captured::Ring(token) => {
                assert_eq!(token.first_lsn(), self.next_lsn);
                for (piece, (_, part)) in parts.into_iter().enumerate() {
                    promise.recorded.insert(self.next_lsn + piece as u64, (part, false));
                }
                promise.told_lsn = token.last_lsn();
                promise.told_time = self.now_ns;
                self.next_lsn = token.last_lsn() + 1;
                drop(promise);
                let (first, last) = (token.first_lsn(), token.last_lsn());
                self.ring.mark_done(token);
                for lsn in first..=last {
                    self.promise.borrow_mut().recorded.get_mut(&lsn).unwrap().1 = true;
                }
                true
            }
            Captured::Bits => {
                let next_lsn = self.next_lsn;
                promise.begun.retain(|&lsn, _| lsn < next_lsn);
                promise.dirty.push(offset..at);
                promise.lost = true;
                false
            }
        }
    }

    /// Writes there until one becomes bits, and gives all room back.
    fn overflow(&mut self, offset: u64) {
        while self.capture(offset, &[150]) {}
        assert_eq!(self.ring.mode(), Mode::Bitmap);
        self.consume_and_release(usize::MAX);
    }

    /// Begins a resync. The bits may leave only after the promise does.
    fn begin(&mut self) {
        self.promise.borrow_mut().lost = false;
        self.now_ns += 1;
        assert_eq!(self.ring.begin_resync(self.now_ns), Ok(self.next_lsn));
        self.promise.borrow_mut().told_lsn = self.next_lsn;
        self.next_lsn += 1;
    }

    /// A range of volume 7 was repaired.
    fn repair(&mut self, range: Range<u64>) {
        self.promise.borrow_mut().dirty.retain(|dirty| dirty.start < range.start || dirty.end > range.end);
        self.ring.clear_dirty(7, range);
    }

    fn consume_and_release(&mut self, records: usize) {
        let mut consumer = Consumer::new(&self.ring).unwrap();
        let mut last = 0;
        for _ in 0..records {
            match consumer.peek().unwrap() {
                Some(record) => last = record.lsn(),
                None => break,
            }
            consumer.advance().unwrap();
        }
        self.promise.borrow_mut().recorded.retain(|&lsn, _| lsn > last);
        consumer.release(last).unwrap();
    }
}

/// Takes a copy over and holds it against the promise.
fn check(bytes: &[u8], promise: &Promise) {
    let taken = TakeOver::new(Heap::from_bytes(bytes), &IDENTITY).expect("a dead owner leaves a sound ring");
    let undone: Vec<u64> = taken.undone().map(|record| record.lsn()).collect();
    assert!(undone.is_sorted());
    for (lsn, (_, done)) in &promise.recorded {
        assert!(!done || !undone.contains(lsn), "a done write is redone");
    }
    for record in taken.undone() {
        taken.mark_done(&record);
    }
    let ring = taken.finish().expect("everything is done");
    let mut consumer = Consumer::new(&ring).unwrap();
    let mut seen = BTreeMap::new();
    while let Some(record) = consumer.peek().unwrap() {
        let published = record.op() != Op::Void;
        if let (true, Some(begun)) = (published, promise.begun.get(&record.lsn())) {
            assert_eq!(record.payload(), begun, "lsn {} is published half filled", record.lsn());
        }
        seen.insert(record.lsn(), published);
        consumer.advance().unwrap();
    }
    for lsn in promise.recorded.keys() {
        assert_eq!(seen.get(lsn), Some(&true), "lsn {lsn} was recorded and is gone");
    }
    assert!(ring.captured_lsn() >= promise.told_lsn, "an lsn would be given twice");
    if promise.lost {
        assert!(ring.mode() == Mode::Bitmap && ring.loss().is_some());
    }
    for range in &promise.dirty {
        let covered = ring.dirty_extents(7).any(|dirty| dirty.start <= range.start && range.end <= dirty.end);
        assert!(covered, "{range:?} is neither recorded nor dirty");
    }
    // The new owner goes on: everything can be released, and time does not run back.
    let before = ring.captured_lsn();
    assert_eq!(consumer.release(u64::MAX).unwrap(), before + 1);
    if ring.mode() == Mode::Ring {
        let Captured::Ring(token) =
            ring.capture([Entry::event(Op::Flush, 0, 0)].into_iter(), &[], 0).unwrap()
        else {
            panic!("an empty ring has room")
        };
        assert_eq!(token.first_lsn(), before + 1);
        let record = consumer.peek().unwrap().expect("published");
        assert!(record.time_ns() >= promise.told_time, "time runs back");
    }
}

#[test]
fn every_store_may_be_the_last() {
    let mut story = Story::new(1024);
    // Several laps, so that pads, wraps and stale bytes of earlier laps are met.
    for round in 0..20 {
        assert!(story.capture(round * 512, &[100]));
        assert!(story.capture(round * 512, &[200, 64 + round, 1]));
        story.consume_and_release(3);
        story.consume_and_release(3);
    }
    // A reservation that is given up keeps its lsn.
    drop(story.ring.reserve(Entry::write(7, 0, 70, 0).next().unwrap(), story.now_ns).unwrap());
    story.next_lsn += 1;
    // Overflow: all pieces of a write become bits, even those that had fit.
    while story.capture(3 * GRANULE, &[150]) {}
    assert!(!story.capture(5 * GRANULE, &[1, 700]));
    story.overflow(9 * GRANULE);
    story.begin();
    assert!(story.capture(512, &[100]));
    story.repair(0..1 << 20);
    assert_eq!(story.ring.end_resync(story.now_ns), Ok(story.next_lsn));
    story.next_lsn += 1;
    story.consume_and_release(usize::MAX);
    // Growth, recorded.
    story.promise.borrow_mut().begun.insert(story.next_lsn, b"new size".to_vec());
    let grown = story.ring.grow(7, 64 << 20, b"new size", story.now_ns);
    assert_eq!(grown, Ok(Captured::Ring(story.next_lsn)));
    story.next_lsn += 1;
    assert!(story.capture(63 << 20, &[100]));
    // Beyond the bitmap, which covers 32 MiB: a part of it is repaired, and is dirty again before the rest
    // is.
    story.overflow(60 << 20);
    assert!(!story.capture(40 << 20, &[100]));
    story.begin();
    story.repair(31 << 20..48 << 20);
    assert_eq!(story.ring.dirty_extents(7).next(), Some(48 << 20..64 << 20));
    assert!(story.capture(41 << 20, &[100]));
    story.overflow(36 << 20);
    story.begin();
    assert_eq!(story.ring.dirty_extents(7).next(), Some(32 << 20..64 << 20));
    story.repair(32 << 20..50 << 20);
    // So is a range whose writes failed, without a change of mode.
    assert!(story.ring.mark_dirty(7, 33 << 20..34 << 20));
    story.promise.borrow_mut().dirty.push(33 << 20..34 << 20);
    assert_eq!(story.ring.fence(), Ok(story.next_lsn - 1));
    story.repair(32 << 20..64 << 20);
    assert_eq!(story.ring.end_resync(story.now_ns), Ok(story.next_lsn));
    assert!(story.stops.get() > 700, "only {} stores were seen", story.stops.get());
}

/// The check itself must be able to fail: a ring whose head is shown before its header is refused.
#[test]
#[should_panic(expected = "a dead owner leaves a sound ring")]
fn a_head_without_a_header_is_noticed() {
    let story = Story::new(1024);
    let mut bytes = story.ring.host().bytes();
    bytes[4096] = 64;
    check(&bytes, &Promise::default());
}
