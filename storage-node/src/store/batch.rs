//! Commit batches: what waits is written together, in one record, with one flush.
//!
//! One batch is in flight at a time. So the index is current when a batch is built, and a record that has a successor
//! is known to be durable.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use cairn_proto::block::{Apply, Content};
use cairn_proto::buffer::align;
use cairn_proto::checksum::Checksum;
use cairn_proto::ids::{CommitSeq, GroupId, Layer, Version};
use cairn_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;

use super::api::{CopiedBlock, StoreError, StoreReply, StoreRequest, Ticket, WriteContent};
use super::catalog::{Effects, Unknown};
use super::chunk::ChunkKey;
use super::engine::{Engine, LogPosition, Purpose};
use super::entry::{Entry, Hole, Uniform};
use super::io::WriteList;
use super::limits::{PAGE_ENTRIES, REQUEST_BLOCKS_MAX};
use super::load::For;
use super::record::{BatchHeader, Extent, MarkerKind, Record, Target, body_capacity};

/// A request that waits.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) ticket: Ticket,
    pub(super) since: Time,
    pub(super) request: StoreRequest,
    /// How many checkpoints there were when it was first found that the device is too full for it.
    pub(super) waits_since_checkpoint: Option<u64>,
}

/// A batch in flight.
#[derive(Debug)]
pub(super) struct Batch {
    requests: Vec<(Ticket, Time)>,
    records: Vec<Record>,
    record_pages: Vec<u32>,
    log: LogPosition,
    writes_in_flight: usize,
    written_at: Time,
    flushing_since: Option<Time>,
    /// Blocks given back already by the planted bug that does so.
    freed_early: bool,
}

impl Batch {
    /// One more write belongs to it.
    pub(super) fn add_write(&mut self) {
        self.writes_in_flight += 1;
    }

    pub(super) fn tickets(self) -> impl Iterator<Item = Ticket> {
        self.requests.into_iter().map(|(ticket, _)| ticket)
    }
}

/// A record whose data has no place yet.
enum Draft {
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
    fn blocks(&self) -> u32 {
        match self {
            Draft::Ready(_) => 0,
            Draft::Data { bytes, .. } | Draft::Copy { bytes, .. } => (bytes.len() / BLOCK_BYTES) as u32,
        }
    }

    /// Bytes of its record if its data is in one extent; each further extent takes [`EXTENT_BYTES`].
    fn record_bytes(&self) -> usize {
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
enum Verdict {
    /// It waits for another batch, an index page, or space.
    Wait,
    /// The batch has no room for it.
    Full,
    Answer(Result<(), StoreError>),
    Take(Plan),
}

/// What a request adds to a batch.
struct Plan {
    drafts: Vec<Draft>,
    /// Blocks of data that it takes.
    blocks: u32,
    /// Blocks of data that it gives back.
    gives_back: u32,
    /// Index pages that it makes dirty at the most.
    pages: u32,
}

/// A batch being built.
#[derive(Default)]
struct Building {
    requests: Vec<(Ticket, Time)>,
    drafts: Vec<Draft>,
    blocks: u32,
    bytes_max: usize,
    pages: u64,
    /// Ranges of this batch: end by (chunk, start).
    ranges: BTreeMap<(ChunkKey, u32), u32>,
    /// Groups that have something in this batch.
    written: BTreeSet<GroupId>,
    /// Groups whose replica is made or dropped by this batch.
    remade: BTreeSet<GroupId>,
}

impl Building {
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
    /// Builds a batch of what waits, if anything can be done.
    pub(super) fn build_batch(&mut self, now: Time) {
        let mut building = Building::default();
        self.loads.pinned_for_writes.clear();
        let mut queue = std::mem::take(&mut self.queue);
        let mut kept = Vec::new();
        for _ in 0..queue.len().min(self.limits.batch_requests_max) {
            let mut queued = queue.pop_front().expect("counted above");
            match self.judge(&building, &mut queued) {
                Verdict::Wait => kept.push(queued),
                Verdict::Full => {
                    queue.push_front(queued);
                    break;
                }
                Verdict::Answer(Ok(())) => {
                    self.io.counters.superseded += 1;
                    self.answer_durable(now, queued.ticket, queued.since);
                }
                Verdict::Answer(Err(error)) => self.fail(queued.ticket, error),
                Verdict::Take(plan) => building.take(queued, plan),
            }
        }
        kept.into_iter().rev().for_each(|queued| queue.push_front(queued));
        self.queue = queue;
        self.loads.failed_for_writes.clear();
        if building.drafts.is_empty() {
            if self.confirm_at.is_some_and(|at| at <= now) {
                self.io.counters.confirmations += 1;
                self.send_marker(now, MarkerKind::Idle);
            }
            return;
        }
        self.confirm_at = None;
        self.send_batch(now, building);
    }

    /// Sends a batch that changes nothing.
    pub(super) fn send_marker(&mut self, now: Time, kind: MarkerKind) {
        self.confirm_at = None;
        let mut building = Building::default();
        building.drafts.push(Draft::Ready(Record::Marker {
            kind,
            recovered: self.recovered_seq,
        }));
        self.send_batch(now, building);
    }

    fn judge(&mut self, building: &Building, queued: &mut Queued) -> Verdict {
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
            StoreRequest::CreateReplica { group, role } => {
                if building.written.contains(group) || building.remade.contains(group) {
                    return Verdict::Wait;
                }
                if self
                    .catalog
                    .replicas
                    .get(group)
                    .is_some_and(|replica| replica.role == *role)
                {
                    return Verdict::Answer(Ok(()));
                }
                Verdict::Take(Plan::of(Record::Replica {
                    group: *group,
                    role: *role,
                }))
            }
            StoreRequest::DropReplica { group } => {
                if building.written.contains(group) || building.remade.contains(group) {
                    return Verdict::Wait;
                }
                if !self.catalog.replicas.contains_key(group) {
                    return Verdict::Answer(Ok(()));
                }
                let record = Record::DropReplica { group: *group };
                match self.load_all(self.catalog.unknown_of(&record), For::Write) {
                    Err(error) => return Verdict::Answer(Err(StoreError::Unreadable(error))),
                    Ok(true) => {}
                    Ok(false) => {
                        let pages = self.catalog.pages_of_group(*group);
                        self.loads.pinned_for_writes.extend(pages);
                        return Verdict::Wait;
                    }
                }
                Verdict::Take(Plan::of(record))
            }
            StoreRequest::Write {
                group, layer, range, ..
            }
            | StoreRequest::Copy {
                group, layer, range, ..
            } => self.judge_blocks(building, &queued.request, target(*group, *layer, *range)),
            StoreRequest::Read { .. } | StoreRequest::Collect { .. } => unreachable!("reads are not queued here"),
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
        let plan = match request {
            StoreRequest::Write { version, content, .. } => match content {
                WriteContent::Data { bytes, checksums } => self.plan_data(at, *version, bytes, checksums),
                WriteContent::Zero => self.plan_hole(at, Hole::Zero, *version),
                WriteContent::Discard => self.plan_hole(at, Hole::Absent, *version),
            },
            StoreRequest::Copy {
                blocks, bytes, apply, ..
            } => self.plan_copy(at, blocks, bytes, *apply),
            _ => unreachable!("only writes and copies are judged here"),
        };
        match plan {
            None => Verdict::Answer(Ok(())),
            Some(plan) => Verdict::Take(plan),
        }
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
        let runs = self.applying(at, |i, held| apply.applies(held.version, blocks[i].version), &mut plan);
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

    fn plan_hole(&mut self, at: Target, hole: Hole, version: Version) -> Option<Plan> {
        let to = Uniform { hole, version };
        let gives_back = self.catalog.older_blocks(at.key(), at.range, version)?;
        let mut plan = Plan::new(at);
        plan.gives_back = gives_back;
        let record = match to.hole {
            Hole::Zero => Record::Zero { at, version },
            Hole::Absent => Record::Discard { at, version },
        };
        plan.drafts.push(Draft::Ready(record));
        // Whole pages become uniform; at most the two at the ends are made dirty, and those that keep newer blocks.
        if at.range.count() == BLOCKS_PER_CHUNK {
            plan.pages = 0;
        }
        Some(plan)
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

    /// Gives the batch its places and sends it to the device.
    fn send_batch(&mut self, now: Time, building: Building) {
        let freed_early = self.limits.canary.reuse_too_early() && self.free_early(&building.drafts);
        let bytes: usize = building.drafts.iter().map(Draft::record_bytes).sum();
        let pages = pages_for(bytes);
        let mut places = vec![self.space.next];
        let mut extents = Vec::new();
        let mut left = building.blocks + pages as u32 - 1;
        while left > 0 {
            let extent = self.space.take(left);
            left -= extent.count;
            extents.push(extent);
        }
        let mut extents = Extents::new(extents);
        (1..pages).for_each(|_| places.push(extents.take(1)[0].place));
        let (records, data) = place_drafts(building.drafts, &mut extents);

        let mut body = Vec::with_capacity(body_capacity(pages));
        records.iter().for_each(|record| record.encode(&mut body));
        // Scattered data made the record longer than was expected.
        while body.len() > body_capacity(places.len()) {
            places.push(self.space.take(1).place);
        }
        let header = BatchHeader {
            device: self.identity.device,
            seq: self.log.seq + 1,
            checkpoint: self.checkpoints.sequence,
            previous_crc: self.log.crc,
            next: self.space.choose_next(),
            places,
        };
        let (content, crc) = header.encode(&body, records.len());
        let mut writes = WriteList::default();
        push_pages(&mut writes, &header.places, &content);
        data.into_iter().for_each(|(place, bytes)| writes.push(place, bytes));
        let writes = writes.into_writes();

        let counters = &mut self.io.counters;
        counters.batch_requests += building.requests.len() as u64;
        counters.blocks_written += u64::from(building.blocks);
        counters.record_pages += header.places.len() as u64;
        self.zero_ahead.note_used(&writes);
        self.batch = Some(Batch {
            requests: building.requests,
            records,
            record_pages: header.places,
            log: LogPosition { seq: header.seq, crc },
            writes_in_flight: writes.len(),
            written_at: now,
            flushing_since: None,
            freed_early,
        });
        for (place, buffers) in writes {
            self.write(Purpose::BatchWrite, place, buffers);
        }
    }

    /// The planted bug `reuse_too_early`: blocks that the batch supersedes are free while it is being written.
    fn free_early(&mut self, drafts: &[Draft]) -> bool {
        for draft in drafts {
            let at = match draft {
                Draft::Data { at, .. } | Draft::Copy { at, .. } => at,
                Draft::Ready(_) => return false,
            };
            let places: Vec<u32> = self
                .catalog
                .entries(at.key(), at.range)
                .filter_map(|e| e.data_place())
                .collect();
            places.iter().for_each(|place| self.space.allocator.release(*place));
            self.space.mark_data(&places, false);
        }
        true
    }

    pub(super) fn batch_write_done(&mut self, now: Time) {
        let batch = self.batch.as_mut().expect("a write of the batch was in flight");
        batch.writes_in_flight -= 1;
        if batch.writes_in_flight > 0 {
            return;
        }
        batch.flushing_since = Some(now);
        if !self.geometry.volatile_cache {
            return self.batch_durable(now);
        }
        self.flush(Purpose::BatchFlush);
        if self.limits.canary.ack_before_flush() {
            let requests = std::mem::take(&mut self.batch.as_mut().expect("it is in flight").requests);
            for (ticket, since) in requests {
                self.answer_durable(now, ticket, since);
            }
        }
    }

    /// The batch survives everything: what it changes is true from now on.
    pub(super) fn batch_durable(&mut self, now: Time) {
        let batch = self.batch.take().expect("a batch was in flight");
        self.io.counters.batches += 1;
        self.log = batch.log;
        let pages = batch.record_pages.len() as u64;
        self.checkpoints.log_page_count += pages;
        self.checkpoints.log_pages_since += pages;
        self.checkpoints
            .log_pages
            .push_back((batch.log.seq, batch.record_pages));
        self.opened = true;
        let marker = matches!(batch.records[..], [Record::Marker { .. }]);
        let mut effects = Effects::default();
        batch
            .records
            .iter()
            .for_each(|record| self.catalog.apply(record, &mut effects));
        if batch.freed_early {
            effects.freed.clear();
        }
        self.settle(effects);
        let flushed_since = batch.flushing_since.unwrap_or(now);
        let commit = CommitSeq(self.log.seq);
        for (ticket, since) in batch.requests {
            let reply = StoreReply::Durable {
                commit,
                queue_us: micros(batch.written_at, since),
                write_us: micros(flushed_since, batch.written_at),
                flush_us: micros(now, flushed_since),
            };
            self.io.reply(ticket, reply);
        }
        if !marker {
            self.confirm_at = Some(now + self.limits.confirm_after);
        }
    }

    /// Accounts for what changes did to space.
    pub(super) fn settle(&mut self, effects: Effects) {
        // A block that was used and freed by the same batch is in both lists.
        self.space.mark_data(&effects.used, true);
        self.space.mark_data(&effects.freed, false);
        self.io.counters.blocks_freed += effects.freed.len() as u64;
        let after = self.reads.next_number();
        self.space.free_after(after, effects.freed);
        self.checkpoints.stale.extend(effects.stale);
    }

    fn answer_durable(&mut self, now: Time, ticket: Ticket, since: Time) {
        let reply = StoreReply::Durable {
            commit: CommitSeq(self.log.seq),
            queue_us: micros(now, since),
            write_us: 0,
            flush_us: 0,
        };
        self.io.reply(ticket, reply);
    }
}

impl Plan {
    fn of(record: Record) -> Plan {
        Plan {
            drafts: vec![Draft::Ready(record)],
            blocks: 0,
            gives_back: 0,
            pages: 0,
        }
    }

    fn new(at: Target) -> Plan {
        let pages = (at.range.end() - 1) / PAGE_ENTRIES - at.range.start() / PAGE_ENTRIES + 1;
        Plan {
            drafts: Vec::with_capacity(1),
            blocks: 0,
            gives_back: 0,
            pages,
        }
    }

    fn finish(mut self) -> Option<Plan> {
        self.blocks = self.drafts.iter().map(Draft::blocks).sum();
        (!self.drafts.is_empty()).then_some(self)
    }

    pub(super) fn takes_net(&self) -> bool {
        self.blocks > self.gives_back
    }
}

impl Building {
    fn has_room(&self, plan: &Plan, limits: &super::limits::StoreLimits) -> bool {
        let bytes: usize = plan.drafts.iter().map(Draft::record_bytes_max).sum();
        self.drafts.is_empty()
            || (self.blocks + plan.blocks <= limits.batch_blocks_max
                && self.bytes_max + bytes <= body_capacity(limits.batch_record_pages_max))
    }

    fn take(&mut self, queued: Queued, plan: Plan) {
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
            } => {
                let at = target(group, layer, range);
                self.ranges.insert((at.key(), range.start()), range.end());
                self.written.insert(group);
            }
            StoreRequest::CreateReplica { group, .. } | StoreRequest::DropReplica { group } => {
                self.remade.insert(group);
            }
            _ => {}
        }
        self.drafts.extend(plan.drafts);
    }
}

impl Engine {
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

/// After so many checkpoints all that can be given back is given back.
const CHECKPOINTS_FOR_SPACE: u64 = 3;

/// Record pages for so many bytes of records.
fn pages_for(bytes: usize) -> usize {
    let mut pages = 1;
    while body_capacity(pages) < bytes {
        pages += 1;
    }
    pages
}

/// Extents to be used up from the front.
struct Extents {
    left: std::collections::VecDeque<Extent>,
}

impl Extents {
    fn new(extents: Vec<Extent>) -> Extents {
        Extents { left: extents.into() }
    }

    fn take(&mut self, mut count: u32) -> Vec<Extent> {
        let mut taken = Vec::with_capacity(1);
        while count > 0 {
            let front = self.left.front_mut().expect("the batch's blocks were counted");
            let piece = Extent {
                place: front.place,
                count: count.min(front.count),
            };
            front.place += piece.count;
            front.count -= piece.count;
            if front.count == 0 {
                self.left.pop_front();
            }
            count -= piece.count;
            taken.push(piece);
        }
        taken
    }
}

/// Gives each draft its place. Returns the records, and the data with where it goes.
fn place_drafts(drafts: Vec<Draft>, extents: &mut Extents) -> (Vec<Record>, Vec<(u32, Bytes)>) {
    let mut data = Vec::new();
    let mut records = Vec::with_capacity(drafts.len());
    for draft in drafts {
        let taken = extents.take(draft.blocks());
        match draft {
            Draft::Ready(record) => records.push(record),
            Draft::Data {
                at,
                version,
                checksums,
                bytes,
            } => {
                place_bytes(&mut data, &taken, bytes);
                records.push(Record::Data {
                    at,
                    version,
                    checksums,
                    extents: taken,
                });
            }
            Draft::Copy { at, blocks, bytes } => {
                let mut places = taken
                    .iter()
                    .flat_map(|extent| extent.place..extent.place + extent.count);
                let entry = |block: &CopiedBlock| match block.content {
                    Content::Data(checksum) => {
                        let place = places.next().expect("a place for each block of data");
                        Entry::data(block.version, checksum, place)
                    }
                    Content::Zero => hole_entry(Hole::Zero, block.version),
                    Content::Absent => hole_entry(Hole::Absent, block.version),
                    Content::Damaged => unreachable!("refused when it was submitted"),
                };
                let entries = blocks.iter().map(entry).collect();
                records.push(Record::Copy { at, entries });
                place_bytes(&mut data, &taken, bytes);
            }
        }
    }
    (records, data)
}

fn hole_entry(hole: Hole, version: Version) -> Entry {
    Uniform { hole, version }.entry()
}

fn place_bytes(data: &mut Vec<(u32, Bytes)>, extents: &[Extent], bytes: Bytes) {
    let bytes = align(bytes);
    let mut at = 0;
    for extent in extents {
        let end = at + extent.count as usize * BLOCK_BYTES;
        data.push((extent.place, bytes.slice(at..end)));
        at = end;
    }
}

/// Record pages, each run of places as one buffer.
fn push_pages(writes: &mut WriteList, places: &[u32], content: &Bytes) {
    let mut first = 0;
    while first < places.len() {
        let run = (first..places.len())
            .take_while(|i| places[*i] == places[first] + (*i - first) as u32)
            .count();
        writes.push(
            places[first],
            content.slice(first * BLOCK_BYTES..(first + run) * BLOCK_BYTES),
        );
        first += run;
    }
}

pub(super) fn target(group: GroupId, layer: Layer, range: BlockRange) -> Target {
    Target { group, layer, range }
}

fn micros(later: Time, earlier: Time) -> u32 {
    u32::try_from(later.saturating_since(earlier).as_micros()).unwrap_or(u32::MAX)
}

// A run of a request's blocks that apply costs at most this beside what each block costs; scattered to the worst, all
// runs of the largest request fit two pages.
const _: () = assert!((REQUEST_BLOCKS_MAX as usize / 2) * (48 + 4 + EXTENT_BYTES) <= body_capacity(2));
