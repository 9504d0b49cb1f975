//! The world: virtual time, and threads of which one runs at a time.
//!
//! Every thread is a real one that holds the turn or waits for it. Whoever waits hands the turn on: to one of
//! those that can run, drawn from the seed, or, when nobody can, to the first that a later time wakes.
//! Processor time costs no virtual time.
//!
//! A *life* is a process of the simulation: [`Room::kill`] unwinds all its threads at the next place where
//! they wait.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machine::World;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// What a killed thread unwinds with.
pub struct Killed;

/// How far a turn without a pause moves the clock, so that those who spin for a lock do not stop it.
const TURN_NS: u64 = 5_000;
/// Realtime at the beginning: 2026-01-01.
const EPOCH_NS: u64 = 1_767_225_600_000_000_000;
/// How long a real second of one turn may take before the world is called hung.
pub const HUNG: Duration = Duration::from_secs(60);

thread_local! {
    static ME: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// See the module.
pub struct Room {
    inner: Mutex<Inner>,
    base: Instant,
}

struct Inner {
    now_ns: u64,
    clock_offset_ns: i64,
    random: StdRng,
    threads: BTreeMap<u64, Thread>,
    next: u64,
    running: u64,
    turns: u64,
    trace: u64,
}

struct Thread {
    name: String,
    life: u64,
    state: State,
    killed: bool,
    bell: Arc<Condvar>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Until(u64),
    At { place: usize, until: Option<u64> },
}

impl Room {
    /// An empty world.
    pub fn new(seed: u64) -> Arc<Room> {
        let inner = Inner {
            now_ns: 1_000_000_000,
            clock_offset_ns: 0,
            random: StdRng::seed_from_u64(seed),
            threads: BTreeMap::new(),
            next: 1,
            running: 0,
            turns: 0,
            trace: seed,
        };
        Arc::new(Room { inner: Mutex::new(inner), base: Instant::now() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` as the first thread, until it and all that it started have ended.
    pub fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::Result<T> {
        let me = self.admit("conductor");
        self.lock().running = me;
        let world: Arc<dyn World> = self.clone();
        let room = self.clone();
        let thread = std::thread::Builder::new().name("conductor".into()).spawn(move || {
            machine::enter(Some(world));
            ME.set(me);
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            room.end(me);
            machine::enter(None);
            done
        });
        match thread {
            Ok(thread) => thread.join().and_then(|done| done),
            Err(error) => Err(Box::new(error.to_string())),
        }
    }

    /// Virtual time since the beginning, ns.
    pub fn now_ns(&self) -> u64 {
        self.lock().now_ns
    }

    /// Hash of every turn so far: equal for equal runs.
    pub fn trace(&self) -> u64 {
        self.lock().trace
    }

    /// Turns so far.
    pub fn turns(&self) -> u64 {
        self.lock().turns
    }

    /// Sets the realtime clock by this much.
    pub fn jump(&self, ns: i64) {
        self.lock().clock_offset_ns += ns;
    }

    /// A number below `limit`.
    pub fn draw(&self, limit: u64) -> u64 {
        self.lock().random.random_range(0..limit.max(1))
    }

    /// True with this chance, in a thousand.
    pub fn chance(&self, per_mille: u64) -> bool {
        self.draw(1000) < per_mille
    }

    /// The current thread and those that it starts from now on are this life's.
    pub fn set_life(&self, life: u64) {
        let mut inner = self.lock();
        if let Some(me) = inner.threads.get_mut(&ME.get()) {
            me.life = life;
        }
    }

    /// Kills every thread of a life; returns when all have ended.
    pub fn kill(&self, life: u64) {
        loop {
            {
                let mut inner = self.lock();
                let mut left = false;
                for thread in inner.threads.values_mut().filter(|thread| thread.life == life) {
                    left = true;
                    thread.killed = true;
                    thread.state = State::Ready;
                }
                if !left {
                    return;
                }
            }
            self.sleep(Duration::from_micros(100));
        }
    }

    /// Whether threads of a life are left.
    pub fn lives(&self, life: u64) -> bool {
        self.lock().threads.values().any(|thread| thread.life == life)
    }

    /// Who is where, for the message of a run that failed.
    pub fn describe(&self) -> String {
        let inner = self.lock();
        let threads = inner.threads.iter().map(|(number, thread)| {
            let turn = if inner.running == *number { " (has the turn)" } else { "" };
            format!("  {} life {}: {:?}{turn}\n", thread.name, thread.life, thread.state)
        });
        format!("at {} ms, {} turns:\n{}", inner.now_ns / 1_000_000, inner.turns, threads.collect::<String>())
    }

    fn switch(&self, state: impl FnOnce(&Inner) -> State) {
        let me = ME.get();
        let mut inner = self.lock();
        let state = state(&inner);
        let now_ns = inner.now_ns;
        let Some(thread) = inner.threads.get_mut(&me) else { return };
        // A killed thread that unwinds waits for nobody.
        thread.state = if thread.killed { State::Until(now_ns + TURN_NS) } else { state };
        let bell = thread.bell.clone();
        let next = inner.choose();
        if next != me {
            inner.give(next);
            while inner.running != me {
                inner = bell.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let killed = inner.threads.get(&me).is_some_and(|thread| thread.killed);
        drop(inner);
        if killed && !std::thread::panicking() {
            resume_unwind(Box::new(Killed));
        }
    }
}

impl Inner {
    /// Who is next; moves the clock where nobody can run.
    fn choose(&mut self) -> u64 {
        loop {
            let ready: Vec<u64> = self
                .threads
                .iter()
                .filter(|(_, t)| t.state == State::Ready)
                .map(|(number, _)| *number)
                .collect();
            if !ready.is_empty() {
                let at = self.random.random_range(0..ready.len());
                self.turns += 1;
                self.trace = (self.trace ^ ready[at] ^ (self.now_ns << 8)).wrapping_mul(0x0100_0000_01B3);
                return ready[at];
            }
            let wakes = |thread: &Thread| match thread.state {
                State::Ready => None,
                State::Until(at) => Some(at),
                State::At { until, .. } => until,
            };
            let Some(first) = self.threads.values().filter_map(wakes).min() else {
                let names: Vec<_> =
                    self.threads.values().map(|t| format!("{} {:?}", t.name, t.state)).collect();
                eprintln!("the world stands still: {names:?}");
                std::process::abort();
            };
            self.now_ns = self.now_ns.max(first);
            for thread in self.threads.values_mut() {
                if wakes(thread).is_some_and(|at| at <= self.now_ns) {
                    thread.state = State::Ready;
                }
            }
        }
    }

    fn give(&mut self, next: u64) {
        self.running = next;
        if let Some(thread) = self.threads.get(&next) {
            thread.bell.notify_one();
        }
    }
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4)
}

impl World for Room {
    fn now(&self) -> Instant {
        self.base + Duration::from_nanos(self.lock().now_ns)
    }

    fn realtime_ns(&self) -> u64 {
        let inner = self.lock();
        (EPOCH_NS + inner.now_ns).saturating_add_signed(inner.clock_offset_ns)
    }

    fn boot_ns(&self) -> u64 {
        self.lock().now_ns
    }

    fn random_u64(&self) -> u64 {
        self.lock().random.next_u64()
    }

    fn sleep(&self, time: Duration) {
        self.switch(|inner| State::Until(inner.now_ns + ns(time).max(1)));
    }

    fn wait(&self, place: usize, at_most: Option<Duration>) {
        self.switch(|inner| State::At { place, until: at_most.map(|time| inner.now_ns + ns(time).max(1)) });
    }

    fn wake(&self, place: usize) {
        for thread in self.lock().threads.values_mut() {
            if matches!(thread.state, State::At { place: at, .. } if at == place) {
                thread.state = State::Ready;
            }
        }
    }

    fn turn(&self) {
        self.sleep(Duration::from_nanos(TURN_NS));
    }

    fn admit(&self, name: &str) -> u64 {
        let mut inner = self.lock();
        let life = inner.threads.get(&ME.get()).map_or(0, |parent| parent.life);
        let number = inner.next;
        inner.next += 1;
        let bell = Arc::new(Condvar::new());
        let thread = Thread { name: name.to_owned(), life, state: State::Ready, killed: false, bell };
        inner.threads.insert(number, thread);
        number
    }

    fn begin(&self, thread: u64) {
        ME.set(thread);
        let mut inner = self.lock();
        let Some(bell) = inner.threads.get(&thread).map(|thread| thread.bell.clone()) else { return };
        while inner.running != thread {
            inner = bell.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        let killed = inner.threads.get(&thread).is_some_and(|thread| thread.killed);
        drop(inner);
        if killed {
            resume_unwind(Box::new(Killed));
        }
    }

    fn end(&self, thread: u64) {
        let mut inner = self.lock();
        inner.threads.remove(&thread);
        if !inner.threads.is_empty() {
            let next = inner.choose();
            inner.give(next);
        }
    }
}
