//! Copies that are to be elsewhere though nothing is wrong with them: those of a node that is to be emptied, and those that
//! stand closer to each other than they need to, because a device or a node has moved. The lowest priority of all: a group
//! that lacks a copy is no business of this.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_proto::ids::{DeviceId, GroupId};
use cairn_proto::time::Time;

use super::decide::Standings;
use super::view::{Duty, View};
use crate::limits::{DRAINS_MAX, REBUILDS_MAX, SPARE_LOOKS_MAX, SPREAD_LOOK_MS, SPREAD_SETTLED_MS, SPREADS_MAX};
use crate::state::command::{Command, MoveMember, ReplaceMember};
use crate::state::model::{FailureDomain, Group, Move, State, Volume};
use crate::state::placement::{Spares, closeness_of};

/// How close a device stands to the nearest of the others in sync.
fn nearest(state: &State, group: &Group, from: &DeviceId, device: &DeviceId) -> usize {
    let others = group.in_sync.iter().filter(|other| *other != from);
    others
        .map(|other| closeness_of(state, device, other))
        .max()
        .unwrap_or(0)
}

/// Whether a copy should still move as was decided.
fn is_wanted(state: &State, group: &Group, moving: &Move) -> bool {
    let Move { from, to } = moving;
    state.is_draining(from) || nearest(state, group, from, to) < nearest(state, group, from, from)
}

/// What is under way, as far as it bounds what may begin.
struct Load {
    /// Spares that are being filled, on each device.
    filling: BTreeMap<DeviceId, usize>,
    /// Groups of which a copy moves.
    moving: usize,
    /// Spares that take the place of a lost copy.
    rebuilding: usize,
}

impl Load {
    fn new(state: &State) -> Load {
        let mut load = Load {
            filling: BTreeMap::new(),
            moving: 0,
            rebuilding: 0,
        };
        for group in state.groups().values() {
            let moves = usize::from(group.moving.is_some());
            load.moving += moves;
            load.rebuilding += group.rebuilding.len() - moves.min(group.rebuilding.len());
            for device in &group.rebuilding {
                *load.filling.entry(*device).or_default() += 1;
            }
        }
        load
    }
}

/// Which moves are to begin now, and which are not wanted any more.
pub(super) fn moves(state: &State, view: &mut View, standings: &Standings, now: Time) -> Vec<Command> {
    let mut commands: Vec<Command> = ended(state).map(Command::from).collect();
    let mut load = Load::new(state);
    if state.nodes().values().any(|node| node.draining.is_some()) && !view.neglects(Duty::Drain) {
        commands.extend(drains(state, view, standings, now, &mut load));
        // A node may stay empty, or wait for room, for as long as its operator likes.
        if load.moving > 0 {
            return commands;
        }
    }
    if view.neglects(Duty::Spread) {
        return commands;
    }
    let pause = Duration::from_millis(SPREAD_LOOK_MS);
    let due = view.spread_looked.is_none_or(|at| now.saturating_since(at) >= pause);
    if due && load.rebuilding == 0 {
        let from = view.spread_from.take();
        let (begun, rest) = spreads(state, view, standings, now, &mut load, from);
        commands.extend(begun);
        (view.spread_looked, view.spread_from) = (Some(now), rest);
    }
    commands
}

/// Copies that leave nodes which are to hold nothing.
fn drains(state: &State, view: &View, standings: &Standings, now: Time, load: &mut Load) -> Vec<Command> {
    let mut spares = usable(state, view, now);
    let mut commands = Vec::new();
    let wanted = whole_groups(state, standings).filter_map(|(id, volume, group)| {
        let from = group.in_sync.iter().find(|device| state.is_draining(device))?;
        Some((id, volume, group, *from))
    });
    for (id, volume, group, from) in wanted.take(SPARE_LOOKS_MAX) {
        if load.moving >= DRAINS_MAX || load.moving + load.rebuilding >= REBUILDS_MAX.0 {
            break;
        }
        let chosen = spares.choose(volume, group, from, |device| has_turn(load, device));
        commands.extend(chosen.map(|to| begin(load, id, group, (from, to), "its node is to hold nothing")));
    }
    commands
}

/// Copies that could stand further apart, a part of the groups at a time: those from `from` on. Where to go on.
fn spreads(
    state: &State,
    view: &View,
    standings: &Standings,
    now: Time,
    load: &mut Load,
    from: Option<GroupId>,
) -> (Vec<Command>, Option<GroupId>) {
    let settled = |device: &DeviceId| {
        let served = view.served_for(device, now);
        served.is_some_and(|served| served >= Duration::from_millis(SPREAD_SETTLED_MS))
    };
    let (floor, mut spares, mut commands) = (floor(state), None, Vec::new());
    let groups = whole_groups(state, standings).filter(|(id, ..)| from.is_none_or(|from| *id >= from));
    let uneven = groups.filter(|(_, _, group)| is_uneven(state, group, floor) && group.in_sync.iter().all(settled));
    for (looks, (id, volume, group)) in uneven.enumerate() {
        if looks >= SPARE_LOOKS_MAX || load.moving >= SPREADS_MAX {
            return (commands, Some(id));
        }
        let spares = spares.get_or_insert_with(|| usable(state, view, now));
        let chosen = group.in_sync.iter().find_map(|from| {
            let close = nearest(state, group, from, from);
            let able = |device: &DeviceId| {
                nearest(state, group, from, device) < close && settled(device) && has_turn(load, device)
            };
            Some((*from, spares.choose(volume, group, *from, able)?))
        });
        if let Some(places) = chosen {
            let cause = "it stands close to another copy, and there is room further away";
            commands.push(begin(load, id, group, places, cause));
        }
    }
    (commands, None)
}

/// Whether some pair of copies stands closer than any two must in this cluster.
fn is_uneven(state: &State, group: &Group, floor: usize) -> bool {
    let mut members = group.in_sync.iter();
    members.any(|device| nearest(state, group, device, device) > floor)
}

/// How close the two nodes that are furthest from each other stand.
fn floor(state: &State) -> usize {
    let differ = |level: fn(&FailureDomain) -> &String| {
        let mut names = state.nodes().values().map(|node| level(&node.domain));
        let first = names.next();
        names.any(|name| Some(name) != first)
    };
    match (differ(|domain| &domain.room), differ(|domain| &domain.rack)) {
        (true, _) => 0,
        (false, true) => 1,
        (false, false) => 2,
    }
}

/// Only who was really heard of can take something.
fn usable<'a>(state: &'a State, view: &View, now: Time) -> Spares<'a> {
    Spares::new(state, |device| view.served_for(device, now).is_none())
}

fn has_turn(load: &Load, device: &DeviceId) -> bool {
    load.filling.get(device).is_none_or(|count| *count < REBUILDS_MAX.1)
}

fn begin(load: &mut Load, id: GroupId, group: &Group, (from, to): (DeviceId, DeviceId), cause: &str) -> Command {
    load.moving += 1;
    *load.filling.entry(to).or_default() += 1;
    let command = MoveMember {
        volume: id.volume,
        index: id.index,
        epoch: group.epoch,
        from,
        to,
        cause: cause.to_string(),
    };
    command.into()
}

/// Groups that have all their copies, within reach, and nothing to do.
fn whole_groups<'a>(state: &'a State, standings: &Standings) -> impl Iterator<Item = (GroupId, &'a Volume, &'a Group)> {
    let groups = state
        .groups()
        .iter()
        .map(|(id, group)| (*id, &state.volumes()[&id.volume], group));
    groups.filter(|(_, volume, group)| {
        let idle = group.joining.is_empty() && group.stale.is_empty() && group.moving.is_none();
        let all = group.in_sync.len() >= usize::from(volume.replicas);
        idle && all && group.in_sync.iter().all(|device| standings.is_well(device))
    })
}

/// Moves that are not wanted any more: who was to take the place is let go.
fn ended(state: &State) -> impl Iterator<Item = ReplaceMember> {
    state.groups().iter().filter_map(|(id, group)| {
        let moving = group
            .moving
            .as_ref()
            .filter(|moving| !is_wanted(state, group, moving))?;
        Some(ReplaceMember {
            volume: id.volume,
            index: id.index,
            epoch: group.epoch,
            lost: moving.to,
            spare: None,
            cause: "the copy stays where it is".to_string(),
        })
    })
}
