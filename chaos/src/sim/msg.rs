//! What travels outside the data plane: Raft messages between metadata servers, and the control plane's questions and
//! answers in the terms of the state machine. (The gRPC service that turns calls into these is not simulated.)

use bytes::Bytes;
use cairn_meta::state::command::Command;
use cairn_meta::state::model::{Device, Group, Volume};
use cairn_meta::state::{Outcome, Refusal};
use cairn_proto::ids::{ClusterId, DeviceId, GroupId, VolumeId};

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
    /// Which of these groups belong to volumes that are gone for good?
    Deleted(Vec<GroupId>),
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
    /// Those of the groups that are to be dropped.
    Deleted(Vec<GroupId>),
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
            Request::Deleted(_) => "Deleted",
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
            Answer::Deleted(_) => "Deleted",
            Answer::Refused(_) => "Refused",
            Answer::NotLeader(_) => "NotLeader",
            Answer::Unknown => "Unknown",
        }
    }
}
