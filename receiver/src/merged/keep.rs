//! Keeping merged indexes: which there are, which are missing, which are asked.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use journal::VolumeId;
use journal::extent_map::ExtentMap;

use super::build::{Parts, build};
use super::{FAN, MAX_LEVEL, MergedIndex, Node, digest, is_no_loss, merged_dir};
use crate::history::{History, Inner};
use crate::undo::{UndoPiece, UndoSummary};
use crate::{Error, ErrorKind, Result};

/// Merged indexes kept open at once; each is a descriptor and a page or so.
const MAX_OPEN: usize = 128;

/// Merged indexes that are open, the one used last at the end.
#[derive(Default)]
pub(crate) struct OpenIndexes(VecDeque<(Node, Arc<MergedIndex>)>);

impl OpenIndexes {
    fn get(&mut self, node: Node) -> Option<Arc<MergedIndex>> {
        let at = self.0.iter().position(|(known, _)| *known == node)?;
        let entry = self.0.remove(at)?;
        let index = Arc::clone(&entry.1);
        self.0.push_back(entry);
        Some(index)
    }

    fn put(&mut self, node: Node, index: Arc<MergedIndex>) {
        self.0.push_back((node, index));
        if self.0.len() > MAX_OPEN {
            self.0.pop_front();
        }
    }

    fn forget(&mut self, node: Node) {
        self.0.retain(|(known, _)| *known != node);
    }

    /// Lets go of what is about batches that were merged.
    pub(crate) fn retain(&mut self, keep: impl Fn(&Node) -> bool) {
        self.0.retain(|(node, _)| keep(node));
    }

    /// Lets go of what is about batches that left.
    pub(crate) fn forget_below(&mut self, oldest: u64) {
        self.0.retain(|(node, _)| node.first >= oldest);
    }
}

impl Inner {
    /// The largest index that begins with a batch and ends at or below `newest`.
    fn merged_at(&self, batch: u64, newest: u64) -> Option<Node> {
        let newest = newest.min(self.state.applied_batch);
        (1..=MAX_LEVEL)
            .rev()
            .filter(|level| Node::begins_at(*level, batch))
            .map(|level| Node { level, first: batch })
            .find(|node| node.last() <= newest && self.merged.contains(node))
    }

    fn digest_of(&self, node: Node) -> Option<u32> {
        let batches = self.batches.range(node.first..=node.last());
        let nonces: Option<Vec<u64>> = batches.map(|(_, slot)| slot.kept().map(|kept| kept.nonce)).collect();
        nonces
            .filter(|nonces| nonces.len() as u64 == Node::span(node.level))
            .map(|nonces| digest(nonces.into_iter()))
    }

    /// The first index that is missing and can be made, of the lowest level.
    fn unmerged(&self) -> Option<Node> {
        // Below the exact window batches are merged themselves.
        self.state.oldest_batch.checked_sub(1)?;
        let oldest = self.state.exact_start().batch;
        for level in 1..=MAX_LEVEL {
            let span = Node::span(level);
            let mut first = oldest.next_multiple_of(span) + 1;
            // Over the batches that are there, not over the numbers that should be: the state may name any.
            while let Some((held, _)) = self.batches.range(first..).next() {
                first = (held - 1) / span * span + 1;
                if first + (span - 1) > self.state.applied_batch {
                    break;
                }
                let node = Node { level, first };
                if !self.merged.contains(&node) && !self.hopeless.contains(&node) && self.has_parts(node) {
                    return Some(node);
                }
                first += span;
            }
        }
        None
    }

    fn has_parts(&self, node: Node) -> bool {
        match node.level {
            1 => self.digest_of(node).is_some(),
            _ => children(node).all(|child| self.merged.contains(&child)),
        }
    }
}

fn children(node: Node) -> impl Iterator<Item = Node> {
    let level = node.level - 1;
    (0..FAN).map(move |at| Node { level, first: node.first + at * Node::span(level) })
}

impl History {
    /// What the directory holds, as far as the state knows of its batches.
    pub(crate) fn find_merged(&self) -> Result<()> {
        let dir = merged_dir(&self.group_dir);
        let names = match self.disk.list(&dir) {
            Ok(names) => names,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(format!("list {}", dir.display()), e)),
        };
        let mut inner = self.lock();
        let (oldest, applied) = (inner.state.oldest_batch, inner.state.applied_batch);
        let is_held = |node: &Node| oldest != 0 && node.first >= oldest && node.last() <= applied;
        let held = names.iter().filter_map(|name| Node::of_name(name)).filter(is_held);
        // What was merged itself has no index any more.
        inner.merged = held.filter(|node| inner.digest_of(*node).is_some()).collect();
        Ok(())
    }

    /// Removes the files of indexes that are not held any more, and what a crash left over. Those that cannot
    /// be removed now are met again.
    pub(crate) fn sweep_merged(&self) {
        let dir = merged_dir(&self.group_dir);
        for name in self.disk.list(&dir).unwrap_or_default() {
            if !Node::of_name(&name).is_some_and(|node| self.lock().merged.contains(&node)) {
                let _ = self.disk.remove(&dir.join(name));
            }
        }
    }

    /// Makes at most so many of the indexes that are missing; says how many. Only the applier's owner calls
    /// it.
    pub(crate) fn merge(&self, at_most: usize) -> usize {
        for made in 0..at_most {
            let Some(node) = self.lock().unmerged() else { return made };
            match self.make(node) {
                Ok(Some(())) => _ = self.lock().merged.insert(node),
                Ok(None) => _ = self.lock().hopeless.insert(node),
                Err(error) if error.kind == ErrorKind::NoSpace => return made,
                Err(error) => {
                    tracing::warn!(%error, first = node.first, level = node.level, "a merged index cannot be made");
                    let mut inner = self.lock();
                    // Damaged parts are made anew; of segments that are damaged there is nothing to be
                    // merged.
                    let parts: Vec<Node> = if node.level > 1 { children(node).collect() } else { Vec::new() };
                    parts.iter().for_each(|part| _ = inner.merged.remove(part));
                    inner.hopeless.insert(node);
                }
            }
        }
        at_most
    }

    fn make(&self, node: Node) -> Result<Option<()>> {
        let dir = merged_dir(&self.group_dir);
        self.disk.create_dir(&dir).map_err(|e| Error::io(format!("create {}", dir.display()), e))?;
        let (group, digest, segments) = {
            let inner = self.lock();
            let batches = inner.batches.range(node.first..=node.last());
            let segments: Vec<UndoSummary> = match node.level {
                1 => batches.filter_map(|(_, slot)| slot.kept().cloned()).collect(),
                _ => Vec::new(),
            };
            let Some(digest) = inner.digest_of(node) else { return Ok(None) };
            (inner.state.group, digest, segments)
        };
        if node.level == 1 {
            return build(&self.disk, &dir, group, node, digest, &Parts::Segments(&segments));
        }
        let parts: Vec<Arc<MergedIndex>> =
            children(node).map(|child| self.open_merged(child)).collect::<Result<_>>()?;
        build(&self.disk, &dir, group, node, digest, &Parts::Merged(&parts))
    }

    fn open_merged(&self, node: Node) -> Result<Arc<MergedIndex>> {
        let poisoned = "nothing panics while it holds the open indexes";
        if let Some(index) = self.open_indexes.lock().expect(poisoned).get(node) {
            return Ok(index);
        }
        let (group, digest) = {
            let inner = self.lock();
            let digest = inner.digest_of(node);
            (inner.state.group, digest.ok_or_else(|| Error::corrupt("batches of a merged index are gone"))?)
        };
        let index =
            Arc::new(MergedIndex::open(&*self.disk, &merged_dir(&self.group_dir), node, group, digest)?);
        self.open_indexes.lock().expect(poisoned).put(node, Arc::clone(&index));
        Ok(index)
    }

    /// Lays what the batches behind `boundary`, up to `newest`, overwrote in a range under what `map` holds
    /// of it: smaller batches come first and win. False where the map outgrew `most` pieces before.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where an undo segment is missing or damaged.
    pub(crate) fn lay_under(
        &self,
        boundary: u64,
        newest: u64,
        map: &mut ExtentMap<UndoPiece>,
        volume: VolumeId,
        range: &Range<u64>,
        most: usize,
    ) -> Result<bool> {
        let mut batch = boundary + 1;
        while batch <= newest && map.covered_bytes() < range.end - range.start {
            let merged = self.lock().merged_at(batch, newest);
            let Some(node) = merged else {
                let number = self.covering(batch);
                self.segment(number)?.lay_under(map, volume, range);
                if map.len() > most {
                    return Ok(false);
                }
                batch = number + 1;
                continue;
            };
            match self.open_merged(node).and_then(|index| index.lay_under(map, volume, range, most)) {
                Ok(true) => batch = node.last() + 1,
                Ok(false) => return Ok(false),
                // What was laid is right; the rest is asked of the level below.
                Err(error) if is_no_loss(&error) => {
                    tracing::warn!(%error, "a merged index is passed over, and made anew");
                    self.lock().merged.remove(&node);
                    self.open_indexes.lock().expect("nothing panics while it holds them").forget(node);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
