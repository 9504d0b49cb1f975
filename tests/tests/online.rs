//! Online synchronisation: nobody waits for it, writes go on, and every gap repairs itself.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tests::control::Group;
use tests::load::{Load, LoadSpec};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::{Home, story};

const MINUTE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

fn load(pair: &Pair<'_>, clients: u64, most: usize, pause: Duration, seed: u64) -> Load {
    Load::start(&pair.sockets()[0], LoadSpec { clients, unit: 512, most, pause }, seed)
}

/// A disk with content in places of any alignment, and holes between them.
fn content(home: &Home, name: &str, size: u64) -> Result<()> {
    fs::create_dir_all(home.path("source"))?;
    let disk = File::create(home.path("source").join(format!("{name}.img")))?;
    disk.set_len(size)?;
    let mut random = home.rng();
    let mut at = 0;
    while at < size {
        let length = (random.random_range(1..=512) * 4096u64).min(size - at);
        let mut bytes = vec![0; usize::try_from(length)?];
        if random.random_bool(0.8) {
            random.fill(bytes.as_mut_slice());
        }
        disk.write_all_at(&bytes, at)?;
        at += length + random.random_range(0..64) * 4096;
    }
    Ok(disk.sync_all()?)
}

fn served(pair: &Pair<'_>) -> Result<Group> {
    pair.source.until("served", MINUTE, Group::is_served)
}

#[test]
fn a_disk_in_use_is_taken_under_protection_under_its_writes() -> Result<()> {
    story("online first synchronisation", |home| {
        content(home, "disk", 192 * MIB)?;
        let spec = PairSpec {
            volumes: &[("disk", 192 * MIB)],
            source: "[resync]\nrate = \"400Mbit\"\n",
            ..PairSpec::default()
        };
        let mut pair = Pair::begin(home, &spec)?;
        let group = served(&pair)?;
        ensure!(group.state() == "syncing", "served while it is copied: {}", group.0);
        let load = load(&pair, 2, 64 << 10, Duration::from_millis(2), home.seed());
        thread::sleep(Duration::from_millis(700));
        let group = pair.source.group()?;
        home.figure(format!("under way: {}", group.why()));
        ensure!(group.state() == "syncing" && group.why().contains(" s left"), "{}", group.0);
        pair.source.command(&["bookmark", GROUP, "early"])?.expect(3)?;
        pair.until_served()?;
        let bytes = load.stop()?;
        ensure!(bytes > 0, "the load was a load");
        pair.assert_replica_equals_source()?;
        home.figure(format!("{} MiB written meanwhile, replica equal", bytes >> 20));
        pair.source.bookmark(GROUP, "now")?;
        Ok(())
    })
}

#[test]
fn an_overflow_under_load_repairs_itself() -> Result<()> {
    story("overflow", |home| {
        // A journal that packs slowly, and a ring that is soon full.
        let spec = PairSpec {
            volumes: &[("disk", 64 * MIB)],
            source: "[ring]\nbytes = \"4MiB\"\n[journal]\ncompression = \"zstd:19\"\nadaptive = false\n",
            ..PairSpec::default()
        };
        let pair = Pair::start(home, &spec)?;
        pair.assert_replica_equals_source()?;
        let epoch = pair.source.group()?.number("epoch");
        let mut written = 0;
        for round in 0..2 {
            let load = load(&pair, 4, 1 << 20, Duration::ZERO, home.seed() + round * 100);
            let lost = |group: &Group| group.state() != "replicating";
            let group = pair.source.until("an overflow", MINUTE, lost)?;
            home.figure(format!("{}: {}", group.state(), group.why()));
            ensure!(group.why().contains("overflowed"), "the cause is told: {}", group.0);
            thread::sleep(Duration::from_secs(1));
            written += load.stop()?;
            let well = |group: &Group| group.state() == "replicating";
            pair.source.until("repaired by itself", MINUTE * 3, well)?;
            pair.assert_replica_equals_source()?;
        }
        let group = pair.source.group()?;
        ensure!(group.number("epoch") == epoch, "an overflow keeps its epoch: {}", group.0);
        let points = pair.receiver.points(GROUP)?;
        let gaps = points["gaps"].as_array().context("gaps")?;
        ensure!(!gaps.is_empty() && points.to_string().contains("overflowed"), "{points}");
        home.figure(format!(
            "{} MiB written, {} gaps told, replica equal, epoch {epoch}",
            written >> 20,
            gaps.len()
        ));
        Ok(())
    })
}

#[test]
fn a_killed_agent_goes_on_with_what_is_left() -> Result<()> {
    story("killed in the middle of a synchronisation", |home| {
        content(home, "disk", 128 * MIB)?;
        let spec = PairSpec {
            volumes: &[("disk", 128 * MIB)],
            source: "[resync]\nrate = \"300Mbit\"\n",
            ..PairSpec::default()
        };
        let mut pair = Pair::begin(home, &spec)?;
        let epoch = served(&pair)?.number("epoch");
        let load = load(&pair, 2, 32 << 10, Duration::from_millis(2), home.seed());
        let mut random = home.rng();
        for kill in 0..5 {
            thread::sleep(Duration::from_millis(random.random_range(200..900)));
            pair.source_daemon()?.kill()?;
            pair.start_source()?;
            let group = served(&pair)?;
            ensure!(group.number("epoch") == epoch, "kill {kill} began a new epoch: {}", group.0);
        }
        let group = pair.until_served()?;
        ensure!(group.number("epoch") == epoch, "{}", group.0);
        load.stop()?;
        pair.assert_replica_equals_source()?;
        home.figure(format!("5 kills, epoch {epoch}, replica equal"));
        Ok(())
    })
}
