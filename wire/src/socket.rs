//! The UDP socket: bound, its buffers asked for and read back.
//!
//! The kernel grants less than asked without a word (`net.core.rmem_max`), and what does not fit is dropped,
//! which a congestion controller takes for a full path. So the grant is reported, with the sysctl that would
//! raise it.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::error::{Error, ErrorKind, Result};

/// What was asked of the kernel and what it gave, in bytes of payload accounting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketBuffers {
    /// Asked, each way.
    pub asked_bytes: u64,
    /// Granted for receiving.
    pub receive_bytes: u64,
    /// Granted for sending.
    pub send_bytes: u64,
}

impl SocketBuffers {
    /// The command that would have the next start get what it asks for; `None` if it did.
    pub fn advice(&self) -> Option<String> {
        let asked = self.asked_bytes;
        let short =
            |name: &str, granted: u64| (granted < asked).then(|| format!("net.core.{name}_max={asked}"));
        let settings: Vec<_> = [short("rmem", self.receive_bytes), short("wmem", self.send_bytes)]
            .into_iter()
            .flatten()
            .collect();
        (!settings.is_empty()).then(|| format!("sysctl -w {}", settings.join(" ")))
    }
}

/// Binds `address` and asks for buffers of `bytes`.
pub(crate) fn bind(address: SocketAddr, bytes: u64) -> Result<(UdpSocket, SocketBuffers)> {
    let failed = |e: io::Error| Error::because(ErrorKind::Bind, format!("bind udp {address}"), e);
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let open = || -> io::Result<UdpSocket> {
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        if address.is_ipv6() {
            // One socket for both families; hosts differ in the default.
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        rustix::net::bind(&socket, &address)?;
        Ok(socket.into())
    };
    let socket = open().map_err(failed)?;
    let buffers = ask(&socket, bytes).map_err(failed)?;
    Ok((socket, buffers))
}

/// Binds any free port for a client: both families where the host has IPv6, else IPv4.
pub(crate) fn bind_any(bytes: u64) -> Result<(UdpSocket, SocketBuffers)> {
    bind((Ipv6Addr::UNSPECIFIED, 0).into(), bytes).or_else(|_| bind((Ipv4Addr::UNSPECIFIED, 0).into(), bytes))
}

fn ask(socket: &UdpSocket, bytes: u64) -> io::Result<SocketBuffers> {
    let size = usize::try_from(bytes.min(1 << 30)).unwrap_or(1 << 30);
    // With CAP_NET_ADMIN the limit may be passed; without, ask within it.
    if sockopt::set_socket_recv_buffer_size_force(socket, size).is_err() {
        sockopt::set_socket_recv_buffer_size(socket, size)?;
    }
    sockopt::set_socket_send_buffer_size(socket, size)?;
    // Linux doubles the size for its own accounting and reports the double (socket(7)).
    let halved = |doubled: usize| doubled as u64 / 2;
    Ok(SocketBuffers {
        asked_bytes: bytes,
        receive_bytes: halved(sockopt::socket_recv_buffer_size(socket)?),
        send_bytes: halved(sockopt::socket_send_buffer_size(socket)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grant_is_read_back() {
        let (socket, small) = bind(([127, 0, 0, 1], 0).into(), 64 << 10).unwrap();
        assert!(socket.local_addr().unwrap().port() != 0);
        assert_eq!((small.receive_bytes, small.send_bytes, small.advice()), (64 << 10, 64 << 10, None));
        let taken = bind(socket.local_addr().unwrap(), 64 << 10).unwrap_err();
        assert_eq!(taken.kind, ErrorKind::Bind);
    }

    #[test]
    fn the_advice_names_what_was_short() {
        let of =
            |receive_bytes, send_bytes| SocketBuffers { asked_bytes: 8, receive_bytes, send_bytes }.advice();
        assert_eq!(of(8, 8), None);
        assert_eq!(of(4, 8).unwrap(), "sysctl -w net.core.rmem_max=8");
        assert_eq!(of(4, 4).unwrap(), "sysctl -w net.core.rmem_max=8 net.core.wmem_max=8");
    }
}
