//! Checksums of blocks: CRC-32 over (volume id, block number, content), so that the right content in the wrong place is
//! caught by whoever reads it.

use crate::ids::VolumeId;
use crate::limits::BLOCK_BYTES;
use crate::units::BlockRange;

/// How block checksums are computed. The number stands in superblocks and volume descriptions; it is never reused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ChecksumAlgorithm {
    /// CRC-32 (IEEE 802.3, reflected, polynomial 0xEDB88320) over volume id, block number, content.
    Crc32 = 1,
}

impl ChecksumAlgorithm {
    /// `None` for a number this version does not know.
    pub fn from_u8(number: u8) -> Option<ChecksumAlgorithm> {
        (number == 1).then_some(ChecksumAlgorithm::Crc32)
    }
}

/// A block's checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Checksum(pub u32);

/// The checksum of the block with this number in this volume. Panics unless `content` is one block.
pub fn block_checksum(volume: VolumeId, volume_block: u64, content: &[u8]) -> Checksum {
    assert_eq!(content.len(), BLOCK_BYTES, "a checksum is of one block");
    let mut hasher = crc32fast::Hasher::new();
    let mut place = [0; 16];
    place[..8].copy_from_slice(&volume.0.to_le_bytes());
    place[8..].copy_from_slice(&volume_block.to_le_bytes());
    hasher.update(&place);
    hasher.update(content);
    Checksum(hasher.finalize())
}

/// The checksums of all blocks of a range, in order.
pub fn range_checksums(volume: VolumeId, range: BlockRange, content: &[u8]) -> Vec<Checksum> {
    assert_eq!(content.len(), range.bytes(), "content of {range}");
    let blocks = content.chunks_exact(BLOCK_BYTES).zip(0..);
    blocks
        .map(|(block, i)| block_checksum(volume, range.volume_block(i), block))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_elsewhere_has_another_checksum() {
        let content = [9; BLOCK_BYTES];
        let here = block_checksum(VolumeId(1), 5, &content);
        assert_ne!(here, block_checksum(VolumeId(1), 6, &content));
        assert_ne!(here, block_checksum(VolumeId(2), 5, &content));
        assert_eq!(here, block_checksum(VolumeId(1), 5, &content));
    }
}
