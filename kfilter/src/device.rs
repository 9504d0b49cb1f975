//! The user side of `/dev/kfilter`: groups that the kernel owns.
//!
//! The ring belongs to the kernel and is mapped read-only: records, dirty bits and positions are read there,
//! and every change is an ioctl (`calls`). So the agent's death loses nothing, and nothing that an agent does
//! can damage a ring.
//!
//! State: the open file (being a group's agent lasts as long as it is open), the mapping, and the bell.
//! Nothing in the mapping is trusted for a length (`recovery`, `consumer`).

use super::abi::{BITMAPS_AT, GRANULE, Identity, Layout, Op, VolumeSpec, control_at, identity_at, slot_at};
use super::calls::Calls;
use super::consumer::{Cursor, Malformed, RecordRef};
use super::dirty::{DirtyExtents, Loss, MODE_BITMAP};
use super::error::{Error, ErrorKind};
use super::ioctl as abi;
use super::memory::Memory;
use super::recovery::check_identity;
use super::ring::{Mode, Volume};
use super::span::Span;
use core::ptr::NonNull;
use core::sync::atomic::Ordering::{self, Acquire, Relaxed};
use memmap2::{MmapOptions, MmapRaw};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsRawFd as _, OwnedFd};
use rustix::io::Errno;
use std::boxed::Box;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::vec::Vec;

/// Groups of one machine that a list may have.
const MAX_GROUPS: usize = 1024;

/// The open device, not yet the agent of a group.
#[derive(Debug)]
pub struct Device {
    calls: Calls,
}

/// How long writes in flight may take to come back when an old group is forgotten.
const DETACH: Duration = Duration::from_secs(10);

/// What a barrier answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// Every write submitted before is over.
    Yes,
    /// Some write is still on its way: ask again.
    NotYet,
    /// The group's device-mapper devices must be suspended, without `noflush`, and resumed; then ask again.
    MustDrain,
}

/// What a new group is made of.
#[derive(Clone, Copy, Debug)]
pub struct GroupSpec<'a> {
    /// Whose ring; the boot id is the kernel's own.
    pub identity: Identity,
    /// Its volumes.
    pub volumes: &'a [VolumeSpec],
    /// Length of the ring, a power of two.
    pub ring_bytes: u64,
    /// Lsn of the first record.
    pub first_lsn: u64,
    /// No record gets an earlier time.
    pub last_time_ns: u64,
    /// Writes in flight that can be followed at once; 0 for what the module takes by itself.
    pub contexts: u32,
}

impl Device {
    /// Opens `/dev/kfilter`.
    pub fn open() -> Result<Self, Error> {
        Self::open_at(Path::new(abi::DEVICE))
    }

    /// Opens a device by another name.
    pub fn open_at(path: &Path) -> Result<Self, Error> {
        Ok(Self { calls: Calls::open(path)? })
    }

    /// The groups that the kernel holds.
    pub fn groups(&self) -> Result<Vec<abi::GroupEntry>, Error> {
        let mut groups = std::vec![abi::GroupEntry::default(); MAX_GROUPS];
        let mut list = abi::List { to: groups.as_mut_ptr().expose_provenance() as u64, count: 1024, zero: 0 };
        self.calls.list(&mut list)?;
        groups.truncate(list.count as usize);
        Ok(groups)
    }

    /// Makes a group with an empty ring and becomes its agent.
    pub fn create(self, spec: &GroupSpec<'_>) -> Result<Group, Error> {
        let identity = &spec.identity;
        let volumes: Vec<abi::NewVolume> = spec
            .volumes
            .iter()
            .map(|volume| abi::NewVolume {
                id: volume.id,
                sector_bytes: volume.sector_bytes,
                uuid: volume.uuid,
                size_bytes: volume.size_bytes,
            })
            .collect();
        let invalid = || self.calls.error(ErrorKind::Invalid);
        let layout = Layout::plan(spec.ring_bytes, spec.volumes).ok_or_else(invalid)?;
        let mut create = abi::Create {
            group_id: identity.group_id,
            epoch: identity.epoch,
            epoch_id: identity.epoch_id,
            first_lsn: spec.first_lsn,
            last_time_ns: spec.last_time_ns,
            ring_bytes: spec.ring_bytes,
            volumes: volumes.as_ptr().expose_provenance() as u64,
            volume_count: u32::try_from(volumes.len()).map_err(|_| invalid())?,
            contexts: spec.contexts,
        };
        // The only room that this call can lack is the module's.
        self.calls.create(&mut create).map_err(|error| match error.kind {
            ErrorKind::NoSpace => Error { kind: ErrorKind::NoMemory, ..error },
            _ => error,
        })?;
        Group::map(self.calls, layout.total_bytes, identity)
    }

    /// Becomes the agent of a group that the kernel holds. `Absent`: there is none; `Busy`: another process
    /// is its agent; `Lost`: it is of another epoch.
    pub fn take_over(self, identity: &Identity) -> Result<Group, Error> {
        let mut open = abi::Open { group_id: identity.group_id, total_bytes: 0 };
        self.calls.take(&mut open)?;
        Group::map(self.calls, open.total_bytes, identity)
    }

    /// Forgets a group of whatever epoch, its devices detached first. Nothing to do when there is none.
    pub fn destroy(self, group_id: [u8; 16]) -> Result<(), Error> {
        let Some(found) = self.groups()?.into_iter().find(|group| group.group_id == group_id) else {
            return Ok(());
        };
        let (epoch, epoch_id) = (found.epoch, found.epoch_id);
        let group = self.take_over(&Identity { boot_id: [0; 16], group_id, epoch, epoch_id })?;
        for volume in group.volume_ids() {
            if group.volume(volume)?.device != 0 {
                group.detach(volume, DETACH)?;
            }
        }
        group.destroy()
    }
}

/// A group whose agent this process is.
#[derive(Debug)]
pub struct Group {
    calls: Calls,
    view: View,
    layout: Layout,
    volume_count: u64,
    bell: OwnedFd,
}

impl Group {
    fn map(calls: Calls, total_bytes: u64, identity: &Identity) -> Result<Self, Error> {
        let io = |source| Error { kind: ErrorKind::Io, at: abi::DEVICE.into(), source: Some(source) };
        if total_bytes < BITMAPS_AT {
            return Err(calls.error(ErrorKind::OtherAbi));
        }
        let length = usize::try_from(total_bytes).map_err(|_| calls.error(ErrorKind::Invalid))?;
        let map = MmapOptions::new().len(length).map_raw_read_only(calls.file()).map_err(io)?;
        let view = View::over(map, total_bytes).ok_or_else(|| calls.error(ErrorKind::Io))?;
        // The kernel's ring never outlives its boot.
        let identity = Identity { boot_id: view.boot_id(), ..*identity };
        let (layout, volumes) =
            check_identity(&view, &identity).map_err(|lost| calls.error(ErrorKind::Lost(lost)))?;
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| io(errno.into()))?;
        calls.eventfd(&mut abi::EventFd { fd: bell.as_raw_fd(), zero: 0 })?;
        Ok(Self { calls, view, layout, volume_count: volumes as u64, bell })
    }

    fn word(&self, at: u64) -> u64 {
        self.view.load64(at, Acquire)
    }

    /// Length of the ring.
    pub fn ring_bytes(&self) -> u64 {
        self.layout.ring_bytes
    }

    /// Bytes reserved and not released.
    pub fn used_bytes(&self) -> u64 {
        let tail = self.word(control_at::TAIL);
        self.word(control_at::HEAD).wrapping_sub(tail).min(self.layout.ring_bytes)
    }

    /// Where writes go now.
    pub fn mode(&self) -> Mode {
        if self.view.load32(control_at::MODE, Acquire) == MODE_BITMAP { Mode::Bitmap } else { Mode::Ring }
    }

    /// When and why writes were lost; see `Ring::loss`.
    pub fn loss(&self) -> Option<Loss> {
        let since_ns = self.word(control_at::LOST_SINCE);
        let cause = self.view.load32(control_at::CAUSE, Relaxed);
        (since_ns != 0).then_some(Loss { since_ns, cause })
    }

    /// The lsn of the oldest record whose room is not released.
    pub fn first_held_lsn(&self) -> u64 {
        self.word(control_at::ANCHOR_LSN)
    }

    fn slots_in_use(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.volume_count).map(|index| slot_at::SLOTS + index * slot_at::BYTES)
    }

    /// Ids of its volumes.
    pub fn volume_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots_in_use().map(|slot| self.view.load32(slot + slot_at::ID, Relaxed))
    }

    fn slot(&self, volume: u32) -> Option<u64> {
        self.slots_in_use().find(|slot| self.view.load32(slot + slot_at::ID, Relaxed) == volume)
    }

    /// Known size of a volume.
    pub fn size_bytes(&self, volume: u32) -> Option<u64> {
        self.slot(volume).map(|slot| self.word(slot + slot_at::SIZE))
    }

    /// Bytes of a volume that its bitmap can tell apart; see `Ring::covered_bytes`.
    pub fn covered_bytes(&self, volume: u32) -> Option<u64> {
        let bitmap_bytes = self.word(self.slot(volume)? + slot_at::BITMAP_BYTES);
        bitmap_bytes.checked_mul(8 * GRANULE)
    }

    /// The dirty ranges of a volume; see `Ring::dirty_extents`. Reads the mapping, asks nobody.
    pub fn dirty_extents(&self, volume: u32) -> impl Iterator<Item = Range<u64>> + '_ {
        let found = self.slot(volume).map(|slot| Volume {
            id: volume,
            size_bytes: self.word(slot + slot_at::SIZE),
            slot,
            bitmap_at: self.word(slot + slot_at::BITMAP_AT),
            bitmap_bytes: self.word(slot + slot_at::BITMAP_BYTES),
            // The module alone knows it; no caller here asks for it.
            current_bits: 0,
            pending_bits: 0,
        });
        // The layout was checked as a whole (`check_identity`); a bitmap outside of it would be read out of
        // bounds.
        let inside = found.filter(|volume| {
            let end = volume.bitmap_bytes.checked_mul(2).and_then(|both| both.checked_add(volume.bitmap_at));
            volume.bitmap_at >= BITMAPS_AT && end.is_some_and(|end| end <= self.layout.ring_at)
        });
        DirtyExtents::of(&self.view, inside)
    }

    /// Whether any bit of a volume is set.
    pub fn is_dirty(&self, volume: u32) -> bool {
        self.dirty_extents(volume).next().is_some()
    }

    /// Positions and counters.
    pub fn status(&self) -> Result<abi::Status, Error> {
        let mut status = abi::Status::default();
        self.calls.status(&mut status).map(|()| status)
    }

    /// One volume.
    pub fn volume(&self, volume: u32) -> Result<abi::VolumeStatus, Error> {
        let mut status = abi::VolumeStatus { volume, ..abi::VolumeStatus::default() };
        self.calls.volume(&mut status).map(|()| status)
    }

    /// Captures a device as a volume. True: it is a device-mapper device, which must be suspended and resumed
    /// before anything is read for a synchronisation. A barrier is owed. `rdev` is what `stat` says.
    pub fn attach(&self, volume: u32, rdev: u64, clean: bool) -> Result<bool, Error> {
        let flags = if clean { abi::ATTACH_CLEAN } else { 0 };
        let device = device_number(rdev).ok_or_else(|| self.calls.error(ErrorKind::Invalid))?;
        let mut attach = abi::Attach { volume, flags, device, zero: 0 };
        self.calls.attach(&mut attach).map_err(|error| {
            let kind = match error.source.as_ref().and_then(Errno::from_io_error) {
                Some(Errno::BUSY) => ErrorKind::Attached,
                Some(Errno::MEDIUMTYPE) => ErrorKind::Unsuitable,
                Some(Errno::FBIG) => ErrorKind::TooLarge,
                _ => error.kind,
            };
            Error { kind, ..error }
        })?;
        Ok(attach.flags & abi::ATTACHED_BIO_BASED != 0)
    }

    /// Ends the capture of a volume; the newest lsn then. `TimedOut`: it has ended, and writes are still
    /// under way; ask again.
    pub fn detach(&self, volume: u32, timeout: Duration) -> Result<u64, Error> {
        let mut detach = abi::Detach { volume, timeout_ms: milliseconds(timeout), last_lsn: 0 };
        self.calls.detach(&mut detach).map(|()| detach.last_lsn)
    }

    /// Puts an event into the order; its lsn.
    pub fn event(&self, op: Op, volume: u32, payload: &[u8]) -> Result<u64, Error> {
        let payload_len = u32::try_from(payload.len()).map_err(|_| self.calls.error(ErrorKind::Invalid))?;
        let mut event = abi::Event {
            op: op as u32,
            volume,
            payload: payload.as_ptr().expose_provenance() as u64,
            payload_len,
            zero: 0,
            lsn: 0,
        };
        self.calls.event(&mut event).map(|()| event.lsn)
    }

    /// Puts empty sync slots into the order, next to each other; the lsn of the first.
    pub fn slots(&self, volume: u32, ranges: &[Range<u64>]) -> Result<u64, Error> {
        let slots: Vec<abi::Slot> = ranges
            .iter()
            .map(|range| abi::Slot { offset: range.start, length: range.end - range.start })
            .collect();
        let count = u32::try_from(slots.len()).map_err(|_| self.calls.error(ErrorKind::Invalid))?;
        let mut argument =
            abi::Slots { slots: slots.as_ptr().expose_provenance() as u64, count, volume, first_lsn: 0 };
        self.calls.slots(&mut argument).map(|()| argument.first_lsn)
    }

    /// Begins a resync; the lsn of `resync-begin`.
    pub fn begin(&self) -> Result<u64, Error> {
        let mut begin = abi::Begin::default();
        self.calls.begin(&mut begin).map(|()| begin.lsn)
    }

    /// Fences single ranges; the newest lsn before it.
    pub fn fence(&self) -> Result<u64, Error> {
        let mut begin = abi::Begin { flags: abi::BEGIN_FENCE, ..abi::Begin::default() };
        self.calls.begin(&mut begin).map(|()| begin.lsn)
    }

    /// Whether every write submitted before the last begin has come back, within a time. `drained`: the
    /// caller did, since the call that answered `MustDrain`, what that asks for.
    pub fn barrier(&self, timeout: Duration, drained: bool) -> Result<Passed, Error> {
        let flags = if drained { abi::BARRIER_DRAINED } else { 0 };
        let mut barrier = abi::Barrier { timeout_ms: milliseconds(timeout), flags };
        match self.calls.barrier(&mut barrier) {
            Ok(()) => Ok(Passed::Yes),
            Err(error) if error.kind == ErrorKind::TimedOut => Ok(Passed::NotYet),
            Err(error) if error.is(Errno::UCLEAN) => Ok(Passed::MustDrain),
            Err(error) => Err(error),
        }
    }

    /// Clears pending bits; see `Ring::clear_dirty`.
    pub fn clear(&self, volume: u32, range: Range<u64>) -> Result<(), Error> {
        self.calls.clear(&mut abi::Range { volume, zero: 0, start: range.start, end: range.end })
    }

    /// Sets current bits.
    pub fn mark(&self, volume: u32, range: Range<u64>) -> Result<(), Error> {
        self.calls.mark(&mut abi::Range { volume, zero: 0, start: range.start, end: range.end })
    }

    /// Ends a resync; the lsn of `resync-end`.
    pub fn end(&self) -> Result<u64, Error> {
        let mut end = abi::End::default();
        self.calls.end(&mut end).map(|()| end.lsn)
    }

    /// From now on writes only set bits.
    pub fn bitmap(&self, cause: u32) -> Result<(), Error> {
        self.calls.bitmap(&mut abi::Bitmap { cause, zero: 0 })
    }

    /// Forgets the group; every device must be detached. The group cannot be used after it.
    pub fn destroy(&self) -> Result<(), Error> {
        self.calls.destroy()
    }

    /// Ends the consumer's `wait` early.
    pub fn wake_consumer(&self) {
        // Full: it rings already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

/// The consumer of a kernel's ring: the face of `Consumer`, without a store to the mapping.
#[derive(Debug)]
pub struct KernelConsumer {
    group: Arc<Group>,
    cursor: Cursor,
    released_lsn: u64,
}

impl KernelConsumer {
    /// Starts at the oldest record that is not released. One at a time: the caller sees to that.
    pub fn new(group: Arc<Group>) -> Self {
        // The anchor first: it may only be older than the tail, never newer.
        let released_lsn = group.first_held_lsn().saturating_sub(1);
        let cursor = Cursor::at(group.word(control_at::TAIL));
        Self { group, cursor, released_lsn }
    }

    /// The record at the cursor; `None` when it is not published yet.
    pub fn peek(&self) -> Result<Option<RecordRef<'_>>, Malformed> {
        self.cursor.peek(&self.group.view, &self.group.layout)
    }

    /// Moves the cursor behind the record at it; false when there is none.
    pub fn advance(&self) -> Result<bool, Malformed> {
        self.cursor.advance(&self.group.view, &self.group.layout)
    }

    /// Back to the oldest record that is not released: all of them are read again.
    pub fn rewind(&mut self) {
        self.cursor = Cursor::at(self.group.word(control_at::TAIL));
    }

    /// Gives back the room of consumed records up to this lsn; the lsn of the first record that is not
    /// released.
    pub fn release(&mut self, up_to_lsn: u64) -> Result<u64, Error> {
        if up_to_lsn > self.released_lsn {
            let mut release = abi::Release { lsn: up_to_lsn };
            self.group.calls.release(&mut release)?;
            self.released_lsn = release.lsn.saturating_sub(1);
        }
        Ok(self.released_lsn + 1)
    }

    /// Sleeps until there is a record to take or the time is over. True when `peek` has something to say.
    pub fn wait(&self, timeout: Duration) -> bool {
        let ready = || !matches!(self.peek(), Ok(None));
        if ready() {
            return true;
        }
        let mut arm = abi::Arm { position: self.cursor.position() };
        match self.group.calls.arm(&mut arm) {
            Ok(()) => {
                let timeout = Timespec {
                    tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: i64::from(timeout.subsec_nanos()),
                };
                let mut polled = [PollFd::new(&self.group.bell, PollFlags::IN)];
                // Interrupted or over: the caller looks again either way.
                let _ = poll(&mut polled, Some(&timeout));
                let _ = rustix::io::read(&self.group.bell, &mut [0; 8]);
            }
            // There is something already, perhaps a record that is reserved and not published: never spin on
            // it.
            Err(error) if error.is(Errno::AGAIN) => std::thread::yield_now(),
            Err(_) => std::thread::sleep(timeout.min(Duration::from_millis(10))),
        }
        ready()
    }
}

/// A mapping that is only read.
#[derive(Debug)]
struct View {
    span: Span,
    // Declared last, so dropped last.
    _map: Box<MmapRaw>,
}

impl View {
    fn over(map: MmapRaw, bytes: u64) -> Option<Self> {
        let base = NonNull::new(map.as_mut_ptr())?;
        // SAFETY: page aligned and mapped as long as `map` beside it. It is mapped for reading only, and only
        // read: the stores of `Memory` are not passed on. Atomic loads of words of at most 8 bytes are
        // allowed on such memory.
        let span = unsafe { Span::new(base, bytes) };
        Some(Self { span, _map: Box::new(map) })
    }

    fn boot_id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.load64(identity_at::BOOT_ID, Relaxed).to_le_bytes());
        id[8..].copy_from_slice(&self.load64(identity_at::BOOT_ID + 8, Relaxed).to_le_bytes());
        id
    }
}

const READ_ONLY: &str = "invariant: the kernel's ring is changed by the kernel only";

// SAFETY: forwards reads to `Span`; what the kernel stores is what is loaded.
unsafe impl Memory for View {
    fn len(&self) -> u64 {
        self.span.len()
    }
    #[inline]
    fn load32(&self, at: u64, order: Ordering) -> u32 {
        self.span.load32(at, order)
    }
    #[inline]
    fn load64(&self, at: u64, order: Ordering) -> u64 {
        self.span.load64(at, order)
    }
    fn store32(&self, _: u64, _: u32, _: Ordering) {
        unreachable!("{READ_ONLY}")
    }
    fn store64(&self, _: u64, _: u64, _: Ordering) {
        unreachable!("{READ_ONLY}")
    }
    fn or32(&self, _: u64, _: u32, _: Ordering) -> u32 {
        unreachable!("{READ_ONLY}")
    }
    fn or64(&self, _: u64, _: u64, _: Ordering) -> u64 {
        unreachable!("{READ_ONLY}")
    }
    fn and64(&self, _: u64, _: u64, _: Ordering) -> u64 {
        unreachable!("{READ_ONLY}")
    }
    unsafe fn write(&self, _: u64, _: &[u8]) {
        unreachable!("{READ_ONLY}")
    }
    #[inline]
    unsafe fn bytes(&self, at: u64, len: u64) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { self.span.bytes(at, len) }
    }
}

fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

/// The kernel's `new_encode_dev` form of a device number: minor bits 0–7, major, minor bits 8–19.
pub fn device_number(rdev: u64) -> Option<u32> {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (major < 1 << 12 && minor < 1 << 20).then_some(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::region::{Region, RegionSpec};
    use crate::testing::{IDENTITY, VOLUMES, write};

    /// A mapping of a ring's file that is only read, beside the owner who writes it: what the kernel's
    /// mapping is.
    fn view(dir: &Path) -> (View, Layout) {
        let file = std::fs::File::open(dir.join("ring")).expect("a ring");
        let bytes = file.metadata().expect("its length").len();
        let map = MmapOptions::new().map_raw_read_only(&file).expect("a mapping");
        let view = View::over(map, bytes).expect("an address");
        let (layout, count) =
            check_identity(&view, &Identity { boot_id: view.boot_id(), ..IDENTITY }).expect("a ring");
        assert_eq!(count, VOLUMES.len());
        (view, layout)
    }

    #[test]
    fn records_and_bits_are_read_without_a_store() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("these tests need a tmpfs at /dev/shm");
        let spec = RegionSpec {
            identity: IDENTITY,
            volumes: &VOLUMES,
            ring_bytes: 4096,
            first_lsn: 9,
            last_time_ns: 0,
        };
        let region = Region::create(dir.path(), &spec).unwrap();
        let (view, layout) = view(dir.path());
        let cursor = Cursor::at(0);
        assert_eq!(cursor.peek(&view, &layout), Ok(None));
        for lap in 0..20u8 {
            let token = write(&region, 7, 512 * u64::from(lap), &[lap; 700], 1);
            region.mark_done(token);
            let record = cursor.peek(&view, &layout).unwrap().unwrap();
            assert_eq!((record.lsn(), record.op()), (9 + u64::from(lap), Op::Write));
            assert_eq!(record.payload(), [lap; 700]);
            assert!(cursor.advance(&view, &layout).unwrap());
            let mut consumer = crate::Consumer::new(&region).unwrap();
            while consumer.advance().unwrap() {}
            consumer.release(u64::MAX).unwrap();
        }
        region.mark_dirty(9, GRANULE..GRANULE + 1);
        let slot = slot_at::SLOTS + slot_at::BYTES;
        let volume = Volume {
            id: 9,
            size_bytes: view.load64(slot + slot_at::SIZE, Relaxed),
            slot,
            bitmap_at: view.load64(slot + slot_at::BITMAP_AT, Relaxed),
            bitmap_bytes: view.load64(slot + slot_at::BITMAP_BYTES, Relaxed),
            current_bits: 0,
            pending_bits: 0,
        };
        let dirty: Vec<_> = DirtyExtents::of(&view, Some(volume)).collect();
        assert_eq!(dirty, core::slice::from_ref(&(GRANULE..2 * GRANULE)));
    }

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        let of = |major, minor| device_number(rustix::fs::makedev(major, minor));
        assert_eq!(of(8, 17), Some(0x811));
        assert_eq!(of(254, 300), Some(300 & 0xff | 254 << 8 | 256 << 12));
        assert_eq!(of(4096, 0), None);
    }
}
