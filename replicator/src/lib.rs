//! SHIP: captures the writes of a group, journals them at the source and ships them.
//!
//! ```text
//!  NBD clients ─► capture/nbd ─► ring ─┐
//!                     │                ├─► pipeline ─► source journal ─► ship ─► link ═══ QUIC ═══► receiver
//!  kernel module ────────────► ring ───┘      ▲                                  ◄── acks ──
//!                                             └── resync ◄── disk (which is the truth)
//! ```
//! `start` decides how a run begins (take the ring over, go on after a clean stop, or a new epoch), `agent`
//! owns the run, `resync` copies what is dirty while writes go on, `state` is what survives the process,
//! `status` what operators see.
//!
//! A slow or absent receiver never slows a client: between capture and everything else stands the ring, and a
//! full ring becomes dirty bits.

pub mod agent;
mod alive;
mod allocated;
mod aside;
mod attach;
pub mod capture;
mod cause;
mod claim;
pub mod clock;
pub mod compare;
mod disks;
pub mod error;
mod gaps;
mod granules;
mod instance;
pub mod link;
mod looks;
pub mod pipeline;
pub mod progress;
mod refetch;
mod report;
pub mod resync;
mod serve;
pub mod ship;
mod skipped;
pub mod start;
pub mod state;
pub mod status;
mod stop;
pub mod surroundings;
pub mod verify;
pub mod wait;

pub use agent::{Handle, Replicator};
pub use attach::Detached;
pub use error::{Error, ErrorKind, Result};
pub use surroundings::Surroundings;
pub use wait::WaitOutcome;
