//! Where the groups of a new volume lie: distinct failure domains, a bounded number of replica sets (copysets), the
//! least loaded devices first. A function of the state alone.
//!
//! Why copysets are bounded: with every set of three devices in use, any three that die at once take some volume with
//! them; with few sets hardly any three do. Why not fewer still: the copies of a dead device are made anew from all the
//! devices that share a set with it.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::control::Code;
use cairn_proto::ids::*;

use crate::limits::COPYSETS_PER_DEVICE;
use crate::state::Refusal;
use crate::state::command::CreateVolume;
use crate::state::model::{Device, DeviceState, FailureDomain, Group, Spread, State, Volume};

/// A device is no longer chosen while there are others when more than this part of it is taken: 95 of 100.
const NEARLY_FULL_PERCENT: u64 = 95;

struct Candidate {
    id: DeviceId,
    domain: FailureDomain,
    node: NodeId,
    capacity_bytes: u64,
    free_bytes: u64,
    nearly_full: bool,
    /// Bytes of all volumes that may come to lie on it.
    promised_bytes: u128,
    copysets: usize,
}

impl Candidate {
    /// Orders by the part of the capacity that is promised, without rounding.
    fn load(&self) -> (bool, u128) {
        let part = self.promised_bytes.saturating_mul(1 << 20) / u128::from(self.capacity_bytes.max(1));
        (self.nearly_full, part)
    }
}

/// One in-sync set for each group, in order.
pub(super) fn place(state: &State, command: &CreateVolume, count: GroupCount) -> Result<Vec<Vec<DeviceId>>, Refusal> {
    let replicas = usize::from(command.replicas);
    let mut copysets: BTreeSet<Vec<DeviceId>> = state.groups.values().map(|group| group.in_sync.clone()).collect();
    copysets.retain(|set| set.len() == replicas);
    let mut candidates = candidates(state, |device| command.silent.contains(device), &copysets);
    let share = u128::from(command.size_bytes / u64::from(count.get()));
    let mut sets = Vec::new();
    for _ in 0..count.get() {
        let fresh =
            fresh_set(&candidates, command.spread, replicas).ok_or_else(|| not_enough(state, command, &candidates))?;
        let bounded = |device: &DeviceId| candidates[device].copysets < COPYSETS_PER_DEVICE;
        let set = if copysets.contains(&fresh) || fresh.iter().all(bounded) {
            fresh
        } else {
            // Too many sets already: the least loaded of those there are, if one is usable.
            let usable = copysets
                .iter()
                .filter(|set| is_spread(set, &candidates, command.spread));
            let load = |set: &&Vec<DeviceId>| set.iter().map(|device| candidates[device].load()).max();
            usable.min_by_key(load).cloned().unwrap_or(fresh)
        };
        let is_new = copysets.insert(set.clone());
        for device in &set {
            let candidate = candidates.get_mut(device).expect("a set is made of candidates");
            candidate.promised_bytes += share;
            candidate.copysets += usize::from(is_new);
        }
        sets.push(set);
    }
    Ok(sets)
}

fn candidates(
    state: &State,
    is_silent: impl Fn(&DeviceId) -> bool,
    copysets: &BTreeSet<Vec<DeviceId>>,
) -> BTreeMap<DeviceId, Candidate> {
    let mut promised: BTreeMap<DeviceId, u128> = BTreeMap::new();
    for (id, group) in &state.groups {
        let volume = &state.volumes[&id.volume];
        let share = u128::from(volume.size_bytes / u64::from(volume.group_count.get()));
        for device in group.in_sync.iter().chain(&group.joining).chain(&group.rebuilding) {
            *promised.entry(*device).or_default() += share;
        }
    }
    let usable = state
        .devices
        .iter()
        .filter(|(id, device)| device.state == DeviceState::Active && !device.forgot && !is_silent(id));
    let candidate = |(id, device): (&DeviceId, &Device)| {
        let node = state.nodes.get(&device.node).filter(|node| node.draining.is_none())?;
        let candidate = Candidate {
            id: *id,
            domain: node.domain.clone(),
            node: device.node,
            capacity_bytes: device.capacity_bytes,
            free_bytes: device.capacity_bytes.saturating_sub(device.used_bytes),
            nearly_full: device.used_bytes / NEARLY_FULL_PERCENT >= device.capacity_bytes / 100,
            promised_bytes: promised.get(id).copied().unwrap_or_default(),
            copysets: copysets.iter().filter(|set| set.contains(id)).count(),
        };
        Some((*id, candidate))
    };
    usable.filter_map(candidate).collect()
}

/// What must differ between two copies at this level. A level that nobody has named does not tell apart, except that
/// hosts without a name are told apart by their node.
fn domain_at(candidate: &Candidate, spread: Spread) -> Vec<String> {
    domain_of(&candidate.id, &candidate.domain, candidate.node, spread)
}

fn domain_of(id: &DeviceId, domain: &FailureDomain, node: NodeId, spread: Spread) -> Vec<String> {
    let FailureDomain { room, rack, host } = domain.clone();
    let host = if host.is_empty() { format!("node {node}") } else { host };
    match spread {
        Spread::Room => vec![room],
        Spread::Rack => vec![room, rack],
        Spread::Host => vec![room, rack, host],
        Spread::Device => vec![room, rack, host, id.uuid.to_string()],
    }
}

fn domain_of_device(state: &State, id: &DeviceId, spread: Spread) -> Option<Vec<String>> {
    let device = state.devices.get(id)?;
    let node = state.nodes.get(&device.node)?;
    Some(domain_of(id, &node.domain, device.node, spread))
}

/// Whether a device may become a member of the group beside those that it has, and those that may come back to it.
///
/// The spread that was asked for is kept here too, and there is rather a copy less: 1. Two copies on one host, one on
/// another. 2. A write is acknowledged by the two. 3. The host is lost, and the write with it, though no second one was.
/// With a copy less each write would have been on both hosts.
pub(super) fn is_apart(state: &State, spread: Spread, group: &Group, spare: DeviceId) -> bool {
    let Some(domain) = domain_of_device(state, &spare, spread) else {
        return false;
    };
    let comes_back = |other: &DeviceId| {
        let gone = |device: &Device| matches!(device.state, DeviceState::Replaced | DeviceState::Removed);
        group.has(other) || !state.devices.get(other).is_some_and(gone)
    };
    let mut others = group.named().filter(|other| **other != spare && comes_back(other));
    others.all(|other| {
        other.uuid != spare.uuid && domain_of_device(state, other, spread).is_none_or(|other| other != domain)
    })
}

/// Devices that can take the place of lost ones.
pub(crate) struct Spares<'a> {
    state: &'a State,
    copysets: BTreeSet<Vec<DeviceId>>,
    candidates: BTreeMap<DeviceId, Candidate>,
}

impl<'a> Spares<'a> {
    /// Those that are not silent.
    pub(crate) fn new(state: &'a State, is_silent: impl Fn(&DeviceId) -> bool) -> Spares<'a> {
        let copysets = state.groups.values().map(|group| group.in_sync.clone()).collect();
        let candidates = candidates(state, is_silent, &copysets);
        Spares {
            state,
            copysets,
            candidates,
        }
    }

    /// The best one for a group that is about to lose a member, and that `may` take something: one that makes no new
    /// replica set if its sets are bounded, far from the others, with the least promised of its capacity.
    pub(crate) fn choose(
        &mut self,
        volume: &Volume,
        group: &Group,
        lost: DeviceId,
        may: impl Fn(&DeviceId) -> bool,
    ) -> Option<DeviceId> {
        let place = Place::new(self.state, volume, group, lost);
        let members = place.left.in_sync.iter().chain(&place.left.joining);
        let members: Vec<&Candidate> = members.filter_map(|device| self.candidates.get(device)).collect();
        let key = |candidate: &&Candidate| {
            let closest = members.iter().map(|other| closeness(candidate, other)).max();
            let mut set: Vec<DeviceId> = members.iter().map(|other| other.id).collect();
            set.push(candidate.id);
            set.sort_unstable();
            let is_new = !self.copysets.contains(&set) && candidate.copysets >= COPYSETS_PER_DEVICE;
            (is_new, closest, candidate.load(), candidate.id)
        };
        let able = self.candidates.values().filter(|candidate| may(&candidate.id));
        let best = able
            .filter(|candidate| place.fits(self.state, candidate))
            .min_by_key(key);
        let chosen = best?.id;
        let candidate = self.candidates.get_mut(&chosen).expect("it was just chosen");
        candidate.promised_bytes += u128::from(place.share);
        candidate.free_bytes = candidate.free_bytes.saturating_sub(place.need);
        Some(chosen)
    }

    /// Whether there is any.
    pub(crate) fn has(&self, volume: &Volume, group: &Group, lost: DeviceId) -> bool {
        let place = Place::new(self.state, volume, group, lost);
        self.candidates
            .values()
            .any(|candidate| place.fits(self.state, candidate))
    }
}

/// The place of a lost member.
struct Place<'a> {
    spread: Spread,
    group: &'a Group,
    /// The group without the lost one.
    left: Group,
    /// Bytes that may come to lie on the spare, and that must have room on it now.
    share: u64,
    need: u64,
}

impl<'a> Place<'a> {
    fn new(state: &State, volume: &Volume, group: &'a Group, lost: DeviceId) -> Place<'a> {
        let mut left = group.clone();
        for list in [&mut left.in_sync, &mut left.joining, &mut left.stale] {
            // One of the rescue set stays named.
            list.retain(|device| *device != lost);
        }
        let share = volume.size_bytes / u64::from(volume.group_count.get());
        // No copy can be larger than all that is on one of the devices that have it.
        let used = left.in_sync.iter().filter_map(|device| state.devices.get(device));
        let need = used.map(|device| device.used_bytes).min().unwrap_or(share).min(share);
        Place {
            spread: volume.spread,
            group,
            left,
            share,
            need,
        }
    }

    fn fits(&self, state: &State, candidate: &Candidate) -> bool {
        let id = candidate.id;
        candidate.free_bytes >= self.need
            && !candidate.nearly_full
            && !self.group.named().any(|device| *device == id)
            && is_apart(state, self.spread, &self.left, id)
    }
}

/// How many levels two candidates share, counted from the room: fewer is further apart.
fn closeness(a: &Candidate, b: &Candidate) -> usize {
    let levels = [Spread::Room, Spread::Rack, Spread::Host];
    levels
        .into_iter()
        .take_while(|level| domain_at(a, *level) == domain_at(b, *level))
        .count()
}

/// The same for two devices; as far apart as can be where one is not known.
pub(crate) fn closeness_of(state: &State, a: &DeviceId, b: &DeviceId) -> usize {
    let levels = [Spread::Room, Spread::Rack, Spread::Host];
    let is_same = |level: &Spread| {
        let (a, b) = (domain_of_device(state, a, *level), domain_of_device(state, b, *level));
        a.is_some() && a == b
    };
    levels.into_iter().take_while(is_same).count()
}

/// The least loaded device, then again and again the one that is furthest from those chosen, the least loaded first.
fn fresh_set(candidates: &BTreeMap<DeviceId, Candidate>, spread: Spread, replicas: usize) -> Option<Vec<DeviceId>> {
    let mut chosen: Vec<&Candidate> = Vec::new();
    while chosen.len() < replicas {
        let apart = |candidate: &&Candidate| {
            let domain = domain_at(candidate, spread);
            chosen.iter().all(|other| domain_at(other, spread) != domain)
        };
        let key = |candidate: &&Candidate| {
            let closest = chosen
                .iter()
                .map(|other| closeness(candidate, other))
                .max()
                .unwrap_or(0);
            (candidate.nearly_full, closest, candidate.load(), candidate.id)
        };
        chosen.push(candidates.values().filter(apart).min_by_key(key)?);
    }
    let mut set: Vec<DeviceId> = chosen.iter().map(|candidate| candidate.id).collect();
    set.sort_unstable();
    Some(set)
}

fn is_spread(set: &[DeviceId], candidates: &BTreeMap<DeviceId, Candidate>, spread: Spread) -> bool {
    let domains: Option<BTreeSet<Vec<String>>> = set
        .iter()
        .map(|device| Some(domain_at(candidates.get(device)?, spread)))
        .collect();
    domains.is_some_and(|domains| domains.len() == set.len())
}

fn not_enough(state: &State, command: &CreateVolume, candidates: &BTreeMap<DeviceId, Candidate>) -> Refusal {
    let domains: BTreeSet<Vec<String>> = candidates
        .values()
        .map(|candidate| domain_at(candidate, command.spread))
        .collect();
    let place = match command.spread {
        Spread::Device => "distinct devices",
        Spread::Host => "distinct hosts",
        Spread::Rack => "distinct racks",
        Spread::Room => "distinct rooms",
    };
    let silent = command
        .silent
        .iter()
        .filter(|id| state.devices.contains_key(id))
        .count();
    let silent = if silent == 0 {
        String::new()
    } else {
        format!(" ({silent} more do not answer)")
    };
    Refusal::new(
        Code::NotEnoughDevices,
        format!(
            "a volume with {} copies needs {} usable devices on {place}, and there are {}{silent}: add or start storage \
             nodes, or ask for fewer copies",
            command.replicas,
            command.replicas,
            domains.len()
        ),
    )
}
