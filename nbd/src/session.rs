//! The transmission phase, sans-IO: bytes in, checked requests out.
//!
//! [`Session::handle_bytes`] takes one event at a time from the front of the bytes received. A request that
//! comes out of it is within the export, aligned and allowed; one that is not comes out as [`Event::Refused`]
//! after its payload has been skipped. State: the WRITE whose payload is being received, if any.
//!
//! Invariants: no more than [`PIECE_BYTES`] `+` a header need be in memory to make progress, whatever length
//! a peer claims; and no byte of a WRITE is handed over before all of it is there. A longer WRITE comes out
//! as [`Event::LongWrite`]: its payload follows in the stream, to be collected by the connection, which has a
//! budget for that.

use std::ops::Range;

use crate::error::{Error, Kind};
use crate::handshake::Selection;
use crate::proto::{Errno, MIN_BLOCK_BYTES, REQUEST_HEADER_BYTES, REQUEST_MAGIC, command, command_flag};

/// Largest WRITE that comes out with its payload; and the largest piece in which a longer one reaches the
/// export.
pub const PIECE_BYTES: usize = 1 << 20;

/// Why a request is answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Error number for the client.
    pub errno: Errno,
    /// For the client's log.
    pub message: String,
}

impl Refusal {
    /// A refusal with its reason.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self { errno, message: message.into() }
    }
}

/// What a checked request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read; with `whole` in a single chunk.
    Read {
        /// The reply must not be split.
        whole: bool,
    },
    /// Make durable what was answered before.
    Flush,
    /// Discard.
    Trim,
    /// Zero.
    WriteZeroes {
        /// Leave the range allocated.
        no_hole: bool,
        /// Fail rather than be slow.
        fast: bool,
    },
    /// Describe the allocation; with `one` only the first extent.
    BlockStatus {
        /// A single extent.
        one: bool,
    },
}

/// A checked request without a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The client's name for it.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// First byte; within the export.
    pub offset: u64,
    /// Length; only READ, TRIM and WRITE_ZEROES may have none, and then there is nothing to do.
    pub length: u32,
    /// Durable before it is answered.
    pub fua: bool,
}

/// A WRITE whose payload is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The client's name for it.
    pub cookie: u64,
    /// Where it goes.
    pub offset: u64,
    /// Where its bytes are in the input; may be empty.
    pub bytes: Range<usize>,
    /// Durable before it is answered.
    pub fua: bool,
}

/// A WRITE longer than [`PIECE_BYTES`]; its payload is what follows in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongWrite {
    /// The client's name for it.
    pub cookie: u64,
    /// Where it goes.
    pub offset: u64,
    /// Length of the payload.
    pub length: u32,
    /// Durable before it is answered.
    pub fua: bool,
}

/// What the front of the input holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Nothing complete. The next event is there when this many bytes are, counted after those consumed.
    Incomplete {
        /// Bytes that must be in memory at once.
        wanted: usize,
    },
    /// A request without payload.
    Request(Request),
    /// A WRITE, whole.
    Write(Write),
    /// A WRITE whose payload, all of it, comes next and is not the session's: take it from the stream before
    /// the next call.
    LongWrite(LongWrite),
    /// A request to be answered with an error.
    Refused {
        /// The client's name for it.
        cookie: u64,
        /// The answer.
        refusal: Refusal,
    },
    /// The client leaves: answer what is in flight and close.
    Disconnect,
}

/// A WRITE whose payload is on its way.
#[derive(Debug)]
struct Payload {
    cookie: u64,
    offset: u64,
    remaining: u32,
    fua: bool,
    refusal: Option<Refusal>,
}

/// Parser of the transmission phase.
#[derive(Debug)]
pub struct Session {
    read_only: bool,
    structured: bool,
    allocation: bool,
    max_payload_bytes: u32,
    piece_bytes: usize,
    payload: Option<Payload>,
}

impl Session {
    /// Begins after the handshake.
    pub fn new(selection: Selection, read_only: bool, max_payload_bytes: u32) -> Self {
        let Selection { structured, allocation, .. } = selection;
        Self { read_only, structured, allocation, max_payload_bytes, piece_bytes: PIECE_BYTES, payload: None }
    }

    /// Whether the input ends between two requests.
    pub fn is_between_requests(&self) -> bool {
        self.payload.is_none()
    }

    /// Takes the next event from the front of `input`; `size_bytes` is the export's size now. Returns how
    /// many bytes it took. An error means that the stream makes no sense any more.
    pub fn handle_bytes(&mut self, input: &[u8], size_bytes: u64) -> Result<(usize, Event), Error> {
        if self.payload.is_some() {
            return Ok(self.take_payload(input, 0));
        }
        let Some(header) = input.first_chunk::<REQUEST_HEADER_BYTES>() else {
            return Ok((0, Event::Incomplete { wanted: REQUEST_HEADER_BYTES }));
        };
        let header = Header::parse(header)?;
        let checked = self.check(&header, size_bytes);
        match (header.kind, checked) {
            (command::DISC, _) => Ok((REQUEST_HEADER_BYTES, Event::Disconnect)),
            (command::WRITE, Ok(_)) if header.length as usize > self.piece_bytes => {
                let Header { cookie, offset, length, .. } = header;
                let fua = header.has(command_flag::FUA);
                Ok((REQUEST_HEADER_BYTES, Event::LongWrite(LongWrite { cookie, offset, length, fua })))
            }
            (command::WRITE, checked) => {
                self.payload = Some(Payload {
                    cookie: header.cookie,
                    offset: header.offset,
                    remaining: header.length,
                    fua: header.has(command_flag::FUA),
                    refusal: checked.err(),
                });
                Ok(self.take_payload(input, REQUEST_HEADER_BYTES))
            }
            (_, Ok(command)) => {
                let Header { cookie, mut offset, mut length, .. } = header;
                if command == Command::Flush {
                    (offset, length) = (0, 0); // meaningless there, and not checked
                }
                let fua = header.has(command_flag::FUA);
                Ok((REQUEST_HEADER_BYTES, Event::Request(Request { cookie, command, offset, length, fua })))
            }
            (_, Err(refusal)) => {
                Ok((REQUEST_HEADER_BYTES, Event::Refused { cookie: header.cookie, refusal }))
            }
        }
    }

    /// Payload bytes start at `from` of `input`.
    fn take_payload(&mut self, input: &[u8], from: usize) -> (usize, Event) {
        let payload = self.payload.as_mut().expect("invariant: called with a payload under way");
        let here = input.len() - from;
        let remaining = payload.remaining as usize;
        let take = match payload.refusal {
            Some(_) => remaining.min(here), // skipped as it comes
            None => remaining,
        };
        if take > here {
            // The header is consumed already: it was checked, and its payload has a state of its own.
            return (from, Event::Incomplete { wanted: take });
        }
        let taken = u32::try_from(take).expect("invariant: no more than remaining");
        payload.remaining -= taken;
        let last = payload.remaining == 0;
        let (cookie, offset, fua) = (payload.cookie, payload.offset, payload.fua);
        let event = match &payload.refusal {
            Some(refusal) if last => Event::Refused { cookie, refusal: refusal.clone() },
            Some(_) => Event::Incomplete { wanted: 1 },
            None => Event::Write(Write { cookie, offset, bytes: from..from + take, fua }),
        };
        if last {
            self.payload = None;
        }
        (from + take, event)
    }

    /// What the request asks for, or why it is refused. (A WRITE that is allowed has no [`Command`] of its
    /// own; its caller does not look at it.)
    fn check(&self, header: &Header, size_bytes: u64) -> Result<Command, Refusal> {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
        let refuse = |errno, message: String| Err(Refusal::new(errno, message));
        let (command, allowed_flags, writes) = match header.kind {
            command::READ => {
                (Command::Read { whole: header.has(DF) }, if self.structured { DF } else { 0 }, false)
            }
            command::WRITE => (Command::Flush, 0, true),
            command::FLUSH => (Command::Flush, 0, false),
            command::TRIM => (Command::Trim, 0, true),
            command::WRITE_ZEROES => {
                let (no_hole, fast) = (header.has(NO_HOLE), header.has(FAST_ZERO));
                (Command::WriteZeroes { no_hole, fast }, NO_HOLE | FAST_ZERO, true)
            }
            command::BLOCK_STATUS => (Command::BlockStatus { one: header.has(REQ_ONE) }, REQ_ONE, false),
            command::DISC => return Ok(Command::Flush),
            kind => return refuse(Errno::Inval, format!("unknown command {kind}")),
        };
        // FUA is valid on every command (clients are known to set it everywhere).
        if header.flags & !(allowed_flags | FUA) != 0 {
            return refuse(Errno::Inval, format!("flags {:#x} are unknown on this command", header.flags));
        }
        if header.kind == command::FLUSH {
            return Ok(command);
        }
        if writes && self.read_only {
            return refuse(Errno::Perm, "the export is read-only".into());
        }
        let block = u64::from(MIN_BLOCK_BYTES);
        let length = u64::from(header.length);
        if !header.offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return refuse(Errno::Inval, format!("not a multiple of {block} bytes"));
        }
        if header.offset.checked_add(length).is_none_or(|end| end > size_bytes) {
            let errno = if writes { Errno::NoSpc } else { Errno::Inval };
            return refuse(errno, format!("beyond the end at {size_bytes}"));
        }
        let carries = matches!(header.kind, command::READ | command::WRITE);
        if carries && header.length > self.max_payload_bytes {
            // EOVERFLOW is a READ's: the reply, not the request, is too large.
            let errno = if writes { Errno::Inval } else { Errno::Overflow };
            return refuse(errno, format!("longer than {} bytes", self.max_payload_bytes));
        }
        if header.kind == command::BLOCK_STATUS && (!self.allocation || length == 0) {
            return refuse(
                Errno::Inval,
                "no metadata context was negotiated, or nothing was asked for".into(),
            );
        }
        Ok(command)
    }
}

/// A request header as it came.
struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Header {
    fn parse(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Result<Self, Error> {
        let [m0, m1, m2, m3, f0, f1, k0, k1, rest @ ..] = *bytes;
        let [c0, c1, c2, c3, c4, c5, c6, c7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != REQUEST_MAGIC {
            return Err(Error::new(Kind::Protocol, format!("request magic {magic:#010x}")));
        }
        Ok(Self {
            flags: u16::from_be_bytes([f0, f1]),
            kind: u16::from_be_bytes([k0, k1]),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::fuzz_session;
    use crate::proto::MAX_PAYLOAD_BYTES;

    const SIZE: u64 = 1 << 20;

    fn session(structured: bool, allocation: bool, read_only: bool) -> Session {
        Session::new(Selection { export: 0, structured, allocation }, read_only, MAX_PAYLOAD_BYTES)
    }

    fn request(kind: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(0x0102_0304_0506_0708_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    fn write(flags: u16, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = request(command::WRITE, flags, offset, length);
        bytes.resize(bytes.len() + length as usize, 0xab);
        bytes
    }

    fn only_event(session: &mut Session, bytes: &[u8]) -> Event {
        let (consumed, event) = session.handle_bytes(bytes, SIZE).unwrap();
        assert_eq!(consumed, bytes.len());
        event
    }

    fn errno(session: &mut Session, bytes: &[u8]) -> Option<Errno> {
        match only_event(session, bytes) {
            Event::Refused { cookie: 0x0102_0304_0506_0708, refusal } => Some(refusal.errno),
            Event::Request(_) | Event::Write(_) | Event::LongWrite(_) => None,
            event => panic!("{event:?}"),
        }
    }

    /// Found by the fuzzer.
    #[test]
    fn a_refused_write_at_the_end_of_all_offsets_is_skipped() {
        let selection = Selection { export: 0, structured: false, allocation: false };
        let mut session = Session::new(selection, false, MAX_PAYLOAD_BYTES);
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&[0, 0, 0, 1]);
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&u64::MAX.to_be_bytes());
        bytes.extend_from_slice(&512_u32.to_be_bytes());
        bytes.extend_from_slice(&[0; 512]);
        let (consumed, event) = session.handle_bytes(&bytes, 1 << 20).unwrap();
        assert!(matches!(event, Event::Refused { cookie: 7, .. }), "{event:?}");
        assert_eq!(consumed, bytes.len());
    }

    #[test]
    fn golden_bytes_of_a_request() {
        let bytes = hex::decode("25609513000300060102030405060708000000000000100000000200").unwrap();
        let expected = Request {
            cookie: 0x0102_0304_0506_0708,
            command: Command::WriteZeroes { no_hole: true, fast: false },
            offset: 0x1000,
            length: 512,
            fua: true,
        };
        assert_eq!(only_event(&mut session(true, true, false), &bytes), Event::Request(expected));
    }

    #[test]
    fn every_rule_has_its_errno() {
        use command::*;
        use command_flag::*;
        let whole = u32::try_from(SIZE).unwrap();
        let mut plain = session(false, false, false);
        let mut rich = session(true, true, false);
        let mut read_only = session(true, true, true);
        for (kind, beyond) in [(READ, Errno::Inval), (TRIM, Errno::NoSpc), (WRITE_ZEROES, Errno::NoSpc)] {
            assert_eq!(errno(&mut plain, &request(kind, FUA, 0, whole)), None);
            assert_eq!(errno(&mut plain, &request(kind, 0, 512, whole)), Some(beyond));
            assert_eq!(errno(&mut plain, &request(kind, 0, u64::MAX - 511, 512)), Some(beyond));
            assert_eq!(errno(&mut plain, &request(kind, 0, 1, 512)), Some(Errno::Inval));
            assert_eq!(errno(&mut plain, &request(kind, 0, 0, 511)), Some(Errno::Inval));
            assert_eq!(errno(&mut plain, &request(kind, 0x80, 0, 512)), Some(Errno::Inval));
            let refused = errno(&mut read_only, &request(kind, 0, 0, 512));
            assert_eq!(refused, (kind != READ).then_some(Errno::Perm));
        }
        assert_eq!(errno(&mut plain, &write(FUA, SIZE - 512, 512)), None);
        assert_eq!(errno(&mut plain, &write(0, SIZE - 512, 1024)), Some(Errno::NoSpc));
        assert_eq!(errno(&mut plain, &write(0, 3, 512)), Some(Errno::Inval));
        assert_eq!(errno(&mut plain, &write(DF, 0, 512)), Some(Errno::Inval));
        assert_eq!(errno(&mut read_only, &write(0, 0, 512)), Some(Errno::Perm));
        assert_eq!(errno(&mut plain, &request(READ, DF, 0, 512)), Some(Errno::Inval));
        assert_eq!(errno(&mut rich, &request(READ, DF, 0, 512)), None);
        assert_eq!(errno(&mut plain, &request(BLOCK_STATUS, 0, 0, 512)), Some(Errno::Inval));
        assert_eq!(errno(&mut rich, &request(BLOCK_STATUS, REQ_ONE, 0, 512)), None);
        assert_eq!(errno(&mut rich, &request(BLOCK_STATUS, 0, 0, 0)), Some(Errno::Inval));
        assert_eq!(errno(&mut read_only, &request(FLUSH, FUA, 77, 77)), None);
        for unknown in [5, 8, 0xffff] {
            assert_eq!(errno(&mut plain, &request(unknown, 0, 0, 512)), Some(Errno::Inval));
        }
        assert_eq!(only_event(&mut plain, &request(DISC, 0xffff, 1, 1)), Event::Disconnect);
    }

    #[test]
    fn payloads_have_a_limit() {
        let mut session = session(true, true, false);
        let too_long = MAX_PAYLOAD_BYTES + 512;
        let (_, event) = session.handle_bytes(&request(command::READ, 0, 0, too_long), u64::MAX).unwrap();
        assert!(matches!(event, Event::Refused { refusal, .. } if refusal.errno == Errno::Overflow));
        let mut refused = None;
        let mut input = request(command::WRITE, 0, 0, too_long);
        while refused.is_none() {
            let (consumed, event) = session.handle_bytes(&input, u64::MAX).unwrap();
            assert_eq!(consumed, input.len(), "skipped as it comes, never collected");
            input = vec![0; 512];
            match event {
                Event::Incomplete { wanted: 1 } => {}
                Event::Refused { refusal, .. } => refused = Some(refusal.errno),
                event => panic!("{event:?}"),
            }
        }
        assert_eq!(refused, Some(Errno::Inval));
        assert!(session.is_between_requests());
    }

    #[test]
    fn a_long_write_leaves_its_payload_to_the_connection_and_a_short_one_comes_whole() {
        let long = u32::try_from(PIECE_BYTES + 512).unwrap();
        let mut session = session(false, false, false);
        let stream = write(command_flag::FUA, 512, long);
        let (consumed, event) = session.handle_bytes(&stream, 4 * SIZE).unwrap();
        let expected = LongWrite { cookie: 0x0102_0304_0506_0708, offset: 512, length: long, fua: true };
        assert_eq!((consumed, event), (REQUEST_HEADER_BYTES, Event::LongWrite(expected)));
        assert!(session.is_between_requests());

        let short = write(0, 512, 4096);
        for here in [REQUEST_HEADER_BYTES, short.len() - 1] {
            let (consumed, event) = session.handle_bytes(&short[..here], SIZE).unwrap();
            assert_eq!((consumed, event), (REQUEST_HEADER_BYTES, Event::Incomplete { wanted: 4096 }));
            let (consumed, event) = session.handle_bytes(&short[REQUEST_HEADER_BYTES..], SIZE).unwrap();
            assert!(
                matches!(event, Event::Write(Write { offset: 512, .. })) && consumed == 4096,
                "{event:?}"
            );
        }
    }

    #[test]
    fn garbage_between_requests_is_the_end() {
        let error = session(true, true, false).handle_bytes(&[0; 28], SIZE).unwrap_err();
        assert_eq!(error.kind, Kind::Protocol);
    }

    fn a_message() -> impl Strategy<Value = Vec<u8>> {
        let flags = prop_oneof![4 => Just(0u16), 1 => 0..32u16];
        let at = prop_oneof![6 => (0..2100u64).prop_map(|block| block * 512), 1 => any::<u64>()];
        let length = prop_oneof![6 => (0..16u32).prop_map(|block| block * 512), 1 => 0..3000u32];
        // Not DISC: nothing is looked at after it.
        let kind = prop_oneof![Just(0u16), Just(1), Just(1), Just(3), Just(4), Just(6), Just(7), Just(99)];
        (kind, flags, at, length).prop_map(|(kind, flags, at, length)| match kind {
            command::WRITE => write(flags, at, length),
            kind => request(kind, flags, at, length),
        })
    }

    /// All events, with write pieces' positions made absolute, when at most `cuts` bytes more come at a time.
    fn events(stream: &[u8], cuts: &[usize]) -> Vec<(usize, Event)> {
        let mut session = session(true, true, false);
        session.piece_bytes = 2048;
        let (mut at, mut visible, mut events) = (0, 0, Vec::new());
        let mut cuts = cuts.iter().cycle();
        loop {
            let (consumed, event) = session.handle_bytes(&stream[at..visible], SIZE).unwrap();
            at += consumed;
            match event {
                Event::Incomplete { .. } if consumed > 0 => {}
                Event::Incomplete { wanted } => {
                    assert!(wanted > visible - at, "what was asked for is enough");
                    if visible == stream.len() {
                        assert_eq!(at, visible);
                        return events;
                    }
                    visible = (visible + cuts.next().unwrap()).min(stream.len());
                }
                Event::Write(mut write) => {
                    write.bytes = at - write.bytes.len()..at;
                    events.push((at, Event::Write(write)));
                }
                Event::LongWrite(long) => {
                    events.push((at, Event::LongWrite(long)));
                    at += long.length as usize;
                    visible = visible.max(at);
                }
                event => events.push((at, event)),
            }
        }
    }

    proptest! {
        /// However the stream is cut, the same events come at the same places.
        #[test]
        fn splits_do_not_matter(
            messages in prop::collection::vec(a_message(), 1..12),
            cuts in prop::collection::vec(1..5000usize, 1..8),
        ) {
            let stream = messages.concat();
            prop_assert_eq!(events(&stream, &cuts), events(&stream, &[usize::MAX / 2]));
        }

        #[test]
        fn hostile_bytes_never_panic(
            choice in any::<u8>(),
            messages in prop::collection::vec(a_message(), 0..4),
            noise in prop::collection::vec(any::<u8>(), 0..400),
            flip in any::<prop::sample::Index>(),
        ) {
            let mut stream = messages.concat();
            if !stream.is_empty() {
                let at = flip.index(stream.len());
                stream[at] ^= 1 << (choice % 8);
            }
            fuzz_session(&[&[choice], &stream[..], &noise].concat());
            fuzz_session(&[&[choice], &noise[..]].concat());
        }
    }
}
