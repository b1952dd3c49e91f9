//! Type 5: the highest generation seen of a volume.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{Generation, VolumeId};

use super::Record;

/// Volume, generation, four zero bytes.
pub(super) const BYTES: usize = 16;

pub(super) fn encode(out: &mut Vec<u8>, volume: VolumeId, generation: Generation) {
    out.put_u64(volume.0);
    out.put_u32(generation.get());
    out.put_u32(0);
}

pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Record, DecodeError> {
    let volume = VolumeId(reader.u64()?);
    let generation = Generation::new(reader.u32()?).ok_or(DecodeError::Invalid("generation"))?;
    reader.zeroes(4)?;
    Ok(Record::Seal { volume, generation })
}
