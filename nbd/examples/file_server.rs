//! Serves one file or block device over a Unix socket: `file_server SOCKET PATH`. Ends with its standard
//! input.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use nbd::{Access, Export, FileExport, Listen, Server, Settings};

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut arguments = std::env::args_os().skip(1);
    let (Some(socket), Some(path)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: file_server SOCKET PATH");
    };
    let export: Arc<dyn Export> = Arc::new(FileExport::open("disk", path.as_ref(), Access::ReadWrite)?);
    let listen = Listen::Unix { path: socket.into(), mode: 0o600 };
    let server = Server::start(&[listen], vec![export], Settings::default())?;
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(server.shutdown(Duration::from_secs(5)));
    Ok(())
}
