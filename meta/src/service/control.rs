//! The service of clients and operators.

use std::collections::BTreeMap;

use cairn_proto::capability::{Capability, ClusterKey, Rights};
use cairn_proto::control::v1::control_server::Control;
use cairn_proto::control::v1::*;
use cairn_proto::control::{Code, v1};
use cairn_proto::ids::{ClusterId, DeviceId, Epoch, Generation, GroupId, GroupIndex, NodeId, VolumeId};
use tonic::{Request, Response, Status};

use super::convert;
use super::convert::*;
use super::driver::{Failure, Handle, World};
use super::health;
use crate::heal::AttachmentReport;
use crate::limits::{ATTACHMENT_REPORTS_MAX, CHANGES_MAX, DEVICES_PER_NODE_MAX, PAGE_MAX, TEXT_BYTES_MAX};
use crate::state::command::{self, Command};
use crate::state::{Outcome, Refusal, State, events, model};

pub(super) struct ControlService {
    pub(super) handle: Handle,
    pub(super) key: ClusterKey,
}

type Answered<T> = Result<Response<T>, Status>;

fn refuse(refusal: Refusal) -> Status {
    Failure::from(refusal).into()
}

/// A small number of a request that must fit where it goes.
fn small(number: u32, what: &str) -> Result<u8, Refusal> {
    u8::try_from(number).map_err(|_| invalid(format!("{number} is too large for the {what}")))
}

fn page(limit: u32) -> usize {
    if limit == 0 {
        PAGE_MAX
    } else {
        (limit as usize).min(PAGE_MAX)
    }
}

fn volume_of(outcome: Outcome) -> v1::Volume {
    match outcome {
        Outcome::Volume(id, volume) => to_volume(id, &volume),
        other => unreachable!("not the outcome of a command on a volume: {other:?}"),
    }
}

/// How many groups each device is a member of.
fn group_counts(world: &World<'_>) -> BTreeMap<DeviceId, u64> {
    let mut counts = BTreeMap::new();
    for group in world.state.groups().values() {
        for device in group.in_sync.iter().chain(&group.joining) {
            *counts.entry(*device).or_default() += 1;
        }
    }
    counts
}

impl ControlService {
    async fn change_volume(&self, command: impl Into<Command> + Send + 'static) -> Result<v1::Volume, Status> {
        self.handle
            .propose(|_| Ok(command.into()), |outcome, _| volume_of(outcome))
            .await
    }

    fn grant(&self, world: &World<'_>, volume: VolumeId, generation: Generation) -> (Vec<u8>, ClusterId) {
        let cluster = world
            .state
            .cluster()
            .expect("nothing is granted before the cluster has its id");
        let mut bytes = Vec::new();
        Capability::grant(&self.key, cluster, volume, generation, Rights::Write).encode(&mut bytes);
        (bytes, cluster)
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Answered<CreateVolumeResponse> {
        let request = request.into_inner();
        let make = |request: CreateVolumeRequest, world: &World<'_>| {
            let replicas = if request.replicas == 0 { 3 } else { request.replicas };
            let quorum = if request.write_quorum == 0 {
                replicas / 2 + 1
            } else {
                request.write_quorum
            };
            Ok(command::CreateVolume {
                name: request.name,
                size_bytes: request.size_bytes,
                replicas: small(replicas, "number of copies")?,
                write_quorum: small(quorum, "write quorum")?,
                min_copies_one: request.min_copies_one,
                spread: spread(request.spread)?,
                silent: world.soft.known_silent(world.state, world.now)?,
            })
        };
        let volume = self.handle.propose(
            move |world| make(request, world).map(Command::from),
            |outcome, _| volume_of(outcome),
        );
        Ok(Response::new(CreateVolumeResponse {
            volume: Some(volume.await?),
        }))
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Answered<GetVolumeResponse> {
        let selector = selector(request.into_inner().volume).map_err(refuse)?;
        let read = self.handle.read(move |world| {
            let (id, volume) = world.state.find(&selector)?;
            let groups = world
                .state
                .groups_of(id)
                .map(|(index, group)| to_group(index, group))
                .collect();
            Ok(GetVolumeResponse {
                volume: Some(to_volume(id, volume)),
                groups,
            })
        });
        read.await.map(Response::new)
    }

    async fn list_volumes(&self, request: Request<ListVolumesRequest>) -> Answered<ListVolumesResponse> {
        let request = request.into_inner();
        let read = self.handle.read(move |world| {
            let limit = page(request.limit);
            let after = (std::ops::Bound::Excluded(request.after), std::ops::Bound::Unbounded);
            let mut ids = world.state.names().range(after).map(|(_, id)| *id);
            let volumes = ids
                .by_ref()
                .take(limit)
                .map(|id| to_volume(id, &world.state.volumes()[&id]))
                .collect();
            let more = ids.next().is_some();
            Ok(ListVolumesResponse { volumes, more })
        });
        read.await.map(Response::new)
    }

    async fn grow_volume(&self, request: Request<GrowVolumeRequest>) -> Answered<GrowVolumeResponse> {
        let request = request.into_inner();
        let volume = selector(request.volume).map_err(refuse)?;
        let volume = self
            .change_volume(command::GrowVolume {
                volume,
                size_bytes: request.size_bytes,
            })
            .await?;
        Ok(Response::new(GrowVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(&self, request: Request<DeleteVolumeRequest>) -> Answered<DeleteVolumeResponse> {
        let request = request.into_inner();
        let volume = selector(request.volume).map_err(refuse)?;
        let volume = self
            .change_volume(command::DeleteVolume {
                volume,
                force: request.force,
            })
            .await?;
        Ok(Response::new(DeleteVolumeResponse { volume: Some(volume) }))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answered<AttachResponse> {
        let request = request.into_inner();
        let mut attach = command::Attach {
            volume: selector(request.volume).map_err(refuse)?,
            client: client_id(&request.client_id).map_err(refuse)?,
            address: request.address,
            force: request.force,
            caretaker: request.caretaker,
            displace: None,
            after: request.after.map(generation).transpose().map_err(refuse)?,
        };
        let service = ControlService {
            handle: self.handle.clone(),
            key: self.key.clone(),
        };
        let answer = self.handle.propose(
            move |world| {
                if attach.caretaker {
                    let volume = world.state.find(&attach.volume)?.0;
                    attach.displace = world.soft.heal.displaceable(volume, world.state, world.now);
                }
                Ok(attach.into())
            },
            move |outcome, world| {
                let Outcome::Attached { id, volume, groups } = outcome else {
                    unreachable!("not the outcome of an attachment: {outcome:?}")
                };
                let (capability, cluster) = service.grant(world, id, volume.generation);
                AttachResponse {
                    volume: Some(to_volume(id, &volume)),
                    generation: volume.generation.get(),
                    capability,
                    groups: groups
                        .iter()
                        .zip(0..)
                        .map(|(group, index)| to_group(GroupIndex(index), group))
                        .collect(),
                    devices: devices_of(groups.iter(), world),
                    cluster_id: cluster.0.to_vec(),
                    feature_level: world.state.feature_level(),
                }
            },
        );
        answer.await.map(Response::new)
    }

    async fn detach(&self, request: Request<DetachRequest>) -> Answered<DetachResponse> {
        let request = request.into_inner();
        let detach = command::Detach {
            volume: selector(request.volume).map_err(refuse)?,
            generation: generation(request.generation).map_err(refuse)?,
            settled: request.settled,
        };
        let answer = self.handle.propose(|_| Ok(detach.into()), |_, _| DetachResponse {});
        answer.await.map(Response::new)
    }

    async fn get_groups(&self, request: Request<GetGroupsRequest>) -> Answered<GetGroupsResponse> {
        let selector = selector(request.into_inner().volume).map_err(refuse)?;
        let read = self.handle.read(move |world| {
            let (id, volume) = world.state.find(&selector)?;
            let volume = Some(to_volume(id, volume));
            let groups = world
                .state
                .groups_of(id)
                .map(|(index, group)| to_group(index, group))
                .collect();
            let devices = devices_of(world.state.groups_of(id).map(|(_, group)| group), world);
            Ok(GetGroupsResponse {
                volume,
                groups,
                devices,
                health: health::volume(world, id),
            })
        });
        read.await.map(Response::new)
    }

    async fn configure_groups(&self, request: Request<ConfigureGroupsRequest>) -> Answered<ConfigureGroupsResponse> {
        let request = request.into_inner();
        let change = |change: GroupChange| {
            if change.cause.len() > TEXT_BYTES_MAX {
                return Err(invalid(format!("a cause has at most {TEXT_BYTES_MAX} bytes")));
            }
            Ok(command::GroupChange {
                index: group_index(change.index)?,
                epoch: Epoch(change.epoch),
                in_sync: device_ids(&change.in_sync)?,
                joining: device_ids(&change.joining)?,
                cause: change.cause,
            })
        };
        if request.changes.len() > CHANGES_MAX {
            return Err(refuse(invalid(format!(
                "at most {CHANGES_MAX} groups can be changed at once"
            ))));
        }
        let changes: Result<Vec<_>, Refusal> = request.changes.into_iter().map(change).collect();
        let mut configure = command::ConfigureGroups {
            volume: selector(request.volume).map_err(refuse)?,
            generation: generation(request.generation).map_err(refuse)?,
            changes: changes.map_err(refuse)?,
        };
        let answer = self.handle.propose(
            move |world| {
                give_causes(world, &mut configure);
                Ok(configure.into())
            },
            |outcome, _| {
                let Outcome::Configured(outcomes) = outcome else {
                    unreachable!("not the outcome of a configuration: {outcome:?}")
                };
                let outcome = |(index, group, refusal): (GroupIndex, _, Option<Refusal>)| GroupOutcome {
                    config: Some(to_group(index, &group)),
                    code: refusal
                        .as_ref()
                        .map(|refusal| refusal.code.as_str().to_string())
                        .unwrap_or_default(),
                    message: refusal.map(|refusal| refusal.message).unwrap_or_default(),
                };
                ConfigureGroupsResponse {
                    outcomes: outcomes.into_iter().map(outcome).collect(),
                }
            },
        );
        answer.await.map(Response::new)
    }

    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Answered<ListNodesResponse> {
        let request = request.into_inner();
        let read = self.handle.read(move |world| {
            let counts = group_counts(world);
            let mut devices: BTreeMap<NodeId, Vec<v1::Device>> = BTreeMap::new();
            for (id, device) in world.state.devices() {
                let groups = counts.get(id).copied().unwrap_or_default();
                devices
                    .entry(device.node)
                    .or_default()
                    .extend(to_device(id, world, groups));
            }
            let after = (
                std::ops::Bound::Excluded(NodeId(request.after)),
                std::ops::Bound::Unbounded,
            );
            let mut found = world.state.nodes().range(after);
            let nodes = found.by_ref().take(page(request.limit));
            let nodes = nodes.map(|(id, node)| to_node(*id, node, world, devices.remove(id).unwrap_or_default()));
            Ok(ListNodesResponse {
                nodes: nodes.collect(),
                more: found.next().is_some(),
            })
        });
        read.await.map(Response::new)
    }

    async fn list_devices(&self, request: Request<ListDevicesRequest>) -> Answered<ListDevicesResponse> {
        let request = request.into_inner();
        let after = request
            .after
            .as_ref()
            .map(|id| device_id(Some(id)))
            .transpose()
            .map_err(refuse)?;
        let read = self.handle.read(move |world| {
            let counts = group_counts(world);
            let after = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
            let mut found = world.state.devices().range((after, std::ops::Bound::Unbounded));
            let devices = found.by_ref().take(page(request.limit));
            let devices =
                devices.filter_map(|(id, _)| to_device(id, world, counts.get(id).copied().unwrap_or_default()));
            Ok(ListDevicesResponse {
                devices: devices.collect(),
                more: found.next().is_some(),
            })
        });
        read.await.map(Response::new)
    }

    async fn drain_node(&self, request: Request<DrainNodeRequest>) -> Answered<DrainNodeResponse> {
        let DrainNodeRequest { node_id, drain } = request.into_inner();
        let node = NodeId(node_id);
        let answer = self.handle.propose(
            move |world| {
                let silent = world.soft.known_silent(world.state, world.now)?;
                Ok(command::DrainNode { node, drain, silent }.into())
            },
            move |_, world| DrainNodeResponse {
                copies: world.state.copies_on(node).count() as u64,
            },
        );
        answer.await.map(Response::new)
    }

    async fn scrub_devices(&self, request: Request<ScrubDevicesRequest>) -> Answered<ScrubDevicesResponse> {
        let request = request.into_inner();
        if request.devices.len() > DEVICES_PER_NODE_MAX {
            return Err(refuse(invalid(format!(
                "at most {DEVICES_PER_NODE_MAX} devices can be named at a time"
            ))));
        }
        let devices: Result<Vec<_>, Refusal> = request.devices.iter().map(|id| device_id(Some(id))).collect();
        let devices = devices.map_err(refuse)?;
        let asked = self.handle.look(move |world| {
            world.check_leads()?;
            let in_use = |id: &DeviceId| {
                let device = world.state.devices().get(id);
                device.is_some_and(|device| {
                    matches!(device.state, model::DeviceState::Active | model::DeviceState::Failed)
                })
            };
            if let Some(id) = devices.iter().find(|id| !in_use(id)) {
                return Err(Refusal::new(
                    Code::DeviceNotFound,
                    format!("device {id} is not in use: `cairn node show` tells which are"),
                ));
            }
            devices.into_iter().for_each(|id| world.soft.want_scrub(id));
            Ok(ScrubDevicesResponse {})
        });
        asked.await.map(Response::new)
    }

    async fn report_attachments(
        &self,
        request: Request<ReportAttachmentsRequest>,
    ) -> Answered<ReportAttachmentsResponse> {
        let request = request.into_inner();
        if request.reports.len() > ATTACHMENT_REPORTS_MAX {
            return Err(refuse(invalid(format!(
                "at most {ATTACHMENT_REPORTS_MAX} attachments can be reported at a time"
            ))));
        }
        let reports: Result<Vec<_>, Refusal> = request.reports.iter().map(attachment_report).collect();
        let reports = reports.map_err(refuse)?;
        let answer = self.handle.look(move |world| {
            world.check_leads()?;
            let advice = reports.into_iter().map(|(volume, report)| {
                let heal = &mut world.soft.heal;
                heal.heard_attachment(volume, report.clone(), world.state, world.now);
                advise(world, volume, &report)
            });
            Ok(ReportAttachmentsResponse {
                advice: advice.collect(),
                members: convert::addresses(world),
            })
        });
        answer.await.map(Response::new)
    }

    async fn list_events(&self, request: Request<ListEventsRequest>) -> Answered<ListEventsResponse> {
        let request = request.into_inner();
        let read = self.handle.read(move |world| Ok(list_events(world.state, &request)));
        read.await.map(Response::new)
    }

    async fn status(&self, _: Request<StatusRequest>) -> Answered<StatusResponse> {
        self.handle
            .look(|world| Ok(health::status(world)))
            .await
            .map(Response::new)
    }
}

/// What the holder of a volume should know.
fn advise(world: &World<'_>, volume: VolumeId, report: &AttachmentReport) -> AttachmentAdvice {
    let known = world.state.volumes().get(&volume);
    let is_last = known.is_some_and(|known| known.generation == report.generation);
    let is_wanted = |node| world.soft.heal.is_cared_for_by(volume, node);
    let newer = |index: &GroupIndex, epoch: Epoch| {
        let group = world.state.groups().get(&GroupId { volume, index: *index });
        group.is_some_and(|group| group.epoch > epoch)
    };
    let look = report.groups.iter().filter(|(index, group)| newer(index, group.epoch));
    AttachmentAdvice {
        volume_id: volume.0,
        give_way: report.caretaker.is_some_and(|node| !is_last || !is_wanted(node)),
        look: look.map(|(index, _)| index.0.into()).collect(),
        generation: known.map_or(0, |known| known.generation.get()),
    }
}

/// Says of ejections why they are, as far as the leader knows, where the client has not.
fn give_causes(world: &World<'_>, configure: &mut command::ConfigureGroups) {
    let Ok((volume, _)) = world.state.find(&configure.volume) else {
        return;
    };
    for change in configure.changes.iter_mut().filter(|change| change.cause.is_empty()) {
        let id = GroupId {
            volume,
            index: change.index,
        };
        let Some(group) = world.state.groups().get(&id) else {
            continue;
        };
        let ejected = group.in_sync.iter().find(|device| !change.in_sync.contains(device));
        change.cause = match ejected {
            None => continue,
            Some(device) if world.soft.report(device).is_some_and(|report| report.failed) => {
                "it can't acknowledge writes".to_string()
            }
            Some(device) if !world.soft.is_served(device, world.now) => "it is not heard of".to_string(),
            Some(_) => "its client finds it cut off, slow or behind".to_string(),
        };
    }
}

fn list_events(state: &State, request: &ListEventsRequest) -> ListEventsResponse {
    let limit = page(request.limit);
    let of_volume = |event: &events::Event| request.volume.is_empty() || event.name == request.volume;
    let mut found = state.events_after(request.after).filter(|(_, event)| of_volume(event));
    let (events, more) = if request.newest {
        let mut events: Vec<Event> = found.rev().take(limit).map(|(id, event)| to_event(id, event)).collect();
        events.reverse();
        (events, false)
    } else {
        let page = found.by_ref().take(limit);
        let events = page.map(|(id, event)| to_event(id, event)).collect();
        (events, found.next().is_some())
    };
    ListEventsResponse {
        events,
        more,
        first_id: state.events().next().map_or(0, |(id, _)| id),
        last_id: state.last_event(),
    }
}

/// Used where a service needs the code of a missing token.
pub(super) fn unauthenticated() -> Status {
    refuse(Refusal::new(
        Code::Unauthenticated,
        "this call needs the cluster key: start the caller with the key file of this cluster",
    ))
}
