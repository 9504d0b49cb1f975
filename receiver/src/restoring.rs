//! Restoring: the restores that run, each with its targets, how far it is, and the way to end it.
//!
//! Invariants: no two of them have a target in common; one that was told to end gives no target its name any
//! more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use machine::Mutex;
use serde::{Deserialize, Serialize};

use crate::agent::{group::lock, now_ns};
use crate::point::{At, rfc3339};
use crate::{Error, ErrorKind, Result};

/// A restore that runs, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreStatus {
    /// What it was asked to write to.
    pub to: PathBuf,
    /// The point that was asked for.
    pub at: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes to do; 0 before it is known.
    pub total_bytes: u64,
    /// Since when, this machine's clock, RFC 3339 UTC.
    pub since: String,
    /// How much longer it takes at its rate so far; absent while that is unknown.
    pub left_ms: Option<u64>,
    /// It was told to end, and is just doing so.
    pub cancelled: bool,
}

/// All that run in one process.
#[derive(Debug, Default)]
pub struct Restores {
    running: Mutex<BTreeMap<u64, Running>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Running {
    group: String,
    to: PathBuf,
    at: String,
    places: Vec<PathBuf>,
    since: Instant,
    since_ns: u64,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
}

/// One of them; it leaves the list when this value is dropped.
#[derive(Debug)]
pub struct Restoring {
    all: Arc<Restores>,
    id: u64,
    state: Arc<State>,
}

/// Ends a restore: when it is told to, or when it is dropped.
#[derive(Debug)]
pub struct Canceller(Arc<State>);

impl Canceller {
    /// The restore ends at its next step, and gives no target its name.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

impl Drop for Canceller {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Restores {
    /// Lists a restore.
    pub fn begin(self: &Arc<Self>, group: &str, at: &At, to: &Path) -> Restoring {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let state = Arc::new(State::default());
        let running = Running {
            group: group.to_owned(),
            to: to.to_owned(),
            at: at.to_string(),
            places: Vec::new(),
            since: machine::now(),
            since_ns: now_ns(),
            state: Arc::clone(&state),
        };
        lock(&self.running).insert(id, running);
        Restoring { all: Arc::clone(self), id, state }
    }

    /// Those of a group, oldest first.
    pub fn of(&self, group: &str) -> Vec<RestoreStatus> {
        lock(&self.running).values().filter(|running| running.group == group).map(Running::status).collect()
    }

    /// Ends every restore that writes to `target`; how many.
    pub fn cancel(&self, target: &Path) -> usize {
        let real = std::fs::canonicalize(target).unwrap_or_else(|_| target.to_path_buf());
        let mut count = 0;
        for running in lock(&self.running).values() {
            let is_meant = running.to == target || running.places.contains(&real);
            if is_meant {
                running.state.cancelled.store(true, Ordering::Relaxed);
                count += 1;
            }
        }
        count
    }

    /// Ends all.
    pub fn cancel_all(&self) {
        lock(&self.running)
            .values()
            .for_each(|running| running.state.cancelled.store(true, Ordering::Relaxed));
    }

    /// Whether none runs that was told to end.
    pub fn have_ended(&self) -> bool {
        !lock(&self.running).values().any(|running| running.state.cancelled.load(Ordering::Relaxed))
    }
}

impl Running {
    fn status(&self) -> RestoreStatus {
        let (done, total) =
            (self.state.done_bytes.load(Ordering::Relaxed), self.state.total_bytes.load(Ordering::Relaxed));
        let ran_ms = machine::since(self.since).as_millis();
        let left_ms = (ran_ms * u128::from(total.saturating_sub(done))).checked_div(u128::from(done));
        RestoreStatus {
            to: self.to.clone(),
            at: self.at.clone(),
            done_bytes: done,
            total_bytes: total,
            since: rfc3339(self.since_ns),
            left_ms: left_ms.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX)),
            cancelled: self.state.cancelled.load(Ordering::Relaxed),
        }
    }
}

impl Restoring {
    /// One that nobody else knows of: of a process that does nothing else.
    pub fn alone(at: &At, to: &Path) -> Restoring {
        Arc::new(Restores::default()).begin("", at, to)
    }

    /// The way to end it from elsewhere.
    pub fn canceller(&self) -> Canceller {
        Canceller(Arc::clone(&self.state))
    }

    /// Takes places for this restore alone.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`], naming the restore that has one of them.
    pub(crate) fn claim(&self, places: Vec<PathBuf>) -> Result<()> {
        let mut running = lock(&self.all.running);
        for place in &places {
            let holder = running.iter().find(|(id, other)| **id != self.id && other.places.contains(place));
            if let Some((_, other)) = holder {
                let ours = running.get(&self.id).map_or("another point", |ours| ours.at.as_str());
                let at = format!(
                    "{} is being restored to already: {} of group {}, since {}; {ours} was asked for now: wait for \
                     it, or end it with `afterimage restore --cancel {}`",
                    place.display(),
                    other.at,
                    other.group,
                    rfc3339(other.since_ns),
                    other.to.display()
                );
                return Err(Error::new(ErrorKind::NotPossible, at));
            }
        }
        if let Some(ours) = running.get_mut(&self.id) {
            ours.places = places;
        }
        Ok(())
    }

    /// Tells how far it is.
    ///
    /// # Errors
    /// As [`Restoring::go_on`].
    pub(crate) fn passed(&self, done_bytes: u64, total_bytes: u64) -> Result<()> {
        self.state.done_bytes.store(done_bytes, Ordering::Relaxed);
        self.state.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.go_on()
    }

    /// Whether it may go on.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`].
    pub(crate) fn go_on(&self) -> Result<()> {
        if self.state.cancelled.load(Ordering::Relaxed) {
            let at = "the restore was ended before it was done: its client went away, or it was cancelled";
            return Err(Error::new(ErrorKind::Cancelled, at));
        }
        Ok(())
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        lock(&self.all.running).remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::Lsn;

    #[test]
    fn a_target_has_one_restore_and_both_are_named() {
        let all = Arc::new(Restores::default());
        let at = |lsn| At::Lsn(Lsn(lsn));
        let first = all.begin("g", &at(1), Path::new("/x/a.img"));
        first.claim(vec!["/x/a.img".into()]).unwrap();
        let second = all.begin("g", &at(2), Path::new("/x/a.img"));
        let error = second.claim(vec!["/x/a.img".into()]).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotPossible);
        assert!(error.to_string().contains("lsn:1") && error.to_string().contains("lsn:2"), "{error}");
        second.claim(vec!["/x/b.img".into()]).unwrap();
        first.passed(25, 100).unwrap();
        assert_eq!(all.of("g")[0].done_bytes, 25);
        assert_eq!(all.of("other"), []);
        assert_eq!(all.cancel(Path::new("/x/a.img")), 2, "both were asked for it");
        assert_eq!(first.go_on().unwrap_err().kind, ErrorKind::Cancelled);
        assert!(!all.have_ended());
        drop((first, second));
        assert!(all.have_ended());
        all.begin("g", &at(3), Path::new("/x/a.img")).claim(vec!["/x/a.img".into()]).unwrap();
    }

    #[test]
    fn one_that_is_dropped_by_its_client_ends() {
        let restoring = Restoring::alone(&At::Latest, Path::new("/x"));
        restoring.passed(0, 1).unwrap();
        drop(restoring.canceller());
        assert!(restoring.passed(1, 1).is_err());
    }
}
