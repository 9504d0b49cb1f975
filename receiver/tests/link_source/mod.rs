//! A scripted source: an epoch with volumes, writes and bookmarks as sealed frames, the model of what they
//! mean, and the client side of the wire.

#![allow(dead_code, reason = "each test binary uses its part of the harness")]
#![allow(clippy::unwrap_used, reason = "a test harness")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use journal::compress::{Compression, Encoder};
use journal::frame::{Batch, FrameHeader, Stamp, chain_seed};
use journal::record::{Op, Record, VolumeRecord};
use journal::{Epoch, EpochId, Extent, GroupId, Lineage, Lsn, VolumeId, VolumeUuid};
use receiver::agent::{Handle, Receiver};
use tokio::time::timeout;
use wire::message::{ErrorCode, Message, Position, ReceiverState};
use wire::{Client, ControlReceiver, ControlSender, Fingerprint, FrameWriter, Identity, Tuning, framing};

/// Longer than anything here takes on a busy machine; only a broken test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const VOLUME_BYTES: usize = 1 << 20;

/// A receiver's directory with its identity, and the settings to start it.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub identity: Fingerprint,
}

impl Site {
    pub fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::create(&dir.path().join("r/identity")).unwrap().fingerprint();
        Site { dir, identity }
    }

    pub fn source(&self, group: &str) -> Source {
        Source::new(&self.dir.path().join(format!("source-{group}")), group)
    }

    /// Settings that bind each source to its group, and apply without delay.
    pub fn settings(&self, sources: &[&Source]) -> conf::Receiver {
        let bind = |source: &&Source| conf::Source {
            identity: source.identity.fingerprint().0,
            groups: vec![source.group.clone()],
            max_bytes: None,
        };
        let local = ([127, 0, 0, 1], 0).into();
        let mut settings =
            conf::Receiver::embedded(&self.dir.path().join("r"), local, [0; 32], "none").unwrap();
        settings.source = sources.iter().map(bind).collect();
        settings.apply.idle = Duration::from_millis(5);
        settings.apply.min_interval = Duration::ZERO;
        settings.journal.segment_bytes = 1 << 20;
        settings
    }

    pub async fn start(&self, sources: &[&Source]) -> Handle {
        Receiver::start(self.settings(sources)).await.unwrap()
    }

    pub fn assert_replicas(&self, source: &Source) {
        for (id, expected) in &source.model {
            let path = self.dir.path().join(format!("r/replica/{}/vol{id}.img", source.group));
            assert_equal(&path, expected);
        }
    }

    pub async fn connect(&self, source: &Source, handle: &Handle) -> Link {
        source.connect(handle.local_addr(), self.identity).await
    }
}

#[track_caller]
pub fn assert_equal(path: &Path, expected: &[u8]) {
    let found = std::fs::read(path).unwrap();
    assert_eq!(found.len(), expected.len(), "{}", path.display());
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{} differs", path.display());
}

pub struct Source {
    pub identity: Identity,
    pub group: String,
    pub stamp: Stamp,
    pub frames: Vec<(FrameHeader, Bytes)>,
    /// Volumes' content now.
    pub model: BTreeMap<u32, Vec<u8>>,
    pub lsn: u64,
    chain: u64,
    time_ns: u64,
    encoder: Encoder,
    random: u64,
}

impl Source {
    pub fn new(dir: &Path, group: &str) -> Source {
        let lineage = Lineage([7; 16]);
        let mut id = [0; 16];
        id[..group.len().min(16)].copy_from_slice(&group.as_bytes()[..group.len().min(16)]);
        let stamp = Stamp { group: GroupId(id), lineage, epoch: Epoch::default() };
        Source {
            identity: Identity::create(dir).unwrap(),
            group: group.to_owned(),
            stamp,
            frames: Vec::new(),
            model: BTreeMap::new(),
            lsn: 0,
            chain: 0,
            time_ns: 1_700_000_000_000_000_000,
            encoder: Encoder::new().unwrap(),
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Seals one frame of these records; contents go to the model.
    pub fn frame(&mut self, records: &[(Op, u32, u64, Vec<u8>)]) {
        let mut batch = Batch::default();
        for (op, volume, offset, payload) in records {
            self.lsn += 1;
            self.time_ns += 1_000_000;
            let content = op.changes_content();
            let len = if content { payload.len() as u64 } else { 0 };
            let record = Record {
                op: *op,
                flags: 0,
                volume: VolumeId(*volume),
                lsn: Lsn(self.lsn),
                time_ns: self.time_ns,
                extent: Extent { offset: *offset, len },
            };
            batch.push(&record, payload);
            if content {
                let at = usize::try_from(*offset).unwrap();
                self.model.get_mut(volume).unwrap()[at..at + payload.len()].copy_from_slice(payload);
            }
        }
        let level = Compression::Zstd(1);
        let encoded = self.encoder.encode(&batch, &self.stamp, None, level, Vec::new()).unwrap();
        let (bytes, chain) = encoded.seal(self.chain);
        self.chain = chain;
        self.frames.push((FrameHeader::parse(&bytes).unwrap(), Bytes::from(bytes)));
    }

    /// A new epoch with two volumes, synchronised from what the model holds.
    pub fn begin_epoch(&mut self) {
        let number = self.stamp.epoch.number + 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.next(u64::MAX).to_le_bytes());
        self.stamp.epoch = Epoch { number, id: EpochId(id) };
        self.chain = chain_seed(self.stamp.lineage, self.stamp.epoch);
        self.lsn += 1000;
        let volume = |id: u8| {
            let record = VolumeRecord {
                uuid: VolumeUuid([id; 16]),
                size_bytes: VOLUME_BYTES as u64,
                sector_bytes: 512,
                present: true,
                name: format!("vol{id}"),
            };
            (Op::Volume, u32::from(id), 0, record.encode())
        };
        for id in [1, 2] {
            self.model.entry(id).or_insert_with(|| vec![0; VOLUME_BYTES]);
        }
        self.frame(&[volume(1), volume(2), (Op::ResyncBegin, 0, 0, b"first copy".to_vec())]);
        for id in [1, 2] {
            let content = self.model[&id].clone();
            for (at, chunk) in (0..).step_by(65536).zip(content.chunks(65536)) {
                self.frame(&[(Op::SyncSlot, id, at, chunk.to_vec())]);
            }
        }
        self.frame(&[(Op::ResyncEnd, 0, 0, Vec::new())]);
    }

    /// `count` frames of a few random writes each.
    pub fn write(&mut self, count: usize) {
        for _ in 0..count {
            let records: Vec<_> = (0..1 + self.next(4))
                .map(|_| {
                    let sectors = 1 + self.next(16);
                    let offset = self.next(VOLUME_BYTES as u64 / 512 - sectors) * 512;
                    let fill = u8::try_from(self.next(256)).unwrap();
                    let bytes = usize::try_from(sectors * 512).unwrap();
                    (Op::Write, 1 + u32::try_from(self.next(2)).unwrap(), offset, vec![fill; bytes])
                })
                .collect();
            self.frame(&records);
        }
    }

    pub fn bookmark(&mut self, name: &str) {
        self.frame(&[(Op::Bookmark, 0, 0, name.as_bytes().to_vec())]);
    }

    pub fn hello(&self) -> Message {
        Message::Hello {
            versions: vec![1],
            features: wire::refetch::FEATURE,
            group_id: self.stamp.group.0,
            group: self.group.clone(),
            lineage: self.stamp.lineage.0,
            epoch: self.stamp.epoch.number,
            epoch_id: self.stamp.epoch.id.0,
            volumes: Vec::new(),
            agent: "scripted".to_owned(),
        }
    }

    /// Connects and is welcomed.
    pub async fn connect(&self, to: SocketAddr, receiver: Fingerprint) -> Link {
        self.greet(to, receiver, &self.hello()).await.unwrap_or_else(|(code, why)| panic!("{code:?}: {why}"))
    }

    /// Connects with any hello; the refusal if there is one.
    pub async fn greet(
        &self,
        to: SocketAddr,
        receiver: Fingerprint,
        hello: &Message,
    ) -> Result<Link, (ErrorCode, String)> {
        let client = Client::new(&self.identity, receiver, &Tuning::default()).unwrap();
        let connection = client.connect(&to.to_string(), PATIENCE).await.unwrap();
        let (mut sender, mut control) = framing::open(&connection).await.unwrap();
        sender.send(hello).await.unwrap();
        match timeout(PATIENCE, control.next()).await.unwrap().unwrap().unwrap() {
            Message::Welcome { resume, state, .. } => {
                Ok(Link { _client: client, connection, sender, control, resume, state, acked: 0, applied: 0 })
            }
            Message::Error { code, reason } => Err((code, reason)),
            other => panic!("{other:?}"),
        }
    }
}

/// What a source says when it is asked for a frame again.
#[derive(Clone, Copy, PartialEq)]
pub enum Again {
    /// The frame.
    Held,
    /// It is gone.
    Gone,
    /// Another frame of the same length.
    Forged,
}

/// Answers questions for frames over a connection until it ends; counts them.
pub fn serve_again(
    connection: quinn::Connection,
    frames: Vec<(FrameHeader, Bytes)>,
    again: Again,
) -> Arc<AtomicUsize> {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut sender, mut receiver)) = framing::accept(&connection).await {
            while let Ok(Some(Message::FrameRequest { after, last_lsn })) = receiver.next().await {
                counted.fetch_add(1, Ordering::SeqCst);
                let wanted = frames.iter().find(|(header, _)| header.last_lsn.0 == last_lsn).unwrap();
                assert_eq!(wanted.0.chain_in, after.chain);
                let mut bytes = wanted.1.to_vec();
                if again == Again::Gone {
                    let reason = "its room was needed".to_owned();
                    sender.send(&Message::Error { code: ErrorCode::NotPossible, reason }).await.unwrap();
                    continue;
                }
                if again == Again::Forged {
                    let at = bytes.len() - 1;
                    bytes[at] ^= 1;
                }
                wire::refetch::send_frame(&mut sender, &bytes).await.unwrap();
            }
        }
    });
    asked
}

/// The source's end of a session.
pub struct Link {
    _client: Client,
    pub connection: quinn::Connection,
    pub sender: ControlSender,
    pub control: ControlReceiver,
    pub resume: Option<Position>,
    pub state: ReceiverState,
    pub acked: u64,
    pub applied: u64,
}

impl Link {
    /// Sends every frame after the resume position, on one stream.
    pub async fn send(&self, frames: &[(FrameHeader, Bytes)]) {
        let held = self.resume.map_or(0, |position| position.lsn).max(self.acked);
        let due = frames.iter().filter(|(header, _)| header.first_lsn.0 > held);
        self.send_exactly(due.map(|(_, bytes)| bytes.clone())).await;
    }

    pub async fn send_exactly(&self, frames: impl Iterator<Item = Bytes>) {
        let mut writer = FrameWriter::open(&self.connection).await.unwrap();
        for bytes in frames {
            // The receiver may have refused one before: its error is read elsewhere.
            if writer.send(bytes).await.is_err() {
                return;
            }
        }
        writer.finish();
    }

    pub async fn hear(&mut self) -> Message {
        let message = loop {
            let message = timeout(PATIENCE, self.control.next()).await.expect("the receiver is silent");
            let message = message.unwrap().expect("the control stream ended");
            if !matches!(message, Message::Heartbeat { .. }) {
                break message;
            }
        };
        if let Message::Ack { received_lsn, checkpoint_lsn, state, .. } = &message {
            assert!(*received_lsn >= self.acked, "acknowledgements never run back");
            self.acked = *received_lsn;
            self.applied = *checkpoint_lsn;
            self.state = state.clone().unwrap_or(self.state.clone());
        }
        message
    }

    /// Waits until `lsn` is acknowledged.
    pub async fn acknowledged(&mut self, lsn: u64) {
        while self.acked < lsn {
            let message = self.hear().await;
            assert!(matches!(message, Message::Ack { .. }), "{message:?}");
        }
    }

    /// Waits until `lsn` is on the replica.
    pub async fn on_replica(&mut self, lsn: u64) {
        while self.applied < lsn {
            let message = self.hear().await;
            assert!(matches!(message, Message::Ack { .. }), "{message:?}");
        }
    }

    /// Waits for the error that ends the session.
    pub async fn error(&mut self) -> (ErrorCode, String) {
        loop {
            match self.hear().await {
                Message::Ack { .. } => {}
                Message::Error { code, reason } => return (code, reason),
                other => panic!("{other:?}"),
            }
        }
    }
}
