//! What of the machine a run stands on, beside its clocks and threads (room `machine`): disks and the socket.
//!
//! A daemon stands on the real ones; the simulation puts its own in, and nothing above them differs.

use std::path::Path;
use std::sync::Arc;

use journal::io::{Disk, RealDisk};
use nbd::{Access, Backing};

/// See the module.
#[derive(Clone)]
pub struct Surroundings {
    /// Where state and journal lie.
    pub disk: Arc<dyn Disk>,
    /// The protected disks behind the NBD front.
    pub backings: Arc<dyn Backings>,
    /// The link's socket; `None` for one of the system's.
    pub socket: Option<Arc<dyn quinn::AsyncUdpSocket>>,
    /// Whether NBD sockets are opened.
    pub serves: bool,
}

/// The protected disks behind the NBD front, by path.
pub trait Backings: Send + Sync {
    /// Opens one and takes hold of it.
    ///
    /// # Errors
    /// It is not there, not suitable, or held by somebody else.
    fn open(&self, path: &Path) -> Result<Backing, nbd::Error>;
}

/// Files and devices of the system.
#[derive(Clone, Copy, Debug)]
pub struct RealBackings;

impl Backings for RealBackings {
    fn open(&self, path: &Path) -> Result<Backing, nbd::Error> {
        Backing::open(path, Access::ReadWrite)
    }
}

impl Surroundings {
    /// The machine's.
    pub fn real() -> Surroundings {
        Surroundings {
            disk: Arc::new(RealDisk),
            backings: Arc::new(RealBackings),
            socket: None,
            serves: true,
        }
    }
}
