//! Restore: a whole group, or one of its volumes, at one point, into files or a device.
//!
//! For each volume, window by window: what undo holds of it (smallest batch first); the replica's content for
//! the rest, data ranges only; the undo's pieces, each frame unpacked once in a window. Then the redo records
//! up to the point, in their order, over all volumes at once. Every frame read is verified; damage ends the
//! restore and names its place.
//!
//! Runs beside the applier. ⚠ As in a view the replica is read before the registry is asked for the last
//! time: batches registered meanwhile are laid under what is known, until there are none.
//!
//! Memory: extents of one window, at most [`MAX_EXTENTS`] and one batch's; a window that holds more is
//! halved.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::extent_map::ExtentMap;
use journal::io::{Disk, File};
use journal::record::Op;
use journal::tail::Limit;
use journal::{Lsn, VolumeId};
use serde::{Deserialize, Serialize};

use crate::fold::push_range;
use crate::history::History;
use crate::lock::GroupLock;
use crate::point::{At, Point, rfc3339};
use crate::restoring::Restoring;
use crate::state::replica_path;
use crate::target::{self, Guarded, Place, Target};
use crate::undo::{UndoPiece, damage};
use crate::unpack::unpack_ahead;
use crate::view::{in_frame_order, replay};
use crate::{Error, ErrorKind, Result};

/// Extents of one window held in memory, about 100 bytes each.
const MAX_EXTENTS: usize = 500_000;
/// Windows are not halved below this: one batch's extents in it are few enough.
const MIN_WINDOW_BYTES: u64 = 16 << 20;
/// Windows are no larger than this: what is copied and then written again should still be in the page cache,
/// and go to the disk once, in one sweep.
const MAX_WINDOW_BYTES: u64 = 1 << 30;
/// Pieces below this are copied over before they are written.
const SMALL_PIECE_BYTES: u64 = 128 << 10;
/// Bytes copied at once: what stays in a core's own cache between its read and its write.
const COPY_BYTES: u64 = 256 << 10;

/// What is to be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreRequest {
    /// Which point.
    pub at: At,
    /// A file or device for one volume, a directory for several.
    pub to: PathBuf,
    /// Only this volume.
    pub volume: Option<String>,
    /// Overwrite what is there.
    pub force: bool,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// One restored volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredVolume {
    /// Operator's name of the volume.
    pub name: String,
    /// Its size at the point, bytes.
    pub size_bytes: u64,
    /// Where it went.
    pub target: PathBuf,
    /// Bytes written there; holes cost nothing.
    pub written_bytes: u64,
}

/// What was restored, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Operator's name of the group.
    pub group: String,
    /// The point: the last record that it holds.
    pub lsn: Lsn,
    /// Its time, RFC 3339 UTC.
    pub time: String,
    /// Volumes, in order of their ids.
    pub volumes: Vec<RestoredVolume>,
    /// Batches whose undo is laid over the replica.
    pub undo_batches: u64,
    /// Bytes of redo frames above the boundary, unpacked.
    pub redo_bytes: u64,
    /// Nothing was written.
    pub dry_run: bool,
    /// What makes the point inexact.
    pub warnings: Vec<String>,
}

/// Opens a group's directory that no daemon runs on. The lock is held as long as the first value lives.
///
/// # Errors
/// [`ErrorKind::Busy`] naming the process that holds it, or what [`History::open`] says.
pub fn open_bare(disk: Arc<dyn Disk>, group_dir: &Path) -> Result<(GroupLock, Arc<History>)> {
    let lock = GroupLock::take(group_dir)?;
    let history = History::open(disk, group_dir)?;
    history.read_alone();
    Ok((lock, history))
}

struct Planned {
    id: VolumeId,
    name: String,
    size_bytes: u64,
    path: PathBuf,
    place: Place,
}

/// Restores, with no other restore beside it. `progress` is called with bytes done and bytes in all, often.
///
/// # Errors
/// As [`restore_as`].
pub fn restore(
    history: &Arc<History>,
    request: &RestoreRequest,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<RestoreReport> {
    let restoring = Restoring::alone(&request.at, &request.to);
    restore_as(history, request, &Guarded::default(), &restoring, progress)
}

/// Restores. What the group itself is made of is guarded in any case.
///
/// # Errors
/// [`ErrorKind::NotPossible`] for the point, or a target that is being restored to; [`ErrorKind::Usage`] and
/// [`ErrorKind::Busy`] for the target, [`ErrorKind::Corrupt`] naming file and offset,
/// [`ErrorKind::Cancelled`]; no target keeps its name then.
pub fn restore_as(
    history: &Arc<History>,
    request: &RestoreRequest,
    guarded: &Guarded,
    restoring: &Restoring,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<RestoreReport> {
    let (point, _pin) = history.resolve_pinned(&request.at)?;
    let planned = plan(history, request, point, guarded, restoring)?;
    let mut report = RestoreReport {
        group: history.state().name,
        lsn: point.moment.lsn,
        time: rfc3339(point.moment.time_ns),
        volumes: planned.iter().map(Planned::report).collect(),
        undo_batches: history.newest_registered().saturating_sub(point.boundary),
        redo_bytes: redo_bytes(history, point)?,
        dry_run: request.dry_run,
        warnings: history.points().warnings,
    };
    if request.dry_run {
        return Ok(report);
    }
    let mut targets = Vec::new();
    let written = write(history, request, point, &planned, &mut targets, restoring, progress);
    if let Err(error) = written {
        let left: Vec<String> = targets.iter().filter_map(|(_, _, target)| target.left()).collect();
        return Err(if left.is_empty() {
            error
        } else {
            Error { at: format!("{}; {}", error.at, left.join("; ")), ..error }
        });
    }
    for (volume, (_, _, target)) in report.volumes.iter_mut().zip(targets) {
        volume.written_bytes = target.finish()?;
    }
    let total_bytes = planned.iter().map(|volume| volume.size_bytes).sum();
    progress(total_bytes, total_bytes);
    Ok(report)
}

/// Writes and syncs all targets; none has its name yet.
fn write(
    history: &Arc<History>,
    request: &RestoreRequest,
    point: Point,
    planned: &[Planned],
    targets: &mut Vec<(VolumeId, u64, Target)>,
    restoring: &Restoring,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let total_bytes = planned.iter().map(|volume| volume.size_bytes).sum();
    let mut done_bytes = 0;
    restoring.passed(0, total_bytes)?;
    for volume in planned {
        let go_on = || restoring.go_on();
        let target = Target::create(&history.disk, &volume.place, volume.size_bytes, request.force, go_on)?;
        targets.push((volume.id, volume.size_bytes, target));
        let (_, _, target) = targets.last_mut().expect("just pushed");
        let mut passed = |bytes| {
            progress(done_bytes + bytes, total_bytes);
            restoring.passed(done_bytes + bytes, total_bytes)
        };
        Content::new(history, point, volume)?.write(target, &mut passed)?;
        done_bytes += volume.size_bytes;
    }
    write_redo(history, point, targets, restoring)?;
    for (_, _, target) in &*targets {
        target.sync()?;
    }
    restoring.go_on()
}

impl Planned {
    fn report(&self) -> RestoredVolume {
        let Planned { name, size_bytes, path, .. } = self;
        RestoredVolume { name: name.clone(), size_bytes: *size_bytes, target: path.clone(), written_bytes: 0 }
    }
}

/// Which volumes go where; all targets are checked before the first is touched.
fn plan(
    history: &History,
    request: &RestoreRequest,
    point: Point,
    guarded: &Guarded,
    restoring: &Restoring,
) -> Result<Vec<Planned>> {
    let mut volumes = history.volumes_at(point.moment.lsn);
    if let Some(wanted) = &request.volume {
        let there: Vec<_> = volumes.iter().map(|(_, name, _)| name.clone()).collect();
        volumes.retain(|(_, name, _)| name == wanted);
        if volumes.is_empty() {
            let at = format!("no volume {wanted} at lsn {}; there: {}", point.moment.lsn, there.join(", "));
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
    }
    if volumes.is_empty() {
        return Err(Error::new(
            ErrorKind::NotPossible,
            format!("no volume exists at lsn {}", point.moment.lsn),
        ));
    }
    let is_machine = history.disk.is_machine();
    let mut guarded = guarded.clone();
    guarded.add(&ours(history));
    let into_dir = volumes.len() > 1 || (is_machine && request.to.is_dir());
    if into_dir && is_machine {
        target::refuse_dir(&request.to, &guarded)?;
    }
    let is_missing = into_dir && !(is_machine && request.to.is_dir());
    if is_missing && !request.dry_run {
        let made = history.disk.create_dir(&request.to);
        made.map_err(|e| Error::io(format!("create directory {}", request.to.display()), e))?;
    }
    let mut planned = Vec::new();
    for (id, name, size_bytes) in volumes {
        let path = if into_dir { request.to.join(format!("{name}.img")) } else { request.to.clone() };
        // Nothing can be in the way in a directory that is still to be made.
        let place = match is_machine && !(is_missing && request.dry_run) {
            true => Place::find(&path)?,
            false => Place { path: path.clone(), is_device: false, exists: false },
        };
        planned.push(Planned { id, name, size_bytes, path, place });
    }
    if !request.dry_run {
        // First of all, so that a restore that runs is named to the next.
        restoring.claim(planned.iter().map(|volume| volume.place.path.clone()).collect())?;
    }
    for Planned { size_bytes, path, place, .. } in &planned {
        if is_machine {
            target::check(place, path, *size_bytes, request.force, &guarded)?;
        } else {
            target::check_apart(&*history.disk, path, request.force)?;
        }
    }
    Ok(planned)
}

/// What no restore of this group may write to: the receiver's directory, and the replicas wherever they are.
fn ours(history: &History) -> Guarded {
    let mut guarded = Guarded::default();
    let dir = history.group_dir.as_path();
    let home = dir.parent().filter(|above| above.ends_with("groups")).and_then(Path::parent);
    guarded.dir(home.unwrap_or(dir));
    for known in &history.state().replicas {
        guarded.file(replica_path(dir, &known.path));
    }
    guarded
}

fn redo_bytes(history: &History, point: Point) -> Result<u64> {
    if point.boundary_lsn >= point.moment.lsn {
        return Ok(0);
    }
    let mut reader = history.reader()?;
    reader.seek_lsn(point.boundary_lsn.next()).map_err(damage)?;
    let limit: Limit = history.limit();
    let (mut frame, mut bytes) = (Vec::new(), 0);
    while let Some(header) = reader.next(&mut frame, limit).map_err(damage)? {
        bytes += u64::from(header.raw_bytes);
        // Not a frame further: it may be damaged, and is not needed.
        if header.last_lsn >= point.moment.lsn {
            break;
        }
    }
    Ok(bytes)
}

/// Redo in its order: what is written twice is written twice, the page cache keeps only the last.
fn write_redo(
    history: &History,
    point: Point,
    targets: &mut [(VolumeId, u64, Target)],
    restoring: &Restoring,
) -> Result<()> {
    replay(history, point.boundary_lsn, point.moment.lsn, |_, located| {
        restoring.go_on()?;
        let record = &located.record;
        let Some((_, size_bytes, target)) = targets.iter_mut().find(|(id, _, _)| *id == record.volume) else {
            return Ok(());
        };
        let end = record.extent.offset + record.extent.len;
        if !record.op.changes_content() || record.extent.len == 0 {
            return Ok(());
        }
        if end > *size_bytes {
            let at = format!("lsn {}: bytes up to {end} of a volume of {size_bytes}", record.lsn);
            return Err(Error::new(ErrorKind::Malformed, at));
        }
        match record.op {
            Op::Discard | Op::WriteZeroes => target.zero(record.extent.offset..end),
            _ => target.write(located.payload, record.extent.offset),
        }
    })
}

/// What to copy from the replica: all but zeros and large old pieces. Small ones are copied over and written
/// again, since a target that is laid out in one sweep is written much faster than one with thousands of
/// holes filled later.
fn worth_copying(pieces: &ExtentMap<UndoPiece>, window: &Range<u64>) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let mut from = window.start;
    for (range, piece) in pieces.iter() {
        if *piece == UndoPiece::Zeros || range.end - range.start >= SMALL_PIECE_BYTES {
            push_range(&mut ranges, from..range.start);
            from = range.end;
        }
    }
    push_range(&mut ranges, from..window.end);
    ranges
}

/// One volume at the boundary.
struct Content<'a> {
    history: &'a History,
    boundary: u64,
    volume: VolumeId,
    size_bytes: u64,
    replica: Arc<dyn File>,
    replica_path: PathBuf,
    buffer: Vec<u8>,
}

impl<'a> Content<'a> {
    fn new(history: &'a History, point: Point, volume: &Planned) -> Result<Content<'a>> {
        let (replica_path, replica) = history.replica(volume.id)?;
        Ok(Content {
            history,
            boundary: point.boundary,
            volume: volume.id,
            size_bytes: volume.size_bytes,
            replica,
            replica_path,
            buffer: Vec::new(),
        })
    }

    fn write(mut self, target: &mut Target, passed: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        let mut window_bytes = MAX_WINDOW_BYTES;
        let mut at = 0;
        while at < self.size_bytes {
            let window = at..self.size_bytes.min(at.saturating_add(window_bytes));
            let mut pieces = ExtentMap::new();
            passed(at)?;
            let Some(laid) = self.lay(&mut pieces, &window, self.boundary, window_bytes)? else {
                window_bytes = (window_bytes / 2).next_multiple_of(4096);
                continue;
            };
            self.write_window(target, &window, pieces, laid, passed)?;
            at = window.end;
            window_bytes = (window_bytes * 2).min(MAX_WINDOW_BYTES);
        }
        Ok(())
    }

    /// Lays the batches above `laid` under `pieces`; returns the newest laid, or `None` when the window is
    /// too large.
    fn lay(
        &self,
        pieces: &mut ExtentMap<UndoPiece>,
        window: &Range<u64>,
        laid: u64,
        window_bytes: u64,
    ) -> Result<Option<u64>> {
        let newest = self.history.newest_registered();
        let most = if window_bytes > MIN_WINDOW_BYTES { MAX_EXTENTS } else { usize::MAX };
        let all = self.history.lay_under(laid, newest, pieces, self.volume, window, most)?;
        Ok(all.then_some(newest))
    }

    fn write_window(
        &mut self,
        target: &mut Target,
        window: &Range<u64>,
        mut pieces: ExtentMap<UndoPiece>,
        mut laid: u64,
        passed: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        for range in worth_copying(&pieces, window) {
            self.copy_replica(target, range, passed)?;
        }
        // The replica is read; now the registry once more, until nothing is new.
        let before = laid;
        loop {
            // What is added now lies in what was just copied; a window cannot be halved any more.
            let newest = self.lay(&mut pieces, window, laid, 0)?.expect("only large windows are refused");
            if newest == laid {
                break;
            }
            laid = newest;
        }
        let copied_newer = laid != before;
        let sorted = in_frame_order(&pieces);
        let mut frames: Vec<(u64, u32)> = Vec::new();
        let mut writes: Vec<Vec<(Range<u64>, u32)>> = Vec::new();
        for (extent, piece) in sorted {
            match piece {
                UndoPiece::Bytes { batch, frame, at } => {
                    if frames.last() != Some(&(batch, frame)) {
                        frames.push((batch, frame));
                        writes.push(Vec::new());
                    }
                    writes.last_mut().expect("just pushed").push((extent, at));
                }
                // Targets begin as zeros; only what a batch wrote under our hands must go again.
                UndoPiece::Zeros if copied_newer => target.zero(extent)?,
                UndoPiece::Zeros => {}
            }
        }
        drop(pieces);
        unpack_ahead(self.history, &frames, |index, segment, unpacked| {
            passed(window.start)?;
            for (extent, at) in &writes[index] {
                let bytes = unpacked.slice(*at, extent.end - extent.start, segment.path())?;
                target.write(bytes, extent.start)?;
            }
            Ok(())
        })?;
        target.start_writeback(window.clone())?;
        passed(window.end)
    }

    fn copy_replica(
        &mut self,
        target: &mut Target,
        gap: Range<u64>,
        passed: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let path = &self.replica_path;
        let failed = |at: u64, e| Error::replica(format!("read replica {} at byte {at}", path.display()), e);
        let mut at = gap.start;
        while let Some(data) = self.replica.next_data(at).map_err(|e| failed(at, e))? {
            let mut from = data.start.max(gap.start);
            let end = data.end.min(gap.end);
            while from < end {
                let bytes = usize::try_from(COPY_BYTES.min(end - from)).expect("at most COPY_BYTES");
                self.buffer.resize(bytes, 0);
                let got = self.replica.read_at(&mut self.buffer, from).map_err(|e| failed(from, e))?;
                target.write_sparse(&self.buffer[..got], from)?;
                from += bytes as u64;
                passed(from)?;
            }
            if data.end >= gap.end {
                break;
            }
            at = data.end;
        }
        Ok(())
    }
}
