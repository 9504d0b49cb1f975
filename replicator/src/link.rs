//! The link to the receiver: connect, agree where to start, send frames, follow acknowledgements; for ever again.
//!
//! One connection at a time. The receiver's durable position is the only resume point: bytes in QUIC's buffers are
//! not received. Frames and control messages have tasks of their own, so that a full window never delays an
//! acknowledgement. A position that is not in our history ends in `needs-resync`, never in a guess.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use journal::io::{Disk, RealDisk};
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
use crate::ship;
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
    pub fn new(settings: &conf::Replicator, identity: Identity) -> Result<LinkSettings> {
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
        let client = Client::new(&identity, Fingerprint(settings.receiver.identity), &tuning)
            .map_err(|error| Error::because(ErrorKind::Settings, "make the QUIC endpoint", error))?;
        Ok(LinkSettings { client, peer: settings.receiver.clone() })
    }
}

/// The link task.
pub struct Link {
    settings: LinkSettings,
    agent: Arc<Agent>,
    tail: Arc<Tail>,
    apply_now: mpsc::Receiver<Lsn>,
}

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
    pub(crate) fn new(
        settings: LinkSettings,
        agent: Arc<Agent>,
        tail: Arc<Tail>,
        apply_now: mpsc::Receiver<Lsn>,
    ) -> Link {
        Link { settings, agent, tail, apply_now }
    }

    /// Runs until stopped.
    pub async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        let mut backoff = Backoff::new(self.settings.peer.reconnect_min, self.settings.peer.reconnect_max);
        loop {
            let attempt = tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => return,
                end = self.settings.client.connect(&self.settings.peer.address, self.settings.peer.connect_timeout) => end,
            };
            let end = match attempt {
                Ok(connection) => {
                    let address = connection.remote_address();
                    let end = match self.converse(&connection, address, &mut backoff, &mut stopped).await {
                        Ok(end) => end,
                        Err(error) => End::Lost(describe(&error)),
                    };
                    connection.close(0_u32.into(), b"done");
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
            }
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
        let (mut sender, mut receiver) = wire::framing::open(connection).await?;
        sender.send(&self.hello()).await?;
        let resume = match timeout(self.settings.peer.connect_timeout, receiver.next()).await {
            Ok(Ok(Some(Message::Welcome { resume, state, .. }))) => {
                let resume = resume.map(Position::from);
                self.note_state(&state, resume.map_or(0, |resume| resume.epoch.number));
                resume
            }
            Ok(Ok(Some(Message::Error { code, reason }))) => return Ok(refusal(code, reason)),
            Ok(Ok(_)) => {
                return Ok(End::Lost("the receiver answered the greeting with something else".into()));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(End::Lost("the receiver did not answer the greeting".into())),
        };
        let reader = match self.open_reader(resume) {
            Ok(reader) => reader,
            Err(why) => return Ok(End::Stuck(self.needs_resync(resume, why))),
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
            let (applied, checkpoint) = (seen.applied.min(resume.lsn), seen.checkpoint.min(resume.lsn));
            self.agent.shared.progress.acknowledged(resume.epoch.number, resume.lsn, applied, checkpoint);
        }
        let frames = self.start_reader(reader);
        let writer = FrameWriter::open(connection).await?;
        let mut sending = tokio::spawn(send_frames(writer, frames));
        let end = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => End::Stopped,
            sent = &mut sending => match sent {
                Ok(Ok(why)) => End::Lost(why),
                Ok(Err(error)) => End::Lost(describe(&error)),
                Err(_) => End::Lost("the sending task ended".into()),
            },
            end = self.follow(&mut sender, &mut receiver) => end?,
        };
        sending.abort();
        if matches!(end, End::Stopped) {
            let _ = sender.send(&Message::Bye { reason: "the source stops".into() }).await;
        }
        Ok(end)
    }

    fn hello(&self) -> Message {
        let file = self.agent.state();
        let state = file.get();
        Message::Hello {
            versions: VERSIONS.to_vec(),
            features: 0,
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

    fn open_reader(&self, resume: Option<Position>) -> std::result::Result<Reader, String> {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let mut reader = Reader::open(disk, &self.agent.settings.dir.join("journal"))
            .map_err(|error| format!("the source journal cannot be read: {error}"))?;
        ship::choose_start(&mut reader, resume.as_ref(), self.agent.state().get())?;
        Ok(reader)
    }

    fn start_reader(&self, reader: Reader) -> mpsc::Receiver<Bytes> {
        let (frames, queue) = mpsc::channel(ship::READ_AHEAD_FRAMES);
        let (agent, tail) = (self.agent.clone(), self.tail.clone());
        let read = move || {
            if let Err(error) = ship::read_ahead(reader, &tail, &agent.shared.progress, &frames) {
                tracing::error!(%error, "the source journal cannot be read");
                let why = format!("the source journal cannot be read: {error}");
                agent.needs_resync(None, &why);
            }
        };
        if let Err(error) = thread::Builder::new().name("af-ship".to_owned()).spawn(read) {
            // The queue is closed at once, which ends the connection; the next attempt may find a thread.
            tracing::error!(%error, "start the reader of the source journal");
        }
        queue
    }

    fn needs_resync(&self, resume: Option<Position>, why: String) -> String {
        self.agent.needs_resync(resume.as_ref(), &why);
        format!("{why}; restart the agent to synchronise")
    }

    /// Control messages in both directions until the connection ends.
    async fn follow(
        &mut self,
        sender: &mut ControlSender,
        receiver: &mut ControlReceiver,
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
                            self.note_state(&state, epoch);
                        }
                    }
                    Some(Message::Error { code, reason }) => return Ok(refusal(code, reason)),
                    Some(Message::Bye { reason }) => return Ok(End::Lost(format!("the receiver left: {reason}"))),
                    Some(_) => {}
                    None => return Ok(End::Lost("the receiver closed the connection".into())),
                },
                _ = beats.tick() => {
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

    /// The receiver's state when it held `epoch`. A replica that needs a synchronisation is news only while nothing
    /// newer is on its way: the current epoch may be that synchronisation.
    fn note_state(&self, state: &ReceiverState, epoch: u64) {
        let outdated =
            state.code == ReceiverCode::NeedsResync && epoch < self.agent.state().get().epoch.number;
        let stuck = state.code != ReceiverCode::Ok && !outdated;
        match state.code {
            ReceiverCode::NeedsResync if stuck => self.agent.needs_resync(None, &state.why),
            ReceiverCode::Rewound => self.agent.shared.board.change(State::Rewound, state.why.clone()),
            ReceiverCode::Fenced => self.agent.shared.board.change(State::Fenced, state.why.clone()),
            ReceiverCode::Ok if self.agent.shared.board.state().0 == State::Rewound => {
                self.agent.shared.board.change(State::Replicating, "");
            }
            _ => {}
        }
        self.agent.shared.progress.peer_changed(|peer| {
            peer.stuck = stuck;
            peer.trouble = if stuck { format!("receiver: {}", state.why) } else { String::new() };
        });
    }
}

impl Agent {
    /// Our history and the receiver's do not join: remembered durably, so that the next start synchronises in a new
    /// epoch above everything that either side has seen.
    fn needs_resync(&self, resume: Option<&Position>, why: &str) {
        let gap = Gap { cause: why.to_owned(), since_ns: now_ns() };
        let remembered = self.state().update(|state| {
            if let Some(resume) = resume {
                state.above_epoch = state.above_epoch.max(resume.epoch.number);
                state.above_lsn = state.above_lsn.max(resume.lsn);
            }
            state.needs_resync.get_or_insert(gap);
        });
        if let Err(error) = remembered {
            tracing::error!(%error, "the gap cannot be remembered in the state file");
        }
        self.shared.board.change(State::NeedsResync, format!("{why}; restart the agent to synchronise"));
    }
}

/// What the receiver's refusal means for the next attempt.
fn refusal(code: ErrorCode, reason: String) -> End {
    match code {
        ErrorCode::GroupBusy | ErrorCode::Internal | ErrorCode::JournalFailed | ErrorCode::BadFrame => {
            End::Lost(format!("the receiver refused: {reason}"))
        }
        _ => End::Stuck(format!("the receiver refused: {reason}")),
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
