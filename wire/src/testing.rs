//! Two sides on loopback, for this room's tests.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;

use crate::endpoint::{Client, Server, handshake};
use crate::identity::Identity;
use crate::tuning::Tuning;

pub const TIMEOUT: Duration = Duration::from_secs(20);

pub fn identity() -> Identity {
    let dir = tempfile::tempdir().unwrap();
    Identity::create(dir.path()).unwrap()
}

pub fn server(identity: &Identity, client: &Identity) -> Server {
    let accepted = client.fingerprint();
    let accept = Arc::new(move |seen: &_| *seen == accepted);
    Server::new(identity, accept, &Tuning::default(), (Ipv4Addr::LOCALHOST, 0).into()).unwrap()
}

pub fn address(server: &Server) -> String {
    server.local_addr().unwrap().to_string()
}

/// A connection, seen from both ends; the endpoints keep it alive.
pub struct Pair {
    pub source: Connection,
    pub receiver: Connection,
    pub _ends: (Client, Server),
}

pub async fn pair() -> Pair {
    let (source, theirs) = (identity(), identity());
    let server = server(&theirs, &source);
    let client = Client::new(&source, theirs.fingerprint(), &Tuning::default()).unwrap();
    let address = address(&server);
    let (connected, accepted) = tokio::join!(client.connect(&address, TIMEOUT), async {
        handshake(server.accept().await.unwrap()).await
    });
    let receiver = accepted.unwrap().0;
    Tuning::default().admit(&receiver).unwrap();
    Pair { source: connected.unwrap(), receiver, _ends: (client, server) }
}
