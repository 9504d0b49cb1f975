//! What was not sent because a file system called it free (decision 0021): `DIR/skipped`.
//!
//! Source and replica may differ there, and nobody reads it. A granule that somebody writes into is touched:
//! what was written is a record as any other, and the rest of it is sent once nothing more urgent is under
//! way. So each granule is either in here, or the same on both sides.
//!
//! Invariants
//! * A granule is durably in the file before its dirty bit is cleared unsent.
//! * It is taken out when all of it has been sent; of the file a little later. A file that is too large makes
//!   `verify` leave out too much until the granule is written again. Nothing is ever left unsent because of
//!   this file.
//! * Touching sets no dirty bit: a synchronisation would never end on a disk that is being filled.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kfilter::abi::GRANULE;
use machine::{Mutex, MutexGuard};

use crate::error::{Error, ErrorKind, Result};
use crate::granules::Granules;

/// What was taken out is written this much later at most.
const KEEP: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub struct Skipped {
    path: PathBuf,
    /// Looked at for each record, before the lock.
    any: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    volumes: BTreeMap<u32, Granules>,
    /// Those among them that were written into since.
    touched: BTreeMap<u32, Granules>,
    /// Since when the file holds too much.
    changed: Option<Instant>,
}

impl Skipped {
    /// What the last run left in a directory; nothing where it cannot be read, which only makes `verify` say
    /// too much.
    pub fn open(dir: &Path) -> Skipped {
        let path = dir.join("skipped");
        let volumes: BTreeMap<u32, Granules> = match std::fs::read(&path) {
            Ok(bytes) => postcard::from_bytes(&bytes).unwrap_or_else(|error| {
                tracing::warn!(%error, path = %path.display(), "what was skipped is not known any more");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        let any = AtomicBool::new(!volumes.is_empty());
        Skipped { path, any, inner: Mutex::new(Inner { volumes, ..Inner::default() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds granules of a volume; durable when this returns.
    ///
    /// # Errors
    /// The file cannot be written: then nothing was added, and nothing may be skipped.
    pub fn add(&self, volume: u32, size_bytes: u64, runs: &[Range<u64>]) -> Result<()> {
        let mut inner = self.lock();
        let mut next = inner.volumes.clone();
        // A volume that has grown.
        let mut all = Granules::none(size_bytes);
        for run in next.get(&volume).map(|old| old.runs(0..size_bytes, true)).unwrap_or_default() {
            all.add_inside(run);
        }
        runs.iter().for_each(|run| all.add_inside(run.clone()));
        next.insert(volume, all);
        self.write(&next)?;
        inner.volumes = next;
        self.any.store(true, Ordering::Release);
        Ok(())
    }

    /// A record changes a range: granules that it covers are taken out, those at its ends are touched.
    #[inline]
    pub fn touch(&self, volume: u32, range: &Range<u64>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut inner = self.lock();
        let Inner { volumes, touched, changed } = &mut *inner;
        let Some(granules) = volumes.get_mut(&volume) else { return };
        for edge in [range.start, range.end].into_iter().filter(|edge| edge % GRANULE != 0) {
            if granules.holds(edge) {
                let start = edge / GRANULE * GRANULE;
                let touched = touched.entry(volume).or_insert_with(|| Granules::none(granules.size_bytes()));
                touched.add_inside(start..start + GRANULE);
            }
        }
        let whole = range.start.next_multiple_of(GRANULE)..range.end / GRANULE * GRANULE;
        if whole.start < whole.end && granules.remove(&whole) {
            if let Some(touched) = touched.get_mut(&volume) {
                touched.remove(&whole);
            }
            changed.get_or_insert_with(machine::now);
        }
    }

    /// The first touched granules of a volume, up to so many bytes: to be sent whole.
    pub fn touched(&self, volume: u32, most_bytes: u64) -> Vec<Range<u64>> {
        if !self.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let inner = self.lock();
        let Some(touched) = inner.touched.get(&volume) else { return Vec::new() };
        let (mut runs, mut left) = (touched.runs(0..touched.size_bytes(), true), most_bytes);
        runs.retain_mut(|run| {
            run.end = run.end.min(run.start.saturating_add(left / GRANULE * GRANULE));
            left -= run.end - run.start;
            run.start < run.end
        });
        runs
    }

    /// A range is the same on both sides from now on.
    pub fn sent(&self, volume: u32, range: &Range<u64>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        // Only what lies wholly in it; the last granule ends with the volume.
        let size_bytes = self.lock().volumes.get(&volume).map_or(0, Granules::size_bytes);
        let end = if range.end >= size_bytes { range.end.next_multiple_of(GRANULE) } else { range.end };
        let whole = range.start.next_multiple_of(GRANULE)..end / GRANULE * GRANULE;
        if whole.start < whole.end {
            self.touch(volume, &whole);
        }
    }

    /// Whether a byte lies in what was skipped.
    pub fn holds(&self, volume: u32, byte: u64) -> bool {
        self.any.load(Ordering::Acquire)
            && self.lock().volumes.get(&volume).is_some_and(|granules| granules.holds(byte))
    }

    /// What of a volume is to be copied.
    pub fn others(&self, volume: u32, size_bytes: u64) -> Vec<Range<u64>> {
        let inner = self.lock();
        let granules = inner.volumes.get(&volume);
        granules.map_or_else(|| vec![0..size_bytes; 1], |granules| granules.runs(0..size_bytes, false))
    }

    /// Bytes of all volumes.
    pub fn bytes(&self) -> u64 {
        self.lock().volumes.values().map(Granules::bytes).sum()
    }

    /// Writes the file anew now and then, while there is something to be taken out of it.
    pub fn keep(&self) {
        let mut inner = self.lock();
        if inner.changed.is_some_and(|since| machine::since(since) >= KEEP) {
            inner.volumes.retain(|_, granules| !granules.is_empty());
            if let Err(error) = self.write(&inner.volumes) {
                tracing::warn!(%error, "what was skipped cannot be noted");
            }
            self.any.store(!inner.volumes.is_empty(), Ordering::Release);
            inner.changed = None;
        }
    }

    fn write(&self, volumes: &BTreeMap<u32, Granules>) -> Result<()> {
        let at = || format!("write {}", self.path.display());
        let bytes =
            postcard::to_stdvec(volumes).map_err(|error| Error::because(ErrorKind::Io, at(), error))?;
        let write = || -> std::io::Result<()> {
            let draft = self.path.with_extension("new");
            std::fs::write(&draft, bytes)?;
            std::fs::File::open(&draft)?.sync_all()?;
            std::fs::rename(&draft, &self.path)?;
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            std::fs::File::open(dir)?.sync_all()
        };
        write().map_err(|error| Error::because(ErrorKind::Io, at(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_granule_that_is_written_leaves_and_is_sent_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let size = 16 * GRANULE;
        let skipped = Skipped::open(dir.path());
        skipped.touch(1, &(0..512));
        skipped.add(1, size, &vec![2 * GRANULE..8 * GRANULE; 1]).unwrap();
        assert_eq!(
            (skipped.bytes(), skipped.others(1, size)),
            (6 * GRANULE, vec![0..2 * GRANULE, 8 * GRANULE..size])
        );
        skipped.touch(1, &(2 * GRANULE..3 * GRANULE));
        assert!(!skipped.holds(1, 2 * GRANULE) && skipped.touched(1, u64::MAX).is_empty(), "covered wholly");
        skipped.touch(1, &(3 * GRANULE + 512..3 * GRANULE + 1024));
        skipped.touch(1, &(4 * GRANULE + 512..6 * GRANULE + 1));
        let touched = [3 * GRANULE..5 * GRANULE, 6 * GRANULE..7 * GRANULE];
        assert_eq!(skipped.touched(1, u64::MAX), touched);
        assert_eq!(skipped.touched(1, GRANULE), [3 * GRANULE..4 * GRANULE; 1], "not all at once");
        assert!(skipped.holds(1, 3 * GRANULE), "until the rest of it was sent");
        assert!(
            !skipped.holds(1, 5 * GRANULE) && skipped.holds(1, 7 * GRANULE) && !skipped.holds(2, 7 * GRANULE)
        );
        skipped.sent(1, &(3 * GRANULE..7 * GRANULE));
        assert!(skipped.touched(1, u64::MAX).is_empty() && !skipped.holds(1, 3 * GRANULE));
        skipped.sent(1, &(7 * GRANULE..8 * GRANULE - 1));
        assert!(skipped.holds(1, 7 * GRANULE), "a part of it");
        let again = Skipped::open(dir.path());
        assert_eq!(again.bytes(), 6 * GRANULE, "too much until it is written anew, never too little");
        skipped.sent(1, &(7 * GRANULE..8 * GRANULE));
        assert_eq!(skipped.bytes(), 0);
    }
}
