//! Type 10: nothing changes. Its batch confirms the one before.

use cairn_proto::codec::{DecodeError, Put, Reader};

use super::Record;

/// Kind, seven zero bytes, commit sequence.
pub(super) const BYTES: usize = 16;

/// Why an empty batch was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(in crate::store) enum MarkerKind {
    /// The log was idle.
    Idle = 1,
    /// The device was opened; the sequence is the last commit that was believed.
    Recovered = 2,
}

pub(super) fn encode(out: &mut Vec<u8>, kind: MarkerKind, recovered: u64) {
    out.put_u8(kind as u8);
    out.put_bytes(&[0; 7]);
    out.put_u64(recovered);
}

pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Record, DecodeError> {
    let kind = match reader.u8()? {
        1 => MarkerKind::Idle,
        2 => MarkerKind::Recovered,
        _ => return Err(DecodeError::Invalid("marker")),
    };
    reader.zeroes(7)?;
    Ok(Record::Marker {
        kind,
        recovered: reader.u64()?,
    })
}
