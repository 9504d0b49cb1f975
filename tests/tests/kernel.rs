//! The kernel module and all that stands behind it, in a guest that runs the stock kernel.
//!
//! Each test is one scenario of `guest/`, run by `vm/run.sh` in QEMU without any hardware help; it ends with the replica
//! compared with the disk, byte for byte, and with a kernel that has not complained. The laboratory and the module are
//! made when they are missing. `AFTERIMAGE_LONG=1` runs the longer forms.

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
    run.args(["--timeout", "1200"]).arg(scenario).args(options);
    if env::var_os("AFTERIMAGE_LONG").is_some() {
        run.args(["--long", "--timeout", "7200"]);
    }
    run.arg("--").args(arguments);
    run.env("AFTERIMAGE_BIN", afterimage_path()?);
    run.env("AFTERIMAGE_GUEST_BIN", env!("CARGO_BIN_EXE_afterimage-guest"));
    let status = run.status().context("run.sh")?;
    status.code().context("run.sh was killed")
}

fn guest(scenario: &str, options: &[&str], arguments: &[&str]) -> Result<()> {
    let started = Instant::now();
    let code = boot(scenario, options, arguments)?;
    println!("{scenario} {}: {} s", arguments.join(" "), started.elapsed().as_secs());
    ensure!(code == 0, "the scenario {scenario} {} ended with {code}", arguments.join(" "));
    Ok(())
}

#[test]
fn the_stock_kernel_boots_and_takes_the_module() -> Result<()> {
    guest("boot", &["--disk", "64M", "--disk", "32M,nvme"], &[])
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
    guest("filesystem", &["--disk", "320M"], &["ext4"])
}

#[test]
fn a_busy_xfs_is_captured_live() -> Result<()> {
    guest("filesystem", &["--disk", "400M"], &["xfs"])
}

#[test]
fn a_busy_btrfs_is_captured_live() -> Result<()> {
    guest("filesystem", &["--disk", "400M"], &["btrfs"])
}

#[test]
fn two_disks_are_one_group() -> Result<()> {
    guest("topology", &["--disk", "160M", "--disk", "160M,nvme"], &["two"])
}

#[test]
fn a_partition_is_captured_alone() -> Result<()> {
    guest("topology", &["--disk", "160M"], &["partition"])
}

#[test]
fn an_lvm_volume_is_captured_and_grows() -> Result<()> {
    guest("topology", &["--disk", "128M", "--disk", "128M"], &["lvm"])
}

#[test]
fn restores_equal_what_dm_log_writes_saw_above_us() -> Result<()> {
    guest("witness", &["--disk", "160M", "--disk", "1G"], &["under"])
}

#[test]
fn restores_equal_what_dm_log_writes_saw_below_us() -> Result<()> {
    guest("witness", &["--disk", "160M", "--disk", "1G"], &["on"])
}

#[test]
fn a_full_ring_and_a_stopped_agent_cost_the_application_nothing() -> Result<()> {
    guest("overflow", &["--disk", "128M", "--disk", "128M"], &[])
}

#[test]
fn an_attach_misses_no_write_on_its_way() -> Result<()> {
    guest("races", &["--disk", "48M,bps=1200000"], &["attach"])
}

#[test]
fn a_resync_misses_no_write_on_its_way() -> Result<()> {
    guest("races", &["--disk", "48M,bps=1200000"], &["resync"])
}

#[test]
fn an_attach_misses_no_write_that_waits_for_its_cgroup() -> Result<()> {
    guest("races", &["--disk", "48M"], &["cgroup"])
}

#[test]
fn a_write_held_back_for_a_minute_is_waited_for() -> Result<()> {
    guest("races", &["--disk", "64M"], &["held"])
}

#[test]
fn a_disk_with_content_in_use_is_taken_under_protection() -> Result<()> {
    guest("online", &["--disk", "200M", "--timeout", "1500"], &[])
}

#[test]
fn orders_that_cross_and_agents_that_die_leave_a_group_that_gets_well() -> Result<()> {
    guest("abuse", &["--disk", "48M", "--disk", "56M", "--timeout", "1500"], &[])
}

#[test]
fn killed_agents_lose_nothing() -> Result<()> {
    guest("kills", &["--disk", "160M"], &[])
}

#[test]
fn failing_writes_of_a_disk_stay_its_own() -> Result<()> {
    guest("failing", &["--disk", "64M", "--disk", "64M"], &["disk"])
}

#[test]
fn failing_writes_of_a_mapped_device_stay_its_own() -> Result<()> {
    guest("failing", &["--disk", "64M", "--disk", "64M"], &["dm"])
}

#[test]
fn refused_attempts_are_void() -> Result<()> {
    guest("failing", &["--disk", "96M"], &["nowait"])
}

#[test]
fn a_clean_reboot_leaves_no_gap() -> Result<()> {
    let dest = tempfile::tempdir()?;
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/install.sh");
    outcome(Command::new(install).arg(dest.path()).env("AFTERIMAGE_BIN", afterimage_path()?))?.expect(0)?;
    let tree = format!("{}=files/dest", dest.path().display());
    guest("reboot", &["--disk", "96M", "--init", "systemd", "--file", &tree], &[])
}

#[test]
fn the_module_comes_and_goes_under_load() -> Result<()> {
    guest("lifecycle", &["--disk", "256M", "--disk", "128M", "--disk", "64M", "--timeout", "1500"], &[])
}

#[test]
fn the_kernel_device_withstands_nonsense() -> Result<()> {
    guest("fuzz", &["--disk", "64M", "--disk", "64M", "--disk", "64M", "--disk", "64M"], &[])
}
