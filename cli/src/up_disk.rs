//! Whether a disk can be protected, said before anything is started: what is wrong, where, and what to do.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use machine::disk::container::Container;
use rustix::fs::{Mode, OFlags};

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
    let users = fs::File::open(path).and_then(|file| machine::disk::users_of(&file)).unwrap_or_default();
    if !users.is_empty() {
        let users = machine::disk::users::told(&users);
        anyhow::bail!(Fault::new(
            Kind::Busy,
            format!("disk {at} is in use ({users}): unmount or stop that first")
        ));
    }
    // O_EXCL on a block device fails while the kernel uses it in any way, also where nobody above names the
    // user.
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

/// Refuses, for a disk that is not protected yet, what is no disk: a container with one in it, or what `up`
/// keeps in DIR.
///
/// # Errors
/// What it is, and what to do.
pub fn check_new(path: &Path, dir: &Path) -> Result<()> {
    let found = fs::File::open(path).ok().and_then(|file| Container::of(&file));
    if let Some(container) = found {
        anyhow::bail!(Fault::usage(format!("--disk: {}", container.advice(path))));
    }
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    if path.starts_with(crate::up_plan::receiver_dir(&dir))
        || path.starts_with(crate::up_plan::source_dir(&dir))
    {
        let at = path.display();
        anyhow::bail!(Fault::usage(format!(
            "--disk {at} lies among what `up` itself keeps in --dir: move it"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
        check_new(&image, dir.path()).unwrap();
        std::fs::write(&image, [&b"vhdxfile"[..], &[0; 4088]].concat()).unwrap();
        let container = check_new(&image, dir.path()).unwrap_err();
        assert!(container.to_string().contains("qemu-img convert -f vhdx"), "{container}");
        let dir = dir.path().canonicalize().unwrap();
        let ours = check_new(&dir.join("receiver/replica/default/disk.img"), &dir).unwrap_err();
        assert!(ours.to_string().contains("move it"), "{ours}");
    }
}
