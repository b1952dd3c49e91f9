//! A store that is as simple as can be: what the protocol may expect of a device, without production's formats. Some seeds
//! run on it, cheaply; one that fails on production's store and not on this one points at the store.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::rc::Rc;

use bytes::Bytes;
use cairn_proto::block::{Apply, BlockState, Content, Cursor, Run};
use cairn_proto::buffer::BlockBuf;
use cairn_proto::disk::{DeviceBlock, DiskDone, DiskError, DiskOp, DiskToken};
use cairn_proto::ids::{ChunkIndex, CommitSeq, Generation, GroupId, Layer, VolumeId};
use cairn_proto::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;
use cairn_storage_node::host::{HeldReplica, Membership, ReplicaStore};
use cairn_storage_node::store::api::{DamagedBlock, ScrubState, WriteContent};
use cairn_storage_node::store::{StoreAction, StoreError, StoreReply, StoreRequest, Ticket};

use crate::rng::Rng;

type Place = (GroupId, ChunkIndex, Layer, u32);

/// Seals, and all the rest: each becomes durable in its order, and either may overtake the other. Nothing that a store
/// promises forbids that, so whoever needs a seal to be durable after older writes must wait for these.
const LANES: usize = 2;

/// What outlives the process.
#[derive(Debug, Default)]
pub struct Kept {
    seals: BTreeMap<VolumeId, Generation>,
    replicas: BTreeMap<GroupId, Membership>,
    blocks: BTreeMap<Place, (BlockState, Bytes)>,
    commit: u64,
    /// On its way to the device, by lane: a crash loses any of it.
    under_way: [Vec<StoreRequest>; LANES],
}

/// Requests that become durable together, one batch after the other.
#[derive(Default)]
struct Lane {
    queue: Vec<(Ticket, StoreRequest)>,
    batch: Option<(DiskToken, Vec<Ticket>, bool)>,
}

/// The store of one run of a node.
pub struct ModelStore {
    kept: Rc<RefCell<Kept>>,
    recovered: u64,
    lanes: [Lane; LANES],
    reads: BTreeMap<DiskToken, (Ticket, StoreRequest)>,
    next_token: u64,
    actions: VecDeque<StoreAction>,
}

impl ModelStore {
    /// Opens what an earlier run left.
    pub fn open(kept: Rc<RefCell<Kept>>, rng: &mut Rng) -> ModelStore {
        let recovered = {
            let kept = &mut *kept.borrow_mut();
            for request in std::mem::take(&mut kept.under_way).into_iter().flatten() {
                if rng.permille(500) {
                    kept.apply(request);
                    kept.commit += 1;
                }
            }
            kept.commit
        };
        ModelStore {
            kept,
            recovered,
            lanes: Default::default(),
            reads: BTreeMap::new(),
            next_token: 0,
            actions: VecDeque::new(),
        }
    }

    fn token(&mut self) -> DiskToken {
        self.next_token += 1;
        DiskToken(self.next_token)
    }

    fn reply(&mut self, ticket: Ticket, reply: StoreReply) {
        self.actions.push_back(StoreAction::Reply(ticket, reply));
    }

    fn begin_batch(&mut self, lane: usize) {
        if self.lanes[lane].batch.is_some() || self.lanes[lane].queue.is_empty() {
            return;
        }
        let token = self.token();
        let (tickets, requests) = std::mem::take(&mut self.lanes[lane].queue).into_iter().unzip();
        self.kept.borrow_mut().under_way[lane] = requests;
        self.lanes[lane].batch = Some((token, tickets, false));
        let op = DiskOp::Write {
            token,
            at: DeviceBlock(lane as u64),
            buffers: vec![BlockBuf::zeroed(1).freeze()],
            durable: false,
        };
        self.actions.push_back(StoreAction::Disk(op));
    }

    fn batch_done(&mut self, lane: usize) {
        let Some((token, tickets, flushed)) = self.lanes[lane].batch.take() else {
            return;
        };
        if !flushed {
            let op = DiskOp::Flush { token };
            self.actions.push_back(StoreAction::Disk(op));
            self.lanes[lane].batch = Some((token, tickets, true));
            return;
        }
        let commit = {
            let kept = &mut *self.kept.borrow_mut();
            std::mem::take(&mut kept.under_way[lane])
                .into_iter()
                .for_each(|request| kept.apply(request));
            kept.commit += 1;
            CommitSeq(kept.commit)
        };
        for ticket in tickets {
            let reply = StoreReply::Durable {
                commit,
                queue_us: 0,
                write_us: 0,
                flush_us: 0,
            };
            self.reply(ticket, reply);
        }
    }
}

impl Kept {
    fn apply(&mut self, request: StoreRequest) {
        match request {
            StoreRequest::Seal { volume, generation } => {
                let sealed = self.seals.entry(volume).or_default();
                *sealed = generation.max(*sealed);
            }
            StoreRequest::CreateReplica { group, role, epoch } => {
                let held = self.replicas.get(&group);
                if held.is_none_or(|held| held.epoch <= epoch) {
                    self.replicas.insert(group, Membership { role, epoch });
                }
            }
            StoreRequest::DropReplica { group, .. } => {
                self.replicas.remove(&group);
                self.blocks.retain(|place, _| place.0 != group);
            }
            StoreRequest::Write {
                group,
                layer,
                range,
                version,
                content,
            } => {
                for i in 0..range.count() {
                    let (content, bytes) = match &content {
                        WriteContent::Data { bytes, checksums } => {
                            let at = i as usize * BLOCK_BYTES;
                            (Content::Data(checksums[i as usize]), bytes.slice(at..at + BLOCK_BYTES))
                        }
                        WriteContent::Zero => (Content::Zero, Bytes::new()),
                        WriteContent::Discard => (Content::Absent, Bytes::new()),
                    };
                    let place = (group, range.chunk(), layer, range.start() + i);
                    self.put(place, BlockState { content, version }, bytes, Apply::IfNewer);
                }
            }
            StoreRequest::Copy {
                group,
                layer,
                range,
                blocks,
                bytes,
                apply,
            } => {
                let mut rest = bytes;
                for (block, at) in blocks.into_iter().zip(range.start()..) {
                    let content = match block.content {
                        Content::Data(_) => rest.split_to(BLOCK_BYTES),
                        _ => Bytes::new(),
                    };
                    let state = BlockState {
                        content: block.content,
                        version: block.version,
                    };
                    self.put((group, range.chunk(), layer, at), state, content, apply);
                }
            }
            StoreRequest::CopyHole {
                group,
                layer,
                range,
                block,
                apply,
            } => {
                let state = BlockState {
                    content: block.content,
                    version: block.version,
                };
                for at in range.start()..range.end() {
                    self.put((group, range.chunk(), layer, at), state, Bytes::new(), apply);
                }
            }
            StoreRequest::DeleteLayer { group, layer } => {
                self.blocks.retain(|place, _| (place.0, place.2) != (group, layer));
            }
            StoreRequest::RaiseFloor {
                group,
                layer,
                chunk,
                version,
            } => {
                for block in 0..BLOCKS_PER_CHUNK {
                    let held = self.blocks.entry((group, chunk, layer, block));
                    let (state, _) = held.or_insert((BlockState::ABSENT, Bytes::new()));
                    if state.content == Content::Absent {
                        state.version = state.version.max(version);
                    }
                }
            }
            StoreRequest::SaveScrub { .. } => {}
            StoreRequest::Read { .. }
            | StoreRequest::Collect { .. }
            | StoreRequest::Scrub { .. }
            | StoreRequest::Defragment { .. } => {
                unreachable!("they change nothing")
            }
        }
    }

    fn put(&mut self, place: Place, state: BlockState, bytes: Bytes, apply: Apply) {
        let held = self.blocks.get(&place).map_or(BlockState::ABSENT, |(state, _)| *state);
        if apply.applies(held.version, state.version) {
            self.blocks.insert(place, (state, bytes));
        }
    }

    fn read(&self, group: GroupId, layer: Layer, range: BlockRange) -> StoreReply {
        let mut reply = (Vec::new(), Vec::new());
        for block in range.start()..range.end() {
            match self.blocks.get(&(group, range.chunk(), layer, block)) {
                None => reply.0.push(BlockState::ABSENT),
                Some((state, bytes)) => {
                    reply.0.push(*state);
                    if matches!(state.content, Content::Data(_)) {
                        reply.1.push(bytes.clone());
                    }
                }
            }
        }
        StoreReply::Read {
            blocks: reply.0,
            bytes: reply.1,
        }
    }

    fn collect(&self, request: &StoreRequest) -> StoreReply {
        let StoreRequest::Collect {
            group,
            from,
            to,
            above,
            runs_max,
        } = *request
        else {
            unreachable!("the caller matched it");
        };
        let start = Bound::Included((group, from.chunk, from.layer, from.block));
        let mut runs: Vec<Run> = Vec::new();
        let end = Bound::Excluded((group, to.chunk, to.layer, to.block));
        if to <= from {
            return StoreReply::Collected { runs, next: None };
        }
        for ((_, chunk, layer, block), (state, _)) in self.blocks.range((start, end)) {
            if state.version <= above {
                continue;
            }
            let same_kind = |run: &Run| {
                std::mem::discriminant(&run.state.content) == std::mem::discriminant(&state.content)
                    && run.state.version == state.version
            };
            if let Some(run) = runs.last_mut()
                && same_kind(run)
                && (run.range.chunk(), run.layer, run.range.end()) == (*chunk, *layer, *block)
            {
                let longer = BlockRange::new(*chunk, run.range.start(), run.range.count() + 1);
                run.range = longer.expect("the block is in the chunk");
                continue;
            }
            if runs.len() == runs_max {
                let next = Cursor {
                    chunk: *chunk,
                    layer: *layer,
                    block: *block,
                };
                return StoreReply::Collected { runs, next: Some(next) };
            }
            runs.push(Run {
                layer: *layer,
                range: BlockRange::new(*chunk, *block, 1).expect("one block"),
                state: *state,
            });
        }
        StoreReply::Collected { runs, next: None }
    }

    /// The highest generation of a volume that is kept.
    pub fn seal_of(&self, volume: VolumeId) -> Generation {
        self.seals.get(&volume).copied().unwrap_or_default()
    }

    /// Answers a question at once, for whoever looks at what is kept.
    pub fn look(&self, request: &StoreRequest) -> StoreReply {
        let group = match request {
            StoreRequest::Read { group, .. } | StoreRequest::Collect { group, .. } => *group,
            other => unreachable!("{other:?} is no question"),
        };
        if !self.replicas.contains_key(&group) {
            return StoreReply::Failed(StoreError::NoReplica);
        }
        match request {
            StoreRequest::Read { layer, range, .. } => self.read(group, *layer, *range),
            _ => self.collect(request),
        }
    }
}

impl ReplicaStore for ModelStore {
    fn submit(&mut self, _now: Time, ticket: Ticket, request: StoreRequest) {
        match &request {
            StoreRequest::Read { .. } | StoreRequest::Collect { .. } => {
                let token = self.token();
                self.reads.insert(token, (ticket, request));
                let op = DiskOp::Read {
                    token,
                    at: DeviceBlock(0),
                    blocks: 1,
                };
                self.actions.push_back(StoreAction::Disk(op));
            }
            StoreRequest::Write { group, .. }
            | StoreRequest::Copy { group, .. }
            | StoreRequest::CopyHole { group, .. }
                if !self.kept.borrow().replicas.contains_key(group) =>
            {
                self.reply(ticket, StoreReply::Failed(StoreError::NoReplica));
            }
            StoreRequest::Seal { .. } => self.lanes[1].queue.push((ticket, request)),
            _ => self.lanes[0].queue.push((ticket, request)),
        }
    }

    fn disk_done(&mut self, _now: Time, done: DiskDone) {
        if let Some((ticket, request)) = self.reads.remove(&done.token) {
            let reply = self.kept.borrow().look(&request);
            self.reply(ticket, reply);
            return;
        }
        let of = |lane: &Lane| lane.batch.as_ref().is_some_and(|(token, ..)| *token == done.token);
        if let Some(lane) = self.lanes.iter().position(of) {
            self.batch_done(lane);
        }
    }

    fn handle_timeout(&mut self, _now: Time) {}

    fn poll_action(&mut self) -> Option<StoreAction> {
        if self.actions.is_empty() {
            (0..LANES).for_each(|lane| self.begin_batch(lane));
        }
        self.actions.pop_front()
    }

    fn poll_timeout(&self) -> Option<Time> {
        None
    }

    fn seals(&self) -> Vec<(VolumeId, Generation)> {
        let kept = self.kept.borrow();
        kept.seals
            .iter()
            .map(|(volume, generation)| (*volume, *generation))
            .collect()
    }

    fn membership(&self, group: GroupId) -> Option<Membership> {
        self.kept.borrow().replicas.get(&group).copied()
    }

    fn replicas(&self) -> Vec<HeldReplica> {
        let kept = self.kept.borrow();
        let held = |(group, membership): (&GroupId, &Membership)| HeldReplica {
            group: *group,
            epoch: membership.epoch,
        };
        kept.replicas.iter().map(held).collect()
    }

    fn recovered(&self) -> CommitSeq {
        CommitSeq(self.recovered)
    }

    fn commit(&self) -> CommitSeq {
        CommitSeq(self.kept.borrow().commit)
    }

    fn capacity_blocks(&self) -> u64 {
        1 << 20
    }

    fn used_blocks(&self) -> u64 {
        self.kept.borrow().blocks.len() as u64
    }

    fn failed(&self) -> Option<DiskError> {
        None
    }

    fn scrub_state(&self) -> ScrubState {
        ScrubState::default()
    }

    fn data_blocks(&self) -> u64 {
        self.used_blocks()
    }

    fn damaged_blocks(&self) -> u64 {
        0
    }

    fn mended_blocks(&self) -> u64 {
        0
    }

    fn damage(&self) -> impl Iterator<Item = (GroupId, Layer, BlockRange)> + '_ {
        std::iter::empty()
    }

    fn is_damaged(&self, _block: &DamagedBlock) -> bool {
        false
    }
}
