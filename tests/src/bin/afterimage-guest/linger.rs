//! A process that forgets groups and keeps their pages mapped: they go on being counted, and their number is
//! bounded.

use anyhow::{Result, bail, ensure};
use kfilter::device::{Device, Group, GroupSpec};
use kfilter::{ErrorKind, Identity, VolumeSpec};

use crate::sink::memory;

/// More than any limit that a test sets.
const MOST: usize = 64;

fn group(ring_bytes: u64) -> std::result::Result<Group, kfilter::Error> {
    let volumes = [VolumeSpec { id: 1, uuid: [1; 16], size_bytes: 1 << 30, sector_bytes: 512 }];
    let identity =
        Identity { boot_id: [0; 16], group_id: rand::random(), epoch: 1, epoch_id: rand::random() };
    Device::open()?.create(&GroupSpec {
        identity,
        volumes: &volumes,
        ring_bytes,
        first_lsn: 1,
        last_time_ns: 0,
        contexts: 0,
    })
}

/// Makes and forgets groups until it is refused. For a module that holds nothing else.
pub fn run(ring_bytes: u64) -> Result<()> {
    let (limit, before) = memory()?;
    let mut kept = Vec::new();
    loop {
        match group(ring_bytes) {
            Ok(group) => {
                group.destroy()?;
                kept.push(group);
            }
            Err(error) if error.kind == ErrorKind::NoMemory => break,
            Err(error) => return Err(error.into()),
        }
        let counted = memory()?.1 - before;
        let least = kept.len() as u64 * ring_bytes;
        ensure!(
            counted >= least,
            "{} forgotten groups are mapped, and only {counted} bytes are counted",
            kept.len()
        );
        if kept.len() == MOST {
            bail!("{MOST} groups of {ring_bytes} bytes each are mapped, with a limit of {limit} bytes");
        }
    }
    let refused_at = kept.len();
    kept.clear();
    let after = memory()?.1;
    ensure!(after == before, "nothing is mapped any more, and {} bytes are counted", after - before);
    group(ring_bytes)?.destroy()?;
    println!("refused behind {refused_at} groups of {ring_bytes} bytes each, with a limit of {limit} bytes");
    Ok(())
}
