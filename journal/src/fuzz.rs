//! Entry points for the fuzzers: each feeds foreign bytes to one decoder. They must return, never panic.

pub mod directory;
pub mod steer;

pub use directory::directory;

use crate::compress::Decoder;
use crate::control::TwoSlot;
use crate::frame::FrameHeader;
use crate::index::SegmentIndex;
use crate::io::Disk;
use crate::mark::Mark;
use crate::record::{Op, Records, VolumeRecord};
use crate::segment;
use crate::sim_disk::SimDisk;
use crate::state::State;
use crate::tail::Limit;
use crate::verify::{VerifyOptions, verify_dir};
use std::path::Path;
use std::sync::Arc;

/// A whole frame as it comes from a peer.
pub fn frame(bytes: &[u8]) {
    if let (Ok(header), Ok(mut decoder)) = (FrameHeader::parse(bytes), Decoder::new()) {
        let mut raw = Vec::new();
        if decoder.decode(&header, bytes, &mut raw).is_ok() {
            record(&raw);
        }
    }
}

/// A frame's raw payload.
pub fn record(bytes: &[u8]) {
    for located in Records::new(bytes).map_while(Result::ok) {
        if located.record.op == Op::Volume {
            let _ = VolumeRecord::decode(located.payload);
        }
    }
}

/// A directory with one segment of these bytes: verified, read, and searched by index.
pub fn segment(bytes: &[u8]) {
    let disk = SimDisk::new();
    let dir = Path::new("/fuzz");
    let path = dir.join(segment::file_name(1));
    disk.put(&path, bytes.to_vec());
    let _ = verify_dir(&disk, dir, VerifyOptions { unpack: true }, &mut |_, _| {});
    let _ = SegmentIndex::open(&disk, &path).map(|index| index.extents().count() + index.frames().count());
    let disk: Arc<dyn Disk> = Arc::new(disk);
    if let Ok(mut reader) = crate::reader::Reader::open(disk, dir) {
        let mut frame = Vec::new();
        while let Ok(Some(_)) = reader.next(&mut frame, Limit::End) {}
    }
}

/// A footer and trailer behind an intact segment header.
pub fn index(bytes: &[u8]) {
    let header = segment::SegmentHeader {
        kind: segment::SegmentKind::Undo,
        flags: 0,
        group: crate::GroupId::default(),
        number: 1,
        first_lsn: crate::Lsn(1),
        last_lsn: crate::Lsn(1),
        start: crate::Position::default(),
        received_ns: 0,
        allocated_bytes: 0,
        nonce: 0,
        merged_from: 0,
    };
    let mut file = header.encode().to_vec();
    file.extend_from_slice(bytes);
    segment(&file);
}

/// A durable mark.
pub fn mark(bytes: &[u8]) {
    let _ = Mark::decode(bytes);
}

/// A two-slot control file, and the journal's payload in it.
pub fn control(bytes: &[u8]) {
    let disk = SimDisk::new();
    let path = Path::new("/fuzz/control");
    disk.put(path, bytes.to_vec());
    let _ = TwoSlot::read(&disk, path).map(|slots| State::decode(&slots.payload));
    let _ = State::decode(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The fuzzers run elsewhere and longer; this keeps their entry points alive and their magics
        /// reachable.
        #[test]
        fn foreign_bytes_never_panic(
            magic in proptest::sample::select(vec![*b"AFTRFRM1", *b"AFTRSEG1", *b"AFTRIDX1", *b"AFTRMRK1", *b"AFTRCTL1"]),
            body in proptest::collection::vec(any::<u8>(), 0..2048),
        ) {
            let bytes = [&magic[..], &body].concat();
            for feed in [frame, record, segment, index, mark, control] {
                feed(&bytes);
                feed(&body);
            }
        }
    }
}
