//! Entry points of the fuzz targets `nbd_handshake` and `nbd_session`: hostile bytes, checked invariants.

use std::sync::Arc;

use uuid::Uuid;

use crate::handshake::{ExportInfo, Handshake, Progress, Selection};
use crate::proto::{MAX_PAYLOAD_BYTES, MIN_BLOCK_BYTES, REQUEST_HEADER_BYTES};
use crate::session::{Event, LongWrite, PIECE_BYTES, Request, Session, Write};

/// Two exports: one to write, one to read.
pub fn exports() -> Arc<[ExportInfo]> {
    let export = |name: &str, number, read_only| ExportInfo {
        name: name.to_owned(),
        uuid: Uuid::from_u128(number),
        description: "a disk".to_owned(),
        size_bytes: 1 << 30,
        read_only,
        fast_zero: !read_only,
    };
    [export("disk", 1, false), export("past", 2, true)].into()
}

/// Feeds the bytes to a handshake until it ends or wants more than there is.
pub fn fuzz_handshake(bytes: &[u8]) {
    let mut handshake = Handshake::new(exports(), MAX_PAYLOAD_BYTES);
    let mut at = 0;
    loop {
        let Ok((consumed, progress)) = handshake.handle_bytes(&bytes[at..]) else { return };
        at += consumed;
        assert!(at <= bytes.len());
        let answer = handshake.poll_transmit().unwrap_or_default();
        assert!(answer.len() < 64 << 10, "an option has a short answer");
        match progress {
            Progress::Going if consumed == 0 => return,
            Progress::Going => {}
            Progress::Selected(selection) => {
                assert!(selection.export < 2);
                assert!(selection.structured || !selection.allocation);
                return;
            }
            Progress::Aborted => return,
        }
    }
}

/// Feeds the bytes to a session; the first one chooses what was negotiated, and how large
/// the receive buffer is.
pub fn fuzz_session(bytes: &[u8]) {
    const SIZE: u64 = 1 << 20;
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let has = |bit: u8| choice & bit != 0;
    let selection = Selection { export: 0, structured: has(1), allocation: has(1) && has(2) };
    let mut session = Session::new(selection, has(4), MAX_PAYLOAD_BYTES);
    let window = if has(8) { 512 } else { usize::MAX };
    let (mut at, mut visible) = (0usize, 0usize);
    loop {
        visible = visible.max(at.saturating_add(window)).min(bytes.len());
        let Ok((consumed, event)) = session.handle_bytes(&bytes[at..visible], SIZE) else { return };
        assert!(consumed <= visible - at);
        match event {
            Event::Incomplete { wanted } => {
                assert!((1..=PIECE_BYTES + REQUEST_HEADER_BYTES).contains(&wanted));
                if consumed == 0 && visible == bytes.len() {
                    return;
                }
                assert!(consumed > 0 || wanted > visible - at, "progress is possible");
                visible = visible.max((at + consumed).saturating_add(wanted));
            }
            Event::Request(Request { offset, length, .. }) => check_range(offset, u64::from(length), SIZE),
            Event::Write(Write { offset, bytes, .. }) => {
                assert!(bytes.end == consumed && bytes.len() <= PIECE_BYTES && !has(4));
                check_range(offset, bytes.len() as u64, SIZE);
            }
            Event::LongWrite(LongWrite { offset, length, .. }) => {
                assert!(length as usize > PIECE_BYTES && !has(4));
                check_range(offset, u64::from(length), SIZE);
                at += length as usize;
                if at + consumed > bytes.len() {
                    return;
                }
                visible = visible.max(at + consumed);
            }
            Event::Refused { .. } => {}
            Event::Disconnect => return,
        }
        at += consumed;
    }
}

fn check_range(offset: u64, length: u64, size: u64) {
    let block = u64::from(MIN_BLOCK_BYTES);
    assert!(offset.is_multiple_of(block) && length.is_multiple_of(block));
    assert!(offset.checked_add(length).is_some_and(|end| end <= size));
}
