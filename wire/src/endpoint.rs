//! QUIC endpoints: the source's [`Client`], which connects to one pinned receiver, and the receiver's
//! [`Server`].
//!
//! Both also stand on an abstract socket, which is how the simulated WAN puts rate, delay and loss between
//! them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AsyncUdpSocket, Connection, EndpointConfig, Incoming, Runtime, TokioRuntime};
use rustls::pki_types::CertificateDer;
use tokio::task::JoinSet;

use crate::error::{Error, ErrorKind, Result};
use crate::identity::{Fingerprint, Identity};
use crate::socket::{self, SocketBuffers};
use crate::tls::{self, Accept};
use crate::tuning::{Side, Tuning};

/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Clients that knock at the same moment …
const MAX_INCOMING: usize = 256;
/// … and bytes of each: the packets of one hello of TLS.
const INCOMING_BYTES: u64 = 16 << 10;

/// The source's end. One socket for its whole life; a connection at a time.
#[derive(Debug, Clone)]
pub struct Client {
    endpoint: quinn::Endpoint,
    buffers: Option<SocketBuffers>,
}

/// The receiver's end.
#[derive(Debug, Clone)]
pub struct Server {
    endpoint: quinn::Endpoint,
    buffers: Option<SocketBuffers>,
}

impl Client {
    /// A client on a socket of its own, for the receiver with the fingerprint `pinned` and nobody else.
    /// Within a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::Bind`], [`ErrorKind::Setting`].
    pub fn new(identity: &Identity, pinned: Fingerprint, tuning: &Tuning) -> Result<Client> {
        let (socket, buffers) = socket::bind_any(tuning.socket_buffer_bytes)?;
        let client = Client::on(wrap(socket)?, identity, pinned, tuning)?;
        Ok(Client { buffers: Some(buffers), ..client })
    }

    /// A client on this socket.
    ///
    /// # Errors
    /// [`ErrorKind::Setting`], [`ErrorKind::Bind`].
    pub fn on(
        socket: Arc<dyn AsyncUdpSocket>,
        identity: &Identity,
        pinned: Fingerprint,
        tuning: &Tuning,
    ) -> Result<Client> {
        let tls = QuicClientConfig::try_from(tls::client(identity, pinned)?).map_err(no_suite)?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(tuning.transport(Side::Client)?);
        let mut endpoint = stand(socket, None, identity)?;
        endpoint.set_default_client_config(config);
        Ok(Client { endpoint, buffers: None })
    }

    /// Connects to `address`, `host:port`, on whichever of its addresses answers first, all within `timeout`.
    ///
    /// The server may still refuse us just after this returns (TLS 1.3 lets the client finish first): the
    /// first read then fails as [`ErrorKind::Untrusted`].
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] where the name does not resolve or nobody answers in time,
    /// [`ErrorKind::Untrusted`] where somebody else does.
    pub async fn connect(&self, address: &str, timeout: Duration) -> Result<Connection> {
        let unreachable =
            |why: &str| Error::new(ErrorKind::Unreachable, format!("connect to {address}: {why}"));
        let attempt = async {
            let resolved = tokio::net::lookup_host(address)
                .await
                .map_err(|e| Error::because(ErrorKind::Unreachable, format!("resolve {address}"), e))?;
            // At once, not in turn: UDP has no refusal, so a dead first address would use up the time of a
            // good second.
            let mut attempts = JoinSet::new();
            for to in resolved.take(MAX_ADDRESSES) {
                let client = self.clone();
                attempts.spawn(async move { client.connect_to(to).await });
            }
            let mut last = unreachable("the name has no address");
            while let Some(attempt) = attempts.join_next().await {
                match attempt.unwrap_or_else(|_| Err(unreachable("the program is ending"))) {
                    Ok(connection) => return Ok(connection),
                    // Somebody who answered says more than nobody who did not.
                    Err(e) if last.kind != ErrorKind::Untrusted => last = e,
                    Err(_) => {}
                }
            }
            Err(last)
        };
        tokio::time::timeout(timeout, attempt).await.unwrap_or_else(|_| Err(unreachable("no answer in time")))
    }

    async fn connect_to(&self, to: SocketAddr) -> Result<Connection> {
        let at = format!("connect to {to}");
        let connecting = self
            .endpoint
            .connect(to, tls::SERVER_NAME)
            .map_err(|e| Error::because(ErrorKind::Unreachable, at.clone(), e))?;
        connecting.await.map_err(|e| {
            let lost = Error::connection(at, e);
            // Before the handshake "lost" means that nobody was there.
            let kind = if lost.kind == ErrorKind::Lost { ErrorKind::Unreachable } else { lost.kind };
            Error { kind, ..lost }
        })
    }

    /// What the kernel granted; `None` on an abstract socket.
    pub fn socket_buffers(&self) -> Option<SocketBuffers> {
        self.buffers
    }

    /// Waits until the peers of closed connections know it.
    pub async fn wait_idle(&self) {
        self.endpoint.wait_idle().await;
    }
}

impl Server {
    /// A server on `listen` for the clients that `accept` names. Within a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::Bind`], [`ErrorKind::Setting`].
    pub fn new(identity: &Identity, accept: Accept, tuning: &Tuning, listen: SocketAddr) -> Result<Server> {
        let (socket, buffers) = socket::bind(listen, tuning.socket_buffer_bytes)?;
        let server = Server::on(wrap(socket)?, identity, accept, tuning)?;
        Ok(Server { buffers: Some(buffers), ..server })
    }

    /// A server on this socket.
    ///
    /// # Errors
    /// [`ErrorKind::Setting`], [`ErrorKind::Bind`].
    pub fn on(
        socket: Arc<dyn AsyncUdpSocket>,
        identity: &Identity,
        accept: Accept,
        tuning: &Tuning,
    ) -> Result<Server> {
        let tls = QuicServerConfig::try_from(tls::server(identity, accept)?).map_err(no_suite)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        config.transport_config(tuning.transport(Side::Server)?);
        // What is kept of clients that knock until their handshake is begun, which is at once.
        config
            .max_incoming(MAX_INCOMING)
            .incoming_buffer_size(INCOMING_BYTES)
            .incoming_buffer_size_total(INCOMING_BYTES * MAX_INCOMING as u64);
        Ok(Server { endpoint: stand(socket, Some(config), identity)?, buffers: None })
    }

    /// The next client that knocks, its handshake not begun; `None` once the endpoint is closed. The caller
    /// counts, and may `refuse` it; [`handshake`] is the way in.
    pub async fn accept(&self) -> Option<Incoming> {
        self.endpoint.accept().await
    }

    /// Where clients connect to.
    ///
    /// # Errors
    /// [`ErrorKind::Bind`] where the socket does not say.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        self.endpoint
            .local_addr()
            .map_err(|e| Error::because(ErrorKind::Bind, "read the socket's address", e))
    }

    /// What the kernel granted; `None` on an abstract socket.
    pub fn socket_buffers(&self) -> Option<SocketBuffers> {
        self.buffers
    }

    /// Closes every connection and takes no more; waits until the peers know.
    pub async fn close(&self, reason: &str) {
        self.endpoint.close(quinn::VarInt::from_u32(0), reason.as_bytes());
        self.endpoint.wait_idle().await;
    }
}

/// Completes a handshake: the connection and who is on it.
///
/// # Errors
/// [`ErrorKind::Untrusted`] where the client is not one that we let in, [`ErrorKind::Lost`] where it went
/// away.
pub async fn handshake(incoming: Incoming) -> Result<(Connection, Fingerprint)> {
    let at = format!("handshake with {}", incoming.remote_address());
    let connection = incoming.await.map_err(|e| Error::connection(at, e))?;
    let peer = peer_fingerprint(&connection)?;
    Ok((connection, peer))
}

/// Whose connection it is.
///
/// # Errors
/// [`ErrorKind::Untrusted`] where the peer showed no certificate: never on our endpoints, which demand one.
pub fn peer_fingerprint(connection: &Connection) -> Result<Fingerprint> {
    connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .and_then(|chain| chain.first().map(Fingerprint::of))
        .ok_or_else(|| {
            Error::new(ErrorKind::Untrusted, format!("{} shows no identity", connection.remote_address()))
        })
}

fn wrap(socket: std::net::UdpSocket) -> Result<Arc<dyn AsyncUdpSocket>> {
    TokioRuntime
        .wrap_udp_socket(socket)
        .map_err(|e| Error::because(ErrorKind::Bind, "register the udp socket", e))
}

fn stand(
    socket: Arc<dyn AsyncUdpSocket>,
    server: Option<quinn::ServerConfig>,
    identity: &Identity,
) -> Result<quinn::Endpoint> {
    let mut config = EndpointConfig::new(Arc::new(ResetKey(identity.derive(b"afterimage stateless reset"))));
    if machine::is_simulated() {
        config.rng_seed(Some(std::array::from_fn(|_| machine::random_u64().to_le_bytes()[0])));
    }
    quinn::Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
        .map_err(|e| Error::because(ErrorKind::Bind, "open the QUIC endpoint", e))
}

/// The key of stateless resets (RFC 9000, section 10.3), the same for every process of an identity: so a peer
/// learns from the first packet that reaches a restarted process that the old connection is gone, and not
/// from silence.
struct ResetKey([u8; 32]);

impl ResetKey {
    fn mac(&self, bytes: &[u8]) -> hmac::Hmac<sha2::Sha256> {
        use hmac::Mac as _;
        let mac = hmac::Hmac::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.chain_update(bytes)
    }
}

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, bytes: &[u8], signature: &mut [u8]) {
        use hmac::Mac as _;
        signature.copy_from_slice(&self.mac(bytes).finalize().into_bytes());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, bytes: &[u8], signature: &[u8]) -> std::result::Result<(), quinn::crypto::CryptoError> {
        use hmac::Mac as _;
        self.mac(bytes).verify_slice(signature).map_err(|_| quinn::crypto::CryptoError)
    }
}

fn no_suite(e: quinn::crypto::rustls::NoInitialCipherSuite) -> Error {
    Error::because(ErrorKind::Setting, "set up QUIC's initial cipher suite", e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framing;
    use crate::message::Message;
    use crate::testing::{TIMEOUT, address, identity, server};
    use rustls::sign::CertifiedKey;
    use std::sync::atomic::{AtomicBool, Ordering};

    async fn accept(server: &Server) -> Result<(Connection, Fingerprint)> {
        handshake(server.accept().await.unwrap()).await
    }

    /// Connects and, where TLS let the client finish first, reads until the server's refusal arrives.
    async fn refusal(client: &Client, address: &str) -> Error {
        match client.connect(address, TIMEOUT).await {
            Err(e) => e,
            Ok(connection) => {
                let closed = tokio::time::timeout(TIMEOUT, connection.closed()).await;
                Error::connection("refused later", closed.expect("refused, not let in"))
            }
        }
    }

    fn client(identity: &Identity, pinned: Fingerprint) -> Client {
        Client::new(identity, pinned, &Tuning::default()).unwrap()
    }

    #[tokio::test]
    async fn both_sides_know_one_another_and_talk() {
        let (source, receiver) = (identity(), identity());
        let server = server(&receiver, &source);
        let client = client(&source, receiver.fingerprint());
        assert!(server.socket_buffers().is_some() && client.socket_buffers().is_some());
        let address = address(&server);
        let (connected, accepted) = tokio::join!(client.connect(&address, TIMEOUT), accept(&server));
        let (connected, (accepted, seen)) = (connected.unwrap(), accepted.unwrap());
        assert_eq!(seen, source.fingerprint());
        assert_eq!(peer_fingerprint(&connected).unwrap(), receiver.fingerprint());

        let (mut to_receiver, mut from_receiver) = framing::open(&connected).await.unwrap();
        let asked = Message::ApplyNow { lsn: 1 };
        to_receiver.send(&asked).await.unwrap();
        let (mut to_source, mut from_source) = framing::accept(&accepted).await.unwrap();
        assert_eq!(from_source.next().await.unwrap(), Some(asked));
        let long = Message::Hashes { applied_lsn: 1, hashes: vec![7; 60_000] };
        to_source.send(&long).await.unwrap();
        assert_eq!(from_receiver.next().await.unwrap(), Some(long));
        tokio::join!(to_receiver.finish(), async { assert_eq!(from_source.next().await.unwrap(), None) });

        accepted.close(quinn::VarInt::from_u32(0), b"done");
        assert_eq!(from_receiver.next().await.unwrap_err().kind, ErrorKind::Lost);
    }

    #[tokio::test]
    async fn a_client_that_is_not_pinned_is_refused_and_learns_why() {
        let (source, stranger, receiver) = (identity(), identity(), identity());
        let server = server(&receiver, &source);
        let client = client(&stranger, receiver.fingerprint());
        let address = address(&server);
        let (theirs, ours) = tokio::join!(refusal(&client, &address), accept(&server));
        for refused in [theirs, ours.unwrap_err()] {
            assert_eq!(refused.kind, ErrorKind::Untrusted);
            let cause = refused.source.unwrap().to_string();
            assert!(cause.contains(&stranger.fingerprint().to_string()), "{cause}");
        }
    }

    #[tokio::test]
    async fn a_server_that_is_not_pinned_is_refused() {
        let (source, receiver, other) = (identity(), identity(), identity());
        let server = server(&receiver, &source);
        let client = client(&source, other.fingerprint());
        let address = address(&server);
        let (theirs, ours) = tokio::join!(client.connect(&address, TIMEOUT), accept(&server));
        assert_eq!(theirs.unwrap_err().kind, ErrorKind::Untrusted);
        assert_eq!(ours.unwrap_err().kind, ErrorKind::Untrusted);
    }

    /// A client config that shows this key for these certificates, whatever they are.
    #[derive(Debug)]
    struct Shows(Option<Arc<CertifiedKey>>);

    impl rustls::client::ResolvesClientCert for Shows {
        fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            self.0.clone()
        }

        fn has_certs(&self) -> bool {
            self.0.is_some()
        }
    }

    #[tokio::test]
    async fn a_pinned_certificate_without_its_key_or_none_at_all_is_refused() {
        let (source, thief, receiver) = (identity(), identity(), identity());
        let server = server(&receiver, &source);
        let key = tls::provider().key_provider.load_private_key(thief.key()).unwrap();
        let stolen = Arc::new(CertifiedKey::new(source.chain(), key));
        for shown in [Some(stolen), None] {
            let mut tls = tls::client(&thief, receiver.fingerprint()).unwrap();
            tls.client_auth_cert_resolver = Arc::new(Shows(shown));
            let mut client = client(&thief, receiver.fingerprint());
            let tls = QuicClientConfig::try_from(tls).unwrap();
            client.endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(tls)));
            let address = address(&server);
            let (theirs, ours) = tokio::join!(refusal(&client, &address), accept(&server));
            assert_eq!(theirs.kind, ErrorKind::Untrusted);
            assert_eq!(ours.unwrap_err().kind, ErrorKind::Untrusted);
        }
    }

    #[tokio::test]
    async fn an_identity_no_longer_accepted_is_refused_at_its_next_connection() {
        let (source, receiver) = (identity(), identity());
        let welcome = Arc::new(AtomicBool::new(true));
        let accepts: Accept = {
            let (welcome, pinned) = (Arc::clone(&welcome), source.fingerprint());
            Arc::new(move |seen| *seen == pinned && welcome.load(Ordering::Relaxed))
        };
        let server = Server::new(&receiver, accepts, &Tuning::default(), ([127, 0, 0, 1], 0).into()).unwrap();
        // A client that would resume if it could: the rule must hold at the server alone.
        let mut client = client(&source, receiver.fingerprint());
        let mut tls = tls::client(&source, receiver.fingerprint()).unwrap();
        tls.resumption = rustls::client::Resumption::in_memory_sessions(4);
        let tls = QuicClientConfig::try_from(tls).unwrap();
        client.endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(tls)));
        let address = address(&server);
        let (connected, accepted) = tokio::join!(client.connect(&address, TIMEOUT), accept(&server));
        // A message each way, so that a ticket for resumption would have arrived, were any sent.
        let (connected, accepted) = (connected.unwrap(), accepted.unwrap().0);
        let (mut to_receiver, mut from_receiver) = framing::open(&connected).await.unwrap();
        to_receiver.send(&Message::ApplyNow { lsn: 1 }).await.unwrap();
        let (mut to_source, _from_source) = framing::accept(&accepted).await.unwrap();
        to_source.send(&Message::ApplyNow { lsn: 2 }).await.unwrap();
        from_receiver.next().await.unwrap();
        connected.close(quinn::VarInt::from_u32(0), b"");

        welcome.store(false, Ordering::Relaxed);
        let (theirs, ours) = tokio::join!(refusal(&client, &address), accept(&server));
        assert_eq!((theirs.kind, ours.unwrap_err().kind), (ErrorKind::Untrusted, ErrorKind::Untrusted));
    }

    #[tokio::test]
    async fn one_client_connects_again_to_a_receiver_that_was_restarted() {
        let (source, receiver) = (identity(), identity());
        let first = server(&receiver, &source);
        let (listen, address) = (first.local_addr().unwrap(), address(&first));
        let client = client(&source, receiver.fingerprint());
        let (connected, accepted) = tokio::join!(client.connect(&address, TIMEOUT), accept(&first));
        let (connected, _accepted) = (connected.unwrap(), accepted.unwrap());
        first.close("restart").await;
        let lost = Error::connection("closed", connected.closed().await);
        assert_eq!(lost.kind, ErrorKind::Lost);
        drop((first, _accepted));

        let pinned = source.fingerprint();
        let accepts: Accept = Arc::new(move |seen| *seen == pinned);
        // The old endpoint's socket is freed by its driver task a moment after the drop.
        let again = loop {
            match Server::new(&receiver, Arc::clone(&accepts), &Tuning::default(), listen) {
                Ok(server) => break server,
                Err(e) => assert_eq!(e.kind, ErrorKind::Bind),
            }
            tokio::task::yield_now().await;
        };
        let (connected, accepted) = tokio::join!(client.connect(&address, TIMEOUT), accept(&again));
        assert_eq!(peer_fingerprint(&connected.unwrap()).unwrap(), receiver.fingerprint());
        assert_eq!(accepted.unwrap().1, source.fingerprint());
    }

    /// The name may stand for `::1` as well, where nobody listens.
    #[tokio::test]
    async fn a_name_connects_by_the_address_that_answers() {
        let (source, receiver) = (identity(), identity());
        let server = server(&receiver, &source);
        let client = client(&source, receiver.fingerprint());
        let named = format!("localhost:{}", server.local_addr().unwrap().port());
        let (connected, accepted) = tokio::join!(client.connect(&named, TIMEOUT), accept(&server));
        assert!(connected.is_ok() && accepted.is_ok());
    }

    #[tokio::test]
    async fn nobody_there_is_unreachable() {
        let (source, receiver) = (identity(), identity());
        let client = client(&source, receiver.fingerprint());
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap().to_string();
        let timeout = Duration::from_millis(50);
        assert_eq!(client.connect(&address, timeout).await.unwrap_err().kind, ErrorKind::Unreachable);
        let unnamed = client.connect("no port", TIMEOUT).await.unwrap_err();
        assert_eq!(unnamed.kind, ErrorKind::Unreachable);
    }
}
