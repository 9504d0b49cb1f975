//! `journal`: looking into journal and undo directories. Only reads; works beside a running daemon and without one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::journal::compress::Decoder;
use ::journal::frame::FrameHeader;
use ::journal::index::SegmentIndex;
use ::journal::io::{Disk, RealDisk};
use ::journal::reader::Reader;
use ::journal::record::{Op, Record, Records};
use ::journal::segment::{self, SegmentKind};
use ::journal::tail::Limit;
use ::journal::verify::{Report, Severity, VerifyOptions, verify_dir};
use ::journal::walk::{Item, SegmentFile, Walk};
use ::journal::{ErrorKind, Lsn};
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use crate::args::{JournalArgs, JournalCommand};
use crate::exit::{Fault, Kind};
use crate::output::{self, size};

/// `afterimage journal ls|verify|dump`.
pub fn run(command: JournalCommand) -> Result<()> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    match command {
        JournalCommand::Ls(args) => list(&*disk, &args),
        JournalCommand::Verify(args) => verify(&*disk, &args),
        JournalCommand::Dump { args, from, to } => dump(&disk, &args, Lsn(from), Lsn(to)),
    }
}

/// The directories with segments that DIR means: itself, or a group's journal and undo.
fn dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let parts: Vec<PathBuf> =
        ["journal", "undo"].map(|part| dir.join(part)).into_iter().filter(|p| p.is_dir()).collect();
    if !parts.is_empty() {
        return Ok(parts);
    }
    if !dir.is_dir() {
        anyhow::bail!(Fault::usage(format!("{} is not a directory", dir.display())));
    }
    Ok(vec![dir.to_owned()])
}

/// One segment, as `ls` shows it.
#[derive(Serialize)]
struct Listed {
    file: PathBuf,
    kind: &'static str,
    sealed: bool,
    bytes: u64,
    frames: usize,
    epoch: u64,
    first_lsn: Option<Lsn>,
    last_lsn: Option<Lsn>,
    first_time: Option<String>,
    last_time: Option<String>,
    /// What is wrong with it, as far as a look tells; `verify` looks at every byte.
    damage: Option<String>,
}

fn list(disk: &dyn Disk, args: &JournalArgs) -> Result<()> {
    let mut rows = Vec::new();
    for dir in dirs(&args.dir)? {
        for (number, path) in segment::list(disk, &dir)? {
            let listed = look(disk, number, path);
            if args.json {
                output::line(serde_json::to_string(&listed)?)?;
            } else {
                rows.push(listed.row());
            }
        }
    }
    if args.json {
        return Ok(());
    }
    output::line(output::table(
        &["SEGMENT", "KIND", "STATE", "BYTES", "FRAMES", "EPOCH", "LSN", "FROM", "TO"],
        &rows,
    ))
}

fn look(disk: &dyn Disk, number: u64, path: PathBuf) -> Listed {
    let mut listed = Listed {
        file: path.clone(),
        kind: "unknown",
        sealed: false,
        bytes: 0,
        frames: 0,
        epoch: 0,
        first_lsn: None,
        last_lsn: None,
        first_time: None,
        last_time: None,
        damage: None,
    };
    let looked = SegmentFile::open(disk, &path, number).and_then(|segment| listed.fill(&segment));
    listed.damage = looked.err().map(|error| error.to_string());
    listed
}

impl Listed {
    fn fill(&mut self, segment: &SegmentFile) -> ::journal::Result<()> {
        self.bytes = segment.size;
        self.epoch = segment.header.start.epoch.number;
        self.kind = match segment.header.kind {
            SegmentKind::Journal => "journal",
            SegmentKind::Undo => "undo",
        };
        match SegmentIndex::of(segment) {
            Ok(index) => {
                self.sealed = true;
                for frame in index.frames() {
                    self.add((frame.first_lsn, frame.first_time_ns), (frame.last_lsn, frame.last_time_ns));
                }
            }
            // Without a footer it is the one being written, which ends where its frames end.
            Err(error) if error.kind == ErrorKind::Corrupt => {
                let mut walk = Walk::new(segment);
                loop {
                    match walk.step()?.1 {
                        Item::Frame(frame) => {
                            self.add(
                                (frame.first_lsn, frame.first_time_ns),
                                (frame.last_lsn, frame.last_time_ns),
                            );
                        }
                        Item::Mark(_) => {}
                        Item::End => break,
                        // A footer stands here, and did not hold.
                        Item::Footer => return Err(error),
                    }
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn add(&mut self, first: (Lsn, u64), last: (Lsn, u64)) {
        self.frames += 1;
        self.first_lsn.get_or_insert(first.0);
        self.first_time.get_or_insert_with(|| rfc3339(first.1));
        self.last_lsn = Some(last.0);
        self.last_time = Some(rfc3339(last.1));
    }

    fn row(&self) -> Vec<String> {
        let state = match (&self.damage, self.sealed) {
            (Some(damage), _) => format!("damaged ({damage})"),
            (None, true) => "sealed".into(),
            (None, false) => "open".into(),
        };
        let lsns = match (self.first_lsn, self.last_lsn) {
            (Some(first), Some(last)) => format!("{first}-{last}"),
            _ => "-".into(),
        };
        let text = |time: &Option<String>| time.clone().unwrap_or_else(|| "-".into());
        vec![
            self.file.display().to_string(),
            self.kind.into(),
            state,
            size(self.bytes),
            self.frames.to_string(),
            self.epoch.to_string(),
            lsns,
            text(&self.first_time),
            text(&self.last_time),
        ]
    }
}

fn verify(disk: &dyn Disk, args: &JournalArgs) -> Result<()> {
    let mut whole = Report::default();
    for dir in dirs(&args.dir)? {
        let mut bar = output::Progress::new(format!("verify {}", dir.display()));
        let report =
            verify_dir(disk, &dir, VerifyOptions { unpack: true }, &mut |done, total| bar.set(done, total));
        bar.end();
        let report = report?;
        whole.segments += report.segments;
        whole.frames += report.frames;
        whole.bytes += report.bytes;
        whole.findings.extend(report.findings);
    }
    let damaged = whole.findings.iter().filter(|finding| finding.severity == Severity::Corrupt).count();
    if args.json {
        let mut json = serde_json::to_value(&whole)?;
        json["corrupt"] = (damaged > 0).into();
        output::line(json.to_string())?;
    } else {
        for finding in &whole.findings {
            let what = match finding.severity {
                Severity::Corrupt => "CORRUPT",
                Severity::TornTail => "torn tail, never acknowledged",
            };
            let lsns = finding.lsns.map_or(String::new(), |(first, last)| format!(" (lsn {first}-{last})"));
            output::line(format!(
                "{}: offset {}: {}{lsns}: {what}",
                finding.file.display(),
                finding.offset,
                finding.what
            ))?;
        }
        let (segments, frames, bytes) = (whole.segments, whole.frames, size(whole.bytes));
        output::line(format!("{segments} segments, {frames} frames, {bytes}: {damaged} damaged places"))?;
    }
    if damaged > 0 {
        let text = format!("{}: corruption found in {damaged} places", args.dir.display());
        anyhow::bail!(Fault::new(Kind::Corrupt, text));
    }
    Ok(())
}

fn dump(disk: &Arc<dyn Disk>, args: &JournalArgs, from: Lsn, to: Lsn) -> Result<()> {
    if from > to {
        anyhow::bail!(Fault::usage(format!("--from {from} is behind --to {to}")));
    }
    let mut printer = Printer { decoder: Decoder::new()?, raw: Vec::new(), json: args.json, from, to };
    for dir in dirs(&args.dir)? {
        let segments = segment::list(&**disk, &dir)?;
        let kind = match segments.first() {
            Some((number, path)) => SegmentFile::open(&**disk, path, *number)?.header.kind,
            None => continue,
        };
        match kind {
            SegmentKind::Journal => dump_journal(disk, &dir, &mut printer)?,
            SegmentKind::Undo => dump_undo(&**disk, &segments, &mut printer)?,
        }
    }
    Ok(())
}

fn dump_journal(disk: &Arc<dyn Disk>, dir: &Path, printer: &mut Printer) -> Result<()> {
    let mut reader = Reader::open(disk.clone(), dir)?;
    if printer.from > reader.oldest().lsn {
        reader.seek_lsn(printer.from)?;
    }
    let mut frame = Vec::new();
    while let Some(header) = reader.next(&mut frame, Limit::End)? {
        if header.first_lsn > printer.to {
            break;
        }
        printer.frame("journal", &header, &frame)?;
    }
    Ok(())
}

fn dump_undo(disk: &dyn Disk, segments: &[(u64, PathBuf)], printer: &mut Printer) -> Result<()> {
    for (number, path) in segments {
        let segment = SegmentFile::open(disk, path, *number)?;
        if segment.header.last_lsn < printer.from || segment.header.first_lsn > printer.to {
            continue;
        }
        let mut walk = Walk::new(&segment);
        loop {
            match walk.step()?.1 {
                Item::Frame(header) => printer.frame("undo", &header, &walk.frame)?,
                Item::Mark(_) => {}
                Item::Footer | Item::End => break,
            }
        }
    }
    Ok(())
}

/// Unpacks frames and prints their records.
struct Printer {
    decoder: Decoder,
    raw: Vec<u8>,
    json: bool,
    from: Lsn,
    to: Lsn,
}

impl Printer {
    fn frame(&mut self, kind: &str, header: &FrameHeader, frame: &[u8]) -> Result<()> {
        self.decoder.decode(header, frame, &mut self.raw)?;
        for located in Records::new(&self.raw) {
            let located = located.context("read a record")?;
            let record = located.record;
            // Undo says what a whole batch overwrote: its records have no place of their own in the order.
            if kind == "undo" || (self.from..=self.to).contains(&record.lsn) {
                output::line(if self.json {
                    as_json(kind, header, &record)
                } else {
                    as_text(kind, &record, located.payload)
                })?;
            }
        }
        Ok(())
    }
}

fn as_text(kind: &str, record: &Record, payload: &[u8]) -> String {
    let note = match record.op {
        Op::Bookmark | Op::ResyncBegin => format!(" {:?}", String::from_utf8_lossy(payload)),
        _ => String::new(),
    };
    let (op, extent) = (op_name(record.op), record.extent);
    let time = rfc3339(record.time_ns);
    format!(
        "{kind} {} {time} {op} volume {} offset {} length {}{note}",
        record.lsn, record.volume, extent.offset, extent.len
    )
}

fn as_json(kind: &str, header: &FrameHeader, record: &Record) -> String {
    json!({
        "kind": kind,
        "epoch": header.epoch.number,
        "lsn": record.lsn,
        "time": rfc3339(record.time_ns),
        "op": op_name(record.op),
        "flags": record.flags,
        "volume": record.volume,
        "offset": record.extent.offset,
        "length": record.extent.len,
    })
    .to_string()
}

fn op_name(op: Op) -> &'static str {
    match op {
        Op::Write => "write",
        Op::Discard => "discard",
        Op::WriteZeroes => "write-zeroes",
        Op::Flush => "flush",
        Op::Bookmark => "bookmark",
        Op::Volume => "volume",
        Op::Failed => "failed",
        Op::SyncSlot => "sync-slot",
        Op::ResyncBegin => "resync-begin",
        Op::ResyncEnd => "resync-end",
        Op::Void => "void",
        Op::ClockJump => "clock-jump",
    }
}

fn rfc3339(time_ns: u64) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(time_ns))
        .map_or_else(|_| format!("{time_ns} ns"), |time| time.to_string())
}
