//! Who uses a device besides us, and whether the machine is going down: what decides about detaching at a
//! clean stop.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::OFlags;

use crate::capture::disk::Disk;

/// systemd answers at once, or is no help.
const ANSWER: Duration = Duration::from_secs(3);

/// Whether the machine shuts down or reboots, as far as systemd says.
pub fn machine_stops() -> bool {
    let asked = Command::new("systemctl")
        .arg("is-system-running")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = asked else { return false };
    let begun = machine::now();
    while matches!(child.try_wait(), Ok(None)) {
        if machine::since(begun) > ANSWER {
            let _ = child.kill();
            return false;
        }
        machine::sleep(Duration::from_millis(5));
    }
    let mut text = String::new();
    let read = child.stdout.map(|mut out| std::io::Read::read_to_string(&mut out, &mut text));
    matches!(read, Some(Ok(_))) && text.trim() == "stopping"
}

/// Whether anybody could write to a device: it is mounted, claimed by a device above it, or open for writing.
pub fn is_in_use(disk: &Disk) -> bool {
    // The kernel refuses an exclusive open while a mount or another device holds it, or one of its
    // partitions.
    let mut options = fs::OpenOptions::new();
    options.read(true).custom_flags(OFlags::EXCL.bits().cast_signed());
    options.open(disk.path()).is_err() || is_open_for_writing(disk.rdev(), Path::new("/proc"))
}

/// Looks through every process's open files.
fn is_open_for_writing(rdev: u64, proc: &Path) -> bool {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    let processes = entries(proc)
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
    for process in processes {
        for descriptor in entries(&process.path().join("fd")) {
            if fs::metadata(descriptor.path()).is_ok_and(|metadata| metadata.rdev() == rdev) {
                let about = process.path().join("fdinfo").join(descriptor.file_name());
                if writes(&fs::read_to_string(about).unwrap_or_default()) {
                    return true;
                }
            }
        }
    }
    false
}

/// Whether a descriptor writes, by its fdinfo; who cannot be looked at might.
fn writes(about: &str) -> bool {
    let flags = about.lines().find_map(|line| line.strip_prefix("flags:"));
    let mode = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    mode.is_none_or(|mode| mode & 3 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_judged_by_their_flags() {
        assert!(!writes("pos:\t0\nflags:\t0140000\nmnt_id:\t5\n"), "read only");
        assert!(writes("pos:\t0\nflags:\t0100002\n"), "both");
        assert!(writes("pos:\t0\nflags:\t0100001\n"), "write only");
        assert!(writes(""), "nobody can tell");
        // /dev/null is open somewhere for writing: this very test holds it.
        let null = fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        assert!(is_open_for_writing(null.metadata().unwrap().rdev(), Path::new("/proc")));
    }
}
