//! What the leader does about devices that are silent, failed or gone: a function of the state and of what it has heard,
//! called once a second.
//!
//! Nothing here is needed for safety. Whatever it decides, [`State::apply`] checks what may be done to a group, and
//! [`View::displaceable`] whom a caretaker may displace; a wrong decision costs a copy too many, or time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cairn_proto::ids::{DeviceId, GroupId, NodeId, VolumeId};
use cairn_proto::time::Time;

use super::moves::moves;
use super::view::{Task, View};
use crate::limits::{
    CARE_PAUSE_MS, CARE_PER_NODE_MAX, CARE_STUCK_MS, NODE_SILENCE_MS, REBUILD_AFTER_MS, REBUILDS_MAX, REPORTS_MAX,
    SILENCE_NOTED_MS, UNSETTLED_PAUSE_MS,
};
use crate::state::command::{Command, DeviceNote, NoteDevices, ReplaceMember};
use crate::state::model::{DeviceState, Group, State, Volume};
use crate::state::placement::Spares;

/// What an operator decides about healing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealSettings {
    /// How long a device may be silent before its copies are rebuilt elsewhere; counted from when the leader heard it
    /// last, or began to lead.
    pub rebuild_after: Duration,
}

impl HealSettings {
    /// How long a silent device is really waited for: nobody is silent before [`NODE_SILENCE_MS`] have passed.
    pub fn patience(&self) -> Duration {
        self.rebuild_after.max(ms(NODE_SILENCE_MS))
    }
}

impl Default for HealSettings {
    fn default() -> HealSettings {
        HealSettings {
            rebuild_after: ms(REBUILD_AFTER_MS.0),
        }
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// How a device is, for those that have copies on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    /// It is heard of, and can be written.
    Well,
    /// It is silent, and has time to come back.
    Away,
    /// It is not waited for any more.
    Lost,
}

/// How each device is.
pub(crate) struct Standings {
    unwell: BTreeMap<DeviceId, Standing>,
}

impl Standings {
    pub(crate) fn new(state: &State, view: &View, now: Time, settings: &HealSettings) -> Standings {
        let patience = settings.patience();
        let standing = |id: &DeviceId, device: &crate::state::model::Device| match device.state {
            DeviceState::Failed | DeviceState::Replaced | DeviceState::Removed => Standing::Lost,
            DeviceState::Active if view.is_served(id, now) => Standing::Well,
            DeviceState::Active if view.silence(id, now) >= patience => Standing::Lost,
            DeviceState::Active => Standing::Away,
        };
        let all = state.devices().iter().map(|(id, device)| (*id, standing(id, device)));
        Standings {
            unwell: all.filter(|(_, standing)| *standing != Standing::Well).collect(),
        }
    }

    pub(crate) fn of(&self, device: &DeviceId) -> Standing {
        self.unwell.get(device).copied().unwrap_or(Standing::Well)
    }

    pub(crate) fn is_well(&self, device: &DeviceId) -> bool {
        self.of(device) == Standing::Well
    }

    pub(crate) fn is_lost(&self, device: &DeviceId) -> bool {
        self.of(device) == Standing::Lost
    }
}

/// What the leader should propose now, in order; whom it asks to take care of volumes is noted in the view.
pub fn decide(state: &State, view: &mut View, now: Time, settings: &HealSettings) -> Vec<Command> {
    view.follow(state, now);
    let standings = Standings::new(state, view, now, settings);
    assign(state, view, &standings, now);
    let mut commands: Vec<Command> = Vec::new();
    let notes = notes(state, view, now);
    if !notes.is_empty() {
        commands.push(NoteDevices { devices: notes }.into());
    }
    let replaced = replacements(state, view, &standings, now);
    let is_calm = replaced.is_empty();
    commands.extend(replaced.into_iter().map(Command::from));
    if is_calm {
        commands.extend(moves(state, view, &standings, now));
    }
    commands
}

/// Who has fallen silent, and who is back, each for long enough that it can't flap.
fn notes(state: &State, view: &View, now: Time) -> Vec<DeviceNote> {
    let in_use = |state: DeviceState| matches!(state, DeviceState::Active | DeviceState::Failed);
    let devices = state.devices().iter().filter(|(_, device)| in_use(device.state));
    let note = |(id, device): (&DeviceId, &crate::state::model::Device)| {
        let (silent, cause) = if device.silent {
            let served = view.served_for(id, now)?;
            let seconds = served.as_secs();
            (served >= ms(SILENCE_NOTED_MS.1)).then(|| (false, format!("heard of for {seconds} s without a pause")))?
        } else {
            let silence = view.silence(id, now);
            let cause = match view.is_alive(device.node, now) {
                true => "its node is heard of, and does not serve it",
                false => "its node is not heard of",
            };
            (silence >= ms(SILENCE_NOTED_MS.0)).then(|| (true, cause.to_string()))?
        };
        Some(DeviceNote { id: *id, silent, cause })
    };
    devices.filter_map(note).take(REPORTS_MAX).collect()
}

/// What is to be done about the members of one group.
enum Want {
    /// Somebody must take this one's place.
    Spare(DeviceId),
    /// This one is one too many.
    Release(DeviceId),
}

/// What is wanted for a group, if anything: one step at a time, since each changes the epoch.
fn want(state: &State, volume: &Volume, group: &Group, standings: &Standings) -> Option<Want> {
    // Who takes the place of a member in sync comes beside it until it has done so.
    let replicas = usize::from(volume.replicas) + usize::from(group.moving.is_some());
    let mut others = group.joining.iter().chain(&group.stale);
    // One of a node that is to hold nothing need not be filled either.
    let is_lost = |device: &DeviceId| standings.is_lost(device) || state.is_draining(device);
    let lost: Vec<DeviceId> = others.clone().filter(|device| is_lost(device)).copied().collect();
    let rest = others.clone().count() - lost.len();
    let can_go = |device: &&DeviceId| !group.rescue.contains(device);
    if group.in_sync.len() + rest >= replicas {
        // Enough without those that are lost; and where all are in sync, without those that are not.
        let all_in_sync = group.in_sync.len() >= replicas;
        let surplus = group.stale.iter().filter(|_| all_in_sync);
        return lost.iter().chain(surplus).find(can_go).copied().map(Want::Release);
    }
    // Those of the rescue set stay, and a spare comes beside them.
    others.find(|device| is_lost(device)).copied().map(Want::Spare)
}

/// Which members are to be replaced, groups with the fewest copies first, no more at once than the limits allow.
fn replacements(state: &State, view: &View, standings: &Standings, now: Time) -> Vec<ReplaceMember> {
    let mut wanted: Vec<(usize, GroupId, &Volume, &Group, Want)> = Vec::new();
    let mut filling: BTreeMap<DeviceId, usize> = BTreeMap::new();
    for (id, group) in state.groups() {
        if group.joining.is_empty() && group.stale.is_empty() {
            continue;
        }
        for device in &group.rebuilding {
            *filling.entry(*device).or_default() += 1;
        }
        let volume = &state.volumes()[&id.volume];
        if let Some(want) = want(state, volume, group, standings) {
            let copies = group.in_sync.iter().filter(|device| standings.is_well(device)).count();
            wanted.push((copies, *id, volume, group, want));
        }
    }
    wanted.sort_by_key(|(copies, id, ..)| (*copies, *id));
    let mut under_way: usize = filling
        .iter()
        .filter(|(device, _)| !standings.is_lost(device))
        .map(|(_, count)| count)
        .sum();
    let mut spares: Option<Spares<'_>> = None;
    let mut replacements = Vec::new();
    for (_, id, volume, group, want) in wanted {
        if replacements.len() >= REBUILDS_MAX.0 {
            break;
        }
        let (lost, spare) = match want {
            Want::Release(lost) => (lost, None),
            Want::Spare(_) if under_way >= REBUILDS_MAX.0 => continue,
            Want::Spare(lost) => {
                // Only who was really heard of: in its first seconds a leader takes everybody for well.
                let is_silent = |device: &DeviceId| view.served_for(device, now).is_none();
                let spares = spares.get_or_insert_with(|| Spares::new(state, is_silent));
                let has_room = |device: &DeviceId| filling.get(device).is_none_or(|count| *count < REBUILDS_MAX.1);
                let Some(spare) = spares.choose(volume, group, lost, has_room) else {
                    continue;
                };
                *filling.entry(spare).or_default() += 1;
                under_way += 1;
                (lost, Some(spare))
            }
        };
        replacements.push(ReplaceMember {
            volume: id.volume,
            index: id.index,
            epoch: group.epoch,
            lost,
            spare,
            cause: why_lost(state, view, standings, &lost, now),
        });
    }
    replacements
}

fn why_lost(state: &State, view: &View, standings: &Standings, device: &DeviceId, now: Time) -> String {
    if !standings.is_lost(device) {
        return match state.is_draining(device) {
            true => "its node is to hold nothing".to_string(),
            false => "the group has all its copies on others".to_string(),
        };
    }
    match state.devices().get(device).map(|device| device.state) {
        Some(DeviceState::Failed) => "it can't acknowledge writes".to_string(),
        Some(DeviceState::Replaced) => "it was formatted anew".to_string(),
        Some(DeviceState::Removed) => "it was taken out".to_string(),
        _ => format!("it was not heard of for {} s", view.silence(device, now).as_secs()),
    }
}

/// Whether a coordinator could do something for the group now.
fn is_actionable(volume: &Volume, group: &Group, standings: &Standings) -> bool {
    let fill = group.joining.iter().chain(&group.stale);
    let replicas = usize::from(volume.replicas);
    let missing = group.in_sync.len() < replicas || !group.joining.is_empty() || group.moving.is_some();
    if missing && fill.clone().any(|device| standings.is_well(device)) {
        return true;
    }
    // A member that is lost must be ejected before anybody can take its place.
    let least = if volume.min_copies_one {
        1
    } else {
        usize::from(volume.write_quorum)
    };
    group.in_sync.len() > least && group.in_sync.iter().any(|device| standings.is_lost(device))
}

/// Whom to ask to take care of volumes that no living guest holds: those with the fewest copies first.
fn assign(state: &State, view: &mut View, standings: &Standings, now: Time) {
    let mut needy = needy(state, view, standings, now);
    view.paused.retain(|volume, _| needy.contains_key(volume));
    needy.retain(|volume, _| may_be_cared_for(state, view, *volume, now));
    end_tasks(view, &needy, now);
    renew_tasks(state, view, now);
    let mut load: BTreeMap<NodeId, usize> = BTreeMap::new();
    for task in view.tasks.values() {
        *load.entry(task.node).or_default() += 1;
    }
    let is_free = |volume: &VolumeId, view: &View| {
        let paused = view.paused.get(volume).is_some_and(|(until, _)| *until > now);
        !paused && !view.tasks.contains_key(volume) && may_be_cared_for(state, view, *volume, now)
    };
    let mut order: Vec<(usize, VolumeId)> = needy.into_iter().map(|(volume, copies)| (copies, volume)).collect();
    order.sort_unstable();
    for (_, volume) in order {
        if !is_free(&volume, view) {
            continue;
        }
        // A caretaker that is at work, perhaps asked by an earlier leader, goes on.
        let at_work = view.attachment(volume).and_then(|report| report.caretaker);
        let mut able = keepers(state, view, standings, volume, now);
        able.retain(|node| load.get(node).copied().unwrap_or(0) < CARE_PER_NODE_MAX || at_work == Some(*node));
        let best = |node: &NodeId| (at_work != Some(*node), load.get(node).copied().unwrap_or(0), *node);
        let Some(node) = able.into_iter().min_by_key(best) else {
            continue;
        };
        *load.entry(node).or_default() += 1;
        let task = Task {
            node,
            generation_seen: state.volumes()[&volume].generation,
            since: now,
            over: None,
        };
        view.tasks.insert(volume, task);
    }
}

/// Volumes for which a coordinator could do something, with the copies that the worst of its groups has.
fn needy(state: &State, view: &View, standings: &Standings, now: Time) -> BTreeMap<VolumeId, usize> {
    let mut needy: BTreeMap<VolumeId, usize> = BTreeMap::new();
    let mut add = |volume: VolumeId, group: &Group| {
        let copies = group.in_sync.iter().filter(|device| standings.is_well(device)).count();
        let least = needy.entry(volume).or_insert(copies);
        *least = copies.min(*least);
    };
    for (id, group) in state.groups() {
        if is_actionable(&state.volumes()[&id.volume], group, standings) {
            add(id.volume, group);
        }
    }
    let damaged: BTreeSet<VolumeId> = view.damaged().flat_map(|(_, volumes)| volumes).copied().collect();
    for volume in damaged {
        for (_, group) in state.groups_of(volume) {
            add(volume, group);
        }
    }
    for volume in state.volumes().keys().filter(|id| view.is_unsettled(**id, state, now)) {
        // While one is away it is waited for: a coordinator that goes on without it would have to eject it.
        let mut members = state.groups_of(*volume).flat_map(|(_, group)| &group.in_sync);
        if members.all(|device| standings.is_well(device)) {
            for (_, group) in state.groups_of(*volume) {
                add(*volume, group);
            }
        }
    }
    needy
}

/// Whether nobody else does it: the volume is not held, or its holder is held for dead, or is a caretaker of which this
/// leader knows. Of one that an earlier leader has asked it hears soon.
fn may_be_cared_for(state: &State, view: &View, volume: VolumeId, now: Time) -> bool {
    let Some(holder) = &state.volumes()[&volume].holder else {
        return true;
    };
    let at_work = view.attachment(volume).and_then(|report| report.caretaker);
    let is_at_work = at_work.is_some_and(|node| view.is_alive(node, now)) || view.tasks.contains_key(&volume);
    (holder.caretaker && is_at_work) || view.displaceable(volume, state, now).is_some()
}

/// Ends tasks that are done, that somebody else does now, and those that lead nowhere.
fn end_tasks(view: &mut View, needy: &BTreeMap<VolumeId, usize>, now: Time) {
    let mut stuck = Vec::new();
    for (volume, task) in &view.tasks {
        let (moved, compares) = view.progress(*volume).unwrap_or((task.since, false));
        let still = now.saturating_since(moved.max(task.since));
        let bound = if compares { CARE_STUCK_MS.1 } else { CARE_STUCK_MS.0 };
        if needy.contains_key(volume) && still >= ms(bound) {
            stuck.push(*volume);
        }
    }
    for volume in stuck {
        let before = view.paused.get(&volume).map_or(Duration::ZERO, |(_, pause)| *pause);
        let pause = (before * 2).clamp(ms(CARE_PAUSE_MS.0), ms(CARE_PAUSE_MS.1));
        view.paused.insert(volume, (now + pause, pause));
        view.tasks.remove(&volume);
    }
    let alive: BTreeSet<NodeId> = view
        .tasks
        .values()
        .map(|task| task.node)
        .filter(|node| view.is_alive(*node, now))
        .collect();
    view.tasks
        .retain(|volume, task| needy.contains_key(volume) && alive.contains(&task.node));
}

/// A guest takes a volume from its caretaker, and lets it go before anybody has looked here. The caretaker has ended its task, which
/// is the same as long as it knows of no later grant; here it goes on, and nobody would do anything until it counts as stuck.
/// The caretaker's own grant is the next one after that which the task knows: with that one given back, and something to do all the
/// same, it did not know of it yet, as of a copy that is to move since a moment ago.
fn renew_tasks(state: &State, view: &mut View, now: Time) {
    for (volume, task) in &mut view.tasks {
        let Some(known) = state.volumes().get(volume).filter(|known| known.holder.is_none()) else {
            continue;
        };
        let own = task.generation_seen.get() + 1;
        if known.generation.get() > own {
            (task.generation_seen, task.over) = (known.generation, None);
        } else if known.generation.get() == own {
            let over = *task.over.get_or_insert(now);
            if now.saturating_since(over) >= ms(UNSETTLED_PAUSE_MS) {
                (task.generation_seen, task.since, task.over) = (known.generation, now, None);
            }
        }
    }
}

/// Nodes that are alive and have a copy of the volume that counts and can be reached.
fn keepers(state: &State, view: &View, standings: &Standings, volume: VolumeId, now: Time) -> BTreeSet<NodeId> {
    let in_sync = state.groups_of(volume).flat_map(|(_, group)| &group.in_sync);
    let nodes = in_sync
        .filter(|device| standings.is_well(device))
        .filter_map(|device| state.devices().get(device))
        .map(|device| device.node);
    nodes
        .filter(|node| view.is_alive(*node, now) && view.heard_ms_ago(*node, now).is_some())
        .collect()
}
