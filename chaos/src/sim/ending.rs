//! How a seed ends: what becomes of its volumes, and what must come right then, whether anybody holds them or not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cairn_meta::state::State;
use cairn_meta::state::model::{DeviceState, Group};
use cairn_proto::ids::{GroupId, VolumeId};
use cairn_proto::replication::MemberRole;

use super::actors::Actor;
use super::inspect::{Held, Inspected, difference};
use super::options::Ending;
use super::process::Process;
use super::setup::REPLICAS;
use super::world::{SessionPhase, World};
use crate::checker::history::Broken;

/// Virtual time in which replicas must be equal after everything has healed.
const CONVERGE_BOUND: Duration = Duration::from_secs(120);
/// The same where nobody holds the volumes: a holder that died is given a minute, and a caretaker that came too early may have
/// to pause.
const CONVERGE_UNHELD_BOUND: Duration = Duration::from_secs(420);
/// Virtual time in which copies must stand where they should. Meta moves a copy that stands too close to another one when all who
/// have a part in it were heard of for a minute; it looks every ten seconds and lets two copies move at a time, so nine groups take
/// 50 s more. As much again is for the copies themselves, which those who hold the volume, or a caretaker, have to make.
const PLACES_BOUND: Duration = Duration::from_secs(220);
/// It is looked again whether all is well after this time at the most.
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// How long nodes that came back are there before it is looked again.
const AFTER_RETURN: Duration = Duration::from_secs(12);

/// What must come right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Goal {
    /// Every group has all its members in sync, by meta. What each of them holds is known to who holds the volume.
    Members,
    /// And they hold the same blocks.
    Blocks,
    /// And nobody is about who could say so by himself: meta knows that each volume was given back with all its copies equal.
    Settled,
    /// Members stand in distinct failure domains, and not on nodes that are to hold nothing, wherever that is possible.
    Places,
}

impl Goal {
    fn promise(self) -> &'static str {
        match self {
            Goal::Members => "every group regains its copies",
            Goal::Blocks => "replicas become equal once everything has healed",
            Goal::Settled => "a volume that nobody holds is settled",
            Goal::Places => "copies stand where they should",
        }
    }
}

impl World {
    /// What becomes of the volumes now.
    pub(super) fn end_sessions(&mut self) -> Result<(), Broken> {
        match self.options.ending {
            Ending::Held => Ok(()),
            Ending::Released => {
                for session in 0..self.sessions.len() {
                    self.close(session)?;
                }
                self.complete()
            }
            Ending::Abandoned => {
                for client in 0..self.options.clients {
                    self.kill(Process::Client(client), false);
                }
                Ok(())
            }
        }
    }

    /// Every group gets all the copies that it can have, whether anybody holds its volume or not. Who comes back when nobody waits
    /// any more does no harm; nor does whoever uses the volumes next, and then all copies are equal.
    pub(super) fn regain_copies(&mut self) -> Result<(), Broken> {
        let is_held = self.options.ending == Ending::Held;
        let away = self.losses.away.clone();
        if is_held && away.is_empty() {
            return Ok(());
        }
        self.reach(Goal::Members)?;
        for node in &away {
            self.losses.away.remove(node);
            self.start(Process::Node(*node))?;
        }
        if !away.is_empty() {
            self.pass(AFTER_RETURN)?;
            self.reach(Goal::Members)?;
        }
        if !is_held {
            // Whoever left the volumes leaves no member behind the others for longer than it takes a caretaker to come, and what is to
            // be elsewhere moves though nobody uses it.
            self.reach(Goal::Settled)?;
            self.reach(Goal::Places)?;
            self.reach(Goal::Settled)?;
        }
        for client in 0..self.options.clients {
            self.start(Process::Client(client))?;
        }
        self.read_everything()
    }

    /// Where everything is in the end: all copies are equal, and stand where they should.
    pub(super) fn come_to_rest(&mut self) -> Result<(), Broken> {
        self.reach(Goal::Blocks)?;
        self.reach(Goal::Places)?;
        self.reach(Goal::Blocks)
    }

    /// Lets time pass.
    fn pass(&mut self, span: Duration) -> Result<(), Broken> {
        let end = self.now() + span;
        self.run_until(span, |_| false)?;
        self.schedule.advance_to(end);
        Ok(())
    }

    /// Lets time pass until all is as it should be, within the time that this may take.
    fn reach(&mut self, goal: Goal) -> Result<(), Broken> {
        let bound = match (goal, self.options.ending) {
            (Goal::Settled, _) => CONVERGE_UNHELD_BOUND,
            (Goal::Members, Ending::Released | Ending::Abandoned) => CONVERGE_UNHELD_BOUND,
            (Goal::Members | Goal::Blocks, _) => CONVERGE_BOUND,
            (Goal::Places, _) => PLACES_BOUND,
        };
        let end = self.now() + bound;
        let mut pause = Duration::from_millis(500);
        while let Some(words) = self.what_is_missing(goal)? {
            if self.now() >= end {
                return Err(self.broken(goal.promise(), words));
            }
            self.pass(pause)?;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Ok(())
    }

    fn what_is_missing(&mut self, goal: Goal) -> Result<Option<String>, Broken> {
        if let Some(words) = self.metas_differ() {
            return Ok(Some(words));
        }
        let state = self.meta_states().next().map(|(_, state)| state.clone());
        let Some(state) = state else { return Ok(None) };
        let mut groups: Vec<(GroupId, Vec<u8>)> = Vec::new();
        let beyond = self.beyond_help();
        for (id, group) in state.groups().iter().filter(|(id, _)| !beyond.contains_key(id)) {
            let there = self.members_there(group);
            let missing = match goal {
                Goal::Members | Goal::Blocks | Goal::Settled => self.is_short(&state, *id, group, &there),
                Goal::Places => self.is_misplaced(&state, *id, group, &there),
            };
            if missing.is_some() {
                return Ok(missing);
            }
            groups.push((*id, there));
        }
        if let Some(words) = self.known_damage() {
            return Ok(Some(words));
        }
        match goal {
            Goal::Members | Goal::Places => Ok(None),
            Goal::Blocks => self.blocks_differ(groups),
            Goal::Settled => {
                let is_beyond = |volume: VolumeId| beyond.keys().any(|group| group.volume == volume);
                let mut volumes = state.volumes().iter().filter(|(id, _)| !is_beyond(**id));
                let open = volumes.find(|(_, volume)| volume.holder.is_some() || !volume.settled);
                match open {
                    Some((id, volume)) => Ok(Some(format!("volume {id} is {volume:?}"))),
                    None => self.blocks_differ(groups),
                }
            }
        }
    }

    /// The members in sync that run.
    fn members_there(&self, group: &Group) -> Vec<u8> {
        let known = group.in_sync.iter().filter_map(|member| self.setup.node_of(member));
        known.filter(|node| !self.losses.holds(Process::Node(*node))).collect()
    }

    fn domain(&self, node: u8) -> u8 {
        self.setup.rack(node).unwrap_or(node)
    }

    /// Whether a node runs, and is not to be emptied.
    fn may_hold(&self, state: &State, node: u8) -> bool {
        !self.losses.holds(Process::Node(node)) && !self.is_draining(state, node)
    }

    /// How many copies a group can have: in so many failure domains there is a node that runs, and has one or may be given one.
    fn copies_possible(&self, state: &State, there: &[u8]) -> usize {
        let able = (0..self.options.nodes).filter(|node| there.contains(node) || self.may_hold(state, *node));
        let domains: BTreeSet<u8> = able.map(|node| self.domain(node)).collect();
        domains.len().min(usize::from(REPLICAS))
    }

    /// Which copies are missing.
    fn is_short(&self, state: &State, id: GroupId, group: &Group, there: &[u8]) -> Option<String> {
        let possible = self.copies_possible(state, there);
        let replicas = usize::from(state.volumes()[&id.volume].replicas);
        let is_whole = there.len() >= possible && (possible < replicas || group.in_sync.len() == possible);
        let runs = |node: u8| !self.losses.holds(Process::Node(node));
        let mut joining = group.joining.iter().filter_map(|member| self.setup.node_of(member));
        (!is_whole || joining.any(runs)).then(|| {
            format!(
                "group {id} has copies on nodes {there:?}, not {possible}: {group:?}{}",
                self.progress()
            )
        })
    }

    /// Which copies should be elsewhere.
    fn is_misplaced(&self, state: &State, id: GroupId, group: &Group, there: &[u8]) -> Option<String> {
        let domains: BTreeSet<u8> = there.iter().map(|node| self.domain(*node)).collect();
        if domains.len() < self.copies_possible(state, there).min(there.len()) {
            return Some(format!(
                "copies of group {id} on nodes {there:?} share a failure domain: {group:?}"
            ));
        }
        let is_usable = |node: &u8| {
            let device = state.devices().get(&self.setup.device(*node));
            let is_well = device.is_some_and(|device| device.state == DeviceState::Active && !device.forgot);
            is_well && self.may_hold(state, *node) && !there.contains(node)
        };
        there
            .iter()
            .filter(|node| there.len() >= usize::from(REPLICAS) && !self.may_hold(state, **node))
            .find_map(|node| {
                let others = there.iter().filter(|other| *other != node);
                let taken: BTreeSet<u8> = others.map(|other| self.domain(*other)).collect();
                let mut places = (0..self.options.nodes).filter(is_usable);
                let place = places.find(|place| !taken.contains(&self.domain(*place)))?;
                Some(format!(
                    "a copy of group {id} is still on node-{node}, which is to hold nothing, and could be on node-{place}: {group:?}"
                ))
            })
    }

    fn blocks_differ(&self, groups: Vec<(GroupId, Vec<u8>)>) -> Result<Option<String>, Broken> {
        let mut opened: BTreeMap<u8, Inspected> = BTreeMap::new();
        for (group, members) in groups {
            let mut first: Option<(u8, Held)> = None;
            for node in members {
                let entry = match opened.entry(node) {
                    std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                    std::collections::btree_map::Entry::Vacant(entry) => {
                        let disk = &self.disks[usize::from(node)];
                        let opened = self.setup.inspect(node, disk);
                        if opened.is_err() && disk.has_lied() {
                            // What it has lost may be a part of its log.
                            continue;
                        }
                        let opened = opened.map_err(|words| {
                            self.broken("a device can be opened again", format!("node-{node}: {words}"))
                        })?;
                        entry.insert(opened)
                    }
                };
                let held = match entry.held(group) {
                    Ok(held) => held,
                    Err(words) => return Ok(Some(format!("group {group} on node-{node}: {words}"))),
                };
                match &first {
                    None => first = Some((node, held)),
                    Some((other, first)) => {
                        let rotten = |node: u8| self.options.rot && node == self.victim();
                        let is_open = |chunk, block| self.nobody_was_told_of(group.volume, chunk, block);
                        if let Some(words) = difference((first, rotten(*other)), (&held, rotten(node)), is_open) {
                            return Ok(Some(format!("group {group} on node-{other} and node-{node}: {words}")));
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// What nodes know to be damaged is repaired, but for what was lost.
    fn known_damage(&self) -> Option<String> {
        if self.errors.contains_key("Damaged") {
            return None;
        }
        self.slots
            .iter()
            .find_map(|(process, slot)| match slot.actor.as_ref()? {
                Actor::Node(actor) => {
                    let damaged = actor.status()?.damaged_volumes;
                    (!damaged.is_empty()).then(|| format!("{process} knows of damage in volumes {damaged:?}"))
                }
                _ => None,
            })
    }

    /// What the newest holders say of groups without all their copies.
    fn progress(&self) -> String {
        let open = self
            .sessions
            .iter()
            .filter(|session| session.phase == SessionPhase::Open);
        let status = open.filter_map(|session| self.client(session.client)?.status(session.handle));
        let groups = status.flat_map(|status| status.groups);
        let groups = groups.filter(|group| {
            group
                .members
                .iter()
                .any(|m| m.role != MemberRole::InSync || !m.complete)
        });
        groups.map(|group| format!("; {group:?}")).collect()
    }

    pub(super) fn meta_states(&self) -> impl Iterator<Item = (u64, &cairn_meta::state::State)> + '_ {
        self.slots.values().filter_map(|slot| match slot.actor.as_ref()? {
            Actor::Meta(meta) => Some((meta.applied(), meta.state())),
            _ => None,
        })
    }

    fn metas_differ(&self) -> Option<String> {
        let mut states = self.meta_states();
        let (applied, state) = states.next()?;
        for (other_applied, other) in states {
            if applied != other_applied {
                return Some(format!("metadata servers have applied {applied} and {other_applied}"));
            }
            if state != other {
                return Some(format!("the states of metadata servers differ at {applied}"));
            }
        }
        None
    }
}
