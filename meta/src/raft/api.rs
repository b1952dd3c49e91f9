//! What goes into a node and what comes out of it.

use std::fmt;
use std::time::Duration;

use cairn_proto::codec::DecodeError;

use crate::limits::*;
use crate::log::LogError;
use crate::state::command::CommandError;
use crate::state::snapshot::StateError;
use crate::state::{Outcome, Refusal};

/// Pairs an answer with its request. Chosen by the caller, unique among the requests of one run of the node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// How a node runs.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The member's id, above 0.
    pub id: u64,
    /// Another one for each start of the node, so that what an earlier run proposed is not taken for its own.
    pub run: u64,
    /// The time between two ticks.
    pub tick: Duration,
    /// After how many entries there is a snapshot.
    pub snapshot_entries: u64,
    /// How many entries are kept behind a snapshot.
    pub kept_entries: u64,
}

impl NodeConfig {
    /// With the usual bounds.
    pub fn new(id: u64, run: u64) -> NodeConfig {
        NodeConfig {
            id,
            run,
            tick: Duration::from_millis(100),
            snapshot_entries: SNAPSHOT_ENTRIES,
            kept_entries: KEPT_ENTRIES,
        }
    }

    /// Ticks without a leader before this member asks for votes: pinned, and another one for each of up to
    /// [`ELECTION_SPREAD`] members, so that nothing is drawn at random.
    fn election_ticks(&self) -> usize {
        ELECTION_TICKS + 2 * (self.id % ELECTION_SPREAD) as usize
    }

    pub(super) fn raft(&self, applied: u64) -> raft::Config {
        let ticks = self.election_ticks();
        raft::Config {
            id: self.id,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: ticks,
            max_election_tick: ticks + 1,
            applied,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: APPENDS_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            ..raft::Config::default()
        }
    }
}

/// What a node wants done.
#[derive(Clone, PartialEq, Debug)]
pub enum MetaAction {
    /// Give this to another member. It may be lost.
    Send {
        /// Which one.
        to: u64,
        /// For its [`step`](super::MetaNode::step).
        message: Vec<u8>,
    },
    /// A request has ended.
    Answer(Ticket, Answer),
    /// Another member leads now, or none (0), or the term has changed.
    Leader {
        /// Who.
        id: u64,
        /// In which term.
        term: u64,
    },
}

/// The end of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The command was committed and applied; this is what came of it.
    Applied(Box<Result<Outcome, Refusal>>),
    /// The state is now at least as new as it was anywhere when the read was asked for.
    Readable,
    /// Nothing was done.
    Refused(Refusal),
    /// The command may be committed or not, now or later.
    Unknown(Refusal),
}

/// Why a message was not taken.
#[derive(Clone, PartialEq, Debug)]
pub enum StepError {
    /// It can't be read.
    Damaged(DecodeError),
    /// It is for another member, or not from whom it says.
    Misdirected {
        /// The message's words.
        from: u64,
        /// The message's words.
        to: u64,
    },
    /// Its snapshot can't be read.
    Snapshot(StateError),
    /// The leader believes that this member has entries which it does not have: it has lost some.
    LostEntries {
        /// What the leader believes.
        expected: u64,
        /// What there is.
        last: u64,
    },
}

impl fmt::Display for StepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StepError::Damaged(error) => write!(f, "a Raft message can't be read: {error}"),
            StepError::Misdirected { from, to } => {
                write!(
                    f,
                    "a Raft message from {from} to {to} came here: are two addresses mixed up?"
                )
            }
            StepError::Snapshot(error) => write!(f, "a snapshot from the leader can't be used: {error}"),
            StepError::LostEntries { expected, last } => write!(
                f,
                "the leader knows of entries up to {expected} here, and the log ends at {last}: entries were lost; \
                 remove this member, and add a new one with another id"
            ),
        }
    }
}

impl std::error::Error for StepError {}

/// Why a node has stopped for good.
#[derive(Debug)]
pub enum NodeError {
    /// Its log can't be used.
    Log(LogError),
    /// Its state can't be read.
    State(StateError),
    /// A committed command can't be applied by this version.
    Command(u64, CommandError),
    /// Raft refused to go on.
    Raft(raft::Error),
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeError::Log(error) => write!(f, "{error}"),
            NodeError::State(error) => write!(f, "{error}"),
            NodeError::Command(index, error) => write!(f, "entry {index} of the log can't be applied: {error}"),
            NodeError::Raft(error) => write!(f, "Raft can't go on: {error}"),
        }
    }
}

impl std::error::Error for NodeError {}

impl From<LogError> for NodeError {
    fn from(error: LogError) -> NodeError {
        NodeError::Log(error)
    }
}

impl From<raft::Error> for NodeError {
    fn from(error: raft::Error) -> NodeError {
        NodeError::Raft(error)
    }
}

/// How a node is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MetaStatus {
    /// Its id.
    pub id: u64,
    /// Who leads, 0 for nobody.
    pub leader: u64,
    /// The term.
    pub term: u64,
    /// Committed up to here.
    pub commit: u64,
    /// Applied up to here.
    pub applied: u64,
    /// Entries of the log that are kept, and their bytes.
    pub log: (u64, u64),
    /// What the leader knows of the others.
    pub peers: Vec<PeerProgress>,
}

/// What the leader knows of another member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerProgress {
    /// Which one.
    pub id: u64,
    /// Its log agrees up to here.
    pub matched: u64,
    /// It was heard of within the last election timeout or so.
    pub active: bool,
}
