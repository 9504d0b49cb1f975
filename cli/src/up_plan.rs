//! What `up` runs, remembered in `DIR/up.toml`: so that a second `up` with the same DIR needs no other word.
//!
//! ```text
//! DIR/up.toml          this plan                    DIR/control.sock   control socket
//! DIR/up.lock          held while `up` runs
//! DIR/source/          the source's journal, identity, NBD sockets; NAME.img of --size
//! DIR/receiver/        the receiver's groups, identity, replicas
//! ```
//! Invariants: what is remembered is never changed by flags of a later run, apart from `--nbd-tcp`; a
//! conflict is refused with what to do. The file is replaced as a whole and durably.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::args::{DiskArg, UpArgs};
use crate::exit::Fault;
use crate::up_disk;

const FILE: &str = "up.toml";
const DEFAULT_GROUP: &str = "default";

/// What `up` runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The group that holds all volumes.
    pub group: String,
    /// The port that the receiver had last; only a wish.
    #[serde(default)]
    pub receiver_port: u16,
    /// NBD over TCP: the first volume's address, the others on the ports after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_tcp: Option<SocketAddr>,
    /// What is copied at first.
    #[serde(default)]
    pub sync: conf::SyncMode,
    /// The volumes.
    pub volume: Vec<PlannedVolume>,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedVolume {
    /// Its name.
    pub name: String,
    /// Of `--size`: a sparse file of our own. Otherwise `disk` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Of `--disk`: the operator's file or device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<PathBuf>,
}

impl Plan {
    /// The plan of this run: what is remembered in `dir`, or what the flags ask for. Nothing is written.
    ///
    /// # Errors
    /// No volume asked for, a disk that cannot be protected, flags that contradict what is remembered.
    pub fn resolve(args: &UpArgs, dir: &Path) -> Result<Plan> {
        let path = dir.join(FILE);
        let mut plan = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let plan = toml::from_str(&text).with_context(|| {
                    format!("read {} (it is written by `up`: restore it from a backup)", path.display())
                })?;
                agree(args, dir, plan)?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Plan::asked(args)?,
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        plan.nbd_tcp = args.nbd_tcp.or(plan.nbd_tcp);
        for disk in plan.volume.iter().filter_map(|volume| volume.disk.as_ref()) {
            up_disk::check(disk)?;
        }
        Ok(plan)
    }

    fn asked(args: &UpArgs) -> Result<Plan> {
        if args.disks.is_empty() {
            bail!(Fault::usage(format!(
                "{} protects nothing yet: give --size SIZE for a new disk or --disk PATH for one that exists",
                args.dir.display()
            )));
        }
        let names = names(&args.volume, args.disks.len())?;
        let volume = names
            .into_iter()
            .zip(&args.disks)
            .map(|(name, disk)| planned(name, disk, &args.dir))
            .collect::<Result<_>>()?;
        let group = args.group.clone().unwrap_or_else(|| DEFAULT_GROUP.into());
        Ok(Plan { group, receiver_port: 0, nbd_tcp: None, sync: args.sync.unwrap_or_default(), volume })
    }

    /// Remembers the plan; durable when this returns.
    pub fn store(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let text =
            format!("# Written by `afterimage up`.\n{}", toml::to_string(self).context("write the plan")?);
        let write = || -> std::io::Result<()> {
            let mut draft = tempfile::NamedTempFile::new_in(dir)?;
            draft.write_all(text.as_bytes())?;
            draft.as_file().sync_all()?;
            draft.persist(&path)?;
            std::fs::File::open(dir)?.sync_all()
        };
        write().with_context(|| format!("write {}", path.display()))
    }

    /// The source's settings.
    pub fn source(&self, dir: &Path, receiver: SocketAddr, identity: [u8; 32]) -> Result<conf::Replicator> {
        let home = source_dir(dir);
        let volumes = self.volume.iter().map(|volume| {
            let own = || home.join(format!("{}.img", volume.name));
            (volume.name.clone(), volume.disk.clone().unwrap_or_else(own), volume.size_bytes)
        });
        let mut settings = conf::Replicator::embedded(&home, &self.group, volumes, receiver, identity)?;
        settings.control = control_path(dir);
        // The default directory is root's.
        let user = rustix::process::geteuid();
        if !user.is_root() {
            let at_run_time =
                std::env::var_os("XDG_RUNTIME_DIR").map(|dir| Path::new(&dir).join("afterimage"));
            settings.ring_dir = user_ring_dir(at_run_time, user.as_raw());
        }
        for (volume, index) in settings.volume.iter_mut().zip(0u16..) {
            volume.sync = self.sync;
            volume.nbd_tcp = self.nbd_tcp.map(|first| tcp_address(first, index)).transpose()?;
        }
        Ok(settings)
    }

    /// The receiver's settings.
    pub fn receiver(&self, dir: &Path, listen: SocketAddr, source: [u8; 32]) -> Result<conf::Receiver> {
        let mut settings = conf::Receiver::embedded(&receiver_dir(dir), listen, source, &self.group)?;
        settings.control = control_path(dir);
        Ok(settings)
    }
}

fn is_tmpfs(dir: &Path) -> bool {
    const TMPFS_MAGIC: i128 = 0x0102_1994;
    rustix::fs::statfs(dir).is_ok_and(|found| i128::from(found.f_type) == TMPFS_MAGIC)
}

/// Where an ordinary user's rings live: below `XDG_RUNTIME_DIR`, unless that is missing or not in memory.
fn user_ring_dir(at_run_time: Option<PathBuf>, user: u32) -> PathBuf {
    at_run_time
        .filter(|dir| dir.is_absolute() && dir.parent().is_some_and(is_tmpfs))
        .unwrap_or_else(|| format!("/dev/shm/afterimage-{user}").into())
}

/// Where the source keeps its state.
pub fn source_dir(dir: &Path) -> PathBuf {
    dir.join("source")
}

/// Where the receiver keeps its state.
pub fn receiver_dir(dir: &Path) -> PathBuf {
    dir.join("receiver")
}

/// The control socket.
pub fn control_path(dir: &Path) -> PathBuf {
    dir.join("control.sock")
}

fn tcp_address(first: SocketAddr, index: u16) -> Result<SocketAddr> {
    let port = first.port().checked_add(index);
    let port =
        port.ok_or_else(|| Fault::usage(format!("--nbd-tcp {first}: no port is left for every volume")))?;
    Ok(SocketAddr::new(first.ip(), port))
}

/// One name for each volume.
fn names(given: &[String], volumes: usize) -> Result<Vec<String>> {
    let numbered = |stem: &str| (0..volumes).map(|number| format!("{stem}{number}")).collect();
    match given {
        [] => Ok(numbered("disk")),
        [one] if volumes > 1 => Ok(numbered(one)),
        each if each.len() == volumes => Ok(each.to_vec()),
        each => bail!(Fault::usage(format!(
            "{} names for {volumes} volumes: give --volume once for all, once for each, or not at all",
            each.len()
        ))),
    }
}

fn planned(name: String, disk: &DiskArg, dir: &Path) -> Result<PlannedVolume> {
    Ok(match disk {
        DiskArg::Size(bytes) => PlannedVolume { name, size_bytes: Some(*bytes), disk: None },
        DiskArg::Disk(path) => {
            let path = up_disk::find(path)?;
            up_disk::check_new(&path, dir)?;
            PlannedVolume { name, size_bytes: None, disk: Some(path) }
        }
    })
}

/// The remembered plan, if the flags do not contradict it.
fn agree(args: &UpArgs, dir: &Path, plan: Plan) -> Result<Plan> {
    let differ = |what: String| {
        Fault::usage(format!(
            "{what}: leave the flag out to continue with what {} protects, or choose another --dir",
            dir.display()
        ))
    };
    if let Some(group) = args.group.as_ref().filter(|group| **group != plan.group) {
        bail!(differ(format!("--group {group}, but this is group {}", plan.group)));
    }
    if !args.disks.is_empty() {
        let same = args.disks.len() == plan.volume.len()
            && args.disks.iter().zip(&plan.volume).all(|(asked, volume)| match asked {
                DiskArg::Size(bytes) => volume.size_bytes == Some(*bytes),
                DiskArg::Disk(path) => up_disk::find(path).is_ok_and(|path| volume.disk == Some(path)),
            });
        if !same {
            bail!(differ(format!("--size and --disk do not ask for {}", told(&plan.volume))));
        }
    }
    if let Some(sync) = args.sync.filter(|sync| *sync != plan.sync) {
        bail!(differ(format!(
            "--sync {}, but the first copy was of another kind",
            format!("{sync:?}").to_lowercase()
        )));
    }
    if !args.volume.is_empty() {
        let known: Vec<&String> = plan.volume.iter().map(|volume| &volume.name).collect();
        if names(&args.volume, known.len())?.iter().ne(known) {
            bail!(differ(format!("--volume does not name {}", told(&plan.volume))));
        }
    }
    Ok(plan)
}

fn told(volumes: &[PlannedVolume]) -> String {
    let each = volumes.iter().map(|volume| match (&volume.disk, volume.size_bytes) {
        (Some(disk), _) => format!("{} ({})", volume.name, disk.display()),
        (None, bytes) => format!("{} ({})", volume.name, conf::units::format_bytes(bytes.unwrap_or(0))),
    });
    each.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Kind;

    fn args(dir: &Path, disks: &[DiskArg], volume: &[&str]) -> UpArgs {
        UpArgs {
            dir: dir.to_owned(),
            size: vec![],
            disk: vec![],
            volume: volume.iter().map(|name| name.to_string()).collect(),
            group: None,
            nbd_tcp: None,
            sync: None,
            log_format: Default::default(),
            disks: disks.to_vec(),
        }
    }

    fn usage(result: Result<Plan>) -> String {
        let fault = Fault::of(&result.unwrap_err());
        assert_eq!(fault.kind, Kind::Usage, "{fault}");
        fault.message
    }

    #[test]
    fn names_are_numbered_given_or_refused() {
        let of = |given: &[&str], n| names(&given.iter().map(|g| g.to_string()).collect::<Vec<_>>(), n);
        assert_eq!(of(&[], 2).unwrap(), ["disk0", "disk1"]);
        assert_eq!(of(&["db"], 1).unwrap(), ["db"]);
        assert_eq!(of(&["db"], 2).unwrap(), ["db0", "db1"]);
        assert_eq!(of(&["a", "b"], 2).unwrap(), ["a", "b"]);
        assert!(of(&["a", "b"], 3).is_err());
    }

    #[test]
    fn a_second_run_continues_and_refuses_what_contradicts() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path();
        assert!(usage(Plan::resolve(&args(dir, &[], &[]), dir)).contains("--size SIZE"));
        let asked = args(dir, &[DiskArg::Size(1 << 20), DiskArg::Size(2 << 20)], &["db"]);
        let plan = Plan::resolve(&asked, dir).unwrap();
        plan.store(dir).unwrap();
        assert_eq!(Plan::resolve(&args(dir, &[], &[]), dir).unwrap(), plan);
        assert_eq!(Plan::resolve(&asked, dir).unwrap(), plan);
        let other = args(dir, &[DiskArg::Size(1 << 20)], &[]);
        assert!(usage(Plan::resolve(&other, dir)).contains("db0 (1MiB), db1 (2MiB)"));
        assert!(usage(Plan::resolve(&args(dir, &[], &["x"]), dir)).contains("--volume does not name db0"));
        let group = UpArgs { group: Some("x".into()), ..args(dir, &[], &[]) };
        assert!(usage(Plan::resolve(&group, dir)).contains("this is group default"));
    }

    #[test]
    fn settings_lie_under_dir() {
        let plan = Plan {
            group: "g".into(),
            receiver_port: 0,
            nbd_tcp: Some(([127, 0, 0, 1], 10809).into()),
            sync: conf::SyncMode::Allocated,
            volume: vec![
                PlannedVolume { name: "a".into(), size_bytes: Some(1 << 20), disk: None },
                PlannedVolume { name: "b".into(), size_bytes: None, disk: Some("/dev/b".into()) },
            ],
        };
        let settings = plan.source(Path::new("/d"), ([127, 0, 0, 1], 7878).into(), [1; 32]).unwrap();
        assert_eq!(settings.volume[0].path, Path::new("/d/source/a.img"));
        assert_eq!(settings.volume[0].size, Some(1 << 20));
        assert_eq!(settings.volume[1].path, Path::new("/dev/b"));
        assert_eq!(settings.volume[1].sync, conf::SyncMode::Allocated);
        assert_eq!(settings.volume[1].nbd_tcp, Some(([127, 0, 0, 1], 10810).into()));
        let settings = plan.receiver(Path::new("/d"), ([127, 0, 0, 1], 0).into(), [2; 32]).unwrap();
        assert!(settings.owns(&[2; 32], "g"));
        assert_eq!(settings.dir, Path::new("/d/receiver"));
    }
}
