//! Guarded: what no restore may write to: directories of daemons, replicas, and disks that are captured.
//!
//! Places are compared by device and inode, never by their text: a path may lead through symbolic links or
//! bind mounts, and a file may have several names.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{Error, ErrorKind, Result};

/// Entries below the guarded directories that are looked at: a bound, far above what a receiver makes.
const MAX_ENTRIES: usize = 1 << 20;
/// Devices below a device: loop devices, partitions, device mapper.
const MAX_DEPTH: usize = 16;

/// What a ring begins with (`kfilter::abi::MAGIC`); this room does not import that one.
const RING_MAGIC: &[u8; 8] = b"AFIMRING";

/// Device number and inode.
type Node = (u64, u64);

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Guarded {
    dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

/// The same as found on disk now.
pub(super) struct Found {
    dirs: BTreeSet<Node>,
    files: BTreeSet<Node>,
    /// Device numbers of guarded block devices.
    devices: BTreeSet<u64>,
}

impl Guarded {
    /// Guards a directory and all that lies below it. One that does not exist is fine.
    pub fn dir(&mut self, path: impl Into<PathBuf>) {
        self.dirs.push(path.into());
    }

    /// Guards one file or block device.
    pub fn file(&mut self, path: impl Into<PathBuf>) {
        self.files.push(path.into());
    }

    /// Guards what another guards, too.
    pub fn add(&mut self, other: &Guarded) {
        self.dirs.extend_from_slice(&other.dirs);
        self.files.extend_from_slice(&other.files);
    }

    /// Looks at the disk.
    pub(super) fn find(&self) -> Found {
        let mut found = Found { dirs: BTreeSet::new(), files: BTreeSet::new(), devices: BTreeSet::new() };
        self.files.iter().for_each(|path| found.add(path));
        let mut ahead: Vec<PathBuf> = self.dirs.clone();
        let mut left = MAX_ENTRIES;
        while let Some(dir) = ahead.pop() {
            // A name that leads nowhere, or that we may not read, holds nothing that a restore could reach
            // through it.
            let Ok(metadata) = fs::metadata(&dir) else { continue };
            if !found.dirs.insert(node(&metadata)) {
                continue;
            }
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                left = left.saturating_sub(1);
                if left == 0 {
                    return found;
                }
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => ahead.push(entry.path()),
                    Ok(kind) if kind.is_file() => found.add(&entry.path()),
                    _ => {}
                }
            }
        }
        found
    }
}

impl Found {
    fn add(&mut self, path: &Path) {
        let Ok(metadata) = fs::metadata(path) else { return };
        if metadata.file_type().is_block_device() {
            self.devices.insert(metadata.rdev());
        } else {
            self.files.insert(node(&metadata));
        }
    }

    /// Refuses a file that is to lie in `dir`, a canonical path.
    pub(super) fn refuse_in(&self, dir: &Path, shown: &Path) -> Result<()> {
        for above in dir.ancestors() {
            if fs::metadata(above).is_ok_and(|metadata| self.dirs.contains(&node(&metadata))) {
                return refuse(shown, format!("lies inside {}, a directory of a daemon", above.display()));
            }
            if is_a_daemons(above) {
                return refuse(
                    shown,
                    format!("lies inside {}, a directory of another daemon", above.display()),
                );
            }
        }
        Ok(())
    }

    /// Refuses a file that has the inode of a guarded one, whatever its name is.
    pub(super) fn refuse_file(&self, path: &Path, shown: &Path) -> Result<()> {
        let is_ours = fs::metadata(path).is_ok_and(|metadata| self.files.contains(&node(&metadata)));
        match is_ours {
            true => refuse(shown, "is a replica, a captured disk or another file of a daemon".to_owned()),
            false => Ok(()),
        }
    }

    /// Refuses a device that is guarded, or that stands on a guarded device or file.
    pub(super) fn refuse_device(&self, device: u64, shown: &Path) -> Result<()> {
        let mut ahead = vec![(device, 0)];
        while let Some((device, depth)) = ahead.pop() {
            if self.devices.contains(&device) {
                return refuse(shown, "is a replica or a captured disk, or stands on one".to_owned());
            }
            if depth == MAX_DEPTH {
                continue;
            }
            let Ok(home) = fs::canonicalize(sysfs(device)) else { continue };
            if let Some(file) = backing_file(&home) {
                let dir = file.parent().unwrap_or(Path::new("/"));
                let over = |what| refuse(shown, format!("is a device over {}, {what}", file.display()));
                if self.refuse_file(&file, shown).is_err() {
                    return over("a replica, a captured disk or another file of a daemon");
                }
                let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_path_buf());
                if self.refuse_in(&dir, shown).is_err() {
                    return over("which lies in a directory of a daemon");
                }
                ahead.extend(fs::metadata(&file).ok().filter(is_device).map(|m| (m.rdev(), depth + 1)));
            }
            let below = fs::read_dir(home.join("slaves")).into_iter().flatten().flatten();
            let whole =
                home.join("partition").exists().then(|| home.parent().map(Path::to_path_buf)).flatten();
            let below = below.map(|entry| entry.path()).chain(whole);
            ahead.extend(below.filter_map(|home| Some((number(&home)?, depth + 1))));
        }
        Ok(())
    }
}

/// Whether a directory is one that a daemon of ours works in, also one that this process knows nothing of: a
/// source's, a receiver's, a group's, an identity's or a ring's.
fn is_a_daemons(dir: &Path) -> bool {
    let holds = |name: &str| dir.join(name).exists();
    let is_group = holds("group") && holds("journal") && holds("lock");
    let is_home = holds("identity/identity.pem") && (holds("journal") || holds("groups") || holds("state"));
    let is_ring = || {
        let mut magic = [0; 8];
        let read = fs::File::open(dir.join("ring")).and_then(|file| file.read_at(&mut magic, 0));
        read.is_ok_and(|got| got == magic.len()) && magic == *RING_MAGIC
    };
    is_group || is_home || holds("identity.pem") || (dir.join("ring").is_file() && is_ring())
}

fn is_device(metadata: &fs::Metadata) -> bool {
    metadata.file_type().is_block_device()
}

fn refuse(shown: &Path, what: String) -> Result<()> {
    let at = format!("{} {what}; restore to another place", shown.display());
    Err(Error::new(ErrorKind::Usage, at))
}

fn node(metadata: &fs::Metadata) -> Node {
    (metadata.dev(), metadata.ino())
}

fn sysfs(device: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

fn number(home: &Path) -> Option<u64> {
    let text = fs::read_to_string(home.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// The file behind a loop device.
fn backing_file(home: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(home.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_behind_links_and_second_names() {
        let home = tempfile::tempdir().unwrap();
        let ours = home.path().join("receiver/groups/g");
        fs::create_dir_all(&ours).unwrap();
        fs::write(ours.join("group"), "state").unwrap();
        std::os::unix::fs::symlink(&ours, home.path().join("link")).unwrap();
        fs::hard_link(ours.join("group"), home.path().join("second")).unwrap();
        let mut guarded = Guarded::default();
        guarded.dir(home.path().join("receiver"));
        guarded.dir(home.path().join("never made"));
        let found = guarded.find();
        let shown = Path::new("x");
        let link = fs::canonicalize(home.path().join("link")).unwrap();
        assert!(found.refuse_in(&link, shown).is_err());
        assert!(found.refuse_in(&ours.join("undo"), shown).is_err());
        assert!(found.refuse_in(home.path(), shown).is_ok());
        assert!(found.refuse_file(&home.path().join("second"), shown).is_err());
        assert!(found.refuse_file(&home.path().join("third"), shown).is_ok());
        let others = home.path().join("other");
        fs::create_dir_all(others.join("identity")).unwrap();
        fs::create_dir_all(others.join("journal")).unwrap();
        assert!(found.refuse_in(&others.join("journal"), shown).is_ok());
        fs::write(others.join("identity/identity.pem"), "key").unwrap();
        assert!(found.refuse_in(&others.join("journal"), shown).is_err(), "another daemon's");
        assert!(found.refuse_in(&others.join("identity"), shown).is_err());
    }
}
