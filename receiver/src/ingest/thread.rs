//! The ingest thread of a group: owner of its journal writer.
//!
//! ```text
//! link ─ submit ─► [queue, 8 MiB] ─► judge ─► append ─► fdatasync (grouped) ─► Progress.durable ─► acks
//! ```
//! Invariants: a position is published only after the fdatasync that covers it; a full disk stops
//! acknowledging and overwrites nothing; a failed sync ends the receiver.
//!
//! While something waits to be applied ingest leaves a reserve on the disk. Otherwise redo could take the
//! last byte that the undo of its own batch needs, and neither would ever move again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use journal::Lsn;
use journal::frame::{FLAG_EVENTS, FrameHeader};
use journal::io::Disk;
use journal::segment::SegmentSummary;
use journal::writer::Writer;
use tokio::sync::watch;
use wire::message::ErrorCode;

use super::queue::{self, Ingest, Item, Queue, Session};
use super::{IngestCore, Refusal, Step};
use crate::agent::progress::Progress;
use crate::agent::{ReceiptClock, Times};
use crate::error::{Error, Result};
use crate::room::GroupRoom;

/// Bytes after which the journal is synced even though more is waiting.
const SYNC_BYTES: u64 = 4 << 20;
/// Time after which the journal is synced even though more is waiting.
const SYNC_DELAY: Duration = Duration::from_millis(5);
/// Pause before a full disk is tried again.
const FULL_RETRY: Duration = Duration::from_millis(200);
/// Bytes after which the disk is asked for its room again.
const ROOM_BYTES: u64 = 8 << 20;
/// The same where the group's own room has a limit.
const LOOK_BYTES: u64 = 1 << 20;
/// The reserve is at most this part of a file system: on a small one batches shrink instead.
const RESERVE_PART: u64 = 16;

/// Who hears of what became durable: history, before the position is published, and the apply thread, after
/// it.
pub trait Durable: Send {
    /// A frame that became durable, in order; `frame` is empty where it holds no events.
    fn frame(&mut self, header: &FrameHeader, frame: &[u8], received_ns: u64);
    /// Everything up to `last` is durable, `raw_bytes` more than before.
    fn received(&mut self, last: Lsn, raw_bytes: u64);
    /// A frame is here and waits for room.
    fn waiting(&mut self, received_ns: u64);
    /// The journal has another first or last segment.
    fn segments(&mut self, segments: &[SegmentSummary]);
}

/// Where the journal lies, and the clock of receipts.
pub struct Place {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// The journal's directory.
    pub dir: PathBuf,
    /// Bytes left to apply, while it has something to do.
    pub reserve_bytes: u64,
    /// What the group may take.
    pub room: Arc<GroupRoom>,
    /// Counts receipts.
    pub clock: ReceiptClock,
}

/// The thread's own state.
pub struct Runner<D: Durable> {
    writer: Writer,
    core: IngestCore,
    queue: Queue,
    progress: watch::Sender<Progress>,
    told: D,
    place: Place,
    /// Newest record in the journal.
    newest: Lsn,
    /// Bytes that may be appended before the room is looked at again.
    known_room_bytes: u64,
    unsynced: Unsynced,
    /// First and last segment told of.
    segments: Option<(u64, u64)>,
}

#[derive(Default)]
struct Unsynced {
    bytes: u64,
    raw_bytes: u64,
    since: Option<Instant>,
    frames: Vec<(FrameHeader, Bytes, u64)>,
}

impl<D: Durable> Runner<D> {
    /// The runner and the way into it. What `writer` kept at recovery is durable already: its `open` synced
    /// it.
    pub fn new(
        core: IngestCore,
        writer: Writer,
        progress: watch::Sender<Progress>,
        told: D,
        place: Place,
    ) -> (Ingest, Runner<D>) {
        let (ingest, queue) = queue::new();
        let filled = writer.segments().iter().rfind(|segment| segment.frames > 0);
        let newest = filled.map_or(Lsn::ZERO, |segment| segment.last_lsn);
        let runner = Runner {
            writer,
            core,
            queue,
            progress,
            told,
            place,
            newest,
            known_room_bytes: 0,
            unsynced: Unsynced::default(),
            segments: None,
        };
        (ingest, runner)
    }

    /// Runs until [`Ingest::stop`].
    ///
    /// # Errors
    /// Final ones: a sync failed, or the disk refuses writes for another reason than being full.
    pub fn run(mut self) -> Result<()> {
        self.tell_segments();
        while let Some(item) = self.next_item()? {
            match item {
                Item::Frame { session, header, frame, _room } => self.take(&session, &header, frame)?,
                Item::Settle(answer) => {
                    self.sync()?;
                    // Whoever asked may have gone meanwhile.
                    let _ = answer.send(self.writer.durable());
                }
                Item::Work(work) => {
                    work(&mut self.writer).map_err(|e| Error::from(e).during("mend the journal"))?
                }
                Item::Nudge => {}
            }
            let due = self.unsynced.since.is_some_and(|since| machine::since(since) >= SYNC_DELAY);
            if due || self.unsynced.bytes >= SYNC_BYTES {
                self.sync()?;
            }
            self.drop_segments()?;
            if self.queue.is_stopping() {
                break;
            }
        }
        self.sync()
    }

    /// The next item; when there is none, what was appended is synced before the thread sleeps.
    fn next_item(&mut self) -> Result<Option<Item>> {
        match self.queue.try_next() {
            Some(item) => Ok(Some(item)),
            None => {
                self.sync()?;
                Ok(self.queue.next())
            }
        }
    }

    fn take(&mut self, session: &Session, header: &FrameHeader, frame: Bytes) -> Result<()> {
        if session.is_closed() {
            return Ok(());
        }
        let step = match self.core.judge(header, &frame) {
            Ok(step) => step,
            Err(refusal) => {
                session.refuse(refusal);
                return Ok(());
            }
        };
        let Some(received_ns) = self.append_when_room(session, step, header, &frame)? else {
            return Ok(());
        };
        self.core.taken(header);
        self.newest = header.last_lsn;
        let unsynced = &mut self.unsynced;
        unsynced.bytes += frame.len() as u64;
        unsynced.raw_bytes += u64::from(header.raw_bytes);
        unsynced.since.get_or_insert_with(machine::now);
        let events = if header.flags & FLAG_EVENTS != 0 { frame } else { Bytes::new() };
        unsynced.frames.push((*header, events, received_ns));
        Ok(())
    }

    /// Appends, waiting for room as long as the session lives; the time of receipt, `None` when the session
    /// ended first.
    fn append_when_room(
        &mut self,
        session: &Session,
        mut step: Step,
        header: &FrameHeader,
        frame: &[u8],
    ) -> Result<Option<u64>> {
        loop {
            let received_ns = self.place.clock.receipt_ns(Times::now());
            let full = match self.queue.held_back().or_else(|| self.reserve_needed(frame.len() as u64)) {
                Some(why) => why,
                None => match self.append(&mut step, header, frame, received_ns) {
                    Ok(()) => {
                        self.publish_full(None);
                        return Ok(Some(received_ns));
                    }
                    Err(error) if error.kind == journal::ErrorKind::NoSpace => {
                        format!("no room for the journal: {error}")
                    }
                    Err(error) if error.kind == journal::ErrorKind::OutOfOrder => {
                        // The journal is as it was: what does not fit it concerns this session only.
                        session.refuse(Refusal::new(ErrorCode::OutOfOrder, error.to_string()));
                        return Ok(None);
                    }
                    Err(error) => return Err(Error::from(error).during("append to the journal")),
                },
            };
            // What is appended already is acknowledged before we wait: the source may drop it.
            self.sync()?;
            self.publish_full(Some(full));
            // ⚠ It has been received, so history ages by it. Were it not to, what must go first could never
            // go.
            self.told.waiting(received_ns);
            if session.is_closed() || self.queue.is_stopping() {
                return Ok(None);
            }
            machine::sleep(FULL_RETRY);
            self.drop_segments()?;
        }
    }

    fn append(
        &mut self,
        step: &mut Step,
        header: &FrameHeader,
        frame: &[u8],
        received_ns: u64,
    ) -> journal::Result<()> {
        if let Step::Begins(start) = *step {
            self.writer.begin_epoch(start, received_ns)?;
            // From here on the journal is in the new epoch, also if the disk is full now and this session
            // ends.
            self.core.begun(start);
            *step = Step::Follows;
        }
        self.writer.append(frame, header, received_ns)
    }

    /// Why a frame must wait although it would fit: the room that is left is needed to apply what waits
    /// already.
    fn reserve_needed(&mut self, frame_bytes: u64) -> Option<String> {
        let group = &self.place.room;
        if let Some(why) = group.stalled() {
            return Some(why);
        }
        if let Some(left) = self.known_room_bytes.checked_sub(frame_bytes) {
            self.known_room_bytes = left;
            return None;
        }
        group.journal_takes(self.writer.journal_bytes());
        if group.is_limited()
            && let Some(why) = group.refusal(frame_bytes.max(LOOK_BYTES))
        {
            return Some(why);
        }
        let known_bytes = if group.is_limited() { LOOK_BYTES } else { ROOM_BYTES };
        // Where the room cannot be known the disk itself will say that it is full.
        let room = self.place.disk.room(&self.place.dir).ok().flatten()?;
        let reserve_bytes = self.place.reserve_bytes.min(room.total_bytes / RESERVE_PART);
        if room.free_bytes >= reserve_bytes {
            self.known_room_bytes = known_bytes.min(room.free_bytes - reserve_bytes);
            return None;
        }
        (self.newest > self.progress.borrow().checkpoint).then(|| {
            format!(
                "no room for the journal: the {} bytes that are free are left to applying what was received, \
                 which takes up to {reserve_bytes}",
                room.free_bytes
            )
        })
    }

    /// Makes what is appended durable, then says so.
    fn sync(&mut self) -> Result<()> {
        if self.unsynced.since.is_none() {
            return Ok(());
        }
        let durable = self.writer.sync().map_err(|e| Error::from(e).during("sync the journal"))?;
        let done = std::mem::take(&mut self.unsynced);
        // History first: whoever sees the new position also finds its bookmarks.
        for (header, frame, received_ns) in &done.frames {
            self.told.frame(header, frame, *received_ns);
        }
        let newest_ns = done.frames.last().map(|(header, ..)| header.last_time_ns);
        self.progress.send_modify(|progress| {
            progress.durable = durable;
            progress.durable_time_ns = newest_ns.unwrap_or(progress.durable_time_ns);
        });
        self.told.received(durable.lsn, done.raw_bytes);
        self.tell_segments();
        Ok(())
    }

    fn publish_full(&self, full: Option<String>) {
        self.progress.send_if_modified(|progress| {
            let changed = progress.full != full;
            match (&progress.full, &full) {
                (None, Some(why)) => tracing::warn!(why, "stopped acknowledging"),
                (Some(_), None) => tracing::info!("acknowledging again"),
                _ => {}
            }
            progress.full = full;
            changed
        });
    }

    /// Drops the segments that nobody needs any more.
    fn drop_segments(&mut self) -> Result<()> {
        let before = self.queue.take_drop_before();
        if before == 0 {
            return Ok(());
        }
        match self.writer.drop_before(before) {
            Ok(_) => {
                self.tell_segments();
                Ok(())
            }
            Err(error) if error.kind == journal::ErrorKind::Sync => Err(Error::from(error)),
            Err(error) => {
                // Tried again with the next round of retention.
                tracing::warn!(%error, "cannot drop old journal segments");
                Ok(())
            }
        }
    }

    /// Tells of the segments when there is another first or last one.
    fn tell_segments(&mut self) {
        let segments = self.writer.segments();
        let ends = segments.first().zip(segments.last()).map(|(first, last)| (first.number, last.number));
        if ends != self.segments {
            self.segments = ends;
            self.told.segments(segments);
            let journal_bytes = self.writer.journal_bytes();
            self.progress.send_modify(|progress| progress.journal_bytes = journal_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::queue::QUEUE_BYTES;
    use super::super::tests::{GROUP, LINEAGE, frame, opening, stamp};
    use super::*;
    use crate::error::ErrorKind;
    use crate::room::Rooms;
    use journal::record::Op;
    use journal::sim_disk::SimDisk;
    use journal::writer::WriterOptions;
    use journal::{Epoch, Position};
    use std::path::Path;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread::JoinHandle;
    use tokio::time::timeout;

    /// Only a broken test waits this long.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<Vec<(Lsn, bool)>>>, Arc<AtomicU64>);

    impl Durable for Told {
        fn frame(&mut self, header: &FrameHeader, frame: &[u8], _received_ns: u64) {
            self.0.lock().unwrap().push((header.last_lsn, !frame.is_empty()));
        }
        fn received(&mut self, _last: Lsn, _raw_bytes: u64) {}
        fn waiting(&mut self, received_ns: u64) {
            self.1.store(received_ns, Ordering::Relaxed);
        }
        fn segments(&mut self, _segments: &[SegmentSummary]) {}
    }

    struct Bench {
        disk: SimDisk,
        ingest: Ingest,
        progress: watch::Receiver<Progress>,
        applied: watch::Sender<Progress>,
        told: Told,
        thread: JoinHandle<Result<()>>,
        room: Arc<GroupRoom>,
        chain: u64,
        lsn: u64,
    }

    impl Bench {
        fn new() -> Bench {
            Bench::of(SimDisk::new(), "g", Rooms::new(1), None)
        }

        /// A group of several, on a disk that they share.
        fn of(disk: SimDisk, name: &str, rooms: Arc<Rooms>, max_bytes: Option<u64>) -> Bench {
            let options = WriterOptions { group: GROUP, segment_bytes: 1 << 20 };
            let start = Position::epoch_start(LINEAGE, Epoch::default(), Lsn::ZERO);
            let dir = &Path::new("/").join(name).join("journal");
            let writer = Writer::create(Arc::new(disk.clone()), dir, options, start, 1).unwrap();
            let progress = watch::Sender::new(Progress::at(&writer, Lsn::ZERO));
            let core = IngestCore::new(GROUP, start).unwrap();
            let told = Told::default();
            let receiver = progress.subscribe();
            let room = GroupRoom::new(rooms, Arc::new(disk.clone()), dir.into(), name, max_bytes, 1 << 20);
            let place = Place {
                disk: Arc::new(disk.clone()),
                dir: dir.to_path_buf(),
                reserve_bytes: 1 << 20,
                room: room.clone(),
                clock: ReceiptClock::after(0),
            };
            let applied = progress.clone();
            let (ingest, runner) = Runner::new(core, writer, progress, told.clone(), place);
            let thread = std::thread::spawn(move || runner.run());
            Bench { disk, ingest, progress: receiver, applied, told, thread, room, chain: 0, lsn: 9 }
        }

        /// The next frame of a stream that begins with an opening.
        fn next(&mut self) -> (FrameHeader, Bytes) {
            let (header, bytes) = match self.chain {
                0 => opening(2, self.lsn + 1),
                chain => frame(&stamp(2), chain, self.lsn + 1, &[Op::Write, Op::Flush]),
            };
            (self.chain, self.lsn) = (header.chain_out, header.last_lsn.0);
            (header, Bytes::from(bytes))
        }

        async fn submit(&self, session: &Arc<Session>, (header, bytes): (FrameHeader, Bytes)) {
            timeout(PATIENCE, self.ingest.submit(session, header, bytes)).await.unwrap().unwrap();
        }

        async fn until(&mut self, what: impl FnMut(&Progress) -> bool) -> Progress {
            timeout(PATIENCE, self.progress.wait_for(what)).await.unwrap().unwrap().clone()
        }

        fn end(self) -> Result<()> {
            self.ingest.stop();
            self.thread.join().unwrap()
        }
    }

    #[tokio::test]
    async fn frames_become_durable_and_history_hears_of_them_in_order() {
        let mut bench = Bench::new();
        let session = Session::new();
        for _ in 0..50 {
            let next = bench.next();
            bench.submit(&session, next).await;
        }
        let settled = bench.ingest.settle().await.unwrap();
        assert_eq!((settled.lsn, settled.chain), (Lsn(bench.lsn), bench.chain));
        assert_eq!(bench.until(|_| true).await.durable, settled);
        let told = bench.told.0.lock().unwrap().clone();
        assert_eq!(told.len(), 50);
        assert!(told.is_sorted(), "in lsn order");
        assert!(told[0].1 && told[1..].iter().all(|(_, events)| !events), "only the opening has events");
        bench.end().unwrap();
    }

    #[tokio::test]
    async fn a_refused_frame_ends_its_session_and_no_other() {
        let mut bench = Bench::new();
        let session = Session::new();
        let first = bench.next();
        bench.submit(&session, first.clone()).await;
        bench.submit(&session, first).await;
        assert_eq!(timeout(PATIENCE, session.refused()).await.unwrap().code, ErrorCode::OutOfOrder);
        let next = bench.next();
        bench.submit(&session, next.clone()).await;
        assert_eq!(bench.ingest.settle().await.unwrap().lsn, Lsn(11), "the refused session is over");
        bench.submit(&Session::new(), next).await;
        assert_eq!(bench.ingest.settle().await.unwrap().lsn, Lsn(bench.lsn));
        bench.end().unwrap();
    }

    #[tokio::test]
    async fn a_full_disk_stops_acknowledging_says_so_and_goes_on_with_room() {
        let mut bench = Bench::new();
        let session = Session::new();
        let opening = bench.next();
        bench.submit(&session, opening).await;
        let before = bench.ingest.settle().await.unwrap();
        bench.disk.set_capacity(Some(0));
        // Segments are reserved in full: the disk is felt when the next one is due.
        let many = 2 * (1 << 20) / 1024;
        for _ in 0..many {
            let next = bench.next();
            bench.submit(&session, next).await;
        }
        let stuck = bench.until(|progress| progress.full.is_some()).await;
        assert!(stuck.durable.lsn > before.lsn && stuck.durable.lsn.0 < bench.lsn);
        assert!(stuck.full.unwrap().contains("no room"));
        bench.disk.set_capacity(None);
        let last = bench.lsn;
        let done = bench.until(|progress| progress.durable.lsn.0 == last).await;
        assert_eq!((done.full, done.durable.chain), (None, bench.chain));
        bench.end().unwrap();
    }

    #[tokio::test]
    async fn a_group_that_floods_the_disk_stops_and_another_goes_on_being_acknowledged() {
        let (disk, rooms) = (SimDisk::new(), Rooms::new(2));
        let mut flood = Bench::of(disk.clone(), "flood", rooms.clone(), None);
        let mut quiet = Bench::of(disk.clone(), "quiet", rooms, None);
        let (one, other) = (Session::new(), Session::new());
        for bench in [&mut flood, &mut quiet] {
            let opening = bench.next();
            bench.submit(&one, opening).await;
            bench.ingest.settle().await.unwrap();
        }
        disk.set_capacity(Some(64 << 20));
        let flooding = tokio::spawn(async move {
            // Until it is held up for good, its queue takes some more.
            for _ in 0..200_000 {
                let (header, bytes) = flood.next();
                // Everything is applied at once, and takes no other room.
                flood.applied.send_modify(|progress| progress.checkpoint = progress.durable.lsn);
                let sent =
                    timeout(Duration::from_millis(400), flood.ingest.submit(&one, header, bytes)).await;
                if sent.is_err() {
                    break;
                }
            }
            let stuck = flood.until(|progress| progress.full.is_some()).await;
            (flood, stuck)
        });
        let (flood, stuck) = flooding.await.unwrap();
        assert!(stuck.full.unwrap().contains("each of its 2 groups"));
        let free = (64 << 20) - disk.used_bytes();
        assert!(free >= 7 << 20, "{free} bytes are left to the other");
        // A journal segment of its own and more: all of it is acknowledged.
        for _ in 0..2 * (1 << 20) / 1024 {
            let next = quiet.next();
            quiet.submit(&other, next).await;
        }
        let settled = quiet.ingest.settle().await.unwrap();
        assert_eq!((settled.lsn, quiet.progress.borrow().full.clone()), (Lsn(quiet.lsn), None));
        quiet.end().unwrap();
        flood.end().unwrap();
    }

    #[tokio::test]
    async fn what_is_beyond_max_bytes_is_not_acknowledged() {
        let mut bench = Bench::of(SimDisk::new(), "g", Rooms::new(1), Some(64 << 20));
        let session = Session::new();
        let opening = bench.next();
        bench.submit(&session, opening).await;
        let before = bench.ingest.settle().await.unwrap();
        bench.room.measured(64 << 20, 0);
        for _ in 0..2 * LOOK_BYTES / 1024 {
            let next = bench.next();
            bench.submit(&session, next).await;
        }
        let stuck = bench.until(|progress| progress.full.is_some()).await;
        assert!(stuck.full.unwrap().contains("max_bytes"));
        assert!(stuck.durable.lsn >= before.lsn && stuck.durable.lsn.0 < bench.lsn);
        // History was shortened, or a hold released.
        bench.room.measured(1 << 20, 0);
        let last = bench.lsn;
        bench.until(|progress| progress.durable.lsn.0 == last && progress.full.is_none()).await;
        // What cannot be applied is not taken.
        bench.room.set_stalled(Some("no room to apply".into()));
        let next = bench.next();
        bench.submit(&session, next).await;
        bench.until(|progress| progress.full.as_deref() == Some("no room to apply")).await;
        bench.room.set_stalled(None);
        let last = bench.lsn;
        bench.until(|progress| progress.durable.lsn.0 == last).await;
        bench.end().unwrap();
    }

    #[tokio::test]
    async fn a_reserve_is_left_to_apply_while_it_has_something_to_do() {
        let mut bench = Bench::new();
        let session = Session::new();
        let opening = bench.next();
        bench.submit(&session, opening).await;
        bench.ingest.settle().await.unwrap();
        // 16 MiB in all, so the reserve is 1 MiB; half of that is free.
        let used = bench.disk.used_bytes();
        let rest = usize::try_from((16 << 20) - used - (1 << 19)).unwrap();
        bench.disk.put(Path::new("/other/file"), vec![0; rest]);
        bench.disk.set_capacity(Some(16 << 20));
        for _ in 0..16 {
            let next = bench.next();
            bench.submit(&session, next).await;
        }
        let stuck = bench.until(|progress| progress.full.is_some()).await;
        assert!(stuck.full.as_ref().unwrap().contains("left to applying"), "{stuck:?}");
        // Once all is applied a frame is taken: nothing stands still for want of the reserve alone.
        let (durable, last) = (stuck.durable.lsn, bench.lsn);
        bench.applied.send_modify(|progress| progress.checkpoint = durable);
        bench.until(|progress| progress.durable.lsn > durable).await;
        bench.disk.set_capacity(None);
        bench.until(|progress| progress.durable.lsn.0 == last).await;
        assert!(bench.told.1.load(Ordering::Relaxed) > 0, "history heard of the frame that waited");
        bench.end().unwrap();
    }

    #[tokio::test]
    async fn a_failed_sync_is_final_and_publishes_nothing() {
        let mut bench = Bench::new();
        let session = Session::new();
        let opening = bench.next();
        bench.submit(&session, opening).await;
        let durable = bench.ingest.settle().await.unwrap();
        bench.disk.fail_syncs(true);
        let next = bench.next();
        bench.submit(&session, next).await;
        assert!(bench.ingest.settle().await.is_err(), "the thread is gone");
        assert_eq!(bench.progress.borrow().durable, durable);
        assert_eq!(bench.end().unwrap_err().kind, ErrorKind::Sync);
    }

    #[tokio::test]
    async fn the_queue_is_bounded_in_bytes_while_ingest_is_held_back() {
        let mut bench = Bench::new();
        bench.ingest.hold_back(Some("history fills its quota".into()));
        let session = Session::new();
        let opening = bench.next();
        bench.submit(&session, opening).await;
        bench.until(|progress| progress.full.as_deref() == Some("history fills its quota")).await;
        let next = bench.next();
        let fit = QUEUE_BYTES / next.1.len();
        for _ in 0..fit {
            if bench.ingest.room_bytes() < next.1.len() {
                break;
            }
            bench.submit(&session, next.clone()).await;
        }
        assert!(bench.ingest.room_bytes() < next.1.len());
        let ingest = bench.ingest.clone();
        let mut waits = std::pin::pin!(ingest.submit(&session, next.0, next.1.clone()));
        tokio::select! {
            biased;
            _ = &mut waits => panic!("the queue took more than its bytes"),
            () = std::future::ready(()) => {}
        }
        // A session that ends makes room: what it had queued is dropped, the way is free for the next.
        session.close();
        timeout(PATIENCE, waits).await.unwrap().unwrap();
        bench.ingest.hold_back(None);
        assert_eq!(bench.ingest.settle().await.unwrap().lsn, Lsn::ZERO);
        bench.end().unwrap();
    }
}
