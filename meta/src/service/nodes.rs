//! The service of storage nodes.

use std::collections::BTreeSet;

use cairn_proto::capability::ClusterKey;
use cairn_proto::control::v1::nodes_server::Nodes;
use cairn_proto::control::v1::*;
use cairn_proto::control::{Code, TOKEN_KEY, TokenPurpose};
use cairn_proto::ids::{CommitSeq, DeviceId, DeviceUuid, Epoch, Generation, GroupId, GroupIndex, NodeId, VolumeId};
use tonic::{Request, Response, Status};

use super::control::unauthenticated;
use super::convert;
use super::convert::*;
use super::driver::{Failure, Handle, World};
use super::soft::Looked;
use crate::limits::{
    ADDRESSES_MAX, DAMAGED_VOLUMES_MAX, DEVICES_PER_NODE_MAX, HELD_VOLUMES_MAX, INVENTORY_PAGE_MAX, NODE_HEARTBEAT_MS,
};
use crate::state::command::{self, DeviceRegistration};
use crate::state::{Outcome, Refusal};

pub(super) struct NodesService {
    pub(super) handle: Handle,
    pub(super) key: ClusterKey,
}

/// Refuses a call without the right token.
pub(super) fn check_token<T>(request: &Request<T>, key: &ClusterKey, purpose: TokenPurpose) -> Result<(), Status> {
    let token = request.metadata().get(TOKEN_KEY).and_then(|token| token.to_str().ok());
    let right = token.is_some_and(|token| purpose.verify(key, token));
    if right { Ok(()) } else { Err(unauthenticated()) }
}

fn refuse(refusal: Refusal) -> Status {
    Failure::from(refusal).into()
}

/// The node must be registered, by this run of its process.
fn check_node(world: &World<'_>, id: NodeId, run: [u8; 16]) -> Result<(), Refusal> {
    world.check_leads()?;
    match world.state.nodes().get(&id) {
        None => Err(Refusal::new(
            Code::NodeNotFound,
            format!("no storage node has the id {id}: register it again"),
        )),
        Some(node) if node.run != run => Err(Refusal::new(
            Code::NodeSuperseded,
            format!(
                "another process has registered as node `{}` since: stop one of the two, or give it another name",
                node.name
            ),
        )),
        Some(_) => Ok(()),
    }
}

fn registration(device: &RegisterDevice) -> Result<DeviceRegistration, Refusal> {
    if device.addresses.len() > ADDRESSES_MAX {
        return Err(invalid(format!("a device has at most {ADDRESSES_MAX} addresses")));
    }
    Ok(DeviceRegistration {
        id: device_id(device.id.as_ref())?,
        addresses: device.addresses.clone(),
        capacity_bytes: device.capacity_bytes,
        used_bytes: device.used_bytes,
        commit_seq: CommitSeq(device.commit_seq),
        cluster: cluster_id(&device.cluster_id)?,
        displace: false,
    })
}

/// Whether no node says any more that it serves the device.
fn may_displace(world: &World<'_>, uuid: DeviceUuid) -> bool {
    let mut formats = world.state.devices().keys().filter(|id| id.uuid == uuid);
    formats.all(|id| !world.soft.is_served(id, world.now))
}

#[tonic::async_trait]
impl Nodes for NodesService {
    async fn register_node(
        &self,
        request: Request<RegisterNodeRequest>,
    ) -> Result<Response<RegisterNodeResponse>, Status> {
        check_token(&request, &self.key, TokenPurpose::Node)?;
        let request = request.into_inner();
        if request.devices.len() > DEVICES_PER_NODE_MAX {
            return Err(refuse(invalid(format!(
                "a node serves at most {DEVICES_PER_NODE_MAX} devices"
            ))));
        }
        let devices: Result<Vec<_>, Refusal> = request.devices.iter().map(registration).collect();
        let mut register = command::RegisterNode {
            name: request.name,
            run: run_id(&request.run_id).map_err(refuse)?,
            domain: domain(request.domain),
            version: request.version,
            feature_level: request.feature_level,
            devices: devices.map_err(refuse)?,
        };
        let answer = self.handle.propose(
            move |world| {
                for device in &mut register.devices {
                    device.displace = may_displace(world, device.id.uuid);
                }
                Ok(register.into())
            },
            |outcome, world| {
                let Outcome::Registered { node, devices } = outcome else {
                    unreachable!("not the outcome of a registration: {outcome:?}")
                };
                world.soft.heard_node(node, world.now);
                let served = devices.iter().filter(|device| device.refusal.is_none());
                let served: BTreeSet<DeviceId> = served.map(|device| device.id).collect();
                let (state, now) = (world.state, world.now);
                world.soft.heal.heard_start(node, &served, state, now);
                let device = |device: crate::state::DeviceOutcome| DeviceOutcome {
                    id: Some(to_device_id(&device.id)),
                    code: device
                        .refusal
                        .as_ref()
                        .map(|refusal| refusal.code.as_str().to_string())
                        .unwrap_or_default(),
                    message: device.refusal.map(|refusal| refusal.message).unwrap_or_default(),
                    forgot: device.forgot,
                };
                RegisterNodeResponse {
                    node_id: node.0,
                    cluster_id: world
                        .state
                        .cluster()
                        .map(|cluster| cluster.0.to_vec())
                        .unwrap_or_default(),
                    feature_level: world.state.feature_level(),
                    heartbeat_interval_ms: NODE_HEARTBEAT_MS,
                    devices: devices.into_iter().map(device).collect(),
                }
            },
        );
        answer.await.map(Response::new)
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        check_token(&request, &self.key, TokenPurpose::Node)?;
        let request = request.into_inner();
        if request.devices.len() > DEVICES_PER_NODE_MAX {
            return Err(refuse(invalid(format!(
                "a node serves at most {DEVICES_PER_NODE_MAX} devices"
            ))));
        }
        if request.held.len() > HELD_VOLUMES_MAX || request.damaged.len() > DAMAGED_VOLUMES_MAX {
            return Err(refuse(invalid(format!(
                "a heartbeat names at most {HELD_VOLUMES_MAX} volumes that are held and {DAMAGED_VOLUMES_MAX} with damage"
            ))));
        }
        let run = run_id(&request.run_id).map_err(refuse)?;
        let answer = self.handle.look(move |world| {
            let node = NodeId(request.node_id);
            check_node(world, node, run)?;
            world.soft.heard_node(node, world.now);
            let mut send_inventory = Vec::new();
            let mut scrub = Vec::new();
            for device in &request.devices {
                let report = device_report(device)?;
                let id = report.id;
                let known = world.state.devices().get(&id).is_some_and(|known| known.node == node);
                if known {
                    world.soft.heard_served(id, world.now);
                }
                if known
                    && world
                        .soft
                        .heard_device(report, Looked::at(device.inventory_digest, world.state), world.now)
                {
                    send_inventory.push(to_device_id(&id));
                }
                world.soft.heard_write_cache(&id, device.write_cache());
                if world.soft.heard_scrub(&id, device.scrub) && known {
                    scrub.push(to_device_id(&id));
                }
            }
            // A generation that can't be is none that was granted.
            let held = request.held.iter();
            let held = held.filter_map(|held| Some((VolumeId(held.volume_id), Generation::new(held.generation)?)));
            let damaged = request.damaged.iter().map(|volume| VolumeId(*volume));
            world
                .soft
                .heal
                .heard_volumes(node, held, damaged, world.state, world.now);
            let task = |(volume, generation): (VolumeId, Generation)| CareTask {
                volume_id: volume.0,
                generation_seen: generation.get(),
            };
            Ok(HeartbeatResponse {
                heartbeat_interval_ms: NODE_HEARTBEAT_MS,
                send_inventory,
                scrub,
                members: convert::addresses(world),
                feature_level: world.state.feature_level(),
                care: world.soft.heal.tasks_of(node).into_iter().map(task).collect(),
            })
        });
        answer.await.map(Response::new)
    }

    async fn report_inventory(
        &self,
        request: Request<InventoryRequest>,
    ) -> Result<Response<InventoryResponse>, Status> {
        check_token(&request, &self.key, TokenPurpose::Node)?;
        let request = request.into_inner();
        if request.groups.len() > INVENTORY_PAGE_MAX {
            return Err(refuse(invalid(format!(
                "a page of an inventory has at most {INVENTORY_PAGE_MAX} groups"
            ))));
        }
        let run = run_id(&request.run_id).map_err(refuse)?;
        let device = device_id(request.device.as_ref()).map_err(refuse)?;
        // A linearizable read: a Join that has reached the device before the page was begun is in the state then.
        let answer = self.handle.read(move |world| {
            check_node(world, NodeId(request.node_id), run)?;
            let looked = Looked::at(request.inventory_digest, world.state);
            world
                .soft
                .heard_inventory(device, request.page, request.last, looked, world.now);
            let is_unneeded = |held: &HeldGroup| {
                let index = u8::try_from(held.index).ok().map(GroupIndex);
                let volume = VolumeId(held.volume_id);
                let is_unnamed = |index| {
                    let id = GroupId { volume, index };
                    world.state.is_unnamed(id, &device, Epoch(held.epoch))
                };
                world.state.is_deleted(volume) || index.is_some_and(is_unnamed)
            };
            Ok(InventoryResponse {
                drop: request
                    .groups
                    .iter()
                    .filter(|held| is_unneeded(held))
                    .copied()
                    .collect(),
            })
        });
        answer.await.map(Response::new)
    }
}
