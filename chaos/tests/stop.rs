//! A signal ends a run of `chaos live` and everything that it has started.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "this test watches real processes in real time, and a panic is how a test fails"
)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cairn_chaos::live::inject::netns;
use cairn_chaos::live::process::{self, Guarded};
use cairn_chaos::live::tools;
use cairn_chaos::live::wait::wait_until;
use rustix::process::Signal;

/// Much less than a run would last.
const BOUND: Duration = Duration::from_secs(30);
/// What a run that was stopped ends with.
const STOPPED: i32 = 21;

fn live(dir: &Path, args: &[&str]) -> Guarded {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chaos"));
    command.args([
        "live",
        "--program",
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand-in/never-well"),
    ]);
    command.arg("--dir").arg(dir).args(args);
    Guarded::new(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

/// Mounts below a directory.
fn mounts(dir: &Path) -> usize {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let below = format!(" {}/", dir.display());
    mounts.lines().filter(|line| line.contains(&below)).count()
}

fn namespaces(pid: i32) -> usize {
    let output = Command::new("ip").args(["netns", "list"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .filter(|line| line.starts_with(&format!("cz{pid}")))
        .count()
}

/// Stops a run in which `is_up`; nothing is left of it.
fn stops(signal: Signal, args: &[&str], is_up: impl Fn(&Path, i32) -> bool) {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("run");
    let mut run = live(&dir, args);
    let pid = run.pid();
    let parts = |dir: &Path| process::of_dir(dir).into_iter().filter(|part| *part != pid).count();
    // Three metadata servers, three nodes; questions that are asked beside them come and go.
    assert!(
        wait_until(BOUND, || parts(&dir) >= 6 && is_up(&dir, pid)),
        "it does not start"
    );
    process::signal(pid, signal);
    let status = run.wait(BOUND).expect("it does not end");
    assert_eq!(status.code(), Some(STOPPED));
    assert_eq!(process::of_dir(&dir), [] as [i32; 0]);
    assert_eq!(mounts(&dir), 0);
    let left = std::fs::read_dir(&dir).map_or(0, Iterator::count);
    assert_eq!(left, 0, "there is nothing in it to be looked into");
}

#[test]
fn a_signal_ends_all_processes_of_a_run() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        stops(signal, &["--no-shims"], |_, _| true);
    }
    stops(Signal::TERM, &["--no-shims", "--scenario", "operators"], |_, _| true);
}

#[test]
fn a_signal_unmounts_the_devices_of_a_run() {
    let has_fuse = Path::new("/dev/fuse").exists() || tools::skip("needs /dev/fuse");
    let is_root = rustix::process::geteuid().is_root();
    if !has_fuse || (!is_root && !tools::available(&[("fusermount3", "fuse3")])) {
        return;
    }
    stops(Signal::TERM, &[], |dir, _| mounts(dir) == 3);
}

#[test]
fn a_signal_removes_the_namespaces_of_a_run() {
    if !netns::available() {
        return;
    }
    let seen = std::cell::Cell::new(0);
    stops(Signal::TERM, &["--no-shims", "--namespaces"], |_, pid| {
        seen.set(pid);
        namespaces(pid) == 6
    });
    assert_eq!(namespaces(seen.get()), 0);
}
