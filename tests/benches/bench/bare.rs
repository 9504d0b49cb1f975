//! What the parts of the way of a write cost when nothing else is around: CPU-seconds per GiB of captured
//! bytes.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use wire::{Client, Fingerprint, Identity, Server, Tuning};

use crate::cpu;
use crate::data::half_compressible;

/// Bytes that each part is measured over.
const BYTES: usize = 512 << 20;
const FRAME: usize = 1 << 20;
const GIB: f64 = (1_u64 << 30) as f64;

/// CPU-seconds per GiB captured, by part.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    /// Into the ring, and out of it.
    pub copies: f64,
    /// zstd 1, frames of 1 MiB.
    pub zstd: f64,
    /// Of the packed bytes: CRC and append, at source and receiver.
    pub appends: f64,
    /// Of the packed bytes: both ends of a loopback transfer.
    pub quinn: f64,
    /// Unpack.
    pub unpack: f64,
    /// Read what the replica holds, pack it at −5, append.
    pub undo: f64,
    /// Write the replica.
    pub replica: f64,
}

impl Costs {
    /// All parts.
    pub fn total(&self) -> f64 {
        self.copies + self.zstd + self.appends + self.quinn + self.unpack + self.undo + self.replica
    }

    /// Names and values, for the table.
    pub fn parts(&self) -> [(&'static str, f64); 7] {
        [
            ("copies", self.copies),
            ("zstd 1", self.zstd),
            ("appends", self.appends),
            ("quinn", self.quinn),
            ("unpack", self.unpack),
            ("undo", self.undo),
            ("replica", self.replica),
        ]
    }
}

fn cost<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let before = cpu::of_self();
    let out = work()?;
    Ok(((cpu::of_self() - before) * GIB / BYTES as f64, out))
}

/// Measures all parts one after the other; `dir` is on the disk under test.
pub fn measure(dir: &Path) -> Result<Costs> {
    let content = half_compressible(64 << 20, 1);
    let rounds = BYTES / content.len();
    let mut target = vec![0_u8; content.len()];
    let (copies, ()) = cost(|| {
        for _ in 0..rounds * 2 {
            target.copy_from_slice(std::hint::black_box(&content));
            std::hint::black_box(&mut target);
        }
        Ok(())
    })?;
    let (zstd, packed) = cost(|| pack(&content, rounds, 1))?;
    let (unpack, ()) = cost(|| {
        let mut unpacker = zstd::bulk::Decompressor::new()?;
        for frame in &packed {
            for _ in 0..rounds {
                unpacker.decompress_to_buffer(frame, &mut target[..FRAME])?;
            }
        }
        Ok(())
    })?;
    let packed: Vec<u8> = packed.concat();
    let (appends, ()) = cost(|| {
        for side in ["source", "receiver"] {
            let file = File::create(dir.join(side))?;
            for round in 0..rounds {
                for (at, chunk) in packed.chunks(FRAME).enumerate() {
                    std::hint::black_box(crc32fast::hash(chunk));
                    file.write_all_at(chunk, (round * packed.len() + at * FRAME) as u64)?;
                }
            }
            std::fs::remove_file(dir.join(side))?;
        }
        Ok(())
    })?;
    let replica =
        File::options().create(true).truncate(true).read(true).write(true).open(dir.join("replica"))?;
    let (replica_cost, ()) = cost(|| write_all(&replica, &content, rounds))?;
    let (undo, ()) = cost(|| {
        let out = File::create(dir.join("undo"))?;
        let mut packer = zstd::bulk::Compressor::new(-5)?;
        let mut buffer = vec![0_u8; zstd::zstd_safe::compress_bound(FRAME)];
        let mut at = 0;
        for frame in 0..BYTES / FRAME {
            replica.read_exact_at(&mut target[..FRAME], (frame * FRAME) as u64)?;
            let bytes = packer.compress_to_buffer(&target[..FRAME], &mut buffer)?;
            out.write_all_at(&buffer[..bytes], at)?;
            at += bytes as u64;
        }
        Ok(())
    })?;
    for name in ["replica", "undo"] {
        std::fs::remove_file(dir.join(name))?;
    }
    let bytes = packed.len() * rounds;
    let (quinn, ()) = cost(|| transfer(&dir.join("identities"), bytes))?;
    Ok(Costs { copies, zstd, appends, quinn, unpack, undo, replica: replica_cost })
}

fn pack(content: &[u8], rounds: usize, level: i32) -> Result<Vec<Vec<u8>>> {
    let mut packer = zstd::bulk::Compressor::new(level)?;
    let mut buffer = vec![0_u8; zstd::zstd_safe::compress_bound(FRAME)];
    let mut kept = Vec::new();
    for round in 0..rounds {
        for frame in content.chunks(FRAME) {
            let bytes = packer.compress_to_buffer(frame, &mut buffer)?;
            if round == 0 {
                kept.push(buffer[..bytes].to_vec());
            }
        }
    }
    Ok(kept)
}

fn write_all(file: &File, content: &[u8], rounds: usize) -> Result<()> {
    for round in 0..rounds {
        for (at, chunk) in content.chunks(FRAME).enumerate() {
            file.write_all_at(chunk, (round * content.len() + at * FRAME) as u64)?;
        }
    }
    Ok(())
}

/// Sends `bytes` over one loopback connection between two of our endpoints.
fn transfer(dir: &Path, bytes: usize) -> Result<()> {
    let (source, receiver) =
        (Identity::create(&dir.join("source"))?, Identity::create(&dir.join("receiver"))?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let expected = source.fingerprint();
        let accept = std::sync::Arc::new(move |seen: &Fingerprint| *seen == expected);
        let server = Server::new(&receiver, accept, &Tuning::default(), ([127, 0, 0, 1], 0).into())?;
        let address = server.local_addr()?.to_string();
        let reading = tokio::spawn(async move {
            let (connection, _) = wire::endpoint::handshake(server.accept().await.context("accept")?).await?;
            Tuning::default().admit(&connection)?;
            let mut stream = connection.accept_uni().await?;
            let mut seen = 0;
            while let Some(chunk) = stream.read_chunk(1 << 20, true).await? {
                seen += chunk.bytes.len();
            }
            connection.close(0_u32.into(), b"");
            anyhow::Ok(seen)
        });
        let client = Client::new(&source, receiver.fingerprint(), &Tuning::default())?;
        let connection = client.connect(&address, Duration::from_secs(10)).await?;
        let mut stream = connection.open_uni().await?;
        let chunk = bytes::Bytes::from(half_compressible(FRAME, 3));
        for _ in 0..bytes / FRAME {
            stream.write_chunk(chunk.clone()).await?;
        }
        stream.finish()?;
        anyhow::ensure!(reading.await?? == bytes / FRAME * FRAME, "bytes went missing");
        Ok(())
    })
}
