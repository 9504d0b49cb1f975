//! Points: which moments of a group can be had back, and what is asked for when one is wanted.
//!
//! A point is an lsn between the oldest boundary and the newest record received, outside of every gap. A gap
//! reaches from the last record before capture broke (or a resync began) to the `resync-end` that repaired
//! it, both exclusive at the front and the end: those two are points.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use journal::clock_step::ClockStep;
use journal::compress::Decoder;
use journal::frame::chain_seed;
use journal::record::{Record, Records, VolumeRecord};
use journal::{Epoch, GroupId, Lineage, Lsn, Position, VolumeId};
use serde::{Deserialize, Serialize};

use crate::doubt::doubts;
use crate::events::EventKind;
use crate::history::{History, Inner, Pin};
use crate::mend::Rotten;
use crate::state::{Found, Hold, Moment};
use crate::undo::damage;
use crate::{Error, ErrorKind, Result};

/// Failed writes and clock jumps listed one by one; a source with a queue that refuses often has thousands.
const MAX_SHOWN_NOTES: usize = 100;

/// Stretches of doubtful times that are listed, the newest.
const MAX_SHOWN_DOUBTS: usize = 20;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// The newest consistent point received.
    Latest,
    /// Right after this record.
    Lsn(Lsn),
    /// Right after the last record at or before this time, ns since 1970.
    Time(u64),
    /// Where the newest bookmark of this name stands.
    Bookmark(String),
    /// What others had left in the replicas, before they were overwritten by order; by its number.
    Found(u64),
}

impl FromStr for At {
    type Err = Error;

    /// Reads `latest`, `lsn:N`, `time:RFC3339`, `bookmark:NAME` and `found:N`.
    fn from_str(text: &str) -> Result<At> {
        let usage = |what: &str| {
            let at =
                format!("{text:?}: {what}; allowed: latest, lsn:N, time:RFC3339, bookmark:NAME, found:N");
            Error::new(ErrorKind::Usage, at)
        };
        match text.split_once(':') {
            None if text == "latest" => Ok(At::Latest),
            Some(("lsn", number)) => {
                number.parse().map(|lsn| At::Lsn(Lsn(lsn))).map_err(|_| usage("not a number"))
            }
            Some(("found", number)) => number.parse().map(At::Found).map_err(|_| usage("not a number")),
            Some(("time", time)) => {
                let time: Timestamp =
                    time.parse().map_err(|_| usage("not an RFC 3339 time with its offset"))?;
                let ns =
                    u64::try_from(time.as_nanosecond()).map_err(|_| usage("before 1970 or too far away"))?;
                Ok(At::Time(ns))
            }
            Some(("bookmark", name)) if !name.is_empty() => Ok(At::Bookmark(name.to_owned())),
            _ => Err(usage("not a point")),
        }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            At::Latest => f.write_str("latest"),
            At::Lsn(lsn) => write!(f, "lsn:{lsn}"),
            At::Time(ns) => write!(f, "time:{}", rfc3339(*ns)),
            At::Bookmark(name) => write!(f, "bookmark:{name}"),
            At::Found(number) => write!(f, "found:{number}"),
        }
    }
}

/// A time as it is shown: RFC 3339, UTC.
pub fn rfc3339(time_ns: u64) -> String {
    Timestamp::from_nanosecond(i128::from(time_ns))
        .map_or_else(|_| format!("{time_ns} ns"), |time| time.to_string())
}

/// A moment as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownMoment {
    /// Position in the group's order.
    pub lsn: Lsn,
    /// Source's clock, RFC 3339 UTC.
    pub time: String,
}

impl From<Moment> for ShownMoment {
    fn from(moment: Moment) -> ShownMoment {
        ShownMoment { lsn: moment.lsn, time: rfc3339(moment.time_ns) }
    }
}

/// A resolved point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// The last record that it holds.
    pub moment: Moment,
    /// The batch boundary at or below it.
    pub boundary: u64,
    /// Where that boundary is.
    pub boundary_lsn: Lsn,
}

/// A bookmark as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownBookmark {
    /// Its name; several may share one, the newest is found by it.
    pub name: String,
    /// Where it stands.
    pub lsn: Lsn,
    /// Source's clock, RFC 3339 UTC.
    pub time: String,
    /// Retention may not drop it (`afterimage hold`).
    pub held: bool,
}

/// A hold as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownHold {
    /// Name of the bookmark.
    pub name: String,
    /// Where it stands.
    pub lsn: Lsn,
    /// Source's clock, RFC 3339 UTC.
    pub time: String,
    /// When it was put under hold, this machine's clock, RFC 3339 UTC.
    pub since: String,
}

impl From<&Hold> for ShownHold {
    fn from(hold: &Hold) -> ShownHold {
        let Hold { name, at, since_ns } = hold;
        ShownHold { name: name.clone(), lsn: at.lsn, time: rfc3339(at.time_ns), since: rfc3339(*since_ns) }
    }
}

/// A gap as it is shown: no points between the two, which are points themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownGap {
    /// Last point before.
    pub from_lsn: Lsn,
    /// First point after; absent while the resync is under way.
    pub to_lsn: Option<Lsn>,
    /// Its time.
    pub from_time: String,
    /// Its time.
    pub to_time: Option<String>,
    /// Why.
    pub reason: String,
}

/// A history that ended, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownEnd {
    /// When, this machine's clock, RFC 3339 UTC.
    pub at: String,
    /// Why.
    pub why: String,
    /// Its oldest point.
    pub from_lsn: Lsn,
    /// Its newest.
    pub to_lsn: Lsn,
    /// Bookmarks under hold that ended with it.
    pub holds: u32,
    /// What its points are refused for, while it may come back.
    pub is_over: bool,
}

/// Content that others left in the replicas, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownFound {
    /// What a restore asks for: `found:N`.
    pub point: String,
    /// When its overwriting was ordered, this machine's clock, RFC 3339 UTC.
    pub at: String,
    /// What had been noticed.
    pub why: String,
}

/// Everything that can be had back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Points {
    /// Operator's name of the group.
    pub group: String,
    /// Its id.
    pub group_id: GroupId,
    /// Line of descent.
    pub lineage: Lineage,
    /// Epoch of the newest record.
    pub epoch: Epoch,
    /// Oldest point; absent while there is none.
    pub oldest: Option<ShownMoment>,
    /// Newest point.
    pub newest: Option<ShownMoment>,
    /// From here on every write is a point; below it only `steps` are.
    pub exact: Option<ShownMoment>,
    /// The points below `exact`, oldest first.
    pub steps: Vec<ShownMoment>,
    /// The replica is exactly this.
    pub checkpoint_lsn: Lsn,
    /// Batches whose boundary is a step back without redo.
    pub batches: u64,
    /// Bookmarks, oldest first.
    pub bookmarks: Vec<ShownBookmark>,
    /// Bookmarks under hold, oldest hold first: what keeps the history from being shortened.
    pub holds: Vec<ShownHold>,
    /// Stretches without points; while the last one is open, `newest` is the last consistent point before it.
    pub gaps: Vec<ShownGap>,
    /// Histories that ended, oldest first; the last one may only be in doubt.
    #[serde(default)]
    pub ended: Vec<ShownEnd>,
    /// What others had left in the replicas, and was overwritten by order.
    #[serde(default)]
    pub found: Vec<ShownFound>,
    /// What makes times or contents inexact, and why there is no point where there is none.
    pub warnings: Vec<String>,
}

/// A stretch without points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    after: Moment,
    until: Option<Moment>,
    reason: String,
}

impl Inner {
    /// Gaps that reach into the history, oldest first.
    pub(crate) fn gaps(&self) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = Vec::new();
        let mut open: Option<Gap> = None;
        for event in self.events.iter() {
            match &event.kind {
                EventKind::Epoch { after, .. } => {
                    let reason = "capture was interrupted".to_owned();
                    open.get_or_insert(Gap { after: *after, until: None, reason });
                }
                EventKind::ResyncBegin { reason, after } => {
                    let gap = open.get_or_insert(Gap { after: *after, until: None, reason: String::new() });
                    gap.reason.clone_from(reason);
                }
                EventKind::ResyncEnd => {
                    gaps.extend(open.take().map(|gap| Gap { until: Some(event.at), ..gap }));
                }
                _ => {}
            }
        }
        gaps.extend(self.rotten.iter().map(|rotten| self.lost(rotten)));
        gaps.sort_by_key(|gap| gap.after.lsn);
        gaps.extend(open);
        // Where others' content was found nothing of the source is a point, until the next synchronisation
        // has ended.
        for found in &self.state.seen.found {
            let after = Moment { lsn: Lsn(found.at.lsn.0.saturating_sub(1)), ..found.at };
            match gaps.iter_mut().find(|gap| gap.until.is_none_or(|until| until.lsn > found.at.lsn)) {
                Some(gap) if gap.after.lsn >= found.at.lsn => gap.after = after,
                Some(gap) if gap.holds(found.at.lsn) => {}
                _ => gaps.push(Gap { after, until: None, reason: found.why.clone() }),
            }
        }
        gaps.retain(|gap| gap.until.is_none_or(|until| until.lsn > self.state.history_start.lsn));
        gaps
    }

    /// The points below the exact window, in rising order.
    fn steps(&self, gaps: &[Gap]) -> Vec<Moment> {
        let Some(exact) = self.state.exact else { return Vec::new() };
        let kept = self.batches.range(..exact.batch).filter_map(|(_, slot)| slot.kept());
        let mut steps: Vec<Moment> = kept.map(|kept| kept.last).chain([self.state.history_start]).collect();
        steps.retain(|at| at.lsn < exact.start.lsn && !is_in_gap(gaps, at.lsn));
        steps.sort_unstable();
        steps.dedup_by_key(|at| at.lsn);
        steps
    }

    /// The points that need rotten frames: up to the next boundary, to which undo leads.
    fn lost(&self, rotten: &Rotten) -> Gap {
        let boundaries = self.batches.values().filter_map(|slot| slot.kept().map(|summary| summary.last));
        let above = boundaries.chain([self.state.checkpoint_moment()]).filter(|at| at.lsn >= rotten.last);
        Gap { after: rotten.before, until: above.min(), reason: rotten.why() }
    }

    /// What others left, as far as the undo of its overwriting is kept.
    fn found(&self) -> impl Iterator<Item = &Found> {
        let oldest = self.state.oldest_batch;
        self.state.seen.found.iter().filter(move |found| oldest != 0 && found.batch + 1 >= oldest)
    }

    fn shown_ends(&self) -> Vec<ShownEnd> {
        let state = &self.state;
        let mut ends: Vec<ShownEnd> = state
            .seen
            .ended
            .iter()
            .map(|end| ShownEnd {
                at: rfc3339(end.at_ns),
                why: end.why.clone(),
                from_lsn: end.from,
                to_lsn: end.to,
                holds: end.holds,
                is_over: true,
            })
            .collect();
        if let Some(changed) = state.seen.changed.as_ref().filter(|_| state.oldest_batch != 0) {
            ends.push(ShownEnd {
                at: rfc3339(changed.since_ns),
                why: changed.why.clone(),
                from_lsn: state.history_start.lsn,
                to_lsn: state.checkpoint.lsn,
                holds: u32::try_from(state.wishes.holds.len()).unwrap_or(u32::MAX),
                is_over: false,
            });
        }
        ends
    }

    fn why_no_point(&self) -> String {
        let changed = self.state.changed_words();
        match changed.as_ref().or(self.state.needs_resync.as_ref()) {
            Some(why) => format!("no recovery point that can be used: {why}"),
            None if !self.state.seen.ended.is_empty() => {
                "no recovery point yet: its history ended, and the next synchronisation is not complete"
                    .to_owned()
            }
            None => "no recovery point yet: the first synchronisation is not complete".to_owned(),
        }
    }

    /// Oldest and newest point, `None` while there is no history.
    fn window(&self, gaps: &[Gap]) -> Option<(Moment, Moment)> {
        // Undo laid over a replica that others changed would give anything but the points.
        let state = &self.state;
        if state.oldest_batch == 0 || state.needs_resync.is_some() || state.seen.changed.is_some() {
            return None;
        }
        let mut oldest = self.state.history_start;
        if self.state.exact.is_some() {
            oldest = self.steps(gaps).first().copied().unwrap_or(self.state.exact_start().start);
        }
        if let Some(gap) = gaps.iter().find(|gap| gap.holds(oldest.lsn)) {
            oldest = gap.until?;
        }
        let open = gaps.iter().filter(|gap| gap.until.is_none()).map(|gap| gap.after);
        let newest = open.min_by_key(|after| after.lsn).unwrap_or(self.received);
        (oldest.lsn <= newest.lsn).then_some((oldest, newest))
    }
}

impl Gap {
    fn holds(&self, lsn: Lsn) -> bool {
        self.after.lsn < lsn && self.until.is_none_or(|until| lsn < until.lsn)
    }

    fn nearest(&self) -> String {
        let before = format!("lsn {} at {}", self.after.lsn, rfc3339(self.after.time_ns));
        match self.until {
            Some(until) => format!("{before}, and lsn {} at {}", until.lsn, rfc3339(until.time_ns)),
            None => before,
        }
    }
}

fn not_possible(what: impl fmt::Display) -> Error {
    Error::new(ErrorKind::NotPossible, what.to_string())
}

impl History {
    /// Says which point is meant.
    ///
    /// # Errors
    /// [`ErrorKind::NotPossible`], naming the nearest points: outside the window, inside a gap, an unknown
    /// bookmark, a time that nothing received so far can vouch for. [`ErrorKind::Corrupt`] for damage on the
    /// way.
    pub fn resolve(&self, at: &At) -> Result<Point> {
        if let At::Found(number) = at {
            return self.find_found(*number);
        }
        let (gaps, window, name, why) = {
            let inner = self.lock();
            let gaps = inner.gaps();
            let window = inner.window(&gaps);
            (gaps, window, inner.state.name.clone(), inner.why_no_point())
        };
        let Some((oldest, newest)) = window else {
            return Err(not_possible(format!("group {name} has {why}")));
        };
        let (steps, exact) = {
            let inner = self.lock();
            (inner.steps(&gaps), inner.state.exact_start().start)
        };
        if let At::Time(time_ns) = at {
            // By the stream alone it might be what the disk held before, or after.
            let doubts = doubts(&self.lock().events);
            if let Some(doubt) = doubts.iter().find(|doubt| doubt.holds(*time_ns)) {
                return Err(not_possible(format!("{at} is no certain point: {doubt}")));
            }
        }
        let span = format!(
            "points reach from lsn {} at {} to lsn {} at {}",
            oldest.lsn,
            rfc3339(oldest.time_ns),
            newest.lsn,
            rfc3339(newest.time_ns)
        );
        let lsn = match at {
            At::Latest => newest.lsn,
            At::Lsn(lsn) => *lsn,
            At::Bookmark(bookmark) => self.find_bookmark(bookmark)?,
            At::Time(time_ns) if *time_ns < exact.time_ns && !steps.is_empty() => {
                let step = steps.iter().find(|step| step.time_ns == *time_ns);
                step.ok_or_else(|| no_step(at, exact, &steps, |step| step.time_ns <= *time_ns))?.lsn
            }
            At::Time(time_ns) => self.find_time(*time_ns, oldest, newest, &gaps, &span)?,
            At::Found(number) => return self.find_found(*number),
        };
        if lsn < oldest.lsn || lsn > newest.lsn {
            // A gap that is still open is the better reason than the window that ends at it.
            if let Some(gap) = gaps.iter().find(|gap| gap.holds(lsn) && lsn <= self.received().lsn) {
                return Err(gap_error(at, gap));
            }
            return Err(not_possible(format!("{at} is outside the history: {span}")));
        }
        if let Some(gap) = gaps.iter().find(|gap| gap.holds(lsn)) {
            return Err(gap_error(at, gap));
        }
        if lsn < exact.lsn && !steps.iter().any(|step| step.lsn == lsn) {
            return Err(no_step(at, exact, &steps, |step| step.lsn <= lsn));
        }
        let boundary = {
            let inner = self.lock();
            inner.boundary_below(lsn).and_then(|number| Some((number, inner.boundary(number)?)))
        };
        let (boundary, at) =
            boundary.ok_or_else(|| not_possible(format!("lsn {lsn} has just left the history")))?;
        // A boundary is known without its record, which may be rotten.
        let moment = match [oldest, newest, at].into_iter().find(|known| known.lsn == lsn) {
            Some(known) => known,
            None => self.find_lsn(lsn)?,
        };
        Ok(Point { moment, boundary, boundary_lsn: at.lsn })
    }

    /// Resolves a point and keeps it reachable.
    ///
    /// # Errors
    /// As [`History::resolve`].
    pub fn resolve_pinned(self: &Arc<Self>, at: &At) -> Result<(Point, Pin)> {
        let point = self.resolve(at)?;
        let pin = self.pin_point(&point)?;
        Ok((point, pin))
    }

    /// What others left, at its boundary.
    fn find_found(&self, number: u64) -> Result<Point> {
        let inner = self.lock();
        if let Some(why) = inner.state.changed_words() {
            return Err(not_possible(why));
        }
        let known = inner.found().find(|found| found.batch == number);
        let boundary = known.and_then(|found| Some((found, inner.boundary(number)?)));
        let Some((found, at)) = boundary else {
            let known: Vec<String> = inner.found().map(|found| format!("found:{}", found.batch)).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(not_possible(format!("no content found:{number} in the history; there: {known}")));
        };
        Ok(Point { moment: Moment { lsn: at.lsn, ..found.at }, boundary: number, boundary_lsn: at.lsn })
    }

    fn find_bookmark(&self, name: &str) -> Result<Lsn> {
        let inner = self.lock();
        let held = inner.state.wishes.holds.iter().find(|hold| hold.name == name).map(|hold| hold.at.lsn);
        let mut known: Vec<&str> = Vec::new();
        for event in inner.events.iter().rev() {
            if let EventKind::Bookmark(bookmark) = &event.kind {
                if bookmark == name {
                    return Ok(event.at.lsn);
                }
                if known.len() < 10 && !known.contains(&bookmark.as_str()) {
                    known.push(bookmark);
                }
            }
        }
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        // One under hold outlives the list of bookmarks, which is bounded.
        let unknown =
            || not_possible(format!("no bookmark {name:?} in the history; newest bookmarks: {known}"));
        held.ok_or_else(unknown)
    }

    fn find_time(
        &self,
        time_ns: u64,
        oldest: Moment,
        newest: Moment,
        gaps: &[Gap],
        span: &str,
    ) -> Result<Lsn> {
        let at = At::Time(time_ns);
        if time_ns < oldest.time_ns {
            return Err(not_possible(format!("{at} is before the history: {span}")));
        }
        if let Some(gap) = gaps
            .iter()
            .find(|gap| gap.after.time_ns < time_ns && gap.until.is_none_or(|until| time_ns < until.time_ns))
        {
            return Err(gap_error(&at, gap));
        }
        if time_ns >= newest.time_ns {
            // Only a heartbeat can vouch that nothing was written since the newest record.
            let heartbeat = self.lock().state.heartbeat.filter(|heartbeat| heartbeat.lsn <= newest.lsn);
            let known_ns = heartbeat.map_or(0, |heartbeat| heartbeat.time_ns).max(newest.time_ns);
            if time_ns > known_ns {
                return Err(not_possible(format!("{at} is beyond what was received: {span}")));
            }
            return Ok(newest.lsn);
        }
        // The first frame that ends after the time; the record sought is in it, or is the one before it.
        let mut reader = self.reader()?;
        reader.seek_time(time_ns.saturating_add(1)).map_err(damage)?;
        let mut frame = Vec::new();
        let Some(header) = reader.next(&mut frame, self.limit()).map_err(damage)? else {
            return Ok(newest.lsn);
        };
        let mut raw = Vec::new();
        Decoder::new()?.decode(&header, &frame, &mut raw).map_err(damage)?;
        let mut found = None;
        for located in Records::of(&header, &raw) {
            let Record { lsn, time_ns: at_ns, .. } = located.map_err(damage)?.record;
            if at_ns <= time_ns {
                found = Some(lsn);
            }
        }
        let before_frame = || match gaps.iter().rev().find(|gap| gap.holds(header.first_lsn)) {
            Some(gap) => gap.after.lsn,
            None => Lsn(header.first_lsn.0 - 1),
        };
        Ok(found.unwrap_or_else(before_frame).max(oldest.lsn))
    }

    fn find_lsn(&self, lsn: Lsn) -> Result<Moment> {
        let mut reader = self.reader()?;
        reader.seek_lsn(lsn).map_err(damage)?;
        let mut frame = Vec::new();
        let header = reader.next(&mut frame, self.limit()).map_err(damage)?;
        if let Some(header) = header.filter(|header| header.first_lsn <= lsn && lsn <= header.last_lsn) {
            let mut raw = Vec::new();
            Decoder::new()?.decode(&header, &frame, &mut raw).map_err(damage)?;
            for located in Records::of(&header, &raw) {
                let record = located.map_err(damage)?.record;
                if record.lsn == lsn {
                    return Ok(Moment { lsn, time_ns: record.time_ns });
                }
            }
        }
        Err(Error::corrupt(format!(
            "journal of group {}: lsn {lsn} is not held, though it should be",
            self.group()
        )))
    }

    /// Epoch and chain of a point, which a checkpoint there must name.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the journal does not hold what it should.
    pub(crate) fn position_at(&self, lsn: Lsn) -> Result<Position> {
        let mut reader = self.reader()?;
        let oldest = reader.oldest();
        if oldest.lsn == lsn {
            // Its own record may be dropped; what follows joins it, unless it begins an epoch.
            let begins = oldest.chain == chain_seed(oldest.lineage, oldest.epoch);
            let before = Epoch { number: oldest.epoch.number.saturating_sub(1), ..Epoch::default() };
            return Ok(if begins { Position { epoch: before, ..oldest } } else { oldest });
        }
        reader.seek_lsn(lsn).map_err(damage)?;
        let header = reader.next(&mut Vec::new(), self.limit()).map_err(damage)?;
        let held = header.filter(|header| header.first_lsn <= lsn && lsn <= header.last_lsn);
        let header = held.ok_or_else(|| {
            let group = self.group();
            Error::corrupt(format!("journal of group {group}: lsn {lsn} is not held, though it should be"))
        })?;
        Ok(Position { lsn, ..header.position() })
    }

    /// Size of a volume at a point: 0 where it did not exist yet, `None` where nothing tells.
    pub(crate) fn size_at(&self, volume: VolumeId, lsn: Lsn) -> Option<u64> {
        let inner = self.lock();
        let records = inner.events.iter().filter_map(|event| match &event.kind {
            EventKind::Volume(id, record) if *id == volume => Some((event.at.lsn, record)),
            _ => None,
        });
        let (before, after): (Vec<_>, Vec<_>) = records.partition(|(at, _)| *at <= lsn);
        let size = |(_, record): &(Lsn, &VolumeRecord)| record.present.then_some(record.size_bytes);
        if before.is_empty() {
            return Some(0);
        }
        // Of one that had left, and came back later, only what it came back with is known.
        before.iter().rev().find_map(size).or_else(|| after.iter().find_map(size))
    }

    /// Lists what can be had back.
    pub fn points(&self) -> Points {
        let inner = self.lock();
        let gaps = inner.gaps();
        let window = inner.window(&gaps);
        let mut bookmarks = Vec::new();
        let mut warnings = Vec::new();
        for event in inner.events.iter() {
            let (lsn, time) = (event.at.lsn, rfc3339(event.at.time_ns));
            match &event.kind {
                EventKind::Bookmark(name) => {
                    let holds = &inner.state.wishes.holds;
                    let held = holds.iter().any(|hold| hold.at.lsn == lsn && hold.name == *name);
                    bookmarks.push(ShownBookmark { name: name.clone(), lsn, time, held });
                }
                EventKind::ClockJump(by_ns) | EventKind::ClockStep(ClockStep { by_ns, .. }) => {
                    let by_ms = by_ns / 1_000_000;
                    warnings.push(format!(
                        "the source's clock jumped by {by_ms} ms at lsn {lsn} ({time}): times around it are inexact"
                    ));
                }
                EventKind::Failed(failed) => warnings.push(format!(
                    "the write of lsn {failed} failed at the source: points from it on are inexact there until it is repaired"
                )),
                _ => {}
            }
        }
        let hidden = warnings.len().saturating_sub(MAX_SHOWN_NOTES);
        if hidden > 0 {
            warnings.drain(..hidden);
            warnings.push(format!("{hidden} older failed writes and clock jumps are not listed"));
        }
        let (steps, exact) = (inner.steps(&gaps), inner.state.exact_start().start);
        if let Some((oldest, _)) = window {
            let is_point = |lsn| lsn >= exact.lsn || steps.iter().any(|step| step.lsn == lsn);
            bookmarks.retain(|bookmark| bookmark.lsn >= oldest.lsn && is_point(bookmark.lsn));
        } else {
            warnings.push(inner.why_no_point());
        }
        warnings.extend(inner.batches.values().filter_map(|slot| match slot {
            crate::history::Slot::Damaged(at) => {
                Some(format!("damaged undo, points below it are lost: {at}"))
            }
            crate::history::Slot::Kept(_) => None,
        }));
        if let Some(why) = &inner.damage {
            let at = inner.received.lsn;
            warnings
                .push(format!("what was received above lsn {at} cannot be read, and holds no points: {why}"));
        }
        let doubts = doubts(&inner.events);
        let shown = doubts.iter().rev().take(MAX_SHOWN_DOUBTS).rev();
        warnings.extend(shown.map(|doubt| format!("`time:` is refused there: {doubt}")));
        let forgotten = inner.events.forgotten();
        if forgotten.bookmarks + forgotten.others > 0 {
            warnings.push(format!(
                "too many to keep: {} bookmarks, {} failed writes and clock jumps are not shown",
                forgotten.bookmarks, forgotten.others
            ));
        }
        let shown = |gap: &Gap| ShownGap {
            from_lsn: gap.after.lsn,
            to_lsn: gap.until.map(|until| until.lsn),
            from_time: rfc3339(gap.after.time_ns),
            to_time: gap.until.map(|until| rfc3339(until.time_ns)),
            reason: gap.reason.clone(),
        };
        Points {
            group: inner.state.name.clone(),
            group_id: inner.state.group,
            lineage: inner.state.lineage,
            epoch: inner.received_epoch,
            oldest: window.map(|(oldest, _)| oldest.into()),
            newest: window.map(|(_, newest)| newest.into()),
            exact: window.map(|(oldest, _)| exact.max(oldest).into()),
            steps: if window.is_some() {
                steps.into_iter().map(ShownMoment::from).collect()
            } else {
                Vec::new()
            },
            checkpoint_lsn: inner.state.checkpoint.lsn,
            batches: inner.batches.len() as u64,
            bookmarks,
            holds: inner.state.wishes.holds.iter().map(ShownHold::from).collect(),
            gaps: if window.is_some() { gaps.iter().map(shown).collect() } else { Vec::new() },
            ended: inner.shown_ends(),
            found: inner
                .found()
                .map(|found| ShownFound {
                    point: format!("found:{}", found.batch),
                    at: rfc3339(found.since_ns),
                    why: found.why.clone(),
                })
                .collect(),
            warnings,
        }
    }

    /// The volumes that exist at a point: id, name and size.
    pub fn volumes_at(&self, lsn: Lsn) -> Vec<(VolumeId, String, u64)> {
        let inner = self.lock();
        let mut volumes = std::collections::BTreeMap::new();
        for event in inner.events.iter().take_while(|event| event.at.lsn <= lsn) {
            if let EventKind::Volume(id, record) = &event.kind {
                if record.present {
                    volumes.insert(*id, (record.name.clone(), record.size_bytes));
                } else {
                    volumes.remove(id);
                }
            }
        }
        volumes.into_iter().map(|(id, (name, size_bytes))| (id, name, size_bytes)).collect()
    }
}

/// Whether a gap leaves out an lsn.
pub(crate) fn is_in_gap(gaps: &[Gap], lsn: Lsn) -> bool {
    gaps.iter().any(|gap| gap.holds(lsn))
}

/// Something below the exact window that is not one of its points.
fn no_step(at: &At, exact: Moment, steps: &[Moment], is_below: impl Fn(&Moment) -> bool) -> Error {
    let shown = |step: &Moment| format!("lsn {} at {}", step.lsn, rfc3339(step.time_ns));
    let above = steps.partition_point(is_below);
    let below = above.checked_sub(1).map(|at| shown(&steps[at]));
    let nearest = below.into_iter().chain([steps.get(above).map_or_else(|| shown(&exact), shown)]);
    not_possible(format!(
        "{at} is older than the exact window, which begins with {}: below it only single points are kept; nearest points: {}",
        shown(&exact),
        nearest.collect::<Vec<_>>().join(", and ")
    ))
}

fn gap_error(at: &At, gap: &Gap) -> Error {
    not_possible(format!("{at} is inside a gap ({}); nearest points: {}", gap.reason, gap.nearest()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_prints_and_nothing_else() {
        for text in ["latest", "lsn:42", "time:2026-11-22T10:00:00.5Z", "bookmark:before upgrade: 2"] {
            assert_eq!(text.parse::<At>().unwrap().to_string(), text);
        }
        assert_eq!("time:1970-01-01T01:00:01+01:00".parse::<At>().unwrap(), At::Time(1_000_000_000));
        for text in
            ["", "lsn:", "lsn:-1", "time:yesterday", "time:1969-01-01T00:00:00Z", "bookmark:", "oldest"]
        {
            assert_eq!(text.parse::<At>().unwrap_err().kind, ErrorKind::Usage, "{text}");
        }
    }
}
