//! Random stories against a model: a list of records and a set of dirty granules.

use super::{Heap, IDENTITY, heap_ring, payload};
use crate::abi::{GRANULE, LINE, Op};
use crate::consumer::Consumer;
use crate::entry::Entry;
use crate::memory::Host as _;
use crate::recovery::TakeOver;
use crate::reservation::{Reservation, Token};
use crate::ring::{Captured, Mode, Ring};
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};
use std::vec::Vec;

const RING_BYTES: u64 = 4096;
const VOLUME: u32 = 7;

#[derive(Clone, Debug)]
enum Step {
    /// Reserve pieces of these lengths next to each other.
    Reserve {
        granule: u64,
        lens: Vec<u64>,
    },
    Flush,
    /// These take one of the open reservations or tokens.
    Publish(usize),
    GiveUp(usize),
    Done(usize),
    Consume(usize),
    Release,
    Resync,
    /// The owner dies; another takes over.
    Die,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..16u64, proptest::collection::vec(1..900u64, 1..4))
            .prop_map(|(granule, lens)| Step::Reserve { granule, lens }),
        1 => Just(Step::Flush),
        6 => any::<usize>().prop_map(Step::Publish),
        1 => any::<usize>().prop_map(Step::GiveUp),
        6 => any::<usize>().prop_map(Step::Done),
        6 => (1..6usize).prop_map(Step::Consume),
        4 => Just(Step::Release),
        1 => Just(Step::Resync),
        1 => Just(Step::Die),
    ]
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum State {
    Reserved,
    Published,
    Void,
}

#[derive(Clone, Debug)]
struct Record {
    lsn: u64,
    op: Op,
    payload: Vec<u8>,
    state: State,
    done: bool,
}

/// What the ring must be.
struct Model {
    /// Not yet released, oldest first.
    records: VecDeque<Record>,
    consumed: usize,
    next_lsn: u64,
    mode: Mode,
    dirty: BTreeSet<u64>,
    /// Head of the ring.
    position: u64,
}

impl Model {
    /// Where head would be after these payloads.
    fn end_after(&self, lens: &[u64]) -> u64 {
        lens.iter().fold(self.position, |position, len| {
            let total = (LINE + len).div_ceil(LINE) * LINE;
            let to_end = RING_BYTES - position % RING_BYTES;
            position + total + if total > to_end { to_end } else { 0 }
        })
    }

    fn record_mut(&mut self, lsn: u64) -> &mut Record {
        self.records.iter_mut().find(|record| record.lsn == lsn).expect("not released")
    }

    fn push(&mut self, op: Op, payload: Vec<u8>, state: State, done: bool) {
        self.records.push_back(Record { lsn: self.next_lsn, op, payload, state, done });
        self.next_lsn += 1;
    }
}

/// One owner's life: steps until it dies. What it left in memory.
fn live(ring: Ring<Heap>, steps: &mut std::vec::IntoIter<Step>, model: &mut Model) -> Option<Vec<u8>> {
    let mut open: Vec<(Reservation<'_, Heap>, Vec<u8>)> = Vec::new();
    let mut tokens: Vec<Token> = Vec::new();
    let mut consumer = Consumer::new(&ring).unwrap();
    model.consumed = 0;
    for step in steps.by_ref() {
        let now_ns = 1000 - model.next_lsn.min(900);
        match step {
            Step::Reserve { granule, lens } => {
                let bytes = payload(model.next_lsn, lens.iter().sum());
                let mut offset = granule * GRANULE;
                let entries: Vec<Entry> = lens
                    .iter()
                    .map(|&len| {
                        let entry = Entry::write(VOLUME, offset, len, 0).next().unwrap();
                        offset += len;
                        entry
                    })
                    .collect();
                let end = model.end_after(&lens);
                let room = end - model.position + ring.used_bytes() <= RING_BYTES;
                match ring.reserve_many(entries.into_iter(), now_ns).unwrap() {
                    Captured::Ring(reservation) => {
                        assert!(model.mode == Mode::Ring && room);
                        assert_eq!(reservation.first_lsn(), model.next_lsn);
                        let mut rest = bytes.as_slice();
                        for len in lens {
                            let (part, later) = rest.split_at(usize::try_from(len).unwrap());
                            model.push(Op::Write, part.to_vec(), State::Reserved, false);
                            rest = later;
                        }
                        model.position = end;
                        open.push((reservation, bytes));
                    }
                    Captured::Bits => {
                        assert!(model.mode == Mode::Bitmap || !room, "bits although it fits");
                        model.mode = Mode::Bitmap;
                        model.dirty.insert(granule);
                    }
                }
            }
            Step::Flush => {
                let end = model.end_after(&[0]);
                if let Ok(captured) = ring.capture([Entry::event(Op::Flush, 0, 0)].into_iter(), &[], now_ns) {
                    assert!(matches!(captured, Captured::Ring(_)) && model.mode == Mode::Ring);
                    model.push(Op::Flush, Vec::new(), State::Published, true);
                    model.position = end;
                } else {
                    let full = end - model.position + ring.used_bytes() > RING_BYTES;
                    assert!(model.mode == Mode::Bitmap || full);
                }
            }
            Step::Publish(which) if !open.is_empty() => {
                let (mut reservation, bytes) = open.swap_remove(which % open.len());
                // In uneven chunks, across the pieces' borders.
                bytes.chunks(1 + which % 300).for_each(|chunk| reservation.fill(chunk));
                let token = reservation.publish();
                for lsn in token.first_lsn()..=token.last_lsn() {
                    model.record_mut(lsn).state = State::Published;
                }
                tokens.push(token);
            }
            Step::GiveUp(which) if !open.is_empty() => {
                let (reservation, _) = open.swap_remove(which % open.len());
                for lsn in reservation.first_lsn()..=reservation.last_lsn() {
                    model.record_mut(lsn).state = State::Void;
                }
            }
            Step::Done(which) if !tokens.is_empty() => {
                let token = tokens.swap_remove(which % tokens.len());
                for lsn in token.first_lsn()..=token.last_lsn() {
                    model.record_mut(lsn).done = true;
                }
                ring.mark_done(token);
            }
            Step::Consume(count) => {
                for _ in 0..count {
                    let expected =
                        model.records.get(model.consumed).filter(|next| next.state != State::Reserved);
                    let found = consumer.peek().unwrap();
                    assert_eq!(found.map(|record| record.lsn()), expected.map(|record| record.lsn));
                    let (Some(found), Some(expected)) = (found, expected) else { break };
                    if expected.state == State::Void {
                        assert_eq!((found.op(), found.payload()), (Op::Void, &[][..]));
                    } else {
                        assert_eq!((found.op(), found.payload()), (expected.op, expected.payload.as_slice()));
                    }
                    assert!(consumer.advance().unwrap());
                    model.consumed += 1;
                }
            }
            Step::Release => {
                while model.consumed > 0
                    && model.records.front().is_some_and(|record| record.done || record.state == State::Void)
                {
                    model.records.pop_front();
                    model.consumed -= 1;
                }
                let first = model.records.front().map_or(model.next_lsn, |record| record.lsn);
                assert_eq!(consumer.release(u64::MAX).unwrap(), first);
            }
            Step::Resync => {
                let end = model.end_after(&[0]);
                if ring.begin_resync(now_ns).is_ok() {
                    model.push(Op::ResyncBegin, Vec::new(), State::Published, true);
                    model.position = end;
                    model.mode = Mode::Ring;
                    // Half of it is repaired; the rest stays pending.
                    let repaired: Vec<u64> =
                        model.dirty.iter().copied().filter(|granule| granule % 2 == 0).collect();
                    for granule in repaired {
                        ring.clear_dirty(VOLUME, granule * GRANULE..(granule + 1) * GRANULE);
                        model.dirty.remove(&granule);
                    }
                }
            }
            Step::Die => {
                open.into_iter().for_each(|(reservation, _)| std::mem::forget(reservation));
                return Some(ring.host().memory().bytes());
            }
            Step::Publish(_) | Step::GiveUp(_) | Step::Done(_) => {}
        }
        let dirty: BTreeSet<u64> = ring
            .dirty_extents(VOLUME)
            .flat_map(|range| range.start / GRANULE..range.end.div_ceil(GRANULE))
            .collect();
        assert_eq!(dirty, model.dirty);
        assert_eq!(ring.captured_lsn(), model.next_lsn - 1);
        assert_eq!(ring.mode(), model.mode);
    }
    None
}

/// The next owner: what was reserved is void, what is published and not done is redone in order.
fn take_over(bytes: &[u8], model: &mut Model) -> Ring<Heap> {
    let taken = TakeOver::new(Heap::from_bytes(bytes), &IDENTITY).expect("sound");
    for record in model.records.iter_mut().filter(|record| record.state == State::Reserved) {
        record.state = State::Void;
    }
    let mut undone = taken.undone();
    for record in model.records.iter_mut().filter(|record| record.state == State::Published && !record.done) {
        let found = undone.next().expect("redone");
        assert_eq!((found.lsn(), found.payload()), (record.lsn, record.payload.as_slice()));
        taken.mark_done(&found);
        record.done = true;
    }
    assert!(undone.next().is_none());
    taken.finish().expect("nothing is undone")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn ring_and_model_agree(steps in proptest::collection::vec(step(), 1..200)) {
        let mut model = Model {
            records: VecDeque::new(),
            consumed: 0,
            next_lsn: 50,
            mode: Mode::Ring,
            dirty: BTreeSet::new(),
            position: 0,
        };
        let mut steps = steps.into_iter();
        let mut ring = heap_ring(RING_BYTES, 50);
        while let Some(bytes) = live(ring, &mut steps, &mut model) {
            ring = take_over(&bytes, &mut model);
        }
    }

    /// No byte of a ring left behind can make a take-over, or the consumer after it, panic.
    #[test]
    fn garbage_is_refused_or_harmless(
        flips in proptest::collection::vec((0..4u8, any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let ring = heap_ring(RING_BYTES, 1);
        for number in 0..9 {
            let _ = super::write(&ring, VOLUME, number * 512, &payload(number, 300), number);
        }
        let mut bytes = ring.host().memory().bytes();
        for (region, at, value) in flips {
            let range = match region {
                0 => 0..96,
                1 => 4096..4096 + 256,
                2 => 8192..8192 + 256,
                _ => bytes.len() - 4096..bytes.len(),
            };
            let at = range.start + at.index(range.len());
            bytes[at] = value;
        }
        if let Ok(taken) = TakeOver::new(Heap::from_bytes(&bytes), &IDENTITY) {
            for record in taken.undone() {
                taken.mark_done(&record);
            }
            let ring = taken.finish().expect("everything was marked");
            let mut consumer = Consumer::new(&ring).unwrap();
            while let Ok(true) = consumer.advance() {}
            let _ = consumer.release(u64::MAX);
            let _ = ring.dirty_extents(VOLUME).count();
        }
    }
}
