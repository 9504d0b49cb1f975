// SPDX-License-Identifier: GPL-2.0
//! `/dev/kfilter`: ioctls and mmap. Every argument is checked here or in `group`; see `ioctl` for what the
//! calls mean.

use crate::abi::{MAX_VOLUMES, VolumeSpec};
use crate::group::{self, Group};
use crate::{ioctl, sys};
use kernel::bindings;
use kernel::error::to_result;
use kernel::fs::File;
use kernel::miscdevice::{MiscDevice, MiscDeviceRegistration};
use kernel::mm::virt::VmaNew;
use kernel::prelude::*;
use kernel::sync::{Arc, Mutex, new_mutex};
use kernel::transmute::{AsBytes, FromBytes};
use kernel::uaccess::{UserPtr, UserSlice};

const MAX_EVENT_BYTES: u32 = 4096;
const MAX_SLOTS: u32 = 64;
const MIN_RING_BYTES: u64 = 4096;
const CONTEXTS: core::ops::RangeInclusive<u32> = 64..=65536;

macro_rules! plain {
    ($($name:ident),*) => {$(
        // SAFETY: `repr(C)`, whole numbers without padding.
        unsafe impl FromBytes for ioctl::$name {}
        // SAFETY: as above.
        unsafe impl AsBytes for ioctl::$name {}
    )*};
}
plain!(
    Version,
    List,
    GroupEntry,
    NewVolume,
    Create,
    Open,
    Attach,
    Detach,
    Status,
    VolumeStatus,
    EventFd,
    Arm,
    Release,
    Event,
    Slot,
    Slots,
    Begin,
    Barrier,
    Range,
    End,
    Bitmap
);

/// An open file; the agent of a group once it has made or opened one.
#[pin_data(PinnedDrop)]
pub(crate) struct Agent {
    #[pin]
    bound: Mutex<Bound>,
}

/// The groups of a file.
struct Bound {
    /// The one whose agent it is.
    group: Option<Arc<Group>>,
    /// Its pages were mapped through this file, and may be still.
    is_mapped: bool,
    /// Those that it has forgotten while it had them mapped. An area holds its file, so their pages are
    /// counted as long as there is one.
    forgotten: KVec<Arc<Group>>,
}

#[pinned_drop]
impl PinnedDrop for Agent {
    fn drop(self: Pin<&mut Self>) {
        if let Some(group) = self.bound.lock().group.take() {
            group.close();
        }
    }
}

#[vtable]
impl MiscDevice for Agent {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        // SAFETY: a plain question about the current task.
        if !unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as i32) } {
            return Err(EPERM);
        }
        let bound = Bound { group: None, is_mapped: false, forgotten: KVec::new() };
        KBox::pin_init(pin_init!(Agent { bound <- new_mutex!(bound) }), GFP_KERNEL)
    }

    fn mmap(agent: Pin<&Agent>, _file: &File, vma: &VmaNew) -> Result {
        let group = agent.group_to_map()?;
        let length = (vma.end().wrapping_sub(vma.start())) as u64;
        // SAFETY: the area is being set up, by us.
        let first_page = unsafe { (*vma.as_ptr()).vm_pgoff };
        if length != group.total_bytes() || first_page != 0 {
            return Err(EINVAL);
        }
        // Head, tail and records are the kernel's: an agent that could write them could make it forget
        // writes.
        vma.try_clear_maywrite()?;
        vma.try_clear_mayexec()?;
        vma.set_dontcopy();
        // SAFETY: pages of a group that this file holds, as the area holds the file.
        to_result(unsafe { sys::kf_map_shared(vma.as_ptr(), group.pages()) })
    }

    fn ioctl(agent: Pin<&Agent>, _file: &File, command: u32, argument: usize) -> Result<isize> {
        agent.dispatch(command, UserPtr::from_addr(argument))?;
        Ok(0)
    }
}

/// Reads an argument.
fn read<T: FromBytes>(from: UserPtr) -> Result<T> {
    UserSlice::new(from, core::mem::size_of::<T>()).reader().read()
}

/// Writes an answer.
fn write<T: AsBytes>(to: UserPtr, answer: &T) -> Result {
    UserSlice::new(to, core::mem::size_of::<T>()).writer().write(answer)
}

/// Reads an array.
fn read_many<T: FromBytes>(from: u64, count: u32) -> Result<KVec<T>> {
    let bytes = core::mem::size_of::<T>().checked_mul(count as usize).ok_or(EINVAL)?;
    let mut reader = UserSlice::new(UserPtr::from_addr(from as usize), bytes).reader();
    let mut all = KVec::with_capacity(count as usize, GFP_KERNEL)?;
    for _ in 0..count {
        all.push(reader.read()?, GFP_KERNEL)?;
    }
    Ok(all)
}

fn demand(holds: bool) -> Result {
    if holds { Ok(()) } else { Err(EINVAL) }
}

impl Agent {
    fn group(&self) -> Result<Arc<Group>> {
        self.bound.lock().group.clone().ok_or(EBADFD)
    }

    /// In one step with the mark, so that a group which is forgotten meanwhile is kept.
    fn group_to_map(&self) -> Result<Arc<Group>> {
        let mut bound = self.bound.lock();
        let group = bound.group.clone().ok_or(EBADFD)?;
        bound.is_mapped = true;
        Ok(group)
    }

    /// Becomes the agent of what `make` finds.
    fn bind(&self, make: impl FnOnce() -> Result<Arc<Group>>) -> Result<Arc<Group>> {
        let mut bound = self.bound.lock();
        if bound.group.is_some() {
            return Err(EBUSY);
        }
        let group = make()?;
        bound.group = Some(group.clone());
        bound.is_mapped = false;
        Ok(group)
    }

    /// Runs `call` on the argument and writes it back.
    fn change<T: FromBytes + AsBytes>(to: UserPtr, call: impl FnOnce(&mut T) -> Result) -> Result {
        let mut argument: T = read(to)?;
        let done = call(&mut argument);
        write(to, &argument)?;
        done
    }

    fn dispatch(&self, command: u32, at: UserPtr) -> Result {
        match command {
            ioctl::VERSION => Self::change(at, version),
            ioctl::LIST => Self::change(at, list),
            ioctl::CREATE => self.create(&read(at)?),
            ioctl::OPEN => Self::change(at, |open: &mut ioctl::Open| {
                open.total_bytes = self.bind(|| Group::open(&open.group_id))?.total_bytes();
                Ok(())
            }),
            ioctl::DESTROY => self.destroy(),
            ioctl::ATTACH => Self::change(at, |attach: &mut ioctl::Attach| {
                demand(attach.zero == 0 && attach.flags & !ioctl::ATTACH_CLEAN == 0)?;
                self.group()?.attach(attach)
            }),
            ioctl::DETACH => Self::change(at, |detach| self.group()?.detach(detach)),
            ioctl::STATUS => {
                let status = self.group()?.status()?;
                write(at, &status)
            }
            ioctl::VOLUME => Self::change(at, |volume: &mut ioctl::VolumeStatus| {
                *volume = self.group()?.volume(volume.volume)?;
                Ok(())
            }),
            ioctl::EVENTFD => {
                let event: ioctl::EventFd = read(at)?;
                demand(event.zero == 0)?;
                self.group()?.ring.host().take_eventfd(event.fd)
            }
            ioctl::ARM => self.group()?.arm(read::<ioctl::Arm>(at)?.position),
            ioctl::RELEASE => Self::change(at, |release| self.group()?.release(release)),
            ioctl::EVENT => Self::change(at, |event: &mut ioctl::Event| {
                demand(event.zero == 0 && event.payload_len <= MAX_EVENT_BYTES)?;
                let payload = read_many::<u8>(event.payload, event.payload_len)?;
                self.group()?.event(event, &payload)
            }),
            ioctl::SLOTS => Self::change(at, |slots: &mut ioctl::Slots| {
                demand((1..=MAX_SLOTS).contains(&slots.count))?;
                let all = read_many(slots.slots, slots.count)?;
                self.group()?.slots(slots, &all)
            }),
            ioctl::BEGIN => Self::change(at, |begin: &mut ioctl::Begin| {
                demand(begin.zero == 0 && begin.flags & !ioctl::BEGIN_FENCE == 0)?;
                self.group()?.begin(begin)
            }),
            ioctl::BARRIER => {
                let barrier: ioctl::Barrier = read(at)?;
                demand(barrier.flags & !ioctl::BARRIER_DRAINED == 0)?;
                self.group()?.barrier(&barrier)
            }
            ioctl::CLEAR => self.group()?.clear(&read(at)?),
            ioctl::MARK => self.group()?.mark(&read(at)?),
            ioctl::END => Self::change(at, |end| self.group()?.end(end)),
            ioctl::BITMAP => {
                let bitmap: ioctl::Bitmap = read(at)?;
                demand(bitmap.zero == 0)?;
                self.group()?.bitmap(&bitmap);
                Ok(())
            }
            _ => Err(ENOTTY),
        }
    }

    fn create(&self, create: &ioctl::Create) -> Result {
        demand((1..=MAX_VOLUMES as u32).contains(&create.volume_count))?;
        demand(create.contexts == 0 || CONTEXTS.contains(&create.contexts))?;
        demand(create.ring_bytes >= MIN_RING_BYTES && create.first_lsn != 0)?;
        let volumes = read_many::<ioctl::NewVolume>(create.volumes, create.volume_count)?;
        let mut specs = KVec::with_capacity(volumes.len(), GFP_KERNEL)?;
        for volume in volumes.iter() {
            let spec = VolumeSpec {
                id: volume.id,
                sector_bytes: volume.sector_bytes,
                uuid: volume.uuid,
                size_bytes: volume.size_bytes,
            };
            specs.push(spec, GFP_KERNEL)?;
        }
        self.bind(|| Group::create(create, &specs)).map(|_| ())
    }

    fn destroy(&self) -> Result {
        let mut bound = self.bound.lock();
        let group = bound.group.clone().ok_or(EBADFD)?;
        bound.forgotten.reserve(1, GFP_KERNEL)?;
        group.destroy()?;
        group.close();
        bound.group = None;
        if bound.is_mapped {
            group.linger();
            bound.forgotten.push(group, GFP_KERNEL)?;
        }
        Ok(())
    }
}

fn version(version: &mut ioctl::Version) -> Result {
    let known = version.abi == ioctl::ABI;
    version.abi = ioctl::ABI;
    version.ring = crate::abi::VERSION;
    (version.memory_limit_bytes, version.memory_used_bytes) = group::memory();
    if known { Ok(()) } else { Err(E2BIG) }
}

fn list(list: &mut ioctl::List) -> Result {
    demand(list.zero == 0)?;
    let room = list.count as usize;
    let bytes = room.checked_mul(core::mem::size_of::<ioctl::GroupEntry>()).ok_or(EINVAL)?;
    let mut writer = UserSlice::new(UserPtr::from_addr(list.to as usize), bytes).writer();
    // Copied out when no lock is held any more: a page fault takes the lock that `mmap` comes with.
    let groups = Group::list()?;
    for entry in groups.iter().take(room) {
        writer.write(entry)?;
    }
    list.count = groups.len() as u32;
    Ok(())
}
