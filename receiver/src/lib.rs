//! APPLY: ingest, replay, undo, history.
//!
//! ```text
//!  wire ─► link ─► ingest ─► receiver journal ─► apply ─► replica (a plain disk)
//!                    │ack                          │ undo first
//!                    ▼                             ▼
//!                  source                    undo segments ─► history ─► view, restore
//! ```
//! The network half (`link`, `ingest`, `agent`, `status`, `lock`) takes frames, makes them durable and
//! acknowledges them. The storage half applies them in numbered batches ([`apply`]), keeps what each batch
//! overwrote ([`undo`]), and gives back any past write ([`history`], [`view`], [`restore`]); the replica
//! itself goes to any of them and back ([`apply`], [`bare`]). A failed or slow replica never stops ingest.
//!
//! # A group's directory
//! ```text
//! groups/NAME/lock       held while somebody uses the group
//! groups/NAME/group      two slots of GroupState (state.rs)
//! groups/NAME/journal/   the receiver's journal
//! groups/NAME/undo/      one undo segment for each apply batch
//! groups/NAME/merged/    indexes over many undo segments, derived from them (merged.rs)
//! groups/NAME/events     bookmarks, volumes, gaps (events.rs)
//! replica/NAME/VOL.img   default place of a replica
//! ```

pub mod agent;
pub mod apply;
pub mod bare;
mod copies;
pub mod doubt;
pub mod error;
pub mod event_list;
pub mod events;
pub mod fold;
pub mod gather;
pub mod history;
pub mod ingest;
pub mod link;
pub mod lock;
pub mod mend;
mod merged;
mod past;
pub mod point;
mod proof;
mod refetch;
pub mod replica;
pub mod restore;
pub mod restoring;
pub mod retention;
pub mod room;
pub mod scrub;
pub mod state;
pub mod status;
pub mod target;
pub mod thin;
pub mod undo;
mod unpack;
pub mod view;
pub mod volumes;

pub use error::{Error, ErrorKind, Result};
