//! The degrade ladder: each gap of DESIGN section 9 provoked under load ends in `replicating` by itself, the
//! replica equal, and what is sent is in proportion to what was written. One table at the end.
//!
//! Not here: a jump of the machine's clock (`replicator/src/clock.rs`), and detach and attach, which only the
//! kernel captures (`tests/kernel.rs`).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tests::control::Group;
use tests::load::{Load, LoadSpec};
use tests::nbd::{self, Loop, Mount};
use tests::program::{need, run};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::{Home, story};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
/// What a dirty bit, and a chunk of a comparison, stand for: what is written comes in these.
const GRANULE: u64 = 64 << 10;
const MINUTE: Duration = Duration::from_secs(60);
/// How long the load goes on in each condition.
const LOOK: Duration = Duration::from_millis(1500);
/// At most this many bytes sent for each written …
const RATIO: f64 = 1.3;
/// … and these for headers, marks of a gap, and writes on their way when somebody is killed.
const METADATA: u64 = 4 * MIB;

/// A small file system of its own on a loop device, mounted.
struct Small {
    mount: Option<Mount>,
    /// Held for their drop, after the mount.
    devices: Vec<Loop>,
    image: PathBuf,
    place: PathBuf,
}

impl Small {
    fn new(home: &Home, name: &str, place: PathBuf, mib: u64) -> Result<Small> {
        let image = home.path(format!("{name}.fs"));
        File::create(&image)?.set_len(mib * MIB)?;
        let device = Loop::attach(&image)?;
        run("mkfs.ext4", ["-q".as_ref(), "-m".as_ref(), "0".as_ref(), device.path().as_os_str()])?;
        let mount = Some(Mount::on(&place, device.path(), "noatime")?);
        Ok(Small { mount, devices: vec![device], image, place })
    }

    /// Takes all but this much of its room.
    fn fill(&self, but: u64) -> Result<PathBuf> {
        let free = rustix::fs::statvfs(&self.place)?;
        let bytes = (free.f_bavail * free.f_frsize).saturating_sub(but);
        let ballast = self.place.join("ballast");
        run("fallocate", ["-l".as_ref(), bytes.to_string().as_ref(), ballast.as_os_str()])?;
        Ok(ballast)
    }

    /// Gives that room back, for good.
    fn empty(&self, ballast: &Path) -> Result<()> {
        fs::remove_file(ballast)?;
        run("sync", ["-f".as_ref(), self.place.as_os_str()])?;
        Ok(())
    }

    /// From now on every write to it fails, as on a disk that died.
    fn fail(&self) -> Result<()> {
        run("xfs_io", ["-x".as_ref(), "-c".as_ref(), "shutdown".as_ref(), self.place.as_os_str()])?;
        Ok(())
    }

    /// The disk was mended: mounted anew, by another device, whoever still holds files of the dead one.
    fn mend(&mut self) -> Result<()> {
        run("umount", ["-l".as_ref(), self.place.as_os_str()])?;
        if let Some(old) = self.mount.take() {
            std::mem::forget(old);
        }
        let device = Loop::attach(&self.image)?;
        self.mount = Some(Mount::on(&self.place, device.path(), "noatime")?);
        self.devices.push(device);
        Ok(())
    }
}

/// A rung: what was done, and what it came to.
struct Row {
    name: &'static str,
    changed: u64,
    sent: u64,
    seconds: f64,
}

struct Ladder<'a, 'h> {
    home: &'h Home,
    pair: &'a mut Pair<'h>,
    rows: Vec<Row>,
    /// Sent by runs of the source that are over.
    sent_before: u64,
}

impl<'h> Ladder<'_, 'h> {
    /// One gap under load. `provoke` makes it, and mends what only an operator can mend; what it changed
    /// beside the load is returned.
    fn rung(
        &mut self,
        name: &'static str,
        provoke: impl FnOnce(&mut Ladder<'_, 'h>, &Load) -> Result<u64>,
    ) -> Result<()> {
        let begun = Instant::now();
        let before = self.sent()?;
        let spec = LoadSpec { clients: 2, unit: 64 << 10, most: 64 << 10, pause: Duration::from_millis(20) };
        let seed = self.home.seed() + self.rows.len() as u64 * 10;
        let load = Load::start(&self.pair.sockets()[0], spec, seed);
        thread::sleep(LOOK / 3);
        let changed = provoke(self, &load).with_context(|| name)?;
        self.replicating().with_context(|| name)?;
        thread::sleep(LOOK / 3);
        let changed = changed + load.stop()?;
        self.replicating().with_context(|| name)?;
        self.pair.assert_replica_equals_source().with_context(|| name)?;
        let sent = self.sent()? - before;
        let seconds = begun.elapsed().as_secs_f64();
        self.home.figure(format!("{name}: {} KiB changed, {} KiB sent", changed >> 10, sent >> 10));
        self.rows.push(Row { name, changed, sent, seconds });
        Ok(())
    }

    fn replicating(&mut self) -> Result<Group> {
        // Words beside the state are the receiver's trouble.
        let well = |group: &Group| {
            group.state() == "replicating" && group.why().is_empty() && group.number("backlog_bytes") == 0
        };
        self.pair.source.until("replicating by itself", 2 * MINUTE, well)
    }

    fn sees(&self, what: &str) -> Result<Group> {
        let said = |group: &Group| group.state() != "replicating" || group.why().contains(what);
        self.pair.source.until(what, MINUTE, said)
    }

    /// Bytes of frames handed to the link, over all runs of the source.
    fn sent(&self) -> Result<u64> {
        Ok(self.sent_before + self.pair.source.group()?.number("sent_bytes"))
    }

    fn kill_source(&mut self) -> Result<()> {
        self.sent_before = self.sent()?;
        self.pair.source_daemon()?.kill()
    }

    fn stop_source(&mut self) -> Result<()> {
        self.sent_before = self.sent()?;
        ensure!(self.pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        Ok(())
    }

    /// Writes past everybody, as a machine does whose ring is lost with it.
    fn change_disk(&self, chunks: u64) -> Result<u64> {
        let disk = File::options().write(true).open(self.pair.backing("disk"))?;
        let (mut random, mut piece) = (self.home.rng(), vec![0; usize::try_from(GRANULE)?]);
        for _ in 0..chunks {
            random.fill(piece.as_mut_slice());
            disk.write_all_at(&piece, random.random_range(0..SIZE / GRANULE) * GRANULE)?;
        }
        Ok(chunks * GRANULE)
    }

    fn table(&self) -> Result<()> {
        let mut table =
            format!("{:<40} {:>11} {:>11} {:>6} {:>7}\n", "gap", "changed KiB", "sent KiB", "ratio", "s");
        for Row { name, changed, sent, seconds } in &self.rows {
            let ratio = *sent as f64 / *changed as f64;
            table +=
                &format!("{name:<40} {:>11} {:>11} {ratio:>6.2} {seconds:>7.1}\n", changed >> 10, sent >> 10);
        }
        println!("{table}");
        for Row { name, changed, sent, .. } in &self.rows {
            let allowed = *changed as f64 * RATIO + METADATA as f64;
            ensure!(*sent as f64 <= allowed, "{name}: {sent} bytes sent for {changed} that changed");
        }
        Ok(())
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(to);
    let (from, to) = (from.join("."), to.to_owned());
    fs::create_dir_all(&to)?;
    run("cp", ["-a".as_ref(), "--sparse=always".as_ref(), from.as_os_str(), to.as_os_str()])?;
    Ok(())
}

/// A source or a receiver as it was: the content of its directory, in place.
fn put_back(saved: &Path, dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        // What is mounted there stays.
        let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
    }
    run("cp", ["-a".as_ref(), saved.join(".").as_os_str(), dir.as_os_str()])?;
    Ok(())
}

/// The disks that are to fail.
struct Disks {
    journal: Small,
    replicas: Small,
    receiver: Small,
}

/// A synchronised pair on them, and what is done to it; the table at the end.
fn tell(
    home: &Home,
    (quota, journal_mib): (&str, u64),
    climb: impl FnOnce(&mut Ladder<'_, '_>, &mut Disks) -> Result<()>,
) -> Result<()> {
    need(&nbd::PROGRAMS)?;
    need(&["mkfs.ext4", "xfs_io", "fallocate"])?;
    let mut content = vec![0; usize::try_from(SIZE)?];
    home.rng().fill(content.as_mut_slice());
    fs::create_dir_all(home.path("source"))?;
    fs::write(home.path("source").join("disk.img"), &content)?;
    drop(content);
    let mut disks = Disks {
        journal: Small::new(home, "journal", home.path("source").join("journal"), journal_mib)?,
        replicas: Small::new(home, "replica", home.path("replicas"), 160)?,
        receiver: Small::new(home, "receiver", home.path("far"), 2048)?,
    };
    let place = home.path("replicas").join("disk.img");
    let settings = format!(
        "[journal]\nsegment_bytes = \"4MiB\"\n[[replica]]\ngroup = \"{GROUP}\"\nvolume = \"disk\"\npath = \"{}\"\n",
        place.display()
    );
    let source = format!("[journal]\nquota = \"{quota}\"\nsegment_bytes = \"4MiB\"\n");
    let spec = PairSpec {
        volumes: &[("disk", SIZE)],
        source: &source,
        receiver: &settings,
        receiver_dir: Some(disks.receiver.place.join("receiver")),
        ..PairSpec::default()
    };
    let mut pair = Pair::start(home, &spec)?;
    pair.replica_at("disk", &place);
    pair.assert_replica_equals_source()?;
    let mut ladder = Ladder { home, pair: &mut pair, rows: Vec::new(), sent_before: 0 };
    climb(&mut ladder, &mut disks)?;
    ladder.table()?;
    drop(pair);
    Ok(())
}

#[test]
fn every_gap_ends_by_itself_and_costs_what_changed() -> Result<()> {
    story("the degrade ladder", |home| {
        tell(home, ("32MiB", 160), |ladder, Disks { journal, replicas, receiver }| {
            climb(ladder, journal, replicas, receiver)
        })
    })
}

/// A journal whose quota is more than its disk has; with a receiver that acknowledges, it would go round in
/// its room.
#[test]
fn a_full_disk_under_the_source_journal_ends_by_itself() -> Result<()> {
    story("the journal's disk full", |home| {
        tell(home, ("1GiB", 64), |ladder, _| {
            ladder.rung("source journal's disk full", |ladder, _| {
                // Stopped, not killed: what is on its way to a receiver that dies is sent again, which is no
                // matter of this gap.
                ensure!(ladder.pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
                ladder.pair.source.until("the link down", MINUTE, |group| !group.is_connected())?;
                let flood =
                    LoadSpec { clients: 1, unit: 64 << 10, most: 1 << 20, pause: Duration::from_millis(5) };
                let flood = Load::start(&ladder.pair.sockets()[0], flood, 78);
                let full = |group: &Group| group.state() == "degraded" && group.why().contains("no room");
                let full = ladder.pair.source.until("a full disk", MINUTE, full);
                let changed = flood.stop()?;
                full?;
                ladder.pair.start_receiver()?;
                Ok(changed)
            })
        })
    })
}

/// The rungs, from the mildest on.
fn climb(
    ladder: &mut Ladder<'_, '_>,
    journal: &mut Small,
    replicas: &mut Small,
    receiver: &Small,
) -> Result<()> {
    ladder.rung("agent killed", |ladder, _| {
        ladder.kill_source()?;
        ladder.pair.start_source()?;
        Ok(0)
    })?;
    ladder.rung("receiver killed", |ladder, _| {
        ladder.pair.receiver_daemon()?.kill()?;
        thread::sleep(LOOK);
        ladder.pair.start_receiver()?;
        Ok(0)
    })?;
    ladder.rung("network away beyond the quota", |ladder, _| {
        ladder.pair.receiver_daemon()?.kill()?;
        let flood = LoadSpec { clients: 1, unit: 64 << 10, most: 1 << 20, pause: Duration::ZERO };
        let flood = Load::start(&ladder.pair.sockets()[0], flood, 77);
        ladder.pair.source.until("the quota", MINUTE, |group| group.why().contains("quota"))?;
        let changed = flood.stop()?;
        ladder.pair.start_receiver()?;
        Ok(changed)
    })?;
    ladder.rung("source journal failing", |ladder, _| {
        journal.fail()?;
        ladder.sees("written")?;
        thread::sleep(LOOK);
        journal.mend()?;
        Ok(0)
    })?;
    ladder.rung("receiver's disk full", |ladder, _| {
        let ballast = receiver.fill(24 * MIB)?;
        let full = |group: &Group| ["full", "no room", "space"].iter().any(|word| group.why().contains(word));
        let flood = LoadSpec { clients: 1, unit: 64 << 10, most: 1 << 20, pause: Duration::from_millis(5) };
        let flood = Load::start(&ladder.pair.sockets()[0], flood, 79);
        ladder.pair.receiver.until("its full disk", MINUTE, full)?;
        let changed = flood.stop()?;
        receiver.empty(&ballast)?;
        Ok(changed)
    })?;
    ladder.rung("replica write fails", |ladder, _| {
        replicas.fail()?;
        ladder.pair.receiver.until("its failed replica", MINUTE, |group| group.state() != "replicating")?;
        replicas.mend()?;
        if ladder.pair.receiver_daemon()?.expect_alive().is_err() {
            ladder.pair.start_receiver()?;
        }
        Ok(0)
    })?;
    roll_back(ladder)
}

/// What was restored from a backup, or lost.
fn roll_back(ladder: &mut Ladder<'_, '_>) -> Result<()> {
    ladder.rung("source crashed, ring lost", |ladder, _| {
        ladder.kill_source()?;
        ladder.pair.lose_ring()?;
        let changed = ladder.change_disk(SIZE / GRANULE / 100)?;
        ladder.pair.start_source()?;
        Ok(changed)
    })?;
    ladder.rung("receiver rolled back", |ladder, load| {
        let (dir, saved) = (ladder.home.path("far/receiver"), ladder.home.path("receiver.saved"));
        let replica = ladder.home.path("replicas");
        let saved_replica = ladder.home.path("replica.saved");
        ensure!(ladder.pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        copy(&dir, &saved)?;
        copy(&replica, &saved_replica)?;
        let kept = load.bytes();
        ladder.pair.start_receiver()?;
        thread::sleep(LOOK);
        ladder.replicating()?;
        ladder.pair.receiver_daemon()?.kill()?;
        let lost = load.bytes() - kept;
        put_back(&saved, &dir)?;
        put_back(&saved_replica, &replica)?;
        ladder.pair.start_receiver()?;
        // What the receiver had, and lost, goes to it a second time.
        Ok(lost)
    })?;
    ladder.rung("source rolled back", |ladder, load| {
        let (dir, saved) = (ladder.home.path("source"), ladder.home.path("source.saved"));
        ladder.stop_source()?;
        copy(&dir, &saved)?;
        let kept = load.bytes();
        ladder.pair.start_source()?;
        thread::sleep(LOOK);
        ladder.replicating()?;
        ladder.stop_source()?;
        let lost = load.bytes() - kept;
        let journal = dir.join("journal");
        put_back(&saved.join("journal"), &journal)?;
        for name in ["state", "disk.img"] {
            run("cp", ["-a".as_ref(), saved.join(name).as_os_str(), dir.join(name).as_os_str()])?;
        }
        ladder.pair.start_source()?;
        // What the disk lost is what the replica has to be brought back by.
        Ok(lost)
    })
}
