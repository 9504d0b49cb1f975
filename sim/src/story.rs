//! A story: a random course of load and failures, told by a seed, and what has to be true after each of them.

mod directories;
mod edges;
mod events;
mod promises;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use journal::io::Disk;
use journal::sim_disk::SimDisk;
use receiver::agent::Receiver;
use replicator::{Replicator, Surroundings};

use crate::clients::{self, Load};
use crate::disk::LifeDisk;
use crate::model::{BLOCK, Back, Model};
use crate::net::{Net, Weather};
use crate::room::Room;
use crate::side::{Paths, Process, RECEIVER, SimBackings, Site, source_address};

const GROUP: &str = "g";

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
    /// The longest pause of a client: what all of them write passes the link, but not the quota in a longer
    /// outage.
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

    fn source(&self) -> Result<Arc<replicator::Handle>, String> {
        let daemon = self.source.as_ref().and_then(Process::daemon);
        daemon.ok_or_else(|| {
            let how = self.source.as_ref().and_then(Process::ended);
            format!("the source is gone: {how:?}")
        })
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
