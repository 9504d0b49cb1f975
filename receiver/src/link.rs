//! LINK: connections from sources, each bound to one group by the identity that it proved.
//!
//! ```text
//! accept ─► TLS, pinned identity ─► Hello ─► greet: version, group, owner, lineage ─► attach ─► Welcome ─► session
//! ```
//! Owns the accepted connections; the groups they speak to belong to [`crate::agent`]. What a peer sends can end its own
//! connection and nothing else. Invariants: at most `max_connections` at once; a peer that does not say hello in time is
//! dropped; every refusal is told with its reason before the connection closes.

mod greet;
mod questions;
pub(crate) mod session;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use wire::message::{ErrorCode, Message};
use wire::{ControlReceiver, ControlSender, Fingerprint, Server, endpoint, framing};

use crate::agent::Shared;
use crate::ingest::Refusal;

/// Between the first packet and the hello.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// For a peer to read the reason of its refusal.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// Code of a connection that we closed; the reason stands on the control stream.
const CLOSED: u32 = 1;

/// Accepts connections until the endpoint is closed or the agent stops; returns when all of them have ended.
pub(crate) async fn serve(server: Server, shared: Arc<Shared>) {
    let limit = shared.settings.max_connections as usize;
    let slots = Arc::new(Semaphore::new(limit));
    let mut connections = JoinSet::new();
    let mut stopping = shared.stopping.subscribe();
    loop {
        // Whichever side dropped the flag, it means the same: no more connections.
        let stopped = async { stopping.wait_for(|stop| *stop).await.map(|_| ()) };
        tokio::select! {
            incoming = server.accept() => {
                let Some(incoming) = incoming else { break };
                // When places get scarce, an address must answer before it takes one: forged ones cannot.
                if slots.available_permits() * 2 < limit && incoming.may_retry() {
                    // It cannot fail where it may be done; a lost retry is the client's to repeat.
                    let _ = incoming.retry();
                    continue;
                }
                match slots.clone().try_acquire_owned() {
                    Ok(slot) => {
                        let shared = shared.clone();
                        connections.spawn(async move {
                            connection(incoming, &shared).await;
                            drop(slot);
                        });
                    }
                    Err(_) => {
                        let peer = incoming.remote_address();
                        tracing::warn!(%peer, "refused: max_connections are open");
                        incoming.refuse();
                    }
                }
            }
            Some(_) = connections.join_next() => {}
            _ = stopped => break,
        }
    }
    while connections.join_next().await.is_some() {}
    // A peer that is gone is not waited for.
    let _ = timeout(FAREWELL_TIMEOUT, server.close("the receiver is stopping")).await;
}

/// One connection, from its first packet to its end.
async fn connection(incoming: quinn::Incoming, shared: &Arc<Shared>) {
    let peer = incoming.remote_address();
    match timeout(GREETING_TIMEOUT, open(incoming)).await {
        Ok(Ok(opened)) => {
            let connection = opened.connection.clone();
            greeted(opened, peer, shared).await;
            connection.close(CLOSED.into(), b"");
        }
        Ok(Err(error)) => tracing::warn!(%peer, error = %Chain(&error), "connection refused"),
        Err(_) => tracing::warn!(%peer, "connection dropped: no hello in time"),
    }
}

/// A connection whose peer is known and has said hello.
struct Opened {
    connection: quinn::Connection,
    identity: Fingerprint,
    sender: ControlSender,
    receiver: ControlReceiver,
    hello: Message,
}

async fn open(incoming: quinn::Incoming) -> wire::Result<Opened> {
    let (connection, identity) = endpoint::handshake(incoming).await?;
    let (sender, mut receiver) = framing::accept(&connection).await?;
    let hello = receiver.next().await?.ok_or_else(|| {
        wire::Error::new(wire::ErrorKind::Malformed, "the control stream ended before a hello")
    })?;
    Ok(Opened { connection, identity, sender, receiver, hello })
}

async fn greeted(opened: Opened, peer: SocketAddr, shared: &Arc<Shared>) {
    let Opened { connection, identity, sender, receiver, hello } = opened;
    let greeted = greet::greet(shared, &identity, hello).await;
    let (group, hello) = match greeted {
        Ok(greeted) => greeted,
        Err(refusal) => {
            tracing::warn!(%peer, %identity, reason = %refusal, "source refused");
            return farewell(sender, refusal).await;
        }
    };
    tracing::info!(%peer, group = %group.name(), agent = hello.agent, "source connected");
    let wires = session::Wires { connection, sender, receiver, peer, identity };
    let end = session::run(wires, &group, shared, &hello).await;
    tracing::info!(%peer, group = %group.name(), reason = %end, "source disconnected");
}

/// Tells the peer why, and waits until it knows or does not care.
async fn farewell(mut sender: ControlSender, refusal: Refusal) {
    let Refusal { code, reason } = refusal;
    let told = async {
        if sender.send(&Message::Error { code, reason }).await.is_ok() {
            sender.finish().await;
        }
    };
    // A peer that is gone does not need the reason.
    let _ = timeout(FAREWELL_TIMEOUT, told).await;
}

/// What an ended receiver thread means to a peer.
fn stopping() -> Refusal {
    Refusal::new(ErrorCode::JournalFailed, "the receiver is stopping")
}

/// An error with its causes on one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
