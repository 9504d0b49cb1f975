//! The crate's error: what kind, where, and what caused it.

use std::fmt;
use std::io;

/// What the operator (or the caller) must do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The address cannot be listened on: choose another, or mend its directory and permissions.
    Listen,
    /// Another server listens on this socket: stop it, or choose another path.
    SocketInUse,
    /// The file or device is held by another process: find it and stop it.
    Busy,
    /// The file or device cannot be served as it is (size, type): give another one.
    Unsuitable,
    /// The operating system refused an operation: see the cause.
    Io,
    /// The peer broke the protocol: nothing, its connection has ended; look at that client.
    Protocol,
    /// The peer went away or fell silent in the handshake: nothing, its connection has ended.
    PeerGone,
    /// Too many connections: raise the limit or look for the client that opens them.
    TooManyConnections,
}

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    /// What to do about it.
    pub kind: Kind,
    /// Path, address or step at which it happened.
    pub at: String,
    /// What caused it, where something did.
    #[source]
    pub source: Option<io::Error>,
}

impl Error {
    pub(crate) fn new(kind: Kind, at: impl Into<String>) -> Self {
        Self { kind, at: at.into(), source: None }
    }

    pub(crate) fn caused(kind: Kind, at: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { kind, at: at.into(), source: Some(source.into()) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            Kind::Listen => "cannot listen",
            Kind::SocketInUse => "another server listens on this socket",
            Kind::Busy => "held by another process",
            Kind::Unsuitable => "cannot be served",
            Kind::Io => "I/O error",
            Kind::Protocol => "the peer broke the protocol",
            Kind::PeerGone => "the peer is gone",
            Kind::TooManyConnections => "too many connections",
        };
        write!(f, "{what}: {}", self.at)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}
