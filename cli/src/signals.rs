//! The signals of a daemon: SIGTERM and SIGINT stop it, SIGHUP does not.
//!
//! A task of its own hears them, so that each has the time at which it came, however long the daemon took to
//! ask. State: how far the stop has been asked for. Rules: what comes within [`SAME`] of the first stop is
//! that stop (a supervisor signals the process and its group; a terminal the whole job); what comes later
//! means that there is no time for a clean end.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

/// A second signal within this time is the same signal.
const SAME: Duration = Duration::from_secs(1);

/// What the signals ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Nothing,
    /// A clean end.
    Stop(&'static str),
    /// An end at once.
    AtOnce(&'static str),
}

/// The signals heard so far.
pub struct Signals {
    asked: watch::Receiver<Asked>,
}

impl Signals {
    /// From now on the signals are ours. Needs a runtime.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new() -> Result<Signals> {
        let hear = |kind| signal(kind).context("listen for signals");
        let mut terminate = hear(SignalKind::terminate())?;
        let mut interrupt = hear(SignalKind::interrupt())?;
        let mut hangup = hear(SignalKind::hangup())?;
        let (tell, asked) = watch::channel(Asked::Nothing);
        tokio::spawn(async move {
            let mut heard = Heard::default();
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                    _ = hangup.recv() => {
                        tracing::info!(
                            "SIGHUP: nothing to do; settings are read at a start only: restart to apply new ones"
                        );
                        continue;
                    }
                };
                if let Some(asked) = heard.stop(name, Instant::now()) {
                    tell.send_replace(asked);
                }
            }
        });
        Ok(Signals { asked })
    }

    /// Until a stop is asked for; the signal's name.
    pub async fn stop(&mut self) -> &'static str {
        match self.asked.wait_for(|asked| *asked != Asked::Nothing).await.as_deref() {
            Ok(Asked::Stop(name) | Asked::AtOnce(name)) => name,
            // The task of the signals lives as long as the runtime.
            Ok(Asked::Nothing) | Err(_) => std::future::pending().await,
        }
    }

    /// Finishes a graceful stop, unless another signal says that there is no time for it.
    ///
    /// # Errors
    /// That of the stop; or it was cut short.
    pub async fn or_at_once(&mut self, graceful: impl Future<Output = Result<()>>) -> Result<()> {
        let at_once = async {
            match self.asked.wait_for(|asked| matches!(asked, Asked::AtOnce(_))).await.as_deref() {
                Ok(Asked::AtOnce(name)) => *name,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            done = graceful => done,
            name = at_once => anyhow::bail!("{name} again: stopped at once; the next start recovers"),
        }
    }

    /// Starts something that may hang (a disk that does not answer). A stop meanwhile waits `patience` for
    /// the start, so that what has begun ends cleanly, then gives it up.
    ///
    /// # Errors
    /// That of the start; or it was given up.
    pub async fn or_give_up<T>(
        &mut self,
        patience: Duration,
        start: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let given_up = async {
            let name = self.stop().await;
            tracing::info!(signal = name, "stopping as soon as the start is over");
            let at_once = self.asked.wait_for(|asked| matches!(asked, Asked::AtOnce(_)));
            let _ = tokio::time::timeout(patience, at_once).await;
            name
        };
        tokio::select! {
            biased;
            started = start => started,
            name = given_up => anyhow::bail!(
                "{name} while starting, and the start does not come to an end (a disk that hangs?): given up; the next \
                 start recovers"
            ),
        }
    }
}

/// The stops that were heard.
#[derive(Default)]
struct Heard {
    first: Option<Instant>,
}

impl Heard {
    /// What this signal changes.
    fn stop(&mut self, name: &'static str, now: Instant) -> Option<Asked> {
        match self.first {
            None => {
                self.first = Some(now);
                Some(Asked::Stop(name))
            }
            Some(first) if now.duration_since(first) < SAME => {
                tracing::debug!(signal = name, "the same stop once more");
                None
            }
            Some(_) => Some(Asked::AtOnce(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_signal_within_a_second_is_the_same_signal() {
        let (mut heard, begin) = (Heard::default(), Instant::now());
        assert_eq!(heard.stop("SIGTERM", begin), Some(Asked::Stop("SIGTERM")));
        assert_eq!(heard.stop("SIGTERM", begin), None);
        assert_eq!(heard.stop("SIGINT", begin + Duration::from_millis(999)), None);
        assert_eq!(heard.stop("SIGTERM", begin + SAME), Some(Asked::AtOnce("SIGTERM")));
    }
}
