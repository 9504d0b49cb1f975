//! What a write costs in the ring: reserve, copy, publish, mark done, against a bare memcpy of the same bytes
//! from the same source into the same amount of memory. Nobody consumes meanwhile: on two cores the consumer
//! would be measured too; it takes and releases everything between the runs.
//!
//! `cargo bench -p afterimage-kfilter`

use kfilter::region::{RegionSpec, boot_id};
use kfilter::{Captured, Consumer, Entry, Identity, Region, VolumeSpec};
use memmap2::MmapMut;
use std::fs::OpenOptions;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

const RING_BYTES: u64 = 64 << 20;
const SIZE_BYTES: u64 = 1 << 30;
/// Bytes of one run: less than the ring, so that the figure is the producer's own and not the consumer's.
const RUN_BYTES: usize = 48 << 20;
const RUNS: usize = 5;

fn main() {
    println!("{}", machine());
    println!("ring 64 MiB in tmpfs, {} MiB a run, median of {RUNS}", RUN_BYTES >> 20);
    println!("MB/s; the ratio is to memcpy into tmpfs, and in brackets into the heap");
    println!("{:>8} {:>10} {:>8} {:>8} {:>8} {:>6}", "record", "producers", "ring", "tmpfs", "heap", "ratio");
    for (record_bytes, producers) in [(4 << 10, 1), (4 << 10, 2), (128 << 10, 1), (128 << 10, 2)] {
        let dir = tempfile::tempdir_in("/dev/shm").expect("the bench needs a tmpfs at /dev/shm");
        let mut heap = vec![1; RUN_BYTES];
        let mut tmpfs = map(dir.path());
        let ring = new_ring(dir.path());
        let heap = median(|| copy_run(&mut heap, record_bytes, producers));
        let tmpfs = median(|| copy_run(&mut tmpfs, record_bytes, producers));
        let recorded = median(|| ring_run(&ring, record_bytes, producers));
        let rate = |time: Duration| RUN_BYTES as f64 / time.as_secs_f64() / 1e6;
        println!(
            "{:>4} KiB {producers:>10} {:>8.0} {:>8.0} {:>8.0} {:>6.2} ({:.2})",
            record_bytes >> 10,
            rate(recorded),
            rate(tmpfs),
            rate(heap),
            tmpfs.as_secs_f64() / recorded.as_secs_f64(),
            heap.as_secs_f64() / recorded.as_secs_f64(),
        );
    }
}

/// Memory of the same kind as the ring's.
fn map(dir: &Path) -> MmapMut {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(dir.join("copy")).expect("a file");
    file.set_len(RUN_BYTES as u64).expect("room in tmpfs");
    // SAFETY: nobody else knows the file.
    unsafe { MmapMut::map_mut(&file) }.expect("a mapping")
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model =
        cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown processor");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{} × {cores}, Linux {}",
        model.trim_start_matches(['\t', ':', ' ']),
        read("/proc/sys/kernel/osrelease").trim()
    )
}

/// Median of the runs, after one that warms up.
fn median(mut run: impl FnMut() -> Duration) -> Duration {
    run();
    let mut times: Vec<Duration> = (0..RUNS).map(|_| run()).collect();
    times.sort();
    times[RUNS / 2]
}

fn new_ring(dir: &Path) -> Region {
    let identity =
        Identity { boot_id: boot_id().expect("a boot id"), group_id: [1; 16], epoch: 1, epoch_id: [2; 16] };
    let volumes = [VolumeSpec { id: 1, sector_bytes: 512, uuid: [3; 16], size_bytes: SIZE_BYTES }];
    let spec =
        RegionSpec { identity, volumes: &volumes, ring_bytes: RING_BYTES, first_lsn: 1, last_time_ns: 0 };
    Region::create(dir, &spec).expect("a ring")
}

/// What a client's request buffer holds: a few of them, reused.
fn source(record_bytes: usize) -> Vec<Vec<u8>> {
    (0..4u8).map(|seed| vec![seed + 1; record_bytes]).collect()
}

fn copy_run(target: &mut [u8], record_bytes: usize, producers: usize) -> Duration {
    let started = Instant::now();
    std::thread::scope(|scope| {
        for target in target.chunks_exact_mut(RUN_BYTES / producers) {
            let work = move || {
                let source = source(record_bytes);
                for (number, record) in target.chunks_exact_mut(record_bytes).enumerate() {
                    record.copy_from_slice(black_box(&source[number % source.len()]));
                }
                black_box(target);
            };
            scope.spawn(work);
        }
    });
    started.elapsed()
}

fn ring_run(ring: &Region, record_bytes: usize, producers: usize) -> Duration {
    let records = RUN_BYTES / record_bytes / producers;
    let started = Instant::now();
    let mut elapsed = Duration::ZERO;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..producers)
            .map(|_| {
                scope.spawn(|| {
                    let source = source(record_bytes);
                    for number in 0..records {
                        let offset = (number * record_bytes) as u64 % SIZE_BYTES;
                        let entry = Entry::write(1, offset, record_bytes as u64, 0);
                        let bytes = black_box(&source[number % source.len()]);
                        match ring.capture(entry, bytes, number as u64) {
                            Ok(Captured::Ring(token)) => ring.mark_done(token),
                            other => panic!("the ring overflowed: {other:?}"),
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("a producer");
        }
        elapsed = started.elapsed();
    });
    let mut consumer = Consumer::new(ring).expect("the only consumer");
    while consumer.advance().expect("a sound ring") {}
    consumer.release(u64::MAX).expect("a sound ring");
    assert_eq!(ring.used_bytes(), 0);
    elapsed
}
