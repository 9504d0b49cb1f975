//! What the source says about its newest lsn: up to which time the group is known to be complete.
//!
//! A heartbeat says "at this time my newest lsn was this". It counts once everything up to that lsn is durable here:
//! then every time up to it can be restored, also when nothing was written for hours. The newest that counts is handed
//! to history, which keeps it with the checkpoint.
//!
//! Under steady load the newest heartbeat is always a little ahead of what is durable. So the oldest one that does not
//! count yet is kept too: it will, and bounds memory at two.

use std::time::Instant;

use journal::Lsn;

use crate::state::Moment;

/// See the module. Nothing in it is trusted beyond this group's own times and its status line.
#[derive(Debug, Default)]
pub struct Heartbeats {
    counted: Option<Moment>,
    next: Option<Moment>,
    newest: Option<Moment>,
    heard: Option<Instant>,
}

impl Heartbeats {
    /// Starts from what was kept.
    pub fn new(kept: Option<Moment>) -> Heartbeats {
        Heartbeats { counted: kept, newest: kept, ..Heartbeats::default() }
    }

    /// The source says that `beat.lsn` is its newest at `beat.time_ns`. Times and lsns that run back are dropped.
    pub fn heard(&mut self, beat: Moment, now: Instant) {
        self.heard = Some(now);
        if self.newest.is_some_and(|newest| beat.lsn < newest.lsn || beat.time_ns < newest.time_ns) {
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
        beats.heard(beat(10, 100), Instant::now());
        assert_eq!(beats.durable(Lsn(9)), None);
        assert_eq!(beats.durable(Lsn(10)), Some(beat(10, 100)));
        assert_eq!(beats.durable(Lsn(10)), None, "told once");
        beats.heard(beat(10, 200), Instant::now());
        assert_eq!(beats.durable(Lsn(10)), Some(beat(10, 200)), "idle time counts too");
    }

    #[test]
    fn under_load_one_counts_although_the_newest_never_does() {
        let mut beats = Heartbeats::new(None);
        let mut counted = Vec::new();
        for lsn in 1..100 {
            beats.heard(beat(lsn * 10, lsn), Instant::now());
            counted.extend(beats.durable(Lsn(lsn * 10 - 5)));
        }
        assert!(counted.len() > 40, "{counted:?}");
        assert!(counted.is_sorted());
    }

    #[test]
    fn what_runs_back_is_dropped() {
        let mut beats = Heartbeats::new(Some(beat(10, 100)));
        beats.heard(beat(9, 200), Instant::now());
        beats.heard(beat(20, 99), Instant::now());
        assert_eq!(beats.newest(), Some(beat(10, 100)));
        assert_eq!(beats.durable(Lsn(1000)), None);
    }
}
