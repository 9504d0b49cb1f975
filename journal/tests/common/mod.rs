//! A stream of frames with contents that differ from lsn to lsn, and a journal to put them in.
#![allow(dead_code, reason = "each test file uses its part")]

use journal::compress::{Compression, Encoder};
use journal::frame::{Batch, FrameHeader, Stamp};
use journal::io::Disk;
use journal::reader::Reader;
use journal::record::{Op, Record};
use journal::sim_disk::SimDisk;
use journal::tail::Limit;
use journal::writer::WriterOptions;
use journal::{Epoch, EpochId, Extent, GroupId, Lineage, Lsn, Position, Result, VolumeId};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const GROUP: GroupId = GroupId([7; 16]);
pub const LINEAGE: Lineage = Lineage([8; 16]);

pub fn dir() -> PathBuf {
    PathBuf::from("/journal")
}

pub fn options(segment_bytes: u64) -> WriterOptions {
    WriterOptions { group: GROUP, segment_bytes }
}

pub fn shared(sim: &SimDisk) -> Arc<dyn Disk> {
    Arc::new(sim.clone())
}

pub fn epoch_start(number: u64, last: u64) -> Position {
    let mut id = [3; 16];
    id[0] = u8::try_from(number).unwrap();
    Position::epoch_start(LINEAGE, Epoch { number, id: EpochId(id) }, Lsn(last))
}

#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    pub bytes: Vec<u8>,
    pub header: FrameHeader,
}

/// Makes the frame that follows `held`: one write of `payload` bytes, stored raw.
pub fn frame_after(held: &Position, payload: usize) -> Frame {
    let lsn = held.lsn.next();
    let mut batch = Batch::default();
    let content: Vec<u8> = (0..payload).map(|at| (at as u64 * 31 + lsn.0 * 17).to_le_bytes()[0]).collect();
    let extent = Extent { offset: 4096 * lsn.0, len: payload as u64 };
    let time_ns = 1000 * lsn.0;
    batch.push(&Record { op: Op::Write, flags: 0, volume: VolumeId(0), lsn, time_ns, extent }, &content);
    let stamp = Stamp { group: GROUP, lineage: held.lineage, epoch: held.epoch };
    let encoded = Encoder::new().unwrap().encode(&batch, &stamp, None, Compression::Off, Vec::new()).unwrap();
    let (bytes, _) = encoded.seal(held.chain);
    let header = FrameHeader::parse(&bytes).unwrap();
    Frame { bytes, header }
}

/// Reads everything from the oldest position on.
pub fn read_all(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Vec<Frame>> {
    let mut reader = Reader::open(disk.clone(), dir)?;
    let mut frames = Vec::new();
    let mut bytes = Vec::new();
    while let Some(header) = reader.next(&mut bytes, Limit::End)? {
        frames.push(Frame { bytes: bytes.clone(), header });
    }
    Ok(frames)
}
