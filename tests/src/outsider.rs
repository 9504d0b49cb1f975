//! Another program that writes to a disk: it opens the disk for each write only, since one that is open for
//! writing elsewhere is refused at a start.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// See the module.
pub struct Outsider(PathBuf);

impl Outsider {
    /// Makes an empty file.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Outsider> {
        File::create(&path)?;
        Ok(Outsider(path.as_ref().to_owned()))
    }

    /// Cuts or extends it.
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.open()?.set_len(bytes)
    }

    /// Writes, and waits until it is on the disk.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let file = self.open()?;
        file.write_all_at(bytes, offset)?;
        file.sync_all()
    }

    fn open(&self) -> io::Result<File> {
        File::options().write(true).open(&self.0)
    }
}
