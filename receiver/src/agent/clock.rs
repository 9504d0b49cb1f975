//! The receiver's own clock: for the age of history and for status lines, never for order.
//!
//! History promises time, so its age must not follow a clock that is set. [`ReceiptClock`] counts the time
//! that this receiver was seen to run: of the realtime clock and the one since boot, whichever moved less. It
//! goes on from the newest receipt on disk, so a clock that was set while we were away, or our absence
//! itself, ages nothing.

/// Realtime, nanoseconds; 0 for a clock before 1970.
pub fn now_ns() -> u64 {
    machine::realtime_ns()
}

/// A difference between the clocks that is told, beside what slewing explains.
const JUMP_NS: u64 = 5_000_000_000;
/// Clocks are slewed by less than one part in so many.
const SLEW: u64 = 1000;

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
}

/// Times of receipt; see the module. They never run back.
#[derive(Debug)]
pub struct ReceiptClock {
    at_ns: u64,
    seen: Option<Times>,
}

impl ReceiptClock {
    /// Goes on from the newest receipt known; 0 where there is none: then from the realtime clock.
    pub fn after(newest_ns: u64) -> ReceiptClock {
        ReceiptClock { at_ns: newest_ns, seen: None }
    }

    /// The time of a receipt at `now`.
    pub fn receipt_ns(&mut self, now: Times) -> u64 {
        match self.seen.replace(now) {
            Some(seen) => {
                let real_ns = now.real_ns.saturating_sub(seen.real_ns);
                let boot_ns = now.boot_ns.saturating_sub(seen.boot_ns);
                let expected_ns = seen.real_ns.saturating_add(boot_ns);
                let jump_ns = now.real_ns.abs_diff(expected_ns);
                if jump_ns > JUMP_NS + boot_ns / SLEW {
                    let direction = if now.real_ns > expected_ns { "forward" } else { "back" };
                    let seconds = jump_ns / 1_000_000_000;
                    tracing::warn!(
                        seconds,
                        direction,
                        "this machine's clock was set: history does not age by it"
                    );
                }
                self.at_ns = self.at_ns.saturating_add(real_ns.min(boot_ns));
            }
            None if self.at_ns == 0 => self.at_ns = now.real_ns,
            None => {}
        }
        self.at_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000_000_000;

    fn at(real_hours: u64, boot_hours: u64) -> Times {
        Times { real_ns: real_hours * HOUR, boot_ns: boot_hours * HOUR }
    }

    #[test]
    fn a_clock_that_is_set_ages_nothing() {
        let mut clock = ReceiptClock::after(0);
        assert_eq!(clock.receipt_ns(at(1000, 1)), 1000 * HOUR, "the first receipt ever has the realtime");
        assert_eq!(clock.receipt_ns(at(1001, 2)), 1001 * HOUR);
        assert_eq!(clock.receipt_ns(at(1050, 3)), 1002 * HOUR, "two days ahead within an hour");
        assert_eq!(clock.receipt_ns(at(1004, 4)), 1002 * HOUR, "set back: it stands still");
        assert_eq!(clock.receipt_ns(at(1005, 5)), 1003 * HOUR, "and goes on");
    }

    #[test]
    fn a_restart_goes_on_from_the_newest_receipt() {
        let mut clock = ReceiptClock::after(7 * HOUR);
        assert_eq!(clock.receipt_ns(at(1000, 1)), 7 * HOUR);
        assert_eq!(clock.receipt_ns(at(1001, 2)), 8 * HOUR);
    }

    #[test]
    fn the_machine_has_both_clocks() {
        let (before, after) = (Times::now(), Times::now());
        assert!(before.boot_ns > 0 && before.boot_ns <= after.boot_ns && before.real_ns > 0);
    }
}
