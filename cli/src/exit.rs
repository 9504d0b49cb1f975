//! What a failure means to a script: the exit codes, and the same kinds on the control socket.
//!
//! A [`Fault`] is the one error shape that crosses the control socket (`{"error":{"kind","message"}}`), so
//! that a command that asks a daemon ends with the same code as one that does the work itself.

use std::fmt;
use std::sync::Arc;

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

/// What the caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The command line or the request is wrong: correct it.
    Usage,
    /// Not at that point, or not in this state: choose another point, or change the state first.
    NotPossible,
    /// Bytes on disk are not what was written: the message names file and offset.
    Corrupt,
    /// It did not happen in the time given; it may still happen.
    TimedOut,
    /// Somebody else holds it: end them, or choose another target.
    Busy,
    /// Anything else: the message says what. Also every kind that a newer daemon may invent.
    #[serde(other)]
    Failed,
}

impl Kind {
    /// 0 done, 1 failed, 2 usage, 3 not possible at that point or in this state, 4 corruption found.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Failed | Kind::TimedOut | Kind::Busy => 1,
            Kind::Usage => 2,
            Kind::NotPossible => 3,
            Kind::Corrupt => 4,
        }
    }

    /// The same on the control socket.
    pub fn http_status(self) -> StatusCode {
        match self {
            Kind::Usage => StatusCode::BAD_REQUEST,
            Kind::NotPossible => StatusCode::CONFLICT,
            Kind::Busy => StatusCode::LOCKED,
            Kind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Kind::Failed | Kind::Corrupt => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// A failure, ready to be shown: kind and one sentence or two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What the caller can do about it.
    pub kind: Kind,
    /// What, where, and what to do.
    pub message: String,
}

impl Fault {
    /// A failure of this kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Fault {
        Fault { kind, message: message.into() }
    }

    /// The command line or request is wrong.
    pub fn usage(message: impl Into<String>) -> Fault {
        Fault::new(Kind::Usage, message)
    }

    /// Not in this state.
    pub fn not_possible(message: impl Into<String>) -> Fault {
        Fault::new(Kind::NotPossible, message)
    }

    /// What an error of any room means: its kind from the first cause that has one, its text from the whole
    /// chain.
    pub fn of(error: &anyhow::Error) -> Fault {
        let kind = error.chain().find_map(kind_of).unwrap_or(Kind::Failed);
        Fault { kind, message: sentence(error.chain()) }
    }

    /// As [`Fault::of`], for an error that is not wrapped.
    pub fn from_error(error: impl std::error::Error + Send + Sync + 'static) -> Fault {
        Fault::of(&anyhow::Error::new(error))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// The chain as one line. Rooms differ in whether an error's text already holds its cause; none is said
/// twice.
fn sentence<'a>(chain: impl Iterator<Item = &'a (dyn std::error::Error + 'static)>) -> String {
    let mut text = String::new();
    for cause in chain.map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

fn kind_of(cause: &(dyn std::error::Error + 'static)) -> Option<Kind> {
    if let Some(fault) = cause.downcast_ref::<Fault>() {
        return Some(fault.kind);
    }
    if cause.downcast_ref::<conf::Error>().is_some() {
        return Some(Kind::Usage);
    }
    if let Some(error) = cause.downcast_ref::<::journal::Error>() {
        return Some(match error.kind {
            ::journal::ErrorKind::Corrupt => Kind::Corrupt,
            ::journal::ErrorKind::NotHeld => Kind::NotPossible,
            ::journal::ErrorKind::Busy => Kind::Busy,
            _ => Kind::Failed,
        });
    }
    if let Some(error) = shared::<receiver::Error>(cause) {
        return Some(match error.kind {
            receiver::ErrorKind::Corrupt => Kind::Corrupt,
            receiver::ErrorKind::NotPossible => Kind::NotPossible,
            receiver::ErrorKind::Busy => Kind::Busy,
            receiver::ErrorKind::Usage => Kind::Usage,
            _ => Kind::Failed,
        });
    }
    if let Some(error) = shared::<replicator::Error>(cause) {
        return Some(match error.kind {
            replicator::ErrorKind::NotPossible => Kind::NotPossible,
            replicator::ErrorKind::Busy => Kind::Busy,
            replicator::ErrorKind::Settings => Kind::Usage,
            _ => Kind::Failed,
        });
    }
    None
}

/// An error as it is, or as the daemons' handles give it to everybody who waits.
fn shared<'a, E: std::error::Error + 'static>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a E> {
    cause.downcast_ref::<E>().or_else(|| cause.downcast_ref::<Arc<E>>().map(|error| &**error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_first_kind_in_the_chain_decides_and_the_text_is_whole() {
        let error = Err::<(), _>(Fault::not_possible("the window begins at lsn 7"))
            .context("restore db")
            .unwrap_err();
        let fault = Fault::of(&error);
        assert_eq!(fault.kind.exit_code(), 3);
        assert_eq!(fault.message, "restore db: the window begins at lsn 7");
        assert_eq!(Fault::of(&anyhow::anyhow!("x")).kind.exit_code(), 1);
    }

    #[test]
    fn a_cause_is_not_said_twice() {
        let io = std::io::Error::other("disk on fire");
        let error = anyhow::Error::new(io).context("read /a: disk on fire");
        assert_eq!(Fault::of(&error).message, "read /a: disk on fire");
    }

    #[test]
    fn unknown_kinds_of_a_newer_daemon_are_failures() {
        let fault: Fault = serde_json::from_str(r#"{"kind":"on_holiday","message":"m"}"#).unwrap();
        assert_eq!(fault.kind, Kind::Failed);
        for kind in [Kind::Usage, Kind::NotPossible, Kind::Corrupt, Kind::TimedOut, Kind::Busy, Kind::Failed]
        {
            let text = serde_json::to_string(&kind).unwrap();
            assert_eq!(serde_json::from_str::<Kind>(&text).unwrap(), kind);
            assert!(!kind.http_status().is_success());
        }
    }
}
