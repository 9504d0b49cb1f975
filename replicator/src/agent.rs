//! The run of a source: its threads, its tasks, and the handle that the command line holds.
//!
//! | thread or task | does |
//! |---|---|
//! | `nbd-*` | serve clients (room `nbd`), through `capture/nbd` |
//! | `af-journal` | `pipeline`: ring → frames → source journal |
//! | `af-pack-N` | compression |
//! | `af-sync` | opens the NBD sockets, then `resync`: copies what is dirty while writes go on |
//! | `af-alive` | `alive`: says that the agent lives, for the one after it |
//! | link task, `af-ship` | `link`: the connection, its acknowledgements, its reader |
//! | upkeep task | clock jumps; starts `af-disks` |
//! | `af-disks` | looks at the disks behind the front, keeps the lsn lease |

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, TryLockError};
use std::time::Duration;

use journal::compress::Compression;
use journal::frame::Stamp;
use journal::{Lsn, Position};
use kfilter::Op;
use machine::{JoinHandle, Mutex, MutexGuard};
use tokio::sync::{mpsc, watch};

use crate::alive::{self, Heart};
use crate::capture::nbd::{CapturedVolume, OnGap};
use crate::capture::ring::{Front, InKernel};
use crate::capture::{Refusal, Ring, Volume};
use crate::clock::{ClockWatch, Times};
use crate::disks::Ills;
use crate::error::{Error, ErrorKind, Result};
use crate::gaps;
use crate::instance::Copy;
use crate::link::{Link, LinkSettings};
use crate::looks::Looks;
use crate::pipeline::{BatchSettings, Pipeline, Shared};
use crate::progress::Progress;
use crate::resync::{Engine, Halt};
use crate::start::{self, OpenRing, OpenVolume, Opened, Started};
use crate::state::{SourceState, StateFile};
use crate::status::{Board, State, Status};
use crate::surroundings::Surroundings;
use crate::verify::Verification;

/// How long a stop waits for clients' requests in flight.
pub(crate) const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How often it is looked whether the sockets are open.
const SOCKETS_OPEN: Duration = Duration::from_millis(10);
/// How often clocks and lease are looked at.
const UPKEEP: Duration = Duration::from_secs(1);
/// The same while the stream does not say yet that the clock was set.
const TELL: Duration = Duration::from_millis(50);

/// The source daemon.
pub struct Replicator;

/// A running source. Dropping it without [`Handle::shutdown`] is like a kill: the next start takes over.
pub struct Handle {
    pub(crate) agent: Arc<Agent>,
    pub(crate) pipeline: Option<JoinHandle<Option<(Position, bool)>>>,
    pub(crate) sync: Option<JoinHandle<Option<()>>>,
    pub(crate) alive: Option<JoinHandle<Option<()>>>,
    pub(crate) link: tokio::task::JoinHandle<()>,
    pub(crate) upkeep: tokio::task::JoinHandle<()>,
    pub(crate) stop_link: watch::Sender<bool>,
    pub(crate) ring_dir: std::path::PathBuf,
    _lock: File,
}

/// What threads and tasks share.
pub(crate) struct Agent {
    pub(crate) settings: conf::Replicator,
    pub(crate) surroundings: Surroundings,
    pub(crate) shared: Shared,
    pub(crate) volumes: Vec<Arc<Volume>>,
    /// Lsns that `wait` wants applied soon.
    pub(crate) apply_now: mpsc::Sender<Lsn>,
    pub(crate) servers: Mutex<Vec<nbd::Server>>,
    pub(crate) serving: AtomicBool,
    pub(crate) halt: Halt,
    /// One order of the operator at a time. While one is carried out, what is attached is not what the kernel
    /// captures.
    pub(crate) operator: Mutex<()>,
    /// Writes that neither a record nor a `failed` record tells of, as many as the synchronisation has seen.
    pub(crate) untold_seen: AtomicU64,
    /// Of those the commands past the block layer.
    pub(crate) unseen_seen: AtomicU64,
    /// Why the next synchronisation is due, where the ring cannot tell.
    pub(crate) due: Mutex<Option<String>>,
    /// What is wrong with the disks behind the front.
    pub(crate) ills: Mutex<Ills>,
    /// The look at the disks that is under way.
    pub(crate) looks: Looks,
    /// Comparison of the replica with the disks, by order.
    pub(crate) verification: Verification,
    /// The same of disks that nothing proves to be unchanged, by the agent itself ([`crate::resync`]).
    pub(crate) proof: Verification,
    /// What tells us from a copy of us.
    pub(crate) copy: Arc<Mutex<Copy>>,
    failure: watch::Sender<Option<Arc<Error>>>,
}

impl Replicator {
    /// Starts a source on the current tokio runtime. When it returns, capture is ready; the NBD sockets open
    /// a moment later, whatever is still to be synchronised.
    ///
    /// # Errors
    /// Settings that do not fit what is there; somebody else serves the group; no room for the ring.
    pub async fn start(settings: conf::Replicator) -> Result<Handle> {
        Replicator::start_on(settings, Surroundings::real()).await
    }

    /// The same on other disks and another socket.
    ///
    /// # Errors
    /// As [`Replicator::start`].
    pub async fn start_on(settings: conf::Replicator, surroundings: Surroundings) -> Result<Handle> {
        let identity = wire::Identity::load(&settings.identity_dir)
            .map_err(|error| Error::because(ErrorKind::Settings, "load this side's identity", error))?;
        let for_thread = (settings.clone(), surroundings.clone());
        let (lock, started, copy) = on_thread("af-start", move || {
            let (settings, surroundings) = &for_thread;
            let lock = lock_dir(&settings.dir)?;
            let started = start::start(settings, surroundings)?;
            Ok::<_, Error>((lock, started, Copy::open(&surroundings.disk, &settings.dir)))
        })
        .await??;
        let ring_dir = start::ring_dir(&settings, &started.state);
        let Started { state, volumes, ring, writer, cause, last_time_ns, skipped } = started;
        let known = state.get().clone();
        let stamp = Stamp { group: known.group, lineage: known.lineage, epoch: known.epoch };
        let board =
            Arc::new(Board::new(&settings.group, settings.volume.iter().map(|volume| volume.name.clone())));
        let epoch_start = Position::epoch_start(known.lineage, known.epoch, known.epoch_start);
        let progress = match &writer {
            Ok(writer) => {
                let segments = writer.segments().iter().filter(|segment| segment.frames > 0);
                let backlog = segments.map(|s| ((s.epoch.number, s.last_lsn), s.first_time_ns, s.bytes));
                Progress::new(writer.appended(), backlog)
            }
            Err(_) => Progress::new(epoch_start, std::iter::empty()),
        };
        for out in known.volumes.iter().filter(|volume| volume.is_detached() && volume.present) {
            board.take_out(&out.name);
        }
        let remembered = state.remembered();
        let state = Arc::new(Mutex::new(state));
        let (ring, volumes) = assemble(ring, volumes, &state, &board);
        let shared = Shared {
            ring: Arc::new(ring),
            progress: Arc::new(progress),
            board: board.clone(),
            state,
            remembered,
            sync_cause: Arc::new(Mutex::new(cause.clone())),
            map: Arc::default(),
            health: Arc::default(),
            stop: Arc::new(AtomicBool::new(false)),
            journal_bytes: Arc::new(AtomicU64::new(0)),
            tail: Arc::default(),
            apart: Arc::default(),
            skipped: Arc::new(skipped),
            epoch_due: Arc::default(),
        };
        shared.set_tail(writer.as_ref().ok());
        let (untold, unseen) = (shared.ring.untold_writes(), shared.ring.unseen_commands());
        if let Err(why) = &writer {
            tracing::error!(%why, "the disk is served without protection");
            let why = format!(
                "not synchronised: {why}; writes are kept as dirty ranges; it is tried again by itself"
            );
            shared.health.broken(&why);
            board.change(State::Degraded, why);
        }
        let pipeline = Pipeline::new(shared.clone(), writer.ok(), stamp, batch_settings(&settings))?;
        let (apply_now, wanted) = mpsc::channel(64);
        let verification = Verification::open(&settings.dir);
        let agent = Arc::new(Agent {
            settings,
            surroundings,
            shared,
            volumes,
            apply_now,
            servers: Mutex::new(Vec::new()),
            serving: AtomicBool::new(false),
            halt: Halt::default(),
            operator: Mutex::default(),
            untold_seen: AtomicU64::new(untold),
            unseen_seen: AtomicU64::new(unseen),
            due: Mutex::default(),
            ills: Mutex::default(),
            looks: Looks::default(),
            verification,
            proof: Verification::default(),
            copy: Arc::new(Mutex::new(copy)),
            failure: watch::Sender::new(None),
        });
        let mut beats = None;
        if agent.settings.capture == conf::Capture::Nbd {
            let (first, dir) = (agent.clone(), ring_dir.clone());
            // Before anybody is served.
            match on_thread("af-alive", move || Heart::new(&first, &dir)).await? {
                Ok(heart) => {
                    beats = Some(agent.clone().spawn("af-alive", move |agent| {
                        heart.run(agent);
                        Some(())
                    })?);
                }
                Err(error) => tracing::warn!(%error, "{}", alive::SILENT),
            }
        }
        let first = agent.clone();
        // It looks at what the last run has kept in the agent's directory.
        let begin = move || {
            let captured = Lsn(first.shared.ring.captured_lsn());
            ClockWatch::begin(&first.settings.dir, Times::now(), captured, last_time_ns)
        };
        let clock = on_thread("af-clock", begin).await?;
        let pipeline = agent.clone().spawn("af-journal", move |agent| match pipeline.run(agent) {
            Ok(ended) => Some(ended),
            Err(error) => {
                agent.fail(error);
                None
            }
        })?;
        let sync = agent.clone().spawn("af-sync", move |agent| {
            let done = agent.serve().and_then(|()| Engine::new(agent).run(&cause));
            if let Err(error) = done {
                agent.fail(error);
            }
            Some(())
        })?;
        let (stop_link, stopped) = watch::channel(false);
        let link = LinkSettings::new(&agent.settings, identity, agent.surroundings.socket.clone())?;
        let link = Link::new(link, agent.clone(), wanted).run(stopped);
        let link = tokio::spawn(agent.clone().supervised("link", link));
        let upkeep = tokio::spawn(agent.clone().supervised("upkeep", upkeep(agent.clone(), clock)));
        Ok(Handle {
            agent,
            pipeline: Some(pipeline),
            sync: Some(sync),
            alive: beats,
            link,
            upkeep,
            stop_link,
            ring_dir,
            _lock: lock,
        })
    }
}

/// The ring and the volumes as the agent holds them.
fn assemble(
    ring: OpenRing,
    opened: Vec<OpenVolume>,
    state: &Arc<Mutex<StateFile>>,
    board: &Arc<Board>,
) -> (Ring, Vec<Arc<Volume>>) {
    let region = match ring {
        OpenRing::Kernel(group) => {
            let volumes = opened.into_iter().map(|volume| {
                let disk = match volume.content {
                    Opened::Device(disk) => disk,
                    Opened::Front(_) => None,
                };
                Arc::new(Volume::device(volume.known.id.0, volume.known.name, disk))
            });
            return (Ring::Kernel(InKernel::new(group)), volumes.collect());
        }
        OpenRing::Front(region) => Arc::new(region),
    };
    if !region.is_pinned() {
        tracing::warn!(
            "the ring could not be locked in memory; raise RLIMIT_MEMLOCK (LimitMEMLOCK=) above its size"
        );
    }
    let mut in_flight = Vec::new();
    let mut volumes = Vec::new();
    for volume in opened {
        let Opened::Front(backing) = volume.content else { continue };
        let uuid = uuid::Uuid::from_bytes(volume.known.uuid.0);
        let (id, name) = (volume.known.id.0, volume.known.name);
        let state = state.clone();
        let on_gap: OnGap = Arc::new(move |cause| gaps::remember(&state, cause));
        let (region, board) = (region.clone(), board.clone());
        let captured = CapturedVolume::new(id, name, uuid, backing, region, board, on_gap);
        in_flight.push(captured.in_flight.clone());
        volumes.push(Arc::new(Volume::front(Arc::new(captured))));
    }
    (Ring::Front(Front::new(region, in_flight)), volumes)
}

/// Runs blocking work on a named thread and awaits it.
pub(crate) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    let run = move || {
        // The receiver is gone only when the caller gave up.
        let _ = done.send(work());
    };
    machine::spawn(name, run)
        .map_err(|error| Error::because(ErrorKind::Io, format!("start thread {name}"), error))?;
    result.await.map_err(|_| Error::new(ErrorKind::Stopped, format!("thread {name} ended without a result")))
}

/// One agent a state directory: the lock lives as long as the handle.
fn lock_dir(dir: &Path) -> Result<File> {
    let io = |what: &str, error| Error::because(ErrorKind::Io, format!("{what} {}", dir.display()), error);
    std::fs::create_dir_all(dir).map_err(|error| io("create", error))?;
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| io("open the lock in", error))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let at = format!("{}: another agent runs on this directory; stop it first", dir.display());
        Error::new(ErrorKind::Busy, at)
    })?;
    Ok(file)
}

fn batch_settings(settings: &conf::Replicator) -> BatchSettings {
    let journal = &settings.journal;
    BatchSettings {
        compression: match journal.compression {
            conf::Compression::Off => Compression::Off,
            conf::Compression::Zstd(level) => Compression::Zstd(level),
        },
        adaptive: journal.adaptive,
        max_bytes: usize::try_from(journal.max_batch_bytes).unwrap_or(usize::MAX),
        max_delay: journal.max_batch_delay,
        quota_bytes: journal.quota,
        threads: usize::try_from(journal.compress_threads).unwrap_or(1),
    }
}

impl Agent {
    /// A named thread; its panic is a failure of the agent, never a silent end.
    fn spawn<T: Send + 'static>(
        self: Arc<Self>,
        name: &str,
        work: impl FnOnce(&Agent) -> Option<T> + Send + 'static,
    ) -> Result<JoinHandle<Option<T>>> {
        let called = name.to_owned();
        let guarded = move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&self)));
            ended.unwrap_or_else(|panic| {
                self.fail(panicked("thread", &called, &machine::said(&*panic)));
                None
            })
        };
        machine::spawn(name, guarded)
            .map_err(|error| Error::because(ErrorKind::Io, format!("start thread {name}"), error))
    }

    /// A task that lives as long as the run; its panic is a failure of the agent, never a silent end. What a
    /// link meets ends its connection and no more ([`Link::run`]): this is for what nothing else has caught.
    async fn supervised(self: Arc<Self>, name: &'static str, work: impl Future<Output = ()>) {
        if let Err(said) = machine::caught(work).await {
            self.fail(panicked("task", name, &said));
        }
    }

    /// The state's file, to change it. ⚠ Whoever holds it may wait for a disk: never on the runtime's
    /// threads, and never to read alone.
    pub(crate) fn state(&self) -> MutexGuard<'_, StateFile> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered, without waiting for a disk.
    pub(crate) fn remembered(&self) -> Arc<SourceState> {
        self.shared.remembered.get()
    }

    /// Keeps orders of the operator off; `None` while one is carried out.
    pub(crate) fn between_orders(&self) -> Option<MutexGuard<'_, ()>> {
        match self.operator.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn fail(&self, error: Error) {
        tracing::error!(%error, "the agent cannot go on");
        self.failure.send_replace(Some(Arc::new(error)));
    }

    /// Whether the journal ends where capture does, and nothing is owed to the replica but its frames.
    pub(crate) fn is_whole(&self, journaled: &Position) -> bool {
        let ring = &self.shared.ring;
        journaled.lsn.0 == ring.captured_lsn()
            && ring.loss().is_none()
            && self.detached_between().is_none()
            // Ranges of failed writes, still to be read again: only the ring remembers them.
            && !self.volumes.iter().any(|volume| volume.is_attached() && ring.is_dirty(volume.id))
            && !self.volumes.iter().any(|volume| volume.sync_failed())
    }

    /// Whether everything captured up to now can be named as a recovery point.
    fn consistent(&self) -> std::result::Result<(), Error> {
        self.notice_overflow();
        let (state, why) = self.shared.board.state();
        match state {
            State::Replicating if self.detached_between().is_none() => Ok(()),
            _ => Err(Error::new(ErrorKind::NotPossible, format!("the group is {}: {why}", name_of(state)))),
        }
    }
}

/// A thread or task of ours that ended by a fault of this program.
fn panicked(what: &str, name: &str, said: &str) -> Error {
    Error::new(
        ErrorKind::Stopped,
        format!("{what} {name} panicked ({said}): a fault of this program; its log says where"),
    )
}

/// The state's name as status shows it.
pub(crate) fn name_of(state: State) -> String {
    serde_json::to_value(state).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Looks after the clocks once a second, and has the disks looked at.
async fn upkeep(agent: Arc<Agent>, mut watch: ClockWatch) {
    let captured = |agent: &Agent| Lsn(agent.shared.ring.captured_lsn());
    loop {
        agent.notice_overflow();
        agent.look_aside();
        watch.look(Times::now(), captured(&agent));
        // Between the start of an epoch and its synchronisation the stream has no place for it.
        if agent.shared.board.state().0 == State::Replicating
            && let Some(step) = watch.pending()
            && agent.shared.ring.event(Op::ClockJump, 0, &step.encode()).is_ok()
        {
            watch.told();
        }
        // What the stream does not say yet is a point that could be asked for.
        tokio::time::sleep(if watch.pending().is_some() { TELL } else { UPKEEP }).await;
    }
}

impl Agent {
    /// What the agent's own directory is to remember: never on the runtime's threads.
    pub(crate) fn keep_state(&self) {
        self.shared.skipped.keep();
        let captured = Lsn(self.shared.ring.captured_lsn());
        if let Err(error) = self.state().extend_lease(captured) {
            tracing::warn!(%error, "the lsn lease cannot be extended");
        }
    }
}

impl Handle {
    /// What `afterimage status` shows.
    pub fn status(&self) -> Status {
        Status { groups: vec![self.agent.status()] }
    }

    /// Newest lsn given out.
    pub fn captured_lsn(&self) -> Lsn {
        Lsn(self.agent.shared.ring.captured_lsn())
    }

    /// The volumes that the NBD front serves.
    pub fn exports(&self) -> Vec<Arc<CapturedVolume>> {
        self.agent.volumes.iter().filter_map(|volume| volume.served().cloned()).collect()
    }

    /// Follows what the receiver says.
    pub fn watch_peer(&self) -> watch::Receiver<crate::progress::PeerView> {
        self.agent.shared.progress.watch_peer()
    }

    /// Gives the newest captured lsn a name.
    ///
    /// # Errors
    /// The group is not consistent now, or the name is not allowed.
    pub fn bookmark(&self, name: &str) -> Result<Lsn> {
        journal::record::check_name(name)
            .map_err(|what| Error::new(ErrorKind::Settings, format!("bookmark {name:?}: {what}")))?;
        self.agent.consistent()?;
        match self.agent.shared.ring.event(Op::Bookmark, 0, name.as_bytes()) {
            Ok(lsn) => Ok(Lsn(lsn)),
            Err(Refusal::Failed(error)) => Err(error),
            Err(_) => Err(Error::new(
                ErrorKind::NotPossible,
                "the ring takes no records now: this would be no recovery point",
            )),
        }
    }

    /// Waits until everything captured so far is on the replica.
    ///
    /// # Errors
    /// None today; the outcome says what happened.
    pub async fn wait(&self, at_most: Duration) -> Result<crate::wait::WaitOutcome> {
        crate::wait::until_on_replica(&self.agent, at_most).await
    }

    /// Resolves when the NBD sockets are open, where there are any.
    pub async fn until_served(&self) {
        while !self.agent.serving.load(Ordering::Acquire) {
            tokio::time::sleep(SOCKETS_OPEN).await;
        }
    }

    /// Resolves when the agent cannot go on.
    pub async fn failed(&self) -> Arc<Error> {
        let mut failure = self.agent.failure.subscribe();
        match failure.wait_for(Option::is_some).await {
            Ok(found) => found.clone().unwrap_or_else(|| Arc::new(Error::new(ErrorKind::Stopped, "stopped"))),
            Err(_) => Arc::new(Error::new(ErrorKind::Stopped, "the agent is gone")),
        }
    }
}
