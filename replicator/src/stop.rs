//! How a run ends: clients first, then the volumes, then the journal, and a clean mark only when nothing is
//! owed.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use journal::Position;
use journal::buffered_disk::BufferedDisk;
use kfilter::Mode;
use machine::disk::continuity::Ends;
use machine::disk::{Continuity, Unchanged};

use crate::agent::{Agent, Handle, STOP_DEADLINE, on_thread};
use crate::alive;
use crate::attach::end_capture;
use crate::capture::disk::Disk;
use crate::capture::{Ring, usage};
use crate::error::{Error, ErrorKind, Result};
use crate::status::State;

/// How long one step that needs the disks may take; a hung disk holds up a stop no longer than that.
const STEP: Duration = Duration::from_secs(20);
/// How often it is looked whether the disks let go.
const LOOK: Duration = Duration::from_millis(10);

/// Runs a step of the stop; `None` when a disk does not answer in time, which is told.
async fn in_time<T: Send + 'static>(
    what: &str,
    step: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    match tokio::time::timeout(STEP, on_thread("af-stop", step)).await {
        Ok(done) => done.map(Some),
        Err(_) => {
            tracing::warn!("{what} does not end, since a disk does not answer: the stop goes on without it");
            Ok(None)
        }
    }
}

/// A device whose capture ended, and what had been written to it just before.
struct Detached {
    id: u32,
    disk: Arc<Disk>,
    before: Option<Continuity>,
}

impl Agent {
    /// What `kfilter.on_stop` says: ends the capture of all devices, or of none (`None`). The pipeline still
    /// runs, and takes what was captured last.
    fn detach_at_stop(&self) -> Result<Option<Vec<Detached>>> {
        let Ring::Kernel(kernel) = &*self.shared.ring else { return Ok(None) };
        let group = kernel.group();
        let disks: Vec<_> =
            self.volumes.iter().filter_map(|volume| Some((volume.id, volume.disk()?))).collect();
        // Where all of them are out already, nothing is to be ended.
        let whole = (disks.is_empty() || self.shared.board.state().0 == State::Replicating)
            && self.shared.ring.loss().is_none()
            && self.detached_between().is_none()
            && self.shared.health.is_good()
            && self.shared.ring.mode() == Mode::Ring
            // After it the bits are set of commands that no hook saw.
            && self.shared.ring.untold_writes() == self.untold_seen.load(Ordering::Acquire)
            && !disks.iter().any(|(id, _)| self.shared.ring.is_dirty(*id));
        let detaches = match self.settings.kfilter.on_stop {
            conf::OnStop::Keep => false,
            conf::OnStop::Detach => whole,
            conf::OnStop::Auto => {
                whole && usage::machine_stops() && !disks.iter().any(|(_, disk)| usage::is_in_use(disk))
            }
        };
        if !detaches {
            tracing::info!("the kernel captures on; the next start takes over");
            return Ok(None);
        }
        let (mut detached, mut settled) = (Vec::new(), true);
        for (id, disk) in disks {
            let before = Continuity::of(disk.held(), Ends::Skip).ok();
            settled &= end_capture(&group, id)?.is_settled;
            tracing::info!(device = %disk.path().display(), "detached for a clean stop");
            detached.push(Detached { id, disk, before });
        }
        // Until the last detach such a command may have come.
        settled &= self.shared.ring.untold_writes() == self.untold_seen.load(Ordering::Acquire);
        // A write that hangs may land, or fail, when nobody looks any more: then there is no clean mark.
        Ok(settled.then_some(detached))
    }
}

impl Handle {
    /// Stops cleanly: requests in flight are answered, everything captured is journaled and synced, and a
    /// clean mark lets the next start go on without a synchronisation.
    ///
    /// # Errors
    /// The clean mark could not be written: the next start takes the ring over, or synchronises.
    pub async fn shutdown(mut self) -> Result<()> {
        self.agent.halt.stop.store(true, Ordering::Release);
        let mut answers = true;
        if let Some(sync) = self.sync.take() {
            answers &= in_time("the synchronisation", move || drop(sync.join())).await?.is_some();
        }
        let servers = std::mem::take(&mut *self.agent.servers.lock().unwrap_or_else(PoisonError::into_inner));
        // All at the same time: a hung disk holds up the stop once, not once for each volume.
        let stopping = servers.into_iter().map(|server| tokio::spawn(server.shutdown(STOP_DEADLINE)));
        let mut left = 0;
        for server in stopping.collect::<Vec<_>>() {
            left += server.await.unwrap_or(1);
        }
        let volumes = self.agent.volumes.clone();
        let closing = move || {
            let mut closed = true;
            for volume in volumes.iter().filter_map(|volume| volume.served()) {
                closed &= volume.close(STOP_DEADLINE);
            }
            closed
        };
        let closed = on_thread("af-stop", closing).await?;
        let agent = self.agent.clone();
        let detached = on_thread("af-stop", move || agent.detach_at_stop()).await??;
        answers &= self.looks_are_over().await;
        self.upkeep.abort();
        // It ends as cancelled; until then it holds the agent, and with it the backings.
        let _ = (&mut self.upkeep).await;
        self.agent.shared.stop.store(true, Ordering::Release);
        self.agent.shared.ring.wake_consumer();
        if let Some(beats) = self.alive.take() {
            answers &= in_time("the signs of life", move || drop(beats.join())).await?.is_some();
        }
        let pipeline = self.pipeline.take();
        let ended =
            on_thread("af-stop", move || pipeline.and_then(|thread| thread.join().ok().flatten())).await?;
        self.stop_link.send_replace(true);
        self.agent.shared.progress.close();
        // The link says goodbye by itself, within its own limits; a task that panicked has nothing to say.
        if tokio::time::timeout(STOP_DEADLINE, &mut self.link).await.is_err() {
            self.link.abort();
        }
        let served = self.agent.serving.load(Ordering::Acquire);
        match ended {
            Some((position, true))
                if served && left == 0 && closed && answers && self.agent.is_whole(&position) =>
            {
                let marked = match self.agent.settings.capture {
                    conf::Capture::Nbd => {
                        in_time("the clean mark", move || self.mark_clean(&position)).await?
                    }
                    conf::Capture::Kfilter => {
                        let mark = move || self.mark_detached(&position, detached.as_deref());
                        in_time("the clean mark", mark).await?
                    }
                };
                marked.unwrap_or_else(|| {
                    let at =
                        "a disk does not answer: no clean mark is set; the next start takes the ring over";
                    Err(Error::new(ErrorKind::Io, at))
                })
            }
            _ => Ok(()),
        }
    }

    /// Whether the look at the disks, if one is under way, ends in time: until then it holds them.
    async fn looks_are_over(&self) -> bool {
        let ends = tokio::time::Instant::now() + STOP_DEADLINE;
        while !self.agent.looks.is_idle() {
            if tokio::time::Instant::now() >= ends {
                tracing::warn!("{}: the stop does not wait for it", self.agent.looks.words());
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// Order: 1 journal is durable, 2 the clean mark with the devices' marks, 3 the kernel forgets the group
    /// (its ring holds nothing). Without devices that were detached the kernel captures on, and the next
    /// start takes over.
    fn mark_detached(&self, last: &Position, detached: Option<&[Detached]>) -> Result<()> {
        let Ring::Kernel(kernel) = &*self.agent.shared.ring else { return Ok(()) };
        let group = kernel.group();
        let Some(detached) = detached else { return Ok(()) };
        self.settle_journal()?;
        let mut marks = Vec::new();
        for Detached { id, disk, before } in detached {
            let mark = Continuity::of(disk.held(), Ends::Read).map_err(|error| {
                Error::because(ErrorKind::Io, format!("read {}", disk.path().display()), error)
            })?;
            if before.as_ref().is_none_or(|before| before.until(&mark) != Unchanged::Proven) {
                let device = disk.path().display();
                tracing::warn!(%device, "somebody wrote while its capture ended: the next start synchronises");
                return Ok(());
            }
            marks.push((*id, mark));
        }
        self.agent.state().update(|state| {
            for known in &mut state.volumes {
                let mark = marks.iter().find(|(id, _)| *id == known.id.0);
                known.mark = mark.map(|(_, mark)| mark.clone());
            }
            state.clean = Some(last.lsn);
        })?;
        if let Err(error) = group.destroy() {
            tracing::warn!(%error, "the kernel does not forget the empty group");
        }
        Ok(())
    }

    fn settle_journal(&self) -> Result<()> {
        let dir = self.agent.settings.dir.join("journal");
        BufferedDisk::settle(self.agent.surroundings.disk.as_ref(), &dir)
            .map_err(|error| Error::because(ErrorKind::Io, format!("sync {}", dir.display()), error))
    }

    /// Order: 1 journal and backings are durable, 2 the clean mark with the backings' marks, 3 the ring goes
    /// (it holds nothing).
    fn mark_clean(&self, last: &Position) -> Result<()> {
        self.settle_journal()?;
        for volume in self.agent.volumes.iter().filter_map(|volume| volume.served()) {
            nbd::Export::sync(volume.as_ref()).map_err(|error| {
                Error::because(ErrorKind::Io, format!("sync the backing of volume {}", volume.name), error)
            })?;
        }
        for (volume, settings) in self.agent.volumes.iter().zip(&self.agent.settings.volume) {
            if volume.served().is_some_and(|served| !served.backing.is_at(&settings.path)) {
                let path = settings.path.display();
                let at = format!("{path} was removed or replaced while it was served: no clean mark is set");
                return Err(Error::new(ErrorKind::NotPossible, at));
            }
        }
        let mut marks = Vec::new();
        for volume in self.agent.volumes.iter() {
            let Some(served) = volume.served() else { continue };
            let io = |what: &str, error| {
                Error::because(ErrorKind::Io, format!("{what} the disk of volume {}", volume.name), error)
            };
            // Its times, too: the mark is taken from them, and must be what a crash leaves.
            served.backing.settle().map_err(|error| io("sync", error))?;
            marks
                .push((volume.id, served.backing.continuity(Ends::Read).map_err(|error| io("read", error))?));
        }
        self.agent.state().update(|state| {
            for known in &mut state.volumes {
                let mark = marks.iter().find(|(id, _)| *id == known.id.0);
                known.mark = mark.map(|(_, mark)| mark.clone());
            }
            state.clean = Some(last.lsn);
        })?;
        if let Err(error) = std::fs::remove_file(self.ring_dir.join("ring")) {
            tracing::warn!(%error, "the empty ring could not be removed");
        }
        alive::remove(&self.ring_dir);
        Ok(())
    }
}
