//! SIMULATION: the real replicator and receiver, their disks and the network between them, in virtual time.
//!
//! ```text
//!  clients ─► NBD front ─► ring ─► … ─► quinn ═══ net ═══ quinn ─► … ─► replica
//!      │         └ disk (live and durable image)                └ disk (live and durable image)
//!      └► model: what was written, answered and flushed, at which lsn ──► oracle: is this image a prefix of it?
//! ```
//! A seed decides everything: sizes, load, failures, and which thread runs next. A story that breaks a
//! promise is told again, turn by turn, by its seed.

pub mod clients;
pub mod disk;
pub mod entropy;
pub mod liar;
pub mod model;
pub mod net;
pub mod room;
pub mod side;
pub mod story;
pub mod turn;
