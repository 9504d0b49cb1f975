//! What tells whether others wrote to a disk while nobody captured it.
//!
//! A file behind the front: its times and inode. A block device: the sectors that this boot has written to it. A device
//! that the kernel module captured, over a reboot: a hash of its first and last MiB, its size, its identity, and that
//! the new boot has written nothing to it yet. Limits: whoever writes to a device from another machine, or boots
//! something else in between and changes only its middle, is not seen (docs/operations.md).

use std::path::Path;

use kfilter::region::boot_id;
use xxhash_rust::xxh3::Xxh3;

use crate::capture::disk::{Buffer, Disk};
use crate::error::{Error, ErrorKind, Result};
use crate::state::DeviceStamp;

/// What is hashed at each end.
const END_BYTES: u64 = 1 << 20;

/// What changes when others write to a backing while nobody protects it. Files: change time, modification time and
/// inode. Block devices: the sectors written to them since this boot; another boot always differs.
pub fn of_path(path: &Path) -> Option<[u64; 3]> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let metadata = std::fs::metadata(path).ok()?;
    if metadata.is_file() {
        let ns = |seconds: i64, nanos: i64| {
            seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos).cast_unsigned()
        };
        let changed = ns(metadata.ctime(), metadata.ctime_nsec());
        return Some([changed, ns(metadata.mtime(), metadata.mtime_nsec()), metadata.ino()]);
    }
    if !metadata.file_type().is_block_device() {
        return None;
    }
    let device = metadata.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let written = written(Path::new(&format!("/sys/dev/block/{major}:{minor}")))?;
    let boot = u128::from_be_bytes(boot_id().ok()?);
    let low = u64::try_from(boot & u128::from(u64::MAX)).ok()?;
    Some([low, u64::try_from(boot >> 64).ok()?, written[0]])
}

/// Which file a path leads to, whatever is written to it: birth and inode. Remembered while it is served, so that another file
/// in its place is noticed after a kill, too. `None` for what is no file.
pub fn identity_of(path: &Path) -> Option<[u64; 3]> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    let born = metadata.created().ok().and_then(|born| born.duration_since(std::time::UNIX_EPOCH).ok());
    let born_ns = born.map_or(0, |born| u64::try_from(born.as_nanos()).unwrap_or(0));
    Some([born_ns, 0, metadata.ino()])
}

/// Sectors written and discarded since this boot: fields of the kernel's block/stat.
pub fn written(sysfs: &Path) -> Option<[u64; 2]> {
    let stat = std::fs::read_to_string(sysfs.join("stat")).ok()?;
    let mut fields = stat.split_whitespace();
    let written = fields.nth(6)?.parse().ok()?;
    let discarded = fields.nth(6).map_or(Some(0), |field| field.parse().ok())?;
    Some([written, discarded])
}

/// The stamp of a device that nobody writes to any more.
///
/// # Errors
/// It cannot be read.
pub fn of_device(disk: &Disk) -> Result<DeviceStamp> {
    let io = |error| Error::because(ErrorKind::Io, format!("read {}", disk.path().display()), error);
    let no_stat = || {
        Error::new(ErrorKind::Io, format!("{}: the kernel keeps no statistics of it", disk.path().display()))
    };
    let boot = boot_id().map_err(|error| Error::because(ErrorKind::Io, "read the boot id", error))?;
    let size_bytes = disk.size_bytes();
    let length = END_BYTES.min(size_bytes);
    let mut buffer = Buffer::new(usize::try_from(length).unwrap_or(0));
    let mut hash = Xxh3::new();
    for offset in [0, (size_bytes - length) / 4096 * 4096] {
        let rest = usize::try_from((size_bytes - offset).min(length)).unwrap_or(0);
        disk.read_at(offset, &mut buffer.bytes()[..rest]).map_err(io)?;
        hash.update(&buffer.bytes()[..rest]);
    }
    let hash = hash.digest128().to_le_bytes();
    let sysfs = disk.sysfs();
    let written = written(&sysfs).ok_or_else(no_stat)?;
    Ok(DeviceStamp { boot, written, size_bytes, hash, identity: identity(&sysfs) })
}

/// Whether nobody wrote to a device between two stamps.
pub fn is_unchanged(then: &DeviceStamp, now: &DeviceStamp) -> bool {
    let same = then.size_bytes == now.size_bytes && then.hash == now.hash && then.identity == now.identity;
    let untouched = if then.boot == now.boot { then.written == now.written } else { now.written == [0, 0] };
    same && untouched
}

/// What a device is called by those who made it, as far as they say: independent of its number and of the boot.
fn identity(sysfs: &Path) -> String {
    let disk = if sysfs.join("partition").exists() { sysfs.join("..") } else { sysfs.to_owned() };
    let named = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid"];
    let text = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let found = named.iter().map(|name| text(&disk.join(name))).find(|text| !text.is_empty());
    let start = text(&sysfs.join("start"));
    format!("{} {start}", found.unwrap_or_default()).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_unchanged_when_nobody_wrote_in_either_boot() {
        let then = DeviceStamp {
            boot: [1; 16],
            written: [7, 1],
            size_bytes: 1 << 20,
            hash: [2; 16],
            identity: "wwid".to_owned(),
        };
        assert!(is_unchanged(&then, &then));
        let rebooted = DeviceStamp { boot: [2; 16], written: [0, 0], ..then.clone() };
        assert!(is_unchanged(&then, &rebooted));
        for changed in [
            DeviceStamp { written: [8, 1], ..then.clone() },
            DeviceStamp { written: [8, 0], ..rebooted.clone() },
            DeviceStamp { hash: [3; 16], ..rebooted.clone() },
            DeviceStamp { size_bytes: 2 << 20, ..rebooted.clone() },
            DeviceStamp { identity: "another".to_owned(), ..rebooted },
        ] {
            assert!(!is_unchanged(&then, &changed), "{changed:?}");
        }
    }

    #[test]
    fn statistics_are_read_by_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let put = |text| std::fs::write(dir.path().join("stat"), text).unwrap();
        put("1 2 3 4 5 6 777 8 9 10 11 12 13 888 15 16 17\n");
        assert_eq!(written(dir.path()), Some([777, 888]));
        put("1 2 3 4 5 6 777 8 9 10 11\n");
        assert_eq!(written(dir.path()), Some([777, 0]), "a kernel that does not count discards");
    }
}
