//! What has to be true: at any time, of any point, and once nothing is in the way.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use journal::Lsn;
use receiver::point::At;
use receiver::view::View;
use replicator::status::State;

use super::{GROUP, Step, Story};
use crate::net::Weather;
use crate::side::Process;

/// A view is read in pieces of this size.
const PIECE: usize = 32 << 10;
/// How long, in virtual time, everything may take to come right once nothing is in the way.
const HEALING: Duration = Duration::from_secs(240);

impl Story {
    /// Notes what the source was told to be durable.
    pub(super) fn see_acknowledged(&mut self) {
        if let Some(source) = self.source.as_ref().and_then(Process::daemon) {
            let peer = source.watch_peer().borrow().clone();
            self.acknowledged = self.acknowledged.max((peer.epoch, peer.received.0));
        }
    }

    /// Promise 4: what was acknowledged is there after any end of the receiver.
    pub(super) fn receiver_kept_its_word(&mut self) -> Step {
        let word = self.acknowledged;
        self.until_runs("the receiver", |story| {
            story.receiver.as_ref().map(|receiver| (receiver.daemon().is_some(), receiver.ended()))
        })?;
        let status = self.receiver.as_ref().and_then(Process::daemon).map(|daemon| daemon.status());
        let Some(group) = status.and_then(|status| status.groups.into_iter().next()) else {
            return if word.1 == 0 {
                Ok(())
            } else {
                Err(format!("promise 4: acknowledged {word:?}, and no group is there"))
            };
        };
        let held = (group.epoch, group.positions.received_lsn.0);
        if held < word {
            return Err(format!(
                "promise 4: acknowledged {word:?}, held after the restart {held:?} ({:?})",
                group.why
            ));
        }
        Ok(())
    }

    pub(super) fn check_replica(&self, lsn: u64) -> Step {
        let images = self.replicas();
        self.model.check_point(lsn, &images).map_err(|why| format!("the rewound replica: {why}"))
    }

    fn replicas(&self) -> Vec<Vec<u8>> {
        let image = |volume| {
            let path = self.ground.paths.receiver.join("replica").join(GROUP).join(format!("v{volume}.img"));
            self.receiver_disk.contents(&path).unwrap_or_default()
        };
        (0..self.shape.volumes.len()).map(image).collect()
    }

    /// What holds at any time.
    pub(super) fn promises(&mut self) -> Step {
        if let Some(why) = self.load.broken.lock().ok().and_then(|mut broken| broken.take()) {
            return Err(why);
        }
        for (who, ended) in [
            ("source", self.source.as_ref().and_then(Process::ended)),
            ("receiver", self.receiver.as_ref().and_then(Process::ended)),
        ] {
            if let Some(how) = ended {
                return Err(format!("the {who} ended by itself: {how:?}"));
            }
        }
        Ok(())
    }

    /// Random points of the history, all volumes at the same instant.
    pub(super) fn points(&mut self, count: usize) -> Step {
        // At times so slowly that batches are applied in the middle of a point.
        let slow_us = if self.room().chance(400) { 3000 } else { 0 };
        if let Some(receiver) = &self.receiver {
            receiver.disk.slow_reads(slow_us);
        }
        let checked = self.check_points(count);
        if let Some(receiver) = &self.receiver {
            receiver.disk.slow_reads(0);
        }
        checked
    }

    fn check_points(&mut self, count: usize) -> Step {
        for _ in 0..count {
            let Some(receiver) = self.receiver.as_ref().and_then(Process::daemon) else { return Ok(()) };
            let Ok(history) = receiver.history(GROUP) else { return Ok(()) };
            let points = history.points();
            let (Some(oldest), Some(newest)) = (points.oldest, points.newest) else { return Ok(()) };
            let lsn = oldest.lsn.0 + self.room().draw(newest.lsn.0 - oldest.lsn.0 + 1);
            match images(&history, lsn) {
                Ok(Some(images)) => {
                    self.told.points += 1;
                    self.model.check_point(lsn, &images).map_err(|why| format!("promise 5: {why}"))?;
                }
                Ok(None) => self.told.refused += 1,
                Err(why) => return Err(format!("promise 5: lsn {lsn}: {why}")),
            }
        }
        Ok(())
    }

    /// The source has noticed that this is another receiver than a moment ago.
    pub(super) fn until_greeted(&mut self) -> Step {
        self.site.net.set(Weather::FAIR);
        let ends = machine::now() + HEALING;
        loop {
            let status = self.receiver.as_ref().and_then(Process::daemon).map(|daemon| daemon.status());
            if status.is_some_and(|status| status.groups.iter().any(|group| group.peer.is_some())) {
                return Ok(());
            }
            if machine::now() > ends {
                return Err(format!("the source does not come back: {}", self.states()));
            }
            machine::sleep(Duration::from_millis(20));
        }
    }

    /// Everything comes right by itself: all is captured, received and on the replica.
    pub(super) fn until_well(&mut self, when: &str) -> Step {
        // Loss at a tenth lets CUBIC through at the pace of a modem: that is no failure.
        self.site.net.set(Weather::FAIR);
        let ends = machine::now() + HEALING;
        loop {
            self.promises()?;
            let status = self.source().map(|source| source.status())?;
            let group = &status.groups[0];
            // A disk that is still compared is not well; that a copy was refused is.
            if group.state == State::Replicating
                && group.connected
                && !group.why.contains("is being compared")
            {
                break;
            }
            if machine::now() > ends {
                return Err(format!("{when}: does not come right: {}", self.states()));
            }
            machine::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// With nothing under way, replica and disk are the same.
    pub(super) fn equal(&mut self) -> Step {
        self.load.paused.store(true, Ordering::Release);
        let outcome = self.equal_when_quiet();
        self.load.paused.store(false, Ordering::Release);
        outcome
    }

    fn equal_when_quiet(&mut self) -> Step {
        let ends = machine::now() + HEALING;
        while self.load.busy.load(Ordering::Acquire) > 0 {
            machine::sleep(Duration::from_millis(2));
        }
        loop {
            self.until_well("before comparing")?;
            let captured = self.source()?.captured_lsn();
            let status = self.receiver.as_ref().and_then(Process::daemon).map(|daemon| daemon.status());
            let group = status.and_then(|status| status.groups.into_iter().next());
            let source = self.source()?.status();
            let same = group.as_ref().is_some_and(|group| {
                group.positions.checkpoint_lsn >= captured && group.epoch == source.groups[0].epoch
            });
            if same && source.groups[0].state == State::Replicating {
                break;
            }
            if machine::now() > ends {
                return Err(format!("the replica does not get there: {}", self.states()));
            }
            machine::sleep(Duration::from_millis(20));
        }
        for (volume, replica) in self.replicas().iter().enumerate() {
            let path = self.ground.paths.backing.join(format!("v{volume}.img"));
            let disk = self.backing_disk.contents(&path).unwrap_or_default();
            if *replica != disk {
                let at = disk.iter().zip(replica).position(|(a, b)| a != b);
                return Err(format!(
                    "promise 3: replicating, nothing under way, and volume {volume} differs at byte {at:?} ({} and {} bytes)",
                    disk.len(),
                    replica.len()
                ));
            }
        }
        Ok(())
    }
}

/// Every volume at an lsn; `None` where that is no recovery point.
fn images(history: &Arc<receiver::history::History>, lsn: u64) -> Result<Option<Vec<Vec<u8>>>, String> {
    let refused = |error: receiver::Error| match error.kind {
        receiver::ErrorKind::NotPossible => Ok(None),
        _ => Err(error.to_string()),
    };
    let (point, _pin) = match history.resolve_pinned(&At::Lsn(Lsn(lsn))) {
        Ok(found) => found,
        Err(error) => return refused(error),
    };
    let mut images = Vec::new();
    for (_, name, _) in history.volumes_at(point.moment.lsn) {
        let view = match View::open(history, point, &name) {
            Ok(view) => view,
            Err(error) => return refused(error),
        };
        let mut image = vec![0; usize::try_from(view.size_bytes()).unwrap_or(0)];
        // In pieces, as a client would: batches are applied between them.
        for (at, piece) in image.chunks_mut(PIECE).enumerate() {
            view.read_at(piece, (at * PIECE) as u64).map_err(|error| format!("{name}: {error}"))?;
        }
        images.push(image);
    }
    Ok(Some(images))
}
