//! Pieces of an operation: what lies in one chunk and fits one message.

use bytes::Bytes;
use cairn_proto::ids::ChunkIndex;
use cairn_proto::limits::{BLOCK_BYTES, CHUNK_BYTES, FRAME_DATA_BYTES_MAX};
use cairn_proto::units::BlockRange;

/// What is done to the bytes of an operation.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Read,
    /// With the bytes of the whole operation.
    Write(Bytes),
    Zero,
    Discard,
    Status,
}

/// Bytes within one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    /// From the start of the volume.
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Span {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// The blocks that it touches.
    pub(super) fn blocks(&self) -> BlockRange {
        let chunk = self.offset / CHUNK_BYTES;
        let first = (self.offset % CHUNK_BYTES) / BLOCK_BYTES as u64;
        let end = ((self.end() - 1) % CHUNK_BYTES) / BLOCK_BYTES as u64 + 1;
        let chunk = ChunkIndex(u32::try_from(chunk).expect("a volume has fewer chunks"));
        BlockRange::new(chunk, first as u32, (end - first) as u32).expect("a span lies within its chunk")
    }

    /// Bytes of its first block that lie before it.
    pub(super) fn head(&self) -> usize {
        (self.offset % BLOCK_BYTES as u64) as usize
    }

    /// Bytes of its last block that lie after it.
    pub(super) fn tail(&self) -> usize {
        (self.end().next_multiple_of(BLOCK_BYTES as u64) - self.end()) as usize
    }

    /// The blocks at its ends of which only a part is in it.
    pub(super) fn partial_blocks(&self) -> Vec<BlockRange> {
        let blocks = self.blocks();
        let one = |block| BlockRange::new(blocks.chunk(), block, 1).expect("within the chunk");
        let mut partial = Vec::new();
        if self.head() > 0 {
            partial.push(one(blocks.start()));
        }
        if self.tail() > 0 && (self.head() == 0 || blocks.count() > 1) {
            partial.push(one(blocks.end() - 1));
        }
        partial
    }
}

impl Work {
    /// The first piece of what is left of an operation.
    pub(super) fn next_span(&self, offset: u64, end: u64) -> Span {
        let chunk_end = (offset / CHUNK_BYTES + 1) * CHUNK_BYTES;
        let limit = end.min(chunk_end);
        let block = BLOCK_BYTES as u64;
        let until = match self {
            Work::Read | Work::Write(_) => limit.min(offset / block * block + FRAME_DATA_BYTES_MAX as u64),
            Work::Status => limit,
            // Whole blocks go run-length, and what is left at the ends is merged block by block.
            Work::Zero | Work::Discard => {
                let aligned = offset.next_multiple_of(block);
                if aligned > offset {
                    limit.min(aligned)
                } else if limit / block * block > offset {
                    limit / block * block
                } else {
                    limit
                }
            }
        };
        Span {
            offset,
            length: until - offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spans(work: &Work, offset: u64, length: u64) -> Vec<Span> {
        let (mut at, end, mut spans) = (offset, offset + length, Vec::new());
        while at < end {
            let span = work.next_span(at, end);
            assert_eq!(span.offset, at);
            assert!(span.length > 0);
            at = span.end();
            spans.push(span);
        }
        spans
    }

    #[test]
    fn a_discard_of_a_chunk_is_one_piece_and_its_ragged_ends_are_their_own() {
        assert_eq!(spans(&Work::Discard, 0, 3 * CHUNK_BYTES).len(), 3);
        let ragged = spans(&Work::Discard, 512, CHUNK_BYTES);
        let lengths: Vec<u64> = ragged.iter().map(|span| span.length).collect();
        assert_eq!(lengths, [3584, CHUNK_BYTES - 4096, 512]);
        assert_eq!(ragged[0].partial_blocks(), [ragged[0].blocks()]);
        assert!(ragged[1].partial_blocks().is_empty());
    }

    proptest! {
        #[test]
        fn pieces_follow_each_other_within_chunks_and_messages(
            sector in 0u64..400_000, sectors in 1u64..20_000, kind in 0..3
        ) {
            let work = [Work::Read, Work::Zero, Work::Status][kind as usize].clone();
            let (offset, length) = (sector * 512, sectors * 512);
            let spans = spans(&work, offset, length);
            prop_assert_eq!(spans.iter().map(|span| span.length).sum::<u64>(), length);
            for span in spans {
                let blocks = span.blocks();
                prop_assert_eq!(span.head() + span.length as usize + span.tail(), blocks.bytes());
                prop_assert!(kind != 0 || blocks.bytes() <= FRAME_DATA_BYTES_MAX);
                prop_assert!(kind != 1 || span.partial_blocks().is_empty() || blocks.count() == 1);
            }
        }
    }
}
