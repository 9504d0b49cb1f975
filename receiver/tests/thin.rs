//! Merged undo at coarser steps: whatever is merged and dropped, each point that is told is exact, and
//! nothing else is promised; against the model, with restarts, rewinds and views in between, and with a cut
//! at every operation.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code; its numbers are small")]

mod storage;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use journal::Lsn;
use journal::io::Disk;
use journal::sim_disk::SimDisk;
use journal::verify::{VerifyOptions, verify_dir};
use proptest::prelude::*;
use receiver::ErrorKind;
use receiver::apply::Applier;
use receiver::history::History;
use receiver::point::At;
use receiver::restore::{RestoreRequest, restore};
use receiver::retention::Policy;
use receiver::thin::Steps;
use receiver::undo::{file_number, read_summary};
use receiver::view::View;
use storage::*;

const SIZES: [u64; 2] = [64 << 10, 32 << 10];
const MINUTE: u64 = 60_000_000_000;
const HOUR: u64 = 60 * MINUTE;

fn policy(window_hours: u64, hourly: u64, daily: u64) -> Policy {
    let steps = Steps { hourly_ns: hourly * HOUR, daily_ns: daily * HOUR };
    Policy { window_ns: window_hours * HOUR, min_ns: 0, steps, quota_bytes: Some(u64::MAX) }
}

/// Begins with the first synchronisation.
fn begun(random: &mut Random) -> Source {
    let mut source = Source::new();
    source.epoch(random.below(1 << 20));
    source.resync(&SIZES, random, "first");
    source.frame();
    source
}

/// A few writes, and time.
fn live(source: &mut Source, random: &mut Random) {
    for _ in 0..=random.below(4) {
        source.random_change(&SIZES, random);
    }
    source.frame();
    source.wait((1 + random.below(50)) * MINUTE);
}

/// One round of housekeeping, as the apply thread does it, until nothing is left to do.
fn keep_house(group: &mut Group, applier: &mut Applier, policy: &Policy) -> usize {
    let segments = group.writer.segments().to_vec();
    let expired = applier.expire(policy, &segments).unwrap();
    if let Some(segment) = expired.drop_journal_before {
        group.writer.drop_before(segment).unwrap();
    }
    applier.merge(9);
    let mut merged = 0;
    loop {
        match applier.thin(policy).unwrap() {
            0 => return merged,
            some => merged += some,
        }
    }
}

/// Every step is exact, by view and by restore; what lies between is refused with its neighbours.
fn check_steps(history: &Arc<History>, disk: &Arc<dyn Disk>, source: &Source, context: &str) -> usize {
    let points = history.points();
    let exact = points.exact.unwrap();
    for step in &points.steps {
        assert!(step.lsn < exact.lsn, "{context}");
        assert_exact(history, source, step.lsn);
        let at: At = format!("time:{}", step.time).parse().unwrap();
        assert_eq!(history.resolve(&at).unwrap().moment.lsn, step.lsn, "{context}: by its time");
    }
    if let Some(step) = points.steps.first() {
        let to = format!("/restored/{}-{}", step.lsn, points.steps.len());
        let request = RestoreRequest {
            at: At::Lsn(step.lsn),
            to: to.clone().into(),
            volume: None,
            force: true,
            dry_run: false,
        };
        restore(history, &request, &mut |_, _| {}).unwrap();
        for (name, expected) in source.model(step.lsn) {
            let file = disk.open_read(&Path::new(&to).join(format!("{name}.img"))).unwrap();
            let mut found = vec![0; file.size().unwrap() as usize];
            file.read_at(&mut found, 0).unwrap();
            assert_same(&found, &expected, &format!("{context}: restored {name} at lsn {}", step.lsn));
        }
    }
    let oldest = points.oldest.unwrap().lsn;
    for (at, lsn) in source.points.iter().filter(|lsn| **lsn >= oldest && **lsn < exact.lsn).enumerate() {
        if at % 5 == 0 && !points.steps.iter().any(|step| step.lsn == *lsn) {
            let refused = history.resolve(&At::Lsn(*lsn)).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::NotPossible, "{context}: {refused}");
            assert!(refused.to_string().contains("nearest points: lsn"), "{context}: {refused}");
        }
    }
    points.steps.len()
}

/// Some of the points of the exact window are exact.
fn check_exact(history: &Arc<History>, source: &Source, every: usize) {
    let (start, received) = (history.state().exact_start().start.lsn, history.received().lsn);
    let inside = source.points.iter().filter(|lsn| **lsn >= start && **lsn <= received);
    for lsn in inside.step_by(every) {
        assert_exact(history, source, *lsn);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn every_step_and_every_exact_point_is_what_the_model_says(seed in any::<u64>()) {
        let mut random = Random(seed);
        let mut source = begun(&mut random);
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
        let dir = Path::new(GROUP_DIR);
        let mut group = Group::create_small(Arc::clone(&disk), dir, &source);
        let (mut history, mut applier) = open(&disk, dir, settings(4_000)).unwrap();
        let policy = policy(1 + random.below(6), random.below(20), random.below(72));
        let (mut merged, mut steps) = (0, 0);
        for round in 0..60 {
            for _ in 0..3 {
                live(&mut source, &mut random);
            }
            if random.below(12) == 0 {
                source.epoch(1 + random.below(1 << 10));
                source.resync(&SIZES, &mut random, "again");
                source.frame();
            }
            let durable = group.receive(&source, usize::MAX, Some(&history));
            apply_all(&mut applier, &durable).unwrap();
            if random.below(10) == 0 {
                let (from, to) = (history.state().exact_start().start.lsn, history.received().lsn);
                let points: Vec<Lsn> = source.points.iter().copied().filter(|lsn| *lsn >= from && *lsn <= to).collect();
                let lsn = points[random.below(points.len() as u64) as usize];
                applier.rewind(&At::Lsn(lsn), 1).unwrap();
                apply_all(&mut applier, &durable).unwrap();
                applier.resume(to).unwrap();
                apply_all(&mut applier, &durable).unwrap();
            }
            if random.below(8) == 0 {
                drop(applier);
                drop(history);
                (history, applier) = open(&disk, dir, settings(4_000)).unwrap();
            }
            if random.below(3) == 0 {
                merged += keep_house(&mut group, &mut applier, &policy);
                steps = check_steps(&history, &disk, &source, &format!("seed {seed} round {round}"));
                check_exact(&history, &source, 9);
                if let Some(step) = history.points().steps.last() {
                    let refused = applier.rewind(&At::Lsn(step.lsn), 1).unwrap_err();
                    prop_assert_eq!(refused.kind, ErrorKind::NotPossible);
                    prop_assert!(refused.to_string().contains("restore it"), "{}", refused);
                }
            }
        }
        if policy.steps.horizon_ns() > policy.window_ns + 12 * HOUR {
            prop_assert!(merged > 20 && steps > 0, "{} merged, {} steps", merged, steps);
            let report = verify_dir(&*disk, &dir.join("undo"), VerifyOptions { unpack: true }, &mut |_, _| {}).unwrap();
            prop_assert_eq!(report.findings, vec![]);
        }
    }
}

/// A group with a day of history, all applied.
fn a_day(seed: u64, disk: &Arc<dyn Disk>) -> (Source, Group, journal::Position) {
    let mut random = Random(seed);
    let mut source = begun(&mut random);
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create_small(Arc::clone(disk), dir, &source);
    let (history, mut applier) = open(disk, dir, settings(4_000)).unwrap();
    let mut durable = group.receive(&source, usize::MAX, Some(&history));
    for _ in 0..50 {
        live(&mut source, &mut random);
        durable = group.receive(&source, usize::MAX, Some(&history));
        apply_all(&mut applier, &durable).unwrap();
    }
    (source, group, durable)
}

#[test]
fn thinning_survives_a_cut_at_every_operation() {
    let policy = policy(6, 48, 0);
    let dir = Path::new(GROUP_DIR);
    let base = SimDisk::new();
    let (source, group, durable) = a_day(1, &(Arc::new(base.clone()) as Arc<dyn Disk>));
    let segments = group.writer.segments().to_vec();
    drop(group);
    let base = base.crash(0);
    let models: BTreeMap<Lsn, _> = source.points.iter().map(|lsn| (*lsn, source.model(*lsn))).collect();
    let thin = |disk: &Arc<dyn Disk>| -> receiver::Result<usize> {
        let (_history, mut applier) = open(disk, dir, settings(4_000))?;
        applier.expire(&policy, &segments)?;
        let mut merged = 0;
        loop {
            match applier.thin(&policy)? {
                0 => return Ok(merged),
                some => merged += some,
            }
        }
    };
    let check = |disk: &Arc<dyn Disk>, every: usize, context: &str| {
        let bare = History::open(Arc::clone(disk), dir).expect(context);
        let points = bare.points();
        assert_eq!(points.warnings, Vec::<String>::new(), "{context}");
        for step in &points.steps {
            assert_equals(&bare, &models[&step.lsn], step.lsn);
        }
        let exact = points.exact.unwrap().lsn;
        for (lsn, model) in models.range(exact..).step_by(every) {
            assert_equals(&bare, model, *lsn);
        }
        points.steps.len()
    };
    let (operations, steps) = {
        let sim = base.crash(0);
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        let before = sim.ops();
        assert!(thin(&disk).unwrap() > 20);
        (sim.ops() - before, check(&disk, 1, "uncut"))
    };
    assert!(operations > 60 && steps > 10, "{operations} operations, {steps} steps");
    for cut in 0..operations {
        let sim = base.crash(0);
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        sim.cut_at(sim.ops() + cut);
        drop(thin(&disk));
        let sim = sim.crash(cut);
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        let context = format!("cut at operation {cut}");
        assert!(check(&disk, 12, &context) >= steps || cut < 20, "{context}");
        thin(&disk).expect(&context);
        assert_eq!(check(&disk, 12, &context), steps, "{context}");
        // Nothing is left over.
        let (history, mut applier) = open(&disk, dir, settings(4_000)).expect(&context);
        let mut next = history.state().oldest_batch;
        for number in disk.list(&dir.join("undo")).unwrap().iter().map(|name| file_number(name).expect(name))
        {
            let kept = read_summary(&*disk, &dir.join("undo"), number, GROUP).unwrap();
            assert_eq!(kept.from, next, "{context}");
            next = number + 1;
        }
        assert_eq!(applier.next_batch(&durable).unwrap(), None);
    }
}

#[test]
fn an_open_view_keeps_its_batches_and_the_history_is_not_longer_than_its_steps() {
    let dir = Path::new(GROUP_DIR);
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
    let (mut source, mut group, _) = a_day(2, &disk);
    let (history, mut applier) = open(&disk, dir, settings(4_000)).unwrap();
    let policy = policy(6, 12, 0);
    applier.expire(&policy, group.writer.segments()).unwrap();
    let steps = history.points().steps;
    let middle = steps[steps.len() / 2].lsn;
    let (point, pin) = history.resolve_pinned(&At::Lsn(middle)).unwrap();
    let view = View::open(&history, point, "v0").unwrap();
    drop(pin);
    keep_house(&mut group, &mut applier, &policy);
    let whole = source.model(middle)["v0"].clone();
    let mut content = vec![0; whole.len()];
    view.read_at(&mut content, 0).unwrap();
    assert_same(&content, &whole, "a view below which nothing is merged");
    let held = history.points().steps.len();
    drop(view);
    assert!(keep_house(&mut group, &mut applier, &policy) > 0);
    assert!(history.points().steps.len() < held);
    check_steps(&history, &disk, &source, "merged");

    // Beyond the last step everything goes; without steps nothing but the window stays.
    let mut random = Random(3);
    for _ in 0..60 {
        live(&mut source, &mut random);
        let durable = group.receive(&source, usize::MAX, Some(&history));
        apply_all(&mut applier, &durable).unwrap();
        keep_house(&mut group, &mut applier, &policy);
    }
    let steps = check_steps(&history, &disk, &source, "rolling");
    assert!((5..=9).contains(&steps), "12 hours less 6 of the window, and those not yet merged: {steps}");
    check_exact(&history, &source, 7);
    let off = Policy { steps: Steps::NONE, ..policy };
    keep_house(&mut group, &mut applier, &off);
    assert_eq!((history.state().exact, history.points().steps.len()), (None, 0));
    check_exact(&history, &source, 7);
}
