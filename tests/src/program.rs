//! Programs that end: `afterimage` commands and the system's tools.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};

/// How a program ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub line: String,
    /// Exit code; -1 where a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Outcome {
    /// The outcome, if it ended with `code`.
    ///
    /// # Errors
    /// It ended otherwise: line, code and output are told.
    pub fn expect(self, code: i32) -> Result<Outcome> {
        ensure!(self.code == code, "{self}\nexpected exit code {code}");
        Ok(self)
    }

    /// The outcome, if it ended with `code` and said `part` on either stream.
    ///
    /// # Errors
    /// It did not.
    pub fn expect_saying(self, code: i32, part: &str) -> Result<Outcome> {
        let outcome = self.expect(code)?;
        let said = outcome.stderr.contains(part) || outcome.stdout.contains(part);
        ensure!(said, "{outcome}\nexpected it to say {part:?}");
        Ok(outcome)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ended with {}\n{}{}", self.line, self.code, self.stdout, self.stderr)
    }
}

/// The binary under test: the one of the stories' own profile, and never one without optimisations.
///
/// # Errors
/// It has not been built.
pub fn afterimage_path() -> Result<PathBuf> {
    let story = env::current_exe().context("which program is this?")?;
    let own = story.ancestors().nth(2).filter(|profile| !profile.ends_with("debug"));
    let release = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release");
    let built = own.unwrap_or(&release).join("afterimage");
    let path = env::var_os("AFTERIMAGE_BIN").map_or(built, PathBuf::from);
    path.canonicalize()
        .with_context(|| format!("{}: run `cargo build --release -p afterimage` first", path.display()))
}

/// Runs `afterimage` to its end, whatever its exit code.
///
/// # Errors
/// It cannot be started.
pub fn afterimage<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Outcome> {
    outcome(plain_environment(&mut Command::new(afterimage_path()?)).args(args))
}

/// Takes the stories' own variables away: the daemons refuse settings that they do not know.
pub fn plain_environment(command: &mut Command) -> &mut Command {
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("AFTERIMAGE_") && name != "AFTERIMAGE_LOG" {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command to its end, whatever its exit code.
///
/// # Errors
/// It cannot be started: what to install is told.
pub fn outcome(command: &mut Command) -> Result<Outcome> {
    let line = format!("{command:?}").replace('"', "");
    let Output { status, stdout, stderr } = command.output().map_err(|error| {
        let program = command.get_program().to_string_lossy().into_owned();
        anyhow::Error::new(error).context(format!("start {program}{}", advice(&program)))
    })?;
    Ok(Outcome {
        line,
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    })
}

/// Runs a program that must succeed; what it printed, trimmed.
///
/// # Errors
/// It cannot be started, or failed.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<String> {
    let done = outcome(Command::new(program).args(args))?.expect(0)?;
    Ok(done.stdout.trim().to_owned())
}

/// Fails the story at once where a program is missing, rather than after minutes.
///
/// # Errors
/// One is missing: what to install is told.
pub fn need(programs: &[&str]) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this story mounts file systems: run it as root");
    for program in programs {
        let folders = env::var_os("PATH").unwrap_or_default();
        let is_there = env::split_paths(&folders).any(|folder| folder.join(program).exists());
        if !is_there {
            bail!("{program} is missing{}", advice(program));
        }
    }
    Ok(())
}

fn advice(program: &str) -> String {
    let package = match program {
        "nbdfuse" => "libnbd-bin",
        "fusermount3" => "fuse3",
        "mkfs.xfs" | "xfs_repair" => "xfsprogs",
        "mkfs.btrfs" | "btrfs" => "btrfs-progs",
        "mkfs.ext4" | "e2fsck" => "e2fsprogs",
        "losetup" | "mount" | "umount" | "fstrim" | "runuser" => "util-linux",
        "sqlite3" => "sqlite3",
        "curl" => "curl",
        "psql" | "pgbench" => "postgresql",
        _ => return String::new(),
    };
    format!(" (install it: apt-get install {package})")
}
