//! What a receiver may make us believe of its position, when that is not in our own history.
//!
//! A receiver that is ahead of its source is real: the source was restored from a backup. Then the next epoch
//! begins above both, and so the receiver's numbers become ours, durably. A receiver that lies would carry
//! them to their end in one visit (at 2^62 nothing more is believed, from honest receivers neither). So a
//! claim beyond our own numbers is believed only as far as this source can have come in the time that a
//! backup lies back, and all such claims of an hour together as far as one of them. Claims up to our own
//! numbers move nothing, and are not counted.

use std::time::{Duration, Instant};

use journal::{Lsn, Position};

use crate::state::SourceState;

/// Epochs that claims move us in [`REFILL`]: more unclean ends and gaps than there are between a backup and
/// its return.
const EPOCHS: u64 = 512;
/// Lsns likewise: an unclean end uses 2^32, and so does an hour at a million writes a second.
const LSNS: u64 = 1 << 48;
/// After so long as many are believed again.
const REFILL: Duration = Duration::from_secs(3600);
/// Never by a claim beyond these: there is room above them for a thousand years of our own.
const LAST_EPOCH: u64 = 1 << 48;
const LAST_LSN: u64 = 1 << 60;

/// What is left to be believed.
#[derive(Debug)]
pub struct Claims {
    since: Instant,
    epochs: u64,
    lsns: u64,
}

/// How far a claim is beyond our own numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ahead {
    epochs: u64,
    lsns: u64,
}

impl Ahead {
    fn of(claim: &Position, state: &SourceState) -> Ahead {
        let epoch = state.epoch.number.max(state.above_epoch);
        let lsn = state.lease_end.max(state.above_lsn);
        Ahead { epochs: claim.epoch.number.saturating_sub(epoch), lsns: claim.lsn.0.saturating_sub(lsn.0) }
    }
}

impl Claims {
    /// Nothing claimed yet.
    pub fn new(now: Instant) -> Claims {
        Claims { since: now, epochs: EPOCHS, lsns: LSNS }
    }

    /// Whether `claim` may be taken for what a receiver of this source holds; why not, in words.
    ///
    /// # Errors
    /// The reason, for the operator.
    pub fn judge(&mut self, claim: &Position, state: &SourceState, now: Instant) -> Result<(), String> {
        if now.saturating_duration_since(self.since) >= REFILL {
            *self = Claims::new(now);
        }
        let ahead = Ahead::of(claim, state);
        if ahead == Ahead::default() {
            return Ok(());
        }
        let told = format!(
            "the receiver claims epoch {} and lsn {}, this source is at epoch {} and below lsn {}",
            claim.epoch.number, claim.lsn, state.epoch.number, state.lease_end
        );
        if claim.lineage != state.lineage {
            return Err(format!("{told}, and its line of descent is another: it is not believed"));
        }
        let is_within = ahead.epochs <= self.epochs && ahead.lsns <= self.lsns;
        if !is_within || claim.epoch.number > LAST_EPOCH || claim.lsn > Lsn(LAST_LSN) {
            return Err(format!(
                "{told}: further than it can have come, so it is not believed. If this source was restored from a very old \
                 backup, protect the disk as a new group; if it was not, do not trust that receiver"
            ));
        }
        Ok(())
    }

    /// The claim becomes a number of ours.
    pub fn take(&mut self, claim: &Position, state: &SourceState) {
        let ahead = Ahead::of(claim, state);
        self.epochs = self.epochs.saturating_sub(ahead.epochs);
        self.lsns = self.lsns.saturating_sub(ahead.lsns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateFile;
    use journal::io::{Disk, RealDisk};
    use journal::{Epoch, EpochId, Lineage};
    use std::sync::Arc;

    /// The state of a source in its epoch 3, and a claim of epoch and lsn.
    fn source() -> (tempfile::TempDir, SourceState) {
        let dir = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let mut file = StateFile::open(&disk, dir.path()).unwrap();
        (0..3).for_each(|_| file.begin_epoch(Some(Lsn(100)), true).unwrap());
        let state = file.get().clone();
        (dir, state)
    }

    fn claim(state: &SourceState, epoch: u64, lsn: u64) -> Position {
        let epoch = Epoch { number: epoch, id: EpochId([9; 16]) };
        Position { lineage: state.lineage, epoch, lsn: Lsn(lsn), chain: 7 }
    }

    #[test]
    fn a_source_from_a_backup_goes_above_its_receiver_and_a_lie_moves_nothing() {
        let (_dir, state) = source();
        let now = Instant::now();
        let mut claims = Claims::new(now);
        let mut judge = |epoch, lsn| claims.judge(&claim(&state, epoch, lsn), &state, now).is_ok();
        assert!(judge(3, 50) && judge(1, 1 << 32), "our own");
        assert!(judge(40, 37 << 32), "rolled back by 37 unclean ends");
        for (epoch, lsn) in
            [(1 << 62, 50), (u64::MAX, u64::MAX), (3, 1 << 62), (3, u64::MAX), (1 << 20, 50), (3, 1 << 50)]
        {
            assert!(!judge(epoch, lsn), "epoch {epoch}, lsn {lsn}");
        }
        let foreign = Position { lineage: Lineage([1; 16]), ..claim(&state, 40, 50) };
        assert!(claims.judge(&foreign, &state, now).is_err(), "another line of descent moves nothing");
    }

    #[test]
    fn many_visits_move_no_further_than_one() {
        let (_dir, mut state) = source();
        let now = Instant::now();
        let mut claims = Claims::new(now);
        for _ in 0..10_000 {
            let lie = claim(&state, state.epoch.number + 100, state.lease_end.0 + (1 << 40));
            if claims.judge(&lie, &state, now).is_ok() {
                claims.take(&lie, &state);
                state.epoch.number = lie.epoch.number + 1;
                state.lease_end = Lsn(lie.lsn.0 + (1 << 32));
            }
        }
        assert!(state.epoch.number <= 3 + EPOCHS + 10, "{}", state.epoch.number);
        assert!(state.lease_end.0 <= LSNS + (1 << 40), "{}", state.lease_end);
        // An honest receiver that holds what we sent it is believed, however far a liar has carried us.
        state.epoch.number = 1 << 50;
        state.lease_end = Lsn(1 << 61);
        assert!(claims.judge(&claim(&state, 1 << 50, 1 << 61), &state, now).is_ok());
        let more = claim(&state, (1 << 50) + 1, 5);
        assert!(claims.judge(&more, &state, now + REFILL).is_err(), "never beyond the last by a claim");
    }

    #[test]
    fn an_hour_later_as_much_is_believed_again() {
        let (_dir, state) = source();
        let now = Instant::now();
        let mut claims = Claims::new(now);
        let far = claim(&state, 3 + EPOCHS, 5);
        claims.judge(&far, &state, now).unwrap();
        claims.take(&far, &state);
        assert!(claims.judge(&claim(&state, 4, 5), &state, now).is_err());
        assert!(claims.judge(&claim(&state, 4, 5), &state, now + REFILL).is_ok());
    }
}
