//! The pure state machine of the metadata service: commands in, outcomes out.
//!
//! No clock, no randomness, no I/O: equal commands in equal order give equal bytes on every member. What depends on the
//! moment (time, who seems dead) is an argument inside the command.

pub(crate) mod codec;
pub mod command;
mod devices;
mod drain;
pub mod events;
mod groups;
mod healing;
#[cfg(test)]
mod healing_tests;
mod members;
pub mod model;
pub(crate) mod placement;
#[cfg(test)]
mod properties;
pub mod snapshot;
#[cfg(test)]
pub(crate) mod tests;
mod volumes;

use std::fmt;

use cairn_proto::control::Code;
use cairn_proto::ids::*;

use command::{Command, InitCluster, Logged, RaiseFeatureLevel};
pub use model::State;
use model::{Group, Volume};

/// The highest feature level that this program understands.
pub const FEATURE_LEVEL: u32 = 1;

/// Why a command changed nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal with these words.
    pub fn new(code: Code, message: impl Into<String>) -> Refusal {
        Refusal {
            code,
            message: message.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

/// What a command did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is done, and there is nothing to say.
    Done,
    /// The volume as it is now, or as it was when it was deleted.
    Volume(VolumeId, Volume),
    /// A grant, with the groups as of its commit.
    Attached {
        /// Which volume.
        id: VolumeId,
        /// As it is now: its generation is the grant.
        volume: Volume,
        /// In order of their index.
        groups: Vec<Group>,
    },
    /// What became of each change, in order, and the group as it is now.
    Configured(Vec<(GroupIndex, Group, Option<Refusal>)>),
    /// What became of each device, in order.
    Registered {
        /// The node's id.
        node: NodeId,
        /// In order.
        devices: Vec<DeviceOutcome>,
    },
}

/// What became of the registration of one device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceOutcome {
    /// Which one.
    pub id: DeviceId,
    /// Why it was refused, if it was.
    pub refusal: Option<Refusal>,
    /// It says a lower commit sequence than it did before.
    pub forgot: bool,
}

impl State {
    /// Applies one command. A refused one changes nothing.
    pub fn apply(&mut self, logged: &Logged) -> Result<Outcome, Refusal> {
        if self.cluster.is_none() && !matches!(logged.command, Command::InitCluster(_) | Command::UpdateMember(_)) {
            return Err(Refusal::new(
                Code::NotReady,
                "the cluster is just being initialised: try again",
            ));
        }
        let time_ms = logged.time_ms;
        let outcome = match &logged.command {
            Command::InitCluster(command) => self.init_cluster(command),
            Command::RaiseFeatureLevel(command) => self.raise_feature_level(command),
            Command::RegisterNode(command) => self.register_node(time_ms, command),
            Command::ReportDevices(command) => self.report_devices(time_ms, command),
            Command::CreateVolume(command) => self.create_volume(time_ms, command),
            Command::GrowVolume(command) => self.grow_volume(time_ms, command),
            Command::DeleteVolume(command) => self.delete_volume(time_ms, command),
            Command::Attach(command) => self.attach(time_ms, command),
            Command::Detach(command) => self.detach(time_ms, command),
            Command::ConfigureGroups(command) => self.configure_groups(time_ms, command),
            Command::AddMember(command) => self.add_member(time_ms, command),
            Command::RemoveMember(command) => self.remove_member(time_ms, command),
            Command::UpdateMember(command) => self.update_member(command),
            Command::ReplaceMember(command) => self.replace_member(time_ms, command),
            Command::NoteDevices(command) => self.note_devices(time_ms, command),
            Command::MoveMember(command) => self.move_member(time_ms, command),
            Command::DrainNode(command) => self.drain_node(time_ms, command),
        };
        debug_assert_eq!(self.check_invariants(), Ok(()), "after {:?}", logged.command);
        outcome
    }

    fn init_cluster(&mut self, command: &InitCluster) -> Result<Outcome, Refusal> {
        if self.cluster.is_none() {
            self.cluster = Some(command.cluster);
            self.feature_level = command.feature_level;
        }
        Ok(Outcome::Done)
    }

    fn raise_feature_level(&mut self, command: &RaiseFeatureLevel) -> Result<Outcome, Refusal> {
        let behind = self.nodes.values().find(|node| node.feature_level < command.level);
        if let Some(node) = behind {
            return Err(Refusal::new(
                Code::FeatureLevel,
                format!(
                    "node `{}` understands feature level {} only: upgrade it first",
                    node.name, node.feature_level
                ),
            ));
        }
        self.feature_level = self.feature_level.max(command.level);
        Ok(Outcome::Done)
    }

    /// What must hold between any two commands; the error says what does not.
    pub fn check_invariants(&self) -> Result<(), String> {
        let fail = |what: String| Err(what);
        if self.names.len() != self.volumes.len() {
            return fail(format!("{} names for {} volumes", self.names.len(), self.volumes.len()));
        }
        let mut groups = 0;
        for (id, volume) in &self.volumes {
            if self.names.get(&volume.name) != Some(id) || id.0 == 0 || id.0 > self.last_volume {
                return fail(format!(
                    "volume {id} `{}` is not reachable by its name and id",
                    volume.name
                ));
            }
            if volume
                .holder
                .as_ref()
                .is_some_and(|holder| holder.generation != volume.generation)
            {
                return fail(format!(
                    "volume {id} is held under another generation than the last one"
                ));
            }
            let count = self.groups_of(*id).count();
            if count != usize::from(volume.group_count.get()) {
                return fail(format!("volume {id} has {count} of {:?} groups", volume.group_count));
            }
            groups += count;
        }
        if groups != self.groups.len() {
            return fail("a group has no volume".to_string());
        }
        let oldest = self.events.first_key_value().map(|(id, _)| *id);
        if oldest.is_some_and(|id| id == 0 || id + self.events.len() as u64 != self.last_event + 1) {
            return fail("the events have a gap".to_string());
        }
        for (id, group) in &self.groups {
            let quorum = usize::from(self.volumes[&id.volume].write_quorum);
            if group.in_sync.is_empty() || group.epoch.0 == 0 {
                return fail(format!("group {id} has no in-sync member"));
            }
            if group.in_sync.iter().any(|member| group.joining.contains(member)) {
                return fail(format!("a member of group {id} is in sync and joining"));
            }
            if group.in_sync.len() >= quorum && !group.rescue.is_empty() {
                return fail(format!("group {id} has a quorum and a rescue set"));
            }
            let members = group.in_sync.len() + group.joining.len() + group.stale.len();
            if members < usize::from(self.volumes[&id.volume].replicas) {
                return fail(format!(
                    "group {id} has {members} members, and nobody will be the missing one"
                ));
            }
            let is_filled = |device: &DeviceId| group.joining.contains(device) || group.stale.contains(device);
            if !group.rebuilding.iter().all(is_filled) {
                return fail(format!("group {id} rebuilds on a device that is not to be filled"));
            }
            let is_open = |moving: &model::Move| group.in_sync.contains(&moving.from) && is_filled(&moving.to);
            if !group.moving.as_ref().is_none_or(is_open) {
                return fail(format!("group {id} moves a copy that is no copy, or to nobody"));
            }
            if let Some(device) = group.named().find(|device| !self.devices.contains_key(device)) {
                return fail(format!("group {id} names the unknown device {device}"));
            }
        }
        Ok(())
    }
}

/// Whether a text may name a volume or a node.
pub(crate) fn is_name(text: &str, bytes_max: usize) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let first = text.chars().next();
    text.len() <= bytes_max && first.is_some_and(|c| c.is_ascii_alphanumeric()) && text.chars().all(allowed)
}
