//! The faults that `chaos live` injects, each a short story with real processes. `FAULTS` lists them; every one ends with
//! what it broke being whole again, and [`Run::step`] verifies.

use std::time::Duration;

use super::cluster::Part;
use super::foreign;
use super::report::{Failure, FailureKind};
use super::run::Run;
use super::scenarios;
use super::wait::wait_until;
use super::zombie;
use crate::faults::CATALOGUE;

/// What a guest may wait for while a quorum is there all the time, on a busy machine with unoptimised processes.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(15);
/// A quorum may be gone: how long guests wait depends on how long the fault lasts.
pub(super) const WAITS: Option<Duration> = None;
/// How long something that was killed stays away, at the most.
const AWAY_MAX: Duration = Duration::from_secs(4);
/// How long it may take to find out who leads.
const LEADER_BOUND: Duration = Duration::from_secs(30);
/// How often a process is killed again before it is up, in a restart loop.
const RESTARTS: u64 = 6;

/// A fault, by name.
#[derive(Clone, Copy)]
pub struct Fault {
    /// What the command calls it.
    pub name: &'static str,
    /// Its name in the catalogue.
    pub catalogue: &'static str,
    /// What guests may wait for at the most; `None` where a quorum is gone.
    pub stall_max: Option<Duration>,
    inject: fn(&mut Run) -> Result<(), Failure>,
    /// What a run must have for it, beyond what its layer needs.
    needs: Needs,
}

/// What a run must have for a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Needs {
    /// What its layer needs.
    Layer,
    /// Processes in network namespaces.
    Namespaces,
    /// Racks with several nodes.
    Racks,
}

impl Fault {
    /// It cuts ways between two processes.
    pub(super) const fn in_namespaces(mut self) -> Fault {
        self.needs = Needs::Namespaces;
        self
    }

    /// It concerns a whole rack.
    pub(super) const fn with_racks(mut self) -> Fault {
        self.needs = Needs::Racks;
        self
    }

    /// Whether a run has what it needs.
    pub fn is_possible(&self, run: &Run) -> bool {
        match self.needs {
            Needs::Namespaces => return run.cluster.has_namespaces(),
            Needs::Racks => return run.cluster.rack(1).is_some(),
            Needs::Layer => {}
        }
        let layer = CATALOGUE
            .iter()
            .find(|entry| entry.name == self.catalogue)
            .map(|entry| entry.layer);
        match layer {
            Some("disk") => !run.shims.is_empty(),
            _ if self.catalogue == "replaced" => !run.shims.is_empty(),
            Some("network") => !run.proxies.is_empty() || self.catalogue == "foreign",
            _ => true,
        }
    }

    /// Injects it, lets it end, and verifies.
    pub fn step(&self, run: &mut Run) -> Result<(), Failure> {
        run.step(self.name, self.stall_max, self.inject).map(drop)
    }
}

/// A fault of this name; see [`Fault`].
pub(super) const fn fault(
    name: &'static str,
    catalogue: &'static str,
    stall_max: Option<Duration>,
    inject: fn(&mut Run) -> Result<(), Failure>,
) -> Fault {
    Fault {
        name,
        catalogue,
        stall_max,
        inject,
        needs: Needs::Layer,
    }
}

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Fault> {
    FAULTS
        .iter()
        .chain(scenarios::disk::FAULTS)
        .chain(scenarios::device::FAULTS)
        .chain(scenarios::operation::FAULTS)
        .chain(scenarios::network::FAULTS)
}

/// Those of processes and clients.
const FAULTS: &[Fault] = &[
    fault("kill-node", "kill-node", Some(PAUSE_MAX), kill_node),
    fault("kill-meta-leader", "kill-meta", Some(PAUSE_MAX), kill_meta_leader),
    fault("kill-meta-follower", "kill-meta", Some(PAUSE_MAX), kill_meta_follower),
    fault("kill-all-metas", "kill-meta", Some(PAUSE_MAX), kill_all_metas),
    fault("kill-export", "kill-client", WAITS, kill_export),
    fault("kill-all", "kill-all", WAITS, kill_all),
    fault("kill-two-nodes", "kill-node", WAITS, kill_two_nodes),
    fault("freeze-100ms", "freeze", Some(PAUSE_MAX), |run| {
        freeze_any(run, Duration::from_millis(100))
    }),
    fault("freeze-node-5s", "freeze", Some(PAUSE_MAX), |run| {
        freeze_node(run, Duration::from_secs(5))
    }),
    fault("freeze-meta-5s", "freeze", Some(PAUSE_MAX), |run| {
        freeze_meta(run, Duration::from_secs(5))
    }),
    fault("freeze-export-5s", "freeze", WAITS, |run| {
        freeze_export(run, Duration::from_secs(5))
    }),
    fault("freeze-node-60s", "pause", Some(PAUSE_MAX), |run| {
        freeze_node(run, Duration::from_secs(60))
    }),
    fault("freeze-then-kill", "freeze", Some(PAUSE_MAX), freeze_then_kill),
    fault("restart-loop", "slow-start", Some(PAUSE_MAX), restart_loop),
    fault("start-in-any-order", "slow-start", WAITS, start_in_any_order),
    fault("take-over-again", "death-in-reconcile", WAITS, take_over_again),
    fault("zombie", "zombie", Some(PAUSE_MAX), zombie::zombie),
    fault("foreign", "foreign", Some(PAUSE_MAX), foreign::foreign),
];

/// Load as it was before a fault, for a random while.
pub(super) fn before(run: &mut Run) -> Result<(), Failure> {
    let span = run.rng.span(Duration::from_millis(200), Duration::from_millis(1500));
    run.load(span)
}

/// Kills it under load, lets the load go on without it, starts it again.
fn kill_for_a_while(run: &mut Run, parts: &[Part]) -> Result<(), Failure> {
    before(run)?;
    run.kill(parts);
    let away = run.rng.span(Duration::from_millis(50), AWAY_MAX);
    run.load(away)?;
    let mut order = parts.to_vec();
    shuffle(run, &mut order);
    run.start_all(&order)
}

/// Puts parts in random order.
pub(super) fn shuffle(run: &mut Run, parts: &mut [Part]) {
    for i in (1..parts.len()).rev() {
        let j = run.rng.below(i as u64 + 1) as usize;
        parts.swap(i, j);
    }
}

fn one_of(run: &mut Run, parts: impl Iterator<Item = Part>) -> Part {
    let parts: Vec<Part> = parts.collect();
    *run.rng.pick(&parts)
}

fn any_node(run: &mut Run) -> Part {
    let nodes = run.cluster.nodes();
    one_of(run, nodes)
}

fn leader(run: &Run) -> Result<Part, Failure> {
    super::wait::wait_for(LEADER_BOUND, || run.cluster.leader()).ok_or_else(|| {
        let words = format!("nobody has led the metadata servers for {LEADER_BOUND:?}");
        Failure::new(FailureKind::Unhealed, words)
    })
}

fn kill_node(run: &mut Run) -> Result<(), Failure> {
    let node = any_node(run);
    kill_for_a_while(run, &[node])
}

fn kill_two_nodes(run: &mut Run) -> Result<(), Failure> {
    let mut nodes: Vec<Part> = run.cluster.nodes().collect();
    shuffle(run, &mut nodes);
    kill_for_a_while(run, &nodes[..2.min(nodes.len())])
}

fn kill_meta_leader(run: &mut Run) -> Result<(), Failure> {
    let leader = leader(run)?;
    kill_for_a_while(run, &[leader])
}

fn kill_meta_follower(run: &mut Run) -> Result<(), Failure> {
    let leader = leader(run)?;
    let followers = run.cluster.metas().filter(move |meta| *meta != leader);
    let follower = one_of(run, followers);
    kill_for_a_while(run, &[follower])
}

fn kill_all_metas(run: &mut Run) -> Result<(), Failure> {
    let metas: Vec<Part> = run.cluster.metas().collect();
    kill_for_a_while(run, &metas)
}

fn kill_export(run: &mut Run) -> Result<(), Failure> {
    let exports = run.exports();
    let export = *run.rng.pick(&exports);
    kill_for_a_while(run, &[export])
}

/// Everything is killed at a random moment, and starts again in random order and at random times.
fn kill_all(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut all = run.cluster.running();
    run.kill(&all);
    shuffle(run, &mut all);
    start_as_it_comes(run, all)
}

/// Each after the other, at once or with pauses.
pub(super) fn start_as_it_comes(run: &mut Run, all: Vec<Part>) -> Result<(), Failure> {
    let is_quick = run.rng.permille(500);
    for part in all {
        if !is_quick {
            let pause = run.rng.span(Duration::ZERO, Duration::from_millis(400));
            run.load(pause)?;
        }
        run.start(part)?;
    }
    Ok(())
}

fn freeze_for(run: &mut Run, part: Part, span: Duration) -> Result<(), Failure> {
    before(run)?;
    run.freeze(part);
    run.load(span)?;
    run.resume(part);
    Ok(())
}

fn freeze_any(run: &mut Run, span: Duration) -> Result<(), Failure> {
    let running = run.cluster.running();
    for _ in 0..4 {
        let part = *run.rng.pick(&running);
        freeze_for(run, part, span)?;
    }
    Ok(())
}

fn freeze_node(run: &mut Run, span: Duration) -> Result<(), Failure> {
    let node = any_node(run);
    freeze_for(run, node, span)
}

fn freeze_meta(run: &mut Run, span: Duration) -> Result<(), Failure> {
    // A frozen leader is the harder case: it believes for a moment that it still leads.
    let leader = leader(run)?;
    freeze_for(run, leader, span)
}

fn freeze_export(run: &mut Run, span: Duration) -> Result<(), Failure> {
    let exports = run.exports();
    let export = *run.rng.pick(&exports);
    freeze_for(run, export, span)
}

/// Frozen for ever: an operator gives up and kills it.
fn freeze_then_kill(run: &mut Run) -> Result<(), Failure> {
    let node = any_node(run);
    before(run)?;
    run.freeze(node);
    run.load(Duration::from_secs(3))?;
    run.kill(&[node]);
    run.start(node)
}

/// A node is killed again and again while it is still starting.
fn restart_loop(run: &mut Run) -> Result<(), Failure> {
    let node = any_node(run);
    before(run)?;
    for _ in 0..RESTARTS {
        run.kill(&[node]);
        run.start(node)?;
        let up = run.rng.span(Duration::from_millis(5), Duration::from_millis(400));
        run.load(up)?;
    }
    Ok(())
}

/// Everything is stopped in order, then started one by one, each long after the one before.
fn start_in_any_order(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut all = run.cluster.running();
    for part in all.iter().rev() {
        run.stop(*part)?;
    }
    shuffle(run, &mut all);
    for part in all {
        run.start(part)?;
        let pause = run.rng.span(Duration::ZERO, Duration::from_millis(1500));
        run.load(pause)?;
    }
    Ok(())
}

/// An export dies again while it takes its volumes over, with a node missing.
fn take_over_again(run: &mut Run) -> Result<(), Failure> {
    let node = any_node(run);
    let exports = run.exports();
    let export = *run.rng.pick(&exports);
    before(run)?;
    run.kill(&[export, node]);
    for _ in 0..RESTARTS {
        run.start(export)?;
        let socket = match export {
            Part::Export(k) => run.cluster.socket(k),
            _ => unreachable!("exports are exports"),
        };
        // From the moment that it listens its guests make it attach.
        wait_until(LEADER_BOUND, || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        let up = run.rng.span(Duration::from_millis(1), Duration::from_millis(300));
        run.load(up)?;
        run.kill(&[export]);
    }
    run.start_all(&[export, node])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::Injected;

    #[test]
    fn every_fault_has_a_name_of_its_own_and_is_in_the_catalogue() {
        let mut names: Vec<_> = all().map(|fault| fault.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all().count());
        for entry in CATALOGUE {
            let has_step = all().any(|fault| fault.catalogue == entry.name);
            let says_so = entry.live == Injected::Yes;
            assert_eq!(says_so, has_step, "what the catalogue says of {}", entry.name);
        }
        for fault in all() {
            let known = CATALOGUE.iter().any(|entry| entry.name == fault.catalogue);
            assert!(known, "{} names {}, which is unknown", fault.name, fault.catalogue);
        }
    }
}
