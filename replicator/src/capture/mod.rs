//! Capture sources. All of them fill the same kind of ring with the same records; everything behind it is one
//! path.

pub mod attach;
pub mod contexts;
pub mod disk;
pub mod durability;
mod feedback;
pub mod in_flight;
pub mod nbd;
pub mod pace;
pub mod ring;
pub mod usage;
pub mod volume;

pub use ring::{Refusal, Ring, Tap};
pub use volume::Volume;
