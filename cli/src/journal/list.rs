//! `journal ls`: one line a segment, from headers and footers; only a segment still being written is read
//! whole.

use std::path::PathBuf;

use ::journal::index::SegmentIndex;
use ::journal::io::Disk;
use ::journal::segment::{self, SegmentKind};
use ::journal::walk::{Item, SegmentFile, Walk};
use ::journal::{ErrorKind, Lsn};
use anyhow::Result;
use serde::Serialize;

use super::{dirs, rfc3339};
use crate::args::JournalArgs;
use crate::output::{self, size};

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

/// `afterimage journal ls DIR`.
pub fn list(disk: &dyn Disk, args: &JournalArgs) -> Result<()> {
    let mut rows = Vec::new();
    for dir in dirs(&args.dir)? {
        let segments = segment::list(disk, &dir)?;
        let last = segments.last().map(|(number, _)| *number);
        for (number, path) in segments {
            let listed = look(disk, number, path, last == Some(number));
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

fn look(disk: &dyn Disk, number: u64, path: PathBuf, is_last: bool) -> Listed {
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
    let looked = SegmentFile::open(disk, &path, number).and_then(|segment| listed.fill(&segment, is_last));
    listed.damage = looked.err().map(|error| error.to_string());
    listed
}

impl Listed {
    fn fill(&mut self, segment: &SegmentFile, is_last: bool) -> ::journal::Result<()> {
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
            // Without a footer the last one is being written, and ends where its frames end. No other may
            // lack it.
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
                        Item::End if is_last && segment.header.kind == SegmentKind::Journal => break,
                        Item::End | Item::Footer => return Err(error),
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
