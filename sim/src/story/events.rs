//! What goes wrong in a story, and what an operator orders.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use journal::Lsn;
use receiver::point::At;
use replicator::status::State;

use super::{GROUP, Step, Story};
use crate::model::Back;
use crate::net::Weather;
use crate::side::Process;

impl Story {
    /// A failure, or an order of the operator.
    pub(super) fn event(&mut self) -> Step {
        if self.source_backup.is_some() && self.room().chance(250) {
            return self.roll_back_source();
        }
        match self.room().draw(22) {
            0 | 1 => self.kill_source(),
            2 | 3 => self.kill_receiver(),
            4 => self.source_power_loss(),
            5 | 6 => self.receiver_power_loss(),
            7 => self.outage(),
            8 => self.bad_weather(),
            9 => self.burst(),
            10 => self.receiver_full(),
            11 => self.receiver_sync_fails(),
            12 => self.clock_jump(),
            13 => self.restart_source(),
            14 => self.restart_receiver(),
            15 => self.roll_back_receiver(),
            16 => self.roll_back_source(),
            17 => self.rewind(),
            _ => self.edge(),
        }
    }

    /// Half of the time with writes under way on a slow disk; and nobody writes over what became of them.
    fn kill_source(&mut self) -> Step {
        let slow_us = if self.room().chance(500) { 1000 + self.room().draw(60_000) } else { 0 };
        self.note(format!("source: kill -9, its disk slow by up to {slow_us} us"));
        if let Some(backing) = self.backing.as_ref().filter(|_| slow_us > 0) {
            backing.slow(slow_us);
            self.pause(300);
            self.load.paused.store(true, Ordering::Release);
        }
        self.see_acknowledged();
        if let Some(source) = self.source.take() {
            source.kill(self.room());
        }
        self.pause(1500);
        self.start_source(Back::Killed)?;
        if slow_us > 0 { self.equal() } else { Ok(()) }
    }

    fn source_power_loss(&mut self) -> Step {
        self.note("source: power lost");
        self.see_acknowledged();
        if let Some(source) = self.source.take() {
            source.kill(self.room());
        }
        self.lose_ring();
        let seed = self.room().draw(u64::MAX);
        (self.source_disk, self.backing_disk) =
            (self.source_disk.crash(seed), self.backing_disk.crash(seed ^ 5));
        self.pause(1500);
        self.start_source(Back::PowerLost)
    }

    pub(super) fn lose_ring(&self) {
        let _ = std::fs::remove_dir_all(&self.ground.paths.ring);
        let _ = std::fs::create_dir_all(&self.ground.paths.ring);
    }

    fn restart_source(&mut self) -> Step {
        self.note("source: stop and start");
        self.see_acknowledged();
        if let Some(source) = self.source.take() {
            source.stop(self.room()).map_err(|why| format!("the source's stop: {why}"))?;
        }
        self.pause(1500);
        self.start_source(Back::Killed)
    }

    fn kill_receiver(&mut self) -> Step {
        self.note("receiver: kill -9");
        self.stop_receiver_hard();
        self.pause(1500);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    pub(super) fn stop_receiver_hard(&mut self) {
        self.see_acknowledged();
        if let Some(receiver) = self.receiver.take() {
            receiver.kill(self.room());
        }
        // What was under way when it died.
        self.see_acknowledged();
    }

    fn receiver_power_loss(&mut self) -> Step {
        self.note("receiver: power lost");
        self.stop_receiver_hard();
        let seed = self.room().draw(u64::MAX);
        self.receiver_disk = self.receiver_disk.crash(seed);
        self.pause(1500);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    fn restart_receiver(&mut self) -> Step {
        self.note("receiver: stop and start");
        self.see_acknowledged();
        if let Some(receiver) = self.receiver.take() {
            receiver.stop(self.room()).map_err(|why| format!("the receiver's stop: {why}"))?;
        }
        self.pause(1500);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    /// The link is away until the quota is used up, and from then on nobody writes: what was given up has
    /// only its own bits.
    fn shortage(&mut self) -> Step {
        self.note("network: cut until the quota is used up");
        self.site.net.set(Weather { cut: true, ..Weather::FAIR });
        self.load.pause_us.store(5000, Ordering::Relaxed);
        for _ in 0..6000 {
            if self.source()?.status().groups[0].state == State::Degraded {
                break;
            }
            machine::sleep(Duration::from_millis(2));
        }
        self.load.paused.store(true, Ordering::Release);
        self.load.pause_us.store(self.shape.pause_us(), Ordering::Relaxed);
        self.pause(1000);
        self.site.net.set(Weather::FAIR);
        self.note("network: back");
        self.equal()
    }

    fn outage(&mut self) -> Step {
        if self.shape.quota < 64 << 20 && self.room().chance(700) {
            return self.shortage();
        }
        self.note("network: cut");
        self.site.net.set(Weather { cut: true, ..Weather::FAIR });
        self.pause(if self.shape.compresses { 6000 } else { 12_000 });
        self.site.net.set(Weather::FAIR);
        self.note("network: back");
        Ok(())
    }

    fn bad_weather(&mut self) -> Step {
        let room = self.room();
        let weather = Weather {
            cut: false,
            loss: room.draw(200),
            doubled: room.draw(200),
            delay_us: 500 + room.draw(40_000),
            jitter_us: room.draw(40_000),
        };
        self.note(format!("network: {weather:?}"));
        self.site.net.set(weather);
        self.pause(4000);
        if self.room().chance(700) {
            self.site.net.set(Weather::FAIR);
        }
        Ok(())
    }

    /// More than the ring takes, over a journal that hardly moves; at times the clients' own disk becomes
    /// slow then, and writes are still under way when the gap is repaired.
    fn burst(&mut self) -> Step {
        let slow_us = if self.room().chance(500) { 1000 + self.room().draw(100_000) } else { 0 };
        self.note(format!("clients: a burst, the source journal's disk slow, theirs by up to {slow_us} us"));
        let (Some(source), Some(backing)) = (&self.source, self.backing.clone()) else { return Ok(()) };
        source.disk.slow(80_000);
        self.load.pause_us.store(50, Ordering::Relaxed);
        self.pause(1200);
        backing.slow(slow_us);
        self.pause(100);
        if let Some(source) = &self.source {
            source.disk.slow(0);
        }
        if slow_us == 0 {
            self.load.pause_us.store(self.shape.pause_us(), Ordering::Relaxed);
            return Ok(());
        }
        // The repair begins under these writes, and what it misses nobody writes over.
        for _ in 0..1000 {
            if self.source()?.status().groups[0].state != State::Degraded {
                break;
            }
            machine::sleep(Duration::from_millis(2));
        }
        self.load.paused.store(true, Ordering::Release);
        self.pause(300);
        backing.slow(0);
        self.load.pause_us.store(self.shape.pause_us(), Ordering::Relaxed);
        self.equal()
    }

    fn receiver_full(&mut self) -> Step {
        self.note("receiver: disk full");
        let used = self.receiver_disk.used_bytes();
        self.receiver_disk.set_capacity(Some(used + self.room().draw(3 << 20)));
        self.pause(4000);
        self.receiver_disk.set_capacity(None);
        Ok(())
    }

    /// A failed sync is final: the receiver ends by itself, and what it had acknowledged is there.
    fn receiver_sync_fails(&mut self) -> Step {
        self.note("receiver: syncs fail");
        let below = if self.room().chance(500) { "groups" } else { "replica" };
        let path = self.ground.paths.receiver.join(below);
        self.receiver_disk.fail_syncs_below(Some(&path));
        for _ in 0..1500 {
            if self.receiver.as_ref().is_some_and(|receiver| receiver.ended().is_some()) {
                break;
            }
            machine::sleep(Duration::from_millis(2));
        }
        self.stop_receiver_hard();
        self.receiver_disk.fail_syncs(false);
        let seed = self.room().draw(u64::MAX);
        self.receiver_disk = self.receiver_disk.crash(seed);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    fn clock_jump(&mut self) -> Step {
        let seconds = i64::try_from(self.room().draw(14_400)).unwrap_or(0) - 7200;
        self.note(format!("clocks: {seconds} s"));
        self.room().jump(seconds * 1_000_000_000);
        Ok(())
    }

    /// The receiver is restored from a backup that was taken earlier, or a backup is taken.
    fn roll_back_receiver(&mut self) -> Step {
        let Some(backup) = self.receiver_backup.take() else {
            self.note("receiver: a backup is taken");
            self.stop_receiver_hard();
            self.receiver_backup = Some(self.receiver_disk.crash(1));
            self.start_receiver();
            return self.receiver_kept_its_word();
        };
        self.note("receiver: restored from its backup");
        self.stop_receiver_hard();
        self.receiver_disk = backup;
        self.start_receiver();
        self.until_greeted()?;
        // Nothing that was acknowledged since the backup is expected any more.
        self.acknowledged = (0, 0);
        self.until_well("after the receiver was rolled back")
    }

    /// The same of the source.
    fn roll_back_source(&mut self) -> Step {
        let Some((disk, backing, captured)) = self.source_backup.take() else {
            return self.back_up_source();
        };
        self.note("source: restored from its backup");
        let newest = self.source().map_or(u64::MAX, |source| source.captured_lsn().0);
        if let Some(source) = self.source.take() {
            source.kill(self.room());
        }
        self.lose_ring();
        (self.source_disk, self.backing_disk) = (disk, backing);
        self.model.ambiguous(captured..newest.saturating_add(1));
        self.acknowledged = (0, 0);
        let apart = self.room().chance(500);
        if apart {
            self.site.net.set(Weather { cut: true, ..Weather::FAIR });
        }
        self.start_source(Back::RolledBack)?;
        if apart {
            self.passes(newest);
        }
        self.until_well("after the source was rolled back")
    }

    fn back_up_source(&mut self) -> Step {
        let stops = self.room().chance(500);
        self.note(if stops { "source: stopped for a backup" } else { "source: a backup is taken" });
        match self.source.take() {
            Some(source) if stops => source.stop(self.room()).map_err(|why| format!("a stop: {why}"))?,
            Some(source) => source.kill(self.room()),
            None => {}
        }
        self.lose_ring();
        (self.source_disk, self.backing_disk) = (self.source_disk.crash(1), self.backing_disk.crash(1));
        self.source_backup = Some((self.source_disk.crash(1), self.backing_disk.crash(1), 0));
        self.start_source(Back::PowerLost)?;
        let captured = self.source()?.captured_lsn().0;
        if let Some(backup) = &mut self.source_backup {
            backup.2 = captured;
        }
        Ok(())
    }

    /// On its own, the source gives out lsns that the receiver knows another content of, and goes beyond
    /// them.
    fn passes(&self, newest: u64) {
        for _ in 0..2000 {
            if self.source().is_ok_and(|source| source.captured_lsn().0 > newest.saturating_add(50)) {
                break;
            }
            machine::sleep(Duration::from_millis(5));
        }
    }

    /// Takes the replica back, compares it, and rolls it forward again.
    fn rewind(&mut self) -> Step {
        let Some(receiver) = self.receiver.as_ref().and_then(Process::daemon) else { return Ok(()) };
        let Ok(points) = receiver.points(GROUP) else { return Ok(()) };
        let (Some(oldest), Some(newest)) = (points.oldest, points.newest) else { return Ok(()) };
        let at = match self.room().chance(500) {
            true => At::Latest,
            false => At::Lsn(Lsn(oldest.lsn.0 + self.room().draw(newest.lsn.0 - oldest.lsn.0 + 1))),
        };
        // Whoever holds it holds its directory, also when it is killed.
        drop(receiver);
        self.note(format!("receiver: rewind to {at:?}"));
        let order = at.clone();
        let outcome = self.on_receiver(move |handle| async move {
            handle
                .rewind(GROUP, order)
                .await
                .map(|report| report.lsn.0)
                .map_err(|error| (error.kind, error.to_string()))
        })?;
        match outcome {
            Some(Ok(lsn)) => {
                self.check_replica(lsn)?;
                self.told.points += 1;
                if self.room().chance(400) {
                    self.receiver_power_loss()?;
                    self.check_replica(lsn)?;
                }
                self.pause(1500);
            }
            Some(Err((receiver::ErrorKind::NotPossible, _))) => self.told.refused += 1,
            Some(Err((_, why))) => return Err(format!("rewind to {at:?}: {why}")),
            None => return Ok(()),
        }
        let resumed = self.on_receiver(|handle| async move {
            handle.resume(GROUP).await.map(|_| ()).map_err(|error| (error.kind, error.to_string()))
        })?;
        match resumed {
            Some(Err((kind, why))) if kind != receiver::ErrorKind::NotPossible => {
                Err(format!("resume: {why}"))
            }
            _ => Ok(()),
        }
    }

    /// Runs an order on a runtime of its own, as the control socket would.
    pub(super) fn on_receiver<T: Send + 'static, F: Future<Output = T>>(
        &self,
        order: impl FnOnce(Arc<receiver::agent::Handle>) -> F,
    ) -> Result<Option<T>, String> {
        let Some(handle) = self.receiver.as_ref().and_then(Process::daemon) else { return Ok(None) };
        let done = crate::turn::run(self.room(), &self.site.net, order(handle));
        done.map(Some).map_err(|error| error.to_string())
    }
}
