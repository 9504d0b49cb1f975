//! Replicas and restore targets on block devices: growth, file systems, comparison, and a first copy that is
//! cut.

use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::control::Group;
use tests::image::assert_equal;
use tests::nbd::{self, Loop, Mount};
use tests::nbd_client::NbdClient;
use tests::program::{need, run};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;
use tests::story::Home;

const SOON: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// What the devices hold before.
const OLD: u8 = 0xa5;

fn client(pair: &Pair<'_>) -> Result<NbdClient> {
    let (socket, export) = &pair.sockets()[0];
    NbdClient::connect(socket, export)
}

/// Content that does not shrink, at the source before it starts.
fn prepare(home: &Home, name: &str, bytes: u64) -> Result<()> {
    let mut content = Vec::new();
    File::open("/dev/urandom")?.take(bytes).read_to_end(&mut content)?;
    fs::create_dir_all(home.path("source"))?;
    Ok(fs::write(home.path("source").join(format!("{name}.img")), content)?)
}

/// The device was larger before, and held something there: its new part reads as the source's does.
#[test]
fn a_replica_device_that_grew_holds_zeros_where_the_source_was_never_written() -> Result<()> {
    story("device grows", |home| {
        let spec = PairSpec { volumes: &[("v", 8 * MIB)], ..PairSpec::default() };
        let pair = Pair::start_on_devices(home, &spec)?;
        client(&pair)?.write(&[1; 4096], 0)?;
        pair.source.wait()?;
        let device = pair.replica("v");
        let below = home.path("v.device");
        File::options().append(true).open(&below)?.write_all(&vec![OLD; 8 << 20])?;
        run("losetup", ["-c".as_ref(), device.as_os_str()])?;
        File::options().write(true).open(pair.backing("v"))?.set_len(16 * MIB)?;
        let has_grown =
            |group: &Group| group.0["volumes"][0]["size_bytes"] == 16 * MIB && group.state() == "replicating";
        pair.source.until("the new size", SOON, has_grown)?;
        client(&pair)?.write(&[2; 4096], 12 * MIB)?;
        pair.assert_replica_equals_source()?;
        let held = fs::read(&device)?;
        ensure!(held[8 << 20..12 << 20].iter().all(|byte| *byte == 0), "old content is left in the new part");
        Ok(())
    })
}

/// A file system in a volume, back on another device after it was overwritten.
#[test]
fn a_file_system_comes_back_from_a_restore_to_a_device() -> Result<()> {
    story("file system to a device", |home| {
        need(&nbd::PROGRAMS)?;
        need(&["mkfs.ext4", "fsck.ext4"])?;
        let (content, image) = (home.path("content"), home.path("ext4.img"));
        fs::create_dir_all(&content)?;
        fs::write(content.join("word"), "held\n")?;
        File::create(&image)?.set_len(32 * MIB)?;
        run("mkfs.ext4", ["-q".as_ref(), "-d".as_ref(), content.as_os_str(), image.as_os_str()])?;
        let spec = PairSpec { volumes: &[("v", 32 * MIB)], ..PairSpec::default() };
        let pair = Pair::start_on_devices(home, &spec)?;
        let bytes = fs::read(&image)?;
        let mut disk = client(&pair)?;
        for (number, piece) in (0..).zip(bytes.chunks(1 << 20)) {
            disk.write(piece, number << 20)?;
        }
        disk.flush()?;
        pair.source.bookmark(GROUP, "whole")?;
        for at in (0..32 * MIB).step_by(1 << 20) {
            disk.write(&[OLD; 8192], at)?;
        }
        pair.assert_replica_equals_source()?;
        let target = home.path("target.device");
        fs::write(&target, vec![OLD; 32 << 20])?;
        let device = Loop::attach(&target)?;
        pair.receiver.restore(GROUP, "bookmark:whole", device.path())?;
        assert_equal(&image, device.path())?;
        run("fsck.ext4", ["-f".as_ref(), "-n".as_ref(), device.path().as_os_str()])?;
        let mount = Mount::on(&home.path("mounted"), device.path(), "ro")?;
        ensure!(fs::read_to_string(mount.path().join("word"))? == "held\n", "the file is not what it was");
        mount.unmount()
    })
}

/// All content of a replica device is compared under writes, and after an unclean end only what differs is
/// sent.
#[test]
fn a_replica_device_is_compared_and_what_is_equal_is_not_sent_again() -> Result<()> {
    story("device compared", |home| {
        prepare(home, "v", 32 * MIB)?;
        let spec = PairSpec { volumes: &[("v", 32 * MIB)], ..PairSpec::default() };
        let mut pair = Pair::start_on_devices(home, &spec)?;
        client(&pair)?.write(&[1; 4096], 4096)?;
        let done = pair.source.command(&["verify", GROUP, "--json"])?.expect(0)?;
        let report: serde_json::Value = serde_json::from_str(&done.stdout)?;
        ensure!(report["differing_bytes"] == 0 && report["compared_bytes"] == 32 * MIB, "{report}");
        // The ring is lost with the agent: all is compared.
        pair.source_daemon()?.kill()?;
        pair.lose_ring()?;
        pair.start_source()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()?;
        let sent = pair.source.group()?.number("sent_bytes");
        home.figure(format!("{sent} bytes came again of {}", 32 * MIB));
        ensure!(sent < 8 * MIB, "{sent} bytes came again");
        Ok(())
    })
}

/// The receiver is killed in the middle of a first copy: it goes on with what is on the device.
#[test]
fn a_first_copy_to_a_device_that_is_cut_goes_on() -> Result<()> {
    story("first copy cut", |home| {
        prepare(home, "v", 48 * MIB)?;
        let spec = PairSpec {
            volumes: &[("v", 48 * MIB)],
            source: "[resync]\nrate = \"100Mbit\"\n",
            ..PairSpec::default()
        };
        let mut pair = Pair::begin_on_devices(home, &spec)?;
        let is_midway = |group: &Group| group.number("received_lsn") > 40;
        pair.receiver.until("a part of the copy", SOON, is_midway)?;
        let group = pair.source.group()?;
        ensure!(group.state() == "syncing", "the copy is over already: {}", group.0);
        pair.receiver_daemon()?.kill()?;
        pair.start_receiver()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()
    })
}
