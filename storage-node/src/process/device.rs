//! One device of the process, from its path to its thread.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cairn_proto::checksum::ChecksumAlgorithm;
use cairn_proto::ids::{ClusterId, DeviceUuid, Incarnation};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::NodeError;
use crate::config::NodeConfig;
use crate::driver::{DeviceError, DeviceFile, DevicePath, DeviceThread, DriverError, Opened, ThreadConfig, WriteCache};
use crate::host::HostStatus;
use crate::store::{FormatParams, Identity, OpenError, Probe};

/// How long a node that was killed may still have its device and its port: the kernel ends what its ring had in flight
/// only after the process itself is gone.
const PREDECESSOR_BOUND: Duration = Duration::from_secs(5);
/// How often it is looked whether they are free.
const PREDECESSOR_INTERVAL: Duration = Duration::from_millis(50);

/// How far a device is.
pub(crate) enum Phase {
    /// Nothing is on it, and it is not known yet for which cluster it is to be formatted.
    Blank(DeviceFile, TcpListener),
    /// It was formatted before, and its thread has not been started.
    Formatted(DeviceFile, TcpListener, Identity),
    /// Its thread formats or recovers it.
    Opening(DeviceThread, oneshot::Receiver<Opened>),
    /// It is served.
    Running(DeviceThread),
    /// It is not served any more.
    Ended(Option<NodeError>),
}

impl std::fmt::Debug for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Blank(..) => "Blank",
            Phase::Formatted(..) => "Formatted",
            Phase::Opening(..) => "Opening",
            Phase::Running(_) => "Running",
            Phase::Ended(_) => "Ended",
        })
    }
}

/// One device.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) path: PathBuf,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Where clients reach it.
    pub(crate) advertised: String,
    /// Its write cache.
    pub(crate) write_cache: WriteCache,
    pub(crate) phase: Phase,
    /// Once it is served.
    pub(crate) opened: Option<Opened>,
    /// Why it is not served any more, once it was.
    pub(crate) trouble: Option<String>,
    /// How it was when its thread answered last.
    pub(crate) last_status: Option<HostStatus>,
}

impl Device {
    /// Opens the device with this index of the configuration, sees what is on it, and binds its port.
    pub(super) fn prepare(config: &NodeConfig, index: usize) -> Result<Device, NodeError> {
        let wanted = &config.devices[index];
        let path = wanted.path.clone();
        let of_device = |error| NodeError::Device {
            path: path.clone(),
            error,
        };
        let place = DevicePath {
            path: path.clone(),
            create_size: wanted.create_size,
            volatile_cache: wanted.volatile_cache,
        };
        let in_use = |error: &DeviceError| matches!(error, DeviceError::InUse);
        let file = after_predecessor(|| DeviceFile::open(&place), in_use).map_err(of_device)?;
        let found = file.probe().map_err(of_device)?;
        let mut address = config.listen;
        if address.port() != 0 {
            address.set_port(nth_port(address.port(), index)?);
        }
        let in_use = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
        let listener = after_predecessor(|| TcpListener::bind(address), in_use)
            .map_err(|error| NodeError::Listen { address, error })?;
        let address = listener
            .local_addr()
            .map_err(|error| NodeError::Listen { address, error })?;
        let advertised = match split_address(&config.advertise) {
            Some((host, port)) => format!("{host}:{}", nth_port(port, index)?),
            None => address.to_string(),
        };
        let write_cache = file.write_cache();
        tracing::info!(
            path = %path.display(), %address, advertised, blocks = file.geometry().blocks, %write_cache, "device"
        );
        if write_cache.by_operator && !write_cache.volatile {
            let found = if write_cache.detected_volatile {
                "a volatile one"
            } else {
                "none"
            };
            tracing::warn!(
                path = %path.display(),
                "the operator says that the device has no volatile write cache ({found} was detected): nothing is flushed, and \
                 if that is wrong, a power failure loses writes that were acknowledged"
            );
        }
        let store_error = |error| NodeError::Store {
            path: path.clone(),
            error,
        };
        let phase = match found {
            Probe::Blank | Probe::Unfinished => Phase::Blank(file, listener),
            Probe::Cairn(superblock) => Phase::Formatted(file, listener, superblock.identity),
            Probe::Foreign { words } => return Err(store_error(OpenError::Foreign { words })),
            Probe::Truncated { expected, found } => return Err(store_error(OpenError::Truncated { expected, found })),
            Probe::Damaged { words } => return Err(store_error(OpenError::Damaged { words })),
        };
        Ok(Device {
            path,
            address,
            advertised,
            write_cache,
            phase,
            opened: None,
            trouble: None,
            last_status: None,
        })
    }

    pub(super) fn is_blank(&self) -> bool {
        matches!(self.phase, Phase::Blank(..))
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running(_))
    }

    pub(super) fn is_opening(&self) -> bool {
        matches!(self.phase, Phase::Opening(..))
    }

    /// Starts its thread. A blank device is formatted for the cluster.
    pub(super) fn start(&mut self, config: &NodeConfig, cluster: Option<ClusterId>) {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Ended(None)) {
            Phase::Blank(file, listener) => {
                match cluster.ok_or(None).and_then(|cluster| fresh(cluster).map_err(Some)) {
                    Ok(params) => {
                        let (device, incarnation) = (params.device, params.incarnation);
                        tracing::info!(path = %self.path.display(), %device, %incarnation, cluster = %params.cluster, "formatting");
                        start_thread(config, file, listener, Some(params), None)
                    }
                    Err(None) => Phase::Blank(file, listener),
                    Err(Some(error)) => Phase::Ended(Some(error)),
                }
            }
            Phase::Formatted(file, listener, identity) => {
                start_thread(config, file, listener, None, Some(identity.device.uuid))
            }
            other => other,
        };
    }

    /// Sees whether its thread has got further.
    pub(super) async fn look(&mut self) {
        if let Phase::Opening(thread, when_opened) = &mut self.phase {
            match when_opened.try_recv() {
                Ok(opened) => {
                    self.opened = Some(opened);
                    self.meter(&opened);
                    let phase = std::mem::replace(&mut self.phase, Phase::Ended(None));
                    if let Phase::Opening(thread, _) = phase {
                        self.phase = Phase::Running(thread);
                    }
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Closed) => {
                    let error = thread.ended().await.err().unwrap_or(DriverError::Panicked);
                    self.end(error);
                }
            }
        }
        if let Phase::Running(thread) = &mut self.phase
            && let Some(outcome) = thread.try_ended()
        {
            self.end(outcome.err().unwrap_or(DriverError::Panicked));
        }
    }

    fn meter(&self, opened: &Opened) {
        let device = opened.identity.device.uuid.to_string();
        let by = if self.write_cache.by_operator {
            "operator"
        } else {
            "detection"
        };
        let volatile = metrics::gauge!("cairn_node_volatile_write_cache", "device" => device, "by" => by);
        volatile.set(if self.write_cache.volatile { 1.0 } else { 0.0 });
    }

    fn end(&mut self, error: DriverError) {
        let path = self.path.clone();
        let error = match error {
            DriverError::Store(error) => NodeError::Store { path, error },
            error => NodeError::Ended { path, error },
        };
        tracing::error!("{error}");
        self.trouble = Some(error.to_string());
        self.phase = Phase::Ended(Some(error));
    }

    /// Meta does not let it be served: it may be served elsewhere, or is of another cluster.
    pub(crate) fn refuse(&mut self, words: String) {
        let path = self.path.clone();
        let error = NodeError::Refused { path, words };
        tracing::error!("{error}");
        self.opened = None;
        // Dropping the thread's handle asks it to end.
        self.phase = Phase::Ended(Some(error));
    }
}

fn start_thread(
    config: &NodeConfig,
    device: DeviceFile,
    listener: TcpListener,
    format: Option<FormatParams>,
    expect: Option<DeviceUuid>,
) -> Phase {
    let store = config.limits.store_of(config.devices.len(), device.is_block_device());
    let started = DeviceThread::start(ThreadConfig {
        device,
        format,
        expect,
        listener,
        cluster_key: config.cluster_key.clone(),
        host: config.limits.host,
        background: config.background,
        store,
        driver: config.limits.driver,
        #[cfg(feature = "canary")]
        planted: config.limits.planted,
    });
    match started {
        Ok((thread, when_opened)) => Phase::Opening(thread, when_opened),
        Err(error) => Phase::Ended(Some(NodeError::System(error))),
    }
}

/// A new device: its name and its incarnation are drawn at random.
fn fresh(cluster: ClusterId) -> Result<FormatParams, NodeError> {
    Ok(FormatParams {
        cluster,
        device: DeviceUuid(random()?),
        incarnation: Incarnation(u64::from_le_bytes(random()?).max(1)),
        checksum: ChecksumAlgorithm::Crc32,
    })
}

/// Random bytes of the operating system.
#[expect(clippy::disallowed_methods, reason = "a process draws names from the system")]
pub(crate) fn random<const N: usize>() -> Result<[u8; N], NodeError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| NodeError::System(error.into()))?;
    Ok(bytes)
}

/// Devices of one node are distinct, and of one cluster.
pub(super) fn check_together(devices: &[Device]) -> Result<(), NodeError> {
    let formatted = devices.iter().filter_map(|device| match &device.phase {
        Phase::Formatted(_, _, identity) => Some((device, identity)),
        _ => None,
    });
    let mut seen: Vec<(&Device, &Identity)> = Vec::new();
    for (device, identity) in formatted {
        for (other, other_identity) in &seen {
            let (one, two) = (other.path.display(), device.path.display());
            if identity.device.uuid == other_identity.device.uuid {
                return Err(NodeError::Together(format!(
                    "{one} and {two} say to be the same device, {}: one is a copy of the other; take the copy away",
                    identity.device.uuid
                )));
            }
            if identity.cluster != other_identity.cluster {
                return Err(NodeError::Together(format!(
                    "{one} belongs to cluster {}, {two} to {}: check which disks belong into this node",
                    other_identity.cluster, identity.cluster
                )));
            }
        }
        seen.push((device, identity));
    }
    Ok(())
}

/// The first device's error, once no device is served or will be.
pub(super) fn nothing_left(devices: &mut [Device]) -> Option<NodeError> {
    let all_ended = devices.iter().all(|device| matches!(device.phase, Phase::Ended(_)));
    if !all_ended {
        return None;
    }
    devices.iter_mut().find_map(|device| match &mut device.phase {
        Phase::Ended(error) => error.take(),
        _ => None,
    })
}

/// Host and port of `host:port`.
pub(super) fn split_address(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port > 0)?;
    (!host.is_empty()).then_some((host, port))
}

fn nth_port(first: u16, index: usize) -> Result<u16, NodeError> {
    let port = usize::from(first) + index;
    u16::try_from(port).map_err(|_| {
        NodeError::Config(format!(
            "device {} would be at port {port}, which does not exist: choose a lower first port than {first}",
            index + 1
        ))
    })
}

/// Tries again, for a bounded time, while something is in use.
#[allow(clippy::disallowed_methods, reason = "the kernel takes real time to let go")]
fn after_predecessor<T, E>(mut attempt: impl FnMut() -> Result<T, E>, in_use: impl Fn(&E) -> bool) -> Result<T, E> {
    let end = Instant::now() + PREDECESSOR_BOUND;
    loop {
        match attempt() {
            Err(error) if in_use(&error) && Instant::now() < end => std::thread::sleep(PREDECESSOR_INTERVAL),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_let_go_of_soon_is_waited_for_and_other_errors_are_not() {
        let mut answers = [Err("in use"), Err("in use"), Ok(7), Err("asked once too often")].into_iter();
        let in_use = |error: &&str| *error == "in use";
        assert_eq!(after_predecessor(|| answers.next().unwrap(), in_use), Ok(7));
        let mut answers = [Err("broken"), Ok(7)].into_iter();
        assert_eq!(after_predecessor(|| answers.next().unwrap(), in_use), Err("broken"));
    }
}
