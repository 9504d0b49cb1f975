//! A disk in memory that can be cut at every operation: the crash matrix of all rooms runs on it.
//!
//! It holds two images. *Live* is what a running process sees; *durable* is what syncs have promised. At a
//! crash ([`SimDisk::crash`]) everything that was not synced is kept or lost independently: each 512-byte
//! sector of content, each file's size, each change of a directory. That is harsher than any real file
//! system, on purpose.
//!
//! A failed sync behaves as in Linux: what was dirty counts as clean afterwards, can still be read, is never
//! written, and a later sync succeeds without it. Files are sparse: room is taken by the sectors that were
//! written or reserved.
//!
//! Deterministic: the same operations and seeds give the same disk. Seed 0 loses everything unsynced, seed 1
//! keeps everything, the others draw.

use crate::io::{Disk, File, Room};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const SECTOR: usize = crate::SECTOR_BYTES;

/// A simulated disk; clones share it.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    inodes: Vec<Inode>,
    live: BTreeMap<PathBuf, usize>,
    durable: BTreeMap<PathBuf, usize>,
    /// Changes of directories since their last sync, in order.
    pending: Vec<(PathBuf, NameChange)>,
    dirs: BTreeSet<PathBuf>,
    ops: u64,
    cut: Option<u64>,
    /// Files at or below this path fail their syncs.
    syncs_fail: Option<PathBuf>,
    capacity: Option<u64>,
}

#[derive(Clone, Default)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors whose live content may differ from the durable one.
    dirty: BTreeSet<usize>,
    /// Sectors that take room.
    held: BTreeSet<usize>,
    /// Reading this range fails.
    unreadable: Option<Range<usize>>,
}

#[derive(Clone)]
enum NameChange {
    Link { path: PathBuf, inode: usize },
    Rename { from: PathBuf, to: PathBuf, inode: usize },
    Unlink { path: PathBuf, inode: usize },
}

/// splitmix64: small, good enough, and ours, so that a seed means the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("/")).to_path_buf()
}

fn dead() -> io::Error {
    io::Error::other("simulated power loss")
}

impl State {
    /// Counts an operation. `Err` once the power is gone; the operation at the cut itself is carried out,
    /// unsynced, and then fails: `Ok(true)`.
    fn step(&mut self) -> io::Result<bool> {
        let op = self.ops;
        self.ops += 1;
        match self.cut {
            Some(cut) if op > cut => Err(dead()),
            Some(cut) => Ok(op == cut),
            None => Ok(false),
        }
    }

    fn alive(&self) -> io::Result<()> {
        if self.cut.is_some_and(|cut| self.ops > cut) { Err(dead()) } else { Ok(()) }
    }

    fn used(&self) -> u64 {
        let inodes: BTreeSet<usize> = self.live.values().copied().collect();
        inodes.iter().map(|inode| (self.inodes[*inode].held.len() * SECTOR) as u64).sum()
    }

    /// Makes the file reach to `bytes`, with a hole.
    fn grow(&mut self, inode: usize, bytes: usize) {
        let inode = &mut self.inodes[inode];
        let had = inode.live.len();
        if bytes > had {
            inode.live.resize(bytes, 0);
            inode.touch(had..bytes);
        }
    }

    /// Takes room for what is about to be written or reserved.
    fn take_room(&mut self, inode: usize, range: Range<usize>) -> io::Result<()> {
        let sectors = sectors(range);
        let held = self.inodes[inode].held.range(sectors.clone()).count();
        let more = ((sectors.len() - held) * SECTOR) as u64;
        if more > 0 && self.capacity.is_some_and(|room| self.used() + more > room) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inodes[inode].held.extend(sectors);
        Ok(())
    }

    /// A sync of a file or directory that is set to fail.
    fn sync_fails(&self, path: Option<&Path>) -> bool {
        self.syncs_fail.as_ref().is_some_and(|below| path.is_some_and(|path| path.starts_with(below)))
    }

    fn path_of(&self, inode: usize) -> Option<&Path> {
        self.live.iter().find(|(_, of)| **of == inode).map(|(path, _)| path.as_path())
    }

    fn apply(names: &mut BTreeMap<PathBuf, usize>, change: &NameChange) {
        match change {
            NameChange::Link { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            NameChange::Rename { from, to, inode } => {
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), *inode);
            }
            NameChange::Unlink { path, inode } => {
                if names.get(path) == Some(inode) {
                    names.remove(path);
                }
            }
        }
    }

    fn change(&mut self, dir: PathBuf, change: NameChange) {
        State::apply(&mut self.live, &change);
        self.pending.push((dir, change));
    }
}

impl Inode {
    fn touch(&mut self, range: Range<usize>) {
        self.dirty.extend(sectors(range));
    }

    /// Gives back the room of whole sectors in a range.
    fn free(&mut self, range: Range<usize>) {
        self.held.retain(|sector| *sector < range.start.div_ceil(SECTOR) || *sector >= range.end / SECTOR);
    }

    fn sync(&mut self) {
        self.durable.resize(self.live.len(), 0);
        for sector in std::mem::take(&mut self.dirty) {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(self.live.len());
            if !range.is_empty() {
                self.durable[range.clone()].copy_from_slice(&self.live[range]);
            }
        }
    }

    fn crash(&self, keep: &mut impl FnMut() -> bool) -> Inode {
        let size = if keep() { self.live.len() } else { self.durable.len() };
        let mut after = self.durable.clone();
        after.resize(size, 0);
        for sector in &self.dirty {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(size).min(self.live.len());
            if keep() && range.start < range.end {
                after[range.clone()].copy_from_slice(&self.live[range]);
            }
        }
        // Reserved or written: no less room than before, but for what lies beyond the end.
        let held = self.held.range(..size.div_ceil(SECTOR)).copied().collect();
        let unreadable = self.unreadable.clone();
        Inode { live: after.clone(), durable: after, dirty: BTreeSet::new(), held, unreadable }
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new() -> SimDisk {
        SimDisk::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere is a failing test already; the state stays readable for its message.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mutating operations so far: writes, syncs, sizes, names.
    pub fn ops(&self) -> u64 {
        self.state().ops
    }

    /// Cuts the power at operation number `op` (as [`ops`](Self::ops) counts): it is carried out at most
    /// partly and fails, and so does everything after it.
    pub fn cut_at(&self, op: u64) {
        self.state().cut = Some(op);
    }

    /// The disk as the next boot finds it. Can be called many times with different seeds.
    pub fn crash(&self, seed: u64) -> SimDisk {
        let state = self.state();
        let mut random = Random(seed);
        // The odds are drawn once per crash, so that runs with few and with many losses both occur.
        let odds = match seed {
            0 => 0,
            1 => 8,
            _ => 1 + random.next() % 7,
        };
        let mut keep = || random.next() % 8 < odds;
        let inodes = state.inodes.iter().map(|inode| inode.crash(&mut keep)).collect();
        let mut names = state.durable.clone();
        for (_, change) in &state.pending {
            if keep() {
                State::apply(&mut names, change);
            }
        }
        let after = State {
            inodes,
            live: names.clone(),
            durable: names,
            dirs: state.dirs.clone(),
            capacity: state.capacity,
            ..State::default()
        };
        SimDisk(Arc::new(Mutex::new(after)))
    }

    /// Whether every sync fails from now on.
    pub fn fail_syncs(&self, fail: bool) {
        self.fail_syncs_below(fail.then_some(Path::new("/")));
    }

    /// Syncs of everything at or below this path fail from now on; `None`: of nothing.
    pub fn fail_syncs_below(&self, path: Option<&Path>) {
        self.state().syncs_fail = path.map(Path::to_path_buf);
    }

    /// Reading this range of a file fails from now on; `None`: it can be read.
    pub fn fail_reads(&self, path: &Path, range: Option<Range<usize>>) {
        let mut state = self.state();
        let inode = *state.live.get(path).expect("a test damages a file that exists");
        state.inodes[inode].unreadable = range;
    }

    /// Bytes of room in use.
    pub fn used_bytes(&self) -> u64 {
        self.state().used()
    }

    /// Room on the disk in bytes; `None` for endless.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// Changes one byte behind everybody's back, durably.
    pub fn corrupt(&self, path: &Path, offset: u64, change: impl FnOnce(u8) -> u8) {
        let mut state = self.state();
        let inode = *state.live.get(path).expect("a test corrupts a file that exists");
        let inode = &mut state.inodes[inode];
        let at = usize::try_from(offset).expect("files of tests fit memory");
        inode.live[at] = change(inode.live[at]);
        if at < inode.durable.len() {
            inode.durable[at] = inode.live[at];
        }
    }

    /// A file's live content.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.state();
        state.live.get(path).map(|inode| state.inodes[*inode].live.clone())
    }

    /// Puts a file there, durably, replacing one that exists.
    pub fn put(&self, path: &Path, content: Vec<u8>) {
        let mut state = self.state();
        let inode = state.inodes.len();
        let held = sectors(0..content.len()).collect();
        state.inodes.push(Inode { live: content.clone(), durable: content, held, ..Inode::default() });
        state.live.insert(path.into(), inode);
        state.durable.insert(path.into(), inode);
        state.dirs.insert(parent(path));
    }

    fn file(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let state = self.state();
        state.alive()?;
        let inode = *state.live.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }
}

impl Disk for SimDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut state = self.state();
        let cut = state.step()?;
        if !state.dirs.contains(&parent(path)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if state.live.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.change(parent(path), NameChange::Link { path: path.into(), inode });
        if cut {
            return Err(dead());
        }
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.file(path)
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        let cut = state.step()?;
        let inode = *state.live.get(from).ok_or(io::ErrorKind::NotFound)?;
        state.change(parent(to), NameChange::Rename { from: from.into(), to: to.into(), inode });
        if cut { Err(dead()) } else { Ok(()) }
    }

    fn rename_dir(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        let cut = state.step()?;
        if state.dirs.contains(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let moved = |path: &Path| path.strip_prefix(from).map(|rest| to.join(rest)).unwrap_or(path.into());
        state.dirs = state.dirs.iter().map(|dir| moved(dir)).collect();
        state.live = state.live.iter().map(|(path, inode)| (moved(path), *inode)).collect();
        state.durable = state.durable.iter().map(|(path, inode)| (moved(path), *inode)).collect();
        for (dir, change) in &mut state.pending {
            *dir = moved(dir);
            match change {
                NameChange::Link { path, .. } | NameChange::Unlink { path, .. } => *path = moved(path),
                NameChange::Rename { from, to, .. } => (*from, *to) = (moved(from), moved(to)),
            }
        }
        if cut { Err(dead()) } else { Ok(()) }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let cut = state.step()?;
        let inode = *state.live.get(path).ok_or(io::ErrorKind::NotFound)?;
        state.change(parent(path), NameChange::Unlink { path: path.into(), inode });
        if cut { Err(dead()) } else { Ok(()) }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.step()? {
            return Err(dead());
        }
        if state.sync_fails(Some(dir)) {
            return Err(io::Error::other("simulated sync failure"));
        }
        let state = &mut *state;
        let (synced, rest) = std::mem::take(&mut state.pending).into_iter().partition(|(of, _)| of == dir);
        state.pending = rest;
        let synced: Vec<_> = synced;
        for (_, change) in &synced {
            State::apply(&mut state.durable, change);
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        state.alive()?;
        if !state.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let entries = state.live.keys().chain(&state.dirs).filter(|path| path.parent() == Some(dir));
        let names: BTreeSet<_> =
            entries.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect();
        Ok(names.into_iter().collect())
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.alive()?;
        state.dirs.extend(dir.ancestors().map(Path::to_path_buf));
        Ok(())
    }

    fn room(&self, _path: &Path) -> io::Result<Option<Room>> {
        let state = self.state();
        state.alive()?;
        Ok(state
            .capacity
            .map(|total| Room { free_bytes: total.saturating_sub(state.used()), total_bytes: total }))
    }
}

struct SimFile {
    disk: SimDisk,
    inode: usize,
}

/// The sectors that a range touches.
fn sectors(range: Range<usize>) -> Range<usize> {
    if range.is_empty() { 0..0 } else { range.start / SECTOR..range.end.div_ceil(SECTOR) }
}

fn to_usize(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

impl SimFile {
    /// Counts the operation, carries it out unsynced, and fails it if the power goes here.
    fn mutate(&self, change: impl FnOnce(&mut State) -> io::Result<()>) -> io::Result<()> {
        let mut state = self.disk.state();
        let cut = state.step()?;
        change(&mut state)?;
        if cut { Err(dead()) } else { Ok(()) }
    }
}

impl File for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.state();
        state.alive()?;
        let content = &state.inodes[self.inode].live;
        let from = to_usize(offset)?.min(content.len());
        let bytes = buffer.len().min(content.len() - from);
        let bad = state.inodes[self.inode].unreadable.as_ref();
        if bad.is_some_and(|bad| bad.start < from + bytes && from < bad.end) {
            return Err(io::Error::other("simulated unreadable sector"));
        }
        buffer[..bytes].copy_from_slice(&content[from..from + bytes]);
        Ok(bytes)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let from = to_usize(offset)?;
        self.mutate(|state| {
            state.take_room(self.inode, from..from + bytes.len())?;
            state.grow(self.inode, from + bytes.len());
            let inode = &mut state.inodes[self.inode];
            inode.live[from..from + bytes.len()].copy_from_slice(bytes);
            inode.touch(from..from + bytes.len());
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.step()? {
            return Err(dead());
        }
        if state.sync_fails(state.path_of(self.inode)) {
            state.inodes[self.inode].dirty.clear();
            return Err(io::Error::other("simulated sync failure"));
        }
        state.inodes[self.inode].sync();
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        let state = self.disk.state();
        state.alive()?;
        Ok(state.inodes[self.inode].live.len() as u64)
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        let bytes = to_usize(bytes)?;
        self.mutate(|state| {
            state.grow(self.inode, bytes);
            let inode = &mut state.inodes[self.inode];
            inode.free(bytes..usize::MAX);
            // What is cut off comes back if the new size is lost, and reads as zeros if the file grows again.
            inode.touch(bytes..inode.live.len());
            inode.live.truncate(bytes);
            Ok(())
        })
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        let bytes = to_usize(bytes)?;
        self.mutate(|state| {
            state.take_room(self.inode, 0..bytes)?;
            state.grow(self.inode, bytes);
            Ok(())
        })
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        let range = to_usize(range.start)?..to_usize(range.end)?;
        self.mutate(|state| {
            let inode = &mut state.inodes[self.inode];
            let range = range.start.min(inode.live.len())..range.end.min(inode.live.len());
            inode.live[range.clone()].fill(0);
            inode.free(range.clone());
            inode.touch(range);
            Ok(())
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let state = self.disk.state();
        state.alive()?;
        let content = &state.inodes[self.inode].live;
        let from = to_usize(offset)?.min(content.len());
        let Some(start) = content[from..].iter().position(|byte| *byte != 0) else {
            return Ok(None);
        };
        let start = (from + start) / SECTOR * SECTOR;
        let end = content[start..].chunks(SECTOR).position(|sector| sector.iter().all(|byte| *byte == 0));
        let end = end.map_or(content.len(), |sectors| start + sectors * SECTOR);
        Ok(Some(start.max(from) as u64..end as u64))
    }

    fn start_writeback(&self, _range: Range<u64>) -> io::Result<()> {
        self.disk.state().alive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> SimDisk {
        let disk = SimDisk::new();
        disk.create_dir(Path::new("/d")).unwrap();
        disk
    }

    #[test]
    fn what_is_synced_stays_and_the_rest_may_go() {
        let disk = disk();
        let path = Path::new("/d/f");
        let file = disk.create(path).unwrap();
        file.write_at(&[1; 1024], 0).unwrap();
        file.sync().unwrap();
        assert!(disk.crash(0).contents(path).is_none(), "a name that was not synced is lost");
        disk.sync_dir(Path::new("/d")).unwrap();
        file.write_at(&[2; 1024], 512).unwrap();
        assert_eq!(disk.crash(0).contents(path).unwrap(), vec![1; 1024]);
        assert_eq!(disk.crash(1).contents(path).unwrap()[512..], [2; 1024]);
        let mut torn = false;
        for seed in 2..40 {
            let after = disk.crash(seed).contents(path).unwrap();
            assert_eq!(after[..512], [1; 512], "seed {seed}");
            assert_eq!(after, disk.crash(seed).contents(path).unwrap(), "seed {seed} is deterministic");
            torn |= after.len() == 1536 && (after[512] == 2) != (after[1024] == 2);
        }
        assert!(torn, "some seed tears the write between its sectors");
    }

    #[test]
    fn the_power_goes_at_the_operation_named() {
        let disk = disk();
        let file = disk.create(Path::new("/d/f")).unwrap();
        disk.cut_at(disk.ops() + 1);
        file.write_at(&[1; 512], 0).unwrap();
        assert!(file.write_at(&[2; 512], 512).is_err(), "the operation at the cut fails");
        assert!(file.read_at(&mut [0], 0).is_err(), "and everything after it");
        assert!(disk.list(Path::new("/d")).is_err());
        assert_eq!(
            disk.crash(1).contents(Path::new("/d/f")).unwrap().len(),
            1024,
            "it may have been carried out"
        );
    }

    #[test]
    fn full_disks_and_holes() {
        let disk = disk();
        disk.set_capacity(Some(4096));
        let file = disk.create(Path::new("/d/f")).unwrap();
        file.allocate(4096).unwrap();
        assert_eq!(file.write_at(&[1], 4096).unwrap_err().kind(), io::ErrorKind::StorageFull);
        file.write_at(&[1; 100], 1000).unwrap();
        assert_eq!(file.next_data(0).unwrap(), Some(512..1536));
        file.punch_hole(0..4096).unwrap();
        assert_eq!(file.next_data(0).unwrap(), None);
        // Sparse: a size takes no room, a write into a hole does.
        file.set_size(1 << 20).unwrap();
        assert_eq!(disk.used_bytes(), 0);
        file.write_at(&[1; 4096], 8192).unwrap();
        assert_eq!(file.write_at(&[1], 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.room(Path::new("/d")).unwrap().unwrap(), Room { free_bytes: 0, total_bytes: 4096 });
        file.punch_hole(8192..8704).unwrap();
        file.write_at(&[1], 0).unwrap();
    }

    #[test]
    fn what_a_failed_sync_lost_no_later_sync_brings_back() {
        let disk = disk();
        let path = Path::new("/d/f");
        let file = disk.create(path).unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        file.write_at(&[1; 1024], 0).unwrap();
        file.sync().unwrap();
        file.write_at(&[2; 512], 0).unwrap();
        disk.fail_syncs_below(Some(Path::new("/elsewhere")));
        file.sync().unwrap();
        file.write_at(&[3; 512], 0).unwrap();
        disk.fail_syncs_below(Some(Path::new("/d")));
        assert!(file.sync().is_err() && disk.sync_dir(Path::new("/d")).is_err());
        disk.fail_syncs(false);
        file.sync().unwrap();
        assert_eq!(disk.contents(path).unwrap()[..512], [3; 512], "still in the page cache");
        for seed in 0..20 {
            assert_eq!(disk.crash(seed).contents(path).unwrap()[..512], [2; 512], "seed {seed}");
        }
    }
}
