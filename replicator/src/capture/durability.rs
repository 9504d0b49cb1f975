//! fdatasync of one backing, shared by all who ask, and its one failure, which is final.
//!
//! When writeback fails, the kernel drops the pages, tells one caller of fdatasync, and from then on
//! succeeds. So the failure is kept here, and only one sync runs at a time: of two at once, one would be told
//! and the other would answer its client that everything is durable. Whoever comes while one runs is served
//! by the next, together with all others who came meanwhile.

use machine::{Condvar, Mutex, MutexGuard};
use std::io;
use std::sync::PoisonError;

/// What is known to be durable.
#[derive(Debug, Default)]
pub struct Durability {
    syncs: Mutex<Syncs>,
    ended: Condvar,
}

/// Syncs are numbered from 1; at most the newest runs.
#[derive(Debug, Default)]
struct Syncs {
    begun: u64,
    done: u64,
    running: bool,
    failed: bool,
}

/// Why a sync is not done.
#[derive(Debug)]
pub enum NotDurable {
    /// The backing has just said so: its first and only failure.
    Now(io::Error),
    /// It failed before.
    Before,
}

impl Durability {
    fn lock(&self) -> MutexGuard<'_, Syncs> {
        self.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a sync has failed: what the backing holds is not what was written.
    pub fn has_failed(&self) -> bool {
        self.lock().failed
    }

    /// Returns when a sync that began after this call has ended; `sync` runs if it is this caller's turn.
    pub fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<(), NotDurable> {
        let mut syncs = self.lock();
        let wanted = syncs.begun + 1;
        while syncs.running && !syncs.failed && syncs.done < wanted {
            syncs = self.ended.wait(syncs).unwrap_or_else(PoisonError::into_inner);
        }
        if syncs.failed {
            return Err(NotDurable::Before);
        }
        if syncs.done >= wanted {
            return Ok(());
        }
        syncs.begun += 1;
        syncs.running = true;
        let mine = syncs.begun;
        drop(syncs);
        let result = sync();
        let mut syncs = self.lock();
        syncs.running = false;
        match &result {
            Ok(()) => syncs.done = mine,
            Err(_) => syncs.failed = true,
        }
        self.ended.notify_all();
        result.map_err(NotDurable::Now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn a_failure_is_told_once_and_kept_for_ever() {
        let durability = Durability::default();
        durability.sync(|| Ok(())).unwrap();
        assert!(!durability.has_failed());
        let first = durability.sync(|| Err(rustix::io::Errno::IO.into()));
        assert!(matches!(first, Err(NotDurable::Now(_))));
        assert!(durability.has_failed());
        assert!(matches!(durability.sync(|| Ok(())), Err(NotDurable::Before)), "the kernel says it once");
    }

    #[test]
    fn those_who_come_while_one_runs_share_the_next_and_its_failure() {
        for fails in [false, true] {
            let (durability, runs, came) = (Durability::default(), AtomicUsize::new(0), AtomicUsize::new(0));
            let (entered, is_entered) = std::sync::mpsc::sync_channel(1);
            let (release, released) = std::sync::mpsc::sync_channel::<()>(1);
            let outcomes: Vec<bool> = thread::scope(|scope| {
                let first = scope.spawn(|| {
                    durability.sync(move || {
                        entered.send(()).unwrap();
                        released.recv().unwrap();
                        if fails { Err(rustix::io::Errno::IO.into()) } else { Ok(()) }
                    })
                });
                is_entered.recv().unwrap();
                let (durability, runs, came) = (&durability, &runs, &came);
                let later: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(move || {
                            came.fetch_add(1, Ordering::SeqCst);
                            let outcome = durability.sync(|| {
                                runs.fetch_add(1, Ordering::SeqCst);
                                Ok(())
                            });
                            outcome.is_ok()
                        })
                    })
                    .collect();
                while came.load(Ordering::SeqCst) < 8 {
                    thread::yield_now();
                }
                release.send(()).unwrap();
                assert_eq!(first.join().unwrap().is_ok(), !fails);
                later.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(outcomes, [!fails; 8], "nobody is told that lost pages are durable");
            let runs = runs.load(Ordering::SeqCst);
            // Each is served by a sync that began after it came, never by the one that ran then.
            assert!(if fails { runs == 0 } else { (1..=8).contains(&runs) }, "{runs}");
        }
    }
}
