//! What a replica holds of a block: shared by wire, store and replication.

use crate::checksum::Checksum;
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{ChunkIndex, Generation, Layer, Version};
use crate::limits::BLOCKS_PER_CHUNK;
use crate::units::BlockRange;

/// What a block of one layer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Never written in this layer, or discarded: a clone's reader goes to the parent. A version above zero is that of
    /// the discard.
    Absent,
    /// Written as zeroes; takes no space.
    Zero,
    /// 4096 bytes with this checksum.
    Data(Checksum),
    /// Acknowledged once, and can't be read any more. Never replaced by an older content.
    Damaged,
}

impl Content {
    /// Whether it takes no space: absent or zeroes.
    pub fn is_hole(self) -> bool {
        matches!(self, Content::Absent | Content::Zero)
    }
}

/// A block as a replica holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockState {
    /// What it is.
    pub content: Content,
    /// Of which write.
    pub version: Version,
}

impl BlockState {
    /// Never written.
    pub const ABSENT: BlockState = BlockState {
        content: Content::Absent,
        version: Version::ZERO,
    };
    /// Bytes of the wire form.
    pub const WIRE_BYTES: usize = 16;

    /// Appends the wire form: version `u64`, checksum `u32` (zero without data), kind `u8`, three zero bytes.
    pub fn encode(&self, out: &mut impl Put) {
        out.put_u64(self.version.to_bits());
        out.put_u32(if let Content::Data(checksum) = self.content {
            checksum.0
        } else {
            0
        });
        out.put_u8(match self.content {
            Content::Absent => 0,
            Content::Zero => 1,
            Content::Data(_) => 2,
            Content::Damaged => 3,
        });
        out.put_bytes(&[0; 3]);
    }

    /// Reads the wire form.
    pub fn decode(reader: &mut Reader<'_>) -> Result<BlockState, DecodeError> {
        let version = Version::from_bits(reader.u64()?);
        let checksum = reader.u32()?;
        let content = match (reader.u8()?, checksum) {
            (0, 0) => Content::Absent,
            (1, 0) => Content::Zero,
            (2, checksum) => Content::Data(Checksum(checksum)),
            (3, 0) => Content::Damaged,
            _ => return Err(DecodeError::Invalid("block kind")),
        };
        reader.zeroes(3)?;
        Ok(BlockState { content, version })
    }
}

/// When a write applies to a block (rules 13 and 21 of the replication protocol).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Apply {
    /// If its version is newer than what the block has in this layer.
    IfNewer,
    /// If the block's generation is below this one, even when its version is higher; else only if newer.
    Resync(Generation),
}

impl Apply {
    /// Whether a write of version `incoming` replaces a block of version `held`.
    pub fn applies(self, held: Version, incoming: Version) -> bool {
        match self {
            Apply::IfNewer => incoming > held,
            // A version names one content: what has it already is not written again.
            Apply::Resync(generation) => incoming > held || (held.generation() < generation && incoming != held),
        }
    }
}

/// A place in the order of a group's blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Cursor {
    /// First by chunk.
    pub chunk: ChunkIndex,
    /// Then by layer.
    pub layer: Layer,
    /// Then by block in the chunk.
    pub block: u32,
}

impl Cursor {
    /// Behind every block.
    pub const END: Cursor = Cursor {
        chunk: ChunkIndex(u32::MAX),
        layer: Layer(u32::MAX),
        block: BLOCKS_PER_CHUNK - 1,
    };

    /// The place behind a range of a layer.
    pub fn behind(layer: Layer, range: &BlockRange) -> Cursor {
        let chunk = range.chunk();
        if range.end() < BLOCKS_PER_CHUNK {
            Cursor {
                chunk,
                layer,
                block: range.end(),
            }
        } else {
            match layer.0.checked_add(1) {
                Some(next) => Cursor {
                    chunk,
                    layer: Layer(next),
                    block: 0,
                },
                None => Cursor::END,
            }
        }
    }

    /// Appends the wire form: three `u32`.
    pub fn encode(&self, out: &mut impl Put) {
        out.put_u32(self.chunk.0);
        out.put_u32(self.layer.0);
        out.put_u32(self.block);
    }

    /// Reads the wire form.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Cursor, DecodeError> {
        let (chunk, layer, block) = (ChunkIndex(reader.u32()?), Layer(reader.u32()?), reader.u32()?);
        if block >= BLOCKS_PER_CHUNK {
            return Err(DecodeError::Invalid("cursor"));
        }
        Ok(Cursor { chunk, layer, block })
    }
}

/// Blocks of one layer that follow each other and have the same version and kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// In which layer.
    pub layer: Layer,
    /// Where.
    pub range: BlockRange,
    /// What: `Data`'s checksum is that of the first block and means nothing for the others.
    pub state: BlockState,
}

impl Run {
    /// Bytes of the wire form.
    pub const WIRE_BYTES: usize = 32;

    /// Appends the wire form: chunk, layer, start, count as `u32`, then the state.
    pub fn encode(&self, out: &mut impl Put) {
        out.put_u32(self.range.chunk().0);
        out.put_u32(self.layer.0);
        out.put_u32(self.range.start());
        out.put_u32(self.range.count());
        self.state.encode(out);
    }

    /// Reads the wire form.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Run, DecodeError> {
        let (chunk, layer) = (ChunkIndex(reader.u32()?), Layer(reader.u32()?));
        let range = BlockRange::new(chunk, reader.u32()?, reader.u32()?).ok_or(DecodeError::Invalid("range"))?;
        Ok(Run {
            layer,
            range,
            state: BlockState::decode(reader)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Seq;

    #[test]
    fn a_resync_replaces_what_an_older_attachment_left_even_if_its_version_is_higher() {
        let v = |g, s| Version::new(Generation::new(g).unwrap(), Seq::new(s).unwrap());
        let resync = Apply::Resync(Generation::new(3).unwrap());
        assert!(
            resync.applies(v(2, 9), v(1, 5)),
            "a write that was never acknowledged gives way"
        );
        assert!(!resync.applies(v(3, 1), v(2, 9)), "a live write stays");
        assert!(resync.applies(v(3, 1), v(3, 2)));
        assert!(!resync.applies(v(2, 9), v(2, 9)));
        assert!(!resync.applies(Version::ZERO, Version::ZERO));
        assert!(
            resync.applies(v(2, 9), Version::ZERO),
            "what was never written elsewhere gives way"
        );
        assert!(!Apply::IfNewer.applies(v(2, 9), v(2, 9)));
        assert!(!Apply::IfNewer.applies(v(2, 9), v(1, 10)));
    }
}
