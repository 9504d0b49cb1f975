//! How a frame's or undo record's payload is packed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// `"off"`, or `"zstd:N"` with N from -7 (fastest) to 19 (smallest); in code, zstd's own levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Payloads are stored as they are.
    Off,
    /// zstd at this level.
    Zstd(i32),
}

const RULE: &str = "\"off\" or \"zstd:N\" is allowed, N from -7 to 19 and not 0";

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::Off => f.write_str("off"),
            Compression::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

impl FromStr for Compression {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Compression::Off);
        }
        let level = text.strip_prefix("zstd:").and_then(|n| n.parse::<i32>().ok()).ok_or(RULE)?;
        // Level 0 is zstd's word for "its default of the day": not a level that a status line could honestly
        // show.
        if (-7..=19).contains(&level) && level != 0 { Ok(Compression::Zstd(level)) } else { Err(RULE) }
    }
}

impl Serialize for Compression {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Compression {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_prints_and_nothing_else() {
        for level in (-7..=19).filter(|l| *l != 0) {
            assert_eq!(format!("zstd:{level}").parse(), Ok(Compression::Zstd(level)));
            assert_eq!(Compression::Zstd(level).to_string().parse(), Ok(Compression::Zstd(level)));
        }
        assert_eq!("off".parse(), Ok(Compression::Off));
        for bad in ["", "on", "zstd", "zstd:", "zstd:0", "zstd:20", "zstd:-8", "zstd:1.5", "lz4:1", "OFF"] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
    }
}
