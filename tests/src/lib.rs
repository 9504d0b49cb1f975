//! End-to-end stories, the rig and the oracle.
//!
//! A story (`tests/*.rs`) runs the built binary `afterimage` as its users do: as processes, with real
//! clients, real file systems and real signals. What it may conclude from an image is one function,
//! [`oracle::assert_prefix_consistent`].
//!
//! | file | noun |
//! |---|---|
//! | [`story`](mod@story) | a test with its directory, seed, figures, and logs when it fails |
//! | [`program`] | programs that end: `afterimage` commands and the system's tools |
//! | [`daemon`] | programs that stay: spawned, polled, killed |
//! | [`control`] | a daemon's control socket |
//! | [`up`] | `up`, both sides in one process |
//! | [`rig`] | `receive` and `replicate`, paired |
//! | [`nbd`] | block devices: nbdfuse, loop device, mount |
//! | [`tree`] | a real tree of files, and its hashes |
//! | [`database`] | a database's shell, its commits, its restored moments |
//! | [`image`] | files compared and looked into |
//! | [`nbd_client`], [`stamp`], [`history`], [`writer`] | a client that writes blocks which say who wrote them, and remembers |
//! | [`oracle`] | what an image may hold |
//!
//! The kernel's stories (`tests/kernel.rs`) run in guests: `vm/lab.sh` makes the laboratory, `vm/module.sh`
//! the module, `vm/run.sh` boots the stock kernel with a script of `guest/` as its only job, and
//! `src/bin/afterimage-guest` is what those scripts need beside the system's tools.
//!
//! Everything here needs root, as mounting does; a program that is missing fails the story and says what to
//! install. Environment: `AFTERIMAGE_BIN` (default the binary of the same profile; for a debug build
//! `target/release/afterimage`), `AFTERIMAGE_TEST_DIR` (default the system's temporary directory),
//! `AFTERIMAGE_SEED`, `AFTERIMAGE_KEEP=1` keeps a story's directory.

pub mod control;
pub mod daemon;
pub mod database;
pub mod history;
pub mod image;
pub mod load;
pub mod nbd;
pub mod nbd_client;
pub mod oracle;
pub mod outsider;
pub mod program;
pub mod rig;
pub mod stamp;
pub mod story;
pub mod tree;
pub mod up;
pub mod writer;

pub use story::{Home, story};
