//! Types 6 and 7: a group's replica and its role, and its end.

use cairn_proto::codec::{DecodeError, Put, Reader};
use cairn_proto::ids::GroupId;

use super::{get_group, put_group};

/// Group, role, three zero bytes. The role is zero in type 7.
pub(super) const BYTES: usize = 16;

pub(super) fn encode(out: &mut Vec<u8>, group: GroupId, role: u8) {
    put_group(out, group);
    out.put_u8(role);
    out.put_bytes(&[0; 3]);
}

pub(super) fn decode(reader: &mut Reader<'_>) -> Result<(GroupId, u8), DecodeError> {
    let group = get_group(reader)?;
    let role = reader.u8()?;
    reader.zeroes(3)?;
    Ok((group, role))
}
