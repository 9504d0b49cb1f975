//! A connected stream socket, Unix or TCP, as non-blocking system calls on tokio's reactor.
//!
//! It is registered for reading only. A socket that is registered for writing as well wakes its owner each
//! time the client takes a reply out of it, which costs a thread switch per reply; so the write side is
//! registered (through a duplicate of the descriptor) only while a send is blocked.
//!
//! Whether a client has gone, with requests before its end that are not read yet, is asked of the socket by
//! any thread. A client that said DISC last has left in order: what it asked for before is done and answered.
//! So the last bytes received are kept.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::proto::{REQUEST_HEADER_BYTES, REQUEST_MAGIC, command};

/// More than this is not looked through for the client's last word.
const MAX_UNREAD_BYTES: u64 = 16 << 20;

/// A stream socket of the connection's own runtime.
#[derive(Debug)]
pub(crate) struct Socket {
    readable: AsyncFd<Arc<Stream>>,
    writable: Option<AsyncFd<OwnedFd>>,
}

impl Socket {
    /// Takes a connected socket over; must be called on the runtime that will serve it.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let local = rustix::net::sockopt::socket_domain(&socket)? == rustix::net::AddressFamily::UNIX;
        let stream = Arc::new(Stream { socket, local, last: Mutex::default() });
        Ok(Self { readable: register(stream, Interest::READABLE)?, writable: None })
    }

    /// The other end, to be asked by any thread.
    pub fn client(&self) -> Client {
        Client(Arc::downgrade(self.readable.get_ref()))
    }

    /// Waits until bytes may be there, then receives once. `None`: there were none after all.
    pub async fn receive(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut guard = self.readable.readable().await?;
        let room = into.len();
        let stream = self.readable.get_ref();
        // Held over the call, so that nobody sees the socket without these bytes and their end not noted
        // either.
        let mut last = stream.last();
        match rustix::net::recv(&stream.socket, &mut *into, RecvFlags::empty()) {
            Ok((received, _)) => {
                last.note(&into[..received]);
                // A short read has emptied the socket: what comes now is a new edge, so that the call that
                // would only return EAGAIN is saved.
                if received < room {
                    guard.clear_ready();
                }
                Ok(Some(received))
            }
            Err(rustix::io::Errno::AGAIN) => {
                guard.clear_ready();
                Ok(None)
            }
            Err(rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends what fits now. `None`: nothing; wait for [`Socket::writable`].
    pub fn try_send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let socket = &self.readable.get_ref().socket;
        let mut ancillary = SendAncillaryBuffer::default();
        match rustix::net::sendmsg(socket, parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(sent) => Ok(Some(sent)),
            Err(rustix::io::Errno::AGAIN) => {
                if self.writable.is_none() {
                    self.writable = Some(register(socket.try_clone()?, Interest::WRITABLE)?);
                }
                Ok(None)
            }
            Err(rustix::io::Errno::INTR) => Ok(Some(0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the last send was blocked.
    pub fn is_blocked(&self) -> bool {
        self.writable.is_some()
    }

    /// Waits until a blocked send may go on.
    pub async fn writable(&self) -> io::Result<()> {
        match &self.writable {
            Some(socket) => socket.writable().await.map(|_| ()),
            None => Ok(()),
        }
    }

    /// Takes the write side out of the reactor again.
    pub fn unblock(&mut self) {
        self.writable = None;
    }
}

/// The descriptor, and what was read from it last.
#[derive(Debug)]
struct Stream {
    socket: OwnedFd,
    /// A Unix socket: it tells a client that is gone from one that only has nothing more to say.
    local: bool,
    last: Mutex<Last>,
}

impl Stream {
    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

/// The last bytes received, as many as a request has.
#[derive(Debug, Default)]
struct Last([u8; REQUEST_HEADER_BYTES]);

impl Last {
    fn note(&mut self, received: &[u8]) {
        let new = &received[received.len().saturating_sub(REQUEST_HEADER_BYTES)..];
        self.0.copy_within(new.len().., 0);
        self.0[REQUEST_HEADER_BYTES - new.len()..].copy_from_slice(new);
    }

    fn is_disconnect(&self) -> bool {
        self.0[..4] == REQUEST_MAGIC.to_be_bytes() && self.0[6..8] == command::DISC.to_be_bytes()
    }
}

/// Whether a client still waits for answers. It does not keep the socket open.
#[derive(Debug, Clone)]
pub(crate) struct Client(Weak<Stream>);

impl Client {
    /// The client gave up, without DISC, or we have closed our side. Unread requests may stand before that
    /// end, so that the socket's reader does not know it yet.
    pub fn is_gone(&self) -> bool {
        let Some(stream) = self.0.upgrade() else { return true };
        let flags = PollFlags::RDHUP;
        let mut end = [PollFd::new(&stream.socket, flags)];
        // What cannot be asked is not known to be gone.
        if !poll(&mut end, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|found| found > 0) {
            return false;
        }
        if stream.local && !end[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            return false; // it has closed its sending half, and reads on
        }
        // Held, so that nothing is read meanwhile.
        let last = stream.last();
        let unread = rustix::io::ioctl_fionread(&stream.socket).unwrap_or(0);
        if unread > MAX_UNREAD_BYTES {
            return true;
        }
        let mut bytes = vec![0; usize::try_from(unread).unwrap_or(0)];
        let mut with_unread = Last(last.0);
        if !bytes.is_empty() {
            match rustix::net::recv(&stream.socket, &mut bytes[..], RecvFlags::PEEK) {
                Ok((peeked, _)) => with_unread.note(&bytes[..peeked]),
                Err(_) => return true,
            }
        }
        drop(last);
        !with_unread.is_disconnect()
    }
}

#[expect(
    deprecated,
    reason = "tokio deprecates it for types whose descriptor may change or close early; an OwnedFd cannot, and its successor is unsafe"
)]
fn register<S: AsRawFd>(socket: S, interest: Interest) -> io::Result<AsyncFd<S>> {
    AsyncFd::with_interest(socket, interest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disconnect() -> Vec<u8> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(command::DISC.to_be_bytes());
        bytes.resize(REQUEST_HEADER_BYTES, 0);
        bytes
    }

    #[test]
    fn the_last_word_is_seen_however_it_was_cut() {
        let stream = [vec![7; 100], disconnect()].concat();
        for cut in 1..stream.len() {
            let mut last = Last::default();
            stream.chunks(cut).for_each(|piece| last.note(piece));
            assert!(last.is_disconnect(), "in pieces of {cut}");
            last.note(&[1]);
            assert!(!last.is_disconnect());
        }
    }

    #[tokio::test]
    async fn a_client_is_gone_when_it_closed_without_a_word_and_not_when_it_said_disc_or_still_reads() {
        use std::io::Write as _;
        use std::os::unix::net::UnixStream;
        for (says_disc, closes, gone) in [(true, true, false), (false, true, true), (false, false, false)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let socket = Socket::new(ours.into()).unwrap();
            assert!(!socket.client().is_gone());
            theirs.write_all(&[9; 5000]).unwrap();
            if says_disc {
                theirs.write_all(&disconnect()).unwrap();
            }
            match closes {
                true => drop(theirs),
                false => theirs.shutdown(std::net::Shutdown::Write).unwrap(),
            }
            let unread = socket.client().is_gone();
            while socket.receive(&mut [0; 700]).await.unwrap() != Some(0) {}
            assert_eq!((unread, socket.client().is_gone()), (gone, gone), "{says_disc} {closes}");
        }
    }
}
