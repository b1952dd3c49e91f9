//! Blocks that the free-space map has and nobody needs, because what pointed to them was lost and then forgotten: opening
//! finds them, when nothing changes. See "Space behind a lost part of the index" in DESIGN.md.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Bound;

use super::reads::BlockRead;
use super::{Loaded, Outcome, Phase, Recovery};
use crate::store::allocator::Bitmap;
use crate::store::chunk::{Chunk, ChunkKey, Home, Page, Resident};
use crate::store::entry::Entry;
use crate::store::leaf::{LeafState, decode_leaf};
use crate::store::limits::{SWEEP_BLOCKS_MAX, SWEEP_LEAVES, SWEEP_PAGES};
use crate::store::space::map_page;

/// A walk over all leaves and index pages. It changes nothing before its end.
#[derive(Debug)]
pub(super) struct Sweep {
    /// Whether the last batch of the log was dropped.
    discarded: bool,
    end: u32,
    pass: Pass,
    /// The first leaf that was not looked at; `None` after the last.
    next: Option<ChunkKey>,
    /// Leaves being read.
    leaves: Vec<(ChunkKey, Home)>,
    /// Pages yet to be read, of leaves that were looked at.
    pages: VecDeque<Home>,
    /// Pages being read.
    reading: Vec<Home>,
    /// Places that something was found to need.
    needed: Bitmap,
    /// Index pages on the device.
    index_pages: u64,
    /// How many the first pass has found.
    pages_in_all: u64,
}

/// Leaves are few beside pages, and they tell which pages are known to be lost: they are looked at first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pass {
    Leaves,
    All,
}

/// Something is lost, can't be read, or contradicts the map: nothing can be concluded from what was not seen.
struct Unsure;

impl Sweep {
    fn new(discarded: bool, end: u32) -> Sweep {
        Sweep {
            discarded,
            end,
            pass: Pass::Leaves,
            next: Some(ChunkKey::MIN),
            leaves: Vec::new(),
            pages: VecDeque::new(),
            reading: Vec::new(),
            needed: Bitmap::new(u64::from(end) + 1),
            index_pages: 0,
            pages_in_all: 0,
        }
    }

    fn need(&mut self, map: &Bitmap, place: u32) -> Result<(), Unsure> {
        if !map.get(place) || self.needed.set(place, true) {
            return Err(Unsure);
        }
        Ok(())
    }

    fn entries(&mut self, map: &Bitmap, page: &Resident) -> Result<(), Unsure> {
        let mut places = page.entries.iter().filter_map(Entry::data_place);
        places.try_for_each(|place| self.need(map, place))
    }

    fn chunk(&mut self, map: &Bitmap, chunk: &Chunk) -> Result<(), Unsure> {
        for page in chunk.pages.values() {
            let (home, resident) = match page {
                Page::Uniform(_) => continue,
                Page::Broken => return Err(Unsure),
                Page::OnDisk(home) => (Some(*home), None),
                Page::Resident(page) => (page.home, Some(page)),
            };
            self.index_pages += u64::from(home.is_some());
            if self.pass == Pass::Leaves {
                continue;
            }
            if let Some(home) = home {
                self.need(map, home.place)?;
            }
            match (resident, home) {
                (Some(page), _) => self.entries(map, page)?,
                (None, home) => self.pages.extend(home),
            }
        }
        Ok(())
    }

    /// Takes what was read: of leaves, or of pages.
    fn take(&mut self, loaded: &Loaded, results: Vec<BlockRead>) -> Result<(), Unsure> {
        let mut results = results.into_iter();
        for (key, home) in std::mem::take(&mut self.leaves) {
            let block = results.next().and_then(Result::ok).ok_or(Unsure)?;
            let range = (key, loaded.catalog.leaf_end(key));
            let chunks = decode_leaf(&block, home, range, self.end).ok_or(Unsure)?;
            chunks
                .iter()
                .try_for_each(|(_, chunk)| self.chunk(&loaded.data, chunk))?;
        }
        for home in std::mem::take(&mut self.reading) {
            let block = results.next().and_then(Result::ok).ok_or(Unsure)?;
            let page = Resident::decode(&block, home, self.end).ok_or(Unsure)?;
            self.entries(&loaded.data, &page)?;
        }
        Ok(())
    }

    /// What is to be read next; `None` when all was seen.
    fn wanted(&mut self, loaded: &Loaded) -> Result<Option<Vec<u64>>, Unsure> {
        loop {
            if !self.pages.is_empty() {
                let count = self.pages.len().min(SWEEP_PAGES);
                self.pages.make_contiguous()[..count].sort_by_key(|home| home.place);
                self.reading = self.pages.drain(..count).collect();
                return Ok(Some(self.reading.iter().map(|home| home.place.into()).collect()));
            }
            let Some(from) = self.next else {
                if self.pass == Pass::All {
                    return Ok(None);
                }
                self.pass = Pass::All;
                self.pages_in_all = std::mem::take(&mut self.index_pages);
                self.next = Some(ChunkKey::MIN);
                continue;
            };
            self.look_at_leaves(loaded, from)?;
            if !self.leaves.is_empty() {
                return Ok(Some(self.leaves.iter().map(|(_, home)| home.place.into()).collect()));
            }
        }
    }

    /// Looks at some leaves: those in memory at once, the others are to be read.
    fn look_at_leaves(&mut self, loaded: &Loaded, from: ChunkKey) -> Result<(), Unsure> {
        let mut leaves = loaded.catalog.leaves.range((Bound::Included(from), Bound::Unbounded));
        for (key, leaf) in leaves.by_ref().take(SWEEP_LEAVES) {
            match leaf.state {
                LeafState::Broken => return Err(Unsure),
                LeafState::OnDisk(home) => self.leaves.push((*key, home)),
                LeafState::Loaded => {
                    let mut chunks = loaded.catalog.chunks_in(*key);
                    chunks.try_for_each(|(_, chunk)| self.chunk(&loaded.data, chunk))?;
                }
            }
        }
        self.next = leaves.next().map(|(key, _)| *key);
        self.leaves.sort_by_key(|(_, home)| home.place);
        Ok(())
    }
}

impl Recovery {
    /// The log was replayed. What remains is to find what nobody needs, if there may be such blocks.
    pub(super) fn replayed(&mut self, discarded: bool) -> Option<Outcome> {
        let catalog = &self.loaded.catalog;
        let lost = catalog.leaves.values().any(|leaf| leaf.state == LeafState::Broken);
        if !self.sweeps || !catalog.orphans || lost {
            return Some(self.finish(discarded, None));
        }
        self.sweep_on(Box::new(Sweep::new(discarded, self.end())), Vec::new())
    }

    pub(super) fn sweep_on(&mut self, mut sweep: Box<Sweep>, results: Vec<BlockRead>) -> Option<Outcome> {
        self.progress.index_pages += sweep.reading.len() as u64;
        let taken = sweep.take(&self.loaded, results);
        match taken.and_then(|()| sweep.wanted(&self.loaded)) {
            Ok(Some(places)) => {
                self.progress.index_pages_in_all = sweep.pages_in_all;
                self.phase = Phase::Sweep(sweep);
                self.read(places);
                None
            }
            Ok(None) => {
                let orphans = self.loaded.forget_orphans(&sweep);
                Some(self.finish(sweep.discarded, Some(orphans)))
            }
            Err(Unsure) => Some(self.finish(sweep.discarded, None)),
        }
    }
}

impl Loaded {
    /// Takes out of the map what nobody needs. Returns these places.
    fn forget_orphans(&mut self, sweep: &Sweep) -> BTreeSet<u32> {
        let words = self.data.words().iter().zip(sweep.needed.words());
        let words = (0u32..)
            .zip(words)
            .map(|(word, (marked, needed))| (word, marked & !needed));
        let orphans = words.filter(|(_, bits)| *bits != 0).flat_map(|(word, bits)| {
            let set = (0..64).filter(move |bit| bits >> bit & 1 == 1);
            set.map(move |bit| word * 64 + bit)
        });
        let mut orphans: BTreeSet<u32> = orphans.take(SWEEP_BLOCKS_MAX + 1).collect();
        // What is too much stays for the next opening.
        self.catalog.orphans = orphans.len() > SWEEP_BLOCKS_MAX;
        if self.catalog.orphans {
            orphans.pop_last();
        }
        for place in &orphans {
            self.data.set(*place, false);
            self.dirty_map.insert(map_page(*place));
        }
        // Whatever was counted while parts were lost: this is what is there.
        self.data_blocks = self.data.count() - sweep.index_pages;
        orphans
    }
}
