//! The threads that do what must not hold up a connection: flushes, FUA, reads from disk, trims, zeroing.
//!
//! One bounded queue for all connections of a server. A full queue blocks the connection thread that adds to
//! it, never a pool thread: each connection bounds its requests in flight, and its channel has room for the
//! answer of every one of them. Replies are encoded here, so that the connection only has to send them.
//!
//! A job whose client has gone is not begun: the client sends the request again over its next connection, and
//! may have changed the range once more before the old job's turn comes. A job that has begun is ordered by
//! the export, before all that comes later.

use std::io;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::{mpsc, watch};

use crate::error::{Error, Kind};
use crate::export::{BlockExtent, Export, Zeroing};
use crate::memory::Share;
use crate::reply::{Replies, refusal_of};
use crate::session::{Command, PIECE_BYTES, Request};
use crate::socket::Client;

/// Extents in one answer of BLOCK_STATUS: a client asks again for the rest.
const MAX_STATUS_EXTENTS: usize = 4096;
/// A READ that would fall into more pieces than this is read through instead.
const MAX_READ_CHUNKS: usize = 32;
/// Reads shorter than this are not searched for holes.
const HOLE_SEARCH_BYTES: u32 = 64 << 10;

/// What is to be done.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Work {
    /// All of this request.
    Request(Request),
    /// The write with this cookie is done but for the durability it asked for.
    SyncWrite { cookie: u64 },
}

/// One piece of work and where its answer goes.
pub(crate) struct Job {
    pub export: Arc<dyn Export>,
    pub replies: Replies,
    pub work: Work,
    pub client: Client,
    /// Shared memory for its reply.
    pub share: Option<Share>,
    pub answer: mpsc::Sender<Done>,
}

/// A finished job.
#[derive(Debug)]
pub(crate) struct Done {
    /// The encoded reply in pieces; empty when nobody waits for it.
    pub reply: Vec<Vec<u8>>,
    /// Shared memory that it takes.
    pub share: Option<Share>,
    /// What the job had reserved of the connection's window.
    pub reserved_bytes: usize,
}

/// The threads; they end when the last handle is dropped and the queue is empty.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    queue: Sender<Job>,
    /// Jobs queued or running.
    unfinished: Arc<watch::Sender<usize>>,
}

impl Pool {
    pub fn start(threads: usize, queue_jobs: usize) -> Result<Self, Error> {
        let (queue, jobs) = bounded::<Job>(queue_jobs);
        let unfinished = Arc::new(watch::Sender::new(0));
        for number in 0..threads {
            let (jobs, unfinished) = (jobs.clone(), Arc::clone(&unfinished));
            thread::Builder::new()
                .name(format!("nbd-pool-{number}"))
                .spawn(move || run(&jobs, &unfinished))
                .map_err(|error| Error::caused(Kind::Io, "start a pool thread", error))?;
        }
        Ok(Self { queue, unfinished })
    }

    /// Queues a job; blocks while the queue is full.
    pub fn add(&self, job: Job) {
        self.unfinished.send_modify(|jobs| *jobs += 1);
        self.queue.send(job).expect("invariant: pool threads live as long as the queue");
    }

    /// Follows how many jobs are queued or running.
    pub fn unfinished(&self) -> watch::Receiver<usize> {
        self.unfinished.subscribe()
    }
}

fn run(jobs: &Receiver<Job>, unfinished: &watch::Sender<usize>) {
    // A job that panics would leave its client waiting for ever: a broken invariant, so the process ends.
    struct AbortOnPanic;
    impl Drop for AbortOnPanic {
        fn drop(&mut self) {
            if thread::panicking() {
                std::process::abort();
            }
        }
    }
    let _abort = AbortOnPanic;
    for mut job in jobs {
        let reply = if job.client.is_gone() { Vec::new() } else { job.run() };
        // A connection that has ended does not want its answers any more.
        let done = Done { reply, share: job.share.take(), reserved_bytes: job.work.reserved_bytes() };
        let _ = job.answer.try_send(done);
        drop(job); // whoever sees no job unfinished finds the export free
        unfinished.send_modify(|jobs| *jobs -= 1);
    }
}

impl Job {
    /// Does it; the encoded reply.
    fn run(&self) -> Vec<Vec<u8>> {
        let mut reply = Vec::new();
        let mut before = Vec::new();
        let (cookie, result) = match &self.work {
            Work::SyncWrite { cookie } => {
                (*cookie, self.export.sync().map(|()| self.replies.done(&mut reply, *cookie)))
            }
            Work::Request(request) => {
                (request.cookie, execute(&*self.export, self.replies, request, &mut before, &mut reply))
            }
        };
        if let Err(error) = result {
            before.clear();
            reply.clear();
            self.replies.refused(&mut reply, cookie, &refusal_of(&error));
        }
        before.push(reply);
        before
    }
}

impl Work {
    /// Bytes of the reply that count in the connection's window.
    pub fn reserved_bytes(&self) -> usize {
        match self {
            Work::Request(Request { command: Command::Read { .. }, length, .. }) => *length as usize,
            _ => 0,
        }
    }
}

/// Does the request and encodes its answer: `before`, then `reply`; an error leaves rubbish in both.
fn execute(
    export: &dyn Export,
    replies: Replies,
    request: &Request,
    before: &mut Vec<Vec<u8>>,
    reply: &mut Vec<u8>,
) -> io::Result<()> {
    let Request { cookie, command, offset, length, fua } = *request;
    let length_bytes = u64::from(length);
    match command {
        Command::Read { whole } => return read(export, replies, request, whole, before, reply),
        Command::BlockStatus { one } => {
            let max_extents = if one { 1 } else { MAX_STATUS_EXTENTS };
            let extents = export.block_status(offset, length_bytes, max_extents)?;
            replies.block_status(reply, cookie, &extents);
            return Ok(());
        }
        Command::Flush => export.flush()?,
        Command::Trim if length > 0 => export.discard(offset, length_bytes, fua)?,
        Command::WriteZeroes { no_hole, fast } if length > 0 => {
            let how = Zeroing { fua, keep_allocated: no_hole, only_if_fast: fast };
            export.write_zeroes(offset, length_bytes, how)?;
        }
        Command::Trim | Command::WriteZeroes { .. } => {}
    }
    if fua && !matches!(command, Command::Flush) {
        export.sync()?;
    }
    replies.done(reply, cookie);
    Ok(())
}

fn read(
    export: &dyn Export,
    replies: Replies,
    request: &Request,
    whole: bool,
    before: &mut Vec<Vec<u8>>,
    reply: &mut Vec<u8>,
) -> io::Result<()> {
    let Request { cookie, offset, length, .. } = *request;
    if length == 0 {
        replies.nothing(reply, cookie);
        return Ok(());
    }
    let data = BlockExtent { length_bytes: u64::from(length), hole: false };
    let mut runs = vec![data];
    if replies.structured && !whole && length >= HOLE_SEARCH_BYTES {
        let found = export.block_status(offset, data.length_bytes, MAX_READ_CHUNKS)?;
        if found.iter().map(|run| run.length_bytes).sum::<u64>() == data.length_bytes {
            runs = found;
        }
    }
    let mut at = offset;
    for (index, run) in runs.iter().enumerate() {
        let last = index + 1 == runs.len();
        let run_length = u32::try_from(run.length_bytes).expect("invariant: within the request's length");
        if run.hole {
            replies.hole(reply, cookie, at, run_length, last);
        } else {
            replies.data(reply, cookie, at, run_length as usize, last);
            let (mut at, mut left) = (at, run_length as usize);
            while left > 0 {
                if reply.len() >= PIECE_BYTES {
                    before.push(std::mem::take(reply));
                }
                let (from, piece) = (reply.len(), left.min(PIECE_BYTES));
                reply.resize(from + piece, 0);
                export.read_at(at, &mut reply[from..])?;
                (at, left) = (at + piece as u64, left - piece);
            }
        }
        at += run.length_bytes;
    }
    Ok(())
}
