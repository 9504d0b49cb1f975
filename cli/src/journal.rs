//! `journal`: looking into journal and undo directories. Only reads; works beside a running daemon and
//! without one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::journal::Lsn;
use ::journal::io::{Disk, RealDisk};
use ::journal::segment;
use ::journal::state::CONTROL_FILE;
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

/// The directories with segments that DIR means: itself, a source's journal, a group's journal and undo, or
/// those of all groups of a receiver. A directory that is none of these is a mistake of the caller's, and no
/// damage.
fn dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        anyhow::bail!(Fault::usage(format!("{} is not a directory", dir.display())));
    }
    if holds_segments(dir) {
        return Ok(vec![dir.to_owned()]);
    }
    let groups = dir.join("groups");
    let mut groups: Vec<PathBuf> = std::fs::read_dir(&groups)
        .into_iter()
        .flatten()
        .flatten()
        .map(|group| group.path())
        .filter(|group| group.is_dir())
        .collect();
    groups.sort();
    let found: Vec<PathBuf> =
        std::iter::once(dir.to_owned()).chain(groups).flat_map(|dir| parts(&dir)).collect();
    if found.is_empty() {
        anyhow::bail!(Fault::usage(format!(
            "{} holds no segments: name a directory with *.seg files, a source's directory (it holds journal/), a group's \
             (DIR/groups/NAME, it holds journal/ and undo/), or a receiver's (it holds groups/)",
            dir.display()
        )));
    }
    Ok(found)
}

/// The parts with segments of a source's or of a group's directory. Other programs have directories called
/// journal, too.
fn parts(dir: &Path) -> Vec<PathBuf> {
    let ours = ["state", "group", "undo"].iter().any(|name| dir.join(name).exists());
    // A group without history has an empty undo directory, and that is no damage.
    let journal = Some(dir.join("journal")).filter(|part| part.is_dir() && (ours || holds_segments(part)));
    let undo = Some(dir.join("undo")).filter(|part| holds_segments(part));
    journal.into_iter().chain(undo).collect()
}

/// Whether a directory holds what only this program makes.
fn holds_segments(dir: &Path) -> bool {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    names.into_iter().any(|name| {
        let name = name.file_name();
        name.to_str().is_some_and(|name| name == CONTROL_FILE || segment::parse_name(name).is_some())
    })
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
        whole.more_findings += report.more_findings;
    }
    let damaged = whole.damaged_places();
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
    fn a_directory_that_holds_nothing_of_ours_is_a_usage_error_and_a_receivers_holds_its_groups() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |dir: &Path| {
            let error = dirs(dir).unwrap_err();
            assert_eq!(error.downcast_ref::<Fault>().unwrap().kind, Kind::Usage, "{error}");
            assert!(error.to_string().contains("groups/NAME"), "{error}");
        };
        refused(dir.path());
        refused(Path::new("/etc"));
        // As /var/log has one: another program's.
        std::fs::create_dir(dir.path().join("journal")).unwrap();
        std::fs::write(dir.path().join("journal/other.seg"), "").unwrap();
        refused(dir.path());
        for part in ["b/journal", "b/undo", "a/journal"] {
            std::fs::create_dir_all(dir.path().join("groups").join(part)).unwrap();
        }
        let segment = "journal/00000000000000000001.seg";
        std::fs::write(dir.path().join("groups/a").join(segment), "").unwrap();
        let found = dirs(dir.path()).unwrap();
        assert_eq!(found, ["groups/a/journal", "groups/b/journal"].map(|part| dir.path().join(part)));
    }

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
