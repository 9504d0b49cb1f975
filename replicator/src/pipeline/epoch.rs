//! A new epoch in a running agent: when histories do not join, or the journal failed, the clients go on while
//! the stream begins anew. The same steps as at a start, without closing a socket.
//!
//! Crash order
//! 1. writes only set bits, every volume is dirty in the ring, and the gap is durable without the ring: a
//!    crash from here on ends in a new epoch at the next start;
//! 2. what the ring still holds is given up, until it is empty;
//! 3. the new epoch is durable, above everything that either side has used;
//! 4. the journal begins it, with the volumes: the stream begins as every receiver demands, whoever writes
//!    first;
//! 5. the ring is the new epoch's (cut before: it is nobody's, and lost);
//! 6. it is durable that the ring knows of the gap: from here on a crash goes on with what is left of the
//!    bits.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use journal::record::{Op, Record};
use journal::{Extent, Lsn, Position};

use super::{Appended, Pipeline};
use crate::agent::Agent;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result, describe};
use crate::start;
use crate::state::StateFile;

impl Pipeline {
    /// Goes a step towards the epoch that is due; the order is withdrawn when it has begun, or cannot begin
    /// now.
    ///
    /// # Errors
    /// Bits cannot be set.
    pub(super) fn turn(&mut self, agent: &Agent) -> Result<()> {
        if !self.apart {
            if !self.is_broken() {
                let why = self.cause_of_gap();
                self.lose_all(&why)?;
                self.shared.health.broken(&why);
            }
            self.apart = true;
        }
        let captured = self.shared.ring.captured_lsn();
        if self.shared.ring.first_held_lsn() <= captured {
            return Ok(()); // `gather` gives it up, and `release` waits for what is in flight.
        }
        match self.begin_epoch(agent, Lsn(captured)) {
            Ok(()) => {
                self.apart = false;
                self.shared.apart.store(false, Ordering::Release);
                self.shared.health.good();
                tracing::info!(epoch = self.stamp.epoch.number, "a new epoch began while the disk is used");
            }
            Err(error) => {
                let why = format!("no new epoch can begin: {}", describe(&error));
                tracing::warn!("{why}");
                self.shared.health.broken(&why);
            }
        }
        self.shared.epoch_due.store(false, Ordering::Release);
        Ok(())
    }

    fn cause_of_gap(&self) -> String {
        let state = self.shared.remembered.get();
        let gap = state.needs_resync.as_ref().map(|gap| gap.cause.clone());
        gap.unwrap_or_else(|| "source and replica do not join".to_owned())
    }

    /// Steps 3 to 6. The ring is empty, and writes only set bits.
    fn begin_epoch(&mut self, agent: &Agent, captured: Lsn) -> Result<()> {
        let shared = self.shared.clone();
        let mut file = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.note_sizes(agent, &mut file)?;
        let kept = self.writer.take().filter(|_| !file.get().journal_damaged);
        let opened = match kept {
            Some(writer) => Some(writer),
            None => start::reopen_journal(&agent.settings, &agent.surroundings, &mut file)?,
        };
        let appended = opened.as_ref().map(|writer| writer.appended().lsn).unwrap_or_default();
        let last = captured.max(self.journaled.lsn).max(appended).max(file.get().epoch_start);
        file.begin_epoch(Some(last), true)?;
        let state = file.get();
        let at = Position::epoch_start(state.lineage, state.epoch, state.epoch_start);
        self.writer = Some(start::begin_in_journal(&agent.settings, &agent.surroundings, &file, opened, at)?);
        shared.set_tail(self.writer.as_ref());
        self.stamp.epoch = at.epoch;
        self.journaled = at;
        shared.progress.epoch_began(at);
        let first_lsn = self.state_volumes(&file)?.next();
        drop(file);
        if let Some(tap) = agent.renew_ring(first_lsn)? {
            self.tap = tap;
        }
        self.releasable = Lsn(first_lsn.0 - 1);
        let mut file = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        file.update(|state| state.gap_in_ring = true)
    }

    /// What the new ring is made for is what the group knows.
    fn note_sizes(&self, agent: &Agent, file: &mut StateFile) -> Result<()> {
        let now = |id: u32| {
            let volume = agent.volumes.iter().find(|volume| volume.id == id);
            let device = volume.and_then(|volume| volume.disk()).map(|disk| disk.size_bytes());
            device.max(self.shared.ring.size_bytes(id))
        };
        file.update(|state| {
            for known in &mut state.volumes {
                known.size_bytes = known.size_bytes.max(now(known.id.0).unwrap_or(0));
            }
        })
    }

    /// The epoch's first frame; the lsn of its last record.
    fn state_volumes(&mut self, file: &StateFile) -> Result<Lsn> {
        let times = self.writer.iter().flat_map(|writer| writer.segments()).map(|held| held.last_time_ns);
        let time_ns = times.max().unwrap_or(0).max(now_ns());
        self.batch.clear();
        let mut lsn = self.journaled.lsn;
        for known in &file.get().volumes {
            lsn = lsn.next();
            let extent = Extent::default();
            let record = Record { op: Op::Volume, flags: 0, volume: known.id, lsn, time_ns, extent };
            self.batch.push(&record, &start::volume_record(known));
            self.translator.told(known.id.0, known.size_bytes);
        }
        let failed = |why: String| Err(Error::new(ErrorKind::NotPossible, why));
        match self.append_alone()? {
            Appended::Done => Ok(lsn),
            Appended::NoRoom(why) => failed(why),
            Appended::Broken(why) => {
                // Not written again: the next try opens it anew.
                self.writer = None;
                failed(why)
            }
        }
    }
}
