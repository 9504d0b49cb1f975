//! What the file systems' tools print, as ranges of free bytes. Whatever is not understood is not free.

use std::ops::Range;

/// Free ranges, or why they cannot be known.
type Free = Result<Vec<Range<u64>>, String>;

/// The value of a line `name:   value`, or `name = value`.
fn value<'a>(text: &'a str, name: &str, between: char) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(between)?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn number(text: &str, name: &str, between: char) -> Result<u64, String> {
    let found = value(text, name, between).and_then(|value| value.parse().ok());
    found.ok_or_else(|| format!("its tool does not tell the {name}"))
}

/// A range of blocks in bytes.
fn blocks(first: u64, count: u64, block_bytes: u64) -> Option<Range<u64>> {
    let start = first.checked_mul(block_bytes)?;
    Some(start..start.checked_add(count.checked_mul(block_bytes)?)?)
}

/// `dumpe2fs DISK`.
pub(super) fn ext4(text: &str) -> Free {
    let features = value(text, "Filesystem features", ':').ok_or("dumpe2fs does not tell the features")?;
    let has = |feature: &str| features.split_whitespace().any(|known| known == feature);
    if value(text, "Filesystem state", ':') != Some("clean") || has("needs_recovery") {
        return Err("its file system was not unmounted cleanly".to_owned());
    }
    if has("bigalloc") {
        return Err(
            "its ext4 allocates in clusters (bigalloc), which dumpe2fs does not tell apart".to_owned()
        );
    }
    let block_bytes = number(text, "Block size", ':')?;
    let mut free = Vec::new();
    let lists = text.lines().filter_map(|line| line.strip_prefix("  Free blocks: "));
    for piece in lists.flat_map(|list| list.split(", ")).filter(|piece| !piece.trim().is_empty()) {
        let (first, last) = piece.trim().split_once('-').unwrap_or((piece.trim(), piece.trim()));
        let parsed = first.parse::<u64>().ok().zip(last.parse::<u64>().ok());
        let range = parsed.filter(|(first, last)| first <= last);
        let range = range.and_then(|(first, last)| blocks(first, last - first + 1, block_bytes));
        free.push(range.ok_or_else(|| format!("dumpe2fs says {piece:?}, which is no range"))?);
    }
    Ok(free)
}

/// `xfs_logprint -t DISK`: whether the log holds nothing that the disk does not.
pub(super) fn xfs_log(text: &str) -> Result<(), String> {
    if text.contains("state: <CLEAN>") {
        Ok(())
    } else {
        Err("its file system was not unmounted cleanly".to_owned())
    }
}

/// `xfs_db -r -c "sb 0" -c p -c "freesp -d" DISK`.
pub(super) fn xfs(text: &str) -> Free {
    let of = |name| number(text, name, '=');
    let (block_bytes, ag_blocks, ags) = (of("blocksize")?, of("agblocks")?, of("agcount")?);
    if of("logstart")? == 0 {
        return Err("its xfs has its log on another device".to_owned());
    }
    let mut free = Vec::new();
    for line in text.lines().filter(|line| !line.contains('=')) {
        if line.contains("from") {
            break; // The summary.
        }
        let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
        let [ag, first, count] = fields[..] else { continue };
        if ag >= ags || first.checked_add(count).is_none_or(|end| end > ag_blocks) {
            return Err(format!("xfs_db says {line:?}, which lies outside"));
        }
        let start = ag.checked_mul(ag_blocks).and_then(|start| start.checked_add(first));
        let range = start.and_then(|start| blocks(start, count, block_bytes));
        free.push(range.ok_or_else(|| format!("xfs_db says {line:?}, which is no range"))?);
    }
    Ok(free)
}

/// `btrfs inspect-internal dump-super DISK` and `dump-tree -t dev DISK`: what belongs to no chunk is free,
/// but for the first MiB and the copies of the superblock.
pub(super) fn btrfs(heads: &str, tree: &str, size_bytes: u64) -> Free {
    let of = |name: &str| {
        let line = heads.lines().find(|line| line.split_whitespace().next() == Some(name));
        let found = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|value| value.parse().ok());
        found.ok_or_else(|| format!("btrfs does not tell {name}"))
    };
    if of("num_devices")? != 1u64 {
        return Err("its btrfs has other devices, too".to_owned());
    }
    if of("log_root")? != 0u64 {
        return Err("its file system was not unmounted cleanly".to_owned());
    }
    const MIB: u64 = 1 << 20;
    let head = |at: u64| at..at + MIB;
    let mut used = vec![head(0), head(64 * MIB), head(256 << 30)];
    used.push(of("dev_item.total_bytes")?..u64::MAX);
    let mut start = None;
    for line in tree.lines() {
        if let Some((_, key)) = line.split_once("DEV_EXTENT ") {
            start = key.split(')').next().and_then(|offset| offset.parse::<u64>().ok());
            start.ok_or_else(|| format!("btrfs says {line:?}, which is no chunk"))?;
        } else if let Some((_, length)) = line.split_once(" length ") {
            let length: Option<u64> = length.trim().parse().ok();
            let range =
                start.take().zip(length).and_then(|(start, length)| Some(start..start.checked_add(length)?));
            used.push(range.ok_or_else(|| format!("btrfs says {line:?}, which is no length"))?);
        }
    }
    used.sort_by_key(|range| range.start);
    let (mut free, mut at) = (Vec::new(), 0);
    for range in used {
        if at < range.start.min(size_bytes) {
            free.push(at..range.start.min(size_bytes));
        }
        at = at.max(range.end);
    }
    Ok(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ext4_is_read_only_when_it_was_unmounted() {
        let head = |state: &str, features: &str| {
            format!(
                "Filesystem features:      has_journal {features}\nFilesystem state:         {state}\nBlock size:               4096\nFree blocks:              9\n"
            )
        };
        let groups = "Group 0: (Blocks 0-32767)\n  Free blocks: 2-4, 9\nGroup 1: (Blocks 32768-65535)\n  Free blocks: \n";
        let text = head("clean", "extent") + groups;
        assert_eq!(ext4(&text).unwrap(), [8192..20480, 36864..40960]);
        for (state, features) in [("not clean", "extent"), ("clean", "needs_recovery"), ("clean", "bigalloc")]
        {
            assert!(ext4(&(head(state, features) + groups)).is_err(), "{state} {features}");
        }
        assert!(ext4(&(head("clean", "") + "  Free blocks: 7-3\n")).is_err());
        assert!(ext4("").is_err());
    }

    #[test]
    fn xfs_is_counted_by_allocation_group() {
        let text = "blocksize = 4096\nagblocks = 100\nagcount = 2\nlogstart = 6\n  0   10   5\n  1   0   1\n  from  to\n 1 1 1\n";
        assert_eq!(xfs(text).unwrap(), [40960..61440, 409_600..413_696]);
        assert!(xfs(&text.replace("  1   0   1", "  2   0   1")).is_err(), "no such group");
        assert!(xfs(&text.replace("logstart = 6", "logstart = 0")).is_err());
        assert!(xfs_log("log tail: 2 head: 9 state: <DIRTY>").is_err());
    }

    #[test]
    fn btrfs_is_free_between_its_chunks() {
        let heads = "num_devices\t\t1\nlog_root\t\t0\ndev_item.total_bytes\t209715200\n";
        let tree = "item 0 key (1 DEV_EXTENT 2097152) itemoff 1\n\t\tchunk_objectid 256 chunk_offset 0 length 1048576\n";
        const MIB: u64 = 1 << 20;
        let free = [MIB..2 * MIB, 3 * MIB..64 * MIB, 65 * MIB..200 * MIB];
        assert_eq!(btrfs(heads, tree, 300 * MIB).unwrap(), free);
        assert!(btrfs(&heads.replace("log_root\t\t0", "log_root\t\t7"), tree, 300 * MIB).is_err());
        assert!(btrfs(&heads.replace("num_devices\t\t1", "num_devices\t\t2"), tree, 300 * MIB).is_err());
        assert!(btrfs(heads, &tree.replace("1048576", "x"), 300 * MIB).is_err());
    }
}
