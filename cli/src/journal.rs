//! `journal`: looking into journal and undo directories. Only reads; works beside a running daemon and without one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::journal::Lsn;
use ::journal::io::{Disk, RealDisk};
use ::journal::verify::{Report, Severity, VerifyOptions, verify_dir};
use anyhow::Result;

use crate::args::{JournalArgs, JournalCommand};
use crate::exit::{Fault, Kind};
use crate::output::{self, size};

mod dump;
mod list;

/// `afterimage journal ls|verify|dump`.
pub fn run(command: JournalCommand) -> Result<()> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    match command {
        JournalCommand::Ls(args) => list::list(&*disk, &args),
        JournalCommand::Verify(args) => verify(&*disk, &args),
        JournalCommand::Dump { args, from, to } => dump::dump(&disk, &args, Lsn(from), Lsn(to)),
    }
}

/// The directories with segments that DIR means: itself, or a group's journal and undo.
fn dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let parts = ["journal", "undo"].map(|part| dir.join(part)).into_iter().filter(|part| part.is_dir());
    // A group without history has an empty undo directory, and that is no damage.
    let parts: Vec<PathBuf> =
        parts.filter(|part| part.ends_with("journal") || holds_segments(part)).collect();
    if !parts.is_empty() {
        return Ok(parts);
    }
    if !dir.is_dir() {
        anyhow::bail!(Fault::usage(format!("{} is not a directory", dir.display())));
    }
    Ok(vec![dir.to_owned()])
}

fn holds_segments(dir: &Path) -> bool {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    names.into_iter().any(|name| name.path().extension().is_some_and(|extension| extension == "seg"))
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

fn rfc3339(time_ns: u64) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(time_ns))
        .map_or_else(|_| format!("{time_ns} ns"), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_undo_directory_is_no_damage_and_a_missing_journal_is() {
        let dir = tempfile::tempdir().unwrap();
        for part in ["journal", "undo"] {
            std::fs::create_dir(dir.path().join(part)).unwrap();
        }
        assert_eq!(dirs(dir.path()).unwrap(), [dir.path().join("journal")]);
        std::fs::write(dir.path().join("undo/00000000000000000001.seg"), "").unwrap();
        assert_eq!(dirs(dir.path()).unwrap().len(), 2);
        assert!(dirs(&dir.path().join("none")).is_err());
    }
}
