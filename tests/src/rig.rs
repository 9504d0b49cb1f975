//! `receive` and `replicate` with generated settings and identities, paired by hand.
//!
//! Invariant: both children are gone, and the ring is removed from memory, when the value is dropped.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::control::{Control, Group, poll};
use crate::daemon::Daemon;
use crate::nbd::Loop;
use crate::program::{afterimage, afterimage_path};
use crate::story::Home;

/// How long a start may take, with a synchronisation of everything.
const START: Duration = Duration::from_secs(60);

/// Until the group behind `control` is replicating and served; none of the daemons may end meanwhile.
pub(crate) fn until_served(control: &Control, daemons: &mut [&mut Daemon]) -> Result<Group> {
    let mut last = String::new();
    let look = || {
        daemons.iter_mut().try_for_each(|daemon| daemon.expect_alive())?;
        let group = control.group();
        last = group.as_ref().map_or_else(|error| format!("{error:#}"), |group| group.0.to_string());
        Ok(group.ok().filter(|group| group.state() == "replicating" && group.is_served()))
    };
    poll("replicating and served", START, look).with_context(|| format!("the group, last: {last}"))
}

/// What a [`Pair`] is made of.
#[derive(Default)]
pub struct PairSpec<'a> {
    /// Name and size of each volume.
    pub volumes: &'a [(&'a str, u64)],
    /// More of the source's settings, TOML sections.
    pub source: &'a str,
    /// More of the receiver's settings, TOML sections.
    pub receiver: &'a str,
    /// The receiver's directory, if not one of its own.
    pub receiver_dir: Option<PathBuf>,
    /// `NAME=VALUE` of the source's environment.
    pub source_environment: Vec<String>,
}

/// The group that a [`Pair`] replicates.
pub const GROUP: &str = "story";

/// `receive` and `replicate`, one group.
pub struct Pair<'a> {
    home: &'a Home,
    volumes: Vec<String>,
    receiver_dir: PathBuf,
    replicas: Vec<(String, PathBuf)>,
    ring_dir: PathBuf,
    source_environment: Vec<String>,
    receiver_daemon: Option<Daemon>,
    source_daemon: Option<Daemon>,
    /// Let go when the daemons are gone.
    devices: Vec<Loop>,
    /// The source's control socket.
    pub source: Control,
    /// The receiver's control socket.
    pub receiver: Control,
}

impl<'a> Pair<'a> {
    /// Writes settings and identities, starts both, and waits until the volumes are served.
    ///
    /// # Errors
    /// One of them does not come up.
    pub fn start(home: &'a Home, spec: &PairSpec<'_>) -> Result<Pair<'a>> {
        let mut pair = Pair::begin(home, spec)?;
        pair.until_served()?;
        Ok(pair)
    }

    /// As [`start`](Self::start), with each replica on a block device: a loop device over a file that holds
    /// something else.
    ///
    /// # Errors
    /// There is no loop device; as [`start`](Self::start).
    pub fn start_on_devices(home: &'a Home, spec: &PairSpec<'_>) -> Result<Pair<'a>> {
        let mut pair = Pair::begin_on_devices(home, spec)?;
        pair.until_served()?;
        Ok(pair)
    }

    /// As [`start_on_devices`](Self::start_on_devices), without waiting: what is to be synchronised is under
    /// way.
    ///
    /// # Errors
    /// There is no loop device; as [`start`](Self::start).
    pub fn begin_on_devices(home: &'a Home, spec: &PairSpec<'_>) -> Result<Pair<'a>> {
        let mut pair = Pair::prepare(home, spec, true)?;
        pair.start_receiver()?;
        pair.start_source()?;
        Ok(pair)
    }

    /// As [`start`](Self::start), without waiting: what is to be synchronised is under way.
    ///
    /// # Errors
    /// One of them cannot be started.
    pub fn begin(home: &'a Home, spec: &PairSpec<'_>) -> Result<Pair<'a>> {
        let mut pair = Pair::prepare(home, spec, false)?;
        pair.start_receiver()?;
        pair.start_source()?;
        Ok(pair)
    }

    fn prepare(home: &'a Home, spec: &PairSpec<'_>, on_devices: bool) -> Result<Pair<'a>> {
        let source_dir = home.path("source");
        let receiver_dir = spec.receiver_dir.clone().unwrap_or_else(|| home.path("receiver"));
        let new = |dir: &Path| -> Result<String> {
            fs::create_dir_all(dir)?;
            let done = afterimage(["identity", "new", "--dir", &dir.join("identity").to_string_lossy()])?
                .expect(0)?;
            Ok(done.stdout.trim().to_owned())
        };
        let (ours, theirs) = (new(&source_dir)?, new(&receiver_dir)?);
        // Free now; a daemon that is killed and started again must come back where it was.
        let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
        let ring_dir =
            PathBuf::from("/dev/shm").join(home.path("").file_name().context("a directory has a name")?);
        let mut text = format!(
            "group = \"{GROUP}\"\ndir = \"{}\"\nring_dir = \"{}\"\n[receiver]\naddress = \"127.0.0.1:{port}\"\nidentity = \"{theirs}\"\nreconnect_min = \"50ms\"\nreconnect_max = \"500ms\"\nheartbeat = \"250ms\"\nidle_timeout = \"2s\"\n",
            source_dir.display(),
            ring_dir.display(),
        );
        for (name, bytes) in spec.volumes {
            let path = source_dir.join(format!("{name}.img"));
            text +=
                &format!("[[volume]]\nname = \"{name}\"\npath = \"{}\"\nsize = {bytes}\n", path.display());
        }
        fs::write(home.path("source.toml"), text + spec.source)?;
        let mut devices = Vec::new();
        let (mut sections, mut replicas) = (String::new(), Vec::new());
        for (name, bytes) in spec.volumes.iter().filter(|_| on_devices) {
            let file = home.path(format!("{name}.device"));
            fs::write(&file, vec![0xa5; usize::try_from(*bytes)?])?;
            let device = Loop::attach(&file)?;
            sections += &format!(
                "[[replica]]\ngroup = \"{GROUP}\"\nvolume = \"{name}\"\npath = \"{}\"\n",
                device.path().display()
            );
            replicas.push(((*name).to_owned(), device.path().to_owned()));
            devices.push(device);
        }
        let text = format!(
            "dir = \"{}\"\nlisten = \"127.0.0.1:{port}\"\n[[source]]\nidentity = \"{ours}\"\ngroups = [\"{GROUP}\"]\n",
            receiver_dir.display()
        );
        fs::write(home.path("receiver.toml"), text + spec.receiver + &sections)?;
        Ok(Pair {
            home,
            volumes: spec.volumes.iter().map(|(name, _)| (*name).to_owned()).collect(),
            source: Control::new(source_dir.join("control.sock")),
            receiver: Control::new(receiver_dir.join("control.sock")),
            receiver_dir,
            replicas,
            ring_dir,
            source_environment: spec.source_environment.clone(),
            receiver_daemon: None,
            source_daemon: None,
            devices,
        })
    }

    fn spawn(&self, name: &str, command: &str) -> Result<Daemon> {
        let config = self.home.path(format!("{name}.toml"));
        let config = config.to_string_lossy();
        Daemon::start(self.home, name, &afterimage_path()?, [command, "--config", &config])
    }

    /// Starts the receiver; it is up a moment later.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_receiver(&mut self) -> Result<()> {
        self.receiver_daemon = Some(self.spawn("receiver", "receive")?);
        Ok(())
    }

    /// Starts the source; it is up a moment later.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_source(&mut self) -> Result<()> {
        self.source_daemon = Some(match self.source_environment.as_slice() {
            [] => self.spawn("source", "replicate")?,
            environment => {
                let (program, config) = (afterimage_path()?, self.home.path("source.toml"));
                let (program, config) = (program.to_string_lossy(), config.to_string_lossy());
                let command = [&*program, "replicate", "--config", &*config];
                let args = environment.iter().map(String::as_str).chain(command);
                Daemon::start(self.home, "source", Path::new("env"), args)?
            }
        });
        Ok(())
    }

    /// Waits until the group is replicating and its volumes are served.
    ///
    /// # Errors
    /// It does not come to that, or one of the two has ended.
    pub fn until_served(&mut self) -> Result<Group> {
        let source = self.source.clone();
        let both = [&mut self.source_daemon, &mut self.receiver_daemon];
        until_served(&source, &mut both.into_iter().flatten().collect::<Vec<_>>())
    }

    /// The receiver's process.
    ///
    /// # Errors
    /// It does not run.
    pub fn receiver_daemon(&mut self) -> Result<&mut Daemon> {
        self.receiver_daemon.as_mut().context("the receiver does not run")
    }

    /// The source's process.
    ///
    /// # Errors
    /// It does not run.
    pub fn source_daemon(&mut self) -> Result<&mut Daemon> {
        self.source_daemon.as_mut().context("the source does not run")
    }

    /// Takes the ring away, as a reboot does. The source must not run.
    ///
    /// # Errors
    /// There is none.
    pub fn lose_ring(&self) -> Result<()> {
        fs::remove_dir_all(&self.ring_dir).with_context(|| format!("remove {}", self.ring_dir.display()))
    }

    /// The directory of the source's rings.
    pub fn ring_dir(&self) -> &Path {
        &self.ring_dir
    }

    /// Where a volume lies at the source.
    pub fn backing(&self, volume: &str) -> PathBuf {
        self.home.path("source").join(format!("{volume}.img"))
    }

    /// Where all volumes lie at the source, in order.
    pub fn backings(&self) -> Vec<PathBuf> {
        self.volumes.iter().map(|volume| self.backing(volume)).collect()
    }

    /// The settings put a volume's replica elsewhere.
    pub fn replica_at(&mut self, volume: &str, path: &Path) {
        self.replicas.push((volume.to_owned(), path.to_owned()));
    }

    /// Where a volume's replica lies.
    pub fn replica(&self, volume: &str) -> PathBuf {
        if let Some((_, path)) = self.replicas.iter().find(|(name, _)| name == volume) {
            return path.clone();
        }
        self.receiver_dir.join("replica").join(GROUP).join(format!("{volume}.img"))
    }

    /// The group's directory at the receiver.
    pub fn group_dir(&self) -> PathBuf {
        self.receiver_dir.join("groups").join(GROUP)
    }

    /// NBD sockets of all volumes, in order.
    pub fn sockets(&self) -> Vec<(PathBuf, String)> {
        let socket =
            |name: &String| (self.home.path("source").join(format!("{name}.nbd.sock")), name.clone());
        self.volumes.iter().map(socket).collect()
    }

    /// Restores all volumes to a point; where each then lies, in order.
    ///
    /// # Errors
    /// The restore failed.
    pub fn restore(&self, at: &str, to: &Path) -> Result<Vec<PathBuf>> {
        self.receiver.restore(GROUP, at, to)?;
        Ok(self.restored(to))
    }

    /// Where each volume lies after a restore to `to`.
    pub fn restored(&self, to: &Path) -> Vec<PathBuf> {
        match self.volumes.as_slice() {
            [_] => vec![to.to_owned()],
            all => all.iter().map(|name| to.join(format!("{name}.img"))).collect(),
        }
    }

    /// Everything captured is on the replica, and replica and source are equal, byte for byte. Nobody may
    /// write.
    ///
    /// # Errors
    /// They are not.
    pub fn assert_replica_equals_source(&self) -> Result<()> {
        self.source.wait()?;
        for volume in &self.volumes {
            crate::image::assert_equal(&self.backing(volume), &self.replica(volume))?;
        }
        Ok(())
    }
}

impl Drop for Pair<'_> {
    fn drop(&mut self) {
        self.source_daemon = None;
        self.receiver_daemon = None;
        self.devices.clear();
        let _ = fs::remove_dir_all(&self.ring_dir);
    }
}
