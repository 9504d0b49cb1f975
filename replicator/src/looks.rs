//! Disks are looked at aside, in sweeps: one that hangs holds up nothing but the look at it, and its silence
//! is told.
//!
//! State: the disks that are being looked at, each since when, and the number of the newest sweep. A sweep
//! whose look is silent is left to itself, and the next one passes that disk over. Invariants: at most one
//! look at a disk; at most one thread more than there are silent disks.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use machine::Mutex;

use crate::agent::Agent;

/// A disk that takes longer to say how large it is does not answer.
const SILENT: Duration = Duration::from_secs(3);

/// The looks that are under way.
#[derive(Default)]
pub(crate) struct Looks {
    now: Mutex<UnderWay>,
}

#[derive(Default)]
struct UnderWay {
    /// Number of the newest sweep.
    sweep: u64,
    is_sweeping: bool,
    looks: Vec<Look>,
}

struct Look {
    /// The disk, in an operator's words.
    disk: String,
    since: Instant,
    told: bool,
}

impl Look {
    fn is_silent(&self) -> bool {
        machine::since(self.since) >= SILENT
    }
}

impl Looks {
    fn with<T>(&self, change: impl FnOnce(&mut UnderWay) -> T) -> T {
        change(&mut self.now.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A new sweep's number; none while the last one goes on.
    fn begin(&self) -> Option<u64> {
        self.with(|now| {
            let hangs = now.looks.iter().any(Look::is_silent) && now.looks.iter().all(Look::is_silent);
            if now.is_sweeping && !hangs {
                return None;
            }
            now.is_sweeping = true;
            now.sweep += 1;
            Some(now.sweep)
        })
    }

    fn end(&self, sweep: u64) {
        self.with(|now| now.is_sweeping &= now.sweep != sweep);
    }

    /// Looks at a disk, unless it is being looked at, or the sweep is one of the past.
    pub(crate) fn at<T>(&self, sweep: u64, disk: String, look: impl FnOnce() -> T) -> Option<T> {
        let begins = self.with(|now| {
            let begins = now.sweep == sweep && !now.looks.iter().any(|look| look.disk == disk);
            if begins {
                now.looks.push(Look { disk: disk.clone(), since: machine::now(), told: false });
            }
            begins
        });
        let found = begins.then(look)?;
        let told = self.with(|now| {
            let at = now.looks.iter().position(|look| look.disk == disk);
            at.is_some_and(|at| now.looks.swap_remove(at).told)
        });
        if told {
            tracing::info!("{disk} answers again");
        }
        Some(found)
    }

    /// What is to be said of disks that do not answer.
    pub(crate) fn words(&self) -> String {
        let words = |look: &Look| {
            format!("{} has not answered for {} s", look.disk, machine::since(look.since).as_secs())
        };
        self.with(|now| {
            let silent = now.looks.iter().filter(|look| look.is_silent());
            silent.map(words).collect::<Vec<_>>().join("; ")
        })
    }

    /// The disks that do not answer, each once.
    fn news(&self) -> Vec<String> {
        self.with(|now| {
            let news = now.looks.iter_mut().filter(|look| look.is_silent() && !look.told);
            news.map(|look| {
                look.told = true;
                look.disk.clone()
            })
            .collect()
        })
    }

    /// Whether no look is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.with(|now| !now.is_sweeping && now.looks.is_empty())
    }
}

impl Agent {
    /// Looks at the disks, and keeps what is to be kept on disks of our own, unless the last sweep goes on.
    pub(crate) fn look_aside(self: &Arc<Self>) {
        for disk in self.looks.news() {
            tracing::warn!(
                "{disk} does not answer: who uses it waits for it, as without us; the link and other volumes go on"
            );
        }
        let Some(sweep) = self.looks.begin() else { return };
        let agent = self.clone();
        let look = move || {
            let own = format!("the disk of {}", agent.settings.dir.display());
            agent.looks.at(sweep, own, || agent.keep_state());
            agent.look_at_disks(sweep);
            agent.looks.end(sweep);
        };
        if let Err(error) = machine::spawn("af-disks", look) {
            self.looks.end(sweep);
            tracing::warn!(%error, "start the thread that looks at the disks");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(looks: &Looks) {
        looks.with(|now| {
            for look in &mut now.looks {
                look.since = machine::now().checked_sub(Duration::from_secs(12)).unwrap();
            }
        });
    }

    #[test]
    fn silence_is_told_and_a_short_look_is_not() {
        let looks = Looks::default();
        let sweep = looks.begin().unwrap();
        looks.at(sweep, "disk a".into(), || {
            assert!(looks.words().is_empty() && looks.news().is_empty() && !looks.is_idle());
            age(&looks);
            assert_eq!(looks.words(), "disk a has not answered for 12 s");
            assert_eq!((looks.news(), looks.news()), (vec!["disk a".to_owned()], Vec::new()), "told once");
        });
        looks.end(sweep);
        assert!(looks.words().is_empty() && looks.is_idle());
    }

    /// Each disk's look is made from within the other's, as if that one hung.
    #[test]
    fn a_sweep_that_hangs_is_left_behind_and_its_disk_passed_over() {
        let looks = Looks::default();
        let first = looks.begin().unwrap();
        looks.at(first, "disk a".into(), || {
            assert_eq!(looks.begin(), None, "it may be slow");
            age(&looks);
            let second = looks.begin().expect("it hangs");
            assert_eq!(looks.at(second, "disk a".into(), || ()), None, "two looks at a disk");
            looks
                .at(second, "disk b".into(), || assert_eq!(looks.begin(), None, "the second goes on"))
                .unwrap();
            looks.end(second);
        });
        assert_eq!(looks.at(first, "disk b".into(), || ()), None, "a sweep of the past goes on");
        looks.end(first);
        assert!(looks.is_idle());
        let third = looks.begin().unwrap();
        looks.end(first);
        assert!(!looks.is_idle(), "a sweep of the past ends the newest");
        looks.end(third);
    }
}
