//! A small pool of threads that encode frames in parallel and hand them back in the order of submission.
//!
//! One owner submits and receives; nothing here blocks it but [`EncodePool::recv`]. What is submitted and not
//! yet received is bounded in bytes. Batches and buffers go round: in the steady state nothing is allocated
//! per frame.
//!
//! The threads are niced and, unless in haste, give way after each frame: frames wait in the ring without
//! harm while it has room, and the front's own threads, which applications wait for, share the same cores.

use crate::compress::{Compression, Encoder};
use crate::frame::{Batch, EncodedFrame, Stamp};
use crate::{Error, ErrorKind, Result};
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// How much the pool yields to the threads that serve I/O.
const NICE: i32 = 5;

/// Jobs under way at most, beside the byte limit: it bounds the channels. Frames closed by age may be tiny.
const MAX_JOBS: usize = 256;

/// Batches and buffers kept for reuse.
const MAX_SPARE: usize = 64;

#[derive(Debug)]
struct Job {
    sequence: u64,
    batch: Batch,
    stamp: Stamp,
    compression: Compression,
    buffer: Vec<u8>,
}

struct Done {
    sequence: u64,
    batch: Batch,
    frame: Result<EncodedFrame>,
}

enum Workers {
    /// No threads: encode where it is submitted.
    Inline(Encoder),
    Threads {
        jobs: Option<Sender<Job>>,
        done: Receiver<Done>,
        in_haste: Arc<AtomicBool>,
        handles: Vec<thread::JoinHandle<()>>,
    },
}

/// Encodes batches, in order.
pub struct EncodePool {
    workers: Workers,
    /// Results from `received` on; a gap is a frame still being encoded.
    ready: VecDeque<Option<(Batch, Result<EncodedFrame>)>>,
    submitted: u64,
    received: u64,
    queued_bytes: usize,
    queue_bytes: usize,
    batches: Vec<Batch>,
    buffers: Vec<Vec<u8>>,
}

impl EncodePool {
    /// A pool of `threads` named `name-0`, `name-1`, …; with 0 it encodes inline. At most `queue_bytes` raw
    /// bytes (or one batch, if that is more) are under way.
    ///
    /// # Errors
    /// No memory or no thread to be had.
    pub fn new(name: &str, threads: usize, queue_bytes: usize) -> Result<EncodePool> {
        // In a simulation too: one thread runs there at a time.
        let workers = if threads == 0 || machine::is_simulated() {
            Workers::Inline(Encoder::new()?)
        } else {
            let (jobs, jobs_in) = bounded::<Job>(MAX_JOBS);
            let (done_out, done) = bounded::<Done>(MAX_JOBS);
            let mut handles = Vec::with_capacity(threads);
            let in_haste = Arc::<AtomicBool>::default();
            for thread in 0..threads {
                let encoder = Encoder::new()?;
                let (jobs_in, done_out, in_haste) = (jobs_in.clone(), done_out.clone(), in_haste.clone());
                let handle = thread::Builder::new()
                    .name(format!("{name}-{thread}"))
                    .spawn(move || work(encoder, &jobs_in, &done_out, &in_haste))
                    .map_err(|error| Error::io("start an encoder thread", error))?;
                handles.push(handle);
            }
            Workers::Threads { jobs: Some(jobs), done, in_haste, handles }
        };
        Ok(EncodePool {
            workers,
            ready: VecDeque::with_capacity(MAX_JOBS),
            submitted: 0,
            received: 0,
            queued_bytes: 0,
            queue_bytes,
            batches: Vec::with_capacity(MAX_SPARE),
            buffers: Vec::with_capacity(MAX_SPARE),
        })
    }

    /// An empty batch, with the memory of an earlier one where there is one.
    pub fn batch(&mut self) -> Batch {
        self.batches.pop().unwrap_or_default()
    }

    /// Takes the memory of a finished frame back.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if self.buffers.len() < MAX_SPARE {
            self.buffers.push(buffer);
        }
    }

    /// Whether frames are waited for, so that nobody is given way to.
    pub fn set_in_haste(&self, is: bool) {
        if let Workers::Threads { in_haste, .. } = &self.workers {
            in_haste.store(is, Ordering::Relaxed);
        }
    }

    /// Batches submitted and not yet received.
    pub fn in_flight(&self) -> usize {
        usize::try_from(self.submitted - self.received).expect("bounded by MAX_JOBS")
    }

    /// Whether a batch of `bytes` would have to wait: receive first.
    pub fn is_full(&self, bytes: usize) -> bool {
        let jobs = self.in_flight();
        jobs >= MAX_JOBS || jobs > 0 && self.queued_bytes + bytes > self.queue_bytes
    }

    /// Hands a batch over. Never waits.
    ///
    /// # Errors
    /// Gives the batch back when the pool [is full](Self::is_full).
    pub fn submit(
        &mut self,
        batch: Batch,
        stamp: Stamp,
        compression: Compression,
    ) -> std::result::Result<(), Batch> {
        let bytes = batch.raw().len();
        if self.is_full(bytes) {
            return Err(batch);
        }
        let buffer = self.buffers.pop().unwrap_or_default();
        match &mut self.workers {
            Workers::Inline(encoder) => {
                let frame = encoder.encode(&batch, &stamp, None, compression, buffer);
                self.ready.push_back(Some((batch, frame)));
            }
            Workers::Threads { jobs, .. } => {
                let job = Job { sequence: self.submitted, batch, stamp, compression, buffer };
                let jobs = jobs.as_ref().expect("the sender lives as long as the pool");
                jobs.try_send(job).expect("encoder threads live as long as the pool, and take MAX_JOBS");
                self.ready.push_back(None);
            }
        }
        self.queued_bytes += bytes;
        self.submitted += 1;
        Ok(())
    }

    /// The next frame in order, waiting for it; `None` when nothing is under way.
    pub fn recv(&mut self) -> Option<Result<EncodedFrame>> {
        while matches!(self.ready.front(), Some(None)) {
            let Workers::Threads { done, .. } = &self.workers else {
                unreachable!("inline work is ready at once");
            };
            let finished = done.recv().expect("encoder threads live as long as the pool");
            self.place(finished);
        }
        self.pop()
    }

    /// The next frame in order if it is ready; `None` when it is not, or nothing is under way.
    pub fn try_recv(&mut self) -> Option<Result<EncodedFrame>> {
        while matches!(self.ready.front(), Some(None)) {
            let Workers::Threads { done, .. } = &self.workers else {
                unreachable!("inline work is ready at once");
            };
            match done.try_recv() {
                Ok(finished) => self.place(finished),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => panic!("encoder threads live as long as the pool"),
            }
        }
        self.pop()
    }

    fn place(&mut self, finished: Done) {
        let at = usize::try_from(finished.sequence - self.received).expect("bounded by MAX_JOBS");
        self.ready[at] = Some((finished.batch, finished.frame));
    }

    fn pop(&mut self) -> Option<Result<EncodedFrame>> {
        let (mut batch, frame) = self.ready.pop_front()??;
        self.received += 1;
        self.queued_bytes -= batch.raw().len();
        if self.batches.len() < MAX_SPARE {
            batch.clear();
            self.batches.push(batch);
        }
        Some(frame)
    }
}

impl Drop for EncodePool {
    fn drop(&mut self) {
        if let Workers::Threads { jobs, handles, .. } = &mut self.workers {
            drop(jobs.take());
            for handle in handles.drain(..) {
                // A panic of an encoder has been reported by its own thread; there is nobody to tell again.
                let _ = handle.join();
            }
        }
    }
}

fn work(mut encoder: Encoder, jobs: &Receiver<Job>, done: &Sender<Done>, in_haste: &AtomicBool) {
    // None = the calling thread. Refused only where raising the value is: then it runs at the common
    // priority.
    let _ = rustix::process::setpriority_process(None, NICE);
    for Job { sequence, batch, stamp, compression, buffer } in jobs {
        if !in_haste.load(Ordering::Relaxed) {
            machine::give_way();
        }
        // ⚠ A thread that ended here would keep its frame, and with it the journal, waiting for ever.
        let encode = AssertUnwindSafe(|| encoder.encode(&batch, &stamp, None, compression, buffer));
        let frame = catch_unwind(encode).unwrap_or_else(|panic| Err(panicked(&machine::said(&*panic))));
        if done.send(Done { sequence, batch, frame }).is_err() {
            return;
        }
    }
}

fn panicked(said: &str) -> Error {
    let at = format!("an encoder thread panicked ({said}): a fault of this program; its log says where");
    Error::new(ErrorKind::Io, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::tests::{batch_of, stamp};
    use crate::frame::FrameHeader;
    use crate::{Lsn, SECTOR_BYTES};

    fn run(threads: usize) {
        let mut pool = EncodePool::new("encode", threads, 300_000).unwrap();
        let (mut next, mut chain, mut refused) = (1, 7, 0);
        for lsn in 1..=400_u64 {
            // Sizes differ widely, so that threads finish out of order.
            let bytes = usize::try_from(lsn * 7919 % 100 + 1).unwrap() * SECTOR_BYTES;
            let mut batch = batch_of(lsn, &vec![3; bytes]);
            while let Err(back) = pool.submit(batch, stamp(), Compression::Zstd(1)) {
                batch = back;
                refused += 1;
                receive(&mut pool, &mut next, &mut chain);
            }
            assert!(pool.queued_bytes <= 300_000, "the queue keeps its bound");
        }
        while pool.in_flight() > 0 {
            receive(&mut pool, &mut next, &mut chain);
        }
        assert_eq!(next, 401);
        assert!(refused > 0, "the bound was met");
        assert!(pool.recv().is_none() && pool.try_recv().is_none());
        assert_eq!(pool.queued_bytes, 0);
        assert!(pool.batches.len() <= MAX_SPARE && pool.batch().raw().is_empty());
    }

    fn receive(pool: &mut EncodePool, next: &mut u64, chain: &mut u64) {
        let (frame, chain_out) = pool.recv().unwrap().unwrap().seal(*chain);
        let header = FrameHeader::parse(&frame).unwrap();
        assert_eq!((header.first_lsn, header.chain_in), (Lsn(*next), *chain));
        *next += 1;
        *chain = chain_out;
        pool.recycle(frame);
    }

    #[test]
    fn frames_come_back_in_order_with_threads_and_without() {
        for threads in [0, 1, 3] {
            run(threads);
        }
    }

    #[test]
    fn an_encoder_that_panics_is_an_error_and_holds_up_nothing() {
        let mut pool = EncodePool::new("encode", 2, 300_000).unwrap();
        for _ in 0..3 {
            pool.submit(Batch::default(), stamp(), Compression::Off)
                .expect("an empty batch breaks the contract");
            let error = pool.recv().unwrap().err().unwrap();
            assert!(error.to_string().contains("panicked"), "{error}");
        }
        pool.submit(batch_of(1, &[1; 4096]), stamp(), Compression::Off).unwrap();
        pool.recv().unwrap().unwrap();
    }

    #[test]
    fn one_batch_larger_than_the_queue_still_goes_through() {
        let mut pool = EncodePool::new("encode", 1, 10).unwrap();
        pool.submit(batch_of(1, &[1; 4096]), stamp(), Compression::Off).unwrap();
        assert!(pool.submit(batch_of(2, &[1; 4096]), stamp(), Compression::Off).is_err());
        pool.recv().unwrap().unwrap();
    }
}
