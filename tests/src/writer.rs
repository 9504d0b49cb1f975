//! Clients that write stamped blocks, and come back when their server is killed: the load of the stories.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::control::poll;
use crate::history::{Area, History, Operation};
use crate::nbd_client::{NbdClient, Request, ServerError};
use crate::stamp::{BLOCK_BYTES, Stamp};

/// A killed agent is back by then, or the story has failed.
const AWAY: Duration = Duration::from_secs(60);
/// The longest write: one record, so that no point in time holds half of it.
const WRITE_BLOCKS: u32 = 32;

/// How a lane writes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Operations a second at most: the load is to be steady, not the machine's limit.
    pub per_second: u32,
    /// Blocks of one write at most.
    pub blocks: u32,
    /// Whether discards and zeroes are among the operations.
    pub with_zeros: bool,
    /// Whether volumes take turns, the same place in each; otherwise at random.
    pub in_turn: bool,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { per_second: 400, blocks: 8, with_zeros: true, in_turn: false }
    }
}

/// The lanes of a history, each a thread with a connection to every volume that it needs.
pub struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Duration>>>>,
}

impl Writers {
    /// Starts a thread for each lane; `sockets` are the volumes' NBD sockets and export names.
    pub fn start(history: &Arc<History>, sockets: &[(PathBuf, String)], pace: Pace, seed: u64) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..history.begun().len()).map(|lane| {
            let (history, stop, sockets) = (history.clone(), stop.clone(), sockets.to_vec());
            thread::spawn(move || {
                let random = StdRng::seed_from_u64(seed.wrapping_add(lane as u64));
                let clients = sockets.iter().map(|_| None).collect();
                Writer { history, lane, sockets, clients, pace, random }.write_until(&stop)
            })
        });
        Writers { threads: threads.collect(), stop }
    }

    /// Whether a lane has ended before it was told to: it failed.
    pub fn has_failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Ends the load; how long each request took that needed no reconnection.
    ///
    /// # Errors
    /// A client was answered with an error, waited in vain, or read something else than it had written.
    pub fn stop(self) -> Result<Vec<Duration>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut latencies = Vec::new();
        for thread in self.threads {
            match thread.join() {
                Ok(lane) => latencies.extend(lane?),
                Err(_) => bail!("a writer panicked"),
            }
        }
        Ok(latencies)
    }
}

/// The `percent`-th percentile.
pub fn percentile(latencies: &mut [Duration], percent: usize) -> Duration {
    latencies.sort_unstable();
    latencies
        .get((latencies.len() * percent / 100).min(latencies.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

struct Writer {
    history: Arc<History>,
    lane: usize,
    sockets: Vec<(PathBuf, String)>,
    clients: Vec<Option<NbdClient>>,
    pace: Pace,
    random: StdRng,
}

impl Writer {
    fn write_until(&mut self, stop: &AtomicBool) -> Result<Vec<Duration>> {
        let lane = self.lane;
        let mut latencies = Vec::new();
        let mut due = Instant::now();
        let areas = self.history.snapshot(lane).areas;
        for turn in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let area = self.choose(&areas, turn);
            let is_zeros = self.pace.with_zeros && self.random.random_ratio(1, 10);
            let sequence = self.history.begin(lane, area.clone(), is_zeros);
            let begun = Instant::now();
            let reconnected =
                self.perform(sequence, &area, is_zeros).with_context(|| format!("lane {lane}"))?;
            self.history.answer(lane);
            if !reconnected {
                latencies.push(begun.elapsed());
            }
            if self.random.random_ratio(1, 50) {
                // What a flush promises is checked by what is there after a kill; an answer is all that it
                // gives.
                let _ = self.with_client(area.volume, NbdClient::flush)?;
            }
            due += Duration::from_secs(1) / self.pace.per_second;
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(latencies)
    }

    fn choose(&mut self, areas: &[Area], turn: usize) -> Area {
        let index =
            if self.pace.in_turn { turn % areas.len() } else { self.random.random_range(0..areas.len()) };
        let Area { volume, blocks } = &areas[index];
        let longest = self.pace.blocks.min(WRITE_BLOCKS).min(blocks.end - blocks.start);
        let count = self.random.random_range(1..=longest);
        let first = self.random.random_range(blocks.start..=blocks.end - count);
        Area { volume: *volume, blocks: first..first + count }
    }

    fn perform(&mut self, sequence: u64, area: &Area, is_zeros: bool) -> Result<bool> {
        let offset = u64::from(area.blocks.start) * BLOCK_BYTES as u64;
        if is_zeros {
            let kind = if self.random.random() { Request::Trim } else { Request::WriteZeroes };
            let bytes = area.blocks.len() * BLOCK_BYTES;
            return self.with_client(area.volume, |client| client.clear(kind, offset, bytes));
        }
        let bytes = render(self.history.run, self.lane, sequence, area);
        self.with_client(area.volume, |client| client.write(&bytes, offset))
    }

    /// Asks until there is an answer, connecting again as often as it takes; whether it had to.
    fn with_client(&mut self, volume: u32, ask: impl Fn(&mut NbdClient) -> Result<()>) -> Result<bool> {
        let index = volume as usize;
        let mut reconnected = false;
        poll(&format!("an answer of volume {volume}"), AWAY, || {
            if self.clients[index].is_none() {
                reconnected = true;
                let (socket, export) = &self.sockets[index];
                let Ok(mut client) = NbdClient::connect(socket, export) else { return Ok(None) };
                match self.read_back(volume, &mut client) {
                    Err(error) if error.is::<Wrong>() => return Err(error),
                    Err(_) => return Ok(None),
                    Ok(()) => self.clients[index] = Some(client),
                }
            }
            let Some(client) = self.clients[index].as_mut() else { return Ok(None) };
            match ask(client) {
                Ok(()) => Ok(Some(())),
                Err(error) if error.is::<ServerError>() => Err(error),
                Err(_) => {
                    self.clients[index] = None;
                    Ok(None)
                }
            }
        })?;
        Ok(reconnected)
    }

    /// What the lane was last answered on this volume is what it reads after a new connection.
    fn read_back(&self, volume: u32, client: &mut NbdClient) -> Result<()> {
        let lane = self.history.snapshot(self.lane);
        let answered = |op: &Operation| op.area.volume == volume && op.answered != u64::MAX;
        let Some(last) = lane.operations.iter().rposition(answered) else { return Ok(()) };
        // A newer operation on the same blocks, begun and not answered, may be there or not.
        let Operation { area, is_zeros, .. } = &lane.operations[last];
        let overlaps = |op: &Operation| {
            op.area.volume == volume
                && op.area.blocks.start < area.blocks.end
                && area.blocks.start < op.area.blocks.end
        };
        if lane.operations[last + 1..].iter().any(overlaps) {
            return Ok(());
        }
        let mut expected = render(self.history.run, self.lane, last as u64 + 1, area);
        if *is_zeros {
            expected.fill(0);
        }
        let mut bytes = vec![0; expected.len()];
        client.read(&mut bytes, u64::from(area.blocks.start) * BLOCK_BYTES as u64)?;
        ensure!(
            bytes == expected,
            Wrong(format!(
                "volume {volume}: operation {} of lane {} was answered and is lost",
                last + 1,
                self.lane
            ))
        );
        Ok(())
    }
}

fn render(run: u64, lane: usize, sequence: u64, area: &Area) -> Vec<u8> {
    let lane = u32::try_from(lane).expect("invariant: a handful of lanes");
    let volume = area.volume;
    let block = |block| Stamp { run, sequence, lane, volume, block }.render();
    area.blocks.clone().flat_map(block).collect()
}

/// Something answered is not there.
#[derive(Debug)]
struct Wrong(String);

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}
