//! The caretaker: a node repairs volumes that no guest holds.
//!
//! Meta says which volumes a node shall take care of, in the answers to its heartbeats. For each the node runs the same
//! coordinator that guests run, under an attachment that meta grants only where no guest can be hurt by it, and does nothing
//! with it: attaching compares the members of each group and makes them equal, and a coordinator by itself fills who joins.
//! When all groups have been whole for a while the volume is released. A guest that attaches takes the volume over at
//! once, and the caretaker ends without a word.
//!
//! `plan` decides without I/O which volumes are taken; here is the edge. What is done with a volume that is held is
//! the business of the [core](crate::core).

pub mod limits;
pub mod plan;

use std::future::Future;

use cairn_meta::client::MetaClient;
use cairn_proto::ids::{Generation, VolumeId};
use cairn_proto::time::Time;
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::limits::TICK;
use self::plan::Plan;
use crate::core::ClientCore;
use crate::driver::library::start_client;
use crate::driver::{CareEnded, Running, Settings, describe_id};

/// A volume to take care of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Task {
    /// Which.
    pub volume: VolumeId,
    /// The last generation granted when the task was given.
    pub generation_seen: Generation,
}

/// All that meta wants of this node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tasks {
    /// The node, as meta calls it.
    pub node_id: u64,
    /// The volumes; at most 4.
    pub tasks: Vec<Task>,
}

/// The client of a caretaker: it exists while there is something to do.
struct Client {
    running: std::sync::Arc<Running>,
    node_id: u64,
}

/// Takes care of what meta wants, until `shutdown` ends; then releases what is held. `meta` are the metadata servers
/// (`host:port`), `name` the node's, for people who ask who holds a volume. It never fails: what can't be done now is
/// tried later.
pub async fn run(meta: Vec<String>, name: String, tasks: watch::Receiver<Tasks>, shutdown: impl Future<Output = ()>) {
    let mut caretaker = Caretaker {
        meta,
        words: format!("caretaker on node {name}"),
        tasks,
        began: tokio::time::Instant::now(),
        plan: Plan::default(),
        client: None,
        work: JoinSet::new(),
    };
    tokio::select! {
        biased;
        () = shutdown => {}
        () = caretaker.serve() => {}
    }
    if let Some(client) = caretaker.client.take() {
        client.running.stop();
        // Each piece of work ends when its volume is released, or the thread has given that up.
        while caretaker.work.join_next().await.is_some() {}
    }
}

struct Caretaker {
    meta: Vec<String>,
    words: String,
    tasks: watch::Receiver<Tasks>,
    began: tokio::time::Instant,
    plan: Plan,
    client: Option<Client>,
    work: JoinSet<(VolumeId, CareEnded)>,
}

impl Caretaker {
    fn now(&self) -> Time {
        Time::ZERO + self.began.elapsed()
    }

    async fn serve(&mut self) {
        loop {
            tokio::select! {
                Some(ended) = self.work.join_next() => {
                    if let Ok((volume, ended)) = ended {
                        tracing::info!(volume = volume.0, granted = ?ended.granted, "took care of a volume");
                        self.plan.ended(self.now(), volume, ended.granted);
                    }
                }
                changed = self.tasks.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let told = self.tasks.borrow_and_update().clone();
                    self.plan.told(self.now(), &told.tasks);
                }
                () = tokio::time::sleep(TICK), if self.plan.wake().is_some() => {}
            }
            while let Some(volume) = self.plan.begin(self.now()) {
                self.begin(volume).await;
            }
        }
    }

    async fn begin(&mut self, volume: VolumeId) {
        let Some(running) = self.client().await else {
            return self.plan.ended(self.now(), volume, None);
        };
        let meta = MetaClient::new(self.meta.clone());
        self.work.spawn(async move {
            let ended = match describe_id(&meta, volume).await {
                Ok(description) => running.care(description).await,
                Err(error) => {
                    tracing::info!(volume = volume.0, %error, "can't take care of a volume");
                    CareEnded { granted: None }
                }
            };
            (volume, ended)
        });
    }

    /// The client; of the node as meta calls it now.
    async fn client(&mut self) -> Option<std::sync::Arc<Running>> {
        let node_id = self.tasks.borrow().node_id;
        if let Some(client) = self
            .client
            .as_ref()
            .filter(|client| client.node_id == node_id && !client.running.is_over())
        {
            return Some(client.running.clone());
        }
        let settings = Settings {
            node_id,
            ..Settings::default()
        };
        let started = start_client(
            self.meta.clone(),
            self.words.clone(),
            settings,
            Vec::new(),
            ClientCore::new,
        );
        match started.await {
            Ok(running) => {
                let running = std::sync::Arc::new(running);
                self.client = Some(Client {
                    running: running.clone(),
                    node_id,
                });
                Some(running)
            }
            Err(error) => {
                tracing::warn!(%error, "can't take care of volumes");
                None
            }
        }
    }
}
