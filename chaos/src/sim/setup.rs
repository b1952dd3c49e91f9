//! What the processes of a world begin with, and what is left of them when they end.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use cairn_client::core::api::CoreConfig;
use cairn_client::core::limits::CoreLimits;
use cairn_meta::heal::HealSettings;
use cairn_meta::log::memory::MemoryLogStore;
use cairn_meta::raft::bootstrap;
use cairn_meta::state::model::{Member, Spread};
use cairn_proto::capability::ClusterKey;
use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::ids::{ClientId, ClusterId, DeviceId, DeviceUuid, Incarnation};
use cairn_proto::time::Time;
use cairn_storage_node::host::limits::HostLimits;
use cairn_storage_node::store::{FormatParams, Store, StoreLimits};
use cairn_storage_node::testing::MemoryDevice;

use super::actors::Actor;
use super::actors::caretaker::CaretakerActor;
use super::actors::client::{ClientActor, ClientSetup};
use super::actors::meta::{MetaActor, MetaSetup};
use super::actors::node::{NodeActor, NodeSetup, StoreChoice};
use super::actors::operator::OperatorActor;
use super::clock::Clock;
use super::disk::Disk;
use super::inspect::Inspected;
use super::model_store::{Kept, ModelStore};
use super::options::Options;
use super::process::Process;
use crate::rng::{Rng, mix};

/// Copies of each group.
pub(super) const REPLICAS: u8 = 3;

/// What outlives processes, but for the disks.
pub(super) struct Setup {
    seed: u64,
    metas: u8,
    cluster: ClusterId,
    key: ClusterKey,
    store: StoreLimits,
    host: HostLimits,
    core: CoreLimits,
    meta_snapshots: (u64, u64),
    meta_flush: Duration,
    heal: HealSettings,
    /// Where nodes stand: in so many racks; none if zero.
    racks: u8,
    /// The device that each node has.
    devices: Vec<DeviceId>,
    /// How many devices there ever were.
    devices_made: u8,
    logs: BTreeMap<u8, MemoryLogStore>,
    /// One per node, where nodes run on the model of a store.
    models: Vec<Rc<RefCell<Kept>>>,
    #[cfg(feature = "canary")]
    planted: Option<super::canary::Planted>,
}

impl Setup {
    /// For the world of these options.
    pub(super) fn new(options: &Options) -> Setup {
        let mut rng = Rng::stream(options.seed, "setup");
        let members: BTreeMap<u64, Member> = (1..=u64::from(options.metas)).map(|id| (id, member(id))).collect();
        let first = bootstrap(members);
        let logs = (0..options.metas)
            .map(|i| (i, MemoryLogStore::new(first.clone())))
            .collect();
        let mut bytes = || std::array::from_fn(|_| rng.word() as u8);
        let (cluster, key) = (ClusterId(bytes()), bytes());
        let mut secret = [0; 32];
        secret[..16].copy_from_slice(&key);
        Setup {
            seed: options.seed,
            metas: options.metas,
            cluster,
            key: ClusterKey(secret),
            store: store_limits(options, &mut rng),
            host: host_limits(options, &mut rng),
            core: core_limits(options, &mut rng),
            meta_snapshots: *rng.pick(&[(8, 2), (30, 10), (4096, 1024)]),
            meta_flush: Duration::from_micros(*rng.pick(&[0, 300, 4000])),
            heal: HealSettings {
                rebuild_after: options.rebuild_after,
            },
            racks: options.racks,
            devices: (0..options.nodes).map(|i| first_device(options.seed, i)).collect(),
            devices_made: options.nodes,
            logs,
            models: (0..options.nodes)
                .filter(|_| options.model_store)
                .map(|_| Rc::default())
                .collect(),
            #[cfg(feature = "canary")]
            planted: options.planted,
        }
    }

    /// The member that a node's device is.
    pub(super) fn device(&self, node: u8) -> DeviceId {
        self.devices[usize::from(node)]
    }

    /// The node that has a device now.
    pub(super) fn node_of(&self, device: &DeviceId) -> Option<u8> {
        let node = self.devices.iter().position(|known| known == device)?;
        Some(u8::try_from(node).expect("few nodes"))
    }

    /// The rack of a node.
    pub(super) fn rack(&self, node: u8) -> Option<u8> {
        (self.racks > 0).then(|| node % self.racks)
    }

    /// The device of a node is formatted anew, or another, empty one takes its place. Its process does not run.
    pub(super) fn renew(&mut self, node: u8, other: bool, disk: &mut Disk) {
        let id = &mut self.devices[usize::from(node)];
        if other {
            *id = first_device(self.seed, self.devices_made);
            self.devices_made += 1;
        } else {
            id.incarnation.0 += 1;
        }
        if let Some(model) = self.models.get_mut(usize::from(node)) {
            *model = Rc::default();
        }
        disk.heal();
        disk.device.wipe();
        self.format(node, disk);
    }

    /// Whether a device was ever formatted anew or replaced.
    pub(super) fn has_renewed(&self) -> bool {
        let is_first =
            |id: &DeviceId| usize::from(id.uuid.0[15]) < self.devices.len() && id.incarnation == Incarnation(1);
        !self.devices.iter().all(is_first)
    }

    /// Two nodes, whose processes do not run, have each other's device from now on.
    pub(super) fn swap(&mut self, (a, b): (u8, u8)) {
        let (a, b) = (usize::from(a), usize::from(b));
        self.devices.swap(a, b);
        if !self.models.is_empty() {
            self.models.swap(a, b);
        }
    }

    /// Formats the device of a node, at once.
    pub(super) fn format(&self, node: u8, disk: &mut Disk) {
        if !self.models.is_empty() {
            return;
        }
        let device = self.device(node);
        let params = FormatParams {
            cluster: self.cluster,
            device: device.uuid,
            incarnation: device.incarnation,
            checksum: ChecksumAlgorithm::Crc32,
        };
        let mut formatter = Store::format(params, disk.device.geometry()).expect("the length is allowed");
        loop {
            let mut tokens = Vec::new();
            while let Some(op) = formatter.poll_op() {
                tokens.push(disk.submit(op).0);
            }
            if tokens.is_empty() {
                break;
            }
            for token in tokens {
                let done = disk.complete(token).expect("it is not stuck");
                formatter.handle_disk(done);
            }
        }
        formatter
            .result()
            .expect("it has nothing left to do")
            .expect("the device is good");
    }

    /// Opens the device of a node to look at it.
    ///
    /// # Errors
    /// In words, when it can't be opened.
    pub(super) fn inspect(&self, node: u8, disk: &Disk) -> Result<Inspected, String> {
        self.inspect_device(node, disk.device.clone())
    }

    /// The same for a copy of a node's device to which something has been done.
    ///
    /// # Errors
    /// In words, when it can't be opened.
    pub(super) fn inspect_device(&self, node: u8, device: MemoryDevice) -> Result<Inspected, String> {
        match self.models.get(usize::from(node)) {
            Some(kept) => Ok(Inspected::of_model(kept.clone())),
            None => Inspected::open(device, &self.store),
        }
    }

    /// The clock of a process: it goes on while the process does not run.
    pub(super) fn clock(&self, process: Process, options: &Options) -> Clock {
        let mut rng = Rng::stream(options.seed, &format!("clock-{process}"));
        let drift = rng.within(0, 2 * options.drift_ppm) as i64 - options.drift_ppm as i64;
        Clock::new(rng.within(0, 1 << 40), drift)
    }

    /// A process that has just started.
    pub(super) fn actor(&mut self, process: Process, run: u32, disks: &[Disk], now: Time) -> Actor {
        match process {
            Process::Meta(index) => Actor::Meta(Box::new(MetaActor::new(MetaSetup {
                index,
                run,
                cluster: self.cluster,
                snapshots: self.meta_snapshots,
                flush: self.meta_flush,
                heal: self.heal,
                log: self.logs.remove(&index).expect("its earlier run gave the log back"),
                rng: Rng::stream(self.seed, &format!("meta-{index}-{run}")),
                #[cfg(feature = "canary")]
                neglected: self.planted.and_then(super::canary::Planted::meta),
            }))),
            Process::Node(index) => {
                let setup = NodeSetup {
                    index,
                    run,
                    metas: self.metas,
                    cluster: self.cluster,
                    key: self.key.clone(),
                    device: self.device(index),
                    geometry: disks[usize::from(index)].device.geometry(),
                    rack: self.rack(index).map(|rack| format!("rack-{rack}")).unwrap_or_default(),
                    host: self.host,
                    #[cfg(feature = "canary")]
                    canary: self.planted.map_or_else(Default::default, super::canary::Planted::host),
                };
                let store = match self.models.get(usize::from(index)) {
                    Some(kept) => {
                        let mut rng = Rng::stream(self.seed, &format!("model-{index}-{run}"));
                        StoreChoice::Model(ModelStore::open(kept.clone(), &mut rng))
                    }
                    None => StoreChoice::Production(self.store.clone()),
                };
                Actor::Node(Box::new(NodeActor::new(setup, store, now)))
            }
            Process::Client(index) => Actor::Client(Box::new(ClientActor::new(&self.client(index, run)))),
            Process::Caretaker(index) => {
                let client = self.client(0x80 | index, run);
                Actor::Caretaker(Box::new(CaretakerActor::new(&client, index)))
            }
            Process::Operator => {
                let spread = if self.racks > 0 { Spread::Rack } else { Spread::Host };
                Actor::Operator(Box::new(OperatorActor::new(self.metas, REPLICAS, spread)))
            }
        }
    }

    fn client(&self, index: u8, run: u32) -> ClientSetup {
        ClientSetup {
            config: self.core_config(index, run),
            metas: self.metas,
            run,
            key: self.key.clone(),
        }
    }

    fn core_config(&self, client: u8, run: u32) -> CoreConfig {
        let mut id = [0; 16];
        id[0] = client + 1;
        id[1..5].copy_from_slice(&run.to_le_bytes());
        CoreConfig {
            cluster: self.cluster,
            client: ClientId(id),
            limits: self.core,
        }
    }

    /// A metadata server has ended. With the power, what was not flushed may be lost; what was written may stay.
    pub(super) fn meta_stopped(&mut self, process: Process, actor: Actor, rng: &mut Rng) {
        let (Process::Meta(index), Actor::Meta(actor)) = (process, actor) else {
            return;
        };
        let mut log = actor.into_log();
        let kept = rng.index(log.unflushed() + 1);
        log.crash(kept);
        self.logs.insert(index, log);
    }
}

fn first_device(seed: u64, number: u8) -> DeviceId {
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&mix(seed).to_le_bytes());
    uuid[15] = number;
    DeviceId {
        uuid: DeviceUuid(uuid),
        incarnation: Incarnation(1),
    }
}

fn member(id: u64) -> Member {
    Member {
        address: super::actors::address_of(Process::Meta((id - 1) as u8)),
        directory: id,
    }
}

fn store_limits(options: &Options, rng: &mut Rng) -> StoreLimits {
    let zero_ahead = rng.permille(300);
    #[cfg_attr(
        not(feature = "canary"),
        expect(unused_mut, reason = "bugs are planted with the feature only")
    )]
    let mut limits = if options.tiny_limits {
        StoreLimits::tiny()
    } else {
        StoreLimits::default()
    };
    #[cfg(feature = "canary")]
    if let Some(planted) = options.planted {
        limits.canary = planted.store();
    }
    StoreLimits { zero_ahead, ..limits }
}

fn host_limits(options: &Options, rng: &mut Rng) -> HostLimits {
    let mut limits = HostLimits::default();
    if options.tiny_limits && rng.permille(500) {
        limits.store_requests = rng.within(1, 8) as usize;
        limits.requests_in_flight = rng.within(4, 64) as u32;
    }
    let mut rng = Rng::stream(options.seed, "fetching");
    if options.tiny_limits && rng.permille(500) {
        limits.fetches = rng.within(1, 6) as usize;
        limits.fetches_per_peer = rng.within(1, 3) as usize;
        limits.fetch_peers = rng.within(1, 3) as usize;
        limits.fetch_bytes = rng.within(1, 64) << 12;
        limits.fetch_idle = Duration::from_millis(rng.within(20, 10_000));
    }
    limits
}

fn core_limits(options: &Options, rng: &mut Rng) -> CoreLimits {
    let mut limits = CoreLimits::default();
    if options.tiny_limits {
        let replication = &mut limits.replication;
        replication.lag_bytes_max = rng.within(1, 64) << 10;
        replication.lag_ops_max = rng.within(1, 32) as usize;
        replication.lack_chunks_exact_max = rng.within(1, 3) as usize;
        replication.copy_blocks = *rng.pick(&[16, 64]);
        replication.copies_in_flight = rng.within(1, 3) as usize;
        limits.volume.ops_max = rng.within(1, 6) as usize;
    }
    // Faults last for seconds, so patience does too; some seeds keep what production has.
    if rng.permille(800) {
        let replication = &mut limits.replication;
        replication.eject_after = rng.span(Duration::from_millis(300), Duration::from_secs(4));
        replication.eject_inexact_after = replication.eject_after / 3;
        replication.rejoin_min = Duration::from_millis(rng.within(100, 1000));
        replication.rejoin_max = Duration::from_secs(rng.within(1, 8));
        replication.well_after = Duration::from_millis(rng.within(100, 1000));
    }
    // Ways between nodes are cut for seconds: some seeds try them again while the cut lasts.
    let mut rng = Rng::stream(options.seed, "fetches");
    limits.replication.fetch_pause = Duration::from_millis(*rng.pick(&[200, 2_000, 30_000]));
    #[cfg(feature = "canary")]
    if let Some(planted) = options.planted {
        limits.replication.canary = planted.coordinator();
    }
    limits
}
