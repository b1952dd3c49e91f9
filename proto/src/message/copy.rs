//! Copy: blocks as another replica has them, each with its own version (rules 9, 13 and 21). Answered with `Durable`.

use bytes::Bytes;

use super::{Holder, check_blocks_bounded, data_of_blocks, get_place, put_place};
use crate::block::{Apply, BlockState, Content};
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{GroupIndex, Layer};
use crate::units::BlockRange;

/// Why a copy is sent, and so when it applies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum CopySource {
    /// To a member that lacks what the others hold: applied if newer.
    Repair = 1,
    /// To a member whose past is not known: applied if the local block is of an older generation than the holder's, else
    /// if newer.
    Resync = 2,
}

/// Write blocks as another replica has them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Copy {
    /// Who coordinates.
    pub holder: Holder,
    /// Into which group.
    pub group: GroupIndex,
    /// Into which layer.
    pub layer: Layer,
    /// Where; at most 256 blocks.
    pub range: BlockRange,
    /// Why.
    pub source: CopySource,
    /// What each block is to become; never `Damaged`.
    pub blocks: Vec<BlockState>,
    /// The content of the blocks that are `Data`, in order.
    pub bytes: Bytes,
}

impl CopySource {
    /// When a copy of this holder applies.
    pub(super) fn apply(self, holder: Holder) -> Apply {
        match self {
            CopySource::Repair => Apply::IfNewer,
            CopySource::Resync => Apply::Resync(holder.generation),
        }
    }

    /// The source `u8`, seven zero bytes.
    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.put_u8(self as u8);
        out.put_bytes(&[0; 7]);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<CopySource, DecodeError> {
        let source = match reader.u8()? {
            1 => CopySource::Repair,
            2 => CopySource::Resync,
            _ => return Err(DecodeError::Invalid("copy source")),
        };
        reader.zeroes(7)?;
        Ok(source)
    }
}

impl Copy {
    /// When it applies.
    pub fn apply(&self) -> Apply {
        self.source.apply(self.holder)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        assert_eq!(
            self.blocks.len(),
            self.range.count() as usize,
            "states of {}",
            self.range
        );
        self.holder.encode(out);
        put_place(out, self.group, self.layer, self.range);
        self.source.encode(out);
        self.blocks.iter().for_each(|block| block.encode(out));
        if self.bytes.is_empty() {
            Vec::new()
        } else {
            vec![self.bytes.clone()]
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Copy, DecodeError> {
        let holder = Holder::decode(reader)?;
        let (group, layer, range) = get_place(reader)?;
        let source = CopySource::decode(reader)?;
        check_blocks_bounded(range)?;
        let blocks = (0..range.count())
            .map(|_| BlockState::decode(reader))
            .collect::<Result<Vec<_>, _>>()?;
        if blocks.iter().any(|block| block.content == Content::Damaged) {
            return Err(DecodeError::Invalid("block kind"));
        }
        data_of_blocks(
            &data,
            blocks
                .iter()
                .filter(|block| matches!(block.content, Content::Data(_)))
                .count(),
        )?;
        Ok(Copy {
            holder,
            group,
            layer,
            range,
            source,
            blocks,
            bytes: data,
        })
    }
}
