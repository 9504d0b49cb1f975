//! Compares, while everybody goes on writing, the disks of which nothing proves that they were left alone
//! ([`crate::start::proof`]). It is a verification that the agent orders itself, and that shows beside the
//! state.
//!
//! Equal: the doubt is removed, durably. The first difference that is no write on its way: others wrote. Then
//! all of those volumes is dirty, and a synchronisation begins, which offers no point before it has found
//! everything that differs, and says since when points lack what others wrote.

use std::time::{Duration, Instant};

use kfilter::dirty::CAUSE_AGENT;

use super::Engine;
use super::verify::{Verifier, is_due};
use crate::clock::now_ns;
use crate::error::Result;
use crate::state::Gap;
use crate::verify::{Phase, Run, VerifyReport};

/// One look for volumes in doubt to the next.
const LOOK: Duration = Duration::from_secs(1);

/// The synchronising thread's own side of it.
#[derive(Default)]
pub(super) struct Prover {
    verifier: Option<Verifier>,
    looked: Option<Instant>,
}

impl Engine<'_> {
    /// Whether something is in doubt that can be looked at now.
    pub(super) fn proves(&mut self) -> bool {
        let agent = self.agent;
        if agent.proof.is_running() {
            return is_due(&self.prover.verifier);
        }
        if self.prover.looked.is_some_and(|then| machine::since(then) < LOOK) {
            return false;
        }
        self.prover.looked = Some(machine::now());
        let only: Vec<u32> = agent.unproven().iter().map(|(id, ..)| *id).collect();
        let volumes = agent.volumes.iter().filter(|volume| only.contains(&volume.id));
        let total_bytes = volumes.filter_map(|volume| volume.size_bytes()).sum();
        if only.is_empty() {
            return false;
        }
        let report = VerifyReport { started_ns: now_ns(), total_bytes, ..VerifyReport::default() };
        let volumes = agent.volumes.iter().map(|volume| volume.name.clone()).collect();
        agent.proof.begin(Run { report, volumes, only, ..Run::default() });
        true
    }

    /// Looks at the next window, and draws the conclusion when there is one.
    pub(super) fn prove(&mut self) -> Result<()> {
        let agent = self.agent;
        let mut verifier = self.prover.verifier.take();
        let done = self.look_on(&agent.proof, &mut verifier);
        self.prover.verifier = verifier;
        done?;
        let Some(report) = agent.proof.report() else { return Ok(()) };
        if report.differing_bytes > 0 || report.state == Phase::Failed {
            return self.is_refuted(&report);
        }
        if report.state == Phase::Done {
            agent.state().update(|state| {
                state.volumes.iter_mut().for_each(|known| known.unproven = None);
                state.forget_doubt();
            })?;
            tracing::info!(compared_bytes = report.compared_bytes, "the disks hold what the replica holds");
            agent.tell_words();
        }
        Ok(())
    }

    /// Others wrote, or nothing can tell. Order: 1 the volumes are dirty and writes only set bits, so that no
    /// point is offered; 2 it is durable that the ring knows, and that nothing is left to be compared. Since
    /// when something is in doubt stays until the synchronisation that names it has ended.
    fn is_refuted(&self, report: &VerifyReport) -> Result<()> {
        let agent = self.agent;
        let in_doubt = agent.unproven();
        agent.proof.end();
        let causes: Vec<String> =
            in_doubt.iter().map(|(_, name, why)| format!("volume {name}: {why}")).collect();
        let found = match report.differences.first() {
            Some(first) => {
                format!("volume {} differs from its replica at byte {}", first.volume, first.offset)
            }
            None => report.why.clone(),
        };
        let cause = format!("a disk was changed while it was not captured ({}; {found})", causes.join("; "));
        tracing::warn!(%cause, "points that were offered since the start do not hold what the disk held");
        agent.is_due(&cause);
        for (id, ..) in &in_doubt {
            if let Some(size_bytes) = agent.shared.ring.size_bytes(*id) {
                agent.shared.ring.mark(*id, 0..size_bytes)?;
            }
        }
        agent.shared.ring.set_mode_bitmap(CAUSE_AGENT)?;
        agent.state().update(|state| {
            state.needs_resync = Some(Gap { cause, since_ns: now_ns() });
            state.gap_in_ring = true;
            state.volumes.iter_mut().for_each(|known| known.unproven = None);
        })
    }
}
