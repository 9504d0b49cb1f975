//! Restore of a volume ÷ `cp --sparse=always` of its replica, both until the copy is durable, caches dropped
//! before each.
//!
//! `cargo bench -p afterimage-receiver --bench restore -- [--mib N] [--batches N] [--dir DIR] [--json]`
//! Targets (issue 2): `latest` ≥ 0.8, 1,000 batches back ≥ 0.5, on 4 GiB.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a benchmark; it ends at the first surprise"
)]

#[path = "../tests/storage/mod.rs"]
mod storage;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use journal::Lsn;
use journal::io::{Disk, RealDisk};
use journal::record::Op;
use receiver::point::At;
use receiver::restore::{RestoreRequest, restore};
use storage::{Group, Random, Source, open, settings};

const CHUNK_BYTES: u64 = 128 << 10;
/// Random 4 KiB writes in each batch.
const WRITES_PER_BATCH: u64 = 256;

struct Arguments {
    bytes: u64,
    batches: u64,
    dir: PathBuf,
    json: bool,
}

fn arguments() -> Arguments {
    let mut arguments = Arguments { bytes: 4 << 30, batches: 1000, dir: std::env::temp_dir(), json: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--mib" => arguments.bytes = words.next().unwrap().parse::<u64>().unwrap() << 20,
            "--batches" => arguments.batches = words.next().unwrap().parse().unwrap(),
            "--dir" => arguments.dir = words.next().unwrap().into(),
            "--json" => arguments.json = true,
            _ => {}
        }
    }
    arguments
}

/// Half random, half text: what compresses to about half.
fn content(random: &mut Random, bytes: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes as usize);
    while (out.len() as u64) < bytes {
        for _ in 0..256 {
            out.extend_from_slice(&random.next().to_le_bytes());
        }
        out.resize(out.len() + 2048, b'a');
    }
    out
}

/// Sends what the source has framed, applies it as it comes, and forgets it.
fn pass(source: &mut Source, group: &mut Group, applier: &mut receiver::apply::Applier) {
    source.frame();
    let durable = group.receive(source, usize::MAX, None);
    while applier.next_batch(&durable).unwrap().is_some() {}
    source.records.clear();
}

fn drop_caches() -> bool {
    let synced = Command::new("sync").status().is_ok_and(|status| status.success());
    synced && std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn main() {
    let Arguments { bytes, batches, dir, json } = arguments();
    let work = tempfile::tempdir_in(dir).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let group_dir = work.path().join("groups/g");
    let mut random = Random(1);
    let mut source = Source::new();
    source.epoch(0);
    source.volume(0, bytes);
    source.push(Op::ResyncBegin, 0, 0, 0, b"bench".to_vec());
    source.frame();
    let mut group = Group::create(Arc::clone(&disk), &group_dir, &source);
    let mut chosen = settings(64 << 20);
    chosen.replica_dir = work.path().join("replica");
    chosen.undo_bytes = 256 << 20;
    let (history, mut applier) = open(&disk, &group_dir, chosen).unwrap();
    history.attach_tail(group.writer.shared());
    for at in (0..bytes).step_by(CHUNK_BYTES as usize) {
        let chunk = content(&mut random, CHUNK_BYTES);
        source.push(Op::SyncSlot, 0, at, CHUNK_BYTES, chunk);
        if at % (1 << 20) == 0 {
            source.frame();
        }
        if at % (256 << 20) == 0 {
            pass(&mut source, &mut group, &mut applier);
            group.forget(&mut source);
            group.writer.drop_before(group.writer.segments().last().unwrap().number).unwrap();
        }
    }
    let back = source.push(Op::ResyncEnd, 0, 0, 0, Vec::new());
    pass(&mut source, &mut group, &mut applier);
    for _ in 0..batches {
        for _ in 0..WRITES_PER_BATCH {
            let chunk = content(&mut random, 4096);
            source.write(0, random.below(bytes / 4096) * 4096, chunk);
            if random.below(WRITES_PER_BATCH / 2) == 0 {
                source.frame();
            }
        }
        pass(&mut source, &mut group, &mut applier);
        group.forget(&mut source);
    }
    applier.close().unwrap();

    let out = work.path().join("out.img");
    let replica = work.path().join("replica/v0.img");
    let durable_copy = |from: &Path| {
        let copied = Command::new("cp").arg("--sparse=always").args([from, &out]).status().unwrap();
        assert!(copied.success());
        File::open(&out).unwrap().sync_all().unwrap();
    };
    let restored = |lsn: Option<Lsn>| {
        let at = lsn.map_or(At::Latest, At::Lsn);
        let request = RestoreRequest { at, to: out.clone(), volume: None, force: false, dry_run: false };
        restore(&history, &request, &mut |_, _| {}).unwrap();
    };
    let (mut copy_s, mut latest_s, mut back_s) = (Vec::new(), Vec::new(), Vec::new());
    let mut cold = true;
    // Interleaved, so that a disk that changes its mind changes it for all; the medians are compared.
    for _ in 0..3 {
        for (seconds, run) in [
            (&mut copy_s, &(|| durable_copy(&replica)) as &dyn Fn()),
            (&mut latest_s, &(|| restored(None))),
            (&mut back_s, &(|| restored(Some(back)))),
        ] {
            cold &= drop_caches();
            seconds.push(timed(run));
            std::fs::remove_file(&out).unwrap();
        }
    }
    let median = |seconds: &mut Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    let (copy_s, latest_s, back_s) = (median(&mut copy_s), median(&mut latest_s), median(&mut back_s));
    let rate = |seconds: f64| bytes as f64 / seconds / (1 << 20) as f64;
    let (latest, behind) = (copy_s / latest_s, copy_s / back_s);
    if json {
        println!(
            "{{\"bench\":\"restore\",\"bytes\":{bytes},\"batches\":{batches},\"cold\":{cold},\"cp_mib_per_s\":{:.0},\
             \"latest_ratio\":{latest:.2},\"back_ratio\":{behind:.2}}}",
            rate(copy_s)
        );
        return;
    }
    println!(
        "volume {} MiB, {batches} batches, caches {}",
        bytes >> 20,
        if cold { "dropped" } else { "NOT dropped" }
    );
    println!("{:<28}{:>10}{:>9}{:>8}", "", "MiB/s", "ratio", "target");
    println!("{:<28}{:>10.0}", "cp --sparse=always + fsync", rate(copy_s));
    println!("{:<28}{:>10.0}{latest:>9.2}{:>8}", "restore latest", rate(latest_s), 0.8);
    println!(
        "{:<28}{:>10.0}{behind:>9.2}{:>8}",
        format!("restore {batches} batches back"),
        rate(back_s),
        0.5
    );
}
