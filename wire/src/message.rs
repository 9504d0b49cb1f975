//! Control messages: what the two sides say to one another beside the frames.
//!
//! ```text
//! 0       1
//! │ 1 │ postcard of Message …        1 = version of this encoding
//! ```
//! The encoding is append-only: variants and the codes of enums are added at the end and never reordered,
//! fields are never added to a variant (a new variant is), and what a peer may send follows from the version
//! and features agreed in `Hello` and `Welcome`. Golden bytes below hold this. Identifiers are plain bytes
//! here; `journal` gives them their names.
//!
//! What a peer says in words is made harmless as it is decoded ([`machine::text`]): one line, short, nothing
//! that a terminal would obey. So it is nowhere kept, shown or logged as it came.

use journal::{Epoch, EpochId, Lineage, Lsn};
use machine::text::{tidy_in_place, tidy_to};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// First byte of every message.
pub const ENCODING: u8 = 1;
/// The protocol versions that this program speaks, newest first.
pub const VERSIONS: [u16; 1] = [1];
/// The most bytes of one message, its first byte included.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The most volumes of one hello: more than any group has.
pub const MAX_VOLUMES: usize = 256;
/// The most bytes of a name; a sound one has 64.
const MAX_NAME_BYTES: usize = 128;

/// A place in a group's history, as [`journal::Position`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Line of descent.
    pub lineage: [u8; 16],
    /// Epoch's number.
    pub epoch: u64,
    /// Epoch's random id.
    pub epoch_id: [u8; 16],
    /// Last lsn held.
    pub lsn: u64,
    /// Chain value after it.
    pub chain: u64,
}

impl From<journal::Position> for Position {
    fn from(p: journal::Position) -> Self {
        Position {
            lineage: p.lineage.0,
            epoch: p.epoch.number,
            epoch_id: p.epoch.id.0,
            lsn: p.lsn.0,
            chain: p.chain,
        }
    }
}

impl From<Position> for journal::Position {
    fn from(p: Position) -> Self {
        journal::Position {
            lineage: Lineage(p.lineage),
            epoch: Epoch { number: p.epoch, id: EpochId(p.epoch_id) },
            lsn: Lsn(p.lsn),
            chain: p.chain,
        }
    }
}

/// A volume as the source announces it. The receiver checks each field: the name becomes a path there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSummary {
    /// Short id within the group.
    pub id: u32,
    /// Name everywhere and for ever.
    pub uuid: [u8; 16],
    /// Name for people.
    pub name: String,
    /// Size now.
    pub size_bytes: u64,
    /// Logical sector.
    pub sector_bytes: u32,
}

/// How the receiver fares with this group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReceiverCode {
    /// Frames are wanted.
    Ok,
    /// The replica is not what the history says; a synchronisation is needed.
    NeedsResync,
    /// The replica cannot be written; frames are still taken in.
    ReplicaFailed,
    /// No room in the receiver's journal; nothing more is acknowledged.
    JournalFull,
    /// Apply is stopped by the operator.
    Stopped,
    /// The replica stands at an earlier point, by the operator's wish.
    Rewound,
    /// The replica was promoted; this source's lineage is over.
    Fenced,
}

/// The receiver's state and the reason, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverState {
    /// The state.
    pub code: ReceiverCode,
    /// Why; empty when all is well.
    pub why: String,
}

/// Why a side ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorCode {
    /// No protocol version in common.
    VersionMismatch,
    /// The identity is known to TLS but not to this receiver's settings any more.
    UnknownIdentity,
    /// The group belongs to another identity.
    GroupNotYours,
    /// Another connection serves the group now.
    GroupBusy,
    /// The lineage is not the one held.
    LineageMismatch,
    /// Same position, other content before it.
    ChainMismatch,
    /// A frame's bytes are not intact.
    BadFrame,
    /// A frame is intact but not the next one.
    OutOfOrder,
    /// The receiver's journal failed; it recovers on restart.
    JournalFailed,
    /// The group was promoted elsewhere.
    Fenced,
    /// What was asked for cannot be done in this state.
    NotPossible,
    /// A fault of the sender of this message.
    Internal,
    /// Another copy of this source serves the group. Said only to a source that offered
    /// [`crate::instance::FEATURE`].
    AnotherCopy,
}

/// A control message. Variants are appended, never moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Source, first: who and what.
    Hello {
        /// Versions spoken, newest first.
        versions: Vec<u16>,
        /// Features offered, a bit each.
        features: u64,
        /// Group, everywhere and for ever.
        group_id: [u8; 16],
        /// Group's name.
        group: String,
        /// Line of descent of what the source holds.
        lineage: [u8; 16],
        /// Current epoch's number.
        epoch: u64,
        /// Current epoch's random id.
        epoch_id: [u8; 16],
        /// The group's volumes.
        volumes: Vec<VolumeSummary>,
        /// Program and version, for logs.
        agent: String,
    },
    /// Receiver, in answer: from where to send.
    Welcome {
        /// Version chosen.
        version: u16,
        /// Features agreed.
        features: u64,
        /// Durable position held; `None` if nothing of this group is.
        resume: Option<Position>,
        /// State of the group here.
        state: ReceiverState,
        /// Program and version, for logs.
        agent: String,
    },
    /// Receiver: progress. `received_lsn` is durable.
    Ack {
        /// Epoch that the lsns belong to.
        epoch: u64,
        /// Durable in the receiver's journal.
        received_lsn: u64,
        /// Written to the replica.
        applied_lsn: u64,
        /// The replica durably is exactly this.
        checkpoint_lsn: u64,
        /// The state, when it has changed.
        state: Option<ReceiverState>,
    },
    /// Source: the newest there is, so that the receiver can tell its lag.
    Heartbeat {
        /// Newest lsn captured.
        captured_lsn: u64,
        /// Its epoch.
        epoch: u64,
        /// The source's realtime clock.
        time_ns: u64,
    },
    /// Either side: send no faster than this; `None` lifts the limit.
    Throttle {
        /// Bits a second.
        rate_bits_per_s: Option<u64>,
    },
    /// Source: apply up to here without waiting for a fuller batch.
    ApplyNow {
        /// Up to this lsn.
        lsn: u64,
    },
    /// Either side, last: something is wrong.
    Error {
        /// What.
        code: ErrorCode,
        /// In words, for people.
        reason: String,
    },
    /// Either side, last: an orderly end.
    Bye {
        /// In words, for people.
        reason: String,
    },
    /// Source, on a stream of questions: hash a range of the replica, see [`crate::compare`].
    HashRequest {
        /// Volume's id.
        volume: u32,
        /// First byte, at a chunk's boundary.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bytes of a chunk.
        chunk_bytes: u32,
        /// Epoch of `after_lsn`.
        epoch: u64,
        /// The replica must hold everything up to here.
        after_lsn: u64,
        /// Key of the hashes.
        key: [u8; 32],
    },
    /// Receiver, in answer.
    Hashes {
        /// The replica held everything up to here when it was read.
        applied_lsn: u64,
        /// 16 bytes a chunk, in order.
        hashes: Vec<u8>,
    },
    /// Receiver, on a stream of questions: send a frame again, see [`crate::refetch`].
    FrameRequest {
        /// The frame that follows this …
        after: Position,
        /// … and ends here.
        last_lsn: u64,
    },
    /// Source, in answer: the frame's next bytes.
    FramePart {
        /// Bytes of the frame behind these.
        left_bytes: u32,
        /// These bytes.
        bytes: Vec<u8>,
    },
    /// Receiver, before the welcome, to a source that offers it: which copy are you? See [`crate::instance`].
    InstanceRequest,
    /// Source, in answer; again whenever it has a new token.
    Instance {
        /// Drawn by the process at its start.
        run: [u8; 16],
        /// From now on.
        token: [u8; 16],
        /// The last one that was answered.
        previous: Option<[u8; 16]>,
    },
    /// Receiver: another copy of this source tried to connect, and was refused.
    CopySeen {
        /// From where.
        address: String,
        /// Its run.
        run: [u8; 16],
        /// The receiver's realtime clock.
        time_ns: u64,
        /// Whether it came with the token of this very connection, so that a new one is due.
        is_up_to_date: bool,
    },
}

impl Message {
    /// Makes harmless what a peer says in words.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`]: more volumes than any group has.
    fn tidied(mut self) -> Result<Message> {
        let name = |text: &mut String| {
            if let std::borrow::Cow::Owned(tidied) = tidy_to(text, MAX_NAME_BYTES) {
                *text = tidied;
            }
        };
        match &mut self {
            Message::Hello { group, volumes, agent, .. } => {
                if volumes.len() > MAX_VOLUMES {
                    let at = format!("a hello of {} volumes, the most is {MAX_VOLUMES}", volumes.len());
                    return Err(Error::new(ErrorKind::Malformed, at));
                }
                name(group);
                name(agent);
                volumes.iter_mut().for_each(|volume| name(&mut volume.name));
            }
            Message::Welcome { state, agent, .. } => {
                tidy_in_place(&mut state.why);
                name(agent);
            }
            Message::Ack { state: Some(state), .. } => tidy_in_place(&mut state.why),
            Message::Error { reason, .. } | Message::Bye { reason } => tidy_in_place(reason),
            Message::CopySeen { address, .. } => name(address),
            Message::Ack { state: None, .. }
            | Message::Heartbeat { .. }
            | Message::Throttle { .. }
            | Message::ApplyNow { .. }
            | Message::HashRequest { .. }
            | Message::Hashes { .. }
            | Message::FrameRequest { .. }
            | Message::FramePart { .. }
            | Message::InstanceRequest
            | Message::Instance { .. } => {}
        }
        Ok(self)
    }

    /// The message's bytes.
    ///
    /// # Errors
    /// [`ErrorKind::TooLong`] beyond [`MAX_MESSAGE_BYTES`].
    pub fn encode(&self) -> Result<Vec<u8>> {
        let bytes = postcard::to_extend(self, vec![ENCODING])
            .map_err(|e| Error::because(ErrorKind::TooLong, "encode control message", e))?;
        if bytes.len() > MAX_MESSAGE_BYTES {
            let at = format!("control message of {} bytes, the most is {MAX_MESSAGE_BYTES}", bytes.len());
            return Err(Error::new(ErrorKind::TooLong, at));
        }
        Ok(bytes)
    }

    /// Reads one whole message.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where it is none, or bytes are left over.
    pub fn decode(bytes: &[u8]) -> Result<Message> {
        let malformed = |at: String| Error::new(ErrorKind::Malformed, at);
        let (first, body) = bytes.split_first().ok_or_else(|| malformed("empty control message".into()))?;
        if *first != ENCODING {
            return Err(malformed(format!(
                "control message in encoding {first}, this program reads {ENCODING}"
            )));
        }
        let (message, rest) = postcard::take_from_bytes::<Message>(body)
            .map_err(|e| Error::because(ErrorKind::Malformed, "decode control message", e))?;
        if !rest.is_empty() {
            return Err(malformed(format!("control message with {} bytes left over", rest.len())));
        }
        message.tidied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(code: ReceiverCode, why: &str) -> ReceiverState {
        ReceiverState { code, why: why.into() }
    }

    /// Added to, never edited: a change here is a peer that no longer understands us.
    fn golden() -> Vec<(Message, &'static str)> {
        let resume = Position { lineage: [1; 16], epoch: 2, epoch_id: [3; 16], lsn: 300, chain: u64::MAX };
        let volume =
            VolumeSummary { id: 7, uuid: [8; 16], name: "v".into(), size_bytes: 1 << 30, sector_bytes: 512 };
        let hello = Message::Hello {
            versions: vec![1],
            features: 0,
            group_id: [9; 16],
            group: "g".into(),
            lineage: [1; 16],
            epoch: 2,
            epoch_id: [3; 16],
            volumes: vec![volume],
            agent: "a".into(),
        };
        let welcome =
            |resume, state| Message::Welcome { version: 1, features: 5, resume, state, agent: "a".into() };
        let ack = |state| Message::Ack {
            epoch: 2,
            received_lsn: 300,
            applied_lsn: 200,
            checkpoint_lsn: 100,
            state,
        };
        vec![
            (
                hello,
                "01000101000909090909090909090909090909090901670101010101010101010101010101010102030303030303030303030303030303030107080808080808080808080808080808080176808080800480040161",
            ),
            (welcome(None, state(ReceiverCode::Ok, "")), "010101050000000161"),
            (
                welcome(Some(resume), state(ReceiverCode::NeedsResync, "w")),
                "0101010501010101010101010101010101010101010203030303030303030303030303030303ac02ffffffffffffffffff010101770161",
            ),
            (ack(None), "010202ac02c8016400"),
            (ack(Some(state(ReceiverCode::Fenced, "w"))), "010202ac02c8016401060177"),
            (
                Message::Heartbeat { captured_lsn: 1, epoch: 2, time_ns: 1 << 60 },
                "01030102808080808080808010",
            ),
            (Message::Throttle { rate_bits_per_s: None }, "010400"),
            (Message::Throttle { rate_bits_per_s: Some(1000) }, "010401e807"),
            (Message::ApplyNow { lsn: 128 }, "01058001"),
            (Message::Error { code: ErrorCode::Internal, reason: "r".into() }, "01060b0172"),
            (Message::Bye { reason: "r".into() }, "01070172"),
            (
                Message::HashRequest {
                    volume: 1,
                    offset: 1 << 20,
                    length: 1 << 16,
                    chunk_bytes: 1 << 16,
                    epoch: 2,
                    after_lsn: 3,
                    key: [4; 32],
                },
                "01080180804080800480800402030404040404040404040404040404040404040404040404040404040404040404",
            ),
            (Message::Hashes { applied_lsn: 5, hashes: vec![6, 7] }, "010905020607"),
            (
                Message::FrameRequest { after: resume, last_lsn: 301 },
                "010a010101010101010101010101010101010203030303030303030303030303030303ac02ffffffffffffffffff01ad02",
            ),
            (Message::FramePart { left_bytes: 512, bytes: vec![8, 9] }, "010b8004020809"),
            (Message::InstanceRequest, "010c"),
            (
                Message::Instance { run: [1; 16], token: [2; 16], previous: None },
                "010d010101010101010101010101010101010202020202020202020202020202020200",
            ),
            (
                Message::Instance { run: [1; 16], token: [2; 16], previous: Some([3; 16]) },
                "010d01010101010101010101010101010101020202020202020202020202020202020103030303030303030303030303030303",
            ),
            (
                Message::CopySeen { address: "a".into(), run: [1; 16], time_ns: 2, is_up_to_date: true },
                "010e0161010101010101010101010101010101010201",
            ),
        ]
    }

    #[test]
    fn golden_bytes() {
        for (message, expected) in golden() {
            let bytes = message.encode().unwrap();
            assert_eq!(hex::encode(&bytes), expected, "{message:?}");
            assert_eq!(Message::decode(&bytes).unwrap(), message);
        }
    }

    #[test]
    fn codes_keep_their_numbers() {
        use {ErrorCode as E, ReceiverCode as R};
        let receiver =
            [R::Ok, R::NeedsResync, R::ReplicaFailed, R::JournalFull, R::Stopped, R::Rewound, R::Fenced]
                .map(number);
        assert_eq!(receiver, [0, 1, 2, 3, 4, 5, 6]);
        let error = [
            E::VersionMismatch,
            E::UnknownIdentity,
            E::GroupNotYours,
            E::GroupBusy,
            E::LineageMismatch,
            E::ChainMismatch,
            E::BadFrame,
            E::OutOfOrder,
            E::JournalFailed,
            E::Fenced,
            E::NotPossible,
            E::Internal,
            E::AnotherCopy,
        ]
        .map(number);
        assert_eq!(error, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    }

    fn number(code: impl Serialize) -> u8 {
        let bytes = postcard::to_stdvec(&code).unwrap();
        assert_eq!(bytes.len(), 1);
        bytes[0]
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let good = Message::Bye { reason: "r".into() }.encode().unwrap();
        let refused =
            |bytes: &[u8]| assert_eq!(Message::decode(bytes).unwrap_err().kind, ErrorKind::Malformed);
        for end in 0..good.len() {
            refused(&good[..end]);
        }
        refused(&[&good[..], &[0]].concat());
        refused(&[&[2], &good[1..]].concat());
        refused(&[ENCODING, 200]);
        // A string that claims 2^32 bytes.
        refused(&[ENCODING, 7, 0xff, 0xff, 0xff, 0xff, 0x0f, b'x']);
        let long = Message::Bye { reason: "r".repeat(MAX_MESSAGE_BYTES) };
        assert_eq!(long.encode().unwrap_err().kind, ErrorKind::TooLong);
    }

    /// What a peer may write is a constant's length and one line before anything else sees it.
    #[test]
    fn words_of_a_peer_are_harmless_once_decoded() {
        let hostile = "\u{1b}]0;x\u{7}\n\u{202e}".repeat(3000);
        let volume = |name: &str| VolumeSummary {
            id: 1,
            uuid: [1; 16],
            name: name.into(),
            size_bytes: u64::MAX,
            sector_bytes: u32::MAX,
        };
        let hello = |volumes| Message::Hello {
            versions: vec![1],
            features: u64::MAX,
            group_id: [1; 16],
            group: "g\u{1b}".repeat(500),
            lineage: [1; 16],
            epoch: u64::MAX,
            epoch_id: [1; 16],
            volumes,
            agent: hostile[..9000].to_owned(),
        };
        let why = || state(ReceiverCode::Stopped, &hostile);
        let messages = [
            hello(vec![volume(&hostile[..9000])]),
            Message::Welcome {
                version: 1,
                features: 0,
                resume: None,
                state: why(),
                agent: "\u{9b}2J".into(),
            },
            Message::Ack { epoch: 1, received_lsn: 1, applied_lsn: 1, checkpoint_lsn: 1, state: Some(why()) },
            Message::Error { code: ErrorCode::Internal, reason: hostile.clone() },
            Message::Bye { reason: hostile.clone() },
            Message::CopySeen { address: hostile.clone(), run: [1; 16], time_ns: 1, is_up_to_date: false },
        ];
        for message in messages {
            let decoded = Message::decode(&message.encode().unwrap()).unwrap();
            let text = match decoded {
                Message::Hello { group, agent, volumes, .. } => format!("{group}{agent}{}", volumes[0].name),
                Message::Welcome { state, agent, .. } => format!("{}{agent}", state.why),
                Message::Ack { state: Some(state), .. } => state.why,
                Message::Error { reason, .. } | Message::Bye { reason } => reason,
                Message::CopySeen { address, .. } => address,
                other => panic!("{other:?}"),
            };
            assert!(text.len() <= 1100 && !text.is_empty(), "{} bytes", text.len());
            assert!(!text.contains(|c: char| c.is_control() || c == '\u{202e}'), "{text}");
        }
        let many = hello(vec![volume("v"); MAX_VOLUMES + 1]).encode().unwrap();
        assert_eq!(Message::decode(&many).unwrap_err().kind, ErrorKind::Malformed);
    }

    #[test]
    fn positions_pass_unchanged() {
        let here = journal::Position {
            lineage: Lineage([1; 16]),
            epoch: Epoch { number: 2, id: EpochId([3; 16]) },
            lsn: Lsn(4),
            chain: 5,
        };
        assert_eq!(journal::Position::from(Position::from(here)), here);
    }
}
