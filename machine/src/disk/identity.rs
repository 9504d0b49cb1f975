//! Who a disk is, whatever is written to it, and over restarts and reboots as far as the machine can tell.
//!
//! | disk | known by |
//! |---|---|
//! | file | file system (its UUID, else `statvfs`' id), inode, birth, handle (holds the inode's generation) |
//! | loop device | its backing, and which part of that |
//! | other device | wwid, serial or dm uuid of the disk, and where the partition begins |
//! | device without a name | its number and sequence number, within one boot |
//!
//! `st_dev` is not used: it may differ after every mount. Some file systems make their `statvfs` id from it,
//! so a different id alone is no proof of anything.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::{boot_id, system};

/// A name longer than this is kept as its beginning and a hash.
const NAME_BYTES: usize = 96;

/// Whether two identities are of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Same {
    /// They are.
    Yes,
    /// They are not.
    No,
    /// What is known does not decide it.
    Unknown,
}

/// Who a disk is. At most some 250 bytes when encoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskIdentity {
    /// A file.
    File(FileIdentity),
    /// A block device.
    Device(DeviceIdentity),
    /// A disk of a simulation, by number.
    Simulated(u64),
}

/// Who a file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Inode.
    pub inode: u64,
    /// When it was made, ns since 1970, where the file system keeps it.
    pub born_ns: Option<u64>,
    /// Hash of its handle, where the file system gives one.
    pub handle: Option<u64>,
    /// UUID of its file system, where the kernel tells it.
    pub fs_uuid: Option<[u8; 16]>,
    /// Its file system as `statvfs` tells it; may change over a reboot.
    pub fs_id: u64,
}

/// Who a block device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// wwid, serial or dm uuid of the whole disk; empty where it has none.
    pub name: String,
    /// Where the partition begins, sectors; `None` for a whole disk.
    pub start_sectors: Option<u64>,
    /// What a loop device stands on.
    pub backing: Option<Backing>,
    /// Number of the device, sequence number of its disk, and of which boot: identifies what has no name.
    pub number: u64,
    /// Given anew by the kernel whenever a disk appears; 0 where it does not (before 5.15).
    pub sequence: u64,
    /// Of which boot `number` and `sequence` are.
    pub boot: [u8; 16],
}

/// The backing of a loop device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// The file, where it could be looked at. A path that leads elsewhere by now does not count.
    pub file: Option<FileIdentity>,
    /// Inode, and device number where the backing is a device: what the loop device itself tells.
    pub told: (u64, u64),
    /// Where it begins in the backing, bytes, and its limit (0: none).
    pub part: (u64, u64),
}

impl DiskIdentity {
    /// Of the disk that a descriptor holds.
    ///
    /// # Errors
    /// The system's; `InvalidInput` for what is neither a file nor a block device.
    pub fn of(held: &File) -> io::Result<DiskIdentity> {
        let metadata = held.metadata()?;
        if metadata.is_file() {
            return Ok(DiskIdentity::File(FileIdentity::of(held)?));
        }
        if metadata.file_type().is_block_device() {
            return Ok(DiskIdentity::Device(DeviceIdentity::of(held, metadata.rdev())));
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"))
    }

    /// Whether both are one disk.
    pub fn compare(&self, other: &DiskIdentity) -> Same {
        match (self, other) {
            (DiskIdentity::File(a), DiskIdentity::File(b)) => a.compare(b),
            (DiskIdentity::Device(a), DiskIdentity::Device(b)) => a.compare(b),
            (DiskIdentity::Simulated(a), DiskIdentity::Simulated(b)) if a == b => Same::Yes,
            _ => Same::No,
        }
    }
}

/// Two values that may be unknown: `Some(false)` where both are known and differ.
fn agree<T: PartialEq>(a: Option<&T>, b: Option<&T>) -> Option<bool> {
    Some(a? == b?)
}

impl FileIdentity {
    /// Of a file that is held.
    ///
    /// # Errors
    /// The system's.
    pub fn of(file: &File) -> io::Result<FileIdentity> {
        let handle = system::file_handle(file).map(|(kind, mut bytes)| {
            bytes.extend_from_slice(&kind.to_le_bytes());
            xxh3_64(&bytes)
        });
        Ok(FileIdentity {
            inode: file.metadata()?.ino(),
            born_ns: system::born_ns(file),
            handle,
            fs_uuid: system::fs_uuid(file),
            fs_id: rustix::fs::fstatvfs(file)?.f_fsid,
        })
    }

    /// Whether both are one file.
    pub fn compare(&self, other: &FileIdentity) -> Same {
        let born = agree(self.born_ns.as_ref(), other.born_ns.as_ref());
        let handle = agree(self.handle.as_ref(), other.handle.as_ref());
        let uuid = agree(self.fs_uuid.as_ref(), other.fs_uuid.as_ref());
        if self.inode != other.inode || [born, handle, uuid].contains(&Some(false)) {
            return Same::No;
        }
        let is_one_fs = uuid == Some(true) || self.fs_id == other.fs_id;
        // A number alone may have been given to another file.
        let is_one_life = born == Some(true) || handle == Some(true);
        if is_one_fs && is_one_life { Same::Yes } else { Same::Unknown }
    }
}

impl DeviceIdentity {
    fn of(held: &File, rdev: u64) -> DeviceIdentity {
        let sysfs = system::sysfs(rdev);
        let whole = system::whole_disk(&sysfs);
        let disk = whole.clone().unwrap_or_else(|| sysfs.clone());
        let number = |path: &Path| text(path).parse().ok();
        DeviceIdentity {
            name: name(&disk),
            start_sectors: whole.is_some().then(|| number(&sysfs.join("start"))).flatten(),
            backing: backing(held, &disk),
            number: rdev,
            sequence: number(&disk.join("diskseq")).unwrap_or(0),
            boot: boot_id(),
        }
    }

    fn compare(&self, other: &DeviceIdentity) -> Same {
        if self.start_sectors != other.start_sectors {
            return Same::No;
        }
        let is_one_attach = self.boot == other.boot
            && self.number == other.number
            && self.sequence == other.sequence
            && self.sequence != 0
            && self.boot != [0; 16];
        match (&self.backing, &other.backing) {
            (Some(a), Some(b)) => a.compare(b, is_one_attach),
            (Some(_), None) | (None, Some(_)) => Same::No,
            (None, None) if self.name != other.name => Same::No,
            (None, None) if !self.name.is_empty() || is_one_attach => Same::Yes,
            (None, None) => Same::Unknown,
        }
    }
}

impl Backing {
    fn compare(&self, other: &Backing, is_one_attach: bool) -> Same {
        if self.part != other.part || self.told.0 != other.told.0 {
            return Same::No;
        }
        match (&self.file, &other.file) {
            (Some(a), Some(b)) => a.compare(b),
            // `losetup --direct-io` and the like keep the sequence number, and so does nothing that changes
            // the backing.
            _ if is_one_attach && self.told == other.told => Same::Yes,
            _ => Same::Unknown,
        }
    }
}

/// The backing of a loop device, or of the loop device whose partition this is.
fn backing(held: &File, disk: &Path) -> Option<Backing> {
    if !disk.join("loop").exists() {
        return None;
    }
    let (target, file) = loop_backing(held, disk)?;
    Some(Backing {
        file: file.and_then(|file| FileIdentity::of(&file).ok()),
        told: (target.file.1, target.rdev),
        part: (target.offset, target.size_limit),
    })
}

/// What a loop device stands on, and the file, where its path still leads to it.
pub(super) fn loop_backing(held: &File, disk: &Path) -> Option<(system::LoopTarget, Option<File>)> {
    // A partition of a loop device does not answer; the whole one does.
    let target = system::loop_target(held).or_else(|| {
        let node = Path::new("/dev").join(disk.canonicalize().ok()?.file_name()?);
        system::loop_target(&File::open(node).ok()?)
    })?;
    let path = text(&disk.join("loop/backing_file"));
    let file = File::open(path).ok().filter(|file| {
        file.metadata().is_ok_and(|there| (there.dev(), there.ino()) == target.file && there.is_file())
    });
    Some((target, file))
}

/// What a disk is called by those who made it.
fn name(disk: &Path) -> String {
    let named = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "md/uuid"];
    let found = named.iter().map(|name| text(&disk.join(name))).find(|text| !text.is_empty());
    let found = found.unwrap_or_default();
    if found.len() <= NAME_BYTES {
        return found;
    }
    let end = (0..=NAME_BYTES - 33).rev().find(|at| found.is_char_boundary(*at)).unwrap_or(0);
    format!("{} {:032x}", &found[..end], xxh3_128(found.as_bytes()))
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str) -> DeviceIdentity {
        DeviceIdentity {
            name: name.to_owned(),
            start_sectors: None,
            backing: None,
            number: 7,
            sequence: 3,
            boot: [1; 16],
        }
    }

    #[test]
    fn a_file_is_itself_under_any_name_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let one = DiskIdentity::of(&File::create(&a).unwrap()).unwrap();
        std::fs::rename(&a, &b).unwrap();
        std::fs::write(&b, "others wrote").unwrap();
        let moved = DiskIdentity::of(&File::open(&b).unwrap()).unwrap();
        assert_eq!(one.compare(&moved), Same::Yes);
        std::fs::copy(&b, &a).unwrap();
        let copy = DiskIdentity::of(&File::open(&a).unwrap()).unwrap();
        assert_eq!(one.compare(&copy), Same::No);
        assert!(DiskIdentity::of(&File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn a_number_that_was_given_again_is_no_proof() {
        let file = |born_ns, handle, fs_id| FileIdentity { inode: 9, born_ns, handle, fs_uuid: None, fs_id };
        let compare = |a: &FileIdentity, b: &FileIdentity| (a.compare(b), b.compare(a));
        let full = file(Some(1), Some(2), 3);
        assert_eq!(compare(&full, &full), (Same::Yes, Same::Yes));
        assert_eq!(compare(&full, &file(Some(1), Some(9), 3)), (Same::No, Same::No));
        assert_eq!(compare(&full, &file(Some(9), Some(2), 3)), (Same::No, Same::No));
        assert_eq!(compare(&full, &file(Some(1), None, 3)), (Same::Yes, Same::Yes));
        let bare = file(None, None, 3);
        assert_eq!(compare(&bare, &bare), (Same::Unknown, Same::Unknown));
        assert_eq!(compare(&full, &file(Some(1), Some(2), 4)).0, Same::Unknown, "perhaps only mounted again");
        let uuid =
            |byte| FileIdentity { fs_uuid: Some([byte; 16]), ..file(Some(1), Some(2), u64::from(byte)) };
        assert_eq!(uuid(1).compare(&uuid(2)), Same::No);
        assert_eq!(uuid(1).compare(&FileIdentity { fs_id: 77, ..uuid(1) }), Same::Yes);
    }

    #[test]
    fn a_device_is_known_by_its_name_or_within_one_boot() {
        let compare = |a: &DeviceIdentity, b: &DeviceIdentity| a.compare(b);
        let rebooted = DeviceIdentity { boot: [2; 16], number: 9, ..device("wwid") };
        assert_eq!(compare(&device("wwid"), &rebooted), Same::Yes);
        assert_eq!(compare(&device("wwid"), &device("other")), Same::No);
        let partition = DeviceIdentity { start_sectors: Some(2048), ..device("wwid") };
        assert_eq!(compare(&device("wwid"), &partition), Same::No);
        assert_eq!(compare(&device(""), &device("")), Same::Yes);
        assert_eq!(compare(&device(""), &DeviceIdentity { sequence: 4, ..device("") }), Same::Unknown);
        assert_eq!(compare(&device(""), &DeviceIdentity { boot: [2; 16], ..device("") }), Same::Unknown);
        let over = |told| Backing { file: None, told, part: (0, 0) };
        let looped = |told| DeviceIdentity { backing: Some(over(told)), ..device("") };
        assert_eq!(compare(&looped((5, 0)), &looped((5, 0))), Same::Yes);
        assert_eq!(compare(&looped((5, 0)), &looped((6, 0))), Same::No);
        assert_eq!(compare(&looped((5, 0)), &device("")), Same::No);
    }

    #[test]
    fn long_names_are_bounded_and_still_differ() {
        let dir = tempfile::tempdir().unwrap();
        let named = |text: &str| {
            std::fs::write(dir.path().join("wwid"), text).unwrap();
            name(dir.path())
        };
        assert_eq!(named("naa.5\n"), "naa.5");
        let long = "ä".repeat(300);
        let (a, b) = (named(&long), named(&format!("{long}b")));
        assert!(a.len() <= NAME_BYTES && b.len() <= NAME_BYTES && a != b, "{a} {b}");
    }
}
