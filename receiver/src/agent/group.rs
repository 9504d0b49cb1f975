//! One group at the receiver: its directory under lock, its two threads, and what the link and the agent ask
//! of it.
//!
//! ```text
//! link ─ attach, submit ─► ingest thread ─ bell ─► apply thread ─► replica
//!                              └──── Progress (watch) ────┴──► acks, status, wait
//! ```
//! A group is created by the first hello of the identity that the settings bind to its name, and is never
//! given to another. It outlives connections; it ends with the agent.

use machine::JoinHandle;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use journal::frame::FrameHeader;
use journal::io::Disk;
use journal::segment::SegmentSummary;
use journal::writer::{Writer, WriterOptions};
use journal::{Epoch, GroupId, Lineage, Lsn, Position};
use machine::{Mutex, MutexGuard};
use tokio::sync::watch;
use wire::message::ErrorCode;

use super::apply_thread::{ApplyThread, Parts};
use super::attach::{Attached, Berth, Newcomer};
use super::bell::Bell;
use super::clock::{ReceiptClock, now_ns};
use super::failure::{self, Failure};
use super::heartbeats::Heartbeats;
use super::orders::{Order, Orders};
use super::progress::Progress;
use super::schedule::Pace;
use crate::copies::Copies;
use crate::error::{Error, ErrorKind, Result};
use crate::history::History;
use crate::ingest::queue::Ingest;
use crate::ingest::thread::{Durable, Place, Runner};
use crate::ingest::{IngestCore, Refusal};
use crate::lock::GroupLock;
use crate::mend::Mender;
use crate::refetch::Fetcher;
use crate::room::{GroupRoom, Rooms};
use crate::scrub::Scrub;
use crate::state::{GroupState, GroupStore, Moment, journal_dir};

/// What a peer says that it is, after its identity was proved and bound to the name by the settings.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Group's name, checked.
    pub name: String,
    /// Group's id.
    pub id: GroupId,
    /// Proved identity.
    pub owner: [u8; 32],
    /// Line of descent of what it holds.
    pub lineage: Lineage,
}

/// What every group needs of its receiver.
#[derive(Clone)]
pub struct Setup {
    /// The disk under everything.
    pub disk: Arc<dyn Disk>,
    /// Whether replicas are held against other programs.
    pub hold_replicas: bool,
    /// Settings.
    pub settings: Arc<conf::Receiver>,
    /// Where final errors go.
    pub failure: Failure,
    /// What all groups share.
    pub rooms: Arc<Rooms>,
}

impl Setup {
    /// A group's directory.
    pub fn group_dir(&self, name: &str) -> PathBuf {
        self.settings.dir.join("groups").join(name)
    }
}

/// See the module.
pub struct Group {
    name: String,
    pub(super) dir: PathBuf,
    id: GroupId,
    owner: [u8; 32],
    lineage: Lineage,
    progress: watch::Sender<Progress>,
    /// The way to the journal.
    pub ingest: Ingest,
    pub(super) bell: Arc<Bell>,
    pub(super) history: Arc<History>,
    pub(super) heartbeats: Arc<Mutex<Heartbeats>>,
    pub(super) orders: Arc<Orders>,
    pub(super) scrub: Arc<Scrub>,
    pub(super) berth: Berth,
    hashing: Arc<tokio::sync::Semaphore>,
    fetcher: Arc<Fetcher>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    // Last: let go when everything that uses the directory has ended.
    _lock: GroupLock,
}

impl Group {
    /// Creates the group of a claim on disk, then opens it. Blocking.
    ///
    /// # Errors
    /// The directory is in use, or the disk refuses.
    pub fn create(setup: &Setup, claim: &Claim) -> Result<Arc<Group>> {
        let dir = setup.group_dir(&claim.name);
        setup.disk.create_dir(&dir).map_err(|e| crate::Error::io(format!("create {}", dir.display()), e))?;
        let lock = GroupLock::take(&dir)?;
        let state = GroupState::new(claim.id, &claim.name, claim.owner, claim.lineage);
        drop(GroupStore::create(setup.disk.clone(), &dir, state)?);
        Group::start(setup, &claim.name, lock)
    }

    /// Opens an existing group: recovers its journal and its replica, starts its threads. Blocking.
    ///
    /// # Errors
    /// The directory is in use, damaged, or the disk refuses.
    pub fn open(setup: &Setup, name: &str) -> Result<Arc<Group>> {
        let lock = GroupLock::take(&setup.group_dir(name))?;
        Group::start(setup, name, lock)
    }

    fn start(setup: &Setup, name: &str, lock: GroupLock) -> Result<Arc<Group>> {
        let dir = setup.group_dir(name);
        let state = GroupStore::open(setup.disk.clone(), &dir)?.state().clone();
        // 1. The journal first: what it kept is durable when it is open, and only that is applied or
        //    announced.
        let writer = open_journal(setup, name, &state)?;
        let history = History::open(setup.disk.clone(), &dir)?;
        history.attach_tail(writer.shared());
        history.note_segments(writer.segments());
        let progress = watch::Sender::new(Progress::at(&writer, state.checkpoint.lsn));
        let bell = Arc::new(Bell::new(pace(&setup.settings.apply)));
        let segments = Arc::new(Mutex::new(writer.segments().to_vec()));
        ring_for_backlog(&bell, &writer, state.checkpoint.lsn);
        let told = Told { bell: bell.clone(), history: history.clone(), segments: segments.clone() };
        let core = IngestCore::new(state.group, writer.appended())?;
        // Undo of one batch, and the segment and its spare that a roll makes meanwhile.
        let reserve_bytes = setup.settings.apply.undo_bytes + 2 * setup.settings.journal.segment_bytes;
        let max_bytes = setup.settings.max_bytes(name);
        let rooms = setup.rooms.clone();
        let room = GroupRoom::new(rooms, setup.disk.clone(), dir.clone(), name, max_bytes, reserve_bytes);
        let place = Place {
            disk: setup.disk.clone(),
            dir: journal_dir(&dir),
            room: room.clone(),
            reserve_bytes,
            clock: ReceiptClock::after(history.newest_receipt_ns()),
        };
        let (ingest, runner) = Runner::new(core, writer, progress.clone(), told, place);
        // 2. Then the replica; whatever is wrong with it, ingest goes on.
        let heartbeats = Arc::new(Mutex::new(Heartbeats::new(state.heartbeat)));
        let orders = Arc::new(Orders::default());
        let scrub = Arc::new(Scrub::default());
        let fetcher = Arc::new(Fetcher::default());
        let (told, rung) = (orders.clone(), bell.clone());
        let mender = Mender {
            disk: setup.disk.clone(),
            history: history.clone(),
            ingest: ingest.clone(),
            fetcher: fetcher.clone(),
            segments: segments.clone(),
            now_ns: super::now_ns,
            changed: Box::new(move || told.leave(&rung, Order::LookAgain)),
            rotten: std::collections::BTreeMap::new(),
        };
        let parts = Parts {
            history: history.clone(),
            bell: bell.clone(),
            heartbeats: heartbeats.clone(),
            segments,
            orders: orders.clone(),
            ingest: ingest.clone(),
            progress: progress.clone(),
            scrub: scrub.clone(),
            room,
        };
        let copies = Copies::open(&setup.disk, &dir);
        let apply = ApplyThread::open(setup, name, parts)?;
        let (scrubbed, disk, scrubbed_dir) = (scrub.clone(), setup.disk.clone(), dir.clone());
        // 3. Threads last: nothing is announced before everything is recovered.
        let threads = vec![
            failure::spawn(format!("ingest-{name}"), &setup.failure, move || runner.run())?,
            failure::spawn(format!("apply-{name}"), &setup.failure, move || apply.run())?,
            failure::spawn(format!("scrub-{name}"), &setup.failure, move || {
                scrubbed.run(&disk, &scrubbed_dir, mender);
                Ok(())
            })?,
        ];
        Ok(Arc::new(Group {
            name: name.to_owned(),
            dir,
            id: state.group,
            owner: state.owner,
            lineage: state.lineage,
            progress,
            ingest,
            bell,
            history,
            heartbeats,
            orders,
            scrub,
            berth: Berth::new(name, copies),
            hashing: Arc::new(tokio::sync::Semaphore::new(1)),
            fetcher,
            threads: Mutex::new(threads),
            _lock: lock,
        }))
    }

    /// Operator's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks a claim against what is on disk.
    ///
    /// # Errors
    /// The group is another's, or another group or line of descent of the same name.
    pub fn check(&self, claim: &Claim) -> std::result::Result<(), Refusal> {
        if claim.owner != self.owner {
            let what = format!("group {} was created by another identity and stays its own", self.name);
            return Err(Refusal::new(ErrorCode::GroupNotYours, what));
        }
        if claim.id != self.id {
            let what = format!(
                "group {} here is {}, the source's is {}: it is another group of the same name. If the source lost its \
                 directory, bring it back from a backup; or choose a new `group` in the source's settings, add it to \
                 `groups` of its [[source]] here and restart this receiver: it is synchronised as a new group, and the \
                 history of {} stays",
                self.name, self.id, claim.id, self.name
            );
            return Err(Refusal::new(ErrorCode::GroupNotYours, what));
        }
        if claim.lineage != self.lineage {
            let what =
                format!("lineage {} is held of group {}, not {}", self.lineage, self.name, claim.lineage);
            return Err(Refusal::new(ErrorCode::LineageMismatch, what));
        }
        Ok(())
    }

    /// Makes a connection the group's one connection.
    ///
    /// # Errors
    /// Another copy of the source has the place, or the receiver is stopping.
    pub async fn attach(&self, newcomer: Newcomer) -> std::result::Result<Attached, Refusal> {
        let attached = self.berth.attach(&self.ingest, newcomer).await?;
        // What an earlier visit claimed, and cannot be held against anything here, ends with this one.
        lock(&self.heartbeats).begin_visit();
        self.bell.ring(|schedule| schedule.forget_wanted());
        Ok(attached)
    }

    /// The source of this session has a new token.
    pub async fn goes_on(&self, attached: &Attached, instance: wire::Instance) {
        self.berth.goes_on(&attached.session, instance).await;
    }

    /// The next copy of the source that comes is the one.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`] while one is connected.
    pub async fn admit(&self) -> Result<()> {
        let admitted = self.berth.admit().await;
        admitted.map_err(|why| Error::new(ErrorKind::NotPossible, why))?
    }

    /// Where the group stands, now and from now on.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// A volume's replica, to be read.
    ///
    /// # Errors
    /// As [`History::replica`] tells.
    pub fn replica(&self, volume: journal::VolumeId) -> Result<Arc<dyn journal::io::File>> {
        self.history.replica(volume).map(|(_, file)| file)
    }

    /// The turn to read a replica for a source's question.
    pub fn hashing(&self) -> Arc<tokio::sync::Semaphore> {
        self.hashing.clone()
    }

    /// Carries questions for rotten frames to the source that is connected, until the connection fails.
    pub async fn refetch(&self, connection: &quinn::Connection, features: u64) -> wire::Error {
        // Whatever waits for a source is asked for now.
        self.fetcher.carry(connection, features, || self.scrub.look_again()).await
    }

    /// The source spoke of its newest lsn.
    pub fn heartbeat(&self, beat: Moment) {
        lock(&self.heartbeats).heard(beat, machine::now(), now_ns());
    }

    /// Applies up to `lsn` without waiting for fuller batches.
    pub fn apply_now(&self, lsn: Lsn) {
        self.bell.ring(|schedule| schedule.want(lsn));
    }

    /// Ends both threads in good order. Blocking: a batch under way is finished, the replica stamped.
    pub fn stop(&self) {
        self.ingest.stop();
        self.bell.stop();
        self.scrub.stop();
        for thread in lock(&self.threads).drain(..) {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

fn open_journal(setup: &Setup, name: &str, state: &GroupState) -> Result<Writer> {
    let dir = journal_dir(&setup.group_dir(name));
    let segment_bytes = setup.settings.journal.segment_bytes;
    let options = WriterOptions { group: state.group, segment_bytes };
    let now_ns = super::now_ns();
    if Writer::exists(&*setup.disk, &dir)? {
        let (writer, recovery) = Writer::open(setup.disk.clone(), &dir, options, now_ns)?;
        if let Some((offset, why)) = recovery.torn {
            tracing::info!(group = name, segment = recovery.segment, offset, why, "cut a torn tail");
        }
        let (durable, applied) = (writer.durable(), &state.reached().position);
        if durable.order() < applied.order() {
            return Err(Error::corrupt(format!(
                "{}: the journal ends at lsn {} of epoch {}, the replica was at lsn {} of epoch {}: it was replaced or \
                 rolled back; bring its own journal back, or remove the group's directory and synchronise again",
                dir.display(),
                durable.lsn,
                durable.epoch.number,
                applied.lsn,
                applied.epoch.number
            )));
        }
        return Ok(writer);
    }
    if state.applied_batch > 0 {
        return Err(Error::corrupt(format!(
            "{}: the journal is missing, though batch {} of it is applied: bring it back, or remove the group's \
             directory and synchronise again",
            dir.display(),
            state.applied_batch
        )));
    }
    let start = Position::epoch_start(state.lineage, Epoch::default(), Lsn::ZERO);
    Ok(Writer::create(setup.disk.clone(), &dir, options, start, now_ns)?)
}

fn pace(apply: &conf::Apply) -> Pace {
    let conf::Apply { batch_bytes, interval, idle, min_interval, .. } = *apply;
    Pace { batch_bytes, interval, idle, min_interval }
}

/// What was durable and not applied when we were here last is applied without waiting for more.
fn ring_for_backlog(bell: &Bell, writer: &Writer, checkpoint: Lsn) {
    let durable = writer.durable().lsn;
    if durable > checkpoint {
        let behind = writer.segments().iter().filter(|segment| segment.last_lsn > checkpoint);
        let bytes = behind.map(|segment| segment.bytes).sum();
        bell.ring(|schedule| {
            schedule.received(durable, bytes, machine::now());
            schedule.want(durable);
        });
    }
}

/// Ingest's news, passed on to history and the apply thread.
struct Told {
    bell: Arc<Bell>,
    history: Arc<History>,
    segments: Arc<Mutex<Vec<SegmentSummary>>>,
}

impl Durable for Told {
    fn frame(&mut self, header: &FrameHeader, frame: &[u8], received_ns: u64) {
        if let Err(error) = self.history.note_frame(header, frame, received_ns) {
            // The applier meets the same frame and stops there; until then only its bookmarks are missing.
            tracing::warn!(lsn = %header.first_lsn, %error, "a frame's events cannot be read");
        }
    }

    fn received(&mut self, last: Lsn, raw_bytes: u64) {
        self.bell.ring(|schedule| schedule.received(last, raw_bytes, machine::now()));
    }

    fn waiting(&mut self, received_ns: u64) {
        self.history.note_waiting(received_ns);
    }

    fn segments(&mut self, segments: &[SegmentSummary]) {
        *lock(&self.segments) = segments.to_vec();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
