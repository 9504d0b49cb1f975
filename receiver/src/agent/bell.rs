//! How the apply thread is woken: the schedule under a lock, and a condition variable beside it.
//!
//! Ingest rings when something became durable, the link when the source asks for haste, the operator when
//! there is an order, the agent when it stops. The lock is held for arithmetic only, so nobody ever waits for
//! a batch.

use std::sync::PoisonError;
use std::time::Instant;

use journal::Lsn;
use machine::{Condvar, Mutex, MutexGuard};

use super::schedule::{Due, Pace, Schedule};

/// See the module.
#[derive(Debug)]
pub struct Bell {
    state: Mutex<State>,
    rung: Condvar,
}

#[derive(Debug)]
struct State {
    schedule: Schedule,
    ordered: bool,
    stop: bool,
}

/// Why the apply thread was woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The operator left an order.
    Order,
    /// A batch is due.
    Batch,
    /// The given time passed and nothing is due.
    Pause,
    /// The agent stops.
    Stop,
}

impl Bell {
    /// Nothing waits.
    pub fn new(pace: Pace) -> Bell {
        let state = State { schedule: Schedule::new(pace), ordered: false, stop: false };
        Bell { state: Mutex::new(state), rung: Condvar::new() }
    }

    /// Changes the schedule and wakes the apply thread.
    pub fn ring(&self, change: impl FnOnce(&mut Schedule)) {
        change(&mut self.lock().schedule);
        self.rung.notify_one();
    }

    /// Raw bytes that are durable and not applied.
    pub fn bytes_waiting(&self) -> u64 {
        self.lock().schedule.bytes_waiting()
    }

    /// There is an order for the apply thread.
    pub fn order(&self) {
        self.lock().ordered = true;
        self.rung.notify_one();
    }

    /// Whether the apply thread is to end.
    pub fn is_stopping(&self) -> bool {
        self.lock().stop
    }

    /// The apply thread ends after the batch that it is at.
    pub fn stop(&self) {
        self.lock().stop = true;
        self.rung.notify_one();
    }

    /// Waits until a batch is due, `until` has passed, or the agent stops.
    pub fn wait(&self, checkpoint: Lsn, until: Instant) -> Wake {
        let mut state = self.lock();
        loop {
            if state.stop {
                return Wake::Stop;
            }
            if std::mem::take(&mut state.ordered) {
                return Wake::Order;
            }
            let now = machine::now();
            let next = match state.schedule.due(checkpoint, now) {
                Due::Now => return Wake::Batch,
                Due::At(at) => at.min(until),
                Due::Never => until,
            };
            if now >= until {
                return Wake::Pause;
            }
            let timeout = next.saturating_duration_since(now);
            state = self.rung.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A panic elsewhere is reported by its own thread; the schedule itself is whole after every statement.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn bell() -> Bell {
        let hour = Duration::from_secs(3600);
        Bell::new(Pace { batch_bytes: 1000, interval: hour, idle: hour, min_interval: hour })
    }

    #[test]
    fn a_full_batch_wakes_a_sleeper() {
        let bell = bell();
        let far = Instant::now() + Duration::from_secs(3600);
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| bell.wait(Lsn(0), far));
            bell.ring(|schedule| schedule.received(Lsn(1), 1000, Instant::now()));
            assert_eq!(sleeper.join().unwrap(), Wake::Batch);
        });
        assert_eq!(bell.bytes_waiting(), 1000);
    }

    #[test]
    fn an_order_comes_before_a_batch() {
        let bell = bell();
        bell.ring(|schedule| schedule.received(Lsn(1), 1000, Instant::now()));
        bell.order();
        let far = Instant::now() + Duration::from_secs(3600);
        assert_eq!([bell.wait(Lsn(0), far), bell.wait(Lsn(0), far)], [Wake::Order, Wake::Batch]);
    }

    #[test]
    fn the_pause_and_the_stop_end_a_wait() {
        let bell = bell();
        assert_eq!(bell.wait(Lsn(0), Instant::now()), Wake::Pause);
        bell.stop();
        assert_eq!(bell.wait(Lsn(0), Instant::now() + Duration::from_secs(3600)), Wake::Stop);
    }
}
