//! The link to the receiver: connect, agree where to start, send frames, follow acknowledgements; for ever
//! again.
//!
//! One connection at a time. The receiver's durable position is the only resume point: bytes in QUIC's
//! buffers are not received. Frames and control messages have tasks of their own, so that a full window never
//! delays an acknowledgement. A position that is not in our history ends in `needs-resync`, never in a guess.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use journal::reader::Reader;
use journal::tail::Tail;
use journal::{Lsn, Position};
use machine::text::Gate;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, MissedTickBehavior, interval, timeout};
use wire::instance::ShownRun;
use wire::message::{ErrorCode, Message, ReceiverCode, ReceiverState, VERSIONS, VolumeSummary};
use wire::{
    Backoff, Client, ControlReceiver, ControlSender, Fingerprint, FrameWriter, Identity, Instance, Tuning,
};

use crate::agent::{Agent, on_thread};
use crate::claim::Claims;
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
    /// What receivers may still make us believe.
    claims: Claims,
    /// Held while a gap is being remembered: one thread at a time waits for the state file's disk.
    remembering: Arc<tokio::sync::Mutex<()>>,
    /// What was said last of which copy we are.
    instance: Option<Instance>,
    /// Log lines that a receiver causes.
    gate: Gate,
}

/// For each step of the greeting, and for the goodbye.
const STEP: Duration = Duration::from_secs(10);
/// For small files of our own, of which copy we are and of what we remember; a disk that takes longer is not
/// waited for.
const FILE: Duration = Duration::from_secs(2);

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
        let claims = Claims::new(machine::now());
        Link {
            settings,
            agent,
            apply_now,
            receiver,
            refused_at: None,
            sent_before: 0,
            epoch: 0,
            claims,
            remembering: Arc::default(),
            instance: None,
            gate: Gate::default(),
        }
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
                        // What a receiver says ends its connection at worst: a fault of ours that it meets
                        // does no more.
                        end = machine::caught(self.converse(&connection, address, &mut backoff, &mut stopped)) => {
                            end.unwrap_or_else(|said| Ok(fault(&said)))
                        }
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
            if let Some(held_back) = self.gate.due(&why) {
                tracing::warn!(receiver = %self.settings.peer.address, %why, held_back, "link down");
            }
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
            let mut answer = receiver.next().await?;
            let was_asked = answer == Some(Message::InstanceRequest);
            if was_asked {
                let Instance { run, token, previous } = self.offer().await;
                sender.send(&Message::Instance { run, token, previous }).await?;
                answer = receiver.next().await?;
            }
            wire::Result::Ok((sender, receiver, answer, was_asked))
        });
        let Ok(greeted) = greeting.await else {
            return Ok(End::Lost("the receiver did not answer the greeting".into()));
        };
        let (mut sender, mut receiver, answer, was_asked) = greeted?;
        let resume = match answer {
            Some(Message::Welcome { resume, state, features, .. }) => {
                self.receiver = state;
                let resume = resume.map(Position::from);
                let epoch = self.agent.remembered().epoch.number;
                self.agent.shared.progress.questions().offer(features, resume.as_ref(), epoch);
                if was_asked {
                    self.answered().await;
                }
                resume
            }
            Some(Message::Error { code, reason }) => return Ok(self.refusal(None, code, reason).await),
            _ => return Ok(End::Lost("the receiver answered the greeting with something else".into())),
        };
        if let Some(claim) = &resume
            && let Err(why) = self.claims.judge(claim, &self.agent.remembered(), machine::now())
        {
            return Ok(End::Stuck(why));
        }
        self.judge_receiver(resume.map_or(0, |resume| resume.epoch.number), Lsn::ZERO).await;
        // What it lost since we heard of it last, restored from a backup or begun anew, it does not hold any
        // more.
        let held = resume.map_or(Lsn::ZERO, |resume| resume.lsn);
        self.agent.shared.progress.peer_changed(|peer| {
            peer.received = peer.received.min(held);
            peer.applied = peer.applied.min(held);
            peer.checkpoint = peer.checkpoint.min(held);
        });
        let reader = match self.open_reader(resume).await {
            Ok((reader, start)) => {
                self.agent.shared.progress.starts_at(&start);
                reader
            }
            Err(Unjoined::Transient(why)) => {
                return Ok(End::Lost(format!("the source journal cannot be read: {why}")));
            }
            Err(Unjoined::Apart(why)) => {
                self.apart(resume, &why).await;
                return Ok(End::Lost(why));
            }
        };
        backoff.reset();
        let instance = self.instance.map(|instance| ShownRun(&instance.run).to_string());
        tracing::info!(%address, instance, resume = resume.map_or(0, |resume| resume.lsn.0), "link up");
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

    /// What to say of which copy we are.
    async fn offer(&mut self) -> Instance {
        let copy = self.agent.copy.clone();
        // A disk that hangs keeps the lock: then the last word is said again, and no thread waits behind the
        // first.
        let offer = move || copy.try_lock().ok().map(|mut copy| copy.offer());
        if let Ok(Ok(Some(instance))) = timeout(FILE, on_thread("af-instance", offer)).await {
            self.instance = Some(instance);
        }
        // Without any word yet: known as something that nobody has heard of.
        self.instance.unwrap_or(Instance { run: [0; 16], token: [0; 16], previous: None })
    }

    /// The receiver took what was said.
    async fn answered(&mut self) {
        let copy = self.agent.copy.clone();
        let answered = move || copy.try_lock().ok().map(|mut copy| copy.answered());
        // What is not kept now is said again next time.
        let _ = timeout(FILE, on_thread("af-instance", answered)).await;
    }

    /// Another copy of this source tried to take our place.
    fn copy_seen(&self, address: &str, run: &[u8; 16], time_ns: u64) {
        let at = jiff::Timestamp::from_nanosecond(i128::from(time_ns))
            .map_or_else(|_| "?".to_owned(), |at| at.round(jiff::Unit::Second).unwrap_or(at).to_string());
        let told = format!(
            "another copy of this source (instance {}) tried to connect from {address}, last at {at}, and was refused: \
             stop it, or give it an identity and a group of its own",
            ShownRun(run)
        );
        if let Some(held_back) = self.gate.due(&format!("copy {address}")) {
            tracing::warn!(held_back, "{told}");
        }
        self.agent.shared.progress.peer_changed(|peer| peer.copy = Some((machine::now(), told)));
    }

    /// The newest that a receiver can hold: nothing is sent that was not captured before.
    fn newest(&self) -> (u64, Lsn) {
        let epoch = self.agent.remembered().epoch.number;
        let captured = Lsn(self.agent.shared.ring.captured_lsn());
        self.agent.shared.progress.position().order().max((epoch, captured))
    }

    /// Our history and the receiver's do not join. Its numbers become ours as far as they were believed.
    async fn apart(&mut self, resume: Option<Position>, why: &str) {
        if let Some(claim) = &resume {
            self.claims.take(claim, &self.agent.remembered());
        }
        self.needs_resync(resume, why).await;
    }

    /// What a receiver says is remembered by a thread: a state file whose disk hangs holds up neither
    /// heartbeats nor those who ask for the state. Then the next verdict says the same.
    async fn needs_resync(&self, resume: Option<Position>, why: &str) {
        let Ok(one) = self.remembering.clone().try_lock_owned() else { return };
        let (agent, epoch, why) = (self.agent.clone(), self.epoch, why.to_owned());
        let remember = move || {
            let _one = one;
            agent.needs_resync(epoch, resume.as_ref(), &why);
        };
        match timeout(FILE, on_thread("af-remember", remember)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the gap cannot be remembered"),
            Err(_) => tracing::warn!(
                "the disk of the state file does not answer; the gap is remembered when it does"
            ),
        }
    }

    fn hello(&self) -> Message {
        let state = self.agent.remembered();
        Message::Hello {
            versions: VERSIONS.to_vec(),
            features: wire::compare::FEATURE | wire::refetch::FEATURE | wire::instance::FEATURE,
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

    /// Finds the place in the journal, on a thread: its disk may not answer.
    async fn open_reader(
        &self,
        resume: Option<Position>,
    ) -> std::result::Result<(Reader, Position), Unjoined> {
        if self.tail().is_none() {
            return Err(Unjoined::Transient("there is none".to_owned()));
        }
        let agent = self.agent.clone();
        let open = move || {
            let (disk, dir) = (agent.surroundings.disk.clone(), agent.settings.dir.join("journal"));
            let mut reader = Reader::open(disk, &dir).map_err(|error| {
                if ship::is_transient(&error) {
                    Unjoined::Transient(error.to_string())
                } else {
                    Unjoined::Apart(format!("the source journal cannot be read: {error}"))
                }
            })?;
            let start = ship::choose_start(&mut reader, resume.as_ref(), &agent.remembered())?;
            Ok((reader, start))
        };
        match timeout(STEP, on_thread("af-seek", open)).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => Err(Unjoined::Transient(error.to_string())),
            Err(_) => Err(Unjoined::Transient("its disk does not answer".to_owned())),
        }
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
                        if (epoch, Lsn(received_lsn)) > self.newest() {
                            return Ok(End::Lost("the receiver acknowledges what was never sent".into()));
                        }
                        // Before the acknowledgement: who sees no backlog any more sees all that was sent for
                        // it.
                        self.count(connection);
                        let lsns = [received_lsn, applied_lsn, checkpoint_lsn].map(Lsn);
                        self.agent.shared.progress.acknowledged(epoch, lsns[0], lsns[1], lsns[2]);
                        if let Some(state) = state {
                            self.receiver = state;
                        }
                        self.judge_receiver(epoch, lsns[2]).await;
                    }
                    // Its clock, for nothing but to be compared with ours.
                    Some(Message::Heartbeat { time_ns, .. }) => {
                        self.agent.shared.progress.heard_clock(now_ns(), time_ns);
                    }
                    Some(Message::Error { code, reason }) => return Ok(self.refusal(resume, code, reason).await),
                    Some(Message::Bye { reason }) => return Ok(End::Lost(format!("the receiver left: {reason}"))),
                    Some(Message::CopySeen { address, run, time_ns, is_up_to_date }) => {
                        self.copy_seen(&address, &run, time_ns);
                        if is_up_to_date {
                            // What the copy has of us is out of date once the receiver holds a new token.
                            self.answered().await;
                            let Instance { run, token, previous } = self.offer().await;
                            sender.send(&Message::Instance { run, token, previous }).await?;
                        }
                    }
                    Some(_) => {}
                    None => return Ok(End::Lost("the receiver closed the connection".into())),
                },
                _ = beats.tick() => {
                    self.count(connection);
                    // Time first: everything captured after it has a later lsn than the one read next.
                    let time_ns = now_ns();
                    let captured_lsn = self.agent.shared.ring.captured_lsn();
                    let epoch = self.agent.remembered().epoch.number;
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
    /// A replica that needs a synchronisation is news only once the current epoch has reached it: until then
    /// that very synchronisation is on its way.
    async fn judge_receiver(&self, epoch: u64, checkpoint: Lsn) {
        let known = self.agent.remembered();
        let (current, start) = (known.epoch.number, known.epoch_start);
        let ReceiverState { code, why } = &self.receiver;
        let on_its_way = *code == ReceiverCode::NeedsResync && (epoch < current || checkpoint <= start);
        let is_news = *code != ReceiverCode::Ok && !on_its_way;
        // Said at once; remembering it may take as long as a disk hangs.
        self.agent.shared.progress.peer_changed(|peer| {
            let stands_still = *code == ReceiverCode::NeedsResync && is_news;
            // A synchronisation comes by itself.
            peer.stuck = is_news && !stands_still;
            peer.replica_failed = stands_still || *code == ReceiverCode::ReplicaFailed;
            peer.trouble = if is_news { format!("receiver: {why}") } else { String::new() };
        });
        match code {
            ReceiverCode::NeedsResync if is_news => self.needs_resync(None, why).await,
            ReceiverCode::Fenced => self.agent.shared.board.change(State::Fenced, why.clone()),
            _ => {}
        }
    }

    /// What the receiver's refusal means for the next attempt. Frames out of order may be a hiccup; refused
    /// twice from the same start, the histories do not join.
    async fn refusal(&mut self, resume: Option<Position>, code: ErrorCode, reason: String) -> End {
        let why = format!("the receiver refused: {reason}");
        match code {
            // It says who is who itself.
            ErrorCode::AnotherCopy => End::Stuck(reason),
            ErrorCode::GroupBusy | ErrorCode::Internal | ErrorCode::JournalFailed | ErrorCode::BadFrame => {
                End::Lost(why)
            }
            ErrorCode::OutOfOrder | ErrorCode::ChainMismatch if self.refused_at != Some(resume) => {
                self.refused_at = Some(resume);
                End::Lost(why)
            }
            ErrorCode::OutOfOrder | ErrorCode::ChainMismatch => {
                self.apart(resume, &why).await;
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
    /// Our history and the receiver's do not join, as somebody found who greeted in `epoch`: remembered
    /// durably, so that the synchronisation, of this run or of the next, begins a new epoch above everything
    /// that either side has seen.
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

    /// As [`needs_resync`](Self::needs_resync); the journal is set aside as well, lest the receiver ask for
    /// the same unreadable frame again.
    fn journal_is_damaged(&self, epoch: u64, why: &str) {
        if self.remembered().epoch.number != epoch {
            return;
        }
        if let Err(error) = self.state().update(|state| state.journal_damaged = true) {
            tracing::error!(%error, "the damage cannot be remembered in the state file");
        }
        self.needs_resync(epoch, None, why);
    }
}

/// A fault of this program, met by what a receiver said.
fn fault(said: &str) -> End {
    End::Stuck(format!("the link panicked ({said}): a fault of this program; it is tried again by itself"))
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
