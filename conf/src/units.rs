//! Sizes (`64MiB`), rates (`100Mbit`), strict numbers and hex, as text and through serde. Durations (`20ms`)
//! are humantime's.
//!
//! The `config` crate converts loosely (2.7 becomes 3, true becomes 1); the serde functions here take exactly
//! what they name, or the same written as a string, which is all that an environment variable can hold.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserializer, Visitor};

const SIZE_RULE: &str = "a size is a whole number of bytes or a number with a unit: 512, 64KiB, 1.5GiB, 10GB";
const RATE_RULE: &str = "a rate is a number with a unit of bits per second: 500kbit, 100Mbit, 2.5Gbit";

const SIZE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
const RATE_UNITS: [(&str, u64); 4] =
    [("Gbit", 1_000_000_000), ("Mbit", 1_000_000), ("kbit", 1_000), ("bit", 1)];

/// Bytes from text such as `4096`, `64MiB`, `1.5 GiB` or `10GB`, in any case. A bare letter (`1G`) is the
/// power of two, as truncate, dd and qemu-img read it; `kB`, `MB`, `GB`, `TB` are powers of ten.
pub fn parse_bytes(text: &str) -> Result<u64, &'static str> {
    parse_scaled(text, |unit| {
        Some(match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return None,
        })
    })
    .ok_or(SIZE_RULE)
}

/// The shortest exact text for `bytes`, which [`parse_bytes`] reads back.
pub fn format_bytes(bytes: u64) -> String {
    format_scaled(bytes, &SIZE_UNITS)
}

/// Bits per second from text such as `100Mbit`. Units are powers of ten, as in every network's data sheet.
pub fn parse_rate(text: &str) -> Result<u64, &'static str> {
    parse_scaled(text, |unit| {
        RATE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, n)| *n)
    })
    .ok_or(RATE_RULE)
}

/// The shortest exact text for a rate, which [`parse_rate`] reads back.
pub fn format_rate(bits_per_s: u64) -> String {
    format_scaled(bits_per_s, &RATE_UNITS)
}

/// `whole[.fraction] unit` in exact integers: a float would round sizes beyond 2^53. A result that is not
/// whole is refused.
fn parse_scaled(text: &str, scale_of: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let scale = u128::from(scale_of(unit.trim_start())?);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 12 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let whole = u128::from(whole.parse::<u64>().ok()?) * scale;
    let digits = u32::try_from(fraction.len()).ok()?;
    let part = if fraction.is_empty() { 0 } else { u128::from(fraction.parse::<u64>().ok()?) * scale };
    let divisor = 10u128.pow(digits);
    if !part.is_multiple_of(divisor) {
        return None;
    }
    u64::try_from(whole + part / divisor).ok()
}

fn format_scaled(value: u64, units: &[(&str, u64)]) -> String {
    let fits = |(_, scale): &&(&str, u64)| value >= *scale && value.is_multiple_of(*scale);
    let smallest = units.last().expect("invariant: a unit table is not empty");
    let (name, scale) = units.iter().find(fits).unwrap_or(smallest);
    format!("{}{name}", value / scale)
}

/// 32 bytes from 64 hex digits.
pub fn parse_hex32(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

/// 64 lower-case hex digits of 32 bytes.
pub fn format_hex32(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Takes an integer or a string, and nothing that would have to be converted first.
struct Strict<T, F>(&'static str, F, PhantomData<T>);

impl<'de, T, F: Fn(&str) -> Option<T>> Visitor<'de> for Strict<T, F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<T, E> {
        (self.1)(&v.to_string()).ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(v), &self))
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> Result<T, E> {
        (self.1)(&v.to_string()).ok_or_else(|| E::invalid_value(de::Unexpected::Signed(v), &self))
    }

    fn visit_str<E: de::Error>(self, v: &str) -> Result<T, E> {
        (self.1)(v).ok_or_else(|| E::invalid_value(de::Unexpected::Str(v), &self))
    }

    fn visit_bool<E: de::Error>(self, v: bool) -> Result<T, E> {
        Err(E::invalid_type(de::Unexpected::Bool(v), &self))
    }
}

/// `deserialize_with` for a whole number that fits its field.
pub(crate) fn count<'de, D: Deserializer<'de>, T: std::str::FromStr>(d: D) -> Result<T, D::Error> {
    d.deserialize_any(Strict("a whole number in range", |text: &str| text.parse().ok(), PhantomData))
}

/// `deserialize_with` for true or false.
pub(crate) fn flag<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    struct Flag;
    impl Visitor<'_> for Flag {
        type Value = bool;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("true or false")
        }

        fn visit_bool<E: de::Error>(self, v: bool) -> Result<bool, E> {
            Ok(v)
        }

        fn visit_str<E: de::Error>(self, v: &str) -> Result<bool, E> {
            v.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(v), &self))
        }
    }
    d.deserialize_any(Flag)
}

/// `with` for a duration, in humantime's words; a bare number has no unit and is refused.
pub(crate) mod duration {
    use super::*;
    use humantime_serde::re::humantime;
    use std::time::Duration;

    pub use humantime_serde::serialize;

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let rule = "a duration with its unit: 20ms, 10s, 24h";
        d.deserialize_any(Strict(rule, |text: &str| humantime::parse_duration(text).ok(), PhantomData))
    }
}

/// `with` for a size in bytes.
pub(crate) mod bytes {
    use super::*;
    use serde::Serializer;

    pub fn serialize<S: Serializer>(bytes: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format_bytes(*bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        d.deserialize_any(Strict(SIZE_RULE, |text: &str| parse_bytes(text).ok(), PhantomData))
    }
}

/// `with` for a size in bytes that may be absent.
pub(crate) mod bytes_option {
    use super::*;
    use serde::{Deserialize, Serializer};

    pub fn serialize<S: Serializer>(bytes: &Option<u64>, s: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => super::bytes::serialize(bytes, s),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
        #[derive(Deserialize)]
        struct Size(#[serde(with = "super::bytes")] u64);
        Ok(Option::<Size>::deserialize(d)?.map(|size| size.0))
    }
}

/// `with` for a rate in bits per second, where 0, written "none", is no limit.
pub(crate) mod rate_or_none {
    use super::*;
    use serde::Serializer;

    pub fn serialize<S: Serializer>(rate: &u64, s: S) -> Result<S::Ok, S::Error> {
        if *rate == 0 { s.serialize_str("none") } else { s.serialize_str(&format_rate(*rate)) }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        const RULE: &str = "\"none\", or a number with a unit of bits per second: 500kbit, 100Mbit, 2.5Gbit";
        let parse = |text: &str| if matches!(text, "none" | "0") { Some(0) } else { parse_rate(text).ok() };
        d.deserialize_any(Strict(RULE, parse, PhantomData))
    }
}

/// `serialize_with` for 32 bytes as hex.
pub(crate) fn hex32<S: serde::Serializer>(bytes: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&format_hex32(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_mean_what_disks_mean() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4096B", 4096),
            ("64MiB", 64 << 20),
            ("64 mib", 64 << 20),
            ("1G", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("10GB", 10_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in
            ["", "MiB", "-1", "1e3", "1.2.3KiB", "1.", ".5GiB", "0.3B", "64 MiBs", "99999999TiB", "0x10"]
        {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_decimal_bits() {
        assert_eq!(parse_rate("100Mbit"), Ok(100_000_000));
        assert_eq!(parse_rate("2.5gbit"), Ok(2_500_000_000));
        assert_eq!(format_rate(100_000_000), "100Mbit");
        for bad in ["100", "100MB", "100Mbit/s", "Mbit"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_size_and_rate_reads_back(n: u64, shift in 0u32..64) {
            let n = (n >> shift) << (shift / 2);
            prop_assert_eq!(parse_bytes(&format_bytes(n)), Ok(n));
            prop_assert_eq!(parse_rate(&format_rate(n)), Ok(n));
        }

        #[test]
        fn hex_reads_back(bytes: [u8; 32]) {
            prop_assert_eq!(parse_hex32(&format_hex32(&bytes)), Some(bytes));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = (parse_bytes(&text), parse_rate(&text), parse_hex32(&text));
        }
    }
}
