//! Giving back, in the background, the space of replicas and layers that were dropped: a few index pages with each batch.

use std::collections::VecDeque;

use cairn_proto::disk::DiskError;

use super::api::{StoreError, StoreRequest};
use super::catalog::{Effects, Unknown};
use super::doomed::{At, Doomed, Next};
use super::engine::Engine;
use super::load::For;
use super::plan::{Building, Draft, pages_for};
use super::record::{Record, body_capacity};

/// How far giving back is. Nothing of it need outlive the process: what was given back is not found again.
#[derive(Debug, Default)]
pub(super) struct Reclaim {
    /// What is being given back, and where that goes on after the last batch.
    at: Option<(Doomed, At)>,
    /// Why it does not go on until it is asked for again.
    pub(super) stuck: Option<DiskError>,
    /// How many checkpoints there were when space was found missing for it.
    waits_since: Option<u64>,
}

/// Beside requests of others, a batch gives back this part of what it may.
const BESIDE_OTHERS: usize = 8;
/// After so many checkpoints all that can be given back is given back.
const CHECKPOINTS_FOR_SPACE: u64 = 3;

impl Engine {
    /// Adds to the batch what can be given back now. Alone it waits until all of its part is in memory.
    pub(super) fn add_reclaim(&mut self, building: &mut Building) {
        let Some(doomed) = self.catalog.doomed.first().copied() else {
            return;
        };
        if self.reclaim.stuck.is_some() {
            return;
        }
        let alone = building.drafts.is_empty();
        let part = if alone { 1 } else { BESIDE_OTHERS };
        let pages_max = self.limits.reclaim_pages_max.div_ceil(part);
        let start = match self.reclaim.at {
            Some((of, at)) if of == doomed => at,
            _ => doomed.start(),
        };
        let (mut at, mut done) = (start, start);
        let mut records = Vec::new();
        let (mut pages, mut waits) = (0, false);
        while pages < pages_max {
            match self.catalog.next_doomed(doomed, at, pages_max - pages) {
                Next::End => {
                    if !waits && self.can_end(doomed) {
                        records.push(Record::Reclaimed { doomed });
                    }
                    break;
                }
                Next::Leaf(key, home) => {
                    if let Err(error) = self.load_all(vec![Unknown::Leaf(key, home)], For::Write) {
                        return self.reclaim_stuck(doomed, error);
                    }
                    self.loads.pinned_for_writes.insert(at.0.max(key).page(0));
                    waits = true;
                    break;
                }
                Next::Pages {
                    key,
                    first,
                    last,
                    count,
                    unknown,
                    then,
                } => {
                    let listed = first..=last;
                    self.loads.pinned_for_writes.extend(listed.map(|page| key.page(page)));
                    waits |= self.load_or_lose(unknown);
                    if !waits {
                        records.push(Record::Reclaim { key, first, last });
                        done = then;
                    }
                    // A chunk without pages counts too.
                    pages += count.max(1);
                    at = then;
                }
            }
        }
        if waits && alone || records.is_empty() || !self.has_space(building, &records) {
            return;
        }
        // The same may be dropped again: it begins anew then.
        let ends = matches!(records.last(), Some(Record::Reclaimed { .. }));
        self.reclaim.at = (!ends).then_some((doomed, done));
        self.reclaim.waits_since = None;
        building.pages += 2 * records.len() as u64;
        building.bytes_max += records.iter().map(Record::encoded_bytes).sum::<usize>();
        building.drafts.extend(records.into_iter().map(Draft::Ready));
    }

    /// Loads pages one by one. One that can't be read is given up, with the space that its blocks have. Returns whether
    /// any is on its way.
    fn load_or_lose(&mut self, unknown: Vec<Unknown>) -> bool {
        let mut waits = false;
        for unknown in unknown {
            match (self.load_all(vec![unknown], For::Write), unknown) {
                (Ok(there), _) => waits |= !there,
                (Err(_), Unknown::OnDisk(key, home)) => {
                    let mut effects = Effects::default();
                    self.catalog.loaded_page(key, home, None, &mut effects);
                    self.settle(effects);
                }
                (Err(_), _) => {}
            }
        }
        waits
    }

    /// What the end of it needs is the leaves at the ends of the group's range.
    fn can_end(&mut self, doomed: Doomed) -> bool {
        let unknown = self.catalog.unknown_of(&Record::Reclaimed { doomed });
        for unknown in &unknown {
            if let Unknown::Leaf(key, _) = unknown {
                self.loads.pinned_for_writes.insert(key.page(0));
            }
        }
        match self.load_all(unknown, For::Write) {
            Ok(there) => there,
            Err(error) => {
                self.reclaim_stuck(doomed, error);
                false
            }
        }
    }

    fn has_space(&mut self, building: &Building, records: &[Record]) -> bool {
        let bytes = building.bytes_max + records.iter().map(Record::encoded_bytes).sum::<usize>();
        if bytes > body_capacity(self.limits.batch_record_pages_max) {
            return false;
        }
        let batch = u64::from(building.blocks) + pages_for(bytes) as u64;
        let needed = self.metadata_reserve() + building.pages + 2 * records.len() as u64 + batch;
        if self.space.free() >= needed {
            return true;
        }
        let checkpoints = self.io.counters.checkpoints;
        let since = *self.reclaim.waits_since.get_or_insert(checkpoints);
        self.checkpoints.wanted_for_space |= checkpoints < since + CHECKPOINTS_FOR_SPACE;
        false
    }

    /// A leaf of the directory can't be read: who waits for what was dropped is told. It is tried again when somebody asks
    /// for it, and after the next checkpoint.
    fn reclaim_stuck(&mut self, doomed: Doomed, error: DiskError) {
        self.reclaim.stuck = Some(error);
        let waits = |request: &StoreRequest| match request {
            StoreRequest::CreateReplica { group, .. } => *group == doomed.group,
            StoreRequest::Write { group, layer, .. }
            | StoreRequest::Copy { group, layer, .. }
            | StoreRequest::CopyHole { group, layer, .. }
            | StoreRequest::RaiseFloor { group, layer, .. } => (*group, Some(*layer)) == (doomed.group, doomed.layer),
            _ => false,
        };
        let (told, kept) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition::<VecDeque<_>, _>(|queued| waits(&queued.request));
        self.queue = kept;
        for queued in told {
            self.fail(queued.ticket, StoreError::Unreadable(error));
        }
    }
}
