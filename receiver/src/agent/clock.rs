//! The receiver's own clock: for the age of history and for status lines, never for order.

use std::time::{SystemTime, UNIX_EPOCH};

/// Realtime, nanoseconds; 0 for a clock before 1970.
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
