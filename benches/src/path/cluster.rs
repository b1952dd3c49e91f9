//! A client and three nodes without sockets, and metadata that never change.

use std::collections::{BTreeMap, VecDeque};

use cairn_chaos::sim::wire;
use cairn_client::core::ClientCore;
use cairn_client::core::api::{
    Action, ConnId, CoreConfig, DeviceEntry, Event, Grant, GroupConfig, MetaAnswer, MetaQuestion, MetaReply,
    MetaRequest, VolumeDescription, VolumeHandle,
};
use cairn_client::core::limits::CoreLimits;
use cairn_client::volume::api::{OpId, VolumeOp};
use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::ids::{ClientId, ClusterId, DeviceId, DeviceUuid, Epoch, Generation, GroupCount, Incarnation, Layer};
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::message::Envelope;
use cairn_proto::units::ByteSize;
use cairn_storage_node::host::{self, DeviceHost, HostAction, HostConfig, HostEvent};
use cairn_storage_node::store::{FormatParams, Store, StoreLimits};

use crate::store::content::Content;
use crate::store::disk::{Disk as _, NullDevice, written};
use crate::store::driven::{VOLUME, now, open_on_null_device};
use crate::store::work::{Target, Work};

const CLUSTER: ClusterId = ClusterId([1; 16]);
const KEY: ClusterKey = ClusterKey([3; 32]);
const HANDLE: VolumeHandle = VolumeHandle(1);
const COPIES: u8 = 3;
/// Turns without an answer after which nobody waits any more.
const TURNS_MAX: u32 = 100_000;

struct Node {
    host: DeviceHost<Store>,
    disk: NullDevice,
}

/// A client and three nodes.
pub struct Cluster {
    core: ClientCore,
    nodes: Vec<Node>,
    /// The place of the node at the other end.
    conns: BTreeMap<ConnId, usize>,
    meta: VecDeque<MetaRequest>,
    content: Content,
    done: Vec<usize>,
    failed: Option<String>,
    frames: u64,
    device_bytes: u64,
}

fn device(node: u8) -> DeviceId {
    DeviceId {
        uuid: DeviceUuid([node + 1; 16]),
        incarnation: Incarnation(1),
    }
}

impl Cluster {
    /// With a volume of at least so many blocks.
    ///
    /// # Errors
    /// In words.
    pub fn start(blocks: u64) -> Result<Cluster, String> {
        let mut core = ClientCore::new(CoreConfig {
            cluster: CLUSTER,
            client: ClientId([9; 16]),
            limits: CoreLimits::DEFAULT,
        });
        let volume = VolumeDescription {
            id: VOLUME,
            name: "bench".to_string(),
            size: ByteSize((blocks * BLOCK_BYTES as u64).next_multiple_of(64 << 20)),
            groups: GroupCount::new(1).expect("one is allowed"),
            replicas: COPIES,
            write_quorum: 2,
            min_copies: 2,
            layer: Layer(0),
            checksum: ChecksumAlgorithm::Crc32,
        };
        let open = Event::OpenVolume {
            volume: HANDLE,
            description: volume,
        };
        core.handle(now(), open);
        let nodes = (0..COPIES).map(|node| Node::start(node, blocks));
        Ok(Cluster {
            core,
            nodes: nodes.collect::<Result<_, _>>()?,
            conns: BTreeMap::new(),
            meta: VecDeque::new(),
            content: Content::zeroes(),
            done: Vec::new(),
            failed: None,
            frames: 0,
            device_bytes: 0,
        })
    }

    /// Frames sent so far, both ways.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Everybody does what there is to do once.
    fn turn(&mut self) {
        self.act();
        for place in 0..self.nodes.len() {
            self.serve(place);
        }
        let at = now();
        if self.core.poll_timeout().is_some_and(|until| until <= at) {
            self.core.handle_timeout(at);
        }
        for node in &mut self.nodes {
            if node.host.poll_timeout().is_some_and(|until| until <= at) {
                node.host.handle_timeout(at);
            }
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Send { to, envelope } => self.send(&to, &envelope),
                Action::Reply { op, result, .. } => match result {
                    Ok(_) => self.done.push(op.0 as usize),
                    Err(error) => self.failed = Some(error.to_string()),
                },
                Action::Connect {
                    conn, device: wanted, ..
                } => {
                    let place = (0..COPIES).position(|node| device(node) == wanted);
                    self.connect(conn, place.expect("only these were named"));
                }
                Action::Meta(request) => self.meta.push_back(request),
                Action::Disconnect { .. } => self.failed = Some("a node was given up".to_string()),
                Action::Closed { .. } | Action::Report(_) | Action::Notice { .. } | Action::DeviceNotice { .. } => {}
            }
        }
        while let Some(request) = self.meta.pop_front() {
            let answer = MetaAnswer {
                request: request.request,
                result: Ok(meta_says(&request)),
            };
            self.core.handle(now(), Event::Meta(answer));
        }
    }

    fn connect(&mut self, conn: ConnId, place: usize) {
        self.conns.insert(conn, place);
        let peer = host::ConnId(conn.0);
        self.nodes[place]
            .host
            .handle(now(), HostEvent::Connected { conn: peer });
        self.core.handle(now(), Event::Connected { conn });
    }

    /// One encoding serves all of them, and each decodes.
    fn send(&mut self, to: &[ConnId], envelope: &Envelope) {
        let frame = envelope.encode();
        for conn in to {
            self.frames += 1;
            let envelope = wire::decode(&frame).expect("what was encoded is decoded");
            let (place, conn) = (self.conns[conn], host::ConnId(conn.0));
            self.nodes[place]
                .host
                .handle(now(), HostEvent::Frame { conn, envelope });
        }
    }

    fn serve(&mut self, place: usize) {
        loop {
            let node = &mut self.nodes[place];
            while let Some(action) = node.host.poll_action() {
                match action {
                    HostAction::Disk(op) => {
                        self.device_bytes += written(&op);
                        node.disk.submit(op);
                    }
                    HostAction::Send { conn, envelope } => {
                        self.frames += 1;
                        let envelope = wire::decode(&envelope.encode()).expect("what was encoded is decoded");
                        let conn = ConnId(conn.0);
                        self.core.handle(now(), Event::Frame { conn, envelope });
                    }
                    other => self.failed = Some(format!("a node wants {other:?}")),
                }
            }
            if node.disk.in_flight() == 0 {
                return;
            }
            while let Some(done) = node.disk.completion() {
                node.host.handle(now(), HostEvent::Disk(done));
            }
        }
    }
}

impl Node {
    fn start(node: u8, blocks: u64) -> Result<Node, String> {
        let limits = StoreLimits {
            // Nothing can be read back from a device that keeps nothing.
            index_memory_max: usize::MAX,
            ..StoreLimits::default()
        };
        let device = device(node);
        let params = FormatParams {
            cluster: CLUSTER,
            device: device.uuid,
            incarnation: device.incarnation,
            checksum: ChecksumAlgorithm::Crc32,
        };
        // Room for what is written anew while the old is not given back yet.
        let (disk, store) = open_on_null_device(blocks * 4 + (1 << 16), limits, params)?;
        let host = DeviceHost::new(now(), HostConfig::new(CLUSTER, KEY, device), store);
        Ok(Node { host, disk })
    }
}

fn meta_says(request: &MetaRequest) -> MetaReply {
    let generation = Generation::new(1).expect("not zero");
    let config = GroupConfig {
        epoch: Epoch(1),
        in_sync: (0..COPIES).map(device).collect(),
        ..GroupConfig::default()
    };
    let devices = (0..COPIES).map(|node| DeviceEntry {
        device: device(node),
        addresses: vec![format!("node-{node}:7402")],
    });
    match &request.question {
        MetaQuestion::Attach | MetaQuestion::Care => MetaReply::Attached {
            grant: Grant {
                generation,
                capability: Capability::grant(&KEY, CLUSTER, request.id, generation, Rights::Write),
            },
            groups: vec![config],
            devices: devices.collect(),
        },
        MetaQuestion::Detach { .. } => MetaReply::Detached,
        MetaQuestion::Refresh | MetaQuestion::Configure { .. } => unreachable!("nothing changes"),
    }
}

impl Target for Cluster {
    fn submit(&mut self, id: usize, work: Work) {
        let offset = work.block * BLOCK_BYTES as u64;
        let request = match work.write {
            true => VolumeOp::Write {
                offset,
                data: self.content.next(work.blocks),
            },
            false => VolumeOp::Read {
                offset,
                length: work.blocks * BLOCK_BYTES as u32,
            },
        };
        let (volume, op) = (HANDLE, OpId(id as u64));
        self.core.handle(now(), Event::Submit { volume, op, request });
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<(), String> {
        for _ in 0..TURNS_MAX {
            self.turn();
            if let Some(words) = self.failed.take() {
                return Err(words);
            }
            if !self.done.is_empty() {
                done.append(&mut self.done);
                return Ok(());
            }
        }
        Err(format!("no operation has ended in {TURNS_MAX} turns"))
    }

    fn device_bytes(&self) -> u64 {
        self.device_bytes
    }
}
