//! How the cluster is, in numbers and in words.

use std::collections::BTreeSet;

use cairn_proto::control::v1::{Problem, StatusResponse};
use cairn_proto::ids::DeviceId;
use cairn_proto::units::ByteSize;

use super::convert;
use super::driver::World;
use crate::state::model::{Device, DeviceState};

/// Problems in one answer at the most.
const PROBLEMS_MAX: usize = 100;
/// From this part of a device's capacity on it is said to fill up: 90 of 100.
const FULL_PERCENT: u64 = 90;

pub(super) fn status(world: &World<'_>) -> StatusResponse {
    let state = world.state;
    let in_use = |device: &Device| matches!(device.state, DeviceState::Active | DeviceState::Failed);
    let mut answer = StatusResponse {
        cluster_id: state.cluster().map(|cluster| cluster.0.to_vec()).unwrap_or_default(),
        member_id: world.status.id,
        leader_id: world.status.leader,
        leader_address: state
            .members()
            .get(&world.status.leader)
            .map(|leader| leader.address.clone())
            .unwrap_or_default(),
        members: convert::members(world),
        term: world.status.term,
        commit_index: world.status.commit,
        applied_index: world.status.applied,
        feature_level: state.feature_level(),
        volumes: state.volumes().len() as u64,
        nodes: state.nodes().len() as u64,
        version: env!("CARGO_PKG_VERSION").to_string(),
        ..StatusResponse::default()
    };
    for (id, device) in state.devices().iter().filter(|(_, device)| in_use(device)) {
        let report = world.soft.report(id);
        answer.devices += 1;
        answer.devices_alive += u64::from(world.leads && world.soft.is_served(id, world.now));
        answer.capacity_bytes += report.map_or(device.capacity_bytes, |report| report.capacity_bytes);
        answer.used_bytes += report.map_or(device.used_bytes, |report| report.used_bytes);
    }
    answer.problems = problems(world);
    answer
}

fn problems(world: &World<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut say = |code: &str, message: String| {
        if problems.len() < PROBLEMS_MAX {
            problems.push(Problem {
                code: code.to_string(),
                message,
            });
        }
    };
    if world.status.leader == 0 {
        say(
            "no-leader",
            "no metadata server leads: volumes in use go on, nothing can be changed; start the others until a majority \
             runs"
                .to_string(),
        );
    }
    if !world.leads {
        return problems;
    }
    for member in convert::members(world).iter().filter(|member| !member.seems_alive) {
        let (id, address) = (member.id, &member.address);
        say(
            "meta-silent",
            format!("metadata server {id} ({address}) does not answer: start it, or remove it"),
        );
    }
    for (id, node) in world
        .state
        .nodes()
        .iter()
        .filter(|(id, _)| !world.soft.is_alive(**id, world.now))
    {
        let heard = world.soft.heard_ms_ago(*id, world.now);
        let since = heard.map_or("since this leader took over".to_string(), |ms| {
            format!("for {} s", ms / 1000)
        });
        say(
            "node-silent",
            format!(
                "storage node `{}` was not heard of {since}: start it, or see to its host",
                node.name
            ),
        );
    }
    for (id, device) in world.state.devices() {
        if let Some((code, message)) = device_problem(world, id, device) {
            say(code, message);
        }
    }
    let (degraded, filling) = degraded_groups(world);
    if degraded > 0 {
        say(
            "groups-degraded",
            format!(
                "{degraded} groups of volumes have fewer copies within reach than they should, {filling} of them get one \
                 more just now: see to the nodes above; a node that is back is filled up while its volumes are in use"
            ),
        );
    }
    problems
}

fn device_problem(world: &World<'_>, id: &DeviceId, device: &Device) -> Option<(&'static str, String)> {
    let found = convert::to_device(id, world, 0)?;
    let node = world.state.nodes().get(&device.node).map_or("?", |node| &node.name);
    if device.forgot {
        return Some((
            "device-forgot",
            format!(
                "device {id} of node `{node}`: {}; replace it, or format it anew",
                device.trouble
            ),
        ));
    }
    if found.state == i32::from(cairn_proto::control::v1::DeviceState::Failed) {
        return Some((
            "device-failed",
            format!(
                "device {id} of node `{node}` can't acknowledge writes ({}): see to it, then restart the node",
                found.trouble
            ),
        ));
    }
    if let Some(scrub) = found
        .scrub
        .filter(|scrub| scrub.damaged_blocks + scrub.damaged_metadata > 0)
    {
        let metadata = match scrub.damaged_metadata {
            0 => String::new(),
            parts => format!(" and {parts} parts of its own metadata"),
        };
        return Some((
            "device-damaged",
            format!(
                "device {id} of node `{node}` holds {} blocks that can't be read as they were written{metadata}: other \
                 copies are read instead; see to the disk",
                scrub.damaged_blocks
            ),
        ));
    }
    if device.state == DeviceState::Active && found.used_bytes / FULL_PERCENT >= (found.capacity_bytes / 100).max(1) {
        return Some((
            "device-full",
            format!(
                "device {id} of node `{node}` fills up ({} of {}): add devices, or delete what is not needed",
                ByteSize(found.used_bytes),
                ByteSize(found.capacity_bytes)
            ),
        ));
    }
    None
}

/// Groups with fewer copies in sync and within reach than they should have, and how many of them are being filled up.
fn degraded_groups(world: &World<'_>) -> (usize, usize) {
    let devices = world.state.devices().iter();
    let reachable =
        devices.filter(|(id, device)| device.state == DeviceState::Active && world.soft.is_served(id, world.now));
    let reachable: BTreeSet<DeviceId> = reachable.map(|(id, _)| *id).collect();
    let groups = world.state.groups().iter();
    let degraded = groups.filter(|(id, group)| {
        let replicas = usize::from(world.state.volumes()[&id.volume].replicas);
        group.in_sync.iter().filter(|device| reachable.contains(device)).count() < replicas
    });
    let degraded: Vec<_> = degraded.collect();
    let filling = degraded.iter().filter(|(_, group)| !group.joining.is_empty());
    (degraded.len(), filling.count())
}
