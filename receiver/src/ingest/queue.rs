//! The queue between a group's connection and its ingest thread, bounded in bytes.
//!
//! A full queue makes [`Ingest::submit`] wait, which stops reading from the connection, which closes QUIC's
//! window: a slow disk is the source's to see, never memory here. Small orders (settle, let go of segments,
//! hold back, stop) reach the thread beside the frames.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use journal::Position;
use journal::frame::{FrameHeader, MAX_FRAME_BYTES};
use journal::writer::Writer;
use machine::{Mutex, MutexGuard};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::Refusal;

/// Frame bytes between the connection and the journal.
pub(super) const QUEUE_BYTES: usize = 8 << 20;
/// Items in the queue: as many as frames of one sector each would be.
const QUEUE_ITEMS: usize = QUEUE_BYTES / journal::SECTOR_BYTES;

const _: () = assert!(MAX_FRAME_BYTES <= QUEUE_BYTES, "a frame always fits into the empty queue");

/// An empty queue: the way in, and the thread's end of it.
pub(super) fn new() -> (Ingest, Queue) {
    let (sender, items) = mpsc::channel(QUEUE_ITEMS);
    let ingest = Ingest {
        items: sender,
        room: Arc::new(Semaphore::new(QUEUE_BYTES)),
        drop_before: Arc::default(),
        held_back: Arc::default(),
    };
    let Ingest { room, drop_before, held_back, .. } = ingest.clone();
    (ingest, Queue { items, room, drop_before, held_back })
}

/// One connection's right to hand in frames. Frames that are still queued when it ends are dropped.
#[derive(Debug)]
pub struct Session {
    closed: AtomicBool,
    refused: watch::Sender<Option<Refusal>>,
}

impl Session {
    /// A live session.
    pub fn new() -> Arc<Session> {
        Arc::new(Session { closed: AtomicBool::new(false), refused: watch::Sender::new(None) })
    }

    /// Nothing of this session is taken any more.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Resolves when a frame of this session was refused.
    pub async fn refused(&self) -> Refusal {
        let mut refusals = self.refused.subscribe();
        let found = refusals.wait_for(Option::is_some).await.map(|refusal| refusal.clone());
        match found {
            Ok(Some(refusal)) => refusal,
            _ => unreachable!("the sender outlives the wait"),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn refuse(&self, refusal: Refusal) {
        self.close();
        self.refused.send_replace(Some(refusal));
    }
}

/// See [`Item::Work`].
pub(super) type Work = Box<dyn FnOnce(&mut Writer) -> journal::Result<()> + Send>;

/// What the thread takes from the queue.
pub(super) enum Item {
    /// A frame of a session.
    Frame { session: Arc<Session>, header: FrameHeader, frame: Bytes, _room: OwnedSemaphorePermit },
    /// Answered with the durable position once everything before it is durable.
    Settle(oneshot::Sender<Position>),
    /// Work for the owner of the journal's writer. Only a final error is returned.
    Work(Work),
    /// Something else than a frame changed: look.
    Nudge,
}

/// The way into a group's ingest thread.
#[derive(Clone)]
pub struct Ingest {
    items: mpsc::Sender<Item>,
    room: Arc<Semaphore>,
    drop_before: Arc<AtomicU64>,
    held_back: Arc<Mutex<Option<String>>>,
}

/// The ingest thread is gone: the receiver is stopping.
#[derive(Debug)]
pub struct Gone;

impl Ingest {
    /// Hands in a frame; waits while the queue is full.
    pub async fn submit(
        &self,
        session: &Arc<Session>,
        header: FrameHeader,
        frame: Bytes,
    ) -> std::result::Result<(), Gone> {
        let bytes = u32::try_from(frame.len().clamp(1, QUEUE_BYTES)).expect("clamped to the queue's size");
        let room = self.room.clone().acquire_many_owned(bytes).await.map_err(|_| Gone)?;
        let item = Item::Frame { session: session.clone(), header, frame, _room: room };
        self.items.send(item).await.map_err(|_| Gone)
    }

    /// The durable position after everything handed in so far.
    pub async fn settle(&self) -> std::result::Result<Position, Gone> {
        let (answer, position) = oneshot::channel();
        self.items.send(Item::Settle(answer)).await.map_err(|_| Gone)?;
        position.await.map_err(|_| Gone)
    }

    /// Has the owner of the journal's writer do something, between two frames, and waits for what it came to;
    /// `None` where it is gone. Blocks; not for the runtime.
    pub fn with_writer<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Writer) -> journal::Result<T> + Send + 'static,
    ) -> Option<journal::Result<T>> {
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        let work: Work = Box::new(move |writer| {
            let done = work(writer);
            let is_final = done.as_ref().err().filter(|error| error.kind == journal::ErrorKind::Sync);
            let fatal = is_final.map(|error| journal::Error::new(error.kind, error.at.clone()));
            // Whoever asked may be gone.
            let _ = answer.try_send(done);
            fatal.map_or(Ok(()), Err)
        });
        let mut item = Some(Item::Work(work));
        if machine::is_simulated() {
            let sent = machine::block(
                || match self.items.try_send(item.take()?) {
                    Ok(()) => Some(true),
                    Err(mpsc::error::TrySendError::Full(back)) => {
                        item = Some(back);
                        None
                    }
                    Err(mpsc::error::TrySendError::Closed(_)) => Some(false),
                },
                || false,
            );
            return sent.then(|| machine::block(|| tried(&answered), || None)).flatten();
        }
        self.items.blocking_send(item?).ok()?;
        answered.recv().ok()
    }

    /// Lets go of journal segments below `segment`: history does not need them any more.
    pub fn drop_before(&self, segment: u64) {
        if self.drop_before.fetch_max(segment, Ordering::AcqRel) < segment {
            // A full queue means that the thread is busy and looks by itself after the next sync.
            let _ = self.items.try_send(Item::Nudge);
        }
    }

    /// Lets the thread end: what is appended is made durable, what is still queued is the source's to send
    /// again.
    pub fn stop(&self) {
        self.room.close();
        // A full queue means that the thread is not asleep: it looks after the item that it is at.
        let _ = self.items.try_send(Item::Nudge);
    }

    /// Bytes that would be taken without waiting.
    pub fn room_bytes(&self) -> usize {
        self.room.available_permits()
    }

    /// Takes nothing more while there is a reason (history that must be kept fills its quota), or goes on
    /// without one.
    pub fn hold_back(&self, why: Option<String>) {
        *lock(&self.held_back) = why;
    }
}

/// What came of work: nothing yet, or the answer, or that nobody will answer.
fn tried<T>(answered: &std::sync::mpsc::Receiver<T>) -> Option<Option<T>> {
    match answered.try_recv() {
        Ok(answer) => Some(Some(answer)),
        Err(std::sync::mpsc::TryRecvError::Empty) => None,
        Err(std::sync::mpsc::TryRecvError::Disconnected) => Some(None),
    }
}

/// The thread's end.
pub(super) struct Queue {
    items: mpsc::Receiver<Item>,
    room: Arc<Semaphore>,
    drop_before: Arc<AtomicU64>,
    held_back: Arc<Mutex<Option<String>>>,
}

impl Queue {
    /// The next item, if there is one.
    pub fn try_next(&mut self) -> Option<Item> {
        self.items.try_recv().ok()
    }

    /// The next item, waiting for it; `None` when every [`Ingest`] is gone.
    pub fn next(&mut self) -> Option<Item> {
        let items = &mut self.items;
        if machine::is_simulated() {
            return machine::block(
                || match items.try_recv() {
                    Ok(item) => Some(Some(item)),
                    Err(mpsc::error::TryRecvError::Empty) => None,
                    Err(mpsc::error::TryRecvError::Disconnected) => Some(None),
                },
                || None,
            );
        }
        items.blocking_recv()
    }

    /// Whether the thread should end.
    pub fn is_stopping(&self) -> bool {
        self.room.is_closed()
    }

    /// The segment below which all may go; 0 when nothing new was said.
    pub fn take_drop_before(&self) -> u64 {
        self.drop_before.swap(0, Ordering::AcqRel)
    }

    /// Why nothing more may be taken, if so.
    pub fn held_back(&self) -> Option<String> {
        lock(&self.held_back).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
