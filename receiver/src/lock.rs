//! The flock that says who uses a group's directory: the daemon, or one command on a bare directory.
//!
//! It stands before everything else that touches `groups/NAME/`: journal, undo and control file have one owner, and
//! two would each be right about a different file. The lock belongs to the open file, so a killed process leaves none
//! behind. The file holds the owner's process id, for the error message only.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, ErrorKind, Result};

/// Name of the lock file inside a group's directory.
const FILE: &str = "lock";

/// A group's directory is ours as long as this lives.
#[derive(Debug)]
pub struct GroupLock {
    file: File,
    path: PathBuf,
}

impl GroupLock {
    /// Takes the lock of `group_dir`, at once or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] naming the process that holds it; [`ErrorKind::Io`] where the file cannot be opened.
    pub fn take(group_dir: &Path) -> Result<GroupLock> {
        let path = group_dir.join(FILE);
        let io = |source| Error::io(format!("open lock {}", path.display()), source);
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
        let mut file = options.open(&path).map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = format!("{} is in use{}", group_dir.display(), holder(&mut file));
                return Err(Error::new(ErrorKind::Busy, what));
            }
            Err(errno) => return Err(io(errno.into())),
        }
        write_holder(&mut file).map_err(io)?;
        Ok(GroupLock { file, path })
    }
}

impl Drop for GroupLock {
    fn drop(&mut self) {
        // Closing the file releases the lock too; said here so that the order against other fields does not matter.
        if let Err(errno) = flock(&self.file, FlockOperation::Unlock) {
            tracing::warn!(path = %self.path.display(), %errno, "cannot release the lock");
        }
    }
}

fn write_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all(std::process::id().to_string().as_bytes())
}

/// Who holds the lock, as far as the file says: its owner may be between taking the lock and writing its id.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(20).read_to_string(&mut text);
    match read.ok().and_then(|_| text.trim().parse::<u32>().ok()) {
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
        let first = GroupLock::take(dir.path()).unwrap();
        let refused = GroupLock::take(dir.path()).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Busy);
        let pid = std::process::id().to_string();
        assert!(refused.to_string().contains(&pid), "{refused} does not name {pid}");
        drop(first);
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
