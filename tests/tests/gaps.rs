//! When capture was broken: never silent, repaired by a synchronisation, and no point is promised inside the
//! gap.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tests::control::{Group, poll};
use tests::history::{Area, History};
use tests::image::Images;
use tests::oracle::assert_prefix_consistent;
use tests::outsider::Outsider;
use tests::rig::{GROUP, Pair, PairSpec};
use tests::writer::{Pace, Writers};
use tests::{Home, story};

const MINUTE: Duration = Duration::from_secs(60);
const POINTS: usize = 10;

fn pair(home: &Home) -> Result<Pair<'_>> {
    Pair::start(home, &PairSpec { volumes: &[("disk", 16 << 20)], ..PairSpec::default() })
}

/// `wanted` more writes by a new writer; the lsns before and after.
fn write(history: &Arc<History>, pair: &Pair<'_>, wanted: usize, seed: u64) -> Result<(u64, u64)> {
    let first = history.mark(|| pair.source.captured())?;
    let wanted = history.answered()[0] + wanted;
    let writers = Writers::start(history, &pair.sockets(), Pace::default(), seed);
    poll("writes", MINUTE, || {
        history.mark(|| pair.source.captured())?;
        Ok((history.answered()[0] >= wanted).then_some(()))
    })?;
    writers.stop()?;
    Ok((first, history.mark(|| pair.source.captured())?))
}

#[test]
fn a_lost_ring_is_a_gap_with_a_reason() -> Result<()> {
    story("ring lost", |home| {
        let mut pair = pair(home)?;
        let history = Arc::new(History::new(home.seed(), vec![vec![Area { volume: 0, blocks: 0..2048 }]]));
        let before = write(&history, &pair, 400, 1)?;
        pair.assert_replica_equals_source()?;
        let epoch = pair.source.group()?.number("epoch");
        pair.source_daemon()?.kill()?;
        pair.lose_ring()?;
        pair.start_source()?;
        let group = pair.until_served()?;
        ensure!(group.number("epoch") > epoch, "what the ring held is unknown: {}", group.0);
        ensure!(group.number("captured_lsn") > before.1, "no lsn is used twice: {}", group.0);
        pair.assert_replica_equals_source()?;
        let after = write(&history, &pair, 400, 2)?;
        pair.assert_replica_equals_source()?;

        let points = pair.receiver.points(GROUP)?;
        let gap =
            points["gaps"].as_array().and_then(|gaps| gaps.first()).with_context(|| points.to_string())?;
        ensure!(gap["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{points}");
        home.figure(format!("gap: {gap}"));
        let bound = |key: &str| gap[key].as_u64().with_context(|| gap.to_string());
        let inside = bound("from_lsn")?.midpoint(bound("to_lsn")?).to_string();
        let to = home.path("restored.img");
        let line = ["restore", GROUP, "--at", &format!("lsn:{inside}"), "--to", &to.to_string_lossy()];
        pair.receiver.command(&line)?.expect(3)?;
        let mut random = home.rng();
        for window in [before, after] {
            for _ in 0..POINTS {
                let lsn = random.random_range(window.0..=window.1);
                let images = Images::open(&pair.restore(&format!("lsn:{lsn}"), &to)?)?;
                assert_prefix_consistent(&history, &images, &history.bounds_at(lsn))
                    .with_context(|| format!("lsn {lsn}"))?;
            }
        }
        home.figure(format!("{POINTS} random lsns on each side of the gap agree with the oracle"));
        Ok(())
    })
}

#[test]
fn a_replica_that_others_changed_is_overwritten_by_order_only() -> Result<()> {
    story("replica changed", |home| {
        let mut pair = pair(home)?;
        let history = Arc::new(History::new(home.seed(), vec![vec![Area { volume: 0, blocks: 0..2048 }]]));
        write(&history, &pair, 200, 1)?;
        pair.assert_replica_equals_source()?;
        let epoch = pair.source.group()?.number("epoch");
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        let replica = File::options().write(true).open(pair.replica("disk"))?;
        replica.write_all_at(b"somebody used the replica", 5 << 20)?;
        replica.sync_all()?;
        drop(replica);
        pair.start_receiver()?;
        // The source's disk goes on meanwhile, and nobody restarts anything.
        write(&history, &pair, 200, 2)?;
        let told =
            |group: &Group| group.why().contains("changed by others") && group.state() != "replicating";
        pair.source.until("the receiver's complaint", MINUTE, told)?;
        let mut left = [0; 25];
        File::open(pair.replica("disk"))?.read_exact_at(&mut left, 5 << 20)?;
        ensure!(&left == b"somebody used the replica", "it was overwritten without an order");
        pair.receiver.command(&["resync", GROUP, "--overwrite"])?.expect(0)?;
        let newer = |group: &Group| group.number("epoch") > epoch && group.state() == "replicating";
        let group = pair.source.until("a new epoch", MINUTE, newer)?;
        pair.assert_replica_equals_source()?;
        let log = std::fs::read_to_string(home.log("source"))?;
        let told = log.lines().find(|line| line.contains("to=NeedsResync")).context("the state is told")?;
        ensure!(told.contains("changed by others"), "with its reason: {told}");
        home.figure(format!("epoch {epoch} to {}", group.number("epoch")));
        let window = write(&history, &pair, 200, 3)?;
        pair.assert_replica_equals_source()?;
        let mut random = home.rng();
        for _ in 0..POINTS {
            let lsn = random.random_range(window.0..=window.1);
            let images = Images::open(&pair.restore(&format!("lsn:{lsn}"), &home.path("restored.img"))?)?;
            assert_prefix_consistent(&history, &images, &history.bounds_at(lsn))
                .with_context(|| format!("lsn {lsn}"))?;
        }
        home.figure("repaired by itself, in the running agent");
        Ok(())
    })
}

#[test]
fn a_source_lost_in_the_middle_of_a_resync_leaves_its_last_consistent_point_one_rewind_away() -> Result<()> {
    const SIZE: u64 = 32 << 20;
    const CHUNK: u64 = 64 << 10;
    const WANTED: usize = 20;
    const ROUNDS: usize = 40;
    story("source lost in a resync", |home| {
        let mut random = home.rng();
        std::fs::create_dir_all(home.path("source"))?;
        let disk = Outsider::create(home.path("source").join("disk.img"))?;
        let mut content = vec![0; usize::try_from(SIZE)?];
        random.fill(content.as_mut_slice());
        disk.write_all_at(&content, 0)?;
        // Slow enough to be met in the middle.
        let source = "[resync]\nrate = \"100Mbit\"";
        let mut pair =
            Pair::start(home, &PairSpec { volumes: &[("disk", SIZE)], source, ..PairSpec::default() })?;
        pair.assert_replica_equals_source()?;
        let mut in_the_middle = 0;
        let mut round = 0;
        while in_the_middle < WANTED && round < ROUNDS {
            round += 1;
            let consistent = std::fs::read(pair.replica("disk"))?;
            // The machine dies, and half of its disk is not what the replica holds.
            pair.source_daemon()?.kill()?;
            pair.lose_ring()?;
            for _ in 0..SIZE / CHUNK / 2 {
                let at = random.random_range(0..SIZE / CHUNK) * CHUNK;
                disk.write_all_at(&random.random::<[u8; 32]>(), at)?;
            }
            pair.start_source()?;
            pair.source.until("resyncing", MINUTE, |group| group.why().contains(" % ("))?;
            std::thread::sleep(Duration::from_millis(random.random_range(0..500)));
            // … and never comes back, for all that the receiver knows.
            pair.source_daemon()?.kill()?;
            pair.receiver.command(&["rewind", GROUP, "--at", "latest"])?.expect(0)?;
            let replica = std::fs::read(pair.replica("disk"))?;
            if replica == consistent {
                in_the_middle += 1;
            } else {
                // It was over: then the latest point is the whole disk.
                let whole = std::fs::read(pair.backing("disk"))?;
                ensure!(replica == whole, "round {round}: neither the last consistent point nor the newest");
            }
            pair.receiver.command(&["resume", GROUP])?.expect(0)?;
            pair.start_source()?;
            pair.until_served()?;
            pair.assert_replica_equals_source()?;
        }
        home.figure(format!(
            "{in_the_middle} of {round} in the middle; each was where it had last been consistent"
        ));
        ensure!(in_the_middle == WANTED, "it was mostly over before the kill");
        Ok(())
    })
}
