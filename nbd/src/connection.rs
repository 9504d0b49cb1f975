//! One connection, on its own thread: receive, do, reply.
//!
//! A round takes everything that was received, does the small things at once, hands the rest to the pool, and
//! then sends all replies together, so that many queued requests cost one receive and one send. Only then it
//! waits: for bytes, for the pool, for room in the socket, or for the server's shutdown.
//!
//! When the server drains, nothing more is taken: what is in flight is answered, then the connection closes, and
//! the unread rest (half a WRITE, too) gets no answer. An error reply instead would be final: Linux nbd and QEMU
//! make an I/O error of it, whereas a request without an answer they send again once they have reconnected.
//!
//! Likewise a client that gave up on this connection has sent its unanswered requests again elsewhere, and may
//! have gone on from there: what it left behind here is dropped, not done.
//!
//! Invariants: at most [`Limits::max_in_flight`] requests are in the pool, and no request is taken while more
//! than [`REPLY_WINDOW_BYTES`] of replies are reserved or unsent; so a connection holds at most its inbox, the
//! window, and one reply.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use crate::error::{Error, Kind};
use crate::export::Export;
use crate::handshake::{ExportInfo, Handshake, Progress, Selection};
use crate::inbox::Inbox;
use crate::outbox::Outbox;
use crate::pool::{Done, Job, Pool, Work};
use crate::proto::REQUEST_HEADER_BYTES;
use crate::reply::{Replies, refusal_of};
use crate::session::{Command, Event, Request, Session, WritePiece};
use crate::socket::Socket;

/// Replies that may be reserved or unsent before the connection stops taking requests.
const REPLY_WINDOW_BYTES: usize = 8 << 20;
/// Reads up to this size are tried without the pool.
const INLINE_READ_BYTES: u32 = 64 << 10;
/// How often a busy connection looks whether its client is still there: far more often than a client loses
/// patience (whole seconds), far more seldom than requests come.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Limits of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub handshake_timeout: Duration,
    pub max_in_flight: usize,
    pub max_payload_bytes: u32,
}

/// Where the server is in its life; it only moves down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(crate) enum Phase {
    Serving,
    /// Nothing new is taken; what is in flight is answered.
    Draining,
    /// The deadline is over: connections end as they are.
    Closing,
}

/// Handshakes; `None` if the client left in good order. What it sent beyond the handshake stays in the inbox.
pub(crate) async fn negotiate(
    socket: &mut Socket,
    inbox: &mut Inbox,
    exports: Arc<[ExportInfo]>,
    limits: &Limits,
) -> Result<Option<Selection>, Error> {
    let mut handshake = Handshake::new(exports, limits.max_payload_bytes);
    let mut outbox = Outbox::default();
    let going = async {
        loop {
            let (consumed, progress) = handshake.handle_bytes(inbox.unread())?;
            inbox.consume(consumed);
            if let Some(bytes) = handshake.poll_transmit() {
                outbox.push(bytes);
                match send_all(&mut outbox, socket).await {
                    // A client that gives up need not wait for the answer.
                    Err(_) if progress == Progress::Aborted => {}
                    sent => sent?,
                }
            }
            match progress {
                Progress::Selected(selection) => return Ok(Some(selection)),
                Progress::Aborted => return Ok(None),
                Progress::Going if consumed > 0 => {}
                Progress::Going => {
                    inbox.make_room(REQUEST_HEADER_BYTES);
                    match socket.receive(inbox.room()).await.map_err(gone)? {
                        Some(0) if inbox.unread().is_empty() => return Ok(None),
                        Some(0) => return Err(Error::new(Kind::PeerGone, "in the middle of an option")),
                        Some(received) => inbox.received(received),
                        None => {}
                    }
                }
            }
        }
    };
    match tokio::time::timeout(limits.handshake_timeout, going).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(Kind::PeerGone, "no complete handshake in time")),
    }
}

async fn send_all(outbox: &mut Outbox, socket: &mut Socket) -> Result<(), Error> {
    outbox.send(socket).map_err(gone)?;
    while !outbox.is_empty() {
        socket.writable().await.map_err(gone)?;
        outbox.send(socket).map_err(gone)?;
    }
    Ok(())
}

fn gone(error: std::io::Error) -> Error {
    Error::caused(Kind::PeerGone, "use the socket", error)
}

/// The transmission phase of one client.
pub(crate) struct Connection {
    socket: Socket,
    inbox: Inbox,
    outbox: Outbox,
    session: Session,
    replies: Replies,
    export: Arc<dyn Export>,
    limits: Limits,
    pool: Pool,
    done: mpsc::Receiver<Done>,
    answer: mpsc::Sender<Done>,
    in_flight: usize,
    /// Bytes of the replies that jobs in flight will bring.
    reserved_bytes: usize,
    /// The client said DISC or closed its side: nothing more is taken.
    leaving: bool,
    /// The client has closed its side behind requests that are not taken yet: they are dropped.
    gone: bool,
    /// When the client was last looked for.
    looked: Instant,
}

impl Connection {
    pub fn new(
        socket: Socket,
        inbox: Inbox,
        selection: Selection,
        export: Arc<dyn Export>,
        limits: Limits,
        pool: Pool,
    ) -> Self {
        let (answer, done) = mpsc::channel(limits.max_in_flight.max(1));
        Self {
            socket,
            inbox,
            outbox: Outbox::default(),
            session: Session::new(selection, export.read_only(), limits.max_payload_bytes),
            replies: Replies { structured: selection.structured },
            export,
            limits,
            pool,
            done,
            answer,
            in_flight: 0,
            reserved_bytes: 0,
            leaving: false,
            gone: false,
            looked: Instant::now(),
        }
    }

    /// Serves until the client leaves, breaks the protocol, or the server shuts down and nothing is in flight.
    pub async fn serve(mut self, mut phase: watch::Receiver<Phase>) -> Result<(), Error> {
        loop {
            phase.mark_unchanged();
            while let Ok(done) = self.done.try_recv() {
                self.finish(done);
            }
            let starved = self.take_requests(&phase)?;
            let now = *phase.borrow();
            if now == Phase::Closing {
                return Ok(()); // before anything is sent: exports may refuse what comes after the deadline
            }
            if let Err(error) = self.outbox.send(&mut self.socket) {
                // Nobody reads the answers of a client that has left.
                return if self.leaving { Ok(()) } else { Err(gone(error)) };
            }
            let ending = self.leaving || now == Phase::Draining;
            if ending && self.in_flight == 0 && self.outbox.is_empty() {
                return Ok(());
            }
            if !starved && !ending && self.may_take() {
                continue; // sending made room for requests that are here already
            }
            let blocked = self.socket.is_blocked();
            tokio::select! {
                biased;
                Some(done) = self.done.recv(), if self.in_flight > 0 => self.finish(done),
                received = self.socket.receive(self.inbox.room()), if starved && !self.leaving => {
                    self.received(received.map_err(gone)?)?;
                }
                ready = self.socket.writable(), if blocked => ready.map_err(gone)?,
                Ok(()) = phase.changed() => {}
            }
        }
    }

    fn may_take(&self) -> bool {
        !self.leaving
            && self.in_flight < self.limits.max_in_flight
            && self.outbox.len() + self.reserved_bytes < REPLY_WINDOW_BYTES
    }

    fn received(&mut self, received: Option<usize>) -> Result<(), Error> {
        match received {
            Some(0) if self.inbox.unread().is_empty() && self.session.is_between_requests() => {
                self.leaving = true; // as if it had said DISC
                Ok(())
            }
            Some(0) => Err(Error::new(Kind::PeerGone, "in the middle of a request")),
            Some(bytes) => {
                self.inbox.received(bytes);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn finish(&mut self, done: Done) {
        self.in_flight -= 1;
        self.reserved_bytes -= done.reserved_bytes;
        self.outbox.push(done.reply);
    }

    /// Takes what was received, as far as the limits allow. True: all of it, more bytes are needed.
    fn take_requests(&mut self, phase: &watch::Receiver<Phase>) -> Result<bool, Error> {
        // The phase each time: a write may have taken long.
        while self.may_take() && *phase.borrow() == Phase::Serving {
            self.look_for_client();
            let (consumed, event) =
                self.session.handle_bytes(self.inbox.unread(), self.export.size_bytes())?;
            match event {
                Event::Incomplete { wanted } => {
                    self.inbox.consume(consumed);
                    self.inbox.make_room(wanted);
                    return Ok(true);
                }
                Event::Disconnect => self.leaving = true,
                _ if self.gone => {}
                Event::Write(piece) => self.write(&piece),
                Event::Request(request) => self.begin(request),
                Event::Refused { cookie, refusal } => {
                    self.replies.refused(self.outbox.open(), cookie, &refusal);
                }
            }
            self.inbox.consume(consumed);
        }
        Ok(false)
    }

    /// Requests may have waited here for long, behind a write that blocked or for room in the pool.
    fn look_for_client(&mut self) {
        if !self.gone && self.looked.elapsed() >= LOOK_EVERY {
            self.gone = self.socket.client().is_gone();
            self.looked = Instant::now();
        }
    }

    fn write(&mut self, piece: &WritePiece) {
        let bytes = &self.inbox.unread()[piece.bytes.clone()];
        let result = match bytes {
            [] => Ok(()),
            bytes => self.export.write(piece.offset, bytes, piece.fua).map_err(|error| refusal_of(&error)),
        };
        match result {
            Err(refusal) => {
                if let Some(refusal) = self.session.fail_write(refusal) {
                    self.replies.refused(self.outbox.open(), piece.cookie, &refusal);
                }
            }
            Ok(()) if !piece.last => {}
            Ok(()) if piece.fua => self.add(Work::SyncWrite { cookie: piece.cookie }),
            Ok(()) => self.replies.done(self.outbox.open(), piece.cookie),
        }
    }

    fn begin(&mut self, request: Request) {
        if matches!(request.command, Command::Read { .. }) && self.read_cached(&request) {
            return;
        }
        self.add(Work::Request(request));
    }

    /// Answers a small read from memory. False: it needs the pool.
    fn read_cached(&mut self, request: &Request) -> bool {
        let Request { cookie, offset, length, .. } = *request;
        if length == 0 || length > INLINE_READ_BYTES {
            return false;
        }
        let out = self.outbox.open();
        let before = out.len();
        self.replies.data(out, cookie, offset, length as usize, true);
        let from = out.len();
        out.resize(from + length as usize, 0);
        // An error is met again, and answered, by the pool.
        let read = self.export.try_read_cached(offset, &mut out[from..]).unwrap_or(false);
        if !read {
            out.truncate(before);
        }
        read
    }

    fn add(&mut self, work: Work) {
        self.in_flight += 1;
        self.reserved_bytes += work.reserved_bytes();
        let (export, answer) = (Arc::clone(&self.export), self.answer.clone());
        self.pool.add(Job { export, replies: self.replies, work, client: self.socket.client(), answer });
    }
}
