//! Events: what the stream says about history rather than content, and the log that keeps it.
//!
//! Applied events are appended to `groups/NAME/events` (rewritten as `events.N`); events above the checkpoint
//! are read from the journal's flagged frames instead. The log's durable length stands in
//! [`crate::state::GroupState`]: bytes beyond it belong to a batch that was cut, and are overwritten when it
//! is redone.
//!
//! ```text
//!        0     1     2     3     4     5     6     7
//!   0 │ payload bytes         │  CRC of the payload   │
//!   8 │ postcard of Event …
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::clock_step::ClockStep;
use journal::frame::FrameHeader;
use journal::io::{Disk, File};
use journal::record::{InDoubt, Located, MAX_NAME_BYTES, Op, VolumeRecord};
use journal::{Epoch, Lsn, VolumeId};
use serde::{Deserialize, Serialize};

use crate::state::Moment;
use crate::{Error, ErrorKind, Result};

/// Largest encoded event: its texts are cut to 255 bytes.
const MAX_EVENT_BYTES: usize = 1024;
/// Bytes of the log that are read at once.
const LOAD_BYTES: u64 = 1 << 20;

/// Something that history must know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Where in the group's order.
    pub at: Moment,
    /// What.
    pub kind: EventKind,
}

/// What an event says. Append-only: the numbers are on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// A volume appears, grows or leaves.
    Volume(VolumeId, VolumeRecord),
    /// A named lsn.
    Bookmark(String),
    /// No recovery points from here to the next `ResyncEnd`.
    ResyncBegin {
        /// Why, in the source's words.
        reason: String,
        /// The record before this one.
        after: Moment,
    },
    /// Consistent again.
    ResyncEnd,
    /// The write of this lsn failed at the source.
    Failed(Lsn),
    /// The source's clock jumped by nanoseconds.
    ClockJump(i64),
    /// First record of an epoch: capture was broken between `after` and here.
    Epoch {
        /// The new epoch.
        epoch: Epoch,
        /// Last record of the epoch before.
        after: Moment,
    },
    /// The source's clock was set, and since when its times are in doubt. Instead of `ClockJump`, which old
    /// logs hold.
    ClockStep(ClockStep),
}

impl Event {
    /// The event in a record, if it holds one. `after` is the record before it.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] for a volume record that breaks its byte map.
    pub fn of(located: &Located<'_>, after: Moment) -> Result<Option<Event>> {
        let record = &located.record;
        let kind = match record.op {
            Op::Volume => EventKind::Volume(record.volume, VolumeRecord::decode(located.payload)?),
            Op::Bookmark => EventKind::Bookmark(text(located.payload)),
            Op::ResyncBegin => EventKind::ResyncBegin { reason: reason(located), after },
            Op::ResyncEnd => EventKind::ResyncEnd,
            Op::Failed => EventKind::Failed(failed_lsn(located)?),
            Op::ClockJump => EventKind::ClockStep(ClockStep::decode(located.payload, record.time_ns)?),
            _ => return Ok(None),
        };
        Ok(Some(Event { at: Moment { lsn: record.lsn, time_ns: record.time_ns }, kind }))
    }

    /// The event that a frame of a new epoch begins with.
    pub fn epoch(header: &FrameHeader, after: Moment) -> Event {
        let at = Moment { lsn: header.first_lsn, time_ns: header.first_time_ns };
        Event { at, kind: EventKind::Epoch { epoch: header.epoch, after } }
    }
}

/// The lsn that a `failed` record names. Bounded here: the log would hold what it refuses to read again.
fn failed_lsn(located: &Located<'_>) -> Result<Lsn> {
    let (lsn, bytes) = (located.record.lsn, located.payload.len());
    let named = located.payload.try_into().ok().map(|word| Lsn(u64::from_le_bytes(word)));
    named.filter(|named| *named <= Lsn::MAX).ok_or_else(|| {
        let what = format!("lsn {lsn}: a failed write whose payload of {bytes} bytes names no lsn");
        Error::new(ErrorKind::Malformed, what)
    })
}

/// Why a resync began. What the source says of earlier points is told with it and takes none of them away: a
/// source that has fallen into other hands would take all.
fn reason(located: &Located<'_>) -> String {
    let Some(since) = InDoubt::of(&located.record) else { return text(located.payload) };
    let words = format!("points after lsn {} may lack what others wrote: ", since.after);
    text(&[words.as_bytes(), located.payload].concat())
}

/// A peer's text, held to what an event may carry, and to what may be shown.
fn text(payload: &[u8]) -> String {
    let text = String::from_utf8_lossy(&payload[..payload.len().min(MAX_NAME_BYTES)]);
    machine::text::tidy_to(&text, MAX_NAME_BYTES).into_owned()
}

/// The log's file for a number from the group's state.
pub fn log_path(group_dir: &Path, number: u64) -> PathBuf {
    group_dir.join(if number == 0 { "events".to_owned() } else { format!("events.{number}") })
}

fn encode(events: &[Event]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for event in events {
        let payload = postcard::to_stdvec(event)
            .map_err(|e| Error::new(ErrorKind::Malformed, format!("encode event: {e}")))?;
        let bytes = u32::try_from(payload.len()).expect("an event's texts are bounded");
        out.extend_from_slice(&bytes.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
        out.extend_from_slice(&payload);
    }
    Ok(out)
}

/// Bytes that events take in a log.
///
/// # Errors
/// As [`EventLog::append`].
pub fn log_bytes(events: &[Event]) -> Result<u64> {
    Ok(encode(events)?.len() as u64)
}

/// The payload of the first entry and the bytes that the entry takes; `None` where it is not there as a
/// whole.
fn entry(bytes: &[u8]) -> std::result::Result<Option<(&[u8], usize)>, &'static str> {
    let word = |from: usize| {
        let bytes: [u8; 4] = bytes.get(from..from + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    let (Some(length), Some(crc)) = (word(0), word(4)) else { return Ok(None) };
    let length = length as usize;
    if length > MAX_EVENT_BYTES {
        return Err("longer than an event can be");
    }
    let Some(payload) = bytes.get(8..8 + length) else { return Ok(None) };
    if crc32fast::hash(payload) != crc {
        return Err("CRC does not match");
    }
    Ok(Some((payload, 8 + length)))
}

/// The append-only log of applied events.
pub struct EventLog {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: Option<Arc<dyn File>>,
}

impl EventLog {
    /// Names the log; the file is opened or created when the first event is appended.
    pub fn new(disk: Arc<dyn Disk>, group_dir: &Path, number: u64) -> EventLog {
        EventLog { disk, path: log_path(group_dir, number), file: None }
    }

    /// Reads the durable part of the log, a piece at a time: it may be much longer than what is kept of it in
    /// memory.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming file and offset, for anything but `bytes` bytes of whole events.
    pub fn load(
        disk: &dyn Disk,
        group_dir: &Path,
        number: u64,
        bytes: u64,
        mut visit: impl FnMut(Event),
    ) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let path = log_path(group_dir, number);
        let corrupt = |offset: u64, what: &str| {
            Error::corrupt(format!("{} at byte {offset}: event log: {what}", path.display()))
        };
        let file = disk.open_read_own(&path).map_err(|e| Error::io(format!("open {}", path.display()), e))?;
        let size = file.size().map_err(|e| Error::io(format!("size of {}", path.display()), e))?;
        if size < bytes {
            return Err(corrupt(size, "cut short"));
        }
        let mut chunk = Vec::new();
        let mut at = 0;
        while at < bytes {
            let length = usize::try_from((bytes - at).min(LOAD_BYTES)).expect("at most 1 MiB");
            chunk.resize(length, 0);
            let got =
                file.read_at(&mut chunk, at).map_err(|e| Error::io(format!("read {}", path.display()), e))?;
            chunk.truncate(got);
            let mut rest = &chunk[..];
            while let Some((payload, taken)) = entry(rest).map_err(|what| corrupt(at, what))? {
                visit(postcard::from_bytes(payload).map_err(|e| corrupt(at, &e.to_string()))?);
                rest = &rest[taken..];
                at += taken as u64;
            }
            // A chunk holds many of the largest entries: one that holds no whole entry is the last, and
            // broken.
            if rest.len() == got {
                return Err(corrupt(at, "entry cut short"));
            }
        }
        Ok(())
    }

    /// Writes events at `at`, the durable length so far, and syncs; returns the new length.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] is final; [`ErrorKind::NoSpace`] leaves the log as it was.
    pub fn append(&mut self, events: &[Event], at: u64) -> Result<u64> {
        if events.is_empty() {
            return Ok(at);
        }
        let bytes = encode(events)?;
        let file = self.file()?;
        file.write_at(&bytes, at).map_err(|e| Error::io(format!("write {}", self.path.display()), e))?;
        file.sync().map_err(|e| Error::sync(format!("sync {}", self.path.display()), e))?;
        Ok(at + bytes.len() as u64)
    }

    fn file(&mut self) -> Result<Arc<dyn File>> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        let file = match self.disk.open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let file = self
                    .disk
                    .create(&self.path)
                    .map_err(|e| Error::io(format!("create {}", self.path.display()), e))?;
                // The name must be as durable as the length that will be stored for it.
                let dir = self.path.parent().unwrap_or(Path::new("/"));
                self.disk.sync_dir(dir).map_err(|e| Error::sync(format!("sync {}", dir.display()), e))?;
                file
            }
            Err(e) => return Err(Error::io(format!("open {}", self.path.display()), e)),
        };
        self.file = Some(Arc::clone(&file));
        Ok(file)
    }
}
