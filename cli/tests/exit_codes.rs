//! 0 done, 1 failed, 2 usage, 3 not possible at that point or in this state, 4 corruption found; and what is
//! said.

// Tests may unwrap; the lint knows only functions marked as such, not what they call.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Stdio};

fn run(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_afterimage"))
        .args(args)
        .env_remove("AFTERIMAGE_CONTROL")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[track_caller]
fn fails(code: i32, says: &str, args: &[&str]) {
    let (found, out, err) = run(args);
    assert_eq!(found, code, "{args:?}: {err}");
    assert!(err.contains(says), "{args:?}: {err}");
    assert_eq!(out, "", "{args:?}: errors do not go to stdout");
}

#[test]
fn a_wrong_command_line_is_2() {
    for args in [
        &["nothing"][..],
        &["status", "--no-such-flag"],
        &["up"],
        &["up", "--dir", "/nowhere", "--size", "100"],
        &["up", "--dir", "/nowhere", "--size", "1MiB", "--volume", "Not A Name"],
        &["restore", "g", "--to", "/t"],
        &["restore", "g", "--at", "yesterday", "--to", "/t"],
        &["restore", "g", "--at", "time:2026-01-31", "--to", "/t"],
        &["restore", "g", "--at", "latest", "--to", "/t", "--journal", "/j", "--dir", "/d"],
        &["status", "--control", "/s", "--dir", "/d"],
        &["wait", "--timeout", "soon"],
        &["bookmark", "g"],
        &["points", "../etc"],
    ] {
        let (code, _, err) = run(args);
        assert_eq!(code, 2, "{args:?}: {err}");
    }
    fails(2, "AFTERIMAGE_CONTROL", &["status"]);
}

#[test]
fn help_and_version_are_0() {
    assert_eq!(run(&["--version"]).1.trim(), concat!("afterimage ", env!("CARGO_PKG_VERSION")));
    assert_eq!(run(&["help"]).0, 0);
}

#[test]
fn mistakes_say_what_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let below = |name: &str| format!("{path}/{name}");
    fails(1, "no daemon listens on", &["status", "--dir", path]);
    fails(2, "give --size SIZE", &["up", "--dir", path]);
    fails(2, "--size SIZE makes a new disk", &["up", "--dir", path, "--disk", &below("none")]);
    fails(2, "neither a file nor a block device", &["up", "--dir", path, "--disk", "/dev/null"]);
    std::fs::write(below("file"), "").unwrap();
    fails(1, "choose a directory", &["up", "--dir", &below("file/below"), "--size", "1MiB"]);
    fails(2, "no group g there", &["restore", "g", "--at", "latest", "--to", &below("t"), "--journal", path]);
    fails(2, "is not a directory", &["journal", "verify", &below("none")]);
    fails(2, "", &["conf", "check", &below("none")]);
    fails(3, "--dir names the directory", &["identity", "show", "--dir", &below("identity")]);
    fails(2, "", &["replicate", "--config", &below("none")]);
}

#[test]
fn identities_are_made_once_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("identity");
    let home = home.to_str().unwrap();
    let (code, made, _) = run(&["identity", "new", "--dir", home]);
    assert_eq!((code, made.trim().len()), (0, 64));
    assert_eq!(run(&["identity", "show", "--dir", home]).1, made);
    assert_eq!(run(&["identity", "new", "--dir", home]).0, 1);
}

#[test]
fn settings_are_shown_with_their_sources() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("receiver.toml");
    std::fs::write(&file, "dir = \"/srv/afterimage\"\n").unwrap();
    let (code, out, err) = run(&["conf", "check", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("afterimage receive --config"), "{out}");
    assert!(out.contains(&format!("dir = \"/srv/afterimage\"  # file {}", file.display())), "{out}");
    assert!(out.contains("# default"), "{out}");
    std::fs::write(&file, "dri = \"/srv/afterimage\"\n").unwrap();
    fails(2, "dri", &["conf", "check", file.to_str().unwrap()]);
}

#[test]
fn the_environment_names_the_daemon_and_a_flag_goes_before_it() {
    let asked = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_afterimage"))
            .args(args)
            .env("AFTERIMAGE_CONTROL", "/nowhere/by-environment.sock")
            .output()
            .unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (code, says) = asked(&["status"]);
    assert!(code == Some(1) && says.contains("/nowhere/by-environment.sock"), "{code:?} {says}");
    let (code, says) = asked(&["status", "--control", "/nowhere/by-flag.sock"]);
    assert!(code == Some(1) && says.contains("/nowhere/by-flag.sock"), "{code:?} {says}");
}
