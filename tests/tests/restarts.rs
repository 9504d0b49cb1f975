//! Stops and starts, and what each leaves behind.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use tests::control::{Control, poll};
use tests::history::{Area, History};
use tests::image::{Images, assert_equal};
use tests::nbd_client::NbdClient;
use tests::oracle::assert_prefix_consistent;
use tests::outsider::Outsider;
use tests::program::{afterimage, need, outcome};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;
use tests::up::Up;
use tests::writer::{Pace, Writers};

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn a_clean_stop_and_start_needs_no_resync() -> Result<()> {
    story("clean restarts", |home| {
        let mut pair =
            Pair::start(home, &PairSpec { volumes: &[("disk", 16 << 20)], ..PairSpec::default() })?;
        let history = Arc::new(History::new(home.seed(), vec![vec![Area { volume: 0, blocks: 0..2048 }]]));
        let epoch = pair.source.group()?.number("epoch");
        let first = history.mark(|| pair.source.captured())?;
        for round in 0..5u64 {
            let writers = Writers::start(&history, &pair.sockets(), Pace::default(), home.seed() + round);
            let wanted = (usize::try_from(round)? + 1) * 200;
            poll("writes", MINUTE, || Ok((history.answered()[0] >= wanted).then_some(())))?;
            writers.stop()?;
            let before = history.mark(|| pair.source.captured())?;
            // Either order, and each alone.
            if round != 1 {
                ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
            }
            if round != 2 {
                ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
                pair.start_receiver()?;
            }
            if round != 1 {
                pair.start_source()?;
            }
            let group = pair.until_served()?;
            ensure!(group.number("epoch") == epoch, "round {round} began a new epoch: {}", group.0);
            ensure!(group.number("captured_lsn") >= before, "lsns never run back");
            pair.assert_replica_equals_source()?;
        }
        let last = pair.source.captured()?;
        let points = pair.receiver.points(GROUP)?;
        ensure!(points["gaps"] == serde_json::json!([]), "{points}");
        let mut random = home.rng();
        for _ in 0..10 {
            let lsn = random.random_range(first..=last);
            let images = Images::open(&pair.restore(&format!("lsn:{lsn}"), &home.path("restored.img"))?)?;
            assert_prefix_consistent(&history, &images, &history.bounds_at(lsn))
                .with_context(|| format!("lsn {lsn}"))?;
        }
        home.figure("5 rounds, one epoch, no gap, 10 random lsns agree");
        Ok(())
    })
}

#[test]
fn a_bare_directory_is_enough_to_restore() -> Result<()> {
    story("bare directory", |home| {
        let mut up = Up::start(home, &["--size", "16MiB"])?;
        let socket = nbd_socket(&up.control)?;
        let mut client = NbdClient::connect(&socket, "disk0")?;
        let mut random = home.rng();
        let mut images = Vec::new();
        for version in 0..5 {
            let mut image = vec![0; 16 << 20];
            random.fill(&mut image[..1 << 20]);
            for (index, piece) in image[..1 << 20].chunks(64 << 10).enumerate() {
                client.write(piece, (index as u64) << 16)?;
            }
            up.control.bookmark("default", &format!("version-{version}"))?;
            images.push(image);
        }
        drop(client);
        up.control.wait()?;
        let epoch = up.control.group()?.number("epoch");
        up.kill()?;
        let to = home.path("restored.img");
        let (to_text, up_text) = (to.to_string_lossy(), up.dir().to_string_lossy().into_owned());
        for (version, image) in images.iter().enumerate() {
            let at = format!("bookmark:version-{version}");
            for dir in ["", "receiver", "receiver/groups/default"] {
                let dir = up.dir().join(dir);
                let dir = dir.to_string_lossy();
                let line =
                    ["restore", "default", "--at", &at, "--to", &to_text, "--force", "--journal", &dir];
                afterimage(line)?.expect(0)?;
                ensure!(fs::read(&to)? == *image, "{at} from {dir} is not what it was");
            }
        }
        // While the daemon runs the directory is its own.
        let group = up.again(&[])?;
        ensure!(group.number("epoch") == epoch, "a kill is no gap: {}", group.0);
        let line =
            ["restore", "default", "--at", "latest", "--to", &to_text, "--force", "--journal", &up_text];
        let refused = afterimage(line)?;
        ensure!(refused.code != 0 && !refused.stderr.is_empty(), "{refused}");
        home.figure("5 bookmarks from 3 directories, without a daemon");
        Ok(())
    })
}

#[test]
fn a_disk_with_content_is_synchronised_before_it_is_served() -> Result<()> {
    story("up --disk", |home| {
        let path = home.path("disk.img");
        let disk = Outsider::create(&path)?;
        disk.set_len(64 << 20)?;
        let mut bytes = vec![0; 1 << 20];
        for mib in [0u64, 7, 8, 40, 63] {
            home.rng().fill(bytes.as_mut_slice());
            disk.write_all_at(&bytes, mib << 20)?;
        }
        let original = fs::read(&path)?;
        let mut up = Up::start(home, &["--disk", &path.to_string_lossy(), "--volume", "data"])?;
        up.control.wait()?;
        let replica = up.control.group()?.of_volume("data", "replica")?;
        assert_equal(&path, replica.as_ref())?;
        let oldest = up.control.points("default")?["oldest"]["lsn"].as_u64().context("a first point")?;
        let to = home.path("restored.img");
        up.control.restore("default", &format!("lsn:{oldest}"), &to)?;
        ensure!(fs::read(&to)? == original, "the first point is the disk as it was");
        // Sparse where the disk is.
        let used =
            |path| -> Result<u64> { Ok(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path)?) * 512) };
        ensure!(used(to.as_path())? <= used(path.as_path())? + (1 << 20), "the restored image is not sparse");

        // Changed behind our back: noticed, and synchronised again.
        let epoch = up.control.group()?.number("epoch");
        ensure!(up.stop()?.success(), "stops cleanly");
        disk.write_all_at(b"changed by somebody else", 20 << 20)?;
        let group = up.again(&[])?;
        ensure!(group.number("epoch") > epoch, "a change from outside begins a new epoch: {}", group.0);
        up.control.wait()?;
        assert_equal(&path, replica.as_ref())?;
        let gaps = up.control.points("default")?["gaps"].clone();
        ensure!(gaps.to_string().contains("changed"), "the gap's reason is told: {gaps}");
        home.figure(format!("first point lsn {oldest}; after a change from outside: {gaps}"));
        Ok(())
    })
}

#[test]
fn up_is_its_own_manual() -> Result<()> {
    story("up", |home| {
        need(&["curl"])?;
        let mut up = Up::start(home, &["--size", "8MiB", "--size", "4MiB"])?;
        let printed = poll("two URIs", MINUTE, || {
            Ok(Some(up.daemon()?.printed()?).filter(|printed| printed.lines().count() == 2))
        })?;
        ensure!(printed.starts_with("nbd+unix:///disk0?socket="), "printed: {printed:?}");
        let dir = up.dir().to_string_lossy().into_owned();
        // Twice on one directory.
        afterimage(["up", "--dir", &dir])?.expect_saying(1, "runs on")?;
        // curl is a client.
        let socket = up.control.socket().to_string_lossy().into_owned();
        let curl =
            |args: &[&str]| outcome(Command::new("curl").args(["-sS", "--unix-socket", &socket]).args(args));
        let status: serde_json::Value =
            serde_json::from_str(&curl(&["http://x/v1/status"])?.expect(0)?.stdout)?;
        ensure!(status["groups"][0]["name"] == "default", "{status}");
        let json = "Content-Type: application/json";
        let body = r#"{"group":"default","name":"by-curl"}"#;
        let bookmark = curl(&["-H", json, "-d", body, "http://x/v1/bookmark"])?.expect(0)?;
        ensure!(bookmark.stdout.contains("\"lsn\":"), "{bookmark}");
        let code =
            curl(&["-o", "/dev/null", "-w", "%{http_code}", "http://x/v1/points/nobody"])?.expect(0)?;
        ensure!(code.stdout.starts_with('4'), "an unknown group is the caller's mistake: {code}");
        // A directory of two volumes.
        up.control.wait()?;
        let to = home.path("restored");
        up.control.restore("default", "bookmark:by-curl", &to)?;
        for (name, bytes) in [("disk0.img", 8 << 20), ("disk1.img", 4 << 20)] {
            ensure!(to.join(name).metadata()?.len() == bytes, "{name}");
        }
        // A second run continues without a word, and refuses contradiction.
        let epoch = up.control.group()?.number("epoch");
        ensure!(up.stop()?.success(), "stops cleanly");
        afterimage(["up", "--dir", &dir, "--size", "16MiB"])?.expect_saying(2, "leave the flag out")?;
        let group = up.again(&[])?;
        ensure!(group.number("epoch") == epoch, "continued: {}", group.0);
        home.figure("URIs, curl, twice, continued");
        Ok(())
    })
}

fn nbd_socket(control: &Control) -> Result<std::path::PathBuf> {
    let uri = control.group()?.of_volume("disk0", "nbd_uri")?;
    let socket = uri.split("socket=").nth(1).with_context(|| uri.clone())?;
    Ok(socket.into())
}
