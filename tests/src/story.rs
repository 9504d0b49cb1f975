//! A story: one end-to-end test with its own directory, its seed, its figures, and its daemons' last words if
//! it fails.

use std::cell::{Cell, RefCell};
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Lines of each log that a failed story prints.
const TAIL_LINES: usize = 40;

/// Where a story lives.
pub struct Home {
    dir: tempfile::TempDir,
    name: String,
    seed: u64,
    begun: Instant,
    figures: RefCell<Vec<String>>,
    is_told: Cell<bool>,
}

/// Runs a story; prints its seed first and its figures last, or the tails of its logs.
///
/// # Errors
/// The story's own.
pub fn story(name: &str, tell: impl FnOnce(&Home) -> Result<()>) -> Result<()> {
    let home = Home::new(name)?;
    tell(&home)?;
    home.is_told.set(true);
    Ok(())
}

impl Home {
    fn new(name: &str) -> Result<Home> {
        let parent = env::var_os("AFTERIMAGE_TEST_DIR").map_or_else(env::temp_dir, PathBuf::from);
        let mut builder = tempfile::Builder::new();
        // Short: the sockets below have at most 107 bytes.
        builder.prefix("afterimage-").disable_cleanup(env::var_os("AFTERIMAGE_KEEP").is_some());
        let dir = builder
            .tempdir_in(&parent)
            .with_context(|| format!("create a directory in {}", parent.display()))?;
        // PostgreSQL runs as another user on what is mounted here.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        fs::create_dir(dir.path().join("log"))?;
        let seed = match env::var("AFTERIMAGE_SEED") {
            Ok(text) => text.parse().context("AFTERIMAGE_SEED is a number")?,
            Err(_) => rand::random(),
        };
        println!(
            "{name}: seed {seed} (AFTERIMAGE_SEED={seed} repeats it), directory {}",
            dir.path().display()
        );
        Ok(Home {
            dir,
            name: name.to_owned(),
            seed,
            begun: Instant::now(),
            figures: RefCell::default(),
            is_told: Cell::new(false),
        })
    }

    /// A path in the story's directory.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where `name` logs to.
    pub fn log(&self, name: &str) -> PathBuf {
        self.path("log").join(format!("{name}.log"))
    }

    /// The story's randomness.
    pub fn rng(&self) -> StdRng {
        StdRng::seed_from_u64(self.seed)
    }

    /// The story's seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A figure for the end of the story, with the time at which it was known.
    pub fn figure(&self, text: impl Into<String>) {
        let text = format!("{:>6.1} s  {}", self.begun.elapsed().as_secs_f64(), text.into());
        println!("{}: {text}", self.name);
        self.figures.borrow_mut().push(text);
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let seconds = self.begun.elapsed().as_secs_f64();
        if self.is_told.get() {
            println!("{}: {} figures, {seconds:.1} s in all", self.name, self.figures.borrow().len());
            return;
        }
        println!("{}: FAILED after {seconds:.1} s, seed {}", self.name, self.seed);
        for entry in fs::read_dir(self.path("log")).into_iter().flatten().flatten() {
            let text = fs::read(entry.path()).unwrap_or_default();
            println!(
                "--- {}\n{}",
                entry.file_name().to_string_lossy(),
                tail(&String::from_utf8_lossy(&text))
            );
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
