//! The process of a storage node: it opens its devices, serves each on a thread of its own, and tells meta about them.
//! What serves data needs no meta once its devices are formatted.

pub(crate) mod device;
mod error;
pub mod format;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use cairn_meta::client::MetaClient;
use cairn_meta::metrics::{MetricsServer, serve_metrics};
use cairn_proto::ids::{ClusterId, Generation, VolumeId};
use device::{Device, Phase};
pub use error::NodeError;
use tokio::sync::watch;

use crate::config::{DEVICES_MAX, NodeConfig};
use crate::heartbeat::Reporter;

/// How often meta is asked for the cluster's id while a device waits to be formatted.
const CLUSTER_ID_PAUSE: Duration = Duration::from_millis(200);
/// How long one call of meta may take.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// How long the threads may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);

/// What meta wants a node to take care of, as it said last.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Care {
    /// The node, as meta calls it; 0 before it is registered.
    pub node_id: u64,
    /// Volumes, each with the last generation that was granted when it was given; at most 4.
    pub volumes: Vec<(VolumeId, Generation)>,
}

/// A storage node that has its devices and its ports, and serves nothing yet.
#[derive(Debug)]
pub struct Node {
    config: NodeConfig,
    meta: MetaClient,
    devices: Vec<Device>,
    metrics: Option<MetricsServer>,
    care: watch::Sender<Care>,
}

/// Runs a storage node until `shutdown` ends.
///
/// # Errors
/// It can't start, or no device is left that it may serve; in words that say what to do.
pub async fn run(config: NodeConfig, shutdown: impl Future<Output = ()>) -> Result<(), NodeError> {
    Node::start(config).await?.run(shutdown).await
}

impl Node {
    /// Opens the devices and binds the ports. Connections wait until [`run`](Self::run).
    ///
    /// # Errors
    /// A device can't be used, an address is taken, or the configuration makes no sense.
    pub async fn start(config: NodeConfig) -> Result<Node, NodeError> {
        check(&config)?;
        let metrics = match config.metrics_listen {
            Some(listen) => Some(serve_metrics(listen).await.map_err(NodeError::Metrics)?),
            None => None,
        };
        let meta = MetaClient::new(config.meta.clone())
            .with_cluster_key(&config.cluster_key)
            .with_deadline(CALL_DEADLINE);
        let mut devices = Vec::new();
        for index in 0..config.devices.len() {
            devices.push(Device::prepare(&config, index)?);
        }
        device::check_together(&devices)?;
        tracing::info!(node = config.name, devices = devices.len(), "storage node starts");
        Ok(Node {
            config,
            meta,
            devices,
            metrics,
            care: watch::Sender::new(Care::default()),
        })
    }

    /// Where each device is served, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.devices.iter().map(|device| device.address).collect()
    }

    /// What meta wants this node to take care of. Whoever has a client for that does it: a node only serves devices.
    pub fn care(&self) -> watch::Receiver<Care> {
        self.care.subscribe()
    }

    /// Where metrics are served, if anywhere.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(MetricsServer::local_addr)
    }

    /// Serves until `shutdown` ends, then lets what is in flight end.
    ///
    /// # Errors
    /// No device is left that it may serve.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), NodeError> {
        let outcome = tokio::select! {
            biased;
            () = shutdown => Ok(()),
            error = self.serve() => Err(error),
        };
        self.stop().await;
        outcome
    }

    /// Ends only when nothing is left to serve.
    async fn serve(&mut self) -> NodeError {
        for device in self.devices.iter_mut().filter(|device| !device.is_blank()) {
            device.start(&self.config, None);
        }
        let mut reporter = Reporter::new(&self.config, self.meta.clone(), self.care.clone());
        loop {
            self.format_blank().await;
            for device in &mut self.devices {
                device.look().await;
            }
            if let Some(error) = device::nothing_left(&mut self.devices) {
                return error;
            }
            reporter.report(&mut self.devices).await;
            let pause = if self
                .devices
                .iter()
                .any(|device| device.is_blank() || device.is_opening())
            {
                CLUSTER_ID_PAUSE
            } else {
                reporter.interval()
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// A device with nothing on it is formatted as soon as meta says for which cluster.
    async fn format_blank(&mut self) {
        if !self.devices.iter().any(Device::is_blank) {
            return;
        }
        let Some(cluster) = self.cluster_id().await else {
            return;
        };
        for device in self.devices.iter_mut().filter(|device| device.is_blank()) {
            device.start(&self.config, Some(cluster));
        }
    }

    async fn cluster_id(&self) -> Option<ClusterId> {
        match self.meta.status().await {
            Ok(status) => <[u8; 16]>::try_from(status.cluster_id.as_slice()).ok().map(ClusterId),
            Err(error) => {
                tracing::debug!(%error, "waiting for the cluster's id to format a device");
                None
            }
        }
    }

    async fn stop(&mut self) {
        for device in &self.devices {
            if let Phase::Running(thread) | Phase::Opening(thread, _) = &device.phase {
                thread.stop();
            }
        }
        let ended = async {
            for device in &mut self.devices {
                if let Phase::Running(thread) | Phase::Opening(thread, _) = &mut device.phase
                    && let Err(error) = thread.ended().await
                {
                    tracing::warn!(path = %device.path.display(), %error, "the device's thread");
                }
            }
        };
        if tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err() {
            tracing::warn!("a device does not end what it does: leaving it");
        }
        tracing::info!(node = self.config.name, "storage node has stopped");
    }
}

fn check(config: &NodeConfig) -> Result<(), NodeError> {
    let refuse = |words: String| Err(NodeError::Config(words));
    let is_name_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if config.name.is_empty() || config.name.len() > 128 || !config.name.chars().all(is_name_char) {
        return refuse(format!(
            "`{}` is no name for a node: write 1 to 128 of letters, digits, `-`, `_` and `.`",
            config.name
        ));
    }
    if config.devices.is_empty() || config.devices.len() > DEVICES_MAX {
        return refuse(format!(
            "a node has 1 to {DEVICES_MAX} devices, {} are given",
            config.devices.len()
        ));
    }
    if config.meta.is_empty() {
        return refuse("no metadata server is given: give the address of at least one".to_string());
    }
    if config.listen.ip().is_unspecified() && config.advertise.is_empty() {
        return refuse(format!(
            "it listens on every address of the machine ({}): say at which one clients reach it",
            config.listen
        ));
    }
    if !config.advertise.is_empty() && device::split_address(&config.advertise).is_none() {
        return refuse(format!("`{}` is no address: write host:port", config.advertise));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
