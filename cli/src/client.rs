//! The other end of the control socket: finds the daemon, asks, and turns its errors back into faults.

use std::path::PathBuf;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::args::Target;
use crate::control::{Line, Progress};
use crate::exit::{Fault, Kind};

/// No answer is longer, apart from streams; `points` with tens of thousands of bookmarks still fits.
const ANSWER_BYTES: usize = 64 << 20;
/// No line of a stream is longer.
const LINE_BYTES: usize = 1 << 20;

/// A daemon to ask.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: Fault,
}

impl Client {
    /// By `--control`, `--dir`, or the environment; a flag given is meant before a variable left over.
    pub fn find(target: &Target) -> Result<Client> {
        let given = (target.dir.as_ref().map(|dir| dir.join("control.sock")))
            .or_else(|| target.control.clone())
            .or_else(|| {
                std::env::var_os("AFTERIMAGE_CONTROL").filter(|socket| !socket.is_empty()).map(PathBuf::from)
            });
        let socket = given.ok_or_else(|| {
            Fault::usage(
                "which daemon? Give --dir DIR (the directory of `up`), --control SOCKET, or set AFTERIMAGE_CONTROL",
            )
        })?;
        Ok(Client { socket })
    }

    /// The daemon behind this socket.
    #[cfg(test)]
    pub fn at(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into() }
    }

    /// Asks for something.
    pub async fn get(&self, path: &str) -> Result<Value> {
        answer(self.send(Method::GET, path, None).await?).await
    }

    /// Asks for something to be done.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        answer(self.send(Method::POST, path, Some(body)).await?).await
    }

    /// Asks for something long; `on_progress` hears of it, the result is returned.
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<Value> {
        let response = self.send(Method::POST, path, Some(body)).await?;
        if !response.status().is_success() {
            return answer(response).await;
        }
        let mut body = response.into_body();
        let mut held = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("the daemon ended in the middle of its answer")?;
            held.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
            while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
                match serde_json::from_slice(&held.split_to(end + 1)).context("read the daemon's answer")? {
                    Line::Progress(progress) => on_progress(progress),
                    Line::Result(report) => return Ok(printable(report)),
                    Line::Error(fault) => return Err(fault.into()),
                }
            }
            anyhow::ensure!(
                held.len() <= LINE_BYTES,
                "the daemon's answer has a line of over {LINE_BYTES} bytes"
            );
        }
        anyhow::bail!("the daemon stopped before it was done: its log says why")
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .context("speak to the daemon")?;
        // The connection lives as long as its answer is read; its end is seen there.
        tokio::spawn(connection);
        let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "afterimage")
            .header("content-type", "application/json")
            .body(Full::new(bytes))
            .context("ask the daemon")?;
        sender
            .send_request(request)
            .await
            .with_context(|| format!("ask the daemon at {}", self.socket.display()))
    }

    fn unreachable(&self, error: &std::io::Error) -> Fault {
        let socket = self.socket.display();
        let text = match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => format!(
                "no daemon listens on {socket}: start it with `afterimage up --dir DIR`, `replicate` or `receive`"
            ),
            std::io::ErrorKind::PermissionDenied => {
                format!("{socket}: permission denied; only the user that runs the daemon may use it")
            }
            _ => format!("{socket}: {error}"),
        };
        Fault::new(Kind::Failed, text)
    }
}

/// What a daemon says may hold words of a peer or a file: no text of it says anything to a terminal, here and
/// nowhere else.
fn printable(answer: Value) -> Value {
    match answer {
        Value::String(text) => Value::String(machine::text::one_line(&text).into_owned()),
        Value::Array(items) => Value::Array(items.into_iter().map(printable).collect()),
        Value::Object(fields) => {
            Value::Object(fields.into_iter().map(|(key, value)| (key, printable(value))).collect())
        }
        other => other,
    }
}

async fn answer(response: Response<Incoming>) -> Result<Value> {
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES).collect().await;
    let bytes = body.map_err(|error| anyhow::anyhow!("read the daemon's answer: {error}"))?.to_bytes();
    if status.is_success() {
        return serde_json::from_slice(&bytes).context("read the daemon's answer").map(printable);
    }
    match serde_json::from_slice::<Value>(&bytes).map(printable).and_then(serde_json::from_value::<ErrorBody>)
    {
        Ok(body) => Err(body.error.into()),
        Err(_) => anyhow::bail!("the daemon answered {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_speaks_to_the_terminal() {
        let hostile = serde_json::json!({"groups": [{"why": "\u{1b}[2J\nx\u{202e}", "n": 1, "k": null}]});
        let shown = printable(hostile).to_string();
        assert_eq!(shown, r#"{"groups":[{"k":null,"n":1,"why":"\\u{1b}[2J\\u{a}x\\u{202e}"}]}"#);
    }

    #[test]
    fn dir_means_its_control_socket() {
        let target = Target { control: None, dir: Some("/d".into()) };
        assert_eq!(Client::find(&target).unwrap().socket, PathBuf::from("/d/control.sock"));
    }

    #[tokio::test]
    async fn nobody_there_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = Client::at(dir.path().join("control.sock")).get("/v1/status").await.unwrap_err();
        assert!(error.to_string().contains("no daemon listens on"), "{error}");
    }
}
