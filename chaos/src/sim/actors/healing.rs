//! What meta's service does about healing while its member leads: it notes what nodes and holders say, and lets production's
//! [`heal::decide()`] say what is to be done. (The gRPC service that does this is not simulated.)

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cairn_client::caretaker::Task;
use cairn_client::core::api::{Advice, AttachmentReport};
use cairn_meta::heal::{self, HealSettings, View};
use cairn_meta::limits::HEAL_INTERVAL_MS;
use cairn_meta::raft::Ticket;
use cairn_meta::state::command::{Command, DeviceReport, ReportDevices};
use cairn_meta::state::model::{DeviceState, State};
use cairn_meta::state::{Outcome, Refusal};
use cairn_proto::control::Code;
use cairn_proto::ids::{DeviceId, GroupId, NodeId, VolumeId};
use cairn_proto::replication::{GroupPhase, GroupStatus};
use cairn_proto::time::Time;

use crate::sim::msg::{Answer, Heartbeat, Request};

/// What a leader has heard, and what it does about it.
pub struct Healing {
    view: View,
    settings: HealSettings,
    /// How devices are, as they have said.
    reports: BTreeMap<DeviceId, DeviceReport>,
    due: Time,
    /// What was proposed and is not answered yet.
    under_way: BTreeSet<Ticket>,
}

impl Healing {
    /// Of a member that has just started.
    pub fn new(settings: HealSettings) -> Healing {
        Healing {
            view: View::default(),
            settings,
            reports: BTreeMap::new(),
            due: Time::ZERO,
            under_way: BTreeSet::new(),
        }
    }

    /// It leaves something undone.
    #[cfg(feature = "canary")]
    pub fn plant(&mut self, neglected: Option<heal::Duty>) {
        self.view.neglected = neglected;
    }

    /// The leader is known anew.
    pub fn reset(&mut self, now: Time) {
        self.view.reset(now);
        self.reports.clear();
    }

    /// When a leader looks next.
    pub fn due(&self) -> Time {
        self.due
    }

    /// What is to be proposed now, if it is time to look.
    pub fn decide(&mut self, state: &State, now: Time) -> Vec<Command> {
        if self.due > now {
            return Vec::new();
        }
        self.due = now + Duration::from_millis(HEAL_INTERVAL_MS);
        if state.cluster().is_none() || !self.under_way.is_empty() {
            return Vec::new();
        }
        let mut commands = heal::decide(state, &mut self.view, now, &self.settings);
        let news = |report: &&DeviceReport| {
            let known = state.devices().get(&report.id).map(|device| device.state);
            known.is_some_and(|known| match known {
                DeviceState::Active => report.failed,
                DeviceState::Failed => !report.failed,
                DeviceState::Replaced | DeviceState::Removed => false,
            })
        };
        let devices: Vec<DeviceReport> = self.reports.values().filter(news).cloned().collect();
        if !devices.is_empty() {
            commands.push(ReportDevices { devices }.into());
        }
        commands
    }

    /// A command of [`decide`](Self::decide) is under way.
    pub fn proposed(&mut self, ticket: Ticket) {
        self.under_way.insert(ticket);
    }

    /// Whether it was one of those that has ended.
    pub fn ended(&mut self, ticket: Ticket) -> bool {
        self.under_way.remove(&ticket)
    }

    /// What the leader answers by itself, without its log; `None` for everything else.
    pub fn heard(&mut self, state: &State, now: Time, request: &Request) -> Option<Answer> {
        match request {
            Request::Heartbeat(heartbeat) => Some(self.heartbeat(state, now, heartbeat)),
            Request::Report(node, reports) => {
                let advice = reports.iter().map(|report| self.report(state, now, *node, report));
                Some(Answer::Advice(advice.collect()))
            }
            Request::Care(name) => {
                let node = state.nodes().iter().find(|(_, node)| node.name == *name);
                let node = node.map(|(id, _)| *id);
                let tasks = node.map(|node| self.view.tasks_of(node)).unwrap_or_default();
                let task = |(volume, generation_seen)| Task {
                    volume,
                    generation_seen,
                };
                Some(Answer::Care(node, tasks.into_iter().map(task).collect()))
            }
            _ => None,
        }
    }

    fn heartbeat(&mut self, state: &State, now: Time, heartbeat: &Heartbeat) -> Answer {
        let node = heartbeat.node;
        match state.nodes().get(&node) {
            None => {
                let words = format!("no storage node has the id {node}: register it again");
                return Answer::Refused(Refusal::new(Code::NodeNotFound, words));
            }
            Some(known) if known.run != heartbeat.run => {
                let words = format!("another process has registered as node `{}` since", known.name);
                return Answer::Refused(Refusal::new(Code::NodeSuperseded, words));
            }
            Some(_) => {}
        }
        self.view.heard_node(node, now);
        let id = heartbeat.device.id;
        if state.devices().get(&id).is_some_and(|known| known.node == node) {
            self.view.heard_device(id, now);
            self.reports.insert(id, heartbeat.device.clone());
        }
        let held = heartbeat.held.iter().map(|held| (held.volume, held.generation));
        let damaged = heartbeat.damaged.iter().copied();
        self.view.heard_volumes(node, held, damaged, state, now);
        Answer::Heard
    }

    fn report(&mut self, state: &State, now: Time, node: Option<NodeId>, report: &AttachmentReport) -> Advice {
        let caretaker = node.filter(|_| report.is_caretaker);
        let said = describe(report, caretaker);
        let volume = report.id;
        let newer = said.groups.iter().any(|(index, group)| {
            let known = state.groups().get(&GroupId { volume, index: *index });
            known.is_some_and(|known| known.epoch > group.epoch)
        });
        let is_last = state
            .volumes()
            .get(&volume)
            .is_some_and(|known| known.generation == report.generation);
        self.view.heard_attachment(volume, said, state, now);
        Advice {
            id: volume,
            give_way: caretaker.is_some_and(|node| !is_last || !self.view.is_cared_for_by(volume, node)),
            look: newer,
        }
    }

    /// Puts into a command what only the leader knows.
    pub fn complete(&self, state: &State, now: Time, mut command: Command) -> Command {
        match &mut command {
            Command::Attach(attach) if attach.caretaker => {
                if let cairn_meta::state::command::Selector::Id(id) = attach.volume {
                    attach.displace = self.displaceable(state, id, now);
                }
            }
            Command::DrainNode(drain) => {
                // Production refuses while it does not know yet; here no place counts then, and the operator is refused too.
                let is_silent = |id: &&DeviceId| !self.view.is_served(id, now) || self.view.is_unknown(id, now);
                let silent = state.devices().keys().filter(is_silent);
                drain.silent = silent.copied().collect();
            }
            Command::RegisterNode(register) => {
                for device in &mut register.devices {
                    let uuid = device.id.uuid;
                    let mut formats = state.devices().keys().filter(|id| id.uuid == uuid);
                    device.displace = formats.all(|id| !self.view.is_served(id, now));
                }
            }
            _ => {}
        }
        command
    }

    fn displaceable(&self, state: &State, volume: VolumeId, now: Time) -> Option<cairn_proto::ids::Generation> {
        self.view.displaceable(volume, state, now)
    }

    /// An answer goes out: who has registered was heard of.
    pub fn answered(&mut self, state: &State, answer: &Answer, now: Time) {
        if let Answer::Done {
            outcome: Outcome::Registered { node, devices },
            ..
        } = answer
        {
            self.view.heard_node(*node, now);
            let served = devices.iter().filter(|device| device.refusal.is_none());
            let served: BTreeSet<DeviceId> = served.map(|device| device.id).collect();
            self.view.heard_start(*node, &served, state, now);
        }
    }
}

fn describe(report: &AttachmentReport, caretaker: Option<NodeId>) -> heal::AttachmentReport {
    let sum = |count: fn(&GroupStatus) -> u64| report.groups.iter().map(count).sum();
    heal::AttachmentReport {
        generation: report.generation,
        caretaker,
        groups: report
            .groups
            .iter()
            .map(|group| (group.group, describe_group(group)))
            .collect(),
        damaged_blocks: sum(|group| group.damage_found),
        repaired_blocks: sum(|group| group.damage_repaired),
    }
}

fn describe_group(group: &GroupStatus) -> heal::GroupReport {
    let member = |member: &cairn_proto::replication::MemberStatus| {
        let progress = heal::Progress {
            connected: member.connected,
            complete: member.complete,
            lacking_blocks: member.lacking_blocks,
            copied_blocks: member.copied_blocks,
            comparing: member.comparing,
        };
        (member.device, progress)
    };
    heal::GroupReport {
        epoch: group.epoch,
        phase: match group.phase {
            GroupPhase::Sealing => heal::Phase::Sealing,
            GroupPhase::Waiting => heal::Phase::Waiting,
            GroupPhase::Reconciling => heal::Phase::Reconciling,
            GroupPhase::Serving => heal::Phase::Serving,
            GroupPhase::Fenced => heal::Phase::Fenced,
        },
        members: group.members.iter().map(member).collect(),
    }
}
