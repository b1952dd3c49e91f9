//! All that the device durably holds: seals, replicas, and the index of blocks. Changed only by records, the same way
//! when a batch has become durable and when it is replayed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use cairn_proto::ids::{Generation, GroupId, Layer, Version, VolumeId};
use cairn_proto::limits::BLOCKS_PER_CHUNK;
use cairn_proto::units::BlockRange;

use super::canary::Canary;
use super::chunk::{Chunk, ChunkKey, Home, Page, PageKey, Resident, page_of, slot_of};
use super::entry::{Entry, Hole, Uniform};
use super::limits::PAGE_ENTRIES;
use super::record::{Record, Target};
use super::scrub_state::ScrubState;

/// A group's replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Replica {
    pub(super) role: u8,
    /// Blocks of data.
    pub(super) blocks: u64,
}

/// What a change did to space.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// Blocks that hold data now.
    pub(super) used: Vec<u32>,
    /// Blocks whose data nobody needs any more.
    pub(super) freed: Vec<u32>,
    /// Index pages on the device that the next checkpoint will not have.
    pub(super) stale: Vec<u32>,
}

/// The durable state of a device.
#[derive(Clone, Debug, Default)]
pub(super) struct Catalog {
    pub(super) seals: BTreeMap<VolumeId, Generation>,
    pub(super) replicas: BTreeMap<GroupId, Replica>,
    /// How far the scrub is; `None` if there never was one.
    pub(super) scrub: Option<ScrubState>,
    pub(super) chunks: BTreeMap<ChunkKey, Chunk>,
    /// Pages that differ from the last checkpoint.
    pub(super) dirty: BTreeSet<PageKey>,
    /// Pages in memory.
    pub(super) resident: BTreeSet<PageKey>,
    /// Pages in all chunks, of every kind: what the directory will hold.
    pub(super) pages: usize,
    pub(super) canary: Canary,
}

/// What a hole replaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Older {
    /// Blocks of data that it gives back.
    pub(super) data: u32,
    /// Pages that it changes and that stay pages.
    pub(super) pages: u32,
}

/// Why a block's entry is not at hand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unknown {
    /// Its page must be loaded.
    OnDisk(PageKey, Home),
    /// Its page is lost.
    Broken,
}

impl Target {
    pub(super) fn key(&self) -> ChunkKey {
        ChunkKey {
            group: self.group,
            chunk: self.range.chunk(),
            layer: self.layer,
        }
    }

    /// The pages that it lies on.
    pub(super) fn pages(&self) -> impl Iterator<Item = PageKey> {
        let chunk = self.key();
        (page_of(self.range.start())..=page_of(self.range.end() - 1)).map(move |page| PageKey { chunk, page })
    }
}

impl Catalog {
    pub(super) fn seal_of(&self, volume: VolumeId) -> Generation {
        self.seals.get(&volume).copied().unwrap_or(Generation::NONE)
    }

    /// Pages of the range that are not in memory.
    pub(super) fn unknown(&self, key: ChunkKey, range: BlockRange) -> impl Iterator<Item = Unknown> {
        let pages = page_of(range.start())..=page_of(range.end() - 1);
        let chunk = self.chunks.get(&key);
        let pages = chunk
            .into_iter()
            .flat_map(move |chunk| chunk.pages.range(pages.clone()));
        pages.filter_map(move |(page, state)| {
            unknown_page(
                PageKey {
                    chunk: key,
                    page: *page,
                },
                state,
            )
        })
    }

    /// Pages that a record needs and that are not in memory.
    pub(super) fn unknown_of(&self, record: &Record) -> Vec<Unknown> {
        match record {
            Record::Data { at, .. }
            | Record::Zero { at, .. }
            | Record::Discard { at, .. }
            | Record::Copy { at, .. }
            | Record::Move { at, .. } => self.unknown(at.key(), at.range).collect(),
            Record::DropReplica { group } => self.unknown_where(*group, |_| true),
            Record::DeleteLayer { group, layer } => self.unknown_where(*group, |key| key.layer == *layer),
            Record::Floor {
                group, layer, chunk, ..
            } => self.unknown_where(*group, |key| key.layer == *layer && key.chunk == *chunk),
            Record::Seal { .. } | Record::Replica { .. } | Record::Marker { .. } | Record::Scrub(_) => Vec::new(),
        }
    }

    fn unknown_where(&self, group: GroupId, matches: impl Fn(&ChunkKey) -> bool) -> Vec<Unknown> {
        let chunks = self.chunks_of(group).filter(|(key, _)| matches(key));
        let pages = chunks.flat_map(|(key, chunk)| chunk.pages.iter().map(move |(page, state)| (*key, *page, state)));
        let unknown = pages.filter_map(|(chunk, page, state)| unknown_page(PageKey { chunk, page }, state));
        unknown.filter(|unknown| *unknown != Unknown::Broken).collect()
    }

    /// The pages of a group that are pages.
    pub(super) fn pages_of_group(&self, group: GroupId) -> impl Iterator<Item = PageKey> {
        let pages = |(chunk, pages): (&ChunkKey, &Chunk)| {
            let chunk = *chunk;
            pages
                .pages
                .keys()
                .map(move |page| PageKey { chunk, page: *page })
                .collect::<Vec<_>>()
        };
        self.chunks_of(group).flat_map(pages)
    }

    /// The chunks of a group, in order.
    pub(super) fn chunks_of(&self, group: GroupId) -> impl Iterator<Item = (&ChunkKey, &Chunk)> {
        self.chunks_from(ChunkKey {
            group,
            chunk: Default::default(),
            layer: Layer(0),
        })
    }

    /// The chunks of a group from one on, in order.
    pub(super) fn chunks_from(&self, from: ChunkKey) -> impl Iterator<Item = (&ChunkKey, &Chunk)> {
        let chunks = self.chunks.range((Bound::Included(from), Bound::Unbounded));
        chunks.take_while(move |(key, _)| key.group == from.group)
    }

    /// The entries of a range. All of its pages must be in memory.
    pub(super) fn entries(&self, key: ChunkKey, range: BlockRange) -> impl Iterator<Item = Entry> {
        let chunk = self.chunks.get(&key);
        (range.start()..range.end()).map(move |block| match chunk {
            None => Entry::ABSENT,
            Some(chunk) => chunk.entry(block).expect("pages are loaded before they are used"),
        })
    }

    /// What in the range is older than `version`; `None` if nothing is. All of its pages must be in memory.
    pub(super) fn older(&self, key: ChunkKey, range: BlockRange, version: Version) -> Option<Older> {
        let never = Chunk::NEVER;
        let chunk = self.chunks.get(&key).unwrap_or(&never);
        let mut older = Older::default();
        let mut any = false;
        for (page, blocks) in pages_of(range) {
            let part = blocks.len() < PAGE_ENTRIES as usize;
            match chunk.pages.get(&page) {
                None | Some(Page::Uniform(_)) => {
                    let is_older = chunk.entry(blocks.start).is_some_and(|entry| entry.version < version);
                    any |= is_older;
                    older.pages += u32::from(is_older && part);
                }
                Some(Page::Resident(resident)) => {
                    let entries = &resident.entries[slot_of(blocks.start)..=slot_of(blocks.end - 1)];
                    let is_older = |entry: &&Entry| entry.version < version;
                    let data = entries
                        .iter()
                        .filter(is_older)
                        .filter(|entry| entry.data_place().is_some());
                    older.data += data.count() as u32;
                    let found = entries.iter().filter(is_older).count();
                    any |= found > 0;
                    older.pages += u32::from(found > 0 && (part || found < entries.len()));
                }
                Some(Page::OnDisk(_) | Page::Broken) => panic!("pages are loaded before they are used"),
            }
        }
        any.then_some(older)
    }

    /// Marks the pages of a range as used, so that they stay in memory a while.
    pub(super) fn touch(&mut self, key: ChunkKey, range: BlockRange) {
        let Some(chunk) = self.chunks.get_mut(&key) else { return };
        for (_, page) in chunk.pages.range_mut(page_of(range.start())..=page_of(range.end() - 1)) {
            if let Page::Resident(resident) = page {
                resident.used = true;
            }
        }
    }

    /// Puts a page that was loaded into memory, or notes that it is broken.
    pub(super) fn loaded(&mut self, key: PageKey, home: Home, content: Option<Resident>) {
        let chunk = self.chunks.get_mut(&key.chunk);
        let Some(page) = chunk.and_then(|chunk| chunk.pages.get_mut(&key.page)) else {
            return;
        };
        if !matches!(page, Page::OnDisk(there) if *there == home) {
            return;
        }
        *page = match content {
            Some(resident) => {
                self.resident.insert(key);
                Page::Resident(Box::new(resident))
            }
            None => Page::Broken,
        };
    }

    /// Drops a clean page from memory. Returns whether it was dropped.
    pub(super) fn evict(&mut self, key: PageKey) -> bool {
        let chunk = self.chunks.get_mut(&key.chunk).expect("a resident page has a chunk");
        let page = chunk.pages.get_mut(&key.page).expect("a resident page has its place");
        let Page::Resident(resident) = page else {
            panic!("{key:?} is listed as resident")
        };
        if resident.dirty || std::mem::take(&mut resident.used) {
            return false;
        }
        *page = Page::OnDisk(resident.home.expect("a clean page has a home"));
        self.resident.remove(&key);
        true
    }

    /// Applies a record. All pages that it needs must be in memory, or broken: those stay as they are.
    pub(super) fn apply(&mut self, record: &Record, effects: &mut Effects) {
        match record {
            Record::Data {
                at,
                version,
                checksums,
                extents,
            } => {
                let places = extents
                    .iter()
                    .flat_map(|extent| extent.place..extent.place + extent.count);
                let entries = places.zip(checksums);
                let entries = entries.map(|(place, checksum)| Entry::data(*version, *checksum, place));
                self.set(at, entries, effects);
            }
            Record::Copy { at, entries } => self.set(at, entries.iter().copied(), effects),
            Record::Zero { at, version } => self.punch(at, Hole::Zero, *version, effects),
            Record::Discard { at, version } => {
                let version = if self.canary.forget_tombstones() {
                    Version::ZERO
                } else {
                    *version
                };
                self.punch(at, Hole::Absent, version, effects);
            }
            Record::Seal { volume, generation } => {
                let held = self.seals.entry(*volume).or_default();
                *held = (*held).max(*generation);
            }
            Record::Replica { group, role } => self.replicas.entry(*group).or_default().role = *role,
            Record::DropReplica { group } => {
                self.forget_chunks(*group, |_| true, effects);
                self.replicas.remove(group);
            }
            Record::DeleteLayer { group, layer } => self.forget_chunks(*group, |key| key.layer == *layer, effects),
            Record::Move { at, moves } => {
                for (block, moved) in (at.range.start()..).zip(moves) {
                    let entry = self.chunks.get(&at.key()).and_then(|chunk| chunk.entry(block));
                    match entry {
                        Some(mut entry) if entry.data_place() == Some(moved.from) || self.canary.move_unchecked() => {
                            entry.place = moved.to;
                            let one = BlockRange::new(at.range.chunk(), block, 1).expect("a block of the range");
                            self.set(&Target { range: one, ..*at }, [entry].into_iter(), effects);
                        }
                        // Its page is broken: nothing is known of the block, here or there.
                        _ => {}
                    }
                }
            }
            Record::Marker { .. } => {}
            Record::Scrub(state) => self.scrub = Some(*state),
            Record::Floor {
                group,
                layer,
                chunk,
                version,
            } => {
                let key = ChunkKey {
                    group: *group,
                    chunk: *chunk,
                    layer: *layer,
                };
                self.raise(key, *version, effects);
            }
        }
    }

    fn set(&mut self, at: &Target, mut entries: impl Iterator<Item = Entry>, effects: &mut Effects) {
        let key = at.key();
        let chunk = self.chunks.entry(key).or_insert(Chunk::NEVER);
        let pages = chunk.pages.len();
        let mut delta = 0;
        for (page, blocks) in pages_of(at.range) {
            let key = PageKey { chunk: key, page };
            let Some(resident) = materialise(chunk, key, &mut self.resident, &mut self.dirty) else {
                entries.by_ref().take(blocks.len()).for_each(drop);
                continue;
            };
            for block in blocks {
                let entry = entries.next().expect("one entry per block");
                let old = std::mem::replace(&mut resident.entries[slot_of(block)], entry);
                delta += count(old, entry, effects);
            }
        }
        self.pages = self.pages + chunk.pages.len() - pages;
        self.count_blocks(at.group, delta);
    }

    fn count_blocks(&mut self, group: GroupId, delta: i64) {
        if let Some(replica) = self.replicas.get_mut(&group) {
            replica.blocks = replica
                .blocks
                .checked_add_signed(delta)
                .expect("a replica's blocks are counted");
        }
    }

    /// Makes a hole of what is older than `version`.
    fn punch(&mut self, at: &Target, hole: Hole, version: Version, effects: &mut Effects) {
        let to = Uniform { hole, version };
        let key = at.key();
        let chunk = self.chunks.entry(key).or_insert(Chunk::NEVER);
        let pages = chunk.pages.len();
        let mut delta = 0;
        if at.range.count() == BLOCKS_PER_CHUNK {
            let numbers: Vec<u8> = chunk.pages.keys().copied().collect();
            for page in numbers {
                delta += punch_page(
                    chunk,
                    PageKey { chunk: key, page },
                    0..PAGE_ENTRIES,
                    to,
                    effects,
                    &mut self.resident,
                    &mut self.dirty,
                );
            }
            let forget = self.canary.forget_tombstones() && hole == Hole::Absent;
            if version > chunk.floor.version || forget {
                chunk.floor = to;
            }
            let floor = chunk.floor;
            chunk
                .pages
                .retain(|_, page| !matches!(page, Page::Uniform(uniform) if *uniform == floor));
        } else {
            for (page, blocks) in pages_of(at.range) {
                let slots = slot_of(blocks.start) as u32..slot_of(blocks.end - 1) as u32 + 1;
                delta += punch_page(
                    chunk,
                    PageKey { chunk: key, page },
                    slots,
                    to,
                    effects,
                    &mut self.resident,
                    &mut self.dirty,
                );
            }
        }
        self.pages = self.pages + chunk.pages.len() - pages;
        self.count_blocks(at.group, delta);
    }

    /// Absent blocks of a chunk get at least this version.
    fn raise(&mut self, key: ChunkKey, version: Version, effects: &mut Effects) {
        let chunk = self.chunks.entry(key).or_insert(Chunk::NEVER);
        let raised = |uniform: Uniform| match uniform.hole {
            Hole::Absent => Uniform {
                version: uniform.version.max(version),
                ..uniform
            },
            Hole::Zero => uniform,
        };
        let numbers: Vec<u8> = chunk.pages.keys().copied().collect();
        for page in numbers {
            let key = PageKey { chunk: key, page };
            match chunk.pages.get_mut(&page).expect("a page of the chunk") {
                Page::Uniform(uniform) => *uniform = raised(*uniform),
                Page::OnDisk(_) => panic!("{key:?} is loaded before it is used"),
                Page::Broken => {}
                Page::Resident(resident) => {
                    for entry in &mut resident.entries {
                        if entry.is_absent() && entry.version < version {
                            entry.version = version;
                            resident.dirty = true;
                            self.dirty.insert(key);
                        }
                    }
                    collapse(chunk, key, effects, &mut self.resident, &mut self.dirty);
                }
            }
        }
        chunk.floor = raised(chunk.floor);
    }

    fn forget_chunks(&mut self, group: GroupId, matches: impl Fn(&ChunkKey) -> bool, effects: &mut Effects) {
        let keys: Vec<ChunkKey> = self.chunks_of(group).map(|(key, _)| *key).filter(matches).collect();
        let mut freed = 0;
        for key in keys {
            let chunk = self.chunks.remove(&key).expect("a chunk of the group");
            self.pages -= chunk.pages.len();
            for (page, state) in chunk.pages {
                let key = PageKey { chunk: key, page };
                match state {
                    Page::Uniform(_) | Page::Broken => {}
                    Page::OnDisk(_) => panic!("{key:?} is loaded before it is used"),
                    Page::Resident(resident) => {
                        effects.stale.extend(resident.home.map(|home| home.place));
                        let places = resident.entries.iter().filter_map(Entry::data_place);
                        let before = effects.freed.len();
                        effects.freed.extend(places);
                        freed += (effects.freed.len() - before) as i64;
                        self.resident.remove(&key);
                        self.dirty.remove(&key);
                    }
                }
            }
        }
        self.count_blocks(group, -freed);
    }

    /// Panics if the sets that say which pages are in memory and dirty disagree with the pages.
    pub(super) fn check_invariants(&self) {
        let (mut resident, mut dirty, mut pages) = (0, 0, 0);
        for chunk in self.chunks.values() {
            pages += chunk.pages.len();
            for page in chunk.pages.values() {
                if let Page::Resident(page) = page {
                    resident += 1;
                    dirty += usize::from(page.dirty);
                    assert!(page.dirty || page.home.is_some(), "a clean page has a home");
                }
            }
        }
        let listed = (self.resident.len(), self.dirty.len(), self.pages);
        assert_eq!((resident, dirty, pages), listed, "pages in memory, dirty, and all");
    }
}

fn unknown_page(key: PageKey, page: &Page) -> Option<Unknown> {
    match page {
        Page::OnDisk(home) => Some(Unknown::OnDisk(key, *home)),
        Page::Broken => Some(Unknown::Broken),
        Page::Uniform(_) | Page::Resident(_) => None,
    }
}

/// The pages of a range, and the blocks of it that each has.
fn pages_of(range: BlockRange) -> impl Iterator<Item = (u8, std::ops::Range<u32>)> {
    (page_of(range.start())..=page_of(range.end() - 1)).map(move |page| {
        let start = u32::from(page) * PAGE_ENTRIES;
        (page, start.max(range.start())..(start + PAGE_ENTRIES).min(range.end()))
    })
}

/// Accounts for an entry that replaces another; returns the change in blocks of data.
fn count(old: Entry, new: Entry, effects: &mut Effects) -> i64 {
    let (old, new) = (old.data_place(), new.data_place());
    effects.freed.extend(old);
    effects.used.extend(new);
    i64::from(new.is_some()) - i64::from(old.is_some())
}

/// The page in memory and dirty, whatever it was; `None` if it is broken.
fn materialise<'a>(
    chunk: &'a mut Chunk,
    key: PageKey,
    resident: &mut BTreeSet<PageKey>,
    dirty: &mut BTreeSet<PageKey>,
) -> Option<&'a mut Resident> {
    let floor = chunk.floor;
    let page = chunk.pages.entry(key.page).or_insert(Page::Uniform(floor));
    if let Page::Uniform(uniform) = page {
        *page = Page::Resident(Box::new(Resident::new(*uniform)));
        resident.insert(key);
    }
    match page {
        Page::Resident(page) => {
            page.used = true;
            if !std::mem::replace(&mut page.dirty, true) {
                dirty.insert(key);
            }
            Some(page)
        }
        Page::Broken => None,
        Page::OnDisk(_) | Page::Uniform(_) => panic!("{key:?} is loaded before it is used"),
    }
}

/// Makes a hole of what is older in some slots of a page; returns the change in blocks of data.
fn punch_page(
    chunk: &mut Chunk,
    key: PageKey,
    slots: std::ops::Range<u32>,
    to: Uniform,
    effects: &mut Effects,
    resident: &mut BTreeSet<PageKey>,
    dirty: &mut BTreeSet<PageKey>,
) -> i64 {
    let floor = chunk.floor;
    // With version zero (a planted bug) everything counts as older.
    let older = |version: Version| version < to.version || to.version == Version::ZERO;
    if let Page::Uniform(uniform) = chunk.pages.entry(key.page).or_insert(Page::Uniform(floor)) {
        let whole = slots.len() == PAGE_ENTRIES as usize;
        if whole && older(uniform.version) {
            *uniform = to;
        }
        if whole || !older(uniform.version) {
            return 0;
        }
    }
    let mut delta = 0;
    let Some(page) = materialise(chunk, key, resident, dirty) else {
        return 0;
    };
    for slot in slots {
        let entry = &mut page.entries[slot as usize];
        if older(entry.version) {
            delta += count(*entry, to.entry(), effects);
            *entry = to.entry();
        }
    }
    collapse(chunk, key, effects, resident, dirty);
    delta
}

/// A page that is all one hole needs no page.
fn collapse(
    chunk: &mut Chunk,
    key: PageKey,
    effects: &mut Effects,
    resident: &mut BTreeSet<PageKey>,
    dirty: &mut BTreeSet<PageKey>,
) {
    let Some(Page::Resident(page)) = chunk.pages.get(&key.page) else {
        return;
    };
    let Some(uniform) = page.uniform() else { return };
    effects.stale.extend(page.home.map(|home| home.place));
    resident.remove(&key);
    dirty.remove(&key);
    chunk.pages.insert(key.page, Page::Uniform(uniform));
}
