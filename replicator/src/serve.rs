//! From a started agent to a served disk: the offline synchronisation, if one is due, then the NBD sockets.
//!
//! Invariant: the front opens whatever becomes of the synchronisation (decision 0007); a gap that it did not repair stays
//! remembered, durably.

use std::iter::once;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kfilter::{Entry, Op};

use crate::agent::Agent;
use crate::capture::nbd::CapturedVolume;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::resync;
use crate::start::{self, Repair};
use crate::status::State;

impl Agent {
    /// Repairs what is to be repaired; nothing is served meanwhile.
    pub(crate) fn synchronise(&self, repair: &Repair, cause: String, first: bool) -> Result<()> {
        match repair {
            Repair::None => Ok(()),
            Repair::Dirty(ranges) => {
                let ranges_of = |volume: &CapturedVolume| {
                    let found = ranges.iter().find(|(id, _)| id.0 == volume.id);
                    found.map(|(_, ranges)| ranges.clone()).unwrap_or_default()
                };
                self.emit(State::Resyncing, cause, ranges_of)
            }
            Repair::Everything => {
                let gap = self.state().get().needs_resync.clone();
                self.announce_volumes()?;
                let state = if first { State::Syncing } else { State::Resyncing };
                self.emit(state, cause, |volume| once(0..nbd::Export::size_bytes(volume)).collect())?;
                // Only the gap that this synchronisation began with: a newer one is not repaired by it.
                self.state().update(|state| {
                    if state.needs_resync == gap {
                        state.needs_resync = None;
                    }
                })
            }
        }
    }

    /// Opens the front whatever became of the synchronisation: a protected disk is served also when its journal or its
    /// receiver is not to be had. What was not synchronised stays remembered, and the group says so.
    pub(crate) fn serve_after(&self, synchronised: Result<()>) -> Result<()> {
        if let Err(error) = synchronised {
            if self.halt.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            let cause = match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            };
            tracing::error!(%cause, "not synchronised; the disk is served without protection");
            self.shared.ring.set_mode_bitmap(kfilter::dirty::CAUSE_AGENT, now_ns());
            let why = format!(
                "not synchronised: {cause}; writes are not recorded, restart the agent to synchronise"
            );
            self.shared.board.change(State::Degraded, why);
        }
        self.shared.may_wait.store(false, Ordering::Release);
        self.serve()
    }

    /// Every epoch states its volumes before anything else.
    fn announce_volumes(&self) -> Result<()> {
        let known = self.state().get().volumes.clone();
        for volume in &known {
            let mut entry = Entry::event(Op::Volume, volume.id.0, 0);
            let payload = start::volume_record(volume);
            entry.payload_len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
            resync::put(&self.shared.ring, entry, &payload, &self.halt)?;
        }
        Ok(())
    }

    /// Begin, content, end; returns when the end is journaled.
    fn emit(
        &self,
        state: State,
        cause: String,
        ranges: impl Fn(&CapturedVolume) -> Vec<std::ops::Range<u64>>,
    ) -> Result<()> {
        let ring = &self.shared.ring;
        let volumes = self.volumes.iter().map(|volume| (volume.as_ref(), ranges(volume))).collect();
        let work = resync::Work { volumes, state, cause };
        resync::until_room("begin", &self.halt, || ring.begin_resync(now_ns()))?;
        let started = Instant::now();
        let sent = resync::emit(&work, ring, &self.shared.board, &self.halt)?;
        let end = resync::until_room("end", &self.halt, || ring.end_resync(now_ns()))?;
        let mut at = self.shared.progress.position();
        while at.lsn.0 < end {
            self.halt.check()?;
            self.shared.progress.wait_beyond(&at, Duration::from_millis(100));
            at = self.shared.progress.position();
        }
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(cause = %work.cause, content_bytes = sent, seconds, "synchronised");
        Ok(())
    }

    /// Opens the NBD sockets.
    fn serve(&self) -> Result<()> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.halt.stop.load(Ordering::Acquire) {
            return Ok(());
        }
        for (volume, settings) in self.volumes.iter().zip(&self.settings.volume) {
            let mut listen = vec![nbd::Listen::Unix { path: settings.nbd.clone(), mode: 0o600 }];
            listen.extend(settings.nbd_tcp.map(nbd::Listen::Tcp));
            let limits = nbd::Settings {
                max_connections: usize::try_from(self.settings.nbd.max_connections).unwrap_or(16),
                max_connections_per_export: usize::try_from(self.settings.nbd.max_connections).unwrap_or(16),
                pool_threads: usize::try_from(self.settings.nbd.threads).unwrap_or(4),
                ..nbd::Settings::default()
            };
            let server = nbd::Server::start(&listen, vec![volume.clone()], limits).map_err(|error| {
                Error::because(ErrorKind::Settings, format!("serve volume {} over NBD", volume.name), error)
            })?;
            servers.push(server);
        }
        self.serving.store(true, Ordering::Release);
        drop(servers);
        self.shared.board.change(State::Replicating, "");
        Ok(())
    }
}
