//! One live connection per group: the newer wins, and only after the older has ended.
//!
//! Two writers would each be in order and together not. So a newer connection closes the older one's session, waits
//! until its task has ended, and lets ingest finish what it has; only then is the resume position read.

use std::sync::Arc;

use journal::Position;
use tokio::sync::{Notify, oneshot};

use crate::ingest::queue::{Gone, Ingest, Session};

/// The place of a group's one connection.
#[derive(Debug, Default)]
pub struct Berth {
    /// Held while one connection makes way for the next.
    turn: tokio::sync::Mutex<Option<Docked>>,
    /// Who is connected, for the status.
    peer: Arc<machine::Mutex<Option<String>>>,
}

#[derive(Debug)]
struct Docked {
    session: Arc<Session>,
    replaced: Arc<Notify>,
    ended: oneshot::Receiver<()>,
}

/// A connection's right to speak for its group; ends when dropped.
#[derive(Debug)]
pub struct Attached {
    /// Under which frames are handed to ingest.
    pub session: Arc<Session>,
    /// Everything that the group durably holds; `None` while it holds nothing.
    pub resume: Option<Position>,
    replaced: Arc<Notify>,
    peer: Arc<machine::Mutex<Option<String>>>,
    _ended: oneshot::Sender<()>,
}

impl Berth {
    /// Takes the place of whoever is connected.
    ///
    /// # Errors
    /// The ingest thread is gone.
    pub async fn attach(&self, ingest: &Ingest, peer: String) -> Result<Attached, Gone> {
        let mut docked = self.turn.lock().await;
        if let Some(old) = docked.take() {
            // 1. Nothing of the old connection is taken any more. 2. It learns why it ends. 3. Its task is gone.
            old.session.close();
            old.replaced.notify_one();
            let _ = old.ended.await;
        }
        // 4. What it handed in before is durable or dropped.
        let position = ingest.settle().await?;
        let (session, replaced) = (Session::new(), Arc::new(Notify::new()));
        let (ends, ended) = oneshot::channel();
        *docked = Some(Docked { session: session.clone(), replaced: replaced.clone(), ended });
        *lock(&self.peer) = Some(peer);
        let resume = (position.epoch.number > 0).then_some(position);
        Ok(Attached { session, resume, replaced, peer: self.peer.clone(), _ended: ends })
    }

    /// Who is connected.
    pub fn peer(&self) -> Option<String> {
        lock(&self.peer).clone()
    }
}

impl Attached {
    /// Resolves when a newer connection takes the place.
    pub async fn replaced(&self) {
        self.replaced.notified().await;
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Before `_ended` says so: the next one writes its own name only after that.
        *lock(&self.peer) = None;
    }
}

fn lock<T>(mutex: &machine::Mutex<T>) -> machine::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
