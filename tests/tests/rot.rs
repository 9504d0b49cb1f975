//! Rot in the receiver's journal, with real processes: what the source still holds is fetched again, also
//! where it was not applied yet; what it does not hold any more is a hole that is told, and a new epoch
//! brings the replica further.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::control::{Group, poll};
use tests::history::{Area, History};
use tests::image::Images;
use tests::oracle::assert_prefix_consistent;
use tests::program::afterimage;
use tests::rig::{GROUP, Pair, PairSpec};
use tests::writer::{Pace, Writers};
use tests::{Home, story};

const LIMIT: Duration = Duration::from_secs(90);
const RECEIVER: &str =
    "[journal]\nsegment_bytes = \"4MiB\"\n[apply]\nmin_interval = \"200ms\"\nbatch_bytes = \"4MiB\"\n";
/// Four segments: what is acknowledged is gone soon.
const SMALL_JOURNAL: &str = "[journal]\nquota = \"16MiB\"\nsegment_bytes = \"4MiB\"\n";

fn pair<'a>(home: &'a Home, source: &str) -> Result<(Pair<'a>, Arc<History>)> {
    let spec = PairSpec { volumes: &[("disk", 16 << 20)], source, receiver: RECEIVER, ..PairSpec::default() };
    let pair = Pair::start(home, &spec)?;
    Ok((pair, Arc::new(History::new(home.seed(), vec![vec![Area { volume: 0, blocks: 0..4096 }]]))))
}

fn segments(pair: &Pair<'_>) -> Result<Vec<PathBuf>> {
    let dir = pair.group_dir().join("journal");
    if !dir.exists() {
        // The receiver makes it with the first frame.
        return Ok(Vec::new());
    }
    let mut all: Vec<PathBuf> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    all.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    all.sort();
    Ok(all)
}

/// Writes until the receiver's journal has `count` more segments and all is acknowledged; the lsns before and
/// after.
fn write(pair: &Pair<'_>, history: &Arc<History>, count: usize, seed: u64) -> Result<(u64, u64)> {
    let first = history.mark(|| pair.source.captured())?;
    let wanted = segments(pair)?.len() + count;
    let pace = Pace { per_second: 2000, blocks: 32, ..Pace::default() };
    let writers = Writers::start(history, &pair.sockets(), pace, seed);
    poll("sealed segments", LIMIT, || {
        history.mark(|| pair.source.captured())?;
        Ok((segments(pair)?.len() >= wanted).then_some(()))
    })?;
    writers.stop()?;
    let last = history.mark(|| pair.source.captured())?;
    pair.receiver.until("everything received", LIMIT, |group| group.number("received_lsn") >= last)?;
    Ok((first, last))
}

/// Flips a byte in the middle of a sealed segment; what the file held.
fn rot(path: &Path) -> Result<Vec<u8>> {
    let whole = fs::read(path)?;
    let at = whole.len() / 2;
    File::options().write(true).open(path)?.write_all_at(&[!whole[at]], at as u64)?;
    Ok(whole)
}

fn repaired(group: &Group) -> usize {
    group.0["repaired"].as_array().map_or(0, Vec::len)
}

fn verify_exits(pair: &Pair<'_>, code: i32) -> Result<()> {
    afterimage(["journal".as_ref(), "verify".as_ref(), pair.group_dir().as_os_str()])?.expect(code)?;
    Ok(())
}

#[test]
fn what_the_source_still_holds_is_fetched_again() -> Result<()> {
    story("rot fetched", |home| {
        let (mut pair, history) = pair(home, "")?;
        let (first, last) = write(&pair, &history, 3, home.seed())?;
        pair.assert_replica_equals_source()?;

        // Applied: found by scrub.
        let sealed = segments(&pair)?[1].clone();
        let whole = rot(&sealed)?;
        verify_exits(&pair, 4)?;
        pair.receiver.command(&["scrub", GROUP])?.expect(0)?;
        let group = pair.receiver.until("repaired", LIMIT, |group| repaired(group) == 1)?;
        let told = &group.0["repaired"][0];
        ensure!(told["file"] == sealed.to_string_lossy().as_ref() && told["time"].is_string(), "{told}");
        ensure!(fs::read(&sealed)? == whole, "byte for byte what it was");
        verify_exits(&pair, 0)?;
        pair.receiver.until("well", LIMIT, |group| group.state() == "replicating")?;
        home.figure(format!("an applied frame is fetched: {told}"));

        // Not yet applied: met by apply, while the replica rolls forward.
        pair.receiver.command(&["rewind", GROUP, "--at", &format!("lsn:{first}")])?.expect(0)?;
        let before = segments(&pair)?.len();
        let (_, newest) = write(&pair, &history, 3, home.seed() + 1)?;
        let unapplied = segments(&pair)?[before].clone();
        let whole = rot(&unapplied)?;
        pair.receiver.command(&["resume", GROUP])?.expect(0)?;
        pair.receiver.until("repaired", LIMIT, |group| repaired(group) == 2)?;
        // Until it was, `wait` says at once that apply stands still.
        pair.receiver.until("applied", LIMIT, |group| group.number("checkpoint_lsn") >= newest)?;
        poll("the source hears of it", LIMIT, || {
            Ok((pair.source.command(&["wait", "--timeout", "60s"])?.code == 0).then_some(()))
        })?;
        pair.assert_replica_equals_source()?;
        ensure!(fs::read(&unapplied)? == whole, "byte for byte what it was");
        verify_exits(&pair, 0)?;
        for lsn in [last, newest] {
            let to = pair.restore(&format!("lsn:{lsn}"), &home.path("restored.img"))?;
            assert_prefix_consistent(&history, &Images::open(&to)?, &history.bounds_at(lsn))?;
        }
        home.figure("a frame that was not applied yet is fetched, and applied");
        pair.receiver_daemon()?.expect_alive()
    })
}

#[test]
fn what_the_source_does_not_hold_any_more_is_a_hole_that_is_told() -> Result<()> {
    story("rot lost", |home| {
        let (mut pair, history) = pair(home, SMALL_JOURNAL)?;
        write(&pair, &history, 10, home.seed())?;
        pair.assert_replica_equals_source()?;
        let hole = |pair: &Pair<'_>| -> Result<Option<Value>> {
            let points = pair.receiver.points(GROUP)?;
            let lost = |gap: &&Value| {
                gap["reason"].as_str().is_some_and(|why| why.contains("does not hold it any more"))
            };
            Ok(points["gaps"].as_array().and_then(|gaps| gaps.iter().rfind(lost)).cloned())
        };
        let restore = |pair: &Pair<'_>, lsn: u64| {
            let (at, to) = (format!("lsn:{lsn}"), home.path("restored.img"));
            pair.receiver.command(&["restore", GROUP, "--at", &at, "--to", &to.to_string_lossy(), "--force"])
        };
        let exact = |pair: &Pair<'_>, lsn: u64| -> Result<()> {
            restore(pair, lsn)?.expect(0)?;
            assert_prefix_consistent(
                &history,
                &Images::open(&[home.path("restored.img")])?,
                &history.bounds_at(lsn),
            )?;
            Ok(())
        };

        // Applied: damage of history.
        rot(&segments(&pair)?[1])?;
        pair.receiver.command(&["scrub", GROUP])?.expect(0)?;
        let found = poll("the hole", LIMIT, || hole(&pair))?;
        let (from, to) =
            (found["from_lsn"].as_u64().context("from")?, found["to_lsn"].as_u64().context("to")?);
        ensure!(from + 1 < to, "{found}");
        restore(&pair, from + 1)?.expect_saying(3, &format!("lsn {from} "))?;
        for lsn in [from, to] {
            exact(&pair, lsn)?;
        }
        home.figure(format!("applied and lost: {found}"));

        // Not yet applied: apply stops before it, the source is told, and begins a new epoch by itself.
        let epoch = pair.source.group()?.number("epoch");
        pair.receiver.command(&["rewind", GROUP, "--at", "latest"])?.expect(0)?;
        let before = segments(&pair)?.len();
        let (stood, newest) = write(&pair, &history, 10, home.seed() + 1)?;
        rot(&segments(&pair)?[before])?;
        pair.receiver.command(&["resume", GROUP])?.expect(0)?;
        let group = pair.receiver.until("needs a resync", LIMIT, |group| group.state() == "needs-resync")?;
        let good = group.number("checkpoint_lsn");
        ensure!(stood < good && good < newest && group.why().contains("lost"), "lsn {good}: {}", group.why());
        poll("the hole", LIMIT, || Ok(hole(&pair)?.filter(|gap| gap["from_lsn"].as_u64() == Some(good))))?;
        restore(&pair, good + 1)?.expect_saying(3, "does not hold it any more")?;
        exact(&pair, good)?;
        home.figure(format!("lost before it was applied: the replica stops at lsn {good}: {}", group.why()));

        // The replica follows again; what is damaged for good is history, and is told for as long as it is
        // stored.
        pair.receiver.until("the next epoch", LIMIT, |group| {
            group.number("epoch") > epoch
                && group.state() == "degraded"
                && group.why().starts_with("damage in ")
        })?;
        pair.until_served()?;
        poll("the source hears of it", LIMIT, || {
            Ok((pair.source.command(&["wait", "--timeout", "60s"])?.code == 0).then_some(()))
        })?;
        pair.assert_replica_equals_source()?;
        restore(&pair, newest)?.expect(3)?;
        exact(&pair, good)?;
        ensure!(hole(&pair)?.is_some(), "the hole stays told");
        home.figure("the next epoch brings the replica further, and what lies before the hole stays");
        Ok(())
    })
}
