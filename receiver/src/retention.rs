//! Retention: which batches' undo may go. Pure policy; the applier carries it out.
//!
//! Age is counted by the receiver's clock, from a batch's receipt to the group's *newest* receipt, so nothing
//! ages while nothing arrives and no source's clock can expire it. Dropping batch `k` makes its boundary the
//! oldest point. Never dropped: what leads to the last consistent point or a running restore (`floor`), what
//! is younger than `min_ns`, and what a hold keeps (`may_begin`).

use journal::Lsn;

use crate::thin::Steps;

/// What a group is told to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Every write within this time is a recovery point, ns.
    pub window_ns: u64,
    /// Never shortened below this, ns.
    pub min_ns: u64,
    /// Points below the window.
    pub steps: Steps,
    /// Bytes of history; `None`: 4 times what the replicas hold, at least 1 GiB.
    pub quota_bytes: Option<u64>,
}

/// A batch whose undo is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aged {
    /// The batch.
    pub number: u64,
    /// Its boundary.
    pub last_lsn: Lsn,
    /// Receipt of its last record, ns.
    pub received_ns: u64,
    /// Size of its undo segment.
    pub undo_bytes: u64,
    /// Its boundary may become the oldest point; otherwise the batch goes with a later one.
    pub may_begin: bool,
}

/// An applied journal segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedoPart {
    /// Last lsn in it.
    pub last_lsn: Lsn,
    /// Size.
    pub bytes: u64,
}

/// What the policy says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Batches below this one go; `None`: nothing goes.
    pub keep_from: Option<u64>,
    /// The quota made the history shorter than its window: what used it up should be shown.
    pub shortened: bool,
    /// Bytes over the quota that may not be dropped: beyond this the receiver rather stops acknowledging.
    pub over_quota_bytes: u64,
    /// Bytes of history that stay.
    pub kept_bytes: u64,
}

/// Decides. `batches` and `redo` oldest first; `floor` is the newest boundary that may become the oldest
/// point.
pub fn decide(
    policy: &Policy,
    quota_bytes: u64,
    batches: &[Aged],
    redo: &[RedoPart],
    newest_ns: u64,
    floor: u64,
) -> Verdict {
    let undo_bytes: u64 = batches.iter().map(|batch| batch.undo_bytes).sum();
    let redo_bytes: u64 = redo.iter().map(|part| part.bytes).sum();
    let mut kept_bytes = undo_bytes + redo_bytes;
    let mut redo = redo.iter().peekable();
    let mut verdict = Verdict::default();
    // What goes together with the next batch that may go.
    let (mut bytes, mut shortened) = (0, false);
    for batch in batches.iter().take_while(|batch| batch.number <= floor) {
        let age_ns = newest_ns.saturating_sub(batch.received_ns);
        let outlived = age_ns > policy.window_ns;
        if !outlived && (kept_bytes <= quota_bytes || age_ns <= policy.min_ns) {
            break;
        }
        bytes += batch.undo_bytes;
        shortened |= !outlived;
        if !batch.may_begin {
            continue;
        }
        verdict.shortened |= shortened;
        verdict.keep_from = Some(batch.number + 1);
        kept_bytes -= std::mem::take(&mut bytes);
        while let Some(part) = redo.next_if(|part| part.last_lsn <= batch.last_lsn) {
            kept_bytes -= part.bytes;
        }
    }
    Verdict { over_quota_bytes: kept_bytes.saturating_sub(quota_bytes), kept_bytes, ..verdict }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000_000_000;
    const POLICY: Policy = Policy {
        window_ns: 24 * HOUR,
        min_ns: 4 * HOUR,
        steps: Steps { hourly_ns: 0, daily_ns: 0 },
        quota_bytes: None,
    };

    /// One batch an hour, 10 bytes of undo each, one redo segment of 5 bytes each.
    fn day(hours: u64) -> (Vec<Aged>, Vec<RedoPart>) {
        let batch = |n: u64| Aged {
            number: n,
            last_lsn: Lsn(n * 100),
            received_ns: n * HOUR,
            undo_bytes: 10,
            may_begin: true,
        };
        let part = |n: u64| RedoPart { last_lsn: Lsn(n * 100), bytes: 5 };
        ((1..=hours).map(batch).collect(), (1..=hours).map(part).collect())
    }

    #[test]
    fn age_is_counted_to_the_newest_receipt() {
        let (batches, redo) = day(30);
        let verdict = decide(&POLICY, u64::MAX, &batches, &redo, 30 * HOUR, 30);
        assert_eq!(verdict.keep_from, Some(6), "batch 5 is 25 hours old, batch 6 exactly 24");
        assert_eq!(verdict.kept_bytes, 25 * 15);
        assert!(!verdict.shortened);
        assert_eq!(decide(&POLICY, u64::MAX, &batches[5..], &redo, 30 * HOUR, 30).keep_from, None);
    }

    #[test]
    fn the_quota_shortens_down_to_the_minimum_and_says_so() {
        let (batches, redo) = day(30);
        let verdict = decide(&POLICY, 150, &batches, &redo, 30 * HOUR, 30);
        assert_eq!(verdict.keep_from, Some(21), "10 batches of 15 bytes fit");
        assert!(verdict.shortened);
        assert_eq!((verdict.kept_bytes, verdict.over_quota_bytes), (150, 0));
        let verdict = decide(&POLICY, 10, &batches, &redo, 30 * HOUR, 30);
        assert_eq!(verdict.keep_from, Some(26), "4 hours stay, whatever the quota says");
        assert_eq!(verdict.over_quota_bytes, 5 * 15 - 10);
    }

    #[test]
    fn what_may_not_begin_the_history_goes_with_the_next_that_may() {
        let (mut batches, redo) = day(30);
        batches[2..8].iter_mut().for_each(|batch| batch.may_begin = false);
        let verdict = decide(&POLICY, u64::MAX, &batches, &redo, 30 * HOUR, 30);
        assert_eq!(verdict.keep_from, Some(3), "5 are outlived, of which 3, 4 and 5 wait for batch 9");
        assert_eq!(verdict.kept_bytes, 28 * 15);
        let verdict = decide(&POLICY, u64::MAX, &batches, &redo, 34 * HOUR, 30);
        assert_eq!(verdict.keep_from, Some(10));
        assert_eq!(verdict.kept_bytes, 21 * 15);
        batches.iter_mut().for_each(|batch| batch.may_begin = false);
        let verdict = decide(&POLICY, 10, &batches, &redo, 99 * HOUR, 30);
        assert_eq!((verdict.keep_from, verdict.shortened), (None, false), "a hold keeps all");
        assert_eq!(verdict.over_quota_bytes, 30 * 15 - 10, "and is told");
    }

    #[test]
    fn pins_and_the_last_consistent_point_stay() {
        let (batches, redo) = day(100);
        let verdict = decide(&POLICY, 0, &batches, &redo, 100 * HOUR, 7);
        assert_eq!(verdict.keep_from, Some(8), "boundary 7 must stay reachable");
        assert_eq!(decide(&POLICY, 0, &batches, &redo, 100 * HOUR, 0).keep_from, None);
    }
}
