//! Reads of blocks. They see what is durable.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use cairn_proto::block::{BlockState, Content};
use cairn_proto::checksum::block_checksum;
use cairn_proto::disk::DiskError;
use cairn_proto::ids::{GroupId, Layer};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::units::BlockRange;

use super::api::{StoreError, StoreReply, Ticket};
use super::batch::target;
use super::catalog::Unknown;
use super::chunk::ChunkKey;
use super::collect::CollectRequest;
use super::engine::{Engine, Purpose};
use super::limits::{DAMAGED_KNOWN_MAX, REQUEST_BLOCKS_MAX};
use super::load::For;
use super::record::Target;

/// Reads in flight, numbered in the order in which they were sent: a block that was given back is not reused before all
/// earlier reads have completed.
#[derive(Debug, Default)]
pub(super) struct Reads {
    next: u64,
    numbers: BTreeSet<u64>,
    in_flight: BTreeMap<u64, ReadInFlight>,
    /// Those that wait for index pages.
    waiting: VecDeque<Waiting>,
}

#[derive(Clone, Debug)]
enum Waiting {
    Read(Ticket, Target),
    Collect(Ticket, CollectRequest),
}

#[derive(Debug)]
struct ReadInFlight {
    ticket: Ticket,
    at: Target,
    blocks: Vec<BlockState>,
    pieces: Vec<Piece>,
    /// Device reads of it that are in flight.
    left: usize,
}

/// Blocks that follow each other on the device.
#[derive(Debug)]
struct Piece {
    /// The block of the range that each is.
    indices: Vec<u32>,
    /// Where the first one stands.
    place: u32,
    content: Found,
}

/// What came of a piece.
#[derive(Debug)]
enum Found {
    Nothing,
    Whole(Bytes),
    /// Read one by one, as the whole could not be read; `None` for those that can't be read either.
    Blocks(Vec<Option<Bytes>>),
}

impl Reads {
    /// The number that the next read gets.
    pub(super) fn next_number(&self) -> u64 {
        self.next
    }

    /// All reads with a lower number have completed.
    pub(super) fn oldest(&self) -> u64 {
        self.numbers.first().copied().unwrap_or(self.next)
    }

    pub(super) fn begin(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.numbers.insert(number);
        number
    }

    pub(super) fn end(&mut self, number: u64) {
        assert!(self.numbers.remove(&number), "read {number} is in flight");
    }
}

impl Engine {
    pub(super) fn submit_read(&mut self, ticket: Ticket, group: GroupId, layer: Layer, range: BlockRange) {
        if range.count() > REQUEST_BLOCKS_MAX {
            return self.fail(ticket, StoreError::Invalid("a read has at most 256 blocks"));
        }
        self.try_or_wait(Waiting::Read(ticket, target(group, layer, range)));
    }

    pub(super) fn wait_collect(&mut self, ticket: Ticket, request: CollectRequest) {
        self.try_or_wait(Waiting::Collect(ticket, request));
    }

    fn try_or_wait(&mut self, mut waiting: Waiting) {
        if self.try_waiting(&mut waiting) {
            return;
        }
        if self.reads.waiting.len() >= self.limits.queued_requests_max {
            let (Waiting::Read(ticket, _) | Waiting::Collect(ticket, _)) = waiting;
            return self.fail(ticket, StoreError::Busy);
        }
        self.reads.waiting.push_back(waiting);
    }

    /// Index pages have come: tries all that wait for some.
    pub(super) fn retry_waiting(&mut self) {
        self.loads.pinned_for_reads.clear();
        for mut waiting in std::mem::take(&mut self.reads.waiting) {
            if !self.try_waiting(&mut waiting) {
                self.reads.waiting.push_back(waiting);
            }
        }
    }

    fn try_waiting(&mut self, waiting: &mut Waiting) -> bool {
        match waiting {
            Waiting::Read(ticket, at) => self.try_read(*ticket, *at),
            Waiting::Collect(ticket, request) => self.try_collect(*ticket, request),
        }
    }

    /// Returns whether the read was sent or answered; else it waits for index pages.
    fn try_read(&mut self, ticket: Ticket, at: Target) -> bool {
        if !self.catalog.replicas.contains_key(&at.group) {
            self.fail(ticket, StoreError::NoReplica);
            return true;
        }
        if self.catalog.is_doomed(&at.key()) {
            let blocks = vec![BlockState::ABSENT; at.range.count() as usize];
            let bytes = Vec::new();
            self.io.reply(ticket, StoreReply::Read { blocks, bytes });
            return true;
        }
        let unknown: Vec<Unknown> = self.catalog.unknown(at.key(), at.range).collect();
        if unknown.contains(&Unknown::Broken) {
            self.fail(ticket, StoreError::IndexDamaged);
            return true;
        }
        match self.load_all(unknown, For::Read) {
            Err(error) => {
                self.fail(ticket, StoreError::Unreadable(error));
                return true;
            }
            Ok(true) => {}
            Ok(false) => {
                self.loads.pinned_for_reads.extend(at.pages());
                return false;
            }
        }
        self.catalog.touch(at.key(), at.range);
        let mut blocks = Vec::with_capacity(at.range.count() as usize);
        let mut pieces: Vec<(u32, Vec<u32>)> = Vec::new();
        for (index, entry) in (0..).zip(self.catalog.entries(at.key(), at.range)) {
            blocks.push(entry.state());
            let Some(place) = entry.data_place() else { continue };
            match pieces.last_mut() {
                Some((first, indices)) if *first + indices.len() as u32 == place => indices.push(index),
                _ => pieces.push((place, vec![index])),
            }
        }
        if pieces.is_empty() {
            let bytes = Vec::new();
            self.io.reply(ticket, StoreReply::Read { blocks, bytes });
            return true;
        }
        self.send_read(ticket, at, blocks, pieces);
        true
    }

    fn send_read(&mut self, ticket: Ticket, at: Target, blocks: Vec<BlockState>, pieces: Vec<(u32, Vec<u32>)>) {
        let number = self.reads.begin();
        let left = pieces.len();
        let pieces = pieces.into_iter().enumerate().map(|(i, (place, indices))| {
            self.io.counters.blocks_read += indices.len() as u64;
            let token = self.io.read(place, indices.len() as u32);
            self.in_flight.insert(token, Purpose::Read(number, i));
            Piece {
                indices,
                place,
                content: Found::Nothing,
            }
        });
        let pieces = pieces.collect();
        let read = ReadInFlight {
            ticket,
            at,
            blocks,
            pieces,
            left,
        };
        self.reads.in_flight.insert(number, read);
    }

    /// A piece of a read has come. One that fails is tried again block by block: a bad sector takes nothing with it.
    pub(super) fn read_done(&mut self, number: u64, piece: usize, result: Result<Bytes, DiskError>) {
        let read = self.reads.in_flight.get_mut(&number).expect("the read is in flight");
        let first = &mut read.pieces[piece];
        let count = first.indices.len();
        match result {
            Ok(content) => {
                assert_eq!(content.len(), count * BLOCK_BYTES, "bytes of a read of {count} blocks");
                first.content = Found::Whole(content);
                read.left -= 1;
            }
            Err(_) if count > 1 => {
                first.content = Found::Blocks(vec![None; count]);
                read.left += count - 1;
                for block in 0..count {
                    let token = self.io.read(first.place + block as u32, 1);
                    self.in_flight.insert(token, Purpose::ReadBlock(number, piece, block));
                }
            }
            Err(_) => {
                first.content = Found::Blocks(vec![None]);
                read.left -= 1;
            }
        }
        self.end_read(number);
    }

    /// A block of a piece that failed as a whole has come, or can't be read on its own either.
    pub(super) fn read_block_done(
        &mut self,
        number: u64,
        piece: usize,
        block: usize,
        result: Result<Bytes, DiskError>,
    ) {
        let read = self.reads.in_flight.get_mut(&number).expect("the read is in flight");
        read.left -= 1;
        let Found::Blocks(blocks) = &mut read.pieces[piece].content else {
            panic!("piece {piece} of read {number} is read block by block");
        };
        blocks[block] = result.ok();
        self.end_read(number);
    }

    fn end_read(&mut self, number: u64) {
        if self.reads.in_flight[&number].left == 0 {
            let read = self.reads.in_flight.remove(&number).expect("it is there");
            self.reads.end(number);
            self.answer_read(read);
        }
    }

    fn answer_read(&mut self, mut read: ReadInFlight) {
        let mut bytes = Vec::with_capacity(read.pieces.len());
        for piece in &read.pieces {
            let mut good: Option<Bytes> = None;
            for (i, index) in piece.indices.iter().enumerate() {
                let block = piece.block(i);
                let state = &mut read.blocks[*index as usize];
                let volume_block = read.at.range.volume_block(*index);
                let intact = block.as_ref().is_some_and(|block| {
                    state.content == Content::Data(block_checksum(read.at.group.volume, volume_block, block))
                });
                match (good.take(), block.filter(|_| intact)) {
                    (None, block) => good = block,
                    (Some(before), Some(block)) => match piece.joined(&before, &block) {
                        Some(both) => good = Some(both),
                        None => {
                            bytes.push(before);
                            good = Some(block);
                        }
                    },
                    (Some(before), None) => bytes.push(before),
                }
                if !intact {
                    state.content = Content::Damaged;
                    let (key, block) = (read.at.key(), read.at.range.start() + index);
                    // What was overwritten meanwhile is nobody's any more.
                    if self
                        .entry_now(key, block)
                        .is_none_or(|now| now.version == state.version)
                    {
                        self.note_damaged(key, block);
                    }
                } else if !self.damaged.is_empty() {
                    // Its sector can be read again.
                    self.damaged.remove(&(read.at.key(), read.at.range.start() + index));
                }
            }
            bytes.extend(good);
        }
        let blocks = read.blocks;
        self.io.reply(read.ticket, StoreReply::Read { blocks, bytes });
    }

    /// A block's data is not what the index says, or can't be read.
    pub(super) fn note_damaged(&mut self, key: ChunkKey, block: u32) {
        self.io.counters.blocks_damaged += 1;
        if self.damaged.len() >= DAMAGED_KNOWN_MAX {
            self.damaged.clear();
        }
        self.damaged.insert((key, block));
    }
}

impl Piece {
    /// The content of its block `i`; `None` if it can't be read.
    fn block(&self, i: usize) -> Option<Bytes> {
        match &self.content {
            Found::Nothing => unreachable!("a read is answered when all of it has come"),
            Found::Whole(content) => Some(content.slice(i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES)),
            Found::Blocks(blocks) => blocks[i].clone(),
        }
    }

    /// Two buffers of it as one, if the second follows the first in memory.
    fn joined(&self, first: &Bytes, second: &Bytes) -> Option<Bytes> {
        let Found::Whole(content) = &self.content else {
            return None;
        };
        let start = first.as_ptr() as usize - content.as_ptr() as usize;
        (first.as_ptr() as usize + first.len() == second.as_ptr() as usize)
            .then(|| content.slice(start..start + first.len() + second.len()))
    }
}
