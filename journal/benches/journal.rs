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

/// Half-compressible content: runs of noise and of repeated text, as long as each other.
fn content(bytes: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        for _ in 0..32 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            out.extend_from_slice(&state.to_le_bytes());
        }
        let line = format!("{:>8} the quick brown fox jumps over the lazy dog ", state % 100);
        out.extend(line.bytes().cycle().take(256));
    }
    out.truncate(bytes);
    out
}

fn start() -> Position {
    let epoch = Epoch { number: 1, id: EpochId([1; 16]) };
    Position::epoch_start(Lineage([1; 16]), epoch, Lsn(0))
}

/// Seconds to take `content` through batches, frames and the journal.
fn journaled(dir: &Path, content: &[u8], write_bytes: usize, compression: Compression, sync: bool) -> f64 {
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
    let begun = Instant::now();
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
    let seconds = begun.elapsed().as_secs_f64();
    drop(writer);
    fs::remove_dir_all(&dir).expect("remove the journal");
    seconds
}

/// Seconds of zstd 1 alone, one context, on chunks of the same size.
fn bare_zstd(content: &[u8]) -> f64 {
    let mut zstd = zstd::bulk::Compressor::new(1).expect("zstd context");
    let mut out = Vec::with_capacity(zstd::zstd_safe::compress_bound(BATCH_BYTES));
    let begun = Instant::now();
    for chunk in content.chunks(BATCH_BYTES) {
        out.clear();
        zstd.compress_to_buffer(chunk, &mut out).expect("compress");
        std::hint::black_box(&out);
    }
    begun.elapsed().as_secs_f64()
}

/// Seconds of appending the same bytes to preallocated files of a segment's size, synced as often.
fn bare_append(dir: &Path, content: &[u8]) -> f64 {
    const FILE_BYTES: usize = 64 << 20;
    let begun = Instant::now();
    let mut unsynced = 0;
    for (number, part) in content.chunks(FILE_BYTES).enumerate() {
        let path = dir.join(format!("plain-{number}"));
        let file = fs::File::create(path).expect("create");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, FILE_BYTES as u64)
            .expect("fallocate");
        for (at, chunk) in part.chunks(BATCH_BYTES).enumerate() {
            file.write_all_at(chunk, (at * BATCH_BYTES) as u64).expect("append");
            unsynced += chunk.len();
            if unsynced >= SYNC_BYTES {
                file.sync_data().expect("sync");
                unsynced = 0;
            }
        }
        file.sync_data().expect("sync");
    }
    let seconds = begun.elapsed().as_secs_f64();
    for number in 0..content.len().div_ceil(FILE_BYTES) {
        fs::remove_file(dir.join(format!("plain-{number}"))).expect("remove");
    }
    seconds
}

struct Row {
    name: String,
    ours_mib_s: f64,
    bare_mib_s: f64,
    ratio: f64,
    target: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn compare(name: String, bytes: usize, target: f64, ours: impl Fn() -> f64, bare: impl Fn() -> f64) -> Row {
    let (mut our, mut their, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    ours();
    bare();
    for _ in 0..ROUNDS {
        let (a, b) = (ours(), bare());
        ratios.push(b / a);
        our.push(a);
        their.push(b);
    }
    let mib = bytes as f64 / f64::from(1 << 20);
    let (ours_mib_s, bare_mib_s) = (mib / median(our), mib / median(their));
    Row { name, ours_mib_s, bare_mib_s, ratio: median(ratios), target }
}

fn main() {
    let settings = settings();
    let scratch = settings.dir.join(format!("afterimage-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch).expect("make a scratch directory");
    let content = content(settings.total_bytes);
    let mut rows = Vec::new();
    for write_bytes in [4 << 10, 64 << 10] {
        rows.push(compare(
            format!("zstd 1, {} KiB writes ÷ bare zstd 1", write_bytes >> 10),
            content.len(),
            0.9,
            || journaled(&scratch, &content, write_bytes, Compression::Zstd(1), false),
            || bare_zstd(&content),
        ));
    }
    for write_bytes in [4 << 10, 64 << 10] {
        rows.push(compare(
            format!("raw, {} KiB writes, synced ÷ plain append, synced", write_bytes >> 10),
            content.len(),
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
                    "ratio": row.ratio, "target": row.target,
                })
            })
            .collect();
        let all =
            serde_json::json!({ "kernel": kernel, "cpus": cpus, "mib": mib, "rounds": ROUNDS, "rows": rows });
        writeln!(out, "{all}")
    } else {
        let head =
            format!("kernel {kernel}, {cpus} CPUs, {mib} MiB of half-compressible content, {ROUNDS} rounds");
        let table: String = rows
            .iter()
            .map(|row| {
                format!(
                    "\n{:<52} {:>9.0} {:>9.0} {:>7.2} {:>7.2}",
                    row.name, row.ours_mib_s, row.bare_mib_s, row.ratio, row.target
                )
            })
            .collect();
        writeln!(out, "{head}\n{:<52} {:>9} {:>9} {:>7} {:>7}{table}", "", "MiB/s", "bare", "ratio", "target")
    };
    written.expect("print the report");
}
