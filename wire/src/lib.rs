//! CARRY: control messages, identities, QUIC endpoints.
//!
//! Between source and receiver stands one QUIC connection, opened by the source: ALPN `afterimage/1`, TLS
//! 1.3, both sides known by the SHA-256 of their certificate and by nothing else ([`identity`], [`tls`]). On
//! it:
//!
//! ```text
//! source ── bidi stream, the control stream ──► receiver     u32 length, version, postcard   (message, framing)
//!        ◄─────────────────────────────────────
//!        ── uni streams of frames ────────────►              journal frames, byte for byte   (frames)
//!        ── bidi streams of questions ────────►              hashes of the replica           (compare)
//!        ◄─────────────────────────────────────
//!        ◄─ bidi stream of questions ──────────              frames that rotted, once more   (refetch)
//!        ──────────────────────────────────────►
//! ```
//! This room owns no position and decides no resume: bytes in QUIC's buffers are not received, and only an
//! [`Message::Ack`] moves progress. Reconnecting is the caller's loop, paced by [`Backoff`].
//!
//! Invariants: nothing that a peer sends is allocated for before its length was checked against a constant; a
//! session is never resumed (TLS would not ask for the certificate again); every peer of an open connection
//! was pinned.

pub mod backoff;
pub mod compare;
pub mod endpoint;
pub mod error;
pub mod frames;
pub mod framing;
pub mod identity;
pub mod instance;
pub mod message;
pub mod refetch;
pub mod socket;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod tuning;

#[doc(hidden)]
pub mod fuzz;

pub use backoff::Backoff;
pub use endpoint::{Client, Server, peer_fingerprint};
pub use error::{Error, ErrorKind, Result};
pub use frames::{Frame, FrameReader, FrameWriter};
pub use framing::{ControlReceiver, ControlSender, Decoder};
pub use identity::{Fingerprint, Identity};
pub use instance::Instance;
pub use message::Message;
pub use socket::SocketBuffers;
pub use tls::Accept;
pub use tuning::Tuning;
