//! The NBD front against qemu-storage-daemon, and the sustained rate with everything on the same cores.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::bare::Costs;
use crate::cpu;
use crate::fio::{Amount, Fio, Qsd, random_writes};
use crate::pair::{Options, Pair};
use crate::report::{Report, Row, Target};

const SIZE: u64 = 1 << 30;
const SECONDS: u32 = 8;
/// Interleaved rounds; the median is taken.
const ROUNDS: usize = 3;
/// Everything is overwritten many times within the shortest history that is promised: room for all of it.
const ROOM: Options<'_> =
    Options { receiver: "[history]\nquota = \"200GiB\"\n", source: "[journal]\nquota = \"40GiB\"\n" };
const GIB: f64 = (1_u64 << 30) as f64;

struct Load {
    name: &'static str,
    block: &'static str,
    depth: u32,
    target: f64,
    paused: bool,
}

const LOADS: [Load; 2] = [
    Load { name: "4 KiB qd 16, all running", block: "4k", depth: 16, target: 0.9, paused: false },
    Load { name: "128 KiB qd 8, receiver paused", block: "128k", depth: 8, target: 0.6, paused: true },
];

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn sparse(path: &Path) -> Result<()> {
    File::create(path)?.set_len(SIZE)?;
    Ok(())
}

/// Rates at the front, ours and the peer's in turns.
pub fn compare(binary: &Path, dir: &Path, report: &mut Report) -> Result<()> {
    for load in &LOADS {
        let (mut ours, mut plain, mut mirrored) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let dir = dir.join(format!("front-{}-{round}", load.block));
            std::fs::create_dir_all(&dir)?;
            let run = |uri: &str| random_writes(uri, SIZE, load.block, load.depth, Amount::Seconds(SECONDS));
            sparse(&dir.join("plain.img"))?;
            {
                let qsd = Qsd::start(&dir, "plain", &dir.join("plain.img"), None)?;
                plain.push(run(&qsd.uri())?.iops);
            }
            {
                let pair = Pair::start(binary, &dir, SIZE, ROOM)?;
                pair.pause_receiver(load.paused)?;
                ours.push(run(&pair.uri())?.iops);
                pair.check_replicating()?;
                pair.pause_receiver(false)?;
            }
            sparse(&dir.join("mirror.img"))?;
            sparse(&dir.join("target.img"))?;
            {
                let target = Qsd::start(&dir, "target", &dir.join("target.img"), None)?;
                let qsd = Qsd::start(&dir, "mirror", &dir.join("mirror.img"), Some(target.socket()))?;
                mirrored.push(run(&qsd.uri())?.iops);
            }
            std::fs::remove_dir_all(&dir)?;
        }
        let (ours, plain, mirrored) = (median(ours), median(plain), median(mirrored));
        report.row(Row {
            what: format!("NBD front ÷ qemu-storage-daemon, {}", load.name),
            ours: format!("{ours:.0}/s"),
            peer: format!("{plain:.0}/s"),
            ratio: ours / plain,
            target: Some(Target::AtLeast(load.target)),
        });
        report.row(Row {
            what: format!("qemu-storage-daemon with blockdev-mirror ÷ without, {}", load.block),
            ours: format!("{mirrored:.0}/s"),
            peer: format!("{plain:.0}/s"),
            ratio: mirrored / plain,
            target: None,
        });
    }
    Ok(())
}

/// Seconds from the first write to the last byte on the replica, against the bare cost of the parts.
pub fn sustained(binary: &Path, dir: &Path, costs: &Costs, report: &mut Report) -> Result<()> {
    let dir = dir.join("sustained");
    std::fs::create_dir_all(&dir)?;
    sparse(&dir.join("plain.img"))?;
    let amount = Amount::Mib(2048);
    // The client and the plain front are there anyway: their cost is measured with the peer.
    let client_cost = {
        let qsd = Qsd::start(&dir, "plain", &dir.join("plain.img"), None)?;
        let before = children_cpu();
        let plain = random_writes(&qsd.uri(), SIZE, "128k", 8, amount)?;
        drop(qsd);
        (children_cpu() - before) * GIB / plain.bytes as f64
    };
    let pair = Pair::start(binary, &dir, SIZE, ROOM)?;
    let pids = [pair.source.id(), pair.receiver.id()];
    let before: Vec<_> = pids.iter().map(|pid| cpu::by_thread(*pid)).collect();
    let started = Instant::now();
    let wrote: Fio = random_writes(&pair.uri(), SIZE, "128k", 8, amount)?;
    pair.check_replicating()?;
    pair.wait_applied()?;
    let seconds = started.elapsed().as_secs_f64();
    let gib = wrote.bytes as f64 / GIB;
    let cores = std::thread::available_parallelism()?.get() as f64;
    let bare = client_cost + costs.total();
    let limit = cores / (1.5 * bare);
    report.row(Row {
        what: "sustained end to end, 128 KiB (GiB/s ÷ cores/(1.5 × bare CPU))".into(),
        ours: format!("{:.3} GiB/s", gib / seconds),
        peer: format!("{limit:.3} GiB/s"),
        ratio: gib / seconds / limit,
        target: Some(Target::AtLeast(1.0)),
    });
    report.note(format!("bare CPU-s/GiB: client and plain NBD front {client_cost:.2}, {}", parts(costs)));
    for (side, (pid, before)) in ["source", "receiver"].iter().zip(pids.iter().zip(&before)) {
        let used: Vec<String> = cpu::by_thread(*pid)
            .iter()
            .map(|(name, seconds)| (name, (seconds - before.get(name).unwrap_or(&0.0)) / gib))
            .filter(|(_, cost)| *cost >= 0.01)
            .map(|(name, cost)| format!("{name} {cost:.2}"))
            .collect();
        report.note(format!("{side} CPU-s/GiB by thread: {}", used.join(", ")));
    }
    for (side, pid) in ["source", "receiver"].iter().zip(pids) {
        report.row(Row {
            what: format!("peak memory of the {side} (MiB)"),
            ours: format!("{:.0} MiB", cpu::peak_mib(pid)),
            peer: "256 MiB".into(),
            ratio: cpu::peak_mib(pid) / 256.0,
            target: Some(Target::AtMost(1.0)),
        });
    }
    drop(pair);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn parts(costs: &Costs) -> String {
    costs.parts().iter().map(|(name, cost)| format!("{name} {cost:.2}")).collect::<Vec<_>>().join(", ")
}

/// CPU seconds of children that have ended: fields 16 and 17 of our own stat.
fn children_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let behind = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let field =
        |at: usize| behind.split(' ').nth(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (field(13) + field(14)) / 100.0
}
