//! The store of one device: sans-I/O. See [the crate's page](crate) for formats and invariants.

mod allocator;
pub mod api;
mod apply;
mod batch;
mod canary;
mod catalog;
mod checkpoint;
mod checkpoint_header;
mod chunk;
mod collect;
mod crc;
mod directory;
mod doomed;
mod engine;
mod entry;
mod evacuate;
mod format;
mod freeze;
pub mod inspect;
mod io;
mod leaf;
pub mod limits;
mod load;
mod mend;
mod mover;
mod page_table;
mod plan;
mod read;
mod reclaim;
mod record;
mod recovery;
mod scrub;
mod scrub_state;
mod space;
mod status;
pub mod superblock;
mod unflushed;
mod window;
mod zero_ahead;

use cairn_proto::disk::{DiskDone, DiskGeometry};
use cairn_proto::ids::{CommitSeq, Generation, GroupId, Layer, VolumeId};
use cairn_proto::time::Time;
use cairn_proto::units::BlockRange;

pub use api::{StoreAction, StoreError, StoreReply, StoreRequest, Ticket};
pub use canary::Canary;
pub use format::Formatter;
pub use limits::StoreLimits;
pub use scrub_state::{ScrubCursor, ScrubState};
pub use status::{Counters, FormatParams, OpenError, OpenExpectation, Progress, ReplicaInfo, Space, StoreState};
pub use superblock::{Identity, Probe, Superblock, probe};

use catalog::Replica;
use engine::Engine;
use io::Io;
use recovery::{Outcome, Recovery};

/// The store of one device.
#[derive(Debug)]
pub struct Store {
    limits: StoreLimits,
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Opening(Box<Recovery>),
    Running(Box<Engine>),
    Refused(Box<Refused>),
}

#[derive(Debug)]
struct Refused {
    error: OpenError,
    identity: Option<Identity>,
    io: Io,
}

impl Store {
    /// Starts to write a fresh device. Fails if the device is too short. The caller probes it first: everything on it
    /// is lost.
    pub fn format(params: FormatParams, geometry: DiskGeometry) -> Result<Formatter, OpenError> {
        Formatter::new(params, geometry)
    }

    /// Starts to open a device. It reads until [`Store::state`] is `Open` or `Refused`.
    pub fn open(expect: OpenExpectation, geometry: DiskGeometry, limits: StoreLimits, _now: Time) -> Store {
        let recovery = Recovery::new(expect, geometry, limits.clone());
        let inner = match recovery.refused_at_once() {
            Some(error) => Inner::Refused(Box::new(Refused {
                error,
                identity: None,
                io: Io::default(),
            })),
            None => Inner::Opening(Box::new(recovery)),
        };
        Store { limits, inner }
    }

    /// Takes a request; its answer comes from [`Store::poll_action`], perhaps at once. Requests in flight at the same
    /// time may be done in any order.
    pub fn submit(&mut self, now: Time, ticket: Ticket, request: StoreRequest) {
        let io = match &mut self.inner {
            Inner::Running(engine) if engine.opened => return engine.submit(now, ticket, request),
            Inner::Running(engine) => &mut engine.io,
            Inner::Opening(recovery) => &mut recovery.io,
            Inner::Refused(refused) => &mut refused.io,
        };
        io.reply(ticket, StoreReply::Failed(StoreError::Opening));
    }

    /// An operation has completed.
    pub fn handle_disk(&mut self, now: Time, done: DiskDone) {
        match &mut self.inner {
            Inner::Running(engine) => engine.handle_disk(now, done),
            Inner::Refused(_) => {}
            Inner::Opening(recovery) => match recovery.handle_disk(now, done) {
                Outcome::Working => {}
                Outcome::Refused(error) => {
                    self.inner = Inner::Refused(Box::new(Refused {
                        error,
                        identity: recovery.identity,
                        io: std::mem::take(&mut recovery.io),
                    }));
                }
                Outcome::Ready(mut engine, erase) => {
                    engine.begin(now, erase);
                    self.inner = Inner::Running(engine);
                }
            },
        }
    }

    /// The time of [`Store::poll_timeout`] has come. Calling it earlier does no harm.
    pub fn handle_timeout(&mut self, now: Time) {
        match &mut self.inner {
            Inner::Running(engine) => engine.handle_timeout(now),
            Inner::Opening(recovery) => recovery.handle_timeout(now),
            Inner::Refused(_) => {}
        }
    }

    /// What the store wants done next. Take until it is `None` after each call of the others, or after several: the
    /// requests that come between share a commit.
    pub fn poll_action(&mut self) -> Option<StoreAction> {
        match &mut self.inner {
            Inner::Running(engine) => engine.poll_action(),
            Inner::Opening(recovery) => recovery.io.pop(),
            Inner::Refused(refused) => refused.io.pop(),
        }
    }

    /// Like [`Store::poll_action`], but begins nothing new. For a caller that answers requests with new ones at once: taken
    /// before `poll_action`, it lets those share the next commit.
    pub fn poll_ready(&mut self) -> Option<StoreAction> {
        match &mut self.inner {
            Inner::Running(engine) => engine.poll_ready(),
            Inner::Opening(_) | Inner::Refused(_) => self.poll_action(),
        }
    }

    /// When it wants [`Store::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Time> {
        match &self.inner {
            Inner::Running(engine) => engine.poll_timeout(),
            Inner::Opening(recovery) => recovery.poll_timeout(),
            Inner::Refused(_) => None,
        }
    }

    fn engine(&self) -> Option<&Engine> {
        match &self.inner {
            Inner::Running(engine) => Some(engine),
            Inner::Opening(_) | Inner::Refused(_) => None,
        }
    }

    /// How far it is.
    pub fn state(&self) -> StoreState {
        match &self.inner {
            Inner::Opening(recovery) => StoreState::Opening(recovery.progress),
            Inner::Refused(refused) => StoreState::Refused(refused.error.clone()),
            Inner::Running(engine) => match (engine.poisoned, engine.opened) {
                (Some(error), true) => StoreState::Poisoned(error),
                (Some(error), false) => StoreState::Refused(OpenError::Device {
                    doing: "writing the batch that ends recovery",
                    error,
                }),
                (None, true) => StoreState::Open,
                (None, false) => StoreState::Opening(Progress {
                    batches: engine.io.counters.replayed,
                    ..Progress::default()
                }),
            },
        }
    }

    /// Who the device is; `None` until its superblock is read.
    pub fn identity(&self) -> Option<Identity> {
        match &self.inner {
            Inner::Running(engine) => Some(engine.identity),
            Inner::Opening(recovery) => recovery.identity,
            Inner::Refused(refused) => refused.identity,
        }
    }

    /// The last durable commit. Zero before the store is open.
    pub fn commit_seq(&self) -> CommitSeq {
        CommitSeq(self.engine().map_or(0, |engine| engine.log.seq))
    }

    /// The last durable commit as it was found when the device was opened: for the hello. Zero before that.
    pub fn recovered_seq(&self) -> CommitSeq {
        CommitSeq(self.engine().map_or(0, |engine| engine.recovered_seq))
    }

    /// The highest generation seen of each volume, in order of the volumes. Durable ones only.
    pub fn seals(&self) -> impl Iterator<Item = (VolumeId, Generation)> {
        let engine = self.engine().into_iter();
        engine.flat_map(|engine| {
            engine
                .catalog
                .seals
                .iter()
                .map(|(volume, generation)| (*volume, *generation))
        })
    }

    /// The highest durable generation seen of a volume; [`Generation::NONE`] if none.
    pub fn seal_of(&self, volume: VolumeId) -> Generation {
        self.engine()
            .map_or(Generation::NONE, |engine| engine.catalog.seal_of(volume))
    }

    /// The replicas, in order of the groups. Durable ones only.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaInfo> {
        let engine = self.engine().into_iter();
        engine.flat_map(|engine| {
            engine
                .catalog
                .replicas
                .iter()
                .map(|(group, replica)| info(*group, replica))
        })
    }

    /// The durable replica of a group.
    pub fn replica_of(&self, group: GroupId) -> Option<ReplicaInfo> {
        let replica = self.engine()?.catalog.replicas.get(&group)?;
        Some(info(group, replica))
    }

    /// The layers of a group's replica that have data, in order, and their blocks of data. Durable ones only.
    pub fn layers_of(&self, group: GroupId) -> impl Iterator<Item = (Layer, u64)> {
        let all = (group, Layer(0))..=(group, Layer(u32::MAX));
        let engine = self.engine().into_iter();
        let layers = engine.flat_map(move |engine| engine.catalog.layers.range(all.clone()));
        layers.map(|((_, layer), blocks)| (*layer, *blocks))
    }

    /// What was dropped and still takes space, which is given back in the background: replicas (`None`), and layers of
    /// replicas.
    pub fn reclaiming(&self) -> impl Iterator<Item = (GroupId, Option<Layer>)> {
        let engine = self.engine().into_iter();
        let doomed = engine.flat_map(|engine| &engine.catalog.doomed);
        doomed.map(|doomed| (doomed.group, doomed.layer))
    }

    /// Space. All zero before the store is open.
    pub fn space(&self) -> Space {
        let Some(engine) = self.engine() else {
            return Space::default();
        };
        space_of(engine)
    }

    /// How far the scrub is, as the device knows it. All zero if there never was one.
    pub fn scrub_state(&self) -> ScrubState {
        self.engine()
            .and_then(|engine| engine.catalog.scrub)
            .unwrap_or_default()
    }

    /// Blocks known to be damaged: found by reads or by the scrub, and neither mended nor overwritten since. A bounded
    /// number is remembered, until the store is closed.
    pub fn damaged_blocks(&self) -> u64 {
        self.engine().map_or(0, |engine| engine.damaged.len() as u64)
    }

    /// Where those are, in order of group, chunk, layer and block.
    pub fn damage(&self) -> impl Iterator<Item = (GroupId, Layer, BlockRange)> + '_ {
        let damaged = self.engine().into_iter().flat_map(|engine| &engine.damaged);
        let mut blocks = damaged.copied().peekable();
        std::iter::from_fn(move || {
            let (key, start) = blocks.next()?;
            let mut count = 1;
            while blocks.next_if_eq(&(key, start + count)).is_some() {
                count += 1;
            }
            let range = BlockRange::new(key.chunk, start, count).expect("blocks of a chunk");
            Some((key.group, key.layer, range))
        })
    }

    /// Whether a block that was found damaged is still known to be.
    pub fn is_damaged(&self, found: &api::DamagedBlock) -> bool {
        let key = chunk::ChunkKey {
            group: found.group,
            chunk: found.chunk,
            layer: found.layer,
        };
        self.engine()
            .is_some_and(|engine| engine.damaged.contains(&(key, found.block)))
    }

    /// Whether a part of the index of a group's replica is known to be lost: its blocks are refused, and nobody can say any more
    /// what the replica holds, until it is dropped. What was not looked at since the device was opened may be lost too.
    pub fn is_index_lost(&self, group: GroupId) -> bool {
        self.engine().is_some_and(|engine| engine.catalog.is_index_lost(group))
    }

    /// The parts of the index that were lost when the device was opened; `None` before it is open.
    pub fn lost_parts(&self) -> Option<&status::LostParts> {
        self.engine().map(|engine| &engine.lost_parts)
    }

    /// What it has done since it was opened.
    pub fn counters(&self) -> Counters {
        match &self.inner {
            Inner::Running(engine) => Counters {
                index_pages_resident: engine.catalog.resident.len() as u64,
                index_pages_dirty: engine.catalog.dirty.len() as u64,
                leaves: engine.catalog.leaves.len() as u64,
                leaves_resident: engine.catalog.loaded.len() as u64,
                leaves_dirty: engine.catalog.dirty_leaves.len() as u64,
                index_bytes_resident: engine.catalog.memory() as u64,
                ..engine.io.counters
            },
            Inner::Opening(recovery) => recovery.io.counters,
            Inner::Refused(refused) => refused.io.counters,
        }
    }

    /// The limits it was opened with.
    pub fn limits(&self) -> &StoreLimits {
        &self.limits
    }

    /// Panics when something is counted twice or lost. Looks at all of the index in memory: for tests.
    pub fn check_invariants(&self) {
        if let Some(engine) = self.engine() {
            engine.check_invariants();
        }
    }
}

fn space_of(engine: &Engine) -> Space {
    let space = engine.space.allocator.space();
    Space {
        capacity: space.end - space.start,
        free: engine.space.free(),
        reserved: engine.metadata_reserve() + engine.limits.overwrite_reserve_blocks,
        data: engine.space.data_blocks,
    }
}

fn info(group: GroupId, replica: &Replica) -> ReplicaInfo {
    ReplicaInfo {
        group,
        role: replica.role,
        epoch: replica.epoch,
        blocks_used: replica.blocks,
    }
}

#[cfg(test)]
mod tests;
