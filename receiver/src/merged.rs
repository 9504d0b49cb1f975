//! Merged undo indexes: what each of 16, 256, 4,096 … batches in a row overwrote first, sorted, searched on
//! disk.
//!
//! A view or restore that goes far back asks, for an address, which batch behind its boundary overwrote it
//! first. Asking every batch means opening every segment. A merged index of level `n` answers for 16^n
//! aligned batches at once, so that a search over a day of batches opens some tens of files, and no map of
//! the volume is built.
//!
//! Derived from the segments' own indexes, and from merged ones of the level below: a file that is missing,
//! damaged or of other segments is passed over and made anew, and the batches are asked one by one meanwhile.
//! Nothing rests on it, so its name is not synced. It goes with the first of its batches.
//!
//! `groups/NAME/merged/{level}-{first batch, 20 digits}.idx` holds pages of 4 KiB; docs/format.md has the
//! byte maps.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::extent_map::{ExtentMap, Piece};
use journal::index::{EXTENT_ZEROS, ExtentEntry};
use journal::io::{Disk, File, read_exact_at};
use journal::{GroupId, VolumeId};

use crate::undo::UndoPiece;
use crate::{Error, ErrorKind, Result};

pub(crate) mod build;
mod keep;

pub(crate) use keep::OpenIndexes;

/// Batches, or indexes of the level below, in one index.
pub(crate) const FAN: u64 = 16;
/// Levels: 16^5 batches are over 11 days at one a second.
pub(crate) const MAX_LEVEL: u8 = 5;

const MAGIC: [u8; 8] = *b"AFTRMRG1";
const VERSION: u16 = 1;
const PAGE_BYTES: usize = 4096;
const PAGE_HEAD_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
const ENTRY_BYTES: usize = 40;
/// Entries of a full page.
const PAGE_ENTRIES: usize = (PAGE_BYTES - PAGE_HEAD_BYTES - CRC_BYTES) / ENTRY_BYTES;

/// Where merged indexes of a group lie.
pub(crate) fn merged_dir(group_dir: &Path) -> PathBuf {
    group_dir.join("merged")
}

/// Which batches an index is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Node {
    /// From 1.
    pub level: u8,
    /// First batch.
    pub first: u64,
}

impl Node {
    /// Batches of an index of this level.
    pub(crate) fn span(level: u8) -> u64 {
        FAN.pow(u32::from(level))
    }

    /// The last batch.
    pub(crate) fn last(self) -> u64 {
        self.first + (Node::span(self.level) - 1)
    }

    /// Nodes of a level begin behind a multiple of their span.
    pub(crate) fn begins_at(level: u8, batch: u64) -> bool {
        (batch - 1).is_multiple_of(Node::span(level))
    }

    /// The file's name.
    pub(crate) fn file_name(self) -> String {
        format!("{}-{:020}.idx", self.level, self.first)
    }

    /// The node that a file's name means.
    pub(crate) fn of_name(name: &str) -> Option<Node> {
        let (level, first) = name.strip_suffix(".idx")?.split_once('-')?;
        let possible = |first: &u64| (1..=journal::segment::MAX_NUMBER).contains(first);
        let (level, first) = (level.parse().ok()?, first.parse::<u64>().ok().filter(possible)?);
        let node = Node { level, first };
        let is_ours = (1..=MAX_LEVEL).contains(&level) && Node::begins_at(level, first);
        (is_ours && node.file_name() == name).then_some(node)
    }
}

/// An extent, and where its old content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub batch: u64,
    pub extent: ExtentEntry,
}

impl Entry {
    fn key(&self) -> (u32, u64) {
        (self.extent.volume.0, self.extent.offset)
    }

    fn end(&self) -> (u32, u64) {
        (self.extent.volume.0, self.extent.offset.saturating_add(self.extent.length))
    }

    fn piece(&self) -> UndoPiece {
        let ExtentEntry { frame, payload_at, flags, .. } = self.extent;
        match flags & EXTENT_ZEROS {
            0 => UndoPiece::Bytes { batch: self.batch, frame, at: payload_at },
            _ => UndoPiece::Zeros,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let ExtentEntry { volume, frame, offset, length, payload_at, flags } = self.extent;
        out.extend_from_slice(&volume.0.to_le_bytes());
        out.extend_from_slice(&frame.to_le_bytes());
        for word in [offset, length, self.batch] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&payload_at.to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Entry {
        let (half, word) = (|at| u32_at(bytes, at), |at| u64_at(bytes, at));
        Entry {
            batch: word(24),
            extent: ExtentEntry {
                volume: VolumeId(half(0)),
                frame: half(4),
                offset: word(8),
                length: word(16),
                payload_at: half(32),
                flags: half(36),
            },
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The first page of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    node: Node,
    group: GroupId,
    entries: u64,
    nonce: u64,
    /// Of the nonces of its segments: batch numbers alone could be another history's.
    digest: u32,
}

impl Head {
    fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_BYTES);
        page.extend_from_slice(&MAGIC);
        page.extend_from_slice(&VERSION.to_le_bytes());
        page.extend_from_slice(&u16::from(self.node.level).to_le_bytes());
        page.extend_from_slice(&self.digest.to_le_bytes());
        page.extend_from_slice(&self.group.0);
        for word in [self.node.first, self.node.last(), self.entries, self.nonce] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        seal(page)
    }

    fn decode(
        page: &[u8],
        node: Node,
        group: GroupId,
        digest: u32,
    ) -> std::result::Result<Head, &'static str> {
        if page[..8] != MAGIC || page[8..10] != VERSION.to_le_bytes() {
            return Err("not a merged index of this version");
        }
        let head = Head { node, group, entries: u64_at(page, 48), nonce: u64_at(page, 56), digest };
        if seal(page[..PAGE_BYTES - CRC_BYTES].to_vec()) != page {
            return Err("CRC does not match");
        }
        if head.encode() != page { Err("of other batches") } else { Ok(head) }
    }
}

/// Zeros up to a page's end, and the CRC.
fn seal(mut page: Vec<u8>) -> Vec<u8> {
    page.resize(PAGE_BYTES - CRC_BYTES, 0);
    let crc = crc32fast::hash(&page);
    page.extend_from_slice(&crc.to_le_bytes());
    page
}

/// What the segments of an index are known by.
pub(crate) fn digest(nonces: impl Iterator<Item = u64>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    nonces.for_each(|nonce| hasher.update(&nonce.to_le_bytes()));
    hasher.finalize()
}

/// A merged index, open; only its head is in memory.
pub(crate) struct MergedIndex {
    file: Arc<dyn File>,
    path: PathBuf,
    head: Head,
}

impl MergedIndex {
    /// Opens an index; `digest` is that of the segments it must be of.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it is not whole, or of others.
    pub(crate) fn open(
        disk: &dyn Disk,
        dir: &Path,
        node: Node,
        group: GroupId,
        digest: u32,
    ) -> Result<MergedIndex> {
        let path = dir.join(node.file_name());
        let file = disk.open_read_own(&path).map_err(|e| Error::io(format!("open {}", path.display()), e))?;
        let mut page = vec![0; PAGE_BYTES];
        read_exact_at(&*file, &mut page, 0)
            .map_err(|e| Error::corrupt(format!("{} at byte 0: {e}", path.display())))?;
        let head = Head::decode(&page, node, group, digest)
            .map_err(|what| Error::corrupt(format!("{} at byte 0: {what}", path.display())))?;
        let index = MergedIndex { file, path, head };
        // A number of pages that the file cannot hold: what is reckoned with it would overflow.
        let bytes =
            index.file.size().map_err(|e| Error::io(format!("size of {}", index.path.display()), e))?;
        if index.pages() > bytes / PAGE_BYTES as u64 {
            let at = format!("{} at byte 0: names more entries than it holds", index.path.display());
            return Err(Error::corrupt(at));
        }
        Ok(index)
    }

    fn pages(&self) -> u64 {
        self.head.entries.div_ceil(PAGE_ENTRIES as u64)
    }

    /// The entries of a page; every byte is checked.
    fn page(&self, number: u64, entries: &mut Vec<Entry>) -> Result<()> {
        let at = (number + 1) * PAGE_BYTES as u64;
        let corrupt = |what: String| Error::corrupt(format!("{} at byte {at}: {what}", self.path.display()));
        let mut page = [0; PAGE_BYTES];
        read_exact_at(&*self.file, &mut page, at).map_err(|e| corrupt(e.to_string()))?;
        if crc32fast::hash(&page[..PAGE_BYTES - CRC_BYTES]) != u32_at(&page, PAGE_BYTES - CRC_BYTES) {
            return Err(corrupt("CRC does not match".into()));
        }
        let before = number * PAGE_ENTRIES as u64;
        let due = self.head.entries.saturating_sub(before).min(PAGE_ENTRIES as u64);
        let (found, held) = (u64::from(u32_at(&page, 0)), u64::from(u32_at(&page, 4)));
        if found != number & u64::from(u32::MAX) || u64_at(&page, 8) != self.head.nonce || held != due {
            return Err(corrupt("is another page".into()));
        }
        entries.clear();
        let all = page[PAGE_HEAD_BYTES..].chunks_exact(ENTRY_BYTES).map(Entry::decode);
        entries.extend(all.take(usize::try_from(due).expect("at most a page")));
        Ok(())
    }

    /// The first page that holds something behind (volume, offset).
    fn find(&self, volume: VolumeId, offset: u64, entries: &mut Vec<Entry>) -> Result<u64> {
        let (mut low, mut high) = (0, self.pages());
        while low < high {
            let middle = low + (high - low) / 2;
            self.page(middle, entries)?;
            if entries.last().is_some_and(|last| last.end() <= (volume.0, offset)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Lays what its batches overwrote under what `map` holds already; false where the map outgrew `most`
    /// pieces before.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming file and offset; what was laid until then is right.
    pub(crate) fn lay_under(
        &self,
        map: &mut ExtentMap<UndoPiece>,
        volume: VolumeId,
        range: &Range<u64>,
        most: usize,
    ) -> Result<bool> {
        let mut entries = Vec::new();
        for number in self.find(volume, range.start, &mut entries)?..self.pages() {
            self.page(number, &mut entries)?;
            for entry in &entries {
                if entry.key() >= (volume.0, range.end) {
                    return Ok(true);
                }
                if entry.end() > (volume.0, range.start) {
                    lay_under(map, entry.extent.offset..entry.end().1, range, entry.piece());
                }
            }
            if map.len() > most {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Lays a piece of `whole` under what `map` holds of `range`.
pub(crate) fn lay_under(
    map: &mut ExtentMap<UndoPiece>,
    whole: Range<u64>,
    range: &Range<u64>,
    piece: UndoPiece,
) {
    let clipped = whole.start.max(range.start)..whole.end.min(range.end);
    let gaps: Vec<Range<u64>> = map.gaps(clipped).collect();
    for gap in gaps {
        let mut piece = piece;
        piece.advance(gap.start - whole.start);
        map.insert(gap, piece);
    }
}

/// A refusal of the disk while an index is made costs only the index.
pub(crate) fn is_no_loss(error: &Error) -> bool {
    error.kind != ErrorKind::Sync
}

#[cfg(test)]
mod tests;
