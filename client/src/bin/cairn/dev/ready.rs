//! From started processes to volumes that can be used.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use cairn_meta::client::{ClientError, MetaClient};
use cairn_proto::control::Code;
use cairn_proto::units::ByteSize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::layout::{Layout, Part};
use super::probe::{ProbeError, read_first_block};
use super::say;
use crate::args::VolumeSpec;
use crate::commands::{node, volume};
use crate::failure::{Failure, Kind};
use crate::limits::{POLL_INTERVAL, PROBES_MAX};
use crate::output::{self, count};

/// The volume of a new cluster for which none was asked.
const FIRST_VOLUME: (&str, ByteSize) = ("demo", ByteSize(1 << 30));
/// Copies of a volume, if there are as many nodes.
const COPIES: u32 = 3;

/// How far the start has come: for those who lose patience, and for those who look after the processes meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    waiting_for: RefCell<String>,
    dead: RefCell<BTreeSet<Part>>,
}

impl Progress {
    /// What is waited for.
    pub(crate) fn waiting_for(&self) -> String {
        self.waiting_for.borrow().clone()
    }

    /// A part has died and will not come back by itself: it is not waited for.
    pub(crate) fn without(&self, part: Part) {
        self.dead.borrow_mut().insert(part);
    }

    fn wait_for(&self, what: impl Into<String>) {
        *self.waiting_for.borrow_mut() = what.into();
    }

    /// What has died, in words; empty when nothing has.
    pub(crate) fn losses(&self) -> String {
        let names: Vec<String> = self.dead.borrow().iter().map(Part::to_string).collect();
        match names.len() {
            0 => String::new(),
            1 => format!(" ({} does not run)", names[0]),
            _ => format!(" ({} do not run)", names.join(", ")),
        }
    }

    /// How many parts have died that are run by this command.
    pub(crate) fn dead(&self, command: &str) -> u32 {
        self.dead
            .borrow()
            .iter()
            .filter(|part| part.command() == command)
            .count() as u32
    }

    fn is_dead(&self, part: Part) -> bool {
        self.dead.borrow().contains(&part)
    }
}

/// What is to be brought up.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) meta: MetaClient,
    pub(crate) nodes: u32,
    /// Whether the cluster was never started before.
    pub(crate) is_new: bool,
    pub(crate) volumes: &'a [VolumeSpec],
    pub(crate) progress: &'a Progress,
    pub(crate) began: Instant,
}

impl Start<'_> {
    /// Waits until every volume can be used; gives their names. It has no bound of its own.
    pub(crate) async fn bring_up(&self) -> Result<Vec<String>, Failure> {
        self.wait_for_leader().await;
        self.wait_for_nodes().await?;
        let volumes = self.make_volumes().await?;
        self.probe(&volumes).await
    }

    fn elapsed(&self) -> String {
        format!("{:.1} s", self.began.elapsed().as_secs_f64())
    }

    async fn wait_for_leader(&self) {
        self.progress.wait_for("the metadata servers to choose a leader");
        loop {
            match self.meta.status().await {
                Ok(status) if status.leader_id != 0 && !status.cluster_id.is_empty() => {
                    say!("metadata is up, meta-{} leads ({})", status.leader_id, self.elapsed());
                    return;
                }
                Ok(_) => (),
                Err(error) => self
                    .progress
                    .wait_for(format!("the metadata servers to choose a leader: {error}")),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn wait_for_nodes(&self) -> Result<(), Failure> {
        self.progress.wait_for("the storage nodes to register");
        loop {
            let alive: Vec<String> = self
                .persist(
                    || node::all(&self.meta),
                    "the storage nodes to register",
                    "list the nodes",
                )
                .await?
                .into_iter()
                .filter(|node| node.seems_alive && node.devices.iter().any(|device| device.seems_alive))
                .map(|node| node.name)
                .collect();
            let is_missing = |part: &Part| !alive.contains(&part.to_string()) && !self.progress.is_dead(*part);
            let missing: Vec<String> = (1..=self.nodes)
                .map(Part::Node)
                .filter(is_missing)
                .map(|part| part.to_string())
                .collect();
            if missing.is_empty() {
                say!("{} up ({})", are(alive.len(), "storage node"), self.elapsed());
                return Ok(());
            }
            self.progress.wait_for(format!("{} to register", missing.join(", ")));
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Creates what was asked for and does not exist. Gives the names of all volumes that there are then.
    async fn make_volumes(&self) -> Result<Vec<String>, Failure> {
        self.progress.wait_for("the list of volumes");
        let existing = self
            .persist(|| volume::all(&self.meta), "the list of volumes", "list volumes")
            .await?;
        let mut wanted = self.volumes.to_vec();
        if self.is_new && wanted.is_empty() && existing.is_empty() {
            wanted.push(VolumeSpec {
                name: FIRST_VOLUME.0.to_string(),
                size: FIRST_VOLUME.1,
            });
        }
        let mut names: BTreeSet<String> = existing.iter().map(|volume| volume.name.clone()).collect();
        for spec in &wanted {
            if let Some(volume) = existing.iter().find(|volume| volume.name == spec.name) {
                if volume.size_bytes != spec.size.0 {
                    let size = ByteSize(volume.size_bytes);
                    say!(
                        "volume {} exists and has {size}, not {}: `cairn volume grow` makes it larger",
                        spec.name,
                        spec.size
                    );
                }
            } else if names.insert(spec.name.clone()) {
                self.create(spec).await?;
            }
        }
        Ok(names.into_iter().collect())
    }

    async fn create(&self, spec: &VolumeSpec) -> Result<(), Failure> {
        let what = format!("room for volume {}", spec.name);
        self.progress.wait_for(&what);
        let copies = COPIES.min(self.nodes);
        let request = volume::create_request(&spec.name, spec.size, copies);
        let doing = format!("create volume `{}`", spec.name);
        match self
            .persist(|| self.meta.create_volume(request.clone()), &what, &doing)
            .await
        {
            // An attempt without an answer had made it.
            Err(failure) if failure.kind == Kind::Exists => (),
            other => drop(other?),
        }
        say!(
            "created volume {} ({}, {})",
            spec.name,
            spec.size,
            if copies == 1 {
                "a single copy".to_string()
            } else {
                format!("{copies} copies")
            }
        );
        Ok(())
    }

    /// Repeats a call until it succeeds, as long as what it says may pass by itself. `what` is waited for, `doing` is tried.
    async fn persist<T, F>(&self, call: impl Fn() -> F, what: &str, doing: &str) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        loop {
            let error = match call().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let passes = matches!(
                error.code,
                Code::Unreachable
                    | Code::Timeout
                    | Code::NotReady
                    | Code::NotLeader
                    | Code::Busy
                    | Code::NotEnoughDevices
            );
            if !passes {
                return Err(Failure::of_meta(doing, &self.meta.endpoints(), &error));
            }
            self.progress.wait_for(format!("{what}: {error}"));
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until each volume has answered a read, and says so of each at once: one that waits for a lost node does not
    /// hold back the others. Gives those that are ready: all but what was deleted in the meantime.
    async fn probe(&self, volumes: &[String]) -> Result<Vec<String>, Failure> {
        let mut probes = JoinSet::new();
        let permits = Arc::new(Semaphore::new(PROBES_MAX));
        let last_error = Arc::new(Mutex::new(String::new()));
        for volume in volumes.iter().cloned() {
            let (socket, meta) = (self.layout.socket(), self.meta.clone());
            let (permits, last_error) = (permits.clone(), last_error.clone());
            probes.spawn(async move {
                let _permit = permits.acquire().await;
                let exists = until_it_answers(&socket, &meta, &volume, &last_error).await;
                (volume, exists)
            });
        }
        let mut waiting: BTreeSet<&String> = volumes.iter().collect();
        let mut ready = Vec::new();
        while !waiting.is_empty() {
            let names = waiting
                .iter()
                .take(3)
                .map(|name| name.as_str())
                .collect::<Vec<_>>()
                .join(", ");
            let error = last_error.lock().map(|last| last.clone()).unwrap_or_default();
            let waiting_for = count(waiting.len() as u64, "volume");
            self.progress
                .wait_for(format!("{waiting_for} to answer a read: {names}{error}"));
            tokio::select! {
                probed = probes.join_next() => if let Some(Ok((name, exists))) = probed {
                    waiting.remove(&name);
                    if exists {
                        output::print(&format!("ready {}\n", self.layout.uri(&name)))?;
                        ready.push(name);
                    }
                },
                () = tokio::time::sleep(POLL_INTERVAL) => (),
            }
        }
        Ok(ready)
    }
}

/// Whether the volume has answered; if not, it was deleted.
async fn until_it_answers(socket: &Path, meta: &MetaClient, volume: &str, last_error: &Mutex<String>) -> bool {
    while let Err(error) = read_first_block(socket, volume).await {
        if let Ok(mut last) = last_error.lock() {
            *last = format!(" (volume {volume}: {error})");
        }
        if matches!(error, ProbeError::Refused(_)) {
            let look = meta.get_volume(volume::by_name_request(volume)).await;
            if look.is_err_and(|error| error.code == Code::VolumeNotFound) {
                return false;
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    true
}

/// `1 node is`, `2 nodes are`.
fn are(number: usize, one: &str) -> String {
    format!(
        "{} {}",
        count(number as u64, one),
        if number == 1 { "is" } else { "are" }
    )
}
