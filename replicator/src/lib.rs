//! SHIP: captures the writes of a group, journals them at the source and ships them.
//!
//! ```text
//!  NBD clients ─► capture/nbd ─► ring ─► pipeline ─► source journal ─► ship ─► link ═══ QUIC ═══► receiver
//!                     │                                                          ◄── acks ──
//!                     └─► backing (the source disk, which is the truth)
//! ```
//! `start` decides how a run begins (take the ring over, synchronise, or go on after a clean stop), `agent` owns the
//! run, `resync` is the offline synchronisation, `state` what survives the process, `status` what operators see.
//!
//! A slow or absent receiver never slows a client: between capture and everything else stands the ring, and a full
//! ring becomes dirty bits.

pub mod agent;
pub mod buffered_disk;
pub mod capture;
pub mod clock;
pub mod error;
pub mod link;
pub mod pipeline;
pub mod progress;
mod report;
pub mod resync;
mod serve;
pub mod ship;
pub mod start;
pub mod state;
pub mod status;
mod stop;
pub mod wait;

pub use agent::{Handle, Replicator};
pub use error::{Error, ErrorKind, Result};
pub use wait::WaitOutcome;

/// The group's ring as this process maps it.
pub type SharedRing = kfilter::Region;
