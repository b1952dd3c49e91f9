//! What tests of the store share: see [`crate::testing::store`].

use cairn_proto::disk::DeviceBlock;
use cairn_proto::ids::{Epoch, Generation, Layer, Seq, Version};

use crate::store::api::{StoreReply, StoreRequest, WriteContent};

pub(crate) use crate::testing::store::content::*;
pub(crate) use crate::testing::store::rig::*;

impl Rig {
    /// The block of the device that has this content, if there is one.
    pub(crate) fn find(&self, content: &[u8]) -> Option<DeviceBlock> {
        let mut blocks = (0..self.device.geometry().blocks).map(DeviceBlock);
        blocks.find(|at| self.device.peek(*at)[..] == *content)
    }

    pub(crate) fn create(&mut self) {
        let reply = self.call(StoreRequest::CreateReplica {
            group: GROUP,
            role: 1,
            epoch: Epoch(1),
        });
        assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
    }

    pub(crate) fn write(&mut self, chunk: u32, start: u32, blocks: u32, seq: u64) -> StoreReply {
        self.call(write_request(chunk, start, blocks, seq))
    }

    pub(crate) fn read(&mut self, chunk: u32, start: u32, blocks: u32) -> StoreReply {
        self.call(read_request(chunk, start, blocks))
    }
}

pub(crate) fn version(seq: u64) -> Version {
    Version::new(Generation::new(1).unwrap(), Seq::new(seq).unwrap())
}

pub(crate) fn write_request(chunk: u32, start: u32, blocks: u32, seq: u64) -> StoreRequest {
    let range = range(chunk, start, blocks);
    write(Layer(0), range, version(seq), data(range, version(seq)))
}

pub(crate) fn hole_request(chunk: u32, start: u32, blocks: u32, seq: u64, content: WriteContent) -> StoreRequest {
    StoreRequest::Write {
        group: GROUP,
        layer: Layer(0),
        range: range(chunk, start, blocks),
        version: version(seq),
        content,
    }
}

pub(crate) fn read_request(chunk: u32, start: u32, blocks: u32) -> StoreRequest {
    StoreRequest::Read {
        group: GROUP,
        layer: Layer(0),
        range: range(chunk, start, blocks),
    }
}
