//! What becomes of directories and control files: rings put back, slots that rot, copies that were taken
//! while a daemon ran.

use std::fs;
use std::path::Path;
use std::time::Duration;

use journal::sim_disk::SimDisk;
use replicator::status::State;

use super::{GROUP, Step, Story};
use crate::disk::identify;
use crate::model::Back;

/// How long a receiver has to come right by itself before its operator orders an overwriting, in looks of 20
/// ms.
const LOOKS: usize = 200;

impl Story {
    /// Something that happens to a directory.
    pub(super) fn directory(&mut self) -> Step {
        match self.room().draw(4) {
            0 => self.put_ring_back(),
            1 => self.damage_state(),
            2 => self.damage_group(),
            _ => self.copy_receiver(),
        }
    }

    /// The ring of an earlier moment takes the place of the newest one.
    fn put_ring_back(&mut self) -> Step {
        self.note("source: its ring is copied; later the copy is put back");
        let (ring, copy) =
            (self.ground.paths.ring.clone(), self.ground.paths.ring.with_file_name("old-ring"));
        let _ = fs::remove_dir_all(&copy);
        copy_dir(&ring, &copy)?;
        self.pause(3000);
        self.end_source()?;
        self.lose_ring();
        copy_dir(&copy, &ring)?;
        let _ = fs::remove_dir_all(&copy);
        self.start_source(Back::Killed)?;
        self.equal()
    }

    /// A slot of the source's control file rots, or both do, or the file is lost.
    fn damage_state(&mut self) -> Step {
        self.end_source()?;
        let path = self.ground.paths.source.join("state");
        let which = self.room().draw(4);
        match which {
            0 | 1 => rot(&self.source_disk, &path, which),
            2 => (0..2).for_each(|slot| rot(&self.source_disk, &path, slot)),
            _ => {
                let disk: &dyn journal::io::Disk = &self.source_disk;
                disk.remove(&path).and_then(|()| disk.sync_dir(&self.ground.paths.source)).map_err(told)?;
            }
        }
        self.note(format!("source: its control file is damaged ({which})"));
        self.start_source(Back::Killed)?;
        self.equal()
    }

    /// A slot of the receiver's control file of the group rots.
    fn damage_group(&mut self) -> Step {
        // By then it was stored more than once: of a new file there is one slot, and nothing to fall back on.
        self.equal()?;
        if self.room().chance(500) {
            self.stop_receiver_hard();
        } else {
            self.see_acknowledged();
            if let Some(receiver) = self.receiver.take() {
                receiver.stop(self.room()).map_err(|why| format!("the receiver's stop: {why}"))?;
            }
        }
        let slot = self.room().draw(2);
        self.note(format!("receiver: slot {slot} of its group's control file rots"));
        rot(&self.receiver_disk, &self.ground.paths.receiver.join("groups").join(GROUP).join("group"), slot);
        self.start_receiver();
        self.receiver_kept_its_word()?;
        self.comes_right("after a control file was damaged")
    }

    /// The receiver's directory is copied while it runs: control files and journal first, replicas later. The
    /// copy takes its place.
    fn copy_receiver(&mut self) -> Step {
        // A replica that no control file names yet is refused as a file of others: it must be moved away.
        self.equal()?;
        self.note("receiver: its directory is copied while it runs; then the copy is started in its place");
        let copy = self.receiver_disk.crash(1);
        self.pause(3000);
        for volume in 0..self.shape.volumes.len() {
            let replica = self.ground.paths.receiver.join("replica").join(GROUP);
            let path = replica.join(format!("v{volume}.img"));
            for of in [path.clone(), path.with_extension("times")] {
                if let Some(content) = self.receiver_disk.contents(&of) {
                    copy.put(&of, content);
                }
            }
            identify(&copy, &path, self.room().draw(u64::MAX));
        }
        self.stop_receiver_hard();
        self.receiver_disk = copy;
        // The copy knows nothing of what was acknowledged since it was taken.
        self.acknowledged = (0, 0);
        self.start_receiver();
        if self.recovers()? {
            return Err("replicating to a copy that was taken while its receiver ran".to_owned());
        }
        self.overwrite_by_order("after the receiver was copied")
    }

    /// By itself, or by the order to overwrite a replica that is not proven.
    fn comes_right(&mut self, when: &str) -> Step {
        if self.recovers()? { self.equal() } else { self.overwrite_by_order(when) }
    }

    /// Whether the group replicates soon without an order.
    fn recovers(&mut self) -> Result<bool, String> {
        self.until_greeted()?;
        for _ in 0..LOOKS {
            let status = self.source()?.status();
            if status.groups[0].state == State::Replicating && status.groups[0].why.is_empty() {
                return Ok(true);
            }
            self.promises()?;
            machine::sleep(Duration::from_millis(20));
        }
        Ok(false)
    }

    fn overwrite_by_order(&mut self, when: &str) -> Step {
        self.points(4)?;
        self.note("receiver: overwriting is ordered");
        let ordered = self.on_receiver(|handle| async move {
            handle.overwrite(GROUP).await.map(|_| ()).map_err(|error| (error.kind, error.to_string()))
        })?;
        match ordered {
            Some(Err((kind, why))) if kind != receiver::ErrorKind::NotPossible => {
                return Err(format!("{when}: resync --overwrite: {why}"));
            }
            _ => {}
        }
        self.until_well(when)?;
        self.equal()
    }
}

fn told(error: std::io::Error) -> String {
    error.to_string()
}

/// A byte in the middle of a slot changes.
fn rot(disk: &SimDisk, path: &Path, slot: u64) {
    let Some(bytes) = disk.contents(path).map(|content| content.len() as u64).filter(|bytes| *bytes > 0)
    else {
        return;
    };
    disk.corrupt(path, slot * (bytes / 2) + 100, |byte| byte ^ 0x40);
}

/// Copies a directory of files and directories.
fn copy_dir(from: &Path, to: &Path) -> Step {
    let copy = || -> std::io::Result<()> {
        fs::create_dir_all(to)?;
        fs::set_permissions(to, fs::metadata(from)?.permissions())?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let target = to.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                copy_dir(&entry.path(), &target).map_err(std::io::Error::other)?;
            } else {
                fs::copy(entry.path(), target)?;
            }
        }
        Ok(())
    };
    copy().map_err(|error| format!("copy {}: {error}", from.display()))
}
