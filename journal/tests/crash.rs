//! The crash matrix: a journal's life, cut at every single operation, on a disk that loses what was not
//! synced in every way it may. After recovery everything that was called durable is there, what is there is a
//! stretch of what was appended, byte for byte, and the writer goes on; a second cut during recovery changes
//! nothing of that.
#![allow(clippy::unwrap_used, reason = "a failing step fails the test")]

mod common;

use common::{Frame, dir, epoch_start, frame_after, options, read_all, shared};
use journal::buffered_disk::BufferedDisk;
use journal::io::Disk;
use journal::segment::{FLAG_RECYCLED, SegmentHeader};
use journal::sim_disk::SimDisk;
use journal::verify::{VerifyOptions, verify_dir};
use journal::writer::Writer;
use journal::{ErrorKind, Position};
use std::sync::Arc;

/// Small segments, so that a short life rolls and recycles many.
const SEGMENT_BYTES: u64 = 8192;

/// What the script did before the power went.
#[derive(Default)]
struct Life {
    created: bool,
    /// Every frame handed to `append`, in order.
    attempted: Vec<Frame>,
    /// So many of them were durable by the writer's word.
    durable: usize,
    /// Starts of epochs that were begun, or whose beginning was cut.
    epochs: Vec<Position>,
    /// Frames below this index may be gone.
    droppable: usize,
}

impl Life {
    fn note_durable(&mut self, position: &Position) {
        let held = self.attempted.iter().rposition(|frame| frame.header.position() == *position);
        self.durable = self.durable.max(held.map_or(0, |at| at + 1));
    }
}

/// One life of a journal; stops at the first failure.
fn live(sim: &SimDisk, life: &mut Life) -> journal::Result<()> {
    let start = epoch_start(1, 0);
    life.epochs.push(start);
    let mut writer = Writer::create(shared(sim), &dir(), options(SEGMENT_BYTES), start, 0)?;
    life.created = true;
    for step in 1..=44_usize {
        let frame = frame_after(&writer.appended(), 200 + step * 977 % 2500);
        life.attempted.push(frame.clone());
        writer.append(&frame.bytes, &frame.header, step as u64)?;
        life.note_durable(&writer.durable());
        if step % 3 == 0 {
            let position = writer.sync()?;
            assert_eq!(position, frame.header.position());
            life.note_durable(&position);
        }
        if step == 13 || step == 30 {
            let number = writer.appended().epoch.number + 1;
            let next = epoch_start(number, writer.appended().lsn.0 + 1000);
            life.epochs.push(next);
            writer.begin_epoch(next, step as u64)?;
            life.durable = life.attempted.len();
        }
        if step % 9 == 0 {
            let keep = writer.segments()[writer.segments().len() - 2].clone();
            let below = |frame: &Frame| frame.header.position().order() <= keep.start.order();
            life.droppable = life.attempted.iter().take_while(|frame| below(frame)).count();
            writer.drop_before(keep.number)?;
        }
    }
    Ok(())
}

/// What must hold of a disk found after a crash of `life`. Returns how many of the attempted frames are held.
fn check(after: &SimDisk, life: &Life, at: &str) -> Option<usize> {
    let disk = shared(after);
    if !Writer::exists(&*disk, &dir()).unwrap_or(false) {
        assert!(!life.created, "{at}: the journal is gone");
        return None;
    }
    let report = verify_dir(&*disk, &dir(), VerifyOptions { unpack: true }, &mut |_, _| {}).unwrap();
    assert!(!report.is_corrupt(), "{at}: a crash looks like corruption: {:?}", report.findings);
    let found = read_all(&disk, &dir()).unwrap_or_else(|error| panic!("{at}: read: {error}"));
    let first = match found.first() {
        None => life.attempted.len().min(life.droppable.max(life.durable)),
        Some(first) => {
            life.attempted.iter().position(|frame| frame == first).expect("what is held was appended")
        }
    };
    assert!(
        first <= life.droppable.max(if found.is_empty() { usize::MAX } else { 0 }),
        "{at}: too much was dropped"
    );
    let end = first + found.len();
    assert!(life.attempted.get(first..end) == Some(&found[..]), "{at}: not a stretch of what was appended");
    assert!(end >= life.durable, "{at}: {end} frames held, {} were durable", life.durable);
    Some(end)
}

fn open(after: &SimDisk, at: &str) -> Writer {
    let opened = Writer::open(shared(after), &dir(), options(SEGMENT_BYTES), 99);
    opened.unwrap_or_else(|error| panic!("{at}: open: {error}")).0
}

fn recover_and_go_on(sim: &SimDisk, life: &Life, cut: u64, seed: u64) {
    let at = format!("cut {cut} seed {seed}");
    let after = sim.crash(seed);
    let Some(held) = check(&after, life, &at) else {
        Writer::create(shared(&after), &dir(), options(SEGMENT_BYTES), epoch_start(1, 0), 0)
            .unwrap_or_else(|error| panic!("{at}: create again: {error}"));
        return;
    };
    let before_open = after.ops();
    let mut writer = open(&after, &at);
    let opened = after.ops();
    let position = writer.appended();
    assert_eq!(position, writer.durable(), "{at}: what recovery keeps is durable");
    let last = life.attempted[..held].last().map(|frame| frame.header.position());
    assert!(Some(position) == last || life.epochs.contains(&position), "{at}: {position:?}");
    assert_eq!(
        check(&after.crash(0), life, &at),
        Some(held),
        "{at}: recovery keeps what a reader saw, durably"
    );

    // The very frame that was lost comes again. What stood behind it must not come back to life with it.
    if let Some(again) =
        life.attempted.get(held).filter(|frame| frame.header.check_follows(&position).is_ok())
    {
        writer.append(&again.bytes, &again.header, 99).unwrap();
        writer.sync().unwrap();
        let twice = after.crash(0);
        assert_eq!(open(&twice, &at).appended(), again.header.position(), "{at}: stale frames came back");
    }
    // Far enough to use up every spare: were one of them still known by a segment's name, it would be
    // overwritten.
    let mut added = Vec::new();
    for _ in 0..10 {
        let more = frame_after(&writer.appended(), 2500);
        writer.append(&more.bytes, &more.header, 99).unwrap();
        added.push(more);
    }
    writer.sync().unwrap();
    let later = after.crash(0);
    assert_eq!(open(&later, &at).appended(), writer.appended(), "{at}: the writer goes on");
    let read = read_all(&shared(&later), &dir()).unwrap_or_else(|error| panic!("{at}: read later: {error}"));
    assert!(read.ends_with(&added), "{at}: what was added is there");

    if seed % 3 == 2 {
        for second in 0..opened - before_open {
            let again = sim.crash(seed);
            again.cut_at(again.ops() + second);
            let _ = Writer::open(shared(&again), &dir(), options(SEGMENT_BYTES), 99);
            let at = format!("{at}, recovery cut at {second}");
            let twice = again.crash(seed + second);
            assert_eq!(check(&twice, life, &at), Some(held), "{at}: recovery lost or found frames");
            assert_eq!(open(&twice, &at).appended(), position, "{at}");
        }
    }
}

#[test]
fn nothing_durable_is_lost_wherever_the_power_goes() {
    let whole = SimDisk::new();
    let mut life = Life::default();
    live(&whole, &mut life).unwrap();
    assert!(
        life.durable >= 40 && life.droppable > 10 && life.epochs.len() == 3,
        "the script does what it says"
    );
    let names = shared(&whole).list(&dir()).unwrap();
    let header = |name: &String| SegmentHeader::decode(&whole.contents(&dir().join(name)).unwrap()).ok();
    let recycled = names.iter().filter_map(header).filter(|header| header.flags == FLAG_RECYCLED).count();
    assert!(recycled >= 3, "segments are recycled: {names:?}");
    for cut in 0..=whole.ops() {
        let sim = SimDisk::new();
        sim.cut_at(cut);
        let mut life = Life::default();
        let ended = live(&sim, &mut life);
        assert_eq!(ended.is_err(), cut < whole.ops(), "cut {cut}");
        for seed in 0..6 {
            recover_and_go_on(&sim, &life, cut, seed);
        }
    }
}

#[test]
fn a_killed_process_leaves_nothing_that_is_not_synced_again() {
    // No power loss: the next process sees what the page cache holds. Recovery syncs before it calls it
    // durable.
    let sim = SimDisk::new();
    let mut writer = Writer::create(shared(&sim), &dir(), options(1 << 16), epoch_start(1, 0), 0).unwrap();
    let frame = frame_after(&writer.appended(), 3000);
    writer.append(&frame.bytes, &frame.header, 1).unwrap();
    drop(writer);
    assert_eq!(open(&sim, "").durable(), frame.header.position());
    assert_eq!(open(&sim.crash(0), "").durable(), frame.header.position());
}

/// The source's journal, on a disk that does not sync: killed at every operation of rolls, seals and drops,
/// it opens again with every frame whose append returned, takes more, and verifies.
#[test]
fn a_source_journal_survives_a_kill_at_every_operation() {
    let script = |disk: Arc<dyn Disk>| -> (Vec<u64>, bool) {
        let mut appended = Vec::new();
        let Ok(mut writer) = Writer::create(disk, &dir(), options(16 << 10), epoch_start(1, 0), 0) else {
            return (appended, false);
        };
        for step in 0..40 {
            let frame = frame_after(&writer.appended(), 700 + step * 37);
            if writer.append(&frame.bytes, &frame.header, 1).is_err() {
                return (appended, false);
            }
            appended.push(frame.header.last_lsn.0);
            // From the middle on dropped segments come back as spares, longer than what is left to fill.
            let oldest = writer.segments()[0].number;
            if writer.segments().len() > 3 && writer.drop_before(oldest + 1).is_err() {
                return (appended, false);
            }
        }
        (appended, true)
    };
    let buffered = |sim: &SimDisk| -> Arc<dyn Disk> { Arc::new(BufferedDisk::new(shared(sim))) };
    let sim = SimDisk::new();
    assert!(script(buffered(&sim)).1);
    let operations = sim.ops();
    for killed in 20..operations {
        let sim = SimDisk::new();
        sim.cut_at(killed);
        let (appended, finished) = script(buffered(&sim));
        assert!(!finished);
        sim.cut_at(u64::MAX);
        let disk = buffered(&sim);
        let context = format!("killed at operation {killed}");
        let (mut writer, _) = Writer::open(disk.clone(), &dir(), options(16 << 10), 1).expect(&context);
        let held = writer.appended().lsn.0;
        assert!(held >= *appended.last().unwrap(), "{context}: {held}");
        for _ in 0..20 {
            let frame = frame_after(&writer.appended(), 900);
            writer.append(&frame.bytes, &frame.header, 2).expect(&context);
        }
        drop(writer);
        let report = verify_dir(&*disk, &dir(), VerifyOptions { unpack: true }, &mut |_, _| {}).unwrap();
        assert_eq!(report.findings, Vec::new(), "{context}");
    }
}

#[test]
fn a_failed_sync_is_final_and_a_full_disk_is_not() {
    let sim = SimDisk::new();
    let mut writer = Writer::create(shared(&sim), &dir(), options(8192), epoch_start(1, 0), 0).unwrap();
    sim.set_capacity(Some(8192 * 2 + 8192));
    let mut appended = 0;
    let full = loop {
        let frame = frame_after(&writer.appended(), 2000);
        match writer.append(&frame.bytes, &frame.header, 1) {
            Ok(()) => appended += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind, ErrorKind::NoSpace);
    assert!(appended > 3, "more than one segment fits");
    writer.sync().unwrap();
    sim.set_capacity(None);
    let frame = frame_after(&writer.appended(), 2000);
    writer.append(&frame.bytes, &frame.header, 1).unwrap();
    writer.sync().unwrap();
    assert_eq!(read_all(&shared(&sim), &dir()).unwrap().len(), appended + 1);
    assert_eq!(open(&sim.crash(0), "").durable(), frame.header.position());

    let next = frame_after(&writer.appended(), 2000);
    writer.append(&next.bytes, &next.header, 1).unwrap();
    sim.fail_syncs(true);
    assert_eq!(writer.sync().unwrap_err().kind, ErrorKind::Sync);
    sim.fail_syncs(false);
    assert_eq!(writer.sync().unwrap_err().kind, ErrorKind::Sync, "for ever");
    let after = frame_after(&writer.appended(), 2000);
    assert_eq!(writer.append(&after.bytes, &after.header, 1).unwrap_err().kind, ErrorKind::Sync);
    assert_eq!(writer.durable(), frame.header.position(), "the failed sync promised nothing");
}
