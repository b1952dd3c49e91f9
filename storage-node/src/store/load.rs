//! Index pages and leaves come into memory when they are needed, and leave it when they take too much.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use cairn_proto::disk::DiskError;

use super::catalog::{Effects, Unknown, pages_between};
use super::chunk::{ChunkKey, Home, PageKey, Resident};
use super::engine::{Engine, Purpose};

/// A part of the index that can be loaded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Part {
    Leaf(ChunkKey),
    Page(PageKey),
}

/// Pages and leaves on their way.
#[derive(Debug, Default)]
pub(super) struct Loads {
    in_flight: BTreeMap<u64, (Part, Home)>,
    parts: BTreeSet<Part>,
    /// What could not be read, until those that wait for it have been told.
    failed_for_reads: BTreeMap<Part, DiskError>,
    pub(super) failed_for_writes: BTreeMap<Part, DiskError>,
    /// Pages that requests wait for, with those that came already: they and their leaves stay until the requests have
    /// had a try.
    pub(super) pinned_for_reads: BTreeSet<PageKey>,
    pub(super) pinned_for_writes: BTreeSet<PageKey>,
    /// Where eviction goes on.
    hand: Option<PageKey>,
    leaf_hand: Option<ChunkKey>,
}

/// For what a part is loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum For {
    Read,
    Write,
}

impl Engine {
    /// Loads what is not in memory. Returns whether there was nothing to load; fails if a part was tried in vain since
    /// the request was last looked at.
    pub(super) fn load_all(&mut self, unknown: Vec<Unknown>, purpose: For) -> Result<bool, DiskError> {
        let mut none = true;
        for unknown in unknown {
            let (part, home) = match unknown {
                Unknown::Leaf(key, home) => (Part::Leaf(key), home),
                Unknown::OnDisk(key, home) => (Part::Page(key), home),
                Unknown::Broken => continue,
            };
            let failed = match purpose {
                For::Read => &self.loads.failed_for_reads,
                For::Write => &self.loads.failed_for_writes,
            };
            if let Some(error) = failed.get(&part) {
                return Err(*error);
            }
            none = false;
            if !self.loads.parts.insert(part) {
                continue;
            }
            let number = self.reads.begin();
            let token = self.io.read(home.place, 1);
            self.in_flight.insert(token, Purpose::Load(number));
            self.loads.in_flight.insert(number, (part, home));
            match part {
                Part::Leaf(_) => self.io.counters.leaf_loads += 1,
                Part::Page(_) => self.io.counters.index_loads += 1,
            }
        }
        Ok(none)
    }

    /// A part has come. One that can't be read may be readable later: who waits for it gets the error. One that is not
    /// what was written is lost.
    pub(super) fn load_done(&mut self, number: u64, result: Result<Bytes, DiskError>) {
        let (part, home) = self.loads.in_flight.remove(&number).expect("the load is in flight");
        self.loads.parts.remove(&part);
        self.reads.end(number);
        let end = self.space.allocator.space().end as u32;
        let mut effects = Effects::default();
        match (result, part) {
            (Ok(block), Part::Page(key)) => {
                let map = &self.space.data;
                let page = Resident::decode(&block, home, end).filter(|page| page.agrees_with(map));
                self.catalog.loaded_page(key, home, page, &mut effects);
                // A broken page gives its place back only if the map knows that it was there.
                effects.stale.retain(|place| map.get(*place));
            }
            (Ok(block), Part::Leaf(key)) => self.catalog.loaded_leaf(key, home, &block, end, &mut effects),
            (Err(error), part) => {
                self.loads.failed_for_reads.insert(part, error);
                self.loads.failed_for_writes.insert(part, error);
            }
        }
        self.settle(effects);
        self.retry_waiting();
        self.scrub_leaf_loaded();
        self.move_leaf_loaded();
        self.loads.failed_for_reads.clear();
    }

    /// Drops pages and leaves from memory while they take too much: those that the device has as they are, and that were
    /// not used since the hand last passed.
    pub(super) fn evict(&mut self) {
        assert!(self.batch.is_none(), "the batch in flight has its pages in memory");
        let parts = self.catalog.resident.len() + self.catalog.loaded.len();
        let mut looks = 2 * parts.min(EVICTION_LOOKS_MAX);
        while looks > 0 && self.catalog.memory() > self.limits.index_memory_max {
            looks -= 1;
            self.evict_page();
            if self.catalog.memory() > self.limits.index_memory_max {
                self.evict_leaf();
            }
        }
        let max = self.limits.index_memory_max;
        let full = self.catalog.memory() > max && self.checkpoint.is_none();
        self.checkpoints.wanted_for_memory = full && self.catalog.dirty_memory() > max / 2;
    }

    fn evict_page(&mut self) {
        let resident = &self.catalog.resident;
        let next = match self.loads.hand {
            Some(hand) => resident
                .range((std::ops::Bound::Excluded(hand), std::ops::Bound::Unbounded))
                .next(),
            None => resident.first(),
        };
        let Some(key) = next.or(resident.first()).copied() else {
            return;
        };
        self.loads.hand = Some(key);
        let pinned = self.loads.pinned_for_reads.contains(&key) || self.loads.pinned_for_writes.contains(&key);
        if !pinned && self.catalog.evict(key) {
            self.io.counters.index_evictions += 1;
        }
    }

    fn evict_leaf(&mut self) {
        let loaded = &self.catalog.loaded;
        let next = match self.loads.leaf_hand {
            Some(hand) => loaded
                .range((std::ops::Bound::Excluded(hand), std::ops::Bound::Unbounded))
                .next(),
            None => loaded.first(),
        };
        let Some(from) = next.or(loaded.first()).copied() else {
            return;
        };
        self.loads.leaf_hand = Some(from);
        let pages = pages_between(from, self.catalog.leaf_end(from));
        let pinned = |pins: &BTreeSet<PageKey>| pins.range(pages).next().is_some();
        let pinned = pinned(&self.loads.pinned_for_reads) || pinned(&self.loads.pinned_for_writes);
        if !pinned && self.catalog.evict_leaf(from) {
            self.io.counters.leaf_evictions += 1;
        }
    }
}

/// Pages, and leaves, looked at by one call at the most.
const EVICTION_LOOKS_MAX: usize = 256;
