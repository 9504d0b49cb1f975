//! The disks of one life: a [`SimDisk`] whose operations take turns and time, and end with the process that
//! does them.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use journal::io::{Disk, File, Room as Space};
use journal::sim_disk::SimDisk;
use machine::disk::continuity::{Ends, Times};
use machine::disk::{Continuity, DiskIdentity};
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

    fn wrap(&self, path: &Path, file: Arc<dyn File>) -> Arc<dyn File> {
        // Only what others may write to has times: disk images.
        let image = path.extension().is_some_and(|extension| extension == "img").then(|| path.to_owned());
        Arc::new(LifeFile { disk: self.clone(), file, image })
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
        Ok(self.wrap(path, file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = self.step(QUICK_US, || self.below.open(path))?;
        Ok(self.wrap(path, file))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = self.step(QUICK_US, || self.below.open_read(path))?;
        Ok(self.wrap(path, file))
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
    /// Its path, where it is a disk image.
    image: Option<PathBuf>,
}

impl LifeFile {
    /// It is changed by its owner. The clock of this mark never steps.
    fn changed(&self) {
        if let Some(path) = &self.image {
            mark(&self.disk.below, path, self.disk.room.now_ns());
        }
    }
}

impl File for LifeFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let most_us = QUICK_US + self.disk.slow_reads_us.load(Ordering::Relaxed);
        self.disk.step(most_us, || self.file.read_at(buffer, offset))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.step(QUICK_US, || {
            self.file.write_at(bytes, offset)?;
            self.changed();
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.step(SYNC_US, || self.file.sync())
    }

    fn identity(&self) -> io::Result<Option<DiskIdentity>> {
        Ok(self.image.as_ref().map(|path| identity_of(&self.disk.below, path)))
    }

    fn continuity(&self, ends: Ends) -> io::Result<Option<Continuity>> {
        self.image.as_ref().map(|path| continuity_of(&self.disk.below, path, ends)).transpose()
    }

    fn size(&self) -> io::Result<u64> {
        self.disk.live()?;
        self.file.size()
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.disk.step(QUICK_US, || {
            self.file.set_size(bytes)?;
            self.changed();
            Ok(())
        })
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.disk.step(QUICK_US, || self.file.allocate(bytes))
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.disk.step(QUICK_US, || {
            self.file.punch_hole(range)?;
            self.changed();
            Ok(())
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.disk.live()?;
        self.file.next_data(offset)
    }

    fn start_writeback(&self, _: Range<u64>) -> io::Result<()> {
        self.disk.live()
    }
}

/// A file of such a disk behind the NBD front. Beside it lie its last change (`NAME.times`) and, once it was
/// swapped, who it is (`NAME.identity`), 8 bytes each: with it they are copied, and rolled back.
pub struct LifeStore {
    file: Arc<dyn File>,
    below: SimDisk,
    path: PathBuf,
}

impl LifeStore {
    /// The file at a path.
    pub fn new(file: Arc<dyn File>, below: &SimDisk, path: &Path) -> LifeStore {
        LifeStore { file, below: below.clone(), path: path.to_owned() }
    }

    fn changed(&self) {
        touch(&self.below, &self.path);
    }
}

/// A disk is changed now.
pub fn touch(below: &SimDisk, path: &Path) {
    mark(below, path, machine::realtime_ns());
}

/// A disk is changed at this time.
pub fn mark(below: &SimDisk, path: &Path, at_ns: u64) {
    below.put(&path.with_extension("times"), at_ns.to_le_bytes().to_vec());
}

fn beside(below: &SimDisk, path: &Path, what: &str) -> Option<u64> {
    let bytes = below.contents(&path.with_extension(what))?;
    bytes.try_into().ok().map(u64::from_le_bytes)
}

fn identity_of(below: &SimDisk, path: &Path) -> DiskIdentity {
    let by_path = || xxhash_rust::xxh3::xxh3_64(path.as_os_str().as_encoded_bytes());
    DiskIdentity::Simulated(beside(below, path, "identity").unwrap_or_else(by_path))
}

fn continuity_of(below: &SimDisk, path: &Path, ends: Ends) -> io::Result<Continuity> {
    let content = below.contents(path).ok_or(io::ErrorKind::NotFound)?;
    let at = beside(below, path, "times").unwrap_or(0);
    Ok(Continuity {
        boot: [0; 16],
        size_bytes: content.len() as u64,
        ends: (ends != Ends::Skip).then(|| xxhash_rust::xxh3::xxh3_128(&content).to_le_bytes()),
        times: Some(Times { modified_ns: at, changed_ns: at, is_remote: false, is_shared: false }),
        counters: None,
    })
}

/// Another disk lies at a path from now on.
pub fn identify(below: &SimDisk, path: &Path, who: u64) {
    below.put(&path.with_extension("identity"), who.to_le_bytes().to_vec());
}

impl fmt::Debug for LifeStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LifeStore")
    }
}

impl Store for LifeStore {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        journal::io::read_exact_at(&*self.file, into, offset)
    }

    fn try_read_cached(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, into)?;
        Ok(true)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, offset)?;
        self.changed();
        Ok(())
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, length_bytes: u64) -> io::Result<bool> {
        if how.contains(FallocateFlags::PUNCH_HOLE) {
            self.file.punch_hole(offset..offset + length_bytes)?;
            self.changed();
            return Ok(true);
        }
        Ok(false)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn seek(&self, to: SeekFrom) -> io::Result<Option<u64>> {
        match to {
            SeekFrom::Data(at) => Ok(self.file.next_data(at)?.map(|data| data.start)),
            SeekFrom::Hole(at) => {
                Ok(self.file.next_data(at)?.filter(|data| data.start <= at).map(|data| data.end).or(Some(at)))
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn identity(&self) -> io::Result<DiskIdentity> {
        Ok(identity_of(&self.below, &self.path))
    }

    fn continuity(&self, ends: Ends) -> io::Result<Continuity> {
        continuity_of(&self.below, &self.path, ends)
    }
}
