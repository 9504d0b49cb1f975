//! Story 5: `kill -9` of the receiver and of the agent, again and again under load.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use tests::control::poll;
use tests::history::{Area, History};
use tests::image::Images;
use tests::oracle::assert_prefix_consistent;
use tests::rig::{GROUP, Pair, PairSpec};
use tests::writer::{Pace, Writers};
use tests::{Home, story};

const KILLS: usize = 30;
const POINTS: usize = 15;
/// Each lane's part of each volume.
const LANE_BLOCKS: u32 = 1024;
const VOLUMES: [(&str, u64); 2] = [("one", 32 << 20), ("two", 32 << 20)];
/// Small segments and short batches: more of the moments that a kill may hit.
const SOURCE: &str = "[journal]\nsegment_bytes = \"4MiB\"\nquota = \"4GiB\"\n[ring]\nbytes = \"16MiB\"\n";
const RECEIVER: &str = "[journal]\nsegment_bytes = \"4MiB\"\n[history]\nquota = \"8GiB\"\n[apply]\nmin_interval = \"50ms\"\nidle = \"20ms\"\nbatch_bytes = \"4MiB\"\n";

fn history(home: &Home) -> Arc<History> {
    let part = |lane: u32, volume| Area { volume, blocks: lane * LANE_BLOCKS..(lane + 1) * LANE_BLOCKS };
    let lanes = (0..4).map(|lane| vec![part(lane, 0), part(lane, 1)]).collect();
    Arc::new(History::new(home.seed(), lanes))
}

fn spec() -> PairSpec<'static> {
    PairSpec { volumes: &VOLUMES, source: SOURCE, receiver: RECEIVER, ..PairSpec::default() }
}

#[test]
fn the_receiver_is_killed_under_load() -> Result<()> {
    story("kill the receiver", |home| {
        let mut pair = Pair::start(home, &spec())?;
        let history = history(home);
        let mut random = home.rng();
        let first = history.mark(|| pair.source.captured())?;
        let writers = Writers::start(&history, &pair.sockets(), Pace::default(), home.seed());
        for kill in 1..=KILLS {
            run_for(&mut random, &history, &pair)?;
            pair.receiver_daemon()?.kill()?;
            run_for(&mut random, &history, &pair)?;
            pair.start_receiver()?;
            ensure!(!writers.has_failed(), "a writer failed by kill {kill}");
            // The next kill may hit recovery; every third time what was missed is caught up first.
            if kill % 3 == 0 {
                let captured = pair.source.captured()?;
                let caught_up = |group: &tests::control::Group| group.number("received_lsn") >= captured;
                pair.source.until("the receiver to catch up", Duration::from_secs(60), caught_up)?;
            }
        }
        let mut latencies = writers.stop()?;
        home.figure(format!("{KILLS} kills, {} operations", history.answered().iter().sum::<usize>()));
        home.figure(format!("clients: p99 {:?}", tests::writer::percentile(&mut latencies, 99)));
        finish(home, &pair, &history, first)
    })
}

#[test]
fn the_agent_is_killed_under_load() -> Result<()> {
    story("kill the agent", |home| {
        let mut pair = Pair::start(home, &spec())?;
        let history = history(home);
        let mut random = home.rng();
        let epoch = pair.source.group()?.number("epoch");
        let first = history.mark(|| pair.source.captured())?;
        let writers = Writers::start(&history, &pair.sockets(), Pace::default(), home.seed());
        for kill in 1..=KILLS {
            run_for(&mut random, &history, &pair)?;
            pair.source_daemon()?.kill()?;
            pair.start_source()?;
            let group = pair.until_served().with_context(|| format!("after kill {kill}"))?;
            ensure!(group.number("epoch") == epoch, "kill {kill} began a new epoch: {}", group.0);
            ensure!(!writers.has_failed(), "a writer failed by kill {kill}");
        }
        run_for(&mut random, &history, &pair)?;
        writers.stop()?;
        home.figure(format!("{KILLS} kills, {} operations", history.answered().iter().sum::<usize>()));
        let points = pair.receiver.points(GROUP)?;
        ensure!(points["gaps"] == serde_json::json!([]), "history is broken: {points}");
        ensure!(pair.source.group()?.number("epoch") == epoch, "a new epoch began");
        finish(home, &pair, &history, first)
    })
}

/// Lets the load run for a random while, and ties it to an lsn where the agent answers.
fn run_for(random: &mut StdRng, history: &History, pair: &Pair<'_>) -> Result<()> {
    thread::sleep(Duration::from_millis(random.random_range(20..300)));
    poll("the agent", Duration::from_secs(30), || Ok(history.mark(|| pair.source.captured()).ok()))?;
    Ok(())
}

/// Nothing answered is missing, replica and source are equal, and every point is a prefix.
fn finish(home: &Home, pair: &Pair<'_>, history: &History, first: u64) -> Result<()> {
    let last = history.mark(|| pair.source.captured())?;
    pair.assert_replica_equals_source()?;
    let source = Images::open(&pair.backings())?;
    let held = assert_prefix_consistent(history, &source, &history.bounds_now()).context("the source")?;
    ensure!(held == history.answered(), "the source holds {held:?}");
    let bytes = history.answered_bytes();
    home.figure(format!(
        "source holds all {bytes} bytes that were answered, replica equal; lsn {first} to {last}"
    ));
    let mut random = home.rng();
    for _ in 0..POINTS {
        let lsn = random.random_range(first..=last);
        let images = Images::open(&pair.restore(&format!("lsn:{lsn}"), &home.path("restored"))?)?;
        assert_prefix_consistent(history, &images, &history.bounds_at(lsn))
            .with_context(|| format!("lsn {lsn}"))?;
    }
    home.figure(format!("{POINTS} random lsns agree with the oracle"));
    Ok(())
}
