//! The server: listeners, connections, shutdown.
//!
//! One thread accepts; each connection gets a named thread with a current-thread runtime of its own, so that
//! a write to the page cache can be done right where the request was read. State: how many connections there
//! are, and their places (`places`). Limits: [`Settings`].

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use tokio::sync::watch;

use crate::connection::{Connection, Limits, Phase, negotiate};
use crate::error::{Error, Kind};
use crate::export::Export;
use crate::handshake::ExportInfo;
use crate::inbox::Inbox;
use crate::listen::{Listener, accept_any};
use crate::memory::Memory;
use crate::places::{self, Places, Ticket};
use crate::pool::Pool;
use crate::proto::MAX_PAYLOAD_BYTES;
use crate::socket::Socket;

/// Pause after a failed accept (out of descriptors, most likely), so that the thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Memory of each kind that connections share.
const SHARED_BYTES: usize = 32 << 20;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address; port 0 takes a free one. NBD has no authentication here: loopback, or a tunnel.
    Tcp(SocketAddr),
    /// A Unix socket. A stale file is replaced, a live one is not.
    Unix {
        /// Its path, at most 103 bytes.
        path: PathBuf,
        /// Mode of its file; 0600 unless there is a reason.
        mode: u32,
    },
}

/// Limits of a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Time a client has to choose its export.
    pub handshake_timeout: Duration,
    /// Time that it may be silent meanwhile.
    pub handshake_idle: Duration,
    /// Connections in the handshake; beyond it the oldest gives way.
    pub max_handshakes: usize,
    /// Connections that have chosen their export, in all.
    pub max_connections: usize,
    /// Connections on one export.
    pub max_connections_per_export: usize,
    /// Requests of one connection that may be in the pool.
    pub max_in_flight: usize,
    /// Largest READ or WRITE; lowering it bounds memory further.
    pub max_payload_bytes: u32,
    /// Threads for flushes, reads from disk and trims, shared by all connections.
    pub pool_threads: usize,
    /// Requests that may wait for a pool thread.
    pub pool_queue: usize,
    /// For replies beyond a connection's own allowance; may be shared by several servers.
    pub replies: Memory,
    /// For payloads of WRITEs longer than a piece; the same.
    pub writes: Memory,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            handshake_idle: Duration::from_secs(3),
            max_handshakes: 64,
            max_connections: 64,
            max_connections_per_export: 16,
            max_in_flight: 128,
            max_payload_bytes: MAX_PAYLOAD_BYTES,
            pool_threads: 4,
            pool_queue: 256,
            replies: Memory::new(SHARED_BYTES),
            writes: Memory::new(SHARED_BYTES),
        }
    }
}

/// What the connection threads share.
struct Shared {
    exports: Vec<Arc<dyn Export>>,
    places: Arc<Places>,
    settings: Settings,
    pool: Pool,
    phase: watch::Sender<Phase>,
    connections: watch::Sender<usize>,
}

/// A running server. Dropping it closes everything, without waiting for what is in flight.
pub struct Server {
    shared: Arc<Shared>,
    tcp_addresses: Vec<SocketAddr>,
    accepting: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Listens on all of `listen` and serves all of `exports`; the first is the default one (empty name).
    /// Returns when clients can connect. Blocks for a moment; needs no runtime, and may be called
    /// on one.
    pub fn start(
        listen: &[Listen],
        exports: Vec<Arc<dyn Export>>,
        settings: Settings,
    ) -> Result<Self, Error> {
        let places = Places::new(places::Limits {
            handshakes: settings.max_handshakes,
            served: settings.max_connections,
            served_per_export: settings.max_connections_per_export,
        });
        let shared = Arc::new(Shared {
            exports,
            places,
            pool: Pool::start(settings.pool_threads.max(1), settings.pool_queue)?,
            settings,
            phase: watch::Sender::new(Phase::Serving),
            connections: watch::Sender::new(0),
        });
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (listen, for_thread) = (listen.to_vec(), Arc::clone(&shared));
        let accepting = thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || run_accept(&listen, &for_thread, ready))
            .map_err(|error| Error::caused(Kind::Io, "start the accept thread", error))?;
        let tcp_addresses = is_ready
            .recv()
            .unwrap_or_else(|_| Err(Error::new(Kind::Io, "the accept thread ended before it listened")))?;
        Ok(Self { shared, tcp_addresses, accepting: Some(accepting) })
    }

    /// The TCP addresses listened on, with their real ports, in the order given.
    pub fn tcp_addresses(&self) -> &[SocketAddr] {
        &self.tcp_addresses
    }

    /// Connections now, those in the handshake included.
    pub fn connections(&self) -> usize {
        *self.shared.connections.borrow()
    }

    /// Stops accepting and taking requests, and waits until what is in flight is answered, at most `deadline`
    /// long. Then the connections are closed; requests not taken get no answer, so that clients which
    /// reconnect send them to the next server instead of seeing an error. When it returns no socket is
    /// listened on.
    ///
    /// Returns how many connections and how many pool jobs (also of clients that had gone) were left. With 0
    /// nothing of this server touches an export any more; otherwise a thread ends only when its export lets
    /// go of it.
    pub async fn shutdown(mut self, deadline: Duration) -> usize {
        self.shared.phase.send_replace(Phase::Draining);
        let mut connections = self.shared.connections.subscribe();
        let mut jobs = self.shared.pool.unfinished();
        // Connections first: they add jobs. Both senders live as long as `self`.
        let all_done = async {
            let _ = connections.wait_for(|connections| *connections == 0).await;
            let _ = jobs.wait_for(|jobs| *jobs == 0).await;
        };
        let left = match tokio::time::timeout(deadline, all_done).await {
            Ok(()) => 0,
            Err(_) => *connections.borrow() + *jobs.borrow(),
        };
        if let Some(accepting) = self.accepting.take() {
            // It only has to wake up and drop its sockets; a panic in it was reported by its own hook.
            let _ = accepting.join();
        }
        left
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.phase.send_replace(Phase::Closing);
    }
}

type Ready = mpsc::SyncSender<Result<Vec<SocketAddr>, Error>>;

fn run_accept(listen: &[Listen], shared: &Arc<Shared>, ready: Ready) {
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(Error::caused(Kind::Io, "start a runtime", error)));
            return;
        }
    };
    runtime.block_on(async {
        let bound: Result<Vec<_>, _> = listen.iter().map(Listener::bind).collect();
        let listeners = match bound {
            Ok(listeners) => listeners,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let addresses = listeners.iter().filter_map(Listener::tcp_address).collect();
        // If nobody waits any more, the shutdown that came with it ends the loop below.
        let _ = ready.send(Ok(addresses));
        // Its clients use a protected disk: a fault in here takes it from none of them, and keeps no new one
        // out.
        while let Err(said) = machine::caught(accept(&listeners, shared)).await {
            tracing::error!(said, "accepting NBD clients panicked: a fault of this program; it goes on");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    });
}

async fn accept(listeners: &[Listener], shared: &Arc<Shared>) {
    let mut phase = shared.phase.subscribe();
    let mut number = 0u64;
    loop {
        let accepted = tokio::select! {
            biased;
            _ = phase.wait_for(|phase| *phase > Phase::Serving) => return,
            accepted = accept_any(listeners) => accepted,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept an NBD client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        number += 1;
        if let Err(error) = start_connection(socket, peer.clone(), number, shared) {
            tracing::warn!(peer, %error, "NBD client refused");
        }
    }
}

/// Counts a connection for as long as it lives, also when its thread panics.
struct Counted(Arc<Shared>);

impl Counted {
    fn new(shared: &Arc<Shared>) -> Result<Self, Error> {
        // Those that gave way end a moment later.
        let limit = shared.settings.max_connections + 2 * shared.settings.max_handshakes;
        let counted = shared.connections.send_if_modified(|connections| {
            let room = *connections < limit;
            *connections += usize::from(room);
            room
        });
        match counted {
            true => Ok(Self(Arc::clone(shared))),
            false => Err(Error::new(Kind::TooManyConnections, format!("{limit} in all"))),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.send_modify(|connections| *connections -= 1);
    }
}

fn start_connection(socket: OwnedFd, peer: String, number: u64, shared: &Arc<Shared>) -> Result<(), Error> {
    let counted = Counted::new(shared)?;
    let ticket = shared.places.enter(number, &peer, Instant::now());
    let thread = thread::Builder::new().name(format!("nbd-conn-{number}"));
    let serve = move || {
        let shared = &counted.0;
        let runtime = Builder::new_current_thread().enable_all().build();
        let result = match runtime {
            Ok(runtime) => runtime.block_on(serve_connection(socket, shared, &peer, ticket)),
            Err(error) => Err(Error::caused(Kind::Io, "start a runtime", error)),
        };
        match result {
            Ok(()) => tracing::debug!(peer, "NBD client left"),
            Err(error) => tracing::warn!(peer, %error, "NBD connection ended"),
        }
    };
    thread.spawn(serve).map_err(|error| Error::caused(Kind::Io, "start a connection thread", error))?;
    Ok(())
}

async fn serve_connection(socket: OwnedFd, shared: &Shared, peer: &str, ticket: Ticket) -> Result<(), Error> {
    let settings = &shared.settings;
    let limits = Limits {
        handshake_timeout: settings.handshake_timeout,
        handshake_idle: settings.handshake_idle,
        max_in_flight: settings.max_in_flight,
        max_payload_bytes: settings.max_payload_bytes,
        replies: settings.replies.clone(),
        writes: settings.writes.clone(),
    };
    let mut socket =
        Socket::new(socket).map_err(|error| Error::caused(Kind::Io, "register the socket", error))?;
    let mut inbox = Inbox::new();
    let exports = shared.exports.iter().map(|export| ExportInfo::of(&**export)).collect();
    let mut phase = shared.phase.subscribe();
    let selection = tokio::select! {
        selection = negotiate(&mut socket, &mut inbox, exports, &limits) => selection?,
        () = ticket.sent_away() => {
            return Err(Error::new(Kind::TooManyConnections, "in the handshake: this one gave way"));
        }
        _ = phase.wait_for(|phase| *phase > Phase::Serving) => return Ok(()),
    };
    let Some(selection) = selection else { return Ok(()) };
    ticket.sit(selection.export, Instant::now())?;
    let export = Arc::clone(&shared.exports[selection.export]);
    tracing::debug!(peer, export = export.name(), "NBD client connected");
    let pool = shared.pool.clone();
    Connection::new(socket, inbox, selection, export, limits, pool, ticket).serve(phase).await
}
