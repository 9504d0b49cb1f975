//! `restore`: a past moment, written to a file, directory or device; through the daemon, or from a bare
//! directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use receiver::point::At;
use receiver::restore::{RestoreReport, RestoreRequest};
use receiver::restoring::Restoring;
use receiver::target::Guarded;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::RestoreArgs;
use crate::client::Client;
use crate::control::RestoreOrder;
use crate::exit::{Fault, Kind};
use crate::output::{self, size};

/// `afterimage restore`.
pub async fn run(args: RestoreArgs) -> Result<()> {
    if let Some(target) = &args.cancel {
        return cancel(&args, target).await;
    }
    let missing = || Fault::usage("restore needs GROUP, --at POINT and --to PATH");
    let order = RestoreOrder {
        group: args.group.ok_or_else(missing)?,
        at: args.at.ok_or_else(missing)?,
        to: std::path::absolute(args.to.ok_or_else(missing)?).context("find the current directory")?,
        volume: args.volume,
        force: args.force,
        dry_run: args.dry_run,
    };
    let mut bar = output::Progress::new("restore");
    let report = match &args.journal {
        Some(dir) => bare(dir, &order, &mut bar).await,
        None => {
            let client = Client::find(&args.target)?;
            let body = serde_json::to_value(&order).context("ask for the restore")?;
            let report = client.stream("/v1/restore", &body, |p| bar.set(p.done_bytes, p.total_bytes)).await;
            report.and_then(|report| serde_json::from_value(report).context("read the daemon's report"))
        }
    };
    bar.end();
    let report: RestoreReport = report?;
    report.warnings.iter().for_each(|warning| eprintln!("afterimage: warning: {warning}"));
    if args.json { output::json(&report) } else { output::line(told(&report)) }
}

/// `afterimage restore --cancel`.
async fn cancel(args: &RestoreArgs, target: &Path) -> Result<()> {
    let target = std::path::absolute(target).context("find the current directory")?;
    let client = Client::find(&args.target)?;
    let answer = client.post("/v1/restore/cancel", &serde_json::json!({ "to": target })).await?;
    if args.json {
        return output::json(&answer);
    }
    output::line(format!("the restore to {} is ended; a file has no part of it", target.display()))
}

/// Restores from a directory whose daemon does not run, under the directory's lock. A signal ends it in good
/// order, so that no temporary file stays.
async fn bare(dir: &Path, order: &RestoreOrder, bar: &mut output::Progress) -> Result<RestoreReport> {
    let home = group_dir(dir, &order.group)?;
    let request = request(order)?;
    let mut guarded = Guarded::default();
    guarded.dir(dir);
    let restoring = Restoring::alone(&request.at, &request.to);
    let canceller = restoring.canceller();
    let hear = |kind| signal(kind).context("listen for signals");
    let mut interrupt = hear(SignalKind::interrupt())?;
    let mut terminate = hear(SignalKind::terminate())?;
    let mut hangup = hear(SignalKind::hangup())?;
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let mut work = tokio::task::spawn_blocking(move || {
        let disk = std::sync::Arc::new(journal::io::RealDisk);
        let (_lock, history) = receiver::restore::open_bare(disk, &home).map_err(of_bare)?;
        let mut progress = |done, total| _ = tell.try_send((done, total));
        Ok(receiver::restore::restore_as(&history, &request, &guarded, &restoring, &mut progress)?)
    });
    loop {
        tokio::select! {
            done = &mut work => return done.context("restore")?,
            _ = interrupt.recv() => canceller.cancel(),
            _ = terminate.recv() => canceller.cancel(),
            _ = hangup.recv() => canceller.cancel(),
            Some((done, total)) = told.recv() => bar.set(done, total),
        }
    }
}

/// What it means that a bare directory cannot be opened.
pub fn of_bare(error: receiver::Error) -> anyhow::Error {
    match error.kind {
        receiver::ErrorKind::Busy => Fault::new(
            Kind::Busy,
            format!("{error}; where that is its daemon, leave --journal out and name the daemon by --dir or --control"),
        )
        .into(),
        _ => anyhow::Error::new(error),
    }
}

/// A group's directory from what people point at: itself, the receiver's directory, or the directory of `up`.
pub fn group_dir(dir: &Path, group: &str) -> Result<PathBuf> {
    let below = ["groups", "receiver/groups"].map(|below| dir.join(below).join(group));
    if let Some(found) = below.into_iter().find(|path| path.join("group").exists()) {
        return Ok(found);
    }
    if !dir.join("group").exists() {
        let text = format!(
            "--journal {}: no group {group} there; groups/NAME or the receiver's directory is meant",
            dir.display()
        );
        anyhow::bail!(Fault::usage(text));
    }
    // The directory's own name is the group's, so a wrong pair of names is noticed before hours of copying.
    let real = dir.canonicalize().with_context(|| format!("open {}", dir.display()))?;
    if real.file_name().is_some_and(|name| name != group) {
        anyhow::bail!(Fault::usage(format!("--journal {} does not hold group {group}", dir.display())));
    }
    Ok(real)
}

/// What the receiver is asked.
pub fn request(order: &RestoreOrder) -> Result<RestoreRequest, Fault> {
    Ok(RestoreRequest {
        at: order.at.parse().map_err(|error: receiver::Error| Fault::usage(error.to_string()))?,
        to: order.to.clone(),
        volume: order.volume.clone(),
        force: order.force,
        dry_run: order.dry_run,
    })
}

/// Checks a point on the command line; it travels as text.
pub fn parse_point(text: &str) -> Result<String, String> {
    text.parse::<At>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// The report, for people.
fn told(report: &RestoreReport) -> String {
    let done = if report.dry_run { "would restore" } else { "restored" };
    let mut lines = vec![format!(
        "{done} {} as of lsn {}, {}: {} batches undone, {} of redo",
        report.group,
        report.lsn,
        report.time,
        report.undo_batches,
        size(report.redo_bytes)
    )];
    lines.extend(report.volumes.iter().map(|volume| {
        let (name, target) = (&volume.name, volume.target.display());
        let written =
            if report.dry_run { String::new() } else { format!(", {} written", size(volume.written_bytes)) };
        format!("{name}: {target} ({}{written})", size(volume.size_bytes))
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_checked_before_anybody_is_asked() {
        assert_eq!(parse_point("bookmark:a:b").as_deref(), Ok("bookmark:a:b"));
        for bad in ["", "now", "lsn:-1", "time:2026-01-31", "bookmark:"] {
            assert!(parse_point(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_group_is_found_from_any_directory_that_people_mean() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("receiver/groups/db");
        std::fs::create_dir_all(&home).unwrap();
        std::fs::write(home.join("group"), "").unwrap();
        for from in [dir.path().to_owned(), dir.path().join("receiver"), home.clone()] {
            let found = group_dir(&from, "db").unwrap().canonicalize().unwrap();
            assert_eq!(found, home.canonicalize().unwrap(), "{}", from.display());
        }
        assert!(group_dir(&home, "other").is_err());
        assert!(group_dir(&dir.path().join("receiver/groups"), "db").is_err());
    }
}
