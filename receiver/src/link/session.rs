//! A session: frames in, acknowledgements out, until one of many ends.
//!
//! Two halves run side by side. The reading half waits for frames, control messages, a refusal by ingest, a
//! newer connection of the same source, and the agent's stop; the first of them to happen is the session's
//! [`End`]. The speaking half owns the control stream's sending side: nothing else ever writes to it, so a
//! message is never cut.

use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use journal::Lsn;
use quinn::Connection;
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use wire::message::{ErrorCode, Message, ReceiverState};
use wire::{ControlReceiver, ControlSender, Fingerprint, FrameReader, Instance};

use super::greet::Greeting;
use super::{CLOSED, Chain, FAREWELL_TIMEOUT, GREETING_TIMEOUT, farewell, stopping};
use crate::agent::attach::{Attached, CopySeen, Newcomer, Notice};
use crate::agent::group::Group;
use crate::agent::progress::Progress;
use crate::agent::{Shared, now_ns};
use crate::ingest::Refusal;
use crate::state::Moment;

/// An acknowledgement goes out at least this often, so that the source knows us alive.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Acknowledgements are at least this far apart: one covers all that became durable meanwhile.
const ACK_SPACING: Duration = Duration::from_millis(1);

/// What a session speaks through.
pub(super) struct Wires {
    pub connection: Connection,
    pub sender: ControlSender,
    pub receiver: ControlReceiver,
    pub peer: SocketAddr,
    pub identity: Fingerprint,
}

/// Why a session ended.
#[derive(Debug)]
pub(super) enum End {
    /// The connection broke or was closed by the peer.
    Lost(String),
    /// The source said goodbye.
    Bye(String),
    /// We end it, and the peer is told why.
    Refused(Refusal),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Lost(why) => write!(f, "connection lost: {why}"),
            End::Bye(why) => write!(f, "the source left: {why}"),
            End::Refused(refusal) => write!(f, "refused: {refusal}"),
        }
    }
}

impl From<wire::Error> for End {
    fn from(error: wire::Error) -> End {
        match error.kind {
            wire::ErrorKind::Malformed => End::Refused(Refusal::new(ErrorCode::BadFrame, error.to_string())),
            _ => End::Lost(Chain(&error).to_string()),
        }
    }
}

/// Runs a session of a greeted peer to its end.
///
/// `greeted` is called once it has its group's place.
pub(super) async fn run(
    mut wires: Wires,
    group: &Arc<Group>,
    shared: &Shared,
    hello: &Greeting,
    greeted: impl FnOnce(),
) -> End {
    let attached = match attach(&mut wires, group, hello).await {
        Ok(attached) => attached,
        Err(End::Refused(refusal)) => {
            farewell(wires.sender, refusal.clone()).await;
            return End::Refused(refusal);
        }
        Err(end) => return end,
    };
    // From here on it may send: at most one connection of a group has these windows.
    greeted();
    if let Err(error) = shared.tuning.admit(&wires.connection) {
        return error.into();
    }
    let mut progress = group.progress();
    let state = progress.borrow_and_update().receiver_state();
    let welcome = Message::Welcome {
        version: hello.version,
        features: features(&shared.settings, group.name()),
        resume: attached.resume.map(Into::into),
        state: state.clone(),
        agent: concat!("afterimage ", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    if let Err(error) = wires.sender.send(&welcome).await {
        return error.into();
    }
    let Wires { connection, sender, receiver, .. } = wires;
    let (end, ended) = oneshot::channel();
    let notices = attached.notices.clone();
    let reading = async {
        let reason = first_end(&connection, receiver, group, shared, &attached, hello.features).await;
        // Nothing more is handed to ingest: a newer connection need not wait for our goodbye.
        drop(attached);
        // The speaking half may have ended first, with the connection.
        let _ = end.send(reason);
    };
    let speaking = async {
        let notices = Notices { notices, tells: hello.tells_copies(), told: None };
        let end = speak(sender, progress, state, notices, ended).await;
        connection.close(CLOSED.into(), b"");
        end
    };
    tokio::join!(reading, speaking).1
}

/// Asks which copy of the source it is, where it can tell, and gives it the group's place.
async fn attach(wires: &mut Wires, group: &Group, hello: &Greeting) -> Result<Attached, End> {
    let mut instance = None;
    if hello.tells_copies() {
        wires.sender.send(&Message::InstanceRequest).await?;
        match timeout(GREETING_TIMEOUT, wires.receiver.next()).await {
            Ok(Ok(Some(Message::Instance { run, token, previous }))) => {
                instance = Some(Instance { run, token, previous });
            }
            Ok(Ok(Some(_))) => {
                return Err(End::Refused(Refusal::new(
                    ErrorCode::BadFrame,
                    "not the answer to what was asked",
                )));
            }
            Ok(Ok(None)) => return Err(End::Lost("the source closed the control stream".to_owned())),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(End::Lost("the source did not say in time which copy it is".to_owned())),
        }
    }
    let newcomer = Newcomer {
        address: wires.peer,
        who: format!("{} {}", wires.peer, wires.identity),
        instance,
        connection: wires.connection.clone(),
    };
    let gone = wires.connection.closed();
    tokio::select! {
        attached = group.attach(newcomer) => attached.map_err(End::Refused),
        // One that has left waits for no place.
        error = gone => Err(wire::Error::connection("attach", error).into()),
    }
}

/// What this side offers for a group.
fn features(settings: &conf::Receiver, group: &str) -> u64 {
    let is_seeded = settings.replica.iter().any(|replica| replica.group == group && replica.seeded);
    wire::compare::FEATURE | if is_seeded { wire::compare::SEEDED } else { 0 }
}

/// The reading half.
async fn first_end(
    connection: &Connection,
    receiver: ControlReceiver,
    group: &Group,
    shared: &Shared,
    attached: &Attached,
    features: u64,
) -> End {
    let mut stop = shared.stopping.subscribe();
    tokio::select! {
        // What ingest or the agent says comes before the errors on the wire that follow from it.
        biased;
        refusal = attached.session.refused() => End::Refused(refusal),
        () = attached.replaced() => {
            End::Refused(Refusal::new(ErrorCode::GroupBusy, "a newer connection of this source took over"))
        }
        _ = shared.failure.wait() => {
            End::Refused(Refusal::new(ErrorCode::JournalFailed, "the receiver failed and stops acknowledging"))
        }
        _ = stop.wait_for(|stop| *stop) => End::Refused(stopping()),
        end = control(receiver, group, attached) => end,
        end = super::questions::answer(connection, group) => end,
        error = group.refetch(connection, features) => error.into(),
        end = frames(connection, group, attached) => end,
    }
}

/// Frames, stream after stream in the order in which the source opened them.
async fn frames(connection: &Connection, group: &Group, attached: &Attached) -> End {
    loop {
        let stream = match connection.accept_uni().await {
            Ok(stream) => stream,
            Err(error) => return End::from(wire::Error::connection("frames", error)),
        };
        let mut reader = FrameReader::new(stream);
        loop {
            match reader.next().await {
                Ok(Some(frame)) => {
                    let (header, bytes) = (frame.header, frame.bytes);
                    if group.ingest.submit(&attached.session, header, bytes).await.is_err() {
                        return End::Refused(stopping());
                    }
                }
                Ok(None) => break,
                Err(error) => return error.into(),
            }
        }
    }
}

/// Control messages of the source.
async fn control(mut receiver: ControlReceiver, group: &Group, attached: &Attached) -> End {
    loop {
        match receiver.next().await {
            Ok(Some(Message::Heartbeat { captured_lsn: lsn, .. } | Message::ApplyNow { lsn }))
                if lsn > Lsn::MAX.0 =>
            {
                let what = format!("lsn {lsn} is beyond what a position can be");
                return End::Refused(Refusal::new(ErrorCode::BadFrame, what));
            }
            Ok(Some(Message::Heartbeat { captured_lsn, time_ns, .. })) => {
                group.heartbeat(Moment { lsn: Lsn(captured_lsn), time_ns });
            }
            Ok(Some(Message::ApplyNow { lsn })) => group.apply_now(Lsn(lsn)),
            Ok(Some(Message::Instance { run, token, previous })) => {
                group.goes_on(attached, Instance { run, token, previous }).await;
            }
            Ok(Some(Message::Bye { reason })) => return End::Bye(reason),
            Ok(Some(Message::Error { reason, .. })) => return End::Bye(reason),
            Ok(Some(_)) => {
                return End::Refused(Refusal::new(
                    ErrorCode::BadFrame,
                    "a message that a source does not send",
                ));
            }
            Ok(None) => return End::Lost("the source closed the control stream".to_owned()),
            Err(error) => return error.into(),
        }
    }
}

/// The speaking half: acknowledgements, and at the end the reason.
async fn speak(
    mut sender: ControlSender,
    mut progress: watch::Receiver<Progress>,
    mut told: ReceiverState,
    mut notices: Notices,
    mut ended: oneshot::Receiver<End>,
) -> End {
    let mut beat = interval(HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut copies = None;
    let end = loop {
        let is_beat = tokio::select! {
            biased;
            end = &mut ended => break end,
            changed = progress.changed() => match changed {
                Ok(()) => false,
                Err(_) => break Ok(End::Refused(stopping())),
            },
            copy = notices.next() => {
                copies = copy;
                true
            }
            _ = beat.tick() => true,
        };
        let (ack, state) = acknowledgement(&progress.borrow_and_update(), &told);
        // Our clock, so that both sides see how they differ; a source of before that passes over it.
        let Message::Ack { epoch, received_lsn: captured_lsn, .. } = ack else { unreachable!("just made") };
        let clock = is_beat.then(|| Message::Heartbeat { captured_lsn, epoch, time_ns: now_ns() });
        let copy = copies.take();
        let mut sent = pin!(async {
            sender.send(&ack).await?;
            for more in [&clock, &copy].into_iter().flatten() {
                sender.send(more).await?;
            }
            Ok::<_, wire::Error>(())
        });
        let sent = tokio::select! {
            sent = &mut sent => sent,
            // A peer that does not read its acknowledgements is not waited for.
            end = &mut ended => match timeout(FAREWELL_TIMEOUT, sent).await {
                Ok(Ok(())) => break end,
                _ => return end.unwrap_or_else(|_| End::Refused(stopping())),
            },
        };
        if let Err(error) = sent {
            return error.into();
        }
        told = state;
        sleep(ACK_SPACING).await;
    };
    let end = end.unwrap_or_else(|_| End::Refused(stopping()));
    if let End::Refused(refusal) = &end {
        farewell(sender, refusal.clone()).await;
    }
    end
}

/// What the berth wants said: something at least, and what of a copy is new.
struct Notices {
    notices: watch::Receiver<Notice>,
    /// Whether the peer's program knows the message.
    tells: bool,
    told: Option<CopySeen>,
}

impl Notices {
    /// Cancel-safe.
    async fn next(&mut self) -> Option<Message> {
        if self.notices.changed().await.is_err() {
            return std::future::pending().await;
        }
        let copy = self.notices.borrow_and_update().copy.clone();
        if !self.tells || self.told == copy {
            return None;
        }
        self.told.clone_from(&copy);
        let CopySeen { address, run, time_ns, is_up_to_date } = copy?;
        Some(Message::CopySeen { address, run, time_ns, is_up_to_date })
    }
}

/// The acknowledgement for where the group stands; the state goes along when it is not what was told last.
fn acknowledgement(progress: &Progress, told: &ReceiverState) -> (Message, ReceiverState) {
    let state = progress.receiver_state();
    let ack = Message::Ack {
        epoch: progress.durable.epoch.number,
        received_lsn: progress.durable.lsn.0,
        applied_lsn: progress.applied.0,
        checkpoint_lsn: progress.checkpoint.0,
        state: (state != *told).then(|| state.clone()),
    };
    (ack, state)
}
