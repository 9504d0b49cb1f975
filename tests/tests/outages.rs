//! Story 7: the receiver is away, the source's journal is full, the receiver's disk is full.

use std::fs::{self, File};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tests::control::{Control, Group, poll};
use tests::history::{Area, History};
use tests::image::Images;
use tests::nbd::{self, Loop, Mount};
use tests::nbd_client::NbdClient;
use tests::oracle::assert_prefix_consistent;
use tests::program::{need, run};
use tests::rig::{Pair, PairSpec};
use tests::story;
use tests::writer::{Pace, Writers, percentile};

const MINUTE: Duration = Duration::from_secs(60);
/// How long the load is looked at in each condition.
const LOOK: Duration = Duration::from_secs(5);

fn one_lane(run: u64) -> Arc<History> {
    Arc::new(History::new(
        run,
        vec![vec![Area { volume: 0, blocks: 0..4096 }], vec![Area { volume: 0, blocks: 4096..8192 }]],
    ))
}

/// Writes for `LOOK` and measures.
fn load(history: &Arc<History>, pair: &Pair<'_>, seed: u64) -> Result<Vec<Duration>> {
    let pace = Pace { per_second: 500, ..Pace::default() };
    let writers = Writers::start(history, &pair.sockets(), pace, seed);
    thread::sleep(LOOK);
    writers.stop()
}

#[test]
fn a_receiver_that_is_away_is_not_felt_and_the_backlog_drains() -> Result<()> {
    story("receiver away", |home| {
        let mut pair =
            Pair::start(home, &PairSpec { volumes: &[("disk", 64 << 20)], ..PairSpec::default() })?;
        let history = one_lane(home.seed());
        let mut with = load(&history, &pair, 1)?;
        // Stopped: it holds the connection and says nothing, which is harder than being gone.
        pair.receiver_daemon()?.signal(Signal::STOP)?;
        let mut stopped = load(&history, &pair, 2)?;
        pair.receiver_daemon()?.signal(Signal::CONT)?;
        pair.receiver_daemon()?.kill()?;
        let mut away = load(&history, &pair, 3)?;
        let group = pair.source.group()?;
        ensure!(group.state() == "replicating", "{}", group.0);
        let backlog = group.number("backlog_bytes");
        ensure!(backlog > 1 << 20, "the backlog grows: {}", group.0);
        ensure!(group.number("rpo_ms") >= 1000, "the lag is told: {}", group.0);

        let p99 = [percentile(&mut with, 99), percentile(&mut stopped, 99), percentile(&mut away, 99)];
        let p50 = [percentile(&mut with, 50), percentile(&mut stopped, 50), percentile(&mut away, 50)];
        home.figure(format!("p50 with, stopped, away: {p50:?}; p99: {p99:?}; backlog {backlog} bytes"));
        for (condition, latency) in ["stopped", "away"].into_iter().zip(&p99[1..]) {
            let limit = p99[0] * 5 + Duration::from_millis(20);
            ensure!(*latency <= limit, "{condition}: p99 {latency:?}, with the receiver {:?}", p99[0]);
        }

        pair.start_receiver()?;
        let begun = Instant::now();
        pair.source.until("the backlog to drain", MINUTE, |group| group.number("backlog_bytes") == 0)?;
        home.figure(format!("backlog drained by itself in {:.1} s", begun.elapsed().as_secs_f64()));
        pair.assert_replica_equals_source()?;
        let source = Images::open(&pair.backings())?;
        assert_prefix_consistent(&history, &source, &history.bounds_now())?;
        Ok(())
    })
}

/// Writes `bytes` that do not compress, as fast as it goes.
fn flood(pair: &Pair<'_>, bytes: u64, seed: u64) -> Result<()> {
    use rand::{Rng, SeedableRng};
    let (socket, export) = &pair.sockets()[0];
    let mut client = NbdClient::connect(socket, export)?;
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut piece = vec![0; 1 << 20];
    for number in 0..bytes >> 20 {
        random.fill(piece.as_mut_slice());
        client.write(&piece, (number << 20) % client.size())?;
    }
    client.flush()
}

#[test]
fn a_full_source_journal_degrades_the_group_and_never_the_disk() -> Result<()> {
    story("journal quota", |home| {
        let spec = PairSpec {
            volumes: &[("disk", 64 << 20)],
            source: "[journal]\nquota = \"16MiB\"\nsegment_bytes = \"4MiB\"\n",
            ..PairSpec::default()
        };
        let mut pair = Pair::start(home, &spec)?;
        pair.assert_replica_equals_source()?;
        let epoch = pair.source.group()?.number("epoch");
        pair.receiver_daemon()?.kill()?;
        flood(&pair, 128 << 20, home.seed())?;
        let is_bad = |group: &Group| group.state() == "degraded";
        let group = pair.source.until("degraded", MINUTE, is_bad)?;
        ensure!(group.why().contains("quota"), "the reason is told: {}", group.why());
        home.figure(format!("degraded: {}", group.why()));
        pair.source.command(&["wait", "--timeout", "30s"])?.expect_saying(3, "quota")?;
        // The receiver's return makes room, and then everything else happens by itself, under load.
        pair.start_receiver()?;
        flood(&pair, 16 << 20, home.seed() + 1)?;
        let group =
            pair.source.until("repaired by itself", MINUTE, |group| group.state() == "replicating")?;
        ensure!(group.number("epoch") == epoch, "what was given up is told in the stream: {}", group.0);
        pair.assert_replica_equals_source()?;
        home.figure("repaired by itself, in the same epoch");
        let points = pair.receiver.points(tests::rig::GROUP)?;
        ensure!(points["gaps"].as_array().is_some_and(|gaps| !gaps.is_empty()), "the gap is told: {points}");
        Ok(())
    })
}

#[test]
fn a_full_disk_at_the_receiver_stops_acknowledgements_until_there_is_room() -> Result<()> {
    story("receiver's disk full", |home| {
        need(&nbd::PROGRAMS)?;
        need(&["mkfs.ext4"])?;
        let image = home.path("small.img");
        File::create(&image)?.set_len(256 << 20)?;
        let device = Loop::attach(&image)?;
        run("mkfs.ext4", ["-q".as_ref(), "-m".as_ref(), "0".as_ref(), device.path().as_os_str()])?;
        let mount = Mount::on(&home.path("small"), device.path(), "noatime")?;
        let spec = PairSpec {
            volumes: &[("disk", 64 << 20)],
            receiver: "[journal]\nsegment_bytes = \"4MiB\"\n",
            receiver_dir: Some(mount.path().join("receiver")),
            ..PairSpec::default()
        };
        let pair = Pair::start(home, &spec)?;
        pair.assert_replica_equals_source()?;
        // All but a few MiB is taken by somebody else.
        let free = rustix::fs::statvfs(mount.path())?;
        let ballast = mount.path().join("ballast");
        let bytes = (free.f_bavail * free.f_frsize).saturating_sub(24 << 20);
        run("fallocate", ["-l".as_ref(), bytes.to_string().as_ref(), ballast.as_os_str()])?;

        flood(&pair, 64 << 20, home.seed())?;
        let captured = pair.source.captured()?;
        let said = told_full(&pair.receiver)?;
        home.figure(format!("the receiver says: {said}"));
        let group = pair.source.group()?;
        ensure!(group.number("received_lsn") < captured, "it acknowledged what it cannot hold: {}", group.0);
        ensure!(pair.source.command(&["wait", "--timeout", "2s"])?.code != 0, "nothing can be waited for");
        // The source's disk never notices.
        flood(&pair, 4 << 20, home.seed() + 1)?;

        fs::remove_file(&ballast)?;
        let captured = pair.source.captured()?;
        let resumed = |group: &Group| group.number("received_lsn") >= captured;
        pair.source.until("acknowledgements to resume", MINUTE, resumed)?;
        pair.assert_replica_equals_source()?;
        let points = pair.receiver.points(tests::rig::GROUP)?;
        ensure!(points["gaps"] == serde_json::json!([]), "nothing was lost: {points}");
        home.figure("acknowledgements resumed by themselves, replica equal, no gap");
        drop(pair);
        Ok(())
    })
}

/// The receiver's own words about its full disk.
fn told_full(receiver: &Control) -> Result<String> {
    poll("the receiver to say that its disk is full", MINUTE, || {
        let group = receiver.group()?;
        let why = group.why().to_owned();
        Ok((group.state() != "replicating"
            && ["full", "no room", "space"].iter().any(|word| why.contains(word)))
        .then_some(why))
    })
}
