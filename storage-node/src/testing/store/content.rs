//! Names and content for tests: every block says which block it is and which version wrote it.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::{ChecksumAlgorithm, range_checksums};
use cairn_proto::ids::{ChunkIndex, ClusterId, DeviceUuid, GroupId, GroupIndex, Incarnation, Layer, Version, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::BlockRange;

use crate::store::FormatParams;
use crate::store::api::{StoreRequest, WriteContent};

/// The group that most tests write to.
pub const GROUP: GroupId = GroupId {
    volume: VolumeId(7),
    index: GroupIndex(1),
};

/// Who a test device is.
pub fn params() -> FormatParams {
    FormatParams {
        cluster: ClusterId([1; 16]),
        device: DeviceUuid([2; 16]),
        incarnation: Incarnation(3),
        checksum: ChecksumAlgorithm::Crc32,
    }
}

/// Blocks of a chunk. Panics if they are not within it.
pub fn range(chunk: u32, start: u32, blocks: u32) -> BlockRange {
    BlockRange::new(ChunkIndex(chunk), start, blocks).expect("a range within a chunk")
}

/// What a version wrote to a block of the volume.
pub fn content(volume_block: u64, version: Version) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    block.extend_from_slice(&volume_block.to_le_bytes());
    block.extend_from_slice(&version.to_bits().to_le_bytes());
    while block.len() < BLOCK_BYTES {
        block.extend_from_within(..);
    }
    block
}

/// The same for a range.
pub fn contents(range: BlockRange, version: Version) -> Bytes {
    let mut buf = BlockBuf::zeroed(range.count() as usize);
    for (i, block) in (0..).zip(buf.chunks_exact_mut(BLOCK_BYTES)) {
        block.copy_from_slice(&content(range.volume_block(i), version));
    }
    buf.freeze()
}

/// What a write puts into its range if it is of data.
pub fn data(range: BlockRange, version: Version) -> WriteContent {
    let bytes = contents(range, version);
    WriteContent::Data {
        checksums: range_checksums(GROUP.volume, range, &bytes),
        bytes,
    }
}

/// A write to [`GROUP`].
pub fn write(layer: Layer, range: BlockRange, version: Version, content: WriteContent) -> StoreRequest {
    StoreRequest::Write {
        group: GROUP,
        layer,
        range,
        version,
        content,
    }
}
