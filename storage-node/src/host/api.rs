//! What a [`DeviceHost`](super::DeviceHost) is told and what it wants done: the seam to the driver and to the simulator.

use std::fmt;
use std::time::Duration;

use cairn_proto::capability::ClusterKey;
use cairn_proto::disk::{DiskDone, DiskOp};
use cairn_proto::frame::FrameError;
use cairn_proto::ids::{ClusterId, CommitSeq, DeviceId, Epoch, GroupId, VolumeId};
use cairn_proto::message::{Envelope, Holder};

use super::background::{BackgroundConfig, ScrubStatus};
use super::limits::HostLimits;

/// A connection of a peer to the device. Chosen by the driver, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnId(pub u64);

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conn {}", self.0)
    }
}

/// A connection that the device makes to another one. Chosen by the host, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerId(pub u64);

/// Who the device is, and whom it believes.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its cluster, as its superblock says.
    pub cluster: ClusterId,
    /// With which capabilities are verified.
    pub cluster_key: ClusterKey,
    /// The device, as its superblock says.
    pub device: DeviceId,
    /// Bounds and times.
    pub limits: HostLimits,
    /// What it does when nobody asks.
    pub background: BackgroundConfig,
    /// A planted bug, for the checkers to find.
    #[cfg(feature = "canary")]
    pub canary: Canary,
}

impl HostConfig {
    /// With the default limits, and without background work.
    pub fn new(cluster: ClusterId, cluster_key: ClusterKey, device: DeviceId) -> HostConfig {
        HostConfig {
            cluster,
            cluster_key,
            device,
            limits: HostLimits::default(),
            background: BackgroundConfig::OFF,
            #[cfg(feature = "canary")]
            canary: Canary::None,
        }
    }
}

/// A planted bug.
#[cfg(feature = "canary")]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Canary {
    /// No bug.
    #[default]
    None,
    /// Writes and copies of lower generations are applied.
    GenerationIgnored,
    /// A seal is answered before it is durable.
    SealNotDurable,
    /// A seal is answered although an older holder's read grant has not run out.
    GrantIgnored,
    /// A seal is answered although writes of an older holder are still under way.
    WritesOvertakeSeal,
    /// The checksums of incoming blocks are not verified.
    ChecksumUnverified,
    /// What was fetched for a holder is written though a higher generation was sealed meanwhile.
    FetchIgnoresGeneration,
    /// A fetch is answered when its content is here, not when it is durable.
    FetchAckedEarly,
}

/// What the host is told.
#[derive(Clone, Debug)]
pub enum HostEvent {
    /// A peer has connected. It says hello first.
    Connected {
        /// What the connection is called from now on.
        conn: ConnId,
    },
    /// A frame came in. Frames of one connection come in the order in which they were sent. Ignored after
    /// [`HostAction::Close`] or [`HostEvent::Disconnected`] of the connection.
    Frame {
        /// On which connection.
        conn: ConnId,
        /// What.
        envelope: Envelope,
    },
    /// Bytes came in that are no frame: the stream can't be trusted any more. Answered with [`HostAction::Close`].
    BadFrame {
        /// On which connection.
        conn: ConnId,
        /// What is wrong with them.
        error: FrameError,
    },
    /// The connection is over. Not needed, and ignored, after [`HostAction::Close`].
    Disconnected {
        /// Which one.
        conn: ConnId,
    },
    /// A connection that [`HostAction::Reach`] asked for stands.
    PeerConnected {
        /// Which one.
        peer: PeerId,
    },
    /// A frame came in from another device.
    PeerFrame {
        /// On which connection.
        peer: PeerId,
        /// What.
        envelope: Envelope,
    },
    /// A connection to another device is over, or can't be made. Not needed, and ignored, after
    /// [`HostAction::ClosePeer`].
    PeerEnded {
        /// Which one.
        peer: PeerId,
    },
    /// The device has finished an operation.
    Disk(DiskDone),
    /// Meta says that these replicas are not needed: their space is given back. One that is not here, or that a later
    /// configuration has named meanwhile, is left alone.
    Drop {
        /// Which, as they were reported.
        replicas: Vec<HeldReplica>,
    },
    /// An operator wants all that the device holds to be verified: a pass of the scrub begins, unless one is under way.
    Scrub,
}

/// A replica that is here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HeldReplica {
    /// Of which group.
    pub group: GroupId,
    /// The configuration that named it last.
    pub epoch: Epoch,
}

/// What the host wants done, in this order.
#[derive(Clone, Debug)]
pub enum HostAction {
    /// Send a frame.
    Send {
        /// On which connection.
        conn: ConnId,
        /// What.
        envelope: Envelope,
    },
    /// Close a connection, after what was sent on it before. Nothing of it may be delivered from now on.
    Close {
        /// Which one.
        conn: ConnId,
        /// Why, for the log.
        reason: CloseReason,
    },
    /// Connect to another device. Ends in [`HostEvent::PeerConnected`] or [`HostEvent::PeerEnded`].
    Reach {
        /// What the connection is called.
        peer: PeerId,
        /// Where it is, as `host:port`: what a holder has said, so it may be anything.
        address: String,
    },
    /// Send a frame to another device.
    SendPeer {
        /// On which connection.
        peer: PeerId,
        /// What.
        envelope: Envelope,
    },
    /// Close a connection to another device, or give up the attempt. Nothing of it may be delivered from now on.
    ClosePeer {
        /// Which one.
        peer: PeerId,
    },
    /// Give this to the device.
    Disk(DiskOp),
}

/// Why the host closes a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CloseReason {
    /// Its bytes are no frames.
    BadFrame(FrameError),
    /// Its hello was refused; the peer has been told why.
    Refused(String),
    /// It did not say hello in time.
    NoHello(Duration),
    /// Nothing came from it for so long.
    Idle(Duration),
    /// It sent something that a client never sends.
    Unexpected(&'static str),
    /// It has far more in flight than it was told.
    Flood,
    /// There are too many connections.
    TooMany(usize),
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CloseReason::BadFrame(error) => write!(f, "bad frame: {error}"),
            CloseReason::Refused(words) => write!(f, "refused: {words}"),
            CloseReason::NoHello(time) => write!(f, "it said no hello within {} ms", time.as_millis()),
            CloseReason::Idle(time) => write!(f, "nothing came from it for {} ms", time.as_millis()),
            CloseReason::Unexpected(what) => write!(f, "it sent {what}, which a client never sends here"),
            CloseReason::Flood => f.write_str("it has far more in flight than its hello was answered with"),
            CloseReason::TooMany(count) => write!(f, "{count} connections are open already"),
        }
    }
}

/// How the device is, for heartbeats, metrics and logs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostStatus {
    /// Blocks that volumes can use.
    pub capacity_blocks: u64,
    /// Blocks of those that are taken.
    pub used_blocks: u64,
    /// Its commit sequence.
    pub commit: CommitSeq,
    /// Why it acknowledges nothing any more; `None` while it does.
    pub failed: Option<String>,
    /// Any function of the set of groups that it holds: it changes with the set.
    pub inventory_digest: u64,
    /// Connections that have said hello.
    pub peers: usize,
    /// Connections that have not.
    pub strangers: usize,
    /// Requests without an answer.
    pub requests: usize,
    /// Of these, how many wait to be given to the store.
    pub queued: usize,
    /// Fetches that wait for other devices.
    pub fetching: usize,
    /// Bytes asked of other devices that are not here yet.
    pub fetching_bytes: u64,
    /// Connections to other devices.
    pub fetch_peers: usize,
    /// Bytes that came from other devices since the start.
    pub fetched_bytes: u64,
    /// Attachments whose holders are connected now and have not released; at most 4096, in order.
    pub held: Vec<Holder>,
    /// Volumes with blocks that are known to be damaged here; at most 64, in order.
    pub damaged_volumes: Vec<VolumeId>,
    /// How the scrub and the mover are.
    pub scrub: ScrubStatus,
}
