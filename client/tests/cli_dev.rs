//! `cairn dev` where it must refuse or give up: what it says, how it ends, and that it leaves no process behind.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that can't go on ends; waiting is bounded by the clock"
)]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

const BOUND: Duration = Duration::from_secs(60);

fn dev(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    for variable in ["CAIRN_CONFIG", "CAIRN_META", "CAIRN_LOG"] {
        command.env_remove(variable);
    }
    command.arg("dev").arg("--dir").arg(dir).args(args).stdin(Stdio::null());
    command
}

/// Runs it to its end, which must come by itself.
fn refused(dir: &Path, args: &[&str], code: i32) -> String {
    let output = dev(dir, args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert_eq!(output.stdout, b"", "only a cluster that is ready says so");
    assert_eq!(processes_of(dir), [] as [String; 0], "{text}");
    text
}

/// Command lines of running processes that name the directory.
fn processes_of(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = entries.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    lines
        .filter(|line| line.contains(dir))
        .map(|line| line.replace('\0', " "))
        .collect()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen within {BOUND:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A child that does not outlive the test.
struct Guarded(Child);

impl Guarded {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.0.id() as i32).unwrap(), signal).unwrap();
    }

    fn output(mut self) -> Output {
        let stdout = self.0.stdout.take().map(std::io::read_to_string);
        let stderr = self.0.stderr.take().map(std::io::read_to_string);
        let status = self.0.wait().unwrap();
        let bytes = |text: Option<std::io::Result<String>>| text.and_then(Result::ok).unwrap_or_default().into_bytes();
        Output {
            status,
            stdout: bytes(stdout),
            stderr: bytes(stderr),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(dir: &Path, args: &[&str]) -> Guarded {
    let mut command = dev(dir, args);
    Guarded(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// A directory that remembers three metadata servers and two nodes.
fn remembering(dir: &Path, first_port: u16) {
    let mut text = "version = 1\nwas_ready = true\n".to_string();
    for (n, part) in ["meta-1", "meta-2", "meta-3", "node-1", "node-2"].iter().enumerate() {
        let listen = if n == 0 { first_port } else { 2 * n as u16 + 1 };
        text.push_str(&format!("[parts.{part}]\nlisten = {listen}\nmetrics = {}\n", 2 * n + 2));
    }
    text.push_str("[parts.export]\nmetrics = 99\n");
    fs::write(dir.join("dev.toml"), text).unwrap();
}

#[test]
fn a_directory_that_can_not_be_used_is_refused_with_words() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(100));
    let text = refused(&long, &[], 2);
    assert!(
        text.contains("the system allows 107") && text.contains("shorter path"),
        "{text}"
    );
    assert!(!long.exists());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let text = refused(&file, &[], 1);
    assert!(text.contains("can't make the directory"), "{text}");
}

#[test]
fn a_directory_in_use_is_refused_and_says_by_whom() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("dev.lock"), "4711\n").unwrap();
    let lock = fs::File::open(dir.path().join("dev.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let text = refused(dir.path(), &[], 7);
    assert!(text.contains("another cairn dev (process 4711)"), "{text}");
}

#[test]
fn a_remembered_port_of_a_metadata_server_that_is_taken_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port();
    remembering(dir.path(), port);
    let text = refused(dir.path(), &[], 7);
    assert!(text.contains(&format!("port {port} of meta-1 is in use")), "{text}");
}

#[test]
fn a_cluster_does_not_lose_parts_by_an_option() {
    let dir = tempfile::tempdir().unwrap();
    remembering(dir.path(), 1);
    let text = refused(dir.path(), &["--nodes", "1"], 2);
    assert!(text.contains("has 2 storage nodes"), "{text}");
    let text = refused(dir.path(), &["--metas", "1"], 2);
    assert!(text.contains("has 3 metadata servers"), "{text}");
}

#[test]
fn a_node_that_can_not_start_ends_the_first_start_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("node-1")).unwrap();
    let device = dir.path().join("node-1").join("device-1");
    fs::write(
        &device,
        "these are somebody's photographs, not a device ".repeat(100_000),
    )
    .unwrap();
    let before = fs::read(&device).unwrap();
    let text = refused(dir.path(), &["--metas", "1", "--nodes", "1", "--device-size", "1G"], 1);
    assert!(
        text.contains("node-1") && text.contains("during the start; its log ends with"),
        "{text}"
    );
    assert!(text.contains("device-1"), "it does not name the device: {text}");
    assert!(fs::read(&device).unwrap() == before, "a foreign file was changed");
}

#[test]
fn a_signal_during_the_start_stops_every_process() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = start(dir.path(), &["--metas", "1", "--nodes", "1", "--device-size", "1G"]);
    wait_until("a running node", || dir.path().join("run/node-1.pid").exists());
    assert_eq!(fs::metadata(dir.path().join("cluster.key")).unwrap().len(), 65);
    cluster.signal(Signal::INT);
    let output = cluster.output();
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(processes_of(dir.path()), [] as [String; 0]);
    assert_eq!(
        fs::read_dir(dir.path().join("run")).unwrap().count(),
        0,
        "process id files stay behind"
    );
}

#[test]
fn a_killed_cairn_dev_takes_its_processes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = start(dir.path(), &["--metas", "1", "--nodes", "1", "--device-size", "1G"]);
    wait_until("a running node", || dir.path().join("run/node-1.pid").exists());
    cluster.signal(Signal::KILL);
    assert_eq!(cluster.output().status.code(), None);
    wait_until("the end of all processes", || processes_of(dir.path()).is_empty());
}
