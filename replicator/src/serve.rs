//! From a started agent to a served disk: the NBD sockets, where there are any.
//!
//! Invariant: the front opens whatever is to be synchronised, and whether or not it can be (decision 0009).

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::agent::Agent;
use crate::error::{Error, ErrorKind, Result};

impl Agent {
    /// Opens the NBD sockets.
    pub(crate) fn serve(&self) -> Result<()> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.halt.stop.load(Ordering::Acquire) {
            return Ok(());
        }
        // Together, not each: so much memory is all that the clients of this agent can take beside their
        // connections' own.
        let nbd::Settings { replies, writes, .. } = nbd::Settings::default();
        let volumes = if self.surroundings.serves { &*self.volumes } else { &[] };
        for (volume, settings) in volumes.iter().zip(&self.settings.volume) {
            // What the kernel captures needs no front.
            let Some(volume) = volume.served() else { continue };
            let mut listen = vec![nbd::Listen::Unix { path: settings.nbd.clone(), mode: 0o600 }];
            listen.extend(settings.nbd_tcp.map(nbd::Listen::Tcp));
            let limits = nbd::Settings {
                max_connections: usize::try_from(self.settings.nbd.max_connections).unwrap_or(16),
                max_connections_per_export: usize::try_from(self.settings.nbd.max_connections).unwrap_or(16),
                pool_threads: usize::try_from(self.settings.nbd.threads).unwrap_or(4),
                replies: replies.clone(),
                writes: writes.clone(),
                ..nbd::Settings::default()
            };
            let server = nbd::Server::start(&listen, vec![volume.clone()], limits).map_err(|error| {
                Error::because(ErrorKind::Settings, format!("serve volume {} over NBD", volume.name), error)
            })?;
            servers.push(server);
        }
        self.serving.store(true, Ordering::Release);
        drop(servers);
        Ok(())
    }
}
