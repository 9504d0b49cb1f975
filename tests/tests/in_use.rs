//! A disk in use is taken under protection: an ext4 with real content, mounted and busy while it is copied.
//!
//! `AFTERIMAGE_LONG=1`: 2 GiB with 1 GiB of content instead of a quarter. How much its applications feel is
//! measured by `just bench sync`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rustix::process::{Pid, Signal, kill_process_group};
use tests::control::Group;
use tests::image::assert_equal;
use tests::nbd::{self, FuseDisk, Loop, Mount};
use tests::program::{need, run};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::tree::{Manifest, real_trees};
use tests::{Home, story};

const MIB: u64 = 1 << 20;
const GRANULE: usize = 64 << 10;
/// What was left out and is written into follows as a whole within this.
const FILLED: Duration = Duration::from_secs(60);

/// How large.
struct Scale {
    disk: u64,
    content: u64,
    /// Of the copy, so that it is met under way.
    rate: &'static str,
    limit: Duration,
}

fn scale() -> Scale {
    match std::env::var_os("AFTERIMAGE_LONG") {
        Some(_) => {
            Scale { disk: 2048 * MIB, content: 1024 * MIB, rate: "800Mbit", limit: Duration::from_secs(600) }
        }
        None => {
            Scale { disk: 512 * MIB, content: 200 * MIB, rate: "400Mbit", limit: Duration::from_secs(180) }
        }
    }
}

#[test]
fn a_busy_file_system_is_copied_whole() -> Result<()> {
    story("in use, all", |home| take(home, "all").map(drop))
}

#[test]
fn of_a_busy_file_system_no_free_space_is_sent() -> Result<()> {
    story("in use, allocated", |home| take(home, "allocated").map(drop))
}

/// An ext4 whose free space is full of what was deleted; where its content lies, and how many bytes that are.
fn make(home: &Home, scale: &Scale) -> Result<(PathBuf, u64)> {
    fs::create_dir_all(home.path("source"))?;
    let image = home.path("source").join("disk.img");
    File::create(&image)?.set_len(scale.disk)?;
    let device = Loop::attach(&image)?;
    run("mkfs.ext4", ["-q".as_ref(), device.path().as_os_str()])?;
    let mount = Mount::on(&home.path("live"), device.path(), "noatime")?;
    let (trees, bytes) = real_trees(scale.content)?;
    let target = mount.path().join("content");
    fs::create_dir(&target)?;
    let paths = trees.iter().map(|tree| tree.as_os_str());
    run("cp", ["-a".as_ref()].into_iter().chain(paths).chain([target.as_os_str()]))?;
    let deleted = File::create(mount.path().join("deleted"))?;
    let mut piece = vec![0; 1 << 20];
    let mut random = home.rng();
    let room = scale.disk - bytes - bytes / 4 - 64 * MIB;
    for at in (0..room / 2).step_by(1 << 20) {
        random.fill(piece.as_mut_slice());
        deleted.write_all_at(&piece, at)?;
    }
    deleted.sync_all()?;
    drop(deleted);
    fs::remove_file(mount.path().join("deleted"))?;
    mount.unmount()?;
    Ok((image, bytes))
}

/// Programs that use the disk until they are ended.
struct Busy(Vec<Child>);

impl Busy {
    fn start(root: &Path) -> Result<Busy> {
        // Groups of their own, which end together.
        let quiet = |command: &mut Command| {
            command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        };
        let fio = quiet(Command::new("fio").current_dir(root).args([
            "--name=busy",
            // A job of its own would leave the group.
            "--thread",
            "--filename=fio.data",
            "--size=32M",
            "--rw=randwrite",
            "--bs=4k",
            "--ioengine=psync",
            "--fsync=32",
            "--rate_iops=400",
            "--time_based",
            "--runtime=3600",
        ]))?;
        // Over and over, so that it lasts as long as the copy does.
        let tar = "mkdir -p tar; while :; do tar -C content -cf - . | head -c 48M | tar -C tar -xf - ; rm -rf tar/*; done";
        let tar = quiet(Command::new("sh").current_dir(root).args(["-c", tar]))?;
        Ok(Busy(vec![fio, tar]))
    }

    fn end(mut self) -> Result<()> {
        self.kill()
    }

    fn kill(&mut self) -> Result<()> {
        for child in &mut self.0 {
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
            let _ = kill_process_group(group, Signal::KILL);
            child.wait()?;
        }
        self.0.clear();
        Ok(())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// The whole story in one mode; bytes sent.
fn take(home: &Home, sync: &str) -> Result<u64> {
    need(&nbd::PROGRAMS)?;
    need(&["mkfs.ext4", "e2fsck", "dumpe2fs", "fio", "tar"])?;
    let scale = scale();
    let (image, content) = make(home, &scale)?;
    let source = format!("sync = \"{sync}\"\n[resync]\nrate = \"{}\"\n", scale.rate);
    let spec = PairSpec { volumes: &[("disk", scale.disk)], source: &source, ..PairSpec::default() };
    let mut pair = Pair::begin(home, &spec)?;
    let group = pair.source.until("served", scale.limit, Group::is_served)?;
    let fuse = FuseDisk::attach(home, &group.of_volume("disk", "nbd_uri")?)?;
    let device = Loop::attach(&fuse.path())?;
    let mount = Mount::on(&home.path("live"), device.path(), "noatime")?;
    let busy = Busy::start(mount.path())?;
    let group = pair.source.group()?;
    ensure!(group.state() == "syncing", "it is mounted and used while it is copied: {}", group.0);
    pair.source.until("replicating", scale.limit, |group| group.state() == "replicating")?;
    let group = pair.source.group()?;
    let (sent, skipped) = (group.number("sent_bytes"), group.number("skipped_bytes"));
    busy.end()?;
    run("sync", ["-f".as_ref(), mount.path().as_os_str()])?;
    let manifest = Manifest::of(mount.path())?;
    mount.unmount()?;
    drop(device);
    fuse.unmount()?;
    pair.until_served()?;
    pair.source.wait()?;
    home.figure(format!(
        "{sync}: {} MiB of {} MiB in use, {} MiB on the wire when it was synchronised, {} MiB of free space left out",
        content >> 20,
        scale.disk >> 20,
        sent >> 20,
        skipped >> 20
    ));
    if sync == "all" {
        ensure!(skipped == 0, "everything is wanted");
        assert_equal(&image, &pair.replica("disk"))?;
    } else {
        ensure!(skipped > scale.disk / 8, "free space was left out");
        // The last writes may have touched what was left out; the rest of such a granule follows within a
        // second or two.
        let begun = Instant::now();
        while let Err(error) = assert_equal_but_free(home, &image, &pair.replica("disk"), sent) {
            ensure!(begun.elapsed() < FILLED, "{error:#}");
            thread::sleep(Duration::from_millis(200));
        }
        let verified = pair.source.command(&["verify", GROUP])?;
        verified.expect(0).context("what was left out is no difference")?;
    }
    assert_usable(home, &pair.replica("disk"), &manifest)?;
    Ok(sent)
}

/// Differences lie in whole granules of zeros at the replica: nothing was sent there. How much is left of
/// them depends on how far the load has come: on a fast machine it has written over all that was deleted.
fn assert_equal_but_free(home: &Home, source: &Path, replica: &Path, sent: u64) -> Result<()> {
    let (ours, theirs) = (File::open(source)?, File::open(replica)?);
    let size = ours.metadata()?.len();
    let (mut x, mut y, mut differing) = (vec![0; GRANULE], vec![0; GRANULE], 0);
    for at in (0..size).step_by(GRANULE) {
        ours.read_exact_at(&mut x, at)?;
        theirs.read_exact_at(&mut y, at)?;
        if x != y {
            ensure!(y.iter().all(|byte| *byte == 0), "at {at}: neither what the source holds nor nothing");
            differing += GRANULE as u64;
        }
    }
    home.figure(format!("{} MiB of old content in free space are not at the replica", differing >> 20));
    ensure!(sent + differing <= size + size / 8, "{sent} bytes were sent, {differing} of {size} left out");
    Ok(())
}

/// The replica is a sound file system, and holds what the source held.
fn assert_usable(home: &Home, replica: &Path, manifest: &Manifest) -> Result<()> {
    let copy = home.path("copy.img");
    run("cp", ["--sparse=always".as_ref(), replica.as_os_str(), copy.as_os_str()])?;
    let device = Loop::attach(&copy)?;
    run("e2fsck", ["-fn".as_ref(), device.path().as_os_str()])?;
    let mount = Mount::on(&home.path("past"), device.path(), "noatime")?;
    Manifest::of(mount.path())?.assert_equal(manifest)?;
    mount.unmount()
}
