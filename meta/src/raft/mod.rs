//! The Raft adapter: a sans-I/O [`MetaNode`] around `raft::RawNode`, driven in one thread.

mod api;
pub mod message;
mod node;
mod storage;
#[cfg(test)]
mod tests;

pub use api::{Answer, MetaAction, MetaStatus, NodeConfig, NodeError, PeerProgress, StepError, Ticket};
pub use node::MetaNode;

use std::collections::BTreeMap;

use raft::eraftpb::Snapshot;

use crate::log::Stored;
use crate::state::model::{Member, State};

/// What the first members of a cluster begin with: all of them with the same.
pub fn bootstrap(members: BTreeMap<u64, Member>) -> Stored {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    (metadata.index, metadata.term) = (1, 1);
    metadata.mut_conf_state().voters = members.keys().copied().collect();
    snapshot.data = State::new(members).encode().into();
    Stored::bootstrap(snapshot)
}
