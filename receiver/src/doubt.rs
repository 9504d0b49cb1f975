//! Doubt: times at which nobody can say, by the stream, what the disk held.
//!
//! The source's clock runs in stretches; between two of them it was set, which a clock step in the stream
//! tells. Of the stretches of one boot it is known how they differ, and the newest clock is taken for the
//! right one: it was set, and by hand or NTP clocks are set right. So a stretch is in doubt when the steps
//! behind it do not add up to nothing:
//!
//! ```text
//! ahead, set back      [ newest time before the stretch … newest time in it ]     held times behind the step included
//! behind, set forward  [ newest time before the stretch … time after the step ]   but no more than an hour, or twice the
//!                                                                                   step, before it: a machine that was
//!                                                                                   paused has such a step, too
//! ahead or behind, and never set right                                             from there on, without end
//! ```
//! `time:` in there is refused: every other moment, with exit 0, is what the disk held. Steps below 5 s are
//! no events, and what a clock drifts by itself is no doubt: times are as inexact as the clock.

use std::fmt;

use journal::Lsn;
use journal::clock_step::ClockStep;

use crate::events::{Event, EventKind};
use crate::point::rfc3339;
use crate::state::Moment;

/// What steps may differ by in sum.
const SLACK_NS: i64 = 5_000_000_000;
/// A clock drifts by less than one part in so many.
const DRIFT: u64 = 5000;
/// A clock that is behind is set right within this time, or its times were good enough for a while.
const BEHIND_NS: u64 = 3_600_000_000_000;

/// A range of times in doubt; both ends belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    from_ns: u64,
    /// `None`: without end.
    to_ns: Option<u64>,
    /// The record before the stretch, where it is known.
    before: Option<Moment>,
    /// The step that told it.
    at: Moment,
    by_ns: i64,
}

impl Doubt {
    /// Whether a time is in doubt.
    pub fn holds(&self, time_ns: u64) -> bool {
        self.from_ns <= time_ns && self.to_ns.is_none_or(|to_ns| time_ns <= to_ns)
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = if self.by_ns < 0 { "back" } else { "forward" };
        let seconds = self.by_ns.unsigned_abs() / 1_000_000_000;
        let from = rfc3339(self.from_ns);
        write!(f, "the source's clock was set {direction} by {seconds} s at lsn {}, and ", self.at.lsn)?;
        match self.to_ns {
            Some(to) => write!(f, "times from {from} to {} are in doubt", rfc3339(to))?,
            None => write!(f, "times from {from} on are in doubt until it is right again")?,
        }
        write!(f, "; nearest points: ")?;
        if let Some(before) = self.before {
            write!(f, "lsn {} before {}, and ", before.lsn, rfc3339(before.time_ns))?;
        }
        write!(f, "lsn {}; `points` lists bookmarks", self.at.lsn)
    }
}

/// One step, with its place in the stream.
#[derive(Clone, Copy)]
struct Step {
    at: Moment,
    step: ClockStep,
    /// Its stretch begins where the one before ended: they are of one chain.
    joins: bool,
}

impl Step {
    /// What the old clock would have shown.
    fn expected_ns(&self) -> u64 {
        self.step.shown_ns.saturating_add_signed(self.step.by_ns.saturating_neg())
    }
}

/// What is in doubt, oldest first.
pub(crate) fn doubts(events: &[Event]) -> Vec<Doubt> {
    let mut steps: Vec<Step> = Vec::new();
    for event in events {
        let step = match &event.kind {
            EventKind::ClockStep(step) => *step,
            // Of an old log: the step alone is known.
            EventKind::ClockJump(by_ns) => {
                let Ok(step) = ClockStep::decode(&by_ns.to_le_bytes(), event.at.time_ns) else { continue };
                step
            }
            _ => continue,
        };
        // Its first record is the one behind the step before, or one that came before that step was told.
        let joins =
            steps.last().is_some_and(|last| step.since_lsn.0 == 0 || step.since_lsn <= last.at.lsn.next());
        let joins = joins
            && steps
                .last()
                .is_some_and(|last| step.since_lsn.0 == 0 || last.step.since_lsn <= step.since_lsn);
        steps.push(Step { at: event.at, step, joins });
    }
    // From the newest on, so that each step is added up once.
    let mut doubts = Vec::new();
    let mut chain: Option<Chain> = None;
    for at in (0..steps.len()).rev() {
        let step = steps[at];
        let is_last = steps.get(at + 1).is_none_or(|next| !next.joins);
        let behind = chain.take().filter(|_| !is_last);
        let joined = match behind {
            Some(behind) => Chain {
                net_ns: behind.net_ns.saturating_add(step.step.by_ns),
                is_measured: behind.is_measured && step.step.is_measured,
                ..behind
            },
            None => Chain {
                net_ns: step.step.by_ns,
                is_measured: step.step.is_measured,
                last: step,
                is_newest: at + 1 == steps.len(),
            },
        };
        doubts.extend(stretch(&step, &joined));
        chain = Some(joined);
    }
    doubts.reverse();
    doubts
}

/// A step and those behind it, up to the next boot.
#[derive(Clone, Copy)]
struct Chain {
    net_ns: i64,
    is_measured: bool,
    last: Step,
    /// No other chain follows.
    is_newest: bool,
}

/// The stretch that `first` ends.
fn stretch(first: &Step, chain: &Chain) -> Option<Doubt> {
    let Chain { net_ns, is_measured, last, is_newest } = *chain;
    // A step that was found after a boot is at least that large: how long the machine was off nobody knows.
    let is_right = net_ns.unsigned_abs() <= SLACK_NS.unsigned_abs() || (!is_measured && net_ns > 0);
    let since_ns = first.step.since_time_ns;
    let ended_ns = first.at.time_ns.max(first.expected_ns());
    let lasted_ns = first.expected_ns().saturating_sub(since_ns);
    let is_drift = since_ns > 0 && net_ns.unsigned_abs() <= lasted_ns / DRIFT;
    if is_right || is_drift {
        return None;
    }
    let before = (first.step.since_lsn.0 > 1)
        .then(|| Moment { lsn: Lsn(first.step.since_lsn.0 - 1), time_ns: since_ns });
    let doubt = |from_ns: u64, to_ns, before| {
        Some(Doubt { from_ns, to_ns, before, at: first.at, by_ns: first.step.by_ns })
    };
    if net_ns > 0 {
        let corrected_ns = first.expected_ns().saturating_add_signed(net_ns);
        let earliest_ns =
            first.expected_ns().saturating_sub(BEHIND_NS.max(net_ns.unsigned_abs().saturating_mul(2)));
        return doubt(since_ns.max(earliest_ns), Some(ended_ns.max(corrected_ns)), before);
    }
    let is_known = first.step.since_lsn.0 > 0;
    if is_known && last.step.shown_ns < since_ns {
        // The new clock contradicts what was there before the stretch, too: it is the wrong one, as long as
        // it is not set.
        let held = Some(Moment { lsn: Lsn(first.at.lsn.0.saturating_sub(1)), time_ns: first.at.time_ns });
        return if is_newest {
            doubt(ended_ns, None, held)
        } else {
            doubt(ended_ns, Some(last.at.time_ns), held)
        };
    }
    let from_ns = if is_known { since_ns } else { last.step.shown_ns.saturating_sub(BEHIND_NS) };
    doubt(from_ns, Some(ended_ns), before)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const HOUR: u64 = 3600 * SECOND;
    const DAY: u64 = 24 * HOUR;
    const YEAR: u64 = 365 * DAY;

    fn step(lsn: u64, time_ns: u64, by_ns: i64, since: (u64, u64), shown_ns: u64) -> Event {
        let step =
            ClockStep { by_ns, since_lsn: Lsn(since.0), since_time_ns: since.1, shown_ns, is_measured: true };
        Event { at: Moment { lsn: Lsn(lsn), time_ns }, kind: EventKind::ClockStep(step) }
    }

    fn unmeasured(event: Event) -> Event {
        let EventKind::ClockStep(step) = event.kind else { unreachable!() };
        Event { kind: EventKind::ClockStep(ClockStep { is_measured: false, ..step }), ..event }
    }

    fn ranges(events: &[Event]) -> Vec<(u64, Option<u64>)> {
        doubts(events).iter().map(|doubt| (doubt.from_ns, doubt.to_ns)).collect()
    }

    #[test]
    fn ahead_for_a_while_and_right_again() {
        let t = 40 * YEAR;
        let back = step(20, t + DAY + 9 * SECOND, -DAY.cast_signed(), (10, t), t + 10 * SECOND);
        // At the boot: nobody saw it go ahead.
        assert_eq!(ranges(std::slice::from_ref(&back)), [(t, Some(t + DAY + 10 * SECOND))]);
        // Within a boot both steps are there, and what was before them is good.
        let ahead = step(10, t + DAY + 5 * SECOND, DAY.cast_signed(), (1, 0), t + DAY + 5 * SECOND);
        let back = step(20, t + DAY + 9 * SECOND, -DAY.cast_signed(), (10, t), t + 10 * SECOND);
        assert_eq!(ranges(&[ahead.clone(), back]), [(t, Some(t + DAY + 10 * SECOND))]);
        // As long as it is ahead, the hours before the step are in doubt, and no more.
        let (from, to) = ranges(&[ahead])[0];
        assert!(from == t + 5 * SECOND - 2 * DAY && to == Some(t + DAY + 5 * SECOND), "{from} {to:?}");
    }

    #[test]
    fn behind_at_the_boot_and_right_then() {
        let (t, early) = (40 * YEAR, 29 * YEAR);
        let found = unmeasured(step(20, t, -(t - early).cast_signed(), (10, t - DAY), early));
        // Never set right: nothing behind the last good record is certain.
        assert_eq!(ranges(std::slice::from_ref(&found)), [(t, None)]);
        let by = t + HOUR - early;
        let right = step(25, t + HOUR + SECOND, by.cast_signed(), (21, t), t + HOUR + SECOND);
        let found = ranges(&[found, right]);
        assert_eq!(found, [(t, Some(t + HOUR + SECOND))]);
    }

    #[test]
    fn behind_from_the_first_record_on() {
        let (t, early) = (40 * YEAR, 29 * YEAR);
        let right = step(9, t, (t - early - SECOND).cast_signed(), (1, 0), t);
        let found = ranges(&[right]);
        assert!(found[0].0 <= early && found[0].1 == Some(t), "{found:?}");
    }

    #[test]
    fn drift_small_steps_and_fast_and_back_are_no_doubt() {
        let t = 40 * YEAR;
        assert_eq!(ranges(&[step(9, t, -(10 * SECOND).cast_signed(), (1, t - YEAR), t - 10 * SECOND)]), []);
        let there = step(9, t, (4 * SECOND).cast_signed(), (1, t - DAY), t);
        assert_eq!(ranges(&[there]), []);
        // Set wrong to 1999, and right again: what was before is good, what was meanwhile is not.
        let wrong = step(9, t, -(11 * YEAR).cast_signed(), (1, t - DAY), 29 * YEAR);
        let right = step(15, t + HOUR, (11 * YEAR).cast_signed(), (10, t), t + HOUR);
        assert_eq!(ranges(&[wrong, right]), [(t, Some(t + HOUR))]);
    }

    #[test]
    fn an_old_log_doubts_what_the_step_alone_tells() {
        let t = 40 * YEAR;
        let at = Moment { lsn: Lsn(9), time_ns: t };
        let old = Event { at, kind: EventKind::ClockJump(-(6 * SECOND).cast_signed()) };
        assert!(doubts(std::slice::from_ref(&old))[0].holds(t - SECOND));
        assert!(!doubts(std::slice::from_ref(&old))[0].holds(t + SECOND));
    }
}
