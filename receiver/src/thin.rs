//! Thinning: which boundaries below the exact window stay as points, and which batches are merged next. Pure
//! policy; the applier carries it out ([`crate::apply`]).
//!
//! ```text
//!            one a day        one an hour          every write
//!  oldest ├──────┼──────┼─────┼─┼─┼─┼─┼─┼─┼─┼─┤──────────────────┤ newest
//!                                             exact start
//! ```
//! Of each hour (below [`Steps::hourly_ns`]: of each day) by the receiver's clock the last boundary that is a
//! point stays; the others go when the hour is over, so that what is merged once is not merged again for each
//! batch that comes.

use std::ops::Range;

/// How long steps are kept; both 0: there are none, the history ends with the exact window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// One point an hour up to this age, ns.
    pub hourly_ns: u64,
    /// One point a day up to this age, ns.
    pub daily_ns: u64,
}

/// Batches that are merged at once: each has a frame in memory.
pub(crate) const FAN: usize = 16;
/// Undo that is merged at once: what apply waits for it stays within seconds. Larger neighbours stay apart,
/// and the point between them stays.
pub(crate) const MAX_BYTES: u64 = 1 << 30;

const HOUR_NS: u64 = 3_600_000_000_000;
const DAY_NS: u64 = 24 * HOUR_NS;

/// A stretch of batches below the exact window: one undo segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// First batch in it.
    pub from: u64,
    /// Last batch: the segment's number.
    pub number: u64,
    /// Receipt of its last record, ns.
    pub received_ns: u64,
    /// Size of its segment.
    pub bytes: u64,
    /// Its boundary is a recovery point.
    pub is_point: bool,
    /// It is damaged, or cannot be merged for another reason.
    pub is_fixed: bool,
}

impl Steps {
    /// None.
    pub const NONE: Steps = Steps { hourly_ns: 0, daily_ns: 0 };

    /// Whether there are any.
    pub fn are_kept(&self) -> bool {
        self.hourly_ns > 0 || self.daily_ns > 0
    }

    /// Age at which the last step goes.
    pub fn horizon_ns(&self) -> u64 {
        self.hourly_ns.max(self.daily_ns)
    }

    fn cell(&self, received_ns: u64, unit_ns: u64) -> u64 {
        received_ns / unit_ns
    }

    fn unit_ns(&self, age_ns: u64) -> u64 {
        if age_ns <= self.hourly_ns || self.daily_ns == 0 { HOUR_NS } else { DAY_NS }
    }

    /// The stretches that are merged next, by their place in `all`; `None` where nothing is to be done. `all`
    /// are those below the exact start, oldest first, the last of which ends there.
    pub(crate) fn next(&self, all: &[Stretch], newest_ns: u64) -> Option<Range<usize>> {
        let mut start = 0;
        while start < all.len() {
            let end = start + self.group(&all[start..], newest_ns)?;
            if let Some(found) = pick(&all[start..end]) {
                return Some(start + found.start..start + found.end);
            }
            start = end;
        }
        None
    }

    /// How many stretches from the first on have no boundary between them that stays; `None` where it cannot
    /// be said yet.
    fn group(&self, all: &[Stretch], newest_ns: u64) -> Option<usize> {
        for (at, stretch) in all.iter().enumerate() {
            let unit_ns = self.unit_ns(newest_ns.saturating_sub(stretch.received_ns));
            let cell = self.cell(stretch.received_ns, unit_ns);
            let same = |later: &&Stretch| self.cell(later.received_ns, unit_ns) == cell;
            let later = &all[at + 1..];
            // Not before the next hour has begun below the exact window, too.
            if later.iter().all(|later| same(&later)) {
                return None;
            }
            let is_last = !later.iter().take_while(same).any(|later| later.is_point);
            if stretch.is_point && is_last {
                return Some(at + 1);
            }
        }
        None
    }
}

/// What of a group is merged first: neighbours that hold about as many batches each, so that what is large
/// already is not written again for each small one.
fn pick(group: &[Stretch]) -> Option<Range<usize>> {
    let level = |stretch: &Stretch| (stretch.number - stretch.from + 1).ilog(FAN as u64);
    let fits = |range: &Range<usize>| {
        let part = &group[range.clone()];
        part.len() <= FAN
            && part.iter().all(|stretch| !stretch.is_fixed)
            && part.iter().map(|stretch| stretch.bytes).sum::<u64>() <= MAX_BYTES
    };
    let mut best: Option<(u32, Range<usize>)> = None;
    for start in 0..group.len() {
        let mut range = start..start + 1;
        let mut highest = level(&group[start]);
        while range.end < group.len() && fits(&(range.start..range.end + 1)) {
            let next = level(&group[range.end]);
            if range.len() > 1 && next > highest {
                break;
            }
            highest = highest.max(next);
            range.end += 1;
        }
        if range.len() > 1 && fits(&range) && best.as_ref().is_none_or(|(known, _)| highest < *known) {
            best = Some((highest, range));
        }
    }
    best.map(|(_, range)| range)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE_NS: u64 = HOUR_NS / 60;
    const STEPS: Steps = Steps { hourly_ns: 48 * HOUR_NS, daily_ns: 10 * DAY_NS };

    fn minutes(count: u64) -> Vec<Stretch> {
        let stretch = |n: u64| Stretch {
            from: n,
            number: n,
            received_ns: n * MINUTE_NS,
            bytes: 100,
            is_point: true,
            is_fixed: false,
        };
        (1..=count).map(stretch).collect()
    }

    /// Merges until nothing is left to do; how many bytes that wrote.
    fn merge_all(all: &mut Vec<Stretch>, steps: &Steps, newest_ns: u64) -> u64 {
        let mut written = 0;
        while let Some(range) = steps.next(all, newest_ns) {
            assert!((2..=FAN).contains(&range.len()), "{range:?}");
            let part = &all[range.clone()];
            let bytes = part.iter().map(|one| one.bytes).sum();
            let merged = Stretch { from: part[0].from, bytes, ..part[part.len() - 1] };
            written += bytes;
            all.splice(range, [merged]);
        }
        written
    }

    #[test]
    fn of_each_hour_the_last_point_stays_and_of_each_day_further_back() {
        let mut all = minutes(6 * 24 * 60 + 30);
        let newest_ns = (7 * 24 * 60) * MINUTE_NS;
        let written = merge_all(&mut all, &STEPS, newest_ns);
        assert!(written <= 4 * 100 * 6 * 24 * 60, "{written} bytes written");
        let at = |minute: u64| all.iter().any(|one| one.number == minute);
        // Five days and an hour lie below the window of hours.
        for day in 1..=4 {
            assert!(at(day * 1440 - 1), "the last minute of day {day}");
            assert!(!at(day * 1440 - 61), "and nothing else of it");
        }
        for hour in 5 * 24 + 1..6 * 24 {
            assert!(at(hour * 60 - 1) && !at(hour * 60 - 2), "hour {hour}");
        }
        let last = all.iter().filter(|one| one.number >= 6 * 24 * 60 - 30);
        assert!(last.count() > 20, "the hour that is not over is left alone");
        assert_eq!(STEPS.next(&all, newest_ns), None);
    }

    #[test]
    fn only_points_stay_and_what_is_damaged_or_too_large_is_passed_over() {
        let mut all = minutes(240);
        for one in &mut all[40..70] {
            one.is_point = false;
        }
        all[5].is_fixed = true;
        merge_all(&mut all, &STEPS, 300 * MINUTE_NS);
        let numbers: Vec<u64> = all.iter().map(|one| one.number).take(5).collect();
        assert_eq!(numbers, [5, 6, 40, 119, 179], "6 is damaged; of the first hour 40 is the last point");
        let mut all = minutes(240);
        all.iter_mut().for_each(|one| one.bytes = MAX_BYTES / 2 + 1);
        assert_eq!(STEPS.next(&all, 300 * MINUTE_NS), None);
    }
}
