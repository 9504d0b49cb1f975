//! Clients that write without end, whatever becomes of the agent.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::control::poll;
use crate::nbd_client::NbdClient;

/// How long a killed agent may take to come back.
const RETURN: Duration = Duration::from_secs(60);

/// What is written.
#[derive(Clone, Copy, Debug)]
pub struct LoadSpec {
    /// Connections.
    pub clients: u64,
    /// Offsets and lengths are multiples of this.
    pub unit: usize,
    /// The longest write, bytes.
    pub most: usize,
    /// Between two writes of a client.
    pub pause: Duration,
}

/// Writes anywhere on a volume until it is stopped; comes back when the agent was killed.
pub struct Load {
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    /// Starts the clients of an NBD socket's export.
    pub fn start((socket, export): &(PathBuf, String), spec: LoadSpec, seed: u64) -> Load {
        let (stop, bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..spec.clients).map(|client| {
            let (socket, export, stop, bytes) = (socket.clone(), export.clone(), stop.clone(), bytes.clone());
            let mut random = StdRng::seed_from_u64(seed + client);
            thread::spawn(move || {
                let connect = || poll("the front", RETURN, || Ok(NbdClient::connect(&socket, &export).ok()));
                let mut connected = connect()?;
                let mut piece = vec![0; spec.most];
                while !stop.load(Ordering::Relaxed) {
                    let length = random.random_range(1..=spec.most / spec.unit) * spec.unit;
                    let places = (connected.size() - length as u64) / spec.unit as u64;
                    let offset = random.random_range(0..=places) * spec.unit as u64;
                    random.fill(&mut piece[..length]);
                    match connected.write(&piece[..length], offset) {
                        Ok(()) => _ = bytes.fetch_add(length as u64, Ordering::Relaxed),
                        // The agent was killed: whether this was written, the disk says.
                        Err(_) => {
                            bytes.fetch_add(length as u64, Ordering::Relaxed);
                            connected = connect()?;
                        }
                    }
                    thread::sleep(spec.pause);
                }
                Ok(())
            })
        });
        Load { threads: threads.collect(), stop, bytes }
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Stops the clients; bytes written.
    ///
    /// # Errors
    /// A client could not come back.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(self.bytes.load(Ordering::Relaxed))
    }
}
