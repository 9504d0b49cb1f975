//! `journal dump`: records in order, unpacked.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::journal::Lsn;
use ::journal::compress::Decoder;
use ::journal::frame::FrameHeader;
use ::journal::io::Disk;
use ::journal::reader::Reader;
use ::journal::record::{InDoubt, Op, Record, Records};
use ::journal::segment::{self, SegmentKind};
use ::journal::tail::Limit;
use ::journal::walk::{Item, SegmentFile, Walk};
use anyhow::{Context, Result};
use serde_json::json;

use super::{dirs, rfc3339};
use crate::args::JournalArgs;
use crate::exit::Fault;
use crate::output;

/// `afterimage journal dump DIR`.
pub fn dump(disk: &Arc<dyn Disk>, args: &JournalArgs, from: Lsn, to: Lsn) -> Result<()> {
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
        Op::ResyncBegin => {
            let doubt = InDoubt::of(record).map(|doubt| format!(" in doubt after lsn {}", doubt.after));
            format!("{} {:?}", doubt.unwrap_or_default(), String::from_utf8_lossy(payload))
        }
        Op::Bookmark => format!(" {:?}", String::from_utf8_lossy(payload)),
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
