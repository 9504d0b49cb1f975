//! A tokio runtime as a thread of the world: its paused clock follows the world's.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::net::Net;
use crate::room::Room;

/// A runtime looks at its tasks at least this often, µs: what other threads send it waits as long.
const TICK_US: u64 = 1000;
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
    loop {
        for _ in 0..POLLS {
            tokio::task::yield_now().await;
        }
        let now_ns = room.now_ns();
        let tick_ns = (TICK_US / 4 + room.draw(TICK_US)) * 1000;
        let until_ns = net.due_ns().unwrap_or(u64::MAX).min(now_ns + tick_ns);
        machine::sleep(Duration::from_nanos(until_ns.saturating_sub(now_ns).max(1000)));
        net.deliver();
        let behind = Duration::from_nanos(room.now_ns() - began_ns).saturating_sub(began.elapsed());
        if !behind.is_zero() {
            tokio::time::advance(behind).await;
        }
    }
}
