//! How a run begins: what the last one left is examined, and either taken over or followed by a new epoch.
//!
//! | found | what happens |
//! |---|---|
//! | ring of this boot, group and epoch; journal joins it | undone writes are redone to the backing; same epoch |
//! | … and it holds dirty bits | same epoch; the dirty ranges are synchronised |
//! | no ring, clean stop, backing unchanged | same epoch, a new ring |
//! | anything else (ring lost, unclean machine, gap remembered, volumes changed) | new epoch, everything is synchronised |
//!
//! Invariant: nothing is served before this has decided, and every doubt ends in a synchronisation of everything.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::io::{Disk, RealDisk};
use journal::record::VolumeRecord;
use journal::writer::{Writer, WriterOptions};
use journal::{Lsn, Position, VolumeId, VolumeUuid};
use kfilter::region::{RegionSpec, boot_id};
use kfilter::{Identity, Op, VolumeSpec};
use nbd::{Access, Backing};

use crate::SharedRing;
use crate::buffered_disk::BufferedDisk;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Gap, KnownVolume, StateFile};

/// Sector size that is told downstream; NBD clients are held to it.
const SECTOR_BYTES: u32 = 512;

/// A volume with its content, before it is captured.
pub struct OpenVolume {
    /// What the group knows of it.
    pub known: KnownVolume,
    /// Where it lives.
    pub path: PathBuf,
    /// Its content.
    pub backing: Backing,
}

/// What has to be synchronised before the front serves.
pub enum Repair {
    /// Nothing.
    None,
    /// The dirty ranges of each volume, in the same epoch.
    Dirty(Vec<(VolumeId, Vec<Range<u64>>)>),
    /// Everything, in a new epoch.
    Everything,
}

/// A run that is ready to go.
pub struct Started {
    /// Durable state.
    pub state: StateFile,
    /// The volumes.
    pub volumes: Vec<OpenVolume>,
    /// The group's ring.
    pub ring: SharedRing,
    /// The source journal, in the current epoch; where none can be had, why: the disk is served all the same.
    pub writer: std::result::Result<Writer, String>,
    /// What is to be done first.
    pub repair: Repair,
    /// Why, in an operator's words; empty when nothing is to be done.
    pub cause: String,
    /// No replica was ever consistent: this is the first synchronisation.
    pub first: bool,
    /// Time of the newest journaled record, ns; 0 where there is none.
    pub last_time_ns: u64,
}

/// Where the ring of this group lives.
pub fn ring_dir(settings: &conf::Replicator, state: &StateFile) -> PathBuf {
    settings.ring_dir.join(state.get().group.to_string())
}

/// Decides and prepares.
///
/// # Errors
/// Settings that do not fit what is there, a backing that cannot be opened or shrank, no room for the ring.
pub fn start(settings: &conf::Replicator) -> Result<Started> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let mut state = StateFile::open(&disk, &settings.dir)?;
    let first = state.get().epoch.number == 0;
    let (volumes, mut doubts) = open_volumes(settings, &mut state)?;
    if first {
        doubts.push("first synchronisation".to_owned());
    }
    let buffered: Arc<dyn Disk> = Arc::new(BufferedDisk::new(disk));
    let (writer, doubt, unusable) = match open_journal(&buffered, settings, &mut state) {
        Ok((writer, doubt)) => (writer, doubt, None),
        Err(error) => (None, Some("the source journal cannot be used".to_owned()), Some(describe(&error))),
    };
    doubts.extend(doubt);

    let journaled = writer.as_ref().map(|writer| writer.appended().lsn);
    let taken = take_over(settings, &state, &volumes, writer.as_ref())?;
    // An lsn that the dead run may have given out: the ring knows, or the lease covers it.
    let mut last = None;
    let mut same_epoch = None;
    match taken {
        Ok(ring) => {
            last = Some(Lsn(ring.captured_lsn()));
            same_epoch = Some(ring);
        }
        Err(_) if doubts.is_empty() && journaled.is_some() && state.get().clean == journaled => {
            last = journaled
        }
        Err(lost) => {
            last = last.or(state.get().clean);
            // After a clean stop there is no ring to be found: that is no news.
            if !first && state.get().clean.is_none() {
                doubts.push(lost);
            } else if doubts.is_empty() {
                doubts.push("the source journal does not end where the last run stopped".to_owned());
            }
        }
    }
    let last_time_ns =
        writer.as_ref().and_then(|writer| writer.segments().iter().map(|s| s.last_time_ns).max());
    let last_time_ns = last_time_ns.unwrap_or(0);
    if doubts.is_empty()
        && let Some(writer) = writer
    {
        let (ring, repair, cause) = match same_epoch {
            Some(ring) => dirty_repair(ring, &volumes),
            None => {
                let first_lsn = last.unwrap_or_default().next();
                let ring = create_ring(settings, &state, &volumes, first_lsn, last_time_ns)?;
                (ring, Repair::None, String::new())
            }
        };
        // The ring stands: from here on the next start goes by it.
        state.update(|state| state.clean = None)?;
        return Ok(Started { state, volumes, ring, writer: Ok(writer), repair, cause, first, last_time_ns });
    }
    drop(same_epoch);

    // New epoch. Order: 1 the gap is durable, so that a crash from here on ends in this branch again; 2 the epoch is
    // durable, above everything used; 3 the journal's epoch begins; 4 the ring, whose name appears last.
    let cause = doubts.join("; ");
    state.update(|state| state.needs_resync = Some(Gap { cause: cause.clone(), since_ns: now_ns() }))?;
    let last = last.map(|last| last.max(journaled.unwrap_or_default()).max(state.get().epoch_start));
    state.begin_epoch(last, true)?;
    let at = Position::epoch_start(state.get().lineage, state.get().epoch, state.get().epoch_start);
    let dir = settings.dir.join("journal");
    let begun = match (writer, unusable) {
        (_, Some(why)) => Err(why),
        (Some(mut writer), None) => {
            writer.begin_epoch(at, now_ns()).map(|()| writer).map_err(|error| error.to_string())
        }
        (None, None) => Writer::create(buffered, &dir, writer_options(settings, &state), at, now_ns())
            .map_err(|error| error.to_string()),
    };
    let ring = create_ring(settings, &state, &volumes, at.lsn.next(), last_time_ns)?;
    if begun.is_err() {
        ring.set_mode_bitmap(kfilter::dirty::CAUSE_AGENT, now_ns());
    }
    Ok(Started {
        state,
        volumes,
        ring,
        writer: begun,
        repair: Repair::Everything,
        cause,
        first,
        last_time_ns,
    })
}

/// An error and what is behind it, in one line.
fn describe(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn writer_options(settings: &conf::Replicator, state: &StateFile) -> WriterOptions {
    WriterOptions { group: state.get().group, segment_bytes: settings.journal.segment_bytes }
}

/// Opens the backings and compares them with what the group knows; returns what gives reason to doubt the replica.
fn open_volumes(
    settings: &conf::Replicator,
    state: &mut StateFile,
) -> Result<(Vec<OpenVolume>, Vec<String>)> {
    let mut doubts: Vec<String> = state.get().needs_resync.iter().map(|gap| gap.cause.clone()).collect();
    let mut opened = Vec::new();
    let clean = state.get().clean.is_some();
    let first = state.get().volumes.is_empty();
    let mut known: Vec<KnownVolume> = state.get().volumes.clone();
    for volume in &settings.volume {
        create_missing(volume)?;
        let stamp = stamp(&volume.path);
        let backing = Backing::open(&volume.path, Access::ReadWrite)
            .map_err(|error| Error::because(ErrorKind::Settings, format!("volume {}", volume.name), error))?;
        let size_bytes = backing.size_bytes();
        if size_bytes == 0 {
            let at = format!("volume {}: {} is empty; give it a size", volume.name, volume.path.display());
            return Err(Error::new(ErrorKind::Settings, at));
        }
        let at = match known.iter().position(|known| known.name == volume.name) {
            Some(at) => at,
            None => {
                let id = known.iter().map(|known| known.id.0 + 1).max().unwrap_or(0);
                if !first {
                    doubts.push(format!("volume {} was added", volume.name));
                }
                known.push(KnownVolume {
                    id: VolumeId(id),
                    uuid: VolumeUuid(*uuid::Uuid::new_v4().as_bytes()),
                    name: volume.name.clone(),
                    size_bytes,
                    stamp,
                    present: true,
                });
                known.len() - 1
            }
        };
        let entry = &mut known[at];
        if size_bytes < entry.size_bytes {
            let at = format!(
                "volume {}: {} shrank from {} to {size_bytes} bytes; a volume never shrinks: give it its size back, or \
                 protect it under a new name",
                volume.name,
                volume.path.display(),
                entry.size_bytes
            );
            return Err(Error::new(ErrorKind::Settings, at));
        }
        if size_bytes > entry.size_bytes {
            doubts.push(format!("volume {} grew", volume.name));
        }
        if clean && (stamp.is_none() || stamp != entry.stamp) {
            doubts.push(format!("volume {} was changed while it was not protected", volume.name));
        }
        if !entry.present {
            doubts.push(format!("volume {} came back", volume.name));
        }
        entry.size_bytes = size_bytes;
        entry.present = true;
        opened.push(OpenVolume { known: entry.clone(), path: volume.path.clone(), backing });
    }
    for known in &mut known {
        if known.present && !settings.volume.iter().any(|volume| volume.name == known.name) {
            doubts.push(format!("volume {} left the group", known.name));
            known.present = false;
        }
    }
    if !doubts.is_empty() {
        // Before the sizes are remembered: a crash in between must find the doubt again.
        let cause = doubts.join("; ");
        state.update(|state| state.needs_resync = Some(Gap { cause, since_ns: now_ns() }))?;
    }
    state.update(|state| state.volumes = known)?;
    Ok((opened, doubts))
}

fn create_missing(volume: &conf::Volume) -> Result<()> {
    let Some(size) = volume.size else { return Ok(()) };
    if volume.path.exists() {
        return Ok(());
    }
    let create = || -> std::io::Result<()> {
        if let Some(parent) = volume.path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&volume.path)?;
        file.set_len(size)?;
        file.sync_all()
    };
    create().map_err(|error| {
        let at = format!("volume {}: create {}", volume.name, volume.path.display());
        Error::because(ErrorKind::Io, at, error)
    })
}

/// What changes when others write to a backing while nobody protects it. Files: change time, modification time and
/// inode. Block devices: the sectors written to them since this boot; another boot always differs.
pub fn stamp(path: &Path) -> Option<[u64; 3]> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let metadata = std::fs::metadata(path).ok()?;
    if metadata.is_file() {
        let ns = |seconds: i64, nanos: i64| {
            seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos).cast_unsigned()
        };
        let changed = ns(metadata.ctime(), metadata.ctime_nsec());
        return Some([changed, ns(metadata.mtime(), metadata.mtime_nsec()), metadata.ino()]);
    }
    if !metadata.file_type().is_block_device() {
        return None;
    }
    let device = metadata.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    // Fields of the kernel's block/stat: the seventh is sectors written.
    let written = stat.split_whitespace().nth(6)?.parse().ok()?;
    let boot = u128::from_be_bytes(boot_id().ok()?);
    let low = u64::try_from(boot & u128::from(u64::MAX)).ok()?;
    Some([low, u64::try_from(boot >> 64).ok()?, written])
}

/// Opens the source journal. A damaged one is set aside: the source disk is the truth, so the price is a
/// synchronisation, never a refusal to serve.
fn open_journal(
    disk: &Arc<dyn Disk>,
    settings: &conf::Replicator,
    state: &mut StateFile,
) -> Result<(Option<Writer>, Option<String>)> {
    let dir = settings.dir.join("journal");
    let create = |error| Error::because(ErrorKind::Io, format!("create {}", dir.display()), error);
    disk.create_dir(&dir).map_err(create)?;
    let set_aside = |why: &dyn std::fmt::Display| {
        let aside = settings.dir.join(format!("journal.damaged-{}", now_ns()));
        tracing::error!(%why, aside = %aside.display(), "the source journal is damaged; it is set aside, remove it when it was looked at");
        std::fs::rename(&dir, &aside)
            .map_err(|error| Error::because(ErrorKind::Io, format!("set aside {}", dir.display()), error))?;
        disk.create_dir(&dir).map_err(create)
    };
    if state.get().journal_damaged {
        set_aside(&"a frame that the receiver needs is unreadable")?;
        state.update(|state| state.journal_damaged = false)?;
        return Ok((None, Some("the source journal was damaged".to_owned())));
    }
    if !Writer::exists(disk.as_ref(), &dir)? {
        if disk.list(&dir).is_ok_and(|names| names.iter().any(|name| name.ends_with(".seg"))) {
            set_aside(&"its control file is gone")?;
        }
        return Ok((None, (state.get().epoch.number > 0).then(|| "the source journal is gone".to_owned())));
    }
    let current = state.get().epoch;
    match Writer::open(disk.clone(), &dir, writer_options(settings, state), now_ns()) {
        Ok((writer, recovery)) => {
            if let Some(torn) = &recovery.torn {
                tracing::info!(segment = recovery.segment, ?torn, "source journal: torn tail cut");
            }
            let doubt = (writer.appended().epoch != current)
                .then(|| "the last run ended before its epoch had begun in the journal".to_owned());
            Ok((Some(writer), doubt))
        }
        Err(error) if matches!(error.kind, journal::ErrorKind::Corrupt | journal::ErrorKind::Malformed) => {
            set_aside(&error)?;
            Ok((None, Some(format!("the source journal was damaged: {error}"))))
        }
        Err(error) => Err(error.into()),
    }
}

/// The ring of the last run, redone to the backings, or in words why it is lost.
fn take_over(
    settings: &conf::Replicator,
    state: &StateFile,
    volumes: &[OpenVolume],
    writer: Option<&Writer>,
) -> Result<std::result::Result<SharedRing, String>> {
    let dir = ring_dir(settings, state);
    std::fs::create_dir_all(&dir)
        .map_err(|error| Error::because(ErrorKind::Ring, format!("create {}", dir.display()), error))?;
    let expected = ring_identity(state)?;
    let taken = match SharedRing::take_over(&dir, &expected) {
        Ok(taken) => taken,
        Err(error) => {
            return match error.kind {
                kfilter::ErrorKind::Absent => {
                    Ok(Err("the machine or the agent did not stop cleanly".to_owned()))
                }
                kfilter::ErrorKind::Lost(lost) => Ok(Err(format!("the ring was lost: {lost}"))),
                kfilter::ErrorKind::Busy => {
                    Err(Error::because(ErrorKind::Busy, "another agent serves this group", error))
                }
                _ => Err(Error::because(ErrorKind::Ring, "take over the ring", error)),
            };
        }
    };
    let mut redone = 0_u64;
    let mut failed = Vec::new();
    for record in taken.undone() {
        if let Err(error) = redo(&record, volumes) {
            // The write was never answered: its range is read again instead of keeping the whole disk from its users.
            tracing::error!(%error, "an unfinished write of the last run cannot be redone");
            failed.push((record.volume(), record.offset()..record.offset() + record.length()));
        }
        taken.mark_done(&record);
        redone += 1;
    }
    let ring =
        taken.finish().map_err(|_| Error::new(ErrorKind::Ring, "the ring still holds undone writes"))?;
    for (volume, range) in failed {
        ring.mark_dirty(volume, range);
    }
    if redone > 0 {
        tracing::info!(writes = redone, "writes of the last run redone to the backing");
    }
    let first_held = ring.first_held_lsn();
    let journaled = writer.map(|writer| writer.appended().lsn.0);
    match journaled {
        Some(journaled) if first_held <= journaled + 1 => Ok(Ok(ring)),
        _ => Ok(Err("the source journal does not reach the ring".to_owned())),
    }
}

/// Writes one published, undone record to its backing.
fn redo(record: &kfilter::RecordRef<'_>, volumes: &[OpenVolume]) -> Result<()> {
    let Some(volume) = volumes.iter().find(|volume| volume.known.id.0 == record.volume()) else {
        return Ok(()); // The volume has left the group; nobody will be served its content.
    };
    let redone = match record.op() {
        Op::Write => volume.backing.write_at(record.offset(), record.payload()),
        Op::Discard | Op::WriteZeroes => {
            volume.backing.write_zeroes(record.offset(), record.length(), false, false)
        }
        _ => Ok(()),
    };
    redone.map_err(|error| {
        let at = format!(
            "volume {}: redo the write at byte {} (lsn {})",
            volume.known.name,
            record.offset(),
            record.lsn()
        );
        Error::because(ErrorKind::Io, at, error)
    })
}

fn ring_identity(state: &StateFile) -> Result<Identity> {
    let boot_id = boot_id().map_err(|error| Error::because(ErrorKind::Ring, "read the boot id", error))?;
    let state = state.get();
    Ok(Identity { boot_id, group_id: state.group.0, epoch: state.epoch.number, epoch_id: state.epoch.id.0 })
}

fn create_ring(
    settings: &conf::Replicator,
    state: &StateFile,
    volumes: &[OpenVolume],
    first_lsn: Lsn,
    last_time_ns: u64,
) -> Result<SharedRing> {
    let specs: Vec<VolumeSpec> = volumes
        .iter()
        .map(|volume| VolumeSpec {
            id: volume.known.id.0,
            sector_bytes: SECTOR_BYTES,
            uuid: volume.known.uuid.0,
            size_bytes: volume.known.size_bytes,
        })
        .collect();
    let spec = RegionSpec {
        identity: ring_identity(state)?,
        volumes: &specs,
        ring_bytes: settings.ring.bytes,
        first_lsn: first_lsn.0,
        last_time_ns,
    };
    let dir = ring_dir(settings, state);
    SharedRing::create(&dir, &spec).map_err(|error| Error::because(ErrorKind::Ring, "make the ring", error))
}

/// What a ring that was taken over leaves to repair.
fn dirty_repair(ring: SharedRing, volumes: &[OpenVolume]) -> (SharedRing, Repair, String) {
    let dirty: Vec<_> = volumes
        .iter()
        .map(|volume| (volume.known.id, ring.dirty_extents(volume.known.id.0).collect::<Vec<_>>()))
        .collect();
    // `loss` stays until `resync-end`: an owner that died after the last range was sent still owes the end.
    if ring.loss().is_none() && dirty.iter().all(|(_, ranges)| ranges.is_empty()) {
        return (ring, Repair::None, String::new());
    }
    let cause = match ring.loss().map(|loss| loss.cause) {
        Some(kfilter::dirty::CAUSE_RING_FULL) => "the ring had overflowed",
        _ => "writes had not been recorded",
    };
    (ring, Repair::Dirty(dirty), cause.to_owned())
}

/// The `volume` record that states a volume in the stream.
pub fn volume_record(known: &KnownVolume) -> Vec<u8> {
    let record = VolumeRecord {
        uuid: known.uuid,
        size_bytes: known.size_bytes,
        sector_bytes: SECTOR_BYTES,
        present: known.present,
        name: known.name.clone(),
    };
    record.encode()
}
