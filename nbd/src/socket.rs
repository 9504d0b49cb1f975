//! A connected stream socket, Unix or TCP, as non-blocking system calls on tokio's reactor.
//!
//! It is registered for reading only. A socket that is registered for writing as well wakes its owner each time
//! the client takes a reply out of it, which costs a thread switch per reply; so the write side is registered
//! (through a duplicate of the descriptor) only while a send is blocked.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A stream socket of the connection's own runtime.
#[derive(Debug)]
pub(crate) struct Socket {
    readable: AsyncFd<Arc<OwnedFd>>,
    writable: Option<AsyncFd<OwnedFd>>,
}

impl Socket {
    /// Takes a connected socket over; must be called on the runtime that will serve it.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { readable: register(Arc::new(socket), Interest::READABLE)?, writable: None })
    }

    /// The other end, to be asked by any thread.
    pub fn client(&self) -> Client {
        Client(Arc::downgrade(self.readable.get_ref()))
    }

    /// Waits until bytes may be there, then receives once. `None`: there were none after all.
    pub async fn receive(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut guard = self.readable.readable().await?;
        let room = into.len();
        match rustix::net::recv(self.readable.get_ref(), into, RecvFlags::empty()) {
            Ok((received, _)) => {
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
        let socket = &**self.readable.get_ref();
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

/// Whether a client still waits for answers. It does not keep the socket open.
#[derive(Debug, Clone)]
pub(crate) struct Client(Weak<OwnedFd>);

impl Client {
    /// The client has closed its side, or we have closed ours. Unread requests may stand before that end, so
    /// that the socket's reader does not know it yet.
    pub fn is_gone(&self) -> bool {
        let Some(socket) = self.0.upgrade() else { return true };
        let mut end = [PollFd::new(&*socket, PollFlags::RDHUP)];
        // What cannot be asked is not known to be gone.
        poll(&mut end, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|found| found > 0)
    }
}

#[expect(
    deprecated,
    reason = "tokio deprecates it for types whose descriptor may change or close early; an OwnedFd cannot, and its successor is unsafe"
)]
fn register<S: AsRawFd>(socket: S, interest: Interest) -> io::Result<AsyncFd<S>> {
    AsyncFd::with_interest(socket, interest)
}
