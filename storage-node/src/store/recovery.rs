//! Opening a device: superblocks, the newest checkpoint, and the log from it on.
//!
//! It only reads. A record is believed when the record after it is there, for only one batch was ever in flight. The
//! last one is believed if all of its data is: it may be a batch that was being written when power failed. Then it was
//! not acknowledged, and all of it is dropped.

use bytes::Bytes;
use cairn_proto::checksum::{Checksum, block_checksum};
use cairn_proto::collections::Map;
use cairn_proto::disk::{DeviceBlock, DiskDone, DiskError, DiskGeometry};
use cairn_proto::ids::VolumeId;
use cairn_proto::limits::BLOCK_BYTES;

use super::allocator::{Allocator, Bitmap};
use super::catalog::{Catalog, Effects, Unknown};
use super::checkpoint::Checkpoints;
use super::checkpoint_header::CheckpointHeader;
use super::chunk::{Home, Page, PageKey, Resident};
use super::directory::{DirectoryEntry, decode_block};
use super::engine::{Engine, LogPosition};
use super::io::Io;
use super::limits::{DEVICE_BLOCKS_MAX, StoreLimits};
use super::record::{BatchHeader, HeaderError, Record};
use super::space::{SpaceMap, map_pages, read_map_page};
use super::status::{OpenError, OpenExpectation, Progress};
use super::superblock::{CHECKPOINT_PLACES, Identity, PROBE_BLOCKS, Probe, SPACE_START, probe};
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
    /// Checkpoints that may be tried yet, the next one last.
    candidates: Vec<CheckpointHeader>,
    /// Whether the slots hold anything.
    slots_used: [bool; 2],
    loaded: Loaded,
}

/// What was read of a checkpoint, and of the log after it.
#[derive(Debug)]
struct Loaded {
    header: Option<CheckpointHeader>,
    catalog: Catalog,
    data: Bitmap,
    homes: Vec<Option<Home>>,
    directory: Vec<u32>,
    /// Blocks of metadata of the checkpoint.
    metadata: Vec<u32>,
    /// Where the log is read on.
    position: LogPosition,
    next: u32,
    log_pages: Vec<(u64, Vec<u32>)>,
    stale: Vec<u32>,
    /// The last record read: not applied yet.
    pending: Option<PendingRecord>,
    dirty_map: std::collections::BTreeSet<u32>,
}

#[derive(Clone, Debug)]
struct PendingRecord {
    header: BatchHeader,
    records: Vec<Record>,
}

#[derive(Debug)]
enum Phase {
    Superblocks,
    Directory,
    Map(Vec<(u32, Home)>),
    RecordFirst,
    RecordRest(Vec<u32>, Bytes),
    /// Index pages for a record that is confirmed; then the record read after it, if any.
    Pages(Vec<(PageKey, Home)>, PendingRecord, After),
    LastData(Vec<DataBlock>),
}

/// What follows when a record is applied.
#[derive(Debug)]
enum After {
    /// The record that confirmed it.
    Next(PendingRecord),
    /// It is the last.
    End,
}

#[derive(Clone, Copy, Debug)]
struct DataBlock {
    volume: VolumeId,
    volume_block: u64,
    place: u32,
    checksum: Checksum,
}

/// Reads that are wanted together.
#[derive(Debug, Default)]
struct ReadSet {
    wanted: Vec<(u64, u32)>,
    sent: usize,
    results: Vec<Option<Result<Bytes, DiskError>>>,
    tokens: Map<u64, usize>,
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
            candidates: Vec::new(),
            slots_used: [false; 2],
            loaded: Loaded::empty(0, limits.canary),
            limits,
        };
        if geometry.blocks >= super::limits::DEVICE_BLOCKS_MIN {
            let last = geometry.blocks.min(DEVICE_BLOCKS_MAX) - 1;
            let first = 0..u64::from(PROBE_BLOCKS);
            recovery.read(first.chain([last]).map(|place| (place, 1)).collect());
        }
        recovery
    }

    /// A device too short to have been formatted.
    pub(super) fn refused_at_once(&self) -> Option<OpenError> {
        (self.geometry.blocks < super::limits::DEVICE_BLOCKS_MIN).then_some(OpenError::Length {
            blocks: self.geometry.blocks,
        })
    }

    fn read(&mut self, wanted: Vec<(u64, u32)>) {
        self.reads = ReadSet {
            results: vec![None; wanted.len()],
            wanted,
            sent: 0,
            tokens: Map::default(),
        };
        self.send_reads();
    }

    fn send_reads(&mut self) {
        let reads = &mut self.reads;
        while reads.sent < reads.wanted.len() && reads.tokens.len() < self.limits.recovery_reads_in_flight.max(1) {
            let (place, blocks) = reads.wanted[reads.sent];
            let token = self.io.read_at(DeviceBlock(place), blocks);
            reads.tokens.insert(token, reads.sent);
            reads.sent += 1;
        }
    }

    pub(super) fn handle_disk(&mut self, done: DiskDone) -> Outcome {
        let index = self.reads.tokens.remove(&done.token.0);
        let index = index.unwrap_or_else(|| panic!("{:?} is not in flight", done.token));
        if let Ok(content) = &done.result {
            let blocks = self.reads.wanted[index].1 as usize;
            assert_eq!(content.len(), blocks * BLOCK_BYTES, "a read of {blocks} blocks");
        }
        self.reads.results[index] = Some(done.result);
        self.send_reads();
        // A step that wants no reads is followed by the next at once.
        loop {
            if !self.reads.tokens.is_empty() || self.reads.sent < self.reads.wanted.len() {
                return Outcome::Working;
            }
            let results = std::mem::take(&mut self.reads.results);
            let results = results
                .into_iter()
                .map(|result| result.expect("all are read"))
                .collect();
            match self.step(results) {
                Ok(Some(outcome)) => return outcome,
                Ok(None) => {}
                Err(error) => return Outcome::Refused(error),
            }
        }
    }

    /// Goes on with what was read. `Ok(None)`: further reads are wanted, perhaps none.
    fn step(&mut self, results: Vec<Result<Bytes, DiskError>>) -> Result<Option<Outcome>, OpenError> {
        match std::mem::replace(&mut self.phase, Phase::RecordFirst) {
            Phase::Superblocks => self.superblocks(results).map(|()| None),
            Phase::Directory => self.directory(results).map(|()| None),
            Phase::Map(pages) => self.map(pages, results).map(|()| None),
            Phase::RecordFirst => self.record_first(results),
            Phase::RecordRest(places, first) => self.record_rest(&places, first, results),
            Phase::Pages(keys, record, after) => self.pages(keys, record, after, results),
            Phase::LastData(blocks) => self.last_data(blocks, results),
        }
    }

    fn superblocks(&mut self, results: Vec<Result<Bytes, DiskError>>) -> Result<(), OpenError> {
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
            (Probe::Blank, _) => return Err(OpenError::Blank),
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
        self.try_checkpoint("no checkpoint header is valid")
    }

    /// The first block after the space.
    fn end(&self) -> u32 {
        (self.identity.expect("the superblock was read").blocks - 1) as u32
    }

    fn try_checkpoint(&mut self, words: &str) -> Result<(), OpenError> {
        let Some(header) = self.candidates.pop() else {
            return Err(OpenError::Damaged {
                words: words.to_string(),
            });
        };
        let blocks = self.identity.expect("the superblock was read").blocks;
        self.loaded = Loaded::empty(blocks, self.limits.canary);
        self.loaded.position = LogPosition {
            seq: header.covered,
            crc: header.covered_crc,
        };
        self.loaded.next = header.next;
        self.loaded.header = Some(header);
        self.phase = Phase::Directory;
        let first = (header.directory_blocks > 0).then_some((u64::from(header.directory), 1));
        self.read(first.into_iter().collect());
        Ok(())
    }

    fn header(&self) -> CheckpointHeader {
        self.loaded.header.expect("a checkpoint was chosen")
    }

    fn directory(&mut self, mut results: Vec<Result<Bytes, DiskError>>) -> Result<(), OpenError> {
        let (header, end) = (self.header(), self.end());
        if let Some(result) = results.pop() {
            let index = self.loaded.directory.len() as u32;
            let place = self.reads.wanted[0].0 as u32;
            let block = result
                .ok()
                .and_then(|block| decode_block(&block, header.device, header.sequence, index, end).ok());
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
                self.read(vec![(block.next.into(), 1)]);
                return Ok(());
            }
        }
        let found = &self.loaded;
        let homes: Vec<(u32, Home)> = (0..)
            .zip(&found.homes)
            .filter_map(|(page, home)| Some((page, (*home)?)))
            .collect();
        let complete = found.directory.len() as u32 == header.directory_blocks
            && found.catalog.seals.len() as u64 == header.seals
            && found.catalog.replicas.len() as u64 == header.replicas
            && found.catalog.chunks.len() as u64 == header.chunks
            && homes.len() as u64 == header.map_pages;
        if !complete {
            return self.try_checkpoint("the checkpoint's directory is not complete");
        }
        let wanted = homes.iter().map(|(_, home)| (home.place.into(), 1)).collect();
        self.loaded.metadata.extend(homes.iter().map(|(_, home)| home.place));
        self.phase = Phase::Map(homes);
        self.read(wanted);
        Ok(())
    }

    fn map(&mut self, pages: Vec<(u32, Home)>, results: Vec<Result<Bytes, DiskError>>) -> Result<(), OpenError> {
        for ((page, home), result) in pages.into_iter().zip(results) {
            self.progress.metadata_blocks += 1;
            let data = &mut self.loaded.data;
            if !result.is_ok_and(|block| read_map_page(data, page, &block, home)) {
                return self.try_checkpoint("a page of the free-space map can't be read");
            }
        }
        let end = u64::from(self.end());
        let words = self.loaded.data.words();
        let data: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        let outside = (0..SPACE_START).chain(end..words.len() as u64 * 64);
        if data != self.header().data_blocks || outside.into_iter().any(|block| self.loaded.data.get(block as u32)) {
            return self.try_checkpoint("the free-space map does not agree with its checkpoint");
        }
        self.read_record();
        Ok(())
    }

    fn read_record(&mut self) {
        self.phase = Phase::RecordFirst;
        self.read(vec![(self.loaded.next.into(), 1)]);
    }

    fn record_first(&mut self, mut results: Vec<Result<Bytes, DiskError>>) -> Result<Option<Outcome>, OpenError> {
        let first = read_log(results.pop().expect("one read"))?;
        let (device, seq, end) = (self.header().device, self.loaded.position.seq + 1, self.end());
        let Some(places) = BatchHeader::peek(&first, device, seq, self.loaded.next, end) else {
            return self.end_of_log();
        };
        if places.len() == 1 {
            return self.record_read(&first);
        }
        let wanted = places[1..].iter().map(|place| ((*place).into(), 1)).collect();
        self.phase = Phase::RecordRest(places, first);
        self.read(wanted);
        Ok(None)
    }

    fn record_rest(
        &mut self,
        places: &[u32],
        first: Bytes,
        results: Vec<Result<Bytes, DiskError>>,
    ) -> Result<Option<Outcome>, OpenError> {
        let mut pages = Vec::with_capacity(places.len() * BLOCK_BYTES);
        pages.extend_from_slice(&first);
        for result in results {
            pages.extend_from_slice(&read_log(result)?);
        }
        self.record_read(&pages)
    }

    fn record_read(&mut self, pages: &[u8]) -> Result<Option<Outcome>, OpenError> {
        let end = self.end();
        let (header, crc, records) = match BatchHeader::decode(pages, end) {
            Ok(decoded) => decoded,
            Err(HeaderError::NotARecord) => return self.end_of_log(),
            Err(error) => {
                return Err(OpenError::Damaged {
                    words: format!("commit {} of its log: {error}", self.loaded.position.seq + 1),
                });
            }
        };
        let position = self.loaded.position;
        let ours = header.device == self.header().device
            && header.seq == position.seq + 1
            && header.previous_crc == position.crc
            && header.places[0] == self.loaded.next;
        if !ours {
            return self.end_of_log();
        }
        self.loaded.position = LogPosition { seq: header.seq, crc };
        self.loaded.next = header.next;
        let record = PendingRecord { header, records };
        match self.loaded.pending.take() {
            None => {
                self.loaded.pending = Some(record);
                self.read_record();
                Ok(None)
            }
            Some(confirmed) => {
                self.load_pages(confirmed, After::Next(record));
                Ok(None)
            }
        }
    }

    /// Wants the index pages that a record needs.
    fn load_pages(&mut self, record: PendingRecord, after: After) {
        let mut keys = std::collections::BTreeMap::new();
        for record in &record.records {
            for unknown in self.loaded.catalog.unknown_of(record) {
                if let Unknown::OnDisk(key, home) = unknown {
                    keys.insert(key, home);
                }
            }
        }
        let keys: Vec<(PageKey, Home)> = keys.into_iter().collect();
        let wanted = keys.iter().map(|(_, home)| (home.place.into(), 1)).collect();
        self.phase = Phase::Pages(keys, record, after);
        self.read(wanted);
    }

    fn pages(
        &mut self,
        keys: Vec<(PageKey, Home)>,
        record: PendingRecord,
        after: After,
        results: Vec<Result<Bytes, DiskError>>,
    ) -> Result<Option<Outcome>, OpenError> {
        let end = self.end();
        for ((key, home), result) in keys.into_iter().zip(results) {
            let page = result.ok().and_then(|block| Resident::decode(&block, home, end));
            self.loaded.catalog.loaded(key, home, page);
        }
        self.loaded.apply(&record)?;
        self.progress.batches += 1;
        match after {
            After::Next(next) => {
                self.loaded.pending = Some(next);
                self.read_record();
                Ok(None)
            }
            After::End => Ok(Some(self.finish(false))),
        }
    }

    /// The record that was expected is not there: the one before it is the last.
    fn end_of_log(&mut self) -> Result<Option<Outcome>, OpenError> {
        let Some(last) = &self.loaded.pending else {
            return Ok(Some(self.finish(false)));
        };
        let mut blocks = Vec::new();
        for record in &last.records {
            record.data(|volume, volume_block, place, checksum| {
                blocks.push(DataBlock {
                    volume,
                    volume_block,
                    place,
                    checksum,
                });
            });
        }
        let wanted = blocks.iter().map(|block| (block.place.into(), 1)).collect();
        self.phase = Phase::LastData(blocks);
        self.read(wanted);
        Ok(None)
    }

    fn last_data(
        &mut self,
        blocks: Vec<DataBlock>,
        results: Vec<Result<Bytes, DiskError>>,
    ) -> Result<Option<Outcome>, OpenError> {
        // Data that can't be read does not show that the batch was never acknowledged. It is believed, and each read of
        // such a block says that it is damaged.
        let intact = |(block, result): (DataBlock, Result<Bytes, DiskError>)| match result {
            Ok(content) => block_checksum(block.volume, block.volume_block, &content) == block.checksum,
            Err(_) => true,
        };
        let believed = blocks.into_iter().zip(results).all(intact);
        let last = self.loaded.pending.take().expect("the last record is looked at");
        if believed || self.limits.canary.skip_data_checksum_at_recovery() {
            self.load_pages(last, After::End);
            return Ok(None);
        }
        self.loaded.next = last.header.places[0];
        self.loaded.position = LogPosition {
            seq: last.header.seq - 1,
            crc: last.header.previous_crc,
        };
        Ok(Some(self.finish(true)))
    }

    fn finish(&mut self, discarded: bool) -> Outcome {
        let identity = self.identity.expect("the superblock was read");
        let header = self.header();
        let loaded = std::mem::replace(&mut self.loaded, Loaded::empty(0, self.limits.canary));
        let mut used_end = header.used_end;
        let log_page_count = loaded.log_pages.iter().map(|(_, pages)| pages.len() as u64).sum();
        let mut allocator = Allocator::with_taken(SPACE_START..u64::from(self.end()), &loaded.data);
        let log_pages = loaded.log_pages.iter().flat_map(|(_, pages)| pages);
        for place in loaded.metadata.iter().chain(log_pages).chain([&loaded.next]) {
            // A page may be listed more than once: it is taken once.
            allocator.take(*place);
            used_end = used_end.max(u64::from(*place) + 1);
        }
        used_end = used_end.max(loaded.data.end());
        allocator.frontier = if self.limits.zero_ahead {
            used_end
        } else {
            allocator.space().end
        };
        let mut space = SpaceMap::new(
            allocator,
            loaded.data,
            loaded.homes,
            loaded.next,
            self.limits.run_blocks,
        );
        space.dirty_pages = loaded.dirty_map;
        let mut io = std::mem::take(&mut self.io);
        io.counters.replayed = self.progress.batches;
        io.counters.discarded_at_open = u64::from(discarded);
        let engine = Engine {
            identity,
            geometry: self.geometry,
            limits: self.limits.clone(),
            io,
            in_flight: Map::default(),
            poisoned: None,
            catalog: loaded.catalog,
            space,
            log: loaded.position,
            recovered_seq: loaded.position.seq,
            opened: false,
            queue: Default::default(),
            batch: None,
            confirm_at: None,
            reads: Default::default(),
            damaged: Default::default(),
            loads: Default::default(),
            scrub: Default::default(),
            checkpoint: None,
            checkpoints: Checkpoints {
                sequence: header.sequence,
                covered: header.covered,
                directory: loaded.directory,
                stale: loaded.stale,
                log_page_count,
                log_pages_since: log_page_count,
                log_pages: loaded.log_pages.into(),
                ..Checkpoints::default()
            },
            zero_ahead: ZeroAhead::new(used_end),
        };
        let other = 1 - header.slot();
        let erase = self.slots_used[other].then_some(CHECKPOINT_PLACES[other].0 as u32);
        Outcome::Ready(Box::new(engine), erase)
    }
}

fn read_log(result: Result<Bytes, DiskError>) -> Result<Bytes, OpenError> {
    let doing = "reading the log (acknowledged writes may stand there, so the store is not opened without it)";
    result.map_err(|error| OpenError::Device { doing, error })
}

impl Loaded {
    fn empty(blocks: u64, canary: super::canary::Canary) -> Loaded {
        Loaded {
            header: None,
            catalog: Catalog {
                canary,
                ..Catalog::default()
            },
            data: Bitmap::new(blocks),
            homes: vec![None; map_pages(blocks)],
            directory: Vec::new(),
            metadata: Vec::new(),
            position: LogPosition { seq: 0, crc: 0 },
            next: 0,
            log_pages: Vec::new(),
            stale: Vec::new(),
            pending: None,
            dirty_map: Default::default(),
        }
    }

    /// Takes an entry of the directory; returns whether it makes sense.
    fn add(&mut self, entry: DirectoryEntry) -> bool {
        match entry {
            DirectoryEntry::Seal(volume, generation) => self.catalog.seals.insert(volume, generation).is_none(),
            DirectoryEntry::Replica(group, replica) => self.catalog.replicas.insert(group, replica).is_none(),
            DirectoryEntry::Chunk(key, chunk) => {
                let homes = chunk.pages.values().filter_map(|page| match page {
                    Page::OnDisk(home) => Some(home.place),
                    _ => None,
                });
                self.metadata.extend(homes);
                self.catalog.pages += chunk.pages.len();
                self.catalog.chunks.insert(key, chunk).is_none()
            }
            DirectoryEntry::MapPage(page, home) => {
                let there = self.homes.get_mut(page as usize);
                there.is_some_and(|there| there.replace(home).is_none())
            }
            DirectoryEntry::Scrub(state) => self.catalog.scrub.replace(state).is_none(),
        }
    }

    fn apply(&mut self, record: &PendingRecord) -> Result<(), OpenError> {
        let mut effects = Effects::default();
        for record in &record.records {
            self.catalog.apply(record, &mut effects);
        }
        self.log_pages.push((record.header.seq, record.header.places.clone()));
        let used = effects.used.into_iter().map(|place| (place, true));
        let freed = effects.freed.into_iter().map(|place| (place, false));
        for (place, value) in used.chain(freed) {
            if self.data.set(place, value) == value {
                return Err(OpenError::Damaged {
                    words: format!("commit {} of its log counts block {place} twice", record.header.seq),
                });
            }
            self.dirty_map.insert(super::space::map_page(place));
        }
        self.stale.extend(effects.stale);
        Ok(())
    }
}
