//! CPU time of processes and their threads, from /proc.

use std::collections::BTreeMap;

/// Clock ticks a second in /proc (fixed on Linux).
const TICKS_PER_S: f64 = 100.0;

fn seconds_of(stat: &str) -> f64 {
    // The name, in brackets, may hold spaces: fields are counted behind it. utime and stime are fields 14 and 15.
    let behind = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let field =
        |at: usize| behind.split(' ').nth(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (field(11) + field(12)) / TICKS_PER_S
}

/// CPU seconds of a process, all its threads, ended ones too.
pub fn of_process(pid: u32) -> f64 {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(0.0, |stat| seconds_of(&stat))
}

/// CPU seconds of this process.
pub fn of_self() -> f64 {
    of_process(std::process::id())
}

/// CPU seconds of a process's living threads, by name; numbers at the end of names are dropped.
pub fn by_thread(pid: u32) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return found };
    for task in tasks.flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let name =
            stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map_or("?", |(name, _)| name);
        let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-').to_owned();
        *found.entry(name).or_insert(0.0) += seconds_of(&stat);
    }
    found
}

/// Peak resident memory of a process, MiB.
pub fn peak_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().split(' ').next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
