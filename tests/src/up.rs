//! `afterimage up`: both sides in one process.
//!
//! Invariant: the process is gone, and its ring removed from memory, when the value is dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use anyhow::{Context, Result};

use crate::control::{Control, Group};
use crate::daemon::Daemon;
use crate::program::afterimage_path;
use crate::rig::until_served;
use crate::story::Home;

/// `afterimage up` on its own directory.
pub struct Up<'a> {
    home: &'a Home,
    dir: PathBuf,
    daemon: Option<Daemon>,
    rings: Vec<PathBuf>,
    /// Its control socket.
    pub control: Control,
}

impl<'a> Up<'a> {
    /// Starts `up --dir DIR ARGS…` and waits until its volumes are served.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(home: &'a Home, args: &[&str]) -> Result<Up<'a>> {
        let dir = home.path("up");
        let control = Control::new(dir.join("control.sock"));
        let mut up = Up { home, dir, daemon: None, rings: Vec::new(), control };
        up.again(args)?;
        Ok(up)
    }

    /// Starts it again on the same directory.
    ///
    /// # Errors
    /// It does not come up.
    pub fn again(&mut self, args: &[&str]) -> Result<Group> {
        let dir = self.dir.to_string_lossy();
        let line = ["up", "--dir", &dir].into_iter().chain(args.iter().copied());
        self.daemon = Some(Daemon::start(self.home, "up", &afterimage_path()?, line)?);
        let control = self.control.clone();
        until_served(&control, &mut [self.daemon()?])
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The process.
    ///
    /// # Errors
    /// It does not run.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("`up` does not run")
    }

    /// SIGTERM and its end.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let ended = self.daemon()?.stop()?;
        self.daemon = None;
        Ok(ended)
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.rings = self.daemon()?.rings();
        self.daemon()?.kill()?;
        self.daemon = None;
        Ok(())
    }
}

impl Drop for Up<'_> {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            self.rings.extend(daemon.rings());
        }
        for ring in &self.rings {
            let _ = fs::remove_dir_all(ring);
        }
    }
}
