//! The space of a device: what is free, what holds data, where the log goes on, and what is not free yet.
//!
//! A block that nobody needs any more becomes free in two steps at least: the change that says so is durable, and no
//! read is in flight that was sent before. Metadata stays until two checkpoints do without it, so that either
//! checkpoint can be recovered from.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::limits::BLOCK_BYTES;

use super::allocator::{Allocator, Bitmap};
use super::limits::MAP_PAGE_BLOCKS;
use super::record::{Extent, LogAhead};

/// All about blocks of the device.
#[derive(Debug)]
pub(super) struct SpaceMap {
    pub(super) allocator: Allocator,
    /// Blocks that the index points to: data, and index pages.
    pub(super) data: Bitmap,
    pub(super) data_blocks: u64,
    /// Those of them that are index pages.
    pub(super) index_blocks: u64,
    /// Pages of `data` that were changed since the last checkpoint began.
    pub(super) dirty_pages: BTreeSet<u32>,
    /// Pages of `data` that the checkpoint being written has yet to encode: unchanged since it began.
    pub(super) frozen_pages: BTreeSet<u32>,
    /// Pages that were encoded and not taken yet.
    encoded: VecDeque<MapPage>,
    /// Where the last checkpoint has the pages of `data`; `None` where no block of a page holds data.
    pub(super) homes: Vec<Option<MapHome>>,
    /// What the last record built says of where the log goes on.
    promised: LogAhead,
    /// Where the next record goes. Taken.
    next: u32,
    /// What is left of the log's run after `next`. Taken.
    run: Extent,
    /// Where the log goes on when the run is used up. Taken; never empty.
    reserved: Extent,
    run_blocks: u32,
    /// Blocks to be freed when no read older than the number is in flight.
    quarantine: VecDeque<(u64, Vec<u32>)>,
    pub(super) quarantined: u64,
}

/// Where the two copies of a page of the free-space map stand, and the CRC of their content. The page is needed by both
/// checkpoints while it is not changed, so one copy would not do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct MapHome {
    pub(super) places: [u32; 2],
    pub(super) crc: u32,
}

/// A page of the free-space map as a checkpoint has it: its CRC and content, unless it is all clear.
pub(super) type MapPage = (u32, Option<(u32, Bytes)>);

impl SpaceMap {
    /// Goes on where the last record said. Nothing of `ahead` may be taken yet. What of its run is taken all the same is
    /// not used for the log; `None` if one of the two places that have to be free is not.
    /// `data_blocks` of `data` are data, the others are index pages.
    pub(super) fn new(
        mut allocator: Allocator,
        (data, data_blocks): (Bitmap, u64),
        homes: Vec<Option<MapHome>>,
        ahead: LogAhead,
        run_blocks: u32,
    ) -> Option<Self> {
        if !allocator.take(ahead.next) || !allocator.take(ahead.next_run) {
            return None;
        }
        let index_blocks = data.count() - data_blocks;
        let run = Extent {
            place: ahead.next + 1,
            count: allocator.extend(ahead.next + 1, ahead.run_left),
        };
        let reserved = Extent {
            place: ahead.next_run,
            count: 1 + allocator.extend(ahead.next_run + 1, run_blocks.saturating_sub(1)),
        };
        Some(SpaceMap {
            allocator,
            data,
            data_blocks,
            index_blocks,
            dirty_pages: BTreeSet::new(),
            frozen_pages: BTreeSet::new(),
            encoded: VecDeque::new(),
            homes,
            promised: ahead,
            next: ahead.next,
            run,
            reserved,
            run_blocks,
            quarantine: VecDeque::new(),
            quarantined: 0,
        })
    }

    /// Blocks that can be taken now.
    pub(super) fn free(&self) -> u64 {
        self.allocator.free() + u64::from(self.run.count) + u64::from(self.reserved.count - 1)
    }

    /// Blocks that the log has taken for what comes next.
    pub(super) fn log_runs(&self) -> [Extent; 3] {
        let next = Extent {
            place: self.next,
            count: 1,
        };
        [next, self.run, self.reserved]
    }

    /// Where the next record goes.
    pub(super) fn next(&self) -> u32 {
        self.next
    }

    /// Where the log goes on after the last record built.
    pub(super) fn ahead(&self) -> LogAhead {
        LogAhead {
            next: self.next,
            run_left: self.run.count,
            next_run: self.reserved.place,
        }
    }

    /// Takes up to `want` blocks for the batch being built: what is left of the run first. Panics if nothing is free:
    /// admission keeps a reserve.
    pub(super) fn take(&mut self, want: u32) -> Extent {
        if self.run.count == 0 {
            return self.take_elsewhere(want);
        }
        let taken = Extent {
            place: self.run.place,
            count: want.min(self.run.count),
        };
        self.run.place += taken.count;
        self.run.count -= taken.count;
        taken
    }

    /// Decides where the record after the one being built goes: in the run while it lasts, else at the start of the
    /// reserved one. The record before the one being built has promised just that, so that recovery knows where to look
    /// when the one being built is damaged.
    pub(super) fn advance(&mut self) -> LogAhead {
        if self.run.count > 0 {
            self.next = self.take(1).place;
        } else {
            self.next = self.reserved.place;
            self.run = tail(self.reserved);
            self.reserved = match self.allocator.take_run(self.run_blocks.max(1)) {
                Some(run) => run,
                None => take_last(&mut self.run, 1),
            };
        }
        let (promised, next) = (self.promised, self.next);
        assert!(
            promised.allows(next),
            "the log goes on at {next}, promised was {promised:?}"
        );
        self.promised = self.ahead();
        self.promised
    }

    /// Takes up to `want` blocks away from the log's run if possible; else from the ends of its runs.
    pub(super) fn take_elsewhere(&mut self, want: u32) -> Extent {
        if let Some(extent) = self.allocator.take_run(want) {
            return extent;
        }
        if self.reserved.count > 1 {
            let want = want.min(self.reserved.count - 1);
            return take_last(&mut self.reserved, want);
        }
        let want = want.min(self.run.count);
        take_last(&mut self.run, want)
    }

    /// These blocks hold data from now on, or do so no more.
    pub(super) fn mark_data(&mut self, places: &[u32], value: bool) {
        places.iter().for_each(|place| self.mark(*place, value));
        let count = places.len() as u64;
        self.data_blocks = if value {
            self.data_blocks + count
        } else {
            self.data_blocks - count
        };
    }

    /// These blocks are given back: of data, or else of index pages. Takes those out that are not in the map, and returns
    /// one of them: two parts of the index have claimed it, and the other one has given it back already.
    pub(super) fn unmark(&mut self, places: &mut Vec<u32>, is_data: bool) -> Option<u32> {
        let mut twice = None;
        places.retain(|place| {
            let is_there = self.data.get(*place);
            if is_there {
                self.mark(*place, false);
            } else {
                twice = Some(*place);
            }
            is_there
        });
        let count = match is_data {
            true => &mut self.data_blocks,
            false => &mut self.index_blocks,
        };
        *count = count.saturating_sub(places.len() as u64);
        twice
    }

    /// These blocks are index pages of the next checkpoint from now on.
    pub(super) fn mark_index(&mut self, places: impl IntoIterator<Item = u32>) {
        for place in places {
            self.mark(place, true);
            self.index_blocks += 1;
        }
    }

    fn mark(&mut self, place: u32, value: bool) {
        let page = map_page(place);
        if self.frozen_pages.remove(&page) {
            self.encode(page);
        }
        let old = self.data.set(place, value);
        assert_ne!(old, value, "block {place} is in the map: {old}, and again");
        self.dirty_pages.insert(page);
    }

    fn encode(&mut self, page: u32) {
        let mut block = BlockBuf::zeroed(1);
        let crc = self.map_page(page, &mut block);
        self.encoded.push_back((page, crc.map(|crc| (crc, block.freeze()))));
    }

    /// Freezes the pages that were changed since the last checkpoint began.
    pub(super) fn freeze(&mut self) {
        assert!(self.frozen_pages.is_empty() && self.encoded.is_empty());
        self.frozen_pages = std::mem::take(&mut self.dirty_pages);
    }

    /// The next page for the checkpoint, as of when that began; `None` if there are no more.
    pub(super) fn encode_next(&mut self) -> Option<MapPage> {
        if self.encoded.is_empty() {
            let page = self.frozen_pages.pop_first()?;
            self.encode(page);
        }
        self.encoded.pop_front()
    }

    /// A copy of this page was found damaged: the next checkpoint writes it anew.
    pub(super) fn rewrite_page(&mut self, page: u32) {
        self.dirty_pages.insert(page);
    }

    /// Pages that the checkpoint has yet to write.
    pub(super) fn frozen_left(&self) -> usize {
        self.frozen_pages.len() + self.encoded.len()
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
        self.allocator.check_invariants();
        let log = [self.run, self.reserved].into_iter();
        for place in log.flat_map(|run| run.place..run.place + run.count).chain([self.next]) {
            assert!(
                self.allocator.is_taken(place),
                "block {place} of the log's runs is free"
            );
            assert!(!self.data.get(place), "block {place} of the log's runs holds data");
        }
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
        assert_eq!(data, self.data_blocks + self.index_blocks, "blocks in the map");
    }
}

/// What follows the first block of a run.
fn tail(run: Extent) -> Extent {
    Extent {
        place: run.place + 1,
        count: run.count - 1,
    }
}

/// Cuts blocks from the end of a run.
fn take_last(run: &mut Extent, count: u32) -> Extent {
    assert!(count > 0 && count <= run.count, "the reserve keeps blocks for the log");
    run.count -= count;
    Extent {
        place: run.place + run.count,
        count,
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

/// Reads a copy of a page of the map into its words; false if it is not what was written. Bits outside of the space must be clear.
pub(super) fn read_map_page(data: &mut Bitmap, page: u32, block: &[u8], crc: u32) -> bool {
    if block.len() != BLOCK_BYTES || crc32fast::hash(block) != crc {
        return false;
    }
    let first = page as usize * (MAP_PAGE_BLOCKS as usize / 64);
    let words = &mut data.words_mut()[first..];
    for (word, bytes) in words.iter_mut().zip(block.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    }
    true
}
