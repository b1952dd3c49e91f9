//! What is written: incompressible bytes from a small pool, so that making them costs nothing.

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::limits::{BLOCK_BYTES, FRAME_BLOCKS_MAX};
use cairn_storage_node::testing::Prng;

/// A pool of content.
#[derive(Debug)]
pub struct Content {
    pool: Bytes,
    next: usize,
}

const POOL_BLOCKS: usize = 2 * FRAME_BLOCKS_MAX as usize;

impl Content {
    /// The same each time.
    pub fn new() -> Content {
        let mut prng = Prng::new(4);
        let mut pool = BlockBuf::zeroed(POOL_BLOCKS);
        for word in pool.chunks_exact_mut(8) {
            word.copy_from_slice(&prng.next_u64().to_le_bytes());
        }
        Content {
            pool: pool.freeze(),
            next: 0,
        }
    }

    /// Zeroes, as a device that keeps nothing reads.
    pub fn zeroes() -> Content {
        Content {
            pool: BlockBuf::zeroed(POOL_BLOCKS).freeze(),
            next: 0,
        }
    }

    /// So many blocks, at most 256, block-aligned.
    pub fn next(&mut self, blocks: u32) -> Bytes {
        let blocks = blocks as usize;
        if self.next + blocks > POOL_BLOCKS {
            self.next = 0;
        }
        let from = self.next * BLOCK_BYTES;
        self.next += blocks;
        self.pool.slice(from..from + blocks * BLOCK_BYTES)
    }
}

impl Default for Content {
    fn default() -> Content {
        Content::new()
    }
}
