//! Restore against plain copying, caches dropped before each.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::fio::{Amount, random_writes};
use crate::pair::{Options, Pair};
use crate::report::{Report, Row, Target};

const SIZE: u64 = 4 << 30;
const ROUNDS: usize = 3;
/// Batches of about 2 MiB of redo, so that a thousand of them are made in a minute.
const RECEIVER: &str = "[history]\nquota = \"200GiB\"\n[apply]\nbatch_bytes = \"2MiB\"\nmin_interval = \"1ms\"\nidle = \"1ms\"\n";
const BATCHES: u32 = 1000;

/// Writes back what is dirty and forgets what is cached.
pub fn drop_caches() -> Result<()> {
    anyhow::ensure!(Command::new("sync").status()?.success(), "sync");
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches (run as root)")
}

fn timed(command: &mut Command) -> Result<f64> {
    drop_caches()?;
    let started = Instant::now();
    let out = command.output()?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    // Durable is part of the job on both sides; ours syncs by itself.
    anyhow::ensure!(Command::new("sync").status()?.success(), "sync");
    Ok(started.elapsed().as_secs_f64())
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Fills a volume, overwrites parts of it in a thousand batches, restores both ends.
pub fn compare(binary: &Path, dir: &Path, report: &mut Report) -> Result<()> {
    let dir = dir.join("restore");
    std::fs::create_dir_all(&dir)?;
    let pair = Pair::start(binary, &dir, SIZE, Options { receiver: RECEIVER, ..Options::default() })?;
    let filled = random_writes(&pair.uri(), SIZE, "1m", 4, Amount::Mib(6 << 10))?;
    pair.wait_applied()?;
    let bookmark = pair.command("source").args(["bookmark", "bench", "filled"]).output()?;
    anyhow::ensure!(bookmark.status.success(), "bookmark: {}", String::from_utf8_lossy(&bookmark.stderr));
    for _ in 0..4 {
        random_writes(&pair.uri(), SIZE, "4k", 16, Amount::Mib(BATCHES * 2 / 4 + 20))?;
        pair.wait_applied()?;
    }
    let target = dir.join("restored.img");
    let restore = |at: &str| {
        let mut command = pair.command("receiver");
        command.args(["restore", "bench", "--force", "--json", "--at", at, "--to"]).arg(&target);
        command
    };
    let plan = restore("bookmark:filled").arg("--dry-run").output()?;
    let plan: Value = serde_json::from_slice(&plan.stdout).context("restore --dry-run --json")?;
    report
        .note(format!("restore: {} GiB written before the bookmark; going back: {plan}", filled.bytes >> 30));
    let replica = dir.join("receiver/replica/bench/disk.img");
    let copy = || {
        let mut command = Command::new("cp");
        command.arg("--sparse=always").arg(&replica).arg(dir.join("copy.img"));
        command
    };
    let (mut copies, mut latest, mut back) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for path in [&target, &dir.join("copy.img")] {
            let _ = std::fs::remove_file(path);
        }
        copies.push(timed(&mut copy())?);
        latest.push(timed(&mut restore("latest"))?);
        let _ = std::fs::remove_file(&target);
        back.push(timed(&mut restore("bookmark:filled"))?);
    }
    let (copy, latest, back) = (median(copies), median(latest), median(back));
    for (what, ours, target) in [("latest", latest, 0.8), ("1,000 batches back", back, 0.5)] {
        report.row(Row {
            what: format!("restore of {what}, 4 GiB ÷ cp --sparse=always"),
            ours: format!("{ours:.1} s"),
            peer: format!("{copy:.1} s"),
            ratio: copy / ours,
            target: Some(Target::AtLeast(target)),
        });
    }
    drop(pair);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
