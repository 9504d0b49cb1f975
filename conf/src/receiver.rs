//! Settings of the receiving daemon, `afterimage receive`.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::compression::Compression;
use crate::error::{Error, Refused, require};
use crate::quic::Quic;
use crate::replicator::check_segment_bytes;
use crate::{names, units};

/// Everything that the receiving daemon is told. Paths are absolute; values are within their ranges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Receiver {
    /// State directory: journals, history, replicas, identity, control socket.
    pub dir: PathBuf,
    /// UDP address to listen on.
    pub listen: SocketAddr,
    /// Control socket.
    pub control: PathBuf,
    /// Directory of this side's key and certificate.
    pub identity_dir: PathBuf,
    /// Sources connected at once.
    pub max_connections: u32,
    /// The wire.
    pub quic: Quic,
    /// How batches are chosen and written to the replica.
    pub apply: Apply,
    /// How long every write stays a recovery point.
    pub history: History,
    /// The receiver's journal.
    pub journal: Segments,
    /// Who may send which groups.
    pub source: Vec<Source>,
    /// Replicas that do not lie at their default path.
    pub replica: Vec<Replica>,
}

/// `[apply]`: bounds of one batch, and how often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Apply {
    /// Redo bytes in one batch at most.
    #[serde(with = "units::bytes")]
    pub batch_bytes: u64,
    /// Undo bytes that one batch may take.
    #[serde(with = "units::bytes")]
    pub undo_bytes: u64,
    /// A batch is applied at the latest when its first record has waited this long.
    #[serde(with = "units::duration")]
    pub interval: Duration,
    /// A batch is applied when nothing has arrived for this long.
    #[serde(with = "units::duration")]
    pub idle: Duration,
    /// Batches are at least this far apart unless full, so that a trickle of writes does not become a heap of
    /// undo files.
    #[serde(with = "units::duration")]
    pub min_interval: Duration,
    /// How undo is packed.
    pub undo_compression: Compression,
}

/// `[history]`: what is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct History {
    /// Every write within this time is a recovery point.
    #[serde(with = "units::duration")]
    pub window: Duration,
    /// Never shortened below this: the receiver rather stops acknowledging.
    #[serde(with = "units::duration")]
    pub min: Duration,
    /// Beyond the window: one point an hour is kept this long. 0: none.
    #[serde(with = "units::duration")]
    pub keep_hourly: Duration,
    /// Beyond that: one point a day is kept this long. 0: none.
    #[serde(with = "units::duration")]
    pub keep_daily: Duration,
    /// Bytes of history for each group. Absent: 4 times the used size of its volumes.
    #[serde(with = "units::bytes_option")]
    pub quota: Option<u64>,
}

/// `[journal]` of the receiver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Segments {
    /// Size of one segment file.
    #[serde(with = "units::bytes")]
    pub segment_bytes: u64,
}

/// One `[[source]]`: an identity and the groups that are its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Source {
    /// SHA-256 of the source's certificate.
    #[serde(serialize_with = "units::hex32")]
    pub identity: [u8; 32],
    /// Groups that it may send, at least one, and nobody else.
    pub groups: Vec<String>,
    /// What each of them may take here at most: replica images, journal and history. Absent: no such limit.
    #[serde(with = "units::bytes_option")]
    pub max_bytes: Option<u64>,
}

/// One `[[replica]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replica {
    /// Group that the volume belongs to.
    pub group: String,
    /// The volume's name.
    pub volume: String,
    /// Image file or block device.
    pub path: PathBuf,
    /// It holds a copy of the volume that was brought by other means: it is taken over as it is, and
    /// compared.
    pub seeded: bool,
}

impl Default for Apply {
    fn default() -> Self {
        Apply {
            batch_bytes: 64 << 20,
            undo_bytes: 256 << 20,
            interval: Duration::from_secs(5),
            idle: Duration::from_millis(100),
            min_interval: Duration::from_secs(1),
            undo_compression: Compression::Zstd(-5),
        }
    }
}

impl Default for History {
    fn default() -> Self {
        History {
            window: Duration::from_secs(24 * 3600),
            min: Duration::from_secs(4 * 3600),
            keep_hourly: Duration::ZERO,
            keep_daily: Duration::ZERO,
            quota: None,
        }
    }
}

impl Default for Segments {
    fn default() -> Self {
        Segments { segment_bytes: 64 << 20 }
    }
}

/// What serde reads: as in the file, nothing checked yet.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Raw {
    dir: Option<PathBuf>,
    listen: String,
    control: Option<PathBuf>,
    identity_dir: Option<PathBuf>,
    #[serde(deserialize_with = "units::count")]
    max_connections: u32,
    quic: Quic,
    apply: Apply,
    history: History,
    journal: Segments,
    source: Vec<RawSource>,
    replica: Vec<RawReplica>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawSource {
    identity: Option<String>,
    groups: Vec<String>,
    #[serde(with = "units::bytes_option")]
    max_bytes: Option<u64>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawReplica {
    group: Option<String>,
    volume: Option<String>,
    path: Option<PathBuf>,
    seeded: Option<bool>,
}

impl Default for Raw {
    fn default() -> Self {
        Raw {
            dir: None,
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7878)).to_string(),
            control: None,
            identity_dir: None,
            max_connections: 64,
            quic: Quic::default(),
            apply: Apply::default(),
            history: History::default(),
            journal: Segments::default(),
            source: Vec::new(),
            replica: Vec::new(),
        }
    }
}

impl TryFrom<Raw> for Receiver {
    type Error = Refused;

    fn try_from(raw: Raw) -> Result<Self, Refused> {
        let dir = names::required_path("dir", raw.dir)?;
        require((1..=4096).contains(&raw.max_connections), "max_connections", "1 to 4096 is allowed")?;
        raw.quic.check()?;
        raw.apply.check()?;
        raw.history.check()?;
        check_segment_bytes(raw.journal.segment_bytes)?;
        Ok(Receiver {
            listen: names::ip_port("listen", &raw.listen)?,
            control: names::path_or("control", raw.control, &dir, "control.sock")?,
            identity_dir: names::path_or("identity_dir", raw.identity_dir, &dir, "identity")?,
            max_connections: raw.max_connections,
            quic: raw.quic,
            apply: raw.apply,
            history: raw.history,
            journal: raw.journal,
            source: sources(raw.source)?,
            replica: replicas(raw.replica, &dir)?,
            dir,
        })
    }
}

fn sources(raw: Vec<RawSource>) -> Result<Vec<Source>, Refused> {
    let (mut identities, mut bound) = (BTreeSet::new(), BTreeSet::new());
    let mut sources = Vec::with_capacity(raw.len());
    for (i, raw) in raw.into_iter().enumerate() {
        let identity = names::identity(&format!("source[{i}].identity"), raw.identity)?;
        let once = identities.insert(identity);
        require(once, &format!("source[{i}].identity"), "an identity may have one [[source]] only")?;
        let key = format!("source[{i}].groups");
        if raw.groups.is_empty() {
            return Err(Refused::missing(key, "the names of this source's groups are required"));
        }
        for group in &raw.groups {
            require(names::check_name(group), &key, &format!("each name is {}", names::NAME_RULE))?;
            require(bound.insert(group.clone()), &key, "a group may belong to one source only")?;
        }
        let enough = raw.max_bytes.is_none_or(|max_bytes| max_bytes >= 64 << 20);
        require(enough, &format!("source[{i}].max_bytes"), "at least 64MiB is allowed")?;
        sources.push(Source { identity, groups: raw.groups, max_bytes: raw.max_bytes });
    }
    Ok(sources)
}

fn replicas(raw: Vec<RawReplica>, dir: &Path) -> Result<Vec<Replica>, Refused> {
    let (mut volumes, mut paths) = (BTreeSet::new(), BTreeSet::new());
    let mut replicas = Vec::with_capacity(raw.len());
    for (i, raw) in raw.into_iter().enumerate() {
        let key = |field| format!("replica[{i}].{field}");
        let group = names::name(&key("group"), raw.group)?;
        let volume = names::name(&key("volume"), raw.volume)?;
        let path = raw.path.unwrap_or_else(|| default_replica(dir, &group, &volume));
        let path = names::absolute(&key("path"), path)?;
        let once = volumes.insert((group.clone(), volume.clone()));
        require(once, &key("volume"), "a volume may have one [[replica]] only")?;
        require(paths.insert(path.clone()), &key("path"), "each replica needs its own path")?;
        replicas.push(Replica { group, volume, path, seeded: raw.seeded.unwrap_or(false) });
    }
    Ok(replicas)
}

fn default_replica(dir: &Path, group: &str, volume: &str) -> PathBuf {
    dir.join("replica").join(group).join(format!("{volume}.img"))
}

impl Apply {
    fn check(&self) -> Result<(), Refused> {
        // A batch takes at least one frame (1 MiB raw), and a frame may overwrite as much as it holds.
        let size = |bytes| (2 << 20..=4 << 30).contains(&bytes);
        require(size(self.batch_bytes), "apply.batch_bytes", "2MiB to 4GiB is allowed")?;
        require(size(self.undo_bytes), "apply.undo_bytes", "2MiB to 4GiB is allowed")?;
        let time = |d: Duration| !d.is_zero() && d <= Duration::from_secs(3600);
        require(time(self.interval), "apply.interval", "more than 0 and at most 1h is allowed")?;
        require(time(self.idle), "apply.idle", "more than 0 and at most 1h is allowed")?;
        require(self.min_interval <= self.interval, "apply.min_interval", "at most apply.interval is allowed")
    }
}

impl History {
    fn check(&self) -> Result<(), Refused> {
        let ten_years = Duration::from_secs(10 * 366 * 24 * 3600);
        require(self.window <= ten_years, "history.window", "at most ten years is allowed")?;
        require(self.min <= self.window, "history.min", "at most history.window is allowed")?;
        for (key, kept) in
            [("history.keep_hourly", self.keep_hourly), ("history.keep_daily", self.keep_daily)]
        {
            require(kept <= ten_years, key, "at most ten years is allowed")?;
        }
        // A point an hour for a year is 8,784 points, each with its file.
        let year = Duration::from_secs(366 * 24 * 3600);
        require(self.keep_hourly <= year, "history.keep_hourly", "at most a year is allowed")?;
        let quota = self.quota.is_none_or(|quota| quota >= 64 << 20);
        require(quota, "history.quota", "at least 64MiB is allowed")
    }
}

impl Receiver {
    /// Settings without a file, all else at its default: what `afterimage up` runs its receiving side with. A
    /// relative path counts from the working directory.
    ///
    /// # Errors
    /// The same as for a file: a bad group name.
    pub fn embedded(dir: &Path, listen: SocketAddr, source: [u8; 32], group: &str) -> Result<Self, Error> {
        let raw = Raw {
            dir: Some(std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned())),
            listen: listen.to_string(),
            source: vec![RawSource {
                identity: Some(units::format_hex32(&source)),
                groups: vec![group.to_owned()],
                max_bytes: None,
            }],
            ..Raw::default()
        };
        Receiver::try_from(raw).map_err(Refused::embedded)
    }

    /// Where the replica of a volume lies: its `[[replica]]`, or `dir/replica/GROUP/VOLUME.img`. Both names
    /// must have passed [`check_name`](crate::check_name): a source's names are foreign bytes, and here they
    /// become a path.
    pub fn replica_path(&self, group: &str, volume: &str) -> PathBuf {
        assert!(names::check_name(group) && names::check_name(volume), "a replica's name was not checked");
        let own = self.replica.iter().find(|r| r.group == group && r.volume == volume);
        own.map_or_else(|| default_replica(&self.dir, group, volume), |r| r.path.clone())
    }

    /// What a group may take here at most, if its source has such a limit.
    pub fn max_bytes(&self, group: &str) -> Option<u64> {
        self.source.iter().find(|s| s.groups.iter().any(|g| g == group)).and_then(|s| s.max_bytes)
    }

    /// Groups that the sources may send.
    pub fn groups(&self) -> usize {
        self.source.iter().map(|s| s.groups.len()).sum()
    }

    /// Whether this identity may send this group.
    pub fn owns(&self, identity: &[u8; 32], group: &str) -> bool {
        self.source.iter().any(|s| s.identity == *identity && s.groups.iter().any(|g| g == group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(identity: u8, groups: &[&str]) -> RawSource {
        let groups = groups.iter().map(|g| g.to_string()).collect();
        RawSource { identity: Some(units::format_hex32(&[identity; 32])), groups, max_bytes: None }
    }

    #[test]
    fn a_group_belongs_to_one_identity() {
        let settings = Receiver::embedded(Path::new("/r"), ([127, 0, 0, 1], 0).into(), [1; 32], "g").unwrap();
        assert!(settings.owns(&[1; 32], "g"));
        assert!(!settings.owns(&[2; 32], "g"));
        assert!(!settings.owns(&[1; 32], "h"));

        assert!(sources(vec![source(1, &["a", "b"]), source(2, &["c"])]).is_ok());
        assert_eq!(sources(vec![source(1, &["a"]), source(2, &["a"])]).unwrap_err().key, "source[1].groups");
        assert_eq!(
            sources(vec![source(1, &["a"]), source(1, &["b"])]).unwrap_err().key,
            "source[1].identity"
        );
        assert_eq!(sources(vec![source(1, &[])]).unwrap_err().key, "source[0].groups");
        let small = RawSource { max_bytes: Some(1 << 20), ..source(1, &["a"]) };
        assert_eq!(sources(vec![small]).unwrap_err().key, "source[0].max_bytes");
        assert_eq!(sources(vec![source(1, &["../x"])]).unwrap_err().key, "source[0].groups");
    }

    #[test]
    fn replicas_have_a_default_path_and_never_share_one() {
        let mut settings =
            Receiver::embedded(Path::new("/r"), ([127, 0, 0, 1], 0).into(), [1; 32], "g").unwrap();
        assert_eq!(settings.replica_path("g", "v"), Path::new("/r/replica/g/v.img"));
        let (group, volume, path) = ("g".into(), "v".into(), "/dev/sdx".into());
        settings.replica = vec![Replica { group, volume, path, seeded: false }];
        assert_eq!(settings.replica_path("g", "v"), Path::new("/dev/sdx"));
        assert_eq!(settings.replica_path("g", "w"), Path::new("/r/replica/g/w.img"));

        let raw = |volume: &str, path: &str| RawReplica {
            group: Some("g".into()),
            volume: Some(volume.into()),
            path: Some(path.into()),
            seeded: None,
        };
        let dir = Path::new("/r");
        assert_eq!(replicas(vec![raw("v", "/a"), raw("v", "/b")], dir).unwrap_err().key, "replica[1].volume");
        assert_eq!(replicas(vec![raw("v", "/a"), raw("w", "/a")], dir).unwrap_err().key, "replica[1].path");
        assert_eq!(replicas(vec![raw("v", "a")], dir).unwrap_err().key, "replica[0].path");
    }

    #[test]
    fn history_cannot_promise_more_than_it_keeps() {
        let history = History { min: Duration::from_secs(25 * 3600), ..History::default() };
        assert_eq!(history.check().unwrap_err().key, "history.min");
        let apply = Apply { min_interval: Duration::from_secs(6), ..Apply::default() };
        assert_eq!(apply.check().unwrap_err().key, "apply.min_interval");
    }
}
