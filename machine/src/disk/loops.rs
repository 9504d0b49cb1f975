//! What the machine's loop devices stand on. The kernel asks the file system below for it, so a device over
//! one that hangs answers only when that does: it is passed over, and not asked again until then. Such a
//! device stands on another file system than a disk that answers.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::system::{self, LoopTarget};

/// For each device that was not silent before: an answer takes microseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// Devices that were asked and have not answered; each holds one thread.
static SILENT: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The targets of loop devices as far as they answer. `None`: no leave to ask, or nothing behind it.
pub(super) fn targets(devices: Vec<PathBuf>) -> Vec<(PathBuf, Option<LoopTarget>)> {
    targets_by(devices, PATIENCE, |device| {
        File::open(device).ok().and_then(|open| system::loop_target(&open))
    })
}

fn targets_by(
    devices: Vec<PathBuf>,
    patience: Duration,
    ask: impl Fn(&Path) -> Option<LoopTarget> + Send + Sync + 'static,
) -> Vec<(PathBuf, Option<LoopTarget>)> {
    let (ask, mut found) = (Arc::new(ask), Vec::new());
    for device in devices {
        if silent().contains(&device) {
            continue;
        }
        let (answers, answer) = mpsc::sync_channel(1);
        let (ask, asked) = (ask.clone(), device.clone());
        let question = move || {
            let target = ask(&asked);
            // Sent and taken back under the lock: who gives up waiting notes the silence before this, or
            // finds the answer.
            let mut silent = silent();
            let _ = answers.send(target);
            silent.remove(&asked);
        };
        if std::thread::Builder::new().name("loop-target".to_owned()).spawn(question).is_err() {
            continue; // Without a thread it cannot be looked at.
        }
        let told = answer.recv_timeout(patience).or_else(|_| {
            let mut silent = silent();
            answer.try_recv().inspect_err(|_| {
                silent.insert(device.clone());
            })
        });
        found.extend(told.ok().map(|target| (device, target)));
    }
    found
}

fn silent() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    SILENT.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_hangs_is_passed_over_until_it_answers() {
        let names = ["/nowhere/hangs", "/nowhere/answers"].map(PathBuf::from);
        let (release, held) = mpsc::sync_channel::<()>(1);
        let held = Arc::new(Mutex::new(held));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let look = |patience| {
            let (held, asked) = (held.clone(), asked.clone());
            targets_by(names.to_vec(), patience, move |device| {
                asked.lock().unwrap().push(device.to_owned());
                if device.ends_with("hangs") {
                    let _ = held.lock().unwrap().recv();
                }
                None
            })
        };
        let second = vec![(names[1].clone(), None)];
        assert_eq!(look(Duration::from_secs(1)), second);
        assert_eq!(look(Duration::from_secs(30)), second, "asked again, or waited for");
        assert_eq!(asked.lock().unwrap().iter().filter(|device| **device == names[0]).count(), 1);
        drop(release);
        while silent().contains(&names[0]) {
            std::thread::yield_now();
        }
        assert_eq!(look(Duration::from_secs(30)).len(), 2);
    }
}
