//! `rewind`, `resume`, `resync`, `hold`: orders about a group's replica and history; through the daemon, or
//! on a bare directory.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use journal::io::{Disk, RealDisk};
use receiver::apply::{HoldReport, OverwriteReport, ResumeReport, RewindReport};
use receiver::bare::Bare;
use receiver::point::At;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::args::{HoldArgs, Place, ResumeArgs, ResyncArgs, RewindArgs};
use crate::client::Client;
use crate::exit::Fault;
use crate::output::{self, size};
use crate::restore::{group_dir, of_bare};

/// `afterimage rewind`.
pub async fn rewind(args: RewindArgs) -> Result<()> {
    let RewindArgs { group, at, place } = args;
    let point: At = at.parse().map_err(|error: receiver::Error| Fault::usage(error.to_string()))?;
    let body = json!({ "group": group, "at": at });
    let report: RewindReport =
        ordered(&place, &group, "/v1/rewind", &body, |bare| bare.rewind(&point, now_ns())).await?;
    report.warnings.iter().for_each(|warning| eprintln!("afterimage: warning: {warning}"));
    told(&place, &report, || {
        format!(
            "{} is rewound to lsn {}, {}: the replica was at lsn {}, {} written, {} of undo kept; received up to lsn {}\n\
             nothing is applied until `afterimage resume {}`",
            report.group,
            report.lsn,
            report.time,
            report.from_lsn,
            size(report.written_bytes),
            size(report.undo_bytes),
            report.received_lsn,
            report.group
        )
    })
}

/// `afterimage resume`.
pub async fn resume(args: ResumeArgs) -> Result<()> {
    let ResumeArgs { group, place } = args;
    let body = json!({ "group": group });
    let report: ResumeReport = ordered(&place, &group, "/v1/resume", &body, Bare::resume).await?;
    report.warnings.iter().for_each(|warning| eprintln!("afterimage: warning: {warning}"));
    told(&place, &report, || {
        let ResumeReport { group, from_lsn, received_lsn, .. } = &report;
        match place.journal {
            Some(_) => format!("{group} rolled forward from lsn {from_lsn} to {received_lsn}"),
            None => format!(
                "{group} rolls forward from lsn {from_lsn} to {received_lsn}; `afterimage wait` waits for it"
            ),
        }
    })
}

/// `afterimage resync --overwrite`.
pub async fn resync(args: ResyncArgs) -> Result<()> {
    let ResyncArgs { group, overwrite, json, target } = args;
    let body = json!({ "group": group, "overwrite": overwrite });
    let answer = Client::find(&target)?.post("/v1/resync", &body).await?;
    let report: OverwriteReport = serde_json::from_value(answer).context("read the daemon's report")?;
    if json {
        return output::json(&report);
    }
    let OverwriteReport { group, why, found, holds } = &report;
    output::line(format!(
        "{group}: {why}\nit is overwritten by a new synchronisation as soon as its source is connected"
    ))?;
    if let Some(found) = found {
        output::line(format!(
            "what it holds now stays reachable: `afterimage restore {group} --at {found} --to PATH`"
        ))?;
    }
    if !holds.is_empty() {
        output::line(format!("the history up to now ended, and with it the holds of: {}", holds.join(", ")))?;
    }
    Ok(())
}

/// `afterimage hold`.
pub async fn hold(args: HoldArgs) -> Result<()> {
    let HoldArgs { group, name, release, place } = args;
    let body = json!({ "group": group, "name": name, "release": release });
    let report: HoldReport =
        ordered(&place, &group, "/v1/hold", &body, |bare| bare.hold(&name, release, now_ns())).await?;
    told(&place, &report, || {
        let held = if report.held { "under hold" } else { "released" };
        format!("bookmark {}, lsn {} at {}: {held}", report.name, report.at.lsn, report.at.time)
    })
}

/// Gives an order to the daemon, or carries it out under the directory's lock.
async fn ordered<T: DeserializeOwned>(
    place: &Place,
    group: &str,
    path: &str,
    body: &Value,
    bare: impl FnOnce(&mut Bare) -> receiver::Result<T>,
) -> Result<T> {
    let Some(dir) = &place.journal else {
        let answer = Client::find(&place.target)?.post(path, body).await?;
        return serde_json::from_value(answer).context("read the daemon's report");
    };
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let mut opened = Bare::open(&disk, &group_dir(dir, group)?, now_ns()).map_err(of_bare)?;
    let report = bare(&mut opened);
    // Its failure tells of less than the order's own.
    let closed = opened.close();
    let report = report?;
    closed?;
    Ok(report)
}

fn told<T: Serialize>(place: &Place, report: &T, text: impl FnOnce() -> String) -> Result<()> {
    if place.json { output::json(report) } else { output::line(text()) }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
