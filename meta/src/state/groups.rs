//! Group configurations: compare-and-set, and the rules of replication.md that meta can check (18, the form of 19, 20).

use std::collections::BTreeMap;

use cairn_proto::control::Code;
use cairn_proto::ids::*;
use cairn_proto::limits::MEMBERS_MAX;

use crate::limits::{CHANGES_MAX, STALE_MAX};
use crate::state::command::{ConfigureGroups, GroupChange};
use crate::state::events::{Event, EventKind, group_words};
use crate::state::model::{DeviceState, Group, Move, State, Volume};
use crate::state::{Outcome, Refusal};

impl State {
    pub(super) fn configure_groups(&mut self, time_ms: u64, command: &ConfigureGroups) -> Result<Outcome, Refusal> {
        let (id, volume) = self.find(&command.volume)?;
        let refuse = |code, why: String| Err(Refusal::new(code, why));
        if command.generation != volume.generation || command.generation == Generation::NONE {
            // Rule 18: H1 must not eject a after H2 was granted and has read a's group.
            return refuse(
                Code::StaleGeneration,
                format!(
                    "generation {} can't change volume `{}` any more: {} is the last one granted; attach again",
                    command.generation, volume.name, volume.generation
                ),
            );
        }
        let mut indexes: Vec<GroupIndex> = command.changes.iter().map(|change| change.index).collect();
        indexes.sort_unstable();
        indexes.dedup();
        if command.changes.is_empty() || indexes.len() != command.changes.len() || indexes.len() > CHANGES_MAX {
            return refuse(
                Code::InvalidArgument,
                format!("give 1 to {CHANGES_MAX} changes, each of another group"),
            );
        }
        if let Some(index) = indexes.iter().find(|index| index.0 >= volume.group_count.get()) {
            let count = volume.group_count.get();
            return refuse(
                Code::InvalidArgument,
                format!(
                    "volume `{}` has {count} groups, so there is no group {index}",
                    volume.name
                ),
            );
        }
        let volume = volume.clone();
        let mut moves = Moves::default();
        let outcomes = command.changes.iter().map(|change| {
            let refusal = self.configure_group(id, &volume, change, &mut moves).err();
            let group = self.groups[&GroupId {
                volume: id,
                index: change.index,
            }]
                .clone();
            (change.index, group, refusal)
        });
        let outcomes = outcomes.collect();
        self.note_moves(time_ms, id, &volume.name, moves);
        Ok(Outcome::Configured(outcomes))
    }

    /// One event for each device and what it became, whatever the number of groups.
    fn note_moves(&mut self, time_ms: u64, id: VolumeId, name: &str, moves: Moves) {
        for ((kind, device, cause), indexes) in moves {
            let (words, groups) = (self.device_words(&device), group_words(&indexes));
            let message = match kind {
                EventKind::Ejected => format!("{words} does not count any more in {groups} of volume `{name}`"),
                EventKind::Joining => format!("{words} is being filled for {groups} of volume `{name}`"),
                EventKind::Admitted => format!("{words} has a full copy of {groups} of volume `{name}`"),
                _ => format!("{words} is not being filled any more for {groups} of volume `{name}`"),
            };
            let mut event = Event::new(time_ms, kind, message).of_volume(id, name).because(cause);
            event.group = (indexes.len() == 1).then(|| indexes[0]);
            self.note_device(event, device);
        }
    }

    fn configure_group(
        &mut self,
        id: VolumeId,
        volume: &Volume,
        change: &GroupChange,
        moves: &mut Moves,
    ) -> Result<(), Refusal> {
        let id = GroupId {
            volume: id,
            index: change.index,
        };
        let sorted = |list: &[DeviceId]| {
            let mut list = list.to_vec();
            list.sort_unstable();
            list
        };
        let (in_sync, joining) = (sorted(&change.in_sync), sorted(&change.joining));
        let now = &self.groups[&id];
        if now.epoch != change.epoch {
            // The same change sent again after a lost answer: the generation shows that nobody else came between.
            let repeated = change.epoch.0.checked_add(1) == Some(now.epoch.0);
            if repeated && now.in_sync == in_sync && now.joining == joining {
                return Ok(());
            }
            return Err(Refusal::new(
                Code::StaleEpoch,
                format!(
                    "group {id} has epoch {} by now, not {}: look at it again",
                    now.epoch, change.epoch
                ),
            ));
        }
        self.check_sets(id, volume, now, &in_sync, &joining)?;
        let group = succeed(now, usize::from(volume.write_quorum), in_sync, joining);
        for (kind, device) in moved(now, &group) {
            let cause = change.cause.clone();
            moves.entry((kind, device, cause)).or_default().push(change.index);
        }
        let replicas = usize::from(volume.replicas);
        self.releases += u64::from(now.in_sync.len() < replicas && group.in_sync.len() >= replicas);
        self.groups.insert(id, group);
        Ok(())
    }

    fn check_sets(
        &self,
        id: GroupId,
        volume: &Volume,
        now: &Group,
        in_sync: &[DeviceId],
        joining: &[DeviceId],
    ) -> Result<(), Refusal> {
        let refuse = |why: String| Err(Refusal::new(Code::InvalidConfiguration, format!("group {id}: {why}")));
        let mut all = [in_sync, joining].concat();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        if all.len() != count {
            return refuse("a device is named twice".to_string());
        }
        if count > MEMBERS_MAX {
            return refuse(format!(
                "{count} members are too many, at most {MEMBERS_MAX} are allowed"
            ));
        }
        if in_sync.is_empty() {
            return refuse("at least one member must be in sync".to_string());
        }
        if let Some(device) = in_sync.iter().find(|device| !now.has(device)) {
            return refuse(format!(
                "{device} is neither in sync nor joining, so it can't be in sync next: let it join"
            ));
        }
        let quorum = usize::from(volume.write_quorum);
        let ejects = now.in_sync.iter().any(|device| !in_sync.contains(device));
        if ejects && in_sync.len() < quorum && !volume.min_copies_one {
            // Rule 20.
            return refuse(format!(
                "ejecting would leave {} in sync, fewer than the write quorum {quorum}",
                in_sync.len()
            ));
        }
        for device in joining.iter().filter(|device| !now.joining.contains(device)) {
            match self.devices.get(device).map(|found| found.state) {
                Some(DeviceState::Active) => {}
                Some(state) => return refuse(format!("{device} can't join: it is {state:?}")),
                None => {
                    return Err(Refusal::new(
                        Code::DeviceNotFound,
                        format!("group {id}: no device {device} is registered, so it can't join"),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// What devices become, why, and in which groups.
type Moves = BTreeMap<(EventKind, DeviceId, String), Vec<GroupIndex>>;

/// What each device becomes from one configuration to the next.
fn moved(now: &Group, next: &Group) -> Vec<(EventKind, DeviceId)> {
    let mut moved = Vec::new();
    for device in &now.in_sync {
        if !next.in_sync.contains(device) {
            moved.push((EventKind::Ejected, *device));
        }
    }
    for device in &now.joining {
        if !next.has(device) {
            moved.push((EventKind::JoinEnded, *device));
        }
    }
    for device in &next.in_sync {
        if !now.in_sync.contains(device) {
            moved.push((EventKind::Admitted, *device));
        }
    }
    for device in &next.joining {
        if !now.joining.contains(device) {
            moved.push((EventKind::Joining, *device));
        }
    }
    moved
}

/// The configuration after `now`.
fn succeed(now: &Group, quorum: usize, in_sync: Vec<DeviceId>, joining: Vec<DeviceId>) -> Group {
    let is_member = |device: &DeviceId| in_sync.contains(device) || joining.contains(device);
    // Rule 20: the last in-sync set with a quorum is remembered until there is one again.
    let rescue = if in_sync.len() >= quorum {
        vec![]
    } else if now.in_sync.len() >= quorum {
        now.in_sync.clone()
    } else {
        now.rescue.clone()
    };
    let mut stale: Vec<DeviceId> = Vec::new();
    for device in now
        .stale
        .iter()
        .chain(&now.in_sync)
        .chain(&now.joining)
        .chain(&now.rescue)
    {
        if !is_member(device) && !stale.contains(device) {
            stale.push(*device);
        }
    }
    let forgotten = stale.len().saturating_sub(STALE_MAX);
    stale.drain(..forgotten);
    let mut rebuilding = now.rebuilding.clone();
    rebuilding.retain(|device| joining.contains(device) || stale.contains(device));
    let is_open = |moving: &Move| {
        let waits = joining.contains(&moving.to) || stale.contains(&moving.to);
        in_sync.contains(&moving.from) && waits
    };
    Group {
        epoch: Epoch(now.epoch.0 + 1),
        moving: now.moving.clone().filter(is_open),
        rebuilding,
        in_sync,
        joining,
        stale,
        rescue,
    }
}
