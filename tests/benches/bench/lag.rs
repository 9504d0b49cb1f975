//! Steady lag: from the client's acknowledgement of a write to the receiver's durable one, as the source
//! learns of it.
//!
//! The source runs in this process, so that lsns and acknowledgements are seen without polling; the receiver
//! is a process of its own. Beside it, in the same seconds, a loop of appends with fdatasync on the same
//! disk.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use wire::Identity;

use crate::data::half_compressible;
use crate::report::{Report, Row, Target};

const SIZE: u64 = 1 << 30;
const WRITES_PER_S: u32 = 1000;
const SECONDS: u32 = 20;
const BLOCK: usize = 4096;
/// Of the budget: `max_batch_delay` (20 ms) + round trip on loopback (well below 1 ms) + 10 ms.
const BUDGET_MS: f64 = 20.0 + 1.0 + 10.0;

/// A client of the least kind: one export, one write at a time.
struct Client(UnixStream);

impl Client {
    fn connect(socket: &Path, export: &str) -> Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "no NBD server");
        // Fixed newstyle, no zeroes; then EXPORT_NAME (1).
        stream.write_all(&3_u32.to_be_bytes())?;
        stream.write_all(b"IHAVEOPT")?;
        stream.write_all(&1_u32.to_be_bytes())?;
        stream.write_all(&u32::try_from(export.len())?.to_be_bytes())?;
        stream.write_all(export.as_bytes())?;
        let mut size_and_flags = [0; 10];
        stream.read_exact(&mut size_and_flags)?;
        Ok(Client(stream))
    }

    fn write(&mut self, offset: u64, block: &[u8]) -> Result<()> {
        let mut request = Vec::with_capacity(28 + block.len());
        request.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        request.extend_from_slice(&[0, 0, 0, 1]);
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&u32::try_from(block.len())?.to_be_bytes());
        request.extend_from_slice(block);
        self.0.write_all(&request)?;
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply)?;
        ensure!(reply[4..8] == [0; 4], "write failed: {reply:?}");
        Ok(())
    }
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() - 1) * percent / 100]
}

/// fdatasync's own times on this disk while `stop` is not set, ms.
fn fdatasync_times(path: &Path, stop: &AtomicBool) -> Result<Vec<f64>> {
    let file = File::create(path)?;
    let block = half_compressible(64 << 10, 9);
    let mut times = Vec::new();
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        file.write_all_at(&block, at)?;
        at += block.len() as u64;
        let started = Instant::now();
        file.sync_data()?;
        times.push(started.elapsed().as_secs_f64() * 1000.0);
        std::thread::sleep(Duration::from_millis(25));
    }
    Ok(times)
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures and reports.
pub fn measure(binary: &Path, dir: &Path, report: &mut Report) -> Result<()> {
    let dir = dir.join("lag");
    let (source_dir, receiver_dir) = (dir.join("source"), dir.join("receiver"));
    for dir in [&source_dir, &receiver_dir] {
        std::fs::create_dir_all(dir)?;
    }
    let source_id = Identity::create(&source_dir.join("identity"))?.fingerprint();
    let receiver_id = Identity::create(&receiver_dir.join("identity"))?.fingerprint();
    let port = std::net::UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    let file = dir.join("receiver.toml");
    std::fs::write(
        &file,
        format!(
            "dir = {receiver_dir:?}\nlisten = \"127.0.0.1:{port}\"\n[[source]]\nidentity = \"{source_id}\"\ngroups = [\"bench\"]\n"
        ),
    )?;
    let receiver = Command::new(binary)
        .env_remove("AFTERIMAGE_BIN")
        .env_remove("AFTERIMAGE_TEST_DIR")
        .args(["receive", "--config"])
        .arg(&file)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let receiver = Killed(receiver);
    let volume = ("disk".to_owned(), dir.join("disk.img"), Some(SIZE));
    let mut settings = conf::Replicator::embedded(
        &source_dir,
        "bench",
        [volume],
        ([127, 0, 0, 1], port).into(),
        receiver_id.0,
    )?;
    settings.ring_dir = format!("/dev/shm/afterimage-bench-{}", std::process::id()).into();
    let socket = settings.volume[0].nbd.clone();
    let ring_dir = settings.ring_dir.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let handle = runtime.block_on(replicator::Replicator::start(settings))?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while handle.status().groups[0].state != replicator::status::State::Replicating
        || !handle.status().groups[0].connected
    {
        if Instant::now() > deadline {
            bail!("the pair did not start: {:?}", handle.status());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let stop = Arc::new(AtomicBool::new(false));
    let bare = std::thread::spawn({
        let (stop, path) = (stop.clone(), dir.join("bare"));
        move || fdatasync_times(&path, &stop)
    });
    // Every change of the received lsn with its time.
    let mut peer = handle.watch_peer();
    let acks = runtime.spawn(async move {
        let mut seen = Vec::with_capacity(64 * 1024);
        while peer.changed().await.is_ok() {
            seen.push((Instant::now(), peer.borrow_and_update().received.0));
        }
        seen
    });
    let writes = run_load(&socket, || handle.captured_lsn().0)?;
    runtime.block_on(handle.wait(Duration::from_secs(30)))?;
    stop.store(true, Ordering::Relaxed);
    let mut bare = bare.join().map_err(|_| anyhow::anyhow!("the fdatasync loop panicked"))??;
    runtime.block_on(handle.shutdown())?;
    let acks = runtime.block_on(acks)?;
    drop(receiver);
    let mut lags = Vec::with_capacity(writes.len());
    let mut at = 0;
    for (acked, lsn) in &writes {
        while acks.get(at).context("a write was never received")?.1 < *lsn {
            at += 1;
        }
        lags.push(acks[at].0.saturating_duration_since(*acked).as_secs_f64() * 1000.0);
    }
    lags.sort_by(f64::total_cmp);
    bare.sort_by(f64::total_cmp);
    let sync_p99 = percentile(&bare, 99);
    let (p50, p99) = (percentile(&lags, 50), percentile(&lags, 99));
    report.row(Row {
        what: format!("steady lag p99, {WRITES_PER_S} × 4 KiB/s (p50 {p50:.1} ms)"),
        ours: format!("{p99:.1} ms"),
        peer: format!("{:.1} ms", BUDGET_MS + sync_p99),
        ratio: p99 / (BUDGET_MS + sync_p99),
        target: Some(Target::AtMost(1.0)),
    });
    report.note(format!(
        "fdatasync of 64 KiB appends beside it, under apply: p50 {:.1} ms, p99 {sync_p99:.1} ms ({} samples)",
        percentile(&bare, 50),
        bare.len()
    ));
    let _ = std::fs::remove_dir_all(ring_dir);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// Writes at a steady rate; when each was acknowledged, and the lsn that covers it.
fn run_load(socket: &Path, captured: impl Fn() -> u64) -> Result<Vec<(Instant, u64)>> {
    let mut client = Client::connect(socket, "disk")?;
    let block = half_compressible(BLOCK, 7);
    let started = Instant::now();
    let mut writes = Vec::new();
    for number in 0..WRITES_PER_S * SECONDS {
        let due = started + Duration::from_secs(1) * number / WRITES_PER_S;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let offset = u64::from(number).wrapping_mul(7919) % (SIZE / BLOCK as u64) * BLOCK as u64;
        client.write(offset, &block)?;
        writes.push((Instant::now(), captured()));
    }
    Ok(writes)
}
