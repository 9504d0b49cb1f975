//! A tokio runtime as a thread of the world: its paused clock follows the world's.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::net::Net;
use crate::room::Room;

/// A runtime looks at its tasks at least this often, µs: what other threads send it waits as long. Longer,
/// when nothing came from the network for a while.
const TICK_US: u64 = 1000;
const IDLE_TICK_US: u64 = 5000;
/// A while, ns.
const IDLE_NS: u64 = 8_000_000;
/// Polls of everything that is ready, before the turn is handed on.
const POLLS: usize = 6;

/// Runs a future, and the tasks that it spawns, on the current thread of the world.
///
/// # Errors
/// The runtime's.
pub fn run<T>(room: &Arc<Room>, net: &Arc<Net>, future: impl Future<Output = T>) -> std::io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    Ok(runtime.block_on(async {
        tokio::select! {
            biased;
            done = future => done,
            never = follow(room, net) => match never {},
        }
    }))
}

enum Never {}

async fn follow(room: &Arc<Room>, net: &Arc<Net>) -> Never {
    let (began, began_ns) = (tokio::time::Instant::now(), room.now_ns());
    let mut came_ns = began_ns;
    loop {
        for _ in 0..POLLS {
            tokio::task::yield_now().await;
        }
        let now_ns = room.now_ns();
        let tick_us = if now_ns - came_ns > IDLE_NS { IDLE_TICK_US } else { TICK_US };
        let tick_ns = (tick_us / 4 + room.draw(tick_us)) * 1000;
        let until_ns = net.due_ns().unwrap_or(u64::MAX).min(now_ns + tick_ns);
        machine::sleep(Duration::from_nanos(until_ns.saturating_sub(now_ns).max(1000)));
        if net.deliver() {
            came_ns = room.now_ns();
        }
        let behind = Duration::from_nanos(room.now_ns() - began_ns).saturating_sub(began.elapsed());
        if !behind.is_zero() {
            tokio::time::advance(behind).await;
        }
    }
}
