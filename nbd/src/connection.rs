//! One connection, on its own thread: receive, do, reply.
//!
//! A round takes everything that was received, does the small things at once, hands the rest to the pool, and
//! then sends all replies together, so that many queued requests cost one receive and one send. Only then it
//! waits: for bytes, for the pool, for room in the socket, or for the server's shutdown.
//!
//! When the server drains, nothing more is taken: what is in flight is answered, then the connection closes,
//! and the unread rest (half a WRITE, too) gets no answer. An error reply instead would be final: Linux nbd
//! and QEMU make an I/O error of it, whereas a request without an answer they send again once they have
//! reconnected.
//!
//! Likewise a client that gave up on this connection has sent its unanswered requests again elsewhere, and
//! may have gone on from there: what it left behind here is dropped, not done. One that says DISC has left in
//! order: everything before it is done and answered, also when it closed its sending half right behind it.
//!
//! Invariants: at most [`Limits::max_in_flight`] requests are in the pool, and no request is taken while more
//! than [`REPLY_WINDOW_BYTES`] of replies are reserved or unsent. Of its own a connection holds its inbox and
//! [`OWN_REPLY_BYTES`]; what goes beyond, and the payload of a long WRITE, is taken from memory that all
//! connections share (`memory`). Who holds some of that and moves nothing while others wait for it is sent
//! away.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use crate::error::{Error, Kind};
use crate::export::Export;
use crate::handshake::{ExportInfo, Handshake, Progress, Selection};
use crate::inbox::Inbox;
use crate::long_write::Collected;
use crate::memory::{Memory, OWN_REPLY_BYTES, Share};
use crate::outbox::Outbox;
use crate::places::Ticket;
use crate::pool::{Done, Job, Pool, Work};
use crate::proto::REQUEST_HEADER_BYTES;
use crate::reply::{Replies, refusal_of};
use crate::session::{Command, Event, LongWrite, Request, Session, Write};
use crate::socket::Socket;

/// Replies that may be reserved or unsent before the connection stops taking requests.
const REPLY_WINDOW_BYTES: usize = 8 << 20;
/// Reads up to this size are tried without the pool.
const INLINE_READ_BYTES: u32 = 64 << 10;
/// How often a busy connection looks whether its client is still there: far more often than a client loses
/// patience (whole seconds), far more seldom than requests come.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Who holds shared memory that others wait for must move [`MOVED_BYTES`] of it within this time.
const STALLED: Duration = Duration::from_secs(5);
const MOVED_BYTES: usize = 64 << 10;
/// How often that is looked at.
const LOOK_AT_SHARES: Duration = Duration::from_secs(1);

/// Limits of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub handshake_timeout: Duration,
    pub handshake_idle: Duration,
    pub max_in_flight: usize,
    pub max_payload_bytes: u32,
    /// Shared by all connections, for replies.
    pub replies: Memory,
    /// And for payloads of long WRITEs.
    pub writes: Memory,
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
                    let received = tokio::time::timeout(limits.handshake_idle, socket.receive(inbox.room()));
                    let Ok(received) = received.await else {
                        return Err(Error::new(Kind::PeerGone, "silent in the handshake"));
                    };
                    match received.map_err(gone)? {
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

/// What the future comes to; never, without one.
async fn some<T>(future: &mut Option<Pin<Box<dyn Future<Output = T> + Send>>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
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
    /// Its place, and whether it has asked for anything yet.
    ticket: Ticket,
    asked: bool,
    /// A long WRITE whose payload is on its way, and its memory.
    collected: Option<Collected>,
    write_share: Option<Share>,
    /// A READ that waits for memory.
    pending: Option<Request>,
    /// Memory that is waited for, for `pending` or `collected`.
    waiting: Option<Pin<Box<dyn Future<Output = Share> + Send>>>,
    /// Bytes moved since then, by the client's doing, while it holds shared memory.
    moved_bytes: usize,
    moved_since: Instant,
}

impl Connection {
    pub fn new(
        socket: Socket,
        inbox: Inbox,
        selection: Selection,
        export: Arc<dyn Export>,
        limits: Limits,
        pool: Pool,
        ticket: Ticket,
    ) -> Self {
        let now = Instant::now();
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
            looked: now,
            ticket,
            asked: false,
            collected: None,
            write_share: None,
            pending: None,
            waiting: None,
            moved_bytes: 0,
            moved_since: now,
        }
    }

    /// Serves until the client leaves, breaks the protocol, or the server shuts down and nothing is in
    /// flight.
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
            let unsent = self.outbox.len();
            if let Err(error) = self.outbox.send(&mut self.socket) {
                // Nobody reads the answers of a client that has left; what it asked for is done all the same.
                if !self.leaving {
                    return Err(gone(error));
                }
                self.outbox = Outbox::default();
            }
            self.moved(unsent - self.outbox.len())?;
            let ending = self.leaving || now == Phase::Draining;
            if ending && self.in_flight == 0 && self.outbox.is_empty() {
                return Ok(());
            }
            if !starved && !ending && self.may_take() {
                continue; // sending made room for requests that are here already
            }
            let blocked = self.socket.is_blocked();
            let holds = self.holds_a_share();
            let room = match &mut self.collected {
                _ if !starved => &mut [],
                Some(collected) => collected.room(),
                None => self.inbox.room(),
            };
            tokio::select! {
                biased;
                Some(done) = self.done.recv(), if self.in_flight > 0 => self.finish(done),
                received = self.socket.receive(room), if starved && !self.leaving => {
                    self.received(received.map_err(gone)?)?;
                }
                share = some(&mut self.waiting), if self.waiting.is_some() => self.take_share(share),
                () = self.ticket.sent_away(), if !self.leaving => {
                    if !self.asked {
                        let why = "gave its place to another client: it had asked for nothing";
                        return Err(Error::new(Kind::TooManyConnections, why));
                    }
                    self.leaving = true; // it asked at the very moment: it is answered first
                }
                () = tokio::time::sleep(LOOK_AT_SHARES), if holds => {}
                ready = self.socket.writable(), if blocked => ready.map_err(gone)?,
                Ok(()) = phase.changed() => {}
            }
        }
    }

    fn may_take(&self) -> bool {
        !self.leaving
            && self.waiting.is_none()
            && self.in_flight < self.limits.max_in_flight
            && self.outbox.len() + self.reserved_bytes < REPLY_WINDOW_BYTES
    }

    fn received(&mut self, received: Option<usize>) -> Result<(), Error> {
        match (received, &mut self.collected) {
            (Some(0), Some(_)) => {
                Err(Error::new(Kind::PeerGone, "in the middle of a WRITE: none of it is done"))
            }
            (Some(bytes), Some(collected)) => {
                collected.received(bytes);
                self.moved(bytes)
            }
            (None, _) => Ok(()),
            (Some(bytes), None) => self.received_requests(bytes),
        }
    }

    fn received_requests(&mut self, bytes: usize) -> Result<(), Error> {
        match bytes {
            0 if self.inbox.unread().is_empty() && self.session.is_between_requests() => {
                self.leaving = true; // as if it had said DISC
                Ok(())
            }
            0 => Err(Error::new(Kind::PeerGone, "in the middle of a request")),
            bytes => {
                self.inbox.received(bytes);
                Ok(())
            }
        }
    }

    fn finish(&mut self, done: Done) {
        self.in_flight -= 1;
        self.reserved_bytes -= done.reserved_bytes;
        match done.share {
            Some(share) => self.outbox.push_shared(done.reply, share),
            None => done.reply.into_iter().for_each(|piece| self.outbox.push(piece)),
        }
    }

    fn holds_a_share(&self) -> bool {
        self.write_share.is_some() || self.outbox.holds_a_share()
    }

    /// The client took so many bytes of its answers, or sent so many of a payload; or nothing, for a while.
    fn moved(&mut self, bytes: usize) -> Result<(), Error> {
        self.moved_bytes += bytes;
        if self.moved_bytes >= MOVED_BYTES || !self.holds_a_share() {
            (self.moved_bytes, self.moved_since) = (0, Instant::now());
        }
        let Limits { replies, writes, .. } = &self.limits;
        let is_wanted = (self.write_share.is_some() && writes.is_wanted())
            || (self.outbox.holds_a_share() && replies.is_wanted());
        match is_wanted && self.moved_since.elapsed() >= STALLED {
            true => Err(Error::new(Kind::PeerGone, "neither reads nor sends while others wait for memory")),
            false => Ok(()),
        }
    }

    /// The memory that was waited for.
    fn take_share(&mut self, share: Share) {
        self.waiting = None;
        self.moved_since = Instant::now();
        match self.pending.take() {
            Some(request) => self.add(Work::Request(request), Some(share)),
            None => self.write_share = Some(share),
        }
    }

    /// Takes what was received, as far as the limits allow. True: all of it, more bytes are needed.
    fn take_requests(&mut self, phase: &watch::Receiver<Phase>) -> Result<bool, Error> {
        // The phase each time: a write may have taken long.
        while *phase.borrow() == Phase::Serving {
            if self.collected.is_some() && self.waiting.is_none() && !self.collect() {
                return Ok(true);
            }
            if !self.may_take() {
                return Ok(false);
            }
            self.look_for_client();
            let (consumed, event) =
                self.session.handle_bytes(self.inbox.unread(), self.export.size_bytes())?;
            if !self.asked && !matches!(event, Event::Incomplete { .. } | Event::Disconnect) {
                self.asked = true;
                self.ticket.asked();
            }
            match event {
                Event::Incomplete { wanted } => {
                    self.inbox.consume(consumed);
                    self.inbox.make_room(wanted);
                    return Ok(true);
                }
                Event::Disconnect => self.leaving = true,
                Event::LongWrite(_) if self.gone => self.leaving = true,
                _ if self.gone => {}
                Event::Write(write) => self.write(&write),
                Event::LongWrite(write) => self.begin_long(write),
                Event::Request(request) => self.begin(request),
                Event::Refused { cookie, refusal } => {
                    self.replies.refused(self.outbox.open(), cookie, &refusal);
                }
            }
            self.inbox.consume(consumed);
        }
        Ok(false)
    }

    /// The payload of a long WRITE comes next; memory for all of it first.
    fn begin_long(&mut self, write: LongWrite) {
        let bytes = write.length as usize;
        self.write_share = self.limits.writes.try_take(bytes);
        if self.write_share.is_none() {
            self.waiting = Some(Box::pin(self.limits.writes.clone().take(bytes)));
        }
        self.moved_since = Instant::now();
        self.collected = Some(Collected::new(write));
    }

    /// Goes on with a long WRITE, and does it when its payload is whole. False: more bytes are needed.
    fn collect(&mut self) -> bool {
        let Some(mut collected) = self.collected.take() else { return true };
        let taken = collected.take(self.inbox.unread());
        self.inbox.consume(taken);
        if !collected.is_whole() {
            self.collected = Some(collected);
            return false;
        }
        self.look_for_client();
        if !self.gone {
            let LongWrite { cookie, fua, .. } = collected.request();
            let written =
                collected.pieces().try_for_each(|(offset, piece)| self.export.write(offset, piece, fua));
            self.written(cookie, fua, written);
        }
        self.write_share = None;
        true
    }

    /// Requests may have waited here for long, behind a write that blocked or for room in the pool.
    fn look_for_client(&mut self) {
        if !self.gone && self.looked.elapsed() >= LOOK_EVERY {
            self.gone = self.socket.client().is_gone();
            self.looked = Instant::now();
        }
    }

    fn write(&mut self, write: &Write) {
        let bytes = &self.inbox.unread()[write.bytes.clone()];
        let written = match bytes {
            [] => Ok(()),
            bytes => self.export.write(write.offset, bytes, write.fua),
        };
        self.written(write.cookie, write.fua, written);
    }

    /// Answers a WRITE.
    fn written(&mut self, cookie: u64, fua: bool, written: std::io::Result<()>) {
        match written {
            Err(error) => self.replies.refused(self.outbox.open(), cookie, &refusal_of(&error)),
            Ok(()) if fua => self.add(Work::SyncWrite { cookie }, None),
            Ok(()) => self.replies.done(self.outbox.open(), cookie),
        }
    }

    fn begin(&mut self, request: Request) {
        let held = self.outbox.len() + self.reserved_bytes;
        let reply_bytes = Work::Request(request).reserved_bytes();
        if reply_bytes > 0 && held + reply_bytes > OWN_REPLY_BYTES {
            match self.limits.replies.try_take(reply_bytes) {
                Some(share) => self.add(Work::Request(request), Some(share)),
                None => {
                    self.pending = Some(request);
                    self.waiting = Some(Box::pin(self.limits.replies.clone().take(reply_bytes)));
                }
            }
            return;
        }
        if matches!(request.command, Command::Read { .. }) && self.read_cached(&request) {
            return;
        }
        self.add(Work::Request(request), None);
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

    fn add(&mut self, work: Work, share: Option<Share>) {
        self.in_flight += 1;
        self.reserved_bytes += work.reserved_bytes();
        let (export, answer) = (Arc::clone(&self.export), self.answer.clone());
        let client = self.socket.client();
        self.pool.add(Job { export, replies: self.replies, work, client, share, answer });
    }
}
