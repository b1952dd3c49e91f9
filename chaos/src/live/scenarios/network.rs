//! Faults of connections.

use std::time::Duration;

use crate::live::cluster::Part;
use crate::live::inject::proxy;
use crate::live::report::{Failure, FailureKind};
use crate::live::run::Run;
use crate::live::steps::{Fault, PAUSE_MAX, WAITS, before, fault, shuffle};

/// Those of connections.
pub const FAULTS: &[Fault] = &[
    fault("reset", "reset", Some(PAUSE_MAX), reset),
    fault("delay", "delay", Some(PAUSE_MAX), delay),
    fault("half-open", "half-open", Some(PAUSE_MAX), half_open),
    fault("isolate-node", "isolate", Some(PAUSE_MAX), isolate_node),
    fault("one-way", "one-way", Some(PAUSE_MAX), one_way),
    fault("flapping", "flapping", Some(PAUSE_MAX), flapping),
    fault(
        "isolate-meta-leader",
        "partition-meta",
        Some(PAUSE_MAX),
        isolate_meta_leader,
    ),
    fault(
        "isolate-meta-majority",
        "partition-meta",
        Some(PAUSE_MAX),
        isolate_meta_majority,
    ),
    fault("drop", "loss", Some(PAUSE_MAX), drop_all),
    fault("reorder", "reorder", Some(PAUSE_MAX), reorder),
    fault("cut-client-node", "isolate", Some(PAUSE_MAX), cut_client_node).in_namespaces(),
    fault("cut-client-metas", "isolate", Some(PAUSE_MAX), cut_client_metas).in_namespaces(),
    fault("cut-node-node", "isolate", Some(PAUSE_MAX), cut_node_node).in_namespaces(),
    fault("cut-node-metas", "isolate", Some(PAUSE_MAX), cut_node_metas).in_namespaces(),
    fault("cut-one-way", "one-way", Some(PAUSE_MAX), cut_one_way).in_namespaces(),
    fault("cut-flapping", "flapping", Some(PAUSE_MAX), cut_flapping).in_namespaces(),
    fault("cut-meta-leader", "partition-meta", Some(PAUSE_MAX), cut_meta_leader).in_namespaces(),
    fault("cut-all-metas", "partition-meta", Some(PAUSE_MAX), cut_all_metas).in_namespaces(),
    fault("pull-cable", "isolate", Some(PAUSE_MAX), pull_cable).in_namespaces(),
    fault("corrupt-node", "corrupt", Some(PAUSE_MAX), corrupt),
    fault("corrupt-all", "corrupt", WAITS, corrupt_all),
];

/// How long a fault of one part lasts.
const SPAN: Duration = Duration::from_secs(5);

/// Sets a fault of the connections to a part.
pub fn set(run: &mut Run, part: Part, fault: proxy::Fault) -> Result<(), Failure> {
    run.timeline.note(format!("connections to {part}: {fault}"));
    let Some(proxy) = run.proxies.get(&part) else {
        return Err(Failure::new(
            FailureKind::Setup,
            format!("there is no proxy before {part}"),
        ));
    };
    proxy
        .set(fault)
        .map_err(|error| Failure::new(FailureKind::Setup, format!("the proxy before {part}: {error}")))
}

fn any_node(run: &mut Run) -> Part {
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    *run.rng.pick(&nodes)
}

/// All connections are slow, each message by another time.
fn delay(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    for part in run.cluster.servers() {
        let fixed = Duration::from_millis(run.rng.below(5));
        let jitter = Duration::from_millis(run.rng.below(20));
        set(run, part, proxy::Fault::Delay { fixed, jitter })?;
    }
    run.load(SPAN)?;
    run.heal()
}

/// What is connected to a node falls silent for good, and new connections are accepted by nobody for a while.
fn half_open(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let node = any_node(run);
    set(run, node, proxy::Fault::Silence)?;
    set(run, node, proxy::Fault::HalfOpen)?;
    run.load(SPAN)?;
    run.heal()
}

fn isolate_node(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let node = any_node(run);
    set(run, node, proxy::Fault::BlackHole)?;
    run.load(SPAN)?;
    run.heal()
}

fn one_way(run: &mut Run) -> Result<(), Failure> {
    for direction in [proxy::Direction::ToTarget, proxy::Direction::ToClient] {
        before(run)?;
        let node = any_node(run);
        set(run, node, proxy::Fault::OneWay(direction))?;
        run.load(SPAN / 2)?;
        run.heal()?;
    }
    Ok(())
}

fn flapping(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let node = any_node(run);
    for _ in 0..8 {
        set(run, node, proxy::Fault::BlackHole)?;
        let off = run.rng.span(Duration::from_millis(20), Duration::from_millis(500));
        run.load(off)?;
        run.heal()?;
        let on = run.rng.span(Duration::from_millis(20), Duration::from_millis(500));
        run.load(on)?;
    }
    Ok(())
}

/// The leader of the metadata servers hears nobody who connects to it; what it says itself still gets through.
fn isolate_meta_leader(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let metas: Vec<Part> = run.cluster.metas().collect();
    let leader = run.cluster.leader().unwrap_or_else(|| *run.rng.pick(&metas));
    set(run, leader, proxy::Fault::BlackHole)?;
    run.load(SPAN)?;
    run.heal()
}

/// Bits of what is sent to and by a node flip.
fn corrupt(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let node = any_node(run);
    let one_in = run.rng.within(32 << 10, 512 << 10);
    set(run, node, proxy::Fault::Corrupt { one_in })?;
    run.load(SPAN)?;
    run.heal()
}

/// Bits of what is sent to and by all nodes flip: no two copies of anything can be relied on to arrive.
fn corrupt_all(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let one_in = run.rng.within(12 << 10, 48 << 10);
    for node in nodes {
        set(run, node, proxy::Fault::Corrupt { one_in })?;
    }
    run.load(SPAN * 2)?;
    run.heal()
}

/// Connections to a node end in the middle of frames, again and again.
fn reset(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let node = *run.rng.pick(&nodes);
    let bytes = run.rng.within(1 << 10, 1 << 20);
    set(run, node, proxy::Fault::ResetAfter { bytes })?;
    run.load(Duration::from_secs(3))?;
    run.heal()
}

/// All but one of the metadata servers hear nobody who connects to them.
fn isolate_meta_majority(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut metas: Vec<Part> = run.cluster.metas().collect();
    shuffle(run, &mut metas);
    for meta in &metas[1..] {
        set(run, *meta, proxy::Fault::BlackHole)?;
    }
    run.load(SPAN)?;
    run.heal()
}

/// All connections of everybody are reset at the same moment, again and again: whatever was under way is lost.
fn drop_all(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    for _ in 0..6 {
        for part in run.cluster.servers() {
            set(run, part, proxy::Fault::Drop)?;
        }
        let pause = run.rng.span(Duration::from_millis(50), Duration::from_millis(900));
        run.load(pause)?;
    }
    run.heal()
}

/// What is said on different connections arrives in another order: some wait up to half a second, others not at all.
fn reorder(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    for part in run.cluster.servers() {
        let most = if run.rng.permille(500) { 500 } else { 5 };
        let (fixed, jitter) = (Duration::ZERO, Duration::from_millis(run.rng.within(1, most)));
        set(run, part, proxy::Fault::Delay { fixed, jitter })?;
    }
    run.load(SPAN)?;
    run.heal()
}

/// Cuts both ways between each of the ones and each of the others; who is both has no way to itself anyway.
fn cut_between(run: &mut Run, ones: &[Part], others: &[Part]) -> Result<(), Failure> {
    let names = |parts: &[Part]| parts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    run.timeline
        .note(format!("no way between {} and {}", names(ones), names(others)));
    for one in ones {
        for other in others.iter().filter(|other| *other != one) {
            run.cluster.cut(*one, *other)?;
            run.cluster.cut(*other, *one)?;
        }
    }
    Ok(())
}

/// The same, for a while.
fn part_ways(run: &mut Run, ones: &[Part], others: &[Part]) -> Result<(), Failure> {
    before(run)?;
    cut_between(run, ones, others)?;
    run.load(SPAN)?;
    run.heal()
}

fn any_export(run: &mut Run) -> Part {
    let exports = run.exports();
    *run.rng.pick(&exports)
}

/// A client does not reach a node that everybody else reaches.
fn cut_client_node(run: &mut Run) -> Result<(), Failure> {
    let (export, node) = (any_export(run), any_node(run));
    part_ways(run, &[export], &[node])
}

/// A client reaches no metadata server; all nodes do.
fn cut_client_metas(run: &mut Run) -> Result<(), Failure> {
    let export = any_export(run);
    let metas: Vec<Part> = run.cluster.metas().collect();
    part_ways(run, &[export], &metas)
}

/// Two nodes don't reach each other; clients reach both.
fn cut_node_node(run: &mut Run) -> Result<(), Failure> {
    let mut nodes: Vec<Part> = run.cluster.nodes().collect();
    shuffle(run, &mut nodes);
    part_ways(run, &nodes[..1], &nodes[1..2])
}

/// A node reaches no metadata server; clients reach it.
fn cut_node_metas(run: &mut Run) -> Result<(), Failure> {
    let node = any_node(run);
    let metas: Vec<Part> = run.cluster.metas().collect();
    part_ways(run, &[node], &metas)
}

fn any_pair(run: &mut Run) -> (Part, Part) {
    let mut parts = run.cluster.servers();
    parts.extend(run.exports());
    shuffle(run, &mut parts);
    (parts[0], parts[1])
}

/// Of two processes the one hears the other, which hears nothing: several such pairs, one after the other.
fn cut_one_way(run: &mut Run) -> Result<(), Failure> {
    for _ in 0..4 {
        before(run)?;
        let (from, to) = any_pair(run);
        run.timeline.note(format!("nothing of {from} arrives at {to}"));
        run.cluster.cut(from, to)?;
        run.load(SPAN / 2)?;
        run.heal()?;
    }
    Ok(())
}

/// Ways between random pairs go and come.
fn cut_flapping(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    for _ in 0..8 {
        let (one, other) = any_pair(run);
        cut_between(run, &[one], &[other])?;
        let off = run.rng.span(Duration::from_millis(20), Duration::from_millis(800));
        run.load(off)?;
        run.heal()?;
        let on = run.rng.span(Duration::from_millis(20), Duration::from_millis(300));
        run.load(on)?;
    }
    Ok(())
}

/// The leader of the metadata servers reaches all clients and nodes and none of the others: it is a minority.
fn cut_meta_leader(run: &mut Run) -> Result<(), Failure> {
    let metas: Vec<Part> = run.cluster.metas().collect();
    let leader = run.cluster.leader().unwrap_or_else(|| *run.rng.pick(&metas));
    let others: Vec<Part> = metas.into_iter().filter(|meta| *meta != leader).collect();
    part_ways(run, &[leader], &others)
}

/// No metadata server reaches another: there is no majority anywhere.
fn cut_all_metas(run: &mut Run) -> Result<(), Failure> {
    let metas: Vec<Part> = run.cluster.metas().collect();
    part_ways(run, &metas, &metas)
}

/// The cable of a server is pulled: it has no carrier.
fn pull_cable(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let servers = run.cluster.servers();
    let part = *run.rng.pick(&servers);
    run.timeline.note(format!("the cable of {part} is pulled"));
    run.cluster.pull_cable(part)?;
    run.load(SPAN)?;
    run.heal()
}
