//! What travels outside the data plane: Raft messages between metadata servers, and the control plane's questions and
//! answers in the terms of the state machine. (The gRPC service that turns calls into these is not simulated.)

use bytes::Bytes;
use cairn_client::caretaker::Task;
use cairn_client::core::api::{Advice, AttachmentReport};
use cairn_meta::state::command::{Command, DeviceReport};
use cairn_meta::state::model::{Device, Group, Volume};
use cairn_meta::state::{Outcome, Refusal};
use cairn_proto::ids::{ClusterId, DeviceId, NodeId, VolumeId};
use cairn_proto::message::Holder;
use cairn_storage_node::host::HeldReplica;

/// A message between processes.
#[derive(Clone, Debug)]
pub enum Msg {
    /// Raft, as bytes.
    Raft(Bytes),
    /// A question to a metadata server.
    Call {
        /// Pairs the answer with it; unique for its sender.
        id: u64,
        /// What.
        request: Request,
    },
    /// Its answer.
    Answer {
        /// To which call.
        id: u64,
        /// What.
        answer: Answer,
    },
}

/// What is asked of meta.
#[derive(Clone, Debug)]
pub enum Request {
    /// Change the state.
    Command(Command),
    /// What is this volume, and where is it?
    Volume(VolumeId),
    /// Every volume there is, by name.
    Volumes,
    /// A node says how it is.
    Heartbeat(Box<Heartbeat>),
    /// Which of these replicas of a device are not needed?
    Inventory(DeviceId, Vec<HeldReplica>),
    /// How volumes are, by who holds them: by a caretaker of this node.
    Report(Option<NodeId>, Vec<AttachmentReport>),
    /// What is the node of this name to take care of?
    Care(String),
}

/// What a node says of itself.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// As it was registered.
    pub node: NodeId,
    /// The run of its process.
    pub run: [u8; 16],
    /// How its device is.
    pub device: DeviceReport,
    /// Attachments with living connections.
    pub held: Vec<Holder>,
    /// Volumes with damage.
    pub damaged: Vec<VolumeId>,
}

/// What meta answered.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It is done.
    Done {
        /// Under which cluster id.
        cluster: ClusterId,
        /// What it did.
        outcome: Outcome,
        /// Every device that its groups name.
        devices: Vec<(DeviceId, Device)>,
    },
    /// One volume.
    Volume(Option<Placed>),
    /// All volumes.
    Volumes(Vec<(VolumeId, Volume)>),
    /// A heartbeat was heard.
    Heard,
    /// Those of the replicas that are to be dropped.
    Unneeded(Vec<HeldReplica>),
    /// What holders should know.
    Advice(Vec<Advice>),
    /// The node, if it is known, and the volumes that it is to take care of.
    Care(Option<NodeId>, Vec<Task>),
    /// The state machine refused.
    Refused(Refusal),
    /// Nothing was done here: perhaps this one leads.
    NotLeader(Option<u8>),
    /// Nothing is known of the outcome.
    Unknown,
}

/// A volume with its groups and their devices.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Its id.
    pub id: VolumeId,
    /// As it is.
    pub volume: Volume,
    /// In order.
    pub groups: Vec<Group>,
    /// Every device that they name.
    pub devices: Vec<(DeviceId, Device)>,
}

impl Request {
    /// In a word.
    pub fn name(&self) -> &'static str {
        match self {
            Request::Command(command) => command.tag().1,
            Request::Volume(_) => "Volume",
            Request::Volumes => "Volumes",
            Request::Heartbeat(_) => "Heartbeat",
            Request::Inventory(..) => "Inventory",
            Request::Report(..) => "Report",
            Request::Care(_) => "Care",
        }
    }
}

impl Answer {
    /// In a word.
    pub fn name(&self) -> &'static str {
        match self {
            Answer::Done { .. } => "Done",
            Answer::Volume(_) => "Volume",
            Answer::Volumes(_) => "Volumes",
            Answer::Heard => "Heard",
            Answer::Unneeded(_) => "Unneeded",
            Answer::Advice(_) => "Advice",
            Answer::Care(..) => "Care",
            Answer::Refused(_) => "Refused",
            Answer::NotLeader(_) => "NotLeader",
            Answer::Unknown => "Unknown",
        }
    }
}
