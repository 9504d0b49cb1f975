//! Disks are looked at on a thread of their own: one that hangs holds up nothing but that look, and its silence is told.
//!
//! State: which volume's disk is being looked at, and since when. One look at a time; while one hangs no other begins, so the
//! other disks' growth is noticed only after it.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use machine::Mutex;

use crate::agent::Agent;

/// A disk that takes longer to say how large it is does not answer.
const SILENT: Duration = Duration::from_secs(3);

/// The look that is under way.
#[derive(Default)]
pub(crate) struct Looks {
    now: Mutex<Option<Look>>,
}

#[derive(Clone)]
struct Look {
    since: Instant,
    /// The volume, once one is being looked at.
    volume: String,
    told: bool,
}

impl Looks {
    fn set(&self, to: Option<Look>) -> Option<Look> {
        std::mem::replace(&mut *self.now.lock().unwrap_or_else(PoisonError::into_inner), to)
    }

    fn get(&self) -> Option<Look> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next disk is being looked at.
    pub(crate) fn at(&self, volume: &str) {
        self.set(Some(Look { since: machine::now(), volume: volume.to_owned(), told: false }));
    }

    /// What is to be said of a disk that does not answer.
    pub(crate) fn words(&self) -> String {
        let silent = self.get().filter(|look| machine::since(look.since) >= SILENT);
        silent.map_or(String::new(), |look| {
            let seconds = machine::since(look.since).as_secs();
            format!("the disk of volume {} has not answered for {seconds} s", look.volume)
        })
    }

    /// Whether no look is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.get().is_none()
    }
}

impl Agent {
    /// Looks at the disks, and keeps what is to be kept on disks of our own, unless the last such look still hangs.
    pub(crate) fn look_aside(self: &Arc<Self>) {
        if let Some(look) = self.looks.get() {
            if !look.told && machine::since(look.since) >= SILENT {
                tracing::warn!(
                    volume = %look.volume,
                    "the disk does not answer: its clients wait for it, as without us; the link and other volumes go on"
                );
                self.looks.set(Some(Look { told: true, ..look }));
            }
            return;
        }
        self.looks.at("(the agent's own directory)");
        let agent = self.clone();
        let look = move || {
            agent.keep_state();
            agent.look_at_disks();
            if agent.looks.set(None).is_some_and(|look| look.told) {
                tracing::info!("the disk answers again");
            }
        };
        if let Err(error) = machine::spawn("af-disks", look) {
            self.looks.set(None);
            tracing::warn!(%error, "start the thread that looks at the disks");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_told_and_a_short_look_is_not() {
        let looks = Looks::default();
        assert!(looks.is_idle() && looks.words().is_empty());
        looks.at("v");
        assert!(!looks.is_idle() && looks.words().is_empty());
        let since = machine::now().checked_sub(Duration::from_secs(12)).unwrap();
        looks.set(Some(Look { since, volume: "v".into(), told: false }));
        assert_eq!(looks.words(), "the disk of volume v has not answered for 12 s");
    }
}
