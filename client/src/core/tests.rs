//! A client against nodes that hold blocks in a map, and a driver that loses connections.

mod care;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::block::{BlockState, Content};
use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::ids::*;
use cairn_proto::limits::BLOCK_BYTES;
use cairn_proto::message::*;
use cairn_proto::units::ByteSize;

use super::api::*;
use super::limits::CoreLimits;
use super::*;
use crate::volume::api::VolumeReply;

const CLUSTER: ClusterId = ClusterId([1; 16]);
const V: VolumeHandle = VolumeHandle(1);

#[derive(Default)]
struct Node {
    cluster: ClusterId,
    seal: Generation,
    blocks: BTreeMap<(ChunkIndex, u32), (BlockState, Bytes)>,
    limits: PeerLimits,
    /// Takes requests and does not answer.
    mute: bool,
}

struct Bench {
    core: ClientCore,
    now: Time,
    nodes: BTreeMap<DeviceId, Node>,
    conns: BTreeMap<ConnId, DeviceId>,
    refuse: bool,
    meta_down: bool,
    generation: u32,
    configs: Vec<GroupConfig>,
    replies: BTreeMap<OpId, Result<VolumeReply, VolumeError>>,
    asked: Vec<MetaQuestion>,
    sent: BTreeMap<&'static str, u64>,
    words: Vec<String>,
    closed: bool,
    reports: Vec<(Time, AttachmentReport)>,
    classes: BTreeSet<u8>,
    /// A guest holds the volume, so no caretaker gets it.
    held: bool,
}

fn device(number: u8) -> DeviceId {
    DeviceId {
        uuid: DeviceUuid([number; 16]),
        incarnation: Incarnation(1),
    }
}

fn description() -> VolumeDescription {
    VolumeDescription {
        id: VolumeId(5),
        name: "disk".to_string(),
        size: ByteSize(1 << 30),
        groups: GroupCount::new(2).unwrap(),
        replicas: 3,
        write_quorum: 2,
        min_copies: 2,
        layer: Layer(0),
        checksum: ChecksumAlgorithm::Crc32,
    }
}

impl Bench {
    fn new() -> Bench {
        let config = CoreConfig {
            cluster: CLUSTER,
            client: ClientId([9; 16]),
            limits: CoreLimits::DEFAULT,
        };
        let node = || Node {
            cluster: CLUSTER,
            ..Node::default()
        };
        let mut bench = Bench {
            core: ClientCore::new(config),
            now: Time::from_nanos(1),
            nodes: (1..=3).map(|number| (device(number), node())).collect(),
            conns: BTreeMap::new(),
            refuse: false,
            meta_down: false,
            generation: 0,
            configs: vec![
                GroupConfig {
                    epoch: Epoch(1),
                    in_sync: (1..=3).map(device).collect(),
                    ..GroupConfig::default()
                };
                2
            ],
            replies: BTreeMap::new(),
            asked: Vec::new(),
            sent: BTreeMap::new(),
            words: Vec::new(),
            closed: false,
            reports: Vec::new(),
            classes: BTreeSet::new(),
            held: false,
        };
        bench.tell(Event::OpenVolume {
            volume: V,
            description: description(),
        });
        bench
    }

    fn tell(&mut self, event: Event) {
        self.core.handle(self.now, event);
        self.act();
    }

    fn act(&mut self) {
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Connect { conn, device, .. } => {
                    if self.refuse {
                        self.core.handle(self.now, Event::Disconnected { conn, refused: true });
                    } else {
                        self.conns.insert(conn, device);
                        self.core.handle(self.now, Event::Connected { conn });
                    }
                }
                Action::Disconnect { conn } => {
                    self.conns.remove(&conn);
                }
                Action::Send { to, envelope } => {
                    self.classes.insert(envelope.class as u8);
                    *self.sent.entry(envelope.message.name()).or_default() += to.len() as u64;
                    for conn in to {
                        self.serve(conn, envelope.clone());
                    }
                }
                Action::Reply { op, result, .. } => {
                    assert!(self.replies.insert(op, result).is_none(), "replied twice");
                }
                Action::Meta(request) => self.meta(&request),
                Action::Report(reports) => {
                    let now = self.now;
                    self.reports.extend(reports.into_iter().map(|report| (now, report)));
                }
                Action::Closed { .. } => self.closed = true,
                Action::Notice { notice, .. } => self.words.push(notice.to_string()),
                Action::DeviceNotice { words, .. } => self.words.push(words),
            }
        }
    }

    fn meta(&mut self, request: &MetaRequest) {
        self.asked.push(request.question.clone());
        let devices = self.nodes.keys().map(|device| DeviceEntry {
            device: *device,
            addresses: vec!["node:7000".to_string()],
        });
        let reply = match &request.question {
            MetaQuestion::Attach | MetaQuestion::Care => {
                self.generation += 1;
                let generation = Generation::new(self.generation).unwrap();
                let capability =
                    Capability::grant(&ClusterKey([0; 32]), CLUSTER, request.id, generation, Rights::Write);
                MetaReply::Attached {
                    grant: Grant { generation, capability },
                    groups: self.configs.clone(),
                    devices: devices.collect(),
                }
            }
            MetaQuestion::Detach { .. } => MetaReply::Detached,
            MetaQuestion::Refresh => MetaReply::Refreshed {
                size: ByteSize(2 << 30),
                generation: Generation::new(self.generation).unwrap(),
                groups: self.configs.clone(),
                devices: devices.collect(),
            },
            MetaQuestion::Configure { generation, changes } => {
                assert_eq!(generation.get(), self.generation);
                let configs = &mut self.configs;
                MetaReply::Configured(changes.iter().map(|change| configure(configs, change)).collect())
            }
        };
        let result = if self.held && request.question == MetaQuestion::Care {
            Err(MetaError::Refused("a guest holds it".to_string()))
        } else if self.meta_down {
            Err(MetaError::Unreachable("no leader".to_string()))
        } else {
            Ok(reply)
        };
        let request = request.request;
        self.core.handle(self.now, Event::Meta(MetaAnswer { request, result }));
    }

    fn serve(&mut self, conn: ConnId, envelope: Envelope) {
        let Some(device) = self.conns.get(&conn).copied() else {
            return;
        };
        let node = self.nodes.get_mut(&device).unwrap();
        if node.mute {
            return;
        }
        let answer = Envelope {
            message: node.answer(device, &envelope.message),
            ..envelope
        };
        self.core.handle(self.now, Event::Frame { conn, envelope: answer });
    }

    fn pass(&mut self, span: Duration) {
        let until = self.now + span;
        while let Some(at) = self.core.poll_timeout().filter(|at| *at <= until) {
            assert!(
                at > self.now || at == Time::ZERO || self.now <= until,
                "time stands still"
            );
            self.now = self.now.max(at);
            self.core.handle_timeout(self.now);
            self.act();
        }
        self.now = until;
    }

    fn write(&mut self, op: u64, offset: u64) {
        let data = Bytes::from(vec![op as u8; BLOCK_BYTES]);
        let request = VolumeOp::Write { offset, data };
        self.tell(Event::Submit {
            volume: V,
            op: OpId(op),
            request,
        });
    }

    fn lose(&mut self, device: DeviceId) {
        let conns = self.conns.iter().filter(|(_, other)| **other == device);
        let lost: Vec<ConnId> = conns.map(|(conn, _)| *conn).collect();
        for conn in lost {
            self.conns.remove(&conn);
            self.tell(Event::Disconnected { conn, refused: false });
        }
    }
}

fn configure(configs: &mut [GroupConfig], change: &ConfigChange) -> ChangeOutcome {
    let now = &mut configs[usize::from(change.group.0)];
    assert_eq!(change.epoch, now.epoch);
    let members: Vec<DeviceId> = change.in_sync.iter().chain(&change.joining).copied().collect();
    let named = now.stale.iter().chain(&now.in_sync).chain(&now.joining);
    let stale = named.filter(|device| !members.contains(device)).copied().collect();
    let mut in_sync = change.in_sync.clone();
    in_sync.sort_unstable();
    let is_open = |moving: &Move| in_sync.contains(&moving.from) && !in_sync.contains(&moving.to);
    *now = GroupConfig {
        epoch: Epoch(now.epoch.0 + 1),
        moving: now.moving.filter(is_open),
        in_sync,
        joining: change.joining.clone(),
        stale,
        ..GroupConfig::default()
    };
    ChangeOutcome::Committed(now.clone())
}

impl Node {
    fn answer(&mut self, device: DeviceId, message: &Message) -> Message {
        let durable = Message::Durable(Durable::default());
        match message {
            Message::Hello(hello) => Message::Hello(Hello {
                cluster: self.cluster,
                device,
                limits: self.limits,
                ..hello.clone()
            }),
            Message::Ping(_) => Message::Pong(Empty),
            Message::Seal(seal) if seal.capability.generation >= self.seal => {
                self.seal = seal.capability.generation;
                let (volume, generation) = (seal.capability.volume, self.seal);
                Message::Sealed(Sealed {
                    holder: Holder { volume, generation },
                })
            }
            Message::Join(join) if join.holder.generation >= self.seal => Message::Joined(Joined {
                holder: join.holder,
                group: join.group,
                created: false,
                stable: Version::ZERO,
            }),
            Message::Confirm(confirm) if confirm.holder.generation >= self.seal => Message::Confirmed(*confirm),
            Message::Release(release) => Message::Released(*release),
            Message::Collect(collect) if collect.holder.generation >= self.seal => {
                Message::Collected(Collected::default())
            }
            Message::Write(write) if write.holder.generation >= self.seal => {
                if let WriteData::Data { bytes, checksums } = &write.data {
                    let state = BlockState {
                        content: Content::Data(checksums[0]),
                        version: write.version,
                    };
                    self.blocks
                        .insert((write.range.chunk(), write.range.start()), (state, bytes.clone()));
                }
                durable
            }
            Message::Read(read) if read.holder.generation >= self.seal => {
                let held = self.blocks.get(&(read.range.chunk(), read.range.start()));
                Message::ReadAnswer(ReadAnswer {
                    blocks: vec![held.map_or(BlockState::ABSENT, |held| held.0)],
                    bytes: held.map(|held| held.1.clone()).into_iter().collect(),
                    ..ReadAnswer::default()
                })
            }
            Message::Copy(_) | Message::CopyHole(_) => durable,
            _ => Message::Failed(Failed::fenced(self.seal)),
        }
    }
}

#[test]
fn a_volume_is_attached_at_its_first_operation_and_costs_nothing_when_idle() {
    let mut bench = Bench::new();
    bench.pass(Duration::from_secs(10));
    assert!(
        bench.asked.is_empty() && bench.conns.is_empty(),
        "opening alone asks nobody"
    );
    bench.write(1, 0);
    bench.write(2, 64 << 20);
    assert_eq!(bench.asked, [MetaQuestion::Attach]);
    assert!(matches!(bench.replies[&OpId(1)], Ok(VolumeReply::Done)));
    assert!(
        matches!(bench.replies[&OpId(2)], Ok(VolumeReply::Done)),
        "of the other group"
    );
    let read = VolumeOp::Read {
        offset: 512,
        length: 1024,
    };
    bench.tell(Event::Submit {
        volume: V,
        op: OpId(3),
        request: read,
    });
    let Ok(VolumeReply::Read(pieces)) = &bench.replies[&OpId(3)] else {
        panic!("{:?}", bench.replies)
    };
    assert_eq!(pieces.concat(), [1; 1024]);
    let sent = bench.sent.clone();
    bench.pass(Duration::from_secs(3600));
    assert_eq!(
        bench.sent, sent,
        "devices are told nothing while nothing is outstanding"
    );
    assert_eq!(bench.asked, [MetaQuestion::Attach]);
    let soon = bench.now + CoreLimits::DEFAULT.report_interval;
    assert!(
        bench.core.poll_timeout().is_some_and(|at| at <= soon),
        "but meta is told how the volume is"
    );
    assert_eq!(bench.reports.len(), 361, "every ten seconds, as it is whole");
}

#[test]
fn while_meta_is_unreachable_operations_wait_and_it_is_asked_again() {
    let mut bench = Bench::new();
    bench.meta_down = true;
    bench.write(1, 0);
    bench.pass(Duration::from_secs(20));
    assert!(bench.replies.is_empty());
    assert!(
        (5..40).contains(&bench.asked.len()),
        "with pauses: {}",
        bench.asked.len()
    );
    bench.meta_down = false;
    bench.pass(Duration::from_secs(5));
    assert!(bench.replies[&OpId(1)].is_ok());
}

#[test]
fn a_device_of_another_cluster_is_told_apart_with_words_said_once() {
    let mut bench = Bench::new();
    bench.nodes.get_mut(&device(3)).unwrap().cluster = ClusterId([7; 16]);
    bench.write(1, 0);
    bench.pass(Duration::from_secs(20));
    let told = bench
        .words
        .iter()
        .filter(|words| words.contains("belongs to cluster"))
        .count();
    assert_eq!(told, 1, "{:?}", bench.words);
    assert!(bench.replies[&OpId(1)].is_ok(), "the two others are served without it");
    assert!(bench.configs.iter().all(|config| config.stale == [device(3)]));
    assert!(bench.asked.contains(&MetaQuestion::Refresh), "it may have moved");
    assert!(bench.asked.len() < 20, "and that is not asked too often");
    bench.nodes.get_mut(&device(3)).unwrap().cluster = CLUSTER;
    bench.pass(Duration::from_secs(10));
    let all: Vec<DeviceId> = (1..=3).map(device).collect();
    assert!(
        bench.configs.iter().all(|config| config.in_sync == all),
        "it is back: {:?}",
        bench.configs
    );
}

#[test]
fn with_meta_away_a_volume_whose_members_are_all_there_is_served_and_one_without_waits() {
    let mut bench = Bench::new();
    bench.write(1, 0);
    bench.nodes.get_mut(&device(3)).unwrap().cluster = ClusterId([7; 16]);
    bench.lose(device(3));
    bench.meta_down = true;
    bench.write(2, 0);
    assert!(bench.replies[&OpId(2)].is_ok(), "an attached volume needs no meta");
    bench.pass(Duration::from_secs(30));
    assert!(bench.configs.iter().all(|config| config.epoch == Epoch(1)));
    bench.meta_down = false;
    bench.pass(Duration::from_secs(5));
    assert!(bench.configs.iter().all(|config| config.stale == [device(3)]));
}

#[test]
fn a_silent_device_is_pinged_and_then_given_up_while_writes_go_on() {
    let mut bench = Bench::new();
    bench.write(1, 0);
    bench.nodes.get_mut(&device(2)).unwrap().mute = true;
    bench.write(2, 0);
    assert!(bench.replies[&OpId(2)].is_ok(), "two are enough");
    bench.pass(Duration::from_secs(10));
    assert_eq!(bench.sent["Ping"], 1);
    assert!(
        bench.words.iter().any(|words| words == "it is silent"),
        "{:?}",
        bench.words
    );
    bench.nodes.get_mut(&device(2)).unwrap().mute = false;
    bench.pass(Duration::from_secs(10));
    assert!(
        bench
            .core
            .status(V)
            .unwrap()
            .groups
            .iter()
            .all(|group| group.members.iter().all(|m| m.complete))
    );
}

#[test]
fn what_a_device_says_it_takes_is_not_exceeded() {
    let mut bench = Bench::new();
    bench.write(1, 0);
    for number in 1..=3 {
        let node = bench.nodes.get_mut(&device(number)).unwrap();
        node.limits.requests_in_flight = 2;
    }
    for number in 1..=3 {
        bench.lose(device(number));
    }
    bench.pass(Duration::from_secs(5));
    bench.nodes.values_mut().for_each(|node| node.mute = true);
    let before = bench.sent["Write"];
    for op in 2..12 {
        bench.write(op, op * 4096);
    }
    assert_eq!(bench.sent["Write"] - before, 3 * 2);
    let waiting: usize = bench.core.device_load().map(|(_, _, _, queued)| queued).sum();
    assert_eq!(waiting, 3 * 8);
}

#[test]
fn a_newer_attachment_ends_everything_and_the_connections_go() {
    let mut bench = Bench::new();
    bench.write(1, 0);
    bench.nodes.get_mut(&device(1)).unwrap().seal = Generation::new(9).unwrap();
    bench.write(2, 0);
    bench.write(3, 0);
    assert!(matches!(bench.replies[&OpId(3)], Err(VolumeError::Fenced)));
    bench.tell(Event::Submit {
        volume: V,
        op: OpId(4),
        request: VolumeOp::Flush,
    });
    assert!(matches!(bench.replies[&OpId(4)], Err(VolumeError::Fenced)));
    assert!(bench.conns.is_empty());
    assert_eq!(bench.core.status(V).unwrap().attachment, AttachmentPhase::Fenced);
}

#[test]
fn closing_releases_the_members_and_tells_meta() {
    let mut bench = Bench::new();
    bench.write(1, 0);
    bench.tell(Event::CloseVolume { volume: V });
    assert!(bench.closed);
    assert_eq!(bench.sent["Release"], 3);
    assert!(matches!(
        bench.asked[..],
        [MetaQuestion::Attach, MetaQuestion::Detach { .. }]
    ));
    assert!(bench.conns.is_empty());
    assert!(bench.core.status(V).is_none());
    bench.write(2, 0);
    assert!(matches!(bench.replies[&OpId(2)], Err(VolumeError::Shutdown)));
}

#[test]
fn meta_is_told_whether_the_copies_are_equal_when_a_volume_is_released() {
    let settled = |bench: &Bench| match bench.asked.last() {
        Some(MetaQuestion::Detach { settled, .. }) => *settled,
        other => panic!("not released: {other:?}"),
    };
    let mut bench = Bench::new();
    bench.write(1, 0);
    bench.tell(Event::CloseVolume { volume: V });
    assert!(settled(&bench));

    let mut bench = Bench::new();
    bench.write(1, 0);
    bench.nodes.get_mut(&device(3)).unwrap().mute = true;
    bench.write(2, 0);
    assert!(bench.replies[&OpId(2)].is_ok(), "two copies are enough");
    bench.tell(Event::CloseVolume { volume: V });
    assert!(!bench.sent.contains_key("Release"), "the third answer is waited for");
    bench.pass(CoreLimits::DEFAULT.settle_timeout);
    assert_eq!(bench.sent["Release"], 3, "but not for long");
    bench.refuse = true;
    bench.lose(device(3));
    assert!(bench.closed && !settled(&bench));
}

#[test]
fn closing_what_can_not_be_served_ends_after_a_while_with_a_reply_for_everything() {
    let mut bench = Bench::new();
    bench.refuse = true;
    bench.write(1, 0);
    bench.tell(Event::CloseVolume { volume: V });
    assert!(!bench.closed);
    bench.pass(Duration::from_secs(11));
    assert!(bench.closed);
    assert!(matches!(bench.replies[&OpId(1)], Err(VolumeError::Shutdown)));
    assert_eq!(bench.core.poll_timeout(), None);
}

#[test]
fn a_device_that_speaks_out_of_turn_is_given_up() {
    let mut bench = Bench::new();
    bench.write(1, 0);
    let conn = *bench.conns.keys().next().unwrap();
    let envelope = Envelope::new(Correlation(12345), Message::Pong(Empty));
    bench.tell(Event::Frame { conn, envelope });
    assert!(!bench.conns.contains_key(&conn));
    bench.pass(Duration::from_secs(3));
    bench.write(2, 0);
    assert!(bench.replies[&OpId(2)].is_ok());
    assert_eq!(bench.conns.len(), 3, "and connected anew");
}
