//! Rot in the receiver's journal: what the source still holds is fetched again and put back, byte for byte;
//! what it does not hold is a hole, told with its reason, and where it is not applied yet the source is told
//! to begin anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod link_source;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use journal::Lsn;
use journal::frame::FrameHeader;
use link_source::{Again, Link, PATIENCE, Site, Source, assert_equal, serve_again};
use receiver::agent::Handle;
use receiver::point::At;
use receiver::restore::RestoreRequest;
use receiver::status::{GroupStatus, State};
use wire::message::ReceiverCode;

/// Flips a bit of a frame's payload where it lies in the receiver's journal; the file, whole, and the place.
fn rot(site: &Site, frame: &(FrameHeader, Bytes)) -> (PathBuf, Vec<u8>, usize) {
    let journal = site.dir.path().join("r/groups/g/journal");
    for entry in std::fs::read_dir(journal).unwrap() {
        let path = entry.unwrap().path();
        let content = std::fs::read(&path).unwrap();
        if path.extension().is_some_and(|extension| extension == "seg")
            && let Some(at) = content.windows(192).position(|window| *window == frame.1[..192])
        {
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[content[at + 200] ^ 1], at as u64 + 200).unwrap();
            return (path, content, at);
        }
    }
    panic!("no segment holds the frame");
}

async fn until(handle: &Handle, what: &str, holds: impl Fn(&GroupStatus) -> bool) -> GroupStatus {
    let looking = async {
        loop {
            let group = handle.status().groups.remove(0);
            if holds(&group) {
                return group;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let late = |_| panic!("{what}: {:#?}", handle.status().groups[0]);
    tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(late)
}

/// A group with a sealed segment of one epoch and an open one of the next, all of it applied.
async fn begun(site: &Site) -> (Source, Handle, Link) {
    let mut source = site.source("g");
    let handle = site.start(&[&source]).await;
    source.begin_epoch();
    source.write(20);
    let mut link = site.connect(&source, &handle).await;
    link.send(&source.frames).await;
    link.on_replica(source.lsn).await;
    source.write(20);
    link.send(&source.frames).await;
    link.on_replica(source.lsn).await;
    (source, handle, link)
}

async fn restored(site: &Site, handle: &Handle, lsn: u64) -> receiver::Result<PathBuf> {
    let to = site.dir.path().join(format!("restored-{lsn}.img"));
    let _ = std::fs::remove_file(&to);
    let request = RestoreRequest {
        at: At::Lsn(Lsn(lsn)),
        volume: Some("vol1".to_owned()),
        to: to.clone(),
        force: false,
        dry_run: false,
    };
    handle.restore("g", request, |_, _| ()).await.map(|_| to)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_applied_frame_that_rotted_is_fetched_and_put_back() {
    let site = Site::new();
    let (mut source, handle, mut link) = begun(&site).await;
    let at = source.frames.len() - 10;
    // The epoch ends, and its segment is sealed: damage in the sealed one and in the open one.
    let sealed = source.frames[at].clone();
    source.begin_epoch();
    source.write(20);
    link.send(&source.frames).await;
    link.on_replica(source.lsn).await;
    let open = source.frames[source.frames.len() - 5].clone();
    let asked = serve_again(link.connection.clone(), source.frames.clone(), Again::Held);
    for (round, frame) in [sealed, open].into_iter().enumerate() {
        let (path, whole, offset) = rot(&site, &frame);
        let before = handle.status().groups[0].scrub.clone().map(|scrub| scrub.finished);
        handle.scrub_now("g").unwrap();
        let group = until(&handle, "mended", |group| {
            group.repaired.len() == round + 1
                && group.scrub.as_ref().is_some_and(|scrub| Some(&scrub.finished) != before.as_ref())
        })
        .await;
        let repaired = &group.repaired[round];
        assert_eq!(
            (&repaired.file, repaired.offset, repaired.bytes),
            (&path, offset as u64, frame.1.len() as u64)
        );
        assert_eq!(repaired.lsns, Some((frame.0.first_lsn, frame.0.last_lsn)));
        let now = std::fs::read(&path).unwrap();
        assert!(now[..offset + frame.1.len()] == whole[..offset + frame.1.len()]);
        let group = until(&handle, "whole again", |group| group.state == State::Replicating).await;
        assert_eq!(group.scrub.unwrap().damage, []);
        assert_eq!(asked.load(Ordering::SeqCst), round + 1, "each frame is asked for once");
    }
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_source_does_not_hold_any_more_is_a_hole_in_the_points() {
    for again in [Again::Gone, Again::Forged] {
        let site = Site::new();
        let (source, handle, link) = begun(&site).await;
        let _asked = serve_again(link.connection.clone(), source.frames.clone(), again);
        let frame = source.frames[source.frames.len() - 10].clone();
        let model_after = source.model.clone();
        rot(&site, &frame);
        handle.scrub_now("g").unwrap();
        let group = until(&handle, "found", |group| group.state == State::Degraded).await;
        assert!(group.why.as_ref().unwrap().contains("damage in"), "{:?}", group.why);
        let has_hole = || {
            handle
                .points("g")
                .unwrap()
                .gaps
                .iter()
                .find(|gap| gap.from_lsn.next() == frame.0.first_lsn)
                .cloned()
        };
        until(&handle, "told", |_| has_hole().is_some()).await;
        let hole = has_hole().unwrap();
        assert!(hole.to_lsn.unwrap() >= frame.0.last_lsn, "{hole:?}");
        assert!(hole.reason.contains("does not hold it any more"), "{}", hole.reason);
        // Points in it are refused with their neighbours; before and behind it all is exact.
        let refused = restored(
            &site,
            &handle,
            frame.0.last_lsn.0 - u64::from(frame.0.last_lsn == hole.to_lsn.unwrap()),
        )
        .await;
        if frame.0.first_lsn < hole.to_lsn.unwrap() {
            let refused = refused.unwrap_err();
            assert_eq!(refused.kind, receiver::ErrorKind::NotPossible, "{refused}");
            assert!(refused.to_string().contains(&format!("lsn {}", hole.from_lsn)), "{refused}");
        }
        restored(&site, &handle, hole.from_lsn.0).await.unwrap();
        restored(&site, &handle, hole.to_lsn.unwrap().0).await.unwrap();
        let newest = restored(&site, &handle, source.lsn).await.unwrap();
        assert_equal(&newest, &model_after[&1]);
        assert!(handle.status().groups[0].repaired.is_empty());
        handle.shutdown().await.unwrap();
    }
}

/// Frames that are received and not applied: the group is rewound meanwhile.
async fn unapplied(site: &Site) -> (Source, Handle, Link, (FrameHeader, Bytes)) {
    let (mut source, handle, mut link) = begun(site).await;
    handle.rewind("g", At::Latest).await.unwrap();
    source.write(30);
    link.send(&source.frames).await;
    link.acknowledged(source.lsn).await;
    let frame = source.frames[source.frames.len() - 15].clone();
    rot(site, &frame);
    (source, handle, link, frame)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_rotted_before_it_was_applied_is_fetched_when_apply_meets_it() {
    let site = Site::new();
    let (source, handle, mut link, frame) = unapplied(&site).await;
    // The source is away when it is met, and comes back.
    link.connection.close(0_u32.into(), b"");
    handle.resume("g").await.unwrap();
    let group = until(&handle, "stands", |group| group.apply_error.is_some()).await;
    assert!(group.positions.checkpoint_lsn < frame.0.first_lsn);
    link = site.connect(&source, &handle).await;
    let asked = serve_again(link.connection.clone(), source.frames.clone(), Again::Held);
    link.on_replica(source.lsn).await;
    site.assert_replicas(&source);
    let group = until(&handle, "well", |group| group.state == State::Replicating).await;
    assert_eq!((group.repaired.len(), asked.load(Ordering::SeqCst)), (1, 1));
    assert_eq!(link.state.code, ReceiverCode::Ok);
    restored(&site, &handle, frame.0.last_lsn.0).await.unwrap();
    handle.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_lost_before_it_was_applied_needs_a_new_epoch_and_stays_a_hole() {
    let site = Site::new();
    let (mut source, handle, mut link, frame) = unapplied(&site).await;
    let _asked = serve_again(link.connection.clone(), source.frames.clone(), Again::Gone);
    handle.resume("g").await.unwrap();
    while link.state.code != ReceiverCode::NeedsResync {
        link.hear().await;
    }
    assert!(link.state.why.contains("are lost"), "{}", link.state.why);
    let group = until(&handle, "needs a resync", |group| group.state == State::NeedsResync).await;
    let good = frame.0.first_lsn.0 - 1;
    assert_eq!(group.positions.checkpoint_lsn.0, good, "the last good lsn");
    let points = handle.points("g").unwrap();
    assert_eq!(points.newest.as_ref().unwrap().lsn.0, good);
    let hole = points.gaps.last().unwrap();
    assert_eq!((hole.from_lsn.0, hole.to_lsn), (good, None));
    restored(&site, &handle, good).await.unwrap();
    assert_eq!(restored(&site, &handle, good + 1).await.unwrap_err().kind, receiver::ErrorKind::NotPossible);

    // The new epoch begins with the whole content; what lies before the hole stays restorable.
    source.begin_epoch();
    let begun =
        source.frames.iter().rev().find(|(header, _)| header.epoch != source.stamp.epoch).unwrap().0.last_lsn;
    source.write(10);
    link.send(&source.frames).await;
    link.on_replica(source.lsn).await;
    site.assert_replicas(&source);
    let check = async |handle: &Handle, when: &str| {
        let points = handle.points("g").unwrap();
        let hole =
            points.gaps.iter().find(|gap| gap.from_lsn.0 <= good && gap.to_lsn.is_some_and(|to| to > begun));
        assert!(hole.is_some(), "{when}: {:?}", points.gaps);
        restored(&site, handle, good).await.unwrap();
        for lsn in [good + 1, begun.0] {
            let refused = restored(&site, handle, lsn).await.unwrap_err();
            assert_eq!(refused.kind, receiver::ErrorKind::NotPossible, "{when}: lsn {lsn}: {refused}");
        }
        let newest = restored(&site, handle, source.lsn).await.unwrap();
        assert_equal(&newest, &source.model[&1]);
    };
    check(&handle, "before a restart").await;
    assert_eq!(link.state.code, ReceiverCode::Ok);
    handle.shutdown().await.unwrap();
    let handle = site.start(&[&source]).await;
    check(&handle, "after a restart").await;
    handle.shutdown().await.unwrap();
}
