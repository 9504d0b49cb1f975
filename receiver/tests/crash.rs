//! The crash matrix of apply: power is lost at EVERY operation of a script, the disk keeps any part of what
//! was not synced; recovery and the rest of the script follow. Then the replica equals the model, and every
//! batch boundary and lsns between still restore exactly (what `models/undo.py` is about). Also on the bare
//! directory, before anybody repaired anything.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code; its numbers are small")]

mod storage;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use journal::Lsn;
use journal::io::Disk;
use journal::sim_disk::SimDisk;
use receiver::history::History;
use storage::*;

const SIZES: [u64; 2] = [64 << 10, 32 << 10];

/// An initial sync, live writes, a second epoch with growth and resync, live writes.
fn script(seed: u64) -> Source {
    let mut random = Random(seed);
    let mut source = Source::new();
    source.epoch(0);
    source.resync(&SIZES, &mut random, "first");
    source.frame();
    for _ in 0..3 {
        for _ in 0..8 {
            source.random_change(&SIZES, &mut random);
        }
        source.frame();
    }
    source.bookmark("before");
    source.epoch(1000);
    let grown = [SIZES[0] + (16 << 10), SIZES[1]];
    source.resync(&grown, &mut random, "agent was away");
    source.frame();
    for _ in 0..2 {
        for _ in 0..8 {
            source.random_change(&grown, &mut random);
        }
        source.frame();
    }
    source
}

fn prepared(source: &Source) -> (SimDisk, journal::Position) {
    let sim = SimDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let mut group = Group::create(disk, Path::new(GROUP_DIR), source);
    let durable = group.receive(source, usize::MAX, None);
    (sim.crash(0), durable)
}

type Models = BTreeMap<Lsn, BTreeMap<String, Vec<u8>>>;

fn models(source: &Source) -> Models {
    source.points.iter().map(|lsn| (*lsn, source.model(*lsn))).collect()
}

/// Every batch boundary that is a point, and one in `every` of the other points, is exact.
fn check_all(disk: &Arc<dyn Disk>, models: &Models, history: &Arc<History>, every: usize) {
    let undo = Path::new(GROUP_DIR).join("undo");
    let numbers = disk.list(&undo).unwrap().into_iter().filter_map(|name| receiver::undo::file_number(&name));
    let boundaries: Vec<Lsn> = numbers
        .map(|number| receiver::undo::read_summary(&**disk, &undo, number, GROUP).unwrap().last.lsn)
        .collect();
    let start = history.state().history_start.lsn;
    let mut checked = 0;
    for (at, (lsn, model)) in models.range(start..).enumerate() {
        if at % every == 0 || boundaries.contains(lsn) {
            assert_equals(history, model, *lsn);
            checked += 1;
        }
    }
    assert!(checked > 0);
}

#[test]
fn every_boundary_survives_a_cut_at_every_operation() {
    for seed in 1..=2_u64 {
        let source = script(seed);
        let (base, durable) = prepared(&source);
        let whole = source.model(source.last());
        let models = models(&source);
        let operations = {
            let sim = base.crash(0);
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            let before = sim.ops();
            let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(20_000)).unwrap();
            let done = apply_all(&mut applier, &durable).unwrap();
            assert!(done.len() > 8, "the script must make many batches: {done:?}");
            check_all(&disk, &models, &history, 1);
            sim.ops() - before
        };
        assert!(operations > 60, "{operations} operations");
        for cut in 0..operations {
            let sim = base.crash(0);
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            sim.cut_at(sim.ops() + cut);
            let crashed = open(&disk, Path::new(GROUP_DIR), settings(20_000))
                .and_then(|(_history, mut applier)| apply_all(&mut applier, &durable));
            drop(crashed);
            let sim = sim.crash(seed.wrapping_mul(1000) + cut);
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            let context = format!("seed {seed}, cut at operation {cut}");

            // Bare: nobody repairs, everything that was a point still is.
            let bare = History::open(Arc::clone(&disk), Path::new(GROUP_DIR)).expect(&context);
            if bare.state().oldest_batch != 0 {
                check_all(&disk, &models, &bare, 16);
            }

            // Recovery with other batch sizes than before: only the named batch is redone exactly.
            let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(9_000)).expect(&context);
            apply_all(&mut applier, &durable).expect(&context);
            assert_eq!(applier.state().checkpoint.lsn, source.last(), "{context}");
            for (name, expected) in &whole {
                let found = sim.contents(Path::new(&format!("/r/replica/g/{name}.img"))).expect(&context);
                assert_same(&found, expected, &format!("{context}: replica {name}"));
            }
            check_all(&disk, &models, &history, 9);
        }
    }
}

#[test]
fn a_crash_while_recovering_from_a_crash_loses_nothing() {
    let source = script(11);
    let (base, durable) = prepared(&source);
    let models = models(&source);
    let mut random = Random(99);
    for round in 0..100 {
        let mut sim = base.crash(0);
        for _ in 0..6 {
            sim.cut_at(sim.ops() + random.below(45));
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            let batch_bytes = 4_000 + random.below(40_000);
            let _ = open(&disk, Path::new(GROUP_DIR), settings(batch_bytes)).and_then(
                |(_history, mut applier)| {
                    // Merged indexes are made at any time, and cut like everything else.
                    apply_all(&mut applier, &durable).map(|_| applier.merge(9))
                },
            );
            sim = sim.crash(random.next());
        }
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(15_000)).unwrap();
        apply_all(&mut applier, &durable).unwrap();
        check_all(&disk, &models, &history, 9);
        for (name, expected) in source.model(source.last()) {
            let found = sim.contents(Path::new(&format!("/r/replica/g/{name}.img"))).unwrap();
            assert_same(&found, &expected, &format!("round {round}: replica {name}"));
        }
    }
}

/// A killed process leaves the page cache as it was, and the next one finds there what may never have become
/// durable: it must not build on that before it is. The process is killed at every operation, and the power
/// goes while the next one works.
#[test]
fn what_a_killed_process_left_is_durable_before_it_is_built_on() {
    let source = script(3);
    let (base, durable) = prepared(&source);
    let models = models(&source);
    let work = |sim: &SimDisk, batch_bytes: u64| {
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        open(&disk, Path::new(GROUP_DIR), settings(batch_bytes)).and_then(|(_history, mut applier)| {
            let done = apply_all(&mut applier, &durable)?;
            applier.merge(4);
            Ok(done)
        })
    };
    let operations = {
        let sim = base.crash(0);
        let before = sim.ops();
        work(&sim, 20_000).unwrap();
        sim.ops() - before
    };
    assert!(operations > 60, "{operations} operations");
    for killed in 0..operations {
        for later in [3, 8, 15] {
            let sim = base.crash(0);
            sim.cut_at(sim.ops() + killed);
            drop(work(&sim, 20_000));
            sim.cut_at(sim.ops() + later);
            drop(work(&sim, 20_000));
            let sim = sim.crash(killed * 100 + later);
            let context = format!("killed at operation {killed}, the power lost {later} later");
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            let bare = History::open(Arc::clone(&disk), Path::new(GROUP_DIR)).expect(&context);
            if bare.state().oldest_batch != 0 {
                check_all(&disk, &models, &bare, 16);
            }
            let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(9_000)).expect(&context);
            apply_all(&mut applier, &durable).expect(&context);
            check_all(&disk, &models, &history, 9);
            for (name, expected) in source.model(source.last()) {
                let found = sim.contents(Path::new(&format!("/r/replica/g/{name}.img"))).expect(&context);
                assert_same(&found, &expected, &format!("{context}: replica {name}"));
            }
        }
    }
}

#[test]
fn a_full_disk_stops_apply_and_nothing_else() {
    let source = script(5);
    let (base, durable) = prepared(&source);
    let sim = base.crash(0);
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(9_000)).unwrap();
    // The replicas exist and are consistent; from here on there is room for hardly anything.
    while history.state().first_consistent.is_none() {
        applier.next_batch(&durable).unwrap();
    }
    let used = |sim: &SimDisk| -> u64 {
        let undo: u64 = disk
            .list(&Path::new(GROUP_DIR).join("undo"))
            .unwrap()
            .iter()
            .map(|name| sim.contents(&Path::new(GROUP_DIR).join("undo").join(name)).unwrap().len() as u64)
            .sum();
        undo
    };
    sim.set_capacity(Some(1));
    let stuck = applier.next_batch(&durable).unwrap_err();
    assert_eq!(stuck.kind, receiver::ErrorKind::NoSpace, "{stuck}");
    assert_eq!(used(&sim), 0, "nothing half-written stays");
    let points = history.state().consistent_lsn.unwrap();
    assert_exact(&history, &source, points);
    sim.set_capacity(None);
    apply_all(&mut applier, &durable).unwrap();
    check_all(&disk, &models(&source), &history, 3);
}

#[test]
fn a_failed_sync_is_final() {
    let source = script(6);
    let (base, durable) = prepared(&source);
    let sim = base.crash(0);
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(9_000)).unwrap();
    while history.state().first_consistent.is_none() {
        applier.next_batch(&durable).unwrap();
    }
    let checkpoint = applier.state().checkpoint;
    sim.fail_syncs(true);
    assert_eq!(applier.next_batch(&durable).unwrap_err().kind, receiver::ErrorKind::Sync);
    sim.fail_syncs(false);
    assert_eq!(applier.next_batch(&durable).unwrap_err().kind, receiver::ErrorKind::Sync, "for ever");
    assert_eq!(applier.state().checkpoint, checkpoint, "no false checkpoint");
}

/// The same for a rewind and the resume after it, from a group that has applied everything: whatever is lost
/// and wherever, each point is still there, and exactly the rewind that was ordered is done.
#[test]
fn a_rewind_and_its_resume_survive_a_cut_at_every_operation() {
    for (seed, middle) in [(1_u64, false), (2, true)] {
        let source = script(seed);
        let (base, durable) = prepared(&source);
        {
            let disk: Arc<dyn Disk> = Arc::new(base.clone());
            let (_, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(20_000)).unwrap();
            apply_all(&mut applier, &durable).unwrap();
        }
        let base = base.crash(0);
        let models = models(&source);
        // Far back, below the second epoch; or a little, into the middle of a batch.
        let to = match middle {
            false => source.points[12],
            true => source.points[source.points.len() - 11],
        };
        let replicas = |sim: &SimDisk, lsn: Lsn, context: &str| {
            for (name, expected) in source.model(lsn) {
                let found = sim.contents(Path::new(&format!("/r/replica/g/{name}.img"))).expect(context);
                assert_same(&found, &expected, &format!("{context}: replica {name} at lsn {lsn}"));
            }
        };
        // What a daemon does: orders, carries out, is told to resume, rolls forward.
        let run = |disk: &Arc<dyn Disk>, batch_bytes: u64, order: bool| -> receiver::Result<()> {
            let (_history, mut applier) = open(disk, Path::new(GROUP_DIR), settings(batch_bytes))?;
            if order {
                applier.rewind(&receiver::point::At::Lsn(to), 1)?;
            }
            apply_all(&mut applier, &durable)?;
            if applier.state().wishes.rewound.is_some() {
                applier.resume(Lsn::ZERO)?;
            }
            apply_all(&mut applier, &durable)?;
            Ok(())
        };
        let operations = {
            let sim = base.crash(0);
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            let before = sim.ops();
            run(&disk, 20_000, true).unwrap();
            replicas(&sim, source.last(), "uncut");
            sim.ops() - before
        };
        assert!(operations > 30, "{operations} operations");
        let (mut rewound, mut ordered) = (0, 0);
        for cut in 0..operations {
            let sim = base.crash(0);
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            sim.cut_at(sim.ops() + cut);
            drop(run(&disk, 20_000, true));
            let sim = sim.crash(seed.wrapping_mul(1000) + cut);
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            let context = format!("seed {seed}, cut at operation {cut}");

            let bare = History::open(Arc::clone(&disk), Path::new(GROUP_DIR)).expect(&context);
            check_all(&disk, &models, &bare, 16);

            let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(9_000)).expect(&context);
            ordered += usize::from(applier.is_rewinding());
            while applier.is_rewinding() {
                applier.next_batch(&durable).expect(&context);
                assert_eq!(applier.state().checkpoint.lsn, to, "{context}: the rewind that was ordered");
            }
            if applier.state().wishes.rewound.is_some() {
                rewound += 1;
                replicas(&sim, to, &context);
            }
            check_all(&disk, &models, &history, 9);
            drop((history, applier));
            run(&disk, 9_000, false).expect(&context);
            replicas(&sim, source.last(), &context);
            let history = History::open(Arc::clone(&disk), Path::new(GROUP_DIR)).expect(&context);
            check_all(&disk, &models, &history, 9);
        }
        assert!(ordered > 3 && rewound > ordered, "{ordered} cut in the rewind, {rewound} in all rewound");
    }
}
