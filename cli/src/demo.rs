//! `demo`: the whole story on real data, told while it happens, and proven by hash.
//!
//! It types the commands that anybody could type (it runs this very binary), and plays the application itself
//! through NBD. It needs no mount, no module and no root, only e2fsprogs. It ends with 0 only when the
//! restored disk is, byte for byte, what the disk was at the bookmark, and every file in it is what it was.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::args::DemoArgs;
use crate::demo_disk as disk;
use crate::exit::Fault;
use crate::nbd_client::NbdClient;
use crate::output::size;

const DISK_BYTES: u64 = 256 << 20;
/// `up` serves at once; a machine that takes longer than this has another problem.
const UP_TIMEOUT: Duration = Duration::from_secs(60);

/// `afterimage demo`.
pub fn run(args: &DemoArgs) -> Result<()> {
    let temporary;
    let dir = match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
            let empty = std::fs::read_dir(dir)?.next().is_none();
            ensure!(
                empty,
                Fault::usage(format!(
                    "{} is not empty: the demo needs a directory of its own",
                    dir.display()
                ))
            );
            std::path::absolute(dir)?
        }
        None => {
            temporary =
                tempfile::Builder::new().prefix("afterimage-demo-").tempdir().context("make a directory")?;
            temporary.path().to_owned()
        }
    };
    let story =
        Story { begun: Instant::now(), exe: std::env::current_exe().context("find this program")?, dir };
    story.tell()
}

struct Story {
    begun: Instant,
    exe: PathBuf,
    dir: PathBuf,
}

impl Story {
    fn tell(&self) -> Result<()> {
        let (tree, image, restored) =
            (self.dir.join("tree"), self.dir.join("tree.ext4"), self.dir.join("restored.img"));
        let home = self.dir.join("protected");
        let home_text = home.to_str().context("the demo's directory is not UTF-8")?;

        say("Real data: files of /usr/share become an ext4 file system.")?;
        let files = disk::collect(&tree)?;
        typed(&["mke2fs", "-t", "ext4", "-d", &tree.to_string_lossy(), &image.to_string_lossy(), "256M"])?;
        disk::make_file_system(&tree, &image, DISK_BYTES)?;
        note(&format!("{} files, {}", files.len(), size(files.iter().map(|file| file.bytes).sum())))?;

        say("A protected disk: one command starts capture, journal, receiver and replica.")?;
        let up = ["up", "--dir", home_text, "--size", "256MiB"];
        let mut daemon = self.start(&up)?;
        let uri = daemon.uri()?;
        note(&format!("served at {uri}"))?;

        say("An application writes the file system to the disk, as any NBD client would.")?;
        typed(&["nbdcopy", &image.to_string_lossy(), &format!("'{uri}'")])?;
        let (socket, export) = split_uri(&uri)?;
        let mut volume = NbdClient::connect(&socket, &export)?;
        let written = disk::write_image(&image, &mut volume)?;
        note(&format!("{} written", size(written)))?;

        say("All is well, so this moment gets a name.")?;
        let lsn = self.afterimage(&["bookmark", "default", "before", "--dir", home_text])?;
        let before = disk::hash_volume(&mut volume)?;
        note(&format!("lsn {lsn}, SHA-256 of the disk {before}"))?;

        say("Ransom: every file's content is overwritten with random bytes.")?;
        let destroyed = disk::ransom(&image, &files, &mut volume)?;
        let after = disk::hash_volume(&mut volume)?;
        note(&format!("{} overwritten, SHA-256 of the disk {after}", size(destroyed)))?;
        ensure!(after != before, "the ransom changed nothing");

        say("The replica follows faithfully, into ruin too: a mirror alone saves nobody.")?;
        self.afterimage(&["wait", "--dir", home_text])?;
        let status = self.ask(&["status", "--json", "--dir", home_text])?;
        let replica = replica_of(&status)?;
        ensure!(
            disk::hash_file(&replica)? == after,
            "the replica {} is not what the disk is",
            replica.display()
        );
        note(&format!("{} has the same SHA-256", replica.display()))?;

        say("Back to the moment before, while replication goes on.")?;
        let to = restored.to_string_lossy().into_owned();
        self.afterimage(&["restore", "default", "--at", "bookmark:before", "--to", &to, "--dir", home_text])?;
        let back = disk::hash_file(&restored)?;
        note(&format!("SHA-256 of the restored disk {back}"))?;
        ensure!(back == before, "the restored disk is not what the disk was at the bookmark");

        say("And the files themselves.")?;
        typed(&["e2fsck", "-fn", &to])?;
        let good = disk::check_files(&restored, &files, &self.dir.join("files"))?;
        note(&format!("the file system is clean, and {good} of {} files are what they were", files.len()))?;
        ensure!(good == files.len(), "not every file came back");

        drop(volume);
        daemon.stop()?;
        say(&format!(
            "Proven, in {:.1} s: the disk came back to the byte.",
            self.begun.elapsed().as_secs_f64()
        ))
    }

    /// Runs a command of ours to its end and returns its output.
    fn afterimage(&self, args: &[&str]) -> Result<String> {
        typed(&[&["afterimage"], args].concat())?;
        self.quietly(args)
    }

    fn ask(&self, args: &[&str]) -> Result<Value> {
        serde_json::from_str(&self.quietly(args)?).context("read JSON")
    }

    fn quietly(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(&self.exe)
            .args(args)
            .env_remove("AFTERIMAGE_CONTROL")
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(output.status.success(), "`afterimage {}` ended with {}", args.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn start(&self, args: &[&str]) -> Result<Daemon> {
        typed(&[&["afterimage"], args].concat())?;
        // Its log goes beside it: the narration is for people.
        let log = self.dir.join("up.log");
        let stderr = std::fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut child = Command::new(&self.exe).args(args).stdout(Stdio::piped()).stderr(stderr).spawn()?;
        let stdout = child.stdout.take().context("read from up")?;
        Ok(Daemon { child, stdout: Some(stdout), log })
    }
}

/// `up`, stopped whatever happens to the story.
struct Daemon {
    child: Child,
    stdout: Option<ChildStdout>,
    log: PathBuf,
}

impl Daemon {
    /// The first volume's URI, as soon as it is served.
    fn uri(&mut self) -> Result<String> {
        let stdout = self.stdout.take().context("read from up")?;
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new().name("demo-up".into()).spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Only the first is waited for; the rest is read so that `up` never writes into a closed
                // pipe.
                let _ = sender.try_send(line);
            }
        })?;
        receiver.recv_timeout(UP_TIMEOUT).map_err(|_| {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            anyhow::anyhow!("`up` served nothing; its log:\n{log}")
        })
    }

    /// A graceful stop.
    fn stop(mut self) -> Result<()> {
        self.signal(rustix::process::Signal::TERM);
        let status = self.child.wait()?;
        ensure!(
            status.success(),
            "`up` ended with {status}; its log:\n{}",
            std::fs::read_to_string(&self.log)?
        );
        Ok(())
    }

    fn signal(&mut self, signal: rustix::process::Signal) {
        // A child that was waited for has given its number back: it must not be signalled again.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal(rustix::process::Signal::KILL);
        let _ = self.child.wait();
    }
}

/// `nbd+unix:///NAME?socket=PATH`
fn split_uri(uri: &str) -> Result<(PathBuf, String)> {
    match uri.strip_prefix("nbd+unix:///").and_then(|rest| rest.split_once("?socket=")) {
        Some((name, socket)) => Ok((socket.into(), name.into())),
        None => bail!("{uri} is not a URI of `up`"),
    }
}

fn replica_of(status: &Value) -> Result<PathBuf> {
    let path = status["groups"][0]["volumes"][0]["replica"].as_str();
    path.map(PathBuf::from).context("status does not name the replica")
}

fn say(text: &str) -> Result<()> {
    print(&format!("\n{text}"))
}

fn typed(command: &[&str]) -> Result<()> {
    print(&format!("  $ {}", command.join(" ")))
}

fn note(text: &str) -> Result<()> {
    print(&format!("  {text}"))
}

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush())?;
    Ok(())
}

/// Where a tool is, in `PATH` or where administrators' tools are kept.
pub fn tool(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].iter().map(PathBuf::from));
    let found = places.map(|place| place.join(name)).find(|path| Path::is_file(path));
    found.with_context(|| format!("{name} is missing: install the package e2fsprogs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_socket_and_export() {
        let (socket, export) = split_uri("nbd+unix:///disk0?socket=/d/disk0.sock").unwrap();
        assert_eq!((socket, export.as_str()), (PathBuf::from("/d/disk0.sock"), "disk0"));
        assert!(split_uri("nbd://host/disk0").is_err());
    }
}
