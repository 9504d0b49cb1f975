//! Readers: seeking, crossing segments and epochs, following a writer, and being overtaken by its drops.
#![allow(clippy::unwrap_used, reason = "a failing step fails the test")]

mod common;

use common::{Frame, GROUP, dir, epoch_start, frame_after, options, read_all, shared};
use journal::buffered_disk::BufferedDisk;
use journal::frame::FrameHeader;
use journal::io::Disk;
use journal::reader::Reader;
use journal::sim_disk::SimDisk;
use journal::tail::Limit;
use journal::verify::{VerifyOptions, verify_dir};
use journal::writer::{Writer, WriterOptions};
use journal::{ErrorKind, GroupId, Lineage, Lsn, Position};
use std::sync::Arc;

/// Frames over several segments and two epochs, with a gap of lsns between them; one segment holds nothing.
fn journal() -> (SimDisk, Writer, Vec<Frame>) {
    let sim = SimDisk::new();
    let mut writer = Writer::create(shared(&sim), &dir(), options(8192), epoch_start(1, 0), 0).unwrap();
    let mut frames = Vec::new();
    for step in 0..40 {
        let frame = frame_after(&writer.appended(), 300 + step * 31);
        writer.append(&frame.bytes, &frame.header, step as u64).unwrap();
        frames.push(frame);
        if step % 4 == 0 {
            writer.sync().unwrap();
        }
        if step == 20 {
            writer.begin_epoch(epoch_start(2, 1000), 20).unwrap();
            writer.begin_epoch(epoch_start(5, 2000), 20).unwrap();
        }
    }
    writer.sync().unwrap();
    assert!(writer.segments().len() > 6);
    (sim, writer, frames)
}

/// At the source, where reserving blocks and giving them back in the middle of the stream would keep the ring
/// waiting.
#[test]
fn on_a_disk_that_does_not_wait_segments_grow_and_a_spare_keeps_its_size() {
    let sim = SimDisk::new();
    let disk: Arc<dyn Disk> = Arc::new(BufferedDisk::new(shared(&sim)));
    let size = 4 << 20;
    let mut writer = Writer::create(disk.clone(), &dir(), options(size), epoch_start(1, 0), 0).unwrap();
    let mut frames = Vec::new();
    let mut append = |writer: &mut Writer, payload: usize| {
        let frame = frame_after(&writer.appended(), payload);
        writer.append(&frame.bytes, &frame.header, 1).unwrap();
        frames.push(frame);
    };
    while writer.segments().len() < 4 {
        append(&mut writer, 60_000);
    }
    append(&mut writer, 1000);
    writer.begin_epoch(epoch_start(2, 1000), 2).unwrap();
    append(&mut writer, 1000);
    let on_disk =
        |writer: &Writer, at: usize| disk.open_read(&writer.segments()[at].path).unwrap().size().unwrap();
    assert!(on_disk(&writer, 4) < 4096, "no room is reserved");
    for at in 0..4 {
        assert_eq!(on_disk(&writer, at), writer.segments()[at].bytes);
    }
    let former = writer.segments()[0].bytes;
    drop(writer);
    let report = verify_dir(&*disk, &dir(), VerifyOptions { unpack: true }, &mut |_, _| {}).unwrap();
    assert_eq!((report.findings, report.frames), (Vec::new(), frames.len() as u64));
    assert_eq!(read_all(&disk, &dir()).unwrap(), frames);
    let (mut writer, recovery) = Writer::open(disk.clone(), &dir(), options(size), 3).unwrap();
    assert_eq!((recovery.position, recovery.torn), (frames.last().unwrap().header.position(), None));
    // Its file comes back as a spare, and is filled up.
    let second = writer.segments()[1].number;
    assert_eq!(writer.drop_before(second).unwrap(), former);
    while writer.segments().len() < 6 {
        let frame = frame_after(&writer.appended(), 100_000);
        writer.append(&frame.bytes, &frame.header, 4).unwrap();
        frames.push(frame);
    }
    assert_eq!((writer.segments()[4].bytes, on_disk(&writer, 4)), (former, former), "the spare, sealed");
    assert!(read_all(&disk, &dir()).unwrap().ends_with(&frames[frames.len() - 30..]));
    let report = verify_dir(&*disk, &dir(), VerifyOptions { unpack: true }, &mut |_, _| {}).unwrap();
    assert_eq!(report.findings, Vec::new());
}

fn rest(reader: &mut Reader) -> Vec<FrameHeader> {
    let mut bytes = Vec::new();
    let mut headers = Vec::new();
    while let Some(header) = reader.next(&mut bytes, Limit::End).unwrap() {
        headers.push(header);
    }
    headers
}

#[test]
fn a_reader_goes_to_any_position_that_is_in_this_history_and_to_no_other() {
    let (sim, _writer, frames) = journal();
    let headers: Vec<FrameHeader> = frames.iter().map(|frame| frame.header).collect();
    let mut reader = Reader::open(shared(&sim), &dir()).unwrap();
    assert_eq!(rest(&mut reader), headers);
    reader.seek(&epoch_start(1, 0)).unwrap();
    assert_eq!(rest(&mut reader), headers);
    for (at, header) in headers.iter().enumerate() {
        let held = header.position();
        reader.seek(&held).unwrap();
        assert_eq!(reader.position(), held);
        assert_eq!(rest(&mut reader), headers[at + 1..], "after frame {at}");
        reader.seek_lsn(header.first_lsn).unwrap();
        assert_eq!(rest(&mut reader), headers[at..], "lsn {}", header.first_lsn);
        for time_ns in [header.first_time_ns - 1, header.first_time_ns] {
            reader.seek_time(time_ns).unwrap();
            assert_eq!(rest(&mut reader), headers[at..], "time {time_ns}");
        }
        let mut other = held;
        other.epoch.id.0[5] ^= 1;
        for wrong in [
            Position { chain: held.chain ^ 1, ..held },
            Position { lineage: Lineage([0; 16]), ..held },
            other,
        ] {
            assert_eq!(reader.seek(&wrong).unwrap_err().kind, ErrorKind::OutOfOrder, "{wrong:?}");
        }
    }
    reader.seek_lsn(Lsn(500)).unwrap();
    assert_eq!(rest(&mut reader), headers[21..], "in the gap between epochs: the first frame after it");
    reader.seek_time(u64::MAX).unwrap();
    assert_eq!(rest(&mut reader), []);
    let newest = headers[39].position();
    let beyond = Position { lsn: newest.lsn.next(), ..newest };
    assert_eq!(reader.seek(&beyond).unwrap_err().kind, ErrorKind::NotHeld);
    assert_eq!(reader.seek_lsn(beyond.lsn).unwrap_err().kind, ErrorKind::NotHeld);
    let later = Position { epoch: epoch_start(9, 0).epoch, ..newest };
    assert_eq!(reader.seek(&later).unwrap_err().kind, ErrorKind::NotHeld);
    let ended = Position { lsn: Lsn(900), ..headers[20].position() };
    assert_eq!(reader.seek(&ended).unwrap_err().kind, ErrorKind::OutOfOrder, "epoch 1 ended before lsn 900");
}

#[test]
fn a_reader_follows_the_writer_strictly_up_to_the_limit() {
    let sim = SimDisk::new();
    let mut writer = Writer::create(shared(&sim), &dir(), options(8192), epoch_start(1, 0), 0).unwrap();
    let tail = writer.shared();
    let mut appended = Reader::open(shared(&sim), &dir()).unwrap();
    let mut durable = Reader::open(shared(&sim), &dir()).unwrap();
    let (mut bytes, mut synced) = (Vec::new(), Lsn(0));
    for step in 1..60_u64 {
        let frame = frame_after(&writer.appended(), 700);
        assert!(appended.next(&mut bytes, Limit::UpTo(tail.appended())).unwrap().is_none());
        writer.append(&frame.bytes, &frame.header, step).unwrap();
        let got = appended.next(&mut bytes, Limit::UpTo(tail.appended())).unwrap();
        assert_eq!((got, &bytes), (Some(frame.header), &frame.bytes));
        if step % 5 == 0 {
            synced = writer.sync().unwrap().lsn;
        }
        // A roll makes what came before it durable, too.
        synced = synced.max(writer.durable().lsn);
        while durable.next(&mut bytes, Limit::UpTo(tail.durable())).unwrap().is_some() {}
        assert_eq!(durable.position().lsn, synced, "step {step}");
    }
}

#[test]
fn a_segment_dropped_under_a_reader_is_not_held_and_not_corrupt() {
    let (sim, mut writer, _) = journal();
    let tail = writer.shared();
    let mut readers: Vec<Reader> = (0..8).map(|_| Reader::open(shared(&sim), &dir()).unwrap()).collect();
    let mut bytes = Vec::new();
    for (frames, reader) in readers.iter_mut().enumerate() {
        for _ in 0..frames {
            reader.next(&mut bytes, Limit::UpTo(tail.appended())).unwrap().unwrap();
        }
    }
    let before = writer.journal_bytes();
    let third = writer.segments()[3].number;
    let freed = writer.drop_before(third).unwrap();
    assert_eq!(writer.journal_bytes(), before - freed);
    assert_eq!(writer.oldest(), writer.segments()[0].start);
    // Go on until the dropped files are recycled and overwritten.
    for _ in 0..30 {
        let frame = frame_after(&writer.appended(), 1500);
        writer.append(&frame.bytes, &frame.header, 99).unwrap();
    }
    for mut reader in readers {
        let error = loop {
            match reader.next(&mut bytes, Limit::UpTo(tail.appended())) {
                Ok(header) => assert!(header.is_some(), "the reader cannot get through"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind, ErrorKind::NotHeld, "{error}");
        assert_eq!(reader.seek(&epoch_start(1, 0)).unwrap_err().kind, ErrorKind::NotHeld);
        reader.seek(&writer.oldest()).unwrap();
        assert_eq!(reader.oldest(), writer.oldest());
        reader.next(&mut bytes, Limit::UpTo(tail.appended())).unwrap().unwrap();
    }
}

#[test]
fn only_what_follows_is_appended() {
    let (sim, mut writer, frames) = journal();
    let held = writer.appended();
    let refused = |writer: &mut Writer, frame: &Frame| {
        let error = writer.append(&frame.bytes, &frame.header, 1).unwrap_err();
        assert_eq!(error.kind, ErrorKind::OutOfOrder, "{error}");
    };
    refused(&mut writer, &frames[0]);
    refused(&mut writer, &frames[39]);
    refused(&mut writer, &frame_after(&Position { chain: 1, ..held }, 10));
    refused(&mut writer, &frame_after(&epoch_start(7, held.lsn.0), 10));
    for start in [epoch_start(5, 9999), epoch_start(6, 1), Position { chain: 0, ..epoch_start(6, 9999) }] {
        assert_eq!(writer.begin_epoch(start, 1).unwrap_err().kind, ErrorKind::OutOfOrder);
    }
    assert_eq!(read_all(&shared(&sim), &dir()).unwrap(), frames, "a refusal changes nothing");
    let other = WriterOptions { group: GroupId([1; 16]), ..options(8192) };
    assert_eq!(Writer::open(shared(&sim), &dir(), other, 1).err().unwrap().kind, ErrorKind::OutOfOrder);
    let error = Writer::create(shared(&sim), &dir(), options(8192), epoch_start(1, 0), 0).err().unwrap();
    assert_eq!(error.kind, ErrorKind::Busy);
    assert_eq!(other.group, GroupId([1; 16]));
    assert_ne!(other.group, GROUP);
}

#[test]
fn a_reopened_journal_tells_the_same_story() {
    let (sim, writer, frames) = journal();
    let told = writer.segments().to_vec();
    let (position, oldest) = (writer.appended(), writer.oldest());
    drop(writer);
    let (again, recovery) = Writer::open(shared(&sim), &dir(), options(8192), 77).unwrap();
    assert_eq!((again.appended(), again.durable(), again.oldest()), (position, position, oldest));
    assert_eq!((recovery.position, recovery.torn), (position, None));
    let (last, sealed) = told.split_last().unwrap();
    assert_eq!(&again.segments()[..sealed.len()], sealed);
    let active = again.segments().last().unwrap();
    assert_eq!((active.number, active.end, active.frames), (last.number, last.end, last.frames));
    assert_eq!(active.received_last_ns, last.received_last_ns, "receipts survive in marks and footers");
    assert_eq!(read_all(&shared(&sim), &dir()).unwrap(), frames);
}
