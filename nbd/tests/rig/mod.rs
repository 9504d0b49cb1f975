//! What the tests share: a served image in a temporary directory, real clients, and a raw client.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nbd::proto::{self, command, option};
use nbd::{Access, Export, FileExport, Listen, Server, Settings};
use tempfile::TempDir;

/// A server on a Unix socket, and its directory.
pub struct Rig {
    pub dir: TempDir,
    pub server: Server,
}

impl Rig {
    /// Serves a sparse image as `disk`.
    pub fn with_image(size_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        std::fs::File::create(&image).unwrap().set_len(size_bytes).unwrap();
        let export = FileExport::open("disk", &image, Access::ReadWrite).unwrap();
        Self::start(dir, vec![Arc::new(export)], Settings::default())
    }

    pub fn with_export(export: Arc<dyn Export>, settings: Settings) -> Self {
        Self::start(tempfile::tempdir().unwrap(), vec![export], settings)
    }

    pub fn start(dir: TempDir, exports: Vec<Arc<dyn Export>>, settings: Settings) -> Self {
        let listen = Listen::Unix { path: dir.path().join("s"), mode: 0o600 };
        let server = Server::start(&[listen], exports, settings).unwrap();
        Self { dir, server }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("s").display())
    }

    pub fn image(&self) -> Vec<u8> {
        std::fs::read(self.path("disk.img")).unwrap()
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("s")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Runs a client in the rig's directory; its standard output, if it succeeds.
    pub fn try_run(&self, program: &str, arguments: &[&str]) -> Result<String, String> {
        // The distribution's programs first: its python has libnbd, another one before it in PATH has not.
        let path = format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default());
        let output =
            Command::new(program).args(arguments).current_dir(self.dir.path()).env("PATH", path).output();
        let output = output.unwrap_or_else(|error| match error.kind() {
            ErrorKind::NotFound => panic!("{program} is missing: install {}", package_of(program)),
            _ => panic!("run {program}: {error}"),
        });
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let all = format!(
            "{program} {arguments:?}: {}\n{out}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        if output.status.success() { Ok(out) } else { Err(all) }
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        self.try_run(program, arguments).unwrap_or_else(|failure| panic!("{failure}"))
    }
}

fn package_of(program: &str) -> &'static str {
    match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "nbdsh" => "python3-libnbd",
        "qemu-io" | "qemu-img" => "qemu-utils",
        "fio" => "fio",
        _ => "its package",
    }
}

/// Bytes of a request header.
pub fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = proto::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// Bytes of a WRITE.
pub fn write(cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [&request(command::WRITE, 0, cookie, offset, length)[..], payload].concat()
}

/// The client's side of the shortest handshake: the default export, simple replies.
pub fn hello() -> Vec<u8> {
    let words = [option::EXPORT_NAME, 0].map(u32::to_be_bytes);
    [&3u32.to_be_bytes()[..], &proto::OPTION_MAGIC.to_be_bytes(), words.as_flattened()].concat()
}

/// Handshakes; the stream is in the transmission phase then.
pub fn enter(mut stream: UnixStream) -> UnixStream {
    stream.write_all(&hello()).unwrap();
    stream.read_exact(&mut [0; 18 + 10]).unwrap();
    stream
}

/// Reads one simple reply: `(cookie, error)`.
pub fn reply(stream: &mut UnixStream) -> (u64, u32) {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..4], proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
    let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
    (u64::from_be_bytes(bytes[8..].try_into().unwrap()), error)
}

/// Whether the server has closed the stream, whatever it sent before.
pub fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
