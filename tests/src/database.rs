//! Databases on a protected disk: their shells, their commits, and the moments at which they are looked at.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rand::Rng;

use crate::control::Control;
use crate::nbd::{self, FuseDisk, Loop, Mount};
use crate::program::{need, run};
use crate::story::Home;
use crate::up::Up;

/// The group that `up` makes.
const GROUP: &str = "default";
/// Random moments that are restored.
const POINTS: usize = 20;

/// A commit, and the newest lsn once it had returned.
pub struct Commit {
    /// What it inserted.
    pub id: u64,
    /// Its insert, and all before it, are captured at this lsn.
    pub lsn: u64,
}

/// A shell of a database, one statement at a time: each is answered before the next.
pub struct Shell {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Shell {
    /// Starts the program.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Result<Shell> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Shell { child, stdin, stdout })
    }

    /// Runs statements whose last one prints `end`, and reads up to that line.
    ///
    /// # Errors
    /// The program ended instead: it has said why.
    pub fn run(&mut self, statements: &str, end: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("open until it is closed")?;
        writeln!(stdin, "{statements}")?;
        stdin.flush()?;
        let mut line = String::new();
        while line.trim() != end {
            line.clear();
            ensure!(self.stdout.read_line(&mut line)? > 0, "the database's shell ended at {statements}");
        }
        Ok(())
    }

    /// Ends its input, and so itself.
    ///
    /// # Errors
    /// It failed.
    pub fn close(mut self) -> Result<()> {
        self.stdin = None;
        ensure!(self.child.wait()?.success(), "the database's shell failed");
        Ok(())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A protected disk with ext4 on it, mounted.
pub struct Disk {
    mount: Mount,
    device: Loop,
    fuse: FuseDisk,
}

impl Disk {
    /// On the volume `disk`, mounted.
    ///
    /// # Errors
    /// A tool failed.
    pub fn make(home: &Home, up: &Up<'_>) -> Result<Disk> {
        need(&nbd::PROGRAMS)?;
        need(&["mkfs.ext4"])?;
        let fuse = FuseDisk::attach(home, &up.control.group()?.of_volume("disk", "nbd_uri")?)?;
        let device = Loop::attach(&fuse.path())?;
        run("mkfs.ext4", ["-q".as_ref(), device.path().as_os_str()])?;
        let mount = Mount::on(&home.path("live"), device.path(), "noatime")?;
        Ok(Disk { mount, device, fuse })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Takes all of it away; everything is flushed when this returns.
    ///
    /// # Errors
    /// It is in use.
    pub fn unmount(self) -> Result<()> {
        self.mount.unmount()?;
        drop(self.device);
        self.fuse.unmount()
    }
}

/// Commits up to `lsn` must be among `found`; returns how many.
///
/// # Errors
/// One is missing.
pub fn assert_holds(commits: &[Commit], lsn: u64, found: &[u64]) -> Result<usize> {
    let due: Vec<&Commit> = commits.iter().filter(|commit| commit.lsn <= lsn).collect();
    for commit in &due {
        ensure!(found.contains(&commit.id), "commit {} (lsn {}) is missing", commit.id, commit.lsn);
    }
    Ok(due.len())
}

/// Restores random moments of the commits and hands each mounted image to `check`, which counts the commits
/// due.
///
/// # Errors
/// Those of `check`, with the lsn.
pub fn at_random_points(
    home: &Home,
    control: &Control,
    commits: &[Commit],
    mut check: impl FnMut(&Path, u64) -> Result<usize>,
) -> Result<()> {
    let mut random = home.rng();
    let (first, last) = (commits.first().context("commits")?.lsn, commits.last().context("commits")?.lsn);
    let mut due = 0;
    for _ in 0..POINTS {
        let lsn = random.random_range(first..=last);
        let image = home.path("restored.img");
        control.restore(GROUP, &format!("lsn:{lsn}"), &image)?;
        let device = Loop::attach(&image)?;
        let mount = Mount::on(&home.path("past"), device.path(), "noatime")?;
        due += check(mount.path(), lsn).with_context(|| format!("lsn {lsn}"))?;
        mount.unmount()?;
    }
    home.figure(format!("{POINTS} random lsns from {first} to {last}: sound, with all of {due} commits due"));
    Ok(())
}

/// Numbers, as a query prints them.
///
/// # Errors
/// Something else is among them.
pub fn numbers(text: &str) -> Result<Vec<u64>> {
    text.split_whitespace()
        .map(|word| word.parse().with_context(|| format!("{word:?} is a number")))
        .collect()
}
