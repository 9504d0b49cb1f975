//! Mutual TLS with pinned identities.
//!
//! A peer proves that it holds the key of its certificate (TLS's own signature check, done by the crypto
//! provider), and the certificate's fingerprint must be one that we pinned. No authority, name or date is
//! looked at. The provider is passed explicitly: a second one in the graph would make rustls' process-wide
//! default panic.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, PeerIncompatible,
    ServerConfig, SignatureScheme,
};

use crate::error::{Error, ErrorKind, Result};
use crate::identity::{Fingerprint, Identity};

/// The protocol's name in the handshake.
pub const ALPN: &[u8] = b"afterimage/1";
/// TLS wants a name; ours says nothing, and is not sent.
pub(crate) const SERVER_NAME: &str = "afterimage";

/// Whether a client with this fingerprint may connect. Asked at each handshake, so a change of mind takes
/// effect at the next.
pub type Accept = Arc<dyn Fn(&Fingerprint) -> bool + Send + Sync>;

/// The one crypto provider of this program.
pub(crate) fn provider() -> CryptoProvider {
    aws_lc_rs::default_provider()
}

/// TLS for a client that speaks to `pinned` only.
pub(crate) fn client(identity: &Identity, pinned: Fingerprint) -> Result<ClientConfig> {
    let accept: Accept = Arc::new(move |seen| *seen == pinned);
    let expected = Expected::Receiver(pinned);
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned::new(accept, expected)))
        .with_client_auth_cert(identity.chain(), identity.key())
        .map_err(setup)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    // A resumed session would skip the certificate, and with it the pin.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// TLS for a server that lets in whom `accept` names.
pub(crate) fn server(identity: &Identity, accept: Accept) -> Result<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .with_client_cert_verifier(Arc::new(Pinned::new(accept, Expected::Sources)))
        .with_single_cert(identity.chain(), identity.key())
        .map_err(setup)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // As above: no tickets, no store, so every connection shows its certificate and `accept` is asked.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

fn setup(e: rustls::Error) -> Error {
    Error::because(ErrorKind::IdentityDamaged, "set up TLS with our identity", e)
}

/// The verifier of both sides.
struct Pinned {
    accept: Accept,
    expected: Expected,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(accept: Accept, expected: Expected) -> Pinned {
        Pinned { accept, expected, algorithms: provider().signature_verification_algorithms }
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        let seen = Fingerprint::of(certificate);
        if (self.accept)(&seen) {
            return Ok(());
        }
        let other = OtherError(Arc::new(NotPinned { seen, expected: self.expected }));
        Err(rustls::Error::InvalidCertificate(CertificateError::Other(other)))
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

/// Who was expected: by which setting of which side.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// At the source: this receiver.
    Receiver(Fingerprint),
    /// At the receiver: one of its sources.
    Sources,
}

/// The refusal as both sides will read it: QUIC carries it to the peer.
#[derive(Debug)]
struct NotPinned {
    seen: Fingerprint,
    expected: Expected,
}

impl fmt::Display for NotPinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = self.seen;
        match self.expected {
            Expected::Sources => write!(
                f,
                "the source's identity {seen} stands in no [[source]] of the receiver's settings; if it is right (`afterimage \
                 identity show` at the source), set identity = \"{seen}\" there and restart the receiver"
            ),
            Expected::Receiver(pinned) => write!(
                f,
                "the receiver's identity is {seen}, and [receiver] identity in the source's settings says {pinned}; if the \
                 former is right (`afterimage identity show` at the receiver), paste it there and restart the source"
            ),
        }
    }
}

impl std::error::Error for NotPinned {}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinned")
    }
}

fn tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic)
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
