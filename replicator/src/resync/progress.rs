//! How far a synchronisation is: for status, and as plain lines in the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::status::{Board, State};

/// How often status moves.
const SHOW: Duration = Duration::from_millis(500);
/// How often the log hears of it.
const LOG: Duration = Duration::from_secs(10);

/// Counts, and tells.
pub struct Report {
    board: Arc<Board>,
    state: State,
    cause: String,
    started: Instant,
    shown: Instant,
    logged: Instant,
    done: u64,
    total: u64,
    /// Of what is done: found equal on the replica, and not sent.
    equal: u64,
    /// Bytes of content handed over.
    pub sent: u64,
}

impl Report {
    /// Nothing is done yet.
    pub fn new(board: Arc<Board>, state: State, cause: &str) -> Report {
        let now = machine::now();
        let (started, shown, logged) = (now, now, now);
        Report {
            board,
            state,
            cause: cause.to_owned(),
            started,
            shown,
            logged,
            done: 0,
            total: 0,
            equal: 0,
            sent: 0,
        }
    }

    /// So much is dirty still, with what is done already.
    pub fn left(&mut self, bytes: u64) {
        self.total = self.done + bytes;
    }

    /// So much was looked at, and of that so much is content.
    pub fn advance(&mut self, done: u64, sent: u64) {
        self.done += done;
        self.sent += sent;
        self.show("");
    }

    /// So much was compared, and the replica holds it already.
    pub fn found_equal(&mut self, bytes: u64) {
        self.done += bytes;
        self.equal += bytes;
        self.show("");
    }

    /// Bytes that were compared and not sent.
    pub fn equal_bytes(&self) -> u64 {
        self.equal
    }

    /// It stands still, and why.
    pub fn waits(&mut self, why: &str) {
        self.show(why);
    }

    fn show(&mut self, waits: &str) {
        if self.state == State::Replicating || machine::since(self.shown) < SHOW {
            return;
        }
        self.shown = machine::now();
        let fraction = (self.done as f64 / self.total.max(1) as f64).min(1.0);
        let left_s = machine::since(self.started).as_secs_f64() / fraction.max(1e-9) * (1.0 - fraction);
        let mib = |bytes: u64| bytes >> 20;
        let (percent, done, total, sent) =
            (fraction * 100.0, mib(self.done), mib(self.total), mib(self.sent));
        let then = if waits.is_empty() { format!("{left_s:.0} s left") } else { waits.to_owned() };
        let equal = match mib(self.equal) {
            0 => String::new(),
            equal => format!(", {equal} MiB compared and equal"),
        };
        let why = format!(
            "{}; {percent:.0} % ({done} of {total} MiB, {sent} MiB of content sent{equal}), {then}",
            self.cause
        );
        if machine::since(self.logged) >= LOG {
            self.logged = machine::now();
            tracing::info!("{why}");
        }
        self.board.progress(self.state, why);
    }
}
