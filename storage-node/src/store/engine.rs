//! A store that is open: takes requests and completions, and decides what is next.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::collections::Map;
use cairn_proto::disk::{DiskDone, DiskError, DiskGeometry};
use cairn_proto::time::Time;

use super::api::{StoreAction, StoreError, StoreReply, StoreRequest, Ticket};
use super::batch::{Batch, Queued};
use super::catalog::Catalog;
use super::checkpoint::{Checkpoint, Checkpoints};
use super::chunk::{ChunkKey, Page};
use super::collect::CollectRequest;
use super::io::Io;
use super::limits::StoreLimits;
use super::load::Loads;
use super::mend::Mends;
use super::mover::Mover;
use super::read::Reads;
use super::reclaim::Reclaim;
use super::record::MarkerKind;
use super::scrub::Scrub;
use super::space::SpaceMap;
use super::status::LostParts;
use super::superblock::Identity;
use super::window::Walker;
use super::zero_ahead::ZeroAhead;

/// What an operation in flight is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// Record pages and data of the batch.
    BatchWrite,
    BatchFlush,
    /// Record pages and data of a batch in one write that is durable when it ends.
    DurableBatch,
    /// A piece of a request's read, by the read's number and the piece's.
    Read(u64, usize),
    /// A block of a piece that could not be read as a whole.
    ReadBlock(u64, usize, usize),
    /// An index page, by the read's number.
    Load(u64),
    CheckpointWrite,
    CheckpointFlush,
    HeaderWrite,
    HeaderFlush,
    ZeroAhead,
    /// Makes durable what recovery believed.
    BelievedFlush,
    /// A superblock copy that was found damaged.
    Mend,
    MendFlush,
    /// A piece of what the scrub or the mover reads.
    Walk(Walker, u64),
    MoveWrite,
}

/// What an operation of the device says, when it ends, of what is durable.
enum Kind {
    /// A write that only a flush makes durable.
    CachedWrite,
    Flush,
    /// Nothing of any other write.
    Other,
}

impl Purpose {
    fn kind(self) -> Kind {
        match self {
            Purpose::BatchWrite
            | Purpose::CheckpointWrite
            | Purpose::HeaderWrite
            | Purpose::ZeroAhead
            | Purpose::Mend
            | Purpose::MoveWrite => Kind::CachedWrite,
            Purpose::BatchFlush
            | Purpose::CheckpointFlush
            | Purpose::HeaderFlush
            | Purpose::BelievedFlush
            | Purpose::MendFlush => Kind::Flush,
            Purpose::DurableBatch
            | Purpose::Read(..)
            | Purpose::ReadBlock(..)
            | Purpose::Load(_)
            | Purpose::Walk(..) => Kind::Other,
        }
    }
}

/// What stops a store whose index contradicts itself: `EUCLEAN`, "structure needs cleaning".
const CONTRADICTION: DiskError = DiskError { errno: 117 };

/// Where the log is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LogPosition {
    /// The last durable commit.
    pub(super) seq: u64,
    /// The CRC of its record.
    pub(super) crc: u32,
}

/// The running store.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) identity: Identity,
    pub(super) geometry: DiskGeometry,
    pub(super) limits: StoreLimits,
    pub(super) io: Io,
    pub(super) in_flight: Map<u64, Purpose>,
    pub(super) poisoned: Option<DiskError>,

    pub(super) catalog: Catalog,
    pub(super) space: SpaceMap,
    pub(super) log: LogPosition,
    pub(super) recovered_seq: u64,
    /// Whether the batch that ends recovery is durable: nothing is served before.
    pub(super) opened: bool,

    pub(super) queue: VecDeque<Queued>,
    pub(super) batch: Option<Batch>,
    /// When to write an empty batch, so that the last one is confirmed.
    pub(super) confirm_at: Option<Time>,
    pub(super) reads: Reads,
    /// Blocks whose data was found not to match the index: a copy of the same version may replace them.
    pub(super) damaged: BTreeSet<(ChunkKey, u32)>,
    pub(super) loads: Loads,
    pub(super) scrub: Scrub,
    pub(super) mover: Mover,
    pub(super) reclaim: Reclaim,
    pub(super) checkpoint: Option<Box<Checkpoint>>,
    pub(super) checkpoints: Checkpoints,
    pub(super) zero_ahead: ZeroAhead,
    pub(super) mends: Mends,
    /// Whether what recovery believed is being made durable: nothing is written before.
    pub(super) is_believing: bool,
    /// The checkpoint header that is erased when recovery ends.
    pub(super) erase: Option<u32>,
    /// A block that was given back twice: the index contradicts itself, and nothing can be said of what stands there.
    pub(super) claimed_twice: Option<u32>,
    /// Lost when it was opened.
    pub(super) lost_parts: LostParts,
}

impl Engine {
    /// First makes durable what recovery believed: if only the process had ended, it may have read a header or a record that
    /// the device has in its cache alone. Were it lost with the power after what follows it was written, the device would
    /// have no checkpoint, or a record whose predecessor is missing.
    pub(super) fn begin(&mut self, now: Time, other_slot: Option<u32>) {
        self.erase = other_slot;
        self.is_believing = self.geometry.volatile_cache;
        if self.is_believing {
            self.flush(Purpose::BelievedFlush);
        } else {
            self.end_recovery(now);
        }
    }

    /// Writes the batch that ends recovery: what was not believed can't come back after it, and the checkpoint that was
    /// not chosen, if there is one, can't be chosen once its blocks are used for something else.
    fn end_recovery(&mut self, now: Time) {
        self.is_believing = false;
        // The erasing belongs to the batch, and goes first: so the batch sees that one flush is to cover both.
        let erase = self.erase.take();
        if let Some(place) = erase {
            self.write(Purpose::BatchWrite, place, vec![BlockBuf::zeroed(1).freeze()]);
        }
        self.send_marker(now, MarkerKind::Recovered);
        if erase.is_some() {
            self.batch.as_mut().expect("it was just sent").add_write();
        }
    }

    pub(super) fn submit(&mut self, now: Time, ticket: Ticket, request: StoreRequest) {
        match request {
            StoreRequest::Read { group, layer, range } => self.submit_read(ticket, group, layer, range),
            StoreRequest::Collect {
                group,
                from,
                to,
                above,
                runs_max,
            } => {
                let request = CollectRequest {
                    group,
                    from,
                    to,
                    above,
                    runs_max,
                };
                self.submit_collect(ticket, request);
            }
            StoreRequest::Scrub { from, blocks_max } => self.submit_scrub(ticket, from, blocks_max),
            StoreRequest::Defragment { from } => self.submit_defragment(ticket, from),
            request => self.enqueue(now, ticket, request),
        }
        self.io.stir(now);
    }

    fn enqueue(&mut self, now: Time, ticket: Ticket, request: StoreRequest) {
        if let Some(error) = self.poisoned {
            return self.fail(ticket, StoreError::Poisoned(error));
        }
        if self.queue.len() >= self.limits.queued_requests_max {
            return self.fail(ticket, StoreError::Busy);
        }
        if let Err(error) = super::plan::check_request(&request) {
            return self.fail(ticket, error);
        }
        self.queue.push_back(Queued {
            ticket,
            since: now,
            request,
            waits_since_checkpoint: None,
        });
    }

    pub(super) fn handle_disk(&mut self, now: Time, done: DiskDone) {
        let purpose = self.in_flight.remove(&done.token.0);
        let purpose = purpose.unwrap_or_else(|| panic!("{:?} is not in flight", done.token));
        match purpose.kind() {
            Kind::CachedWrite => self.io.unflushed.write_ended(),
            Kind::Flush => self.io.unflushed.flush_ended(done.token.0, done.result.is_ok()),
            Kind::Other => {}
        }
        match purpose {
            Purpose::Read(read, piece) => self.read_done(read, piece, done.result),
            Purpose::ReadBlock(read, piece, block) => self.read_block_done(read, piece, block, done.result),
            Purpose::Load(read) => self.load_done(read, done.result),
            Purpose::Walk(Walker::Scrub, piece) => self.scrub_read_done(piece, done.result),
            Purpose::Mend => self.mend_done(done.result.is_ok()),
            Purpose::Walk(Walker::Mover, piece) => self.move_read_done(piece, done.result),
            purpose => match done.result {
                Ok(_) => self.write_done(now, purpose),
                Err(error) => self.poison(error),
            },
        }
        self.io.stir(now);
    }

    fn write_done(&mut self, now: Time, purpose: Purpose) {
        if self.poisoned.is_some() {
            return;
        }
        match purpose {
            Purpose::BatchWrite => self.batch_write_done(now),
            Purpose::BatchFlush | Purpose::DurableBatch => self.batch_durable(now),
            Purpose::BelievedFlush => self.end_recovery(now),
            Purpose::CheckpointWrite => self.checkpoint_write_done(),
            Purpose::CheckpointFlush => self.checkpoint_flushed(),
            Purpose::HeaderWrite => self.header_written(),
            Purpose::HeaderFlush => self.checkpoint_durable(),
            Purpose::ZeroAhead => self.zero_ahead_done(),
            Purpose::MendFlush => self.mends_durable(),
            Purpose::Mend => unreachable!("it may fail: it is handled before"),
            Purpose::MoveWrite => self.move_write_done(),
            Purpose::Read(..) | Purpose::ReadBlock(..) | Purpose::Load(_) | Purpose::Walk(..) => {
                unreachable!("reads are handled before")
            }
        }
    }

    /// Stops acknowledging, for good. Nothing is known any more about what the device holds of the writes that had not
    /// been flushed.
    fn poison(&mut self, error: DiskError) {
        if self.poisoned.is_some() {
            return;
        }
        self.poisoned = Some(error);
        self.confirm_at = None;
        self.checkpoint = None;
        let batch = self.batch.take();
        let waiting = batch.into_iter().flat_map(|batch| batch.tickets());
        let queued: Vec<Ticket> = waiting
            .chain(self.queue.drain(..).map(|queued| queued.ticket))
            .collect();
        for ticket in queued {
            self.fail(ticket, StoreError::Poisoned(error));
        }
        self.poison_move(error);
    }

    pub(super) fn fail(&mut self, ticket: Ticket, error: StoreError) {
        self.io.counters.no_space += u64::from(error == StoreError::NoSpace);
        self.io.reply(ticket, StoreReply::Failed(error));
    }

    pub(super) fn handle_timeout(&mut self, now: Time) {
        self.io.stir(now);
    }

    /// What is to be done next. What could begin is looked for when nothing else is left to be said: so all requests that
    /// come in one turn of the caller share a batch.
    pub(super) fn poll_action(&mut self) -> Option<StoreAction> {
        let action = self.io.pop();
        if action.is_some() {
            return action;
        }
        let now = self.io.stirred.take()?;
        self.pump(now);
        self.io.pop()
    }

    /// What is to be done or answered already, without looking for what could begin.
    pub(super) fn poll_ready(&mut self) -> Option<StoreAction> {
        self.io.pop()
    }

    pub(super) fn poll_timeout(&self) -> Option<Time> {
        self.confirm_at
    }

    pub(super) fn write(&mut self, purpose: Purpose, place: u32, buffers: Vec<Bytes>) {
        let token = self.io.write(place, buffers, false);
        self.in_flight.insert(token, purpose);
    }

    /// The one write of a batch, durable when it ends.
    pub(super) fn write_durably(&mut self, place: u32, buffers: Vec<Bytes>) {
        let token = self.io.write(place, buffers, true);
        self.in_flight.insert(token, Purpose::DurableBatch);
    }

    pub(super) fn flush(&mut self, purpose: Purpose) {
        let token = self.io.flush();
        self.in_flight.insert(token, purpose);
    }

    /// Does what can be done now.
    fn pump(&mut self, now: Time) {
        if self.claimed_twice.take().is_some() {
            self.poison(CONTRADICTION);
        }
        self.release_quarantine();
        if self.poisoned.is_some() {
            return self.evict();
        }
        if self.is_believing {
            return;
        }
        if self.batch.is_none() && self.opened {
            self.evict();
            self.consider_checkpoint();
            self.build_batch(now);
            if self.batch.is_none() && self.checkpoint_wanted() {
                self.consider_checkpoint();
            }
        }
        self.pump_checkpoint();
        self.pump_zero_ahead();
        self.pump_mends();
    }

    fn release_quarantine(&mut self) {
        let oldest = self.reads.oldest();
        self.space.reads_done(oldest);
    }

    /// Panics when something is counted twice or lost. Costs as much as the index is large: for tests.
    pub(super) fn check_invariants(&self) {
        self.catalog.check_invariants();
        self.space.check_invariants();
        self.check_move();
        let mut blocks = std::collections::BTreeMap::new();
        let mut own = |place: u32, key: &ChunkKey| {
            assert!(self.space.data.get(place), "block {place} of {key:?} is not in the map");
            let other = blocks.insert(place, *key);
            assert!(other.is_none(), "block {place} belongs to {key:?} and {other:?}");
        };
        // What a forgotten part of the index pointed to stays in the map until it is swept.
        let mut all_known = !self.catalog.orphans && self.catalog.leaves.len() == self.catalog.loaded.len();
        for (key, chunk) in &self.catalog.chunks {
            for page in chunk.pages.values() {
                match page {
                    Page::OnDisk(home) => own(home.place, key),
                    Page::Resident(page) => {
                        page.home.iter().for_each(|home| own(home.place, key));
                        let data = page.entries.iter().filter_map(super::entry::Entry::data_place);
                        data.for_each(|place| own(place, key));
                    }
                    Page::Uniform(_) | Page::Broken => {}
                }
                all_known &= !matches!(page, Page::OnDisk(_) | Page::Broken);
            }
        }
        let waiting = self.catalog.frozen.pages.len();
        let marked = (self.space.data_blocks + self.space.index_blocks) as usize;
        if all_known {
            assert_eq!(
                blocks.len() + waiting,
                marked,
                "blocks in the map that belong to nobody"
            );
        }
    }
}
