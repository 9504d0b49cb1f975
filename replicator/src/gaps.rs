//! What the agent notices of gaps in capture, and says about them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use journal::Lsn;
use kfilter::dirty::{CAUSE_QUOTA, CAUSE_RING_FULL};
use kfilter::{Mode, Op};
use machine::Mutex;

use crate::agent::Agent;
use crate::capture::{Refusal, Ring, Tap, Volume};
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result, describe, is_full};
use crate::start;
use crate::state::{Capturing, Gap, KnownVolume, SourceState, StateFile};
use crate::status::State;

/// Of granules that are sent whole because they were written into: between two looks, so that a stop need not
/// wait.
const FILL_BYTES: u64 = 64 << 20;
/// Between two tries to write a full disk: so many looks whether a stop is wanted, with such pauses.
const ROOM_LOOKS: u32 = 20;
const ROOM_PAUSE: Duration = Duration::from_millis(50);

impl Agent {
    /// That writes are only noted as dirty bits shows in the ring before anything else; the state follows as
    /// soon as anybody looks.
    pub(crate) fn notice_overflow(&self) {
        let shared = &self.shared;
        if shared.board.state().0 != State::Replicating || shared.ring.mode() == Mode::Ring {
            return;
        }
        let is_so = || shared.ring.mode() == Mode::Bitmap;
        shared.board.change_from(State::Replicating, State::Degraded, self.gap_cause(), is_so);
    }

    /// Why writes are not recorded, in an operator's words.
    pub(crate) fn gap_cause(&self) -> String {
        if let Some(gap) = &self.remembered().needs_resync {
            return gap.cause.clone();
        }
        if let Some(due) = &*self.due.lock().unwrap_or_else(PoisonError::into_inner) {
            return due.clone();
        }
        match self.shared.ring.loss().map(|loss| loss.cause) {
            Some(CAUSE_RING_FULL) => {
                let mib = self.shared.ring.ring_bytes() >> 20;
                format!(
                    "the ring of {mib} MiB overflowed: writes came faster than the source journal took them, and are kept \
                     as dirty ranges until they are synchronised"
                )
            }
            Some(CAUSE_QUOTA) => "the source journal had no room".to_owned(),
            _ => "writes had not been recorded".to_owned(),
        }
    }

    /// Whether a gap is one that the synchronisation repairs by itself, whoever does nothing.
    pub(crate) fn repairs_itself(&self) -> bool {
        let (state, _) = self.shared.board.state();
        (self.shared.health.is_good() || state == State::NeedsResync)
            && !matches!(state, State::Fenced | State::Rewound)
            && !self.is_shrunk()
            && !self.volumes.iter().any(|volume| volume.sync_failed())
            && self.detached_between().is_none()
    }

    /// Volumes that nobody captures and that have bits.
    pub(crate) fn detached_and_dirty(&self) -> impl Iterator<Item = &Arc<Volume>> {
        let ring = &self.shared.ring;
        self.volumes.iter().filter(|volume| !volume.is_attached() && ring.is_dirty(volume.id))
    }

    /// One of them whose replica is at no point: the group is at none without it. (The others' bits are of
    /// writes that failed.)
    pub(crate) fn detached_between(&self) -> Option<&Arc<Volume>> {
        self.detached_and_dirty().find(|volume| {
            let state = self.remembered();
            let mut known = state.volumes.iter();
            known.any(|known| known.id.0 == volume.id && known.capturing == Capturing::DetachedBetween)
        })
    }

    /// The ring becomes the current epoch's, and gives lsns from here on; it is empty, and writes only set
    /// bits. A new consumer where the ring is another one. Called by the consumer's thread.
    ///
    /// # Errors
    /// The ring's.
    pub(crate) fn renew_ring(&self, first_lsn: Lsn) -> Result<Option<Tap>> {
        let _one = self.operator.lock().unwrap_or_else(PoisonError::into_inner);
        match &*self.shared.ring {
            Ring::Front(front) => {
                let epoch = self.remembered().epoch;
                let renewed = front.region.renew(epoch.number, &epoch.id.0, first_lsn.0);
                renewed.map_err(|refused| {
                    let at = format!("the ring refused to go into the new epoch: {refused:?}");
                    Error::new(ErrorKind::Ring, at)
                })?;
                Ok(None)
            }
            Ring::Kernel(kernel) => {
                kernel.replace(start::kernel::renew(self, &kernel.group(), first_lsn)?);
                self.shared.ring.tap().map(Some)
            }
        }
    }

    /// Changes the state, and waits for room where the disk has none: meanwhile the group says so. False at a
    /// stop.
    ///
    /// # Errors
    /// Any other of the disk's.
    pub(crate) fn update_when_room(&self, change: impl Fn(&mut SourceState)) -> Result<bool> {
        loop {
            let updated = self.state().update(&change);
            match updated {
                Ok(()) => return Ok(true),
                Err(error) if is_full(&error) => {
                    let why = format!(
                        "the state file cannot be written: {}; it is tried again by itself",
                        describe(&error)
                    );
                    self.shared.board.change(State::Degraded, why);
                }
                Err(error) => return Err(error),
            }
            for _ in 0..ROOM_LOOKS {
                if self.halt.stop.load(Ordering::Acquire) {
                    return Ok(false);
                }
                machine::sleep(ROOM_PAUSE);
            }
        }
    }

    /// From its return on, durably, no receiver that holds nothing may start at this epoch: what it was found
    /// to hold already is not in the epoch's frames.
    ///
    /// # Errors
    /// The state file cannot be written: then nothing may be left out.
    pub(crate) fn epoch_is_part(&self) -> Result<()> {
        let mut file = self.state();
        if file.get().epoch_is_full { file.update(|state| state.epoch_is_full = false) } else { Ok(()) }
    }

    /// Has granules that were left out and written into since sent as a whole, some at a time.
    pub(crate) fn fill_touched(&self) {
        for volume in self.volumes.iter().filter(|volume| volume.is_attached()) {
            for run in self.shared.skipped.touched(volume.id, FILL_BYTES) {
                if let Err(error) = self.shared.ring.mark(volume.id, run) {
                    tracing::warn!(%error, volume = %volume.name, "what was left out cannot be sent now");
                }
            }
        }
    }

    /// States the volumes whose record is not in the stream: the kernel's ring knows sizes that it could not
    /// put into the order while writes only set bits, and a record may have been given up.
    ///
    /// # Errors
    /// The kernel module's.
    pub(crate) fn announce_volumes(&self) -> Result<()> {
        for volume in self.volumes.iter() {
            let Some(size_bytes) = self.shared.ring.size_bytes(volume.id) else { continue };
            let known = self.remembered().volumes.iter().find(|known| known.id.0 == volume.id).cloned();
            let is_untold = self.shared.health.is_untold(volume.id);
            let Some(known) = known.filter(|known| is_untold || known.size_bytes < size_bytes) else {
                continue;
            };
            // The pipeline remembers it when the record passes.
            let payload = start::volume_record(&KnownVolume { size_bytes, ..known });
            match self.shared.ring.event(Op::Volume, volume.id, &payload) {
                Ok(_) => {}
                // Writes beyond the old size become bits until it is told; the next begin tries again.
                Err(Refusal::Full | Refusal::BitmapMode | Refusal::Dirty | Refusal::Owed) => {
                    tracing::warn!(volume = %volume.name, "the ring has no room for the new size of a volume");
                }
                Err(Refusal::Failed(error)) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Makes a gap durable that capture has found and no ring remembers; an older one stays the cause.
pub(crate) fn remember(state: &Mutex<StateFile>, cause: &str) {
    let gap = Gap { cause: cause.to_owned(), since_ns: now_ns() };
    let mut file = state.lock().unwrap_or_else(PoisonError::into_inner);
    let remembered = file.update(|state| {
        state.needs_resync.get_or_insert(gap);
        state.gap_in_ring = false;
    });
    if let Err(error) = remembered {
        // The dirty map says the same on this boot, and an unclean start after a reboot.
        tracing::error!(%error, "the gap cannot be remembered in the state file");
    }
}
