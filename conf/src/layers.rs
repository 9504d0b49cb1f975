//! The layers of settings and their origins: variables matched with keys, and a flat list of keys with
//! values.
//!
//! Every value of the `config` crate carries the origin that its source gave it. Ours are none for a default,
//! the path for a file, and `environment NAME` for a variable; [`flatten`] reads that back, so nothing keeps
//! a second list.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, Map, Value, ValueKind};

use crate::error::{At, Error, Kind};

/// Which layer gave a value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody: it is the default, or derived from other settings.
    Default,
    /// The settings file.
    File(PathBuf),
    /// This environment variable.
    Environment(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path) => write!(f, "file {}", path.display()),
            Origin::Environment(variable) => write!(f, "environment {variable}"),
        }
    }
}

/// Variables with our prefix, each already matched with the key that it sets.
#[derive(Debug, Clone)]
pub(crate) struct Variables(Map<String, Value>);

const PREFIX: &str = "AFTERIMAGE_";
/// The command's socket and the log filter: not settings of a daemon.
const NOT_SETTINGS: [&str; 2] = ["AFTERIMAGE_CONTROL", "AFTERIMAGE_LOG"];

impl Variables {
    pub fn consume(
        known: &BTreeMap<String, Leaf>,
        all: impl Iterator<Item = (String, String)>,
    ) -> Result<Self, Error> {
        let mut consumed = Map::new();
        for (variable, text) in
            all.filter(|(v, _)| v.starts_with(PREFIX) && !NOT_SETTINGS.contains(&v.as_str()))
        {
            let key = variable[PREFIX.len()..].to_lowercase().replace("__", ".");
            if !known.contains_key(&key) {
                let allowed = format!(
                    "no setting {key:?} of this daemon: a section is set off by two underscores, as in AFTERIMAGE_QUIC__MTU"
                );
                let at = At {
                    key: variable.clone(),
                    value: Some(format!("{text:?}")),
                    origin: Origin::Environment(variable),
                    allowed,
                };
                return Err(Error { kind: Kind::StrayVariable, at: Box::new(at), source: None });
            }
            let origin = format!("{ENVIRONMENT}{variable}");
            consumed.insert(key, Value::new(Some(&origin), ValueKind::String(text)));
        }
        Ok(Variables(consumed))
    }
}

const ENVIRONMENT: &str = "environment ";

impl config::Source for Variables {
    fn clone_into_box(&self) -> Box<dyn config::Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

/// A value at the end of a path.
#[derive(Debug)]
pub(crate) struct Leaf {
    /// The value as it would be written in TOML.
    pub text: String,
    /// Which layer gave it.
    pub origin: Origin,
}

/// Every key with its value: tables and lists of tables opened, lists of plain values kept whole.
pub(crate) fn flatten(config: &Config, file: &Path) -> BTreeMap<String, Leaf> {
    let mut leaves = BTreeMap::new();
    let top = config::Source::collect(config).unwrap_or_default();
    for (key, value) in top {
        flatten_into(&mut leaves, key, &value, file);
    }
    leaves
}

fn flatten_into(leaves: &mut BTreeMap<String, Leaf>, key: String, value: &Value, file: &Path) {
    match &value.kind {
        ValueKind::Table(table) => {
            for (name, inner) in table {
                flatten_into(leaves, format!("{key}.{name}"), inner, file);
            }
        }
        ValueKind::Array(items) if items.iter().any(|v| matches!(v.kind, ValueKind::Table(_))) => {
            for (i, inner) in items.iter().enumerate() {
                flatten_into(leaves, format!("{key}[{i}]"), inner, file);
            }
        }
        _ => {
            let origin = match value.origin() {
                None => Origin::Default,
                Some(text) => match text.strip_prefix(ENVIRONMENT) {
                    Some(variable) => Origin::Environment(variable.to_owned()),
                    // `config` shortens the path against the working directory; the operator knows it as
                    // given.
                    None => Origin::File(file.into()),
                },
            };
            leaves.insert(key, Leaf { text: show(&value.kind), origin });
        }
    }
}

fn show(kind: &ValueKind) -> String {
    match kind {
        ValueKind::Nil => "-".to_owned(),
        ValueKind::String(text) => format!("{text:?}"),
        ValueKind::Array(items) => {
            let items: Vec<String> = items.iter().map(|v| show(&v.kind)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Table(_) => "{..}".to_owned(),
        ValueKind::Boolean(b) => b.to_string(),
        ValueKind::I64(n) => n.to_string(),
        ValueKind::U64(n) => n.to_string(),
        ValueKind::I128(n) => n.to_string(),
        ValueKind::U128(n) => n.to_string(),
        ValueKind::Float(n) => n.to_string(),
    }
}
