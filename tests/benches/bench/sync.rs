//! What an application feels while its disk is copied for the first time: the same fio on the same mounted
//! ext4, during the copy and right after it, in turns. Beside it a tar extraction, in both.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use tests::control::Group;
use tests::nbd::{FuseDisk, Loop, Mount};
use tests::program::run;
use tests::rig::{Pair, PairSpec};
use tests::{Home, story};

use crate::data::half_compressible;
use crate::report::{Report, Row, Target};

const MIB: u64 = 1 << 20;
const DISK: u64 = 2048 * MIB;
const CONTENT: u64 = 1024 * MIB;
/// Turns of both.
const ROUNDS: usize = 3;
/// One run of fio.
const SECONDS: u64 = 10;
/// So that the copy of the content outlasts it.
const RATE: &str = "600Mbit";
const LIMIT: Duration = Duration::from_secs(180);

/// Measures and reports.
pub fn measure(report: &mut Report) -> Result<()> {
    let mut ratios = Vec::new();
    let mut all = Vec::new();
    for _ in 0..ROUNDS {
        story("bench sync", |home| {
            let (during, after) = round(home)?;
            ratios.push(during / after);
            all.push((during, after));
            Ok(())
        })?;
    }
    ratios.sort_by(f64::total_cmp);
    let mid = |pick: fn(&(f64, f64)) -> f64| {
        let mut times: Vec<f64> = all.iter().map(pick).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    report.row(Row {
        what: format!("application p99 during the first copy, ext4 with fio and tar, {ROUNDS} turns"),
        ours: format!("{:.2} ms", mid(|times| times.0)),
        peer: format!("{:.2} ms", mid(|times| times.1)),
        ratio: ratios[ratios.len() / 2],
        target: Some(Target::AtMost(1.5)),
    });
    report.note(format!("p99 during and after the copy, each turn, ms: {all:.2?}; copy limited to {RATE}"));
    Ok(())
}

/// p99 of fio's writes, ms: during the copy, and after it.
fn round(home: &Home) -> Result<(f64, f64)> {
    make(home)?;
    let source = format!("[resync]\nrate = \"{RATE}\"\n");
    let spec = PairSpec { volumes: &[("disk", DISK)], source: &source, ..PairSpec::default() };
    let pair = Pair::begin(home, &spec)?;
    let group = pair.source.until("served", LIMIT, Group::is_served)?;
    let fuse = FuseDisk::attach(home, &group.of_volume("disk", "nbd_uri")?)?;
    let device = Loop::attach(&fuse.path())?;
    let mount = Mount::on(&home.path("live"), device.path(), "noatime")?;
    let tar = "mkdir -p tar; while :; do tar -C content -cf - . | head -c 32M | tar -C tar -xf - ; rm -rf tar/*; sleep 1; done";
    let mut tar = Command::new("sh")
        .process_group(0)
        .current_dir(mount.path())
        .args(["-c", tar])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let measured = (|| {
        let during = fio(mount.path())?;
        let group = pair.source.group()?;
        ensure!(group.state() == "syncing", "the copy was over before fio was: {}", group.0);
        pair.source.until("replicating", LIMIT, |group| group.state() == "replicating")?;
        Ok((during, fio(mount.path())?))
    })();
    let ours = i32::try_from(tar.id()).ok().and_then(Pid::from_raw).context("a process id")?;
    kill_process_group(ours, Signal::KILL)?;
    tar.wait()?;
    mount.unmount()?;
    drop(device);
    fuse.unmount()?;
    measured
}

fn make(home: &Home) -> Result<()> {
    fs::create_dir_all(home.path("source"))?;
    let image = home.path("source").join("disk.img");
    File::create(&image)?.set_len(DISK)?;
    let device = Loop::attach(&image)?;
    run("mkfs.ext4", ["-q".as_ref(), device.path().as_os_str()])?;
    let mount = Mount::on(&home.path("live"), device.path(), "noatime")?;
    fs::create_dir(mount.path().join("content"))?;
    let piece = half_compressible(1 << 20, 5);
    for number in 0..CONTENT / (16 * MIB) {
        let file = File::create(mount.path().join("content").join(format!("file-{number}")))?;
        for at in 0..16 {
            file.write_all_at(&piece, at * MIB)?;
        }
    }
    mount.unmount()
}

fn fio(root: &Path) -> Result<f64> {
    let done = Command::new("fio")
        .current_dir(root)
        .args([
            "--name=w",
            "--filename=fio.data",
            "--size=64M",
            "--rw=randwrite",
            "--bs=4k",
            "--ioengine=psync",
        ])
        .args(["--direct=1", "--rate_iops=300", "--time_based", "--output-format=json"])
        .arg(format!("--runtime={SECONDS}"))
        .output()
        .context("start fio (install the Debian package fio)")?;
    ensure!(done.status.success(), "fio: {}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8_lossy(&done.stdout);
    let json: Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..]).context("fio's JSON")?;
    let p99 = json["jobs"][0]["write"]["clat_ns"]["percentile"]["99.000000"].as_f64();
    Ok(p99.context("fio tells no p99")? / 1e6)
}
