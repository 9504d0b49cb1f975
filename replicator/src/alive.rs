//! Signs of life of a running agent, in the ring's directory: whoever finds the ring of a run that was killed
//! judges by them whether others wrote to the disks since ([`crate::start::proof`]). For the NBD front; the
//! kernel module's capture does not end with the agent.
//!
//! ```text
//! RING_DIR/GROUP/alive    two slots of 64 KiB, written in turn:
//!    0  8  xxh3 of what follows           8  4  length of the payload        12  …  payload (postcard)
//! ```
//! The file lies in memory, so that it is as old as the ring and costs no disk. Invariants: the time is read
//! before it is written, so no sign is younger than the life it tells of; the marks are of an instant at
//! which no write was in flight, and everything up to `quiet_lsn` had reached the disk; they are not taken
//! anew while we write nothing, so that they never cover up a write of others.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use journal::Epoch;
use kfilter::Mode;
use machine::disk::Continuity;
use machine::disk::continuity::Ends;
use serde::{Deserialize, Serialize};

use crate::agent::Agent;
use crate::capture::nbd::CapturedVolume;
use crate::clock::now_ns;

/// One sign to the next.
const BEAT: Duration = Duration::from_millis(50);
/// Devices write back what they cached, which moves their counters: their marks are taken anew so often,
/// while it is quiet.
const DEVICES: Duration = Duration::from_secs(1);
/// Room of a slot: 64 volumes take some 10 KiB.
const SLOT_BYTES: u64 = 64 << 10;
const HEAD_BYTES: usize = 12;
const NAME: &str = "alive";
/// What it means when there are none.
pub(crate) const SILENT: &str = "no signs of life can be kept: after a kill the disks are compared";

/// What a run says while it lives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Alive {
    /// Counts the signs.
    pub number: u64,
    /// Of which epoch's ring.
    pub epoch: Epoch,
    /// Realtime when it was seen alive, ns.
    pub alive_ns: u64,
    /// Time since boot then, ns.
    pub boot_ns: u64,
    /// Realtime less time since boot then, ns.
    pub clock_offset_ns: i128,
    /// Everything up to this lsn, and nothing else, was on the disks when the marks were taken.
    pub quiet_lsn: Option<u64>,
    /// What the disks were then, by volume.
    pub marks: Vec<(u32, Continuity)>,
}

impl Alive {
    /// What the last run of an epoch said; `None` where it said nothing that can be read.
    pub fn read(ring_dir: &Path, epoch: Epoch) -> Option<Alive> {
        let file = File::open(ring_dir.join(NAME)).ok()?;
        let slots = [0, SLOT_BYTES].into_iter().filter_map(|at| read_slot(&file, at));
        slots.filter(|alive| alive.epoch == epoch).max_by_key(|alive| alive.number)
    }

    /// The mark of a volume.
    pub fn mark_of(&self, volume: u32) -> Option<&Continuity> {
        self.marks.iter().find(|(id, _)| *id == volume).map(|(_, mark)| mark)
    }

    /// Puts a sign of life where a run would.
    #[cfg(test)]
    pub fn put(&self, ring_dir: &Path) {
        let path = ring_dir.join(NAME);
        let file = File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap();
        self.write(&file).unwrap();
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let payload = postcard::to_stdvec(self).map_err(io::Error::other)?;
        if payload.len() as u64 > SLOT_BYTES - HEAD_BYTES as u64 {
            return Err(io::Error::other("the marks of so many volumes do not fit"));
        }
        let mut slot = vec![0; 8];
        slot.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
        slot.extend_from_slice(&payload);
        let sum = xxhash_rust::xxh3::xxh3_64(&slot[8..]);
        slot[..8].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&slot, self.number % 2 * SLOT_BYTES)
    }
}

fn read_slot(file: &File, at: u64) -> Option<Alive> {
    let mut head = [0; HEAD_BYTES];
    file.read_exact_at(&mut head, at).ok()?;
    let (sum, length) = head.split_at(8);
    let length = u64::from(u32::from_le_bytes(length.try_into().ok()?));
    if length > SLOT_BYTES - HEAD_BYTES as u64 {
        return None;
    }
    let mut rest = vec![0; usize::try_from(length).ok()? + 4];
    file.read_exact_at(&mut rest, at + 8).ok()?;
    if xxhash_rust::xxh3::xxh3_64(&rest).to_le_bytes() != sum {
        return None;
    }
    postcard::from_bytes(&rest[4..]).ok()
}

/// Removes what a run said that ended in good order.
pub(crate) fn remove(ring_dir: &Path) {
    let _ = std::fs::remove_file(ring_dir.join(NAME));
}

/// Realtime, time since boot and their difference, ns.
pub(crate) fn clocks() -> (u64, u64, i128) {
    let boot_ns = machine::simulated_boot_ns().unwrap_or_else(|| {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let ns = |part: i64| u64::try_from(part).unwrap_or(0);
        ns(now.tv_sec) * 1_000_000_000 + ns(now.tv_nsec)
    });
    let realtime_ns = now_ns();
    (realtime_ns, boot_ns, i128::from(realtime_ns) - i128::from(boot_ns))
}

/// Gives the signs.
pub(crate) struct Heart {
    file: File,
    said: Alive,
    /// How many changes had begun on each volume when the marks were taken.
    begun: Vec<u64>,
    marked: Instant,
}

impl Heart {
    /// Says for the first time that the agent lives; before it serves anybody.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(agent: &Agent, ring_dir: &Path) -> io::Result<Heart> {
        let path = ring_dir.join(NAME);
        // Another's signs end here: two files of one name could not both be believed.
        remove(ring_dir);
        let file = File::options().create_new(true).read(true).write(true).mode(0o600).open(path)?;
        let mut heart = Heart { file, said: Alive::default(), begun: Vec::new(), marked: machine::now() };
        heart.beat(agent)?;
        Ok(heart)
    }

    /// Says so until the agent stops.
    pub fn run(mut self, agent: &Agent) {
        while !agent.shared.stop.load(Ordering::Acquire) {
            if let Err(error) = self.beat(agent) {
                tracing::warn!(%error, "{SILENT}");
                // An old sign would let what we write now look like another's.
                let _ = self.file.set_len(0);
                return;
            }
            machine::sleep(BEAT);
        }
    }

    fn beat(&mut self, agent: &Agent) -> io::Result<()> {
        let (alive_ns, boot_ns, clock_offset_ns) = clocks();
        let epoch = agent.remembered().epoch;
        if epoch != self.said.epoch {
            (self.said.epoch, self.said.quiet_lsn) = (epoch, None);
        }
        (self.said.alive_ns, self.said.boot_ns, self.said.clock_offset_ns) =
            (alive_ns, boot_ns, clock_offset_ns);
        self.mark(agent);
        self.said.number += 1;
        self.said.write(&self.file)
    }

    /// Takes the marks, if it is quiet and they are not those of this quiet yet.
    fn mark(&mut self, agent: &Agent) {
        let ring = &agent.shared.ring;
        let served: Vec<_> = agent.volumes.iter().filter_map(|volume| volume.served()).collect();
        let quiet = || served.iter().map(|volume| volume.in_flight.quiet()).collect::<Option<Vec<u64>>>();
        let (lsn, Some(begun)) = (ring.captured_lsn(), quiet()) else { return };
        let is_known = self.said.quiet_lsn == Some(lsn) && self.begun == begun;
        let has_devices = self.said.marks.iter().any(|(_, mark)| mark.counters.is_some());
        if ring.mode() != Mode::Ring || (is_known && !(has_devices && machine::since(self.marked) >= DEVICES))
        {
            return;
        }
        let mark = |volume: &&std::sync::Arc<CapturedVolume>| {
            // A file's mark stays while we do not write.
            let known = self.said.mark_of(volume.id).filter(|mark| is_known && mark.counters.is_none());
            match known {
                Some(known) => Ok((volume.id, known.clone())),
                None => volume.backing.continuity(Ends::Skip).map(|mark| (volume.id, mark)),
            }
        };
        let Ok(marks) = served.iter().map(mark).collect::<io::Result<Vec<_>>>() else { return };
        if quiet().as_ref() == Some(&begun) && ring.captured_lsn() == lsn && ring.mode() == Mode::Ring {
            (self.said.quiet_lsn, self.said.marks, self.begun) = (Some(lsn), marks, begun);
            self.marked = machine::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_sign_is_read_and_a_torn_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        let epoch = Epoch { number: 3, ..Epoch::default() };
        let mark = Continuity::of(&file, Ends::Skip).unwrap();
        let alive = |number| Alive { number, epoch, marks: vec![(5, mark.clone())], ..Alive::default() };
        assert_eq!(Alive::read(dir.path(), epoch), None);
        alive(1).write(&file).unwrap();
        alive(2).write(&file).unwrap();
        assert_eq!(Alive::read(dir.path(), epoch), Some(alive(2)));
        assert_eq!(Alive::read(dir.path(), Epoch::default()), None, "of another epoch");
        file.write_all_at(&[0xff; 4], 20).unwrap();
        assert_eq!(Alive::read(dir.path(), epoch), Some(alive(1)));
        file.write_all_at(&u32::MAX.to_le_bytes(), SLOT_BYTES + 8).unwrap();
        assert_eq!(Alive::read(dir.path(), epoch), None);
        let many = Alive { marks: (0..64).map(|id| (id, mark.clone())).collect(), ..alive(4) };
        many.write(&file).unwrap();
        assert_eq!(Alive::read(dir.path(), epoch), Some(many));
        remove(dir.path());
        assert!(!path.exists());
    }
}
