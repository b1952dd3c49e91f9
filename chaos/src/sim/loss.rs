//! Devices that are lost for good, that come back empty, elsewhere, or when nobody waits for them any more: their copies must be
//! made anew wherever there is room for them, by whoever holds the volume, or by a caretaker.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cairn_meta::limits::NODE_SILENCE_MS;
use cairn_meta::state::model::Group;
use cairn_proto::ids::{GroupId, VolumeId};
use cairn_proto::time::Time;

use super::faulting::Strike;
use super::nemesis::FaultKind;
use super::options::Options;
use super::process::Process;
use super::setup::REPLICAS;
use super::world::{SessionPhase, World};

/// For so long after a loss nothing happens to other nodes: see `all_is_well`.
const NOTICED_AFTER: Duration = Duration::from_secs(8);

/// How often it is looked whether somebody is being ejected, when a device is to be lost at that moment.
const RACE_LOOK: Duration = Duration::from_millis(5);
/// How many times.
const RACE_LOOKS_MAX: u32 = 2000;

/// Nodes that do not run, and are not started when everything heals.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// For good.
    pub(super) gone: BTreeSet<u8>,
    /// They come back when all is well without them.
    pub(super) away: BTreeSet<u8>,
    /// They are added later, or never.
    pub(super) to_come: BTreeSet<u8>,
    /// When the last loss is noticed by everybody.
    noticed_at: Time,
}

impl Losses {
    /// Of a world that has not begun.
    pub(super) fn new(options: &Options) -> Losses {
        Losses {
            to_come: (options.nodes.saturating_sub(options.late_nodes)..options.nodes).collect(),
            ..Losses::default()
        }
    }

    /// Whether the process can't be started.
    pub(super) fn holds(&self, process: Process) -> bool {
        match process {
            Process::Node(node) | Process::Caretaker(node) => [&self.gone, &self.away, &self.to_come]
                .iter()
                .any(|held| held.contains(&node)),
            _ => false,
        }
    }
}

impl World {
    /// One more loss, if every group can bear it. Whether it was done.
    pub(super) fn lose(&mut self, kind: FaultKind) -> bool {
        let node = self.faulting.rng.index(self.disks.len()) as u8;
        if self.options.race && self.faulting.rng.permille(600) {
            return self.begin_race(kind, node);
        }
        self.lose_now(kind, node)
    }

    fn lost_with(&self, kind: FaultKind, node: u8) -> Vec<u8> {
        let same_rack = |other: &u8| self.setup.rack(*other) == self.setup.rack(node);
        match kind {
            FaultKind::DomainGone => (0..self.options.nodes).filter(same_rack).collect(),
            _ => vec![node],
        }
    }

    /// Another node goes away for so long that it is ejected; at that moment this one is lost.
    fn begin_race(&mut self, kind: FaultKind, node: u8) -> bool {
        let nodes = self.lost_with(kind, node);
        if !self.can_lose(&nodes) {
            return false;
        }
        let others = (0..self.options.nodes)
            .filter(|other| !nodes.contains(other) && !self.losses.holds(Process::Node(*other)))
            .collect::<Vec<u8>>();
        let other = Process::Node(*self.faulting.rng.pick(&others));
        self.note(format_args!(
            "{other} goes away, and when it is ejected, {}: node {node}",
            kind.name()
        ));
        self.kill(other, false);
        let away = self.faulting.rng.span(Duration::from_secs(2), Duration::from_secs(9));
        self.later(away, Strike::Restart(other));
        let looks = RACE_LOOKS_MAX;
        self.later(RACE_LOOK, Strike::Race { kind, node, looks });
        true
    }

    /// Looks whether somebody is being ejected now.
    pub(super) fn race(&mut self, kind: FaultKind, node: u8, looks: u32) {
        let changing = self
            .open_statuses()
            .any(|status| status.groups.iter().any(|group| group.changing));
        if changing {
            // A proposal may be on its way, be taken and committed, or its answer be on its way.
            let late = self.faulting.rng.permille(500);
            if !late {
                self.lose_now(kind, node);
                return;
            }
        }
        if looks > 0 {
            let looks = looks - 1;
            self.later(RACE_LOOK, Strike::Race { kind, node, looks });
        }
    }

    fn lose_now(&mut self, kind: FaultKind, node: u8) -> bool {
        let nodes = self.lost_with(kind, node);
        if !self.can_lose(&nodes) {
            return false;
        }
        self.note(format_args!("{}: nodes {nodes:?}", kind.name()));
        self.losses.noticed_at = self.now() + NOTICED_AFTER;
        let pause = self.span();
        match kind {
            FaultKind::Wiped | FaultKind::Replaced => {
                self.kill(Process::Node(node), true);
                let disk = &mut self.disks[usize::from(node)];
                self.setup.renew(node, kind == FaultKind::Replaced, disk);
                self.later(pause, Strike::Restart(Process::Node(node)));
            }
            FaultKind::Swapped => self.swap(node, pause),
            FaultKind::NodeBack => {
                self.kill(Process::Node(node), true);
                self.losses.away.insert(node);
                if self.faulting.rng.permille(500) {
                    let after = self.options.rebuild_after + Duration::from_millis(2 * NODE_SILENCE_MS);
                    self.later(after + pause, Strike::Return(node));
                }
            }
            _ => {
                for node in nodes {
                    self.kill(Process::Node(node), true);
                    self.losses.gone.insert(node);
                }
            }
        }
        true
    }

    fn swap(&mut self, node: u8, pause: Duration) {
        let other = (node + 1) % self.options.nodes;
        if self.losses.holds(Process::Node(other)) {
            return;
        }
        for node in [node, other] {
            self.kill(Process::Node(node), true);
            self.disks[usize::from(node)].heal();
            self.later(pause, Strike::Restart(Process::Node(node)));
        }
        self.disks.swap(usize::from(node), usize::from(other));
        self.setup.swap((node, other));
    }

    /// A node that was away is there again.
    pub(super) fn come_back(&mut self, node: u8) {
        if self.losses.away.remove(&node) {
            self.note(format_args!("node-{node} is back"));
            self.later(Duration::ZERO, Strike::Restart(Process::Node(node)));
        }
    }

    /// Whether a fault must wait until the last loss was noticed.
    pub(super) fn must_wait(&self, kind: FaultKind) -> bool {
        use FaultKind as F;
        let spares_nodes = matches!(
            kind,
            F::Drain | F::AddNode | F::KillMeta | F::KillClient | F::TakeOver | F::HandOver | F::Release | F::Reset
        );
        self.options.loss && !self.options.race && self.now() < self.losses.noticed_at && !spares_nodes
    }

    /// Whether every group has all its copies on devices that are there, and two of them elsewhere: with more losses than one at
    /// a time acknowledged data may be gone, and that is promised to nobody.
    fn can_lose(&self, nodes: &[u8]) -> bool {
        let quiet = self.options.race || self.all_is_well();
        if !quiet || nodes.iter().any(|node| self.losses.holds(Process::Node(*node))) {
            return false;
        }
        let Some(groups) = self.newest_groups() else {
            return false;
        };
        groups.values().all(|group| {
            let on: Vec<u8> = group
                .in_sync
                .iter()
                .filter_map(|member| self.setup.node_of(member))
                .filter(|node| !self.losses.holds(Process::Node(*node)))
                .collect();
            let left = on.iter().filter(|node| !nodes.contains(node)).count();
            on.len() == usize::from(REPLICAS)
                && group.in_sync.len() == on.len()
                && group.joining.is_empty()
                && left >= 2
        })
    }

    fn open_statuses(&self) -> impl Iterator<Item = cairn_client::core::api::VolumeStatus> + '_ {
        let sessions = self.sessions.iter();
        let open = sessions.filter(|session| session.phase == SessionPhase::Open);
        open.filter_map(|session| self.client(session.client)?.status(session.handle))
    }

    /// Whether nobody is about to be ejected, as far as holders know. Who is ejected just when another one is lost, before that is
    /// noticed, leaves a group that can't go on by itself: that is for seeds with `race`.
    fn all_is_well(&self) -> bool {
        self.open_statuses().all(|status| {
            let mut groups = status.groups.iter();
            groups
                .all(|group| !group.changing && group.members.iter().all(|member| member.connected && member.complete))
        })
    }

    /// The newest configuration of each group that any metadata server has applied; `None` while some can't be looked at.
    pub(super) fn newest_groups(&self) -> Option<BTreeMap<GroupId, &Group>> {
        if self.meta_states().count() < usize::from(self.options.metas) {
            return None;
        }
        let mut newest: BTreeMap<GroupId, &Group> = BTreeMap::new();
        for (id, group) in self.meta_states().flat_map(|(_, state)| state.groups()) {
            let known = newest.entry(*id).or_insert(group);
            if known.epoch < group.epoch {
                *known = group;
            }
        }
        Some(newest)
    }

    /// How many copies of something acknowledged may be gone: one, if a member in sync of a group of this volume was on a device that is
    /// no more, or the device of one has lied. There is never more than one at a time.
    pub(super) fn copies_lost(&self, volume: VolumeId) -> usize {
        let has_lied = |node: u8| self.disks[usize::from(node)].has_lied();
        let is_known = self.meta_states().count() == usize::from(self.options.metas)
            && self
                .meta_states()
                .all(|(_, state)| state.volumes().contains_key(&volume));
        if !is_known {
            // Who is in sync is not known, so it may be a member of this volume.
            let is_any = self.setup.has_renewed() || (0..self.options.nodes).any(has_lied);
            return usize::from(is_any);
        }
        let groups = self.meta_states().flat_map(|(_, state)| state.groups_of(volume));
        let mut members = groups.flat_map(|(_, group)| &group.in_sync);
        let is_lost = members.any(|member| self.setup.node_of(member).is_none_or(has_lied));
        usize::from(is_lost)
    }
}
