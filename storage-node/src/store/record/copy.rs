//! Type 4: blocks as another replica has them.

use cairn_proto::codec::{DecodeError, Reader};

use super::{Record, TARGET_BYTES, Target, check_blocks, get_target, put_target};
use crate::store::entry::{Entry, Uniform};
use crate::store::limits::ENTRY_BYTES;

/// Target, one index entry per block.
pub(super) fn bytes(blocks: usize) -> usize {
    TARGET_BYTES + blocks * ENTRY_BYTES
}

pub(super) fn encode(out: &mut Vec<u8>, at: &Target, entries: &[Entry]) {
    assert_eq!(entries.len(), at.range.count() as usize, "entries of {}", at.range);
    put_target(out, at);
    entries.iter().for_each(|entry| entry.encode(out));
}

pub(super) fn decode(reader: &mut Reader<'_>, end: u32) -> Result<Record, DecodeError> {
    let at = get_target(reader)?;
    let blocks = check_blocks(&at.range)?;
    let entries = (0..blocks)
        .map(|_| {
            let entry = Entry::decode(reader, end)?;
            match (entry.data_place(), Uniform::of(&entry)) {
                (None, None) => Err(DecodeError::Invalid("block kind")),
                _ => Ok(entry),
            }
        })
        .collect::<Result<_, _>>()?;
    Ok(Record::Copy { at, entries })
}
