//! Takes frames out of a stream of bytes: header and control part from what was read ahead, data into block-aligned
//! memory of its own.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::frame::{FrameError, FrameHeader};
use cairn_proto::limits::{BLOCK_BYTES, FRAME_CONTROL_BYTES_MAX, FRAME_HEADER_BYTES};
use cairn_proto::message::Envelope;

use super::limits::FRAME_READ_AHEAD_BYTES;

const _: () = assert!(FRAME_READ_AHEAD_BYTES >= FRAME_HEADER_BYTES + FRAME_CONTROL_BYTES_MAX);

/// A frame whose data is still arriving.
struct Partial {
    header: FrameHeader,
    head: Vec<u8>,
    data: BlockBuf,
    filled: usize,
}

/// The reading end of one connection to a device.
pub(super) struct FrameReader {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    partial: Option<Partial>,
}

impl FrameReader {
    pub(super) fn new() -> FrameReader {
        FrameReader {
            buf: vec![0; FRAME_READ_AHEAD_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            partial: None,
        }
    }

    /// Where to read to: first the rest of a frame's data (possibly empty), then what comes behind it. The second is never
    /// empty once [`next_frame`](FrameReader::next_frame) has given all there is.
    pub(super) fn read_target(&mut self) -> (&mut [u8], &mut [u8]) {
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let ahead = &mut self.buf[self.end..];
        match &mut self.partial {
            Some(partial) => (&mut partial.data[partial.filled..], ahead),
            None => (&mut [], ahead),
        }
    }

    /// That `count` bytes were read into the read target, in its order.
    pub(super) fn received(&mut self, count: usize) {
        let mut behind = count;
        if let Some(partial) = &mut self.partial {
            let direct = count.min(partial.data.len() - partial.filled);
            partial.filled += direct;
            behind -= direct;
        }
        assert!(
            behind <= self.buf.len() - self.end,
            "{behind} bytes read into {}",
            self.buf.len() - self.end
        );
        self.end += behind;
    }

    /// The next whole frame. After an error the connection is of no use.
    pub(super) fn next_frame(&mut self) -> Result<Option<Envelope>, FrameError> {
        if self.partial.is_none() {
            let filled = &self.buf[self.start..self.end];
            let Some(start) = filled.first_chunk::<FRAME_HEADER_BYTES>() else {
                return Ok(None);
            };
            let header = FrameHeader::decode(start)?;
            let head_bytes = FRAME_HEADER_BYTES + header.control_bytes as usize;
            let Some(head) = filled.get(..head_bytes) else {
                return Ok(None);
            };
            if header.data_bytes == 0 {
                let envelope = Envelope::decode(&header, head, Bytes::new())?;
                self.take(head_bytes);
                return Ok(Some(envelope));
            }
            self.partial = Some(Partial {
                header,
                head: head.to_vec(),
                data: BlockBuf::to_be_filled(header.data_bytes as usize / BLOCK_BYTES),
                filled: 0,
            });
            self.take(head_bytes);
        }
        let Some(mut partial) = self.partial.take() else {
            return Ok(None);
        };
        let count = (self.end - self.start).min(partial.data.len() - partial.filled);
        partial.data[partial.filled..partial.filled + count].copy_from_slice(&self.buf[self.start..self.start + count]);
        partial.filled += count;
        self.take(count);
        if partial.filled < partial.data.len() {
            self.partial = Some(partial);
            return Ok(None);
        }
        Envelope::decode(&partial.header, &partial.head, partial.data.freeze()).map(Some)
    }

    fn take(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    use cairn_proto::buffer::is_aligned;
    use cairn_proto::checksum::Checksum;
    use cairn_proto::ids::{ChunkIndex, Correlation, Generation, GroupIndex, Layer, Seq, Version, VolumeId};
    use cairn_proto::message::{Empty, Holder, Message, Write, WriteData};
    use cairn_proto::units::BlockRange;
    use proptest::prelude::*;

    pub(in super::super) fn write(blocks: u32) -> Message {
        let (volume, generation) = (VolumeId(7), Generation::new(3).unwrap());
        let bytes = BlockBuf::copied_from(&vec![blocks as u8; blocks as usize * BLOCK_BYTES]).freeze();
        let checksums = vec![Checksum(5); blocks as usize];
        Message::Write(Write {
            holder: Holder { volume, generation },
            group: GroupIndex(0),
            layer: Layer(0),
            range: BlockRange::new(ChunkIndex(1), 9, blocks).unwrap(),
            version: Version::new(generation, Seq::new(1).unwrap()),
            stable: Version::ZERO,
            data: WriteData::Data { bytes, checksums },
        })
    }

    /// Frames with and without data, and their bytes.
    fn frames() -> Vec<(Envelope, Vec<u8>)> {
        let messages = [
            Message::Ping(Empty),
            write(2),
            write(1),
            Message::Pong(Empty),
            write(256),
            write(3),
        ];
        let wire = |(index, message): (usize, Message)| {
            let envelope = Envelope::new(Correlation(index as u64), message);
            let encoded = envelope.encode();
            let bytes = [&[encoded.head][..], &encoded.data].concat().concat();
            (envelope, bytes)
        };
        messages.into_iter().enumerate().map(wire).collect()
    }

    fn feed(reader: &mut FrameReader, mut bytes: &[u8], cut: usize) -> Result<Vec<Envelope>, FrameError> {
        let mut out = Vec::new();
        while !bytes.is_empty() {
            let (data, ahead) = reader.read_target();
            let mut count = 0;
            for target in [data, ahead] {
                let n = target.len().min(bytes.len()).min(cut - count);
                target[..n].copy_from_slice(&bytes[..n]);
                bytes = &bytes[n..];
                count += n;
            }
            assert!(count > 0, "there is always room for more");
            reader.received(count);
            while let Some(envelope) = reader.next_frame()? {
                out.push(envelope);
            }
        }
        Ok(out)
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut(cut in prop_oneof![60usize..200, 1000usize..300_000]) {
            let frames = frames();
            let bytes: Vec<u8> = frames.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
            let got = feed(&mut FrameReader::new(), &bytes, cut).unwrap();
            prop_assert_eq!(got.len(), frames.len());
            for (got, (sent, _)) in got.iter().zip(&frames) {
                prop_assert_eq!(got, sent);
                if let Message::Write(Write { data: WriteData::Data { bytes, .. }, .. }) = &got.message {
                    prop_assert!(is_aligned(bytes));
                }
            }
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 64..300), cut in 1usize..99) {
            prop_assert!(feed(&mut FrameReader::new(), &bytes, cut).is_err());
        }
    }
}
