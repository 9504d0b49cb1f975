//! The apply thread of a group: owner of its applier.
//!
//! Woken by the bell when a batch is due; between batches it keeps house (heartbeats, retention). A replica
//! that fails stops apply, never ingest nor retention: the applier is opened again after a while, whether or
//! not anything waits, and the reason is shown meanwhile. The thread yields to ingest and to the front of
//! `up`, which share the machine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal::Lsn;
use journal::compress::Compression;
use journal::segment::SegmentSummary;
use machine::Mutex;
use tokio::sync::watch;

use super::bell::{Bell, Wake};
use super::failure::Failure;
use super::group::{Setup, lock};
use super::heartbeats::Heartbeats;
use super::now_ns;
use super::orders::{Answer, Order, Orders};
use super::progress::{Progress, Stall};
use super::schedule::HASTE;
use crate::apply::{Applier, ApplySettings, Expired, OverwriteReport, ResumeReport, RewindReport};
use crate::error::{Error, ErrorKind, Result};
use crate::history::History;
use crate::ingest::queue::Ingest;
use crate::point::At;
use crate::retention::Policy;
use crate::room::GroupRoom;
use crate::scrub::Scrub;
use crate::thin::Steps;

/// Pause between two rounds of housekeeping: bounds how old a kept heartbeat is, at one sync of a small file.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// Pause before a full disk, or a stream that waits for its new epoch, is looked at again.
const RETRY: Duration = Duration::from_millis(500);
/// Pause before a failed replica is opened again.
const REOPEN: Duration = Duration::from_secs(10);
/// Merged indexes made in one round of housekeeping: 200 batches a second could not outrun them.
const MERGES: usize = 64;
/// Time in one round of housekeeping after which no more old undo is merged.
const THINNING: Duration = Duration::from_secs(1);
/// Apply is work that can wait: acknowledgements cannot.
const NICENESS: i32 = 10;

/// What the thread works with.
pub(super) struct Parts {
    pub history: Arc<History>,
    pub bell: Arc<Bell>,
    pub heartbeats: Arc<Mutex<Heartbeats>>,
    pub segments: Arc<Mutex<Vec<SegmentSummary>>>,
    pub orders: Arc<Orders>,
    pub ingest: Ingest,
    pub progress: watch::Sender<Progress>,
    pub scrub: Arc<Scrub>,
    pub room: Arc<GroupRoom>,
}

/// See the module.
pub(super) struct ApplyThread {
    parts: Parts,
    setup: Setup,
    dir: PathBuf,
    settings: ApplySettings,
    policy: Policy,
    failure: Failure,
    /// `None` while the group's own files cannot be opened.
    applier: Option<Applier>,
    /// The applier failed: it is opened again then.
    reopen_at: Option<Instant>,
    shortened: bool,
    /// Behind this lsn the journal was suspected of damage already.
    suspected: Option<Lsn>,
}

impl ApplyThread {
    /// Opens the applier, which redoes nothing yet. A replica that cannot be opened is a stall, not an error.
    ///
    /// # Errors
    /// A failed sync.
    pub fn open(setup: &Setup, name: &str, parts: Parts) -> Result<ApplyThread> {
        let mut thread = ApplyThread {
            parts,
            dir: setup.group_dir(name),
            settings: ApplySettings {
                hold_replicas: setup.hold_replicas,
                ..apply_settings(&setup.settings, name)
            },
            policy: policy(&setup.settings.history),
            failure: setup.failure.clone(),
            setup: setup.clone(),
            applier: None,
            reopen_at: None,
            shortened: false,
            suspected: None,
        };
        thread.reopen()?;
        Ok(thread)
    }

    /// Runs until the bell says stop.
    ///
    /// # Errors
    /// A failed sync, which is final.
    pub fn run(mut self) -> Result<()> {
        if let Err(errno) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::debug!(%errno, "the apply thread keeps its priority");
        }
        self.go_on_rewinding()?;
        let mut housekeeping = machine::now() + HOUSEKEEPING;
        loop {
            let wake = self.parts.bell.wait(self.checkpoint(), housekeeping);
            if wake == Wake::Stop || self.failure.get().is_some() {
                break;
            }
            match wake {
                Wake::Batch => self.batch()?,
                Wake::Order => self.carry_out_orders()?,
                Wake::Pause | Wake::Stop => {}
            }
            if machine::now() >= housekeeping {
                self.reopen_if_due()?;
                self.go_on_rewinding()?;
                self.keep_house()?;
                housekeeping = machine::now() + HOUSEKEEPING;
            }
        }
        if self.failure.get().is_none() {
            // The newest heartbeat too: times up to now stay answerable after the restart.
            self.keep_house()?;
        }
        self.close()
    }

    fn checkpoint(&self) -> Lsn {
        self.parts.progress.borrow().checkpoint
    }

    /// Applies one batch, or notes why not.
    fn batch(&mut self) -> Result<()> {
        self.reopen_if_due()?;
        if let Some(at) = self.reopen_at {
            self.parts.bell.ring(|schedule| schedule.hold(at));
            return Ok(());
        }
        if let Some(why) = self.no_room() {
            return self.stalled(Error::new(ErrorKind::NoSpace, why));
        }
        let Some(applier) = &mut self.applier else { return Ok(()) };
        let durable = self.parts.progress.borrow().durable;
        match applier.next_batch(&durable) {
            Ok(done) => {
                let state = applier.state();
                let checkpoint = state.checkpoint.lsn;
                let stall = Stall::of(state);
                let stands = state.wishes.rewound.is_some() && state.wishes.intent.is_none();
                let now = machine::now();
                let after_resync = self.setup.settings.apply.min_interval / HASTE;
                // Before the checkpoint is told: whoever waits for it sees nothing waiting below it any more.
                self.parts.bell.ring(|schedule| {
                    schedule.applied(checkpoint, now);
                    match done {
                        None if stands => schedule.hold(now + HOUSEKEEPING),
                        None => schedule.hold(now + RETRY),
                        // A source that resyncs over and over makes no more batches than one that asks for
                        // haste.
                        Some(done) if done.ends_resync => schedule.hold(now + after_resync),
                        Some(_) => {}
                    }
                });
                self.publish(checkpoint, stall);
                if let Some(done) = done {
                    tracing::debug!(?done, "batch applied");
                }
                Ok(())
            }
            Err(error) => self.stalled(error),
        }
    }

    /// Why the next batch, made as small as can be, has no room: what it writes and what it keeps of what it
    /// overwrites. A rewind goes on: it is the operator's.
    fn no_room(&mut self) -> Option<String> {
        let room = self.parts.room.clone();
        let applier = self.applier.as_mut().filter(|applier| room.is_limited() && !applier.is_rewinding())?;
        let (replica_bytes, undo_bytes) = applier.taken_bytes();
        room.measured(replica_bytes, undo_bytes);
        let waiting = self.parts.bell.bytes_waiting();
        let why = loop {
            let need = applier.batch_bytes().min(waiting).saturating_mul(2);
            match room.refusal(need) {
                Some(_) if applier.halve_batch() => {}
                why => break why,
            }
        };
        // What cannot be applied is not taken either.
        room.set_stalled(why.clone());
        why
    }

    /// A failed sync is final; everything else is tried again, from the group's files up unless only room is
    /// missing. Until then the failed applier still keeps house.
    fn stalled(&mut self, error: Error) -> Result<()> {
        let now = machine::now();
        let retry_at = match error.kind {
            ErrorKind::Sync => return Err(error),
            ErrorKind::NoSpace | ErrorKind::Io if self.applier.is_some() => now + RETRY,
            _ => *self.reopen_at.insert(now + REOPEN),
        };
        let why = error.in_full();
        let stall = match error.kind {
            ErrorKind::ReplicaFailed | ErrorKind::Busy => Stall::ReplicaFailed(why),
            _ if self.is_changed() => Stall::ReplicaFailed(why),
            ErrorKind::Corrupt => self.suspect(why),
            _ => Stall::Stopped(why),
        };
        self.parts.bell.ring(|schedule| schedule.hold(retry_at));
        self.publish(self.checkpoint(), Some(stall));
        Ok(())
    }

    /// Whether others changed a replica.
    fn is_changed(&self) -> bool {
        self.applier.as_ref().is_some_and(|applier| applier.state().seen.changed.is_some())
    }

    /// What cannot be read may be rot in the journal: the scrub thread looks, and mends what the source still
    /// holds. What it does not hold is lost to the replica, and only a new epoch brings it further.
    fn suspect(&mut self, why: String) -> Stall {
        let checkpoint = self.checkpoint();
        if let Some(stall) = self.hole() {
            return stall;
        }
        if self.suspected.replace(checkpoint) != Some(checkpoint) {
            self.parts.scrub.suspect(checkpoint);
        }
        Stall::Stopped(why)
    }

    /// What is lost behind the checkpoint, where no newer epoch has begun to repair it.
    fn hole(&self) -> Option<Stall> {
        let epoch = self.parts.progress.borrow().durable.epoch.number;
        let hole = self.parts.history.hole(self.checkpoint())?;
        let stands = hole.gone.is_some() && hole.epoch >= epoch;
        stands.then(|| {
            let (before, last) = (hole.before.lsn, hole.last);
            Stall::NeedsResync(format!(
                "the records of lsn {} to {last} are lost: {}",
                before.next(),
                hole.why()
            ))
        })
    }

    fn carry_out_orders(&mut self) -> Result<()> {
        self.reopen_if_due()?;
        while let Some(order) = self.parts.orders.next() {
            self.carry_out(order)?;
        }
        Ok(())
    }

    /// Carries out one order. Only a final error is returned: everything else is the order's answer.
    fn carry_out(&mut self, order: Order) -> Result<()> {
        fn answered<T>(answer: Answer<T>, outcome: Result<T>) -> Result<()> {
            let (told, fatal) = match outcome {
                Err(error) if error.kind == ErrorKind::Sync => {
                    let told = Error::new(error.kind, error.in_full());
                    (Err(told), Err(error))
                }
                outcome => (outcome, Ok(())),
            };
            // Whoever asked may be gone.
            let _ = answer.send(told);
            fatal
        }
        match order {
            Order::Rewind(at, answer) => answered(answer, self.rewind(&at)),
            Order::Resume(answer) => answered(answer, self.resume()),
            Order::Overwrite(answer) => answered(answer, self.overwrite()),
            Order::Check(answer) => answered(answer, self.check()),
            Order::LookAgain => {
                self.suspected = None;
                // One that fares well was not kept from anything.
                if self.reopen_at.is_some() || self.applier.is_none() {
                    self.reopen()?;
                }
                self.parts.bell.ring(|schedule| schedule.release());
                self.go_on_rewinding()
            }
            Order::Hold(name, release, answer) => {
                let held = self.applier().and_then(|applier| applier.hold(&name, release, now_ns()));
                answered(answer, held)
            }
        }
    }

    fn applier(&mut self) -> Result<&mut Applier> {
        let why = self.parts.progress.borrow().stalled.as_ref().map(|stall| stall.why().to_owned());
        self.applier.as_mut().ok_or_else(|| {
            Error::new(ErrorKind::NotPossible, why.unwrap_or_else(|| "the group cannot be opened".to_owned()))
        })
    }

    fn rewind(&mut self, at: &At) -> Result<RewindReport> {
        let mut report = self.applier()?.rewind(at, now_ns())?;
        loop {
            let durable = self.parts.progress.borrow().durable;
            let applier = self.applier()?;
            // Whoever waits for the replica hears at once that it will not come.
            let (checkpoint, stall) = (applier.state().checkpoint.lsn, Stall::of(applier.state()));
            self.publish(checkpoint, stall);
            if !self.applier()?.is_rewinding() {
                break;
            }
            if self.parts.bell.is_stopping() {
                let at = "the receiver is stopping: the rewind goes on at its next start";
                return Err(Error::new(ErrorKind::NotPossible, at));
            }
            match self.applier()?.next_batch(&durable) {
                Ok(done) => report.add(done.as_ref()),
                Err(error) => return Err(self.rewind_failed(error)?),
            }
        }
        report.received_lsn = self.parts.progress.borrow().durable.lsn;
        self.wait_again();
        Ok(report)
    }

    /// A rewind that was cut or failed goes on, whether or not anything waits to be applied.
    fn go_on_rewinding(&mut self) -> Result<()> {
        let place = |thread: &ApplyThread| {
            let applier = thread.applier.as_ref().filter(|applier| applier.is_rewinding());
            applier.map(|applier| applier.state().applied_batch)
        };
        let Some(mut at) = place(self) else { return Ok(()) };
        while !self.parts.bell.is_stopping() {
            self.batch()?;
            match place(self) {
                Some(now) if now != at => at = now,
                Some(_) => return Ok(()),
                None => break,
            }
        }
        self.wait_again();
        Ok(())
    }

    /// A rewind that was taken back is over; one that was begun is tried again like any batch.
    fn rewind_failed(&mut self, error: Error) -> Result<Error> {
        let told = Error::new(error.kind, error.in_full());
        let applier = self.applier()?;
        if !applier.is_rewinding() {
            let (checkpoint, stall) = (applier.state().checkpoint.lsn, Stall::of(applier.state()));
            self.publish(checkpoint, stall);
            return Ok(told);
        }
        self.stalled(error)?;
        Ok(told.during("the rewind is under way, is tried again, and is given up by `afterimage resume`"))
    }

    fn resume(&mut self) -> Result<ResumeReport> {
        let received_lsn = self.parts.progress.borrow().durable.lsn;
        let report = self.applier()?.resume(received_lsn)?;
        let stall = Stall::of(self.applier()?.state());
        self.publish(report.from_lsn, stall);
        self.wait_again();
        self.parts.bell.ring(|schedule| {
            schedule.release();
            schedule.want(received_lsn);
        });
        Ok(report)
    }

    /// Has replicas that others changed overwritten by the next epoch.
    fn overwrite(&mut self) -> Result<OverwriteReport> {
        let durable = self.parts.progress.borrow().durable;
        let report = self.applier()?.overwrite(&durable, now_ns())?;
        self.reopen_at = None;
        let state = self.applier()?.state();
        let (checkpoint, stall) = (state.checkpoint.lsn, Stall::of(state));
        self.publish(checkpoint, stall);
        self.wait_again();
        self.parts.bell.ring(|schedule| schedule.release());
        Ok(report)
    }

    /// Looks whether the replicas are what was left, and says so before a reader rests on them.
    fn check(&mut self) -> Result<()> {
        let Some(applier) = &mut self.applier else { return Ok(()) };
        if self.reopen_at.is_some() {
            return Ok(());
        }
        match applier.check_replicas() {
            Ok(()) => {
                let state = applier.state();
                if state.seen.changed.is_some() && state.wishes.rewound.is_some() {
                    let (checkpoint, stall) = (state.checkpoint.lsn, Stall::of(state));
                    self.publish(checkpoint, stall);
                }
                Ok(())
            }
            Err(error) => self.stalled(error),
        }
    }

    /// What lies behind the checkpoint waits, also if it was applied once.
    fn wait_again(&self) {
        let (checkpoint, durable) = {
            let progress = self.parts.progress.borrow();
            (progress.checkpoint, progress.durable.lsn)
        };
        let segments = lock(&self.parts.segments).clone();
        let behind = segments.iter().filter(|segment| !segment.sealed || segment.last_lsn > checkpoint);
        let bytes: u64 = behind.map(|segment| segment.bytes.max(1)).sum();
        let bytes = if durable > checkpoint { bytes } else { 0 };
        self.parts.bell.ring(|schedule| schedule.set_back(durable, bytes, machine::now()));
    }

    fn reopen_if_due(&mut self) -> Result<()> {
        match self.reopen_at {
            Some(at) if machine::now() >= at => self.reopen(),
            _ => Ok(()),
        }
    }

    fn reopen(&mut self) -> Result<()> {
        // First let go of what is held: replicas are locked against everybody, also against ourselves.
        (self.applier, self.reopen_at) = (None, None);
        let (disk, history) = (self.setup.disk.clone(), self.parts.history.clone());
        match Applier::open(disk, &self.dir, self.settings.clone(), history) {
            Ok(applier) => {
                let state = applier.state();
                let checkpoint = state.checkpoint.lsn;
                let stall = Stall::of(state).or_else(|| self.hole());
                let failure = applier.failure();
                self.applier = Some(applier);
                match failure {
                    Some(error) => self.stalled(error),
                    None => {
                        self.publish(checkpoint, stall);
                        Ok(())
                    }
                }
            }
            Err(error) => self.stalled(error),
        }
    }

    fn publish(&self, checkpoint: Lsn, stalled: Option<Stall>) {
        self.parts.progress.send_if_modified(|progress| {
            let changed = progress.checkpoint != checkpoint || progress.stalled != stalled;
            if progress.stalled != stalled {
                match &stalled {
                    Some(stall) => tracing::warn!(why = stall.why(), "apply stands still"),
                    None => tracing::info!("apply goes on"),
                }
            }
            if matches!(stalled, Some(Stall::Rewound(_)))
                && !matches!(progress.stalled, Some(Stall::Rewound(_)))
            {
                progress.rewinds += 1;
            }
            progress.applied = checkpoint;
            progress.checkpoint = checkpoint;
            progress.stalled = stalled;
            changed
        });
    }

    /// Heartbeats and retention.
    fn keep_house(&mut self) -> Result<()> {
        self.check()?;
        let Some(applier) = &mut self.applier else { return Ok(()) };
        let durable = self.parts.progress.borrow().durable.lsn;
        let beat = lock(&self.parts.heartbeats).durable(durable);
        let kept = beat.map_or(Ok(()), |beat| applier.keep_heartbeat(beat));
        let segments = lock(&self.parts.segments).clone();
        let quota_bytes = self.parts.room.history_quota(self.policy.quota_bytes);
        let policy = Policy { quota_bytes, ..self.policy };
        match kept.and_then(|()| applier.expire(&policy, &segments)) {
            Ok(expired) => {
                self.follow(&expired);
                self.merge();
                self.thin()
            }
            Err(error) if error.kind == ErrorKind::Sync => Err(error),
            Err(error) => {
                tracing::warn!(%error, "cannot shorten the history");
                Ok(())
            }
        }
    }

    /// Merged indexes, a few at a time: they make a search far back fast, and nothing rests on them.
    fn merge(&mut self) {
        if let Some(applier) = &mut self.applier {
            applier.merge(MERGES);
        }
    }

    /// Batches below the exact window become one for each step; as many as fit a short time, since apply
    /// waits for it.
    fn thin(&mut self) -> Result<()> {
        let Some(applier) = &mut self.applier else { return Ok(()) };
        let until = machine::now() + THINNING;
        while machine::now() < until {
            match applier.thin(&self.policy) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind == ErrorKind::Sync => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "cannot merge old undo");
                    break;
                }
            }
        }
        Ok(())
    }

    /// What retention means for ingest: segments to let go, or nothing more to take.
    fn follow(&mut self, expired: &Expired) {
        if let Some(segment) = expired.drop_journal_before {
            self.parts.ingest.drop_before(segment);
        }
        let verdict = &expired.verdict;
        if verdict.shortened && !self.shortened {
            let (kept_bytes, quota_bytes) = (verdict.kept_bytes, expired.quota_bytes);
            tracing::warn!(kept_bytes, quota_bytes, "the quota makes the history shorter than its window");
        }
        self.shortened = verdict.shortened;
        let over = verdict.over_quota_bytes;
        let holds: Vec<String> = self
            .parts
            .history
            .state()
            .wishes
            .holds
            .into_iter()
            .map(|hold| format!("{:?}", hold.name))
            .collect();
        let (kept_for, help) = match holds.is_empty() {
            true => (String::new(), ""),
            false => (format!("the hold of {}, ", holds.join(", ")), ", or release a hold"),
        };
        let why = (over > 0).then(|| {
            format!(
                "the history that must be kept ({kept_for}history.min, or what leads to the last consistent point) takes \
                 {over} bytes more than the quota of {}: raise history.quota{help}",
                expired.quota_bytes
            )
        });
        self.parts.ingest.hold_back(why);
    }

    fn close(mut self) -> Result<()> {
        // After a final error the replica is left as after a crash: nothing may call it clean.
        let Some(applier) = self.applier.take().filter(|_| self.failure.get().is_none()) else {
            return Ok(());
        };
        match applier.close() {
            Err(error) if error.kind == ErrorKind::Sync => Err(error),
            Err(error) => {
                tracing::warn!(%error, "the group will be recovered as after a crash");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

fn apply_settings(settings: &conf::Receiver, group: &str) -> ApplySettings {
    let own = || settings.replica.iter().filter(|replica| replica.group == group);
    let replica_paths: BTreeMap<_, _> = own().map(|r| (r.volume.clone(), r.path.clone())).collect();
    let seeded = own().filter(|replica| replica.seeded).map(|replica| replica.volume.clone()).collect();
    ApplySettings {
        batch_bytes: settings.apply.batch_bytes,
        undo_bytes: settings.apply.undo_bytes,
        undo_compression: match settings.apply.undo_compression {
            conf::Compression::Off => Compression::Off,
            conf::Compression::Zstd(level) => Compression::Zstd(level),
        },
        replica_dir: settings.dir.join("replica").join(group),
        replica_paths,
        seeded,
        hold_replicas: true,
    }
}

fn policy(history: &conf::History) -> Policy {
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let steps = Steps { hourly_ns: ns(history.keep_hourly), daily_ns: ns(history.keep_daily) };
    Policy { window_ns: ns(history.window), min_ns: ns(history.min), steps, quota_bytes: history.quota }
}
