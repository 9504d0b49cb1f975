//! The NBD front of one volume: every write passes through the ring on its way to the backing store.
//!
//! Crash order of a write (DESIGN section 3 ⚠, `models/front.py`); `kill -9` may come between any two:
//! 1. wait until no overlapping write is in flight — else ring order and backing order could differ;
//! 2. reserve, copy and publish the record, or set the dirty bit — from here a new owner redoes the write, or
//!    a resync reads it again, so the backing can never be ahead of the stream;
//! 3. write the backing;
//! 4. set the record's `done` flag — from here a new owner does not redo it (a later, answered write that
//!    only has a bit would be overwritten);
//! 5. answer the client.
//!
//! Nothing here waits for the link or the receiver; for the journal only by milliseconds, while it drains
//! (`pace`).
//!
//! A failed write is repaired in the stream. A failed fdatasync cannot be: nobody knows which of the writes
//! answered since the last one are lost. It is final: the whole volume is dirty, the gap is remembered, every
//! later FLUSH and FUA fails, and only a new start, which reads the backing again, leads out of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kfilter::{Captured, Entry, Op, Refused, Region, Token};
use nbd::{Backing, BlockExtent, Export, Zeroing};
use uuid::Uuid;

use crate::capture::durability::{Durability, NotDurable};
use crate::capture::in_flight::InFlight;
use crate::capture::pace::Pacer;
use crate::clock::now_ns;
use crate::status::{Board, State};

/// What stands after a failed write is recorded at once up to this length (the longest piece of a WRITE); the
/// content of a longer discard or zeroing would flood the ring, so it becomes dirty bits, which a repair
/// reads again.
const MAX_REPAIR_BYTES: u64 = 1 << 20;

/// Told why, as soon as the replica's content is known to differ in a way that only a synchronisation mends.
pub type OnGap = Arc<dyn Fn(&str) + Send + Sync>;

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
    pub ring: Arc<Region>,
    /// The group's states.
    pub board: Arc<Board>,
    /// Its changes in flight: what the barrier of a synchronisation waits for.
    pub in_flight: Arc<InFlight>,
    /// What clients may use: never more than ring and stream know.
    size_bytes: AtomicU64,
    durability: Durability,
    pacer: Pacer,
    on_gap: OnGap,
}

impl CapturedVolume {
    /// A volume with nothing in flight. `on_gap` is called on a client's thread, before that client is
    /// answered: the place to make the gap durable.
    pub fn new(
        id: u32,
        name: String,
        uuid: Uuid,
        backing: Backing,
        ring: Arc<Region>,
        board: Arc<Board>,
        on_gap: OnGap,
    ) -> CapturedVolume {
        let (in_flight, durability, pacer) = (Arc::default(), Durability::default(), Pacer::new());
        let size_bytes = AtomicU64::new(backing.size_bytes());
        CapturedVolume {
            id,
            name,
            uuid,
            backing,
            ring,
            board,
            in_flight,
            size_bytes,
            durability,
            pacer,
            on_gap,
        }
    }

    /// Size that clients may use now, bytes.
    pub fn size_bytes_now(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Ring and stream hear of a new size, before any write that needs it.
    ///
    /// # Errors
    /// The ring refused: it does not know the volume.
    pub fn tell_growth(&self, to: u64) -> Result<(), Refused> {
        if self.ring.size_bytes(self.id).is_some_and(|known| known >= to) {
            return Ok(());
        }
        self.ring.grow(self.id, to, &to.to_le_bytes(), now_ns()).map(drop)
    }

    /// Clients may use a new size, which [`tell_growth`](Self::tell_growth) has told.
    pub fn serve_growth(&self, to: u64) {
        self.size_bytes.fetch_max(to, Ordering::AcqRel);
    }

    /// Ends capture: from now on changes fail with `ESHUTDOWN`, before they reach ring or backing. True: none
    /// is in flight any more, so ring and backing stay as they are; false: one still was after `deadline`.
    /// Blocks.
    pub fn close(&self, deadline: Duration) -> bool {
        self.in_flight.close(deadline)
    }

    /// Whether the backing has lost writes that were answered. It stays so for the life of this volume.
    pub fn sync_failed(&self) -> bool {
        self.durability.has_failed()
    }

    /// Steps 1 to 4 for one change of `offset..offset + length`.
    fn change(
        &self,
        offset: u64,
        length: u64,
        capture: impl FnOnce() -> Result<Captured<Token>, Refused>,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        self.pacer.pace(&self.ring);
        let _turn = self.in_flight.enter(offset..offset + length)?;
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

    /// A recorded write failed on the backing: say so in the stream and record what stands there now. What is
    /// too long, or cannot be read or recorded, becomes dirty bits.
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
        if !(recorded && length <= MAX_REPAIR_BYTES && self.record_content(offset, length).is_ok()) {
            // Read again behind a fence, as soon as the synchronisation looks.
            self.ring.mark_dirty(self.id, offset..offset + length);
        }
    }

    /// Makes durable what was written before this call, by `fsync` or by another thread's.
    fn make_durable(&self, fsync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match self.durability.sync(fsync) {
            Ok(()) => return Ok(()),
            Err(NotDurable::Before) => {}
            Err(NotDurable::Now(error)) => self.lose_backing(&error),
        }
        Err(rustix::io::Errno::IO.into())
    }

    /// The backing has dropped writes that were answered, and the replica has them.
    #[cold]
    fn lose_backing(&self, error: &io::Error) {
        let why = format!(
            "volume {}: its backing lost writes (fdatasync: {error}); see the kernel log, mend the disk, restart the agent",
            self.name
        );
        tracing::error!("{why}");
        self.ring.set_mode_bitmap(kfilter::dirty::CAUSE_AGENT, now_ns());
        self.ring.mark_dirty(self.id, 0..self.size_bytes_now());
        self.board.change(State::Degraded, why.as_str());
        (self.on_gap)(&why);
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

/// A sync slot with its content, as the repair of failed writes reserves it while it holds the range.
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
        self.size_bytes_now()
    }

    fn read_only(&self) -> bool {
        false
    }

    /// Whether the backing zeroes fast shows only when it is asked, and a change is recorded before.
    fn fast_zero(&self) -> bool {
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
        if how.only_if_fast {
            return Err(io::ErrorKind::Unsupported.into()); // by a client that was not offered it
        }
        let flags = if how.fua { kfilter::abi::FLAG_FUA } else { 0 };
        let entry = Entry::extent(Op::WriteZeroes, self.id, offset, length_bytes, flags);
        self.change(
            offset,
            length_bytes,
            || self.ring.capture(std::iter::once(entry), &[], now_ns()),
            || self.backing.write_zeroes(offset, length_bytes, how.keep_allocated, false),
        )
    }

    /// A discard is zeros on the replica (DESIGN promise 2), so it is made zeros on the source too: what a
    /// device returns after a mere discard is its own affair and would differ.
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
        self.sync()?;
        // The client's barrier stands in the stream as a mark for the curious; its absence (ring full, volume
        // closed) loses nothing.
        let Ok(_turn) = self.in_flight.enter(0..0) else { return Ok(()) };
        let _ = self.ring.capture(std::iter::once(Entry::event(Op::Flush, self.id, 0)), &[], now_ns());
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.make_durable(|| self.backing.sync())
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use kfilter::Mode;
    use kfilter::abi::{Identity, VolumeSpec};
    use kfilter::region::{RegionSpec, boot_id};
    use nbd::Access;

    use super::*;

    const SIZE: u64 = 64 << 20;
    const MIB: u64 = 1 << 20;

    /// A volume over a sparse file, what it told of gaps, and its directories.
    struct Rig {
        volume: CapturedVolume,
        gaps: Arc<Mutex<Vec<String>>>,
        _dirs: [tempfile::TempDir; 2],
    }

    impl Rig {
        /// A backing that is open for reading only fails every change.
        fn new(access: Access) -> Rig {
            let dir = tempfile::tempdir().unwrap();
            let ring_dir = tempfile::Builder::new().prefix("af-test-").tempdir_in("/dev/shm").unwrap();
            let image = dir.path().join("disk.img");
            std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
            let volumes = [VolumeSpec { id: 1, sector_bytes: 512, uuid: [2; 16], size_bytes: SIZE }];
            let spec = RegionSpec {
                identity: Identity {
                    boot_id: boot_id().unwrap(),
                    group_id: [1; 16],
                    epoch: 1,
                    epoch_id: [3; 16],
                },
                volumes: &volumes,
                ring_bytes: 4 << 20,
                first_lsn: 1,
                last_time_ns: 0,
            };
            let ring = Arc::new(Region::create(ring_dir.path(), &spec).unwrap());
            let board = Arc::new(Board::new("g", std::iter::once("disk".to_owned())));
            let gaps = Arc::new(Mutex::new(Vec::new()));
            let told = gaps.clone();
            let on_gap: OnGap = Arc::new(move |why| told.lock().unwrap().push(why.to_owned()));
            let backing = Backing::open(&image, access).unwrap();
            let uuid = Uuid::from_bytes([2; 16]);
            let volume = CapturedVolume::new(1, "disk".to_owned(), uuid, backing, ring, board, on_gap);
            Rig { volume, gaps, _dirs: [dir, ring_dir] }
        }

        fn dirty(&self) -> Vec<std::ops::Range<u64>> {
            self.volume.ring.dirty_extents(1).collect()
        }
    }

    #[test]
    fn a_failed_sync_is_final_and_makes_the_whole_volume_dirty() {
        let rig = Rig::new(Access::ReadWrite);
        let volume = &rig.volume;
        volume.write(0, &[1; 512], false).unwrap();
        volume.flush().unwrap();
        assert!(!volume.sync_failed() && rig.dirty().is_empty());

        let failed = volume.make_durable(|| Err(rustix::io::Errno::IO.into())).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
        assert!(volume.sync_failed());
        assert_eq!(volume.ring.mode(), Mode::Bitmap);
        assert_eq!(rig.dirty(), vec![0..SIZE; 1]);
        let (state, why) = volume.board.state();
        assert_eq!(state, State::Degraded);
        assert!(why.contains("volume disk") && why.contains("kernel log"), "{why}");
        assert_eq!(*rig.gaps.lock().unwrap(), [why]);

        // The backing would say yes now: writeback errors are told once.
        for again in [volume.flush(), volume.sync()] {
            assert_eq!(again.unwrap_err().raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
        }
        assert_eq!(rig.gaps.lock().unwrap().len(), 1, "a gap is told once");
        volume.write(512, &[2; 512], false).expect("service goes on");
    }

    #[test]
    fn zeroing_only_if_fast_is_refused_before_it_is_recorded() {
        let rig = Rig::new(Access::ReadWrite);
        let how = Zeroing { only_if_fast: true, ..Zeroing::default() };
        assert!(!rig.volume.fast_zero());
        let refused = rig.volume.write_zeroes(0, SIZE, how).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
        assert_eq!((rig.volume.ring.captured_lsn(), rig.volume.ring.mode()), (0, Mode::Ring));
    }

    #[test]
    fn a_failed_change_is_repaired_in_the_stream_or_as_bits_of_its_range() {
        let rig = Rig::new(Access::ReadOnly);
        let volume = &rig.volume;
        volume.write(0, &[1; 4096], false).unwrap_err();
        assert_eq!(volume.ring.captured_lsn(), 3, "the write, that it failed, and what stands there");
        assert_eq!(volume.ring.mode(), Mode::Ring);

        volume.discard(8 * MIB, 32 * MIB, false).unwrap_err();
        assert_eq!(volume.ring.captured_lsn(), 5, "no content of a long range");
        assert_eq!(volume.ring.mode(), Mode::Ring, "everything else is still recorded");
        assert_eq!(rig.dirty(), vec![8 * MIB..40 * MIB; 1]);
        assert!(!volume.sync_failed());
    }

    #[test]
    fn a_closed_volume_records_and_changes_nothing() {
        let rig = Rig::new(Access::ReadWrite);
        let volume = &rig.volume;
        volume.write(0, &[1; 512], false).unwrap();
        let captured = volume.ring.captured_lsn();
        assert!(volume.close(Duration::ZERO));
        let refused = [
            volume.write(0, &[2; 512], false),
            volume.discard(0, 512, false),
            volume.write_zeroes(0, 512, Zeroing::default()),
        ];
        for result in refused {
            let error = result.unwrap_err().raw_os_error();
            assert_eq!(error, Some(rustix::io::Errno::SHUTDOWN.raw_os_error()));
        }
        volume.flush().expect("what was written can still be made durable");
        assert_eq!(volume.ring.captured_lsn(), captured);
        let mut read = [0; 512];
        volume.read_at(0, &mut read).unwrap();
        assert_eq!(read, [1; 512]);
    }
}
