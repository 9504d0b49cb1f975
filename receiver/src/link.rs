//! LINK: connections from sources, each bound to one group by the identity that it proved.
//!
//! ```text
//! accept ─► TLS, pinned identity ─► Hello ─► greet: version, group, owner, lineage ─► attach ─► Welcome ─► session
//! ```
//! Owns the accepted connections; the groups they speak to belong to [`crate::agent`]. What a peer sends can
//! end its own connection and nothing else. Invariants: at most `max_connections` known ones at once, and few
//! that are not known yet ([`guests`]); what a peer may send before it has its group's place is a hello; a
//! peer that does not say it in time is dropped; every refusal is told with its reason before the connection
//! closes.

mod greet;
mod guests;
mod questions;
pub(crate) mod session;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use machine::text::Gate;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use wire::message::{ErrorCode, Message};
use wire::{ControlReceiver, ControlSender, Fingerprint, Server, endpoint, framing};

use crate::agent::Shared;
use crate::ingest::Refusal;
use guests::{Guests, Stay};

/// Between the first packet and the end of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between the first packet and the hello, and for the answer to a question of the greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// For a peer to read the reason of its refusal.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// Code of a connection that we closed; the reason stands on the control stream.
const CLOSED: u32 = 1;

/// What connections share beside the groups.
struct Door {
    shared: Arc<Shared>,
    guests: Arc<Guests>,
    /// Of those that are known.
    slots: Arc<Semaphore>,
    /// Log lines that peers cause.
    gate: Gate,
}

/// Accepts connections until the endpoint is closed or the agent stops; returns when all of them have ended.
///
/// # Errors
/// In words, where it ends and the agent does not: nothing would be received any more, and nothing would say
/// so.
pub(crate) async fn serve(server: Server, shared: Arc<Shared>) -> Result<(), String> {
    let slots = Arc::new(Semaphore::new(shared.settings.max_connections as usize));
    let mut stopping = shared.stopping.subscribe();
    let door = Arc::new(Door { shared, guests: Arc::default(), slots, gate: Gate::default() });
    let mut connections = JoinSet::new();
    let ended = loop {
        // Whichever side dropped the flag, it means the same: no more connections.
        let stopped = async { stopping.wait_for(|stop| *stop).await.map(|_| ()) };
        tokio::select! {
            incoming = server.accept() => {
                let Some(incoming) = incoming else { break Err("the QUIC endpoint was closed".to_owned()) };
                // When places get scarce, an address must answer before it takes one: forged ones cannot.
                if door.guests.is_crowded() && incoming.may_retry() {
                    // It cannot fail where it may be done; a lost retry is the client's to repeat.
                    let _ = incoming.retry();
                    continue;
                }
                let stay = door.guests.enter(incoming.remote_address().ip());
                let door = door.clone();
                connections.spawn(async move {
                    let peer = incoming.remote_address();
                    // A fault of ours ends the connection that met it, and has its name in the log.
                    if let Err(said) = machine::caught(connection(incoming, stay, &door)).await {
                        tracing::error!(%peer, said, "the task of a connection panicked: a fault of this program");
                    }
                });
            }
            Some(_) = connections.join_next() => {}
            _ = stopped => break Ok(()),
        }
    };
    while connections.join_next().await.is_some() {}
    // A peer that is gone is not waited for.
    let _ = timeout(FAREWELL_TIMEOUT, server.close("the receiver is stopping")).await;
    ended
}

impl Door {
    /// A warning that peers may cause as often as they like: told once a minute for its reason.
    fn warn(&self, peer: SocketAddr, what: &str, why: &str) {
        if let Some(held_back) = self.gate.due(what) {
            tracing::warn!(%peer, why, held_back, "{what}");
        }
    }
}

/// One connection, from its first packet to its end.
async fn connection(incoming: quinn::Incoming, stay: Stay, door: &Door) {
    let peer = incoming.remote_address();
    let mut stopping = door.shared.stopping.subscribe();
    let opened = tokio::select! {
        opened = timeout(GREETING_TIMEOUT, open(incoming, &stay, door)) => opened,
        // What has no group's place yet is not waited for.
        _ = stopping.wait_for(|stop| *stop) => return,
        () = stay.sent_away() => return door.warn(peer, "connection dropped: others knock, and it says nothing", ""),
    };
    match opened {
        Ok(Ok(opened)) => {
            let connection = opened.connection.clone();
            greeted(opened, peer, stay, door).await;
            connection.close(CLOSED.into(), b"");
        }
        Ok(Err(error)) => door.warn(peer, "connection refused", &Chain(&error).to_string()),
        Err(_) => door.warn(peer, "connection dropped: no hello in time", ""),
    }
}

/// A connection whose peer is known and has said hello.
struct Opened {
    connection: quinn::Connection,
    identity: Fingerprint,
    sender: ControlSender,
    receiver: ControlReceiver,
    hello: Message,
    _slot: OwnedSemaphorePermit,
}

async fn open(incoming: quinn::Incoming, stay: &Stay, door: &Door) -> wire::Result<Opened> {
    let lost = |what: &str| wire::Error::new(wire::ErrorKind::Lost, what);
    let shaken = timeout(HANDSHAKE_TIMEOUT, endpoint::handshake(incoming)).await;
    let (connection, identity) = shaken.map_err(|_| lost("no handshake in time"))??;
    let groups = door.shared.settings.source.iter().filter(|source| source.identity == identity.0);
    if !stay.is_known_as(identity.0, groups.map(|source| source.groups.len()).sum()) {
        return Err(lost("it had to make room"));
    }
    let Ok(slot) = door.slots.clone().try_acquire_owned() else {
        connection.close(CLOSED.into(), b"max_connections of the receiver are open");
        return Err(lost("max_connections are open"));
    };
    let (sender, mut receiver) = framing::accept(&connection).await?;
    let hello = receiver.next().await?.ok_or_else(|| {
        wire::Error::new(wire::ErrorKind::Malformed, "the control stream ended before a hello")
    })?;
    Ok(Opened { connection, identity, sender, receiver, hello, _slot: slot })
}

async fn greeted(opened: Opened, peer: SocketAddr, stay: Stay, door: &Door) {
    let Opened { connection, identity, sender, receiver, hello, _slot } = opened;
    let shared = &door.shared;
    let greeted = greet::greet(shared, &identity, hello).await;
    let (group, hello) = match greeted {
        Ok(greeted) => greeted,
        Err(refusal) => {
            door.warn(peer, "source refused", &refusal.to_string());
            return farewell(sender, refusal).await;
        }
    };
    tracing::debug!(%peer, group = %group.name(), agent = hello.agent, "source greeted");
    let wires = session::Wires { connection, sender, receiver, peer, identity };
    let mut connected = false;
    let end = {
        let attached = || {
            connected = true;
            drop(stay);
            tracing::info!(%peer, group = %group.name(), agent = hello.agent, "source connected");
        };
        session::run(wires, &group, shared, &hello, attached).await
    };
    if connected {
        tracing::info!(%peer, group = %group.name(), reason = %end, "source disconnected");
    } else {
        door.warn(peer, "source refused", &end.to_string());
    }
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
