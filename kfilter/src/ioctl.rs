// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! The ioctls of `/dev/kfilter`: how an agent sets capture up, takes records, and repairs what was not
//! recorded.
//!
//! A *group* (one ring, up to 64 volumes) belongs to the kernel. An open file becomes its agent with `CREATE`
//! or `OPEN`, and stops being it when it is closed, however that happens; capture goes on, and the next agent
//! takes over with `OPEN`. One agent a group. The mapping of the file (`mmap`, offset 0, whole length,
//! read-only) is the ring of `abi`; head, tail, mode and bitmaps are read there, and changed by these calls
//! only. All need `CAP_SYS_ADMIN`.
//!
//! | call | argument | does |
//! |---|---|---|
//! | `VERSION` | [`Version`] | what this module speaks |
//! | `LIST` | [`List`] | the groups of this machine |
//! | `CREATE` | [`Create`] | a group with an empty ring and no device; this file is its agent |
//! | `OPEN` | [`Open`] | become the agent of a group; `EBUSY` while another is, `ENOENT` |
//! | `DESTROY` | – | forget the group; `EBUSY` while a device is attached |
//! | `ATTACH` | [`Attach`] | capture a device as one of the group's volumes |
//! | `DETACH` | [`Detach`] | stop capturing a volume |
//! | `STATUS` | [`Status`] | positions and counters |
//! | `VOLUME` | [`VolumeStatus`] | one volume |
//! | `EVENTFD` | [`EventFd`] | the bell |
//! | `ARM` | [`Arm`] | ring the bell at the next publish; `EAGAIN` when there is something to read already |
//! | `RELEASE` | [`Release`] | give room back |
//! | `EVENT` | [`Event`] | put a bookmark, volume or clock-jump record into the order |
//! | `SLOTS` | [`Slots`] | put empty sync slots into the order |
//! | `BEGIN` | [`Begin`] | begin a resync, or a fence |
//! | `BARRIER` | [`Barrier`] | wait until every write submitted before the last begin is on the disk |
//! | `CLEAR` | [`Range`] | clear pending dirty bits |
//! | `MARK` | [`Range`] | set dirty bits |
//! | `END` | [`End`] | end a resync |
//! | `BITMAP` | [`Bitmap`] | from now on writes only set bits |
//!
//! Structures are fixed; fields called `zero` must be zero. A new meaning gets a new number.

/// Version of these calls.
pub const ABI: u32 = 1;
/// Path of the character device.
pub const DEVICE: &str = "/dev/kfilter";
/// Type byte of the ioctl numbers.
pub const TYPE: u32 = 0xAF;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const BOTH: u32 = 3;

/// Linux's encoding of an ioctl number on x86-64 and arm64: direction, size, type, number.
#[allow(
    clippy::cast_possible_truncation,
    reason = "arguments are smaller than 16 KiB, as ioctl numbers demand"
)]
const fn number<T>(direction: u32, nr: u32) -> u32 {
    direction << 30 | (core::mem::size_of::<T>() as u32) << 16 | TYPE << 8 | nr
}

/// See the table above.
pub const VERSION: u32 = number::<Version>(BOTH, 0);
/// See the table above.
pub const LIST: u32 = number::<List>(BOTH, 1);
/// See the table above.
pub const CREATE: u32 = number::<Create>(WRITE, 2);
/// See the table above.
pub const OPEN: u32 = number::<Open>(BOTH, 3);
/// See the table above.
pub const DESTROY: u32 = number::<()>(NONE, 4);
/// See the table above.
pub const ATTACH: u32 = number::<Attach>(BOTH, 5);
/// See the table above.
pub const DETACH: u32 = number::<Detach>(BOTH, 6);
/// See the table above.
pub const STATUS: u32 = number::<Status>(BOTH, 7);
/// See the table above.
pub const VOLUME: u32 = number::<VolumeStatus>(BOTH, 8);
/// See the table above.
pub const EVENTFD: u32 = number::<EventFd>(WRITE, 9);
/// See the table above.
pub const ARM: u32 = number::<Arm>(WRITE, 10);
/// See the table above.
pub const RELEASE: u32 = number::<Release>(BOTH, 11);
/// See the table above.
pub const EVENT: u32 = number::<Event>(BOTH, 12);
/// See the table above.
pub const SLOTS: u32 = number::<Slots>(BOTH, 13);
/// See the table above.
pub const BEGIN: u32 = number::<Begin>(BOTH, 14);
/// See the table above.
pub const BARRIER: u32 = number::<Barrier>(BOTH, 15);
/// See the table above.
pub const CLEAR: u32 = number::<Range>(WRITE, 16);
/// See the table above.
pub const MARK: u32 = number::<Range>(WRITE, 17);
/// See the table above.
pub const END: u32 = number::<End>(BOTH, 18);
/// See the table above.
pub const BITMAP: u32 = number::<Bitmap>(WRITE, 19);

/// What the module speaks. `E2BIG`: the caller's `abi` is not this module's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Version {
    /// In: the caller's [`ABI`]. Out: the module's.
    pub abi: u32,
    /// Out: version of the ring's bytes (`abi::VERSION`).
    pub ring: u32,
    /// Out: bytes that rings, bitmaps and contexts of all groups may take, and take now.
    pub memory_limit_bytes: u64,
    /// See above.
    pub memory_used_bytes: u64,
}

/// The groups of this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct List {
    /// In: where up to `count` [`GroupEntry`] are written.
    pub to: u64,
    /// In: room. Out: how many groups there are, also when there was less room.
    pub count: u32,
    /// Zero.
    pub zero: u32,
}

/// One group in a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct GroupEntry {
    /// The group.
    pub group_id: [u8; 16],
    /// Its epoch.
    pub epoch: u64,
    /// Its epoch's random id.
    pub epoch_id: [u8; 16],
    /// Length of the mapping.
    pub total_bytes: u64,
    /// 1 while a file is its agent.
    pub has_agent: u32,
    /// Volumes with a device attached.
    pub attached: u32,
}

/// A volume of a new group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NewVolume {
    /// Id within the group.
    pub id: u32,
    /// Logical sector.
    pub sector_bytes: u32,
    /// Identity.
    pub uuid: [u8; 16],
    /// Size, which fixes its bitmap's.
    pub size_bytes: u64,
}

/// A new group. `EEXIST`; `ENOSPC` when the memory limit forbids it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Create {
    /// The group.
    pub group_id: [u8; 16],
    /// Its epoch.
    pub epoch: u64,
    /// Its epoch's random id.
    pub epoch_id: [u8; 16],
    /// Lsn of the first record, not 0.
    pub first_lsn: u64,
    /// No record gets an earlier time.
    pub last_time_ns: u64,
    /// Length of the ring, a power of two, at least 4 KiB.
    pub ring_bytes: u64,
    /// Array of [`NewVolume`].
    pub volumes: u64,
    /// 1 to 64.
    pub volume_count: u32,
    /// Writes in flight that can be followed at once, 64 to 65536; 0 for 16384.
    pub contexts: u32,
}

/// An existing group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Open {
    /// The group.
    pub group_id: [u8; 16],
    /// Out: length of the mapping.
    pub total_bytes: u64,
}

/// `attach` flag: the replica is known to equal the device: no bit is set. Without it all bits of the volume
/// are set, and a resync is due; the mode stays what it is.
pub const ATTACH_CLEAN: u32 = 1;
/// `attach` answer: bios go straight to the device's driver (device mapper): `BARRIER` will ask for a suspend
/// and resume.
pub const ATTACHED_BIO_BASED: u32 = 1;

/// A device becomes a volume. From its return on every write is captured; writes submitted before it may
/// still be on their way: `BARRIER`. `ENXIO` no such device; `EBUSY` attached already; `EMEDIUMTYPE` a kind
/// that cannot be captured exactly (zoned, DAX, hidden, a driver without requests other than device mapper):
/// what holds the device (md, bcache, multipath) is the agent's to look at; `EINVAL` smaller than the volume.
/// What a device has grown by is dirty, and its new size in the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Attach {
    /// The volume's id.
    pub volume: u32,
    /// `ATTACH_*`. Out: `ATTACHED_*`.
    pub flags: u32,
    /// Device number, as `stat` gives it: major and minor in the kernel's 32-bit `new_encode_dev` form.
    pub device: u32,
    /// Zero.
    pub zero: u32,
}

/// A volume is captured no longer. Waits until writes in flight have come back; `ETIMEDOUT`: they have not,
/// capture has ended all the same, and the call can be repeated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Detach {
    /// The volume's id.
    pub volume: u32,
    /// How long to wait.
    pub timeout_ms: u32,
    /// Out: the newest lsn when capture ended.
    pub last_lsn: u64,
}

/// Positions and counters; all out. Counters count since the group was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Status {
    /// The newest lsn given out.
    pub captured_lsn: u64,
    /// The lsn of the oldest record whose room is not released.
    pub first_held_lsn: u64,
    /// When writes stopped being recorded, realtime ns; 0 while nothing is lost.
    pub lost_since_ns: u64,
    /// `dirty::CAUSE_*`.
    pub cause: u32,
    /// 1 while writes only set bits.
    pub bitmap_mode: u32,
    /// Bytes reserved and not released.
    pub used_bytes: u64,
    /// Bios captured in the ring.
    pub ring_writes: u64,
    /// Bios that only set bits.
    pub bitmap_writes: u64,
    /// Payload bytes copied.
    pub copied_bytes: u64,
    /// Captured writes that failed on the device.
    pub failed: u64,
    /// NOWAIT writes that were refused before they reached the device; their records are void.
    pub void: u64,
    /// Writes caught on their way after an attach.
    pub late: u64,
    /// Bios that could not be followed, because all contexts were in use; only bits were set.
    pub untracked: u64,
    /// Bios whose pages could not be read (inline encryption, device memory), or that took more than half of
    /// the ring; only bits were set.
    pub unreadable: u64,
    /// Followed writes that have not come back.
    pub in_flight: u64,
    /// Mean and longest time in the hook, ns, while the module's parameter `measure` is on.
    pub hook_ns_total: u64,
    /// See above.
    pub hook_ns_max: u64,
    /// How long the longest drain of a queue stopped its applications, ns.
    pub freeze_ns_max: u64,
    /// Commands with data for the device that the block layer only passed on (SG_IO and the like). After
    /// each, all bits of the volume are set when this is read.
    pub unseen: u64,
    /// Zero.
    pub zero: [u64; 3],
}

/// One volume; the id is in, the rest out. `ENOENT`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VolumeStatus {
    /// The volume's id.
    pub volume: u32,
    /// Device number; 0 while nothing is attached.
    pub device: u32,
    /// Known size.
    pub size_bytes: u64,
    /// 1 when the device is gone from the machine.
    pub gone: u32,
    /// 1 while writes submitted before an attach or begin may be under way (`BARRIER` not passed).
    pub unsettled: u32,
}

/// An eventfd that is signalled once after each `ARM`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EventFd {
    /// The descriptor; −1 for none.
    pub fd: i32,
    /// Zero.
    pub zero: u32,
}

/// Where the agent has read up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Arm {
    /// Position in the ring; nothing published there: the bell is armed.
    pub position: u64,
}

/// Room of records that the agent has journaled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Release {
    /// In: released up to this lsn, as far as published. Out: the lsn of the first record that is not
    /// released.
    pub lsn: u64,
}

/// A record that the agent puts into the order. `ENOSPC` no room; `ESTALE` bitmap mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// `abi::Op`: bookmark, volume, flush or clock jump.
    pub op: u32,
    /// The volume's id, or 0.
    pub volume: u32,
    /// Where the payload is.
    pub payload: u64,
    /// Its length, at most 4 KiB.
    pub payload_len: u32,
    /// Zero.
    pub zero: u32,
    /// Out.
    pub lsn: u64,
}

/// One sync slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Slot {
    /// Byte offset in the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Empty sync slots next to each other: what they stand for was read before this call. `ENOSPC` no room;
/// `ESTALE` bitmap mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Slots {
    /// Array of [`Slot`].
    pub slots: u64,
    /// 1 to 64.
    pub count: u32,
    /// The volume's id.
    pub volume: u32,
    /// Out: lsn of the first; the others follow.
    pub first_lsn: u64,
}

/// `begin` flag: no record and no change of mode (which must be ring): current bits become pending, and the
/// barrier covers everything submitted before. For single ranges that failed.
pub const BEGIN_FENCE: u32 = 1;

/// What is current becomes pending; writes go into the ring (again). `ENOSPC` no room for the record;
/// `ESTALE` a fence in bitmap mode; `EAGAIN` the barrier of the last begin was not passed: call `BARRIER`
/// first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Begin {
    /// `BEGIN_*`.
    pub flags: u32,
    /// Zero.
    pub zero: u32,
    /// Out: lsn of `resync-begin`; for a fence the newest lsn given out before it.
    pub lsn: u64,
}

/// `barrier` flag: the agent has suspended (without `noflush`) and resumed the group's device-mapper devices
/// since the call that answered `EUCLEAN`.
pub const BARRIER_DRAINED: u32 = 1;

/// `ETIMEDOUT`: some write is still on its way; the call can be repeated. `EUCLEAN`: a device without
/// requests (device mapper) must be suspended and resumed now, then the call repeated with `BARRIER_DRAINED`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Barrier {
    /// How long to wait.
    pub timeout_ms: u32,
    /// `BARRIER_*`.
    pub flags: u32,
}

/// A range of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Range {
    /// The volume's id.
    pub volume: u32,
    /// Zero.
    pub zero: u32,
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
}

/// `ENOTEMPTY` a bit is set; `EAGAIN` the barrier was not passed; `ESTALE` bitmap mode; `ENOSPC` no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct End {
    /// Out: lsn of `resync-end`.
    pub lsn: u64,
}

/// Why writes are not to be recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Bitmap {
    /// `dirty::CAUSE_*`.
    pub cause: u32,
    /// Zero.
    pub zero: u32,
}
