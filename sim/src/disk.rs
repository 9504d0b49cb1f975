//! The disks of one life: a [`SimDisk`] whose operations take turns and time, and end with the process that does them.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use journal::io::{Disk, File, Room as Space};
use journal::sim_disk::SimDisk;
use nbd::Store;
use rustix::fs::{FallocateFlags, SeekFrom};

use crate::room::Room;

/// What a process holds of a disk.
#[derive(Clone)]
pub struct LifeDisk {
    room: Arc<Room>,
    below: SimDisk,
    /// Nothing more reaches the disk.
    dead: Arc<AtomicBool>,
    /// What an operation takes on top at most, µs.
    slow_us: Arc<AtomicU64>,
    /// The same for reads alone, µs.
    slow_reads_us: Arc<AtomicU64>,
}

impl LifeDisk {
    /// For a new process.
    pub fn new(room: &Arc<Room>, below: &SimDisk) -> LifeDisk {
        LifeDisk {
            room: room.clone(),
            below: below.clone(),
            dead: Arc::default(),
            slow_us: Arc::default(),
            slow_reads_us: Arc::default(),
        }
    }

    /// The disk of the same process as another.
    pub fn dies_with(&mut self, other: &LifeDisk) {
        self.dead = other.dead.clone();
    }

    /// The process is gone.
    pub fn die(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// Every operation takes up to this much longer, µs; what was begun later may end earlier.
    pub fn slow(&self, us: u64) {
        self.slow_us.store(us, Ordering::Relaxed);
    }

    /// Every read takes up to this much longer, µs.
    pub fn slow_reads(&self, us: u64) {
        self.slow_reads_us.store(us, Ordering::Relaxed);
    }

    fn live(&self) -> io::Result<()> {
        if self.dead.load(Ordering::Acquire) {
            Err(io::Error::other("this process was killed"))
        } else {
            Ok(())
        }
    }

    /// Others may run before and after an operation, and it takes its time.
    fn step<T>(&self, most_us: u64, operation: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.live()?;
        if machine::is_simulated() {
            let slow_us = self.slow_us.load(Ordering::Relaxed);
            if slow_us > 0 || most_us >= 1000 || self.room.chance(300) {
                machine::sleep(Duration::from_micros(
                    1 + self.room.draw(most_us) + self.room.draw(slow_us + 1),
                ));
            }
            self.live()?;
        }
        operation()
    }
}

const QUICK_US: u64 = 60;
const SYNC_US: u64 = 3000;

impl Disk for LifeDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = self.step(QUICK_US, || self.below.create(path))?;
        Ok(Arc::new(LifeFile { disk: self.clone(), file }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = self.step(QUICK_US, || self.below.open(path))?;
        Ok(Arc::new(LifeFile { disk: self.clone(), file }))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = self.step(QUICK_US, || self.below.open_read(path))?;
        Ok(Arc::new(LifeFile { disk: self.clone(), file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(QUICK_US, || self.below.rename(from, to))
    }

    fn rename_dir(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)?;
        self.step(QUICK_US, || self.below.rename_dir(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(QUICK_US, || self.below.remove(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step(SYNC_US, || self.below.sync_dir(dir))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.step(QUICK_US, || self.below.list(dir))
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        // Locks are of the real file system, which ends them with their process.
        std::fs::create_dir_all(dir)?;
        self.step(QUICK_US, || self.below.create_dir(dir))
    }

    fn room(&self, path: &Path) -> io::Result<Option<Space>> {
        self.step(QUICK_US, || self.below.room(path))
    }
}

struct LifeFile {
    disk: LifeDisk,
    file: Arc<dyn File>,
}

impl File for LifeFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let most_us = QUICK_US + self.disk.slow_reads_us.load(Ordering::Relaxed);
        self.disk.step(most_us, || self.file.read_at(buffer, offset))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.step(QUICK_US, || self.file.write_at(bytes, offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.step(SYNC_US, || self.file.sync())
    }

    fn size(&self) -> io::Result<u64> {
        self.disk.live()?;
        self.file.size()
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.disk.step(QUICK_US, || self.file.set_size(bytes))
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.disk.step(QUICK_US, || self.file.allocate(bytes))
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.disk.step(QUICK_US, || self.file.punch_hole(range))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.disk.live()?;
        self.file.next_data(offset)
    }

    fn start_writeback(&self, _: Range<u64>) -> io::Result<()> {
        self.disk.live()
    }
}

/// A file of such a disk behind the NBD front.
pub struct LifeStore(Arc<dyn File>);

impl LifeStore {
    /// The file.
    pub fn new(file: Arc<dyn File>) -> LifeStore {
        LifeStore(file)
    }
}

impl fmt::Debug for LifeStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LifeStore")
    }
}

impl Store for LifeStore {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        journal::io::read_exact_at(&*self.0, into, offset)
    }

    fn try_read_cached(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, into)?;
        Ok(true)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, length_bytes: u64) -> io::Result<bool> {
        if how.contains(FallocateFlags::PUNCH_HOLE) {
            self.0.punch_hole(offset..offset + length_bytes)?;
            return Ok(true);
        }
        Ok(false)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn seek(&self, to: SeekFrom) -> io::Result<Option<u64>> {
        match to {
            SeekFrom::Data(at) => Ok(self.0.next_data(at)?.map(|data| data.start)),
            SeekFrom::Hole(at) => {
                Ok(self.0.next_data(at)?.filter(|data| data.start <= at).map(|data| data.end).or(Some(at)))
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
