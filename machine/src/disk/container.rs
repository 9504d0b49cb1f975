//! Files that hold a disk in a format of their own: a QCOW2, a VMDK. Taken for a raw disk, their bytes would
//! be protected and no guest could use what is served.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// What is looked at of a file's beginning.
const HEAD_BYTES: usize = 512;

/// A format of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Container {
    /// What it is called.
    pub name: &'static str,
    /// What `qemu-img -f` calls it.
    pub format: &'static str,
}

/// Where a format's sign stands at the beginning, and the sign.
const SIGNS: [(usize, &[u8], Container); 11] = [
    (0, b"QFI\xfb", Container { name: "QCOW2", format: "qcow2" }),
    (0, b"QED\0", Container { name: "QED", format: "qed" }),
    (0, b"KDMV", Container { name: "VMDK", format: "vmdk" }),
    (0, b"COWD", Container { name: "VMDK", format: "vmdk" }),
    (0, b"# Disk DescriptorFile", Container { name: "VMDK", format: "vmdk" }),
    (0, b"vhdxfile", Container { name: "VHDX", format: "vhdx" }),
    (0, b"conectix", Container { name: "VHD", format: "vpc" }),
    (64, b"\x7f\x10\xda\xbe", Container { name: "VDI", format: "vdi" }),
    (0, b"WithoutFreeSpace", Container { name: "Parallels", format: "parallels" }),
    (0, b"WithouFreSpacExt", Container { name: "Parallels", format: "parallels" }),
    (0, b"Bochs Virtual HD Image", Container { name: "Bochs", format: "bochs" }),
];

/// The sign of a VHD of fixed size, in its last 512 bytes, or 511 of old programs; and of a DMG.
const FOOTERS: [(u64, &[u8], Container); 3] = [
    (512, b"conectix", Container { name: "VHD", format: "vpc" }),
    (511, b"conectix", Container { name: "VHD", format: "vpc" }),
    (512, b"koly", Container { name: "DMG", format: "dmg" }),
];

impl Container {
    /// The format of a file; `None` for what is none that we know, a device, or cannot be read.
    pub fn of(file: &File) -> Option<Container> {
        let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let mut head = [0; HEAD_BYTES];
        let mut read = 0;
        while let Some(more) = file.read_at(&mut head[read..], read as u64).ok().filter(|more| *more > 0) {
            read += more;
        }
        let head = &head[..read];
        let begins = |at: usize, sign: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(sign));
        if let Some((.., found)) = SIGNS.iter().find(|(at, sign, _)| begins(*at, sign)) {
            return Some(*found);
        }
        let ends = |back: u64, sign: &[u8]| {
            let mut foot = [0; 8];
            let foot = &mut foot[..sign.len()];
            let at = metadata.len().checked_sub(back);
            at.is_some_and(|at| file.read_exact_at(foot, at).is_ok() && foot == sign)
        };
        FOOTERS.iter().find(|(back, sign, _)| ends(*back, sign)).map(|(.., found)| *found)
    }

    /// What to do with such a file.
    pub fn advice(&self, path: &Path) -> String {
        let (at, raw) = (path.display(), path.with_extension("raw"));
        format!(
            "{at} is a {self} image, a container with a disk in it, and no raw disk: convert it with `qemu-img convert -f {} \
             -O raw {at} {}` and protect that; if it is a raw disk all the same, protect a loop device over it (`losetup`)",
            self.format,
            raw.display()
        )
    }
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(at: u64, sign: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file.as_file().write_all_at(sign, at).unwrap();
        file
    }

    #[test]
    fn containers_are_told_and_raw_disks_are_not() {
        for (at, sign, container) in SIGNS {
            assert_eq!(Container::of(image(at as u64, sign).as_file()), Some(container));
            assert_eq!(Container::of(image(at as u64 + 512, sign).as_file()), None, "elsewhere");
        }
        for (back, sign, container) in FOOTERS {
            assert_eq!(Container::of(image((1 << 20) - back, sign).as_file()), Some(container));
        }
        let short = tempfile::NamedTempFile::new().unwrap();
        short.as_file().write_all_at(b"QFI", 0).unwrap();
        assert_eq!(Container::of(short.as_file()), None);
        assert_eq!(Container::of(&File::open("/dev/null").unwrap()), None);
        let advice = Container { name: "QCOW2", format: "qcow2" }.advice(Path::new("/vm/a.img"));
        assert!(advice.contains("qemu-img convert -f qcow2 -O raw /vm/a.img /vm/a.raw"), "{advice}");
    }
}
