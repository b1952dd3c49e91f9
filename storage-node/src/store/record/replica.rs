//! Types 6 and 7: a group's replica with its role and epoch, and its end.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::{Epoch, GroupId};

use super::{get_group, put_group};

/// Group, role, three zero bytes, epoch. Role and epoch are zero in type 7.
pub(super) const BYTES: usize = 24;

pub(super) fn encode(out: &mut Vec<u8>, group: GroupId, role: u8, epoch: Epoch) {
    put_group(out, group);
    out.put_u8(role);
    out.put_bytes(&[0; 3]);
    out.put_u64(epoch.0);
}

pub(super) fn decode(reader: &mut Reader<'_>) -> Result<(GroupId, u8, Epoch), DecodeError> {
    let group = get_group(reader)?;
    let role = reader.u8()?;
    reader.zeroes(3)?;
    Ok((group, role, Epoch(reader.u64()?)))
}
