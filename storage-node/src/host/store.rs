//! What the host needs of a store.

use cairn_proto::disk::{DiskDone, DiskError};
use cairn_proto::ids::{CommitSeq, Epoch, Generation, GroupId, Layer, VolumeId};
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;

use super::api::HeldReplica;
use crate::store::api::{DamagedBlock, ScrubState};
use crate::store::{ReplicaInfo, Store, StoreAction, StoreRequest, StoreState, Ticket};

/// What a configuration made of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Membership {
    /// What it is.
    pub role: u8,
    /// The configuration that said so.
    pub epoch: Epoch,
}

/// A store that is open: recovery is over.
pub trait ReplicaStore {
    /// Does a request, which is answered with exactly one [`StoreAction::Reply`].
    fn submit(&mut self, now: Time, ticket: Ticket, request: StoreRequest);
    /// The device has finished an operation.
    fn disk_done(&mut self, now: Time, done: DiskDone);
    /// The time of [`poll_timeout`](Self::poll_timeout) has come.
    fn handle_timeout(&mut self, now: Time);
    /// What it wants done next.
    fn poll_action(&mut self) -> Option<StoreAction>;
    /// When it wants to be called again if nothing happens.
    fn poll_timeout(&self) -> Option<Time>;
    /// Every seal that is durable.
    fn seals(&self) -> Vec<(VolumeId, Generation)>;
    /// How a group's replica was named last; `None` if there is none here.
    fn membership(&self, group: GroupId) -> Option<Membership>;
    /// The replicas that are here, in order of their groups.
    fn replicas(&self) -> Vec<HeldReplica>;
    /// The commit sequence as it was recovered.
    fn recovered(&self) -> CommitSeq;
    /// The commit sequence now.
    fn commit(&self) -> CommitSeq;
    /// Blocks that volumes can use.
    fn capacity_blocks(&self) -> u64;
    /// Blocks of those that are taken.
    fn used_blocks(&self) -> u64;
    /// Why it acknowledges nothing any more.
    fn failed(&self) -> Option<DiskError>;
    /// How far the scrub of the device is.
    fn scrub_state(&self) -> ScrubState;
    /// Blocks that hold data.
    fn data_blocks(&self) -> u64;
    /// Blocks known to be damaged.
    fn damaged_blocks(&self) -> u64;
    /// Those of them that have been written anew since the start.
    fn mended_blocks(&self) -> u64;
    /// Where they are: a bounded number of runs, in order of the groups.
    fn damage(&self) -> impl Iterator<Item = (GroupId, Layer, BlockRange)> + '_;
    /// Whether this block is still known to be damaged.
    fn is_damaged(&self, block: &DamagedBlock) -> bool;
    /// Whether a part of the index of a group's replica is known to be lost: nobody can say any more what it holds.
    fn is_index_lost(&self, _group: GroupId) -> bool {
        false
    }
}

impl ReplicaStore for Store {
    fn submit(&mut self, now: Time, ticket: Ticket, request: StoreRequest) {
        Store::submit(self, now, ticket, request);
    }

    fn disk_done(&mut self, now: Time, done: DiskDone) {
        Store::handle_disk(self, now, done);
    }

    fn handle_timeout(&mut self, now: Time) {
        Store::handle_timeout(self, now);
    }

    fn poll_action(&mut self) -> Option<StoreAction> {
        Store::poll_action(self)
    }

    fn poll_timeout(&self) -> Option<Time> {
        Store::poll_timeout(self)
    }

    fn seals(&self) -> Vec<(VolumeId, Generation)> {
        Store::seals(self).collect()
    }

    fn membership(&self, group: GroupId) -> Option<Membership> {
        let replica = self.replica_of(group)?;
        Some(Membership {
            role: replica.role,
            epoch: replica.epoch,
        })
    }

    fn replicas(&self) -> Vec<HeldReplica> {
        let held = |replica: ReplicaInfo| HeldReplica {
            group: replica.group,
            epoch: replica.epoch,
        };
        Store::replicas(self).map(held).collect()
    }

    fn recovered(&self) -> CommitSeq {
        self.recovered_seq()
    }

    fn commit(&self) -> CommitSeq {
        self.commit_seq()
    }

    fn capacity_blocks(&self) -> u64 {
        let space = self.space();
        space.capacity.saturating_sub(space.reserved)
    }

    fn used_blocks(&self) -> u64 {
        let space = self.space();
        self.capacity_blocks()
            .saturating_sub(space.free.saturating_sub(space.reserved))
    }

    fn failed(&self) -> Option<DiskError> {
        match self.state() {
            StoreState::Poisoned(error) => Some(error),
            _ => None,
        }
    }

    fn scrub_state(&self) -> ScrubState {
        Store::scrub_state(self)
    }

    fn data_blocks(&self) -> u64 {
        self.space().data
    }

    fn damaged_blocks(&self) -> u64 {
        Store::damaged_blocks(self)
    }

    fn mended_blocks(&self) -> u64 {
        self.counters().blocks_mended
    }

    fn damage(&self) -> impl Iterator<Item = (GroupId, Layer, BlockRange)> + '_ {
        Store::damage(self)
    }

    fn is_damaged(&self, block: &DamagedBlock) -> bool {
        Store::is_damaged(self, block)
    }

    fn is_index_lost(&self, group: GroupId) -> bool {
        Store::is_index_lost(self, group)
    }
}
