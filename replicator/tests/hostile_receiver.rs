//! A receiver with the right identity that lies: nothing of what it claims becomes a number of the source,
//! none of its words reaches the status as it came, and the next receiver finds the source as it was.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use replicator::Replicator;
use replicator::status::State;
use wire::message::{Message, Position, ReceiverCode, ReceiverState};
use wire::{Identity, Server, Tuning, endpoint, framing};

/// Answers one connection with this claim, made from the source's own hello, and with these acknowledged
/// lsns.
async fn lie(server: &Server, epoch: u64, lsn: u64, acked: Option<u64>) {
    let (connection, _) = endpoint::handshake(server.accept().await.unwrap()).await.unwrap();
    let (mut sender, mut receiver) = framing::accept(&connection).await.unwrap();
    let Some(Message::Hello { lineage, .. }) = receiver.next().await.unwrap() else { panic!("a hello") };
    sender.send(&Message::InstanceRequest).await.unwrap();
    assert!(matches!(receiver.next().await.unwrap(), Some(Message::Instance { .. })));
    let resume = Position { lineage, epoch, epoch_id: [9; 16], lsn, chain: 1 };
    let why = "\u{1b}[2J\n\u{202e}".repeat(5000);
    let state = ReceiverState { code: ReceiverCode::Stopped, why };
    let resume = acked.is_none().then_some(resume);
    let welcome =
        Message::Welcome { version: 1, features: 0, resume, state: state.clone(), agent: "\u{9b}".into() };
    let _ = sender.send(&welcome).await;
    if let Some(acked) = acked {
        let lsns = (acked, acked, acked);
        let (received_lsn, applied_lsn, checkpoint_lsn) = lsns;
        let ack = Message::Ack { epoch, received_lsn, applied_lsn, checkpoint_lsn, state: Some(state) };
        let _ = sender.send(&ack).await;
    }
    // The source ends it.
    let _ = tokio::time::timeout(Duration::from_secs(10), connection.closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn visits_of_a_liar_move_no_number_and_reach_no_terminal() {
    let (state, ring) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let dir = state.path();
    let theirs = Identity::create(&dir.join("theirs")).unwrap();
    let ours = Identity::create(&dir.join("identity")).unwrap().fingerprint();
    let accept = Arc::new(move |peer: &wire::Fingerprint| *peer == ours);
    let server = Server::new(&theirs, accept, &Tuning::default(), ([127, 0, 0, 1], 0).into()).unwrap();
    let volume = ("disk".to_owned(), dir.join("disk.img"), Some(1 << 20));
    let to = server.local_addr().unwrap();
    let mut settings = conf::Replicator::embedded(dir, "g", [volume], to, theirs.fingerprint().0).unwrap();
    settings.ring_dir = ring.path().to_owned();
    settings.receiver.reconnect_min = Duration::from_millis(10);
    settings.receiver.reconnect_max = Duration::from_millis(20);
    let handle = Replicator::start(settings).await.unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while handle.status().groups[0].state != State::Replicating {
        assert!(Instant::now() < until, "{:?}", handle.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let claims = [(1 << 62, 5), (u64::MAX, u64::MAX), (1, u64::MAX), ((1 << 62) - 1, 1 << 61), (5000, 5)];
    for (epoch, lsn) in claims.into_iter().chain([(1 << 40, 1 << 50); 5]) {
        lie(&server, epoch, lsn, None).await;
    }
    for (epoch, acked) in [(1, u64::MAX), (u64::MAX, 1)] {
        lie(&server, epoch, 0, Some(acked)).await;
    }
    let group = handle.status().groups.remove(0);
    assert_eq!(group.epoch, 1, "{group:?}");
    assert_eq!(group.positions.received_lsn.0, 0, "{group:?}");
    assert!(
        group.why.len() < 4000 && !group.why.contains(|c: char| c.is_control() || c == '\u{202e}'),
        "{}",
        group.why
    );
    assert!(!group.why.is_empty());
    handle.shutdown().await.unwrap();
}
