//! Whether a disk is the one that the last run served, and holds what that run left. What nobody saw is not
//! believed.
//!
//! | verdict | then |
//! |---|---|
//! | same | go on in the epoch; unfinished writes are redone |
//! | tail | the same, and the content is compared in the background: the last write may have been another's |
//! | doubt | go on in the epoch; nothing is redone (its ranges are read again), and the content is compared in the background |
//! | other | nothing is redone; a new epoch, which compares everything before it offers a point |
//!
//! After a clean stop everything was durable when the mark was taken, and the state file keeps it. After a
//! kill our own writes have moved the times of the disk. What the dead run could have done is bounded by the
//! marks that it kept in the ring's memory while it lived ([`crate::alive`]): a file that was changed last
//! while that run was seen alive was changed by nobody since. One that was changed later than any sign of
//! life was changed by others.
//!
//! A block device that is no loop device has no such time. Unless the dead run had been idle, nothing proves
//! it unchanged.

use machine::disk::{Continuity, DiskIdentity, Same, Unchanged};

use crate::alive::Alive;

/// A run that lives says so at least this often, unless the machine is very busy: a change within it is its
/// own last write …
const TAIL_NS: u64 = 300_000_000;
/// … and within this may be: the machine was busy, or the disk wrote back what it had cached.
const BUSY_NS: u64 = 10_000_000_000;
/// How far the clock may have been set back by discipline alone: this, and a thousandth of the time since.
const SLEW_NS: u64 = 200_000_000;

/// What is known of a disk at a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Proven to be unchanged.
    Same,
    /// Unchanged up to the last moments of the dead run.
    Tail(String),
    /// Not proven, and why.
    Doubt(String),
    /// Changed, or another disk, and how that shows.
    Other(String),
}

impl Verdict {
    /// Whether writes of the dead run may be finished on it.
    pub fn lets_redo(&self) -> bool {
        matches!(self, Verdict::Same | Verdict::Tail(_))
    }
}

/// Whether it is the disk that was served.
pub(crate) fn is_it(then: Option<&DiskIdentity>, now: Option<&DiskIdentity>) -> Verdict {
    let (Some(then), Some(now)) = (then, now) else {
        return Verdict::Doubt("nothing tells whether it is the disk that was served".to_owned());
    };
    match then.compare(now) {
        Same::Yes => Verdict::Same,
        Same::No => Verdict::Other("another disk took the place of the one served".to_owned()),
        Same::Unknown => Verdict::Doubt("nothing proves that it is the disk that was served".to_owned()),
    }
}

/// After a clean stop.
pub(crate) fn since_stop(then: Option<&Continuity>, now: Option<&Continuity>) -> Verdict {
    let (Some(then), Some(now)) = (then, now) else {
        return Verdict::Doubt("nothing was remembered of it".to_owned());
    };
    match then.until(now) {
        Unchanged::Proven => Verdict::Same,
        Unchanged::Unknown(why) => Verdict::Doubt(why),
        Unchanged::Changed(how) => Verdict::Other(how),
    }
}

/// How a dead run ended.
pub(crate) struct Ended<'a> {
    /// What it said while it lived.
    pub alive: Option<&'a Alive>,
    /// Nothing was begun after its last quiet moment.
    pub was_quiet: bool,
    /// Realtime less time since boot, now, ns: moves when the clock is set.
    pub clock_offset_ns: i128,
    /// Time since boot, ns.
    pub boot_ns: u64,
}

/// After a kill.
pub(crate) fn since_kill(ended: &Ended<'_>, volume: u32, now: Option<&Continuity>) -> Verdict {
    let doubt = |why: &str| Verdict::Doubt(why.to_owned());
    let (Some(alive), Some(now)) = (ended.alive, now) else {
        return doubt("the last run left no mark of it");
    };
    let is_file = now.times.is_some() && now.counters.is_none();
    if ended.was_quiet
        && let Some(then) = alive.mark_of(volume)
    {
        match then.until(now) {
            Unchanged::Proven => return Verdict::Same,
            Unchanged::Changed(how) if is_file => return Verdict::Other(how),
            // A device may have written back what it had cached since.
            Unchanged::Changed(how) if now.times.is_none() => return Verdict::Doubt(how),
            Unchanged::Unknown(why) => return Verdict::Doubt(why),
            Unchanged::Changed(_) => {}
        }
    }
    let Some(times) = now.times else {
        return doubt("the agent was killed while it was written to, and no device tells who wrote last");
    };
    if times.is_remote {
        return doubt("its times are another machine's");
    }
    let passed_ns = ended.boot_ns.saturating_sub(alive.boot_ns);
    if alive.clock_offset_ns - ended.clock_offset_ns > i128::from(SLEW_NS + passed_ns / 1000) {
        return doubt("the clock was set back since the agent was killed");
    }
    let later = |ns: u64| ns.saturating_sub(alive.alive_ns);
    let changed = later(times.changed_ns.max(times.modified_ns));
    match changed {
        0 => Verdict::Same,
        _ if changed <= TAIL_NS => {
            Verdict::Tail("it was written to in the last moments of the agent that was killed".to_owned())
        }
        _ if changed <= BUSY_NS || !is_file => {
            doubt("it was written to after the last sign of life of the agent that was killed")
        }
        _ if later(times.modified_ns) <= BUSY_NS => {
            doubt("its change time moved: its name, its owner or its content was changed")
        }
        _ => Verdict::Other("it was written to after the agent was killed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::disk::continuity::{Counters, Times};

    const SECOND: u64 = 1_000_000_000;

    fn file(at_ns: u64) -> Continuity {
        let times = Some(Times { modified_ns: at_ns, changed_ns: at_ns, is_remote: false, is_shared: false });
        Continuity { boot: [1; 16], size_bytes: 512, ends: None, times, counters: None }
    }

    fn device(own: u64) -> Continuity {
        let counters = Some(Counters { sequence: 1, own: [own, 0], direct: [0; 2] });
        Continuity { times: None, counters, ..file(0) }
    }

    fn looped(at_ns: u64) -> Continuity {
        Continuity { counters: device(1).counters, ..file(at_ns) }
    }

    fn alive(mark: Continuity) -> Alive {
        Alive { alive_ns: 100 * SECOND, boot_ns: 50 * SECOND, marks: vec![(7, mark)], ..Alive::default() }
    }

    fn judged(alive: &Alive, was_quiet: bool, now: &Continuity) -> Verdict {
        let ended = Ended { alive: Some(alive), was_quiet, clock_offset_ns: 0, boot_ns: 60 * SECOND };
        since_kill(&ended, 7, Some(now))
    }

    #[test]
    fn a_file_was_changed_by_us_or_by_others() {
        let alive = alive(file(99 * SECOND));
        assert_eq!(judged(&alive, true, &file(99 * SECOND)), Verdict::Same);
        assert!(matches!(judged(&alive, true, &file(99 * SECOND + 1)), Verdict::Other(_)));
        // Killed while it was written to.
        let end = |now_ns| judged(&alive, false, &file(now_ns));
        assert_eq!(end(100 * SECOND), Verdict::Same, "while the run was seen alive");
        assert!(matches!(end(100 * SECOND + TAIL_NS), Verdict::Tail(_)));
        assert!(matches!(end(100 * SECOND + TAIL_NS + 1), Verdict::Doubt(_)));
        assert!(matches!(end(100 * SECOND + BUSY_NS + 1), Verdict::Other(_)));
        let renamed = Times { changed_ns: 200 * SECOND, ..file(100 * SECOND).times.unwrap() };
        let renamed = Continuity { times: Some(renamed), ..file(0) };
        assert!(matches!(judged(&alive, false, &renamed), Verdict::Doubt(_)));
        assert!(!end(100 * SECOND + TAIL_NS + 1).lets_redo() && end(100 * SECOND).lets_redo());
    }

    #[test]
    fn what_proves_nothing_is_a_doubt() {
        let of_file = alive(file(99 * SECOND));
        let set_back = Ended {
            alive: Some(&of_file),
            was_quiet: false,
            clock_offset_ns: -i128::from(SECOND),
            boot_ns: 60 * SECOND,
        };
        assert!(matches!(since_kill(&set_back, 7, Some(&file(99 * SECOND))), Verdict::Doubt(_)));
        let unseen = Ended { alive: None, ..set_back };
        assert!(matches!(since_kill(&unseen, 7, Some(&file(99 * SECOND))), Verdict::Doubt(_)));
        let mut remote = file(99 * SECOND);
        if let Some(times) = &mut remote.times {
            times.is_remote = true;
        }
        assert!(matches!(judged(&of_file, false, &remote), Verdict::Doubt(_)));
        let of_device = alive(device(5));
        assert_eq!(judged(&of_device, true, &device(5)), Verdict::Same);
        assert!(matches!(judged(&of_device, true, &device(6)), Verdict::Doubt(_)));
        assert!(matches!(judged(&of_device, false, &device(5)), Verdict::Doubt(_)));
    }

    #[test]
    fn a_loop_device_writes_back_late() {
        let alive = alive(looped(90 * SECOND));
        assert_eq!(judged(&alive, true, &looped(90 * SECOND)), Verdict::Same);
        assert_eq!(judged(&alive, true, &looped(95 * SECOND)), Verdict::Same, "written back while we lived");
        assert!(matches!(judged(&alive, true, &looped(101 * SECOND)), Verdict::Doubt(_)));
        assert!(matches!(judged(&alive, true, &looped(500 * SECOND)), Verdict::Doubt(_)));
    }

    #[test]
    fn another_disk_is_never_taken_for_the_one_served() {
        let (a, b) = (DiskIdentity::Simulated(1), DiskIdentity::Simulated(2));
        assert_eq!(is_it(Some(&a), Some(&a)), Verdict::Same);
        assert!(matches!(is_it(Some(&a), Some(&b)), Verdict::Other(_)));
        assert!(matches!(is_it(None, Some(&b)), Verdict::Doubt(_)));
        assert!(matches!(since_stop(None, Some(&file(1))), Verdict::Doubt(_)));
    }
}
