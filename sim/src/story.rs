//! A story: a random course of load and failures, told by a seed, and what has to be true after each of them.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use journal::Lsn;
use journal::io::Disk;
use journal::sim_disk::SimDisk;
use receiver::agent::Receiver;
use receiver::point::At;
use receiver::view::View;
use replicator::status::State;
use replicator::{Replicator, Surroundings};

use crate::clients::{self, Load};
use crate::disk::LifeDisk;
use crate::model::{BLOCK, Back, Model};
use crate::net::{Net, Weather};
use crate::room::Room;
use crate::side::{Paths, Process, RECEIVER, SimBackings, Site, source_address};

const GROUP: &str = "g";
/// A view is read in pieces of this size.
const PIECE: usize = 32 << 10;
/// How long, in virtual time, everything may take to come right once nothing is in the way.
const HEALING: Duration = Duration::from_secs(240);

/// What a story needs of the machine it runs on.
#[derive(Clone)]
pub struct Ground {
    /// Where things lie.
    pub paths: Paths,
    /// Identities, made once.
    pub identities: Identities,
}

/// Directories of identities, and their fingerprints.
#[derive(Clone)]
pub struct Identities {
    /// The source's.
    pub source: (std::path::PathBuf, [u8; 32]),
    /// The receiver's.
    pub receiver: (std::path::PathBuf, [u8; 32]),
}

/// What a story came to.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// The first broken promise.
    pub broken: Option<String>,
    /// What happened, a line each.
    pub log: String,
    /// Writes answered.
    pub writes: usize,
    /// Points checked.
    pub points: usize,
    /// Points that were refused, as in a gap.
    pub refused: usize,
    /// Virtual time, s.
    pub seconds: u64,
    /// Turns of threads.
    pub turns: u64,
    /// Equal for equal runs.
    pub trace: u64,
}

type Step = Result<(), String>;

/// Sizes and times of one story.
#[derive(Clone, Debug)]
struct Shape {
    volumes: Vec<usize>,
    writers_each: usize,
    quota: u64,
    compresses: bool,
    window: Duration,
    events: u64,
}

impl Shape {
    /// The longest pause of a client: what all of them write passes the link, but not the quota in a longer outage.
    fn pause_us(&self) -> u64 {
        if self.compresses { 20_000 } else { 100_000 }
    }
}

struct Story {
    site: Site,
    ground: Ground,
    shape: Shape,
    model: Arc<Model>,
    load: Arc<Load>,
    lives: u64,
    source: Option<Process<replicator::Handle>>,
    receiver: Option<Process<receiver::agent::Handle>>,
    /// What the source holds of the disk behind its volumes.
    backing: Option<LifeDisk>,
    source_disk: SimDisk,
    backing_disk: SimDisk,
    receiver_disk: SimDisk,
    /// Of source, backing and what was captured by then.
    source_backup: Option<(SimDisk, SimDisk, u64)>,
    receiver_backup: Option<SimDisk>,
    /// The newest position that the source saw acknowledged, by epoch.
    acknowledged: (u64, u64),
    told: Told,
}

/// Tells the story of a seed.
pub fn tell(seed: u64, ground: &Ground, verbose: bool) -> Told {
    let room = Room::new(seed);
    let (inner, ground) = (room.clone(), ground.clone());
    let told = room.run(move || {
        let mut story = Story::new(inner, ground);
        let outcome = story.run(verbose);
        let mut told = std::mem::take(&mut story.told);
        let broken = story.load.broken.lock().ok().and_then(|mut broken| broken.take());
        told.broken = outcome.err().or(broken);
        if told.broken.is_some() {
            let room = story.site.room.describe();
            let _ = writeln!(told.log, "{}\n{room}", story.states());
        }
        story.end();
        told.writes = story.model.count();
        told
    });
    let mut told = told.unwrap_or_else(|panic| {
        let why = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|why| (*why).to_owned()));
        Told { broken: Some(format!("panic: {}", why.unwrap_or_default())), ..Told::default() }
    });
    (told.seconds, told.turns, told.trace) = (room.now_ns() / 1_000_000_000, room.turns(), room.trace());
    told
}

impl Story {
    fn new(room: Arc<Room>, ground: Ground) -> Story {
        let sizes = [96, 160, 256];
        let volumes =
            (0..1 + room.draw(2)).map(|_| sizes[usize::try_from(room.draw(3)).unwrap_or(0)]).collect();
        let shape = Shape {
            volumes,
            writers_each: if room.chance(500) { 1 } else { 2 },
            quota: if room.chance(400) { 6 << 20 } else { 64 << 20 },
            compresses: room.chance(500),
            window: if room.chance(400) { Duration::from_secs(3) } else { Duration::from_secs(3600) },
            events: 4 + room.draw(6),
        };
        let load = Load::default();
        load.pause_us.store(shape.pause_us(), Ordering::Relaxed);
        let net = Net::new(room.clone());
        Story {
            site: Site { room, net },
            ground,
            shape,
            model: Arc::default(),
            load: Arc::new(load),
            lives: 0,
            source: None,
            receiver: None,
            backing: None,
            source_disk: SimDisk::new(),
            backing_disk: SimDisk::new(),
            receiver_disk: SimDisk::new(),
            source_backup: None,
            receiver_backup: None,
            acknowledged: (0, 0),
            told: Told::default(),
        }
    }

    fn room(&self) -> &Arc<Room> {
        &self.site.room
    }

    fn note(&mut self, what: impl AsRef<str>) {
        let ms = self.room().now_ns() / 1_000_000;
        let _ = writeln!(self.told.log, "{:>4}.{:03} {}", ms / 1000, ms % 1000, what.as_ref());
    }

    fn pause(&self, most_ms: u64) {
        machine::sleep(Duration::from_millis(1 + self.room().draw(most_ms)));
    }

    fn run(&mut self, verbose: bool) -> Step {
        self.prepare();
        self.start_receiver();
        if self.room().chance(200) {
            self.pause(2000);
        }
        self.start_source(Back::Killed)?;
        self.until_well("first synchronisation")?;
        for _ in 0..self.shape.events {
            self.pause(800);
            self.event()?;
            self.promises()?;
            if self.room().chance(300) {
                self.until_well("after it")?;
                self.equal()?;
            }
            self.points(2)?;
            if verbose {
                let states = self.states();
                self.note(states);
            }
        }
        self.site.net.set(Weather::FAIR);
        self.until_well("in the end")?;
        self.equal()?;
        self.points(12)
    }

    fn prepare(&mut self) {
        let paths = &self.ground.paths;
        for (volume, blocks) in self.shape.volumes.clone().into_iter().enumerate() {
            let mut image = vec![0; blocks * BLOCK];
            for block in image.chunks_mut(BLOCK) {
                if self.site.room.chance(600) {
                    let word = self.site.room.draw(u64::MAX).to_le_bytes();
                    block.chunks_mut(8).for_each(|part| part.copy_from_slice(&word));
                }
            }
            self.backing_disk.put(&paths.backing.join(format!("v{volume}.img")), image);
        }
        for dir in [&paths.source, &paths.receiver, &paths.ring] {
            let _ = std::fs::remove_dir_all(dir);
            let _ = std::fs::create_dir_all(dir);
        }
        let _ = self.source_disk.create_dir(&paths.source);
        let _ = self.receiver_disk.create_dir(&paths.receiver);
        let shape = format!("{:?}", self.shape);
        self.note(shape);
    }

    fn life(&mut self) -> u64 {
        self.lives += 1;
        self.lives
    }

    fn start_receiver(&mut self) {
        let life = self.life();
        let disk = LifeDisk::new(self.room(), &self.receiver_disk);
        let socket = self.site.net.socket(RECEIVER.into());
        let settings = self.receiver_settings();
        let held: Arc<dyn Disk> = Arc::new(disk.clone());
        let start = move || async move {
            let settings = settings?;
            let surroundings =
                receiver::agent::Surroundings { disk: held, hold_replicas: false, socket: Some(socket) };
            Receiver::start_on(settings, surroundings).await.map_err(|error| error.to_string())
        };
        self.receiver = Some(Process::start(&self.site, life, "receiver", disk, start, |_| {}));
    }

    fn receiver_settings(&self) -> Result<conf::Receiver, String> {
        let (paths, identities) = (&self.ground.paths, &self.ground.identities);
        let mut settings =
            conf::Receiver::embedded(&paths.receiver, RECEIVER.into(), identities.source.1, GROUP)
                .map_err(|error| error.to_string())?;
        settings.identity_dir = identities.receiver.0.clone();
        settings.journal.segment_bytes = 2 << 20;
        settings.apply.batch_bytes = 256 << 10;
        settings.apply.undo_bytes = 512 << 10;
        settings.apply.interval = Duration::from_millis(400);
        settings.apply.idle = Duration::from_millis(30);
        settings.apply.min_interval = Duration::from_millis(60);
        settings.history.window = self.shape.window;
        settings.history.min = self.shape.window / 4;
        Ok(settings)
    }

    fn start_source(&mut self, back: Back) -> Step {
        let life = self.life();
        let disk = LifeDisk::new(self.room(), &self.source_disk);
        let mut backing = LifeDisk::new(self.room(), &self.backing_disk);
        backing.dies_with(&disk);
        self.backing = Some(backing.clone());
        let backings = Arc::new(SimBackings { disk: backing, below: self.backing_disk.clone() });
        let surroundings = Surroundings {
            disk: Arc::new(disk.clone()),
            backings,
            socket: Some(self.site.net.socket(source_address(life))),
            serves: false,
        };
        let settings = self.source_settings()?;
        let (room, model, load) = (self.room().clone(), self.model.clone(), self.load.clone());
        let each = self.shape.writers_each;
        self.load.busy.store(0, Ordering::Release);
        let start = move || async move {
            Replicator::start_on(settings, surroundings).await.map_err(|error| error.to_string())
        };
        let began =
            move |handle: &replicator::Handle| clients::start(&room, &model, &load, handle, back, each);
        self.source = Some(Process::start(&self.site, life, "source", disk, start, began));
        self.until_runs("the source", |story| {
            story.source.as_ref().map(|source| (source.daemon().is_some(), source.ended()))
        })
    }

    fn source_settings(&self) -> Result<conf::Replicator, String> {
        let (paths, identities) = (&self.ground.paths, &self.ground.identities);
        let volumes = (0..self.shape.volumes.len())
            .map(|volume| (format!("v{volume}"), paths.backing.join(format!("v{volume}.img")), None));
        let mut settings =
            conf::Replicator::embedded(&paths.source, GROUP, volumes, RECEIVER.into(), identities.receiver.1)
                .map_err(|error| error.to_string())?;
        settings.identity_dir = identities.source.0.clone();
        settings.ring_dir = paths.ring.clone();
        settings.ring.bytes = 1 << 20;
        settings.journal.segment_bytes = 1 << 20;
        settings.journal.quota = self.shape.quota;
        if !self.shape.compresses {
            settings.journal.compression = conf::Compression::Off;
        }
        settings.receiver.reconnect_min = Duration::from_millis(20);
        settings.receiver.reconnect_max = Duration::from_millis(500);
        settings.receiver.heartbeat = Duration::from_millis(300);
        settings.receiver.idle_timeout = Duration::from_millis(1500);
        settings.receiver.connect_timeout = Duration::from_millis(1500);
        Ok(settings)
    }

    fn until_runs(
        &mut self,
        who: &str,
        look: impl Fn(&Story) -> Option<(bool, Option<Result<(), String>>)>,
    ) -> Step {
        for _ in 0..30_000 {
            match look(self) {
                Some((true, _)) => return Ok(()),
                Some((false, Some(ended))) => return Err(format!("{who} did not start: {ended:?}")),
                _ => machine::sleep(Duration::from_millis(2)),
            }
        }
        Err(format!("{who} does not start\n{}", self.room().describe()))
    }

    fn states(&self) -> String {
        let source = self.source.as_ref().and_then(Process::daemon).map(|d| d.status());
        let receiver = self.receiver.as_ref().and_then(Process::daemon).map(|d| d.status());
        let mut text = String::new();
        for group in source.iter().flat_map(|status| &status.groups) {
            let _ = write!(
                text,
                "source {:?} ({}) epoch {} {:?} peer {:?}; ",
                group.state, group.why, group.epoch, group.positions, group.peer
            );
        }
        for group in receiver.iter().flat_map(|status| &status.groups) {
            let _ = write!(
                text,
                "receiver {:?} ({:?}) epoch {} {:?}",
                group.state, group.why, group.epoch, group.positions
            );
        }
        text
    }

    /// A failure, or an order of the operator.
    fn event(&mut self) -> Step {
        if self.source_backup.is_some() && self.room().chance(250) {
            return self.roll_back_source();
        }
        match self.room().draw(18) {
            0 | 1 => self.kill_source(),
            2 | 3 => self.kill_receiver(),
            4 => self.source_power_loss(),
            5 | 6 => self.receiver_power_loss(),
            7 => self.outage(),
            8 => self.bad_weather(),
            9 => self.burst(),
            10 => self.receiver_full(),
            11 => self.receiver_sync_fails(),
            12 => self.clock_jump(),
            13 => self.restart_source(),
            14 => self.restart_receiver(),
            15 => self.roll_back_receiver(),
            16 => self.roll_back_source(),
            _ => self.rewind(),
        }
    }

    fn source(&self) -> Result<Arc<replicator::Handle>, String> {
        let daemon = self.source.as_ref().and_then(Process::daemon);
        daemon.ok_or_else(|| {
            let how = self.source.as_ref().and_then(Process::ended);
            format!("the source is gone: {how:?}")
        })
    }

    /// Half of the time with writes under way on a slow disk; and nobody writes over what became of them.
    fn kill_source(&mut self) -> Step {
        let slow_us = if self.room().chance(500) { 1000 + self.room().draw(60_000) } else { 0 };
        self.note(format!("source: kill -9, its disk slow by up to {slow_us} us"));
        if let Some(backing) = self.backing.as_ref().filter(|_| slow_us > 0) {
            backing.slow(slow_us);
            self.pause(300);
            self.load.paused.store(true, Ordering::Release);
        }
        self.see_acknowledged();
        if let Some(source) = self.source.take() {
            source.kill(self.room());
        }
        self.pause(1500);
        self.start_source(Back::Killed)?;
        if slow_us > 0 { self.equal() } else { Ok(()) }
    }

    fn source_power_loss(&mut self) -> Step {
        self.note("source: power lost");
        self.see_acknowledged();
        if let Some(source) = self.source.take() {
            source.kill(self.room());
        }
        self.lose_ring();
        let seed = self.room().draw(u64::MAX);
        (self.source_disk, self.backing_disk) =
            (self.source_disk.crash(seed), self.backing_disk.crash(seed ^ 5));
        self.pause(1500);
        self.start_source(Back::PowerLost)
    }

    fn lose_ring(&self) {
        let _ = std::fs::remove_dir_all(&self.ground.paths.ring);
        let _ = std::fs::create_dir_all(&self.ground.paths.ring);
    }

    fn restart_source(&mut self) -> Step {
        self.note("source: stop and start");
        self.see_acknowledged();
        if let Some(source) = self.source.take() {
            source.stop(self.room()).map_err(|why| format!("the source's stop: {why}"))?;
        }
        self.pause(1500);
        self.start_source(Back::Killed)
    }

    fn kill_receiver(&mut self) -> Step {
        self.note("receiver: kill -9");
        self.stop_receiver_hard();
        self.pause(1500);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    fn stop_receiver_hard(&mut self) {
        self.see_acknowledged();
        if let Some(receiver) = self.receiver.take() {
            receiver.kill(self.room());
        }
        // What was under way when it died.
        self.see_acknowledged();
    }

    fn receiver_power_loss(&mut self) -> Step {
        self.note("receiver: power lost");
        self.stop_receiver_hard();
        let seed = self.room().draw(u64::MAX);
        self.receiver_disk = self.receiver_disk.crash(seed);
        self.pause(1500);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    fn restart_receiver(&mut self) -> Step {
        self.note("receiver: stop and start");
        self.see_acknowledged();
        if let Some(receiver) = self.receiver.take() {
            receiver.stop(self.room()).map_err(|why| format!("the receiver's stop: {why}"))?;
        }
        self.pause(1500);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    /// Notes what the source was told to be durable.
    fn see_acknowledged(&mut self) {
        if let Some(source) = self.source.as_ref().and_then(Process::daemon) {
            let peer = source.watch_peer().borrow().clone();
            self.acknowledged = self.acknowledged.max((peer.epoch, peer.received.0));
        }
    }

    /// Promise 4: what was acknowledged is there after any end of the receiver.
    fn receiver_kept_its_word(&mut self) -> Step {
        let word = self.acknowledged;
        self.until_runs("the receiver", |story| {
            story.receiver.as_ref().map(|receiver| (receiver.daemon().is_some(), receiver.ended()))
        })?;
        let status = self.receiver.as_ref().and_then(Process::daemon).map(|daemon| daemon.status());
        let Some(group) = status.and_then(|status| status.groups.into_iter().next()) else {
            return if word.1 == 0 {
                Ok(())
            } else {
                Err(format!("promise 4: acknowledged {word:?}, and no group is there"))
            };
        };
        let held = (group.epoch, group.positions.received_lsn.0);
        if held < word {
            return Err(format!(
                "promise 4: acknowledged {word:?}, held after the restart {held:?} ({:?})",
                group.why
            ));
        }
        Ok(())
    }

    /// The link is away until the quota is used up, and from then on nobody writes: what was given up has only its own bits.
    fn shortage(&mut self) -> Step {
        self.note("network: cut until the quota is used up");
        self.site.net.set(Weather { cut: true, ..Weather::FAIR });
        self.load.pause_us.store(5000, Ordering::Relaxed);
        for _ in 0..6000 {
            if self.source()?.status().groups[0].state == State::Degraded {
                break;
            }
            machine::sleep(Duration::from_millis(2));
        }
        self.load.paused.store(true, Ordering::Release);
        self.load.pause_us.store(self.shape.pause_us(), Ordering::Relaxed);
        self.pause(1000);
        self.site.net.set(Weather::FAIR);
        self.note("network: back");
        self.equal()
    }

    fn outage(&mut self) -> Step {
        if self.shape.quota < 64 << 20 && self.room().chance(700) {
            return self.shortage();
        }
        self.note("network: cut");
        self.site.net.set(Weather { cut: true, ..Weather::FAIR });
        self.pause(if self.shape.compresses { 6000 } else { 12_000 });
        self.site.net.set(Weather::FAIR);
        self.note("network: back");
        Ok(())
    }

    fn bad_weather(&mut self) -> Step {
        let room = self.room();
        let weather = Weather {
            cut: false,
            loss: room.draw(200),
            doubled: room.draw(200),
            delay_us: 500 + room.draw(40_000),
            jitter_us: room.draw(40_000),
        };
        self.note(format!("network: {weather:?}"));
        self.site.net.set(weather);
        self.pause(4000);
        if self.room().chance(700) {
            self.site.net.set(Weather::FAIR);
        }
        Ok(())
    }

    /// More than the ring takes, over a journal that hardly moves; at times the clients' own disk becomes slow then, and
    /// writes are still under way when the gap is repaired.
    fn burst(&mut self) -> Step {
        let slow_us = if self.room().chance(500) { 1000 + self.room().draw(100_000) } else { 0 };
        self.note(format!("clients: a burst, the source journal's disk slow, theirs by up to {slow_us} us"));
        let (Some(source), Some(backing)) = (&self.source, self.backing.clone()) else { return Ok(()) };
        source.disk.slow(80_000);
        self.load.pause_us.store(50, Ordering::Relaxed);
        self.pause(1200);
        backing.slow(slow_us);
        self.pause(100);
        if let Some(source) = &self.source {
            source.disk.slow(0);
        }
        if slow_us == 0 {
            self.load.pause_us.store(self.shape.pause_us(), Ordering::Relaxed);
            return Ok(());
        }
        // The repair begins under these writes, and what it misses nobody writes over.
        for _ in 0..1000 {
            if self.source()?.status().groups[0].state != State::Degraded {
                break;
            }
            machine::sleep(Duration::from_millis(2));
        }
        self.load.paused.store(true, Ordering::Release);
        self.pause(300);
        backing.slow(0);
        self.load.pause_us.store(self.shape.pause_us(), Ordering::Relaxed);
        self.equal()
    }

    fn receiver_full(&mut self) -> Step {
        self.note("receiver: disk full");
        let used = self.receiver_disk.used_bytes();
        self.receiver_disk.set_capacity(Some(used + self.room().draw(3 << 20)));
        self.pause(4000);
        self.receiver_disk.set_capacity(None);
        Ok(())
    }

    /// A failed sync is final: the receiver ends by itself, and what it had acknowledged is there.
    fn receiver_sync_fails(&mut self) -> Step {
        self.note("receiver: syncs fail");
        let below = if self.room().chance(500) { "groups" } else { "replica" };
        let path = self.ground.paths.receiver.join(below);
        self.receiver_disk.fail_syncs_below(Some(&path));
        for _ in 0..1500 {
            if self.receiver.as_ref().is_some_and(|receiver| receiver.ended().is_some()) {
                break;
            }
            machine::sleep(Duration::from_millis(2));
        }
        self.stop_receiver_hard();
        self.receiver_disk.fail_syncs(false);
        let seed = self.room().draw(u64::MAX);
        self.receiver_disk = self.receiver_disk.crash(seed);
        self.start_receiver();
        self.receiver_kept_its_word()
    }

    fn clock_jump(&mut self) -> Step {
        let seconds = i64::try_from(self.room().draw(14_400)).unwrap_or(0) - 7200;
        self.note(format!("clocks: {seconds} s"));
        self.room().jump(seconds * 1_000_000_000);
        Ok(())
    }

    /// The receiver is restored from a backup that was taken earlier, or a backup is taken.
    fn roll_back_receiver(&mut self) -> Step {
        let Some(backup) = self.receiver_backup.take() else {
            self.note("receiver: a backup is taken");
            self.stop_receiver_hard();
            self.receiver_backup = Some(self.receiver_disk.crash(1));
            self.start_receiver();
            return self.receiver_kept_its_word();
        };
        self.note("receiver: restored from its backup");
        self.stop_receiver_hard();
        self.receiver_disk = backup;
        self.start_receiver();
        self.until_greeted()?;
        // Nothing that was acknowledged since the backup is expected any more.
        self.acknowledged = (0, 0);
        self.until_well("after the receiver was rolled back")
    }

    /// The same of the source.
    fn roll_back_source(&mut self) -> Step {
        let Some((disk, backing, captured)) = self.source_backup.take() else {
            return self.back_up_source();
        };
        self.note("source: restored from its backup");
        let newest = self.source().map_or(u64::MAX, |source| source.captured_lsn().0);
        if let Some(source) = self.source.take() {
            source.kill(self.room());
        }
        self.lose_ring();
        (self.source_disk, self.backing_disk) = (disk, backing);
        self.model.ambiguous(captured..newest.saturating_add(1));
        self.acknowledged = (0, 0);
        let apart = self.room().chance(500);
        if apart {
            self.site.net.set(Weather { cut: true, ..Weather::FAIR });
        }
        self.start_source(Back::RolledBack)?;
        if apart {
            self.passes(newest);
        }
        self.until_well("after the source was rolled back")
    }

    fn back_up_source(&mut self) -> Step {
        let stops = self.room().chance(500);
        self.note(if stops { "source: stopped for a backup" } else { "source: a backup is taken" });
        match self.source.take() {
            Some(source) if stops => source.stop(self.room()).map_err(|why| format!("a stop: {why}"))?,
            Some(source) => source.kill(self.room()),
            None => {}
        }
        self.lose_ring();
        (self.source_disk, self.backing_disk) = (self.source_disk.crash(1), self.backing_disk.crash(1));
        self.source_backup = Some((self.source_disk.crash(1), self.backing_disk.crash(1), 0));
        self.start_source(Back::PowerLost)?;
        let captured = self.source()?.captured_lsn().0;
        if let Some(backup) = &mut self.source_backup {
            backup.2 = captured;
        }
        Ok(())
    }

    /// On its own, the source gives out lsns that the receiver knows another content of, and goes beyond them.
    fn passes(&self, newest: u64) {
        for _ in 0..2000 {
            if self.source().is_ok_and(|source| source.captured_lsn().0 > newest.saturating_add(50)) {
                break;
            }
            machine::sleep(Duration::from_millis(5));
        }
    }

    /// Takes the replica back, compares it, and rolls it forward again.
    fn rewind(&mut self) -> Step {
        let Some(receiver) = self.receiver.as_ref().and_then(Process::daemon) else { return Ok(()) };
        let Ok(points) = receiver.points(GROUP) else { return Ok(()) };
        let (Some(oldest), Some(newest)) = (points.oldest, points.newest) else { return Ok(()) };
        let at = match self.room().chance(500) {
            true => At::Latest,
            false => At::Lsn(Lsn(oldest.lsn.0 + self.room().draw(newest.lsn.0 - oldest.lsn.0 + 1))),
        };
        // Whoever holds it holds its directory, also when it is killed.
        drop(receiver);
        self.note(format!("receiver: rewind to {at:?}"));
        let order = at.clone();
        let outcome = self.on_receiver(move |handle| async move {
            handle
                .rewind(GROUP, order)
                .await
                .map(|report| report.lsn.0)
                .map_err(|error| (error.kind, error.to_string()))
        })?;
        match outcome {
            Some(Ok(lsn)) => {
                self.check_replica(lsn)?;
                self.told.points += 1;
                if self.room().chance(400) {
                    self.receiver_power_loss()?;
                    self.check_replica(lsn)?;
                }
                self.pause(1500);
            }
            Some(Err((receiver::ErrorKind::NotPossible, _))) => self.told.refused += 1,
            Some(Err((_, why))) => return Err(format!("rewind to {at:?}: {why}")),
            None => return Ok(()),
        }
        let resumed = self.on_receiver(|handle| async move {
            handle.resume(GROUP).await.map(|_| ()).map_err(|error| (error.kind, error.to_string()))
        })?;
        match resumed {
            Some(Err((kind, why))) if kind != receiver::ErrorKind::NotPossible => {
                Err(format!("resume: {why}"))
            }
            _ => Ok(()),
        }
    }

    /// Runs an order on a runtime of its own, as the control socket would.
    fn on_receiver<T: Send + 'static, F: Future<Output = T>>(
        &self,
        order: impl FnOnce(Arc<receiver::agent::Handle>) -> F,
    ) -> Result<Option<T>, String> {
        let Some(handle) = self.receiver.as_ref().and_then(Process::daemon) else { return Ok(None) };
        let done = crate::turn::run(self.room(), &self.site.net, order(handle));
        done.map(Some).map_err(|error| error.to_string())
    }

    fn check_replica(&self, lsn: u64) -> Step {
        let images = self.replicas();
        self.model.check_point(lsn, &images).map_err(|why| format!("the rewound replica: {why}"))
    }

    fn replicas(&self) -> Vec<Vec<u8>> {
        let image = |volume| {
            let path = self.ground.paths.receiver.join("replica").join(GROUP).join(format!("v{volume}.img"));
            self.receiver_disk.contents(&path).unwrap_or_default()
        };
        (0..self.shape.volumes.len()).map(image).collect()
    }

    /// What holds at any time.
    fn promises(&mut self) -> Step {
        if let Some(why) = self.load.broken.lock().ok().and_then(|mut broken| broken.take()) {
            return Err(why);
        }
        for (who, ended) in [
            ("source", self.source.as_ref().and_then(Process::ended)),
            ("receiver", self.receiver.as_ref().and_then(Process::ended)),
        ] {
            if let Some(how) = ended {
                return Err(format!("the {who} ended by itself: {how:?}"));
            }
        }
        Ok(())
    }

    /// Random points of the history, all volumes at the same instant.
    fn points(&mut self, count: usize) -> Step {
        // At times so slowly that batches are applied in the middle of a point.
        let slow_us = if self.room().chance(400) { 3000 } else { 0 };
        if let Some(receiver) = &self.receiver {
            receiver.disk.slow_reads(slow_us);
        }
        let checked = self.check_points(count);
        if let Some(receiver) = &self.receiver {
            receiver.disk.slow_reads(0);
        }
        checked
    }

    fn check_points(&mut self, count: usize) -> Step {
        for _ in 0..count {
            let Some(receiver) = self.receiver.as_ref().and_then(Process::daemon) else { return Ok(()) };
            let Ok(history) = receiver.history(GROUP) else { return Ok(()) };
            let points = history.points();
            let (Some(oldest), Some(newest)) = (points.oldest, points.newest) else { return Ok(()) };
            let lsn = oldest.lsn.0 + self.room().draw(newest.lsn.0 - oldest.lsn.0 + 1);
            match images(&history, lsn) {
                Ok(Some(images)) => {
                    self.told.points += 1;
                    self.model.check_point(lsn, &images).map_err(|why| format!("promise 5: {why}"))?;
                }
                Ok(None) => self.told.refused += 1,
                Err(why) => return Err(format!("promise 5: lsn {lsn}: {why}")),
            }
        }
        Ok(())
    }

    /// The source has noticed that this is another receiver than a moment ago.
    fn until_greeted(&mut self) -> Step {
        self.site.net.set(Weather::FAIR);
        let ends = machine::now() + HEALING;
        loop {
            let status = self.receiver.as_ref().and_then(Process::daemon).map(|daemon| daemon.status());
            if status.is_some_and(|status| status.groups.iter().any(|group| group.peer.is_some())) {
                return Ok(());
            }
            if machine::now() > ends {
                return Err(format!("the source does not come back: {}", self.states()));
            }
            machine::sleep(Duration::from_millis(20));
        }
    }

    /// Everything comes right by itself: all is captured, received and on the replica.
    fn until_well(&mut self, when: &str) -> Step {
        // Loss at a tenth lets CUBIC through at the pace of a modem: that is no failure.
        self.site.net.set(Weather::FAIR);
        let ends = machine::now() + HEALING;
        loop {
            self.promises()?;
            let status = self.source().map(|source| source.status())?;
            let group = &status.groups[0];
            if group.state == State::Replicating && group.connected {
                break;
            }
            if machine::now() > ends {
                return Err(format!("{when}: does not come right: {}", self.states()));
            }
            machine::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// With nothing under way, replica and disk are the same.
    fn equal(&mut self) -> Step {
        self.load.paused.store(true, Ordering::Release);
        let outcome = self.equal_when_quiet();
        self.load.paused.store(false, Ordering::Release);
        outcome
    }

    fn equal_when_quiet(&mut self) -> Step {
        let ends = machine::now() + HEALING;
        while self.load.busy.load(Ordering::Acquire) > 0 {
            machine::sleep(Duration::from_millis(2));
        }
        loop {
            self.until_well("before comparing")?;
            let captured = self.source()?.captured_lsn();
            let status = self.receiver.as_ref().and_then(Process::daemon).map(|daemon| daemon.status());
            let group = status.and_then(|status| status.groups.into_iter().next());
            let source = self.source()?.status();
            let same = group.as_ref().is_some_and(|group| {
                group.positions.checkpoint_lsn >= captured && group.epoch == source.groups[0].epoch
            });
            if same && source.groups[0].state == State::Replicating {
                break;
            }
            if machine::now() > ends {
                return Err(format!("the replica does not get there: {}", self.states()));
            }
            machine::sleep(Duration::from_millis(20));
        }
        for (volume, replica) in self.replicas().iter().enumerate() {
            let path = self.ground.paths.backing.join(format!("v{volume}.img"));
            let disk = self.backing_disk.contents(&path).unwrap_or_default();
            if *replica != disk {
                let at = disk.iter().zip(replica).position(|(a, b)| a != b);
                return Err(format!(
                    "promise 3: replicating, nothing under way, and volume {volume} differs at byte {at:?} ({} and {} bytes)",
                    disk.len(),
                    replica.len()
                ));
            }
        }
        Ok(())
    }

    fn end(&mut self) {
        if let Some(source) = self.source.take() {
            source.kill(&self.site.room);
        }
        if let Some(receiver) = self.receiver.take() {
            receiver.kill(&self.site.room);
        }
        for dir in [&self.ground.paths.source, &self.ground.paths.receiver, &self.ground.paths.ring] {
            let _ = std::fs::remove_dir_all::<&Path>(dir);
        }
    }
}

/// Every volume at an lsn; `None` where that is no recovery point.
fn images(history: &Arc<receiver::history::History>, lsn: u64) -> Result<Option<Vec<Vec<u8>>>, String> {
    let refused = |error: receiver::Error| match error.kind {
        receiver::ErrorKind::NotPossible => Ok(None),
        _ => Err(error.to_string()),
    };
    let (point, _pin) = match history.resolve_pinned(&At::Lsn(Lsn(lsn))) {
        Ok(found) => found,
        Err(error) => return refused(error),
    };
    let mut images = Vec::new();
    for (_, name, _) in history.volumes_at(point.moment.lsn) {
        let view = match View::open(history, point, &name) {
            Ok(view) => view,
            Err(error) => return refused(error),
        };
        let mut image = vec![0; usize::try_from(view.size_bytes()).unwrap_or(0)];
        // In pieces, as a client would: batches are applied between them.
        for (at, piece) in image.chunks_mut(PIECE).enumerate() {
            view.read_at(piece, (at * PIECE) as u64).map_err(|error| format!("{name}: {error}"))?;
        }
        images.push(image);
    }
    Ok(Some(images))
}
