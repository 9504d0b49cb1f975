//! A view far back: opening it and its first reads, with merged undo indexes and without, in the same run.
//!
//! `cargo bench -p afterimage-receiver --bench view -- [--batches N] [--dir DIR] [--json]` Target (DESIGN
//! section 10): 1 s or less, 10,000 small batches back. Caches are warm: what is measured is the search.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a benchmark; it ends at the first surprise"
)]

#[path = "../tests/storage/mod.rs"]
mod storage;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use journal::Lsn;
use journal::io::{Disk, RealDisk};
use journal::record::Op;
use receiver::history::History;
use receiver::point::At;
use receiver::view::View;
use storage::{Group, Random, Source, open, settings};

const VOLUME_BYTES: u64 = 1 << 40;
/// Random 4 KiB writes in each batch.
const WRITES_PER_BATCH: u64 = 8;
const READS: u64 = 16;

/// Milliseconds until a view is open and has answered once, and for a later read.
fn measure(history: &Arc<History>, back: Lsn) -> (f64, f64) {
    let mut random = Random(7);
    let mut buffer = vec![0; 4096];
    let start = Instant::now();
    let (point, _pin) = history.resolve_pinned(&At::Lsn(back)).unwrap();
    let view = View::open(history, point, "v0").unwrap();
    view.read_at(&mut buffer, 0).unwrap();
    let first_ms = start.elapsed().as_secs_f64() * 1000.0;
    let start = Instant::now();
    for _ in 0..READS {
        view.read_at(&mut buffer, random.below(VOLUME_BYTES / 4096) * 4096).unwrap();
    }
    (first_ms, start.elapsed().as_secs_f64() * 1000.0 / READS as f64)
}

fn main() {
    let (mut batches, mut dir, mut json) = (10_000_u64, std::env::temp_dir(), false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--batches" => batches = words.next().unwrap().parse().unwrap(),
            "--dir" => dir = PathBuf::from(words.next().unwrap()),
            "--json" => json = true,
            _ => {}
        }
    }
    let work = tempfile::tempdir_in(&dir).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let group_dir = work.path().join("groups/g");
    let mut random = Random(1);
    let mut source = Source::new();
    source.epoch(0);
    source.volume(0, VOLUME_BYTES);
    source.push(Op::ResyncBegin, 0, 0, 0, b"bench".to_vec());
    let back = source.push(Op::ResyncEnd, 0, 0, 0, Vec::new());
    source.frame();
    let mut group = Group::create(Arc::clone(&disk), &group_dir, &source);
    let mut chosen = settings(64 << 20);
    chosen.replica_dir = work.path().join("replica");
    let (history, mut applier) = open(&disk, &group_dir, chosen).unwrap();
    history.attach_tail(group.writer.shared());
    let mut merge_s = 0.0;
    for _ in 0..=batches {
        let durable = group.receive(&source, usize::MAX, Some(&history));
        while applier.next_batch(&durable).unwrap().is_some() {}
        group.forget(&mut source);
        source.records.clear();
        for _ in 0..WRITES_PER_BATCH {
            let byte = random.next() as u8;
            source.write(0, random.below(VOLUME_BYTES / 4096) * 4096, vec![byte; 4096]);
        }
        source.frame();
    }
    let before = measure(&history, back);
    let start = Instant::now();
    let merged = applier.merge(usize::MAX);
    merge_s += start.elapsed().as_secs_f64();
    let after = measure(&history, back);
    let bytes: u64 = walk(&group_dir.join("merged"));
    let uname = rustix::system::uname();
    let (kernel, machine) = (uname.release().to_string_lossy(), uname.machine().to_string_lossy());
    if json {
        println!(
            "{{\"bench\":\"view\",\"kernel\":\"{kernel}\",\"batches\":{batches},\"open_ms\":{:.3},\"open_unmerged_ms\":{:.3},\
             \"read_ms\":{:.3},\"read_unmerged_ms\":{:.3},\"merge_s\":{merge_s:.3},\"merged_files\":{merged},\
             \"merged_bytes\":{bytes}}}",
            after.0, before.0, after.1, before.1
        );
        return;
    }
    println!(
        "{machine}, Linux {kernel}, {}: {batches} batches of {WRITES_PER_BATCH} writes of 4 KiB",
        dir.display()
    );
    println!(
        "view {batches} batches back, opened and read once: {:.1} ms (without merged indexes {:.1} ms)",
        after.0, before.0
    );
    println!(
        "each further read: {:.2} ms (without {:.2} ms): {:.0} times",
        after.1,
        before.1,
        before.1 / after.1
    );
    println!("{merged} merged indexes, {} KiB, made in {merge_s:.2} s", bytes >> 10);
}

fn walk(dir: &std::path::Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}
