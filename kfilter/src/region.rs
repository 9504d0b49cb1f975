//! The user side's home of a ring: a file in tmpfs, owned by one process at a time.
//!
//! The owner's death loses nothing: memory of the file outlives it, and the next owner takes it over. A
//! reboot loses the file, and with it the ring.
//!
//! ```text
//! DIR/ring        the mapping (see `abi`), complete from the moment it has this name
//! DIR/ring.lock   flocked by the owner as long as it lives; never renamed or removed
//! DIR/ring.tmp    a ring in the making
//! ```
//!
//! Invariants: every page of the file is allocated before it is mapped (a store to a page that a full tmpfs
//! cannot give is a SIGBUS); the file is touched only under the flock; the directory is ours alone
//! ([`RingDir`]).

use super::abi::{BITMAPS_AT, Identity, Layout, MAGIC, VolumeSpec, control_at, identity_at};
use super::consumer::Consumer;
use super::error::{Error, ErrorKind};
use super::memory::{Host, Memory as _};
use super::recovery::{Lost, TakeOver};
use super::ring::{Mode, Refused, Reserver, Ring};
use super::ring_dir::{RingDir, at};
use super::span::Span;
use super::waker::Waker;
use core::sync::atomic::Ordering::{Acquire, Release};
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::boxed::Box;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A ring in tmpfs.
pub type Region = Ring<Mapping>;

/// A mapped ring file with its lock, and the surroundings that the algorithm asks for.
#[derive(Debug)]
pub struct Mapping {
    span: Span,
    reserver: Box<Mutex<Reserver>>,
    waker: Waker,
    pinned: bool,
    // Declared last, so dropped last: unmapped after every use, unlocked after that.
    _map: MmapRaw,
    _lock: File,
}

// SAFETY: a std mutex around the only `Reserver`.
unsafe impl Host for Mapping {
    type Memory = Span;

    #[inline]
    fn memory(&self) -> &Span {
        &self.span
    }

    #[inline]
    fn locked<R>(&self, critical: impl FnOnce(&mut Reserver) -> R) -> R {
        // What runs under the lock panics only on a broken invariant, before it changes the reserver.
        critical(&mut self.reserver.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[inline]
    fn published(&self) {
        self.waker.wake();
    }
}

/// What a new ring is made of.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec<'a> {
    /// Whose ring.
    pub identity: Identity,
    /// Its volumes.
    pub volumes: &'a [VolumeSpec],
    /// Length of the ring, a power of two.
    pub ring_bytes: u64,
    /// Lsn of the first record.
    pub first_lsn: u64,
    /// No record gets an earlier time: that of the newest record of the ring before this one, or 0.
    pub last_time_ns: u64,
}

/// This boot's id.
pub fn boot_id() -> Result<[u8; 16], Error> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(at(path))?;
    let id = u128::from_str_radix(&text.trim().replace('-', ""), 16);
    Ok(id.map_err(|_| at(path)(io::ErrorKind::InvalidData.into()))?.to_be_bytes())
}

impl Region {
    /// Makes a ring in a directory of a tmpfs, in place of one that may be there and that nobody owns: that
    /// one goes first, so that the room of one is enough. ⚠ The caller has made durable that the old one is
    /// given up.
    ///
    /// Refused with `NotInMemory`, `NotOurs`, `Busy` or `Invalid`; what was there before stays then. With
    /// `NoSpace` it is gone.
    pub fn create(dir: &Path, spec: &RegionSpec<'_>) -> Result<Self, Error> {
        let dir = RingDir::open(dir)?;
        let lock = dir.lock(true)?;
        let invalid = || Error { kind: ErrorKind::Invalid, at: dir.path().to_path_buf(), source: None };
        let layout = Layout::plan(spec.ring_bytes, spec.volumes).ok_or_else(invalid)?;
        dir.remove("ring.tmp")?;
        dir.remove("ring")?;
        let tmp = dir.path().join("ring.tmp");
        let made = (|| {
            let file = dir.new_file("ring.tmp")?;
            fill(&file, layout.total_bytes).map_err(at(&tmp))?;
            let mapping = Mapping::new(&file, layout.total_bytes, lock).map_err(at(&tmp))?;
            let ring = Ring::format(
                mapping,
                &spec.identity,
                spec.volumes,
                spec.ring_bytes,
                spec.first_lsn,
                spec.last_time_ns,
            );
            let ring = ring.ok_or_else(invalid)?;
            // The name comes last: whoever finds it finds a whole ring.
            dir.rename("ring.tmp", "ring")?;
            Ok(ring)
        })();
        if made.is_err() {
            // Best effort; the next `create` removes it as well.
            let _ = dir.remove("ring.tmp");
        }
        made
    }

    /// Takes over the ring that a dead owner left. `Absent` and `Lost` mean a new epoch.
    pub fn take_over(dir: &Path, expected: &Identity) -> Result<TakeOver<Mapping>, Error> {
        let dir = RingDir::open(dir)?;
        let lock = dir.lock(true)?;
        let path = dir.path().join("ring");
        let file = dir.file("ring", false)?;
        let bytes = file.metadata().map_err(at(&path))?.len();
        if bytes < BITMAPS_AT {
            return Err(Error { kind: ErrorKind::Lost(Lost::Layout), at: path, source: None });
        }
        // Whole already, if we made it; a hole would be found by a SIGBUS.
        fill(&file, bytes).map_err(at(&path))?;
        let mapping = Mapping::new(&file, bytes, lock).map_err(at(&path))?;
        TakeOver::new(mapping, expected).map_err(|lost| Error {
            kind: ErrorKind::Lost(lost),
            at: path,
            source: None,
        })
    }

    /// The group that the ring in a directory says it is of; none where there is no ring of ours.
    pub fn group_in(dir: &RingDir) -> Option<[u8; 16]> {
        let file = dir.file("ring", false).ok()?;
        let mut head = [0; 64];
        file.read_exact_at(&mut head, 0).ok()?;
        let is_ours = head[..8] == MAGIC.to_le_bytes();
        let at = usize::try_from(identity_at::GROUP_ID).ok()?;
        is_ours.then(|| head[at..at + 16].try_into().ok()).flatten()
    }

    /// Whether the pages are locked in memory. When they are not (RLIMIT_MEMLOCK), a machine under memory
    /// pressure may swap them, and writes wait for that: worth a warning.
    pub fn is_pinned(&self) -> bool {
        self.host().pinned
    }

    /// Takes an empty ring whose writes only set bits into another epoch: the next record gets `next_lsn`.
    /// The consumer's thread does it, since nobody else moves the tail. Refused with `BitmapMode` while
    /// writes are recorded, with `Full` while records are held, with `Malformed` for an lsn that was given
    /// out.
    ///
    /// Crash order: 1 the lsn that a new owner counts from, 2 the identity; cut in between, the ring is
    /// nobody's, and the next start begins a new epoch.
    pub fn renew(&self, epoch: u64, epoch_id: &[u8; 16], next_lsn: u64) -> Result<(), Refused> {
        self.host().locked(|reserver| {
            let memory = self.memory();
            if reserver.mode != Mode::Bitmap || reserver.moving {
                return Err(Refused::BitmapMode);
            }
            if memory.load64(control_at::TAIL, Acquire) != reserver.head {
                return Err(Refused::Full);
            }
            if next_lsn < reserver.next_lsn {
                return Err(Refused::Malformed);
            }
            memory.store64(control_at::ANCHOR_LSN, next_lsn, Release);
            reserver.next_lsn = next_lsn;
            // SAFETY: the identity is read by nobody but a new owner, and we are the owner as long as we
            // live.
            unsafe {
                memory.write(identity_at::EPOCH, &epoch.to_le_bytes());
                memory.write(identity_at::EPOCH_ID, epoch_id);
            }
            Ok(())
        })
    }

    /// How much of the ring is reserved and not yet released, 0 to 1.
    pub fn fill_ratio(&self) -> f64 {
        self.used_bytes() as f64 / self.ring_bytes() as f64
    }

    /// Ends the consumer's `wait` early, for example because it shall stop.
    pub fn wake_consumer(&self) {
        self.host().waker.wake();
    }
}

impl<R: Deref<Target = Region>> Consumer<Mapping, R> {
    /// Sleeps until there is a record to take or the time is over. True when `peek` has something to say;
    /// false may come early.
    pub fn wait(&self, timeout: Duration) -> bool {
        self.ring().host().waker.wait(timeout, || !matches!(self.peek(), Ok(None)))
    }
}

impl Mapping {
    fn new(file: &File, bytes: u64, lock: File) -> io::Result<Self> {
        let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let map = MmapOptions::new().len(length).map_raw(file)?;
        let pinned = map.lock().is_ok();
        if !pinned {
            // So that at least the first lap does not fault on every page; kernels before 5.14 refuse it.
            let _ = map.advise(Advice::PopulateWrite);
        }
        let base = NonNull::new(map.as_mut_ptr()).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: page aligned, mapped as long as `map` beside it lives, every page allocated by `fill`, and
        // no other process has it mapped: `lock` is held, and only its holder maps the file.
        let span = unsafe { Span::new(base, bytes) };
        Ok(Self {
            span,
            reserver: Box::new(Mutex::new(Reserver::new())),
            waker: Waker::new(),
            pinned,
            _map: map,
            _lock: lock,
        })
    }
}

/// Makes the file this long with every page allocated; what it holds stays.
fn fill(file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // ramfs has no fallocate, but nor has it a limit or a swap: written is allocated.
        Err(Errno::OPNOTSUPP) => {
            let zeros = [0; 4096];
            let mut end = file.metadata()?.len();
            while end < bytes {
                let now = zeros.len().min(usize::try_from(bytes - end).unwrap_or(zeros.len()));
                file.write_all_at(&zeros[..now], end)?;
                end += now as u64;
            }
            Ok(())
        }
        other => other.map_err(io::Error::from),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::abi::Op;
    use crate::entry::Entry;
    use crate::ring::Captured;
    use crate::testing::{IDENTITY, VOLUMES, write};
    use std::format;
    use std::string::ToString as _;
    use std::sync::Arc;
    use std::time::Instant;

    const SPEC: RegionSpec<'_> = RegionSpec {
        identity: IDENTITY,
        volumes: &VOLUMES,
        ring_bytes: 1 << 20,
        first_lsn: 1,
        last_time_ns: 0,
    };

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").expect("these tests need a tmpfs at /dev/shm")
    }

    #[test]
    fn outlives_its_owner() {
        let dir = directory();
        let region = Region::create(dir.path(), &SPEC).unwrap();
        let _ = write(&region, 7, 0, b"left behind", 1);
        assert!(region.fill_ratio() > 0.0 && region.fill_ratio() < 0.001);
        let busy = Region::take_over(dir.path(), &IDENTITY).unwrap_err();
        assert_eq!(busy.kind, ErrorKind::Busy, "a second owner");
        assert_eq!(Region::create(dir.path(), &SPEC).unwrap_err().kind, ErrorKind::Busy);
        drop(region);
        let taken = Region::take_over(dir.path(), &IDENTITY).unwrap();
        let record = taken.undone().next().unwrap();
        assert_eq!((record.op(), record.payload()), (Op::Write, &b"left behind"[..]));
        let other = Identity { epoch: 4, ..IDENTITY };
        drop(taken);
        let lost = Region::take_over(dir.path(), &other).unwrap_err();
        assert_eq!(lost.kind, ErrorKind::Lost(Lost::Epoch));
        assert!(format!("{lost}").starts_with("the ring is lost, it belongs to another epoch: "));
        // A new epoch takes its place.
        let region = Region::create(dir.path(), &RegionSpec { identity: other, ..SPEC }).unwrap();
        assert_eq!(region.used_bytes(), 0);
    }

    #[test]
    fn goes_into_another_epoch_when_it_is_empty_and_keeps_its_bits() {
        let dir = directory();
        let region = Arc::new(Region::create(dir.path(), &SPEC).unwrap());
        let mut consumer = Consumer::new(region.clone()).unwrap();
        let other = Identity { epoch: 4, epoch_id: [9; 16], ..IDENTITY };
        let renew = |lsn| region.renew(other.epoch, &other.epoch_id, lsn);
        let Captured::Ring(token) = region.capture(Entry::write(7, 0, 512, 0), &[1; 512], 1).unwrap() else {
            panic!("there is room")
        };
        assert_eq!(renew(50), Err(Refused::BitmapMode));
        region.set_mode_bitmap(crate::dirty::CAUSE_AGENT, 2);
        assert_eq!(renew(50), Err(Refused::Full), "a record is held");
        region.mark_done(token);
        assert!(consumer.peek().unwrap().is_some() && consumer.advance().unwrap());
        assert_eq!(consumer.release(1), Ok(2));
        region.mark_dirty(7, 0..1);
        assert_eq!(renew(1), Err(Refused::Malformed), "given out");
        assert_eq!(renew(50), Ok(()));
        assert_eq!((region.captured_lsn(), region.first_held_lsn()), (49, 50));
        assert_eq!(region.begin_resync(3), Ok(50));
        assert_eq!(consumer.peek().unwrap().map(|record| record.lsn()), Some(50));
        drop((consumer, region));
        assert_eq!(
            Region::take_over(dir.path(), &IDENTITY).unwrap_err().kind,
            ErrorKind::Lost(Lost::Epoch),
            "of the old epoch"
        );
        let region = Region::take_over(dir.path(), &other).unwrap().finish().unwrap();
        assert!(region.is_dirty(7) && region.captured_lsn() == 50);
    }

    #[test]
    fn every_page_is_there_before_the_first_write() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = directory();
        let _region = Region::create(dir.path(), &SPEC).unwrap();
        let file = std::fs::metadata(dir.path().join("ring")).unwrap();
        assert!(file.blocks() * 512 >= file.len() && file.len() > 1 << 20);
        assert_eq!(file.mode() & 0o777, 0o600);
        assert!(!dir.path().join("ring.tmp").exists());
    }

    #[test]
    fn a_new_ring_needs_the_room_of_one() {
        let dir = directory();
        drop(Region::create(dir.path(), &SPEC).unwrap());
        let old = std::fs::metadata(dir.path().join("ring")).unwrap();
        assert_eq!(Region::group_in(&RingDir::open(dir.path()).unwrap()), Some(IDENTITY.group_id));
        // The old one is gone before there is room for the new one, and its lock stays.
        let vast = RegionSpec { ring_bytes: 1 << 50, ..SPEC };
        assert_eq!(Region::create(dir.path(), &vast).unwrap_err().kind, ErrorKind::NoSpace);
        assert_eq!(RingDir::open(dir.path()).unwrap().names().unwrap(), ["ring.lock"]);
        assert!(old.len() > 1 << 20);
    }

    #[test]
    fn says_what_to_do() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let error = Region::create(here, &SPEC).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotInMemory);
        assert!(error.to_string().contains("/dev/shm"));
        let dir = directory();
        assert_eq!(Region::take_over(dir.path(), &IDENTITY).unwrap_err().kind, ErrorKind::Absent);
        let odd = RegionSpec { ring_bytes: 1000, ..SPEC };
        assert_eq!(Region::create(dir.path(), &odd).unwrap_err().kind, ErrorKind::Invalid);
        let vast = RegionSpec { ring_bytes: 1 << 50, ..SPEC };
        assert_eq!(Region::create(dir.path(), &vast).unwrap_err().kind, ErrorKind::NoSpace);
        assert!(!dir.path().join("ring.tmp").exists(), "nothing is left of it");
        std::fs::write(dir.path().join("ring"), b"short").unwrap();
        let short = Region::take_over(dir.path(), &IDENTITY).unwrap_err();
        assert_eq!(short.kind, ErrorKind::Lost(Lost::Layout));
        assert_ne!(boot_id().unwrap(), [0; 16]);
    }

    #[test]
    fn a_sleeping_consumer_wakes_at_a_publish() {
        let dir = directory();
        let region = Arc::new(Region::create(dir.path(), &SPEC).unwrap());
        let mut consumer = Consumer::new(region.clone()).unwrap();
        assert!(!consumer.wait(Duration::from_millis(1)), "nothing to take");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for lsn in 1..=2000 {
                    let Captured::Ring(token) =
                        region.capture(Entry::write(7, 0, 8, 0), &[1; 8], lsn).unwrap()
                    else {
                        panic!("the ring holds them all")
                    };
                    region.mark_done(token);
                }
            });
            let started = Instant::now();
            let mut last = 0;
            while last < 2000 {
                // A missed publish costs a whole timeout, and the test its time.
                consumer.wait(Duration::from_secs(60));
                while let Some(record) = consumer.peek().unwrap() {
                    last = record.lsn();
                    consumer.advance().unwrap();
                }
            }
            assert!(started.elapsed() < Duration::from_secs(50));
        });
        assert_eq!(consumer.release(u64::MAX), Ok(2001));
    }
}
