//! Target: where a restore writes to; a file that gets its name at the end, or a block device.
//!
//! ```text
//! 1 PATH.partial is made (O_EXCL) and locked        a second restore, of whichever process, finds the lock
//! 2 content, then sync                              all targets of a restore, before the first gets its name
//! 3 PATH.partial becomes PATH, its directory synced what is there is replaced on request only
//! ```
//! A restore that was stopped never looks like one that was not. A lock goes with its process: what lies
//! there without one is a left-over. A device is held exclusively; it has no second name, so what was stopped
//! there is told.

mod guarded;
mod place;

use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::io::{Disk, File};
use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::replica::ReplicaHold;
use crate::undo::is_zero;
use crate::{Error, ErrorKind, Result};

pub use guarded::Guarded;
pub use place::{Place, refuse_dir};

/// Grain at which zeros are left out.
const BLOCK_BYTES: usize = 4096;

/// A device is made zeros in pieces of this size, so that a restore can be ended meanwhile.
const ZERO_BYTES: u64 = 256 << 20;

/// A target being written.
pub struct Target {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// The temporary name; `None` for a device.
    partial: Option<PathBuf>,
    /// What is there may be replaced.
    force: bool,
    file: Arc<dyn File>,
    written_bytes: u64,
    /// Lock of the temporary file.
    lock: Option<fs::File>,
    _hold: Option<ReplicaHold>,
}

/// Says whether a restore may write to `place`; changes nothing. `shown` is its name as it was given.
///
/// # Errors
/// [`ErrorKind::Usage`] where something is there and `force` is not given, where it is guarded, or a device
/// is too small; [`ErrorKind::Busy`] where it is mounted or in use; [`ErrorKind::NotPossible`] where it is
/// being restored to.
pub fn check(place: &Place, shown: &Path, size_bytes: u64, force: bool, guarded: &Guarded) -> Result<()> {
    place.refuse_guarded(guarded, shown)?;
    if !place.is_device {
        let partial = partial_path(&place.path);
        if let Some(left) = open_left(&partial)? {
            lock_partial(&left, &partial)?;
            if !force {
                return Err(left_over(&partial));
            }
        }
    }
    if !place.exists {
        return Ok(());
    }
    let shown = shown.display();
    if !force {
        let at = format!("{shown} exists; it is overwritten only with --force");
        return Err(Error::new(ErrorKind::Usage, at));
    }
    refuse_used(&place.path)?;
    ReplicaHold::acquire(&place.path)?;
    if place.is_device {
        let file = fs::File::open(&place.path).map_err(|e| Error::io(format!("open {shown}"), e))?;
        let have = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|e| Error::io(format!("size of {shown}"), e.into()))?;
        if have < size_bytes {
            let at = format!("{shown} has {have} bytes, {size_bytes} are needed");
            return Err(Error::new(ErrorKind::Usage, at));
        }
    }
    Ok(())
}

/// Says whether a file on a disk of its own (a simulated one) may be written.
///
/// # Errors
/// [`ErrorKind::Usage`] where something is there and `force` is not given.
pub fn check_apart(disk: &dyn Disk, path: &Path, force: bool) -> Result<()> {
    let is_there = disk.open_read(path).is_ok() || disk.open_read(&partial_path(path)).is_ok();
    if is_there && !force {
        let at = format!("{} exists; it is overwritten only with --force", path.display());
        return Err(Error::new(ErrorKind::Usage, at));
    }
    Ok(())
}

/// Refuses what others use: mounted, under a loop device or another device, or open for writing in another
/// process.
fn refuse_used(path: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("look who uses {}", path.display()), e);
    let file = fs::File::open(path).map_err(failed)?;
    let users = machine::disk::users_of(&file).map_err(failed)?;
    if users.is_empty() {
        return Ok(());
    }
    let told = machine::disk::users::told(&users);
    let at = format!("{} is in use: {told}; end that use, or restore to another place", path.display());
    Err(Error::new(ErrorKind::Busy, at))
}

/// The name of a file that is not whole yet.
fn partial_path(path: &Path) -> PathBuf {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    PathBuf::from(partial)
}

fn left_over(partial: &Path) -> Error {
    let at = format!(
        "{} exists, left by a restore that was stopped, or made by others: it is removed only with --force",
        partial.display()
    );
    Error::new(ErrorKind::Usage, at)
}

/// A file under the temporary name, if there is one.
fn open_left(partial: &Path) -> Result<Option<fs::File>> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::open(partial, flags, Mode::empty()) {
        Ok(descriptor) => fs::File::from(descriptor),
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(Error::io(format!("open {}", partial.display()), e.into())),
    };
    if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(Some(file));
    }
    let at = format!("{} is in the way and no file: move it, or restore to another place", partial.display());
    Err(Error::new(ErrorKind::Usage, at))
}

fn lock_partial(file: &fs::File, partial: &Path) -> Result<()> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => {
            let at = format!(
                "{} is being written by another restore: wait for it, or end it, or restore to another place",
                partial.display()
            );
            Err(Error::new(ErrorKind::NotPossible, at))
        }
        Err(e) => Err(Error::io(format!("lock {}", partial.display()), e.into())),
    }
}

/// Makes the temporary file, which is ours alone as long as the value lives.
fn make_partial(partial: &Path, force: bool) -> Result<fs::File> {
    let failed = |e: Errno| Error::io(format!("create {}", partial.display()), e.into());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::open(partial, flags, Mode::RUSR | Mode::WUSR) {
        Ok(descriptor) => {
            let file = fs::File::from(descriptor);
            lock_partial(&file, partial)?;
            return Ok(file);
        }
        Err(Errno::EXIST) => {}
        Err(e) => return Err(failed(e)),
    }
    if let Some(left) = open_left(partial)? {
        lock_partial(&left, partial)?;
        if !force {
            return Err(left_over(partial));
        }
        // Under its lock: it belongs to no restore that runs.
        rustix::fs::unlink(partial).map_err(failed)?;
    }
    let descriptor = rustix::fs::open(partial, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    let file = fs::File::from(descriptor);
    lock_partial(&file, partial)?;
    Ok(file)
}

impl Target {
    /// Opens a target that [`check`] accepted; it reads as zeros from here on. `go_on` is asked while a
    /// device is made zeros.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], [`ErrorKind::NotPossible`], [`ErrorKind::NoSpace`], [`ErrorKind::Io`]; what
    /// `go_on` says.
    pub fn create(
        disk: &Arc<dyn Disk>,
        place: &Place,
        size_bytes: u64,
        force: bool,
        go_on: impl Fn() -> Result<()>,
    ) -> Result<Target> {
        let path = place.path.clone();
        let failed = |e| Error::io(format!("create {}", path.display()), e);
        let disk = Arc::clone(disk);
        if place.is_device {
            let hold = Some(ReplicaHold::acquire(&path)?);
            let file = disk.open(&path).map_err(failed)?;
            let mut at = 0;
            while at < size_bytes {
                go_on()?;
                let end = size_bytes.min(at + ZERO_BYTES);
                file.punch_hole(at..end).map_err(failed)?;
                at = end;
            }
            return Ok(Target {
                disk,
                path,
                partial: None,
                force,
                file,
                written_bytes: 0,
                lock: None,
                _hold: hold,
            });
        }
        let partial = partial_path(&path);
        let (file, lock) = if disk.is_machine() {
            let lock = make_partial(&partial, force)?;
            (disk.open(&partial).map_err(failed)?, Some(lock))
        } else {
            match disk.remove(&partial) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
                _ => (disk.create(&partial).map_err(failed)?, None),
            }
        };
        let target =
            Target { disk, path, partial: Some(partial), force, file, written_bytes: 0, lock, _hold: None };
        let failed = |e| Error::io(format!("create {}", target.path.display()), e);
        target.file.set_size(size_bytes).map_err(failed)?;
        Ok(target)
    }

    fn failed(&self, offset: u64, source: std::io::Error) -> Error {
        Error::io(format!("write {} at byte {offset}", self.path.display()), source)
    }

    /// Writes over whatever is there.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`], [`ErrorKind::Io`].
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(bytes, offset).map_err(|e| self.failed(offset, e))?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Asks the kernel to write a range back.
    ///
    /// # Errors
    /// As [`Target::write`].
    pub fn start_writeback(&mut self, range: Range<u64>) -> Result<()> {
        let start = range.start;
        self.file.start_writeback(range).map_err(|e| self.failed(start, e))
    }

    /// Writes where only zeros are yet: zeros are left out.
    ///
    /// # Errors
    /// As [`Target::write`].
    pub fn write_sparse(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let mut from = 0;
        let mut at = 0;
        while at < bytes.len() {
            let end = bytes.len().min(at + BLOCK_BYTES);
            if is_zero(&bytes[at..end]) {
                if from < at {
                    self.write(&bytes[from..at], offset + from as u64)?;
                }
                from = end;
            }
            at = end;
        }
        if from < bytes.len() {
            self.write(&bytes[from..], offset + from as u64)?;
        }
        Ok(())
    }

    /// Makes a range zeros again.
    ///
    /// # Errors
    /// As [`Target::write`].
    pub fn zero(&mut self, range: Range<u64>) -> Result<()> {
        let start = range.start;
        self.file.punch_hole(range).map_err(|e| self.failed(start, e))
    }

    /// Bytes written so far.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Makes what was written durable. Of several targets all are synced before the first gets its name, so
    /// that hardly anything is left that could leave a set of which only some were replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|e| Error::sync(format!("sync {}", self.path.display()), e))
    }

    /// Gives a synced file its name; durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where something has come under that name meanwhile; [`ErrorKind::Busy`] where
    /// others replaced the temporary file; [`ErrorKind::Sync`], [`ErrorKind::Io`].
    pub fn finish(mut self) -> Result<u64> {
        if let Some(partial) = &self.partial {
            self.rename(partial)?;
            self.partial = None;
            let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            self.disk.sync_dir(dir).map_err(|e| Error::sync(format!("sync {}", dir.display()), e))?;
        }
        Ok(self.written_bytes)
    }

    fn rename(&self, partial: &Path) -> Result<()> {
        let path = &self.path;
        let failed = |e| Error::io(format!("rename {} to {}", partial.display(), path.display()), e);
        let Some(lock) = &self.lock else { return self.disk.rename(partial, path).map_err(failed) };
        if !is_same_file(lock, partial) {
            let at = format!("{} was replaced while it was being written", partial.display());
            return Err(Error::new(ErrorKind::Busy, at));
        }
        if self.force {
            return self.disk.rename(partial, path).map_err(failed);
        }
        let cwd = rustix::fs::CWD;
        match rustix::fs::renameat_with(cwd, partial, cwd, path, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            // Not every file system has it: then there is a moment between the look and the rename.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if !path.exists() => {
                self.disk.rename(partial, path).map_err(failed)
            }
            Err(Errno::EXIST | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                let at = format!(
                    "{} came into being while it was restored; it is overwritten only with --force",
                    path.display()
                );
                Err(Error::new(ErrorKind::Usage, at))
            }
            Err(e) => Err(failed(e.into())),
        }
    }

    /// What a restore leaves that does not come to its end, in words; nothing of a file.
    pub fn left(&self) -> Option<String> {
        let shown = self.path.display();
        self.partial
            .is_none()
            .then(|| format!("{shown} holds a part of the point, or nothing; do not use it"))
    }
}

fn is_same_file(file: &fs::File, path: &Path) -> bool {
    let node = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (Ok(ours), Ok(there)) = (file.metadata(), fs::symlink_metadata(path)) else { return false };
    node(ours) == node(there)
}

impl Drop for Target {
    fn drop(&mut self) {
        let Some(partial) = &self.partial else { return };
        // One that others put there is not ours to remove.
        if self.lock.as_ref().is_some_and(|lock| !is_same_file(lock, partial)) {
            return;
        }
        if let Err(error) = self.disk.remove(partial) {
            tracing::warn!(path = %partial.display(), %error, "an unfinished restore stays under its temporary name");
        }
    }
}

#[cfg(test)]
mod tests;
