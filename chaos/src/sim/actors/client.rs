//! A client: production's core, with a driver that keeps its connections, asks meta, and opens volumes.

use std::collections::{BTreeMap, BTreeSet};

use cairn_client::core::ClientCore;
use cairn_client::core::api::{
    Action, AttachmentPhase, ChangeOutcome, ConfigChange, ConnId, CoreConfig, DeviceEntry, Event, Grant, MetaAnswer,
    MetaError, MetaQuestion, MetaReply, MetaRequest, VolumeDescription, VolumeHandle,
};
use cairn_client::volume::api::{OpId, VolumeOp};
use cairn_meta::state::command::{Attach, Command, ConfigureGroups, Detach, GroupChange, Selector};
use cairn_meta::state::model::{Device, Group, Volume};
use cairn_meta::state::{Outcome, Refusal};
use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::control::Code;
use cairn_proto::ids::{ClientId, ClusterId, DeviceId, GroupIndex, NodeId, VolumeId};
use cairn_proto::replication::{GroupConfig, Move};
use cairn_proto::time::Time;
use cairn_proto::units::ByteSize;

use super::{Ctx, Input, Output, earliest, node_at};
use crate::sim::caller::{Caller, Ended};
use crate::sim::msg::{Answer, Msg, Placed, Request};
use crate::sim::network::{Delivery, Link, Side};
use crate::sim::wire;

/// What is wanted of a client.
#[derive(Clone, Debug)]
pub enum Wish {
    /// Serve a volume.
    Open(VolumeHandle, VolumeId),
    /// Take care of a volume.
    Care(VolumeHandle, VolumeId),
    /// Stop serving it.
    Close(VolumeHandle),
    /// The volume has grown to so many bytes.
    Grown(VolumeHandle, u64),
    /// Do an operation.
    Submit(VolumeHandle, OpId, VolumeOp),
}

/// What a client process needs to start.
#[derive(Clone, Debug)]
pub struct ClientSetup {
    /// For the core.
    pub config: CoreConfig,
    /// Metadata servers.
    pub metas: u8,
    /// How often the process has been started.
    pub run: u32,
    /// With it, the simulation of meta's service makes the capabilities.
    pub key: ClusterKey,
}

/// How often an attachment is asked for anew when somebody else was faster, as production's client does.
const ATTACH_TRIES: u32 = 4;

/// A question for an attachment. First it is looked which generation was granted last; then the next one is asked for, which is
/// granted only if there was none since.
struct Attaching {
    request: MetaRequest,
    tries: u32,
    has_looked: bool,
}

/// A client process.
pub struct ClientActor {
    core: ClientCore,
    client: ClientId,
    cluster: ClusterId,
    key: ClusterKey,
    caller: Caller,
    links: BTreeMap<ConnId, Link>,
    conns: BTreeMap<Link, ConnId>,
    asked: BTreeMap<u64, MetaRequest>,
    /// Attachments that were asked for.
    attaching: BTreeMap<u64, Attaching>,
    opening: BTreeMap<u64, (VolumeHandle, VolumeId, bool)>,
    /// Reports that meta has not answered.
    reporting: BTreeSet<u64>,
    /// Of a caretaker: the node that it runs on, when meta has said what that is called.
    node: Option<NodeId>,
}

impl ClientActor {
    /// A process that has just started.
    pub fn new(setup: &ClientSetup) -> ClientActor {
        ClientActor {
            core: ClientCore::new(setup.config),
            client: setup.config.client,
            cluster: setup.config.cluster,
            key: setup.key.clone(),
            caller: Caller::new(setup.metas, u64::from(setup.run) << 32),
            links: BTreeMap::new(),
            conns: BTreeMap::new(),
            asked: BTreeMap::new(),
            attaching: BTreeMap::new(),
            opening: BTreeMap::new(),
            reporting: BTreeSet::new(),
            node: None,
        }
    }

    /// What the core says of a volume.
    pub fn status(&self, volume: VolumeHandle) -> Option<cairn_client::core::api::VolumeStatus> {
        self.core.status(volume)
    }

    pub(super) fn handle(&mut self, ctx: &mut Ctx<'_>, input: Input) {
        match input {
            Input::Guest(wish) => self.wish(ctx, wish),
            Input::Net(Delivery::Message {
                message: Msg::Answer { id, answer },
                ..
            }) => {
                if let Some(ended) = self.caller.answered(ctx.now, id, answer) {
                    self.call_ended(ctx, ended);
                }
            }
            Input::Net(delivery) => self.delivered(ctx, delivery),
            Input::Disk(_) | Input::Operator(_) => unreachable!("a client has no device and takes no orders"),
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
        if self.core.poll_timeout().is_some_and(|at| at <= ctx.now) {
            self.core.handle_timeout(ctx.now);
        }
        self.act(ctx);
    }

    pub(super) fn timeout(&self) -> Option<Time> {
        earliest(self.core.poll_timeout(), self.caller.timeout())
    }

    fn wish(&mut self, ctx: &mut Ctx<'_>, wish: Wish) {
        match wish {
            Wish::Open(handle, id) | Wish::Care(handle, id) => {
                let is_care = matches!(wish, Wish::Care(..));
                let call = self.call(ctx, Request::Volume(id));
                self.opening.insert(call, (handle, id, is_care));
            }
            Wish::Close(volume) => self.core.handle(ctx.now, Event::CloseVolume { volume }),
            Wish::Grown(volume, bytes) => {
                let size = ByteSize(bytes);
                self.core.handle(ctx.now, Event::Grown { volume, size });
            }
            Wish::Submit(volume, op, request) => self.core.handle(ctx.now, Event::Submit { volume, op, request }),
        }
    }

    fn delivered(&mut self, ctx: &mut Ctx<'_>, delivery: Delivery<Msg>) {
        let event = match delivery {
            Delivery::Connected { link } => self.conns.get(&link).map(|conn| Event::Connected { conn: *conn }),
            Delivery::Closed { link, refused } => self.forget(link).map(|conn| Event::Disconnected { conn, refused }),
            Delivery::Frame { link, frame } => self.conns.get(&link).copied().map(|conn| {
                wire::decode(&frame).map_or_else(
                    |error| {
                        ctx.note(format_args!("closes {link:?}: {error}"));
                        ctx.net.close(ctx.world, link, Side::Caller);
                        self.forget(link);
                        Event::Disconnected { conn, refused: false }
                    },
                    |envelope| Event::Frame { conn, envelope },
                )
            }),
            Delivery::Accepted { link, .. } => {
                ctx.net.close(ctx.world, link, Side::Callee);
                None
            }
            Delivery::Message { .. } => None,
        };
        if let Some(event) = event {
            self.core.handle(ctx.now, event);
        }
    }

    fn forget(&mut self, link: Link) -> Option<ConnId> {
        let conn = self.conns.remove(&link)?;
        self.links.remove(&conn);
        Some(conn)
    }

    fn act(&mut self, ctx: &mut Ctx<'_>) {
        while let Some(action) = self.core.poll_action() {
            match action {
                Action::Connect { conn, addresses, .. } => self.connect(ctx, conn, &addresses),
                Action::Disconnect { conn } => {
                    if let Some(link) = self.links.remove(&conn) {
                        self.conns.remove(&link);
                        ctx.net.close(ctx.world, link, Side::Caller);
                    }
                }
                Action::Send { to, envelope } => {
                    let frame = envelope.encode();
                    ctx.note(format_args!(
                        "sends {} #{} on {to:?}",
                        describe(&envelope.message),
                        envelope.correlation
                    ));
                    for conn in to {
                        if let Some(link) = self.links.get(&conn) {
                            ctx.net.send(ctx.world, *link, Side::Caller, frame.clone());
                        }
                    }
                }
                Action::Reply { volume, op, result } => {
                    let generation = self.generation(volume);
                    ctx.out.push(Output::Reply {
                        volume,
                        op,
                        result,
                        generation,
                    });
                }
                Action::Meta(request) => self.ask(ctx, request),
                Action::Report(reports) => {
                    let call = self.call(ctx, Request::Report(self.node, reports));
                    self.reporting.insert(call);
                }
                Action::Closed { volume } => ctx.out.push(Output::Closed(volume)),
                Action::Notice { volume, notice } => ctx.note(format_args!("{volume:?}: {notice}")),
                Action::DeviceNotice { device, words } => ctx.note(format_args!("{device}: {words}")),
            }
        }
    }

    fn generation(&self, volume: VolumeHandle) -> Option<cairn_proto::ids::Generation> {
        match self.core.status(volume)?.attachment {
            AttachmentPhase::Attached(generation) => Some(generation),
            _ => None,
        }
    }

    fn connect(&mut self, ctx: &mut Ctx<'_>, conn: ConnId, addresses: &[String]) {
        let node = addresses.iter().find_map(|address| node_at(address));
        let node = node.unwrap_or_else(|| panic!("no node at {addresses:?}"));
        let link = ctx.net.connect(ctx.world, ctx.me, node);
        self.links.insert(conn, link);
        self.conns.insert(link, conn);
    }

    fn ask(&mut self, ctx: &mut Ctx<'_>, request: MetaRequest) {
        let volume = Selector::Id(request.id);
        let question = match &request.question {
            MetaQuestion::Attach | MetaQuestion::Care => {
                return self.look_to_attach(ctx, request, ATTACH_TRIES);
            }
            MetaQuestion::Detach { generation, settled } => Request::Command(Command::Detach(Detach {
                volume,
                generation: *generation,
                settled: *settled,
            })),
            MetaQuestion::Refresh => Request::Volume(request.id),
            MetaQuestion::Configure { generation, changes } => {
                Request::Command(Command::ConfigureGroups(ConfigureGroups {
                    volume,
                    generation: *generation,
                    changes: changes.iter().map(group_change).collect(),
                }))
            }
        };
        let call = self.call(ctx, question);
        self.asked.insert(call, request);
    }

    fn look_to_attach(&mut self, ctx: &mut Ctx<'_>, request: MetaRequest, tries: u32) {
        let call = self.call(ctx, Request::Volume(request.id));
        let looking = Attaching {
            request,
            tries,
            has_looked: false,
        };
        self.attaching.insert(call, looking);
    }

    fn attach_went_on(&mut self, ctx: &mut Ctx<'_>, attaching: Attaching, answer: Option<Answer>) {
        let Attaching {
            request,
            tries,
            has_looked,
        } = attaching;
        match answer {
            Some(Answer::Volume(Some(placed))) if !has_looked => {
                let caretaker = request.question == MetaQuestion::Care;
                let attach = Attach {
                    volume: Selector::Id(request.id),
                    client: self.client,
                    address: ctx.me.to_string(),
                    force: !caretaker,
                    caretaker,
                    displace: None,
                    after: Some(placed.volume.generation),
                };
                let call = self.call(ctx, Request::Command(Command::Attach(attach)));
                let attaching = Attaching {
                    request,
                    tries,
                    has_looked: true,
                };
                self.attaching.insert(call, attaching);
            }
            // Somebody else was faster, or an earlier question of this client was granted after all.
            Some(Answer::Refused(refusal)) if refusal.code == Code::StaleGeneration && tries > 1 => {
                self.look_to_attach(ctx, request, tries - 1);
            }
            answer => {
                let result = match answer {
                    Some(Answer::Refused(refusal)) if refusal.code == Code::StaleGeneration => {
                        Err(MetaError::Unreachable(refusal.message))
                    }
                    answer => self.meta_reply(ctx, &request, answer),
                };
                let request = request.request;
                self.core.handle(ctx.now, Event::Meta(MetaAnswer { request, result }));
            }
        }
    }

    fn call(&mut self, ctx: &mut Ctx<'_>, request: Request) -> u64 {
        let mut calls = Vec::new();
        let call = self.caller.call(ctx.now, request, &mut calls);
        ctx.send_calls(calls);
        call
    }

    /// It is the client of this node's caretaker.
    pub(super) fn cares_for(&mut self, node: Option<NodeId>) {
        self.node = node;
    }

    fn call_ended(&mut self, ctx: &mut Ctx<'_>, (call, answer): Ended) {
        if let Some((handle, id, is_care)) = self.opening.remove(&call) {
            return self.described(ctx, (handle, id, is_care), answer);
        }
        if self.reporting.remove(&call) {
            if let Some(Answer::Advice(advice)) = answer {
                self.core.handle(ctx.now, Event::Advice(advice));
            }
            return;
        }
        if let Some(attaching) = self.attaching.remove(&call) {
            return self.attach_went_on(ctx, attaching, answer);
        }
        if let Some(request) = self.asked.remove(&call) {
            let result = self.meta_reply(ctx, &request, answer);
            let request = request.request;
            self.core.handle(ctx.now, Event::Meta(MetaAnswer { request, result }));
        }
    }

    fn described(
        &mut self,
        ctx: &mut Ctx<'_>,
        (volume, id, is_care): (VolumeHandle, VolumeId, bool),
        answer: Option<Answer>,
    ) {
        match answer {
            Some(Answer::Volume(Some(placed))) => {
                let description = describe_volume(&placed);
                let event = match is_care {
                    true => Event::CareForVolume { volume, description },
                    false => Event::OpenVolume { volume, description },
                };
                self.core.handle(ctx.now, event);
                ctx.out.push(Output::Opened(volume));
            }
            Some(Answer::Volume(None)) => ctx.out.push(Output::Broken(format!("volume {id} is unknown to meta"))),
            _ if is_care => self.wish(ctx, Wish::Care(volume, id)),
            _ => self.wish(ctx, Wish::Open(volume, id)),
        }
    }

    fn meta_reply(
        &mut self,
        ctx: &mut Ctx<'_>,
        request: &MetaRequest,
        answer: Option<Answer>,
    ) -> Result<MetaReply, MetaError> {
        match answer {
            Some(Answer::Done {
                outcome: Outcome::Attached { volume, groups, .. },
                devices,
                ..
            }) => {
                let generation = volume.generation;
                ctx.out.push(Output::Attached(request.volume, generation));
                let capability = Capability::grant(&self.key, self.cluster, request.id, generation, Rights::Write);
                Ok(MetaReply::Attached {
                    grant: Grant { generation, capability },
                    groups: groups.into_iter().map(group_config).collect(),
                    devices: entries(&devices),
                })
            }
            Some(Answer::Done {
                outcome: Outcome::Configured(outcomes),
                ..
            }) => Ok(MetaReply::Configured(
                outcomes.into_iter().map(change_outcome).collect(),
            )),
            Some(Answer::Done { .. }) => Ok(MetaReply::Detached),
            Some(Answer::Volume(Some(placed))) => Ok(MetaReply::Refreshed {
                size: ByteSize(placed.volume.size_bytes),
                generation: placed.volume.generation,
                devices: entries(&placed.devices),
                groups: placed.groups.into_iter().map(group_config).collect(),
            }),
            Some(Answer::Refused(refusal)) if matches!(request.question, MetaQuestion::Detach { .. }) => {
                ctx.note(format_args!("detach: {refusal}"));
                Ok(MetaReply::Detached)
            }
            Some(Answer::Refused(refusal)) => match (&request.question, refusal.code) {
                (MetaQuestion::Configure { generation, .. }, Code::StaleGeneration) => {
                    Err(MetaError::Superseded(generation.next().unwrap_or(*generation)))
                }
                _ => Err(MetaError::Refused(refusal.message)),
            },
            Some(Answer::Volume(None)) => Err(MetaError::Refused("the volume does not exist".to_string())),
            Some(other) => Err(MetaError::Unreachable(format!(
                "an answer that fits no question: {}",
                other.name()
            ))),
            None => Err(MetaError::Unreachable("nobody answered".to_string())),
        }
    }
}

fn describe(message: &cairn_proto::message::Message) -> String {
    use cairn_proto::message::Message as M;
    match message {
        M::Write(write) => format!("Write {} {}", write.version, write.range),
        M::Copy(copy) => format!("Copy {:?} {}", copy.source, copy.range),
        M::Read(read) => format!("Read {}", read.range),
        other => other.name().to_string(),
    }
}

fn entries(devices: &[(DeviceId, Device)]) -> Vec<DeviceEntry> {
    let entry = |(device, known): &(DeviceId, Device)| DeviceEntry {
        device: *device,
        addresses: known.addresses.clone(),
    };
    devices.iter().map(entry).collect()
}

fn group_config(group: Group) -> GroupConfig {
    GroupConfig {
        epoch: group.epoch,
        in_sync: group.in_sync,
        joining: group.joining,
        stale: group.stale,
        rescue: group.rescue,
        moving: group.moving.map(|moving| Move {
            from: moving.from,
            to: moving.to,
        }),
    }
}

fn group_change(change: &ConfigChange) -> GroupChange {
    GroupChange {
        cause: String::new(),
        index: change.group,
        epoch: change.epoch,
        in_sync: change.in_sync.clone(),
        joining: change.joining.clone(),
    }
}

fn change_outcome((_, group, refusal): (GroupIndex, Group, Option<Refusal>)) -> ChangeOutcome {
    let config = group_config(group);
    match refusal {
        None => ChangeOutcome::Committed(config),
        Some(refusal) => ChangeOutcome::Refused {
            config,
            words: refusal.message,
        },
    }
}

fn describe_volume(placed: &Placed) -> VolumeDescription {
    let Volume {
        name,
        size_bytes,
        group_count,
        replicas,
        write_quorum,
        min_copies_one,
        checksum,
        layer,
        ..
    } = &placed.volume;
    VolumeDescription {
        id: placed.id,
        name: name.clone(),
        size: ByteSize(*size_bytes),
        groups: *group_count,
        replicas: *replicas,
        write_quorum: *write_quorum,
        min_copies: if *min_copies_one { 1 } else { *write_quorum },
        layer: *layer,
        checksum: *checksum,
    }
}
