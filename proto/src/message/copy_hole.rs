//! CopyHole: a copy of blocks that are one hole on another replica, run-length (rules 9, 13 and 21). Answered with
//! `Durable`.

use bytes::Bytes;

use super::{CopySource, Holder, get_place, no_data, put_place};
use crate::block::{Apply, BlockState, Content};
use crate::codec::{DecodeError, Reader};
use crate::ids::{GroupIndex, Layer};
use crate::units::BlockRange;

/// Make a range the hole that it is on another replica. Each block is decided on its own, as in a [`Copy`](super::Copy).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyHole {
    /// Who coordinates.
    pub holder: Holder,
    /// Into which group.
    pub group: GroupIndex,
    /// Into which layer.
    pub layer: Layer,
    /// Where; up to a whole chunk.
    pub range: BlockRange,
    /// Why.
    pub source: CopySource,
    /// What every block of it is to become: `Absent` or `Zero`, with the version of the hole; zero where nothing was ever
    /// written.
    pub state: BlockState,
}

impl CopyHole {
    /// When it applies.
    pub fn apply(&self) -> Apply {
        self.source.apply(self.holder)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        assert!(self.state.content.is_hole(), "{:?} is no hole", self.state);
        self.holder.encode(out);
        put_place(out, self.group, self.layer, self.range);
        self.source.encode(out);
        self.state.encode(out);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<CopyHole, DecodeError> {
        no_data(&data)?;
        let holder = Holder::decode(reader)?;
        let (group, layer, range) = get_place(reader)?;
        let source = CopySource::decode(reader)?;
        let state = BlockState::decode(reader)?;
        match state.content {
            Content::Absent | Content::Zero => Ok(CopyHole {
                holder,
                group,
                layer,
                range,
                source,
                state,
            }),
            Content::Data(_) | Content::Damaged => Err(DecodeError::Invalid("block kind")),
        }
    }
}
