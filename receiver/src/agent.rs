//! AGENT: the receiving daemon, from its settings to its graceful end.
//!
//! Owns the groups and the endpoint; runs on the caller's tokio runtime, with two named threads for each
//! group. State on disk is the groups' own; this room keeps none beside it. Invariants: a group is opened
//! once, under its lock; a final error (a failed sync, a dead thread) is kept, told by [`Handle::failed`],
//! and nothing is acknowledged after it.

mod apply_thread;
pub(crate) mod attach;
mod bell;
mod clock;
mod failure;
pub(crate) mod group;
mod heartbeats;
mod orders;
pub(crate) mod progress;
mod report;
mod schedule;
mod wait;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal::io::{Disk, RealDisk};
use machine::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use wire::message::ErrorCode;
use wire::{Fingerprint, Identity, Server, Tuning};

pub(crate) use clock::{ReceiptClock, Times, now_ns};
use failure::Failure;
use group::{Claim, Group, Setup, lock};
use orders::Order;

use crate::apply::{HoldReport, OverwriteReport, ResumeReport, RewindReport};
use crate::error::{Error, ErrorKind, Result};
use crate::history::History;
use crate::ingest::Refusal;
use crate::link;
use crate::point::{At, Points};
use crate::restore::{self, RestoreReport, RestoreRequest};
use crate::restoring::Restores;
use crate::room::Rooms;
use crate::state::{GROUP_FILE, replica_path};
use crate::status::{GroupStatus, Status};
use crate::target::Guarded;

/// The receiving daemon.
pub struct Receiver;

/// What of the machine a receiver stands on, beside its clocks and threads: the simulation puts its own in.
pub struct Surroundings {
    /// Where groups and replicas lie.
    pub disk: Arc<dyn Disk>,
    /// Whether replicas are held against other programs: only on a disk that has them.
    pub hold_replicas: bool,
    /// The link's socket; `None` for one of the system's.
    pub socket: Option<Arc<dyn quinn::AsyncUdpSocket>>,
}

impl Surroundings {
    /// The machine's.
    pub fn real() -> Surroundings {
        Surroundings { disk: Arc::new(RealDisk), hold_replicas: true, socket: None }
    }
}

/// A running receiver.
pub struct Handle {
    shared: Arc<Shared>,
    local: SocketAddr,
    links: JoinHandle<()>,
}

/// What connections and the handle share.
pub(crate) struct Shared {
    pub settings: Arc<conf::Receiver>,
    pub failure: Failure,
    pub stopping: watch::Sender<bool>,
    /// Restores that run.
    restores: Arc<Restores>,
    /// What restores may not write to, beside this receiver's own directories and replicas.
    guarded: Mutex<Guarded>,
    /// What a connection may hold once it has its group's place.
    pub tuning: Tuning,
    setup: Setup,
    groups: Mutex<BTreeMap<String, Arc<Group>>>,
    /// Groups that could not be opened; tried again when their source says hello, not too often.
    broken: Mutex<BTreeMap<String, Broken>>,
    /// Held while the group of that name is opened or created. Names are those that the settings bind to
    /// sources.
    opening: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// Why a group could not be opened, and since when.
struct Broken {
    why: String,
    code: ErrorCode,
    at: Instant,
}

impl Broken {
    fn of(error: &Error) -> Broken {
        let code = match error.kind {
            ErrorKind::Busy => ErrorCode::GroupBusy,
            _ => ErrorCode::JournalFailed,
        };
        Broken { why: error.to_string(), code, at: machine::now() }
    }

    fn refusal(&self, name: &str) -> Refusal {
        Refusal::new(self.code, format!("group {name} cannot be opened: {}", self.why))
    }
}

/// Looks whether a restore has ended, and how many: 30 s in all, more than a sync takes on a disk that works.
const RESTORE_LOOK: Duration = Duration::from_millis(20);
const RESTORE_LOOKS: u32 = 1500;

/// Pause before a group that could not be opened is tried again: it may mean to read all of its journal.
const OPEN_AGAIN: Duration = Duration::from_secs(5);
/// How long a restore waits for the replicas to be looked at: a batch under way is finished first.
const CHECK: Duration = Duration::from_secs(10);

impl Receiver {
    /// Opens what is in the settings' directory and listens. On the current tokio runtime.
    ///
    /// A group that cannot be opened does not keep the others from working: it is shown as such by the
    /// status.
    ///
    /// # Errors
    /// No identity, no socket, or a directory that the disk refuses.
    pub async fn start(settings: conf::Receiver) -> Result<Handle> {
        Receiver::start_on(settings, Surroundings::real()).await
    }

    /// The same on another disk and another socket.
    ///
    /// # Errors
    /// As [`Receiver::start`].
    pub async fn start_on(settings: conf::Receiver, surroundings: Surroundings) -> Result<Handle> {
        let settings = Arc::new(settings);
        let failure = Failure::none();
        let Surroundings { disk, hold_replicas, socket } = surroundings;
        let rooms = Rooms::new(settings.groups());
        let setup =
            Setup { disk, hold_replicas, settings: settings.clone(), failure: failure.clone(), rooms };
        let shared = Arc::new(Shared {
            settings: settings.clone(),
            failure,
            stopping: watch::Sender::new(false),
            restores: Arc::default(),
            guarded: Mutex::default(),
            tuning: tuning(&settings),
            setup,
            groups: Mutex::default(),
            broken: Mutex::default(),
            opening: Mutex::default(),
        });
        let opening = shared.clone();
        let identity = blocking("open", move || {
            opening.open_groups()?;
            Identity::load(&opening.settings.identity_dir).map_err(of_wire)
        })
        .await?;
        let server = listen(&settings, &identity, socket)?;
        let local = server.local_addr().map_err(of_wire)?;
        let links = tokio::spawn(links(server, shared.clone()));
        Ok(Handle { shared, local, links })
    }
}

/// The link's task, whose end is a final error unless we stop.
async fn links(server: Server, shared: Arc<Shared>) {
    let why = match machine::caught(link::serve(server, shared.clone())).await {
        Ok(Ok(())) => return,
        Ok(Err(why)) => why,
        Err(said) => format!("it panicked ({said}): a fault of this program"),
    };
    shared.failure.report(Error::new(ErrorKind::Io, format!("the link's task ended: {why}")));
}

fn tuning(settings: &conf::Receiver) -> Tuning {
    let quic = &settings.quic;
    Tuning {
        stream_window_bytes: quic.stream_window,
        connection_window_bytes: quic.connection_window,
        send_window_bytes: quic.send_window,
        mtu_bytes: quic.mtu,
        socket_buffer_bytes: quic.socket_buffer,
        ..Tuning::default()
    }
}

fn listen(
    settings: &Arc<conf::Receiver>,
    identity: &Identity,
    socket: Option<Arc<dyn quinn::AsyncUdpSocket>>,
) -> Result<Server> {
    let known = settings.clone();
    let accept = Arc::new(move |peer: &Fingerprint| known.source.iter().any(|s| s.identity == peer.0));
    let tuning = tuning(settings);
    let server = match socket {
        Some(socket) => Server::on(socket, identity, accept, &tuning),
        None => Server::new(identity, accept, &tuning, settings.listen),
    };
    let server = server.map_err(of_wire)?;
    if let Some(advice) = server.socket_buffers().and_then(|buffers| buffers.advice()) {
        tracing::warn!("{advice}");
    }
    Ok(server)
}

impl Shared {
    /// Opens every group that the directory holds.
    fn open_groups(&self) -> Result<()> {
        let dir = self.settings.dir.join("groups");
        let io = |e| Error::io(format!("open {}", dir.display()), e);
        self.setup.disk.create_dir(&dir).map_err(io)?;
        for name in self.setup.disk.list(&dir).map_err(io)? {
            if !conf::check_name(&name) || !self.exists(&name)? {
                continue;
            }
            match Group::open(&self.setup, &name) {
                Ok(group) => _ = lock(&self.groups).insert(name, group),
                Err(error) if error.kind == ErrorKind::Sync => return Err(error),
                Err(error) => {
                    tracing::error!(group = name, %error, "cannot open the group");
                    lock(&self.broken).insert(name, Broken::of(&error));
                }
            }
        }
        Ok(())
    }

    /// Whether a group was created: a directory alone may be what a crash left of a creation.
    fn exists(&self, name: &str) -> Result<bool> {
        let path: PathBuf = self.setup.group_dir(name).join(GROUP_FILE);
        match self.setup.disk.open_read(&path) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io(format!("open {}", path.display()), e)),
        }
    }

    /// The group of a greeted peer; created, or opened again, if need be.
    ///
    /// # Errors
    /// The claim does not fit the group on disk, or the group cannot be opened.
    pub(crate) async fn group_for(
        self: &Arc<Self>,
        claim: &Claim,
    ) -> std::result::Result<Arc<Group>, Refusal> {
        let open = self.group(&claim.name);
        let group = match open {
            Some(group) => group,
            None => self.opened(claim).await?,
        };
        group.check(claim)?;
        Ok(group)
    }

    /// Opens or creates, one hello of that group at a time; hellos of others do not wait.
    async fn opened(self: &Arc<Self>, claim: &Claim) -> std::result::Result<Arc<Group>, Refusal> {
        let turn = lock(&self.opening).entry(claim.name.clone()).or_default().clone();
        let _turn = turn.lock().await;
        if let Some(group) = self.group(&claim.name) {
            return Ok(group);
        }
        if let Some(known) = lock(&self.broken).get(&claim.name).filter(|b| machine::since(b.at) < OPEN_AGAIN)
        {
            return Err(known.refusal(&claim.name));
        }
        let opened = self.open_or_create(claim.clone()).await;
        opened.map_err(|error| Broken::of(&error).refusal(&claim.name))
    }

    async fn open_or_create(self: &Arc<Self>, claim: Claim) -> Result<Arc<Group>> {
        let shared = self.clone();
        let name = claim.name.clone();
        let opened = blocking("open", move || match shared.exists(&claim.name)? {
            true => Group::open(&shared.setup, &claim.name),
            false => Group::create(&shared.setup, &claim),
        })
        .await;
        match opened {
            Ok(group) => {
                lock(&self.broken).remove(&name);
                lock(&self.groups).insert(name, group.clone());
                Ok(group)
            }
            Err(error) => {
                lock(&self.broken).insert(name, Broken::of(&error));
                Err(error)
            }
        }
    }

    /// All that no restore may write to.
    fn guarded(&self) -> Guarded {
        let mut guarded = lock(&self.guarded).clone();
        guarded.dir(&self.settings.dir);
        guarded.dir(&self.settings.identity_dir);
        guarded.file(&self.settings.control);
        for group in self.all() {
            for known in &group.history.state().replicas {
                guarded.file(replica_path(&group.dir, &known.path));
            }
        }
        guarded
    }

    /// Until restores that were told to end have done so: their temporary files are gone then.
    async fn until_restores_ended(&self) {
        for _ in 0..RESTORE_LOOKS {
            if self.restores.have_ended() {
                return;
            }
            tokio::time::sleep(RESTORE_LOOK).await;
        }
        tracing::warn!("a restore that was ended waits for its disk");
    }

    fn group(&self, name: &str) -> Option<Arc<Group>> {
        lock(&self.groups).get(name).cloned()
    }

    fn all(&self) -> Vec<Arc<Group>> {
        lock(&self.groups).values().cloned().collect()
    }
}

impl Handle {
    /// Where sources connect to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Where everything stands.
    pub fn status(&self) -> Status {
        let mut groups: Vec<_> = self
            .shared
            .all()
            .iter()
            .map(|group| GroupStatus {
                restores: self.shared.restores.of(group.name()),
                ..report::group(group)
            })
            .collect();
        let broken = lock(&self.shared.broken);
        groups.extend(broken.iter().map(|(name, broken)| report::broken(name, &broken.why)));
        groups.sort_by(|a, b| a.name.cmp(&b.name));
        Status { groups }
    }

    /// The recovery points of a group.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here.
    pub fn points(&self, group: &str) -> Result<Points> {
        Ok(self.known(group)?.history.points())
    }

    /// What lies in the past of a group: for views of its points.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here.
    pub fn history(&self, group: &str) -> Result<Arc<History>> {
        Ok(self.known(group)?.history.clone())
    }

    /// Restores a point of a group, on a thread of its own; `progress` is told bytes done and bytes in all.
    /// The restore ends when the future is dropped, [`Handle::cancel_restore`] names its target, or the
    /// receiver stops.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here; what the restore says.
    pub async fn restore(
        &self,
        group: &str,
        request: RestoreRequest,
        mut progress: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<RestoreReport> {
        let known = self.known(group)?;
        // Whoever changed a replica a moment ago is noticed before it is read; an applier that is busy looks
        // by itself.
        let checked = known.orders.give(&known.bell, Order::Check);
        if let Ok(Err(error)) = tokio::time::timeout(CHECK, checked).await {
            tracing::debug!(%error, "the replicas were not looked at before a restore");
        }
        let history = known.history.clone();
        let guarded = self.shared.guarded();
        let restoring = self.shared.restores.begin(group, &request.at, &request.to);
        // Lives as long as this future: who waits no more has no use for the target.
        let _ends = restoring.canceller();
        let restored = blocking("restore", move || {
            restore::restore_as(&history, &request, &guarded, &restoring, &mut progress)
        })
        .await;
        if restored.as_ref().is_err_and(|error| error.kind == ErrorKind::Corrupt) {
            // What it met is looked for, and mended if the source still holds it.
            self.scrub_now(group)?;
        }
        restored
    }

    /// Ends the restores to a target, and waits until they have; how many there were.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] where there is none.
    pub async fn cancel_restore(&self, target: &Path) -> Result<usize> {
        let count = self.shared.restores.cancel(target);
        if count == 0 {
            let at = format!(
                "nothing is being restored to {}; `afterimage status` lists restores",
                target.display()
            );
            return Err(Error::new(ErrorKind::NotPossible, at));
        }
        self.shared.until_restores_ended().await;
        Ok(count)
    }

    /// No restore writes to these either: what another daemon of this process uses.
    pub fn guard(&self, more: &Guarded) {
        lock(&self.shared.guarded).add(more);
    }

    /// Brings the replicas of a group to a point, and keeps them there until [`Handle::resume`]. Frames go on
    /// being received.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here; [`ErrorKind::NotPossible`] for the point; what kept
    /// it from being carried out.
    pub async fn rewind(&self, group: &str, at: At) -> Result<RewindReport> {
        let group = self.known(group)?;
        group.orders.give(&group.bell, |answer| Order::Rewind(at, answer)).await
    }

    /// Lets the replicas of a rewound group roll forward to the newest; returns when that has begun.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here; [`ErrorKind::NotPossible`] where it is not rewound.
    pub async fn resume(&self, group: &str) -> Result<ResumeReport> {
        let group = self.known(group)?;
        group.orders.give(&group.bell, Order::Resume).await
    }

    /// Has replicas of a group that others changed overwritten, by a new epoch of its source. What they hold
    /// stays reachable.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here; [`ErrorKind::NotPossible`] where nothing is wrong,
    /// or others use one.
    pub async fn overwrite(&self, group: &str) -> Result<OverwriteReport> {
        let group = self.known(group)?;
        group.orders.give(&group.bell, Order::Overwrite).await
    }

    /// Keeps a bookmark, and everything behind it, from retention; or lets it go again.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here; [`ErrorKind::NotPossible`] for a name that is not
    /// in the history, or not under hold.
    pub async fn hold(&self, group: &str, name: &str, release: bool) -> Result<HoldReport> {
        let group = self.known(group)?;
        group.orders.give(&group.bell, |answer| Order::Hold(name.to_owned(), release, answer)).await
    }

    /// Checks the stored segments of a group now, in the background; the status tells what was found.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here.
    pub fn scrub_now(&self, group: &str) -> Result<()> {
        self.known(group)?.scrub.start_now();
        Ok(())
    }

    /// Takes whichever copy of a group's source comes next, also one that was refused.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a group that is not here; [`ErrorKind::NotPossible`] while a copy is
    /// connected.
    pub async fn admit(&self, group: &str) -> Result<()> {
        self.known(group)?.admit().await
    }

    /// Waits until everything that is received by now is on the replicas.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`], at once where it cannot happen by itself, or when the time is over.
    pub async fn wait(&self, timeout: Duration) -> Result<()> {
        let refuse = |what: String| Err(Error::new(ErrorKind::NotPossible, what));
        if let Some((name, broken)) = lock(&self.shared.broken).first_key_value() {
            return refuse(format!("group {name}: {}", broken.why));
        }
        let deadline = tokio::time::Instant::now() + timeout;
        for group in self.shared.all() {
            wait::until_on_replica(&group, deadline).await?;
        }
        Ok(())
    }

    /// Resolves with the error that ends this receiver: the process shuts it down and exits non-zero.
    pub async fn failed(&self) -> Arc<Error> {
        self.shared.failure.wait().await
    }

    /// Ends in good order: connections are told, batches finished, what was received synced, replicas
    /// stamped.
    ///
    /// # Errors
    /// The final error, if there was one.
    pub async fn shutdown(self) -> Result<()> {
        self.shared.stopping.send_replace(true);
        self.shared.restores.cancel_all();
        self.shared.until_restores_ended().await;
        // A panicked task has nothing left to end.
        let _ = self.links.await;
        let groups = std::mem::take(&mut *lock(&self.shared.groups));
        blocking("shutdown", move || {
            groups.into_values().for_each(|group| group.stop());
            Ok(())
        })
        .await?;
        match self.shared.failure.get() {
            Some(error) => Err(Error { kind: error.kind, at: error.to_string(), source: None }),
            None => Ok(()),
        }
    }

    fn known(&self, group: &str) -> Result<Arc<Group>> {
        self.shared.group(group).ok_or_else(|| {
            let why = lock(&self.shared.broken).get(group).map(|broken| broken.why.clone());
            let why = why.unwrap_or_else(|| format!("there is no group {group:?} here"));
            Error::new(ErrorKind::Usage, why)
        })
    }
}

/// Runs disk work on a named thread of its own, off the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, result) = oneshot::channel();
    let run = move || _ = done.send(work());
    machine::spawn(name, run).map_err(|e| Error::io(format!("start thread {name}"), e))?;
    let panicked =
        |_| Error::new(ErrorKind::Io, format!("thread {name} panicked: its message is in the log"));
    result.await.map_err(panicked)?
}

fn of_wire(error: wire::Error) -> Error {
    let kind = match error.kind {
        wire::ErrorKind::Bind => ErrorKind::Busy,
        wire::ErrorKind::Io => ErrorKind::Io,
        _ => ErrorKind::Usage,
    };
    Error { kind, at: error.to_string(), source: Some(Box::new(error)) }
}
