//! One live connection per group: the newer wins over its own older one, and never over another copy of the
//! source.
//!
//! Two writers would each be in order and together not. So a newer connection closes the older one's session,
//! waits until its task has ended, and lets ingest finish what it has; only then is the resume position read.
//!
//! Who may take the place ([`wire::instance`], [`crate::copies`]):
//!
//! | the newer says | the older one is connected and answers | it is not, or is silent |
//! |---|---|---|
//! | same run, next token | takes its place at once | comes in |
//! | another run, next token: restarted, or a copy of the running one | refused; the older gets a new token | comes in |
//! | a token from elsewhere: a copy, or one side was restored from a backup | refused; barred when it tries again | comes in, and is logged |
//! | a token that is barred | refused | refused, until `afterimage admit` |
//! | nothing, by an older program | as before, where the older one said nothing either; else refused | comes in |
//!
//! Whether the older one answers is asked, not believed: it is sent an acknowledgement, which QUIC
//! acknowledges in turn.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal::Position;
use machine::text::Gate;
use tokio::sync::{Notify, oneshot, watch};
use wire::Instance;
use wire::instance::ShownRun;
use wire::message::ErrorCode;

use super::{blocking, now_ns};
use crate::copies::{Copies, Relation};
use crate::error::Result;
use crate::ingest::Refusal;
use crate::ingest::queue::{Ingest, Session};
use crate::point::rfc3339;

/// What is on its way from a peer that has just ended is taken in before it is asked.
const SETTLE: Duration = Duration::from_millis(100);
/// Asked this often …
const ASK: Duration = Duration::from_millis(200);
/// … for at least, and at most, this long.
const PATIENCE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];
/// One that is connected hears of a copy this often.
const TELL: Duration = Duration::from_secs(10);
/// A copy that has not tried for so long is not shown any more.
const SHOWN: Duration = Duration::from_secs(600);
/// Copies that tried once and are barred when they do again.
const MAX_SUSPECTS: usize = 64;

/// The place of a group's one connection.
pub struct Berth {
    group: String,
    /// Held while one connection makes way for the next.
    turn: tokio::sync::Mutex<Place>,
    /// Who is connected, for the status.
    peer: Arc<machine::Mutex<Option<String>>>,
    copies: Arc<Copies>,
    seen: machine::Mutex<Option<Seen>>,
    gate: Gate,
}

#[derive(Default)]
struct Place {
    docked: Option<Docked>,
    suspects: VecDeque<[u8; 16]>,
}

struct Docked {
    session: Arc<Session>,
    replaced: Arc<Notify>,
    ended: oneshot::Receiver<()>,
    connection: quinn::Connection,
    instance: Option<Instance>,
    address: SocketAddr,
    since_ns: u64,
    notice: watch::Sender<Notice>,
    told: Option<Instant>,
}

impl Docked {
    fn has_ended(&mut self) -> bool {
        let is_over = !matches!(self.ended.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        is_over || self.connection.close_reason().is_some()
    }
}

/// A copy that was refused.
struct Seen {
    address: String,
    run: Option<[u8; 16]>,
    at: Instant,
    at_ns: u64,
    times: u64,
}

/// What the session says besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notice {
    /// Say something, so that the peer's QUIC answers.
    asked: u64,
    /// Another copy tried to connect.
    pub copy: Option<CopySeen>,
}

/// See [`wire::message::Message::CopySeen`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopySeen {
    /// From where.
    pub address: String,
    /// Its run.
    pub run: [u8; 16],
    /// When, this machine's clock.
    pub time_ns: u64,
    /// A new token is due.
    pub is_up_to_date: bool,
}

/// A connection that wants the place.
pub struct Newcomer {
    /// From where.
    pub address: SocketAddr,
    /// For the status.
    pub who: String,
    /// Which copy it is; `None` from an older program.
    pub instance: Option<Instance>,
    /// The connection.
    pub connection: quinn::Connection,
}

/// A connection's right to speak for its group; ends when dropped.
#[derive(Debug)]
pub struct Attached {
    /// Under which frames are handed to ingest.
    pub session: Arc<Session>,
    /// Everything that the group durably holds; `None` while it holds nothing.
    pub resume: Option<Position>,
    /// What is to be said besides acknowledgements.
    pub notices: watch::Receiver<Notice>,
    replaced: Arc<Notify>,
    peer: Arc<machine::Mutex<Option<String>>>,
    _ended: oneshot::Sender<()>,
}

impl Berth {
    /// Nobody is connected.
    pub fn new(group: &str, copies: Copies) -> Berth {
        Berth {
            group: group.to_owned(),
            turn: tokio::sync::Mutex::default(),
            peer: Arc::default(),
            copies: Arc::new(copies),
            seen: machine::Mutex::default(),
            gate: Gate::default(),
        }
    }

    /// Takes the place, from who has it, where that may be.
    ///
    /// # Errors
    /// Another copy of the source has it; the ingest thread is gone.
    pub async fn attach(&self, ingest: &Ingest, new: Newcomer) -> std::result::Result<Attached, Refusal> {
        let mut place = self.turn.lock().await;
        if let Err(refusal) = self.judge(&mut place, &new).await {
            self.store().await;
            return Err(refusal);
        }
        if let Some(old) = place.docked.take() {
            // 1. Nothing of the old connection is taken any more. 2. It learns why it ends. 3. Its task is
            //    gone.
            old.session.close();
            old.replaced.notify_one();
            // It must not be awaited once it was found to have ended.
            if !old.ended.is_terminated() {
                let _ = old.ended.await;
            }
        }
        // 4. What it handed in before is durable or dropped.
        let stopping = |_| Refusal::new(ErrorCode::JournalFailed, "the receiver is stopping");
        let position = ingest.settle().await.map_err(stopping)?;
        // 5. Which copy it is, durably, before it learns that it was taken.
        if let Some(instance) = &new.instance {
            self.copies.take(instance, new.address.to_string(), now_ns());
            self.store().await;
        }
        let (session, replaced) = (Session::new(), Arc::new(Notify::new()));
        let (ends, ended) = oneshot::channel();
        let (notice, notices) = watch::channel(Notice::default());
        place.docked = Some(Docked {
            session: session.clone(),
            replaced: replaced.clone(),
            ended,
            connection: new.connection,
            instance: new.instance,
            address: new.address,
            since_ns: now_ns(),
            notice,
            told: None,
        });
        *lock(&self.peer) = Some(new.who);
        let resume = (position.epoch.number > 0).then_some(position);
        Ok(Attached { session, resume, notices, replaced, peer: self.peer.clone(), _ended: ends })
    }

    /// The table at the head of this file.
    async fn judge(&self, place: &mut Place, new: &Newcomer) -> std::result::Result<(), Refusal> {
        let relation = new.instance.as_ref().map(|instance| self.copies.relation(instance));
        if relation == Some(Relation::Barred) {
            return Err(self.refuse(place, new, false));
        }
        let run = |instance: &Option<Instance>| instance.map(|instance| instance.run);
        let is_own = |docked: &Docked| {
            run(&docked.instance) == run(&new.instance)
                && relation.is_none_or(|relation| relation == Relation::Follows)
        };
        let is_there = place.docked.as_mut().is_some_and(|docked| !docked.has_ended());
        let is_held = match &place.docked {
            Some(docked) if is_there && !is_own(docked) => answers(docked).await,
            _ => false,
        };
        let strange = relation == Some(Relation::Strange);
        if !is_held {
            if strange {
                let known = self.copies.known();
                tracing::warn!(
                    group = self.group,
                    peer = %new.address,
                    last = known.map(|known| known.address),
                    "this source, or this receiver, is as it was earlier: restored from a backup, or a copy; it is taken, \
                     since no other is connected"
                );
            }
            return Ok(());
        }
        if let (true, Some(instance)) = (strange, &new.instance) {
            // Twice: a process that ends in this moment is not taken for one that lives on.
            if place.suspects.contains(&instance.token) {
                self.copies.bar(instance);
            } else {
                place.suspects.truncate(MAX_SUSPECTS - 1);
                place.suspects.push_front(instance.token);
            }
        }
        Err(self.refuse(place, new, relation == Some(Relation::Follows)))
    }

    /// Refuses a copy: it learns of the other, the other of it, and so do status and log.
    fn refuse(&self, place: &mut Place, new: &Newcomer, is_up_to_date: bool) -> Refusal {
        let address = new.address.to_string();
        let (at, at_ns) = (machine::now(), now_ns());
        let run = new.instance.map(|instance| instance.run);
        {
            let mut seen = lock(&self.seen);
            let times = seen.as_ref().map_or(0, |seen| seen.times) + 1;
            *seen = Some(Seen { address: address.clone(), run, at, at_ns, times });
        }
        if let Some(docked) = &mut place.docked {
            let is_due = docked.told.is_none_or(|told| machine::since(told) >= TELL);
            if is_due || is_up_to_date {
                docked.told = Some(at);
                let copy = CopySeen {
                    address: address.clone(),
                    run: run.unwrap_or_default(),
                    time_ns: at_ns,
                    is_up_to_date,
                };
                docked.notice.send_modify(|notice| notice.copy = Some(copy));
            }
        }
        let connected = place.docked.as_ref().filter(|docked| docked.connection.close_reason().is_none());
        let other = match (connected, self.copies.known()) {
            (Some(docked), _) => {
                let run = shown(docked.instance.as_ref().map(|instance| &instance.run));
                let since = rfc3339(docked.since_ns);
                format!("{run} at {}, connected since {since}, serves it", docked.address)
            }
            (None, Some(known)) => {
                let since = rfc3339(known.since_ns);
                format!(
                    "{} at {}, connected at {since}, served it last",
                    shown(Some(&known.run)),
                    known.address
                )
            }
            (None, None) => "another serves it".to_owned(),
        };
        let reason = format!(
            "this is another copy ({}) of the source of group {}: {other}. Nothing of this copy is taken. To go on with this \
             one, stop the other and order `afterimage admit {}` at the receiver; else give this one an identity and a group \
             of its own",
            shown(run.as_ref()),
            self.group,
            self.group
        );
        if let Some(held_back) = self.gate.due(&format!("copy {}", new.address.ip())) {
            tracing::warn!(group = self.group, peer = %new.address, held_back, "{reason}");
        }
        let code = if new.instance.is_some() { ErrorCode::AnotherCopy } else { ErrorCode::GroupBusy };
        Refusal::new(code, reason)
    }

    async fn store(&self) {
        let copies = self.copies.clone();
        let stored = blocking("instance", move || Ok(copies.store()?)).await;
        if let Err(error) = stored
            && self.gate.due("store").is_some()
        {
            tracing::warn!(group = self.group, %error, "which copy of the source is taken cannot be stored");
        }
    }

    /// The session that has the place goes on to a new token.
    pub async fn goes_on(&self, session: &Arc<Session>, instance: Instance) {
        let mut place = self.turn.lock().await;
        let Some(docked) = place.docked.as_mut().filter(|docked| Arc::ptr_eq(&docked.session, session))
        else {
            return;
        };
        let is_same = docked.instance.is_some_and(|known| known.run == instance.run);
        if is_same && self.copies.relation(&instance) == Relation::Follows {
            docked.instance = Some(instance);
            self.copies.take(&instance, docked.address.to_string(), docked.since_ns);
            self.store().await;
        }
    }

    /// The operator's order: the next copy that comes is the one.
    ///
    /// # Errors
    /// In words: one is connected.
    pub async fn admit(&self) -> std::result::Result<Result<()>, String> {
        let mut place = self.turn.lock().await;
        if let Some(docked) = &mut place.docked
            && !docked.has_ended()
            && answers(docked).await
        {
            return Err(format!(
                "a copy of the source of group {} is connected from {}: stop that one first",
                self.group, docked.address
            ));
        }
        self.copies.forget();
        place.suspects.clear();
        *lock(&self.seen) = None;
        let copies = self.copies.clone();
        Ok(blocking("instance", move || Ok(copies.store()?)).await)
    }

    /// Who is connected.
    pub fn peer(&self) -> Option<String> {
        lock(&self.peer).clone()
    }

    /// That another copy of the source tries to connect, while it does.
    pub fn copy_words(&self) -> Option<String> {
        let seen = lock(&self.seen);
        let seen = seen.as_ref().filter(|seen| machine::since(seen.at) < SHOWN)?;
        Some(format!(
            "another copy of this source ({}) tried to connect from {}, {} times, last at {}, and was refused; to take it \
             instead, stop the one that is connected and order `afterimage admit {}`",
            shown(seen.run.as_ref()),
            seen.address,
            seen.times,
            rfc3339(seen.at_ns),
            self.group
        ))
    }
}

fn shown(run: Option<&[u8; 16]>) -> String {
    run.map_or_else(|| "of an older program".to_owned(), |run| format!("instance {}", ShownRun(run)))
}

/// Whether the peer of a session is there: what it is sent now, its QUIC acknowledges.
async fn answers(docked: &Docked) -> bool {
    let connection = &docked.connection;
    tokio::time::sleep(SETTLE).await;
    let heard = || connection.stats().frame_rx.acks;
    let before = heard();
    let [least, most] = PATIENCE;
    let patience = (4 * connection.rtt() + least / 2).clamp(least, most);
    let begun = machine::now();
    let mut asked: Option<Instant> = None;
    while connection.close_reason().is_none() && machine::since(begun) < patience {
        if asked.is_none_or(|asked| machine::since(asked) >= ASK) {
            asked = Some(machine::now());
            docked.notice.send_modify(|notice| notice.asked += 1);
        }
        tokio::time::sleep(ASK / 10).await;
        if heard() > before && connection.close_reason().is_none() {
            return true;
        }
    }
    false
}

impl Attached {
    /// Resolves when a newer connection takes the place.
    pub async fn replaced(&self) {
        self.replaced.notified().await;
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Before `_ended` says so: the next one writes its own name only after that.
        *lock(&self.peer) = None;
    }
}

fn lock<T>(mutex: &machine::Mutex<T>) -> machine::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
