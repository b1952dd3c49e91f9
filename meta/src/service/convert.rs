//! Between the records of the state and the messages of the control plane.

use std::collections::BTreeSet;

use cairn_proto::control::{Code, v1};
use cairn_proto::ids::*;
use cairn_proto::limits::GROUPS_PER_VOLUME_MAX;

use super::driver::World;
use crate::heal::condition::{GroupCondition, Repair, RepairState, VolumeCondition};
use crate::heal::{AttachmentReport, GroupReport, Phase, Progress};
use crate::limits::REPORTED_MEMBERS_MAX;
use crate::state::command::{DeviceReport, Selector};
use crate::state::model::{self, DeviceState, Group, Holder, Node, Spread, Volume};
use crate::state::{Refusal, State, events};

pub(super) fn invalid(message: impl Into<String>) -> Refusal {
    Refusal::new(Code::InvalidArgument, message)
}

fn uuid(bytes: &[u8], what: &str) -> Result<[u8; 16], Refusal> {
    bytes
        .try_into()
        .map_err(|_| invalid(format!("{what} has {} bytes, not 16", bytes.len())))
}

pub(super) fn client_id(bytes: &[u8]) -> Result<ClientId, Refusal> {
    uuid(bytes, "the client's id").map(ClientId)
}

pub(super) fn run_id(bytes: &[u8]) -> Result<[u8; 16], Refusal> {
    uuid(bytes, "the run's id")
}

pub(super) fn cluster_id(bytes: &[u8]) -> Result<Option<ClusterId>, Refusal> {
    if bytes.is_empty() {
        Ok(None)
    } else {
        uuid(bytes, "the cluster's id").map(|id| Some(ClusterId(id)))
    }
}

pub(super) fn device_id(id: Option<&v1::DeviceId>) -> Result<DeviceId, Refusal> {
    let id = id.ok_or_else(|| invalid("a device's id is missing"))?;
    let uuid = uuid(&id.uuid, "a device's UUID").map(DeviceUuid)?;
    Ok(DeviceId {
        uuid,
        incarnation: Incarnation(id.incarnation),
    })
}

pub(super) fn device_ids(ids: &[v1::DeviceId]) -> Result<Vec<DeviceId>, Refusal> {
    ids.iter().map(|id| device_id(Some(id))).collect()
}

pub(super) fn generation(number: u32) -> Result<Generation, Refusal> {
    Generation::new(number).ok_or_else(|| {
        invalid(format!(
            "{number} is no generation: the last one is {}",
            Generation::MAX
        ))
    })
}

pub(super) fn group_index(number: u32) -> Result<GroupIndex, Refusal> {
    u8::try_from(number)
        .map(GroupIndex)
        .map_err(|_| invalid(format!("there is no group {number}")))
}

pub(super) fn selector(volume: Option<v1::VolumeSelector>) -> Result<Selector, Refusal> {
    match volume.and_then(|volume| volume.by) {
        Some(v1::volume_selector::By::Id(id)) => Ok(Selector::Id(VolumeId(id))),
        Some(v1::volume_selector::By::Name(name)) if name.len() <= 4096 => Ok(Selector::Name(name)),
        Some(v1::volume_selector::By::Name(_)) => Err(invalid("the volume's name is too long")),
        None => Err(invalid("say which volume, by id or by name")),
    }
}

pub(super) fn spread(number: i32) -> Result<Spread, Refusal> {
    match v1::Spread::try_from(number) {
        Ok(v1::Spread::Unspecified | v1::Spread::Host) => Ok(Spread::Host),
        Ok(v1::Spread::Device) => Ok(Spread::Device),
        Ok(v1::Spread::Rack) => Ok(Spread::Rack),
        Ok(v1::Spread::Room) => Ok(Spread::Room),
        Err(_) => Err(invalid(format!("this version knows no spread {number}"))),
    }
}

pub(super) fn domain(domain: Option<v1::FailureDomain>) -> model::FailureDomain {
    let v1::FailureDomain { room, rack, host } = domain.unwrap_or_default();
    model::FailureDomain { room, rack, host }
}

pub(super) fn device_report(report: &v1::DeviceHeartbeat) -> Result<DeviceReport, Refusal> {
    Ok(DeviceReport {
        id: device_id(report.id.as_ref())?,
        capacity_bytes: report.capacity_bytes,
        used_bytes: report.used_bytes,
        commit_seq: CommitSeq(report.commit_seq),
        failed: report.failed,
        trouble: report.trouble.chars().take(64).collect(),
    })
}

/// What a holder said of a volume.
pub(super) fn attachment_report(report: &v1::AttachmentReport) -> Result<(VolumeId, AttachmentReport), Refusal> {
    if report.groups.len() > usize::from(GROUPS_PER_VOLUME_MAX) {
        return Err(invalid(format!(
            "a report has at most {GROUPS_PER_VOLUME_MAX} groups of a volume"
        )));
    }
    let groups = report.groups.iter().map(group_report);
    let described = AttachmentReport {
        generation: generation(report.generation)?,
        caretaker: report.caretaker.then_some(NodeId(report.node_id)),
        groups: groups.collect::<Result<_, _>>()?,
        damaged_blocks: report.damaged_blocks,
        repaired_blocks: report.repaired_blocks,
    };
    Ok((VolumeId(report.volume_id), described))
}

fn group_report(report: &v1::GroupReport) -> Result<(GroupIndex, GroupReport), Refusal> {
    if report.members.len() > REPORTED_MEMBERS_MAX {
        return Err(invalid(format!(
            "a report has at most {REPORTED_MEMBERS_MAX} members of a group"
        )));
    }
    let phase = match report.phase() {
        v1::GroupPhase::Unspecified => return Err(invalid("say how far the group is")),
        v1::GroupPhase::Sealing => Phase::Sealing,
        v1::GroupPhase::Waiting => Phase::Waiting,
        v1::GroupPhase::Reconciling => Phase::Reconciling,
        v1::GroupPhase::Serving => Phase::Serving,
        v1::GroupPhase::Fenced => Phase::Fenced,
    };
    let member = |member: &v1::MemberReport| {
        let progress = Progress {
            connected: member.connected,
            complete: member.complete,
            lacking_blocks: member.lacking_blocks,
            copied_blocks: member.copied_blocks,
            comparing: member.comparing,
        };
        Ok((device_id(member.device.as_ref())?, progress))
    };
    let described = GroupReport {
        epoch: Epoch(report.epoch),
        phase,
        members: report.members.iter().map(member).collect::<Result<_, _>>()?,
    };
    Ok((group_index(report.index)?, described))
}

pub(super) fn to_device_id(id: &DeviceId) -> v1::DeviceId {
    v1::DeviceId {
        uuid: id.uuid.0.to_vec(),
        incarnation: id.incarnation.0,
    }
}

fn to_device_ids(ids: &[DeviceId]) -> Vec<v1::DeviceId> {
    ids.iter().map(to_device_id).collect()
}

pub(super) fn to_volume(id: VolumeId, volume: &Volume) -> v1::Volume {
    let holder = |holder: &Holder| v1::Holder {
        client_id: holder.client.0.to_vec(),
        address: holder.address.clone(),
        generation: holder.generation.get(),
        since_unix_ms: holder.since_ms,
        caretaker: holder.caretaker,
    };
    v1::Volume {
        id: id.0,
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        group_count: volume.group_count.get().into(),
        replicas: volume.replicas.into(),
        write_quorum: volume.write_quorum.into(),
        min_copies_one: volume.min_copies_one,
        checksum_algorithm: volume.checksum as u32,
        layer: volume.layer.0,
        generation: volume.generation.get(),
        holder: volume.holder.as_ref().map(holder),
        created_unix_ms: volume.created_ms,
    }
}

pub(super) fn to_group(index: GroupIndex, group: &Group) -> v1::GroupConfig {
    v1::GroupConfig {
        index: index.0.into(),
        epoch: group.epoch.0,
        in_sync: to_device_ids(&group.in_sync),
        joining: to_device_ids(&group.joining),
        stale: to_device_ids(&group.stale),
        rescue: to_device_ids(&group.rescue),
        rebuilding: to_device_ids(&group.rebuilding),
        moving_from: group.moving.as_ref().map(|moving| to_device_id(&moving.from)),
        moving_to: group.moving.as_ref().map(|moving| to_device_id(&moving.to)),
    }
}

pub(super) fn to_volume_health(condition: &VolumeCondition, state: &State, whole_too: bool) -> v1::VolumeHealth {
    let name = state
        .volumes()
        .get(&condition.volume)
        .map(|volume| volume.name.clone())
        .unwrap_or_default();
    let count = |filter: fn(&&GroupCondition) -> bool| condition.groups.iter().filter(filter).count() as u32;
    let groups = condition.groups.iter().filter(|group| whole_too || !group.is_whole());
    v1::VolumeHealth {
        volume_id: condition.volume.0,
        groups_whole: count(|group| group.is_whole()),
        groups_degraded: count(|group| group.is_degraded()),
        groups_below_quorum: count(|group| group.below_quorum),
        groups: groups.map(to_group_health).collect(),
        damaged: condition.damaged,
        caretaker: condition.caretaker,
        repairs: condition
            .repairs
            .iter()
            .map(|repair| to_repair(repair, condition, &name, state))
            .collect(),
        damaged_blocks: condition.damaged_blocks.0,
        repaired_blocks: condition.damaged_blocks.1,
        volume: name,
    }
}

fn to_group_health(group: &GroupCondition) -> v1::GroupHealth {
    let phase = group.phase.map_or(v1::GroupPhase::Unspecified, |phase| match phase {
        Phase::Sealing => v1::GroupPhase::Sealing,
        Phase::Waiting => v1::GroupPhase::Waiting,
        Phase::Reconciling => v1::GroupPhase::Reconciling,
        Phase::Serving => v1::GroupPhase::Serving,
        Phase::Fenced => v1::GroupPhase::Fenced,
    });
    v1::GroupHealth {
        index: group.index.0.into(),
        copies_wanted: group.wanted as u32,
        copies_in_sync: group.in_sync as u32,
        copies_reachable: group.reachable as u32,
        joining: group.joining as u32,
        stale: group.stale as u32,
        below_quorum: group.below_quorum,
        phase: phase.into(),
    }
}

fn to_repair(repair: &Repair, condition: &VolumeCondition, name: &str, state: &State) -> v1::Repair {
    let repair_state = match repair.state {
        RepairState::AwaitingReturn => v1::RepairState::AwaitingReturn,
        RepairState::NoSpare => v1::RepairState::NoSpare,
        RepairState::Waiting => v1::RepairState::Waiting,
        RepairState::Comparing => v1::RepairState::Comparing,
        RepairState::Copying => v1::RepairState::Copying,
    };
    let node = state.devices().get(&repair.device).map(|device| device.node);
    let name_of = |node: NodeId| state.nodes().get(&node).map(|node| node.name.clone());
    v1::Repair {
        node: node.and_then(name_of).unwrap_or_default(),
        volume_id: condition.volume.0,
        volume: name.to_string(),
        group: repair.index.0.into(),
        device: Some(to_device_id(&repair.device)),
        node_id: node.map_or(0, |node| node.0),
        state: repair_state.into(),
        rebuild: repair.rebuild,
        caretaker: condition.caretaker,
        copied_blocks: repair.copied_blocks,
        lacking_blocks: repair.lacking_blocks,
        bytes_per_second: repair.bytes_per_second.unwrap_or(0),
        remaining_ms: repair.remaining_ms,
    }
}

pub(super) fn to_event(id: u64, event: &events::Event) -> v1::Event {
    v1::Event {
        id,
        unix_ms: event.time_ms,
        kind: event.kind.as_str().to_string(),
        message: event.message.clone(),
        cause: event.cause.clone(),
        volume_id: event.volume.map_or(0, |volume| volume.0),
        volume: event.name.clone(),
        group: event.group.map(|index| index.0.into()),
        device: event.device.as_ref().map(to_device_id),
        node_id: event.node.map_or(0, |node| node.0),
    }
}

fn to_domain(domain: &model::FailureDomain) -> v1::FailureDomain {
    let model::FailureDomain { room, rack, host } = domain.clone();
    v1::FailureDomain { room, rack, host }
}

/// A device with what was heard of it lately. `groups` is how many it is a member of, where that was counted.
pub(super) fn to_device(id: &DeviceId, world: &World<'_>, groups: u64) -> Option<v1::Device> {
    let device = world.state.devices().get(id)?;
    let report = world.soft.report(id);
    let state = match device.state {
        DeviceState::Active if report.is_some_and(|report| report.failed) => v1::DeviceState::Failed,
        DeviceState::Active => v1::DeviceState::Active,
        DeviceState::Failed => v1::DeviceState::Failed,
        DeviceState::Replaced => v1::DeviceState::Replaced,
        DeviceState::Removed => v1::DeviceState::Removed,
    };
    let in_use = matches!(device.state, DeviceState::Active | DeviceState::Failed);
    let node = world.state.nodes().get(&device.node);
    let trouble = report
        .map(|report| &report.trouble)
        .filter(|trouble| !trouble.is_empty() && !device.forgot);
    Some(v1::Device {
        id: Some(to_device_id(id)),
        node_id: device.node.0,
        addresses: device.addresses.clone(),
        capacity_bytes: report.map_or(device.capacity_bytes, |report| report.capacity_bytes),
        used_bytes: report.map_or(device.used_bytes, |report| report.used_bytes),
        domain: node.map(|node| to_domain(&node.domain)),
        state: state.into(),
        seems_alive: in_use && world.soft.is_served(id, world.now),
        commit_seq: report
            .map_or(device.commit_seq, |report| report.commit_seq.max(device.commit_seq))
            .0,
        heard_ms_ago: world.soft.heard_ms_ago(device.node, world.now),
        groups,
        trouble: trouble.unwrap_or(&device.trouble).clone(),
        write_cache: world.soft.write_cache(id).into(),
        scrub: world.soft.scrub(id),
    })
}

/// Every device that one of the groups names.
pub(super) fn devices_of<'a>(groups: impl Iterator<Item = &'a Group>, world: &World<'_>) -> Vec<v1::Device> {
    let ids: BTreeSet<DeviceId> = groups.flat_map(Group::named).copied().collect();
    ids.iter().filter_map(|id| to_device(id, world, 0)).collect()
}

pub(super) fn to_node(id: NodeId, node: &Node, world: &World<'_>, devices: Vec<v1::Device>) -> v1::Node {
    v1::Node {
        id: id.0,
        name: node.name.clone(),
        domain: Some(to_domain(&node.domain)),
        seems_alive: world.soft.is_alive(id, world.now),
        heard_ms_ago: world.soft.heard_ms_ago(id, world.now),
        version: node.version.clone(),
        devices,
        draining: node.draining.is_some(),
    }
}

/// Where all members are reached.
pub(super) fn addresses(world: &World<'_>) -> Vec<String> {
    let members = world.state.members().values();
    members.map(|member| member.address.clone()).collect()
}

pub(super) fn members(world: &World<'_>) -> Vec<v1::Member> {
    let leads = world.status.leader == world.status.id;
    let member = |(id, member): (&u64, &model::Member)| {
        let peer = world.status.peers.iter().find(|peer| peer.id == *id);
        v1::Member {
            id: *id,
            address: member.address.clone(),
            seems_alive: *id == world.status.id || world.soft.is_member_alive(*id, world.now),
            matched_index: peer.filter(|_| leads).map(|peer| peer.matched),
            directory: member.directory,
        }
    };
    world.state.members().iter().map(member).collect()
}
