//! The scrub's disk: it is only read, at a pace, and ends when scrubbing does.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use journal::io::{Disk, File};

use super::Scrub;

/// A disk that is only read, at a pace.
pub(super) struct Paced {
    pub disk: Arc<dyn Disk>,
    pub scrub: Arc<Scrub>,
}

struct PacedFile {
    file: Arc<dyn File>,
    scrub: Arc<Scrub>,
}

fn read_only<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Disk for Paced {
    fn create(&self, _path: &Path) -> io::Result<Arc<dyn File>> {
        read_only()
    }
    fn open(&self, _path: &Path) -> io::Result<Arc<dyn File>> {
        read_only()
    }
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.scrub.pay(0)?;
        let file = self.disk.open_read(path)?;
        Ok(Arc::new(PacedFile { file, scrub: Arc::clone(&self.scrub) }))
    }
    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        read_only()
    }
    fn remove(&self, _path: &Path) -> io::Result<()> {
        read_only()
    }
    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        read_only()
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        read_only()
    }
}

impl File for PacedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.scrub.pay(buffer.len() as u64)?;
        self.file.read_at(buffer, offset)
    }
    fn write_at(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        read_only()
    }
    fn sync(&self) -> io::Result<()> {
        read_only()
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn set_size(&self, _bytes: u64) -> io::Result<()> {
        read_only()
    }
    fn allocate(&self, _bytes: u64) -> io::Result<()> {
        read_only()
    }
    fn punch_hole(&self, _range: Range<u64>) -> io::Result<()> {
        read_only()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }
    fn start_writeback(&self, _range: Range<u64>) -> io::Result<()> {
        read_only()
    }
}
