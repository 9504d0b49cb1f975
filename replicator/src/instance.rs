//! Which copy of this source we are: the file `dir/instance`, and what of it the receiver is told
//! ([`wire::instance`]).
//!
//! A two-slot control file beside `state`:
//! ```text
//! 0       1
//! │ 1 │ postcard of Tokens          1 = version
//! ```
//! Invariants
//! * `offered` is durable before the receiver hears of it, and is offered again and again until it is
//!   answered: what the receiver remembers is always `offered` or `answered`, whatever was cut where.
//! * A token that cannot be made durable is not offered: the last one is, which the receiver takes as well.
//! * A file that is lost or damaged is begun anew. The receiver then sees a source that was rolled back,
//!   which it takes as long as no other copy is connected.

use std::path::Path;
use std::sync::Arc;

use journal::control::TwoSlot;
use journal::io::Disk;
use serde::{Deserialize, Serialize};
use wire::Instance;

use crate::error::{Error, ErrorKind, Result};

const FILE: &str = "instance";
const VERSION: u8 = 1;

type Token = [u8; 16];

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Tokens {
    /// The last one that a welcome answered.
    answered: Option<Token>,
    /// The one that is on its way, or may be.
    offered: Option<Token>,
}

/// See the module. Blocking: for a thread.
pub struct Copy {
    run: Token,
    tokens: Tokens,
    slots: Option<TwoSlot>,
}

fn fresh() -> Token {
    *uuid::Uuid::new_v4().as_bytes()
}

impl Copy {
    /// Opens the file, or begins it. Never fails: without the file a copy cannot be told, and nothing else is
    /// wrong.
    pub fn open(disk: &Arc<dyn Disk>, dir: &Path) -> Copy {
        let run = fresh();
        let path = dir.join(FILE);
        let opened = match TwoSlot::open(disk, &path) {
            Ok((slots, payload)) => Ok((slots, decode(&payload))),
            Err(error) if error.kind == journal::ErrorKind::NotHeld => begin(disk, &path),
            Err(error) if error.kind == journal::ErrorKind::Corrupt => {
                tracing::warn!(%error, "the file that tells this source from its copies is begun anew");
                let removed = disk.remove(&path);
                removed
                    .map_err(|error| {
                        Error::because(ErrorKind::Io, format!("remove {}", path.display()), error)
                    })
                    .and_then(|()| begin(disk, &path))
            }
            Err(error) => Err(error.into()),
        };
        match opened {
            Ok((slots, tokens)) => Copy { run, tokens, slots: Some(slots) },
            Err(error) => {
                tracing::warn!(%error, "copies of this source cannot be told from it");
                Copy { run, tokens: Tokens::default(), slots: None }
            }
        }
    }

    /// What to say to a receiver now.
    pub fn offer(&mut self) -> Instance {
        if self.tokens.offered.is_none() {
            self.store(Tokens { offered: Some(fresh()), ..self.tokens });
        }
        let Tokens { answered, offered } = self.tokens;
        match (offered, answered) {
            (Some(token), previous) => Instance { run: self.run, token, previous },
            // It could not be made durable: the exact retry of the last.
            (None, Some(token)) => Instance { run: self.run, token, previous: None },
            // Nor was there ever one: known as a run at least.
            (None, None) => Instance { run: self.run, token: self.run, previous: None },
        }
    }

    /// The receiver took what was offered.
    pub fn answered(&mut self) {
        if let Some(offered) = self.tokens.offered {
            self.store(Tokens { answered: Some(offered), offered: None });
        }
    }

    fn store(&mut self, tokens: Tokens) {
        let stored = match &mut self.slots {
            Some(slots) => encode(&tokens).and_then(|payload| Ok(slots.store(&payload)?)),
            None => return,
        };
        match stored {
            Ok(()) => self.tokens = tokens,
            Err(error) => tracing::warn!(%error, "copies of this source cannot be told from it for now"),
        }
    }
}

fn begin(disk: &Arc<dyn Disk>, path: &Path) -> Result<(TwoSlot, Tokens)> {
    let tokens = Tokens::default();
    Ok((TwoSlot::create(disk, path, &encode(&tokens)?)?, tokens))
}

fn encode(tokens: &Tokens) -> Result<Vec<u8>> {
    postcard::to_extend(tokens, vec![VERSION])
        .map_err(|error| Error::because(ErrorKind::Settings, "encode the instance", error))
}

/// Of another version or damaged: as good as none.
fn decode(payload: &[u8]) -> Tokens {
    match payload.split_first() {
        Some((&VERSION, rest)) => postcard::from_bytes(rest).unwrap_or_default(),
        _ => Tokens::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::sim_disk::SimDisk;

    const DIR: &str = "/d";

    fn disk() -> Arc<dyn Disk> {
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
        disk.create_dir(Path::new(DIR)).unwrap();
        disk
    }

    fn open(disk: &Arc<dyn Disk>) -> Copy {
        Copy::open(disk, Path::new(DIR))
    }

    #[test]
    fn a_token_is_offered_until_it_is_answered_across_runs() {
        let disk = disk();
        let mut copy = open(&disk);
        let first = copy.offer();
        assert_eq!((copy.offer(), first.previous), (first, None), "an exact retry");
        let mut next = open(&disk);
        let again = next.offer();
        assert_eq!((again.token, again.previous), (first.token, None), "the answer may have been lost");
        assert_ne!(again.run, first.run, "another process");
        next.answered();
        let second = next.offer();
        assert_eq!(second.previous, Some(first.token));
        assert_ne!(second.token, first.token);
        next.answered();
        let third = open(&disk).offer();
        assert_eq!(third.previous, Some(second.token), "what was answered is durable");
    }

    /// What is offered is durable before it is sent. Cut anywhere, the next process offers what a receiver
    /// follows, whether it took the last offer or not.
    #[test]
    fn a_receiver_follows_wherever_the_power_goes() {
        let rounds = |sim: &SimDisk, cut: u64| {
            let disk: Arc<dyn Disk> = Arc::new(sim.clone());
            disk.create_dir(Path::new(DIR)).unwrap();
            sim.cut_at(cut);
            let mut copy = open(&disk);
            let mut known = Vec::new();
            for _ in 0..3 {
                let offer = copy.offer();
                // Without power nothing is sent.
                if sim.ops() > cut {
                    break;
                }
                // It is sent: a receiver has it, or still what it had. The answer says which.
                let sent = open(&(Arc::new(sim.crash(0)) as Arc<dyn Disk>)).offer();
                assert!(sent.token == offer.token && sent.previous == offer.previous, "{sent:?}");
                known = vec![offer.token];
                copy.answered();
                if sim.ops() > cut {
                    break;
                }
            }
            known
        };
        let whole = SimDisk::new();
        rounds(&whole, u64::MAX - 1);
        for cut in 0..whole.ops() {
            let sim = SimDisk::new();
            let known = rounds(&sim, cut);
            for seed in 0..8 {
                let after: Arc<dyn Disk> = Arc::new(sim.crash(seed));
                let offer = open(&after).offer();
                for token in &known {
                    let follows = offer.token == *token || offer.previous == Some(*token);
                    assert!(follows, "cut {cut} seed {seed}: {offer:?} of {known:?}");
                }
            }
        }
    }

    #[test]
    fn a_damaged_file_is_begun_anew() {
        let sim = SimDisk::new();
        let disk: Arc<dyn Disk> = Arc::new(sim.clone());
        disk.create_dir(Path::new(DIR)).unwrap();
        let mut copy = open(&disk);
        copy.offer();
        copy.answered();
        let path = Path::new(DIR).join(FILE);
        sim.corrupt(&path, 40, |byte| byte ^ 1);
        sim.corrupt(&path, 4096 + 40, |byte| byte ^ 1);
        let mut anew = open(&disk);
        let offer = anew.offer();
        assert_eq!(offer.previous, None);
        anew.answered();
        assert_eq!(open(&disk).offer().previous, Some(offer.token));
    }
}
