//! `up` and every command around it, as a user types them. Writes go through `nbdcopy` (package libnbd-bin).

// Tests may unwrap; the lint knows only functions marked as such, not what they call.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const SIZE: usize = 8 << 20;

fn afterimage(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_afterimage"))
        .args(args)
        .env_remove("AFTERIMAGE_CONTROL")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn done(args: &[&str]) -> String {
    let output = afterimage(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[track_caller]
fn ends(code: i32, args: &[&str]) -> String {
    let output = afterimage(args);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
    err
}

/// A running `up`, killed if the test ends early.
struct Up {
    child: Child,
    uris: Vec<String>,
}

impl Up {
    fn start(args: &[&str], volumes: usize) -> Up {
        let mut child = Command::new(env!("CARGO_BIN_EXE_afterimage"))
            .args(args)
            .env_remove("AFTERIMAGE_CONTROL")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let uris = lines.take(volumes).map(Result::unwrap).collect();
        Up { child, uris }
    }

    fn stop(mut self) {
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.child),
            rustix::process::Signal::TERM,
        )
        .unwrap();
        assert!(self.child.wait().unwrap().success(), "a graceful stop is 0");
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write(image: &Path, uri: &str) {
    let copied = Command::new("nbdcopy").arg("--flush").arg(image).arg(uri).status();
    assert!(copied.expect("install the package libnbd-bin").success());
}

fn image(dir: &Path, byte: u8) -> PathBuf {
    let path = dir.join(format!("{byte}.img"));
    let content: Vec<u8> = (0..SIZE).map(|at| byte ^ u8::try_from(at % 251).unwrap()).collect();
    std::fs::write(&path, content).unwrap();
    path
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    assert!(
        std::fs::read(a).unwrap() == std::fs::read(b).unwrap(),
        "{} differs from {}",
        a.display(),
        b.display()
    );
}

#[test]
fn a_disk_is_protected_marked_overwritten_and_brought_back() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("d");
    let d = dir.to_str().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let (first, second) = (image(home.path(), 1), image(home.path(), 2));

    let up = Up::start(&["up", "--dir", d, "--size", "8MiB", "--volume", "db"], 1);
    assert_eq!(up.uris[0], format!("nbd+unix:///db?socket={d}/source/db.nbd.sock"));
    assert!(ends(1, &["up", "--dir", d]).contains("runs on"), "one at a time");

    // The first synchronisation, before whose end there are no points.
    done(&["wait", "--dir", d]);
    write(&first, &up.uris[0]);
    let lsn: u64 = done(&["bookmark", "default", "before", "--dir", d]).parse().unwrap();
    write(&second, &up.uris[0]);
    done(&["wait", "--dir", d, "--timeout", "60s"]);

    let status: Value = serde_json::from_str(&done(&["status", "--json", "--dir", d])).unwrap();
    let group = &status["groups"][0];
    assert_eq!((group["name"].as_str(), group["state"].as_str()), (Some("default"), Some("replicating")));
    for key in ["why", "epoch", "rpo_ms", "backlog_bytes"] {
        assert!(group.get(key).is_some(), "{key} in {group}");
    }
    let lsns = ["captured_lsn", "received_lsn", "applied_lsn", "checkpoint_lsn"]
        .map(|key| group[key].as_u64().unwrap());
    assert!(lsns.is_sorted_by(|a, b| a >= b) && lsns[3] > lsn, "{lsns:?}");
    let volume = &group["volumes"][0];
    assert_eq!(volume["nbd_uri"], up.uris[0].as_str());
    assert_eq!(volume["size_bytes"], SIZE);
    assert_eq!(volume["source"], format!("{d}/source/db.img"));
    same(&second, Path::new(volume["replica"].as_str().unwrap()));
    assert!(done(&["status", "--dir", d]).contains("default: replicating"));

    let points: Value = serde_json::from_str(&done(&["points", "default", "--json", "--dir", d])).unwrap();
    assert_eq!(
        (&points["bookmarks"][0]["name"], &points["bookmarks"][0]["lsn"]),
        (&"before".into(), &lsn.into())
    );
    assert!(done(&["points", "default", "--dir", d]).contains(&format!("bookmark before: lsn {lsn}")));

    let to = at("before.img");
    let restore = ["restore", "default", "--at", "bookmark:before", "--to", &to, "--dir", d];
    done(&[&restore[..], &["--dry-run"]].concat());
    assert!(!Path::new(&to).exists(), "a dry run writes nothing");
    let report: Value = serde_json::from_str(&done(&[&restore[..], &["--json"]].concat())).unwrap();
    assert_eq!(report["lsn"], lsn);
    same(&first, Path::new(&to));
    assert!(ends(2, &restore).contains("force"));
    done(&[&restore[..], &["--force"]].concat());

    let never = ["--to", &at("never.img"), "--dir", d];
    ends(3, &[&["restore", "default", "--at", "lsn:99999999999"][..], &never].concat());
    ends(3, &[&["restore", "default", "--at", "bookmark:none"][..], &never].concat());
    ends(2, &[&["restore", "nobody", "--at", "latest"][..], &never].concat());
    ends(2, &["bookmark", "nobody", "x", "--dir", d]);
    up.stop();
    assert!(!dir.join("control.sock").exists());

    // The directory alone, and then a second run that needs no other word.
    bare(&dir, &first, lsn);
    let up = Up::start(&["up", "--dir", d], 1);
    assert!(up.uris[0].starts_with("nbd+unix:///db?"));
    done(&["wait", "--dir", d]);
    up.stop();
    assert!(ends(2, &["up", "--dir", d, "--size", "9MiB"]).contains("leave the flag out"));
}

/// What works without a daemon; ends with a damaged byte.
fn bare(dir: &Path, first: &Path, lsn: u64) {
    let group = dir.join("receiver/groups/default");
    let (d, g) = (dir.to_str().unwrap(), group.to_str().unwrap());
    // Outside of what a daemon lives on: in there a restore is refused.
    let to = dir.with_extension("bare.img");
    let at = format!("lsn:{lsn}");
    done(&["restore", "default", "--at", &at, "--to", to.to_str().unwrap(), "--journal", g]);
    same(first, &to);
    done(&["restore", "default", "--at", &at, "--to", to.to_str().unwrap(), "--journal", d, "--force"]);

    let listed = done(&["journal", "ls", g, "--json"]);
    assert!(listed.lines().all(|line| line.contains("\"damage\":null")), "{listed}");
    let verified: Value = serde_json::from_str(&done(&["journal", "verify", g, "--json"])).unwrap();
    assert_eq!(verified["corrupt"], false, "{verified}");
    let dumped = done(&["journal", "dump", g, "--from", &lsn.to_string(), "--to", &lsn.to_string()]);
    assert!(dumped.lines().any(|line| line.contains("bookmark") && line.ends_with("\"before\"")), "{dumped}");

    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(group.join("journal")).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let entries = std::fs::read_dir(copy.path()).unwrap().map(|entry| entry.unwrap().path());
    let segments = entries.filter(|path| path.extension().is_some_and(|extension| extension == "seg"));
    let segment = segments.max_by_key(|path| std::fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[2000] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let damaged = afterimage(&["journal", "verify", copy.path().to_str().unwrap()]);
    let out = String::from_utf8(damaged.stdout).unwrap();
    assert_eq!(damaged.status.code(), Some(4), "{out}");
    assert!(out.contains(&format!("{}: offset ", segment.display())), "{out}");
}

#[test]
fn two_volumes_of_a_group_come_back_together_and_a_closed_pipe_is_no_failure() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("d");
    let d = dir.to_str().unwrap();
    let (first, second) = (image(home.path(), 1), image(home.path(), 2));
    let disk = home.path().join("disk");
    std::fs::copy(&first, &disk).unwrap();
    let up = Up::start(
        &["up", "--dir", d, "--disk", disk.to_str().unwrap(), "--size", "8MiB", "--group", "pair"],
        2,
    );
    let fresh = up.uris.iter().find(|uri| uri.contains("///disk1?")).unwrap();
    write(&second, fresh);
    done(&["wait", "--dir", d]);
    let to = home.path().join("both");
    done(&["restore", "pair", "--at", "latest", "--to", to.to_str().unwrap(), "--dir", d]);
    same(&first, &to.join("disk0.img"));
    same(&second, &to.join("disk1.img"));
    let one = home.path().join("one.img");
    done(&[
        "restore",
        "pair",
        "--at",
        "latest",
        "--volume",
        "disk1",
        "--to",
        one.to_str().unwrap(),
        "--dir",
        d,
    ]);
    same(&second, &one);
    up.stop();

    let mut dump = Command::new(env!("CARGO_BIN_EXE_afterimage"))
        .args(["journal", "dump", dir.join("source").to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(dump.stdout.take());
    assert!(dump.wait().unwrap().success());
}

/// A daemon that is stopped, or killed if the test ends early.
fn daemon(args: &[&str], home: &Path, socket: &str) -> Up {
    let log = std::fs::File::create(home.join(format!("{}.log", args[0]))).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_afterimage")).args(args).stderr(log).spawn().unwrap();
    let up = Up { child, uris: vec![] };
    let served = || std::os::unix::net::UnixStream::connect(socket).is_ok();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !served() {
        assert!(std::time::Instant::now() < deadline, "{args:?} does not serve {socket}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    up
}

#[test]
fn two_daemons_pair_by_settings_and_each_answers_for_its_side() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let source = done(&["identity", "new", "--dir", &at("s/identity")]);
    let receiver = done(&["identity", "new", "--dir", &at("r/identity")]);
    let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = format!(
        "dir = {:?}\nlisten = \"127.0.0.1:{port}\"\n[[source]]\nidentity = {source:?}\ngroups = [\"g\"]\n",
        at("r")
    );
    std::fs::write(at("receiver.toml"), settings).unwrap();
    let settings = format!(
        "group = \"g\"\ndir = {:?}\nring_dir = \"/dev/shm/afterimage-cli-test-{port}\"\n\
         [receiver]\naddress = \"127.0.0.1:{port}\"\nidentity = {receiver:?}\n\
         [[volume]]\nname = \"v\"\npath = {:?}\nsize = \"8MiB\"\n",
        at("s"),
        at("v.img")
    );
    std::fs::write(at("source.toml"), settings).unwrap();
    let (at_source, at_receiver) = (at("s/control.sock"), at("r/control.sock"));
    let receiving = daemon(&["receive", "--config", &at("receiver.toml")], home.path(), &at_receiver);
    let replicating = daemon(&["replicate", "--config", &at("source.toml")], home.path(), &at_source);

    done(&["wait", "--control", &at_source]);
    let first = image(home.path(), 1);
    let status: Value = serde_json::from_str(&done(&["status", "--json", "--control", &at_source])).unwrap();
    write(&first, status["groups"][0]["volumes"][0]["nbd_uri"].as_str().unwrap());
    let lsn = done(&["bookmark", "g", "b", "--control", &at_source]);
    done(&["wait", "--control", &at_source]);
    done(&["wait", "--control", &at_receiver]);
    let to = at("restored.img");
    let restore = ["restore", "g", "--at", "bookmark:b", "--to", &to];
    assert!(ends(3, &[&restore[..], &["--control", &at_source]].concat()).contains("at the receiver"));
    done(&[&restore[..], &["--control", &at_receiver]].concat());
    same(&first, Path::new(&to));
    assert!(done(&["points", "g", "--control", &at_receiver]).contains(&format!("bookmark b: lsn {lsn}")));
    ends(3, &["points", "g", "--control", &at_source]);
    ends(3, &["bookmark", "g", "c", "--control", &at_receiver]);
    let receiver_dir = at("r");
    let restore_bare = [&restore[..], &["--force", "--journal", &receiver_dir]].concat();
    assert!(ends(1, &restore_bare).contains("leave --journal out"), "the daemon holds it");
    replicating.stop();
    receiving.stop();
    done(&restore_bare);
    std::fs::remove_dir_all(format!("/dev/shm/afterimage-cli-test-{port}")).unwrap();
}

/// The replica itself goes back in time and forth again, with the daemon and without.
#[test]
fn a_replica_is_rewound_and_resumed_and_a_bookmark_held() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("d");
    let d = dir.to_str().unwrap();
    let (first, second, third) = (image(home.path(), 1), image(home.path(), 2), image(home.path(), 3));
    let json = |args: &[&str]| -> Value { serde_json::from_str(&done(args)).unwrap() };
    let replica = dir.join("receiver/replica/default/db.img");

    let up = Up::start(&["up", "--dir", d, "--size", "8MiB", "--volume", "db"], 1);
    // The first synchronisation, before whose end there are no points.
    done(&["wait", "--dir", d]);
    write(&first, &up.uris[0]);
    let lsn: u64 = done(&["bookmark", "default", "before", "--dir", d]).parse().unwrap();
    write(&second, &up.uris[0]);
    done(&["wait", "--dir", d, "--timeout", "60s"]);
    assert!(ends(3, &["resume", "default", "--dir", d]).contains("not rewound"));
    ends(3, &["rewind", "default", "--at", "bookmark:none", "--dir", d]);
    ends(2, &["rewind", "default", "--at", "yesterday", "--dir", d]);
    ends(2, &["rewind", "nobody", "--at", "latest", "--dir", d]);

    let report = json(&["rewind", "default", "--at", "bookmark:before", "--dir", d, "--json"]);
    assert_eq!(report["lsn"], lsn);
    same(&first, &replica);
    let status = &json(&["status", "--json", "--dir", d])["groups"][0];
    assert_eq!(
        (status["state"].as_str(), &status["volumes"][0]["state"]),
        (Some("rewound"), &"rewound".into())
    );
    assert!(status["why"].as_str().unwrap().contains("bookmark:before"), "{status}");
    assert_eq!(status["checkpoint_lsn"], lsn);
    // The disk is written to as before; that it does not reach the replica is said at once.
    write(&third, &up.uris[0]);
    let begun = std::time::Instant::now();
    assert!(ends(3, &["wait", "--dir", d, "--timeout", "60s"]).contains("rewound"));
    assert!(begun.elapsed().as_secs() < 30);
    same(&first, &replica);
    assert!(done(&["resume", "default", "--dir", d]).contains(&format!("from lsn {lsn}")));
    done(&["wait", "--dir", d, "--timeout", "60s"]);
    same(&third, &replica);

    assert!(ends(3, &["hold", "default", "none", "--dir", d]).contains("before"), "known names are told");
    assert_eq!(json(&["hold", "default", "before", "--json", "--dir", d])["held"], true);
    let points = json(&["points", "default", "--json", "--dir", d]);
    assert_eq!((&points["bookmarks"][0]["held"], &points["holds"][0]["lsn"]), (&true.into(), &lsn.into()));
    assert!(done(&["points", "default", "--dir", d]).contains("under hold"));
    let held = ends(1, &["rewind", "default", "--at", "latest", "--journal", d]);
    assert!(held.contains("--journal out"), "{held}");
    up.stop();

    done(&["rewind", "default", "--at", "bookmark:before", "--journal", d]);
    same(&first, &replica);
    assert!(done(&["resume", "default", "--journal", d]).contains("rolled forward"));
    same(&third, &replica);
    done(&["hold", "default", "before", "--release", "--journal", d]);
    ends(3, &["hold", "default", "before", "--release", "--journal", d]);
    let up = Up::start(&["up", "--dir", d], 1);
    done(&["wait", "--dir", d, "--timeout", "60s"]);
    same(&third, &replica);
    up.stop();
}
