//! The process: log, driver thread, gRPC services, connections to the other members.

mod control;
mod convert;
mod driver;
mod health;
mod members;
mod nodes;
mod soft;
#[cfg(test)]
mod tests;
mod transport;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use cairn_proto::control::v1::AddMemberRequest;
use cairn_proto::control::v1::control_server::ControlServer;
use cairn_proto::control::v1::members_server::MembersServer;
use cairn_proto::control::v1::nodes_server::NodesServer;
use cairn_proto::control::{Code, TokenPurpose};
use cairn_proto::ids::ClusterId;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;

use crate::client::MetaClient;
use crate::config::{MetaConfig, MetaStart};
use crate::limits::{RPC_BYTES_MAX, RPCS_PER_CONNECTION_MAX};
use crate::log::sled::{Identity, SledLogStore};
use crate::log::{LogError, LogStore as _, Stored};
use crate::metrics::{MetricsError, serve_metrics};
use crate::raft::{MetaNode, NodeConfig, NodeError, bootstrap};
use crate::state::model::Member;
use control::ControlService;
use driver::{Driver, End, Event, Handle, Myself};
use members::MembersService;
use nodes::NodesService;
use transport::Transport;

/// How long requests in work may take to end when the process is to stop.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a client that says nothing is asked whether it is still there, and how long it may take to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// The pause between two attempts to be added to a cluster.
const JOIN_PAUSE: Duration = Duration::from_millis(500);

/// Why a metadata server does not run, or no longer.
#[derive(Debug)]
pub enum MetaError {
    /// It was told something that can't be.
    Config(String),
    /// Its address can't be listened on.
    Listen(SocketAddr, std::io::Error),
    /// Its directory can't be used.
    Log(LogError),
    /// Its Raft node has stopped.
    Node(NodeError),
    /// Its metrics can't be served.
    Metrics(MetricsError),
    /// It was removed from the cluster.
    Removed(u64),
    /// The cluster does not want it.
    Rejected(String),
    /// The service has ended by itself.
    Service(String),
}

impl fmt::Display for MetaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetaError::Config(what) | MetaError::Rejected(what) => f.write_str(what),
            MetaError::Listen(address, error) => {
                write!(
                    f,
                    "can't listen on {address} ({error}): choose another address, or end what uses it"
                )
            }
            MetaError::Log(error) => write!(f, "{error}"),
            MetaError::Node(error) => write!(f, "{error}"),
            MetaError::Metrics(error) => write!(f, "{error}"),
            MetaError::Removed(id) => write!(
                f,
                "metadata server {id} was removed from the cluster: its directory is of no use any more"
            ),
            MetaError::Service(what) => write!(f, "the metadata service has ended: {what}"),
        }
    }
}

impl std::error::Error for MetaError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            MetaError::Listen(_, error) => Some(error),
            MetaError::Log(error) => Some(error),
            MetaError::Node(error) => Some(error),
            MetaError::Metrics(error) => Some(error),
            _ => None,
        }
    }
}

impl From<LogError> for MetaError {
    fn from(error: LogError) -> MetaError {
        MetaError::Log(error)
    }
}

/// Runs a metadata server until `shutdown` completes.
///
/// # Errors
/// It could not start, or had to stop: [`MetaError`] says why in words.
pub async fn run(config: MetaConfig, shutdown: impl Future<Output = ()>) -> Result<(), MetaError> {
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|error| MetaError::Listen(config.listen, error))?;
    run_on(listener, config, shutdown).await
}

/// As [`run`], on a socket that listens already.
///
/// # Errors
/// As [`run`].
pub async fn run_on(
    listener: TcpListener,
    config: MetaConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), MetaError> {
    let address = check(&config, &listener)?;
    let _metrics = match config.metrics_listen {
        Some(listen) => Some(serve_metrics(listen).await.map_err(MetaError::Metrics)?),
        None => None,
    };
    let (id, dir, start) = (config.id, config.dir.clone(), config.start.clone());
    let opened = tokio::task::spawn_blocking(move || open(id, dir, &start)).await;
    let (log, identity, is_waiting) = opened.map_err(|error| MetaError::Service(error.to_string()))??;
    let myself = Myself {
        id,
        address,
        directory: identity.directory,
        cluster_draft: ClusterId(random()?),
    };
    tracing::info!(id, address = %myself.address, dir = %config.dir.display(), "metadata server starts");
    let node = MetaNode::new(NodeConfig::new(id, u64::from_le_bytes(random()?)), log).map_err(MetaError::Node)?;
    let (handle, events) = driver::channel();
    let token = TokenPurpose::Member.token(&config.cluster_key);
    let transport = Transport::new(handle.clone(), myself.clone(), token);
    let mut driver = Driver::new(myself.clone(), node, events, transport, handle.rejections.clone());
    driver.heal_by(config.heal);
    let (ended, end) = oneshot::channel();
    let thread = std::thread::Builder::new().name(format!("meta-{id}")).spawn(move || {
        // Nobody listens when the service has ended first.
        let _ = ended.send(driver.run());
    });
    let thread = thread.map_err(|error| MetaError::Service(format!("can't start a thread: {error}")))?;
    let join = is_waiting.then(|| tokio::spawn(join(config.clone(), myself.clone())));
    let result = serve(listener, &config, handle.clone(), end, shutdown).await;
    if let Some(join) = join {
        join.abort();
    }
    stop(handle, thread).await;
    result
}

/// Ends the driver's thread and with it the use of the directory.
async fn stop(handle: Handle, thread: std::thread::JoinHandle<()>) {
    let joined = tokio::task::spawn_blocking(move || {
        let mut event = Event::Stop;
        while !thread.is_finished() {
            match handle.offer(event) {
                Ok(()) => break,
                Err(refusal) if refusal.code == Code::Internal => break,
                // The queue is full; the driver takes from it.
                Err(_) => std::thread::yield_now(),
            }
            event = Event::Stop;
        }
        thread.join()
    });
    if !matches!(joined.await, Ok(Ok(()))) {
        tracing::error!("the thread of the metadata server has panicked");
    }
}

fn check(config: &MetaConfig, listener: &TcpListener) -> Result<String, MetaError> {
    let fail = |what: String| Err(MetaError::Config(what));
    if config.id == 0 {
        return fail("a metadata server needs an id above 0".to_string());
    }
    let address = if config.advertise.is_empty() {
        let local = listener
            .local_addr()
            .map_err(|error| MetaError::Listen(config.listen, error))?;
        if local.ip().is_unspecified() {
            return fail(format!(
                "{local} does not say where the others find this metadata server: set `advertise`"
            ));
        }
        local.to_string()
    } else {
        config.advertise.clone()
    };
    let shortest = Duration::from_millis(crate::limits::REBUILD_AFTER_MS.1);
    if config.heal.rebuild_after < shortest {
        return fail(format!(
            "copies can't be rebuilt after {} ms: give at least {} s, or a node that restarts would start copies",
            config.heal.rebuild_after.as_millis(),
            shortest.as_secs()
        ));
    }
    if let MetaStart::Bootstrap(members) = &config.start {
        let mut ids: Vec<u64> = members.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() != members.len() || !ids.contains(&config.id) || ids[0] == 0 {
            return fail(format!(
                "the first members must have distinct ids above 0, and metadata server {} must be one of them",
                config.id
            ));
        }
        if members.len() > crate::limits::META_MEMBERS_MAX {
            return fail(format!(
                "there can be at most {} metadata servers",
                crate::limits::META_MEMBERS_MAX
            ));
        }
    }
    Ok(address)
}

/// Opens the directory, or makes a new one. The flag: the log is empty, so the member waits to be added.
fn open(id: u64, dir: PathBuf, start: &MetaStart) -> Result<(SledLogStore, Identity, bool), MetaError> {
    let mut log = SledLogStore::open(&dir)?;
    let identity = match log.identity() {
        Some(identity) if identity.id != id => {
            return Err(MetaError::Config(format!(
                "{} belongs to metadata server {}, not {id}: give each one its own directory",
                dir.display(),
                identity.id
            )));
        }
        Some(identity) => identity,
        None => {
            let directory = u64::from_le_bytes(random()?).max(1);
            let identity = Identity { id, directory };
            let stored = match start {
                MetaStart::Bootstrap(members) => {
                    let member = |(id, address): &(u64, String)| {
                        (
                            *id,
                            Member {
                                address: address.clone(),
                                directory: 0,
                            },
                        )
                    };
                    bootstrap(members.iter().map(member).collect::<BTreeMap<u64, Member>>())
                }
                MetaStart::Join(_) => Stored::default(),
            };
            log.initialise(identity, &stored)?;
            identity
        }
    };
    let is_waiting = log.load()?.snapshot.is_empty();
    Ok((log, identity, is_waiting))
}

#[expect(
    clippy::disallowed_methods,
    reason = "ids of directories, runs and clusters come from here"
)]
fn random<const N: usize>() -> Result<[u8; N], MetaError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| MetaError::Service(format!("the system has no randomness: {error}")))?;
    Ok(bytes)
}

/// Has this member added to the cluster, as often as it takes.
async fn join(config: MetaConfig, myself: Myself) {
    let MetaStart::Join(endpoints) = config.start else {
        return;
    };
    let client = MetaClient::new(endpoints).with_cluster_key(&config.cluster_key);
    let request = AddMemberRequest {
        id: myself.id,
        address: myself.address,
        directory: myself.directory,
    };
    while let Err(error) = client.add_member(request.clone()).await {
        tracing::error!("can't be added to the cluster: {error}");
        tokio::time::sleep(JOIN_PAUSE).await;
    }
}

async fn serve(
    listener: TcpListener,
    config: &MetaConfig,
    handle: Handle,
    end: oneshot::Receiver<End>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), MetaError> {
    let key = &config.cluster_key;
    let control = ControlService {
        handle: handle.clone(),
        key: key.clone(),
    };
    let nodes = NodesService {
        handle: handle.clone(),
        key: key.clone(),
    };
    let members = MembersService {
        handle: handle.clone(),
        key: key.clone(),
        id: config.id,
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .concurrency_limit_per_connection(RPCS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .add_service(ControlServer::new(control).max_decoding_message_size(RPC_BYTES_MAX))
        .add_service(NodesServer::new(nodes).max_decoding_message_size(RPC_BYTES_MAX))
        .add_service(MembersServer::new(members).max_decoding_message_size(RPC_BYTES_MAX))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
            // Either way it is time to stop.
            let _ = stopped.await;
        });
    tokio::pin!(server, shutdown, end);
    let result = tokio::select! {
        ended = &mut end => Err(match ended {
            Ok(End::Removed) => MetaError::Removed(config.id),
            Ok(End::Rejected(refusal)) => MetaError::Rejected(refusal.message),
            Ok(End::Failed(error)) => MetaError::Node(error),
            Ok(End::Stopped) | Err(_) => MetaError::Service("its thread is gone".to_string()),
        }),
        result = &mut server => {
            return Err(MetaError::Service(result.err().map_or("it closed".to_string(), |error| error.to_string())));
        }
        () = &mut shutdown => Ok(()),
    };
    handle.wind_down().await;
    drop(stop);
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, server).await;
    result
}
