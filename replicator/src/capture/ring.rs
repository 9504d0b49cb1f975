//! One face of both kinds of ring: the NBD front's, which this process owns, and the kernel module's, which
//! outlives it.
//!
//! Everything behind capture (pipeline, synchronisation, status, stop) works on [`Ring`] and [`Tap`], and
//! knows no kind.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kfilter::consumer::Malformed;
pub use kfilter::device::Passed;
use kfilter::{
    Captured, Consumer, Entry, Group, KernelConsumer, Loss, Mapping, Mode, Op, RecordRef, Refused, Region,
};
use machine::Mutex;

use crate::capture::in_flight::InFlight;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::status::KernelCounters;

/// Why a step of the ring was not done.
#[derive(Debug)]
pub enum Refusal {
    /// No room now.
    Full,
    /// Writes only set bits now.
    BitmapMode,
    /// Bits are set.
    Dirty,
    /// The barrier of the last begin was not passed, or the begin itself is under way.
    Owed,
    /// It will not work by itself.
    Failed(Error),
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Refusal {
        match refused {
            Refused::Full => Refusal::Full,
            Refused::BitmapMode => Refusal::BitmapMode,
            Refused::Dirty => Refusal::Dirty,
            Refused::Moving => Refusal::Owed,
            other => {
                Refusal::Failed(Error::new(ErrorKind::Ring, format!("the ring refused a record: {other:?}")))
            }
        }
    }
}

impl From<kfilter::Error> for Refusal {
    fn from(error: kfilter::Error) -> Refusal {
        if error.is(rustix::io::Errno::AGAIN) {
            return Refusal::Owed;
        }
        match error.kind {
            kfilter::ErrorKind::NoSpace => Refusal::Full,
            kfilter::ErrorKind::BitmapMode => Refusal::BitmapMode,
            kfilter::ErrorKind::Dirty => Refusal::Dirty,
            _ => Refusal::Failed(Error::because(ErrorKind::Ring, "ask the kernel module", error)),
        }
    }
}

/// A step's answer.
pub type Step<T> = std::result::Result<T, Refusal>;

/// The ring of a group.
pub enum Ring {
    /// Behind the NBD front.
    Front(Front),
    /// In the kernel.
    Kernel(InKernel),
}

/// The kernel's group, which a new epoch of a running agent replaces.
pub struct InKernel(RwLock<Arc<Group>>);

impl InKernel {
    /// This group.
    pub fn new(group: Group) -> InKernel {
        InKernel(RwLock::new(Arc::new(group)))
    }

    /// The group as it is now.
    pub fn group(&self) -> Arc<Group> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another takes its place.
    pub fn replace(&self, group: Group) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(group);
    }
}

/// The NBD front's ring, and the changes in flight of its volumes.
pub struct Front {
    /// The ring.
    pub region: Arc<Region>,
    in_flight: Vec<Arc<InFlight>>,
    /// What was in flight at the last begin.
    owed: Mutex<Vec<u64>>,
}

impl Front {
    /// The ring of these volumes.
    pub fn new(region: Arc<Region>, in_flight: Vec<Arc<InFlight>>) -> Front {
        Front { region, in_flight, owed: Mutex::new(Vec::new()) }
    }

    /// Every change that began before now is one that the barrier waits for.
    fn flip(&self) {
        let owed = self.in_flight.iter().map(|volume| volume.now()).collect();
        *self.owed.lock().unwrap_or_else(PoisonError::into_inner) = owed;
    }

    fn barrier(&self, timeout: Duration) -> bool {
        let deadline = machine::now() + timeout;
        let owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.in_flight.iter().zip(owed).all(|(volume, before)| {
            volume.until_left(before, deadline.saturating_duration_since(machine::now()))
        })
    }
}

impl Ring {
    /// Length of the ring.
    pub fn ring_bytes(&self) -> u64 {
        match self {
            Ring::Front(front) => front.region.ring_bytes(),
            Ring::Kernel(kernel) => kernel.group().ring_bytes(),
        }
    }

    /// How much of the ring is reserved and not yet released, 0 to 1.
    pub fn fill_ratio(&self) -> f64 {
        let used = match self {
            Ring::Front(front) => front.region.used_bytes(),
            Ring::Kernel(kernel) => kernel.group().used_bytes(),
        };
        used as f64 / self.ring_bytes() as f64
    }

    /// Where writes go now.
    pub fn mode(&self) -> Mode {
        match self {
            Ring::Front(front) => front.region.mode(),
            Ring::Kernel(kernel) => kernel.group().mode(),
        }
    }

    /// Since when and why writes are lost to the stream, until a resync ends.
    pub fn loss(&self) -> Option<Loss> {
        match self {
            Ring::Front(front) => front.region.loss(),
            Ring::Kernel(kernel) => kernel.group().loss(),
        }
    }

    /// The newest lsn given out.
    pub fn captured_lsn(&self) -> u64 {
        match self {
            Ring::Front(front) => front.region.captured_lsn(),
            Ring::Kernel(kernel) => match kernel.group().status() {
                Ok(status) => status.captured_lsn,
                Err(error) => {
                    // The file is open and the call has no argument that could be wrong: only a module taken
                    // away.
                    tracing::error!(%error, "ask the kernel module for its newest lsn");
                    kernel.group().first_held_lsn().saturating_sub(1)
                }
            },
        }
    }

    /// What the kernel module counted; none behind the NBD front.
    pub fn counters(&self) -> Option<KernelCounters> {
        match self {
            Ring::Front(_) => None,
            Ring::Kernel(kernel) => kernel.group().status().ok().map(KernelCounters::from),
        }
    }

    /// The lsn of the oldest record whose room is not released.
    pub fn first_held_lsn(&self) -> u64 {
        match self {
            Ring::Front(front) => front.region.first_held_lsn(),
            Ring::Kernel(kernel) => kernel.group().first_held_lsn(),
        }
    }

    /// The dirty ranges of a volume, ascending and merged, in whole granules cut at its size.
    pub fn dirty_extents(&self, volume: u32) -> Vec<Range<u64>> {
        match self {
            Ring::Front(front) => front.region.dirty_extents(volume).collect(),
            Ring::Kernel(kernel) => kernel.group().dirty_extents(volume).collect(),
        }
    }

    /// Whether any bit of a volume is set.
    pub fn is_dirty(&self, volume: u32) -> bool {
        match self {
            Ring::Front(front) => front.region.is_dirty(volume),
            Ring::Kernel(kernel) => kernel.group().is_dirty(volume),
        }
    }

    /// Known size of a volume.
    pub fn size_bytes(&self, volume: u32) -> Option<u64> {
        match self {
            Ring::Front(front) => front.region.size_bytes(volume),
            Ring::Kernel(kernel) => kernel.group().size_bytes(volume),
        }
    }

    /// Bytes of a volume that its bitmap can tell apart. What lies beyond, of a volume that has grown, is
    /// repaired from its first byte on.
    pub fn covered_bytes(&self, volume: u32) -> u64 {
        let known = match self {
            Ring::Front(front) => front.region.covered_bytes(volume),
            Ring::Kernel(kernel) => kernel.group().covered_bytes(volume),
        };
        known.unwrap_or(u64::MAX)
    }

    /// Puts an event into the order; its lsn.
    ///
    /// # Errors
    /// Why not.
    pub fn event(&self, op: Op, volume: u32, payload: &[u8]) -> Step<u64> {
        match self {
            Ring::Front(front) => {
                let payload_len = u32::try_from(payload.len()).map_err(|_| Refused::Malformed)?;
                let entry = Entry::event(op, volume, payload_len);
                match front.region.capture(std::iter::once(entry), payload, now_ns())? {
                    Captured::Ring(token) => Ok(token.last_lsn()),
                    Captured::Bits => Err(Refusal::BitmapMode),
                }
            }
            Ring::Kernel(kernel) => Ok(kernel.group().event(op, volume, payload)?),
        }
    }

    /// Puts empty sync slots into the order, next to each other; the lsn of the first.
    ///
    /// # Errors
    /// Why not; then there is none of them.
    pub fn slots(&self, volume: u32, ranges: &[Range<u64>]) -> Step<u64> {
        match self {
            Ring::Front(front) => {
                let slot = |range: &Range<u64>| Entry {
                    offset: range.start,
                    length: range.end - range.start,
                    ..Entry::event(Op::SyncSlot, volume, 0)
                };
                match front.region.capture(ranges.iter().map(slot), &[], now_ns())? {
                    Captured::Ring(token) => Ok(token.first_lsn()),
                    Captured::Bits => Err(Refusal::BitmapMode),
                }
            }
            Ring::Kernel(kernel) => Ok(kernel.group().slots(volume, ranges)?),
        }
    }

    /// Begins a resync; a barrier is owed. The lsn of `resync-begin`.
    ///
    /// # Errors
    /// Why not.
    pub fn begin(&self) -> Step<u64> {
        match self {
            Ring::Front(front) => {
                let lsn = front.region.begin_resync(now_ns())?;
                front.flip();
                Ok(lsn)
            }
            Ring::Kernel(kernel) => Ok(kernel.group().begin()?),
        }
    }

    /// Makes what is current pending, without a record; a barrier is owed. The newest lsn before it.
    ///
    /// # Errors
    /// Why not.
    pub fn fence(&self) -> Step<u64> {
        match self {
            Ring::Front(front) => {
                let lsn = front.region.fence()?;
                front.flip();
                Ok(lsn)
            }
            Ring::Kernel(kernel) => Ok(kernel.group().fence()?),
        }
    }

    /// Whether everything submitted before the last begin or fence has come back; waits a while for it.
    /// `drained`: the device-mapper devices were suspended and resumed since this answered
    /// [`Passed::MustDrain`].
    ///
    /// # Errors
    /// The kernel module's.
    pub fn barrier(&self, timeout: Duration, drained: bool) -> Result<Passed> {
        match self {
            Ring::Front(front) => Ok(if front.barrier(timeout) { Passed::Yes } else { Passed::NotYet }),
            Ring::Kernel(kernel) => kernel
                .group()
                .barrier(timeout, drained)
                .map_err(|error| Error::because(ErrorKind::Ring, "wait for writes in flight", error)),
        }
    }

    /// Ends a resync; the lsn of `resync-end`.
    ///
    /// # Errors
    /// Why not.
    pub fn end(&self) -> Step<u64> {
        match self {
            Ring::Front(front) => Ok(front.region.end_resync(now_ns())?),
            Ring::Kernel(kernel) => Ok(kernel.group().end()?),
        }
    }

    /// Clears pending bits of a range whose content was appended to the journal.
    ///
    /// # Errors
    /// The kernel module's: the bits stay, and the range is sent again.
    pub fn clear(&self, volume: u32, range: Range<u64>) -> Result<()> {
        match self {
            Ring::Front(front) => front.region.clear_dirty(volume, range),
            Ring::Kernel(kernel) => kernel
                .group()
                .clear(volume, range)
                .map_err(|error| Error::because(ErrorKind::Ring, "clear dirty bits", error))?,
        }
        Ok(())
    }

    /// Sets the bits of a range.
    ///
    /// # Errors
    /// The kernel module's: then nothing may be given up that these bits were to stand for.
    pub fn mark(&self, volume: u32, range: Range<u64>) -> Result<()> {
        match self {
            Ring::Front(front) => {
                front.region.mark_dirty(volume, range);
            }
            Ring::Kernel(kernel) => {
                let group = kernel.group();
                // Beyond the end there is nothing to read again.
                let end = group.size_bytes(volume).map_or(range.start, |size| range.end.min(size));
                if range.start < end {
                    group
                        .mark(volume, range.start..end)
                        .map_err(|error| Error::because(ErrorKind::Ring, "set dirty bits", error))?;
                }
            }
        }
        Ok(())
    }

    /// From now on writes only set bits.
    ///
    /// # Errors
    /// The kernel module's.
    pub fn set_mode_bitmap(&self, cause: u32) -> Result<()> {
        match self {
            Ring::Front(front) => front.region.set_mode_bitmap(cause, now_ns()),
            Ring::Kernel(kernel) => kernel
                .group()
                .bitmap(cause)
                .map_err(|error| Error::because(ErrorKind::Ring, "switch to dirty bits", error))?,
        }
        Ok(())
    }

    /// Ends the consumer's `wait` early.
    pub fn wake_consumer(&self) {
        match self {
            Ring::Front(front) => front.region.wake_consumer(),
            Ring::Kernel(kernel) => kernel.group().wake_consumer(),
        }
    }

    /// The ring's only consumer.
    ///
    /// # Errors
    /// There is another in this process.
    pub fn tap(&self) -> Result<Tap> {
        match self {
            Ring::Front(front) => Consumer::new(front.region.clone())
                .map(Tap::Front)
                .map_err(|_| Error::new(ErrorKind::Busy, "the ring already has a consumer in this process")),
            Ring::Kernel(kernel) => Ok(Tap::Kernel(KernelConsumer::new(kernel.group()))),
        }
    }

    /// Whether the device that is captured as this volume has vanished.
    pub fn is_gone(&self, volume: u32) -> bool {
        match self {
            Ring::Front(_) => false,
            Ring::Kernel(kernel) => kernel.group().volume(volume).is_ok_and(|status| status.gone != 0),
        }
    }

    /// Bios that were neither recorded nor failed, and commands that no hook sees: only bits stand for them,
    /// and nothing in the stream tells. The kernel sets those of the latter when it is asked.
    pub fn untold_writes(&self) -> u64 {
        match self {
            Ring::Front(_) => 0,
            Ring::Kernel(kernel) => kernel
                .group()
                .status()
                .map_or(0, |status| status.untracked + status.unreadable + status.unseen),
        }
    }

    /// Commands past the block layer, since the group was made.
    pub fn unseen_commands(&self) -> u64 {
        match self {
            Ring::Front(_) => 0,
            Ring::Kernel(kernel) => kernel.group().status().map_or(0, |status| status.unseen),
        }
    }
}

/// The consumer of a ring.
pub enum Tap {
    /// Of the NBD front's ring.
    Front(Consumer<Mapping, Arc<Region>>),
    /// Of the kernel's.
    Kernel(KernelConsumer),
}

impl Tap {
    /// The record at the cursor; `None` when it is not published yet.
    ///
    /// # Errors
    /// The ring's memory was overwritten.
    #[inline]
    pub fn peek(&self) -> std::result::Result<Option<RecordRef<'_>>, Malformed> {
        match self {
            Tap::Front(consumer) => consumer.peek(),
            Tap::Kernel(consumer) => consumer.peek(),
        }
    }

    /// Moves behind the record at the cursor.
    ///
    /// # Errors
    /// The ring's memory was overwritten.
    #[inline]
    pub fn advance(&self) -> std::result::Result<bool, Malformed> {
        match self {
            Tap::Front(consumer) => consumer.advance(),
            Tap::Kernel(consumer) => consumer.advance(),
        }
    }

    /// Back to the oldest record that is not released.
    pub fn rewind(&mut self) {
        match self {
            Tap::Front(consumer) => consumer.rewind(),
            Tap::Kernel(consumer) => consumer.rewind(),
        }
    }

    /// Gives room back up to this lsn; the lsn of the first record that is not released.
    ///
    /// # Errors
    /// The ring's memory was overwritten, or the kernel module refused.
    pub fn release(&mut self, up_to_lsn: u64) -> Result<u64> {
        match self {
            Tap::Front(consumer) => consumer.release(up_to_lsn).map_err(ring_lost),
            Tap::Kernel(consumer) => consumer
                .release(up_to_lsn)
                .map_err(|error| Error::because(ErrorKind::Ring, "give back room of the ring", error)),
        }
    }

    /// Sleeps until there is a record or the time is over.
    pub fn wait(&self, timeout: Duration) -> bool {
        match self {
            Tap::Front(consumer) => consumer.wait(timeout),
            Tap::Kernel(consumer) => consumer.wait(timeout),
        }
    }
}

/// The ring's memory was written by somebody else.
pub fn ring_lost(malformed: Malformed) -> Error {
    let at = format!("the ring's memory was overwritten at position {}", malformed.position);
    Error::new(ErrorKind::Ring, at)
}
