//! Free space of a file system that nobody has mounted, by its own tools: `dumpe2fs`, `xfs_db` and
//! `xfs_logprint`, `btrfs`.

use std::path::Path;
use std::process::Command;

use super::{Kind, kind_of, parse};
use crate::granules::Granules;

/// What a tool may say: 64 bytes for each of a million free ranges.
const MOST_BYTES: usize = 64 << 20;

/// Free granules of an unmounted disk. Only while nobody else can write to it.
///
/// # Errors
/// Why it cannot be had exactly, in an operator's words.
pub fn of_unmounted(path: &Path, size_bytes: u64) -> Result<Granules, String> {
    let kind = kind_of(path).map_err(|error| format!("read its start: {error}"))?;
    let free = match kind {
        Some(Kind::Ext4) => parse::ext4(&run("dumpe2fs", "e2fsprogs", &[], path)?),
        Some(Kind::Xfs) => {
            parse::xfs_log(&run("xfs_logprint", "xfsprogs", &["-t"], path)?)?;
            let wanted = ["-r", "-c", "sb 0", "-c", "p", "-c", "freesp -d"];
            parse::xfs(&run("xfs_db", "xfsprogs", &wanted, path)?)
        }
        Some(Kind::Btrfs) => {
            let heads = run("btrfs", "btrfs-progs", &["inspect-internal", "dump-super"], path)?;
            let tree = ["inspect-internal", "dump-tree", "-t", "dev"];
            parse::btrfs(&heads, &run("btrfs", "btrfs-progs", &tree, path)?, size_bytes)
        }
        None => return Err("it does not begin with ext4, xfs or btrfs".to_owned()),
    }?;
    let mut granules = Granules::none(size_bytes);
    for range in free {
        granules.add_inside(range.start..range.end.min(size_bytes));
    }
    Ok(granules)
}

fn run(program: &str, package: &str, args: &[&str], path: &Path) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(args).arg(path).env("LC_ALL", "C");
    let done = command.output().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => format!("`{program}` is missing: install the package {package}"),
        _ => format!("run {program}: {error}"),
    })?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        let last = said.lines().last().unwrap_or_default().to_owned();
        return Err(format!("{program}: {}: {last}", done.status));
    }
    if done.stdout.len() > MOST_BYTES {
        return Err(format!("its free space lies in too many pieces for {program} to tell"));
    }
    String::from_utf8(done.stdout).map_err(|_| format!("{program} says what cannot be read"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn made(tool: &str, args: &[&str]) -> (tempfile::NamedTempFile, Result<Granules, String>) {
        const SIZE: u64 = 512 << 20;
        let disk = tempfile::NamedTempFile::new().unwrap();
        File::options().write(true).open(disk.path()).unwrap().set_len(SIZE).unwrap();
        let made = Command::new(tool).args(args).arg(disk.path()).output();
        assert!(made.is_ok_and(|made| made.status.success()), "install what has {tool}");
        let free = of_unmounted(disk.path(), SIZE);
        (disk, free)
    }

    #[test]
    fn new_file_systems_are_mostly_free_and_what_holds_something_is_not() {
        for (tool, args) in [("mkfs.ext4", &["-q", "-F"][..]), ("mkfs.xfs", &["-q"]), ("mkfs.btrfs", &["-q"])]
        {
            let (disk, free) = made(tool, args);
            let free = free.unwrap();
            assert!(free.bytes() > 300 << 20, "{tool}: {}", free.bytes());
            let content = std::fs::read(disk.path()).unwrap();
            // mkfs.btrfs leaves there what its temporary first chunk held, and frees it.
            let from = if tool == "mkfs.btrfs" { 16 << 20 } else { 0 };
            for run in free.runs(from..512 << 20, true) {
                let range = usize::try_from(run.start).unwrap()..usize::try_from(run.end).unwrap();
                assert!(content[range].iter().all(|byte| *byte == 0), "{tool}: {run:?} holds something");
            }
        }
    }

    #[test]
    fn what_is_no_file_system_is_told() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(1 << 20).unwrap();
        assert!(of_unmounted(disk.path(), 1 << 20).unwrap_err().contains("does not begin with"));
    }
}
