// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! What a producer wants recorded, before it has a place in the order.

use super::abi::{self, Op};

/// What a producer wants recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What happened.
    pub op: Op,
    /// `FLAG_*`.
    pub flags: u8,
    /// Volume id within the group.
    pub volume: u32,
    /// Byte offset.
    pub offset: u64,
    /// Bytes of the extent.
    pub length: u64,
    /// Bytes that will be filled in.
    pub payload_len: u32,
    /// Whether the record must stay in the ring until `mark_done`. When one of several entries reserved
    /// together must, all of them do.
    pub needs_done: bool,
}

impl Entry {
    /// A change of an extent that carries no bytes (discard, write zeroes, failed); stays until it is done.
    pub const fn extent(op: Op, volume: u32, offset: u64, length: u64, flags: u8) -> Self {
        Self { op, flags, volume, offset, length, payload_len: 0, needs_done: true }
    }

    /// A record that changes nothing (flush, bookmark, volume, clock jump …), done as soon as it is
    /// published.
    pub const fn event(op: Op, volume: u32, payload_len: u32) -> Self {
        Self { op, flags: 0, volume, offset: 0, length: 0, payload_len, needs_done: false }
    }

    /// A write of any length in pieces that fit a record, each to stay until it is done. All carry the flags:
    /// a piece that reaches the other side is as durable as the write asked for.
    pub fn write(volume: u32, offset: u64, length: u64, flags: u8) -> impl Iterator<Item = Self> + Clone {
        let step = u64::from(abi::MAX_PAYLOAD);
        (0..length.div_ceil(step)).map(move |piece| {
            let from = piece * step;
            #[allow(clippy::cast_possible_truncation, reason = "at most MAX_PAYLOAD")]
            let payload_len = step.min(length - from) as u32;
            let offset = offset.saturating_add(from);
            let length = u64::from(payload_len);
            Self { op: Op::Write, flags, volume, offset, length, payload_len, needs_done: true }
        })
    }

    pub(super) fn is_sound(&self) -> bool {
        if self.payload_len > abi::MAX_PAYLOAD || self.offset.checked_add(self.length).is_none() {
            return false;
        }
        match self.op {
            Op::Write => self.length != 0 && u64::from(self.payload_len) == self.length,
            Op::Discard | Op::WriteZeroes => self.length != 0 && self.payload_len == 0,
            Op::Failed => self.length != 0,
            // These move the ring's own state and are reserved by the functions that do so.
            Op::ResyncBegin | Op::ResyncEnd | Op::Void | Op::Pad => false,
            Op::Flush | Op::Bookmark | Op::Volume | Op::SyncSlot | Op::ClockJump => true,
        }
    }
}
