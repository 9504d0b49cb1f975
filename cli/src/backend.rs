//! What each daemon answers on its control socket: the source, the receiver, or both in one process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use replicator::verify::Order;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::control::{Answer, Backend, Progress, RestoreOrder};
use crate::exit::{Fault, Kind};
use crate::restore;
use crate::status::{Group, Status};

/// The state that only the receiver knows of.
const REWOUND: &str = "rewound";

type SourceHandle = Arc<replicator::Handle>;
type ReceiverHandle = Arc<receiver::agent::Handle>;

/// `afterimage replicate`: knows what is captured, and nothing of history.
pub struct Source(pub SourceHandle);

/// `afterimage receive`: knows history, and cannot name a moment that it has not seen.
pub struct Receiver(pub ReceiverHandle);

/// `afterimage up`.
pub struct Both {
    /// The source's side.
    pub source: SourceHandle,
    /// The receiver's side.
    pub receiver: ReceiverHandle,
}

impl Backend for Source {
    fn status(&self) -> Status {
        Status::of(&self.0.status())
    }

    fn wait(&self, timeout: Duration) -> Answer<'_, u64> {
        Box::pin(wait_at_source(&self.0, timeout))
    }

    fn points(&self, _group: String) -> Answer<'_, Value> {
        Box::pin(async { Err(not_here("history is", "receiver")) })
    }

    fn bookmark(&self, group: String, name: String) -> Answer<'_, u64> {
        Box::pin(bookmark(&self.0, group, name))
    }

    fn attach(&self, device: PathBuf) -> Answer<'_, String> {
        Box::pin(async { self.0.attach(device).await.map_err(Fault::from_error) })
    }

    fn detach(&self, device: PathBuf) -> Answer<'_, Value> {
        Box::pin(detach(&self.0, device))
    }

    fn rewind(&self, _group: String, _at: String) -> Answer<'_, Value> {
        Box::pin(async { Err(not_here("replicas are", "receiver")) })
    }

    fn resume(&self, _group: String) -> Answer<'_, Value> {
        Box::pin(async { Err(not_here("replicas are", "receiver")) })
    }

    fn hold(&self, _group: String, _name: String, _release: bool) -> Answer<'_, Value> {
        Box::pin(async { Err(not_here("history is", "receiver")) })
    }

    fn restore(&self, _order: RestoreOrder, _progress: mpsc::Sender<Progress>) -> Answer<'_, Value> {
        Box::pin(async { Err(not_here("history is", "receiver")) })
    }

    fn verify(&self, group: String, order: Order) -> Answer<'_, Value> {
        Box::pin(verify(&self.0, group, order))
    }

    fn verification(&self, group: String, stop: bool) -> Answer<'_, Value> {
        Box::pin(verification(&self.0, group, stop))
    }
}

impl Backend for Receiver {
    fn status(&self) -> Status {
        Status::of(&self.0.status())
    }

    fn wait(&self, timeout: Duration) -> Answer<'_, u64> {
        Box::pin(wait_at_receiver(&self.0, timeout))
    }

    fn points(&self, group: String) -> Answer<'_, Value> {
        Box::pin(points(&self.0, group))
    }

    fn bookmark(&self, _group: String, _name: String) -> Answer<'_, u64> {
        Box::pin(async { Err(not_here("bookmarks are made", "source")) })
    }

    fn attach(&self, _device: PathBuf) -> Answer<'_, String> {
        Box::pin(async { Err(not_here("devices are captured", "source")) })
    }

    fn detach(&self, _device: PathBuf) -> Answer<'_, Value> {
        Box::pin(async { Err(not_here("devices are captured", "source")) })
    }

    fn rewind(&self, group: String, at: String) -> Answer<'_, Value> {
        Box::pin(rewound(&self.0, group, at))
    }

    fn resume(&self, group: String) -> Answer<'_, Value> {
        Box::pin(resumed(&self.0, group))
    }

    fn resync(&self, group: String) -> Answer<'_, Value> {
        Box::pin(async move { json(&self.0.overwrite(&group).await.map_err(Fault::from_error)?) })
    }

    fn hold(&self, group: String, name: String, release: bool) -> Answer<'_, Value> {
        Box::pin(held(&self.0, group, name, release))
    }

    fn admit(&self, group: String) -> Answer<'_, Value> {
        Box::pin(admitted(&self.0, group))
    }

    fn scrub(&self, group: String) -> Answer<'_, Value> {
        Box::pin(async move { scrubbed(&self.0, &group) })
    }

    fn restore(&self, order: RestoreOrder, progress: mpsc::Sender<Progress>) -> Answer<'_, Value> {
        Box::pin(restored(&self.0, order, progress))
    }

    fn cancel_restore(&self, to: PathBuf) -> Answer<'_, Value> {
        Box::pin(restore_cancelled(&self.0, to))
    }
}

impl Backend for Both {
    fn status(&self) -> Status {
        // The receiver first: then what the source has captured is never less than what the receiver holds.
        let receiver = Status::of(&self.receiver.status());
        join(Status::of(&self.source.status()), &receiver)
    }

    fn wait(&self, timeout: Duration) -> Answer<'_, u64> {
        Box::pin(wait_at_source(&self.source, timeout))
    }

    fn points(&self, group: String) -> Answer<'_, Value> {
        Box::pin(points(&self.receiver, group))
    }

    fn bookmark(&self, group: String, name: String) -> Answer<'_, u64> {
        Box::pin(bookmark(&self.source, group, name))
    }

    fn attach(&self, device: PathBuf) -> Answer<'_, String> {
        Box::pin(async { self.source.attach(device).await.map_err(Fault::from_error) })
    }

    fn detach(&self, device: PathBuf) -> Answer<'_, Value> {
        Box::pin(detach(&self.source, device))
    }

    fn rewind(&self, group: String, at: String) -> Answer<'_, Value> {
        Box::pin(rewound(&self.receiver, group, at))
    }

    fn resume(&self, group: String) -> Answer<'_, Value> {
        Box::pin(resumed(&self.receiver, group))
    }

    fn resync(&self, group: String) -> Answer<'_, Value> {
        Box::pin(async move { json(&self.receiver.overwrite(&group).await.map_err(Fault::from_error)?) })
    }

    fn hold(&self, group: String, name: String, release: bool) -> Answer<'_, Value> {
        Box::pin(held(&self.receiver, group, name, release))
    }

    fn admit(&self, group: String) -> Answer<'_, Value> {
        Box::pin(admitted(&self.receiver, group))
    }

    fn scrub(&self, group: String) -> Answer<'_, Value> {
        Box::pin(async move { scrubbed(&self.receiver, &group) })
    }

    fn restore(&self, order: RestoreOrder, progress: mpsc::Sender<Progress>) -> Answer<'_, Value> {
        Box::pin(restored(&self.receiver, order, progress))
    }

    fn cancel_restore(&self, to: PathBuf) -> Answer<'_, Value> {
        Box::pin(restore_cancelled(&self.receiver, to))
    }

    fn verify(&self, group: String, order: Order) -> Answer<'_, Value> {
        Box::pin(verify(&self.source, group, order))
    }

    fn verification(&self, group: String, stop: bool) -> Answer<'_, Value> {
        Box::pin(verification(&self.source, group, stop))
    }
}

fn not_here(what: &str, side: &str) -> Fault {
    Fault::not_possible(format!("{what} at the {side}: ask the {side}'s control socket"))
}

async fn detach(source: &replicator::Handle, device: PathBuf) -> Result<Value, Fault> {
    let detached = source.detach(device).await.map_err(Fault::from_error)?;
    Ok(json!({ "volume": detached.volume, "lsn": detached.lsn.0, "consistent": detached.is_consistent }))
}

async fn wait_at_source(source: &replicator::Handle, timeout: Duration) -> Result<u64, Fault> {
    match source.wait(timeout).await.map_err(Fault::from_error)? {
        replicator::WaitOutcome::Done { lsn } => Ok(lsn.0),
        replicator::WaitOutcome::Impossible { why } => Err(Fault::not_possible(why)),
        replicator::WaitOutcome::TimedOut { why } => Err(Fault::new(Kind::TimedOut, why)),
    }
}

fn known(source: &replicator::Handle, group: &str) -> Result<(), Fault> {
    if source.status().groups.iter().any(|known| known.name == group) {
        return Ok(());
    }
    Err(Fault::usage(format!("there is no group {group} here; `afterimage status` lists them")))
}

async fn verify(source: &replicator::Handle, group: String, order: Order) -> Result<Value, Fault> {
    known(source, &group)?;
    json(&source.verify(order).await.map_err(Fault::from_error)?)
}

async fn verification(source: &replicator::Handle, group: String, stop: bool) -> Result<Value, Fault> {
    known(source, &group)?;
    let report = if stop {
        source.stop_verification().await.map_err(Fault::from_error)?
    } else {
        source.verification()
    };
    let never =
        || Fault::not_possible(format!("{group} was never verified: `afterimage verify {group}` begins"));
    json(&report.ok_or_else(never)?)
}

async fn bookmark(source: &replicator::Handle, group: String, name: String) -> Result<u64, Fault> {
    known(source, &group)?;
    Ok(source.bookmark(&name).map_err(Fault::from_error)?.0)
}

/// The receiver may hold several groups; the newest lsn that is on a replica stands for all.
async fn wait_at_receiver(receiver: &receiver::agent::Handle, timeout: Duration) -> Result<u64, Fault> {
    let begun = Instant::now();
    match receiver.wait(timeout).await {
        Ok(()) => {
            let groups = receiver.status().groups;
            Ok(groups.iter().map(|group| group.positions.checkpoint_lsn.0).max().unwrap_or(0))
        }
        // The receiver gives one kind for both; what took the whole time might have happened in more.
        Err(error) if begun.elapsed() >= timeout => Err(Fault::new(Kind::TimedOut, error.to_string())),
        Err(error) => Err(Fault::from_error(error)),
    }
}

async fn points(receiver: &receiver::agent::Handle, group: String) -> Result<Value, Fault> {
    json(&receiver.points(&group).map_err(Fault::from_error)?)
}

async fn admitted(receiver: &receiver::agent::Handle, group: String) -> Result<Value, Fault> {
    receiver.admit(&group).await.map_err(Fault::from_error)?;
    Ok(json!({ "group": group }))
}

fn scrubbed(receiver: &receiver::agent::Handle, group: &str) -> Result<Value, Fault> {
    receiver.scrub_now(group).map_err(Fault::from_error)?;
    Ok(serde_json::json!({ "group": group }))
}

async fn rewound(receiver: &receiver::agent::Handle, group: String, at: String) -> Result<Value, Fault> {
    let at = at.parse().map_err(|error: receiver::Error| Fault::usage(error.to_string()))?;
    json(&receiver.rewind(&group, at).await.map_err(Fault::from_error)?)
}

async fn resumed(receiver: &receiver::agent::Handle, group: String) -> Result<Value, Fault> {
    json(&receiver.resume(&group).await.map_err(Fault::from_error)?)
}

async fn held(
    receiver: &receiver::agent::Handle,
    group: String,
    name: String,
    release: bool,
) -> Result<Value, Fault> {
    json(&receiver.hold(&group, &name, release).await.map_err(Fault::from_error)?)
}

async fn restored(
    receiver: &receiver::agent::Handle,
    order: RestoreOrder,
    progress: mpsc::Sender<Progress>,
) -> Result<Value, Fault> {
    let request = restore::request(&order)?;
    let tell = move |done_bytes, total_bytes| {
        // A reader that is slow hears less often.
        let _ = progress.try_send(Progress { done_bytes, total_bytes });
    };
    json(&receiver.restore(&order.group, request, tell).await.map_err(Fault::from_error)?)
}

async fn restore_cancelled(receiver: &receiver::agent::Handle, to: PathBuf) -> Result<Value, Fault> {
    let ended = receiver.cancel_restore(&to).await.map_err(Fault::from_error)?;
    Ok(json!({ "to": to, "ended": ended }))
}

fn json(value: &impl Serialize) -> Result<Value, Fault> {
    serde_json::to_value(value).map_err(Fault::from_error)
}

/// The source's status, with what only the receiver knows.
fn join(mut source: Status, receiver: &Status) -> Status {
    for group in &mut source.groups {
        if let Some(other) = receiver.groups.iter().find(|other| other.name == group.name) {
            join_group(group, other);
        }
    }
    source
}

fn join_group(group: &mut Group, other: &Group) {
    group.received_lsn = other.received_lsn;
    group.applied_lsn = other.applied_lsn;
    group.checkpoint_lsn = other.checkpoint_lsn;
    // The operator's own wish comes before whatever the source makes of it.
    if other.state == REWOUND {
        group.state.clone_from(&other.state);
        group.why.clone_from(&other.why);
        group.volumes.iter_mut().for_each(|volume| volume.state.clone_from(&other.state));
    }
    for volume in &mut group.volumes {
        if let Some(other) = other.volumes.iter().find(|other| other.name == volume.name) {
            volume.replica.clone_from(&other.replica);
        }
    }
    for (key, value) in &other.more {
        group.more.entry(key).or_insert_with(|| value.clone());
    }
}
