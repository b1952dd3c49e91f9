//! The processes of the cluster: their configuration, their start, their end.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Instant;

use cairn_client::config::{
    ClusterSection, Config, ExportSection, MemberAddress, MetaSection, NodeSection, ProcessSection, Span,
};
use cairn_proto::units::ByteSize;
use rustix::process::Signal;
use tokio::process::Command;
use tokio::task::JoinSet;

use super::layout::{Layout, Part};
use super::lock;
use super::memory::Memory;
use crate::context::{CONFIG_VARIABLE, META_VARIABLE};
use crate::failure::Failure;
use crate::limits::{KILL_BOUND, LOG_BYTES_MAX, POLL_INTERVAL, STOP_BOUND};
use crate::process::PARENT_VARIABLE;

/// The file of a node's device, within the node's directory.
const DEVICE_FILE: &str = "device-1";

/// What the parts are told beside their ports.
#[derive(Clone, Debug)]
pub(crate) struct Wishes {
    /// The size of device files that do not exist yet.
    pub(crate) device_size: ByteSize,
    /// Where NBD is served over TCP.
    pub(crate) nbd_tcp: Option<SocketAddr>,
    /// What is logged.
    pub(crate) log: Option<String>,
    /// How long a node may be gone before its copies are rebuilt on others.
    pub(crate) rebuild_after: Option<Span>,
}

/// Writes the configuration of each part, and the one for other commands.
pub(crate) fn write_configs(layout: &Layout, memory: &Memory, wishes: &Wishes) -> Result<(), Failure> {
    let parts = memory.parts();
    let metas = parts.iter().filter_map(|part| match part {
        Part::Meta(k) => Some(MemberAddress {
            id: u64::from(*k),
            address: memory.listen(*part)?.to_string(),
        }),
        _ => None,
    });
    let members: Vec<MemberAddress> = metas.collect();
    let common = Config {
        cluster: ClusterSection {
            meta: members.iter().map(|member| member.address.clone()).collect(),
            key_file: Some(layout.key()),
        },
        ..Config::default()
    };
    for part in parts {
        let data = layout.data(part);
        if part != Part::Export {
            // What guests write is nobody else's business.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&data)
                .map_err(|error| Failure::failed(format!("can't make the directory {}: {error}", data.display())))?;
        }
        let mut config = Config {
            process: ProcessSection {
                log: wishes.log.clone(),
                metrics: memory.metrics(part),
                pid_file: Some(layout.pid_file(part)),
                ..ProcessSection::default()
            },
            ..common.clone()
        };
        match part {
            Part::Meta(k) => {
                config.meta = Some(MetaSection {
                    id: Some(u64::from(k)),
                    dir: Some(data),
                    listen: memory.listen(part),
                    members: members.clone(),
                    rebuild_after: wishes.rebuild_after,
                    ..MetaSection::default()
                });
            }
            Part::Node(_) => {
                config.node = Some(NodeSection {
                    name: Some(part.to_string()),
                    listen: memory.listen(part),
                    devices: vec![data.join(DEVICE_FILE).into()],
                    device_size: Some(wishes.device_size),
                    ..NodeSection::default()
                });
            }
            Part::Export => {
                config.export = Some(ExportSection {
                    nbd_unix: Some(layout.socket()),
                    nbd_tcp: wishes.nbd_tcp,
                    ..ExportSection::default()
                });
            }
        }
        write(&layout.part_config(part), &config)?;
    }
    write(&layout.config(), &common)
}

fn write(path: &Path, config: &Config) -> Result<(), Failure> {
    let text = format!("# Written by `cairn dev` at each start.\n{}", config.to_toml());
    fs::write(path, text).map_err(|error| Failure::failed(format!("can't write {}: {error}", path.display())))
}

/// A process that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) part: Part,
    pub(crate) pid: u32,
    pub(crate) status: io::Result<ExitStatus>,
    /// When it was started.
    pub(crate) since: Instant,
}

impl Ended {
    /// How it ended, in words.
    pub(crate) fn how(&self) -> String {
        use std::os::unix::process::ExitStatusExt as _;
        match &self.status {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(0), _) => "has ended".to_string(),
                (Some(code), _) => format!("has failed with code {code}"),
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (None, None) => "has ended somehow".to_string(),
            },
            Err(error) => format!("can't be waited for: {error}"),
        }
    }
}

/// The processes that were started here.
#[derive(Debug)]
pub(crate) struct Parts {
    layout: Layout,
    program: PathBuf,
    children: JoinSet<Ended>,
    running: BTreeMap<Part, u32>,
}

impl Parts {
    pub(crate) fn new(layout: &Layout) -> Result<Parts, Failure> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::failed(format!("can't find the program that runs here: {error}")))?;
        Ok(Parts {
            layout: layout.clone(),
            program,
            children: JoinSet::new(),
            running: BTreeMap::new(),
        })
    }

    /// The command that starts a part again by hand.
    pub(crate) fn command_line(&self, part: Part) -> String {
        let config = self.layout.part_config(part);
        format!(
            "{} {} --config {}",
            self.program.display(),
            part.command(),
            config.display()
        )
    }

    /// Starts a part. Its output goes to the end of its log.
    pub(crate) fn start(&mut self, part: Part) -> Result<(), Failure> {
        let log = self.layout.log(part);
        let what = |error: io::Error| Failure::failed(format!("can't start {part}: {error}"));
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() > LOG_BYTES_MAX) {
            fs::rename(&log, log.with_extension("log.old")).map_err(what)?;
        }
        let output = OpenOptions::new().create(true).append(true).open(&log).map_err(what)?;
        let mut child = Command::new(&self.program)
            .arg(part.command())
            .arg("--config")
            .arg(self.layout.part_config(part))
            .env(PARENT_VARIABLE, "1")
            // These are about some cluster, and perhaps about another one.
            .env_remove(CONFIG_VARIABLE)
            .env_remove(META_VARIABLE)
            // Ctrl-C on the terminal is for this process, which stops the others in order.
            .process_group(0)
            // While the other end of this pipe is open, this process lives.
            .stdin(Stdio::piped())
            .stdout(output.try_clone().map_err(what)?)
            .stderr(output)
            .spawn()
            .map_err(what)?;
        let pid = child.id().unwrap_or(0);
        let since = Instant::now();
        self.running.insert(part, pid);
        let pipe = child.stdin.take();
        self.children.spawn(async move {
            let status = child.wait().await;
            drop(pipe);
            Ended {
                part,
                pid,
                status,
                since,
            }
        });
        Ok(())
    }

    /// The next process that ends. Waits for ever when none runs.
    pub(crate) async fn next_end(&mut self) -> Ended {
        loop {
            match self.children.join_next().await {
                Some(Ok(ended)) => {
                    if self.running.get(&ended.part) == Some(&ended.pid) {
                        self.running.remove(&ended.part);
                    }
                    return ended;
                }
                // A task that only waits for a process does not panic, and nobody aborts it.
                Some(Err(_)) => (),
                None => std::future::pending().await,
            }
        }
    }

    /// Stops all processes of the directory in good order: the export first, so that it gives its volumes back, then the
    /// nodes, then the metadata servers. Also those that somebody has started again by hand. What has not ended in time
    /// is killed; gives what that was.
    pub(crate) async fn stop(&self) -> Vec<Part> {
        let mut killed = Vec::new();
        for command in ["export", "node", "meta"] {
            let of_stage = || {
                let mut running = lock::running(&self.layout);
                running.retain(|(part, _)| part.command() == command);
                running
            };
            for (_, pid) in of_stage() {
                lock::send(pid, Signal::TERM);
            }
            let left = wait_for_none(of_stage, STOP_BOUND).await;
            if !left.is_empty() {
                for (part, pid) in left {
                    lock::send(pid, Signal::KILL);
                    killed.push(part);
                }
                wait_for_none(of_stage, KILL_BOUND).await;
            }
        }
        killed
    }

    /// Kills all processes of the directory at once.
    pub(crate) async fn kill(&self) {
        let running = || lock::running(&self.layout);
        for (_, pid) in running() {
            lock::send(pid, Signal::KILL);
        }
        wait_for_none(running, KILL_BOUND).await;
    }

    /// Removes the files of processes that do not run any more.
    pub(crate) fn forget(layout: &Layout, parts: &[Part]) {
        for part in parts {
            // One that is not there is as good.
            let _ = fs::remove_file(layout.pid_file(*part));
        }
    }
}

/// Waits until nothing is left; gives what is left at the bound.
async fn wait_for_none(look: impl Fn() -> Vec<(Part, u32)>, bound: std::time::Duration) -> Vec<(Part, u32)> {
    let end = Instant::now() + bound;
    loop {
        let left = look();
        if left.is_empty() || Instant::now() >= end {
            return left;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_gets_a_configuration_that_can_be_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path())).unwrap();
        layout.create().unwrap();
        let mut memory = Memory::load(&layout.state()).unwrap();
        memory.assign(3, 2).unwrap();
        let wishes = Wishes {
            device_size: ByteSize(1 << 30),
            nbd_tcp: None,
            log: Some("debug".to_string()),
            rebuild_after: Some("5s".parse().unwrap()),
        };
        write_configs(&layout, &memory, &wishes).unwrap();
        let load = |part| Config::load(&layout.part_config(part)).unwrap();
        let meta = load(Part::Meta(2));
        let section = meta.meta.unwrap();
        assert_eq!((section.id, section.members.len()), (Some(2), 3));
        assert_eq!(section.rebuild_after, wishes.rebuild_after);
        assert_eq!(section.listen.unwrap().to_string(), section.members[1].address);
        assert_eq!(meta.process.pid_file, Some(layout.pid_file(Part::Meta(2))));
        let node = load(Part::Node(2)).node.unwrap();
        assert_eq!(node.devices, [layout.data(Part::Node(2)).join(DEVICE_FILE).into()]);
        assert!(layout.data(Part::Node(2)).is_dir());
        assert_eq!(load(Part::Export).export.unwrap().nbd_unix, Some(layout.socket()));
        let other = Config::load(&layout.config()).unwrap();
        assert_eq!(other.cluster.meta.len(), 3);
        assert!(other.meta.is_none() && other.process.pid_file.is_none());
    }
}
