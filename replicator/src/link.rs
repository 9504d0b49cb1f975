//! The link to the receiver: connect, agree where to start, send frames, follow acknowledgements; for ever again.
//!
//! One connection at a time. The receiver's durable position is the only resume point: bytes in QUIC's buffers are
//! not received. Frames and control messages have tasks of their own, so that a full window never delays an
//! acknowledgement. A position that is not in our history ends in `needs-resync`, never in a guess.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use journal::reader::Reader;
use journal::tail::Tail;
use journal::{Lsn, Position};
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, MissedTickBehavior, interval, timeout};
use wire::message::{ErrorCode, Message, ReceiverCode, ReceiverState, VERSIONS, VolumeSummary};
use wire::{Backoff, Client, ControlReceiver, ControlSender, Fingerprint, FrameWriter, Identity, Tuning};

use crate::agent::Agent;
use crate::clock::now_ns;
use crate::error::{Error, ErrorKind, Result};
use crate::refetch;
use crate::ship::{self, Unjoined};
use crate::state::Gap;
use crate::status::State;

/// What the link needs of the settings.
pub struct LinkSettings {
    client: Client,
    peer: conf::Peer,
}

impl LinkSettings {
    /// Makes the QUIC endpoint; within a tokio runtime.
    ///
    /// # Errors
    /// The socket or the settings of the endpoint.
    pub fn new(
        settings: &conf::Replicator,
        identity: Identity,
        socket: Option<Arc<dyn quinn::AsyncUdpSocket>>,
    ) -> Result<LinkSettings> {
        let quic = &settings.quic;
        let tuning = Tuning {
            stream_window_bytes: quic.stream_window,
            connection_window_bytes: quic.connection_window,
            send_window_bytes: quic.send_window,
            mtu_bytes: quic.mtu,
            socket_buffer_bytes: quic.socket_buffer,
            keep_alive: settings.receiver.idle_timeout / 3,
            idle_timeout: settings.receiver.idle_timeout,
        };
        let pinned = Fingerprint(settings.receiver.identity);
        let client = match socket {
            Some(socket) => Client::on(socket, &identity, pinned, &tuning),
            None => Client::new(&identity, pinned, &tuning),
        };
        let client =
            client.map_err(|error| Error::because(ErrorKind::Settings, "make the QUIC endpoint", error))?;
        Ok(LinkSettings { client, peer: settings.receiver.clone() })
    }
}

/// The link task.
pub struct Link {
    settings: LinkSettings,
    agent: Arc<Agent>,
    apply_now: mpsc::Receiver<Lsn>,
    /// What the receiver last said of itself.
    receiver: ReceiverState,
    /// Where we started when the receiver last refused what followed.
    refused_at: Option<Option<Position>>,
    /// Bytes sent over connections that are over.
    sent_before: u64,
    /// The epoch that was greeted with: what is said of an older one says nothing of the current one.
    epoch: u64,
}

/// A receiver that claims to hold more than this is broken or hostile: what is remembered of it could never be passed.
const MAX_PLAUSIBLE: u64 = 1 << 62;
/// For each step of the greeting, and for the goodbye.
const STEP: Duration = Duration::from_secs(10);

/// How a connection ended.
enum End {
    /// By our own stop.
    Stopped,
    /// It may work next time.
    Lost(String),
    /// It will not work by itself.
    Stuck(String),
}

impl Link {
    pub(crate) fn new(settings: LinkSettings, agent: Arc<Agent>, apply_now: mpsc::Receiver<Lsn>) -> Link {
        let receiver = ReceiverState { code: ReceiverCode::Ok, why: String::new() };
        Link { settings, agent, apply_now, receiver, refused_at: None, sent_before: 0, epoch: 0 }
    }

    /// Runs until stopped.
    pub async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        let mut backoff = Backoff::new(self.settings.peer.reconnect_min, self.settings.peer.reconnect_max);
        let mut epochs = self.agent.shared.progress.watch_epochs();
        loop {
            self.greets_in(*epochs.borrow_and_update());
            if self.tail().is_none() {
                // Nothing can be sent until the journal begins anew.
                tokio::select! {
                    _ = stopped.wait_for(|stopped| *stopped) => return,
                    _ = epochs.changed() => continue,
                }
            }
            let attempt = tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => return,
                end = self.settings.client.connect(&self.settings.peer.address, self.settings.peer.connect_timeout) => end,
            };
            let end = match attempt {
                Ok(connection) => {
                    let address = connection.remote_address();
                    let end = tokio::select! {
                        end = self.converse(&connection, address, &mut backoff, &mut stopped) => end,
                        _ = epochs.changed() => Ok(End::Lost("a new epoch begins".into())),
                    };
                    let end = end.unwrap_or_else(|error| End::Lost(describe(&error)));
                    connection.close(0_u32.into(), b"done");
                    self.sent_before += self.count(&connection);
                    end
                }
                Err(error) => End::Lost(describe(&error)),
            };
            let (why, stuck) = match end {
                End::Stopped => {
                    // Best effort: the receiver would notice by silence anyway.
                    let _ = timeout(Duration::from_secs(1), self.settings.client.wait_idle()).await;
                    return;
                }
                End::Lost(why) => (why, false),
                End::Stuck(why) => (why, true),
            };
            tracing::warn!(receiver = %self.settings.peer.address, %why, "link down");
            self.agent.shared.progress.peer_changed(|peer| {
                peer.connected = None;
                peer.trouble = why;
                peer.stuck = stuck;
            });
            let pause = if stuck { self.settings.peer.reconnect_max } else { backoff.pause() };
            tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => return,
                () = tokio::time::sleep(pause) => {}
                _ = epochs.changed() => backoff.reset(),
            }
        }
    }

    /// Bytes sent over a connection so far, told to all.
    fn count(&self, connection: &quinn::Connection) -> u64 {
        let sent = connection.stats().udp_tx.bytes;
        self.agent.shared.progress.sent(self.sent_before + sent);
        sent
    }

    fn greets_in(&mut self, epoch: u64) {
        if std::mem::replace(&mut self.epoch, epoch) != epoch {
            self.refused_at = None;
        }
    }

    /// One connection from hello to its end.
    async fn converse(
        &mut self,
        connection: &quinn::Connection,
        address: SocketAddr,
        backoff: &mut Backoff,
        stopped: &mut watch::Receiver<bool>,
    ) -> wire::Result<End> {
        let greeting = timeout(STEP, async {
            let (mut sender, mut receiver) = wire::framing::open(connection).await?;
            sender.send(&self.hello()).await?;
            let answer = receiver.next().await?;
            wire::Result::Ok((sender, receiver, answer))
        });
        let Ok(greeted) = greeting.await else {
            return Ok(End::Lost("the receiver did not answer the greeting".into()));
        };
        let (mut sender, mut receiver, answer) = greeted?;
        let resume = match answer {
            Some(Message::Welcome { resume, state, features, .. }) => {
                self.receiver = state;
                self.agent.shared.progress.questions().offer(features);
                resume.map(Position::from)
            }
            Some(Message::Error { code, reason }) => return Ok(self.refusal(None, code, reason)),
            _ => return Ok(End::Lost("the receiver answered the greeting with something else".into())),
        };
        if resume.is_some_and(|resume| resume.epoch.number >= MAX_PLAUSIBLE || resume.lsn.0 >= MAX_PLAUSIBLE)
        {
            return Ok(End::Stuck("the receiver claims a position that no source ever reached".into()));
        }
        self.judge_receiver(resume.map_or(0, |resume| resume.epoch.number), Lsn::ZERO);
        // What it lost since we heard of it last, restored from a backup or begun anew, it does not hold any more.
        let held = resume.map_or(Lsn::ZERO, |resume| resume.lsn);
        self.agent.shared.progress.peer_changed(|peer| {
            peer.received = peer.received.min(held);
            peer.applied = peer.applied.min(held);
            peer.checkpoint = peer.checkpoint.min(held);
        });
        let reader = match self.open_reader(resume) {
            Ok((reader, start)) => {
                self.agent.shared.progress.starts_at(&start);
                reader
            }
            Err(Unjoined::Transient(why)) => {
                return Ok(End::Lost(format!("the source journal cannot be read: {why}")));
            }
            Err(Unjoined::Apart(why)) => {
                self.agent.needs_resync(self.epoch, resume.as_ref(), &why);
                return Ok(End::Lost(why));
            }
        };
        backoff.reset();
        tracing::info!(%address, resume = resume.map_or(0, |resume| resume.lsn.0), "link up");
        self.agent.shared.progress.peer_changed(|peer| {
            peer.connected = Some(address.to_string());
            if !peer.stuck {
                peer.trouble.clear();
            }
        });
        if let Some(resume) = resume {
            let seen = self.agent.shared.progress.peer();
            let (epoch, lsn) = (resume.epoch.number, resume.lsn);
            self.agent.shared.progress.acknowledged(epoch, lsn, seen.applied, seen.checkpoint);
        }
        let frames = self.start_reader(reader);
        let Ok(writer) = timeout(STEP, FrameWriter::open(connection)).await else {
            return Ok(End::Lost("the receiver grants no stream for frames".into()));
        };
        let writer = writer?;
        let mut sending = tokio::spawn(send_frames(writer, frames));
        let agent = self.agent.clone();
        let carried = agent.shared.progress.questions();
        let Some(tail) = self.tail() else {
            return Ok(End::Lost("the source journal is over".into()));
        };
        let journal = agent.settings.dir.join("journal");
        let disk = agent.surroundings.disk.clone();
        let end = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => End::Stopped,
            sent = &mut sending => match sent {
                Ok(Ok(why)) => End::Lost(why),
                Ok(Err(error)) => End::Lost(describe(&error)),
                Err(_) => End::Lost("the sending task ended".into()),
            },
            error = carried.carry(connection) => End::Lost(describe(&error)),
            error = refetch::serve(connection, &disk, &journal, &tail) => End::Lost(describe(&error)),
            end = self.follow(connection, &mut sender, &mut receiver, resume) => end.unwrap_or_else(|error| End::Lost(describe(&error))),
        };
        sending.abort();
        if matches!(end, End::Stopped) {
            // Best effort: silence says the same a little later.
            let _ = timeout(STEP, sender.send(&Message::Bye { reason: "the source stops".into() })).await;
        }
        Ok(end)
    }

    fn hello(&self) -> Message {
        let file = self.agent.state();
        let state = file.get();
        Message::Hello {
            versions: VERSIONS.to_vec(),
            features: wire::compare::FEATURE | wire::refetch::FEATURE,
            group_id: state.group.0,
            group: self.agent.settings.group.clone(),
            lineage: state.lineage.0,
            epoch: state.epoch.number,
            epoch_id: state.epoch.id.0,
            volumes: state
                .volumes
                .iter()
                .filter(|volume| volume.present)
                .map(|volume| VolumeSummary {
                    id: volume.id.0,
                    uuid: volume.uuid.0,
                    name: volume.name.clone(),
                    size_bytes: volume.size_bytes,
                    sector_bytes: 512,
                })
                .collect(),
            agent: concat!("afterimage/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    fn open_reader(&self, resume: Option<Position>) -> std::result::Result<(Reader, Position), Unjoined> {
        if self.tail().is_none() {
            return Err(Unjoined::Transient("there is none".to_owned()));
        }
        let disk = self.agent.surroundings.disk.clone();
        let mut reader = Reader::open(disk, &self.agent.settings.dir.join("journal")).map_err(|error| {
            if ship::is_transient(&error) {
                Unjoined::Transient(error.to_string())
            } else {
                Unjoined::Apart(format!("the source journal cannot be read: {error}"))
            }
        })?;
        let start = ship::choose_start(&mut reader, resume.as_ref(), self.agent.state().get())?;
        Ok((reader, start))
    }

    fn tail(&self) -> Option<Arc<Tail>> {
        self.agent.shared.tail.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start_reader(&self, reader: Reader) -> mpsc::Receiver<Bytes> {
        let (frames, queue) = mpsc::channel(ship::READ_AHEAD_FRAMES);
        let Some(tail) = self.tail() else { return queue };
        let (agent, epoch) = (self.agent.clone(), self.epoch);
        let read = move || {
            if let Err(error) = ship::read_ahead(reader, &tail, &agent.shared.progress, &frames) {
                tracing::error!(%error, "the source journal cannot be read");
                if matches!(error.kind, journal::ErrorKind::Corrupt | journal::ErrorKind::Malformed) {
                    agent.journal_is_damaged(epoch, &format!("the source journal is damaged: {error}"));
                }
            }
        };
        if let Err(error) = machine::spawn("af-ship", read) {
            // The queue is closed at once, which ends the connection; the next attempt may find a thread.
            tracing::error!(%error, "start the reader of the source journal");
        }
        queue
    }

    /// Control messages in both directions until the connection ends.
    async fn follow(
        &mut self,
        connection: &quinn::Connection,
        sender: &mut ControlSender,
        receiver: &mut ControlReceiver,
        resume: Option<Position>,
    ) -> wire::Result<End> {
        let mut beats = interval(self.settings.peer.heartbeat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut asked = Lsn::ZERO;
        loop {
            tokio::select! {
                message = receiver.next() => match message? {
                    Some(Message::Ack { epoch, received_lsn, applied_lsn, checkpoint_lsn, state }) => {
                        if !(received_lsn >= applied_lsn && applied_lsn >= checkpoint_lsn) {
                            return Ok(End::Lost("the receiver's positions contradict each other".into()));
                        }
                        let lsns = [received_lsn, applied_lsn, checkpoint_lsn].map(Lsn);
                        self.agent.shared.progress.acknowledged(epoch, lsns[0], lsns[1], lsns[2]);
                        if let Some(state) = state {
                            self.receiver = state;
                        }
                        self.judge_receiver(epoch, lsns[2]);
                    }
                    Some(Message::Error { code, reason }) => return Ok(self.refusal(resume, code, reason)),
                    Some(Message::Bye { reason }) => return Ok(End::Lost(format!("the receiver left: {reason}"))),
                    Some(_) => {}
                    None => return Ok(End::Lost("the receiver closed the connection".into())),
                },
                _ = beats.tick() => {
                    self.count(connection);
                    // Time first: everything captured after it has a later lsn than the one read next.
                    let time_ns = now_ns();
                    let captured_lsn = self.agent.shared.ring.captured_lsn();
                    let epoch = self.agent.state().get().epoch.number;
                    if self.agent.is_recording() {
                        sender.send(&Message::Heartbeat { captured_lsn, epoch, time_ns }).await?;
                    }
                }
                Some(lsn) = self.apply_now.recv() => {
                    if lsn > asked {
                        asked = lsn;
                        sender.send(&Message::ApplyNow { lsn: lsn.0 }).await?;
                    }
                }
            }
        }
    }

    /// What the receiver's state means for us, when it holds `epoch` and its replica is at `checkpoint`.
    ///
    /// A replica that needs a synchronisation is news only once the current epoch has reached it: until then that very
    /// synchronisation is on its way.
    fn judge_receiver(&self, epoch: u64, checkpoint: Lsn) {
        let (current, start) = {
            let file = self.agent.state();
            (file.get().epoch.number, file.get().epoch_start)
        };
        let ReceiverState { code, why } = &self.receiver;
        let on_its_way = *code == ReceiverCode::NeedsResync && (epoch < current || checkpoint <= start);
        let is_news = *code != ReceiverCode::Ok && !on_its_way;
        match code {
            ReceiverCode::NeedsResync if is_news => self.agent.needs_resync(self.epoch, None, why),
            ReceiverCode::Fenced => self.agent.shared.board.change(State::Fenced, why.clone()),
            _ => {}
        }
        self.agent.shared.progress.peer_changed(|peer| {
            // A synchronisation comes by itself.
            peer.stuck = is_news && *code != ReceiverCode::NeedsResync;
            peer.trouble = if is_news { format!("receiver: {why}") } else { String::new() };
        });
    }

    /// What the receiver's refusal means for the next attempt. Frames out of order may be a hiccup; refused twice from the
    /// same start, the histories do not join.
    fn refusal(&mut self, resume: Option<Position>, code: ErrorCode, reason: String) -> End {
        let why = format!("the receiver refused: {reason}");
        match code {
            ErrorCode::GroupBusy | ErrorCode::Internal | ErrorCode::JournalFailed | ErrorCode::BadFrame => {
                End::Lost(why)
            }
            ErrorCode::OutOfOrder | ErrorCode::ChainMismatch if self.refused_at != Some(resume) => {
                self.refused_at = Some(resume);
                End::Lost(why)
            }
            ErrorCode::OutOfOrder | ErrorCode::ChainMismatch => {
                self.agent.needs_resync(self.epoch, resume.as_ref(), &why);
                End::Lost(why)
            }
            ErrorCode::Fenced => {
                self.agent.shared.board.change(State::Fenced, why.clone());
                End::Stuck(why)
            }
            _ => End::Stuck(why),
        }
    }
}

impl Agent {
    /// Our history and the receiver's do not join, as somebody found who greeted in `epoch`: remembered durably, so that
    /// the synchronisation, of this run or of the next, begins a new epoch above everything that either side has seen.
    fn needs_resync(&self, epoch: u64, resume: Option<&Position>, why: &str) {
        let gap = Gap { cause: why.to_owned(), since_ns: now_ns() };
        let mut file = self.state();
        if file.get().epoch.number != epoch {
            return; // Of an epoch that is over.
        }
        let remembered = file.update(|state| {
            if let Some(resume) = resume {
                state.above_epoch = state.above_epoch.max(resume.epoch.number);
                state.above_lsn = state.above_lsn.max(resume.lsn);
            }
            state.needs_resync.get_or_insert(gap);
            // Histories that do not join are joined by a new epoch, whatever the ring remembers.
            state.gap_in_ring = false;
        });
        if let Err(error) = remembered {
            tracing::error!(%error, "the gap cannot be remembered in the state file");
        }
        self.shared.apart.store(true, Ordering::Release);
        self.shared.board.change(State::NeedsResync, format!("{why}; a new epoch begins by itself"));
    }

    /// As [`needs_resync`](Self::needs_resync); the journal is set aside as well, lest the receiver ask for the same
    /// unreadable frame again.
    fn journal_is_damaged(&self, epoch: u64, why: &str) {
        if self.state().get().epoch.number != epoch {
            return;
        }
        if let Err(error) = self.state().update(|state| state.journal_damaged = true) {
            tracing::error!(%error, "the damage cannot be remembered in the state file");
        }
        self.needs_resync(epoch, None, why);
    }
}

async fn send_frames(mut writer: FrameWriter, mut frames: mpsc::Receiver<Bytes>) -> wire::Result<String> {
    while let Some(frame) = frames.recv().await {
        writer.send(frame).await?;
    }
    writer.finish();
    Ok("the source journal's reader ended".to_owned())
}

fn describe(error: &wire::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
