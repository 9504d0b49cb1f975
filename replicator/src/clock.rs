//! The source's clocks: realtime for records, and the detection of its jumps.

use std::time::{Duration, Instant};

/// A realtime jump beyond this is an event in the stream (DESIGN section 8).
const JUMP: Duration = Duration::from_secs(5);

/// Realtime, nanoseconds since 1970. Reads no system call on this platform (vdso).
pub fn now_ns() -> u64 {
    machine::realtime_ns()
}

/// Compares the realtime clock with the monotonic one.
#[derive(Debug)]
pub struct JumpWatch {
    monotonic: Instant,
    realtime_ns: u64,
}

impl JumpWatch {
    /// Starts from what the clocks show.
    pub fn new(monotonic: Instant, realtime_ns: u64) -> JumpWatch {
        JumpWatch { monotonic, realtime_ns }
    }

    /// The jump since the last look, ns, when it is larger than the limit.
    pub fn look(&mut self, monotonic: Instant, realtime_ns: u64) -> Option<i64> {
        let passed = i128::try_from(monotonic.duration_since(self.monotonic).as_nanos()).unwrap_or(i128::MAX);
        let shown = i128::from(realtime_ns) - i128::from(self.realtime_ns);
        *self = JumpWatch { monotonic, realtime_ns };
        let jump = shown - passed;
        let limit = i128::try_from(JUMP.as_nanos()).unwrap_or(i128::MAX);
        (jump.abs() > limit)
            .then(|| i64::try_from(jump).unwrap_or(if jump < 0 { i64::MIN } else { i64::MAX }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_jumps_are_reported_and_only_once() {
        let start = Instant::now();
        let second = 1_000_000_000;
        let mut watch = JumpWatch::new(start, 100 * second);
        let after = |s| start + Duration::from_secs(s);
        assert_eq!(watch.look(after(1), 101 * second), None);
        assert_eq!(watch.look(after(2), 104 * second), None, "slewed by 2 s");
        assert_eq!(watch.look(after(3), 95 * second), Some(-10 * 1_000_000_000));
        assert_eq!(watch.look(after(4), 96 * second), None);
        assert_eq!(watch.look(after(5), 3697 * second), Some(3600 * 1_000_000_000));
    }
}
