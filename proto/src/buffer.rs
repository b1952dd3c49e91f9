//! Memory that lies on block boundaries, so that it can go to a device opened with `O_DIRECT` as it is.
//!
//! Buffers that are dropped are kept by their thread, within bounds, for the next ones: a page that comes fresh from the
//! kernel costs a fault and is cleared, which for large requests is more than all else that is done with it.

use std::cell::RefCell;

use bytes::Bytes;

use crate::limits::BLOCK_BYTES;

/// One block of memory at an address that is a multiple of its size.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; BLOCK_BYTES]);

/// Blocks that a thread keeps for later at the most: 16 MiB, for a few large reads of scattered blocks and what of them is still being
/// sent.
const KEPT_BLOCKS_MAX: usize = 4096;
/// Larger buffers are not kept: none is needed more than now and then.
const KEPT_BUFFER_BLOCKS_MAX: usize = 1024;
/// Up to so many blocks sizes are powers of two, above multiples of it.
const SIZE_STEP: usize = 16;

/// What stands in memory that is to be written over, where debug assertions are on: who reads it notices.
const STALE: u8 = 0xa5;

/// An owned buffer of whole blocks, block-aligned. Written once by its owner, then frozen into shared [`Bytes`]; slices
/// of those at block boundaries are aligned too.
pub struct BlockBuf {
    /// As many as its size class has.
    pages: Vec<Page>,
    blocks: usize,
}

impl BlockBuf {
    /// A buffer of `blocks` blocks of zeroes.
    pub fn zeroed(blocks: usize) -> BlockBuf {
        match kept(blocks) {
            Some(mut buf) => {
                buf.fill(0);
                buf
            }
            None => BlockBuf::fresh(blocks),
        }
    }

    /// A buffer of `blocks` blocks with anything in them: for who writes over all of it before it is read.
    pub fn to_be_filled(blocks: usize) -> BlockBuf {
        let mut buf = kept(blocks).unwrap_or_else(|| BlockBuf::fresh(blocks));
        if cfg!(debug_assertions) {
            buf.fill(STALE);
        }
        buf
    }

    /// A buffer with a copy of `content`, the rest of its last block zero.
    pub fn copied_from(content: &[u8]) -> BlockBuf {
        let mut buf = BlockBuf::to_be_filled(content.len().div_ceil(BLOCK_BYTES));
        buf[..content.len()].copy_from_slice(content);
        buf[content.len()..].fill(0);
        buf
    }

    fn fresh(blocks: usize) -> BlockBuf {
        // As the kernel gives it, where it does: not cleared a second time.
        let pages = bytemuck::zeroed_vec(size_of_class(blocks));
        BlockBuf { pages, blocks }
    }

    /// Gives it up for sharing, without a copy.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Clone for BlockBuf {
    fn clone(&self) -> BlockBuf {
        BlockBuf::copied_from(self)
    }
}

impl AsRef<[u8]> for BlockBuf {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.pages[..self.blocks])
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
        bytemuck::cast_slice_mut(&mut self.pages[..self.blocks])
    }
}

impl Drop for BlockBuf {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        // A thread that ends keeps nothing more.
        let _ = KEPT.try_with(|kept| kept.borrow_mut().keep(pages));
    }
}

/// Pieces of whole blocks as one; without a copy if there is one only.
pub fn joined(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 {
        return pieces.swap_remove(0);
    }
    let mut buffer = BlockBuf::to_be_filled(pieces.iter().map(Bytes::len).sum::<usize>() / BLOCK_BYTES);
    let mut offset = 0;
    for piece in pieces {
        buffer[offset..offset + piece.len()].copy_from_slice(&piece);
        offset += piece.len();
    }
    buffer.freeze()
}

/// How many blocks a buffer for so many gets.
fn size_of_class(blocks: usize) -> usize {
    if blocks <= SIZE_STEP {
        blocks.next_power_of_two()
    } else {
        blocks.next_multiple_of(SIZE_STEP)
    }
}

/// Buffers that nobody uses, by their size.
#[derive(Default)]
struct Kept {
    by_size: std::collections::BTreeMap<usize, Vec<Vec<Page>>>,
    blocks: usize,
}

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

/// A buffer that was kept, as it was left.
fn kept(blocks: usize) -> Option<BlockBuf> {
    let pages = KEPT.try_with(|kept| kept.borrow_mut().take(size_of_class(blocks)));
    let pages = pages.ok().flatten()?;
    Some(BlockBuf { pages, blocks })
}

impl Kept {
    fn take(&mut self, size: usize) -> Option<Vec<Page>> {
        let pages = self.by_size.get_mut(&size)?.pop()?;
        self.blocks -= pages.len();
        Some(pages)
    }

    fn keep(&mut self, pages: Vec<Page>) {
        let size = pages.len();
        if size == 0 || size > KEPT_BUFFER_BLOCKS_MAX || size != size_of_class(size) {
            return;
        }
        while self.blocks + size > KEPT_BLOCKS_MAX {
            // What there is most of goes: of sizes that nobody asks for any more, nothing stays for long.
            let most = self.by_size.iter().max_by_key(|(size, pages)| *size * pages.len());
            let (most, _) = most.expect("blocks are kept");
            let most = *most;
            let gone = self.take(most).expect("the size with the most blocks has some");
            drop(gone);
        }
        self.blocks += size;
        self.by_size.entry(size).or_default().push(pages);
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

    #[test]
    fn what_was_dropped_is_used_again_and_zeroes_are_zeroes() {
        let mut buf = BlockBuf::zeroed(33);
        buf.fill(7);
        let at = buf.as_ptr();
        drop(buf.freeze());
        let again = BlockBuf::zeroed(40);
        assert_eq!((again.as_ptr(), again.len()), (at, 40 * BLOCK_BYTES));
        assert!(again.iter().all(|byte| *byte == 0));
        assert_ne!(BlockBuf::zeroed(33).as_ptr(), at, "it is in use");
        drop(again);
        let copy = BlockBuf::copied_from(&[1; 32 * BLOCK_BYTES + 5]);
        assert_eq!(copy.as_ptr(), at);
        assert!(copy[..32 * BLOCK_BYTES + 5].iter().all(|byte| *byte == 1));
        assert!(copy[32 * BLOCK_BYTES + 5..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_thread_keeps_no_more_than_its_bound() {
        let all = |sizes: &[usize]| sizes.iter().map(|size| BlockBuf::zeroed(*size)).collect::<Vec<_>>();
        drop(all(&[1024, 1, 1024, 64, 1000, 2000]));
        let kept = |size| KEPT.with(|kept| kept.borrow().by_size.get(&size).map_or(0, Vec::len));
        let blocks = KEPT.with(|kept| kept.borrow().blocks);
        assert!(blocks <= KEPT_BLOCKS_MAX, "{blocks} blocks");
        assert_eq!((kept(1), kept(64), kept(2000)), (1, 1, 0));
        drop(all(&[16; 200]));
        let (blocks, of_16) = (KEPT.with(|kept| kept.borrow().blocks), kept(16));
        assert!(blocks <= KEPT_BLOCKS_MAX, "{blocks} blocks");
        assert!(of_16 > 50, "those asked for last take over: {of_16}");
    }
}
