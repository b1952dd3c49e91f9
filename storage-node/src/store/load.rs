//! Index pages come into memory when they are needed, and leave it when there are too many.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use cairn_proto::disk::DiskError;

use super::catalog::Unknown;
use super::chunk::{Home, PageKey, Resident};
use super::engine::{Engine, Purpose};

/// Pages on their way.
#[derive(Debug, Default)]
pub(super) struct Loads {
    in_flight: BTreeMap<u64, (PageKey, Home)>,
    keys: BTreeSet<PageKey>,
    /// Pages that could not be read, until those that wait for them have been told.
    failed_for_reads: BTreeMap<PageKey, DiskError>,
    pub(super) failed_for_writes: BTreeMap<PageKey, DiskError>,
    /// Pages that requests wait for, with those that came already: they stay until the requests have had a try.
    pub(super) pinned_for_reads: BTreeSet<PageKey>,
    pub(super) pinned_for_writes: BTreeSet<PageKey>,
    /// Where eviction goes on.
    hand: Option<PageKey>,
}

/// For what a page is loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum For {
    Read,
    Write,
}

impl Engine {
    /// Loads what is not in memory. Returns whether there was nothing to load; fails if a page was tried in vain since
    /// the request was last looked at.
    pub(super) fn load_all(&mut self, unknown: Vec<Unknown>, purpose: For) -> Result<bool, DiskError> {
        let mut none = true;
        for unknown in unknown {
            let Unknown::OnDisk(key, home) = unknown else { continue };
            let failed = match purpose {
                For::Read => &self.loads.failed_for_reads,
                For::Write => &self.loads.failed_for_writes,
            };
            if let Some(error) = failed.get(&key) {
                return Err(*error);
            }
            none = false;
            if self.loads.keys.contains(&key) {
                continue;
            }
            let number = self.reads.begin();
            let token = self.io.read(home.place, 1);
            self.in_flight.insert(token, Purpose::Load(number));
            self.loads.in_flight.insert(number, (key, home));
            self.loads.keys.insert(key);
            self.io.counters.index_loads += 1;
        }
        Ok(none)
    }

    /// A page has come. One that can't be read may be readable later: who waits for it gets the error. One that is not
    /// what was written is lost.
    pub(super) fn load_done(&mut self, number: u64, result: Result<Bytes, DiskError>) {
        let (key, home) = self.loads.in_flight.remove(&number).expect("the load is in flight");
        self.loads.keys.remove(&key);
        self.reads.end(number);
        let end = self.space.allocator.space().end as u32;
        match result {
            Ok(block) => self.catalog.loaded(key, home, Resident::decode(&block, home, end)),
            Err(error) => {
                self.loads.failed_for_reads.insert(key, error);
                self.loads.failed_for_writes.insert(key, error);
            }
        }
        self.retry_waiting();
        self.loads.failed_for_reads.clear();
    }

    /// Drops clean pages from memory while there are too many: the ones not used since the hand last passed.
    pub(super) fn evict(&mut self) {
        if self.checkpoint.is_some() {
            return; // Pages whose new home is not written yet look clean.
        }
        assert!(self.batch.is_none(), "the batch in flight has its pages in memory");
        let mut looks = 2 * self.catalog.resident.len().min(EVICTION_LOOKS_MAX);
        while self.catalog.resident.len() > self.limits.resident_pages_max && looks > 0 {
            looks -= 1;
            let from = self.loads.hand;
            let next = match from {
                Some(hand) => self.catalog.resident.range(hand..).nth(1),
                None => self.catalog.resident.first(),
            };
            let Some(key) = next.or(self.catalog.resident.first()).copied() else {
                return;
            };
            self.loads.hand = Some(key);
            let pinned = self.loads.pinned_for_reads.contains(&key) || self.loads.pinned_for_writes.contains(&key);
            if !pinned && self.catalog.evict(key) {
                self.io.counters.index_evictions += 1;
            }
        }
    }
}

/// Pages looked at by one call at the most.
const EVICTION_LOOKS_MAX: usize = 256;
