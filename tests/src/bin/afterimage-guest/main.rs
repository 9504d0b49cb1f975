//! What the guest's scenarios (`tests/guest`) need beside the system's tools.
//!
//! ```text
//! afterimage-guest sink [--ring BYTES] [--until FILE | --for-ms N] [--stalled | --batch-ms N] [--detach-ms N] [--barrier] DEVICE...
//! afterimage-guest fuzz --seconds N [--seed N] DEVICE...
//! afterimage-guest marks LOG
//! afterimage-guest replay LOG MARK IMAGE
//! afterimage-guest compare A B
//! afterimage-guest version
//! afterimage-guest forget
//! afterimage-guest sg-write DISK SECTOR
//! afterimage-guest linger RING-BYTES
//! ```
//!
//! `sink` captures devices as a group of its own and consumes what comes, to nowhere (`--stalled`: nothing;
//! `--batch-ms`: lets records gather that long, as an agent does while it fills a frame; `--detach-ms`:
//! writes on their way are waited for no longer than that, and the group is forgotten when they are over;
//! `--barrier`: asks for a barrier at the end). `fuzz` calls the kernel device with arguments that nobody
//! sane would pass. `marks` and `replay` read the log of dm-log-writes: the independent witness of a write
//! order. `compare` says where two images differ. `forget` detaches and forgets, for groups that have no
//! agent. `sg-write` writes 4 KiB by SG_IO, past the block layer. `linger` forgets groups and keeps them
//! mapped, until the module's memory limit says no.

mod compare;
mod fuzz;
mod linger;
mod log_writes;
mod passthrough;
mod sink;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

const USAGE: &str =
    "afterimage-guest sink|fuzz|marks|replay|compare|version|forget|sg-write|linger; see its source";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("afterimage-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["sink", rest @ ..] => sink::run(&sink::Spec::parse(rest)?),
        ["fuzz", rest @ ..] => {
            let (mut seconds, mut seed, mut devices) = (10, u64::from(rand::random::<u32>()), Vec::new());
            let mut rest = rest.iter();
            while let Some(word) = rest.next() {
                match *word {
                    "--seconds" => seconds = number(rest.next())?,
                    "--seed" => seed = number(rest.next())?,
                    path => devices.push(path),
                }
            }
            fuzz::run(Duration::from_secs(seconds), seed, &devices)
        }
        ["marks", log] => log_writes::marks(Path::new(log)),
        ["replay", log, mark, image] => log_writes::replay(Path::new(log), mark, Path::new(image)),
        ["compare", a, b] => compare::run(Path::new(a), Path::new(b)),
        ["forget"] => sink::forget(),
        ["sg-write", disk, sector] => {
            passthrough::write(Path::new(disk), sector.parse().context("a sector")?)
        }
        ["linger", ring] => linger::run(ring.parse().context("bytes")?),
        ["version"] => sink::version(),
        _ => bail!(USAGE),
    }
}

fn number(word: Option<&&str>) -> Result<u64> {
    word.context(USAGE)?.parse().context("a number")
}
