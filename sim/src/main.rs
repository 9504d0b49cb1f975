//! `afterimage-sim`: tells stories by their seeds, and prints those that break a promise.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use sim::side::Paths;
use sim::story::{self, Ground, Identities, Told};

/// Simulated sources and receivers under failures: every promise of DESIGN section 1, by seed.
#[derive(Parser)]
struct Arguments {
    /// First seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// How many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// Stop after this many seconds; how many seeds were told is printed.
    #[arg(long)]
    seconds: Option<u64>,
    /// Seeds told side by side.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Print what happens in each story.
    #[arg(long)]
    verbose: bool,
    /// Go on after a seed that failed.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.verbose {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let home = tempfile::Builder::new()
        .prefix("afterimage-sim-")
        .tempdir_in("/dev/shm")
        .context("make a directory")?;
    let identity = |name: &str| -> Result<_> {
        let dir = home.path().join(name);
        let identity = wire::Identity::create(&dir)?;
        Ok((dir, identity.fingerprint().0))
    };
    let identities =
        Identities { source: identity("source-identity")?, receiver: identity("receiver-identity")? };
    let next = AtomicU64::new(arguments.from);
    let last = arguments.from + arguments.seeds;
    let started = Instant::now();
    let sums = Mutex::new(Told::default());
    let failed = Mutex::new(Vec::new());
    let tell = |job: usize| {
        pin(job);
        let ground = Ground { paths: paths(home.path(), job), identities: identities.clone() };
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let over =
                arguments.seconds.is_some_and(|seconds| started.elapsed() > Duration::from_secs(seconds));
            let stop = !arguments.keep_going && failed.lock().is_ok_and(|failed| !failed.is_empty());
            if seed >= last || over || stop {
                return;
            }
            let told = watched(seed, &ground, arguments.verbose);
            if let Some(why) = &told.broken {
                println!("seed {seed} FAILED: {why}\n{}", told.log);
                failed.lock().map(|mut failed| failed.push(seed)).ok();
            } else if arguments.verbose {
                println!("seed {seed}\n{}", told.log);
            }
            if let Ok(mut sums) = sums.lock() {
                sums.writes += told.writes;
                sums.points += told.points;
                sums.refused += told.refused;
                sums.seconds += told.seconds;
                sums.turns += told.turns;
                sums.trace ^= told.trace;
            }
        }
    };
    std::thread::scope(|scope| {
        for job in 0..arguments.jobs {
            let tell = &tell;
            scope.spawn(move || tell(job));
        }
    });
    let told = next.load(Ordering::Relaxed).min(last) - arguments.from;
    let sums = sums.into_inner().unwrap_or_default();
    let failed = failed.into_inner().unwrap_or_default();
    println!(
        "simulation: {told} seeds in {} s: {} virtual seconds, {} turns, {} writes, {} points checked, {} refused, trace {:016x}; {} failed",
        started.elapsed().as_secs(),
        sums.seconds,
        sums.turns,
        sums.writes,
        sums.points,
        sums.refused,
        sums.trace,
        failed.len()
    );
    ensure!(
        failed.is_empty(),
        "seeds that failed: {failed:?}; tell one again with --from SEED --seeds 1 --verbose"
    );
    Ok(())
}

/// All threads of a job on one processor: they take turns, and a turn that goes to another processor takes
/// several times as long. Where that is not allowed it is only slower.
fn pin(job: usize) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = rustix::thread::CpuSet::new();
    set.set(job % processors);
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

fn paths(home: &Path, job: usize) -> Paths {
    let dir = home.join(format!("job{job}"));
    Paths {
        source: dir.join("source"),
        backing: dir.join("backing"),
        ring: dir.join("ring"),
        receiver: dir.join("receiver"),
    }
}

/// A story that hangs in real time is a failure that cannot be unwound: told, and the program ends.
fn watched(seed: u64, ground: &Ground, verbose: bool) -> Told {
    let (done, is_done) = std::sync::mpsc::sync_channel::<()>(1);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if is_done.recv_timeout(sim::room::HUNG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                println!("seed {seed} FAILED: it hangs");
                std::process::exit(1);
            }
        });
        let told = story::tell(seed, ground, verbose);
        let _ = done.send(());
        told
    })
}
