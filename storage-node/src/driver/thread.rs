//! The thread of a device, as the rest of the process sees it.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;

use cairn_proto::capability::ClusterKey;
use cairn_proto::ids::{CommitSeq, DeviceUuid};
use tokio::sync::oneshot;

use super::control::{Control, ControlQueue};
use super::device::DeviceFile;
use super::limits::DriverLimits;
use super::ring::Ring;
use super::serve::Serving;
use super::{clock, open};
use crate::host::limits::HostLimits;
use crate::host::{BackgroundConfig, DeviceHost, HeldReplica, HostConfig, HostStatus};
use crate::store::{FormatParams, Identity, OpenError, OpenExpectation, StoreLimits};

/// What a device's thread needs.
pub struct ThreadConfig {
    /// The device. Nobody else has it.
    pub device: DeviceFile,
    /// Write it afresh first; everything on it is lost.
    pub format: Option<FormatParams>,
    /// Which device it must be; `None` when it is formatted.
    pub expect: Option<DeviceUuid>,
    /// Where clients connect.
    pub listener: TcpListener,
    /// With which capabilities are verified.
    pub cluster_key: ClusterKey,
    /// Bounds of the host.
    pub host: HostLimits,
    /// What it does when nobody asks; the wall clock is the machine's.
    pub background: BackgroundConfig,
    /// Bounds of the store.
    pub store: StoreLimits,
    /// Bounds of the driver.
    pub driver: DriverLimits,
    /// A planted bug of the host.
    #[cfg(feature = "canary")]
    pub planted: crate::host::Canary,
}

/// A device that is being served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    /// Who it is.
    pub identity: Identity,
    /// Its commit sequence as recovered.
    pub recovered: CommitSeq,
}

/// Why a device's thread has ended.
#[derive(Debug)]
pub enum DriverError {
    /// The store can't be formatted or opened.
    Store(OpenError),
    /// The operating system refused.
    Io {
        /// What was being done.
        doing: &'static str,
        /// What it said.
        error: io::Error,
    },
    /// It was asked to end while it was opening the device.
    Stopped,
    /// It ended without a word: a bug, see the log.
    Panicked,
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DriverError::Store(error) => error.fmt(f),
            DriverError::Io { doing, error } => write!(f, "{doing} failed: {error}"),
            DriverError::Stopped => f.write_str("it was stopped while it was opened"),
            DriverError::Panicked => f.write_str("its thread ended by a bug: see the log, and report it"),
        }
    }
}

impl std::error::Error for DriverError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DriverError::Store(error) => Some(error),
            DriverError::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A running thread. Dropping it asks the thread to end and does not wait.
pub struct DeviceThread {
    control: Arc<ControlQueue>,
    ended: Option<oneshot::Receiver<Result<(), DriverError>>>,
}

impl DeviceThread {
    /// Starts it: the device is formatted if asked for, opened and served. The second part tells when it is served.
    ///
    /// # Errors
    /// No thread or eventfd is to be had.
    pub fn start(config: ThreadConfig) -> io::Result<(DeviceThread, oneshot::Receiver<Opened>)> {
        let control = ControlQueue::new(config.driver.control_messages)?;
        let (opened, when_opened) = oneshot::channel();
        let (ended, when_ended) = oneshot::channel();
        let queue = control.clone();
        std::thread::Builder::new()
            .name("cairn-device".to_string())
            .spawn(move || {
                // The receiver is gone when nobody cares any more.
                let _ = ended.send(run(config, &queue, opened));
            })?;
        let ended = Some(when_ended);
        Ok((DeviceThread { control, ended }, when_opened))
    }

    /// How the device is; `None` when its thread has ended or is stuck.
    pub async fn status(&self) -> Option<HostStatus> {
        let (reply, answer) = oneshot::channel();
        self.control.push(Control::Status(reply)).then_some(())?;
        answer.await.ok()
    }

    /// The replicas that it holds; `None` when its thread has ended or is stuck.
    pub async fn inventory(&self) -> Option<Vec<HeldReplica>> {
        let (reply, answer) = oneshot::channel();
        self.control.push(Control::Inventory(reply)).then_some(())?;
        answer.await.ok()
    }

    /// Nobody needs these replicas, as they were reported. False when the thread is stuck.
    pub fn drop_replicas(&self, replicas: Vec<HeldReplica>) -> bool {
        self.control.push(Control::Drop(replicas))
    }

    /// Begin to verify all that it holds, unless that is under way. False when the thread is stuck.
    pub fn scrub(&self) -> bool {
        self.control.push(Control::Scrub)
    }

    /// Asks it to end: nothing new is accepted, what is in flight ends.
    pub fn stop(&self) {
        self.control.stop();
    }

    /// How it has ended, if it has. Told once.
    pub fn try_ended(&mut self) -> Option<Result<(), DriverError>> {
        let outcome = match self.ended.as_mut()?.try_recv() {
            Ok(outcome) => outcome,
            Err(oneshot::error::TryRecvError::Empty) => return None,
            Err(oneshot::error::TryRecvError::Closed) => Err(DriverError::Panicked),
        };
        self.ended = None;
        Some(outcome)
    }

    /// Waits until it has ended. May be asked once for the outcome, and again after a wait that was given up.
    pub async fn ended(&mut self) -> Result<(), DriverError> {
        let Some(ended) = &mut self.ended else {
            return Ok(());
        };
        let outcome = ended.await;
        self.ended = None;
        outcome.unwrap_or(Err(DriverError::Panicked))
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.control.stop();
    }
}

pub(super) fn no_ring(error: io::Error) -> DriverError {
    DriverError::Io {
        doing: "making an io_uring (is it allowed here? see /proc/sys/kernel/io_uring_disabled)",
        error,
    }
}

fn run(config: ThreadConfig, control: &Arc<ControlQueue>, opened: oneshot::Sender<Opened>) -> Result<(), DriverError> {
    let mut ring = Ring::new().map_err(no_ring)?;
    let geometry = config.device.geometry();
    let file = Rc::new(config.device.into_fd());
    let mut expect = OpenExpectation {
        cluster: None,
        device: config.expect,
    };
    if let Some(params) = config.format {
        let identity = open::format(&mut ring, &file, params, geometry)?;
        tracing::info!(device = %identity.device, cluster = %identity.cluster, "formatted");
        expect.device = Some(identity.device.uuid);
    }
    // Before the store reads: a read grant that was given just before a restart runs from here at the latest.
    let started = clock::now();
    let limits = match expect.device {
        Some(device) => config.store.staggered(device),
        None => config.store,
    };
    let store = open::open(&mut ring, &file, expect, geometry, limits, control)?;
    let identity = store.identity().expect("it is open");
    let recovered = store.recovered_seq();
    tracing::info!(device = %identity.device, commit = %recovered, "opened");
    let mut host_config = HostConfig::new(identity.cluster, config.cluster_key, identity.device);
    host_config.limits = config.host;
    #[cfg(feature = "canary")]
    {
        host_config.canary = config.planted;
    }
    host_config.background = BackgroundConfig {
        wall_clock: clock::since_1970(),
        ..config.background
    };
    let host = DeviceHost::new(started, host_config, store);
    let _ = opened.send(Opened { identity, recovered });
    Serving::new(
        ring,
        file,
        host,
        identity.device,
        config.listener,
        config.driver,
        control.clone(),
    )?
    .run()
}
