//! A source on its own: no receiver answers, clients notice nothing, and the journal holds what they wrote.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal::compress::Decoder;
use journal::io::{Disk, RealDisk};
use journal::reader::Reader;
use journal::record::{Op, Records};
use journal::tail::Limit;
use replicator::status::{GroupStatus, State};
use replicator::{Handle, Replicator, WaitOutcome};

const SIZE: u64 = 8 << 20;

/// Directories of one source: state on disk, ring in tmpfs.
struct Dirs {
    state: tempfile::TempDir,
    ring: tempfile::TempDir,
}

impl Dirs {
    fn new() -> Dirs {
        let ring = tempfile::Builder::new().prefix("af-test-").tempdir_in("/dev/shm").unwrap();
        Dirs { state: tempfile::tempdir().unwrap(), ring }
    }

    fn settings(&self) -> conf::Replicator {
        let dir = self.state.path();
        let volume = ("disk".to_owned(), dir.join("disk.img"), Some(SIZE));
        // Port 9 (discard): nobody answers there.
        let mut settings =
            conf::Replicator::embedded(dir, "g", [volume], ([127, 0, 0, 1], 9).into(), [7; 32]).unwrap();
        settings.ring_dir = self.ring.path().to_owned();
        // Larger than all that a test writes at once: an overflow would be another test's subject.
        settings.ring.bytes = 64 << 20;
        settings.journal.segment_bytes = 4 << 20;
        settings.receiver.connect_timeout = Duration::from_millis(100);
        if !settings.identity_dir.exists() {
            wire::Identity::create(&settings.identity_dir).unwrap();
        }
        settings
    }
}

async fn until(handle: &Handle, what: &str, good: impl Fn(&GroupStatus) -> bool) -> GroupStatus {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let group = handle.status().groups.remove(0);
        if good(&group) {
            return group;
        }
        assert!(Instant::now() < deadline, "never {what}: {group:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Runs qemu-io commands against the volume.
fn qemu_io(settings: &conf::Replicator, commands: &[&str]) -> String {
    let uri = format!("nbd+unix:///disk?socket={}", settings.volume[0].nbd.display());
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", &uri]);
    for text in commands {
        command.args(["-c", text]);
    }
    let out = command.output().expect("install the Debian package qemu-utils");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    text
}

/// Everything in the source journal, replayed onto zeros; and the ops seen.
fn replay(dir: &Path) -> (Vec<u8>, Vec<Op>) {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let mut reader = Reader::open(disk, &dir.join("journal")).unwrap();
    let oldest = reader.oldest();
    reader.seek(&oldest).unwrap();
    let (mut image, mut ops) = (vec![0; SIZE as usize], Vec::new());
    let (mut frame, mut raw) = (Vec::new(), Vec::new());
    let mut decoder = Decoder::new().unwrap();
    while let Some(header) = reader.next(&mut frame, Limit::End).unwrap() {
        decoder.decode(&header, &frame, &mut raw).unwrap();
        for located in Records::new(&raw) {
            let located = located.unwrap();
            ops.push(located.record.op);
            let extent = located.record.extent;
            let range = extent.offset as usize..(extent.offset + extent.len) as usize;
            match located.record.op {
                Op::Write | Op::SyncSlot => image[range].copy_from_slice(located.payload),
                Op::Discard | Op::WriteZeroes => image[range].fill(0),
                _ => {}
            }
        }
    }
    (image, ops)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_write_is_in_the_journal_and_a_clean_stop_leaves_no_gap() {
    let dirs = Dirs::new();
    let settings = dirs.settings();
    std::fs::write(dirs.state.path().join("disk.img"), vec![5; SIZE as usize]).unwrap();
    let handle = Replicator::start(settings.clone()).await.unwrap();
    let first = until(&handle, "replicating", |group| group.state == State::Replicating).await;
    assert_eq!(first.epoch, 1);
    qemu_io(
        &settings,
        &["write -P 1 0 1M", "write -P 2 4k 4k", "discard 512k 64k", "write -z 768k 4k", "flush"],
    );
    let bookmark = handle.bookmark("here").unwrap();
    let outcome = handle.wait(Duration::from_millis(200)).await.unwrap();
    assert!(
        matches!(outcome, WaitOutcome::TimedOut { .. }),
        "nobody receives, but somebody may come: {outcome:?}"
    );
    handle.shutdown().await.unwrap();
    let (image, ops) = replay(dirs.state.path());
    assert!(
        image == std::fs::read(dirs.state.path().join("disk.img")).unwrap(),
        "journal and backing differ"
    );
    assert_eq!(ops[..2], [Op::Volume, Op::ResyncBegin]);
    assert!(ops.contains(&Op::ResyncEnd) && ops.contains(&Op::Bookmark) && ops.contains(&Op::Flush));
    assert!(std::fs::read_dir(dirs.ring.path()).unwrap().all(|group| {
        std::fs::read_dir(group.unwrap().path()).unwrap().all(|file| file.unwrap().file_name() != "ring")
    }));

    let handle = Replicator::start(settings.clone()).await.unwrap();
    let again = until(&handle, "replicating again", |group| group.state == State::Replicating).await;
    assert_eq!(again.epoch, 1, "a clean stop keeps the epoch");
    assert!(again.positions.captured_lsn >= bookmark);
    let text = qemu_io(&settings, &["read -P 2 4k 4k", "write -P 9 2M 128k"]);
    assert!(!text.contains("Pattern verification failed"), "{text}");
    handle.shutdown().await.unwrap();
    let (image, _) = replay(dirs.state.path());
    assert!(image == std::fs::read(dirs.state.path().join("disk.img")).unwrap());

    // Somebody wrote to the backing while nobody protected it.
    std::fs::OpenOptions::new()
        .write(true)
        .open(dirs.state.path().join("disk.img"))
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    let file = std::fs::File::options().write(true).open(dirs.state.path().join("disk.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xee; 512], 3 << 20).unwrap();
    drop(file);
    let handle = Replicator::start(settings.clone()).await.unwrap();
    let changed = until(&handle, "waiting", |group| group.why.contains("waiting for the receiver")).await;
    assert_eq!(
        (changed.epoch, changed.state),
        (2, State::Resyncing),
        "a change behind our back: a new epoch"
    );
    assert!(changed.why.contains("changed while it was not protected"), "{}", changed.why);
    // What the receiver holds already is not sent again, so it is waited for: by nobody but the
    // synchronisation.
    qemu_io(&settings, &["write -P 11 1M 64k", "flush", "read -P 11 1M 64k"]);
    handle.shutdown().await.unwrap();
    let (_, ops) = replay(dirs.state.path());
    assert_eq!(ops.iter().filter(|op| **op == Op::ResyncBegin).count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_quota_degrades_and_the_clients_go_on() {
    let dirs = Dirs::new();
    let mut settings = dirs.settings();
    settings.journal.quota = 16 << 20;
    settings.journal.compression = conf::Compression::Off;
    let handle = Replicator::start(settings.clone()).await.unwrap();
    until(&handle, "replicating", |group| group.state == State::Replicating).await;
    // Short enough not to be compared with what a receiver holds: here is none.
    for round in 0..8 {
        qemu_io(&settings, &[&format!("write -P {} 0 3M", round + 1)]);
    }
    let group = until(&handle, "degraded", |group| group.state == State::Degraded).await;
    // By the journal's own words, or by the ring's where it is asked first.
    assert!(["quota", "had no room"].iter().any(|word| group.why.contains(word)), "{}", group.why);
    assert!(matches!(handle.wait(Duration::from_secs(60)).await.unwrap(), WaitOutcome::Impossible { .. }));
    assert_eq!(handle.bookmark("no").unwrap_err().kind, replicator::ErrorKind::NotPossible);
    let text = qemu_io(&settings, &["read -P 8 0 3M", "write -P 77 0 64k", "read -P 77 0 64k"]);
    assert!(!text.contains("Pattern verification failed"), "{text}");
    handle.shutdown().await.unwrap();

    settings.journal.quota = 64 << 20;
    let handle = Replicator::start(settings).await.unwrap();
    let group = until(&handle, "synchronised", |group| group.state == State::Replicating).await;
    assert_eq!(group.epoch, 1, "what was given up is dirty in the ring, and has its places in the stream");
    handle.shutdown().await.unwrap();
    let (image, ops) = replay(dirs.state.path());
    assert!(image == std::fs::read(dirs.state.path().join("disk.img")).unwrap());
    assert!(ops.contains(&Op::Void), "records that were given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_never_serve_one_directory_and_a_shrunk_volume_is_refused() {
    let dirs = Dirs::new();
    let settings = dirs.settings();
    let handle = Replicator::start(settings.clone()).await.unwrap();
    until(&handle, "replicating", |group| group.state == State::Replicating).await;
    let second = Replicator::start(settings.clone()).await.err().unwrap();
    assert_eq!(second.kind, replicator::ErrorKind::Busy);
    handle.shutdown().await.unwrap();
    std::fs::File::options()
        .write(true)
        .open(dirs.state.path().join("disk.img"))
        .unwrap()
        .set_len(SIZE / 2)
        .unwrap();
    let shrunk = Replicator::start(settings).await.err().unwrap();
    assert!(shrunk.to_string().contains("shrank"), "{shrunk}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_cannot_be_had_keeps_nobody_from_the_disk() {
    let dirs = Dirs::new();
    let settings = dirs.settings();
    std::fs::write(dirs.state.path().join("journal"), b"in the way").unwrap();
    let handle = Replicator::start(settings.clone()).await.unwrap();
    let group = until(&handle, "served", |group| group.volumes[0].nbd_uri.is_some()).await;
    assert_eq!(group.state, State::Degraded, "{}", group.why);
    qemu_io(&settings, &["write -P 3 0 64k", "flush"]);
    assert!(matches!(handle.wait(Duration::from_secs(60)).await.unwrap(), WaitOutcome::Impossible { .. }));

    // Once it can be had, the running agent begins an epoch in it.
    std::fs::remove_file(dirs.state.path().join("journal")).unwrap();
    let group = until(&handle, "synchronised", |group| group.state == State::Replicating).await;
    assert!(group.epoch > 1, "{group:?}");
    qemu_io(&settings, &["write -P 4 1M 64k", "flush"]);
    handle.shutdown().await.unwrap();
    let (image, _) = replay(dirs.state.path());
    assert!(image == std::fs::read(dirs.state.path().join("disk.img")).unwrap());
}
