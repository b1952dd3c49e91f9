//! Types 9 and 11: the end of a layer, and a floor under the versions of absent blocks.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{ChunkIndex, GroupId, Layer, Version};

use super::{Record, get_group, put_group};

/// Group, layer.
pub(super) const DELETE_BYTES: usize = 16;
/// Group, layer, chunk, four zero bytes, version.
pub(super) const FLOOR_BYTES: usize = 32;

pub(super) fn encode_delete(out: &mut Vec<u8>, group: GroupId, layer: Layer) {
    put_group(out, group);
    out.put_u32(layer.0);
}

pub(super) fn decode_delete(reader: &mut Reader<'_>) -> Result<Record, DecodeError> {
    Ok(Record::DeleteLayer {
        group: get_group(reader)?,
        layer: Layer(reader.u32()?),
    })
}

pub(super) fn encode_floor(out: &mut Vec<u8>, group: GroupId, layer: Layer, chunk: ChunkIndex, version: Version) {
    encode_delete(out, group, layer);
    out.put_u32(chunk.0);
    out.put_u32(0);
    out.put_u64(version.to_bits());
}

pub(super) fn decode_floor(reader: &mut Reader<'_>) -> Result<Record, DecodeError> {
    let (group, layer) = (get_group(reader)?, Layer(reader.u32()?));
    let chunk = ChunkIndex(reader.u32()?);
    reader.zeroes(4)?;
    Ok(Record::Floor {
        group,
        layer,
        chunk,
        version: Version::from_bits(reader.u64()?),
    })
}
