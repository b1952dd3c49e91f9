//! Faults of connections.

use std::time::Duration;

use crate::live::cluster::Part;
use crate::live::inject::proxy;
use crate::live::report::{Failure, FailureKind};
use crate::live::run::Run;
use crate::live::steps::{Fault, PAUSE_MAX, WAITS, before, fault};

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
