//! What a cluster says of itself, and what its devices hold.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use cairn_chaos::live::dev::Dev;
use cairn_chaos::live::scrape;
use cairn_chaos::live::wait::wait_until;
use serde_json::Value;

use super::nbd::Nbd;
use super::run;
use super::stamped::BLOCK;

/// How long the cluster may take to be whole again.
pub(crate) const WHOLE_BOUND: Duration = Duration::from_secs(90);
/// Blocks of one read of a scan.
const SCAN_BLOCKS: u64 = 256;

/// What a command prints with `--json`; null when it fails.
pub(crate) fn json(dev: &Dev, args: &[&str]) -> Value {
    let ran = run(&mut dev.cairn(&[args, &["--json"]].concat()));
    serde_json::from_str(&ran.out).unwrap_or_default()
}

/// Whether the cluster says of itself that nothing is wrong.
pub(crate) fn is_healthy(dev: &Dev) -> bool {
    run(&mut dev.cairn(&["status", "--check"])).status.success()
}

/// Waits until nothing is wrong.
#[track_caller]
pub(crate) fn wait_healthy(dev: &Dev) {
    let healthy = wait_until(WHOLE_BOUND, || is_healthy(dev));
    assert!(
        healthy,
        "not healthy within {WHOLE_BOUND:?}: {}",
        run(&mut dev.cairn(&["status"])).out
    );
}

/// All that a part has written to its log.
pub(crate) fn log_of(dev: &Dev, part: &str) -> String {
    std::fs::read_to_string(dev.path().join("log").join(format!("{part}.log"))).unwrap_or_default()
}

/// Whether somebody, a caretaker perhaps, holds a volume.
pub(crate) fn is_held(dev: &Dev, volume: &str) -> bool {
    let shown = json(dev, &["volume", "show", volume]);
    assert!(shown["id"].is_u64(), "volume {volume} is not shown: {shown}");
    !shown["holder"].is_null()
}

/// The hosts that have an in-sync copy of every group of a volume, when nobody joins or is stale.
pub(crate) fn settled_hosts(dev: &Dev, volume: &str) -> Option<BTreeSet<String>> {
    let shown = json(dev, &["volume", "show", volume]);
    let groups = shown["group_list"].as_array()?;
    let mut all: Option<BTreeSet<String>> = None;
    for group in groups {
        let is_empty = |role: &str| group[role].as_array().is_some_and(Vec::is_empty);
        let hosts = group["in_sync"].as_array()?.iter();
        let hosts: BTreeSet<String> = hosts
            .filter_map(|copy| Some(copy["host"].as_str()?.to_string()))
            .collect();
        if !is_empty("joining") || !is_empty("stale") || all.as_ref().is_some_and(|all| *all != hosts) {
            return None;
        }
        all = Some(hosts);
    }
    all
}

/// How many events of each kind there are.
pub(crate) fn events(dev: &Dev) -> BTreeMap<String, usize> {
    let listing = json(dev, &["events", "--limit", "1000"]);
    let mut kinds = BTreeMap::new();
    for event in listing["events"].as_array().expect("there are events") {
        *kinds
            .entry(event["kind"].as_str().expect("a kind").to_string())
            .or_default() += 1;
    }
    kinds
}

/// The sum of all values of a metric of a part, as it counts them now; zero when it has counted nothing.
pub(crate) fn metric(dev: &Dev, part: &str, name: &str) -> f64 {
    let text = dev
        .metrics(part)
        .unwrap_or_else(|error| panic!("the metrics of {part}: {error}"));
    scrape::sum(&text, name, "")
}

/// The file of a node's only device.
pub(crate) fn device_file(dev: &Dev, node: &str) -> PathBuf {
    let dir = dev.path().join(node);
    let files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap());
    let large = files.filter(|entry| entry.metadata().unwrap().len() >= 64 << 20);
    large.map(|entry| entry.path()).next().expect("a node has a device")
}

/// Bytes of data that a node's device has of each group of each volume, every block verified. Its node must not run.
pub(crate) fn held_on(dev: &Dev, node: &str) -> BTreeMap<(u64, u64), u64> {
    let device = device_file(dev, node);
    let path = device.to_str().expect("a path of these tests is text");
    let found = json(dev, &["node", "inspect", "--verify", path]);
    assert_eq!(found["state"], "cairn", "{node}: {found}");
    assert_eq!(found["damage_total"], 0, "{node}: {found}");
    let replicas = found["replicas"].as_array().expect("replicas are listed").iter();
    let number = |value: &Value| value.as_u64().expect("a number");
    replicas
        .map(|replica| {
            let key = (number(&replica["volume_id"]), number(&replica["group"]));
            (key, number(&replica["data_bytes"]))
        })
        .collect()
}

/// Panics unless every block of the volume that is not zero lies somewhere on the node's device. Nobody may write meanwhile.
#[track_caller]
pub(crate) fn assert_on_device(dev: &Dev, node: &str, nbd: &mut Nbd, blocks: std::ops::Range<u64>) {
    let mut wanted = BTreeSet::new();
    for block in blocks {
        let content = nbd.read(block * BLOCK, BLOCK as u32);
        if content.iter().any(|byte| *byte != 0) {
            wanted.insert(content);
        }
    }
    assert!(!wanted.is_empty(), "nothing was written");
    let file = std::fs::File::open(device_file(dev, node)).unwrap();
    let length = file.metadata().unwrap().len();
    let mut piece = vec![0; (SCAN_BLOCKS * BLOCK) as usize];
    for start in (0..length).step_by(piece.len()) {
        let count = file.read_at(&mut piece, start).unwrap();
        for content in piece[..count].chunks_exact(BLOCK as usize) {
            wanted.remove(content);
        }
    }
    assert!(
        wanted.is_empty(),
        "{} blocks are not on the device of {node}",
        wanted.len()
    );
}
