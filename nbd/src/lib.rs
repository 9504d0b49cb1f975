//! NBD server: a sans-IO core and its tokio glue.
//!
//! It stands at the very front of the flow: a client (QEMU, `nbd-client`, `nbdfuse`, fio) speaks NBD to a
//! [`Server`], which turns every request into one call of an [`Export`]. The replicator's export records the
//! write in the ring and then writes its [`Backing`]; the receiver's export is a read-only view of the past.
//!
//! ```text
//!  socket ─► inbox ─► Handshake ─► Selection
//!                └──► Session ──► Event ─┬─ write, cached read: called inline ─────────┐
//!                                        └─ flush, FUA, read, trim …: pool of threads ─┤
//!  socket ◄─ outbox ◄───────────────── encoded replies, in any order ◄─────────────────┘
//! ```
//!
//! [`handshake`], [`session`] and [`reply`] hold no socket, file or clock: bytes go in, bytes and events come
//! out. `connection`, `pool` and [`server`] move the bytes. Bytes of the peer are never trusted: a fault ends
//! that one connection with a warning that names the peer and the reason, and no memory is reserved for a
//! length before the length was checked.
//!
//! The protocol is <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle,
//! structured replies, the `base:allocation` context; no TLS (a Unix socket or a tunnel protects the path).

mod backing;
mod connection;
mod error;
mod export;
mod file_export;
#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
mod inbox;
mod listen;
mod long_write;
mod memory;
mod outbox;
mod places;
mod pool;
pub mod proto;
pub mod reply;
pub mod server;
pub mod session;
mod socket;

pub use backing::{Access, Backing, Store};
pub use error::{Error, Kind};
pub use export::{BlockExtent, Export, Zeroing};
pub use file_export::FileExport;
pub use memory::Memory;
pub use server::{Listen, Server, Settings};
