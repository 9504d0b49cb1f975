//! Asks the receiver for hashes of its replica, so that a synchronisation sends only what differs
//! ([`wire::compare`]).
//!
//! ```text
//!  af-serve (engine): post ──► queue ──► link task: one question after the other ──► receiver
//!                     wait ◄── answer ◄──────────────────────────────────────────────
//! ```
//! The engine is a thread and the link a task; a link that breaks drops its question, which is then asked
//! again.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use journal::{Lsn, Position};
use quinn::Connection;
use tokio::sync::{Mutex, mpsc};
use wire::message::Message;

/// Questions on their way at once: the next is there when one is answered.
pub const POSTED: usize = 2;
/// One look at whether to go on to the next.
const LOOK: Duration = Duration::from_millis(50);

/// No receiver was connected yet.
const UNKNOWN: u8 = 0;
const NO: u8 = 1;
const YES: u8 = 2;

/// What the receiver said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Hashes, 16 bytes a chunk, and over which connection they came.
    Hashes(Vec<u8>, u64),
    /// It cannot tell, and why.
    No(String),
}

struct Asked {
    question: Message,
    answer: SyncSender<Answer>,
}

/// Where engine and link meet.
pub struct Questions {
    post: mpsc::Sender<Asked>,
    posted: Mutex<mpsc::Receiver<Asked>>,
    offered: AtomicU8,
    is_seeded: AtomicBool,
    /// The epoch in which a receiver turned up that holds something of an earlier one; 0 where none did.
    held_before: AtomicU64,
    connections: AtomicU64,
}

/// A question that was posted.
pub struct Pending {
    question: Message,
    answer: Receiver<Answer>,
}

impl Default for Questions {
    fn default() -> Questions {
        let (post, posted) = mpsc::channel(POSTED);
        Questions {
            post,
            posted: Mutex::new(posted),
            offered: AtomicU8::new(UNKNOWN),
            is_seeded: AtomicBool::new(false),
            held_before: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        }
    }
}

impl Questions {
    /// A receiver is connected, and what it offers. Before it is decided where its frames begin: whoever sees
    /// the old number afterwards decided about the same receiver.
    pub fn offer(&self, features: u64, resume: Option<&Position>, epoch: u64) {
        self.connections.fetch_add(1, Ordering::SeqCst);
        if resume.is_some_and(|resume| resume.lsn > Lsn::ZERO && resume.epoch.number < epoch) {
            self.held_before.store(epoch, Ordering::Release);
        }
        self.is_seeded.store(features & wire::compare::SEEDED != 0, Ordering::Release);
        let offered = if features & wire::compare::FEATURE != 0 { YES } else { NO };
        self.offered.store(offered, Ordering::Release);
    }

    /// Whether the receiver that was connected last answers questions; `None` when none was connected in this
    /// run.
    pub fn is_offered(&self) -> Option<bool> {
        match self.offered.load(Ordering::Acquire) {
            UNKNOWN => None,
            offered => Some(offered == YES),
        }
    }

    /// Whether that receiver's replicas hold something before the first synchronisation.
    pub fn is_seeded(&self) -> bool {
        self.is_seeded.load(Ordering::Acquire)
    }

    /// Whether a receiver turned up in this epoch that holds something of an earlier one: of a
    /// synchronisation that was broken off.
    pub fn holds_earlier(&self, epoch: u64) -> bool {
        epoch > 0 && self.held_before.load(Ordering::Acquire) == epoch
    }

    /// Number of the newest connection.
    pub fn connection(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    /// Posts a question. Blocks while too many are under way; `look` says whether to go on.
    ///
    /// # Errors
    /// What `look` says.
    pub fn post<E>(&self, question: Message, mut look: impl FnMut() -> Result<(), E>) -> Result<Pending, E> {
        let (answer, pending) = sync_channel(1);
        let mut asked = Asked { question: question.clone(), answer };
        loop {
            look()?;
            match self.post.try_send(asked) {
                Ok(()) => return Ok(Pending { question, answer: pending }),
                Err(mpsc::error::TrySendError::Full(back) | mpsc::error::TrySendError::Closed(back)) => {
                    asked = back;
                    machine::sleep(LOOK);
                }
            }
        }
    }

    /// Waits for an answer, asking again when the link broke.
    ///
    /// # Errors
    /// What `look` says.
    pub fn wait<E>(
        &self,
        mut pending: Pending,
        mut look: impl FnMut() -> Result<(), E>,
    ) -> Result<Answer, E> {
        loop {
            match answered(&pending.answer) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Timeout) => look()?,
                Err(RecvTimeoutError::Disconnected) => pending = self.post(pending.question, &mut look)?,
            }
        }
    }

    /// Carries questions over a connection until it fails.
    pub async fn carry(&self, connection: &Connection) -> wire::Error {
        let mut posted = self.posted.lock().await;
        let number = self.connection();
        if self.is_offered() != Some(true) {
            return std::future::pending().await;
        }
        let (mut sender, mut receiver) = match wire::framing::open(connection).await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        while let Some(Asked { question, answer }) = posted.recv().await {
            if let Err(error) = sender.send(&question).await {
                return error;
            }
            let said = match receiver.next().await {
                Ok(Some(Message::Hashes { hashes, .. })) => Answer::Hashes(hashes, number),
                Ok(Some(Message::Error { reason, .. })) => Answer::No(reason),
                Ok(_) => {
                    let at = "the receiver answered a question with something else";
                    return wire::Error::new(wire::ErrorKind::Malformed, at);
                }
                Err(error) => return error,
            };
            // The engine may have gone on without it.
            let _ = answer.try_send(said);
        }
        // The sending side lives as long as we do.
        std::future::pending().await
    }
}
/// The answer, waiting a moment for it.
fn answered(answer: &Receiver<Answer>) -> Result<Answer, RecvTimeoutError> {
    let attempt = || match answer.try_recv() {
        Ok(answer) => Some(Ok(answer)),
        Err(TryRecvError::Empty) => None,
        Err(TryRecvError::Disconnected) => Some(Err(RecvTimeoutError::Disconnected)),
    };
    let real = || Some(answer.recv_timeout(LOOK));
    machine::block_for(LOOK, attempt, real).unwrap_or(Err(RecvTimeoutError::Timeout))
}
