//! The space of a device: what is free, what holds data, where the log goes on, and what is not free yet.
//!
//! A block that nobody needs any more becomes free in two steps at least: the change that says so is durable, and no
//! read is in flight that was sent before. Metadata stays until two checkpoints do without it, so that either
//! checkpoint can be recovered from.

use std::collections::{BTreeSet, VecDeque};

use cairn_proto::limits::BLOCK_BYTES;

use super::allocator::{Allocator, Bitmap};
use super::chunk::Home;
use super::limits::MAP_PAGE_BLOCKS;
use super::record::Extent;

/// All about blocks of the device.
#[derive(Debug)]
pub(super) struct SpaceMap {
    pub(super) allocator: Allocator,
    /// Blocks that the index points to.
    pub(super) data: Bitmap,
    pub(super) data_blocks: u64,
    /// Pages of `data` that differ from the last checkpoint.
    pub(super) dirty_pages: BTreeSet<u32>,
    /// Where the last checkpoint has the pages of `data`; `None` where no block of a page holds data.
    pub(super) homes: Vec<Option<Home>>,
    /// Where the next record goes. Taken.
    pub(super) next: u32,
    /// What is left of the log's run after `next`. Taken.
    run: Extent,
    run_blocks: u32,
    /// Blocks to be freed when no read older than the number is in flight.
    quarantine: VecDeque<(u64, Vec<u32>)>,
    pub(super) quarantined: u64,
}

impl SpaceMap {
    /// `next` must be taken already.
    pub(super) fn new(
        allocator: Allocator,
        data: Bitmap,
        homes: Vec<Option<Home>>,
        next: u32,
        run_blocks: u32,
    ) -> Self {
        let data_blocks = data.words().iter().map(|word| u64::from(word.count_ones())).sum();
        let mut space = SpaceMap {
            allocator,
            data,
            data_blocks,
            dirty_pages: BTreeSet::new(),
            homes,
            next,
            run: Extent {
                place: next + 1,
                count: 0,
            },
            run_blocks,
            quarantine: VecDeque::new(),
            quarantined: 0,
        };
        space.run.count = space.allocator.extend(next + 1, run_blocks);
        space
    }

    /// Blocks that can be taken now.
    pub(super) fn free(&self) -> u64 {
        self.allocator.free() + u64::from(self.run.count)
    }

    /// Takes up to `want` blocks for the log or its data: what is left of the run first, then a new run. Panics if
    /// nothing is free: admission keeps a reserve.
    pub(super) fn take(&mut self, want: u32) -> Extent {
        if self.run.count == 0 {
            let want = self.run_blocks.max(1);
            self.run = self
                .allocator
                .take_run(want)
                .expect("the reserve keeps blocks for the log");
        }
        let taken = Extent {
            place: self.run.place,
            count: want.min(self.run.count),
        };
        self.run.place += taken.count;
        self.run.count -= taken.count;
        taken
    }

    /// Decides where the record after the one being built goes.
    pub(super) fn choose_next(&mut self) -> u32 {
        self.next = self.take(1).place;
        self.next
    }

    /// Takes up to `want` blocks for a checkpoint, away from the log's run if possible.
    pub(super) fn take_metadata(&mut self, want: u32) -> Extent {
        match self.allocator.take_run(want) {
            Some(extent) => extent,
            None => self.take(want),
        }
    }

    /// These blocks hold data from now on.
    pub(super) fn mark_data(&mut self, places: &[u32], value: bool) {
        for place in places {
            let old = self.data.set(*place, value);
            assert_ne!(old, value, "block {place} is data: {old}, and again");
            self.dirty_pages.insert(map_page(*place));
        }
        let count = places.len() as u64;
        self.data_blocks = if value {
            self.data_blocks + count
        } else {
            self.data_blocks - count
        };
    }

    /// Nobody needs these blocks any more, but reads before `read` may be on their way to them.
    pub(super) fn free_after(&mut self, read: u64, places: Vec<u32>) {
        if !places.is_empty() {
            self.quarantined += places.len() as u64;
            self.quarantine.push_back((read, places));
        }
    }

    /// All reads before `read` have completed.
    pub(super) fn reads_done(&mut self, read: u64) {
        while self.quarantine.front().is_some_and(|(before, _)| *before <= read) {
            let (_, places) = self.quarantine.pop_front().expect("it has a front");
            self.quarantined -= places.len() as u64;
            places.into_iter().for_each(|place| self.allocator.release(place));
        }
    }

    /// A page of the free-space map as it stands on the device; `None` if no block of it holds data.
    pub(super) fn map_page(&self, page: u32, block: &mut [u8]) -> Option<u32> {
        let words = MAP_PAGE_BLOCKS as usize / 64;
        let first = page as usize * words;
        let content = &self.data.words()[first..(first + words).min(self.data.words().len())];
        if content.iter().all(|word| *word == 0) {
            return None;
        }
        block.fill(0);
        for (bytes, word) in block.chunks_exact_mut(8).zip(content) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Some(crc32fast::hash(block))
    }

    /// Panics if a block is counted twice, or data stands on a free block.
    pub(super) fn check_invariants(&self) {
        assert!(self.allocator.is_taken(self.next), "the next record's place is taken");
        let mut data = 0;
        for (word, bits) in self.data.words().iter().enumerate() {
            data += u64::from(bits.count_ones());
            let mut bits = *bits;
            while bits != 0 {
                let place = word as u32 * 64 + bits.trailing_zeros();
                assert!(self.allocator.is_taken(place), "block {place} holds data and is free");
                bits &= bits - 1;
            }
        }
        assert_eq!(data, self.data_blocks, "blocks that hold data");
    }
}

/// Pages that the free-space map of a device has.
pub(super) fn map_pages(blocks: u64) -> usize {
    blocks.div_ceil(MAP_PAGE_BLOCKS) as usize
}

/// The page of the free-space map that describes a block.
pub(super) fn map_page(place: u32) -> u32 {
    place / MAP_PAGE_BLOCKS as u32
}

/// Reads a page of the map into its words. Bits outside of the space must be clear.
pub(super) fn read_map_page(data: &mut Bitmap, page: u32, block: &[u8], home: Home) -> bool {
    if block.len() != BLOCK_BYTES || crc32fast::hash(block) != home.crc {
        return false;
    }
    let first = page as usize * (MAP_PAGE_BLOCKS as usize / 64);
    let words = &mut data.words_mut()[first..];
    for (word, bytes) in words.iter_mut().zip(block.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    }
    true
}
