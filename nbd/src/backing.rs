//! A file or block device as a disk: the bottom of every write.
//!
//! Buffered I/O: a write is a copy into the page cache, and only [`Backing::sync`] makes it durable. State:
//! the descriptor, and the size at the time it was opened. The disk is held while it is open: a block device
//! by `O_EXCL` (so it cannot be mounted, nor opened so by another), a file by `flock` (exclusive for writing,
//! shared for reading).

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use machine::disk::continuity::Ends;
use machine::disk::{Continuity, DiskIdentity, User};
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use crate::error::{Error, Kind};
use crate::export::BlockExtent;
use crate::proto::MIN_BLOCK_BYTES;

/// Zeros are written this many at a time where the file system cannot do it itself.
const ZEROS: &[u8] = &[0; 256 << 10];

/// What a backing is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading and writing; nobody else may hold it.
    ReadWrite,
    /// Reading; others may read, too.
    ReadOnly,
}

/// What a [`Backing`] stands on: a file or device of the system, or one of a simulation.
pub trait Store: std::fmt::Debug + Send + Sync {
    /// Fills `into` from `offset`.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// The same if it needs no waiting; `false` (contents undefined) if it does, or nobody can tell.
    fn try_read_cached(&self, offset: u64, into: &mut [u8]) -> io::Result<bool>;
    /// Writes all of `bytes`; durable after [`Store::sync`].
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Changes the room of a range without changing the size. False: not supported here, or not at this
    /// alignment.
    fn fallocate(&self, how: FallocateFlags, offset: u64, length_bytes: u64) -> io::Result<bool>;
    /// fdatasync.
    fn sync(&self) -> io::Result<()>;
    /// Where the next data or hole is; `None` beyond the last. A store that cannot tell has data everywhere.
    fn seek(&self, to: SeekFrom) -> io::Result<Option<u64>>;
    /// Size now, bytes; `None`: it never changes.
    fn size_bytes(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
    /// Whether a path leads to it.
    fn is_at(&self, _path: &Path) -> bool {
        true
    }
    /// Which disk it is.
    fn identity(&self) -> io::Result<DiskIdentity>;
    /// A mark that shows later whether others wrote to it.
    fn continuity(&self, ends: Ends) -> io::Result<Continuity>;
    /// Makes durable what such a mark is taken from: content and times.
    fn settle(&self) -> io::Result<()> {
        self.sync()
    }
    /// The descriptor that is held; none in a simulation.
    fn held(&self) -> Option<&File> {
        None
    }
}

/// An open disk.
#[derive(Debug)]
pub struct Backing {
    store: Box<dyn Store>,
    size_bytes: u64,
    block_device: bool,
}

impl Backing {
    /// Opens and takes hold. [`Kind::Busy`] when another process holds it, [`Kind::Unsuitable`] when it is
    /// neither a file nor a block device, or its size is not a multiple of 512.
    pub fn open(path: &Path, access: Access) -> Result<Self, Error> {
        let at = || path.display().to_string();
        let io_error = |error: io::Error| Error::caused(Kind::Io, at(), error);
        // The type decides how the disk is held. If the path changes in between, the check on the open file
        // below notices.
        let expected = std::fs::metadata(path).map_err(io_error)?.file_type();
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::ReadWrite);
        if expected.is_block_device() {
            options.custom_flags(OFlags::EXCL.bits().cast_signed());
        }
        let busy = |error: io::Error| {
            let kind = match Errno::from_io_error(&error) {
                Some(Errno::BUSY | Errno::AGAIN) => Kind::Busy,
                _ => Kind::Io,
            };
            Error::caused(kind, at(), error)
        };
        let file = options.open(path).map_err(busy)?;
        let found = file.metadata().map_err(io_error)?.file_type();
        if found != expected || !(found.is_file() || found.is_block_device()) {
            let why = format!("{} is neither a file nor a block device", at());
            return Err(Error::new(Kind::Unsuitable, why));
        }
        if found.is_file() {
            let operation = match access {
                Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
                Access::ReadOnly => FlockOperation::NonBlockingLockShared,
            };
            rustix::fs::flock(&file, operation).map_err(|error| busy(error.into()))?;
        }
        let size_bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| io_error(error.into()))?;
        if size_bytes == 0 || size_bytes % u64::from(MIN_BLOCK_BYTES) != 0 {
            let why = format!("{}: its size, {size_bytes}, is not a multiple of {MIN_BLOCK_BYTES}", at());
            return Err(Error::new(Kind::Unsuitable, why));
        }
        Ok(Self { store: Box::new(file), size_bytes, block_device: found.is_block_device() })
    }

    /// A disk of `size_bytes` on another store, which has nobody else to be held against.
    pub fn on(store: Box<dyn Store>, size_bytes: u64) -> Self {
        Self { store, size_bytes, block_device: false }
    }

    /// Size when it was opened; a backing that grows must be opened anew.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Size now, in whole sectors; what was opened may have grown or shrunk since.
    pub fn measure(&self) -> io::Result<u64> {
        let size_bytes = self.store.size_bytes()?.unwrap_or(self.size_bytes);
        Ok(size_bytes / u64::from(MIN_BLOCK_BYTES) * u64::from(MIN_BLOCK_BYTES))
    }

    /// Whether a path leads to this disk.
    pub fn is_at(&self, path: &Path) -> bool {
        self.store.is_at(path)
    }

    /// Which disk it is, whatever is written to it.
    pub fn identity(&self) -> io::Result<DiskIdentity> {
        self.store.identity()
    }

    /// A mark that shows later whether others wrote to it. Exact when everything of ours is durable, times
    /// too.
    pub fn continuity(&self, ends: Ends) -> io::Result<Continuity> {
        self.store.continuity(ends)
    }

    /// Makes durable what such a mark is taken from.
    pub fn settle(&self) -> io::Result<()> {
        self.store.settle()
    }

    /// Who else uses it.
    pub fn users(&self) -> io::Result<Vec<User>> {
        self.store.held().map_or(Ok(Vec::new()), machine::disk::users_of)
    }

    /// Whether both share bytes: two paths to one disk, a file and a loop device over it, a disk and its
    /// partition.
    pub fn shares_with(&self, other: &Backing) -> bool {
        match (self.store.held(), other.store.held()) {
            (Some(a), Some(b)) => machine::disk::share(a, b),
            _ => false,
        }
    }

    /// Fills `into` from `offset`.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.store.read_at(offset, into)
    }

    /// Fills `into` if the page cache holds all of it; `false` (contents undefined) if it does not, or if the
    /// file system cannot tell.
    pub fn try_read_cached(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.store.try_read_cached(offset, into)
    }

    /// Writes to the page cache; durable after [`Backing::sync`].
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.store.write_at(offset, bytes)
    }

    /// Gives the range's room back. True: it reads as zeros now. False: the disk cannot do that, and the
    /// range is unchanged.
    pub fn discard(&self, offset: u64, length_bytes: u64) -> io::Result<bool> {
        self.store.fallocate(FallocateFlags::PUNCH_HOLE, offset, length_bytes)
    }

    /// Makes the range read as zeros: as a hole, unless it must stay allocated; else by the disk's own means;
    /// else by writing zeros, unless only a fast way is wanted (then `ErrorKind::Unsupported`).
    pub fn write_zeroes(
        &self,
        offset: u64,
        length_bytes: u64,
        keep_allocated: bool,
        only_if_fast: bool,
    ) -> io::Result<()> {
        if !keep_allocated && self.store.fallocate(FallocateFlags::PUNCH_HOLE, offset, length_bytes)? {
            return Ok(());
        }
        // On a block device this may write zeros inside the kernel, which is not what "fast" promises.
        let fast = !self.block_device;
        if (fast || !only_if_fast)
            && self.store.fallocate(FallocateFlags::ZERO_RANGE, offset, length_bytes)?
        {
            return Ok(());
        }
        if only_if_fast {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let end = offset + length_bytes;
        let mut at = offset;
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write_at(at, &ZEROS[..length])?;
            at += length as u64;
        }
        Ok(())
    }

    /// fdatasync: every write that returned before is durable. A failure is final: pages that could not be
    /// written are clean afterwards, so a second try that succeeds would prove nothing.
    pub fn sync(&self) -> io::Result<()> {
        self.store.sync()
    }

    /// Runs of data and holes from `offset`: at least one, together at most `length_bytes`, at most
    /// `max_extents`. Runs begin and end at multiples of 512; where the disk cannot tell, all is data.
    pub fn block_status(
        &self,
        offset: u64,
        length_bytes: u64,
        max_extents: usize,
    ) -> io::Result<Vec<BlockExtent>> {
        let block = u64::from(MIN_BLOCK_BYTES);
        let end = offset + length_bytes;
        let mut runs = Vec::new();
        let mut at = offset;
        while at < end && runs.len() < max_extents.max(1) {
            let data = self.store.seek(SeekFrom::Data(at))?.unwrap_or(end) / block * block;
            let (until, hole) = if data > at {
                (data.min(end), true)
            } else {
                let hole = self.store.seek(SeekFrom::Hole(at))?.unwrap_or(end);
                (hole.next_multiple_of(block).max(at + block).min(end), false)
            };
            runs.push(BlockExtent { length_bytes: until - at, hole });
            at = until;
        }
        Ok(runs)
    }
}

impl Store for File {
    fn size_bytes(&self) -> io::Result<Option<u64>> {
        Ok(Some(rustix::fs::seek(self, SeekFrom::End(0))?))
    }

    fn is_at(&self, path: &Path) -> bool {
        machine::disk::leads_to(path, self).unwrap_or(false)
    }

    fn identity(&self) -> io::Result<DiskIdentity> {
        DiskIdentity::of(self)
    }

    fn continuity(&self, ends: Ends) -> io::Result<Continuity> {
        Continuity::of(self, ends)
    }

    fn settle(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn held(&self) -> Option<&File> {
        Some(self)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn try_read_cached(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        let wanted = into.len();
        match rustix::io::preadv2(self, &mut [IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == wanted),
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fdatasync(self))?)
    }

    fn seek(&self, to: SeekFrom) -> io::Result<Option<u64>> {
        match rustix::fs::seek(self, to) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => match to {
                SeekFrom::Data(at) => Ok(Some(at)),
                _ => Ok(None),
            },
            Err(error) => Err(error.into()),
        }
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, length_bytes: u64) -> io::Result<bool> {
        match rustix::fs::fallocate(self, how | FallocateFlags::KEEP_SIZE, offset, length_bytes) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 256 << 10;

    fn sparse(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn a_file_has_one_writer() {
        let file = sparse(4096);
        let writer = Backing::open(file.path(), Access::ReadWrite).unwrap();
        for access in [Access::ReadWrite, Access::ReadOnly] {
            assert_eq!(Backing::open(file.path(), access).unwrap_err().kind, Kind::Busy);
        }
        drop(writer);
        let _reader = Backing::open(file.path(), Access::ReadOnly).unwrap();
        Backing::open(file.path(), Access::ReadOnly).unwrap();
        assert_eq!(Backing::open(file.path(), Access::ReadWrite).unwrap_err().kind, Kind::Busy);
    }

    #[test]
    fn unsuitable_disks_are_refused() {
        for size in [0, 511, 4097] {
            let error = Backing::open(sparse(size).path(), Access::ReadWrite).unwrap_err();
            assert_eq!(error.kind, Kind::Unsuitable);
        }
        let directory = Backing::open(&std::env::temp_dir(), Access::ReadOnly).unwrap_err();
        assert_eq!(directory.kind, Kind::Unsuitable);
        let missing = Backing::open(Path::new("no-such-disk"), Access::ReadOnly).unwrap_err();
        assert_eq!(missing.kind, Kind::Io);
    }

    #[test]
    fn growth_and_another_file_in_its_place_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let make = || File::create(&path).unwrap().set_len(4096).unwrap();
        make();
        let backing = Backing::open(&path, Access::ReadWrite).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(9000).unwrap();
        assert_eq!((backing.size_bytes(), backing.measure().unwrap()), (4096, 8704));
        assert!(backing.is_at(&path));
        std::fs::remove_file(&path).unwrap();
        assert!(!backing.is_at(&path));
        make();
        assert!(!backing.is_at(&path), "another file");
    }

    #[test]
    fn what_was_just_written_is_cached() {
        let file = sparse(8192);
        let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
        backing.write_at(4096, &[7; 4096]).unwrap();
        let mut read = [0; 4096];
        assert!(backing.try_read_cached(4096, &mut read).unwrap());
        assert_eq!(read, [7; 4096]);
        assert!(!backing.try_read_cached(4608, &mut read).unwrap(), "a short read is not a read");
    }

    #[derive(Debug, Clone)]
    enum Op {
        Write(u8),
        Discard,
        Zero { keep: bool },
    }

    fn ops() -> impl Strategy<Value = Vec<(Op, usize, usize)>> {
        let op = prop_oneof![
            (1u8..).prop_map(Op::Write),
            Just(Op::Discard),
            any::<bool>().prop_map(|keep| Op::Zero { keep })
        ];
        let blocks = SIZE / 512;
        prop::collection::vec((op, 0..blocks, 1..64usize), 1..30).prop_map(move |ops| {
            let bytes = |(op, at, length): (Op, usize, usize)| (op, at * 512, length.min(blocks - at) * 512);
            ops.into_iter().map(bytes).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The model is a vector of bytes. Block status covers the range exactly and calls no data a hole.
        #[test]
        fn behaves_as_a_disk(ops in ops(), from in 0..SIZE / 512, max_extents in 1..6usize) {
            let file = sparse(SIZE as u64);
            let backing = Backing::open(file.path(), Access::ReadWrite).unwrap();
            let mut model = vec![0; SIZE];
            for (op, at, length) in ops {
                let (offset, length_bytes) = (at as u64, length as u64);
                let mut byte = 0;
                match op {
                    Op::Write(with) => {
                        byte = with;
                        backing.write_at(offset, &vec![with; length]).unwrap();
                    }
                    Op::Discard => prop_assert!(backing.discard(offset, length_bytes).unwrap()),
                    Op::Zero { keep } => backing.write_zeroes(offset, length_bytes, keep, false).unwrap(),
                }
                model[at..at + length].fill(byte);
            }
            backing.sync().unwrap();
            let mut read = vec![1; SIZE];
            backing.read_at(0, &mut read).unwrap();
            prop_assert!(read == model);

            let (offset, length) = (from as u64 * 512, (SIZE - from * 512) as u64);
            let all = backing.block_status(offset, length, usize::MAX).unwrap();
            prop_assert_eq!(all.iter().map(|run| run.length_bytes).sum::<u64>(), length);
            let mut at = from * 512;
            for run in &all {
                let run_bytes = usize::try_from(run.length_bytes).unwrap();
                prop_assert!(run_bytes > 0 && run_bytes % 512 == 0);
                if run.hole {
                    prop_assert!(model[at..at + run_bytes].iter().all(|byte| *byte == 0));
                }
                at += run_bytes;
            }
            let some = backing.block_status(offset, length, max_extents).unwrap();
            prop_assert_eq!(&some[..], &all[..all.len().min(max_extents)]);
        }
    }
}
