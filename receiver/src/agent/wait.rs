//! `wait` at the receiver: until a group's replica holds everything that its source is known to have
//! captured.
//!
//! Known is what is durable here, a frame that waits for room, and what the source told of in its heartbeats.
//! What is told of and not here comes while the source is connected; without it nothing comes, and the wait
//! ends as soon as all that is here is on the replica.

use std::time::Duration;

use journal::Lsn;
use tokio::time::{Instant, timeout_at};

use super::group::{Group, lock};
use super::progress::Stall;
use crate::error::{Error, ErrorKind, Result};

/// Connections come and go without a word of the group's threads; they are looked at this often.
const LOOK: Duration = Duration::from_millis(50);

/// Waits for one group.
///
/// # Errors
/// It cannot happen by itself, or did not in time: in words.
pub(super) async fn until_on_replica(group: &Group, deadline: Instant) -> Result<()> {
    let name = group.name();
    let refuse = |what: String| Err(Error::new(ErrorKind::NotPossible, format!("group {name}: {what}")));
    let mut progress = group.progress();
    // What comes later is not waited for.
    let told = lock(&group.heartbeats).newest().map_or(Lsn::ZERO, |beat| beat.lsn);
    let target = told.max(progress.borrow().durable.lsn);
    let mut asked = Lsn::ZERO;
    loop {
        let seen = progress.borrow_and_update().clone();
        let (durable, checkpoint) = (seen.durable.lsn, seen.checkpoint);
        // One that is given up is at no lsn, whatever was passed over.
        let is_given_up = matches!(seen.stalled, Some(Stall::NeedsResync(_)));
        if checkpoint >= target && !is_given_up {
            // A frame that waits for room is known, too, though no heartbeat has told of it yet.
            return match &seen.full {
                Some(full) => refuse(format!("what its source has sent behind lsn {durable} waits: {full}")),
                None => Ok(()),
            };
        }
        if let Some(stall) = &seen.stalled {
            return refuse(stall.why().to_owned());
        }
        let lacks = format!("its source has captured up to lsn {told}, and lsn {durable} is here");
        if durable < target {
            if let Some(full) = &seen.full {
                return refuse(format!("{lacks}: {full}"));
            }
            if group.berth.peer().is_none() && checkpoint >= durable {
                return refuse(format!(
                    "{lacks}, all of it on the replica; the source is not connected: what is missing comes only from it"
                ));
            }
        }
        let next = target.min(durable);
        if next > asked {
            asked = next;
            group.apply_now(next);
        }
        if Instant::now() >= deadline {
            let lacks = if durable < target { format!("; {lacks}") } else { String::new() };
            return refuse(format!("lsn {checkpoint} of {target} on the replica in time{lacks}"));
        }
        let look = deadline.min(Instant::now() + LOOK);
        if let Ok(Err(_)) = timeout_at(look, progress.changed()).await {
            return refuse("the receiver is stopping".to_owned());
        }
    }
}
