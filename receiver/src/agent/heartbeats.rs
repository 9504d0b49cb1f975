//! What the source says about its newest lsn: up to which time the group is known to be complete.
//!
//! A heartbeat says "at this time my newest lsn was this". It counts once everything up to that lsn is
//! durable here: then every time up to it can be restored, also when nothing was written for hours. The
//! newest that counts is handed to history, which keeps it with the checkpoint.
//!
//! Under steady load the newest heartbeat is always a little ahead of what is durable. So the oldest one that
//! does not count yet is kept too: it will, and bounds memory at two.

use std::time::Instant;

use journal::Lsn;

use crate::state::Moment;

/// Clocks that differ by more are told.
const SKEW_NS: u64 = 5_000_000_000;

/// See the module. Nothing in it is trusted beyond this group's own times and its status line.
#[derive(Debug, Default)]
pub struct Heartbeats {
    counted: Option<Moment>,
    next: Option<Moment>,
    newest: Option<Moment>,
    heard: Option<Instant>,
    /// Nothing was heard yet of the source that is connected now.
    is_new_visit: bool,
    /// The source's clock minus ours, at the last one.
    skew_ns: Option<i64>,
}

impl Heartbeats {
    /// Starts from what was kept.
    pub fn new(kept: Option<Moment>) -> Heartbeats {
        Heartbeats { counted: kept, newest: kept, ..Heartbeats::default() }
    }

    /// A source connects. Its first word replaces what an earlier visit said and nothing here bears out: a
    /// source that named an lsn out of reach would be believed for good otherwise, and the honest one's words
    /// be dropped as running back.
    pub fn begin_visit(&mut self) {
        self.is_new_visit = true;
    }

    /// The source says that `beat.lsn` is its newest at `beat.time_ns`; our clock shows `now_ns`. Lsns that
    /// run back are dropped, and times that do unless the lsn rose: then the source's clock was set.
    pub fn heard(&mut self, beat: Moment, now: Instant, now_ns: u64) {
        self.heard = Some(now);
        let skew = i128::from(beat.time_ns) - i128::from(now_ns);
        let skew_ns = i64::try_from(skew).unwrap_or(if skew < 0 { i64::MIN } else { i64::MAX });
        let is_large = |skew: i64| skew.unsigned_abs() > SKEW_NS;
        if is_large(skew_ns) && !self.skew_ns.is_some_and(is_large) {
            tracing::warn!(
                skew_ms = skew_ns / 1_000_000,
                "the clocks of source and receiver differ: `time:` means the source's"
            );
        }
        self.skew_ns = Some(skew_ns);
        if std::mem::take(&mut self.is_new_visit) {
            (self.newest, self.next) = (self.counted, None);
        }
        let runs_back = |newest: Moment| {
            beat.lsn < newest.lsn || (beat.lsn == newest.lsn && beat.time_ns < newest.time_ns)
        };
        if self.newest.is_some_and(runs_back) {
            return;
        }
        self.newest = Some(beat);
        self.next.get_or_insert(beat);
    }

    /// Everything up to `durable` is durable; the heartbeat that counts from now on, if it is a new one.
    pub fn durable(&mut self, durable: Lsn) -> Option<Moment> {
        let holds = |beat: &Option<Moment>| beat.filter(|beat| beat.lsn <= durable);
        let counted = holds(&self.newest).or_else(|| holds(&self.next));
        let counted = counted.filter(|beat| self.counted.is_none_or(|old| old < *beat))?;
        self.counted = Some(counted);
        self.next = self.newest.filter(|newest| *newest != counted);
        Some(counted)
    }

    /// The newest that was heard, whether it counts or not.
    pub fn newest(&self) -> Option<Moment> {
        self.newest
    }

    /// By how much the source's clock is ahead of ours, ms; `None` before it was heard.
    pub fn skew_ms(&self) -> Option<i64> {
        self.skew_ns.map(|ns| ns / 1_000_000)
    }

    /// When the source was heard last, by our own clock.
    pub fn heard_at(&self) -> Option<Instant> {
        self.heard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(lsn: u64, time_ns: u64) -> Moment {
        Moment { lsn: Lsn(lsn), time_ns }
    }

    #[test]
    fn a_heartbeat_counts_when_its_lsn_is_durable() {
        let mut beats = Heartbeats::new(None);
        beats.heard(beat(10, 100), Instant::now(), 0);
        assert_eq!(beats.durable(Lsn(9)), None);
        assert_eq!(beats.durable(Lsn(10)), Some(beat(10, 100)));
        assert_eq!(beats.durable(Lsn(10)), None, "told once");
        beats.heard(beat(10, 200), Instant::now(), 0);
        assert_eq!(beats.durable(Lsn(10)), Some(beat(10, 200)), "idle time counts too");
    }

    #[test]
    fn under_load_one_counts_although_the_newest_never_does() {
        let mut beats = Heartbeats::new(None);
        let mut counted = Vec::new();
        for lsn in 1..100 {
            beats.heard(beat(lsn * 10, lsn), Instant::now(), 0);
            counted.extend(beats.durable(Lsn(lsn * 10 - 5)));
        }
        assert!(counted.len() > 40, "{counted:?}");
        assert!(counted.is_sorted());
    }

    #[test]
    fn what_a_visit_claimed_ends_with_the_next_visits_first_word() {
        let mut beats = Heartbeats::new(Some(beat(10, 100)));
        beats.begin_visit();
        beats.heard(beat(1 << 62, 200), Instant::now(), 0);
        beats.heard(beat(20, 300), Instant::now(), 0);
        assert_eq!(beats.newest(), Some(beat(1 << 62, 200)), "within a visit nothing runs back");
        beats.begin_visit();
        assert_eq!(beats.newest(), Some(beat(1 << 62, 200)), "nothing better is known yet");
        beats.heard(beat(20, 300), Instant::now(), 0);
        assert_eq!((beats.newest(), beats.durable(Lsn(20))), (Some(beat(20, 300)), Some(beat(20, 300))));
        // What counted is durable here, and no claim: a visit cannot take it back.
        beats.begin_visit();
        beats.heard(beat(5, 400), Instant::now(), 0);
        assert_eq!(beats.newest(), Some(beat(20, 300)));
    }

    #[test]
    fn what_runs_back_is_dropped() {
        let mut beats = Heartbeats::new(Some(beat(10, 100)));
        beats.heard(beat(9, 200), Instant::now(), 0);
        beats.heard(beat(10, 99), Instant::now(), 0);
        assert_eq!(beats.newest(), Some(beat(10, 100)));
        assert_eq!(beats.durable(Lsn(1000)), None);
        // A clock that was set back does not hide what is written from then on.
        beats.heard(beat(20, 99), Instant::now(), 7_000_099);
        assert_eq!((beats.newest(), beats.skew_ms()), (Some(beat(20, 99)), Some(-7)));
    }
}
