// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! What a device-mapper device is made of, as the kernel tells it: its table, and those of the mapped devices
//! below it.
//!
//! A table can be loaded anew under a file system in use, and then lead to other disks. The hook above it
//! sees every write all the same, but not that what stands there was exchanged. So a table that is not known
//! to lead to the same content is a reason to look at all of it.

use super::error::{Error, ErrorKind};
use rustix::fs::{major, makedev, minor};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::fs::{self, File};
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::path::{Path, PathBuf};
use std::string::{String, ToString as _};
use std::vec::Vec;

/// Where tables are asked for.
const CONTROL: &str = "/dev/mapper/control";
/// Layers that are looked through.
const DEPTH: u32 = 16;
/// Bytes of an answer that a table must fit in.
const ANSWER: u32 = 1 << 20;
/// `DM_STATUS_TABLE_FLAG` and `DM_NOFLUSH_FLAG`: the table, and without waiting for writes.
const FLAGS: u32 = 1 << 4 | 1 << 11;
/// `DM_BUFFER_FULL_FLAG`.
const FULL: u32 = 1 << 8;
/// `struct dm_ioctl` up to its data, and `struct dm_target_spec`.
const HEADER: u32 = 312;
const SPEC: usize = 40;
/// `DM_TABLE_STATUS`.
const TABLE_STATUS: Opcode = opcode::read_write::<[u8; HEADER as usize]>(0xfd, 12);

#[repr(C, align(8))]
struct Answer([u8; ANSWER as usize]);

/// One target of a table. Its parameters can hold a key, so only their hash is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    first_sector: u64,
    sectors: u64,
    kind: String,
    parameters: u64,
}

/// The tables of a mapped device and of those below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    own: Vec<Target>,
    /// By device number, in its order.
    below: Vec<(u64, Vec<Target>)>,
}

impl Tables {
    /// Those of the device with this number; `None` where it is no mapped device.
    ///
    /// # Errors
    /// The kernel does not tell them.
    pub fn of(rdev: u64) -> Result<Option<Self>, Error> {
        let sysfs = sysfs(rdev);
        if !sysfs.join("dm").exists() {
            return Ok(None);
        }
        let control = File::options().read(true).write(true).open(CONTROL).map_err(failed)?;
        let mut tables = Self { own: table(&control, rdev)?, below: Vec::new() };
        below(&control, &sysfs, DEPTH, &mut tables.below)?;
        tables.below.sort_by_key(|(number, _)| *number);
        tables.below.dedup();
        Ok(Some(tables))
    }

    /// Whether what stood on the device stands there still: the same tables, or a longer one of its own.
    pub fn is_kept_by(&self, now: &Self) -> bool {
        let (Some((last, before)), Some(same)) = (self.own.split_last(), now.own.get(..self.own.len()))
        else {
            return self == now;
        };
        let lengthened = same.split_last().is_some_and(|(now_last, now_before)| {
            now_before == before && (now_last == last || last.is_lengthened_to(now_last))
        });
        // What came with the growth may stand on others.
        lengthened && self.below.iter().all(|then| now.below.contains(then))
    }
}

impl Target {
    /// Whose mapping of a sector does not depend on its length.
    fn is_lengthened_to(&self, now: &Self) -> bool {
        let grown = Self { sectors: now.sectors, ..self.clone() };
        grown == *now && now.sectors > self.sectors && matches!(self.kind.as_str(), "linear" | "striped")
    }
}

fn failed(source: std::io::Error) -> Error {
    Error { kind: ErrorKind::Io, at: PathBuf::from(CONTROL), source: Some(source) }
}

fn sysfs(rdev: u64) -> PathBuf {
    PathBuf::from(std::format!("/sys/dev/block/{}:{}", major(rdev), minor(rdev)))
}

/// Tables of the mapped devices that a device stands on.
fn below(control: &File, sysfs: &Path, depth: u32, to: &mut Vec<(u64, Vec<Target>)>) -> Result<(), Error> {
    for entry in fs::read_dir(sysfs.join("slaves")).into_iter().flatten().flatten() {
        let slave = entry.path();
        let number = fs::read_to_string(slave.join("dev")).unwrap_or_default();
        let parsed =
            number.trim().split_once(':').and_then(|(a, b)| Some(makedev(a.parse().ok()?, b.parse().ok()?)));
        if let Some(rdev) = parsed.filter(|_| depth > 0 && slave.join("dm").exists()) {
            to.push((rdev, table(control, rdev)?));
            below(control, &slave, depth - 1, to)?;
        }
    }
    Ok(())
}

fn table(control: &File, rdev: u64) -> Result<Vec<Target>, Error> {
    let mut answer = std::boxed::Box::new(Answer([0; ANSWER as usize]));
    let bytes = &mut answer.0;
    for (at, word) in [(0, 4), (12, ANSWER), (16, HEADER)] {
        put(bytes, at, word);
    }
    put(bytes, 28, FLAGS);
    // As the kernel's `huge_encode_dev`.
    let (major, minor) = (u64::from(major(rdev)), u64::from(minor(rdev)));
    let number = minor & 0xff | major << 8 | (minor & !0xff) << 12;
    bytes[40..48].copy_from_slice(&number.to_le_bytes());
    // SAFETY: the call reads and writes as many bytes as the argument says at 12, which is its length.
    unsafe { ioctl(control, Updater::<TABLE_STATUS, Answer>::new(&mut answer)) }
        .map_err(|errno| failed(errno.into()))?;
    let bytes = &answer.0[..];
    if get(bytes, 28) & FULL != 0 {
        return Err(failed(Errno::TOOBIG.into()));
    }
    targets(bytes).ok_or_else(|| failed(Errno::BADMSG.into()))
}

fn put(bytes: &mut [u8], at: usize, word: u32) {
    bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

fn get(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// The targets of an answer.
fn targets(bytes: &[u8]) -> Option<Vec<Target>> {
    let start = usize::try_from(get(bytes, 16)).ok()?;
    let mut targets = Vec::new();
    let mut at = start;
    for _ in 0..get(bytes, 20) {
        let spec = bytes.get(at..at.checked_add(SPEC)?)?;
        let word =
            |at: usize| spec.get(at..at + 8).and_then(|word| word.try_into().ok()).map(u64::from_le_bytes);
        let text = bytes.get(at + SPEC..)?;
        let parameters = text.get(..text.iter().position(|byte| *byte == 0)?)?;
        let kind = spec.get(24..)?.split(|byte| *byte == 0).next()?;
        targets.push(Target {
            first_sector: word(0)?,
            sectors: word(8)?,
            kind: String::from_utf8_lossy(kind).to_string(),
            parameters: BuildHasherDefault::<DefaultHasher>::default().hash_one(parameters),
        });
        // From the first one's place on.
        at = start.checked_add(usize::try_from(get(spec, 20)).ok()?)?;
    }
    Some(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(first_sector: u64, sectors: u64, kind: &str, parameters: u64) -> Target {
        Target { first_sector, sectors, kind: kind.to_string(), parameters }
    }

    #[test]
    fn growth_keeps_the_content_and_anything_else_does_not() {
        let then = Tables {
            own: std::vec![target(0, 8, "linear", 1), target(8, 8, "linear", 2)],
            below: std::vec![(5, std::vec![target(0, 99, "crypt", 3)])],
        };
        assert!(then.is_kept_by(&then));
        let mut grown = then.clone();
        grown.own[1].sectors = 16;
        assert!(then.is_kept_by(&grown) && !grown.is_kept_by(&then), "a last segment that was lengthened");
        grown.own.push(target(24, 8, "linear", 9));
        grown.below.push((6, std::vec![target(0, 8, "linear", 1)]));
        assert!(then.is_kept_by(&grown), "and one more, on another device");
        for change in [
            |now: &mut Tables| now.own[0].parameters = 7,
            |now: &mut Tables| now.own[1].kind = "error".to_string(),
            |now: &mut Tables| now.own[0].sectors = 4,
            |now: &mut Tables| drop(now.own.pop()),
            |now: &mut Tables| now.own.clear(),
            |now: &mut Tables| now.below[0].1[0].parameters = 4,
            |now: &mut Tables| now.below.clear(),
        ] {
            let mut now = then.clone();
            change(&mut now);
            assert!(!then.is_kept_by(&now), "{now:?}");
        }
        let mut mirrored = then.clone();
        (mirrored.own[1].kind, mirrored.own[1].sectors) = ("mirror".to_string(), 16);
        assert!(!then.is_kept_by(&mirrored));
    }

    #[test]
    fn an_answer_of_the_kernel_is_read() {
        let mut bytes = std::vec![0; 600];
        put(&mut bytes, 16, 312);
        put(&mut bytes, 20, 2);
        for (at, first, sectors, next, kind, parameters) in
            [(312, 0u64, 8u64, 64, "linear", "252:0 2048"), (376, 8, 16, 128, "error", "")]
        {
            bytes[at..at + 8].copy_from_slice(&first.to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&sectors.to_le_bytes());
            put(&mut bytes, at + 20, next);
            bytes[at + 24..at + 24 + kind.len()].copy_from_slice(kind.as_bytes());
            bytes[at + 40..at + 40 + parameters.len()].copy_from_slice(parameters.as_bytes());
        }
        let read = targets(&bytes).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].first_sector, read[0].sectors, read[0].kind.as_str()), (0, 8, "linear"));
        assert_eq!((read[1].first_sector, read[1].sectors, read[1].kind.as_str()), (8, 16, "error"));
        assert_ne!(read[0].parameters, read[1].parameters);
        put(&mut bytes, 20, 3);
        assert_eq!(targets(&bytes[..450]), None, "cut off");
        assert_eq!(Tables::of(makedev(1, 3)).unwrap(), None, "no mapped device");
    }
}
