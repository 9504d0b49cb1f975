//! A real tree of files, and what it holds by hash.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// Where real files come from; the second where a slim system has too few in the first.
const SOURCES: [&str; 2] = ["/usr/share", "/usr/lib"];

/// Directories of a system that hold at least `least` bytes together and not much more, the largest that fit
/// first, and how many bytes they hold.
///
/// # Errors
/// There is not that much.
pub fn real_trees(least: u64) -> Result<(Vec<PathBuf>, u64)> {
    let mut chosen = Vec::new();
    let mut total = 0;
    for source in SOURCES {
        let mut sized = Vec::new();
        for entry in fs::read_dir(source)? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                sized.push((bytes_below(&path)?, path));
            }
        }
        sized.sort_by(|a, b| b.cmp(a));
        for (bytes, path) in sized {
            if total < least && total + bytes <= least + least / 4 {
                total += bytes;
                chosen.push(path);
            }
        }
    }
    ensure!(total >= least, "directories of {total} bytes in {SOURCES:?} fit, {least} are needed");
    Ok((chosen, total))
}

fn bytes_below(folder: &Path) -> Result<u64> {
    let mut total = 0;
    walk(folder, &mut |path| {
        let meta = path.symlink_metadata()?;
        total += if meta.is_file() { meta.len() } else { 0 };
        Ok(())
    })?;
    Ok(total)
}

/// Calls `visit` for everything below a folder, in the order of names, folders after what is in them.
fn walk(folder: &Path, visit: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    entries.sort();
    for path in entries {
        if path.symlink_metadata()?.is_dir() {
            walk(&path, visit)?;
        }
        visit(&path)?;
    }
    Ok(())
}

/// What a tree holds: for each path a file's SHA-256, a link's target, or that it is a folder.
#[derive(Debug, PartialEq, Eq)]
pub struct Manifest(BTreeMap<PathBuf, String>);

impl Manifest {
    /// Reads everything below `root`.
    ///
    /// # Errors
    /// Something cannot be read.
    pub fn of(root: &Path) -> Result<Manifest> {
        let mut all = BTreeMap::new();
        walk(root, &mut |path| {
            let meta = path.symlink_metadata()?;
            let content = if meta.is_symlink() {
                format!("link {}", hex::encode(fs::read_link(path)?.as_os_str().as_bytes()))
            } else if meta.is_dir() {
                "folder".to_owned()
            } else {
                hash(path).with_context(|| format!("read {}", path.display()))?
            };
            all.insert(path.strip_prefix(root)?.to_owned(), content);
            Ok(())
        })?;
        Ok(Manifest(all))
    }

    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.0.len()
    }

    /// Fails with the first difference.
    ///
    /// # Errors
    /// They differ.
    pub fn assert_equal(&self, other: &Manifest) -> Result<()> {
        let all = self.0.keys().chain(other.0.keys());
        let differing = all.filter(|path| self.0.get(*path) != other.0.get(*path)).collect::<Vec<_>>();
        let first = differing.first().map(|path| (path, self.0.get(*path), other.0.get(*path)));
        ensure!(first.is_none(), "{} entries differ, the first: {first:?}", differing.len());
        Ok(())
    }
}

fn hash(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut piece = vec![0; 1 << 18];
    loop {
        let bytes = file.read(&mut piece)?;
        if bytes == 0 {
            return Ok(hex::encode(digest.finalize()));
        }
        digest.update(&piece[..bytes]);
    }
}
