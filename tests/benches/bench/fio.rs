//! fio's nbd engine, and the peers that it is pointed at.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// What one fio run did.
#[derive(Clone, Copy, Debug)]
pub struct Fio {
    /// Writes a second.
    pub iops: f64,
    /// Bytes written.
    pub bytes: u64,
}

/// How much a run writes.
#[derive(Clone, Copy)]
pub enum Amount {
    /// For this many seconds.
    Seconds(u32),
    /// This many MiB.
    Mib(u32),
}

/// Random writes of `block` at `depth`, half compressible.
pub fn random_writes(uri: &str, size_bytes: u64, block: &str, depth: u32, amount: Amount) -> Result<Fio> {
    let mut command = Command::new("fio");
    command.args(["--name=w", "--ioengine=nbd", "--rw=randwrite", "--output-format=json", "--randrepeat=1"]);
    command.args(["--buffer_compress_percentage=50", "--refill_buffers=1", "--norandommap=1"]);
    command.args([format!("--uri={uri}"), format!("--bs={block}"), format!("--iodepth={depth}")]);
    command.arg(format!("--size={size_bytes}"));
    match amount {
        Amount::Seconds(seconds) => {
            command.args(["--time_based=1".to_owned(), format!("--runtime={seconds}")])
        }
        Amount::Mib(mib) => command.arg(format!("--io_size={mib}m")),
    };
    let out = command.output().context("start fio (install the Debian package fio)")?;
    if !out.status.success() {
        bail!("fio: {}", String::from_utf8_lossy(&out.stderr));
    }
    // fio may print a line or two before the JSON.
    let text = String::from_utf8_lossy(&out.stdout);
    let json: Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..]).context("fio's JSON")?;
    let write = &json["jobs"][0]["write"];
    Ok(Fio { iops: write["iops"].as_f64().unwrap_or(0.0), bytes: write["io_bytes"].as_u64().unwrap_or(0) })
}

/// A running `qemu-storage-daemon` that exports a file over NBD.
pub struct Qsd {
    child: Child,
    socket: PathBuf,
}

impl Qsd {
    /// Exports `file`; with a mirror target, a running `blockdev-mirror` to that NBD socket.
    pub fn start(dir: &Path, name: &str, file: &Path, mirror: Option<&Path>) -> Result<Qsd> {
        let socket = dir.join(format!("{name}.sock"));
        let control = dir.join(format!("{name}.qmp"));
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &format!("driver=file,filename={},node-name=disk", file.display())]);
        command.args([
            "--nbd-server",
            &format!("addr.type=unix,addr.path={},max-connections=0", socket.display()),
        ]);
        command.args(["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]);
        if mirror.is_some() {
            command
                .args(["--chardev", &format!("socket,id=q,path={},server=on,wait=off", control.display())]);
            command.args(["--monitor", "chardev=q"]);
        }
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .context("start qemu-storage-daemon (install the Debian package qemu-utils)")?;
        let qsd = Qsd { child, socket };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !qsd.socket.exists() {
            anyhow::ensure!(Instant::now() < deadline, "qemu-storage-daemon did not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(target) = mirror {
            mirror_to(&control, target)?;
        }
        Ok(qsd)
    }

    /// The URI for fio.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a mirror job over QMP and waits until it is ready (running beside the clients).
fn mirror_to(control: &Path, target: &Path) -> Result<()> {
    use std::io::{BufRead as _, BufReader, Write as _};
    let deadline = Instant::now() + Duration::from_secs(30);
    let stream = loop {
        match std::os::unix::net::UnixStream::connect(control) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => return Err(error).context("connect to QMP"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut writer = stream.try_clone()?;
    let mut lines = BufReader::new(stream).lines();
    let mut say = |command: String, until: &str| -> Result<()> {
        writer.write_all(command.as_bytes())?;
        for line in lines.by_ref() {
            let line = line?;
            if line.contains("\"error\"") {
                bail!("QMP: {line}");
            }
            if line.contains(until) {
                return Ok(());
            }
        }
        bail!("QMP closed")
    };
    say("{\"execute\":\"qmp_capabilities\"}\n".into(), "\"return\"")?;
    let path = target.display();
    say(
        format!(
            "{{\"execute\":\"blockdev-add\",\"arguments\":{{\"driver\":\"nbd\",\"node-name\":\"t\",\"export\":\"disk\",\
             \"server\":{{\"type\":\"unix\",\"path\":\"{path}\"}}}}}}\n"
        ),
        "\"return\"",
    )?;
    say(
        "{\"execute\":\"blockdev-mirror\",\"arguments\":{\"job-id\":\"m\",\"device\":\"disk\",\"target\":\"t\",\"sync\":\"full\"}}\n"
            .into(),
        "BLOCK_JOB_READY",
    )
}
