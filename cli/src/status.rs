//! `status`, `wait`, `points`, `bookmark`, `attach`, `detach`: what a daemon says, for people.
//!
//! [`Status`] is the JSON that both daemons share. It keeps keys that it does not know, so that one daemon's
//! extras reach `status --json` unchanged.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::client::Client;
use crate::output::{self, size};

/// Clocks that differ by more are told.
const SKEW_MS: i64 = 5000;
/// How often `--watch` looks.
const WATCH: Duration = Duration::from_secs(1);

/// All groups of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The groups.
    pub groups: Vec<Group>,
}

/// One group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Operator's name.
    pub name: String,
    /// Worst state of its volumes.
    pub state: String,
    /// Why it is not replicating.
    #[serde(default)]
    pub why: Option<String>,
    /// Epoch number.
    pub epoch: u64,
    /// Newest lsn reserved in the ring.
    pub captured_lsn: u64,
    /// Newest lsn in the source journal.
    pub journaled_lsn: u64,
    /// Newest lsn durable at the receiver.
    pub received_lsn: u64,
    /// Newest lsn on the replica.
    pub applied_lsn: u64,
    /// The replica durably is exactly this lsn.
    pub checkpoint_lsn: u64,
    /// Age of the oldest captured write that is not yet durable at the receiver.
    #[serde(default)]
    pub rpo_ms: Option<u64>,
    /// Journaled and not yet acknowledged.
    #[serde(default)]
    pub backlog_bytes: u64,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// What else the daemon says.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// One volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    /// Operator's name.
    pub name: String,
    /// Its state.
    pub state: String,
    /// Size.
    pub size_bytes: u64,
    /// Where clients connect; none while it is not served.
    #[serde(default)]
    pub nbd_uri: Option<String>,
    /// The replica, where this daemon knows it.
    #[serde(default)]
    pub replica: Option<String>,
    /// Backing file or device, where this daemon knows it.
    #[serde(default)]
    pub source: Option<String>,
    /// What else the daemon says.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Status {
    /// From the status type of a room, which has the same shape.
    pub fn of(status: &impl Serialize) -> Status {
        serde_json::to_value(status)
            .and_then(serde_json::from_value)
            .expect("invariant: both daemons' status have this shape (tests/end_to_end.rs)")
    }
}

/// `afterimage status`.
pub async fn status(client: Client, json: bool, watch: bool) -> Result<()> {
    loop {
        let answer = client.get("/v1/status").await?;
        let clear = if watch && std::io::stdout().is_terminal() { "\x1b[H\x1b[J" } else { "" };
        if json {
            // With --watch one line each, so that a reader knows where one ends.
            let text = if watch { answer.to_string() } else { serde_json::to_string_pretty(&answer)? };
            output::line(text)?;
        } else {
            let status = serde_json::from_value(answer).context("read the daemon's status")?;
            output::line(format!("{clear}{}", render(&status)))?;
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH).await;
    }
}

/// `afterimage wait`.
pub async fn wait(client: Client, timeout: Duration) -> Result<()> {
    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    let answer = client.post("/v1/wait", &json!({ "timeout_ms": timeout_ms })).await?;
    output::line(format!("on the replica up to lsn {}", answer["lsn"]))
}

/// `afterimage bookmark`.
pub async fn bookmark(client: Client, group: String, name: String) -> Result<()> {
    let answer = client.post("/v1/bookmark", &json!({ "group": group, "name": name })).await?;
    output::line(answer["lsn"].to_string())
}

/// `afterimage attach`.
pub async fn attach(client: Client, device: PathBuf) -> Result<()> {
    let answer = client.post("/v1/attach", &json!({ "device": named(&device)? })).await?;
    let volume = answer["volume"].as_str().unwrap_or_default();
    output::line(format!(
        "volume {volume} is captured, and synchronised; `afterimage status` shows how far it is"
    ))
}

/// `afterimage detach`.
pub async fn detach(client: Client, device: PathBuf) -> Result<()> {
    let answer = client.post("/v1/detach", &json!({ "device": named(&device)? })).await?;
    let volume = answer["volume"].as_str().unwrap_or_default();
    let how = match answer["consistent"].as_bool() {
        Some(false) => "is at no point, nor is the group before it is attached again",
        _ => "stays there",
    };
    output::line(format!("volume {volume} is detached at lsn {}; its replica {how}", answer["lsn"]))
}

/// A device as the daemon finds it: its directory is another. What has no slash is a volume's name.
fn named(device: &Path) -> Result<PathBuf> {
    if device.components().count() == 1 && device.is_relative() {
        return Ok(device.to_owned());
    }
    std::path::absolute(device).with_context(|| format!("find {}", device.display()))
}

/// `afterimage points`.
pub async fn points(client: Client, group: String, json: bool) -> Result<()> {
    let answer = client.get(&format!("/v1/points/{group}")).await?;
    if json { output::json(&answer) } else { output::line(render_points(&answer)) }
}

/// `afterimage admit`.
pub async fn admit(client: Client, group: String) -> Result<()> {
    client.post("/v1/admit", &json!({ "group": group })).await?;
    output::line(format!(
        "the source of {group} that connects next is taken; other copies of it are refused from then on"
    ))
}

/// `afterimage scrub`.
pub async fn scrub(client: Client, group: String) -> Result<()> {
    client.post("/v1/scrub", &serde_json::json!({ "group": group })).await?;
    output::line(format!(
        "the stored segments of {group} are being checked: `afterimage status` tells what is found"
    ))
}

/// The table of `status`.
pub fn render(status: &Status) -> String {
    if status.groups.is_empty() {
        return "no group yet: a source's first connection makes one".into();
    }
    status.groups.iter().map(render_group).collect::<Vec<_>>().join("\n\n")
}

fn render_group(group: &Group) -> String {
    let why =
        group.why.as_deref().filter(|why| !why.is_empty()).map(|why| format!(" ({why})")).unwrap_or_default();
    let lsns = [
        ("captured", group.captured_lsn),
        ("journaled", group.journaled_lsn),
        ("received", group.received_lsn),
        ("applied", group.applied_lsn),
        ("checkpoint", group.checkpoint_lsn),
    ];
    let lsns: Vec<String> = lsns.iter().map(|(name, lsn)| format!("{name} {lsn}")).collect();
    let rpo = group.rpo_ms.map_or("unknown".into(), |ms| format!("{ms} ms"));
    let rows: Vec<Vec<String>> = group
        .volumes
        .iter()
        .map(|volume| {
            let place = [&volume.nbd_uri, &volume.replica, &volume.source];
            let place =
                place.into_iter().flatten().next().cloned().unwrap_or_else(|| "not served yet".into());
            vec![format!("  {}", volume.name), volume.state.clone(), size(volume.size_bytes), place]
        })
        .collect();
    let repaired = group.more.get("repaired").and_then(Value::as_array).map_or(0, Vec::len);
    let repaired = match repaired {
        0 => String::new(),
        count => {
            format!("\n  {count} rotten places of the journal were fetched from the source again (--json)")
        }
    };
    let restores = group.more.get("restores").and_then(Value::as_array).into_iter().flatten();
    let restores: String = restores.map(render_restore).collect();
    let skew = group.more.get("clock_skew_ms").and_then(Value::as_i64).filter(|ms| ms.abs() > SKEW_MS);
    let skew = skew.map_or(String::new(), |ms| {
        let direction = if ms > 0 { "ahead of" } else { "behind" };
        format!("\n  the source's clock is {} s {direction} the receiver's", ms.abs() / 1000)
    });
    format!(
        "{}: {}{why}{repaired}{restores}{skew}\n  epoch {}, lsn {}\n  RPO {rpo}, backlog {}\n{}",
        group.name,
        group.state,
        group.epoch,
        lsns.join(", "),
        size(group.backlog_bytes),
        output::table(&["  VOLUME", "STATE", "SIZE", "WHERE"], &rows)
    )
}

/// A restore that runs.
fn render_restore(restore: &Value) -> String {
    let number = |key: &str| restore[key].as_u64();
    let text = |key: &str| restore[key].as_str().unwrap_or_default();
    let (done, total) = (number("done_bytes").unwrap_or(0), number("total_bytes").unwrap_or(0));
    let left = number("left_ms").map(|ms| {
        let left = Duration::from_secs(ms.div_ceil(1000));
        format!(", {} left", humantime::format_duration(left))
    });
    let ends = if restore["cancelled"] == true { ", being ended" } else { "" };
    format!(
        "\n  restores {} to {}: {} of {}{}{ends}",
        text("at"),
        text("to"),
        size(done),
        size(total),
        left.unwrap_or_default()
    )
}

/// One line for a status line or a log.
pub fn summary(status: &Status) -> String {
    let groups = status.groups.iter().map(|group| {
        let why = group
            .why
            .as_deref()
            .filter(|why| !why.is_empty())
            .map(|why| format!(" ({why})"))
            .unwrap_or_default();
        let behind = group.captured_lsn.saturating_sub(group.applied_lsn);
        let rpo = group.rpo_ms.map_or(String::new(), |ms| format!(", RPO {ms} ms"));
        let backlog = size(group.backlog_bytes);
        format!(
            "{}: {}{why}, lsn {}, {behind} to apply{rpo}, backlog {backlog}",
            group.name, group.state, group.captured_lsn
        )
    });
    groups.collect::<Vec<_>>().join(" | ")
}

fn render_points(points: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let point = |key: &str| match &points[key] {
        Value::Null => format!("{key}: none yet"),
        point => format!("{key}: lsn {} at {}", point["lsn"], text(&point["time"])),
    };
    let list = |key: &str| points[key].as_array().cloned().unwrap_or_default();
    let mut lines = vec![format!("{}", text(&points["group"])), point("oldest"), point("newest")];
    let steps = list("steps");
    if !steps.is_empty() {
        lines.push(format!(
            "{}: every write from here on; below it {} single points:",
            point("exact"),
            steps.len()
        ));
        lines.extend(
            steps.iter().map(|step| format!("point: lsn {} at {}", step["lsn"], text(&step["time"]))),
        );
    }
    lines.extend(list("bookmarks").iter().map(|mark| {
        let held = if mark["held"] == true { ", under hold" } else { "" };
        format!("bookmark {}: lsn {} at {}{held}", text(&mark["name"]), mark["lsn"], text(&mark["time"]))
    }));
    lines.extend(list("gaps").iter().map(|gap| {
        let (from, to) = (text(&gap["from_time"]), text(&gap["to_time"]));
        if gap["to_lsn"].is_null() {
            let reason = text(&gap["reason"]);
            return format!(
                "no points behind lsn {} ({from}) until the resync ends: {reason}",
                gap["from_lsn"]
            );
        }
        format!(
            "no points from lsn {} to {} ({from} to {to}): {}",
            gap["from_lsn"],
            gap["to_lsn"],
            text(&gap["reason"])
        )
    }));
    lines.extend(list("ended").iter().map(|end| {
        let what = if end["is_over"] == true { "history ended" } else { "history cannot be used since" };
        let holds = match end["holds"].as_u64() {
            None | Some(0) => String::new(),
            Some(holds) => format!(", {holds} bookmarks under hold among them"),
        };
        format!(
            "{what} {}: lsn {} to {}{holds}: {}",
            text(&end["at"]),
            end["from_lsn"],
            end["to_lsn"],
            text(&end["why"])
        )
    }));
    lines.extend(list("found").iter().map(|found| {
        format!(
            "{}: what others had left, overwritten by order {}: {}",
            text(&found["point"]),
            text(&found["at"]),
            text(&found["why"])
        )
    }));
    lines.extend(list("warnings").iter().map(|warning| format!("warning: {}", text(warning))));
    lines.join("\n  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extras_pass_through_and_the_table_says_why() {
        let json = json!({"groups":[{"name":"db","state":"degraded","why":"ring full","epoch":2,"captured_lsn":9,
            "journaled_lsn":8,"received_lsn":7,"applied_lsn":6,"checkpoint_lsn":5,"rpo_ms":12,"backlog_bytes":2048,
            "ring_percent":3,"volumes":[{"name":"disk0","state":"degraded","size_bytes":1048576,
            "nbd_uri":"nbd+unix:///disk0?socket=/d/s","replica":null,"source":"/dev/x"}]}]});
        let status: Status = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(&status).unwrap(), json);
        let text = render(&status);
        for part in [
            "db: degraded (ring full)",
            "captured 9",
            "RPO 12 ms",
            "2.0 KiB",
            "nbd+unix:///disk0?socket=/d/s",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(summary(&status).starts_with("db: degraded (ring full), lsn 9, 3 to apply"));
    }

    #[test]
    fn points_are_told_with_gaps_and_their_reasons() {
        let points = json!({"group":"db","oldest":{"lsn":5,"time":"T0"},"newest":null,
            "bookmarks":[{"name":"before","lsn":7,"time":"T1","held":true}],
            "exact":{"lsn":6,"time":"T6"},"steps":[{"lsn":5,"time":"T5"}],
            "gaps":[{"from_lsn":8,"to_lsn":9,"from_time":"T2","to_time":"T3","reason":"ring lost"},
                {"from_lsn":20,"to_lsn":null,"from_time":"T4","to_time":null,"reason":"quota"}],"warnings":[]});
        let text = render_points(&points);
        for part in [
            "oldest: lsn 5 at T0",
            "newest: none yet",
            "exact: lsn 6 at T6: every write from here on; below it 1 single points",
            "point: lsn 5 at T5",
            "bookmark before: lsn 7 at T1, under hold",
            "8 to 9 (T2 to T3): ring lost",
            "no points behind lsn 20 (T4) until the resync ends: quota",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
