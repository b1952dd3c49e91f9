//! Faults of devices.

use std::time::Duration;

use crate::live::cluster::Part;
use crate::live::inject::shim::{CutBy, Effect, Rule};
use crate::live::process;
use crate::live::report::{Failure, FailureKind};
use crate::live::run::Run;
use crate::live::steps::{Fault, PAUSE_MAX, WAITS, before, fault, shuffle, start_as_it_comes};

/// Those of devices.
pub const FAULTS: &[Fault] = &[
    fault("power-cut", "power-cut", WAITS, power_cut),
    fault("power-cut-lose-all", "power-cut", WAITS, power_cut_lose_all),
    fault("power-cut-node", "power-cut", WAITS, power_cut_node),
    fault("power-cut-meta", "power-cut", Some(PAUSE_MAX), power_cut_meta),
    fault("slow-disk", "slow-disk", Some(PAUSE_MAX), slow_disk),
    fault("stuck-disk", "stuck-disk", Some(PAUSE_MAX), stuck_disk),
];

/// The power of everything fails at a random moment under load, and comes back; everything starts in random order.
pub fn power_cut(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut all = run.cluster.running();
    cut(run, &all, None)?;
    shuffle(run, &mut all);
    start_as_it_comes(run, all)
}

/// The same, and all that was not flushed is lost: the worst that devices may do.
fn power_cut_lose_all(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut all = run.cluster.running();
    cut(run, &all, Some(CutBy::LoseAll))?;
    shuffle(run, &mut all);
    start_as_it_comes(run, all)
}

/// The power of one node fails.
fn power_cut_node(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let node = *run.rng.pick(&nodes);
    cut(run, &[node], None)?;
    run.start(node)
}

/// The power of one metadata server fails, or of all of them.
fn power_cut_meta(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut metas: Vec<Part> = run.cluster.metas().collect();
    shuffle(run, &mut metas);
    let count = if run.rng.permille(500) { 1 } else { metas.len() };
    cut(run, &metas[..count], None)?;
    run.start_all(&metas[..count])
}

/// Everything on the device of one node takes long.
fn slow_disk(run: &mut Run) -> Result<(), Failure> {
    let delay = Effect::Delay {
        fixed: Duration::from_millis(20),
        jitter: Duration::from_millis(60),
    };
    harm_one(run, delay, Duration::from_secs(5))
}

/// The device of one node answers nothing for a while.
fn stuck_disk(run: &mut Run) -> Result<(), Failure> {
    harm_one(run, Effect::Stick, Duration::from_secs(4))
}

fn harm_one(run: &mut Run, effect: Effect, span: Duration) -> Result<(), Failure> {
    before(run)?;
    let nodes: Vec<u8> = run.shims.keys().copied().collect();
    let node = *run.rng.pick(&nodes);
    let rule = Rule::always(None, effect);
    run.timeline.note(format!("the device of node-{node}: {effect:?}"));
    run.shims[&node]
        .add(rule)
        .map_err(|words| Failure::new(FailureKind::Setup, words))?;
    run.load(span)?;
    run.heal()
}

/// These lose power. Either the processes go first, or their devices do while they can't notice: then what they have under
/// way on their devices is lost in the middle.
pub(super) fn cut(run: &mut Run, parts: &[Part], by: Option<CutBy>) -> Result<(), Failure> {
    let devices_first = run.rng.permille(500);
    if devices_first {
        parts.iter().for_each(|part| process::freeze(run.cluster.pid(*part)));
    } else {
        run.kill(parts);
    }
    let (mut kept, mut lost) = (0, 0);
    for part in parts {
        let seed = run.rng.word();
        let by = by.unwrap_or(CutBy::Seed(seed));
        let cut = match part {
            Part::Node(k) => run.shims.get(k).map(|shim| shim.power_cut(by)),
            Part::Meta(k) => run.meta_disks.get(k).map(|disk| disk.power_cut(by)),
            Part::Export(_) => None,
        };
        let Some(cut) = cut else { continue };
        let cut = cut
            .map_err(|error| Failure::new(FailureKind::Setup, format!("the power of {part} can't be cut: {error}")))?;
        kept += cut.kept;
        lost += cut.lost;
    }
    if devices_first {
        run.kill(parts);
    }
    for part in parts {
        match part {
            Part::Node(k) => {
                if let Some(shim) = run.shims.get(k) {
                    shim.power_on();
                }
            }
            Part::Meta(k) => {
                if let Some(disk) = run.meta_disks.get_mut(k) {
                    disk.restore()
                        .map_err(|words| Failure::new(FailureKind::Setup, words))?;
                }
            }
            Part::Export(_) => {}
        }
    }
    run.timeline.note(format!(
        "power was cut, {}: of the sectors not flushed {kept} have what was written last and {lost} do not",
        if devices_first {
            "of devices first"
        } else {
            "of processes first"
        }
    ));
    Ok(())
}
