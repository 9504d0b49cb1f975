//! How a run begins: what the last one left is examined, and either taken over or followed by a new epoch.
//!
//! | found | what happens |
//! |---|---|
//! | ring of this boot, group and epoch; the journal joins it; the disks are those that it served | taken over (the front redoes undone writes); same epoch; what is dirty is synchronised, online |
//! | no ring, clean stop, disks unchanged | same epoch, a new ring |
//! | either of these, but nothing proves that a disk is unchanged (`proof`) | the same, and its content is compared in the background |
//! | anything else (ring lost, a disk that others wrote to, unclean machine, gap remembered, volumes changed) | new epoch, a new ring in which everything is dirty |
//!
//! The ring is the NBD front's in tmpfs (`front`) or the kernel module's (`kernel`).
//!
//! Invariant: nothing is served before this has decided, and every doubt ends in a synchronisation of
//! everything. A new epoch's ring begins with its volumes, then all bits are set and writes only set bits,
//! until `resync-begin`.

use std::path::PathBuf;
use std::sync::Arc;

use journal::buffered_disk::BufferedDisk;
use journal::record::{InDoubt, VolumeRecord};
use journal::writer::{Writer, WriterOptions};
use journal::{Lsn, Position, VolumeId};
use kfilter::region::boot_id;
use kfilter::{Group, Identity, Region, VolumeSpec};
use machine::disk::Continuity;
use nbd::Backing;

use crate::allocated;
use crate::capture::disk::Disk;
use crate::cause;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result, describe};
use crate::skipped::Skipped;
use crate::state::{Gap, KnownVolume, StateFile};
use crate::surroundings::Surroundings;
use proof::Verdict;

mod front;
mod journal_dir;
pub(crate) mod kernel;
pub(crate) mod proof;
pub(crate) mod rings;
mod room;
mod volumes;

pub use rings::ring_dir;

/// Sector size that is told downstream; NBD clients are held to it.
const SECTOR_BYTES: u32 = 512;

/// A volume with its content, before it is captured.
pub struct OpenVolume {
    /// What the group knows of it.
    pub known: KnownVolume,
    /// Where it lives.
    pub path: PathBuf,
    /// Its content.
    pub content: Opened,
    /// Whether it is the disk that was served, whatever was written to it.
    pub(crate) identity: Verdict,
    /// What it was when it was opened, where that can be told.
    pub(crate) seen: Option<Continuity>,
}

/// Where a volume's content is.
pub enum Opened {
    /// Behind the NBD front.
    Front(Backing),
    /// A device for the kernel module; none while it is detached.
    Device(Option<Disk>),
}

/// The ring of a run.
pub enum OpenRing {
    /// The NBD front's.
    Front(Region),
    /// The kernel's.
    Kernel(Group),
}

/// A run that is ready to go.
pub struct Started {
    /// Durable state.
    pub state: StateFile,
    /// The volumes.
    pub volumes: Vec<OpenVolume>,
    /// The group's ring.
    pub ring: OpenRing,
    /// The source journal, in the current epoch; where none can be had, why: the disk is served all the same.
    pub writer: std::result::Result<Writer, String>,
    /// Why something has to be synchronised, in an operator's words; empty when nothing has.
    pub cause: String,
    /// Time of the newest journaled record, ns; 0 where there is none.
    pub last_time_ns: u64,
    /// What is not sent because a file system calls it free.
    pub(crate) skipped: Skipped,
}

/// What gives reason to doubt the replica.
#[derive(Default)]
struct Doubts {
    /// In any case.
    always: Vec<String>,
    /// Unless the ring of the last run is taken over: it has seen everything since.
    without_ring: Vec<String>,
    /// Volumes whose content is to be compared while replication goes on, and why …
    unproven: Vec<(VolumeId, String)>,
    /// … and the same unless the ring of the last run is taken over.
    unproven_without_ring: Vec<(VolumeId, String)>,
}

/// What a ring that was taken over shows of the disks.
#[derive(Default)]
struct Judged {
    /// Disks that are others, or were changed by others.
    other: Vec<String>,
    /// Disks of which nothing proves that they were not.
    unproven: Vec<(VolumeId, String)>,
}

/// What a start finds, and decides by.
struct Found<'a> {
    settings: &'a conf::Replicator,
    volumes: &'a [OpenVolume],
    /// Where the journal ends, if there is one.
    journaled: Option<Lsn>,
    last_time_ns: u64,
}

/// Decides and prepares.
///
/// # Errors
/// Settings that do not fit what is there, a disk that cannot be opened or shrank, no room for the ring.
pub fn start(settings: &conf::Replicator, surroundings: &Surroundings) -> Result<Started> {
    let disk = surroundings.disk.clone();
    let mut state = StateFile::open(&disk, &settings.dir)?;
    let first = state.get().epoch.number == 0;
    let (volumes, mut doubts) = volumes::open(settings, surroundings, &mut state)?;
    if first {
        doubts.always.push("first synchronisation".to_owned());
    }
    let buffered = journal_disk(surroundings);
    let (writer, doubt, unusable) = match journal_dir::open(&buffered, settings, &mut state) {
        Ok((writer, doubt)) => (writer, doubt, None),
        Err(error) => (None, Some("the source journal cannot be used".to_owned()), Some(describe(&error))),
    };
    doubts.always.extend(doubt);
    let times = writer.as_ref().and_then(|writer| writer.segments().iter().map(|s| s.last_time_ns).max());
    let skipped = Skipped::open(&settings.dir);
    let found = Found {
        settings,
        volumes: &volumes,
        journaled: writer.as_ref().map(|writer| writer.appended().lsn),
        last_time_ns: times.unwrap_or(0),
    };
    let last_time_ns = found.last_time_ns;

    let mut judged = Judged::default();
    let taken = found.take_over(&state, &mut judged)?;
    doubts.always.append(&mut judged.other);
    // An lsn that the dead run may have given out: the ring knows, or the lease covers it.
    let mut last = None;
    let mut same_epoch = None;
    match taken {
        Ok(ring) => {
            last = Some(Lsn(ring.captured_lsn()?));
            doubts.unproven.append(&mut judged.unproven);
            same_epoch = Some(ring);
        }
        Err(lost) => {
            doubts.always.append(&mut doubts.without_ring);
            doubts.unproven.append(&mut doubts.unproven_without_ring);
            let clean = state.get().clean;
            if doubts.always.is_empty() && found.journaled.is_some() && clean == found.journaled {
                last = clean;
            } else {
                last = last.or(clean);
                // After a clean stop there is no ring to be found: that is no news.
                if !first && clean.is_none() {
                    doubts.always.push(lost);
                } else if doubts.always.is_empty() {
                    doubts
                        .always
                        .push("the source journal does not end where the last run stopped".to_owned());
                }
            }
        }
    }
    if doubts.always.is_empty()
        && let Some(writer) = writer
    {
        let (ring, cause) = match same_epoch {
            Some(ring) => {
                let cause = dirty_cause(&ring, &volumes, &state);
                (ring, cause)
            }
            None => (found.create_clean(&mut state, last.unwrap_or_default().next())?, String::new()),
        };
        // The ring stands: from here on the next start goes by it.
        let since = InDoubt { after: last.unwrap_or_default(), time_ns: now_ns().max(last_time_ns) };
        state.update(|state| {
            state.clean = None;
            for known in &mut state.volumes {
                let unproven = doubts.unproven.iter().find(|(id, _)| *id == known.id);
                if let Some((_, why)) = unproven {
                    known.doubt(why);
                    state.unproven_since.get_or_insert(since);
                }
            }
        })?;
        for known in &state.get().volumes {
            if let Some(why) = &known.unproven {
                tracing::warn!(volume = %known.name, why, "nothing proves that this disk was not changed: it is compared");
            }
        }
        return Ok(Started { state, volumes, ring, writer: Ok(writer), cause, last_time_ns, skipped });
    }
    drop(same_epoch);

    // New epoch. Order: 1 the gap is durable, so that a crash from here on ends in this branch again; 2 the
    // epoch is durable, above everything used; 3 the journal's epoch begins; 4 the ring, in which everything
    // is dirty; 5 it is durable that the ring knows of the gap.
    let cause = cause::join(doubts.always.iter().map(String::as_str));
    state.update(|state| {
        state.needs_resync = Some(Gap { cause: cause.clone(), since_ns: now_ns() });
        state.gap_in_ring = false;
    })?;
    // Above all that is known to have been used: also where the control file is older than the journal.
    let last = last.unwrap_or(state.get().lease_end);
    let last = last.max(found.journaled.unwrap_or_default()).max(state.get().epoch_start);
    if let Some(writer) = &writer
        && writer.appended().epoch.number > state.get().epoch.number
    {
        let number = writer.appended().epoch.number;
        state.update(|state| state.above_epoch = state.above_epoch.max(number))?;
    }
    state.begin_epoch(Some(last), true)?;
    let at = Position::epoch_start(state.get().lineage, state.get().epoch, state.get().epoch_start);
    let begun = match unusable {
        Some(why) => Err(why),
        None => {
            begin_in_journal(settings, surroundings, &state, writer, at).map_err(|error| describe(&error))
        }
    };
    if first {
        found.skip_free(&skipped);
    }
    let ring = found.create(&mut state, at.lsn.next(), first.then_some(&skipped))?;
    state.update(|state| state.gap_in_ring = begun.is_ok())?;
    Ok(Started { state, volumes, ring, writer: begun, cause, last_time_ns, skipped })
}

impl Found<'_> {
    /// The ring of the last run, or in words why it is lost.
    fn take_over(
        &self,
        state: &StateFile,
        judged: &mut Judged,
    ) -> Result<std::result::Result<OpenRing, String>> {
        let taken = match self.settings.capture {
            conf::Capture::Nbd => front::take_over(self, state, judged)?.map(OpenRing::Front),
            conf::Capture::Kfilter => kernel::take_over(self, state)?.map(OpenRing::Kernel),
        };
        match taken {
            Ok(ring) => {
                let (first_held, captured) = (ring.first_held_lsn(), ring.captured_lsn()?);
                Ok(self.joins(state, first_held, captured).map(|()| ring))
            }
            Err(lost) => Ok(Err(lost)),
        }
    }

    /// Whether a ring of this group and epoch joins the journal and the state, or in words why not. One that
    /// was moved away and brought back is behind: to go on with it would use lsns twice, and forget what was
    /// captured since.
    fn joins(&self, state: &StateFile, first_held: u64, captured: u64) -> std::result::Result<(), String> {
        let state = state.get();
        let Some(journaled) = self.journaled else {
            return Err("there is no source journal that the ring could join".to_owned());
        };
        if captured < journaled.0 {
            return Err("the ring is older than the source journal".to_owned());
        }
        if captured < state.epoch_start.0 {
            return Err("the ring is older than its epoch".to_owned());
        }
        // What was given up behind the journal's end is dirty in that ring; anything else is missing.
        if first_held > journaled.0 + 1 && !state.given_up {
            return Err("the source journal does not reach the ring".to_owned());
        }
        Ok(())
    }

    /// A new ring in the current epoch; it begins with the volumes, and everything is dirty but what is
    /// skipped.
    fn create(&self, state: &mut StateFile, first_lsn: Lsn, skipped: Option<&Skipped>) -> Result<OpenRing> {
        Ok(match self.settings.capture {
            conf::Capture::Nbd => OpenRing::Front(front::create(self, state, first_lsn, skipped)?),
            conf::Capture::Kfilter => OpenRing::Kernel(kernel::create(self, state, first_lsn, false)?),
        })
    }

    /// The same where the replica is known to equal the disks.
    fn create_clean(&self, state: &mut StateFile, first_lsn: Lsn) -> Result<OpenRing> {
        Ok(match self.settings.capture {
            conf::Capture::Nbd => OpenRing::Front(front::create_clean(self, state, first_lsn)?),
            conf::Capture::Kfilter => OpenRing::Kernel(kernel::create(self, state, first_lsn, true)?),
        })
    }

    /// Notes what the volumes' file systems call free, before anybody is served for the first time.
    fn skip_free(&self, skipped: &Skipped) {
        for (volume, settings) in self.volumes.iter().zip(&self.settings.volume) {
            let is_front = matches!(volume.content, Opened::Front(_));
            if settings.sync != conf::SyncMode::Allocated || !is_front {
                continue;
            }
            let size_bytes = volume.known.size_bytes;
            let free = allocated::of_unmounted(&volume.path, size_bytes).and_then(|free| {
                let runs = free.runs(0..size_bytes, true);
                skipped.add(volume.known.id.0, size_bytes, &runs).map_err(|error| describe(&error))?;
                Ok(free.bytes())
            });
            let name = &volume.known.name;
            match free {
                Ok(free_bytes) => {
                    tracing::info!(volume = %name, free_bytes, size_bytes, "free space is not sent")
                }
                Err(why) => {
                    tracing::warn!(volume = %name, why, "free space cannot be told apart: everything is sent")
                }
            }
        }
    }

    fn specs(&self) -> Vec<VolumeSpec> {
        self.volumes.iter().map(|volume| volume.known.spec()).collect()
    }
}

impl KnownVolume {
    /// As a ring is made for it.
    fn spec(&self) -> VolumeSpec {
        VolumeSpec {
            id: self.id.0,
            sector_bytes: SECTOR_BYTES,
            uuid: self.uuid.0,
            size_bytes: self.size_bytes,
        }
    }
}

impl OpenRing {
    fn captured_lsn(&self) -> Result<u64> {
        match self {
            OpenRing::Front(region) => Ok(region.captured_lsn()),
            OpenRing::Kernel(group) => group
                .status()
                .map(|status| status.captured_lsn)
                .map_err(|error| Error::because(ErrorKind::Ring, "ask the kernel module", error)),
        }
    }

    fn first_held_lsn(&self) -> u64 {
        match self {
            OpenRing::Front(region) => region.first_held_lsn(),
            OpenRing::Kernel(group) => group.first_held_lsn(),
        }
    }

    fn loss(&self) -> Option<kfilter::Loss> {
        match self {
            OpenRing::Front(region) => region.loss(),
            OpenRing::Kernel(group) => group.loss(),
        }
    }

    fn is_dirty(&self, volume: u32) -> bool {
        match self {
            OpenRing::Front(region) => region.is_dirty(volume),
            OpenRing::Kernel(group) => group.is_dirty(volume),
        }
    }
}

/// Why what a ring that was taken over holds dirty is so; empty when nothing is.
fn dirty_cause(ring: &OpenRing, volumes: &[OpenVolume], state: &StateFile) -> String {
    // `loss` stays until `resync-end`: an owner that died after the last range was sent still owes the end.
    let dirty = volumes.iter().any(|volume| ring.is_dirty(volume.known.id.0));
    if ring.loss().is_none() && !dirty {
        return String::new();
    }
    if let Some(gap) = &state.get().needs_resync {
        return gap.cause.clone();
    }
    match ring.loss().map(|loss| loss.cause) {
        Some(kfilter::dirty::CAUSE_RING_FULL) => "the ring had overflowed".to_owned(),
        Some(kfilter::dirty::CAUSE_QUOTA) => "the source journal had no room".to_owned(),
        _ => "writes had not been recorded".to_owned(),
    }
}

/// What the source journal is kept on.
fn journal_disk(surroundings: &Surroundings) -> Arc<dyn journal::io::Disk> {
    Arc::new(BufferedDisk::new(surroundings.disk.clone()))
}

/// The source journal, opened once more by a running agent; none where one must be made.
///
/// # Errors
/// The disk's.
pub(crate) fn reopen_journal(
    settings: &conf::Replicator,
    surroundings: &Surroundings,
    state: &mut StateFile,
) -> Result<Option<Writer>> {
    Ok(journal_dir::open(&journal_disk(surroundings), settings, state)?.0)
}

/// The journal in a new epoch, which begins at a position.
///
/// # Errors
/// The disk's.
pub(crate) fn begin_in_journal(
    settings: &conf::Replicator,
    surroundings: &Surroundings,
    state: &StateFile,
    writer: Option<Writer>,
    at: Position,
) -> Result<Writer> {
    let Some(mut writer) = writer else {
        let dir = settings.dir.join("journal");
        let disk = journal_disk(surroundings);
        return Ok(Writer::create(disk, &dir, writer_options(settings, state), at, now_ns())?);
    };
    writer.begin_epoch(at, now_ns())?;
    Ok(writer)
}

fn writer_options(settings: &conf::Replicator, state: &StateFile) -> WriterOptions {
    WriterOptions { group: state.get().group, segment_bytes: settings.journal.segment_bytes }
}

pub(crate) fn ring_identity(state: &StateFile) -> Result<Identity> {
    let boot_id = boot_id().map_err(|error| Error::because(ErrorKind::Ring, "read the boot id", error))?;
    let state = state.get();
    Ok(Identity { boot_id, group_id: state.group.0, epoch: state.epoch.number, epoch_id: state.epoch.id.0 })
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

#[cfg(test)]
mod tests;
