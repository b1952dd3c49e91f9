//! Raft messages between members: one stream and one bounded queue for each. What does not fit is dropped: Raft sends
//! again, and an old message is worth less than a new one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cairn_proto::control::v1::RaftPiece;
use cairn_proto::control::v1::members_client::MembersClient;
use cairn_proto::control::{CODE_KEY, Code, TOKEN_KEY};
use cairn_proto::ids::ClusterId;
use tokio::runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Request, Status};

use super::driver::{Event, Handle, Myself};
use crate::limits::{META_MEMBERS_MAX, OUTGOING_BYTES_MAX, OUTGOING_MAX, PIECE_BYTES_MAX};
use crate::state::Refusal;

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a piece may wait for room on the wire before the connection is held for dead.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);
/// The pause after a connection has ended: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Pieces on their way into one connection.
const PIECES_MAX: usize = 8;
/// How long a silent connection lives when the other end does not answer pings.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3));

struct Outgoing {
    message: Vec<u8>,
    cluster: Option<ClusterId>,
}

struct Peer {
    address: String,
    queue: mpsc::Sender<Outgoing>,
    queued_bytes: Arc<AtomicUsize>,
}

pub(super) struct Transport {
    runtime: runtime::Handle,
    handle: Handle,
    myself: Myself,
    token: String,
    peers: BTreeMap<u64, Peer>,
    /// Where members said that they are, for those that the state does not know yet.
    learned: BTreeMap<u64, String>,
}

impl Transport {
    /// Must be called within a runtime: that is where the connections live.
    pub(super) fn new(handle: Handle, myself: Myself, token: String) -> Transport {
        let runtime = runtime::Handle::current();
        Transport {
            runtime,
            handle,
            myself,
            token,
            peers: BTreeMap::new(),
            learned: BTreeMap::new(),
        }
    }

    /// A member said where it is.
    pub(super) fn learn(&mut self, id: u64, address: &str) {
        if self.learned.len() <= META_MEMBERS_MAX * 2 && self.learned.get(&id).is_none_or(|known| known != address) {
            self.learned.insert(id, address.to_string());
        }
    }

    pub(super) fn send(&mut self, to: u64, address: Option<&str>, cluster: Option<ClusterId>, message: Vec<u8>) {
        let Some(address) = address
            .or(self.learned.get(&to).map(String::as_str))
            .map(str::to_string)
        else {
            return;
        };
        if self.peers.get(&to).is_none_or(|peer| peer.address != address) {
            if self.peers.len() > META_MEMBERS_MAX * 2 {
                self.peers.clear();
            }
            let peer = self.connect(to, address);
            self.peers.insert(to, peer);
        }
        let peer = &self.peers[&to];
        let bytes = message.len();
        let queued = peer.queued_bytes.load(Ordering::Relaxed);
        if queued > 0 && queued + bytes > OUTGOING_BYTES_MAX {
            metrics::counter!("cairn_meta_messages_dropped_total").increment(1);
            return;
        }
        peer.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        if peer.queue.try_send(Outgoing { message, cluster }).is_err() {
            peer.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            metrics::counter!("cairn_meta_messages_dropped_total").increment(1);
        }
    }

    fn connect(&self, to: u64, address: String) -> Peer {
        let (queue, messages) = mpsc::channel(OUTGOING_MAX);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let link = Link {
            to,
            address: address.clone(),
            messages,
            queued_bytes: queued_bytes.clone(),
            handle: self.handle.clone(),
            myself: self.myself.clone(),
            token: self.token.clone(),
        };
        self.runtime.spawn(link.run());
        Peer {
            address,
            queue,
            queued_bytes,
        }
    }
}

struct Link {
    to: u64,
    address: String,
    messages: mpsc::Receiver<Outgoing>,
    queued_bytes: Arc<AtomicUsize>,
    handle: Handle,
    myself: Myself,
    token: String,
}

impl Link {
    /// Runs until the queue is given up.
    async fn run(mut self) {
        let mut pause = PAUSES.0;
        loop {
            let connected = self.serve().await;
            match connected {
                Ok(()) => return,
                Err((status, sent)) => {
                    if sent {
                        pause = PAUSES.0;
                    }
                    self.explain(&status);
                }
            }
            // It does not matter when the driver is too busy to hear of it.
            let _ = self.handle.offer(Event::Unreachable(self.to));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
            // What has waited meanwhile is stale, and Raft has more.
            while let Ok(outgoing) = self.messages.try_recv() {
                self.queued_bytes.fetch_sub(outgoing.message.len(), Ordering::Relaxed);
            }
            if self.messages.is_closed() {
                return;
            }
        }
    }

    /// One connection. `Ok` when the queue is given up; else why it ended, and whether anything was sent.
    async fn serve(&mut self) -> Result<(), (Status, bool)> {
        let invalid = |_| {
            (
                Status::invalid_argument(format!("`{}` is no address", self.address)),
                false,
            )
        };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).map_err(invalid)?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1);
        let channel = endpoint
            .connect()
            .await
            .map_err(|error| (Status::from_error(Box::new(error)), false))?;
        let (pieces, stream) = mpsc::channel(PIECES_MAX);
        let mut request = Request::new(ReceiverStream::new(stream));
        if let Ok(token) = self.token.parse() {
            request.metadata_mut().insert(TOKEN_KEY, token);
        }
        let mut client = MembersClient::new(channel);
        let call = client.deliver(request);
        tokio::pin!(call);
        let mut sent = false;
        loop {
            tokio::select! {
                ended = &mut call => {
                    let status = ended.err().unwrap_or_else(|| Status::unavailable("the other end has closed the stream"));
                    return Err((status, sent));
                }
                outgoing = self.messages.recv() => {
                    let Some(outgoing) = outgoing else { return Ok(()) };
                    self.queued_bytes.fetch_sub(outgoing.message.len(), Ordering::Relaxed);
                    let send = send_pieces(&pieces, self.split(outgoing));
                    tokio::select! {
                        ended = &mut call => {
                            let closed = || Status::unavailable("the other end has closed the stream");
                            return Err((ended.err().unwrap_or_else(closed), sent));
                        }
                        result = send => result.map_err(|status| (status, sent))?,
                    }
                    sent = true;
                }
            }
        }
    }

    fn split(&self, outgoing: Outgoing) -> Vec<RaftPiece> {
        let chunks: Vec<&[u8]> = outgoing.message.chunks(PIECE_BYTES_MAX).collect();
        let count = chunks.len();
        let cluster_id = outgoing.cluster.map(|cluster| cluster.0.to_vec()).unwrap_or_default();
        let piece = |(place, chunk): (usize, &[u8])| RaftPiece {
            from: self.myself.id,
            to: self.to,
            from_directory: self.myself.directory,
            data: chunk.to_vec(),
            last: place + 1 == count,
            from_address: self.myself.address.clone(),
            cluster_id: cluster_id.clone(),
        };
        chunks
            .into_iter()
            .enumerate()
            .map(|(place, chunk)| piece((place, chunk)))
            .collect()
    }

    fn explain(&self, status: &Status) {
        let code = status
            .metadata()
            .get(CODE_KEY)
            .and_then(|value| value.to_str().ok())
            .and_then(Code::from_text);
        match code {
            Some(Code::InvalidMember) => {
                let refusal = Refusal::new(Code::InvalidMember, status.message());
                // If the queue is full it is said again at the next attempt.
                let _ = self.handle.offer(Event::Rejected(refusal));
            }
            Some(_) => {
                tracing::warn!(to = self.to, address = %self.address, "messages are refused: {}", status.message())
            }
            None => tracing::debug!(to = self.to, address = %self.address, "connection ended: {status}"),
        }
    }
}

async fn send_pieces(pieces: &mpsc::Sender<RaftPiece>, message: Vec<RaftPiece>) -> Result<(), Status> {
    for piece in message {
        pieces
            .send_timeout(piece, SEND_TIMEOUT)
            .await
            .map_err(|_| Status::unavailable("the other end takes nothing any more"))?;
    }
    Ok(())
}
