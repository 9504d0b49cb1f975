//! Replies on their way to the client, sent in few system calls.
//!
//! Small replies are appended to one open buffer; a large one (encoded by the pool) becomes a part of its
//! own. The connection stops taking requests while [`Outbox::len`] is over its window, so that a client that
//! does not read its replies holds a bounded amount of memory.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;

use crate::memory::Share;
use crate::socket::Socket;

/// A reply at least this long is not copied behind others.
const OWN_PART_BYTES: usize = 16 << 10;
/// Parts handed to one sendmsg.
const PARTS_PER_SEND: usize = 32;
/// A sent buffer up to this size is kept for the next replies.
const KEPT_BUFFER_BYTES: usize = 1 << 20;

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// Closed parts, oldest first.
    parts: VecDeque<Part>,
    /// Bytes of the oldest part that were sent.
    sent: usize,
    /// Bytes in `parts`, those sent included.
    closed_bytes: usize,
    /// The open buffer, newer than all parts.
    open: Vec<u8>,
    /// A sent buffer, to be the next open one.
    spare: Vec<u8>,
}

/// Bytes to be sent, and the shared memory that they take, if they do.
#[derive(Debug)]
struct Part {
    bytes: Vec<u8>,
    _share: Option<Arc<Share>>,
}

impl Outbox {
    /// Where small replies are appended.
    pub fn open(&mut self) -> &mut Vec<u8> {
        &mut self.open
    }

    /// Adds a finished reply.
    pub fn push(&mut self, reply: Vec<u8>) {
        if reply.len() < OWN_PART_BYTES {
            return self.open.extend_from_slice(&reply);
        }
        self.push_part(reply, None);
    }

    /// Adds a finished reply in its pieces, which give their share of memory back when all are sent.
    pub fn push_shared(&mut self, reply: Vec<Vec<u8>>, share: Share) {
        let share = Arc::new(share);
        reply.into_iter().for_each(|piece| self.push_part(piece, Some(Arc::clone(&share))));
    }

    fn push_part(&mut self, bytes: Vec<u8>, share: Option<Arc<Share>>) {
        if !bytes.is_empty() {
            self.close_open();
            self.closed_bytes += bytes.len();
            self.parts.push_back(Part { bytes, _share: share });
        }
    }

    /// Whether a part of it takes shared memory.
    pub fn holds_a_share(&self) -> bool {
        self.parts.iter().any(|part| part._share.is_some())
    }

    /// Bytes not sent yet.
    pub fn len(&self) -> usize {
        self.closed_bytes - self.sent + self.open.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sends until nothing is left or the socket is full.
    pub fn send(&mut self, socket: &mut Socket) -> io::Result<()> {
        self.close_open();
        while !self.parts.is_empty() {
            let mut slices = [IoSlice::new(&[]); PARTS_PER_SEND];
            let mut used = 0;
            for (slice, part) in slices.iter_mut().zip(&self.parts) {
                let from = if used == 0 { self.sent } else { 0 };
                *slice = IoSlice::new(&part.bytes[from..]);
                used += 1;
            }
            match socket.try_send(&slices[..used])? {
                Some(sent) => self.advance(sent),
                None => return Ok(()),
            }
        }
        socket.unblock();
        Ok(())
    }

    fn close_open(&mut self) {
        if !self.open.is_empty() {
            let bytes = std::mem::replace(&mut self.open, std::mem::take(&mut self.spare));
            self.closed_bytes += bytes.len();
            self.parts.push_back(Part { bytes, _share: None });
        }
    }

    fn advance(&mut self, sent: usize) {
        self.sent += sent;
        while let Some(part) = self.parts.pop_front_if(|part| part.bytes.len() <= self.sent) {
            let mut bytes = part.bytes;
            self.sent -= bytes.len();
            self.closed_bytes -= bytes.len();
            if bytes.capacity() <= KEPT_BUFFER_BYTES {
                bytes.clear();
                self.spare = bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn replies_arrive_in_order_through_a_full_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut socket = Socket::new(ours.into()).unwrap();
        let mut outbox = Outbox::default();
        let mut expected = Vec::new();
        for reply in 0..400_u32 {
            let length = [16, 20, 4096, u32::try_from(OWN_PART_BYTES).unwrap(), 100_000][reply as usize % 5];
            let bytes: Vec<u8> = (0..length).map(|at: u32| (at ^ reply).to_le_bytes()[0]).collect();
            expected.extend_from_slice(&bytes);
            match reply % 2 {
                0 => outbox.open().extend_from_slice(&bytes),
                _ => outbox.push(bytes),
            }
        }
        assert_eq!(outbox.len(), expected.len());
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            io::Read::read_to_end(&mut &theirs, &mut got).unwrap();
            got
        });
        let mut was_blocked = false;
        outbox.send(&mut socket).unwrap();
        while !outbox.is_empty() {
            was_blocked |= socket.is_blocked();
            socket.writable().await.unwrap();
            outbox.send(&mut socket).unwrap();
        }
        assert!(was_blocked, "the socket must have been full once");
        assert!(!socket.is_blocked());
        drop(socket);
        assert!(reader.join().unwrap() == expected);
    }
}
