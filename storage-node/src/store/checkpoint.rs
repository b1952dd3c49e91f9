//! Checkpoints: the state as of one commit, written beside the batches that go on.
//!
//! When a checkpoint begins, between two batches, what it has to write is frozen, not copied (see `freeze.rs`; the
//! free-space map does the same). It is then encoded a few blocks at a time: index pages, leaves, map pages, and the root
//! that lists leaves and map pages. The two checkpoint headers alternate, and what the older of the two needs (its
//! metadata, and the log from it on) is kept until the newer one is replaced. So either of the two recovers the same
//! state, and damage to one loses nothing.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use cairn_proto::limits::BLOCK_BYTES;

use super::checkpoint_header::CheckpointHeader;
use super::chunk::{ChunkKey, Home};
use super::directory::{DirectoryWriter, blocks_max};
use super::engine::{Engine, Purpose};
use super::freeze::LeafRef;
use super::limits::RECORD_PAGES_MAX;
use super::record::Extent;
use super::space::MapHome;
use super::superblock::CHECKPOINT_PLACES;

/// A checkpoint being written.
#[derive(Debug)]
pub(super) struct Checkpoint {
    header: CheckpointHeader,
    stage: Stage,
    /// Places for its leaves.
    leaf_places: VecDeque<Extent>,
    /// All leaves as of its commit, those that were changed without their homes.
    leaves: VecDeque<(ChunkKey, LeafRef)>,
    /// The homes of those that were changed.
    homes: BTreeMap<ChunkKey, Home>,
    writer: DirectoryWriter,
    /// Blocks of the root that were encoded.
    directory: Vec<u32>,
    /// Where the next one goes.
    directory_next: Option<u32>,
    /// Pages of the map that were encoded and have no places yet: number, CRC, content.
    map_pages: Vec<(u32, u32, Bytes)>,
    to_write: VecDeque<ToWrite>,
    in_flight: usize,
    blocks: u64,
    /// Metadata of the checkpoint before it that it does without.
    stale: Vec<u32>,
}

/// A block on its way to the device.
#[derive(Debug)]
struct ToWrite {
    place: u32,
    block: Bytes,
    /// It begins a write of its own: what was queued before it must not share one with it.
    apart: bool,
}

/// What is encoded next. Each stage needs what those before it have found out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Pages,
    Leaves,
    Map,
    /// The part of the root that lists leaves.
    ListLeaves,
    /// The part that lists pages of the map, from this one on.
    ListMap(usize),
    /// All is encoded.
    Writing,
    /// All is written: the flush, and then the header.
    Ending,
}

/// What is kept for and between checkpoints.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    /// The last durable one.
    pub(super) sequence: u64,
    /// The last commit that it has.
    pub(super) covered: u64,
    /// Its directory's blocks.
    pub(super) directory: Vec<u32>,
    /// Metadata that the last one has and the next will not.
    pub(super) stale: Vec<u32>,
    /// Metadata that only the one before the last has.
    pub(super) held: Vec<u32>,
    /// Record pages that are not free yet, by commit.
    pub(super) log_pages: VecDeque<(u64, Vec<u32>)>,
    pub(super) log_page_count: u64,
    /// Record pages since the last checkpoint began.
    pub(super) log_pages_since: u64,
    /// The other slot is empty, as it is after opening: the last checkpoint is the only one.
    pub(super) alone: bool,
    /// A request waits for the space that checkpoints give back.
    pub(super) wanted_for_space: bool,
    /// The index takes too much memory, much of it because of changes that no checkpoint has.
    pub(super) wanted_for_memory: bool,
}

impl Checkpoints {
    /// Blocks that become free by the next two checkpoints.
    pub(super) fn to_be_freed(&self) -> u64 {
        self.log_page_count + (self.stale.len() + self.held.len()) as u64
    }
}

/// Blocks for the log that are never given to anything else: a batch's record and what comes after it.
const LOG_RESERVE_BLOCKS: u64 = 2 * RECORD_PAGES_MAX as u64;

/// Blocks of one write of a checkpoint at the most.
const CHECKPOINT_WRITE_BLOCKS_MAX: usize = 64;

/// Pages of the map that are given their places together: so their copies are written in long runs.
const MAP_PAGES_TOGETHER: usize = CHECKPOINT_WRITE_BLOCKS_MAX / 2;

/// Entries of the root that take as long as a block.
const LIST_STEP: usize = 128;

impl Engine {
    /// Blocks that the log and the next checkpoint need, so that they always can be written; and what the one being
    /// written still needs.
    pub(super) fn metadata_reserve(&self) -> u64 {
        let map_pages = self.space.homes.len();
        let index = self.catalog.dirty.len() + self.catalog.dirty_leaves.len();
        // Places of index pages make map pages dirty when the checkpoint begins: perhaps all.
        let waiting = self
            .checkpoint
            .as_ref()
            .map_or(0, |checkpoint| checkpoint.map_pages.len());
        let map = 2 * (map_pages + self.space.frozen_left() + waiting);
        let root = 2 * blocks_max(&self.catalog, map_pages);
        (index + map) as u64 + root + LOG_RESERVE_BLOCKS
    }

    pub(super) fn checkpoint_wanted(&self) -> bool {
        let log_pages = self.checkpoints.log_pages_since;
        log_pages >= self.limits.checkpoint_log_pages
            || (log_pages > 0 && self.space.free() < self.metadata_reserve())
            || self.catalog.dirty.len().max(self.catalog.dirty_leaves.len()) >= self.limits.dirty_pages_max()
            || self.checkpoints.alone
            || self.checkpoints.wanted_for_space
            || self.checkpoints.wanted_for_memory
    }

    /// Begins a checkpoint if it is time. No batch may be in flight.
    pub(super) fn consider_checkpoint(&mut self) {
        assert!(self.batch.is_none(), "a checkpoint begins between batches");
        if self.checkpoint.is_some() || !self.checkpoint_wanted() || !self.opened {
            return;
        }
        self.checkpoints.wanted_for_space = false;
        self.checkpoints.wanted_for_memory = false;
        self.checkpoints.log_pages_since = 0;
        let page_places = self.take_metadata(self.catalog.dirty.len());
        let leaf_places = self.take_metadata(self.catalog.dirty_leaves.len());
        let places = page_places
            .iter()
            .flat_map(|extent| extent.place..extent.place + extent.count);
        self.space.mark_index(places);
        self.space.freeze();
        let mut writer = DirectoryWriter::default();
        writer.catalog(&self.catalog);
        let leaves = self.catalog.freeze(page_places);
        self.checkpoints.stale.append(&mut self.checkpoints.directory);
        let header = CheckpointHeader {
            device: self.identity.device,
            sequence: self.checkpoints.sequence + 1,
            covered: self.log.seq,
            covered_crc: self.log.crc,
            ahead: self.space.ahead(),
            directory: 0,
            directory_blocks: 0,
            seals: self.catalog.seals.len() as u64,
            replicas: self.catalog.replicas.len() as u64,
            leaves: leaves.len() as u64,
            map_pages: 0,
            data_blocks: self.space.data_blocks,
            index_blocks: self.space.index_blocks,
            used_end: self.zero_ahead.used_end.max(self.written_end()),
        };
        self.checkpoint = Some(Box::new(Checkpoint {
            header,
            stage: Stage::Pages,
            leaf_places: leaf_places.into(),
            leaves: leaves.into(),
            homes: BTreeMap::new(),
            writer,
            directory: Vec::new(),
            directory_next: None,
            map_pages: Vec::new(),
            to_write: VecDeque::new(),
            in_flight: 0,
            blocks: 0,
            stale: std::mem::take(&mut self.checkpoints.stale),
        }));
    }

    /// The block after the highest one known to have been written, when zeroes are written ahead.
    fn written_end(&self) -> u64 {
        if self.limits.zero_ahead {
            self.space.allocator.frontier
        } else {
            0
        }
    }

    fn take_metadata(&mut self, count: usize) -> Vec<Extent> {
        let mut extents = Vec::with_capacity(1);
        let mut left = count as u32;
        while left > 0 {
            let extent = self.space.take_elsewhere(left);
            left -= extent.count;
            let end = u64::from(extent.place + extent.count);
            self.zero_ahead.used_end = self.zero_ahead.used_end.max(end);
            extents.push(extent);
        }
        extents
    }

    fn take_one(&mut self) -> u32 {
        self.take_metadata(1)[0].place
    }

    /// Encodes a bit more of the checkpoint: about a block. Returns false when there is nothing left.
    fn encode_step(&mut self, checkpoint: &mut Checkpoint) -> bool {
        match checkpoint.stage {
            Stage::Pages => {
                if !self.catalog.encode_next_page() {
                    checkpoint.stage = Stage::Leaves;
                }
                for (place, block) in self.catalog.frozen.take_encoded() {
                    checkpoint.queue(place, block);
                }
            }
            Stage::Leaves => match self.catalog.encode_next_leaf() {
                Some((key, block, crc)) => {
                    let place = take_first(&mut checkpoint.leaf_places).expect("a place for each leaf");
                    let home = Home { place, crc };
                    checkpoint.homes.insert(key, home);
                    checkpoint.queue(place, block.freeze());
                    if !self.catalog.leaf_encoded(key, home) {
                        self.checkpoints.stale.push(place);
                    }
                }
                None => {
                    // Leaves that had become empty need no place.
                    while let Some(place) = take_first(&mut checkpoint.leaf_places) {
                        self.space.allocator.release(place);
                    }
                    checkpoint.stage = Stage::Map;
                }
            },
            Stage::Map => match self.space.encode_next() {
                Some((page, content)) => {
                    match content {
                        Some((crc, block)) => checkpoint.map_pages.push((page, crc, block)),
                        None => self.set_map_home(checkpoint, page, None),
                    }
                    if checkpoint.map_pages.len() == MAP_PAGES_TOGETHER {
                        self.write_map_pages(checkpoint);
                    }
                }
                None => {
                    self.write_map_pages(checkpoint);
                    checkpoint.stage = Stage::ListLeaves;
                }
            },
            Stage::ListLeaves => {
                let count = checkpoint.leaves.len().min(LIST_STEP);
                for (key, listed) in checkpoint.leaves.drain(..count) {
                    let listed = match listed {
                        LeafRef::Frozen => LeafRef::Stored(checkpoint.homes[&key]),
                        listed => listed,
                    };
                    checkpoint.writer.leaf(key, listed);
                }
                self.write_root(checkpoint, false);
                if checkpoint.leaves.is_empty() {
                    checkpoint.stage = Stage::ListMap(0);
                }
            }
            Stage::ListMap(from) => {
                let to = (from + LIST_STEP).min(self.space.homes.len());
                let homes = (from as u32..).zip(&self.space.homes[from..to]);
                for (page, home) in homes.filter_map(|(page, home)| Some((page, (*home)?))) {
                    checkpoint.writer.map_page(page, home);
                    checkpoint.header.map_pages += 1;
                }
                let end = to == self.space.homes.len();
                self.write_root(checkpoint, end);
                checkpoint.stage = if end { Stage::Writing } else { Stage::ListMap(to) };
            }
            Stage::Writing | Stage::Ending => return false,
        }
        true
    }

    /// Gives the pages of the map that were encoded their places, two for each. No write has both copies of a page: one
    /// that is lost or lands elsewhere leaves the other.
    fn write_map_pages(&mut self, checkpoint: &mut Checkpoint) {
        let pages = std::mem::take(&mut checkpoint.map_pages);
        let mut places: [VecDeque<Extent>; 2] = [(); 2].map(|()| self.take_metadata(pages.len()).into());
        let homes: Vec<[u32; 2]> = pages
            .iter()
            .map(|_| {
                places
                    .each_mut()
                    .map(|places| take_first(places).expect("a place for each page"))
            })
            .collect();
        for copy in 0..2 {
            for (i, (places, (_, _, block))) in homes.iter().zip(&pages).enumerate() {
                checkpoint.to_write.push_back(ToWrite {
                    place: places[copy],
                    block: block.clone(),
                    apart: i == 0,
                });
            }
        }
        for (places, (page, crc, _)) in homes.into_iter().zip(pages) {
            self.set_map_home(checkpoint, page, Some(MapHome { places, crc }));
        }
    }

    fn set_map_home(&mut self, checkpoint: &mut Checkpoint, page: u32, home: Option<MapHome>) {
        let old = std::mem::replace(&mut self.space.homes[page as usize], home);
        checkpoint.stale.extend(old.into_iter().flat_map(|home| home.places));
    }

    /// Encodes the blocks of the root that are complete; at its end, all.
    fn write_root(&mut self, checkpoint: &mut Checkpoint, end: bool) {
        while checkpoint.writer.blocks() > usize::from(!end) {
            let place = checkpoint.directory_next.take().unwrap_or_else(|| self.take_one());
            if !end || checkpoint.writer.blocks() > 1 {
                checkpoint.directory_next = Some(self.take_one());
            }
            let index = checkpoint.directory.len() as u32;
            let next = checkpoint.directory_next.unwrap_or(0);
            let block = checkpoint.writer.encode_first(checkpoint.header.root_of(), index, next);
            checkpoint.queue(place, block);
            checkpoint.directory.push(place);
        }
        checkpoint.header.directory = checkpoint.directory.first().copied().unwrap_or(0);
        checkpoint.header.directory_blocks = checkpoint.directory.len() as u32;
    }

    /// Goes on with the checkpoint: encodes a few blocks and sends them, while not too many writes are in flight.
    pub(super) fn pump_checkpoint(&mut self) {
        let Some(mut checkpoint) = self.checkpoint.take() else {
            return;
        };
        let mut steps = self.limits.checkpoint_step_blocks;
        while checkpoint.in_flight < self.limits.checkpoint_writes_in_flight {
            while steps > 0 && self.encode_step(&mut checkpoint) {
                steps -= 1;
            }
            let Some((place, buffers)) = checkpoint.next_write() else {
                // Nothing of what was encoded has to be written, or nothing is left.
                if steps == 0 && checkpoint.in_flight == 0 && checkpoint.stage != Stage::Ending {
                    steps = 1;
                    continue;
                }
                break;
            };
            checkpoint.in_flight += 1;
            self.write(Purpose::CheckpointWrite, place, buffers);
        }
        let written = checkpoint.stage == Stage::Writing && checkpoint.in_flight == 0 && checkpoint.to_write.is_empty();
        if written {
            checkpoint.stage = Stage::Ending;
        }
        self.checkpoint = Some(checkpoint);
        if written {
            if self.geometry.volatile_cache {
                self.flush(Purpose::CheckpointFlush);
            } else {
                self.checkpoint_flushed();
            }
        }
    }

    fn current_checkpoint(&mut self) -> &mut Checkpoint {
        self.checkpoint.as_mut().expect("a checkpoint is being written")
    }

    pub(super) fn checkpoint_write_done(&mut self) {
        self.current_checkpoint().in_flight -= 1;
    }

    /// All that the header will point to is durable.
    pub(super) fn checkpoint_flushed(&mut self) {
        let header = self.current_checkpoint().header;
        let place = CHECKPOINT_PLACES[header.slot()].0 as u32;
        self.write(Purpose::HeaderWrite, place, vec![header.encode()]);
    }

    pub(super) fn header_written(&mut self) {
        if self.geometry.volatile_cache {
            self.flush(Purpose::HeaderFlush);
        } else {
            self.checkpoint_durable();
        }
    }

    /// The checkpoint counts. What only the one before the last needed is free.
    pub(super) fn checkpoint_durable(&mut self) {
        let checkpoint = *self.checkpoint.take().expect("a checkpoint was being written");
        let last = &mut self.checkpoints;
        let mut free = std::mem::replace(&mut last.held, checkpoint.stale);
        while last.log_pages.front().is_some_and(|(seq, _)| *seq <= last.covered) {
            let (_, pages) = last.log_pages.pop_front().expect("it has a front");
            last.log_page_count -= pages.len() as u64;
            free.extend(pages);
        }
        last.sequence = checkpoint.header.sequence;
        last.covered = checkpoint.header.covered;
        last.directory = checkpoint.directory;
        last.alone = false;
        self.catalog.checkpoint_stored();
        self.reclaim.stuck = None;
        let after = self.reads.next_number();
        self.space.free_after(after, free);
        self.io.counters.checkpoints += 1;
        self.io.counters.checkpoint_blocks += checkpoint.blocks + 1;
        self.move_checkpoint_stored();
    }
}

impl Checkpoint {
    fn queue(&mut self, place: u32, block: Bytes) {
        self.to_write.push_back(ToWrite {
            place,
            block,
            apart: false,
        });
    }

    /// The next write: blocks that follow each other.
    fn next_write(&mut self) -> Option<(u32, Vec<Bytes>)> {
        let ToWrite { place, block, .. } = self.to_write.pop_front()?;
        let mut buffers = vec![block];
        while buffers.len() < CHECKPOINT_WRITE_BLOCKS_MAX {
            match self.to_write.front() {
                Some(next) if !next.apart && next.place == place + buffers.len() as u32 => {}
                _ => break,
            }
            buffers.extend(self.to_write.pop_front().map(|next| next.block));
        }
        debug_assert!(buffers.iter().all(|block| block.len() == BLOCK_BYTES));
        self.blocks += buffers.len() as u64;
        Some((place, buffers))
    }
}

/// The first place of these extents, taken out of them.
pub(super) fn take_first(extents: &mut VecDeque<Extent>) -> Option<u32> {
    let extent = extents.front_mut()?;
    let place = extent.place;
    extent.place += 1;
    extent.count -= 1;
    if extent.count == 0 {
        extents.pop_front();
    }
    Some(place)
}
