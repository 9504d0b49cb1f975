//! The history below the exact window: what thinning asks of the registry, and how merged undo comes into it.

use journal::Lsn;

use super::{History, Slot};
use crate::Result;
use crate::merged::Node;
use crate::point::is_in_gap;
use crate::retention::Aged;
use crate::thin::Stretch;
use crate::undo::UndoSummary;

impl History {
    /// As [`History::aged`] for the exact window alone: its batches, and the newest boundary that it may
    /// begin at.
    pub(crate) fn aged_exact(&self) -> (Vec<Aged>, u64, u64) {
        let (mut batches, newest_ns, _) = self.aged();
        let inner = self.lock();
        let begins = inner.state.exact_start().batch;
        batches.retain(|batch| batch.number > begins);
        let pinned = inner.pins.values().copied().filter(|pin| *pin >= begins).min().unwrap_or(u64::MAX);
        let back = inner.state.wishes.intent.as_ref().and_then(|intent| intent.back);
        let floor = pinned
            .min(inner.state.consistent_batch)
            .min(inner.state.applied_batch)
            .min(back.map_or(u64::MAX, |back| back.boundary));
        (batches, newest_ns, floor)
    }

    /// The stretches below the exact window, oldest first, and the newest receipt.
    pub(crate) fn stretches(&self, is_fixed: impl Fn(u64) -> bool) -> (Vec<Stretch>, u64) {
        let inner = self.lock();
        let gaps = inner.gaps();
        let pinned = inner.pins.values().copied().min().unwrap_or(u64::MAX);
        let exact = inner.state.exact_start().batch;
        let stretch = |(number, slot): (&u64, &Slot)| {
            let (from, received_ns, bytes, lsn) = match slot {
                Slot::Kept(kept) => (kept.from, kept.received_ns, kept.bytes, kept.last.lsn),
                Slot::Damaged(_) => (*number, 0, 0, Lsn::ZERO),
            };
            let is_fixed = slot.kept().is_none() || *number > pinned || is_fixed(*number);
            Stretch { from, number: *number, received_ns, bytes, is_point: !is_in_gap(&gaps, lsn), is_fixed }
        };
        (inner.batches.range(..=exact).map(stretch).collect(), inner.newest_receipt_ns)
    }

    /// The numbers of the undo segments of some batches.
    pub(crate) fn numbers(&self, from: u64, to: u64) -> Vec<u64> {
        self.lock().batches.range(from..=to).map(|(number, _)| *number).collect()
    }

    /// The undo segments of some batches.
    pub(crate) fn summaries(&self, from: u64, to: u64) -> Vec<UndoSummary> {
        self.lock().batches.range(from..=to).filter_map(|(_, slot)| slot.kept().cloned()).collect()
    }

    /// ⚠ Before redo below a boundary is dropped: as [`History::reserve_drop`], for those that need redo.
    /// Returns the batch whose boundary the exact window begins at, which may be the one that it begins at
    /// already.
    pub(crate) fn reserve_redo(&self, wanted: u64) -> u64 {
        let mut inner = self.lock();
        let begins = inner.state.exact_start().batch;
        let pinned = inner.pins.values().copied().filter(|pin| *pin >= begins).min().unwrap_or(u64::MAX);
        let most = wanted.min(pinned);
        let allowed = inner.may_begin().into_iter().rfind(|number| *number <= most);
        inner.leaving_redo = allowed.unwrap_or(begins).max(begins);
        inner.leaving_redo
    }

    /// The undo segment that stands for a batch: its own, or the one that it was merged into.
    pub(crate) fn covering(&self, batch: u64) -> u64 {
        self.lock().batches.range(batch..).next().map_or(batch, |(number, _)| *number)
    }

    /// ⚠ Puts merged undo in the place of its batches. Not where somebody reads at a boundary below its last
    /// batch: nobody may hold half of the old and half of the new. `christen` gives it its name. Returns the
    /// numbers whose files are left over; `None` where it must wait.
    pub(crate) fn replace(
        &self,
        from: u64,
        number: u64,
        christen: impl FnOnce() -> Result<UndoSummary>,
    ) -> Result<Option<Vec<u64>>> {
        let _shape = self.shape.lock().expect("nothing panics while it holds the shape");
        if self.lock().pins.values().any(|pin| *pin < number) {
            return Ok(None);
        }
        let summary = christen()?;
        let mut inner = self.lock();
        let left: Vec<u64> = inner.batches.range(from..number).map(|(number, _)| *number).collect();
        left.iter().for_each(|number| _ = inner.batches.remove(number));
        inner.batches.insert(number, Slot::Kept(summary));
        let apart = |node: &Node| node.last() < from || node.first > number;
        inner.merged.retain(apart);
        inner.hopeless.retain(apart);
        drop(inner);
        let mut open = self.open_indexes.lock().expect("nothing panics while it holds the open indexes");
        open.retain(apart);
        drop(open);
        let mut open = self.open_segments.lock().expect("nothing panics while it holds the open segments");
        open.retain(|(known, _)| *known < from || *known > number);
        Ok(Some(left))
    }
}
