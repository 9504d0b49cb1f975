//! The kernel module and all that stands behind it, in a guest that runs the stock kernel.
//!
//! Each test is one scenario of `guest/`, run by `vm/run.sh` in QEMU without any hardware help; it ends with
//! the replica compared with the disk, byte for byte, and with a kernel that has not complained. The
//! laboratory and the module are made when they are missing. `AFTERIMAGE_LONG=1` runs the longer forms.
//!
//! Short scenarios that want the same disks share a boot (`several`). What sleeps most of its time is in
//! `asleep`: such guests take half a place beside the others (`.config/nextest.toml`).

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use tests::program::{afterimage_path, outcome};

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vm").join(name)
}

/// Runs a scenario; its exit code.
fn boot(scenario: &str, options: &[&str], arguments: &[&str]) -> Result<i32> {
    for step in ["lab.sh", "module.sh"] {
        outcome(&mut Command::new(script(step)))?.expect(0)?;
    }
    let mut run = Command::new(script("run.sh"));
    // A host that does other things as well makes a guest several times slower.
    run.args(["--timeout", "1500"]).arg(scenario).args(options);
    if is_long() {
        run.args(["--long", "--timeout", "7200"]);
    }
    run.arg("--").args(arguments);
    run.env("AFTERIMAGE_BIN", afterimage_path()?);
    run.env("AFTERIMAGE_GUEST_BIN", env!("CARGO_BIN_EXE_afterimage-guest"));
    let status = run.status().context("run.sh")?;
    status.code().context("run.sh was killed")
}

fn is_long() -> bool {
    env::var_os("AFTERIMAGE_LONG").is_some()
}

fn guest(scenario: &str, options: &[&str], arguments: &[&str]) -> Result<()> {
    let started = Instant::now();
    let code = boot(scenario, options, arguments)?;
    println!("{scenario} {}: {} s", arguments.join(" "), started.elapsed().as_secs());
    ensure!(code == 0, "the scenario {scenario} {} ended with {code}", arguments.join(" "));
    Ok(())
}

/// Several scenarios in one boot.
fn several(options: &[&str], scenarios: &[&str]) -> Result<()> {
    guest("several", options, scenarios)
}

#[test]
fn the_stock_kernel_takes_the_module_which_withstands_nonsense() -> Result<()> {
    let disks = ["--disk", "64M", "--disk", "64M", "--disk", "64M", "--disk", "64M,nvme"];
    several(&disks, &["boot", "fuzz"])
}

#[test]
fn a_scenario_that_fails_hangs_or_upsets_the_kernel_is_noticed() -> Result<()> {
    for (how, code, seconds) in [("fail", 7, "90"), ("warn", 1, "90"), ("panic", 2, "90"), ("hang", 2, "20")]
    {
        let ended = boot("boot", &["--timeout", seconds], &[how])?;
        ensure!(ended == code, "{how}: ended with {ended}, not with {code}");
    }
    Ok(())
}

#[test]
fn a_busy_ext4_is_captured_live() -> Result<()> {
    guest("filesystem", &["--disk", "128M"], &["ext4"])
}

#[test]
fn a_busy_xfs_is_captured_live() -> Result<()> {
    // The least that mkfs.xfs takes.
    guest("filesystem", &["--disk", "304M"], &["xfs"])
}

#[test]
fn a_busy_btrfs_is_captured_live() -> Result<()> {
    guest("filesystem", &["--disk", "256M"], &["btrfs"])
}

#[test]
fn two_disks_a_partition_or_a_growing_lvm_volume_are_captured() -> Result<()> {
    let disks = ["--disk", "112M", "--disk", "96M,nvme"];
    several(&disks, &["topology two", "topology partition", "topology lvm"])
}

#[test]
fn restores_equal_what_dm_log_writes_saw_above_and_below_us() -> Result<()> {
    several(&["--disk", "96M", "--disk", "1G"], &["witness under", "witness on"])
}

#[test]
fn a_full_ring_and_a_stopped_agent_cost_the_application_nothing() -> Result<()> {
    guest("overflow", &["--disk", "128M", "--disk", "128M"], &[])
}

#[test]
fn a_disk_with_content_in_use_is_taken_under_protection() -> Result<()> {
    guest("online", &["--disk", if is_long() { "200M" } else { "128M" }], &[])
}

#[test]
fn orders_that_cross_and_agents_that_die_leave_a_group_that_gets_well() -> Result<()> {
    guest("abuse", &["--disk", "48M", "--disk", "56M"], &[])
}

#[test]
fn killed_agents_lose_nothing() -> Result<()> {
    guest("kills", &["--disk", "96M"], &[])
}

#[test]
fn failing_writes_stay_their_own_and_refused_attempts_are_void() -> Result<()> {
    several(&["--disk", "64M", "--disk", "64M"], &["failing disk", "failing dm", "failing nowait"])
}

mod asleep {
    use super::*;

    #[test]
    fn neither_an_attach_nor_a_resync_misses_a_write_on_its_way() -> Result<()> {
        several(&["--disk", "48M,bps=1200000"], &["races attach", "races resync"])
    }

    #[test]
    fn an_attach_misses_no_write_that_waits_for_its_cgroup() -> Result<()> {
        guest("races", &["--disk", "48M"], &["cgroup"])
    }

    #[test]
    fn a_write_held_back_for_a_minute_is_waited_for() -> Result<()> {
        guest("races", &["--disk", "64M"], &["held"])
    }
}

#[test]
fn a_clean_reboot_leaves_no_gap() -> Result<()> {
    let dest = tempfile::tempdir()?;
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/install.sh");
    outcome(Command::new(install).arg(dest.path()).env("AFTERIMAGE_BIN", afterimage_path()?))?.expect(0)?;
    let tree = format!("{}=files/dest", dest.path().display());
    guest("reboot", &["--disk", "64M", "--init", "systemd", "--file", &tree], &[])
}

#[test]
fn the_module_comes_and_goes_under_load() -> Result<()> {
    guest("lifecycle", &["--disk", "96M", "--disk", "64M", "--disk", "64M"], &[])
}
