//! The service of metadata servers among themselves.

use std::sync::PoisonError;

use cairn_proto::capability::ClusterKey;
use cairn_proto::control::v1::members_server::Members;
use cairn_proto::control::v1::*;
use cairn_proto::control::{Code, TokenPurpose};
use tonic::{Request, Response, Status, Streaming};

use super::convert;
use super::driver::{Event, Failure, Handle, World};
use super::nodes::check_token;
use crate::limits::{PIECE_BYTES_MAX, RAFT_MESSAGE_BYTES_MAX, READY_ENTRIES};
use crate::state::{Refusal, command};

pub(super) struct MembersService {
    pub(super) handle: Handle,
    pub(super) key: ClusterKey,
    pub(super) id: u64,
}

fn refuse(code: Code, message: impl Into<String>) -> Status {
    Failure::from(Refusal::new(code, message)).into()
}

impl MembersService {
    fn check(&self, piece: &RaftPiece, message: usize) -> Result<(), Status> {
        if piece.to != self.id {
            return Err(refuse(
                Code::InvalidArgument,
                format!(
                    "this is metadata server {}, not {}: are two addresses mixed up?",
                    self.id, piece.to
                ),
            ));
        }
        if piece.data.len() > PIECE_BYTES_MAX || message + piece.data.len() > RAFT_MESSAGE_BYTES_MAX {
            return Err(refuse(Code::InvalidArgument, "a Raft message is too large"));
        }
        let rejections = self.handle.rejections.lock().unwrap_or_else(PoisonError::into_inner);
        match rejections.get(&(piece.from, piece.from_directory)) {
            Some(refusal) => Err(Failure::from(refusal.clone()).into()),
            None => Ok(()),
        }
    }

    async fn check_cluster(&self, cluster_id: Vec<u8>) -> Result<(), Status> {
        if cluster_id.is_empty() {
            return Ok(());
        }
        let check = self.handle.look(move |world| match world.state.cluster() {
            Some(own) if own.0[..] != cluster_id[..] => Err(Refusal::new(
                Code::ForeignCluster,
                "this metadata server belongs to another cluster: are two addresses mixed up?",
            )),
            _ => Ok(()),
        });
        check.await
    }
}

/// Refuses to remove a member without which nothing could be decided any more: of those that are left a majority must answer and
/// have nearly all of the log. Others that are gone are removed first.
fn check_left(world: &World<'_>, id: u64) -> Result<(), Refusal> {
    let members = world.state.members();
    if !members.contains_key(&id) || members.len() == 1 {
        // The state knows what to say.
        return Ok(());
    }
    let is_ready = |other: u64| {
        let peer = world.status.peers.iter().find(|peer| peer.id == other);
        let has_log = peer.is_some_and(|peer| peer.matched + READY_ENTRIES >= world.status.applied);
        other == world.status.id || (has_log && world.soft.is_member_alive(other, world.now))
    };
    let left = members.keys().copied().filter(|other| *other != id);
    let (ready, missing): (Vec<u64>, Vec<u64>) = left.partition(|other| is_ready(*other));
    let needed = (members.len() - 1) / 2 + 1;
    if ready.len() >= needed {
        return Ok(());
    }
    let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
    Err(Refusal::new(
        Code::MemberNeeded,
        format!(
            "without metadata server {id} only {} of the {} that are left would answer, and {needed} are needed: start again or remove \
             those that are missing first ({})",
            ready.len(),
            members.len() - 1,
            missing.join(", ")
        ),
    ))
}

#[tonic::async_trait]
impl Members for MembersService {
    async fn deliver(&self, request: Request<Streaming<RaftPiece>>) -> Result<Response<DeliverResponse>, Status> {
        check_token(&request, &self.key, TokenPurpose::Member)?;
        let mut stream = request.into_inner();
        let mut message = Vec::new();
        let mut checked = false;
        loop {
            let piece = tokio::select! {
                piece = stream.message() => piece?,
                () = self.handle.stopping() => None,
            };
            let Some(piece) = piece else { break };
            self.check(&piece, message.len())?;
            if !checked && !piece.cluster_id.is_empty() {
                self.check_cluster(piece.cluster_id).await?;
                checked = true;
            }
            message.extend_from_slice(&piece.data);
            if piece.last {
                let bytes = std::mem::take(&mut message);
                let (from, address, directory) = (piece.from, piece.from_address, piece.from_directory);
                match self.handle.offer(Event::Message {
                    from,
                    address,
                    directory,
                    bytes,
                }) {
                    // Too much to do: the message is lost, and Raft sends again.
                    Err(refusal) if refusal.code == Code::Busy => {}
                    // The driver is gone. Swallowing messages would make its member look reachable.
                    other => other.map_err(Failure::from)?,
                }
            }
        }
        Ok(Response::new(DeliverResponse {}))
    }

    async fn add_member(&self, request: Request<AddMemberRequest>) -> Result<Response<AddMemberResponse>, Status> {
        check_token(&request, &self.key, TokenPurpose::Member)?;
        let AddMemberRequest { id, address, directory } = request.into_inner();
        let answer = self.handle.propose(
            move |_| Ok(command::AddMember { id, address, directory }.into()),
            |_, world| AddMemberResponse {
                cluster_id: world
                    .state
                    .cluster()
                    .map(|cluster| cluster.0.to_vec())
                    .unwrap_or_default(),
                members: convert::members(world),
            },
        );
        answer.await.map(Response::new)
    }

    async fn remove_member(
        &self,
        request: Request<RemoveMemberRequest>,
    ) -> Result<Response<RemoveMemberResponse>, Status> {
        check_token(&request, &self.key, TokenPurpose::Member)?;
        let id = request.into_inner().id;
        let answer = self.handle.propose(
            move |world| {
                check_left(world, id)?;
                Ok(command::RemoveMember { id }.into())
            },
            |_, world| RemoveMemberResponse {
                members: convert::members(world),
            },
        );
        answer.await.map(Response::new)
    }
}
