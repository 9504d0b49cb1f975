//! Faults of the disks beside the stream: a replica that cannot be synced, room that runs out, a replica
//! moved or put back, a history that fills its quota; and the journal, which must shrink as the history does.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code; its numbers are small")]

mod storage;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use journal::io::{Disk, RealDisk};
use journal::record::Op;
use journal::sim_disk::SimDisk;
use receiver::ErrorKind;
use receiver::point::At;
use receiver::retention::Policy;
use receiver::thin::Steps;
use receiver::view::View;
use storage::*;

const SIZES: [u64; 1] = [1 << 20];
const REPLICA: &str = "/r/replica/g/v0.img";
/// Everything goes that may.
const NOTHING: Policy = Policy { window_ns: 0, min_ns: 0, steps: Steps::NONE, quota_bytes: Some(0) };

/// `count` writes of 32 KiB that no compression makes smaller, a frame each.
fn write_noise(source: &mut Source, random: &mut Random, count: usize) {
    for _ in 0..count {
        let bytes: Vec<u8> = (0..4096).flat_map(|_| random.next().to_le_bytes()).collect();
        let offset = random.below((SIZES[0] - bytes.len() as u64) / 512) * 512;
        source.write(0, offset, bytes);
        source.frame();
    }
}

fn begin(source: &mut Source, random: &mut Random, gap: u64) {
    source.epoch(gap);
    source.resync(&SIZES, random, "first");
    source.frame();
}

fn assert_replica(sim: &SimDisk, source: &Source, what: &str) {
    let expected = &source.model(source.last())["v0"];
    assert_same(&sim.contents(Path::new(REPLICA)).unwrap(), expected, what);
}

#[test]
fn the_journal_goes_as_the_history_does_from_its_empty_first_segment_on() {
    let (mut source, mut random) = (Source::new(), Random(1));
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create_empty(Arc::clone(&disk), dir);
    let (history, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    let mut dropped = 0;
    for epoch in 0..4 {
        begin(&mut source, &mut random, 1000);
        write_noise(&mut source, &mut random, 70);
        let durable = group.receive(&source, usize::MAX, Some(&history));
        apply_all(&mut applier, &durable).unwrap();
        history.note_waiting(history.newest_receipt_ns() + 1_000_000_000);
        applier.expire(&NOTHING, group.writer.segments()).unwrap();
        // Only the last consistent point is left; what leads to older ones weighs nothing any more.
        let expired = applier.expire(&NOTHING, group.writer.segments()).unwrap();
        group.writer.drop_before(expired.drop_journal_before.unwrap()).unwrap();
        let held = group.writer.segments();
        assert!(held.len() <= 2 && held[0].number > dropped, "epoch {epoch}: {held:?}");
        assert!(group.writer.journal_bytes() <= 2 << 20, "epoch {epoch}");
        dropped = held[0].number;
        assert_eq!(expired.verdict.kept_bytes, 0, "epoch {epoch}: dropped redo weighs nothing");
        assert_exact(&history, &source, source.last());
        // A restart finds its place, whether the next epoch has begun or not.
        let (reopened, mut again) = open(&disk, dir, settings(1 << 20)).unwrap();
        assert_eq!(again.next_batch(&durable).unwrap(), None);
        assert_exact(&reopened, &source, source.last());
    }
}

#[test]
fn a_journal_dropped_up_to_an_epochs_gap_is_not_taken_for_a_loss() {
    // The initial synchronisation is cut: no history, everything applied may go. The next epoch begins far
    // above.
    let (mut source, mut random) = (Source::new(), Random(2));
    source.epoch(0);
    source.volume(0, SIZES[0]);
    source.push(journal::record::Op::ResyncBegin, 0, 0, 0, b"first".to_vec());
    source.frame();
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create_empty(Arc::clone(&disk), dir);
    let (history, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    begin(&mut source, &mut random, 1 << 32);
    let durable = group.receive(&source, usize::MAX, Some(&history));
    let expired = applier.expire(&NOTHING, group.writer.segments()).unwrap();
    group.writer.drop_before(expired.drop_journal_before.unwrap()).unwrap();
    drop(applier);
    let (history, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    apply_all(&mut applier, &durable).unwrap();
    assert_exact(&history, &source, source.last());
}

#[test]
fn a_replica_that_cannot_be_synced_is_written_again_in_full_and_stops_nothing_else() {
    let (mut source, mut random) = (Source::new(), Random(3));
    begin(&mut source, &mut random, 0);
    let sim = SimDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let checkpoint = applier.state().checkpoint;
    write_noise(&mut source, &mut random, 10);
    sim.fail_syncs_below(Some(Path::new("/r/replica")));
    let durable = group.receive(&source, 5, Some(&history));
    let failed = applier.next_batch(&durable).unwrap_err();
    assert_eq!(failed.kind, ErrorKind::ReplicaFailed, "{failed}");
    assert!(failed.at.contains("v0.img"), "{failed}");
    assert_eq!(applier.state().checkpoint, checkpoint, "no false checkpoint");
    let durable = group.receive(&source, 5, Some(&history));
    assert_eq!(durable.lsn, source.last(), "ingest goes on");
    assert_eq!(
        applier.next_batch(&durable).unwrap_err().kind,
        ErrorKind::ReplicaFailed,
        "until it is opened again"
    );
    drop(applier);
    // The disk is well again; what the failed sync lost is in the page cache and nowhere else.
    sim.fail_syncs_below(None);
    let (history, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    apply_all(&mut applier, &durable).unwrap();
    assert_exact(&history, &source, source.last());
    assert_replica(&sim.crash(0), &source, "after a power loss");
}

#[test]
fn a_batch_whose_undo_does_not_fit_is_made_smaller() {
    let (mut source, mut random) = (Source::new(), Random(4));
    begin(&mut source, &mut random, 0);
    // No holes: only undo needs room.
    for at in (0..SIZES[0]).step_by(64 << 10) {
        let bytes = (0..8192).flat_map(|_| random.next().to_le_bytes()).collect();
        source.write(0, at, bytes);
        source.frame();
    }
    let first = source.last();
    write_noise(&mut source, &mut random, 20);
    let sim = SimDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(1 << 20)).unwrap();
    let frames = source.frames.iter().take_while(|(_, header)| header.last_lsn <= first).count();
    let durable = group.receive(&source, frames, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    sim.set_capacity(Some(sim.used_bytes() + (200 << 10)));
    let mut refused = 0;
    let done = loop {
        match applier.next_batch(&durable) {
            Ok(done) => break done.unwrap(),
            Err(error) => assert_eq!(error.kind, ErrorKind::NoSpace, "{error}"),
        }
        refused += 1;
        assert!(refused < 10);
    };
    assert!(refused > 0 && done.undo_bytes < 200 << 10, "{refused} refused, then {done:?}");
    sim.set_capacity(None);
    apply_all(&mut applier, &durable).unwrap();
    assert_exact(&history, &source, first);
    assert_replica(&sim, &source, "with room again");
}

#[test]
fn wherever_room_runs_out_apply_goes_on_exactly_when_there_is_some() {
    let (mut source, mut random) = (Source::new(), Random(5));
    begin(&mut source, &mut random, 0);
    let synced = source.last();
    write_noise(&mut source, &mut random, 12);
    let plain = SimDisk::new();
    let mut group = Group::create(Arc::new(plain.clone()), Path::new(GROUP_DIR), &source);
    let durable = group.receive(&source, usize::MAX, None);
    for room in (0..40).map(|step| step * (12 << 10)) {
        let sim = plain.crash(1);
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(100_000)).unwrap();
        while history.state().first_consistent.is_none() {
            applier.next_batch(&durable).unwrap();
        }
        sim.set_capacity(Some(sim.used_bytes() + room));
        for _ in 0..12 {
            match applier.next_batch(&durable) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind, ErrorKind::NoSpace, "room {room}: {error}"),
            }
        }
        assert_exact(&history, &source, synced);
        sim.set_capacity(None);
        apply_all(&mut applier, &durable).unwrap();
        assert_replica(&sim, &source, &format!("room {room}"));
        assert_exact(&history, &source, synced);
    }
}

#[test]
fn a_quota_that_the_minimum_fills_is_left_again_when_time_has_passed_for_a_frame_that_waits() {
    let (mut source, mut random) = (Source::new(), Random(6));
    begin(&mut source, &mut random, 0);
    write_noise(&mut source, &mut random, 30);
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(100_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let hour = 3_600_000_000_000;
    let policy =
        Policy { window_ns: 24 * hour, min_ns: 4 * hour, steps: Steps::NONE, quota_bytes: Some(100_000) };
    let over = |applier: &mut receiver::apply::Applier| {
        applier.expire(&policy, group.writer.segments()).unwrap().verdict.over_quota_bytes
    };
    assert!(over(&mut applier) > 0, "ingest is held back");
    history.note_waiting(history.newest_receipt_ns() + 3 * hour);
    assert!(over(&mut applier) > 0, "the minimum is kept");
    history.note_waiting(history.newest_receipt_ns() + 2 * hour);
    assert_eq!(over(&mut applier), 0);
    assert_exact(&history, &source, source.last());
}

#[test]
fn a_replica_that_was_moved_or_put_back_keeps_its_history_and_a_changed_one_is_not_used() {
    let (mut source, mut random) = (Source::new(), Random(7));
    begin(&mut source, &mut random, 0);
    let point = source.last();
    write_noise(&mut source, &mut random, 8);
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let dir = temporary.path().join("groups/g");
    let mut real = settings(60_000);
    real.replica_dir = temporary.path().join("replica/g");
    real.hold_replicas = true;
    let mut group = Group::create(Arc::clone(&disk), &dir, &source);
    let (history, mut applier) = open(&disk, &dir, real.clone()).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    applier.close().unwrap();
    let replica = temporary.path().join("replica/g/v0.img");
    let left = std::fs::metadata(&replica).unwrap().modified().unwrap();
    let set = |time: SystemTime| {
        std::fs::File::options().write(true).open(&replica).unwrap().set_modified(time).unwrap();
    };
    let seconds = left.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let undo = || std::fs::read_dir(dir.join("undo")).unwrap().count();
    let kept = undo();
    assert!(kept > 2);

    // Moved by a tool that keeps whole seconds.
    set(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    let (history, applier) = open(&disk, &dir, real.clone()).unwrap();
    assert_eq!(applier.state().seen.changed, None);
    assert_exact(&history, &source, point);
    applier.close().unwrap();
    let left = std::fs::metadata(&replica).unwrap().modified().unwrap();

    // Changed: no point is given out, nothing is thrown away, however often we start.
    set(left - Duration::from_secs(1));
    for _ in 0..2 {
        let (history, applier) = open(&disk, &dir, real.clone()).unwrap();
        assert!(applier.state().seen.changed.is_some());
        let refused = history.resolve(&At::Lsn(point)).unwrap_err();
        assert!(
            refused.kind == ErrorKind::NotPossible && refused.at.contains("changed by others"),
            "{refused}"
        );
        assert!(history.points().oldest.is_none());
        assert_eq!(undo(), kept);
        applier.close().unwrap();
    }

    // Put back as it was left.
    set(left);
    let (history, applier) = open(&disk, &dir, real.clone()).unwrap();
    assert_eq!(applier.state().seen.changed, None);
    assert_exact(&history, &source, point);
    applier.close().unwrap();

    // A new epoch does not overwrite a changed one: that takes an order, and only then the history ends.
    set(left - Duration::from_secs(1));
    let changed = std::fs::read(&replica).unwrap();
    let (history, mut applier) = open(&disk, &dir, real).unwrap();
    begin(&mut source, &mut random, 10);
    let durable = group.receive(&source, usize::MAX, Some(&history));
    assert_eq!(applier.next_batch(&durable).unwrap_err().kind, ErrorKind::NotPossible);
    assert_eq!((undo(), std::fs::read(&replica).unwrap() == changed), (kept, true));
    assert!(!history.points().ended.last().unwrap().is_over);
    let report = applier.overwrite(&durable, 1).unwrap();
    assert_eq!(undo(), 0);
    let again = applier.overwrite(&durable, 1).unwrap_err();
    assert_eq!(again.kind, ErrorKind::NotPossible, "nothing is wrong any more");
    // What was received up to the order is passed over: it was made with another replica in mind.
    assert_eq!(applier.next_batch(&durable).unwrap(), None);
    source.epoch(11);
    source.volume(0, SIZES[0]);
    source.push(Op::ResyncBegin, 0, 0, 0, b"overwrite".to_vec());
    let whole = source.model(source.last())["v0"].clone();
    for (at, chunk) in whole.chunks(64 << 10).enumerate() {
        source.push(Op::SyncSlot, 0, at as u64 * (64 << 10), chunk.len() as u64, chunk.to_vec());
    }
    source.push(Op::ResyncEnd, 0, 0, 0, Vec::new());
    source.frame();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    assert_exact(&history, &source, source.last());
    assert_eq!(history.resolve(&At::Lsn(point)).unwrap_err().kind, ErrorKind::NotPossible);
    let points = history.points();
    assert!(
        points.ended.iter().any(|end| end.is_over && end.why.contains("changed by others")),
        "{points:?}"
    );
    // What others had left is a point of its own.
    let at: At = report.found.unwrap().parse().unwrap();
    let point = history.resolve(&at).unwrap();
    let view = View::open(&history, point, "v0").unwrap();
    let mut found = vec![0; changed.len()];
    view.read_at(&mut found, 0).unwrap();
    assert_same(&found, &changed, "what was found");
}
