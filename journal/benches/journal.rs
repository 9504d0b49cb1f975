//! What journaling costs beside its bare parts, in one run on one machine.
//!
//! (a) frames at zstd 1 on one core ÷ bare zstd 1 on the same bytes and chunk size: target 0.9;
//! (b) codec off ÷ a plain append and fdatasync loop of the same sizes: target 0.8.
//!
//! `cargo bench -p afterimage-journal -- [--json] [--mib N] [--dir DIR]`. The two sides of a ratio run in turn, several
//! rounds, and the median of the rounds' ratios is printed: other load on the machine hits both.

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
use std::time::Instant;

const ROUNDS: usize = 7;
/// Writes come out of a stretch of memory that is used round and round, as the ring is.
const RING_BYTES: usize = 16 << 20;
/// A batch is closed at a MiB of raw records.
const BATCH_BYTES: usize = 1 << 20;
/// Both sides sync after so many bytes.
const SYNC_BYTES: usize = 8 << 20;

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

/// Content like that of the measurements in the design: a third noise, the rest words in random order, in stretches of
/// a few hundred bytes; zstd 1 takes it to about six tenths. Taken round and round.
struct Content {
    ring: Vec<u8>,
    total_bytes: usize,
}

impl Content {
    fn new(total_bytes: usize) -> Content {
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let words: Vec<Vec<u8>> =
            (0..4096).map(|_| next().to_le_bytes()[..3 + pick(next(), 6)].to_vec()).collect();
        let mut ring = Vec::with_capacity(RING_BYTES + 1024);
        while ring.len() < RING_BYTES {
            for _ in 0..32 {
                ring.extend_from_slice(&next().to_le_bytes());
            }
            for _ in 0..96 {
                ring.extend_from_slice(&words[pick(next(), words.len())]);
            }
        }
        ring.truncate(RING_BYTES);
        Content { ring, total_bytes }
    }

    /// The whole content in pieces of `bytes`, which divide the ring.
    fn chunks(&self, bytes: usize) -> impl Iterator<Item = &[u8]> {
        self.ring.chunks(bytes).cycle().take(self.total_bytes / bytes)
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

/// Seconds to take `content` through batches, frames and the journal.
fn journaled(
    dir: &Path,
    content: &Content,
    write_bytes: usize,
    compression: Compression,
    sync: bool,
) -> Cost {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let group = GroupId([1; 16]);
    let options = WriterOptions { group, segment_bytes: 64 << 20 };
    let dir = dir.join("journal");
    let mut writer = Writer::create(disk, &dir, options, start(), 0).expect("create the journal");
    let mut encoder = Encoder::new().expect("zstd context");
    let stamp = Stamp { group, lineage: start().lineage, epoch: start().epoch };
    let (mut batch, mut buffer, mut unsynced) = (Batch::default(), Vec::new(), 0);
    let (mut lsn, mut chain) = (Lsn(0), start().chain);
    let mut close = |batch: &mut Batch, writer: &mut Writer, buffer: Vec<u8>| -> (Vec<u8>, usize) {
        let encoded = encoder.encode(batch, &stamp, None, compression, buffer).expect("encode");
        let (frame, chain_out) = encoded.seal(chain);
        chain = chain_out;
        let header = FrameHeader::parse(&frame).expect("own frame");
        writer.append(&frame, &header, 0).expect("append");
        batch.clear();
        let bytes = frame.len();
        (frame, bytes)
    };
    let watch = Watch::start();
    for (at, chunk) in content.chunks(write_bytes).enumerate() {
        lsn = lsn.next();
        let extent = Extent { offset: (at * write_bytes) as u64, len: chunk.len() as u64 };
        batch.push(
            &Record { op: Op::Write, flags: 0, volume: VolumeId(0), lsn, time_ns: lsn.0, extent },
            chunk,
        );
        if batch.raw().len() >= BATCH_BYTES {
            let (frame, bytes) = close(&mut batch, &mut writer, buffer);
            buffer = frame;
            unsynced += bytes;
            // As when the receiver acknowledges at once: the segment before goes, and its file is used again.
            if let [_, .., active] = writer.segments() {
                let number = active.number;
                writer.drop_before(number).expect("drop");
            }
            if sync && unsynced >= SYNC_BYTES {
                writer.sync().expect("sync");
                unsynced = 0;
            }
        }
    }
    if batch.records() > 0 {
        close(&mut batch, &mut writer, buffer);
    }
    if sync {
        writer.sync().expect("sync");
    }
    let cost = watch.stop();
    drop(writer);
    fs::remove_dir_all(&dir).expect("remove the journal");
    cost
}

/// Seconds of zstd 1 alone, one context, on chunks of the same size.
fn bare_zstd(content: &Content) -> Cost {
    let mut zstd = zstd::bulk::Compressor::new(1).expect("zstd context");
    let mut out = Vec::with_capacity(zstd::zstd_safe::compress_bound(BATCH_BYTES));
    let watch = Watch::start();
    for chunk in content.chunks(BATCH_BYTES) {
        out.clear();
        zstd.compress_to_buffer(chunk, &mut out).expect("compress");
        std::hint::black_box(&out);
    }
    watch.stop()
}

/// Seconds of appending the same bytes to preallocated files of a segment's size, synced as often.
fn bare_append(dir: &Path, content: &Content) -> Cost {
    const FILE_BYTES: usize = 64 << 20;
    let watch = Watch::start();
    let (mut unsynced, mut at, mut number) = (0, FILE_BYTES, 0);
    let mut file: Option<fs::File> = None;
    for chunk in content.chunks(BATCH_BYTES) {
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
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    cpu: f64,
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

fn compare(name: String, bytes: usize, target: f64, ours: impl Fn() -> Cost, bare: impl Fn() -> Cost) -> Row {
    let (mut our, mut their, mut ratios, mut cpu_ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    ours();
    bare();
    for _ in 0..ROUNDS {
        let (a, b) = (ours(), bare());
        ratios.push(b.wall / a.wall);
        cpu_ratios.push(b.cpu / a.cpu);
        our.push(a.wall);
        their.push(b.wall);
    }
    let mib = bytes as f64 / f64::from(1 << 20);
    let (ours_mib_s, bare_mib_s) = (mib / median(our), mib / median(their));
    Row { name, ours_mib_s, bare_mib_s, ratio: median(ratios), cpu_ratio: median(cpu_ratios), target }
}

fn main() {
    let settings = settings();
    let scratch = settings.dir.join(format!("afterimage-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch).expect("make a scratch directory");
    let content = Content::new(settings.total_bytes);
    let mut rows = Vec::new();
    for write_bytes in [4 << 10, 64 << 10] {
        rows.push(compare(
            format!("zstd 1, {} KiB writes ÷ bare zstd 1", write_bytes >> 10),
            settings.total_bytes,
            0.9,
            || journaled(&scratch, &content, write_bytes, Compression::Zstd(1), false),
            || bare_zstd(&content),
        ));
    }
    for write_bytes in [4 << 10, 64 << 10] {
        rows.push(compare(
            format!("raw, {} KiB writes, synced ÷ plain append, synced", write_bytes >> 10),
            settings.total_bytes,
            0.8,
            || journaled(&scratch, &content, write_bytes, Compression::Off, true),
            || bare_append(&scratch, &content),
        ));
    }
    fs::remove_dir_all(&scratch).expect("remove the scratch directory");
    report(&settings, &rows);
}

fn report(settings: &Settings, rows: &[Row]) {
    let uname = rustix::system::uname();
    let kernel = uname.release().to_string_lossy();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let mib = settings.total_bytes >> 20;
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
        let all =
            serde_json::json!({ "kernel": kernel, "cpus": cpus, "mib": mib, "rounds": ROUNDS, "rows": rows });
        writeln!(out, "{all}")
    } else {
        let head = format!(
            "kernel {kernel}, {cpus} CPUs, {mib} MiB of content, a third of it noise, {ROUNDS} rounds"
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
