//! What meta says about a volume and its groups, as a coordinator needs it.

use crate::ids::{DeviceId, Epoch, Generation, GroupCount, Layer, VolumeId};
use crate::limits::MEMBERS_MAX;

/// The configuration of one group, as committed by meta.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupConfig {
    /// Its number: changed by each commit.
    pub epoch: Epoch,
    /// `I`: the members that hold everything acknowledged.
    pub in_sync: Vec<DeviceId>,
    /// `J`: the members that are being filled.
    pub joining: Vec<DeviceId>,
    /// Members that were ejected and keep their data until they are rebuilt or dropped.
    pub stale: Vec<DeviceId>,
    /// The last `I` that had at least the write quorum of members; its data is kept (rule 20).
    pub rescue: Vec<DeviceId>,
    /// A copy that is to be elsewhere, while that is not so yet.
    pub moving: Option<Move>,
}

/// A member of `I` gives its place to another device: that one is filled, and admitted by the same change that ejects the
/// former. So the group has all its copies all the time, and never two in one failure domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// Who is in sync.
    pub from: DeviceId,
    /// Who takes its place: joining, or stale until it joins.
    pub to: DeviceId,
}

impl GroupConfig {
    /// Every device that it names but for the rescue set, members first.
    pub fn named(&self) -> impl Iterator<Item = DeviceId> {
        let named = self.in_sync.iter().chain(&self.joining).chain(&self.stale);
        named.copied()
    }

    /// Whether it names a device.
    pub fn names(&self, device: DeviceId) -> bool {
        self.named().any(|named| named == device)
    }

    /// Why this can't be the configuration of a group that is served; `None` if it can.
    pub fn problem(&self) -> Option<&'static str> {
        if self.in_sync.is_empty() {
            return Some("its in-sync set is empty");
        }
        if self.in_sync.len() + self.joining.len() > MEMBERS_MAX {
            return Some("it has more members than the protocol allows");
        }
        let mut members: Vec<_> = self
            .in_sync
            .iter()
            .chain(&self.joining)
            .map(|member| member.uuid)
            .collect();
        members.sort_unstable();
        members.dedup();
        if members.len() != self.in_sync.len() + self.joining.len() {
            return Some("a device is a member twice");
        }
        None
    }
}

/// What the coordinator must know of its volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeSettings {
    /// Which volume.
    pub id: VolumeId,
    /// How its chunks are dealt to groups.
    pub groups: GroupCount,
    /// `R`: copies that each group should have.
    pub replicas: u8,
    /// `W`: copies that a write needs to be acknowledged.
    pub write_quorum: u8,
    /// The fewest in-sync copies with which writes go on: `W`, or 1 for who prefers running on to being safe.
    pub min_copies: u8,
    /// The layer that is written.
    pub layer: Layer,
}

/// The quorums of an in-sync set of so many members. Any `S` and any `C` of one set have a member in common, and so have
/// any `S` and any `q`.
impl VolumeSettings {
    /// `S(I)`: how many members must be sealed for the attachment of the group to be complete (rule 6).
    pub fn seal_quorum(&self, in_sync: usize) -> usize {
        (in_sync + 1).saturating_sub(usize::from(self.write_quorum)).max(1)
    }

    /// `C(I)`: how many members must confirm a read (rule 17).
    pub fn confirm_quorum(&self, in_sync: usize) -> usize {
        usize::from(self.write_quorum).min(in_sync)
    }

    /// `q(I)`: durable answers that acknowledge a write (rule 12).
    pub fn write_quorum(&self, in_sync: usize) -> usize {
        let write_quorum = usize::from(self.write_quorum);
        if self.min_copies <= 1 {
            write_quorum.min(in_sync).max(1)
        } else {
            write_quorum
        }
    }

    /// How small ejecting may leave an in-sync set (rule 20).
    pub fn in_sync_min(&self) -> usize {
        if self.min_copies <= 1 {
            1
        } else {
            usize::from(self.write_quorum)
        }
    }

    /// On how many members of a proposed in-sync set everything acknowledged must be known to be durable (rule 19).
    pub fn proposal_quorum(&self, in_sync: usize) -> usize {
        usize::from(self.write_quorum).min(in_sync)
    }
}

/// The right to write a volume, as meta granted it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// The number of the attachment.
    pub generation: Generation,
    /// The proof of it for devices.
    pub capability: crate::capability::Capability,
}
