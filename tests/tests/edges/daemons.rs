//! Signals, clients that are rude or silent, hung and full disks, and what `status` and `wait` answer.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use tests::control::{Group, poll};
use tests::daemon::Daemon;
use tests::nbd::{self, FuseDisk, Loop, Mount};
use tests::nbd_client::NbdClient;
use tests::program::{need, run};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;
use tests::story::Home;

const SOON: Duration = Duration::from_secs(20);
/// How long a disk hangs; the link's idle time is 2 s here.
const HUNG: Duration = Duration::from_secs(5);
/// For an answer that waits for no disk.
const IN_TIME: Duration = Duration::from_secs(3);
const MIB: u64 = 1 << 20;
const VOLUME: PairSpec<'_> = PairSpec {
    volumes: &[("v", 16 * MIB)],
    source: "",
    receiver: "",
    receiver_dir: None,
    source_environment: Vec::new(),
};

fn client(pair: &Pair<'_>) -> Result<NbdClient> {
    let (socket, name) = &pair.sockets()[0];
    NbdClient::connect(socket, name)
}

/// A pair whose receiver lives on a file system of its own, with so much room left before the first copy, of
/// content that does not shrink. The mount goes after the pair.
fn on_small_disk(home: &Home, room_bytes: u64, tell: impl FnOnce(&Pair<'_>) -> Result<()>) -> Result<()> {
    need(&nbd::PROGRAMS)?;
    need(&["mkfs.ext4"])?;
    let image = home.path("small.img");
    File::create(&image)?.set_len(200 * MIB)?;
    let device = Loop::attach(&image)?;
    run("mkfs.ext4", ["-q".as_ref(), "-m".as_ref(), "0".as_ref(), device.path().as_os_str()])?;
    let mount = Mount::on(&home.path("small"), device.path(), "noatime")?;
    let free = rustix::fs::statvfs(mount.path())?;
    let bytes = (free.f_bavail * free.f_frsize).saturating_sub(room_bytes);
    let ballast = mount.path().join("ballast");
    run("fallocate", ["-l".as_ref(), bytes.to_string().as_ref(), ballast.as_os_str()])?;
    let mut content = vec![0; 16 << 20];
    File::open("/dev/urandom")?.read_exact(&mut content)?;
    fs::create_dir_all(home.path("source"))?;
    fs::write(home.path("source").join("v.img"), content)?;
    let spec = PairSpec {
        receiver: "[journal]\nsegment_bytes = \"4MiB\"\n",
        receiver_dir: Some(mount.path().join("receiver")),
        ..VOLUME
    };
    let pair = Pair::begin(home, &spec)?;
    let is_full = |group: &Group| {
        group.0["peer"].is_string()
            && ["full", "no room", "space"].iter().any(|word| group.why().contains(word))
    };
    pair.receiver.until("the receiver's word on its full disk", SOON, is_full)?;
    let told = tell(&pair);
    drop(pair);
    told
}

#[test]
fn a_doubled_stop_is_one_stop_and_a_clean_one() -> Result<()> {
    story("two-signals", |home| {
        let mut pair = Pair::start(home, &VOLUME)?;
        client(&pair)?.write(&[1; 4096], 0)?;
        pair.source.wait()?;
        let epoch = pair.source.group()?.number("epoch");
        let source = pair.source_daemon()?;
        for signal in [Signal::TERM, Signal::INT, Signal::TERM] {
            let _ = source.signal(signal); // the last may find it gone
        }
        let ended = source.ended()?;
        ensure!(ended.success(), "the stop was cut short: {ended}");
        pair.lose_ring()?; // nothing but the clean mark tells that nothing is missing
        pair.start_source()?;
        let group = pair.until_served()?;
        ensure!(group.number("epoch") == epoch, "a new epoch after a clean stop");
        pair.assert_replica_equals_source()
    })
}

#[test]
fn a_hangup_ends_no_daemon() -> Result<()> {
    story("hangup", |home| {
        let mut pair = Pair::start(home, &VOLUME)?;
        pair.source_daemon()?.signal(Signal::HUP)?;
        pair.receiver_daemon()?.signal(Signal::HUP)?;
        for daemon in ["source", "receiver"] {
            let log = home.log(daemon);
            poll(&format!("the {daemon}'s word on SIGHUP"), SOON, || {
                Ok(std::fs::read_to_string(&log)?.contains("SIGHUP").then_some(()))
            })?;
        }
        client(&pair)?.write(&[2; 4096], 0)?;
        pair.assert_replica_equals_source()
    })
}

#[test]
fn replicating_is_never_said_without_a_link_and_without_a_word() -> Result<()> {
    story("state-without-a-link", |home| {
        let mut pair = Pair::start(home, &VOLUME)?;
        pair.source.wait()?;
        pair.source_daemon()?.stop()?;
        pair.receiver_daemon()?.stop()?;
        pair.start_source()?;
        let mut looked = 0;
        poll("twenty looks at a source without a receiver", SOON, || {
            if let Ok(group) = pair.source.group() {
                looked += 1;
                let plain = group.state() == "replicating" && group.why().is_empty();
                ensure!(!plain, "nothing says that there is no link: {}", group.0);
            }
            Ok((looked >= 20).then_some(()))
        })
    })
}

/// Nothing could be stored yet: how far behind the replica is cannot be known.
#[test]
fn a_time_behind_that_is_not_known_is_null() -> Result<()> {
    story("rpo while unknown", |home| {
        on_small_disk(home, 6 * MIB, |pair| {
            let group = pair.receiver.group()?;
            ensure!(group.number("received_lsn") == 0, "something was stored: {}", group.0);
            ensure!(group.0.get("rpo_ms").is_some_and(serde_json::Value::is_null), "{}", group.0);
            Ok(())
        })
    })
}

/// The source told of writes that the receiver has no room for: a fail-over that waits must not go on without
/// them.
#[test]
fn a_wait_at_a_receiver_without_room_does_not_end_well() -> Result<()> {
    story("wait without room", |home| {
        on_small_disk(home, 9 * MIB, |pair| {
            let captured = pair.source.captured()?;
            let held = pair.receiver.group()?.number("received_lsn");
            ensure!(held < captured, "the receiver took all: {held} of {captured}");
            let done = pair.receiver.command(&["wait", "--timeout", "5s"])?.expect(3)?;
            ensure!(done.stderr.contains(&held.to_string()), "what is here is said: {done}");
            Ok(())
        })
    })
}

/// A disk that can be made to hang: `qemu-nbd` under `nbdfuse`.
struct Storage {
    fuse: FuseDisk,
    /// Ends after what asks it.
    _server: Daemon,
}

/// Goes on when the story ends, however it ends: what hangs cannot be unmounted.
struct Frozen<'a>(&'a FuseDisk);

impl Storage {
    fn new(home: &Home, mib: u64) -> Result<Storage> {
        need(&nbd::PROGRAMS)?;
        need(&["qemu-nbd"])?;
        let (store, socket) = (home.path("store.img"), home.path("store.sock"));
        File::create(&store)?.set_len(mib * MIB)?;
        let (socket_text, store_text) = (socket.to_string_lossy(), store.to_string_lossy());
        let args = ["--persistent", "--format=raw", "--socket", &*socket_text, &*store_text];
        let server = Daemon::start(home, "store", Path::new("qemu-nbd"), args)?;
        poll("the store's socket", SOON, || Ok(socket.exists().then_some(())))?;
        let fuse = FuseDisk::attach(home, &format!("nbd+unix:///?socket={socket_text}"))?;
        Ok(Storage { fuse, _server: server })
    }

    fn freeze(&self) -> Result<Frozen<'_>> {
        self.fuse.signal(Signal::STOP)?;
        Ok(Frozen(&self.fuse))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::CONT);
    }
}

/// Both sides answer and are connected, for this long; the number of looks.
fn answers_all_the_while(pair: &Pair<'_>, hung: Duration) -> Result<u32> {
    let (begun, mut looks) = (Instant::now(), 0);
    while begun.elapsed() < hung {
        let group = in_time("status", || pair.source.group())?;
        ensure!(group.is_connected(), "the link went down: {}", group.0);
        ensure!(pair.receiver.group()?.state() != "detached", "the receiver lost its source");
        looks += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(looks)
}

/// What must not wait for a disk.
fn in_time<T>(what: &str, order: impl FnOnce() -> Result<T>) -> Result<T> {
    let asked = Instant::now();
    let answer = order()?;
    ensure!(asked.elapsed() < IN_TIME, "{what} took {:?}", asked.elapsed());
    Ok(answer)
}

/// Kills the receiver, does something to it, and starts it again; the source notices both.
fn restart_receiver(pair: &mut Pair<'_>, change: impl FnOnce(&Pair<'_>) -> Result<()>) -> Result<()> {
    pair.receiver_daemon()?.kill()?;
    pair.source.until("the link down", SOON, |group| !group.is_connected())?;
    change(pair)?;
    pair.start_receiver()?;
    pair.source.until("the link again", SOON, Group::is_connected)?;
    Ok(())
}

/// The storage below a protected disk does not answer for longer than the link's idle time.
#[test]
fn a_disk_that_hangs_holds_up_neither_status_nor_link() -> Result<()> {
    story("hung disk", |home| {
        let storage = Storage::new(home, 16)?;
        fs::create_dir_all(home.path("source"))?;
        std::os::unix::fs::symlink(storage.fuse.path(), home.path("source").join("v.img"))?;
        let volumes = [("v", 16 * MIB), ("w", 16 * MIB)];
        let pair = Pair::start(home, &PairSpec { volumes: &volumes, ..VOLUME })?;
        client(&pair)?.write(&[1; 4096], 0)?;
        pair.source.wait()?;
        let frozen = storage.freeze()?;
        let looks = answers_all_the_while(&pair, HUNG)?;
        home.figure(format!("{looks} looks while the disk hung"));
        File::options().write(true).open(pair.backing("w"))?.set_len(24 * MIB)?;
        let grown = |group: &Group| group.0["volumes"][1]["size_bytes"] == 24 * MIB;
        let group = pair.source.until("the other disk's growth", SOON, grown)?;
        ensure!(group.why().contains("the disk of volume v has not answered"), "{}", group.0);
        drop(frozen);
        client(&pair)?.write(&[2; 4096], 4096)?;
        pair.source.wait()?;
        ensure!(fs::read(pair.replica("v"))?[4096..8192] == [2; 4096], "the disk answers again");
        drop(pair);
        storage.fuse.unmount()
    })
}

/// The disk below the source's own directory (state, journal, which copy it is) does not answer, while
/// clients write, orders come, and the receiver goes and returns.
#[test]
fn a_state_directory_that_hangs_holds_up_neither_status_nor_link_nor_orders() -> Result<()> {
    story("hung state directory", |home| {
        need(&["mkfs.ext4"])?;
        let storage = Storage::new(home, 96)?;
        let device = Loop::attach(&storage.fuse.path())?;
        run("mkfs.ext4", ["-q".as_ref(), "-m".as_ref(), "0".as_ref(), device.path().as_os_str()])?;
        let mount = Mount::on(&home.path("source"), device.path(), "noatime")?;
        std::os::unix::fs::symlink(home.path("v.img"), mount.path().join("v.img"))?;
        File::create(home.path("v.img"))?.set_len(16 * MIB)?;
        let spec = PairSpec { source: "[journal]\nquota = \"64MiB\"\nsegment_bytes = \"4MiB\"\n", ..VOLUME };
        let mut pair = Pair::start(home, &spec)?;
        let mut clients = client(&pair)?;
        clients.write(&[1; 4096], 0)?;
        pair.source.wait()?;
        let frozen = storage.freeze()?;
        clients.write(&[2; 4096], 4096)?;
        let looks = answers_all_the_while(&pair, HUNG)?;
        home.figure(format!("{looks} looks while the directory hung"));
        // An order that stores something is taken, or refused with what hangs. So is the next one.
        for _ in 0..2 {
            let verify = || Ok(pair.source.ask("POST", "/v1/verify", &json!({ "group": GROUP })));
            let told = match in_time("verify", verify)? {
                Ok(answer) => answer.to_string(),
                Err(error) => format!("{error:#}"),
            };
            home.figure(format!("verify: {told}"));
            in_time("bookmark", || pair.source.post_bookmark(GROUP, "while-it-hangs"))?;
        }
        restart_receiver(&mut pair, |_| Ok(()))?;
        // The replica is to be made anew: that is to be remembered, and cannot be yet.
        restart_receiver(&mut pair, |pair| {
            fs::remove_file(pair.replica("v"))?;
            File::create(pair.replica("v"))?;
            Ok(())
        })?;
        let begun = Instant::now();
        while begun.elapsed() < HUNG {
            let group = in_time("status", || pair.source.group())?;
            ensure!(
                group.state() != "replicating" || !group.why().is_empty(),
                "nothing is said of it: {}",
                group.0
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        home.figure(format!("with a new replica: {}", pair.source.group()?.why()));
        drop(frozen);
        clients.write(&[3; 4096], 8192)?;
        pair.until_served()?;
        pair.assert_replica_equals_source()?;
        ensure!(pair.source_daemon()?.stop()?.success(), "it stops cleanly");
        drop(pair);
        drop((mount, device));
        storage.fuse.unmount()
    })
}
