//! Bit rot, cuts, missing and doubled files: each is found with file and offset, nothing damaged is ever
//! replayed, and nothing panics. Only what was never synced may be called torn.
#![allow(clippy::unwrap_used, reason = "a failing step fails the test")]

mod common;

use common::{Frame, dir, epoch_start, frame_after, options, read_all, shared};
use journal::index::SegmentIndex;
use journal::reader::Reader;
use journal::segment::{self, SegmentHeader, file_name, list};
use journal::sim_disk::SimDisk;
use journal::state::CONTROL_FILE;
use journal::tail::Limit;
use journal::verify::{Report, Severity, VerifyOptions, verify_dir};
use journal::writer::Writer;
use journal::{ErrorKind, Lsn, Position};
use std::path::PathBuf;

/// Room for a handful of frames.
const SEGMENT_BYTES: u64 = 6144;

struct Journal {
    sim: SimDisk,
    frames: Vec<Frame>,
    durable: Position,
    /// The control file as it was before any of this was noted in it.
    old_control: Vec<u8>,
    /// Number and path of the segment being written, and the offset at which its durable part ends.
    active: (u64, PathBuf, u64),
    /// One sealed segment in the middle.
    sealed: (u64, PathBuf),
}

/// Three sealed segments and an active one: synced, marked, then a frame that is not.
fn journal() -> Journal {
    let sim = SimDisk::new();
    let mut writer =
        Writer::create(shared(&sim), &dir(), options(SEGMENT_BYTES), epoch_start(1, 0), 0).unwrap();
    let old_control = sim.contents(&dir().join(CONTROL_FILE)).unwrap();
    let mut frames = Vec::new();
    let mut append = |writer: &mut Writer| {
        let frame = frame_after(&writer.appended(), 150 + frames.len() * 7);
        writer.append(&frame.bytes, &frame.header, 5).unwrap();
        frames.push(frame);
    };
    while writer.segments().len() < 4 {
        append(&mut writer);
        writer.sync().unwrap();
    }
    append(&mut writer);
    writer.sync().unwrap();
    let durable = writer.durable();
    let end = writer.shared().durable().offset;
    append(&mut writer);
    let active = writer.segments().last().unwrap().clone();
    let sealed = writer.segments()[1].clone();
    Journal {
        sim,
        frames,
        durable,
        old_control,
        active: (active.number, active.path, end),
        sealed: (sealed.number, sealed.path),
    }
}

fn verify(sim: &SimDisk) -> Report {
    verify_dir(sim, &dir(), VerifyOptions { unpack: true }, &mut |_, _| {}).unwrap()
}

fn copy(sim: &SimDisk) -> SimDisk {
    let copy = SimDisk::new();
    for name in shared(sim).list(&dir()).unwrap() {
        let path = dir().join(name);
        copy.put(&path, sim.contents(&path).unwrap());
    }
    copy
}

/// Whatever a reader returns before it stops is what was written.
fn assert_reads_a_prefix(sim: &SimDisk, frames: &[Frame], at: &str) -> bool {
    let mut reader = match Reader::open(shared(sim), &dir()) {
        Ok(reader) => reader,
        Err(error) => {
            assert_eq!(error.kind, ErrorKind::Corrupt, "{at}: {error}");
            return false;
        }
    };
    let mut bytes = Vec::new();
    let mut read = 0;
    loop {
        match reader.next(&mut bytes, Limit::End) {
            Ok(Some(_)) => {
                assert_eq!(bytes, frames[read].bytes, "{at}: a damaged frame was returned");
                read += 1;
            }
            Ok(None) => return read == frames.len(),
            Err(error) => {
                assert_eq!(error.kind, ErrorKind::Corrupt, "{at}: {error}");
                return false;
            }
        }
    }
}

/// However a frame is looked for, it is found, or its damage is: no seek goes on behind it as if it had never
/// been. What was never called durable may also be beyond the newest.
fn assert_no_seek_goes_over_damage(sim: &SimDisk, frames: &[Frame], durable: Position, at: &str) {
    type Seek<'a> = Box<dyn Fn(&mut Reader) -> journal::Result<()> + 'a>;
    let mut bytes = Vec::new();
    for (number, Frame { header, .. }) in frames.iter().enumerate() {
        let mut seeks: Vec<(&str, usize, Seek<'_>)> = vec![
            ("lsn", number, Box::new(|reader| reader.seek_lsn(header.first_lsn))),
            ("time", number, Box::new(|reader| reader.seek_time(header.first_time_ns))),
        ];
        if number + 1 < frames.len() {
            seeks.push(("position", number + 1, Box::new(|reader| reader.seek(&header.position()))));
        }
        for (what, wanted, seek) in seeks {
            let lsn = frames[wanted].header.first_lsn;
            let found = Reader::open(shared(sim), &dir()).and_then(|mut reader| {
                seek(&mut reader)?;
                reader.next(&mut bytes, Limit::End)
            });
            match found {
                Ok(Some(_)) => assert_eq!(bytes, frames[wanted].bytes, "{at}: {what} of lsn {lsn}"),
                Err(error) if error.kind == ErrorKind::Corrupt => {}
                Ok(None) => assert!(lsn > durable.lsn, "{at}: {what} of lsn {lsn}: the end"),
                Err(error) => assert!(
                    error.kind == ErrorKind::NotHeld && lsn > durable.lsn,
                    "{at}: {what} of lsn {lsn}: {error}"
                ),
            }
        }
    }
}

#[test]
fn an_intact_journal_has_no_findings() {
    let journal = journal();
    let report = verify(&journal.sim);
    assert_eq!(report.findings, []);
    assert_eq!((report.segments, report.frames), (4, journal.frames.len() as u64));
    assert_eq!(read_all(&shared(&journal.sim), &dir()).unwrap(), journal.frames);
    serde_json::to_string(&report).unwrap();
}

#[test]
fn every_flip_in_a_sealed_segment_is_found_by_file_and_offset() {
    let journal = journal();
    let (_, path) = &journal.sealed;
    let index = SegmentIndex::open(&journal.sim, path).unwrap();
    let footer = index.offset();
    for at in 0..index.file_bytes() {
        journal.sim.corrupt(path, at, |byte| byte ^ 0x10);
        let report = verify(&journal.sim);
        assert!(report.is_corrupt(), "flip at {at} is not found");
        for finding in &report.findings {
            assert_eq!(&finding.file, path, "flip at {at}: {finding:?}");
            let sector = at / 512 * 512;
            let frame = index
                .frames()
                .find(|entry| (entry.offset..entry.offset + u64::from(entry.bytes)).contains(&at));
            let start = if at >= footer { footer } else { frame.map_or(sector, |entry| entry.offset) };
            let in_footer = at >= footer && finding.offset >= footer;
            assert!(finding.offset == start || in_footer, "flip at {at}: {finding:?}");
            if let Some(entry) = frame {
                assert_eq!(finding.lsns, Some((entry.first_lsn, entry.last_lsn)), "flip at {at}");
            }
        }
        let complete = assert_reads_a_prefix(&journal.sim, &journal.frames, &format!("flip at {at}"));
        assert!(!complete || at >= footer, "flip at {at}: the reader noticed nothing");
        assert_no_seek_goes_over_damage(
            &journal.sim,
            &journal.frames,
            journal.durable,
            &format!("flip at {at}"),
        );
        journal.sim.corrupt(path, at, |byte| byte ^ 0x10);
    }
    assert_eq!(verify(&journal.sim).findings, []);
}

#[test]
fn flips_in_the_active_segment_are_corruption_below_the_mark_and_torn_above() {
    let journal = journal();
    let (_, path, durable_end) = &journal.active;
    let size = journal.sim.contents(path).unwrap().len() as u64;
    // With the note in the control file, and with the marks alone.
    for (at, noted) in (0..size).flat_map(|at| [(at, true), (at, false)]) {
        let sim = copy(&journal.sim);
        if !noted {
            sim.put(&dir().join(CONTROL_FILE), journal.old_control.clone());
        }
        sim.corrupt(path, at, |byte| byte ^ 1);
        let report = verify(&sim);
        let what = format!("flip at {at}, noted: {noted}");
        let opened = Writer::open(shared(&sim), &dir(), options(SEGMENT_BYTES), 9);
        if at < *durable_end {
            let finding = report.findings.first().unwrap_or_else(|| panic!("{what} is not found"));
            assert_eq!(finding.severity, Severity::Corrupt, "{what}");
            assert!(&finding.file == path && finding.offset <= at, "{what}: {finding:?}");
            let error = opened.err().unwrap_or_else(|| panic!("{what}: opened"));
            assert_eq!(error.kind, ErrorKind::Corrupt, "{what}");
            assert!(error.at.contains(path.to_str().unwrap()), "{what}: {error} names the file");
        } else {
            assert!(!report.is_corrupt(), "{what}: {:?}", report.findings);
            let (writer, recovery) = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(writer.durable().lsn >= journal.durable.lsn, "{what}");
            assert_eq!(recovery.torn.is_some(), !report.findings.is_empty(), "{what}");
        }
        assert_reads_a_prefix(&sim, &journal.frames, &what);
        assert_no_seek_goes_over_damage(&sim, &journal.frames, journal.durable, &what);
    }
}

#[test]
fn a_cut_at_every_length_is_found_unless_it_takes_only_what_was_never_synced() {
    let journal = journal();
    for (path, durable_end) in [(&journal.sealed.1, u64::MAX), (&journal.active.1, journal.active.2)] {
        let whole = journal.sim.contents(path).unwrap();
        for length in 0..whole.len() {
            let sim = copy(&journal.sim);
            sim.put(path, whole[..length].to_vec());
            let what = format!("{} cut at {length}", path.display());
            let report = verify(&sim);
            let finding = report.findings.first().unwrap_or_else(|| panic!("{what} is not found"));
            assert_eq!(&finding.file, path, "{what}");
            assert!(finding.offset <= length as u64, "{what}: {finding:?}");
            assert_eq!(report.is_corrupt(), (length as u64) < durable_end, "{what}: {finding:?}");
            assert_reads_a_prefix(&sim, &journal.frames, &what);
            assert_no_seek_goes_over_damage(&sim, &journal.frames, journal.durable, &what);
            let opened = Writer::open(shared(&sim), &dir(), options(SEGMENT_BYTES), 9);
            // A sealed segment's frames are read, and refused, when they are needed; its footer at every
            // open.
            match opened {
                Ok((writer, _)) => {
                    assert!(!report.is_corrupt() && writer.durable().lsn >= journal.durable.lsn)
                }
                Err(error) => {
                    assert!(report.is_corrupt() && error.kind == ErrorKind::Corrupt, "{what}: {error}")
                }
            }
        }
    }
}

#[test]
fn missing_and_doubled_files_are_found() {
    let journal = journal();
    let segments = list(&journal.sim, &dir()).unwrap();
    let corrupt = |sim: &SimDisk, what: &str, file: &PathBuf| {
        let report = verify(sim);
        assert!(report.findings.iter().any(|finding| &finding.file == file), "{what}: {:?}", report.findings);
        assert!(report.is_corrupt(), "{what}");
    };
    let refused = |sim: &SimDisk, what: &str| {
        let error = Writer::open(shared(sim), &dir(), options(SEGMENT_BYTES), 9)
            .err()
            .unwrap_or_else(|| panic!("{what}"));
        assert!(matches!(error.kind, ErrorKind::Corrupt | ErrorKind::NotHeld), "{what}: {error}");
    };
    for (number, path) in &segments {
        let sim = copy(&journal.sim);
        shared(&sim).remove(path).unwrap();
        corrupt(&sim, &format!("{number} missing"), path);
        refused(&sim, &format!("{number} missing"));
        for (other, target) in segments.iter().filter(|(other, _)| other != number) {
            let sim = copy(&journal.sim);
            sim.put(target, sim.contents(path).unwrap());
            corrupt(&sim, &format!("{number} in place of {other}"), target);
            refused(&sim, &format!("{number} in place of {other}"));
            assert_reads_a_prefix(&sim, &journal.frames, &format!("{number} in place of {other}"));
        }
        for beyond in [segments.len() as u64 + 1, segments.len() as u64 + 2, 77] {
            let sim = copy(&journal.sim);
            let target = dir().join(file_name(beyond));
            sim.put(&target, sim.contents(path).unwrap());
            corrupt(&sim, &format!("{number} again as {beyond}"), &target);
            refused(&sim, &format!("{number} again as {beyond}"));
        }
        let sim = copy(&journal.sim);
        let target = dir().join(format!("copy of {}", file_name(*number)));
        sim.put(&target, sim.contents(path).unwrap());
        corrupt(&sim, "a foreign name", &target);
    }
    let sim = copy(&journal.sim);
    shared(&sim).remove(&dir().join(CONTROL_FILE)).unwrap();
    corrupt(&sim, "no control file", &dir().join(CONTROL_FILE));
    refused(&sim, "no control file");
    assert_eq!(read_all(&shared(&sim), &dir()).unwrap(), journal.frames, "a bare copy can still be read");
}

#[test]
fn flips_in_the_control_file_lose_nothing() {
    let journal = journal();
    let path = dir().join(CONTROL_FILE);
    for at in (0..8192).step_by(7) {
        let sim = copy(&journal.sim);
        sim.corrupt(&path, at, |byte| byte ^ 0x80);
        let report = verify(&sim);
        assert!(
            report.findings.iter().any(|finding| finding.file == path && finding.offset == at / 4096 * 4096)
        );
        assert!(!report.is_corrupt(), "flip at {at}: the other slot is in force: {:?}", report.findings);
        let (writer, _) = Writer::open(shared(&sim), &dir(), options(SEGMENT_BYTES), 9).unwrap();
        assert!(writer.durable().lsn >= journal.durable.lsn, "flip at {at}");
    }
}

/// A header that says that most of a terabyte was reserved is no order to reserve it.
#[test]
fn a_hostile_reservation_takes_no_more_than_a_segment() {
    let sim = SimDisk::new();
    let mut writer =
        Writer::create(shared(&sim), &dir(), options(SEGMENT_BYTES), epoch_start(1, 0), 0).unwrap();
    let frame = frame_after(&writer.appended(), 200);
    writer.append(&frame.bytes, &frame.header, 1).unwrap();
    writer.sync().unwrap();
    let path = writer.segments()[0].path.clone();
    drop(writer);
    let mut content = sim.contents(&path).unwrap();
    let size = content.len() as u64;
    let header = SegmentHeader::decode(&content).unwrap();
    let hostile = SegmentHeader { allocated_bytes: segment::MAX_BYTES, ..header };
    content[..segment::HEADER_BYTES].copy_from_slice(&hostile.encode());
    sim.put(&path, content);
    sim.set_capacity(Some(1 << 20));
    let (writer, recovery) = Writer::open(shared(&sim), &dir(), options(SEGMENT_BYTES), 1).unwrap();
    assert_eq!(writer.appended(), frame.header.position());
    assert!(recovery.torn.is_some(), "it looks cut, and what is cut off was never acknowledged");
    assert_eq!(sim.contents(&path).unwrap().len() as u64, size.max(SEGMENT_BYTES));
}

/// Where the next segment begins a newer epoch its start joins anything older: only the footer proves that
/// nothing is missing.
#[test]
fn a_cut_before_a_new_epoch_is_no_end_of_the_old_one() {
    let sim = SimDisk::new();
    let mut writer =
        Writer::create(shared(&sim), &dir(), options(SEGMENT_BYTES), epoch_start(1, 0), 0).unwrap();
    let mut frames = Vec::new();
    for step in 0..9 {
        if step == 3 || step == 6 {
            writer.begin_epoch(epoch_start(step, 1000 * step), 20).unwrap();
        }
        let frame = frame_after(&writer.appended(), 300);
        writer.append(&frame.bytes, &frame.header, step).unwrap();
        frames.push(frame);
    }
    writer.sync().unwrap();
    let durable = writer.durable();
    let cut = writer.segments()[1].path.clone();
    assert_eq!(writer.segments().len(), 3);
    drop(writer);
    assert_no_seek_goes_over_damage(&sim, &frames, durable, "whole");
    let whole = sim.contents(&cut).unwrap();
    let footer = SegmentIndex::open(&sim, &cut).unwrap().offset();
    for length in 0..whole.len() {
        sim.put(&cut, whole[..length].to_vec());
        assert_no_seek_goes_over_damage(&sim, &frames, durable, &format!("cut at {length}"));
        // A record between the epochs was never written: what follows is found, or the damage.
        let mut reader = Reader::open(shared(&sim), &dir()).unwrap();
        let found = reader.seek_lsn(Lsn(5000)).and_then(|()| reader.next(&mut Vec::new(), Limit::End));
        match found {
            Ok(next) => {
                let next = next.unwrap().first_lsn;
                assert!(next == Lsn(6001) && length as u64 > footer, "cut at {length}: {next}");
            }
            Err(error) => assert_eq!(error.kind, ErrorKind::Corrupt, "cut at {length}"),
        }
    }
}
