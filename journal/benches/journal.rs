//! What journaling costs beside its bare parts, in one run on one machine.
//!
//! (a) frames at zstd 1 on one core ÷ bare zstd 1 on the same bytes and chunk size: target 0.9;
//! (b) codec off ÷ a plain append and fdatasync loop of the same sizes: target 0.8.
//!
//! `cargo bench -p afterimage-journal -- [--json] [--mib N] [--dir DIR]`. The two sides of a ratio run in
//! turn, several rounds of N MiB, and the median of the rounds' ratios is printed: other load on the machine
//! hits both. In (a) they take turns within a round too, one ring at a time, on one journal that stays open:
//! a shared machine's clock drifts by a fifth within a second. A round's figures hold all that happened in
//! it, rolled and dropped segments included.
//!
//! (a) runs on two contents: one that zstd 1 takes to six tenths, and one that it can do little with, where
//! the same zstd work stands beside half as many bytes more to checksum and append, and where the record
//! headers of 4 KiB writes cost zstd itself 3 to 4 % (mixed: 1 %). Both are printed beside the target.

use journal::buffered_disk::BufferedDisk;
use journal::compress::{Compression, Encoder};
use journal::frame::{Batch, FrameHeader, Stamp};
use journal::io::{Disk, RealDisk};
use journal::record::{Op, Record};
use journal::writer::{Writer, WriterOptions};
use journal::{Epoch, EpochId, Extent, GroupId, Lineage, Lsn, Position, VolumeId};
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;
/// Writes come out of a stretch of memory that is used round and round, as the ring is.
const RING_BYTES: usize = 16 << 20;
/// A batch is closed at a MiB of raw records.
const BATCH_BYTES: usize = 1 << 20;
/// Both sides sync after so many bytes.
const SYNC_BYTES: usize = 8 << 20;
/// Longer than the device takes for what the journal has started to write back.
const SETTLE: Duration = Duration::from_millis(10);

struct Settings {
    json: bool,
    total_bytes: usize,
    dir: PathBuf,
}

fn settings() -> Settings {
    let mut settings = Settings { json: false, total_bytes: 256 << 20, dir: std::env::temp_dir() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => settings.json = true,
            "--mib" => {
                let mib = arguments.next().and_then(|mib| mib.parse::<usize>().ok());
                settings.total_bytes = mib.expect("--mib takes a number") << 20;
            }
            "--dir" => settings.dir = arguments.next().expect("--dir takes a path").into(),
            // cargo's own.
            _ => {}
        }
    }
    settings
}

/// Stretches of 256 bytes of noise and about twice that of words in random order. How often zstd finds a word
/// again depends on number and length of the words.
struct Mix {
    name: &'static str,
    words: usize,
    /// Shortest and longest word, bytes.
    word_bytes: (usize, usize),
    words_a_stretch: usize,
}

/// zstd 1 takes it to about six tenths.
const MIXED: Mix = Mix { name: "mixed", words: 1024, word_bytes: (4, 15), words_a_stretch: 54 };
/// Words below the seven bytes that zstd 1 looks for: it stays at more than nine tenths.
const HARD: Mix = Mix { name: "hard", words: 4096, word_bytes: (3, 8), words_a_stretch: 96 };

/// What is written: a ring of a mix, taken round and round.
struct Content {
    name: &'static str,
    ring: Vec<u8>,
}

impl Content {
    fn new(mix: &Mix) -> Content {
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let (shortest, longest) = mix.word_bytes;
        let mut word = || {
            let letters = [next().to_le_bytes(), next().to_le_bytes()].concat();
            letters[..shortest + pick(next(), longest + 1 - shortest)].to_vec()
        };
        let words: Vec<Vec<u8>> = (0..mix.words).map(|_| word()).collect();
        let mut ring = Vec::with_capacity(RING_BYTES + 1024);
        while ring.len() < RING_BYTES {
            for _ in 0..32 {
                ring.extend_from_slice(&next().to_le_bytes());
            }
            for _ in 0..mix.words_a_stretch {
                ring.extend_from_slice(&words[pick(next(), words.len())]);
            }
        }
        ring.truncate(RING_BYTES);
        Content { name: mix.name, ring }
    }

    /// `rings` times the content, in pieces of `bytes`, which divide the ring.
    fn chunks(&self, bytes: usize, rings: usize) -> impl Iterator<Item = &[u8]> {
        self.ring.chunks(bytes).cycle().take(rings * RING_BYTES / bytes)
    }

    /// What bare zstd 1 makes of it, as a part of its size.
    fn zstd_part(&self) -> f64 {
        let mut bare = BareZstd::new();
        let stored: usize = self.chunks(BATCH_BYTES, 1).map(|chunk| bare.compress(chunk)).sum();
        stored as f64 / RING_BYTES as f64
    }
}

fn pick(random: u64, below: usize) -> usize {
    let [low, high, ..] = random.to_le_bytes();
    usize::from(u16::from_le_bytes([low, high])) % below
}

fn start() -> Position {
    let epoch = Epoch { number: 1, id: EpochId([1; 16]) };
    Position::epoch_start(Lineage([1; 16]), epoch, Lsn(0))
}

/// The whole way: batch, frame, seal, append; segments are rolled, dropped and used again.
struct Journal {
    dir: PathBuf,
    writer: Writer,
    encoder: Encoder,
    stamp: Stamp,
    compression: Compression,
    sync: bool,
    batch: Batch,
    buffer: Vec<u8>,
    unsynced: usize,
    lsn: Lsn,
    chain: u64,
}

impl Journal {
    fn create(dir: &Path, compression: Compression, sync: bool) -> Journal {
        // As at the source, which compresses and does not sync (decision 0005), or as at the receiver, which
        // does.
        let disk: Arc<dyn Disk> =
            if sync { Arc::new(RealDisk) } else { Arc::new(BufferedDisk::new(Arc::new(RealDisk))) };
        let group = GroupId([1; 16]);
        let options = WriterOptions { group, segment_bytes: 64 << 20 };
        let dir = dir.join("journal");
        let writer = Writer::create(disk, &dir, options, start(), 0).expect("create the journal");
        Journal {
            dir,
            writer,
            encoder: Encoder::new().expect("zstd context"),
            stamp: Stamp { group, lineage: start().lineage, epoch: start().epoch },
            compression,
            sync,
            batch: Batch::default(),
            buffer: Vec::new(),
            unsynced: 0,
            lsn: Lsn(0),
            chain: start().chain,
        }
    }

    /// Takes `rings` times the content in writes of `write_bytes`. The last batch stays open unless syncs are
    /// asked for.
    fn take(&mut self, content: &Content, write_bytes: usize, rings: usize) -> Cost {
        let watch = Watch::start();
        for (at, chunk) in content.chunks(write_bytes, rings).enumerate() {
            let lsn = self.lsn.next();
            let extent = Extent { offset: (at * write_bytes) as u64, len: chunk.len() as u64 };
            let record = Record { op: Op::Write, flags: 0, volume: VolumeId(0), lsn, time_ns: lsn.0, extent };
            self.batch.push(&record, chunk);
            self.lsn = lsn;
            if self.batch.raw().len() >= BATCH_BYTES {
                self.close();
            }
        }
        if self.sync {
            if self.batch.records() > 0 {
                self.close();
            }
            self.writer.sync().expect("sync");
        }
        watch.stop()
    }

    fn close(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let encoded = self.encoder.encode(&self.batch, &self.stamp, None, self.compression, buffer);
        let (frame, chain_out) = encoded.expect("encode").seal(self.chain);
        let header = FrameHeader::parse(&frame).expect("own frame");
        self.writer.append(&frame, &header, 0).expect("append");
        self.batch.clear();
        // As when the receiver acknowledges at once: the segment before goes, and its file is used again.
        if let [_, .., active] = self.writer.segments() {
            let number = active.number;
            self.writer.drop_before(number).expect("drop");
        }
        self.unsynced += frame.len();
        if self.sync && self.unsynced >= SYNC_BYTES {
            self.writer.sync().expect("sync");
            self.unsynced = 0;
        }
        (self.chain, self.buffer) = (chain_out, frame);
    }

    fn remove(self) {
        drop(self.writer);
        fs::remove_dir_all(&self.dir).expect("remove the journal");
    }
}

/// zstd 1 alone, one context, on chunks of a batch's size.
struct BareZstd {
    zstd: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

impl BareZstd {
    fn new() -> BareZstd {
        let zstd = zstd::bulk::Compressor::new(1).expect("zstd context");
        BareZstd { zstd, out: Vec::with_capacity(zstd::zstd_safe::compress_bound(BATCH_BYTES)) }
    }

    /// Bytes it came to.
    fn compress(&mut self, chunk: &[u8]) -> usize {
        self.out.clear();
        let bytes = self.zstd.compress_to_buffer(chunk, &mut self.out).expect("compress");
        std::hint::black_box(&self.out);
        bytes
    }

    fn take(&mut self, content: &Content, rings: usize) -> Cost {
        let watch = Watch::start();
        for chunk in content.chunks(BATCH_BYTES, rings) {
            self.compress(chunk);
        }
        watch.stop()
    }
}

/// Seconds of appending the same bytes to preallocated files of a segment's size, synced as often.
fn bare_append(dir: &Path, content: &Content, rings: usize) -> Cost {
    const FILE_BYTES: usize = 64 << 20;
    let watch = Watch::start();
    let (mut unsynced, mut at, mut number) = (0, FILE_BYTES, 0);
    let mut file: Option<fs::File> = None;
    for chunk in content.chunks(BATCH_BYTES, rings) {
        if at == FILE_BYTES {
            if let Some(full) = file.take() {
                full.sync_data().expect("sync");
            }
            let next = fs::File::create(dir.join(format!("plain-{number}"))).expect("create");
            let flags = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(&next, flags, 0, FILE_BYTES as u64).expect("fallocate");
            (file, at, number) = (Some(next), 0, number + 1);
        }
        let file = file.as_ref().expect("opened above");
        file.write_all_at(chunk, at as u64).expect("append");
        at += chunk.len();
        unsynced += chunk.len();
        if unsynced >= SYNC_BYTES {
            file.sync_data().expect("sync");
            unsynced = 0;
        }
    }
    if let Some(last) = file {
        last.sync_data().expect("sync");
    }
    let cost = watch.stop();
    for number in 0..number {
        fs::remove_file(dir.join(format!("plain-{number}"))).expect("remove");
    }
    cost
}

struct Row {
    name: String,
    ours_mib_s: f64,
    bare_mib_s: f64,
    ratio: f64,
    cpu_ratio: f64,
    target: f64,
}

/// Seconds on the clock and of this thread's time on a processor.
#[derive(Clone, Copy, Default)]
struct Cost {
    wall: f64,
    cpu: f64,
}

impl Cost {
    fn add(&mut self, other: Cost) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

struct Watch(Instant, f64);

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

impl Watch {
    fn start() -> Watch {
        Watch(Instant::now(), cpu_seconds())
    }

    fn stop(&self) -> Cost {
        Cost { wall: self.0.elapsed().as_secs_f64(), cpu: cpu_seconds() - self.1 }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds that the two sides of one round took, ours first.
type Round = (Cost, Cost);

fn compare(name: String, bytes: usize, target: f64, mut round: impl FnMut() -> Round) -> Row {
    let (mut our, mut their, mut ratios, mut cpu_ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    round();
    for _ in 0..ROUNDS {
        let (a, b) = round();
        ratios.push(b.wall / a.wall);
        cpu_ratios.push(b.cpu / a.cpu);
        our.push(a.wall);
        their.push(b.wall);
    }
    let mib = bytes as f64 / f64::from(1 << 20);
    let (ours_mib_s, bare_mib_s) = (mib / median(our), mib / median(their));
    Row { name, ours_mib_s, bare_mib_s, ratio: median(ratios), cpu_ratio: median(cpu_ratios), target }
}

fn compare_zstd(scratch: &Path, content: &Content, write_bytes: usize, rings: usize) -> Row {
    let name = format!("{}: zstd 1, {} KiB writes ÷ bare zstd 1", content.name, write_bytes >> 10);
    let mut journal = Journal::create(scratch, Compression::Zstd(1), false);
    let mut bare = BareZstd::new();
    let row = compare(name, rings * RING_BYTES, 0.9, || {
        let mut costs = (Cost::default(), Cost::default());
        for _ in 0..rings {
            // What our side has still to write back is not to disturb the bare one; both begin after the same
            // pause.
            std::thread::sleep(SETTLE);
            costs.0.add(journal.take(content, write_bytes, 1));
            std::thread::sleep(SETTLE);
            costs.1.add(bare.take(content, 1));
        }
        costs
    });
    journal.remove();
    row
}

fn compare_raw(scratch: &Path, content: &Content, write_bytes: usize, rings: usize) -> Row {
    let name = format!("raw, {} KiB writes, synced ÷ plain append, synced", write_bytes >> 10);
    compare(name, rings * RING_BYTES, 0.8, || {
        let mut journal = Journal::create(scratch, Compression::Off, true);
        let ours = journal.take(content, write_bytes, rings);
        journal.remove();
        (ours, bare_append(scratch, content, rings))
    })
}

fn main() {
    let settings = settings();
    let scratch = settings.dir.join(format!("afterimage-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch).expect("make a scratch directory");
    let (mixed, hard) = (Content::new(&MIXED), Content::new(&HARD));
    let rings = settings.total_bytes.div_ceil(RING_BYTES);
    let mut rows = Vec::new();
    for content in [&mixed, &hard] {
        for write_bytes in [4 << 10, 64 << 10] {
            rows.push(compare_zstd(&scratch, content, write_bytes, rings));
        }
    }
    for write_bytes in [4 << 10, 64 << 10] {
        rows.push(compare_raw(&scratch, &mixed, write_bytes, rings));
    }
    fs::remove_dir_all(&scratch).expect("remove the scratch directory");
    report(&settings, &[mixed, hard], &rows);
}

fn report(settings: &Settings, contents: &[Content], rows: &[Row]) {
    let uname = rustix::system::uname();
    let kernel = uname.release().to_string_lossy();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let mib = settings.total_bytes >> 20;
    let part = |content: &Content| format!("{:.2} of {}", content.zstd_part(), content.name);
    let parts: Vec<String> = contents.iter().map(part).collect();
    let mut out = std::io::stdout().lock();
    let written = if settings.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                serde_json::json!({
                    "name": row.name, "ours_mib_s": row.ours_mib_s, "bare_mib_s": row.bare_mib_s,
                    "ratio": row.ratio, "cpu_ratio": row.cpu_ratio, "target": row.target,
                })
            })
            .collect();
        let all = serde_json::json!({ "kernel": kernel, "cpus": cpus, "mib": mib, "rounds": ROUNDS, "contents": parts, "rows": rows });
        writeln!(out, "{all}")
    } else {
        let head = format!(
            "kernel {kernel}, {cpus} CPUs, {ROUNDS} rounds of {mib} MiB; bare zstd 1 leaves {}",
            parts.join(", ")
        );
        let table: String = rows
            .iter()
            .map(|row| {
                format!(
                    "\n{:<52} {:>9.0} {:>9.0} {:>7.2} {:>7.2} {:>7.2}",
                    row.name, row.ours_mib_s, row.bare_mib_s, row.ratio, row.cpu_ratio, row.target
                )
            })
            .collect();
        writeln!(
            out,
            "{head}\n{:<52} {:>9} {:>9} {:>7} {:>7} {:>7}{table}",
            "", "MiB/s", "bare", "ratio", "cpu", "target"
        )
    };
    written.expect("print the report");
}
