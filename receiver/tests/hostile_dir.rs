//! A group's directory that others made: every checksum holds, and the numbers under them are anything. Its
//! history is read, restores are planned, points are looked at, and a daemon starts on it. Each may refuse;
//! none panics, takes long or grows.
//!
//! `PROPTEST_CASES` says how many directories are tried.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code; its numbers are small")]

mod storage;

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use journal::fuzz::steer::{Files, Input, steer};
use journal::io::Disk;
use journal::sim_disk::SimDisk;
use journal::verify::{VerifyOptions, verify_dir};
use journal::writer::{Writer, WriterOptions};
use journal::{Lsn, VolumeId};
use proptest::prelude::*;
use receiver::history::History;
use receiver::point::At;
use receiver::restore::{RestoreRequest, restore};
use receiver::state::{Exact, GroupState, GroupStore, Hold, Moment, journal_dir, undo_dir};
use receiver::view::View;
use storage::*;

const SIZES: [u64; 2] = [256 << 10, 64 << 10];
/// Room on the disk: far more than the group takes, far less than hostile numbers ask for.
const CAPACITY_BYTES: u64 = 64 << 20;
/// What the slowest machine needs for one directory, many times over.
const MOST: Duration = Duration::from_secs(20);

/// A group with history of two epochs, undo, events and redo that is not applied yet.
fn sample() -> &'static (Files, GroupState) {
    static MADE: OnceLock<(Files, GroupState)> = OnceLock::new();
    MADE.get_or_init(|| {
        let sim = SimDisk::new();
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        let mut random = Random(3);
        let mut source = Source::new();
        source.epoch(100_000);
        source.resync(&SIZES, &mut random, "first");
        for step in 0..40 {
            source.random_change(&SIZES, &mut random);
            if step == 20 {
                source.bookmark("before");
                source.frame();
                source.epoch(10);
                source.resync(&SIZES, &mut random, "gap");
            }
            if step % 4 == 0 {
                source.frame();
            }
        }
        source.frame();
        let mut group = Group::create(Arc::clone(&disk), Path::new(GROUP_DIR), &source);
        let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(8_000)).unwrap();
        let durable = group.receive(&source, source.frames.len() - 2, Some(&history));
        apply_all(&mut applier, &durable).unwrap();
        applier.merge(64);
        group.receive(&source, usize::MAX, Some(&history));
        let state = applier.state().clone();
        drop((applier, history, group));
        let dirs =
            [GROUP_DIR, "/r/groups/g/journal", "/r/groups/g/undo", "/r/groups/g/merged", "/r/replica/g"];
        let mut files = Files::new();
        for dir in dirs.map(Path::new) {
            for name in sim.list(dir).unwrap_or_default() {
                let path = dir.join(name);
                files.extend(sim.contents(&path).map(|content| (path, content)));
            }
        }
        assert!(files.len() > 6, "{:?}", files.keys());
        (files, state)
    })
}

/// Numbers of the state, as the input says: each of them is added to, or counted up to.
fn change_state(state: &mut GroupState, random: &mut Random) {
    let edges =
        [0, 1, u64::MAX, u64::MAX >> 1, (u64::MAX >> 1) - 1, (1 << 36) - 1, (1 << 36) - 2, 1 << 35, 1 << 20];
    for _ in 0..random.below(4) {
        let (which, edge, near) = (random.below(22), edges[random.below(9) as usize], random.below(5));
        let change = |number: &mut u64| {
            *number = if random.0 & 1 == 0 { edge } else { number.wrapping_add(near).wrapping_sub(2) }
        };
        // Positions from a disk are bounded where they are decoded.
        let lsn = |lsn: &mut Lsn| {
            change(&mut lsn.0);
            *lsn = (*lsn).min(Lsn::MAX);
        };
        let mut moment = state.heartbeat.unwrap_or_default();
        let mut consistent = state.consistent_lsn.unwrap_or_default();
        let mut first = state.first_consistent.unwrap_or_default();
        let mut exact =
            state.exact.unwrap_or(Exact { batch: state.oldest_batch, start: state.history_start });
        match which {
            0 | 1 => change(&mut state.applied_batch),
            2 | 3 => change(&mut state.oldest_batch),
            4 => lsn(&mut state.history_start.lsn),
            5 => change(&mut state.history_start.time_ns),
            6 => change(&mut state.consistent_batch),
            7 => change(&mut state.events_file),
            8 => change(&mut state.events_bytes),
            9 => lsn(&mut state.checkpoint.lsn),
            10 => change(&mut state.checkpoint_time_ns),
            11 => change(&mut state.checkpoint.epoch.number),
            12 => {
                lsn(&mut moment.lsn);
                state.heartbeat = Some(moment);
            }
            13 => {
                change(&mut moment.time_ns);
                state.heartbeat = Some(moment);
            }
            14 => {
                lsn(&mut consistent);
                state.consistent_lsn = Some(consistent);
            }
            15 => {
                lsn(&mut first);
                state.first_consistent = Some(first);
            }
            16 => {
                change(&mut exact.batch);
                state.exact = Some(exact);
            }
            17 => {
                lsn(&mut exact.start.lsn);
                change(&mut exact.start.time_ns);
                state.exact = Some(exact);
            }
            18 | 19 => state.replicas.iter_mut().for_each(|replica| change(&mut replica.size_bytes)),
            20 => {
                if let Some(replica) = state.replicas.first_mut() {
                    let mut id = u64::from(replica.id.0);
                    change(&mut id);
                    replica.id = VolumeId(id as u32);
                }
            }
            _ => {
                let at = Moment { lsn: state.checkpoint.lsn, time_ns: near };
                let mut hold = Hold { name: "before".into(), at, since_ns: 0 };
                change(&mut hold.at.time_ns);
                lsn(&mut hold.at.lsn);
                state.wishes.holds.push(hold);
            }
        }
    }
    state.checkpoint.epoch.number = state.checkpoint.epoch.number.min(Lsn::MAX.0);
}

fn put(sim: &SimDisk, files: &Files) -> Arc<dyn Disk> {
    for dir in [GROUP_DIR, "/r/groups/g/journal", "/r/groups/g/undo", "/r/replica/g", "/restored"] {
        sim.create_dir(Path::new(dir)).unwrap();
    }
    files.iter().for_each(|(path, content)| sim.put(path, content.clone()));
    sim.set_capacity(Some(CAPACITY_BYTES));
    Arc::new(sim.clone())
}

/// All that reads the directory.
fn read(disk: &Arc<dyn Disk>) {
    let dir = Path::new(GROUP_DIR);
    for part in [journal_dir(dir), undo_dir(dir)] {
        let _ = verify_dir(&**disk, &part, VerifyOptions { unpack: true }, &mut |_, _| {});
    }
    let Ok(history) = History::open(Arc::clone(disk), dir) else { return };
    let points = history.points();
    let mut ats = vec![At::Latest, At::Bookmark("before".into())];
    for number in [0, points.checkpoint_lsn.0, history.received().lsn.0, Lsn::MAX.0, u64::MAX] {
        ats.extend([At::Lsn(Lsn(number)), At::Time(number)]);
    }
    for at in ats {
        let _ = history.resolve(&at);
        let Ok((point, _pin)) = history.resolve_pinned(&at) else { continue };
        for volume in ["v0", "v1"] {
            let Ok(view) = View::open(&history, point, volume) else { continue };
            let mut buffer = vec![0; 64 << 10];
            for from in [0, 1000, view.size_bytes().saturating_sub(9), u64::MAX - 9] {
                let _ = view.read_at(&mut buffer, from);
            }
        }
        for dry_run in [true, false] {
            let to = Path::new("/restored").to_owned();
            let request = RestoreRequest { at: at.clone(), to, volume: None, force: true, dry_run };
            let _ = restore(&history, &request, &mut |_, _| {});
        }
    }
    history.read_alone();
    let _ = history.resolve(&At::Latest);
}

/// What a daemon does at its start, and the orders that work without one.
fn start(disk: &Arc<dyn Disk>) {
    let dir = Path::new(GROUP_DIR);
    let options = WriterOptions { group: GROUP, segment_bytes: 1 << 20 };
    if let Ok((writer, _)) = Writer::open(Arc::clone(disk), &journal_dir(dir), options, 1)
        && let Ok((history, mut applier)) = open(disk, dir, settings(8_000))
    {
        for _ in 0..40 {
            if !matches!(applier.next_batch(&writer.durable()), Ok(Some(_))) {
                break;
            }
        }
        applier.merge(4);
        history.note_segments(writer.segments());
        let policy = receiver::retention::Policy {
            window_ns: 1,
            min_ns: 1,
            quota_bytes: Some(1 << 16),
            steps: receiver::thin::Steps::default(),
        };
        let _ = applier.expire(&policy, writer.segments());
        let _ = history.points();
        let _ = applier.hold("before", false, 5);
        let _ = applier.rewind(&At::Bookmark("before".into()), 5);
        for _ in 0..40 {
            if !applier.is_rewinding() || applier.next_batch(&writer.durable()).is_err() {
                break;
            }
        }
        let _ = applier.resume(writer.durable().lsn);
    }
}

fn check(files: &Files) {
    let began = Instant::now();
    let sim = SimDisk::new();
    let disk = put(&sim, files);
    read(&disk);
    start(&disk);
    assert!(began.elapsed() < MOST, "took {:?}", began.elapsed());
}

#[test]
fn what_was_not_changed_is_read_and_started_on() {
    let (files, state) = sample();
    let sim = SimDisk::new();
    let disk = put(&sim, files);
    read(&disk);
    assert!(disk.open_read(Path::new("/restored/v0.img")).is_ok(), "a restore of the sample works");
    let (_, applier) = open(&disk, Path::new(GROUP_DIR), settings(8_000)).unwrap();
    assert_eq!(applier.state().checkpoint, state.checkpoint);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_time: 60_000, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn hostile_files_under_sound_checksums_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 2..120)) {
        let mut files = sample().0.clone();
        steer(&mut files, &mut Input(&bytes));
        check(&files);
    }

    #[test]
    fn hostile_numbers_in_the_groups_state_do_no_harm(seed in any::<u64>()) {
        let (files, state) = sample();
        let mut state = state.clone();
        change_state(&mut state, &mut Random(seed));
        let mut files = files.clone();
        files.remove(&Path::new(GROUP_DIR).join("group"));
        let sim = SimDisk::new();
        GroupStore::create(Arc::new(sim.clone()), Path::new(GROUP_DIR), state).unwrap();
        files.insert(Path::new(GROUP_DIR).join("group"), sim.contents(&Path::new(GROUP_DIR).join("group")).unwrap());
        check(&files);
    }
}
