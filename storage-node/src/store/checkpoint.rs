//! Checkpoints: the state as of one commit, written beside the batches that go on.
//!
//! What a checkpoint writes is copied when it begins, between two batches; later batches do not leak into it. The two
//! checkpoint headers alternate, and what the older of the two needs (its metadata, and the log from it on) is kept
//! until the newer one is replaced. So either of the two recovers the same state, and damage to one loses nothing.

use std::collections::VecDeque;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::limits::BLOCK_BYTES;

use super::checkpoint_header::CheckpointHeader;
use super::chunk::{Home, Page, PageKey, Resident};
use super::directory::{DirectoryWriter, blocks_max};
use super::engine::{Engine, Purpose};
use super::limits::RECORD_PAGES_MAX;
use super::superblock::CHECKPOINT_PLACES;

/// A checkpoint being written.
#[derive(Debug)]
pub(super) struct Checkpoint {
    header: CheckpointHeader,
    directory: Vec<u32>,
    to_write: VecDeque<(u32, Bytes)>,
    in_flight: usize,
    blocks: u64,
    /// Metadata of the checkpoint before it that it does without.
    stale: Vec<u32>,
    flushing: bool,
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
    /// A request waits for the space that checkpoints give back.
    pub(super) wanted_for_space: bool,
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
const CHECKPOINT_WRITE_BLOCKS_MAX: u32 = 64;

impl Engine {
    /// Blocks that the log and the next checkpoint need, so that they always can be written.
    pub(super) fn metadata_reserve(&self) -> u64 {
        let map_pages = self.space.homes.len();
        let dirty = (self.catalog.dirty.len() + self.space.dirty_pages.len()) as u64;
        dirty + 2 * blocks_max(&self.catalog, map_pages) + LOG_RESERVE_BLOCKS
    }

    pub(super) fn checkpoint_wanted(&self) -> bool {
        let log_pages = self.checkpoints.log_pages_since;
        log_pages >= self.limits.checkpoint_log_pages
            || (log_pages > 0 && self.space.free() < self.metadata_reserve())
            || self.catalog.dirty.len() >= self.limits.checkpoint_dirty_pages
            || self.checkpoints.wanted_for_space
    }

    /// Begins a checkpoint if it is time. No batch may be in flight.
    pub(super) fn consider_checkpoint(&mut self) {
        assert!(self.batch.is_none(), "a checkpoint begins between batches");
        if self.checkpoint.is_some() || !self.checkpoint_wanted() || !self.opened {
            return;
        }
        self.checkpoints.wanted_for_space = false;
        self.checkpoints.log_pages_since = 0;
        let sequence = self.checkpoints.sequence + 1;
        let mut to_write = VecDeque::new();
        self.snapshot_index(&mut to_write);
        self.snapshot_map(&mut to_write);
        let mut writer = DirectoryWriter::default();
        writer.catalog(&self.catalog);
        let homes = (0..).zip(&self.space.homes);
        homes.for_each(|(page, home)| home.iter().for_each(|home| writer.map_page(page, *home)));
        let directory = self.take_metadata(writer.blocks());
        let blocks = writer.finish(self.identity.device, sequence, &directory);
        to_write.extend(directory.iter().copied().zip(blocks));
        self.checkpoints.stale.append(&mut self.checkpoints.directory);
        let header = CheckpointHeader {
            device: self.identity.device,
            sequence,
            covered: self.log.seq,
            covered_crc: self.log.crc,
            ahead: self.space.ahead(),
            directory: directory.first().copied().unwrap_or(0),
            directory_blocks: directory.len() as u32,
            seals: self.catalog.seals.len() as u64,
            replicas: self.catalog.replicas.len() as u64,
            chunks: self.catalog.chunks.len() as u64,
            map_pages: self.space.homes.iter().flatten().count() as u64,
            data_blocks: self.space.data_blocks,
            used_end: self.zero_ahead.used_end.max(self.written_end()),
        };
        self.checkpoint = Some(Box::new(Checkpoint {
            header,
            directory,
            blocks: to_write.len() as u64,
            to_write,
            in_flight: 0,
            stale: std::mem::take(&mut self.checkpoints.stale),
            flushing: false,
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

    fn take_metadata(&mut self, count: usize) -> Vec<u32> {
        let mut places = Vec::with_capacity(count);
        while places.len() < count {
            let extent = self.space.take_elsewhere((count - places.len()) as u32);
            places.extend(extent.place..extent.place + extent.count);
        }
        if let Some(highest) = places.iter().max() {
            self.zero_ahead.used_end = self.zero_ahead.used_end.max(u64::from(*highest) + 1);
        }
        places
    }

    fn snapshot_index(&mut self, to_write: &mut VecDeque<(u32, Bytes)>) {
        let keys = std::mem::take(&mut self.catalog.dirty);
        let places = self.take_metadata(keys.len());
        let mut buffer = BlockBuf::zeroed(keys.len());
        for ((key, place), block) in keys.iter().zip(&places).zip(buffer.chunks_exact_mut(BLOCK_BYTES)) {
            let page = resident_mut(&mut self.catalog, key);
            let crc = page.encode(block);
            page.dirty = false;
            let old = page.home.replace(Home { place: *place, crc });
            self.checkpoints.stale.extend(old.map(|home| home.place));
        }
        push_blocks(to_write, &places, buffer.freeze());
    }

    fn snapshot_map(&mut self, to_write: &mut VecDeque<(u32, Bytes)>) {
        let pages = std::mem::take(&mut self.space.dirty_pages);
        for page in pages {
            let mut block = BlockBuf::zeroed(1);
            let crc = self.space.map_page(page, &mut block);
            let home = crc.map(|crc| Home {
                place: self.take_metadata(1)[0],
                crc,
            });
            let old = std::mem::replace(&mut self.space.homes[page as usize], home);
            self.checkpoints.stale.extend(old.map(|home| home.place));
            if let Some(home) = home {
                push_blocks(to_write, &[home.place], block.freeze());
            }
        }
    }

    /// Sends what the checkpoint has to write, a few writes at a time.
    pub(super) fn pump_checkpoint(&mut self) {
        let Some(mut checkpoint) = self.checkpoint.take() else {
            return;
        };
        while checkpoint.in_flight < self.limits.checkpoint_writes_in_flight {
            let Some((place, first)) = checkpoint.to_write.pop_front() else {
                break;
            };
            let mut end = place + (first.len() / BLOCK_BYTES) as u32;
            let mut buffers = vec![first];
            while let Some((next, buffer)) = checkpoint.to_write.front() {
                let blocks = (buffer.len() / BLOCK_BYTES) as u32;
                if *next != end || end + blocks - place > CHECKPOINT_WRITE_BLOCKS_MAX {
                    break;
                }
                end += blocks;
                buffers.extend(checkpoint.to_write.pop_front().map(|(_, buffer)| buffer));
            }
            checkpoint.in_flight += 1;
            self.write(Purpose::CheckpointWrite, place, buffers);
        }
        let written = checkpoint.in_flight == 0 && checkpoint.to_write.is_empty();
        let begin_flush = written && !checkpoint.flushing;
        checkpoint.flushing |= written;
        self.checkpoint = Some(checkpoint);
        if begin_flush {
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
        let after = self.reads.next_number();
        self.space.free_after(after, free);
        self.io.counters.checkpoints += 1;
        self.io.counters.checkpoint_blocks += checkpoint.blocks + 1;
    }
}

fn resident_mut<'a>(catalog: &'a mut super::catalog::Catalog, key: &PageKey) -> &'a mut Resident {
    let chunk = catalog.chunks.get_mut(&key.chunk).expect("a dirty page has a chunk");
    match chunk.pages.get_mut(&key.page) {
        Some(Page::Resident(page)) => page,
        other => panic!("{key:?} is dirty and in memory, not {other:?}"),
    }
}

/// Blocks of one buffer with their places, each run of places as one write.
fn push_blocks(to_write: &mut VecDeque<(u32, Bytes)>, places: &[u32], content: Bytes) {
    let mut first = 0;
    while first < places.len() {
        let max = (places.len() - first).min(CHECKPOINT_WRITE_BLOCKS_MAX as usize);
        let run = (0..max)
            .take_while(|i| places[first + i] == places[first] + *i as u32)
            .count();
        let bytes = content.slice(first * BLOCK_BYTES..(first + run) * BLOCK_BYTES);
        to_write.push_back((places[first], bytes));
        first += run;
    }
}
