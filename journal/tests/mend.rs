//! Frames and marks that rotted are put back as the very same bytes, wherever the damage is and wherever the
//! power goes; anything else that is offered in their place is refused, and nothing is written.
#![allow(clippy::unwrap_used, reason = "a failing step fails the test")]

mod common;

use common::{Frame, dir, epoch_start, frame_after, options, read_all, shared};
use journal::mend::{Rot, look};
use journal::sim_disk::SimDisk;
use journal::verify::{VerifyOptions, verify_dir};
use journal::walk::SegmentFile;
use journal::writer::Writer;
use journal::{ErrorKind, Position, Result};
use std::path::PathBuf;

const SEGMENT_BYTES: u64 = 8192;

/// A sealed segment, a second one, and the active one; marks behind every other frame.
fn journal(sim: &SimDisk) -> (Writer, Vec<Frame>) {
    let mut writer =
        Writer::create(shared(sim), &dir(), options(SEGMENT_BYTES), epoch_start(1, 0), 0).unwrap();
    let mut frames = Vec::new();
    while writer.segments().len() < 3 || frames.len() % 2 == 1 {
        let frame = frame_after(&writer.appended(), 150 + frames.len() * 7);
        writer.append(&frame.bytes, &frame.header, 5).unwrap();
        if frames.len() % 2 == 1 {
            writer.sync().unwrap();
        }
        frames.push(frame);
    }
    (writer, frames)
}

fn rot_of(sim: &SimDisk, writer: &Writer, number: u64) -> Rot {
    let path = path_of(number);
    let segment = SegmentFile::open(sim, &path, number).unwrap();
    look(&segment, &writer.layout(number).unwrap()).unwrap()
}

fn path_of(number: u64) -> PathBuf {
    dir().join(journal::segment::file_name(number))
}

/// Mends whatever does not hold; says how many frames and marks that were.
fn mend(sim: &SimDisk, writer: &mut Writer, frames: &[Frame], number: u64) -> Result<(usize, usize)> {
    let (mut mended, mut marks) = (0, 0);
    for _ in 0..3 {
        let rot = rot_of(sim, writer, number);
        for run in &rot.runs {
            let whole: Vec<Vec<u8>> = run
                .frames
                .iter()
                .map(|entry| {
                    frames.iter().find(|f| f.header.last_lsn == entry.last_lsn).unwrap().bytes.clone()
                })
                .collect();
            writer.mend(run, &whole)?;
            mended += whole.len();
        }
        for mark in &rot.marks {
            writer.mend_mark(mark)?;
            marks += 1;
        }
    }
    Ok((mended, marks))
}

#[test]
fn every_sector_of_frames_and_marks_is_put_back() {
    let sim = SimDisk::new();
    let (mut writer, frames) = journal(&sim);
    for number in 1..=3 {
        let whole = sim.contents(&path_of(number)).unwrap();
        let layout = writer.layout(number).unwrap();
        assert_eq!(rot_of(&sim, &writer, number), Rot::default(), "what is whole is left alone");
        let (mut all_frames, mut all_marks) = (0, 0);
        for offset in (512..layout.end_offset).step_by(512) {
            sim.corrupt(&path_of(number), offset + 100, |byte| byte ^ 0x40);
            let (mended, marks) = mend(&sim, &mut writer, &frames, number).unwrap();
            assert_eq!(mended + marks, 1, "segment {number} offset {offset}");
            assert_eq!(sim.contents(&path_of(number)).unwrap(), whole, "segment {number} offset {offset}");
            (all_frames, all_marks) = (all_frames + mended, all_marks + marks);
        }
        assert!(all_frames > 1 && (all_marks > 0 || number == 3), "{all_frames} {all_marks}");
        // All of it at once: a run from the first frame to the last.
        for offset in (512..layout.end_offset).step_by(512) {
            sim.corrupt(&path_of(number), offset, |byte| byte ^ 0xff);
        }
        mend(&sim, &mut writer, &frames, number).unwrap();
        assert_eq!(sim.contents(&path_of(number)).unwrap(), whole, "segment {number}");
    }
    assert_eq!(read_all(&shared(&sim), &dir()).unwrap().len(), frames.len());
}

#[test]
fn another_frame_is_refused_and_nothing_is_written() {
    let sim = SimDisk::new();
    let (mut writer, frames) = journal(&sim);
    let layout = writer.layout(1).unwrap();
    sim.corrupt(&path_of(1), layout.frames[1].offset + 200, |byte| byte ^ 1);
    let rotten = sim.contents(&path_of(1)).unwrap();
    let rot = rot_of(&sim, &writer, 1);
    let run = &rot.runs[0];
    let held = frames[0].header.position();
    assert_eq!((rot.runs.len(), run.after, run.end), (1, held, frames[1].header.position()));
    let forged = |held: &Position, payload| frame_after(held, payload).bytes;
    let mut flipped = frames[1].bytes.clone();
    flipped[200] ^= 1;
    let offers = [
        vec![],
        vec![frames[0].bytes.clone()],
        vec![frames[2].bytes.clone()],
        vec![frames[1].bytes.clone(), frames[2].bytes.clone()],
        vec![forged(&held, 151)],
        vec![forged(&epoch_start(2, held.lsn.0), 157)],
        vec![flipped],
        vec![frames[1].bytes[..384].to_vec()],
        vec![vec![]],
    ];
    for (at, offer) in offers.iter().enumerate() {
        let error = writer.mend(run, offer).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::OutOfOrder | ErrorKind::Malformed), "offer {at}: {error}");
        assert_eq!(sim.contents(&path_of(1)).unwrap(), rotten, "offer {at}");
    }
    writer.mend(run, &[frames[1].bytes.clone()]).unwrap();
    assert_eq!(rot_of(&sim, &writer, 1), Rot::default());

    // A segment that was dropped, and its file recycled, is none of the writer's business any more.
    sim.corrupt(&path_of(1), layout.frames[1].offset + 200, |byte| byte ^ 1);
    let run = rot_of(&sim, &writer, 1).runs.remove(0);
    writer.drop_before(2).unwrap();
    assert_eq!(writer.mend(&run, &[frames[1].bytes.clone()]).unwrap_err().kind, ErrorKind::NotHeld);
}

#[test]
fn a_mend_that_is_cut_anywhere_leaves_nothing_worse() {
    let base = SimDisk::new();
    let (writer, frames) = journal(&base);
    let layout = writer.layout(1).unwrap();
    for entry in &layout.frames[1..3] {
        base.corrupt(&path_of(1), entry.offset + 60, |byte| byte ^ 1);
    }
    drop(writer);
    let base = base.crash(0);
    let open = |sim: &SimDisk| Writer::open(shared(sim), &dir(), options(SEGMENT_BYTES), 0).unwrap().0;
    let operations = {
        let sim = base.crash(0);
        let mut writer = open(&sim);
        let before = sim.ops();
        assert_eq!(mend(&sim, &mut writer, &frames, 1).unwrap(), (2, 0));
        sim.ops() - before
    };
    for cut in 0..=operations {
        for seed in 0..8 {
            let sim = base.crash(seed);
            let mut writer = open(&sim);
            sim.cut_at(sim.ops() + cut);
            let _ = mend(&sim, &mut writer, &frames, 1);
            drop(writer);
            let after = sim.crash(seed + 100 * cut);
            let mut writer = open(&after);
            mend(&after, &mut writer, &frames, 1).unwrap();
            let report = verify_dir(&after, &dir(), VerifyOptions { unpack: true }, &mut |_, _| {}).unwrap();
            assert_eq!(report.findings, [], "cut {cut} seed {seed}");
            assert_eq!(read_all(&shared(&after), &dir()).unwrap().len(), frames.len());
        }
    }
}
