//! Captures devices and consumes what comes, to nowhere: the bare price of capture, and the shortest life of
//! a group.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kfilter::device::GroupSpec;
use kfilter::{Device, ErrorKind, Group, Identity, KernelConsumer, VolumeSpec};
use serde_json::json;

/// How long writes on their way are waited for.
pub const DETACH: Duration = Duration::from_secs(60);

/// What to capture, and for how long.
#[derive(Debug)]
pub struct Spec {
    ring_bytes: u64,
    until: Option<PathBuf>,
    for_ms: Option<u64>,
    stalled: bool,
    batch: Duration,
    detach: Duration,
    barrier: bool,
    devices: Vec<PathBuf>,
}

impl Spec {
    pub fn parse(words: &[&str]) -> Result<Self> {
        let mut spec = Self {
            ring_bytes: 64 << 20,
            until: None,
            for_ms: None,
            stalled: false,
            batch: Duration::ZERO,
            detach: DETACH,
            barrier: false,
            devices: Vec::new(),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--ring" => spec.ring_bytes = super::number(words.next())?,
                "--until" => spec.until = words.next().map(PathBuf::from),
                "--for-ms" => spec.for_ms = Some(super::number(words.next())?),
                "--batch-ms" => spec.batch = Duration::from_millis(super::number(words.next())?),
                "--detach-ms" => spec.detach = Duration::from_millis(super::number(words.next())?),
                "--barrier" => spec.barrier = true,
                "--stalled" => spec.stalled = true,
                path => spec.devices.push(PathBuf::from(path)),
            }
        }
        ensure!(!spec.devices.is_empty(), "which device?");
        Ok(spec)
    }

    fn is_over(&self, since: Instant) -> bool {
        self.until.as_ref().is_some_and(|path| path.exists())
            || self.for_ms.is_some_and(|ms| since.elapsed() >= Duration::from_millis(ms))
    }
}

/// The size and device number of a block device.
pub fn block_device(path: &Path) -> Result<(u64, u64)> {
    let metadata = path.metadata().with_context(|| format!("look at {}", path.display()))?;
    if !metadata.file_type().is_block_device() {
        bail!("{} is no block device", path.display());
    }
    let name = path.canonicalize()?;
    let name = name.file_name().context("a device has a name")?;
    let sectors = std::fs::read_to_string(Path::new("/sys/class/block").join(name).join("size"))?;
    Ok((sectors.trim().parse::<u64>()? * 512, metadata.rdev()))
}

/// A fresh group over devices, attached as if their replicas were known to be equal.
pub fn capture(devices: &[PathBuf], ring_bytes: u64) -> Result<Group> {
    let mut volumes = Vec::new();
    for (id, device) in (1u32..).zip(devices) {
        let (size_bytes, _) = block_device(device)?;
        volumes.push(VolumeSpec { id, uuid: rand::random(), size_bytes, sector_bytes: 512 });
    }
    let identity =
        Identity { boot_id: [0; 16], group_id: rand::random(), epoch: 1, epoch_id: rand::random() };
    let group = Device::open()?
        .create(&GroupSpec {
            identity,
            volumes: &volumes,
            ring_bytes,
            first_lsn: 1,
            last_time_ns: 0,
            contexts: 0,
        })
        .context("create a group")?;
    for (volume, device) in volumes.iter().zip(devices) {
        let (_, rdev) = block_device(device)?;
        let attached = group.attach(volume.id, rdev, true);
        if let Err(error) = attached {
            let _ = release(&group, DETACH);
            return Err(error).with_context(|| format!("attach {}", device.display()));
        }
    }
    Ok(group)
}

/// Detaches everything and forgets the group, when what was on its way at a detach that did not wait so long
/// is over.
pub fn release(group: &Group, detach: Duration) -> Result<()> {
    let mut left = false;
    for id in group.volume_ids() {
        if group.volume(id)?.device != 0 {
            match group.detach(id, detach) {
                Err(error) if error.kind == ErrorKind::TimedOut && detach < DETACH => left = true,
                other => _ = other.context("detach")?,
            }
        }
    }
    let begun = Instant::now();
    loop {
        match group.destroy() {
            Err(error) if left && error.kind == ErrorKind::Busy && begun.elapsed() < DETACH => {
                std::thread::sleep(Duration::from_millis(50));
            }
            other => {
                if left {
                    println!(
                        "forgotten {} ms after a detach that left writes on their way",
                        begun.elapsed().as_millis()
                    );
                }
                return other.context("destroy");
            }
        }
    }
}

/// `sink`: prints `ready` when it captures, and the counters, as JSON, when it is over.
pub fn run(spec: &Spec) -> Result<()> {
    let group = Arc::new(capture(&spec.devices, spec.ring_bytes)?);
    println!("ready");
    let (started, mut records, mut payload_bytes) = (Instant::now(), 0u64, 0u64);
    let mut consumer = KernelConsumer::new(group.clone());
    let mut looked = started;
    loop {
        // Looking for the file costs more than consuming does.
        if looked.elapsed() >= Duration::from_millis(20) {
            if spec.is_over(started) {
                break;
            }
            looked = Instant::now();
        }
        if spec.stalled {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let mut last = 0;
        while let Some(record) = consumer.peek().map_err(malformed)? {
            last = record.lsn();
            records += 1;
            payload_bytes += record.payload().len() as u64;
            consumer.advance().map_err(malformed)?;
        }
        if last == 0 {
            consumer.wait(Duration::from_millis(20));
        } else {
            consumer.release(last).context("release")?;
        }
        std::thread::sleep(spec.batch);
    }
    if spec.barrier {
        // Whether it is passed depends on what the device still has; that it comes back is what matters.
        println!("barrier: {:?}", group.barrier(Duration::from_secs(2), false));
    }
    let status = group.status()?;
    drop(consumer);
    release(&group, spec.detach)?;
    let mut line = counters_of(&status);
    line["records"] = records.into();
    line["payload_bytes"] = payload_bytes.into();
    println!("{line}");
    Ok(())
}

fn counters_of(status: &kfilter::ioctl::Status) -> serde_json::Value {
    json!({
        "captured_lsn": status.captured_lsn,
        "ring_writes": status.ring_writes,
        "bitmap_writes": status.bitmap_writes,
        "failed": status.failed,
        "void": status.void,
        "late": status.late,
        "untracked": status.untracked,
        "unreadable": status.unreadable,
        "in_flight": status.in_flight,
        "hook_ns_mean": status.hook_ns_total / (status.ring_writes + status.bitmap_writes).max(1),
        "hook_ns_max": status.hook_ns_max,
        "freeze_ns_max": status.freeze_ns_max,
    })
}

fn malformed(malformed: kfilter::consumer::Malformed) -> anyhow::Error {
    anyhow::anyhow!("a malformed record in the ring: {malformed:?}")
}

fn ask_version() -> Result<kfilter::ioctl::Version> {
    let calls = kfilter::calls::Calls::open(Path::new(kfilter::ioctl::DEVICE))?;
    let mut version = kfilter::ioctl::Version { abi: kfilter::ioctl::ABI, ..Default::default() };
    calls.version(&mut version)?;
    Ok(version)
}

/// Bytes that the module may hold, and that it holds.
pub fn memory() -> Result<(u64, u64)> {
    let version = ask_version()?;
    Ok((version.memory_limit_bytes, version.memory_used_bytes))
}

/// `version`: what the module speaks and how much memory it holds, as JSON.
pub fn version() -> Result<()> {
    let version = ask_version()?;
    println!(
        "{}",
        json!({"abi": version.abi, "ring": version.ring, "memory_limit_bytes": version.memory_limit_bytes,
            "memory_used_bytes": version.memory_used_bytes})
    );
    Ok(())
}

/// `forget`: no group is left, and no device is captured.
pub fn forget() -> Result<()> {
    for group in Device::open()?.groups()? {
        Device::open()?.destroy(group.group_id).context("forget a group")?;
    }
    Ok(())
}
