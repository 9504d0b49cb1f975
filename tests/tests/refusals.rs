//! What is refused: with the exit code of the contract, with a reason, and with nothing changed.

use std::fs::{self, File};

use anyhow::{Result, ensure};
use tests::nbd::{self, Loop, Mount};
use tests::program::{Outcome, afterimage, need, run};
use tests::story;
use tests::up::Up;

const GROUP: &str = "default";

#[test]
fn restore_refuses_what_cannot_or_must_not_be() -> Result<()> {
    story("refusals", |home| {
        need(&nbd::PROGRAMS)?;
        need(&["mkfs.ext4"])?;
        let up = Up::start(home, &["--size", "8MiB"])?;
        up.control.bookmark(GROUP, "here")?;
        up.control.wait()?;
        let to = home.path("image");
        let text = to.to_string_lossy().into_owned();
        let restore = |at: &str, more: &[&str]| -> Result<Outcome> {
            let line = ["restore", GROUP, "--at", at, "--to", &text].into_iter().chain(more.iter().copied());
            up.control.command(&line.collect::<Vec<_>>())
        };

        // Points that are not there: 3, with the nearest that is.
        for at in ["lsn:999999999", "lsn:0", "time:2099-01-01T00:00:00Z", "time:1999-01-01T00:00:00Z"] {
            restore(at, &[])?.expect_saying(3, "lsn")?;
        }
        restore("bookmark:nowhere", &[])?.expect_saying(3, "here")?;
        restore("latest", &["--volume", "disk7"])?.expect_saying(3, "disk0")?;
        // Words that mean nothing: 2.
        for at in ["yesterday", "lsn:x", "time:noon"] {
            restore(at, &[])?.expect(2)?;
        }
        ensure!(!to.exists(), "a refused restore leaves nothing behind");

        // A target that is there.
        fs::write(&to, "precious")?;
        let refused = restore("latest", &[])?;
        ensure!(matches!(refused.code, 1..=3) && refused.stderr.contains("--force"), "{refused}");
        ensure!(fs::read(&to)? == b"precious", "it is still there");
        restore("latest", &["--dry-run", "--force"])?.expect(0)?;
        ensure!(fs::read(&to)? == b"precious", "a dry run does nothing");
        restore("latest", &["--force"])?.expect(0)?;
        ensure!(to.metadata()?.len() == 8 << 20, "restored over it");

        // A device that is mounted, and one that is too small.
        let other = home.path("other.img");
        File::create(&other)?.set_len(16 << 20)?;
        let device = Loop::attach(&other)?;
        run("mkfs.ext4", ["-q".as_ref(), device.path().as_os_str()])?;
        let mount = Mount::on(&home.path("mounted"), device.path(), "noatime")?;
        fs::write(mount.path().join("file"), "precious")?;
        let target = device.path().to_string_lossy().into_owned();
        let onto = |force: bool| {
            let mut line = vec!["restore", GROUP, "--at", "latest", "--to", &target];
            line.extend(force.then_some("--force"));
            up.control.command(&line)
        };
        for force in [false, true] {
            let refused = onto(force)?;
            ensure!(matches!(refused.code, 1..=3) && !refused.stderr.is_empty(), "{refused}");
        }
        let refused = onto(true)?;
        ensure!(refused.stderr.contains("mounted") || refused.stderr.contains("in use"), "{refused}");
        ensure!(fs::read(mount.path().join("file"))? == b"precious", "the mounted file system is untouched");
        mount.unmount()?;
        onto(true)?.expect(0)?;
        let image = fs::read(&to)?;
        ensure!(fs::read(device.path())?[..image.len()] == image, "restored onto the device");
        home.figure("points, targets, devices");
        Ok(())
    })
}

#[test]
fn commands_say_what_is_wrong() -> Result<()> {
    story("usage", |home| {
        let up = Up::start(home, &["--size", "4MiB"])?;
        up.control.command(&["points", "nobody"])?.expect_saying(2, "nobody")?;
        up.control.command(&["bookmark", "nobody", "x"])?.expect_saying(2, "nobody")?;
        let to = home.path("image");
        up.control
            .command(&["restore", "nobody", "--at", "latest", "--to", &to.to_string_lossy()])?
            .expect(2)?;
        // No daemon, and none named.
        let nowhere = home.path("nowhere.sock");
        let silent = afterimage(["status", "--control", &nowhere.to_string_lossy()])?;
        ensure!(matches!(silent.code, 1..=3) && silent.stderr.contains("nowhere.sock"), "{silent}");
        afterimage(["status"])?.expect_saying(2, "--dir")?;
        afterimage(["no-such-command"])?.expect(2)?;
        afterimage(["up", "--dir", &home.path("empty").to_string_lossy()])?.expect_saying(2, "--size")?;
        let missing = home.path("missing.img");
        let dir = home.path("other");
        let (dir, missing) = (dir.to_string_lossy(), missing.to_string_lossy());
        afterimage(["up", "--dir", &dir, "--disk", &missing])?.expect_saying(2, "missing.img")?;
        // Settings.
        let file = home.path("bad.toml");
        fs::write(&file, "group = \"g\"\nqouta = 1\n")?;
        let checked = afterimage(["conf", "check", &file.to_string_lossy()])?;
        ensure!(checked.code != 0 && checked.stderr.contains("qouta"), "{checked}");
        // An identity is not overwritten.
        let identity = home.path("identity");
        let identity = identity.to_string_lossy();
        let made = afterimage(["identity", "new", "--dir", &identity])?.expect(0)?;
        ensure!(afterimage(["identity", "new", "--dir", &identity])?.code != 0, "overwritten");
        let shown = afterimage(["identity", "show", "--dir", &identity])?.expect(0)?;
        ensure!(made.stdout == shown.stdout, "{made} {shown}");
        // A journal of nothing.
        let nothing = home.path("nothing");
        ensure!(
            afterimage(["journal", "verify", &nothing.to_string_lossy()])?.code != 0,
            "nothing was verified"
        );
        home.figure("groups, daemons, settings, identities");
        Ok(())
    })
}
