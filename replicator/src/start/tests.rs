//! Starts after a run that was killed with a write in flight, and disks that may not be protected.

use std::path::Path;

use kfilter::{Entry, Mode};
use machine::disk::continuity::Ends;

use super::*;
use crate::alive::{self, Alive, clocks};

const SIZE: u64 = 1 << 20;
const AT: u64 = 8192;

struct Dirs {
    home: tempfile::TempDir,
    ring: tempfile::TempDir,
}

impl Dirs {
    fn new() -> Dirs {
        let ring = tempfile::Builder::new().prefix("af-start-").tempdir_in("/dev/shm").unwrap();
        Dirs { home: tempfile::tempdir().unwrap(), ring }
    }

    fn disk(&self) -> PathBuf {
        self.home.path().join("disk.img")
    }

    fn settings(&self, disks: &[&Path]) -> conf::Replicator {
        let names = ["a", "b"];
        let volumes =
            names.iter().zip(disks).map(|(name, path)| (name.to_string(), path.to_path_buf(), Some(SIZE)));
        let dir = self.home.path().join("state");
        std::fs::create_dir_all(&dir).unwrap();
        let mut settings =
            conf::Replicator::embedded(&dir, "g", volumes, ([127, 0, 0, 1], 9).into(), [7; 32]).unwrap();
        settings.ring_dir = self.ring.path().to_owned();
        settings.ring.bytes = 8 << 20;
        settings
    }
}

fn begin(settings: &conf::Replicator) -> Result<Started> {
    start(settings, &Surroundings::real())
}

fn refusal(settings: &conf::Replicator) -> String {
    describe(&begin(settings).err().expect("it is refused"))
}

/// A run in ring mode, as after a clean stop.
fn quiet_run(settings: &conf::Replicator) -> Started {
    drop(begin(settings).unwrap());
    let disk = Surroundings::real().disk;
    let mut file = StateFile::open(&disk, &settings.dir).unwrap();
    let dir = ring_dir(settings, &file);
    file.update(|state| {
        (state.clean, state.needs_resync) = (Some(state.epoch_start), None);
        let held = std::fs::File::open(&settings.volume[0].path).unwrap();
        state.volumes[0].mark = Some(Continuity::of(&held, Ends::Read).unwrap());
    })
    .unwrap();
    drop(file);
    std::fs::remove_file(dir.join("ring")).unwrap();
    begin(settings).unwrap()
}

/// Dies with a write that is in the ring and not on the disk; what it said of itself was true until now.
fn dies_writing(settings: &conf::Replicator, run: Started, payload: &[u8]) {
    let (_, boot_ns, clock_offset_ns) = clocks();
    let alive = Alive {
        epoch: run.state.get().epoch,
        alive_ns: clocks().0,
        boot_ns,
        clock_offset_ns,
        ..Alive::default()
    };
    alive.put(&ring_dir(settings, &run.state));
    let OpenRing::Front(region) = &run.ring else { unreachable!("the front's ring") };
    assert_eq!(region.mode(), Mode::Ring);
    let entry = Entry::write(run.volumes[0].known.id.0, AT, payload.len() as u64, 0);
    let captured = region.capture(entry, payload, now_ns()).unwrap();
    assert!(matches!(captured, kfilter::Captured::Ring(_)));
}

fn content(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()[8192..8192 + 512].to_vec()
}

#[test]
fn a_write_in_flight_is_finished_on_the_disk_it_was_meant_for_and_on_no_other() {
    for is_replaced in [false, true] {
        let dirs = Dirs::new();
        let settings = dirs.settings(&[&dirs.disk()]);
        let run = quiet_run(&settings);
        assert!(run.state.get().volumes[0].unproven.is_none(), "after a clean stop all is proven");
        let epoch = run.state.get().epoch;
        dies_writing(&settings, run, &[7; 512]);
        if is_replaced {
            let restored = dirs.home.path().join("restored");
            std::fs::File::create(&restored).unwrap().set_len(SIZE).unwrap();
            std::fs::rename(restored, dirs.disk()).unwrap();
        }
        let run = begin(&settings).unwrap();
        let expected = if is_replaced { [0; 512] } else { [7; 512] };
        assert_eq!(content(&dirs.disk()), expected, "replaced: {is_replaced}");
        assert_eq!(run.state.get().epoch == epoch, !is_replaced, "{}", run.cause);
        assert_eq!(run.cause.contains("another disk took the place"), is_replaced, "{}", run.cause);
    }
}

#[test]
fn a_disk_of_which_nothing_is_known_after_a_kill_is_not_written_to_and_is_compared() {
    let dirs = Dirs::new();
    let settings = dirs.settings(&[&dirs.disk()]);
    let run = quiet_run(&settings);
    let (epoch, dir) = (run.state.get().epoch, ring_dir(&settings, &run.state));
    dies_writing(&settings, run, &[7; 512]);
    alive::remove(&dir);
    let run = begin(&settings).unwrap();
    assert_eq!(content(&dirs.disk()), [0; 512]);
    assert_eq!((run.state.get().epoch, run.cause.is_empty()), (epoch, false), "its range is read again");
    assert!(run.state.get().volumes[0].unproven.is_some());
    let since = run.state.get().unproven_since.unwrap();
    assert_eq!(since.after.0, run.ring.captured_lsn().unwrap(), "what the dead run captured stays");
    let Started { mut state, .. } = run;
    state.begin_epoch(None, true).unwrap();
    assert_eq!(state.get().unproven_since, Some(since), "its first synchronisation names it");
    state.update(|state| state.forget_doubt()).unwrap();
    assert_eq!(state.get().unproven_since, None);
}

#[test]
fn an_image_edited_after_a_kill_begins_an_epoch() {
    let dirs = Dirs::new();
    let settings = dirs.settings(&[&dirs.disk()]);
    let run = quiet_run(&settings);
    let epoch = run.state.get().epoch;
    let Opened::Front(backing) = &run.volumes[0].content else { unreachable!("the front's disk") };
    let alive = Alive {
        epoch,
        alive_ns: clocks().0,
        quiet_lsn: Some(run.ring.captured_lsn().unwrap()),
        marks: vec![(0, backing.continuity(Ends::Skip).unwrap())],
        ..Alive::default()
    };
    alive.put(&ring_dir(&settings, &run.state));
    drop(run);
    let file = std::fs::File::options().write(true).open(dirs.disk()).unwrap();
    let then = file.metadata().unwrap().modified().unwrap();
    // The clock of a file system has a grain.
    while file.metadata().unwrap().modified().unwrap() == then {
        std::os::unix::fs::FileExt::write_at(&file, &[1; 512], AT).unwrap();
    }
    let run = begin(&settings).unwrap();
    assert_ne!(run.state.get().epoch, epoch);
    assert!(run.cause.contains("written to"), "{}", run.cause);
}

#[test]
fn a_disk_is_made_only_in_a_directory_that_exists_outside_of_dev() {
    let dirs = Dirs::new();
    let nowhere = dirs.home.path().join("not-mounted/disk.img");
    let said = refusal(&dirs.settings(&[&nowhere]));
    assert!(said.contains("not-mounted/disk.img lies in a directory that does not exist"), "{said}");
    assert!(!nowhere.parent().unwrap().exists());
    let device = Path::new("/dev/af-no-such-disk");
    assert!(refusal(&dirs.settings(&[device])).contains("no disk is made in /dev"));
    let link = dirs.home.path().join("link");
    std::os::unix::fs::symlink("/dev/af-no-such-disk", &link).unwrap();
    assert!(refusal(&dirs.settings(&[&link])).contains("link that leads nowhere"));
    assert!(!device.exists());
}

#[test]
fn what_is_ours_or_no_disk_or_twice_the_same_is_refused() {
    let dirs = Dirs::new();
    let ours = dirs.home.path().join("state/journal/disk.img");
    std::fs::create_dir_all(ours.parent().unwrap()).unwrap();
    assert!(refusal(&dirs.settings(&[&ours])).contains("the agent's own"));
    assert!(!ours.exists());

    std::fs::write(dirs.disk(), [&b"KDMV"[..], &vec![0; 1 << 20]].concat()).unwrap();
    assert!(refusal(&dirs.settings(&[&dirs.disk()])).contains("qemu-img convert -f vmdk"));

    let raw = dirs.home.path().join("raw.img");
    std::fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
    let link = dirs.home.path().join("link.img");
    std::os::unix::fs::symlink(&raw, &link).unwrap();
    refusal(&dirs.settings(&[&raw, &link]));
}
