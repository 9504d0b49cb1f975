//! What the kernel tells of a descriptor beyond `stat`: the only unsafe code of this room.

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::ioctl::{Getter, Opcode};

/// `_IOR(0x15, 0, struct fsuuid2)`; kernels before 6.9 refuse it.
const FS_IOC_GETFSUUID: Opcode = 0x8011_1500;
/// See loop(4).
const LOOP_GET_STATUS64: Opcode = 0x4C05;
/// The longest handle that the kernel gives (`MAX_HANDLE_SZ`).
const HANDLE_BYTES: usize = 128;

/// `struct fsuuid2`.
#[repr(C)]
#[derive(Clone, Copy)]
struct FsUuid {
    length: u8,
    uuid: [u8; 16],
}

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct file_handle` with room.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; HANDLE_BYTES],
}

/// What a loop device stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopTarget {
    /// `st_dev` and `st_ino` of the backing.
    pub file: (u64, u64),
    /// Its device number where it is a device, else 0.
    pub rdev: u64,
    /// Where the loop device begins in it, bytes.
    pub offset: u64,
    /// At most so many bytes of it; 0 for all.
    pub size_limit: u64,
}

/// The UUID of the file system that a file lies in.
pub fn fs_uuid(file: &File) -> Option<[u8; 16]> {
    // SAFETY: the request fills a `struct fsuuid2`, and `FsUuid` is laid out as that.
    let got = unsafe { rustix::ioctl::ioctl(file, Getter::<FS_IOC_GETFSUUID, FsUuid>::new()) }.ok()?;
    (got.length == 16 && got.uuid != [0; 16]).then_some(got.uuid)
}

/// What a loop device stands on; `None` for what is none, or has no backing.
pub fn loop_target(device: &File) -> Option<LoopTarget> {
    // SAFETY: the request fills a `struct loop_info64`, and `LoopInfo` is laid out as that. Other devices
    // refuse it.
    let got = unsafe { rustix::ioctl::ioctl(device, Getter::<LOOP_GET_STATUS64, LoopInfo>::new()) }.ok()?;
    Some(LoopTarget {
        file: (got.device, got.inode),
        rdev: got.rdevice,
        offset: got.offset,
        size_limit: got.size_limit,
    })
}

/// The handle that the file system knows a file by: inode and generation, which differs for every file that
/// ever had the inode's number. Its kind and bytes; `None` where the file system gives none.
pub fn file_handle(file: &File) -> Option<(i32, Vec<u8>)> {
    let bytes = u32::try_from(HANDLE_BYTES).ok()?;
    let mut handle = Handle { bytes, kind: 0, data: [0; HANDLE_BYTES] };
    let mut mount: c_int = 0;
    // SAFETY: the path is an empty C string, which with AT_EMPTY_PATH means the descriptor; `handle` has room
    // for as many bytes as it says, and `mount` for one number. Both live through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    let length = usize::try_from(handle.bytes).ok().filter(|length| *length <= HANDLE_BYTES)?;
    (done == 0).then(|| (handle.kind, handle.data[..length].to_vec()))
}

/// When a file was made, ns since 1970; `None` where the file system does not keep it.
pub fn born_ns(file: &File) -> Option<u64> {
    let got = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok()?;
    let kept = StatxFlags::from_bits_retain(got.stx_mask).contains(StatxFlags::BTIME);
    let seconds = u64::try_from(got.stx_btime.tv_sec).ok().filter(|_| kept)?;
    seconds.checked_mul(1_000_000_000)?.checked_add(u64::from(got.stx_btime.tv_nsec))
}

/// The directory of a device in sysfs.
pub fn sysfs(rdev: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// A number of a device as sysfs writes it.
pub fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// The sysfs directory of the whole disk of a partition; `None` for what is no partition.
pub fn whole_disk(sysfs: &std::path::Path) -> Option<PathBuf> {
    sysfs.join("partition").exists().then(|| sysfs.canonicalize().ok()?.parent().map(PathBuf::from))?
}

/// The sysfs directories of the partitions of a whole disk.
pub fn partitions(sysfs: &std::path::Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(sysfs) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = paths.filter(|path| path.join("partition").exists()).collect();
    found.sort();
    found
}
