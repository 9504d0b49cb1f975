//! Whether a disk can be protected, said before anything is started: what is wrong, where, and what to do.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::fs::{Mode, OFlags, major, minor};

use crate::exit::{Fault, Kind};

/// The path without links and dots, so that it means the same in a later run.
///
/// # Errors
/// There is no such file or device.
pub fn find(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Fault::usage(format!(
            "--disk {}: there is no such file or device; --size SIZE makes a new disk",
            path.display()
        ))
        .into(),
        _ => Fault::new(Kind::Failed, format!("--disk {}: {error}", path.display())).into(),
    })
}

/// Refuses what cannot be protected. The replicator takes hold of the disk itself; this finds out who has it.
pub fn check(path: &Path) -> Result<()> {
    let at = path.display();
    let found = fs::metadata(path).map_err(|error| {
        Fault::new(Kind::Failed, format!("disk {at}: {error}; attach it again, or choose another --dir"))
    })?;
    let kind = found.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        anyhow::bail!(Fault::usage(format!("disk {at}: neither a file nor a block device")));
    }
    let users = if kind.is_block_device() { device_users(found.rdev()) } else { file_users(path) };
    if let Some(user) = users.first() {
        anyhow::bail!(Fault::new(
            Kind::Busy,
            format!("disk {at} is in use ({user}): unmount or stop that first")
        ));
    }
    // O_EXCL on a block device fails while the kernel uses it in any way, also where nobody above names the user.
    let exclusive = if kind.is_block_device() { OFlags::EXCL } else { OFlags::empty() };
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC | exclusive, Mode::empty()).map_err(|errno| {
        let advice = match errno {
            rustix::io::Errno::BUSY => "it is in use: unmount or stop what uses it first",
            rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => "run as a user who may write it",
            rustix::io::Errno::ROFS => "it is read-only",
            _ => "it cannot be opened for writing",
        };
        let kind = if errno == rustix::io::Errno::BUSY { Kind::Busy } else { Kind::Failed };
        Fault::new(kind, format!("disk {at}: {advice} ({errno})"))
    })?;
    Ok(())
}

/// Mounts of a device and of its partitions, and what the kernel has stacked upon it.
fn device_users(device: u64) -> Vec<String> {
    let home = PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
    let mut users = users_of(&home);
    for entry in fs::read_dir(&home).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            users.extend(users_of(&entry.path()));
        }
    }
    users
}

fn users_of(home: &Path) -> Vec<String> {
    let number = fs::read_to_string(home.join("dev")).unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut users = mounts_of(&mounts, number.trim());
    let holders = fs::read_dir(home.join("holders")).into_iter().flatten().flatten();
    users.extend(holders.map(|holder| format!("used by {}", holder.file_name().to_string_lossy())));
    users
}

/// Mount points of device `MAJOR:MINOR` in the text of a mountinfo file: fields 3 and 5.
fn mounts_of(mountinfo: &str, number: &str) -> Vec<String> {
    let mounted = |line: &str| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let place = fields.nth(1)?;
        (device == number).then(|| format!("mounted at {place}"))
    };
    mountinfo.lines().filter_map(mounted).collect()
}

/// Loop devices over a file.
fn file_users(path: &Path) -> Vec<String> {
    let blocks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    blocks
        .filter(|block| {
            let backing = fs::read_to_string(block.path().join("loop/backing_file")).unwrap_or_default();
            Path::new(backing.trim_end_matches('\n')) == path
        })
        .map(|block| format!("behind /dev/{}", block.file_name().to_string_lossy()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_found_by_device_number() {
        let text = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 8:2 / /home rw,relatime shared:1 - xfs /dev/sda2 rw\n";
        assert_eq!(mounts_of(text, "8:2"), ["mounted at /home"]);
        assert!(mounts_of(text, "8:3").is_empty());
        assert!(mounts_of("garbage\n\n", "8:3").is_empty());
    }

    #[test]
    fn mistakes_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let missing = find(&dir.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("--size SIZE makes a new disk"), "{missing}");
        let not_a_disk = check(dir.path()).unwrap_err();
        assert!(not_a_disk.to_string().contains("neither a file nor a block device"), "{not_a_disk}");
        let image = dir.path().join("image");
        std::fs::write(&image, [0; 4096]).unwrap();
        check(&image).unwrap();
    }
}
