//! Every interleaving, under C11 rules, of two producers and the consumer on a tiny ring, of a begin in
//! pieces with a writer and with a reader of the dirty bits, and of a publish with a consumer that goes to
//! sleep. Run with
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p afterimage-kfilter --release loom`.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

use kfilter::abi::{BITMAPS_AT, GRANULE, control_at};
use kfilter::dirty::CAUSE_AGENT;
use kfilter::memory::{Host, Memory};
use kfilter::ring::Reserver;
use kfilter::span::Span;
use kfilter::waker::Waker;
use kfilter::{Captured, Consumer, Entry, Identity, Layout, Mode, Op, Ring, VolumeSpec};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::time::Duration;

const RING_BYTES: u64 = 256;
const VOLUME: u32 = 1;
/// Two pieces of bitmap, so that a begin releases the lock between them.
const SIZE_BYTES: u64 = 8 << 30;
const VOLUMES: [VolumeSpec; 1] =
    [VolumeSpec { id: VOLUME, sector_bytes: 512, uuid: [0; 16], size_bytes: SIZE_BYTES }];

#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line(#[allow(dead_code)] [u8; 64]);

/// Real bytes, with the words that matter as loom's atomics and a cell for each line of the ring, so that
/// loom sees every plain access that is not ordered.
struct LoomMemory {
    _lines: Box<[Line]>,
    span: Span,
    words64: BTreeMap<u64, AtomicU64>,
    words32: BTreeMap<u64, AtomicU32>,
    cells: Vec<UnsafeCell<()>>,
    ring_at: u64,
}

impl LoomMemory {
    fn new(layout: Layout) -> Self {
        let mut lines = vec![Line([0; 64]); (layout.total_bytes / 64) as usize].into_boxed_slice();
        let base = NonNull::new(lines.as_mut_ptr().cast()).unwrap();
        // SAFETY: aligned by `Line`, valid as long as `_lines` beside it, which nobody else touches.
        let span = unsafe { Span::new(base, layout.total_bytes) };
        let words64 =
            [control_at::HEAD, control_at::TAIL, control_at::ANCHOR_LSN, control_at::ANCHOR_TIME].into_iter();
        // The first and the last word of both bitmaps: what the scenarios use.
        let bitmap = kfilter::abi::bitmap_bytes(SIZE_BYTES);
        let bits = [0, bitmap - 8, bitmap, 2 * bitmap - 8].into_iter().map(|at| BITMAPS_AT + at);
        let words64 = words64.chain(bits);
        let states = (0..RING_BYTES / 64).map(|line| layout.ring_at + line * 64);
        Self {
            _lines: lines,
            span,
            words64: words64.map(|at| (at, AtomicU64::new(0))).collect(),
            words32: states.map(|at| (at, AtomicU32::new(0))).collect(),
            cells: (0..RING_BYTES / 64).map(|_| UnsafeCell::new(())).collect(),
            ring_at: layout.ring_at,
        }
    }

    /// Cells of the ring's lines that a range touches.
    fn touched(&self, at: u64, len: u64) -> &[UnsafeCell<()>] {
        if at < self.ring_at || len == 0 {
            return &[];
        }
        let from = (at - self.ring_at) / 64;
        let to = (at + len - self.ring_at).div_ceil(64);
        &self.cells[from as usize..to as usize]
    }
}

// SAFETY: forwards to `Span` or to loom's atomics, always the same for one word.
unsafe impl Memory for LoomMemory {
    fn len(&self) -> u64 {
        self.span.len()
    }
    fn load32(&self, at: u64, order: Ordering) -> u32 {
        self.words32.get(&at).map_or_else(|| self.span.load32(at, order), |word| word.load(order))
    }
    fn load64(&self, at: u64, order: Ordering) -> u64 {
        self.words64.get(&at).map_or_else(|| self.span.load64(at, order), |word| word.load(order))
    }
    fn store32(&self, at: u64, value: u32, order: Ordering) {
        self.words32
            .get(&at)
            .map_or_else(|| self.span.store32(at, value, order), |word| word.store(value, order));
    }
    fn store64(&self, at: u64, value: u64, order: Ordering) {
        self.words64
            .get(&at)
            .map_or_else(|| self.span.store64(at, value, order), |word| word.store(value, order));
    }
    fn or32(&self, at: u64, bits: u32, order: Ordering) -> u32 {
        self.words32
            .get(&at)
            .map_or_else(|| self.span.or32(at, bits, order), |word| word.fetch_or(bits, order))
    }
    fn or64(&self, at: u64, bits: u64, order: Ordering) -> u64 {
        self.words64
            .get(&at)
            .map_or_else(|| self.span.or64(at, bits, order), |word| word.fetch_or(bits, order))
    }
    fn and64(&self, at: u64, bits: u64, order: Ordering) -> u64 {
        self.words64
            .get(&at)
            .map_or_else(|| self.span.and64(at, bits, order), |word| word.fetch_and(bits, order))
    }
    unsafe fn write(&self, at: u64, bytes: &[u8]) {
        self.touched(at, bytes.len() as u64).iter().for_each(|cell| cell.with_mut(|_| ()));
        // SAFETY: the caller's promise, which loom has just checked.
        unsafe { self.span.write(at, bytes) }
    }
    unsafe fn bytes(&self, at: u64, len: u64) -> &[u8] {
        self.touched(at, len).iter().for_each(|cell| cell.with(|_| ()));
        // SAFETY: the caller's promise, which loom has just checked.
        unsafe { self.span.bytes(at, len) }
    }
}

struct LoomHost {
    memory: LoomMemory,
    reserver: Mutex<Reserver>,
}

// SAFETY: loom's mutex around the only `Reserver`.
unsafe impl Host for LoomHost {
    type Memory = LoomMemory;
    fn memory(&self) -> &LoomMemory {
        &self.memory
    }
    fn locked<R>(&self, critical: impl FnOnce(&mut Reserver) -> R) -> R {
        critical(&mut self.reserver.lock().unwrap())
    }
    fn published(&self) {}
}

fn new_ring() -> Arc<Ring<LoomHost>> {
    let identity = Identity { boot_id: [1; 16], group_id: [2; 16], epoch: 1, epoch_id: [3; 16] };
    let layout = Layout::plan(RING_BYTES, &VOLUMES).unwrap();
    let host = LoomHost { memory: LoomMemory::new(layout), reserver: Mutex::new(Reserver::new()) };
    Arc::new(Ring::format(host, &identity, &VOLUMES, RING_BYTES, 1, 0).unwrap())
}

fn model(preemptions: usize, scenario: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(scenario);
}

/// Write number `id`: two lines of the ring, told apart by their granule. True when it is in the ring.
fn produce(ring: &Ring<LoomHost>, id: u64) -> bool {
    let entry = Entry::write(VOLUME, id * GRANULE, 8, 0);
    match ring.capture(entry, &id.to_le_bytes(), id).unwrap() {
        Captured::Ring(token) => {
            ring.mark_done(token);
            true
        }
        Captured::Bits => false,
    }
}

/// Takes what there is, and releases it; the writes seen.
fn consume(consumer: &mut Consumer<LoomHost, Arc<Ring<LoomHost>>>, next_lsn: &mut u64) -> Vec<u64> {
    let mut seen = Vec::new();
    while let Some(record) = consumer.peek().unwrap() {
        assert_eq!(record.lsn(), *next_lsn, "dense, in order");
        *next_lsn += 1;
        if record.op() == Op::Write {
            let id = u64::from_le_bytes(record.payload().try_into().unwrap());
            assert_eq!(record.offset(), id * GRANULE, "the payload of this header");
            seen.push(id);
        }
        consumer.advance().unwrap();
    }
    consumer.release(u64::MAX).unwrap();
    seen
}

#[test]
fn loom_each_write_is_in_the_ring_or_a_bit() {
    model(3, || {
        let ring = new_ring();
        let producers: Vec<_> = (0..2)
            .map(|producer| {
                let ring = ring.clone();
                loom::thread::spawn(move || [produce(&ring, producer * 2), produce(&ring, producer * 2 + 1)])
            })
            .collect();
        let mut consumer = Consumer::new(ring.clone()).unwrap();
        let mut next_lsn = 1;
        let mut seen = consume(&mut consumer, &mut next_lsn);
        seen.extend(consume(&mut consumer, &mut next_lsn));
        let in_ring: Vec<bool> =
            producers.into_iter().flat_map(|producer| producer.join().unwrap()).collect();
        seen.extend(consume(&mut consumer, &mut next_lsn));
        assert_eq!((ring.used_bytes(), ring.captured_lsn()), (0, next_lsn - 1));
        let dirty: Vec<u64> =
            ring.dirty_extents(VOLUME).flat_map(|range| range.start / GRANULE..range.end / GRANULE).collect();
        for (id, in_ring) in (0u64..).zip(in_ring) {
            assert_eq!(seen.iter().filter(|&&seen| seen == id).count(), usize::from(in_ring));
            assert_eq!(dirty.contains(&id), !in_ring);
        }
        assert_eq!(ring.mode() == Mode::Bitmap, !dirty.is_empty());
    });
}

#[test]
fn loom_a_record_given_up_does_not_stop_the_others() {
    model(3, || {
        let ring = new_ring();
        let other = ring.clone();
        let quitter = loom::thread::spawn(move || {
            let entry = Entry::event(Op::Flush, VOLUME, 0);
            drop(other.reserve(entry, 1).unwrap());
        });
        let other = ring.clone();
        let producer = loom::thread::spawn(move || produce(&other, 5));
        let mut consumer = Consumer::new(ring.clone()).unwrap();
        let mut next_lsn = 1;
        let mut seen = consume(&mut consumer, &mut next_lsn);
        quitter.join().unwrap();
        assert!(producer.join().unwrap());
        seen.extend(consume(&mut consumer, &mut next_lsn));
        assert_eq!((seen, next_lsn, ring.used_bytes()), (vec![5], 3, 0));
    });
}

fn dirty_granules(ring: &Ring<LoomHost>) -> Vec<u64> {
    ring.dirty_extents(VOLUME).flat_map(|range| range.start / GRANULE..range.end / GRANULE).collect()
}

/// The last granule: the second piece.
const LAST: u64 = SIZE_BYTES / GRANULE - 1;

#[test]
fn loom_no_write_is_lost_between_the_pieces_of_a_begin() {
    model(2, || {
        let ring = new_ring();
        ring.set_mode_bitmap(CAUSE_AGENT, 1);
        ring.mark_dirty(VOLUME, LAST * GRANULE..(LAST + 1) * GRANULE);
        let other = ring.clone();
        let writer = loom::thread::spawn(move || produce(&other, 0));
        assert_eq!(ring.begin_resync(1), Ok(1));
        assert_eq!(ring.mode(), Mode::Ring);
        let in_ring = writer.join().unwrap();
        assert_eq!(dirty_granules(&ring), if in_ring { vec![LAST] } else { vec![0, LAST] });
        // A write without a record was pending when the mode changed.
        ring.clear_dirty(VOLUME, 0..SIZE_BYTES);
        assert!(!ring.is_dirty(VOLUME));
        let mut consumer = Consumer::new(ring.clone()).unwrap();
        let mut next_lsn = 1;
        assert_eq!(consume(&mut consumer, &mut next_lsn), if in_ring { vec![0] } else { vec![] });
        assert!(ring.end_resync(1).is_ok());
    });
}

/// The agent reads the bits of a ring in the kernel through a mapping, without the lock.
#[test]
fn loom_a_bit_that_moves_is_never_out_of_sight() {
    model(3, || {
        let ring = new_ring();
        ring.mark_dirty(VOLUME, 0..GRANULE);
        let other = ring.clone();
        let reader = loom::thread::spawn(move || other.is_dirty(VOLUME));
        ring.fence().unwrap();
        assert!(reader.join().unwrap());
    });
}

/// Loom's waits never time out: a publish that is missed is a deadlock, which it reports.
#[test]
fn loom_a_publish_is_never_slept_through() {
    model(4, || {
        let waker = Arc::new(Waker::new());
        let published = Arc::new(AtomicBool::new(false));
        let producer = {
            let (waker, published) = (waker.clone(), published.clone());
            loom::thread::spawn(move || {
                published.store(true, Ordering::Release);
                waker.wake();
            })
        };
        assert!(waker.wait(Duration::from_secs(1), || published.load(Ordering::Acquire)));
        producer.join().unwrap();
    });
}
