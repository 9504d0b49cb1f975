// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//! Begin, fence and end of a resync: what is current becomes pending, one piece for each hold of the lock.
//!
//! A bitmap of 16 TiB is 32 MiB long, and the lock is held with interrupts off: no step walks all of it at
//! once. Writes go on between two pieces. What makes that safe is the lsn that begin and fence answer: the
//! resync reads the disk once everything submitted before them is over (the caller's barrier), and what a
//! record *behind* that lsn changes is masked, since the record is taken to hold the newer bytes.
//!
//! Invariant: when begin or fence returns, each pending bit is of a write that was given its place or its
//! bits before the returned lsn was the newest, or that has no record and was submitted before the return. A
//! bit of a write behind that lsn stays current: were it moved, the mask would hide what the write has lost.
//!
//! ```text
//!   fence, or begin, mode RING              begin, mode BITMAP
//!   1 pieces: pending |= current            1 record, which is the newest from now on; begun
//!   2 the newest lsn, or the record         2 pieces: pending |= current; writes set pending bits
//!                                           3 mode RING
//! ```
//!
//! * RING: records go on lying between two pieces, so the lsn is taken last. A bit that is set behind the
//!   walk stays current, for the next fence, also where the ring overflows meanwhile.
//! * BITMAP: head stands still, so no record comes behind the begin's before the mode changes. A write that
//!   comes between two pieces has no record, and is over before the barrier: its bits are set in the pending
//!   map at once, so that nothing is current when the mode changes. Asked for BITMAP meanwhile
//!   (`set_mode_bitmap`), the begin leaves the mode as it is; what it moves after that has no record either.
//!
//! Crash order. A bit is set in the pending map before it leaves the current one. That an end is owed is
//! stored before the record, the record before any bit moves, the mode last: a new owner that finds less than
//! all of it finds BITMAP, and begins again. After a fence, or a begin in RING, that was cut short, the bits
//! are in either map, and all else is as before.

use super::abi::{Op, control_at, slot_at};
use super::dirty::{CAUSE_AGENT, MODE_RING, PIECE_BYTES};
use super::entry::Entry;
use super::memory::{Host, Memory};
use super::reservation::Token;
use super::ring::{Mode, Refused, Reserver, Ring};
use core::sync::atomic::Ordering::{Relaxed, Release};

impl<H: Host> Ring<H> {
    /// Starts a resync: what is current becomes pending, writes go into the ring again, and `ResyncBegin` has
    /// its place in the order before all of them. Its lsn; refused while the ring has no room, and then bits
    /// may have moved: no range that was read before may be cleared after this call, also where it is
    /// refused. The mask of the resync starts empty here, and the caller owes a barrier (DESIGN, section 6).
    /// Until `end_resync` there is a [`Loss`](super::dirty::Loss), also where no write has been lost: a new
    /// owner owes the end.
    pub fn begin_resync(&self, now_ns: u64) -> Result<u64, Refused> {
        if self.start_moving()? == Mode::Ring {
            self.move_current();
        }
        let begun = self.host.locked(|reserver| {
            // 0 that an end is owed, before anybody can see the beginning …
            let is_first = self.memory().load64(control_at::LOST_SINCE, Relaxed) == 0;
            if is_first {
                self.memory().store32(control_at::CAUSE, CAUSE_AGENT, Relaxed);
                self.memory().store64(control_at::LOST_SINCE, now_ns.max(1), Release);
            }
            // 1 the record, so that the mode does not change without it …
            let Some(token) = self.append(reserver, Op::ResyncBegin, now_ns) else {
                if is_first {
                    self.memory().store64(control_at::LOST_SINCE, 0, Relaxed);
                }
                reserver.moving = false;
                return Err(Refused::Full);
            };
            reserver.begun = reserver.mode == Mode::Bitmap;
            reserver.moving = reserver.begun;
            Ok((token.last_lsn(), reserver.begun))
        });
        let (lsn, is_to_move) = begun?;
        if is_to_move {
            // 2 … then the bits …
            self.move_current();
            // 3 … then the mode. A new owner that finds less than all of this begins again.
            self.host.locked(|reserver| {
                reserver.moving = false;
                if core::mem::replace(&mut reserver.begun, false) {
                    reserver.mode = Mode::Ring;
                    self.memory().store32(control_at::MODE, MODE_RING, Release);
                }
            });
        }
        Ok(lsn)
    }

    /// What is current becomes pending, without a record and without a change of mode: for ranges whose
    /// writes failed while everything else is recorded. The newest lsn given out before it; the caller owes a
    /// barrier.
    pub fn fence(&self) -> Result<u64, Refused> {
        if self.start_moving()? == Mode::Bitmap {
            self.host.locked(|reserver| reserver.moving = false);
            return Err(Refused::BitmapMode);
        }
        self.move_current();
        self.host.locked(|reserver| {
            reserver.moving = false;
            Ok(reserver.next_lsn - 1)
        })
    }

    /// Ends a resync in one step under the lock: reserves `ResyncEnd`, whose lsn is returned; refused unless
    /// writes go into the ring, no bit is set, and there is room.
    pub fn end_resync(&self, now_ns: u64) -> Result<u64, Refused> {
        self.host.locked(|reserver| {
            if reserver.mode == Mode::Bitmap {
                return Err(Refused::BitmapMode);
            }
            if reserver.volumes().iter().any(|volume| self.has_dirty(volume)) {
                return Err(Refused::Dirty);
            }
            let token = self.append(reserver, Op::ResyncEnd, now_ns).ok_or(Refused::Full)?;
            self.memory().store64(control_at::LOST_SINCE, 0, Relaxed);
            Ok(token.last_lsn())
        })
    }

    /// A record without extent or payload, reserved and published under the lock; `None` without room.
    fn append(&self, reserver: &mut Reserver, op: Op, now_ns: u64) -> Option<Token> {
        let entry = core::iter::once(Entry::event(op, 0, 0));
        Some(self.place(reserver, entry, now_ns)?.publish())
    }

    /// The one who moves: two at once could move a bit that was set behind the lsn of the other.
    fn start_moving(&self) -> Result<Mode, Refused> {
        self.host.locked(|reserver| {
            if core::mem::replace(&mut reserver.moving, true) {
                Err(Refused::Moving)
            } else {
                Ok(reserver.mode)
            }
        })
    }

    /// Moves what is current of all volumes.
    fn move_current(&self) {
        let mut at = (0, 0);
        while let Some(next) = self.host.locked(|reserver| self.move_piece(reserver, at)) {
            at = next;
        }
    }

    /// Moves one piece of a volume's bitmap; where the next one begins.
    fn move_piece(&self, reserver: &mut Reserver, (index, from): (usize, u64)) -> Option<(usize, u64)> {
        let count = reserver.volume_count;
        let volume = reserver.volumes.iter_mut().take(count).nth(index)?;
        let (current_at, pending_at) = (volume.bitmap_at, volume.pending_at());
        let end = (from + PIECE_BYTES).min(volume.bitmap_bytes);
        let mut at = from;
        while at < end && volume.current_bits != 0 {
            let bits = self.memory().load64(current_at + at, Relaxed);
            if bits != 0 {
                let old = self.memory().or64(pending_at + at, bits, Relaxed);
                self.memory().store64(current_at + at, 0, Release);
                volume.pending_bits += u64::from((bits & !old).count_ones());
                volume.current_bits -= u64::from(bits.count_ones());
            }
            at += 8;
        }
        if volume.current_bits != 0 && end < volume.bitmap_bytes {
            return Some((index, end));
        }
        if self.memory().load32(volume.slot + slot_at::TAIL_DIRTY, Relaxed) != 0 {
            // The current flag last, and released: an owner that dies before it leaves all of the tail dirty.
            self.set_pending_tail(volume);
            self.memory().store32(volume.slot + slot_at::TAIL_DIRTY, 0, Release);
        }
        Some((index + 1, 0))
    }
}
