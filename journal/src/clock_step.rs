//! Clock step: the payload of a `ClockJump` record, which says that the source's clock was set, and since
//! when its times may be wrong.
//!
//! ```text
//!   0 │ step, nanoseconds (i64): shown minus expected │
//!   8 │ first lsn of the stretch that ends here       │
//!  16 │ newest time before that stretch, ns           │
//!  24 │ what the clock showed after the step, ns      │
//!  32 │ 1 = measured, 0 = at least that much          │
//! ```
//! Little endian. The first version had the step alone (8 bytes). A stretch is all that was captured while
//! the clock ran without being set. Times of records never run back: after a step back they are held at the
//! newest time before it, until the clock shows more. A step that is not measured was found after a boot: the
//! clock showed less than a record.

use crate::{Error, ErrorKind, Lsn, Result};
use serde::{Deserialize, Serialize};

/// Bytes of the payload.
pub const CLOCK_STEP_BYTES: usize = 40;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockStep {
    /// By how much the clock was set, ns.
    pub by_ns: i64,
    /// First lsn of the stretch that ends here; 0 where it is not known.
    pub since_lsn: Lsn,
    /// Newest time before that stretch.
    pub since_time_ns: u64,
    /// What the clock showed after the step.
    pub shown_ns: u64,
    /// Whether the step was measured.
    pub is_measured: bool,
}

impl ClockStep {
    /// The payload.
    pub fn encode(&self) -> [u8; CLOCK_STEP_BYTES] {
        let mut out = [0; CLOCK_STEP_BYTES];
        let words = [
            self.by_ns.to_le_bytes(),
            self.since_lsn.0.to_le_bytes(),
            self.since_time_ns.to_le_bytes(),
            self.shown_ns.to_le_bytes(),
            u64::from(self.is_measured).to_le_bytes(),
        ];
        for (to, word) in out.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word);
        }
        out
    }

    /// Reads either version; the first says nothing but the step, so the rest is made of the record's own
    /// time.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] for any other length, an lsn that no history reaches, or a mark that is
    /// neither 0 nor 1.
    pub fn decode(payload: &[u8], time_ns: u64) -> Result<ClockStep> {
        let word = |at: usize| {
            let bytes = payload.get(at..at + 8).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
            bytes.map(u64::from_le_bytes)
        };
        let malformed = || {
            let bytes = payload.len();
            Error::new(
                ErrorKind::Malformed,
                format!("a clock jump whose payload of {bytes} bytes does not hold"),
            )
        };
        let by_ns = word(0).ok_or_else(malformed)?.cast_signed();
        let by = by_ns.unsigned_abs();
        match (payload.len(), word(8), word(16), word(24), word(32)) {
            (8, ..) => Ok(ClockStep {
                by_ns,
                since_lsn: Lsn(0),
                since_time_ns: time_ns.saturating_sub(by),
                shown_ns: if by_ns < 0 { time_ns.saturating_sub(by) } else { time_ns },
                is_measured: true,
            }),
            (CLOCK_STEP_BYTES, Some(since), Some(since_time_ns), Some(shown_ns), Some(measured @ 0..=1))
                if since <= Lsn::MAX.0 =>
            {
                Ok(ClockStep {
                    by_ns,
                    since_lsn: Lsn(since),
                    since_time_ns,
                    shown_ns,
                    is_measured: measured == 1,
                })
            }
            _ => Err(malformed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden: added to, never edited.
    const GOLDEN: [u8; CLOCK_STEP_BYTES] = [
        0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0,
        0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    ];

    #[test]
    fn both_versions_are_read_and_nothing_else() {
        let step =
            ClockStep { by_ns: -2, since_lsn: Lsn(3), since_time_ns: 4, shown_ns: 5, is_measured: true };
        assert_eq!(step.encode(), GOLDEN);
        assert_eq!(ClockStep::decode(&GOLDEN, 9).unwrap(), step);
        let old = ClockStep::decode(&(-60_i64).to_le_bytes(), 100).unwrap();
        assert_eq!((old.by_ns, old.since_lsn, old.since_time_ns, old.shown_ns), (-60, Lsn(0), 40, 40));
        let mut bad = GOLDEN;
        bad[32] = 2;
        // An lsn that no history reaches: it would be stored, and refused when it is read again.
        let mut far = GOLDEN;
        far[8..16].fill(0xFF);
        for bytes in [&bad[..], &far, &GOLDEN[..39], &[], &GOLDEN[..16]] {
            assert!(ClockStep::decode(bytes, 9).is_err());
        }
    }
}
