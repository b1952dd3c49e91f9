//! What the cluster knows: the records of the state.

use std::collections::BTreeMap;

use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::codec::{DecodeError, Reader};
use cairn_proto::ids::*;

use crate::state::codec::{Code, numbered, record};
use crate::state::events::Event;

record! {
    /// Where a device stands, from the outside in; the device itself is the innermost level. Empty is not told apart.
    pub struct FailureDomain {
        /// The room.
        pub room: String,
        /// The rack within the room.
        pub rack: String,
        /// The host within the rack.
        pub host: String,
    }
}

numbered! {
    /// How far apart the copies of a group stand at least.
    pub enum Spread {
        /// On distinct devices.
        Device = 1,
        /// On distinct hosts.
        Host = 2,
        /// In distinct racks.
        Rack = 3,
        /// In distinct rooms.
        Room = 4,
    }
}

numbered! {
    /// What meta thinks of a device.
    pub enum DeviceState {
        /// It may be used and may get new groups.
        Active = 1,
        /// It can't acknowledge writes.
        Failed = 2,
        /// A later format of the same device is registered.
        Replaced = 3,
        /// An operator has taken it out.
        Removed = 4,
    }
}

record! {
    /// Who may write a volume.
    pub struct Holder {
        /// One run of a client process.
        pub client: ClientId,
        /// What it says of itself, for people.
        pub address: String,
        /// Under which grant.
        pub generation: Generation,
        /// Unix time of the proposer, in milliseconds.
        pub since_ms: u64,
        /// It only repairs the volume, and gives way to everybody else.
        pub caretaker: bool,
    }
}

record! {
    /// A volume.
    pub struct Volume {
        /// Unique among the volumes there are.
        pub name: String,
        /// A multiple of 4096.
        pub size_bytes: u64,
        /// Fixed at creation.
        pub group_count: GroupCount,
        /// `R`: copies that it was created with.
        pub replicas: u8,
        /// `W`: durable answers that acknowledge a write.
        pub write_quorum: u8,
        /// Whether writes go on with a single in-sync copy.
        pub min_copies_one: bool,
        /// How block checksums are computed.
        pub checksum: ChecksumAlgorithm,
        /// How far apart its copies stand at least.
        pub spread: Spread,
        /// What new writes are stored under.
        pub layer: Layer,
        /// The last one granted.
        pub generation: Generation,
        /// Who has it, unless it was given back.
        pub holder: Option<Holder>,
        /// Unix time of the proposer, in milliseconds.
        pub created_ms: u64,
        /// All in-sync copies were equal when the last attachment ended, or there never was one. False from each grant on
        /// until it is given back in order, with nothing lacking.
        pub settled: bool,
    }
}

record! {
    /// A member of `I` that gives its place to another device. The coordinator fills that one, and admits it by the same
    /// change that ejects the former.
    pub struct Move {
        /// In sync.
        pub from: DeviceId,
        /// Joining or stale, and rebuilding.
        pub to: DeviceId,
    }
}

record! {
    /// The configuration of one group. Every list is sorted and names nobody twice.
    pub struct Group {
        /// Grows by one with each change.
        pub epoch: Epoch,
        /// `I`.
        pub in_sync: Vec<DeviceId>,
        /// `J`.
        pub joining: Vec<DeviceId>,
        /// Ejected members that still hold data; the one ejected first stands first.
        pub stale: Vec<DeviceId>,
        /// The last `I` that had `W` members, while there are fewer; else empty.
        pub rescue: Vec<DeviceId>,
        /// Those joining or stale that have taken the place of a lost device, and were never in sync since.
        pub rebuilding: Vec<DeviceId>,
        /// A copy that is to be elsewhere, while it is not.
        pub moving: Option<Move>,
    }
}

record! {
    /// A device in one of its formats.
    pub struct Device {
        /// Who serves it.
        pub node: NodeId,
        /// `host:port` of its data plane, best first.
        pub addresses: Vec<String>,
        /// Bytes that it can hold.
        pub capacity_bytes: u64,
        /// Bytes that were taken when it was last reported.
        pub used_bytes: u64,
        /// What meta thinks of it.
        pub state: DeviceState,
        /// The highest commit sequence reported.
        pub commit_seq: CommitSeq,
        /// It once came back with a lower commit sequence.
        pub forgot: bool,
        /// What its node says is wrong.
        pub trouble: String,
        /// Nobody has said for a while that it is served, and that was written down.
        pub silent: bool,
    }
}

record! {
    /// A node that is to hold nothing.
    pub struct Drain {
        /// Unix time of the proposer, in milliseconds.
        pub since_ms: u64,
        /// Copies that it had then.
        pub copies: u64,
    }
}

record! {
    /// A storage node.
    pub struct Node {
        /// As the operator names hosts apart.
        pub name: String,
        /// The run of its process that registered last.
        pub run: [u8; 16],
        /// Where its devices stand.
        pub domain: FailureDomain,
        /// The version of its program.
        pub version: String,
        /// The highest feature level that it understands.
        pub feature_level: u32,
        /// An operator wants it to hold nothing: it gets no new copies, and those that it has are made elsewhere.
        pub draining: Option<Drain>,
    }
}

record! {
    /// A metadata server.
    pub struct Member {
        /// `host:port` of its gRPC service.
        pub address: String,
        /// Drawn when its directory was made; 0 while not known.
        pub directory: u64,
    }
}

/// Everything that Raft agrees on. Pure: it changes through [`State::apply`] alone, and equal commands give equal bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct State {
    pub(crate) cluster: Option<ClusterId>,
    pub(crate) feature_level: u32,
    /// The id of the volume created last. Every id up to it that names no volume is of one deleted for good.
    pub(crate) last_volume: u64,
    pub(crate) last_node: u64,
    /// Counts deletions, so that it can be seen that inventories must be looked at again.
    pub(crate) deletions: u64,
    /// Counts what may have made copies superfluous, for the same purpose: members that were replaced, groups that have
    /// got all their copies back.
    pub(crate) releases: u64,
    pub(crate) last_member: u64,
    pub(crate) volumes: BTreeMap<VolumeId, Volume>,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    pub(crate) devices: BTreeMap<DeviceId, Device>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) members: BTreeMap<u64, Member>,
    /// The id of the newest event.
    pub(crate) last_event: u64,
    /// The last events, by id.
    pub(crate) events: BTreeMap<u64, Event>,
    /// Derived from `volumes`, not encoded.
    pub(crate) names: BTreeMap<String, VolumeId>,
}

impl Code for ChecksumAlgorithm {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(*self as u8);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        ChecksumAlgorithm::from_u8(reader.u8()?).ok_or(DecodeError::Invalid("checksum algorithm"))
    }
}

impl State {
    /// The state before the first command of a cluster that begins with these metadata servers.
    pub fn new(members: BTreeMap<u64, Member>) -> State {
        let last_member = members.last_key_value().map_or(0, |(id, _)| *id);
        State {
            members,
            last_member,
            ..State::default()
        }
    }

    /// `None` until the cluster is initialised.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// What all members understand.
    pub fn feature_level(&self) -> u32 {
        self.feature_level
    }

    /// How many volumes were ever deleted.
    pub fn deletions(&self) -> u64 {
        self.deletions
    }

    /// How often copies somewhere may have become superfluous.
    pub fn releases(&self) -> u64 {
        self.releases
    }

    /// The volumes.
    pub fn volumes(&self) -> &BTreeMap<VolumeId, Volume> {
        &self.volumes
    }

    /// The groups of all volumes.
    pub fn groups(&self) -> &BTreeMap<GroupId, Group> {
        &self.groups
    }

    /// The devices.
    pub fn devices(&self) -> &BTreeMap<DeviceId, Device> {
        &self.devices
    }

    /// The storage nodes.
    pub fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    /// The metadata servers.
    pub fn members(&self) -> &BTreeMap<u64, Member> {
        &self.members
    }

    /// Whether a metadata server with this id was removed.
    pub fn was_member(&self, id: u64) -> bool {
        id <= self.last_member && !self.members.contains_key(&id)
    }

    /// The volumes by name.
    pub fn names(&self) -> &BTreeMap<String, VolumeId> {
        &self.names
    }

    /// The groups of one volume, in order.
    pub fn groups_of(&self, volume: VolumeId) -> impl Iterator<Item = (GroupIndex, &Group)> {
        let id = |index| GroupId {
            volume,
            index: GroupIndex(index),
        };
        self.groups
            .range(id(0)..=id(u8::MAX))
            .map(|(id, group)| (id.index, group))
    }

    /// Whether a device's copy of the group, which a configuration named last, is of no use any more: no later one names it,
    /// and all copies that there should be are in sync on others. While there are fewer it is kept: it may be all that is
    /// left.
    pub fn is_unnamed(&self, id: GroupId, device: &DeviceId, last: Epoch) -> bool {
        let (Some(group), Some(volume)) = (self.groups.get(&id), self.volumes.get(&id.volume)) else {
            return false;
        };
        let is_named = group.named().any(|named| named == device);
        !is_named && group.epoch > last && group.in_sync.len() >= usize::from(volume.replicas)
    }

    /// Whether the volume was deleted: true for ever after, since ids are never used again. An id that was never drawn
    /// here (of another cluster, or from after a backup) is not deleted.
    pub fn is_deleted(&self, volume: VolumeId) -> bool {
        volume.0 != 0 && volume.0 <= self.last_volume && !self.volumes.contains_key(&volume)
    }
}

impl Group {
    /// Whether the device is a member, in sync or joining.
    pub fn has(&self, device: &DeviceId) -> bool {
        self.in_sync.contains(device) || self.joining.contains(device)
    }

    /// Every device that the configuration names.
    pub fn named(&self) -> impl Iterator<Item = &DeviceId> {
        let lists = [&self.in_sync, &self.joining, &self.stale, &self.rescue];
        lists.into_iter().flatten()
    }
}
