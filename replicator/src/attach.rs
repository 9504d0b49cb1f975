//! `afterimage attach` and `detach`: the operator takes a device out of capture, and puts it back.
//!
//! Orders, each crash-safe by what `start` does with what it finds: detach is durable before the kernel is
//! told, so a new agent ends a capture that should have ended; attach is durable after the kernel was told,
//! so a new agent ends one whose operator was never answered. In between a volume is `DetachedBetween`: some
//! of its writes may be in the stream, and nobody knows which, so its replica is at no point. A volume that
//! is attached again is synchronised as a whole.
//!
//! ⚠ The synchronisation runs beside them. It ends nothing, and clears no bit of a volume that is not
//! attached, while an order is carried out (`Agent::between_orders`): between the kernel's attach, which
//! makes all of the volume dirty, and the agent's own, those bits look like leftovers of a volume that nobody
//! captures.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use journal::Lsn;
use kfilter::dirty::CAUSE_AGENT;
use kfilter::{ErrorKind as Cause, Group};

use crate::agent::{Agent, Handle, on_thread};
use crate::capture::{Ring, Volume, attach};
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Capturing, KnownVolume};
use crate::status::State;

/// How long writes in flight may take to come back.
const RETURN: Duration = Duration::from_secs(60);
/// One call to the kernel to the next.
const STEP: Duration = Duration::from_millis(500);
/// How long the journal may take for what was captured.
const DRAIN: Duration = Duration::from_secs(60);

impl Handle {
    /// Captures a device of the settings again, and synchronises it. Returns its volume's name.
    ///
    /// # Errors
    /// What speaks against it, in an operator's words.
    pub async fn attach(&self, device: PathBuf) -> Result<String> {
        let agent = self.agent.clone();
        on_thread("af-attach", move || agent.attach(&device)).await?
    }

    /// Ends the capture of a device, until it is attached again: also over restarts. Everything captured is
    /// journaled when this returns; the replica stays at that point. In the middle of a synchronisation there
    /// is none: the group is not consistent then before the volume is attached again, or has left it.
    ///
    /// # Errors
    /// What speaks against it, in an operator's words.
    pub async fn detach(&self, device: PathBuf) -> Result<Detached> {
        let agent = self.agent.clone();
        on_thread("af-detach", move || agent.detach(&device)).await?
    }
}

impl Agent {
    fn attach(&self, device: &Path) -> Result<String> {
        let _one = self.operator.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (group, volume, path) = self.captured(device)?;
        let name = volume.name.clone();
        if volume.is_attached() {
            let at = format!("{} is captured already, as volume {name}", path.display());
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        let disk = attach::open(&path, &self.settings.dir)?;
        let known = self.known(volume.id)?;
        if disk.size_bytes() < known.size_bytes {
            let at = format!(
                "volume {name}: {} has {} bytes, and had {}; a volume never shrinks: protect it under a new name",
                path.display(),
                disk.size_bytes(),
                known.size_bytes
            );
            return Err(Error::new(ErrorKind::Settings, at));
        }
        // Records of it may pass before this is done, onto a replica that stands elsewhere.
        self.update(volume.id, |known| known.capturing = Capturing::DetachedBetween)?;
        // Until the synchronisation begins, writes only set bits: no point of the time between may be
        // offered.
        *self.due.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            Some(format!("volume {name} was attached"));
        self.shared.ring.set_mode_bitmap(CAUSE_AGENT)?;
        if let Err(error) = attach::attach(&group, volume.id, &disk, false) {
            // Nothing of it was captured: its replica is where it was.
            self.update(volume.id, |now| now.capturing = known.capturing)?;
            return Err(error);
        }
        if let Err(error) = self.update(volume.id, |known| known.capturing = Capturing::On) {
            end_capture(&group, volume.id)?;
            return Err(error);
        }
        volume.set_disk(Some(Arc::new(disk)));
        self.shared.board.put_back(&name, State::Resyncing);
        Ok(name)
    }

    fn detach(&self, device: &Path) -> Result<Detached> {
        let _one = self.operator.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (group, volume, path) = self.captured(device)?;
        let name = volume.name.clone();
        if !volume.is_attached() {
            let at = format!("{} is detached already", path.display());
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        let (state, why) = self.shared.board.state();
        let ring = &self.shared.ring;
        let epoch = self.remembered().epoch;
        self.update(volume.id, |known| known.capturing = Capturing::DetachedBetween)?;
        // First, so that nothing is copied of it that was written after its capture.
        let disk = volume.disk();
        volume.set_disk(None);
        let ended = match end_capture(&group, volume.id) {
            Ok(ended) => ended,
            Err(error) => {
                volume.set_disk(disk);
                self.update(volume.id, |known| known.capturing = Capturing::On)?;
                return Err(error);
            }
        };
        let last_lsn = Lsn(ended.last_lsn);
        self.shared.board.take_out(&name);
        let begun = machine::now();
        let mut at = self.shared.progress.position();
        while at.lsn < last_lsn && self.shared.health.is_good() && machine::since(begun) < DRAIN {
            self.shared.progress.wait_beyond(&at, STEP);
            at = self.shared.progress.position();
        }
        // Only now: until its last record is journaled, a shortage may make bits of it. Those of writes that
        // failed do not count: the stream tells of them, and the device may be one that cannot be read any
        // more.
        let mut is_consistent = matches!(state, State::Replicating | State::Rewound)
            && self.shared.health.is_good()
            && at.lsn >= last_lsn
            && ring.loss().is_none()
            && ring.untold_writes() == self.untold_seen.load(Ordering::Acquire)
            && !self.shared.health.is_untold(volume.id);
        if is_consistent {
            self.state().update(|state| {
                // A new epoch, in between, has begun without it.
                is_consistent = state.epoch == epoch;
                let mut known = state.volumes.iter_mut().filter(|known| known.id.0 == volume.id);
                if let Some(known) = known.next().filter(|_| is_consistent) {
                    known.capturing = Capturing::Detached;
                }
            })?;
        }
        if state == State::Replicating {
            // Only new words: an overflow may be under repair by now.
            self.shared.board.change_from(State::Replicating, State::Replicating, self.words(), || true);
        }
        if !is_consistent {
            tracing::warn!(volume = %name, ?state, why, "detached before its replica was consistent");
        }
        Ok(Detached { volume: name, lsn: last_lsn, is_consistent })
    }

    /// The volume of a device, or of a name.
    fn captured(&self, device: &Path) -> Result<(Arc<Group>, Arc<Volume>, PathBuf)> {
        let Ring::Kernel(kernel) = &*self.shared.ring else {
            let at =
                "this group is captured by the NBD front: its disks are captured as long as the agent runs";
            return Err(Error::new(ErrorKind::NotPossible, at));
        };
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let wanted = real(device);
        let found = self.settings.volume.iter().find(|volume| {
            Path::new(&volume.name) == device || volume.path == device || real(&volume.path) == wanted
        });
        let found = found.and_then(|settings| {
            let volume = self.volumes.iter().find(|volume| volume.name == settings.name)?;
            Some((kernel.group(), volume.clone(), settings.path.clone()))
        });
        found.ok_or_else(|| {
            let devices: Vec<String> =
                self.settings.volume.iter().map(|volume| volume.path.display().to_string()).collect();
            let at = format!(
                "{} is no volume of this group, which has {}; add a [[volume]] to the settings and restart the agent",
                device.display(),
                devices.join(", ")
            );
            Error::new(ErrorKind::Settings, at)
        })
    }

    fn known(&self, id: u32) -> Result<KnownVolume> {
        let known = self.remembered().volumes.iter().find(|known| known.id.0 == id).cloned();
        known.ok_or_else(|| Error::new(ErrorKind::Settings, format!("volume {id} is not known")))
    }

    fn update(&self, id: u32, change: impl FnOnce(&mut KnownVolume)) -> Result<()> {
        self.state().update(|state| {
            if let Some(known) = state.volumes.iter_mut().find(|known| known.id.0 == id) {
                change(known);
            }
        })
    }
}

/// A volume that was taken out of capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detached {
    /// Its name.
    pub volume: String,
    /// The newest lsn then.
    pub lsn: Lsn,
    /// Its replica is at a point there; else the group has none before the volume is attached again.
    pub is_consistent: bool,
}

/// How a capture ended.
pub(crate) struct CaptureEnd {
    /// The newest lsn then.
    pub last_lsn: u64,
    /// Every captured write has come back from the device. Else one may still change it, or fail, unseen.
    pub is_settled: bool,
}

/// Ends a capture, and waits for writes in flight, not without end.
///
/// # Errors
/// The kernel module's.
pub(crate) fn end_capture(group: &Group, volume: u32) -> Result<CaptureEnd> {
    let begun = machine::now();
    loop {
        match group.detach(volume, STEP) {
            Ok(last_lsn) => return Ok(CaptureEnd { last_lsn, is_settled: true }),
            Err(error) if error.kind == Cause::TimedOut && machine::since(begun) < RETURN => {}
            Err(error) if error.kind == Cause::TimedOut => {
                tracing::warn!(
                    volume,
                    "writes in flight do not come back from the device; detached without them"
                );
                let status = group.status();
                return status
                    .map(|status| CaptureEnd { last_lsn: status.captured_lsn, is_settled: false })
                    .map_err(|error| Error::because(ErrorKind::Ring, "ask the kernel module", error));
            }
            Err(error) => return Err(Error::because(ErrorKind::Ring, "end the capture", error)),
        }
    }
}
