//! A store that does nothing by itself: the test says when each request ends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::disk::{DiskDone, DiskError};
use cairn_proto::ids::*;
use cairn_proto::message::*;
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;

use crate::host::*;
use crate::store::api::{
    BlockState, DamagedBlock, ScrubState, StoreAction, StoreError, StoreReply, StoreRequest, Ticket,
};

pub(super) const CLUSTER: ClusterId = ClusterId([3; 16]);
pub(super) const KEY: ClusterKey = ClusterKey([5; 32]);
pub(super) const VOLUME: VolumeId = VolumeId(7);
pub(super) const DEVICE: DeviceId = DeviceId {
    uuid: DeviceUuid([9; 16]),
    incarnation: Incarnation(4),
};

#[derive(Default)]
pub(super) struct HeldStore {
    pub(super) asked: BTreeMap<Ticket, StoreRequest>,
    pub(super) seals: BTreeMap<VolumeId, Generation>,
    pub(super) replicas: BTreeMap<GroupId, Membership>,
    pub(super) commit: u64,
    pub(super) failed: Option<DiskError>,
    pub(super) scrub: ScrubState,
    pub(super) damaged: Vec<(GroupId, Layer, BlockRange)>,
    pub(super) index_lost: bool,
    pub(super) actions: VecDeque<StoreAction>,
}

impl ReplicaStore for HeldStore {
    fn submit(&mut self, _now: Time, ticket: Ticket, request: StoreRequest) {
        assert!(self.asked.insert(ticket, request).is_none(), "{ticket:?} is used twice");
    }
    fn disk_done(&mut self, _now: Time, _done: DiskDone) {}
    fn handle_timeout(&mut self, _now: Time) {}
    fn poll_action(&mut self) -> Option<StoreAction> {
        self.actions.pop_front()
    }
    fn poll_timeout(&self) -> Option<Time> {
        None
    }
    fn seals(&self) -> Vec<(VolumeId, Generation)> {
        self.seals
            .iter()
            .map(|(volume, generation)| (*volume, *generation))
            .collect()
    }
    fn membership(&self, group: GroupId) -> Option<Membership> {
        self.replicas.get(&group).copied()
    }
    fn replicas(&self) -> Vec<HeldReplica> {
        let held = |(group, membership): (&GroupId, &Membership)| HeldReplica {
            group: *group,
            epoch: membership.epoch,
        };
        self.replicas.iter().map(held).collect()
    }
    fn recovered(&self) -> CommitSeq {
        CommitSeq(1)
    }
    fn commit(&self) -> CommitSeq {
        CommitSeq(self.commit)
    }
    fn capacity_blocks(&self) -> u64 {
        1000
    }
    fn used_blocks(&self) -> u64 {
        0
    }
    fn failed(&self) -> Option<DiskError> {
        self.failed
    }
    fn scrub_state(&self) -> ScrubState {
        self.scrub
    }
    fn data_blocks(&self) -> u64 {
        1000
    }
    fn damaged_blocks(&self) -> u64 {
        self.damaged.len() as u64
    }
    fn mended_blocks(&self) -> u64 {
        0
    }
    fn damage(&self) -> impl Iterator<Item = (GroupId, Layer, BlockRange)> + '_ {
        self.damaged.iter().copied()
    }
    fn is_damaged(&self, _block: &DamagedBlock) -> bool {
        true
    }
    fn is_index_lost(&self, _group: GroupId) -> bool {
        self.index_lost
    }
}

impl HeldStore {
    /// Ends a request well.
    fn finish(&mut self, ticket: Ticket) {
        let request = self.asked.remove(&ticket).expect("it was asked");
        let reply = match request {
            StoreRequest::Read { range, .. } => StoreReply::Read {
                blocks: vec![BlockState::ABSENT; range.count() as usize],
                bytes: Vec::new(),
            },
            StoreRequest::Collect { .. } => StoreReply::Collected {
                runs: Vec::new(),
                next: None,
            },
            change => {
                self.commit += 1;
                match change {
                    StoreRequest::Seal { volume, generation } => {
                        let sealed = self.seals.entry(volume).or_default();
                        *sealed = generation.max(*sealed);
                    }
                    StoreRequest::CreateReplica { group, role, epoch } => {
                        self.replicas.insert(group, Membership { role, epoch });
                    }
                    StoreRequest::DropReplica { group, .. } => {
                        self.replicas.remove(&group);
                    }
                    _ => {}
                }
                StoreReply::Durable {
                    commit: CommitSeq(self.commit),
                    queue_us: 0,
                    write_us: 0,
                    flush_us: 0,
                }
            }
        };
        self.actions.push_back(StoreAction::Reply(ticket, reply));
    }
}

/// A host on a store that is held, with its clock.
pub(super) struct World {
    pub(super) host: DeviceHost<HeldStore>,
    pub(super) now: Time,
    next_conn: u64,
    next_correlation: u64,
    sent: BTreeMap<ConnId, VecDeque<Envelope>>,
    pub(super) closed: BTreeMap<ConnId, CloseReason>,
    /// Other devices that are to be connected to.
    pub(super) reached: Vec<(PeerId, String)>,
    pub(super) to_peers: BTreeMap<PeerId, VecDeque<Envelope>>,
    pub(super) closed_peers: BTreeSet<PeerId>,
}

pub(super) fn config() -> HostConfig {
    HostConfig::new(CLUSTER, KEY, DEVICE)
}

pub(super) fn holder(generation: u32) -> Holder {
    Holder {
        volume: VOLUME,
        generation: Generation::new(generation).unwrap(),
    }
}

pub(super) fn capability(generation: u32) -> Capability {
    let holder = holder(generation);
    Capability::grant(&KEY, CLUSTER, VOLUME, holder.generation, Rights::Write)
}

pub(super) fn hello() -> Hello {
    Hello {
        version_min: Hello::VERSION,
        version_max: Hello::VERSION,
        purpose: Purpose::Guest,
        features: 0,
        cluster: CLUSTER,
        device: DEVICE,
        recovered: CommitSeq(0),
        commit: CommitSeq(0),
        client: ClientId([1; 16]),
        limits: PeerLimits::default(),
        capability: None,
    }
}

pub(super) fn range(start: u32, count: u32) -> BlockRange {
    BlockRange::new(ChunkIndex(0), start, count).unwrap()
}

pub(super) fn write(generation: u32, seq: u64, data: WriteData) -> Message {
    let holder = holder(generation);
    let count = match &data {
        WriteData::Data { checksums, .. } => checksums.len() as u32,
        _ => 1,
    };
    Message::Write(Write {
        holder,
        group: GroupIndex(0),
        layer: Layer(0),
        range: range(5, count),
        version: Version::new(holder.generation, Seq::new(seq).unwrap()),
        stable: Version::ZERO,
        data,
    })
}

pub(super) fn read(generation: u32) -> Message {
    Message::Read(Read {
        holder: holder(generation),
        group: GroupIndex(0),
        layer: Layer(0),
        range: range(5, 1),
    })
}

pub(super) fn join(generation: u32) -> Message {
    Message::Join(join_of(generation))
}

pub(super) fn join_of(generation: u32) -> Join {
    Join {
        holder: holder(generation),
        group: GroupIndex(0),
        role: ReplicaRole::InSync,
        epoch: Epoch(1),
    }
}

pub(super) fn confirm(generation: u32) -> Message {
    let holder = holder(generation);
    Message::Confirm(Confirm { holder })
}

pub(super) fn release(generation: u32) -> Message {
    let holder = holder(generation);
    Message::Release(Release { holder })
}

pub(super) fn seal(generation: u32) -> Message {
    let capability = capability(generation);
    Message::Seal(Seal { capability })
}

impl World {
    pub(super) fn new() -> World {
        World::with(config(), HeldStore::default())
    }

    pub(super) fn with(config: HostConfig, store: HeldStore) -> World {
        let now = Time::from_nanos(1_000_000_000);
        World {
            host: DeviceHost::new(now, config, store),
            now,
            next_conn: 0,
            next_correlation: 0,
            sent: BTreeMap::new(),
            closed: BTreeMap::new(),
            reached: Vec::new(),
            to_peers: BTreeMap::new(),
            closed_peers: BTreeSet::new(),
        }
    }

    fn settle(&mut self) {
        while let Some(action) = self.host.poll_action() {
            match action {
                HostAction::Send { conn, envelope } => {
                    assert!(!self.closed.contains_key(&conn), "{conn} is closed");
                    self.sent.entry(conn).or_default().push_back(envelope);
                }
                HostAction::Close { conn, reason } => {
                    self.closed.insert(conn, reason);
                }
                HostAction::Reach { peer, address } => self.reached.push((peer, address)),
                HostAction::SendPeer { peer, envelope } => {
                    self.to_peers.entry(peer).or_default().push_back(envelope);
                }
                HostAction::ClosePeer { peer } => {
                    self.closed_peers.insert(peer);
                }
                HostAction::Disk(op) => panic!("a held store has no disk: {op:?}"),
            }
        }
    }

    pub(super) fn event(&mut self, event: HostEvent) {
        self.host.handle(self.now, event);
        self.settle();
    }

    pub(super) fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.host.handle_timeout(self.now);
        self.settle();
    }

    pub(super) fn connect(&mut self) -> ConnId {
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        self.event(HostEvent::Connected { conn });
        conn
    }

    /// Connected, with its hello answered.
    pub(super) fn peer(&mut self) -> ConnId {
        let conn = self.connect();
        assert!(matches!(
            self.ask(conn, Message::Hello(hello())),
            Some(Message::Hello(_))
        ));
        conn
    }

    pub(super) fn send(&mut self, conn: ConnId, message: Message) {
        self.next_correlation += 1;
        let envelope = Envelope::new(Correlation(self.next_correlation), message);
        self.event(HostEvent::Frame { conn, envelope });
    }

    /// The next answer on a connection, with its read grant.
    pub(super) fn answer(&mut self, conn: ConnId) -> Option<(Message, bool)> {
        let envelope = self.sent.get_mut(&conn)?.pop_front()?;
        Some((envelope.message, envelope.flags.grant))
    }

    /// Sends, and takes the answer if there is one at once.
    pub(super) fn ask(&mut self, conn: ConnId, message: Message) -> Option<Message> {
        self.send(conn, message);
        self.answer(conn).map(|(message, _)| message)
    }

    /// Ends everything that the store was asked, in order.
    pub(super) fn store_ends(&mut self) {
        while let Some(ticket) = self.host.store.asked.keys().next().copied() {
            self.host.store.finish(ticket);
            self.settle();
        }
    }

    /// Ends what matches, if there is any.
    pub(super) fn store_ends_if(&mut self, which: impl Fn(&StoreRequest) -> bool) {
        if self.host.store.asked.values().any(&which) {
            self.store_ends_only(which);
        }
    }

    /// Ends what matches.
    pub(super) fn store_ends_only(&mut self, which: impl Fn(&StoreRequest) -> bool) {
        let asked = self.host.store.asked.iter();
        let tickets: Vec<_> = asked.filter(|(_, r)| which(r)).map(|(ticket, _)| *ticket).collect();
        assert!(!tickets.is_empty(), "the store was not asked that");
        for ticket in tickets {
            self.host.store.finish(ticket);
            self.settle();
        }
    }

    /// Ends one request with this answer.
    pub(super) fn store_answers(&mut self, ticket: Ticket, reply: StoreReply) {
        self.host.store.asked.remove(&ticket).expect("it was asked");
        self.host.store.actions.push_back(StoreAction::Reply(ticket, reply));
        self.settle();
    }

    /// Ends everything badly.
    pub(super) fn store_fails(&mut self, error: StoreError) {
        if let StoreError::Poisoned(error) = error {
            self.host.store.failed = Some(error);
        }
        for (ticket, _) in std::mem::take(&mut self.host.store.asked) {
            let reply = StoreReply::Failed(error);
            self.host.store.actions.push_back(StoreAction::Reply(ticket, reply));
        }
        self.settle();
    }

    /// A peer that has sealed the generation and joined group 0.
    pub(super) fn take(&mut self, generation: u32) -> ConnId {
        let conn = self.peer();
        self.send(conn, seal(generation));
        self.store_ends();
        assert!(matches!(self.answer(conn), Some((Message::Sealed(_), true))));
        self.send(conn, join(generation));
        self.store_ends();
        assert!(matches!(self.answer(conn), Some((Message::Joined(_), true))));
        conn
    }
}

pub(super) fn kind(message: Option<Message>) -> Option<FailureKind> {
    match message {
        Some(Message::Failed(failed)) => Some(failed.kind),
        _ => None,
    }
}
