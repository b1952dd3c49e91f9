//! `cairn node inspect` and `cairn node format` on real files: what they find, what they refuse, and how they end.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that can't go on ends; waiting is bounded by the clock"
)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cairn_client::Volume;
use cairn_client::config::Config;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

const BOUND: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    for variable in ["CAIRN_CONFIG", "CAIRN_META", "CAIRN_LOG"] {
        command.env_remove(variable);
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program(args).output().unwrap()
}

/// Runs it; it must end with this code.
fn ends(code: i32, args: &[&str]) -> (String, String) {
    let output = run(args);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "{args:?}: {out}{err}");
    (out, err)
}

fn json(code: i32, args: &[&str]) -> Value {
    let (out, err) = ends(code, &[args, &["--json"]].concat());
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"))
}

/// A formatted device of 64 MiB, and its UUID.
fn formatted(path: &str) -> String {
    let cluster = "01010101-0101-0101-0101-010101010101";
    let found = json(0, &["node", "format", path, "--size", "64MiB", "--cluster", cluster]);
    assert_eq!(
        (&found["cluster_id"], &found["blank"]),
        (&cluster.into(), &false.into())
    );
    assert_eq!(found["bytes"], 64 << 20);
    found["uuid"].as_str().unwrap().to_string()
}

/// A cluster of one node, killed when the test ends.
struct Dev(Child);

impl Drop for Dev {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Dev {
    fn start(dir: &Path) -> Dev {
        let dir = dir.to_str().unwrap();
        let mut command = program(&[
            "dev",
            "--dir",
            dir,
            "--metas",
            "1",
            "--nodes",
            "1",
            "--volume",
            "demo:256MiB",
        ]);
        let child = command
            .args(["--device-size", "512MiB"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut dev = Dev(child);
        let lines = BufReader::new(dev.0.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap);
        assert!(
            lines.any(|line| line == "cluster ready"),
            "it ended before it was ready"
        );
        dev
    }
}

/// Waits until nobody has the lock of the device.
fn wait_for_lock(device: &Path) {
    let end = Instant::now() + BOUND;
    let file = fs::File::open(device).unwrap();
    while flock(&file, FlockOperation::NonBlockingLockShared).is_err() {
        assert!(Instant::now() < end, "the node did not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Content that stands nowhere else.
fn content(blocks: usize) -> Vec<u8> {
    (0..blocks * BLOCK / 8)
        .flat_map(|word| (word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

#[test]
fn the_device_of_a_killed_cluster_is_read_and_a_flipped_bit_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("node-1").join("device-1");
    let path = device.to_str().unwrap();
    let dev = Dev::start(dir.path());
    let meta = Config::load(&dir.path().join("cairn.toml")).unwrap().cluster.meta;
    let content = content(100);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let volume = Volume::open(meta, "demo").await.unwrap();
        volume
            .write((64 << 20) + 40 * BLOCK as u64, Bytes::from(content.clone()))
            .await
            .unwrap();
        volume.write(0, Bytes::from(vec![5; BLOCK])).await.unwrap();
        volume.close().await;
    });
    let config = dir.path().join("cairn.toml");
    let show = ["--config", config.to_str().unwrap(), "node", "show", "node-1"];
    // The first heartbeat says it, soon after the registration.
    let end = Instant::now() + BOUND;
    while json(0, &show)["devices"][0]["write_cache"] != "volatile" {
        assert!(Instant::now() < end, "{}", json(0, &show));
    }
    let (_, err) = ends(7, &["node", "inspect", path]);
    assert!(err.contains("another process uses it"), "{err}");
    let (_, err) = ends(7, &["node", "format", path]);
    assert!(err.contains("another process uses it"), "{err}");
    drop(dev);
    wait_for_lock(&device);

    let before = fs::read(&device).unwrap();
    let found = json(0, &["node", "inspect", path, "--verify"]);
    assert!(
        fs::read(&device).unwrap() == before,
        "a device that is inspected is not changed"
    );
    assert_eq!((&found["state"], &found["kind"]), (&"cairn".into(), &"file".into()));
    assert_eq!(
        (&found["damage_total"], &found["volatile_cache"]),
        (&0.into(), &true.into())
    );
    assert_eq!(found["superblocks"].as_array().unwrap().len(), 3);
    assert!(
        found["superblocks"]
            .as_array()
            .unwrap()
            .iter()
            .all(|copy| copy["valid"] == true)
    );
    assert!(found["log"]["last_commit"].as_u64().unwrap() > 0);
    let id = found["seals"][0]["volume_id"].as_u64().unwrap();
    let replicas = found["replicas"].as_array().unwrap();
    let bytes: u64 = replicas
        .iter()
        .map(|replica| replica["data_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(bytes, 101 * BLOCK as u64);
    assert_eq!(
        found["volumes"],
        serde_json::json!([{ "volume_id": id, "data_bytes": bytes }])
    );
    assert_eq!(
        (&found["verified"]["data_bytes"], &found["space"]["data_bytes"]),
        (&bytes.into(), &bytes.into())
    );
    let (text, _) = ends(0, &["node", "inspect", path]);
    assert!(
        text.contains("superblock 2") && text.contains("EXTENTS/CHUNK"),
        "{text}"
    );

    // One bit of block 50 of chunk 1, in a copy of the device.
    let copy = dir.path().join("copy.img");
    let wanted = &content[10 * BLOCK..11 * BLOCK];
    let place = before
        .chunks(BLOCK)
        .position(|block| block == wanted)
        .expect("it is on the device");
    let mut damaged = before.clone();
    damaged[place * BLOCK + 1000] ^= 4;
    fs::write(&copy, &damaged).unwrap();
    let copy = copy.to_str().unwrap();
    assert_eq!(
        json(0, &["node", "inspect", copy])["damage_total"],
        0,
        "its checksum is not looked at"
    );
    let found = json(9, &["node", "inspect", copy, "--verify"]);
    assert_eq!(found["damage_total"], 1);
    let damage = &found["damage"][0];
    assert_eq!(
        (&damage["kind"], &damage["volume_id"]),
        (&"checksum".into(), &id.into())
    );
    assert_eq!(
        (&damage["chunk"], &damage["block"], &damage["blocks"]),
        (&1.into(), &50.into(), &1.into())
    );
    assert_eq!(damage["device_block"], place as u64);
    assert_eq!(damage["volume_offset"], (64 << 20) + 50 * BLOCK as u64);
    assert!(damage["version"].as_str().unwrap().starts_with('v'), "{damage}");
    let (text, err) = ends(9, &["node", "inspect", copy, "--verify"]);
    assert!(text.contains("chunk 1 block 50 version v"), "{text}");
    assert!(err.contains("1 damaged part"), "{err}");
    let other = (id + 1).to_string();
    json(0, &["node", "inspect", copy, "--verify", "--volume", &other]);

    // A device that has lost its end, and one of whose superblocks is gone.
    fs::write(copy, &before[..before.len() / 2]).unwrap();
    let found = json(9, &["node", "inspect", copy]);
    assert_eq!(found["state"], "truncated");
    let mut damaged = before;
    damaged[20] ^= 1;
    fs::write(copy, &damaged).unwrap();
    let found = json(9, &["node", "inspect", copy]);
    assert_eq!(
        (&found["state"], &found["superblocks"][0]["valid"]),
        (&"cairn".into(), &false.into())
    );
    assert_eq!(found["damage"][0]["kind"], "superblock");
}

#[test]
fn what_is_no_device_is_said_and_ends_with_code_3() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_string()
    };
    let foreign = file("photo", &b"these are somebody's photographs ".repeat(100_000));
    let (_, err) = ends(3, &["node", "inspect", &foreign]);
    assert!(err.contains("starts with the bytes 74 68 65 73 65"), "{err}");
    assert_eq!(json(3, &["node", "inspect", &foreign])["state"], "foreign");
    let blank = file("blank", &vec![0; 4 << 20]);
    assert_eq!(json(3, &["node", "inspect", &blank])["state"], "blank");
    let short = file("short", b"x");
    assert_eq!(json(3, &["node", "inspect", &short])["state"], "too_small");
    let (_, err) = ends(3, &["node", "inspect", &short]);
    assert!(err.contains("it has 1 bytes"), "{err}");
    let (_, err) = ends(3, &["node", "inspect", dir.path().join("none").to_str().unwrap()]);
    assert!(err.contains("does not exist"), "{err}");
    let (_, err) = ends(3, &["node", "inspect", dir.path().to_str().unwrap()]);
    assert!(err.contains("a directory"), "{err}");
}

#[test]
fn a_device_that_holds_something_is_formatted_only_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    let path = path.to_str().unwrap();
    let uuid = formatted(path);
    let first = json(0, &["node", "inspect", path, "--verify"]);
    assert_eq!(first["uuid"], uuid.as_str());
    let unchanged = || json(0, &["node", "inspect", path])["incarnation"] == first["incarnation"];
    let (_, err) = ends(6, &["node", "format", path]);
    assert!(err.contains(&format!("--wipe {uuid}")), "{err}");
    ends(
        6,
        &["node", "format", path, "--wipe", "99999999-9999-9999-9999-999999999999"],
    );
    ends(6, &["node", "format", path, "--wipe-foreign", path]);
    ends(2, &["node", "format", path, "--wipe", &uuid, "--size", "1GiB"]);
    assert!(unchanged());

    let found = json(0, &["node", "format", path, "--wipe", &uuid]);
    assert_eq!(
        (&found["uuid"], &found["cluster_id"]),
        (&first["uuid"], &first["cluster_id"])
    );
    assert_ne!(found["incarnation"], first["incarnation"]);
    let now = json(0, &["node", "inspect", path, "--verify"]);
    assert_eq!(
        (&now["incarnation"], &now["log"]["last_commit"]),
        (&found["incarnation"], &0.into())
    );

    let found = json(0, &["node", "format", path, "--wipe", &uuid, "--blank"]);
    assert_eq!((&found["blank"], &found["uuid"]), (&true.into(), &Value::Null));
    json(3, &["node", "inspect", path]);
    let (text, _) = ends(0, &["node", "format", path]);
    assert!(text.contains("is blank"), "{text}");

    // A mark that stands neither at the very start nor at the very end.
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(b"_BHRfS_M", 65_600).unwrap();
    let (_, err) = ends(6, &["node", "format", path]);
    assert!(err.contains("Btrfs") && err.contains("--wipe-foreign"), "{err}");
    ends(6, &["node", "format", path, "--wipe-foreign", "other"]);
    ends(0, &["node", "format", path, "--wipe-foreign", path]);
    formatted(path);
}
