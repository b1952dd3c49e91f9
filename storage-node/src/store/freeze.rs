//! What a checkpoint has of the index, as of the commit that it covers, while batches go on.
//!
//! When a checkpoint begins, nothing is copied: the pages and leaves that were changed since the last one are *frozen*.
//! They are encoded one by one, in small steps; one that a batch is about to change is encoded before it is changed. So
//! the checkpoint has each of them exactly as of its commit, and a batch pays for at most one block for each page and
//! leaf that it changes itself.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;

use super::catalog::Catalog;
use super::checkpoint::take_first;
use super::chunk::{ChunkKey, Home, Page, PageKey, Resident};
use super::leaf::{LeafState, Skeleton};
use super::record::Extent;

/// What the checkpoint being written has yet to encode, and what it has encoded.
#[derive(Debug, Default)]
pub(super) struct Frozen {
    /// Pages yet to be encoded.
    pub(super) pages: BTreeSet<PageKey>,
    /// Places for them.
    places: VecDeque<Extent>,
    /// Where pages that were encoded are.
    homes: BTreeMap<PageKey, Home>,
    /// Leaves yet to be encoded, unchanged since the checkpoint began.
    pub(super) leaves: BTreeSet<ChunkKey>,
    /// Leaves that were changed since, as they were.
    skeletons: BTreeMap<ChunkKey, Skeleton>,
    /// Pages that were encoded and not taken yet.
    encoded: VecDeque<(u32, Bytes)>,
}

/// A leaf as the root lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LeafRef {
    /// Nothing is in its range.
    Empty,
    Stored(Home),
    Broken,
    /// It is among those of the checkpoint that are yet to be written.
    Frozen,
}

impl Frozen {
    /// Encodes a page, and gives it its home.
    pub(super) fn encode_page(&mut self, key: PageKey, page: &mut Resident) {
        let place = take_first(&mut self.places).expect("a place for each frozen page");
        let mut block = BlockBuf::zeroed(1);
        let crc = page.encode(&mut block);
        let home = Home { place, crc };
        page.home = Some(home);
        self.homes.insert(key, home);
        self.encoded.push_back((place, block.freeze()));
    }

    /// Pages that were encoded, and where they go.
    pub(super) fn take_encoded(&mut self) -> impl Iterator<Item = (u32, Bytes)> {
        self.encoded.drain(..)
    }

    /// Leaves that are yet to be written.
    pub(super) fn leaves_left(&self) -> usize {
        self.leaves.len() + self.skeletons.len()
    }
}

impl Catalog {
    /// Freezes what was changed since the last checkpoint began. `places` are for its pages. Returns how the root lists
    /// the leaves.
    pub(super) fn freeze(&mut self, places: Vec<Extent>) -> Vec<(ChunkKey, LeafRef)> {
        let frozen = &self.frozen;
        assert!(frozen.pages.is_empty() && frozen.leaves_left() == 0 && frozen.encoded.is_empty());
        let mut leaves = std::mem::take(&mut self.dirty_leaves);
        leaves.retain(|key| self.leaves[key].size.chunks > 0);
        self.frozen = Frozen {
            pages: std::mem::take(&mut self.dirty),
            places: places.into(),
            leaves,
            ..Frozen::default()
        };
        self.epoch += 1;
        let list = self.leaves.iter().filter_map(|(key, leaf)| {
            let listed = match (leaf.state, leaf.home) {
                (LeafState::Broken, _) => LeafRef::Broken,
                (LeafState::OnDisk(home), _) | (LeafState::Loaded, Some(home)) => LeafRef::Stored(home),
                (LeafState::Loaded, None) if leaf.size.chunks == 0 => LeafRef::Empty,
                (LeafState::Loaded, None) => LeafRef::Frozen,
            };
            (*key != ChunkKey::MIN || listed != LeafRef::Empty).then_some((*key, listed))
        });
        list.collect()
    }

    /// Keeps a leaf as it is now, if it is frozen: it is about to be changed.
    pub(super) fn preserve_leaf(&mut self, from: ChunkKey) {
        if self.frozen.leaves.remove(&from) {
            let skeleton = Skeleton::new(self.chunks_in(from));
            self.frozen.skeletons.insert(from, skeleton);
        }
    }

    /// Encodes the next frozen page; false if there is none.
    pub(super) fn encode_next_page(&mut self) -> bool {
        let Some(key) = self.frozen.pages.pop_first() else {
            return false;
        };
        let chunk = self.chunks.get_mut(&key.chunk).expect("a frozen page has a chunk");
        match chunk.pages.get_mut(&key.page) {
            Some(Page::Resident(page)) => self.frozen.encode_page(key, page),
            other => panic!("{key:?} is frozen and in memory, not {other:?}"),
        }
        true
    }

    /// Encodes the next frozen leaf, when all frozen pages are; returns its key, block and CRC.
    pub(super) fn encode_next_leaf(&mut self) -> Option<(ChunkKey, BlockBuf, u32)> {
        assert!(self.frozen.pages.is_empty(), "pages are encoded before leaves");
        let (from, skeleton) = match self.frozen.skeletons.pop_first() {
            Some(found) => found,
            None => {
                let from = self.frozen.leaves.pop_first()?;
                (from, Skeleton::new(self.chunks_in(from)))
            }
        };
        let (block, crc) = skeleton.finish(|page| self.frozen.homes[page]);
        Some((from, block, crc))
    }

    /// The frozen leaf under this key goes to `home`. Returns whether that is its home from now on; else it was changed
    /// since, and the next checkpoint does without what is written there.
    pub(super) fn leaf_encoded(&mut self, from: ChunkKey, home: Home) -> bool {
        let frozen_in = self.epoch - 1;
        match self.leaves.get_mut(&from) {
            Some(leaf) if leaf.epoch == frozen_in && leaf.home.is_none() => {
                leaf.home = Some(home);
                true
            }
            _ => false,
        }
    }

    /// All that was frozen is on the device, and counts.
    pub(super) fn checkpoint_stored(&mut self) {
        self.stored = self.epoch - 1;
        self.frozen = Frozen::default();
    }
}
