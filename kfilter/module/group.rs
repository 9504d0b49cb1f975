// SPDX-License-Identifier: GPL-2.0
//! Control plane: groups, each with one ring for its volumes, and what all groups share.
//!
//! A group belongs to the kernel. Files come and go as its agent; devices are attached and detached; it goes
//! when it is destroyed, or with the module (which cannot go while a device is attached).
//!
//! Locks, outermost first: `GROUPS`, a group's `volumes`, the reservation lock. `step` serialises what an
//! agent does in several steps, and is taken before `volumes`.

use crate::abi::{Identity, Layout, Op, VolumeSpec, state};
use crate::attached::{Attached, PROBES};
use crate::consumer::Consumer;
use crate::contexts::Contexts;
use crate::entry::Entry;
use crate::host::KernelHost;
use crate::memory::{Host as _, Memory as _};
use crate::ring::{Captured, Mode, Refused, Ring};
use crate::{ioctl, sys};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use kernel::bindings;
use kernel::error::to_result;
use kernel::ffi::c_void;
use kernel::prelude::*;
use kernel::sync::{Arc, Mutex, global_lock, new_mutex};
use kernel::types::Opaque;

global_lock! {
    // SAFETY: `init` runs before anything else of this module.
    unsafe(uninit) static GROUPS: Mutex<KVec<Arc<Group>>> = KVec::new();
}

/// How long a step waits for a count that its caller has waited for already.
const QUIET_MS: u32 = 100;

/// Writes in flight that can be followed at once where nothing else is asked for: several disks with deep
/// queues.
const CONTEXTS: u32 = 16384;

static MEMORY_LIMIT: AtomicU64 = AtomicU64::new(0);
static MEMORY_USED: AtomicU64 = AtomicU64::new(0);
/// Of groups that were destroyed, and whose pages a process may still have mapped.
static MEMORY_LINGERING: AtomicU64 = AtomicU64::new(0);
static MEASURE: AtomicBool = AtomicBool::new(false);
static CHAIN_END_IO: AtomicUsize = AtomicUsize::new(0);
static TRACEPOINTS: [Tracepoint; PROBES.len()] = [const { Tracepoint::none() }; PROBES.len()];

/// A tracepoint of the kernel, and our probe for it.
pub(crate) struct Tracepoint {
    found: AtomicPtr<bindings::tracepoint>,
    probe: AtomicPtr<c_void>,
}

impl Tracepoint {
    const fn none() -> Self {
        Self { found: AtomicPtr::new(core::ptr::null_mut()), probe: AtomicPtr::new(core::ptr::null_mut()) }
    }

    /// All that a device needs, in the order of registration.
    pub(crate) fn all() -> &'static [Tracepoint] {
        &TRACEPOINTS
    }

    /// May sleep.
    pub(crate) fn register(&self, data: *mut c_void) -> Result {
        let (found, probe) = (self.found.load(Ordering::Relaxed), self.probe.load(Ordering::Relaxed));
        // SAFETY: found at `init`; the probe takes this tracepoint's arguments after `data`.
        to_result(unsafe { bindings::tracepoint_probe_register(found, probe, data) })
    }

    /// May sleep. Probes may still run: `kf_tracepoint_sync`.
    pub(crate) fn unregister(&self, data: *mut c_void) {
        let (found, probe) = (self.found.load(Ordering::Relaxed), self.probe.load(Ordering::Relaxed));
        // SAFETY: registered before, with the same data.
        unsafe { bindings::tracepoint_probe_unregister(found, probe, data) };
    }
}

unsafe extern "C" fn find(tracepoint: *mut bindings::tracepoint, _unused: *mut c_void) {
    // SAFETY: the kernel walks its own tracepoints, whose names are strings.
    let name = unsafe { CStr::from_char_ptr((*tracepoint).name) };
    for (known, (wanted, probe)) in TRACEPOINTS.iter().zip(PROBES) {
        if name.to_bytes() == wanted.to_bytes() {
            known.found.store(tracepoint, Ordering::Relaxed);
            known.probe.store(probe.cast_mut().cast(), Ordering::Relaxed);
        }
    }
}

/// What all groups share, from the module's load to its end.
pub(crate) struct Shared(());

impl Shared {
    /// Called once, before anything else of this module.
    pub(crate) fn new(limit_bytes: u64, measure: bool) -> Result<Self> {
        // SAFETY: before any other use.
        unsafe { GROUPS.init() };
        MEMORY_LIMIT.store(limit_bytes, Ordering::Relaxed);
        MEASURE.store(measure, Ordering::Relaxed);
        // SAFETY: `find` keeps what it is shown only if it is a tracepoint of the kernel proper, which is
        // never unloaded.
        unsafe { bindings::for_each_kernel_tracepoint(Some(find), core::ptr::null_mut()) };
        for (known, (name, _)) in TRACEPOINTS.iter().zip(PROBES) {
            if known.found.load(Ordering::Relaxed).is_null() {
                pr_err!("this kernel has no tracepoint {}: it is not supported\n", name);
                return Err(ENODEV);
            }
        }
        let chain_end_io = sys::kf_chain_end_io().ok_or(ENOMEM)?;
        CHAIN_END_IO.store(chain_end_io as usize, Ordering::Relaxed);
        to_result(sys::kf_chain_init())?;
        Ok(Self(()))
    }
}

impl Drop for Shared {
    /// Nothing is attached (each attached device holds a reference to the module) and no file is open.
    fn drop(&mut self) {
        GROUPS.lock().clear();
        sys::kf_chain_exit();
    }
}

/// Address of the kernel's `bio_chain_endio`, which must not be called.
#[inline]
pub(crate) fn chain_end_io() -> usize {
    CHAIN_END_IO.load(Ordering::Relaxed)
}

#[inline]
pub(crate) fn is_measuring() -> bool {
    MEASURE.load(Ordering::Relaxed)
}

/// Limit and use.
pub(crate) fn memory() -> (u64, u64) {
    let used = MEMORY_USED.load(Ordering::Relaxed);
    (MEMORY_LIMIT.load(Ordering::Relaxed), used.wrapping_add(MEMORY_LINGERING.load(Ordering::Relaxed)))
}

/// Bytes of the limit; given back on drop. What lingers has a limit of the same size of its own: an agent
/// makes the group of a new epoch while it still reads the old one.
struct Allowance {
    bytes: u64,
    is_lingering: AtomicBool,
}

impl Allowance {
    fn new(bytes: u64) -> Result<Self> {
        let limit = MEMORY_LIMIT.load(Ordering::Relaxed);
        let lingering = MEMORY_LINGERING.load(Ordering::Relaxed);
        if lingering > limit {
            pr_warn!(
                "{} MiB of groups that were destroyed are still mapped, more than the allowed {}: end the process that has them\n",
                lingering >> 20,
                limit >> 20
            );
            return Err(ENOSPC);
        }
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        match MEMORY_USED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Self { bytes, is_lingering: AtomicBool::new(false) }),
            Err(used) => {
                pr_warn!(
                    "a group needs {} MiB, {} of the allowed {} are in use: see the parameter memory_limit_mib\n",
                    bytes >> 20,
                    used >> 20,
                    limit >> 20
                );
                Err(ENOSPC)
            }
        }
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        let counter = if *self.is_lingering.get_mut() { &MEMORY_LINGERING } else { &MEMORY_USED };
        counter.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What happened since the group was made.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) ring_writes: AtomicU64,
    pub(crate) bitmap_writes: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) void: AtomicU64,
    pub(crate) late: AtomicU64,
    pub(crate) untracked: AtomicU64,
    pub(crate) unreadable: AtomicU64,
    pub(crate) unseen: AtomicU64,
    pub(crate) freeze_ns_max: AtomicU64,
    hook_ns_total: AtomicU64,
    hook_ns_max: AtomicU64,
}

impl Counters {
    pub(crate) fn measured(&self, ns: u64) {
        self.hook_ns_total.fetch_add(ns, Ordering::Relaxed);
        self.hook_ns_max.fetch_max(ns, Ordering::Relaxed);
    }
}

/// A volume of a group.
struct Volume {
    id: u32,
    attached: Option<Arc<Attached>>,
}

/// Volumes that share one ring.
#[pin_data]
pub(crate) struct Group {
    identity: Identity,
    pub(crate) ring: Ring<KernelHost>,
    layout: Layout,
    pub(crate) contexts: Contexts,
    pub(crate) counters: Counters,
    /// Flips at each begin; its lowest bit names the counts in use.
    generation: AtomicU32,
    /// Those who wait for a count to reach zero.
    waiting: AtomicU32,
    #[pin]
    idle: Opaque<bindings::wait_queue_head>,
    has_agent: AtomicBool,
    #[pin]
    step: Mutex<()>,
    #[pin]
    volumes: Mutex<KVec<Volume>>,
    allowance: Allowance,
}

// SAFETY: the wait queue has a lock of its own; the rest is `Send` and `Sync`.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Makes a group and puts it on the list; the caller is its agent.
    pub(crate) fn create(create: &ioctl::Create, specs: &[VolumeSpec]) -> Result<Arc<Self>> {
        let identity = Identity {
            boot_id: boot_id(),
            group_id: create.group_id,
            epoch: create.epoch,
            epoch_id: create.epoch_id,
        };
        let layout = Layout::plan(create.ring_bytes, specs).ok_or(EINVAL)?;
        let contexts = if create.contexts == 0 { CONTEXTS } else { create.contexts };
        let bytes = layout.total_bytes.checked_add(Contexts::bytes(contexts)).ok_or(EINVAL)?;
        let allowance = Allowance::new(bytes)?;
        let host = KernelHost::new(layout.total_bytes)?;
        let ring =
            Ring::format(host, &identity, specs, create.ring_bytes, create.first_lsn, create.last_time_ns)
                .ok_or(EINVAL)?;
        let contexts = Contexts::new(contexts).ok_or(ENOMEM)?;
        let mut volumes = KVec::with_capacity(specs.len(), GFP_KERNEL)?;
        for spec in specs {
            volumes.push(Volume { id: spec.id, attached: None }, GFP_KERNEL)?;
        }
        let group = Arc::pin_init(
            pin_init!(Self {
                identity,
                ring,
                layout,
                contexts,
                counters: Counters::default(),
                generation: AtomicU32::new(0),
                waiting: AtomicU32::new(0),
                idle <- Opaque::ffi_init(|queue| {
                    // SAFETY: in its final place.
                    unsafe { sys::kf_wait_init(queue) }
                }),
                has_agent: AtomicBool::new(true),
                step <- new_mutex!(()),
                volumes <- new_mutex!(volumes),
                allowance,
            }),
            GFP_KERNEL,
        )?;
        let mut groups = GROUPS.lock();
        if groups.iter().any(|known| known.identity.group_id == identity.group_id) {
            return Err(EEXIST);
        }
        groups.push(group.clone(), GFP_KERNEL)?;
        Ok(group)
    }

    /// Becomes the agent of a group.
    pub(crate) fn open(group_id: &[u8; 16]) -> Result<Arc<Self>> {
        let groups = GROUPS.lock();
        let group = groups.iter().find(|known| known.identity.group_id == *group_id).ok_or(ENOENT)?;
        if group.has_agent.swap(true, Ordering::AcqRel) {
            return Err(EBUSY);
        }
        Ok(group.clone())
    }

    /// The agent is gone; capture goes on.
    pub(crate) fn close(&self) {
        // No eventfd cannot fail.
        let _ = self.ring.host().take_eventfd(-1);
        self.has_agent.store(false, Ordering::Release);
    }

    /// Forgets the group.
    pub(crate) fn destroy(&self) -> Result {
        let mut groups = GROUPS.lock();
        for volume in self.volumes.lock().iter_mut() {
            volume.let_go()?;
        }
        let at = groups.iter().position(|known| core::ptr::eq(&**known, self)).ok_or(ENOENT)?;
        let _gone = groups.remove(at);
        Ok(())
    }

    /// It was forgotten, and its pages may be mapped.
    pub(crate) fn linger(&self) {
        if !self.allowance.is_lingering.swap(true, Ordering::Relaxed) {
            MEMORY_LINGERING.fetch_add(self.allowance.bytes, Ordering::Relaxed);
            MEMORY_USED.fetch_sub(self.allowance.bytes, Ordering::Relaxed);
        }
    }

    /// All groups.
    pub(crate) fn list() -> Result<KVec<ioctl::GroupEntry>> {
        let groups = GROUPS.lock();
        let mut list = KVec::with_capacity(groups.len(), GFP_KERNEL)?;
        for group in groups.iter() {
            let attached = group.volumes.lock().iter().filter(|volume| volume.captured().is_some()).count();
            let entry = ioctl::GroupEntry {
                group_id: group.identity.group_id,
                epoch: group.identity.epoch,
                epoch_id: group.identity.epoch_id,
                total_bytes: group.layout.total_bytes,
                has_agent: u32::from(group.has_agent.load(Ordering::Relaxed)),
                attached: attached as u32,
            };
            list.push(entry, GFP_KERNEL)?;
        }
        Ok(list)
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.layout.total_bytes
    }

    /// The pages that an agent maps.
    pub(crate) fn pages(&self) -> *mut c_void {
        self.ring.host().memory().pages().start().cast()
    }

    #[inline]
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    #[inline]
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) != 0
    }

    #[cold]
    pub(crate) fn wake_waiters(&self) {
        // SAFETY: initialised in `create`.
        unsafe { sys::kf_wake(self.idle.get()) }
    }

    /// Waits for a count of this group's volumes.
    pub(crate) fn wait_zero(&self, count: &AtomicU64, timeout_ms: u32) -> Result {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the queue was initialised in `create`; the count is read as the kernel reads words that
        // others write.
        let left = unsafe { sys::kf_wait_zero(self.idle.get(), count.as_ptr(), timeout_ms) };
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        match left {
            0 => Err(ETIMEDOUT),
            1.. => Ok(()),
            _ => Err(EINTR),
        }
    }

    /// Captures a device as a volume.
    pub(crate) fn attach(self: &Arc<Self>, attach: &mut ioctl::Attach) -> Result {
        let _step = self.step.lock();
        // Before the lock of all groups is taken: opening a device can take as long as its driver likes.
        let opened = Attached::open(self.clone(), attach.volume, attach.device)?;
        // Held to the end, so that no other group takes the same device meanwhile.
        let groups = GROUPS.lock();
        let takes = |group: &Group| group.volumes.lock().iter().any(|volume| volume.is_device(attach.device));
        if groups.iter().any(|group| takes(group)) {
            return Err(EBUSY);
        }
        if !groups.iter().any(|group| core::ptr::eq(&**group, &**self)) {
            return Err(ENOENT);
        }
        let mut volumes = self.volumes.lock();
        let volume = volumes.iter_mut().find(|volume| volume.id == attach.volume).ok_or(ENOENT)?;
        let known = self.ring.size_bytes(volume.id).ok_or(ENOENT)?;
        volume.let_go()?;
        let attached = Arc::new(opened, GFP_KERNEL)?;
        if attached.size_bytes() < known {
            return Err(EINVAL);
        }
        attached.hook(attach.flags & ioctl::ATTACH_CLEAN != 0)?;
        attach.flags = if attached.is_bio_based() { ioctl::ATTACHED_BIO_BASED } else { 0 };
        volume.attached = Some(attached);
        Ok(())
    }

    /// Captures a volume no longer.
    pub(crate) fn detach(&self, detach: &mut ioctl::Detach) -> Result {
        let _step = self.step.lock();
        let attached = self.attached(detach.volume)?;
        attached.unhook();
        attached.mark_unseen();
        detach.last_lsn = self.ring.captured_lsn();
        attached.quiesce(detach.timeout_ms)?;
        for volume in self.volumes.lock().iter_mut().filter(|volume| volume.id == detach.volume) {
            volume.attached = None;
        }
        Ok(())
    }

    fn attached(&self, id: u32) -> Result<Arc<Attached>> {
        let volumes = self.volumes.lock();
        let volume = volumes.iter().find(|volume| volume.id == id).ok_or(ENOENT)?;
        volume.attached.clone().ok_or(ENODEV)
    }

    /// Before bits are looked at or moved: those that an interrupt could not set.
    fn mark_unseen(&self) -> Result {
        for attached in self.all_attached()?.iter() {
            attached.mark_unseen();
        }
        Ok(())
    }

    /// Those that are captured; one whose detach is not over is not.
    fn all_attached(&self) -> Result<KVec<Arc<Attached>>> {
        let volumes = self.volumes.lock();
        let mut all = KVec::with_capacity(volumes.len(), GFP_KERNEL)?;
        for attached in volumes.iter().filter_map(Volume::captured) {
            all.push(attached.clone(), GFP_KERNEL)?;
        }
        Ok(all)
    }

    /// Begins a resync or a fence, piece by piece: `step` keeps others from doing so meanwhile. The
    /// generation flips after the ring has changed: see `Attached::enter`.
    pub(crate) fn begin(&self, begin: &mut ioctl::Begin) -> Result {
        let _step = self.step.lock();
        let generation = self.generation();
        // What the barrier of the last begin has not waited for would be counted with the newest writes.
        self.demand_quiet(generation.wrapping_add(1))?;
        self.mark_unseen()?;
        begin.lsn = if begin.flags & ioctl::BEGIN_FENCE != 0 {
            self.ring.fence()
        } else {
            self.ring.begin_resync(sys::kf_realtime_ns())
        }
        .map_err(refused)?;
        for attached in self.all_attached()?.iter() {
            attached.keep_track(generation.wrapping_add(1));
        }
        self.generation.store(generation.wrapping_add(1), Ordering::SeqCst);
        Ok(())
    }

    /// `EAGAIN` when writes of a generation stay in flight. Writers touch the old count for a moment while it
    /// changes.
    fn demand_quiet(&self, generation: u32) -> Result {
        for attached in self.all_attached()?.iter() {
            attached
                .wait_for(generation, QUIET_MS)
                .map_err(|error| if error == ETIMEDOUT { EAGAIN } else { error })?;
        }
        Ok(())
    }

    /// Waits until everything that was submitted before the last begin, or before an attach, is over.
    pub(crate) fn barrier(&self, barrier: &ioctl::Barrier) -> Result {
        let _step = self.step.lock();
        let before = self.generation().wrapping_add(1);
        let drained = barrier.flags & ioctl::BARRIER_DRAINED != 0;
        let mut to_be_drained = Ok(());
        for attached in self.all_attached()?.iter() {
            attached.wait_for(before, barrier.timeout_ms)?;
            if !attached.is_exact(before) {
                match attached.drain(before, drained, barrier.timeout_ms) {
                    // The agent drains all of these at once.
                    Err(error) if error == EUCLEAN => to_be_drained = Err(error),
                    other => other?,
                }
            }
        }
        to_be_drained
    }

    pub(crate) fn end(&self, end: &mut ioctl::End) -> Result {
        let _step = self.step.lock();
        // Exact only when the barrier was passed.
        let before = self.generation().wrapping_add(1);
        self.demand_quiet(before)?;
        if !self.all_attached()?.iter().all(|attached| attached.is_exact(before)) {
            return Err(EAGAIN);
        }
        self.mark_unseen()?;
        end.lsn = self.ring.end_resync(sys::kf_realtime_ns()).map_err(refused)?;
        Ok(())
    }

    /// Gives back the room of the records up to an lsn, as far as they are published.
    pub(crate) fn release(&self, release: &mut ioctl::Release) -> Result {
        // Walked here and now: what the agent says is never trusted as a position.
        let mut consumer = Consumer::new(&self.ring).map_err(|_| EBUSY)?;
        release.lsn = consumer.release_published(release.lsn).map_err(|_| EUCLEAN)?;
        Ok(())
    }

    /// Arms the bell; `EAGAIN` when the record at the position is published.
    pub(crate) fn arm(&self, position: u64) -> Result {
        let (host, memory) = (self.ring.host(), self.ring.host().memory());
        let head = |order| memory.load64(crate::abi::control_at::HEAD, order);
        if position % crate::abi::LINE != 0 || position > head(Ordering::Acquire) {
            return Err(EINVAL);
        }
        let ready = || {
            if head(Ordering::Acquire) == position {
                return false;
            }
            let word = memory.load32(self.layout.offset_of(position), Ordering::Acquire);
            word & state::MASK != state::RESERVED
        };
        if host.arm(ready) { Err(EAGAIN) } else { Ok(()) }
    }

    /// Puts an agent's record into the order.
    pub(crate) fn event(&self, event: &mut ioctl::Event, payload: &[u8]) -> Result {
        let op = u8::try_from(event.op).ok().and_then(Op::from_byte).ok_or(EINVAL)?;
        if !matches!(op, Op::Bookmark | Op::Volume | Op::Flush | Op::ClockJump) {
            return Err(EINVAL);
        }
        let entry = core::iter::once(Entry::event(op, event.volume, payload.len() as u32));
        match self.ring.capture(entry, payload, sys::kf_realtime_ns()).map_err(refused)? {
            Captured::Ring(token) => event.lsn = token.last_lsn(),
            Captured::Bits => return Err(ESTALE),
        }
        Ok(())
    }

    /// Puts empty sync slots into the order.
    pub(crate) fn slots(&self, slots: &mut ioctl::Slots, list: &[ioctl::Slot]) -> Result {
        let size_bytes = self.ring.size_bytes(slots.volume).ok_or(ENOENT)?;
        let inside = |slot: &ioctl::Slot| {
            slot.length != 0 && slot.offset.checked_add(slot.length).is_some_and(|end| end <= size_bytes)
        };
        if !list.iter().all(inside) {
            return Err(EINVAL);
        }
        let volume = slots.volume;
        let entries = list.iter().map(move |slot| Entry {
            offset: slot.offset,
            length: slot.length,
            ..Entry::event(Op::SyncSlot, volume, 0)
        });
        match self.ring.reserve_many(entries, sys::kf_realtime_ns()).map_err(refused)? {
            Captured::Ring(reservation) => slots.first_lsn = reservation.publish().first_lsn(),
            Captured::Bits => return Err(ESTALE),
        }
        Ok(())
    }

    pub(crate) fn clear(&self, range: &ioctl::Range) -> Result {
        self.ring.size_bytes(range.volume).ok_or(ENOENT)?;
        if range.start > range.end {
            return Err(EINVAL);
        }
        self.ring.clear_dirty(range.volume, range.start..range.end);
        Ok(())
    }

    pub(crate) fn mark(&self, range: &ioctl::Range) -> Result {
        self.ring.size_bytes(range.volume).ok_or(ENOENT)?;
        if range.start > range.end {
            return Err(EINVAL);
        }
        self.ring.mark_dirty(range.volume, range.start..range.end);
        Ok(())
    }

    pub(crate) fn bitmap(&self, bitmap: &ioctl::Bitmap) {
        self.ring.set_mode_bitmap(bitmap.cause, sys::kf_realtime_ns());
    }

    /// Positions and counters.
    pub(crate) fn status(&self) -> Result<ioctl::Status> {
        self.mark_unseen()?;
        let loss = self.ring.loss();
        let counters = &self.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let in_flight = self.all_attached()?.iter().map(|attached| attached.in_flight()).sum();
        Ok(ioctl::Status {
            captured_lsn: self.ring.captured_lsn(),
            first_held_lsn: self.ring.first_held_lsn(),
            lost_since_ns: loss.map_or(0, |loss| loss.since_ns),
            cause: loss.map_or(0, |loss| loss.cause),
            bitmap_mode: u32::from(self.ring.mode() == Mode::Bitmap),
            used_bytes: self.ring.used_bytes(),
            ring_writes: count(&counters.ring_writes),
            bitmap_writes: count(&counters.bitmap_writes),
            copied_bytes: count(&counters.copied_bytes),
            failed: count(&counters.failed),
            void: count(&counters.void),
            late: count(&counters.late),
            untracked: count(&counters.untracked),
            unreadable: count(&counters.unreadable),
            in_flight,
            hook_ns_total: count(&counters.hook_ns_total),
            hook_ns_max: count(&counters.hook_ns_max),
            freeze_ns_max: count(&counters.freeze_ns_max),
            unseen: count(&counters.unseen),
            zero: [0; 3],
        })
    }

    /// One volume.
    pub(crate) fn volume(&self, id: u32) -> Result<ioctl::VolumeStatus> {
        let size_bytes = self.ring.size_bytes(id).ok_or(ENOENT)?;
        let mut status = ioctl::VolumeStatus { volume: id, size_bytes, ..ioctl::VolumeStatus::default() };
        if let Some(attached) = self.attached(id).ok().filter(|attached| attached.is_hooked()) {
            attached.describe(&mut status);
        }
        Ok(status)
    }
}

impl Volume {
    /// Drops what a detach had to leave with its writes in flight, once they are over; else, or while it is
    /// captured, `EBUSY`.
    fn let_go(&mut self) -> Result {
        if let Some(left) = &self.attached {
            if left.is_hooked() || left.quiesce(QUIET_MS).is_err() {
                return Err(EBUSY);
            }
            self.attached = None;
        }
        Ok(())
    }

    fn captured(&self) -> Option<&Arc<Attached>> {
        self.attached.as_ref().filter(|attached| attached.is_hooked())
    }

    fn is_device(&self, number: u32) -> bool {
        self.captured().is_some_and(|attached| attached.number() == number)
    }
}

/// The ring's refusals as errors of a system call.
fn refused(refused: Refused) -> Error {
    match refused {
        Refused::Malformed => EINVAL,
        Refused::UnknownVolume => ENOENT,
        Refused::BeyondEnd => EINVAL,
        Refused::Full => ENOSPC,
        Refused::BitmapMode => ESTALE,
        Refused::Dirty => ENOTEMPTY,
        Refused::Moving => EAGAIN,
        Refused::ConsumerTaken => EBUSY,
    }
}

/// A ring of this module is of this boot; the agent finds no other.
fn boot_id() -> [u8; 16] {
    [0; 16]
}
