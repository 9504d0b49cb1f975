//! Streams of frames: the journal's own bytes, one frame after the other, nothing between.
//!
//! A uni stream from the source. The reader judges a frame's header with the journal's rules before it waits
//! for, or allocates, the rest; it does not check payload, order or chain: that is ingest's work, beside the
//! positions.

use bytes::{Bytes, BytesMut};
use journal::frame::{FrameHeader, HEADER_BYTES, MAX_FRAME_BYTES};
use quinn::{Connection, RecvStream, SendStream};
use std::collections::VecDeque;

use crate::error::{Error, ErrorKind, Result};

/// Packets taken from the connection under one lock.
const CHUNKS: usize = 32;

/// A whole frame: its checked header and all its bytes, header and padding included.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The header, already parsed.
    pub header: FrameHeader,
    /// The frame as it goes into the journal. The payload's CRC is not checked yet.
    pub bytes: Bytes,
}

/// Reads a stream as frames. Memory: one frame and some packets.
#[derive(Debug)]
pub struct FrameReader {
    stream: RecvStream,
    /// Received, not yet part of the frame.
    chunks: VecDeque<Bytes>,
    /// The frame so far.
    partial: BytesMut,
    /// Its header, once that is there.
    header: Option<FrameHeader>,
}

impl FrameReader {
    /// On a stream that the source opened.
    pub fn new(stream: RecvStream) -> FrameReader {
        FrameReader { stream, chunks: VecDeque::new(), partial: BytesMut::new(), header: None }
    }

    /// The next whole frame; `None` once the source has finished the stream after a whole one. Cancel-safe.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`] where the bytes are no frame (the journal's error is the cause) or the stream
    /// ends amid one; those of [`Error::connection`].
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            let wanted = self.header.map_or(HEADER_BYTES, |header| header.frame_bytes());
            self.fill(wanted);
            if self.partial.len() < wanted {
                if !self.receive().await? {
                    return if self.partial.is_empty() { Ok(None) } else { Err(self.cut_short()) };
                }
            } else if let Some(header) = self.header.take() {
                return Ok(Some(Frame { header, bytes: self.partial.split().freeze() }));
            } else {
                let header = FrameHeader::parse(&self.partial)
                    .map_err(|e| Error::because(ErrorKind::Malformed, "stream of frames", e))?;
                assert!(header.frame_bytes() <= MAX_FRAME_BYTES, "the journal bounds a header's lengths");
                self.partial.reserve(header.frame_bytes() - HEADER_BYTES);
                self.header = Some(header);
            }
        }
    }

    /// Tells the source to stop sending on this stream.
    pub fn stop(&mut self) {
        // An error means that the stream has ended already.
        let _ = self.stream.stop(quinn::VarInt::from_u32(0));
    }

    /// Moves received bytes into the frame, up to `wanted`. The one copy on the way in: a frame is contiguous
    /// in the journal.
    fn fill(&mut self, wanted: usize) {
        while self.partial.len() < wanted {
            let Some(chunk) = self.chunks.front_mut() else { return };
            let part = chunk.split_to(chunk.len().min(wanted - self.partial.len()));
            self.partial.extend_from_slice(&part);
            if chunk.is_empty() {
                self.chunks.pop_front();
            }
        }
    }

    /// Waits for bytes; false at the stream's end.
    async fn receive(&mut self) -> Result<bool> {
        let mut chunks: [Bytes; CHUNKS] = Default::default();
        let read =
            self.stream.read_chunks(&mut chunks).await.map_err(|e| Error::reading("stream of frames", e))?;
        let Some(count) = read else { return Ok(false) };
        self.chunks.extend(chunks.into_iter().take(count));
        Ok(true)
    }

    fn cut_short(&self) -> Error {
        let wanted = self.header.map_or(HEADER_BYTES, |header| header.frame_bytes());
        let at = format!("stream of frames ends amid one, at byte {} of {wanted}", self.partial.len());
        Error::new(ErrorKind::Malformed, at)
    }
}

/// Writes frames to a stream, without copying them.
#[derive(Debug)]
pub struct FrameWriter {
    stream: SendStream,
}

impl FrameWriter {
    /// Opens a stream of frames.
    ///
    /// # Errors
    /// As [`Error::connection`] tells.
    pub async fn open(connection: &Connection) -> Result<FrameWriter> {
        let stream =
            connection.open_uni().await.map_err(|e| Error::connection("open a stream of frames", e))?;
        Ok(FrameWriter { stream })
    }

    /// Hands a whole frame to QUIC; waits while the window is full. That it was handed over says nothing of
    /// its arrival. Not cancel-safe: after a cancelled send the stream is of no more use.
    ///
    /// # Errors
    /// As [`Error::connection`] tells; [`ErrorKind::Lost`] where the receiver stopped the stream.
    pub async fn send(&mut self, frame: Bytes) -> Result<()> {
        self.stream.write_chunk(frame).await.map_err(|e| Error::writing("send a frame", e))
    }

    /// Ends the stream after the frames sent.
    pub fn finish(mut self) {
        // An error means that the stream or connection has ended already.
        let _ = self.stream.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Pair, pair};
    use journal::compress::{Compression, Encoder};
    use journal::frame::{Batch, Stamp};
    use journal::record::{MAX_PAYLOAD_BYTES, Op, Record};
    use journal::{Epoch, EpochId, Extent, GroupId, Lineage, Lsn, VolumeId};

    /// `count` frames of one chain, of `records` records with `payload` bytes each.
    fn frames(count: u64, records: u64, payload: usize) -> Vec<Bytes> {
        let epoch = Epoch { number: 1, id: EpochId([3; 16]) };
        let stamp = Stamp { group: GroupId([1; 16]), lineage: Lineage([2; 16]), epoch };
        let mut chain = journal::frame::chain_seed(stamp.lineage, epoch);
        let (mut batch, mut encoder) = (Batch::default(), Encoder::new().unwrap());
        let one = |n: u64| {
            batch.clear();
            for lsn in n * records + 1..=(n + 1) * records {
                let extent = Extent { offset: lsn * 4096, len: payload as u64 };
                let record = Record {
                    op: Op::Write,
                    flags: 0,
                    volume: VolumeId(1),
                    lsn: Lsn(lsn),
                    time_ns: lsn,
                    extent,
                };
                let fill = u8::try_from(lsn % 251).unwrap();
                batch.push(&record, &vec![fill; payload]);
            }
            let frame = encoder.encode(&batch, &stamp, None, Compression::Off, Vec::new()).unwrap();
            let (bytes, chain_out) = frame.seal(chain);
            chain = chain_out;
            Bytes::from(bytes)
        };
        (0..count).map(one).collect()
    }

    async fn reader(pair: &Pair) -> FrameReader {
        FrameReader::new(pair.receiver.accept_uni().await.unwrap())
    }

    /// What the reader says about these bytes as a whole stream.
    async fn read_all(bytes: Vec<u8>) -> Result<Vec<Bytes>> {
        let pair = pair().await;
        let mut stream = pair.source.open_uni().await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.finish().unwrap();
        let (mut reader, mut got) = (reader(&pair).await, Vec::new());
        while let Some(frame) = reader.next().await? {
            got.push(frame.bytes);
        }
        Ok(got)
    }

    #[tokio::test]
    async fn frames_arrive_byte_for_byte() {
        let sent: Vec<Bytes> =
            [frames(40, 1, 512), frames(3, 8, MAX_PAYLOAD_BYTES), frames(1, 1, 0)].concat();
        let pair = pair().await;
        let mut writer = FrameWriter::open(&pair.source).await.unwrap();
        for frame in &sent {
            writer.send(frame.clone()).await.unwrap();
        }
        writer.finish();
        let mut reader = reader(&pair).await;
        for frame in &sent {
            let got = reader.next().await.unwrap().unwrap();
            assert_eq!(got.bytes, frame);
            assert_eq!(got.header, FrameHeader::parse(frame).unwrap());
            got.header.check_payload(&got.bytes).unwrap();
        }
        assert!(reader.next().await.unwrap().is_none());
    }

    /// More than all windows together, so that flow control stops and wakes both sides; the reader is
    /// cancelled all the time.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_big_transfer_survives_cancelled_reads() {
        let sent = frames(96, 8, MAX_PAYLOAD_BYTES);
        let pair = pair().await;
        let mut writer = FrameWriter::open(&pair.source).await.unwrap();
        let queue = sent.clone();
        let sending = tokio::spawn(async move {
            for frame in queue {
                writer.send(frame).await.unwrap();
            }
            writer.finish();
        });
        let (mut reader, mut got, mut cancelled) = (reader(&pair).await, 0, 0);
        loop {
            tokio::select! {
                biased;
                frame = reader.next() => match frame.unwrap() {
                    Some(frame) => {
                        assert_eq!(frame.bytes, sent[got]);
                        got += 1;
                    }
                    None => break,
                },
                () = tokio::task::yield_now() => cancelled += 1,
            }
        }
        sending.await.unwrap();
        assert_eq!(got, sent.len());
        assert!(cancelled > 0, "the reader was never waiting");
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_or_foreign_is_malformed() {
        let frame = frames(1, 1, 4096).remove(0);
        assert_eq!(read_all(Vec::new()).await.unwrap().len(), 0);
        assert_eq!(read_all(frame.to_vec()).await.unwrap(), std::slice::from_ref(&frame));
        let mut flipped = frame.to_vec();
        flipped[124] ^= 1;
        for bad in [
            frame[..1].to_vec(),
            frame[..HEADER_BYTES].to_vec(),
            frame[..frame.len() - 1].to_vec(),
            [&frame[..], b"more"].concat(),
            vec![0; HEADER_BYTES],
            flipped,
        ] {
            let length = bad.len();
            assert_eq!(read_all(bad).await.unwrap_err().kind, ErrorKind::Malformed, "{length} bytes");
        }
    }

    #[tokio::test]
    async fn a_stopped_stream_and_a_closed_connection_are_lost() {
        let pair = pair().await;
        let frame = frames(1, 1, 512).remove(0);
        let mut writer = FrameWriter::open(&pair.source).await.unwrap();
        writer.send(frame.clone()).await.unwrap();
        let mut reader = reader(&pair).await;
        reader.next().await.unwrap().unwrap();
        reader.stop();
        let error = loop {
            if let Err(e) = writer.send(frame.clone()).await {
                break e;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(error.kind, ErrorKind::Lost);

        let mut writer = FrameWriter::open(&pair.source).await.unwrap();
        writer.send(frame).await.unwrap();
        let mut reader = self::reader(&pair).await;
        reader.next().await.unwrap().unwrap();
        pair.source.close(quinn::VarInt::from_u32(0), b"");
        assert_eq!(reader.next().await.unwrap_err().kind, ErrorKind::Lost);
    }
}
