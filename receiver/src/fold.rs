//! The fold: of everything that a batch writes, only the last version of each byte.
//!
//! Between gather and apply. Payloads stay where they were unpacked (one buffer a frame, shared with the
//! gatherer); the fold holds disjoint extents that point into them, so its memory is the batch's redo and
//! little more.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use journal::extent_map::{ExtentMap, Piece};
use journal::record::{Located, Op};
use journal::{Extent, VolumeId};

/// Longest run that is assembled for one read or write of the replica.
pub const MAX_RUN_BYTES: u64 = 1 << 20;

/// Where an extent's new content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redo {
    /// Zeros, of any length.
    Zeros,
    /// In one of the fold's buffers.
    Bytes {
        /// Which buffer.
        buffer: u32,
        /// Where in it.
        at: u32,
    },
}

impl Piece for Redo {
    fn advance(&mut self, bytes: u64) {
        if let Redo::Bytes { at, .. } = self {
            *at += u32::try_from(bytes).expect("a piece is no longer than its frame");
        }
    }
}

/// A stretch of new content that is handled in one step.
pub enum Run<'a> {
    /// Zeros, of any length.
    Zeros(Range<u64>),
    /// Bytes that start at this offset; at most [`MAX_RUN_BYTES`].
    Bytes(u64, &'a [u8]),
}

/// Disjoint extents of new content, by volume.
#[derive(Default)]
pub struct Fold {
    buffers: Vec<Arc<Vec<u8>>>,
    volumes: BTreeMap<VolumeId, ExtentMap<Redo>>,
}

impl Fold {
    /// Keeps an unpacked frame; returns its number for [`Fold::lay`].
    pub fn hold(&mut self, raw: Arc<Vec<u8>>) -> u32 {
        self.buffers.push(raw);
        u32::try_from(self.buffers.len() - 1).expect("a batch holds far fewer frames")
    }

    /// Lays a record's content over what is there; records that change no content are left out.
    pub fn lay(&mut self, buffer: u32, located: &Located<'_>) {
        let record = &located.record;
        let Extent { offset, len } = record.extent;
        if !record.op.changes_content() || len == 0 {
            return;
        }
        let piece = match record.op {
            Op::Discard | Op::WriteZeroes => Redo::Zeros,
            _ => Redo::Bytes {
                buffer,
                at: u32::try_from(located.payload_at).expect("a frame is bounded by MAX_RAW_BYTES"),
            },
        };
        self.volumes.entry(record.volume).or_default().insert(offset..offset + len, piece);
    }

    /// Lays content that is held at `at` of a buffer, or zeros, over what is there.
    pub fn put(&mut self, volume: VolumeId, range: Range<u64>, content: Redo) {
        self.volumes.entry(volume).or_default().insert(range, content);
    }

    /// Lays what `newer` holds of a range over what is there; its buffers are shared.
    pub fn lay_over(&mut self, newer: &Fold, volume: VolumeId, range: Range<u64>) {
        let Some(map) = newer.volumes.get(&volume) else { return };
        let mut shared: BTreeMap<u32, u32> = BTreeMap::new();
        for (extent, piece) in map.overlapping(range) {
            let piece = match piece {
                Redo::Zeros => Redo::Zeros,
                Redo::Bytes { buffer, at } => {
                    let ours = *shared
                        .entry(buffer)
                        .or_insert_with(|| self.hold(Arc::clone(&newer.buffers[buffer as usize])));
                    Redo::Bytes { buffer: ours, at }
                }
            };
            self.put(volume, extent, piece);
        }
    }

    /// Parts of a range that nothing laid so far changes.
    pub fn gaps(&self, volume: VolumeId, range: Range<u64>) -> Vec<Range<u64>> {
        match self.volumes.get(&volume) {
            Some(map) => map.gaps(range).collect(),
            None => vec![range],
        }
    }

    /// Volumes that change, in order of their ids.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.volumes.keys().copied()
    }

    /// Extents that change, with adjacent ones joined.
    pub fn ranges(&self, volume: VolumeId) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (range, _) in self.volumes.get(&volume).into_iter().flat_map(ExtentMap::iter) {
            push_range(&mut ranges, range);
        }
        ranges
    }

    /// Walks the new content of `range`, adjacent bytes assembled in `scratch` into runs of up to 1 MiB.
    ///
    /// # Errors
    /// The first error of `visit`.
    pub fn runs<E>(
        &self,
        volume: VolumeId,
        range: Range<u64>,
        scratch: &mut Vec<u8>,
        mut visit: impl FnMut(Run<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(map) = self.volumes.get(&volume) else { return Ok(()) };
        scratch.clear();
        let mut run_at = range.start;
        for (extent, piece) in map.overlapping(range) {
            let adjacent = run_at + scratch.len() as u64 == extent.start;
            if !scratch.is_empty() && (!adjacent || piece == Redo::Zeros) {
                visit(Run::Bytes(run_at, scratch))?;
                scratch.clear();
            }
            let Redo::Bytes { buffer, at } = piece else {
                visit(Run::Zeros(extent))?;
                continue;
            };
            let length = usize::try_from(extent.end - extent.start).expect("a piece fits in its frame");
            let mut rest = &self.buffers[buffer as usize][at as usize..at as usize + length];
            let mut rest_at = extent.start;
            while !rest.is_empty() {
                if scratch.is_empty() {
                    run_at = rest_at;
                }
                let room = usize::try_from(MAX_RUN_BYTES).expect("1 MiB") - scratch.len();
                let (now, later) = rest.split_at(rest.len().min(room));
                scratch.extend_from_slice(now);
                rest_at += now.len() as u64;
                rest = later;
                if scratch.len() as u64 == MAX_RUN_BYTES {
                    visit(Run::Bytes(run_at, scratch))?;
                    scratch.clear();
                }
            }
        }
        if !scratch.is_empty() {
            visit(Run::Bytes(run_at, scratch))?;
        }
        Ok(())
    }
}

/// Adds a range at the end of a sorted list, joined with the last one where they touch.
pub fn push_range(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ if range.is_empty() => {}
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::Lsn;
    use journal::record::{Record, Records};

    fn fold_of(records: &[(Op, u64, Vec<u8>, u64)]) -> Fold {
        let mut raw = Vec::new();
        for (lsn, (op, offset, payload, len)) in records.iter().enumerate() {
            let record = Record {
                op: *op,
                flags: 0,
                volume: VolumeId(1),
                lsn: Lsn(lsn as u64 + 1),
                time_ns: 0,
                extent: Extent { offset: *offset, len: *len },
            };
            record.encode(payload, &mut raw);
        }
        let raw = Arc::new(raw);
        let mut fold = Fold::default();
        let buffer = fold.hold(Arc::clone(&raw));
        for located in Records::new(&raw) {
            fold.lay(buffer, &located.unwrap());
        }
        fold
    }

    #[test]
    fn a_newer_fold_is_laid_over_an_older_one_in_a_range() {
        let mut fold = fold_of(&[(Op::Write, 0, vec![1; 4096], 4096)]);
        let newer = fold_of(&[
            (Op::Write, 512, vec![2; 512], 512),
            (Op::Discard, 1024, vec![], 512),
            (Op::Write, 2048, vec![3; 4096], 4096),
        ]);
        fold.lay_over(&newer, VolumeId(1), 0..3072);
        let mut seen = vec![9; 4096];
        fold.runs(VolumeId(1), 0..u64::MAX, &mut Vec::new(), |run| {
            let place = |offset: u64| usize::try_from(offset).unwrap();
            match run {
                Run::Zeros(range) => seen[place(range.start)..place(range.end)].fill(0),
                Run::Bytes(at, bytes) => seen[place(at)..place(at) + bytes.len()].copy_from_slice(bytes),
            }
            Ok::<_, ()>(())
        })
        .unwrap();
        let at = |offset: usize| seen[offset];
        assert_eq!([at(0), at(512), at(1024), at(1536), at(2048), at(3071), at(3072)], [1, 2, 0, 1, 3, 3, 1]);
    }

    #[test]
    fn the_last_version_of_each_byte_wins_and_neighbours_are_joined() {
        let fold = fold_of(&[
            (Op::Write, 0, vec![1; 4096], 4096),
            (Op::Write, 4096, vec![2; 4096], 4096),
            (Op::Write, 2048, vec![3; 1024], 1024),
            (Op::Discard, 8192, vec![], 1 << 30),
            (Op::Write, 16384, vec![4; 512], 512),
        ]);
        assert_eq!(fold.ranges(VolumeId(1)), vec![Range { start: 0, end: 8192 + (1 << 30) }]);
        let mut seen = Vec::new();
        fold.runs(VolumeId(1), 0..u64::MAX, &mut Vec::new(), |run| {
            seen.push(match run {
                Run::Zeros(range) => (range.start, range.end - range.start, None),
                Run::Bytes(at, bytes) => (at, bytes.len() as u64, Some(bytes.to_vec())),
            });
            Ok::<_, ()>(())
        })
        .unwrap();
        assert_eq!(seen.len(), 4);
        let joined = seen[0].2.as_ref().unwrap();
        assert_eq!(joined.len(), 8192);
        assert_eq!((joined[2047], joined[2048], joined[3071], joined[3072], joined[4096]), (1, 3, 3, 1, 2));
        assert_eq!((seen[1].0, seen[1].1), (8192, 8192));
        assert_eq!(seen[2].2.as_deref(), Some(&[4_u8; 512][..]));
        assert_eq!((seen[3].0, seen[3].1), (16896, 8192 + (1 << 30) - 16896));
    }
}
