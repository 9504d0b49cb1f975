//! Journal directories that are foreign, damaged or hostile; comparisons that follow content.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tests::control::poll;
use tests::nbd_client::NbdClient;
use tests::program::{Outcome, afterimage, afterimage_path, outcome};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;

const MINUTE: Duration = Duration::from_secs(60);

/// A command over a hostile directory: within 20 s and 4 GB.
fn bounded(command: &str, dir: &Path) -> Result<Outcome> {
    let line = format!("ulimit -v 4000000; exec timeout 20 \"$0\" journal {command} \"$1\"");
    outcome(Command::new("sh").args(["-c", &line]).arg(afterimage_path()?).arg(dir))
}

/// A segment file whose header is sound, and behind it nothing.
fn segment(dir: &Path, number: u64, lsn: u64) -> Result<()> {
    let mut header = [0_u8; 512];
    header[..8].copy_from_slice(b"AFTRSEG1");
    (header[8], header[10]) = (1, 1);
    header[16..32].fill(9);
    header[32..40].copy_from_slice(&number.to_le_bytes());
    header[56..72].fill(4);
    header[72] = 1;
    header[96..104].copy_from_slice(&lsn.to_le_bytes());
    let crc = crc32fast::hash(&header[..508]).to_le_bytes();
    header[508..].copy_from_slice(&crc);
    fs::create_dir_all(dir)?;
    let file = File::create(dir.join(format!("{number:020}.seg")))?;
    file.write_all_at(&header, 0)?;
    Ok(file.set_len(512 + 4096)?)
}

#[test]
fn hostile_files_crash_no_journal_command_and_hold_none_up() -> Result<()> {
    story("hostile journals", |home| {
        segment(&home.path("lsn"), 1, u64::MAX)?;
        segment(&home.path("apart"), 1, 0)?;
        segment(&home.path("apart"), (1 << 36) - 1, 0)?;
        segment(&home.path("beyond"), 1, 0)?;
        segment(&home.path("beyond"), 1 << 63, 0)?;
        for (dir, name) in [("pipe", "00000000000000000001.seg"), ("pipes", "journal.control")] {
            segment(&home.path(dir), 2, 0)?;
            let path = home.path(dir).join(name);
            ensure!(Command::new("mkfifo").arg(&path).status()?.success(), "mkfifo");
        }
        segment(&home.path("links"), 2, 0)?;
        std::os::unix::fs::symlink("/dev/zero", home.path("links").join("00000000000000000001.seg"))?;
        // A sparse file may say any size.
        segment(&home.path("long"), 1, 0)?;
        File::options().write(true).open(home.path("long/00000000000000000001.seg"))?.set_len(8 << 40)?;
        for dir in ["lsn", "apart", "beyond", "pipe", "pipes", "links", "long"] {
            bounded("verify", &home.path(dir))?.expect(4).context(dir)?;
            let listed = bounded("ls", &home.path(dir))?;
            ensure!(listed.code == 0, "ls {dir}: {listed:?}");
            let dumped = bounded("dump", &home.path(dir))?;
            ensure!(matches!(dumped.code, 0 | 1 | 4), "dump {dir}: {dumped:?}");
        }
        Ok(())
    })
}

#[test]
fn a_directory_that_is_no_journal_is_a_usage_error() -> Result<()> {
    story("a wrong directory", |home| {
        fs::create_dir(home.path("empty"))?;
        for dir in ["/etc".into(), home.path("empty")] {
            for command in ["verify", "ls", "dump"] {
                bounded(command, &dir)?.expect_saying(2, "holds no segments")?;
            }
        }
        let pair = Pair::start(home, &PairSpec { volumes: &[("disk", 1 << 20)], ..PairSpec::default() })?;
        for dir in ["receiver", "source", &format!("receiver/groups/{GROUP}")] {
            let dir = home.path(dir);
            // The receiver's group is made by the first hello; of a journal that is being written the end may
            // be met between two writes.
            poll("a whole journal", MINUTE, || Ok((bounded("verify", &dir)?.code == 0).then_some(())))?;
            let listed = afterimage(["journal", "ls", &dir.to_string_lossy()])?.expect(0)?;
            ensure!(listed.stdout.contains("journal"), "{listed:?}");
        }
        drop(pair);
        Ok(())
    })
}

/// Seconds of CPU that a process has used.
fn cpu_s(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(ticks as f64 / 100.0)
}

#[test]
fn a_comparison_takes_time_by_content_and_not_by_size() -> Result<()> {
    story("a sparse disk after a power loss", |home| {
        const SIZE: u64 = 256 << 30;
        let mut pair = Pair::start(home, &PairSpec { volumes: &[("disk", SIZE)], ..PairSpec::default() })?;
        let (socket, export) = pair.sockets().remove(0);
        let mut client = NbdClient::connect(&socket, &export)?;
        for at in [0, SIZE / 2 + 4096, SIZE - (1 << 20)] {
            client.write(&vec![7; 1 << 20], at)?;
        }
        client.flush()?;
        drop(client);
        pair.source.wait()?;
        pair.source_daemon()?.kill()?;
        pair.lose_ring()?;
        // Behind our back: content where the replica has a hole, and a hole where it has content.
        let backing = File::options().write(true).open(pair.backing("disk"))?;
        backing.write_all_at(&[9; 4096], SIZE / 4)?;
        rustix::fs::fallocate(
            &backing,
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            0,
            1 << 20,
        )?;
        drop(backing);
        pair.start_source()?;
        pair.until_served()?;
        pair.source.wait()?;
        let cpu = cpu_s(pair.source_daemon()?.id())?;
        home.figure(format!("256 GiB compared with {cpu:.1} s of CPU"));
        ensure!(cpu < 10.0, "{cpu} s of CPU for 256 GiB of holes");
        let replica = File::open(pair.replica("disk"))?;
        for (at, byte) in [(0, 0), (SIZE / 4, 9), (SIZE / 2 + 4096, 7), (SIZE - 4096, 7)] {
            let mut found = [1; 4096];
            replica.read_exact_at(&mut found, at)?;
            ensure!(found == [byte; 4096], "offset {at}");
        }
        Ok(())
    })
}

#[test]
fn a_reboot_in_a_first_copy_goes_on_by_comparison() -> Result<()> {
    story("a reboot in a first copy", |home| {
        const SIZE: u64 = 64 << 20;
        fs::create_dir_all(home.path("source"))?;
        let mut content = vec![0; usize::try_from(SIZE)?];
        home.rng().fill(&mut content[..]);
        fs::write(home.path("source/disk.img"), &content)?;
        let slow = "[resync]\nrate = \"100Mbit\"\n";
        let receiver = "[apply]\ninterval = \"200ms\"\nmin_interval = \"100ms\"\n";
        let spec = PairSpec { volumes: &[("disk", SIZE)], source: slow, receiver, ..PairSpec::default() };
        let mut pair = Pair::begin(home, &spec)?;
        let replica = pair.replica("disk");
        let arrived = || {
            use std::os::unix::fs::MetadataExt as _;
            fs::metadata(&replica).map_or(0, |found| found.blocks() * 512)
        };
        poll("a part of it on the replica", MINUTE, || Ok((arrived() > SIZE / 4).then_some(())))?;
        ensure!(pair.source.group()?.state() == "syncing", "it was not cut in the middle");
        pair.source_daemon()?.kill()?;
        pair.lose_ring()?;
        let settings = home.path("source.toml");
        fs::write(&settings, fs::read_to_string(&settings)?.replace(slow, ""))?;
        pair.start_source()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()?;
        let log = fs::read_to_string(home.log("source"))?;
        let line = log.lines().rfind(|line| line.contains("synchronised")).context("no line says it")?;
        let number = |key: &str| -> Result<u64> {
            let plain: String = strip_colours(line);
            let from =
                plain.split(&format!("{key}=")).nth(1).with_context(|| format!("no {key}: {plain}"))?;
            Ok(from.chars().take_while(char::is_ascii_digit).collect::<String>().parse()?)
        };
        let (sent, equal) = (number("content_bytes")?, number("equal_bytes")?);
        home.figure(format!("{} MiB sent, {} MiB found equal", sent >> 20, equal >> 20));
        ensure!(sent + equal >= SIZE && equal >= SIZE / 5, "sent {sent}, equal {equal}");
        // A receiver that holds nothing cannot start at an epoch that lacks what was left out.
        pair.receiver_daemon()?.kill()?;
        for dir in ["groups", "replica"] {
            fs::remove_dir_all(home.path("receiver").join(dir))?;
        }
        pair.start_receiver()?;
        pair.source.until("a new receiver is in sync", MINUTE, |group| {
            group.state() == "replicating" && group.is_connected()
        })?;
        poll("the new replica", MINUTE, || {
            Ok((pair.replica("disk").exists() && pair.assert_replica_equals_source().is_ok()).then_some(()))
        })
    })
}

fn strip_colours(line: &str) -> String {
    let mut plain = String::new();
    let mut escaped = false;
    for letter in line.chars() {
        match (escaped, letter) {
            (false, '\u{1b}') => escaped = true,
            (false, _) => plain.push(letter),
            (true, 'm') => escaped = false,
            (true, _) => {}
        }
    }
    plain
}
