//! Views and restores against the model: random records, random batches, random restarts; beside a running
//! applier; on the real disk; what is refused and why; what retention may drop.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "test code; its numbers are small")]

mod storage;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use journal::Lsn;
use journal::clock_step::ClockStep;
use journal::io::{Disk, File, RealDisk};
use journal::record::Op;
use journal::sim_disk::SimDisk;
use proptest::prelude::*;
use receiver::ErrorKind;
use receiver::history::History;
use receiver::point::{At, rfc3339};
use receiver::restore::{RestoreRequest, open_bare, restore};
use receiver::retention::Policy;
use receiver::scrub::Scrub;
use receiver::state::Moment;
use receiver::thin::Steps;
use receiver::view::View;
use storage::*;

const SIZES: [u64; 2] = [256 << 10, 64 << 10];

fn sim() -> (SimDisk, Arc<dyn Disk>) {
    let sim = SimDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(sim.clone());
    (sim, disk)
}

/// An initial sync and `changes` live changes, a few a frame.
fn live(seed: u64, changes: usize) -> Source {
    let mut random = Random(seed);
    let mut source = Source::new();
    source.epoch(random.below(1 << 33));
    source.resync(&SIZES, &mut random, "first");
    for at in 0..changes {
        source.random_change(&SIZES, &mut random);
        if random.below(4) == 0 {
            source.frame();
        }
        if at % 50 == 20 {
            source.bookmark(&format!("b{}", at / 100));
        }
    }
    source.frame();
    source
}

fn request(at: At, to: &Path) -> RestoreRequest {
    RestoreRequest { at, to: to.to_path_buf(), volume: None, force: false, dry_run: false }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the batches and restarts, every point that is asked for is exact, by view and by restore;
    /// frames that are received and not applied count too.
    #[test]
    fn every_point_is_exact(seed in any::<u64>(), epochs in 1_usize..3) {
        let mut random = Random(seed);
        let mut source = live(random.next(), 60);
        for _ in 1..epochs {
            source.epoch(1 + random.below(1 << 20));
            source.resync(&SIZES, &mut random, "again");
            for _ in 0..30 {
                source.random_change(&SIZES, &mut random);
            }
            source.frame();
        }
        let (_, disk) = sim();
        let dir = Path::new(GROUP_DIR);
        let mut group = Group::create(Arc::clone(&disk), dir, &source);
        let mut opened = None;
        for step in 0..12 {
            if opened.is_none() || random.below(3) == 0 {
                drop(opened.take());
                let tell = random.below(2) == 0;
                opened = Some((open(&disk, dir, settings(2_000 + random.below(60_000))).unwrap(), tell));
            }
            let ((history, applier), tell) = opened.as_mut().unwrap();
            let frames = source.frames.len() / 12 + 1;
            let durable = group.receive(&source, frames, tell.then_some(&**history));
            if random.below(4) == 0 {
                apply_all(applier, &durable).unwrap();
            } else if random.below(3) > 0 {
                applier.next_batch(&durable).unwrap();
            }
            let state = history.state();
            if state.oldest_batch == 0 {
                continue;
            }
            let received = history.received().lsn;
            let points: Vec<Lsn> = source
                .points
                .iter()
                .copied()
                .filter(|lsn| *lsn >= state.history_start.lsn && *lsn <= received)
                .collect();
            for _ in 0..3 {
                let lsn = points[random.below(points.len() as u64) as usize];
                assert_exact(history, &source, lsn);
                let to = format!("/restored/{step}/{lsn}-{}", random.next());
                let report = restore(history, &request(At::Lsn(lsn), Path::new(&to)), &mut |_, _| {}).unwrap();
                prop_assert_eq!(report.lsn, lsn);
                for (name, expected) in source.model(lsn) {
                    let file = disk.open_read(&Path::new(&to).join(format!("{name}.img"))).unwrap();
                    let mut found = vec![0; usize::try_from(file.size().unwrap()).unwrap()];
                    file.read_at(&mut found, 0).unwrap();
                    assert_same(&found, &expected, &format!("restored {name} at lsn {lsn}"));
                }
            }
        }
    }
}

/// ⚠ Replica first, registry second: readers beside the applier never see a byte that is newer than their
/// point.
#[test]
fn views_and_restores_are_exact_while_the_applier_runs() {
    let mut source = live(3, 40);
    let fixed = source.last();
    let mut random = Random(17);
    for _ in 0..600 {
        source.random_change(&SIZES, &mut random);
        source.frame();
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let dir = temporary.path().join("groups/g");
    let mut group = Group::create(Arc::clone(&disk), &dir, &source);
    let mut real = settings(12_000);
    real.replica_dir = temporary.path().join("replica/g");
    real.hold_replicas = true;
    let (history, mut applier) = open(&disk, &dir, real).unwrap();
    history.attach_tail(group.writer.shared());
    let before = source.frames.iter().filter(|(_, header)| header.last_lsn <= fixed).count();
    let durable = group.receive(&source, before, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    assert_eq!(applier.state().checkpoint.lsn, fixed);
    let batches = applier.state().applied_batch;
    let expected = source.model(fixed);
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let (point, pin) = history.resolve_pinned(&At::Lsn(fixed)).unwrap();
        let readers: Vec<_> = (0..2)
            .map(|reader| {
                let (history, expected, running) = (&history, &expected, &running);
                scope.spawn(move || {
                    let view = View::open(history, point, "v0").unwrap();
                    let mut random = Random(reader);
                    let mut reads = 0;
                    let mut buffer = vec![0; 32 << 10];
                    while running.load(Ordering::Relaxed) || reads == 0 {
                        let offset = random.below(SIZES[0] - buffer.len() as u64) as usize;
                        view.read_at(&mut buffer, offset as u64).unwrap();
                        let expected = &expected["v0"][offset..offset + buffer.len()];
                        assert_same(&buffer, expected, &format!("read {reads} at {offset}"));
                        reads += 1;
                    }
                    reads
                })
            })
            .collect();
        let restorer = scope.spawn(|| {
            let mut restores = 0;
            while running.load(Ordering::Relaxed) || restores == 0 {
                let to = elsewhere.path().join(format!("out{restores}"));
                restore(&history, &request(At::Lsn(fixed), &to), &mut |_, _| {}).unwrap();
                for (name, expected) in &expected {
                    let found = std::fs::read(to.join(format!("{name}.img"))).unwrap();
                    assert_same(&found, expected, &format!("restore {restores}: {name}"));
                }
                restores += 1;
            }
            restores
        });
        while group.writer.durable().lsn < source.last() {
            let durable = group.receive(&source, 7, Some(&history));
            apply_all(&mut applier, &durable).unwrap();
        }
        running.store(false, Ordering::Relaxed);
        assert!(restorer.join().unwrap() > 0);
        assert!(readers.into_iter().all(|reader| reader.join().unwrap() > 0));
        drop(pin);
    });
    assert!(applier.state().applied_batch > batches + 20);
    applier.close().unwrap();

    // Somebody mounts the replica and writes to it while we are away: no history is made of that.
    let replica = temporary.path().join("replica/g/v0.img");
    let file = std::fs::File::options().write(true).open(&replica).unwrap();
    let unchanged = History::open(Arc::clone(&disk), &dir).unwrap();
    assert!(unchanged.state().clean && unchanged.state().needs_resync.is_none());
    std::os::unix::fs::FileExt::write_at(&file, b"x", 4096).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let mut real = settings(12_000);
    real.hold_replicas = true;
    let (history, mut applier) = open(&disk, &dir, real).unwrap();
    let why = applier.state().seen.changed.clone().unwrap().why;
    assert!(why.contains("v0.img of volume v0 was changed by others"), "{why}");
    assert_eq!(history.resolve(&At::Latest).unwrap_err().kind, ErrorKind::NotPossible);
    // Nothing is applied before its overwriting is ordered.
    source.random_change(&SIZES, &mut random);
    source.frame();
    let durable = group.receive(&source, 1, Some(&history));
    assert_eq!(applier.next_batch(&durable).unwrap_err().kind, ErrorKind::NotPossible);
    let found = std::fs::read(&replica).unwrap();
    let report = applier.overwrite(&durable, 1).unwrap();
    assert!(report.found.is_some_and(|found| found.starts_with("found:")));
    assert_same(&std::fs::read(&replica).unwrap(), &found, "an order alone writes nothing");
    // What is left of the old epoch is passed over; a new one repairs it.
    assert_eq!(applier.next_batch(&durable).unwrap(), None);
    source.epoch(10);
    source.volume(0, SIZES[0]);
    source.volume(1, SIZES[1]);
    source.push(Op::ResyncBegin, 0, 0, 0, b"replica changed".to_vec());
    let whole = source.model(source.last());
    for (volume, content) in whole.values().enumerate() {
        for (at, chunk) in content.chunks(64 << 10).enumerate() {
            let offset = at as u64 * (64 << 10);
            source.push(Op::SyncSlot, volume as u32, offset, chunk.len() as u64, chunk.to_vec());
        }
    }
    source.push(Op::ResyncEnd, 0, 0, 0, Vec::new());
    source.random_change(&SIZES, &mut random);
    source.frame();
    let durable = group.receive(&source, 1, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    assert_eq!(applier.state().needs_resync, None);
    assert_exact(&history, &source, source.last());
}

/// What happens in the middle of each read of a replica.
type Meanwhile = Arc<Mutex<Box<dyn FnMut() + Send>>>;

/// A disk on which something happens whenever a replica is read.
struct Interrupted {
    disk: Arc<dyn Disk>,
    meanwhile: Meanwhile,
}

struct InterruptedFile {
    file: Arc<dyn File>,
    meanwhile: Meanwhile,
}

impl Disk for Interrupted {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.disk.create(path)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.disk.open(path)
    }
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = self.disk.open_read(path)?;
        if !path.starts_with("/r/replica") {
            return Ok(file);
        }
        Ok(Arc::new(InterruptedFile { file, meanwhile: Arc::clone(&self.meanwhile) }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.create_dir(dir)
    }
}

impl File for InterruptedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.meanwhile.lock().unwrap()();
        self.file.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.file.set_size(bytes)
    }
    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.file.allocate(bytes)
    }
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.file.punch_hole(range)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }
    fn start_writeback(&self, range: Range<u64>) -> io::Result<()> {
        self.file.start_writeback(range)
    }
}

/// ⚠ The same without luck: a whole batch is applied between the reader's decision to read the replica and
/// its read.
#[test]
fn a_batch_applied_in_the_middle_of_a_read_is_taken_back() {
    let mut source = live(31, 30);
    let fixed = source.last();
    let before = source.frames.len();
    let mut random = Random(32);
    for _ in 0..600 {
        source.random_change(&SIZES, &mut random);
        source.frame();
    }
    let (_, plain) = sim();
    let meanwhile: Meanwhile = Arc::new(Mutex::new(Box::new(|| {})));
    let disk: Arc<dyn Disk> = Arc::new(Interrupted { disk: plain, meanwhile: Arc::clone(&meanwhile) });
    let mut group = Group::create(Arc::clone(&disk), Path::new(GROUP_DIR), &source);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(8_000)).unwrap();
    let durable = group.receive(&source, before, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let pin = history.resolve_pinned(&At::Lsn(fixed)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    let applied = Arc::new(AtomicU64::new(0));
    let batches = Arc::clone(&applied);
    *meanwhile.lock().unwrap() = Box::new(move || {
        if applier.next_batch(&durable).unwrap().is_some() {
            batches.fetch_add(1, Ordering::Relaxed);
        }
    });
    let expected = source.model(fixed);
    for at in 0..2 {
        let before = applied.load(Ordering::Relaxed);
        assert_equals(&history, &expected, fixed);
        assert!(applied.load(Ordering::Relaxed) > before, "view {at} met no batch");
        let before = applied.load(Ordering::Relaxed);
        let to = format!("/out{at}");
        restore(&history, &request(At::Lsn(fixed), Path::new(&to)), &mut |_, _| {}).unwrap();
        assert!(applied.load(Ordering::Relaxed) > before, "restore {at} met no batch");
        for (name, expected) in &expected {
            let file = disk.open_read(&Path::new(&to).join(format!("{name}.img"))).unwrap();
            let mut found = vec![0; expected.len()];
            file.read_at(&mut found, 0).unwrap();
            assert_same(&found, expected, &format!("restored {name}"));
        }
    }
    drop(pin);
}

fn applied(
    source: &Source,
    batch_bytes: u64,
) -> (SimDisk, Arc<dyn Disk>, Group, Arc<History>, receiver::apply::Applier) {
    let (sim, disk) = sim();
    let mut group = Group::create(Arc::clone(&disk), Path::new(GROUP_DIR), source);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(batch_bytes)).unwrap();
    let durable = group.receive(source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    (sim, disk, group, history, applier)
}

#[test]
fn points_are_resolved_by_lsn_time_and_name_or_refused_with_the_nearest() {
    let mut source = live(8, 100);
    let before = source.last();
    let before_ns = source.records.last().unwrap().0.time_ns;
    source.epoch(500);
    let mut random = Random(1);
    let end = source.resync(&SIZES, &mut random, "the ring was lost");
    let jump = source.push(Op::ClockJump, 0, 0, 0, (-4_000_000_000_i64).to_le_bytes().to_vec());
    let marked = source.bookmark("b0");
    for _ in 0..10 {
        source.random_change(&SIZES, &mut random);
    }
    source.frame();
    let (_, _, mut group, history, mut applier) = applied(&source, 30_000);
    let lsn = |at: &At| history.resolve(at).map(|point| point.moment.lsn);
    let refused = |at: At| {
        let error = history.resolve(&at).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotPossible, "{error}");
        error.to_string()
    };

    assert_eq!(lsn(&At::Latest).unwrap(), source.last());
    assert_eq!(lsn(&At::Bookmark("b0".into())).unwrap(), marked, "the newest of a name wins");
    assert!(refused(At::Bookmark("b9".into())).contains("b0"), "known names are told");
    for (record, _) in source.records.iter().filter(|(record, _)| source.points.contains(&record.lsn)) {
        let point = history.resolve(&At::Lsn(record.lsn)).unwrap();
        assert!(point.boundary_lsn <= record.lsn);
        assert_eq!(lsn(&At::Time(record.time_ns)).unwrap(), record.lsn, "its own time");
        assert_eq!(point.moment.time_ns, record.time_ns);
    }
    let third = &source.records[60].0;
    assert_eq!(lsn(&At::Time(third.time_ns + 400_000)).unwrap(), third.lsn, "the last one at or before");

    for inside in [Lsn(before.0 + 1), Lsn(end.0 - 1)] {
        let why = refused(At::Lsn(inside));
        assert!(why.contains("the ring was lost"), "{why}");
        assert!(why.contains(&before.to_string()) && why.contains(&end.to_string()), "nearest: {why}");
    }
    assert!(refused(At::Time(before_ns + 1)).contains("the ring was lost"));
    assert!(refused(At::Lsn(Lsn(source.last().0 + 1))).contains("outside"));
    assert!(refused(At::Lsn(Lsn(1))).contains("outside"));
    assert!(refused(At::Time(1)).contains("before the history"));
    let newest_ns = source.records.last().unwrap().0.time_ns;
    assert!(refused(At::Time(newest_ns + 5)).contains(&rfc3339(newest_ns)));
    applier.keep_heartbeat(Moment { lsn: source.last(), time_ns: newest_ns + 1000 }).unwrap();
    assert_eq!(lsn(&At::Time(newest_ns + 5)).unwrap(), source.last(), "a heartbeat vouches for the silence");
    assert!(history.resolve(&At::Time(newest_ns + 1001)).is_err());

    let points = history.points();
    assert_eq!(points.oldest.unwrap().lsn, history.state().history_start.lsn);
    assert_eq!(points.newest.unwrap().lsn, source.last());
    assert_eq!(points.gaps.len(), 1);
    assert_eq!((points.gaps[0].from_lsn, points.gaps[0].to_lsn), (before, Some(end)));
    assert_eq!(points.gaps[0].reason, "the ring was lost");
    assert_eq!(points.bookmarks.iter().filter(|bookmark| bookmark.name == "b0").count(), 3, "all are listed");
    assert!(points.warnings.iter().any(|w| w.contains("-4000 ms") && w.contains(&jump.to_string())));

    // A resync that is under way: latest is the last point before it, whatever is applied.
    let last = source.last();
    source.epoch(5);
    source.volume(0, SIZES[0]);
    source.push(Op::ResyncBegin, 0, 0, 0, b"agent was killed".to_vec());
    source.push(Op::SyncSlot, 0, 0, 4096, vec![0xAB; 4096]);
    source.frame();
    let durable = group.receive(&source, 1, Some(&history));
    assert_eq!(lsn(&At::Latest).unwrap(), last);
    apply_all(&mut applier, &durable).unwrap();
    assert_eq!(lsn(&At::Latest).unwrap(), last);
    assert_exact(&history, &source, last);
    assert!(refused(At::Lsn(source.last())).contains("agent was killed"));
    assert_eq!(history.points().gaps[1].to_lsn, None);
}

#[test]
fn a_source_that_doubts_earlier_points_is_told_and_takes_none_of_them_away() {
    let mut source = live(33, 60);
    let last = source.last();
    let (_, _disk, mut group, history, mut applier) = applied(&source, 12_000);
    source.push(Op::ResyncBegin, 0, 7, 5, b"a disk was changed".to_vec());
    source.push(Op::SyncSlot, 0, 0, 4096, vec![0xAB; 4096]);
    source.frame();
    let durable = group.receive(&source, 1, Some(&history));
    for applies in [false, true] {
        if applies {
            apply_all(&mut applier, &durable).unwrap();
        }
        assert_eq!(history.resolve(&At::Latest).unwrap().moment.lsn, last);
        for lsn in source.points.iter().filter(|lsn| **lsn > Lsn(7)).step_by(9) {
            assert_exact(&history, &source, *lsn);
        }
        let gap = history.points().gaps.pop().unwrap();
        assert_eq!(gap.from_lsn, last, "it begins where it begins");
        assert_eq!(gap.reason, "points after lsn 7 may lack what others wrote: a disk was changed");
    }
}

#[test]
fn retention_drops_the_oldest_and_keeps_the_rest_exact() {
    let source = live(21, 300);
    let (_, disk, mut group, history, mut applier) = applied(&source, 12_000);
    let batches = applier.state().applied_batch;
    assert!(batches > 15);
    let newest = history.received().time_ns;
    let oldest = history.state().history_start;
    let half_ns = (newest - oldest.time_ns) / 2;
    let quota_bytes = Some(u64::MAX);
    let keep_all = Policy { window_ns: u64::MAX, min_ns: 0, steps: Steps::NONE, quota_bytes };
    let policy = Policy { window_ns: half_ns, min_ns: 0, steps: Steps::NONE, quota_bytes };
    assert_eq!(applier.expire(&keep_all, group.writer.segments()).unwrap().removed, 0);

    // A pinned point stays, and so does everything above it.
    let pinned = history.resolve_pinned(&At::Lsn(oldest.lsn)).unwrap();
    assert_eq!(applier.expire(&policy, group.writer.segments()).unwrap().removed, 0);
    drop(pinned);
    let expired = applier.expire(&policy, group.writer.segments()).unwrap();
    assert!(expired.removed > 3 && expired.removed < batches - 3, "{expired:?}");
    assert_eq!(history.resolve(&At::Lsn(oldest.lsn)).unwrap_err().kind, ErrorKind::NotPossible);
    group.writer.drop_before(expired.drop_journal_before.unwrap()).unwrap();
    let start = history.state().history_start.lsn;
    let kept: Vec<Lsn> = source.points.iter().copied().filter(|lsn| *lsn >= start).collect();
    assert!(
        source.records.iter().any(|(record, _)| record.lsn >= start && record.time_ns >= newest - half_ns)
    );
    for lsn in kept.iter().step_by(9) {
        assert_exact(&history, &source, *lsn);
    }
    assert_eq!(disk.list(&Path::new(GROUP_DIR).join("undo")).unwrap().len() as u64, history.points().batches);

    // A restart sees the same, and the last consistent point survives any quota.
    drop(applier);
    let (history, mut applier) = open(&disk, Path::new(GROUP_DIR), settings(12_000)).unwrap();
    assert_eq!(history.state().history_start.lsn, start);
    assert_exact(&history, &source, start);
    let nothing = Policy { window_ns: 0, min_ns: 0, steps: Steps::NONE, quota_bytes: Some(0) };
    applier.expire(&nothing, group.writer.segments()).unwrap();
    assert_eq!(history.resolve(&At::Latest).unwrap().moment.lsn, source.last());
    assert_exact(&history, &source, source.last());
    assert_eq!(history.resolve(&At::Lsn(start)).unwrap_err().kind, ErrorKind::NotPossible);
}

#[test]
fn damage_ends_a_restore_with_its_place_and_without_a_result() {
    let source = live(4, 200);
    let (sim, disk, _group, history, applier) = applied(&source, 20_000);
    let oldest = history.state().history_start.lsn;
    let undo = Path::new(GROUP_DIR).join("undo");
    let name = &disk.list(&undo).unwrap()[1];
    let broken = undo.join(name);
    // Inside the first frame's payload, behind its header.
    sim.corrupt(&broken, 512 + 192 + 40, |byte| byte ^ 1);
    drop((history, applier));
    let history = History::open(Arc::clone(&disk), Path::new(GROUP_DIR)).unwrap();
    let error = restore(&history, &request(At::Lsn(oldest), Path::new("/out")), &mut |_, _| {}).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(&format!("{} at byte 512", broken.display())), "{error}");
    assert_eq!(disk.list(Path::new("/out")).unwrap(), Vec::<String>::new());
    restore(&history, &request(At::Latest, Path::new("/out")), &mut |_, _| {}).unwrap();

    // A missing one too, and it is told in advance.
    disk.remove(&broken).unwrap();
    let history = History::open(Arc::clone(&disk), Path::new(GROUP_DIR)).unwrap();
    assert!(history.points().warnings.iter().any(|warning| warning.contains(name.as_str())));
    let error = restore(&history, &request(At::Lsn(oldest), Path::new("/out2")), &mut |_, _| {}).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
    assert_exact(&history, &source, source.last());
}

#[test]
fn targets_are_not_overwritten_by_accident() {
    let source = live(9, 60);
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let dir = temporary.path().join("groups/g");
    let mut group = Group::create(Arc::clone(&disk), &dir, &source);
    let mut real = settings(40_000);
    real.replica_dir = temporary.path().join("replica/g");
    real.hold_replicas = true;
    let (_, mut applier) = open(&disk, &dir, real).unwrap();
    let durable = group.receive(&source, usize::MAX, None);
    apply_all(&mut applier, &durable).unwrap();
    applier.close().unwrap();

    let (lock, history) = open_bare(Arc::clone(&disk), &dir).unwrap();
    assert_eq!(open_bare(Arc::clone(&disk), &dir).err().unwrap().kind, ErrorKind::Busy);
    let elsewhere = tempfile::tempdir().unwrap();
    let to = elsewhere.path().join("one.img");
    let mut wanted = request(At::Latest, &to);
    wanted.volume = Some("v1".into());
    wanted.dry_run = true;
    let report = restore(&history, &wanted, &mut |_, _| {}).unwrap();
    assert!(report.dry_run && !to.exists());
    assert_eq!(report.volumes[0].size_bytes, SIZES[1]);
    wanted.dry_run = false;
    let mut last = (0, 0);
    restore(&history, &wanted, &mut |done, total| last = (done, total)).unwrap();
    assert_eq!(last, (SIZES[1], SIZES[1]));
    assert_same(&std::fs::read(&to).unwrap(), &source.model(source.last())["v1"], "v1");
    assert_eq!(restore(&history, &wanted, &mut |_, _| {}).unwrap_err().kind, ErrorKind::Usage);
    wanted.force = true;
    restore(&history, &wanted, &mut |_, _| {}).unwrap();
    assert!(!elsewhere.path().join("one.img.partial").exists());

    std::fs::hard_link(dir.join("group"), elsewhere.path().join("second name")).unwrap();
    for ours in [
        temporary.path().join("replica/g/v0.img"),
        temporary.path().join("new.img"),
        dir.join("group"),
        elsewhere.path().join("second name"),
    ] {
        wanted.to = ours;
        assert_eq!(restore(&history, &wanted, &mut |_, _| {}).unwrap_err().kind, ErrorKind::Usage, "ours");
    }
    wanted.to = to.clone();
    let held = receiver::replica::ReplicaHold::acquire(&to).unwrap();
    assert_eq!(restore(&history, &wanted, &mut |_, _| {}).unwrap_err().kind, ErrorKind::Busy, "in use");
    drop(held);
    wanted.volume = Some("v7".into());
    assert_eq!(restore(&history, &wanted, &mut |_, _| {}).unwrap_err().kind, ErrorKind::NotPossible);
    drop(lock);
}

/// Ahead by a day for a while, then right: times of the stretch, and those held behind it, are refused with
/// the nearest points; before and after it `time:` is exact.
#[test]
fn times_of_a_clock_that_was_wrong_are_refused() {
    const DAY: u64 = 86_400_000_000_000;
    let mut source = live(11, 60);
    let good = source.records.last().unwrap().0;
    let mut random = Random(2);
    for _ in 0..5 {
        source.random_change(&SIZES, &mut random);
    }
    let wrong = source.records.last().unwrap().0;
    let shown_ns = wrong.time_ns;
    let step = ClockStep {
        by_ns: -DAY.cast_signed(),
        since_lsn: good.lsn.next(),
        since_time_ns: good.time_ns + 1,
        shown_ns: shown_ns.saturating_sub(DAY).max(good.time_ns + 1),
        is_measured: true,
    };
    source.push(Op::ClockJump, 0, 0, 0, step.encode().to_vec());
    source.frame();
    let (_, _, _, history, _) = applied(&source, 30_000);
    let lsn = |time_ns| history.resolve(&At::Time(time_ns)).map(|point| point.moment.lsn);
    assert_eq!(lsn(good.time_ns).unwrap(), good.lsn, "before the stretch");
    for time_ns in [good.time_ns + 1, wrong.time_ns, wrong.time_ns + DAY / 2] {
        let error = lsn(time_ns).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotPossible);
        assert!(error.to_string().contains(&format!("lsn {} before", good.lsn)), "{error}");
    }
    assert_eq!(history.resolve(&At::Lsn(wrong.lsn)).unwrap().moment.lsn, wrong.lsn, "an lsn is no time");
    assert!(history.points().warnings.iter().any(|warning| warning.contains("`time:` is refused there")));
}

/// A disk that counts the files that are opened for reading.
struct Counting {
    disk: Arc<dyn Disk>,
    opened: AtomicU64,
}

impl Disk for Counting {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.disk.create(path)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.disk.open(path)
    }
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.disk.open_read(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.create_dir(dir)
    }
}

/// Merged indexes change nothing but the number of files that are asked: whatever of them is missing,
/// damaged, cut, of other batches or half dropped.
#[test]
fn merged_indexes_give_the_same_content_from_few_files() {
    let source = live(41, 900);
    let (sim, plain) = sim();
    let counting = Arc::new(Counting { disk: plain, opened: AtomicU64::new(0) });
    let disk: Arc<dyn Disk> = Arc::clone(&counting) as Arc<dyn Disk>;
    let dir = Path::new(GROUP_DIR);
    let mut group = Group::create(Arc::clone(&disk), dir, &source);
    let (history, mut applier) = open(&disk, dir, settings(5_000)).unwrap();
    let durable = group.receive(&source, usize::MAX, Some(&history));
    apply_all(&mut applier, &durable).unwrap();
    let batches = applier.state().applied_batch;
    assert!(batches > 280, "{batches}");
    let oldest = history.state().history_start.lsn;
    let far = |history: &Arc<History>| {
        let (point, _pin) = history.resolve_pinned(&At::Lsn(oldest)).unwrap();
        let view = View::open(history, point, "v0").unwrap();
        let read = |offset: u64| {
            let before = counting.opened.load(Ordering::Relaxed);
            view.read_at(&mut [0; 512], offset).unwrap();
            counting.opened.load(Ordering::Relaxed) - before
        };
        (0..SIZES[0]).step_by(4096).map(read).max().unwrap()
    };
    let without = far(&history);
    assert!(without > 100, "one by one: {without}");
    let merged = applier.merge(1000);
    assert!(merged > 17 && applier.merge(1000) == 0, "all at once: {merged}");
    drop((history, applier));
    let (history, mut applier) = open(&disk, dir, settings(5_000)).unwrap();
    assert_eq!(applier.merge(1000), 0, "known after a restart");
    let with = far(&history);
    assert!(
        with <= 2 + 3 * 16,
        "at most 16 a level, and the segment that holds the content: {with} of {without}"
    );
    let points: Vec<Lsn> = source.points.iter().copied().filter(|lsn| *lsn >= oldest).collect();
    let check = |history: &Arc<History>, every: usize| {
        let start = history.state().history_start.lsn;
        for lsn in points.iter().filter(|lsn| **lsn >= start).step_by(every) {
            assert_exact(history, &source, *lsn);
        }
    };
    check(&history, 37);
    // A rewind finds its content through them too, and is a batch that they hold later.
    applier.rewind(&At::Lsn(points[5]), 1).unwrap();
    apply_all(&mut applier, &durable).unwrap();
    applier.resume(Lsn::ZERO).unwrap();
    apply_all(&mut applier, &durable).unwrap();
    assert!(applier.merge(1000) > 17);
    check(&history, 37);

    let merged_dir = dir.join("merged");
    let names = disk.list(&merged_dir).unwrap();
    let mut random = Random(42);
    for name in &names {
        let path = merged_dir.join(name);
        let bytes = sim.contents(&path).unwrap();
        match random.below(4) {
            0 => sim.corrupt(&path, random.below(bytes.len() as u64), |byte| byte ^ 1),
            1 => sim.put(&path, bytes[..random.below(bytes.len() as u64) as usize].to_vec()),
            2 => disk.remove(&path).unwrap(),
            _ => {}
        }
    }
    sim.put(&merged_dir.join("1-00000000000000000001.idx.tmp"), vec![1; 100]);
    check(&history, 37);
    drop((history, applier));
    let (history, mut applier) = open(&disk, dir, settings(5_000)).unwrap();
    check(&history, 37);
    applier.merge(1000);
    check(&history, 37);

    // They go with the first of their batches.
    let newest_ns = history.newest_receipt_ns();
    history.note_waiting(newest_ns + 1);
    let middle = source.records[source.records.len() / 2].0.time_ns;
    let policy =
        Policy { window_ns: newest_ns - middle, min_ns: 0, steps: Steps::NONE, quota_bytes: Some(u64::MAX) };
    applier.expire(&policy, group.writer.segments()).unwrap();
    let state = history.state();
    let first = |name: &String| name[2..22].parse::<u64>().unwrap();
    assert!(disk.list(&merged_dir).unwrap().iter().all(|name| first(name) >= state.oldest_batch));
    check(&history, 37);
}

/// Scrub beside a writer and retention: nothing of what they do is damage; its rate is kept, and it stops at
/// once.
#[test]
fn scrub_takes_nobodys_work_for_damage_and_keeps_its_rate() {
    let mut source = live(51, 200);
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let dir = temporary.path().join("groups/g");
    let mut group = Group::create(Arc::clone(&disk), &dir, &source);
    let mut real = settings(8_000);
    real.replica_dir = temporary.path().join("replica/g");
    let (history, mut applier) = open(&disk, &dir, real).unwrap();
    let scrub = Arc::new(Scrub::at(1 << 30));
    let running = AtomicBool::new(true);
    let passes = std::thread::scope(|scope| {
        let passes = scope.spawn(|| {
            let mut passes = 0;
            while running.load(Ordering::Relaxed) {
                let found = scrub.pass(&disk, &dir, || 0).unwrap().unwrap();
                assert_eq!(found.damage, vec![], "pass {passes}");
                passes += 1;
            }
            passes
        });
        let mut random = Random(52);
        for _ in 0..12 {
            let durable = group.receive(&source, usize::MAX, Some(&history));
            apply_all(&mut applier, &durable).unwrap();
            let policy = Policy {
                window_ns: 2_000_000_000,
                min_ns: 0,
                steps: Steps::NONE,
                quota_bytes: Some(u64::MAX),
            };
            let expired = applier.expire(&policy, group.writer.segments()).unwrap();
            if let Some(number) = expired.drop_journal_before {
                group.writer.drop_before(number).unwrap();
            }
            for _ in 0..100 {
                source.random_change(&SIZES, &mut random);
                source.frame();
            }
        }
        running.store(false, Ordering::Relaxed);
        passes.join().unwrap()
    });
    assert!(passes > 2, "{passes}");
    let bytes = scrub.pass(&disk, &dir, || 0).unwrap().unwrap().bytes;
    let slow = Arc::new(Scrub::at(bytes * 4));
    let begun = std::time::Instant::now();
    slow.pass(&disk, &dir, || 0).unwrap();
    assert!(begun.elapsed().as_millis() > 150, "a quarter of a second at this rate: {:?}", begun.elapsed());
    let stopped = Arc::new(Scrub::at(1));
    std::thread::scope(|scope| {
        let pass = scope.spawn(|| stopped.pass(&disk, &dir, || 0).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(50));
        stopped.stop();
        assert_eq!(pass.join().unwrap(), None);
    });
}
