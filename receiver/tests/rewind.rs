//! Rewind and resume against the model: random points, random batches, random restarts; the middle of a
//! resync; volumes that grow and come; what is refused, taken back, noticed; what retention may drop.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code; its numbers are small")]

mod storage;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::io::{Disk, RealDisk};
use journal::record::Op;
use journal::sim_disk::SimDisk;
use journal::{Lsn, Position};
use receiver::ErrorKind;
use receiver::apply::{Applier, RewindReport};
use receiver::bare::Bare;
use receiver::history::History;
use receiver::point::At;
use receiver::retention::Policy;
use receiver::thin::Steps;
use storage::*;

const SIZES: [u64; 2] = [128 << 10, 64 << 10];

fn sim() -> (SimDisk, Arc<dyn Disk>) {
    let sim = SimDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    (sim, disk)
}

/// Orders a rewind and carries it out.
fn rewind(applier: &mut Applier, at: &At, durable: &Position) -> receiver::Result<RewindReport> {
    let report = applier.rewind(at, 1)?;
    while applier.is_rewinding() {
        applier.next_batch(durable)?;
    }
    assert!(applier.next_batch(durable)?.is_none(), "nothing is applied while rewound");
    assert_eq!(applier.state().checkpoint.lsn, report.lsn);
    Ok(report)
}

/// The replicas are exactly the model at `lsn`: content and sizes.
#[track_caller]
fn assert_replicas(sim: &SimDisk, source: &Source, lsn: Lsn) {
    for id in 0..3 {
        let path = PathBuf::from(format!("/r/replica/g/v{id}.img"));
        let expected = source.model(lsn).remove(&format!("v{id}")).unwrap_or_default();
        let found = sim.contents(&path).unwrap_or_default();
        assert_same(&found, &expected, &format!("replica v{id} at lsn {lsn}"));
    }
}

fn live(seed: u64, changes: usize) -> Source {
    let mut random = Random(seed);
    let mut source = Source::new();
    source.epoch(random.below(1 << 33));
    source.resync(&SIZES, &mut random, "first");
    more(&mut source, &mut random, changes);
    source
}

fn more(source: &mut Source, random: &mut Random, changes: usize) {
    for at in 0..changes {
        source.random_change(&SIZES, random);
        if random.below(4) == 0 {
            source.frame();
        }
        if at % 20 == 10 {
            source.bookmark(&format!("b{at}"));
        }
    }
    source.frame();
}

/// Points that are received and within the history.
fn reachable(history: &History, source: &Source) -> Vec<Lsn> {
    let (start, received) = (history.state().history_start.lsn, history.received().lsn);
    source.points.iter().copied().filter(|lsn| *lsn >= start && *lsn <= received).collect()
}

/// Whatever the points, batches, restarts, epochs and expiries: after a rewind the replica is the point,
/// every point of the window is still exact, and after the resume everything is as if nothing had been.
#[test]
fn any_point_is_rewound_to_and_left_again() {
    for seed in 1..=24 {
        let mut random = Random(seed);
        let mut source = live(random.next(), 60);
        for _ in 0..random.below(2) {
            source.epoch(1 + random.below(1 << 20));
            source.resync(&SIZES, &mut random, "again");
            more(&mut source, &mut random, 30);
        }
        let (sim, disk) = sim();
        let dir = Path::new(GROUP_DIR);
        let mut group = Group::create(Arc::clone(&disk), dir, &source);
        let (mut history, mut applier) = open(&disk, dir, settings(8_000)).unwrap();
        let mut durable = group.receive(&source, source.frames.len() / 2, Some(&history));
        apply_all(&mut applier, &durable).unwrap();
        for step in 0..14 {
            let context = format!("seed {seed}, step {step}");
            durable = match random.below(3) {
                0 => group.receive(&source, 4, Some(&history)),
                _ => durable,
            };
            if random.below(3) == 0 {
                drop(applier);
                (history, applier) = open(&disk, dir, settings(2_000 + random.below(40_000))).unwrap();
            }
            match random.below(4) {
                0 if applier.state().wishes.rewound.is_some() => {
                    applier.resume(Lsn::ZERO).expect(&context);
                    if random.below(2) == 0 {
                        apply_all(&mut applier, &durable).expect(&context);
                    } else {
                        applier.next_batch(&durable).expect(&context);
                    }
                }
                1 => {
                    let window_ns = random.below(20_000_000_000);
                    let policy =
                        Policy { window_ns, min_ns: 0, steps: Steps::NONE, quota_bytes: Some(u64::MAX) };
                    let expired = applier.expire(&policy, group.writer.segments()).expect(&context);
                    if let Some(number) = expired.drop_journal_before {
                        group.writer.drop_before(number).unwrap();
                    }
                }
                _ => {
                    let points = reachable(&history, &source);
                    let lsn = points[random.below(points.len() as u64) as usize];
                    let report = rewind(&mut applier, &At::Lsn(lsn), &durable).expect(&context);
                    assert_eq!(report.lsn, lsn);
                    assert_replicas(&sim, &source, lsn);
                }
            }
            let points = reachable(&history, &source);
            for _ in 0..3 {
                assert_exact(&history, &source, points[random.below(points.len() as u64) as usize]);
            }
            assert_exact(&history, &source, points[0]);
            assert_exact(&history, &source, *points.last().unwrap());
        }
        if applier.state().wishes.rewound.is_some() {
            applier.resume(Lsn::ZERO).unwrap();
        }
        let durable = group.receive(&source, usize::MAX, Some(&history));
        apply_all(&mut applier, &durable).unwrap();
        assert_replicas(&sim, &source, source.last());
        assert_eq!(applier.state().wishes.reached, None);
        // Events were told once, however often they were applied.
        let points = history.points();
        let reopened = History::open(Arc::clone(&disk), dir).unwrap().points();
        assert_eq!((&points.bookmarks, &points.gaps), (&reopened.bookmarks, &reopened.gaps), "seed {seed}");
        let marks = |lsn: Lsn| lsn >= points.oldest.as_ref().unwrap().lsn;
        let sent = source.records.iter().filter(|(record, _)| record.op == Op::Bookmark && marks(record.lsn));
        assert_eq!(points.bookmarks.len(), sent.count(), "seed {seed}");
    }
}

#[test]
fn a_rewind_can_be_undone() {
    let source = live(5, 120);
    let (sim, disk) = sim();
    let mut group = Group::create(Arc::clone(&disk), Path::new(GROUP_DIR), &source);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(8_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let oldest = history.state().history_start.lsn;
    let report = rewind(&mut applier, &At::Lsn(oldest), &durable).unwrap();
    assert_eq!((report.from_lsn, report.received_lsn), (source.last(), source.last()));
    let again = rewind(&mut applier, &At::Latest, &durable).unwrap();
    assert_eq!((again.from_lsn, again.lsn), (oldest, source.last()));
    assert_replicas(&sim, &source, source.last());
    assert_exact(&history, &source, oldest);
    // Rewound, though at the newest: what comes now waits.
    assert!(applier.state().wishes.rewound.is_some());
    assert_eq!(applier.rewind(&At::Lsn(Lsn(1)), 1).unwrap_err().kind, ErrorKind::NotPossible);
    applier.resume(Lsn::ZERO).unwrap();
    assert_eq!(applier.resume(Lsn::ZERO).unwrap_err().kind, ErrorKind::NotPossible);
}

/// What the brief of the issue asks: the source is killed for good in the middle of a resync, at 20 random
/// places; the replica is brought to the last consistent point, whose content was noted there.
#[test]
fn in_the_middle_of_a_resync_the_last_consistent_point_is_one_rewind_away() {
    for seed in 1..=20 {
        let mut random = Random(seed * 77);
        let mut source = live(random.next(), 40);
        let last = source.last();
        // In the same epoch or in a new one; begun over and over; slots that the mask emptied; voids.
        if random.below(2) == 0 {
            source.epoch(1 + random.below(1 << 20));
            for (id, size) in SIZES.iter().enumerate() {
                source.volume(id as u32, *size);
            }
        }
        source.push(Op::ResyncBegin, 0, 0, 0, b"agent was killed".to_vec());
        source.frame();
        for _ in 0..40 {
            match random.below(8) {
                0 => source.push(Op::ResyncBegin, 0, 0, 0, b"overflow again".to_vec()),
                1 => source.push(Op::SyncSlot, 0, 4096, 0, Vec::new()),
                2 => source.push(Op::Void, 0, 0, 0, Vec::new()),
                3 | 4 => source.random_change(&SIZES, &mut random),
                _ => {
                    let offset = random.below(SIZES[0] / 4096) * 4096;
                    source.push(Op::SyncSlot, 0, offset, 4096, vec![random.next() as u8; 4096])
                }
            };
            source.frame();
        }
        let (sim, disk) = sim();
        let dir = Path::new(GROUP_DIR);
        let mut group = Group::create(Arc::clone(&disk), dir, &source);
        let (history, mut applier) = open(&disk, dir, settings(4_000)).unwrap();
        let begun = source.frames.iter().filter(|(_, header)| header.last_lsn <= last).count() + 1;
        let killed_at = begun + random.below((source.frames.len() - begun) as u64 + 1) as usize;
        let mut durable = group.receive(&source, killed_at, Some(&history));
        // Apply may lag, and retention does what it can meanwhile.
        for _ in 0..random.below(60) {
            if applier.next_batch(&durable).unwrap().is_none() {
                break;
            }
        }
        let consistent = |history: &History| history.points().newest.map(|point| point.lsn);
        if history.state().first_consistent.is_some() {
            assert_eq!(consistent(&history), Some(last), "seed {seed}");
            let nothing = Policy { window_ns: 0, min_ns: 0, steps: Steps::NONE, quota_bytes: Some(0) };
            applier.expire(&nothing, group.writer.segments()).unwrap();
        }
        drop((history, applier));
        let (history, mut applier) = open(&disk, dir, settings(4_000)).unwrap();
        while history.state().first_consistent.is_none() {
            applier.next_batch(&durable).unwrap();
        }
        rewind(&mut applier, &At::Latest, &durable).unwrap();
        assert_replicas(&sim, &source, last);
        assert_eq!(consistent(&history), Some(last), "seed {seed}");
        assert!(history.state().is_consistent());
        assert_eq!(history.points().gaps.last().unwrap().to_lsn, None);

        // The source comes back after all: received while rewound, applied after the resume.
        source.push(Op::ResyncEnd, 0, 0, 0, Vec::new());
        source.frame();
        durable = group.receive(&source, usize::MAX, Some(&history));
        assert!(applier.next_batch(&durable).unwrap().is_none());
        assert_replicas(&sim, &source, last);
        applier.resume(Lsn::ZERO).unwrap();
        apply_all(&mut applier, &durable).unwrap();
        assert_replicas(&sim, &source, source.last());
        assert_exact(&history, &source, last);
    }
}

#[test]
fn volumes_have_the_size_that_they_had_and_new_ones_are_empty() {
    let mut random = Random(9);
    let mut source = Source::new();
    source.epoch(0);
    source.resync(&SIZES, &mut random, "first");
    more(&mut source, &mut random, 20);
    let small = source.last();
    source.epoch(7);
    let grown = [SIZES[0] + (32 << 10), SIZES[1], 32 << 10];
    source.resync(&grown, &mut random, "grown");
    let end = source.last();
    for _ in 0..40 {
        source.random_change(&grown, &mut random);
        source.write(0, SIZES[0] + 4096, vec![random.next() as u8; 8192]);
        source.frame();
    }
    let (sim, disk) = sim();
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(9_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    rewind(&mut applier, &At::Lsn(small), &durable).unwrap();
    assert_replicas(&sim, &source, small);
    for lsn in [small, end, source.last()] {
        assert_exact(&history, &source, lsn);
    }
    drop((history, applier));
    let (history, mut applier) = open(&disk, dir, settings(5_000)).unwrap();
    assert_replicas(&sim, &source, small);
    applier.resume(Lsn::ZERO).unwrap();
    while applier.state().checkpoint.lsn < source.last() {
        applier.next_batch(&durable).unwrap();
        let lsn = applier.state().checkpoint.lsn;
        assert_replicas(&sim, &source, lsn);
    }
    for lsn in [small, end, source.last()] {
        assert_exact(&history, &source, lsn);
    }
}

#[test]
fn a_rewind_without_room_for_its_undo_is_taken_back() {
    let source = live(6, 120);
    let (sim, disk) = sim();
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(8_000)).unwrap();
    let all_but_two = source.frames.len() - 2;
    let durable = group.receive(&source, all_but_two, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let before = applier.state().clone();
    sim.set_capacity(Some(1));
    let oldest = At::Lsn(history.state().history_start.lsn);
    let error = rewind(&mut applier, &oldest, &durable).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSpace, "{error}");
    assert!(error.to_string().contains("taken back"), "{error}");
    sim.set_capacity(None);
    assert_eq!(applier.state().wishes, before.wishes);
    assert_replicas(&sim, &source, before.checkpoint.lsn);
    // Neither this applier nor the next one is held up by it.
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    assert_eq!(applier.state().checkpoint.lsn, source.last());
    rewind(&mut applier, &oldest, &durable).unwrap();
}

#[test]
fn undo_that_is_damaged_refuses_a_rewind_and_stops_nothing() {
    let mut source = live(7, 120);
    let (sim, disk) = sim();
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(8_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let undo = dir.join("undo").join(&disk.list(&dir.join("undo")).unwrap()[3]);
    sim.corrupt(&undo, 512 + 192 + 40, |byte| byte ^ 1);
    let oldest = At::Lsn(history.state().history_start.lsn);
    let error = rewind(&mut applier, &oldest, &durable).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(undo.to_str().unwrap()), "{error}");
    assert!(applier.failure().is_none());
    more(&mut source, &mut Random(3), 10);
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    assert_replicas(&sim, &source, source.last());
}

#[test]
fn a_replica_that_others_wrote_to_while_it_was_rewound_is_noticed() {
    let source = live(9, 60);
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let dir = temporary.path().join("groups/g");
    let mut group = Group::create(Arc::clone(&disk), &dir, &source);
    let mut real = settings(10_000);
    real.replica_dir = temporary.path().join("replica/g");
    real.hold_replicas = true;
    let (history, mut applier) = open(&disk, &dir, real.clone()).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let oldest = history.state().history_start.lsn;
    rewind(&mut applier, &At::Lsn(oldest), &durable).unwrap();
    let image = temporary.path().join("replica/g/v0.img");
    assert_same(&std::fs::read(&image).unwrap(), &source.model(oldest)["v0"], "rewound");
    // Not even a kill takes it for changed.
    drop((history, applier));
    let (history, mut applier) = open(&disk, &dir, real.clone()).unwrap();
    assert_eq!(applier.state().seen.changed, None);
    rewind(&mut applier, &At::Latest, &durable).unwrap();
    rewind(&mut applier, &At::Lsn(oldest), &durable).unwrap();
    let write = |byte: u8| {
        use std::os::unix::fs::FileExt;
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[byte], 5000).unwrap();
    };
    write(1);
    let error = applier.rewind(&At::Latest, 1).unwrap_err();
    assert!(error.to_string().contains("changed by others"), "{error}");
    applier.resume(Lsn::ZERO).unwrap();
    assert!(applier.state().seen.changed.as_ref().unwrap().why.contains("v0.img"));
    assert!(applier.next_batch(&durable).is_err(), "nothing is applied before it is ordered");
    assert!(history.resolve(&At::Latest).is_err());
}

/// What is under hold stays, whatever the window, down to its redo; everything older goes, and all of it
/// after the release.
#[test]
fn retention_keeps_what_is_under_hold() {
    let mut source = live(12, 60);
    let held_at = source.bookmark("held");
    more(&mut source, &mut Random(4), 90);
    let (_, disk) = sim();
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(6_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let refused = applier.hold("unheard of", false, 1).unwrap_err();
    assert!(
        refused.kind == ErrorKind::NotPossible && refused.to_string().contains("unheard of"),
        "{refused}"
    );
    let report = applier.hold("held", false, 1).unwrap();
    assert_eq!((report.at.lsn, report.held), (held_at, true));

    let oldest = history.state().history_start.lsn;
    let nothing = Policy { window_ns: 0, min_ns: 0, steps: Steps::NONE, quota_bytes: Some(0) };
    let mut expire = |applier: &mut Applier| {
        let expired = applier.expire(&nothing, group.writer.segments()).unwrap();
        if let Some(number) = expired.drop_journal_before {
            group.writer.drop_before(number).unwrap();
        }
        expired
    };
    let expired = expire(&mut applier);
    assert!(expired.removed > 0 && expired.verdict.over_quota_bytes > 0, "{expired:?}");
    let start = history.state().history_start.lsn;
    assert!(oldest < start && start <= held_at, "{oldest} {start} {held_at}");
    // A restart knows it too, and a rewind to it changes nothing about it.
    drop((history, applier));
    let (history, mut applier) = open(&disk, dir, settings(6_000)).unwrap();
    rewind(&mut applier, &At::Bookmark("held".into()), &durable).unwrap();
    expire(&mut applier);
    applier.resume(Lsn::ZERO).unwrap();
    apply_all(&mut applier, &durable).unwrap();
    expire(&mut applier);
    assert!(history.state().history_start.lsn <= held_at);
    assert_exact(&history, &source, held_at);
    let points = history.points();
    assert!(points.bookmarks.iter().any(|bookmark| bookmark.name == "held" && bookmark.held));
    applier.hold("held", true, 1).unwrap();
    // The rewind and what was applied again are as young as the newest receipt.
    history.note_waiting(history.newest_receipt_ns() + 1);
    expire(&mut applier);
    assert_eq!(history.state().history_start.lsn, source.last());
    assert!(history.resolve(&At::Bookmark("held".into())).is_err());
}

/// The same on the real disk, by what the command line uses where no daemon runs.
#[test]
fn a_bare_directory_is_rewound_and_resumed_under_its_lock() {
    let source = live(13, 60);
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let dir = temporary.path().join("groups/g");
    let mut group = Group::create(Arc::clone(&disk), &dir, &source);
    let mut real = settings(10_000);
    real.replica_dir = temporary.path().join("replica/g");
    real.hold_replicas = true;
    let (history, mut applier) = open(&disk, &dir, real).unwrap();
    let durable = group.receive(&source, source.frames.len() - 5, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    group.receive(&source, usize::MAX, Some(&history));
    let oldest = history.state().history_start.lsn;
    applier.close().unwrap();
    drop((history, group));

    let assert_image = |lsn: Lsn| {
        let image = std::fs::read(temporary.path().join("replica/g/v0.img")).unwrap();
        assert_same(&image, &source.model(lsn)["v0"], &format!("lsn {lsn}"));
    };
    let mut bare = Bare::open(&disk, &dir, 1).unwrap();
    assert_eq!(Bare::open(&disk, &dir, 1).err().unwrap().kind, ErrorKind::Busy);
    assert_eq!(bare.rewind(&At::Lsn(oldest), 1).unwrap().lsn, oldest);
    bare.close().unwrap();
    assert_image(oldest);
    let mut bare = Bare::open(&disk, &dir, 1).unwrap();
    let report = bare.resume().unwrap();
    assert_eq!((report.from_lsn, report.received_lsn), (oldest, source.last()));
    bare.close().unwrap();
    assert_image(source.last());
    let mut bare = Bare::open(&disk, &dir, 1).unwrap();
    assert_eq!(bare.resume().unwrap_err().kind, ErrorKind::NotPossible);
}

/// Boundaries that a rewind took back lie above its own. However the history is shortened, step by step, its
/// oldest point never goes back, and whatever is promised from it on is there, redo included.
#[test]
fn shortened_step_by_step_the_history_never_goes_back() {
    let mut source = live(14, 120);
    let (_, disk) = sim();
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create_small(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(6_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let middle = source.points[source.points.len() / 3];
    rewind(&mut applier, &At::Lsn(middle), &durable).unwrap();
    applier.resume(Lsn::ZERO).unwrap();
    apply_all(&mut applier, &durable).unwrap();
    more(&mut source, &mut Random(15), 120);
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let (mut start, mut steps) = (history.state().history_start.lsn, 0);
    // By the quota, which takes one batch after the other: by age all that was applied again goes at once.
    for quota in (0..1200).rev() {
        let policy = Policy {
            window_ns: u64::MAX,
            min_ns: 0,
            steps: Steps::NONE,
            quota_bytes: Some(quota * (16 << 10)),
        };
        let expired = applier.expire(&policy, group.writer.segments()).unwrap();
        if let Some(number) = expired.drop_journal_before {
            group.writer.drop_before(number).unwrap();
        }
        let now = history.state().history_start.lsn;
        assert!(now >= start, "the oldest point went back from {start} to {now}");
        if now == start {
            continue;
        }
        if steps == 0 {
            assert!(now < middle, "it begins before the rewind's point");
        }
        (start, steps) = (now, steps + 1);
        for lsn in reachable(&history, &source).into_iter().step_by(11) {
            assert_exact(&history, &source, lsn);
        }
        assert_exact(&history, &source, start);
    }
    assert!(steps > 5 && start > middle, "{steps} steps, up to {start}");
}
