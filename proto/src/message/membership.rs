//! Seal, Join, Confirm, Release: how a holder takes a volume, makes its members, and leaves.

use bytes::Bytes;

use super::{Holder, get_group_index, no_data};
use crate::capability::Capability;
use crate::codec::{DecodeError, Put, Reader};
use crate::ids::{Epoch, GroupIndex, Version};

/// Make the generation of a capability durable; refuse every lower one from then on (rule 3). Answered only when every
/// read grant given to an older holder has run out (rule 8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seal {
    /// The grant, with its proof.
    pub capability: Capability,
}

impl Seal {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.capability.encode(out);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Seal, DecodeError> {
        no_data(&data)?;
        Ok(Seal {
            capability: Capability::decode(reader)?,
        })
    }
}

/// The generation is durable on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sealed {
    /// What is sealed.
    pub holder: Holder,
}

impl Sealed {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Sealed, DecodeError> {
        no_data(&data)?;
        Ok(Sealed {
            holder: Holder::decode(reader)?,
        })
    }
}

/// What a replica is in its group's configuration, as its coordinator last said.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum ReplicaRole {
    /// In the in-sync set.
    InSync = 1,
    /// In the joining set.
    Joining = 2,
}

impl ReplicaRole {
    /// `None` for a number that is none.
    pub fn from_u8(number: u8) -> Option<ReplicaRole> {
        match number {
            1 => Some(ReplicaRole::InSync),
            2 => Some(ReplicaRole::Joining),
            _ => None,
        }
    }
}

/// Be a member of a group. Creates the replica if it is not there: nothing else does (rule 4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Join {
    /// Who asks.
    pub holder: Holder,
    /// Which group.
    pub group: GroupIndex,
    /// As what.
    pub role: ReplicaRole,
    /// The configuration that says so.
    pub epoch: Epoch,
}

impl Join {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        out.put_u8(self.group.0);
        out.put_bytes(&[0; 3]);
        out.put_u8(self.role as u8);
        out.put_bytes(&[0; 7]);
        out.put_u64(self.epoch.0);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Join, DecodeError> {
        no_data(&data)?;
        let holder = Holder::decode(reader)?;
        let group = get_group_index(reader)?;
        let role = ReplicaRole::from_u8(reader.u8()?).ok_or(DecodeError::Invalid("role"))?;
        reader.zeroes(7)?;
        Ok(Join {
            holder,
            group,
            role,
            epoch: Epoch(reader.u64()?),
        })
    }
}

/// The device has a replica of the group, under the holder's generation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Joined {
    /// Who asked.
    pub holder: Holder,
    /// Which group.
    pub group: GroupIndex,
    /// Whether the replica was made by this request, and so is empty.
    pub created: bool,
    /// The stable watermark that it knows: every version up to it is on all members. Zero if it knows none.
    pub stable: Version,
}

impl Joined {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        out.put_u8(self.group.0);
        out.put_bytes(&[0; 3]);
        out.put_u8(u8::from(self.created));
        out.put_bytes(&[0; 7]);
        out.put_u64(self.stable.to_bits());
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Joined, DecodeError> {
        no_data(&data)?;
        let holder = Holder::decode(reader)?;
        let group = get_group_index(reader)?;
        let created = reader.bool("created")?;
        reader.zeroes(7)?;
        Ok(Joined {
            holder,
            group,
            created,
            stable: Version::from_bits(reader.u64()?),
        })
    }
}

/// Is the device exactly at this generation (rule 17)? The same layout asks and answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Confirm {
    /// Who asks.
    pub holder: Holder,
}

impl Confirm {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Confirm, DecodeError> {
        no_data(&data)?;
        Ok(Confirm {
            holder: Holder::decode(reader)?,
        })
    }
}

/// The holder is done: it will use no read grant of this generation any more. The same layout asks and answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Release {
    /// Who leaves.
    pub holder: Holder,
}

impl Release {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Vec<Bytes> {
        self.holder.encode(out);
        Vec::new()
    }

    pub(super) fn decode(reader: &mut Reader<'_>, data: Bytes) -> Result<Release, DecodeError> {
        no_data(&data)?;
        Ok(Release {
            holder: Holder::decode(reader)?,
        })
    }
}
