//! Threads that belong to the world of whoever starts them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::world::{self, World};

/// The handle of a thread that [`spawn`] started.
#[derive(Debug)]
pub struct JoinHandle<T> {
    handle: thread::JoinHandle<T>,
    /// Set last by a thread of a world.
    ended: Arc<AtomicBool>,
}

/// Starts a named thread.
///
/// # Errors
/// The operating system's.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let name = name.into();
    let ended = Arc::new(AtomicBool::new(false));
    let Some(world) = world::current() else {
        let handle = thread::Builder::new().name(name).spawn(work)?;
        return Ok(JoinHandle { handle, ended });
    };
    let number = world.admit(&name);
    let end = End { world: world.clone(), number, ended: ended.clone() };
    let run = move || {
        world::enter(Some(world.clone()));
        let _end = end;
        world.begin(number);
        work()
    };
    let handle = thread::Builder::new().name(name).spawn(run)?;
    Ok(JoinHandle { handle, ended })
}

/// Tells the world that a thread is over, however it ends.
struct End {
    world: Arc<dyn World>,
    number: u64,
    ended: Arc<AtomicBool>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.world.wake(Arc::as_ptr(&self.ended).addr());
        self.world.end(self.number);
        world::enter(None);
    }
}

impl<T> JoinHandle<T> {
    /// Waits for the thread's end.
    ///
    /// # Errors
    /// What it panicked with.
    pub fn join(self) -> thread::Result<T> {
        if let Some(world) = world::current() {
            while !self.ended.load(Ordering::Acquire) && !thread::panicking() {
                world.wait(Arc::as_ptr(&self.ended).addr(), None);
            }
        }
        self.handle.join()
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.ended.load(Ordering::Acquire) || self.handle.is_finished()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_of_no_world_is_a_thread() {
        let handle = spawn("plain", || (thread::current().name().map(str::to_owned), 7)).unwrap();
        assert_eq!(handle.join().unwrap(), (Some("plain".to_owned()), 7));
        assert!(spawn("panics", || panic!("on purpose")).unwrap().join().is_err());
    }
}
