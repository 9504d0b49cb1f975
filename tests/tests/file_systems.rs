//! Story 2: real file systems on a protected disk, and every past moment of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use rand::Rng;
use tests::control::Control;
use tests::image::assert_equal;
use tests::nbd::{FuseDisk, Loop, Mount};
use tests::program::{need, outcome, run};
use tests::tree::{Manifest, real_trees};
use tests::up::Up;
use tests::{Home, nbd, story};

const GROUP: &str = "default";
/// At least this much real content.
const CONTENT_BYTES: u64 = 200 << 20;
const RANDOM_POINTS: usize = 30;

/// What differs between file systems.
struct Kind {
    name: &'static str,
    make: &'static [&'static str],
    /// Mount options of an image beside its original.
    image_options: &'static str,
    check: &'static [&'static str],
}

const EXT4: Kind =
    Kind { name: "ext4", make: &["mkfs.ext4", "-q"], image_options: "noatime", check: &["e2fsck", "-fn"] };

const XFS: Kind = Kind {
    name: "xfs",
    make: &["mkfs.xfs", "-q"],
    image_options: "noatime,nouuid",
    check: &["xfs_repair", "-n"],
};

const BTRFS: Kind = Kind {
    name: "btrfs",
    make: &["mkfs.btrfs", "-q"],
    image_options: "noatime",
    check: &["btrfs", "check", "--readonly"],
};

#[test]
fn ext4_is_what_it_was_at_every_moment() -> Result<()> {
    story("ext4", |home| tell(home, &EXT4))
}

#[test]
fn xfs_is_what_it_was_at_every_moment() -> Result<()> {
    story("xfs", |home| tell(home, &XFS))
}

#[test]
fn btrfs_is_what_it_was_at_every_moment() -> Result<()> {
    story("btrfs", |home| tell(home, &BTRFS))
}

fn tell(home: &Home, kind: &Kind) -> Result<()> {
    need(&nbd::PROGRAMS)?;
    need(&[kind.make[0], kind.check[0], "fstrim"])?;
    let up = Up::start(home, &["--size", "1GiB", "--volume", "disk"])?;
    let group = up.control.group()?;
    let fuse = FuseDisk::attach(home, &group.of_volume("disk", "nbd_uri")?)?;
    let device = Loop::attach(&fuse.path())?;
    run(kind.make[0], kind.make[1..].iter().copied().chain([text(device.path())?]))?;
    let made = up.control.captured()?;

    let bookmarks = live(home, &up.control, &device)?;
    drop(device);
    fuse.unmount()?;
    forget(kind)?;
    let captured = up.control.captured()?;
    home.figure(format!("filled, changed, trimmed and unmounted; {} writes", captured - made));

    up.control.wait()?;
    let backing = group.of_volume("disk", "source")?;
    let replica = up.control.group()?.of_volume("disk", "replica")?;
    assert_equal(Path::new(&backing), Path::new(&replica))?;
    home.figure("replica and source are equal");

    for (name, manifest) in &bookmarks {
        let image = home.path("restored.img");
        up.control.restore(GROUP, &format!("bookmark:{name}"), &image)?;
        let device = Loop::attach(&image)?;
        let mount = Mount::on(&home.path("past"), device.path(), kind.image_options)?;
        Manifest::of(mount.path())?.assert_equal(manifest).with_context(|| format!("bookmark {name}"))?;
        mount.unmount()?;
        drop(device);
        forget(kind)?;
        home.figure(format!("bookmark {name}: {} entries are what they were", manifest.entries()));
    }

    let mut random = home.rng();
    let begun = Instant::now();
    for _ in 0..RANDOM_POINTS {
        let lsn = random.random_range(made..=captured);
        let image = home.path("restored.img");
        up.control.restore(GROUP, &format!("lsn:{lsn}"), &image)?;
        assert_sound(home, kind, &image).with_context(|| format!("{} at lsn {lsn}", kind.name))?;
    }
    home.figure(format!("{RANDOM_POINTS} random moments are sound, {:.1} s", begun.elapsed().as_secs_f64()));
    Ok(())
}

/// Uses the disk; each bookmark with what was there.
fn live(home: &Home, control: &Control, device: &Loop) -> Result<Vec<(&'static str, Manifest)>> {
    let (trees, bytes) = real_trees(CONTENT_BYTES)?;
    let mount = Mount::on(&home.path("live"), device.path(), "noatime")?;
    let root = mount.path();
    let mut bookmarks = Vec::new();
    let mut bookmark = |name| -> Result<()> {
        run("sync", ["-f".as_ref(), root.as_os_str()])?;
        control.bookmark(GROUP, name)?;
        bookmarks.push((name, Manifest::of(root)?));
        Ok(())
    };

    let (first, second) = trees.split_at(trees.len().div_ceil(2));
    copy(first, root)?;
    bookmark("half")?;
    copy(second, root)?;
    bookmark("full")?;
    // Every third file goes, every fifth is written anew.
    let mut random = home.rng();
    let files = files_below(root)?;
    for (index, file) in files.iter().enumerate() {
        if index % 3 == 0 {
            fs::remove_file(file)?;
        } else if index % 5 == 0 {
            let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?.clamp(1, 1 << 20)];
            random.fill(bytes.as_mut_slice());
            fs::write(file, bytes)?;
        }
    }
    bookmark("changed")?;
    run("fstrim", [root])?;
    for file in files.iter().filter(|file| file.exists()).take(100) {
        fs::write(file, "after the trim\n")?;
    }
    bookmark("trimmed")?;
    home.figure(format!("{} files, {bytes} bytes, from {trees:?}", files.len()));
    mount.unmount()?;
    Ok(bookmarks)
}

fn copy(trees: &[PathBuf], root: &Path) -> Result<()> {
    run(
        "cp",
        ["-a".as_ref()]
            .into_iter()
            .chain(trees.iter().map(|tree| tree.as_os_str()))
            .chain([root.as_os_str()]),
    )?;
    Ok(())
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() { files.extend(files_below(&path)?) } else { files.push(path) }
    }
    files.sort();
    Ok(files)
}

/// Mounts (which replays the file system's own journal), unmounts, and checks without repairing.
fn assert_sound(home: &Home, kind: &Kind, image: &Path) -> Result<()> {
    let device = Loop::attach(image)?;
    Mount::on(&home.path("past"), device.path(), kind.image_options)?.unmount()?;
    let mut check = std::process::Command::new(kind.check[0]);
    outcome(check.args(&kind.check[1..]).arg(device.path()))?.expect(0)?;
    drop(device);
    forget(kind)
}

/// btrfs remembers devices by their file system's id, and would mistake one image for another.
fn forget(kind: &Kind) -> Result<()> {
    if kind.name == "btrfs" {
        run("btrfs", ["device", "scan", "--forget"])?;
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("paths here are text")
}
