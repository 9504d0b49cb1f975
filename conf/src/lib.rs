//! SETTINGS: typed, validated, each with the place that it came from.
//!
//! A daemon's settings are laid over one another in this order, the later one winning: the defaults in this
//! crate, one TOML file, the environment. They are read once, at start; nothing here changes while a daemon
//! runs.
//!
//! * A file may hold any key of `replicator.sample.toml` or `receiver.sample.toml`, and no other.
//! * The variable for a key is `AFTERIMAGE_` and the key in capitals, `__` standing for the dot of a section:
//!   `journal.quota` is `AFTERIMAGE_JOURNAL__QUOTA`. A variable with our prefix that names no key is refused,
//!   since a typo would otherwise be silently without effect. `AFTERIMAGE_CONTROL` (the command's socket) and
//!   `AFTERIMAGE_LOG` (the log filter) are not settings and pass. Lists of tables (`volume`, `source`,
//!   `replica`) live in the file only.
//! * [`load_replicator`] and [`load_receiver`] return the settings and an [`Effective`] line per key;
//!   [`check`] is what `afterimage conf check FILE` prints.
//!
//! This crate imports none of ours: names of formats and identities appear here as plain values.

mod compression;
mod error;
mod layers;
mod names;
mod quic;
mod receiver;
mod replicator;
mod source;
pub mod units;

pub use compression::Compression;
pub use error::{At, Error, Kind};
pub use layers::Origin;
pub use names::check_name;
pub use quic::Quic;
pub use receiver::{Apply, History, Receiver, Replica, Segments, Source};
pub use replicator::{
    Capture, Journal, Kfilter, Nbd, OnStop, Peer, RING_DIR, Replicator, Resync, Ring, SyncMode, Volume,
};
pub use source::{Checked, Daemon, Effective, Loaded, check, load_receiver, load_replicator};

/// The whole `replicator.sample.toml`: every key, commented out, with its default.
pub const REPLICATOR_SAMPLE: &str = include_str!("../replicator.sample.toml");
/// The whole `receiver.sample.toml`: every key, commented out, with its default.
pub const RECEIVER_SAMPLE: &str = include_str!("../receiver.sample.toml");
