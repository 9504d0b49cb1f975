//! The NBD front's ring at a start: taken over from tmpfs, its unfinished writes redone, or made anew.

use journal::Lsn;
use kfilter::dirty::CAUSE_AGENT;
use kfilter::region::RegionSpec;
use kfilter::{Entry, Op, Region};

use super::{Found, OpenVolume, Opened, ring_dir, ring_identity, volume_record};
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::skipped::Skipped;
use crate::state::StateFile;

/// The ring of the last run, redone to the backings, or in words why it is lost.
pub(super) fn take_over(found: &Found<'_>, state: &StateFile) -> Result<std::result::Result<Region, String>> {
    let (dir, volumes) = (ring_dir(found.settings, state), found.volumes);
    std::fs::create_dir_all(&dir)
        .map_err(|error| Error::because(ErrorKind::Ring, format!("create {}", dir.display()), error))?;
    let expected = ring_identity(state)?;
    let taken = match Region::take_over(&dir, &expected) {
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
    Ok(Ok(ring))
}

/// Writes one published, undone record to its backing.
fn redo(record: &kfilter::RecordRef<'_>, volumes: &[OpenVolume]) -> Result<()> {
    let volume = volumes.iter().find(|volume| volume.known.id.0 == record.volume());
    let Some((volume, Opened::Front(backing))) = volume.map(|volume| (volume, &volume.content)) else {
        return Ok(()); // The volume has left the group; nobody will be served its content.
    };
    let redone = match record.op() {
        Op::Write => backing.write_at(record.offset(), record.payload()),
        Op::Discard | Op::WriteZeroes => backing.write_zeroes(record.offset(), record.length(), false, false),
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

/// A new ring in place of one that may be there; the replica is known to equal the disks.
pub(super) fn create_clean(found: &Found<'_>, state: &StateFile, first_lsn: Lsn) -> Result<Region> {
    let specs = found.specs();
    let spec = RegionSpec {
        identity: ring_identity(state)?,
        volumes: &specs,
        ring_bytes: found.settings.ring.bytes,
        first_lsn: first_lsn.0,
        last_time_ns: found.last_time_ns,
    };
    let dir = ring_dir(found.settings, state);
    let made = |error| Error::because(ErrorKind::Ring, "make the ring", error);
    Region::create(&dir, &spec).map_err(made)
}

/// A new ring in place of one that may be there, in which everything is dirty, but for what is skipped.
pub(super) fn create(
    found: &Found<'_>,
    state: &StateFile,
    first_lsn: Lsn,
    skipped: Option<&Skipped>,
) -> Result<Region> {
    let ring = create_clean(found, state, first_lsn)?;
    for known in &state.get().volumes {
        let payload = volume_record(known);
        let entry = Entry::event(Op::Volume, known.id.0, u32::try_from(payload.len()).unwrap_or(u32::MAX));
        let put = ring.capture(std::iter::once(entry), &payload, now_ns());
        put.map(drop).map_err(|refused| {
            Error::new(ErrorKind::Ring, format!("the new ring refused a volume: {refused:?}"))
        })?;
    }
    for spec in &found.specs() {
        let all = || vec![0..spec.size_bytes; 1];
        for range in skipped.map_or_else(all, |skipped| skipped.others(spec.id, spec.size_bytes)) {
            ring.mark_dirty(spec.id, range);
        }
    }
    ring.set_mode_bitmap(CAUSE_AGENT, now_ns());
    Ok(ring)
}
