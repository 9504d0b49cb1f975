//! How much may be in flight, and how long silence is borne: quinn's transport settings from ours.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::error::{Error, ErrorKind, Result};

/// Settings of a connection. quinn's own windows suit 100 Mbit/s at 100 ms; these are counted as memory
/// instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Bytes that the peer may send on one stream before we have read them.
    pub stream_window_bytes: u64,
    /// Bytes that the peer may send on all streams before we have read them.
    pub connection_window_bytes: u64,
    /// Bytes sent and not yet acknowledged by the peer's QUIC.
    pub send_window_bytes: u64,
    /// Largest UDP payload that path discovery tries.
    pub mtu_bytes: u16,
    /// Socket buffers to ask the kernel for, each way.
    pub socket_buffer_bytes: u64,
    /// A silent connection is pinged this often.
    pub keep_alive: Duration,
    /// A connection silent for this long is lost.
    pub idle_timeout: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            stream_window_bytes: 32 << 20,
            connection_window_bytes: 64 << 20,
            send_window_bytes: 64 << 20,
            mtu_bytes: 1452,
            socket_buffer_bytes: 8 << 20,
            keep_alive: Duration::from_secs(3),
            idle_timeout: Duration::from_secs(10),
        }
    }
}

/// Segments of one offloaded send (GSO) in quinn, and the largest payload of a UDP send. Their product with
/// the MTU past that limit costs two thirds of the rate: every packet becomes a system call.
const GSO_SEGMENTS: usize = 10;
const UDP_PAYLOAD_BYTES: usize = 65_507;
/// Every QUIC path carries this (RFC 9000, section 14).
const MIN_MTU_BYTES: u16 = 1200;
/// Streams of questions (`compare`, the other way `refetch`) at once, beside the control stream.
const QUESTION_STREAMS: u32 = 1;
/// Uni streams of frames that a source may have open at once.
const FRAME_STREAMS: u32 = 16;

/// What a source may send before it was admitted: a hello, and the answer to a question of the greeting.
const GREETING_WINDOW_BYTES: u64 = 128 << 10;
/// What a receiver may send before we have read it: acknowledgements, answers of at most 64 KiB.
const ANSWERS_WINDOW_BYTES: u64 = 1 << 20;

/// What the peer may open.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    /// We are the source: the receiver opens a stream of questions.
    Client,
    /// We are the receiver: the source opens the control stream and streams of frames.
    Server,
}

impl Tuning {
    /// quinn's transport settings. CUBIC: the sharing default of the net.
    ///
    /// # Errors
    /// [`ErrorKind::Setting`] where a value is out of QUIC's range, or the MTU is past the GSO cliff.
    pub(crate) fn transport(&self, side: Side) -> Result<Arc<TransportConfig>> {
        let refuse = |what: &str| Error::new(ErrorKind::Setting, format!("quic settings: {what}"));
        let window =
            |bytes: u64| VarInt::from_u64(bytes).map_err(|_| refuse("a window is beyond 2^62 bytes"));
        if self.mtu_bytes < MIN_MTU_BYTES || GSO_SEGMENTS * usize::from(self.mtu_bytes) >= UDP_PAYLOAD_BYTES {
            return Err(refuse(&format!("mtu {} is not within 1200 and 6550", self.mtu_bytes)));
        }
        let idle =
            IdleTimeout::try_from(self.idle_timeout).map_err(|_| refuse("idle timeout is too long"))?;
        let (bidi, uni, most) = match side {
            Side::Client => (QUESTION_STREAMS, 0, ANSWERS_WINDOW_BYTES),
            // The rest when it was admitted.
            Side::Server => (1, 0, GREETING_WINDOW_BYTES),
        };
        // Judged whole, also where less is granted at first.
        let (stream, connection) = (window(self.stream_window_bytes)?, window(self.connection_window_bytes)?);
        let at_first = |window: VarInt| window.min(VarInt::from_u64(most).unwrap_or(window));
        let stream = match side {
            Side::Client => at_first(stream),
            // Cannot be raised later; the connection's bounds it.
            Side::Server => stream,
        };
        let mut mtu_discovery = MtuDiscoveryConfig::default();
        mtu_discovery.upper_bound(self.mtu_bytes);
        let mut transport = TransportConfig::default();
        transport
            .stream_receive_window(stream)
            .receive_window(at_first(connection))
            .send_window(self.send_window_bytes)
            .max_concurrent_bidi_streams(VarInt::from_u32(bidi))
            .max_concurrent_uni_streams(VarInt::from_u32(uni))
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(Some(self.keep_alive))
            .mtu_discovery_config(Some(mtu_discovery))
            .datagram_receive_buffer_size(None)
            // Frames on one stream finish before those of the next begin, so the receiver gets whole ones
            // early.
            .send_fairness(false)
            .congestion_controller_factory(Arc::new(CubicConfig::default()));
        Ok(Arc::new(transport))
    }

    /// Lets a source that has its group's place send frames.
    ///
    /// # Errors
    /// [`ErrorKind::Setting`], which [`Tuning::transport`] has found before.
    pub fn admit(&self, connection: &quinn::Connection) -> Result<()> {
        let window = VarInt::from_u64(self.connection_window_bytes)
            .map_err(|_| Error::new(ErrorKind::Setting, "quic settings: a window is beyond 2^62 bytes"))?;
        connection.set_receive_window(window);
        connection.set_max_concurrent_bi_streams(VarInt::from_u32(1 + QUESTION_STREAMS));
        connection.set_max_concurrent_uni_streams(VarInt::from_u32(FRAME_STREAMS));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gso_cliff_and_impossible_windows_are_refused() {
        let refused = |tuning: Tuning| tuning.transport(Side::Server).map_err(|e| e.kind).err();
        assert_eq!(refused(Tuning::default()), None);
        assert_eq!(refused(Tuning { mtu_bytes: 6550, ..Tuning::default() }), None);
        for mtu_bytes in [0, 1199, 6551, 9000, u16::MAX] {
            assert_eq!(
                refused(Tuning { mtu_bytes, ..Tuning::default() }),
                Some(ErrorKind::Setting),
                "{mtu_bytes}"
            );
        }
        let endless = Tuning { stream_window_bytes: u64::MAX, ..Tuning::default() };
        assert_eq!(refused(endless), Some(ErrorKind::Setting));
        let endless = Tuning { idle_timeout: Duration::MAX, ..Tuning::default() };
        assert_eq!(refused(endless), Some(ErrorKind::Setting));
    }
}
