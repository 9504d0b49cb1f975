//! Story 6, with real processes: damaged journals are found, named and never replayed. Every byte and every
//! length of a segment is tried in the room `journal`'s own tests; here a receiver's directory is damaged as
//! a disk would do it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use tests::control::poll;
use tests::history::{Area, History};
use tests::image::Images;
use tests::oracle::assert_prefix_consistent;
use tests::program::{Outcome, afterimage, run};
use tests::rig::{GROUP, Pair, PairSpec};
use tests::writer::{Pace, Writers};
use tests::{Home, story};

const FLIPS: usize = 60;
const TRUNCATIONS: usize = 60;
const SECTOR: u64 = 512;
const RECEIVER: &str =
    "[journal]\nsegment_bytes = \"4MiB\"\n[apply]\nmin_interval = \"200ms\"\nbatch_bytes = \"4MiB\"\n";

/// A receiver's directory with a few sealed segments and the open one, its daemon gone, and what was written.
struct Scene<'a> {
    home: &'a Home,
    history: Arc<History>,
    group_dir: PathBuf,
    lsns: (u64, u64),
}

fn make<'a>(home: &'a Home, pair: &mut Pair<'_>) -> Result<Scene<'a>> {
    let history = Arc::new(History::new(home.seed(), vec![vec![Area { volume: 0, blocks: 0..4096 }]]));
    let first = history.mark(|| pair.source.captured())?;
    let pace = Pace { per_second: 2000, blocks: 32, ..Pace::default() };
    let writers = Writers::start(&history, &pair.sockets(), pace, home.seed());
    let journal = pair.group_dir().join("journal");
    poll("sealed segments", Duration::from_secs(60), || {
        history.mark(|| pair.source.captured())?;
        Ok((segments(&journal)?.len() >= 5).then_some(()))
    })?;
    writers.stop()?;
    let last = history.mark(|| pair.source.captured())?;
    pair.assert_replica_equals_source()?;
    pair.receiver_daemon()?.kill()?;
    let (scene, bytes) =
        (Scene { home, history, group_dir: pair.group_dir(), lsns: (first, last) }, folder_bytes(&journal)?);
    scene.verify(&scene.group_dir)?.expect(0)?;
    home.figure(format!("{} segments, {bytes} bytes, lsn {first} to {last}", segments(&journal)?.len()));
    Ok(scene)
}

impl Scene<'_> {
    fn verify(&self, dir: &Path) -> Result<Outcome> {
        afterimage(["journal".as_ref(), "verify".as_ref(), dir.as_os_str()])
    }

    /// A copy of the group's directory, to be damaged; the replica, which is only read, is the same.
    fn copy(&self) -> Result<PathBuf> {
        let parent = self.home.path("damaged");
        let _ = fs::remove_dir_all(&parent);
        let groups = parent.join("groups");
        fs::create_dir_all(&groups)?;
        std::os::unix::fs::symlink(self.home.path("receiver/replica"), parent.join("replica"))?;
        run(
            "cp",
            ["-a".as_ref(), "--reflink=auto".as_ref(), self.group_dir.as_os_str(), groups.as_os_str()],
        )?;
        Ok(groups.join(GROUP))
    }

    /// Damage must be told by `verify`, by file; and a restore either refuses, or is exactly right.
    fn assert_found(&self, dir: &Path, file: &str, what: &str, random: &mut StdRng) -> Result<bool> {
        let told = self.verify(dir)?.expect(4).with_context(|| what.to_owned())?;
        ensure!(told.stdout.contains(file) && told.stdout.contains("offset"), "{what}: {told}");
        let lsn = random.random_range(self.lsns.0..=self.lsns.1);
        self.assert_not_replayed(dir, lsn).with_context(|| format!("{what}, restore to lsn {lsn}"))
    }

    /// Whether the restore was refused.
    fn assert_not_replayed(&self, dir: &Path, lsn: u64) -> Result<bool> {
        let to = self.home.path("restored.img");
        let _ = fs::remove_file(&to);
        let at = format!("lsn:{lsn}");
        let line = [
            "restore",
            GROUP,
            "--at",
            &at,
            "--journal",
            &dir.to_string_lossy(),
            "--to",
            &to.to_string_lossy(),
        ];
        let done = afterimage(line)?;
        if done.code != 0 {
            ensure!(matches!(done.code, 3 | 4), "{done}");
            ensure!(!to.exists(), "a refused restore leaves no image: {done}");
            return Ok(true);
        }
        assert_prefix_consistent(&self.history, &Images::open(&[to])?, &self.history.bounds_at(lsn))?;
        Ok(false)
    }
}

/// Segment files of a directory, in order.
fn segments(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.exists() {
        // The receiver makes it with the first frame.
        return Ok(Vec::new());
    }
    let mut all: Vec<PathBuf> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    all.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    all.sort();
    Ok(all)
}

fn folder_bytes(dir: &Path) -> Result<u64> {
    segments(dir)?.iter().map(|path| Ok(path.metadata()?.len())).sum()
}

fn name(path: &Path) -> Result<String> {
    Ok(path.file_name().context("a file's name")?.to_string_lossy().into_owned())
}

fn pair(home: &Home) -> Result<Pair<'_>> {
    Pair::start(home, &PairSpec { volumes: &[("disk", 16 << 20)], receiver: RECEIVER, ..PairSpec::default() })
}

#[test]
fn damage_is_found_named_and_never_replayed() -> Result<()> {
    story("damage", |home| {
        let mut pair = pair(home)?;
        let scene = make(home, &mut pair)?;
        let mut random = home.rng();
        let mut refused = 0;
        for _ in 0..FLIPS {
            let dir = scene.copy()?;
            let (what, file) = flip(&dir, &mut random)?;
            refused += usize::from(scene.assert_found(&dir, &file, &what, &mut random)?);
        }
        home.figure(format!("{FLIPS} flipped bytes found; {refused} restores refused, the others exact"));
        for _ in 0..TRUNCATIONS {
            let dir = scene.copy()?;
            let sealed = sealed(&dir, &mut random)?;
            let bytes = random.random_range(0..sealed.metadata()?.len());
            File::options().write(true).open(&sealed)?.set_len(bytes)?;
            let what = format!("{} cut to {bytes} bytes", sealed.display());
            scene.assert_found(&dir, &name(&sealed)?, &what, &mut random)?;
        }
        home.figure(format!("{TRUNCATIONS} truncations found"));

        let dir = scene.copy()?;
        let all = segments(&dir.join("journal"))?;
        fs::remove_file(&all[1])?;
        scene.assert_found(&dir, "", "a missing segment", &mut random)?;
        let dir = scene.copy()?;
        let all = segments(&dir.join("journal"))?;
        // One segment in another's place, and a second time at the end.
        fs::copy(&all[1], &all[2])?;
        scene.assert_found(&dir, &name(&all[2])?, "a segment in another's place", &mut random)?;
        let dir = scene.copy()?;
        let all = segments(&dir.join("journal"))?;
        let last: u64 = name(all.last().context("segments")?)?.trim_end_matches(".seg").parse()?;
        let again = dir.join("journal").join(format!("{:020}.seg", last + 1));
        fs::copy(&all[1], &again)?;
        scene.assert_found(&dir, &name(&again)?, "a segment twice", &mut random)?;
        home.figure("missing and duplicated segments found");
        Ok(())
    })
}

/// A sealed journal segment, or an undo segment: those are whole from the start.
fn sealed(dir: &Path, random: &mut StdRng) -> Result<PathBuf> {
    let mut all = segments(&dir.join("journal"))?;
    all.pop();
    if random.random_ratio(1, 3) {
        all = segments(&dir.join("undo"))?;
    }
    Ok(all.swap_remove(random.random_range(0..all.len())))
}

fn flip(dir: &Path, random: &mut StdRng) -> Result<(String, String)> {
    let path = sealed(dir, random)?;
    let file = File::options().read(true).write(true).open(&path)?;
    let offset = random.random_range(0..file.metadata()?.len());
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    let bit = 1u8 << random.random_range(0..8);
    file.write_all_at(&[byte[0] ^ bit], offset)?;
    Ok((format!("{} byte {offset} bit {bit:#x}", path.display()), name(&path)?))
}

#[test]
fn a_torn_tail_is_reported_and_cut() -> Result<()> {
    story("torn tail", |home| {
        let mut pair = pair(home)?;
        let scene = make(home, &mut pair)?;
        let open = segments(&scene.group_dir.join("journal"))?.pop().context("an open segment")?;
        let end = end_of(&open)?;
        // Damage of what was durable is no torn tail, in the open segment either.
        let dir = scene.copy()?;
        let copied = dir.join("journal").join(name(&open)?);
        let file = File::options().read(true).write(true).open(&copied)?;
        let mut byte = [0];
        let offset = end / 2;
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[!byte[0]], offset)?;
        scene.verify(&dir)?.expect(4)?;
        // A write that the crash cut short: bytes behind the end that nobody ever acknowledged.
        let mut torn = vec![0; 3000];
        home.rng().fill(torn.as_mut_slice());
        File::options().write(true).open(&open)?.write_all_at(&torn, end)?;
        scene.verify(&scene.group_dir)?.expect_saying(0, "torn tail")?;
        scene.assert_not_replayed(&scene.group_dir, scene.lsns.1)?;
        // The receiver cuts it, and goes on.
        pair.start_receiver()?;
        let writers = Writers::start(&scene.history, &pair.sockets(), Pace::default(), home.seed() + 1);
        let wanted = scene.history.answered()[0] + 200;
        poll(
            "writes",
            Duration::from_secs(60),
            || Ok((scene.history.answered()[0] >= wanted).then_some(())),
        )?;
        writers.stop()?;
        pair.assert_replica_equals_source()?;
        scene.verify(&scene.group_dir)?.expect(0)?;
        home.figure("reported with exit 0, cut at the next start");
        Ok(())
    })
}

/// Where the written part of an open segment ends: it was reserved as zeros.
fn end_of(path: &Path) -> Result<u64> {
    let bytes = fs::read(path)?;
    let written = bytes.iter().rposition(|byte| *byte != 0).context("a segment has a header")? as u64 + 1;
    Ok(written.next_multiple_of(SECTOR))
}
