//! Synchronisation: online, without a snapshot, for both kinds of capture (DESIGN section 6, decision 0009).
//!
//! One thread looks at the ring: whenever writes were only noted as dirty bits (an overflow, a journal
//! without room, a new epoch, where all bits are set), it waits until the ring is drained and copies what is
//! dirty, window by window, while everybody goes on writing. Bits survive in the ring, so a restarted agent
//! goes on with what is left.
//!
//! ```text
//!   begin ─► barrier ─► copy a window ─► … next window … ─► end ─► end is journaled ─► replicating
//!     ▲                    │ overflow, no room                │ bits are set
//!     └────────────────────┴──────────────────────────────────┘
//! ```
//! * `map`: what this thread and the consumer share: the mask, and the slots' content.
//! * `window`: one begin, one barrier, one copy.
//! * `pace`: rate, and yielding to live writes.
//! * `verify`: looks at what is believed to be equal, when ordered to.
//! * `proof`: the same of what nothing proves, by itself.
//!
//! Ranges of single writes that failed, while everything else is recorded, are read again behind a fence; the
//! state stays `replicating`, and `points` marks them by their `failed` records.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kfilter::Mode;
use machine::MutexGuard;

use crate::agent::Agent;
use crate::capture::{Refusal, Volume};
use crate::error::{ErrorKind, Result};
use crate::state::{Capturing, KnownVolume};
use crate::status::State;

pub mod map;
mod pace;
mod progress;
mod proof;
mod tables;
#[cfg(test)]
mod tests;
mod verify;
mod window;

use pace::Pace;
use progress::Report;
use proof::Prover;
use tables::Tables;
use verify::Verifier;
use window::{Copier, Ended, Kind, WINDOW_BYTES};

/// One look at the ring's mode to the next.
const LOOK: Duration = Duration::from_millis(50);
/// One look at its bits to the next.
const LOOK_BITS: Duration = Duration::from_secs(1);
/// It begins when the ring is drained up to this, so that it does not overflow again at once.
const DRAINED: f64 = 0.125;
/// What cannot be read is tried again after this, doubled each time …
const RETRY: Duration = Duration::from_secs(1);
/// … up to this.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What ends a synchronisation early.
#[derive(Debug, Default)]
pub struct Halt {
    /// The agent stops.
    pub stop: AtomicBool,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
enum Work {
    /// Nothing.
    None,
    /// Writes were not recorded, and why.
    Gap(String),
    /// Single ranges are dirty while everything is recorded.
    Ranges,
    /// A verification is to look on.
    Verify,
    /// The same of disks that nothing proves to be unchanged.
    Prove,
    /// Source and replica do not join, or the journal failed: only a new epoch leads on.
    Epoch,
}

/// The thread's own state.
pub(crate) struct Engine<'a> {
    agent: &'a Agent,
    pace: Pace,
    looked: Instant,
    /// Only an attach helped, when it was looked at last.
    waits: bool,
    /// Not before this: something could not be read.
    retry: Option<(Instant, Duration)>,
    verifier: Option<Verifier>,
    /// What the volumes are made of.
    tables: Tables,
    prover: Prover,
    /// When a new epoch was last asked for, and how long to wait from then to the next.
    turned: Option<(Instant, Duration)>,
}

impl<'a> Engine<'a> {
    pub fn new(agent: &'a Agent) -> Engine<'a> {
        Engine {
            agent,
            pace: Pace::new(agent.settings.resync.rate),
            looked: machine::now(),
            waits: false,
            retry: None,
            verifier: None,
            tables: Tables::of(&agent.volumes),
            prover: Prover::default(),
            turned: None,
        }
    }

    /// Looks and repairs until the agent stops. `cause`: what the start found to be repaired, empty for
    /// nothing.
    ///
    /// # Errors
    /// The ring failed.
    pub fn run(mut self, cause: &str) -> Result<()> {
        if !cause.is_empty() && self.agent.shared.health.is_good() {
            let done = self.resync(cause);
            self.ended(done)?;
        } else if self.agent.shared.health.is_good() {
            self.agent.shared.board.change(State::Replicating, self.agent.words());
        }
        while !self.agent.halt.stop.load(Ordering::Acquire) {
            let done = match self.work() {
                Work::None => {
                    machine::sleep(LOOK);
                    Ok(())
                }
                Work::Gap(cause) => self.resync(&cause),
                Work::Ranges => self.repair(),
                Work::Verify => self.verify(),
                Work::Prove => self.prove(),
                Work::Epoch => self.begin_epoch(),
            };
            self.ended(done)?;
        }
        Ok(())
    }

    /// A stop is no failure; what was begun is in the ring. A journal that takes nothing any more is said to
    /// be the state, whichever of the two threads spoke last.
    fn ended(&self, done: Result<()>) -> Result<()> {
        let shared = &self.agent.shared;
        let why = shared.health.why();
        if !why.is_empty() && matches!(shared.board.state().0, State::Syncing | State::Resyncing) {
            shared.board.change(State::Degraded, why);
        }
        match done {
            Err(error) if error.kind == ErrorKind::Stopped => Ok(()),
            done => done,
        }
    }

    fn work(&mut self) -> Work {
        let agent = self.agent;
        agent.notice_overflow();
        let state = agent.shared.board.state().0;
        let hopeless = agent.volumes.iter().any(|volume| volume.sync_failed());
        if state == State::Fenced || hopeless || agent.is_shrunk() {
            return Work::None;
        }
        if agent.shared.apart.load(Ordering::Acquire) || agent.shared.health.is_broken() {
            let waits = self.turned.is_some_and(|(at, pause)| machine::since(at) < pause);
            return if waits { Work::None } else { Work::Epoch };
        }
        if !agent.shared.health.is_good() {
            return Work::None;
        }
        let ring = &agent.shared.ring;
        let is_due = machine::since(self.looked) >= LOOK_BITS;
        if ring.mode() == Mode::Ring && ring.loss().is_some() {
            if is_due {
                self.looked = machine::now();
                self.waits = self.waits_for_attach();
            }
            if self.waits {
                self.tell_that_it_waits();
                return Work::None;
            }
        }
        if self.retry.is_some_and(|(at, _)| machine::now() < at) {
            return Work::None;
        }
        if ring.mode() == Mode::Bitmap || ring.loss().is_some() {
            return Work::Gap(agent.gap_cause());
        }
        let proves = state == State::Replicating && self.proves();
        let verifies = state == State::Replicating && self.verifies();
        if !is_due && !verifies && !proves {
            return Work::None;
        }
        self.looked = machine::now();
        if state == State::Replicating {
            agent.fill_touched();
        }
        // Asked first: then the bits are set of what no hook has seen.
        let untold = ring.untold_writes();
        let exchanged = if is_due { self.tables.exchanged(&agent.volumes) } else { None };
        if let Some((volume, name)) = exchanged {
            // Whatever the kernel answers, it is asked again as long as the table is another one.
            return match ring.mark(volume, 0..u64::MAX) {
                Ok(()) => Work::Gap(format!(
                    "the device-mapper table of volume {name} was changed under it: all of it is compared"
                )),
                Err(error) => {
                    self.tables.forget(volume);
                    tracing::warn!(%error, volume = %name, "its table was changed, and its ranges cannot be set dirty yet");
                    Work::None
                }
            };
        }
        if !agent.volumes.iter().any(|volume| ring.is_dirty(volume.id)) {
            return match (proves, verifies) {
                (true, _) => Work::Prove,
                (_, true) => Work::Verify,
                _ => Work::None,
            };
        }
        let unseen = ring.unseen_commands();
        if agent.unseen_seen.swap(unseen, Ordering::AcqRel) != unseen {
            agent.untold_seen.store(untold, Ordering::Release);
            return Work::Gap(
                "a command went to a disk past the block layer (SG_IO or another passthrough), and may have written \
                 anywhere: all of it is compared"
                    .to_owned(),
            );
        }
        if agent.untold_seen.swap(untold, Ordering::AcqRel) != untold {
            return Work::Gap("writes could not be copied, and were only noted as dirty ranges".to_owned());
        }
        // Detached are all of them: what their failed writes left is forgotten.
        let is_whole = matches!(state, State::Replicating | State::Detached) && !self.waits_for_attach();
        if is_whole { Work::Ranges } else { Work::Gap(agent.gap_cause()) }
    }

    /// Orders a new epoch of the pipeline, and synchronises in it.
    fn begin_epoch(&mut self) -> Result<()> {
        let agent = self.agent;
        let shared = &agent.shared;
        let pause = self.turned.map_or(RETRY, |(_, pause)| (pause * 2).min(RETRY_MAX));
        self.turned = Some((machine::now(), pause));
        shared.epoch_due.store(true, Ordering::Release);
        shared.ring.wake_consumer();
        while shared.epoch_due.load(Ordering::Acquire) {
            agent.halt.check()?;
            machine::sleep(Duration::from_millis(5));
        }
        if !shared.health.is_good() {
            let (state, _) = shared.board.state();
            let to = if state == State::NeedsResync { state } else { State::Degraded };
            let why = format!("{}; tried again in {} s", shared.health.why(), pause.as_secs());
            shared.board.change(to, why);
            return Ok(());
        }
        self.retry = None;
        let cause = agent.gap_cause();
        self.resync(&cause)
    }

    /// A gap: from begin to end.
    fn resync(&mut self, cause: &str) -> Result<()> {
        let agent = self.agent;
        let shared = &agent.shared;
        let ring = &shared.ring;
        let (state, gap) = {
            let known = agent.remembered();
            let state = if known.was_consistent { State::Resyncing } else { State::Syncing };
            (state, known.needs_resync.clone())
        };
        *shared.sync_cause.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = cause.to_owned();
        shared.board.change(state, format!("{cause}; starting"));
        let started = machine::now();
        let mut report = Report::new(shared.board.clone(), state, cause);
        let mut unreadable = Unreadable::default();
        let mut begun = false;
        loop {
            self.drained()?;
            if !shared.goes_on() {
                return Ok(());
            }
            if let Some((volume, range)) = self.next_window(&unreadable) {
                report.left(self.dirty_bytes());
                let copier = Copier::new(agent, &volume, &mut self.pace, &mut report);
                match copier.run(range, Kind::Resync)? {
                    Ended::Lost => {}
                    Ended::Later(why) => {
                        self.try_later(&why);
                        return Ok(());
                    }
                    Ended::Done(ranges) => {
                        unreadable.0.extend(ranges.into_iter().map(|range| (volume.clone(), range)));
                    }
                }
                continue;
            }
            if !unreadable.0.is_empty() {
                self.try_later(&unreadable.to_string());
                return Ok(());
            }
            let Some(quiet) = agent.between_orders() else {
                machine::sleep(LOOK);
                continue;
            };
            if self.next_window(&unreadable).is_some() {
                // Attached meanwhile.
                continue;
            }
            // The stream must be between begin and end.
            if self.waits_for_attach() && (begun || ring.loss().is_some()) {
                self.waits = true;
                self.tell_that_it_waits();
                return Ok(());
            }
            self.forget_detached(&quiet)?;
            let ended = ring.end();
            if ended.is_ok() {
                *agent.due.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
            }
            drop(quiet);
            match ended {
                Ok(end) => {
                    self.until_journaled(end)?;
                    if !shared.goes_on() {
                        return Ok(());
                    }
                    (self.retry, self.turned) = (None, None);
                    if let Some(_quiet) = agent.between_orders() {
                        self.detached_are_whole()?;
                    }
                    let remembered = agent.update_when_room(|state| {
                        state.was_consistent = true;
                        // Only the gap that this one began with: a newer one is not repaired by it.
                        if state.needs_resync == gap && state.gap_in_ring {
                            (state.needs_resync, state.gap_in_ring) = (None, false);
                        }
                        state.forget_doubt();
                    })?;
                    if !remembered {
                        return Ok(());
                    }
                    let seconds = machine::since(started).as_secs_f64();
                    let equal_bytes = report.equal_bytes();
                    tracing::info!(cause, content_bytes = report.sent, equal_bytes, seconds, "synchronised");
                    if agent.remembered().needs_resync.is_none() {
                        shared.board.change(State::Replicating, agent.words());
                    }
                    return Ok(());
                }
                // Nothing can be copied, and yet writes only set bits: a begin makes records of them again.
                Err(Refusal::BitmapMode | Refusal::Dirty | Refusal::Owed) => {
                    begun |= self.begin_without_window()?
                }
                Err(Refusal::Full) => machine::sleep(LOOK),
                Err(Refusal::Failed(error)) => return Err(error),
            }
            agent.halt.check()?;
        }
    }

    /// Single ranges, behind a fence. The state stays what it is.
    fn repair(&mut self) -> Result<()> {
        let agent = self.agent;
        let mut report = Report::new(agent.shared.board.clone(), State::Replicating, "");
        let mut unreadable = Unreadable::default();
        for volume in agent.volumes.iter() {
            let Some(range) = self.window_of(volume, &unreadable) else { continue };
            match Copier::new(agent, volume, &mut self.pace, &mut report).run(range, Kind::Repair)? {
                Ended::Lost => return Ok(()),
                Ended::Later(why) => {
                    tracing::warn!("{why}");
                    self.back_off();
                    return Ok(());
                }
                Ended::Done(ranges) => {
                    unreadable.0.extend(ranges.into_iter().map(|range| (volume.clone(), range)));
                }
            }
        }
        if let Some(quiet) = agent.between_orders() {
            self.forget_detached(&quiet)?;
        }
        match unreadable.0.is_empty() {
            false => {
                let wait = self.back_off();
                let why = format!("after failed writes {unreadable}; tried again in {} s", wait.as_secs());
                tracing::warn!("{why}");
                agent.shared.board.change(State::Replicating, why);
            }
            true => {
                self.retry = None;
                agent.shared.board.change(State::Replicating, agent.words());
                tracing::info!(content_bytes = report.sent, "ranges of failed writes read again");
            }
        }
        Ok(())
    }

    /// Waits until the ring has room to begin.
    fn drained(&self) -> Result<()> {
        let shared = &self.agent.shared;
        while shared.ring.fill_ratio() > DRAINED && shared.goes_on() {
            self.agent.halt.check()?;
            machine::sleep(Duration::from_millis(5));
        }
        self.agent.halt.check()
    }

    /// The first dirty part of a volume, at most a window long.
    fn next_window(&self, but: &Unreadable) -> Option<(Arc<Volume>, Range<u64>)> {
        let volumes = self.agent.volumes.iter();
        volumes.filter_map(|volume| Some((volume.clone(), self.window_of(volume, but)?))).next()
    }

    /// The same of one volume.
    fn window_of(&self, volume: &Arc<Volume>, but: &Unreadable) -> Option<Range<u64>> {
        if !volume.is_attached() {
            return None;
        }
        let ring = &self.agent.shared.ring;
        let (dirty, covered) = (ring.dirty_extents(volume.id), ring.covered_bytes(volume.id));
        let mut left = dirty.into_iter().flat_map(|range| but.without(volume, range, covered));
        let first = left.next()?;
        let last = left.last().unwrap_or_else(|| first.clone());
        Some(first.start..last.end.min(first.start.saturating_add(WINDOW_BYTES)))
    }

    fn dirty_bytes(&self) -> u64 {
        let ring = &self.agent.shared.ring;
        let volumes = self.agent.volumes.iter().filter(|volume| volume.is_attached());
        volumes.flat_map(|volume| ring.dirty_extents(volume.id)).map(|range| range.end - range.start).sum()
    }

    /// A begin for nothing that could be copied; whether there was room for it.
    fn begin_without_window(&self) -> Result<bool> {
        let begun = match self.agent.shared.ring.begin() {
            Err(Refusal::Failed(error)) => return Err(error),
            Err(_) => {
                machine::sleep(LOOK);
                false
            }
            Ok(_) => true,
        };
        if let Err(why) = window::barrier(self.agent)? {
            tracing::warn!("{why}");
            machine::sleep(RETRY);
        }
        Ok(begun)
    }

    /// In an operator's words.
    fn tell_that_it_waits(&self) {
        let board = &self.agent.shared.board;
        let Some(volume) = self.agent.detached_between() else { return };
        let why = format!(
            "volume {} is detached, and its replica is at no point: `afterimage attach` it again, or take it out of the settings \
             and restart the agent",
            volume.name
        );
        if board.state().1 != why {
            board.change(State::Degraded, why);
        }
    }

    /// Nothing is left but a volume that is detached and at no point, and only an attach helps.
    fn waits_for_attach(&self) -> bool {
        let agent = self.agent;
        let ring = &agent.shared.ring;
        ring.mode() == Mode::Ring
            && agent.detached_between().is_some()
            // Last: it looks at all that is captured.
            && !agent.volumes.iter().any(|volume| volume.is_attached() && ring.is_dirty(volume.id))
    }

    /// A synchronisation ends: what was detached in it had been wholly copied by then.
    fn detached_are_whole(&self) -> Result<()> {
        let ring = &self.agent.shared.ring;
        let between =
            |known: &KnownVolume| known.capturing == Capturing::DetachedBetween && !ring.is_dirty(known.id.0);
        let mut file = self.agent.state();
        if !file.get().volumes.iter().any(between) {
            return Ok(());
        }
        file.update(|state| {
            for known in state.volumes.iter_mut().filter(|known| between(known)) {
                known.capturing = Capturing::Detached;
            }
        })
    }

    /// Ranges of failed writes to a volume that was detached since: they stay inexact, as their `failed`
    /// records say.
    fn forget_detached(&self, _quiet: &MutexGuard<'_, ()>) -> Result<()> {
        let ring = &self.agent.shared.ring;
        if self.agent.detached_between().is_some() {
            return Ok(());
        }
        let mut fenced = false;
        for volume in self.agent.detached_and_dirty() {
            // Only what a fence has made pending can be cleared.
            if !std::mem::replace(&mut fenced, true) && ring.fence().is_err() {
                return Ok(());
            }
            if let Some(size) = ring.size_bytes(volume.id) {
                ring.clear(volume.id, 0..size)?;
            }
        }
        Ok(())
    }

    fn until_journaled(&self, end: u64) -> Result<()> {
        let shared = &self.agent.shared;
        let mut at = shared.progress.position();
        while at.lsn.0 < end && shared.goes_on() {
            self.agent.halt.check()?;
            shared.progress.wait_beyond(&at, LOOK);
            at = shared.progress.position();
        }
        Ok(())
    }

    fn back_off(&mut self) -> Duration {
        let wait = self.retry.map_or(RETRY, |(_, wait)| (wait * 2).min(RETRY_MAX));
        self.retry = Some((machine::now() + wait, wait));
        wait
    }

    /// Everything is copied but what cannot be read: it stays dirty, and the gap open.
    fn try_later(&mut self, why: &str) {
        let wait = self.back_off();
        let why = format!("not synchronised: {why}; tried again in {} s", wait.as_secs());
        tracing::warn!("{why}");
        self.agent.shared.board.change(State::Degraded, why);
    }
}

/// Ranges of volumes that could not be read this time.
#[derive(Default)]
struct Unreadable(Vec<(Arc<Volume>, Range<u64>)>);

impl Unreadable {
    /// What of a dirty range is left to be read. Beyond the bitmap, from `covered` on, nothing behind what
    /// could not be read becomes clean: it is left, too.
    fn without(&self, volume: &Volume, range: Range<u64>, covered: u64) -> Vec<Range<u64>> {
        let mut left = vec![range];
        for (_, hole) in self.0.iter().filter(|(unread, _)| unread.id == volume.id) {
            left = left
                .into_iter()
                .flat_map(|range| {
                    let (start, end) = (range.start, range.end);
                    let hole_end = if hole.end > covered { u64::MAX } else { hole.end };
                    [start..end.min(hole.start), start.max(hole_end)..end]
                })
                .filter(|range| range.start < range.end)
                .collect();
        }
        left
    }
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes: u64 = self.0.iter().map(|(_, range)| range.end - range.start).sum();
        let Some((volume, range)) = self.0.first() else { return Ok(()) };
        let (name, start) = (&volume.name, range.start);
        write!(
            f,
            "{bytes} bytes cannot be read, the first of volume {name} at byte {start} (see the kernel log)"
        )
    }
}
