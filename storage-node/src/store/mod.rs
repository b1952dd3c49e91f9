//! The store of one device: sans-I/O. See [the crate's page](crate) for formats and invariants.

pub mod api;
mod canary;
mod crc;
mod format;
pub mod limits;
mod status;
pub mod superblock;

use cairn_proto::disk::{DiskDone, DiskGeometry};
use cairn_proto::ids::{CommitSeq, Generation, GroupId, VolumeId};
use cairn_proto::time::Time;

pub use api::{StoreAction, StoreError, StoreReply, StoreRequest, Ticket};
pub use canary::Canary;
pub use format::Formatter;
pub use limits::StoreLimits;
pub use status::{Counters, FormatParams, OpenError, OpenExpectation, Progress, ReplicaInfo, Space, StoreState};
pub use superblock::{Identity, Probe, Superblock, probe};

/// The store of one device.
#[derive(Debug)]
pub struct Store {
    limits: StoreLimits,
}

impl Store {
    /// Starts to write a fresh device.
    pub fn format(_params: FormatParams, _geometry: DiskGeometry) -> Result<Formatter, OpenError> {
        unimplemented!()
    }

    /// Starts to open a device. It reads until [`Store::state`] is `Open` or `Refused`.
    pub fn open(_expect: OpenExpectation, _geometry: DiskGeometry, limits: StoreLimits, _now: Time) -> Store {
        Store { limits }
    }

    /// Takes a request; its answer comes from [`Store::poll_action`], perhaps at once.
    pub fn submit(&mut self, _now: Time, _ticket: Ticket, _request: StoreRequest) {
        unimplemented!()
    }

    /// An operation has completed.
    pub fn handle_disk(&mut self, _now: Time, _done: DiskDone) {
        unimplemented!()
    }

    /// The time of [`Store::poll_timeout`] has come. Calling it earlier does no harm.
    pub fn handle_timeout(&mut self, _now: Time) {
        unimplemented!()
    }

    /// What the store wants done next. Take until it is `None` after each call of the others.
    pub fn poll_action(&mut self) -> Option<StoreAction> {
        unimplemented!()
    }

    /// When it wants [`Store::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Time> {
        unimplemented!()
    }

    /// How far it is.
    pub fn state(&self) -> StoreState {
        unimplemented!()
    }

    /// Who the device is; `None` until its superblock is read.
    pub fn identity(&self) -> Option<Identity> {
        unimplemented!()
    }

    /// The last durable commit.
    pub fn commit_seq(&self) -> CommitSeq {
        unimplemented!()
    }

    /// The last durable commit as it was found when the device was opened: for the hello.
    pub fn recovered_seq(&self) -> CommitSeq {
        unimplemented!()
    }

    /// The highest generation seen of each volume, in order of the volumes. Durable ones only.
    pub fn seals(&self) -> impl Iterator<Item = (VolumeId, Generation)> {
        std::iter::empty()
    }

    /// The highest durable generation seen of a volume; [`Generation::NONE`] if none.
    pub fn seal_of(&self, _volume: VolumeId) -> Generation {
        unimplemented!()
    }

    /// The replicas, in order of the groups. Durable ones only.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaInfo> {
        std::iter::empty()
    }

    /// The replica of a group.
    pub fn replica_of(&self, _group: GroupId) -> Option<ReplicaInfo> {
        unimplemented!()
    }

    /// Space.
    pub fn space(&self) -> Space {
        unimplemented!()
    }

    /// What it has done since it was opened.
    pub fn counters(&self) -> Counters {
        unimplemented!()
    }

    /// The limits it was opened with.
    pub fn limits(&self) -> &StoreLimits {
        &self.limits
    }
}
