//! Memory is bounded: what every process has, fresh and after much I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use cairn_chaos::live::dev::Dev;
use cairn_chaos::live::fio::{self, Target};
use cairn_chaos::live::process::{self, Resident};
use cairn_chaos::live::tools;

use crate::support::{heavy, start};

const BOUND: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// A fresh node has less.
const FRESH_NODE_BYTES_MAX: u64 = 64 * MIB;
/// No process ever has more, whatever is asked of it: a connection's requests in flight, and caches.
const BUSY_BYTES_MAX: u64 = 256 * MIB;

fn residents(dev: &Dev, when: &str) -> BTreeMap<String, Resident> {
    let pids = dev.pids().into_iter();
    let residents: BTreeMap<String, Resident> = pids
        .map(|(part, pid)| (part, process::resident(pid).expect("it runs")))
        .collect();
    for (part, resident) in &residents {
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        eprintln!(
            "{when}: {part:<8} {:6.1} MiB resident, {:6.1} at the most",
            mib(resident.now),
            mib(resident.peak)
        );
    }
    residents
}

#[test]
fn memory_stays_bounded_under_long_io() {
    let _turn = heavy();
    let dev = start(&["demo:512M"]);
    for (part, resident) in residents(&dev, "fresh") {
        if part.starts_with("node-") {
            assert!(resident.peak < FRESH_NODE_BYTES_MAX, "a fresh {part} has {resident:?}");
        }
    }
    if !tools::available(&[("fio", "fio")]) {
        return;
    }
    let target = Target::Nbd(dev.uri("demo"));
    let loads: [&[&str]; 3] = [
        &["--rw=randrw", "--bs=4k", "--iodepth=128", "--runtime=8"],
        &["--rw=write", "--bs=8M", "--iodepth=32", "--runtime=8"],
        &["--rw=randread", "--bs=1M", "--iodepth=64", "--runtime=6"],
    ];
    for load in loads {
        let args = [load, &["--size=512M", "--time_based"]].concat();
        fio::run("memory", &target, &args, BOUND).unwrap_or_else(|error| panic!("{error}"));
        for (part, resident) in residents(&dev, load[0]) {
            assert!(resident.peak < BUSY_BYTES_MAX, "{part} after {load:?}: {resident:?}");
        }
    }
}
