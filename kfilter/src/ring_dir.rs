//! The directory of a ring: made by us, ours alone, and reached through no link of others.
//!
//! What passes through a ring is the content of disks, and a ring that was changed is one that redoes other
//! writes. So the directory belongs to this user and to no other, with mode 0700; nobody else may write it,
//! nor take it away from the directory above it. Files in it are opened by the directory's descriptor, and
//! never through a link.

use super::error::{Error, ErrorKind};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, fstatfs, openat, renameat, unlinkat};
use rustix::io::Errno;
use std::format;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::string::{String, ToString as _};
use std::vec::Vec;

const TMPFS_MAGIC: i128 = 0x0102_1994;
const RAMFS_MAGIC: i128 = 0x8584_58f6;

/// Bits of a mode by which others may write, and the one that keeps them from names that are not theirs.
const OTHERS_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// See the module.
#[derive(Debug)]
pub struct RingDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl RingDir {
    /// Opens a directory, and makes it, and those above it, where they are missing. An own one that others
    /// may read is closed to them.
    ///
    /// Refused with `NotInMemory`; with `NotOurs`, saying whose it is; with what the system says.
    pub fn open_or_make(path: &Path) -> Result<Self, Error> {
        if fs::symlink_metadata(path).is_err() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at(path))?;
        }
        let dir = Self::open(path)?;
        let mode = fstat(&dir.fd).map_err(|errno| at(path)(errno.into()))?.st_mode;
        if mode & 0o077 != 0 {
            rustix::fs::fchmod(&dir.fd, Mode::RWXU).map_err(|errno| at(path)(errno.into()))?;
        }
        Ok(dir)
    }

    /// Opens a directory that exists.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::LOOP | Errno::NOTDIR => not_ours(path, "is a link or a file"),
            errno => at(path)(errno.into()),
        })?;
        let kind = fstatfs(&fd).map_err(|errno| at(path)(errno.into()))?.f_type;
        if !is_memory(kind) {
            return Err(Error { kind: ErrorKind::NotInMemory, at: path.to_path_buf(), source: None });
        }
        check_way(path.parent().unwrap_or(Path::new("/")))?;
        let found = fstat(&fd).map_err(|errno| at(path)(errno.into()))?;
        let us = rustix::process::geteuid().as_raw();
        if found.st_uid != us {
            return Err(not_ours(path, &format!("belongs to user {}", found.st_uid)));
        }
        if found.st_mode & OTHERS_WRITE != 0 {
            return Err(not_ours(path, "may be written by others"));
        }
        Ok(Self { fd, path: path.to_path_buf() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file in it, for reading and writing; with `make` it is made where it is missing.
    pub fn file(&self, name: &str, make: bool) -> Result<File, Error> {
        let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if make {
            flags |= OFlags::CREATE;
        }
        let path = self.path.join(name);
        let file = openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| match errno {
            Errno::LOOP => not_ours(&path, "is a link"),
            errno => at(&path)(errno.into()),
        })?;
        let file = File::from(file);
        let found = file.metadata().map_err(at(&path))?;
        if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() {
            return Err(not_ours(&path, "is no file of this user"));
        }
        Ok(file)
    }

    /// Makes a file that must not exist.
    pub(crate) fn new_file(&self, name: &str) -> Result<File, Error> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
        let made = openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        made.map(File::from).map_err(|errno| at(&self.path.join(name))(errno.into()))
    }

    /// Writes a small file, in place of what it held.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let file = self.file(name, true).map_err(io::Error::other)?;
        file.set_len(0)?;
        file.write_all_at(bytes, 0)
    }

    /// Reads a small file: at most 4 KiB of it.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let file = self.file(name, false).map_err(io::Error::other)?;
        let mut bytes = std::vec![0; 4096];
        let held = file.read_at(&mut bytes, 0)?;
        bytes.truncate(held);
        Ok(bytes)
    }

    /// Takes a file's name away; fine where there is none.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(at(&self.path.join(name))(errno.into())),
        }
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        renameat(&self.fd, from, &self.fd, to).map_err(|errno| at(&self.path.join(from))(errno.into()))
    }

    /// The lock that says who owns the ring in it; `Busy` where another process does.
    pub fn lock(&self, make: bool) -> Result<File, Error> {
        let lock = self.file("ring.lock", make)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(lock),
            Err(Errno::WOULDBLOCK) => {
                Err(Error { kind: ErrorKind::Busy, at: self.path.join("ring.lock"), source: None })
            }
            Err(errno) => Err(at(&self.path.join("ring.lock"))(errno.into())),
        }
    }

    /// Names in it.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        let dir = rustix::fs::Dir::read_from(&self.fd).map_err(|errno| at(&self.path)(errno.into()))?;
        for entry in dir {
            let entry = entry.map_err(|errno| at(&self.path)(errno.into()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// Whether what is made at this path would live in memory alone: asked of what exists of it.
pub fn is_in_memory(path: &Path) -> bool {
    let nearest = path.ancestors().find(|step| step.exists());
    nearest.and_then(|step| rustix::fs::statfs(step).ok()).is_some_and(|found| is_memory(found.f_type))
}

fn is_memory(kind: impl Into<i128>) -> bool {
    [TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind.into())
}

/// Whether nobody but root and this user can put something else in the place of what lies in `dir`.
fn check_way(dir: &Path) -> Result<(), Error> {
    let us = rustix::process::geteuid().as_raw();
    let ours = |uid: u32| uid == 0 || uid == us;
    // A link on the way is followed where root or this user made it.
    for step in dir.ancestors().filter(|step| step.file_name().is_some()) {
        let found = fs::symlink_metadata(step).map_err(at(step))?;
        if found.is_symlink() && !ours(found.uid()) {
            return Err(not_ours(step, &format!("is a link of user {}", found.uid())));
        }
    }
    let real = fs::canonicalize(dir).map_err(at(dir))?;
    for step in real.ancestors().filter(|step| step.file_name().is_some()) {
        let found = fs::symlink_metadata(step).map_err(at(step))?;
        let mode = found.permissions().mode();
        if !ours(found.uid()) && mode & STICKY == 0 {
            return Err(not_ours(step, &format!("belongs to user {}", found.uid())));
        }
        if mode & OTHERS_WRITE != 0 && mode & STICKY == 0 {
            return Err(not_ours(step, "may be written by others"));
        }
    }
    Ok(())
}

fn not_ours(path: &Path, why: &str) -> Error {
    let source = Some(io::Error::new(io::ErrorKind::PermissionDenied, why.to_string()));
    Error { kind: ErrorKind::NotOurs, at: path.to_path_buf(), source }
}

/// An error of the system at a path.
pub(crate) fn at(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::Absent,
            io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Error { kind, at: path.to_path_buf(), source: Some(source) }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn home() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").expect("these tests need a tmpfs at /dev/shm")
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    }

    fn refused(path: &Path) -> String {
        let error = RingDir::open_or_make(path).expect_err("it is not ours alone");
        assert_eq!(error.kind, ErrorKind::NotOurs, "{error}");
        format!("{error}: {}", error.source.as_ref().expect("it says why"))
    }

    #[test]
    fn it_is_made_for_us_alone_and_closed_to_readers() {
        let home = home();
        let path = home.path().join("rings/group");
        let dir = RingDir::open_or_make(&path).unwrap();
        assert!(dir.names().unwrap().is_empty() && is_in_memory(&path.join("not/there")));
        assert!(!is_in_memory(Path::new("/proc/x")));
        for made in [&path, path.parent().unwrap()] {
            assert_eq!(fs::metadata(made).unwrap().mode() & 0o777, 0o700);
        }
        mode(&path, 0o755);
        RingDir::open_or_make(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_others_own_may_write_or_linked_is_refused() {
        let home = home();
        let path = home.path().join("rings");
        fs::create_dir(&path).unwrap();
        mode(&path, 0o777);
        assert!(refused(&path).contains("may be written by others"));
        assert!(refused(&path.join("group")).contains("may be written by others"), "nor below it");
        mode(&path, 0o1777);
        RingDir::open_or_make(&path.join("group")).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(path.join("group"), Some(65534), None).unwrap();
            assert!(refused(&path.join("group")).contains("belongs to user 65534"));
        }
        let link = home.path().join("link");
        symlink(home.path(), &link).unwrap();
        assert!(refused(&link).contains("is a link"));
        // One of ours on the way is followed.
        RingDir::open_or_make(&link.join("behind")).unwrap();
    }

    #[test]
    fn no_link_in_it_is_followed() {
        let home = home();
        let dir = RingDir::open_or_make(&home.path().join("rings")).unwrap();
        let victim = home.path().join("victim");
        for name in ["ring", "ring.lock", "ring.tmp"] {
            symlink(&victim, dir.path().join(name)).unwrap();
            assert_eq!(dir.file(name, true).unwrap_err().kind, ErrorKind::NotOurs);
        }
        assert!(dir.new_file("ring.tmp").is_err());
        assert!(!victim.exists());
    }
}
