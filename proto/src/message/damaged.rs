//! Damaged: a device tells the holder of a volume which blocks it can't read any more. The only message that a device sends
//! without being asked. It is not answered: it is said again until the blocks are good.

use bytes::Bytes;

use super::{Holder, get_group_index, no_data};
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{ChunkIndex, GroupIndex, Layer};
use crate::limits::DAMAGED_RUNS_MAX;
use crate::units::BlockRange;

/// Blocks of one group that the device holds and can't read. It still knows their versions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damaged {
    /// Who is told: who holds the volume, as far as the device knows.
    pub holder: Holder,
    /// Of which group.
    pub group: GroupIndex,
    /// Where; 1 to 256 runs. There may be more blocks than are told at a time.
    pub runs: Vec<(Layer, BlockRange)>,
}

impl Damaged {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        let count = self.runs.len();
        assert!((1..=DAMAGED_RUNS_MAX).contains(&count), "{count} runs in one message");
        self.holder.encode(out);
        out.put_u8(self.group.0);
        out.put_bytes(&[0; 3]);
        out.put_u32(count as u32);
        out.put_bytes(&[0; 4]);
        for (layer, range) in &self.runs {
            out.put_u32(layer.0);
            out.put_u32(range.chunk().0);
            out.put_u32(range.start());
            out.put_u32(range.count());
        }
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Damaged, DecodeError> {
        no_data(&data)?;
        let holder = Holder::decode(reader)?;
        let group = get_group_index(reader)?;
        let count = reader.u32()?;
        reader.zeroes(4)?;
        if count == 0 {
            return Err(DecodeError::Invalid("count"));
        }
        if count as usize > DAMAGED_RUNS_MAX {
            let (value, limit) = (count.into(), DAMAGED_RUNS_MAX as u64);
            let field = "runs";
            return Err(DecodeError::TooLarge { field, value, limit });
        }
        let mut runs = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let layer = Layer(reader.u32()?);
            let chunk = ChunkIndex(reader.u32()?);
            let range = BlockRange::new(chunk, reader.u32()?, reader.u32()?);
            runs.push((layer, range.ok_or(DecodeError::Invalid("range"))?));
        }
        Ok(Damaged { holder, group, runs })
    }
}
