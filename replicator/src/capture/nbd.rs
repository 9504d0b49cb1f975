//! The NBD front of one volume: every write passes through the ring on its way to the backing store.
//!
//! Crash order of a write (DESIGN section 3 ⚠, `models/front.py`); `kill -9` may come between any two:
//! 1. wait until no overlapping write is in flight — else ring order and backing order could differ;
//! 2. reserve, copy and publish the record, or set the dirty bit — from here a new owner redoes the write, or a
//!    resync reads it again, so the backing can never be ahead of the stream;
//! 3. write the backing;
//! 4. set the record's `done` flag — from here a new owner does not redo it (a later, answered write that only has
//!    a bit would be overwritten);
//! 5. answer the client.
//!
//! Nothing here waits for the journal, the link or the receiver.

use std::io;
use std::sync::Arc;

use kfilter::{Captured, Entry, Op, Refused, Token};
use nbd::{Backing, BlockExtent, Export, Zeroing};
use uuid::Uuid;

use crate::SharedRing;
use crate::capture::in_flight::InFlight;
use crate::clock::now_ns;
use crate::status::{Board, State};

/// One volume, captured and served.
pub struct CapturedVolume {
    /// Short id in the stream.
    pub id: u32,
    /// Operator's name; also the export's.
    pub name: String,
    /// Identity.
    pub uuid: Uuid,
    /// Where the content lives.
    pub backing: Backing,
    /// The group's ring.
    pub ring: Arc<SharedRing>,
    /// The group's states.
    pub board: Arc<Board>,
    in_flight: InFlight,
}

impl CapturedVolume {
    /// A volume with nothing in flight.
    pub fn new(
        id: u32,
        name: String,
        uuid: Uuid,
        backing: Backing,
        ring: Arc<SharedRing>,
        board: Arc<Board>,
    ) -> CapturedVolume {
        CapturedVolume { id, name, uuid, backing, ring, board, in_flight: InFlight::default() }
    }

    /// Steps 1 to 4 for one change of `offset..offset + length`.
    fn change(
        &self,
        offset: u64,
        length: u64,
        capture: impl FnOnce() -> Result<Captured<Token>, Refused>,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let _turn = self.in_flight.enter(offset..offset + length);
        let captured = capture().map_err(|refused| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("the ring refused the write: {refused:?}"))
        })?;
        let written = write();
        let Captured::Ring(token) = captured else { return written };
        let first_lsn = token.first_lsn();
        if let Err(error) = &written {
            self.repair(offset, length, first_lsn, error);
        }
        self.ring.mark_done(token);
        written
    }

    /// A recorded write failed on the backing: say so in the stream and record what stands there now. What cannot be
    /// read or recorded becomes dirty bits.
    #[cold]
    fn repair(&self, offset: u64, length: u64, lsn: u64, error: &io::Error) {
        tracing::warn!(volume = %self.name, offset, length, lsn, %error, "write to the backing failed");
        let mut failed = Entry::extent(Op::Failed, self.id, offset, length, 0);
        failed.payload_len = 8;
        failed.needs_done = false;
        let recorded = matches!(
            self.ring.capture(std::iter::once(failed), &lsn.to_le_bytes(), now_ns()),
            Ok(Captured::Ring(_))
        );
        if !(recorded && self.record_content(offset, length).is_ok()) {
            self.ring.set_mode_bitmap(kfilter::dirty::CAUSE_AGENT, now_ns());
            self.ring.mark_dirty(self.id, offset..offset + length);
            let why =
                format!("volume {}: bytes {offset}+{length} failed and could not be read again", self.name);
            self.board.change(State::Degraded, why);
        }
    }

    /// Records what the backing holds now as sync slots. The caller holds the range's turn.
    fn record_content(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut content =
            vec![0; usize::try_from(length.min(u64::from(kfilter::abi::MAX_PAYLOAD))).unwrap_or(0)];
        let mut at = offset;
        while at < offset + length {
            let piece = (offset + length - at).min(content.len() as u64);
            let bytes = &mut content[..usize::try_from(piece).unwrap_or(0)];
            self.backing.read_at(at, bytes)?;
            let slot = sync_slot(self.id, at, bytes.len());
            match self.ring.capture(std::iter::once(slot), bytes, now_ns()) {
                Ok(Captured::Ring(_)) => at += piece,
                Ok(Captured::Bits) | Err(_) => return Err(io::ErrorKind::StorageFull.into()),
            }
        }
        Ok(())
    }
}

/// A sync slot with its content, as the offline synchronisation and the repair of failed writes reserve it.
pub fn sync_slot(volume: u32, offset: u64, bytes: usize) -> Entry {
    let payload_len = u32::try_from(bytes).expect("a slot holds at most one record's payload");
    Entry {
        op: Op::SyncSlot,
        flags: 0,
        volume,
        offset,
        length: u64::from(payload_len),
        payload_len,
        needs_done: false,
    }
}

impl Export for CapturedVolume {
    fn name(&self) -> &str {
        &self.name
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn description(&self) -> &str {
        "protected by Afterimage"
    }

    fn size_bytes(&self) -> u64 {
        self.backing.size_bytes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.backing.read_at(offset, into)
    }

    fn try_read_cached(&self, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        self.backing.try_read_cached(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8], fua: bool) -> io::Result<()> {
        let length = bytes.len() as u64;
        let flags = if fua { kfilter::abi::FLAG_FUA } else { 0 };
        self.change(
            offset,
            length,
            || self.ring.capture(Entry::write(self.id, offset, length, flags), bytes, now_ns()),
            || self.backing.write_at(offset, bytes),
        )
    }

    fn write_zeroes(&self, offset: u64, length_bytes: u64, how: Zeroing) -> io::Result<()> {
        let flags = if how.fua { kfilter::abi::FLAG_FUA } else { 0 };
        let entry = Entry::extent(Op::WriteZeroes, self.id, offset, length_bytes, flags);
        self.change(
            offset,
            length_bytes,
            || self.ring.capture(std::iter::once(entry), &[], now_ns()),
            || self.backing.write_zeroes(offset, length_bytes, how.keep_allocated, how.only_if_fast),
        )
    }

    /// A discard is zeros on the replica (DESIGN promise 2), so it is made zeros on the source too: what a device
    /// returns after a mere discard is its own affair and would differ.
    fn discard(&self, offset: u64, length_bytes: u64, fua: bool) -> io::Result<()> {
        let flags = if fua { kfilter::abi::FLAG_FUA } else { 0 };
        let entry = Entry::extent(Op::Discard, self.id, offset, length_bytes, flags);
        self.change(
            offset,
            length_bytes,
            || self.ring.capture(std::iter::once(entry), &[], now_ns()),
            || self.backing.write_zeroes(offset, length_bytes, false, false),
        )
    }

    fn flush(&self) -> io::Result<()> {
        self.backing.sync()?;
        // The client's barrier stands in the stream as a mark for the curious; its absence (ring full) loses nothing.
        let _ = self.ring.capture(std::iter::once(Entry::event(Op::Flush, self.id, 0)), &[], now_ns());
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.backing.sync()
    }

    fn block_status(
        &self,
        offset: u64,
        length_bytes: u64,
        max_extents: usize,
    ) -> io::Result<Vec<BlockExtent>> {
        self.backing.block_status(offset, length_bytes, max_extents)
    }
}
