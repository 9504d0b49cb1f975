//! `replicate` and `receive`: a room's handle, a control socket beside it, systemd told, signals heard.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::DaemonArgs;
use crate::backend::{Receiver, Source};
use crate::control::{Backend, Server};
use crate::output::{self, Screen};
use crate::status;

/// How often systemd hears how it goes.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// Looks after a stop whether requests have let go, for 2 s in all.
const LET_GO: Duration = Duration::from_millis(10);
const LET_GO_ROUNDS: u32 = 200;

/// `afterimage replicate`.
pub async fn replicate(args: DaemonArgs) -> Result<()> {
    output::start_logging(args.log_format, Screen::plain())?;
    let settings = conf::load_replicator(&args.config)?.settings;
    let control = settings.control.clone();
    let mut signals = Signals::new()?;
    let handle = Arc::new(replicator::Replicator::start(settings).await?);
    let backend = Arc::new(Source(handle.clone()));
    let ended = run(&control, backend, &mut signals, async { handle.failed().await.into() }).await;
    let stopped = signals.or_at_once(stop(handle, |handle| handle.shutdown())).await;
    ended.and(stopped)
}

/// `afterimage receive`.
pub async fn receive(args: DaemonArgs) -> Result<()> {
    output::start_logging(args.log_format, Screen::plain())?;
    let settings = conf::load_receiver(&args.config)?.settings;
    let control = settings.control.clone();
    let mut signals = Signals::new()?;
    let handle = Arc::new(receiver::agent::Receiver::start(settings).await?);
    tracing::info!(listen = %handle.local_addr(), "receiving");
    let backend = Arc::new(Receiver(handle.clone()));
    let ended = run(&control, backend, &mut signals, async { handle.failed().await.into() }).await;
    let stopped = signals.or_at_once(stop(handle, |handle| handle.shutdown())).await;
    ended.and(stopped)
}

/// Serves until a signal (`Ok`) or until the handle fails (its reason).
async fn run(
    control: &Path,
    backend: Arc<dyn Backend>,
    signals: &mut Signals,
    failed: impl Future<Output = anyhow::Error>,
) -> Result<()> {
    let server = Server::start(control, backend.clone()).await?;
    notify(&[NotifyState::Ready]);
    tracing::info!(control = %control.display(), "ready");
    let told = async {
        loop {
            notify(&[NotifyState::Status(&status::summary(&backend.status()))]);
            tokio::time::sleep(STATUS_INTERVAL).await;
        }
    };
    let ended = tokio::select! {
        name = signals.stop() => {
            tracing::info!(signal = name, "stopping; a second signal stops at once");
            Ok(())
        }
        error = failed => Err(error),
        () = told => Ok(()),
    };
    notify(&[NotifyState::Stopping]);
    server.stop().await;
    ended
}

/// Stops a handle that nobody else holds any more.
pub async fn stop<T, E, F>(handle: Arc<T>, shutdown: impl FnOnce(T) -> F) -> Result<()>
where
    F: Future<Output = std::result::Result<(), E>>,
    E: Into<anyhow::Error>,
{
    shutdown(alone(handle).await?).await.map_err(Into::into)
}

/// What nobody else holds any more. The control socket has been stopped; its last requests are just letting go.
pub async fn alone<T>(mut shared: Arc<T>) -> Result<T> {
    for _ in 0..LET_GO_ROUNDS {
        match Arc::try_unwrap(shared) {
            Ok(inner) => return Ok(inner),
            Err(held) => shared = held,
        }
        tokio::time::sleep(LET_GO).await;
    }
    anyhow::bail!("stopped at once, since a request is still being answered; the next start recovers")
}

/// Tells systemd, where there is one.
pub fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(false, state) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// SIGTERM and SIGINT.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From now on the signals are ours.
    pub fn new() -> Result<Signals> {
        let hear = |kind| signal(kind).context("listen for signals");
        Ok(Signals { terminate: hear(SignalKind::terminate())?, interrupt: hear(SignalKind::interrupt())? })
    }

    /// The next one.
    pub async fn stop(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Finishes a graceful stop, unless another signal says that there is no time for it.
    pub async fn or_at_once(&mut self, graceful: impl Future<Output = Result<()>>) -> Result<()> {
        tokio::select! {
            done = graceful => done,
            name = self.stop() => anyhow::bail!("{name} again: stopped at once; the next start recovers"),
        }
    }
}
