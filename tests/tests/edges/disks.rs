//! Protected disks that others write, use or replace.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::control::poll;
use tests::nbd::{Loop, Mount};
use tests::nbd_client::NbdClient;
use tests::program::outcome;
use tests::rig::{Pair, PairSpec};
use tests::{Home, story};

const MINUTE: Duration = Duration::from_secs(60);
const BYTES: u64 = 16 << 20;

fn spec() -> PairSpec<'static> {
    PairSpec { volumes: &[("disk", BYTES)], ..PairSpec::default() }
}

fn image(path: &Path, byte: u8) -> Result<()> {
    Ok(fs::write(path, vec![byte; usize::try_from(BYTES)?])?)
}

/// A loop device where the pair's disk will be.
fn device(home: &Home, name: &str, byte: u8) -> Result<Loop> {
    image(&home.path(name), byte)?;
    let device = Loop::attach(&home.path(name))?;
    point(home, &device)?;
    Ok(device)
}

/// Has the name of the pair's disk lead to a device.
fn point(home: &Home, device: &Loop) -> Result<()> {
    let link = home.path("source").join("disk.img");
    fs::create_dir_all(home.path("source"))?;
    let _ = fs::remove_file(&link);
    Ok(symlink(device.path(), link)?)
}

fn write(pair: &Pair<'_>, byte: u8, offset: u64) -> Result<()> {
    let (socket, export) = &pair.sockets()[0];
    let mut client = NbdClient::connect(socket, export)?;
    client.write(&[byte; 4096], offset)?;
    client.flush()
}

/// Whatever was found, and whenever: in the end the replica is the disk.
fn until_equal(pair: &Pair<'_>) -> Result<()> {
    poll("the replica to equal the disk", MINUTE, || {
        let equal = pair.source.wait().and_then(|()| pair.assert_replica_equals_source());
        Ok(equal.is_ok().then_some(()))
    })
}

/// Kills the source, does something to its disk, and expects that it is found.
fn changed_after_kill(
    home: &Home,
    pair: &mut Pair<'_>,
    change: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    write(pair, 1, 0)?;
    pair.source.wait()?;
    pair.source_daemon()?.kill()?;
    change(&pair.backing("disk"))?;
    pair.start_source()?;
    pair.until_served()?;
    write(pair, 2, 8192)?;
    until_equal(pair)?;
    home.figure(pair.source.group()?.0["state"].to_string());
    Ok(())
}

#[test]
fn an_image_edited_after_a_kill_is_synchronised() -> Result<()> {
    story("edited image", |home| {
        let mut pair = Pair::start(home, &spec())?;
        changed_after_kill(home, &mut pair, |path| {
            Ok(File::options().write(true).open(path)?.write_all_at(&[9; 4096], 5 << 20)?)
        })
    })
}

#[test]
fn a_device_written_or_discarded_after_a_kill_is_synchronised() -> Result<()> {
    story("edited device", |home| {
        let _device = device(home, "device.img", 5)?;
        let mut pair = Pair::start(home, &spec())?;
        changed_after_kill(home, &mut pair, |path| {
            let file = File::options().write(true).open(path)?;
            file.write_all_at(&[9; 4096], 5 << 20)?;
            Ok(file.sync_all()?)
        })?;
        changed_after_kill(home, &mut pair, |path| {
            let path = path.canonicalize()?;
            let mut discard = Command::new("blkdiscard");
            outcome(discard.args(["-f", "-o", "4194304", "-l", "1048576"]).arg(path))?.expect(0).map(drop)
        })
    })
}

#[test]
fn another_device_under_the_same_name_is_noticed() -> Result<()> {
    story("another device", |home| {
        let _first = device(home, "first.img", 5)?;
        let mut pair = Pair::start(home, &spec())?;
        let epoch = pair.source.group()?.number("epoch");
        image(&home.path("second.img"), 6)?;
        let second = Loop::attach(&home.path("second.img"))?;
        changed_after_kill(home, &mut pair, |_| point(home, &second))?;
        ensure!(pair.source.group()?.number("epoch") > epoch, "another device begins an epoch");
        Ok(())
    })
}

#[test]
fn an_idle_disk_that_was_left_alone_is_proven_unchanged_after_a_kill() -> Result<()> {
    story("left alone", |home| {
        let mut pair = Pair::start(home, &spec())?;
        let epoch = pair.source.group()?.number("epoch");
        for round in 1..4 {
            write(&pair, round, 0)?;
            pair.source.wait()?;
            pair.source_daemon()?.kill()?;
            pair.start_source()?;
            pair.until_served()?;
            // Where the last write was too near to the kill, the content is compared meanwhile.
            let group = pair.source.until("nothing to say", MINUTE, |group| group.why().is_empty())?;
            ensure!(group.number("epoch") == epoch, "{}", group.0);
        }
        until_equal(&pair)
    })
}

#[test]
fn an_image_that_others_use_is_refused() -> Result<()> {
    story("in use", |home| {
        let path = home.path("source").join("disk.img");
        fs::create_dir_all(home.path("source"))?;
        image(&path, 0)?;
        outcome(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&path))?.expect(0)?;
        let device = Loop::attach(&path)?;
        let mount = Mount::on(&home.path("mounted"), device.path(), "rw")?;
        let mut pair = Pair::begin(home, &spec())?;
        ensure!(!pair.source_daemon()?.ended()?.success(), "it is refused");
        let said = fs::read_to_string(home.log("source"))?;
        ensure!(said.contains(&format!("in use (loop device {}", device.path().display())), "{said}");
        mount.unmount()?;
        drop(device);
        pair.start_source()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()
    })
}
