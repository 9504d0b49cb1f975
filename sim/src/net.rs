//! The network: datagrams with delay, loss, duplication and reordering, and cuts.
//!
//! The turn of each side brings in what is due before it polls its tasks.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use crate::room::Room;

/// How the network is just now.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Nothing arrives.
    pub cut: bool,
    /// Datagrams lost, in a thousand.
    pub loss: u64,
    /// Datagrams that arrive twice, in a thousand.
    pub doubled: u64,
    /// Shortest delay, µs.
    pub delay_us: u64,
    /// What is added to it at most, µs: later ones overtake.
    pub jitter_us: u64,
}

impl Weather {
    /// A good line.
    pub const FAIR: Weather = Weather { cut: false, loss: 0, doubled: 0, delay_us: 2000, jitter_us: 200 };
}

struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Mailbox {
    arrived: VecDeque<(SocketAddr, Vec<u8>)>,
    waker: Option<Waker>,
}

struct Inner {
    weather: Weather,
    under_way: BTreeMap<(u64, u64), Datagram>,
    sent: u64,
    boxes: BTreeMap<SocketAddr, Mailbox>,
}

/// See the module.
pub struct Net {
    room: Arc<Room>,
    inner: Mutex<Inner>,
}

impl Net {
    /// A network with nobody on it.
    pub fn new(room: Arc<Room>) -> Arc<Net> {
        let inner =
            Inner { weather: Weather::FAIR, under_way: BTreeMap::new(), sent: 0, boxes: BTreeMap::new() };
        Arc::new(Net { room, inner: Mutex::new(inner) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on.
    pub fn set(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// A socket at an address; one that was there before is dead.
    pub fn socket(self: &Arc<Self>, at: SocketAddr) -> Arc<dyn AsyncUdpSocket> {
        self.lock().boxes.insert(at, Mailbox::default());
        Arc::new(Socket { net: self.clone(), at })
    }

    /// When the next datagram is due, ns.
    pub fn due_ns(&self) -> Option<u64> {
        self.lock().under_way.first_key_value().map(|((at, _), _)| *at)
    }

    /// Brings in what is due; whether anything was.
    pub fn deliver(&self) -> bool {
        let now_ns = self.room.now_ns();
        let mut wakers = Vec::new();
        {
            let mut inner = self.lock();
            while let Some(entry) = inner.under_way.first_entry().filter(|entry| entry.key().0 <= now_ns) {
                let datagram = entry.remove();
                let cut = inner.weather.cut;
                if let Some(mailbox) = inner.boxes.get_mut(&datagram.to).filter(|_| !cut) {
                    mailbox.arrived.push_back((datagram.from, datagram.bytes));
                    wakers.extend(mailbox.waker.take());
                }
            }
        }
        let any = !wakers.is_empty();
        wakers.into_iter().for_each(Waker::wake);
        any
    }

    fn send(&self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let weather = self.lock().weather;
        if weather.cut || self.room.chance(weather.loss) {
            return;
        }
        let copies = if self.room.chance(weather.doubled) { 2 } else { 1 };
        for _ in 0..copies {
            let delay_us = weather.delay_us + self.room.draw(weather.jitter_us + 1);
            let at = self.room.now_ns() + delay_us * 1000;
            let mut inner = self.lock();
            inner.sent += 1;
            let key = (at, inner.sent);
            inner.under_way.insert(key, Datagram { from, to, bytes: bytes.to_vec() });
        }
    }
}

struct Socket {
    net: Arc<Net>,
    at: SocketAddr,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket({})", self.at)
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for datagram in transmit.contents.chunks(size) {
            self.net.send(self.at, transmit.destination, datagram);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.net.lock();
        let Some(mailbox) = inner.boxes.get_mut(&self.at) else { return Poll::Pending };
        let mut count = 0;
        while count < buffers.len().min(meta.len()) {
            let Some((from, bytes)) = mailbox.arrived.pop_front() else { break };
            let length = bytes.len().min(buffers[count].len());
            buffers[count][..length].copy_from_slice(&bytes[..length]);
            meta[count] = RecvMeta { addr: from, len: length, stride: length, ecn: None, dst_ip: None };
            count += 1;
        }
        if count == 0 {
            mailbox.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.at)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
