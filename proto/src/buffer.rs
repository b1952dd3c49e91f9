//! Memory that lies on block boundaries, so that it can go to a device opened with `O_DIRECT` as it is.

use bytes::Bytes;

use crate::limits::BLOCK_BYTES;

/// One block of memory at an address that is a multiple of its size.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; BLOCK_BYTES]);

/// An owned buffer of whole blocks, block-aligned. Written once by its owner, then frozen into shared [`Bytes`]; slices
/// of those at block boundaries are aligned too.
#[derive(Clone)]
pub struct BlockBuf {
    pages: Vec<Page>,
}

impl BlockBuf {
    /// A buffer of `blocks` blocks of zeroes.
    pub fn zeroed(blocks: usize) -> BlockBuf {
        BlockBuf {
            pages: vec![Page([0; BLOCK_BYTES]); blocks],
        }
    }

    /// A buffer with a copy of `content`, the rest of its last block zero.
    pub fn copied_from(content: &[u8]) -> BlockBuf {
        let mut buf = BlockBuf::zeroed(content.len().div_ceil(BLOCK_BYTES));
        buf[..content.len()].copy_from_slice(content);
        buf
    }

    /// Gives it up for sharing, without a copy.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for BlockBuf {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.pages)
    }
}

impl std::ops::Deref for BlockBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_ref()
    }
}

impl std::ops::DerefMut for BlockBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.pages)
    }
}

/// Whether a device opened with `O_DIRECT` can take it: whole blocks at a block boundary.
pub fn is_aligned(bytes: &[u8]) -> bool {
    (bytes.as_ptr() as usize).is_multiple_of(BLOCK_BYTES) && bytes.len().is_multiple_of(BLOCK_BYTES)
}

/// The same content, block-aligned: itself where it is already, a copy where it is not.
pub fn align(bytes: Bytes) -> Bytes {
    if is_aligned(&bytes) {
        bytes
    } else {
        BlockBuf::copied_from(&bytes).freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_and_their_block_slices_are_aligned() {
        let bytes = BlockBuf::copied_from(&[7; 5000]).freeze();
        assert_eq!(bytes.len(), 2 * BLOCK_BYTES);
        assert!(is_aligned(&bytes));
        assert!(is_aligned(&bytes.slice(BLOCK_BYTES..)));
        assert!(!is_aligned(&bytes.slice(1..)));
        let copy = align(bytes.slice(512..512 + BLOCK_BYTES));
        assert!(is_aligned(&copy));
        assert_eq!(copy, bytes.slice(512..512 + BLOCK_BYTES));
    }
}
