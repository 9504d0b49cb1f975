//! Disjoint extents, the newest on top, each with the place that its bytes come from.
//!
//! When a later write covers part of an earlier one, the earlier is cut or split, and what is left of its end
//! must come from further inside its source. That is what [`Piece::advance`] is for, and why no ready-made
//! range map serves: they clone the value unchanged.

use std::collections::BTreeMap;
use std::ops::Range;

/// A source of an extent's bytes.
pub trait Piece: Clone {
    /// Drops the first `bytes` bytes of the source.
    fn advance(&mut self, bytes: u64);
}

/// Sources without content (dirty ranges, zeros) advance over nothing.
impl Piece for () {
    fn advance(&mut self, _bytes: u64) {}
}

/// Disjoint half-open ranges of bytes in rising order. Ranges that touch are not merged.
#[derive(Clone, Debug)]
pub struct ExtentMap<P> {
    /// Start → (end, source).
    extents: BTreeMap<u64, (u64, P)>,
    covered: u64,
}

impl<P> Default for ExtentMap<P> {
    fn default() -> Self {
        ExtentMap { extents: BTreeMap::new(), covered: 0 }
    }
}

impl<P: Piece> ExtentMap<P> {
    /// An empty map.
    pub fn new() -> ExtentMap<P> {
        ExtentMap::default()
    }

    /// Lays `range` over whatever is there. An empty range changes nothing.
    pub fn insert(&mut self, range: Range<u64>, piece: P) {
        if range.is_empty() {
            return;
        }
        self.remove(range.clone());
        self.covered += range.end - range.start;
        self.extents.insert(range.start, (range.end, piece));
    }

    /// Takes `range` out, cutting and splitting what reaches into it.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // The one extent that begins before the range and reaches into it.
        if let Some((&start, (end, piece))) = self.extents.range_mut(..range.start).next_back()
            && *end > range.start
        {
            let old_end = std::mem::replace(end, range.start);
            self.covered -= old_end.min(range.end) - range.start;
            if old_end > range.end {
                let mut rest = piece.clone();
                rest.advance(range.end - start);
                self.extents.insert(range.end, (old_end, rest));
                return;
            }
        }
        while let Some((&start, _)) = self.extents.range(range.clone()).next() {
            let Some((end, mut piece)) = self.extents.remove(&start) else { return };
            self.covered -= end.min(range.end) - start;
            if end > range.end {
                piece.advance(range.end - start);
                self.extents.insert(range.end, (end, piece));
            }
        }
    }

    /// All extents in order.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u64>, &P)> + '_ {
        self.extents.iter().map(|(start, (end, piece))| (*start..*end, piece))
    }

    fn touching(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, &P)> + '_ {
        let before = self.extents.range(..range.start).next_back();
        let before = before.filter(|(_, (end, _))| *end > range.start && !range.is_empty());
        let inside = range.start..range.end.max(range.start);
        before
            .into_iter()
            .chain(self.extents.range(inside))
            .map(|(start, (end, piece))| (*start..*end, piece))
    }

    /// What covers `range`, cut to it, in order.
    pub fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, P)> + '_ {
        self.touching(range.clone()).map(move |(held, piece)| {
            let start = held.start.max(range.start);
            let mut piece = piece.clone();
            if start > held.start {
                piece.advance(start - held.start);
            }
            (start..held.end.min(range.end), piece)
        })
    }

    /// What of `range` nothing covers, in order.
    pub fn gaps(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = range.start;
        let end = range.end;
        let held = self.touching(range).map(|(held, _)| held).chain(std::iter::once(end..end));
        held.filter_map(move |held| {
            let gap = at..held.start.min(end);
            at = at.max(held.end);
            (!gap.is_empty()).then_some(gap)
        })
    }

    /// Extents held.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Whether nothing is covered.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Bytes covered.
    pub fn covered_bytes(&self) -> u64 {
        self.covered
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.extents.clear();
        self.covered = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Byte `at` of the source numbered `id`.
    #[derive(Clone, Debug, PartialEq)]
    struct From {
        id: usize,
        at: u64,
    }

    impl Piece for From {
        fn advance(&mut self, bytes: u64) {
            self.at += bytes;
        }
    }

    const SPACE: usize = 64;

    fn painted<'a>(extents: impl Iterator<Item = (Range<u64>, From)> + 'a) -> Vec<Option<(usize, u64)>> {
        let mut space = vec![None; SPACE];
        let mut last = 0;
        for (range, piece) in extents {
            assert!(range.start >= last && range.start < range.end, "{range:?} is out of order or empty");
            last = range.end;
            for at in range.clone() {
                space[usize::try_from(at).unwrap()] = Some((piece.id, piece.at + at - range.start));
            }
        }
        space
    }

    fn steps() -> impl Strategy<Value = Vec<(bool, u64, u64)>> {
        let limit = SPACE as u64;
        proptest::collection::vec((any::<bool>(), 0..limit, 0..limit), 1..40)
    }

    proptest! {
        #[test]
        fn behaves_as_an_array_of_bytes(steps in steps(), from in 0..64_u64, to in 0..64_u64) {
            let mut map = ExtentMap::new();
            let mut model: Vec<Option<(usize, u64)>> = vec![None; SPACE];
            for (id, (insert, start, end)) in steps.into_iter().enumerate() {
                let at = 1000 * id as u64;
                if insert { map.insert(start..end, From { id, at }) } else { map.remove(start..end) }
                for (byte, place) in (start..end).enumerate() {
                    model[usize::try_from(place).unwrap()] = insert.then_some((id, at + byte as u64));
                }
                prop_assert_eq!(&painted(map.iter().map(|(range, piece)| (range, piece.clone()))), &model);
                let covered = model.iter().flatten().count() as u64;
                prop_assert_eq!(map.covered_bytes(), covered);
                prop_assert_eq!(map.is_empty(), covered == 0);
            }
            let inside = |at: usize| (from..to).contains(&(at as u64));
            let clipped: Vec<_> = model.iter().enumerate().map(|(at, byte)| byte.filter(|_| inside(at))).collect();
            prop_assert_eq!(painted(map.overlapping(from..to)), clipped);
            let mut gaps = vec![false; SPACE];
            for gap in map.gaps(from..to) {
                prop_assert!(!gap.is_empty());
                for at in gap { gaps[usize::try_from(at).unwrap()] = true; }
            }
            let expected: Vec<_> = model.iter().enumerate().map(|(at, byte)| inside(at) && byte.is_none()).collect();
            prop_assert_eq!(gaps, expected);
        }
    }

    #[test]
    fn what_is_left_of_a_split_comes_from_further_inside() {
        let mut map = ExtentMap::new();
        map.insert(0..30, From { id: 1, at: 100 });
        map.insert(10..20, From { id: 2, at: 500 });
        let extents: Vec<_> = map.iter().map(|(range, piece)| (range, piece.id, piece.at)).collect();
        assert_eq!(extents, [(0..10, 1, 100), (10..20, 2, 500), (20..30, 1, 120)]);
        map.clear();
        assert_eq!((map.len(), map.covered_bytes()), (0, 0));
    }
}
