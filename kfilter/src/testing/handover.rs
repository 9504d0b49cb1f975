//! Begin and fence in pieces: no write that comes between two of them is lost, and no hold of the lock is
//! long.

use super::{Heap, IDENTITY};
use crate::abi::{GRANULE, Layout, Op, VolumeSpec};
use crate::consumer::Consumer;
use crate::dirty::{CAUSE_AGENT, CAUSE_QUOTA};
use crate::entry::Entry;
use crate::recovery::TakeOver;
use crate::reservation::Token;
use crate::ring::{Captured, Mode, Refused, Ring};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::vec::Vec;

const RING_BYTES: u64 = 2048;
const VOLUME: u32 = 7;
const GIB: u64 = 1 << 30;
/// A piece is 4 GiB of the volume: three of them, and 2 GiB beyond the bitmap.
const COVERED: u64 = 12 * GIB;
const SIZE: u64 = 14 * GIB;
/// Where writes go: two granules in each piece, side by side at one border, and two beyond the bitmap.
const PLACES: [u64; 8] =
    [0, 4 * GIB - GRANULE, 4 * GIB, 7 * GIB, 9 * GIB, COVERED - GRANULE, COVERED, SIZE - GRANULE];

fn ring_of(size_bytes: u64, ring_bytes: u64) -> Ring<Heap> {
    let spec = [VolumeSpec { id: VOLUME, sector_bytes: 512, uuid: [5; 16], size_bytes }];
    let layout = Layout::plan(ring_bytes, &spec).unwrap();
    Ring::format(Heap::new(layout.total_bytes), &IDENTITY, &spec, ring_bytes, 1, 0).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize),
    /// These take one of the writes in flight.
    Land(usize),
    Fail(usize),
    /// Writes shall only set bits.
    Bitmap,
    /// The owner dies, and another takes over.
    Die,
    /// Begin (or fence, when writes are recorded and so it says), with one of these at each release of the
    /// lock; then the barrier, and a repair of what is dirty.
    Round(bool, Vec<Step>),
}

fn small() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..PLACES.len()).prop_map(Step::Write),
        4 => any::<usize>().prop_map(Step::Land),
        4 => any::<usize>().prop_map(Step::Fail),
        1 => Just(Step::Bitmap),
        1 => Just(Step::Die),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => small(),
        1 => (any::<bool>(), proptest::collection::vec(small(), 0..24))
            .prop_map(|(fences, between)| Step::Round(fences, between)),
    ]
}

struct Flight {
    place: usize,
    version: u64,
    token: Option<Token>,
}

/// A disk, its replica, and what is on its way to either. One write in flight for each place.
#[derive(Default)]
struct World {
    disk: [u64; PLACES.len()],
    replica: [u64; PLACES.len()],
    in_flight: Vec<Flight>,
    version: u64,
    /// Newest record that the replica has.
    applied: u64,
    /// Places of the records, by lsn.
    records: Vec<(u64, usize)>,
    /// What a dead owner left; until it is taken over nothing happens any more.
    left: Option<Vec<u8>>,
}

impl World {
    fn run(&mut self, ring: &Ring<Heap>, step: &Step) {
        if self.left.is_some() {
            return;
        }
        match *step {
            Step::Write(place) if self.in_flight.iter().all(|flight| flight.place != place) => {
                self.version += 1;
                let entry = Entry::write(VOLUME, PLACES[place], 8, 0);
                let token = match ring.capture(entry, &self.version.to_le_bytes(), 1).unwrap() {
                    Captured::Ring(token) => {
                        self.records.push((token.first_lsn(), place));
                        Some(token)
                    }
                    Captured::Bits => None,
                };
                self.in_flight.push(Flight { place, version: self.version, token });
            }
            Step::Land(which) if !self.in_flight.is_empty() => {
                let flight = self.in_flight.swap_remove(which % self.in_flight.len());
                self.disk[flight.place] = flight.version;
                flight.token.into_iter().for_each(|token| ring.mark_done(token));
            }
            Step::Fail(which) if !self.in_flight.is_empty() => {
                let flight = self.in_flight.swap_remove(which % self.in_flight.len());
                assert!(ring.mark_dirty(VOLUME, PLACES[flight.place]..PLACES[flight.place] + 8));
                flight.token.into_iter().for_each(|token| ring.mark_done(token));
            }
            Step::Bitmap => ring.set_mode_bitmap(CAUSE_QUOTA, 1),
            Step::Die => self.left = Some(ring.host().bytes()),
            Step::Write(_) | Step::Land(_) | Step::Fail(_) | Step::Round(..) => {}
        }
    }

    /// The next owner: it writes again what was published and not done.
    fn take_over(&mut self, left: &[u8]) -> Ring<Heap> {
        let taken = TakeOver::new(Heap::from_bytes(left), &IDENTITY).expect("sound");
        for flight in std::mem::take(&mut self.in_flight) {
            self.disk[flight.place] = flight.version;
        }
        for record in taken.undone() {
            let place = PLACES.iter().position(|place| *place == record.offset()).unwrap();
            self.disk[place] = u64::from_le_bytes(record.payload().try_into().unwrap());
            taken.mark_done(&record);
        }
        taken.finish().expect("nothing is undone")
    }

    /// Takes what is recorded to the replica.
    fn apply(&mut self, ring: &Ring<Heap>) {
        let mut consumer = Consumer::new(ring).unwrap();
        while let Some(record) = consumer.peek().unwrap() {
            if record.lsn() > self.applied && record.op() == Op::Write {
                let place = PLACES.iter().position(|place| *place == record.offset()).unwrap();
                self.replica[place] = u64::from_le_bytes(record.payload().try_into().unwrap());
            }
            self.applied = self.applied.max(record.lsn());
            consumer.advance().unwrap();
        }
        consumer.release(u64::MAX).unwrap();
    }

    /// What a resync does behind its begin: barrier, read what is dirty, send what no newer record holds,
    /// clear.
    fn repair(&mut self, ring: &Ring<Heap>, after: u64) {
        while !self.in_flight.is_empty() {
            self.run(ring, &Step::Land(0));
        }
        let dirty: Vec<Range<u64>> = ring.dirty_extents(VOLUME).collect();
        self.apply(ring);
        for range in dirty {
            for (place, at) in PLACES.iter().enumerate().filter(|(_, at)| range.contains(at)) {
                let is_masked = self.records.iter().any(|(lsn, written)| *lsn > after && *written == place);
                assert!(*at < SIZE);
                if !is_masked {
                    self.replica[place] = self.disk[place];
                }
            }
            ring.clear_dirty(VOLUME, range);
        }
    }
}

/// A begin or a fence with steps at the lock's releases, and its repair. The next owner's ring when this one
/// died.
fn round(
    ring: Rc<Ring<Heap>>,
    world: &Rc<RefCell<World>>,
    fences: bool,
    between: Vec<Step>,
) -> Rc<Ring<Heap>> {
    world.borrow_mut().apply(&ring);
    let between = RefCell::new(VecDeque::from(between));
    let (weak, other) = (Rc::downgrade(&ring), world.clone());
    let is_on = Rc::new(Cell::new(true));
    let listens = is_on.clone();
    ring.host().set_between(move || {
        if let (true, Some(ring), Some(step)) =
            (listens.get(), weak.upgrade(), between.borrow_mut().pop_front())
        {
            other.borrow_mut().run(&ring, &step);
        }
    });
    let begun = if fences && ring.mode() == Mode::Ring { ring.fence() } else { ring.begin_resync(1) };
    is_on.set(false);
    let mut world = world.borrow_mut();
    if let Some(left) = world.left.take() {
        return Rc::new(world.take_over(&left));
    }
    match begun {
        Ok(after) => world.repair(&ring, after),
        Err(Refused::Full | Refused::BitmapMode) => {}
        Err(other) => panic!("{other:?}"),
    }
    ring
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn no_write_is_lost_between_two_pieces(steps in proptest::collection::vec(step(), 1..60)) {
        let ring = ring_of(COVERED, RING_BYTES);
        prop_assert_eq!(ring.grow(VOLUME, SIZE, &[], 1), Ok(Captured::Ring(1)));
        let (mut ring, world) = (Rc::new(ring), Rc::new(RefCell::new(World::default())));
        for step in steps {
            if let Step::Round(fences, between) = step {
                ring = round(ring, &world, fences, between);
                continue;
            }
            let mut world = world.borrow_mut();
            world.run(&ring, &step);
            if let Some(left) = world.left.take() {
                ring = Rc::new(world.take_over(&left));
            }
        }
        // Begun while no write comes: one round repairs it all, and leaves nothing current.
        world.borrow_mut().apply(&ring);
        while !world.borrow().in_flight.is_empty() {
            world.borrow_mut().run(&ring, &Step::Land(0));
        }
        world.borrow_mut().apply(&ring);
        ring = round(ring, &world, false, Vec::new());
        prop_assert_eq!(ring.mode(), Mode::Ring);
        prop_assert!(ring.end_resync(1).is_ok(), "still dirty: {:?}", ring.dirty_extents(VOLUME).next());
        prop_assert!(!ring.is_dirty(VOLUME) && ring.loss().is_none());
        let world = world.borrow();
        prop_assert_eq!(world.replica, world.disk);
    }
}

/// Runs `call` once, when the lock is released for the nth time from here on.
fn at_release(ring: &Rc<Ring<Heap>>, nth: u32, call: impl Fn(&Ring<Heap>) + 'static) {
    let (weak, left) = (Rc::downgrade(ring), Cell::new(nth));
    ring.host().set_between(move || {
        left.set(left.get().saturating_sub(1));
        if left.get() == 0
            && let Some(ring) = weak.upgrade()
        {
            left.set(u32::MAX);
            call(&ring);
        }
    });
}

#[test]
fn a_write_between_two_pieces_is_repaired_by_this_very_begin() {
    let ring = Rc::new(ring_of(COVERED, RING_BYTES));
    ring.set_mode_bitmap(CAUSE_AGENT, 1);
    ring.mark_dirty(VOLUME, 0..u64::MAX);
    let write =
        |ring: &Ring<Heap>, at: u64| ring.capture(Entry::write(VOLUME, at, 8, 0), &[1; 8], 1).unwrap();
    // 1 the start, 2 the record, 3 the first piece.
    at_release(&ring, 3, move |ring| {
        assert_eq!((ring.mode(), ring.fence(), ring.begin_resync(1)), {
            (Mode::Bitmap, Err(Refused::Moving), Err(Refused::Moving))
        });
        assert_eq!(write(ring, 0), Captured::Bits);
        assert_eq!(write(ring, COVERED - GRANULE), Captured::Bits);
    });
    assert_eq!((ring.begin_resync(1), ring.mode()), (Ok(1), Mode::Ring));
    ring.clear_dirty(VOLUME, 0..COVERED);
    assert!(!ring.is_dirty(VOLUME), "all of it was pending");
    assert_eq!(ring.end_resync(1), Ok(2));
}

#[test]
fn a_begin_that_is_overtaken_leaves_the_mode_alone() {
    let ring = Rc::new(ring_of(COVERED, RING_BYTES));
    ring.set_mode_bitmap(CAUSE_AGENT, 1);
    ring.mark_dirty(VOLUME, 0..u64::MAX);
    at_release(&ring, 4, |ring| ring.set_mode_bitmap(CAUSE_QUOTA, 9));
    assert_eq!((ring.begin_resync(1), ring.mode()), (Ok(1), Mode::Bitmap));
    assert_eq!(ring.loss().map(|loss| (loss.since_ns, loss.cause)), Some((9, CAUSE_QUOTA)));
    assert_eq!((ring.begin_resync(1), ring.mode()), (Ok(2), Mode::Ring));
}

#[test]
fn no_hold_of_the_lock_grows_with_the_volume() {
    // 16 TiB: 32 MiB of bitmap, twice.
    let ring = ring_of(16 << 40, 4096);
    let longest = |what: &str, bound: u64| {
        let held = ring.host().take_longest_hold();
        assert!(held <= bound, "{what}: {held} accesses in one hold of the lock");
    };
    // Words of a piece, each read, set and stored; and the words of a record.
    let (words, others) = (1024, 32);
    assert!(ring.mark_dirty(VOLUME, 0..u64::MAX));
    longest("mark", words + others);
    assert_eq!(ring.fence(), Ok(0));
    longest("fence", 3 * words + others);
    ring.clear_dirty(VOLUME, 0..8 << 40);
    longest("clear", words + others);
    ring.set_mode_bitmap(CAUSE_AGENT, 1);
    assert_eq!(
        ring.capture([Entry::extent(Op::Discard, VOLUME, GRANULE, 4 << 30, 0)].into_iter(), &[], 1),
        Ok(Captured::Bits)
    );
    longest("the longest write", words + others);
    assert_eq!(ring.begin_resync(1), Ok(1));
    longest("begin", 3 * words + others);
    assert_eq!(ring.end_resync(1), Err(Refused::Dirty));
    longest("end, dirty", others);
    ring.clear_dirty(VOLUME, 0..u64::MAX);
    longest("clear", words + others);
    assert_eq!(ring.end_resync(1), Ok(2));
    longest("end", others);
}

/// A new owner counts what the dead one left: it may end when the last bit is cleared, and not before.
#[test]
fn a_new_owner_knows_how_many_bits_are_set() {
    let ring = ring_of(COVERED - GRANULE, 4096);
    ring.mark_dirty(VOLUME, 0..1);
    ring.begin_resync(1).unwrap();
    ring.mark_dirty(VOLUME, 5 * GIB..5 * GIB + 1);
    let mut left = ring.host().bytes();
    // A bit of no granule of the volume: memory that was written by others.
    let last = usize::try_from(crate::abi::BITMAPS_AT + COVERED / GRANULE / 8 - 1).unwrap();
    left[last] |= 0x80;
    let ring = TakeOver::new(Heap::from_bytes(&left), &IDENTITY).unwrap().finish().unwrap();
    assert_eq!(ring.end_resync(1), Err(Refused::Dirty));
    ring.clear_dirty(VOLUME, 0..u64::MAX);
    assert_eq!(ring.end_resync(1), Err(Refused::Dirty));
    ring.fence().unwrap();
    ring.clear_dirty(VOLUME, 0..u64::MAX);
    assert!(!ring.is_dirty(VOLUME) && ring.end_resync(1).is_ok());
}
