//! Volumes for programs: an asynchronous face of the driver.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cairn_meta::client::MetaClient;
use cairn_proto::ids::{ClientId, ClusterId};
use cairn_proto::units::ByteSize;
use tokio::sync::{Semaphore, oneshot};

use super::limits::{LIBRARY_BYTES_MAX, LIBRARY_OPS_MAX, LIBRARY_PERMIT_BYTES};
use super::mailbox::{Command, UserId, Waiter};
use super::meta::{Identity, OpenError, answer_jobs};
use super::{Core, Died, Ended, Listener, Running, Settings, start};
use crate::core::ClientCore;
use crate::core::api::{CoreConfig, VolumeDescription};
use crate::core::limits::CoreLimits;
use crate::volume::api::{OP_BYTES_MAX, StatusExtent, VolumeError, VolumeOp, VolumeReply};

/// How long a client waits at its start for a cluster that has a leader.
const START_DEADLINE: Duration = Duration::from_secs(15);
/// How long it pauses between two looks.
const START_PAUSE: Duration = Duration::from_millis(100);

/// Why a client could not start.
#[derive(Debug)]
pub enum StartError {
    /// The metadata servers can't be reached, or have no leader.
    Meta(String),
    /// The system refused a thread, a descriptor or randomness.
    System(io::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Meta(why) => write!(f, "the metadata servers can't be used: {why}"),
            StartError::System(error) => write!(f, "the client can't start: {error}"),
        }
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            StartError::Meta(_) => None,
            StartError::System(error) => Some(error),
        }
    }
}

/// Starts a driver thread for the cluster of these metadata servers. Must be called within a tokio runtime, which then
/// speaks to them.
pub(crate) async fn start_client<C: Core>(
    endpoints: Vec<String>,
    words: String,
    settings: Settings,
    listeners: Vec<Listener>,
    make_core: impl FnOnce(CoreConfig) -> C,
) -> Result<Running, StartError> {
    let meta = MetaClient::new(endpoints);
    let cluster = cluster_of(&meta).await?;
    let client = draw_client_id().map_err(StartError::System)?;
    #[cfg_attr(not(feature = "canary"), allow(unused_mut))]
    let mut limits = CoreLimits::default();
    #[cfg(feature = "canary")]
    if let Some(planted) = crate::planted::chosen() {
        limits.replication.canary = planted.coordinator();
    }
    let core = make_core(CoreConfig {
        cluster,
        client,
        limits,
    });
    let node_id = settings.node_id;
    let (running, questions) = start(core, settings, listeners).map_err(StartError::System)?;
    let identity = Identity {
        cluster,
        client,
        words,
        node_id,
    };
    tokio::spawn(answer_jobs(meta, identity, questions.jobs, questions.mailbox));
    Ok(running)
}

/// A number that no other run of a client has.
fn draw_client_id() -> io::Result<ClientId> {
    let mut id = [0; 16];
    #[expect(
        clippy::disallowed_methods,
        reason = "a process draws its own name once, at the edge"
    )]
    getrandom::fill(&mut id).map_err(io::Error::from)?;
    Ok(ClientId(id))
}

/// The cluster that these metadata servers are; waits for it to have its first leader.
async fn cluster_of(meta: &MetaClient) -> Result<ClusterId, StartError> {
    let look = async {
        loop {
            let why = match meta.status().await {
                Ok(status) => match <[u8; 16]>::try_from(&status.cluster_id[..]) {
                    Ok(id) => return ClusterId(id),
                    Err(_) => "they have no leader yet".to_string(),
                },
                Err(error) => error.to_string(),
            };
            tracing::debug!("waiting for the metadata servers: {why}");
            tokio::time::sleep(START_PAUSE).await;
        }
    };
    match tokio::time::timeout(START_DEADLINE, look).await {
        Ok(cluster) => Ok(cluster),
        Err(_) => Err(StartError::Meta(match meta.status().await {
            Ok(_) => "they have no leader: are most of them running?".to_string(),
            Err(error) => error.to_string(),
        })),
    }
}

/// A client of one cluster: a thread that serves any number of volumes.
#[derive(Clone, Debug)]
pub struct Client {
    running: Arc<Running>,
}

impl Client {
    /// Starts one for the cluster of the metadata servers at these addresses (`host:port`). `words` is what it says of
    /// itself to people who ask who holds a volume. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// No metadata server answers within 15 s, or the system gives no thread.
    pub async fn start(endpoints: Vec<String>, words: &str) -> Result<Client, StartError> {
        let settings = Settings::default();
        let running = start_client(endpoints, words.to_string(), settings, Vec::new(), ClientCore::new).await?;
        Ok(Client::from(running))
    }

    /// Opens a volume. Its attachment is taken at the first operation, from whoever has it then.
    ///
    /// # Errors
    /// There is no such volume, or the metadata servers can't be asked.
    pub async fn open(&self, name: &str) -> Result<Volume, OpenError> {
        let (reply, answer) = oneshot::channel();
        let name = name.to_string();
        self.running.send(Command::Open { name, reply });
        let (user, description) = answer.await.map_err(|_| OpenError::Shutdown)??;
        Ok(Volume {
            running: self.running.clone(),
            user,
            description,
            operations: Arc::new(Semaphore::new(LIBRARY_OPS_MAX)),
            bytes: Arc::new(Semaphore::new(LIBRARY_BYTES_MAX / LIBRARY_PERMIT_BYTES)),
            left: false,
        })
    }

    /// Ends the client in order: what is in flight ends, attachments are released. Other clones, and volumes, are of no
    /// use afterwards.
    ///
    /// # Errors
    /// The thread had ended before.
    pub async fn shut_down(self) -> Result<Ended, Died> {
        self.running.send(Command::Shutdown);
        self.running.ended().await
    }
}

impl From<Running> for Client {
    fn from(running: Running) -> Client {
        Client {
            running: Arc::new(running),
        }
    }
}

/// An open volume. Offsets and lengths are in bytes, multiples of 512, within the volume. A write is durable, and seen by
/// every reader, when it has ended. An operation waits while too few copies can be reached; it fails only as
/// [`VolumeError`] says. Dropping the future of an operation does not undo it.
#[derive(Debug)]
pub struct Volume {
    running: Arc<Running>,
    user: UserId,
    description: VolumeDescription,
    operations: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    left: bool,
}

impl Volume {
    /// Opens a volume with a client, and a thread, of its own; see [`Client::open`] for many.
    ///
    /// # Errors
    /// There is no such volume, or the metadata servers can't be asked.
    pub async fn open(endpoints: Vec<String>, name: &str) -> Result<Volume, OpenError> {
        let client = Client::start(endpoints, "library").await;
        let client = client.map_err(|error| OpenError::Unreachable(error.to_string()))?;
        client.open(name).await
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// Its size when it was opened.
    pub fn size(&self) -> ByteSize {
        self.description.size
    }

    /// Reads; at most 32 MiB.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub async fn read(&self, offset: u64, length: u32) -> Result<Bytes, VolumeError> {
        match self.run(VolumeOp::Read { offset, length }, length as usize).await? {
            VolumeReply::Read(pieces) => Ok(joined(pieces)),
            other => panic!("a read was answered with {other:?}"),
        }
    }

    /// Writes; at most 32 MiB. Block-aligned memory at a block-aligned offset is sent without a copy.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), VolumeError> {
        let length = data.len();
        self.run(VolumeOp::Write { offset, data }, length).await.map(drop)
    }

    /// Waits until everything that has ended before is durable, which it is.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub async fn flush(&self) -> Result<(), VolumeError> {
        self.run(VolumeOp::Flush, 0).await.map(drop)
    }

    /// Gives space back. The range reads as zeroes afterwards.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub async fn discard(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.run(VolumeOp::Discard { offset, length }, 0).await.map(drop)
    }

    /// Makes the range read as zeroes; `may_discard`: also by giving its space back.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub async fn write_zeroes(&self, offset: u64, length: u64, may_discard: bool) -> Result<(), VolumeError> {
        let op = VolumeOp::WriteZeroes {
            offset,
            length,
            may_discard,
        };
        self.run(op, 0).await.map(drop)
    }

    /// Tells data from holes, from `offset` on; perhaps of less than was asked.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub async fn block_status(&self, offset: u64, length: u64) -> Result<Vec<StatusExtent>, VolumeError> {
        match self.run(VolumeOp::BlockStatus { offset, length }, 0).await? {
            VolumeReply::BlockStatus(extents) => Ok(extents),
            other => panic!("a block status was answered with {other:?}"),
        }
    }

    /// Ends its use: waits for what is in flight, releases the attachment.
    pub async fn close(mut self) {
        self.left = true;
        let (reply, answer) = oneshot::channel();
        self.running.send(Command::Leave { user: self.user, reply });
        // No answer means that the thread has ended, and released the attachment if it could.
        let _ = answer.await;
    }

    async fn run(&self, op: VolumeOp, payload: usize) -> Result<VolumeReply, VolumeError> {
        if payload > OP_BYTES_MAX as usize {
            return Err(VolumeError::Invalid("more than 32 MiB in one operation"));
        }
        let shutdown = |_| VolumeError::Shutdown;
        let permits = [self.operations.clone().acquire_owned().await.map_err(shutdown)?, {
            let count = payload.div_ceil(LIBRARY_PERMIT_BYTES) as u32;
            self.bytes.clone().acquire_many_owned(count).await.map_err(shutdown)?
        }];
        let (reply, answer) = oneshot::channel();
        let waiter = Waiter { reply, permits };
        self.running.send(Command::Submit {
            user: self.user,
            op,
            waiter,
        });
        answer.await.unwrap_or(Err(VolumeError::Shutdown))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if !self.left {
            let (reply, _) = oneshot::channel();
            self.running.send(Command::Leave { user: self.user, reply });
        }
    }
}

fn joined(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 {
        return pieces.remove(0);
    }
    let mut all = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    pieces.iter().for_each(|piece| all.extend_from_slice(piece));
    all.freeze()
}
