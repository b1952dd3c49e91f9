//! Opening a device: superblocks, the newest checkpoint, and the log from it on.
//!
//! It only reads. A record is believed when the record after it is there, for only one batch was ever in flight. The
//! last one is believed if all of its data is: it may be a batch that was being written when power failed. Then it was
//! not acknowledged, and all of it is dropped.

mod log;
mod reads;
mod sweep;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::collections::Map;
use cairn_proto::disk::{DiskDone, DiskGeometry};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;

use self::log::{After, DataBlock, LogPlace, LogRead, ReadRecord, Wanted};
use self::reads::{BlockRead, ReadSet};
use self::sweep::Sweep;
use super::allocator::{Allocator, Bitmap};
use super::catalog::{Catalog, Effects};
use super::checkpoint::Checkpoints;
use super::checkpoint_header::CheckpointHeader;
use super::chunk::ChunkKey;
use super::directory::{DirectoryEntry, decode_block};
use super::engine::{Engine, LogPosition};
use super::io::Io;
use super::leaf::{Leaf, LeafState};
use super::limits::{DEVICE_BLOCKS_MAX, REPLAY_READ_PAUSES, StoreLimits};
use super::mend::Mends;
use super::record::{BatchHeader, LogAhead, Record};
use super::space::{MapHome, SpaceMap, map_pages, read_map_page};
use super::status::{LostParts, OpenError, OpenExpectation, Progress};
use super::superblock::{CHECKPOINT_PLACES, Identity, PROBE_BLOCKS, Probe, SPACE_START, Superblock, is_damaged, probe};
use super::zero_ahead::ZeroAhead;

/// A store that is being opened.
#[derive(Debug)]
pub(super) struct Recovery {
    expect: OpenExpectation,
    geometry: DiskGeometry,
    limits: StoreLimits,
    pub(super) io: Io,
    pub(super) progress: Progress,
    pub(super) identity: Option<Identity>,
    reads: ReadSet,
    phase: Phase,
    retry: Retry,
    /// Checkpoints that may be tried yet, the next one last.
    candidates: Vec<CheckpointHeader>,
    /// Whether the slots hold anything.
    slots_used: [bool; 2],
    /// Whether blocks that nobody needs are looked for.
    sweeps: bool,
    /// Superblock copies that are to be written anew.
    mends: Vec<(u32, Bytes)>,
    loaded: Loaded,
}

/// What was read of a checkpoint, and of the log after it.
#[derive(Debug)]
struct Loaded {
    header: Option<CheckpointHeader>,
    catalog: Catalog,
    /// Blocks of data and index pages.
    data: Bitmap,
    data_blocks: u64,
    /// The leaf that the root listed last.
    last_leaf: Option<ChunkKey>,
    leaves: u64,
    /// A page or leaf was found broken while the log was read: what it gave back is not known.
    index_lost: bool,
    lost_parts: LostParts,
    homes: Vec<Option<MapHome>>,
    directory: Vec<u32>,
    /// Blocks of metadata of the checkpoint.
    metadata: Vec<u32>,
    /// Where the log is read on.
    place: LogPlace,
    log: LogRead,
    log_pages: Vec<(u64, Vec<u32>)>,
    stale: Vec<u32>,
    dirty_map: BTreeSet<u32>,
    /// Copies of pages of the map that are not what was written, though the other ones are.
    map_copies_damaged: u64,
}

/// Parts of the index that replay needs and the device failed to read. To go on without one is to lose all that it points to,
/// for good, though the device may be able to read it a moment later: so they are tried again.
#[derive(Debug)]
struct Retry {
    pauses: &'static [Duration],
    /// How often the parts that are wanted now were tried again.
    tries: usize,
    /// When they are tried next.
    at: Option<Time>,
}

#[derive(Debug)]
enum Phase {
    Superblocks,
    /// The last superblock copy, where it is not at the end of the device.
    LastCopy(Superblock),
    Directory,
    /// First copies of all pages of the map, then the second ones.
    Map(Vec<(u32, MapHome)>),
    RecordFirst,
    RecordRest(Vec<u32>, Bytes),
    /// Leaves and index pages for records that are to be applied.
    Pages(Vec<Wanted>, VecDeque<ReadRecord>, After),
    /// The places where a record may stand that was written after a damaged one.
    Beyond,
    LastData(Vec<DataBlock>),
    /// Blocks that nobody needs are looked for.
    Sweep(Box<Sweep>),
}

/// What opening has come to.
pub(super) enum Outcome {
    Working,
    Refused(OpenError),
    /// The engine, and the checkpoint slot to be erased.
    Ready(Box<Engine>, Option<u32>),
}

impl Recovery {
    pub(super) fn new(expect: OpenExpectation, geometry: DiskGeometry, limits: StoreLimits) -> Recovery {
        let mut recovery = Recovery {
            expect,
            geometry,
            io: Io::default(),
            progress: Progress::default(),
            identity: None,
            reads: ReadSet::default(),
            phase: Phase::Superblocks,
            retry: Retry {
                pauses: &REPLAY_READ_PAUSES,
                tries: 0,
                at: None,
            },
            candidates: Vec::new(),
            slots_used: [false; 2],
            sweeps: true,
            mends: Vec::new(),
            loaded: Loaded::empty(0, &limits),
            limits,
        };
        if geometry.blocks >= super::limits::DEVICE_BLOCKS_MIN {
            let last = geometry.blocks.min(DEVICE_BLOCKS_MAX) - 1;
            let first = 0..u64::from(PROBE_BLOCKS);
            recovery.read(first.chain([last]).collect());
        }
        recovery
    }

    /// The same for a look at a device: what is in the free-space map stays there, and what can't be read is not waited for.
    pub(super) fn for_a_look(mut self) -> Recovery {
        self.sweeps = false;
        self.retry.pauses = &[];
        self
    }

    /// A device too short to have been formatted.
    pub(super) fn refused_at_once(&self) -> Option<OpenError> {
        (self.geometry.blocks < super::limits::DEVICE_BLOCKS_MIN).then_some(OpenError::Length {
            blocks: self.geometry.blocks,
        })
    }

    fn read(&mut self, places: Vec<u64>) {
        self.reads = ReadSet::new(places);
        self.send_reads();
    }

    fn send_reads(&mut self) {
        self.reads.send(&mut self.io, self.limits.recovery_reads_in_flight);
    }

    pub(super) fn handle_disk(&mut self, now: Time, done: DiskDone) -> Outcome {
        self.reads.done(done.token.0, done.result);
        self.send_reads();
        if self.tries_again(now) {
            return Outcome::Working;
        }
        // A step that wants no reads is followed by the next at once.
        while let Some(results) = self.reads.take() {
            match self.step(results) {
                Ok(Some(outcome)) => return outcome,
                Ok(None) => {}
                Err(error) => return Outcome::Refused(error),
            }
        }
        Outcome::Working
    }

    /// Whether parts of the index that could not be read are tried again after a pause. As long as one of those that are wanted
    /// together fails the next pause is longer, until there is none. From then on no other is waited for either: a device
    /// with many bad places would else take a day to open.
    fn tries_again(&mut self, now: Time) -> bool {
        if !self.reads.is_over() || !matches!(self.phase, Phase::Pages(..)) {
            return false;
        }
        let Some(pause) = self.retry.pauses.get(self.retry.tries) else {
            return false;
        };
        let Some(failed) = self.reads.first_failed() else {
            self.retry.tries = 0;
            return false;
        };
        self.progress.waits_for = Some(failed);
        self.retry.tries += 1;
        self.retry.at = Some(now + *pause);
        self.reads.again();
        true
    }

    /// When [`Recovery::handle_timeout`] is wanted.
    pub(super) fn poll_timeout(&self) -> Option<Time> {
        self.retry.at
    }

    /// Reads again what could not be read.
    pub(super) fn handle_timeout(&mut self, now: Time) {
        if self.retry.at.take_if(|at| *at <= now).is_some() {
            self.send_reads();
        }
    }

    /// Goes on with what was read. `Ok(None)`: further reads are wanted, perhaps none.
    fn step(&mut self, results: Vec<BlockRead>) -> Result<Option<Outcome>, OpenError> {
        match std::mem::replace(&mut self.phase, Phase::RecordFirst) {
            Phase::Superblocks => self.superblocks(results).map(|()| None),
            Phase::LastCopy(superblock) => self.last_copy(&superblock, results).map(|()| None),
            Phase::Directory => self.directory(results).map(|()| None),
            Phase::Map(pages) => self.map(pages, results).map(|()| None),
            Phase::RecordFirst => self.record_first(results),
            Phase::RecordRest(places, first) => self.record_rest(&places, &first, results),
            Phase::Pages(keys, records, after) => self.pages(keys, records, after, results),
            Phase::Beyond => self.beyond(results),
            Phase::LastData(blocks) => self.last_data(blocks, results),
            Phase::Sweep(sweep) => Ok(self.sweep_on(sweep, results)),
        }
    }

    fn superblocks(&mut self, results: Vec<BlockRead>) -> Result<(), OpenError> {
        // A block that can't be read is as good as one that is damaged: another copy may do.
        let error = results.iter().find_map(|result| result.as_ref().err().copied());
        let unreadable = Bytes::from(vec![0xff; BLOCK_BYTES]);
        let blocks: Vec<Bytes> = results
            .into_iter()
            .map(|result| result.unwrap_or(unreadable.clone()))
            .collect();
        let first = blocks[..PROBE_BLOCKS as usize].concat();
        let superblock = match (probe(&first, &blocks[PROBE_BLOCKS as usize], self.geometry), error) {
            (Probe::Cairn(superblock), _) => superblock,
            (_, Some(error)) => {
                let doing = "reading the superblocks";
                return Err(OpenError::Device { doing, error });
            }
            (Probe::Blank | Probe::Unfinished, _) => return Err(OpenError::Blank),
            (Probe::Foreign { words }, _) => return Err(OpenError::Foreign { words }),
            (Probe::Truncated { expected, found }, _) => return Err(OpenError::Truncated { expected, found }),
            (Probe::Damaged { words }, _) => return Err(OpenError::Damaged { words }),
        };
        let identity = superblock.identity;
        self.identity = Some(identity);
        if let Some(expected) = self.expect.cluster.filter(|expected| *expected != identity.cluster) {
            let found = identity.cluster;
            return Err(OpenError::OtherCluster { expected, found });
        }
        if let Some(expected) = self.expect.device.filter(|expected| *expected != identity.device.uuid) {
            let found = identity.device.uuid;
            return Err(OpenError::OtherDevice { expected, found });
        }
        let end = self.end();
        for (slot, place) in CHECKPOINT_PLACES.iter().enumerate() {
            let block = &blocks[place.0 as usize];
            self.slots_used[slot] = block.iter().any(|byte| *byte != 0);
            self.candidates
                .extend(CheckpointHeader::decode(block, slot, identity.device, end));
        }
        self.candidates.sort_by_key(|header| header.sequence);
        let used = self.slots_used.iter().filter(|used| **used).count();
        self.io.counters.checkpoints_damaged = (used - self.candidates.len()) as u64;
        for copy in 0..2 {
            self.look_at_copy(&superblock, copy, &blocks[usize::from(copy)]);
        }
        let last = Superblock::copies(identity.blocks)[2];
        if last.0 == self.geometry.blocks.min(DEVICE_BLOCKS_MAX) - 1 {
            self.look_at_copy(&superblock, 2, &blocks[PROBE_BLOCKS as usize]);
            return self.try_checkpoint("no checkpoint header is valid");
        }
        // The device has grown since it was formatted.
        self.phase = Phase::LastCopy(superblock);
        self.read(vec![last.0]);
        Ok(())
    }

    fn last_copy(&mut self, superblock: &Superblock, results: Vec<BlockRead>) -> Result<(), OpenError> {
        let block = results.into_iter().flatten().next();
        self.look_at_copy(superblock, 2, &block.unwrap_or_default());
        self.try_checkpoint("no checkpoint header is valid")
    }

    fn look_at_copy(&mut self, found: &Superblock, copy: u8, block: &[u8]) {
        let expected = Superblock { copy, ..*found };
        if is_damaged(block, &expected) {
            let place = Superblock::copies(found.identity.blocks)[usize::from(copy)];
            self.mends.push((place.0 as u32, expected.encode()));
        }
    }

    /// The first block after the space.
    fn end(&self) -> u32 {
        (self.identity.expect("the superblock was read").blocks - 1) as u32
    }

    fn try_checkpoint(&mut self, words: &str) -> Result<(), OpenError> {
        self.io.counters.checkpoints_damaged += u64::from(self.loaded.header.is_some());
        let Some(header) = self.candidates.pop() else {
            return Err(OpenError::Damaged {
                words: words.to_string(),
            });
        };
        self.progress.metadata_blocks = 0;
        self.progress.metadata_blocks_in_all =
            u64::from(header.directory_blocks).saturating_add(header.map_pages.saturating_mul(2));
        let blocks = self.identity.expect("the superblock was read").blocks;
        self.loaded = Loaded::empty(blocks, &self.limits);
        self.loaded.place = LogPlace {
            position: LogPosition {
                seq: header.covered,
                crc: header.covered_crc,
            },
            ahead: header.ahead,
        };
        self.loaded.header = Some(header);
        self.phase = Phase::Directory;
        let first = (header.directory_blocks > 0).then_some(u64::from(header.directory));
        self.read(first.into_iter().collect());
        Ok(())
    }

    fn header(&self) -> CheckpointHeader {
        self.loaded.header.expect("a checkpoint was chosen")
    }

    fn directory(&mut self, mut results: Vec<BlockRead>) -> Result<(), OpenError> {
        let (header, end) = (self.header(), self.end());
        if let Some(result) = results.pop() {
            let index = self.loaded.directory.len() as u32;
            let place = self.reads.first_place() as u32;
            let block = result
                .ok()
                .and_then(|block| decode_block(&block, header.root_of(), index, end).ok());
            let Some(block) = block else {
                return self.try_checkpoint("a block of the checkpoint's directory can't be read");
            };
            self.progress.metadata_blocks += 1;
            self.loaded.directory.push(place);
            self.loaded.metadata.push(place);
            if !block.entries.into_iter().all(|entry| self.loaded.add(entry)) {
                return self.try_checkpoint("an entry of the checkpoint's directory is not allowed");
            }
            if block.next != 0 && index + 1 < header.directory_blocks {
                self.phase = Phase::Directory;
                self.read(vec![block.next.into()]);
                return Ok(());
            }
        }
        let found = &self.loaded;
        let homes: Vec<(u32, MapHome)> = (0..)
            .zip(&found.homes)
            .filter_map(|(page, home)| Some((page, (*home)?)))
            .collect();
        let complete = found.directory.len() as u32 == header.directory_blocks
            && found.catalog.seals.len() as u64 == header.seals
            && found.catalog.replicas.len() as u64 == header.replicas
            && found.leaves == header.leaves
            && homes.len() as u64 == header.map_pages;
        if !complete {
            return self.try_checkpoint("the checkpoint's directory is not complete");
        }
        if !found.catalog.layers_are_counted() {
            return self
                .try_checkpoint("the checkpoint's directory counts blocks of layers that their replica does not have");
        }
        let places = (0..2).flat_map(|copy| homes.iter().map(move |(_, home)| home.places[copy]));
        let places: Vec<u32> = places.collect();
        let wanted = places.iter().map(|place| u64::from(*place)).collect();
        self.loaded.metadata.extend(places);
        self.phase = Phase::Map(homes);
        self.read(wanted);
        Ok(())
    }

    fn map(&mut self, pages: Vec<(u32, MapHome)>, mut results: Vec<BlockRead>) -> Result<(), OpenError> {
        self.progress.metadata_blocks += results.len() as u64;
        let second = results.split_off(pages.len());
        for ((page, home), copies) in pages.into_iter().zip(results.into_iter().zip(second)) {
            let data = &mut self.loaded.data;
            let mut is_good = |copy: BlockRead| copy.is_ok_and(|block| read_map_page(data, page, &block, home.crc));
            match (is_good(copies.0), is_good(copies.1)) {
                (true, true) => {}
                (false, false) => return self.try_checkpoint("a page of the free-space map can't be read"),
                _ => {
                    self.loaded.map_copies_damaged += 1;
                    self.loaded.dirty_map.insert(page);
                }
            }
        }
        let end = u64::from(self.end());
        let bits = self.loaded.data.words().len() as u64 * 64;
        let outside = (0..SPACE_START).chain(end..bits);
        let header = self.header();
        let expected = header.data_blocks.checked_add(header.index_blocks);
        self.loaded.data_blocks = header.data_blocks;
        if expected != Some(self.loaded.data.count())
            || outside.into_iter().any(|block| self.loaded.data.get(block as u32))
        {
            return self.try_checkpoint("the free-space map does not agree with its checkpoint");
        }
        self.read_record();
        Ok(())
    }

    /// `swept` were in the map, and nobody needs them; `None` if that is not known.
    fn finish(&mut self, discarded: bool, swept: Option<BTreeSet<u32>>) -> Outcome {
        let identity = self.identity.expect("the superblock was read");
        let header = self.header();
        let mut loaded = std::mem::replace(&mut self.loaded, Loaded::empty(0, &self.limits));
        let mut used_end = header.used_end;
        let orphans = swept.unwrap_or_default();
        let log_page_count = loaded.log_pages.iter().map(|(_, pages)| pages.len() as u64).sum();
        if loaded.index_lost {
            loaded.forget_reused();
        }
        let mut allocator = Allocator::with_taken(
            SPACE_START..u64::from(self.end()),
            &loaded.data,
            self.limits.region_blocks,
        );
        let log_pages = loaded.log_pages.iter().flat_map(|(_, pages)| pages);
        let metadata = loaded.metadata.iter().chain(&loaded.stale);
        for place in metadata.chain(log_pages) {
            // A page may be listed more than once: it is taken once.
            allocator.take(*place);
            used_end = used_end.max(u64::from(*place) + 1);
        }
        used_end = used_end.max(loaded.data.end());
        used_end = used_end.max(orphans.last().map_or(0, |place| u64::from(*place) + 1));
        allocator.frontier = if self.limits.zero_ahead {
            used_end
        } else {
            allocator.space().end
        };
        let LogPlace { position, ahead } = loaded.place;
        // Not free before two checkpoints do without them: until then, replay still finds them in the map.
        let log = [ahead.next, ahead.next_run];
        let waiting = orphans.iter().copied().filter(|place| !log.contains(place));
        let waiting = waiting.filter(|place| allocator.take(*place));
        loaded.stale.extend(waiting);
        let data = (loaded.data, loaded.data_blocks);
        let Some(mut space) = SpaceMap::new(allocator, data, loaded.homes, ahead, self.limits.run_blocks) else {
            return Outcome::Refused(OpenError::Damaged {
                words: format!("where its log goes on ({ahead:?}) something else stands"),
            });
        };
        space.dirty_pages = loaded.dirty_map;
        let mut io = std::mem::take(&mut self.io);
        io.counters.replayed = self.progress.batches;
        io.counters.discarded_at_open = u64::from(discarded);
        io.counters.blocks_swept = orphans.len() as u64;
        io.counters.superblocks_damaged = self.mends.len() as u64;
        io.counters.map_copies_damaged = loaded.map_copies_damaged;
        io.counters.index_parts_lost = loaded.lost_parts.count;
        let engine = Engine {
            identity,
            geometry: self.geometry,
            limits: self.limits.clone(),
            io,
            in_flight: Map::default(),
            poisoned: None,
            catalog: loaded.catalog,
            space,
            log: position,
            recovered_seq: position.seq,
            opened: false,
            queue: Default::default(),
            batch: None,
            confirm_at: None,
            reads: Default::default(),
            damaged: Default::default(),
            loads: Default::default(),
            scrub: Default::default(),
            mover: Default::default(),
            reclaim: Default::default(),
            checkpoint: None,
            checkpoints: Checkpoints {
                sequence: header.sequence,
                covered: header.covered,
                directory: loaded.directory,
                stale: loaded.stale,
                log_page_count,
                log_pages_since: log_page_count,
                log_pages: loaded.log_pages.into(),
                alone: true,
                ..Checkpoints::default()
            },
            zero_ahead: ZeroAhead::new(used_end),
            mends: Mends::new(std::mem::take(&mut self.mends)),
            is_believing: false,
            erase: None,
            claimed_twice: None,
            lost_parts: loaded.lost_parts,
        };
        let other = 1 - header.slot();
        let erase = self.slots_used[other].then_some(CHECKPOINT_PLACES[other].0 as u32);
        Outcome::Ready(Box::new(engine), erase)
    }
}

impl Loaded {
    fn empty(blocks: u64, limits: &StoreLimits) -> Loaded {
        Loaded {
            header: None,
            catalog: Catalog::new(limits),
            data: Bitmap::new(blocks),
            data_blocks: 0,
            last_leaf: None,
            leaves: 0,
            index_lost: false,
            lost_parts: LostParts::default(),
            homes: vec![None; map_pages(blocks)],
            directory: Vec::new(),
            metadata: Vec::new(),
            place: LogPlace {
                position: LogPosition { seq: 0, crc: 0 },
                ahead: LogAhead {
                    next: 0,
                    run_left: 0,
                    next_run: 0,
                },
            },
            log: LogRead::default(),
            log_pages: Vec::new(),
            stale: Vec::new(),
            dirty_map: Default::default(),
            map_copies_damaged: 0,
        }
    }

    /// Takes an entry of the directory; returns whether it makes sense.
    fn add(&mut self, entry: DirectoryEntry) -> bool {
        match entry {
            DirectoryEntry::Seal(volume, generation) => self.catalog.seals.insert(volume, generation).is_none(),
            DirectoryEntry::Replica(group, replica) => self.catalog.replicas.insert(group, replica).is_none(),
            DirectoryEntry::Leaf(key, state) => {
                if let Some(LeafState::OnDisk(home)) = state {
                    self.metadata.push(home.place);
                }
                self.leaves += 1;
                self.catalog.list_leaf(key, Leaf::listed(state));
                self.last_leaf.replace(key).is_none_or(|last| last < key)
            }
            DirectoryEntry::MapPage(page, home) => {
                let there = self.homes.get_mut(page as usize);
                there.is_some_and(|there| there.replace(home).is_none())
            }
            DirectoryEntry::Layer(group, layer, blocks) => self.catalog.layers.insert((group, layer), blocks).is_none(),
            DirectoryEntry::Doomed(doomed) => self.catalog.doomed.insert(doomed),
            DirectoryEntry::Orphans => !std::mem::replace(&mut self.catalog.orphans, true),
            DirectoryEntry::Scrub(state) => self.catalog.scrub.replace(state).is_none(),
        }
    }

    fn apply(&mut self, header: &BatchHeader, records: &[Record]) -> Result<(), OpenError> {
        let mut effects = Effects::default();
        for record in records {
            self.catalog.apply(record, &mut effects);
        }
        self.log_pages.push((header.seq, header.places.clone()));
        if let Some(group) = effects.miscounted {
            return Err(OpenError::Damaged {
                words: format!(
                    "commit {} of its log takes more blocks from {group} than it has",
                    header.seq
                ),
            });
        }
        self.account(effects).map_err(|place| OpenError::Damaged {
            words: format!("commit {} of its log counts block {place} twice", header.seq),
        })
    }

    /// What a batch has given back of blocks whose page is lost stays in the map. Where the log has taken such a block
    /// since, it is the log's: else giving back the log's page would free a block of the map.
    fn forget_reused(&mut self) {
        let ahead = self.place.ahead;
        let log = self.log_pages.iter().flat_map(|(_, pages)| pages);
        for place in log.chain([&ahead.next, &ahead.next_run]) {
            if self.data.set(*place, false) {
                self.data_blocks = self.data_blocks.saturating_sub(1);
                self.dirty_map.insert(super::space::map_page(*place));
            }
        }
    }

    /// Accounts for what changes did to space. Fails with a block that is counted twice.
    fn account(&mut self, effects: Effects) -> Result<(), u32> {
        let used = effects.used.into_iter().map(|place| (place, true, 1));
        let freed = effects.freed.into_iter().map(|place| (place, false, -1));
        let stale = effects.stale.iter().map(|place| (*place, false, 0));
        for (place, value, count) in used.chain(freed).chain(stale) {
            if self.data.set(place, value) != value {
                self.data_blocks = self.data_blocks.checked_add_signed(count).ok_or(place)?;
            } else if !(value && self.index_lost) {
                return Err(place);
            }
            self.dirty_map.insert(super::space::map_page(place));
        }
        self.stale.extend(effects.stale);
        self.stale.extend(effects.stale_leaves);
        Ok(())
    }
}
