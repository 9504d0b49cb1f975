//! Comparison by hash after an unclean end, against reading both files at once as fast as the disk gives
//! them.
//!
//! The source's process is killed and its ring lost, as when its machine dies; one per cent of the disk is
//! changed where nobody records it. From its start to `replicating`, connecting, sending and the replica's
//! writes included, stands beside two `dd` with O_DIRECT on source and replica, before and after it: below
//! the guest another cache may be warm. Caches are dropped before each.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::data::Noise;
use crate::pair::{Options, Pair};
use crate::report::{Report, Row, Target};
use crate::restore::{drop_caches, median};

const SIZE: u64 = 4 << 30;
const MIB: usize = 1 << 20;
/// What both sides compare: a dirty bit's granule.
const CHUNK: u64 = 64 << 10;
const CHANGED: u64 = SIZE / CHUNK / 100;
const ROUNDS: usize = 3;
const MINUTES: Duration = Duration::from_secs(300);
/// The replica is brought by other means, so that the first synchronisation is a comparison, too.
const RECEIVER: &str = "[[replica]]\ngroup = \"bench\"\nvolume = \"disk\"\nseeded = true\n";

/// Rounds of both, in turns; the faster of the two readings counts, and the median of the ratios.
pub fn measure(binary: &Path, dir: &Path, report: &mut Report) -> Result<()> {
    let dir = dir.join("compare");
    let (disk, replica) = (dir.join("disk.img"), dir.join("receiver/replica/bench/disk.img"));
    std::fs::create_dir_all(replica.parent().context("it has one")?)?;
    let mut noise = Noise::new(7);
    for path in [&disk, &replica] {
        fill(path)?;
    }
    let mut pair = Pair::start(binary, &dir, SIZE, Options { receiver: RECEIVER, ..Options::default() })?;
    let source = File::options().write(true).open(&disk)?;
    let (mut ours, mut plain, mut ratios, mut sent) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for _ in 0..ROUNDS {
        pair.lose_source()?;
        // One chunk in each hundred, so that they are distinct.
        for stretch in 0..CHANGED {
            let at = (stretch * 100 + noise.next() % 100) * CHUNK;
            source.write_all_at(&noise_of(&mut noise, usize::try_from(CHUNK)?), at)?;
        }
        let before = read_both([&disk, &replica])?;
        drop_caches()?;
        let said = pair.source_log()?.len();
        let started = Instant::now();
        pair.start_source()?;
        pair.until(MINUTES, |group| group["state"] == "replicating")?;
        let seconds = started.elapsed().as_secs_f64();
        sent = sent.max(content_bytes(&pair.source_log()?[said..])?);
        pair.wait_applied()?;
        let bare = before.min(read_both([&disk, &replica])?);
        ours.push(seconds);
        plain.push(bare);
        ratios.push(bare / seconds);
    }
    ensure!(Command::new("cmp").args([&disk, &replica]).status()?.success(), "replica and source differ");
    report.row(Row {
        what: "hash comparison of 4 GiB with 1 % changed ÷ dd of both files at once, O_DIRECT".into(),
        ours: format!("{:.2} s", median(ours)),
        peer: format!("{:.2} s", median(plain)),
        ratio: median(ratios),
        target: Some(Target::AtLeast(0.8)),
    });
    let changed = CHANGED * CHUNK;
    report.row(Row {
        what: "bytes sent by it ÷ changed".into(),
        ours: format!("{} KiB", sent >> 10),
        peer: format!("{} KiB", changed >> 10),
        ratio: sent as f64 / changed as f64,
        target: Some(Target::AtMost(1.2)),
    });
    drop(pair);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn noise_of(noise: &mut Noise, bytes: usize) -> Vec<u8> {
    (0..bytes / 8).flat_map(|_| noise.next().to_le_bytes()).collect()
}

/// The same noise in each file: no two chunks are alike, none is a hole.
fn fill(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    let mut piece = noise_of(&mut Noise::new(1), MIB);
    for at in (0..SIZE).step_by(MIB) {
        for chunk in piece.chunks_mut(512) {
            chunk[..8].copy_from_slice(&at.to_le_bytes());
        }
        file.write_all_at(&piece, at)?;
    }
    Ok(file.sync_all()?)
}

/// Seconds until both files have been read past the page cache, at the same time.
fn read_both(paths: [&Path; 2]) -> Result<f64> {
    drop_caches()?;
    let started = Instant::now();
    let mut readers = Vec::new();
    for path in paths {
        let mut command = Command::new("dd");
        command.arg(format!("if={}", path.display())).args(["of=/dev/null", "bs=1M", "iflag=direct"]);
        readers.push(command.stderr(Stdio::null()).spawn().context("start dd")?);
    }
    for mut reader in readers {
        ensure!(reader.wait()?.success(), "dd failed");
    }
    Ok(started.elapsed().as_secs_f64())
}

/// What the agent's log says of the last synchronisation.
fn content_bytes(log: &str) -> Result<u64> {
    let (_, after) = log.rsplit_once("content_bytes=").context("the log tells no synchronisation")?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    Ok(digits.parse()?)
}
