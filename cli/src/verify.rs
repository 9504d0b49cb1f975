//! `verify`: begins, follows, shows or ends the comparison of a replica with its disks. It is the daemon's: a
//! command that is interrupted leaves it running, and the next one follows it.

use std::time::Duration;

use anyhow::{Context, Result};
use replicator::verify::{Difference, Phase, VerifyReport};
use serde_json::{Value, json};

use crate::args::VerifyArgs;
use crate::client::Client;
use crate::exit::{Fault, Kind};
use crate::output::{self, Progress, size};

/// One look at how far it is to the next.
const LOOK: Duration = Duration::from_millis(500);
/// Ranges that are shown; `--json` has them all.
const SHOWN: usize = 20;

/// `afterimage verify`.
pub async fn run(args: VerifyArgs) -> Result<()> {
    let client = Client::find(&args.target)?;
    let path = format!("/v1/verify/{}", args.group);
    if args.stop {
        return told(&args, &report(client.post("/v1/verify/stop", &json!({ "group": args.group })).await?)?);
    }
    if args.show {
        return told(&args, &report(client.get(&path).await?)?);
    }
    let rate_bits_per_s = args.rate.unwrap_or(0);
    let order = json!({ "group": args.group, "repair": args.repair, "rate_bits_per_s": rate_bits_per_s });
    let mut now = report(client.post("/v1/verify", &order).await?)?;
    let mut progress = Progress::new(format!("verify {}", args.group));
    let mut waits = String::new();
    while now.state == Phase::Running {
        if now.why != waits {
            waits.clone_from(&now.why);
            if !waits.is_empty() {
                eprintln!("afterimage: verify {}: {waits}", args.group);
            }
        }
        progress.set(now.compared_bytes, now.total_bytes);
        tokio::time::sleep(LOOK).await;
        now = report(client.get(&path).await?)?;
    }
    progress.end();
    told(&args, &now)
}

fn report(answer: Value) -> Result<VerifyReport> {
    serde_json::from_value(answer).context("read the daemon's report")
}

/// Prints the report; what differs, and was not repaired, is the error.
fn told(args: &VerifyArgs, report: &VerifyReport) -> Result<()> {
    if args.json {
        output::json(report)?;
    } else {
        output::line(text(report))?;
    }
    let left: u64 = report.differences.iter().filter(|found| !found.repaired).map(|found| found.length).sum();
    if left > 0 && report.state != Phase::Running {
        let what = format!("the replica of {} differs from its disks in {}", report.group, size(left));
        let then = if report.repair { "" } else { "; `--repair` sends them again" };
        return Err(Fault::new(Kind::Corrupt, format!("{what}{then}")).into());
    }
    match report.state {
        Phase::Failed => Err(Fault::new(Kind::Failed, report.why.clone()).into()),
        _ => Ok(()),
    }
}

fn text(report: &VerifyReport) -> String {
    let VerifyReport { group, compared_bytes, total_bytes, differing_bytes, .. } = report;
    let compared = format!("{} of {} compared", size(*compared_bytes), size(*total_bytes));
    let state = match report.state {
        Phase::Running => "is being verified",
        Phase::Done => "is verified",
        Phase::Stopped => "was not verified to its end",
        Phase::Failed => "could not be verified",
    };
    let mut lines = vec![match differing_bytes {
        0 => format!("{group} {state}: {compared}, nothing differs"),
        bytes => format!("{group} {state}: {compared}, {} differed", size(*bytes)),
    }];
    if !report.why.is_empty() {
        lines.push(report.why.clone());
    }
    if report.unreadable_bytes > 0 {
        lines.push(format!(
            "{} cannot be read from the disk (see the kernel log)",
            size(report.unreadable_bytes)
        ));
    }
    if report.busy_bytes > 0 {
        let busy = size(report.busy_bytes);
        lines.push(format!(
            "{busy} were written at each look, and could not be judged; those writes are recorded"
        ));
    }
    if !report.differences.is_empty() {
        let row = |found: &Difference| {
            let state = if found.repaired { "repaired" } else { "differs" };
            vec![found.volume.clone(), found.offset.to_string(), found.length.to_string(), state.to_owned()]
        };
        let rows: Vec<_> = report.differences.iter().take(SHOWN).map(row).collect();
        lines.push(output::table(&["VOLUME", "OFFSET", "BYTES", ""], &rows));
        if let Some(more) = report.differences.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            lines.push(format!("… and {more} more ranges; --json lists them"));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_told_in_words_with_their_place() {
        let found = Difference { volume: "data".into(), offset: 65536, length: 65536, repaired: false };
        let report = VerifyReport {
            group: "db".into(),
            state: Phase::Done,
            total_bytes: 1 << 20,
            compared_bytes: 1 << 20,
            differing_bytes: 65536,
            busy_bytes: 65536,
            differences: vec![found; SHOWN + 2],
            ..VerifyReport::default()
        };
        let text = text(&report);
        assert!(
            text.starts_with("db is verified: 1.0 MiB of 1.0 MiB compared, 64.0 KiB differed\n"),
            "{text}"
        );
        assert!(text.contains("data    65536   65536  differs"), "{text}");
        assert!(text.ends_with("… and 2 more ranges; --json lists them"), "{text}");
    }
}
