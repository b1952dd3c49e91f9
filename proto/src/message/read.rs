//! Read and its answer.

use bytes::Bytes;

use super::{Holder, check_blocks_bounded, data_of_blocks, get_place, no_data, put_place};
use crate::block::{BlockState, Content};
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{CommitSeq, GroupIndex, Layer};
use crate::limits::FRAME_BLOCKS_MAX;
use crate::units::BlockRange;

/// Read a range; at most 256 blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Read {
    /// Who reads.
    pub holder: Holder,
    /// From which group.
    pub group: GroupIndex,
    /// From which layer.
    pub layer: Layer,
    /// Where.
    pub range: BlockRange,
}

impl Read {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        put_place(out, self.group, self.layer, self.range);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Read, DecodeError> {
        no_data(&data)?;
        let holder = Holder::decode(reader)?;
        let (group, layer, range) = get_place(reader)?;
        check_blocks_bounded(range)?;
        Ok(Read {
            holder,
            group,
            layer,
            range,
        })
    }
}

/// What was read: the state of each block, and the content of those that are `Data`. Absent is not zero: the reader of
/// a clone goes to the parent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReadAnswer {
    /// The device's commit sequence.
    pub commit: CommitSeq,
    /// Microseconds in the device's queue.
    pub queue_us: u32,
    /// Microseconds of reading.
    pub read_us: u32,
    /// One per block of the range.
    pub blocks: Vec<BlockState>,
    /// The content of the blocks that are `Data`, in order, in pieces of whole blocks.
    pub bytes: Vec<Bytes>,
}

impl ReadAnswer {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        out.put_u64(self.commit.0);
        out.put_u32(self.queue_us);
        out.put_u32(self.read_us);
        out.put_u32(u32::try_from(self.blocks.len()).expect("an answer is bounded"));
        out.put_u32(0);
        self.blocks.iter().for_each(|block| block.encode(out));
        self.bytes.clone()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<ReadAnswer, DecodeError> {
        let commit = CommitSeq(reader.u64()?);
        let (queue_us, read_us) = (reader.u32()?, reader.u32()?);
        let count = reader.count("blocks", FRAME_BLOCKS_MAX as usize)?;
        reader.zeroes(4)?;
        let blocks = (0..count)
            .map(|_| BlockState::decode(reader))
            .collect::<Result<Vec<_>, _>>()?;
        data_of_blocks(
            &data,
            blocks
                .iter()
                .filter(|block| matches!(block.content, Content::Data(_)))
                .count(),
        )?;
        let bytes = if data.is_empty() { Vec::new() } else { vec![data] };
        Ok(ReadAnswer {
            commit,
            queue_us,
            read_us,
            blocks,
            bytes,
        })
    }
}
