//! A daemon's control socket, asked directly and through the command line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::program::{Outcome, afterimage};

/// How often something is looked at that changes by itself.
const LOOK: Duration = Duration::from_millis(20);
/// An answer that takes longer never comes.
const ANSWER: Duration = Duration::from_secs(120);

/// Looks again and again until there is a value, at most `limit`.
///
/// # Errors
/// Those of `look` at once; the limit, with what was waited for.
pub fn poll<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(begun.elapsed() < limit, "waited {limit:?} for {what}");
        thread::sleep(LOOK);
    }
}

/// A group as `status` tells it.
#[derive(Clone, Debug)]
pub struct Group(pub Value);

impl Group {
    /// A number of it: `captured_lsn`, `backlog_bytes`, `epoch`, …; 0 where there is none.
    pub fn number(&self, key: &str) -> u64 {
        self.0[key].as_u64().unwrap_or(0)
    }

    /// Its state.
    pub fn state(&self) -> &str {
        self.0["state"].as_str().unwrap_or("")
    }

    /// Why.
    pub fn why(&self) -> &str {
        self.0["why"].as_str().unwrap_or("")
    }

    /// Whether a source sees its receiver.
    pub fn is_connected(&self) -> bool {
        self.0["connected"] == true
    }

    /// A text of one of its volumes: `nbd_uri`, `replica`, `source`.
    ///
    /// # Errors
    /// There is none.
    pub fn of_volume(&self, volume: &str, key: &str) -> Result<String> {
        let all = self.0["volumes"].as_array().context("volumes")?;
        let found = all.iter().find(|known| known["name"] == volume).and_then(|known| known[key].as_str());
        found.map(str::to_owned).with_context(|| format!("volume {volume} has no {key}: {}", self.0))
    }

    /// Whether every volume has an NBD URI.
    pub fn is_served(&self) -> bool {
        self.0["volumes"].as_array().is_some_and(|all| all.iter().all(|volume| volume["nbd_uri"].is_string()))
    }
}

/// One daemon's control socket.
#[derive(Clone, Debug)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// Of the daemon that listens, or will listen, on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Control {
        Control { socket: socket.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The answer to a request.
    ///
    /// # Errors
    /// Nobody listens, or the answer is an error: it is told.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("connect to {}", self.socket.display()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
        let value: Value =
            serde_json::from_str(body).with_context(|| format!("the answer to {path}: {body}"))?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {value}");
        Ok(value)
    }

    /// The only group.
    ///
    /// # Errors
    /// The daemon does not answer, or has no group yet.
    pub fn group(&self) -> Result<Group> {
        let status = self.ask("GET", "/v1/status", &Value::Null)?;
        match status["groups"].as_array().map(Vec::as_slice) {
            Some([group]) => Ok(Group(group.clone())),
            _ => bail!("one group is expected: {status}"),
        }
    }

    /// The newest lsn given out.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn captured(&self) -> Result<u64> {
        Ok(self.group()?.number("captured_lsn"))
    }

    /// Looks at the group until it is as wanted. A daemon that does not answer yet is waited for.
    ///
    /// # Errors
    /// The limit: what was wanted, and what is.
    pub fn until(&self, what: &str, limit: Duration, wanted: impl Fn(&Group) -> bool) -> Result<Group> {
        let mut last = String::new();
        let look = || {
            let group = self.group();
            last = group.as_ref().map_or_else(|error| format!("{error:#}"), |group| group.0.to_string());
            Ok(group.ok().filter(|group| wanted(group)))
        };
        poll(what, limit, look).with_context(|| format!("the group, last: {last}"))
    }

    /// Runs an `afterimage` command against this daemon.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn command(&self, args: &[&str]) -> Result<Outcome> {
        let socket = self.socket.to_string_lossy();
        afterimage(args.iter().copied().chain(["--control", &socket]))
    }

    /// `afterimage wait`, which must succeed.
    ///
    /// # Errors
    /// It did not.
    pub fn wait(&self) -> Result<()> {
        self.command(&["wait", "--timeout", "180s"])?.expect(0)?;
        Ok(())
    }

    /// `afterimage bookmark`; its lsn.
    ///
    /// # Errors
    /// It failed.
    pub fn bookmark(&self, group: &str, name: &str) -> Result<u64> {
        let done = self.command(&["bookmark", group, name])?.expect(0)?;
        done.stdout.trim().parse().with_context(|| format!("{done}\nexpected an lsn"))
    }

    /// `afterimage points --json`.
    ///
    /// # Errors
    /// It failed.
    pub fn points(&self, group: &str) -> Result<Value> {
        let done = self.command(&["points", group, "--json"])?.expect(0)?;
        serde_json::from_str(&done.stdout).with_context(|| done.to_string())
    }

    /// `afterimage restore`, which must succeed; what was there is overwritten.
    ///
    /// # Errors
    /// It failed.
    pub fn restore(&self, group: &str, at: &str, to: &Path) -> Result<()> {
        let to = to.to_string_lossy();
        self.command(&["restore", group, "--at", at, "--to", &to, "--force"])?.expect(0)?;
        Ok(())
    }

    /// A bookmark by plain HTTP; its lsn.
    ///
    /// # Errors
    /// It failed.
    pub fn post_bookmark(&self, group: &str, name: &str) -> Result<u64> {
        let answer = self.ask("POST", "/v1/bookmark", &json!({ "group": group, "name": name }))?;
        answer["lsn"].as_u64().with_context(|| answer.to_string())
    }
}
