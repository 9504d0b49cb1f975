//! Which copy of a source speaks: so that two live copies of one source (a cloned machine, a copied
//! directory) are told from one source that connects again.
//!
//! A copy has all that the original has: identity, group, positions. What it cannot have is what the original
//! gets after the copy was made. So a source and its receiver go on from token to token:
//!
//! ```text
//! source ── Hello, offers FEATURE ─────────────────────────► receiver
//!        ◄─ InstanceRequest ────────────────────────────────
//!        ── Instance {run, token: new, previous: the last} ─►  remembered == previous, or == token: it is this one;
//!        ◄─ Welcome ────────────────────────────────────────   token is remembered, durably, before the Welcome
//! ```
//! * The source makes a new token, durably, for each connection, but only when the last one was answered by a
//!   `Welcome`: an answer that was lost, or a crash in between, is the exact retry of the same token.
//! * `run` is drawn by each process: while a connection is alive, only the same run may take its place at
//!   once.
//! * Who is refused as a copy is named to the one that is connected ([`Message::CopySeen`]); that one sends
//!   an [`Message::Instance`] again, with a new token, so that a copy of what it was until now is out of date
//!   as well.
//!
//! [decision 0039](../../docs/decisions/0039-which-copy-of-a-source.md)
//!
//! [`Message::CopySeen`]: crate::Message::CopySeen
//! [`Message::Instance`]: crate::Message::Instance

use std::fmt;

/// Bit of `features` in `Hello`: this source answers [`crate::Message::InstanceRequest`].
pub const FEATURE: u64 = 8;

/// What a source says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Drawn by the process at its start.
    pub run: [u8; 16],
    /// From now on.
    pub token: [u8; 16],
    /// The last one that was answered.
    pub previous: Option<[u8; 16]>,
}

/// A run as people see it: its first eight hex digits.
pub struct ShownRun<'a>(pub &'a [u8; 16]);

impl fmt::Display for ShownRun<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
