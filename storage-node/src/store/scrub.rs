//! Verification of all that the device holds, a bounded part at a time. What is damaged is reported, and remembered so
//! that a copy of the same version mends it.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use cairn_proto::disk::{DeviceBlock, DiskError};
use cairn_proto::ids::{ChunkIndex, GroupId, Layer, Version};

use super::api::{StoreError, StoreReply, Ticket};
use super::catalog::Effects;
use super::checkpoint_header::CheckpointHeader;
use super::chunk::{ChunkKey, Home, Page, PageKey};
use super::engine::{Engine, Purpose};
use super::scrub_state::ScrubCursor;
use super::superblock::{CHECKPOINT_PLACES, Superblock};
use super::window::{Found, Step, Walk, Walked, Walker, Why, Window, page_range};

/// A block of data that is not what the index says, or can't be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DamagedBlock {
    /// Of which group.
    pub group: GroupId,
    /// In which layer.
    pub layer: Layer,
    /// In which chunk.
    pub chunk: ChunkIndex,
    /// Its number in the chunk.
    pub block: u32,
    /// The version that was acknowledged.
    pub version: Version,
    /// What is wrong with it.
    pub why: Why,
}

/// What the store keeps for itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MetadataKind {
    /// A copy of the superblock.
    Superblock,
    /// The header of a checkpoint.
    CheckpointHeader,
    /// A copy of a page of the free-space map.
    MapPage,
    /// The index page of some blocks.
    IndexPage {
        /// Of which group.
        group: GroupId,
        /// In which layer.
        layer: Layer,
        /// In which chunk.
        chunk: ChunkIndex,
        /// Its first block in the chunk; it has 256.
        block: u32,
    },
    /// A leaf of the directory: the index of all chunks from this one to where the next leaf begins.
    Leaf {
        /// Of which group.
        group: GroupId,
        /// In which layer.
        layer: Layer,
        /// Which chunk.
        chunk: ChunkIndex,
    },
}

/// A part of what the store keeps for itself that is damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DamagedMetadata {
    /// What it is.
    pub kind: MetadataKind,
    /// Where it stands; zero if that is not known any more.
    pub place: DeviceBlock,
    /// What is wrong with it.
    pub why: Why,
    /// Whether it is written anew: an index page or a page of the free-space map by the next checkpoint, from what is in
    /// memory; a superblock at once, from a copy that is whole.
    pub is_mended: bool,
}

/// The scrub of a store: one request at a time.
#[derive(Debug, Default)]
pub(super) struct Scrub {
    active: Option<Active>,
}

/// A request under way.
#[derive(Debug)]
struct Active {
    ticket: Ticket,
    /// It has come to what is open.
    walk: Walk,
    blocks_max: u32,
    checked: u32,
    damaged: Vec<DamagedBlock>,
    metadata: Vec<DamagedMetadata>,
    open: Option<Open>,
}

#[derive(Debug)]
enum Open {
    Metadata(MetadataCheck),
    Window(Box<Window>),
    /// A leaf of the directory is being loaded.
    Leaf,
}

/// Blocks of metadata that are compared.
#[derive(Debug)]
struct MetadataCheck {
    number: u64,
    to_read: VecDeque<(DeviceBlock, Expected)>,
    in_flight: BTreeMap<u64, (DeviceBlock, Expected)>,
    next_piece: u64,
    /// A copy of it that is whole.
    superblock: Option<Superblock>,
}

/// What must stand at a place.
#[derive(Clone, Copy, Debug)]
enum Expected {
    Superblock(u8),
    /// The header of the last checkpoint in its slot.
    Header(usize),
    /// The slot of the other one, which is empty after the device was opened.
    OtherHeader(usize),
    /// A copy of a page of the free-space map, and its CRC.
    Map(u32, u32),
}

impl Engine {
    pub(super) fn submit_scrub(&mut self, ticket: Ticket, from: ScrubCursor, blocks_max: u32) {
        if blocks_max == 0 {
            return self.fail(ticket, StoreError::Invalid("a scrub checks at least one block"));
        }
        if self.scrub.active.is_some() {
            return self.fail(ticket, StoreError::Busy);
        }
        let active = Active {
            ticket,
            walk: Walk::new(Walker::Scrub, from),
            blocks_max,
            checked: 0,
            damaged: Vec::new(),
            metadata: Vec::new(),
            open: None,
        };
        if from == ScrubCursor::START {
            self.scrub_metadata(active);
        } else {
            self.scrub_on(active);
        }
    }

    /// A read of it has come.
    pub(super) fn scrub_read_done(&mut self, piece: u64, result: Result<Bytes, DiskError>) {
        let mut active = self.scrub.active.take().expect("a scrub is under way");
        match active.open.take().expect("something of it is in flight") {
            Open::Metadata(check) => self.metadata_read_done(active, check, piece, result),
            Open::Leaf => unreachable!("a leaf is not read by the scrub itself"),
            Open::Window(mut window) => match self.window_read_done(&mut window, piece, result) {
                Step::Working => {
                    active.open = Some(Open::Window(window));
                    self.scrub.active = Some(active);
                }
                Step::Indexed => {
                    if let Some(active) = self.scrub_data(active, window) {
                        self.scrub_on(active);
                    }
                }
                Step::Done => {
                    self.scrubbed(&mut active, &window);
                    self.scrub_on(active);
                }
                Step::IndexDamaged(home, why) => {
                    self.close_window(&window);
                    active.metadata.push(damaged_index(window.key, home.place, why, false));
                    self.scrub_on(active);
                }
            },
        }
    }

    /// Opens the next windows until one has to be waited for, or the request is done.
    fn scrub_on(&mut self, mut active: Active) {
        while active.checked < active.blocks_max {
            match self.walk(&mut active.walk) {
                Found::Over(Walked::All) => return self.answer_scrub(active, None),
                Found::Over(Walked::Enough) => break,
                Found::Loading => {
                    active.open = Some(Open::Leaf);
                    self.scrub.active = Some(active);
                    return;
                }
                Found::LostLeaf(from, home, why) => active.metadata.push(damaged_leaf(from, home, why)),
                Found::LostPage(key) => active.metadata.push(damaged_index(key, 0, Why::Lost, false)),
                Found::Window(window) if window.has_index() => match self.scrub_data(active, window) {
                    Some(back) => active = back,
                    None => return,
                },
                Found::Window(window) => {
                    active.open = Some(Open::Window(window));
                    self.scrub.active = Some(active);
                    return;
                }
            }
        }
        let next = active.walk.cursor;
        self.answer_scrub(active, Some(next));
    }

    /// The index page of a window is known: reads its data. Gives the request back if there is none.
    fn scrub_data(&mut self, mut active: Active, mut window: Box<Window>) -> Option<Active> {
        if self.read_window(&mut window, |_, _| true) == Step::Done {
            self.scrubbed(&mut active, &window);
            return Some(active);
        }
        active.open = Some(Open::Window(window));
        self.scrub.active = Some(active);
        None
    }

    /// A part of the index was loaded, perhaps the leaf that it waits for.
    pub(super) fn scrub_leaf_loaded(&mut self) {
        if let Some(mut active) = self
            .scrub
            .active
            .take_if(|active| matches!(active.open, Some(Open::Leaf)))
        {
            active.open = None;
            self.scrub_on(active);
        }
    }

    fn answer_scrub(&mut self, active: Active, next: Option<ScrubCursor>) {
        let reply = StoreReply::Scrubbed {
            checked: active.checked,
            damaged: active.damaged,
            metadata: active.metadata,
            next,
        };
        self.io.reply(active.ticket, reply);
    }

    /// A window was read: takes in what was found.
    fn scrubbed(&mut self, active: &mut Active, window: &Window) {
        self.close_window(window);
        let found = self.note_found(window);
        active.damaged.extend(found);
        active.checked += window.checked;
        self.io.counters.blocks_scrubbed += u64::from(window.checked);
        if let Some((home, why)) = window.home_damaged {
            let is_mended = self.write_anew(window.key, home);
            active
                .metadata
                .push(damaged_index(window.key, home.place, why, is_mended));
        }
    }

    /// Remembers which blocks of a window are damaged, and forgets those that are not any more.
    pub(super) fn note_found(&mut self, window: &Window) -> Vec<DamagedBlock> {
        let mut found = Vec::new();
        let (key, first) = (window.key.chunk, window.range().start());
        let lost = (0u8..=255).zip(window.entries());
        let lost = lost
            .filter(|(_, entry)| entry.is_damaged())
            .map(|(slot, _)| (slot, Why::Lost));
        for (slot, why) in window.damaged.iter().copied().chain(lost) {
            let block = first + u32::from(slot);
            let entry = window.entry(slot);
            // What was overwritten meanwhile is nobody's any more.
            if self.entry_now(key, block).is_some_and(|now| now != entry) {
                continue;
            }
            self.note_damaged(key, block);
            found.push(DamagedBlock {
                group: key.group,
                layer: key.layer,
                chunk: key.chunk,
                block,
                version: entry.version,
                why,
            });
        }
        if self.damaged.is_empty() {
            return found;
        }
        // A block that was damaged and is not any more: its sector can be read again.
        let range = (key, first)..=(key, first + 255);
        let known: Vec<u32> = self.damaged.range(range).map(|(_, block)| *block).collect();
        for block in known {
            let slot = (block - first) as u8;
            if window.damaged.iter().all(|(damaged, _)| *damaged != slot) && !window.entry(slot).is_damaged() {
                self.damaged.remove(&(key, block));
            }
        }
        found
    }

    /// A page is in memory and its copy on the device is damaged: the next checkpoint writes it anew.
    fn write_anew(&mut self, key: PageKey, home: Home) -> bool {
        if self.poisoned.is_some() || self.space.free() <= self.metadata_reserve() + 1 {
            return false;
        }
        let chunk = self.catalog.chunks.get(&key.chunk);
        let page = chunk.and_then(|chunk| chunk.pages.get(&key.page));
        let is_there = matches!(page, Some(Page::Resident(resident)) if resident.home == Some(home));
        if is_there {
            let mut effects = Effects::default();
            self.catalog.rewrite(key, &mut effects);
            self.settle(effects);
        }
        is_there
    }

    /// Begins with the superblocks, the headers of the checkpoints, and the free-space map.
    fn scrub_metadata(&mut self, mut active: Active) {
        let mut to_read = VecDeque::new();
        for (copy, place) in (0u8..).zip(Superblock::copies(self.identity.blocks)) {
            to_read.push_back((place, Expected::Superblock(copy)));
        }
        // While a checkpoint is being written, headers and homes change.
        if self.checkpoint.is_none() {
            let slot = (self.checkpoints.sequence % 2) as usize;
            to_read.push_back((CHECKPOINT_PLACES[slot], Expected::Header(slot)));
            to_read.push_back((CHECKPOINT_PLACES[1 - slot], Expected::OtherHeader(1 - slot)));
            let homes = (0..).zip(&self.space.homes);
            let homes = homes.filter_map(|(page, home)| Some((page, home.as_ref()?)));
            let copies = homes.flat_map(|(page, home)| home.places.map(|place| (place, Expected::Map(page, home.crc))));
            to_read.extend(copies.map(|(place, expected)| (DeviceBlock(place.into()), expected)));
        }
        let mut check = MetadataCheck {
            number: self.reads.begin(),
            to_read,
            in_flight: BTreeMap::new(),
            next_piece: 0,
            superblock: None,
        };
        self.pump_metadata(&mut check);
        active.open = Some(Open::Metadata(check));
        self.scrub.active = Some(active);
    }

    fn pump_metadata(&mut self, check: &mut MetadataCheck) {
        while check.in_flight.len() < self.limits.walk_reads_in_flight {
            let Some((place, expected)) = check.to_read.pop_front() else {
                break;
            };
            let token = self.io.read_at(place, 1);
            self.in_flight
                .insert(token, Purpose::Walk(Walker::Scrub, check.next_piece));
            check.in_flight.insert(check.next_piece, (place, expected));
            check.next_piece += 1;
        }
    }

    fn metadata_read_done(
        &mut self,
        mut active: Active,
        mut check: MetadataCheck,
        piece: u64,
        result: Result<Bytes, DiskError>,
    ) {
        let (place, expected) = check.in_flight.remove(&piece).expect("the piece is in flight");
        let why = match result {
            Err(error) => Some(Why::Unreadable(error)),
            Ok(block) if self.is_as_expected(&block, expected) => {
                if matches!(expected, Expected::Superblock(_)) {
                    check.superblock = Superblock::decode(&block).ok();
                }
                None
            }
            Ok(_) => Some(Why::Mismatch),
        };
        if let Some(why) = why {
            let mut is_mended = false;
            let kind = match expected {
                Expected::Superblock(_) => MetadataKind::Superblock,
                Expected::Header(_) | Expected::OtherHeader(_) => MetadataKind::CheckpointHeader,
                Expected::Map(page, _) => {
                    if self.poisoned.is_none() {
                        self.space.rewrite_page(page);
                        is_mended = true;
                    }
                    MetadataKind::MapPage
                }
            };
            active.metadata.push(DamagedMetadata {
                kind,
                place,
                why,
                is_mended,
            });
        }
        self.pump_metadata(&mut check);
        if check.in_flight.is_empty() {
            self.reads.end(check.number);
            if let Some(good) = check.superblock {
                self.mend_superblocks(good, &mut active.metadata);
            }
            return self.scrub_on(active);
        }
        active.open = Some(Open::Metadata(check));
        self.scrub.active = Some(active);
    }

    /// Damaged copies of the superblock are written anew from one that is whole.
    fn mend_superblocks(&mut self, good: Superblock, found: &mut [DamagedMetadata]) {
        if self.poisoned.is_some() {
            return;
        }
        for (copy, place) in (0u8..).zip(Superblock::copies(self.identity.blocks)) {
            let damaged = |found: &&mut DamagedMetadata| found.kind == MetadataKind::Superblock && found.place == place;
            if let Some(found) = found.iter_mut().find(damaged) {
                found.is_mended = true;
                self.mends.add(place.0 as u32, Superblock { copy, ..good }.encode());
            }
        }
    }

    fn is_as_expected(&self, block: &[u8], expected: Expected) -> bool {
        let end = self.space.allocator.space().end as u32;
        let header = |slot| CheckpointHeader::decode(block, slot, self.identity.device, end).is_some();
        match expected {
            Expected::Superblock(copy) => Superblock::decode(block)
                .is_ok_and(|superblock| superblock.identity == self.identity && superblock.copy == copy),
            Expected::Header(slot) => header(slot),
            Expected::OtherHeader(slot) => header(slot) || block.iter().all(|byte| *byte == 0),
            Expected::Map(_, crc) => crc32fast::hash(block) == crc,
        }
    }
}

fn damaged_leaf(from: ChunkKey, home: Option<Home>, why: Why) -> DamagedMetadata {
    DamagedMetadata {
        kind: MetadataKind::Leaf {
            group: from.group,
            layer: from.layer,
            chunk: from.chunk,
        },
        place: DeviceBlock(home.map_or(0, |home| home.place.into())),
        why,
        is_mended: false,
    }
}

fn damaged_index(key: PageKey, place: u32, why: Why, is_mended: bool) -> DamagedMetadata {
    DamagedMetadata {
        kind: MetadataKind::IndexPage {
            group: key.chunk.group,
            layer: key.chunk.layer,
            chunk: key.chunk.chunk,
            block: page_range(key).start(),
        },
        place: DeviceBlock(place.into()),
        why,
        is_mended,
    }
}
