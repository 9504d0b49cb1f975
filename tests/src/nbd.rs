//! Block devices as an administrator would make them: nbdfuse over an NBD URI, a loop device over that, a
//! file system mounted from it. Each takes itself away when it is dropped, so they are held in that order.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::control::poll;
use crate::daemon::Daemon;
use crate::program::run;
use crate::story::Home;

/// What these need.
pub const PROGRAMS: [&str; 5] = ["nbdfuse", "fusermount3", "losetup", "mount", "umount"];

/// How long the kernel may take to let go of something.
const RELEASE: Duration = Duration::from_secs(30);

/// An NBD export as a file, by nbdfuse.
pub struct FuseDisk {
    folder: PathBuf,
    daemon: Option<Daemon>,
}

impl FuseDisk {
    /// Mounts `uri` at `folder/disk`.
    ///
    /// # Errors
    /// nbdfuse does not come up.
    pub fn attach(home: &Home, uri: &str) -> Result<FuseDisk> {
        let folder = home.path("fuse");
        fs::create_dir_all(&folder)?;
        let target = folder.join("disk");
        let args = [target.to_string_lossy().into_owned(), uri.to_owned()];
        let mut disk =
            FuseDisk { daemon: Some(Daemon::start(home, "nbdfuse", Path::new("nbdfuse"), args)?), folder };
        poll("nbdfuse", RELEASE, || {
            disk.daemon.as_mut().context("nbdfuse runs")?.expect_alive()?;
            Ok(target.exists().then_some(()))
        })?;
        Ok(disk)
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Sends its server a signal: stopped, nothing that asks the file is answered.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.daemon.as_ref().context("nbdfuse runs")?.signal(signal)
    }

    /// Unmounts; everything has been flushed when this returns.
    ///
    /// # Errors
    /// It is still in use.
    pub fn unmount(mut self) -> Result<()> {
        self.release()
    }

    fn release(&mut self) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        let folder = self.folder.clone();
        let unmounted = poll("nbdfuse to be free", RELEASE, || {
            Ok(run("fusermount3", ["-u".as_ref(), folder.as_os_str()]).ok())
        });
        unmounted?;
        daemon.ended()?;
        Ok(())
    }
}

impl Drop for FuseDisk {
    fn drop(&mut self) {
        if self.release().is_err() {
            let _ = run("umount", ["-l".as_ref(), self.folder.as_os_str()]);
        }
    }
}

/// A loop device.
pub struct Loop(PathBuf);

impl Loop {
    /// Over a file.
    ///
    /// # Errors
    /// There is no loop device.
    pub fn attach(file: &Path) -> Result<Loop> {
        let device = run("losetup", ["--find".as_ref(), "--show".as_ref(), file.as_os_str()])?;
        Ok(Loop(PathBuf::from(device)))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let name = self.0.file_name().unwrap_or_default().to_owned();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        let _ = run("losetup", ["-d".as_ref(), self.0.as_os_str()]);
        // The kernel may do it later, when the last opener (udev, blkid) has gone.
        let _ = poll("the loop device to be free", RELEASE, || Ok((!backing.exists()).then_some(())));
    }
}

/// A mounted file system.
pub struct Mount {
    place: PathBuf,
    is_mounted: bool,
}

impl Mount {
    /// Mounts `device` at `place`, which is made if it is absent.
    ///
    /// # Errors
    /// mount(8) refused.
    pub fn on(place: &Path, device: &Path, options: &str) -> Result<Mount> {
        fs::create_dir_all(place)?;
        run("mount", ["-o".as_ref(), options.as_ref(), device.as_os_str(), place.as_os_str()])?;
        Ok(Mount { place: place.to_owned(), is_mounted: true })
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.place
    }

    /// Unmounts.
    ///
    /// # Errors
    /// It is in use.
    pub fn unmount(mut self) -> Result<()> {
        // A writer that was killed lets go when its last write is over.
        poll("the mount to be free", RELEASE, || Ok(run("umount", [self.place.as_os_str()]).ok()))?;
        self.is_mounted = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.is_mounted {
            return;
        }
        // Whoever uses it (a daemon of the story) is about to go.
        let freed =
            poll("the mount to be free", RELEASE, || Ok(run("umount", [self.place.as_os_str()]).ok()));
        if freed.is_err() {
            let _ = run("umount", ["-l".as_ref(), self.place.as_os_str()]);
        }
    }
}
