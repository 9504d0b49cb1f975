//! How many writes the kernel module must be able to follow at once: what the drivers of a group's disks
//! take.
//!
//! A write that finds no context is only a dirty bit, and the next barrier drains the whole queue for it.

use std::fs;
use std::path::{Path, PathBuf};

/// What several usual disks need; also where a driver does not tell (device mapper).
const LEAST: u64 = 16_384;
/// The most that the module takes.
const MOST: u64 = 65_536;

/// For disks given by their directories in sysfs.
pub fn needed(disks: impl IntoIterator<Item = PathBuf>) -> u32 {
    let requests: u64 = disks.into_iter().map(|sysfs| requests(&sysfs)).sum();
    // As many again: writes that were merged into a request, or wait for one.
    u32::try_from(requests.saturating_mul(2).clamp(LEAST, MOST)).unwrap_or(0)
}

/// Requests that a disk's queues hold; 0 where there are none, or it is not told.
fn requests(sysfs: &Path) -> u64 {
    let disk = if sysfs.join("partition").exists() { sysfs.join("..") } else { sysfs.to_owned() };
    let queues = fs::read_dir(disk.join("mq")).map_or(0, |queues| queues.flatten().count());
    let each = fs::read_to_string(disk.join("queue/nr_requests")).unwrap_or_default();
    let queues = u64::try_from(queues).unwrap_or(u64::MAX);
    each.trim().parse::<u64>().unwrap_or(0).saturating_mul(queues)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of so many queues of so many requests each, with a partition.
    fn disk(queues: u32, each: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for queue in 0..queues {
            fs::create_dir_all(dir.path().join("mq").join(queue.to_string())).unwrap();
        }
        fs::create_dir_all(dir.path().join("queue")).unwrap();
        fs::write(dir.path().join("queue/nr_requests"), each).unwrap();
        fs::create_dir_all(dir.path().join("part")).unwrap();
        fs::write(dir.path().join("part/partition"), "1\n").unwrap();
        dir
    }

    #[test]
    fn deep_queues_get_more_contexts_and_there_is_a_least_and_a_most() {
        let usual = disk(1, "256\n");
        let deep = disk(12, "1023\n");
        let needs = |disks: &[PathBuf]| needed(disks.iter().cloned());
        assert_eq!(needs(&[]), 16_384);
        assert_eq!(needs(&[usual.path().to_owned()]), 16_384);
        assert_eq!(needs(&[deep.path().to_owned()]), 2 * 12 * 1023);
        assert_eq!(needs(&[deep.path().join("part"), usual.path().to_owned()]), 2 * (12 * 1023 + 256));
        assert_eq!(needs(&vec![deep.path().to_owned(); 4]), 65_536);
        assert_eq!(needs(&[disk(64, "no number").path().to_owned()]), 16_384);
    }
}
