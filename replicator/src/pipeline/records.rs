//! Ring records as journal records. The numbers of the ops are the same on purpose.
//!
//! Most pass as they are. Four do not:
//! * a sync slot is reserved empty and gets here what the synchronisation has read, without the sectors that
//!   records behind its begin have written; its pieces share its lsn, as the format allows them to;
//! * `resync-begin` gets its reason;
//! * a volume that the kernel saw growing gets its full record, and the new size is durable before it is
//!   needed;
//! * what reaches beyond the size that the stream knows (a growth that could not be recorded) is emitted
//!   empty and becomes dirty bits, since no receiver could apply it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::PoisonError;

use journal::frame::Batch;
use journal::record::{self, Op, Record, VolumeRecord};
use journal::{Extent, Lsn, VolumeId};
use kfilter::RecordRef;

use crate::error::{Result, describe, is_full};
use crate::pipeline::Shared;
use crate::resync::map::{Content, Unmasked};
use crate::start;
use crate::state::KnownVolume;

/// The most pieces that a slot of bytes falls into: every other sector is masked.
const MAX_PIECES: usize = record::MAX_PAYLOAD_BYTES / 512 / 2 + 1;

/// Translates records of one ring.
pub struct Translator {
    shared: Shared,
    /// Sizes that the stream knows.
    told: BTreeMap<u32, u64>,
}

impl Translator {
    /// Continues a stream that knows the volumes as the state file does.
    pub fn new(shared: Shared) -> Translator {
        let known = shared.remembered.get();
        let told = known.volumes.iter().map(|volume| (volume.id.0, volume.size_bytes)).collect();
        Translator { shared, told }
    }

    /// A volume's record was given up: until it is stated again, what touches the volume has no place in the
    /// stream.
    pub fn forget(&mut self, volume: u32) {
        self.told.remove(&volume);
        self.shared.health.leave_untold(volume);
    }

    /// The stream states a volume with this size, past the ring.
    pub fn told(&mut self, volume: u32, size_bytes: u64) {
        self.told.insert(volume, size_bytes);
        self.shared.health.told(volume);
    }

    /// The most raw bytes that a record takes in a frame.
    pub fn raw_bytes(from: &RecordRef<'_>) -> usize {
        let payload = from.payload().len();
        if from.op() as u8 == Op::SyncSlot as u8 && payload == 0 {
            let length = usize::try_from(from.length()).unwrap_or(usize::MAX);
            return length.min(record::MAX_PAYLOAD_BYTES) + MAX_PIECES * record::HEADER_BYTES;
        }
        // A reason or a full volume record may take the place of a shorter payload.
        record::HEADER_BYTES + payload.max(record::MAX_NAME_BYTES)
    }

    /// Adds a record to the batch.
    ///
    /// # Errors
    /// The state file cannot be written, or bits cannot be set: what they stand for may not be passed over.
    pub fn push(&mut self, batch: &mut Batch, from: &RecordRef<'_>) -> Result<()> {
        let op = Op::from_u8(from.op() as u8).expect("the ring shows only ops that the journal knows");
        let record = Record {
            op,
            flags: from.flags(),
            volume: VolumeId(from.volume()),
            lsn: Lsn(from.lsn()),
            time_ns: from.time_ns(),
            extent: Extent { offset: from.offset(), len: from.length() },
        };
        let range = from.offset()..from.offset() + from.length();
        match op {
            Op::Write | Op::Discard | Op::WriteZeroes => {
                if !self.holds(from.volume(), &range) {
                    self.shared.ring.mark(from.volume(), range)?;
                    batch.push(&void(&record), &[]);
                    return Ok(());
                }
                if self.shared.map.is_active() {
                    self.shared.map.lock().written(from.volume(), from.lsn(), range.clone());
                    self.shared.map.passed_live();
                }
                self.shared.skipped.touch(from.volume(), &range);
                batch.push(&record, from.payload());
            }
            Op::SyncSlot if from.payload().is_empty() => {
                if !self.holds(from.volume(), &range) {
                    self.shared.ring.mark(from.volume(), range)?;
                    batch.push(&void(&record), &[]);
                    return Ok(());
                }
                let mut map = self.shared.map.lock();
                let taken = map.take(from.lsn());
                if let Some(rest) = emit_slot(batch, &record, taken) {
                    rest.into_iter().for_each(|piece| map.requeue(piece));
                }
            }
            Op::Void => batch.push(&void(&record), &[]),
            Op::ResyncBegin => {
                let record = self.shared.begin(record);
                let cause = self.shared.sync_cause.lock().unwrap_or_else(PoisonError::into_inner);
                batch.push(&record, shortened(&cause).as_bytes());
            }
            Op::Volume => self.push_volume(batch, &record, from.payload())?,
            _ => batch.push(&record, from.payload()),
        }
        Ok(())
    }

    fn holds(&self, volume: u32, range: &Range<u64>) -> bool {
        self.told.get(&volume).is_some_and(|size| range.end <= *size)
    }

    /// The kernel's record of a growth is the new size alone; ours are whole.
    fn push_volume(&mut self, batch: &mut Batch, record: &Record, payload: &[u8]) -> Result<()> {
        let grown = <[u8; 8]>::try_from(payload).map(u64::from_le_bytes);
        let told = grown.ok().or_else(|| VolumeRecord::decode(payload).ok().map(|told| told.size_bytes));
        let state = self.shared.remembered.get();
        let known = state.volumes.iter().position(|known| known.id == record.volume);
        let (Some(size_bytes), Some(at)) = (told, known) else {
            batch.push(&void(record), &[]);
            return Ok(());
        };
        if state.volumes[at].size_bytes < size_bytes {
            tracing::info!(volume = %state.volumes[at].name, size_bytes, "the volume has grown");
            let mut file = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            match file.update(|state| state.volumes[at].size_bytes = size_bytes) {
                // The next start finds that it grew, and asks no more than that.
                Err(error) if is_full(&error) => {
                    tracing::warn!(
                        error = describe(&error),
                        "the state file has no room for a volume's new size"
                    );
                }
                updated => updated?,
            }
        }
        let size_bytes = state.volumes[at].size_bytes.max(size_bytes);
        self.told.insert(record.volume.0, size_bytes);
        self.shared.health.told(record.volume.0);
        if grown.is_ok() {
            let known = KnownVolume { size_bytes, ..state.volumes[at].clone() };
            batch.push(record, &start::volume_record(&known));
        } else {
            batch.push(record, payload);
        }
        Ok(())
    }
}

/// Emits what is left of a slot; pieces of zeros that need slots of their own are returned.
fn emit_slot(batch: &mut Batch, record: &Record, taken: Option<Unmasked>) -> Option<Vec<Range<u64>>> {
    let extent = |piece: &Range<u64>| Extent { offset: piece.start, len: piece.end - piece.start };
    let Some(Unmasked { offset, content, mut pieces }) = taken.filter(|slot| !slot.pieces.is_empty()) else {
        batch.push(&void(record), &[]);
        return None;
    };
    match content {
        Content::Bytes(bytes) => {
            for piece in &pieces {
                let at = |byte: u64| usize::try_from(byte - offset).unwrap_or(usize::MAX);
                let record = Record { op: Op::SyncSlot, extent: extent(piece), ..*record };
                batch.push(&record, &bytes[at(piece.start)..at(piece.end)]);
            }
            None
        }
        // Only pieces with bytes may share an lsn.
        Content::Zeros => {
            let rest = pieces.split_off(1);
            batch.push(&Record { op: Op::WriteZeroes, extent: extent(&pieces[0]), ..*record }, &[]);
            Some(rest)
        }
    }
}

/// The same place in the order, and nothing there.
pub fn void(record: &Record) -> Record {
    Record { op: Op::Void, flags: 0, volume: VolumeId(0), extent: Extent::default(), ..*record }
}

/// A reason as the receiver keeps it.
pub fn shortened(text: &str) -> &str {
    let end = (0..=text.len().min(record::MAX_NAME_BYTES)).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use machine::Mutex;

    use journal::io::{Disk, RealDisk};
    use journal::{Position, VolumeUuid};
    use kfilter::abi::{Identity, VolumeSpec};
    use kfilter::region::{Region, RegionSpec, boot_id};
    use kfilter::{Captured, Entry};

    use super::*;
    use crate::capture::Ring;
    use crate::capture::ring::Front;
    use crate::progress::Progress;
    use crate::state::{KnownVolume, StateFile};
    use crate::status::Board;

    const MIB: u64 = 1 << 20;

    fn shared(dir: &std::path::Path, ring_dir: &std::path::Path) -> Shared {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let mut state = StateFile::open(&disk, dir).unwrap();
        let known = KnownVolume {
            id: VolumeId(1),
            uuid: VolumeUuid([2; 16]),
            name: "disk".to_owned(),
            size_bytes: 64 * MIB,
            identity: None,
            mark: None,
            unproven: None,
            present: true,
            capturing: crate::state::Capturing::On,
        };
        state.update(|state| state.volumes = vec![known]).unwrap();
        let spec = RegionSpec {
            identity: Identity {
                boot_id: boot_id().unwrap(),
                group_id: [1; 16],
                epoch: 1,
                epoch_id: [3; 16],
            },
            volumes: &[VolumeSpec { id: 1, sector_bytes: 512, uuid: [2; 16], size_bytes: 64 * MIB }],
            ring_bytes: MIB,
            first_lsn: 1,
            last_time_ns: 0,
        };
        let region = Arc::new(Region::create(ring_dir, &spec).unwrap());
        let (lineage, epoch) = (state.get().lineage, state.get().epoch);
        Shared {
            ring: Arc::new(Ring::Front(Front::new(region, Vec::new()))),
            progress: Arc::new(Progress::new(
                Position::epoch_start(lineage, epoch, Lsn(0)),
                std::iter::empty(),
            )),
            board: Arc::new(Board::new("g", std::iter::once("disk".to_owned()))),
            remembered: state.remembered(),
            state: Arc::new(Mutex::new(state)),
            sync_cause: Arc::default(),
            map: Arc::default(),
            health: Arc::default(),
            stop: Arc::new(AtomicBool::new(false)),
            journal_bytes: Arc::default(),
            tail: Arc::default(),
            apart: Arc::default(),
            skipped: Arc::new(crate::skipped::Skipped::open(dir)),
            epoch_due: Arc::default(),
        }
    }

    #[test]
    fn a_growth_that_was_given_up_is_untold_until_it_is_stated_again() {
        let dir = tempfile::tempdir().unwrap();
        let ring_dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let shared = shared(dir.path(), ring_dir.path());
        let Ring::Front(front) = &*shared.ring else { unreachable!() };
        let size = 96 * MIB;
        assert!(matches!(front.region.grow(1, size, &size.to_le_bytes(), 1), Ok(Captured::Ring(_))));
        let write = Entry { needs_done: false, ..Entry::write(1, 80 * MIB, 512, 0).next().unwrap() };
        assert!(front.region.capture(std::iter::once(write), &[7; 512], 1).is_ok());
        let mut tap = shared.ring.tap().unwrap();
        let mut translator = Translator::new(shared.clone());
        let pass = |translator: &mut Translator, tap: &crate::capture::Tap| {
            let mut batch = Batch::default();
            translator.push(&mut batch, &tap.peek().unwrap().unwrap()).unwrap();
            batch.raw().len() - record::HEADER_BYTES
        };
        pass(&mut translator, &tap);
        // The batch with it is given up: the stream never heard of the new size.
        translator.forget(1);
        assert!(shared.health.is_untold(1));
        tap.advance().unwrap();
        assert_eq!(pass(&mut translator, &tap), 0, "a write that no receiver could apply leaves no bytes");
        assert!(front.region.is_dirty(1), "it is a bit instead");
        // Stated again, it is known, and what follows has its place.
        tap.rewind();
        pass(&mut translator, &tap);
        assert!(!shared.health.is_untold(1));
        tap.advance().unwrap();
        assert_eq!(pass(&mut translator, &tap), 512);
    }
}
