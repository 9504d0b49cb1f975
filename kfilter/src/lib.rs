//! CAPTURE: ring ABI and ring algorithm, shared with the kernel module.
//!
//! Every capture source (the NBD front today, the kernel module later) fills the same kind of ring with the
//! same records; everything behind it is one path. A group of volumes has one ring, so ring order = lsn order
//! = submission order over all of them.
//!
//! ```text
//! abi          the bytes: identity, control words, volume slots, record header       no_std ┐
//! memory       what the algorithm asks of its surroundings: memory, lock, bell       no_std │
//! entry        what a producer wants recorded                                        no_std │ compiled into
//! ring         producers: a place in the order, or dirty bits                        no_std │ the kernel
//! reservation  fill, publish, mark done                                              no_std │ module too
//! consumer     the one consumer: peek, advance, release                              no_std │ (rustc 1.85)
//! dirty        dirty bitmaps: what was not recorded                                  no_std │
//! handover     begin, fence and end of a resync: current bits become pending ones    no_std │
//! recovery     a new owner takes over what a dead one left                           no_std ┘
//! ioctl        the calls of /dev/kfilter                                             both sides
//! device       the user side of /dev/kfilter: groups that the kernel owns, read through a mapping
//! calls        its ioctls, typed, and what their errors ask of the operator
//! fsmap        free space of a mounted file system, from the kernel
//! span         the user side's memory of a ring, by address
//! region       the user side's home of a ring: a locked, preallocated file in tmpfs
//! ring_dir     the directory that it lies in: ours alone
//! waker        lets the consumer sleep without missing a publish
//! error        the user side's errors, by what the operator must do
//! ```
//!
//! The crate root is `no_std`, so that the shared files cannot reach for the standard library by accident;
//! the user-side files name `std` where they use it.
#![no_std]

extern crate std;

#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!("the ring's positions and bytes are 64-bit and little-endian");

pub mod abi;
pub mod calls;
pub mod consumer;
pub mod device;
pub mod dirty;
pub mod entry;
pub mod error;
pub mod fsmap;
pub mod handover;
pub mod ioctl;
pub mod mapper;
pub mod memory;
pub mod recovery;
pub mod region;
pub mod reservation;
pub mod ring;
pub mod ring_dir;
pub mod span;
pub mod waker;

#[cfg(test)]
mod testing;

pub use abi::{Identity, Layout, Op, VolumeSpec};
pub use consumer::{Consumer, RecordRef};
pub use device::{Device, Group, KernelConsumer};
pub use dirty::{DirtyExtents, Loss};
pub use entry::Entry;
pub use error::{Error, ErrorKind};
pub use recovery::{Lost, TakeOver};
pub use region::{Mapping, Region};
pub use reservation::{Reservation, Token};
pub use ring::{Captured, Mode, Refused, Ring};
pub use ring_dir::RingDir;
