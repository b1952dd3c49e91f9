//! The production store on a device, driven as the device's thread does it: completions in, actions out, one submit.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cairn_proto::block::Content as BlockContent;
use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::checksum::range_checksums;
use cairn_proto::disk::DiskDone;
use cairn_proto::ids::{
    ChunkIndex, ClusterId, DeviceUuid, Epoch, Generation, GroupId, GroupIndex, Incarnation, Layer, Seq, Version,
    VolumeId,
};
use cairn_proto::limits::BLOCKS_PER_CHUNK;
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;
use cairn_storage_node::store::api::WriteContent;
use cairn_storage_node::store::{
    FormatParams, Store, StoreAction, StoreLimits, StoreReply, StoreRequest, StoreState, Ticket,
};

use super::content::Content;
use super::disk::{Disk, NullDevice, written};
use super::work::{Target, Work};

/// The volume that is written.
pub const VOLUME: VolumeId = VolumeId(7);
/// Its group.
pub const GROUP: GroupId = GroupId {
    volume: VOLUME,
    index: GroupIndex(0),
};
/// The ticket of requests that are no part of a load.
const ALONE: Ticket = Ticket(u64::MAX);
const PATIENCE: Duration = Duration::from_secs(30);

/// How a bench formats a device.
pub fn format_params() -> FormatParams {
    FormatParams {
        cluster: ClusterId([1; 16]),
        device: DeviceUuid([2; 16]),
        incarnation: Incarnation(1),
        checksum: ChecksumAlgorithm::Crc32,
    }
}

/// A store on a device.
pub struct Driven<D> {
    /// The device.
    pub disk: D,
    /// The store.
    pub store: Store,
    content: Content,
    seq: u64,
    device_bytes: u64,
    replies: Vec<(Ticket, StoreReply)>,
}

impl<D: Disk> Driven<D> {
    /// Drives a store that is open on this device.
    pub fn new(disk: D, store: Store) -> Driven<D> {
        Driven {
            disk,
            store,
            content: Content::new(),
            seq: 1,
            device_bytes: 0,
            replies: Vec::new(),
        }
    }

    /// Makes the replica that loads write to.
    ///
    /// # Errors
    /// The store refused, in words.
    pub fn create_replica(&mut self) -> Result<(), String> {
        let create = StoreRequest::CreateReplica {
            group: GROUP,
            role: 1,
            epoch: Epoch(1),
        };
        self.alone(create).map(|_| ())
    }

    /// Goes on with a store that was written by another of these: versions must be higher.
    pub fn go_on(&mut self) {
        self.seq = self.store.commit_seq().0 << 16;
    }

    /// Does one request while nothing else is in flight.
    ///
    /// # Errors
    /// The store refused, in words.
    pub fn alone(&mut self, request: StoreRequest) -> Result<StoreReply, String> {
        self.store.submit(now(), ALONE, request);
        loop {
            self.turn()?;
            match self.replies.pop() {
                Some((_, StoreReply::Failed(error))) => return Err(error.to_string()),
                Some((_, reply)) => return Ok(reply),
                None => {}
            }
        }
    }

    /// Gives the store back its device when nothing is in flight, as a kill would: what the store still wanted is lost.
    ///
    /// # Errors
    /// In words.
    pub fn kill(mut self) -> Result<D, String> {
        self.disk.settle()?;
        Ok(self.disk)
    }

    /// Does what the store wants, waits for the device, tells the store.
    fn turn(&mut self) -> Result<(), String> {
        self.act();
        if !self.replies.is_empty() {
            return Ok(());
        }
        let at = now();
        let timer = self.store.poll_timeout().map(|until| until.saturating_since(at));
        self.disk.wait(timer.unwrap_or(PATIENCE).min(PATIENCE))?;
        let at = now();
        while let Some(done) = self.disk.completion() {
            self.store.handle_disk(at, done);
        }
        if self.store.poll_timeout().is_some_and(|until| until <= at) {
            self.store.handle_timeout(at);
        }
        // Answers first: what the load asks for in their place shares the next commit.
        while let Some(action) = self.store.poll_ready() {
            self.do_action(action);
        }
        Ok(())
    }

    fn act(&mut self) {
        while let Some(action) = self.store.poll_action() {
            self.do_action(action);
        }
    }

    fn do_action(&mut self, action: StoreAction) {
        match action {
            StoreAction::Disk(op) => {
                self.device_bytes += written(&op);
                self.disk.submit(op);
            }
            StoreAction::Reply(ticket, reply) => self.replies.push((ticket, reply)),
        }
    }

    fn request(&mut self, work: Work) -> StoreRequest {
        let chunk = ChunkIndex((work.block / u64::from(BLOCKS_PER_CHUNK)) as u32);
        let start = (work.block % u64::from(BLOCKS_PER_CHUNK)) as u32;
        let range = BlockRange::new(chunk, start, work.blocks).expect("operations divide chunks");
        let (group, layer) = (GROUP, Layer(0));
        if !work.write {
            return StoreRequest::Read { group, layer, range };
        }
        self.seq += 1;
        let bytes: Bytes = self.content.next(work.blocks);
        let checksums = range_checksums(VOLUME, range, &bytes);
        StoreRequest::Write {
            group,
            layer,
            range,
            version: version(self.seq),
            content: WriteContent::Data { bytes, checksums },
        }
    }

    fn check(reply: &StoreReply) -> Result<(), String> {
        match reply {
            StoreReply::Failed(error) => Err(error.to_string()),
            StoreReply::Read { blocks, .. } => {
                let bad = blocks.iter().find(|b| !matches!(b.content, BlockContent::Data(_)));
                bad.map_or(Ok(()), |block| {
                    Err(format!("a block that was written reads as {block:?}"))
                })
            }
            _ => Ok(()),
        }
    }
}

/// Time since the first call.
pub(crate) fn now() -> Time {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed();
    Time::from_nanos(elapsed.as_nanos() as u64)
}

fn version(seq: u64) -> Version {
    let generation = Generation::new(1).expect("not zero");
    Version::new(generation, Seq::new(seq).expect("a bench writes less than 2^40 times"))
}

/// A fresh store on a device that does nothing, with its replica.
///
/// # Errors
/// In words.
pub fn on_null_device(blocks: u64, limits: StoreLimits) -> Result<Driven<NullDevice>, String> {
    let (disk, store) = open_on_null_device(blocks, limits, format_params())?;
    let mut driven = Driven::new(disk, store);
    driven.content = Content::zeroes();
    driven.create_replica()?;
    Ok(driven)
}

/// A fresh store on a device that does nothing.
///
/// # Errors
/// In words.
pub fn open_on_null_device(
    blocks: u64,
    limits: StoreLimits,
    params: FormatParams,
) -> Result<(NullDevice, Store), String> {
    let mut disk = NullDevice::new(blocks);
    let mut memory = cairn_storage_node::testing::MemoryDevice::new(disk.geometry());
    let mut formatter = Store::format(params, disk.geometry()).map_err(|error| error.to_string())?;
    while formatter.result().is_none() {
        while let Some(op) = formatter.poll_op() {
            memory.submit(op);
        }
        memory_done(&mut memory)
            .into_iter()
            .for_each(|done| formatter.handle_disk(done));
    }
    // Recovery reads what the format wrote; from then on nothing is read back.
    let mut store = Store::open(Default::default(), disk.geometry(), limits, now());
    while store.state() != StoreState::Open {
        while let Some(action) = store.poll_action() {
            let StoreAction::Disk(op) = action else { continue };
            memory.submit(op);
        }
        for done in memory_done(&mut memory) {
            store.handle_disk(now(), done);
        }
        if let StoreState::Refused(error) = store.state() {
            return Err(error.to_string());
        }
    }
    disk.settle()?;
    Ok((disk, store))
}

fn memory_done(memory: &mut cairn_storage_node::testing::MemoryDevice) -> Vec<DiskDone> {
    let tokens: Vec<_> = memory.in_flight().map(op_token).collect();
    tokens.into_iter().map(|token| memory.complete(token)).collect()
}

fn op_token(op: &cairn_proto::disk::DiskOp) -> cairn_proto::disk::DiskToken {
    use cairn_proto::disk::DiskOp;
    match op {
        DiskOp::Read { token, .. } | DiskOp::Write { token, .. } | DiskOp::Flush { token } => *token,
    }
}

impl<D: Disk> Target for Driven<D> {
    fn submit(&mut self, id: usize, work: Work) {
        let request = self.request(work);
        self.store.submit(now(), Ticket(id as u64), request);
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), String> {
        while done.is_empty() {
            self.turn()?;
            for (ticket, reply) in std::mem::take(&mut self.replies) {
                Self::check(&reply)?;
                done.push(ticket.0 as usize);
            }
        }
        Ok(())
    }

    fn device_bytes(&self) -> u64 {
        self.device_bytes
    }
}
