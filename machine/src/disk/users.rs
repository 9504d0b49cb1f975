//! Who else uses a disk, as an operator would find out with `losetup`, `fuser`, `findmnt`, `swapon` and
//! `lsblk`.
//!
//! Compared by device and inode, never by a path's text: a name may be gone, renamed, or another's by now.
//! What this process itself has open does not count; a loop device counts whoever made it.
//!
//! Not seen: processes that we may not look at (another user's, unless we are root), those of another
//! machine, memory that is still mapped after its descriptor was closed, a loop device over a file system
//! that hangs, and users inside the kernel that show nowhere (an iSCSI target's file).

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, makedev, statx};

use super::identity::loop_backing;
use super::{loops, system};

/// Descriptors that are looked at, at most, of all processes together.
const DESCRIPTORS: usize = 1 << 20;
/// Users that are told, at most.
const TOLD: usize = 16;
/// O_PATH of `fdinfo`.
const PATH_FLAG: u64 = 0o10_000_000;

/// One who uses a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A loop device over it.
    Loop {
        /// Its node.
        device: PathBuf,
    },
    /// A process that has it open for writing, or a disk that shares its bytes.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// It is mounted.
    Mount {
        /// Where.
        at: PathBuf,
    },
    /// The machine swaps to it.
    Swap,
    /// Another device stands on it: device mapper, RAID, bcache.
    Holder {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            User::Loop { device } => write!(f, "loop device {}", device.display()),
            User::Process { pid, name } => write!(f, "open for writing in process {pid} ({name})"),
            User::Mount { at } => write!(f, "mounted on {}", at.display()),
            User::Swap => write!(f, "used as swap"),
            User::Holder { name } => write!(f, "device {name} stands on it"),
        }
    }
}

/// In one line, as many as are told.
pub fn told(users: &[User]) -> String {
    users.iter().map(User::to_string).collect::<Vec<_>>().join(", ")
}

/// What is looked for: files by device and inode, devices by number.
#[derive(Debug, Default)]
struct Wanted {
    files: BTreeSet<(u64, u64)>,
    devices: BTreeSet<u64>,
    /// Of those, the ones that count when mounted, swapped to or held: not a disk beside its own other
    /// partitions.
    claimed: BTreeSet<u64>,
    /// The part of the file, where this disk is a loop device over it.
    part: Option<(u64, u64)>,
    /// That loop device.
    itself: Option<u64>,
}

/// Who else uses the disk that a descriptor holds.
///
/// # Errors
/// The descriptor is neither of a file nor of a block device. What cannot be looked at has no users.
pub fn users_of(held: &File) -> io::Result<Vec<User>> {
    let wanted = Wanted::of(held)?;
    let mut users = wanted.loops();
    users.extend(wanted.mounts());
    users.extend(wanted.swaps());
    users.extend(wanted.holders());
    users.extend(wanted.processes());
    users.truncate(TOLD);
    Ok(users)
}

/// Whether two disks share bytes: one file or device under two paths, a file and a loop device over it, two
/// loop devices over one part of a file, a disk and its partition. `false` for what cannot be looked at.
pub fn share(a: &File, b: &File) -> bool {
    let (Ok(wanted), Ok(other)) = (Wanted::of(a), b.metadata()) else { return false };
    if other.is_file() {
        return wanted.files.contains(&(other.dev(), other.ino()));
    }
    if wanted.devices.contains(&other.rdev()) {
        return true;
    }
    let sysfs = system::sysfs(other.rdev());
    let disk = system::whole_disk(&sysfs).unwrap_or(sysfs);
    let target = if disk.join("loop").exists() { loop_backing(b, &disk) } else { None };
    target.is_some_and(|(target, _)| wanted.is_under(&target))
}

impl Wanted {
    fn of(held: &File) -> io::Result<Wanted> {
        let metadata = held.metadata()?;
        let mut wanted = Wanted::default();
        if metadata.is_file() {
            wanted.files.insert((metadata.dev(), metadata.ino()));
        } else if metadata.file_type().is_block_device() {
            wanted.device(held, metadata.rdev());
        } else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        }
        Ok(wanted)
    }

    /// Whether a loop device stands on it.
    fn is_under(&self, target: &system::LoopTarget) -> bool {
        let is_over = self.files.contains(&target.file) || self.devices.contains(&target.rdev);
        is_over && self.part.is_none_or(|part| overlap(part, (target.offset, target.size_limit)))
    }

    fn device(&mut self, held: &File, rdev: u64) {
        let sysfs = system::sysfs(rdev);
        self.devices.insert(rdev);
        self.claimed.insert(rdev);
        let whole = system::whole_disk(&sysfs);
        let numbers =
            |dirs: &[PathBuf]| -> Vec<u64> { dirs.iter().filter_map(|dir| number_of(dir)).collect() };
        match &whole {
            Some(whole) => self.devices.extend(number_of(whole)),
            None => {
                let partitions = numbers(&system::partitions(&sysfs));
                self.devices.extend(&partitions);
                self.claimed.extend(&partitions);
            }
        }
        let disk = whole.unwrap_or(sysfs);
        if disk.join("loop").exists()
            && let Some((target, _)) = loop_backing(held, &disk)
        {
            self.itself = number_of(&disk);
            self.part = Some((target.offset, target.size_limit));
            if target.rdev == 0 {
                self.files.insert(target.file);
            } else {
                self.devices.insert(target.rdev);
            }
        }
    }

    /// Loop devices that stand on it, but for itself, and those over another part of the same file.
    fn loops(&self) -> Vec<User> {
        let Ok(entries) = std::fs::read_dir("/sys/block") else { return Vec::new() };
        let disks = entries.flatten().filter(|entry| entry.path().join("loop/backing_file").exists());
        let others = disks.filter(|disk| self.itself.is_none() || number_of(&disk.path()) != self.itself);
        let devices = others.map(|disk| Path::new("/dev").join(disk.file_name())).collect();
        let mut users = Vec::new();
        for (device, target) in loops::targets(devices) {
            let uses = match target {
                Some(target) => self.is_under(&target),
                // Without leave to ask the device: by its path, which may have been given to another since.
                None => {
                    let name = device.file_name().unwrap_or_default();
                    let path = Path::new("/sys/block").join(name).join("loop/backing_file");
                    std::fs::read_to_string(path).is_ok_and(|path| self.is_path(Path::new(path.trim_end())))
                }
            };
            if uses {
                users.push(User::Loop { device });
            }
        }
        users
    }

    fn is_path(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|found| {
            if found.file_type().is_block_device() {
                self.claimed.contains(&found.rdev())
            } else {
                self.files.contains(&(found.dev(), found.ino()))
            }
        })
    }

    /// File systems on it: by their device number, or by their source where they have a number of their own
    /// (btrfs).
    fn mounts(&self) -> Vec<User> {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut users: Vec<User> = Vec::new();
        for line in text.lines() {
            let mut fields = line.split(' ');
            let (number, at) = (fields.nth(2).and_then(system::device_number), fields.nth(1));
            let source = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').nth(1)).unwrap_or_default();
            let is_it = number.is_some_and(|number| self.claimed.contains(&number))
                || (source.starts_with("/dev/") && self.is_path(Path::new(source)));
            if let Some(at) = at.filter(|_| is_it) {
                let user = User::Mount { at: PathBuf::from(at) };
                if !users.contains(&user) {
                    users.push(user);
                }
            }
        }
        users
    }

    fn swaps(&self) -> Option<User> {
        let text = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        let mut paths = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        paths.any(|path| self.is_path(Path::new(path))).then_some(User::Swap)
    }

    fn holders(&self) -> Vec<User> {
        let mut users = Vec::new();
        for rdev in &self.claimed {
            let Ok(entries) = std::fs::read_dir(system::sysfs(*rdev).join("holders")) else { continue };
            users.extend(
                entries
                    .flatten()
                    .map(|entry| User::Holder { name: entry.file_name().to_string_lossy().into() }),
            );
        }
        users
    }

    /// Processes but this one that have it open for writing.
    fn processes(&self) -> Vec<User> {
        let mut users = Vec::new();
        let (mut left, own) = (DESCRIPTORS, std::process::id());
        let Ok(entries) = std::fs::read_dir("/proc") else { return users };
        for pid in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
            if pid == own {
                continue;
            }
            let dir = PathBuf::from(format!("/proc/{pid}"));
            let Ok(descriptors) = std::fs::read_dir(dir.join("fd")) else { continue };
            for descriptor in descriptors.flatten() {
                if left == 0 {
                    return users;
                }
                left -= 1;
                if self.is_held(&descriptor.path())
                    && is_writable(&dir.join("fdinfo").join(descriptor.file_name()))
                {
                    let name = std::fs::read_to_string(dir.join("comm")).unwrap_or_default();
                    users.push(User::Process { pid, name: name.trim().to_owned() });
                    break;
                }
            }
            if users.len() >= TOLD {
                break;
            }
        }
        users
    }

    /// Whether another's descriptor is of it. Asks no server: a dead network file system would not answer.
    fn is_held(&self, link: &Path) -> bool {
        let asked = StatxFlags::TYPE | StatxFlags::INO;
        let Ok(found) = statx(CWD, link, AtFlags::STATX_DONT_SYNC, asked) else { return false };
        match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::RegularFile => {
                self.files.contains(&(makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino))
            }
            FileType::BlockDevice => {
                self.devices.contains(&makedev(found.stx_rdev_major, found.stx_rdev_minor))
            }
            _ => false,
        }
    }
}

/// The number of a disk or partition, by its sysfs directory.
fn number_of(sysfs: &Path) -> Option<u64> {
    system::device_number(&std::fs::read_to_string(sysfs.join("dev")).ok()?)
}

/// Whether an `fdinfo` is of a descriptor that may write.
fn is_writable(fdinfo: &Path) -> bool {
    let text = std::fs::read_to_string(fdinfo).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u64::from_str_radix(flags.trim(), 8).ok()).unwrap_or(0);
    flags & PATH_FLAG == 0 && flags & 3 != 0
}

/// Whether two parts of a file share bytes; a limit of 0 is none.
fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    let end = |(offset, limit): (u64, u64)| if limit == 0 { u64::MAX } else { offset.saturating_add(limit) };
    a.0 < end(b) && b.0 < end(a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A loop device, detached when dropped.
    struct Looped(PathBuf);

    impl Looped {
        fn over(path: &Path, options: &[&str]) -> Looped {
            let done =
                Command::new("losetup").args(["-f", "--show"]).args(options).arg(path).output().unwrap();
            assert!(done.status.success(), "{}: needs root", String::from_utf8_lossy(&done.stderr));
            Looped(String::from_utf8(done.stdout).unwrap().trim().into())
        }
    }

    impl Drop for Looped {
        fn drop(&mut self) {
            let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
        }
    }

    /// A process that holds a file open, until dropped.
    struct Holder(Child);

    impl Holder {
        fn of(path: &Path, how: &str) -> Holder {
            let script = format!("exec 9{how}\"$0\"; echo; read _");
            let mut child = Command::new("sh")
                .arg("-c")
                .arg(script)
                .arg(path)
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut byte = [0];
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
            Holder(child)
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn image() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file
    }

    #[test]
    fn a_writer_counts_and_a_reader_and_we_ourselves_do_not() {
        let file = image();
        let _ours = File::options().write(true).open(file.path()).unwrap();
        assert_eq!(users_of(file.as_file()).unwrap(), []);
        let reader = Holder::of(file.path(), "<");
        assert_eq!(users_of(file.as_file()).unwrap(), []);
        drop(reader);
        let writer = Holder::of(file.path(), "<>");
        let users = users_of(file.as_file()).unwrap();
        let said = told(&users);
        assert_eq!(said, format!("open for writing in process {} (sh)", writer.0.id()));
    }

    #[test]
    fn a_loop_device_counts_whatever_its_file_is_called_by_now() {
        let file = image();
        let looped = Looped::over(file.path(), &[]);
        let expected = [User::Loop { device: looped.0.clone() }];
        assert_eq!(users_of(file.as_file()).unwrap(), expected);
        let moved = file.path().with_extension("moved");
        std::fs::rename(file.path(), &moved).unwrap();
        std::fs::write(file.path(), "another").unwrap();
        assert_eq!(users_of(file.as_file()).unwrap(), expected);
        assert_eq!(users_of(&File::open(file.path()).unwrap()).unwrap(), [], "the other file is not used");
        std::fs::remove_file(&moved).unwrap();
        assert_eq!(users_of(file.as_file()).unwrap(), expected, "deleted");
    }

    #[test]
    fn a_loop_device_is_used_by_those_who_use_its_file() {
        let file = image();
        let looped = Looped::over(file.path(), &["--offset", "0", "--sizelimit", "524288"]);
        let device = File::open(&looped.0).unwrap();
        assert_eq!(users_of(&device).unwrap(), [], "nobody but itself");
        let beside = Looped::over(file.path(), &["--offset", "524288"]);
        assert_eq!(users_of(&device).unwrap(), [], "over another part of the file");
        assert!(share(&device, file.as_file()) && share(file.as_file(), &device));
        assert!(!share(&device, &File::open(&beside.0).unwrap()));
        drop(beside);
        let above = Looped::over(&looped.0, &[]);
        let over = Looped::over(file.path(), &[]);
        let users = users_of(&device).unwrap();
        for other in [&above, &over] {
            assert!(users.contains(&User::Loop { device: other.0.clone() }), "{users:?}");
        }
        for other in [&above, &over] {
            let other = File::open(&other.0).unwrap();
            assert!(share(&device, &other) && share(&other, &device));
        }
        drop((above, over));
        let writer = Holder::of(file.path(), "<>");
        assert_eq!(users_of(&device).unwrap().len(), 1, "the file below");
        drop(writer);
        let _writer = Holder::of(&looped.0, "<>");
        assert_eq!(users_of(&device).unwrap().len(), 1, "the device itself");
    }

    #[test]
    fn parts_of_a_file_share_bytes_or_not() {
        assert!(overlap((0, 0), (1 << 20, 512)));
        assert!(!overlap((0, 512), (512, 0)));
        assert!(overlap((0, 513), (512, 0)));
    }
}
