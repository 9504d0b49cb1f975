//! Settings of the source daemon, `afterimage replicate`.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::compression::Compression;
use crate::error::{Error, Refused, require};
use crate::quic::Quic;
use crate::{names, units};

/// Everything that the source daemon is told. Paths are absolute; values are within their ranges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replicator {
    /// Name of the group: the volumes that share one write order.
    pub group: String,
    /// State directory: journal, control file, identity, sockets.
    pub dir: PathBuf,
    /// Where rings live. A tmpfs, so that they outlive the process and not the machine.
    pub ring_dir: PathBuf,
    /// Control socket.
    pub control: PathBuf,
    /// Directory of this side's key and certificate.
    pub identity_dir: PathBuf,
    /// The receiving side.
    pub receiver: Peer,
    /// What captures the group's writes.
    pub capture: Capture,
    /// The volumes of the group, at least one.
    pub volume: Vec<Volume>,
    /// The NBD front.
    pub nbd: Nbd,
    /// The shared ring.
    pub ring: Ring,
    /// The source journal.
    pub journal: Journal,
    /// Synchronisation.
    pub resync: Resync,
    /// Capture by the kernel module.
    pub kfilter: Kfilter,
    /// The wire.
    pub quic: Quic,
}

/// `capture`: what sees the writes. One for a group, since its volumes share one ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum Capture {
    /// The NBD front: clients connect to the agent, which serves a file or device.
    #[default]
    Nbd,
    /// The kernel module: a device in use, without its users noticing.
    Kfilter,
}

/// `[receiver]`: where frames go, and how patiently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// `host:port`, resolved again at each attempt.
    pub address: String,
    /// SHA-256 of the receiver's certificate; nobody else is spoken to.
    #[serde(serialize_with = "units::hex32")]
    pub identity: [u8; 32],
    /// How long one attempt may take.
    #[serde(with = "units::duration")]
    pub connect_timeout: Duration,
    /// First pause after a failed attempt; doubled at each further one.
    #[serde(with = "units::duration")]
    pub reconnect_min: Duration,
    /// Longest pause.
    #[serde(with = "units::duration")]
    pub reconnect_max: Duration,
    /// Interval of heartbeats.
    #[serde(with = "units::duration")]
    pub heartbeat: Duration,
    /// Silence after which the connection counts as lost.
    #[serde(with = "units::duration")]
    pub idle_timeout: Duration,
}

/// One `[[volume]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Its name, unique in the group; also its NBD export name.
    pub name: String,
    /// The file or block device that holds it; the device where the kernel module captures.
    pub path: PathBuf,
    /// The block device that the kernel module captures; only with `capture = "kfilter"`.
    pub device: Option<PathBuf>,
    /// When `path` does not exist, a sparse file of this many bytes is made.
    #[serde(with = "units::bytes_option")]
    pub size: Option<u64>,
    /// Unix socket of its NBD front.
    pub nbd: PathBuf,
    /// TCP address of its NBD front, if it has one. NBD has no authentication.
    pub nbd_tcp: Option<SocketAddr>,
    /// What is copied at first.
    pub sync: SyncMode,
}

/// `sync`: what of a volume is copied when all of it has to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum SyncMode {
    /// Every byte.
    #[default]
    All,
    /// What its file system has allocated, where that can be known exactly.
    Allocated,
}

/// `[nbd]`: limits of the NBD front.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nbd {
    /// Clients at once, for each volume.
    #[serde(deserialize_with = "units::count")]
    pub max_connections: u32,
    /// Threads that do the backing store's I/O.
    #[serde(deserialize_with = "units::count")]
    pub threads: u32,
}

/// `[ring]`: the queue between writers and the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ring {
    /// Size, a power of two.
    #[serde(with = "units::bytes")]
    pub bytes: u64,
}

/// `[journal]`: the source's store and forward buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Journal {
    /// Bytes on disk; beyond, writes become dirty bits and the group is `degraded`.
    #[serde(with = "units::bytes")]
    pub quota: u64,
    /// Size of one segment file.
    #[serde(with = "units::bytes")]
    pub segment_bytes: u64,
    /// How frames are packed.
    pub compression: Compression,
    /// Threads that pack frames.
    #[serde(deserialize_with = "units::count")]
    pub compress_threads: u32,
    /// A frame is closed at this many raw bytes.
    #[serde(with = "units::bytes")]
    pub max_batch_bytes: u64,
    /// A frame is closed when its first record is this old.
    #[serde(with = "units::duration")]
    pub max_batch_delay: Duration,
    /// Pack less as the ring fills.
    #[serde(deserialize_with = "units::flag")]
    pub adaptive: bool,
}

/// `[resync]`: how content is copied, at first and after gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resync {
    /// Bits per second read for it at most; 0, written "none", is no limit.
    #[serde(with = "units::rate_or_none")]
    pub rate: u64,
}

/// `[kfilter]`: capture by the kernel module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kfilter {
    /// What a clean stop does with captured devices.
    pub on_stop: OnStop,
}

/// `kfilter.on_stop`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum OnStop {
    /// Detach when the machine shuts down and nobody uses the device any more, else keep.
    #[default]
    Auto,
    /// The kernel captures on; the next start takes over.
    Keep,
    /// Detach, with a clean mark: whoever writes to the device until the next start is not noticed.
    Detach,
}

impl TryFrom<String> for Capture {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        match text.as_str() {
            "nbd" => Ok(Capture::Nbd),
            "kfilter" => Ok(Capture::Kfilter),
            _ => Err("\"nbd\" or \"kfilter\" is allowed"),
        }
    }
}

impl TryFrom<String> for SyncMode {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        match text.as_str() {
            "all" => Ok(SyncMode::All),
            "allocated" => Ok(SyncMode::Allocated),
            _ => Err("\"all\" or \"allocated\" is allowed"),
        }
    }
}

impl TryFrom<String> for OnStop {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        match text.as_str() {
            "auto" => Ok(OnStop::Auto),
            "keep" => Ok(OnStop::Keep),
            "detach" => Ok(OnStop::Detach),
            _ => Err("\"auto\", \"keep\" or \"detach\" is allowed"),
        }
    }
}

impl Default for Nbd {
    fn default() -> Self {
        Nbd { max_connections: 16, threads: 4 }
    }
}

impl Default for Ring {
    fn default() -> Self {
        Ring { bytes: 64 << 20 }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Journal {
            quota: 10 << 30,
            segment_bytes: 64 << 20,
            compression: Compression::Zstd(1),
            compress_threads: 1,
            max_batch_bytes: 1 << 20,
            max_batch_delay: Duration::from_millis(20),
            adaptive: true,
        }
    }
}

/// Where rings live unless told otherwise. Where it is not in memory, as in most containers, the agent takes
/// /dev/shm/afterimage.
pub const RING_DIR: &str = "/run/afterimage";

/// What serde reads: as in the file, nothing checked yet.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Raw {
    group: Option<String>,
    dir: Option<PathBuf>,
    ring_dir: Option<PathBuf>,
    control: Option<PathBuf>,
    identity_dir: Option<PathBuf>,
    capture: Capture,
    receiver: RawPeer,
    volume: Vec<RawVolume>,
    nbd: Nbd,
    ring: Ring,
    journal: Journal,
    resync: Resync,
    kfilter: Kfilter,
    quic: Quic,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawPeer {
    address: Option<String>,
    identity: Option<String>,
    #[serde(with = "units::duration")]
    connect_timeout: Duration,
    #[serde(with = "units::duration")]
    reconnect_min: Duration,
    #[serde(with = "units::duration")]
    reconnect_max: Duration,
    #[serde(with = "units::duration")]
    heartbeat: Duration,
    #[serde(with = "units::duration")]
    idle_timeout: Duration,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawVolume {
    name: Option<String>,
    path: Option<PathBuf>,
    device: Option<PathBuf>,
    #[serde(with = "units::bytes_option")]
    size: Option<u64>,
    nbd: Option<PathBuf>,
    nbd_tcp: Option<String>,
    sync: SyncMode,
}

impl Default for RawPeer {
    fn default() -> Self {
        RawPeer {
            address: None,
            identity: None,
            connect_timeout: Duration::from_secs(10),
            reconnect_min: Duration::from_millis(200),
            reconnect_max: Duration::from_secs(30),
            heartbeat: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(10),
        }
    }
}

impl TryFrom<Raw> for Replicator {
    type Error = Refused;

    fn try_from(raw: Raw) -> Result<Self, Refused> {
        let dir = names::required_path("dir", raw.dir)?;
        raw.nbd.check()?;
        raw.ring.check()?;
        raw.journal.check()?;
        raw.quic.check()?;
        Ok(Replicator {
            group: names::name("group", raw.group)?,
            ring_dir: names::absolute("ring_dir", raw.ring_dir.unwrap_or_else(|| RING_DIR.into()))?,
            control: names::path_or("control", raw.control, &dir, "control.sock")?,
            identity_dir: names::path_or("identity_dir", raw.identity_dir, &dir, "identity")?,
            receiver: raw.receiver.try_into()?,
            capture: raw.capture,
            volume: volumes(raw.volume, raw.capture, &dir)?,
            dir,
            nbd: raw.nbd,
            ring: raw.ring,
            journal: raw.journal,
            resync: raw.resync,
            kfilter: raw.kfilter,
            quic: raw.quic,
        })
    }
}

impl TryFrom<RawPeer> for Peer {
    type Error = Refused;

    fn try_from(raw: RawPeer) -> Result<Self, Refused> {
        let positive = |key, d: Duration| {
            require(!d.is_zero() && d <= HOUR, key, "more than 0 and at most 1h is allowed")
        };
        positive("receiver.connect_timeout", raw.connect_timeout)?;
        positive("receiver.reconnect_min", raw.reconnect_min)?;
        positive("receiver.reconnect_max", raw.reconnect_max)?;
        positive("receiver.heartbeat", raw.heartbeat)?;
        positive("receiver.idle_timeout", raw.idle_timeout)?;
        let ordered = raw.reconnect_min <= raw.reconnect_max;
        require(ordered, "receiver.reconnect_min", "at most receiver.reconnect_max is allowed")?;
        // One lost heartbeat must not look like a lost receiver.
        let patient = raw.idle_timeout >= 2 * raw.heartbeat;
        require(patient, "receiver.idle_timeout", "at least twice receiver.heartbeat is allowed")?;
        Ok(Peer {
            address: names::host_port("receiver.address", raw.address)?,
            identity: names::identity("receiver.identity", raw.identity)?,
            connect_timeout: raw.connect_timeout,
            reconnect_min: raw.reconnect_min,
            reconnect_max: raw.reconnect_max,
            heartbeat: raw.heartbeat,
            idle_timeout: raw.idle_timeout,
        })
    }
}

const HOUR: Duration = Duration::from_secs(3600);

/// Volumes of one group, as the receiver bounds them too (`journal::record::MAX_VOLUMES`).
const MAX_VOLUMES: usize = 64;

fn volumes(raw: Vec<RawVolume>, capture: Capture, dir: &Path) -> Result<Vec<Volume>, Refused> {
    if raw.is_empty() {
        return Err(Refused::missing("volume", "at least one [[volume]] with name and path is required"));
    }
    require(raw.len() <= MAX_VOLUMES, "volume", &format!("a group may have {MAX_VOLUMES} volumes"))?;
    let (mut names, mut paths, mut sockets) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut volumes = Vec::with_capacity(raw.len());
    for (i, raw) in raw.into_iter().enumerate() {
        let key = |field| format!("volume[{i}].{field}");
        let name = names::name(&key("name"), raw.name.clone())?;
        let path = disk(&key, &raw, capture)?;
        let nbd_tcp = raw.nbd_tcp.map(|text| names::ip_port(&key("nbd_tcp"), &text)).transpose()?;
        let volume = Volume {
            path,
            device: raw.device,
            size: raw.size,
            nbd: names::path_or(&key("nbd"), raw.nbd, dir, &format!("{name}.nbd.sock"))?,
            nbd_tcp,
            sync: raw.sync,
            name,
        };
        require(names.insert(volume.name.clone()), &key("name"), "each volume needs its own name")?;
        let own = if volume.device.is_some() { "device" } else { "path" };
        require(paths.insert(volume.path.clone()), &key(own), "each volume needs its own disk")?;
        require(sockets.insert(volume.nbd.clone()), &key("nbd"), "each volume needs its own socket")?;
        let sectors = volume.size.is_none_or(|size| size > 0 && size.is_multiple_of(512));
        require(sectors, &key("size"), "a multiple of 512 bytes above 0 is allowed")?;
        volumes.push(volume);
    }
    Ok(volumes)
}

/// Where a volume lies: `path` behind the NBD front, `device` under the kernel module, never both.
fn disk(
    key: &impl Fn(&'static str) -> String,
    raw: &RawVolume,
    capture: Capture,
) -> Result<PathBuf, Refused> {
    match capture {
        Capture::Nbd => {
            let why = "only with capture = \"kfilter\"; the NBD front serves a `path`";
            require(raw.device.is_none(), &key("device"), why)?;
            names::required_path(&key("path"), raw.path.clone())
        }
        Capture::Kfilter => {
            let why = "only with capture = \"nbd\"; the kernel module captures a `device`";
            require(raw.path.is_none(), &key("path"), why)?;
            require(raw.size.is_none(), &key("size"), why)?;
            require(raw.nbd.is_none(), &key("nbd"), why)?;
            require(raw.nbd_tcp.is_none(), &key("nbd_tcp"), why)?;
            names::required_path(&key("device"), raw.device.clone())
        }
    }
}

impl Nbd {
    fn check(&self) -> Result<(), Refused> {
        require((1..=1024).contains(&self.max_connections), "nbd.max_connections", "1 to 1024 is allowed")?;
        require((1..=64).contains(&self.threads), "nbd.threads", "1 to 64 is allowed")
    }
}

impl Ring {
    /// The smallest: sixteen records of the longest payload, 128 KiB, twice. Below, every burst would
    /// overflow.
    pub const LEAST_BYTES: u64 = 4 << 20;

    fn check(&self) -> Result<(), Refused> {
        let good = self.bytes.is_power_of_two() && (Ring::LEAST_BYTES..=4 << 30).contains(&self.bytes);
        require(good, "ring.bytes", "a power of two from 4MiB to 4GiB is allowed")
    }
}

impl Journal {
    fn check(&self) -> Result<(), Refused> {
        check_segment_bytes(self.segment_bytes)?;
        let room = self.quota >= 4 * self.segment_bytes;
        require(room, "journal.quota", "at least 4 times journal.segment_bytes is allowed")?;
        require((1..=64).contains(&self.compress_threads), "journal.compress_threads", "1 to 64 is allowed")?;
        // The format's own limit is 1 MiB raw; the longest record must fit.
        let batch = (256 << 10..=1 << 20).contains(&self.max_batch_bytes);
        require(batch, "journal.max_batch_bytes", "256KiB to 1MiB is allowed")?;
        let delay = (Duration::from_millis(1)..=Duration::from_secs(10)).contains(&self.max_batch_delay);
        require(delay, "journal.max_batch_delay", "1ms to 10s is allowed")
    }
}

/// A segment holds several of the largest frames (1 MiB and a header each).
pub(crate) fn check_segment_bytes(bytes: u64) -> Result<(), Refused> {
    let good = bytes.is_multiple_of(4096) && (4 << 20..=1 << 30).contains(&bytes);
    require(good, "journal.segment_bytes", "a multiple of 4096 bytes from 4MiB to 1GiB is allowed")
}

impl Replicator {
    /// Settings without a file, all else at its default: what `afterimage up` runs its source side with. A
    /// relative path counts from the working directory.
    ///
    /// # Errors
    /// The same as for a file: a bad name, address, or a name or path given twice.
    pub fn embedded(
        dir: &Path,
        group: &str,
        volumes: impl IntoIterator<Item = (String, PathBuf, Option<u64>)>,
        receiver: SocketAddr,
        identity: [u8; 32],
    ) -> Result<Self, Error> {
        let volume = |(name, path, size): (String, PathBuf, Option<u64>)| RawVolume {
            name: Some(name),
            path: Some(std::path::absolute(&path).unwrap_or(path)),
            size,
            ..RawVolume::default()
        };
        let raw = Raw {
            group: Some(group.to_owned()),
            dir: Some(std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned())),
            receiver: RawPeer {
                address: Some(receiver.to_string()),
                identity: Some(units::format_hex32(&identity)),
                ..RawPeer::default()
            },
            volume: volumes.into_iter().map(volume).collect(),
            ..Raw::default()
        };
        Replicator::try_from(raw).map_err(Refused::embedded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn embedded(volumes: &[(&str, &str)]) -> Result<Replicator, Error> {
        let volumes =
            volumes.iter().map(|(name, path)| (name.to_string(), PathBuf::from(path), Some(1 << 20)));
        Replicator::embedded(Path::new("/var/x"), "g", volumes, ([127, 0, 0, 1], 7878).into(), [7; 32])
    }

    #[test]
    fn embedded_settings_derive_their_paths_from_dir() {
        let settings = embedded(&[("v", "/disk")]).unwrap();
        assert_eq!(settings.control, Path::new("/var/x/control.sock"));
        assert_eq!(settings.identity_dir, Path::new("/var/x/identity"));
        assert_eq!(settings.volume[0].nbd, Path::new("/var/x/v.nbd.sock"));
        assert_eq!(settings.receiver.address, "127.0.0.1:7878");
        assert_eq!(settings.receiver.identity, [7; 32]);
        assert_eq!(settings.journal, Journal::default());
    }

    #[test]
    fn volumes_must_differ() {
        assert!(embedded(&[]).is_err());
        assert_eq!(embedded(&[("v", "/a"), ("v", "/b")]).unwrap_err().at.key, "volume[1].name");
        assert_eq!(embedded(&[("v", "/a"), ("w", "/a")]).unwrap_err().at.key, "volume[1].path");
        assert!(embedded(&[("v", "/a"), ("w", "/b")]).is_ok());
    }

    #[test]
    fn a_volume_has_a_path_or_a_device_as_its_capture_wants() {
        let refused = |capture, path: Option<&str>, device: Option<&str>, nbd: Option<&str>| {
            let raw = RawVolume {
                name: Some("v".into()),
                path: path.map(Into::into),
                device: device.map(Into::into),
                nbd: nbd.map(Into::into),
                ..RawVolume::default()
            };
            volumes(vec![raw], capture, Path::new("/d"))
                .map_err(|refused| refused.key)
                .map(|mut all| all.remove(0).path)
        };
        assert_eq!(refused(Capture::Nbd, Some("/a"), None, None), Ok("/a".into()));
        assert_eq!(refused(Capture::Kfilter, None, Some("/dev/a"), None), Ok("/dev/a".into()));
        for (capture, path, device, nbd, key) in [
            (Capture::Nbd, Some("/a"), Some("/dev/a"), None, "volume[0].device"),
            (Capture::Nbd, None, None, None, "volume[0].path"),
            (Capture::Kfilter, Some("/a"), None, None, "volume[0].path"),
            (Capture::Kfilter, None, None, None, "volume[0].device"),
            (Capture::Kfilter, None, Some("/dev/a"), Some("/s"), "volume[0].nbd"),
        ] {
            assert_eq!(refused(capture, path, device, nbd), Err(key.to_owned()));
        }
    }

    #[test]
    fn ring_and_journal_ranges() {
        for bytes in [0, 1 << 20, (64 << 20) + 1, 96 << 20, 8 << 30] {
            assert!(Ring { bytes }.check().is_err(), "{bytes}");
        }
        let of = |change: fn(&mut Journal)| {
            let mut journal = Journal::default();
            change(&mut journal);
            journal.check().map_err(|refused| refused.key)
        };
        assert_eq!(of(|_| {}), Ok(()));
        assert_eq!(of(|j| j.quota = 4 * j.segment_bytes - 1), Err("journal.quota".into()));
        assert_eq!(of(|j| j.segment_bytes += 512), Err("journal.segment_bytes".into()));
        assert_eq!(of(|j| j.max_batch_bytes = 2 << 20), Err("journal.max_batch_bytes".into()));
        assert_eq!(of(|j| j.max_batch_delay = Duration::ZERO), Err("journal.max_batch_delay".into()));
        assert_eq!(of(|j| j.compress_threads = 0), Err("journal.compress_threads".into()));
    }
}
