//! The network half end to end, in one process over loopback QUIC: a scripted source against a real receiver.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod link_source;

use std::time::Duration;

use bytes::Bytes;
use link_source::{PATIENCE, Site, VOLUME_BYTES, assert_equal};
use receiver::agent::Receiver;
use receiver::point::At;
use receiver::restore::RestoreRequest;
use receiver::status::State;
use wire::message::{ErrorCode, Message, ReceiverCode};
use wire::{Client, Tuning, framing};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_is_acknowledged_applied_and_restored_across_cuts_and_restarts() {
    let site = Site::new();
    let mut source = site.source("g");
    let handle = site.start(&[&source]).await;

    // 1. A first connection, cut without a word in the middle of everything.
    source.begin_epoch();
    source.write(40);
    let mut link = site.connect(&source, &handle).await;
    assert_eq!((link.resume, link.state.code), (None, ReceiverCode::Ok));
    link.send(&source.frames).await;
    link.acknowledged(source.frames[10].0.last_lsn.0).await;
    link.connection.close(7_u32.into(), b"cut");

    // 2. The next one resumes from what is durable: at or after what was acknowledged, and the source's own
    //    history.
    source.write(40);
    source.bookmark("here");
    let at_bookmark = source.model.clone();
    source.write(40);
    let acked = link.acked;
    let mut link = site.connect(&source, &handle).await;
    let resume = link.resume.unwrap();
    assert!(resume.lsn >= acked);
    assert!(
        source.frames.iter().any(|(header, _)| wire::message::Position::from(header.position()) == resume)
    );
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;

    // 3. Everything is on the replica when `wait` returns, and the status says so.
    let heartbeat = Message::Heartbeat { captured_lsn: source.lsn, epoch: 1, time_ns: u64::MAX / 4 };
    link.sender.send(&heartbeat).await.unwrap();
    handle.wait(PATIENCE).await.unwrap();
    link.on_replica(source.lsn).await;
    site.assert_replicas(&source);
    let status = handle.status();
    let group = &status.groups[0];
    assert_eq!(group.state, State::Replicating, "{group:?}");
    assert_eq!(group.positions.checkpoint_lsn.0, source.lsn);
    assert_eq!((group.rpo_ms, group.backlog_bytes, group.volumes.len()), (Some(0), 0, 2));
    assert_eq!(handle.points("g").unwrap().bookmarks[0].name, "here");

    // 4. The receiver restarts; nothing is sent twice, more is taken, and the past is still there.
    handle.shutdown().await.unwrap();
    let handle = site.start(&[&source]).await;
    source.write(20);
    let mut link = site.connect(&source, &handle).await;
    assert_eq!(link.resume.unwrap().lsn, source.frames[source.frames.len() - 21].0.last_lsn.0);
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    link.sender.send(&Message::ApplyNow { lsn: source.lsn }).await.unwrap();
    link.on_replica(source.lsn).await;
    site.assert_replicas(&source);
    let to = site.dir.path().join("past");
    let request = RestoreRequest {
        at: At::Bookmark("here".into()),
        to: to.clone(),
        volume: None,
        force: false,
        dry_run: false,
    };
    handle.restore("g", request, |_, _| {}).await.unwrap();
    for (id, expected) in &at_bookmark {
        assert_equal(&to.join(format!("vol{id}.img")), expected);
    }
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_are_not_the_next_end_the_connection_with_their_reason() {
    let site = Site::new();
    let mut source = site.source("g");
    let handle = site.start(&[&source]).await;
    source.begin_epoch();
    source.write(5);
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;

    let mut other = site.source("other");
    other.begin_epoch();
    let frame = |frames: &[(_, Bytes)], at: usize| frames[at].1.clone();
    let last = source.frames.len() - 1;
    source.write(2);
    let mut damaged = frame(&source.frames, last + 1).to_vec();
    damaged[300] ^= 1;
    let cases = [
        ("duplicate", frame(&source.frames, last), ErrorCode::OutOfOrder),
        ("replayed", frame(&source.frames, 0), ErrorCode::OutOfOrder),
        ("reordered", frame(&source.frames, last + 2), ErrorCode::OutOfOrder),
        ("foreign", frame(&other.frames, 0), ErrorCode::GroupNotYours),
        ("damaged", Bytes::from(damaged), ErrorCode::BadFrame),
        ("no frame at all", Bytes::from(vec![0x5a; 4096]), ErrorCode::BadFrame),
    ];
    for (what, bytes, expected) in cases {
        let mut link = site.connect(&source, &handle).await;
        link.send_exactly([bytes].into_iter()).await;
        let (code, reason) = link.error().await;
        assert_eq!(code, expected, "{what}: {reason}");
    }
    // None of them left a trace: the true ones are still taken.
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    site.assert_replicas(&source);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_belongs_to_one_identity_one_id_and_one_lineage() {
    let site = Site::new();
    let (mut mine, theirs, stranger) = (site.source("mine"), site.source("theirs"), site.source("stranger"));
    let handle = site.start(&[&mine, &theirs]).await;
    let to = handle.local_addr();
    mine.begin_epoch();
    drop(site.connect(&mine, &handle).await);

    // Another known identity asks for my group; somebody unknown does not even get through TLS.
    let (code, _) = theirs.greet(to, site.identity, &mine.hello()).await.err().unwrap();
    assert_eq!(code, ErrorCode::GroupNotYours);
    let client = Client::new(&stranger.identity, site.identity, &Tuning::default()).unwrap();
    let refused = async {
        let connection = client.connect(&to.to_string(), PATIENCE).await?;
        let (mut sender, mut control) = framing::open(&connection).await?;
        sender.send(&mine.hello()).await?;
        control.next().await
    };
    assert_eq!(refused.await.unwrap_err().kind, wire::ErrorKind::Untrusted);

    // My own hello with another id, lineage or version.
    let change = |change: fn(&mut Message)| {
        let mut hello = mine.hello();
        change(&mut hello);
        hello
    };
    let cases = [
        (
            change(|m| {
                if let Message::Hello { group_id, .. } = m {
                    *group_id = [9; 16]
                }
            }),
            ErrorCode::GroupNotYours,
        ),
        (
            change(|m| {
                if let Message::Hello { lineage, .. } = m {
                    *lineage = [9; 16]
                }
            }),
            ErrorCode::LineageMismatch,
        ),
        (
            change(|m| {
                if let Message::Hello { versions, .. } = m {
                    *versions = vec![99]
                }
            }),
            ErrorCode::VersionMismatch,
        ),
        (Message::ApplyNow { lsn: 1 }, ErrorCode::BadFrame),
    ];
    for (hello, expected) in cases {
        let (code, reason) = mine.greet(to, site.identity, &hello).await.err().unwrap();
        assert_eq!(code, expected, "{reason}");
    }
    handle.shutdown().await.unwrap();

    // Settings that bind the group to another identity do not give it away: it remembers its owner.
    let mut settings = site.settings(&[&theirs]);
    settings.source[0].groups.push("mine".into());
    let handle = Receiver::start(settings).await.unwrap();
    let (code, reason) = theirs.greet(handle.local_addr(), site.identity, &mine.hello()).await.err().unwrap();
    assert_eq!(code, ErrorCode::GroupNotYours);
    assert!(reason.contains("created by another"), "{reason}");
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_connection_takes_over_and_the_older_learns_it() {
    let site = Site::new();
    let mut source = site.source("g");
    let handle = site.start(&[&source]).await;
    source.begin_epoch();
    let mut older = site.connect(&source, &handle).await;
    older.send(&source.frames).await;
    older.acknowledged(source.lsn).await;
    source.write(10);
    let mut newer = site.connect(&source, &handle).await;
    assert_eq!(older.error().await.0, ErrorCode::GroupBusy);
    newer.send(&source.frames).await;
    newer.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    site.assert_replicas(&source);
    handle.shutdown().await.unwrap();
}

/// A source that names an lsn out of reach is believed while it is there, and no longer.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_broken_source_claims_of_itself_ends_with_its_visit() {
    let site = Site::new();
    let mut source = site.source("g");
    let handle = site.start(&[&source]).await;
    source.begin_epoch();
    let far = 1 << 62;
    let beat = |captured_lsn| Message::Heartbeat { captured_lsn, epoch: 1, time_ns: 5 };
    let mut broken = site.connect(&source, &handle).await;
    broken.sender.send(&beat(far)).await.unwrap();
    broken.sender.send(&Message::ApplyNow { lsn: far }).await.unwrap();
    let captured = async |lsn| {
        let is_heard = async || {
            while handle.status().groups[0].positions.captured_lsn.0 != lsn {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, is_heard()).await.expect("the heartbeat is heard, and counts")
    };
    captured(far).await;
    let mut honest = site.connect(&source, &handle).await;
    assert_eq!(broken.error().await.0, ErrorCode::GroupBusy);
    honest.send(&source.frames).await;
    honest.acknowledged(source.lsn).await;
    honest.sender.send(&beat(source.lsn)).await.unwrap();
    captured(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    let group = handle.status().groups[0].clone();
    assert_eq!((group.positions.captured_lsn.0, group.rpo_ms), (source.lsn, Some(0)), "{group:?}");

    // Numbers that no history reaches end the visit.
    for message in [beat(u64::MAX), Message::ApplyNow { lsn: u64::MAX }] {
        let mut broken = site.connect(&source, &handle).await;
        broken.sender.send(&message).await.unwrap();
        let (code, reason) = broken.error().await;
        assert_eq!(code, ErrorCode::BadFrame, "{reason}");
    }
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_bytes_of_one_source_do_not_touch_another() {
    let site = Site::new();
    let (mut good, mut bad) = (site.source("good"), site.source("bad"));
    let handle = site.start(&[&good, &bad]).await;
    good.begin_epoch();
    bad.begin_epoch();
    let mut steady = site.connect(&good, &handle).await;

    // A valid header with a payload that never comes, garbage, and garbage on the control stream.
    let mut link = site.connect(&bad, &handle).await;
    let cut = bad.frames[0].1.slice(..journal::frame::HEADER_BYTES + 10);
    link.send_exactly([cut].into_iter()).await;
    assert_eq!(link.error().await.0, ErrorCode::BadFrame);
    let connection = {
        let client = Client::new(&bad.identity, site.identity, &Tuning::default()).unwrap();
        client.connect(&handle.local_addr().to_string(), PATIENCE).await.unwrap()
    };
    let (mut raw, _recv) = connection.open_bi().await.unwrap();
    raw.write_all(&[0xff; 1000]).await.unwrap();
    connection.closed().await;

    steady.send(&good.frames).await;
    steady.acknowledged(good.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    site.assert_replicas(&good);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_others_changed_waits_for_an_order() {
    let site = Site::new();
    let mut source = site.source("g");
    let handle = site.start(&[&source]).await;
    source.begin_epoch();
    source.write(10);
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    handle.shutdown().await.unwrap();

    let replica = site.dir.path().join("r/replica/g/vol1.img");
    std::fs::write(&replica, vec![0xee; VOLUME_BYTES]).unwrap();
    let handle = site.start(&[&source]).await;
    source.write(10);
    let mut link = site.connect(&source, &handle).await;
    assert_eq!(link.state.code, ReceiverCode::ReplicaFailed);
    assert!(link.state.why.contains("vol1") && link.state.why.contains("--overwrite"), "{}", link.state.why);
    assert_eq!(handle.status().groups[0].state, State::Degraded);
    // Frames of the old epoch are kept, acknowledged and not applied.
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    let refused = handle.wait(PATIENCE).await.unwrap_err();
    assert_eq!(refused.kind, receiver::ErrorKind::NotPossible);
    assert_equal(&replica, &vec![0xee; VOLUME_BYTES]);
    // Not even a new epoch overwrites it.
    source.begin_epoch();
    source.write(10);
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    assert_equal(&replica, &vec![0xee; VOLUME_BYTES]);
    let report = handle.overwrite("g").await.unwrap();
    assert!(report.why.contains("vol1"), "{report:?}");
    assert_eq!(handle.status().groups[0].state, State::NeedsResync);
    assert_eq!(handle.overwrite("g").await.unwrap_err().kind, receiver::ErrorKind::NotPossible);
    // A newer epoch brings everything anew.
    source.begin_epoch();
    source.write(10);
    link.send(&source.frames).await;
    link.on_replica(source.lsn).await;
    site.assert_replicas(&source);
    assert_eq!(link.state.code, ReceiverCode::Ok);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_cannot_be_written_stops_apply_and_not_ingest() {
    let site = Site::new();
    let mut source = site.source("g");
    // Something foreign stands where the replica should be.
    let replica = site.dir.path().join("r/replica/g/vol1.img");
    std::fs::create_dir_all(replica.parent().unwrap()).unwrap();
    std::fs::write(&replica, b"somebody's file").unwrap();
    let handle = site.start(&[&source]).await;
    source.begin_epoch();
    source.write(10);
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    let refused = handle.wait(PATIENCE).await.unwrap_err();
    assert_eq!(refused.kind, receiver::ErrorKind::NotPossible);
    assert!(refused.to_string().contains("vol1"), "{refused}");
    while link.state.code != ReceiverCode::ReplicaFailed {
        link.hear().await;
    }
    let status = handle.status();
    assert_eq!(status.groups[0].state, State::Degraded);
    assert_eq!(status.groups[0].positions.checkpoint_lsn.0, 0, "no false checkpoint");
    source.write(10);
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    assert_equal(&replica, b"somebody's file");
    handle.shutdown().await.unwrap();

    // Once it is out of the way, a restart applies what was received meanwhile.
    std::fs::remove_file(&replica).unwrap();
    let handle = site.start(&[&source]).await;
    handle.wait(PATIENCE).await.unwrap();
    site.assert_replicas(&source);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_group_is_shown_and_does_not_keep_others_from_working() {
    let site = Site::new();
    let (mut good, mut bad) = (site.source("good"), site.source("bad"));
    good.begin_epoch();
    bad.begin_epoch();
    let handle = site.start(&[&good, &bad]).await;
    let mut link = site.connect(&bad, &handle).await;
    link.send(&bad.frames).await;
    link.acknowledged(bad.lsn).await;
    handle.shutdown().await.unwrap();

    // Rot below the durable position.
    let journal = site.dir.path().join("r/groups/bad/journal");
    let names = std::fs::read_dir(&journal).unwrap().map(|entry| entry.unwrap().path());
    let segment = names.filter(|path| path.extension().is_some_and(|e| e == "seg")).min().unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[700] ^= 0xff;
    std::fs::write(&segment, bytes).unwrap();

    let handle = site.start(&[&good, &bad]).await;
    let status = handle.status();
    assert_eq!((status.groups[0].name.as_str(), status.groups[0].state), ("bad", State::Degraded));
    let segment = segment.file_name().unwrap().to_str().unwrap();
    assert!(status.groups[0].why.as_ref().unwrap().contains(segment), "{status:?}");
    let (code, reason) = bad.greet(handle.local_addr(), site.identity, &bad.hello()).await.err().unwrap();
    assert_eq!(code, ErrorCode::JournalFailed);
    assert!(reason.contains(segment), "{reason}");
    let mut link = site.connect(&good, &handle).await;
    link.send(&good.frames).await;
    link.acknowledged(good.lsn).await;
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_without_its_journal_is_refused_and_its_journal_makes_it_whole_again() {
    let site = Site::new();
    let mut source = site.source("g");
    source.begin_epoch();
    source.write(10);
    let handle = site.start(&[&source]).await;
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    handle.shutdown().await.unwrap();

    let journal = site.dir.path().join("r/groups/g/journal");
    let away = site.dir.path().join("away");
    std::fs::rename(&journal, &away).unwrap();
    let handle = site.start(&[&source]).await;
    let why = handle.status().groups[0].why.clone().unwrap();
    assert!(why.contains("the journal is missing"), "{why}");
    let (code, _) = source.greet(handle.local_addr(), site.identity, &source.hello()).await.err().unwrap();
    assert_eq!(code, ErrorCode::JournalFailed);
    handle.shutdown().await.unwrap();
    assert!(!journal.exists(), "no empty journal is made in its place");

    std::fs::rename(&away, &journal).unwrap();
    let handle = site.start(&[&source]).await;
    source.write(5);
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    site.assert_replicas(&source);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewound_group_goes_on_receiving_and_waits_for_its_resume() {
    let site = Site::new();
    let mut source = site.source("g");
    source.begin_epoch();
    source.write(10);
    source.bookmark("noon");
    let noon = source.lsn;
    let at_noon = source.model.clone();
    source.write(20);
    let handle = site.start(&[&source]).await;
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    let refused = handle.resume("g").await.unwrap_err();
    assert_eq!(refused.kind, receiver::ErrorKind::NotPossible, "{refused}");
    let unknown = handle.rewind("g", "bookmark:night".parse().unwrap()).await.unwrap_err();
    assert_eq!(unknown.kind, receiver::ErrorKind::NotPossible, "{unknown}");

    let report = handle.rewind("g", "bookmark:noon".parse().unwrap()).await.unwrap();
    assert_eq!((report.lsn.0, report.from_lsn.0), (noon, source.lsn));
    assert!(report.undo_bytes > 0 && report.written_bytes > 0, "{report:?}");
    let replica = |id: u32| site.dir.path().join(format!("r/replica/g/vol{id}.img"));
    let assert_noon = || at_noon.iter().for_each(|(id, content)| assert_equal(&replica(*id), content));
    assert_noon();
    while link.state.code != ReceiverCode::Rewound {
        link.hear().await;
    }
    // Ingest and acknowledgement go on; whoever waits for the replica hears at once that it will not come.
    let before = source.lsn;
    source.write(5);
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    let refused = handle.wait(PATIENCE).await.unwrap_err();
    assert_eq!(refused.kind, receiver::ErrorKind::NotPossible);
    assert!(refused.to_string().contains("bookmark:noon"), "{refused}");
    let group = &handle.status().groups[0];
    assert_eq!(group.state, State::Rewound);
    assert_eq!((group.positions.checkpoint_lsn.0, group.positions.received_lsn.0), (noon, source.lsn));
    let why = group.why.as_ref().unwrap();
    assert!(why.contains(&format!("lsn {noon}")) && why.contains("afterimage resume g"), "{why}");
    assert!(why.contains(&format!("{} records", source.lsn - noon)), "{why}");
    assert_eq!(group.rewound.as_ref().unwrap().at, "bookmark:noon");
    assert!(group.backlog_bytes > 0);
    assert_eq!(handle.points("g").unwrap().newest.unwrap().lsn.0, source.lsn, "all points are still there");
    handle.shutdown().await.unwrap();

    // Nothing but the resume ends it, not even a restart; and from here it may go further, or back.
    let handle = site.start(&[&source]).await;
    assert_eq!(handle.status().groups[0].state, State::Rewound);
    assert_noon();
    let forward = handle.rewind("g", At::Lsn(journal::Lsn(before))).await.unwrap();
    assert_eq!((forward.from_lsn.0, forward.lsn.0), (noon, before));
    handle.rewind("g", "bookmark:noon".parse().unwrap()).await.unwrap();
    assert_noon();
    let mut link = site.connect(&source, &handle).await;
    assert_eq!(link.state.code, ReceiverCode::Rewound);
    let resumed = handle.resume("g").await.unwrap();
    assert_eq!((resumed.from_lsn.0, resumed.received_lsn.0), (noon, source.lsn));
    handle.wait(PATIENCE).await.unwrap();
    source.write(3);
    link.send(&source.frames).await;
    link.on_replica(source.lsn).await;
    site.assert_replicas(&source);
    assert_eq!(link.state.code, ReceiverCode::Ok);
    assert_eq!(handle.status().groups[0].state, State::Replicating);
    assert_eq!(handle.points("g").unwrap().bookmarks.len(), 1);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bookmark_is_held_by_its_name_and_let_go() {
    let site = Site::new();
    let mut source = site.source("g");
    source.begin_epoch();
    source.bookmark("noon");
    source.write(5);
    let handle = site.start(&[&source]).await;
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    let refused = handle.hold("g", "night", false).await.unwrap_err();
    assert_eq!(refused.kind, receiver::ErrorKind::NotPossible);
    assert!(refused.to_string().contains("noon"), "the names that there are: {refused}");
    let held = handle.hold("g", "noon", false).await.unwrap();
    assert!(held.held);
    let points = handle.points("g").unwrap();
    assert!(points.bookmarks[0].held && points.holds[0].lsn == held.at.lsn);
    assert!(handle.hold("g", "noon", false).await.unwrap_err().to_string().contains("already"));
    handle.shutdown().await.unwrap();
    let handle = site.start(&[&source]).await;
    assert!(!handle.hold("g", "noon", true).await.unwrap().held);
    assert!(handle.points("g").unwrap().holds.is_empty());
    assert_eq!(handle.hold("g", "noon", true).await.unwrap_err().kind, receiver::ErrorKind::NotPossible);
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rot_in_a_stored_segment_is_found_by_scrub_and_told_with_its_place() {
    let site = Site::new();
    let mut source = site.source("g");
    source.begin_epoch();
    source.write(10);
    let handle = site.start(&[&source]).await;
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    source.write(10);
    link.send(&source.frames).await;
    link.on_replica(source.lsn).await;
    let scrubbed = async |after: Option<String>| {
        handle.scrub_now("g").unwrap();
        loop {
            let group = handle.status().groups.remove(0);
            match group.scrub.clone() {
                Some(scrub) if Some(&scrub.finished) != after.as_ref() => return (group, scrub),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let (group, scrub) = tokio::time::timeout(PATIENCE, scrubbed(None)).await.unwrap();
    assert_eq!((group.state, scrub.damage.len()), (State::Replicating, 0));
    assert!(scrub.segments >= 2 && scrub.bytes > 0, "journal and undo: {scrub:?}");

    let undo = site.dir.path().join("r/groups/g/undo");
    let segment = std::fs::read_dir(&undo).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[512 + 192 + 10] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    let (group, found) = tokio::time::timeout(PATIENCE, scrubbed(Some(scrub.finished))).await.unwrap();
    assert_eq!(found.damage.len(), 1, "{found:?}");
    assert_eq!((&found.damage[0].file, found.damage[0].offset), (&segment, 512));
    assert_eq!(group.state, State::Degraded);
    let why = group.why.unwrap();
    assert!(why.contains(segment.to_str().unwrap()) && why.contains("byte 512"), "{why}");
    bytes[512 + 192 + 10] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    let (group, mended) = tokio::time::timeout(PATIENCE, scrubbed(Some(found.finished))).await.unwrap();
    assert_eq!((group.state, mended.damage.len()), (State::Replicating, 0));
    handle.shutdown().await.unwrap();
}

/// A restore that is held in its first step: listed, alone on its target, and ended by its client or by name.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_listed_alone_on_its_target_and_ends_with_its_client_or_by_order() {
    let site = Site::new();
    let mut source = site.source("g");
    let handle = std::sync::Arc::new(site.start(&[&source]).await);
    source.begin_epoch();
    source.write(40);
    source.bookmark("here");
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    handle.wait(PATIENCE).await.unwrap();
    let home = tempfile::tempdir().unwrap();
    let to = home.path().join("past.img");
    let request = RestoreRequest {
        at: At::Bookmark("here".into()),
        to: to.clone(),
        volume: Some("vol1".into()),
        force: true,
        dry_run: false,
    };
    for by_order in [false, true] {
        let (begun, mut first) = tokio::sync::mpsc::channel(1);
        let (go_on, hold) = std::sync::mpsc::sync_channel::<()>(1);
        let (held, asked) = (handle.clone(), request.clone());
        let restore = tokio::spawn(async move {
            let step = move |_, _| {
                let _ = begun.try_send(());
                let _ = hold.recv();
            };
            held.restore("g", asked, step).await
        });
        first.recv().await.unwrap();
        let listed = handle.status().groups[0].restores.clone();
        assert_eq!((listed.len(), &listed[0].to, &*listed[0].at), (1, &to, "bookmark:here"));
        let second =
            handle.restore("g", RestoreRequest { at: At::Latest, ..request.clone() }, |_, _| {}).await;
        let second = second.unwrap_err();
        assert_eq!(second.kind, receiver::ErrorKind::NotPossible);
        assert!(second.at.contains("bookmark:here") && second.at.contains("latest"), "{second}");
        if by_order {
            let ended = handle.clone();
            let target = to.clone();
            let cancel = tokio::spawn(async move { ended.cancel_restore(&target).await });
            while !handle.status().groups[0].restores.iter().all(|restore| restore.cancelled) {
                tokio::task::yield_now().await;
            }
            drop(go_on);
            assert_eq!(cancel.await.unwrap().unwrap(), 1);
            assert_eq!(restore.await.unwrap().unwrap_err().kind, receiver::ErrorKind::Cancelled);
        } else {
            restore.abort();
            assert!(restore.await.unwrap_err().is_cancelled());
            drop(go_on);
            while !handle.status().groups[0].restores.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "nothing is left");
    }
    assert_eq!(handle.cancel_restore(&to).await.unwrap_err().kind, receiver::ErrorKind::NotPossible);
    handle.restore("g", request, |_, _| {}).await.unwrap();
    assert!(to.exists());
    std::sync::Arc::into_inner(handle).unwrap().shutdown().await.unwrap();
}
