//! When the journal takes no frames: what is captured and not journaled becomes dirty bits, in proportion.
//!
//! No room (quota, full disk) is left by itself: the frames that are journaled stay and are sent,
//! acknowledged ones make room, and then the lsns that were given up get their places in the stream, as the
//! beginning of a gap without content, so that the epoch goes on. What is dirty is synchronised afterwards
//! like after an overflow. A journal that failed is followed by a new epoch (`epoch`), in a journal that is
//! opened anew.
//!
//! Order of giving up: 1 writes only set bits; 2 it is durable that records may go that no journal holds; 3
//! each record's range is dirty; 4 its room is given back. So a new owner of the ring finds bits for all that
//! it misses. Where step 2 has no room either, on a full disk, it is tried again and the ring keeps what it
//! holds: clients set bits meanwhile, and feel nothing.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use journal::record::{Op, Record};
use journal::{Extent, Lsn, VolumeId};
use kfilter::RecordRef;
use kfilter::dirty::CAUSE_QUOTA;

use super::records::{shortened, void};
use super::{Appended, Pipeline, Shared};
use crate::clock::now_ns;
use crate::error::{Result, describe, is_full};
use crate::state::Gap;
use crate::status::State;

/// How often it is tried again.
const TRY: Duration = Duration::from_millis(100);
/// The same while a disk is full: nobody tells when that changes.
const TRY_DISK: Duration = Duration::from_secs(3);
/// A part of the quota that must be free before it goes on, lest it ends again at once.
const FREE: u64 = 4;

/// While there is no room.
pub(super) struct Shortage {
    why: String,
    /// Newest record that was given up, and its time.
    last: Lsn,
    time_ns: u64,
    tried: Instant,
    pause: Duration,
    /// Step 2 is done.
    remembered: bool,
}

impl Shortage {
    /// Whether records have to stay where they are.
    pub(super) fn keeps_records(&self) -> bool {
        !self.remembered
    }
}

/// Turns a record that no journal will hold into dirty bits.
///
/// # Errors
/// The bits cannot be set: the record must stay.
pub(super) fn give_up_record(
    shared: &Shared,
    shortage: &mut Option<Shortage>,
    record: &RecordRef<'_>,
) -> Result<()> {
    if record.op().touches_extent() {
        shared.ring.mark(record.volume(), record.offset()..record.offset() + record.length())?;
    }
    match record.op() {
        // The bits that a slot stands for are pending still; they may not be cleared by this one.
        kfilter::Op::SyncSlot if record.payload().is_empty() => shared.map.lock().abandon(),
        kfilter::Op::SyncSlot => {
            shared.ring.mark(record.volume(), record.offset()..record.offset() + record.length())?;
        }
        // Somebody began before they heard of it.
        kfilter::Op::ResyncBegin => shared.ring.set_mode_bitmap(CAUSE_QUOTA)?,
        _ => {}
    }
    if let Some(shortage) = shortage {
        shortage.last = Lsn(record.lsn());
        shortage.time_ns = shortage.time_ns.max(record.time_ns());
    }
    Ok(())
}

impl Pipeline {
    /// There is no room for frames now: see the module.
    pub(super) fn run_short(&mut self, why: &str) -> Result<()> {
        let why = format!("{why}; writes are kept as dirty ranges and synchronised when there is room again");
        // Before the ring shows a gap: nobody shall try to repair it yet.
        self.shared.health.short(&why);
        self.shared.ring.set_mode_bitmap(CAUSE_QUOTA)?;
        let remembered = self.remember(true)?;
        self.shared.map.lock().abandon();
        self.forget_batches();
        // Records in batches are still in the ring: they are met again, and given up one by one.
        self.tap.rewind();
        self.shared.board.change(State::Degraded, why.as_str());
        let pause = if why.contains("quota") { TRY } else { TRY_DISK };
        let (last, time_ns) = (self.journaled.lsn, 0);
        self.shortage = Some(Shortage { why, last, time_ns, tried: machine::now(), pause, remembered });
        Ok(())
    }

    /// Makes it durable whether records may be missing that no journal holds; false where the disk has no
    /// room for that.
    fn remember(&self, given_up: bool) -> Result<bool> {
        let mut file = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if file.get().given_up == given_up {
            return Ok(true);
        }
        match file.update(|state| state.given_up = given_up) {
            Ok(()) => Ok(true),
            Err(error) if is_full(&error) => {
                tracing::warn!(error = describe(&error), "the state file has no room now; it is tried again");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// A dead owner has given up records that the journal has no place for yet.
    pub(super) fn take_over_shortage(&mut self) -> Result<()> {
        let held = Lsn(self.shared.ring.first_held_lsn().saturating_sub(1));
        if self.is_broken() || !self.shared.remembered.get().given_up {
            return Ok(());
        }
        self.run_short("the last run had no room in the source journal")?;
        // Which records it gave up nobody knows.
        for volume in &self.shared.remembered.get().volumes {
            self.translator.forget(volume.id.0);
        }
        if let Some(shortage) = &mut self.shortage {
            (shortage.last, shortage.time_ns) = (held.max(self.journaled.lsn), now_ns());
        }
        Ok(())
    }

    /// Whether there is room again: then what was given up gets its places, and capture goes on.
    pub(super) fn mend_shortage(&mut self) -> Result<()> {
        let Some(shortage) = &mut self.shortage else { return Ok(()) };
        if machine::since(shortage.tried) < shortage.pause
            || self.shared.stop.load(std::sync::atomic::Ordering::Acquire)
        {
            return Ok(());
        }
        shortage.tried = machine::now();
        if shortage.keeps_records() {
            let remembered = self.remember(true)?;
            let Some(shortage) = &mut self.shortage else { return Ok(()) };
            shortage.remembered = remembered;
            // What the ring holds is given up first, or journaled at the next try.
            return Ok(());
        }
        let (last, time_ns, why) = (shortage.last, shortage.time_ns, shortage.why.clone());
        match self.make_room(self.settings.quota_bytes / FREE) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => return self.give_up(&super::told("old segments cannot be dropped", &error)),
        }
        while self.journaled.lsn < last {
            match self.fill(last, time_ns, &why)? {
                Appended::Done => {}
                Appended::NoRoom(_) => return Ok(()),
                Appended::Broken(why) => return self.give_up(&why),
            }
        }
        if !self.remember(false)? {
            return Ok(());
        }
        self.shortage = None;
        tracing::info!("the source journal has room again");
        self.shared.health.good();
        Ok(())
    }

    /// One frame of places for what was given up: a gap begins, and nothing is in it.
    fn fill(&mut self, last: Lsn, time_ns: u64, why: &str) -> Result<Appended> {
        let mut lsn = self.journaled.lsn.next();
        let record =
            |op, lsn| Record { op, flags: 0, volume: VolumeId(0), lsn, time_ns, extent: Extent::default() };
        self.batch.clear();
        self.batch.push(&self.shared.begin(record(Op::ResyncBegin, lsn)), shortened(why).as_bytes());
        while lsn < last && self.batch.raw().len() < self.settings.max_bytes / 2 {
            lsn = lsn.next();
            self.batch.push(&void(&record(Op::Void, lsn)), &[]);
        }
        self.append_alone()
    }

    /// Makes a frame of the open batch and appends it, past the queue; the pool is empty.
    pub(super) fn append_alone(&mut self) -> Result<Appended> {
        let next = self.pool.batch();
        let batch = std::mem::replace(&mut self.batch, next);
        let compression = self.settings.compression;
        self.pool.submit(batch, self.stamp, compression).expect("an empty pool takes a batch");
        let frame = self.pool.recv().expect("what was submitted comes back")?;
        Ok(self.append(frame))
    }

    fn forget_batches(&mut self) {
        self.batch.clear();
        self.opened = None;
        while self.pool.recv().is_some() {}
    }

    /// The journal takes nothing more: what is captured becomes dirty bits, until the synchronisation asks
    /// for a new epoch.
    pub(super) fn give_up(&mut self, cause: &str) -> Result<()> {
        if self.is_broken() {
            return Ok(());
        }
        self.lose_all(cause)?;
        self.writer = None;
        self.shared.set_tail(None);
        self.shared.progress.journal_over();
        let why = format!("{cause}; writes are kept as dirty ranges; a new epoch is tried by itself");
        self.shared.health.broken(&why);
        self.shared.board.change(State::Degraded, why);
        Ok(())
    }

    /// The stream of this epoch is over. Order: 1 the ring takes no more records, 2 every volume is dirty in
    /// the ring (which outlives us) and the gap is durable (which outlives the machine), and only then 3 the
    /// room of records that no journal holds is given back (by `gather`).
    pub(super) fn lose_all(&mut self, cause: &str) -> Result<()> {
        self.shared.ring.set_mode_bitmap(CAUSE_QUOTA)?;
        let mut file = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let volumes: Vec<_> = file
            .get()
            .volumes
            .iter()
            .filter(|volume| volume.present && !volume.is_detached())
            .map(|volume| (volume.id.0, volume.size_bytes))
            .collect();
        for (id, size_bytes) in volumes {
            self.shared.ring.mark(id, 0..size_bytes)?;
        }
        let gap = Gap { cause: cause.to_owned(), since_ns: now_ns() };
        if let Err(error) = file.update(|state| {
            state.needs_resync = Some(gap);
            state.gap_in_ring = false;
        }) {
            // The dirty map says the same to the next owner on this boot, and an unclean start after a
            // reboot.
            tracing::error!(%error, "the gap cannot be remembered in the state file");
        }
        drop(file);
        self.shared.map.lock().abandon();
        self.shortage = None;
        self.forget_batches();
        self.tap.rewind();
        Ok(())
    }
}
