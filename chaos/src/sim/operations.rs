//! What operators do to nodes while guests work and other things go wrong: they empty one, think better of it, add one. Whom they
//! ask is meta, which decides as in production (`cairn_meta::heal`).

use std::collections::BTreeSet;
use std::time::Duration;

use cairn_meta::state::State;
use cairn_proto::ids::NodeId;

use super::actors::{Input, operator};
use super::faulting::Strike;
use super::process::Process;
use super::world::World;
use crate::checker::history::Broken;

/// Nodes that are to be empty at the same time, at the most.
const DRAINING_MAX: usize = 2;

/// After this time at the most an operator thinks better of it, if ever.
const UNDRAIN_AFTER: Duration = Duration::from_secs(12);

/// As meta calls a node.
fn id_of(state: &State, node: u8) -> Option<NodeId> {
    let name = Process::Node(node).to_string();
    let mut nodes = state.nodes().iter();
    nodes.find(|(_, known)| known.name == name).map(|(id, _)| *id)
}

impl World {
    /// Whether a node is to hold nothing.
    pub(super) fn is_draining(&self, state: &State, node: u8) -> bool {
        let known = id_of(state, node).and_then(|id| state.nodes().get(&id));
        known.is_some_and(|known| known.draining.is_some())
    }

    /// A node that is there is to hold nothing, often for a while only.
    pub(super) fn drain_one(&mut self) -> Result<(), Broken> {
        let there = (0..self.options.nodes).filter(|node| !self.losses.holds(Process::Node(*node)));
        let there: Vec<u8> = there.collect();
        let Some((_, state)) = self.meta_states().max_by_key(|(applied, _)| *applied) else {
            return Ok(());
        };
        let draining = there.iter().filter(|node| self.is_draining(state, **node)).count();
        let known: Vec<(u8, NodeId)> = there
            .iter()
            .filter_map(|node| Some((*node, id_of(state, *node)?)))
            .collect();
        if draining >= DRAINING_MAX || known.is_empty() {
            return Ok(());
        }
        let (node, id) = *self.faulting.rng.pick(&known);
        self.note(format_args!("node-{node} is to hold nothing"));
        if self.faulting.rng.permille(400) {
            let after = self.faulting.rng.span(Duration::ZERO, UNDRAIN_AFTER);
            self.later(after, Strike::Undrain(id));
        }
        self.drain(id, true)
    }

    /// What an operator wants of a node.
    pub(super) fn drain(&mut self, node: NodeId, drain: bool) -> Result<(), Broken> {
        let wish = operator::Wish::Drain(node, drain);
        self.deliver(Process::Operator, Input::Operator(wish))
    }

    /// One more node is there, with an empty device.
    pub(super) fn add_node(&mut self) {
        match self.losses.to_come.pop_first() {
            Some(node) => {
                self.note(format_args!("node-{node} is added"));
                self.later(Duration::ZERO, Strike::Restart(Process::Node(node)));
            }
            None => *self.faulting.counts.entry("add-node").or_default() -= 1,
        }
    }

    /// What came of it, for the figures: nodes that were emptied, and added ones that have got copies.
    pub(super) fn count_operations(&mut self) {
        let first = self.options.nodes - self.options.late_nodes;
        let Some((_, state)) = self.meta_states().next() else {
            return;
        };
        let members = state.groups().values().flat_map(|group| &group.in_sync);
        let holding: BTreeSet<u8> = members.filter_map(|device| self.setup.node_of(device)).collect();
        let emptied = (0..self.options.nodes).filter(|node| self.is_draining(state, *node) && !holding.contains(node));
        let (emptied, filled) = (
            emptied.count() as u64,
            holding.iter().filter(|node| **node >= first).count() as u64,
        );
        for (name, count) in [("emptied", emptied), ("filled", filled)] {
            if count > 0 {
                *self.faulting.counts.entry(name).or_default() += count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::sim::nemesis::FaultKind;
    use crate::sim::network::NetworkOptions;
    use crate::sim::options::{Ending, FaultOptions, Options};
    use crate::sim::run::{Report, run};
    use crate::sim::trace::Keep;

    /// Three nodes, and a fourth that an operator adds; one of them is drained at times. Nothing else goes wrong.
    fn with_an_operator(seed: u64) -> Options {
        let weights = FaultKind::ALL.map(|kind| u32::from(kind.is_operation()));
        let mut options = Options {
            metas: 3,
            nodes: 4,
            late_nodes: 1,
            clients: 1,
            racks: 0,
            lonely: false,
            rot: false,
            loss: false,
            race: false,
            model_store: false,
            faulty: Duration::from_secs(8),
            ending: Ending::Released,
            ..Options::of_seed(seed)
        };
        options.volumes.truncate(1);
        options.volumes[0].min_copies_one = false;
        options.volumes[0].think = Duration::from_millis(100);
        options.network = NetworkOptions {
            reset_ppm: 0,
            flip_ppm: 0,
            loss_permille: 0,
            double_permille: 0,
            late_permille: 0,
            delay: Duration::from_micros(100),
        };
        options.faults = FaultOptions {
            interval: Duration::from_secs(1),
            span: Duration::from_millis(100),
            weights,
        };
        options
    }

    fn count(report: &Report, name: &str) -> u64 {
        report.stats.faults.get(name).copied().unwrap_or_default()
    }

    #[test]
    fn an_operator_adds_a_node_and_empties_another_onto_it_while_guests_work() {
        let mut emptied = 0;
        for seed in 1..=12 {
            let (report, _) = run(with_an_operator(seed), Keep::Hash);
            assert!(report.broken.is_none(), "{}: {:?}", report.seed, report.broken);
            assert!(count(&report, "add-node") <= 1, "there is but one to add");
            emptied += count(&report, "emptied").min(count(&report, "filled"));
        }
        assert!(
            emptied >= 2,
            "an added node took the copies of a drained one {emptied} times"
        );
    }
}
