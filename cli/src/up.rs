//! `up`: everything in one process. A receiver on loopback, the replicator with its NBD front, paired by
//! themselves.
//!
//! Order of a start: lock, plan, identities, receiver (its port is then known), replicator, control socket,
//! and only then the plan is remembered. Order of a stop: control socket, replicator (drains into the
//! receiver), receiver.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use receiver::target::Guarded;
use rustix::fs::FlockOperation;
use wire::Identity;

use crate::args::UpArgs;
use crate::backend::Both;
use crate::control::{Backend, Server};
use crate::daemon::{self, START_PATIENCE};
use crate::exit::{Fault, Kind};
use crate::output::{self, Screen};
use crate::signals::Signals;
use crate::status::{self, Status};
use crate::up_plan::{self, Plan};

/// How often the status line moves and newly served volumes are noticed.
const TICK: Duration = Duration::from_millis(200);
/// How often a log that is no terminal hears how it goes.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// `afterimage up`.
pub async fn run(args: UpArgs) -> Result<()> {
    let screen = Screen::live();
    output::start_logging(args.log_format, screen.clone())?;
    let dir = open_dir(&args.dir)?;
    let _lock = lock(&dir)?;
    crate::modes::tighten(&up_plan::source_dir(&dir));
    crate::modes::tighten(&up_plan::receiver_dir(&dir));
    let plan = Plan::resolve(&args, &dir)?;
    let mut signals = Signals::new()?;
    let (backend, plan) = signals.or_give_up(START_PATIENCE, start(plan, &dir)).await?;
    let backend = Arc::new(backend);
    let ended = serve(&backend, plan, &dir, &screen, &mut signals).await;
    screen.end();
    let stopped = signals.or_at_once(async { stop(daemon::alone(backend).await?).await }).await;
    ended.and(stopped)
}

/// The directory, made if it is absent; nobody else may look into it, since it holds disks and keys.
fn open_dir(dir: &Path) -> Result<PathBuf> {
    let open = || -> std::io::Result<PathBuf> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let dir = dir.canonicalize()?;
        tempfile::tempfile_in(&dir)?;
        Ok(dir)
    };
    open().with_context(|| {
        format!("--dir {} cannot be written: choose a directory where this user may write", dir.display())
    })
}

/// Held as long as `up` runs.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("up.lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let dir = dir.display();
        Fault::new(
            Kind::Busy,
            format!("`up` runs on {dir} already: `afterimage status --dir {dir}` shows it"),
        )
    })?;
    Ok(file)
}

fn identity(dir: &Path) -> Result<Identity> {
    let dir = dir.join("identity");
    match Identity::load(&dir) {
        Err(error) if error.kind == wire::ErrorKind::IdentityMissing => Ok(Identity::create(&dir)?),
        loaded => Ok(loaded?),
    }
}

/// Starts both sides and pairs them.
async fn start(mut plan: Plan, dir: &Path) -> Result<(Both, Plan)> {
    let ours = identity(&up_plan::source_dir(dir))?.fingerprint().0;
    let theirs = identity(&up_plan::receiver_dir(dir))?.fingerprint().0;
    let receiver = start_receiver(&plan, dir, ours).await?;
    let address = receiver.local_addr();
    plan.receiver_port = address.port();
    let settings = plan.source(dir, address, theirs)?;
    receiver.guard(&guarded(dir, &settings));
    match replicator::Replicator::start(settings).await {
        Ok(source) => Ok((Both { source: Arc::new(source), receiver: Arc::new(receiver) }, plan)),
        Err(error) => {
            let stopped = receiver.shutdown().await;
            if let Err(error) = stopped {
                tracing::error!(%error, "stop the receiver");
            }
            Err(error.into())
        }
    }
}

/// What no restore of this process may write to, beside what the receiver knows.
fn guarded(dir: &Path, settings: &conf::Replicator) -> Guarded {
    let mut guarded = Guarded::default();
    for own in [dir, &settings.dir, &settings.ring_dir, &settings.identity_dir] {
        guarded.dir(own);
    }
    settings.volume.iter().for_each(|volume| guarded.file(&volume.path));
    guarded
}

/// On the port that it had last, or on any other: only our own replicator asks for it.
async fn start_receiver(plan: &Plan, dir: &Path, source: [u8; 32]) -> Result<receiver::agent::Handle> {
    let listen = |port| plan.receiver(dir, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), source);
    let is_free = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, plan.receiver_port)).is_ok();
    let port = if is_free { plan.receiver_port } else { 0 };
    Ok(receiver::agent::Receiver::start(listen(port)?).await?)
}

/// Serves until a signal or a failure.
async fn serve(
    backend: &Arc<Both>,
    plan: Plan,
    dir: &Path,
    screen: &Screen,
    signals: &mut Signals,
) -> Result<()> {
    let server = Server::start(&up_plan::control_path(dir), backend.clone()).await?;
    let ended = tokio::select! {
        name = signals.stop() => {
            tracing::info!(signal = name, "stopping; another signal, a second from now or later, stops at once");
            Ok(())
        }
        error = backend.source.failed() => Err(error.into()),
        error = backend.receiver.failed() => Err(error.into()),
        ended = tell(backend, plan, dir, screen) => ended,
    };
    daemon::notify(&[sd_notify::NotifyState::Stopping]);
    server.stop().await;
    ended
}

/// Prints URIs as volumes are served, and how it goes.
async fn tell(backend: &Both, plan: Plan, dir: &Path, screen: &Screen) -> Result<()> {
    plan.store(dir)?;
    backend.source.until_served().await;
    daemon::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(control = %up_plan::control_path(dir).display(), "ready");
    let mut printed = BTreeSet::new();
    let mut logged = Instant::now();
    loop {
        let status = backend.status();
        for uri in served(&status) {
            if printed.insert(uri.clone()) {
                // Nobody may be reading; the disk is served all the same.
                if let Err(error) = screen.line(&uri) {
                    tracing::warn!(%error, uri, "print the volume's URI");
                }
            }
        }
        if screen.is_live() {
            screen.show(status::summary(&status));
        } else if logged.elapsed() >= LOG_INTERVAL {
            logged = Instant::now();
            tracing::info!("{}", status::summary(&status));
        }
        tokio::time::sleep(TICK).await;
    }
}

fn served(status: &Status) -> Vec<String> {
    let volumes = status.groups.iter().flat_map(|group| &group.volumes);
    volumes.filter_map(|volume| volume.nbd_uri.clone()).collect()
}

/// The source first: what it still holds goes to the receiver.
async fn stop(both: Both) -> Result<()> {
    let source = daemon::stop(both.source, |handle| handle.shutdown()).await;
    let receiver = daemon::stop(both.receiver, |handle| handle.shutdown()).await;
    source.and(receiver)
}
