//! What `demo` does to its disk: a file system of real files, its ransom, and the proof that each file came
//! back.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::demo::tool;
use crate::nbd_client::{NbdClient, REQUEST_BYTES};

/// Enough to be real, little enough to be quick.
const TREE_BYTES: u64 = 48 << 20;
const TREE_FILES: usize = 3000;
/// The file system's block, which `debugfs` counts in.
const BLOCK_BYTES: usize = 4096;
/// Where the data comes from; the first are on nearly every machine, the last on all.
const SOURCES: [&str; 3] = ["/usr/share", "/usr/lib", "/etc"];

/// A file of the tree.
pub struct DemoFile {
    /// Path within the tree.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    hash: String,
}

/// Copies readable files into `tree`, so that nobody changes them meanwhile, and hashes each.
pub fn collect(tree: &Path) -> Result<Vec<DemoFile>> {
    std::fs::create_dir_all(tree)?;
    let mut files = Vec::new();
    let mut total = 0;
    for source in SOURCES {
        let mut waiting = vec![PathBuf::from(source)];
        while let Some(dir) = waiting.pop() {
            let Ok(entries) = std::fs::read_dir(&dir) else { continue };
            let mut entries: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            entries.sort();
            for path in entries {
                let Ok(found) = path.symlink_metadata() else { continue };
                if found.is_dir() {
                    waiting.push(path);
                } else if found.is_file() && found.len() > 0 && is_plain(&path) {
                    if total + found.len() > TREE_BYTES || files.len() >= TREE_FILES {
                        continue;
                    }
                    total += found.len();
                    files.extend(copy(&path, files.len(), tree));
                }
            }
        }
    }
    ensure!(!files.is_empty(), "no readable file in {}", SOURCES.join(", "));
    Ok(files)
}

/// `debugfs` takes its commands as lines of words.
fn is_plain(path: &Path) -> bool {
    path.to_str()
        .is_some_and(|text| text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"'\\<>".contains(&byte)))
}

/// A file that cannot be read is left out: the demo runs as anybody.
fn copy(from: &Path, number: usize, tree: &Path) -> Option<DemoFile> {
    // One directory for each hundred, so that the tree has some shape.
    let path = format!("{:02}/{number}-{}", number / 100, from.file_name()?.to_str()?);
    let to = tree.join(&path);
    std::fs::create_dir_all(to.parent()?).ok()?;
    let content = std::fs::read(from).ok()?;
    std::fs::write(&to, &content).ok()?;
    Some(DemoFile { path, bytes: content.len() as u64, hash: hex(&Sha256::digest(&content)) })
}

/// An ext4 file system that holds `tree`, made without mounting anything.
pub fn make_file_system(tree: &Path, image: &Path, bytes: u64) -> Result<()> {
    let made = Command::new(tool("mke2fs")?)
        .args(["-q", "-F", "-t", "ext4", "-b", &BLOCK_BYTES.to_string(), "-d"])
        .arg(tree)
        .arg(image)
        .arg(format!("{}k", bytes >> 10))
        .stdin(Stdio::null())
        .output()?;
    ensure!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

/// Writes the image's content, zeros left out, and flushes.
pub fn write_image(image: &Path, volume: &mut NbdClient) -> Result<u64> {
    let file = File::open(image).with_context(|| format!("open {}", image.display()))?;
    let mut buffer = vec![0; REQUEST_BYTES];
    let (mut offset, mut written) = (0, 0);
    loop {
        let read = file.read_at(&mut buffer, offset)?;
        if read == 0 {
            volume.flush()?;
            return Ok(written);
        }
        if buffer[..read].iter().any(|byte| *byte != 0) {
            volume.write(&buffer[..read], offset)?;
            written += read as u64;
        }
        offset += read as u64;
    }
}

/// Overwrites the blocks of every file with random bytes; the file system's own structure stays, as in a real
/// ransom.
pub fn ransom(image: &Path, files: &[DemoFile], volume: &mut NbdClient) -> Result<u64> {
    let commands: String = files.iter().map(|file| format!("blocks /{}\n", file.path)).collect();
    let answer = debugfs(image, &commands, Path::new("/"))?;
    // Every command is echoed behind a prompt; what remains are block numbers.
    let lines = answer.lines().filter(|line| !line.starts_with("debugfs"));
    let mut blocks: Vec<u64> =
        lines.flat_map(str::split_whitespace).filter_map(|word| word.parse().ok()).collect();
    blocks.retain(|block| *block != 0);
    blocks.sort_unstable();
    blocks.dedup();
    let needed: u64 = files.iter().map(|file| file.bytes.div_ceil(BLOCK_BYTES as u64)).sum();
    // A few small files may lie within their inodes.
    ensure!(blocks.len() as u64 >= needed / 2, "debugfs named {} blocks of about {needed}", blocks.len());
    let mut random = File::open("/dev/urandom").context("open /dev/urandom")?;
    let mut buffer = vec![0; REQUEST_BYTES];
    let runs = blocks.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(REQUEST_BYTES / BLOCK_BYTES));
    for run in runs {
        let bytes = &mut buffer[..run.len() * BLOCK_BYTES];
        random.read_exact(bytes)?;
        volume.write(bytes, run[0] * BLOCK_BYTES as u64)?;
    }
    volume.flush()?;
    Ok(blocks.len() as u64 * BLOCK_BYTES as u64)
}

/// SHA-256 of a volume's content.
pub fn hash_volume(volume: &mut NbdClient) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; REQUEST_BYTES];
    let mut offset = 0;
    while offset < volume.size() {
        let bytes = usize::try_from(volume.size() - offset).unwrap_or(usize::MAX).min(REQUEST_BYTES);
        volume.read(&mut buffer[..bytes], offset)?;
        hash.update(&buffer[..bytes]);
        offset += bytes as u64;
    }
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of a file.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; REQUEST_BYTES];
    loop {
        match file.read(&mut buffer).with_context(|| format!("read {}", path.display()))? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// How many files of the image at `restored` are what they were. The file system must be clean.
pub fn check_files(restored: &Path, files: &[DemoFile], out: &Path) -> Result<usize> {
    let checked = Command::new(tool("e2fsck")?).arg("-fn").arg(restored).output()?;
    ensure!(checked.status.success(), "e2fsck: {}", String::from_utf8_lossy(&checked.stdout));
    std::fs::create_dir_all(out)?;
    debugfs(restored, "rdump / .\n", out)?;
    let known: HashMap<&str, &str> =
        files.iter().map(|file| (file.path.as_str(), file.hash.as_str())).collect();
    let came_back =
        |(path, hash): (&&str, &&str)| hash_file(&out.join(path)).is_ok_and(|found| found == **hash);
    Ok(known.iter().filter(|entry| came_back(*entry)).count())
}

/// Runs `debugfs` on an image, read-only, in the directory `home`, and returns what it printed.
fn debugfs(image: &Path, commands: &str, home: &Path) -> Result<String> {
    // From a file and not a pipe: with hundreds of answers both pipes would fill.
    let mut file = tempfile::NamedTempFile::new().context("make a temporary file")?;
    file.write_all(commands.as_bytes())?;
    let output =
        Command::new(tool("debugfs")?).arg("-f").arg(file.path()).arg(image).current_dir(home).output()?;
    ensure!(output.status.success(), "debugfs: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
