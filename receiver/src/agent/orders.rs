//! Orders of the operator to the apply thread: rewind, resume, hold.
//!
//! The applier has one owner, so whoever wants something of it leaves an order and waits for its answer. An
//! order that is begun goes on when nobody waits any more.

use std::collections::VecDeque;
use std::sync::PoisonError;

use machine::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::bell::Bell;
use crate::apply::{HoldReport, OverwriteReport, ResumeReport, RewindReport};
use crate::error::{Error, ErrorKind, Result};
use crate::point::At;

/// Orders that wait; people give them one at a time.
const MAX_WAITING: usize = 16;

/// What is asked for, and where the answer goes.
pub enum Order {
    /// Bring the replica to a point, and stay there.
    Rewind(At, Answer<RewindReport>),
    /// Roll forward again.
    Resume(Answer<ResumeReport>),
    /// Overwrite replicas that others changed, by a new epoch.
    Overwrite(Answer<OverwriteReport>),
    /// Look whether the replicas are what was left.
    Check(Answer<()>),
    /// What could not be read can be, or is known to be lost: try again. Nobody waits for it.
    LookAgain,
    /// Keep a bookmark from retention, or let it go.
    Hold(String, bool, Answer<HoldReport>),
}

/// Where an answer goes; whoever asked may be gone.
pub type Answer<T> = oneshot::Sender<Result<T>>;

/// See the module.
#[derive(Default)]
pub struct Orders {
    waiting: Mutex<VecDeque<Order>>,
}

impl Orders {
    /// Leaves an order and waits until it is carried out, or cannot be.
    ///
    /// # Errors
    /// What the order came to; [`ErrorKind::Busy`] where too many wait.
    pub async fn give<T>(&self, bell: &Bell, order: impl FnOnce(Answer<T>) -> Order) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        {
            let mut waiting = self.lock();
            if waiting.len() >= MAX_WAITING {
                return Err(Error::new(
                    ErrorKind::Busy,
                    "too many orders wait for this group's replica already",
                ));
            }
            waiting.push_back(order(answer));
        }
        bell.order();
        let gone = |_| {
            Error::new(ErrorKind::Busy, "the receiver is stopping; what was begun goes on at its next start")
        };
        answered.await.map_err(gone)?
    }

    /// Leaves an order that nobody waits for. Where too many wait the thread looks by itself, a little later.
    pub fn leave(&self, bell: &Bell, order: Order) {
        let mut waiting = self.lock();
        if waiting.len() < MAX_WAITING {
            waiting.push_back(order);
        }
        drop(waiting);
        bell.order();
    }

    /// The next one.
    pub fn next(&self) -> Option<Order> {
        self.lock().pop_front()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Order>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
