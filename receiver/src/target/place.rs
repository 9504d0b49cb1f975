//! Place: what stands under a target's name, and whether a restore may write there.
//!
//! Only regular files and block devices are written to. A name in /dev that is no device would be a file in
//! memory, gone at the next boot: it is refused, as is every file system that holds no files of its own.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::guarded::Guarded;
use crate::{Error, ErrorKind, Result};

/// File systems on which a file is no file: nothing of it lies on a disk, or the kernel gives it another
/// meaning.
const UNREAL: &[&str] = &[
    "devtmpfs",
    "proc",
    "sysfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
    "mqueue",
    "bpf",
    "pstore",
    "efivarfs",
    "binfmt_misc",
    "fusectl",
    "hugetlbfs",
    "selinuxfs",
    "nsfs",
    "autofs",
];

/// Where a target really lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The path, symbolic links followed.
    pub path: PathBuf,
    /// A block device, not a file.
    pub is_device: bool,
    /// Something is there already.
    pub exists: bool,
}

impl Place {
    /// Follows a name.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for everything that no restore writes to.
    pub fn find(path: &Path) -> Result<Place> {
        let shown = path.display();
        let usage = |what: &str| Err(Error::new(ErrorKind::Usage, format!("{shown} {what}")));
        let failed = |e| Error::io(format!("look at {shown}"), e);
        let (real, metadata) = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_symlink() => {
                let Ok(real) = fs::canonicalize(path) else {
                    return usage("is a symbolic link that leads nowhere; name a file or a block device");
                };
                let metadata = fs::metadata(&real).map_err(failed)?;
                (real, Some(metadata))
            }
            Ok(metadata) => (path.to_path_buf(), Some(metadata)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => (path.to_path_buf(), None),
            Err(e) => return Err(failed(e)),
        };
        let exists = metadata.is_some();
        if let Some(metadata) = metadata {
            let kind = metadata.file_type();
            if kind.is_block_device() {
                return Ok(Place { path: real, is_device: true, exists });
            }
            if !kind.is_file() {
                let what = match () {
                    () if kind.is_dir() => "a directory",
                    () if kind.is_char_device() => "a character device",
                    () if kind.is_fifo() => "a FIFO",
                    () if kind.is_socket() => "a socket",
                    () => "of an unknown kind",
                };
                return usage(&format!(
                    "is {what}: a restore writes only to a regular file or a block device"
                ));
            }
        }
        let Some(name) = real.file_name() else { return usage("names no file") };
        let dir = real.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let Ok(dir) = fs::canonicalize(dir) else {
            return usage("lies in a directory that does not exist; make it first");
        };
        refuse_unreal(&dir, path)?;
        Ok(Place { path: dir.join(name), is_device: false, exists })
    }

    /// Refuses what is guarded.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`].
    pub fn refuse_guarded(&self, guarded: &Guarded, shown: &Path) -> Result<()> {
        let found = guarded.find();
        if self.is_device {
            let metadata =
                fs::metadata(&self.path).map_err(|e| Error::io(format!("look at {}", shown.display()), e))?;
            return found.refuse_device(metadata.rdev(), shown);
        }
        found.refuse_in(self.path.parent().unwrap_or(Path::new("/")), shown)?;
        found.refuse_file(&self.path, shown)
    }
}

/// Refuses to make anything in a directory that is no place for files, or in one of a daemon.
///
/// # Errors
/// [`ErrorKind::Usage`].
pub fn refuse_dir(dir: &Path, guarded: &Guarded) -> Result<()> {
    // What is not there yet is made in the nearest directory above that is.
    let there = dir.ancestors().find_map(|above| fs::canonicalize(above).ok());
    let there = there.unwrap_or_else(|| PathBuf::from("/"));
    refuse_unreal(&there, dir)?;
    guarded.find().refuse_in(&there, dir)
}

fn refuse_unreal(dir: &Path, shown: &Path) -> Result<()> {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    let (here, dev) = (device(dir), device(Path::new("/dev")));
    let kind = here.and_then(file_system);
    let kind = kind.as_deref().unwrap_or("");
    let in_dev = here == dev && (dir.starts_with("/dev") || kind == "tmpfs");
    if !in_dev && !UNREAL.contains(&kind) {
        return Ok(());
    }
    let at = format!(
        "{} is no device, and a file in {} would not be on a disk: is the device there, and is its name right?",
        shown.display(),
        dir.display()
    );
    Err(Error::new(ErrorKind::Usage, at))
}

/// The kind of the mounted file system with this device number.
fn file_system(device: u64) -> Option<String> {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&*number))?;
    mount.split_once(" - ")?.1.split(' ').next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: impl AsRef<Path>) -> String {
        let error = Place::find(path.as_ref()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage, "{error}");
        error.to_string()
    }

    #[test]
    fn only_files_and_block_devices_are_places() {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        assert!(refused("/dev/null").contains("character device"));
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        assert!(refused(path("fifo")).contains("a FIFO"));
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        assert!(refused(path("socket")).contains("a socket"));
        assert!(refused(home.path()).contains("a directory"));
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, path(name)).unwrap();
        link("/dev/null", "to null");
        assert!(refused(path("to null")).contains("character device"));
        link("nothing", "to nothing");
        assert!(refused(path("to nothing")).contains("leads nowhere"));
        assert!(refused(path("missing/file")).contains("does not exist"));
        fs::write(path("file"), "x").unwrap();
        link("file", "to file");
        let real = fs::canonicalize(path("file")).unwrap();
        assert_eq!(
            Place::find(&path("to file")).unwrap(),
            Place { path: real, is_device: false, exists: true }
        );
        assert!(!Place::find(&path("new")).unwrap().exists);
    }

    #[test]
    fn a_missing_device_is_no_place_for_a_file() {
        for path in ["/dev/afterimage-is-not-there", "/proc/self/x", "/sys/x", "/sys/kernel/x"] {
            assert!(refused(path).contains("is no device"), "{path}");
        }
        assert!(refuse_dir(Path::new("/dev/restored/here"), &Guarded::default()).is_err());
        assert!(refuse_dir(Path::new("/tmp/not/there/yet"), &Guarded::default()).is_ok());
    }
}
