//! The control socket: HTTP/1 with JSON over a Unix socket, mode 0600
//! (`curl --unix-socket DIR/control.sock http://x/v1/status`).
//!
//! ```text
//! GET  /v1/status              {"groups":[…]}
//! GET  /v1/points/{group}      the recoverable window
//! GET  /v1/version             {"version":"0.1.0"}
//! POST /v1/wait                {"timeout_ms":N}             → {"lsn":N}
//! POST /v1/bookmark            {"group":G,"name":N}         → {"lsn":N}
//! POST /v1/attach              {"device":D}                 → {"volume":V}
//! POST /v1/detach              {"device":D}                 → {"volume":V,"lsn":N,"consistent":B}
//! POST /v1/admit               {"group":G}                   → {"group"}, when the next copy of its source will be taken
//! POST /v1/scrub               {"group":G}                   → {"group"}, when it has begun
//! POST /v1/rewind              {"group":G,"at":P}           → RewindReport, when the replica stands there
//! POST /v1/resume              {"group":G}                  → ResumeReport, when it has begun
//! POST /v1/resync              {"group":G,"overwrite":true} → OverwriteReport, when it has begun
//! POST /v1/hold                {"group":G,"name":N,"release":B} → HoldReport
//! POST /v1/verify              {"group":G,"repair":B,"rate_bits_per_s":N} → VerifyReport, when it has begun
//! GET  /v1/verify/{group}      VerifyReport of the verification that runs, or of the last one
//! POST /v1/verify/stop         {"group":G}                  → VerifyReport
//! POST /v1/restore             RestoreOrder                 → JSON lines: {"progress":{…}}*, then {"result":…} or {"error":…}
//! POST /v1/restore/cancel      {"to":TARGET}                 → {"to","ended":N}, when they have ended
//! any error                    {"error":{"kind":K,"message":M}}
//! ```
//! A restore ends with the connection that asked for it. Owns: the socket file while it serves. What a
//! request does is the [`Backend`]'s: this file only carries. Invariants: a socket on which somebody listens
//! is never taken away; nobody but the owner's user can connect, at no moment (the socket appears under its
//! name only after its mode is set).

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as UrlPath, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::exit::{Fault, Kind};
use crate::status::Status;

mod lines;

/// The longest path that fits a Unix socket address (108 bytes with the final zero).
const SOCKET_PATH_BYTES: usize = 107;
/// Progress lines that wait for a slow reader; more are left out, the next one says more anyway.
const PROGRESS_LINES: usize = 16;
/// How long a stop waits for clients that do not read their answers.
const STOP: Duration = Duration::from_secs(2);

/// What a daemon answers later.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Fault>> + Send + 'a>>;

/// What a daemon can do for those who ask.
pub trait Backend: Send + Sync + 'static {
    /// All groups.
    fn status(&self) -> Status;
    /// Until everything captured so far is on the replica; its lsn.
    fn wait(&self, timeout: Duration) -> Answer<'_, u64>;
    /// The recoverable window of a group.
    fn points(&self, group: String) -> Answer<'_, Value>;
    /// Names the present moment; its lsn.
    fn bookmark(&self, group: String, name: String) -> Answer<'_, u64>;
    /// Captures a device again; its volume's name.
    fn attach(&self, device: PathBuf) -> Answer<'_, String>;
    /// Ends the capture of a device; its volume's name, the newest lsn, and whether its replica is consistent
    /// there.
    fn detach(&self, device: PathBuf) -> Answer<'_, Value>;
    /// Brings the replica of a group to a point.
    fn rewind(&self, group: String, at: String) -> Answer<'_, Value>;
    /// Lets it roll forward again.
    fn resume(&self, group: String) -> Answer<'_, Value>;
    /// Overwrites replicas of a group that others changed, by a new synchronisation.
    fn resync(&self, _group: String) -> Answer<'_, Value> {
        Box::pin(async {
            Err(Fault::not_possible(
                "whether a replica is overwritten is decided at the receiver: ask the receiver's control socket",
            ))
        })
    }
    /// Puts a bookmark under hold, or releases it.
    fn hold(&self, group: String, name: String, release: bool) -> Answer<'_, Value>;
    /// Takes whichever copy of a group's source comes next.
    fn admit(&self, _group: String) -> Answer<'_, Value> {
        Box::pin(async {
            Err(Fault::not_possible(
                "sources are admitted at the receiver: ask the receiver's control socket",
            ))
        })
    }
    /// Begins to check the stored segments of a group.
    fn scrub(&self, _group: String) -> Answer<'_, Value> {
        Box::pin(async {
            Err(Fault::not_possible(
                "segments are checked at the receiver: ask the receiver's control socket",
            ))
        })
    }
    /// Begins to compare the replica of a group with its disks.
    fn verify(&self, _group: String, _order: replicator::verify::Order) -> Answer<'_, Value> {
        Box::pin(async { Err(compares_elsewhere()) })
    }
    /// How far that is; `stop` ends it.
    fn verification(&self, _group: String, _stop: bool) -> Answer<'_, Value> {
        Box::pin(async { Err(compares_elsewhere()) })
    }
    /// Restores; `progress` is told as it goes, and may be full. Ends when the answer is not waited for any
    /// more.
    fn restore(&self, order: RestoreOrder, progress: mpsc::Sender<Progress>) -> Answer<'_, Value>;
    /// Ends the restores to a target.
    fn cancel_restore(&self, _to: PathBuf) -> Answer<'_, Value> {
        Box::pin(async {
            Err(Fault::not_possible("restores run at the receiver: ask the receiver's control socket"))
        })
    }
}

fn compares_elsewhere() -> Fault {
    Fault::not_possible(
        "disks are compared with their replicas at the source: ask the source's control socket",
    )
}

/// A restore as it is asked for over the socket. Paths are absolute: the daemon's own directory means nothing
/// here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreOrder {
    /// Name of the group.
    pub group: String,
    /// `latest`, `lsn:N`, `time:RFC3339` or `bookmark:NAME`.
    pub at: String,
    /// Target.
    pub to: PathBuf,
    /// Only this volume.
    #[serde(default)]
    pub volume: Option<String>,
    /// Overwrite.
    #[serde(default)]
    pub force: bool,
    /// Say what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// How far a restore is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes to do.
    pub total_bytes: u64,
}

/// A line of the answer to a restore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// It goes on.
    Progress(Progress),
    /// It is done: the report.
    Result(Value),
    /// It failed.
    Error(Fault),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WaitBody {
    timeout_ms: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BookmarkBody {
    group: String,
    name: String,
}

/// A device, or the name of its volume.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceBody {
    device: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RewindBody {
    group: String,
    at: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResumeBody {
    group: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResyncBody {
    group: String,
    overwrite: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VerifyBody {
    group: String,
    #[serde(default)]
    repair: bool,
    #[serde(default)]
    rate_bits_per_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VerifyStopBody {
    group: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CancelBody {
    to: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HoldBody {
    group: String,
    name: String,
    #[serde(default)]
    release: bool,
}

/// A control socket that is served.
pub struct Server {
    path: PathBuf,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// What every request finds.
#[derive(Clone)]
struct Desk {
    backend: Arc<dyn Backend>,
    stop: watch::Receiver<bool>,
}

impl Server {
    /// Listens on `path` and answers from `backend`.
    ///
    /// # Errors
    /// The path is too long, somebody listens there already, or the directory cannot be written.
    pub async fn start(path: &Path, backend: Arc<dyn Backend>) -> Result<Server> {
        let listener =
            bind(path).await.with_context(|| format!("open the control socket {}", path.display()))?;
        let (stop, stopping) = watch::channel(false);
        let desk = Desk { backend, stop: stopping.clone() };
        let serving = axum::serve(listener, router(desk)).with_graceful_shutdown(stopped(stopping));
        let task = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the control socket ended");
            }
        });
        Ok(Server { path: path.to_owned(), stop, task })
    }

    /// Takes the socket away and ends every request: when this returns, nothing here holds the backend any
    /// more.
    pub async fn stop(self) {
        // First the name, so that nobody new comes.
        let _ = std::fs::remove_file(&self.path);
        let _ = self.stop.send(true);
        if tokio::time::timeout(STOP, self.task).await.is_err() {
            tracing::warn!("a client of the control socket does not take its answer");
        }
    }
}

/// Until the server is told to stop, or is gone.
async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// What a long request answers when it is cut short.
fn stopping() -> Fault {
    Fault::new(Kind::Failed, "the daemon stops")
}

/// Binds under a private name, sets the mode, and only then gives the socket its name.
async fn bind(path: &Path) -> Result<UnixListener> {
    if path.as_os_str().len() > SOCKET_PATH_BYTES {
        anyhow::bail!(Fault::usage(format!(
            "a Unix socket's path has at most {SOCKET_PATH_BYTES} bytes, this one {}: choose a shorter directory",
            path.as_os_str().len()
        )));
    }
    if is_served(path).await {
        anyhow::bail!(Fault::new(
            Kind::Busy,
            "another daemon listens there: stop it first, or choose another directory"
        ));
    }
    let private = path.with_extension("new");
    remove_if_there(&private)?;
    let listener = UnixListener::bind(&private)?;
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&private, path)?;
    Ok(listener)
}

/// Whether somebody answers. A dead daemon leaves its socket file behind, on which the kernel refuses
/// connections.
pub async fn is_served(path: &Path) -> bool {
    tokio::net::UnixStream::connect(path).await.is_ok()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

type Shared = State<Desk>;
type Body<T> = Result<Json<T>, JsonRejection>;

fn router(desk: Desk) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/wait", post(wait))
        .route("/v1/points/{group}", get(points))
        .route("/v1/bookmark", post(bookmark))
        .route("/v1/attach", post(attach))
        .route("/v1/detach", post(detach))
        .route("/v1/admit", post(admit))
        .route("/v1/scrub", post(scrub))
        .route("/v1/rewind", post(rewind))
        .route("/v1/resume", post(resume))
        .route("/v1/resync", post(resync))
        .route("/v1/hold", post(hold))
        .route("/v1/verify", post(verify))
        .route("/v1/verify/stop", post(verify_stop))
        .route("/v1/verify/{group}", get(verification))
        .route("/v1/restore", post(restore))
        .route("/v1/restore/cancel", post(cancel_restore))
        .route("/v1/version", get(version))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .with_state(desk)
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        (self.kind.http_status(), Json(json!({ "error": self }))).into_response()
    }
}

async fn status(State(desk): Shared) -> Json<Status> {
    Json(desk.backend.status())
}

async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn unknown(method: axum::http::Method, url: axum::http::Uri) -> Fault {
    Fault::usage(format!("{method} {url} is not a request of version {}", env!("CARGO_PKG_VERSION")))
}

async fn wait(State(desk): Shared, body: Body<WaitBody>) -> Result<Json<Value>, Fault> {
    let timeout = Duration::from_millis(parsed(body)?.timeout_ms);
    let lsn = tokio::select! {
        lsn = desk.backend.wait(timeout) => lsn?,
        () = stopped(desk.stop.clone()) => return Err(stopping()),
    };
    Ok(Json(json!({ "lsn": lsn })))
}

async fn points(State(desk): Shared, UrlPath(group): UrlPath<String>) -> Result<Json<Value>, Fault> {
    desk.backend.points(group).await.map(Json)
}

async fn bookmark(State(desk): Shared, body: Body<BookmarkBody>) -> Result<Json<Value>, Fault> {
    let BookmarkBody { group, name } = parsed(body)?;
    let order = format!("bookmark {group} {name}");
    Ok(Json(json!({ "lsn": carried(order, desk.backend.bookmark(group, name)).await? })))
}

async fn attach(State(desk): Shared, body: Body<DeviceBody>) -> Result<Json<Value>, Fault> {
    let device = parsed(body)?.device;
    let order = format!("attach {}", device.display());
    Ok(Json(json!({ "volume": carried(order, desk.backend.attach(device)).await? })))
}

async fn detach(State(desk): Shared, body: Body<DeviceBody>) -> Result<Json<Value>, Fault> {
    let device = parsed(body)?.device;
    carried(format!("detach {}", device.display()), desk.backend.detach(device)).await.map(Json)
}

/// What was begun goes on when the client goes away or the daemon stops.
async fn rewind(State(desk): Shared, body: Body<RewindBody>) -> Result<Json<Value>, Fault> {
    let RewindBody { group, at } = parsed(body)?;
    let report = tokio::select! {
        report = carried(format!("rewind {group} --at {at}"), desk.backend.rewind(group, at)) => report?,
        () = stopped(desk.stop.clone()) => return Err(stopping()),
    };
    Ok(Json(report))
}

async fn resume(State(desk): Shared, body: Body<ResumeBody>) -> Result<Json<Value>, Fault> {
    let group = parsed(body)?.group;
    carried(format!("resume {group}"), desk.backend.resume(group)).await.map(Json)
}

async fn resync(State(desk): Shared, body: Body<ResyncBody>) -> Result<Json<Value>, Fault> {
    let ResyncBody { group, overwrite } = parsed(body)?;
    if !overwrite {
        return Err(Fault::usage("a replica that others changed is overwritten only by \"overwrite\": true"));
    }
    desk.backend.resync(group).await.map(Json)
}

async fn admit(State(desk): Shared, body: Body<ResumeBody>) -> Result<Json<Value>, Fault> {
    desk.backend.admit(parsed(body)?.group).await.map(Json)
}

async fn scrub(State(desk): Shared, body: Body<ResumeBody>) -> Result<Json<Value>, Fault> {
    let group = parsed(body)?.group;
    carried(format!("scrub {group}"), desk.backend.scrub(group)).await.map(Json)
}

async fn hold(State(desk): Shared, body: Body<HoldBody>) -> Result<Json<Value>, Fault> {
    let HoldBody { group, name, release } = parsed(body)?;
    let order = format!("{} {group} {name}", if release { "hold --release" } else { "hold" });
    carried(order, desk.backend.hold(group, name, release)).await.map(Json)
}

async fn verify(State(desk): Shared, body: Body<VerifyBody>) -> Result<Json<Value>, Fault> {
    let VerifyBody { group, repair, rate_bits_per_s } = parsed(body)?;
    let order = format!("verify {group}{}", if repair { " --repair" } else { "" });
    let asked = replicator::verify::Order { repair, rate_bits_per_s };
    carried(order, desk.backend.verify(group, asked)).await.map(Json)
}

async fn verify_stop(State(desk): Shared, body: Body<VerifyStopBody>) -> Result<Json<Value>, Fault> {
    let group = parsed(body)?.group;
    carried(format!("verify {group} --stop"), desk.backend.verification(group, true)).await.map(Json)
}

async fn verification(State(desk): Shared, UrlPath(group): UrlPath<String>) -> Result<Json<Value>, Fault> {
    desk.backend.verification(group, false).await.map(Json)
}

/// Streams progress, then the result. What fails before the first progress has a proper HTTP status.
async fn restore(State(desk): Shared, body: Body<RestoreOrder>) -> Result<Response, Fault> {
    let order = parsed(body)?;
    if !order.to.is_absolute() {
        return Err(Fault::usage(format!("to = {}: an absolute path is required", order.to.display())));
    }
    let mut lines = lines::start(desk, order, PROGRESS_LINES);
    let first = match lines.recv().await {
        Some(Line::Error(fault)) => return Err(fault),
        Some(line) => line,
        None => return Err(Fault::new(Kind::Failed, "the daemon stopped")),
    };
    let body = axum::body::Body::new(lines::Lines::new(first, lines));
    Ok(([(header::CONTENT_TYPE, "application/jsonl")], body).into_response())
}

/// Carries out an order of the operator's, with a line in the log for it and one for how it ended.
async fn carried<T>(order: String, doing: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let order = order.escape_debug();
    tracing::info!(%order, "ordered");
    let done = doing.await;
    match &done {
        Ok(_) => tracing::info!(%order, "carried out"),
        Err(fault) => tracing::warn!(%order, why = %fault.message.escape_debug(), "not carried out"),
    }
    done
}

async fn cancel_restore(State(desk): Shared, body: Body<CancelBody>) -> Result<Json<Value>, Fault> {
    let to = parsed(body)?.to;
    carried(format!("end the restore to {}", to.display()), desk.backend.cancel_restore(to)).await.map(Json)
}

fn parsed<T>(body: Body<T>) -> Result<T, Fault> {
    body.map(|Json(body)| body).map_err(|rejection| Fault::usage(rejection.body_text()))
}

#[cfg(test)]
mod tests;
