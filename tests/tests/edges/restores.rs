//! Targets of restores, and restores that are interrupted.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use tests::Home;
use tests::image::assert_equal;
use tests::nbd::Loop;
use tests::nbd_client::NbdClient;
use tests::program::{Outcome, afterimage};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::story;

const BYTES: u64 = 8 << 20;

/// A pair whose disk holds ones at the bookmark `one`, and twos in its first half later.
fn begin(home: &Home) -> Result<Pair<'_>> {
    let pair = Pair::start(home, &PairSpec { volumes: &[("disk", BYTES)], ..PairSpec::default() })?;
    write(&pair, 1, 2 << 20)?;
    pair.source.bookmark(GROUP, "one")?;
    write(&pair, 2, 1 << 20)?;
    pair.source.wait()?;
    Ok(pair)
}

fn write(pair: &Pair<'_>, byte: u8, bytes: usize) -> Result<()> {
    let (socket, export) = pair.sockets().remove(0);
    let mut client = NbdClient::connect(&socket, &export)?;
    for at in (0..bytes).step_by(1 << 20) {
        client.write(&vec![byte; 1 << 20], at as u64)?;
    }
    client.flush()
}

fn restore(pair: &Pair<'_>, to: &Path) -> Result<Outcome> {
    let to = to.to_string_lossy();
    pair.receiver.command(&["restore", GROUP, "--at", "bookmark:one", "--to", &to, "--force"])
}

#[test]
fn nothing_but_files_and_block_devices_is_a_target() -> Result<()> {
    story("targets of other kinds", |home| {
        let mut pair = begin(home)?;
        let path = |name: &str| home.path(name);
        mknodat(CWD, path("null"), FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(1, 3))?;
        mknodat(CWD, path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        std::os::unix::fs::symlink("null", path("link"))?;
        let kinds = || -> Result<Vec<fs::FileType>> {
            let kind = |name: &str| Ok(fs::symlink_metadata(path(name))?.file_type());
            ["null", "fifo", "link"].into_iter().map(kind).collect()
        };
        let before = kinds()?;
        ensure!(before[0].is_char_device() && before[1].is_fifo() && before[2].is_symlink(), "{before:?}");
        for name in ["null", "link", "fifo"] {
            restore(&pair, &path(name))?.expect_saying(2, "only to a regular file or a block device")?;
        }
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        let journal = pair.group_dir();
        for name in ["null", "link", "fifo"] {
            bare(&journal, &path(name))?.expect_saying(2, "only to a regular file or a block device")?;
        }
        ensure!(kinds()? == before, "the nodes are what they were");
        Ok(())
    })
}

fn bare(journal: &Path, to: &Path) -> Result<Outcome> {
    let (journal, to) = (journal.to_string_lossy(), to.to_string_lossy());
    afterimage(["restore", GROUP, "--at", "bookmark:one", "--to", &to, "--force", "--journal", &journal])
}

#[test]
fn a_missing_device_is_not_replaced_by_a_file() -> Result<()> {
    story("a missing device", |home| {
        let pair = begin(home)?;
        let name =
            home.path("").file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let missing = PathBuf::from(format!("/dev/{name}"));
        restore(&pair, &missing)?.expect_saying(2, "is no device")?;
        restore(&pair, &missing.join("x.img"))?.expect(2)?;
        let left: Vec<_> = fs::read_dir("/dev")?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&name))
            .collect();
        ensure!(left.is_empty(), "left in /dev: {left:?}");
        Ok(())
    })
}

#[test]
fn a_loop_device_over_the_replica_is_no_target() -> Result<()> {
    story("a loop device over the replica", |home| {
        let pair = begin(home)?;
        let replica = Loop::attach(&pair.replica("disk"))?;
        restore(&pair, replica.path())?.expect_saying(2, "is a device over")?;
        drop(replica);
        // Nor is one over the disk itself, which another process of this machine writes.
        let disk = Loop::attach(&pair.backing("disk"))?;
        let refused = restore(&pair, disk.path())?;
        ensure!(refused.code == 1 || refused.code == 2, "{refused}");
        drop(disk);
        assert_equal(&pair.backing("disk"), &pair.replica("disk"))
    })
}

#[test]
fn what_daemons_live_on_is_no_target() -> Result<()> {
    story("directories of daemons", |home| {
        let pair = begin(home)?;
        let group = pair.group_dir();
        std::os::unix::fs::symlink(&group, home.path("link"))?;
        let before = fs::read(group.join("group"))?;
        for to in [
            group.join("group"),
            home.path("link/new.img"),
            group.join("undo"),
            pair.replica("disk"),
            home.path("receiver/identity/identity.pem"),
            home.path("source/new.img"),
            home.path("source/journal/new.img"),
        ] {
            restore(&pair, &to)?.expect(2)?;
        }
        ensure!(fs::read(group.join("group"))?.len() == before.len(), "the control file is what it was");
        Ok(())
    })
}

/// A device holds zeros where the point does, whatever it held.
#[test]
fn a_device_is_the_whole_point_whatever_it_held() -> Result<()> {
    story("a device with other content", |home| {
        let pair = begin(home)?;
        let image = home.path("device.img");
        fs::write(&image, vec![0xee; usize::try_from(BYTES)?])?;
        let device = Loop::attach(&image)?;
        restore(&pair, device.path())?.expect(0)?;
        let file = home.path("restored.img");
        restore(&pair, &file)?.expect(0)?;
        ensure!(fs::read(device.path())? == fs::read(&file)?, "device and file differ");
        ensure!(fs::read(&file)?[0] == 1, "the point is the bookmark");
        // In use by a loop device, a file is no target.
        restore(&pair, &image)?.expect_saying(1, "in use")?;
        Ok(())
    })
}

#[test]
fn what_is_made_is_for_its_owner_only() -> Result<()> {
    story("modes", |home| {
        for dir in ["source", "receiver"] {
            fs::create_dir(home.path(dir))?;
            fs::set_permissions(home.path(dir), Permissions::from_mode(0o755))?;
        }
        let pair = begin(home)?;
        let restored = home.path("restored.img");
        restore(&pair, &restored)?.expect(0)?;
        let mut ahead = vec![home.path("source"), home.path("receiver"), restored];
        while let Some(path) = ahead.pop() {
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                ahead.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
            }
            let given = path == home.path("source") || path == home.path("receiver");
            ensure!(given || metadata.mode() & 0o077 == 0, "{} has {:o}", path.display(), metadata.mode());
        }
        Ok(())
    })
}
