//! A small NBD client, written against the protocol and not against our server: fixed newstyle with GO,
//! simple replies, one request at a time (byte maps: the NBD project's `doc/proto.md`).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FIXED_NEWSTYLE_NO_ZEROES: u16 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
/// The source's I/O never waits for anything but its own disk: an answer that takes longer is a failure.
const ANSWER: Duration = Duration::from_secs(60);

/// What a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Flush.
    Flush = 3,
    /// Discard.
    Trim = 4,
    /// Write zeroes.
    WriteZeroes = 6,
}

/// A volume, connected.
pub struct NbdClient {
    stream: UnixStream,
    size: u64,
    cookie: u64,
}

impl NbdClient {
    /// Connects to `export` on a Unix socket.
    ///
    /// # Errors
    /// Nobody listens, or the export is refused.
    pub fn connect(socket: &Path, export: &str) -> Result<NbdClient> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut client = NbdClient { stream, size: 0, cookie: 0 };
        client.size = client.go(export).with_context(|| format!("open NBD export {export}"))?;
        Ok(client)
    }

    /// Size of the volume, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn go(&mut self, export: &str) -> Result<u64> {
        ensure!(u64::from_be_bytes(self.take()?) == SERVER_MAGIC, "the server does not speak NBD");
        ensure!(u64::from_be_bytes(self.take()?) == OPTION_MAGIC, "the server does not speak newstyle NBD");
        let flags = u16::from_be_bytes(self.take()?) & FIXED_NEWSTYLE_NO_ZEROES;
        let name_bytes = u32::try_from(export.len())?;
        let mut option = u32::from(flags).to_be_bytes().to_vec();
        option.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        option.extend_from_slice(&OPTION_GO.to_be_bytes());
        option.extend_from_slice(&(4 + name_bytes + 2).to_be_bytes());
        option.extend_from_slice(&name_bytes.to_be_bytes());
        option.extend_from_slice(export.as_bytes());
        option.extend_from_slice(&0u16.to_be_bytes());
        self.stream.write_all(&option)?;
        let mut size = None;
        loop {
            ensure!(u64::from_be_bytes(self.take()?) == OPTION_REPLY_MAGIC, "the server's answer is not NBD");
            let _option: [u8; 4] = self.take()?;
            let kind = u32::from_be_bytes(self.take()?);
            let length = u32::from_be_bytes(self.take()?);
            ensure!(length <= 64 << 10, "the server's answer is not NBD");
            let mut text = vec![0; length as usize];
            self.stream.read_exact(&mut text)?;
            match kind {
                REPLY_ACK => return size.context("the server did not say how large the export is"),
                REPLY_INFO if text.get(..2) == Some(&INFO_EXPORT.to_be_bytes()) => {
                    let bytes = text.get(2..10).and_then(|bytes| bytes.try_into().ok());
                    size = Some(u64::from_be_bytes(bytes.context("the server's answer is cut short")?));
                }
                kind if kind & REPLY_ERROR != 0 => bail!("refused: {}", String::from_utf8_lossy(&text)),
                _ => {}
            }
        }
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// The server answered with an error, or is gone.
    pub fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.request(Request::Read, offset, buffer.len(), &[])?;
        Ok(self.stream.read_exact(buffer)?)
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// As [`NbdClient::read`].
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.request(Request::Write, offset, bytes.len(), bytes)
    }

    /// Discards or zeroes.
    ///
    /// # Errors
    /// As [`NbdClient::read`].
    pub fn clear(&mut self, request: Request, offset: u64, bytes: usize) -> Result<()> {
        self.request(request, offset, bytes, &[])
    }

    /// What was answered is on the disk when this returns.
    ///
    /// # Errors
    /// As [`NbdClient::read`].
    pub fn flush(&mut self) -> Result<()> {
        self.request(Request::Flush, 0, 0, &[])
    }

    fn request(&mut self, kind: Request, offset: u64, length: usize, payload: &[u8]) -> Result<()> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request.extend_from_slice(&0u16.to_be_bytes());
        request.extend_from_slice(&(kind as u16).to_be_bytes());
        request.extend_from_slice(&self.cookie.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&u32::try_from(length)?.to_be_bytes());
        request.extend_from_slice(payload);
        self.stream.write_all(&request).with_context(|| format!("{kind:?}"))?;
        ensure!(u32::from_be_bytes(self.take()?) == REPLY_MAGIC, "the server's reply is not NBD");
        let error = u32::from_be_bytes(self.take()?);
        ensure!(u64::from_be_bytes(self.take()?) == self.cookie, "the server answered another request");
        ensure!(error == 0, ServerError(error));
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).context("the server went away")?;
        Ok(bytes)
    }
}

/// The server answered a request with an error: the disk failed its client, which must never happen.
#[derive(Debug)]
pub struct ServerError(pub u32);

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the server answered with error {}", self.0)
    }
}

impl std::error::Error for ServerError {}
