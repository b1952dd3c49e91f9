//! Which requests a batch takes: what is looked at before anything gets a place.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use cairn_proto::block::{Apply, Content};
use cairn_proto::checksum::Checksum;
use cairn_proto::ids::{GroupId, Version};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;

use super::api::{CopiedBlock, StoreError, StoreRequest, Ticket, WriteContent};
use super::batch::{Queued, target};
use super::catalog::{Replica, Unknown};
use super::chunk::ChunkKey;
use super::doomed::Doomed;
use super::engine::Engine;
use super::entry::{Entry, Hole, Uniform};
use super::limits::{BATCH_BLOCKS_MAX, PAGE_ENTRIES, PAGES_PER_CHUNK, REQUEST_BLOCKS_MAX, StoreLimits};
use super::load::For;
use super::record::{Record, Target, body_capacity};

/// A record whose data has no place yet.
pub(super) enum Draft {
    Ready(Record),
    Data {
        at: Target,
        version: Version,
        checksums: Vec<Checksum>,
        bytes: Bytes,
    },
    Copy {
        at: Target,
        blocks: Vec<CopiedBlock>,
        bytes: Bytes,
    },
}

impl Draft {
    pub(super) fn blocks(&self) -> u32 {
        match self {
            Draft::Ready(_) => 0,
            Draft::Data { bytes, .. } | Draft::Copy { bytes, .. } => (bytes.len() / BLOCK_BYTES) as u32,
        }
    }

    /// Bytes of its record if its data is in one extent; each further extent takes [`EXTENT_BYTES`].
    pub(super) fn record_bytes(&self) -> usize {
        match self {
            Draft::Ready(record) => record.encoded_bytes(),
            Draft::Data { checksums, .. } => Record::data_bytes(checksums.len(), 1),
            Draft::Copy { blocks, .. } => Record::copy_bytes(blocks.len()),
        }
    }

    fn record_bytes_max(&self) -> usize {
        match self {
            Draft::Data { checksums, .. } => Record::data_bytes(checksums.len(), checksums.len()),
            _ => self.record_bytes(),
        }
    }
}

/// Bytes that a record takes for each extent of its data.
const EXTENT_BYTES: usize = 8;

/// What becomes of a request that was looked at.
pub(super) enum Verdict {
    /// It waits for another batch, an index page, or space.
    Wait,
    /// The batch has no room for it.
    Full,
    Answer(Result<(), StoreError>),
    Take(Plan),
}

/// What a request adds to a batch.
pub(super) struct Plan {
    drafts: Vec<Draft>,
    /// Blocks of data that it takes.
    blocks: u32,
    /// Blocks of data that it gives back.
    gives_back: u32,
    /// Index pages and leaves that it makes dirty at the most.
    pages: u32,
}

/// A batch being built.
#[derive(Default)]
pub(super) struct Building {
    pub(super) requests: Vec<(Ticket, Time)>,
    pub(super) drafts: Vec<Draft>,
    pub(super) blocks: u32,
    pub(super) bytes_max: usize,
    pub(super) pages: u64,
    /// Ranges of this batch: end by (chunk, start).
    pub(super) ranges: BTreeMap<(ChunkKey, u32), u32>,
    /// Groups that have something in this batch.
    pub(super) written: BTreeSet<GroupId>,
    /// Groups whose replica is made or dropped by this batch.
    pub(super) remade: BTreeSet<GroupId>,
}

impl Building {
    /// Whether a request of the batch has to do with these blocks.
    pub(super) fn touches(&self, at: &Target) -> bool {
        self.remade.contains(&at.group) || self.overlaps(at)
    }

    fn overlaps(&self, at: &Target) -> bool {
        let key = at.key();
        let before = self.ranges.range(..(key, at.range.end())).next_back();
        before.is_some_and(|((chunk, _), end)| *chunk == key && *end > at.range.start())
    }
}

/// What can be said about a request without looking at what the store holds.
pub(super) fn check_request(request: &StoreRequest) -> Result<(), StoreError> {
    match request {
        StoreRequest::Write {
            range,
            version,
            content,
            ..
        } => {
            if *version == Version::ZERO {
                return Err(StoreError::Invalid("a write has a version"));
            }
            match content {
                WriteContent::Data { bytes, checksums } => {
                    check_blocks(range)?;
                    if bytes.len() != range.bytes() || checksums.len() != range.count() as usize {
                        return Err(StoreError::Invalid(
                            "bytes and checksums of a write are as many as its blocks",
                        ));
                    }
                }
                WriteContent::Zero | WriteContent::Discard => {}
            }
            Ok(())
        }
        StoreRequest::Copy {
            range, blocks, bytes, ..
        } => {
            check_blocks(range)?;
            let data = blocks
                .iter()
                .filter(|block| matches!(block.content, Content::Data(_)))
                .count();
            if blocks.len() != range.count() as usize || bytes.len() != data * BLOCK_BYTES {
                return Err(StoreError::Invalid(
                    "blocks and bytes of a copy are as many as its range says",
                ));
            }
            if blocks.iter().any(|block| block.content == Content::Damaged) {
                return Err(StoreError::Invalid("a damaged block is not copied"));
            }
            Ok(())
        }
        StoreRequest::CopyHole { block, .. } if !block.content.is_hole() => {
            Err(StoreError::Invalid("only a hole is copied run-length"))
        }
        _ => Ok(()),
    }
}

fn check_blocks(range: &BlockRange) -> Result<(), StoreError> {
    if range.count() > REQUEST_BLOCKS_MAX {
        return Err(StoreError::Invalid("a request has at most 256 blocks of data"));
    }
    Ok(())
}

impl Engine {
    pub(super) fn judge(&mut self, building: &Building, queued: &mut Queued) -> Verdict {
        let verdict = match &queued.request {
            StoreRequest::Seal { volume, generation } => {
                if self.catalog.seal_of(*volume) >= *generation {
                    return Verdict::Answer(Ok(()));
                }
                Verdict::Take(Plan::of(Record::Seal {
                    volume: *volume,
                    generation: *generation,
                }))
            }
            StoreRequest::CreateReplica { group, role, epoch } => {
                if building.written.contains(group) || building.remade.contains(group) {
                    return Verdict::Wait;
                }
                let is_known =
                    |replica: &Replica| *epoch < replica.epoch || (*epoch, *role) == (replica.epoch, replica.role);
                if self.catalog.replicas.get(group).is_some_and(is_known) {
                    return Verdict::Answer(Ok(()));
                }
                let dropped = Doomed {
                    group: *group,
                    layer: None,
                };
                if self.catalog.doomed.contains(&dropped) {
                    self.reclaim.stuck = None;
                    return Verdict::Wait;
                }
                Verdict::Take(Plan::of(Record::Replica {
                    group: *group,
                    role: *role,
                    epoch: *epoch,
                }))
            }
            StoreRequest::DropReplica { group, epoch } => {
                if building.written.contains(group) || building.remade.contains(group) {
                    return Verdict::Wait;
                }
                let held = self.catalog.replicas.get(group);
                if held.is_none_or(|replica| replica.epoch > *epoch) {
                    return Verdict::Answer(Ok(()));
                }
                Verdict::Take(Plan::of(Record::DropReplica { group: *group }))
            }
            StoreRequest::DeleteLayer { group, layer } => {
                if building.written.contains(group) || building.remade.contains(group) {
                    return Verdict::Wait;
                }
                let (group, layer) = (*group, *layer);
                if !self.catalog.replicas.contains_key(&group) {
                    return Verdict::Answer(Err(StoreError::NoReplica));
                }
                if self.catalog.doomed.contains(&Doomed {
                    group,
                    layer: Some(layer),
                }) {
                    return Verdict::Answer(Ok(()));
                }
                Verdict::Take(Plan::of(Record::DeleteLayer { group, layer }))
            }
            StoreRequest::RaiseFloor {
                group, layer, chunk, ..
            } => {
                let whole = BlockRange::whole(*chunk);
                self.judge_blocks(building, &queued.request, target(*group, *layer, whole))
            }
            StoreRequest::Write {
                group, layer, range, ..
            }
            | StoreRequest::Copy {
                group, layer, range, ..
            }
            | StoreRequest::CopyHole {
                group, layer, range, ..
            } => self.judge_blocks(building, &queued.request, target(*group, *layer, *range)),
            StoreRequest::SaveScrub { state } => Verdict::Take(Plan::of(Record::Scrub(*state))),
            StoreRequest::Read { .. }
            | StoreRequest::Collect { .. }
            | StoreRequest::Scrub { .. }
            | StoreRequest::Defragment { .. } => unreachable!("reads are not queued here"),
        };
        let Verdict::Take(plan) = verdict else { return verdict };
        if !building.has_room(&plan, &self.limits) {
            return Verdict::Full;
        }
        match self.admit(building, &plan, queued) {
            Ok(true) => Verdict::Take(plan),
            Ok(false) => Verdict::Wait,
            Err(error) => Verdict::Answer(Err(error)),
        }
    }

    fn judge_blocks(&mut self, building: &Building, request: &StoreRequest, at: Target) -> Verdict {
        if building.remade.contains(&at.group) || building.overlaps(&at) {
            return Verdict::Wait;
        }
        if !self.catalog.replicas.contains_key(&at.group) {
            return Verdict::Answer(Err(StoreError::NoReplica));
        }
        if self.catalog.is_doomed(&at.key()) {
            self.reclaim.stuck = None;
            return Verdict::Wait;
        }
        let unknown: Vec<Unknown> = self.catalog.unknown(at.key(), at.range).collect();
        if unknown.contains(&Unknown::Broken) {
            return Verdict::Answer(Err(StoreError::IndexDamaged));
        }
        match self.load_all(unknown, For::Write) {
            Err(error) => return Verdict::Answer(Err(StoreError::Unreadable(error))),
            Ok(true) => {}
            Ok(false) => {
                self.loads.pinned_for_writes.extend(at.pages());
                return Verdict::Wait;
            }
        }
        if self.contradicts(at) {
            return Verdict::Answer(Err(StoreError::IndexDamaged));
        }
        let plan = match request {
            StoreRequest::Write { version, content, .. } => match content {
                WriteContent::Data { bytes, checksums } => self.plan_data(at, *version, bytes, checksums),
                WriteContent::Zero => self.plan_hole(at, Hole::Zero, *version, Apply::IfNewer),
                WriteContent::Discard => self.plan_hole(at, Hole::Absent, *version, Apply::IfNewer),
            },
            StoreRequest::CopyHole { block, apply, .. } => {
                let hole = match block.content {
                    Content::Zero => Hole::Zero,
                    _ => Hole::Absent,
                };
                self.plan_hole(at, hole, block.version, *apply)
            }
            StoreRequest::Copy {
                blocks, bytes, apply, ..
            } => self.plan_copy(at, blocks, bytes, *apply),
            StoreRequest::RaiseFloor { version, .. } => self.plan_floor(at, *version),
            _ => unreachable!("only writes, copies and floors are judged here"),
        };
        match plan {
            None => Verdict::Answer(Ok(())),
            Some(plan) => Verdict::Take(plan),
        }
    }

    /// Whether what the index says of these blocks can't be true: a block of the device holds two of them, or is not in the
    /// map. To give it back would harm whoever else has it.
    fn contradicts(&self, at: Target) -> bool {
        let mut places = self.catalog.places(at.key(), at.range);
        if at.range.count() == 1 {
            return places.any(|place| !self.space.data.get(place));
        }
        let mut places: Vec<u32> = places.collect();
        places.sort_unstable();
        let twice = places.windows(2).any(|pair| pair[0] == pair[1]);
        twice || places.iter().any(|place| !self.space.data.get(*place))
    }

    fn plan_data(&mut self, at: Target, version: Version, bytes: &Bytes, checksums: &[Checksum]) -> Option<Plan> {
        let mut plan = Plan::new(at);
        let applies = |held: &Entry| Apply::IfNewer.applies(held.version, version);
        let runs = self.applying(at, |_, held| applies(held), &mut plan);
        for run in runs {
            let first = (run.start() - at.range.start()) as usize;
            let end = first + run.count() as usize;
            plan.drafts.push(Draft::Data {
                at: Target { range: run, ..at },
                version,
                checksums: checksums[first..end].to_vec(),
                bytes: bytes.slice(first * BLOCK_BYTES..end * BLOCK_BYTES),
            });
        }
        plan.finish()
    }

    fn plan_copy(&mut self, at: Target, blocks: &[CopiedBlock], bytes: &Bytes, apply: Apply) -> Option<Plan> {
        let mut plan = Plan::new(at);
        // What can't be read here is mended by what another replica holds of the same version.
        let mends = |i: usize, held: &Entry| {
            let block = at.range.start() + i as u32;
            held.version == blocks[i].version
                && (held.state().content == Content::Damaged || self.damaged.contains(&(at.key(), block)))
        };
        let applies = |i: usize, held: &Entry| apply.applies(held.version, blocks[i].version) || mends(i, held);
        let runs = self.applying(at, applies, &mut plan);
        let data = |blocks: &[CopiedBlock]| blocks.iter().filter(|b| matches!(b.content, Content::Data(_))).count();
        for run in runs {
            let first = (run.start() - at.range.start()) as usize;
            let end = first + run.count() as usize;
            let from = data(&blocks[..first]) * BLOCK_BYTES;
            let len = data(&blocks[first..end]) * BLOCK_BYTES;
            plan.drafts.push(Draft::Copy {
                at: Target { range: run, ..at },
                blocks: blocks[first..end].to_vec(),
                bytes: bytes.slice(from..from + len),
            });
        }
        plan.finish()
    }

    fn plan_hole(&mut self, at: Target, hole: Hole, version: Version, apply: Apply) -> Option<Plan> {
        let gives_way = self.catalog.gives_way(at.key(), at.range, version, apply)?;
        let record = match (apply, hole) {
            (Apply::IfNewer, Hole::Zero) => Record::Zero { at, version },
            (Apply::IfNewer, Hole::Absent) => Record::Discard { at, version },
            (Apply::Resync(generation), _) => Record::ResyncHole {
                at,
                hole: Uniform { hole, version },
                generation,
            },
        };
        Some(Plan {
            gives_back: gives_way.data,
            pages: gives_way.pages + LEAVES_PER_CHANGE,
            ..Plan::of(record)
        })
    }

    fn plan_floor(&self, at: Target, version: Version) -> Option<Plan> {
        let lower = self.catalog.has_lower(at.key(), version);
        lower.then(|| Plan {
            pages: PAGES_PER_CHUNK + LEAVES_PER_CHANGE,
            ..Plan::of(Record::Floor {
                group: at.group,
                layer: at.layer,
                chunk: at.range.chunk(),
                version,
            })
        })
    }

    /// The runs of blocks to which a write applies.
    fn applying(&self, at: Target, applies: impl Fn(usize, &Entry) -> bool, plan: &mut Plan) -> Vec<BlockRange> {
        let mut runs: Vec<BlockRange> = Vec::with_capacity(1);
        let mut open: Option<(u32, u32)> = None;
        let chunk = at.range.chunk();
        let close = |runs: &mut Vec<BlockRange>, open: Option<(u32, u32)>| {
            runs.extend(open.and_then(|(start, count)| BlockRange::new(chunk, start, count)));
        };
        for (i, (block, held)) in (at.range.start()..)
            .zip(self.catalog.entries(at.key(), at.range))
            .enumerate()
        {
            if applies(i, &held) {
                plan.gives_back += u32::from(held.data_place().is_some());
                open = Some(open.map_or((block, 1), |(start, count)| (start, count + 1)));
            } else {
                close(&mut runs, open.take());
            }
        }
        close(&mut runs, open);
        runs
    }

    /// Whether there is space for a request beside what the batch has already. `Ok(false)`: soon.
    fn admit(&mut self, building: &Building, plan: &Plan, queued: &mut Queued) -> Result<bool, StoreError> {
        let record_bytes = building.bytes_max + plan.drafts.iter().map(Draft::record_bytes_max).sum::<usize>();
        let batch = u64::from(building.blocks + plan.blocks) + pages_for(record_bytes) as u64;
        let keep = self.metadata_reserve() + building.pages + u64::from(plan.pages);
        let keep = keep
            + if plan.takes_net() {
                self.limits.overwrite_reserve_blocks
            } else {
                0
            };
        if self.space.free() >= keep + batch {
            return Ok(true);
        }
        let soon =
            self.space.free() + self.space.quarantined + self.checkpoints.to_be_freed() + self.zero_ahead.blocks();
        let since = *queued
            .waits_since_checkpoint
            .get_or_insert(self.io.counters.checkpoints);
        if soon < keep + batch || self.io.counters.checkpoints >= since + CHECKPOINTS_FOR_SPACE {
            return Err(StoreError::NoSpace);
        }
        self.checkpoints.wanted_for_space = true;
        Ok(false)
    }
}

/// A change of a chunk changes its leaf, and may split it.
const LEAVES_PER_CHANGE: u32 = 2;

/// After so many checkpoints all that can be given back is given back.
const CHECKPOINTS_FOR_SPACE: u64 = 3;

/// Record pages for so many bytes of records.
pub(super) fn pages_for(bytes: usize) -> usize {
    let mut pages = 1;
    while body_capacity(pages) < bytes {
        pages += 1;
    }
    pages
}

impl Plan {
    pub(super) fn of(record: Record) -> Plan {
        Plan {
            drafts: vec![Draft::Ready(record)],
            blocks: 0,
            gives_back: 0,
            pages: 0,
        }
    }

    pub(super) fn new(at: Target) -> Plan {
        let pages = (at.range.end() - 1) / PAGE_ENTRIES - at.range.start() / PAGE_ENTRIES + 1;
        Plan {
            drafts: Vec::with_capacity(1),
            blocks: 0,
            gives_back: 0,
            pages: pages + LEAVES_PER_CHANGE,
        }
    }

    pub(super) fn finish(mut self) -> Option<Plan> {
        self.blocks = self.drafts.iter().map(Draft::blocks).sum();
        (!self.drafts.is_empty()).then_some(self)
    }

    pub(super) fn takes_net(&self) -> bool {
        self.blocks > self.gives_back
    }
}

impl Building {
    fn has_room(&self, plan: &Plan, limits: &StoreLimits) -> bool {
        let bytes: usize = plan.drafts.iter().map(Draft::record_bytes_max).sum();
        self.drafts.is_empty()
            || (self.blocks + plan.blocks <= limits.batch_blocks_max.min(BATCH_BLOCKS_MAX)
                && self.bytes_max + bytes <= body_capacity(limits.batch_record_pages_max))
    }

    pub(super) fn take(&mut self, queued: Queued, plan: Plan) {
        self.requests.push((queued.ticket, queued.since));
        self.blocks += plan.blocks;
        self.bytes_max += plan.drafts.iter().map(Draft::record_bytes_max).sum::<usize>();
        self.pages += u64::from(plan.pages);
        match queued.request {
            StoreRequest::Write {
                group, layer, range, ..
            }
            | StoreRequest::Copy {
                group, layer, range, ..
            }
            | StoreRequest::CopyHole {
                group, layer, range, ..
            } => {
                let at = target(group, layer, range);
                self.ranges.insert((at.key(), range.start()), range.end());
                self.written.insert(group);
            }
            StoreRequest::RaiseFloor {
                group, layer, chunk, ..
            } => {
                let at = target(group, layer, BlockRange::whole(chunk));
                self.ranges.insert((at.key(), 0), at.range.end());
                self.written.insert(group);
            }
            StoreRequest::CreateReplica { group, .. }
            | StoreRequest::DropReplica { group, .. }
            | StoreRequest::DeleteLayer { group, .. } => {
                self.remade.insert(group);
            }
            _ => {}
        }
        self.drafts.extend(plan.drafts);
    }
}

// A run of a request's blocks that apply costs at most this beside what each block costs; scattered to the worst, all
// runs of the largest request fit two pages.
const _: () = assert!((REQUEST_BLOCKS_MAX as usize / 2) * (48 + 4 + EXTENT_BYTES) <= body_capacity(2));
