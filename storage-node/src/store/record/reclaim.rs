//! Types 13 and 14: space of what was dropped that is given back, and the end of that.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::Layer;

use super::{Record, get_group, put_group};
use crate::store::chunk::{ChunkKey, KEY_BYTES};
use crate::store::doomed::Doomed;
use crate::store::limits::PAGES_PER_CHUNK;

/// Key of the chunk, first and last page, two zero bytes.
pub(super) const RECLAIM_BYTES: usize = KEY_BYTES + 4;

pub(super) fn encode_reclaim(out: &mut Vec<u8>, key: ChunkKey, first: u8, last: u8) {
    key.encode(out);
    out.put_u8(first);
    out.put_u8(last);
    out.put_bytes(&[0; 2]);
}

pub(super) fn decode_reclaim(reader: &mut Reader<'_>) -> Result<Record, DecodeError> {
    let key = ChunkKey::decode(reader)?;
    let (first, last) = (reader.u8()?, reader.u8()?);
    reader.zeroes(2)?;
    if first > last || u32::from(last) >= PAGES_PER_CHUNK {
        return Err(DecodeError::Invalid("pages"));
    }
    Ok(Record::Reclaim { key, first, last })
}

/// Group, kind (0 the whole replica, 1 a layer), three zero bytes, the layer or zero.
pub(in crate::store) const DOOMED_BYTES: usize = 20;

impl Doomed {
    /// Appends it. The same in the root of the directory.
    pub(in crate::store) fn encode(self, out: &mut Vec<u8>) {
        put_group(out, self.group);
        out.put_u8(u8::from(self.layer.is_some()));
        out.put_bytes(&[0; 3]);
        out.put_u32(self.layer.map_or(0, |layer| layer.0));
    }

    pub(in crate::store) fn decode(reader: &mut Reader<'_>) -> Result<Doomed, DecodeError> {
        let group = get_group(reader)?;
        let kind = reader.u8()?;
        reader.zeroes(3)?;
        let layer = match (kind, reader.u32()?) {
            (0, 0) => None,
            (1, layer) => Some(Layer(layer)),
            _ => return Err(DecodeError::Invalid("what is dropped")),
        };
        Ok(Doomed { group, layer })
    }
}
