// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! The one consumer: takes the records in order and gives their room back.
//!
//! State: a cursor in the memory of the process, and in the ring the tail with its anchor (the lsn and time
//! after what was released, for a ring that is empty when somebody takes over). A new consumer starts at the
//! tail: what was taken and not released comes again.
//!
//! ```text
//!   tail ── consumed, not yet released ── cursor ── published ── first unpublished … head
//! ```
//!
//! Invariants: tail ≤ cursor ≤ head; the anchor is stored before the tail, so that it is right whenever the
//! ring is empty; nothing is released before it was consumed *and* is done.

use super::abi::{self, Layout, Op, RecordHeader, control_at, state};
use super::memory::{Host, Memory};
use super::ring::{Refused, Ring, header_at};
use core::cell::Cell;
use core::marker::PhantomData;
use core::ops::Deref;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// A header whose lengths cannot be right: the ring's memory was overwritten. The ring is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Position in the ring.
    pub position: u64,
}

/// One record in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordRef<'r> {
    header: RecordHeader,
    void: bool,
    payload: &'r [u8],
    pub(super) position: u64,
}

impl<'r> RecordRef<'r> {
    /// What happened; `Op::Void` when its producer gave it up.
    pub fn op(&self) -> Op {
        if self.void { Op::Void } else { self.header.op }
    }
    /// `FLAG_*`.
    pub fn flags(&self) -> u8 {
        self.header.flags
    }
    /// Volume id within the group.
    pub fn volume(&self) -> u32 {
        self.header.volume
    }
    /// Byte offset in the volume.
    pub fn offset(&self) -> u64 {
        self.header.offset
    }
    /// Bytes of the extent.
    pub fn length(&self) -> u64 {
        self.header.length
    }
    /// Position in the group's order.
    pub fn lsn(&self) -> u64 {
        self.header.lsn
    }
    /// Realtime ns.
    pub fn time_ns(&self) -> u64 {
        self.header.time_ns
    }
    /// The payload, in the ring itself; empty for a void record.
    pub fn payload(&self) -> &'r [u8] {
        self.payload
    }
}

/// What lies at a position in [tail, head).
pub(super) enum Place<'r> {
    Pad { next: u64 },
    Unpublished,
    Record { record: RecordRef<'r>, next: u64, done: bool },
}

/// Reads one place without trusting its lengths.
pub(super) fn place_at<'m, M: Memory>(
    memory: &'m M,
    layout: &Layout,
    position: u64,
    head: u64,
) -> Result<Place<'m>, Malformed> {
    let malformed = Malformed { position };
    let at = layout.offset_of(position);
    // Acquire: the payload was copied before the state was stored.
    let word = memory.load32(at, Acquire);
    let state = word & state::MASK;
    if state == state::RESERVED {
        return Ok(Place::Unpublished);
    }
    let header = header_at(memory, layout, position).ok_or(malformed)?;
    if !header.is_sound(layout.bytes_to_end(position), head - position) {
        return Err(malformed);
    }
    let next = position + u64::from(header.total_bytes);
    let done = word & state::DONE != 0 || state == state::VOID;
    let void = match state {
        state::PUBLISHED => false,
        state::VOID => true,
        _ => return Err(malformed),
    };
    if header.op == Op::Pad {
        return Ok(Place::Pad { next });
    }
    let payload_len = if void { 0 } else { u64::from(header.payload_len) };
    // SAFETY: a published payload is not written until it is released, which a live `RecordRef` forbids: see
    // `Consumer::release` and `TakeOver`. Its length fits the room to the ring's end (`is_sound`).
    let payload = unsafe { memory.bytes(at + abi::LINE, payload_len) };
    Ok(Place::Record { record: RecordRef { header, void, payload, position }, next, done })
}

impl<H: Host> Ring<H> {
    /// Reads one place without trusting its lengths.
    pub(super) fn place_at(&self, position: u64, head: u64) -> Result<Place<'_>, Malformed> {
        place_at(self.memory(), &self.layout, position, head)
    }
}

/// Where a consumer stands, in its own memory.
#[derive(Debug)]
pub(super) struct Cursor {
    position: Cell<u64>,
    head_seen: Cell<u64>,
    /// Where the record at `position` ends, once it was looked at; else `position`.
    behind: Cell<u64>,
}

impl Cursor {
    pub(super) fn at(position: u64) -> Self {
        Self { position: Cell::new(position), head_seen: Cell::new(position), behind: Cell::new(position) }
    }

    pub(super) fn position(&self) -> u64 {
        self.position.get()
    }

    /// The record at the cursor; `None` when it is not published yet.
    pub(super) fn peek<'m, M: Memory>(
        &self,
        memory: &'m M,
        layout: &Layout,
    ) -> Result<Option<RecordRef<'m>>, Malformed> {
        loop {
            let position = self.position.get();
            if position == self.head_seen.get() {
                self.head_seen.set(memory.load64(control_at::HEAD, Acquire));
                let ahead = self.head_seen.get().wrapping_sub(position);
                if ahead == 0 {
                    return Ok(None);
                }
                if ahead > layout.ring_bytes {
                    return Err(Malformed { position });
                }
            }
            match place_at(memory, layout, position, self.head_seen.get())? {
                Place::Pad { next } => self.position.set(next),
                Place::Unpublished => return Ok(None),
                Place::Record { record, next, .. } => {
                    self.behind.set(next);
                    return Ok(Some(record));
                }
            }
        }
    }

    /// Moves behind the record at the cursor; false when there is none.
    pub(super) fn advance<M: Memory>(&self, memory: &M, layout: &Layout) -> Result<bool, Malformed> {
        if self.behind.get() <= self.position.get() && self.peek(memory, layout)?.is_none() {
            return Ok(false);
        }
        self.position.set(self.behind.get());
        Ok(true)
    }
}

/// The consumer of a ring. `R` is how it holds the ring: a reference, or an `Arc`.
#[derive(Debug)]
pub struct Consumer<H: Host, R: Deref<Target = Ring<H>>> {
    ring: R,
    cursor: Cursor,
    tail: u64,
    host: PhantomData<fn() -> H>,
}

impl<H: Host, R: Deref<Target = Ring<H>>> Consumer<H, R> {
    /// The consumer, starting at the tail; refused while another is alive.
    pub fn new(ring: R) -> Result<Self, Refused> {
        let taken = ring.host.locked(|reserver| core::mem::replace(&mut reserver.consumer_taken, true));
        if taken {
            return Err(Refused::ConsumerTaken);
        }
        let tail = ring.memory().load64(control_at::TAIL, Acquire);
        Ok(Self { ring, cursor: Cursor::at(tail), tail, host: PhantomData })
    }

    /// The ring.
    pub fn ring(&self) -> &R {
        &self.ring
    }

    /// The record at the cursor; `None` when it is not published yet.
    pub fn peek(&self) -> Result<Option<RecordRef<'_>>, Malformed> {
        self.cursor.peek(self.ring.memory(), &self.ring.layout)
    }

    /// Moves the cursor behind the record at it; false when there is none. Records taken before stay readable
    /// until they are released.
    pub fn advance(&self) -> Result<bool, Malformed> {
        self.cursor.advance(self.ring.memory(), &self.ring.layout)
    }

    /// Back to the oldest record that is not released: all of them are read again.
    pub fn rewind(&mut self) {
        self.cursor = Cursor::at(self.tail);
    }

    /// `release` of everything published up to this lsn, whether it was taken or not: for an owner of the
    /// memory whose records are read by somebody else, and who is told how far that one came.
    pub fn release_published(&mut self, up_to_lsn: u64) -> Result<u64, Malformed> {
        let head = self.ring.memory().load64(control_at::HEAD, Acquire);
        if head.wrapping_sub(self.tail) > self.ring.layout.ring_bytes {
            return Err(Malformed { position: self.tail });
        }
        self.cursor = Cursor::at(head);
        self.release(up_to_lsn)
    }

    /// Gives back the room of the consumed records up to this lsn, as far as they are done. Returns how far
    /// that came: the lsn of the first record that is not released.
    pub fn release(&mut self, up_to_lsn: u64) -> Result<u64, Malformed> {
        let memory = self.ring.memory();
        let mut anchor_lsn = memory.load64(control_at::ANCHOR_LSN, Relaxed);
        let mut anchor_time = None;
        let mut tail = self.tail;
        while tail < self.cursor.position() {
            match self.ring.place_at(tail, self.cursor.position())? {
                Place::Record { record, next, done: true } if record.lsn() <= up_to_lsn => {
                    anchor_lsn = record.lsn() + 1;
                    anchor_time = Some(record.time_ns());
                    tail = next;
                }
                Place::Pad { next } => tail = next,
                Place::Record { .. } | Place::Unpublished => break,
            }
        }
        if let Some(time_ns) = anchor_time {
            memory.store64(control_at::ANCHOR_TIME, time_ns, Relaxed);
            memory.store64(control_at::ANCHOR_LSN, anchor_lsn, Release);
        }
        if tail != self.tail {
            // Release: what we read is read before a producer writes over it.
            memory.store64(control_at::TAIL, tail, Release);
            self.tail = tail;
        }
        Ok(anchor_lsn)
    }
}

impl<H: Host, R: Deref<Target = Ring<H>>> Drop for Consumer<H, R> {
    fn drop(&mut self) {
        self.ring.host.locked(|reserver| reserver.consumer_taken = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Entry;
    use crate::ring::Captured;
    use crate::testing::{heap_ring, write};
    use std::vec::Vec;

    #[test]
    fn stops_at_the_first_unpublished_record() {
        let ring = heap_ring(1024, 5);
        let consumer = Consumer::new(&ring).unwrap();
        assert_eq!(consumer.peek(), Ok(None));
        let Captured::Ring(mut slow) = ring.reserve_many(Entry::write(7, 0, 3, abi::FLAG_FUA), 10).unwrap()
        else {
            panic!("an empty ring has room")
        };
        let _ = write(&ring, 9, 512, b"second", 9);
        assert_eq!((consumer.peek(), consumer.advance()), (Ok(None), Ok(false)));
        slow.fill(b"on");
        slow.fill(b"e");
        let _ = slow.publish();
        let first = consumer.peek().unwrap().unwrap();
        assert_eq!(
            (first.lsn(), first.op(), first.flags(), first.time_ns()),
            (5, Op::Write, abi::FLAG_FUA, 10)
        );
        assert!(consumer.advance().unwrap());
        let second = consumer.peek().unwrap().unwrap();
        assert_eq!((second.lsn(), second.volume(), second.offset(), second.length()), (6, 9, 512, 6));
        assert_eq!(second.time_ns(), 10, "time does not run back");
        // A record taken before stays readable.
        assert_eq!((first.payload(), second.payload()), (&b"one"[..], &b"second"[..]));
    }

    #[test]
    fn only_what_is_consumed_and_done_is_released() {
        let ring = heap_ring(1024, 1);
        let tokens: Vec<_> = (0..3).map(|number| write(&ring, 7, number * 512, &[1; 10], 1)).collect();
        let mut consumer = Consumer::new(&ring).unwrap();
        assert!(consumer.advance().unwrap() && consumer.advance().unwrap());
        assert_eq!((consumer.release(u64::MAX), ring.used_bytes()), (Ok(1), 384), "nothing is done");
        let mut tokens = tokens.into_iter();
        ring.mark_done(tokens.next().unwrap());
        assert_eq!((consumer.release(0), consumer.release(u64::MAX)), (Ok(1), Ok(2)));
        for token in tokens {
            ring.mark_done(token);
        }
        assert_eq!(
            (consumer.release(u64::MAX), ring.used_bytes()),
            (Ok(3), 128),
            "the third is not consumed"
        );
        assert!(matches!(Consumer::new(&ring), Err(Refused::ConsumerTaken)));
        consumer.rewind();
        assert_eq!(consumer.peek().unwrap().unwrap().lsn(), 3);
        drop(consumer);
        assert_eq!(Consumer::new(&ring).unwrap().peek().unwrap().unwrap().lsn(), 3, "what was not released");
    }

    #[test]
    fn what_is_published_is_released_without_being_taken() {
        let ring = heap_ring(1024, 1);
        let mut tokens = (0..2).map(|number| write(&ring, 7, number * 512, &[1; 10], 1));
        ring.mark_done(tokens.next().unwrap());
        ring.mark_done(tokens.next().unwrap());
        let Captured::Ring(slow) = ring.reserve_many(Entry::write(7, 4096, 3, 0), 10).unwrap() else {
            panic!("there is room")
        };
        let mut consumer = Consumer::new(&ring).unwrap();
        assert_eq!(consumer.release_published(1), Ok(2), "up to the lsn");
        assert_eq!(consumer.release_published(u64::MAX), Ok(3), "up to the first unpublished");
        assert_eq!(consumer.release_published(u64::MAX), Ok(3));
        drop(slow);
        assert_eq!((consumer.release_published(3), ring.used_bytes()), (Ok(4), 0), "a void record is done");
    }
}
