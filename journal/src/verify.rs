//! Verification: every byte of every segment, read and checked; damage told by file, offset and lsn.
//!
//! Of a journal the last segment may end in a torn tail, which is reported and is no damage
//! ([`crate::recovery`]). Everything else is sealed: header, each frame with its padding, each mark, footer
//! and trailer are under a CRC, frames are chained, and segments join; so each changed, missing or added byte
//! shows. After a damaged frame the walk goes on at the next one that the footer names.

use crate::compress::Decoder;
use crate::control::TwoSlot;
use crate::frame::{FrameHeader, FrameKind};
use crate::index::{FrameEntry, IndexBuilder, SegmentIndex};
use crate::io::Disk;
use crate::record::Records;
use crate::recovery::{self, Ending, is_damage};
use crate::segment::{self, SegmentKind, SegmentSummary};
use crate::state::{CONTROL_FILE, State};
use crate::walk::{Item, SegmentFile, Walk};
use crate::writer::check_joins;
use crate::{Error, ErrorKind, Lsn, Position, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Findings that are told one by one; more are only counted.
const MAX_FINDINGS: usize = 10_000;

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Bytes that were durable are damaged or missing.
    Corrupt,
    /// What a crash left unfinished; it was never acknowledged.
    TornTail,
}

/// One place that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// Which file.
    pub file: PathBuf,
    /// Where in it, bytes.
    pub offset: u64,
    /// First and last lsn that cannot be read for it, where known.
    pub lsns: Option<(Lsn, Lsn)>,
    /// What is wrong.
    pub what: String,
    /// What it means.
    pub severity: Severity,
}

/// What verification saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Segments looked at.
    pub segments: u64,
    /// Frames that hold.
    pub frames: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What does not hold.
    pub findings: Vec<Finding>,
    /// How many more findings there were, which are damage, and are not told one by one.
    pub more_findings: u64,
}

impl Report {
    /// Whether anything durable is damaged; torn tails are not.
    pub fn is_corrupt(&self) -> bool {
        self.damaged_places() > 0
    }

    /// Places where durable bytes are damaged or missing.
    pub fn damaged_places(&self) -> u64 {
        let told = self.findings.iter().filter(|finding| finding.severity == Severity::Corrupt).count();
        told as u64 + self.more_findings
    }
}

/// How deep to look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Also unpack each frame, walk its records, and compare the extents of undo footers.
    pub unpack: bool,
}

/// Verifies a directory of journal or undo segments. `progress` is told bytes done and bytes in all.
///
/// # Errors
/// Only where the directory cannot be listed, or a frame is of a newer program: damage is in the report.
pub fn verify_dir(
    disk: &dyn Disk,
    dir: &Path,
    options: VerifyOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report> {
    let mut verifier = Verifier {
        disk,
        dir,
        decoder: if options.unpack { Some(Decoder::new()?) } else { None },
        raw: Vec::new(),
        report: Report::default(),
    };
    let names = disk.list(dir).map_err(|error| Error::io(format!("list {}", dir.display()), error))?;
    for name in names.iter().filter(|name| name.ends_with(".seg") && segment::parse_name(name).is_none()) {
        verifier.corrupt(dir.join(name), 0, None, "no segment has such a name");
    }
    let segments = segment::list(disk, dir)?;
    let bytes_of = |path: &PathBuf| disk.open_read_own(path).and_then(|file| file.size()).unwrap_or(0);
    let total: u64 = segments.iter().map(|(_, path)| bytes_of(path)).sum();
    let mut done = 0;
    let mut progress = |path: &PathBuf| {
        done += bytes_of(path);
        progress(done, total);
    };
    if names.iter().any(|name| name == CONTROL_FILE) || !is_undo(disk, &segments) {
        verifier.journal(&segments, &mut progress)?;
    } else {
        for (number, path) in &segments {
            verifier.sealed(*number, path)?;
            progress(path);
        }
    }
    Ok(verifier.report)
}

/// Undo directories hold undo segments and no control file.
fn is_undo(disk: &dyn Disk, segments: &[(u64, PathBuf)]) -> bool {
    let kind =
        |(number, path): &(u64, PathBuf)| SegmentFile::open(disk, path, *number).ok().map(|s| s.header.kind);
    segments.iter().find_map(kind) == Some(SegmentKind::Undo)
}

struct Verifier<'a> {
    disk: &'a dyn Disk,
    dir: &'a Path,
    decoder: Option<Decoder>,
    raw: Vec<u8>,
    report: Report,
}

impl Verifier<'_> {
    fn find(&mut self, file: PathBuf, offset: u64, lsns: Option<(Lsn, Lsn)>, what: &str, severity: Severity) {
        if self.report.findings.len() < MAX_FINDINGS {
            self.report.findings.push(Finding { file, offset, lsns, what: what.into(), severity });
        } else if severity == Severity::Corrupt {
            self.report.more_findings += 1;
        }
    }

    fn corrupt(&mut self, file: PathBuf, offset: u64, lsns: Option<(Lsn, Lsn)>, what: &str) {
        self.find(file, offset, lsns, what, Severity::Corrupt);
    }

    fn journal(&mut self, segments: &[(u64, PathBuf)], progress: &mut dyn FnMut(&PathBuf)) -> Result<()> {
        let state = self.control()?;
        let (oldest, current) = match &state {
            Some(state) => (state.oldest_segment, state.current_segment),
            // Without it, only gaps between the files that are there can be seen.
            None => (
                segments.first().map_or(1, |(number, _)| *number),
                segments.last().map_or(0, |(number, _)| *number),
            ),
        };
        let last = segment::last_begun(segments, current);
        let mut before: Option<SegmentSummary> = None;
        let mut due = oldest;
        // Over the files that are there, not over the numbers that should be: a control file may name any.
        for (number, path) in segments.iter().filter(|(number, _)| (oldest..=last).contains(number)) {
            self.missing(due..*number, &mut before);
            due = number + 1;
            let summary = if *number == last {
                self.tail(*number, path, state.as_ref().map(|state| &state.durable))?
            } else {
                self.sealed(*number, path)?
            };
            progress(path);
            let joins =
                before.iter().zip(&summary).try_for_each(|(before, summary)| check_joins(before, summary));
            if let (Err(error), Some(summary)) = (joins, &summary) {
                self.corrupt(path.clone(), 0, Some((summary.first_lsn, summary.last_lsn)), &error.at);
            }
            before = summary;
        }
        self.missing(due..last.saturating_add(1), &mut before);
        for (_, path) in segments.iter().filter(|(number, _)| *number > last) {
            self.corrupt(path.clone(), 0, None, "no such segment was ever begun");
        }
        Ok(())
    }

    /// Segments in a row that are not there: one finding.
    fn missing(&mut self, numbers: Range<u64>, before: &mut Option<SegmentSummary>) {
        if numbers.is_empty() {
            return;
        }
        let path = self.dir.join(segment::file_name(numbers.start));
        let lsns = before.take().map(|before| (Lsn(before.end.lsn.0.saturating_add(1)), Lsn(u64::MAX)));
        let what = match numbers.end - numbers.start {
            1 => "the segment is missing".to_owned(),
            many => format!("the segment is missing, and {} behind it", many - 1),
        };
        self.corrupt(path, 0, lsns, &what);
    }

    fn control(&mut self) -> Result<Option<State>> {
        let path = self.dir.join(CONTROL_FILE);
        match TwoSlot::read(self.disk, &path) {
            Ok(slots) => {
                if let Some(offset) = slots.torn_at {
                    self.find(path.clone(), offset, None, "one slot is not whole", Severity::TornTail);
                }
                match State::decode(&slots.payload) {
                    Ok(state) => return Ok(Some(state)),
                    Err(error) if error.kind == ErrorKind::Unsupported => return Err(error),
                    Err(error) => self.corrupt(path, 0, None, &error.at),
                }
            }
            Err(error) if error.kind == ErrorKind::NotHeld => {
                self.corrupt(path, 0, None, "the control file is missing");
            }
            Err(error) if error.kind == ErrorKind::Corrupt => self.corrupt(path, 0, None, &error.at),
            // A pipe, a directory or a link has its name.
            Err(error) if is_no_file(&error) => self.corrupt(path, 0, None, &describe(&error)),
            Err(error) => return Err(error),
        }
        Ok(None)
    }

    /// Opens a segment; damage becomes a finding.
    fn open(&mut self, number: u64, path: &Path) -> Result<Option<SegmentFile>> {
        match SegmentFile::open(self.disk, path, number) {
            Ok(segment) => {
                self.report.segments += 1;
                self.report.bytes += segment.size;
                Ok(Some(segment))
            }
            Err(error) if error.kind == ErrorKind::Unsupported => Err(error),
            Err(error) => {
                self.corrupt(path.into(), 0, None, &describe(&error));
                Ok(None)
            }
        }
    }

    fn tail(&mut self, number: u64, path: &Path, floor: Option<&Position>) -> Result<Option<SegmentSummary>> {
        let Some(segment) = self.open(number, path)? else { return Ok(None) };
        let mut bad = Vec::new();
        let mut frames = 0;
        let (decoder, raw) = (&mut self.decoder, &mut self.raw);
        let scan = recovery::scan_tail(&segment, floor, &mut |offset, header, frame| {
            frames += 1;
            if let Some(Err(error)) = decoder.as_mut().map(|decoder| unpack(decoder, header, frame, raw)) {
                bad.push((offset, (header.first_lsn, header.last_lsn), error.at));
            }
            Ok(())
        });
        self.report.frames += frames;
        for (offset, lsns, what) in bad {
            self.corrupt(path.into(), offset, Some(lsns), &what);
        }
        let scan = match scan {
            Err(error) if error.kind != ErrorKind::Io => return Err(error),
            Err(error) => {
                self.corrupt(path.into(), 0, None, &describe(&error));
                return Ok(None);
            }
            Ok(scan) => scan,
        };
        match scan.ending {
            Ending::Clean | Ending::Sealed(_) => {}
            Ending::Torn(what) => self.find(path.into(), scan.offset, None, &what, Severity::TornTail),
            Ending::Corrupt(offset, what) => self.corrupt(path.into(), offset, None, &what),
        }
        Ok(Some(scan.summary))
    }

    /// A segment that must be whole. Its summary, where the footer holds.
    fn sealed(&mut self, number: u64, path: &Path) -> Result<Option<SegmentSummary>> {
        let Some(segment) = self.open(number, path)? else { return Ok(None) };
        let index = match SegmentIndex::of(&segment) {
            Ok(index) => Some(index),
            Err(error) => {
                let at = segment.size.saturating_sub(64);
                self.corrupt(path.into(), at, None, &describe(&error));
                None
            }
        };
        let with_extents = self.decoder.is_some() && index.as_ref().is_some_and(SegmentIndex::has_extents);
        let mut rebuilt = IndexBuilder::new(with_extents);
        let mut walk = Walk::new(&segment);
        let mut whole = true;
        let end = loop {
            let error = match walk.step() {
                Ok((offset, Item::Frame(header))) => {
                    match self.frame(offset, &header, &walk.frame, &mut rebuilt) {
                        Ok(()) => continue,
                        Err(error) => {
                            whole = false;
                            self.corrupt(
                                path.into(),
                                offset,
                                Some((header.first_lsn, header.last_lsn)),
                                &error.at,
                            );
                            continue;
                        }
                    }
                }
                Ok((_, Item::Mark(_))) => continue,
                Ok((offset, Item::Footer)) => break Some(offset),
                Ok((offset, Item::End)) => {
                    segment.error(ErrorKind::Malformed, offset, "ends without a footer")
                }
                Err(error) if error.kind == ErrorKind::Unsupported => return Err(error),
                Err(error) => error,
            };
            whole = false;
            let entry =
                index.as_ref().and_then(|index| index.frames().find(|entry| entry.offset == walk.offset));
            let lsns = entry.map(|entry| (entry.first_lsn, entry.last_lsn));
            self.corrupt(path.into(), walk.offset, lsns, &describe(&error));
            if !resume(&segment, index.as_ref(), &mut walk) {
                break None;
            }
        };
        let Some(index) = index else { return Ok(None) };
        if whole {
            let at = index.offset();
            if end != Some(at) || index.closing().end != walk.position {
                self.corrupt(path.into(), at, None, "footer: does not stand at the end of the frames");
            } else if index.has_extents() == with_extents && !index.equals(&mut rebuilt, &segment.header)? {
                self.corrupt(path.into(), at, None, "footer: does not match the frames");
            }
        }
        Ok(Some(index.summary(&segment)))
    }

    fn frame(
        &mut self,
        offset: u64,
        header: &FrameHeader,
        frame: &[u8],
        rebuilt: &mut IndexBuilder,
    ) -> Result<()> {
        self.report.frames += 1;
        self.raw.clear();
        if let Some(decoder) = &mut self.decoder {
            unpack(decoder, header, frame, &mut self.raw)?;
        }
        rebuilt.push(offset, header, &self.raw)
    }
}

/// Moves a walk behind the damage to the next frame that the footer names. False where there is none.
fn resume(segment: &SegmentFile, index: Option<&SegmentIndex>, walk: &mut Walk<'_>) -> bool {
    let Some(index) = index else { return false };
    let from = index.partition(|entry: &FrameEntry| entry.offset <= walk.offset);
    let entries = (from..).map_while(|at| index.frame(u32::try_from(at).ok()?));
    for entry in entries {
        if let Ok(Item::Frame(header)) = segment.peek(entry.offset) {
            let lsn = Lsn(header.first_lsn.0.saturating_sub(1));
            let (lineage, epoch) = (header.lineage, header.epoch);
            walk.offset = entry.offset;
            walk.position = Position { lineage, epoch, lsn, chain: header.chain_in };
            return true;
        }
    }
    false
}

fn unpack(decoder: &mut Decoder, header: &FrameHeader, frame: &[u8], raw: &mut Vec<u8>) -> Result<()> {
    decoder.decode(header, frame, raw)?;
    if header.kind != FrameKind::Undo {
        return Records::check(header, raw);
    }
    // Undo stands in the order of its offsets, all of it at the batch's last lsn.
    let mut records = 0_u32;
    for located in Records::new(raw) {
        let lsn = located?.record.lsn;
        records += 1;
        if lsn < header.first_lsn || lsn > header.last_lsn {
            return Err(Error::new(ErrorKind::Malformed, format!("record with lsn {lsn} outside its frame")));
        }
    }
    if records != header.records {
        let at = format!("{records} records where the header says {}", header.records);
        return Err(Error::new(ErrorKind::Malformed, at));
    }
    Ok(())
}

fn is_no_file(error: &Error) -> bool {
    error.source.as_ref().is_some_and(|source| source.kind() == std::io::ErrorKind::InvalidInput)
}

fn describe(error: &Error) -> String {
    match &error.source {
        Some(source) if !is_damage(error) => format!("{}: {source}", error.at),
        _ => error.at.clone(),
    }
}
