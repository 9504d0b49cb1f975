//! The run of a source: its threads, its tasks, and the handle that the command line holds.
//!
//! | thread or task | does |
//! |---|---|
//! | `nbd-*` | serve clients (room `nbd`), through `capture/nbd` |
//! | `af-journal` | `pipeline`: ring → frames → source journal |
//! | `af-pack-N` | compression |
//! | `af-serve` | offline synchronisation, then opens the NBD sockets |
//! | link task, `af-ship` | `link`: the connection, its acknowledgements, its reader |
//! | upkeep task | clock jumps, the lsn lease |

use std::fs::File;
use std::iter::once;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use journal::compress::Compression;
use journal::frame::Stamp;
use journal::io::RealDisk;
use journal::writer::Writer;
use journal::{Lsn, Position, Positions};
use kfilter::{Captured, Entry, Mode, Op};
use tokio::sync::{mpsc, watch};

use crate::SharedRing;
use crate::buffered_disk::BufferedDisk;
use crate::capture::nbd::{CapturedVolume, OnGap};
use crate::clock::{JumpWatch, now_ns};
use crate::error::{Error, ErrorKind, Result};
use crate::link::{Link, LinkSettings};
use crate::pipeline::{BatchSettings, Pipeline, Shared};
use crate::progress::Progress;
use crate::resync::{self, Halt};
use crate::start::{self, Repair, Started};
use crate::state::{Gap, StateFile};
use crate::status::{Board, GroupStatus, State, Status, VolumeStatus};

/// How long a stop waits for clients' requests in flight.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How often clocks and lease are looked at.
const UPKEEP: Duration = Duration::from_secs(1);

/// The source daemon.
pub struct Replicator;

/// A running source. Dropping it without [`Handle::shutdown`] is like a kill: the next start takes over.
pub struct Handle {
    agent: Arc<Agent>,
    pipeline: Option<thread::JoinHandle<Option<(Position, bool)>>>,
    serve: Option<thread::JoinHandle<Option<()>>>,
    link: tokio::task::JoinHandle<()>,
    upkeep: tokio::task::JoinHandle<()>,
    stop_link: watch::Sender<bool>,
    ring_dir: std::path::PathBuf,
    _lock: File,
}

/// What threads and tasks share.
pub(crate) struct Agent {
    pub(crate) settings: conf::Replicator,
    pub(crate) shared: Shared,
    pub(crate) volumes: Vec<Arc<CapturedVolume>>,
    /// Lsns that `wait` wants applied soon.
    pub(crate) apply_now: mpsc::Sender<Lsn>,
    servers: Mutex<Vec<nbd::Server>>,
    serving: AtomicBool,
    halt: Halt,
    failure: watch::Sender<Option<Arc<Error>>>,
}

impl Replicator {
    /// Starts a source on the current tokio runtime. When it returns, capture is ready or a synchronisation runs;
    /// the NBD sockets open when that is done.
    ///
    /// # Errors
    /// Settings that do not fit what is there; somebody else serves the group; no room for the ring.
    pub async fn start(settings: conf::Replicator) -> Result<Handle> {
        let identity = wire::Identity::load(&settings.identity_dir)
            .map_err(|error| Error::because(ErrorKind::Settings, "load this side's identity", error))?;
        let for_thread = settings.clone();
        let (lock, started) = on_thread("af-start", move || {
            let lock = lock_dir(&for_thread.dir)?;
            Ok::<_, Error>((lock, start::start(&for_thread)?))
        })
        .await??;
        let ring_dir = start::ring_dir(&settings, &started.state);
        let Started { state, volumes, ring, writer, repair, cause, first, last_time_ns } = started;
        if !ring.is_pinned() {
            tracing::warn!(
                "the ring could not be locked in memory; raise RLIMIT_MEMLOCK (LimitMEMLOCK=) above its size"
            );
        }
        let ring = Arc::new(ring);
        let known = state.get().clone();
        let stamp = Stamp { group: known.group, lineage: known.lineage, epoch: known.epoch };
        let board =
            Arc::new(Board::new(&settings.group, settings.volume.iter().map(|volume| volume.name.clone())));
        let epoch_start = Position::epoch_start(known.lineage, known.epoch, known.epoch_start);
        let progress = match &writer {
            Ok(writer) => {
                let segments = writer.segments().iter();
                let backlog = segments.map(|s| ((s.epoch.number, s.last_lsn), s.first_time_ns, s.bytes));
                Progress::new(writer.appended(), backlog)
            }
            Err(_) => Progress::new(epoch_start, std::iter::empty()),
        };
        let shared = Shared {
            ring: ring.clone(),
            progress: Arc::new(progress),
            board: board.clone(),
            state: Arc::new(Mutex::new(state)),
            sync_cause: Arc::new(Mutex::new(cause.clone())),
            may_wait: Arc::new(AtomicBool::new(!matches!(repair, Repair::None))),
            broken: Arc::new(AtomicBool::new(writer.is_err())),
            stop: Arc::new(AtomicBool::new(false)),
            journal_bytes: Arc::new(AtomicU64::new(0)),
        };
        let volumes: Vec<Arc<CapturedVolume>> = volumes
            .into_iter()
            .map(|volume| {
                let uuid = uuid::Uuid::from_bytes(volume.known.uuid.0);
                let (id, name) = (volume.known.id.0, volume.known.name);
                let state = shared.state.clone();
                let on_gap: OnGap = Arc::new(move |cause| remember_gap(&state, cause));
                let (ring, board) = (ring.clone(), board.clone());
                Arc::new(CapturedVolume::new(id, name, uuid, volume.backing, ring, board, on_gap))
            })
            .collect();
        let tail = writer.as_ref().map(Writer::shared).ok();
        let no_journal = writer.as_ref().err().cloned();
        let pipeline = Pipeline::new(shared.clone(), writer.ok(), stamp, batch_settings(&settings))?;
        let (apply_now, wanted) = mpsc::channel(64);
        let broken = shared.broken.clone();
        let agent = Arc::new(Agent {
            settings,
            shared,
            volumes,
            apply_now,
            servers: Mutex::new(Vec::new()),
            serving: AtomicBool::new(false),
            halt: Halt { stop: AtomicBool::new(false), broken },
            failure: watch::Sender::new(None),
        });
        let pipeline = agent.clone().spawn("af-journal", move |agent| match pipeline.run() {
            Ok(ended) => Some(ended),
            Err(error) => {
                agent.fail(error);
                None
            }
        })?;
        let serve = agent.clone().spawn("af-serve", move |agent| {
            let synchronised = match no_journal {
                Some(why) => Err(Error::new(ErrorKind::NotPossible, why)),
                None => agent.synchronise(&repair, cause, first),
            };
            if let Err(error) = agent.serve_after(synchronised) {
                agent.fail(error);
            }
            Some(())
        })?;
        let (stop_link, stopped) = watch::channel(false);
        let link = match tail {
            Some(tail) => {
                let settings = LinkSettings::new(&agent.settings, identity)?;
                tokio::spawn(Link::new(settings, agent.clone(), tail, wanted).run(stopped))
            }
            None => tokio::spawn(async {}),
        };
        let upkeep = tokio::spawn(upkeep(agent.clone(), last_time_ns));
        Ok(Handle {
            agent,
            pipeline: Some(pipeline),
            serve: Some(serve),
            link,
            upkeep,
            stop_link,
            ring_dir,
            _lock: lock,
        })
    }
}

/// Runs blocking work on a named thread and awaits it.
async fn on_thread<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // The receiver is gone only when the caller gave up.
            let _ = done.send(work());
        })
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
    ) -> Result<thread::JoinHandle<Option<T>>> {
        let called = name.to_owned();
        let guarded = move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&self)));
            ended.unwrap_or_else(|_| {
                self.fail(Error::new(
                    ErrorKind::Stopped,
                    format!("thread {called} panicked; the log says where"),
                ));
                None
            })
        };
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(guarded)
            .map_err(|error| Error::because(ErrorKind::Io, format!("start thread {name}"), error))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, StateFile> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: Error) {
        tracing::error!(%error, "the agent cannot go on");
        self.failure.send_replace(Some(Arc::new(error)));
    }

    /// Repairs what is to be repaired; nothing is served meanwhile.
    fn synchronise(&self, repair: &Repair, cause: String, first: bool) -> Result<()> {
        match repair {
            Repair::None => Ok(()),
            Repair::Dirty(ranges) => {
                let ranges_of = |volume: &CapturedVolume| {
                    let found = ranges.iter().find(|(id, _)| id.0 == volume.id);
                    found.map(|(_, ranges)| ranges.clone()).unwrap_or_default()
                };
                self.emit(State::Resyncing, cause, ranges_of)
            }
            Repair::Everything => {
                let gap = self.state().get().needs_resync.clone();
                self.announce_volumes()?;
                let state = if first { State::Syncing } else { State::Resyncing };
                self.emit(state, cause, |volume| once(0..nbd::Export::size_bytes(volume)).collect())?;
                // Only the gap that this synchronisation began with: a newer one is not repaired by it.
                self.state().update(|state| {
                    if state.needs_resync == gap {
                        state.needs_resync = None;
                    }
                })
            }
        }
    }

    /// Opens the front whatever became of the synchronisation: a protected disk is served also when its journal or its
    /// receiver is not to be had. What was not synchronised stays remembered, and the group says so.
    fn serve_after(&self, synchronised: Result<()>) -> Result<()> {
        if let Err(error) = synchronised {
            if self.halt.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            let cause = match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            };
            tracing::error!(%cause, "not synchronised; the disk is served without protection");
            self.shared.ring.set_mode_bitmap(kfilter::dirty::CAUSE_AGENT, now_ns());
            let why = format!(
                "not synchronised: {cause}; writes are not recorded, restart the agent to synchronise"
            );
            self.shared.board.change(State::Degraded, why);
        }
        self.shared.may_wait.store(false, Ordering::Release);
        self.serve()
    }

    /// Every epoch states its volumes before anything else.
    fn announce_volumes(&self) -> Result<()> {
        let known = self.state().get().volumes.clone();
        for volume in &known {
            let mut entry = Entry::event(Op::Volume, volume.id.0, 0);
            let payload = start::volume_record(volume);
            entry.payload_len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
            resync::put(&self.shared.ring, entry, &payload, &self.halt)?;
        }
        Ok(())
    }

    /// Begin, content, end; returns when the end is journaled.
    fn emit(
        &self,
        state: State,
        cause: String,
        ranges: impl Fn(&CapturedVolume) -> Vec<std::ops::Range<u64>>,
    ) -> Result<()> {
        let ring = &self.shared.ring;
        let volumes = self.volumes.iter().map(|volume| (volume.as_ref(), ranges(volume))).collect();
        let work = resync::Work { volumes, state, cause };
        resync::until_room("begin", &self.halt, || ring.begin_resync(now_ns()))?;
        let started = Instant::now();
        let sent = resync::emit(&work, ring, &self.shared.board, &self.halt)?;
        let end = resync::until_room("end", &self.halt, || ring.end_resync(now_ns()))?;
        let mut at = self.shared.progress.position();
        while at.lsn.0 < end {
            self.halt.check()?;
            self.shared.progress.wait_beyond(&at, Duration::from_millis(100));
            at = self.shared.progress.position();
        }
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(cause = %work.cause, content_bytes = sent, seconds, "synchronised");
        Ok(())
    }

    /// Opens the NBD sockets.
    fn serve(&self) -> Result<()> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.halt.stop.load(Ordering::Acquire) {
            return Ok(());
        }
        for (volume, settings) in self.volumes.iter().zip(&self.settings.volume) {
            let mut listen = vec![nbd::Listen::Unix { path: settings.nbd.clone(), mode: 0o600 }];
            listen.extend(settings.nbd_tcp.map(nbd::Listen::Tcp));
            let limits = nbd::Settings {
                max_connections: usize::try_from(self.settings.nbd.max_connections).unwrap_or(16),
                max_connections_per_export: usize::try_from(self.settings.nbd.max_connections).unwrap_or(16),
                pool_threads: usize::try_from(self.settings.nbd.threads).unwrap_or(4),
                ..nbd::Settings::default()
            };
            let server = nbd::Server::start(&listen, vec![volume.clone()], limits).map_err(|error| {
                Error::because(ErrorKind::Settings, format!("serve volume {} over NBD", volume.name), error)
            })?;
            servers.push(server);
        }
        self.serving.store(true, Ordering::Release);
        drop(servers);
        self.shared.board.change(State::Replicating, "");
        Ok(())
    }

    /// Whether the journal ends where capture does, and nothing is owed to the replica but its frames.
    fn is_whole(&self, journaled: &Position) -> bool {
        let ring = &self.shared.ring;
        journaled.lsn.0 == ring.captured_lsn()
            && ring.loss().is_none()
            && !self.volumes.iter().any(|volume| volume.sync_failed())
    }

    /// An overflow shows in the ring before anything else; the state follows it as soon as anybody looks.
    pub(crate) fn notice_overflow(&self) {
        let synchronising = self.shared.may_wait.load(Ordering::Acquire);
        if synchronising || self.is_recording() || self.shared.broken.load(Ordering::Acquire) {
            return;
        }
        let mib = self.shared.ring.ring_bytes() >> 20;
        let why = format!(
            "the ring of {mib} MiB overflowed: writes came faster than the source journal took them; they are kept as \
             dirty ranges, restart the agent to synchronise these"
        );
        if self.shared.ring.loss().is_some_and(|loss| loss.cause == kfilter::dirty::CAUSE_RING_FULL) {
            self.shared.board.change(State::Degraded, why);
        }
    }

    /// Whether everything captured up to now can be named as a recovery point.
    fn consistent(&self) -> std::result::Result<(), Error> {
        self.notice_overflow();
        let (state, why) = self.shared.board.state();
        match state {
            State::Replicating => Ok(()),
            _ => Err(Error::new(ErrorKind::NotPossible, format!("the group is {}: {why}", name_of(state)))),
        }
    }
}

/// Makes a gap durable that capture has found; an older one stays the cause.
fn remember_gap(state: &Mutex<StateFile>, cause: &str) {
    let gap = Gap { cause: cause.to_owned(), since_ns: now_ns() };
    let mut file = state.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = file.update(|state| _ = state.needs_resync.get_or_insert(gap)) {
        // The dirty map says the same on this boot, and an unclean start after a reboot.
        tracing::error!(%error, "the gap cannot be remembered in the state file");
    }
}

/// The state's name as status shows it.
pub(crate) fn name_of(state: State) -> String {
    serde_json::to_value(state).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Looks after the clocks and the lease once a second.
async fn upkeep(agent: Arc<Agent>, last_time_ns: u64) {
    let mut watch = JumpWatch::new(Instant::now(), now_ns());
    // A clock that stands before the newest record was set back while nothing ran.
    let mut pending =
        JumpWatch::new(Instant::now(), last_time_ns).look(Instant::now(), now_ns()).filter(|jump| *jump < 0);
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        agent.notice_overflow();
        pending = watch.look(Instant::now(), now_ns()).or(pending);
        // Between the start of an epoch and its synchronisation the stream has no place for it.
        if agent.shared.board.state().0 == State::Replicating
            && let Some(jump_ns) = pending.take()
        {
            tracing::warn!(jump_ns, "the clock jumped; `points` and `restore` will say so");
            let entry = Entry { payload_len: 8, ..Entry::event(Op::ClockJump, 0, 8) };
            // A stream that takes no records now is a gap already.
            let _ = agent.shared.ring.capture(once(entry), &jump_ns.to_le_bytes(), now_ns());
        }
        let captured = Lsn(agent.shared.ring.captured_lsn());
        if let Err(error) = agent.state().extend_lease(captured) {
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
        let entry = Entry::event(Op::Bookmark, 0, u32::try_from(name.len()).unwrap_or(u32::MAX));
        match self.agent.shared.ring.capture(once(entry), name.as_bytes(), now_ns()) {
            Ok(Captured::Ring(token)) => Ok(Lsn(token.last_lsn())),
            Ok(Captured::Bits) | Err(_) => Err(Error::new(
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

    /// Resolves when the agent cannot go on.
    pub async fn failed(&self) -> Arc<Error> {
        let mut failure = self.agent.failure.subscribe();
        match failure.wait_for(Option::is_some).await {
            Ok(found) => found.clone().unwrap_or_else(|| Arc::new(Error::new(ErrorKind::Stopped, "stopped"))),
            Err(_) => Arc::new(Error::new(ErrorKind::Stopped, "the agent is gone")),
        }
    }

    /// Stops cleanly: requests in flight are answered, everything captured is journaled and synced, and a clean mark
    /// lets the next start go on without a synchronisation.
    ///
    /// # Errors
    /// The clean mark could not be written: the next start takes the ring over, or synchronises.
    pub async fn shutdown(mut self) -> Result<()> {
        self.agent.halt.stop.store(true, Ordering::Release);
        if let Some(serve) = self.serve.take() {
            on_thread("af-stop", move || drop(serve.join())).await?;
        }
        let servers = std::mem::take(&mut *self.agent.servers.lock().unwrap_or_else(PoisonError::into_inner));
        let mut left = 0;
        for server in servers {
            left += server.shutdown(STOP_DEADLINE).await;
        }
        let volumes = self.agent.volumes.clone();
        let closing = move || {
            let mut closed = true;
            for volume in &volumes {
                closed &= volume.close(STOP_DEADLINE);
            }
            closed
        };
        let closed = on_thread("af-stop", closing).await?;
        self.upkeep.abort();
        // It ends as cancelled; until then it holds the agent, and with it the backings.
        let _ = (&mut self.upkeep).await;
        self.agent.shared.stop.store(true, Ordering::Release);
        self.agent.shared.ring.wake_consumer();
        let pipeline = self.pipeline.take();
        let ended =
            on_thread("af-stop", move || pipeline.and_then(|thread| thread.join().ok().flatten())).await?;
        self.stop_link.send_replace(true);
        self.agent.shared.progress.close();
        // The link says goodbye by itself, within its own limits; a task that panicked has nothing to say.
        if tokio::time::timeout(STOP_DEADLINE, &mut self.link).await.is_err() {
            self.link.abort();
        }
        let served = self.agent.serving.load(Ordering::Acquire);
        match ended {
            Some((position, true)) if served && left == 0 && closed && self.agent.is_whole(&position) => {
                on_thread("af-stop", move || self.mark_clean(&position)).await?
            }
            _ => Ok(()),
        }
    }

    /// Order: 1 journal and backings are durable, 2 the clean mark with the backings' stamps, 3 the ring goes (it holds
    /// nothing).
    fn mark_clean(&self, last: &Position) -> Result<()> {
        let dir = self.agent.settings.dir.join("journal");
        BufferedDisk::settle(&RealDisk, &dir)
            .map_err(|error| Error::because(ErrorKind::Io, format!("sync {}", dir.display()), error))?;
        for volume in &self.agent.volumes {
            nbd::Export::sync(volume.as_ref()).map_err(|error| {
                Error::because(ErrorKind::Io, format!("sync the backing of volume {}", volume.name), error)
            })?;
        }
        for volume in &self.agent.settings.volume {
            // Its times, too: the stamp is read from them, and must be what a crash leaves.
            File::open(&volume.path).and_then(|file| file.sync_all()).map_err(|error| {
                Error::because(ErrorKind::Io, format!("sync {}", volume.path.display()), error)
            })?;
        }
        let paths: Vec<_> =
            self.agent.settings.volume.iter().map(|volume| (&volume.name, &volume.path)).collect();
        self.agent.state().update(|state| {
            for known in &mut state.volumes {
                let path = paths.iter().find(|(name, _)| **name == known.name);
                known.stamp = path.and_then(|(_, path)| start::stamp(path));
            }
            state.clean = Some(last.lsn);
        })?;
        if let Err(error) = std::fs::remove_file(self.ring_dir.join("ring")) {
            tracing::warn!(%error, "the empty ring could not be removed");
        }
        Ok(())
    }
}

impl Agent {
    pub(crate) fn status(&self) -> GroupStatus {
        self.notice_overflow();
        let shared = &self.shared;
        // Downstream first: what is read later can only be further.
        let peer = shared.progress.peer();
        let journaled = shared.progress.position();
        let epoch = self.state().get().epoch.number;
        let captured = Lsn(shared.ring.captured_lsn());
        // A receiver may hold more than this source ever captured (one of them was rolled back): that is trouble, told
        // elsewhere, and no position of ours.
        let held = |lsn: Lsn| lsn.min(captured);
        let positions = Positions {
            captured_lsn: captured,
            journaled_lsn: journaled.lsn.min(captured),
            received_lsn: held(peer.received),
            applied_lsn: held(peer.applied),
            checkpoint_lsn: held(peer.checkpoint),
        };
        positions.assert_order();
        let (backlog_bytes, oldest_ns) = shared.progress.backlog();
        let lost_ns = shared.ring.loss().map(|loss| loss.since_ns);
        let oldest_ns = if peer.received >= captured { None } else { oldest_ns };
        let behind_since = lost_ns.into_iter().chain(oldest_ns).min();
        let lag_ns = behind_since.map_or(0, |since| now_ns().saturating_sub(since));
        let (state, why) = shared.board.state();
        let why = match (why.is_empty(), peer.trouble.is_empty()) {
            (true, _) => peer.trouble.clone(),
            (false, true) => why,
            (false, false) => format!("{why}; {}", peer.trouble),
        };
        let serving = self.serving.load(Ordering::Acquire);
        GroupStatus {
            name: self.settings.group.clone(),
            state,
            why,
            epoch,
            positions,
            rpo_ms: lag_ns / 1_000_000,
            backlog_bytes,
            journal_bytes: shared.journal_bytes.load(Ordering::Relaxed),
            ring_percent: percent(&shared.ring),
            connected: peer.connected.is_some(),
            peer: peer.connected.unwrap_or_else(|| self.settings.receiver.address.clone()),
            volumes: self
                .volumes
                .iter()
                .zip(&self.settings.volume)
                .map(|(volume, settings)| VolumeStatus {
                    name: volume.name.clone(),
                    state: shared.board.volume(&volume.name),
                    size_bytes: nbd::Export::size_bytes(volume.as_ref()),
                    nbd_uri: serving
                        .then(|| format!("nbd+unix:///{}?socket={}", volume.name, uri_path(&settings.nbd))),
                    replica: None,
                    source: Some(settings.path.display().to_string()),
                })
                .collect(),
        }
    }

    /// Whether the ring takes records.
    pub(crate) fn is_recording(&self) -> bool {
        self.shared.ring.mode() == Mode::Ring
    }
}

/// A path as the value of a URI's query: all but letters, digits and `/-_.~` percent-encoded (RFC 3986).
fn uri_path(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(byte);
    path.as_os_str().as_bytes().iter().fold(String::new(), |mut out, byte| {
        if plain(byte) {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
fn percent(ring: &SharedRing) -> u8 {
    (ring.fill_ratio() * 100.0).clamp(0.0, 100.0) as u8
}
