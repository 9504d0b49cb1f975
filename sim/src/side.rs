//! One process of the simulation: a source with its clients, or a receiver. Started, stopped, killed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use journal::io::Disk;
use journal::sim_disk::SimDisk;
use nbd::Backing;
use replicator::surroundings::Backings;

use crate::disk::{LifeDisk, LifeStore};
use crate::net::Net;
use crate::room::Room;
use crate::turn;

/// How often a running side looks whether it shall stop.
const LOOK: Duration = Duration::from_millis(2);

/// What both sides are made of.
pub struct Site {
    /// The world.
    pub room: Arc<Room>,
    /// The network.
    pub net: Arc<Net>,
}

/// A process, and its daemon `H` while it runs.
pub struct Process<H> {
    /// The life of its threads.
    pub life: u64,
    /// Its disk.
    pub disk: LifeDisk,
    daemon: Arc<Mutex<Daemon<H>>>,
    stop: Arc<AtomicBool>,
}

enum Daemon<H> {
    Starting,
    Runs(Arc<H>),
    Ended(Result<(), String>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a daemon does in the simulation.
pub trait Runs: Sized + Send + Sync + 'static {
    /// Ends in good order.
    fn shutdown(self) -> impl Future<Output = Result<(), String>>;
    /// Resolves when it cannot go on.
    fn failed(&self) -> impl Future<Output = String>;
}

impl Runs for replicator::Handle {
    async fn shutdown(self) -> Result<(), String> {
        replicator::Handle::shutdown(self).await.map_err(|error| error.to_string())
    }

    async fn failed(&self) -> String {
        replicator::Handle::failed(self).await.to_string()
    }
}

impl Runs for receiver::agent::Handle {
    async fn shutdown(self) -> Result<(), String> {
        receiver::agent::Handle::shutdown(self).await.map_err(|error| error.to_string())
    }

    async fn failed(&self) -> String {
        receiver::agent::Handle::failed(self).await.to_string()
    }
}

impl<H: Runs> Process<H> {
    /// Starts a daemon as a life of its own. `began` is called on its thread when it runs.
    pub fn start<F>(
        site: &Site,
        life: u64,
        name: &str,
        disk: LifeDisk,
        start: impl FnOnce() -> F + Send + 'static,
        began: impl FnOnce(&H) + Send + 'static,
    ) -> Process<H>
    where
        F: Future<Output = Result<H, String>>,
    {
        let daemon = Arc::new(Mutex::new(Daemon::Starting));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, stopping) = (daemon.clone(), stop.clone());
        let (room, net) = (site.room.clone(), site.net.clone());
        let body = move || {
            room.set_life(life);
            let ended = turn::run(&room, &net, async {
                let handle = match start().await {
                    Ok(handle) => Arc::new(handle),
                    Err(why) => return Err(why),
                };
                began(&handle);
                *lock(&told) = Daemon::Runs(handle.clone());
                let failed = tokio::select! {
                    why = handle.failed() => Some(why),
                    () = async { while !stopping.load(Ordering::Acquire) { tokio::time::sleep(LOOK).await } } => None,
                };
                *lock(&told) = Daemon::Starting;
                match Arc::try_unwrap(handle) {
                    Ok(handle) => {
                        let ended = handle.shutdown().await;
                        failed.map_or(ended, Err)
                    }
                    Err(_) => Err("somebody still holds the daemon".to_owned()),
                }
            });
            *lock(&told) = Daemon::Ended(ended.unwrap_or_else(|error| Err(error.to_string())));
        };
        // A thread that cannot be started shows as a daemon that never runs.
        let _ = machine::spawn(name, body);
        Process { life, disk, daemon, stop }
    }

    /// The daemon, once it runs. Whoever keeps it keeps the process from stopping.
    pub fn daemon(&self) -> Option<Arc<H>> {
        match &*lock(&self.daemon) {
            Daemon::Runs(handle) => Some(handle.clone()),
            _ => None,
        }
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<Result<(), String>> {
        match &*lock(&self.daemon) {
            Daemon::Ended(how) => Some(how.clone()),
            _ => None,
        }
    }

    /// Stops it in good order, and waits until its threads are gone.
    ///
    /// # Errors
    /// How it ended, or that it does not.
    pub fn stop(&self, room: &Room) -> Result<(), String> {
        self.stop.store(true, Ordering::Release);
        for _ in 0..60_000 {
            if let Some(how) = self.ended().filter(|_| !room.lives(self.life)) {
                return how;
            }
            machine::sleep(Duration::from_millis(2));
        }
        Err(format!("it does not stop\n{}", room.describe()))
    }

    /// `kill -9`.
    pub fn kill(&self, room: &Room) {
        self.disk.die();
        room.kill(self.life);
        *lock(&self.daemon) = Daemon::Ended(Err("killed".into()));
    }
}

/// The source's disks behind the NBD front.
pub struct SimBackings {
    /// As its process holds them.
    pub disk: LifeDisk,
    /// To look at.
    pub below: SimDisk,
}

impl Backings for SimBackings {
    fn open(&self, path: &Path) -> Result<Backing, nbd::Error> {
        let io =
            |error| nbd::Error { kind: nbd::Kind::Io, at: path.display().to_string(), source: Some(error) };
        let file = self.disk.open(path).map_err(io)?;
        let size = file.size().map_err(io)?;
        Ok(Backing::on(Box::new(LifeStore::new(file, &self.below, path)), size))
    }
}

/// Where everything lies: paths that exist on the real file system too, for the locks.
#[derive(Clone)]
pub struct Paths {
    /// The source's state.
    pub source: PathBuf,
    /// The source's disks.
    pub backing: PathBuf,
    /// Its ring: on a real tmpfs.
    pub ring: PathBuf,
    /// The receiver's.
    pub receiver: PathBuf,
}

/// Where the receiver listens.
pub const RECEIVER: ([u8; 4], u16) = ([10, 0, 0, 2], 7878);

/// The address of a source's process.
pub fn source_address(life: u64) -> SocketAddr {
    let port = 10_000 + u16::try_from(life % 50_000).unwrap_or(0);
    ([10, 0, 0, 1], port).into()
}
