//! Commit batches: what waits is written together, in one record, with one flush.
//!
//! One batch is in flight at a time. So the index is current when a batch is built, and a record that has a successor
//! is known to be durable.

use bytes::Bytes;
use cairn_proto::block::Content;
use cairn_proto::buffer::align;
use cairn_proto::ids::{CommitSeq, GroupId, Layer, Version};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;

use super::api::{CopiedBlock, StoreReply, StoreRequest, Ticket};
use super::catalog::Effects;
use super::engine::{Engine, LogPosition, Purpose};
use super::entry::{Entry, Hole, Uniform};
use super::io::WriteList;
use super::plan::{Building, Draft, Verdict, pages_for};
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
    /// Blocks of data in it.
    blocks: u32,
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

    /// Blocks of data in it.
    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    pub(super) fn tickets(self) -> impl Iterator<Item = Ticket> {
        self.requests.into_iter().map(|(ticket, _)| ticket)
    }
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
        self.add_move(&mut building);
        self.add_reclaim(&mut building);
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

    /// Gives the batch its places and sends it to the device.
    fn send_batch(&mut self, now: Time, building: Building) {
        let freed_early = self.limits.canary.reuse_too_early() && self.free_early(&building.drafts);
        let bytes: usize = building.drafts.iter().map(Draft::record_bytes).sum();
        let pages = pages_for(bytes);
        let mut places = vec![self.space.next()];
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
            ahead: self.space.advance(),
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
            blocks: building.blocks,
            log: LogPosition { seq: header.seq, crc },
            writes_in_flight: writes.len(),
            written_at: now,
            flushing_since: None,
            freed_early,
        });
        // One write is durable by itself in less time than a write and then a flush take, and with fewer wake-ups. Whatever else
        // the batch relies on must be durable already: only a flush would take care of that.
        let canary = self.limits.canary;
        let is_enough = self.geometry.volatile_cache
            && (self.io.unflushed.is_none() || canary.flush_nothing_else())
            && !canary.ack_before_flush();
        if writes.len() == 1 && is_enough {
            let (place, buffers) = writes.into_iter().next().expect("there is one");
            return self.write_durably(place, buffers);
        }
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
        if !self.damaged.is_empty() {
            self.note_mended(&batch.records);
        }
        self.settle(effects);
        self.move_committed();
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

    /// What was damaged and is written anew is damaged no more, nor is what is not there any more.
    fn note_mended(&mut self, records: &[Record]) {
        let before = self.damaged.len();
        let mut gone = false;
        for record in records {
            match record {
                Record::Data { at, .. } | Record::Copy { at, .. } => {
                    for block in at.range.start()..at.range.end() {
                        self.damaged.remove(&(at.key(), block));
                    }
                }
                Record::Zero { .. }
                | Record::Discard { .. }
                | Record::ResyncHole { .. }
                | Record::DropReplica { .. }
                | Record::DeleteLayer { .. } => gone = true,
                _ => {}
            }
        }
        if gone {
            let catalog = &self.catalog;
            self.damaged.retain(|(key, block)| {
                let entry = catalog.chunks.get(key).and_then(|chunk| chunk.entry(*block));
                let is_hole = entry.is_some_and(|entry| entry.data_place().is_none() && !entry.is_damaged());
                catalog.replicas.contains_key(&key.group) && !catalog.is_doomed(key) && !is_hole
            });
        }
        self.io.counters.blocks_mended += (before - self.damaged.len()) as u64;
    }

    /// Accounts for what changes did to space.
    pub(super) fn settle(&mut self, mut effects: Effects) {
        let miscounted = effects.miscounted;
        assert!(miscounted.is_none(), "the blocks of {miscounted:?} are miscounted");
        // A block that was used and freed by the same batch is in both lists.
        self.space.mark_data(&effects.used, true);
        let freed_twice = self.space.unmark(&mut effects.freed, true);
        let stale_twice = self.space.unmark(&mut effects.stale, false);
        self.claimed_twice = self.claimed_twice.or(freed_twice).or(stale_twice);
        self.io.counters.blocks_freed += effects.freed.len() as u64;
        let after = self.reads.next_number();
        self.space.free_after(after, effects.freed);
        self.checkpoints.stale.extend(effects.stale);
        self.checkpoints.stale.extend(effects.stale_leaves);
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
