//! Capture sources. All of them fill the same kind of ring with the same records; everything behind it is one path.

pub mod durability;
pub mod in_flight;
pub mod nbd;
pub mod pace;
