//! Replicas that others write, replace, copy or use; replicas on block devices.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::control::Group;
use tests::image::assert_equal;
use tests::nbd::Loop;
use tests::nbd_client::{NbdClient, Request};
use tests::program::afterimage;
use tests::rig::{GROUP, Pair, PairSpec};
use tests::{Home, story};

const MINUTE: Duration = Duration::from_secs(60);
const SIZE: u64 = 16 << 20;
const USED: &[u8] = b"somebody used the replica";
const USED_AT: u64 = 5 << 20;

fn spec() -> PairSpec<'static> {
    PairSpec { volumes: &[("disk", SIZE)], ..PairSpec::default() }
}

/// One MiB of a value at an offset, durably at the source and on the replica.
fn put(pair: &Pair<'_>, value: u8, offset: u64) -> Result<()> {
    let (socket, name) = pair.sockets().into_iter().next().context("a volume")?;
    let mut client = NbdClient::connect(&socket, &name)?;
    client.write(&vec![value; 1 << 20], offset)?;
    client.flush()
}

/// Three writes, with a bookmark behind the first; all on the replica.
fn begin(home: &Home) -> Result<Pair<'_>> {
    filled(Pair::start(home, &spec())?)
}

fn filled(pair: Pair<'_>) -> Result<Pair<'_>> {
    put(&pair, 1, 0)?;
    pair.source.bookmark(GROUP, "one")?;
    put(&pair, 2, 0)?;
    put(&pair, 3, 2 << 20)?;
    pair.assert_replica_equals_source()?;
    Ok(pair)
}

fn stop(pair: &mut Pair<'_>) -> Result<()> {
    ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
    ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
    Ok(())
}

fn use_it(replica: &Path) -> Result<()> {
    let file = File::options().write(true).open(replica)?;
    file.write_all_at(USED, USED_AT)?;
    file.sync_all()?;
    Ok(())
}

fn is_used(replica: &Path) -> Result<bool> {
    let mut left = vec![0; USED.len()];
    File::open(replica)?.read_exact_at(&mut left, USED_AT)?;
    Ok(left == USED)
}

/// Both sides say that others changed the replica.
fn until_told(pair: &Pair<'_>) -> Result<()> {
    let told = |group: &Group| group.why().contains("changed by others") && group.state() != "replicating";
    pair.receiver
        .until("degraded, with the reason", MINUTE, |group| told(group) && group.state() == "degraded")?;
    pair.source.until("the receiver's complaint", MINUTE, told)?;
    Ok(())
}

fn restore(pair: &Pair<'_>, at: &str, to: &Path) -> Result<tests::program::Outcome> {
    pair.receiver.command(&["restore", GROUP, "--at", at, "--to", &to.to_string_lossy(), "--force"])
}

fn restore_bare(dir: &Path, at: &str, to: &Path) -> Result<tests::program::Outcome> {
    let (dir, to) = (dir.to_string_lossy(), to.to_string_lossy());
    afterimage(["restore", GROUP, "--at", at, "--to", &to, "--force", "--journal", &dir])
}

/// Used after a stop: left alone, told, no point given; overwritten by order, with its content kept.
fn used_then_restarted(home: &Home, mut pair: Pair<'_>, kill: bool) -> Result<()> {
    if kill {
        pair.receiver_daemon()?.kill()?;
    } else {
        stop(&mut pair)?;
        pair.start_source()?;
    }
    let replica = pair.replica("disk");
    use_it(&replica)?;
    let used = fs::read(&replica)?;
    pair.start_receiver()?;
    until_told(&pair)?;
    // What the source sends is received, and not applied.
    put(&pair, 4, 8 << 20)?;
    let captured = pair.source.captured()?;
    pair.receiver.until("received", MINUTE, |group| group.number("received_lsn") >= captured)?;
    ensure!(is_used(&replica)?, "it was overwritten without an order");
    let restored = home.path("restored.img");
    restore(&pair, "bookmark:one", &restored)?.expect_saying(3, "changed by others")?;
    let points = pair.receiver.points(GROUP)?;
    ensure!(points["ended"][0]["is_over"] == false, "{points}");
    pair.receiver.command(&["resync", GROUP])?.expect(2)?;
    pair.source.command(&["resync", GROUP, "--overwrite"])?.expect(3)?;
    let ordered = pair.receiver.command(&["resync", GROUP, "--overwrite"])?.expect(0)?;
    ensure!(ordered.stdout.contains("found:"), "{ordered}");
    pair.until_served()?;
    pair.assert_replica_equals_source()?;
    pair.receiver.command(&["resync", GROUP, "--overwrite"])?.expect(3)?;
    let points = pair.receiver.points(GROUP)?;
    ensure!(points["ended"][0]["is_over"] == true, "{points}");
    let shown = pair.receiver.command(&["points", GROUP])?.expect(0)?;
    ensure!(shown.stdout.contains("history ended") && shown.stdout.contains("changed by others"), "{shown}");
    restore(&pair, "bookmark:one", &restored)?.expect(3)?;
    let found = points["found"][0]["point"].as_str().context("what was found")?.to_owned();
    restore(&pair, &found, &restored)?.expect(0)?;
    ensure!(fs::read(&restored)? == used, "what others had left is not what was kept");
    home.figure(format!("{found} is exactly what others had left"));
    Ok(())
}

#[test]
fn a_replica_that_was_used_is_left_alone_until_it_is_ordered() -> Result<()> {
    story("replica used", |home| used_then_restarted(home, begin(home)?, false))
}

#[test]
fn a_replica_that_was_used_after_a_kill_is_left_alone() -> Result<()> {
    story("replica used after a kill", |home| used_then_restarted(home, begin(home)?, true))
}

#[test]
fn a_replica_device_that_was_used_is_left_alone() -> Result<()> {
    story("replica device used", |home| {
        used_then_restarted(home, filled(Pair::start_on_devices(home, &spec())?)?, false)
    })
}

#[test]
fn a_held_point_is_refused_while_the_replica_is_changed_and_back_with_it() -> Result<()> {
    story("hold of a changed replica", |home| {
        let mut pair = begin(home)?;
        pair.receiver.command(&["hold", GROUP, "one"])?.expect(0)?;
        let (right, restored) = (home.path("right.img"), home.path("restored.img"));
        restore(&pair, "bookmark:one", &right)?.expect(0)?;
        stop(&mut pair)?;
        let replica = pair.replica("disk");
        let kept = home.path("kept.img");
        fs::rename(&replica, &kept)?;
        fs::copy(&kept, &replica)?;
        use_it(&replica)?;
        pair.start_receiver()?;
        pair.start_source()?;
        until_told(&pair)?;
        restore(&pair, "bookmark:one", &restored)?.expect_saying(3, "--overwrite")?;
        let points = pair.receiver.points(GROUP)?;
        ensure!(points["holds"][0]["name"] == "one" && points["ended"][0]["holds"] == 1, "{points}");
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        fs::rename(&kept, &replica)?;
        pair.start_receiver()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()?;
        restore(&pair, "bookmark:one", &restored)?.expect(0)?;
        assert_equal(&right, &restored)
    })
}

#[test]
fn a_bare_directory_whose_replica_was_used_is_refused() -> Result<()> {
    story("bare directory of a used replica", |home| {
        let mut pair = begin(home)?;
        let (right, restored) = (home.path("right.img"), home.path("restored.img"));
        restore(&pair, "bookmark:one", &right)?.expect(0)?;
        stop(&mut pair)?;
        let dir = home.path("receiver");
        restore_bare(&dir, "bookmark:one", &restored)?.expect(0)?;
        assert_equal(&right, &restored)?;
        // A copy with its times kept is as good as the original.
        let copy = home.path("copy");
        let copied = Command::new("cp").arg("-a").args([&dir, &copy]).status()?;
        ensure!(copied.success(), "cp -a");
        restore_bare(&copy, "bookmark:one", &restored)?.expect(0)?;
        assert_equal(&right, &restored)?;
        use_it(&pair.replica("disk"))?;
        restore_bare(&dir, "bookmark:one", &restored)?.expect_saying(3, "changed by others")?;
        let dir = dir.to_string_lossy();
        afterimage(["rewind", GROUP, "--at", "bookmark:one", "--journal", &dir])?
            .expect_saying(3, "changed by others")?;
        ensure!(is_used(&pair.replica("disk"))?, "a refused rewind wrote");
        Ok(())
    })
}

#[test]
fn replicas_that_changed_places_are_noticed() -> Result<()> {
    story("replicas that changed places", |home| {
        let volumes = &[("a", SIZE), ("b", SIZE)];
        let mut pair = Pair::start(home, &PairSpec { volumes, ..PairSpec::default() })?;
        put(&pair, 1, 0)?;
        pair.assert_replica_equals_source()?;
        stop(&mut pair)?;
        let (a, b, aside) = (pair.replica("a"), pair.replica("b"), home.path("aside.img"));
        fs::rename(&a, &aside)?;
        fs::rename(&b, &a)?;
        fs::rename(&aside, &b)?;
        let to = home.path("out");
        restore_bare(&home.path("receiver"), "latest", &to)?.expect_saying(3, "replica of volume")?;
        pair.start_receiver()?;
        pair.start_source()?;
        until_told(&pair)?;
        // Back in their places they are what they were.
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        fs::rename(&a, &aside)?;
        fs::rename(&b, &a)?;
        fs::rename(&aside, &b)?;
        pair.start_receiver()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()
    })
}

#[test]
fn a_replica_that_is_replaced_while_it_is_written_is_noticed() -> Result<()> {
    story("replica replaced", |home| {
        let mut pair = begin(home)?;
        let (replica, copy) = (pair.replica("disk"), home.path("copy.img"));
        fs::copy(&replica, &copy)?;
        fs::rename(&copy, &replica)?;
        put(&pair, 5, 1 << 20)?;
        until_told(&pair)?;
        let restored = home.path("restored.img");
        restore(&pair, "latest", &restored)?.expect(3)?;
        // A stop certifies nothing.
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        pair.start_receiver()?;
        until_told(&pair)?;
        restore(&pair, "latest", &restored)?.expect(3)?;
        pair.receiver.command(&["resync", GROUP, "--overwrite"])?.expect(0)?;
        pair.until_served()?;
        pair.assert_replica_equals_source()
    })
}

#[test]
fn a_copied_directory_does_not_read_a_replica_elsewhere_that_goes_on() -> Result<()> {
    story("copied receiver", |home| {
        let elsewhere = home.path("elsewhere.img");
        let receiver = format!(
            "[[replica]]\ngroup = \"{GROUP}\"\nvolume = \"disk\"\npath = \"{}\"\n",
            elsewhere.display()
        );
        let mut pair = Pair::start(home, &PairSpec { receiver: &receiver, ..spec() })?;
        pair.replica_at("disk", &elsewhere);
        put(&pair, 1, 0)?;
        pair.source.bookmark(GROUP, "one")?;
        put(&pair, 2, 1 << 20)?;
        pair.assert_replica_equals_source()?;
        let (dir, copy, torn) = (home.path("receiver"), home.path("copy"), home.path("torn"));
        // Copied while the receiver runs.
        ensure!(Command::new("cp").arg("-a").args([&dir, &torn]).status()?.success(), "cp -a");
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        ensure!(Command::new("cp").arg("-a").args([&dir, &copy]).status()?.success(), "cp -a");
        pair.start_receiver()?;
        pair.until_served()?;
        pair.receiver.until("its replica is open", MINUTE, |group| group.state() == "replicating")?;
        let restored = home.path("restored.img");
        // It is held by the original's receiver …
        restore_bare(&copy, "bookmark:one", &restored)?.expect(3)?;
        put(&pair, 3, 0)?;
        pair.source.wait()?;
        stop(&mut pair)?;
        // … and was written by it.
        restore_bare(&copy, "bookmark:one", &restored)?.expect_saying(3, "changed by others")?;
        restore_bare(&torn, "bookmark:one", &restored)?.expect_saying(3, "changed by others")?;
        restore_bare(&dir, "bookmark:one", &restored)?.expect(0)?;
        Ok(())
    })
}

#[test]
fn a_directory_that_was_copied_while_its_receiver_ran_is_refused() -> Result<()> {
    story("receiver copied while it ran", |home| {
        let pair = begin(home)?;
        let copy = home.path("copy");
        ensure!(
            Command::new("cp").arg("-a").args([home.path("receiver"), copy.clone()]).status()?.success(),
            "cp -a"
        );
        restore_bare(&copy, "bookmark:one", &home.path("restored.img"))?
            .expect_saying(3, "copied or restored")?;
        drop(pair);
        Ok(())
    })
}

#[test]
fn a_replica_in_use_is_not_opened() -> Result<()> {
    story("replica in use", |home| {
        let mut pair = begin(home)?;
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        let device = Loop::attach(&pair.replica("disk"))?;
        use_it(device.path())?;
        pair.start_receiver()?;
        pair.receiver.until("in use", MINUTE, |group| {
            group.state() == "degraded" && group.why().contains("loop device")
        })?;
        pair.receiver.command(&["resync", GROUP, "--overwrite"])?.expect_saying(3, "loop device")?;
        drop(device);
        until_told(&pair)?;
        ensure!(is_used(&pair.replica("disk"))?, "it was overwritten without an order");
        Ok(())
    })
}

#[test]
fn a_write_and_zeros_in_one_page_reach_a_replica_device() -> Result<()> {
    story("zeros in a page of a device", |home| {
        let pair = Pair::start_on_devices(home, &spec())?;
        // What stood on the device before is zeros now.
        pair.assert_replica_equals_source()?;
        put(&pair, 7, 0)?;
        let (socket, name) = pair.sockets().into_iter().next().context("a volume")?;
        for round in 1..3 {
            let mut client = NbdClient::connect(&socket, &name)?;
            let at = 0x8_0000;
            client.write(&[round; 1024], at)?;
            client.clear(Request::WriteZeroes, at + 1024, 1024)?;
            client.write(&[round; 1024], at + 2048)?;
            client.clear(Request::Trim, at + 3072, 1024)?;
            client.clear(Request::WriteZeroes, at + 65_000 / 512 * 512, 200 << 10)?;
            client.flush()?;
            pair.source.bookmark(GROUP, &format!("round{round}"))?;
            pair.assert_replica_equals_source()?;
            let restored = home.path("restored.img");
            restore(&pair, &format!("bookmark:round{round}"), &restored)?.expect(0)?;
            assert_equal(&pair.backing("disk"), &restored)?;
        }
        Ok(())
    })
}

/// What an image replica can do a device can do: kills, clean restarts, rewind and resume, restores to
/// another device.
#[test]
fn a_replica_device_is_killed_restarted_rewound_and_restored() -> Result<()> {
    story("life of a replica device", |home| {
        let mut pair = filled(Pair::start_on_devices(home, &spec())?)?;
        let epoch = pair.source.group()?.number("epoch");
        let right = home.path("right.img");
        restore(&pair, "bookmark:one", &right)?.expect(0)?;
        pair.receiver_daemon()?.kill()?;
        put(&pair, 6, 3 << 20)?;
        pair.start_receiver()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()?;
        stop(&mut pair)?;
        pair.start_receiver()?;
        pair.start_source()?;
        let group = pair.until_served()?;
        ensure!(group.number("epoch") == epoch, "a restart began a new epoch: {}", group.0);
        pair.assert_replica_equals_source()?;
        let target = home.path("target");
        fs::write(&target, vec![0x5a; usize::try_from(SIZE)?])?;
        let target = Loop::attach(&target)?;
        restore(&pair, "bookmark:one", target.path())?.expect(0)?;
        assert_equal(&right, target.path())?;
        pair.receiver.command(&["rewind", GROUP, "--at", "bookmark:one"])?.expect(0)?;
        assert_equal(&right, &pair.replica("disk"))?;
        pair.receiver_daemon()?.kill()?;
        pair.start_receiver()?;
        pair.receiver.until("rewound", MINUTE, |group| group.state() == "rewound")?;
        pair.receiver.command(&["resume", GROUP])?.expect(0)?;
        pair.source.until("no complaint", MINUTE, |group| {
            group.state() == "replicating" && group.why().is_empty()
        })?;
        pair.assert_replica_equals_source()
    })
}
