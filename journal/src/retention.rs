//! Which segments may go: pure decisions over summaries, one for each side.
//!
//! Both only ever name a first segment to keep: history goes from its old end, and never the segment being
//! written.

use crate::segment::SegmentSummary;
use crate::{Lsn, Position};

/// Source: a bounded store-and-forward buffer. Acknowledged segments stay while there is room, so that a
/// frame that rots at the receiver can be fetched again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourcePolicy {
    /// Room for the journal, bytes.
    pub quota_bytes: u64,
}

impl SourcePolicy {
    /// The first segment to keep; `None` where nothing goes.
    pub fn keep_from(&self, segments: &[SegmentSummary], acknowledged: &Position) -> Option<u64> {
        let mut held = total(segments);
        let mut keep = None;
        for (segment, next) in segments.iter().zip(segments.iter().skip(1)) {
            if held <= self.quota_bytes || !is_acknowledged(segment, acknowledged) {
                break;
            }
            held -= segment.bytes;
            keep = Some(next.number);
        }
        keep
    }

    /// Bytes over the quota when all that may go is gone; above 0 capture must degrade to the dirty map.
    pub fn over_quota_bytes(&self, segments: &[SegmentSummary], acknowledged: &Position) -> u64 {
        let kept = segments.iter().skip_while(|segment| is_acknowledged(segment, acknowledged));
        kept.map(|segment| segment.bytes).sum::<u64>().saturating_sub(self.quota_bytes)
    }
}

/// Receiver: the history window. Its clock counts, not the source's, and it counts to the group's newest
/// receipt: so nothing ages while nothing arrives, and no peer can expire what was promised to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiverPolicy {
    /// Kept for so long, ns.
    pub history_ns: u64,
    /// Never shorter than this, whatever the quota says, ns.
    pub history_min_ns: u64,
    /// Room for the journal, bytes.
    pub quota_bytes: u64,
}

/// What a receiver's policy says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The first segment to keep; `None` where nothing goes.
    pub keep_from: Option<u64>,
    /// Bytes over the quota that may not go: stop acknowledging rather than break the promise.
    pub over_quota_bytes: u64,
    /// The quota cuts the history shorter than `history_ns`: warn, and name what used it up.
    pub shortened: bool,
}

impl ReceiverPolicy {
    /// `floor` is the newest lsn that nothing needs any more: a segment that holds a later one stays,
    /// whatever its age.
    pub fn decide(&self, segments: &[SegmentSummary], floor: Lsn) -> Verdict {
        let mut held = total(segments);
        let mut verdict = Verdict::default();
        let newest_ns = segments.iter().map(|segment| segment.received_last_ns).max().unwrap_or(0);
        for (segment, next) in segments.iter().zip(segments.iter().skip(1)) {
            let age_ns = newest_ns - segment.received_last_ns;
            let needed = !segment.sealed || segment.last_lsn > floor || age_ns < self.history_min_ns;
            let expired = age_ns > self.history_ns;
            if needed || !expired && held <= self.quota_bytes {
                break;
            }
            held -= segment.bytes;
            verdict.shortened |= !expired;
            verdict.keep_from = Some(next.number);
        }
        verdict.over_quota_bytes = held.saturating_sub(self.quota_bytes);
        verdict
    }
}

fn total(segments: &[SegmentSummary]) -> u64 {
    segments.iter().map(|segment| segment.bytes).sum()
}

fn is_acknowledged(segment: &SegmentSummary, acknowledged: &Position) -> bool {
    segment.sealed && segment.end.order() <= acknowledged.order()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::{SegmentHeader, SegmentKind};
    use crate::{Epoch, EpochId, GroupId};
    use std::path::PathBuf;

    fn at(lsn: u64) -> Position {
        Position { epoch: Epoch { number: 1, id: EpochId::default() }, lsn: Lsn(lsn), ..Position::default() }
    }

    /// Segments 1..=count of 100 bytes and 10 lsns each, received one second apart; the last is being
    /// written.
    fn segments(count: u64) -> Vec<SegmentSummary> {
        let each = (1..=count).map(|number| {
            let header = SegmentHeader {
                kind: SegmentKind::Journal,
                flags: 0,
                group: GroupId::default(),
                number,
                first_lsn: Lsn::ZERO,
                last_lsn: Lsn::ZERO,
                start: at((number - 1) * 10),
                received_ns: number * 1_000_000_000,
                allocated_bytes: 0,
                nonce: 0,
                merged_from: 0,
            };
            let mut summary = SegmentSummary::empty(PathBuf::new(), &header);
            summary.end = at(number * 10);
            summary.last_lsn = Lsn(number * 10);
            (summary.bytes, summary.sealed) = (100, number < count);
            summary
        });
        each.collect()
    }

    #[test]
    fn the_source_gives_up_acknowledged_segments_when_it_needs_room() {
        let segments = segments(5);
        let keep = |quota_bytes, lsn| SourcePolicy { quota_bytes }.keep_from(&segments, &at(lsn));
        assert_eq!(keep(500, 50), None, "there is room");
        assert_eq!(keep(499, 50), Some(2), "one is enough");
        assert_eq!(keep(0, 50), Some(5), "never the one being written");
        assert_eq!(keep(0, 25), Some(3), "never what is not acknowledged as a whole");
        assert_eq!(keep(0, 9), None);
        let over = |quota_bytes, lsn| SourcePolicy { quota_bytes }.over_quota_bytes(&segments, &at(lsn));
        assert_eq!(over(300, 25), 0);
        assert_eq!(over(299, 25), 1);
        assert_eq!(over(299, 9), 201);
    }

    #[test]
    fn the_receiver_keeps_what_it_promised() {
        const SECOND: u64 = 1_000_000_000;
        let segments = segments(10);
        let decide = |history: u64, min: u64, quota_bytes, floor| {
            let (history_ns, history_min_ns) = (history * SECOND, min * SECOND);
            ReceiverPolicy { history_ns, history_min_ns, quota_bytes }.decide(&segments, Lsn(floor))
        };
        let all = u64::MAX;
        assert_eq!(decide(100, 1, all, 100), Verdict::default());
        assert_eq!(decide(5, 1, all, 100).keep_from, Some(5), "older than five seconds goes");
        assert_eq!(decide(5, 1, all, 25).keep_from, Some(3), "but not above the floor");
        let tight = decide(100, 6, 250, 100);
        assert_eq!(tight, Verdict { keep_from: Some(5), over_quota_bytes: 350, shortened: true });
        let roomy = decide(100, 1, 800, 100);
        assert_eq!(roomy, Verdict { keep_from: Some(3), over_quota_bytes: 0, shortened: true });
        assert!(!decide(5, 1, 600, 100).shortened, "age alone shortens nothing");
    }

    #[test]
    fn nothing_ages_while_nothing_arrives_and_source_times_do_not_count() {
        let mut segments = segments(10);
        let policy = ReceiverPolicy { history_ns: 5_000_000_000, history_min_ns: 1, quota_bytes: u64::MAX };
        let before = policy.decide(&segments, Lsn(100));
        for segment in &mut segments {
            segment.last_time_ns = u64::MAX;
        }
        assert_eq!(policy.decide(&segments, Lsn(100)), before, "there is no clock in it, and no source time");
    }
}
