//! The free space of a mounted file system, as the running kernel knows it (`FS_IOC_GETFSMAP`,
//! linux/fsmap.h): ext4 and xfs.
//!
//! Here and not beside its caller, since ioctls are unsafe and this room has them.

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::boxed::Box;
use std::fs::File;
use std::ops::Range;
use std::vec::Vec;

/// Records asked for at once.
const RECORDS: usize = 1024;
/// `FMR_OWN_FREE`, which is a special owner (`FMR_OF_SPECIAL_OWNER`).
const OWNER_FREE: u64 = 1;
const SPECIAL_OWNER: u32 = 0x10;
/// `FMR_OF_LAST`.
const LAST: u32 = 0x20;
/// `FMH_OF_DEV_T`: devices are told by number.
const BY_NUMBER: u32 = 1;
/// `FS_IOC_GETFSMAP`: its number names the head alone, 192 bytes, whatever follows it.
const GETFSMAP: Opcode = opcode::read_write::<Head>(b'X', 59);

/// `struct fsmap`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Record {
    device: u32,
    flags: u32,
    physical: u64,
    owner: u64,
    offset: u64,
    length: u64,
    reserved: [u64; 3],
}

/// `struct fsmap_head` without its records.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Head {
    in_flags: u32,
    out_flags: u32,
    count: u32,
    entries: u32,
    reserved: [u64; 6],
    keys: [Record; 2],
}

/// The head and room for its records.
#[repr(C)]
struct Map {
    head: Head,
    records: [Record; RECORDS],
}

const _: () = assert!(size_of::<Head>() == 192 && size_of::<Record>() == 64);
const _: () = assert!(size_of::<Map>() == 192 + 64 * RECORDS);

/// Free ranges of the device `rdev`, in bytes of it, by a file system of which `place` is an open file or
/// directory. Needs CAP_SYS_ADMIN. `EOPNOTSUPP` or `ENOTTY`: the file system cannot tell.
pub fn free_ranges(place: &File, rdev: u64) -> Result<Vec<Range<u64>>, Errno> {
    // The kernel's `new_encode_dev`.
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let device = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
    let mut map = Box::new(Map { head: Head::default(), records: [Record::default(); RECORDS] });
    map.head.count = u32::try_from(RECORDS).unwrap_or(0);
    map.head.keys[1] = Record {
        device: u32::MAX,
        flags: u32::MAX,
        physical: u64::MAX,
        owner: u64::MAX,
        offset: u64::MAX,
        ..Record::default()
    };
    let mut free: Vec<Range<u64>> = Vec::new();
    loop {
        // SAFETY: the number is that of `struct fsmap_head`, and `Map` is one with `count` records behind it,
        // which is all that the kernel writes; it keeps no pointer.
        match unsafe { ioctl(place, Updater::<GETFSMAP, Map>::new(&mut map)) } {
            Err(Errno::INTR) => continue,
            done => done?,
        }
        if map.head.out_flags & BY_NUMBER == 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let told = map.records.iter().take(map.head.entries as usize);
        for record in told.filter(|record| record.device == device) {
            if record.flags & SPECIAL_OWNER != 0 && record.owner == OWNER_FREE {
                let end = record.physical.checked_add(record.length).ok_or(Errno::OVERFLOW)?;
                match free.last_mut() {
                    Some(last) if last.end == record.physical => last.end = end,
                    _ => free.push(record.physical..end),
                }
            }
        }
        let Some(last) = map.records.get((map.head.entries as usize).wrapping_sub(1)).copied() else { break };
        if last.flags & LAST != 0 {
            break;
        }
        map.head.keys[0] = last;
    }
    Ok(free)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_tell_says_so() {
        let place = File::open("/dev/shm").unwrap();
        assert!(free_ranges(&place, 0).is_err(), "tmpfs");
    }
}
