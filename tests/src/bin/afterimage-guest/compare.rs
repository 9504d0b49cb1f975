//! Where two images differ.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context as _, Result, bail};

const BLOCK: usize = 4096;
/// Differing runs that are told.
const TOLD: usize = 20;

/// Fails when the images are not equal, and says where: runs of differing blocks, and which side is zero
/// there.
pub fn run(a: &Path, b: &Path) -> Result<()> {
    let open = |path: &Path| -> Result<(File, u64)> {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let size = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        Ok((file, size))
    };
    let ((mut file_a, size_a), (mut file_b, size_b)) = (open(a)?, open(b)?);
    if size_a != size_b {
        bail!("{} has {size_a} bytes, {} has {size_b}", a.display(), b.display());
    }
    let (mut block_a, mut block_b) = (vec![0; 256 * BLOCK], vec![0; 256 * BLOCK]);
    // First block, blocks, blocks that are zero in a, in b.
    let mut runs: Vec<(u64, u64, u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size_a {
        let length = usize::try_from((size_a - at).min(256 * BLOCK as u64))?;
        file_a.read_exact(&mut block_a[..length])?;
        file_b.read_exact(&mut block_b[..length])?;
        if block_a[..length] != block_b[..length] {
            let blocks = block_a[..length].chunks(BLOCK).zip(block_b[..length].chunks(BLOCK));
            for (index, (ours, theirs)) in (at / BLOCK as u64..).zip(blocks) {
                if ours != theirs {
                    let zero = |bytes: &[u8]| u64::from(bytes.iter().all(|byte| *byte == 0));
                    match runs.last_mut() {
                        Some(run) if run.0 + run.1 == index => {
                            *run = (run.0, run.1 + 1, run.2 + zero(ours), run.3 + zero(theirs));
                        }
                        _ => runs.push((index, 1, zero(ours), zero(theirs))),
                    }
                }
            }
        }
        at += length as u64;
    }
    if runs.is_empty() {
        println!("equal: {size_a} bytes");
        return Ok(());
    }
    let blocks: u64 = runs.iter().map(|run| run.1).sum();
    for (first, count, zero_a, zero_b) in runs.iter().take(TOLD) {
        eprintln!("differ: block {first} + {count} (4 KiB); zero in a: {zero_a}, in b: {zero_b}");
    }
    bail!("{} and {} differ in {blocks} blocks of 4 KiB, {} runs", a.display(), b.display(), runs.len())
}
