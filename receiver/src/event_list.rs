//! The events that a group's history holds in memory: what points, gaps and volumes are told from.
//!
//! Filled from the event log, then by ingest and the applier; owned by [`crate::history::History`]. A source
//! may send any number of events, so the list is bounded, by kind:
//! * what points and contents rest on (volumes, epochs, resyncs) is never let go to make room. What says
//!   nothing new is not added: the same volume record again, a begin inside of an open gap, an end outside of
//!   one. At [`MAX_STRUCTURAL`] the list is full, and nothing may be taken that would need more;
//! * of the others (bookmarks, failed writes, clock jumps) the newest [`MAX_NOTES`] are kept, bookmarks
//!   longest, and the rest is counted.

use std::collections::BTreeMap;
use std::ops::Deref;

use journal::record::VolumeRecord;
use journal::{Lsn, VolumeId};

use crate::events::{Event, EventKind};

/// Events that the history rests on, about 128 bytes each: at one resync a minute the default window holds
/// 2,880.
pub const MAX_STRUCTURAL: usize = 65_536;
/// Bookmarks, failed writes and clock jumps: about 256 bytes each at most.
pub const MAX_NOTES: usize = 65_536;
/// How many notes are let go at once, so that each costs little.
const NOTES_STEP: usize = MAX_NOTES / 8;

/// See the module.
#[derive(Default)]
pub struct EventList {
    events: Vec<Event>,
    structural: usize,
    /// The newest record of each volume.
    volumes: BTreeMap<VolumeId, VolumeRecord>,
    gap: Gap,
    forgotten: Forgotten,
    forgotten_to: Lsn,
}

/// Whether the newest event lies in a gap.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Gap {
    #[default]
    Closed,
    /// By a new epoch alone.
    Broken,
    /// By a `ResyncBegin`.
    Resync,
}

/// Notes that were let go to make room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// Bookmarks.
    pub bookmarks: u64,
    /// Failed writes and clock jumps.
    pub others: u64,
}

impl Deref for EventList {
    type Target = [Event];

    fn deref(&self) -> &[Event] {
        &self.events
    }
}

/// Whether points and contents rest on an event.
pub fn is_structural(event: &Event) -> bool {
    matches!(
        event.kind,
        EventKind::Volume(..)
            | EventKind::Epoch { .. }
            | EventKind::ResyncBegin { .. }
            | EventKind::ResyncEnd
    )
}

impl EventList {
    /// Whether so many more events that the history rests on may be added.
    pub fn has_room(&self, structural: usize) -> bool {
        self.structural + structural <= MAX_STRUCTURAL
    }

    /// What was let go.
    pub fn forgotten(&self) -> Forgotten {
        self.forgotten
    }

    /// Adds the next event. Whether there is room is asked before.
    pub fn add(&mut self, event: Event) {
        if !is_structural(&event) {
            self.events.push(event);
            if self.events.len() - self.structural > MAX_NOTES + NOTES_STEP {
                self.let_notes_go();
            }
            return;
        }
        match &event.kind {
            EventKind::Volume(id, record) => {
                if self.volumes.get(id) == Some(record) {
                    return;
                }
                self.volumes.insert(*id, record.clone());
            }
            EventKind::Epoch { .. } if self.gap != Gap::Closed => return,
            EventKind::Epoch { .. } => self.gap = Gap::Broken,
            EventKind::ResyncBegin { reason, .. } if self.gap == Gap::Resync => {
                self.change_reason(reason);
                return;
            }
            EventKind::ResyncBegin { .. } => self.gap = Gap::Resync,
            EventKind::ResyncEnd if self.gap == Gap::Closed => return,
            _ => self.gap = Gap::Closed,
        }
        self.structural += 1;
        self.events.push(event);
    }

    /// The gap that is open goes on for another reason.
    fn change_reason(&mut self, reason: &str) {
        let begun = self.events.iter_mut().rev().find_map(|event| match &mut event.kind {
            EventKind::ResyncBegin { reason, .. } => Some(reason),
            _ => None,
        });
        if let Some(known) = begun {
            reason.clone_into(known);
        }
    }

    fn let_notes_go(&mut self) {
        let excess = self.events.len() - self.structural - MAX_NOTES;
        let mut left = excess;
        self.events.retain(|event| {
            let goes = left > 0
                && matches!(
                    event.kind,
                    EventKind::Failed(_) | EventKind::ClockJump(_) | EventKind::ClockStep(_)
                );
            left -= usize::from(goes);
            !goes
        });
        self.forgotten.others += (excess - left) as u64;
        self.forgotten.bookmarks += left as u64;
        self.events.retain(|event| {
            let goes = left > 0 && matches!(event.kind, EventKind::Bookmark(_));
            left -= usize::from(goes);
            !goes
        });
    }

    /// Forgets what happened before the oldest point, except what the oldest point must know.
    pub fn forget_before(&mut self, start: Lsn) {
        if start <= self.forgotten_to {
            return;
        }
        self.forgotten_to = start;
        let outlived = outlived(&self.events, start);
        let mut at = 0;
        self.events.retain(|_| {
            at += 1;
            !outlived[at - 1]
        });
        self.structural = self.events.iter().filter(|event| is_structural(event)).count();
    }
}

/// Which events nobody can ask for any more: those at or below the oldest point, except bookmarks on it, a
/// gap around it, and the last record of each volume.
pub fn outlived(events: &[Event], start: Lsn) -> Vec<bool> {
    let mut known = std::collections::BTreeSet::new();
    let mut ended = false;
    let mut outlived: Vec<bool> = events
        .iter()
        .rev()
        .map(|event| match &event.kind {
            _ if event.at.lsn > start => false,
            EventKind::Volume(id, _) => !known.insert(*id),
            EventKind::Bookmark(_) => event.at.lsn < start,
            EventKind::ResyncEnd => {
                ended = true;
                true
            }
            // A gap that reaches beyond the oldest point is still a gap.
            EventKind::ResyncBegin { .. } | EventKind::Epoch { .. } => ended,
            EventKind::Failed(_) | EventKind::ClockJump(_) | EventKind::ClockStep(_) => true,
        })
        .collect();
    outlived.reverse();
    outlived
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Moment;
    use journal::VolumeUuid;

    fn event(lsn: u64, kind: EventKind) -> Event {
        Event { at: Moment { lsn: Lsn(lsn), time_ns: lsn }, kind }
    }

    fn volume(size_bytes: u64) -> EventKind {
        let uuid = VolumeUuid([1; 16]);
        let record = VolumeRecord { uuid, size_bytes, sector_bytes: 512, present: true, name: "v".into() };
        EventKind::Volume(VolumeId(0), record)
    }

    fn begin(lsn: u64, reason: &str) -> Event {
        event(lsn, EventKind::ResyncBegin { reason: reason.into(), after: Moment::default() })
    }

    #[test]
    fn what_says_nothing_new_is_not_added() {
        let mut list = EventList::default();
        for lsn in 1..10 {
            list.add(event(lsn, volume(512)));
            list.add(begin(lsn, &format!("reason {lsn}")));
        }
        list.add(event(10, EventKind::ResyncEnd));
        list.add(event(11, EventKind::ResyncEnd));
        list.add(event(12, volume(1024)));
        let expected = [
            event(1, volume(512)),
            begin(1, "reason 9"),
            event(10, EventKind::ResyncEnd),
            event(12, volume(1024)),
        ];
        assert_eq!(&*list, &expected[..]);
    }

    #[test]
    fn notes_go_and_are_counted_bookmarks_last_and_structure_never() {
        let mut list = EventList::default();
        list.add(event(1, volume(512)));
        list.add(begin(2, "first"));
        list.add(event(3, EventKind::ResyncEnd));
        list.add(event(4, EventKind::Bookmark("first".into())));
        for lsn in 5..5 + 3 * MAX_NOTES as u64 {
            let kind = if lsn % 2 == 0 { EventKind::Failed(Lsn(lsn)) } else { EventKind::ClockJump(-1) };
            list.add(event(lsn, kind));
        }
        assert!(list.len() <= MAX_NOTES + NOTES_STEP + 3, "{}", list.len());
        assert!(list[..4].iter().map(|event| event.at.lsn.0).eq(1..=4), "{:?}", &list[..4]);
        assert_eq!(list.forgotten().bookmarks, 0);
        assert_eq!(list.forgotten().others + (list.len() - 4) as u64, 3 * MAX_NOTES as u64);
        for lsn in 0..2 * MAX_NOTES as u64 {
            list.add(event((1 << 20) + lsn, EventKind::Bookmark(format!("b{lsn}"))));
        }
        assert!(list.forgotten().bookmarks > 0);
        assert!(list[..3].iter().map(|event| event.at.lsn.0).eq(1..=3), "{:?}", &list[..3]);
        assert!(
            list.iter().all(|event| event.kind != EventKind::Bookmark("first".into())),
            "the oldest went"
        );
    }

    #[test]
    fn structure_has_a_limit_and_age_makes_room() {
        let mut list = EventList::default();
        for lsn in 1..=MAX_STRUCTURAL as u64 {
            assert!(list.has_room(1));
            list.add(event(lsn, volume(512 * lsn)));
        }
        assert!(!list.has_room(1));
        list.forget_before(Lsn(100));
        assert!(list.has_room(99) && !list.has_room(100), "the last record up to lsn 100 stays");
    }
}
