#![allow(dead_code, reason = "each test binary uses its part of the harness")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test harness; its numbers are small"
)]

//! A scripted source and its model: records with lsns and times, framed into a journal, and what every volume
//! holds after any of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal::compress::{Compression, Encoder};
use journal::frame::{Batch, FrameHeader, Stamp, chain_seed};
use journal::io::Disk;
use journal::record::{Op, Record, VolumeRecord};
use journal::sim_disk::SimDisk;
use journal::writer::{Writer, WriterOptions};
use journal::{Epoch, EpochId, Extent, GroupId, Lineage, Lsn, Position, VolumeId, VolumeUuid};
use receiver::apply::{Applier, ApplySettings, BatchDone};
use receiver::history::History;
use receiver::point::At;
use receiver::state::{GroupState, GroupStore, journal_dir};
use receiver::view::View;

pub const GROUP: GroupId = GroupId([7; 16]);
pub const LINEAGE: Lineage = Lineage([8; 16]);
pub const GROUP_DIR: &str = "/r/groups/g";

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Everything that was ever sent.
pub struct Source {
    pub records: Vec<(Record, Vec<u8>)>,
    pub frames: Vec<(Vec<u8>, FrameHeader)>,
    /// Lsns that are recovery points once they are received.
    pub points: Vec<Lsn>,
    epoch: Epoch,
    chain: u64,
    lsn: u64,
    time_ns: u64,
    consistent: bool,
    batch: Batch,
    encoder: Encoder,
}

impl Source {
    pub fn new() -> Source {
        Source {
            records: Vec::new(),
            frames: Vec::new(),
            points: Vec::new(),
            epoch: Epoch::default(),
            chain: 0,
            lsn: 0,
            time_ns: 1_700_000_000_000_000_000,
            consistent: false,
            batch: Batch::default(),
            encoder: Encoder::new().unwrap(),
        }
    }

    /// A new epoch that begins `gap` lsns further.
    pub fn epoch(&mut self, gap: u64) {
        self.frame();
        self.epoch = Epoch { number: self.epoch.number + 1, id: EpochId([self.epoch.number as u8 + 1; 16]) };
        self.chain = chain_seed(LINEAGE, self.epoch);
        self.lsn += gap;
        self.consistent = false;
    }

    /// Time passes.
    pub fn wait(&mut self, ns: u64) {
        self.time_ns += ns;
    }

    pub fn push(&mut self, op: Op, volume: u32, offset: u64, len: u64, payload: Vec<u8>) -> Lsn {
        self.lsn += 1;
        self.push_piece(op, volume, offset, len, payload)
    }

    /// Another piece of the same lsn.
    pub fn push_piece(&mut self, op: Op, volume: u32, offset: u64, len: u64, payload: Vec<u8>) -> Lsn {
        self.time_ns += 100_000_000;
        let record = Record {
            op,
            flags: 0,
            volume: VolumeId(volume),
            lsn: Lsn(self.lsn),
            time_ns: self.time_ns,
            extent: Extent { offset, len },
        };
        match op {
            Op::ResyncBegin => self.consistent = false,
            Op::ResyncEnd => self.consistent = true,
            _ => {}
        }
        self.batch.push(&record, &payload);
        self.records.push((record, payload));
        if self.consistent {
            self.points.push(record.lsn);
        }
        record.lsn
    }

    pub fn volume(&mut self, id: u32, size_bytes: u64) -> Lsn {
        let uuid = VolumeUuid([id as u8 + 1; 16]);
        let record =
            VolumeRecord { uuid, size_bytes, sector_bytes: 512, present: true, name: format!("v{id}") };
        self.push(Op::Volume, id, 0, 0, record.encode())
    }

    pub fn write(&mut self, volume: u32, offset: u64, bytes: Vec<u8>) -> Lsn {
        self.push(Op::Write, volume, offset, bytes.len() as u64, bytes)
    }

    pub fn zero(&mut self, volume: u32, offset: u64, len: u64) -> Lsn {
        self.push(Op::Discard, volume, offset, len, Vec::new())
    }

    pub fn bookmark(&mut self, name: &str) -> Lsn {
        self.push(Op::Bookmark, 0, 0, 0, name.as_bytes().to_vec())
    }

    /// Volumes, begin, a few sync slots, end.
    pub fn resync(&mut self, sizes: &[u64], random: &mut Random, reason: &str) -> Lsn {
        for (id, size) in sizes.iter().enumerate() {
            self.volume(id as u32, *size);
        }
        self.push(Op::ResyncBegin, 0, 0, 0, reason.as_bytes().to_vec());
        for (id, size) in sizes.iter().enumerate() {
            for _ in 0..2 {
                let offset = random.below(size / 4096 - 2) * 4096;
                let byte = random.next() as u8;
                self.push(Op::SyncSlot, id as u32, offset, 4096, vec![byte; 4096]);
                self.push_piece(Op::SyncSlot, id as u32, offset + 4096, 4096, vec![byte ^ 1; 4096]);
            }
        }
        self.push(Op::ResyncEnd, 0, 0, 0, Vec::new())
    }

    /// One random change of a random volume.
    pub fn random_change(&mut self, sizes: &[u64], random: &mut Random) -> Lsn {
        let id = random.below(sizes.len() as u64) as usize;
        let sectors = sizes[id] / 512;
        let offset = random.below(sectors);
        let len = 1 + random.below((sectors - offset).min(24));
        let byte = random.next() as u8;
        match random.below(8) {
            0 => self.zero(id as u32, offset * 512, len * 512),
            1 => self.push(Op::Flush, id as u32, 0, 0, Vec::new()),
            // Often the same few bytes again: what does not change is neither undone nor written.
            2 | 3 => self.write(id as u32, offset * 512, vec![byte & 1; len as usize * 512]),
            _ => self.write(
                id as u32,
                offset * 512,
                (0..len * 512).map(|i| byte.wrapping_add((i / 64) as u8)).collect(),
            ),
        }
    }

    /// A record that the model does not follow, since no replica will.
    pub fn push_unmodelled(&mut self, op: Op, volume: u32, offset: u64, payload: Vec<u8>) {
        let len = if matches!(op, Op::Write | Op::SyncSlot) { payload.len() as u64 } else { 0 };
        self.lsn += 1;
        self.time_ns += 100_000_000;
        let record = Record {
            op,
            flags: 0,
            volume: VolumeId(volume),
            lsn: Lsn(self.lsn),
            time_ns: self.time_ns,
            extent: Extent { offset, len },
        };
        self.batch.push(&record, &payload);
    }

    /// A volume record of another volume under a known id.
    pub fn replace_volume(&mut self, id: u32, size_bytes: u64, uuid: u8) {
        let uuid = VolumeUuid([uuid; 16]);
        let record =
            VolumeRecord { uuid, size_bytes, sector_bytes: 512, present: true, name: format!("v{id}") };
        self.push_unmodelled(Op::Volume, id, 0, record.encode());
    }

    /// A frame in which something does not hold, under a CRC and a chain that do.
    pub fn hostile_frame(&mut self, random: &mut Random) {
        const OPS: [Op; 12] = [
            Op::Write,
            Op::Discard,
            Op::WriteZeroes,
            Op::Flush,
            Op::Bookmark,
            Op::Volume,
            Op::Failed,
            Op::SyncSlot,
            Op::ResyncBegin,
            Op::ResyncEnd,
            Op::Void,
            Op::ClockJump,
        ];
        let mut places = Vec::new();
        for _ in 0..=random.below(6) {
            places.push(192 + self.batch.raw().len());
            let op = OPS[random.below(12) as usize];
            let payload = match op {
                Op::Volume if random.below(2) == 0 => {
                    self.replace_volume(
                        random.below(3) as u32,
                        512 * random.below(2048),
                        1 + random.below(3) as u8,
                    );
                    continue;
                }
                Op::Write | Op::SyncSlot => vec![random.next() as u8; 512 * random.below(9) as usize],
                Op::Discard | Op::WriteZeroes => Vec::new(),
                _ => (0..random.below(40)).map(|_| random.next() as u8).collect(),
            };
            let offset = [0, 4096, 60 << 10, 1 << 40, u64::MAX - 512][random.below(5) as usize];
            self.push_unmodelled(op, random.below(3) as u32, offset, payload);
        }
        let place = places[random.below(places.len() as u64) as usize];
        let lsn = self.lsn;
        let last_lsn = match random.below(6) {
            0 => lsn + 1 + random.below(1 << 40),
            _ => lsn,
        };
        let (choice, value) = (random.below(9), random.next());
        self.forge(|frame| {
            frame[80..88].copy_from_slice(&last_lsn.to_le_bytes());
            let mut word = |at: usize, value: u64| frame[at..at + 8].copy_from_slice(&value.to_le_bytes());
            match choice {
                0 => word(place + 8, lsn.wrapping_sub(value % 8)),
                1 => word(place + 8, lsn + value % 8),
                2 => word(place + 8, 1 << 63),
                3 => word(place + 16, value),
                4 => word(place + 24, value >> (value % 64)),
                5 => word(place + 32, value >> (value % 64)),
                6 => frame[place] = value as u8,
                7 => frame[112] = frame[112].wrapping_add(value as u8).max(1),
                _ => frame[12] ^= 1,
            }
        });
        self.lsn = last_lsn;
    }

    /// A frame that holds noise where its records should be.
    pub fn garbage_frame(&mut self, flags: u16) {
        self.push_unmodelled(Op::Flush, 0, 0, vec![0; 300]);
        self.forge(|frame| {
            frame[12..14].copy_from_slice(&flags.to_le_bytes());
            frame[192..].fill(0xA7);
        });
    }

    /// Closes the frame being gathered, stored raw, changes it, and makes CRCs and chain hold again.
    fn forge(&mut self, change: impl FnOnce(&mut [u8])) {
        let stamp = Stamp { group: GROUP, lineage: LINEAGE, epoch: self.epoch };
        let encoded = self.encoder.encode(&self.batch, &stamp, None, Compression::Off, Vec::new()).unwrap();
        let (mut bytes, _) = encoded.seal(self.chain);
        change(&mut bytes);
        let payload_crc = crc32fast::hash(&bytes[192..]);
        bytes[184..188].copy_from_slice(&payload_crc.to_le_bytes());
        self.chain = xxhash_rust::xxh3::xxh3_64(&[&bytes[..136], &bytes[144..188]].concat());
        bytes[136..144].copy_from_slice(&self.chain.to_le_bytes());
        let header_crc = crc32fast::hash(&bytes[..188]);
        bytes[188..192].copy_from_slice(&header_crc.to_le_bytes());
        let header = FrameHeader::parse(&bytes).unwrap();
        self.frames.push((bytes, header));
        self.batch.clear();
    }

    /// Closes the frame being gathered.
    pub fn frame(&mut self) {
        if self.batch.records() == 0 {
            return;
        }
        let stamp = Stamp { group: GROUP, lineage: LINEAGE, epoch: self.epoch };
        let encoded =
            self.encoder.encode(&self.batch, &stamp, None, Compression::Zstd(1), Vec::new()).unwrap();
        let (bytes, chain) = encoded.seal(self.chain);
        self.chain = chain;
        let header = FrameHeader::parse(&bytes).unwrap();
        self.frames.push((bytes, header));
        self.batch.clear();
    }

    pub fn last(&self) -> Lsn {
        Lsn(self.lsn)
    }

    /// What the volumes hold right after `lsn`.
    pub fn model(&self, lsn: Lsn) -> BTreeMap<String, Vec<u8>> {
        let mut volumes: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for (record, payload) in self.records.iter().take_while(|(record, _)| record.lsn <= lsn) {
            let name = format!("v{}", record.volume.0);
            let range = record.extent.offset as usize..(record.extent.offset + record.extent.len) as usize;
            match record.op {
                Op::Volume => {
                    let size = VolumeRecord::decode(payload).unwrap().size_bytes as usize;
                    volumes.entry(name).or_default().resize(size, 0);
                }
                Op::Write | Op::SyncSlot => volumes.get_mut(&name).unwrap()[range].copy_from_slice(payload),
                Op::Discard | Op::WriteZeroes => volumes.get_mut(&name).unwrap()[range].fill(0),
                _ => {}
            }
        }
        volumes
    }
}

/// The receiver's side of a group, without network.
pub struct Group {
    pub disk: Arc<dyn Disk>,
    pub dir: PathBuf,
    pub writer: Writer,
    appended: usize,
}

impl Group {
    pub fn create(disk: Arc<dyn Disk>, dir: &Path, source: &Source) -> Group {
        Group::create_with(disk, dir, source, 1 << 20)
    }

    /// With the smallest segments, so that redo is dropped a little at a time.
    pub fn create_small(disk: Arc<dyn Disk>, dir: &Path, source: &Source) -> Group {
        Group::create_with(disk, dir, source, 64 << 10)
    }

    fn create_with(disk: Arc<dyn Disk>, dir: &Path, source: &Source, segment_bytes: u64) -> Group {
        let state = GroupState::new(GROUP, "g", [1; 32], LINEAGE);
        GroupStore::create(Arc::clone(&disk), dir, state).unwrap();
        let first = &source.frames[0].1;
        let start = Position::epoch_start(LINEAGE, first.epoch, Lsn(first.first_lsn.0 - 1));
        let options = WriterOptions { group: GROUP, segment_bytes };
        let writer = Writer::create(Arc::clone(&disk), &journal_dir(dir), options, start, 1).unwrap();
        Group { disk, dir: dir.to_path_buf(), writer, appended: 0 }
    }

    /// As the daemon creates one before any source has come: the journal begins with an empty segment of no
    /// epoch.
    pub fn create_empty(disk: Arc<dyn Disk>, dir: &Path) -> Group {
        let state = GroupState::new(GROUP, "g", [1; 32], LINEAGE);
        GroupStore::create(Arc::clone(&disk), dir, state).unwrap();
        let start = Position::epoch_start(LINEAGE, Epoch::default(), Lsn::ZERO);
        let options = WriterOptions { group: GROUP, segment_bytes: 1 << 20 };
        let writer = Writer::create(Arc::clone(&disk), &journal_dir(dir), options, start, 1).unwrap();
        Group { disk, dir: dir.to_path_buf(), writer, appended: 0 }
    }

    /// Appends and syncs the next `frames` of the source, telling the history.
    pub fn receive(&mut self, source: &Source, frames: usize, history: Option<&History>) -> Position {
        let from = self.appended;
        for (bytes, header) in &source.frames[from..source.frames.len().min(from.saturating_add(frames))] {
            if header.epoch != self.writer.appended().epoch {
                let start = Position::epoch_start(LINEAGE, header.epoch, Lsn(header.first_lsn.0 - 1));
                self.writer.begin_epoch(start, 1).unwrap();
            }
            let received_ns = header.last_time_ns + 5;
            self.writer.append(bytes, header, received_ns).unwrap();
            self.appended += 1;
        }
        let durable = self.writer.sync().unwrap();
        for (bytes, header) in &source.frames[from..self.appended] {
            if let Some(history) = history {
                history.note_frame(header, bytes, header.last_time_ns + 5).unwrap();
            }
        }
        durable
    }

    /// As `receive` of all frames, where the history may refuse to read some: ingest only logs that.
    pub fn receive_raw(&mut self, source: &Source, history: &History) -> Position {
        let from = self.appended;
        let durable = self.receive(source, usize::MAX, None);
        for (bytes, header) in &source.frames[from..] {
            let _ = history.note_frame(header, bytes, header.last_time_ns + 5);
        }
        durable
    }
}

impl Group {
    /// Forgets frames that were received: a long run does not keep them in memory.
    pub fn forget(&mut self, source: &mut Source) {
        source.frames.clear();
        self.appended = 0;
    }
}

pub fn settings(batch_bytes: u64) -> ApplySettings {
    ApplySettings {
        batch_bytes,
        undo_bytes: 1 << 20,
        undo_compression: Compression::Zstd(1),
        replica_dir: PathBuf::from("/r/replica/g"),
        replica_paths: BTreeMap::new(),
        seeded: std::collections::BTreeSet::new(),
        hold_replicas: false,
    }
}

/// Opens history and applier, as a daemon that starts does.
pub fn open(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    settings: ApplySettings,
) -> receiver::Result<(Arc<History>, Applier)> {
    let history = History::open(Arc::clone(disk), dir)?;
    let applier = Applier::open(Arc::clone(disk), dir, settings, Arc::clone(&history))?;
    Ok((history, applier))
}

/// Applies until nothing is left.
pub fn apply_all(applier: &mut Applier, durable: &Position) -> receiver::Result<Vec<BatchDone>> {
    let mut done = Vec::new();
    while let Some(batch) = applier.next_batch(durable)? {
        done.push(batch);
    }
    Ok(done)
}

/// Reads a whole volume through a view, in pieces that meet no boundary of anything.
pub fn read_view(history: &Arc<History>, lsn: Lsn, volume: &str) -> Vec<u8> {
    let (point, _pin) = history.resolve_pinned(&At::Lsn(lsn)).unwrap();
    assert_eq!(point.moment.lsn, lsn);
    let view = View::open(history, point, volume).unwrap();
    let mut content = vec![0xEE; view.size_bytes() as usize];
    let mut at = 0;
    while at < content.len() {
        let end = content.len().min(at + 17_000);
        let got = view.read_at(&mut content[at..end], at as u64).unwrap();
        assert_eq!(got, end - at);
        at = end;
    }
    content
}

/// Every volume at `lsn` is what the model says.
pub fn assert_exact(history: &Arc<History>, source: &Source, lsn: Lsn) {
    assert_equals(history, &source.model(lsn), lsn);
}

pub fn assert_equals(history: &Arc<History>, model: &BTreeMap<String, Vec<u8>>, lsn: Lsn) {
    for (name, expected) in model {
        let found = read_view(history, lsn, name);
        assert_same(&found, expected, &format!("{name} at lsn {lsn}"));
    }
}

pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: size");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at} is {} instead of {}", found[at], expected[at]);
    }
}

/// Flips a bit of a frame where it lies in the journal.
pub fn corrupt_frame(sim: &SimDisk, dir: &Path, frame: &[u8]) {
    let journal = journal_dir(dir);
    for name in sim.list(&journal).unwrap().iter().filter(|name| name.ends_with(".seg")) {
        let path = journal.join(name);
        let content = sim.contents(&path).unwrap();
        if let Some(at) = content.windows(192).position(|window| *window == frame[..192]) {
            return sim.corrupt(&path, at as u64 + 200, |byte| byte ^ 1);
        }
    }
    panic!("no segment holds the frame");
}
