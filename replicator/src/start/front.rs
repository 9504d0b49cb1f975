//! The NBD front's ring at a start: taken over from tmpfs, its unfinished writes redone, or made anew.

use journal::Lsn;
use kfilter::dirty::CAUSE_AGENT;
use kfilter::region::RegionSpec;
use kfilter::{Entry, Mode, Op, Region};

use super::proof::{self, Ended, Verdict};
use super::{Found, Judged, OpenVolume, Opened, ring_identity, rings, volume_record};
use crate::alive::{self, Alive};
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::skipped::Skipped;
use crate::state::StateFile;

/// The ring of the last run, redone to the backings, or in words why it is lost.
///
/// ⚠ Order: 1 the disks are judged, by what they were before anything of the last run reaches them; 2 only
/// those that are proven to be the ones it served, and not to have been changed since, are written to. What
/// is not redone was never answered; its range is read again.
pub(super) fn take_over(
    found: &Found<'_>,
    state: &StateFile,
    judged: &mut Judged,
) -> Result<std::result::Result<Region, String>> {
    let volumes = found.volumes;
    let dir = rings::open(found.settings, state)?;
    let expected = ring_identity(state)?;
    let taken = match Region::take_over(dir.path(), &expected) {
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
    // Before anything is redone: the writes of a ring that does not join are meant for what the disk was
    // then.
    if let Err(why) = found.joins(state, taken.first_held_lsn(), taken.captured_lsn()) {
        return Ok(Err(why));
    }
    if state.get().clean.is_some() {
        // A clean stop leaves no ring: what it says of the disks since then it has not seen.
        return Ok(Err("the ring was left by a clean stop".to_owned()));
    }
    let alive = Alive::read(dir.path(), state.get().epoch);
    let (_, boot_ns, clock_offset_ns) = alive::clocks();
    let mut ended = Ended { alive: alive.as_ref(), was_quiet: false, clock_offset_ns, boot_ns };
    let mut redone = 0_u64;
    let mut failed = Vec::new();
    for record in taken.undone() {
        let volume = volumes.iter().find(|volume| volume.known.id.0 == record.volume());
        if volume.is_some_and(|volume| !verdict(volume, &ended).lets_redo()) {
            failed.push((record.volume(), record.offset()..record.offset() + record.length()));
        } else if let Err(error) = redo(&record, volumes) {
            // The write was never answered: its range is read again instead of keeping the whole disk from
            // its users.
            tracing::error!(%error, "an unfinished write of the last run cannot be redone");
            failed.push((record.volume(), record.offset()..record.offset() + record.length()));
        }
        taken.mark_done(&record);
        redone += 1;
    }
    let ring =
        taken.finish().map_err(|_| Error::new(ErrorKind::Ring, "the ring still holds undone writes"))?;
    let quiet_lsn = alive.as_ref().and_then(|alive| alive.quiet_lsn);
    ended.was_quiet = redone == 0 && ring.mode() == Mode::Ring && quiet_lsn == Some(ring.captured_lsn());
    for volume in volumes {
        let name = &volume.known.name;
        match verdict(volume, &ended) {
            Verdict::Same => {}
            Verdict::Tail(why) | Verdict::Doubt(why) => judged.unproven.push((volume.known.id, why)),
            Verdict::Other(how) => judged.other.push(format!("volume {name}: {how}")),
        }
    }
    let (undone, redone) = (failed.len(), redone - failed.len() as u64);
    for (volume, range) in failed {
        ring.mark_dirty(volume, range);
    }
    if redone > 0 {
        tracing::info!(writes = redone, "writes of the last run redone to the backing");
    }
    if undone > 0 {
        tracing::warn!(
            writes = undone,
            "writes of the last run, which were never answered, are not redone: they failed, or the disk may be another"
        );
    }
    Ok(Ok(ring))
}

/// Who a disk is comes first: times and counters of another say nothing.
fn verdict(volume: &OpenVolume, ended: &Ended<'_>) -> Verdict {
    match &volume.identity {
        Verdict::Same => proof::since_kill(ended, volume.known.id.0, volume.seen.as_ref()),
        other => other.clone(),
    }
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
    rings::make(found.settings, state, &spec)
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
