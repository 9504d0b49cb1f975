//! Compression in its one place: batches become frames here, frames become records again here.
//!
//! Each thread keeps one zstd context (measured: a new one per 4 KiB frame costs two thirds of the speed).
//! Payloads are compressed straight into the frame's buffer. What does not shrink by an eighth is stored as
//! it is: such bytes cost both sides time and save little. Such batches come in rows, so after one of them
//! the next is first tried on a sample of it (decision 0017). [`crate::pool::EncodePool`] spreads the work
//! over threads.

use crate::frame::{Batch, Codec, EncodedFrame, FrameHeader, HEADER_BYTES, MAX_RAW_BYTES, Stamp};
use crate::{Error, ErrorKind, Result};
use std::io::Cursor;

/// How payloads are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    Off,
    /// zstd at this level; negative levels are faster.
    Zstd(i32),
}

/// One thread's compressor.
pub struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    level: i32,
    /// The last batch was not worth it.
    hardly_shrinks: bool,
}

/// Bytes from the middle of a batch that stand for all of it, and how much larger than that a batch must be.
const SAMPLE_BYTES: usize = 64 << 10;
const SAMPLED_FROM: usize = 4 * SAMPLE_BYTES;

/// Level at which contexts start; any other is set when first asked for.
const FIRST_LEVEL: i32 = 1;

fn context_failed(source: std::io::Error) -> Error {
    Error::io("make a zstd context", source)
}

impl Encoder {
    /// A compressor with its context.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new() -> Result<Encoder> {
        let zstd = zstd::bulk::Compressor::new(FIRST_LEVEL).map_err(context_failed)?;
        Ok(Encoder { zstd, level: FIRST_LEVEL, hardly_shrinks: false })
    }

    /// Makes a frame of `batch` in the memory of `buffer`. `undo_batch` is the apply batch for undo frames,
    /// `None` for frames of the stream.
    ///
    /// # Errors
    /// Only for a level that zstd refuses.
    pub fn encode(
        &mut self,
        batch: &Batch,
        stamp: &Stamp,
        undo_batch: Option<u64>,
        compression: Compression,
        mut buffer: Vec<u8>,
    ) -> Result<EncodedFrame> {
        let raw = batch.raw();
        buffer.clear();
        buffer.resize(HEADER_BYTES, 0);
        // Room for the frame as it would be if stored raw, so that neither way has to grow the buffer.
        buffer.reserve(crate::sector_ceil(HEADER_BYTES + raw.len()) - HEADER_BYTES);
        let codec = match compression {
            Compression::Zstd(level) if self.compress(raw, level, &mut buffer)? => Codec::Zstd,
            _ => {
                buffer.truncate(HEADER_BYTES);
                buffer.extend_from_slice(raw);
                Codec::Raw
            }
        };
        Ok(EncodedFrame::around(batch, stamp, undo_batch, codec, buffer))
    }

    /// Whether `raw` was compressed behind the header room, and was worth it.
    fn compress(&mut self, raw: &[u8], level: i32, buffer: &mut Vec<u8>) -> Result<bool> {
        if level != self.level {
            self.zstd.set_compression_level(level).map_err(context_failed)?;
            self.level = level;
        }
        if self.hardly_shrinks && raw.len() >= SAMPLED_FROM {
            let sample = &raw[(raw.len() - SAMPLE_BYTES) / 2..][..SAMPLE_BYTES];
            if !self.is_worth_it(sample, buffer) {
                return Ok(false);
            }
        }
        let is_worth_it = self.is_worth_it(raw, buffer);
        self.hardly_shrinks = !is_worth_it;
        Ok(is_worth_it)
    }

    /// Compresses behind the header room; whether enough was saved.
    fn is_worth_it(&mut self, raw: &[u8], buffer: &mut Vec<u8>) -> bool {
        buffer.truncate(HEADER_BYTES);
        let mut behind_header = Cursor::new(buffer);
        behind_header.set_position(HEADER_BYTES as u64);
        // The only failure left is that the result is larger than the room, which is raw's own size.
        let stored = self.zstd.compress_to_buffer(raw, &mut behind_header);
        stored.is_ok_and(|bytes| bytes <= raw.len() - raw.len() / 8)
    }
}

/// One thread's decompressor.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Decoder {
    /// A decompressor with its context.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new() -> Result<Decoder> {
        Ok(Decoder { zstd: zstd::bulk::Decompressor::new().map_err(context_failed)? })
    }

    /// Checks the payload of a whole frame and unpacks it into `out`, replacing what is there.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where CRC, zstd or the length do not hold.
    pub fn decode(&mut self, header: &FrameHeader, frame: &[u8], out: &mut Vec<u8>) -> Result<()> {
        header.check_payload(frame)?;
        let stored = header.payload(frame);
        out.clear();
        match header.codec {
            Codec::Raw => out.extend_from_slice(stored),
            Codec::Zstd => self.unpack(header, stored, out)?,
        }
        Ok(())
    }

    /// As [`decode`](Self::decode), without a copy where the payload is stored raw; `scratch` is used
    /// otherwise.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_ref<'a>(
        &mut self,
        header: &FrameHeader,
        frame: &'a [u8],
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        header.check_payload(frame)?;
        let stored = header.payload(frame);
        match header.codec {
            Codec::Raw => Ok(stored),
            Codec::Zstd => {
                scratch.clear();
                self.unpack(header, stored, scratch)?;
                Ok(scratch)
            }
        }
    }

    /// zstd writes at most into the room it is given, and the room is bounded before it is made.
    fn unpack(&mut self, header: &FrameHeader, stored: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let malformed = |what: String| {
            let at = format!("frame lsn {}..{}: {what}", header.first_lsn, header.last_lsn);
            Error::new(ErrorKind::Malformed, at)
        };
        let raw_bytes = header.raw_bytes as usize;
        if raw_bytes > MAX_RAW_BYTES {
            return Err(malformed(format!("{raw_bytes} raw bytes are more than a frame may hold")));
        }
        out.reserve_exact(raw_bytes);
        let unpacked = self.zstd.decompress_to_buffer(stored, out);
        match unpacked {
            Ok(bytes) if bytes == raw_bytes => Ok(()),
            Ok(bytes) => Err(malformed(format!("unpacks to {bytes} bytes where {raw_bytes} are said"))),
            Err(error) => Err(malformed(format!("does not unpack: {error}"))),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::record::{Op, Record};
    use crate::{Epoch, EpochId, Extent, GroupId, Lineage, Lsn, VolumeId};

    pub(crate) fn stamp() -> Stamp {
        Stamp {
            group: GroupId([1; 16]),
            lineage: Lineage([2; 16]),
            epoch: Epoch { number: 3, id: EpochId([4; 16]) },
        }
    }

    pub(crate) fn batch_of(lsn: u64, payload: &[u8]) -> Batch {
        let mut batch = Batch::default();
        let extent = Extent { offset: 0, len: payload.len() as u64 };
        let record =
            Record { op: Op::Write, flags: 0, volume: VolumeId(0), lsn: Lsn(lsn), time_ns: lsn, extent };
        batch.push(&record, payload);
        batch
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33).to_le_bytes()[0]
        };
        (0..bytes).map(|_| next()).collect()
    }

    #[test]
    fn round_trip_and_the_choice_of_codec() {
        let (mut encoder, mut decoder) = (Encoder::new().unwrap(), Decoder::new().unwrap());
        let (mut out, mut scratch) = (Vec::new(), Vec::new());
        let cases = [
            (vec![7; 100_000], Compression::Zstd(1), Codec::Zstd),
            (vec![7; 100_000], Compression::Zstd(-5), Codec::Zstd),
            (vec![7; 100_000], Compression::Off, Codec::Raw),
            (noise(100_000), Compression::Zstd(3), Codec::Raw),
            (noise(1), Compression::Off, Codec::Raw),
        ];
        let mut buffer = Vec::new();
        for (payload, compression, codec) in cases {
            let batch = batch_of(1, &payload);
            let encoded = encoder.encode(&batch, &stamp(), None, compression, buffer).unwrap();
            let (frame, _) = encoded.seal(9);
            let header = FrameHeader::parse(&frame).unwrap();
            assert_eq!(header.codec, codec, "{compression:?}");
            assert_eq!(frame.len(), header.frame_bytes());
            decoder.decode(&header, &frame, &mut out).unwrap();
            assert_eq!(out, batch.raw());
            assert_eq!(decoder.decode_ref(&header, &frame, &mut scratch).unwrap(), batch.raw());
            buffer = frame;
        }
    }

    #[test]
    fn after_a_batch_that_hardly_shrinks_a_sample_speaks_for_the_next() {
        let mut encoder = Encoder::new().unwrap();
        let mut codec = |payload: &[u8]| {
            let mut batch = Batch::default();
            for (piece, lsn) in payload.chunks(SAMPLE_BYTES).zip(1..) {
                let extent = Extent { offset: 0, len: piece.len() as u64 };
                let record = Record {
                    op: Op::Write,
                    flags: 0,
                    volume: VolumeId(0),
                    lsn: Lsn(lsn),
                    time_ns: 1,
                    extent,
                };
                batch.push(&record, piece);
            }
            let encoded = encoder.encode(&batch, &stamp(), None, Compression::Zstd(1), Vec::new()).unwrap();
            FrameHeader::parse(&encoded.seal(1).0).unwrap().codec
        };
        let bytes = 2 * SAMPLED_FROM;
        let mut noise_in_the_middle = vec![7; bytes];
        noise_in_the_middle[bytes / 4..bytes / 4 * 3].copy_from_slice(&noise(bytes / 2));
        assert_eq!(codec(&noise_in_the_middle), Codec::Zstd, "all of it is tried at first");
        assert_eq!(codec(&noise(bytes)), Codec::Raw);
        assert_eq!(codec(&noise_in_the_middle), Codec::Raw, "its sample does not shrink");
        assert_eq!(codec(&noise_in_the_middle[..SAMPLED_FROM / 2]), Codec::Zstd, "too small for a sample");
        assert_eq!(codec(&noise_in_the_middle), Codec::Zstd, "the one before shrank");
        assert_eq!(codec(&noise(bytes)), Codec::Raw);
        assert_eq!(codec(&vec![7; bytes]), Codec::Zstd, "the sample shrinks, and so does all of it");
    }

    #[test]
    fn a_buffer_is_reused_without_growing() {
        let mut encoder = Encoder::new().unwrap();
        let batch = batch_of(1, &noise(100_000));
        let first =
            encoder.encode(&batch, &stamp(), None, Compression::Zstd(1), Vec::new()).unwrap().seal(1).0;
        let (address, capacity) = (first.as_ptr(), first.capacity());
        let second = encoder.encode(&batch, &stamp(), None, Compression::Zstd(1), first).unwrap().seal(1).0;
        assert_eq!((second.as_ptr(), second.capacity()), (address, capacity));
    }

    #[test]
    fn a_payload_that_unpacks_to_another_length_is_refused() {
        let mut encoder = Encoder::new().unwrap();
        let batch = batch_of(1, &[7; 50_000]);
        let (frame, _) =
            encoder.encode(&batch, &stamp(), None, Compression::Zstd(1), Vec::new()).unwrap().seal(1);
        let good = FrameHeader::parse(&frame).unwrap();
        for raw_bytes in [0, good.raw_bytes - 1, good.raw_bytes + 1] {
            let lying = FrameHeader { raw_bytes, ..good };
            let mut out = Vec::new();
            let error = Decoder::new().unwrap().decode(&lying, &frame, &mut out).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Malformed);
            assert!(out.capacity() <= MAX_RAW_BYTES);
        }
    }
}
