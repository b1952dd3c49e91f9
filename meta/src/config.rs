//! What one metadata server must be told.

use std::net::SocketAddr;
use std::path::PathBuf;

use cairn_proto::capability::ClusterKey;

use crate::heal;

/// One metadata server.
#[derive(Clone, Debug)]
pub struct MetaConfig {
    /// Its number in the cluster, above 0, never used again once removed.
    pub id: u64,
    /// Where its log and state lie. Made when it does not exist. Belongs to one process.
    pub dir: PathBuf,
    /// Where its gRPC service listens.
    pub listen: SocketAddr,
    /// `host:port` where the others reach it; empty for the address that it listens on.
    pub advertise: String,
    /// How a new directory begins. Not looked at when the directory has been used before.
    pub start: MetaStart,
    /// The secret that metadata servers and nodes share.
    pub cluster_key: ClusterKey,
    /// Where Prometheus metrics are served; `None` for nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// How the cluster heals while this one leads. All are told the same.
    pub heal: heal::HealSettings,
}

/// How a metadata server with an empty directory begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaStart {
    /// As one of the first members of a new cluster: all of them, by id and `host:port`, itself included. Every first
    /// member is told the same.
    Bootstrap(Vec<(u64, String)>),
    /// As a further member of a cluster that exists, at these addresses: it has itself added there.
    Join(Vec<String>),
}
