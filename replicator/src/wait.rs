//! `afterimage wait`: until everything captured so far is on the replica, or why that cannot happen by
//! itself.

use std::time::Duration;

use journal::Lsn;
use tokio::time::{Instant, timeout_at};

use crate::agent::{Agent, name_of};
use crate::error::Result;
use crate::status::State;

/// States change without a message from the peer; they are looked at this often.
const LOOK: Duration = Duration::from_millis(50);

/// How a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitOutcome {
    /// The replica durably holds everything up to this lsn.
    Done {
        /// What was captured when the wait began.
        lsn: Lsn,
    },
    /// It cannot happen by itself; the text says why and what to do.
    Impossible {
        /// In an operator's words.
        why: String,
    },
    /// It may still happen.
    TimedOut {
        /// How far it came.
        why: String,
    },
}

pub(crate) async fn until_on_replica(agent: &Agent, at_most: Duration) -> Result<WaitOutcome> {
    let deadline = Instant::now() + at_most;
    let mut peer = agent.shared.progress.watch_peer();
    // What a synchronisation captures belongs to "so far": fixed once it is replicating.
    let mut wanted = None;
    loop {
        agent.notice_overflow();
        let (state, why) = agent.shared.board.state();
        // All were detached: nothing comes after what was captured until then.
        let ended = !agent.volumes.iter().any(|volume| volume.is_attached());
        // A gap that is repaired by itself is one that is synchronised soon.
        let synchronising = matches!(state, State::Syncing | State::Resyncing)
            || (state == State::Detached && !ended)
            || (matches!(state, State::Degraded | State::NeedsResync) && agent.repairs_itself());
        let whole = (state == State::Replicating || (ended && agent.shared.ring.loss().is_none()))
            && agent.detached_between().is_none();
        if !whole && !synchronising {
            return Ok(WaitOutcome::Impossible { why: format!("the group is {}: {why}", name_of(state)) });
        }
        if !synchronising && !agent.is_recording() && !agent.repairs_itself() {
            return Ok(WaitOutcome::Impossible {
                why: "writes are not being recorded; `afterimage status` says why".into(),
            });
        }
        let seen = peer.borrow_and_update().clone();
        if seen.stuck {
            return Ok(WaitOutcome::Impossible { why: seen.trouble });
        }
        if !synchronising {
            let lsn = *wanted.get_or_insert_with(|| Lsn(agent.shared.ring.captured_lsn()));
            // Positions of another epoch say nothing about this one, however high they are.
            if seen.epoch == agent.remembered().epoch.number && seen.checkpoint >= lsn {
                return Ok(WaitOutcome::Done { lsn });
            }
            // A full queue holds enough requests of this kind.
            let _ = agent.apply_now.try_send(lsn);
        }
        if Instant::now() >= deadline {
            let link = match &seen.connected {
                Some(peer) => format!("linked to {peer}"),
                None => format!("no link: {}", seen.trouble),
            };
            let captured = agent.shared.ring.captured_lsn();
            let why = format!(
                "captured lsn {captured}, received {}, on the replica {}; {link}; {why}",
                seen.received, seen.checkpoint
            );
            return Ok(WaitOutcome::TimedOut { why });
        }
        // Whichever comes first: the peer's word, or the next look at the states.
        let _ = timeout_at(deadline.min(Instant::now() + LOOK), peer.changed()).await;
    }
}
