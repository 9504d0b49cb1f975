//! Peers that lie: each has the right identity, and says what it likes. What they claim is drawn from the
//! seed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use wire::message::{ErrorCode, Message, Position, ReceiverCode, ReceiverState, VolumeSummary};
use wire::{Client, ControlReceiver, ControlSender, Fingerprint, Identity, Server, Tuning, framing};

use crate::room::Room;
use crate::side::{RECEIVER, Site, source_address};
use crate::turn;

/// How often a liar looks whether it shall stop.
const LOOK: Duration = Duration::from_millis(2);
/// Characters of a reason that is too long for everything that has to show it.
const LONG: usize = 20_000;

/// A peer that lies, as a process of its own.
pub struct Liar {
    life: u64,
    stop: Arc<AtomicBool>,
}

impl Liar {
    /// A receiver with the honest one's identity and address.
    pub fn receiver(site: &Site, life: u64, identity: Identity, source: Fingerprint) -> Liar {
        let stop = Arc::new(AtomicBool::new(false));
        let (room, net, stopping) = (site.room.clone(), site.net.clone(), stop.clone());
        let body = move || {
            room.set_life(life);
            let socket = net.socket(RECEIVER.into());
            let lies = async {
                let accept = Arc::new(move |peer: &Fingerprint| *peer == source);
                let Ok(server) = Server::on(socket, &identity, accept, &Tuning::default()) else { return };
                let ends = async {
                    while !stopping.load(Ordering::Acquire) {
                        tokio::time::sleep(LOOK).await
                    }
                };
                tokio::select! {
                    () = ends => {}
                    () = receive(&room, &server) => {}
                }
            };
            // A liar that cannot be started tells no lies.
            let _ = turn::run(&room, &net, lies);
        };
        let _ = machine::spawn("liar", body);
        Liar { life, stop }
    }

    /// A source with the honest one's identity.
    pub fn source(site: &Site, life: u64, identity: Identity, receiver: Fingerprint, known: Truth) -> Liar {
        let stop = Arc::new(AtomicBool::new(false));
        let (room, net, stopping) = (site.room.clone(), site.net.clone(), stop.clone());
        let body = move || {
            room.set_life(life);
            let socket = net.socket(source_address(life));
            let lies = async {
                let Ok(client) = Client::on(socket, &identity, receiver, &Tuning::default()) else { return };
                loop {
                    visit(&room, &client, &known).await;
                    tokio::time::sleep(LOOK).await;
                }
            };
            let ends = async {
                while !stopping.load(Ordering::Acquire) {
                    tokio::time::sleep(LOOK).await
                }
            };
            let _ = turn::run(&room, &net, async {
                tokio::select! {
                    () = ends => {}
                    () = lies => {}
                }
            });
        };
        let _ = machine::spawn("liar", body);
        Liar { life, stop }
    }

    /// Ends it.
    pub fn end(self, room: &Room) {
        self.stop.store(true, Ordering::Release);
        machine::sleep(LOOK * 3);
        room.kill(self.life);
    }
}

/// What a liar knows of the group that it speaks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Truth {
    /// Its id.
    pub group: [u8; 16],
    /// Its line of descent.
    pub lineage: [u8; 16],
    /// The newest epoch's number.
    pub epoch: u64,
    /// And its random id.
    pub epoch_id: [u8; 16],
}

/// One connection of a lying source.
async fn visit(room: &Room, client: &Client, known: &Truth) {
    let (address, port) = RECEIVER;
    let to = std::net::SocketAddr::from((address, port)).to_string();
    let Ok(connection) = client.connect(&to, Duration::from_millis(500)).await else { return };
    let Ok((mut sender, mut receiver)) = framing::open(&connection).await else { return };
    let hello = Message::Hello {
        versions: vec![1],
        features: room.draw(u64::MAX),
        group_id: if room.chance(800) { known.group } else { [6; 16] },
        group: "g".to_owned(),
        lineage: if room.chance(700) { known.lineage } else { [9; 16] },
        epoch: number(room, known.epoch),
        epoch_id: if room.chance(500) { known.epoch_id } else { [8; 16] },
        volumes: (0..room.draw(3)).map(|id| volume(room, id)).collect(),
        agent: reason(room),
    };
    if sender.send(&hello).await.is_err()
        || !matches!(receiver.next().await, Ok(Some(Message::Welcome { .. })))
    {
        return;
    }
    for _ in 0..1 + room.draw(10) {
        let lie = match room.draw(4) {
            0 => Message::Throttle { rate_bits_per_s: Some(room.draw(10)) },
            1 => Message::Bye { reason: reason(room) },
            _ => Message::Heartbeat {
                captured_lsn: number(room, 1000),
                epoch: number(room, known.epoch),
                time_ns: number(room, room.now_ns()),
            },
        };
        if sender.send(&lie).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1 + room.draw(200))).await;
    }
    connection.close(0_u32.into(), b"");
}

fn volume(room: &Room, id: u64) -> VolumeSummary {
    VolumeSummary {
        id: u32::try_from(id).unwrap_or(0),
        uuid: [3; 16],
        name: reason(room),
        size_bytes: number(room, 1 << 20),
        sector_bytes: 512,
    }
}

async fn receive(room: &Room, server: &Server) {
    while let Some(incoming) = server.accept().await {
        let Ok((connection, _)) = wire::endpoint::handshake(incoming).await else { continue };
        let Ok((sender, receiver)) = framing::accept(&connection).await else { continue };
        session(room, sender, receiver).await;
        connection.close(0_u32.into(), b"");
    }
}

async fn session(room: &Room, mut sender: ControlSender, mut receiver: ControlReceiver) {
    let Ok(Some(Message::Hello { lineage, epoch, epoch_id, .. })) = receiver.next().await else { return };
    let resume = room.chance(800).then(|| Position {
        lineage: if room.chance(700) { lineage } else { [9; 16] },
        epoch: number(room, epoch),
        epoch_id: if room.chance(500) { epoch_id } else { [8; 16] },
        lsn: number(room, 1000),
        chain: room.draw(u64::MAX),
    });
    let welcome = Message::Welcome {
        version: 1,
        features: room.draw(u64::MAX),
        resume,
        state: state(room),
        agent: "liar".to_owned(),
    };
    if sender.send(&welcome).await.is_err() {
        return;
    }
    for _ in 0..1 + room.draw(20) {
        let lie = match room.draw(8) {
            0 => Message::Throttle { rate_bits_per_s: Some(room.draw(10)) },
            1 => Message::Heartbeat { captured_lsn: u64::MAX, epoch: u64::MAX, time_ns: u64::MAX },
            2 => Message::Error { code: ErrorCode::ChainMismatch, reason: reason(room) },
            _ => Message::Ack {
                epoch: if room.chance(700) { epoch } else { number(room, epoch) },
                received_lsn: number(room, 1000),
                applied_lsn: number(room, 1000),
                checkpoint_lsn: number(room, 1000),
                state: room.chance(500).then(|| state(room)),
            },
        };
        let last = matches!(lie, Message::Error { .. });
        if sender.send(&lie).await.is_err() || last {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1 + room.draw(200))).await;
    }
}

/// A number near to what is right, or far from it.
fn number(room: &Room, near: u64) -> u64 {
    match room.draw(6) {
        0 => u64::MAX,
        1 => 1 << 62,
        2 => near.saturating_add(1 << 40),
        3 => 0,
        _ => near.saturating_add(room.draw(10_000)),
    }
}

/// Every state but `Fenced`: whoever holds the receiver's identity may end a lineage, and that is final.
fn state(room: &Room) -> ReceiverState {
    let codes = [
        ReceiverCode::Ok,
        ReceiverCode::NeedsResync,
        ReceiverCode::ReplicaFailed,
        ReceiverCode::JournalFull,
        ReceiverCode::Stopped,
        ReceiverCode::Rewound,
    ];
    let code = codes[usize::try_from(room.draw(codes.len() as u64)).unwrap_or(0)];
    ReceiverState { code, why: reason(room) }
}

fn reason(room: &Room) -> String {
    match room.draw(3) {
        0 => "\u{1b}[2J\r\n\u{202e}lies".repeat(LONG / 10),
        1 => "x".repeat(LONG),
        _ => String::new(),
    }
}
