//! What a file system on a volume calls free: content that nobody will read, and that need not be sent
//! (`sync = "allocated"`, decision 0021).
//!
//! | who | how | exact when |
//! |---|---|---|
//! | NBD front | the file systems' own tools on the disk (`unmounted`) | before the group serves for the first time: nobody has the disk then, and it was unmounted cleanly |
//! | kernel module | `FS_IOC_GETFSMAP` on the mount point: ext4, xfs | at any time behind a begin and its barrier |
//!
//! ⚠ The map of a disk whose file system is mounted elsewhere is stale: blocks are written before the bitmap
//! on the disk says that they are allocated. So behind the front it is read once, before the first client;
//! what is written from then on is captured, whatever the map said. Where the map cannot be had exactly,
//! everything is sent, and the reason is told.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use kfilter::fsmap;

use crate::capture::disk::Disk;
use crate::granules::Granules;

mod parse;
mod unmounted;

pub use unmounted::of_unmounted;

/// Free granules of a device whose file system is mounted here, read from the running kernel.
///
/// ⚠ Called behind begin and barrier: what was submitted before is on the disk and allocated in the kernel's
/// memory, what comes later is a record. Then what made blocks free is made durable, so that it is in the
/// stream before this synchronisation can end: a replica that is recovered to its end must not want the
/// blocks back.
///
/// # Errors
/// Why it cannot be had exactly, in an operator's words.
pub fn of_mounted(disk: &Disk) -> Result<Granules, String> {
    let number = std::fs::read_to_string(disk.sysfs().join("dev")).unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let place = mount_point(&mounts, number.trim()).ok_or("no ext4 or xfs is mounted from it")?;
    let mounted = File::open(&place).map_err(|error| format!("open {place}: {error}"))?;
    let free = fsmap::free_ranges(&mounted, disk.rdev()).map_err(|error| format!("ask {place}: {error}"))?;
    rustix::fs::syncfs(&mounted).map_err(|error| format!("sync {place}: {error}"))?;
    let mut granules = Granules::none(disk.size_bytes());
    free.into_iter().for_each(|range: Range<u64>| granules.add_inside(range));
    Ok(granules)
}

/// Where a file system that can tell is mounted from a device, by /proc/self/mountinfo.
fn mount_point(mounts: &str, number: &str) -> Option<String> {
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let fields: Vec<&str> = left.split(' ').collect();
        let is_known = matches!(right.split(' ').next(), Some("ext4" | "xfs"));
        // The whole file system, not a bind mount of a part.
        let whole = fields.get(2) == Some(&number) && fields.get(3) == Some(&"/") && is_known;
        whole.then(|| fields.get(4).map(|place| unescaped(place)))?
    })
}

/// A path as mountinfo writes it: blanks and the like as octal numbers.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// What kind of file system begins at the start of a disk, by its magic.
fn kind_of(path: &Path) -> std::io::Result<Option<Kind>> {
    use std::os::unix::fs::FileExt as _;
    let mut head = vec![0; 68 << 10];
    let disk = File::open(path)?;
    let read = disk.read_at(&mut head, 0)?;
    let has = |at: usize, magic: &[u8]| at + magic.len() <= read && head[at..].starts_with(magic);
    Ok([(1080, &[0x53, 0xef][..], Kind::Ext4), (0, b"XFSB", Kind::Xfs), (65600, b"_BHRfS_M", Kind::Btrfs)]
        .into_iter()
        .find_map(|(at, magic, kind)| has(at, magic).then_some(kind)))
}

/// File systems whose maps are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_device() {
        let mounts = "36 25 7:1 / /mnt/a\\040b rw,relatime shared:1 - ext4 /dev/loop1 rw\n\
                      37 25 7:2 /part /mnt/c rw - xfs /dev/loop2 rw\n38 25 7:3 / /mnt/d rw - vfat /dev/loop3 rw\n";
        assert_eq!(mount_point(mounts, "7:1").as_deref(), Some("/mnt/a b"));
        assert_eq!((mount_point(mounts, "7:2"), mount_point(mounts, "7:3")), (None, None));
    }
}
