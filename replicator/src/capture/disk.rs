//! A block device in use, read for synchronisation: past the page cache, and never held.
//!
//! Somebody else has it mounted or open. What a file system writes does not pass through the device's own
//! page cache, so only direct reads show what the disk holds. State: the descriptor, its number and its size.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Error, ErrorKind, Result};

/// What direct reads are aligned to, in memory and on the device: the largest logical sector there is.
pub const ALIGN: usize = 4096;

/// An open block device.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    rdev: u64,
}

impl Disk {
    /// Opens a device for direct reading.
    ///
    /// # Errors
    /// There is none, it is no block device, or it is empty.
    pub fn open(path: &Path) -> Result<Disk> {
        let io = |error| Error::because(ErrorKind::Io, format!("open device {}", path.display()), error);
        let metadata = std::fs::metadata(path).map_err(io)?;
        if !metadata.file_type().is_block_device() {
            let at = format!(
                "{} is no block device: the kernel module captures devices; files are served with capture = \"nbd\"",
                path.display()
            );
            return Err(Error::new(ErrorKind::Settings, at));
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(OFlags::DIRECT.bits().cast_signed());
        let file = options.open(path).map_err(io)?;
        let disk = Disk { file, path: path.to_owned(), rdev: metadata.rdev() };
        if disk.size_bytes() == 0 {
            return Err(Error::new(ErrorKind::Settings, format!("{} is empty", path.display())));
        }
        Ok(disk)
    }

    /// Its path as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its number, as `stat` tells it.
    pub fn rdev(&self) -> u64 {
        self.rdev
    }

    /// Its size now, bytes; 0 when it is gone.
    pub fn size_bytes(&self) -> u64 {
        rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0)).unwrap_or(0)
    }

    /// Fills `into` from `offset`.
    ///
    /// # Errors
    /// The device's.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Its descriptor.
    pub fn held(&self) -> &File {
        &self.file
    }

    /// Its directory in sysfs.
    pub fn sysfs(&self) -> PathBuf {
        let (major, minor) = (rustix::fs::major(self.rdev), rustix::fs::minor(self.rdev));
        PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
    }
}

/// Memory for direct reads.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<u8>,
    from: usize,
    length: usize,
}

impl Buffer {
    /// `length` bytes at an aligned address.
    pub fn new(length: usize) -> Buffer {
        let memory = vec![0; length + ALIGN];
        let from = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        Buffer { memory, from, length }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.from..self.from + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_files_are_no_devices() {
        for length in [1, 512, 1 << 20] {
            let mut buffer = Buffer::new(length);
            assert_eq!(buffer.bytes().len(), length);
            assert_eq!(buffer.bytes().as_ptr().addr() % ALIGN, 0);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Disk::open(file.path()).unwrap_err();
        assert!(error.to_string().contains("capture = \"nbd\""), "{error}");
    }
}
