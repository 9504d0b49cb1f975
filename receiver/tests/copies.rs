//! Peers that are copies of another, say nothing, or claim what cannot be, against a real receiver over
//! loopback QUIC.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod link_source;

use std::time::{Duration, Instant};

use link_source::{PATIENCE, Site, Source};
use receiver::agent::Handle;
use tokio::time::timeout;
use wire::message::{ErrorCode, Message};
use wire::{Client, ControlReceiver, ControlSender, Instance, Tuning, framing};

fn instance(run: u8, token: u8, previous: u8) -> Instance {
    Instance { run: [run; 16], token: [token; 16], previous: (previous > 0).then_some([previous; 16]) }
}

/// A source that says which copy it is, once it was taken.
struct Taken {
    connection: quinn::Connection,
    _client: Client,
    _sender: ControlSender,
    control: ControlReceiver,
}

async fn arrive(
    site: &Site,
    source: &Source,
    handle: &Handle,
    instance: Instance,
) -> Result<Taken, (ErrorCode, String)> {
    let client = Client::new(&source.identity, site.identity, &Tuning::default()).unwrap();
    let connection = client.connect(&handle.local_addr().to_string(), PATIENCE).await.unwrap();
    let (mut sender, mut control) = framing::open(&connection).await.unwrap();
    let mut hello = source.hello();
    if let Message::Hello { features, .. } = &mut hello {
        *features |= wire::instance::FEATURE;
    }
    sender.send(&hello).await.unwrap();
    assert_eq!(timeout(PATIENCE, control.next()).await.unwrap().unwrap(), Some(Message::InstanceRequest));
    let Instance { run, token, previous } = instance;
    sender.send(&Message::Instance { run, token, previous }).await.unwrap();
    match timeout(PATIENCE, control.next()).await.unwrap().unwrap().unwrap() {
        Message::Welcome { .. } => Ok(Taken { connection, _client: client, _sender: sender, control }),
        Message::Error { code, reason } => Err((code, reason)),
        other => panic!("{other:?}"),
    }
}

impl Taken {
    async fn hears_of_a_copy(&mut self) -> (String, bool) {
        loop {
            match timeout(PATIENCE, self.control.next()).await.unwrap().unwrap().unwrap() {
                Message::CopySeen { address, is_up_to_date, .. } => return (address, is_up_to_date),
                Message::Ack { .. } | Message::Heartbeat { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_live_copies_the_newcomer_is_refused_and_both_hear_of_the_other() {
    let site = Site::new();
    let source = site.source("g");
    let handle = site.start(&[&source]).await;
    let first = arrive(&site, &source, &handle, instance(1, 1, 0)).await.ok().unwrap();
    first.connection.close(0_u32.into(), b"");
    // The copy was made here: it knows token 1.
    let mut first = arrive(&site, &source, &handle, instance(2, 2, 1)).await.ok().unwrap();
    for _ in 0..2 {
        let (code, reason) = arrive(&site, &source, &handle, instance(3, 3, 1)).await.err().unwrap();
        assert_eq!(code, ErrorCode::AnotherCopy);
        assert!(reason.contains("02020202") && reason.contains("admit g"), "{reason}");
    }
    let (address, _) = first.hears_of_a_copy().await;
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    let why = handle.status().groups[0].why.clone().unwrap();
    assert!(why.contains("another copy of this source (instance 03030303)"), "{why}");
    assert!(first.connection.close_reason().is_none(), "never displaced");

    // The same run comes again over another path: its old connection makes way at once.
    let begun = Instant::now();
    let again = arrive(&site, &source, &handle, instance(2, 4, 2)).await.ok().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(900), "nothing is asked of it");
    timeout(PATIENCE, first.connection.closed()).await.unwrap();

    // The copy does not come in when the one that is taken is away, nor after a restart of the receiver.
    again.connection.close(0_u32.into(), b"");
    handle.shutdown().await.unwrap();
    let handle = site.start(&[&source]).await;
    let (code, reason) = arrive(&site, &source, &handle, instance(5, 3, 1)).await.err().unwrap();
    assert_eq!(code, ErrorCode::AnotherCopy, "{reason}");
    // By order it does; and then the other is the copy.
    handle.admit("g").await.unwrap();
    let copy = arrive(&site, &source, &handle, instance(5, 3, 1)).await.ok().unwrap();
    assert!(arrive(&site, &source, &handle, instance(2, 5, 4)).await.is_err());
    let held = handle.admit("g").await.unwrap_err();
    assert_eq!(held.kind, receiver::ErrorKind::NotPossible, "{held}");
    drop(copy);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_restart_a_lost_answer_and_a_backup_are_taken() {
    let site = Site::new();
    let source = site.source("g");
    let handle = site.start(&[&source]).await;
    let taken = arrive(&site, &source, &handle, instance(1, 1, 0)).await.ok().unwrap();
    taken.connection.close(0_u32.into(), b"");
    // It never heard the answer, and was restarted: the exact retry.
    let taken = arrive(&site, &source, &handle, instance(2, 1, 0)).await.ok().unwrap();
    taken.connection.close(0_u32.into(), b"");
    let taken = arrive(&site, &source, &handle, instance(3, 2, 1)).await.ok().unwrap();
    taken.connection.close(0_u32.into(), b"");
    // Restored from a backup, with nobody else there: taken, and a new epoch is the source's to begin.
    let taken = arrive(&site, &source, &handle, instance(4, 9, 1)).await.ok().unwrap();
    drop(taken);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_the_running_one_is_refused_and_the_running_one_goes_on_to_a_new_token() {
    let site = Site::new();
    let source = site.source("g");
    let handle = site.start(&[&source]).await;
    let mut live = arrive(&site, &source, &handle, instance(1, 1, 0)).await.ok().unwrap();
    // The directory was copied while it ran: the copy knows the newest token.
    assert!(arrive(&site, &source, &handle, instance(2, 2, 1)).await.is_err());
    assert!(live.hears_of_a_copy().await.1, "a new token is due");
    let Instance { run, token, previous } = instance(1, 3, 1);
    live._sender.send(&Message::Instance { run, token, previous }).await.unwrap();
    // An older program is no way around it.
    let (code, _) = source.greet(handle.local_addr(), site.identity, &source.hello()).await.err().unwrap();
    assert_eq!(code, ErrorCode::GroupBusy);
    for _ in 0..2 {
        assert!(arrive(&site, &source, &handle, instance(2, 2, 1)).await.is_err());
    }
    live.connection.close(0_u32.into(), b"");
    assert!(arrive(&site, &source, &handle, instance(2, 2, 1)).await.is_err(), "out of date, and barred");
    assert!(arrive(&site, &source, &handle, instance(9, 4, 3)).await.is_ok(), "restarted");
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_hold_neither_place_nor_memory() {
    let site = Site::new();
    let mut source = site.source("g");
    let handle = site.start(&[&source]).await;
    source.begin_epoch();
    // Known and silent, more than there are places: a message that never ends, and all the streams that are
    // granted.
    let client = Client::new(&source.identity, site.identity, &Tuning::default()).unwrap();
    let mut silent = Vec::new();
    for _ in 0..70 {
        let connection = client.connect(&handle.local_addr().to_string(), PATIENCE).await.unwrap();
        let (mut stream, _receive) = connection.open_bi().await.unwrap();
        let mut bytes = vec![0; 16 << 10];
        bytes[..4].copy_from_slice(&(64_u32 << 10).to_le_bytes());
        stream.write_all(&bytes).await.unwrap();
        let more = async {
            tokio::select! { s = connection.open_uni() => s.is_ok(), s = connection.open_bi() => s.is_ok() }
        };
        assert_ne!(
            timeout(Duration::from_millis(5), more).await,
            Ok(true),
            "no second stream before the hello"
        );
        silent.push((connection, stream));
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let open = silent.iter().filter(|(connection, _)| connection.close_reason().is_none()).count();
    assert!(open <= 8, "{open} of 70 hold their places");
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.shutdown().await.unwrap();
}
