//! A small file that is written by a thread of its own: who hands the content over never waits for the disk.
//!
//! Invariant: at most one thread writes. Contents that come meanwhile replace each other; the newest is
//! written last, and in one step (draft and rename).

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use machine::{Condvar, Mutex};

/// See the module.
#[derive(Debug)]
pub(crate) struct Aside {
    path: PathBuf,
    /// What an error costs, in an operator's words.
    cost: &'static str,
    queue: Arc<(Mutex<Queue>, Condvar)>,
}

#[derive(Debug, Default)]
struct Queue {
    next: Option<Vec<u8>>,
    is_writing: bool,
}

fn with<T>((queue, idle): &(Mutex<Queue>, Condvar), change: impl FnOnce(&mut Queue) -> T) -> T {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    let found = change(&mut queue);
    if !queue.is_writing {
        idle.notify_all();
    }
    found
}

impl Aside {
    pub(crate) fn new(path: PathBuf, cost: &'static str) -> Aside {
        Aside { path, cost, queue: Arc::default() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file is to hold this.
    pub(crate) fn put(&self, bytes: Vec<u8>) {
        let is_writing = with(&self.queue, |queue| {
            queue.next = Some(bytes);
            std::mem::replace(&mut queue.is_writing, true)
        });
        if is_writing {
            return;
        }
        let (path, cost, queue) = (self.path.clone(), self.cost, self.queue.clone());
        if let Err(error) = machine::spawn("af-aside", move || write(&path, cost, &queue)) {
            with(&self.queue, |queue| queue.is_writing = false);
            tracing::warn!(%error, path = %self.path.display(), "no thread to write it: {}", self.cost);
        }
    }

    /// Waits until all that was handed over was written, or said to have failed; false where the disk takes
    /// longer.
    pub(crate) fn settle(&self, at_most: Duration) -> bool {
        let begun = machine::now();
        let (queue, idle) = &*self.queue;
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.is_writing {
            let Some(left) = at_most.checked_sub(machine::since(begun)).filter(|left| !left.is_zero()) else {
                return false;
            };
            queue = idle.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Whether all that was handed over was written, or said to have failed.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        with(&self.queue, |queue| !queue.is_writing)
    }
}

fn write(path: &Path, cost: &str, queue: &(Mutex<Queue>, Condvar)) {
    let draft = path.with_extension("new");
    let next = || {
        with(queue, |queue| {
            let next = queue.next.take();
            queue.is_writing = next.is_some();
            next
        })
    };
    while let Some(bytes) = next() {
        if let Err(error) = std::fs::write(&draft, bytes).and_then(|()| std::fs::rename(&draft, path)) {
            tracing::warn!(%error, path = %path.display(), "it cannot be written: {cost}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read as _;

    use super::*;

    fn until(holds: impl Fn() -> bool) {
        let since = std::time::Instant::now();
        while !holds() {
            assert!(since.elapsed().as_secs() < 30, "it has not come");
            std::thread::yield_now();
        }
    }

    /// A draft that is a pipe without a reader takes as long to open as a disk that hangs.
    #[test]
    fn a_disk_that_hangs_holds_up_none_but_its_thread() {
        let dir = tempfile::tempdir().unwrap();
        let (path, draft) = (dir.path().join("kept"), dir.path().join("kept.new"));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &draft,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let aside = Aside::new(path.clone(), "a test");
        aside.put(b"first".to_vec());
        until(|| with(&aside.queue, |queue| queue.next.is_none()));
        aside.put(b"second".to_vec());
        aside.put(b"third".to_vec());
        assert!(!aside.settle(Duration::from_millis(1)) && !path.exists(), "it hangs");
        let mut said = String::new();
        fs::File::open(&draft).unwrap().read_to_string(&mut said).unwrap();
        until(|| aside.is_idle());
        assert_eq!((said.as_str(), fs::read(&path).unwrap().as_slice()), ("first", b"third".as_slice()));
        aside.put(b"fourth".to_vec());
        assert!(aside.settle(Duration::from_secs(30)));
        assert_eq!(fs::read(&path).unwrap(), b"fourth");
    }
}
