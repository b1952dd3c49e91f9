//! What [`ClientCore`](super::ClientCore) is told and what it wants done: the seam to the driver and to the simulator.

use std::fmt;

use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::ids::{ClientId, ClusterId, DeviceId, Generation, GroupCount, Layer, VolumeId};
use cairn_proto::message::{Envelope, Purpose};
pub use cairn_proto::replication::{
    ChangeOutcome, ConfigChange, Grant, GroupConfig, GroupPhase, GroupStatus, MemberRole, MemberStatus, Move, Notice,
};
use cairn_proto::units::ByteSize;

use crate::volume::api::{OpId, VolumeError, VolumeOp, VolumeReply};

/// One attempt to connect, and the connection that comes of it. Chosen by the core, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnId(pub u64);

/// A volume that was opened. Chosen by the driver; free again after [`Action::Closed`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VolumeHandle(pub u32);

/// Pairs an answer of meta with its request. Chosen by the core, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MetaRequestId(pub u64);

/// Who this client is.
#[derive(Clone, Copy, Debug)]
pub struct CoreConfig {
    /// Its cluster.
    pub cluster: ClusterId,
    /// This run of the process: drawn at random at its start.
    pub client: ClientId,
    /// Bounds.
    pub limits: super::limits::CoreLimits,
}

/// What the core is told.
#[derive(Clone, Debug)]
pub enum Event {
    /// A connection stands. The core says hello next.
    Connected {
        /// Which one, of [`Action::Connect`].
        conn: ConnId,
    },
    /// A connection is over, or could not be made. The driver has forgotten it. Not needed, and ignored, after
    /// [`Action::Disconnect`].
    Disconnected {
        /// Which one.
        conn: ConnId,
        /// Whether it never stood.
        refused: bool,
    },
    /// A frame came in. Frames of one connection come in the order in which they were sent.
    Frame {
        /// On which connection.
        conn: ConnId,
        /// What.
        envelope: Envelope,
    },
    /// Serve a volume. It is attached at its first operation, not before.
    OpenVolume {
        /// What the driver calls it.
        volume: VolumeHandle,
        /// What it is.
        description: VolumeDescription,
    },
    /// Take care of a volume: it is attached at once, as a caretaker, which no guest loses it to. Its groups are made whole,
    /// then it is released; then, or when it can't be had, or when anybody else takes it over, [`Action::Closed`].
    CareForVolume {
        /// What the driver calls it.
        volume: VolumeHandle,
        /// What it is.
        description: VolumeDescription,
    },
    /// What meta says to an [`Action::Report`].
    Advice(Vec<Advice>),
    /// Stop serving a volume: what was submitted is finished, the attachment is released, then [`Action::Closed`].
    CloseVolume {
        /// Which one.
        volume: VolumeHandle,
    },
    /// A volume has grown. A smaller size is ignored.
    Grown {
        /// Which one.
        volume: VolumeHandle,
        /// Its size now.
        size: ByteSize,
    },
    /// Do this. Answered with exactly one [`Action::Reply`].
    Submit {
        /// On which volume.
        volume: VolumeHandle,
        /// What the driver calls it; unique among the operations of the volume without a reply.
        op: OpId,
        /// What.
        request: VolumeOp,
    },
    /// An answer of meta. Every [`Action::Meta`] gets exactly one, `MetaError::Unreachable` if nothing better.
    Meta(MetaAnswer),
}

/// What the core wants done, in this order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Connect to a device, trying its addresses in turn; ends in [`Event::Connected`] or [`Event::Disconnected`].
    Connect {
        /// What the connection is called.
        conn: ConnId,
        /// Which device.
        device: DeviceId,
        /// What for.
        purpose: Purpose,
        /// Where it may be: `host:port`, as the device's node registered them. Never empty.
        addresses: Vec<String>,
    },
    /// Close a connection or give up an attempt; nothing of it may be delivered from now on.
    Disconnect {
        /// Which one.
        conn: ConnId,
    },
    /// Send the same frame on each of these connections: one encoding serves all of them. The core keeps within the
    /// peer's limits, so what the driver must buffer per connection is bounded by those.
    Send {
        /// On which connections.
        to: Vec<ConnId>,
        /// What.
        envelope: Envelope,
    },
    /// An operation has ended.
    Reply {
        /// Of which volume.
        volume: VolumeHandle,
        /// Which one.
        op: OpId,
        /// How.
        result: Result<VolumeReply, VolumeError>,
    },
    /// Ask meta.
    Meta(MetaRequest),
    /// A volume is closed, every one of its operations replied to.
    Closed {
        /// Which one.
        volume: VolumeHandle,
    },
    /// Tell meta how volumes are: at most 64 of them. It is answered with [`Event::Advice`], or not at all.
    Report(Vec<AttachmentReport>),
    /// Something that a log should have.
    Notice {
        /// About which volume.
        volume: VolumeHandle,
        /// What.
        notice: Notice,
    },
    /// Something about a device's connection that a log should have.
    DeviceNotice {
        /// Which device.
        device: DeviceId,
        /// What, for people.
        words: String,
    },
}

/// A question to meta.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetaRequest {
    /// Pairs the answer with it.
    pub request: MetaRequestId,
    /// For which volume it is asked.
    pub volume: VolumeHandle,
    /// That volume's id.
    pub id: VolumeId,
    /// What.
    pub question: MetaQuestion,
}

/// What is asked of meta.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaQuestion {
    /// Grant the right to write the volume: a new generation each time. The group map of the answer must have been read
    /// at or after the grant's commit (rule 2).
    Attach,
    /// Grant the right to repair the volume, if no guest holds it; else like [`Attach`](Self::Attach).
    Care,
    /// The attachment was released in order.
    Detach {
        /// Which attachment.
        generation: Generation,
        /// Whether every in-sync copy of every group holds all that was written. Else somebody must make them equal.
        settled: bool,
    },
    /// Where are the volume's devices now, and how are its groups? Answered as meta is after the question.
    Refresh,
    /// Change configurations of groups. Asking twice for the same is harmless.
    Configure {
        /// The grant under which it is asked.
        generation: Generation,
        /// Each of another group.
        changes: Vec<ConfigChange>,
    },
}

/// An answer of meta.
#[derive(Clone, Debug)]
pub struct MetaAnswer {
    /// To which question.
    pub request: MetaRequestId,
    /// What.
    pub result: Result<MetaReply, MetaError>,
}

/// What meta answered.
#[derive(Clone, Debug)]
pub enum MetaReply {
    /// The right was granted.
    Attached {
        /// The right.
        grant: Grant,
        /// The configuration of each group, in order of the group index.
        groups: Vec<GroupConfig>,
        /// Where the devices are.
        devices: Vec<DeviceEntry>,
    },
    /// The attachment is recorded as released.
    Detached,
    /// Where the devices are now.
    Refreshed {
        /// The volume's size now.
        size: ByteSize,
        /// The last generation that was granted.
        generation: Generation,
        /// The configuration of each group, in order of the group index.
        groups: Vec<GroupConfig>,
        /// The devices of the volume's groups.
        devices: Vec<DeviceEntry>,
    },
    /// What became of each change, in their order.
    Configured(Vec<ChangeOutcome>),
}

/// Why meta did not do it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaError {
    /// No metadata server answered, or no leader was found: the core asks again later.
    Unreachable(String),
    /// A newer generation than that of the question was granted.
    Superseded(Generation),
    /// The volume does not exist, or this client may not have it: the core does not ask again.
    Refused(String),
}

impl fmt::Display for MetaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetaError::Unreachable(why) => write!(f, "the metadata servers can't be reached: {why}"),
            MetaError::Superseded(generation) => {
                write!(f, "generation {generation} has taken the volume over")
            }
            MetaError::Refused(why) => write!(f, "refused by the metadata servers: {why}"),
        }
    }
}

impl std::error::Error for MetaError {}

/// A volume as its holder sees it, for meta.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachmentReport {
    /// Which volume.
    pub id: VolumeId,
    /// The grant.
    pub generation: Generation,
    /// Whether it is a caretaker's.
    pub is_caretaker: bool,
    /// All of its groups.
    pub groups: Vec<GroupStatus>,
}

/// What meta says to the holder of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Advice {
    /// Which volume.
    pub id: VolumeId,
    /// A caretaker shall release it.
    pub give_way: bool,
    /// Some group has a newer configuration than was reported.
    pub look: bool,
}

/// A device and where it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceEntry {
    /// Which device.
    pub device: DeviceId,
    /// `host:port` of the node that serves it, the likeliest first.
    pub addresses: Vec<String>,
}

/// What a volume is, as meta describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeDescription {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size: a multiple of a sector.
    pub size: ByteSize,
    /// Its groups.
    pub groups: GroupCount,
    /// Copies that each group should have.
    pub replicas: u8,
    /// `W`: copies that a write needs to be acknowledged.
    pub write_quorum: u8,
    /// The fewest in-sync copies with which writes go on.
    pub min_copies: u8,
    /// The layer that is written.
    pub layer: Layer,
    /// How its block checksums are computed.
    pub checksum: ChecksumAlgorithm,
}

/// How far a volume's attachment is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AttachmentPhase {
    /// No operation has asked for it yet.
    Idle,
    /// Meta has been asked.
    Asking,
    /// It was granted; each group says how far it is.
    Attached(Generation),
    /// A newer attachment has taken over.
    Fenced,
    /// Meta refused it.
    Gone(String),
}

/// A volume as metrics and logs see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeStatus {
    /// How far the attachment is.
    pub attachment: AttachmentPhase,
    /// One per group, once attached.
    pub groups: Vec<GroupStatus>,
    /// Operations without a reply.
    pub operations: usize,
    /// Operations that wait for a permit.
    pub waiting: usize,
    /// Bytes of permits taken.
    pub permit_bytes: u64,
}
