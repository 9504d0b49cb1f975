//! Target: where a restore writes to; a file that gets its name at the end, or a block device.
//!
//! A file is written as `PATH.partial` and renamed when it is whole and synced, so that a restore that was stopped never
//! looks like one that was not. An existing file is only replaced on request, never one of the group's replicas.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::io::{Disk, File};

use crate::replica::{ReplicaHold, is_block_device};
use crate::undo::is_zero;
use crate::{Error, ErrorKind, Result};

/// Grain at which zeros are left out.
const BLOCK_BYTES: usize = 4096;

/// A target being written.
pub struct Target {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// The temporary name; `None` for a device.
    partial: Option<PathBuf>,
    file: Arc<dyn File>,
    written_bytes: u64,
    _hold: Option<ReplicaHold>,
}

/// Says whether a restore may write to `path`; changes nothing.
///
/// # Errors
/// [`ErrorKind::Usage`] where something is there and `force` is not given, or a device is too small; [`ErrorKind::Busy`]
/// where it is mounted, in use, or a replica.
pub fn check(disk: &dyn Disk, path: &Path, size_bytes: u64, force: bool, replicas: &[PathBuf]) -> Result<()> {
    let shown = path.display();
    let busy = |what: &str| Err(Error::new(ErrorKind::Busy, format!("{shown} {what}")));
    let canonical = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    if replicas.iter().any(|replica| *replica == canonical || replica == path) {
        return busy("is a replica of this group; restore to another place");
    }
    let partial = partial_path(path);
    if !force && !is_block_device(path) && disk.open_read(&partial).is_ok() {
        let at = format!(
            "{} exists, left by a restore that was stopped, or somebody's: it is removed only with --force",
            partial.display()
        );
        return Err(Error::new(ErrorKind::Usage, at));
    }
    let Ok(file) = disk.open_read(path) else { return Ok(()) };
    if path.is_dir() {
        return Err(Error::new(ErrorKind::Usage, format!("{shown} is a directory")));
    }
    if !force {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{shown} exists; it is overwritten only with --force"),
        ));
    }
    if is_block_device(path) {
        ReplicaHold::acquire(path)?;
        let have = file.size().map_err(|e| Error::io(format!("size of {shown}"), e))?;
        if have < size_bytes {
            let at = format!("{shown} has {have} bytes, {size_bytes} are needed");
            return Err(Error::new(ErrorKind::Usage, at));
        }
    } else if path.is_file() {
        ReplicaHold::acquire(path)?;
        if is_behind_loop_device(&canonical) {
            return busy("is in use by a loop device (losetup -a shows which)");
        }
    }
    Ok(())
}

fn is_behind_loop_device(path: &Path) -> bool {
    let Ok(devices) = fs::read_dir("/sys/block") else { return false };
    devices.flatten().any(|device| {
        let backing = fs::read_to_string(device.path().join("loop/backing_file"));
        backing.is_ok_and(|backing| Path::new(backing.trim_end_matches('\n')) == path)
    })
}

/// The name of a file that is not whole yet.
fn partial_path(path: &Path) -> PathBuf {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    PathBuf::from(partial)
}

impl Target {
    /// Opens a target that [`check`] accepted; it reads as zeros from here on.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], [`ErrorKind::NoSpace`], [`ErrorKind::Io`].
    pub fn create(disk: &Arc<dyn Disk>, path: &Path, size_bytes: u64) -> Result<Target> {
        let failed = |e| Error::io(format!("create {}", path.display()), e);
        let device = is_block_device(path);
        let (file, partial, hold) = if device {
            let hold = ReplicaHold::acquire(path)?;
            let file = disk.open(path).map_err(failed)?;
            file.punch_hole(0..size_bytes).map_err(failed)?;
            (file, None, Some(hold))
        } else {
            let partial = partial_path(path);
            match disk.remove(&partial) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
                _ => {}
            }
            let file = disk.create(&partial).map_err(failed)?;
            file.set_size(size_bytes).map_err(failed)?;
            (file, Some(partial), None)
        };
        let (disk, path) = (Arc::clone(disk), path.to_path_buf());
        Ok(Target { disk, path, partial, file, written_bytes: 0, _hold: hold })
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

    /// Makes what was written durable. Of several targets all are synced before the first gets its name, so that hardly
    /// anything is left that could leave a set of which only some were replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|e| Error::sync(format!("sync {}", self.path.display()), e))
    }

    /// Gives a synced file its name; durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`], [`ErrorKind::Io`].
    pub fn finish(mut self) -> Result<u64> {
        if let Some(partial) = &self.partial {
            let failed = |e| Error::io(format!("rename {} to {}", partial.display(), self.path.display()), e);
            self.disk.rename(partial, &self.path).map_err(failed)?;
            self.partial = None;
            let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            self.disk.sync_dir(dir).map_err(|e| Error::sync(format!("sync {}", dir.display()), e))?;
        }
        Ok(self.written_bytes)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            // Best effort: what stays is named as partial.
            let _ = self.disk.remove(partial);
        }
    }
}
