//! Whether the agent's own directory stands on a device that it captures: every journaled write would be
//! captured and journaled again, until the quota is used up, and for ever after.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Devices stacked on each other that are followed at most.
const DEPTH: u32 = 16;

/// Where to look things up.
pub struct Machine<'a> {
    /// `/sys/dev/block`: a link for each device number.
    pub devices: &'a Path,
    /// The text of `/proc/self/mountinfo`.
    pub mounts: &'a str,
}

impl Machine<'_> {
    /// Whether what is written into a directory reaches a device, given by its directory in sysfs.
    pub fn stands_on(&self, dir: &Path, device: &Path) -> bool {
        let Ok(device) = device.canonicalize() else { return false };
        self.number(dir).is_some_and(|number| self.reaches(&number, &device, DEPTH))
    }

    /// The device number of the file system that holds a path.
    fn number(&self, path: &Path) -> Option<String> {
        let holder = fs::metadata(path).ok()?.dev();
        let number = text(holder);
        if rustix::fs::major(holder) != 0 {
            return Some(number);
        }
        // btrfs and others have numbers of their own; the mount table knows what they stand on.
        let mount = self.mounts.lines().find(|line| line.split(' ').nth(2) == Some(&number))?;
        let source = mount.split(" - ").nth(1)?.split(' ').nth(1)?;
        let metadata = fs::metadata(source).ok()?;
        Some(text(metadata.rdev()))
    }

    /// Whether a device is another, a part of it, or stacked on it.
    fn reaches(&self, number: &str, device: &Path, depth: u32) -> bool {
        let Ok(node) = self.devices.join(number).canonicalize() else { return false };
        let is_part = node.join("partition").exists();
        if node == device || (is_part && node.parent() == Some(device)) {
            return true;
        }
        if depth == 0 {
            return false;
        }
        let whole = if is_part { node.join("..") } else { node };
        let backing = fs::read_to_string(whole.join("loop/backing_file"));
        let behind = backing.ok().and_then(|path| self.number(Path::new(path.trim())));
        let slaves = fs::read_dir(whole.join("slaves")).into_iter().flatten().flatten();
        let below = slaves.filter_map(|slave| number_of(&slave.path()));
        below.chain(behind).any(|number| self.reaches(&number, device, depth - 1))
    }
}

fn text(device: u64) -> String {
    format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

fn number_of(node: &Path) -> Option<String> {
    fs::read_to_string(PathBuf::from(node).join("dev")).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A disk 8:0 with a partition 8:1, a volume 253:0 on that, a disk 8:16.
    fn sysfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str, number: &str| {
            let node = dir.path().join("nodes").join(path);
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("dev"), format!("{number}\n")).unwrap();
            fs::create_dir_all(dir.path().join("numbers")).unwrap();
            symlink(&node, dir.path().join("numbers").join(number)).unwrap();
            node
        };
        make("sda", "8:0");
        let part = make("sda/sda1", "8:1");
        fs::write(part.join("partition"), "1").unwrap();
        let volume = make("dm-0", "253:0");
        fs::create_dir_all(volume.join("slaves")).unwrap();
        symlink(&part, volume.join("slaves/sda1")).unwrap();
        make("sdb", "8:16");
        dir
    }

    #[test]
    fn what_stands_on_a_device_reaches_it() {
        let dir = sysfs();
        let numbers = dir.path().join("numbers");
        let machine = Machine { devices: &numbers, mounts: "" };
        let reaches = |number: &str, node: &str| {
            machine.reaches(number, &dir.path().join("nodes").join(node).canonicalize().unwrap(), DEPTH)
        };
        assert!(reaches("8:0", "sda") && reaches("8:1", "sda") && reaches("8:1", "sda/sda1"));
        assert!(reaches("253:0", "sda") && reaches("253:0", "sda/sda1") && reaches("253:0", "dm-0"));
        assert!(!reaches("8:16", "sda") && !reaches("8:1", "sdb") && !reaches("8:0", "dm-0"));
        assert!(!reaches("8:0", "sda/sda1"), "another part of the disk");
        assert!(!reaches("9:9", "sda"), "no such device");
    }
}
