//! A node is emptied while it serves, stopped, and put into use again.

use std::time::{Duration, Instant};

use crate::live::cluster::Part;
use crate::live::report::{Failure, FailureKind};
use crate::live::run::{Run, WELL_BOUND};
use crate::live::steps::before;

use super::operation::{holder, unhealed, with_a_spare};

/// How long a node may take until it holds nothing: some hundred megabytes at the rate of copies that nobody is in need of.
const EMPTY_BOUND: Duration = Duration::from_secs(180);
/// How long it may hold on its device what is copied elsewhere.
const DROP_BOUND: Duration = Duration::from_secs(60);
/// Long enough for a node to register, and to hear with some heartbeats what it is to drop.
const HEARTBEATS: Duration = Duration::from_secs(6);
/// How long an empty node is away: longer than its silence would be overlooked.
const AWAY: Duration = Duration::from_secs(3);
/// The volume that tells that a node takes copies again.
const PROBE: &str = "drained";
/// Volumes that are created until one has a copy on it: the emptiest nodes are taken, and there may be a few as empty.
const PROBES: usize = 8;
/// `cairn` was refused as things are now.
const REFUSED: i32 = 6;

/// A node is emptied under load, holds nothing then, and can be stopped with nobody noticing. Back and no longer drained it
/// is given copies.
pub(super) fn drain(run: &mut Run) -> Result<(), Failure> {
    with_a_spare(run)?;
    before(run)?;
    let node = holder(run)?;
    let name = node.to_string();
    let said = run.cluster.ask(&["node", "drain", &name, "--yes"]);
    if said.code == Some(REFUSED) && run.cluster.rack(1).is_some() {
        // Its rack may have no second node.
        run.timeline
            .note(format!("{name} can't be drained: {}", said.err.trim()));
        return run.load(Duration::from_secs(1));
    }
    must("node drain", said.is_success(), &said.err)?;
    run.timeline.note(format!("{name} is drained"));
    wait_empty(run, node)?;
    stop_empty(run, node)?;
    run.load(AWAY)?;
    run.start(node)?;
    run.cluster
        .wait_well(WELL_BOUND)
        .map_err(|problems| unhealed(&format!("{name} is back, with nothing"), &problems))?;
    let said = run.cluster.ask(&["node", "undrain", &name]);
    must("node undrain", said.is_success(), &said.err)?;
    let drains = run.cluster.ask(&["status"]).json["drains"].clone();
    must(
        "status after node undrain",
        drains.as_array().is_some_and(Vec::is_empty),
        &drains.to_string(),
    )?;
    takes_copies(run, node)
}

fn must(what: &str, is_so: bool, words: &str) -> Result<(), Failure> {
    if is_so {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Operation,
        format!("{what}: {}", words.trim()),
    ))
}

/// Waits, under load, until the status says that it holds nothing; meanwhile no volume lacks a copy.
fn wait_empty(run: &mut Run, node: Part) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        run.load(Duration::from_millis(300))?;
        let status = run.cluster.ask(&["status"]).json;
        let drains = status["drains"].as_array().into_iter().flatten();
        let of_node = drains.into_iter().find(|drain| drain["node"] == node.to_string());
        match of_node.map(|drain| (drain["state"].as_str(), drain["copies_left"].as_u64())) {
            Some((Some("empty"), Some(0))) => break,
            // Whoever leads may be asked a moment before it knows.
            _ if begun.elapsed() < EMPTY_BOUND => {}
            state => {
                let words = format!("{node} is not empty {EMPTY_BOUND:?} after it was drained: {state:?}, {status}");
                return Err(Failure::new(FailureKind::Unhealed, words));
            }
        }
    }
    if run.cluster.holders().contains(&node) {
        let words = format!("{node} is said to be empty, and to hold copies");
        return Err(Failure::new(FailureKind::Operation, words));
    }
    run.timeline.note(format!(
        "{node} holds nothing after {:.1} s",
        begun.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Stops it when its device holds nothing any more. It drops what it held as it is told to, with a heartbeat, and can't be
/// looked into while it runs.
fn stop_empty(run: &mut Run, node: Part) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        run.load(HEARTBEATS)?;
        run.stop(node)?;
        let held = held(run, node)?;
        if held == 0 {
            return Ok(());
        }
        if begun.elapsed() > DROP_BOUND {
            let words = format!(
                "{node} is said to hold nothing, and {held} replicas are still on its device after {DROP_BOUND:?}"
            );
            return Err(Failure::new(FailureKind::Operation, words));
        }
        run.timeline.note(format!("{held} replicas are on its device still"));
        run.start(node)?;
    }
}

/// Replicas on the device of a node that does not run, as the device itself says.
fn held(run: &Run, node: Part) -> Result<usize, Failure> {
    let Part::Node(k) = node else {
        unreachable!("nodes are nodes")
    };
    let device = run.cluster.device(k).display().to_string();
    let said = run.cluster.ask(&["node", "inspect", &device]);
    must("node inspect", said.is_success(), &said.err)?;
    let replicas = said.json["replicas"].as_array().map(Vec::len);
    replicas.ok_or_else(|| Failure::new(FailureKind::Operation, format!("no replicas are told: {}", said.json)))
}

/// New volumes have copies on it.
fn takes_copies(run: &mut Run, node: Part) -> Result<(), Failure> {
    let mut made = Vec::new();
    while made.len() < PROBES && !run.cluster.holders().contains(&node) {
        let name = format!("{PROBE}-{}", made.len());
        run.cluster.create_volume(&name, "16M")?;
        made.push(name);
        run.load(Duration::from_millis(200))?;
    }
    let takes = run.cluster.holders().contains(&node);
    for name in &made {
        let said = run.cluster.ask(&["volume", "delete", name, "--yes"]);
        must("volume delete", said.is_success(), &said.err)?;
    }
    if takes {
        run.timeline
            .note(format!("{node} is given copies again, with new volume {}", made.len()));
        return Ok(());
    }
    let words = format!("{node} is drained no longer, and none of {PROBES} new volumes has a copy on it");
    Err(Failure::new(FailureKind::Operation, words))
}
