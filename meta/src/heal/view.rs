//! What the leader has heard and need not remember: silence, reports of holders, held and damaged volumes. It is gone
//! with the leader; a new one gives everybody time to be heard before it holds anybody for dead.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cairn_proto::ids::{DeviceId, Epoch, Generation, GroupId, GroupIndex, NodeId, VolumeId};
use cairn_proto::time::Time;

use crate::limits::{
    ATTACHMENTS_HEARD_MAX, CARETAKER_SILENCE_MS, DAMAGED_VOLUMES_MAX, HELD_VOLUMES_MAX, HOLDER_SILENCE_MS,
    NODE_SILENCE_MS, RATE_SAMPLE_MS, UNSETTLED_PAUSE_MS,
};
use crate::state::model::State;

/// How far the coordinator of a group is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Fewer members are sealed than make the attachment complete.
    Sealing,
    /// A member is missing without which the group is not served.
    Waiting,
    /// The members are compared and made equal.
    Reconciling,
    /// I/O is served.
    Serving,
    /// A newer attachment has taken over.
    Fenced,
}

/// A member of a group as its coordinator sees it. Blocks are of 4096 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Whether it can be spoken to.
    pub connected: bool,
    /// Whether it holds everything that the others hold.
    pub complete: bool,
    /// Blocks that it is known to lack; an upper bound.
    pub lacking_blocks: u64,
    /// Blocks copied to it since it began to be compared.
    pub copied_blocks: u64,
    /// Whether it is still being compared.
    pub comparing: bool,
}

/// A group as its coordinator sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupReport {
    /// Of the configuration that the coordinator works with.
    pub epoch: Epoch,
    /// How far it is.
    pub phase: Phase,
    /// Its members.
    pub members: BTreeMap<DeviceId, Progress>,
}

/// A volume as its holder sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachmentReport {
    /// Of the holder's grant.
    pub generation: Generation,
    /// Of a caretaker: the node that it runs on.
    pub caretaker: Option<NodeId>,
    /// Groups that are whole may be left out.
    pub groups: BTreeMap<GroupIndex, GroupReport>,
    /// Blocks that were found to be damaged since the attachment began.
    pub damaged_blocks: u64,
    /// How many of them were repaired.
    pub repaired_blocks: u64,
}

/// How fast a member is filled, measured over reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Rate {
    copied_blocks: u64,
    since: Time,
    blocks_per_second: Option<u64>,
}

/// What was heard of an attachment.
#[derive(Clone, Debug)]
struct Attachment {
    report: AttachmentReport,
    heard: Time,
    /// When anything in its groups was last seen to move.
    moved: Time,
    rates: BTreeMap<(GroupIndex, DeviceId), Rate>,
}

/// A volume that a node takes care of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Task {
    pub(crate) node: NodeId,
    pub(crate) generation_seen: Generation,
    /// When it was given.
    pub(crate) since: Time,
    /// Since when this leader knows that the caretaker has given the volume back.
    pub(crate) over: Option<Time>,
}

/// When a device was heard of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Heard {
    last: Time,
    /// Since when it was never silent.
    since: Time,
}

/// What healing does, and a planted bug of it leaves undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Duty {
    /// A volume that was given back with unequal copies, or whose holder has died, gets a caretaker.
    Settle,
    /// Copies that stand too close to each other move.
    Spread,
    /// Copies of a node that is to hold nothing move.
    Drain,
}

/// What the leader has heard.
#[derive(Debug, Default)]
pub struct View {
    pub(crate) leader_since: Time,
    devices: BTreeMap<DeviceId, Heard>,
    /// Devices that their node has not brought along when it was started anew, until they are heard of again.
    left: BTreeSet<DeviceId>,
    nodes: BTreeMap<NodeId, Time>,
    /// Which grant of each volume that is held this leader has seen, and since when.
    grants: BTreeMap<VolumeId, (Generation, Time)>,
    /// Volumes that nobody holds and whose copies may be unequal, after which grant, and since when this leader knows.
    loose: BTreeMap<VolumeId, (Generation, Time)>,
    attachments: BTreeMap<VolumeId, Attachment>,
    /// The highest generation that a node has said a living connection shows, and when it last did.
    held: BTreeMap<VolumeId, (Generation, Time)>,
    damaged: BTreeMap<NodeId, BTreeSet<VolumeId>>,
    /// When it was last looked whether copies could stand further apart.
    pub(crate) spread_looked: Option<Time>,
    /// From which group on that goes on.
    pub(crate) spread_from: Option<GroupId>,
    pub(crate) tasks: BTreeMap<VolumeId, Task>,
    /// Volumes whose caretaker got nowhere, when they may be tried again, and how long they had to wait.
    pub(crate) paused: BTreeMap<VolumeId, (Time, Duration)>,
    /// A planted bug.
    #[cfg(feature = "canary")]
    pub neglected: Option<Duty>,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl View {
    /// This member has just become the leader, or has ceased to be: nothing was heard yet.
    pub fn reset(&mut self, now: Time) {
        *self = View {
            leader_since: now,
            #[cfg(feature = "canary")]
            neglected: self.neglected,
            ..View::default()
        };
    }

    /// Whether the planted bug is that this is left undone.
    #[cfg(feature = "canary")]
    pub(crate) fn neglects(&self, duty: Duty) -> bool {
        self.neglected == Some(duty)
    }

    #[cfg(not(feature = "canary"))]
    pub(crate) const fn neglects(&self, _: Duty) -> bool {
        false
    }

    /// A node was heard of.
    pub fn heard_node(&mut self, node: NodeId, now: Time) {
        self.nodes.insert(node, now);
    }

    /// A node said that it serves the device.
    pub fn heard_device(&mut self, device: DeviceId, now: Time) {
        let heard = self.devices.entry(device).or_insert(Heard { last: now, since: now });
        if now.saturating_since(heard.last) >= ms(NODE_SILENCE_MS) {
            heard.since = now;
        }
        heard.last = now;
        self.left.remove(&device);
    }

    /// A node was started, and serves these devices. Others that it had are not served by anybody from now on: that need
    /// not be found out by their silence.
    pub fn heard_start(&mut self, node: NodeId, served: &BTreeSet<DeviceId>, state: &State, now: Time) {
        for device in served {
            self.heard_device(*device, now);
        }
        let devices = state.devices().iter().filter(|(_, device)| device.node == node);
        self.left
            .extend(devices.map(|(id, _)| *id).filter(|id| !served.contains(id)));
    }

    /// What a node said of attachments with living connections, and of volumes with damage. Only volumes that exist are
    /// noted, so that this is bounded by their number.
    pub fn heard_volumes(
        &mut self,
        node: NodeId,
        held: impl IntoIterator<Item = (VolumeId, Generation)>,
        damaged: impl IntoIterator<Item = VolumeId>,
        state: &State,
        now: Time,
    ) {
        for (volume, generation) in held.into_iter().take(HELD_VOLUMES_MAX) {
            let is_last = |known: &crate::state::model::Volume| known.generation == generation;
            if state.volumes().get(&volume).is_some_and(is_last) {
                self.held.insert(volume, (generation, now));
            }
        }
        let damaged: BTreeSet<VolumeId> = damaged
            .into_iter()
            .filter(|volume| state.volumes().contains_key(volume))
            .take(DAMAGED_VOLUMES_MAX)
            .collect();
        if damaged.is_empty() {
            self.damaged.remove(&node);
        } else {
            self.damaged.insert(node, damaged);
        }
    }

    /// What the holder of a volume said. That of an attachment which is not the last one granted is not believed.
    pub fn heard_attachment(&mut self, volume: VolumeId, report: AttachmentReport, state: &State, now: Time) {
        let known = state.volumes().get(&volume);
        let known = known.filter(|known| known.generation == report.generation);
        let Some(holder) = known.and_then(|known| known.holder.as_ref()) else {
            return;
        };
        if self.attachments.len() >= ATTACHMENTS_HEARD_MAX && !self.attachments.contains_key(&volume) {
            return;
        }
        if let Some(node) = report.caretaker
            && holder.caretaker
            && now.saturating_since(self.leader_since) < ms(CARETAKER_SILENCE_MS)
        {
            // A task that an earlier leader gave.
            self.tasks.entry(volume).or_insert(Task {
                node,
                generation_seen: report.generation,
                since: now,
                over: None,
            });
        }
        let before = self.attachments.remove(&volume);
        let before = before.filter(|before| before.report.generation == report.generation);
        let mut rates = BTreeMap::new();
        for (index, group) in &report.groups {
            for (device, progress) in &group.members {
                let key = (*index, *device);
                let rate = before.as_ref().and_then(|before| before.rates.get(&key).copied());
                rates.insert(key, Rate::measure(rate, progress.copied_blocks, now));
            }
        }
        let moved = match &before {
            Some(before) if before.report.groups == report.groups => before.moved,
            _ => now,
        };
        self.attachments.insert(
            volume,
            Attachment {
                report,
                heard: now,
                moved,
                rates,
            },
        );
    }

    /// Takes in new grants, and forgets what is about volumes, devices and nodes that are no more, or about earlier
    /// attachments.
    pub(crate) fn follow(&mut self, state: &State, now: Time) {
        let grants = std::mem::take(&mut self.grants);
        let held = state.volumes().iter().filter(|(_, known)| known.holder.is_some());
        self.grants = held
            .map(|(volume, known)| {
                let seen = grants.get(volume).filter(|seen| seen.0 == known.generation);
                (*volume, seen.copied().unwrap_or((known.generation, now)))
            })
            .collect();

        let loose = std::mem::take(&mut self.loose);
        let unsettled = state.volumes().iter().filter(|(_, known)| !known.settled);
        let free = unsettled.filter(|(_, known)| known.holder.is_none());
        self.loose = free
            .map(|(volume, known)| {
                let seen = loose.get(volume).filter(|seen| seen.0 == known.generation);
                (*volume, seen.copied().unwrap_or((known.generation, now)))
            })
            .collect();

        let generation = |volume: &VolumeId| state.volumes().get(volume).map(|volume| volume.generation);
        self.attachments
            .retain(|volume, known| generation(volume) == Some(known.report.generation));
        self.held
            .retain(|volume, (shown, _)| generation(volume) == Some(*shown));
        self.devices.retain(|device, _| state.devices().contains_key(device));
        self.left.retain(|device| state.devices().contains_key(device));
        self.nodes.retain(|node, _| state.nodes().contains_key(node));
        self.damaged.retain(|node, volumes| {
            volumes.retain(|volume| state.volumes().contains_key(volume));
            !volumes.is_empty() && state.nodes().contains_key(node)
        });
        self.paused.retain(|volume, _| state.volumes().contains_key(volume));
    }

    /// How long nobody has said that it serves the device, counted at most from when this member began to lead.
    pub fn silence(&self, device: &DeviceId, now: Time) -> Duration {
        let heard = self.devices.get(device).map_or(self.leader_since, |heard| heard.last);
        now.saturating_since(heard)
    }

    /// Whether the device seems to be served by somebody.
    pub fn is_served(&self, device: &DeviceId, now: Time) -> bool {
        self.silence(device, now) < ms(NODE_SILENCE_MS) && !self.left.contains(device)
    }

    /// Whether this member has led for so short a time that it can't know yet whether this device is served: it counts as served,
    /// so that nothing is taken from it, but nothing new should count on it.
    pub fn is_unknown(&self, device: &DeviceId, now: Time) -> bool {
        let has_just_begun = now.saturating_since(self.leader_since) < ms(NODE_SILENCE_MS);
        has_just_begun && !self.devices.contains_key(device) && !self.left.contains(device)
    }

    /// For how long the device has been heard of without a pause; `None` while it is silent.
    pub fn served_for(&self, device: &DeviceId, now: Time) -> Option<Duration> {
        let heard = self.devices.get(device)?;
        self.is_served(device, now).then(|| now.saturating_since(heard.since))
    }

    /// Whether the node seems alive.
    pub fn is_alive(&self, node: NodeId, now: Time) -> bool {
        let heard = self.nodes.get(&node).copied().unwrap_or(self.leader_since);
        now.saturating_since(heard) < ms(NODE_SILENCE_MS)
    }

    /// Milliseconds since the node was heard of.
    pub fn heard_ms_ago(&self, node: NodeId, now: Time) -> Option<u64> {
        let heard = self.nodes.get(&node)?;
        Some(now.saturating_since(*heard).as_millis() as u64)
    }

    /// What the holder of the volume has said last.
    pub fn attachment(&self, volume: VolumeId) -> Option<&AttachmentReport> {
        self.attachments.get(&volume).map(|known| &known.report)
    }

    /// Blocks per second copied to a member of a group, as measured; `None` while it is not known.
    pub fn rate(&self, volume: VolumeId, index: GroupIndex, device: DeviceId) -> Option<u64> {
        let rates = &self.attachments.get(&volume)?.rates;
        rates.get(&(index, device))?.blocks_per_second
    }

    /// Whether a node knows of damage in the volume that is not repaired.
    pub fn is_damaged(&self, volume: VolumeId) -> bool {
        self.damaged.values().any(|volumes| volumes.contains(&volume))
    }

    /// Volumes with damage, and the nodes that know of it.
    pub fn damaged(&self) -> impl Iterator<Item = (NodeId, &BTreeSet<VolumeId>)> {
        self.damaged.iter().map(|(node, volumes)| (*node, volumes))
    }

    /// The generation that a caretaker may displace now: that of a caretaker which has fallen silent, or of a client that
    /// is held for dead. `None` when nobody holds the volume, or its holder may be alive.
    ///
    /// A client is held for dead when for a minute neither it was heard of, nor did any node say that a living connection
    /// shows its generation, and this leader has known of its grant for that long: who was just granted has not said
    /// anything yet, and a leader that has just begun has heard nobody.
    pub fn displaceable(&self, volume: VolumeId, state: &State, now: Time) -> Option<Generation> {
        let holder = state.volumes().get(&volume)?.holder.as_ref()?;
        let granted = self.grants.get(&volume).filter(|seen| seen.0 == holder.generation)?.1;
        let silent_for = |bound: u64| {
            let silent = |heard: Option<Time>| heard.is_none_or(|heard| now.saturating_since(heard) >= ms(bound));
            let reported = self.attachments.get(&volume);
            let reported = reported.filter(|known| known.report.generation == holder.generation);
            let held = self.held.get(&volume).filter(|held| held.0 == holder.generation);
            let known = now.saturating_since(granted) >= ms(bound);
            known && silent(reported.map(|known| known.heard)) && (holder.caretaker || silent(held.map(|held| held.1)))
        };
        let bound = if holder.caretaker {
            CARETAKER_SILENCE_MS
        } else {
            HOLDER_SILENCE_MS
        };
        silent_for(bound).then_some(holder.generation)
    }

    /// Whether the copies of a volume may be unequal, and nobody is about who would see to it: it was given back so, and
    /// nobody has attached it for a moment; or its holder has died; or a caretaker is at it.
    pub(crate) fn is_unsettled(&self, volume: VolumeId, state: &State, now: Time) -> bool {
        let Some(known) = state.volumes().get(&volume).filter(|known| !known.settled) else {
            return false;
        };
        if self.neglects(Duty::Settle) {
            return false;
        }
        match &known.holder {
            None => {
                let since = self.loose.get(&volume).map(|(_, since)| *since);
                since.is_some_and(|since| now.saturating_since(since) >= ms(UNSETTLED_PAUSE_MS))
            }
            Some(holder) => holder.caretaker || self.displaceable(volume, state, now).is_some(),
        }
    }

    /// When anything was last seen to move in the groups of a volume, and whether copies are being compared.
    pub(crate) fn progress(&self, volume: VolumeId) -> Option<(Time, bool)> {
        let known = self.attachments.get(&volume)?;
        let compares = |group: &GroupReport| {
            let mut members = group.members.values();
            group.phase == Phase::Reconciling || members.any(|member| member.connected && member.comparing)
        };
        Some((known.moved, known.report.groups.values().any(compares)))
    }

    /// The volumes that this node shall take care of, with the generation that each had when the task was given.
    pub fn tasks_of(&self, node: NodeId) -> Vec<(VolumeId, Generation)> {
        let tasks = self.tasks.iter().filter(|(_, task)| task.node == node);
        tasks.map(|(volume, task)| (*volume, task.generation_seen)).collect()
    }

    /// Whether what this caretaker does is wanted.
    pub fn is_cared_for_by(&self, volume: VolumeId, node: NodeId) -> bool {
        self.tasks.get(&volume).is_some_and(|task| task.node == node)
    }
}

impl Rate {
    /// The rate after a report; half of what was known and half of what is new, so that it does not jump.
    fn measure(before: Option<Rate>, copied_blocks: u64, now: Time) -> Rate {
        let fresh = |blocks_per_second| Rate {
            copied_blocks,
            since: now,
            blocks_per_second,
        };
        let Some(before) = before else { return fresh(None) };
        let Some(copied) = copied_blocks.checked_sub(before.copied_blocks) else {
            // It has begun anew.
            return fresh(None);
        };
        let span = now.saturating_since(before.since);
        if span < ms(RATE_SAMPLE_MS) {
            return before;
        }
        let measured = u64::try_from(u128::from(copied) * 1000 / span.as_millis()).unwrap_or(u64::MAX);
        let smooth = match before.blocks_per_second {
            Some(known) => known / 2 + measured / 2 + (known & measured & 1),
            None => measured,
        };
        fresh(Some(smooth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::ZERO + Duration::from_millis(ms)
    }

    #[test]
    fn a_rate_is_measured_over_seconds_and_begins_anew_with_the_count() {
        let first = Rate::measure(None, 100, at(0));
        assert_eq!(first.blocks_per_second, None);
        let early = Rate::measure(Some(first), 150, at(RATE_SAMPLE_MS - 1));
        assert_eq!(early, first, "too short to tell");
        let second = Rate::measure(Some(first), 100 + 4000, at(2000));
        assert_eq!(second.blocks_per_second, Some(2000));
        let third = Rate::measure(Some(second), 4100 + 2000, at(4000));
        assert_eq!(third.blocks_per_second, Some(1500));
        let anew = Rate::measure(Some(third), 5, at(6000));
        assert_eq!(anew.blocks_per_second, None);
    }

    #[test]
    fn a_device_is_served_without_a_pause_from_when_it_came_back() {
        let (mut view, device) = (View::default(), DeviceId::default());
        view.reset(at(1000));
        assert_eq!(view.served_for(&device, at(1500)), None, "it was not heard of");
        assert!(view.is_served(&device, at(1500)), "but it has time to be");
        view.heard_device(device, at(2000));
        view.heard_device(device, at(5000));
        assert_eq!(view.served_for(&device, at(5500)), Some(Duration::from_millis(3500)));
        assert_eq!(view.served_for(&device, at(5000 + NODE_SILENCE_MS)), None);
        view.heard_device(device, at(20_000));
        assert_eq!(view.served_for(&device, at(21_000)), Some(Duration::from_millis(1000)));
        assert_eq!(view.silence(&device, at(26_000)), Duration::from_millis(6000));
    }
}
