//! Whether a disk still holds what it held when a mark was taken, as far as the machine can prove it.
//!
//! | disk | proof |
//! |---|---|
//! | file | its modification and change times |
//! | loop device over a file | the same of that file, which every write through the loop device moves as well |
//! | other device, same attach | sectors written and discarded, of the device, and directly to the disk that it is a part of |
//! | other device, after a reboot | nothing written since, and the same first and last MiB |
//!
//! A mark is taken when everything that we wrote is durable; what is still in the page cache would move times
//! and counters later. Limits: a write from another machine, from another system that was booted in between
//! and left the ends alone, or below a device mapper target, is not seen.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::identity::loop_backing;
use super::{boot_id, system};

/// What is hashed at each end.
const END_BYTES: u64 = 1 << 20;
/// Direct reads are aligned to this, in memory and on the device.
const ALIGN: u64 = 4096;
/// How often counters of a busy disk are read until two readings agree.
const READINGS: usize = 32;

/// Whether a disk is unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unchanged {
    /// Nobody wrote to it.
    Proven,
    /// Somebody did, and how that shows.
    Changed(String),
    /// Nothing proves it, and why: its content has to be compared.
    Unknown(String),
}

/// A mark of a disk. Some 130 bytes when encoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuity {
    /// Of which boot.
    pub boot: [u8; 16],
    /// Size, bytes.
    pub size_bytes: u64,
    /// Hash of the first and the last MiB, where it was taken.
    pub ends: Option<[u8; 16]>,
    /// Of a file, or of the file behind a loop device.
    pub times: Option<Times>,
    /// Of a device.
    pub counters: Option<Counters>,
}

/// When a file was changed last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// Content, ns since 1970; others can set it.
    pub modified_ns: u64,
    /// Content or metadata; nobody can set it.
    pub changed_ns: u64,
    /// By another machine's clock: a network file system or FUSE.
    pub is_remote: bool,
    /// Others than the writers of this disk move them as well: it is a partition of a loop device.
    pub is_shared: bool,
}

/// What was written to a device since its disk appeared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Which appearance of the disk, as the kernel numbers them; 0 where it does not.
    pub sequence: u64,
    /// Sectors written and discarded.
    pub own: [u64; 2],
    /// The same to the whole disk that this is a partition of, by other ways than its partitions; zeros for a
    /// whole disk.
    pub direct: [u64; 2],
}

/// Whether the ends are read for a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// They are: up to 2 MiB, uncached where the descriptor is direct.
    Read,
    /// Those of a disk of this size, which may have grown since.
    Within(u64),
    /// They are not: no disk access.
    Skip,
}

impl Continuity {
    /// Marks the disk that a descriptor holds.
    ///
    /// # Errors
    /// It cannot be read, or is neither a file nor a block device.
    pub fn of(held: &File, ends: Ends) -> io::Result<Continuity> {
        let metadata = held.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        }
        // The ends first: reading them changes nothing, and what is written meanwhile shows below.
        let size_bytes = rustix::fs::seek(held, rustix::fs::SeekFrom::End(0))?;
        let ends = match ends {
            Ends::Read => Some(hash_ends(held, size_bytes)?),
            Ends::Within(before) => Some(hash_ends(held, before.min(size_bytes))?),
            Ends::Skip => None,
        };
        let (times, counters) = if is_device {
            let sysfs = system::sysfs(metadata.rdev());
            (times_behind(held, &sysfs), counters(&sysfs))
        } else {
            (Some(times(held)?), None)
        };
        Ok(Continuity { boot: boot_id(), size_bytes, ends, times, counters })
    }

    /// Whether nobody wrote between this mark and a later one of the same disk. Whose write it would have
    /// been does not matter: after a mark we write nothing.
    pub fn until(&self, now: &Continuity) -> Unchanged {
        let changed = |what: &str| Unchanged::Changed(what.to_owned());
        let unknown = |why: &str| Unchanged::Unknown(why.to_owned());
        if self.size_bytes != now.size_bytes {
            return changed("its size changed");
        }
        if let (Some(then), Some(now)) = (self.ends, now.ends)
            && then != now
        {
            return changed("its first or last MiB changed");
        }
        if let (Some(then), Some(now)) = (self.times, now.times) {
            return if then == now {
                Unchanged::Proven
            } else if then.is_shared || now.is_shared {
                unknown("its disk was written to")
            } else if then.modified_ns != now.modified_ns {
                changed("it was written to")
            } else {
                unknown("its change time moved: its name, its owner or its content was changed")
            };
        }
        let (Some(then), Some(later)) = (self.counters, now.counters) else {
            return unknown("the kernel keeps no statistics of it");
        };
        let is_one_boot = self.boot == now.boot && self.boot != [0; 16];
        match is_one_boot {
            true if then.sequence != later.sequence => unknown("its disk was gone meanwhile"),
            true if then.own != later.own => changed("sectors were written or discarded"),
            true if then.direct != later.direct => {
                unknown("something was written to the disk that it is a part of")
            }
            true => Unchanged::Proven,
            false if later.own != [0; 2] => changed("sectors were written or discarded since the reboot"),
            false if later.direct != [0; 2] => {
                unknown("something was written to the disk that it is a part of since the reboot")
            }
            false if self.ends.is_none() || now.ends.is_none() => unknown("the machine was rebooted"),
            false => Unchanged::Proven,
        }
    }
}

/// The times of a file.
fn times(file: &File) -> io::Result<Times> {
    let metadata = file.metadata()?;
    let ns =
        |seconds: i64, nanos: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos).cast_unsigned();
    let fs = rustix::fs::fstatfs(file)?;
    Ok(Times {
        modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
        changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        is_remote: REMOTE.contains(&i128::from(fs.f_type)),
        is_shared: false,
    })
}

/// File systems whose times are another machine's, or another program's: NFS, SMB (three kinds), FUSE, 9p,
/// Ceph, AFS, GFS2, OCFS2.
const REMOTE: [i128; 10] = [
    0x6969,
    0x517B,
    0xFE53_4D42,
    0xFF53_4D42,
    0x6573_5546,
    0x0102_1997,
    0x00C3_6400,
    0x5346_414F,
    0x0116_1970,
    0x7461_636F,
];

/// The times of the file behind a loop device, or behind the one that this is a partition of.
fn times_behind(held: &File, sysfs: &Path) -> Option<Times> {
    let whole = system::whole_disk(sysfs);
    let disk = whole.as_deref().unwrap_or(sysfs);
    if !disk.join("loop").exists() {
        return None;
    }
    let (_, file) = loop_backing(held, disk)?;
    let mut times = times(&file?).ok()?;
    times.is_shared = whole.is_some();
    Some(times)
}

/// What was written to a device; `None` where the kernel does not tell, or the disk is too busy to be read.
fn counters(sysfs: &Path) -> Option<Counters> {
    let whole = system::whole_disk(sysfs);
    let disk = whole.as_deref().unwrap_or(sysfs);
    let sequence = std::fs::read_to_string(disk.join("diskseq")).unwrap_or_default();
    let (own, direct) = match &whole {
        None => (written(sysfs)?, [0; 2]),
        Some(whole) => directly(whole, sysfs)?,
    };
    Some(Counters { sequence: sequence.trim().parse().unwrap_or(0), own, direct })
}

/// Of a partition: what was written to it, and what to its disk by other ways than the partitions. The disk's
/// counters hold those of all its partitions; read until nothing moves, since they are no one instant's.
fn directly(whole: &Path, partition: &Path) -> Option<([u64; 2], [u64; 2])> {
    let partitions = system::partitions(whole);
    let sum = || {
        let mut sum = [0_u64; 2];
        for partition in &partitions {
            let [written, discarded] = written(partition)?;
            sum = [sum[0].wrapping_add(written), sum[1].wrapping_add(discarded)];
        }
        Some(sum)
    };
    for _ in 0..READINGS {
        let (own, before, all) = (written(partition)?, sum()?, written(whole)?);
        if before == sum()? && all == written(whole)? {
            return Some((own, [all[0].wrapping_sub(before[0]), all[1].wrapping_sub(before[1])]));
        }
    }
    None
}

/// Sectors written and discarded since the disk appeared: fields of the kernel's block/stat.
fn written(sysfs: &Path) -> Option<[u64; 2]> {
    let stat = std::fs::read_to_string(sysfs.join("stat")).ok()?;
    let mut fields = stat.split_whitespace();
    let written = fields.nth(6)?.parse().ok()?;
    let discarded = fields.nth(6).map_or(Some(0), |field| field.parse().ok())?;
    Some([written, discarded])
}

/// Hash of the first and the last MiB.
fn hash_ends(held: &File, size_bytes: u64) -> io::Result<[u8; 16]> {
    let length = END_BYTES.min(size_bytes);
    let align = usize::try_from(ALIGN).unwrap_or(4096);
    let mut memory = vec![0; usize::try_from(length).unwrap_or(0) + align];
    let from = memory.as_ptr().align_offset(align).min(align);
    let mut hash = Xxh3::new();
    for offset in [0, (size_bytes - length) / ALIGN * ALIGN] {
        let bytes = usize::try_from((size_bytes - offset).min(length)).unwrap_or(0);
        let into = &mut memory[from..from + bytes];
        held.read_exact_at(into, offset)?;
        hash.update(into);
    }
    Ok(hash.digest128().to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(file: &File) -> Continuity {
        Continuity::of(file, Ends::Read).unwrap()
    }

    fn is_changed(found: &Unchanged) -> bool {
        matches!(found, Unchanged::Changed(_))
    }

    fn is_unknown(found: &Unchanged) -> bool {
        matches!(found, Unchanged::Unknown(_))
    }

    #[test]
    fn a_file_is_unchanged_until_written_and_unknown_when_only_its_metadata_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        let then = mark(&file);
        file.read_exact_at(&mut [0; 512], 0).unwrap();
        assert_eq!(then.until(&mark(&file)), Unchanged::Proven);
        // The clock of a file system has a grain.
        let written = loop {
            file.write_at(b"x", 4 << 20).unwrap();
            let written = mark(&file);
            if written.times != then.times {
                break written;
            }
        };
        assert!(is_changed(&then.until(&written)), "in its middle");
        assert_eq!(then.ends, written.ends);
        let modified =
            std::time::UNIX_EPOCH + std::time::Duration::from_nanos(then.times.unwrap().modified_ns);
        file.set_modified(modified).unwrap();
        assert!(is_unknown(&then.until(&mark(&file))), "its modification time was set back");
        let written = mark(&file);
        file.set_len(9 << 20).unwrap();
        assert!(is_changed(&then.until(&mark(&file))));
        let within = |size_bytes| Continuity::of(&file, Ends::Within(size_bytes)).unwrap().ends;
        assert_eq!(within(8 << 20), written.ends, "the ends of the disk before it grew");
        file.write_at(b"x", (8 << 20) - 1).unwrap();
        assert_ne!(within(8 << 20), written.ends);
        assert_eq!(within(10 << 20), mark(&file).ends, "a disk that shrank has only its own");
    }

    #[test]
    fn a_device_is_unchanged_when_nobody_wrote_in_either_boot() {
        let counters = |own, direct| Some(Counters { sequence: 5, own, direct });
        let of = |boot, counters| Continuity {
            boot: [boot; 16],
            size_bytes: 1 << 20,
            ends: Some([2; 16]),
            times: None,
            counters,
        };
        let then = of(1, counters([7, 1], [3, 0]));
        assert_eq!(then.until(&then), Unchanged::Proven);
        let rebooted = of(2, counters([0, 0], [0, 0]));
        assert_eq!(then.until(&rebooted), Unchanged::Proven);
        let ends = |ends| Continuity { ends, ..rebooted.clone() };
        for changed in [
            of(1, counters([8, 1], [3, 0])),
            of(1, counters([7, 2], [3, 0])),
            of(2, counters([8, 0], [0, 0])),
            ends(Some([3; 16])),
            Continuity { size_bytes: 2 << 20, ..then.clone() },
        ] {
            assert!(is_changed(&then.until(&changed)), "{changed:?}");
        }
        let another = Some(Counters { sequence: 6, own: [7, 1], direct: [3, 0] });
        for unknown in [
            of(1, counters([7, 1], [4, 0])),
            of(2, counters([0, 0], [1, 0])),
            of(1, another),
            of(1, None),
            ends(None),
        ] {
            assert!(is_unknown(&then.until(&unknown)), "{unknown:?}");
        }
    }

    #[test]
    fn statistics_are_read_by_their_place_and_partitions_are_taken_off_their_disk() {
        let dir = tempfile::tempdir().unwrap();
        let put = |at: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(at)).unwrap();
            std::fs::write(dir.path().join(at).join("stat"), text).unwrap();
        };
        put("", "1 2 3 4 5 6 777 8 9 10 11 12 13 888 15 16 17\n");
        assert_eq!(written(dir.path()), Some([777, 888]));
        for (name, text) in
            [("p1", "1 2 3 4 5 6 70 8 9 10 11 12 13 8\n"), ("p2", "1 2 3 4 5 6 7 8 9 10 11\n")]
        {
            put(name, text);
            std::fs::write(dir.path().join(name).join("partition"), "1").unwrap();
        }
        assert_eq!(written(&dir.path().join("p2")), Some([7, 0]), "a kernel that does not count discards");
        let found = counters(&dir.path().join("p1")).unwrap();
        assert_eq!((found.own, found.direct), ([70, 8], [700, 880]));
    }
}
