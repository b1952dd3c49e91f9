//! A device in memory, for inspection.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::{DeviceBlock, DiskError, DiskGeometry};

use super::MemoryDevice;
use crate::store::inspect::BlockReader;

impl BlockReader for MemoryDevice {
    fn geometry(&self) -> DiskGeometry {
        MemoryDevice::geometry(self)
    }

    fn read(&mut self, wanted: &[(DeviceBlock, u32)]) -> Vec<Result<Bytes, DiskError>> {
        let read = |(at, blocks): &(DeviceBlock, u32)| {
            let content: Vec<u8> = (at.0..at.0 + u64::from(*blocks))
                .flat_map(|place| self.peek(DeviceBlock(place)).to_vec())
                .collect();
            Ok(BlockBuf::copied_from(&content).freeze())
        };
        wanted.iter().map(read).collect()
    }
}
