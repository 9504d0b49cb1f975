//! How segment files are born and put aside.
//!
//! A file gets a segment's name only when its header and its size are durable, so a named segment without an
//! intact header is damage, never an accident:
//! 1. take a spare (`*.spare`, a dropped segment) or create one, reserve its room, write the header,
//!    fdatasync: a full disk shows here, before anything has changed;
//! 2. rename it to the segment's name;
//! 3. fsync the directory: before this nothing in the segment may be acknowledged.
//!
//! Recycled files keep their blocks, so that an fdatasync has no metadata to write. Their stale bytes are
//! told apart by lsn, chain, segment number and nonce.

use crate::io::{Disk, File, random_u64};
use crate::segment::{self, FLAG_RECYCLED, SegmentHeader};
use crate::{Error, Result, is_full};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SUFFIX: &str = ".spare";

/// Spares kept: one for the next segment, one more for a burst. Others give their room back.
const MAX_SPARES: usize = 2;

/// A file with a durable header that does not have its name yet.
pub(crate) struct Unborn {
    pub file: Arc<dyn File>,
    pub header: SegmentHeader,
    path: PathBuf,
}

impl Unborn {
    /// A segment that has its name already, taken up again.
    pub fn existing(file: Arc<dyn File>, header: SegmentHeader, path: &Path) -> Unborn {
        Unborn { file, header, path: path.into() }
    }
}

fn spares(disk: &dyn Disk, dir: &Path) -> Result<Vec<String>> {
    let names = disk.list(dir).map_err(|error| Error::io(format!("list {}", dir.display()), error))?;
    Ok(names.into_iter().filter(|name| name.ends_with(SUFFIX)).collect())
}

/// Step 1. `header` says everything but flags, size and nonce.
pub(crate) fn prepare(disk: &dyn Disk, dir: &Path, bytes: u64, header: SegmentHeader) -> Result<Unborn> {
    let spare = spares(disk, dir)?.pop();
    let recycled = spare.is_some();
    let path = dir.join(spare.unwrap_or_else(|| format!("{:020}{SUFFIX}", header.number)));
    let failed = |error| Error::io(format!("prepare segment file {}", path.display()), error);
    let file = if recycled { disk.open(&path) } else { disk.create_in_place(&path) }.map_err(failed)?;
    file.allocate(bytes).map_err(failed)?;
    let header = SegmentHeader {
        flags: if recycled { FLAG_RECYCLED } else { 0 },
        allocated_bytes: file.size().map_err(failed)?,
        nonce: random_u64().map_err(failed)?,
        merged_from: 0,
        ..header
    };
    file.write_at(&header.encode(), 0).map_err(failed)?;
    file.sync().map_err(|error| Error::sync(format!("sync {}", path.display()), error))?;
    Ok(Unborn { file, header, path })
}

/// Steps 2 and 3: returns the segment's path; its name is durable.
pub(crate) fn christen(disk: &dyn Disk, dir: &Path, unborn: &Unborn) -> Result<PathBuf> {
    let path = dir.join(segment::file_name(unborn.header.number));
    disk.rename(&unborn.path, &path)
        .map_err(|error| Error::io(format!("name segment {}", path.display()), error))?;
    sync_dir(disk, dir)?;
    Ok(path)
}

/// Takes a dropped segment's name away and keeps the file as a spare, or frees it. The caller syncs the
/// directory before a spare is used again, lest a crash leaves two names for one file.
///
/// Giving room back never needs room: where a full disk has no place for the new name, the file goes. Where
/// it cannot even take a name away, the file stays, which is said: the next open of the journal drops it, as
/// one below `oldest`.
pub(crate) fn retire(disk: &dyn Disk, dir: &Path, number: u64, path: &Path) -> Result<()> {
    let mut retired = if spares(disk, dir)?.len() < MAX_SPARES {
        disk.rename(path, &dir.join(format!("{number:020}{SUFFIX}")))
    } else {
        disk.remove(path)
    };
    if retired.as_ref().is_err_and(is_full) {
        retired = disk.remove(path);
    }
    if let Err(error) = &retired
        && is_full(error)
    {
        tracing::warn!(path = %path.display(), %error, "a dropped segment cannot be removed from a full disk; it goes later");
        return Ok(());
    }
    retired.map_err(|error| Error::io(format!("drop segment {}", path.display()), error))
}

pub(crate) fn sync_dir(disk: &dyn Disk, dir: &Path) -> Result<()> {
    disk.sync_dir(dir).map_err(|error| Error::sync(format!("sync directory {}", dir.display()), error))
}
