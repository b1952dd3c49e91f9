//! A storage node: production's store and replica host over a simulated device, and what its process does at the control
//! plane: open the device, register, stay.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_meta::limits::NODE_HEARTBEAT_MS;
use cairn_meta::state::command::{Command, DeviceRegistration, DeviceReport, RegisterNode};
use cairn_meta::state::model::FailureDomain;
use cairn_meta::state::{FEATURE_LEVEL, Outcome};
use cairn_proto::capability::ClusterKey;
use cairn_proto::disk::{DiskDone, DiskGeometry};
use cairn_proto::ids::{ClusterId, DeviceId, NodeId};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::time::Time;
use cairn_storage_node::host::limits::HostLimits;
use cairn_storage_node::host::{
    ConnId, DeviceHost, HeldReplica, HostAction, HostConfig, HostEvent, HostStatus, PeerId, ReplicaStore,
};
use cairn_storage_node::store::{OpenExpectation, Store, StoreAction, StoreLimits, StoreState};

use super::{Ctx, Input, Output, address_of, earliest, node_at};
use crate::sim::caller::{Caller, Ended};
use crate::sim::model_store::ModelStore;
use crate::sim::msg::{Answer, Heartbeat, Msg, Request};
use crate::sim::network::{Delivery, Link, Side};
use crate::sim::process::Process;
use crate::sim::wire;

/// After so many heartbeats it says what it holds.
const INVENTORY_BEATS: u64 = 4;

/// What a node process needs to start.
#[derive(Clone, Debug)]
pub struct NodeSetup {
    /// Which one.
    pub index: u8,
    /// How often the process has been started.
    pub run: u32,
    /// Metadata servers.
    pub metas: u8,
    /// Its cluster.
    pub cluster: ClusterId,
    /// The cluster's key.
    pub key: ClusterKey,
    /// Its device.
    pub device: DeviceId,
    /// The device's length and kind.
    pub geometry: DiskGeometry,
    /// The rack that it stands in.
    pub rack: String,
    /// For the host.
    pub host: HostLimits,
    /// A planted bug of the host.
    #[cfg(feature = "canary")]
    pub canary: cairn_storage_node::host::Canary,
}

/// What a node starts from.
pub enum StoreChoice {
    /// Production's store, which opens the device.
    Production(StoreLimits),
    /// The model of a store.
    Model(ModelStore),
}

enum Stage {
    Opening(Box<Store>),
    /// On the model of a store, before its process has been started.
    Ready(Box<ModelStore>),
    Serving(Box<dyn Host>),
    Dead,
}

/// A replica host on either store.
trait Host {
    fn handle(&mut self, now: Time, event: HostEvent);
    fn handle_timeout(&mut self, now: Time);
    fn poll_action(&mut self) -> Option<HostAction>;
    fn poll_timeout(&self) -> Option<Time>;
    fn status(&self) -> HostStatus;
    fn inventory(&self) -> Vec<HeldReplica>;
}

impl<S: ReplicaStore> Host for DeviceHost<S> {
    fn handle(&mut self, now: Time, event: HostEvent) {
        DeviceHost::handle(self, now, event);
    }
    fn handle_timeout(&mut self, now: Time) {
        DeviceHost::handle_timeout(self, now);
    }
    fn poll_action(&mut self) -> Option<HostAction> {
        DeviceHost::poll_action(self)
    }
    fn poll_timeout(&self) -> Option<Time> {
        DeviceHost::poll_timeout(self)
    }
    fn status(&self) -> HostStatus {
        DeviceHost::status(self)
    }
    fn inventory(&self) -> Vec<HeldReplica> {
        DeviceHost::inventory(self)
    }
}

/// A storage node process.
pub struct NodeActor {
    setup: NodeSetup,
    stage: Stage,
    /// Its connections to other nodes.
    peers: BTreeMap<PeerId, Link>,
    links: BTreeMap<Link, PeerId>,
    caller: Caller,
    /// As meta calls it.
    registered: Option<NodeId>,
    /// When it speaks to meta next.
    beat_at: Option<Time>,
    beats: u64,
}

impl NodeActor {
    /// A process that has just started.
    pub fn new(setup: NodeSetup, store: StoreChoice, now: Time) -> NodeActor {
        let expect = OpenExpectation {
            cluster: Some(setup.cluster),
            device: Some(setup.device.uuid),
        };
        let stage = match store {
            StoreChoice::Production(limits) => {
                Stage::Opening(Box::new(Store::open(expect, setup.geometry, limits, now)))
            }
            StoreChoice::Model(store) => Stage::Ready(Box::new(store)),
        };
        NodeActor {
            stage,
            caller: Caller::new(setup.metas, u64::from(setup.run) << 32),
            peers: BTreeMap::new(),
            links: BTreeMap::new(),
            registered: None,
            beat_at: None,
            beats: 0,
            setup,
        }
    }

    /// How its device is; `None` while it is being opened.
    pub fn status(&self) -> Option<HostStatus> {
        match &self.stage {
            Stage::Serving(host) => Some(host.status()),
            _ => None,
        }
    }

    pub(super) fn start(&mut self, ctx: &mut Ctx<'_>) {
        if let Stage::Ready(_) = &self.stage {
            let Stage::Ready(store) = std::mem::replace(&mut self.stage, Stage::Dead) else {
                unreachable!("matched above");
            };
            self.serve(ctx, *store);
        }
        self.act(ctx);
    }

    pub(super) fn handle(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        match input {
            Input::Disk(done) => self.disk_done(ctx, done),
            Input::Net(Delivery::Message {
                message: Msg::Answer { id, answer },
                ..
            }) => {
                if let Some(ended) = self.caller.answered(ctx.now, id, answer) {
                    self.call_ended(ctx, ended);
                }
            }
            Input::Net(delivery) => self.delivered(ctx, delivery),
            Input::Guest(_) | Input::Operator(_) => unreachable!("a node has no guests and takes no orders"),
        }
        self.act(ctx);
    }

    pub(super) fn handle_timeout(&mut self, ctx: &mut Ctx<'_>) {
        let mut calls = Vec::new();
        let ended = self.caller.handle_timeout(ctx.now, &mut calls);
        ctx.send_calls(calls);
        for ended in ended {
            self.call_ended(ctx, ended);
        }
        if self.beat_at.is_some_and(|at| at <= ctx.now) {
            self.beat_at = None;
            self.beat(ctx);
        }
        match &mut self.stage {
            Stage::Opening(store) if store.poll_timeout().is_some_and(|at| at <= ctx.now) => {
                store.handle_timeout(ctx.now)
            }
            Stage::Serving(host) if host.poll_timeout().is_some_and(|at| at <= ctx.now) => host.handle_timeout(ctx.now),
            _ => {}
        }
        self.act(ctx);
    }

    pub(super) fn timeout(&self) -> Option<Time> {
        let stage = match &self.stage {
            Stage::Opening(store) => store.poll_timeout(),
            Stage::Serving(host) => host.poll_timeout(),
            Stage::Dead | Stage::Ready(_) => None,
        };
        earliest(earliest(stage, self.caller.timeout()), self.beat_at)
    }

    fn disk_done(&mut self, ctx: &mut Ctx<'_>, done: DiskDone) {
        match &mut self.stage {
            Stage::Opening(store) => store.handle_disk(ctx.now, done),
            Stage::Serving(host) => host.handle(ctx.now, HostEvent::Disk(done)),
            Stage::Dead | Stage::Ready(_) => {}
        }
    }

    fn delivered(&mut self, ctx: &mut Ctx<'_>, delivery: Delivery<Msg>) {
        let Stage::Serving(host) = &mut self.stage else {
            // Its socket is not open yet.
            if let Delivery::Accepted { link, .. } = delivery {
                ctx.net.close(ctx.world, link, Side::Callee);
            }
            return;
        };
        let event = match delivery {
            Delivery::Accepted { link, .. } => HostEvent::Connected { conn: ConnId(link.0) },
            Delivery::Connected { link } => match self.links.get(&link) {
                Some(peer) => HostEvent::PeerConnected { peer: *peer },
                None => return,
            },
            Delivery::Closed { link, .. } => match self.links.remove(&link) {
                Some(peer) => {
                    self.peers.remove(&peer);
                    HostEvent::PeerEnded { peer }
                }
                None => HostEvent::Disconnected { conn: ConnId(link.0) },
            },
            Delivery::Frame { link, frame } if self.links.contains_key(&link) => match wire::decode(&frame) {
                Ok(envelope) => HostEvent::PeerFrame {
                    peer: self.links[&link],
                    envelope,
                },
                Err(_) => {
                    ctx.net.close(ctx.world, link, Side::Caller);
                    let peer = self.links.remove(&link).expect("it was just there");
                    self.peers.remove(&peer);
                    HostEvent::PeerEnded { peer }
                }
            },
            Delivery::Frame { link, frame } => match wire::decode(&frame) {
                Ok(envelope) => HostEvent::Frame {
                    conn: ConnId(link.0),
                    envelope,
                },
                Err(error) => HostEvent::BadFrame {
                    conn: ConnId(link.0),
                    error,
                },
            },
            Delivery::Message { .. } => return,
        };
        host.handle(ctx.now, event);
    }

    fn act(&mut self, ctx: &mut Ctx<'_>) {
        if let Stage::Opening(store) = &mut self.stage {
            while let Some(action) = store.poll_action() {
                match action {
                    StoreAction::Disk(op) => ctx.out.push(Output::Disk(op)),
                    StoreAction::Reply(ticket, reply) => {
                        ctx.out.push(Output::Broken(format!(
                            "an answer nobody asked for: {ticket:?} {reply:?}"
                        )));
                    }
                }
            }
            self.opened(ctx);
        }
        let Stage::Serving(host) = &mut self.stage else { return };
        while let Some(action) = host.poll_action() {
            match action {
                HostAction::Send { conn, envelope } => {
                    if let cairn_proto::message::Message::Failed(failed) = &envelope.message {
                        ctx.note(format_args!("refuses #{}: {failed}", envelope.correlation));
                    }
                    ctx.net.send(ctx.world, Link(conn.0), Side::Callee, envelope.encode());
                }
                HostAction::Close { conn, reason } => {
                    ctx.note(format_args!("closes {conn}: {reason}"));
                    ctx.net.close(ctx.world, Link(conn.0), Side::Callee);
                }
                HostAction::Reach { peer, address } => {
                    let Some(node) = node_at(&address) else {
                        host.handle(ctx.now, HostEvent::PeerEnded { peer });
                        continue;
                    };
                    let link = ctx.net.connect(ctx.world, ctx.me, node);
                    self.peers.insert(peer, link);
                    self.links.insert(link, peer);
                }
                HostAction::SendPeer { peer, envelope } => {
                    if let Some(link) = self.peers.get(&peer) {
                        ctx.net.send(ctx.world, *link, Side::Caller, envelope.encode());
                    }
                }
                HostAction::ClosePeer { peer } => {
                    if let Some(link) = self.peers.remove(&peer) {
                        self.links.remove(&link);
                        ctx.net.close(ctx.world, link, Side::Caller);
                    }
                }
                HostAction::Disk(op) => ctx.out.push(Output::Disk(op)),
            }
        }
    }

    /// Goes on as soon as the device is open.
    fn opened(&mut self, ctx: &mut Ctx<'_>) {
        let Stage::Opening(store) = &self.stage else { return };
        match store.state() {
            StoreState::Opening(_) => {}
            StoreState::Open => {
                let Stage::Opening(store) = std::mem::replace(&mut self.stage, Stage::Dead) else {
                    unreachable!("matched above");
                };
                ctx.note(format_args!("has opened its device at commit {}", store.commit_seq()));
                self.serve(ctx, *store);
            }
            StoreState::Poisoned(error) => ctx.out.push(Output::Unusable(format!("{}: poisoned: {error}", ctx.me))),
            StoreState::Refused(error) => {
                ctx.out
                    .push(Output::Unusable(format!("{} can't open its device: {error}", ctx.me)));
            }
        }
    }

    fn serve<S: ReplicaStore + 'static>(&mut self, ctx: &mut Ctx<'_>, store: S) {
        let host = DeviceHost::new(ctx.now, self.host_config(), store);
        self.stage = Stage::Serving(Box::new(host));
        self.register(ctx);
    }

    fn host_config(&self) -> HostConfig {
        let setup = &self.setup;
        #[cfg_attr(not(feature = "canary"), allow(unused_mut))]
        let mut config = HostConfig {
            limits: setup.host,
            ..HostConfig::new(setup.cluster, setup.key.clone(), setup.device)
        };
        #[cfg(feature = "canary")]
        {
            config.canary = setup.canary;
        }
        config
    }

    fn register(&mut self, ctx: &mut Ctx<'_>) {
        let Some(status) = self.status() else { return };
        let setup = &self.setup;
        let name = Process::Node(setup.index).to_string();
        let device = DeviceRegistration {
            id: setup.device,
            addresses: vec![address_of(Process::Node(setup.index))],
            capacity_bytes: status.capacity_blocks * BLOCK_BYTES as u64,
            used_bytes: status.used_blocks * BLOCK_BYTES as u64,
            commit_seq: status.commit,
            cluster: Some(setup.cluster),
            displace: false,
        };
        let command = RegisterNode {
            domain: FailureDomain {
                room: String::new(),
                rack: setup.rack.clone(),
                host: name.clone(),
            },
            name,
            run: self.run(),
            version: "simulated".to_string(),
            feature_level: FEATURE_LEVEL,
            devices: vec![device],
        };
        let mut calls = Vec::new();
        let request = Request::Command(Command::RegisterNode(command));
        self.caller.call(ctx.now, request, &mut calls);
        ctx.send_calls(calls);
    }

    /// What tells this run of the process from others.
    fn run(&self) -> [u8; 16] {
        let mut run = [0; 16];
        run[..4].copy_from_slice(&self.setup.run.to_le_bytes());
        run[4] = self.setup.index;
        run
    }

    /// Says how it is; now and then what it holds.
    fn beat(&mut self, ctx: &mut Ctx<'_>) {
        let (Some(node), Some(status)) = (self.registered, self.status()) else {
            return self.register(ctx);
        };
        let device = DeviceReport {
            id: self.setup.device,
            capacity_bytes: status.capacity_blocks * BLOCK_BYTES as u64,
            used_bytes: status.used_blocks * BLOCK_BYTES as u64,
            commit_seq: status.commit,
            failed: status.failed.is_some(),
            trouble: status.failed.unwrap_or_default(),
        };
        let heartbeat = Heartbeat {
            node,
            run: self.run(),
            device,
            held: status.held,
            damaged: status.damaged_volumes,
        };
        self.beats += 1;
        let mut calls = Vec::new();
        let request = Request::Heartbeat(Box::new(heartbeat));
        self.caller.call(ctx.now, request, &mut calls);
        if let Stage::Serving(host) = &self.stage
            && self.beats.is_multiple_of(INVENTORY_BEATS)
        {
            let request = Request::Inventory(self.setup.device, host.inventory());
            self.caller.call(ctx.now, request, &mut calls);
        }
        ctx.send_calls(calls);
    }

    fn call_ended(&mut self, ctx: &mut Ctx<'_>, (_, answer): Ended) {
        let again = Some(ctx.now + Duration::from_millis(NODE_HEARTBEAT_MS.into()));
        match answer {
            Some(Answer::Done {
                outcome: Outcome::Registered { node, devices },
                ..
            }) => {
                ctx.note(format_args!("is registered as {node}: {devices:?}"));
                // A device that another node serves still, as far as meta knows: later.
                let is_refused = devices.iter().any(|device| device.refusal.is_some());
                self.registered = (!is_refused).then_some(node);
                self.beat_at = again;
            }
            Some(Answer::Unneeded(replicas)) => {
                if let Stage::Serving(host) = &mut self.stage
                    && !replicas.is_empty()
                {
                    ctx.note(format_args!("drops {replicas:?}"));
                    host.handle(ctx.now, HostEvent::Drop { replicas });
                }
            }
            Some(Answer::Refused(refusal)) if self.registered.is_some() => {
                ctx.note(format_args!("is refused: {refusal}"));
                self.registered = None;
                self.beat_at = again;
            }
            Some(Answer::Refused(refusal)) => {
                ctx.out
                    .push(Output::Broken(format!("{} can't register: {refusal}", ctx.me)));
            }
            _ => self.beat_at = again,
        }
    }
}
