//! Modes: what this program makes is for its owner only, whatever the umask is that it was started with.
//!
//! Journals, undo and replicas hold what the disks hold. Directories given by the operator keep their modes:
//! they may be mount points, and others may have a socket or a key to reach in them; what lies in them is
//! ours to close.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::Mode;

/// Directories below a daemon's that hold content.
const CONTENT: [&str; 3] = ["groups", "replica", "journal"];
/// Group and others.
const OTHERS: u32 = 0o077;
/// Directories within directories: groups, their undo, their indexes.
const MAX_DEPTH: usize = 8;

/// From here on files are made with 0600 and directories with 0700.
pub fn for_the_owner_only() {
    rustix::process::umask(Mode::from_raw_mode(OTHERS));
}

/// Takes from others what an earlier version, or a copy, left readable to them below a daemon's directory.
/// What cannot be changed is told; it keeps no daemon from starting.
pub fn tighten(dir: &Path) {
    let mut count = 0;
    for name in CONTENT {
        tighten_below(&dir.join(name), MAX_DEPTH, &mut count);
    }
    if count > 0 {
        tracing::warn!(dir = %dir.display(), count, "others could read files here; they are for their owner only now");
    }
}

fn tighten_below(path: &Path, depth: usize, count: &mut usize) {
    let Ok(metadata) = fs::symlink_metadata(path) else { return };
    let is_content = metadata.is_file() || metadata.is_dir();
    if !is_content || metadata.uid() != rustix::process::geteuid().as_raw() {
        return;
    }
    if metadata.mode() & OTHERS != 0 {
        match fs::set_permissions(path, Permissions::from_mode(metadata.mode() & 0o7777 & !OTHERS)) {
            Ok(()) => *count += 1,
            Err(error) => tracing::warn!(path = %path.display(), %error, "others can read this"),
        }
    }
    if metadata.is_dir() && depth > 0 {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.for_each(|entry| tighten_below(&entry.path(), depth - 1, count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_could_read_is_closed_and_the_rest_is_left() {
        let home = tempfile::tempdir().unwrap();
        let deep = home.path().join("groups/g/undo");
        fs::create_dir_all(&deep).unwrap();
        let open = |path: &Path| {
            fs::write(path, "x").unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        };
        let (ours, theirs) = (deep.join("1.undo"), home.path().join("disk.img"));
        open(&ours);
        open(&theirs);
        fs::set_permissions(&deep, Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink(&theirs, home.path().join("groups/link")).unwrap();
        tighten(home.path());
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&ours), mode(&deep), mode(&theirs)), (0o600, 0o700, 0o644));
    }
}
