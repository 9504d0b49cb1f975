//! Disk images: compared, and read block by block.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::stamp::{BLOCK_BYTES, Block};

const PIECE_BYTES: usize = 1 << 20;

/// Fails with the first differing byte, if there is one.
///
/// # Errors
/// The files differ, or cannot be read.
pub fn assert_equal(left: &Path, right: &Path) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let (a, b) = (open(left)?, open(right)?);
    // A block device's metadata tells no size.
    let end = |mut file: &File| file.seek(SeekFrom::End(0));
    let (size, other) = (end(&a)?, end(&b)?);
    ensure!(size == other, "{} has {size} bytes, {} {other}", left.display(), right.display());
    let (mut x, mut y) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    let mut at = 0;
    while at < size {
        let bytes = usize::try_from(size - at).unwrap_or(usize::MAX).min(PIECE_BYTES);
        a.read_exact_at(&mut x[..bytes], at)?;
        b.read_exact_at(&mut y[..bytes], at)?;
        if x[..bytes] != y[..bytes] {
            let first = x.iter().zip(&y).take_while(|(x, y)| x == y).count() as u64;
            bail!("{} and {} differ at byte {}", left.display(), right.display(), at + first);
        }
        at += bytes as u64;
    }
    Ok(())
}

/// Blocks that the oracle looks at.
pub trait Blocks {
    /// One block of a volume.
    ///
    /// # Errors
    /// It cannot be read.
    fn block(&self, volume: u32, block: u32) -> Result<Block>;
}

/// The images of a group's volumes.
pub struct Images(Vec<File>);

impl Images {
    /// Opens the images, in the volumes' order.
    ///
    /// # Errors
    /// One cannot be opened.
    pub fn open(paths: &[PathBuf]) -> Result<Images> {
        let open = |path: &PathBuf| File::open(path).with_context(|| format!("open {}", path.display()));
        Ok(Images(paths.iter().map(open).collect::<Result<_>>()?))
    }
}

impl Blocks for Images {
    fn block(&self, volume: u32, block: u32) -> Result<Block> {
        let file = self.0.get(volume as usize).context("as many images as volumes")?;
        let mut bytes = [0; BLOCK_BYTES];
        file.read_exact_at(&mut bytes, u64::from(block) * BLOCK_BYTES as u64)?;
        Ok(bytes)
    }
}
