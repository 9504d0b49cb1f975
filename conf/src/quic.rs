//! `[quic]`: how much may be in flight on the wire. The same section in both daemons.

use serde::{Deserialize, Serialize};

use crate::error::{Refused, require};
use crate::units;

/// QUIC windows and packet sizes. Memory: a connection may hold `send_window` at the source and
/// `connection_window` at the receiver. For a link of R bytes/s and T seconds of round trip, a window below R
/// × T is the limit, not the link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quic {
    /// Bytes that the peer may send on one stream before we have read them.
    #[serde(with = "units::bytes")]
    pub stream_window: u64,
    /// Bytes that the peer may send on all streams before we have read them.
    #[serde(with = "units::bytes")]
    pub connection_window: u64,
    /// Bytes sent and not yet acknowledged by the peer's QUIC.
    #[serde(with = "units::bytes")]
    pub send_window: u64,
    /// Largest UDP payload that path discovery tries.
    #[serde(deserialize_with = "units::count")]
    pub mtu: u16,
    /// Socket buffers to ask the kernel for, each way.
    #[serde(with = "units::bytes")]
    pub socket_buffer: u64,
}

/// Segments that quinn hands to the kernel in one offloaded send (GSO).
const GSO_SEGMENTS: u32 = 10;
/// Largest payload of one UDP send. Past it, quinn falls back to a system call per packet (a third of the
/// rate).
const UDP_PAYLOAD_BYTES: u32 = 65_507;
/// QUIC requires every path to carry this much (RFC 9000, section 14).
const MIN_MTU: u16 = 1200;

impl Default for Quic {
    fn default() -> Self {
        Quic {
            stream_window: 32 << 20,
            connection_window: 64 << 20,
            send_window: 64 << 20,
            mtu: 1452,
            socket_buffer: 8 << 20,
        }
    }
}

impl Quic {
    pub(crate) fn check(&self) -> Result<(), Refused> {
        // A frame of 1 MiB must fit each window, or no frame would ever arrive whole.
        let window = |key, value: u64| {
            require(
                (2 << 20..=4 << 30).contains(&value),
                key,
                "2MiB to 4GiB is allowed: a frame must fit, and it is memory",
            )
        };
        window("quic.stream_window", self.stream_window)?;
        window("quic.connection_window", self.connection_window)?;
        window("quic.send_window", self.send_window)?;
        let ordered = self.stream_window <= self.connection_window;
        require(ordered, "quic.stream_window", "at most quic.connection_window is allowed")?;
        let mtu = self.mtu >= MIN_MTU && u32::from(self.mtu) * GSO_SEGMENTS < UDP_PAYLOAD_BYTES;
        require(
            mtu,
            "quic.mtu",
            "1200 to 6550 is allowed: beyond, ten packets no longer fit one offloaded send (GSO)",
        )?;
        let buffer = (64 << 10..=1 << 30).contains(&self.socket_buffer);
        require(buffer, "quic.socket_buffer", "64KiB to 1GiB is allowed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gso_cliff_is_refused() {
        assert_eq!(Quic::default().check(), Ok(()));
        assert_eq!(Quic { mtu: 6550, ..Quic::default() }.check(), Ok(()));
        for mtu in [0, 1199, 6551, 9000, u16::MAX] {
            let refused = Quic { mtu, ..Quic::default() }.check().unwrap_err();
            assert_eq!(refused.key, "quic.mtu");
        }
    }
}
