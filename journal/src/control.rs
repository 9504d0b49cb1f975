//! Control files: a few bytes that change often and must never be half old, half new.
//!
//! Two slots of one size, usually 4 KiB; a store writes the older one and syncs, so a cut leaves at least one
//! whole. The file's size says how large a slot is: a power of two from 4 to 64 KiB. Drawn for 4 KiB:
//!
//! ```text
//!         0     1     2     3     4     5     6     7
//!    0 │ magic "AFTRCTL1"                              │
//!    8 │ sequence, rising with each store              │
//!   16 │    payload bytes      │ version=1 │     0     │
//!   24 │ payload (at most 4000), zeros to 4092         │
//! 4092 │  CRC of bytes 0..4092 │
//! ```
//! Between stores a [`TwoSlot::note`] may overwrite that older slot without a sync, over and over: news that
//! is good to have after a crash, at the price of a write to the page cache. The slot of the last store is
//! never touched by it, and the next store goes over the note.
//!
//! The file is born under another name and renamed, so a control file that exists has held a whole slot. Both
//! slots are written then, in a file that is not copied on write where that can be had: a full disk has room
//! for what comes later.
//!
//! A slot that is neither whole nor empty held a store that was cut, or one that rotted: which of the two, it
//! cannot say. The other slot is the answer then, [`TwoSlot::was_damaged`] says so to owners for which an
//! older answer is dangerous, and their next store goes over the damaged slot, so it can say in one step what
//! is in doubt.

use crate::io::{Disk, File};
use crate::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest payload of a control file with slots of the usual size.
pub const MAX_PAYLOAD_BYTES: usize = payload_bytes(SLOT_BYTES);

/// Size of a slot where nothing else is asked for.
pub const SLOT_BYTES: usize = 4096;
const MAX_SLOT_BYTES: usize = 64 << 10;
const HEADER_BYTES: usize = 24;
/// Room between the largest payload and the slot's end; the CRC stands at the end of it.
const TRAILER_BYTES: usize = 72;
const CRC_BYTES: usize = 4;
const MAGIC: [u8; 8] = *b"AFTRCTL1";
const VERSION: u16 = 1;
/// No file is stored so often; a larger number is a stranger's, and the next store could not go above it.
const MAX_SEQUENCE: u64 = u64::MAX >> 1;
const READ_ATTEMPTS: usize = 4;

/// Largest payload of a control file whose slots have this size.
pub const fn payload_bytes(slot_bytes: usize) -> usize {
    slot_bytes - HEADER_BYTES - TRAILER_BYTES
}

/// A small file that is replaced atomically.
pub struct TwoSlot {
    file: Arc<dyn File>,
    path: PathBuf,
    slot_bytes: usize,
    sequence: u64,
    /// The slot that the next store writes.
    next: u64,
    poisoned: bool,
    was_damaged: bool,
}

/// What a read of both slots found.
#[derive(Debug, PartialEq, Eq)]
pub struct Slots {
    /// The newest whole payload.
    pub payload: Vec<u8>,
    /// Offset of a slot that is neither whole nor empty: a store was cut there, or it rotted.
    pub torn_at: Option<u64>,
}

impl TwoSlot {
    /// Creates the file with its first payload; content and name are durable on return. Replaces what a cut
    /// create left behind, never a finished control file.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where the file exists; the disk's errors.
    pub fn create(disk: &Arc<dyn Disk>, path: &Path, payload: &[u8]) -> Result<TwoSlot> {
        TwoSlot::create_sized(disk, path, payload, SLOT_BYTES)
    }

    /// As [`TwoSlot::create`], with slots of `slot_bytes`: a power of two from 4 to 64 KiB.
    ///
    /// # Errors
    /// As [`TwoSlot::create`].
    pub fn create_sized(
        disk: &Arc<dyn Disk>,
        path: &Path,
        payload: &[u8],
        slot_bytes: usize,
    ) -> Result<TwoSlot> {
        assert!(is_slot_size(slot_bytes as u64), "a slot is a power of two from 4 to 64 KiB");
        let failed = |error| Error::io(format!("create control file {}", path.display()), error);
        let (dir, name) = match (path.parent(), path.file_name()) {
            (Some(dir), Some(name)) => (dir, name.to_string_lossy().into_owned()),
            _ => return Err(failed(std::io::ErrorKind::InvalidInput.into())),
        };
        let names = disk.list(dir).map_err(failed)?;
        if names.contains(&name) {
            return Err(Error::new(ErrorKind::Busy, format!("{} exists already", path.display())));
        }
        let unfinished = dir.join(format!("{name}.new"));
        if names.contains(&format!("{name}.new")) {
            disk.remove(&unfinished).map_err(failed)?;
        }
        TwoSlot::make(disk, path, &unfinished, payload, slot_bytes, 0)
    }

    /// The same file with larger slots, where it has smaller ones; `payload` is the one in force. A full disk
    /// leaves it as it is. Crash order: the new file is whole and durable before it takes the name, and holds
    /// the same payload.
    ///
    /// # Errors
    /// The disk's, but for a full one; [`ErrorKind::Sync`] is final.
    pub fn grown(self, disk: &Arc<dyn Disk>, payload: &[u8], slot_bytes: usize) -> Result<TwoSlot> {
        assert!(is_slot_size(slot_bytes as u64), "a slot is a power of two from 4 to 64 KiB");
        if self.slot_bytes >= slot_bytes {
            return Ok(self);
        }
        let mut unfinished = self.path.clone().into_os_string();
        unfinished.push(".new");
        let unfinished = PathBuf::from(unfinished);
        match disk.remove(&unfinished) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", unfinished.display()), error));
            }
            _ => {}
        }
        match TwoSlot::make(disk, &self.path, &unfinished, payload, slot_bytes, self.sequence) {
            Ok(grown) => Ok(TwoSlot { was_damaged: self.was_damaged, ..grown }),
            Err(error) if error.kind == ErrorKind::NoSpace => {
                // It may stay where it is: the next try removes it.
                let _ = disk.remove(&unfinished);
                tracing::warn!(path = %self.path.display(), %error, "no room to enlarge a control file");
                Ok(self)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the file under a name of its own, and then gives it its name; both slots are written.
    fn make(
        disk: &Arc<dyn Disk>,
        path: &Path,
        unfinished: &Path,
        payload: &[u8],
        slot_bytes: usize,
        sequence: u64,
    ) -> Result<TwoSlot> {
        let failed = |error| Error::io(format!("create control file {}", path.display()), error);
        let dir = path.parent().ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?;
        let file = disk.create_in_place(unfinished).map_err(failed)?;
        file.set_size(2 * slot_bytes as u64).map_err(failed)?;
        file.write_at(&vec![0; slot_bytes], slot_bytes as u64).map_err(failed)?;
        let (next, poisoned, was_damaged) = (0, false, false);
        let mut control =
            TwoSlot { file, path: path.into(), slot_bytes, sequence, next, poisoned, was_damaged };
        control.store(payload)?;
        disk.rename(unfinished, path).map_err(failed)?;
        disk.sync_dir(dir).map_err(|error| Error::sync(format!("sync {}", dir.display()), error))?;
        Ok(control)
    }

    /// Opens the file and returns the newest whole payload. It is durable then: a killed process may have
    /// left it in the page cache alone, and the next store overwrites the other one.
    ///
    /// # Errors
    /// [`ErrorKind::NotHeld`] where there is no such file; [`ErrorKind::Corrupt`] where neither slot is
    /// whole; [`ErrorKind::Sync`] is final.
    pub fn open(disk: &Arc<dyn Disk>, path: &Path) -> Result<(TwoSlot, Vec<u8>)> {
        let file = disk.open(path).map_err(|error| open_failed(path, error))?;
        file.sync()
            .and_then(|()| path.parent().map_or(Ok(()), |dir| disk.sync_dir(dir)))
            .map_err(|error| Error::sync(format!("sync control file {}", path.display()), error))?;
        let slot_bytes = slot_size(&*file, path)?;
        let (newest, torn_at) = read_slots(&*file, path, slot_bytes)?;
        let (slot, sequence, payload) = newest.ok_or_else(|| both_bad(path))?;
        let (was_damaged, next, poisoned) = (torn_at.is_some(), 1 - slot, false);
        let path = PathBuf::from(path);
        let slots = TwoSlot { file, path, slot_bytes, sequence, next, poisoned, was_damaged };
        if was_damaged {
            tracing::warn!(path = %slots.path.display(), offset = torn_at, "a slot of a control file is damaged");
        }
        Ok((slots, payload))
    }

    /// Whether the other slot was neither whole nor empty when the file was opened: then what was read may be
    /// older than the last store.
    pub fn was_damaged(&self) -> bool {
        self.was_damaged
    }

    /// Reads the newest whole payload without touching the file.
    ///
    /// # Errors
    /// As [`TwoSlot::open`].
    pub fn read(disk: &dyn Disk, path: &Path) -> Result<Slots> {
        let file = disk.open_read_own(path).map_err(|error| open_failed(path, error))?;
        let slot_bytes = slot_size(&*file, path)?;
        // A writer at work may be met in the middle of each slot in turn, though hardly twice.
        for _ in 0..READ_ATTEMPTS {
            if let (Some((_, _, payload)), torn_at) = read_slots(&*file, path, slot_bytes)? {
                return Ok(Slots { payload, torn_at });
            }
        }
        Err(both_bad(path))
    }

    /// The largest payload that fits.
    pub fn max_payload_bytes(&self) -> usize {
        payload_bytes(self.slot_bytes)
    }

    /// Replaces the payload; durable on return. When it fails with anything but [`ErrorKind::Sync`], the old
    /// payload is still in force and another store may be tried.
    ///
    /// # Errors
    /// [`ErrorKind::Sync`] is final; [`ErrorKind::TooLarge`] for more than a slot holds.
    pub fn store(&mut self, payload: &[u8]) -> Result<()> {
        if self.poisoned {
            let at = format!("{}: an earlier sync failed", self.path.display());
            return Err(Error::new(ErrorKind::Sync, at));
        }
        self.note(payload)?;
        self.file.sync().map_err(|error| {
            self.poisoned = true;
            Error::sync(format!("sync control file {}", self.path.display()), error)
        })?;
        self.sequence += 1;
        self.next = 1 - self.next;
        Ok(())
    }

    /// Puts `payload` in force until the next store, without waiting for the disk: after a crash it is there
    /// as a whole, or the stored one is.
    ///
    /// # Errors
    /// The disk's; the stored payload stays in force.
    pub fn note(&mut self, payload: &[u8]) -> Result<()> {
        let most = self.max_payload_bytes();
        if payload.len() > most {
            let at = format!("control file {}: {} bytes, {most} fit", self.path.display(), payload.len());
            return Err(Error::new(ErrorKind::TooLarge, at));
        }
        let slot = encode_slot(self.sequence + 1, payload, self.slot_bytes);
        self.file
            .write_at(&slot, self.next * self.slot_bytes as u64)
            .map_err(|error| Error::io(format!("write control file {}", self.path.display()), error))
    }
}

fn open_failed(path: &Path, error: std::io::Error) -> Error {
    let kind = error.kind();
    let mut failed = Error::io(format!("open control file {}", path.display()), error);
    if kind == std::io::ErrorKind::NotFound {
        failed.kind = ErrorKind::NotHeld;
    }
    failed
}

fn both_bad(path: &Path) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{}: offset 0: neither slot is whole", path.display()))
}

fn is_slot_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (SLOT_BYTES as u64..=MAX_SLOT_BYTES as u64).contains(&bytes)
}

/// The size of a slot, from the file's: a file of another size holds none that could be whole.
fn slot_size(file: &dyn File, path: &Path) -> Result<usize> {
    let size =
        file.size().map_err(|error| Error::io(format!("size of control file {}", path.display()), error))?;
    let slot = size / 2;
    usize::try_from(slot).ok().filter(|_| is_slot_size(slot) && size % 2 == 0).ok_or_else(|| both_bad(path))
}

fn encode_slot(sequence: u64, payload: &[u8], slot_bytes: usize) -> Vec<u8> {
    let mut slot = vec![0; slot_bytes];
    slot[..8].copy_from_slice(&MAGIC);
    slot[8..16].copy_from_slice(&sequence.to_le_bytes());
    let length = u32::try_from(payload.len()).expect("bounded by the slot");
    slot[16..20].copy_from_slice(&length.to_le_bytes());
    slot[20..22].copy_from_slice(&VERSION.to_le_bytes());
    slot[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
    let crc_at = slot_bytes - CRC_BYTES;
    let crc = crc32fast::hash(&slot[..crc_at]);
    slot[crc_at..].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// Sequence and payload of an intact slot; `Ok(None)` for one that is not.
fn decode_slot(slot: &[u8]) -> Result<Option<(u64, &[u8])>> {
    if slot.len() < SLOT_BYTES || slot[..8] != MAGIC {
        return Ok(None);
    }
    let crc_at = slot.len() - CRC_BYTES;
    let number = |range: std::ops::Range<usize>| {
        slot[range].iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    if number(crc_at..slot.len()) != u64::from(crc32fast::hash(&slot[..crc_at])) {
        return Ok(None);
    }
    if number(20..22) != u64::from(VERSION) {
        return Err(Error::new(ErrorKind::Unsupported, format!("control file: version {}", number(20..22))));
    }
    let length = usize::try_from(number(16..20)).unwrap_or(usize::MAX);
    let sequence = number(8..16);
    if length > payload_bytes(slot.len()) || sequence > MAX_SEQUENCE {
        return Ok(None);
    }
    Ok(Some((sequence, &slot[HEADER_BYTES..HEADER_BYTES + length])))
}

/// Slot number, sequence and payload of the newest intact slot; offset of a torn one.
type Found = (Option<(u64, u64, Vec<u8>)>, Option<u64>);

fn read_slots(file: &dyn File, path: &Path, slot_bytes: usize) -> Result<Found> {
    let mut newest: Option<(u64, u64, Vec<u8>)> = None;
    let mut torn_at = None;
    for slot in 0..2 {
        let offset = slot * slot_bytes as u64;
        let mut bytes = vec![0; slot_bytes];
        let held = file
            .read_at(&mut bytes, offset)
            .map_err(|error| Error::io(format!("read control file {}", path.display()), error))?;
        match decode_slot(&bytes[..held])? {
            Some((sequence, payload)) if newest.as_ref().is_none_or(|held| sequence > held.1) => {
                newest = Some((slot, sequence, payload.to_vec()));
            }
            Some(_) => {}
            None if held == slot_bytes && bytes.iter().all(|byte| *byte == 0) => {}
            None => torn_at = Some(offset),
        }
    }
    Ok((newest, torn_at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim_disk::SimDisk;

    fn fresh() -> (SimDisk, Arc<dyn Disk>, PathBuf) {
        let sim = SimDisk::new();
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        disk.create_dir(Path::new("/j")).unwrap();
        (sim, disk, PathBuf::from("/j/control"))
    }

    #[test]
    fn golden_bytes_of_a_slot() {
        let mut expected = [0; SLOT_BYTES];
        expected[..8].copy_from_slice(b"AFTRCTL1");
        expected[8..16].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
        expected[16] = 3;
        expected[20] = 1;
        expected[24..27].copy_from_slice(b"abc");
        let crc = crc32fast::hash(&expected[..4092]).to_le_bytes();
        expected[4092..].copy_from_slice(&crc);
        assert_eq!(encode_slot(0x0102_0304_0506_0708, b"abc", SLOT_BYTES), expected);
        assert_eq!(decode_slot(&expected).unwrap(), Some((0x0102_0304_0506_0708, &b"abc"[..])));
    }

    #[test]
    fn a_cut_at_any_operation_leaves_the_old_or_the_new_payload() {
        for cut in 0..60 {
            let (sim, disk, path) = fresh();
            let base = sim.ops();
            sim.cut_at(base + cut);
            let mut stored = None;
            let mut tried = 0;
            if let Ok(mut control) = TwoSlot::create(&disk, &path, &[0]) {
                stored = Some(0);
                for value in 1..8 {
                    tried = value;
                    if control.store(&[value; 3000]).is_err() {
                        break;
                    }
                    stored = Some(value);
                }
            }
            for seed in 0..12 {
                let after: Arc<dyn Disk> = Arc::new(sim.crash(seed));
                match (TwoSlot::open(&after, &path), stored) {
                    (Ok((mut control, payload)), _) => {
                        let value = payload[0];
                        assert!(value == tried || Some(value) == stored, "cut {cut} seed {seed}");
                        control.store(b"on").unwrap();
                        assert_eq!(TwoSlot::read(&*after, &path).unwrap().payload, b"on");
                    }
                    (Err(error), None) => {
                        assert_eq!(error.kind, ErrorKind::NotHeld);
                        TwoSlot::create(&after, &path, b"again").unwrap();
                    }
                    (Err(error), Some(_)) => panic!("cut {cut} seed {seed}: lost: {error}"),
                }
            }
        }
    }

    #[test]
    fn a_note_never_endangers_what_was_stored() {
        for cut in 0..40 {
            let (sim, disk, path) = fresh();
            let mut control = TwoSlot::create(&disk, &path, &[0; 3000]).unwrap();
            sim.cut_at(sim.ops() + cut);
            let mut stored = 0;
            let mut tried = 0;
            for value in 1..20_u8 {
                tried = value;
                let put =
                    if value % 5 == 0 { control.store(&[value; 3000]) } else { control.note(&[value; 3000]) };
                if put.is_err() {
                    break;
                }
                stored = if value % 5 == 0 { value } else { stored };
            }
            for seed in 0..12 {
                let after: Arc<dyn Disk> = Arc::new(sim.crash(seed));
                let (_, payload) = TwoSlot::open(&after, &path).unwrap();
                assert!((stored..=tried).contains(&payload[0]), "cut {cut} seed {seed}");
                assert_eq!(payload, [payload[0]; 3000], "cut {cut} seed {seed}");
            }
        }
    }

    #[test]
    fn slots_of_other_sizes_are_known_by_the_file() {
        let (_, disk, path) = fresh();
        let most = payload_bytes(32 << 10);
        let mut control = TwoSlot::create_sized(&disk, &path, &vec![1; most], 32 << 10).unwrap();
        assert_eq!(control.max_payload_bytes(), most);
        control.store(b"short").unwrap();
        let (mut control, payload) = TwoSlot::open(&disk, &path).unwrap();
        assert_eq!(payload, b"short");
        control.store(&vec![2; most]).unwrap();
        assert_eq!(TwoSlot::read(&*disk, &path).unwrap().payload, vec![2; most]);
        disk.open(&path).unwrap().set_size(3 << 12).unwrap();
        assert_eq!(TwoSlot::read(&*disk, &path).unwrap_err().kind, ErrorKind::Corrupt);
    }

    #[test]
    fn more_than_a_slot_holds_is_refused_and_changes_nothing() {
        let (_, disk, path) = fresh();
        let mut control = TwoSlot::create(&disk, &path, b"one").unwrap();
        let refused = control.store(&vec![1; MAX_PAYLOAD_BYTES + 1]).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::TooLarge);
        control.store(&vec![2; MAX_PAYLOAD_BYTES]).unwrap();
        assert_eq!(TwoSlot::read(&*disk, &path).unwrap().payload, vec![2; MAX_PAYLOAD_BYTES]);
    }

    #[test]
    fn slots_grow_and_a_cut_at_any_operation_loses_nothing() {
        for cut in 0..24 {
            let (sim, disk, path) = fresh();
            drop(TwoSlot::create(&disk, &path, b"old").unwrap());
            let (control, payload) = TwoSlot::open(&disk, &path).unwrap();
            sim.cut_at(sim.ops() + cut);
            let grown = control.grown(&disk, &payload, 64 << 10);
            for seed in 0..8 {
                let after: Arc<dyn Disk> = Arc::new(sim.crash(seed));
                let (control, payload) = TwoSlot::open(&after, &path).unwrap();
                assert_eq!(payload, b"old", "cut {cut} seed {seed}");
                let mut control = control.grown(&after, &payload, 64 << 10).unwrap();
                assert!(!control.was_damaged());
                control.store(&[3; 60_000]).unwrap();
                assert_eq!(TwoSlot::open(&after, &path).unwrap().1, [3; 60_000]);
            }
            assert!(grown.is_ok() || cut < 20, "the cuts cover a whole growth");
        }
    }

    #[test]
    fn a_damaged_slot_is_said_and_the_next_store_repairs_it() {
        let (sim, disk, path) = fresh();
        let mut control = TwoSlot::create(&disk, &path, b"one").unwrap();
        control.store(b"two").unwrap();
        drop(control);
        sim.corrupt(&path, 4096 + 30, |byte| byte ^ 1);
        let (mut control, payload) = TwoSlot::open(&disk, &path).unwrap();
        assert!(control.was_damaged() && payload == b"one");
        control.store(b"doubted").unwrap();
        drop(control);
        let (control, payload) = TwoSlot::open(&disk, &path).unwrap();
        assert!(!control.was_damaged() && payload == b"doubted");
        drop(control);
        // Now the other one rots, too: the repaired slot answers.
        sim.corrupt(&path, 30, |byte| byte ^ 1);
        assert_eq!(TwoSlot::open(&disk, &path).unwrap().1, b"doubted");
    }

    /// A store above it would wrap, and be older than what it replaces.
    #[test]
    fn a_sequence_that_nothing_goes_above_is_no_slot_although_the_crc_holds() {
        let (sim, disk, path) = fresh();
        for (far, found) in [(u64::MAX, &b"near"[..]), (MAX_SEQUENCE + 1, b"near"), (MAX_SEQUENCE, b"far")] {
            let slots = [encode_slot(3, b"near", SLOT_BYTES), encode_slot(far, b"far", SLOT_BYTES)].concat();
            sim.put(&path, slots);
            let (mut slots, payload) = TwoSlot::open(&disk, &path).unwrap();
            assert_eq!(payload, found, "sequence {far}");
            slots.store(b"next").unwrap();
        }
    }

    #[test]
    fn one_bad_slot_falls_back_and_two_are_corruption() {
        let (sim, disk, path) = fresh();
        let mut control = TwoSlot::create(&disk, &path, b"one").unwrap();
        control.store(b"two").unwrap();
        assert_eq!(TwoSlot::create(&disk, &path, b"x").err().unwrap().kind, ErrorKind::Busy);
        sim.corrupt(&path, 4096 + 30, |byte| byte ^ 1);
        let slots = TwoSlot::read(&*disk, &path).unwrap();
        assert_eq!(slots, Slots { payload: b"one".to_vec(), torn_at: Some(4096) });
        sim.corrupt(&path, 4000, |byte| byte ^ 1);
        assert_eq!(TwoSlot::read(&*disk, &path).unwrap_err().kind, ErrorKind::Corrupt);
        assert_eq!(TwoSlot::open(&disk, &path).err().unwrap().kind, ErrorKind::Corrupt);
    }

    #[test]
    fn a_failed_sync_is_final() {
        let (sim, disk, path) = fresh();
        let mut control = TwoSlot::create(&disk, &path, b"one").unwrap();
        sim.fail_syncs(true);
        assert_eq!(control.store(b"two").unwrap_err().kind, ErrorKind::Sync);
        sim.fail_syncs(false);
        assert_eq!(control.store(b"two").unwrap_err().kind, ErrorKind::Sync);
    }
}
