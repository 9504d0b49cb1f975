//! A source and a receiver as processes of their own, for measuring.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use wire::Identity;

/// A pair that is killed when it is dropped.
pub struct Pair {
    dir: PathBuf,
    binary: PathBuf,
    /// The receiving daemon.
    pub receiver: Child,
    /// The source daemon.
    pub source: Child,
}

/// What differs from the defaults.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// More lines for the receiver's file.
    pub receiver: &'a str,
    /// More lines for the source's file.
    pub source: &'a str,
}

/// Where the source's rings are.
fn ring_dir() -> String {
    format!("/dev/shm/afterimage-bench-{}", std::process::id())
}

/// Starts one daemon; its log goes on where an earlier one's ends.
fn daemon(binary: &Path, dir: &Path, role: &str, config: &str) -> Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join(format!("{role}.log")))?;
    let mut command = Command::new(binary);
    // A daemon refuses variables of our prefix that it does not know.
    command.env_remove("AFTERIMAGE_BIN").env_remove("AFTERIMAGE_TEST_DIR");
    command.args([role, "--config"]).arg(dir.join(config)).stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("start {} {role}", binary.display()))
}

impl Pair {
    /// Starts both on `dir`, one volume `disk` of `size_bytes`, and waits until it is served.
    pub fn start(binary: &Path, dir: &Path, size_bytes: u64, options: Options<'_>) -> Result<Pair> {
        let (source_dir, receiver_dir) = (dir.join("source"), dir.join("receiver"));
        for dir in [&source_dir, &receiver_dir] {
            fs::create_dir_all(dir)?;
        }
        let source_id = Identity::create(&source_dir.join("identity"))?.fingerprint();
        let receiver_id = Identity::create(&receiver_dir.join("identity"))?.fingerprint();
        let port = std::net::UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
        fs::write(
            dir.join("receiver.toml"),
            format!(
                "dir = {receiver_dir:?}\nlisten = \"127.0.0.1:{port}\"\n{}\n[[source]]\nidentity = \"{source_id}\"\ngroups = [\"bench\"]\n",
                options.receiver
            ),
        )?;
        let ring_dir = ring_dir();
        fs::write(
            dir.join("source.toml"),
            format!(
                "group = \"bench\"\ndir = {source_dir:?}\nring_dir = {ring_dir:?}\n{}\n[receiver]\naddress = \"127.0.0.1:{port}\"\n\
                 identity = \"{receiver_id}\"\n[[volume]]\nname = \"disk\"\npath = {:?}\nsize = \"{size_bytes}\"\n",
                options.source,
                dir.join("disk.img")
            ),
        )?;
        let receiver = daemon(binary, dir, "receive", "receiver.toml")?;
        let source = daemon(binary, dir, "replicate", "source.toml")?;
        let pair = Pair { dir: dir.to_owned(), binary: binary.to_owned(), receiver, source };
        pair.until(Duration::from_secs(60), |group| group["state"] == "replicating")?;
        Ok(pair)
    }

    /// Ends the source as a machine ends: at once, and its ring is gone.
    pub fn lose_source(&mut self) -> Result<()> {
        self.source.kill()?;
        self.source.wait()?;
        fs::remove_dir_all(ring_dir()).context("remove the ring")
    }

    /// Starts it again.
    pub fn start_source(&mut self) -> Result<()> {
        self.source = daemon(&self.binary, &self.dir, "replicate", "source.toml")?;
        Ok(())
    }

    /// What the source has logged.
    pub fn source_log(&self) -> Result<String> {
        fs::read_to_string(self.dir.join("replicate.log")).context("read the source's log")
    }

    /// The NBD socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("source/disk.nbd.sock")
    }

    /// The URI that fio and others take.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    /// One of our commands against the source (`"source"`) or the receiver.
    pub fn command(&self, side: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.env("AFTERIMAGE_CONTROL", self.dir.join(side).join("control.sock"));
        command
    }

    /// The group's status at the source.
    pub fn status(&self) -> Result<Value> {
        let out = self.command("source").args(["status", "--json"]).output()?;
        let status: Value = serde_json::from_slice(&out.stdout)
            .with_context(|| format!("status: {}", String::from_utf8_lossy(&out.stderr)))?;
        Ok(status["groups"][0].clone())
    }

    /// Polls the status until `good`.
    pub fn until(&self, at_most: Duration, good: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + at_most;
        loop {
            let status = self.status();
            if let Ok(group) = &status
                && good(group)
            {
                return Ok(group.clone());
            }
            if Instant::now() > deadline {
                bail!(
                    "not reached within {at_most:?}; last status {status:?}; logs in {}",
                    self.dir.display()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Fails when the group ever left `replicating`: an overflow fails the bench.
    pub fn check_replicating(&self) -> Result<()> {
        let group = self.status()?;
        if group["state"] != "replicating" {
            bail!("the group is {}: {}", group["state"], group["why"]);
        }
        Ok(())
    }

    /// Waits until everything captured is on the replica.
    pub fn wait_applied(&self) -> Result<()> {
        let out = self.command("source").args(["wait", "--timeout", "600s"]).output()?;
        if !out.status.success() {
            bail!("wait: {}", String::from_utf8_lossy(&out.stderr));
        }
        Ok(())
    }

    /// Stops or continues the receiver's process.
    pub fn pause_receiver(&self, pause: bool) -> Result<()> {
        let signal = if pause { "-STOP" } else { "-CONT" };
        let done = Command::new("kill").args([signal, &self.receiver.id().to_string()]).status()?;
        anyhow::ensure!(done.success(), "kill {signal}");
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // A stopped receiver would not die of a signal that it cannot take; SIGKILL works on it.
        for child in [&mut self.source, &mut self.receiver] {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(ring_dir());
    }
}
