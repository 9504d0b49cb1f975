//! Gather: which records make the next batch.
//!
//! Reads durable frames from the receiver's journal behind the checkpoint, unpacks them, checks every record
//! against the volumes that exist, and stops where a batch must end:
//! * at its bounds in redo and undo bytes (but never empty: one lsn is never split);
//! * before another epoch, before a `resync-begin`, after a `resync-end`, so that consistent points are
//!   boundaries;
//! * at the point that a rewind asks for;
//! * exactly at the range that an undo segment names, when a cut batch is redone.
//!
//! A batch may end in the middle of a frame; the rest of that frame is carried to the next one. A frame is
//! checked as a whole before the first of its records is used; one that does not hold ends the batch before
//! it, and is what the next gather fails with.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::compress::Decoder;
use journal::frame::FrameHeader;
use journal::io::Disk;
use journal::reader::Reader;
use journal::record::{Located, Op, Record, Records, VolumeRecord};
use journal::tail::Limit;
use journal::{Epoch, Lsn, VolumeId};

use crate::events::{Event, EventKind};
use crate::fold::Fold;
use crate::history::read_behind;
use crate::state::Moment;
use crate::undo::damage;
use crate::{Error, ErrorKind, Result};

/// What a record weighs beside its payload, so that many small ones cannot outgrow the memory bound.
const RECORD_WEIGHT_BYTES: u64 = 128;

/// Which records are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// As many as fit.
    AtMost {
        /// Redo bytes.
        redo_bytes: u64,
        /// Undo bytes, estimated from above.
        undo_bytes: u64,
    },
    /// The records up to this lsn, whatever they weigh.
    UpTo(Lsn),
}

/// Where gathering begins.
#[derive(Clone, Copy, Debug)]
pub struct Behind {
    /// The checkpoint.
    pub moment: Moment,
    /// Its epoch.
    pub epoch: Epoch,
    /// Nothing was ever applied: begin with the oldest frame held.
    pub nothing: bool,
    /// The checkpoint is a recovery point, which must stay a boundary.
    pub consistent: bool,
    /// Pass over what is left of epochs up to this number: the replica is not what their records were made
    /// for. Every epoch begins with the whole content.
    pub skip_through: Option<u64>,
    /// Records above this lsn are not wanted yet.
    pub until: Option<Lsn>,
}

/// The records of one batch, folded.
pub struct Gathered {
    /// Epoch of all records.
    pub epoch: Epoch,
    /// First record.
    pub first: Moment,
    /// Last record.
    pub last: Moment,
    /// Chain value of the frame that holds the last record.
    pub chain: u64,
    /// Payload bytes.
    pub redo_bytes: u64,
    /// New content.
    pub fold: Fold,
    /// Events, in order.
    pub events: Vec<Event>,
    /// Whether the last record ends a resync, and the batch boundary is consistent because of it.
    pub ends_resync: bool,
    /// Whether the last record lies in a resync.
    in_resync: bool,
    weight_bytes: u64,
    undo_bytes: u64,
}

impl Gathered {
    /// Whether there is a batch, and all of it where its range is given.
    fn is_enough(&self, want: Want) -> bool {
        match want {
            Want::AtMost { .. } => self.weight_bytes > 0,
            Want::UpTo(last) => self.last.lsn >= last,
        }
    }

    /// Volume records, in order.
    pub fn volumes(&self) -> impl Iterator<Item = (VolumeId, &VolumeRecord)> {
        self.events.iter().filter_map(|event| match &event.kind {
            EventKind::Volume(id, record) => Some((*id, record)),
            _ => None,
        })
    }
}

/// A frame that is not used up.
struct Carry {
    header: FrameHeader,
    raw: Arc<Vec<u8>>,
    at: usize,
}

/// Reads the journal from batch to batch.
pub struct Gatherer {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    reader: Option<Reader>,
    decoder: Decoder,
    frame: Vec<u8>,
    carry: Option<Carry>,
    at: Lsn,
    refused: Option<u64>,
}

/// Estimates from above what the undo of zeros over a range will take; need not look further once it is over
/// the bound.
pub type UndoEstimate<'a> = dyn Fn(VolumeId, Range<u64>, u64) -> Result<u64> + 'a;

impl Gatherer {
    /// For a journal directory; opened at the first gather.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the decompressor cannot be had.
    pub fn new(disk: Arc<dyn Disk>, dir: &Path) -> Result<Gatherer> {
        Ok(Gatherer {
            disk,
            dir: dir.to_path_buf(),
            reader: None,
            decoder: Decoder::new()?,
            frame: Vec::new(),
            carry: None,
            at: Lsn::ZERO,
            refused: None,
        })
    }

    /// Forgets the place in the journal: the next gather seeks. After a batch that failed.
    pub fn reset(&mut self) {
        self.reader = None;
        self.carry = None;
    }

    fn seek(&mut self, behind: &Behind) -> Result<()> {
        if self.reader.is_some() && self.at == behind.moment.lsn {
            return Ok(());
        }
        self.reset();
        self.reader = match behind.skip_through {
            // Whatever lies between is not used, and may be damaged.
            Some(number) if behind.epoch.number <= number => {
                let mut reader = Reader::open(Arc::clone(&self.disk), &self.dir).map_err(damage)?;
                reader.seek_epoch_above(number).map_err(damage)?.then_some(reader)
            }
            _ => read_behind(&self.disk, &self.dir, (!behind.nothing).then_some(behind.moment.lsn))?,
        };
        self.at = behind.moment.lsn;
        Ok(())
    }

    /// Number of the epoch whose records the last gather refused as malformed.
    pub fn refused(&self) -> Option<u64> {
        self.refused
    }

    /// The next frame with unused records.
    fn frame(&mut self, behind: &Behind, limit: Limit) -> Result<Option<Carry>> {
        if let Some(carry) = self.carry.take() {
            return Ok(Some(carry));
        }
        let Some(reader) = &mut self.reader else { return Ok(None) };
        while let Some(header) = reader.next(&mut self.frame, limit).map_err(damage)? {
            machine::give_way();
            let used_up = header.last_lsn <= behind.moment.lsn && !behind.nothing;
            if used_up || behind.skip_through.is_some_and(|number| header.epoch.number <= number) {
                continue;
            }
            let mut raw = Vec::new();
            // The bytes are what was received, so it is the source that did not hold to the format.
            let decoded = self.decoder.decode(&header, &self.frame, &mut raw);
            decoded.and_then(|()| Records::check(&header, &raw)).map_err(|error| {
                self.refused = Some(header.epoch.number);
                Error::from(error)
            })?;
            return Ok(Some(Carry { header, raw: Arc::new(raw), at: 0 }));
        }
        Ok(None)
    }

    /// Gathers the records behind the checkpoint; `None` where there are none. `sizes` are the volumes at the
    /// checkpoint; `undo_of` estimates what zeros over a range undo.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for damage in the journal, [`ErrorKind::Malformed`] for records that do not fit
    /// their volumes; [`Gatherer::reset`] must follow.
    pub fn gather(
        &mut self,
        behind: &Behind,
        want: Want,
        limit: Limit,
        mut sizes: BTreeMap<VolumeId, u64>,
        undo_of: &UndoEstimate<'_>,
    ) -> Result<Option<Gathered>> {
        self.refused = None;
        self.seek(behind)?;
        let mut gathered: Option<Gathered> = None;
        loop {
            let mut carry = match self.frame(behind, limit) {
                Ok(Some(carry)) => carry,
                Ok(None) => break,
                // What is whole is applied first; the next gather meets the damage again.
                Err(_) if gathered.as_ref().is_some_and(|batch| batch.is_enough(want)) => {
                    self.reset();
                    break;
                }
                Err(error) => return Err(error),
            };
            let batch = match &mut gathered {
                Some(batch) if batch.epoch != carry.header.epoch => {
                    self.carry = Some(carry);
                    break;
                }
                Some(batch) => batch,
                empty => empty.insert(begin(&carry.header, behind)),
            };
            let all = take(batch, &mut carry, behind, want, &mut sizes, undo_of);
            if all.as_ref().is_err_and(|error| error.kind == ErrorKind::Malformed) {
                self.refused = Some(carry.header.epoch.number);
            }
            if !all? {
                self.carry = Some(carry);
                break;
            }
        }
        let gathered = gathered.filter(|batch| batch.last.lsn > behind.moment.lsn);
        if let Some(batch) = &gathered {
            self.at = batch.last.lsn;
        }
        Ok(gathered)
    }
}

fn begin(header: &FrameHeader, behind: &Behind) -> Gathered {
    let mut events = Vec::new();
    if header.epoch != behind.epoch {
        events.push(Event::epoch(header, behind.moment));
    }
    Gathered {
        epoch: header.epoch,
        first: Moment::default(),
        // What precedes the batch's first record, until there is one.
        last: behind.moment,
        chain: 0,
        redo_bytes: 0,
        fold: Fold::default(),
        events,
        ends_resync: false,
        in_resync: !behind.consistent || header.epoch != behind.epoch,
        weight_bytes: 0,
        undo_bytes: 0,
    }
}

/// Takes records from a frame; false when the batch is complete and the frame is not.
fn take(
    batch: &mut Gathered,
    carry: &mut Carry,
    behind: &Behind,
    want: Want,
    sizes: &mut BTreeMap<VolumeId, u64>,
    undo_of: &UndoEstimate<'_>,
) -> Result<bool> {
    let raw = Arc::clone(&carry.raw);
    let mut buffer = None;
    while carry.at < raw.len() {
        let (record, payload, bytes) = Record::decode(&raw[carry.at..]).map_err(damage)?;
        let payload_at = carry.at + bytes - payload.len();
        let located = Located { record, payload, payload_at };
        if record.lsn <= behind.moment.lsn {
            carry.at += bytes;
            continue;
        }
        if behind.until.is_some_and(|until| record.lsn > until) {
            return Ok(false);
        }
        let undo = undo_bytes(batch, &located, want, undo_of)?;
        let weight = payload.len() as u64 + RECORD_WEIGHT_BYTES;
        let is_empty = batch.weight_bytes == 0;
        // Pieces of one sync slot share an lsn, which is the smallest thing that a boundary can stand behind.
        if !is_empty && record.lsn != batch.last.lsn {
            let full = match want {
                Want::AtMost { redo_bytes, undo_bytes } => {
                    batch.weight_bytes + weight > redo_bytes || batch.undo_bytes + undo > undo_bytes
                }
                Want::UpTo(last) => record.lsn > last,
            };
            if full || batch.ends_resync || (record.op == Op::ResyncBegin && !batch.in_resync) {
                return Ok(false);
            }
            if check(&located, sizes).is_err() {
                // Met again as the first of the next batch, and refused there.
                return Ok(false);
            }
        }
        check(&located, sizes)?;
        batch.events.extend(Event::of(&located, batch.last).map_err(|e| e.during("apply"))?);
        batch.ends_resync = record.op == Op::ResyncEnd;
        batch.in_resync = (batch.in_resync || record.op == Op::ResyncBegin) && !batch.ends_resync;
        let moment = Moment { lsn: record.lsn, time_ns: record.time_ns };
        if is_empty {
            batch.first = moment;
        }
        batch.last = moment;
        batch.chain = carry.header.chain_out;
        batch.redo_bytes += payload.len() as u64;
        batch.weight_bytes += weight;
        batch.undo_bytes += undo;
        let buffer = *buffer.get_or_insert_with(|| batch.fold.hold(Arc::clone(&raw)));
        batch.fold.lay(buffer, &located);
        carry.at += bytes;
    }
    Ok(true)
}

/// What a record adds to the batch's undo, at most. What the batch changes already is counted already, and
/// nothing is counted beyond the bound: a full volume may be discarded over and over.
fn undo_bytes(
    batch: &Gathered,
    located: &Located<'_>,
    want: Want,
    undo_of: &UndoEstimate<'_>,
) -> Result<u64> {
    let record = &located.record;
    let Want::AtMost { undo_bytes, .. } = want else { return Ok(0) };
    if !matches!(record.op, Op::Discard | Op::WriteZeroes) {
        return Ok(located.payload.len() as u64);
    }
    let most = undo_bytes.saturating_sub(batch.undo_bytes);
    let range = record.extent.offset..record.extent.offset.saturating_add(record.extent.len);
    let mut bytes = 0;
    for gap in batch.fold.gaps(record.volume, range) {
        if bytes > most {
            break;
        }
        bytes += undo_of(record.volume, gap, most - bytes)?;
    }
    Ok(bytes)
}

/// No record may touch what its volume does not have. Volume records are followed as they come.
fn check(located: &Located<'_>, sizes: &mut BTreeMap<VolumeId, u64>) -> Result<()> {
    let record = &located.record;
    let malformed = |what: String| {
        Error::new(ErrorKind::Malformed, format!("lsn {}: volume {}: {what}", record.lsn, record.volume))
    };
    if record.op == Op::Volume {
        let volume = VolumeRecord::decode(located.payload).map_err(|e| malformed(e.to_string()))?;
        // A volume that left stays as it was; it may come back.
        if volume.present {
            sizes.insert(record.volume, volume.size_bytes);
        }
        return Ok(());
    }
    if record.op.changes_content() {
        let size = sizes.get(&record.volume).ok_or_else(|| malformed("was never announced".into()))?;
        if record.extent.end().is_none_or(|end| end > *size) {
            return Err(malformed(format!(
                "bytes {}+{} lie outside its {size} bytes",
                record.extent.offset, record.extent.len
            )));
        }
    }
    Ok(())
}
