//! What a source may send: records that break every rule under checksums that hold, more events than anybody
//! keeps, volumes that cannot be, discards of everything. The group that it belongs to may stand still;
//! nothing panics, its older points stay exact, and they are there again after a restart.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code; its numbers are small")]

mod storage;

use std::path::Path;
use std::sync::Arc;

use journal::frame::FLAG_EVENTS;
use journal::io::Disk;
use journal::record::{Op, VolumeRecord};
use journal::sim_disk::SimDisk;
use journal::{Lsn, VolumeUuid};
use proptest::prelude::*;
use receiver::ErrorKind;
use receiver::history::History;
use receiver::point::At;
use receiver::restore::{RestoreRequest, open_bare, restore};
use receiver::retention::Policy;
use receiver::thin::Steps;
use storage::*;

const SIZES: [u64; 2] = [256 << 10, 64 << 10];

fn sim() -> (SimDisk, Arc<dyn Disk>) {
    let sim = SimDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    (sim, disk)
}

/// A group with a history of a few writes, applied; and its newest point.
fn honest(disk: &Arc<dyn Disk>, random: &mut Random) -> (Source, Group, Lsn) {
    let mut source = Source::new();
    source.epoch(100);
    source.resync(&SIZES, random, "first");
    for _ in 0..20 {
        source.random_change(&SIZES, random);
    }
    source.frame();
    let mut group = Group::create(Arc::clone(disk), Path::new(GROUP_DIR), &source);
    let (_, mut applier) = open(disk, Path::new(GROUP_DIR), settings(8_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, None);
    apply_all(&mut applier, &durable).unwrap();
    let last = source.last();
    (source, group, last)
}

fn assert_restored(disk: &Arc<dyn Disk>, source: &Source, lsn: Lsn, to: &str) {
    let history = History::open(Arc::clone(disk), Path::new(GROUP_DIR)).unwrap();
    let request =
        RestoreRequest { at: At::Lsn(lsn), to: to.into(), volume: None, force: false, dry_run: false };
    assert_eq!(restore(&history, &request, &mut |_, _| {}).unwrap().lsn, lsn);
    for (name, expected) in source.model(lsn) {
        let file = disk.open_read(&Path::new(to).join(format!("{name}.img"))).unwrap();
        let mut found = vec![0; file.size().unwrap() as usize];
        file.read_at(&mut found, 0).unwrap();
        assert_same(&found, &expected, &format!("{name} at lsn {lsn}"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Frames whose CRC and chain hold, and whose records are anything.
    #[test]
    fn records_of_any_kind_harm_their_group_only(seed in any::<u64>()) {
        let mut random = Random(seed);
        let (_, disk) = sim();
        let (mut source, mut group, point) = honest(&disk, &mut random);
        let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(8_000)).unwrap();
        for _ in 0..3 {
            source.hostile_frame(&mut random);
            // History may refuse to read the frame; ingest only logs that.
            let durable = group.receive_raw(&source, &history);
            for _ in 0..20 {
                match applier.next_batch(&durable) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        prop_assert!(matches!(
                            error.kind,
                            ErrorKind::Malformed | ErrorKind::Corrupt | ErrorKind::ReplicaFailed
                        ), "{error}");
                        break;
                    }
                }
            }
            prop_assert!(applier.state().checkpoint.lsn <= durable.lsn, "a checkpoint beyond the journal");
        }
        let check = |history: &Arc<History>| {
            assert_exact(history, &source, point);
            let points = history.points();
            assert!(points.checkpoint_lsn <= source.last());
            for at in [At::Latest, At::Lsn(source.last()), At::Time(u64::MAX), At::Lsn(Lsn(u64::MAX))] {
                // Whatever the answer is, it is one.
                let _ = history.resolve(&at);
            }
        };
        check(&history);
        drop((history, applier));
        let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(8_000)).unwrap();
        check(&history);
        let _ = applier.next_batch(&group.writer.durable());
        check(&history);
        assert_restored(&disk, &source, point, "/restored");
    }
}

#[test]
fn a_newer_epoch_passes_over_records_that_were_refused() {
    let (_, disk) = sim();
    let mut random = Random(5);
    let (mut source, mut group, point) = honest(&disk, &mut random);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
    let good = source.write(0, 0, vec![9; 4096]);
    source.frame();
    // Outside of its volume: no rule of the format is broken, and no replica can take it.
    source.push_unmodelled(Op::Write, 0, 1 << 40, vec![1; 512]);
    source.push_unmodelled(Op::Write, 1, 0, vec![2; 512]);
    source.frame();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    let error = apply_all(&mut applier, &durable).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Malformed);
    assert_eq!(applier.state().checkpoint.lsn, good, "what comes before is applied");
    source.epoch(10);
    let repaired = source.resync(&SIZES, &mut random, "repair");
    source.frame();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    drop(applier);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
    apply_all(&mut applier, &durable).unwrap();
    assert_eq!(applier.state().checkpoint.lsn, repaired);
    for lsn in [point, good, repaired] {
        assert_exact(&history, &source, lsn);
    }
}

/// What a record names is kept in the event log, which is read at each start: a number that is refused there
/// must be refused before it gets there, or one frame shuts the group for good.
#[test]
fn no_event_is_kept_that_cannot_be_read_again() {
    for op in [Op::Failed, Op::ClockJump] {
        let (_, disk) = sim();
        let mut random = Random(5);
        let (mut source, mut group, point) = honest(&disk, &mut random);
        let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
        let payload = match op {
            Op::Failed => vec![0xFF; 8],
            _ => [[0; 8], [0xFF; 8], [0; 8], [0; 8], [0; 8]].concat(),
        };
        source.push_unmodelled(op, 0, 0, payload);
        source.frame();
        let durable = group.receive_raw(&source, &history);
        let error = apply_all(&mut applier, &durable).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Malformed, "{op:?}");
        drop((history, applier));
        let (history, applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
        assert_eq!(applier.state().checkpoint.lsn, point, "{op:?}");
        assert_exact(&history, &source, point);
    }
}

#[test]
fn garbage_above_the_checkpoint_ends_the_window_and_nothing_else() {
    for flip in [false, true] {
        let (sim, disk) = sim();
        let mut random = Random(6);
        let (mut source, mut group, point) = honest(&disk, &mut random);
        let good = source.write(0, 0, vec![9; 4096]);
        source.frame();
        if flip {
            // Damage below a position that was acknowledged.
            source.write(0, 4096, vec![0xA5; 512]);
            source.frame();
            source.write(0, 8192, vec![7; 4096]);
            source.frame();
        } else {
            source.garbage_frame(FLAG_EVENTS);
        }
        group.receive(&source, usize::MAX, None);
        if flip {
            corrupt_frame(&sim, Path::new(GROUP_DIR), &source.frames[source.frames.len() - 2].0);
        }
        let history = History::open(Arc::clone(&disk), Path::new(GROUP_DIR)).unwrap();
        assert_eq!(history.received().lsn, good, "flip {flip}");
        let points = history.points();
        assert!(points.warnings.iter().any(|warning| warning.contains("cannot be read")), "{points:?}");
        assert_eq!(points.newest.unwrap().lsn, good);
        assert_exact(&history, &source, point);
        assert_exact(&history, &source, good);
        assert_restored(&disk, &source, point, "/restored");
        let (_, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
        let error = apply_all(&mut applier, &group.writer.durable()).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Malformed | ErrorKind::Corrupt), "{error}");
        assert_eq!(applier.state().checkpoint.lsn, good, "flip {flip}: a stall, not silence");
    }
}

#[test]
fn events_beyond_number_leave_gaps_and_volumes_alone() {
    for op in [Op::Bookmark, Op::Failed, Op::ClockJump, Op::ResyncBegin] {
        let (_, disk) = sim();
        let mut random = Random(7);
        let (mut source, mut group, point) = honest(&disk, &mut random);
        let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(16 << 20)).unwrap();
        for at in 0..70_000_u64 {
            let payload = match op {
                Op::ClockJump | Op::Failed => at.to_le_bytes().to_vec(),
                _ => b"x".to_vec(),
            };
            source.push(op, 0, 0, 0, payload);
            if at % 10_000 == 0 {
                source.frame();
            }
        }
        source.frame();
        let durable = group.receive(&source, usize::MAX, Some(&history));
        assert_exact(&history, &source, point);
        apply_all(&mut applier, &durable).unwrap();
        drop((history, applier));
        let (history, applier) = open(&disk, Path::new(GROUP_DIR), settings(16 << 20)).unwrap();
        assert_eq!(applier.state().checkpoint.lsn, source.last());
        assert_exact(&history, &source, point);
        let points = history.points();
        if op == Op::ResyncBegin {
            assert_eq!(points.gaps.len(), 1, "a gap that is open already");
        } else {
            assert!(points.gaps.iter().all(|gap| gap.to_lsn.is_some()), "{op:?}");
            assert_exact(&history, &source, source.last());
            assert!(points.warnings.len() < 200, "{op:?}: {} warnings", points.warnings.len());
        }
    }
}

#[test]
fn gaps_beyond_number_stop_apply_and_older_points_stay() {
    let (_, disk) = sim();
    let mut random = Random(8);
    let (mut source, mut group, point) = honest(&disk, &mut random);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(16 << 20)).unwrap();
    for at in 0..70_000_u64 {
        source.push(Op::Volume, 0, 0, 0, {
            let uuid = VolumeUuid([1; 16]);
            let (size_bytes, name) = (SIZES[0] + at * 512, "v0".into());
            VolumeRecord { uuid, size_bytes, sector_bytes: 512, present: true, name }.encode()
        });
        if at % 5_000 == 0 {
            source.frame();
        }
    }
    source.frame();
    let durable = group.receive_raw(&source, &history);
    let error = apply_all(&mut applier, &durable).unwrap_err();
    assert!(error.at.contains("more than"), "{error}");
    assert!(history.points().warnings.iter().any(|warning| warning.contains("cannot be read")));
    assert_exact(&history, &source, point);
    drop((history, applier));
    let (history, _applier) = open(&disk, Path::new(GROUP_DIR), settings(16 << 20)).unwrap();
    assert_exact(&history, &source, point);
}

#[test]
fn sixty_four_volumes_fit_and_one_more_is_refused_before_anything_is_kept() {
    let (_, disk) = sim();
    let mut random = Random(9);
    let sizes = [32 << 10; 64];
    let mut source = Source::new();
    source.epoch(1);
    let point = source.resync(&sizes, &mut random, "first");
    source.frame();
    let mut group = Group::create(Arc::clone(&disk), Path::new(GROUP_DIR), &source);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    drop((history, applier));
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
    assert_eq!(applier.state().replicas.len(), 64);
    assert_exact(&history, &source, point);
    let uuid = VolumeUuid([99; 16]);
    let one_more = |name: &str| {
        let name = name.to_owned();
        VolumeRecord { uuid, size_bytes: 512, sector_bytes: 512, present: true, name }.encode()
    };
    source.push_unmodelled(Op::Volume, 64, 0, one_more("v64"));
    source.frame();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    let error = apply_all(&mut applier, &durable).unwrap_err();
    assert!(error.at.contains("64 volumes"), "{error}");
    assert_eq!(applier.state().replicas.len(), 64, "no intent");
    assert_eq!(applier.state().checkpoint.lsn, point);
    // A name that could not be a file's.
    source.epoch(1);
    source.push_unmodelled(Op::Volume, 0, 0, one_more(&"x".repeat(255)));
    source.frame();
    let durable = group.receive_raw(&source, &history);
    drop((history, applier));
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(1 << 20)).unwrap();
    assert_eq!(apply_all(&mut applier, &durable).unwrap_err().kind, ErrorKind::Malformed);
    assert_exact(&history, &source, point);
}

#[test]
fn another_volume_under_a_known_id_stops_apply_until_the_replica_is_given_up() {
    let (_, disk) = sim();
    let mut random = Random(10);
    let (mut source, mut group, _) = honest(&disk, &mut random);
    let dir = Path::new(GROUP_DIR);
    let (_, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    let undo = || disk.list(&dir.join("undo")).unwrap();
    let before = undo();
    // The volume was made anew at the source, and is smaller.
    source.epoch(10);
    source.replace_volume(0, 128 << 10, 77);
    let sizes = [128 << 10, SIZES[1]];
    source.push(Op::ResyncBegin, 0, 0, 0, b"made anew".to_vec());
    source.push(Op::SyncSlot, 0, 0, 4096, vec![3; 4096]);
    source.push(Op::SyncSlot, 1, 0, 4096, vec![4; 4096]);
    source.push(Op::ResyncEnd, 0, 0, 0, Vec::new());
    source.random_change(&sizes, &mut random);
    source.frame();
    let durable = group.receive(&source, usize::MAX, None);
    let error = apply_all(&mut applier, &durable).unwrap_err();
    assert_eq!(error.kind, ErrorKind::ReplicaFailed);
    assert!(error.at.contains("empty file"), "{error}");
    assert_eq!(undo(), before, "no batch is cut that could never be redone");
    drop(applier);
    disk.open(Path::new("/r/replica/g/v0.img")).unwrap().set_size(0).unwrap();
    let (history, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    assert!(applier.state().needs_resync.as_ref().unwrap().contains("made anew"));
    apply_all(&mut applier, &durable).unwrap();
    assert_eq!(applier.state().needs_resync, None);
    let file = disk.open_read(Path::new("/r/replica/g/v0.img")).unwrap();
    let mut found = vec![0; 128 << 10];
    assert_eq!(file.size().unwrap(), 128 << 10);
    file.read_at(&mut found, 0).unwrap();
    let view = read_view(&history, source.last(), "v0");
    assert_same(&view, &found, "the newest point is the replica");
    assert_eq!(found[..4096], [3; 4096]);
}

#[test]
fn discarding_everything_over_and_over_costs_its_undo_once() {
    let (_, disk) = sim();
    let mut random = Random(11);
    let (mut source, mut group, point) = honest(&disk, &mut random);
    // Scattered content: every other block.
    for at in (0..SIZES[0]).step_by(8192) {
        source.write(0, at, vec![0x5A; 4096]);
    }
    source.frame();
    let written = source.last();
    for _ in 0..5_000 {
        source.zero(0, 0, SIZES[0]);
    }
    source.frame();
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(64 << 20)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    let done = apply_all(&mut applier, &durable).unwrap();
    assert_eq!(done.len(), 1, "the repeated discards add nothing to the undo: {done:?}");
    for lsn in [point, written, source.last()] {
        assert_exact(&history, &source, lsn);
    }
    let policy = Policy { window_ns: u64::MAX, min_ns: 0, steps: Steps::NONE, quota_bytes: Some(1 << 40) };
    let batches = history.points().batches;
    let expired = applier.expire(&policy, &[]).unwrap();
    assert!(expired.verdict.kept_bytes >= batches * (64 << 10), "a small batch counts for its file");
}

#[test]
fn a_directory_without_a_daemon_opens_in_spite_of_garbage() {
    let dir = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(journal::io::RealDisk);
    let group_dir = dir.path().join("groups/g");
    let mut random = Random(12);
    let mut source = Source::new();
    source.epoch(1);
    let point = source.resync(&SIZES, &mut random, "first");
    source.frame();
    let mut group = Group::create(Arc::clone(&disk), &group_dir, &source);
    let settings =
        receiver::apply::ApplySettings { replica_dir: dir.path().join("replica/g"), ..settings(1 << 20) };
    let (history, mut applier) = open(&disk, &group_dir, settings).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    source.garbage_frame(FLAG_EVENTS);
    group.receive_raw(&source, &history);
    drop((group, history, applier));
    let (_lock, history) = open_bare(disk, &group_dir).unwrap();
    assert_exact(&history, &source, point);
}
