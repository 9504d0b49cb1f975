//! `replicate` and `receive`: a room's handle, a control socket beside it, systemd told, signals heard.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use sd_notify::NotifyState;

use crate::args::DaemonArgs;
use crate::backend::{Receiver, Source};
use crate::control::{Backend, Server};
use crate::modes;
use crate::output::{self, Screen};
use crate::signals::Signals;
use crate::status;

/// How often systemd hears how it goes.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// Looks after a stop whether requests have let go, for 2 s in all.
const LET_GO: Duration = Duration::from_millis(10);
const LET_GO_ROUNDS: u32 = 200;
/// How long a stop waits for a start that is under way; longer than starts take on disks that answer.
pub const START_PATIENCE: Duration = Duration::from_secs(10);

/// `afterimage replicate`.
pub async fn replicate(args: DaemonArgs) -> Result<()> {
    output::start_logging(args.log_format, Screen::plain())?;
    let settings = conf::load_replicator(&args.config)?.settings;
    modes::tighten(&settings.dir);
    let control = settings.control.clone();
    let mut signals = Signals::new()?;
    let start = async { Ok(replicator::Replicator::start(settings).await?) };
    let handle = Arc::new(signals.or_give_up(START_PATIENCE, start).await?);
    let backend = Arc::new(Source(handle.clone()));
    let failed = async { handle.failed().await.into() };
    let ended = run(&control, backend, &mut signals, handle.until_served(), failed).await;
    let stopped = signals.or_at_once(stop(handle, |handle| handle.shutdown())).await;
    ended.and(stopped)
}

/// `afterimage receive`.
pub async fn receive(args: DaemonArgs) -> Result<()> {
    output::start_logging(args.log_format, Screen::plain())?;
    let settings = conf::load_receiver(&args.config)?.settings;
    modes::tighten(&settings.dir);
    let control = settings.control.clone();
    let mut signals = Signals::new()?;
    let start = async { Ok(receiver::agent::Receiver::start(settings).await?) };
    let handle = Arc::new(signals.or_give_up(START_PATIENCE, start).await?);
    tracing::info!(listen = %handle.local_addr(), "receiving");
    let backend = Arc::new(Receiver(handle.clone()));
    let failed = async { handle.failed().await.into() };
    let ended = run(&control, backend, &mut signals, std::future::ready(()), failed).await;
    let stopped = signals.or_at_once(stop(handle, |handle| handle.shutdown())).await;
    ended.and(stopped)
}

/// Serves until a signal (`Ok`) or until the handle fails (its reason). systemd hears `READY=1` when the
/// control socket is open and `ready` says that clients are served as well.
async fn run(
    control: &Path,
    backend: Arc<dyn Backend>,
    signals: &mut Signals,
    ready: impl Future<Output = ()>,
    failed: impl Future<Output = anyhow::Error>,
) -> Result<()> {
    let server = Server::start(control, backend.clone()).await?;
    let told = async {
        ready.await;
        notify(&[NotifyState::Ready]);
        tracing::info!(control = %control.display(), "ready");
        loop {
            notify(&[NotifyState::Status(&status::summary(&backend.status()))]);
            tokio::time::sleep(STATUS_INTERVAL).await;
        }
    };
    let ended = tokio::select! {
        name = signals.stop() => {
            tracing::info!(signal = name, "stopping; another signal, a second from now or later, stops at once");
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

/// What nobody else holds any more. The control socket has been stopped; its last requests are just letting
/// go.
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
