//! One open volume: its data path, its attachment, and what it asks of meta.

use std::collections::VecDeque;

use cairn_proto::ids::DeviceId;
use cairn_proto::replication::{Coordinator, OpToken, Operation, VolumeSettings};
use cairn_proto::time::Time;

use super::api::{
    AttachmentPhase, GroupPhase, GroupStatus, MemberRole, MemberStatus, MetaRequestId, VolumeDescription, VolumeStatus,
};
use super::backoff::Backoff;
use super::limits::CoreLimits;
use crate::volume::VolumeLayer;

/// How far a volume is.
pub(super) enum Phase {
    /// No operation yet.
    Idle,
    /// Meta was asked for the attachment, or is asked again at `retry_at`.
    Asking {
        request: Option<MetaRequestId>,
        retry_at: Time,
    },
    /// It is attached.
    Attached(Box<Coordinator>),
    /// It was released; meta is told.
    Detaching { request: MetaRequestId },
    /// A newer attachment has taken over.
    Fenced,
    /// Meta refused it.
    Gone(String),
}

/// An open volume.
pub(super) struct Volume {
    pub(super) description: VolumeDescription,
    pub(super) layer: VolumeLayer,
    pub(super) phase: Phase,
    /// Operations that wait for the attachment. Bounded by the layer's permits.
    pub(super) held: VecDeque<(OpToken, Operation)>,
    pub(super) devices: Vec<DeviceId>,
    pub(super) backoff: Backoff,
    /// A question for addresses that has no answer yet.
    pub(super) refresh: Option<MetaRequestId>,
    pub(super) refresh_wanted: bool,
    pub(super) refreshed_at: Option<Time>,
    /// A question of the coordinator that has no answer yet.
    pub(super) asked: Option<MetaRequestId>,
    /// When closing ends, in order or not.
    pub(super) close_by: Option<Time>,
    /// Until when a release waits for members that are a little late, once it could begin.
    pub(super) settle_by: Option<Time>,
    /// Whether the release has begun.
    pub(super) is_releasing: bool,
    /// Whether it is only repaired.
    pub(super) is_care: bool,
    /// When it is to be looked at whether meta is to be told how it is.
    pub(super) look_at: Option<Time>,
    /// When meta was told.
    pub(super) reported_at: Option<Time>,
    /// Since when all of its groups have been whole.
    pub(super) whole_since: Option<Time>,
}

impl Volume {
    pub(super) fn new(description: VolumeDescription, limits: &CoreLimits) -> Volume {
        Volume {
            layer: VolumeLayer::new(description.id, description.size.0, limits.volume),
            description,
            phase: Phase::Idle,
            held: VecDeque::new(),
            devices: Vec::new(),
            backoff: Backoff::default(),
            refresh: None,
            refresh_wanted: false,
            refreshed_at: None,
            asked: None,
            close_by: None,
            settle_by: None,
            is_releasing: false,
            is_care: false,
            look_at: None,
            reported_at: None,
            whole_since: None,
        }
    }

    pub(super) fn settings(&self) -> VolumeSettings {
        VolumeSettings {
            id: self.description.id,
            groups: self.description.groups,
            replicas: self.description.replicas,
            write_quorum: self.description.write_quorum,
            min_copies: self.description.min_copies,
            layer: self.description.layer,
        }
    }

    pub(super) fn coordinator(&mut self) -> Option<&mut Coordinator> {
        match &mut self.phase {
            Phase::Attached(coordinator) => Some(coordinator),
            _ => None,
        }
    }

    /// When addresses may be asked for, if they are wanted.
    pub(super) fn refresh_due(&self, limits: &CoreLimits) -> Option<Time> {
        if !self.refresh_wanted || self.refresh.is_some() || !matches!(self.phase, Phase::Attached(_)) {
            return None;
        }
        Some(self.refreshed_at.map_or(Time::ZERO, |at| at + limits.refresh_interval))
    }

    /// When something is due.
    pub(super) fn timeout(&self, limits: &CoreLimits) -> Option<Time> {
        let phase = match &self.phase {
            Phase::Asking {
                request: None,
                retry_at,
            } => Some(*retry_at),
            Phase::Attached(coordinator) => coordinator.poll_timeout(),
            _ => None,
        };
        [
            phase,
            self.refresh_due(limits),
            self.close_by,
            self.settle_by,
            self.look_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Whether every group has all its copies, in sync and equal.
    pub(super) fn is_whole(&self) -> bool {
        let Phase::Attached(coordinator) = &self.phase else {
            return false;
        };
        let replicas = usize::from(self.description.replicas);
        coordinator.status().iter().all(|group| is_whole(group, replicas))
    }

    /// Whether every in-sync copy of every group holds all that was written, so that nothing is left to do when the
    /// attachment ends.
    pub(super) fn is_settled(&self) -> bool {
        let Phase::Attached(coordinator) = &self.phase else {
            return false;
        };
        coordinator.status().iter().all(is_settled)
    }

    /// Whether it may become [settled](Self::is_settled) by itself within moments: all groups are served, all members in
    /// sync can be spoken to, and what is not answered yet is on its way.
    pub(super) fn is_settling(&self) -> bool {
        let Phase::Attached(coordinator) = &self.phase else {
            return false;
        };
        let status = coordinator.status();
        let is_up =
            |group: &GroupStatus| group.phase == GroupPhase::Serving && in_sync(group).all(|member| member.joined);
        !status.iter().all(is_settled) && status.iter().all(is_up)
    }

    pub(super) fn status(&self) -> VolumeStatus {
        let (attachment, groups) = match &self.phase {
            Phase::Idle => (AttachmentPhase::Idle, Vec::new()),
            Phase::Asking { .. } => (AttachmentPhase::Asking, Vec::new()),
            Phase::Attached(coordinator) => (
                AttachmentPhase::Attached(coordinator.generation()),
                coordinator.status(),
            ),
            Phase::Detaching { .. } => (AttachmentPhase::Idle, Vec::new()),
            Phase::Fenced => (AttachmentPhase::Fenced, Vec::new()),
            Phase::Gone(why) => (AttachmentPhase::Gone(why.clone()), Vec::new()),
        };
        VolumeStatus {
            attachment,
            groups,
            operations: self.layer.operations(),
            waiting: self.layer.waiting(),
            permit_bytes: self.layer.permit_bytes(),
        }
    }
}

fn in_sync(group: &GroupStatus) -> impl Iterator<Item = &MemberStatus> {
    group.members.iter().filter(|member| member.role == MemberRole::InSync)
}

/// Whether the in-sync copies of a group are equal and sound, and nothing is on its way to them.
fn is_settled(group: &GroupStatus) -> bool {
    let is_even = |member: &MemberStatus| {
        member.complete && member.joined && member.lacking_blocks == 0 && member.damaged_blocks == 0
    };
    group.phase == GroupPhase::Serving
        && !group.changing
        && in_sync(group).all(|member| is_even(member) && member.outstanding == 0)
}

/// Whether a group has all the copies that it should have, in sync and equal, and nobody is to be filled.
fn is_whole(group: &GroupStatus, replicas: usize) -> bool {
    let sound = |member: &MemberStatus| {
        let equal = member.complete && member.joined && member.damaged_blocks == 0;
        match member.role {
            MemberRole::InSync => equal,
            MemberRole::Joining => false,
            MemberRole::Stale => true,
        }
    };
    group.phase == GroupPhase::Serving
        && !group.changing
        && !group.moving
        && in_sync(group).count() >= replicas
        && group.members.iter().all(sound)
}
