//! Calls the kernel device with what nobody sane would pass, from several threads, while the device is
//! written to.
//!
//! Arguments are plausible ones with some fields replaced by boundary values, or bytes by chance. Nothing is
//! expected of an answer but that it comes; then the device must still work, and without `CAP_SYS_ADMIN`
//! nobody gets in.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kfilter::{Device, KernelConsumer, Op, ioctl};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::event::{EventfdFlags, eventfd};

use super::sink;

const THREADS: u64 = 3;
/// Where pointers that are meant well lead.
const SCRATCH: usize = 4 << 20;
/// What the kernel may write behind it, when a pointer leads to its end.
const BEHIND: usize = 1 << 20;
const BLOCK: usize = 64 * 1024;

/// Every call.
const CALLS: [u32; 20] = [
    ioctl::VERSION,
    ioctl::LIST,
    ioctl::CREATE,
    ioctl::OPEN,
    ioctl::DESTROY,
    ioctl::ATTACH,
    ioctl::DETACH,
    ioctl::STATUS,
    ioctl::VOLUME,
    ioctl::EVENTFD,
    ioctl::ARM,
    ioctl::RELEASE,
    ioctl::EVENT,
    ioctl::SLOTS,
    ioctl::BEGIN,
    ioctl::BARRIER,
    ioctl::CLEAR,
    ioctl::MARK,
    ioctl::END,
    ioctl::BITMAP,
];

struct Shared {
    devices: Vec<u32>,
    size: u64,
    over: AtomicBool,
    answered: [[AtomicU64; 2]; CALLS.len()],
    bell: OwnedFd,
    /// Ids of groups that were made.
    groups: Mutex<Vec<[u8; 16]>>,
}

/// Fuzzes for a time, then checks. Devices are of one size; the first is written to.
pub fn run(time: Duration, seed: u64, paths: &[&str]) -> Result<()> {
    println!("fuzz: seed {seed}");
    let (mut devices, mut size) = (Vec::new(), u64::MAX);
    for path in paths {
        let (bytes, rdev) = sink::block_device(Path::new(path))?;
        size = size.min(bytes);
        devices.push(u32::try_from(rdev)?);
    }
    let path = Path::new(paths.first().context("which device?")?);
    let shared = Arc::new(Shared {
        devices,
        size,
        over: AtomicBool::new(false),
        answered: Default::default(),
        bell: eventfd(0, EventfdFlags::NONBLOCK)?,
        groups: Mutex::new(Vec::new()),
    });
    let mut threads = Vec::new();
    for number in 0..THREADS {
        let shared = shared.clone();
        threads.push(std::thread::spawn(move || caller(&shared, StdRng::seed_from_u64(seed + number))));
    }
    let (writes, disk) = (shared.clone(), path.to_path_buf());
    threads.push(std::thread::spawn(move || writer(&writes, &disk, StdRng::seed_from_u64(seed))));
    std::thread::sleep(time);
    shared.over.store(true, Relaxed);
    let last = Instant::now();
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    println!("fuzz: the last call came back after {:?}", last.elapsed());
    for (call, [good, bad]) in CALLS.iter().zip(&shared.answered) {
        println!(
            "fuzz: call {:2}  {:8} done {:8} refused",
            call & 0xff,
            good.load(Relaxed),
            bad.load(Relaxed)
        );
    }
    for group in Device::open()?.groups()? {
        Device::open()?.destroy(group.group_id).context("forget a group that the fuzzer left")?;
    }
    ensure!(Device::open()?.groups()?.is_empty(), "groups are left");
    still_works(path)?;
    denied(path)?;
    println!("fuzz: the device still works, and only for CAP_SYS_ADMIN");
    Ok(())
}

fn writer(shared: &Shared, path: &Path, mut chance: StdRng) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let block = vec![0x5a; BLOCK];
    while !shared.over.load(Relaxed) {
        let at = chance.random_range(0..shared.size / BLOCK as u64) * BLOCK as u64;
        file.write_all_at(&block[..chance.random_range(1..=16usize) * 4096], at)?;
        file.sync_data()?;
    }
    Ok(())
}

fn boundary(chance: &mut StdRng, scratch: u64, shared: &Shared) -> u64 {
    const VALUES: [u64; 24] = [
        0,
        1,
        2,
        63,
        64,
        65,
        511,
        512,
        4095,
        4096,
        4097,
        65535,
        65536,
        1 << 20,
        1 << 24,
        (1 << 31) - 1,
        1 << 31,
        (1 << 32) - 1,
        1 << 32,
        1 << 40,
        i64::MAX as u64,
        1 << 63,
        u64::MAX,
        // A kernel address.
        0xffff_8880_0000_1000,
    ];
    match chance.random_range(0..8) {
        0 => chance.random(),
        1 => scratch,
        2 => scratch + SCRATCH as u64 - 8,
        3 => shared.size,
        _ => VALUES[chance.random_range(0..VALUES.len())],
    }
}

/// Bytes of an argument as a sane caller would pass them.
fn plausible(call: u32, chance: &mut StdRng, scratch: u64, shared: &Shared) -> Vec<u8> {
    let mut words: Vec<u64> = Vec::new();
    let volume = chance.random_range(1..3u64);
    let offset = chance.random_range(0..shared.size / 65536) * 65536;
    let id = || {
        let groups = shared.groups.lock().map(|groups| groups.last().copied()).ok().flatten();
        let id = groups.unwrap_or_default();
        [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|byte| id[at + byte])))
    };
    match call {
        ioctl::VERSION => words.extend([u64::from(ioctl::ABI), 0, 0]),
        ioctl::LIST => words.extend([scratch, 1024]),
        ioctl::CREATE => {
            let id: [u64; 2] = chance.random();
            // Two volumes, of one size.
            let ring = 1 << chance.random_range(12..23);
            words.extend([id[0], id[1], 1, 2, 3, 1, 0, ring, scratch + 1024, 2 | 64 << 32]);
        }
        ioctl::OPEN => words.extend(id().into_iter().chain([0])),
        ioctl::ATTACH => {
            let clean = chance.random_range(0..2u64);
            let device = shared.devices[chance.random_range(0..shared.devices.len())];
            words.extend([volume | clean << 32, u64::from(device)]);
        }
        ioctl::DETACH => words.extend([volume | 50 << 32, 0]),
        ioctl::EVENTFD => words.push(shared.bell.as_raw_fd().cast_unsigned().into()),
        ioctl::ARM => words.push(64 * chance.random_range(0..8)),
        ioctl::RELEASE => words.push(chance.random_range(0..100_000)),
        ioctl::EVENT => words.extend([5, scratch, 32, 0]),
        ioctl::SLOTS => words.extend([scratch + 512, chance.random_range(1..65u64) | volume << 32, 0]),
        ioctl::BARRIER => words.push(50),
        ioctl::CLEAR | ioctl::MARK => words.extend([volume, offset, offset + 65536]),
        ioctl::BITMAP => words.push(chance.random_range(0..6)),
        ioctl::VOLUME => words.push(volume),
        _ => {}
    }
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    // More room than any argument takes: the kernel goes by its own idea of a size.
    bytes.resize(bytes.len().max(16 * 1024), 0);
    bytes
}

/// A thread's scratch, alone in four GiB of addresses that begin at a multiple of four GiB. A pointer to it
/// whose lower half is replaced leads nowhere else: the kernel would be told to write over this process's own
/// heap, and would be right to.
fn scratch() -> Result<&'static mut [u8]> {
    const ALONE: usize = 4 << 30;
    let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice, and a part of it, which nobody else has
    // and which stays.
    unsafe {
        let reserved = libc::mmap(std::ptr::null_mut(), 2 * ALONE, libc::PROT_NONE, nothing, -1, 0);
        ensure!(reserved != libc::MAP_FAILED, "reserve addresses: {}", std::io::Error::last_os_error());
        let alone = reserved.cast::<u8>().add(reserved.cast::<u8>().align_offset(ALONE));
        let scratch = alone.add(ALONE / 8 * 5);
        let granted = libc::mprotect(scratch.cast(), SCRATCH + BEHIND, libc::PROT_READ | libc::PROT_WRITE);
        ensure!(granted == 0, "make the scratch: {}", std::io::Error::last_os_error());
        Ok(std::slice::from_raw_parts_mut(scratch, SCRATCH + BEHIND))
    }
}

fn caller(shared: &Shared, mut chance: StdRng) -> Result<()> {
    let scratch = scratch()?;
    let at = scratch.as_mut_ptr().expose_provenance() as u64;
    let open = || OpenOptions::new().read(true).write(true).open(ioctl::DEVICE).context("open the device");
    let mut file = open()?;
    while !shared.over.load(Relaxed) {
        match chance.random_range(0..200) {
            0 => file = open()?,
            1..5 => map(&file, &mut chance),
            _ => {}
        }
        // What pointers lead to: two volumes, sync slots, and chance.
        if chance.random_range(0..8) == 0 {
            chance.fill(&mut scratch[..8192]);
        }
        for (index, id) in [1u32, 2].into_iter().enumerate() {
            let volume = &mut scratch[1024 + index * 32..][..32];
            volume[0..4].copy_from_slice(&id.to_le_bytes());
            volume[4..8].copy_from_slice(&512u32.to_le_bytes());
            volume[24..32].copy_from_slice(&shared.size.to_le_bytes());
        }
        for slot in 0..4u64 {
            let bytes = &mut scratch[512 + usize::try_from(slot)? * 16..][..16];
            bytes[..8].copy_from_slice(&(slot * 4096).to_le_bytes());
            bytes[8..].copy_from_slice(&4096u64.to_le_bytes());
        }
        let index = chance.random_range(0..CALLS.len());
        let mut call = CALLS[index];
        // Seldom: a group must live long enough for the calls that need one.
        if matches!(call, ioctl::DESTROY | ioctl::DETACH) && chance.random_range(0..12) > 0 {
            continue;
        }
        let mut argument = plausible(call, &mut chance, at, shared);
        if chance.random_range(0..3) > 0 {
            for _ in 0..chance.random_range(1..4) {
                let value = boundary(&mut chance, at, shared);
                let (field, wide) = (chance.random_range(0..20usize) * 4, chance.random::<bool>());
                if wide {
                    argument[field..field + 8].copy_from_slice(&value.to_le_bytes());
                } else {
                    argument[field..field + 4].copy_from_slice(&value.to_le_bytes()[..4]);
                }
            }
        }
        let mut pointer = argument.as_mut_ptr().expose_provenance() as u64;
        match chance.random_range(0..60) {
            0 => call = chance.random(),
            1 => call ^= 1 << chance.random_range(0..32),
            2 => pointer = boundary(&mut chance, at, shared),
            _ => {}
        }
        // SAFETY: `argument` and `scratch` live through the call and are longer than what the calls read or
        // write; other pointers are not this process's memory, or reach its scratch, and the kernel must
        // refuse those that are not.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), u64::from(call), pointer) };
        if CALLS.get(index) == Some(&call) {
            shared.answered[index][usize::from(answer < 0)].fetch_add(1, Relaxed);
        }
        if call == ioctl::CREATE
            && answer == 0
            && let Ok(mut groups) = shared.groups.lock()
        {
            groups.push(std::array::from_fn(|byte| argument[byte]));
        }
    }
    Ok(())
}

/// A mapping that may be granted or refused, read where it is granted, and given back.
fn map(file: &File, chance: &mut StdRng) {
    let length = [4096usize, 16384, 1 << 20, 1 << 23][chance.random_range(0..4)];
    let writable = chance.random_range(0..4) == 0;
    let offset = if chance.random_range(0..3) == 0 { 4096 } else { 0 };
    let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let map = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), offset)
    };
    if map == libc::MAP_FAILED {
        return;
    }
    assert!(!writable, "the ring was mapped writable");
    // SAFETY: granted for reading, `length` bytes long, and nobody else's.
    unsafe {
        std::ptr::read_volatile(map.cast::<u8>());
        assert_ne!(libc::mprotect(map, length, protection | libc::PROT_WRITE), 0, "made writable later");
        libc::munmap(map, length);
    }
}

/// A group is made, records what is written, byte for byte, and goes.
fn still_works(path: &Path) -> Result<()> {
    let group = Arc::new(sink::capture(&[PathBuf::from(path)], 8 << 20)?);
    let file = OpenOptions::new().write(true).custom_flags(libc::O_SYNC).open(path)?;
    let pattern: Vec<u8> = (0..BLOCK).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
    file.write_all_at(&pattern, 1 << 20)?;
    let consumer = KernelConsumer::new(group.clone());
    let (mut seen, deadline) = (vec![0u8; BLOCK], Instant::now() + Duration::from_secs(20));
    while seen != pattern {
        ensure!(Instant::now() < deadline, "after the fuzzing a write was not captured");
        match consumer.peek().map_err(|bad| anyhow::anyhow!("malformed: {bad:?}"))? {
            None => {
                consumer.wait(Duration::from_millis(100));
            }
            Some(record) => {
                if record.op() == Op::Write {
                    let at = usize::try_from(record.offset().saturating_sub(1 << 20))?;
                    if record.offset() >= 1 << 20 && at + record.payload().len() <= BLOCK {
                        seen[at..at + record.payload().len()].copy_from_slice(record.payload());
                    }
                }
                consumer.advance().map_err(|bad| anyhow::anyhow!("malformed: {bad:?}"))?;
            }
        }
    }
    drop(consumer);
    sink::release(&group, sink::DETACH)
}

/// Root without `CAP_SYS_ADMIN` gets nothing out of it.
fn denied(path: &Path) -> Result<()> {
    let own = std::env::current_exe()?;
    let out = Command::new("setpriv")
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
        .arg(own)
        .args(["sink", "--for-ms", "1"])
        .arg(path)
        .output()
        .context("setpriv")?;
    let said = String::from_utf8_lossy(&out.stderr);
    if out.status.success() || !said.to_lowercase().contains("permi") {
        bail!("without CAP_SYS_ADMIN: {} {said}", out.status);
    }
    Ok(())
}
