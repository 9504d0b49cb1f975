//! Sockets to listen on, and who connects.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, RenameFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{TcpListener, UnixListener};

use crate::error::{Error, Kind};
use crate::server::Listen;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Suffix of a socket that is not in its place yet.
const NEW_SUFFIX: &str = ".new";

/// A socket that is listened on. Its file goes away with it.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        /// Held for its drop.
        _file: SocketFile,
    },
}

impl Listener {
    /// Binds; must be called on the runtime that will accept.
    pub fn bind(listen: &Listen) -> Result<Self, Error> {
        match listen {
            Listen::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address)
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .and_then(TcpListener::from_std);
                listener
                    .map(Self::Tcp)
                    .map_err(|error| Error::caused(Kind::Listen, address.to_string(), error))
            }
            Listen::Unix { path, mode } => bind_unix(path, *mode),
        }
    }

    /// The address with the port that was chosen, if any.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix { .. } => None,
        }
    }

    /// Waits for a client; returns its socket and its description for the log.
    pub async fn accept(&self) -> io::Result<(OwnedFd, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                Ok((stream.into_std()?.into(), peer.to_string()))
            }
            Self::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                let peer = match stream.peer_cred() {
                    Ok(peer) => format!("uid {} pid {}", peer.uid(), peer.pid().unwrap_or(0)),
                    Err(_) => "unknown process".to_owned(),
                };
                Ok((stream.into_std()?.into(), peer))
            }
        }
    }
}

/// Accepts from whichever listener has a client.
pub(crate) async fn accept_any(listeners: &[Listener]) -> io::Result<(OwnedFd, String)> {
    let mut accepts: Vec<_> = listeners.iter().map(|listener| Box::pin(listener.accept())).collect();
    std::future::poll_fn(|cx| {
        let ready = accepts.iter_mut().map(|accept| accept.as_mut().poll(cx)).find(std::task::Poll::is_ready);
        ready.unwrap_or(std::task::Poll::Pending)
    })
    .await
}

/// The file of a Unix socket, removed on drop if it is still ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            // Nothing to be done about a directory that became read-only: the next start replaces the file.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Binds a Unix socket whose file has its mode before anyone can connect to it:
/// 1. bind under a new name: nobody can connect, since it does not listen;
/// 2. set the mode;
/// 3. listen;
/// 4. rename into place, over a stale file only after nobody answered on it.
fn bind_unix(path: &Path, mode: u32) -> Result<Listener, Error> {
    let at = || path.display().to_string();
    let failed = |error: io::Error| Error::caused(Kind::Listen, at(), error);
    let mut new_path = path.as_os_str().to_owned();
    new_path.push(NEW_SUFFIX);
    let new_path = PathBuf::from(new_path);

    let stale = is_stale(path)?;
    if is_stale(&new_path)? {
        std::fs::remove_file(&new_path).map_err(failed)?;
    }
    let address = SocketAddrUnix::new(&new_path).map_err(|error| failed(error.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|error| failed(error.into()))?;
    let placed = rustix::net::bind(&socket, &address)
        .and_then(|()| rustix::fs::chmod(&new_path, Mode::from_raw_mode(mode)))
        .and_then(|()| rustix::net::listen(&socket, BACKLOG))
        .and_then(|()| {
            let flags = if stale { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
            rustix::fs::renameat_with(rustix::fs::CWD, &new_path, rustix::fs::CWD, path, flags)
        });
    placed.map_err(|error| failed(error.into()))?;
    let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
    let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(socket)).map_err(failed)?;
    Ok(Listener::Unix { listener, _file: SocketFile { path: path.to_owned(), inode } })
}

/// Whether a socket without a listener is at `path`; `false` if nothing is.
fn is_stale(path: &Path) -> Result<bool, Error> {
    let at = || path.display().to_string();
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::caused(Kind::Listen, at(), error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::new(Kind::Listen, format!("{} exists and is not a socket", at())));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) => Err(Error::caused(Kind::Listen, at(), error)),
        Ok(_) => Err(Error::new(Kind::SocketInUse, at())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn unix(path: &Path) -> Listen {
        Listen::Unix { path: path.to_owned(), mode: 0o600 }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap()); // leaves its file
        let live = Listener::bind(&unix(&path)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Listener::bind(&unix(&path)).unwrap_err().kind, Kind::SocketInUse);
        UnixStream::connect(&path).unwrap();
        drop(live);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the socket's file goes with it");
    }

    #[tokio::test]
    async fn another_file_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "text").unwrap();
        assert_eq!(Listener::bind(&unix(&path)).unwrap_err().kind, Kind::Listen);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "text");
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_refused() {
        let path = std::env::temp_dir().join("x".repeat(200));
        assert_eq!(Listener::bind(&unix(&path)).unwrap_err().kind, Kind::Listen);
    }
}
