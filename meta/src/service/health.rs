//! How the cluster is, in numbers and in words.

use cairn_proto::control::v1::{Drain, Problem, StatusResponse, VolumeHealth};
use cairn_proto::ids::{DeviceId, NodeId, VolumeId};
use cairn_proto::units::ByteSize;

use super::convert;
use super::driver::World;
use crate::heal::condition::{Look, RepairState, Totals, VolumeCondition};
use crate::limits::UNHEALTHY_MAX;
use crate::state::model::{self, Device, DeviceState, Node};

/// Problems in one answer at the most.
const PROBLEMS_MAX: usize = 100;
/// Volumes that one problem names at the most.
const NAMES_MAX: usize = 3;
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
    if !world.leads {
        answer.groups = state.groups().len() as u64;
        answer.problems = problems(world, &Totals::default(), &[]);
        return answer;
    }
    let (totals, unwell) = conditions(world);
    answer.problems = problems(world, &totals, &unwell);
    answer.groups = totals.groups;
    answer.groups_degraded = totals.degraded;
    answer.groups_below_quorum = totals.below_quorum;
    answer.repairs = totals.repairs;
    answer.volumes_unhealthy = unwell.len() as u64;
    let shown = unwell.iter().take(UNHEALTHY_MAX);
    answer.unhealthy = shown
        .map(|condition| convert::to_volume_health(condition, state, false))
        .collect();
    let rebuild_after = world.soft.heal_settings.rebuild_after.as_millis();
    answer.drains = drains(world);
    answer.rebuild_after_ms = u64::try_from(rebuild_after).unwrap_or(u64::MAX);
    answer
}

/// How far nodes are emptied.
fn drains(world: &World<'_>) -> Vec<Drain> {
    let (state, mut look) = (world.state, look(world));
    let draining = state
        .nodes()
        .iter()
        .filter_map(|(id, node)| Some((*id, node, node.draining.as_ref()?)));
    let drain = |(id, node, draining): (NodeId, &Node, &model::Drain)| {
        let mut drain = Drain {
            node_id: id.0,
            node: node.name.clone(),
            since_unix_ms: draining.since_ms,
            copies_at_start: draining.copies,
            ..Drain::default()
        };
        for (group_id, group, device) in state.copies_on(id) {
            drain.copies_left += 1;
            let moves = group.moving.as_ref().is_some_and(|moving| moving.from == device);
            drain.copies_moving += u64::from(moves);
            let waits = !moves && group.has(&device);
            let volume = &state.volumes()[&group_id.volume];
            drain.copies_without_place += u64::from(waits && !look.has_spare(volume, group, &device));
        }
        drain
    };
    draining.map(drain).collect()
}

fn problems(world: &World<'_>, totals: &Totals, unwell: &[VolumeCondition]) -> Vec<Problem> {
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
    volume_problems(world, totals, unwell, &mut say);
    problems
}

fn device_problem(world: &World<'_>, id: &DeviceId, device: &Device) -> Option<(&'static str, String)> {
    if matches!(device.state, DeviceState::Replaced | DeviceState::Removed) {
        // Whatever was wrong with it: what counts from now on is whether its copies are elsewhere.
        return None;
    }
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
    // What a device said before it fell silent is of no use: it may be gone for good, with its damage.
    let scrub = found.scrub.filter(|_| found.seems_alive);
    if let Some(scrub) = scrub.filter(|scrub| scrub.damaged_blocks + scrub.damaged_metadata > 0) {
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

/// How a volume is, all its groups included.
pub(super) fn volume(world: &World<'_>, id: VolumeId) -> Option<VolumeHealth> {
    let condition = look(world).volume(id)?;
    Some(convert::to_volume_health(&condition, world.state, true))
}

fn look<'a>(world: &'a World<'_>) -> Look<'a> {
    Look::new(world.state, &world.soft.heal, world.now, &world.soft.heal_settings)
}

/// Sums over all volumes, and those that are not well: the ones with the fewest copies first.
fn conditions(world: &World<'_>) -> (Totals, Vec<VolumeCondition>) {
    let (mut look, mut totals) = (look(world), Totals::default());
    let mut unwell = Vec::new();
    for id in world.state.volumes().keys() {
        let condition = look.volume(*id).expect("the volume is there");
        totals.add(&condition);
        if !condition.is_well() {
            unwell.push(condition);
        }
    }
    unwell.sort_by_key(|condition| (condition.fewest_copies(), condition.volume));
    (totals, unwell)
}

/// Names of volumes, a few of them.
fn names<'a>(world: &World<'_>, volumes: impl Iterator<Item = &'a VolumeCondition>) -> String {
    let names: Vec<String> = volumes
        .filter_map(|condition| world.state.volumes().get(&condition.volume))
        .map(|volume| format!("`{}`", volume.name))
        .collect();
    match names.len() {
        count @ 0..=NAMES_MAX => names[..count].join(", "),
        count => format!("{} and {} more", names[..NAMES_MAX].join(", "), count - NAMES_MAX),
    }
}

/// What is to be said about volumes.
fn volume_problems(world: &World<'_>, totals: &Totals, unwell: &[VolumeCondition], say: &mut impl FnMut(&str, String)) {
    let that = |filter: fn(&&VolumeCondition) -> bool| names(world, unwell.iter().filter(filter));
    if totals.below_quorum > 0 {
        let volumes = that(|condition| condition.groups.iter().any(|group| group.below_quorum));
        say(
            "groups-below-quorum",
            format!(
                "{} groups of {volumes} have too few copies within reach: their I/O waits until enough of the nodes above \
                 are back",
                totals.below_quorum
            ),
        );
    }
    if totals.degraded > 0 {
        let (degraded, filling) = (totals.degraded, totals.filling);
        let after = world.soft.heal_settings.patience();
        say(
            "groups-degraded",
            format!(
                "{degraded} groups of volumes have fewer copies within reach than they should, {filling} of them get one \
                 more just now: see to the nodes above; what is gone for {} s is rebuilt elsewhere",
                after.as_secs()
            ),
        );
    }
    if totals.no_spare > 0 {
        let no_spare = |condition: &&VolumeCondition| {
            let mut repairs = condition.repairs.iter();
            repairs.any(|repair| repair.state == RepairState::NoSpare)
        };
        say(
            "no-spare",
            format!(
                "{} copies of {} are lost, and no device with enough room stands far enough from the others to take them: \
                 add a node, or bring the old ones back",
                totals.no_spare,
                that(no_spare)
            ),
        );
    }
    if totals.damaged_volumes > 0 {
        say(
            "volumes-damaged",
            format!(
                "blocks of {} are damaged on some device and not repaired yet: other copies are read instead",
                that(|condition| condition.damaged)
            ),
        );
    }
    let cared_for = |condition: &&VolumeCondition| condition.caretaker;
    if totals.caretakers > 0 && unwell.iter().any(|condition| cared_for(&condition)) {
        say(
            "caretaker-at-work",
            format!(
                "nobody uses {}: a node fills up the copies meanwhile, and gives way to any client",
                that(cared_for)
            ),
        );
    }
}

/// The numbers for whoever watches.
pub(super) fn gauge(world: &World<'_>) {
    let (totals, unwell) = match world.leads {
        true => conditions(world),
        false => (Totals::default(), vec![]),
    };
    let set = |name: &'static str, value: u64| metrics::gauge!(name).set(value as f64);
    set("cairn_meta_groups", totals.groups);
    set("cairn_meta_groups_degraded", totals.degraded);
    set("cairn_meta_groups_below_quorum", totals.below_quorum);
    set("cairn_meta_volumes_unhealthy", unwell.len() as u64);
    set("cairn_meta_volumes_damaged", totals.damaged_volumes);
    set("cairn_meta_repairs", totals.repairs);
    set("cairn_meta_repairs_without_spare", totals.no_spare);
    set("cairn_meta_caretakers", totals.caretakers);
    let repairs = unwell.iter().flat_map(|condition| &condition.repairs);
    let rate = repairs
        .filter_map(|repair| repair.bytes_per_second)
        .fold(0, u64::saturating_add);
    set("cairn_meta_repair_bytes_per_second", rate);
    set("cairn_meta_events", world.state.last_event());
}
