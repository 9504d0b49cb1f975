//! A small NBD client, so that `demo` needs no other program to use a volume the way a client would.
//!
//! Fixed newstyle with GO, simple replies, one request at a time: what the protocol asks of every server.
//! Byte maps are in the NBD project's `doc/proto.md`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
/// An option's reply is a few bytes of numbers and a sentence; more is not NBD.
const OPTION_REPLY_BYTES: u32 = 64 << 10;

/// Requests are at most this long; a server need not take more unless it says so.
pub const REQUEST_BYTES: usize = 1 << 20;

/// A volume, connected.
pub struct NbdClient {
    stream: UnixStream,
    size: u64,
    cookie: u64,
}

impl NbdClient {
    /// Connects to `export` on a Unix socket.
    pub fn connect(socket: &Path, export: &str) -> Result<NbdClient> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        let mut client = NbdClient { stream, size: 0, cookie: 0 };
        client.size = client.go(export).with_context(|| format!("open NBD export {export}"))?;
        Ok(client)
    }

    /// Size of the volume.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn go(&mut self, export: &str) -> Result<u64> {
        ensure!(u64::from_be_bytes(self.take()?) == SERVER_MAGIC, "the server does not speak NBD");
        ensure!(u64::from_be_bytes(self.take()?) == OPTION_MAGIC, "the server does not speak newstyle NBD");
        let flags = u16::from_be_bytes(self.take()?) & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        ensure!(flags & FLAG_FIXED_NEWSTYLE != 0, "the server does not speak fixed newstyle NBD");
        let name_bytes = u32::try_from(export.len())?;
        let mut option = Vec::new();
        option.extend_from_slice(&u32::from(flags).to_be_bytes());
        option.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        option.extend_from_slice(&OPTION_GO.to_be_bytes());
        option.extend_from_slice(&(4 + name_bytes + 2).to_be_bytes());
        option.extend_from_slice(&name_bytes.to_be_bytes());
        option.extend_from_slice(export.as_bytes());
        option.extend_from_slice(&0u16.to_be_bytes()); // no further information asked for
        self.stream.write_all(&option)?;
        let mut size = None;
        loop {
            ensure!(u64::from_be_bytes(self.take()?) == OPTION_REPLY_MAGIC, "the server's answer is not NBD");
            let _option: [u8; 4] = self.take()?;
            let kind = u32::from_be_bytes(self.take()?);
            let length = u32::from_be_bytes(self.take()?);
            ensure!(length <= OPTION_REPLY_BYTES, "the server's answer is not NBD");
            let mut text = vec![0; length as usize];
            self.stream.read_exact(&mut text)?;
            match kind {
                REPLY_ACK => return size.context("the server did not say how large the export is"),
                REPLY_INFO if text.get(..2) == Some(&INFO_EXPORT.to_be_bytes()) => {
                    let bytes = text.get(2..10).and_then(|bytes| bytes.try_into().ok());
                    size = Some(u64::from_be_bytes(bytes.context("the server's answer is cut short")?));
                }
                kind if kind & REPLY_ERROR != 0 => {
                    bail!("refused (error {}) {}", kind & !REPLY_ERROR, String::from_utf8_lossy(&text))
                }
                _ => {}
            }
        }
    }

    /// Fills `buffer` from `offset` on; at most [`REQUEST_BYTES`].
    pub fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.request(READ, offset, buffer.len(), &[]).with_context(|| format!("read at {offset}"))?;
        self.stream.read_exact(buffer).context("read")
    }

    /// Writes `bytes` at `offset`; at most [`REQUEST_BYTES`].
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.request(WRITE, offset, bytes.len(), bytes).with_context(|| format!("write at {offset}"))
    }

    /// What was written is on the disk when this returns.
    pub fn flush(&mut self) -> Result<()> {
        self.request(FLUSH, 0, 0, &[]).context("flush")
    }

    fn request(&mut self, command: u16, offset: u64, length: usize, payload: &[u8]) -> Result<()> {
        self.cookie += 1;
        let cookie = self.cookie;
        self.send(command, offset, u32::try_from(length)?, payload)?;
        ensure!(u32::from_be_bytes(self.take()?) == REPLY_MAGIC, "the server's reply is not NBD");
        let error = u32::from_be_bytes(self.take()?);
        ensure!(u64::from_be_bytes(self.take()?) == cookie, "the server answered another request");
        ensure!(error == 0, "the server answered with error {error}");
        Ok(())
    }

    fn send(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) -> Result<()> {
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request.extend_from_slice(&0u16.to_be_bytes());
        request.extend_from_slice(&command.to_be_bytes());
        request.extend_from_slice(&self.cookie.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&length.to_be_bytes());
        request.extend_from_slice(payload);
        Ok(self.stream.write_all(&request)?)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).context("the server went away")?;
        Ok(bytes)
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        // A goodbye; a server that is gone does not need it.
        let _ = self.send(DISCONNECT, 0, 0, &[]);
    }
}
