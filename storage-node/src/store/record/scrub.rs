//! Type 12: how far the scrub is. Layout in `scrub_state.rs`.

use cairn_proto::codec::{DecodeError, Reader};

use super::Record;
use crate::store::scrub_state::ScrubState;

pub(super) const BYTES: usize = ScrubState::BYTES;

pub(super) fn encode(out: &mut Vec<u8>, state: &ScrubState) {
    state.encode(out);
}

pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Record, DecodeError> {
    Ok(Record::Scrub(ScrubState::decode(reader)?))
}
