//! What operators and their machines do to a cluster that is in use: nodes come and go for good, volumes move and grow, programs are
//! upgraded, configurations are wrong.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::live::cluster::Part;
use crate::live::inject::proxy;
use crate::live::inject::shim::{Effect, Rule};
use crate::live::process::Guarded;
use crate::live::report::{Failure, FailureKind};
use crate::live::run::{Run, WELL_BOUND};
use crate::live::steps::{Fault, PAUSE_MAX, WAITS, before, fault};
use crate::live::tools;
use crate::live::wait::wait_until;
use crate::live::zombie;

/// Those of operators.
pub const FAULTS: &[Fault] = &[
    fault("add-node", "add-node", Some(PAUSE_MAX), add_node),
    fault("node-gone", "node-gone", Some(PAUSE_MAX), node_gone),
    fault("node-back", "node-back", Some(PAUSE_MAX), node_back),
    fault("node-lost", "node-lost", Some(PAUSE_MAX), node_lost),
    fault("rack-gone", "domain-gone", Some(PAUSE_MAX), rack_gone).with_racks(),
    fault("drain-node", "drain", Some(PAUSE_MAX), super::drain::drain),
    fault("grey-node", "grey-node", Some(PAUSE_MAX), grey_node),
    fault("upgrade", "upgrade", WAITS, upgrade),
    fault("grow", "grow", Some(PAUSE_MAX), grow),
    fault("migrate", "hand-over", Some(PAUSE_MAX), migrate),
    fault("reattach", "release", Some(PAUSE_MAX), reattach),
    fault("take-over", "take-over", Some(PAUSE_MAX), zombie::take_over),
    fault("kill-export-again", "death-in-write", WAITS, kill_export_again),
    fault("fio-verify", "kill-node", Some(PAUSE_MAX), fio_verify),
    fault("config-error", "config-error", Some(PAUSE_MAX), config_error),
];

/// Nodes that a run may have at the most: more would only cost memory.
const NODES_MAX: u8 = 6;
/// The export that volumes move to; no other guest uses it.
const TARGET: u8 = 60;
/// The export and the volume of fio.
const FIO: u8 = 59;
const FIO_VOLUME: &str = "fio";

/// A node more, under load.
fn add_node(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let nodes = run.cluster.nodes().count();
    if nodes >= usize::from(NODES_MAX) {
        run.timeline.note(format!("there are {nodes} nodes: no further one"));
        return run.load(Duration::from_secs(1));
    }
    let node = run.add_node()?;
    run.start(node)?;
    run.load(Duration::from_secs(3))
}

/// A node that holds copies is away for longer than guests like, and for less than it takes until its copies are made anew, again and again.
fn node_gone(run: &mut Run) -> Result<(), Failure> {
    for _ in 0..3 {
        before(run)?;
        let node = holder(run)?;
        run.kill(&[node]);
        let away = run.rng.span(run.rebuild_after() / 4, run.rebuild_after() * 3 / 4);
        run.load(away)?;
        run.start(node)?;
        run.load(Duration::from_secs(1))?;
    }
    Ok(())
}

/// A node is away for so long that what it had is made anew on another one. Long after that it comes back.
fn node_back(run: &mut Run) -> Result<(), Failure> {
    let node = gone_until_rebuilt(run)?;
    run.start(node)?;
    run.load(Duration::from_secs(3))
}

/// A node is gone for good. Its successor has its name and an empty device.
fn node_lost(run: &mut Run) -> Result<(), Failure> {
    let node = gone_until_rebuilt(run)?;
    if let Part::Node(k) = node
        && let Some(shim) = run.shims.get(&k)
    {
        shim.wipe()
            .map_err(|error| Failure::new(FailureKind::Setup, error.to_string()))?;
        run.timeline.note(format!("{node} is new, with an empty device"));
    }
    run.start(node)?;
    run.load(Duration::from_secs(3))
}

/// A node that holds copies.
pub(super) fn holder(run: &mut Run) -> Result<Part, Failure> {
    let holders = run.cluster.holders();
    if holders.is_empty() {
        return Err(Failure::new(
            FailureKind::Operation,
            "no node holds copies, says the cluster",
        ));
    }
    Ok(*run.rng.pick(&holders))
}

/// Sees to it that there is a node more than a volume has copies.
pub(super) fn with_a_spare(run: &mut Run) -> Result<(), Failure> {
    if run.cluster.nodes().count() >= 4 {
        return Ok(());
    }
    add_node(run)?;
    let well = run.cluster.wait_well(WELL_BOUND);
    well.map(drop)
        .map_err(|problems| unhealed("with a node more", &problems))
}

/// Kills a node that holds copies, and waits until all volumes are whole without it.
fn gone_until_rebuilt(run: &mut Run) -> Result<Part, Failure> {
    with_a_spare(run)?;
    before(run)?;
    let node = holder(run)?;
    run.kill(&[node]);
    whole_without(run, &[node])?;
    Ok(node)
}

/// Waits until all volumes are whole although these are gone.
fn whole_without(run: &mut Run, gone: &[Part]) -> Result<(), Failure> {
    let names = gone.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let begun = std::time::Instant::now();
    // That a node is silent remains, of course.
    let of_volumes = |words: &String| !words.starts_with("node-silent") && !words.contains("devices are alive");
    let left = |run: &Run| -> Vec<String> { run.cluster.problems().into_iter().filter(of_volumes).collect() };
    run.load(run.rebuild_after())?;
    while !left(run).is_empty() {
        run.load(Duration::from_millis(500))?;
        if begun.elapsed() > WELL_BOUND + run.rebuild_after() {
            return Err(unhealed(&format!("{names} gone for good"), &left(run)));
        }
    }
    let holders = run.cluster.holders();
    run.timeline.note(format!(
        "without {names} all volumes are whole again after {:.1} s, and copies are on {}",
        begun.elapsed().as_secs_f64(),
        holders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    ));
    if let Some(node) = gone.iter().find(|node| holders.contains(node)) {
        return Err(unhealed(&names, &[format!("{node} is said to hold copies")]));
    }
    run.load(Duration::from_secs(2))
}

/// A whole rack loses its power, for longer than it takes until copies are made anew where that is possible. Then it comes back.
fn rack_gone(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let rack_of = |run: &Run, node: &Part| match node {
        Part::Node(k) => run.cluster.rack(*k).map(str::to_string),
        _ => None,
    };
    let one = holder(run)?;
    let rack = rack_of(run, &one);
    let gone: Vec<Part> = nodes
        .iter()
        .copied()
        .filter(|node| rack_of(run, node) == rack)
        .collect();
    let mut racks: Vec<_> = nodes.iter().filter_map(|node| rack_of(run, node)).collect();
    racks.sort_unstable();
    racks.dedup();
    run.timeline.note(format!(
        "the power of {} fails",
        rack.unwrap_or_else(|| one.to_string())
    ));
    super::disk::cut(run, &gone, None)?;
    if racks.len() > 3 {
        whole_without(run, &gone)?;
    } else {
        // There is nowhere else to go: two copies are left, and they do.
        let span = run.rebuild_after() + Duration::from_secs(5);
        run.load(span)?;
    }
    run.start_all(&gone)?;
    run.load(Duration::from_secs(2))
}

pub(super) fn unhealed(when: &str, problems: &[String]) -> Failure {
    let words = format!("{when}, and there is still: {}", problems.join("; "));
    Failure::new(FailureKind::Unhealed, words)
}

/// Disk and network of a node are slow at the same time.
fn grey_node(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let node = *run.rng.pick(&nodes);
    let (fixed, jitter) = (Duration::from_millis(30), Duration::from_millis(120));
    run.timeline.note(format!(
        "disk and network of {node} are slow: {fixed:?} and up to {jitter:?} more"
    ));
    if let Part::Node(k) = node
        && let Some(shim) = run.shims.get(&k)
    {
        shim.add(Rule::always(None, Effect::Delay { fixed, jitter }))
            .map_err(|words| Failure::new(FailureKind::Setup, words))?;
    }
    if let Some(proxy) = run.proxies.get(&node) {
        proxy
            .set(proxy::Fault::Delay { fixed, jitter })
            .map_err(|error| Failure::new(FailureKind::Setup, error.to_string()))?;
    }
    run.load(Duration::from_secs(8))?;
    run.heal()
}

/// One process after another ends in order and starts again, as with a new version; the next one's turn comes when all is well.
fn upgrade(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let mut parts = run.cluster.servers();
    parts.extend(run.exports());
    for part in parts {
        run.stop(part)?;
        let pause = run.rng.span(Duration::from_millis(10), Duration::from_millis(500));
        run.load(pause)?;
        run.start(part)?;
        run.cluster
            .wait_well(WELL_BOUND)
            .map_err(|problems| unhealed(&format!("{part} was upgraded"), &problems))?;
        run.load(Duration::from_millis(300))?;
    }
    Ok(())
}

/// A volume grows while it is written.
fn grow(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let said = run.cluster.ask(&["volume", "show", "b"]);
    let Some(bytes) = said.json["size_bytes"].as_u64() else {
        return Err(Failure::new(FailureKind::Operation, format!("no volume b: {said:?}")));
    };
    let wanted = (bytes + (32 << 20)).to_string();
    let said = run.cluster.ask(&["volume", "grow", "b", &wanted]);
    if !said.is_success() {
        let words = format!("volume b can't grow to {wanted}: {}", said.err.trim());
        return Err(Failure::new(FailureKind::Operation, words));
    }
    run.timeline.note(format!("volume b has grown to {wanted} bytes"));
    run.load(Duration::from_secs(2))
}

/// Volumes move to another export and back: guests let end what is under way, and go on at the other one.
fn migrate(run: &mut Run) -> Result<(), Failure> {
    let exports = run.exports();
    let Part::Export(home) = *run.rng.pick(&exports) else {
        unreachable!("exports are exports")
    };
    run.cluster.start(Part::Export(TARGET))?;
    let socket = run.cluster.socket(TARGET);
    let listens = wait_until(WELL_BOUND, || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    if !listens {
        return Err(Failure::new(
            FailureKind::Unhealed,
            "the export to migrate to does not listen",
        ));
    }
    for (from, to) in [(home, TARGET), (TARGET, home)] {
        before(run)?;
        run.timeline
            .note(format!("the guests of export-{from} move to export-{to}"));
        run.move_guests(home, to)?;
        run.load(Duration::from_secs(1))?;
    }
    run.stop(Part::Export(TARGET))
}

/// All guests of an export let go of their volumes, and come back at once.
fn reattach(run: &mut Run) -> Result<(), Failure> {
    let exports = run.exports();
    for export in exports {
        let Part::Export(k) = export else { continue };
        before(run)?;
        run.timeline.note(format!("the guests of {export} begin anew"));
        run.move_guests(k, k)?;
    }
    run.load(Duration::from_secs(1))
}

/// An export is killed at random moments, again and again, each time with requests under way.
fn kill_export_again(run: &mut Run) -> Result<(), Failure> {
    let exports = run.exports();
    let export = *run.rng.pick(&exports);
    for _ in 0..4 {
        before(run)?;
        run.kill(&[export]);
        run.start(export)?;
        run.wait_answers()?;
    }
    Ok(())
}

/// fio writes a volume of its own and verifies it, while a node is killed and comes back.
fn fio_verify(run: &mut Run) -> Result<(), Failure> {
    let Some(fio) = tools::find("fio") else {
        run.timeline
            .note("fio is not there (package fio): nothing was verified");
        return run.load(Duration::from_secs(1));
    };
    let export = Part::Export(FIO);
    if !run.cluster.is_running(export) {
        run.cluster.start(export)?;
    }
    let socket = run.cluster.socket(FIO);
    if !wait_until(WELL_BOUND, || std::os::unix::net::UnixStream::connect(&socket).is_ok()) {
        return Err(Failure::new(
            FailureKind::Unhealed,
            "the export for fio does not listen",
        ));
    }
    let listed = run.cluster.ask(&["volume", "show", FIO_VOLUME]);
    if !listed.is_success() {
        run.cluster.create_volume(FIO_VOLUME, "64M")?;
    }
    let log = std::fs::File::create(run.cluster.dir().join("log/fio.log"))
        .map_err(|error| Failure::new(FailureKind::Setup, error.to_string()))?;
    let uri = format!("nbd+unix:///{FIO_VOLUME}?socket={}", socket.display());
    let mut command = Command::new(fio);
    command.args([
        "--name=verify",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--iodepth=8",
    ]);
    command.args([
        "--blockalign=512",
        "--size=64m",
        "--io_size=48m",
        "--verify=crc32c",
        "--verify_fatal=1",
    ]);
    // A thread, not a process: that would outlive fio when it is killed. A limit of operations would count the smallest of them.
    command.args([
        "--do_verify=1",
        "--fsync=32",
        "--rate=4m",
        "--thread",
        "--verify_state_save=0",
    ]);
    command
        .arg(format!("--randseed={}", run.rng.word() >> 1))
        .arg(format!("--uri={uri}"));
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .stdout(log);
    let child = command.current_dir(run.cluster.dir()).spawn();
    let mut child = Guarded::new(child.map_err(|error| Failure::new(FailureKind::Setup, error.to_string()))?);
    let begun = std::time::Instant::now();
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let status = loop {
        before(run)?;
        if let Ok(Some(status)) = child.child().try_wait() {
            break status;
        }
        if begun.elapsed() > WELL_BOUND {
            return Err(Failure::new(FailureKind::Stall, "fio does not come to its end"));
        }
        let node = *run.rng.pick(&nodes);
        run.kill(&[node]);
        run.load(Duration::from_millis(700))?;
        run.start(node)?;
        run.load(Duration::from_secs(2))?;
    };
    run.stop(export)?;
    run.timeline.note(format!(
        "fio has ended after {:.1} s, {status}",
        begun.elapsed().as_secs_f64()
    ));
    if !status.success() {
        let text = std::fs::read_to_string(run.cluster.dir().join("log/fio.log")).unwrap_or_default();
        return Err(Failure {
            story: text.lines().map(str::to_string).collect(),
            ..Failure::new(FailureKind::Data, format!("fio has found something wrong, {status}"))
        });
    }
    Ok(())
}

/// Processes that are started wrongly are refused, and nobody else notices.
fn config_error(run: &mut Run) -> Result<(), Failure> {
    before(run)?;
    let dir = run.cluster.dir().to_path_buf();
    let of_dir = |name: &str| dir.join(name).display().to_string();
    let (wrong_key, empty) = (of_dir("wrong.key"), of_dir("wrong.img"));
    std::fs::write(&wrong_key, "a5".repeat(32)).map_err(|error| Failure::new(FailureKind::Setup, error.to_string()))?;
    let nodes: Vec<Part> = run.cluster.nodes().collect();
    let (Part::Node(one), node) = (nodes[0], nodes[0]) else {
        unreachable!("nodes are nodes")
    };
    let device = run.cluster.device(one).display().to_string();
    let (address, key) = (run.cluster.address(node), of_dir("cluster.key"));
    let (host, _) = address.split_once(':').unwrap_or_default();
    let elsewhere = format!("{host}:0");
    let node_args = |listen: &str, device: &str, key: &str| -> Vec<String> {
        let args = [
            "node",
            "--name",
            "wrong",
            "--listen",
            listen,
            "--device",
            device,
            "--cluster-key",
            key,
        ];
        args.iter().map(ToString::to_string).collect()
    };
    let mut tries = vec![
        (
            "a device that another node serves",
            node_args(&elsewhere, &device, &key),
        ),
        (
            "a device that does not exist",
            node_args(&elsewhere, &of_dir("none.img"), &key),
        ),
        ("an address that is taken", {
            let mut args = node_args(&address, &empty, &key);
            args.extend(["--device-size".to_string(), "64M".to_string()]);
            args
        }),
        (
            "a key that does not exist",
            node_args(&elsewhere, &empty, &of_dir("none.key")),
        ),
    ];
    tries.push((
        "a directory that another metadata server has",
        [
            "meta",
            "--id",
            "1",
            "--listen",
            &elsewhere,
            "--dir",
            &run.cluster.meta_dir(1).display().to_string(),
            "--cluster-key",
            &key,
            "--member",
            &format!("1={elsewhere}"),
        ]
        .iter()
        .map(ToString::to_string)
        .collect(),
    ));
    for (what, args) in tries {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = run.cluster.ask(&args);
        let words = said.err.lines().last().unwrap_or_default();
        run.timeline.note(format!("{what}: exit code {:?}, {words}", said.code));
        // A panic has 101, a signal none; and a process that goes on was ended by the bound.
        if !matches!(said.code, Some(1..=20)) || said.err.trim().is_empty() {
            let words = format!("a process with {what} ended with {:?}: {}", said.code, said.err.trim());
            return Err(Failure::new(FailureKind::Operation, words));
        }
        run.watch()?;
    }
    Ok(())
}
