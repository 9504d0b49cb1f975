//! Taking a device in use under capture by the kernel module: what is refused before the kernel is asked, and
//! what a device-mapper device needs after it.
//!
//! Never left behind: a suspended device. Whatever happens between suspend and resume, resume is run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kfilter::Group;

use crate::capture::disk::Disk;
use crate::capture::feedback::Machine;
use crate::error::{Error, ErrorKind, Result};

/// How long `dmsetup` may take: a suspend waits for every write in flight.
const SUSPEND: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);
/// Where control groups (version 2) are, and how deep they are looked into.
const CGROUPS: &str = "/sys/fs/cgroup";
const CGROUP_DEPTH: u32 = 16;

/// Opens a device and says what speaks against capturing it by an agent that keeps its journal in `dir`.
///
/// # Errors
/// Why it cannot be captured exactly, and what to do instead.
pub fn open(path: &Path, dir: &Path) -> Result<Disk> {
    let disk = Disk::open(path)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    check(path, &disk.sysfs(), &mounts)?;
    let machine = Machine { devices: Path::new("/sys/dev/block"), mounts: &mounts };
    if machine.stands_on(dir, &disk.sysfs()) {
        let dir = dir.display();
        let why = "what is journaled there would be captured and journaled again, without end; move `dir` to another disk";
        refuse(path, &format!("the agent's own directory {dir} lies on it: {why}"))?;
    }
    Ok(disk)
}

fn refuse(path: &Path, why: &str) -> Result<()> {
    let at = format!("{} cannot be captured: {why}", path.display());
    Err(Error::new(ErrorKind::Settings, at))
}

/// Looks at a device's directory in sysfs, and at what is mounted.
fn check(path: &Path, sysfs: &Path, mounts: &str) -> Result<()> {
    let above = |what: &str| format!("it is part of {what}: capture that instead");
    // Writes to a partition pass through its disk, so what holds one of them counts too.
    let partitions = children(sysfs).into_iter().filter(|child| child.join("partition").exists());
    for device in partitions.chain([sysfs.to_owned()]) {
        for holder in children(&device.join("holders")) {
            let name = holder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let uuid = fs::read_to_string(holder.join("dm/uuid")).unwrap_or_default();
            if name.starts_with("md") {
                return refuse(path, &above(&format!("the md array /dev/{name}")));
            }
            if name.starts_with("bcache") {
                return refuse(path, &above(&format!("the bcache device /dev/{name}")));
            }
            if uuid.starts_with("mpath-") {
                return refuse(path, &above(&format!("the multipath device /dev/{name}")));
            }
        }
    }
    let disk = if sysfs.join("partition").exists() { sysfs.join("..") } else { sysfs.to_owned() };
    if disk.join("multipath").exists() {
        let why = "it is an NVMe namespace that can be reached over several paths, which the kernel joins past its queue; \
                   start the kernel with nvme_core.multipath=N where there is one path, or capture a logical volume on it";
        return refuse(path, why);
    }
    if sysfs.join("md").exists() || sysfs.join("bcache").exists() {
        let why = "md and bcache devices cannot be captured exactly; serve it over NBD with capture = \"nbd\", or capture \
                   a logical volume on it";
        return refuse(path, why);
    }
    let zoned = fs::read_to_string(disk.join("queue/zoned")).unwrap_or_default();
    if !matches!(zoned.trim(), "" | "none") {
        return refuse(path, "it is a zoned disk, whose writes have no fixed place");
    }
    let number = fs::read_to_string(sysfs.join("dev")).unwrap_or_default();
    if mounted_dax(mounts, number.trim()) {
        return refuse(path, "it is mounted with DAX, past the block layer: mount it without (-o dax=never)");
    }
    if sysfs.join("dm").exists() && find_program("dmsetup").is_none() {
        return refuse(
            path,
            "it is a device-mapper device, which needs `dmsetup`: install the package dmsetup",
        );
    }
    Ok(())
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Whether a device is mounted past the block layer, by /proc/self/mountinfo.
fn mounted_dax(mounts: &str, number: &str) -> bool {
    let is_dax = |options: &str| options.split(',').any(|option| matches!(option, "dax" | "dax=always"));
    mounts
        .lines()
        .filter(|line| line.split(' ').nth(2) == Some(number))
        .any(|line| line.split(' ').any(is_dax))
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join(name)).find(|program| program.is_file())
}

/// Captures a device as a volume. A barrier is owed when this returns.
///
/// # Errors
/// The kernel module's.
pub fn attach(group: &Group, volume: u32, disk: &Disk, clean: bool) -> Result<()> {
    let captured = group.attach(volume, disk.rdev(), clean);
    captured
        .map(drop)
        .map_err(|error| Error::because(ErrorKind::Ring, format!("capture {}", disk.path().display()), error))
}

/// Whether a device has no queue of its own, so that a barrier may ask for [`drain`].
pub fn is_device_mapper(disk: &Disk) -> bool {
    disk.sysfs().join("dm").exists()
}

/// Suspends and resumes a device-mapper device: every write that was inside it has come out then.
///
/// # Errors
/// `dmsetup` is missing, fails or hangs; the device was resumed all the same, as far as it can be.
pub fn drain(disk: &Disk) -> Result<()> {
    let name = fs::read_to_string(disk.sysfs().join("dm/name")).map_err(|error| {
        let at = format!("{}: find its device-mapper name", disk.path().display());
        Error::because(ErrorKind::Io, at, error)
    })?;
    let refuse = |why: String| {
        let at = format!("{}: {why}", disk.path().display());
        Err(Error::new(ErrorKind::NotPossible, at))
    };
    // Resuming it would undo what somebody else is in the middle of, and what waits in it would come out
    // later.
    if fs::read_to_string(disk.sysfs().join("dm/suspended")).is_ok_and(|suspended| suspended.trim() == "1") {
        return refuse("it is suspended by somebody else; it is synchronised when it was resumed".to_owned());
    }
    let number = fs::read_to_string(disk.sysfs().join("dev")).unwrap_or_default();
    if let Some(cgroup) = throttled(Path::new(CGROUPS), number.trim(), CGROUP_DEPTH) {
        // Parts of writes wait there, where no suspend and no task shows them.
        let cgroup = cgroup.display();
        return refuse(format!(
            "a limit in {cgroup}/io.max holds writes back: lift it while it is synchronised"
        ));
    }
    let program = find_program("dmsetup").ok_or_else(|| {
        Error::new(ErrorKind::Settings, "`dmsetup` is missing: install the package dmsetup")
    })?;
    let name = name.trim();
    let run = |action: &[&str]| run(Command::new(&program).args(action).arg(name), SUSPEND);
    let started = machine::now();
    let suspended = run(&["suspend", "--nolockfs"]);
    let resumed = run(&["resume"]);
    let stopped_ms = u64::try_from(machine::since(started).as_millis()).unwrap_or(u64::MAX);
    tracing::info!(device = name, stopped_ms, "device-mapper device settled");
    if let Err(error) = &resumed {
        tracing::error!(%error, device = name, "the device may be suspended: run `dmsetup resume` on it");
    }
    suspended.and(resumed)
}

/// The control group that limits a device, if one does.
fn throttled(cgroup: &Path, number: &str, depth: u32) -> Option<PathBuf> {
    let limits = fs::read_to_string(cgroup.join("io.max")).unwrap_or_default();
    if limits.lines().any(|line| line.split(' ').next() == Some(number)) {
        return Some(cgroup.to_owned());
    }
    let children = children(cgroup).into_iter().filter(|child| depth > 0 && child.is_dir());
    children.filter_map(|child| throttled(&child, number, depth - 1)).next()
}

/// Runs a program, within a time.
fn run(command: &mut Command, at_most: Duration) -> Result<()> {
    let what = format!("{command:?}");
    let io = |error| Error::because(ErrorKind::Io, what.clone(), error);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(io)?;
    let begun = machine::now();
    loop {
        match child.try_wait().map_err(io)? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(Error::new(ErrorKind::Io, format!("{what}: {status}"))),
            None if machine::since(begun) > at_most => {
                end(&mut child);
                return Err(Error::new(ErrorKind::Io, format!("{what}: not done after {at_most:?}")));
            }
            None => machine::sleep(LOOK),
        }
    }
}

fn end(child: &mut Child) {
    // A program that hangs in the kernel is waited for by nobody.
    let _ = child.kill();
    let _ = child.try_wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(make: impl Fn(&Path), mounts: &str) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("dev"), "8:17\n").unwrap();
        make(dir.path());
        check(Path::new("/dev/x"), dir.path(), mounts).err().map(|error| error.to_string())
    }

    fn put(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn what_cannot_be_captured_exactly_is_refused_in_words() {
        assert_eq!(refused(|dir| put(&dir.join("queue/zoned"), "none\n"), ""), None);
        let zoned = refused(|dir| put(&dir.join("queue/zoned"), "host-managed\n"), "").unwrap();
        assert!(zoned.contains("zoned"), "{zoned}");
        let member = refused(|dir| put(&dir.join("holders/md0/dev"), "9:0"), "").unwrap();
        assert!(member.contains("/dev/md0"), "{member}");
        let path = refused(|dir| put(&dir.join("holders/dm-3/dm/uuid"), "mpath-3600"), "").unwrap();
        assert!(path.contains("multipath"), "{path}");
        assert_eq!(
            refused(|dir| put(&dir.join("holders/dm-3/dm/uuid"), "LVM-abc"), ""),
            None,
            "a physical volume"
        );
        let partition = |dir: &Path| {
            put(&dir.join("x1/partition"), "1");
            put(&dir.join("x1/holders/bcache0/dev"), "252:0");
        };
        let below = refused(partition, "").unwrap();
        assert!(below.contains("/dev/bcache0"), "{below}");
        let paths = refused(|dir| put(&dir.join("multipath/nvme0c0n1/dev"), "0:0"), "").unwrap();
        assert!(paths.contains("several paths"), "{paths}");
        let array = refused(|dir| put(&dir.join("md/level"), "raid1"), "").unwrap();
        assert!(array.contains("logical volume"), "{array}");
    }

    #[test]
    fn dax_is_known_by_its_mount() {
        let line = |number: &str, options: &str| {
            format!("36 25 {number} / /mnt rw,relatime shared:1 - xfs /dev/pmem0 rw,{options}\n")
        };
        assert!(refused(|_| (), &line("8:17", "dax=always")).unwrap().contains("DAX"));
        assert_eq!(refused(|_| (), &line("8:17", "dax=never")), None);
        assert_eq!(refused(|_| (), &line("8:18", "dax")), None, "another device");
    }

    #[test]
    fn limits_are_found_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join("a/b/io.max"), "8:16 wiops=100\n253:0 rbps=max wbps=1048576\n");
        let found = |number| throttled(dir.path(), number, CGROUP_DEPTH);
        assert_eq!(found("253:0"), Some(dir.path().join("a/b")));
        assert_eq!((found("253:1"), found("8:1")), (None, None));
    }

    #[test]
    fn programs_end_within_their_time() {
        run(&mut Command::new("true"), SUSPEND).unwrap();
        assert!(run(&mut Command::new("false"), SUSPEND).is_err());
        let slow = run(Command::new("sleep").arg("30"), Duration::from_millis(20)).unwrap_err();
        assert!(slow.to_string().contains("not done after"), "{slow}");
    }
}
