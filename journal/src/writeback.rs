//! Starts the writing-back of what was appended, beside the writer.
//!
//! Without it an fdatasync, or the one that seals a segment, waits for all that piled up. Starting it costs
//! processor time and may wait for the device's queue, so a thread of its own does it: the writer never
//! waits. Everything here is a hint: lost ones only make the next fdatasync longer, and a write-back error
//! shows there. Where nothing waits for an fdatasync, the writer leaves write-back to the kernel.

use crate::io::File;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::ops::Range;
use std::sync::Arc;
use std::thread;

/// Smaller stretches are not worth a wake-up.
const STRETCH_BYTES: u64 = 1 << 20;

/// Hints under way; more are dropped.
const MAX_HINTS: usize = 4;

type Hint = (Arc<dyn File>, Range<u64>);

/// The thread, once there is something for it to do, and how far it was told.
#[derive(Default)]
pub(crate) struct Writeback {
    hints: Option<Sender<Hint>>,
    told: u64,
}

impl Writeback {
    /// Everything below `offset` is on disk, or is not worth telling about: a new file, or just synced.
    pub fn restart(&mut self, offset: u64) {
        self.told = offset;
    }

    /// The file has been written up to `offset`.
    pub fn written(&mut self, file: &Arc<dyn File>, offset: u64) {
        if offset < self.told + STRETCH_BYTES || machine::is_simulated() {
            return;
        }
        if self.hints.is_none() {
            let (sender, hints) = bounded(MAX_HINTS);
            let started = thread::Builder::new().name("journal-flush".into()).spawn(move || work(&hints));
            self.hints = started.is_ok().then_some(sender);
        }
        if let Some(hints) = &self.hints {
            let _ = hints.try_send((file.clone(), self.told..offset));
        }
        self.told = offset;
    }
}

/// Ends when the writer goes.
fn work(hints: &Receiver<Hint>) {
    for (file, range) in hints {
        let _ = file.start_writeback(range);
    }
}
