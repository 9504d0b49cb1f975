//! Disks that change while they are served: grown, shrunk, removed or replaced behind the front's back. What
//! can be told is told; nothing is guessed.
//!
//! | found | what happens |
//! |---|---|
//! | more bytes | a `volume` record, before the first write that needs it; what is there already and is no hole is synchronised; clients see the size when they connect again |
//! | fewer bytes | what is missing is dirty and the volume `degraded`, until it has its size back |
//! | its path leads elsewhere | told beside the state: clients go on with the disk that was opened, and so does capture |
//!
//! The kernel module notices a growth by itself, before the first write that needs it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::PoisonError;

use kfilter::dirty::CAUSE_AGENT;

use crate::agent::Agent;
use crate::capture::Volume;
use crate::capture::nbd::CapturedVolume;
use crate::error::{Error, ErrorKind, Result};
use crate::status::State;

/// What is wrong with a disk, in an operator's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ill {
    /// Bytes are missing at its end.
    Shrunk(String),
    /// Its path leads to another disk, or nowhere.
    Gone(String),
}

/// The disks that something is wrong with, by volume.
pub(crate) type Ills = BTreeMap<u32, Ill>;

impl Agent {
    /// Looks at the disks behind the front; blocks as long as one of them does not answer.
    pub(crate) fn look_at_disks(&self, sweep: u64) {
        let before = self.ills();
        for (volume, settings) in self.volumes.iter().zip(&self.settings.volume) {
            let Some(served) = volume.served() else { continue };
            let id = volume.id;
            self.looks.at(sweep, format!("the disk of volume {}", volume.name), || {
                let ill = self.look_at(volume, served, &settings.path, before.get(&id));
                let mut ills = self.ills.lock().unwrap_or_else(PoisonError::into_inner);
                match ill {
                    Some(ill) => drop(ills.insert(id, ill)),
                    None => drop(ills.remove(&id)),
                }
            });
        }
        let found = self.ills();
        let shrunk = found.values().find_map(|ill| match ill {
            Ill::Shrunk(why) => Some(why.clone()),
            Ill::Gone(_) => None,
        });
        if let Some(why) = shrunk {
            self.shared.board.change(State::Degraded, why);
        } else if found != before {
            self.tell_words();
        }
    }

    /// Says beside the state what is to be said.
    pub(crate) fn tell_words(&self) {
        let words = self.words();
        self.shared.board.change_from(State::Replicating, State::Replicating, words, || true);
    }

    /// Volumes that nothing proves to hold what was captured: id, name, and why. Those that are detached are
    /// synchronised when they are attached again.
    pub(crate) fn unproven(&self) -> Vec<(u32, String, String)> {
        let state = self.remembered();
        let known = state.volumes.iter().filter(|known| known.present && !known.is_detached());
        known.filter_map(|known| Some((known.id.0, known.name.clone(), known.unproven.clone()?))).collect()
    }

    pub(crate) fn ills(&self) -> Ills {
        self.ills.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a disk lacks its end: then nothing can be synchronised.
    pub(crate) fn is_shrunk(&self) -> bool {
        self.ills().values().any(|ill| matches!(ill, Ill::Shrunk(_)))
    }

    fn look_at(
        &self,
        volume: &Volume,
        served: &CapturedVolume,
        path: &Path,
        before: Option<&Ill>,
    ) -> Option<Ill> {
        let known = served.size_bytes_now();
        let gone = || {
            let why = format!(
                "volume {}: {} was removed or replaced; clients and capture go on with the disk that was opened: copy it \
                 from the NBD socket before the agent stops",
                volume.name,
                path.display()
            );
            (!served.backing.is_at(path)).then_some(Ill::Gone(why))
        };
        let Ok(now) = served.backing.measure() else { return gone() };
        if now < known {
            let why = format!(
                "volume {}: {} shrank from {known} to {now} bytes; what was there is lost: give it its size back, and it is \
                 synchronised",
                volume.name,
                path.display()
            );
            if before != Some(&Ill::Shrunk(why.clone())) {
                tracing::error!("{why}");
                self.is_due(&format!("volume {} had shrunk to {now} bytes", volume.name));
                if let Err(error) = self.lose(volume.id, now..known) {
                    tracing::error!(%error, "what is missing cannot be noted as dirty");
                }
            }
            return Some(Ill::Shrunk(why));
        }
        if now > known
            && let Err(error) = self.grow(volume, served, known..now)
        {
            tracing::warn!(%error, "the volume cannot grow now; it is tried again");
        }
        gone()
    }

    /// Order: 1 where something is there already, writes only set bits, so that no point from here on is
    /// offered and nobody takes the volume for replicated; 2 the ring knows the size, and the stream, before
    /// any write that needs it; 3 what is there is dirty; 4 clients may use it.
    fn grow(&self, volume: &Volume, served: &CapturedVolume, new: Range<u64>) -> Result<()> {
        let (name, from, to) = (&volume.name, new.start, new.end);
        tracing::info!(volume = %name, from, to, "the disk has grown; clients see it when they connect again");
        let runs = served.backing.block_status(from, to - from, usize::MAX).unwrap_or_default();
        let holes: u64 = runs.iter().filter(|run| run.hole).map(|run| run.length_bytes).sum();
        let holds_something = holes < to - from;
        if holds_something {
            self.is_due(&format!("volume {name} grew from {from} to {to} bytes, and holds something there"));
            self.shared.ring.set_mode_bitmap(CAUSE_AGENT)?;
        }
        served.tell_growth(to).map_err(|refused| {
            Error::new(ErrorKind::Ring, format!("volume {name}: the ring refused its new size: {refused:?}"))
        })?;
        if holds_something {
            self.lose(volume.id, new)?;
        }
        served.serve_growth(to);
        Ok(())
    }

    /// A range is to be synchronised, and no point is one until then.
    fn lose(&self, volume: u32, range: Range<u64>) -> Result<()> {
        self.shared.ring.mark(volume, range)?;
        self.shared.ring.set_mode_bitmap(CAUSE_AGENT)
    }

    pub(crate) fn is_due(&self, cause: &str) {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause.to_owned());
    }

    /// What is to be said while replicating: which volumes are not captured, and which disks are not where
    /// they were.
    pub(crate) fn words(&self) -> String {
        let out: Vec<&str> = self
            .volumes
            .iter()
            .filter(|volume| !volume.is_attached())
            .map(|volume| volume.name.as_str())
            .collect();
        let out = (!out.is_empty()).then(|| format!("detached: {}", out.join(", ")));
        let ills = self.ills();
        let gone = ills.values().map(|ill| match ill {
            Ill::Gone(why) | Ill::Shrunk(why) => why.clone(),
        });
        let unproven = self.unproven().into_iter().map(|(_, name, why)| {
            format!("volume {name} is being compared with its replica, since nothing proves that nobody else changed it: {why}")
        });
        out.into_iter().chain(gone).chain(unproven).collect::<Vec<_>>().join("; ")
    }
}
