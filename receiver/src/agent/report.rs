//! The status of a group, from the values that its threads publish.
//!
//! The positions come from one [`Progress`], so their order holds whatever happens meanwhile; what the source
//! claims (its newest lsn) is never taken as less than what we hold.

use std::time::Instant;

use journal::Positions;

use super::group::{Group, lock};
use super::now_ns;
use super::progress::{Progress, Stall};
use crate::point::rfc3339;
use crate::state::replica_path;
use crate::status::{GroupStatus, HistoryStatus, RewoundStatus, State, UsedStatus, VolumeStatus};

/// The status of an open group.
pub(super) fn group(group: &Group) -> GroupStatus {
    let progress = group.progress().borrow().clone();
    let (newest, heard_at, skew_ms) = {
        let beats = lock(&group.heartbeats);
        (beats.newest(), beats.heard_at(), beats.skew_ms())
    };
    let received = progress.durable.lsn;
    // Some of these come from a peer and from files: shown in their order, whatever they say.
    let checkpoint = progress.checkpoint.min(received);
    let positions = Positions {
        captured_lsn: newest.map_or(received, |beat| beat.lsn.max(received)),
        journaled_lsn: received,
        received_lsn: received,
        applied_lsn: progress.applied.clamp(checkpoint, received),
        checkpoint_lsn: checkpoint,
    };
    let peer = group.berth.peer();
    let points = group.history.points();
    let durable = group.history.state();
    let gap = points.gaps.last().filter(|gap| gap.to_lsn.is_none()).map(|gap| gap.reason.as_str());
    let resyncing = gap.or((!durable.is_consistent()).then_some("the replica is not consistent yet"));
    let (mut state, mut why) = state(&progress, resyncing, points.oldest.is_some(), peer.is_some());
    let waiting_bytes = group.bell.bytes_waiting();
    if state == State::Rewound {
        let waits = format!(
            "; {} records, about {waiting_bytes} bytes, wait",
            received.0.saturating_sub(checkpoint.0)
        );
        why = why.map(|why| why + &waits);
    }
    let scrub = group.scrub.last();
    if let Some(damage) = scrub.as_ref().and_then(|scrub| scrub.damage.first()) {
        let found = format!("damage in {} at byte {}: {}", damage.file.display(), damage.offset, damage.what);
        // The replica follows as ever; what is damaged is the way back.
        state = state.max(State::Degraded);
        why = Some(why.map_or(found.clone(), |why| format!("{why}; besides, {found}")));
    }
    if let Some(copy) = group.berth.copy_words() {
        why = Some(why.map_or(copy.clone(), |why| format!("{why}; besides, {copy}")));
    }
    let volumes = durable.replicas.iter().map(|replica| VolumeStatus {
        name: replica.name.clone(),
        state,
        size_bytes: replica.size_bytes,
        nbd_uri: None,
        replica: Some(replica_path(&group.dir, &replica.path)),
        source: None,
    });
    GroupStatus {
        name: group.name().to_owned(),
        state,
        why,
        epoch: progress.durable.epoch.number,
        positions,
        rpo_ms: rpo_ms(&positions, &progress, newest.map(|beat| beat.time_ns), heard_at, peer.is_some()),
        backlog_bytes: waiting_bytes,
        volumes: volumes.collect(),
        peer,
        history: points.oldest.zip(points.newest).map(|(oldest, newest)| HistoryStatus { oldest, newest }),
        used: UsedStatus { journal_bytes: progress.journal_bytes, undo_bytes: group.history.undo_bytes() },
        apply_error: progress.stalled.as_ref().and_then(|stall| match stall {
            Stall::Rewound(_) => None,
            stall => Some(stall.why().to_owned()),
        }),
        rewound: durable.wishes.rewound.as_ref().map(|rewind| RewoundStatus {
            at: rewind.at.clone(),
            point: rewind.to().into(),
            since: rfc3339(rewind.since_ns),
            waiting_bytes,
        }),
        scrub,
        repaired: group.scrub.repaired(),
        restores: Vec::new(),
        // Of a clock that is not heard nothing is known.
        clock_skew_ms: skew_ms.filter(|_| group.berth.peer().is_some()),
    }
}

/// A group that could not be opened.
pub(super) fn broken(name: &str, why: &str) -> GroupStatus {
    GroupStatus {
        name: name.to_owned(),
        state: State::Degraded,
        why: Some(why.to_owned()),
        epoch: 0,
        positions: Positions::default(),
        rpo_ms: None,
        backlog_bytes: 0,
        volumes: Vec::new(),
        peer: None,
        history: None,
        used: UsedStatus::default(),
        apply_error: Some(why.to_owned()),
        rewound: None,
        scrub: None,
        repaired: Vec::new(),
        restores: Vec::new(),
        clock_skew_ms: None,
    }
}

/// The worst that holds, with its reason.
fn state(
    progress: &Progress,
    resyncing: Option<&str>,
    has_history: bool,
    connected: bool,
) -> (State, Option<String>) {
    match (&progress.stalled, &progress.full, resyncing) {
        (Some(Stall::Rewound(why)), Some(full), _) => {
            (State::Rewound, Some(format!("{why}; besides, {full}")))
        }
        (Some(Stall::Rewound(why)), ..) => (State::Rewound, Some(why.clone())),
        (Some(Stall::NeedsResync(why)), ..) => (State::NeedsResync, Some(why.clone())),
        (_, Some(why), _) => (State::Degraded, Some(why.clone())),
        (Some(stall), ..) => (State::Degraded, Some(stall.why().to_owned())),
        (.., Some(why)) if has_history => (State::Resyncing, Some(why.to_owned())),
        (.., Some(why)) => (State::Syncing, Some(why.to_owned())),
        _ if !connected => (State::Detached, Some("no source is connected".to_owned())),
        _ => (State::Replicating, None),
    }
}

/// Time that would be lost if the source were gone now: from the last durable record to the newest that we
/// know of, and from then on to now if nobody is there to tell us of more.
fn rpo_ms(
    positions: &Positions,
    progress: &Progress,
    newest_ns: Option<u64>,
    heard_at: Option<Instant>,
    connected: bool,
) -> Option<u64> {
    let behind_ms = match positions.captured_lsn > positions.received_lsn {
        // Nothing is durable yet: since when is not known.
        true if progress.durable_time_ns == 0 => return None,
        true => newest_ns?.saturating_sub(progress.durable_time_ns) / 1_000_000,
        false => 0,
    };
    if connected {
        return Some(behind_ms);
    }
    let silent_ms = match heard_at {
        Some(at) => u64::try_from(machine::since(at).as_millis()).unwrap_or(u64::MAX),
        // Not heard since our start: only the clocks can say.
        None => {
            let known = newest_ns.or((progress.durable_time_ns > 0).then_some(progress.durable_time_ns));
            now_ns().saturating_sub(known?) / 1_000_000
        }
    };
    (positions.captured_lsn.0 > 0).then(|| behind_ms.saturating_add(silent_ms))
}
