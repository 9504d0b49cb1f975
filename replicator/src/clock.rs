//! The source's clocks: realtime for records, and what says when it was set.
//!
//! Times of records come from the realtime clock and never run back. A clock that was wrong for a while
//! leaves times that are wrong; the stream says so with a [`ClockStep`], so that the receiver refuses `time:`
//! there instead of giving what the disk did not hold. Realtime is compared with the clock since boot, which
//! nobody can set and which counts sleep, too. `DIR/clock` carries the comparison over restarts within one
//! boot; over a boot only a clock that shows less than the newest record gives itself away.

use std::collections::VecDeque;
use std::path::Path;

use journal::Lsn;
use journal::clock_step::ClockStep;
use serde::{Deserialize, Serialize};

use crate::aside::Aside;

/// Steps that come to more than this are told. Smaller ones make times inexact by as much (DESIGN section 8).
const JUMP_NS: i64 = 5_000_000_000;
/// What is no step but slewing: this, and one part in so many of the time that passed.
const SLEW_NS: u64 = 10_000_000;
const SLEW: u64 = 1000;

/// The comparison is kept this often: what slewing explains grows with its age.
const KEEP_NS: u64 = 600_000_000_000;

/// What a comparison that is not kept costs.
const COST: &str = "a clock that is set while this daemon is stopped may go unnoticed";

/// Realtime, nanoseconds since 1970. Reads no system call on this platform (vdso).
pub fn now_ns() -> u64 {
    machine::realtime_ns()
}

/// What both clocks show, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// Since 1970; can be set.
    pub real_ns: u64,
    /// Since boot, sleep included; cannot be set.
    pub boot_ns: u64,
}

impl Times {
    /// Both, now.
    pub fn now() -> Times {
        if let Some(boot_ns) = machine::simulated_boot_ns() {
            return Times { real_ns: now_ns(), boot_ns };
        }
        let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds_ns = u64::try_from(boot.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000);
        let boot_ns = seconds_ns.saturating_add(u64::try_from(boot.tv_nsec).unwrap_or(0));
        Times { real_ns: now_ns(), boot_ns }
    }

    /// Shown minus expected, when `then` was seen last.
    fn step_since(self, then: Times) -> i64 {
        let passed = i128::from(self.boot_ns) - i128::from(then.boot_ns);
        let step = i128::from(self.real_ns) - i128::from(then.real_ns) - passed;
        i64::try_from(step).unwrap_or(if step < 0 { i64::MIN } else { i64::MAX })
    }
}

/// What is kept over a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    boot: [u8; 16],
    real_ns: u64,
    boot_ns: u64,
    since_lsn: Lsn,
    since_time_ns: u64,
}

/// Watches the realtime clock.
#[derive(Debug)]
pub struct ClockWatch {
    kept: Option<Aside>,
    boot: [u8; 16],
    seen: Times,
    /// Steps that are each too small to be told.
    small_ns: i64,
    /// The stretch that runs: its first lsn, and the newest time before it.
    since: (Lsn, u64),
    /// No record has a later time than this, up to the last look.
    newest_ns: u64,
    pending: VecDeque<ClockStep>,
    /// When the comparison was kept, by the clock since boot.
    kept_ns: u64,
}

impl ClockWatch {
    /// Begins with a run: `captured` is its newest lsn, `newest_ns` the newest time of a record. Reads the
    /// last run's comparison: not for the runtime's threads. What comes later is written aside.
    pub fn begin(dir: &Path, now: Times, captured: Lsn, newest_ns: u64) -> ClockWatch {
        // A simulated machine has no directory here, and no boot of its own.
        let file = (!machine::is_simulated()).then(|| Aside::new(dir.join("clock"), COST));
        let boot = if machine::is_simulated() { [0; 16] } else { machine::disk::boot_id() };
        let bytes = file.as_ref().and_then(|file| std::fs::read(file.path()).ok());
        let kept: Option<Kept> = bytes.and_then(|bytes| postcard::from_bytes(&bytes).ok());
        let mut watch = ClockWatch {
            kept: file,
            boot,
            seen: now,
            small_ns: 0,
            since: (captured.next(), newest_ns),
            newest_ns,
            pending: VecDeque::new(),
            kept_ns: now.boot_ns,
        };
        watch.compare(kept, now, captured);
        watch.newest_ns = watch.newest_ns.max(now.real_ns);
        watch.keep();
        watch
    }

    fn compare(&mut self, kept: Option<Kept>, now: Times, captured: Lsn) {
        // The file has no checksum, and what it says goes into the stream: no stretch begins behind what is
        // captured.
        let since =
            kept.map_or((Lsn(0), 0), |kept| (kept.since_lsn.min(captured.next()), kept.since_time_ns));
        let same_boot = kept.filter(|kept| kept.boot == self.boot && kept.boot_ns <= now.boot_ns);
        if let Some(kept) = same_boot {
            let step_ns = now.step_since(Times { real_ns: kept.real_ns, boot_ns: kept.boot_ns });
            self.since = since;
            let slewed_ns = i64::try_from((now.boot_ns - kept.boot_ns) / SLEW).unwrap_or(i64::MAX);
            if step_ns.unsigned_abs() > JUMP_NS.saturating_add(slewed_ns).unsigned_abs() {
                self.step(step_ns, now, captured, true);
            }
        } else if self.newest_ns > now.real_ns.saturating_add(JUMP_NS.unsigned_abs()) {
            self.since = since;
            let step_ns = -i64::try_from(self.newest_ns - now.real_ns).unwrap_or(i64::MAX);
            self.step(step_ns, now, captured, false);
        }
    }

    /// Looks at the clocks; `captured` is the newest lsn.
    pub fn look(&mut self, now: Times, captured: Lsn) {
        let step_ns = now.step_since(self.seen);
        let slewed_ns = SLEW_NS + now.boot_ns.saturating_sub(self.seen.boot_ns) / SLEW;
        self.seen = now;
        if step_ns.unsigned_abs() > slewed_ns {
            self.small_ns = self.small_ns.saturating_add(step_ns);
        }
        if self.small_ns.unsigned_abs() > JUMP_NS.unsigned_abs() {
            let step_ns = std::mem::take(&mut self.small_ns);
            self.step(step_ns, now, captured, true);
            self.keep();
        }
        self.newest_ns = self.newest_ns.max(now.real_ns);
        if now.boot_ns.saturating_sub(self.kept_ns) > KEEP_NS {
            self.kept_ns = now.boot_ns;
            self.keep();
        }
    }

    fn step(&mut self, by_ns: i64, now: Times, captured: Lsn, is_measured: bool) {
        tracing::warn!(
            by_ms = by_ns / 1_000_000,
            is_measured,
            "this machine's clock was set: `time:` is refused where times are in doubt"
        );
        let (since_lsn, since_time_ns) = self.since;
        self.pending.push_back(ClockStep {
            by_ns,
            since_lsn,
            since_time_ns,
            shown_ns: now.real_ns,
            is_measured,
        });
        self.since = (captured.next(), self.newest_ns);
    }

    /// The step that the stream does not hold yet, oldest first.
    pub fn pending(&self) -> Option<ClockStep> {
        self.pending.front().copied()
    }

    /// The stream holds it.
    pub fn told(&mut self) {
        self.pending.pop_front();
        self.keep();
    }

    /// Keeps the comparison for the next start, when the stream holds all steps: what is still pending is
    /// found again.
    fn keep(&self) {
        let Some(file) = self.kept.as_ref().filter(|_| self.pending.is_empty()) else { return };
        let (since_lsn, since_time_ns) = self.since;
        let Times { real_ns, boot_ns } = self.seen;
        let kept = Kept { boot: self.boot, real_ns, boot_ns, since_lsn, since_time_ns };
        match postcard::to_stdvec(&kept) {
            Ok(bytes) => file.put(bytes),
            Err(error) => tracing::warn!(%error, "{COST}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const DAY: u64 = 86_400 * SECOND;
    const YEAR: u64 = 365 * DAY;

    fn at(real_ns: u64, boot_s: u64) -> Times {
        Times { real_ns, boot_ns: boot_s * SECOND }
    }

    fn begin(dir: &Path, now: Times, captured: u64, newest_ns: u64) -> ClockWatch {
        ClockWatch::begin(dir, now, Lsn(captured), newest_ns)
    }

    /// Ends a run, all that it keeps written.
    fn end(watch: ClockWatch) {
        let since = std::time::Instant::now();
        while !watch.kept.as_ref().unwrap().is_idle() {
            assert!(since.elapsed().as_secs() < 30, "it is not written");
            std::thread::yield_now();
        }
    }

    #[test]
    fn large_steps_are_told_once_with_their_stretch_and_small_ones_when_they_add_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = begin(dir.path(), at(YEAR, 10), 7, YEAR - 5);
        watch.look(at(YEAR + SECOND, 11), Lsn(8));
        assert_eq!(watch.pending(), None);
        watch.look(at(YEAR + 2 * SECOND + DAY, 12), Lsn(9));
        let ahead = watch.pending().unwrap();
        let expected = (DAY.cast_signed(), Lsn(8), YEAR - 5, YEAR + 2 * SECOND + DAY);
        assert_eq!((ahead.by_ns, ahead.since_lsn, ahead.since_time_ns, ahead.shown_ns), expected);
        watch.told();
        watch.look(at(YEAR + 3 * SECOND, 13), Lsn(12));
        let back = watch.pending().unwrap();
        assert_eq!(
            (back.by_ns, back.since_lsn, back.since_time_ns),
            (-DAY.cast_signed(), Lsn(10), YEAR + SECOND)
        );
        watch.told();
        watch.look(at(YEAR + 7 * SECOND, 14), Lsn(12));
        assert_eq!(watch.pending(), None, "3 s are no event");
        watch.look(at(YEAR + 11 * SECOND, 15), Lsn(12));
        assert_eq!(watch.pending().unwrap().by_ns, 6 * SECOND.cast_signed(), "twice 3 s are");
    }

    #[test]
    fn a_clock_that_is_set_between_two_runs_is_found_within_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        end(begin(dir.path(), at(YEAR, 10), 0, 0));
        let ahead = begin(dir.path(), at(YEAR + DAY + 5 * SECOND, 15), 4, YEAR + SECOND);
        let step = ahead.pending().unwrap();
        assert_eq!((step.by_ns, step.since_lsn, step.is_measured), (DAY.cast_signed(), Lsn(1), true));
        end(ahead);
        let mut again = begin(dir.path(), at(YEAR + DAY + 6 * SECOND, 16), 4, YEAR + SECOND);
        assert_eq!(again.pending().unwrap().by_ns, DAY.cast_signed(), "not told yet: found again");
        again.told();
        end(again);
        let right = begin(dir.path(), at(YEAR + 9 * SECOND, 19), 6, YEAR + DAY + 7 * SECOND);
        let step = right.pending().unwrap();
        assert_eq!(
            (step.by_ns, step.since_lsn, step.since_time_ns),
            (-DAY.cast_signed(), Lsn(5), YEAR + SECOND)
        );
    }

    #[test]
    fn no_number_of_a_strange_file_gets_into_the_stream() {
        for lsn in [u64::MAX, Lsn::MAX.0, 5] {
            let dir = tempfile::tempdir().unwrap();
            let kept = (machine::disk::boot_id(), YEAR, 10 * SECOND, lsn, u64::MAX);
            std::fs::write(dir.path().join("clock"), postcard::to_stdvec(&kept).unwrap()).unwrap();
            let watch = begin(dir.path(), at(YEAR + DAY, 15), 3, YEAR);
            let told = watch.pending().map(|step| (step.by_ns > 0, step.since_lsn));
            // One that no history reaches is no comparison; one ahead of the capture begins where that
            // stands.
            let expected = (lsn <= Lsn::MAX.0).then_some((true, Lsn(4)));
            assert_eq!(told, expected, "lsn {lsn}");
            end(watch);
        }
    }

    #[test]
    fn after_a_boot_a_clock_behind_the_newest_record_gives_itself_away() {
        let dir = tempfile::tempdir().unwrap();
        end(begin(dir.path(), at(2 * YEAR, 10), 3, YEAR));
        let path = dir.path().join("clock");
        let mut kept: Kept = postcard::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
        kept.boot = [9; 16];
        std::fs::write(&path, postcard::to_stdvec(&kept).unwrap()).unwrap();
        let behind = begin(dir.path(), at(DAY, 3), 20, 2 * YEAR);
        let step = behind.pending().unwrap();
        assert_eq!((step.since_lsn, step.since_time_ns, step.is_measured), (Lsn(4), YEAR, false));
        assert_eq!(step.shown_ns, DAY);
    }
}
