//! Faults of devices that do harm which stays: errors, rot, writes that go astray, devices that are wiped, swapped, or older than
//! they were.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::live::cluster::Part;
use crate::live::inject::shim::{Effect, Kind, Rule, Shim, When};
use crate::live::report::{Failure, FailureKind};
use crate::live::run::{Run, WELL_BOUND};
use crate::live::steps::{Fault, PAUSE_MAX, WAITS, before, fault, shuffle};

/// Those that do harm.
pub const FAULTS: &[Fault] = &[
    fault("read-error", "read-error", Some(PAUSE_MAX), |run| {
        fail_for_a_while(run, Kind::Read, Effect::Eio)
    }),
    fault("write-error", "write-error", Some(PAUSE_MAX), |run| {
        fail_for_a_while(run, Kind::Write, Effect::Eio)
    }),
    fault("flush-error", "write-error", Some(PAUSE_MAX), |run| {
        fail_for_a_while(run, Kind::Flush, Effect::Eio)
    }),
    fault("device-full", "full", Some(PAUSE_MAX), |run| {
        fail_for_a_while(run, Kind::Write, Effect::Enospc)
    }),
    fault("bit-rot", "bit-rot", Some(PAUSE_MAX), |run| {
        spoil(run, Kind::Read, Effect::Rot)
    }),
    fault("lost-write", "misdirected", Some(PAUSE_MAX), |run| {
        spoil(run, Kind::Write, Effect::Lose)
    }),
    fault("misdirected-write", "misdirected", Some(PAUSE_MAX), |run| {
        spoil(run, Kind::Write, Effect::Misdirect)
    }),
    fault("stale-sector", "stale-sector", Some(PAUSE_MAX), |run| {
        spoil(run, Kind::Write, Effect::Stale)
    }),
    fault("lost-flush", "misdirected", Some(PAUSE_MAX), lost_flush),
    fault("device-rolled-back", "wiped", Some(PAUSE_MAX), rolled_back),
    fault("device-wiped", "wiped", Some(PAUSE_MAX), wiped),
    fault("devices-swapped", "wiped", WAITS, swapped),
    fault("device-replaced", "replaced", Some(PAUSE_MAX), replaced),
];

/// How long a device does harm.
const SPAN: Duration = Duration::from_secs(4);
/// How long a problem of a device may be there before operators do what it says.
const PATIENCE: Duration = Duration::from_secs(25);
/// How long a node must run before it is believed that it can.
const SETTLED: Duration = Duration::from_secs(4);
/// How long they wait for the end of it.
const MENDED_BOUND: Duration = Duration::from_secs(90);

fn setup(words: impl ToString) -> Failure {
    Failure::new(FailureKind::Setup, words.to_string())
}

fn any_device(run: &mut Run) -> (u8, Part) {
    let nodes: Vec<u8> = run.shims.keys().copied().collect();
    let k = *run.rng.pick(&nodes);
    (k, Part::Node(k))
}

fn shim(run: &Run, k: u8) -> &Shim {
    &run.shims[&k]
}

/// Each I/O of a kind fails. The node may give its device up, and end if it has no other; then somebody starts it again.
fn fail_for_a_while(run: &mut Run, kind: Kind, effect: Effect) -> Result<(), Failure> {
    before(run)?;
    let (k, node) = any_device(run);
    run.timeline
        .note(format!("the device of {node}: each {kind:?} is {effect:?}"));
    run.may_end(node);
    shim(run, k).add(Rule::always(Some(kind), effect)).map_err(setup)?;
    run.load(SPAN)?;
    run.heal()?;
    run.load(SPAN / 2)?;
    mend(run, k)
}

/// Now and then something of what is read or written is not what it should be, unnoticed by the device. Then the node is started
/// again, so that it reads all that it builds upon.
fn spoil(run: &mut Run, kind: Kind, effect: Effect) -> Result<(), Failure> {
    before(run)?;
    let (k, node) = any_device(run);
    let one_in = run.rng.within(4, 40);
    run.timeline
        .note(format!("the device of {node}: one {kind:?} in {one_in} is {effect:?}"));
    run.may_end(node);
    let rule = Rule {
        when: When::OneIn(one_in),
        ..Rule::always(Some(kind), effect)
    };
    shim(run, k).add(rule).map_err(setup)?;
    run.load(SPAN)?;
    run.heal()?;
    run.kill(&[node]);
    run.start(node)?;
    mend(run, k)
}

/// A device says that it has flushed and has not; then its power fails.
fn lost_flush(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let (k, node) = any_device(run);
    run.timeline.note(format!("the device of {node} flushes nothing"));
    run.may_end(node);
    shim(run, k)
        .add(Rule::always(Some(Kind::Flush), Effect::Lose))
        .map_err(setup)?;
    run.load(SPAN)?;
    super::disk::cut(run, &[node], None)?;
    run.heal()?;
    run.start(node)?;
    mend(run, k)
}

/// The file that is the device of a node without its shim.
fn backing(run: &Run, k: u8) -> PathBuf {
    run.cluster.dir().join(format!("node-{k}.img"))
}

/// A device comes back as it was some time ago, as after somebody has restored a backup of it.
fn rolled_back(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let (k, node) = any_device(run);
    run.kill(&[node]);
    shim(run, k).settle().map_err(setup)?;
    let (now, then) = (backing(run, k), run.cluster.dir().join(format!("node-{k}.old")));
    let copied = Command::new("cp").arg("--sparse=always").arg(&now).arg(&then).status();
    if !copied.as_ref().is_ok_and(std::process::ExitStatus::success) {
        return Err(setup(format!("{} can't be copied: {copied:?}", now.display())));
    }
    run.start(node)?;
    run.load(SPAN)?;
    run.timeline
        .note(format!("the device of {node} is as it was a while ago"));
    run.kill(&[node]);
    run.may_end(node);
    shim(run, k).settle().map_err(setup)?;
    // The same file with the old content, so that whatever comes later finds it where it was.
    std::fs::rename(&then, &now).map_err(setup)?;
    shim(run, k).swap(&now).map_err(setup)?;
    run.start(node)?;
    run.load(SPAN)?;
    mend(run, k)
}

/// A node comes back with an empty device.
fn wiped(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let (k, node) = any_device(run);
    run.kill(&[node]);
    wipe(run, k)?;
    run.start(node)?;
    filled(run)
}

/// What an empty device lacks is copied to it once the one that it takes the place of counts as lost. Until then whoever takes away
/// the next device takes the second of three copies.
fn filled(run: &mut Run) -> Result<(), Failure> {
    run.load(run.rebuild_after() + SPAN)?;
    let end = Instant::now() + WELL_BOUND;
    loop {
        let problems = run.cluster.problems();
        if problems.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            let words = format!("an empty device is not filled: {}", problems.join("; "));
            return Err(Failure::new(FailureKind::Unhealed, words));
        }
        run.load(Duration::from_millis(500))?;
    }
}

fn wipe(run: &mut Run, k: u8) -> Result<(), Failure> {
    run.timeline.note(format!("the device of node-{k} is empty"));
    shim(run, k).wipe().map_err(setup)
}

/// Two nodes get each other's device. The cluster says no, or serves what is there; then they are swapped back.
fn swapped(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut nodes: Vec<u8> = run.shims.keys().copied().collect();
    for i in (1..nodes.len()).rev() {
        let j = run.rng.below(i as u64 + 1) as usize;
        nodes.swap(i, j);
    }
    let (one, two) = (nodes[0], nodes[1]);
    let mut parts = [Part::Node(one), Part::Node(two)];
    for back in [false, true] {
        run.kill(&parts);
        for k in [one, two] {
            shim(run, k).settle().map_err(setup)?;
        }
        let (first, second) = if back { (one, two) } else { (two, one) };
        let (first, second) = (backing(run, first), backing(run, second));
        shim(run, one).swap(&first).map_err(setup)?;
        shim(run, two).swap(&second).map_err(setup)?;
        run.timeline.note(format!(
            "node-{one} and node-{two} have {} device",
            if back { "their own" } else { "each other's" }
        ));
        parts.iter().for_each(|part| run.may_end(*part));
        shuffle(run, &mut parts);
        run.start_all(&parts)?;
        run.load(SPAN)?;
    }
    for k in [one, two] {
        mend(run, k)?;
    }
    Ok(())
}

/// An operator puts an empty device into a node, while all is well.
fn replaced(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let (k, node) = any_device(run);
    run.stop(node)?;
    wipe(run, k)?;
    run.start(node)?;
    filled(run)
}

/// What operators do about a device: first they have it verified and started again, and if the cluster goes on saying that it
/// can't be used, they put an empty one in its place.
fn mend(run: &mut Run, k: u8) -> Result<(), Failure> {
    let node = Part::Node(k);
    let begun = Instant::now();
    let (mut restarts, mut is_verified, mut started) = (0, false, begun);
    loop {
        run.load(Duration::from_millis(500))?;
        if !run.cluster.is_running(node) {
            if restarts == 2 || begun.elapsed() > PATIENCE {
                let words = run.log_end(node).pop().unwrap_or_default();
                run.timeline
                    .note(format!("{node} does not run with its device: {words}"));
                return renew(run, k);
            }
            restarts += 1;
            started = Instant::now();
            run.start(node)?;
            continue;
        }
        let problems = run.cluster.problems();
        let of_device: Vec<&String> = problems
            .iter()
            .filter(|words| words.starts_with("device-") || words.starts_with("volumes-damaged"))
            .collect();
        // What has just been started may end in a moment, and the status does not know yet.
        let is_settled = begun.elapsed() >= SETTLED && started.elapsed() >= SETTLED;
        if is_settled && (problems.is_empty() || (of_device.is_empty() && begun.elapsed() > PATIENCE)) {
            run.never_ends(node);
            return Ok(());
        }
        let is_failed = of_device.iter().any(|words| words.starts_with("device-failed"));
        if is_failed && restarts == 0 {
            run.timeline.note(of_device[0]);
            restarts += 1;
            started = Instant::now();
            run.kill(&[node]);
            run.start(node)?;
        } else if !is_verified && !of_device.is_empty() {
            is_verified = true;
            run.timeline.note(of_device[0]);
            let said = run.cluster.ask(&["node", "scrub", &node.to_string()]);
            if !said.is_success() {
                run.timeline
                    .note(format!("it can't be verified now: {}", said.err.trim()));
            }
        } else if !of_device.is_empty() && begun.elapsed() > PATIENCE {
            run.timeline.note(format!("it stays: {}", of_device[0]));
            return renew(run, k);
        }
        if begun.elapsed() > MENDED_BOUND {
            let words = format!("{node} is not mended after {MENDED_BOUND:?}: {}", problems.join("; "));
            return Err(Failure::new(FailureKind::Unhealed, words));
        }
    }
}

/// An empty device for a node.
fn renew(run: &mut Run, k: u8) -> Result<(), Failure> {
    let node = Part::Node(k);
    run.kill(&[node]);
    run.never_ends(node);
    wipe(run, k)?;
    run.start(node)?;
    filled(run)
}
