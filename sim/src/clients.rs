//! The clients of the source's volumes: each writes its own stretch, one write at a time, and tells the
//! model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kfilter::Mode;
use nbd::{Export, Zeroing};
use replicator::Handle;
use replicator::capture::nbd::CapturedVolume;

use crate::model::{BLOCK, Back, Kind, Model};
use crate::room::Room;

/// The longest that a write may take besides its disk: nothing that we do may make it wait longer.
const PATIENCE: Duration = Duration::from_millis(500);
/// Blocks of one write at most.
const BLOCKS: u64 = 12;

/// What clients do just now.
#[derive(Default)]
pub struct Load {
    /// Nothing.
    pub paused: AtomicBool,
    /// Longest pause between two writes, µs.
    pub pause_us: AtomicU64,
    /// Clients at work.
    pub busy: AtomicU64,
    /// The source's disk is made slow, or fails.
    pub excused: AtomicBool,
    /// The first broken promise.
    pub broken: std::sync::Mutex<Option<String>>,
}

impl Load {
    /// Notes a broken promise.
    pub fn breaks(&self, why: String) {
        let mut broken = self.broken.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        broken.get_or_insert(why);
    }
}

/// Tells the model what the volumes hold, and starts the clients as threads of the source's life.
pub fn start(
    room: &Arc<Room>,
    model: &Arc<Model>,
    load: &Arc<Load>,
    handle: &Handle,
    back: Back,
    each: usize,
) {
    let exports = handle.exports();
    let images = exports.iter().map(|export| {
        let mut image = vec![0; usize::try_from(export.size_bytes()).unwrap_or(0)];
        export.read_at(0, &mut image).map(|()| image)
    });
    let images: Result<Vec<_>, _> = images.collect();
    let images = match images {
        Ok(images) => images,
        Err(error) => return load.breaks(format!("the source's disk cannot be read: {error}")),
    };
    if let Err(why) = model.begin(back, images, handle.captured_lsn().0, each) {
        return load.breaks(why);
    }
    for (writer, (volume, blocks)) in model.writers().into_iter().enumerate() {
        let (room, model, load) = (room.clone(), model.clone(), load.clone());
        let client = Client { room, model, load, export: exports[volume].clone(), volume, writer, blocks };
        // A client that cannot be started is one less.
        let _ = machine::spawn(format!("client-{writer}"), move || client.run());
    }
}

struct Client {
    room: Arc<Room>,
    model: Arc<Model>,
    load: Arc<Load>,
    export: Arc<CapturedVolume>,
    volume: usize,
    writer: usize,
    blocks: std::ops::Range<usize>,
}

impl Client {
    fn run(self) {
        loop {
            let pause_us = self.load.pause_us.load(Ordering::Relaxed);
            machine::sleep(Duration::from_micros(1 + self.room.draw(pause_us)));
            if self.load.paused.load(Ordering::Acquire) {
                machine::sleep(Duration::from_millis(5));
                continue;
            }
            self.load.busy.fetch_add(1, Ordering::AcqRel);
            let goes_on = self.act();
            self.load.busy.fetch_sub(1, Ordering::AcqRel);
            if !goes_on {
                return;
            }
        }
    }

    fn act(&self) -> bool {
        if self.room.chance(100) {
            let upto = self.model.flushing();
            return match self.export.flush() {
                Ok(()) => {
                    self.model.flushed(self.volume, &upto);
                    true
                }
                Err(error) => self.failed("flush", &error),
            };
        }
        let count = self.blocks.len() as u64;
        let at = self.room.draw(count);
        let length = 1 + self.room.draw(BLOCKS.min(count - at));
        let to_usize = |blocks: u64| usize::try_from(blocks).unwrap_or(0);
        let start = self.blocks.start + to_usize(at);
        let blocks = start..start + to_usize(length);
        let kind = if self.room.chance(150) { Kind::Zeros } else { Kind::Content };
        let before = self.export.ring.captured_lsn();
        let records = self.export.ring.mode() == Mode::Ring;
        let (write, bytes) = self.model.submit(self.writer, blocks.clone(), kind, before);
        let (offset, length_bytes) = ((blocks.start * BLOCK) as u64, (blocks.len() * BLOCK) as u64);
        let fua = self.room.chance(50);
        let began = machine::now();
        let written = match kind {
            Kind::Content => self.export.write(offset, &bytes, fua),
            Kind::Zeros if self.room.chance(500) => self.export.discard(offset, length_bytes, fua),
            Kind::Zeros => {
                self.export.write_zeroes(offset, length_bytes, Zeroing { fua, ..Zeroing::default() })
            }
        };
        if let Err(error) = written {
            return self.failed("write", &error);
        }
        let took = machine::since(began);
        if took > PATIENCE && !self.load.excused.load(Ordering::Acquire) {
            self.load.breaks(format!("promise 1: a write took {} ms", took.as_millis()));
        }
        let recorded = records && self.export.ring.mode() == Mode::Ring;
        self.model.answered(self.writer, write, self.export.ring.captured_lsn(), recorded);
        true
    }

    /// A source that stops refuses; anything else is a broken promise.
    fn failed(&self, what: &str, error: &std::io::Error) -> bool {
        let stops = error.raw_os_error() == Some(rustix::io::Errno::SHUTDOWN.raw_os_error());
        if !stops && !self.load.excused.load(Ordering::Acquire) && !error.to_string().contains("killed") {
            self.load.breaks(format!("promise 1: a {what} failed: {error}"));
        }
        false
    }
}

// Clients of a stopped source end with its volumes; those of a killed one unwind with its life. `busy` is
// then reset.
