//! How everybody else speaks to the metadata servers: finds the leader, retries what may be retried, gives up in time.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cairn_proto::capability::ClusterKey;
use cairn_proto::control::v1::control_client::ControlClient;
use cairn_proto::control::v1::members_client::MembersClient;
use cairn_proto::control::v1::nodes_client::NodesClient;
use cairn_proto::control::v1::*;
use cairn_proto::control::{CODE_KEY, Code, LEADER_KEY, TOKEN_KEY, TokenPurpose};
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

/// How long one attempt at one member may take.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long connecting to one member may take.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a call may take in all, unless told otherwise.
const CALL_DEADLINE: Duration = Duration::from_secs(15);
/// The first and the longest pause after all members were tried.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(1000));
/// Members that the client remembers at the most: those it was given and leaders that it was pointed to.
const CHANNELS_MAX: usize = 32;
/// Bytes of one answer at the most.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Why a call ended without the answer that was asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientError {
    /// For programs.
    pub code: Code,
    /// For people: what failed, on what, and what to do next.
    pub message: String,
    /// Whether the change that was asked for may have been made all the same.
    pub outcome_unknown: bool,
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.outcome_unknown {
            f.write_str(" (it may have been done all the same: look before you ask again)")?;
        }
        Ok(())
    }
}

impl std::error::Error for ClientError {}

/// A client of the metadata servers. Clones share their connections.
#[derive(Clone)]
pub struct MetaClient {
    shared: Arc<Shared>,
    deadline: Duration,
    tokens: Option<Tokens>,
}

#[derive(Clone)]
struct Tokens {
    member: String,
    node: String,
}

struct Shared {
    endpoints: Mutex<Vec<String>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    leader: Option<String>,
    channels: BTreeMap<String, Channel>,
}

impl fmt::Debug for MetaClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetaClient")
            .field("endpoints", &self.endpoints())
            .finish_non_exhaustive()
    }
}

/// What became of one attempt.
enum Attempt<T> {
    Done(T),
    /// The member refused or could not be reached; nothing was done. Perhaps it knows who leads.
    Elsewhere(ClientError, Option<String>),
    /// Sent, and no answer.
    Unknown(ClientError),
    /// An answer, and it is final.
    Refused(ClientError),
}

impl MetaClient {
    /// A client of the members at these addresses (`host:port`). It connects when it is first used. One address of a
    /// living member is enough: it leads to the leader.
    pub fn new(endpoints: Vec<String>) -> MetaClient {
        MetaClient {
            shared: Arc::new(Shared {
                endpoints: Mutex::new(endpoints),
                state: Mutex::default(),
            }),
            deadline: CALL_DEADLINE,
            tokens: None,
        }
    }

    /// Shows with each call that needs it that the caller holds the cluster key. Nodes and members need that.
    pub fn with_cluster_key(mut self, key: &ClusterKey) -> MetaClient {
        let member = TokenPurpose::Member.token(key);
        let node = TokenPurpose::Node.token(key);
        self.tokens = Some(Tokens { member, node });
        self
    }

    /// How long a call may take in all; 15 s unless told otherwise.
    pub fn with_deadline(mut self, deadline: Duration) -> MetaClient {
        self.deadline = deadline;
        self
    }

    /// The addresses it tries.
    pub fn endpoints(&self) -> Vec<String> {
        lock(&self.shared.endpoints).clone()
    }

    /// From now on these are the members, as a heartbeat or a status said. An empty list changes nothing.
    pub fn set_endpoints(&self, endpoints: Vec<String>) {
        if !endpoints.is_empty() {
            *lock(&self.shared.endpoints) = endpoints;
        }
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ty) -> $response:ty, $client:ident, $token:ident, $repeat:literal;)*) => {
        impl MetaClient {
            $(
                $(#[$doc])*
                pub async fn $name(&self, request: $request) -> Result<$response, ClientError> {
                    self.call($repeat, TokenKind::$token, request, |channel, request| async move {
                        let mut client = $client::new(channel)
                            .max_decoding_message_size(MESSAGE_BYTES_MAX);
                        client.$name(request).await
                    })
                    .await
                }
            )*
        }
    };
}

#[derive(Clone, Copy)]
enum TokenKind {
    None,
    Node,
    Member,
}

// The literal: whether the call may be sent again after an attempt whose outcome is not known.
calls! {
    /// Creates a volume and places its groups.
    create_volume(CreateVolumeRequest) -> CreateVolumeResponse, ControlClient, None, false;
    /// One volume with its groups.
    get_volume(GetVolumeRequest) -> GetVolumeResponse, ControlClient, None, true;
    /// A page of the volumes, by name.
    list_volumes(ListVolumesRequest) -> ListVolumesResponse, ControlClient, None, true;
    /// Makes a volume larger.
    grow_volume(GrowVolumeRequest) -> GrowVolumeResponse, ControlClient, None, true;
    /// Deletes a volume.
    delete_volume(DeleteVolumeRequest) -> DeleteVolumeResponse, ControlClient, None, false;
    /// Takes the right to write. After a lost answer it is granted again: only the last generation counts.
    attach(AttachRequest) -> AttachResponse, ControlClient, None, true;
    /// Gives the right to write back.
    detach(DetachRequest) -> DetachResponse, ControlClient, None, true;
    /// The groups of a volume and the devices they are on.
    get_groups(GetGroupsRequest) -> GetGroupsResponse, ControlClient, None, true;
    /// Changes configurations of groups. When it ends without an answer the outcome is unknown.
    configure_groups(ConfigureGroupsRequest) -> ConfigureGroupsResponse, ControlClient, None, true;
    /// A page of the nodes.
    list_nodes(ListNodesRequest) -> ListNodesResponse, ControlClient, None, true;
    /// A page of the devices.
    list_devices(ListDevicesRequest) -> ListDevicesResponse, ControlClient, None, true;
    /// Has devices verify all that they hold.
    scrub_devices(ScrubDevicesRequest) -> ScrubDevicesResponse, ControlClient, None, true;
    /// Empties a node, or ends that.
    drain_node(DrainNodeRequest) -> DrainNodeResponse, ControlClient, None, true;
    /// What a holder says of its volumes.
    report_attachments(ReportAttachmentsRequest) -> ReportAttachmentsResponse, ControlClient, None, true;
    /// What has happened.
    list_events(ListEventsRequest) -> ListEventsResponse, ControlClient, None, true;
    /// Makes a node and its devices known. Needs the cluster key.
    register_node(RegisterNodeRequest) -> RegisterNodeResponse, NodesClient, Node, true;
    /// Says that a node is there. Needs the cluster key.
    heartbeat(HeartbeatRequest) -> HeartbeatResponse, NodesClient, Node, true;
    /// A page of what a device holds. Needs the cluster key.
    report_inventory(InventoryRequest) -> InventoryResponse, NodesClient, Node, true;
    /// Adds a metadata server. Needs the cluster key.
    add_member(AddMemberRequest) -> AddMemberResponse, MembersClient, Member, true;
    /// Removes a metadata server. Needs the cluster key.
    remove_member(RemoveMemberRequest) -> RemoveMemberResponse, MembersClient, Member, true;
}

impl MetaClient {
    /// How the cluster is, from the leader where there is one, else from any member that answers.
    pub async fn status(&self) -> Result<StatusResponse, ClientError> {
        let mut best: Option<StatusResponse> = None;
        let mut last_error = None;
        let mut asked = Vec::new();
        let mut queue = self.endpoints();
        while let Some(address) = queue.pop() {
            if asked.contains(&address) || asked.len() >= CHANNELS_MAX {
                continue;
            }
            asked.push(address.clone());
            match self.status_of(&address).await {
                Ok(status) if status.leader_id == status.member_id => return Ok(status),
                Ok(status) => {
                    if !status.leader_address.is_empty() {
                        queue.push(status.leader_address.clone());
                    }
                    if best
                        .as_ref()
                        .is_none_or(|best| best.applied_index < status.applied_index)
                    {
                        best = Some(status);
                    }
                }
                Err(error) => last_error = Some(error),
            }
        }
        best.ok_or_else(|| last_error.unwrap_or_else(no_endpoints))
    }

    /// How the cluster is, as the member at this address sees it. One attempt.
    pub async fn status_of(&self, address: &str) -> Result<StatusResponse, ClientError> {
        let channel = self.channel(address)?;
        let answer = async move { ControlClient::new(channel).status(StatusRequest {}).await };
        match tokio::time::timeout(ATTEMPT_TIMEOUT.min(self.deadline), answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(error_of(&status, address)),
            Err(_) => Err(no_answer(address)),
        }
    }

    async fn call<Req, Res, F, Fut>(
        &self,
        repeat: bool,
        token: TokenKind,
        request: Req,
        send: F,
    ) -> Result<Res, ClientError>
    where
        Req: Clone,
        F: Fn(Channel, Request<Req>) -> Fut,
        Fut: Future<Output = Result<Response<Res>, Status>>,
    {
        let end = Instant::now() + self.deadline;
        let mut pause = PAUSES.0;
        let mut last_error = no_endpoints();
        let mut unknown = false;
        loop {
            let mut queue = self.order();
            let mut pointed = 0;
            while let Some(address) = queue.pop() {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(ClientError {
                        outcome_unknown: unknown,
                        ..last_error
                    });
                }
                match self
                    .attempt(&address, left.min(ATTEMPT_TIMEOUT), token, &request, &send)
                    .await
                {
                    Attempt::Done(response) => {
                        lock(&self.shared.state).leader = Some(address);
                        return Ok(response);
                    }
                    Attempt::Refused(error) => {
                        lock(&self.shared.state).leader = Some(address);
                        return Err(error);
                    }
                    Attempt::Elsewhere(error, leader) => {
                        self.forget_leader(&address);
                        // A pointer is followed at once, but not in a circle.
                        if let Some(leader) = leader.filter(|leader| *leader != address && pointed < 3) {
                            pointed += 1;
                            queue.retain(|other| *other != leader);
                            queue.push(leader);
                        }
                        last_error = error;
                    }
                    Attempt::Unknown(error) => {
                        self.forget_leader(&address);
                        unknown = true;
                        last_error = error;
                        if !repeat {
                            return Err(ClientError {
                                outcome_unknown: true,
                                ..last_error
                            });
                        }
                    }
                }
            }
            if Instant::now() + pause >= end {
                return Err(ClientError {
                    outcome_unknown: unknown,
                    ..last_error
                });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn attempt<Req, Res, F, Fut>(
        &self,
        address: &str,
        timeout: Duration,
        token: TokenKind,
        message: &Req,
        send: &F,
    ) -> Attempt<Res>
    where
        Req: Clone,
        F: Fn(Channel, Request<Req>) -> Fut,
        Fut: Future<Output = Result<Response<Res>, Status>>,
    {
        let channel = match self.channel(address) {
            Ok(channel) => channel,
            Err(error) => return Attempt::Elsewhere(error, None),
        };
        let mut request = Request::new(message.clone());
        if let Some(value) = self.token_of(token).and_then(|token| token.parse().ok()) {
            request.metadata_mut().insert(TOKEN_KEY, value);
        }
        match tokio::time::timeout(timeout, send(channel, request)).await {
            Ok(Ok(response)) => Attempt::Done(response.into_inner()),
            Ok(Err(status)) => classify(&status, address),
            Err(_) => {
                // A connection that swallows requests (a peer that was cut off) is not used again.
                lock(&self.shared.state).channels.remove(address);
                Attempt::Unknown(no_answer(address))
            }
        }
    }

    fn token_of(&self, kind: TokenKind) -> Option<&str> {
        let tokens = self.tokens.as_ref()?;
        match kind {
            TokenKind::None => None,
            TokenKind::Node => Some(&tokens.node),
            TokenKind::Member => Some(&tokens.member),
        }
    }

    /// The members in the order of a stack: the leader, as far as known, is on top.
    fn order(&self) -> Vec<String> {
        let mut queue = self.endpoints();
        queue.reverse();
        if let Some(leader) = lock(&self.shared.state).leader.clone() {
            queue.retain(|address| *address != leader);
            queue.push(leader);
        }
        queue
    }

    fn forget_leader(&self, address: &str) {
        let mut state = lock(&self.shared.state);
        if state.leader.as_deref() == Some(address) {
            state.leader = None;
        }
    }

    fn channel(&self, address: &str) -> Result<Channel, ClientError> {
        let mut state = lock(&self.shared.state);
        if let Some(channel) = state.channels.get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| ClientError {
            code: Code::InvalidArgument,
            message: format!("`{address}` is not the address of a metadata server: write host:port"),
            outcome_unknown: false,
        })?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .connect_lazy();
        if state.channels.len() >= CHANNELS_MAX {
            state.channels.clear();
        }
        state.channels.insert(address.to_string(), channel.clone());
        Ok(channel)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn classify<T>(status: &Status, address: &str) -> Attempt<T> {
    let error = error_of(status, address);
    let metadata = |key| status.metadata().get(key).and_then(|value| value.to_str().ok());
    if metadata(CODE_KEY).is_none() {
        // Not from a metadata server's hand: the transport failed, before or after the request was sent.
        return if never_sent(status) {
            Attempt::Elsewhere(error, None)
        } else {
            Attempt::Unknown(error)
        };
    }
    match error.code {
        Code::NotLeader => Attempt::Elsewhere(error, metadata(LEADER_KEY).map(str::to_string)),
        Code::Busy | Code::NotReady | Code::MemberChangePending => Attempt::Elsewhere(error, None),
        Code::Timeout => Attempt::Unknown(error),
        _ => Attempt::Refused(error),
    }
}

/// Whether the connection could not even be made.
fn never_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

fn error_of(status: &Status, address: &str) -> ClientError {
    let code = status.metadata().get(CODE_KEY).and_then(|value| value.to_str().ok());
    match code {
        Some(text) => ClientError {
            code: Code::from_text(text).unwrap_or(Code::Internal),
            message: status.message().to_string(),
            outcome_unknown: false,
        },
        None => ClientError {
            code: Code::Unreachable,
            message: format!(
                "no metadata server answers at {address} ({}): is it running, and is the address right?",
                deepest(status)
            ),
            outcome_unknown: false,
        },
    }
}

/// The words of the innermost cause: `Connection refused` says more than `transport error`.
fn deepest(status: &Status) -> String {
    let mut words = status.message().to_string();
    let mut source = status.source();
    while let Some(error) = source {
        words = error.to_string();
        source = error.source();
    }
    words
}

fn no_answer(address: &str) -> ClientError {
    ClientError {
        code: Code::Timeout,
        message: format!("the metadata server at {address} did not answer in time: is a majority of them running?"),
        outcome_unknown: false,
    }
}

fn no_endpoints() -> ClientError {
    ClientError {
        code: Code::Unreachable,
        message: "no metadata server is known: give at least one address".to_string(),
        outcome_unknown: false,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn nobody() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string()
    }

    #[tokio::test]
    async fn with_nobody_there_a_call_ends_at_its_deadline_with_words() {
        let address = nobody().await;
        let client = MetaClient::new(vec![address.clone()]).with_deadline(Duration::from_millis(300));
        let error = client.create_volume(CreateVolumeRequest::default()).await.unwrap_err();
        assert_eq!(
            (error.code, error.outcome_unknown),
            (Code::Unreachable, false),
            "it was never sent: {error}"
        );
        assert!(error.to_string().contains(&address), "{error}");
        let error = client.status().await.unwrap_err();
        assert_eq!(error.code, Code::Unreachable);
        let error = MetaClient::new(vec![])
            .with_deadline(Duration::from_millis(10))
            .status()
            .await
            .unwrap_err();
        assert!(error.to_string().contains("give at least one address"), "{error}");
        let client = MetaClient::new(vec!["no address".into()]).with_deadline(Duration::from_millis(10));
        let error = client.list_nodes(ListNodesRequest::default()).await.unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument, "{error}");
    }

    #[tokio::test]
    async fn a_change_without_an_answer_is_not_repeated_and_says_that_its_outcome_is_unknown() {
        // It takes connections and never answers.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let client = MetaClient::new(vec![address]).with_deadline(Duration::from_millis(300));
        let error = client.create_volume(CreateVolumeRequest::default()).await.unwrap_err();
        assert_eq!((error.code, error.outcome_unknown), (Code::Timeout, true));
        assert!(error.to_string().contains("look before you ask again"), "{error}");
    }
}
