//! Whole directories whose checksums hold: a journal as its writer left it, or undo, with numbers that no
//! writer gives them.

use super::steer::{Files, Input, steer};
use crate::compress::{Compression, Decoder, Encoder};
use crate::frame::{Batch, FrameHeader, Stamp};
use crate::index::SegmentIndex;
use crate::io::Disk;
use crate::reader::Reader;
use crate::record::{Op, Record, Records, VolumeRecord};
use crate::retention::{ReceiverPolicy, SourcePolicy};
use crate::segment::{self, SegmentHeader, SegmentKind};
use crate::sim_disk::SimDisk;
use crate::tail::Limit;
use crate::verify::{VerifyOptions, verify_dir};
use crate::walk::{Item, SegmentFile, Walk};
use crate::writer::{Writer, WriterOptions};
use crate::{Epoch, EpochId, Extent, GroupId, Lineage, Lsn, Position, Result, VolumeId};
use std::path::Path;
use std::sync::{Arc, OnceLock};

const DIR: &str = "/fuzz";
const GROUP: GroupId = GroupId([1; 16]);
const LINEAGE: Lineage = Lineage([2; 16]);
const SEGMENT_BYTES: u64 = 8192;
/// Numbers that stand for one thing each, so that the input can move them together.
const FIRST_LSN: u64 = 1_000_001;
const FIRST_TIME_NS: u64 = 1_700_000_000_000_000_000;
/// Room on the disk: more than the files can be, less than hostile numbers ask for.
const CAPACITY_BYTES: u64 = 16 << 20;
/// More than the frames of any directory that an input makes.
const MAX_STEPS: usize = 20_000;

/// A directory that the bytes describe: verified, listed, dumped, read from several places, mended, and
/// opened as a daemon opens it, which then goes on in it.
pub fn directory(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(mut files) = sample(input.byte() & 1 == 1) else { return };
    steer(&mut files, &mut input);
    let disk = SimDisk::new();
    let dir = Path::new(DIR);
    if disk.create_dir(dir).is_err() {
        return;
    }
    for (path, content) in files {
        disk.put(&path, content);
    }
    disk.set_capacity(Some(CAPACITY_BYTES));
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    for unpack in [false, true] {
        if let Ok(report) = verify_dir(&disk, dir, VerifyOptions { unpack }, &mut |_, _| {}) {
            assert!(report.findings.len() < MAX_STEPS, "findings without end");
        }
    }
    for (number, path) in segment::list(&disk, dir).unwrap_or_default() {
        if let Ok(segment) = SegmentFile::open(&disk, &path, number) {
            look(&segment);
        }
    }
    for from in [None, Some(FIRST_LSN + 3), Some(Lsn::MAX.0)] {
        let _ = dump(&shared, dir, from);
    }
    if let Ok(mut reader) = Reader::open(shared.clone(), dir) {
        for time_ns in [0, FIRST_TIME_NS + 4, u64::MAX] {
            let _ = reader.seek_time(time_ns);
            let _ = reader.next(&mut Vec::new(), Limit::End);
        }
        let _ = reader.seek_epoch_above(1);
        let held = reader.position();
        let _ = reader.seek(&held);
    }
    let _ = go_on(&shared, dir);
    // What was gone on with holds: a second start finds what the first left, or refuses as it did.
    let _ = go_on(&shared, dir);
}

/// What `ls` and the index of a sealed segment are asked.
fn look(segment: &SegmentFile) {
    let mut walk = Walk::new(segment);
    let mut steps = 0;
    while let Ok((_, Item::Frame(_) | Item::Mark(_))) = walk.step() {
        steps += 1;
        assert!(steps < MAX_STEPS, "a walk without end");
    }
    let Ok(index) = SegmentIndex::of(segment) else { return };
    assert!(index.frames().count() + index.extents().count() < MAX_STEPS, "a footer of more than its bytes");
    for from in [0, 4096, u64::MAX - 4096] {
        let _ = index.extents_in(VolumeId(0), from..u64::MAX).count();
    }
    let at = index.partition(|entry| entry.last_lsn < Lsn(FIRST_LSN + 3));
    let _ = u32::try_from(at).map(|at| index.frame(at));
    let _ = index.summary(segment);
    if let Ok(layout) = crate::mend::Layout::of_sealed(segment)
        && let Ok(rot) = crate::mend::look(segment, &layout)
    {
        for run in &rot.runs {
            let _ = (run.offset(), run.bytes(), run.check_all(&[]));
        }
    }
}

/// As `journal dump` reads a journal.
fn dump(disk: &Arc<dyn Disk>, dir: &Path, from: Option<u64>) -> Result<()> {
    let mut reader = Reader::open(disk.clone(), dir)?;
    if let Some(from) = from {
        reader.seek_lsn(Lsn(from))?;
    }
    let mut decoder = Decoder::new()?;
    let (mut frame, mut raw, mut steps) = (Vec::new(), Vec::new(), 0);
    while let Some(header) = reader.next(&mut frame, Limit::End)? {
        steps += 1;
        assert!(steps < MAX_STEPS, "a journal without end");
        decoder.decode(&header, &frame, &mut raw)?;
        let _ = Records::check(&header, &raw);
        for located in Records::new(&raw).map_while(Result::ok) {
            let (record, payload) = (located.record, located.payload);
            let _ = (record.lsn.next(), record.extent.end());
            match record.op {
                Op::Volume => drop(VolumeRecord::decode(payload)),
                Op::ClockJump => drop(crate::clock_step::ClockStep::decode(payload, record.time_ns)),
                _ => {}
            }
        }
    }
    Ok(())
}

/// What a daemon does: recovery, a frame, a sync, a new epoch, retention.
fn go_on(disk: &Arc<dyn Disk>, dir: &Path) -> Result<()> {
    let options = WriterOptions { group: GROUP, segment_bytes: SEGMENT_BYTES };
    let (mut writer, recovery) = Writer::open(disk.clone(), dir, options, FIRST_TIME_NS)?;
    let held = recovery.position;
    let stamp = Stamp { group: GROUP, lineage: held.lineage, epoch: held.epoch };
    let record = sample_record(Op::Write, held.lsn.0.saturating_add(1));
    let (frame, header) = encode(&record, &[5; 512], &stamp, None, held.chain, Compression::Off)?;
    writer.append(&frame, &header, FIRST_TIME_NS)?;
    writer.sync()?;
    for number in writer.segments().iter().map(|segment| segment.number).collect::<Vec<_>>() {
        let layout = writer.layout(number);
        drop(layout);
    }
    let epoch = Epoch { number: held.epoch.number.saturating_add(1), id: EpochId([9; 16]) };
    let start = Position::epoch_start(held.lineage, epoch, writer.appended().lsn);
    writer.begin_epoch(start, FIRST_TIME_NS)?;
    writer.sync()?;
    let segments = writer.segments();
    let source = SourcePolicy { quota_bytes: SEGMENT_BYTES };
    let _ = (source.keep_from(segments, &held), source.over_quota_bytes(segments, &held));
    let receiver = ReceiverPolicy { history_ns: 9, history_min_ns: 1, quota_bytes: SEGMENT_BYTES };
    let _ = receiver.decide(segments, held.lsn);
    writer.drop_before(recovery.segment)?;
    Ok(())
}

fn sample_record(op: Op, lsn: u64) -> Record {
    let extent = match op {
        Op::Write | Op::Discard | Op::WriteZeroes | Op::SyncSlot | Op::Failed => {
            Extent { offset: (lsn % 64) << 16, len: 512 }
        }
        _ => Extent::default(),
    };
    let time_ns = FIRST_TIME_NS + lsn % 100_000;
    Record { op, flags: 0, volume: VolumeId(0), lsn: Lsn(lsn), time_ns, extent }
}

fn encode(
    record: &Record,
    payload: &[u8],
    stamp: &Stamp,
    batch_number: Option<u64>,
    chain: u64,
    compression: Compression,
) -> Result<(Vec<u8>, FrameHeader)> {
    let mut batch = Batch::default();
    batch.push(record, payload);
    let encoded = Encoder::new()?.encode(&batch, stamp, batch_number, compression, Vec::new())?;
    let (frame, _) = encoded.seal(chain);
    let header = FrameHeader::parse(&frame)?;
    Ok((frame, header))
}

/// Segments of two epochs, the last still being written, and a control file; or two undo segments.
pub fn sample(undo: bool) -> Option<Files> {
    static MADE: OnceLock<[Option<Files>; 2]> = OnceLock::new();
    MADE.get_or_init(|| [make(false).ok(), make(true).ok()])[usize::from(undo)].clone()
}

fn make(undo: bool) -> Result<Files> {
    let disk = SimDisk::new();
    let dir = Path::new(DIR);
    let failed = |error| crate::Error::io("make a sample", error);
    disk.create_dir(dir).map_err(failed)?;
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    if undo {
        make_undo(&shared, dir)?
    } else {
        make_journal(shared, dir)?
    }
    let names = disk.list(dir).map_err(failed)?;
    let content = |name: String| Some((dir.join(&name), disk.contents(&dir.join(&name))?));
    Ok(names.into_iter().filter_map(content).collect())
}

fn make_journal(disk: Arc<dyn Disk>, dir: &Path) -> Result<()> {
    let options = WriterOptions { group: GROUP, segment_bytes: SEGMENT_BYTES };
    let epoch = |number| Epoch { number, id: EpochId([3; 16]) };
    let start = Position::epoch_start(LINEAGE, epoch(70), Lsn(FIRST_LSN - 1));
    let mut writer = Writer::create(disk, dir, options, start, FIRST_TIME_NS)?;
    let volume = VolumeRecord {
        uuid: crate::VolumeUuid([4; 16]),
        size_bytes: 8 << 20,
        sector_bytes: 512,
        present: true,
        name: "v".into(),
    };
    let step = crate::clock_step::ClockStep {
        by_ns: 5,
        since_lsn: Lsn(FIRST_LSN),
        since_time_ns: FIRST_TIME_NS,
        shown_ns: FIRST_TIME_NS + 9,
        is_measured: true,
    };
    let ops = [Op::Volume, Op::Write, Op::Discard, Op::Bookmark, Op::ClockJump, Op::Failed, Op::SyncSlot];
    for at in 0..24_u64 {
        if at == 16 {
            writer.begin_epoch(
                Position::epoch_start(LINEAGE, epoch(71), writer.appended().lsn),
                FIRST_TIME_NS + at,
            )?;
        }
        let held = writer.appended();
        let op = ops[usize::try_from(at).unwrap_or(0) % ops.len()];
        let payload = match op {
            Op::Volume => volume.encode(),
            Op::Write | Op::SyncSlot => vec![7; 512],
            Op::Bookmark => b"name".to_vec(),
            Op::ClockJump => step.encode().to_vec(),
            Op::Failed => FIRST_LSN.to_le_bytes().to_vec(),
            _ => Vec::new(),
        };
        let compression = if at % 8 == 7 { Compression::Zstd(1) } else { Compression::Off };
        let stamp = Stamp { group: GROUP, lineage: LINEAGE, epoch: held.epoch };
        let record = sample_record(op, held.lsn.0 + 1);
        let (frame, header) = encode(&record, &payload, &stamp, None, held.chain, compression)?;
        writer.append(&frame, &header, FIRST_TIME_NS + at)?;
        if at % 3 == 2 {
            writer.sync()?;
        }
    }
    Ok(())
}

fn make_undo(disk: &Arc<dyn Disk>, dir: &Path) -> Result<()> {
    let epoch = Epoch { number: 70, id: EpochId([3; 16]) };
    let start = Position::epoch_start(LINEAGE, epoch, Lsn(FIRST_LSN - 1));
    // The second stands for itself and the two before it, which were merged into it.
    for (number, merged_from) in [(501, 0), (504, 502)] {
        let header = SegmentHeader {
            kind: SegmentKind::Undo,
            flags: 0,
            group: GROUP,
            number,
            first_lsn: Lsn(FIRST_LSN),
            last_lsn: Lsn(FIRST_LSN + 9),
            start,
            received_ns: FIRST_TIME_NS,
            allocated_bytes: 0,
            nonce: 0,
            merged_from,
        };
        let mut writer = crate::sealed::SealedWriter::create(disk.clone(), dir, header)?;
        for lsn in [FIRST_LSN + 3, FIRST_LSN + 5] {
            let record = sample_record(Op::Write, lsn);
            let stamp = Stamp { group: GROUP, lineage: LINEAGE, epoch };
            let (frame, header) =
                encode(&record, &[7; 512], &stamp, Some(number), writer.chain(), Compression::Off)?;
            let raw = Decoder::new().and_then(|mut decoder| {
                let mut raw = Vec::new();
                decoder.decode(&header, &frame, &mut raw).map(|()| raw)
            })?;
            writer.append(&frame, &header, &raw)?;
        }
        writer.finish()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::steer::sound_frames;

    /// What the fuzzer changes must get behind the checksums, or it tests nothing but them.
    #[test]
    fn files_are_whole_before_and_sound_after_each_change() {
        for undo in [false, true] {
            let files = sample(undo).unwrap();
            let segment = files.keys().next().unwrap().clone();
            let frames = sound_frames(&files, &segment);
            assert!(frames >= 2, "{frames} frames");
            let mut same = files.clone();
            steer(&mut same, &mut Input(&[0, 0]));
            assert_eq!(same, files, "nothing was changed, so every checksum is as its writer wrote it");
            // Op 10 on the first structure, field 12 (the start's lsn), everywhere within 255 of it, by one.
            let mut moved = files.clone();
            steer(&mut moved, &mut Input(&[0, 1, 10, 0, 0, 0, 0, 12, 12, 255]));
            assert_ne!(moved, files);
            let disk = SimDisk::new();
            moved.iter().for_each(|(path, content)| disk.put(path, content.clone()));
            // Not unpacked: what is compressed says the old lsns.
            let report = verify_dir(&disk, Path::new(DIR), VerifyOptions::default(), &mut |_, _| {}).unwrap();
            assert_eq!(report.findings, [], "lsns that moved together are as good as the others");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config::with_cases(64))]

        /// The fuzzer runs elsewhere and longer; this keeps its entry point alive.
        #[test]
        fn hostile_directories_never_panic(bytes in proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..96)) {
            directory(&bytes);
        }
    }
}
