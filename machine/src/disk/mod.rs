//! DISKS as the machine knows them: who one is, whether it is still what it was, and who else uses it.
//!
//! Source and receiver ask the same questions about a protected disk and about a replica, file or block
//! device. What nobody saw is not believed, so every answer has three values: proven, refuted, cannot tell.
//!
//! | module | question |
//! |---|---|
//! | [`identity`] | is this the disk that it was? |
//! | [`continuity`] | did others write to it since a mark was taken? |
//! | [`container`] | is this file no disk, but a container with one in it? |
//! | [`users`] | who else has it open for writing, mounted, under a loop device? |
//!
//! Everything is asked through a descriptor that is held, so that no path can lead elsewhere between question
//! and use. There is no state here, and nothing is written.

pub mod container;
pub mod continuity;
pub mod identity;
mod loops;
mod system;
pub mod users;

pub use continuity::{Continuity, Unchanged};
pub use identity::{DiskIdentity, Same};
pub use users::{User, share, users_of};

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

/// Whether a path leads to what a descriptor holds: the same file, or the same device.
///
/// # Errors
/// The path leads nowhere, or cannot be looked at.
pub fn leads_to(path: &Path, held: &File) -> io::Result<bool> {
    let (there, here) = (std::fs::metadata(path)?, held.metadata()?);
    let (a, b) = (there.file_type(), here.file_type());
    if a.is_block_device() && b.is_block_device() {
        return Ok(there.rdev() == here.rdev());
    }
    Ok(a == b && there.dev() == here.dev() && there.ino() == here.ino())
}

/// This boot's id; zeros where the system tells none.
pub fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    u128::from_str_radix(&text.trim().replace('-', ""), 16).map_or([0; 16], u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_to_the_file_until_another_takes_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("disk"), dir.path().join("other"));
        let held = File::create(&path).unwrap();
        File::create(&other).unwrap();
        assert!(leads_to(&path, &held).unwrap());
        std::fs::rename(&other, &path).unwrap();
        assert!(!leads_to(&path, &held).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(leads_to(&path, &held).is_err());
        assert_ne!(boot_id(), [0; 16]);
    }
}
