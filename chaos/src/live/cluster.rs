//! A cluster of real processes, each started by its own command line: metadata servers, storage nodes, exports. What
//! `cairn dev` starts behaves alike; here every process can be pointed elsewhere, and started alone and in any order.
//!
//! Processes end with the thread that started them, however it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::inject::netns::{Namespace, Network};
use super::process::{self, Guarded};
use super::stop;
use super::wait::wait_for;

/// How long a cluster may take to be able to create volumes, on a busy machine.
pub const READY_BOUND: Duration = Duration::from_secs(90);
/// How long a command against the cluster may take: its own bound is 5 s for each question.
const COMMAND_BOUND: Duration = Duration::from_secs(30);
/// The pause between two questions whether the cluster is well.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
const META_PORT: u16 = 7401;
const NODE_PORT: u16 = 7402;
const METRICS_PORT: u16 = 9400;
const BEFORE_PORT: u16 = 7403;
/// Told to a `cairn` that is to end with the process that holds its standard input.
const PARENT_VARIABLE: &str = "CAIRN_DEV_CHILD";

/// One process of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Part {
    /// A metadata server, from 1.
    Meta(u8),
    /// A storage node, from 1.
    Node(u8),
    /// An export, from 1.
    Export(u8),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Meta(k) => write!(f, "meta-{k}"),
            Part::Node(k) => write!(f, "node-{k}"),
            Part::Export(k) => write!(f, "export-{k}"),
        }
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// The `cairn` program.
    pub program: PathBuf,
    /// Where everything is kept; made if it does not exist.
    pub dir: PathBuf,
    /// Metadata servers.
    pub metas: u8,
    /// Storage nodes, each with one device.
    pub nodes: u8,
    /// Bytes of each device.
    pub device_bytes: u64,
    /// After what silence the copies of a node are made anew elsewhere.
    pub rebuild_after: Duration,
    /// Further variables of the environment of every process.
    pub env: Vec<(String, String)>,
}

/// Something about the cluster itself can't be done.
#[derive(Debug)]
pub struct ClusterError(pub String);

impl fmt::Display for ClusterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ClusterError {}

/// What a command against the cluster gave.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its exit code; `None` if it was ended by the bound.
    pub code: Option<i32>,
    /// Standard output as JSON, `Null` where it is none.
    pub json: Value,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// Whether it succeeded.
    pub fn is_success(&self) -> bool {
        self.code == Some(0)
    }
}

/// A cluster, running or not. Dropping it kills everything and leaves the directory.
#[derive(Debug)]
pub struct Cluster {
    options: ClusterOptions,
    network: (u8, u8),
    /// Metadata servers that are to be there; the first so many began the cluster.
    metas: BTreeSet<u8>,
    /// The number of the newest metadata server.
    last_meta: u8,
    running: BTreeMap<Part, Guarded>,
    /// Parts that are reached elsewhere than where they listen.
    advertised: BTreeMap<Part, SocketAddr>,
    /// Devices that are elsewhere than in the directory.
    devices: BTreeMap<u8, PathBuf>,
    /// Directories of metadata servers that are elsewhere.
    meta_dirs: BTreeMap<u8, PathBuf>,
    /// Racks that nodes stand in, for those that stand in one.
    racks: BTreeMap<u8, String>,
    /// Each part in a network namespace of its own, if that is wanted. They go after the processes.
    ways: Option<Ways>,
}

/// Network namespaces of parts.
#[derive(Debug)]
struct Ways {
    network: Network,
    of: BTreeMap<Part, Namespace>,
}

impl Ways {
    fn join(&mut self, part: Part) -> Result<(), ClusterError> {
        if self.of.contains_key(&part) {
            return Ok(());
        }
        let namespace = self
            .network
            .join()
            .map_err(|error| ClusterError(format!("{part} has no network namespace: {error}")))?;
        self.of.insert(part, namespace);
        Ok(())
    }
}

impl Cluster {
    /// Chooses addresses and makes the directory; nothing is started.
    pub fn new(options: ClusterOptions) -> Result<Cluster, ClusterError> {
        let failed = |error: std::io::Error| {
            ClusterError(format!(
                "can't make the directory of the cluster, {}: {error}",
                options.dir.display()
            ))
        };
        for sub in ["log", "run"] {
            fs::create_dir_all(options.dir.join(sub)).map_err(failed)?;
        }
        let key = options.dir.join("cluster.key");
        if !key.exists() {
            // Nothing here is secret.
            fs::write(&key, "5a".repeat(32)).map_err(failed)?;
            let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            fs::set_permissions(&key, owner_only).map_err(failed)?;
        }
        let network = free_network().ok_or_else(|| ClusterError("no loopback network is free".to_string()))?;
        Ok(Cluster {
            metas: (1..=options.metas).collect(),
            last_meta: options.metas,
            options,
            network,
            running: BTreeMap::new(),
            advertised: BTreeMap::new(),
            devices: BTreeMap::new(),
            meta_dirs: BTreeMap::new(),
            racks: BTreeMap::new(),
            ways: None,
        })
    }

    /// From now on each part is started in a network namespace of its own, where ways between two of them can be cut. Nothing
    /// may run yet.
    ///
    /// # Errors
    /// It needs root and `ip`.
    pub fn use_namespaces(&mut self) -> Result<(), ClusterError> {
        assert!(self.running.is_empty(), "what runs has its addresses already");
        let network =
            Network::new().map_err(|error| ClusterError(format!("network namespaces can't be made: {error}")))?;
        let mut ways = Ways {
            network,
            of: BTreeMap::new(),
        };
        self.servers().into_iter().try_for_each(|part| ways.join(part))?;
        self.ways = Some(ways);
        Ok(())
    }

    /// Whether ways between parts can be cut, see [`Cluster::cut`].
    pub fn has_namespaces(&self) -> bool {
        self.ways.is_some()
    }

    /// Nothing from the one arrives at the other any more; nobody is told, and the other way stays open.
    ///
    /// # Errors
    /// They are not in namespaces, or what `ip` says.
    pub fn cut(&mut self, from: Part, to: Part) -> Result<(), ClusterError> {
        let failed = |words: String| ClusterError(format!("the way from {from} to {to} can't be cut: {words}"));
        let ways = self
            .ways
            .as_mut()
            .ok_or_else(|| failed("there are no namespaces".into()))?;
        let at = |part: Part| {
            ways.of
                .get(&part)
                .copied()
                .ok_or_else(|| failed(format!("{part} is in none")))
        };
        let (from, to) = (at(from)?, at(to)?);
        ways.network.cut(from, to).map_err(|error| failed(error.to_string()))
    }

    /// Pulls the cable of a part.
    ///
    /// # Errors
    /// It is in no namespace, or what `ip` says.
    pub fn pull_cable(&mut self, part: Part) -> Result<(), ClusterError> {
        let failed = |words: String| ClusterError(format!("the cable of {part} can't be pulled: {words}"));
        let ways = self
            .ways
            .as_mut()
            .ok_or_else(|| failed("there are no namespaces".into()))?;
        let at = ways
            .of
            .get(&part)
            .copied()
            .ok_or_else(|| failed("it is in none".into()))?;
        ways.network.isolate(at).map_err(|error| failed(error.to_string()))
    }

    /// Opens all ways.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn open_ways(&mut self) -> Result<(), ClusterError> {
        let Some(ways) = &mut self.ways else { return Ok(()) };
        ways.network
            .heal()
            .map_err(|error| ClusterError(format!("ways can't be opened again: {error}")))
    }

    /// From its next start on a node stands in this rack.
    pub fn put_into_rack(&mut self, node: u8, rack: &str) {
        self.racks.insert(node, rack.to_string());
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.options.dir
    }

    /// All metadata servers and nodes.
    pub fn servers(&self) -> Vec<Part> {
        self.metas().chain(self.nodes()).collect()
    }

    /// All metadata servers.
    pub fn metas(&self) -> impl Iterator<Item = Part> + use<> {
        self.metas.clone().into_iter().map(Part::Meta)
    }

    /// A metadata server more, which is not started yet. It joins the others when it is.
    ///
    /// # Errors
    /// There is no namespace for it.
    pub fn add_meta(&mut self) -> Result<Part, ClusterError> {
        let meta = Part::Meta(self.last_meta + 1);
        if let Some(ways) = &mut self.ways {
            ways.join(meta)?;
        }
        self.last_meta += 1;
        self.metas.insert(self.last_meta);
        Ok(meta)
    }

    /// `cairn meta remove`. When that succeeds it is no part of the cluster any more, and its process ends by itself: see
    /// [`Cluster::ended`].
    pub fn remove_meta(&mut self, id: u8) -> Said {
        let key = self.options.dir.join("cluster.key").display().to_string();
        let said = self.ask(&["meta", "remove", &id.to_string(), "--yes", "--cluster-key", &key]);
        if said.is_success() {
            self.forget_meta(id);
        }
        said
    }

    /// A metadata server was removed.
    pub fn forget_meta(&mut self, id: u8) {
        self.metas.remove(&id);
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = Part> + use<> {
        (1..=self.options.nodes).map(Part::Node)
    }

    /// Where a part listens; an export's is that of its metrics.
    pub fn address(&self, part: Part) -> String {
        let (kind, k, port) = match part {
            Part::Meta(k) => (1, k, META_PORT),
            Part::Node(k) => (2, k, NODE_PORT),
            Part::Export(k) => (3, k, METRICS_PORT),
        };
        let ways = self.ways.as_ref();
        if let Some((ways, at)) = ways.and_then(|ways| Some((ways, *ways.of.get(&part)?))) {
            return format!("{}:{port}", ways.network.address(at));
        }
        let (second, third) = self.network;
        // Three kinds of parts share the last number.
        format!("127.{second}.{third}.{}:{port}", kind * 64 + k)
    }

    /// Where a part serves its metrics.
    pub fn metrics_address(&self, part: Part) -> String {
        let address = self.address(part);
        let host = address.split(':').next().unwrap_or_default();
        format!("{host}:{METRICS_PORT}")
    }

    /// Others reach a part here, not where it listens. It counts from the next start of whoever is told.
    pub fn advertise(&mut self, part: Part, address: SocketAddr) {
        self.advertised.insert(part, address);
    }

    /// An address of its own for something that stands before a part.
    pub fn address_before(&self, part: Part) -> String {
        let address = self.address(part);
        let host = address.split(':').next().unwrap_or_default();
        format!("{host}:{BEFORE_PORT}")
    }

    /// Where others reach a part.
    pub fn reached_at(&self, part: Part) -> String {
        let advertised = self.advertised.get(&part).map(ToString::to_string);
        advertised.unwrap_or_else(|| self.address(part))
    }

    /// Bytes of each device.
    pub fn device_bytes(&self) -> u64 {
        self.options.device_bytes
    }

    /// From its next start on a node has its device here.
    pub fn use_device(&mut self, node: u8, path: PathBuf) {
        self.devices.insert(node, path);
    }

    /// The device of a node.
    pub fn device(&self, node: u8) -> PathBuf {
        let own = || self.options.dir.join(format!("node-{node}.img"));
        self.devices.get(&node).cloned().unwrap_or_else(own)
    }

    /// Where a metadata server keeps what it knows.
    pub fn meta_dir(&self, id: u8) -> PathBuf {
        let own = || self.options.dir.join(Part::Meta(id).to_string());
        self.meta_dirs.get(&id).cloned().unwrap_or_else(own)
    }

    /// From its next start on a metadata server keeps what it knows here.
    pub fn use_meta_dir(&mut self, id: u8, path: PathBuf) {
        self.meta_dirs.insert(id, path);
    }

    /// After what silence the copies of a node are made anew elsewhere.
    pub fn rebuild_after(&self) -> Duration {
        self.options.rebuild_after
    }

    /// A storage node more, which is not started yet.
    ///
    /// # Errors
    /// There is no namespace for it.
    pub fn add_node(&mut self) -> Result<Part, ClusterError> {
        let node = Part::Node(self.options.nodes + 1);
        if let Some(ways) = &mut self.ways {
            ways.join(node)?;
        }
        self.options.nodes += 1;
        Ok(node)
    }

    /// The NBD socket of an export.
    pub fn socket(&self, export: u8) -> PathBuf {
        self.options.dir.join("run").join(format!("nbd-{export}.sock"))
    }

    /// The log of a part.
    pub fn log(&self, part: Part) -> PathBuf {
        self.options.dir.join("log").join(format!("{part}.log"))
    }

    /// The metadata servers' addresses, as `--meta` takes them, for processes of the cluster.
    fn meta_addresses(&self) -> String {
        let addresses: Vec<String> = self.metas().map(|meta| self.reached_at(meta)).collect();
        addresses.join(",")
    }

    /// The same for commands, which go where they listen: an operator stands beside them.
    fn own_meta_addresses(&self) -> String {
        let addresses: Vec<String> = self.metas().map(|meta| self.address(meta)).collect();
        addresses.join(",")
    }

    /// The `cairn` program, told nothing by the environment.
    fn program(&self) -> Command {
        self.bare(Command::new(&self.options.program))
    }

    /// The same where a part is.
    fn program_of(&self, part: Part) -> Command {
        let ways = self.ways.as_ref();
        match ways.and_then(|ways| Some((ways, *ways.of.get(&part)?))) {
            Some((ways, at)) => self.bare(ways.network.command(at, &self.options.program)),
            None => self.program(),
        }
    }

    fn bare(&self, mut command: Command) -> Command {
        for variable in ["CAIRN_CONFIG", "CAIRN_META", "CAIRN_LOG"] {
            command.env_remove(variable);
        }
        command.current_dir(&self.options.dir);
        command
    }

    fn command(&self, part: Part) -> Command {
        let mut command = self.program_of(part);
        let dir = &self.options.dir;
        let address = self.address(part);
        match part {
            Part::Meta(id) => {
                command.args(["meta", "--id", &id.to_string(), "--listen", &address]);
                command.arg("--dir").arg(self.meta_dir(id));
                let rebuild_after = format!("{}s", self.options.rebuild_after.as_secs());
                command.args(["--rebuild-after", &rebuild_after]);
                if id > self.options.metas {
                    let others = self.metas().filter(|other| *other != part);
                    let others: Vec<String> = others.map(|other| self.reached_at(other)).collect();
                    command.args(["--join", "--meta", &others.join(",")]);
                } else {
                    // Those that began the cluster, whether they are in it still or not.
                    for id in 1..=self.options.metas {
                        let member = self.reached_at(Part::Meta(id));
                        command.args(["--member", &format!("{id}={member}")]);
                    }
                }
            }
            Part::Node(k) => {
                command.args(["node", "--name", &part.to_string(), "--listen", &address]);
                command.arg("--device").arg(self.device(k));
                command.args(["--device-size", &self.options.device_bytes.to_string()]);
                if let Some(rack) = self.racks.get(&k) {
                    command.args(["--rack", rack]);
                }
                command.args(["--meta", &self.meta_addresses()]);
            }
            Part::Export(k) => {
                command.arg("export").arg("--nbd-unix").arg(self.socket(k));
                command.args(["--meta", &self.meta_addresses()]);
            }
        }
        if let Some(advertised) = self.advertised.get(&part) {
            command.args(["--advertise", &advertised.to_string()]);
        }
        if !matches!(part, Part::Export(_)) {
            command.arg("--cluster-key").arg(dir.join("cluster.key"));
        }
        command.args(["--metrics", &self.metrics_address(part)]);
        command.envs(self.options.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts a part that does not run; it may end again at once.
    pub fn start(&mut self, part: Part) -> Result<(), ClusterError> {
        assert!(!self.is_running(part), "{part} runs already");
        let failed = |error: std::io::Error| ClusterError(format!("{part} can't be started: {error}"));
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(part))
            .map_err(failed)?;
        if let Some(ways) = &mut self.ways {
            ways.join(part)?;
        }
        let mut command = self.command(part);
        command
            .process_group(0)
            .env(PARENT_VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log);
        let child = command.spawn().map_err(failed)?;
        self.running.insert(part, Guarded::new(child));
        Ok(())
    }

    /// Whether it was started and not killed since; it may have ended by itself.
    pub fn is_running(&self, part: Part) -> bool {
        self.running.contains_key(&part)
    }

    /// All parts that run.
    pub fn running(&self) -> Vec<Part> {
        self.running.keys().copied().collect()
    }

    /// The process id of a part that runs.
    pub fn pid(&self, part: Part) -> i32 {
        self.running[&part].pid()
    }

    /// SIGKILL to these at once; waits until all are gone.
    pub fn kill(&mut self, parts: &[Part]) {
        let gone: Vec<Guarded> = parts.iter().filter_map(|part| self.running.remove(part)).collect();
        for child in &gone {
            process::signal(child.pid(), Signal::KILL);
        }
        // Each is waited for when it is dropped.
        drop(gone);
    }

    /// SIGTERM; its exit status, `None` when it had to be killed after `bound`.
    pub fn stop(&mut self, part: Part, bound: Duration) -> Option<ExitStatus> {
        let mut child = self.running.remove(&part)?;
        process::signal(child.pid(), Signal::TERM);
        child.wait(bound)
    }

    /// Parts that have ended though nobody ended them, taken out.
    pub fn ended(&mut self) -> Vec<(Part, ExitStatus)> {
        let mut ended = Vec::new();
        for (part, child) in &mut self.running {
            if let Ok(Some(status)) = child.child().try_wait() {
                ended.push((*part, status));
            }
        }
        for (part, _) in &ended {
            self.running.remove(part);
        }
        ended
    }

    /// Runs `cairn ARGS --json` against the cluster.
    pub fn ask(&self, args: &[&str]) -> Said {
        let mut command = self.program();
        command
            .args(["--meta", &self.own_meta_addresses(), "--json"])
            .args(args);
        let output = tempfile::tempfile().and_then(|out| Ok((out.try_clone()?, out, tempfile::tempfile()?)));
        let failed = |error: std::io::Error| Said {
            code: None,
            json: Value::Null,
            err: format!("`cairn {}` can't be run: {error}", args.join(" ")),
        };
        let (out, mut out_read, err) = match output {
            Ok(files) => files,
            Err(error) => return failed(error),
        };
        let err_write = match err.try_clone() {
            Ok(file) => file,
            Err(error) => return failed(error),
        };
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err_write);
        let mut child = match command.spawn() {
            Ok(child) => Guarded::new(child),
            Err(error) => return failed(error),
        };
        let status = child.wait(COMMAND_BOUND);
        let mut err = err;
        let text = |file: &mut fs::File| {
            use std::io::{Read as _, Seek as _};
            let mut text = String::new();
            // What can't be read is missing from the words of a failure; the exit code tells.
            let _ = file.rewind().and_then(|()| file.read_to_string(&mut text));
            text
        };
        Said {
            code: status.and_then(|status| status.code()),
            json: serde_json::from_str(&text(&mut out_read)).unwrap_or(Value::Null),
            err: text(&mut err),
        }
    }

    /// Who leads the metadata servers, as they say.
    pub fn leader(&self) -> Option<Part> {
        let id = self.ask(&["status"]).json["leader_id"].as_u64()?;
        u8::try_from(id).ok().map(Part::Meta)
    }

    /// What is not as it should be: the cluster's own problems, or that nobody answers.
    pub fn problems(&self) -> Vec<String> {
        let said = self.ask(&["status"]);
        if !said.is_success() {
            return vec![format!("status: {}", said.err.trim())];
        }
        let listed = said.json["problems"].as_array().cloned().unwrap_or_default();
        let mut words: Vec<String> = listed
            .iter()
            .map(|problem| format!("{}: {}", problem["code"].as_str().unwrap_or("?"), problem["message"]))
            .collect();
        let alive = said.json["devices_alive"].as_u64().unwrap_or(0);
        if alive < u64::from(self.options.nodes) {
            words.push(format!("{alive} of {} devices are alive", self.options.nodes));
        }
        words
    }

    /// Nodes with devices that hold copies, as the metadata servers say.
    pub fn holders(&self) -> Vec<Part> {
        let listed = self.ask(&["node", "list"]).json;
        let holds = |node: &Value| {
            let devices = node["devices"].as_array().into_iter().flatten();
            let groups = devices.filter_map(|device| device["groups"].as_u64()).sum::<u64>();
            groups > 0
        };
        let named = |node: &Value| {
            let name = node["name"].as_str()?.to_string();
            self.nodes().find(|part| part.to_string() == name)
        };
        let nodes = listed["nodes"].as_array().into_iter().flatten();
        nodes.filter(|node| holds(node)).filter_map(named).collect()
    }

    /// The rack that a node stands in, if it stands in one.
    pub fn rack(&self, node: u8) -> Option<&str> {
        self.racks.get(&node).map(String::as_str)
    }

    /// Waits until there is no problem; the last ones seen when that takes longer than `bound`.
    pub fn wait_well(&self, bound: Duration) -> Result<Duration, Vec<String>> {
        let begun = Instant::now();
        loop {
            let problems = self.problems();
            if problems.is_empty() {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() >= bound || stop::asked().is_some() {
                return Err(problems);
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }

    /// Starts everything but exports and waits until volumes can be created.
    pub fn begin(&mut self) -> Result<(), ClusterError> {
        for part in self.servers() {
            self.start(part)?;
        }
        self.wait_well(READY_BOUND)
            .map(drop)
            .map_err(|problems| ClusterError(format!("the cluster does not come up: {}", problems.join("; "))))
    }

    /// Creates a volume.
    pub fn create_volume(&self, name: &str, size: &str) -> Result<Value, ClusterError> {
        let said = wait_for(READY_BOUND, || {
            let mut args = vec!["volume", "create", name, size];
            if !self.racks.is_empty() {
                args.extend(["--spread", "rack"]);
            }
            let said = self.ask(&args);
            // Unreachable for now: whoever leads has only just begun.
            (said.code != Some(5) || stop::asked().is_some()).then_some(said)
        });
        match said {
            Some(said) if said.is_success() => Ok(said.json),
            Some(said) => Err(ClusterError(format!(
                "volume {name} can't be created: {}",
                said.err.trim()
            ))),
            None => Err(ClusterError(format!("volume {name} can't be created: nobody answers"))),
        }
    }
}

/// A part of 127.0.0.0/8 on which nobody listens, as far as its first address tells.
fn free_network() -> Option<(u8, u8)> {
    let start = std::process::id();
    (0..1000u32).find_map(|attempt| {
        let number = start.wrapping_add(attempt.wrapping_mul(257));
        let (second, third) = (64 + (number % 128) as u8, (number / 128 % 256) as u8);
        let first = Ipv4Addr::new(127, second, third, 65);
        TcpListener::bind((first, META_PORT)).is_ok().then_some((second, third))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(dir: &Path) -> Cluster {
        Cluster::new(ClusterOptions {
            program: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand-in/part").into(),
            dir: dir.to_path_buf(),
            metas: 1,
            nodes: 2,
            device_bytes: 1 << 20,
            rebuild_after: Duration::from_secs(20),
            env: Vec::new(),
        })
        .unwrap()
    }

    #[test]
    fn every_part_has_an_address_and_a_log_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = cluster(dir.path());
        let mut parts = cluster.servers();
        parts.push(Part::Export(1));
        let mut addresses: Vec<String> = parts.iter().map(|part| cluster.address(*part)).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 4);
        assert_eq!(cluster.log(Part::Node(2)), dir.path().join("log/node-2.log"));
        assert_eq!(cluster.meta_addresses(), cluster.address(Part::Meta(1)));
    }

    #[test]
    fn parts_are_killed_and_those_that_end_by_themselves_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = cluster(dir.path());
        cluster.start(Part::Meta(1)).unwrap();
        let pid = cluster.pid(Part::Meta(1));
        cluster.kill(&[Part::Meta(1), Part::Node(1)]);
        assert!(!process::is_running(pid));
        assert!(cluster.ended().is_empty(), "it was killed, not lost");
        // The stand-in plays a metadata server only: everything else ends with status 7.
        cluster.start(Part::Node(1)).unwrap();
        let ended = wait_for(READY_BOUND, || Some(cluster.ended()).filter(|ended| !ended.is_empty())).unwrap();
        assert_eq!((ended[0].0, ended[0].1.code()), (Part::Node(1), Some(7)));
        assert!(!cluster.is_running(Part::Node(1)));
    }
}
