//! What each record does to the catalog.

use std::collections::BTreeSet;
use std::ops::Range;

use cairn_proto::block::Apply;
use cairn_proto::ids::Version;
use cairn_proto::limits::BLOCKS_PER_CHUNK;
use cairn_proto::units::BlockRange;

use super::catalog::{Catalog, Effects, pages_of};
use super::chunk::{Chunk, ChunkKey, Page, PageKey, Resident, slot_of};
use super::entry::{Entry, Hole, Uniform};
use super::freeze::Frozen;
use super::leaf::{LEAF_CAPACITY, Leaf, LeafState};
use super::limits::PAGE_ENTRIES;
use super::record::{Record, Target};

/// What is at hand while the pages of a chunk are changed.
pub(super) struct Pages<'a> {
    chunk: ChunkKey,
    epoch: u64,
    resident: &'a mut BTreeSet<PageKey>,
    dirty: &'a mut BTreeSet<PageKey>,
    frozen: &'a mut Frozen,
    orphans: &'a mut bool,
    pub(super) effects: &'a mut Effects,
}

impl Catalog {
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
            Record::Zero { at, version } => {
                let (hole, version) = (Hole::Zero, *version);
                self.punch(at, Uniform { hole, version }, Apply::IfNewer, effects);
            }
            Record::Discard { at, version } => {
                let version = if self.canary.forget_tombstones() {
                    Version::ZERO
                } else {
                    *version
                };
                let hole = Hole::Absent;
                self.punch(at, Uniform { hole, version }, Apply::IfNewer, effects);
            }
            Record::ResyncHole { at, hole, generation } => {
                self.punch(at, *hole, Apply::Resync(*generation), effects);
            }
            Record::Seal { volume, generation } => {
                let held = self.seals.entry(*volume).or_default();
                *held = (*held).max(*generation);
            }
            Record::Replica { group, role, epoch } => {
                let replica = self.replicas.entry(*group).or_default();
                (replica.role, replica.epoch) = (*role, *epoch);
            }
            Record::DropReplica { group } => self.drop_replica(*group),
            Record::DeleteLayer { group, layer } => self.delete_layer(*group, *layer),
            Record::Reclaim { key, first, last } => self.reclaim(*key, (*first, *last), effects),
            Record::Reclaimed { doomed } => self.reclaimed(*doomed, effects),
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
                self.change(key, effects, |chunk, pages| raise(chunk, *version, pages));
            }
        }
    }

    /// Changes a chunk: its leaf and then each page is kept for the checkpoint being written, if that has it yet to
    /// write. `change` returns the change in blocks of data. Nothing is done to a chunk whose leaf is broken.
    pub(super) fn change(
        &mut self,
        key: ChunkKey,
        effects: &mut Effects,
        change: impl FnOnce(&mut Chunk, &mut Pages<'_>) -> i64,
    ) {
        let (from, _) = self.leaf_of(key);
        if !self.change_leaf(from, effects) {
            return;
        }
        let leaf = self.leaves.get_mut(&from).expect("it was just found");
        let memory = leaf.size.memory;
        if let Some(chunk) = self.chunks.get(&key) {
            leaf.size.subtract(chunk);
        }
        let chunk = self.chunks.entry(key).or_insert(Chunk::NEVER);
        let mut pages = Pages {
            chunk: key,
            epoch: self.epoch,
            resident: &mut self.resident,
            dirty: &mut self.dirty,
            frozen: &mut self.frozen,
            orphans: &mut self.orphans,
            effects,
        };
        let delta = change(chunk, &mut pages);
        chunk.pages.shrink();
        if chunk.is_never() {
            self.chunks.remove(&key);
        } else {
            leaf.size.add(chunk);
        }
        let size = leaf.size;
        self.chunk_memory = self.chunk_memory + size.memory - memory;
        self.count_blocks(key, delta, effects);
        if size.bytes > self.leaf_bytes_max && size.chunks > 1 {
            self.split(from, key);
        } else if size.chunks == 0 {
            self.remove_leaf(from);
        }
    }

    /// The next checkpoint writes a page in memory anew, as it is.
    pub(super) fn rewrite(&mut self, key: PageKey, effects: &mut Effects) {
        self.change(key.chunk, effects, |chunk, pages| {
            if let Some(Page::Resident(resident)) = chunk.pages.get_mut(&key.page) {
                pages.begin_change(key.page, resident);
            }
            0
        });
    }

    /// Makes a leaf in memory one that the next checkpoint writes. Returns false if it is broken.
    fn change_leaf(&mut self, from: ChunkKey, effects: &mut Effects) -> bool {
        match self.leaves[&from].state {
            LeafState::Loaded => {}
            LeafState::Broken => return false,
            LeafState::OnDisk(_) => panic!("leaf {from:?} is loaded before it is used"),
        }
        self.preserve_leaf(from);
        let leaf = self.leaves.get_mut(&from).expect("it was just found");
        leaf.used = true;
        if leaf.epoch != self.epoch {
            leaf.epoch = self.epoch;
            effects.stale_leaves.extend(leaf.home.take().map(|home| home.place));
            self.dirty_leaves.insert(from);
        }
        true
    }

    /// Splits a leaf that has become too large because of a chunk: at its middle, but after it if it is the last, since
    /// chunks that are written in order come last each.
    fn split(&mut self, from: ChunkKey, changed: ChunkKey) {
        let chunks: Vec<(ChunkKey, usize)> = self
            .chunks_in(from)
            .map(|(key, chunk)| (*key, chunk.encoded_bytes()))
            .collect();
        let size = self.leaves[&from].size;
        let mut left = 0;
        let middle = chunks.iter().position(|(_, bytes)| {
            left += bytes;
            left * 2 >= size.bytes
        });
        let last = chunks.len() - 1;
        let first_right = match chunks[last].0 == changed {
            true => last,
            false => (middle.expect("some chunk is in the middle") + 1).min(last),
        };
        assert!(first_right > 0, "a leaf of one chunk is not split");
        let right = chunks[first_right].0;
        self.leaves.insert(right, Leaf::empty());
        let mut both = [Leaf::empty().size; 2];
        for (size, key) in both.iter_mut().zip([from, right]) {
            self.chunks_in(key).for_each(|(_, chunk)| size.add(chunk));
            assert!(size.bytes <= LEAF_CAPACITY, "half of a leaf has {} bytes", size.bytes);
        }
        self.leaves.get_mut(&from).expect("it is split").size = both[0];
        let leaf = self.leaves.get_mut(&right).expect("it was just made");
        leaf.size = both[1];
        leaf.epoch = self.epoch;
        self.dirty_leaves.insert(right);
        self.loaded.insert(right);
    }

    /// Gives the range of an empty leaf to the one before it, if there is one that can take it.
    fn remove_leaf(&mut self, from: ChunkKey) {
        let before = self.leaves.range(..from).next_back();
        if before.is_some_and(|(_, leaf)| leaf.state != LeafState::Broken) {
            self.leaves.remove(&from);
            self.dirty_leaves.remove(&from);
            self.loaded.remove(&from);
        }
    }

    fn set(&mut self, at: &Target, mut entries: impl Iterator<Item = Entry>, effects: &mut Effects) {
        self.change(at.key(), effects, |chunk, pages| {
            let mut delta = 0;
            for (page, blocks) in pages_of(at.range) {
                let Some(resident) = pages.materialise(chunk, page) else {
                    entries.by_ref().take(blocks.len()).for_each(drop);
                    continue;
                };
                for block in blocks {
                    let entry = entries.next().expect("one entry per block");
                    let old = std::mem::replace(&mut resident.entries[slot_of(block)], entry);
                    delta += count(old, entry, pages.effects);
                }
            }
            delta
        });
    }

    fn count_blocks(&mut self, key: ChunkKey, delta: i64, effects: &mut Effects) {
        let Some(replica) = self.replicas.get_mut(&key.group).filter(|_| delta != 0) else {
            return;
        };
        let layer = self.layers.entry((key.group, key.layer)).or_default();
        for count in [&mut replica.blocks, &mut *layer] {
            match count.checked_add_signed(delta) {
                Some(changed) => *count = changed,
                None => effects.miscounted = Some(key.group),
            }
        }
        if *layer == 0 {
            self.layers.remove(&(key.group, key.layer));
        }
    }

    /// Makes a hole of what gives way to it.
    fn punch(&mut self, at: &Target, to: Uniform, apply: Apply, effects: &mut Effects) {
        let forget = self.canary.forget_tombstones() && apply == Apply::IfNewer && to.version == Version::ZERO;
        // With the planted bug everything gives way to an absence that has forgotten its version.
        let gives_way = |held: Version| forget || apply.applies(held, to.version);
        self.change(at.key(), effects, |chunk, pages| {
            let mut delta = 0;
            if at.range.count() < BLOCKS_PER_CHUNK {
                for (page, blocks) in pages_of(at.range) {
                    let slots = slot_of(blocks.start)..slot_of(blocks.end - 1) + 1;
                    delta += pages.punch(chunk, page, slots, to, gives_way);
                }
            } else {
                for page in chunk.pages.keys() {
                    delta += pages.punch(chunk, page, 0..PAGE_ENTRIES as usize, to, gives_way);
                }
                if gives_way(chunk.floor.version) {
                    chunk.floor = to;
                }
            }
            drop_what_the_floor_says(chunk);
            delta
        });
    }
}

impl Pages<'_> {
    fn key(&self, page: u8) -> PageKey {
        PageKey {
            chunk: self.chunk,
            page,
        }
    }

    /// A page in memory is about to be changed, or to go.
    fn begin_change(&mut self, page: u8, resident: &mut Resident) {
        resident.used = true;
        if resident.epoch == self.epoch {
            return;
        }
        let key = self.key(page);
        if self.frozen.pages.remove(&key) {
            self.frozen.encode_page(key, resident);
        }
        self.effects.stale.extend(resident.home.take().map(|home| home.place));
        resident.epoch = self.epoch;
        self.dirty.insert(key);
    }

    /// The page in memory and about to be changed, whatever it was; `None` if it is broken.
    fn materialise<'c>(&mut self, chunk: &'c mut Chunk, page: u8) -> Option<&'c mut Resident> {
        let key = self.key(page);
        let state = chunk.pages.get_or_insert(page, Page::Uniform(chunk.floor));
        if let Page::Uniform(uniform) = state {
            *state = Page::Resident(Box::new(Resident::new(*uniform)));
            self.resident.insert(key);
        }
        match state {
            Page::Resident(resident) => {
                self.begin_change(page, resident);
                Some(resident)
            }
            Page::Broken => None,
            Page::OnDisk(_) | Page::Uniform(_) => panic!("{key:?} is loaded before it is used"),
        }
    }

    /// Makes a hole of what gives way in some slots of a page; returns the change in blocks of data.
    fn punch(
        &mut self,
        chunk: &mut Chunk,
        page: u8,
        slots: Range<usize>,
        to: Uniform,
        gives_way: impl Fn(Version) -> bool,
    ) -> i64 {
        let whole = slots.len() == PAGE_ENTRIES as usize;
        match chunk.pages.get_or_insert(page, Page::Uniform(chunk.floor)) {
            Page::Uniform(uniform) if whole && gives_way(uniform.version) => {
                *uniform = to;
                return 0;
            }
            Page::Uniform(uniform) if whole || !gives_way(uniform.version) => return 0,
            Page::Resident(resident)
                if !resident.entries[slots.clone()]
                    .iter()
                    .any(|held| gives_way(held.version)) =>
            {
                return 0;
            }
            _ => {}
        }
        let Some(resident) = self.materialise(chunk, page) else {
            return 0;
        };
        let mut delta = 0;
        for entry in &mut resident.entries[slots] {
            if gives_way(entry.version) {
                delta += count(*entry, to.entry(), self.effects);
                *entry = to.entry();
            }
        }
        self.collapse(chunk, page);
        delta
    }

    /// A page that is all one hole needs no page.
    fn collapse(&mut self, chunk: &mut Chunk, page: u8) {
        let Some(Page::Resident(resident)) = chunk.pages.get(&page) else {
            return;
        };
        if let Some(uniform) = resident.uniform() {
            self.forget(chunk, page);
            chunk.pages.get_or_insert(page, Page::Uniform(uniform));
        }
    }

    /// Takes a page out of its chunk, and whatever data it has; returns how many blocks.
    pub(super) fn forget(&mut self, chunk: &mut Chunk, page: u8) -> i64 {
        let key = self.key(page);
        match chunk.pages.remove(page) {
            None | Some(Page::Uniform(_)) => 0,
            Some(Page::Broken) => {
                self.orphan();
                0
            }
            Some(Page::OnDisk(_)) => panic!("{key:?} is loaded before it is used"),
            Some(Page::Resident(mut resident)) => {
                self.begin_change(page, &mut resident);
                self.resident.remove(&key);
                self.dirty.remove(&key);
                let before = self.effects.freed.len();
                let places = resident.entries.iter().filter_map(Entry::data_place);
                self.effects.freed.extend(places);
                (self.effects.freed.len() - before) as i64
            }
        }
    }

    /// A page is forgotten that could not be read: nobody knows what it pointed to.
    fn orphan(&mut self) {
        *self.orphans = true;
    }

    /// Takes a page out of its chunk, whether it can be read or not. What data it has, if it is not in memory, belongs to
    /// nobody from now on.
    pub(super) fn abandon(&mut self, chunk: &mut Chunk, page: u8) {
        match chunk.pages.get(&page) {
            Some(Page::OnDisk(home)) => {
                self.effects.stale.push(home.place);
                self.orphan();
                chunk.pages.remove(page);
            }
            _ => drop(self.forget(chunk, page)),
        }
    }
}

/// Absent blocks of a chunk get at least this version.
fn raise(chunk: &mut Chunk, version: Version, pages: &mut Pages<'_>) -> i64 {
    let raised = |uniform: Uniform| match uniform.hole {
        Hole::Absent => Uniform {
            version: uniform.version.max(version),
            ..uniform
        },
        Hole::Zero => uniform,
    };
    let lower = |entry: &Entry| entry.is_absent() && entry.version < version;
    for page in chunk.pages.keys() {
        match chunk.pages.get_mut(&page).expect("a page of the chunk") {
            Page::Uniform(uniform) => *uniform = raised(*uniform),
            Page::OnDisk(_) => panic!("{:?} is loaded before it is used", pages.key(page)),
            Page::Broken => {}
            Page::Resident(resident) => {
                if resident.entries.iter().any(lower) {
                    pages.begin_change(page, resident);
                    let entries = resident.entries.iter_mut().filter(|entry| lower(entry));
                    entries.for_each(|entry| entry.version = version);
                    pages.collapse(chunk, page);
                }
            }
        }
    }
    chunk.floor = raised(chunk.floor);
    drop_what_the_floor_says(chunk);
    0
}

/// Pages that are all as the floor need not be listed.
fn drop_what_the_floor_says(chunk: &mut Chunk) {
    for page in chunk.pages.keys() {
        if matches!(chunk.pages.get(&page), Some(Page::Uniform(uniform)) if *uniform == chunk.floor) {
            chunk.pages.remove(page);
        }
    }
}

/// Accounts for an entry that replaces another; returns the change in blocks of data.
fn count(old: Entry, new: Entry, effects: &mut Effects) -> i64 {
    let (old, new) = (old.data_place(), new.data_place());
    effects.freed.extend(old);
    effects.used.extend(new);
    i64::from(new.is_some()) - i64::from(old.is_some())
}
