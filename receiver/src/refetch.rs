//! Where the scrub thread, which finds rotten frames, meets the link, which can ask the source for them.
//!
//! ```text
//! scrub thread: fetch ──► [one question] ──► session: asks the source, pauses ──► answer
//! ```
//! One question at a time. Nobody waits for a source that is not there: the caller asks again when one
//! connects.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use journal::Position;
use quinn::Connection;
use tokio::sync::{Mutex, mpsc};
use wire::refetch::{ASK_PAUSE, Answer, FEATURE, ask};

/// Longer than a frame takes on the thinnest line that a group can be served over.
const PATIENCE: Duration = Duration::from_secs(120);

/// No source is connected.
const AWAY: u8 = 0;
/// One is, of a program that does not send frames again.
const UNABLE: u8 = 1;
const ABLE: u8 = 2;

struct Asked {
    after: Position,
    last_lsn: u64,
    bytes: usize,
    answer: SyncSender<Answer>,
}

/// See the module.
pub(crate) struct Fetcher {
    post: mpsc::Sender<Asked>,
    posted: Mutex<mpsc::Receiver<Asked>>,
    peer: AtomicU8,
}

impl Default for Fetcher {
    fn default() -> Fetcher {
        let (post, posted) = mpsc::channel(1);
        Fetcher { post, posted: Mutex::new(posted), peer: AtomicU8::new(AWAY) }
    }
}

/// While it lives a source is connected.
struct Connected<'a>(&'a Fetcher);

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.peer.store(AWAY, Ordering::Release);
    }
}

impl Fetcher {
    /// The frame behind `after` that ends at `last_lsn`, from the source that is connected. Blocks; not for
    /// the runtime.
    pub fn fetch(&self, after: Position, last_lsn: u64, bytes: usize) -> Answer {
        let away = || Answer::Later("no source is connected".to_owned());
        match self.peer.load(Ordering::Acquire) {
            ABLE => {}
            UNABLE => {
                return Answer::Gone("the source's program cannot send frames again: upgrade it".to_owned());
            }
            _ => return away(),
        }
        let (answer, answered) = sync_channel(1);
        if self.post.try_send(Asked { after, last_lsn, bytes, answer }).is_err() {
            return away();
        }
        let attempt = || match answered.try_recv() {
            Ok(answer) => Some(answer),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(away()),
        };
        machine::block_for(PATIENCE, attempt, || answered.recv_timeout(PATIENCE).ok()).unwrap_or_else(away)
    }

    /// Carries questions over a connection until it fails; `connected` is called when there may be some.
    pub async fn carry(
        &self,
        connection: &Connection,
        features: u64,
        connected: impl FnOnce(),
    ) -> wire::Error {
        let mut posted = self.posted.lock().await;
        // What was asked of a connection that is gone is asked again.
        while posted.try_recv().is_ok() {}
        self.peer.store(if features & FEATURE != 0 { ABLE } else { UNABLE }, Ordering::Release);
        let _connected = Connected(self);
        connected();
        let mut stream = None;
        while let Some(Asked { after, last_lsn, bytes, answer }) = posted.recv().await {
            let (sender, receiver) = match &mut stream {
                Some((sender, receiver)) => (sender, receiver),
                // Only now: a source that is not asked need not know how to answer.
                none => match wire::framing::open(connection).await {
                    Ok((sender, receiver)) => {
                        let (sender, receiver) = none.insert((sender, receiver));
                        (sender, receiver)
                    }
                    Err(error) => return error,
                },
            };
            let said = match ask(sender, receiver, after.into(), last_lsn, bytes).await {
                Ok(said) => said,
                Err(error) => return error,
            };
            // Whoever asked may have stopped.
            let _ = answer.try_send(said);
            tokio::time::sleep(ASK_PAUSE).await;
        }
        std::future::pending().await
    }
}
