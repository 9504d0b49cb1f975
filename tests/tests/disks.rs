//! Disks that grow, shrink or go away while they are protected.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use rand::Rng;
use tests::control::Group;
use tests::load::{Load, LoadSpec};
use tests::nbd_client::NbdClient;
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;

const MINUTE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const LOAD: LoadSpec = LoadSpec { clients: 2, unit: 512, most: 64 << 10, pause: Duration::from_millis(2) };

fn size(group: &Group) -> u64 {
    group.0["volumes"][0]["size_bytes"].as_u64().unwrap_or(0)
}

#[test]
fn a_volume_grows_under_load() -> Result<()> {
    story("grow", |home| {
        let mut pair =
            Pair::start(home, &PairSpec { volumes: &[("disk", 32 * MIB)], ..PairSpec::default() })?;
        let epoch = pair.source.group()?.number("epoch");
        let load = Load::start(&pair.sockets()[0], LOAD, home.seed());
        let disk = File::options().write(true).open(pair.backing("disk"))?;
        disk.set_len(64 * MIB)?;
        pair.source.until("the new size", MINUTE, |group| size(group) == 64 * MIB)?;
        let (socket, export) = &pair.sockets()[0];
        let mut client = NbdClient::connect(socket, export)?;
        ensure!(client.size() == 64 * MIB, "who connects sees the new size: {}", client.size());
        for at in (32 * MIB..64 * MIB).step_by(1 << 20) {
            client.write(&[7; 4096], at)?;
        }
        load.stop()?;
        pair.assert_replica_equals_source()?;
        let group = pair.source.group()?;
        ensure!(group.state() == "replicating" && group.number("epoch") == epoch, "{}", group.0);
        ensure!(pair.receiver.points(GROUP)?["gaps"] == serde_json::json!([]), "holes are no gap");
        home.figure("32 to 64 MiB under load, no gap, replica equal");

        // What somebody put there before it was noticed is not known to the replica.
        let load = Load::start(&pair.sockets()[0], LOAD, home.seed() + 1);
        let mut content = vec![0; 8 << 20];
        home.rng().fill(content.as_mut_slice());
        disk.write_all_at(&content, 64 * MIB)?;
        pair.source.until("the new size", MINUTE, |group| size(group) >= 72 * MIB)?;
        pair.source.until("synchronised", MINUTE, |group| group.state() == "replicating")?;
        load.stop()?;
        pair.assert_replica_equals_source()?;
        let points = pair.receiver.points(GROUP)?;
        ensure!(points["gaps"].to_string().contains("grew"), "the gap is told: {points}");
        home.figure("64 to 72 MiB with content: synchronised by itself, replica equal");

        // A disk that another process may write to is refused at a start.
        drop(disk);
        ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        pair.start_source()?;
        let group = pair.until_served()?;
        ensure!(group.number("epoch") == epoch, "a growth that was seen is no doubt: {}", group.0);
        pair.assert_replica_equals_source()
    })
}

#[test]
fn a_shrunk_disk_is_told_and_repaired_when_it_has_its_size_back() -> Result<()> {
    story("shrink", |home| {
        let mut pair =
            Pair::start(home, &PairSpec { volumes: &[("disk", 32 * MIB)], ..PairSpec::default() })?;
        let (socket, export) = &pair.sockets()[0];
        let mut client = NbdClient::connect(socket, export)?;
        for at in (0..32 * MIB).step_by(1 << 20) {
            client.write(&[7; 4096], at)?;
        }
        pair.assert_replica_equals_source()?;
        let disk = File::options().write(true).open(pair.backing("disk"))?;
        disk.set_len(16 * MIB)?;
        let group = pair.source.until("degraded", MINUTE, |group| group.state() == "degraded")?;
        ensure!(group.why().contains("shrank from"), "the cause is told: {}", group.why());
        home.figure(group.why().to_owned());
        pair.source.command(&["wait", "--timeout", "30s"])?.expect_saying(3, "shrank")?;
        client.write(&[8; 4096], 0)?;
        disk.set_len(32 * MIB)?;
        pair.source.until("repaired by itself", MINUTE, |group| group.state() == "replicating")?;
        pair.assert_replica_equals_source()?;
        home.figure("with its size back it is synchronised by itself");
        // While nobody looks, it is refused.
        ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        disk.set_len(16 * MIB)?;
        drop(disk);
        pair.start_source()?;
        ensure!(!pair.source_daemon()?.ended()?.success(), "a shrunk disk is refused at a start");
        Ok(())
    })
}

#[test]
fn a_disk_that_was_replaced_is_told_and_one_that_is_gone_is_not_made_anew() -> Result<()> {
    story("replaced", |home| {
        let mut pair =
            Pair::start(home, &PairSpec { volumes: &[("disk", 16 * MIB)], ..PairSpec::default() })?;
        let (socket, export) = &pair.sockets()[0];
        let mut client = NbdClient::connect(socket, export)?;
        client.write(&[7; 4096], 0)?;
        let (path, aside) = (pair.backing("disk"), home.path("aside.img"));
        fs::rename(&path, &aside)?;
        let told = |group: &Group| group.why().contains("removed or replaced");
        let group = pair.source.until("told", MINUTE, told)?;
        ensure!(group.state() == "replicating", "clients and capture go on: {}", group.0);
        home.figure(group.why().to_owned());
        client.write(&[8; 4096], 1 << 20)?;
        pair.source.wait()?;
        tests::image::assert_equal(&aside, &pair.replica("disk"))?;
        drop(client);
        ensure!(!pair.source_daemon()?.stop()?.success(), "there is nothing to set a clean mark for");
        pair.start_source()?;
        ensure!(!pair.source_daemon()?.ended()?.success(), "a disk that is gone is refused");
        ensure!(!path.exists(), "an empty disk took its place");
        let log = fs::read_to_string(home.log("source"))?;
        ensure!(log.contains("is gone; bring it back"), "the reason is told");
        // The one that was served, then another one in its place.
        fs::rename(&aside, &path)?;
        pair.start_source()?;
        let epoch = pair.until_served()?.number("epoch");
        pair.assert_replica_equals_source()?;
        pair.source_daemon()?.kill()?;
        fs::remove_file(&path)?;
        fs::write(&path, vec![5; 16 << 20])?;
        pair.start_source()?;
        ensure!(pair.until_served()?.number("epoch") > epoch, "another file begins an epoch");
        pair.assert_replica_equals_source()
    })
}
