//! What can go wrong between two sides, by what the operator or the agent must do about it.

use std::fmt;

use quinn::{ConnectionError, ReadError, WriteError};

/// Shorthand of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds differ by the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no identity where one is needed: make one with `afterimage identity new`.
    IdentityMissing,
    /// There is an identity already, and it is never overwritten: peers have pinned it.
    IdentityExists,
    /// The identity's file is damaged or readable by others: repair it, or restore it from a backup.
    IdentityDamaged,
    /// The file system refused an operation.
    Io,
    /// A setting of the wire is out of range.
    Setting,
    /// The UDP socket could not be had: look at address, port and permissions.
    Bind,
    /// One side is not whom the other has pinned: compare the fingerprints on both sides. Trying again does
    /// not help.
    Untrusted,
    /// Nobody answers there, or its name does not resolve: try again later.
    Unreachable,
    /// The connection is gone: connect again and resume.
    Lost,
    /// The peer sent bytes that are not our protocol: drop the connection.
    Malformed,
    /// A message of ours is larger than the protocol carries.
    TooLong,
}

/// An error with its place: address, file, stream or message, in words.
#[derive(Debug)]
pub struct Error {
    /// The next step.
    pub kind: ErrorKind,
    /// What happened and where.
    pub at: String,
    /// The cause underneath, if there is one.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a cause underneath.
    pub fn new(kind: ErrorKind, at: impl Into<String>) -> Error {
        Error { kind, at: at.into(), source: None }
    }

    /// An error with its cause.
    pub fn because(
        kind: ErrorKind,
        at: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error { kind, at: at.into(), source: Some(source.into()) }
    }

    /// A connection that ended. A handshake refused over an identity, by us or by the peer, is
    /// [`ErrorKind::Untrusted`]; breaches of QUIC itself are [`ErrorKind::Malformed`].
    pub fn connection(at: impl Into<String>, source: ConnectionError) -> Error {
        // QUIC carries a TLS alert as error 0x100 + alert (RFC 9001, section 4.8).
        let is_tls = |code: u64| (0x100..0x200).contains(&code);
        let kind = match &source {
            ConnectionError::TransportError(e) if is_tls(e.code.into()) => ErrorKind::Untrusted,
            ConnectionError::ConnectionClosed(close) if is_tls(close.error_code.into()) => {
                ErrorKind::Untrusted
            }
            ConnectionError::TransportError(_) | ConnectionError::VersionMismatch => ErrorKind::Malformed,
            _ => ErrorKind::Lost,
        };
        // A close carries words of the peer, which need not even have shown who it is.
        Error::because(kind, at, machine::text::tidy(&source.to_string()).into_owned())
    }

    pub(crate) fn reading(at: &str, source: ReadError) -> Error {
        match source {
            ReadError::ConnectionLost(e) => Error::connection(at, e),
            other => Error::because(ErrorKind::Lost, at, other),
        }
    }

    pub(crate) fn writing(at: &str, source: WriteError) -> Error {
        match source {
            WriteError::ConnectionLost(e) => Error::connection(at, e),
            other => Error::because(ErrorKind::Lost, at, other),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}
