//! INGEST: which frames a group takes, in which order, and the thread that makes them durable.
//!
//! Stands between the link, which hands in foreign bytes, and the journal, which must hold one unbroken
//! chain. [`IngestCore`] decides and holds no socket, file or clock; [`thread`] runs it over the group's
//! journal writer.
//!
//! State: the position of the last frame taken. Invariants: a frame is taken once, in order, and only if
//! lineage, epoch, lsn and chain all say that it is the next; a newer epoch is entered only through a frame
//! that announces what it is about (its volumes, and that a resync begins), above everything held.

pub mod queue;
pub mod thread;

use std::fmt;

use journal::compress::Decoder;
use journal::frame::{FLAG_EVENTS, FrameHeader, FrameKind, chain_seed};
use journal::record::{Op, Records};
use journal::{GroupId, Lsn, Position};
use wire::message::ErrorCode;

/// Why a frame is not taken; ends the connection that it came on, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the peer's program makes of it.
    pub code: ErrorCode,
    /// What the peer's operator reads.
    pub reason: String,
}

impl Refusal {
    /// A refusal in words.
    pub fn new(code: ErrorCode, reason: impl Into<String>) -> Refusal {
        Refusal { code, reason: reason.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// What taking a frame means for the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is the next of the epoch.
    Follows,
    /// It begins a newer epoch, from this position.
    Begins(Position),
}

/// See the module.
pub struct IngestCore {
    group: GroupId,
    held: Position,
    /// Between an epoch's first frame and its `ResyncBegin`: only volumes may be named.
    opening: bool,
    decoder: Decoder,
    raw: Vec<u8>,
}

impl IngestCore {
    /// Continues after `held`, the last frame in the group's journal.
    ///
    /// # Errors
    /// No decompressor could be made (out of memory).
    pub fn new(group: GroupId, held: Position) -> journal::Result<IngestCore> {
        // An epoch that was begun in the journal and holds nothing yet is still opening.
        let opening = held.chain == chain_seed(held.lineage, held.epoch);
        Ok(IngestCore { group, held, opening, decoder: Decoder::new()?, raw: Vec::new() })
    }

    /// The last frame taken.
    pub fn held(&self) -> &Position {
        &self.held
    }

    /// Judges a whole frame. Nothing changes until [`taken`](Self::taken) says that the journal has it.
    ///
    /// # Errors
    /// The exact reason why it is not the next frame of this group.
    pub fn judge(&mut self, header: &FrameHeader, frame: &[u8]) -> Result<Step, Refusal> {
        self.check_identity(header)?;
        if frame.len() != header.frame_bytes() {
            let what = format!("{} bytes where {} are due", frame.len(), header.frame_bytes());
            return Err(refuse(ErrorCode::BadFrame, header, &what));
        }
        header.check_payload(frame).map_err(|e| Refusal::new(ErrorCode::BadFrame, e.to_string()))?;
        let step = if header.epoch == self.held.epoch {
            self.check_order(header)?;
            Step::Follows
        } else {
            Step::Begins(self.check_begins(header)?)
        };
        if self.opening || matches!(step, Step::Begins(_)) {
            self.opening_ends(header, frame)?;
        }
        Ok(step)
    }

    /// The journal has begun the epoch of the frame that [`judge`](Self::judge) accepted last, and not the
    /// frame yet.
    pub fn begun(&mut self, start: Position) {
        self.held = start;
        self.opening = true;
    }

    /// The journal has the frame that [`judge`](Self::judge) accepted last.
    pub fn taken(&mut self, header: &FrameHeader) {
        self.opening = (self.opening || header.epoch != self.held.epoch) && !self.announces_resync();
        self.held = header.position();
        // One frame's worth of memory, needed once an epoch.
        self.raw = Vec::new();
    }

    fn check_identity(&self, header: &FrameHeader) -> Result<(), Refusal> {
        if header.group != self.group {
            let what = format!("group {} where {} is sent here", header.group, self.group);
            return Err(refuse(ErrorCode::GroupNotYours, header, &what));
        }
        if header.lineage != self.held.lineage {
            let what = format!("lineage {} where {} is held", header.lineage, self.held.lineage);
            return Err(refuse(ErrorCode::LineageMismatch, header, &what));
        }
        // The lsn after it must exist: this one came from the network.
        if header.last_lsn >= Lsn::MAX {
            return Err(refuse(ErrorCode::BadFrame, header, "its lsn is the last there is"));
        }
        match header.kind {
            FrameKind::Live | FrameKind::Sync => Ok(()),
            kind => {
                Err(refuse(ErrorCode::BadFrame, header, &format!("kind {kind:?} is not sent in a stream")))
            }
        }
    }

    /// Within the epoch held: the next lsn, joined by its chain.
    fn check_order(&self, header: &FrameHeader) -> Result<(), Refusal> {
        let held = &self.held;
        if header.first_lsn <= held.lsn {
            let what = format!("duplicate, lsn {} is held", held.lsn);
            return Err(refuse(ErrorCode::OutOfOrder, header, &what));
        }
        if header.first_lsn != held.lsn.next() {
            let what = format!("out of order, lsn {} is due", held.lsn.next());
            return Err(refuse(ErrorCode::OutOfOrder, header, &what));
        }
        if header.chain_in != held.chain {
            let what = format!("its chain does not join the frame held up to lsn {}", held.lsn);
            return Err(refuse(ErrorCode::ChainMismatch, header, &what));
        }
        // The journal's own rule, last: whatever it adds holds here too.
        header.check_follows(held).map_err(|e| Refusal::new(ErrorCode::OutOfOrder, e.to_string()))
    }

    /// Another epoch: newer in number, above in lsn, its first frame by its chain.
    fn check_begins(&self, header: &FrameHeader) -> Result<Position, Refusal> {
        let (held, epoch) = (&self.held, header.epoch);
        if epoch.number < held.epoch.number {
            let what = format!("replayed, of epoch {} where {} is held", epoch.number, held.epoch.number);
            return Err(refuse(ErrorCode::OutOfOrder, header, &what));
        }
        if epoch.number == held.epoch.number {
            let what = format!("epoch {} has id {} here, not {}", epoch.number, held.epoch.id, epoch.id);
            return Err(refuse(ErrorCode::ChainMismatch, header, &what));
        }
        if header.first_lsn <= held.lsn {
            let what = format!("a new epoch below lsn {}, which is held", held.lsn);
            return Err(refuse(ErrorCode::OutOfOrder, header, &what));
        }
        if header.chain_in != chain_seed(header.lineage, epoch) {
            let what = format!("not the first frame of epoch {}", epoch.number);
            return Err(refuse(ErrorCode::ChainMismatch, header, &what));
        }
        if header.flags & FLAG_EVENTS == 0 {
            let what = format!("epoch {} does not begin with its volumes", epoch.number);
            return Err(refuse(ErrorCode::BadFrame, header, &what));
        }
        Ok(Position::epoch_start(header.lineage, epoch, Lsn(header.first_lsn.0 - 1)))
    }

    /// Unpacks an epoch's opening: nothing but volumes may come before its `ResyncBegin`.
    fn opening_ends(&mut self, header: &FrameHeader, frame: &[u8]) -> Result<(), Refusal> {
        let bad = |e: journal::Error| refuse(ErrorCode::BadFrame, header, &e.to_string());
        self.raw.clear();
        self.decoder.decode(header, frame, &mut self.raw).map_err(bad)?;
        Records::check(header, &self.raw).map_err(bad)?;
        for located in Records::new(&self.raw) {
            match located.map_err(bad)?.record.op {
                Op::Volume => {}
                Op::ResyncBegin => return Ok(()),
                op => {
                    let what = format!("epoch {} has a {op:?} before its resync begins", header.epoch.number);
                    return Err(refuse(ErrorCode::BadFrame, header, &what));
                }
            }
        }
        Ok(())
    }

    /// Whether the frame unpacked last brought the opening's `ResyncBegin`.
    fn announces_resync(&self) -> bool {
        Records::new(&self.raw).any(|located| located.is_ok_and(|l| l.record.op == Op::ResyncBegin))
    }
}

fn refuse(code: ErrorCode, header: &FrameHeader, what: &str) -> Refusal {
    Refusal::new(code, format!("frame lsn {}..{}: {what}", header.first_lsn, header.last_lsn))
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::compress::{Compression, Encoder};
    use journal::frame::{Batch, Stamp};
    use journal::record::{Record, VolumeRecord};
    use journal::{Epoch, EpochId, Extent, Lineage, VolumeId, VolumeUuid};

    pub(super) const GROUP: GroupId = GroupId([1; 16]);
    pub(super) const LINEAGE: Lineage = Lineage([2; 16]);

    pub(super) fn epoch(number: u64) -> Epoch {
        Epoch { number, id: EpochId([u8::try_from(number).unwrap(); 16]) }
    }

    pub(super) fn stamp(number: u64) -> Stamp {
        Stamp { group: GROUP, lineage: LINEAGE, epoch: epoch(number) }
    }

    pub(super) fn frame(stamp: &Stamp, chain_in: u64, first: u64, ops: &[Op]) -> (FrameHeader, Vec<u8>) {
        let volume = VolumeRecord {
            uuid: VolumeUuid([3; 16]),
            size_bytes: 1 << 20,
            sector_bytes: 512,
            present: true,
            name: "v".into(),
        };
        let mut batch = Batch::default();
        for (at, op) in ops.iter().enumerate() {
            let lsn = first + at as u64;
            let payload = match op {
                Op::Volume => volume.encode(),
                Op::Write => vec![7; 512],
                _ => Vec::new(),
            };
            let len = if *op == Op::Write { 512 } else { 0 };
            let extent = Extent { offset: 0, len };
            let record =
                Record { op: *op, flags: 0, volume: VolumeId(0), lsn: Lsn(lsn), time_ns: lsn, extent };
            batch.push(&record, &payload);
        }
        let mut encoder = Encoder::new().unwrap();
        let encoded = encoder.encode(&batch, stamp, None, Compression::Off, Vec::new()).unwrap();
        let (bytes, _) = encoded.seal(chain_in);
        (FrameHeader::parse(&bytes).unwrap(), bytes)
    }

    pub(super) fn opening(number: u64, first: u64) -> (FrameHeader, Vec<u8>) {
        let seed = chain_seed(LINEAGE, epoch(number));
        frame(&stamp(number), seed, first, &[Op::Volume, Op::ResyncBegin])
    }

    /// A core that holds epoch 2's opening, lsns 10 and 11.
    fn core() -> IngestCore {
        let held = Position::epoch_start(LINEAGE, Epoch::default(), Lsn::ZERO);
        let mut core = IngestCore::new(GROUP, held).unwrap();
        let (header, bytes) = opening(2, 10);
        let start = Position::epoch_start(LINEAGE, epoch(2), Lsn(9));
        assert_eq!(core.judge(&header, &bytes), Ok(Step::Begins(start)));
        core.taken(&header);
        core
    }

    fn refused(core: &mut IngestCore, (header, bytes): (FrameHeader, Vec<u8>)) -> (ErrorCode, String) {
        let held = *core.held();
        let refusal = core.judge(&header, &bytes).unwrap_err();
        assert_eq!(*core.held(), held, "a refused frame changes nothing");
        (refusal.code, refusal.reason)
    }

    #[track_caller]
    fn assert_refused(core: &mut IngestCore, frame: (FrameHeader, Vec<u8>), code: ErrorCode, word: &str) {
        let (got, reason) = refused(core, frame);
        assert!(got == code && reason.contains(word), "{got:?}: {reason}");
    }

    #[test]
    fn the_next_frame_is_taken_once() {
        let mut core = core();
        let chain = core.held().chain;
        let next = frame(&stamp(2), chain, 12, &[Op::Write, Op::Write]);
        assert_eq!(core.judge(&next.0, &next.1), Ok(Step::Follows));
        core.taken(&next.0);
        assert_eq!(core.held().lsn, Lsn(13));
        assert_refused(&mut core, next, ErrorCode::OutOfOrder, "duplicate");
    }

    #[test]
    fn reordered_and_replayed_frames_are_refused() {
        let mut core = core();
        let chain = core.held().chain;
        assert_refused(
            &mut core,
            frame(&stamp(2), chain, 13, &[Op::Write]),
            ErrorCode::OutOfOrder,
            "12 is due",
        );
        assert_refused(&mut core, frame(&stamp(2), 5, 12, &[Op::Write]), ErrorCode::ChainMismatch, "chain");
        assert_refused(&mut core, opening(1, 50), ErrorCode::OutOfOrder, "replayed");
        assert_refused(&mut core, opening(2, 10), ErrorCode::OutOfOrder, "duplicate");
        let mut twin = stamp(2);
        twin.epoch.id = EpochId([9; 16]);
        assert_refused(&mut core, frame(&twin, chain, 12, &[Op::Write]), ErrorCode::ChainMismatch, "has id");
    }

    #[test]
    fn foreign_frames_are_refused() {
        let mut core = core();
        let chain = core.held().chain;
        let other = Stamp { group: GroupId([8; 16]), ..stamp(2) };
        assert_refused(&mut core, frame(&other, chain, 12, &[Op::Write]), ErrorCode::GroupNotYours, "group");
        let other = Stamp { lineage: Lineage([8; 16]), ..stamp(2) };
        assert_refused(
            &mut core,
            frame(&other, chain, 12, &[Op::Write]),
            ErrorCode::LineageMismatch,
            "lineage",
        );
    }

    #[test]
    fn only_stream_frames_are_taken() {
        let mut core = core();
        let mut batch = Batch::default();
        let extent = Extent { offset: 0, len: 0 };
        let record =
            Record { op: Op::Flush, flags: 0, volume: VolumeId(0), lsn: Lsn(12), time_ns: 1, extent };
        batch.push(&record, &[]);
        let mut encoder = Encoder::new().unwrap();
        let undo = encoder.encode(&batch, &stamp(2), Some(1), Compression::Off, Vec::new()).unwrap();
        let (bytes, _) = undo.seal(core.held().chain);
        let header = FrameHeader::parse(&bytes).unwrap();
        assert_refused(&mut core, (header, bytes), ErrorCode::BadFrame, "Undo");
    }

    #[test]
    fn damaged_and_cut_frames_are_refused() {
        let mut core = core();
        let (header, bytes) = frame(&stamp(2), core.held().chain, 12, &[Op::Write]);
        for at in journal::frame::HEADER_BYTES..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_refused(&mut core, (header, damaged), ErrorCode::BadFrame, "CRC");
        }
        let mut cut = bytes.clone();
        cut.truncate(bytes.len() - 512);
        assert_refused(&mut core, (header, cut), ErrorCode::BadFrame, "are due");
        let mut long = bytes.clone();
        long.extend_from_slice(&[0; 512]);
        assert_refused(&mut core, (header, long), ErrorCode::BadFrame, "are due");
        assert_eq!(core.judge(&header, &bytes), Ok(Step::Follows));
    }

    #[test]
    fn the_last_lsn_of_all_is_refused_not_followed() {
        let held = Position { lsn: Lsn(Lsn::MAX.0 - 2), ..*core().held() };
        let mut core = IngestCore::new(GROUP, held).unwrap();
        let last = frame(&stamp(2), held.chain, Lsn::MAX.0 - 1, &[Op::Flush, Op::Flush]);
        assert_refused(&mut core, last, ErrorCode::BadFrame, "last there is");
    }

    #[test]
    fn a_newer_epoch_begins_above_what_is_held_and_with_its_opening() {
        let mut core = core();
        let seed = chain_seed(LINEAGE, epoch(5));
        let begin = [Op::Volume, Op::ResyncBegin];
        assert_refused(&mut core, opening(5, 11), ErrorCode::OutOfOrder, "below lsn 11");
        assert_refused(&mut core, frame(&stamp(5), 77, 20, &begin), ErrorCode::ChainMismatch, "first frame");
        assert_refused(
            &mut core,
            frame(&stamp(5), seed, 20, &[Op::Write]),
            ErrorCode::BadFrame,
            "begin with",
        );
        let late = frame(&stamp(5), seed, 20, &[Op::Volume, Op::Write, Op::ResyncBegin]);
        assert_refused(&mut core, late, ErrorCode::BadFrame, "Write before its resync");
        let first = opening(5, 20);
        assert!(matches!(core.judge(&first.0, &first.1), Ok(Step::Begins(_))));
        core.taken(&first.0);
        assert_eq!((core.held().epoch, core.held().lsn), (epoch(5), Lsn(21)));
    }

    #[test]
    fn an_opening_may_span_frames_but_nothing_slips_in_before_the_resync() {
        let mut core = core();
        let seed = chain_seed(LINEAGE, epoch(3));
        let volumes = frame(&stamp(3), seed, 20, &[Op::Volume, Op::Volume]);
        assert!(matches!(core.judge(&volumes.0, &volumes.1), Ok(Step::Begins(_))));
        core.taken(&volumes.0);
        let chain = core.held().chain;
        assert_refused(
            &mut core,
            frame(&stamp(3), chain, 22, &[Op::Write]),
            ErrorCode::BadFrame,
            "Write before",
        );
        for (first, ops) in [(22, [Op::ResyncBegin, Op::Write]), (24, [Op::Write, Op::Write])] {
            let next = frame(&stamp(3), core.held().chain, first, &ops);
            assert_eq!(core.judge(&next.0, &next.1), Ok(Step::Follows));
            core.taken(&next.0);
        }
    }

    #[test]
    fn an_epoch_begun_before_a_restart_still_needs_its_opening() {
        let held = Position::epoch_start(LINEAGE, epoch(4), Lsn(30));
        let mut core = IngestCore::new(GROUP, held).unwrap();
        assert_refused(
            &mut core,
            frame(&stamp(4), held.chain, 31, &[Op::Write]),
            ErrorCode::BadFrame,
            "Write",
        );
        let first = opening(4, 31);
        assert_eq!(core.judge(&first.0, &first.1), Ok(Step::Follows));
    }

    #[test]
    fn an_epoch_that_is_begun_without_its_first_frame_goes_on_and_the_old_one_does_not() {
        let start = Position::epoch_start(LINEAGE, epoch(1), Lsn(9));
        let mut core = IngestCore::new(GROUP, start).unwrap();
        let (header, bytes) = opening(2, 100);
        let Ok(Step::Begins(start)) = core.judge(&header, &bytes) else { panic!("a new epoch") };
        core.begun(start);
        let (old, old_bytes) = opening(1, 10);
        assert_eq!(core.judge(&old, &old_bytes).unwrap_err().code, ErrorCode::OutOfOrder);
        let (bare, bare_bytes) = frame(&stamp(2), chain_seed(LINEAGE, epoch(2)), 100, &[Op::Write]);
        assert_eq!(
            core.judge(&bare, &bare_bytes).unwrap_err().code,
            ErrorCode::BadFrame,
            "still its opening"
        );
        assert_eq!(core.judge(&header, &bytes), Ok(Step::Follows));
        core.taken(&header);
        assert_eq!(core.held().lsn, header.last_lsn);
    }
}
