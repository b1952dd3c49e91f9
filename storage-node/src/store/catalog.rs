//! All that the device durably holds: seals, replicas, and the index of blocks. Changed only by records, the same way
//! when a batch has become durable and when it is replayed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Bound, RangeInclusive};

use cairn_proto::block::Apply;
use cairn_proto::ids::{ChunkIndex, Epoch, Generation, GroupId, Layer, Version, VolumeId};
use cairn_proto::units::BlockRange;

use super::canary::Canary;
use super::chunk::{Chunk, ChunkKey, Home, PAGE_MEMORY, Page, PageKey, Resident, page_of, slot_of};
use super::doomed::Doomed;
use super::entry::Entry;
use super::freeze::Frozen;
use super::leaf::{LEAF_CAPACITY, LEAF_MEMORY, Leaf, LeafSize, LeafState, decode_leaf};
use super::limits::{PAGE_ENTRIES, StoreLimits};
use super::record::{Record, Target};
use super::scrub_state::ScrubState;

/// A group's replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Replica {
    pub(super) role: u8,
    /// Of the configuration that last said so.
    pub(super) epoch: Epoch,
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
    /// Leaves on the device that the next checkpoint will not have.
    pub(super) stale_leaves: Vec<u32>,
    /// A replica that would have fewer blocks than none.
    pub(super) miscounted: Option<GroupId>,
}

/// The durable state of a device.
///
/// The index has two levels of blocks below the table of leaves: leaves list chunks, and index pages list blocks. Both
/// come into memory when they are needed. A page or leaf that is changed loses its home at once; the next checkpoint
/// gives it a new one.
#[derive(Debug)]
pub(super) struct Catalog {
    pub(super) seals: BTreeMap<VolumeId, Generation>,
    pub(super) replicas: BTreeMap<GroupId, Replica>,
    /// Blocks of data by layer, where there are any.
    pub(super) layers: BTreeMap<(GroupId, Layer), u64>,
    /// What was dropped and still takes space.
    pub(super) doomed: BTreeSet<Doomed>,
    /// A part of the index was forgotten that could not be read: the map may have blocks that nobody needs.
    pub(super) orphans: bool,
    /// How far the scrub is; `None` if there never was one.
    pub(super) scrub: Option<ScrubState>,
    /// The leaves, each under the lowest key it may have; together they cover all keys.
    pub(super) leaves: BTreeMap<ChunkKey, Leaf>,
    /// The chunks of the leaves that are in memory.
    pub(super) chunks: BTreeMap<ChunkKey, Chunk>,
    /// Leaves in memory.
    pub(super) loaded: BTreeSet<ChunkKey>,
    /// Pages in memory.
    pub(super) resident: BTreeSet<PageKey>,
    /// Pages that were changed since the last checkpoint began.
    pub(super) dirty: BTreeSet<PageKey>,
    /// Leaves that were changed since then, or that have such a page.
    pub(super) dirty_leaves: BTreeSet<ChunkKey>,
    /// Counts the checkpoints that have begun. What is changed is of this epoch.
    pub(super) epoch: u64,
    /// What was changed in this epoch or before is on the device, where it has a home.
    pub(super) stored: u64,
    /// What the checkpoint being written has yet to encode.
    pub(super) frozen: Frozen,
    /// Bytes of the chunks in memory, without their resident pages.
    pub(super) chunk_memory: usize,
    /// Bytes of chunks above which a leaf is split, if it has more than one.
    pub(super) leaf_bytes_max: usize,
    pub(super) canary: Canary,
}

/// What a hole replaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct GivesWay {
    /// Blocks of data that it gives back.
    pub(super) data: u32,
    /// Pages that it changes and that stay pages.
    pub(super) pages: u32,
}

/// Why a block's entry is not at hand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unknown {
    /// The leaf under this key must be loaded.
    Leaf(ChunkKey, Home),
    /// Its page must be loaded.
    OnDisk(PageKey, Home),
    /// Its page or leaf is lost.
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
    pub(super) fn new(limits: &StoreLimits) -> Catalog {
        Catalog {
            seals: BTreeMap::new(),
            replicas: BTreeMap::new(),
            layers: BTreeMap::new(),
            doomed: BTreeSet::new(),
            orphans: false,
            scrub: None,
            leaves: BTreeMap::from([(ChunkKey::MIN, Leaf::empty())]),
            chunks: BTreeMap::new(),
            loaded: BTreeSet::from([ChunkKey::MIN]),
            resident: BTreeSet::new(),
            dirty: BTreeSet::new(),
            dirty_leaves: BTreeSet::new(),
            epoch: 1,
            stored: 0,
            frozen: Frozen::default(),
            chunk_memory: 0,
            leaf_bytes_max: limits.leaf_bytes_max.min(LEAF_CAPACITY),
            canary: limits.canary,
        }
    }

    /// Takes a leaf of the root.
    pub(super) fn list_leaf(&mut self, from: ChunkKey, leaf: Leaf) {
        if leaf.state == LeafState::Loaded {
            self.loaded.insert(from);
        } else {
            self.loaded.remove(&from);
        }
        self.leaves.insert(from, leaf);
    }

    pub(super) fn seal_of(&self, volume: VolumeId) -> Generation {
        self.seals.get(&volume).copied().unwrap_or(Generation::NONE)
    }

    /// Bytes of memory that the index takes.
    pub(super) fn memory(&self) -> usize {
        self.resident.len() * PAGE_MEMORY + self.leaves.len() * LEAF_MEMORY + self.chunk_memory
    }

    /// Bytes of it that can't be given back before the next checkpoint.
    pub(super) fn dirty_memory(&self) -> usize {
        let leaves = self.dirty_leaves.iter().map(|from| self.leaves[from].size.memory);
        self.dirty.len() * PAGE_MEMORY + leaves.sum::<usize>()
    }

    /// The leaf that has a key, and where it begins.
    pub(super) fn leaf_of(&self, key: ChunkKey) -> (ChunkKey, &Leaf) {
        let found = self.leaves.range(..=key).next_back();
        let (from, leaf) = found.expect("the leaves cover all keys");
        (*from, leaf)
    }

    /// The key after the last one that a leaf may have; `None` if it is the last leaf.
    pub(super) fn leaf_end(&self, from: ChunkKey) -> Option<ChunkKey> {
        let after = self.leaves.range((Bound::Excluded(from), Bound::Unbounded));
        after.map(|(key, _)| *key).next()
    }

    /// The chunks of a leaf that is in memory.
    pub(super) fn chunks_in(&self, from: ChunkKey) -> impl Iterator<Item = (&ChunkKey, &Chunk)> {
        let end = self.leaf_end(from);
        self.chunks
            .range((Bound::Included(from), end.map_or(Bound::Unbounded, Bound::Excluded)))
    }

    /// Whether a part of the index of a group's replica is known to be lost. Looks at what of it is in memory.
    pub(super) fn is_index_lost(&self, group: GroupId) -> bool {
        let first = ChunkKey {
            group,
            chunk: ChunkIndex(0),
            layer: Layer(0),
        };
        let last = ChunkKey {
            chunk: ChunkIndex(u32::MAX),
            layer: Layer(u32::MAX),
            ..first
        };
        let (from, _) = self.leaf_of(first);
        let mut leaves = self.leaves.range(from..=last);
        let is_broken = |page: &Page| matches!(page, Page::Broken);
        leaves.any(|(_, leaf)| leaf.state == LeafState::Broken)
            || self
                .chunks_of(group)
                .any(|(_, chunk)| chunk.pages.values().any(is_broken))
    }

    pub(super) fn unknown_leaf(&self, from: ChunkKey, leaf: &Leaf) -> Option<Unknown> {
        match leaf.state {
            LeafState::Loaded => None,
            LeafState::OnDisk(home) => Some(Unknown::Leaf(from, home)),
            LeafState::Broken => Some(Unknown::Broken),
        }
    }

    /// Why the chunk's table is not at hand; `None` if it is.
    pub(super) fn unknown_chunk(&self, key: ChunkKey) -> Option<Unknown> {
        let (from, leaf) = self.leaf_of(key);
        self.unknown_leaf(from, leaf)
    }

    /// What of a range must be loaded, or can't be: its leaf, or pages of it.
    pub(super) fn unknown(&self, key: ChunkKey, range: BlockRange) -> impl Iterator<Item = Unknown> {
        self.unknown_pages(key, page_of(range.start())..=page_of(range.end() - 1))
    }

    fn unknown_pages(&self, key: ChunkKey, pages: RangeInclusive<u8>) -> impl Iterator<Item = Unknown> {
        let leaf = self.unknown_chunk(key);
        let chunk = self.chunks.get(&key).filter(|_| leaf.is_none());
        let pages = chunk
            .into_iter()
            .flat_map(move |chunk| chunk.pages.range(pages.clone()));
        let pages = pages.filter_map(move |(page, state)| unknown_page(PageKey { chunk: key, page }, state));
        leaf.into_iter().chain(pages)
    }

    /// What a record needs and that is not in memory. Once it is loaded there may be more.
    pub(super) fn unknown_of(&self, record: &Record) -> Vec<Unknown> {
        let mut unknown: Vec<Unknown> = match record {
            Record::Data { at, .. }
            | Record::Zero { at, .. }
            | Record::Discard { at, .. }
            | Record::ResyncHole { at, .. }
            | Record::Copy { at, .. }
            | Record::Move { at, .. } => self.unknown(at.key(), at.range).collect(),
            Record::Floor {
                group, layer, chunk, ..
            } => {
                let key = ChunkKey {
                    group: *group,
                    chunk: *chunk,
                    layer: *layer,
                };
                self.unknown(key, BlockRange::whole(*chunk)).collect()
            }
            Record::Reclaim { key, first, last } => self.unknown_pages(*key, *first..=*last).collect(),
            Record::Reclaimed { doomed } if doomed.layer.is_none() => self.unknown_leaves(doomed.group),
            Record::Seal { .. }
            | Record::Replica { .. }
            | Record::DropReplica { .. }
            | Record::DeleteLayer { .. }
            | Record::Reclaimed { .. }
            | Record::Marker { .. }
            | Record::Scrub(_) => Vec::new(),
        };
        unknown.retain(|unknown| *unknown != Unknown::Broken);
        unknown
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

    /// Where the data of a range stands. All of its pages must be in memory.
    pub(super) fn places(&self, key: ChunkKey, range: BlockRange) -> impl Iterator<Item = u32> {
        let chunk = self.chunks.get(&key);
        let pages = chunk.into_iter().flat_map(move |chunk| {
            pages_of(range).filter_map(|(page, blocks)| match chunk.pages.get(&page) {
                Some(Page::Resident(resident)) => {
                    Some(&resident.entries[slot_of(blocks.start)..=slot_of(blocks.end - 1)])
                }
                _ => None,
            })
        });
        pages.flatten().filter_map(Entry::data_place)
    }

    /// What in the range gives way to a hole of this version; `None` if nothing does. All of its pages must be in memory.
    pub(super) fn gives_way(
        &self,
        key: ChunkKey,
        range: BlockRange,
        version: Version,
        apply: Apply,
    ) -> Option<GivesWay> {
        let never = Chunk::NEVER;
        let chunk = self.chunks.get(&key).unwrap_or(&never);
        let gives = |entry: &Entry| apply.applies(entry.version, version);
        let mut way = GivesWay::default();
        let mut any = false;
        for (page, blocks) in pages_of(range) {
            let part = blocks.len() < PAGE_ENTRIES as usize;
            match chunk.pages.get(&page) {
                None | Some(Page::Uniform(_)) => {
                    let gives = chunk.entry(blocks.start).is_some_and(|entry| gives(&entry));
                    any |= gives;
                    way.pages += u32::from(gives && part);
                }
                Some(Page::Resident(resident)) => {
                    let entries = &resident.entries[slot_of(blocks.start)..=slot_of(blocks.end - 1)];
                    let giving = || entries.iter().filter(|entry| gives(entry));
                    way.data += giving().filter(|entry| entry.data_place().is_some()).count() as u32;
                    let found = giving().count();
                    any |= found > 0;
                    way.pages += u32::from(found > 0 && (part || found < entries.len()));
                }
                Some(Page::OnDisk(_) | Page::Broken) => panic!("pages are loaded before they are used"),
            }
        }
        any.then_some(way)
    }

    /// Whether a chunk has absent blocks of a lower version. All of its pages must be in memory.
    pub(super) fn has_lower(&self, key: ChunkKey, version: Version) -> bool {
        let never = Chunk::NEVER;
        let chunk = self.chunks.get(&key).unwrap_or(&never);
        let lower = |entry: &Entry| entry.is_absent() && entry.version < version;
        let in_page = |page: &Page| match page {
            Page::Uniform(uniform) => lower(&uniform.entry()),
            Page::Resident(resident) => resident.entries.iter().any(lower),
            Page::OnDisk(_) | Page::Broken => panic!("pages are loaded before they are used"),
        };
        lower(&chunk.floor.entry()) || chunk.pages.values().any(in_page)
    }

    /// Marks the pages of a range as used, so that they stay in memory a while.
    pub(super) fn touch(&mut self, key: ChunkKey, range: BlockRange) {
        let (from, _) = self.leaf_of(key);
        self.leaves.get_mut(&from).expect("it was just found").used = true;
        let Some(chunk) = self.chunks.get_mut(&key) else { return };
        for page in page_of(range.start())..=page_of(range.end() - 1) {
            if let Some(Page::Resident(resident)) = chunk.pages.get_mut(&page) {
                resident.used = true;
            }
        }
    }

    /// Whether the blocks of each replica are those of its layers, and there are no others.
    pub(super) fn layers_are_counted(&self) -> bool {
        let mut left: BTreeMap<GroupId, u64> = BTreeMap::new();
        left.extend(self.replicas.iter().map(|(group, replica)| (*group, replica.blocks)));
        let counted = self.layers.iter().all(|((group, _), blocks)| {
            let rest = left
                .get_mut(group)
                .and_then(|left| Some((left.checked_sub(*blocks)?, left)));
            rest.map(|(rest, left)| *left = rest).is_some()
        });
        counted && left.values().all(|left| *left == 0)
    }

    /// Puts a page that was loaded into memory, or notes that it is broken.
    pub(super) fn loaded_page(&mut self, key: PageKey, home: Home, content: Option<Resident>, effects: &mut Effects) {
        let chunk = self.chunks.get_mut(&key.chunk);
        let Some(page) = chunk.and_then(|chunk| chunk.pages.get_mut(&key.page)) else {
            return;
        };
        if !matches!(page, Page::OnDisk(there) if *there == home) {
            return;
        }
        match content {
            Some(resident) => {
                *page = Page::Resident(Box::new(resident));
                self.resident.insert(key);
            }
            // The leaf is written anew, so that it stays known.
            None => self.change(key.chunk, effects, |chunk, pages| {
                *chunk.pages.get_mut(&key.page).expect("it was just found") = Page::Broken;
                pages.effects.stale.push(home.place);
                0
            }),
        }
    }

    /// Puts a leaf that was loaded into memory, or notes that it is broken. `block` is what was read.
    pub(super) fn loaded_leaf(&mut self, from: ChunkKey, home: Home, block: &[u8], end: u32, effects: &mut Effects) {
        let range = (from, self.leaf_end(from));
        let Some(leaf) = self.leaves.get_mut(&from) else { return };
        if leaf.state != LeafState::OnDisk(home) {
            return;
        }
        let Some(chunks) = decode_leaf(block, home, range, end) else {
            leaf.state = LeafState::Broken;
            leaf.home = None;
            effects.stale_leaves.push(home.place);
            return;
        };
        leaf.state = LeafState::Loaded;
        leaf.used = true;
        leaf.size = LeafSize::default();
        chunks.iter().for_each(|(_, chunk)| leaf.size.add(chunk));
        self.chunk_memory += leaf.size.memory;
        self.chunks.extend(chunks);
        self.loaded.insert(from);
    }

    /// Drops a page from memory if the device has it as it is. Returns whether it was dropped.
    pub(super) fn evict(&mut self, key: PageKey) -> bool {
        let chunk = self.chunks.get_mut(&key.chunk).expect("a resident page has a chunk");
        let page = chunk.pages.get_mut(&key.page).expect("a resident page has its place");
        let Page::Resident(resident) = page else {
            panic!("{key:?} is listed as resident")
        };
        let (Some(home), true) = (resident.home, resident.epoch <= self.stored) else {
            return false;
        };
        if std::mem::take(&mut resident.used) {
            return false;
        }
        *page = Page::OnDisk(home);
        self.resident.remove(&key);
        true
    }

    /// Drops a leaf from memory if the device has it as it is and none of its pages is in memory. Returns whether it was
    /// dropped.
    pub(super) fn evict_leaf(&mut self, from: ChunkKey) -> bool {
        let end = self.leaf_end(from);
        let leaf = self.leaves.get_mut(&from).expect("a loaded leaf is listed");
        let (Some(home), true) = (leaf.home, leaf.epoch <= self.stored) else {
            return false;
        };
        if std::mem::take(&mut leaf.used) || self.resident.range(pages_between(from, end)).next().is_some() {
            return false;
        }
        leaf.state = LeafState::OnDisk(home);
        self.chunk_memory -= leaf.size.memory;
        leaf.size = LeafSize::default();
        let last = end.map_or(Bound::Unbounded, Bound::Excluded);
        let keys: Vec<ChunkKey> = self
            .chunks
            .range((Bound::Included(from), last))
            .map(|(key, _)| *key)
            .collect();
        keys.iter().for_each(|key| drop(self.chunks.remove(key)));
        self.loaded.remove(&from);
        true
    }

    /// Panics if what is counted or listed disagrees with what is there.
    pub(super) fn check_invariants(&self) {
        assert!(self.layers_are_counted(), "{:?} of {:?}", self.layers, self.replicas);
        let mut resident = 0;
        for (key, chunk) in &self.chunks {
            assert!(!chunk.is_never(), "{key:?} says nothing");
            for (page, state) in chunk.pages.iter() {
                let Page::Resident(page_state) = state else { continue };
                let key = PageKey { chunk: *key, page };
                resident += 1;
                assert!(self.resident.contains(&key), "{key:?} is listed as resident");
                let dirty = page_state.epoch == self.epoch;
                assert_eq!(dirty, self.dirty.contains(&key), "{key:?} is dirty");
                let waits = self.frozen.pages.contains(&key);
                assert_eq!(page_state.home.is_none(), dirty || waits, "the home of {key:?}");
            }
        }
        assert_eq!(resident, self.resident.len(), "pages in memory");
        assert!(self.dirty.is_subset(&self.resident), "dirty pages are in memory");
        assert!(self.leaves.contains_key(&ChunkKey::MIN), "leaves cover all keys");
        let mut memory = 0;
        for (from, leaf) in &self.leaves {
            let mut size = LeafSize::default();
            self.chunks_in(*from).for_each(|(_, chunk)| size.add(chunk));
            assert_eq!(size, leaf.size, "the size of leaf {from:?}");
            assert!(size.bytes <= LEAF_CAPACITY, "leaf {from:?} has {} bytes", size.bytes);
            memory += size.memory;
            assert_eq!(
                leaf.state == LeafState::Loaded,
                self.loaded.contains(from),
                "leaf {from:?}"
            );
            assert_eq!(
                leaf.epoch == self.epoch,
                self.dirty_leaves.contains(from),
                "leaf {from:?} is dirty"
            );
        }
        assert_eq!(memory, self.chunk_memory, "bytes of chunks in memory");
        assert!(self.dirty_leaves.is_subset(&self.loaded), "dirty leaves are in memory");
        let covered = |page: &PageKey| self.dirty_leaves.contains(&self.leaf_of(page.chunk).0);
        assert!(self.dirty.iter().all(covered), "a dirty page has a dirty leaf");
    }
}

/// All pages that chunks of a key range can have.
pub(super) fn pages_between(from: ChunkKey, end: Option<ChunkKey>) -> (Bound<PageKey>, Bound<PageKey>) {
    let first = |chunk| PageKey { chunk, page: 0 };
    let end = end.map_or(Bound::Unbounded, |end| Bound::Excluded(first(end)));
    (Bound::Included(first(from)), end)
}

pub(super) fn unknown_page(key: PageKey, page: &Page) -> Option<Unknown> {
    match page {
        Page::OnDisk(home) => Some(Unknown::OnDisk(key, *home)),
        Page::Broken => Some(Unknown::Broken),
        Page::Uniform(_) | Page::Resident(_) => None,
    }
}

/// The pages of a range, and the blocks of it that each has.
pub(super) fn pages_of(range: BlockRange) -> impl Iterator<Item = (u8, std::ops::Range<u32>)> {
    (page_of(range.start())..=page_of(range.end() - 1)).map(move |page| {
        let start = u32::from(page) * PAGE_ENTRIES;
        (page, start.max(range.start())..(start + PAGE_ENTRIES).min(range.end()))
    })
}
