//! The edges: what others do to disks, replicas and directories, and peers that lie.

use std::path::PathBuf;

use std::sync::Arc;
use std::time::Duration;

use journal::io::Disk;
use nbd::Export as _;
use replicator::status::State;
use replicator::{Replicator, Surroundings};

use super::{GROUP, Step, Story};
use crate::disk::{LifeDisk, identify, mark, touch};
use crate::liar::{Liar, Truth};
use crate::model::{BLOCK, Back};
use crate::side::{Process, SimBackings, source_address};

/// Epochs that one visit of a liar may cost at most.
const EPOCHS_OF_A_LIE: u64 = 1000;

impl Story {
    /// Something that others do.
    pub(super) fn edge(&mut self) -> Step {
        match self.room().draw(12) {
            0 | 1 => self.edit_disk(),
            2 => self.swap_disks(),
            3 => self.clone_source(),
            4 => self.edit_replica(),
            5 | 6 => self.lying_receiver(),
            7 => self.lying_source(),
            _ => self.directory(),
        }
    }

    fn backing_path(&self, volume: usize) -> PathBuf {
        self.ground.paths.backing.join(format!("v{volume}.img"))
    }

    /// Ends the source in one way or the other; returns whether it was killed.
    pub(super) fn end_source(&mut self) -> Result<bool, String> {
        self.see_acknowledged();
        let killed = self.room().chance(600);
        match self.source.take() {
            Some(source) if killed => source.kill(self.room()),
            Some(source) => source.stop(self.room()).map_err(|why| format!("the source's stop: {why}"))?,
            None => {}
        }
        // Others need a moment before they can lay hands on it; by then all of it has reached the disk.
        self.pause(1500);
        for volume in 0..self.shape.volumes.len() {
            let file = self.backing_disk.open(&self.backing_path(volume));
            file.and_then(|file| file.sync()).map_err(|error| error.to_string())?;
        }
        Ok(killed)
    }

    /// Others write to a protected disk while no agent runs.
    fn edit_disk(&mut self) -> Step {
        let killed = self.end_source()?;
        let volume = usize::try_from(self.room().draw(self.shape.volumes.len() as u64)).unwrap_or(0);
        self.note(format!(
            "source: {}; then others write to volume {volume}",
            if killed { "kill -9" } else { "stop" }
        ));
        let path = self.backing_path(volume);
        let file = self.backing_disk.open(&path).map_err(|error| error.to_string())?;
        for _ in 0..1 + self.room().draw(4) {
            let block = self.room().draw(self.shape.volumes[volume] as u64);
            let word = self.room().draw(u64::MAX).to_le_bytes();
            let edit = word.repeat(BLOCK / word.len());
            file.write_at(&edit, block * BLOCK as u64).map_err(|error| error.to_string())?;
        }
        file.sync().map_err(|error| error.to_string())?;
        drop(file);
        touch(&self.backing_disk, &path);
        self.start_source(Back::Edited)?;
        let restarted = self.model.run_began();
        self.equal()?;
        if killed {
            // While the disk is compared no point holds the edit; the gap's reason says since when.
            let now = self.source()?.captured_lsn().0;
            self.model.ambiguous(restarted.saturating_add(1)..now.saturating_add(1));
        }
        Ok(())
    }

    /// Two disks change places, or a copy takes the place of one.
    fn swap_disks(&mut self) -> Step {
        let killed = self.end_source()?;
        let sizes = &self.shape.volumes;
        let swaps = sizes.len() > 1 && sizes[0] == sizes[1];
        let how = if killed { "kill -9" } else { "stop" };
        let what = if swaps { "two disks change places" } else { "a copy takes the place of a disk" };
        self.note(format!("source: {how}; then {what}"));
        let (one, other) = (self.backing_path(0), self.backing_path(usize::from(swaps)));
        let held = |path| self.backing_disk.contents(path).unwrap_or_default();
        let (first, mut second) = (held(&one), held(&other));
        if swaps {
            self.backing_disk.put(&other, first);
            identify(&self.backing_disk, &other, self.room().draw(u64::MAX));
        } else {
            second = first.iter().map(|byte| byte.wrapping_add(1)).collect();
        }
        self.backing_disk.put(&one, second);
        // A disk that takes another's place comes with its own times, not with those of this moment.
        identify(&self.backing_disk, &one, self.room().draw(u64::MAX));
        self.start_source(Back::Edited)?;
        self.equal()
    }

    /// A hostile receiver with the right identity for a while; then the honest one is back.
    fn lying_receiver(&mut self) -> Step {
        self.note("receiver: a liar takes its place");
        self.stop_receiver_hard();
        let epoch = self.source()?.status().groups[0].epoch;
        let life = self.life();
        let identities = &self.ground.identities;
        let identity = wire::Identity::load(&identities.receiver.0).map_err(|error| error.to_string())?;
        let liar = Liar::receiver(&self.site, life, identity, wire::Fingerprint(identities.source.1));
        self.pause(4000);
        liar.end(self.room());
        // What a liar acknowledged is no promise of the honest one.
        self.acknowledged = (0, 0);
        self.promises()?;
        self.start_receiver();
        self.until_well("after a lying receiver")?;
        let now = self.source()?.status().groups[0].epoch;
        if now > epoch + EPOCHS_OF_A_LIE {
            return Err(format!("a lying receiver moved the epoch from {epoch} to {now}"));
        }
        self.equal()
    }

    /// A hostile source with the right identity and the group's name for a while; then the honest one is
    /// back.
    fn lying_source(&mut self) -> Step {
        self.note("source: a liar takes its place");
        self.end_source()?;
        let life = self.life();
        let identities = &self.ground.identities;
        let identity = wire::Identity::load(&identities.source.0).map_err(|error| error.to_string())?;
        let receiver = wire::Fingerprint(identities.receiver.1);
        let points = self.receiver.as_ref().and_then(Process::daemon).and_then(|r| r.points(GROUP).ok());
        let known = points.map_or(Truth::default(), |points| Truth {
            group: points.group_id.0,
            lineage: points.lineage.0,
            epoch: points.epoch.number,
            epoch_id: points.epoch.id.0,
        });
        let liar = Liar::source(&self.site, life, identity, receiver, known);
        self.pause(4000);
        liar.end(self.room());
        self.promises()?;
        self.start_source(Back::Killed)?;
        self.until_well("after a lying source")?;
        let now = self.source()?.status().groups[0].epoch;
        if now > known.epoch + EPOCHS_OF_A_LIE {
            return Err(format!("a lying source moved the epoch from {} to {now}", known.epoch));
        }
        self.equal()
    }

    /// The source's machine is cloned while it runs, and the clone is started beside it: the first goes on,
    /// the clone is refused, and the replica stays the first one's.
    fn clone_source(&mut self) -> Step {
        self.note("source: its machine is cloned, and the clone starts");
        self.until_well("before the clone")?;
        // The source may hold a connection for alive whose receiver is gone.
        self.until_greeted()?;
        let (disk, below) = (self.source_disk.crash(1), self.backing_disk.crash(1));
        let home = self.ground.paths.source.with_file_name("clone");
        disk.rename_dir(&self.ground.paths.source, &home).map_err(|error| error.to_string())?;
        let mut settings = self.source_settings()?;
        settings.dir.clone_from(&home);
        settings.ring_dir = home.with_file_name("clone-ring");
        for dir in [&home, &settings.ring_dir] {
            let _ = std::fs::remove_dir_all(dir);
            std::fs::create_dir_all(dir).map_err(|error| error.to_string())?;
        }
        let life = self.life();
        let disk = LifeDisk::new(self.room(), &disk);
        let mut backing = LifeDisk::new(self.room(), &below);
        backing.dies_with(&disk);
        let surroundings = Surroundings {
            disk: Arc::new(disk.clone()),
            backings: Arc::new(SimBackings { disk: backing, below }),
            socket: Some(self.site.net.socket(source_address(life))),
            serves: false,
        };
        let start = move || async move {
            Replicator::start_on(settings, surroundings).await.map_err(|error| error.to_string())
        };
        let clone = Process::start(&self.site, life, "clone", disk, start, |_| {});
        let seen = self.watch_clone(&clone);
        clone.kill(self.room());
        seen?;
        self.equal()
    }

    fn watch_clone(&mut self, clone: &Process<replicator::Handle>) -> Step {
        let epoch = self.source()?.status().groups[0].epoch;
        for look in 0..400_u64 {
            machine::sleep(Duration::from_millis(10));
            let Some(handle) = clone.daemon() else { continue };
            let status = handle.status();
            let group = &status.groups[0];
            if group.state == State::Replicating && group.why.is_empty() {
                return Err(format!("a clone says replicating beside the first: {group:?}"));
            }
            if look % 40 == 0 {
                // What its own users write.
                let word = self.room().draw(u64::MAX).to_le_bytes();
                let _ = handle.exports()[0].write(look * 512, &word.repeat(64), false);
            }
        }
        let now = self.source()?.status().groups[0].epoch;
        if now > epoch + 1 {
            return Err(format!("a source and its clone take turns: epoch {epoch}, then {now}"));
        }
        Ok(())
    }

    /// Others write to a replica while no receiver runs, or another replica takes its place. It is left alone
    /// until its overwriting is ordered.
    fn edit_replica(&mut self) -> Step {
        self.until_well("before a replica is edited")?;
        self.note("receiver: stop; then others write to a replica");
        self.see_acknowledged();
        if let Some(receiver) = self.receiver.take() {
            receiver.stop(self.room()).map_err(|why| format!("the receiver's stop: {why}"))?;
        }
        let path = self.ground.paths.receiver.join("replica").join(GROUP).join("v0.img");
        let block = self.room().draw(self.shape.volumes[0] as u64) * BLOCK as u64;
        let edit = self.room().draw(u64::MAX).to_le_bytes().repeat(BLOCK / 8);
        let file = match self.receiver_disk.open(&path) {
            // The receiver was stopped before the first record came: there is no replica yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.start_receiver();
                return Ok(());
            }
            file => file.map_err(|error| error.to_string())?,
        };
        file.write_at(&edit, block).and_then(|()| file.sync()).map_err(|error| error.to_string())?;
        drop(file);
        if self.room().chance(300) {
            identify(&self.receiver_disk, &path, self.room().draw(u64::MAX));
        }
        self.pause(1500);
        mark(&self.receiver_disk, &path, self.room().now_ns());
        self.start_receiver();
        self.receiver_kept_its_word()?;
        self.until_greeted()?;
        for _ in 0..300 {
            machine::sleep(Duration::from_millis(10));
            let held = self.receiver_disk.contents(&path).unwrap_or_default();
            let at = usize::try_from(block).unwrap_or(0);
            if held.get(at..at + BLOCK) != Some(&edit) {
                return Err("a replica that others wrote to was overwritten without an order".to_owned());
            }
        }
        let status = self.source()?.status();
        let group = &status.groups[0];
        if group.state == State::Replicating && group.why.is_empty() {
            return Err("replicating, and the replica is another's".to_owned());
        }
        self.note("receiver: its overwriting is ordered");
        let ordered = self.on_receiver(|handle| async move {
            handle.overwrite(GROUP).await.map(|_| ()).map_err(|error| error.to_string())
        })?;
        if let Some(Err(why)) = ordered {
            return Err(format!("resync --overwrite: {why}"));
        }
        self.until_well("after a replica was overwritten by order")?;
        self.equal()
    }
}
