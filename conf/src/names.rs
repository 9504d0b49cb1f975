//! Rules that several sections share: names, absolute paths, addresses, identities.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::error::{Refused, require};
use crate::units;

/// What a group or volume may be called. Names become file names and URIs, so they hold nothing that either
/// would quote.
pub(crate) const NAME_RULE: &str = "1 to 64 of a-z 0-9 _ -";

/// Whether `name` may name a group or a volume.
pub fn check_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(allowed)
}

pub(crate) fn name(key: &str, value: Option<String>) -> Result<String, Refused> {
    let value = value.ok_or_else(|| Refused::missing(key, format!("a name is required, {NAME_RULE}")))?;
    require(check_name(&value), key, &format!("a name is {NAME_RULE}"))?;
    Ok(value)
}

/// Daemons are started from anywhere, so a relative path would mean something else each time.
pub(crate) fn absolute(key: &str, path: PathBuf) -> Result<PathBuf, Refused> {
    require(path.is_absolute(), key, "an absolute path is required")?;
    Ok(path)
}

pub(crate) fn required_path(key: &str, path: Option<PathBuf>) -> Result<PathBuf, Refused> {
    absolute(key, path.ok_or_else(|| Refused::missing(key, "an absolute path is required"))?)
}

pub(crate) fn path_or(
    key: &str,
    path: Option<PathBuf>,
    dir: &Path,
    default: &str,
) -> Result<PathBuf, Refused> {
    absolute(key, path.unwrap_or_else(|| dir.join(default)))
}

/// An address to connect to: a name or IP, and a port. Resolved at each connection, not here.
pub(crate) fn host_port(key: &str, value: Option<String>) -> Result<String, Refused> {
    let rule = "host:port is required, an IPv6 address in brackets";
    let value = value.ok_or_else(|| Refused::missing(key, rule))?;
    let good = value.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
        let plain = !host.is_empty() && !host.contains([':', '[', ']', ' ', '/']);
        (bracketed || plain) && port.parse::<u16>().is_ok_and(|p| p != 0)
    });
    require(good, key, rule)?;
    Ok(value)
}

/// An address to listen on.
pub(crate) fn ip_port(key: &str, value: &str) -> Result<SocketAddr, Refused> {
    value.parse().map_err(|_| Refused::invalid(key, "ip:port is required, such as 0.0.0.0:7878 or [::]:7878"))
}

/// The SHA-256 of a peer's certificate.
pub(crate) fn identity(key: &str, value: Option<String>) -> Result<[u8; 32], Refused> {
    let rule = "64 hex digits are required: what `afterimage identity show` prints on the other side";
    let value = value.ok_or_else(|| Refused::missing(key, rule))?;
    units::parse_hex32(&value).ok_or_else(|| Refused::invalid(key, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_only_what_files_and_uris_hold_unquoted() {
        for good in ["a", "db-1", "0_x", &"x".repeat(64)] {
            assert!(check_name(good), "{good}");
        }
        for bad in ["", "A", "a b", "a/b", "..", "ä", "a.b", &"x".repeat(65)] {
            assert!(!check_name(bad), "{bad}");
        }
    }

    #[test]
    fn addresses_need_a_host_and_a_port() {
        for good in ["localhost:7878", "10.0.0.1:1", "[::1]:7878", "a.example.org:65535"] {
            assert!(host_port("k", Some(good.into())).is_ok(), "{good}");
        }
        for bad in
            ["", "localhost", ":7878", "host:0", "host:70000", "::1:7878", "[]:1", "a b:1", "http://x:1"]
        {
            assert!(host_port("k", Some(bad.into())).is_err(), "{bad}");
        }
    }
}
