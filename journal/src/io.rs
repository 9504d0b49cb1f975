//! The disk as this project uses it: few operations, each with its durability said aloud.
//!
//! Everything that must survive a crash goes through [`Disk`] and [`File`], so that the same code runs on the
//! real disk ([`RealDisk`]) and on the one that is cut, torn and reordered by the crash matrix
//! ([`crate::sim_disk::SimDisk`]).
//!
//! What is durable, and when:
//! * content: after [`File::sync`] of that file, never before;
//! * a name (create, rename, remove): after [`Disk::sync_dir`] of its directory, independent of the content;
//! * nothing else. A failed sync is final: the caller stops acknowledging and exits.

use machine::disk::continuity::Ends;
use machine::disk::{Continuity, DiskIdentity, User, leads_to, users_of};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// Files by absolute path.
pub trait Disk: Send + Sync + 'static {
    /// Creates a file that must not exist; readable and writable.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// As [`Disk::create`], for a file that is written over in place and must be writable on a full disk:
    /// where a file system copies on write, this file is kept out of that, as far as the file system offers
    /// it.
    fn create_in_place(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.create(path)
    }
    /// Opens an existing file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// Opens an existing file for reading.
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// As [`open_read`](Self::open_read), for a file that only this program makes: never through a symbolic
    /// link.
    fn open_read_own(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.open_read(path)
    }
    /// Renames within one directory, replacing the target.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Renames a directory with all that it holds, durably; the new name must not exist.
    fn rename_dir(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Removes a file's name.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Names in a directory, sorted; not recursive.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Creates a directory and its parents, durably; fine if it exists.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Whether a sync here waits until bytes are durable, as everybody but
    /// [`crate::buffered_disk::BufferedDisk`] does.
    fn waits(&self) -> bool {
        true
    }
    /// Whether these are the machine's files: then a path means to others what it means to us, and they may
    /// use it too.
    fn is_machine(&self) -> bool {
        false
    }
    /// Room on the file system that holds `path`; `None` where it cannot be known.
    fn room(&self, _path: &Path) -> io::Result<Option<Room>> {
        Ok(None)
    }
}

/// Room on a file system, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Free, for whoever asks.
    pub free_bytes: u64,
    /// In all.
    pub total_bytes: u64,
}

/// One open file. Offsets and lengths are bytes.
pub trait File: Send + Sync + 'static {
    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// fdatasync: content and size are durable when this returns.
    fn sync(&self) -> io::Result<()>;
    /// Size of the file.
    fn size(&self) -> io::Result<u64>;
    /// Cuts or extends the file (with zeros).
    fn set_size(&self, bytes: u64) -> io::Result<()>;
    /// Reserves room up to `bytes` without shrinking the file; it reads as zeros or as what stood there.
    fn allocate(&self, bytes: u64) -> io::Result<()>;
    /// Makes a range read as zeros, freeing its room where the file system can.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()>;
    /// The first range at or after `offset` that may hold something other than zeros; `None` when there is
    /// none.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
    /// Asks the kernel to start writing a range back, without waiting for it; a hint that may do nothing.
    fn start_writeback(&self, range: Range<u64>) -> io::Result<()>;
    /// fsync: as [`File::sync`], and its times are durable, too.
    fn sync_all(&self) -> io::Result<()> {
        self.sync()
    }
    /// Who it is, whatever is written to it; `None` where the disk cannot tell one from another.
    fn identity(&self) -> io::Result<Option<DiskIdentity>> {
        Ok(None)
    }
    /// A mark that tells later whether others wrote to it; `None` where there are no others.
    fn continuity(&self, _ends: Ends) -> io::Result<Option<Continuity>> {
        Ok(None)
    }
    /// Whether a path still leads to it.
    fn is_at(&self, _path: &Path) -> io::Result<bool> {
        Ok(true)
    }
    /// Who else has it mounted, under a loop device or open for writing; not this process.
    fn users(&self) -> io::Result<Vec<User>> {
        Ok(Vec::new())
    }
}

/// Reads exactly `buffer.len()` bytes; fewer is an error.
pub fn read_exact_at(file: &dyn File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    if file.read_at(buffer, offset)? < buffer.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Files that are made.
const FILE_MODE: u32 = 0o600;
/// Directories that are made.
const DIR_MODE: u32 = 0o700;

/// The operating system's files and block devices.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl RealDisk {
    /// A file or block device that is open already, by the descriptor that it was opened with.
    pub fn wrap(file: fs::File) -> io::Result<Arc<dyn File>> {
        let block_device = file.metadata()?.file_type().is_block_device();
        Ok(Arc::new(RealFile { file, block_device }))
    }

    /// Opens what exists, if it is a regular file or a block device. The look before keeps the side effects
    /// away that opening a device may have; the one behind is what counts; a pipe that comes in between does
    /// not make the open wait.
    fn open_existing(options: &mut fs::OpenOptions, path: &Path, flags: OFlags) -> io::Result<Arc<dyn File>> {
        let can_hold = |kind: fs::FileType| match kind.is_file() || kind.is_block_device() {
            true => Ok(()),
            false => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"))
            }
        };
        let found =
            if flags.contains(OFlags::NOFOLLOW) { fs::symlink_metadata(path) } else { fs::metadata(path) };
        can_hold(found?.file_type())?;
        let flags = (flags | OFlags::NONBLOCK).bits().cast_signed();
        let file = options.custom_flags(flags).open(path)?;
        can_hold(file.metadata()?.file_type())?;
        RealDisk::wrap(file)
    }
}

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        // What we store is what disks hold: for its owner only, whatever the umask is.
        let mut options = fs::File::options();
        RealDisk::wrap(options.read(true).write(true).create_new(true).mode(FILE_MODE).open(path)?)
    }

    fn create_in_place(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = fs::File::options().read(true).write(true).create_new(true).open(path)?;
        // Only an empty file takes the flag, and only file systems that copy on write know it. Content is
        // under our own checksums, so the file system's are not missed.
        if let Ok(flags) = rustix::fs::ioctl_getflags(&file) {
            let _ = rustix::fs::ioctl_setflags(&file, flags | rustix::fs::IFlags::NOCOW);
        }
        RealDisk::wrap(file)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        RealDisk::open_existing(fs::File::options().read(true).write(true), path, OFlags::empty())
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        RealDisk::open_existing(fs::File::options().read(true), path, OFlags::empty())
    }

    fn open_read_own(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        RealDisk::open_existing(fs::File::options().read(true), path, OFlags::NOFOLLOW)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn rename_dir(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        for dir in [from.parent(), to.parent()].into_iter().flatten() {
            self.sync_dir(dir)?;
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(dir)?.sync_all()
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            // A name that is not UTF-8 is not one of ours.
            names.extend(entry?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            self.create_dir(parent)?;
        }
        match fs::DirBuilder::new().mode(DIR_MODE).create(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        self.sync_dir(parent.unwrap_or(Path::new(".")))
    }

    fn is_machine(&self) -> bool {
        true
    }

    fn room(&self, path: &Path) -> io::Result<Option<Room>> {
        let found = rustix::fs::statvfs(path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(Some(Room { free_bytes: bytes(found.f_bavail), total_bytes: bytes(found.f_blocks) }))
    }
}

struct RealFile {
    file: fs::File,
    block_device: bool,
}

/// What the edges of a device's zeros are aligned to: no smaller than a page of the cache.
const PAGE_BYTES: u64 = 64 * 1024;

/// Zeros for file systems that cannot punch holes.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

fn not_offered(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL)
}

impl RealFile {
    fn fallocate_zeros(&self, range: &Range<u64>) -> std::result::Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start)
    }

    /// Zeros through the page cache, up to the end of the file.
    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.size()?);
        let mut at = range.start;
        while at < end {
            let bytes = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.file.write_all_at(&ZEROS[..bytes], at)?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// ⚠ A device's zeros go around the page cache, and the kernel first drops the cache's pages of the
    /// range. A page that is half in the range may hold what was written next to it and is not on the device
    /// yet: so edges are written through the cache. Pages that cannot be dropped (EBUSY: dirty, on a
    /// descriptor that is not the exclusive one) are, too.
    fn zero_device(&self, range: Range<u64>) -> io::Result<()> {
        let middle = range.start.next_multiple_of(PAGE_BYTES)..range.end / PAGE_BYTES * PAGE_BYTES;
        if middle.is_empty() {
            return self.write_zeros(range);
        }
        self.write_zeros(range.start..middle.start)?;
        match self.fallocate_zeros(&middle) {
            Err(error) if not_offered(error) || error == Errno::BUSY => self.write_zeros(middle.clone())?,
            other => other?,
        }
        self.write_zeros(middle.end..range.end)
    }
}

impl File for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn identity(&self) -> io::Result<Option<DiskIdentity>> {
        DiskIdentity::of(&self.file).map(Some)
    }

    fn continuity(&self, ends: Ends) -> io::Result<Option<Continuity>> {
        Continuity::of(&self.file, ends).map(Some)
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        leads_to(path, &self.file)
    }

    fn users(&self) -> io::Result<Vec<User>> {
        users_of(&self.file)
    }

    fn size(&self) -> io::Result<u64> {
        if self.block_device {
            // The position of this descriptor is used by nobody: all I/O names its offset.
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
            Err(error) if not_offered(error) => {
                if self.size()? < bytes {
                    self.file.set_len(bytes)?;
                }
                Ok(())
            }
            other => Ok(other?),
        }
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if self.block_device {
            return self.zero_device(range);
        }
        match self.fallocate_zeros(&range) {
            Err(error) if not_offered(error) => self.write_zeros(range),
            other => Ok(other?),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let size = self.size()?;
        if offset >= size {
            return Ok(None);
        }
        if self.block_device {
            return Ok(Some(offset..size));
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) if not_offered(error) => return Ok(Some(offset..size)),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end))
    }

    fn start_writeback(&self, range: Range<u64>) -> io::Result<()> {
        let (Ok(start), Ok(len)) = (range.start.try_into(), (range.end - range.start).try_into()) else {
            return Ok(());
        };
        // SAFETY: a system call on a descriptor that `self` keeps open; it takes numbers, no memory.
        let result =
            unsafe { libc::sync_file_range(self.file.as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
        // A hint: where it is refused (pipes, some network file systems) the sync simply takes longer. A
        // write-back error is not lost: the kernel keeps it for the next fdatasync of this descriptor.
        let _ = result;
        Ok(())
    }
}

/// Eight random bytes: tells apart two lives of a file that may hold the same bytes.
pub fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe would make the open wait for a writer that never comes; a terminal or `/dev/zero` never ends.
    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), b"x").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for (name, target) in [("link", at("file")), ("zero", "/dev/zero".into()), ("piped", at("pipe"))] {
            std::os::unix::fs::symlink(target, at(name)).unwrap();
        }
        for name in ["pipe", "socket", "zero", "piped", "."] {
            for opened in [RealDisk.open_read(&at(name)), RealDisk.open(&at(name))] {
                assert_eq!(opened.err().unwrap().kind(), io::ErrorKind::InvalidInput, "{name}");
            }
        }
        assert!(RealDisk.open_read(&at("link")).is_ok());
        assert_eq!(RealDisk.open_read_own(&at("link")).err().unwrap().kind(), io::ErrorKind::InvalidInput);
        assert!(RealDisk.open_read_own(&at("file")).is_ok());
        assert_eq!(RealDisk.open_read(&at("none")).err().unwrap().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn real_files_behave_as_the_trait_says() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        RealDisk.create_dir(&deep).unwrap();
        RealDisk.create_dir(&deep).unwrap();
        let path = deep.join("one");
        let file = RealDisk.create(&path).unwrap();
        assert!(RealDisk.create(&path).is_err(), "create refuses what exists");
        file.allocate(1 << 20).unwrap();
        file.write_at(b"hello", 300_000).unwrap();
        file.allocate(4096).unwrap();
        assert_eq!(file.size().unwrap(), 1 << 20, "allocate never shrinks");
        file.sync().unwrap();
        file.start_writeback(0..1 << 20).unwrap();
        let data = file.next_data(299_000).unwrap().unwrap();
        assert!(data.start <= 300_000 && data.end >= 300_005, "{data:?}");
        let room = RealDisk.room(&path).unwrap().unwrap();
        assert!(room.free_bytes <= room.total_bytes && room.total_bytes > 1 << 20, "{room:?}");
        file.punch_hole(299_000..301_000).unwrap();
        let mut buffer = [1; 5];
        assert_eq!(file.read_at(&mut buffer, 300_000).unwrap(), 5);
        assert_eq!(buffer, [0; 5]);
        assert_eq!(file.read_at(&mut buffer, (1 << 20) - 2).unwrap(), 2, "short only at the end");
        assert_eq!(file.next_data(1 << 20).unwrap(), None);
        RealDisk.rename(&path, &deep.join("two")).unwrap();
        RealDisk.sync_dir(&deep).unwrap();
        assert_eq!(RealDisk.list(&deep).unwrap(), ["two"]);
        RealDisk.remove(&deep.join("two")).unwrap();
        assert!(RealDisk.open_read(&path).is_err());
    }
}
