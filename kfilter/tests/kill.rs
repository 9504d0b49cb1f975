//! A process that writes through the ring is killed, again and again; the next owner must find every write
//! that was answered, and a stream that says exactly what the backing store holds.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test")]

use kfilter::abi::GRANULE;
use kfilter::region::{RegionSpec, boot_id};
use kfilter::{Captured, Consumer, Entry, Identity, Mode, Op, Region, VolumeSpec};
use rand::Rng as _;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const CHILD: &str = "AFTERIMAGE_TEST_RING";
/// Set when the writers shall not care whether the ring overflows.
const RUSH: &str = "AFTERIMAGE_TEST_RUSH";
const ROUNDS: u64 = 40;
const WRITERS: u64 = 3;
/// Each writer has its own blocks, each in its own granule, and never two writes in flight.
const BLOCKS: u64 = 4 * WRITERS;
const BLOCK: usize = 4096;
const VOLUME: u32 = 1;

fn identity() -> Identity {
    Identity { boot_id: boot_id().unwrap(), group_id: [7; 16], epoch: 1, epoch_id: [8; 16] }
}

fn open(dir: &Path, name: &str) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(name)).unwrap()
}

fn block(number: u64, version: u64) -> Vec<u8> {
    [number, version].map(u64::to_le_bytes).concat().repeat(BLOCK / 16)
}

/// The version that a block holds, all of it.
fn version_of(number: u64, bytes: &[u8]) -> u64 {
    let version = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    assert!(version == 0 || bytes == block(number, version), "block {number} is torn");
    version
}

/// What the consumer appends to its journal: lsn, block, version; no block for what is void. 32 bytes, so
/// that none crosses a page, where a kill could cut it.
fn entry(record: &kfilter::RecordRef<'_>) -> [u64; 4] {
    match record.op() {
        Op::Write => {
            let number = record.offset() / GRANULE;
            [record.lsn(), number, version_of(number, record.payload()), 0]
        }
        _ => [record.lsn(), u64::MAX, 0, 0],
    }
}

/// Writes until it is killed.
fn child(dir: &Path) {
    let ring =
        Region::take_over(dir, &identity()).unwrap().finish().expect("the parent has redone everything");
    let ring = Arc::new(ring);
    let (backing, answered, mut journal) =
        (open(dir, "backing"), open(dir, "answered"), open(dir, "journal"));
    let life = u64::from(std::process::id()) << 32 | ring.captured_lsn() << 8;
    let rush = std::env::var_os(RUSH).is_some();
    println!("serving");
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (ring, backing, answered) = (&ring, &backing, &answered);
            scope.spawn(move || {
                for count in 1.. {
                    let number = writer + count % 4 * WRITERS;
                    let (offset, version) = (number * GRANULE, life + count);
                    let bytes = block(number, version);
                    while !rush && ring.fill_ratio() > 0.7 {
                        std::thread::yield_now();
                    }
                    let captured =
                        ring.capture(Entry::write(VOLUME, offset, BLOCK as u64, 0), &bytes, count).unwrap();
                    backing.write_all_at(&bytes, offset).unwrap();
                    if let Captured::Ring(token) = captured {
                        ring.mark_done(token);
                    }
                    answered.write_all_at(&version.to_le_bytes(), number * 8).unwrap();
                }
            });
        }
        scope.spawn(|| {
            use std::io::Seek as _;
            journal.seek(std::io::SeekFrom::End(0)).unwrap();
            let mut consumer = Consumer::new(ring.clone()).unwrap();
            let mut last = 0;
            loop {
                // Short: what was taken may be done, and so released, without a further publish.
                consumer.wait(Duration::from_millis(1));
                while let Some(record) = consumer.peek().unwrap() {
                    last = record.lsn();
                    journal.write_all(entry(&record).map(u64::to_le_bytes).as_flattened()).unwrap();
                    consumer.advance().unwrap();
                }
                consumer.release(last).unwrap();
            }
        });
    });
}

/// Runs a child for a random while.
fn run_and_kill(dir: &Path, rush: bool) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "nothing_answered_is_lost_by_kill", "--nocapture"])
        .env(CHILD, dir)
        .envs(rush.then_some((RUSH, "1")))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    while !said.ends_with(b"serving\n") {
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).expect("the child serves");
        said.push(byte[0]);
    }
    std::thread::sleep(Duration::from_micros(rand::rng().random_range(500..20_000)));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn nothing_answered_is_lost_by_kill() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return child(Path::new(&dir));
    }
    let dir = tempfile::tempdir_in("/dev/shm").expect("this test needs a tmpfs at /dev/shm");
    let dir = dir.path();
    let volumes = [VolumeSpec { id: VOLUME, sector_bytes: 512, uuid: [9; 16], size_bytes: BLOCKS * GRANULE }];
    let spec = RegionSpec {
        identity: identity(),
        volumes: &volumes,
        ring_bytes: 1 << 19,
        first_lsn: 1,
        last_time_ns: 0,
    };
    drop(Region::create(dir, &spec).unwrap());
    let (backing, answered, mut journal) =
        (open(dir, "backing"), open(dir, "answered"), open(dir, "journal"));
    backing.set_len(BLOCKS * GRANULE).unwrap();
    answered.set_len(BLOCKS * 8).unwrap();

    let (mut replica, mut next_lsn, mut redone, mut overflows) = (BTreeMap::new(), 1, 0, 0);
    for round in 0..ROUNDS {
        run_and_kill(dir, round % 4 == 3);
        let taken = Region::take_over(dir, &identity()).unwrap();
        for record in taken.undone() {
            redone += 1;
            backing.write_all_at(record.payload(), record.offset()).unwrap();
            taken.mark_done(&record);
        }
        let ring = taken.finish().expect("everything is redone");

        // The stream: what the dead consumer has appended, then what is still in the ring; some of it twice.
        let mut stream = Vec::new();
        journal.read_to_end(&mut stream).unwrap();
        let words = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let mut stream: Vec<[u64; 4]> = stream
            .chunks_exact(32)
            .map(|entry| [words(&entry[..8]), words(&entry[8..16]), words(&entry[16..24]), 0])
            .collect();
        let mut consumer = Consumer::new(&ring).unwrap();
        while let Some(record) = consumer.peek().unwrap() {
            stream.push(entry(&record));
            consumer.advance().unwrap();
        }
        assert_eq!(consumer.release(u64::MAX), Ok(ring.captured_lsn() + 1));
        for [lsn, number, version, _] in stream {
            assert!(lsn <= next_lsn, "lsn {next_lsn} is missing, found {lsn}");
            if lsn == next_lsn {
                next_lsn += 1;
                replica.insert(number, version);
            }
        }
        assert_eq!(next_lsn, ring.captured_lsn() + 1);

        let dirty: Vec<u64> =
            ring.dirty_extents(VOLUME).flat_map(|range| range.start / GRANULE..range.end / GRANULE).collect();
        assert!(dirty.is_empty() || ring.mode() == Mode::Bitmap);
        overflows += u32::from(ring.mode() == Mode::Bitmap);
        for number in 0..BLOCKS {
            let (mut bytes, mut word) = (vec![0; BLOCK], [0; 8]);
            backing.read_exact_at(&mut bytes, number * GRANULE).unwrap();
            answered.read_exact_at(&mut word, number * 8).unwrap();
            let version = version_of(number, &bytes);
            assert!(version >= u64::from_le_bytes(word), "block {number}: an answered write is lost");
            if dirty.contains(&number) {
                replica.insert(number, version);
            }
            assert_eq!(replica.get(&number).copied().unwrap_or(0), version, "block {number} has diverged");
        }
        if ring.mode() == Mode::Bitmap {
            ring.begin_resync(1).unwrap();
            ring.clear_dirty(VOLUME, 0..u64::MAX);
            ring.end_resync(2).unwrap();
            while consumer.advance().unwrap() {
                next_lsn += 1;
            }
            consumer.release(u64::MAX).unwrap();
        }
    }
    println!("{ROUNDS} kills: {} records, {redone} redone, {overflows} overflows", next_lsn - 1);
    assert!(redone > 0, "no kill has met a write in flight");
    assert!(overflows > 0, "the ring has never overflowed");
}
