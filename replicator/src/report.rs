//! The group's status, put together from what each part knows.

use std::path::Path;
use std::sync::atomic::Ordering;

use journal::{Lsn, Positions};
use kfilter::Mode;

use crate::agent::Agent;
use crate::capture::Ring;
use crate::clock::now_ns;
use crate::progress::PeerView;
use crate::status::{GroupStatus, State, VolumeStatus};

impl Agent {
    /// What is to be said of the ring's size; empty where it is as the settings want it.
    fn ring_words(&self) -> String {
        let (has, wanted) = (self.shared.ring.ring_bytes(), self.settings.ring.bytes);
        if has < wanted { crate::start::rings::is_smaller(has, wanted) } else { String::new() }
    }

    pub(crate) fn status(&self) -> GroupStatus {
        self.notice_overflow();
        let shared = &self.shared;
        // Downstream first: what is read later can only be further.
        let peer = shared.progress.peer();
        let journaled = shared.progress.position();
        let epoch = shared.progress.epoch();
        let captured = Lsn(shared.ring.captured_lsn());
        // A receiver may hold more than this source ever captured (one of them was rolled back): that is
        // trouble, told elsewhere, and no position of ours.
        let held = |lsn: Lsn| lsn.min(captured);
        let positions = Positions {
            captured_lsn: captured,
            journaled_lsn: journaled.lsn.min(captured),
            received_lsn: held(peer.received),
            applied_lsn: held(peer.applied),
            checkpoint_lsn: held(peer.checkpoint),
        };
        positions.assert_order();
        let (backlog_bytes, oldest_ns) = shared.progress.backlog();
        let lost_ns = shared.ring.loss().map(|loss| loss.since_ns);
        let oldest_ns = if peer.received >= captured { None } else { oldest_ns };
        let behind_since = lost_ns.into_iter().chain(oldest_ns).min();
        // Without a word of the receiver's on this epoch, nobody knows what it holds.
        let is_told = peer.epoch == epoch && peer.received >= journaled.lsn.min(captured);
        let lag_ns = match behind_since {
            Some(since) => Some(now_ns().saturating_sub(since)),
            None => is_told.then_some(0),
        };
        let (state, why) = shared.board.state();
        let link = self.link_words(&peer);
        // What is captured and received is not protected as it should be, whoever is to blame.
        let replica_failed = peer.replica_failed;
        let worst = |state: State| match state {
            State::Replicating if replica_failed => State::Degraded,
            other => other,
        };
        let state = worst(state);
        // The receiver's complaint may be the very cause of the state.
        let why = if why.is_empty() || why.contains(peer.trouble.trim_start_matches("receiver: ")) {
            [why, peer.trouble.clone()].into_iter().find(|text| !text.is_empty()).unwrap_or_default()
        } else {
            format!("{why}; {}", peer.trouble)
        };
        let copy = peer.copy_words().unwrap_or_default().to_owned();
        let why = [self.gone_words(), self.looks.words(), self.ring_words(), link, why, copy]
            .into_iter()
            .filter(|text| !text.is_empty())
            .collect::<Vec<_>>()
            .join("; ");
        let serving = self.serving.load(Ordering::Acquire);
        GroupStatus {
            name: self.settings.group.clone(),
            state,
            why,
            epoch,
            positions,
            rpo_ms: lag_ns.map(|lag_ns| lag_ns / 1_000_000),
            backlog_bytes,
            sent_bytes: shared.progress.sent_bytes(),
            skipped_bytes: shared.skipped.bytes(),
            journal_bytes: shared.journal_bytes.load(Ordering::Relaxed),
            ring_percent: percent(&shared.ring),
            clock_skew_ms: peer.clock_skew_ns.filter(|_| peer.connected.is_some()).map(|ns| ns / 1_000_000),
            connected: peer.connected.is_some(),
            peer: peer.connected.unwrap_or_else(|| self.settings.receiver.address.clone()),
            kernel: shared.ring.counters(),
            volumes: self
                .volumes
                .iter()
                .zip(&self.settings.volume)
                .map(|(volume, settings)| VolumeStatus {
                    name: volume.name.clone(),
                    state: worst(shared.board.volume(&volume.name)),
                    // Of a device the ring's word first: the device itself may not answer.
                    size_bytes: volume
                        .served()
                        .map(|served| served.size_bytes_now())
                        .or_else(|| shared.ring.size_bytes(volume.id))
                        .or_else(|| volume.size_bytes())
                        .unwrap_or(0),
                    nbd_uri: (serving && volume.served().is_some())
                        .then(|| format!("nbd+unix:///{}?socket={}", volume.name, uri_path(&settings.nbd))),
                    replica: None,
                    source: Some(settings.path.display().to_string()),
                })
                .collect(),
        }
    }

    /// That there is no link, where nothing else says so: `replicating` alone means that it is up.
    fn link_words(&self, peer: &PeerView) -> String {
        if peer.connected.is_some() || !peer.trouble.is_empty() {
            return String::new();
        }
        format!("no link to the receiver {} yet", self.settings.receiver.address)
    }

    /// Devices that vanished while they were captured: nothing can be written to them, and nothing read
    /// again.
    fn gone_words(&self) -> String {
        let gone =
            |volume: &&crate::capture::Volume| volume.is_attached() && self.shared.ring.is_gone(volume.id);
        let names: Vec<_> = self
            .volumes
            .iter()
            .map(|volume| &**volume)
            .filter(gone)
            .map(|volume| volume.name.as_str())
            .collect();
        if names.is_empty() {
            return String::new();
        }
        let names = names.join(", ");
        format!("the device of volume {names} is gone: its replica stays where it is; `afterimage detach` it")
    }

    /// Whether the ring takes records.
    pub(crate) fn is_recording(&self) -> bool {
        self.shared.ring.mode() == Mode::Ring
    }
}

/// A path as the value of a URI's query: all but letters, digits and `/-_.~` percent-encoded (RFC 3986).
fn uri_path(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(byte);
    path.as_os_str().as_bytes().iter().fold(String::new(), |mut out, byte| {
        if plain(byte) {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
fn percent(ring: &Ring) -> u8 {
    (ring.fill_ratio() * 100.0).clamp(0.0, 100.0) as u8
}
