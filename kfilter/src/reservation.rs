// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! Places in the order: taken, filled, published, done.
//!
//! Outside the lock, between `Ring::reserve` and the moment when the write is in the backing store. State
//! words go RESERVED → PUBLISHED → PUBLISHED and DONE, or RESERVED → VOID.
//!
//! Invariants:
//! * The pieces of one write are shown together, after the last byte of the last of them was copied.
//! * Once a record is published it may be released, and its room be written again, by others: nothing of it,
//!   nor of a pad behind it, is read after that unless it waits for its done mark.

use super::abi::{self, Op, RecordHeader, state};
use super::memory::{Host, Memory, index};
use super::ring::Ring;
use core::sync::atomic::Ordering::Release;

/// Places taken for the pieces of one write. Fill them in, then publish. Dropped unpublished, the records
/// become void: their write must not have been started then.
#[derive(Debug)]
#[must_use]
pub struct Reservation<'r, H: Host> {
    pub(super) ring: &'r Ring<H>,
    /// The first record (behind a pad that may precede it, which is released on its own), and the end.
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) first_lsn: u64,
    pub(super) last_lsn: u64,
    /// `state::DONE` when no mark is needed.
    pub(super) done: u32,
    /// Position of the first record that was not entered yet.
    pub(super) at: u64,
    /// Offset in the mapping, and bytes, of what is still to be filled of the record entered last.
    pub(super) payload_at: u64,
    pub(super) payload_left: u64,
    /// The end was reached.
    pub(super) filled: bool,
}

impl<H: Host> Reservation<'_, H> {
    /// Lsn of the first piece.
    pub fn first_lsn(&self) -> u64 {
        self.first_lsn
    }

    /// Lsn of the last piece.
    pub fn last_lsn(&self) -> u64 {
        self.last_lsn
    }

    /// Copies the next bytes of the payload. More than was reserved aborts.
    #[inline]
    pub fn fill(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            while self.payload_left == 0 {
                if !self.enter_next() {
                    return self.ring.host.broken("more payload than was reserved");
                }
            }
            let (now, later) = bytes.split_at(bytes.len().min(index(self.payload_left)));
            // SAFETY: payload of a record that we reserved and did not publish: ours alone.
            unsafe { self.ring.memory().write(self.payload_at, now) }
            self.payload_at += now.len() as u64;
            self.payload_left -= now.len() as u64;
            bytes = later;
        }
    }

    /// Shows the records to the consumer, all of them. Less payload than was reserved aborts.
    #[inline]
    pub fn publish(mut self) -> Token {
        self.fill_up();
        self.settle(state::PUBLISHED);
        let token = Token {
            from: self.from,
            to: self.to,
            first_lsn: self.first_lsn,
            last_lsn: self.last_lsn,
            needs_done: self.done == 0,
        };
        self.ring.host.published();
        token
    }

    /// Keeps the records from the consumer until it is known whether their write is started at all. Less
    /// payload than was reserved aborts. Everything behind them waits too.
    pub fn withhold(mut self) -> Withheld {
        self.fill_up();
        let Self { from, to, first_lsn, last_lsn, done, .. } = self;
        Withheld { from, to, first_lsn, last_lsn, done }
    }

    /// Passes records without payload, and checks that nothing is missing.
    fn fill_up(&mut self) {
        while self.payload_left == 0 && self.enter_next() {}
        if self.payload_left != 0 {
            self.ring.host.broken("less payload than was reserved");
        }
        self.filled = true;
    }

    /// Steps to the next record; false at the end.
    fn enter_next(&mut self) -> bool {
        if self.at == self.to {
            return false;
        }
        let (header, next) = self.ring.own_record(self.at, self.to);
        self.payload_at = self.ring.layout.offset_of(self.at) + abi::LINE;
        self.payload_left = u64::from(header.payload_len);
        self.at = next;
        true
    }

    /// Turns every RESERVED into PUBLISHED or VOID.
    fn settle(&self, to: u32) {
        if self.first_lsn == self.last_lsn {
            // One record, and what may pad the ring's end lies before it.
            return self.ring.memory().store32(
                self.ring.layout.offset_of(self.from),
                to | self.done,
                Release,
            );
        }
        let mut position = self.from;
        while position < self.to {
            // The next place first: what is settled may be released at once.
            let (_, next) = self.ring.own_record(position, self.to);
            self.ring.memory().store32(self.ring.layout.offset_of(position), to | self.done, Release);
            position = next;
        }
    }
}

impl<H: Host> Drop for Reservation<'_, H> {
    fn drop(&mut self) {
        if !self.filled {
            self.settle(state::VOID);
            self.ring.host.published();
        }
    }
}

/// Filled records that wait for `Ring::settle`. Plain numbers: dropped, the records stay unpublished for
/// good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Withheld {
    from: u64,
    to: u64,
    first_lsn: u64,
    last_lsn: u64,
    done: u32,
}

impl Withheld {
    /// Lsn of the first piece.
    pub fn first_lsn(&self) -> u64 {
        self.first_lsn
    }
}

/// A published write that may not be done yet: give it to `mark_done` when it is in the backing store. Until
/// then it holds its room in the ring, and a new owner writes it to the backing store again.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Token {
    from: u64,
    to: u64,
    first_lsn: u64,
    last_lsn: u64,
    needs_done: bool,
}

impl Token {
    /// Lsn of the first piece.
    pub fn first_lsn(&self) -> u64 {
        self.first_lsn
    }

    /// Lsn of the last piece.
    pub fn last_lsn(&self) -> u64 {
        self.last_lsn
    }
}

impl<H: Host> Ring<H> {
    /// Shows withheld records: as they are, because their write was started, or as void, because it never
    /// was.
    pub fn settle(&self, withheld: Withheld, started: bool) {
        let Withheld { from, to, first_lsn, last_lsn, done } = withheld;
        let records = Reservation {
            ring: self,
            from,
            to,
            first_lsn,
            last_lsn,
            done,
            at: to,
            payload_at: 0,
            payload_left: 0,
            filled: true,
        };
        records.settle(if started { state::PUBLISHED } else { state::VOID });
        self.host.published();
    }

    /// Says that a published write is in the backing store, so that its room can be released.
    pub fn mark_done(&self, token: Token) {
        let Token { from, to, needs_done, .. } = token;
        // Without the need the records may be gone already.
        let mut position = if needs_done { from } else { to };
        while position < to {
            // The next place first: once the mark is set the record may be released and its room written
            // again.
            let (_, next) = self.own_record(position, to);
            let old = self.memory().or32(self.layout.offset_of(position), state::DONE, Release);
            if old & state::MASK != state::PUBLISHED {
                self.host.broken("only a published record can be done");
            }
            position = next;
        }
    }

    /// The header of a record that this owner reserved and that cannot be released yet, and where the next
    /// record of the same reservation is, which ends at `to`. A pad between the two is released as soon as
    /// the one before it is, so it is passed here, never stood on.
    fn own_record(&self, position: u64, to: u64) -> (RecordHeader, u64) {
        let broken = || {
            self.host.broken("the ring's memory was written by somebody else");
            (RecordHeader::pad(to.wrapping_sub(position)), to)
        };
        let Some(header) = self.header_at(position) else { return broken() };
        let mut next = position + u64::from(header.total_bytes);
        if next < to {
            let Some(behind) = self.header_at(next) else { return broken() };
            if behind.op == Op::Pad {
                next += u64::from(behind.total_bytes);
            }
        }
        (header, next)
    }
}
