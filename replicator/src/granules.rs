//! A set of a volume's granules, a bit each: 2 MiB a TiB.

use std::ops::Range;

use kfilter::abi::GRANULE;
use serde::{Deserialize, Serialize};

/// Some granules of one volume; the last one ends with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granules {
    size_bytes: u64,
    bits: Vec<u64>,
}

impl Granules {
    /// None of a volume of this size.
    pub fn none(size_bytes: u64) -> Granules {
        let words = size_bytes.div_ceil(GRANULE).div_ceil(64);
        Granules { size_bytes, bits: vec![0; usize::try_from(words).unwrap_or(0)] }
    }

    /// Size of the volume, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Adds the granules that lie wholly in a range of bytes.
    pub fn add_inside(&mut self, range: Range<u64>) {
        let end = if range.end >= self.size_bytes {
            self.size_bytes.div_ceil(GRANULE)
        } else {
            range.end / GRANULE
        };
        for at in range.start.div_ceil(GRANULE)..end {
            if let Some(word) = self.word(at) {
                *word |= 1 << (at % 64);
            }
        }
    }

    /// Removes the granules that a range of bytes touches; true when there was one.
    pub fn remove(&mut self, range: &Range<u64>) -> bool {
        let mut was = false;
        for at in range.start / GRANULE..range.end.div_ceil(GRANULE) {
            if let Some(word) = self.word(at) {
                was |= *word & (1 << (at % 64)) != 0;
                *word &= !(1 << (at % 64));
            }
        }
        was
    }

    /// Whether the granule of a byte is among them.
    pub fn holds(&self, byte: u64) -> bool {
        let at = byte / GRANULE;
        let word = usize::try_from(at / 64).ok().and_then(|word| self.bits.get(word));
        word.is_some_and(|word| word & (1 << (at % 64)) != 0)
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        let granules: u64 = self.bits.iter().map(|word| u64::from(word.count_ones())).sum();
        let rest = self.size_bytes % GRANULE;
        let cut = if rest != 0 && self.holds(self.size_bytes - 1) { GRANULE - rest } else { 0 };
        (granules * GRANULE).saturating_sub(cut)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bits.iter().all(|word| *word == 0)
    }

    /// Runs of granules of a range of bytes that are among them (`of` true), or are not; ascending.
    pub fn runs(&self, range: Range<u64>, of: bool) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = ((at / GRANULE + 1) * GRANULE).min(range.end);
            if self.holds(at) == of {
                match runs.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ => runs.push(at..end),
                }
            }
            at = end;
        }
        runs
    }

    fn word(&mut self, granule: u64) -> Option<&mut u64> {
        usize::try_from(granule / 64).ok().and_then(|word| self.bits.get_mut(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_granules_are_added_touched_ones_removed() {
        let size = 10 * GRANULE + 512;
        let mut some = Granules::none(size);
        assert!(some.is_empty() && some.bytes() == 0);
        some.add_inside(GRANULE + 1..5 * GRANULE);
        some.add_inside(9 * GRANULE..u64::MAX);
        assert_eq!(some.runs(0..size, true), [2 * GRANULE..5 * GRANULE, 9 * GRANULE..size]);
        assert_eq!(some.bytes(), 4 * GRANULE + 512, "the last one is a part");
        assert!(some.remove(&(3 * GRANULE + 512..3 * GRANULE + 1024)) && !some.remove(&(0..GRANULE)));
        assert!(some.holds(2 * GRANULE) && !some.holds(3 * GRANULE) && !some.holds(u64::MAX));
        let left = [0..2 * GRANULE, 3 * GRANULE..4 * GRANULE, 5 * GRANULE..9 * GRANULE];
        assert_eq!(some.runs(0..size, false), left);
        assert_eq!(some.runs(2 * GRANULE..4 * GRANULE, true), vec![2 * GRANULE..3 * GRANULE; 1]);
    }
}
