//! Type 8: blocks that stand elsewhere now, their versions and checksums unchanged.

use cairn_proto::checksum::Checksum;
use cairn_proto::codec::{DecodeError, Put, Reader};

use super::{Moved, Record, TARGET_BYTES, Target, check_blocks, get_target, put_target};
use crate::store::entry::check_place;

/// Target, for each block where it was, where it is, its checksum.
pub(super) fn bytes(blocks: usize) -> usize {
    TARGET_BYTES + blocks * 12
}

pub(super) fn encode(out: &mut Vec<u8>, at: &Target, moves: &[Moved]) {
    assert_eq!(moves.len(), at.range.count() as usize, "moves of {}", at.range);
    put_target(out, at);
    for moved in moves {
        out.put_u32(moved.from);
        out.put_u32(moved.to);
        out.put_u32(moved.checksum.0);
    }
}

pub(super) fn decode(reader: &mut Reader<'_>, end: u32) -> Result<Record, DecodeError> {
    let at = get_target(reader)?;
    let blocks = check_blocks(&at.range)?;
    let moves = (0..blocks)
        .map(|_| {
            let (from, to, checksum) = (reader.u32()?, reader.u32()?, Checksum(reader.u32()?));
            check_place(from, end)?;
            check_place(to, end)?;
            Ok(Moved { from, to, checksum })
        })
        .collect::<Result<_, _>>()?;
    Ok(Record::Move { at, moves })
}
