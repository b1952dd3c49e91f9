//! The real `cairn` program against a real metadata server, with storage nodes that exist on paper only: what commands
//! print, and how they end.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that can't go on ends; waiting is bounded by the clock"
)]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cairn_meta::client::MetaClient;
use cairn_proto::capability::ClusterKey;
use cairn_proto::control::v1;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const BOUND: Duration = Duration::from_secs(30);
const GIB: u64 = 1 << 30;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    for variable in ["CAIRN_CONFIG", "CAIRN_META", "CAIRN_LOG"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

/// One metadata server, as a process of the program under test.
struct Cluster {
    dir: tempfile::TempDir,
    address: String,
    meta: Child,
}

impl Cluster {
    fn start() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let key = dir.path().join("cluster.key");
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(key).unwrap();
        std::io::Write::write_all(&mut file, "07".repeat(32).as_bytes()).unwrap();
        let config = format!(
            "version = 1\n[cluster]\nmeta = ['{address}']\nkey_file = 'cluster.key'\n\
             [meta]\nid = 1\ndir = 'meta'\nlisten = '{address}'\nmembers = ['1={address}']\n\
             [process]\nlog_file = 'meta.log'\npid_file = 'meta.pid'\n"
        );
        fs::write(dir.path().join("c.toml"), config).unwrap();
        let meta = program()
            .arg("meta")
            .arg("--config")
            .arg(dir.path().join("c.toml"))
            .spawn()
            .unwrap();
        let cluster = Cluster { dir, address, meta };
        cluster.wait_until_up();
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn wait_until_up(&self) {
        let end = Instant::now() + BOUND;
        while self.cairn(&["status"]).status.code() != Some(0) {
            let log = fs::read_to_string(self.path("meta.log")).unwrap_or_default();
            assert!(Instant::now() < end, "the metadata server does not come up:\n{log}");
        }
    }

    fn cairn(&self, args: &[&str]) -> Output {
        program()
            .arg("--config")
            .arg(self.path("c.toml"))
            .args(args)
            .output()
            .unwrap()
    }

    fn succeeds(&self, args: &[&str]) -> String {
        let output = self.cairn(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.succeeds(&[args, &["--json"]].concat())).unwrap()
    }

    fn fails(&self, args: &[&str], code: i32) -> String {
        let output = self.cairn(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
        stderr(&output)
    }

    /// Registers nodes as their processes would, and lets them be silent from then on.
    fn register_nodes(&self, count: u8) {
        let client = MetaClient::new(vec![self.address.clone()]).with_cluster_key(&ClusterKey([7; 32]));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        for n in 1..=count {
            let device = v1::RegisterDevice {
                id: Some(v1::DeviceId {
                    uuid: vec![n; 16],
                    incarnation: 1,
                }),
                addresses: vec![format!("127.0.0.1:{n}")],
                capacity_bytes: 8 * GIB,
                used_bytes: 0,
                commit_seq: 1,
                cluster_id: Vec::new(),
            };
            let request = v1::RegisterNodeRequest {
                name: format!("node-{n}"),
                run_id: vec![n; 16],
                domain: Some(v1::FailureDomain {
                    host: format!("node-{n}"),
                    ..v1::FailureDomain::default()
                }),
                devices: vec![device],
                version: "0".to_string(),
                feature_level: u32::MAX,
            };
            let answer = runtime.block_on(client.register_node(request)).unwrap();
            assert_eq!(answer.devices[0].code, "", "{answer:?}");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.meta.kill();
        let _ = self.meta.wait();
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn wait(child: &mut Child) -> Option<i32> {
    let end = Instant::now() + BOUND;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(Instant::now() < end, "the process does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read_pid(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[test]
fn a_volume_lives_from_its_creation_to_its_deletion() {
    let cluster = Cluster::start();
    assert!(cluster.succeeds(&["volume", "list"]).contains("there is no volume"));
    let text = cluster.fails(&["volume", "create", "demo", "1GiB"], 6);
    assert!(
        text.contains("can't create volume `demo`") && text.contains("3 "),
        "{text}"
    );
    cluster.register_nodes(3);

    assert_eq!(
        cluster.succeeds(&["volume", "create", "demo", "1GiB"]),
        "created volume demo (1 GiB, 3 copies)\n"
    );
    let text = cluster.fails(&["volume", "create", "demo", "2GiB"], 4);
    assert!(text.contains("`demo`"), "{text}");
    assert_eq!(
        cluster.succeeds(&["volume", "list"]),
        "NAME   SIZE  COPIES  USED BY\ndemo  1 GiB       3  -\n"
    );
    let shown = cluster.succeeds(&["volume", "show", "demo"]);
    for words in [
        "size     1 GiB\n",
        "copies   3, 2 acknowledge a write\n",
        "used by  nobody\n",
        "node-1",
        "node-2",
        "node-3",
    ] {
        assert!(shown.contains(words), "{words} is not in\n{shown}");
    }
    let shown = cluster.json(&["volume", "show", "demo"]);
    assert_eq!(shown["group_list"][0]["in_sync"].as_array().unwrap().len(), 3);
    assert_eq!((&shown["name"], &shown["holder"]), (&"demo".into(), &Value::Null));

    assert_eq!(
        cluster.succeeds(&["volume", "grow", "demo", "2GiB"]),
        "volume demo has 2 GiB now\n"
    );
    assert_eq!(cluster.json(&["volume", "list"])["volumes"][0]["size_bytes"], 2 * GIB);
    cluster.fails(&["volume", "grow", "demo", "1GiB"], 2);

    let text = cluster.fails(&["volume", "delete", "demo"], 6);
    assert!(
        text.contains("Delete volume demo (2 GiB) and all its data?") && text.contains("--yes"),
        "{text}"
    );
    assert_eq!(
        cluster.succeeds(&["volume", "delete", "demo", "--yes"]),
        "deleted volume demo\n"
    );
    for args in [
        ["volume", "show", "demo"].as_slice(),
        &["volume", "grow", "demo", "3G"],
        &["volume", "delete", "demo", "--yes"],
    ] {
        let text = cluster.fails(args, 3);
        assert!(text.contains("there is no volume `demo`"), "{text}");
    }
}

#[test]
fn wrong_names_and_sizes_are_refused_with_code_2() {
    let cluster = Cluster::start();
    for (name, size, words) in [
        ("demo", "0", "0 bytes"),
        ("demo", "257T", "256 TiB"),
        ("demo", "1000", "4096"),
        ("a b", "1G", "`a b`"),
        ("", "1G", "name"),
    ] {
        let text = cluster.fails(&["volume", "create", name, size], 2);
        assert!(text.contains(words), "{name:?} {size}: {text}");
    }
}

#[test]
fn nodes_and_the_state_of_the_cluster_are_shown() {
    let cluster = Cluster::start();
    assert!(cluster.succeeds(&["node", "list"]).contains("there is no storage node"));
    cluster.register_nodes(2);
    let nodes = cluster.json(&["node", "list"]);
    let names: Vec<_> = nodes["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["name"].clone())
        .collect();
    assert_eq!(names, ["node-1", "node-2"]);
    let text = cluster.succeeds(&["node", "show", "node-2"]);
    assert!(
        text.contains("name     node-2\n") && text.contains("02020202"),
        "{text}"
    );
    assert!(
        cluster
            .fails(&["node", "show", "node-9"], 3)
            .contains("there is no node `node-9`")
    );

    let status = cluster.json(&["status"]);
    assert_eq!((&status["nodes"], &status["leader_id"]), (&2.into(), &1.into()));
    assert_eq!(status["leader_address"], cluster.address);
    let text = cluster.succeeds(&["status"]);
    assert!(
        text.contains("1 of 1 alive, meta 1 at") && text.contains("2 nodes"),
        "{text}"
    );
}

#[test]
fn a_metadata_server_ends_in_order_and_starts_again_with_what_it_knew() {
    let mut cluster = Cluster::start();
    cluster.register_nodes(3);
    cluster.succeeds(&["volume", "create", "demo", "1GiB"]);
    let pid_file = cluster.path("meta.pid");
    assert_eq!(read_pid(&pid_file), Some(cluster.meta.id()));

    // Neither its process id file nor its port is taken from it.
    let config = cluster.path("c.toml");
    let again = program().arg("meta").arg("--config").arg(&config).output().unwrap();
    assert_eq!(again.status.code(), Some(7), "{}", stderr(&again));
    assert!(stderr(&again).contains("runs already as process"), "{}", stderr(&again));
    assert_eq!(read_pid(&pid_file), Some(cluster.meta.id()));
    let other = cluster.path("other.pid");
    let mut again = program();
    again
        .arg("meta")
        .arg("--config")
        .arg(&config)
        .arg("--pid-file")
        .arg(&other)
        .arg("--dir")
        .arg(cluster.path("other"));
    let again = again.output().unwrap();
    assert_eq!(again.status.code(), Some(7), "{}", stderr(&again));
    assert!(stderr(&again).contains(&cluster.address), "{}", stderr(&again));

    let pid = Pid::from_raw(cluster.meta.id() as i32).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(wait(&mut cluster.meta), Some(0));
    assert!(!pid_file.exists());
    cluster.meta = program().arg("meta").arg("--config").arg(&config).spawn().unwrap();
    cluster.wait_until_up();
    assert_eq!(cluster.json(&["volume", "list"])["volumes"][0]["name"], "demo");
}

#[test]
fn a_process_that_lacks_something_says_what() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |args: &[&str]| {
        let output = program().current_dir(dir.path()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        stderr(&output)
    };
    assert!(refused(&["meta"]).contains("--id N"));
    assert!(refused(&["export", "--meta", "h:1"]).contains("--nbd-unix PATH"));
    fs::write(dir.path().join("key"), "00".repeat(32)).unwrap();
    let meta = [
        "meta",
        "--id",
        "1",
        "--member",
        "1=h:1",
        "--dir",
        "d",
        "--listen",
        "127.0.0.1:1",
        "--cluster-key",
        "key",
    ];
    let text = refused(&meta);
    assert!(
        text.contains("can be read by everybody") && text.contains("chmod 600"),
        "{text}"
    );
    let text = refused(&["export", "--meta", "h:1", "--nbd-unix", "s", "--log", "=x=="]);
    assert!(text.contains("is no filter for logs"), "{text}");
}
