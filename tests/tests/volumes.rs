//! Story 4: two volumes of one group are of one instant, at any lsn.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tests::control::poll;
use tests::history::{Area, History};
use tests::image::{Blocks, Images};
use tests::oracle::assert_prefix_consistent;
use tests::rig::{Pair, PairSpec};
use tests::stamp::{Found, Stamp};
use tests::story;
use tests::writer::{Pace, Writers};

const BLOCKS: u32 = 256;
const OPERATIONS: usize = 6000;
const POINTS: usize = 50;

#[test]
fn stamps_of_two_volumes_differ_by_the_one_in_flight() -> Result<()> {
    story("two volumes", |home| {
        let volumes = [("left", 8 << 20), ("right", 8 << 20)];
        let pair = Pair::start(home, &PairSpec { volumes: &volumes, ..PairSpec::default() })?;
        let area = |volume| Area { volume, blocks: 0..BLOCKS };
        let history = Arc::new(History::new(home.seed(), vec![vec![area(0), area(1)]]));
        let first = history.mark(|| pair.source.captured())?;
        let pace = Pace { per_second: 5000, blocks: 4, with_zeros: false, in_turn: true };
        let writers = Writers::start(&history, &pair.sockets(), pace, home.seed());
        poll("the writer", Duration::from_secs(60), || {
            history.mark(|| pair.source.captured())?;
            ensure!(!writers.has_failed(), "the writer failed");
            Ok((history.answered()[0] >= OPERATIONS).then_some(()))
        })?;
        writers.stop()?;
        let last = history.mark(|| pair.source.captured())?;
        pair.assert_replica_equals_source()?;
        let (writes, bytes) = (history.answered()[0], history.answered_bytes());
        home.figure(format!("{writes} writes in turn, {bytes} bytes, lsn {first} to {last}"));

        // The oracle can say no: the image of an early moment is not one of the last.
        let early = Images::open(&pair.restore(&format!("lsn:{first}"), &home.path("restored"))?)?;
        let verdict = assert_prefix_consistent(&history, &early, &history.bounds_at(last));
        ensure!(verdict.is_err(), "an image of lsn {first} passes for one of lsn {last}");

        let mut random = home.rng();
        for _ in 0..POINTS {
            let lsn = random.random_range(first..=last);
            let images = Images::open(&pair.restore(&format!("lsn:{lsn}"), &home.path("restored"))?)?;
            let held = assert_prefix_consistent(&history, &images, &history.bounds_at(lsn))
                .with_context(|| format!("lsn {lsn}"))?;
            // Said once more, without the oracle: the newest stamps are neighbours.
            let newest = [newest_stamp(&images, 0)?, newest_stamp(&images, 1)?];
            ensure!(newest[0].abs_diff(newest[1]) <= 1, "lsn {lsn}: newest stamps {newest:?}");
            ensure!(
                newest.iter().max() == Some(&(held[0] as u64)),
                "lsn {lsn}: {newest:?}, but {held:?} are held"
            );
        }
        home.figure(format!("{POINTS} random lsns: both volumes of one instant"));
        Ok(())
    })
}

fn newest_stamp(images: &Images, volume: u32) -> Result<u64> {
    let mut newest = 0;
    for block in 0..BLOCKS {
        if let Found::Stamped(Stamp { sequence, .. }) = Stamp::find(&images.block(volume, block)?) {
            newest = newest.max(sequence);
        }
    }
    Ok(newest)
}
