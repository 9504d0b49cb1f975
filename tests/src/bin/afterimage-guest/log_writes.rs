//! The log of the kernel's dm-log-writes target: every write in the order in which it became durable.
//!
//! ```text
//! super  0 magic (u64) | 8 version (u64) | 16 entries (u64) | 24 sector size (u32)      one sector
//! entry  0 sector | 8 sectors | 16 flags | 24 length of a mark's name, which follows    one sector
//!        then the data, unless it is a discard or a mark
//! ```
//!
//! Read from drivers/md/dm-log-writes.c. Nothing of ours is used here: it is a witness.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

struct Log {
    file: File,
    sector: u64,
    entries: u64,
    next: u64,
    at: u64,
}

struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    name: Vec<u8>,
    payload_at: u64,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].iter().take(8).rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

impl Log {
    fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut head = [0; 512];
        file.read_exact(&mut head)?;
        ensure!(u64_at(&head, 0) == MAGIC, "{} is no log of dm-log-writes", path.display());
        ensure!(u64_at(&head, 8) == 1, "version {} of its log is not known", u64_at(&head, 8));
        let sector = u64_at(&head, 24) & 0xffff_ffff;
        ensure!(sector.is_power_of_two() && (512..=4096).contains(&sector), "sector size {sector}");
        Ok(Self { file, sector, entries: u64_at(&head, 16), next: 0, at: sector })
    }

    fn entry(&mut self) -> Result<Option<Entry>> {
        if self.next == self.entries {
            return Ok(None);
        }
        let mut head = vec![0; usize::try_from(self.sector)?];
        self.file.read_exact_at(&mut head, self.at).context("read an entry")?;
        let (sectors, flags) = (u64_at(&head, 8), u64_at(&head, 16));
        let length = usize::try_from(u64_at(&head, 24))?;
        let name = if flags & MARK == 0 {
            Vec::new()
        } else {
            head.get(32..32 + length).context("a mark beyond its sector")?.to_vec()
        };
        let entry =
            Entry { sector: u64_at(&head, 0), sectors, flags, name, payload_at: self.at + self.sector };
        self.at += self.sector;
        if flags & (DISCARD | MARK) == 0 {
            self.at += sectors * self.sector;
        }
        self.next += 1;
        Ok(Some(entry))
    }
}

/// Prints the marks, and how many entries lie before each.
pub fn marks(path: &Path) -> Result<()> {
    let mut log = Log::open(path)?;
    while let Some(entry) = log.entry()? {
        if entry.flags & MARK != 0 {
            println!("{:8} {}", log.next, String::from_utf8_lossy(&entry.name));
        }
    }
    Ok(())
}

/// Brings an image, which is what the device held when the log began, to a mark.
pub fn replay(path: &Path, mark: &str, image: &Path) -> Result<()> {
    let mut log = Log::open(path)?;
    let to =
        OpenOptions::new().write(true).open(image).with_context(|| format!("open {}", image.display()))?;
    let (mut writes, mut discards, mut bytes) = (0u64, 0u64, 0u64);
    while let Some(entry) = log.entry()? {
        if entry.flags & MARK != 0 {
            if entry.name == mark.as_bytes() {
                to.sync_all()?;
                println!("replayed to {mark}: {writes} writes, {discards} discards, {bytes} bytes");
                return Ok(());
            }
            continue;
        }
        // Sectors are the log's own.
        let (at, length) = (entry.sector * log.sector, entry.sectors * log.sector);
        let mut payload = vec![0; usize::try_from(length.min(1 << 20))?];
        let mut done = 0;
        while done < length {
            let piece = usize::try_from((length - done).min(1 << 20))?;
            if entry.flags & DISCARD == 0 {
                log.file
                    .read_exact_at(&mut payload[..piece], entry.payload_at + done)
                    .context("read a write")?;
            }
            to.write_all_at(&payload[..piece], at + done)?;
            done += piece as u64;
        }
        writes += u64::from(length > 0 && entry.flags & DISCARD == 0);
        discards += u64::from(entry.flags & DISCARD != 0);
        bytes += length;
    }
    bail!("there is no mark {mark} among {} entries", log.entries)
}
