//! The handshake, sans-IO: from the greeting to the chosen export.
//!
//! Bytes of the client go into [`Handshake::handle_bytes`] one message at a time, bytes for the client come
//! out of [`Handshake::poll_transmit`]. State: whether the client flags have come, and what was negotiated so
//! far. Invariants: an option is looked at only when all of it is there; an option longer than
//! [`MAX_OPTION_BYTES`] ends the connection before it is read; every option gets exactly one final reply.

use std::sync::Arc;

use uuid::Uuid;

use crate::error::{Error, Kind};
use crate::export::Export;
use crate::proto::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, GREETING_MAGIC, MAX_OPTION_BYTES, MAX_STRING_BYTES, MIN_BLOCK_BYTES,
    OPTION_HEADER_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, PREFERRED_BLOCK_BYTES, export_flag,
    handshake_flag::{FIXED_NEWSTYLE, NO_ZEROES},
    info, option, option_reply,
};

/// What the handshake tells about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name.
    pub name: String,
    /// Second name.
    pub uuid: Uuid,
    /// A line for humans, may be empty.
    pub description: String,
    /// Size.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Zeroing only if it is fast can be asked for.
    pub fast_zero: bool,
}

impl ExportInfo {
    /// The export as it is now.
    pub fn of(export: &dyn Export) -> Self {
        Self {
            name: export.name().to_owned(),
            uuid: export.uuid(),
            description: export.description().to_owned(),
            size_bytes: export.size_bytes(),
            read_only: export.read_only(),
            fast_zero: export.fast_zero(),
        }
    }

    fn flags(&self, structured: bool) -> u16 {
        use export_flag::*;
        let mut flags = HAS_FLAGS | SEND_FLUSH | CAN_MULTI_CONN;
        flags |= match self.read_only {
            true => READ_ONLY,
            false => SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES,
        };
        if self.fast_zero && !self.read_only {
            flags |= SEND_FAST_ZERO;
        }
        if structured {
            flags |= SEND_DF;
        }
        flags
    }
}

/// What a finished handshake agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Index into the exports given to [`Handshake::new`].
    pub export: usize,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// `base:allocation` was negotiated for this export.
    pub allocation: bool,
}

/// Where the handshake stands after some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Bytes were consumed, or more are needed.
    Going,
    /// The transmission phase begins with the next byte.
    Selected(Selection),
    /// The client has left in good order: send what is pending and close.
    Aborted,
}

/// The state machine.
#[derive(Debug)]
pub struct Handshake {
    exports: Arc<[ExportInfo]>,
    max_payload_bytes: u32,
    client_flags: Option<u16>,
    structured: bool,
    /// Export for which `base:allocation` was selected.
    allocation_for: Option<usize>,
    out: Vec<u8>,
}

impl Handshake {
    /// Starts with the greeting pending. The first export is the default one (empty name).
    pub fn new(exports: Arc<[ExportInfo]>, max_payload_bytes: u32) -> Self {
        let mut out = Vec::with_capacity(256);
        out.extend(GREETING_MAGIC.to_be_bytes());
        out.extend(OPTION_MAGIC.to_be_bytes());
        out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        Self { exports, max_payload_bytes, client_flags: None, structured: false, allocation_for: None, out }
    }

    /// Bytes for the client, if any are pending.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        (!self.out.is_empty()).then(|| std::mem::take(&mut self.out))
    }

    /// Looks at the bytes received and not consumed yet, and takes at most one message from their front.
    /// Returns how many bytes it took; none means that more are needed.
    pub fn handle_bytes(&mut self, input: &[u8]) -> Result<(usize, Progress), Error> {
        let mut fields = Fields(input);
        let Some(client_flags) = self.client_flags else {
            let Some(flags) = fields.u32() else { return Ok((0, Progress::Going)) };
            let known = u16::try_from(flags).ok().filter(|flags| flags & !(FIXED_NEWSTYLE | NO_ZEROES) == 0);
            self.client_flags = Some(known.ok_or_else(|| protocol(format!("client flags {flags:#x}")))?);
            return Ok((4, Progress::Going));
        };
        let (Some(magic), Some(option), Some(length)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Ok((0, Progress::Going));
        };
        if magic != OPTION_MAGIC {
            return Err(protocol(format!("option magic {magic:#018x}")));
        }
        if length > MAX_OPTION_BYTES {
            return Err(protocol(format!("option {option} of {length} bytes, limit {MAX_OPTION_BYTES}")));
        }
        if client_flags & FIXED_NEWSTYLE == 0 && option != option::EXPORT_NAME {
            return Err(protocol(format!("option {option} without the fixed newstyle flag")));
        }
        let Some(content) = fields.bytes(length) else { return Ok((0, Progress::Going)) };
        let progress = self.handle_option(option, content, client_flags)?;
        Ok((OPTION_HEADER_BYTES + content.len(), progress))
    }

    fn handle_option(&mut self, option: u32, content: &[u8], client_flags: u16) -> Result<Progress, Error> {
        match option {
            option::EXPORT_NAME => return self.export_name(content, client_flags),
            option::ABORT => {
                self.ack(option);
                return Ok(Progress::Aborted);
            }
            option::LIST if content.is_empty() => self.list(),
            option::STRUCTURED_REPLY if content.is_empty() => {
                self.structured = true;
                self.ack(option);
            }
            option::LIST | option::STRUCTURED_REPLY => self.refuse_invalid(option, "this option has no data"),
            option::INFO | option::GO => {
                if let Some(export) = self.describe(option, content)
                    && option == option::GO
                {
                    return Ok(Progress::Selected(self.selection(export)));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, content),
            // TLS too: a client that insists on it learns here that there is none.
            _ => self.reply(option, option_reply::ERR_UNSUP, &[b"this option is not supported"]),
        }
        Ok(Progress::Going)
    }

    fn selection(&self, export: usize) -> Selection {
        let allocation = self.structured && self.allocation_for == Some(export);
        Selection { export, structured: self.structured, allocation }
    }

    fn find(&self, name: &[u8]) -> Option<usize> {
        if name.is_empty() {
            return (!self.exports.is_empty()).then_some(0);
        }
        let named = self.exports.iter().position(|export| export.name.as_bytes() == name);
        named.or_else(|| {
            self.exports.iter().position(|export| export.uuid.hyphenated().to_string().as_bytes() == name)
        })
    }

    fn export_name(&mut self, name: &[u8], client_flags: u16) -> Result<Progress, Error> {
        // This option has no error reply; the protocol asks for the end of the connection.
        let export = self.find(name).ok_or_else(|| {
            protocol(format!("no export {:?}", String::from_utf8_lossy(&name[..name.len().min(256)])))
        })?;
        let info = &self.exports[export];
        self.out.extend(info.size_bytes.to_be_bytes());
        self.out.extend(info.flags(self.structured).to_be_bytes());
        if client_flags & NO_ZEROES == 0 {
            self.out.extend([0; 124]);
        }
        Ok(Progress::Selected(self.selection(export)))
    }

    fn list(&mut self) {
        for export in Arc::clone(&self.exports).iter() {
            let name = export.name.as_bytes();
            let parts = [&length_of(name).to_be_bytes()[..], name, export.description.as_bytes()];
            self.reply(option::LIST, option_reply::SERVER, &parts);
        }
        self.ack(option::LIST);
    }

    /// INFO and GO: `name length (4) | name | number of requests (2) | request (2) …`. Returns the export
    /// when it was described.
    fn describe(&mut self, option: u32, content: &[u8]) -> Option<usize> {
        let mut fields = Fields(content);
        let parsed = fields.string().and_then(|name| {
            let count = fields.u16()?;
            let asked: Vec<u16> = std::iter::from_fn(|| fields.u16()).collect();
            (asked.len() == usize::from(count) && fields.0.is_empty()).then_some((name, asked))
        });
        let Some((name, asked)) = parsed else {
            self.refuse_invalid(option, "malformed information request");
            return None;
        };
        let Some(index) = self.find(name) else {
            self.reply(option, option_reply::ERR_UNKNOWN, &[b"no export of that name"]);
            return None;
        };
        let exports = Arc::clone(&self.exports);
        let export = &exports[index];
        let send = |this: &mut Self, kind: u16, parts: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let mut all: Vec<&[u8]> = vec![&kind];
            all.extend(parts);
            this.reply(option, option_reply::INFO, &all);
        };
        let flags = export.flags(self.structured).to_be_bytes();
        send(self, info::EXPORT, &[&export.size_bytes.to_be_bytes(), &flags]);
        // Unasked, too: a client that does not know these limits should at least be able to see them.
        let sizes = [MIN_BLOCK_BYTES, PREFERRED_BLOCK_BYTES, self.max_payload_bytes].map(u32::to_be_bytes);
        send(self, info::BLOCK_SIZE, &[sizes.as_flattened()]);
        if asked.contains(&info::NAME) {
            send(self, info::NAME, &[export.name.as_bytes()]);
        }
        if asked.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            send(self, info::DESCRIPTION, &[export.description.as_bytes()]);
        }
        self.ack(option);
        Some(index)
    }

    /// `export name length (4) | name | number of queries (4) | { length (4) | query } …`
    fn meta_context(&mut self, option: u32, content: &[u8]) {
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            self.allocation_for = None; // each SET replaces the one before, also when it fails
        }
        if !self.structured {
            return self.refuse_invalid(option, "structured replies must be negotiated first");
        }
        let mut fields = Fields(content);
        let parsed = fields.string().and_then(|name| {
            let count = fields.u32()?;
            let mut wanted = count == 0 && !setting;
            for _ in 0..count {
                // Bounded by the data: each query takes at least four bytes of it.
                let query = fields.string()?;
                wanted |= query == BASE_ALLOCATION.as_bytes() || (!setting && query == b"base:");
            }
            fields.0.is_empty().then_some((name, wanted))
        });
        let Some((name, wanted)) = parsed else {
            return self.refuse_invalid(option, "malformed metadata context request");
        };
        let Some(export) = self.find(name) else {
            return self.reply(option, option_reply::ERR_UNKNOWN, &[b"no export of that name"]);
        };
        if wanted {
            let id = if setting { BASE_ALLOCATION_ID } else { 0 };
            let parts = [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()];
            self.reply(option, option_reply::META_CONTEXT, &parts);
            if setting {
                self.allocation_for = Some(export);
            }
        }
        self.ack(option);
    }

    fn ack(&mut self, option: u32) {
        self.reply(option, option_reply::ACK, &[]);
    }

    fn refuse_invalid(&mut self, option: u32, why: &str) {
        self.reply(option, option_reply::ERR_INVALID, &[why.as_bytes()]);
    }

    fn reply(&mut self, option: u32, kind: u32, parts: &[&[u8]]) {
        let length: u32 = parts.iter().map(|part| length_of(part)).sum();
        self.out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        for word in [option, kind, length] {
            self.out.extend(word.to_be_bytes());
        }
        self.out.extend(parts.iter().copied().flatten());
    }
}

fn protocol(what: String) -> Error {
    Error::new(Kind::Protocol, what)
}

fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("invariant: option replies are made of short strings")
}

/// A reader over foreign bytes: every method is `None` when too few are left.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self, length: u32) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(head)
    }

    /// A string with its length in front.
    fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.bytes(length).filter(|string| string.len() <= MAX_STRING_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{exports, fuzz_handshake};
    use crate::proto::MAX_PAYLOAD_BYTES;

    fn option(option: u32, content: &[u8]) -> Vec<u8> {
        let words = [option, length_of(content)].map(u32::to_be_bytes);
        [&OPTION_MAGIC.to_be_bytes()[..], words.as_flattened(), content].concat()
    }

    fn counted(string: &[u8]) -> Vec<u8> {
        [&length_of(string).to_be_bytes()[..], string].concat()
    }

    fn go(name: &str, asked: &[u16]) -> Vec<u8> {
        let mut content = counted(name.as_bytes());
        content.extend(u16::try_from(asked.len()).unwrap().to_be_bytes());
        content.extend(asked.iter().flat_map(|kind| kind.to_be_bytes()));
        content
    }

    fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut content = counted(name.as_bytes());
        content.extend(length_of(&vec![0; queries.len()]).to_be_bytes());
        content.extend(queries.iter().flat_map(|query| counted(query.as_bytes())));
        content
    }

    /// A handshake past its greeting, with both client flags set.
    fn started() -> Handshake {
        let mut handshake = Handshake::new(exports(), MAX_PAYLOAD_BYTES);
        handshake.poll_transmit().unwrap();
        assert_eq!(handshake.handle_bytes(&3u32.to_be_bytes()).unwrap(), (4, Progress::Going));
        handshake
    }

    /// Sends one message; returns the answer's `(type, content)` pairs.
    fn ask(handshake: &mut Handshake, message: &[u8]) -> (Progress, Vec<(u32, Vec<u8>)>) {
        let (consumed, progress) = handshake.handle_bytes(message).unwrap();
        assert_eq!(consumed, message.len());
        let answer = handshake.poll_transmit().unwrap_or_default();
        let mut fields = Fields(&answer);
        let mut replies = Vec::new();
        while let Some(magic) = fields.u64() {
            assert_eq!(magic, OPTION_REPLY_MAGIC);
            assert_eq!(fields.u32(), Some(u32::from_be_bytes(message[8..12].try_into().unwrap())));
            let kind = fields.u32().unwrap();
            replies.push((kind, fields.string().unwrap().to_vec()));
        }
        (progress, replies)
    }

    fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
        replies.iter().map(|(kind, _)| *kind).collect()
    }

    #[test]
    fn golden_bytes_of_a_whole_handshake() {
        let mut handshake = Handshake::new(exports(), MAX_PAYLOAD_BYTES);
        let mut step = |input: &str| {
            let input = hex::decode(input).unwrap();
            let (consumed, progress) = handshake.handle_bytes(&input).unwrap();
            assert_eq!(consumed, input.len());
            (hex::encode(handshake.poll_transmit().unwrap_or_default()), progress)
        };
        let head = "0003e889045565a9";
        assert_eq!(step("").0, "4e42444d4147494349484156454f50540003");
        assert_eq!(step("00000003").0, "");
        assert_eq!(
            step("49484156454f50540000000800000000").0,
            format!("{head}000000080000000100000000"),
            "structured replies"
        );
        assert_eq!(
            step("49484156454f50540000000a0000001b00000000000000010000000f626173653a616c6c6f636174696f6e").0,
            format!(
                "{head}0000000a000000040000001300000001626173653a616c6c6f636174696f6e{head}0000000a0000000100000000"
            ),
            "set meta context"
        );
        let (answer, progress) = step("49484156454f50540000000700000006000000000000");
        assert_eq!(
            answer,
            [
                format!("{head}00000007000000030000000c").as_str(),
                "0000000000004000000009ed",
                format!("{head}00000007000000030000000e").as_str(),
                "0003000002000000100002000000",
                format!("{head}000000070000000100000000").as_str(),
            ]
            .concat()
        );
        assert_eq!(progress, Progress::Selected(Selection { export: 0, structured: true, allocation: true }));
    }

    #[test]
    fn lists_every_export() {
        let (_, replies) = ask(&mut started(), &option(option::LIST, b""));
        assert_eq!(kinds(&replies), [option_reply::SERVER, option_reply::SERVER, option_reply::ACK]);
        assert_eq!(replies[1].1, [&counted(b"past")[..], b"a disk"].concat());
        let (_, replies) = ask(&mut started(), &option(option::LIST, b"x"));
        assert_eq!(kinds(&replies), [option_reply::ERR_INVALID]);
    }

    #[test]
    fn go_selects_by_name_by_uuid_and_by_default() {
        for (name, export) in [("", 0), ("disk", 0), ("past", 1), ("00000000-0000-0000-0000-000000000002", 1)]
        {
            let (progress, replies) = ask(&mut started(), &option(option::GO, &go(name, &[info::NAME])));
            let selection = Selection { export, structured: false, allocation: false };
            assert_eq!(progress, Progress::Selected(selection));
            let canonical = [&info::NAME.to_be_bytes()[..], exports()[export].name.as_bytes()].concat();
            assert!(replies.contains(&(option_reply::INFO, canonical)));
            assert_eq!(replies.last().unwrap().0, option_reply::ACK);
        }
    }

    #[test]
    fn fast_zeroing_is_offered_only_where_it_can_be_asked_for() {
        for (fast_zero, read_only, offered) in
            [(true, false, true), (false, false, false), (true, true, false)]
        {
            let export = ExportInfo { fast_zero, read_only, ..exports()[0].clone() };
            assert_eq!(export.flags(false) & export_flag::SEND_FAST_ZERO != 0, offered);
        }
    }

    #[test]
    fn info_does_not_select() {
        let asked = [info::DESCRIPTION, info::BLOCK_SIZE, 77];
        let (progress, replies) = ask(&mut started(), &option(option::INFO, &go("past", &asked)));
        assert_eq!(progress, Progress::Going);
        assert!(replies.contains(&(option_reply::INFO, [&[0, 2][..], b"a disk"].concat())));
        let flags = export_flag::HAS_FLAGS | export_flag::READ_ONLY | export_flag::SEND_FLUSH | 0x100;
        assert_eq!(replies[0].1[10..], flags.to_be_bytes(), "a read-only export offers nothing that writes");
    }

    #[test]
    fn an_unknown_export_or_option_can_be_tried_again() {
        let mut handshake = started();
        let (progress, replies) = ask(&mut handshake, &option(option::GO, &go("nothing", &[])));
        assert_eq!((progress, kinds(&replies)), (Progress::Going, vec![option_reply::ERR_UNKNOWN]));
        for unknown in [5, 11, 4711] {
            let (progress, replies) = ask(&mut handshake, &option(unknown, b"anything"));
            assert_eq!((progress, kinds(&replies)), (Progress::Going, vec![option_reply::ERR_UNSUP]));
        }
        let (progress, _) = ask(&mut handshake, &option(option::GO, &go("disk", &[])));
        assert!(matches!(progress, Progress::Selected(_)));
    }

    #[test]
    fn malformed_options_are_refused() {
        let too_many = [&go("disk", &[])[..4 + 4], &[0, 9]].concat();
        let long_name = go(&"x".repeat(MAX_STRING_BYTES + 1), &[]);
        for content in [&b""[..], &[0, 0, 0, 9, 1], &too_many, &long_name, &go("disk", &[0])[..9]] {
            for kind in [option::INFO, option::GO] {
                let (progress, replies) = ask(&mut started(), &option(kind, content));
                assert_eq!((progress, kinds(&replies)), (Progress::Going, vec![option_reply::ERR_INVALID]));
            }
        }
        let mut handshake = started();
        ask(&mut handshake, &option(option::STRUCTURED_REPLY, b""));
        let claims = [&counted(b"disk")[..], &u32::MAX.to_be_bytes(), &counted(b"base:")].concat();
        let (_, replies) = ask(&mut handshake, &option(option::SET_META_CONTEXT, &claims));
        assert_eq!(kinds(&replies), [option_reply::ERR_INVALID]);
    }

    #[test]
    fn contexts_need_structured_replies_and_hold_for_their_export() {
        let mut handshake = started();
        let set = option(option::SET_META_CONTEXT, &contexts("disk", &["qemu:dirty", BASE_ALLOCATION]));
        assert_eq!(kinds(&ask(&mut handshake, &set).1), [option_reply::ERR_INVALID]);
        ask(&mut handshake, &option(option::STRUCTURED_REPLY, b""));
        for (queries, found) in [(&[][..], true), (&["base:"], true), (&["qemu:"], false)] {
            let list = option(option::LIST_META_CONTEXT, &contexts("disk", queries));
            assert_eq!(ask(&mut handshake, &list).1.len(), 1 + usize::from(found));
        }
        let unknown = option(option::SET_META_CONTEXT, &contexts("nothing", &[BASE_ALLOCATION]));
        assert_eq!(kinds(&ask(&mut handshake, &unknown).1), [option_reply::ERR_UNKNOWN]);
        assert_eq!(kinds(&ask(&mut handshake, &set).1), [option_reply::META_CONTEXT, option_reply::ACK]);
        for (name, expected) in [("past", false), ("disk", true)] {
            let mut copy = Handshake { exports: exports(), out: Vec::new(), ..handshake };
            copy.allocation_for = handshake.allocation_for;
            let (progress, _) = ask(&mut copy, &option(option::GO, &go(name, &[])));
            assert!(
                matches!(progress, Progress::Selected(Selection { allocation, .. }) if allocation == expected)
            );
            handshake = copy;
        }
        let wildcard = option(option::SET_META_CONTEXT, &contexts("disk", &["base:"]));
        assert_eq!(kinds(&ask(&mut handshake, &wildcard).1), [option_reply::ACK], "SET knows no wildcard");
        assert_eq!(handshake.allocation_for, None);
    }

    #[test]
    fn export_name_answers_with_and_without_zeroes() {
        for (client_flags, length) in [(1u32, 10 + 124), (3, 10)] {
            let mut handshake = Handshake::new(exports(), MAX_PAYLOAD_BYTES);
            handshake.poll_transmit();
            handshake.handle_bytes(&client_flags.to_be_bytes()).unwrap();
            let (_, progress) = handshake.handle_bytes(&option(option::EXPORT_NAME, b"disk")).unwrap();
            assert!(matches!(progress, Progress::Selected(Selection { export: 0, .. })));
            assert_eq!(handshake.poll_transmit().unwrap().len(), length);
        }
        let nothing = started().handle_bytes(&option(option::EXPORT_NAME, b"nothing"));
        assert_eq!(nothing.unwrap_err().kind, Kind::Protocol);
    }

    #[test]
    fn abort_is_acknowledged() {
        let (progress, replies) = ask(&mut started(), &option(option::ABORT, b""));
        assert_eq!((progress, kinds(&replies)), (Progress::Aborted, vec![option_reply::ACK]));
    }

    #[test]
    fn a_client_that_makes_no_sense_is_cut_off() {
        let flags = Handshake::new(exports(), MAX_PAYLOAD_BYTES).handle_bytes(&[0, 0, 0, 4]);
        assert_eq!(flags.unwrap_err().kind, Kind::Protocol);
        assert_eq!(started().handle_bytes(&[0; 16]).unwrap_err().kind, Kind::Protocol);
        let mut huge = option(option::GO, b"");
        huge[12..].copy_from_slice(&(MAX_OPTION_BYTES + 1).to_be_bytes());
        assert_eq!(started().handle_bytes(&huge).unwrap_err().kind, Kind::Protocol);
        let mut old = Handshake::new(exports(), MAX_PAYLOAD_BYTES);
        old.handle_bytes(&[0; 4]).unwrap();
        assert_eq!(old.handle_bytes(&option(option::LIST, b"")).unwrap_err().kind, Kind::Protocol);
    }

    #[test]
    fn every_prefix_waits_for_the_rest() {
        let message = option(option::GO, &go("disk", &[info::NAME]));
        for cut in 0..message.len() {
            let mut handshake = started();
            assert_eq!(handshake.handle_bytes(&message[..cut]).unwrap(), (0, Progress::Going));
            assert!(handshake.poll_transmit().is_none());
        }
    }

    proptest! {
        /// Hostile bytes before the flags, at an option, inside an option of each kind, and after contexts.
        #[test]
        fn hostile_bytes_never_panic(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            kinds in prop::collection::vec(0..13u32, 0..6),
        ) {
            fuzz_handshake(&noise);
            let mut stream = 3u32.to_be_bytes().to_vec();
            fuzz_handshake(&[&stream[..], &noise].concat());
            stream.extend(option(option::STRUCTURED_REPLY, b""));
            for (index, kind) in kinds.into_iter().enumerate() {
                stream.extend(option(kind, &noise[noise.len().min(index * 8)..]));
                fuzz_handshake(&stream);
            }
            fuzz_handshake(&[&stream[..], &noise].concat());
        }
    }
}
