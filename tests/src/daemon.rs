//! Programs that stay: spawned with a log of their own, killed by their own pid, and gone when the story is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::control::poll;
use crate::program::plain_environment;
use crate::story::Home;

/// A graceful stop drains into the receiver first.
const STOP: Duration = Duration::from_secs(60);

/// A child process.
pub struct Daemon {
    name: String,
    child: Child,
    out: PathBuf,
}

impl Daemon {
    /// Starts `program`; it logs to `log/NAME.log`, and prints to `log/NAME.out`. Both are appended to.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start<S: AsRef<OsStr>>(
        home: &Home,
        name: &str,
        program: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Daemon> {
        let append = |path: &Path| {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("open {}", path.display()))
        };
        let out = home.path("log").join(format!("{name}.out"));
        let child = plain_environment(&mut Command::new(program))
            .args(args)
            .stdin(Stdio::null())
            .stdout(append(&out)?)
            .stderr(append(&home.log(name))?)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Daemon { name: name.to_owned(), child, out })
    }

    /// What it has printed so far.
    ///
    /// # Errors
    /// Its output cannot be read.
    pub fn printed(&self) -> Result<String> {
        fs::read_to_string(&self.out).with_context(|| format!("read {}", self.out.display()))
    }

    /// Fails if it has ended, so that nobody waits for a dead daemon's answer.
    ///
    /// # Errors
    /// It has ended.
    pub fn expect_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("{} ended by itself: {status}", self.name),
            None => Ok(()),
        }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.expect_alive()?;
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, then its end.
    ///
    /// # Errors
    /// It had ended before, or does not end.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.expect_alive()?;
        self.signal(Signal::TERM)?;
        poll(&format!("the end of {}", self.name), STOP, || Ok(self.child.try_wait()?))
    }

    /// Waits for an end that it comes to by itself.
    ///
    /// # Errors
    /// It does not come.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        poll(&format!("the end of {}", self.name), STOP, || Ok(self.child.try_wait()?))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// There is no such process.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a pid is positive")?;
        kill_process(pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Directories of the rings that it has mapped: they outlive it, by design, and take up memory.
    pub fn rings(&self) -> Vec<PathBuf> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap_or_default();
        let mapped = maps.lines().filter_map(|line| Some(&line[line.find("/dev/shm/")?..]));
        mapped.filter_map(|path| Path::new(path).parent().map(Path::to_owned)).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
