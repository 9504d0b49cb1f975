//! Replicas: one plain image file or block device for each volume.
//!
//! The applier is the only writer. On the real disk each replica is held ([`ReplicaHold`]) while we write it;
//! a stamp taken at a clean end tells whether others wrote to it while we were away.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::VolumeId;
use journal::io::{Disk, File, RealDisk};
use machine::disk::DiskIdentity;
use machine::disk::continuity::Ends;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::fold::{Fold, Run};
use crate::state::{Mark, ReplicaState, replica_path};
use crate::{Error, ErrorKind, Result};

/// Written bytes after which the kernel is asked to start writing back, so that the sync at the end is short
/// and other I/O is not held up by one large burst.
const PACE_BYTES: u64 = 8 << 20;

/// Keeps other writers away from a replica or a restore's target as far as the system allows: O_EXCL for a
/// block device (refuses a mounted one), flock for a file.
#[derive(Debug)]
pub struct ReplicaHold {
    file: fs::File,
}

impl ReplicaHold {
    /// Takes hold of an existing file or block device on the real disk.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming who may hold it; [`ErrorKind::Io`] where it cannot be opened.
    pub fn acquire(path: &Path) -> Result<ReplicaHold> {
        let shown = path.display();
        let is_device = is_block_device(path);
        let exclusive = if is_device { OFlags::EXCL } else { OFlags::empty() };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | exclusive;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(descriptor) => fs::File::from(descriptor),
            Err(Errno::BUSY) => {
                let at = format!(
                    "{shown} is in use: mounted, or held by device mapper, md, swap or another program \
                     (lsblk {shown} shows which)"
                );
                return Err(Error::new(ErrorKind::Busy, at));
            }
            Err(e) => return Err(Error::io(format!("open {shown} for writing"), e.into())),
        };
        if !is_device {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let at = format!("{shown} is locked by another program (lslocks shows which)");
                    return Err(Error::new(ErrorKind::Busy, at));
                }
                Err(e) => return Err(Error::io(format!("lock {shown}"), e.into())),
            }
        }
        Ok(ReplicaHold { file })
    }

    /// The same descriptor for reading and writing: a device's other descriptors are not the exclusive one.
    ///
    /// # Errors
    /// The system's.
    pub fn to_file(&self) -> std::io::Result<Arc<dyn File>> {
        RealDisk::wrap(self.file.try_clone()?)
    }
}

/// Keeps a receiver from writing to a replica that is read without one.
#[derive(Debug)]
pub struct ReadHold {
    _file: fs::File,
}

impl ReadHold {
    /// Takes hold of a replica for reading.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where a receiver, or whoever mounted the device, holds it;
    /// [`ErrorKind::Io`].
    pub fn acquire(path: &Path) -> Result<ReadHold> {
        let shown = path.display();
        let held = || {
            let at = format!("{shown} is held by another program: a receiver that writes it, or a mount");
            Error::new(ErrorKind::NotPossible, at)
        };
        let is_device = is_block_device(path);
        let exclusive = if is_device { OFlags::EXCL } else { OFlags::empty() };
        let file = match rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | exclusive, Mode::empty()) {
            Ok(descriptor) => fs::File::from(descriptor),
            Err(Errno::BUSY) => return Err(held()),
            Err(e) => return Err(Error::io(format!("open {shown}"), e.into())),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(ReadHold { _file: file }),
            Err(Errno::WOULDBLOCK) => Err(held()),
            Err(e) => Err(Error::io(format!("lock {shown}"), e.into())),
        }
    }
}

/// Whether a path is a block device on the real disk.
pub fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Modification time and size of a replica file, to find out later whether others changed it. Block devices
/// have none that could be trusted.
pub fn stamp(path: &Path) -> Option<(i64, u64)> {
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let since = metadata.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some((i64::try_from(since.as_nanos()).ok()?, metadata.len()))
}

/// Whether a replica with the stamp `now` is what was left with the stamp `left`. Tools that move files may
/// keep whole seconds only.
pub fn is_same_stamp(left: (i64, u64), now: (i64, u64)) -> bool {
    const SECOND_NS: i64 = 1_000_000_000;
    let cut_to_seconds = now.0 % SECOND_NS == 0 && now.0 == left.0 - left.0 % SECOND_NS;
    left.1 == now.1 && (left.0 == now.0 || cut_to_seconds)
}

/// An open replica.
pub struct Replica {
    id: VolumeId,
    name: String,
    path: PathBuf,
    file: Arc<dyn File>,
    is_device: bool,
    size_bytes: u64,
    identity: Option<DiskIdentity>,
    /// Kept as long as we write.
    hold: Option<ReplicaHold>,
}

impl Replica {
    /// Opens a replica that the group's state names; creates or takes over the file where the state says that
    /// its creation had begun.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`] where it is missing, too small or refused; [`ErrorKind::Busy`] where it
    /// is held.
    ///
    /// ⚠ A device that is new reads as zeros from here on, but for one that is `seeded`: the source sends no
    /// zeros where its own disk was never written.
    pub fn open(
        disk: &dyn Disk,
        group_dir: &Path,
        state: &ReplicaState,
        hold: bool,
        seeded: bool,
    ) -> Result<Replica> {
        let path = replica_path(group_dir, &state.path);
        let named = |step: &str| format!("replica of volume {}: {step} {}", state.name, path.display());
        let is_device = hold && is_block_device(&path);
        let dir = path.parent().unwrap_or(Path::new("/"));
        let file = match disk.open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !state.created => {
                disk.create_dir(dir).map_err(|e| Error::replica(named("create directory of"), e))?;
                disk.create(&path).map_err(|e| Error::replica(named("create"), e))?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let step = "bring it back (is its disk mounted?), or put an empty file in its place to have it made anew: open";
                return Err(Error::replica(named(step), e));
            }
            Err(e) => return Err(Error::replica(named("open"), e)),
        };
        // Also of a file that was found: a killed process, or whoever brought it, need not have got that far.
        if !state.created && !is_device {
            disk.sync_dir(dir).map_err(|e| Error::replica(named("sync directory of"), e))?;
        }
        let hold = if hold { Some(ReplicaHold::acquire(&path)?) } else { None };
        let file = match &hold {
            Some(hold) => hold.to_file().map_err(|e| Error::replica(named("open"), e))?,
            None => file,
        };
        if hold.is_some() {
            let users = file.users().map_err(|e| Error::replica(named("look who uses"), e))?;
            if !users.is_empty() {
                let at = format!(
                    "{} is used by others: {}; it is not opened before they let it go",
                    path.display(),
                    machine::disk::users::told(&users)
                );
                return Err(Error::new(ErrorKind::Busy, at));
            }
        }
        let identity = file.identity().map_err(|e| Error::replica(named("look at"), e))?;
        let mut replica = Replica {
            id: state.id,
            name: state.name.clone(),
            path: path.clone(),
            file,
            is_device,
            size_bytes: state.size_bytes,
            identity,
            hold,
        };
        let have = replica.file.size().map_err(|e| replica.error("size of", 0, e))?;
        if state.created && have < state.size_bytes {
            let at = format!(
                "{} has only {have} of {} bytes; bring it back, or put an empty file in its place to have it made anew",
                named("found that"),
                state.size_bytes
            );
            return Err(Error::new(ErrorKind::ReplicaFailed, at));
        }
        if !state.created && !is_device && have > state.size_bytes {
            let at = format!(
                "{} has {have} bytes, more than the volume's {}: it is no copy of it; put the right one in its place",
                named("found that"),
                state.size_bytes
            );
            return Err(Error::new(ErrorKind::ReplicaFailed, at));
        }
        replica.grow(state.size_bytes)?;
        if !state.created && is_device && !seeded {
            replica.zero(0..state.size_bytes)?;
        }
        if !state.created && have > 0 {
            // ⚠ Whoever brought this content need not have synced it. It will be found equal and never be
            // written by us, so it is durable before anything is compared, and before the first checkpoint
            // relies on it.
            replica.sync()?;
        }
        Ok(replica)
    }

    /// Refuses to take over a file that this group did not create: it may be somebody's.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`] naming the file.
    pub fn check_vacant(disk: &dyn Disk, path: &Path, name: &str) -> Result<()> {
        let is_empty = |file: Arc<dyn File>| file.size().is_ok_and(|size| size == 0);
        if is_block_device(path) || disk.open_read(path).map_or(true, is_empty) {
            return Ok(());
        }
        let at = format!(
            "replica of volume {name}: {} exists already; move it away, or say `seeded = true` in its [[replica]] when it is a copy of the volume",
            path.display()
        );
        Err(Error::new(ErrorKind::ReplicaFailed, at))
    }

    /// Short id within the group.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// Operator's name of the volume.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Image file or block device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the volume, bytes; a block device may be larger.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn error(&self, step: &str, at: u64, source: std::io::Error) -> Error {
        let text = format!("replica of volume {}: {step} {} at byte {at}", self.name, self.path.display());
        Error::replica(text, source)
    }

    /// Grows the replica to the volume's size, never shrinks it.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`] where the device is too small or the disk refuses.
    pub fn grow(&mut self, size_bytes: u64) -> Result<()> {
        let have = self.file.size().map_err(|e| self.error("size of", 0, e))?;
        if have < size_bytes && self.is_device {
            let at = format!(
                "replica of volume {}: {} has {have} bytes, {size_bytes} are needed",
                self.name,
                self.path.display()
            );
            return Err(Error::new(ErrorKind::ReplicaFailed, at));
        }
        if have < size_bytes {
            self.file.set_size(size_bytes).map_err(|e| self.error("grow", size_bytes, e))?;
        }
        if self.is_device && size_bytes > self.size_bytes {
            // A file's new part reads as zeros, and so does the source's.
            self.zero(self.size_bytes..size_bytes)?;
        }
        self.size_bytes = self.size_bytes.max(size_bytes);
        Ok(())
    }

    /// Makes a part of a device read as zeros, whatever stood there.
    fn zero(&self, range: Range<u64>) -> Result<()> {
        const PART_BYTES: u64 = 256 << 20;
        let mut at = range.start;
        while at < range.end {
            let part = at..range.end.min(at + PART_BYTES);
            at = part.end;
            machine::give_way();
            self.file.punch_hole(part.clone()).map_err(|e| self.error("zero", part.start, e))?;
            self.file.start_writeback(part.clone()).map_err(|e| self.error("zero", part.start, e))?;
        }
        Ok(())
    }

    /// Cuts the replica to a size that its volume had before; a block device keeps its own. Not durable by
    /// itself.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`].
    pub fn shrink(&mut self, size_bytes: u64) -> Result<()> {
        let have = self.file.size().map_err(|e| self.error("size of", 0, e))?;
        if have > size_bytes && !self.is_device {
            self.file.set_size(size_bytes).map_err(|e| self.error("shrink", size_bytes, e))?;
        }
        self.size_bytes = size_bytes;
        Ok(())
    }

    /// Reads; what lies beyond the end of the file reads as zeros.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`].
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let got = self.file.read_at(buffer, offset).map_err(|e| self.error("read", offset, e))?;
        buffer[got..].fill(0);
        Ok(())
    }

    /// The first range in `range` that may hold something other than zeros.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`].
    pub fn next_data(&self, range: Range<u64>) -> Result<Option<Range<u64>>> {
        let found = self.file.next_data(range.start).map_err(|e| self.error("seek", range.start, e))?;
        Ok(found
            .map(|data| data.start.max(range.start)..data.end.min(range.end))
            .filter(|data| !data.is_empty()))
    }

    /// Bytes in `range` that may hold something other than zeros: the most that its undo can take.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`].
    pub fn data_bytes(&self, range: Range<u64>) -> Result<u64> {
        let mut bytes = 0;
        let mut at = range.start;
        while let Some(data) = self.next_data(at..range.end)? {
            bytes += data.end - data.start;
            at = data.end;
        }
        Ok(bytes)
    }

    /// Bytes of the receiver's file system that it takes; none where it is a block device, or cannot tell.
    pub fn allocated_bytes(&self) -> u64 {
        let found = (!self.is_device).then(|| fs::metadata(&self.path).ok()).flatten();
        found.map_or(0, |found| std::os::unix::fs::MetadataExt::blocks(&found).saturating_mul(512))
    }

    /// Writes the fold's content of `ranges`, which are sorted; not durable before [`Replica::sync`]. Returns
    /// the bytes written, zeros included.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`], or [`ErrorKind::NoSpace`] where a sparse file finds its disk full.
    pub fn write(&self, fold: &Fold, ranges: &[Range<u64>], scratch: &mut Vec<u8>) -> Result<u64> {
        let mut written = 0;
        let mut paced: Option<Range<u64>> = None;
        for range in ranges {
            fold.runs(self.id, range.clone(), scratch, |run| {
                machine::give_way();
                let (at, len, result) = match run {
                    Run::Zeros(range) => {
                        (range.start, range.end - range.start, self.file.punch_hole(range.clone()))
                    }
                    Run::Bytes(at, bytes) => (at, bytes.len() as u64, self.file.write_at(bytes, at)),
                };
                result.map_err(|e| match crate::error::is_full(&e) {
                    true => Error::io(
                        format!("replica of volume {}: write {}", self.name, self.path.display()),
                        e,
                    ),
                    false => self.error("write", at, e),
                })?;
                written += len;
                let dirty = paced.get_or_insert(at..at);
                dirty.end = at + len;
                if dirty.end - dirty.start >= PACE_BYTES {
                    let dirty = dirty.clone();
                    paced = None;
                    self.file.start_writeback(dirty).map_err(|e| self.error("write back", at, e))?;
                }
                Ok::<_, Error>(())
            })?;
        }
        Ok(written)
    }

    /// fsync: what was written is durable when this returns, and so are its times: after fdatasync alone a
    /// power loss would bring back older ones, which look like a change by others.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`]. ⚠ What was written since the last sync may be lost, though it can still
    /// be read: all of it must be written again before the next sync says anything. It ends this replica, not
    /// the receiver: ingest has its own disk to answer for.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| self.error("sync", 0, e))
    }

    /// How it is left; everything is synced. `None` on a disk that nobody else can reach.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`].
    pub fn mark(&self, ends: Ends) -> Result<Option<Mark>> {
        let left = self.file.continuity(ends).map_err(|e| self.error("look at", 0, e))?;
        let mark = self.identity.clone().zip(left);
        Ok(mark.map(|(identity, left)| Mark { volume: self.id, identity, left }))
    }

    /// The open file.
    pub(crate) fn file(&self) -> &dyn File {
        &*self.file
    }

    /// The stamp of what is on the disk now, for the next start; `None` for a device. Times are made durable
    /// first.
    ///
    /// # Errors
    /// [`ErrorKind::ReplicaFailed`].
    pub fn settled_stamp(&self) -> Result<Option<(i64, u64)>> {
        self.file.sync_all().map_err(|e| self.error("sync", 0, e))?;
        Ok(self.hold.as_ref().and_then(|_| stamp(&self.path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::VolumeUuid;
    use journal::io::RealDisk;

    fn state(path: &Path, created: bool) -> ReplicaState {
        ReplicaState {
            id: VolumeId(0),
            uuid: VolumeUuid([1; 16]),
            name: "disk".into(),
            path: path.to_path_buf(),
            size_bytes: 1 << 20,
            created,
            stamp: None,
        }
    }

    #[test]
    fn a_stamp_cut_to_seconds_is_the_same_and_any_other_is_not() {
        let left = (1_700_000_001_234_567_890, 4096);
        assert!(is_same_stamp(left, left));
        assert!(is_same_stamp(left, (1_700_000_001_000_000_000, 4096)));
        for now in [(1_700_000_001_234_567_891, 4096), (1_700_000_000_000_000_000, 4096), (left.0, 4097)] {
            assert!(!is_same_stamp(left, now), "{now:?}");
        }
    }

    #[test]
    fn is_created_sparse_grows_never_shrinks_and_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let group_dir = dir.path().join("groups/g");
        let path = dir.path().join("replica/g/disk.img");
        Replica::check_vacant(&RealDisk, &path, "disk").unwrap();
        let mut replica = Replica::open(&RealDisk, &group_dir, &state(&path, false), true, false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
        assert_eq!(replica.data_bytes(0..1 << 20).unwrap(), 0, "sparse");
        assert_eq!(ReplicaHold::acquire(&path).unwrap_err().kind, ErrorKind::Busy);
        replica.grow(2 << 20).unwrap();
        replica.grow(1 << 20).unwrap();
        assert_eq!(replica.size_bytes(), 2 << 20);
        drop(replica);
        assert!(stamp(&path).is_some());
        assert_eq!(
            Replica::check_vacant(&RealDisk, &path, "disk").unwrap_err().kind,
            ErrorKind::ReplicaFailed
        );
        fs::remove_file(&path).unwrap();
        let missing = Replica::open(&RealDisk, &group_dir, &state(&path, true), true, false);
        assert_eq!(missing.err().unwrap().kind, ErrorKind::ReplicaFailed, "a lost replica is not made anew");
    }
}
