//! A captured volume, whatever captures it: where its content is read, and how large it is.

use std::io;
use std::sync::{Arc, PoisonError};

use machine::Mutex;
use nbd::{BlockExtent, Export as _};

use crate::capture::disk::Disk;
use crate::capture::nbd::CapturedVolume;

/// One volume of the group.
pub struct Volume {
    /// Short id in the stream.
    pub id: u32,
    /// Operator's name.
    pub name: String,
    source: Source,
}

enum Source {
    /// Served by the NBD front, whose page cache is the truth.
    Front(Arc<CapturedVolume>),
    /// A device in use, read past the page cache; gone while it is detached.
    Device(Mutex<Option<Arc<Disk>>>),
}

impl Volume {
    /// A volume behind the NBD front.
    pub fn front(volume: Arc<CapturedVolume>) -> Volume {
        Volume { id: volume.id, name: volume.name.clone(), source: Source::Front(volume) }
    }

    /// A device; `None` while it is detached.
    pub fn device(id: u32, name: String, disk: Option<Disk>) -> Volume {
        Volume { id, name, source: Source::Device(Mutex::new(disk.map(Arc::new))) }
    }

    /// The NBD front's side, where there is one.
    pub fn served(&self) -> Option<&Arc<CapturedVolume>> {
        match &self.source {
            Source::Front(volume) => Some(volume),
            Source::Device(_) => None,
        }
    }

    /// The device, while it is attached.
    pub fn disk(&self) -> Option<Arc<Disk>> {
        match &self.source {
            Source::Front(_) => None,
            Source::Device(disk) => disk.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The device was attached, or is detached.
    pub fn set_disk(&self, to: Option<Arc<Disk>>) {
        if let Source::Device(disk) = &self.source {
            *disk.lock().unwrap_or_else(PoisonError::into_inner) = to;
        }
    }

    /// Whether it is captured.
    pub fn is_attached(&self) -> bool {
        self.served().is_some() || self.disk().is_some()
    }

    /// Size, bytes; `None` where it is not known here.
    pub fn size_bytes(&self) -> Option<u64> {
        match &self.source {
            Source::Front(volume) => Some(volume.size_bytes()),
            Source::Device(_) => self.disk().map(|disk| disk.size_bytes()),
        }
    }

    /// Whether the backing has lost writes that were answered, so that nothing that is read from it can be
    /// trusted.
    pub fn sync_failed(&self) -> bool {
        self.served().is_some_and(|volume| volume.sync_failed())
    }

    /// Runs of data and holes from `offset`, at least one.
    ///
    /// # Errors
    /// The disk's.
    pub fn runs(&self, offset: u64, length_bytes: u64) -> io::Result<Vec<BlockExtent>> {
        match &self.source {
            Source::Front(volume) => volume.backing.block_status(offset, length_bytes, 64),
            Source::Device(_) => Ok(vec![BlockExtent { length_bytes, hole: false }]),
        }
    }

    /// Fills `into` from `offset`; aligned to 4 KiB, but for a device's end.
    ///
    /// # Errors
    /// The disk's.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.source {
            Source::Front(volume) => volume.backing.read_at(offset, into),
            Source::Device(_) => match self.disk() {
                Some(disk) => disk.read_at(offset, into),
                None => Err(rustix::io::Errno::NODEV.into()),
            },
        }
    }
}
