//! An [`Export`] that is nothing but its [`Backing`]: no history, no replica. For tests, benchmarks and plain
//! serving of an image.

use std::io;
use std::path::Path;

use uuid::Uuid;

use crate::backing::{Access, Backing};
use crate::error::Error;
use crate::export::{BlockExtent, Export, Zeroing};

/// A served file or block device.
#[derive(Debug)]
pub struct FileExport {
    name: String,
    description: String,
    uuid: Uuid,
    read_only: bool,
    backing: Backing,
}

impl FileExport {
    /// Opens `path` and takes hold of it.
    pub fn open(name: &str, path: &Path, access: Access) -> Result<Self, Error> {
        Ok(Self {
            name: name.to_owned(),
            description: path.display().to_string(),
            uuid: Uuid::new_v4(),
            read_only: access == Access::ReadOnly,
            backing: Backing::open(path, access)?,
        })
    }
}

impl Export for FileExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size_bytes(&self) -> u64 {
        self.backing.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.backing.read_at(offset, into)
    }

    fn try_read_cached(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.backing.try_read_cached(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8], _fua: bool) -> io::Result<()> {
        self.backing.write_at(offset, bytes)
    }

    fn write_zeroes(&self, offset: u64, length_bytes: u64, how: Zeroing) -> io::Result<()> {
        self.backing.write_zeroes(offset, length_bytes, how.keep_allocated, how.only_if_fast)
    }

    fn discard(&self, offset: u64, length_bytes: u64, _fua: bool) -> io::Result<()> {
        // A disk that cannot discard keeps its contents, which the trait allows.
        self.backing.discard(offset, length_bytes).map(|_| ())
    }

    fn flush(&self) -> io::Result<()> {
        self.backing.sync()
    }

    fn block_status(
        &self,
        offset: u64,
        length_bytes: u64,
        max_extents: usize,
    ) -> io::Result<Vec<BlockExtent>> {
        self.backing.block_status(offset, length_bytes, max_extents)
    }
}
