//! The flock that says who uses a group's directory: the daemon, or one command on a bare directory.
//!
//! It stands before everything else that touches `groups/NAME/`: journal, undo and control file have one
//! owner, and two would each be right about a different file. The lock belongs to the open file, so a killed
//! process leaves none behind. The file holds the owner's process id, for the error message only.
//!
//! Locking never needs room. The directory itself is locked first, which works on a full and on a read-only
//! file system; then the file `lock`, which is what programs before this rule look at, where it can be
//! opened. The process id is written where there is room for it.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result, is_full};

/// Name of the lock file inside a group's directory.
const FILE: &str = "lock";
/// The process id in the lock file, padded to this length: it is written over in place.
const HOLDER_BYTES: usize = 10;

/// A group's directory is ours as long as this lives.
#[derive(Debug)]
pub struct GroupLock {
    /// The directory, and the lock file where it could be opened.
    files: Vec<File>,
    path: PathBuf,
}

impl GroupLock {
    /// Takes the lock of `group_dir`, at once or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] naming the process that holds it; [`ErrorKind::Io`] where the directory cannot be
    /// opened.
    pub fn take(group_dir: &Path) -> Result<GroupLock> {
        let path = group_dir.join(FILE);
        let io = |source| Error::io(format!("open lock {}", path.display()), source);
        let busy = |holder| Error::new(ErrorKind::Busy, format!("{} is in use{holder}", group_dir.display()));
        let directory = File::open(group_dir).map_err(io)?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            // A network file system locks only what is open for writing: then the file alone decides.
            Ok(()) | Err(Errno::BADF | Errno::OPNOTSUPP | Errno::NOLCK) => {}
            Err(Errno::WOULDBLOCK) => return Err(busy(holder(File::open(&path).ok()))),
            Err(errno) => return Err(io(errno.into())),
        }
        let mut files = vec![directory];
        if let Some(file) = open(&path).map_err(io)? {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => write_holder(&file),
                Err(Errno::WOULDBLOCK) => return Err(busy(holder(Some(file)))),
                // Open for reading on a network file system.
                Err(Errno::BADF) => {}
                Err(errno) => return Err(io(errno.into())),
            }
            files.push(file);
        }
        Ok(GroupLock { files, path })
    }
}

impl Drop for GroupLock {
    fn drop(&mut self) {
        // Closing a file releases its lock too; said here so that the order against other fields does not
        // matter.
        for file in self.files.iter().rev() {
            match flock(file, FlockOperation::Unlock) {
                Ok(()) | Err(Errno::BADF | Errno::OPNOTSUPP | Errno::NOLCK) => {}
                Err(errno) => tracing::warn!(path = %self.path.display(), %errno, "cannot release the lock"),
            }
        }
    }
}

/// The lock file, for reading where it cannot be written; none where it is missing and cannot be made.
fn open(path: &Path) -> std::io::Result<Option<File>> {
    let cannot_write =
        |error: &std::io::Error| is_full(error) || error.kind() == std::io::ErrorKind::ReadOnlyFilesystem;
    match OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if cannot_write(&error) => match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// For the message of another one alone, so a full or a read-only file system is no reason to refuse. Nothing
/// is cut off first: what is written over in place mostly has its room.
fn write_holder(file: &File) {
    let holder = format!("{:<HOLDER_BYTES$}", std::process::id());
    if let Err(error) = file.write_all_at(holder.as_bytes(), 0).and_then(|()| {
        let end = file.metadata()?.len();
        if end > HOLDER_BYTES as u64 { file.set_len(HOLDER_BYTES as u64) } else { Ok(()) }
    }) {
        tracing::debug!(%error, "the lock file does not name this process");
    }
}

/// Who holds the lock, as far as the file says: its owner may be between taking the lock and writing its id.
fn holder(file: Option<File>) -> String {
    let mut text = String::new();
    let read = file.and_then(|file| file.take(20).read_to_string(&mut text).ok());
    match read.and_then(|_| text.trim().parse::<u32>().ok()) {
        Some(pid) => format!(" by process {pid}: stop it first"),
        None => " by another process: stop it first".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_taker_is_refused_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        // What a process of a longer name left.
        std::fs::write(dir.path().join(FILE), "123456789012345").unwrap();
        let first = GroupLock::take(dir.path()).unwrap();
        let refused = GroupLock::take(dir.path()).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Busy);
        let pid = std::process::id().to_string();
        assert!(refused.to_string().contains(&format!("process {pid}:")), "{refused} does not name {pid}");
        drop(first);
        GroupLock::take(dir.path()).unwrap();
    }

    #[test]
    fn the_lock_file_of_an_older_program_counts() {
        let dir = tempfile::tempdir().unwrap();
        let old = File::create(dir.path().join(FILE)).unwrap();
        flock(&old, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert_eq!(GroupLock::take(dir.path()).unwrap_err().kind, ErrorKind::Busy);
        drop(old);
        GroupLock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_missing_directory_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no-such-group");
        let error = GroupLock::take(&missing).unwrap_err();
        assert!(error.to_string().contains("no-such-group"), "{error}");
    }
}
