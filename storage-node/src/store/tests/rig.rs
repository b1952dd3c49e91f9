//! A store on a device in memory, driven one operation at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::buffer::BlockBuf;
use cairn_proto::checksum::{ChecksumAlgorithm, range_checksums};
use cairn_proto::disk::{DeviceBlock, DiskGeometry, DiskOp, DiskToken};
use cairn_proto::ids::{ChunkIndex, ClusterId, DeviceUuid, Generation, GroupId, GroupIndex, Incarnation, Layer, Seq};
use cairn_proto::ids::{Version, VolumeId};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;

use crate::store::api::{StoreAction, StoreReply, StoreRequest, Ticket, WriteContent};
use crate::store::{FormatParams, OpenExpectation, Store, StoreLimits, StoreState};
use crate::testing::{Fault, MemoryDevice, Prng};

pub(crate) const GROUP: GroupId = GroupId {
    volume: VolumeId(7),
    index: GroupIndex(1),
};

pub(crate) struct Rig {
    pub(crate) device: MemoryDevice,
    pub(crate) store: Store,
    pub(crate) now: Time,
    pub(crate) prng: Prng,
    pub(crate) replies: BTreeMap<u64, StoreReply>,
    pub(crate) next_ticket: u64,
    /// Operations completed since it was made.
    pub(crate) completed: u64,
}

pub(crate) fn params() -> FormatParams {
    FormatParams {
        cluster: ClusterId([1; 16]),
        device: DeviceUuid([2; 16]),
        incarnation: Incarnation(3),
        checksum: ChecksumAlgorithm::Crc32,
    }
}

pub(crate) fn formatted(geometry: DiskGeometry) -> MemoryDevice {
    let mut device = MemoryDevice::new(geometry);
    let mut formatter = Store::format(params(), geometry).unwrap();
    loop {
        while let Some(op) = formatter.poll_op() {
            device.submit(op);
        }
        let Some(token) = device.in_flight().map(token).next() else {
            break;
        };
        let done = device.complete(token);
        formatter.handle_disk(done);
    }
    formatter.result().expect("it is done").unwrap();
    device
}

fn token(op: &DiskOp) -> DiskToken {
    let (DiskOp::Read { token, .. } | DiskOp::Write { token, .. } | DiskOp::Flush { token }) = op;
    *token
}

impl Rig {
    pub(crate) fn new(blocks: u64, limits: StoreLimits, seed: u64) -> Rig {
        Rig::on(blocks, true, limits, seed)
    }

    pub(crate) fn on(blocks: u64, volatile_cache: bool, limits: StoreLimits, seed: u64) -> Rig {
        let geometry = DiskGeometry { blocks, volatile_cache };
        let mut rig = Rig::opening(formatted(geometry), limits, seed);
        rig.settle();
        assert_eq!(rig.store.state(), StoreState::Open);
        rig
    }

    pub(crate) fn opening(device: MemoryDevice, limits: StoreLimits, seed: u64) -> Rig {
        let geometry = device.geometry();
        let mut rig = Rig {
            device,
            store: Store::open(OpenExpectation::default(), geometry, limits, Time::ZERO),
            now: Time::ZERO,
            prng: Prng::new(seed),
            replies: BTreeMap::new(),
            next_ticket: 0,
            completed: 0,
        };
        rig.take_actions();
        rig
    }

    /// Opens the device anew, after a power cut or not.
    pub(crate) fn reopen(mut self, power_cut: bool) -> Rig {
        if power_cut {
            self.device.power_cut(&mut self.prng);
        } else {
            self.device.process_killed(&mut self.prng);
        }
        let seed = self.prng.below(u64::MAX);
        Rig::opening(self.device, self.store.limits().clone(), seed)
    }

    pub(crate) fn submit(&mut self, request: StoreRequest) -> u64 {
        self.next_ticket += 1;
        self.store.submit(self.now, Ticket(self.next_ticket), request);
        self.take_actions();
        self.next_ticket
    }

    pub(crate) fn take_actions(&mut self) {
        while let Some(action) = self.store.poll_action() {
            match action {
                StoreAction::Disk(op) => self.device.submit(op),
                StoreAction::Reply(ticket, reply) => {
                    let other = self.replies.insert(ticket.0, reply);
                    assert!(other.is_none(), "{ticket:?} was answered twice");
                }
            }
        }
    }

    /// Completes one operation in flight, any of them; false if there is none.
    pub(crate) fn step(&mut self) -> bool {
        self.step_with(|_| None)
    }

    /// The same; some operations fail.
    pub(crate) fn step_with(&mut self, fault: impl Fn(&DiskOp) -> Option<Fault>) -> bool {
        let ops: Vec<DiskOp> = self.device.in_flight().cloned().collect();
        if ops.is_empty() {
            return false;
        }
        let op = &ops[self.prng.below(ops.len() as u64) as usize];
        let token = token(op);
        let done = match fault(op) {
            None => self.device.complete(token),
            Some(fault) => self.device.complete_with(token, fault, &mut self.prng),
        };
        self.completed += 1;
        self.now += Duration::from_micros(50);
        self.store.handle_disk(self.now, done);
        self.take_actions();
        true
    }

    /// Completes all operations, and those that follow.
    pub(crate) fn settle(&mut self) {
        while self.step() {}
    }

    /// The block of the device that has this content, if there is one.
    pub(crate) fn find(&self, content: &[u8]) -> Option<DeviceBlock> {
        let blocks = (0..self.device.geometry().blocks).map(DeviceBlock);
        blocks.into_iter().find(|at| self.device.peek(*at)[..] == *content)
    }

    /// Lets the store's timer run out.
    pub(crate) fn pass_time(&mut self) {
        if let Some(at) = self.store.poll_timeout() {
            self.now = self.now.max(at);
            self.store.handle_timeout(self.now);
            self.take_actions();
        }
        self.settle();
    }

    pub(crate) fn call(&mut self, request: StoreRequest) -> StoreReply {
        let ticket = self.submit(request);
        self.settle();
        self.replies.remove(&ticket).expect("an idle store has answered")
    }

    pub(crate) fn create(&mut self) {
        let reply = self.call(StoreRequest::CreateReplica { group: GROUP, role: 1 });
        assert!(matches!(reply, StoreReply::Durable { .. }), "{reply:?}");
    }

    pub(crate) fn write(&mut self, chunk: u32, start: u32, blocks: u32, seq: u64) -> StoreReply {
        self.call(write_request(chunk, start, blocks, seq))
    }

    pub(crate) fn read(&mut self, chunk: u32, start: u32, blocks: u32) -> StoreReply {
        self.call(read_request(chunk, start, blocks))
    }
}

pub(crate) fn version(seq: u64) -> Version {
    Version::new(Generation::new(1).unwrap(), Seq::new(seq).unwrap())
}

pub(crate) fn range(chunk: u32, start: u32, blocks: u32) -> BlockRange {
    BlockRange::new(ChunkIndex(chunk), start, blocks).unwrap()
}

/// A block's content names the block and the version that wrote it.
pub(crate) fn content(volume_block: u64, version: Version) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    block.extend_from_slice(&volume_block.to_le_bytes());
    block.extend_from_slice(&version.to_bits().to_le_bytes());
    while block.len() < BLOCK_BYTES {
        block.extend_from_within(..);
    }
    block
}

pub(crate) fn contents(range: BlockRange, version: Version) -> Bytes {
    let mut buf = BlockBuf::zeroed(range.count() as usize);
    for (i, block) in (0..).zip(buf.chunks_exact_mut(BLOCK_BYTES)) {
        block.copy_from_slice(&content(range.volume_block(i), version));
    }
    buf.freeze()
}

pub(crate) fn write_request(chunk: u32, start: u32, blocks: u32, seq: u64) -> StoreRequest {
    let range = range(chunk, start, blocks);
    let bytes = contents(range, version(seq));
    StoreRequest::Write {
        group: GROUP,
        layer: Layer(0),
        range,
        version: version(seq),
        content: WriteContent::Data {
            checksums: range_checksums(GROUP.volume, range, &bytes),
            bytes,
        },
    }
}

pub(crate) fn hole_request(chunk: u32, start: u32, blocks: u32, seq: u64, content: WriteContent) -> StoreRequest {
    StoreRequest::Write {
        group: GROUP,
        layer: Layer(0),
        range: range(chunk, start, blocks),
        version: version(seq),
        content,
    }
}

pub(crate) fn read_request(chunk: u32, start: u32, blocks: u32) -> StoreRequest {
    StoreRequest::Read {
        group: GROUP,
        layer: Layer(0),
        range: range(chunk, start, blocks),
    }
}
