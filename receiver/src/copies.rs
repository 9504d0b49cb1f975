//! Which copy of a group's source is the one: `groups/NAME/instance`, a two-slot control file
//! ([`wire::instance`]).
//!
//! ```text
//! 0       1
//! │ 1 │ postcard of Kept          1 = version
//! ```
//! The token of the last session is kept, who that was, and the tokens of copies that were refused: those
//! stay refused when the one that is taken is away for a while, so that two copies never take turns.
//! `afterimage admit GROUP` forgets it all.
//!
//! What cannot be kept on disk is kept in memory. A file that is lost is begun anew: then the first that
//! comes is the one.

use std::path::Path;
use std::sync::Arc;

use journal::control::TwoSlot;
use journal::io::Disk;
use machine::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use wire::Instance;

/// Name of the file in a group's directory.
pub const FILE: &str = "instance";
const VERSION: u8 = 1;
/// Copies that are remembered as refused; of more the oldest is forgotten.
const MAX_BARRED: usize = 64;

type Token = [u8; 16];

/// The copy that is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Its token.
    token: Token,
    /// Its process.
    pub run: Token,
    /// From where it came.
    pub address: String,
    /// When, this machine's clock.
    pub since_ns: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    known: Option<Known>,
    barred: Vec<Token>,
}

/// What a copy is to the one that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// It is that one, or the first ever.
    Follows,
    /// It is another, or that one as it was earlier: restored from a backup, on either side.
    Strange,
    /// It was refused before, while that one was connected.
    Barred,
}

/// See the module.
pub struct Copies {
    kept: Mutex<Kept>,
    /// Taken for writing only, and never with `kept` held.
    file: Mutex<Option<TwoSlot>>,
}

impl Copies {
    /// Opens a group's file, or begins it. Blocking.
    pub fn open(disk: &Arc<dyn Disk>, group_dir: &Path) -> Copies {
        let path = group_dir.join(FILE);
        let begin = |kept: Kept| TwoSlot::create(disk, &path, &encode(&kept)).map(|slots| (slots, kept));
        let opened = match TwoSlot::open(disk, &path) {
            Ok((slots, payload)) => Ok((slots, decode(&payload))),
            Err(error) if error.kind == journal::ErrorKind::NotHeld => begin(Kept::default()),
            Err(error) if error.kind == journal::ErrorKind::Corrupt => {
                tracing::warn!(%error, "what tells a source from its copies is begun anew");
                let _ = disk.remove(&path);
                begin(Kept::default())
            }
            Err(error) => Err(error),
        };
        let (file, kept) = match opened {
            Ok((slots, kept)) => (Some(slots), kept),
            Err(error) => {
                tracing::warn!(%error, "which copy of a source is taken is kept in memory only");
                (None, Kept::default())
            }
        };
        Copies { kept: Mutex::new(kept), file: Mutex::new(file) }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What this copy is to the one that is kept.
    pub fn relation(&self, instance: &Instance) -> Relation {
        let kept = self.kept();
        match &kept.known {
            Some(known) if instance.token == known.token || instance.previous == Some(known.token) => {
                Relation::Follows
            }
            _ if kept.barred.contains(&instance.token) => Relation::Barred,
            None => Relation::Follows,
            Some(_) => Relation::Strange,
        }
    }

    /// The copy that is taken.
    pub fn known(&self) -> Option<Known> {
        self.kept().known.clone()
    }

    /// This copy is the one. Not durable before [`store`](Self::store).
    pub fn take(&self, instance: &Instance, address: String, now_ns: u64) {
        let mut kept = self.kept();
        kept.barred.retain(|token| *token != instance.token);
        let (token, run) = (instance.token, instance.run);
        kept.known = Some(Known { token, run, address, since_ns: now_ns });
    }

    /// This copy is refused from now on. Not durable before [`store`](Self::store).
    pub fn bar(&self, instance: &Instance) {
        let mut kept = self.kept();
        if !kept.barred.contains(&instance.token) {
            if kept.barred.len() >= MAX_BARRED {
                kept.barred.remove(0);
            }
            kept.barred.push(instance.token);
        }
    }

    /// The operator's order: the next that comes is the one. Not durable before [`store`](Self::store).
    pub fn forget(&self) {
        *self.kept() = Kept::default();
    }

    /// Makes durable what was said last. Blocking.
    ///
    /// # Errors
    /// The disk's: it is known in memory, and stored with the next change.
    pub fn store(&self) -> journal::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let payload = encode(&self.kept());
        file.as_mut().map_or(Ok(()), |slots| slots.store(&payload))
    }
}

fn encode(kept: &Kept) -> Vec<u8> {
    // Bounded: an address of at most 128 bytes, 64 tokens.
    postcard::to_extend(kept, vec![VERSION]).unwrap_or_else(|_| vec![VERSION])
}

/// Of another version or damaged: as good as none.
fn decode(payload: &[u8]) -> Kept {
    match payload.split_first() {
        Some((&VERSION, rest)) => postcard::from_bytes(rest).unwrap_or_default(),
        _ => Kept::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::sim_disk::SimDisk;

    const DIR: &str = "/g";

    fn instance(run: u8, token: u8, previous: Option<u8>) -> Instance {
        Instance { run: [run; 16], token: [token; 16], previous: previous.map(|token| [token; 16]) }
    }

    #[test]
    fn the_line_of_tokens_is_followed_and_a_copy_leaves_it() {
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
        disk.create_dir(Path::new(DIR)).unwrap();
        let copies = Copies::open(&disk, Path::new(DIR));
        assert_eq!(copies.relation(&instance(1, 1, None)), Relation::Follows, "the first ever");
        copies.take(&instance(1, 1, None), "a".into(), 5);
        copies.store().unwrap();
        assert_eq!(copies.relation(&instance(2, 1, None)), Relation::Follows, "the answer was lost");
        assert_eq!(copies.relation(&instance(2, 2, Some(1))), Relation::Follows);
        copies.take(&instance(2, 2, Some(1)), "a".into(), 6);
        assert_eq!(copies.relation(&instance(3, 3, Some(1))), Relation::Strange, "as it was a token ago");
        copies.bar(&instance(3, 3, Some(1)));
        copies.store().unwrap();
        let again = Copies::open(&disk, Path::new(DIR));
        assert_eq!(
            again.relation(&instance(4, 3, Some(1))),
            Relation::Barred,
            "durably, and whatever its run"
        );
        assert_eq!(again.relation(&instance(2, 2, None)), Relation::Follows);
        assert_eq!(again.known().unwrap().address, "a");
        again.forget();
        assert_eq!(again.relation(&instance(4, 3, Some(1))), Relation::Follows, "by order");
    }

    /// Who was taken or barred is durable before it is told so, wherever the power goes.
    #[test]
    fn who_was_told_is_known_again_wherever_the_power_goes() {
        let told = |sim: &SimDisk, cut: u64| {
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            disk.create_dir(Path::new(DIR)).unwrap();
            sim.cut_at(cut);
            let copies = Copies::open(&disk, Path::new(DIR));
            let mut told = (0, 100);
            for round in 1..=4 {
                copies.take(&instance(1, round, Some(round - 1)), "a".into(), 5);
                if copies.store().is_err() || sim.ops() > cut {
                    break;
                }
                told.0 = round;
                copies.bar(&instance(9, 100 + round, None));
                if copies.store().is_err() || sim.ops() > cut {
                    break;
                }
                told.1 = 100 + round;
            }
            told
        };
        let whole = SimDisk::new();
        assert_eq!(told(&whole, u64::MAX - 1), (4, 104));
        for cut in 0..whole.ops() {
            let sim = SimDisk::new();
            let (taken, barred) = told(&sim, cut);
            for seed in 0..8 {
                let after: Arc<dyn Disk> = Arc::new(sim.crash(seed));
                let copies = Copies::open(&after, Path::new(DIR));
                let at = format!("cut {cut} seed {seed}, taken {taken}, barred {barred}");
                // It goes on with what it was told, or tries the next again.
                let again = instance(2, taken + 1, Some(taken));
                assert_eq!(copies.relation(&again), Relation::Follows, "{at}");
                for token in 101..=barred {
                    assert_eq!(copies.relation(&instance(9, token, None)), Relation::Barred, "{at}");
                }
            }
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
        disk.create_dir(Path::new(DIR)).unwrap();
        let copies = Copies::open(&disk, Path::new(DIR));
        copies.take(&instance(0, 0, None), "x".repeat(128), u64::MAX);
        (1..=200).for_each(|token| copies.bar(&instance(1, token, None)));
        copies.store().unwrap();
        assert_eq!(copies.relation(&instance(1, 200, None)), Relation::Barred);
        assert_eq!(copies.relation(&instance(1, 1, None)), Relation::Strange);
    }
}
