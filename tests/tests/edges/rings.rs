//! Rings and control files that are lost, moved, foreign, or have no room.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Gid, Uid};
use tests::control::{Group, poll};
use tests::nbd_client::NbdClient;
use tests::program::{afterimage, need, run};
use tests::rig::{Pair, PairSpec};
use tests::story;
use tests::story::Home;

const SOON: Duration = Duration::from_secs(60);
const ONE: &[(&str, u64)] = &[("disk", 4 << 20)];

/// The one directory of a ring below the pair's.
fn ring_of(pair: &Pair<'_>) -> Result<PathBuf> {
    let mut found = fs::read_dir(pair.ring_dir())?;
    Ok(found.next().context("a group has a ring")??.path())
}

fn write(pair: &Pair<'_>, byte: u8) -> Result<()> {
    let (socket, name) = &pair.sockets()[0];
    let mut client = NbdClient::connect(socket, name)?;
    client.write(&[byte; 4096], 0)?;
    client.flush()
}

/// Written, and on the replica.
fn replicate(pair: &Pair<'_>, byte: u8) -> Result<()> {
    write(pair, byte)?;
    pair.source.wait()
}

/// What the source says when it refuses to start.
fn refused(home: &Home, pair: &mut Pair<'_>) -> Result<String> {
    let log = home.log("source");
    let told = fs::metadata(&log)?.len();
    pair.start_source()?;
    ensure!(!pair.source_daemon()?.ended()?.success(), "the start is refused");
    let mut said = String::new();
    let mut file = fs::File::open(&log)?;
    file.seek(SeekFrom::Start(told))?;
    file.read_to_string(&mut said)?;
    Ok(said)
}

/// Until the disks are served; no receiver is needed for that.
fn served_alone(pair: &mut Pair<'_>) -> Result<Group> {
    let control = pair.source.clone();
    poll("the disks to be served", SOON, || {
        pair.source_daemon()?.expect_alive()?;
        Ok(control.group().ok().filter(Group::is_served))
    })
}

/// Every sector of a control file is damaged, so both its slots are.
fn damage(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path)?;
    bytes.iter_mut().skip(100).step_by(512).for_each(|byte| *byte ^= 255);
    Ok(fs::write(path, bytes)?)
}

/// The rings' directory is a file system in memory with so much room. It goes after the pair.
struct Room(PathBuf);

impl Room {
    fn of(home: &Home, mib: u64) -> Result<Room> {
        need(&["mount", "umount"])?;
        let name = home.path("");
        let place = Path::new("/dev/shm").join(name.file_name().context("a directory has a name")?);
        fs::create_dir(&place)?;
        let options = format!("mode=700,size={mib}m");
        let room = Room(place);
        run("mount", ["-t", "tmpfs", "-o", &options, "none", &room.0.to_string_lossy()])?;
        Ok(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = run("umount", [&self.0]);
        let _ = fs::remove_dir(&self.0);
    }
}

/// Volumes with names as long as they may be.
fn many(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("v{number:02}-{number:028}")).collect()
}

/// An older copy of a ring comes back, as from a backup: it knows fewer writes than the journal.
#[test]
fn a_ring_that_was_put_back_is_not_taken_over() -> Result<()> {
    story("old ring", |home| {
        let mut pair = Pair::start(home, &PairSpec { volumes: ONE, ..PairSpec::default() })?;
        replicate(&pair, 1)?;
        let (ring, old) = (ring_of(&pair)?.join("ring"), home.path("old"));
        fs::copy(&ring, &old)?;
        for byte in 2..5 {
            replicate(&pair, byte)?;
        }
        let before = pair.source.group()?;
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        pair.source_daemon()?.kill()?;
        fs::copy(&old, &ring)?;
        pair.start_source()?;
        let alone = served_alone(&mut pair)?;
        ensure!(alone.why().contains("the ring is older"), "no reason is said: {}", alone.0);
        let (epoch, captured) = (before.number("epoch"), before.number("captured_lsn"));
        ensure!(alone.number("epoch") > epoch, "the epoch {epoch} goes on: {}", alone.0);
        ensure!(alone.number("captured_lsn") >= captured, "lsns run back from {captured}: {}", alone.0);
        pair.start_receiver()?;
        pair.until_served()?;
        replicate(&pair, 5)?;
        ensure!(pair.source.captured()? > captured, "an lsn is used twice");
        pair.assert_replica_equals_source()
    })
}

/// After a kill a new epoch needs a new ring, in a file system that holds one and a half.
#[test]
fn a_start_needs_the_room_of_one_ring() -> Result<()> {
    story("room of one ring", |home| {
        let _room = Room::of(home, 100)?;
        let mut pair = Pair::start(home, &PairSpec { volumes: ONE, ..PairSpec::default() })?;
        ensure!(!pair.source.group()?.0.to_string().contains("want of room"), "the first ring has room");
        replicate(&pair, 1)?;
        let epoch = pair.source.group()?.number("epoch");
        pair.source_daemon()?.kill()?;
        // Another file in the disk's place: the old ring cannot go on.
        let (disk, copy) = (pair.backing("disk"), home.path("source/copy"));
        fs::copy(&disk, &copy)?;
        fs::rename(&copy, &disk)?;
        pair.start_source()?;
        let group = pair.until_served()?;
        ensure!(group.number("epoch") > epoch, "the old ring goes on: {}", group.0);
        ensure!(!group.0.to_string().contains("want of room"), "the new ring is smaller: {}", group.0);
        replicate(&pair, 2)?;
        pair.assert_replica_equals_source()
    })
}

/// Half of the room that a ring wants.
#[test]
fn a_ring_without_room_is_smaller_and_says_so() -> Result<()> {
    story("smaller ring", |home| {
        let _room = Room::of(home, 32)?;
        let mut pair = Pair::start(home, &PairSpec { volumes: ONE, ..PairSpec::default() })?;
        let group = pair.source.group()?;
        ensure!(group.0.to_string().contains("for want of room"), "status is silent: {}", group.0);
        let log = fs::read_to_string(home.log("source"))?;
        let is_warning = |line: &&str| line.contains("WARN") && line.contains("for want of room");
        ensure!(log.lines().any(|line| is_warning(&line)), "the log has no warning");
        replicate(&pair, 1)?;
        let epoch = group.number("epoch");
        pair.source_daemon()?.kill()?;
        pair.start_source()?;
        let group = pair.until_served()?;
        ensure!(group.number("epoch") == epoch, "a smaller ring is taken over as well: {}", group.0);
        pair.assert_replica_equals_source()
    })
}

/// Another user makes the directory of the rings first, opens it to all, or puts a link into it.
#[test]
fn a_ring_directory_of_others_is_refused_and_no_link_followed() -> Result<()> {
    story("ring directory", |home| {
        need(&[])?;
        let mut pair = Pair::start(home, &PairSpec { volumes: ONE, ..PairSpec::default() })?;
        ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        let dir = pair.ring_dir().to_owned();
        let owner = |id: u32| rustix::fs::chown(&dir, Some(Uid::from_raw(id)), Some(Gid::from_raw(id)));
        owner(65534)?;
        let said = refused(home, &mut pair)?;
        ensure!(said.contains(&*dir.to_string_lossy()), "it names no directory: {said}");
        owner(0)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
        let said = refused(home, &mut pair)?;
        ensure!(said.contains("may be written by others"), "another reason: {said}");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        let (lock, made) = (ring_of(&pair)?.join("ring.lock"), home.path("made"));
        fs::remove_file(&lock)?;
        symlink(&made, &lock)?;
        let said = refused(home, &mut pair)?;
        ensure!(said.contains("is a link"), "another reason: {said}");
        ensure!(!made.exists(), "the link was followed");
        fs::remove_file(&lock)?;
        pair.start_source()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()
    })
}

/// A disk that rots: the source's control file is damaged in both its slots, or gone; and then its copy, too.
#[test]
fn a_lost_control_file_is_found_again_in_its_copy_or_a_way_back_is_named() -> Result<()> {
    story("lost state", |home| {
        let mut pair = Pair::start(home, &PairSpec { volumes: ONE, ..PairSpec::default() })?;
        let (state, copy) = (home.path("source/state"), home.path("source/state.copy"));
        for round in 0..2 {
            replicate(&pair, round + 1)?;
            let captured = pair.source.captured()?;
            ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
            if round == 0 {
                damage(&state)?;
            } else {
                fs::remove_file(&state)?;
            }
            pair.start_source()?;
            let group = pair.until_served()?;
            ensure!(group.number("captured_lsn") >= captured, "lsns run back from {captured}: {}", group.0);
            replicate(&pair, round + 11)?;
            pair.assert_replica_equals_source()?;
        }
        ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        damage(&state)?;
        damage(&copy)?;
        let said = refused(home, &mut pair)?;
        ensure!(said.contains(&*state.to_string_lossy()), "the file is not named: {said}");
        ensure!(["remove", "move"].iter().any(|word| said.contains(word)), "no way back is named: {said}");
        Ok(())
    })
}

/// The receiver is away, and the machine loses power again and again: each time every volume has a cause.
#[test]
fn unclean_starts_without_a_receiver_serve_the_disks_and_say_a_bounded_cause() -> Result<()> {
    story("unclean starts", |home| {
        let names = many(34);
        let volumes: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1 << 20)).collect();
        let mut pair = Pair::start(home, &PairSpec { volumes: &volumes, ..PairSpec::default() })?;
        ensure!(pair.receiver_daemon()?.stop()?.success(), "the receiver stops cleanly");
        for start in 1..=3 {
            pair.source_daemon()?.kill()?;
            pair.lose_ring()?;
            pair.start_source()?;
            let group = served_alone(&mut pair)?;
            let length = group.why().chars().count();
            ensure!((1..400).contains(&length), "start {start}: {length} characters: {}", group.why());
        }
        write(&pair, 7)?;
        pair.start_receiver()?;
        pair.until_served()?;
        pair.assert_replica_equals_source()
    })
}

/// As many volumes as the settings accept, with names as long as they may be.
#[test]
fn the_largest_group_stops_cleanly_and_goes_on_in_its_epoch_after_a_reboot() -> Result<()> {
    story("64 volumes", |home| {
        let names = many(64);
        let volumes: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1 << 20)).collect();
        let mut pair = Pair::start(home, &PairSpec { volumes: &volumes, ..PairSpec::default() })?;
        afterimage(["conf", "check", &*home.path("source.toml").to_string_lossy()])?.expect(0)?;
        replicate(&pair, 3)?;
        let epoch = pair.source.group()?.number("epoch");
        ensure!(pair.source_daemon()?.stop()?.success(), "the source stops cleanly");
        pair.lose_ring()?;
        pair.start_source()?;
        let group = pair.until_served()?;
        ensure!(group.number("epoch") == epoch, "everything is synchronised again: {}", group.0);
        pair.assert_replica_equals_source()
    })
}
