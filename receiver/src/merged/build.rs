//! Making a merged index: sorted streams of extents, the oldest on top, merged in one pass in bounded memory.

use std::path::Path;
use std::sync::Arc;

use journal::GroupId;
use journal::index::{EXTENT_ZEROS, SegmentIndex};
use journal::io::{Disk, File, random_u64};

use super::{Entry, Head, MergedIndex, Node, PAGE_BYTES, PAGE_ENTRIES, seal};
use crate::undo::{UndoSummary, damage};
use crate::{Error, Result};

/// Bytes written at once.
const WRITE_BYTES: usize = 256 << 10;
/// Segments with a larger index are not merged: they would have to be in memory.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// What an index is made of, the oldest first.
pub(crate) enum Parts<'a> {
    /// The segments of a first level.
    Segments(&'a [UndoSummary]),
    /// The indexes of the level below.
    Merged(&'a [Arc<MergedIndex>]),
    /// Extents themselves.
    #[cfg(test)]
    Entries(Vec<Vec<Entry>>),
}

/// One sorted stream of disjoint extents.
pub(crate) struct Stream<'a> {
    /// Entries read and not used up, the next one last.
    ready: Vec<Entry>,
    more: Option<(&'a MergedIndex, u64)>,
}

impl Stream<'_> {
    /// The extents of an undo segment; `None` where its index is larger than `most`.
    pub(crate) fn of(disk: &dyn Disk, summary: &UndoSummary, most: u64) -> Result<Option<Stream<'static>>> {
        let index = SegmentIndex::open(disk, &summary.path).map_err(damage)?;
        if index.footer_bytes() > most {
            return Ok(None);
        }
        let batch = summary.number;
        let mut ready: Vec<Entry> = index.extents().map(|extent| Entry { batch, extent }).collect();
        ready.reverse();
        Ok(Some(Stream { ready, more: None }))
    }

    fn head(&mut self) -> Result<Option<Entry>> {
        if self.ready.is_empty()
            && let Some((index, page)) = &mut self.more
            && *page < index.pages()
        {
            index.page(*page, &mut self.ready)?;
            self.ready.reverse();
            *page += 1;
        }
        let head = self.ready.last().copied();
        // Each step passes its piece: one of no length, which nobody writes, would never be passed.
        match head.filter(|entry| entry.extent.length == 0) {
            Some(empty) => {
                Err(Error::corrupt(format!("undo of batch {}: an extent of no length", empty.batch)))
            }
            None => Ok(head),
        }
    }

    /// Drops everything before a place.
    fn pass(&mut self, to: (u32, u64)) -> Result<()> {
        while let Some(mut entry) = self.head()?.filter(|entry| entry.key() < to) {
            self.ready.pop();
            if entry.end() > to {
                let passed = to.1 - entry.extent.offset;
                entry.extent.offset = to.1;
                entry.extent.length -= passed;
                if entry.extent.flags & EXTENT_ZEROS == 0 {
                    let passed = u32::try_from(passed).map_err(|_| overlong(&entry))?;
                    entry.extent.payload_at =
                        entry.extent.payload_at.checked_add(passed).ok_or_else(|| overlong(&entry))?;
                }
                self.ready.push(entry);
                break;
            }
        }
        Ok(())
    }
}

fn overlong(entry: &Entry) -> Error {
    Error::corrupt(format!("undo of batch {}: an extent is longer than its frame", entry.batch))
}

/// Makes the index of `node` from its parts; whole when it has its name. `None` where a part is too large for
/// it.
///
/// # Errors
/// Damage in a part; the disk's. Nothing is lost by either.
pub(crate) fn build(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    group: GroupId,
    node: Node,
    digest: u32,
    parts: &Parts<'_>,
) -> Result<Option<()>> {
    let mut streams = Vec::new();
    match parts {
        Parts::Segments(summaries) => {
            for summary in *summaries {
                let Some(stream) = Stream::of(&**disk, summary, MAX_INDEX_BYTES)? else { return Ok(None) };
                streams.push(stream);
            }
        }
        #[cfg(test)]
        Parts::Entries(entries) => {
            let ready = entries.iter().map(|entries| entries.iter().rev().copied().collect());
            streams.extend(ready.map(|ready| Stream { ready, more: None }));
        }
        Parts::Merged(indexes) => {
            streams
                .extend(indexes.iter().map(|index| Stream { ready: Vec::new(), more: Some((&**index, 0)) }));
        }
    }
    let tmp = dir.join(format!("{}.tmp", node.file_name()));
    let written = write(disk, &tmp, group, node, digest, &mut streams);
    let named = written.and_then(|()| {
        let path = dir.join(node.file_name());
        disk.rename(&tmp, &path).map_err(|e| Error::io(format!("rename to {}", path.display()), e))
    });
    if named.is_err() {
        // Best effort: what stays is removed at the next open.
        let _ = disk.remove(&tmp);
    }
    named.map(Some)
}

fn write(
    disk: &Arc<dyn Disk>,
    tmp: &Path,
    group: GroupId,
    node: Node,
    digest: u32,
    streams: &mut [Stream<'_>],
) -> Result<()> {
    let failed = |e| Error::io(format!("write {}", tmp.display()), e);
    match disk.remove(tmp) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let file = disk.create(tmp).map_err(failed)?;
    let nonce = random_u64().map_err(failed)?;
    let mut pages =
        Pages { file, nonce, held: Vec::new(), out: Vec::new(), at: PAGE_BYTES as u64, entries: 0 };
    let mut open: Option<Entry> = None;
    while let Some(piece) = next_piece(streams)? {
        // Neighbours of one source are joined again where an older batch that lay between them has ended.
        match &mut open {
            Some(before) if joins(before, &piece) => before.extent.length += piece.extent.length,
            Some(before) => {
                pages.push(before).map_err(failed)?;
                *before = piece;
            }
            None => open = Some(piece),
        }
    }
    if let Some(last) = open {
        pages.push(&last).map_err(failed)?;
    }
    pages.finish().map_err(failed)?;
    let head = Head { node, group, entries: pages.entries, nonce, digest };
    pages.file.write_at(&head.encode(), 0).map_err(failed)?;
    // Whole before it has its name. A sync that fails here loses nothing that anybody relies on.
    pages.file.sync().map_err(failed)
}

fn joins(before: &Entry, next: &Entry) -> bool {
    let (a, b) = (&before.extent, &next.extent);
    let zeros = |flags: u32| flags & EXTENT_ZEROS != 0;
    let follows = before.end() == next.key();
    let same_bytes = before.batch == next.batch
        && a.frame == b.frame
        && u64::from(a.payload_at) + a.length == u64::from(b.payload_at);
    follows && (zeros(a.flags) == zeros(b.flags)) && (zeros(a.flags) || same_bytes)
}

/// The next stretch in order, from the oldest stream that covers it.
pub(crate) fn next_piece(streams: &mut [Stream<'_>]) -> Result<Option<Entry>> {
    let mut heads = Vec::with_capacity(streams.len());
    for stream in &mut *streams {
        heads.push(stream.head()?);
    }
    let Some(at) = heads.iter().flatten().map(Entry::key).min() else { return Ok(None) };
    let covers = |head: &Option<Entry>| head.is_some_and(|entry| entry.key() == at);
    let winner = heads.iter().position(covers).expect("one of them begins there");
    let mut piece = heads[winner].expect("it has a head");
    // Up to where an older one begins.
    let older = heads[..winner].iter().flatten().map(Entry::key).min();
    let end = older.map_or(piece.end(), |older| piece.end().min(older));
    piece.extent.length = end.1 - piece.extent.offset;
    for stream in streams {
        stream.pass(end)?;
    }
    Ok(Some(piece))
}

/// Entries on their way into pages.
struct Pages {
    file: Arc<dyn File>,
    nonce: u64,
    held: Vec<Entry>,
    out: Vec<u8>,
    at: u64,
    entries: u64,
}

impl Pages {
    fn push(&mut self, entry: &Entry) -> std::io::Result<()> {
        self.held.push(*entry);
        self.entries += 1;
        if self.held.len() == PAGE_ENTRIES { self.close_page() } else { Ok(()) }
    }

    fn close_page(&mut self) -> std::io::Result<()> {
        let number = self.at / PAGE_BYTES as u64 - 1 + (self.out.len() / PAGE_BYTES) as u64;
        let mut page = Vec::with_capacity(PAGE_BYTES);
        let number = u32::try_from(number & u64::from(u32::MAX)).expect("cut to 32 bits");
        page.extend_from_slice(&number.to_le_bytes());
        page.extend_from_slice(&u32::try_from(self.held.len()).expect("at most a page").to_le_bytes());
        page.extend_from_slice(&self.nonce.to_le_bytes());
        self.held.drain(..).for_each(|entry| entry.encode(&mut page));
        self.out.extend_from_slice(&seal(page));
        if self.out.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.write_at(&self.out, self.at)?;
        self.at += self.out.len() as u64;
        self.out.clear();
        Ok(())
    }

    fn finish(&mut self) -> std::io::Result<()> {
        if !self.held.is_empty() {
            self.close_page()?;
        }
        self.flush()
    }
}
