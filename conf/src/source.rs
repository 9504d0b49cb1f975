//! Loading: defaults, then the file, then the environment; and which of them gave each value.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use config::{Config, ConfigError, File, FileFormat};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{At, Error, Kind, Refused};
use crate::layers::{Leaf, Origin, Variables, flatten};
use crate::receiver::{self, Receiver};
use crate::replicator::{self, Replicator};

/// One setting as it holds now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// The key with its section.
    pub key: String,
    /// The value as it would be written in the file; `-` if there is none.
    pub value: String,
    /// Which layer gave it.
    pub origin: Origin,
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}  # {}", self.key, self.value, self.origin)
    }
}

/// Settings, and a line for each of them.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings.
    pub settings: T,
    /// Every key in order, with value and origin.
    pub effective: Vec<Effective>,
}

/// Which daemon a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// `afterimage replicate`.
    Replicator,
    /// `afterimage receive`.
    Receiver,
}

/// A settings file that was found good.
#[derive(Debug, Clone)]
pub struct Checked {
    /// Which daemon it is for.
    pub daemon: Daemon,
    /// Every key in order, with value and origin.
    pub effective: Vec<Effective>,
}

/// Loads the source daemon's settings from `path` and this process's environment.
///
/// # Errors
/// Each [`Kind`]; the message names key, value, origin and what is allowed.
pub fn load_replicator(path: &Path) -> Result<Loaded<Replicator>, Error> {
    load::<replicator::Raw, _>(path, variables())
}

/// Loads the receiving daemon's settings from `path` and this process's environment.
///
/// # Errors
/// As [`load_replicator`].
pub fn load_receiver(path: &Path) -> Result<Loaded<Receiver>, Error> {
    load::<receiver::Raw, _>(path, variables())
}

/// Loads `path` as the daemon would for which it is written, told by the keys that only the source side has.
///
/// # Errors
/// As [`load_replicator`].
pub fn check(path: &Path) -> Result<Checked, Error> {
    let keys = config::Source::collect(&read_file(path)?).map_err(|e| syntax(path, e))?;
    if ["group", "receiver", "volume", "capture", "nbd", "ring", "ring_dir", "resync", "kfilter"]
        .iter()
        .any(|key| keys.contains_key(*key))
    {
        let effective = load_replicator(path)?.effective;
        Ok(Checked { daemon: Daemon::Replicator, effective })
    } else {
        let effective = load_receiver(path)?.effective;
        Ok(Checked { daemon: Daemon::Receiver, effective })
    }
}

/// This process's environment. A value that is not UTF-8 keeps its readable part: no setting takes it, and
/// the refusal shows it.
fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().map(|(k, v)| (k.to_string_lossy().into_owned(), v.to_string_lossy().into_owned()))
}

fn load<Raw, T>(path: &Path, variables: impl Iterator<Item = (String, String)>) -> Result<Loaded<T>, Error>
where
    Raw: Default + Serialize + DeserializeOwned,
    T: TryFrom<Raw, Error = Refused> + Serialize,
{
    let defaults = Config::try_from(&Raw::default()).expect("invariant: defaults serialize");
    let variables = Variables::consume(&flatten(&defaults, path), variables)?;
    let layers = Config::builder().add_source(defaults).add_source(read_file(path)?).add_source(variables);
    let layered = layers.build().map_err(|e| syntax(path, e))?;
    let given = flatten(&layered, path);
    let raw: Raw = layered.try_deserialize().map_err(|e| refused_by_serde(path, &given, e))?;
    let settings = T::try_from(raw).map_err(|refused| refused_by_check(path, &given, refused))?;
    let effective =
        flatten(&Config::try_from(&settings).map_err(|e| refused_by_serde(path, &given, e))?, path)
            .into_iter()
            .map(|(key, leaf)| Effective { origin: origin_of(&given, &key), value: leaf.text, key })
            .collect();
    Ok(Loaded { settings, effective })
}

/// The file, opened once before so that a missing one is told apart from a wrong one.
fn read_file(path: &Path) -> Result<Config, Error> {
    std::fs::File::open(path).map_err(|e| {
        let at = At {
            key: String::new(),
            value: None,
            origin: Origin::File(path.into()),
            allowed: format!("open settings: {e}"),
        };
        Error { kind: Kind::Unreadable, at: Box::new(at), source: Some(e.into()) }
    })?;
    Config::builder()
        .add_source(File::from(path).format(FileFormat::Toml))
        .build()
        .map_err(|e| syntax(path, e))
}

fn syntax(path: &Path, error: ConfigError) -> Error {
    let at =
        At { key: String::new(), value: None, origin: Origin::File(path.into()), allowed: error.to_string() };
    Error { kind: Kind::Syntax, at: Box::new(at), source: Some(error.into()) }
}

fn origin_of(given: &BTreeMap<String, Leaf>, key: &str) -> Origin {
    given.get(key).map_or(Origin::Default, |leaf| leaf.origin.clone())
}

/// An error of a check: the key is known, and by it the value and its origin.
fn refused_by_check(path: &Path, given: &BTreeMap<String, Leaf>, refused: Refused) -> Error {
    let leaf = given.get(&refused.key).filter(|_| refused.kind != Kind::Missing);
    let origin = leaf.map_or_else(|| Origin::File(path.into()), |leaf| leaf.origin.clone());
    let at =
        At { value: leaf.map(|leaf| leaf.text.clone()), key: refused.key, origin, allowed: refused.allowed };
    Error { kind: refused.kind, at: Box::new(at), source: None }
}

/// An error of serde: the key is somewhere in the chain that `config` built.
fn refused_by_serde(path: &Path, given: &BTreeMap<String, Leaf>, error: ConfigError) -> Error {
    let (key, cause) = match &error {
        ConfigError::At { error, key, .. } => (key.clone().unwrap_or_default(), error.to_string()),
        ConfigError::Type { key, unexpected, expected, .. } => {
            (key.clone().unwrap_or_default(), format!("invalid type: {unexpected}, expected {expected}"))
        }
        other => (String::new(), other.to_string()),
    };
    let kind = if cause.starts_with("unknown field") { Kind::UnknownKey } else { Kind::Invalid };
    let mut error = refused_by_check(path, given, Refused { kind, key, allowed: cause });
    if error.at.origin == Origin::Default {
        error.at.origin = Origin::File(path.into());
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    const REPLICATOR: &str = r#"
        group = "db"
        dir = "/var/lib/afterimage"
        [receiver]
        address = "far.example.org:7878"
        identity = "0707070707070707070707070707070707070707070707070707070707070707"
        [[volume]]
        name = "v"
        path = "/dev/vdb"
    "#;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn replicator(text: &str, variables: &[(&str, &str)]) -> Result<(Loaded<Replicator>, PathBuf), Error> {
        let file = file(text);
        let variables = variables.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        load::<replicator::Raw, Replicator>(file.path(), variables)
            .map(|loaded| (loaded, file.path().to_owned()))
    }

    fn refused(text: &str, variables: &[(&str, &str)]) -> (Kind, String, String) {
        let error = replicator(text, variables).expect_err(text);
        (error.kind, error.at.key.clone(), error.to_string())
    }

    #[test]
    fn later_layers_win_and_each_value_knows_its_own() {
        let text = format!("{REPLICATOR}\n[journal]\nquota = \"1GiB\"\nsegment_bytes = 4194304\n");
        let env = [
            ("AFTERIMAGE_JOURNAL__QUOTA", "2GiB"),
            ("AFTERIMAGE_QUIC__MTU", "1400"),
            ("AFTERIMAGE_JOURNAL__ADAPTIVE", "false"),
            ("AFTERIMAGE_CONTROL", "/run/x.sock"),
            ("AFTERIMAGE_LOG", "debug"),
            ("PATH", "/bin"),
        ];
        let (loaded, path) = replicator(&text, &env).unwrap();
        let settings = &loaded.settings;
        assert_eq!((settings.journal.quota, settings.journal.segment_bytes), (2 << 30, 4 << 20));
        assert_eq!((settings.quic.mtu, settings.journal.adaptive), (1400, false));
        assert_eq!(settings.control, Path::new("/var/lib/afterimage/control.sock"));

        let line = |key: &str| loaded.effective.iter().find(|e| e.key == key).expect(key).clone();
        let of = |key: &str, value: &str, origin| {
            assert_eq!(line(key), Effective { key: key.into(), value: value.into(), origin })
        };
        of("journal.quota", "\"2GiB\"", Origin::Environment("AFTERIMAGE_JOURNAL__QUOTA".into()));
        of("journal.segment_bytes", "\"4MiB\"", Origin::File(path.clone()));
        of("journal.max_batch_delay", "\"20ms\"", Origin::Default);
        of("quic.mtu", "1400", Origin::Environment("AFTERIMAGE_QUIC__MTU".into()));
        of("volume[0].path", "\"/dev/vdb\"", Origin::File(path));
        of("volume[0].nbd", "\"/var/lib/afterimage/v.nbd.sock\"", Origin::Default);
        of("volume[0].size", "-", Origin::Default);
    }

    #[test]
    fn variables_that_set_nothing_are_refused() {
        for variable in [
            "AFTERIMAGE_JOURNAL_QUOTA",
            "AFTERIMAGE__JOURNAL__QUOTA",
            "AFTERIMAGE_JOURNAL",
            "AFTERIMAGE_",
            "AFTERIMAGE_LISTEN",
            "AFTERIMAGE_VOLUME",
        ] {
            let (kind, key, text) = refused(REPLICATOR, &[(variable, "1GiB")]);
            assert_eq!((kind, key.as_str()), (Kind::StrayVariable, variable));
            assert!(text.contains("1GiB"), "{text}");
        }
    }

    #[test]
    fn errors_say_key_value_origin_and_what_is_allowed() {
        let wrong = |section: &str, line: &str| refused(&format!("{REPLICATOR}\n[{section}]\n{line}\n"), &[]);
        for (section, line, key, value, allowed) in [
            ("quic", "mtu = 9000", "quic.mtu", "9000", "1200 to 6550"),
            ("quic", "mtu = 1400.5", "quic.mtu", "1400.5", "a whole number"),
            ("quic", "mtu = true", "quic.mtu", "true", "a whole number"),
            ("quic", "mtu = 70000", "quic.mtu", "70000", "a whole number in range"),
            ("quic", "mtu = -1", "quic.mtu", "-1", "a whole number in range"),
            ("ring", "bytes = \"5MiB\"", "ring.bytes", "5MiB", "power of two"),
            ("ring", "bytes = \"5 apples\"", "ring.bytes", "5 apples", "a size is"),
            ("ring", "bytes = 4194304.0", "ring.bytes", "4194304", "a size is"),
            ("journal", "max_batch_delay = 20", "journal.max_batch_delay", "20", "unit"),
            ("journal", "compression = \"lz4\"", "journal.compression", "lz4", "zstd:N"),
            ("resync", "rate = 100", "resync.rate", "100", "a unit of bits per second"),
            ("kfilter", "on_stop = \"leave\"", "kfilter.on_stop", "leave", "detach"),
            ("journal", "adaptive = 1", "journal.adaptive", "1", "true or false"),
        ] {
            let (kind, at, text) = wrong(section, line);
            assert_eq!((kind, at.as_str()), (Kind::Invalid, key), "{text}");
            for part in [key, value, allowed, ".toml"] {
                assert!(text.contains(part), "{text:?} lacks {part:?}");
            }
        }
        let (kind, _, text) = wrong("journal", "quotas = 1");
        assert_eq!(kind, Kind::UnknownKey);
        assert!(text.contains("quotas") && text.contains("`quota`") && text.contains(".toml"), "{text}");

        let (kind, key, text) = refused(REPLICATOR, &[("AFTERIMAGE_QUIC__MTU", "9000")]);
        assert_eq!((kind, key.as_str()), (Kind::Invalid, "quic.mtu"));
        assert!(text.contains("environment AFTERIMAGE_QUIC__MTU") && text.contains("9000"), "{text}");
    }

    #[test]
    fn what_is_missing_is_named() {
        for key in
            ["group", "dir", "receiver.address", "receiver.identity", "volume[0].path", "volume[0].name"]
        {
            let field = key.rsplit('.').next().unwrap();
            let without: String = REPLICATOR
                .lines()
                .filter(|l| !l.trim().starts_with(&format!("{field} =")))
                .map(|l| format!("{l}\n"))
                .collect();
            let (kind, at, text) = refused(&without, &[]);
            assert_eq!((kind, at.as_str()), (Kind::Missing, key), "{text}");
        }
    }

    #[test]
    fn files_that_are_absent_or_not_toml() {
        let absent = load_replicator(Path::new("/nonexistent/afterimage.toml")).unwrap_err();
        assert_eq!(absent.kind, Kind::Unreadable);
        assert!(absent.to_string().contains("/nonexistent/afterimage.toml"), "{absent}");
        let (kind, _, text) = refused("group = \n", &[]);
        assert_eq!(kind, Kind::Syntax);
        assert!(text.contains(".toml"), "{text}");
    }

    #[test]
    fn check_tells_the_daemons_apart() {
        assert_eq!(check(file(REPLICATOR).path()).unwrap().daemon, Daemon::Replicator);
        assert_eq!(check(file("dir = \"/r\"").path()).unwrap().daemon, Daemon::Receiver);
        assert!(check(file("dir = \"/r\"\ngroup = \"g\"").path()).is_err());
    }

    /// The sample with its keys uncommented: a key's line is `#key`, a sentence's is `# Sentence`.
    fn uncommented(sample: &str) -> String {
        sample
            .lines()
            .map(|l| format!("{}\n", l.strip_prefix('#').filter(|l| !l.starts_with(' ')).unwrap_or(l)))
            .collect()
    }

    fn keys<T: Serialize>(settings: &T) -> BTreeSet<String> {
        flatten(&Config::try_from(settings).unwrap(), Path::new("-")).into_keys().collect()
    }

    #[test]
    fn the_replicator_sample_shows_every_key_and_its_default() {
        // A volume has a path or a device, never both.
        let text = uncommented(crate::REPLICATOR_SAMPLE).replace("\ndevice = ", "\n# device = ");
        let sample = file(&text);
        let Loaded { mut settings, .. } =
            load::<replicator::Raw, Replicator>(sample.path(), std::iter::empty()).unwrap();
        let mut given: BTreeSet<String> =
            flatten(&read_file(sample.path()).unwrap(), sample.path()).into_keys().collect();
        assert!(
            crate::REPLICATOR_SAMPLE.contains("\n#device = ") && given.insert("volume[0].device".to_owned())
        );
        assert_eq!(given, keys(&settings), "the sample and the settings have different keys");
        // The example's own: what has no default.
        let volume = [("root".to_owned(), PathBuf::from("/dev/vdb"), Some(100 << 30))];
        settings.volume[0].nbd_tcp = None;
        settings.receiver.address = "192.0.2.1:7878".into();
        let to = ([192, 0, 2, 1], 7878).into();
        let defaults =
            Replicator::embedded(Path::new("/var/lib/afterimage"), "web", volume, to, [0xab; 32]).unwrap();
        assert_eq!(settings, defaults);
        // As shipped, with all commented out, it names the first thing that must be given.
        assert_eq!(check(file(crate::REPLICATOR_SAMPLE).path()).unwrap_err().kind, Kind::Missing);
    }

    #[test]
    fn the_receiver_sample_shows_every_key_and_its_default() {
        let sample = file(&uncommented(crate::RECEIVER_SAMPLE));
        let Loaded { mut settings, .. } =
            load::<receiver::Raw, Receiver>(sample.path(), std::iter::empty()).unwrap();
        let given: BTreeSet<String> =
            flatten(&read_file(sample.path()).unwrap(), sample.path()).into_keys().collect();
        assert_eq!(given, keys(&settings), "the sample and the settings have different keys");
        let path = settings.replica.remove(0).path;
        assert_eq!(path, settings.replica_path("web", "root"));
        assert_eq!(settings.history.quota.take(), Some(500 << 30));
        assert_eq!(settings.source[0].max_bytes.take(), Some(2 << 40));
        let listen = ([0, 0, 0, 0], 7878).into();
        let defaults =
            Receiver::embedded(Path::new("/var/lib/afterimage"), listen, [0xab; 32], "web").unwrap();
        assert_eq!(settings, defaults);
    }
}
