//! What went wrong with a setting, said so that the operator can repair it without reading code.

use std::fmt;

use crate::layers::Origin;

/// A setting, file or variable that cannot be used. Nothing was started.
#[derive(Debug, thiserror::Error)]
#[error("{at}")]
pub struct Error {
    /// What the operator must do.
    pub kind: Kind,
    /// Which setting, from where, and what would be allowed.
    pub at: Box<At>,
    /// The cause underneath, if there is one.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What the operator must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Make the settings file exist and be readable.
    Unreadable,
    /// Repair the file's TOML syntax.
    Syntax,
    /// Remove or correct a key that no setting has.
    UnknownKey,
    /// Give a key that has no default.
    Missing,
    /// Change a value to one that is allowed.
    Invalid,
    /// Unset or correct an environment variable with our prefix that names no setting.
    StrayVariable,
}

/// Where the error is: key, value, source, and what is allowed there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At {
    /// The key with its section, as in `journal.quota` or `volume[0].path`; empty for the file as a whole.
    pub key: String,
    /// The value as it was given, if there was one.
    pub value: Option<String>,
    /// Where the value came from.
    pub origin: Origin,
    /// What is allowed, or what is wrong.
    pub allowed: String,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.key.as_str(), &self.value) {
            ("", _) => {}
            (key, None) => write!(f, "{key}: ")?,
            (key, Some(value)) => write!(f, "{key} = {value}: ")?,
        }
        write!(f, "{} ({})", self.allowed, self.origin)
    }
}

/// A value that a check refused, before it is known where the value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    pub kind: Kind,
    pub key: String,
    pub allowed: String,
}

impl Refused {
    /// The value of `key` is not allowed; `allowed` says what is.
    pub fn invalid(key: impl Into<String>, allowed: impl Into<String>) -> Self {
        Refused { kind: Kind::Invalid, key: key.into(), allowed: allowed.into() }
    }

    /// `key` has no default and was not given; `allowed` says what it is for.
    pub fn missing(key: impl Into<String>, allowed: impl Into<String>) -> Self {
        Refused { kind: Kind::Missing, key: key.into(), allowed: allowed.into() }
    }

    /// For settings built by a program and not read from anywhere.
    pub fn embedded(self) -> Error {
        let at = At { key: self.key, value: None, origin: Origin::Default, allowed: self.allowed };
        Error { kind: self.kind, at: Box::new(at), source: None }
    }
}

/// Refuses `key` unless `holds`.
pub(crate) fn require(holds: bool, key: &str, allowed: &str) -> Result<(), Refused> {
    if holds { Ok(()) } else { Err(Refused::invalid(key, allowed)) }
}
