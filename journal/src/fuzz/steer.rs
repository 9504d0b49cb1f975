//! Steered damage: an input changes numbers of whole, right files, and then every checksum is made right
//! again.
//!
//! Bytes that only break a CRC test the CRC. What comes behind it is met by files that a program of our own
//! could have sealed and never would: so the input picks a structure and a field, and gives it another
//! number; or moves a number everywhere it stands (so that lsns stay dense, far away); or cuts, doubles and
//! renames. Then CRCs are closed, from the inside out, and chain values follow what they commit to: a value
//! that was some frame's is replaced by that frame's new one wherever it stands.

use crate::frame::{self, FrameHeader};
use crate::{Epoch, EpochId, Lineage, SECTOR_BYTES, segment};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Files by path.
pub type Files = BTreeMap<PathBuf, Vec<u8>>;

/// The most changes that one input makes.
const MAX_CHANGES: usize = 16;
/// The longest file that an input makes.
const MAX_FILE_BYTES: usize = 256 << 10;
const TRAILER_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;
/// Numbers at which something ends.
const EDGES: [u64; 12] = [
    0,
    1,
    u64::MAX,
    1 << 63,
    (1 << 63) - 1,
    (1 << 63) - 2,
    1 << 62,
    segment::MAX_NUMBER,
    segment::MAX_NUMBER + 1,
    1 << 40,
    u32::MAX as u64,
    segment::MAX_BYTES,
];

/// What is left of an input.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// The next byte; 0 behind the end.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, count: usize) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()])) % count.max(1)
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number to put where `old` stood.
    fn number(&mut self, old: u64) -> u64 {
        match usize::from(self.byte()) % 20 {
            at if at < EDGES.len() => EDGES[at],
            12 => old.wrapping_add(1),
            13 => old.wrapping_sub(1),
            14 => old.wrapping_add(SECTOR_BYTES as u64),
            15 => old ^ 1 << (self.byte() % 64),
            16 | 17 => u64::from(self.byte()),
            _ => self.word(),
        }
    }
}

/// What stands at an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Header,
    Frame,
    Mark,
    Footer,
    Trailer,
    /// A slot of so many bytes.
    Slot(usize),
    Page,
}

impl Kind {
    /// Where a position stands in it.
    fn positions(self) -> &'static [usize] {
        match self {
            Kind::Header => &[56],
            Kind::Mark => &[48],
            Kind::Footer => &[64],
            // Of the journal's state; other payloads have other bytes there, which are hardly a chain value.
            Kind::Slot(_) => &[64, 120],
            Kind::Frame | Kind::Trailer | Kind::Page => &[],
        }
    }
}

/// What a file is made of, by rising offset.
fn structures(content: &[u8]) -> Vec<(usize, Kind)> {
    let starts = |at: usize, magic: &[u8]| content.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let slot = content.len() / 2;
    if starts(0, b"AFTRCTL1") || starts(slot, b"AFTRCTL1") && slot >= PAGE_BYTES {
        return vec![(0, Kind::Slot(slot)), (slot, Kind::Slot(slot))];
    }
    if starts(0, b"AFTRMRG1") {
        return (0..content.len() / PAGE_BYTES).map(|page| (page * PAGE_BYTES, Kind::Page)).collect();
    }
    let mut found = Vec::new();
    for at in (0..content.len()).step_by(SECTOR_BYTES) {
        let kinds = [
            (b"AFTRSEG1", Kind::Header),
            (b"AFTRFRM1", Kind::Frame),
            (b"AFTRMRK1", Kind::Mark),
            (b"AFTRIDX1", Kind::Footer),
        ];
        found.extend(kinds.iter().find(|(magic, _)| starts(at, *magic)).map(|(_, kind)| (at, *kind)));
        let trailer = at + SECTOR_BYTES - TRAILER_BYTES;
        if starts(trailer, b"AFTREND1") {
            found.push((trailer, Kind::Trailer));
        }
    }
    found
}

/// Changes files as the input says, and seals them again.
pub fn steer(files: &mut Files, input: &mut Input<'_>) {
    let before = files.clone();
    let links = input.byte();
    for _ in 0..usize::from(input.byte()) % (MAX_CHANGES + 1) {
        if files.is_empty() {
            return;
        }
        change(files, input);
    }
    reseal(files, &before, links & 7 == 7);
}

fn change(files: &mut Files, input: &mut Input<'_>) {
    let op = input.byte() % 16;
    let Some(path) = files.keys().nth(input.below(files.len())).cloned() else { return };
    let Some(content) = files.get_mut(&path) else { return };
    match op {
        // One field of one structure, as it is most often.
        0..=7 => {
            let places = structures(content);
            let start = places.get(input.below(places.len())).map_or(0, |(at, _)| *at);
            let width = [8, 8, 4, 2, 1][usize::from(input.byte()) % 5];
            let at = start + usize::from(input.byte()) * width.min(4);
            let Some(field) = content.get_mut(at..at + width) else { return };
            let old = field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            field.copy_from_slice(&input.number(old).to_le_bytes()[..width]);
        }
        // Any byte.
        8 => {
            let at = input.below(content.len());
            let value = input.byte();
            if let Some(byte) = content.get_mut(at) {
                *byte = value;
            }
        }
        // The same number everywhere, or a stretch of numbers moved together.
        9 | 10 => {
            let places = structures(content);
            let start = places.get(input.below(places.len())).map_or(0, |(at, _)| *at);
            let at = start + usize::from(input.byte() % 64) * 8;
            let Some(old) = word_at(content, at) else { return };
            let (new, span) = (input.number(old), if op == 9 { 0 } else { u64::from(input.byte()) });
            let by = new.wrapping_sub(old);
            for word in files.values_mut().flat_map(|content| content.chunks_exact_mut(8)) {
                let value = word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                if value >= old && value - old <= span {
                    word.copy_from_slice(&value.wrapping_add(by).to_le_bytes());
                }
            }
        }
        11 => content.truncate(input.below(content.len() / SECTOR_BYTES + 1) * SECTOR_BYTES),
        12 => content.resize((content.len() + input.below(512) * SECTOR_BYTES).min(MAX_FILE_BYTES), 0),
        // A structure over another one.
        13 => {
            let places = structures(content);
            let mut place = || places.get(input.below(places.len())).map_or(0, |(at, _)| *at);
            let (from, to) = (place(), place());
            let bytes = SECTOR_BYTES.min(content.len() - from.max(to));
            content.copy_within(from..from + bytes, to);
        }
        14 => {
            files.remove(&path);
        }
        // Under another number, in the name and in the header.
        _ => {
            let keep = input.byte() & 1 == 1;
            let number = input.number(0);
            let mut content = content.clone();
            if let Some(field) = content.get_mut(32..40).filter(|_| input.byte() & 1 == 1) {
                field.copy_from_slice(&number.to_le_bytes());
            }
            if !keep {
                files.remove(&path);
            }
            if files.len() < 32 {
                files.insert(path.with_file_name(segment::file_name(number)), content);
            }
        }
    }
}

fn word_at(content: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*content.get(at..)?.first_chunk::<8>()?))
}

fn put(content: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = content.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// The seed of the epoch that a position names.
fn seed_at(content: &[u8], lineage_at: usize) -> Option<u64> {
    let bytes: &[u8; 40] = content.get(lineage_at..)?.first_chunk()?;
    let (lineage, rest) = bytes.split_first_chunk::<16>()?;
    let (number, id) = rest.split_first_chunk::<8>()?;
    let epoch = Epoch { number: u64::from_le_bytes(*number), id: EpochId(id.try_into().ok()?) };
    Some(frame::chain_seed(Lineage(*lineage), epoch))
}

/// Closes every checksum. `links` joins each frame to the one before it in its file, also where it named
/// another.
fn reseal(files: &mut Files, before: &Files, links: bool) {
    let mut chains = BTreeMap::new();
    for (path, content) in files.iter() {
        let Some(old) = before.get(path) else { continue };
        for (at, kind) in structures(content) {
            for position in kind.positions().iter().map(|position| at + position) {
                if let (Some(was), Some(is)) = (seed_at(old, position), seed_at(content, position)) {
                    chains.entry(was).or_insert(is);
                }
            }
        }
    }
    let mut running = None;
    for content in files.values_mut() {
        let places = structures(content);
        let mut footer = None;
        for (at, kind) in places {
            for chain_at in kind.positions().iter().map(|position| at + position + 48) {
                let Some(old) = word_at(content, chain_at) else { continue };
                let linked = running.filter(|_| links && kind != Kind::Header);
                let chain = linked.or_else(|| chains.get(&old).copied()).unwrap_or(old);
                put(content, chain_at, &chain.to_le_bytes());
            }
            match kind {
                Kind::Header => {
                    running = word_at(content, at + 56 + 48);
                    close(content, at, SECTOR_BYTES - 4);
                }
                Kind::Mark => close(content, at, SECTOR_BYTES - 4),
                Kind::Frame => running = close_frame(content, at, &mut chains, running.filter(|_| links)),
                Kind::Footer => footer = Some(at),
                Kind::Trailer => {
                    let start = footer.take().unwrap_or(at);
                    let crc = crc32fast::hash(&content[start..at]);
                    put(content, at + 56, &crc.to_le_bytes());
                    close(content, at, TRAILER_BYTES - 4);
                }
                Kind::Slot(bytes) => close(content, at, bytes.saturating_sub(4)),
                Kind::Page => close(content, at, PAGE_BYTES - 4),
            }
        }
    }
}

/// Writes behind `bytes` bytes their CRC.
fn close(content: &mut [u8], at: usize, bytes: usize) {
    let Some(covered) = content.get(at..at + bytes) else { return };
    let crc = crc32fast::hash(covered);
    put(content, at + bytes, &crc.to_le_bytes());
}

/// Closes a frame and returns its chain value.
fn close_frame(
    content: &mut [u8],
    at: usize,
    chains: &mut BTreeMap<u64, u64>,
    link: Option<u64>,
) -> Option<u64> {
    let (old_in, old_out) = (word_at(content, at + 128)?, word_at(content, at + 136)?);
    let chain_in = link.or_else(|| chains.get(&old_in).copied()).unwrap_or(old_in);
    put(content, at + 128, &chain_in.to_le_bytes());
    let stored = u32::from_le_bytes(*content.get(at + 124..)?.first_chunk::<4>()?) as usize;
    let end = at + crate::sector_ceil(frame::HEADER_BYTES + stored.min(frame::MAX_STORED_BYTES));
    let payload = content.get(at + frame::HEADER_BYTES..end.min(content.len()))?;
    let crc = crc32fast::hash(payload);
    put(content, at + 184, &crc.to_le_bytes());
    let chain_out = frame::chain_of(content.get(at..at + frame::HEADER_BYTES)?);
    put(content, at + 136, &chain_out.to_le_bytes());
    close(content, at, frame::HEADER_BYTES - 4);
    chains.insert(old_out, chain_out);
    Some(chain_out)
}

/// How many frames of a file pass their own checks: what a fuzzer that gets behind them rests on.
pub fn sound_frames(files: &Files, path: &Path) -> usize {
    let content = files.get(path).map_or(&[][..], Vec::as_slice);
    let frames = structures(content).into_iter().filter(|(_, kind)| *kind == Kind::Frame);
    let sound = |at: usize| {
        let frame = &content[at..];
        FrameHeader::parse(frame).and_then(|header| header.check_payload(frame)).is_ok()
    };
    frames.filter(|(at, _)| sound(*at)).count()
}
