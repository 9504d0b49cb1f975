//! File systems that are full or read-only below our own directories.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::control::poll;
use tests::image::assert_equal;
use tests::nbd::{self, Loop, Mount};
use tests::nbd_client::NbdClient;
use tests::program::{afterimage, need, run};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;
use tests::story::Home;

const SOON: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const SEGMENTS: &str = "[journal]\nsegment_bytes = \"8MiB\"\n";

/// A file system of its own, mounted. The mount goes first.
struct Small {
    mount: Mount,
    _device: Loop,
}

fn file_system(home: &Home, kind: &str, bytes: u64, options: &[&str], place: &Path) -> Result<Small> {
    let mkfs = format!("mkfs.{kind}");
    need(&nbd::PROGRAMS)?;
    need(&[&mkfs])?;
    let image = home.path("small.img");
    File::create(&image)?.set_len(bytes)?;
    let image = image.to_string_lossy();
    run(&mkfs, ["-q"].iter().chain(options).chain([&&*image]))?;
    let device = Loop::attach(Path::new(&*image))?;
    let mount = Mount::on(place, device.path(), "noatime")?;
    Ok(Small { mount, _device: device })
}

/// The protected disk lies on another file system than the source's directory.
fn disk_elsewhere(home: &Home, bytes: u64) -> Result<PathBuf> {
    let disk = home.path("disk.img");
    File::create(&disk)?.set_len(bytes)?;
    fs::create_dir_all(home.path("source"))?;
    std::os::unix::fs::symlink(&disk, home.path("source").join("v.img"))?;
    Ok(disk)
}

/// Content that does not shrink, over so much of the disk.
fn fill(pair: &Pair<'_>, bytes: u64, seed: u64) -> Result<()> {
    let (socket, export) = &pair.sockets()[0];
    let mut client = NbdClient::connect(socket, export)?;
    let mut random = StdRng::seed_from_u64(seed);
    let mut piece = vec![0; 1 << 20];
    for number in 0..bytes >> 20 {
        random.fill(piece.as_mut_slice());
        client.write(&piece, (number << 20) % client.size())?;
    }
    client.flush()
}

/// Takes what room there is, in large pieces and then in small ones.
fn take_all(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    for bytes in [64 << 10, 512] {
        let piece = vec![0x5a; bytes];
        loop {
            match file.write_all(&piece).and_then(|()| file.sync_data()) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn segments(pair_dir: &Path) -> Result<usize> {
    let names = fs::read_dir(pair_dir.join("journal"))?;
    Ok(names
        .filter_map(Result::ok)
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "seg"))
        .count())
}

/// The bookmark, without a daemon.
fn restore_bare(dir: &Path, to: &Path) -> Result<()> {
    let (dir, to) = (dir.to_string_lossy(), to.to_string_lossy());
    afterimage(["restore", GROUP, "--at", "bookmark:one", "--to", &to, "--journal", &dir])?.expect(0)?;
    Ok(())
}

/// Copy on write: an overwrite in place needs room there, too.
#[test]
fn a_journal_that_fills_btrfs_ends_no_agent_and_is_felt_by_no_client() -> Result<()> {
    story("full btrfs", |home| {
        let small = file_system(home, "btrfs", 300 * MIB, &[], &home.path("source"))?;
        let disk = disk_elsewhere(home, 256 * MIB)?;
        let spec = PairSpec { volumes: &[("v", 256 * MIB)], source: SEGMENTS, ..PairSpec::default() };
        let mut pair = Pair::start(home, &spec)?;
        pair.source.wait()?;
        pair.receiver_daemon()?.kill()?;
        fill(&pair, 256 * MIB, home.seed())?;
        fill(&pair, 256 * MIB, home.seed() + 1)?;
        pair.source.until("no room", SOON, |group| group.state() == "degraded")?;
        pair.source_daemon()?.kill()?;
        pair.start_source()?;
        poll("the disk to be served on the full file system", SOON, || {
            pair.source_daemon()?.expect_alive()?;
            Ok(pair.source.group().ok().filter(|group| group.is_served()))
        })?;
        fill(&pair, 4 * MIB, home.seed() + 2)?;
        pair.start_receiver()?;
        pair.until_served()?;
        pair.source.wait()?;
        assert_equal(&disk, &pair.replica("v"))?;
        drop(pair);
        small.mount.unmount()
    })
}

/// Not even a name has room: to drop a segment needs none.
#[test]
fn dead_segments_leave_a_disk_that_is_full_to_the_last_block() -> Result<()> {
    story("full ext4", |home| {
        let options = ["-b", "1024", "-m", "0", "-O", "^dir_index"];
        let source = home.path("source");
        let small = file_system(home, "ext4", 200 * MIB, &options, &source)?;
        let disk = disk_elsewhere(home, 256 * MIB)?;
        let spec = PairSpec { volumes: &[("v", 256 * MIB)], source: SEGMENTS, ..PairSpec::default() };
        let mut pair = Pair::start(home, &spec)?;
        pair.source.wait()?;
        pair.receiver_daemon()?.kill()?;
        fill(&pair, 256 * MIB, home.seed())?;
        pair.source.until("no room", SOON, |group| group.state() == "degraded")?;
        let others = source.join("others");
        take_all(&others)?;
        // What is left of the directory's own block, with names, long ones first.
        for length in [120, 60, 30, 16, 8, 4] {
            for number in 0..100 {
                let name = format!("{number:0length$}");
                if fs::hard_link(&others, source.join("journal").join(name)).is_err() {
                    break;
                }
            }
        }
        let held = segments(&source)?;
        pair.start_receiver()?;
        let left = || Ok(Some(segments(&source)?).filter(|left| *left < held / 2));
        let left = poll("segments to be dropped", SOON, left)?;
        home.figure(format!("{left} of {held} segments are left"));
        fs::remove_file(&others)?;
        pair.until_served()?;
        pair.source.wait()?;
        assert_equal(&disk, &pair.replica("v"))?;
        drop(pair);
        small.mount.unmount()
    })
}

#[test]
fn a_receiver_on_a_full_disk_starts_and_its_points_are_restored() -> Result<()> {
    story("receiver on a full btrfs", |home| {
        let small = file_system(home, "btrfs", 260 * MIB, &[], &home.path("receiver"))?;
        let replica = home.path("replica.img");
        let section =
            format!("[[replica]]\ngroup = \"{GROUP}\"\nvolume = \"v\"\npath = \"{}\"\n", replica.display());
        let spec = PairSpec { volumes: &[("v", 16 * MIB)], receiver: &section, ..PairSpec::default() };
        let mut pair = Pair::start(home, &spec)?;
        pair.replica_at("v", &replica);
        fill(&pair, 4 * MIB, home.seed())?;
        pair.source.bookmark(GROUP, "one")?;
        pair.source.wait()?;
        let (one, restored) = (home.path("one.img"), home.path("restored.img"));
        fs::copy(pair.backing("v"), &one)?;
        take_all(&small.mount.path().join("others"))?;
        fill(&pair, 16 * MIB, home.seed() + 1)?;
        pair.receiver_daemon()?.kill()?;
        restore_bare(small.mount.path(), &restored)?;
        assert_equal(&one, &restored)?;
        pair.start_receiver()?;
        pair.receiver.until("the receiver to start", SOON, |group| !group.state().is_empty())?;
        fs::remove_file(small.mount.path().join("others"))?;
        pair.until_served()?;
        pair.assert_replica_equals_source()?;
        drop(pair);
        small.mount.unmount()
    })
}

/// A snapshot, a backup, a remount after an error.
#[test]
fn points_are_restored_from_a_file_system_that_can_only_be_read() -> Result<()> {
    story("read-only", |home| {
        let small = file_system(home, "ext4", 256 * MIB, &[], &home.path("receiver"))?;
        let spec = PairSpec { volumes: &[("v", 16 * MIB)], ..PairSpec::default() };
        let mut pair = Pair::start(home, &spec)?;
        fill(&pair, 16 * MIB, home.seed())?;
        pair.source.bookmark(GROUP, "one")?;
        pair.source.wait()?;
        let (one, restored) = (home.path("one.img"), home.path("restored.img"));
        fs::copy(pair.backing("v"), &one)?;
        fill(&pair, 8 * MIB, home.seed() + 1)?;
        pair.source.wait()?;
        ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        let place = small.mount.path().to_string_lossy();
        run("mount", ["-o", "remount,ro", &*place])?;
        restore_bare(small.mount.path(), &restored)?;
        assert_equal(&one, &restored)?;
        drop(pair);
        small.mount.unmount()
    })
}
